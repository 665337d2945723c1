"""A real fleet on this machine: server and devices as processes, driven as people drive them.

Everything goes through the product's own doors: the commands ``airpeft server`` and ``airpeft
device``, the REST interface with the operator's token, release requests signed with key files.
Nothing here reaches into another process.
"""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation import durable
from federation.client import OperatorClient
from federation.keys import KeyFolder
from federation.release import ReleaseOptions, assemble, make_request, sign
from simulations.processes import (
    PORTS,
    Child,
    Children,
    ProcessError,
    hold_port,
    read_json,
    wait_for,
)

THRESHOLD = 2
WAVES = ("1", "100%")
# A few hundred examples on a single canary tell a fall of less than this from nothing only by luck.
# Nothing carries bytes here but this machine: a payload that is not the signed one is no accident
# which a second try would mend.
POLICY: dict[str, Any] = {"quality_tolerance": 0.05, "retries": {"carrier": 0}}


@dataclass(frozen=True)
class DevicePlan:
    """One device to be.

    Attributes:
        name: its id in the fleet.
        heldout: its own labelled examples, JSON lines.
    """

    name: str
    heldout: Path


def deal(heldout: Path, folder: Path, devices: int, examples: int) -> list[DevicePlan]:
    """Give each device examples of its own, none of them twice.

    Args:
        heldout: JSON lines that no training client has.
        folder: where each device's file goes.
        devices: how many.
        examples: for each; fewer if there are not enough.
    """
    lines = heldout.read_bytes().splitlines(keepends=True)
    each = min(examples, len(lines) // devices)
    plans = []
    for index in range(devices):
        name = f"device-{index + 1}"
        path = folder / f"{name}.jsonl"
        durable.write_bytes(path, b"".join(lines[index * each : (index + 1) * each]))
        plans.append(DevicePlan(name, path))
    return plans


@dataclass
class Fleet:
    """A server and its devices.

    Args:
        home: folder for everything; ``server``, and one folder for each device.
        children: starts the processes.
        base: name of the base model on every device.
        devices: the devices.
    """

    home: Path
    children: Children
    base: str
    devices: Sequence[DevicePlan]
    server: Child | None = None
    running: dict[str, Child] = field(default_factory=dict)
    held: list[socket.socket] = field(default_factory=list)

    @property
    def server_home(self) -> Path:
        """The server's folder."""
        return self.home / "server"

    def device_home(self, name: str) -> Path:
        """A device's folder."""
        return self.home / name

    # The server

    def start_server(self, home: Path | None = None, name: str = "server") -> None:
        """Start the server, on the ports that it had before if it had any."""
        home = home or self.server_home
        before = read_json(self.server_home / "endpoints.json") or {}
        ports = [
            f"--{kind}-port={str(before[kind]).rpartition(':')[2]}"
            for kind in PORTS
            if kind in before
        ]
        (home / "endpoints.json").unlink(missing_ok=True)
        self.server = self.children.start(name, ["server", "--home", str(home), *ports])

    def wait_for_server(self, home: Path | None = None) -> None:
        """Until it says where it listens."""
        path = (home or self.server_home) / "endpoints.json"
        wait_for("the server", lambda: read_json(path), check=self.children.check)

    def kill_server(self) -> None:
        """As a power cut would; its ports are kept for the one that comes next."""
        if self.server is not None:
            found = read_json(self.server_home / "endpoints.json") or {}
            self.server.kill()
            if not self.held:
                ports = (found[kind] for kind in PORTS if kind in found)
                self.held = [hold_port(int(str(port).rpartition(":")[2])) for port in ports]

    def operator(self) -> OperatorClient:
        """The operator's door, with the token that lies in the server's folder."""
        return OperatorClient.of_home(self.server_home)

    def steal(self, to: Path) -> None:
        """Copy all that a thief would take from the server's disk: keys, metadata, database."""

        def skip(folder: str, names: list[str]) -> set[str]:
            return {n for n in names if ".sqlite" in n or n == "offline-keys"}

        shutil.copytree(self.server_home, to, ignore=skip)
        for database in self.server_home.glob("*.sqlite"):
            source = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
            with closing(source), closing(sqlite3.connect(to / database.name)) as copy:
                source.backup(copy)

    # The devices

    def enrol(self) -> None:
        """Give every device a one-time token, and let it trade that for a certificate."""

        def one(device: DevicePlan) -> None:
            with self.operator() as operator:
                ticket = operator.make_token(device_id=device.name)
            path = self.device_home(device.name) / "enrol.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(ticket))
            command = [sys.executable, "-m", "airpeft", "device", "enrol", str(path)]
            command += ["--home", str(path.parent), "--base", self.base]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise ProcessError(f"{device.name} could not enrol: {done.stderr or done.stdout}")

        with ThreadPoolExecutor(len(self.devices)) as pool:
            list(pool.map(one, self.devices))

    def start_device(self, device: DevicePlan) -> None:
        """Start one device; it loads its base model and then serves."""
        home = self.device_home(device.name)
        (home / "endpoint.json").unlink(missing_ok=True)
        arguments = ["device", "run", "--home", str(home), "--base", self.base]
        arguments += ["--heldout", str(device.heldout), "--port", "0", "--threads", "1"]
        self.running[device.name] = self.children.start(device.name, arguments)

    def endpoints(self) -> dict[str, str]:
        """Where each device that is up serves its owner, by name."""
        found = {}
        for device in self.devices:
            document = read_json(self.device_home(device.name) / "endpoint.json")
            if document:
                found[device.name] = str(document["url"])
        return found

    def wait_for_devices(self) -> dict[str, str]:
        """Endpoints of all devices, once all are up."""

        def all_up() -> dict[str, str] | None:
            found = self.endpoints()
            return found if len(found) == len(self.devices) else None

        return wait_for("the devices", all_up, seconds=180, check=self.children.check)

    # Releases and rollouts

    def release(
        self, adapter: Path, channel: str, notes: str = "", *, force_worse: str = ""
    ) -> dict[str, Any]:
        """Make, sign with two of the three adapter keys, and publish.

        Args:
            adapter: its folder.
            channel: the line of releases.
            notes: for people.
            force_worse: why it is released even if it is worse than the one before.

        Returns:
            What the server says of the release: name, target, sha256, length, statement.
        """
        now = datetime.now(UTC)
        with self.operator() as operator:
            _, current = operator.adapters()
            folder = self.home / "requests" / f"{channel}-{now:%H%M%S%f}"
            request = make_request(
                adapter,
                folder,
                adapters=current,
                options=ReleaseOptions(channel=channel, notes=notes, force_worse=force_worse),
                now=now,
            )
            keys = KeyFolder(self.server_home / "offline-keys")
            for signer in keys.signers("adapters")[:THRESHOLD]:
                sign(request.folder, signer)
            metadata, payload = assemble(request.folder)
            return operator.publish_release(metadata, payload)

    def roll_out(
        self,
        release: str,
        *,
        why: str,
        seen: Callable[[Mapping[str, Any]], None] = lambda rollout: None,
        seconds: float = 120.0,
    ) -> dict[str, Any]:
        """A canary of one device, then everybody; back when it rests.

        Returns:
            The rollout with what each device said; its state is done or rolled_back.
        """
        with self.operator() as operator:
            rollout = operator.start_rollout(release, WAVES, policy=POLICY, why=why)

            def rest() -> dict[str, Any] | None:
                now = operator.rollout(rollout["id"])
                seen(now)
                return now if now["state"] in ("done", "rolled_back", "aborted") else None

            return wait_for(
                f"the rollout of {release}",
                rest,
                seconds=seconds,
                every=0.2,
                check=self.children.check,
            )
