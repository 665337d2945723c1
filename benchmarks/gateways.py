"""Reports taken in, and a bell rung, on PostgreSQL; SQLite in the same process is the baseline.

Both are durable at every commit (fsync). Processor time is this process's alone: PostgreSQL's own
processes come on top, on whatever machine they run. Starts a PostgreSQL of its own.

    python benchmarks/gateways.py [--reports 160]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from federation import postgres
from federation.authority import open_authority
from federation.enrolment import Enrolment
from federation.fleet import Fleet
from federation.store import Store
from protos.messages import DeviceEvent, EnrolRequest, Report, SignedReport, encode_report

DEVICES = 8
Batches = list[list[SignedReport]]


@contextmanager
def postgresql(programs: Path) -> Iterator[str]:
    """A PostgreSQL with its usual durability on a Unix socket; the address of a database."""
    user = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="airpeft-pg-"))
    if user is not None:
        shutil.chown(folder, user)
    data = ["-D", str(folder / "data")]
    initdb = [str(programs / "initdb"), *data, "--auth=trust", "--username=fleet", "--no-sync"]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    control = [str(programs / "pg_ctl"), *data, "-w", "-l", str(folder / "log")]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "user": user, "cwd": "/"}
    subprocess.run([*control, "-o", options, "start"], **quiet)  # type: ignore[call-overload]
    try:
        yield f"postgresql+psycopg://fleet@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "fast", "stop"], **quiet)  # type: ignore[call-overload]
        shutil.rmtree(folder)


def enrolled(store: Store, folder: Path, count: int) -> tuple[Fleet, dict[str, Batches]]:
    """A fleet, and for each of its devices this many reports, one in a batch."""
    enrolment = Enrolment(store, open_authority(folder, datetime.now(UTC)), lambda: b"root")
    batches: dict[str, Batches] = {}
    for number in range(DEVICES):
        name, key = f"d-{number}", ec.generate_private_key(ec.SECP256R1())
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        request = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        token = enrolment.make_token(who="bench", device_id=name).secret
        enrolment.enrol(EnrolRequest(token=token, certificate_request=request))
        batches[name] = []
        for sequence in range(1, count + 1):
            event, release = DeviceEvent.COMMITTED, f"s-{sequence % 5}"
            report = Report(
                device_id=name,
                sequence=sequence,
                time_unix_ms=0,
                event=event,
                release=release,
                rollout="r-1",
            )
            body = encode_report(report)
            signature = key.sign(body, ec.ECDSA(hashes.SHA256()))
            batches[name].append([SignedReport(body=body, signature=signature)])
    return Fleet(store), batches


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Processor and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def take_in(fleet: Fleet, batches: dict[str, Batches], threads: int) -> None:
    """Each device's reports in their order; devices side by side."""

    def one(name: str) -> None:
        for batch in batches[name]:
            fleet.observe(name, batch)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, batches))


def bell(store: Store, rings: int) -> list[float]:
    """Seconds from an announcement to the session that hears it."""
    found = []
    with postgres.session(store.engine) as session:
        session.listen()
        for _ in range(rings):
            began = time.perf_counter()
            store.tell("repository")
            while not session.heard(1.0):
                pass
            found.append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, default=160)
    each = parser.parse_args().reports // DEVICES
    config = shutil.which("pg_config")
    if config is None:
        print("PostgreSQL is not installed: nothing to compare")
        return
    shown = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True)
    with (
        tempfile.TemporaryDirectory() as temporary,
        postgresql(Path(shown.stdout.strip())) as address,
    ):
        folder = Path(temporary)
        stores = {
            "SQLite": Store.open(folder / "fleet.sqlite"),
            "PostgreSQL": Store.connect(postgres.read_address(address)),
        }
        base = (0.0, 0.0)
        print(f"{'one report, one transaction':34} {'CPU us':>8} {'wall us':>9} {'ratios':>12}")
        for threads in (1, DEVICES):
            for name, store in stores.items():
                fleet, batches = enrolled(store, folder / name, each)
                cpu, wall = timed(lambda f=fleet, b=batches, t=threads: take_in(f, b, t))  # type: ignore[misc]
                count = each * DEVICES
                times = (cpu / count, wall / count)
                base = base if base[0] else times
                ratios = f"{times[0] / base[0]:6.2f} {times[1] / base[1]:5.2f}"
                label = f"{name}, {threads} device(s) at a time"
                print(f"{label:34} {times[0] * 1e6:8.0f} {times[1] * 1e6:9.0f} {ratios:>12}")
                with store.write() as connection:
                    for table in ("reports", "outcomes", "certificates", "devices", "tokens"):
                        connection.exec_driver_sql(f"DELETE FROM {table}")  # noqa: S608
        rings = bell(stores["PostgreSQL"], 50)
        print(f"an announcement is heard after {statistics.median(rings) * 1e3:.1f} ms (median)")
        for store in stores.values():
            store.close()


if __name__ == "__main__":
    main()
