"""The fleet's server: enrolment, broadcast, operator's interface and rollouts in one process.

``run`` opens everything that :mod:`federation.first_start` describes, listens on three ports
(enrolment over TLS, fleet over mutual TLS, REST on loopback), writes ``endpoints.json`` when all
of them answer, and ends within seconds of SIGTERM or SIGINT. A kill at any moment loses nothing
that a device or an operator was told is done; the next start takes the same ports and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from aggregation import durable
from federation.api import make_app
from federation.authority import Authority, open_authority, server_tls
from federation.broadcast import ENROLMENT, FLEET, EnrolmentService, Feed, FleetService
from federation.chunks import ChunkCache
from federation.clock_jumps import ClockJumps, pause_after
from federation.desk import Desk
from federation.enrolment import Enrolment
from federation.first_start import (
    Passphrases,
    ServerError,
    last_ports,
    open_repository,
    take_gateway,
    take_home,
)
from federation.fleet import Fleet
from federation.folder_lock import FolderLock
from federation.gateways import Gateway, keep_working
from federation.homes import ENDPOINTS, folder_of
from federation.listening import GRACE, LOOPBACK, at_last_port, serve_api
from federation.metadata_age import Dates
from federation.metrics import Metrics
from federation.moving import FILE, check_not_moved, move_in
from federation.online_keys import online_signer
from federation.operators import ensure_admin, renew_admin
from federation.readers import barred_keys
from federation.repository import Repository
from federation.sharing import check_same_fleet
from federation.store import Store
from federation.ticker import Ticker
from federation.wrap_shelf import WrapShelf
from protos.channel import Server, serve

log = logging.getLogger("airpeft.federation.server")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to run a server.

    Attributes:
        home: its folder.
        host: address for devices; the operator's interface is on loopback always.
        advertise: host that devices shall dial; by default ``host``.
        fleet_port: and the other two: 0 takes the one of the last start, or else a free one.
        offline_keys: made before; None makes them at the first start.
        tick_seconds: how often rollouts are looked at when nothing happens.
        heartbeat_seconds: on idle Watch streams.
        certificate_days: life of a device certificate; devices renew by themselves.
        alone_share: of the fleet, that one operator reaches alone; None: no bound.
        new_admin_token: replace the operator's token.
        database: of PostgreSQL; None for an SQLite file in the home.
        gateway: name of this one, where several share home and database.
        die_with_parent: end when the starting process ends.
    """

    home: Path
    host: str = LOOPBACK
    advertise: str | None = None
    fleet_port: int = 0
    enrol_port: int = 0
    api_port: int = 0
    offline_keys: Path | None = None
    passphrases: Passphrases = field(default_factory=Passphrases)
    tick_seconds: float = 1.0
    heartbeat_seconds: float = 60.0
    certificate_days: float = 30.0
    alone_share: float | None = None
    new_admin_token: bool = False
    die_with_parent: bool = False
    database: sa.URL | None = None
    gateway: str | None = None

    @property
    def own(self) -> Path:
        """Folder of what is this gateway's alone."""
        return folder_of(self.home, self.gateway)


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ServerError: the home is not writable or in use; or a name without a database.
        StoreError, SharingError, GatewayError: the database cannot be used.
        AddressInUseError: a port is taken.
        FederationError, StorageError: something in the home cannot be read or made.
    """
    if config.gateway is None:
        lock: IO[str] | contextlib.ExitStack = take_home(config.home)
    elif config.database is None:
        raise ServerError(
            "--gateway needs --database: several gateways share a PostgreSQL database; an SQLite"
            " file has one server"
        )
    else:
        lock = take_gateway(config.home, config.gateway)
    try:
        asyncio.run(_main(config))
    finally:
        lock.close()


async def _main(config: ServerConfig) -> None:
    parts = _open(config)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(parts.store.close)
        if config.die_with_parent:
            following = asyncio.create_task(_follow_parent(stop))
            stack.push_async_callback(_cancel, following)
        await _serve(config, parts, stack)
        await stop.wait()
        log.info("stopping")
        (config.own / ENDPOINTS).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Parts:
    store: Store
    authority: Authority
    repository: Repository
    fleet: Fleet
    metrics: Metrics


def _open(config: ServerConfig) -> _Parts:
    home, now = config.home, datetime.now(UTC)
    (config.own / ENDPOINTS).unlink(missing_ok=True)
    if config.database is None:
        check_not_moved(home)
        store = Store.open(home / FILE)
    else:
        store = Store.connect(config.database, config.gateway or "server")
    with FolderLock(home / "start.lock", patience=60.0).held():  # another may start for the first
        authority = open_authority(home / "authority", now)
        if store.shared:
            move_in(store, home)
            check_same_fleet(store, authority.pem)
        ensure_admin(store, home)
        if config.new_admin_token:
            renew_admin(store, home)
        repository = open_repository(
            home, offline_keys=config.offline_keys, passphrases=config.passphrases, now=now
        )
    return _Parts(store, authority, repository, Fleet(store), Metrics())


async def _serve(config: ServerConfig, parts: _Parts, stack: contextlib.AsyncExitStack) -> None:
    """Start everything; what was started is stopped in reverse order by the stack."""
    loop = asyncio.get_running_loop()
    feed, poke = Feed(parts.repository.bundle), asyncio.Event()

    def later(action: Callable[[], None]) -> Callable[[], None]:
        return lambda: _soon(loop, action)

    gateway = Gateway(
        parts.store, parts.fleet, parts.repository, wake=later(feed.wake), poke=later(poke.set)
    )
    stack.push_async_callback(asyncio.to_thread, gateway.close)
    await asyncio.to_thread(gateway.start)
    life = timedelta(days=config.certificate_days)
    enrolment = Enrolment(parts.store, parts.authority, parts.repository.root, life=life)
    alone = config.alone_share
    ticker = Ticker(parts.store, parts.fleet, parts.repository, gateway.wake, alone_share=alone)
    dates, jumps = Dates(parts.store), ClockJumps(parts.store.clock)

    def turn(poked: bool) -> None:
        jump = jumps.newest()
        if gateway.leads:
            pause_after(jump, ticker)
        gateway.work(ticker, poked)
        dates.note(parts.repository.versions()["timestamp"], write=gateway.leads)

    wraps = WrapShelf(parts.repository.folder)
    wraps.drop(barred_keys(parts.store))  # of devices revoked when a kill came in between
    chunks = ChunkCache(parts.repository.locate, parts.metrics.altered.inc)
    service = FleetService(
        parts.fleet,
        feed,
        chunks,
        parts.metrics,
        poke.set,
        wraps=wraps,
        heartbeat=config.heartbeat_seconds,
        sent=dates.sent,
    )
    enrol = EnrolmentService(enrolment, parts.metrics, parts.fleet.refresh)
    now = datetime.now(UTC)
    folder = config.home / "authority" if config.gateway is None else config.own
    hosts = tuple({config.host, config.advertise or config.host} - {"0.0.0.0", "::"})  # noqa: S104
    last = last_ports(config.own)

    async def listen(name: str, register: Any, full_name: str, clients: bool) -> Server:
        tls = server_tls(parts.authority, folder, now, clients=clients, hosts=hosts)
        wanted = getattr(config, f"{name}_port")

        async def at(port: int) -> Server:
            return await serve(config.host, port, tls, register, [full_name])

        server: Server = await at_last_port(at, wanted, last.get(name, 0))
        stack.push_async_callback(server.stop, GRACE)
        return server

    fleet_server = await listen("fleet", service.register, FLEET, True)
    stack.callback(feed.close)
    enrol_server = await listen("enrol", enrol.register, ENROLMENT, False)
    dial = config.advertise or _dialled(config.host)
    endpoints = {
        "fleet": f"{dial}:{fleet_server.port}",
        "enrol": f"{dial}:{enrol_server.port}",
    }
    desk = Desk(
        store=parts.store,
        fleet=parts.fleet,
        enrolment=enrolment,
        ticker=ticker,
        repository=parts.repository,
        metrics=parts.metrics,
        dates=dates,
        endpoints=lambda: endpoints,
        wake=gateway.changed,
        online_key=lambda keyid: online_signer(config.home, keyid, config.passphrases.online),
        status=gateway.status,
        wraps=wraps,
    )
    api_port = await serve_api(make_app(desk), config.api_port, last.get("api", 0), stack)
    ticking = asyncio.create_task(keep_working(turn, poke, config.tick_seconds))
    stack.push_async_callback(_cancel, ticking)
    ports = {"fleet": fleet_server.port, "enrol": enrol_server.port, "api": api_port}
    durable.write_bytes(config.own / "ports.json", json.dumps(ports).encode())
    ready = {**endpoints, "api": f"{LOOPBACK}:{api_port}", "pid": os.getpid()}
    durable.write_bytes(config.own / ENDPOINTS, json.dumps(ready, indent=2).encode())
    log.info("ready: %s", ", ".join(f"{name} {value}" for name, value in ready.items()))


def _soon(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is there to be told
        loop.call_soon_threadsafe(action)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _dialled(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


async def _follow_parent(stop: asyncio.Event) -> None:
    """End when the process that started this one has ended.

    Asked twice a second and not left to the kernel's parent-death signal, which also fires when
    only the thread that started us has ended.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    log.info("the starting process has ended")
    stop.set()
