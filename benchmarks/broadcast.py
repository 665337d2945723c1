"""One server and thousands of devices: memory, the time of a push, and the cost of a download.

Run: ``python benchmarks/broadcast.py [--devices 5000]``. The devices are connections from two
processes; the server is the product's fleet service in a process of its own, whose memory and CPU
seconds are read from the kernel. Beside it the same file goes to as many connections by nginx if it
is installed, and else by the server of ``airpeft mirror serve``, which uses ``sendfile`` too.
Processor seconds count, not wall time: other work on the machine changes the latter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from _servers import many_files

MEGABYTE = 1_000_000
TARGETS = {"plain": 45.0, "mutual TLS": 100.0}  # KiB
GB = 1e9
SERVERS = str(Path(__file__).with_name("_servers.py"))


class Child:
    """A process that is told what to do by lines, and answers by lines."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.usage = psutil.Process(self._process.pid)

    def tell(self, **words: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the child has ended"
        return dict(json.loads(line))

    def ask(self, **words: Any) -> dict[str, Any]:
        self.tell(**words)
        return self.hear()

    def cpu(self) -> float:
        times = self.usage.cpu_times()
        return float(times.user + times.system)

    def memory(self) -> float:
        return float(self.usage.memory_info().rss) / 1024

    def end(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(20)


# --- the measurement ------------------------------------------------------------------------------


def certificates(folder: Path, count: int) -> None:
    """One authority, a database that knows ``count`` devices, and a certificate for each."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from federation import tables
    from federation.authority import open_authority
    from federation.store import Store

    now = datetime.now(UTC)
    authority = open_authority(folder / "authority", now)
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    pem = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    out = folder / "devices"
    out.mkdir()
    (out / "ca.pem").write_bytes(authority.pem)
    (out / "device.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    store = Store.open(folder / "fleet.sqlite")
    with store.write() as connection:
        for number in range(count):
            name = f"d-{number}"
            made = authority.issue(pem, name, now)
            (out / f"{number}.pem").write_bytes(made.pem)
            device = {
                "id": name,
                "enrolled": 0.0,
                "serial": made.serial,
                "certificate": made.pem,
                "public_key": made.public_key + number.to_bytes(4, "big"),
                "tags": {},
                "inventory": {},
            }
            issued = {"serial": made.serial, "device_id": name, "issued": 0.0}
            connection.execute(tables.devices.insert().values(device))
            connection.execute(
                tables.certificates.insert().values({**issued, "expires": made.expires})
            )
    store.close()


def crowd_of(count: int, processes: int = 2) -> list[tuple[Child, int, int]]:
    share = -(-count // processes)
    spans = [(first, min(share, count - first)) for first in range(0, count, share)]
    return [(Child("-m", "simulations.stream_devices"), *span) for span in spans]


def together(crowd: list[tuple[Child, int, int]], **words: Any) -> list[dict[str, Any]]:
    for child, _, _ in crowd:
        child.tell(**words)
    return [child.hear() for child, _, _ in crowd]


def measure_fleet(folder: Path, devices: int, tls: bool, payload: bytes) -> dict[str, float]:
    """Idle memory, two pushes, and everybody's download."""
    if tls:
        certificates(folder, devices)
    (folder / "payload").write_bytes(payload)
    server = Child(SERVERS, "tls" if tls else "plain", str(folder))
    port = int(server.hear()["port"])
    crowd = crowd_of(devices)
    where = str(folder / "devices") if tls else ""
    # One device warms up what the first call loads, so that it isn't counted as a device's.
    (warm,) = crowd_of(1, 1)
    warm[0].ask(do="connect", port=port, count=1, tls=where, first=0)
    memory, cpu = server.memory(), server.cpu()
    for child, first, count in crowd:
        child.tell(do="connect", port=port, count=count, tls=where, first=first)
    connected = sum(child.hear()["connected"] for child, _, _ in crowd)
    first = together(crowd, do="bundles", at_least=1, seconds=120)
    result = {
        "connected": connected,
        "failures": sum(one["late"] + one["lost"] for one in first),
        "connect_ms": 1000 * (server.cpu() - cpu) / devices,
        "memory_kib": (server.memory() - memory) / devices,
    }
    pushes = []
    for number in (2, 3, 4):
        cpu, start = server.cpu(), time.monotonic()
        told = server.ask(do="round")
        seen = together(crowd, do="bundles", at_least=number, seconds=120)
        pushes.append((1e6 * (server.cpu() - cpu) / devices, time.monotonic() - start))
        result["failures"] += sum(one["late"] + one["lost"] for one in seen)
        result["calls"] = server.ask(do="calls")["calls"] - told["calls"]
    result["push_us"], result["push_s"] = min(pushes)
    cpu, start = server.cpu(), time.monotonic()
    ends = together(crowd, do="fetch", path="payload", length=len(payload), seconds=300)
    spent = server.cpu() - cpu
    result |= {
        "fetch_s": time.monotonic() - start,
        "fetch_cpu_s_per_gb": spent / (devices * len(payload) / GB),
        "turned_away": sum(one["retries"] for one in ends),
        "peak_mib": server.memory() / 1024,
    }
    result["failures"] += sum(one["failed"] for one in ends)
    for one in ends:
        if one["failed"]:
            print(f"  {one['failed']} downloads failed: {', '.join(one['why'])}")
    for child in (*(child for child, _, _ in crowd), warm[0], server):
        child.end()
    return result


@contextmanager
def file_server(folder: Path) -> Iterator[tuple[str, int, Any]]:
    """Nginx if there is one, else our own; its name, port, and a meter of its CPU seconds."""
    nginx = shutil.which("nginx")
    if nginx is None:
        child = Child(SERVERS, "files", str(folder))
        yield "airpeft mirror (sendfile; nginx is not installed)", child.hear()["port"], child.cpu
        child.end()
        return
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    user = "user root; " if os.geteuid() == 0 else ""  # else it may not read our folder
    (folder / "nginx.conf").write_text(
        f"{user}daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        "worker_processes 1;\n"
        "events { worker_connections 16384; }\nworker_rlimit_nofile 20000;\n"
        f"http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{port} backlog=4096;"
        f" root {folder}; }} }}\n"
    )
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")])

    def cpu() -> float:
        everybody = [psutil.Process(process.pid)]
        everybody += everybody[0].children()
        return sum(one.cpu_times().user + one.cpu_times().system for one in everybody)

    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield "nginx", port, cpu
    process.terminate()
    process.wait(10)


def measure_files(folder: Path, devices: int, payload: bytes) -> tuple[str, float, float, int]:
    """The same bytes to as many connections; name, CPU seconds a GB, seconds, failures."""
    path = f"targets/adapters/{hashlib.sha256(payload).hexdigest()}.payload"
    for name, data in ((path, payload), ("metadata/timestamp.json", b"{}")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    crowd = crowd_of(devices)
    with file_server(folder) as (name, port, cpu):
        before, start = cpu(), time.monotonic()
        for child, _, count in crowd:
            child.tell(
                do="http", port=port, path=path, length=len(payload), count=count, seconds=300
            )
        failed = sum(child.hear()["failed"] for child, _, _ in crowd)
        took, spent = time.monotonic() - start, cpu() - before
    for child, _, _ in crowd:
        child.end()
    return name, spent / (devices * len(payload) / GB), took, failed


def verdict(value: float, target: float) -> str:
    return f"target {target:g}: {'held' if value <= target else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=5000)
    parser.add_argument("--only", choices=["plain", "tls", "files"])
    options = parser.parse_args()
    many_files()
    payload, devices = os.urandom(MEGABYTE), options.devices
    print(f"{devices} devices, {MEGABYTE / 1e6:g} MB each; CPU seconds are the server's")
    for name, tls in (("plain", False), ("mutual TLS", True)):
        if options.only in (None, "tls" if tls else "plain"):
            with tempfile.TemporaryDirectory() as folder:
                found = measure_fleet(Path(folder), devices, tls, payload)
            show(name, found, tls)
    if options.only in (None, "files"):
        with tempfile.TemporaryDirectory() as folder:
            name, cost, took, failed = measure_files(Path(folder), devices, payload)
        print(
            f"{name}\n  download         {cost:8.2f} CPU s a GB   {took:.1f} s   {failed} failures"
        )


def show(name: str, found: dict[str, float], tls: bool) -> None:
    print(f"fleet service, {name}: {found['connected']:.0f} connected")
    memory, push, cost = found["memory_kib"], found["push_us"], found["fetch_cpu_s_per_gb"]
    print(f"  idle stream      {memory:8.1f} KiB         {verdict(memory, TARGETS[name])}")
    print(f"  connecting       {found['connect_ms']:8.2f} CPU ms a device")
    print(
        f"  a release told   {push:8.1f} CPU us a device  {verdict(push, 80)}; "
        f"all know after {found['push_s']:.2f} s, by {found['calls']:.0f} calls of theirs"
    )
    goal = "" if tls else f"  {verdict(cost, 1.0)}"
    print(
        f"  download         {cost:8.2f} CPU s a GB{goal}; {found['fetch_s']:.1f} s, "
        f"{found['turned_away']:.0f} times told to come back, {found['peak_mib']:.0f} MiB after"
    )
    print(
        f"  failures         {found['failures']:8.0f}               {verdict(found['failures'], 0)}"
    )


if __name__ == "__main__":
    main()
