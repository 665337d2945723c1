"""People with keys: a change goes from a request through signature files to a repository."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from federation.key_change import KeyChange
from federation.key_request import assemble_change, make_change, sign_change
from federation.keys import KeyFolder, Signer, generate
from tests.trust.fleet_of_one import Publisher

_numbers = itertools.count()


class Ceremony:
    """A publisher's key holders.

    Args:
        publisher: whose repository is changed.
        folder: for requests and new keys.
    """

    def __init__(self, publisher: Publisher, folder: Path) -> None:
        self.publisher, self.folder = publisher, folder
        self.known: dict[str, Signer] = {
            name: publisher.keys.signer(name) for name in publisher.keys.names()
        }

    def make(self, *names: str) -> tuple[Signer, ...]:
        """New keys."""
        folder: KeyFolder = generate(self.folder / f"keys{next(_numbers)}", names)
        made = {name: folder.signer(name) for name in names}
        self.known |= made
        return tuple(made.values())

    def request(self, change: KeyChange, why: str = "drill") -> Path:
        """A request, not signed yet."""
        out = self.folder / f"change{next(_numbers)}"
        published = self.publisher.repository.offline()
        make_change(out, published=published, change=change, why=why, now=self.publisher.now)
        return out

    def sign(self, request: Path, names: Iterable[str]) -> None:
        for name in names:
            trusted = (request / "before" / "root.json").read_bytes()
            sign_change(request, self.known[name], roots=[trusted])

    def publish(self, request: Path, *, hold: bool = False) -> None:
        by_id = {signer.public_key.keyid: signer for signer in self.known.values()}
        self.publisher.repository.publish_keys(
            assemble_change(request), now=self.publisher.now, online=by_id.__getitem__, hold=hold
        )

    def carry_out(self, change: KeyChange, names: Iterable[str], *, hold: bool = False) -> Path:
        """Request, signatures, publication."""
        request = self.request(change)
        self.sign(request, names)
        self.publish(request, hold=hold)
        return request

    def swap(self, circle: str, old: str, new: str) -> KeyChange:
        """One key for another."""
        (signer,) = self.make(new)
        return KeyChange(drop=(old,), add={circle: (signer.public_key,)})
