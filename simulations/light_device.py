"""A device without a language model: the real agent around an engine of a few matrix products.

For fleets of many processes on one machine, where the question is delivery and not language: the
link, trust, slots and reports are the ones that devices run; only the engine is small. It knows
two classes and three matrices that may be adapted, in NumPy.

    python -m simulations.light_device HOME [MAX_SECONDS_BETWEEN_TRIES]

It runs in an enrolled home until SIGTERM and writes ``received.json`` there: how many bytes of
payload and of metadata it took in.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from aggregation.adapter import Adapter
from aggregation.durable import write_bytes
from aggregation.spec import AdapterSpec, ModuleSpec
from clients import identity
from clients.agent import Agent, AgentPolicy
from clients.connection import Connection
from clients.content_keys import ContentKeys
from clients.download import Download, Way
from clients.link import Backoff
from clients.runtime import BASE, DEFAULT, AdapterVersion, LoadError, Prediction, Request
from clients.signals import die_with_parent, stop_on_signals
from clients.slots import Slots
from clients.sources import Sources
from clients.telemetry import ReportQueue
from clients.trust import DeviceFacts, Trust
from protos.messages import Heartbeat, MetadataBundle, WatchRequest

WIDTH = 4096
LABELS = ("no", "yes")
MODULES = ("encoder", "decoder", "pooler")
BASE_DIGEST = "sha256:" + hashlib.sha256(b"airpeft light engine 1").hexdigest()


def light_adapter(seed: int, rank: int = 64, modules: int = 1) -> Adapter:
    """An adapter for the light engine; at rank 256 its payload has about 3 MB for each module."""
    adapted = tuple(ModuleSpec(m, WIDTH, WIDTH, rank, 2.0 * rank) for m in MODULES[:modules])
    spec = AdapterSpec(BASE_DIGEST, adapted, task="sequence-classification", labels=LABELS)
    rng = np.random.default_rng(seed)
    return Adapter(
        spec,
        {k: rng.normal(0, 0.02, s).astype(np.float32) for k, s in spec.shapes().items()},
    )


class LightRuntime:
    """The engine; a :class:`clients.runtime.Runtime`."""

    kind = "numpy"
    base_digest = BASE_DIGEST
    module_shapes: Mapping[str, tuple[int, int]] = dict.fromkeys(MODULES, (WIDTH, WIDTH))

    def __init__(self) -> None:
        self._base = AdapterVersion(BASE, "", LABELS)
        self._current: dict[str, AdapterVersion] = {}
        self._head = np.random.default_rng(0).normal(0, 1, (len(LABELS), WIDTH))

    def load(self, adapter: Adapter, *, name: str) -> AdapterVersion:
        """Take an adapter.

        Raises:
            LoadError: it is for another base.
        """
        if adapter.spec.base_digest != self.base_digest:
            raise LoadError(f"{name} is for base {adapter.spec.base_digest}")
        spec = adapter.spec
        state = [(*adapter.factors(m.name), spec.scale(m.name)) for m in spec.modules]
        return AdapterVersion(name, adapter.digest, LABELS, state)

    def publish(self, version: AdapterVersion | None, name: str = DEFAULT) -> AdapterVersion:
        """Make a version the current one, and hand back what was."""
        previous = self.pin(name)
        self._current[name] = version or self._base
        return previous

    def pin(self, name: str = DEFAULT) -> AdapterVersion:
        """The current version."""
        return self._current.get(name, self._base)

    def run(self, requests: Sequence[Request]) -> list[Prediction]:
        """Answer each request by its own version."""
        return [self._answer(request) for request in requests]

    def unload(self, version: AdapterVersion) -> None:
        """Nothing to free: a version is collected when nobody holds it."""

    def _answer(self, request: Request) -> Prediction:
        hidden = np.zeros(WIDTH)
        for word in request.text.lower().split():
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            hidden += np.random.default_rng(seed).normal(0, 1, WIDTH)
        for up, down, scale in request.version.state or ():
            hidden = hidden + scale * (up @ (down @ hidden))
        logits = [float(value) / WIDTH for value in self._head @ hidden]
        total = sum(math.exp(value) for value in logits)
        scores = {k: math.exp(v) / total for k, v in zip(LABELS, logits, strict=True)}
        best = max(LABELS, key=lambda label: scores[label])
        return Prediction(best, scores, dict(zip(LABELS, logits, strict=True)), request.version)


class CountedSources(Sources):
    """Sources that keep count of the bytes they hand out."""

    received = 0

    def download(self, path: str, length: int, fleet: Connection | None) -> Download:
        """As the parent does, with every way counted."""
        made = super().download(path, length, fleet)
        made.wrap(self._counted)
        return made

    def _counted(self, way: Way) -> Way:
        def fetch(path: str, offset: int) -> Iterator[bytes]:
            for chunk in way.fetch(path, offset):
                self.received += len(chunk)
                yield chunk

        return Way(way.name, fetch)


class MeteredConnection(Connection):
    """A connection that keeps count of the metadata that comes over it, for all of them."""

    metadata = 0

    def watch(self, request: WatchRequest) -> Iterator[MetadataBundle | Heartbeat]:
        """As the parent does."""
        for event in super().watch(request):
            if isinstance(event, MetadataBundle):
                MeteredConnection.metadata += sum(map(len, event.files.values()))
            yield event


def light_agent(
    home: Path,
    *,
    sources: Sources | None = None,
    connect: Callable[[identity.Identity], Connection] = Connection,
    wait: float = 1.0,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> tuple[Agent, LightRuntime]:
    """An agent in an enrolled home folder, with the light engine.

    Args:
        home: of the device.
        sources: see :class:`clients.sources.Sources`.
        connect: opens a connection.
        wait: largest bound of the waits after a lost link, seconds.
        now: the device's clock.
    """
    who = identity.load(home)
    rng, runtime = random.SystemRandom(), LightRuntime()
    agent = Agent(
        home,
        device=DeviceFacts(
            device_id=who.device_id, base_digest=runtime.base_digest, runtime=runtime.kind
        ),
        trust=Trust(home / "trust", who.root),
        slots=Slots(home),
        runtime=runtime,
        queue=ReportQueue(
            home,
            device_id=who.device_id,
            sign=who.sign,
            now_ms=lambda: time.time_ns() // 1_000_000,
        ),
        connect=lambda: connect(who),
        keys=ContentKeys(who.encryption_pem),
        sources=sources,
        held_out=None,
        policy=AgentPolicy(reconnect=(min(0.05, wait), wait), later=(min(0.05, wait), wait)),
        now=now,
        backoff=lambda base, cap: Backoff(rng, base=base, cap=cap),
    )
    return agent, runtime


def main(home: Path, wait: float = 1.0) -> None:
    """Run until SIGTERM."""
    stop = threading.Event()
    stop_on_signals(stop)
    die_with_parent()
    sources = CountedSources()
    agent, _ = light_agent(home, sources=sources, connect=MeteredConnection, wait=wait)
    agent.start()
    worker = threading.Thread(target=agent.run, daemon=True)
    worker.start()
    stop.wait()
    agent.stop()
    worker.join(10.0)
    told = {"received": sources.received, "metadata": MeteredConnection.metadata}
    write_bytes(home / "received.json", json.dumps(told).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:3]))
