"""A small static repository made with python-tuf, served by HTTP on loopback, that lies on demand.

It holds every version that was ever published and writes down what was asked for, as the official
conformance suite does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

SIGNERS = [CryptoSigner.generate_ed25519() for _ in range(16)]
TOP = ("targets", "snapshot", "timestamp", "root")


class Simulator:
    """Metadata under ``/metadata/``, artefacts under ``/targets/``."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.later = self.now + timedelta(days=30)
        self.metadata: dict[str, Metadata[Any]] = {
            "root": Metadata(Root(expires=self.later, consistent_snapshot=True)),
            "timestamp": Metadata(Timestamp(expires=self.later)),
            "snapshot": Metadata(Snapshot(expires=self.later)),
            "targets": Metadata(Targets(expires=self.later)),
        }
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.published: dict[str, list[bytes]] = {}
        self.artefacts: dict[str, bytes] = {}
        self.hashes = False
        self.asked: list[tuple[str, int | None]] = []
        self.fetched: list[str] = []
        self.override: dict[str, bytes] = {}
        self._unused = list(SIGNERS)
        for role in TOP:
            self.rotate(role)
        self.publish(*TOP)

    @property
    def root(self) -> Root:
        return self.metadata["root"].signed

    @property
    def snapshot(self) -> Snapshot:
        return self.metadata["snapshot"].signed

    @property
    def timestamp(self) -> Timestamp:
        return self.metadata["timestamp"].signed

    @property
    def targets(self) -> Targets:
        return self.metadata["targets"].signed

    def new_signer(self) -> CryptoSigner:
        return self._unused.pop()

    def rotate(self, role: str) -> None:
        """Take away all keys of a top-level role and give it a new one."""
        for keyid in list(self.root.roles[role].keyids):
            self.root.revoke_key(keyid, role)
        signer = self.new_signer()
        self.root.add_key(signer.public_key, role)
        self.signers[role] = [signer]

    def publish(self, *roles: str, version: int | None = None) -> None:
        """Sign the next version of each role; snapshot and timestamp follow what was published."""
        for role in roles:
            metadata = self.metadata[role]
            if version is not None:
                metadata.signed.version = version
            elif role in self.published:
                metadata.signed.version += 1
            metadata.signatures.clear()
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            data = metadata.to_bytes(JSONSerializer())
            self.published.setdefault(role, []).append(data)
            entry = MetaFile(metadata.signed.version)
            if self.hashes:
                entry = MetaFile.from_data(metadata.signed.version, data, ["sha256"])
            if role == "snapshot":
                self.timestamp.snapshot_meta = entry
            elif role not in ("root", "timestamp"):
                self.snapshot.meta[f"{role}.json"] = entry

    def update(self, *roles: str) -> None:
        """Publish roles, and all that leads to them."""
        self.publish(*roles, "snapshot", "timestamp")

    def latest(self, role: str) -> bytes:
        return self.published[role][-1]

    def delegate(self, delegator: str, role: DelegatedRole, targets: Targets | None = None) -> None:
        above: Targets = self.metadata[delegator].signed
        if above.delegations is None:
            above.delegations = Delegations({}, roles={})
        assert above.delegations.roles is not None
        above.delegations.roles[role.name] = role
        if role.name not in self.signers:
            self.signers[role.name] = [self.new_signer()]
        above.add_key(self.signers[role.name][0].public_key, role.name)
        if role.name not in self.metadata:
            self.metadata[role.name] = Metadata(targets or Targets(expires=self.later))

    def succinct(self, bits: int, prefix: str) -> SuccinctRoles:
        signer = self.new_signer()
        bins = SuccinctRoles([], 1, bits, prefix)
        self.targets.delegations = Delegations({}, None, bins)
        for name in bins.get_roles():
            self.metadata[name] = Metadata(Targets(expires=self.later))
            self.signers[name] = [signer]
        self.targets.add_key(signer.public_key)
        return bins

    def add(self, role: str, data: bytes, path: str) -> None:
        target = TargetFile.from_data(path, data, ["sha256"])
        self.metadata[role].signed.targets[path] = target
        self.artefacts[path] = data

    def answer(self, path: str) -> bytes | None:
        """What the server has under a path, as it was asked for: nothing is unquoted."""
        if path in self.override:
            return self.override[path]
        folder, _, name = path.partition("/")
        if folder == "metadata":
            return self._metadata(name.removesuffix(".json"))
        self.fetched.append(name)
        parent, slash, last = name.rpartition("/")
        if self.root.consistent_snapshot:
            last = last.partition(".")[2]
        return self.artefacts.get(f"{parent}{slash}{last}")

    def _metadata(self, name: str) -> bytes | None:
        number, _, role = name.partition(".")
        plain = name == "timestamp" or not number.isdigit()
        version = None if plain else int(number)
        self.asked.append((name if plain else role, version))
        files = self.published.get(unquote(name if plain else role), [])
        if version is None:
            return files[-1] if files else None
        for data in reversed(files):
            if Metadata[Any].from_bytes(data).signed.version == version:
                return data
        return None


class Server:
    """Serves one simulator while it is entered."""

    def __init__(self, simulator: Simulator) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = simulator.answer(self.path.lstrip("/"))
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def role(name: str, *, paths: Iterable[str] = ("*",), terminating: bool = False) -> DelegatedRole:
    """A delegation without keys yet."""
    return DelegatedRole(name, [], 1, terminating, paths=list(paths))
