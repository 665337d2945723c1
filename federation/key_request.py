"""The request for a change of keys: carried to each signer, signed without network, brought back.

request/
request.json          what it is about, for people
before/<role>.json    root, targets and the files of releases as they are published
after/<role>.json     those of them that change, next version, unsigned
signatures/           one file for each key: <keyid>.json

A signature file holds one signature for each file that this key has a say in: a root is signed by
old and new root keys, targets by new root keys, a file of releases by the keys of its role.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Signature  # type: ignore[attr-defined]  # it has no __all__

from aggregation import durable
from federation import anchor, roles
from federation.bounded import read_bounded
from federation.circles import ROOT, Circle, KeyChangeError, differences
from federation.key_change import KeyChange, Offline, check_change, plan
from federation.keys import Signer, key_name
from federation.metadata_files import verify, without_revoked
from federation.published import RepositoryError

SCHEMA = 1
KIND = "key-change"
REQUEST, SIGNATURES = "request.json", "signatures"
MAX_FILE = 4_000_000


@dataclass(frozen=True)
class Need:
    """Signatures that one file needs from one circle.

    Attributes:
        role: the file.
        circle: who must sign it; for a root, also as it was before.
        old: whether the circle is the one from before the change.
        signed_by: names of the keys whose good signatures are there.
    """

    role: str
    circle: Circle
    old: bool
    signed_by: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """How many signatures are still to come."""
        return max(0, self.circle.threshold - len(self.signed_by))


@dataclass(frozen=True)
class KeyRequest:
    """A change of keys that waits for signatures."""

    folder: Path
    before: Offline
    after: Offline
    why: str

    @property
    def digest(self) -> str:
        """What a signature file refers to: SHA-256 over all files to be signed."""
        whole = hashlib.sha256()
        for role, metadata in sorted(self.after.files.items()):
            whole.update(role.encode() + b"\0" + hashlib.sha256(metadata.signed_bytes).digest())
        return whole.hexdigest()

    def lines(self) -> list[str]:
        """What changes, for people; from the files themselves, not from what is said of them."""
        after = self.after.over(self.before).circles()
        found = list(differences(self.before.circles(), after))
        for role, metadata in self.after.files.items():
            signed = metadata.signed
            found.append(f"{role}.json: version {signed.version}, to {signed.expires:%Y-%m-%d}")
        return found

    def needs(self) -> list[Need]:
        """Who must sign what."""
        old, new = self.before.circles(), self.after.over(self.before).circles()
        found = []
        for role in sorted(self.after.files, key=lambda r: (r != "root", r != "targets", r)):
            if role == "root":
                found += [Need(role, old[ROOT], old=True), Need(role, new[ROOT], old=False)]
            else:
                found.append(Need(role, new[ROOT if role == "targets" else role], old=False))
        return found


def make_change(
    out: Path, *, published: Mapping[str, bytes], change: KeyChange, why: str, now: datetime
) -> KeyRequest:
    """Plan a change and write the request for it.

    Args:
        out: folder of the request; it must not exist.
        published: the offline files as the repository has them, by role.
        change: what people want.
        why: their words, for the signers and for the audit log.
        now: the time, with a zone.

    Raises:
        KeyChangeError: ``out`` exists, or the change is impossible.
        StorageError: the request can't be written.
    """
    if out.exists():
        raise KeyChangeError(f"{out} exists: choose another folder for the request")
    before = Offline.parse(published)
    after = plan(before, change, now)
    request = KeyRequest(out, before, after, why)
    summary = {"schema": SCHEMA, "kind": KIND, "why": why, "changes": request.lines()}
    files = {REQUEST: _dump(summary)}
    files |= {f"before/{role}.json": data for role, data in published.items()}
    files |= {f"after/{role}.json": roles.to_bytes(m) for role, m in after.files.items()}
    durable.write_folder(out, files)
    return request


def is_change(folder: Path) -> bool:
    """Whether a folder is a request for a change of keys."""
    return (folder / "before" / "root.json").is_file()


def read_change(folder: Path) -> KeyRequest:
    """A request, checked: keys and dates change, and nothing else.

    Raises:
        KeyChangeError: it is not what it should be; says why.
    """
    before, after = (Offline.parse(_files(folder / part)) for part in ("before", "after"))
    check_change(before, after)
    _check_believed(before)
    try:
        why = json.loads(_read(folder / REQUEST)).get("why", "")
    except (ValueError, AttributeError, RecursionError) as error:
        raise KeyChangeError(f"{folder / REQUEST} is not a request: {error}") from None
    return KeyRequest(folder, before, after, str(why)[:500])


def sign_change(
    change: Path | KeyRequest,
    signer: Signer,
    *,
    out: Path | None = None,
    roots: Sequence[bytes] = (),
) -> Path:
    """Add one key's signatures to a request; needs no network and no other key.

    Args:
        change: the request, or its folder; what was shown to a person is not read again.
        signer: any key that has a say in it.
        out: the signature file; by default inside the request.
        roots: a root that the signer trusts, and any that followed it, in turn; not needed by a
            key that has signed what the request starts from.

    Raises:
        KeyChangeError: the request is not what it should be, or the key has no part in it.
        AnchorError: nothing says that it starts from what is published.
        KeyFileError: the signer did not sign.
        StorageError: the signatures can't be written.
    """
    request, keyid = _as_read(change), signer.public_key.keyid
    wanted = {need.role for need in request.needs() if keyid in need.circle.keys}
    if not wanted:
        names = sorted({name for need in request.needs() for name in need.circle.names})
        raise KeyChangeError(
            f"{key_name(signer.public_key)} has no part in this change; these have: "
            f"{', '.join(names)}"
        )
    anchor.check_change(request.before.files, wanted, signer.public_key, roots)
    signatures = {
        role: signer.sign(request.after.files[role].signed_bytes).to_dict() for role in wanted
    }
    doc = {
        "schema": SCHEMA,
        "kind": KIND,
        "key": key_name(signer.public_key),
        "signs_sha256": request.digest,
        "signatures": signatures,
    }
    path = out or request.folder / SIGNATURES / f"{keyid}.json"
    durable.write_bytes(path, _dump(doc))
    return path


def assemble_change(folder: Path, signatures: Iterable[Path] = ()) -> dict[str, bytes]:
    """The changed files by role, with every signature that is there, ready to be published.

    Args:
        folder: the request, with the signatures that lie in it.
        signatures: further signature files.

    Raises:
        KeyChangeError: a signature file is for another request, or not one.
    """
    request = read_change(folder)
    _collect(request, signatures)
    return {role: roles.to_bytes(metadata) for role, metadata in request.after.files.items()}


def progress(change: Path | KeyRequest, signatures: Iterable[Path] = ()) -> list[Need]:
    """Who has signed what, counted as devices will count.

    Raises:
        KeyChangeError: as for :func:`assemble_change`.
    """
    request = _as_read(change)
    _collect(request, signatures)
    whole = request.after.over(request.before)
    found = []
    for need in request.needs():
        metadata = request.after.files[need.role]
        above = whole.targets if need.role not in ("root", "targets") else whole.root
        if need.old:
            above = request.before.root
        result = above.get_verification_result(
            need.role, metadata.signed_bytes, metadata.signatures
        )
        names = sorted(key_name(key) for key in result.signed.values())
        found.append(Need(need.role, need.circle, need.old, tuple(names)))
    return found


def _as_read(change: Path | KeyRequest) -> KeyRequest:
    return change if isinstance(change, KeyRequest) else read_change(change)


def _collect(request: KeyRequest, signatures: Iterable[Path]) -> None:
    """Put all signatures into the request's metadata."""
    found = sorted((request.folder / SIGNATURES).glob("*.json"))
    for path in [*found, *signatures]:
        try:
            doc = json.loads(_read(path))
            if doc["signs_sha256"] != request.digest:
                raise KeyChangeError(f"{path} signs another request: sign this one again")
            for role, fields in dict(doc["signatures"]).items():
                signature = Signature.from_dict(dict(fields))
                request.after.files[role].signatures[signature.keyid] = signature
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise KeyChangeError(f"{path} is not a signature file: {error!r}") from None


def _check_believed(before: Offline) -> None:
    """What is said to be published is signed by its own keys, so that no signer is led astray."""
    try:
        verify(before.root, "root", before.files["root"], "before/root.json")
        verify(before.root, "targets", before.files["targets"], "before/targets.json")
        targets = without_revoked(before.root, before.targets)
        for role in before.files.keys() - {"root", "targets"}:
            verify(targets, role, before.files[role], f"before/{role}.json")
    except RepositoryError as error:
        raise KeyChangeError(
            f"the request does not start from what is published: {error}"
        ) from None


def _files(folder: Path) -> dict[str, bytes]:
    found = {path.name.removesuffix(".json"): _read(path) for path in folder.glob("*.json")}
    if not found:
        raise KeyChangeError(
            f"there is no request in {folder.parent}; make one with: airpeft keys rotate"
        )
    return found


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_FILE)
    except OSError as error:
        raise KeyChangeError(f"cannot read {path}: {error.strerror}") from error


def _dump(doc: Mapping[str, Any]) -> bytes:
    return (json.dumps(doc, indent=2, sort_keys=True) + "\n").encode()
