"""Whether a request starts from what is really published: a signer's own anchor, off line.

A request brings along the files that it changes, and what is new in it is told by comparing. If it
could bring along any files, a key of somebody's or a release that nobody has looked at would pass
for one that had been there all the time. So a signer believes such a file in two cases: his own key
has signed it, which is the usual one, or it descends from a root that he brings himself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata

from federation.bounded import read_bounded
from federation.errors import FederationError
from federation.keys import Key, key_name
from federation.metadata_files import MAX_METADATA, parse_metadata, verify, without_revoked
from federation.published import RepositoryError
from protos.canonical import canonical
from protos.signed import ROUNDS_ROLE

ABOVE, TOP = "above", ("root", "targets")
"""Folder of a request for a release, and the files in it: what stands above a list of releases."""


class AnchorError(FederationError):
    """Nothing that this signer trusts says that a request starts from what is published."""


def files_above(published: Mapping[str, bytes]) -> dict[str, bytes]:
    """What stands above a list of releases, by the names of the files in a request."""
    return {f"{ABOVE}/{name}.json": published[name] for name in TOP if name in published}


def check_release(folder: Path, previous: Metadata[Any], key: Key, roots: Sequence[bytes]) -> None:
    """Whether the list of releases that a request starts from is one that was published.

    Args:
        folder: of the request.
        previous: that list.
        key: whose signature is asked for.
        roots: one that its holder trusts, and any that follow from it in turn; none: only his own
            signature counts.

    Raises:
        AnchorError: it can't be told, or it is not.
    """
    if not roots:
        _check_own(previous, "previous.json", key)
        return
    try:
        files = {name: _read(folder / ABOVE / f"{name}.json") for name in TOP}
        top = {name: parse_metadata(data, f"{name}.json") for name, data in files.items()}
        targets = _descends(top, roots)
        roles = [name for name in targets.delegations.roles if name != ROUNDS_ROLE]
        if not any(_verifies(targets, role, previous) for role in roles):
            raise RepositoryError("previous.json is signed by none of its roles")
    except RepositoryError as error:
        raise AnchorError(
            f"{folder} does not start from what the root that you trust leads to: {error}"
        ) from None


def check_change(
    before: Mapping[str, Metadata[Any]], roles: Iterable[str], key: Key, roots: Sequence[bytes]
) -> None:
    """Whether the files that a change of keys starts from were published.

    Args:
        before: these files by role; their signatures by each other have been counted.
        roles: those that are to be signed.
        key: as for :func:`check_release`.
        roots: as for :func:`check_release`.

    Raises:
        AnchorError: it can't be told, or they are not.
    """
    if not roots:
        for role in sorted({"root" if role in TOP else role for role in roles}):
            if role not in before:
                raise AnchorError(_ask(f"{role}.json is new", key))
            _check_own(before[role], f"before/{role}.json", key)
        return
    try:
        _descends(before, roots)
    except RepositoryError as error:
        raise AnchorError(
            f"the request does not start from what the root that you trust leads to: {error}"
        ) from None


def _descends(files: Mapping[str, Metadata[Any]], roots: Sequence[bytes]) -> Any:
    """The targets that count, if root and targets follow from a trusted root."""
    found = files["root"]
    chain = [parse_metadata(data, "the root that you trust") for data in roots]
    if any(root.signed.type != "root" for root in (*chain, found)):
        raise RepositoryError("it is not a root")
    for trusted, after in pairwise((*chain, found)):
        if canonical(after.signed.to_dict()) == canonical(trusted.signed.to_dict()):
            continue
        if after.signed.version <= trusted.signed.version:
            raise RepositoryError(
                f"its root {after.signed.version} is not the root {trusted.signed.version} that "
                "you trust, nor a later one"
            )
        name = f"root {after.signed.version}, by the keys of the root {trusted.signed.version}"
        verify(trusted.signed, "root", after, f"{name} that you trust")
    verify(found.signed, "root", found, "root.json")
    verify(found.signed, "targets", files["targets"], "targets.json")
    targets = without_revoked(found.signed, files["targets"].signed)
    if targets.delegations is None or not targets.delegations.roles:
        raise RepositoryError("targets.json delegates nothing")
    return targets


def _verifies(targets: Any, role: str, file: Metadata[Any]) -> bool:
    try:
        verify(targets, role, file, "previous.json")
    except RepositoryError:
        return False
    return True


def _check_own(file: Metadata[Any], name: str, key: Key) -> None:
    signature = file.signatures.get(key.keyid)
    try:
        if signature is None:
            raise ValueError("not signed by it")
        key.verify_signature(signature, canonical(file.signed.to_dict()))
    except Exception:  # each kind of key has errors of its own
        raise AnchorError(_ask(f"{key_name(key)} has not signed {name} itself", key)) from None


def _ask(why: str, key: Key) -> str:
    return (
        f"{why}, so nothing here tells {key_name(key)} that this is what is published: give a root "
        "that its holder trusts, and has from elsewhere than from this request: --root FILE"
    )


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_METADATA)
    except OSError as error:
        raise RepositoryError(
            f"cannot read {path}: {error.strerror}; make the request again"
        ) from None
