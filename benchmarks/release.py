"""Sign and publish a 3 MB release, and a device's check with 1 release and with 100.

Median CPU time of this process, which does the work of two signers, of the server and of a device,
one after the other on one thread; wall time beside it, since publishing waits for the disk. The
baseline of the same run is the least that any design needs: hash the payload, sign twice, write it
down. Releases are made as ``airpeft release make`` makes them (which is not timed).

    python benchmarks/release.py [--releases 100] [--repeat 15]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from aggregation import durable, peft_layout
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, ModuleSpec
from clients.trust import DeviceFacts, Install, Trust
from federation import release
from federation.keys import ADAPTER_NAMES, ONLINE_NAME, ROOT_NAMES, KeyFolder, generate
from federation.published import ReleaseRecord
from federation.release import ReleaseOptions
from federation.repository import Repository
from federation.signable import LIVE_RELEASES
from protos.messages import MetadataBundle
from protos.signed import Assignment, Evaluation, Lineage, RoundDocument

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
BASE = "sha256:" + "b" * 64
FACTS = DeviceFacts(device_id="d-1", base_digest=BASE, runtime="torch")


def adapter(width: int, seed: int) -> Adapter:
    """Two hundred modules of this width: 3 MB as bf16 for 600."""
    modules = tuple(ModuleSpec(f"layer.{n}.query", width, width, 8, 16.0) for n in range(200))
    spec = AdapterSpec(BASE, modules if width > 8 else modules[:1], task="causal-lm")
    rng = np.random.default_rng(seed)
    tensors = {k: rng.normal(0, 0.02, s).astype(np.float32) for k, s in spec.shapes().items()}
    return Adapter(spec, tensors)


class Bench:
    """Signer, server and device in one process.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seed = 0
        names = (*ROOT_NAMES, *ADAPTER_NAMES, ONLINE_NAME)
        self.keys: KeyFolder = generate(folder / "keys", names)
        self.signers = self.keys.signers("adapters-")[:2]
        self.repository = Repository.create(
            folder / "repository",
            root_keys=self.keys.signers("root-"),
            adapter_keys=self.keys.signers("adapters-"),
            online=self.keys.signer(ONLINE_NAME),
            now=NOW,
        )

    def request(self, width: int, channel: str = "stable") -> Path:
        """What ``airpeft release make`` leaves."""
        self._seed += 1
        source, out = self.folder / "adapter", self.folder / "requests" / str(self._seed)
        peft_layout.write(source, adapter(width, self._seed), base_name="bench")
        options = ReleaseOptions(
            channel=channel,
            lineage=Lineage(parent=BASE, run="bench", round=9, recipe="x", data=(BASE,)),
            evaluations=(Evaluation(set="heldout", accuracy_micro=840_000, examples=400),),
        )
        release.make_request(
            source,
            out,
            adapters=self.repository.adapters(),
            options=options,
            now=NOW,
            in_use=self.repository.in_use(),
        )
        return out

    def sign_and_publish(self, request: Path) -> ReleaseRecord:
        """What two signers and the server do."""
        for signer in self.signers:
            release.sign(request, signer)
        return release.publish(request, self.repository, now=NOW)

    def order(self, record: ReleaseRecord) -> MetadataBundle:
        """Hand it out to everybody; what devices are sent."""
        number = self.repository.round().sequence + 1
        row = (Assignment(10_000, record.target, record.sha256),)
        document = RoundDocument(sequence=number, rollout="r", salt="s", assignments=row)
        self.repository.publish_round(document, now=NOW)
        return self.repository.bundle()

    def device(self) -> Trust:
        """A device that has just been enrolled."""
        return Trust.bootstrap(
            self.folder / "devices" / str(time.monotonic_ns()), self.repository.root()
        )

    def first_check(self, bundle: MetadataBundle, repeat: int) -> tuple[float, float]:
        """A device sees these files for the first time: (cpu, wall) seconds."""
        devices = [self.device() for _ in range(repeat)]

        def once() -> None:
            assert isinstance(devices.pop().accept(bundle, device=FACTS, now=NOW), Install)

        return measure(once, repeat)

    def next_check(self, bundle: MetadataBundle, repeat: int) -> tuple[float, float]:
        """It is shown what it knows, as with each new timestamp."""
        device = self.device()
        device.accept(bundle, device=FACTS, now=NOW)
        return measure(lambda: device.accept(bundle, device=FACTS, now=NOW), repeat)


def measure(work: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Median CPU and wall seconds."""
    cpu, wall = [], []
    for _ in range(repeat):
        c, w = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - c)
        wall.append(time.perf_counter() - w)
    return statistics.median(cpu), statistics.median(wall)


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Column by column."""
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--releases", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    repeat, total = options.repeat, options.releases
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        made: list[ReleaseRecord] = []

        def publish() -> tuple[float, float]:
            request = bench.request(600)
            return measure(lambda: made.append(bench.sign_and_publish(request)), 1)

        def checks(name: str) -> tuple[float, float]:
            bundle = bench.order(made[-1])
            listed = f"{len(bench.repository.releases())} listed"
            first, again = bench.first_check(bundle, repeat), bench.next_check(bundle, repeat)
            row(f"device, first check, {name} ({listed})", first)
            row(f"device, next check, {name} ({listed})", again)
            return first[0], again[0]

        publish()
        size = made[-1].length
        data = os.urandom(size)

        def least() -> None:
            hashlib.sha256(data).hexdigest()
            for signer in bench.signers:
                signer.sign(b"x" * 2_000)
            durable.write_bytes(Path(temporary) / "baseline", data)

        base = measure(least, repeat)

        def row(name: str, times: tuple[float, float]) -> None:
            print(
                f"{name:52} {times[0] * 1e3:8.2f} {times[1] * 1e3:9.1f} {times[0] / base[0]:7.1f}"
            )

        print(f"{'':52} {'CPU ms':>8} {'wall ms':>9} {'ratio':>7}")
        row(f"hash, sign twice, write {size / 1e6:.1f} MB", base)
        one = checks("1 release")
        few = median([publish() for _ in range(repeat)])
        row("sign with two keys and publish, few releases", few)
        while len(made) < total:
            made.append(bench.sign_and_publish(bench.request(8)))
        publish()
        same = checks(f"{total} in a channel")
        lines = 0
        while len(bench.repository.releases()) < total:
            lines += 1
            for _ in range(LIVE_RELEASES):
                bench.sign_and_publish(bench.request(8, f"line-{lines}"))
        publish()
        several = checks("in several channels")
        many = median([publish() for _ in range(repeat)])
        row(f"sign with two keys and publish, {len(bench.repository.releases())} listed", many)
        listed = len(bench.repository.releases())
        print(
            f"sign and publish: {few[0] * 1e3:.1f} ms of CPU, with {listed} listed"
            f" {many[0] * 1e3:.1f} ms (target: below 50)"
        )
        print(
            f"{total} releases in a channel against 1: first check {same[0] / one[0]:.2f}, "
            f"next check {same[1] / one[1]:.2f}"
        )
        print(
            f"{total} listed at once against 1: first check {several[0] / one[0]:.2f}, "
            f"next check {several[1] / one[1]:.2f}"
        )


if __name__ == "__main__":
    main()
