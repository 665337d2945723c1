"""A rollout over links that break: devices behind cutting proxies, a server that is killed.

Real processes on loopback: ``airpeft server``, killed with SIGKILL in three of the waves and
started again, and one process per device (:mod:`simulations.light_device`), each behind a TCP proxy
of its own. A third of the proxies cut their connection in the middle of the payload. What must come
out: every device on the released version, and next to no byte fetched twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]  # no __all__

from aggregation import payload
from clients import identity
from clients.connection import enrol
from clients.slots import Slots
from federation import roles
from federation.client import OperatorClient
from federation.keys import KeyFolder
from protos.messages import EnrolRequest
from protos.signed import ReleaseStatement
from simulations.light_device import BASE_DIGEST, MODULES, light_adapter
from simulations.processes import PORTS, ProcessError, hold_port, read_json, wait_for

WAVES = ("2", "25%", "60%", "100%")
HOST = "127.0.0.1"


@dataclass(frozen=True)
class DrillResult:
    """What a drill has shown.

    Attributes:
        devices: how many there were.
        on_version: how many ended on the released version.
        kills: of the server.
        cuts: of links in the middle of the payload.
        payload: bytes of it.
        received: payload bytes that all devices took in.
        metadata: bytes of metadata that all devices took in.
        wire: bytes that came down all links, whether or not they arrived whole.
        seconds: from the start of the rollout to its end.
    """

    devices: int
    on_version: int
    kills: int
    cuts: int
    payload: int
    received: int
    metadata: int
    wire: int
    seconds: float

    @property
    def refetched(self) -> float:
        """Share of bytes that came down the links again, at the most.

        All that came beyond one payload a device and the metadata; so what was cut off in flight
        is counted, and handshakes, framing, acknowledgements and heartbeats are as well.
        """
        return (self.wire - self.metadata) / (self.devices * self.payload) - 1

    @property
    def taken_twice(self) -> float:
        """Share of payload bytes that devices took in although they had them."""
        return self.received / (self.devices * self.payload) - 1


@dataclass
class Link:
    """A TCP proxy to the server; cuts once, when so many bytes came down it.

    They are counted over all connections: a download that a killed server broke goes on in the next
    one, which alone may be too short to reach the cut.

    Attributes:
        target: the server's port.
        cut_after: bytes; None never cuts.
    """

    target: int
    cut_after: int | None = None
    port: int = 0
    down: int = 0
    cuts: int = 0
    _sockets: list[socket.socket] = field(default_factory=list)

    def open(self) -> Link:
        """Listen."""
        self._listener = socket.create_server((HOST, 0), backlog=16)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def close(self) -> None:
        """End everything."""
        self._listener.close()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection((HOST, self.target), timeout=5)
                except OSError:
                    near.close()  # the server is away
                    continue
                far.settimeout(None)
                self._sockets += [near, far]
                for carry, one, other in ((self._up, near, far), (self._down, far, near)):
                    threading.Thread(target=carry, args=(one, other), daemon=True).start()

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data)
        _end(near, far)

    def _down(self, far: socket.socket, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(65536):
                self.down += len(data)
                near.sendall(data)
                if self.cut_after is not None and self.down > self.cut_after:
                    self.cut_after, self.cuts = None, self.cuts + 1
                    break
        _end(near, far)


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Server:
    """``airpeft server`` in a home folder, killed and started again on the same ports."""

    def __init__(self, home: Path) -> None:
        self.home, self.kills = home, 0
        self._held: list[socket.socket] = []
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "airpeft", "server", "--home", str(self.home)]
        self.home.parent.mkdir(parents=True, exist_ok=True)
        with (self.home.parent / "server.log").open("ab") as log:
            self.process = subprocess.Popen([*command, "--die-with-parent"], stdout=log, stderr=log)

        def ready() -> dict[str, Any] | None:
            found = read_json(self.home / "endpoints.json")
            return found if found and found["pid"] == self.process.pid else None

        self.endpoints = wait_for("the server", ready, check=self._check)

    def kill(self) -> None:
        """SIGKILL; its ports stay its own."""
        self.process.kill()
        self.process.wait()
        self.kills += 1
        if not self._held:
            ports = (int(str(self.endpoints[k]).rpartition(":")[2]) for k in PORTS)
            self._held = [hold_port(port) for port in ports]

    def close(self) -> None:
        """End it, and let go of its ports."""
        self.process.kill()
        self.process.wait()
        for one in self._held:
            one.close()

    def _check(self) -> None:
        if self.process.poll() is not None:
            raise ProcessError(f"the server ended; see {self.home.parent / 'server.log'}")


def publish(server: Server, rank: int) -> tuple[str, int]:
    """A release for the light engine; its name and the bytes of its payload."""
    adapter = light_adapter(1, rank, modules=len(MODULES))
    made = payload.encode(adapter)
    statement = ReleaseStatement(
        channel="stable",
        counter=1,
        adapter_digest=made.adapter_digest,
        spec_digest=adapter.spec.digest,
        base_digest=BASE_DIGEST,
        plain_length=made.plain_length,
        runtime=("numpy",),
    )
    with OperatorClient.of_home(server.home) as operator:
        _, current = operator.adapters()
        parsed: Metadata[Targets] = Metadata.from_bytes(current)
        digest = hashlib.sha256(made.data).hexdigest()
        target = roles.release_target(statement, len(made.data), digest)
        unsigned = roles.adapters([target], parsed.signed.version + 1, datetime.now(UTC))
        signers = KeyFolder(server.home / "offline-keys").signers("adapters-")[:2]
        metadata = roles.to_bytes(roles.sign(unsigned, signers))
        return str(operator.publish_release(metadata, made.data)["name"]), len(made.data)


def make_device(server: Server, home: Path, link: Link) -> subprocess.Popen[bytes]:
    """Enrol a device whose fleet is behind a link, and start its process."""
    with OperatorClient.of_home(server.home) as operator:
        token = operator.make_token(device_id=home.name)
    key = identity.key_of(home)
    request = EnrolRequest(
        token=token["token"], certificate_request=identity.certificate_request(key)
    )
    reply = enrol(token["enrol"], token["authority_pem"].encode(), request)
    identity.save(home, reply, key_pem=key, fleet=f"{HOST}:{link.port}", enrol=token["enrol"])
    with (home / "device.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "simulations.light_device", str(home), "0.5"],
            stdout=log,
            stderr=log,
        )


def drill(
    folder: Path,
    *,
    devices: int = 20,
    rank: int = 256,
    clock: Callable[[], float],
    seconds: float = 240.0,
    say: Callable[[str], object] = lambda text: None,
) -> DrillResult:
    """Run it; call it from the main thread.

    Args:
        folder: for everything; must be empty.
        devices: how many.
        rank: of the released adapter, which decides the payload's size.
        clock: monotonic seconds.
        seconds: for the rollout, before it is given up.
        say: told of what happens.

    Raises:
        ProcessError: a process ended, or the rollout did not.
    """
    server = Server(folder / "server")
    name, length = publish(server, rank)
    port = int(str(server.endpoints["fleet"]).rpartition(":")[2])
    links, processes = [], []
    try:
        for number in range(devices):
            cut = (2 + number % 7) * length // 10 if number % 3 == 0 else None
            links.append(Link(port, cut).open())
            processes.append(make_device(server, folder / f"d-{number:02}", links[-1]))
        say(f"{devices} device processes, payload {length / 1e6:.2f} MB")
        begin = clock()
        with OperatorClient.of_home(server.home) as operator:
            wait_for(
                "all devices",
                lambda: sum(d["connected"] for d in operator.devices()) == devices or None,
                seconds=seconds,
            )
            rollout = operator.start_rollout(name, WAVES, why="drill")["id"]
        for wave in range(1, len(WAVES)):
            _wait_for_wave(server, rollout, wave, seconds)
            server.kill()
            say(f"server killed in wave {wave + 1} of {len(WAVES)}")
            server.start()
        _wait_for_wave(server, rollout, len(WAVES), seconds)
        took = clock() - begin
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        server.close()
        for link in links:
            link.close()
    homes = [folder / f"d-{number:02}" for number in range(devices)]
    told = [json.loads((home / "received.json").read_text()) for home in homes]
    active = [Slots(home).active() for home in homes]
    return DrillResult(
        devices=devices,
        on_version=sum(one is not None and one.release == name for one in active),
        kills=server.kills,
        cuts=sum(link.cuts for link in links),
        payload=length,
        received=sum(one["received"] for one in told),
        metadata=sum(one["metadata"] for one in told),
        wire=sum(link.down for link in links),
        seconds=took,
    )


def _wait_for_wave(server: Server, rollout: str, wave: int, seconds: float) -> None:
    """Until a wave has begun; the one after the last stands for the rollout's end."""
    with OperatorClient.of_home(server.home) as operator:

        def there() -> bool | None:
            now = operator.rollout(rollout)
            if now["state"] not in ("running", "done"):
                raise ProcessError(f"the rollout is {now['state']}: {now.get('reason', '')}")
            return (now["state"] == "done" or now["wave"] >= wave) or None

        wait_for(f"wave {wave + 1}", there, seconds=seconds)
