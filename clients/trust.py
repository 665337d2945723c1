"""Whether a device may act on what it was told: the one place where that is decided.

``accept`` takes a bundle of metadata files from any carrier and answers what this device is to do,
or raises :class:`Rejected` with a reason from the closed vocabulary. The checks, in order:

1. the metadata verifies, is not expired and not older than anything seen
   (:mod:`clients.trust_metadata`)
2. the round is not older than the last one, nor another one under the same sequence number
3. the first assignment above this device's bucket holds
4. both roles agree: the adapter keys have signed that very target with that very digest
5. base model, runtime, hardware, release counter against the signed floor, the releases that the
   adapter keys have revoked, this device's own bad list

An order too many within a day is not followed until later: whoever orders so much is a thief of the
online key.

What has been learnt is durable before the answer is given, also when the answer is a refusal. A
refusal never touches the adapter that serves. The same bundle gets the same answer every time: it
is for the agent to see that the release is the one that runs already.

It knows nothing of the network, of payloads, or of how an adapter is run.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from aggregation import durable
from clients.errors import ClientError
from clients.trust_loader import Loader
from clients.trust_metadata import Verification, check_root
from clients.trust_rules import decide, limit_changes, read_round, read_standing
from clients.trust_source import BundleSource, Refused
from clients.trust_state import TrustState, TrustStateError, read_state, write_state
from clients.trust_verdict import (
    DeviceFacts,
    Install,
    Rejected,
    SignedRelease,
    Stay,
    Verdict,
    Withdraw,
)
from protos.messages import MetadataBundle

__all__ = [
    "DeviceFacts",
    "Install",
    "Rejected",
    "SignedRelease",
    "Stay",
    "Trust",
    "TrustStateError",
    "Verdict",
    "Withdraw",
]

log = logging.getLogger("airpeft.clients.trust")

ROOT_FILE = "root.json"
ROOTS = "roots"


class Trust:
    """A device's durable trust. One process at a time may hold a folder.

    Args:
        folder: where its state lives.
        root: the root metadata that it was enrolled with, as signed.

    Raises:
        Rejected: the root is not one.
        TrustStateError: the stored state is damaged.
    """

    def __init__(self, folder: Path, root: bytes) -> None:
        _checked_root(root)
        self._folder = folder
        self._root = root
        self._known = _stored_roots(folder / ROOTS)
        self._state = read_state(folder)
        self._loader = Loader()

    @classmethod
    def bootstrap(cls, folder: Path, root: bytes) -> Trust:
        """Trust a root for the first time and keep it; once for each folder.

        Raises:
            Rejected: the root is not one.
            ClientError: the folder trusts another root already.
            StorageError: the disk refused.
        """
        _checked_root(root)
        kept = folder / ROOT_FILE
        if kept.exists() and kept.read_bytes() != root:
            raise ClientError(f"{folder} trusts another root already: use a fresh folder")
        durable.write_bytes(kept, root)
        return cls(folder, root)

    @classmethod
    def open(cls, folder: Path) -> Trust:
        """Go on with the root that was kept at enrolment.

        Raises:
            ClientError: there is none.
            TrustStateError: the stored state is damaged.
        """
        try:
            root = (folder / ROOT_FILE).read_bytes()
        except OSError as error:
            raise ClientError(
                f"cannot read {folder / ROOT_FILE}: {error.strerror}; enrol the device first"
            ) from error
        return cls(folder, root)

    @property
    def state(self) -> TrustState:
        """The high-water marks, for the watch request and for people."""
        return self._state

    def accept(self, bundle: MetadataBundle, *, device: DeviceFacts, now: datetime) -> Verdict:
        """What this device is to do.

        Args:
            bundle: files of the repository by name, from anywhere.
            device: what this device is.
            now: its clock, with a zone; it may be wrong.

        Raises:
            Rejected: it must not be followed, with the reason.
            StorageError: what was learnt could not be made durable, so nothing may be done.
        """
        try:
            walk = Verification(
                BundleSource(bundle.files),
                embedded=self._root,
                known=self._known,
                state=self._state,
                now=now,
                built_unix=device.agent_built_unix,
                loader=self._loader,
            )
        except Refused as error:
            raise Rejected(error.reason, error.detail) from None
        try:
            believed = walk.run()
            walk.state = read_standing(believed, walk.state)
            document, walk.state = read_round(believed, walk.state)
            verdict = decide(believed, document, walk.state, device)
            verdict, walk.state = limit_changes(verdict, walk.state, walk.moment())
            return verdict
        except Refused as error:
            raise Rejected(error.reason, error.detail) from None
        finally:
            self._keep(walk)

    def revoked(self, sha256: str) -> str | None:
        """Why the adapter keys have revoked a payload; None if they have not.

        What is revoked must not only not be installed: a device that serves it leaves it, whatever
        the round says (:mod:`clients.leaving`).
        """
        return self._state.revoked.get(sha256)

    def remember_bad(self, release: SignedRelease | str) -> None:
        """Never install these very bytes again on this device.

        Args:
            release: the release, or the digest of its payload as hex.

        Raises:
            StorageError: the disk refused.
        """
        sha256 = release.sha256 if isinstance(release, SignedRelease) else release
        state = self._state.with_bad(sha256)
        write_state(self._folder, state)
        self._state = state

    def _keep(self, walk: Verification) -> None:
        """Make durable what was learnt: roots first, for the marks speak of them."""
        for number, data in walk.roots.items():
            if self._known.get(number) != data:
                durable.write_bytes(self._folder / ROOTS / f"{number}.root.json", data)
                self._known[number] = data
                log.info("root %d is trusted from now on", number)
        if walk.state != self._state:
            write_state(self._folder, walk.state)
            self._state = walk.state


def _checked_root(root: bytes) -> None:
    try:
        check_root(root)
    except Refused as error:
        raise Rejected(error.reason, error.detail) from None


def _stored_roots(folder: Path) -> dict[int, bytes]:
    """Roots trusted before; they are verified again each time, so a damaged one does no harm."""
    roots = {}
    for path in folder.glob("*.root.json"):
        number = path.name.removesuffix(".root.json")
        if number.isdigit():
            roots[int(number)] = path.read_bytes()
    return roots
