"""Which change of keys a repository takes in: signed as devices will ask for it; writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from federation import roles
from federation.circles import ONLINE, KeyChangeError
from federation.commit import ABSURD
from federation.key_change import Offline, check_change
from federation.metadata_files import verify, without_revoked
from federation.published import Published, PublishError, RepositoryError
from federation.signable import check_file
from protos.signed import RoundDocument, StatementError


@dataclass(frozen=True)
class IncomingKeys:
    """A checked change.

    Attributes:
        online: identifier of the online key from now on.
        new_online: whether that is another one than before.
        repeated: whether it is published already.
    """

    online: str
    new_online: bool
    repeated: bool


def check_keys(state: Published, files: Mapping[str, bytes], now: datetime) -> IncomingKeys:
    """Whether signed files may follow those that are published.

    Raises:
        PublishError: too few good signatures, something else than keys and dates changes, or it
            was made for another state of the repository.
    """
    before = offline_files(state)
    try:
        after = Offline.parse(files)
        whole = after.over(before)
        (keyid,) = whole.circles()[ONLINE].keys
        (old,) = before.circles()[ONLINE].keys
        if all(state.files.get(role) == data for role, data in files.items()):
            return IncomingKeys(keyid, new_online=False, repeated=True)
        check_change(before, after)
        verify(before.root, "root", whole.files["root"], "root.json, by the keys of before")
        verify(whole.root, "root", whole.files["root"], "root.json")
        verify(whole.root, "targets", whole.files["targets"], "targets.json")
        targets = without_revoked(whole.root, whole.targets)
        for role in whole.files.keys() - {"root", "targets"}:
            verify(targets, role, whole.files[role], f"{role}.json")
    except (KeyChangeError, RepositoryError, ValueError) as error:
        raise PublishError(f"the change of keys is refused: {error}") from None
    for role, metadata in after.files.items():
        try:
            check_file(role, metadata.signed, now)
        except StatementError as error:
            raise PublishError(f"the change of keys is refused: {error}") from None
        if metadata.signed.is_expired(roles.in_seconds(now)):
            raise PublishError(f"{role}.json expired on {metadata.signed.expires:%Y-%m-%d}")
    return IncomingKeys(keyid, keyid != old, repeated=False)


def offline_files(state: Published) -> Offline:
    """The published files that offline keys sign."""
    names = ("root", "targets", *state.adapter_roles)
    return Offline({role: state.metadata[role] for role in names})


def next_round(document: RoundDocument, *, hold: bool) -> RoundDocument:
    """The round that a new online key signs first.

    Args:
        document: the one in force.
        hold: nobody knows whether the old key's owner wrote it: every device stays as it is, until
            the next order.
    """
    sequence = document.sequence if document.sequence <= ABSURD else 0
    if not hold:
        return replace(document, sequence=sequence)
    return RoundDocument(
        sequence=sequence + 1, rollout="", salt="", reason="the online key was replaced"
    )
