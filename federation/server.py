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
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import uvicorn

from aggregation import durable
from federation.api import make_app
from federation.authority import Authority, open_authority, server_tls
from federation.broadcast import ENROLMENT, FLEET, EnrolmentService, Feed, FleetService
from federation.chunks import ChunkCache
from federation.desk import Desk
from federation.enrolment import Enrolment
from federation.first_start import Passphrases, ServerError, last_ports, open_repository, take_home
from federation.fleet import Fleet
from federation.metrics import Metrics
from federation.online_keys import online_signer
from federation.operators import ensure_admin, renew_admin
from federation.readers import barred_keys
from federation.repository import Repository
from federation.store import Store
from federation.ticker import Ticker
from federation.wrap_shelf import WrapShelf
from protos.channel import AddressInUseError, Server, serve

LOOPBACK = "127.0.0.1"
GRACE = 2.0  # seconds for calls in progress at the end

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
        new_admin_token: replace the operator's token.
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
    new_admin_token: bool = False
    die_with_parent: bool = False


def run(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ServerError: the home is not writable or in use.
        AddressInUseError: a port is taken.
        FederationError, StorageError: something in the home cannot be read or made.
    """
    lock = take_home(config.home)
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
        (config.home / "endpoints.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class _Parts:
    store: Store
    authority: Authority
    repository: Repository
    fleet: Fleet
    metrics: Metrics


def _open(config: ServerConfig) -> _Parts:
    home, now = config.home, datetime.now(UTC)
    (home / "endpoints.json").unlink(missing_ok=True)
    store = Store.open(home / "fleet.sqlite")
    ensure_admin(store, home)
    if config.new_admin_token:
        renew_admin(store, home)
    authority = open_authority(home / "authority", now)
    repository = open_repository(
        home, offline_keys=config.offline_keys, passphrases=config.passphrases, now=now
    )
    return _Parts(store, authority, repository, Fleet(store), Metrics())


async def _serve(config: ServerConfig, parts: _Parts, stack: contextlib.AsyncExitStack) -> None:
    """Start everything; what was started is stopped in reverse order by the stack."""
    loop = asyncio.get_running_loop()
    feed, poke = Feed(parts.repository.bundle), asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(feed.wake)

    life = timedelta(days=config.certificate_days)
    enrolment = Enrolment(parts.store, parts.authority, parts.repository.root, life=life)
    ticker = Ticker(parts.store, parts.fleet, parts.repository, wake)
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
    )
    enrol = EnrolmentService(enrolment, parts.metrics, parts.fleet.refresh)
    folder, now = config.home / "authority", datetime.now(UTC)
    hosts = tuple({config.host, config.advertise or config.host} - {"0.0.0.0", "::"})  # noqa: S104
    last = last_ports(config.home)

    async def listen(name: str, register: Any, full_name: str, clients: bool) -> Server:
        tls = server_tls(parts.authority, folder, now, clients=clients, hosts=hosts)
        wanted = getattr(config, f"{name}_port")

        async def at(port: int) -> Server:
            return await serve(config.host, port, tls, register, [full_name])

        server: Server = await _at_last_port(at, wanted, last.get(name, 0))
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
        endpoints=lambda: endpoints,
        wake=wake,
        online_key=lambda keyid: online_signer(config.home, keyid, config.passphrases.online),
        wraps=wraps,
    )
    api_port = await _serve_api(config, desk, last.get("api", 0), stack)
    ticking = asyncio.create_task(_tick(ticker, poke, config.tick_seconds))
    stack.push_async_callback(_cancel, ticking)
    ports = {"fleet": fleet_server.port, "enrol": enrol_server.port, "api": api_port}
    durable.write_bytes(config.home / "ports.json", json.dumps(ports).encode())
    ready = {**endpoints, "api": f"{LOOPBACK}:{api_port}", "pid": os.getpid()}
    durable.write_bytes(config.home / "endpoints.json", json.dumps(ready, indent=2).encode())
    log.info("ready: %s", ", ".join(f"{name} {value}" for name, value in ready.items()))


class _Api(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the whole process, not to this part of it."""
        yield


async def _serve_api(
    config: ServerConfig, desk: Desk, last: int, stack: contextlib.AsyncExitStack
) -> int:
    async def at(port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError as error:
            listener.close()
            raise AddressInUseError(
                f"cannot listen on {LOOPBACK}:{port} ({error.strerror}): stop the process that"
                " holds the port (ss -ltnp shows it), choose another, or give 0 for a free one"
            ) from error
        return listener

    listener = await _at_last_port(at, config.api_port, last)
    settings = uvicorn.Config(
        make_app(desk),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(GRACE),
    )
    server = _Api(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def stop() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(stop)
    while not server.started:
        if serving.done():
            raise ServerError("the operator's interface did not start; the log says why")
        await asyncio.sleep(0.01)
    return int(listener.getsockname()[1])


async def _at_last_port(at: Callable[[int], Awaitable[Any]], wanted: int, last: int) -> Any:
    """On the port wanted; for 0 on the last one, or else on any."""
    if wanted == 0 and last:
        try:
            return await at(last)
        except AddressInUseError as error:
            log.warning("%s; taking another: devices must be told the new address", error)
    return await at(wanted)


async def _tick(ticker: Ticker, poke: asyncio.Event, seconds: float) -> None:
    while True:
        poke.clear()
        try:
            await asyncio.to_thread(ticker.tick)
        except Exception:
            # A full disk or a locked database passes; the ticker must still be there then.
            log.exception("a tick failed; the next one tries again")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await poke.wait()


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
