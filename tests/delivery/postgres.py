"""A PostgreSQL of the test's own, and ``airpeft server`` processes that share it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from federation.client import OperatorClient
from federation.postgres import read_address
from tests.delivery.rig import ServerProcess
from tests.waiting import until

USER = "nobody" if os.geteuid() == 0 else None  # initdb refuses to run as root
# Not Popen(user=...): that forks, and gRPC's threads do not survive it.
AS_USER = ("setpriv", f"--reuid={USER}", "--regid=65534", "--clear-groups") if USER else ()
FAST = {"fsync": "off", "full_page_writes": "off"}  # a stop may lose no commit
SMALL = {"shared_buffers": "16MB", "max_connections": "60", "autovacuum": "off"}


def binaries() -> Path | None:
    """Where PostgreSQL's programs lie; None if it is not installed."""
    found = shutil.which("pg_config")
    if found is None:
        return None
    folder = subprocess.run([found, "--bindir"], capture_output=True, text=True, check=True)
    path = Path(folder.stdout.strip())
    return path if (path / "initdb").exists() and (path / "postgres").exists() else None


class Database:
    """One PostgreSQL server on a Unix socket in a folder of its own."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # A short path: a socket's has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="airpeft-pg-"))
        if USER is not None:
            shutil.chown(self.folder, USER)
        self.folder.chmod(0o755)
        self.process: subprocess.Popen[bytes] | None = None
        self._made = 0
        words = ["--auth=trust", "--username=fleet", "--no-sync", "--encoding=UTF8", "--locale=C"]
        command = [*AS_USER, str(programs / "initdb"), "-D", str(self.folder / "data"), *words]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    def start(self) -> None:
        settings = {
            **FAST,
            **SMALL,
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        program = str(self._programs / "postgres")
        command = [*AS_USER, program, "-D", str(self.folder / "data"), *options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        until(self._answers, what="PostgreSQL")

    def stop(self) -> None:
        """At once: every connection is cut."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(120)
            self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def new(self) -> str:
        """A database; its address."""
        self._made += 1
        name = f"fleet{self._made}"
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://fleet@/{name}?host={self.folder}"

    @contextmanager
    def connect(self, name: str) -> Iterator[psycopg.Connection[Any]]:
        address = f"host={self.folder} user=fleet dbname={name}"
        with psycopg.connect(address, autocommit=True) as connection:
            yield connection

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            with self.connect("postgres"):
                return True
        except psycopg.OperationalError:
            return False


def url_of(address: str) -> sa.URL:
    return read_address(address)


@dataclass
class GatewayProcess(ServerProcess):
    """One gateway of several in a home."""

    name: str = "west"
    address: str = ""

    @property
    def own(self) -> Path:
        return self.home / "gateways" / self.name

    def operator(self) -> OperatorClient:
        token = (self.home / "admin.token").read_text().strip()
        return OperatorClient(f"http://{self.endpoints['api']}", token)

    def decides(self) -> bool:
        with self.operator() as operator:
            return bool(operator.health()["decides"])


def gateway(home: Path, name: str, address: str) -> GatewayProcess:
    words = ("--gateway", name, "--database", address, "--heartbeat-seconds", "0.5")
    return GatewayProcess(home, words, name=name, address=address)
