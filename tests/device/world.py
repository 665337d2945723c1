"""The fleet's side on loopback, real but for its console: repository, authority, gRPC services.

A :class:`Gateway` can be stopped and started on the same port, can cut or hang downloads, and a
:class:`Proxy` in front of it can go silent without closing anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa

from aggregation import payload
from aggregation.adapter import Adapter
from clients import identity
from clients.agent import Agent, AgentPolicy
from clients.connection import Connection
from clients.identity import Identity
from clients.install import InstallPolicy
from clients.link import Backoff
from clients.permission import Permission
from clients.probe import HeldOut
from clients.slots import Slots
from clients.telemetry import ReportQueue
from clients.trust import DeviceFacts, Trust
from federation import tables
from federation.authority import open_authority, server_tls
from federation.broadcast import ENROLMENT, FLEET, EnrolmentService, Feed, FleetService
from federation.chunks import ChunkCache
from federation.enrolment import Enrolment
from federation.fleet import Fleet
from federation.metrics import Metrics
from federation.published import ReleaseRecord
from federation.store import Store
from federation.wrap_shelf import WrapShelf
from protos.channel import serve
from protos.messages import DeviceEvent, Report, decode_report
from protos.signed import ReleaseStatement
from simulations.processes import hold_port
from tests.trust.fleet_of_one import Publisher
from tests.waiting import until

HOST = "127.0.0.1"


class Service(FleetService):
    """Cuts or hangs every download after some messages, when told to."""

    cut_after: int | None = None
    hang = False
    fetches: list[tuple[str, int]]

    async def _send(self, path: str, offset: int, context: Any) -> str:
        self.fetches.append((path, offset))
        if self.cut_after is None:
            return await super()._send(path, offset, context)
        file = await self._chunks.get(path)
        for number, message in enumerate(file.after(offset)):
            if number == self.cut_after:
                if self.hang:
                    await asyncio.sleep(3600)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            await context.write(message)
        return "complete"


class Gateway:
    def __init__(self, folder: Path, *, now: datetime | None = None) -> None:
        self.publisher = Publisher(folder, now=now or datetime.now(UTC))
        self.repository = self.publisher.repository
        self.store = Store.open(folder / "fleet.sqlite")
        self.authority = open_authority(folder / "authority", datetime.now(UTC))
        self.fleet = Fleet(self.store)
        self.enrolment = Enrolment(self.store, self.authority, self.repository.root)
        self.source: Callable[[int], Any] = self.repository.bundle
        self.folder, self.port, self.enrol_port = folder, 0, 0
        self.cut_after: int | None = None
        self.hang = False
        self.fetches: list[tuple[str, int]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: list[socket.socket] = []

    # life

    def start(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)))
        self._thread.start()
        assert started.wait(120)

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(120)
            self._loop = None
            if not self._held:  # other tests beside this one ask for free ports
                self._held = [hold_port(port) for port in (self.port, self.enrol_port)]

    def close(self) -> None:
        self.stop()
        self.store.close()
        for one in self._held:
            one.close()

    async def _main(self, started: threading.Event) -> None:
        self._stop, self._feed = asyncio.Event(), Feed(lambda after: self.source(after))
        metrics, now = Metrics(), datetime.now(UTC)
        chunks = ChunkCache(self.repository.locate, lambda: None)
        wraps = WrapShelf(self.repository.folder)
        self.service = Service(
            self.fleet, self._feed, chunks, metrics, lambda: None, wraps=wraps, heartbeat=0.2
        )
        self.service.fetches = self.fetches
        self.service.cut_after, self.service.hang = self.cut_after, self.hang
        enrol = EnrolmentService(self.enrolment, metrics, self.fleet.refresh)
        folder = self.folder / "authority"
        mutual = server_tls(self.authority, folder, now, clients=True)
        open_tls = server_tls(self.authority, folder, now, clients=False)
        fleet = await serve(HOST, self.port, mutual, self.service.register, [FLEET])
        enrolment = await serve(HOST, self.enrol_port, open_tls, enrol.register, [ENROLMENT])
        self.port, self.enrol_port = fleet.port, enrolment.port
        self._loop = asyncio.get_running_loop()
        started.set()
        await self._stop.wait()
        self._feed.close()
        await fleet.stop(0.0)
        await enrolment.stop(0.0)

    def changed(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._feed.wake)

    # what an operator does

    def bundle(self, path: Path, name: str | None = None) -> Path:
        token = self.enrolment.make_token(who="test", device_id=name)
        document = {
            "enrol": f"{HOST}:{self.enrol_port}",
            "fleet": f"{HOST}:{self.port}",
            "token": token.secret,
            "authority_pem": self.authority.pem.decode(),
        }
        path.write_text(json.dumps(document))
        return path

    def release(
        self, adapter: Adapter, counter: int, *, now: datetime | None = None, **changes: Any
    ) -> ReleaseRecord:
        found = payload.encode(adapter, dtype="f32")
        fields = {
            "adapter_digest": found.adapter_digest,
            "spec_digest": adapter.spec.digest,
            "base_digest": adapter.spec.base_digest,
            "plain_length": found.plain_length,
            **changes,
        }
        return self.release_bytes(found.data, counter, now=now, **fields)

    def release_bytes(
        self, data: bytes, counter: int, *, now: datetime | None = None, **fields: Any
    ) -> ReleaseRecord:
        statement = ReleaseStatement(channel="stable", counter=counter, **fields)
        self.publisher.now = now or datetime.now(UTC)
        metadata = self.publisher.signed_adapters(statement, data)
        return self.repository.publish_release(metadata, data, now=self.publisher.now)

    def order(self, *what: Any, rollout: str, window: str = "") -> None:
        self.publisher.now = datetime.now(UTC)
        self.publisher.order(*what, rollout=rollout, window=window)
        self.changed()

    def payload_file(self, record: ReleaseRecord) -> Path:
        return self.repository.locate(record.path)

    # what it has heard

    def reports(self, device_id: str = "d-1") -> list[Report]:
        table = tables.reports
        query = sa.select(table.c.body).where(table.c.device_id == device_id)
        with self.store.read() as connection:
            rows = connection.execute(query.order_by(table.c.sequence)).scalars()
            return [decode_report(body) for body in rows]

    def heard(self, event: DeviceEvent, release: str | None = None, **fields: Any) -> Report:
        """Wait for such a report, and hand out the newest."""

        def match() -> Report | None:
            for report in reversed(self.reports()):
                same = report.event is event and release in (None, report.release)
                if same and all(getattr(report, k) == v for k, v in fields.items()):
                    return report
            return None

        try:
            return until(match, what=f"{event} {release} {fields}")  # type: ignore[return-value]
        except AssertionError as error:
            raise AssertionError(f"{error}; heard: {self.reports()}") from None


def enrolled(gateway: Gateway, home: Path, name: str = "d-1") -> Identity:
    from clients.connection import enrol
    from protos.messages import EnrolRequest

    key = identity.key_of(home)
    token = gateway.enrolment.make_token(who="test", device_id=name).secret
    request = EnrolRequest(token=token, certificate_request=identity.certificate_request(key))
    reply = enrol(f"{HOST}:{gateway.enrol_port}", gateway.authority.pem, request)
    return identity.save(home, reply, key_pem=key, fleet=f"{HOST}:{gateway.port}")


@dataclass
class Recorded(Backoff):
    """Remembers what it has said."""

    waits: list[float] = field(default_factory=list)

    def next(self, at_least: float = 0.0) -> float:
        self.waits.append(super().next(at_least))
        return self.waits[-1]


class Running:
    """An agent in this process, on a thread of its own."""

    def __init__(
        self,
        home: Path,
        runtime: Any,
        *,
        held_out: HeldOut | None = None,
        connect: Callable[[Identity], Connection] = Connection,
        policy: InstallPolicy | None = None,
        later: tuple[float, float] = (0.01, 0.05),
        permission: Permission | None = None,
    ) -> None:
        who = identity.load(home)
        rng = random.Random(3)  # noqa: S311
        self.connections = 0
        self.waits: list[float] = []  # before each further try of the link, seconds

        def counted() -> Connection:
            self.connections += 1
            return connect(who)

        def backoff(base: float, cap: float) -> Backoff:
            if self._link is None:  # an agent makes the one of its link first
                self._link = Recorded(rng, base=base, cap=cap, waits=self.waits)
                return self._link
            return Backoff(rng, base=base, cap=cap)

        self._link: Backoff | None = None
        self.slots, self.runtime = Slots(home), runtime
        self.queue = ReportQueue(
            home,
            device_id=who.device_id,
            sign=who.sign,
            now_ms=lambda: int(datetime.now(UTC).timestamp() * 1000),
        )
        self.agent = Agent(
            home,
            device=DeviceFacts(
                device_id=who.device_id, base_digest=runtime.base_digest, runtime=runtime.kind
            ),
            trust=Trust(home / "trust", who.root),
            slots=self.slots,
            runtime=runtime,
            queue=self.queue,
            connect=counted,
            held_out=held_out,
            policy=AgentPolicy(
                install=policy or InstallPolicy(), reconnect=(0.02, 0.3), later=later
            ),
            now=lambda: datetime.now(UTC),
            backoff=backoff,
            permission=permission,
        )
        self.agent.start()
        self._thread = threading.Thread(target=self.agent.run)
        self._thread.start()

    def stop(self) -> None:
        self.agent.stop()
        self._thread.join(120)
        assert not self._thread.is_alive()

    def serves(self, name: str) -> None:
        until(lambda: self.runtime.pin().name == name, what=f"{name} to serve")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Proxy:
    """Carries TCP both ways until told to go silent: the link stays up, and nothing passes."""

    def __init__(self, port: int) -> None:
        self._target, self.silent = port, threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((HOST, self._target))
                self._sockets += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.silent.is_set():
                    return  # swallowed; neither side is told
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        for one in self._sockets:
            one.close()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
