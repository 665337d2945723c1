"""A device process: its home folder, its settings, and how the parts are put together.

Home folder, everything durable in it::

    device.toml      settings, all optional (see DeviceSettings); flags and environment come first
    identity/        keys, certificate, trusted roots             clients.identity
    trust/           what has been seen and will not be undone    clients.trust
    slots/           releases and downloads                       clients.slots
    telemetry/       reports on their way                         clients.telemetry
    endpoint.json    {"url", "port", "pid"} while it serves
    lock             held while a process uses the folder

This is the only module that brings an engine and the agent together.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation.durable import StorageError, write_bytes
from clients import health, identity
from clients.device_settings import DeviceError, DeviceSettings
from clients.identity import Identity

log = logging.getLogger("airpeft.clients.device")

BUILT_UNIX = 1_761_955_200  # 2025-11-01: no clock is believed to be before this software
ENDPOINT_FILE = "endpoint.json"


def run_device(
    home: Path,
    settings: DeviceSettings,
    *,
    stop: threading.Event,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve and keep up to date until ``stop`` is set.

    Args:
        home: of an enrolled device.
        settings: see :class:`DeviceSettings`.
        stop: set by a signal.
        ready: called with the endpoint's address once it answers.

    Raises:
        IdentityError: not enrolled.
        DeviceError: another process uses the folder.
        ClientError: no base, unreadable held-out data, port taken.
    """
    # Before torch is imported: each of its threads reads these once.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(settings.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    who = identity.load(home)
    with _locked(home):
        if not who.encryption_pem:  # enrolled by an older agent
            identity.encryption_key_of(home)
            who = identity.load(home)
        agent, endpoint = _assemble(home, settings, who)
        agent.start()
        endpoint.start()
        url = f"http://127.0.0.1:{endpoint.port}"
        document = {"url": url, "port": endpoint.port, "pid": os.getpid()}
        try:
            write_bytes(home / ENDPOINT_FILE, json.dumps(document).encode())
        except StorageError as error:  # to be asked how it is matters less than to serve
            log.error("'airpeft device status' will not find this process: %s", error)
        worker = threading.Thread(target=agent.run, name="agent", daemon=True)
        worker.start()
        try:
            ready(url)
            stop.wait()
        finally:
            log.info("stopping")
            agent.stop()
            worker.join(10.0)
            endpoint.stop()
            (home / ENDPOINT_FILE).unlink(missing_ok=True)


def _assemble(home: Path, settings: DeviceSettings, who: Identity) -> tuple[Any, Any]:
    import psutil
    import torch

    from clients.agent import Agent, AgentPolicy
    from clients.base import find_base
    from clients.content_keys import ContentKeys
    from clients.endpoint import DeviceMetrics, Endpoint
    from clients.install import InstallPolicy
    from clients.link import Backoff
    from clients.peft_runtime import PeftRuntime
    from clients.permission import Permission
    from clients.probe import HeldOut
    from clients.renewal import Keeper
    from clients.slots import Slots
    from clients.sources import open_sources
    from clients.telemetry import ReportQueue
    from clients.trust import DeviceFacts, Trust

    torch.set_num_threads(settings.threads)
    held_out = None
    if settings.heldout is not None:
        held_out = HeldOut.read(
            settings.heldout,
            text=settings.text_column,
            label=settings.label_column,
            limit=settings.heldout_limit,
        )
    runtime = PeftRuntime(
        find_base(settings.base),
        labels=held_out.label_names if held_out else (),
        max_length=settings.max_length,
    )
    queue = ReportQueue(
        home, device_id=who.device_id, sign=who.sign, now_ms=lambda: time.time_ns() // 1_000_000
    )
    metrics = DeviceMetrics()
    rng = random.SystemRandom()  # jitter must differ between devices that start together
    trust = Trust(home / "trust", who.root)
    keeper = Keeper(
        home,
        who,
        # A clock that was set back must not keep a certificate alive for ever.
        now=lambda: max(datetime.now(UTC), datetime.fromtimestamp(trust.state.time_floor, UTC)),
        backoff=Backoff(rng, base=60.0, cap=3600.0),
    )
    agent = Agent(
        home,
        device=DeviceFacts(
            device_id=who.device_id,
            base_digest=runtime.base_digest,
            runtime=runtime.kind,
            agent_built_unix=BUILT_UNIX,
            machine=platform.machine(),
            memory_mib=psutil.virtual_memory().total >> 20,
        ),
        trust=trust,
        slots=Slots(home),
        runtime=runtime,
        queue=queue,
        connect=keeper.connect,
        expiring=keeper.is_due,
        keys=ContentKeys(who.encryption_pem, lacking=keeper.ask_for_reader),
        sources=open_sources(
            settings.sources,
            seconds=settings.mirror_seconds,
            authorities=_authorities(settings, who),
            count=metrics.source,
        ),
        held_out=held_out,
        policy=AgentPolicy(
            install=InstallPolicy(
                quality_tolerance=settings.quality_tolerance,
                watch=settings.watch,
            ),
            health_seconds=settings.health_seconds,
            reconnect=settings.reconnect_seconds,
            later=settings.later_seconds,
        ),
        now=lambda: datetime.now(UTC),
        backoff=lambda base, cap: Backoff(rng, base=base, cap=cap),
        permission=Permission(
            home,
            now=lambda: datetime.now(UTC),
            zone=settings.zone,
            command=settings.update_lock,
            ask_again_seconds=settings.lock_seconds,
            unfit=lambda: health.unfit(
                health.measure(home), min_battery_percent=settings.min_battery_percent
            ),
        ),
        on_report=metrics.report,
    )

    def status() -> dict[str, Any]:
        device = {"device_id": who.device_id, "reports_pending": queue.pending()}
        return {**device, **asdict(agent.status)}

    return agent, Endpoint(runtime, status=status, metrics=metrics, port=settings.port)


def _authorities(settings: DeviceSettings, who: Identity) -> list[bytes]:
    if settings.source_authority is None:
        return [who.authority_pem]
    try:
        return [who.authority_pem, settings.source_authority.read_bytes()]
    except OSError as error:
        raise DeviceError(
            f"setting 'source_authority': cannot read {settings.source_authority}: {error.strerror}"
        ) from None


def read_status(home: Path) -> dict[str, Any]:
    """What a device says of itself if it runs, else what its home folder says.

    Raises:
        IdentityError: not enrolled.
    """
    import httpx

    from clients.slots import Slots

    who = identity.load(home)
    file = home / ENDPOINT_FILE
    if file.exists():
        try:
            url = str(json.loads(file.read_bytes())["url"])
            with httpx.Client(trust_env=False, timeout=5.0) as client:
                found = client.get(f"{url}/v1/status").raise_for_status().json()
            if found["device_id"] == who.device_id:
                return {"running": True, "url": url, **found}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            pass  # a process that was killed leaves its file behind, and others may take its port
    active = Slots(home).active()
    pending = len(list((home / "telemetry").glob("[0-9]*.report")))
    return {
        "running": False,
        "device_id": who.device_id,
        "release": active.release if active else "base",
        "adapter": active.adapter_digest if active else "",
        "reports_pending": pending,
    }


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DeviceError(
            f"another process uses {home}: stop it first ('airpeft device status --home {home}' "
            "shows it), or give this one its own home"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
