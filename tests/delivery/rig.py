"""A server process, and devices that speak the bare protocol: no agent, no model, no trust."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tuf.api.metadata import Metadata, Targets

from federation import roles
from federation.client import OperatorClient
from federation.keys import KeyFolder
from federation.repository import Repository
from protos.channel import ClientTls, open_channel
from protos.generated import fleet_pb2_grpc as services
from protos.messages import (
    DeviceEvent,
    EnrolReply,
    EnrolRequest,
    FetchRequest,
    Heartbeat,
    Inventory,
    MetadataBundle,
    Report,
    ReportBatch,
    SignedReport,
    WatchRequest,
    encode_report,
    from_wire,
    to_wire,
)
from protos.signed import CURRENT_ROUND, Assignment, ReleaseStatement, RoundDocument
from simulations.processes import PORTS, hold_port
from tests.waiting import until

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "0" * 64


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def request_for(key: Any, name: str = "me") -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass
class ServerProcess:
    """``airpeft server`` as an operator starts it."""

    home: Path
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    endpoints: dict[str, Any] = field(default_factory=dict)
    held: list[socket.socket] = field(default_factory=list)

    @property
    def own(self) -> Path:
        """Where its endpoints.json appears."""
        return self.home

    @property
    def log_file(self) -> Path:
        return self.home.parent / f"{self.own.name}.log"

    def start(self) -> Self:
        log = self.log_file.open("ab")
        command = [sys.executable, "-m", "airpeft", "server", "--home", str(self.home)]
        command += ["--die-with-parent", *self.arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        log.close()
        self.endpoints = until(self._ready, what="endpoints.json")
        return self

    def _ready(self) -> dict[str, Any] | None:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            found = json.loads((self.own / "endpoints.json").read_text())
        except (OSError, ValueError):
            return None
        return dict(found) if found["pid"] == self.process.pid else None

    def log(self) -> str:
        return self.log_file.read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(120)
        self._hold()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(120)
        self._hold()
        return code

    def _hold(self) -> None:
        """Other tests beside this one ask for free ports: these are for its next start."""
        ports = [self.endpoints[name] for name in PORTS if name in self.endpoints]
        before, self.held = self.held, [hold_port(int(p.rpartition(":")[2])) for p in ports]
        for one in before:
            one.close()

    def operator(self) -> OperatorClient:
        return OperatorClient.of_home(self.home)

    def publish(self, counter: int, payload: bytes, *, channel: str = "stable") -> str:
        """Make, sign (two of three offline keys) and publish a release; its name."""
        with self.operator() as operator:
            _, current = operator.adapters()
            metadata = signed_release(self.home, current, counter, payload, channel)
            return str(operator.publish_release(metadata, payload)["name"])


def signed_release(
    home: Path, current: bytes, counter: int, payload: bytes, channel: str = "stable"
) -> bytes:
    parsed: Metadata[Targets] = Metadata.from_bytes(current)
    statement = ReleaseStatement(
        channel=channel,
        counter=counter,
        adapter_digest=DIGEST,
        spec_digest=DIGEST,
        base_digest=DIGEST,
        plain_length=len(payload),
        runtime=("torch",),
    )
    digest = hashlib.sha256(payload).hexdigest()
    target = roles.release_target(statement, len(payload), digest)
    listed = [*parsed.signed.targets.values(), target]
    unsigned = roles.adapters(listed, parsed.signed.version + 1, datetime.now(UTC))
    signers = KeyFolder(home / "offline-keys").signers("adapters-")[:2]
    return roles.to_bytes(roles.sign(unsigned, signers))


def round_of(bundle: MetadataBundle) -> RoundDocument:
    """The round document in a bundle."""
    name = next(name for name in bundle.files if name.endswith(".rounds.json"))
    parsed: Metadata[Targets] = Metadata.from_bytes(bundle.files[name])
    return RoundDocument.from_custom(parsed.signed.targets[CURRENT_ROUND].custom)


class Device:
    """One device; each of its calls is one call of the protocol."""

    def __init__(self, server: ServerProcess, name: str | None = None) -> None:
        self.server = server
        self.key = new_key()
        self.sequence = 0
        with server.operator() as operator:
            self.enrolment = operator.make_token(device_id=name)
        self.reply = enrol(self.enrolment, self.enrolment["token"], request_for(self.key))
        self.name = self.reply.device_id

    @property
    def tls(self) -> ClientTls:
        return ClientTls(
            authority=self.reply.authority,
            key=key_pem(self.key),
            certificate=self.reply.certificate,
        )

    @contextmanager
    def connect(self, tls: ClientTls | None = None) -> Iterator[services.FleetStub]:
        with open_channel(self.server.endpoints["fleet"], tls or self.tls) as channel:
            yield services.FleetStub(channel)

    def fetch(self, path: str, offset: int = 0) -> bytes:
        with self.connect() as stub:
            request = to_wire(FetchRequest(path, offset))
            return b"".join(chunk.data for chunk in stub.Fetch(request, timeout=120))

    def report(self, event: DeviceEvent, **fields: Any) -> int:
        return self.send([self.signed(event, **fields)])

    def signed(self, event: DeviceEvent, **fields: Any) -> SignedReport:
        self.sequence += 1
        fields = {"device_id": self.name, "sequence": self.sequence, **fields}
        report = Report(time_unix_ms=int(time.time() * 1000), event=event, **fields)
        body = encode_report(report)
        return SignedReport(body=body, signature=self.key.sign(body, ec.ECDSA(hashes.SHA256())))

    def send(self, reports: list[SignedReport]) -> int:
        with self.connect() as stub:
            batch = to_wire(ReportBatch(reports=tuple(reports)))
            return int(from_wire(stub.Report(batch, timeout=120)).accepted_through)


def enrol(endpoints: dict[str, Any], token: str, request: bytes) -> EnrolReply:
    tls = ClientTls(authority=str(endpoints["authority_pem"]).encode())
    with open_channel(str(endpoints["enrol"]), tls) as channel:
        stub = services.EnrolmentStub(channel)
        message = EnrolRequest(
            token=token,
            certificate_request=request,
            inventory=Inventory(runtime="torch", base_digest=DIGEST),
        )
        reply: EnrolReply = from_wire(stub.Enrol(to_wire(message), timeout=120))
        return reply


class Watcher:
    """A Watch stream kept open in a thread; comes back by itself when it was cut."""

    def __init__(self, device: Device, on_bundle: Callable[[MetadataBundle], None] = id) -> None:
        self.device = device
        self.bundles: list[MetadataBundle] = []
        self.heartbeats = 0
        self.ended: grpc.RpcError | None = None
        self._on_bundle = on_bundle
        self._stop = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

        def over() -> bool:
            if self._call is not None:  # perhaps a new one, begun just now
                self._call.cancel()
            return not self._thread.is_alive()

        until(over, what="the watcher's end")

    @property
    def round(self) -> RoundDocument | None:
        return round_of(self.bundles[-1]) if self.bundles else None

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self.device.connect() as stub:
                    self._call = stub.Watch(to_wire(WatchRequest(timestamp_version=3)))
                    for event in self._call:
                        self._take(from_wire(event))
            except grpc.RpcError as error:
                self.ended = error
            self._stop.wait(0.05)

    def _take(self, event: MetadataBundle | Heartbeat) -> None:
        if isinstance(event, Heartbeat):
            self.heartbeats += 1
        else:
            self.bundles.append(event)
            self._on_bundle(event)


class Obedient:
    """Takes whatever a round assigns, and reports it as ``verdict`` says."""

    def __init__(
        self,
        device: Device,
        verdict: Callable[[str], DeviceEvent] = lambda _: DeviceEvent.COMMITTED,
    ) -> None:
        self.device, self.verdict = device, verdict
        self.running = ""
        self.loaded: list[str] = []
        self._done: set[tuple[int, str]] = set()
        self.watcher = Watcher(device, self.hear)

    def hear(self, bundle: MetadataBundle) -> None:
        document = round_of(bundle)
        wanted = document.assignment_of(self.device.name)
        name = release_name(wanted)
        if wanted is None or name == self.running or (document.sequence, name) in self._done:
            return
        self._done.add((document.sequence, name))
        event = self.verdict(name)
        if event is DeviceEvent.COMMITTED:  # first, as devices do: what a report says is so
            self.running = name
            self.loaded.append(name)
        until(lambda: self._say(event, document, name), what="the report's acknowledgement")

    def _say(self, event: DeviceEvent, document: RoundDocument, name: str) -> bool:
        try:
            self.device.report(event, release=name, rollout=document.rollout)
        except grpc.RpcError:
            return False  # the server is away
        return True


def release_name(wanted: Assignment | None) -> str:
    if wanted is None or not wanted.target:
        return ""
    _, channel, file = wanted.target.split("/")
    return f"{channel}-{file.removesuffix('.airpeft')}"


def open_repository(home: Path) -> Repository:
    return Repository(home / "repository", KeyFolder(home / "online-key").signer("online"))
