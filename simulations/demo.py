"""The main job: the whole loop on one machine, from a scenario to a fleet that was attacked.

    train -> release 1 while training goes on -> train to the end -> release 2 -> three attacks

Training runs in this process and its trainers; server and devices are processes of their own,
started and driven by :mod:`simulations.fleet` through the product's commands, REST interface and
keys. From the moment that the devices are up until the end, :mod:`simulations.traffic` asks each of
them for predictions and counts every failure.

What must hold is checked, not shown: if an attack succeeds or a request fails, :func:`run_demo`
says so in the summary, and the command ends with status 1.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aggregation import durable
from simulations import attacks, demo_run, folder
from simulations.demo_result import Attack, DemoResult
from simulations.events import Event, Prepared, RoundDone
from simulations.fleet import Fleet, deal
from simulations.processes import Children, ProcessError
from simulations.run import simulate
from simulations.scenario import Scenario, ScenarioError
from simulations.server_app import RunResult
from simulations.traffic import Traffic

CHANNEL = "sentiment"


class View(Protocol):
    """Whoever shows the demo to a person."""

    def stage(self, title: str) -> None:
        """A new part begins."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""

    def training(self, event: Event) -> None:
        """Training went on."""

    def rollout(self, release: str, rollout: Mapping[str, Any]) -> None:
        """A rollout went on."""

    def traffic(self, traffic: Traffic) -> None:
        """The devices answer from now on."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo is asked to do.

    Attributes:
        scenario: what is trained.
        out: the run folder; everything is in it.
        devices: how many devices.
        heldout: labelled examples on each device, which no client has.
        workers: trainer processes.
    """

    scenario: Scenario
    out: Path
    devices: int = 5
    heldout: int = 200
    workers: int = 2


class Demo:
    """One run of the demo; use :func:`run_demo`."""

    def __init__(self, options: DemoOptions, children: Children, view: View) -> None:
        self.options, self.view = options, view
        self.fleet = Fleet(options.out / "fleet", children, options.scenario.base.name, ())
        self.stolen = options.out / "fleet" / "stolen-server"
        self._traffic: Traffic | None = None
        self._early: threading.Thread | None = None
        self._up: threading.Thread | None = None
        self._trouble: list[BaseException] = []
        self.releases: list[dict[str, Any]] = []
        self.rollouts: dict[str, dict[str, Any]] = {}

    # Training, with the fleet coming up beside it

    def train(self) -> RunResult:
        """Train; the fleet starts once the data is dealt, and gets release 1 half-way."""
        result = simulate(
            self.options.scenario,
            self.options.out,
            workers=self.options.workers,
            progress=self._trained,
        )
        if self._early is None:  # an earlier process had done more than half of the rounds
            self._release_early()
        if self._early is not None:
            self._early.join()
        self._raise_trouble()
        return result

    def _trained(self, event: Event) -> None:
        self.view.training(event)
        if isinstance(event, Prepared):
            demo_run.log_to(event.out / "logs" / "demo.log")
            self._start_fleet(event)
        elif isinstance(event, RoundDone) and event.round > 0:
            half = (self.options.scenario.federation.rounds + 1) // 2
            if event.round >= half and self._early is None:
                self._release_early()
        self._raise_trouble()

    def _start_fleet(self, prepared: Prepared) -> None:
        self.view.note("server: certificate authority, keys, TUF repository, gRPC, REST")
        self.fleet.start_server()
        self.fleet.devices = deal(
            prepared.out / "partitions" / "heldout.jsonl",
            self.fleet.home / "heldout",
            self.options.devices,
            self.options.heldout,
        )
        self.fleet.wait_for_server()
        self.fleet.enrol()
        for device in self.fleet.devices:
            self.fleet.start_device(device)
        names = ", ".join(device.name for device in self.fleet.devices)
        self.view.note(f"enrolled with one-time tokens, started: {names}")
        # Devices load their base model for a while; training does not wait for them.
        self._up = self._beside("traffic", self._start_traffic)

    def _release_early(self) -> None:
        """Release 1, in a thread, so that training does not wait for the fleet."""
        adapter = demo_run.register_latest(self.options.scenario, self.options.out)

        def work() -> None:
            if self._up is not None:
                self._up.join()
            self.release(adapter, "half-way through training")
            self.fleet.steal(self.stolen)

        self._early = self._beside("release-1", work)

    def _beside(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Do something in a thread; what it raises is raised again by the main one."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._trouble.append(error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _raise_trouble(self) -> None:
        if self._trouble:
            raise self._trouble.pop()

    def _start_traffic(self) -> None:
        endpoints = self.fleet.wait_for_devices()
        texts = [json.loads(line)["text"] for line in self._heldout_lines()[-50:]]
        self._traffic = Traffic(endpoints, texts)
        self._traffic.start()
        self.view.traffic(self._traffic)

    def _heldout_lines(self) -> list[str]:
        path = self.options.out / "partitions" / "heldout.jsonl"
        return path.read_text().splitlines()

    # Releases

    def release(self, adapter: Path, notes: str) -> dict[str, Any]:
        """Sign an adapter, publish it, roll it out; returns the rollout at rest."""
        why = "the demo goes on, whatever the end of training measures"
        release = self.fleet.release(adapter, CHANNEL, notes, force_worse=why)
        name = str(release["name"])
        self.view.note(
            f"{name}: signed by 2 of 3 adapter keys, {release['length']:,} bytes ({notes})"
        )
        self.releases.append(release)
        return self.roll_out(name, notes)

    def roll_out(self, name: str, why: str) -> dict[str, Any]:
        """Canary of one, then the rest; returns the rollout at rest."""
        rollout = self.fleet.roll_out(
            name, why=why, seen=lambda state: self.view.rollout(name, state)
        )
        self.rollouts[name] = rollout
        return rollout

    # The end

    def outcome(self, run: RunResult, tried: Sequence[Attack], parity: float) -> DemoResult:
        """Everything in one value, and on disk as ``fleet.json``."""
        if self._traffic is None:
            raise ProcessError("the devices never answered")
        served = self._traffic.served
        result = DemoResult(
            run=run,
            releases=self.releases,
            attacks=list(tried),
            parity=parity,
            traffic={
                "requests": self._traffic.requests,
                "failed": self._traffic.failed,
                "errors": {k: v for s in served.values() for k, v in s.errors.items()},
                "slowest_ms": max(s.slowest_ms for s in served.values()),
            },
        )
        first, last = (self.rollouts[str(r["name"])] for r in self.releases[:2])
        for device in self.fleet.devices:
            one = {row["device_id"]: row for row in first["devices"]}[device.name]
            two = {row["device_id"]: row for row in last["devices"]}[device.name]
            result.devices[device.name] = {
                "before": (one["quality"] or {}).get("accuracy_before"),
                "release_1": (one["quality"] or {}).get("accuracy_after"),
                "after": (two["quality"] or {}).get("accuracy_after"),
                "payload_bytes": two["payload_bytes"],
                "requests": served[device.name].requests,
                "failed": served[device.name].failed,
                "releases_served": dict(served[device.name].by_release),
            }
        data = json.dumps(self.document(result), indent=2, sort_keys=True).encode()
        durable.write_bytes(self.options.out / "fleet.json", data + b"\n")
        return result

    def document(self, result: DemoResult) -> dict[str, Any]:
        """What happened to the fleet, as it stands in ``fleet.json``."""
        return {
            "devices": result.devices,
            "releases": result.releases,
            "attacks": [vars(attack) for attack in result.attacks],
            "traffic": result.traffic,
            "parity": result.parity,
            "rollouts": self.rollouts,
            "problems": result.problems,
        }

    def stop_traffic(self) -> None:
        """No more requests."""
        if self._traffic is not None:
            self._traffic.stop()


def run_demo(
    options: DemoOptions, view: View, *, keep: Callable[[DemoResult, Fleet], None] | None = None
) -> DemoResult:
    """Run the whole loop.

    Args:
        options: what to do.
        view: shows it.
        keep: called at the end, while server and devices still run.

    Raises:
        ProcessError: a process ended when it should run, or did not do its part in time.
        SimulationError: the scenario can't be run, or makes no global model.
        KeyboardInterrupt: Ctrl-C; every child has been stopped by then.
    """
    recipe = options.scenario.federation.chosen()
    if recipe.train.personal:
        raise ScenarioError(
            f"federation.recipe = {recipe.name!r}: there is no global model to release to a fleet; "
            "choose a recipe that makes one, such as svd-warm-start"
        )
    if (options.out / "fleet").exists():
        raise folder.RunError(f"{options.out} holds a demo already: choose another folder")
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with Children(options.out / "logs", environment) as children:
        demo = Demo(options, children, view)
        try:
            view.stage("train, and bring up the fleet")
            run = demo.train()
            view.stage("release, canary, everybody")
            adapter = demo_run.finish(options.scenario, run)
            final = demo.release(run.adapter_folder, "the end of training")
            if final["state"] != "done":
                raise ProcessError(f"the final release ended {final['state']}: {final['why']}")
            parity = attacks.compare_with_peft(demo.fleet, run.adapter_folder, options.scenario)
            view.stage("three things that must fail")
            tried = [
                attacks.tampered_payload(demo, adapter),
                attacks.replayed_release(demo),
                attacks.bad_adapter(demo, adapter),
            ]
            demo.stop_traffic()
            result = demo.outcome(run, tried, parity)
            demo_run.report_fleet(options.scenario, run, demo.document(result))
            if keep is not None:
                keep(result, demo.fleet)
            return result
        finally:
            demo.stop_traffic()
