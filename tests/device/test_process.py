"""A device as an operating-system process: killed, starved of disk, and serving throughout."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from clients.cli import device as app
from clients.slots import Slots
from federation import chunks
from protos.messages import DeviceEvent, RejectReason
from tests.device.tiny import LABELS, TEXTS, make_adapter
from tests.device.world import Gateway
from tests.waiting import until


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK", 4096)
    running = Gateway(tmp_path / "server")
    running.start()
    yield running
    running.close()


class Process:
    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        command = [sys.executable, "-c", "from clients.cli import device; device()", "run"]
        command += ["--home", str(home), "--die-with-parent", *options]
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> str:
        line = self.child.stdout.readline()
        assert line.startswith("serving on "), self.child.stderr.read()
        return line.split()[-1]

    def kill(self) -> None:
        self.child.kill()
        self.child.communicate(timeout=120)

    def end(self) -> int:
        self.child.terminate()
        _, errors = self.child.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        return self.child.returncode


class Traffic:
    """Asks the endpoint without pause; every answer must be whole, and of one known adapter."""

    def __init__(self, url: str) -> None:
        self.answers: list[dict] = []
        self.problems: list[str] = []
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._stop.wait(0.01):
                try:
                    answer = client.post("/v1/classify", json={"texts": list(TEXTS)})
                    answer.raise_for_status()
                    self.answers.append(answer.json())
                except httpx.HTTPError as error:
                    self.problems.append(repr(error))

    def end(self) -> None:
        self._stop.set()
        self._thread.join(120)


@pytest.mark.slow
def test_killed_in_mid_install_starved_of_disk_and_never_silent(gateway, home, base, tmp_path):
    bundle = gateway.bundle(tmp_path / "enrol.json", "d-1")
    run = CliRunner().invoke
    done = run(app, ["enrol", str(bundle), "--home", str(home), "--base", str(base.path)])
    assert done.exit_code == 0, done.output
    (home / "device.toml").write_text(
        f'base = "{base.path}"\nlater_seconds = [0.05, 0.2]\nreconnect_seconds = [0.05, 0.3]\n'
    )
    small = make_adapter(base, 1)
    big = make_big(base)
    gateway.order(gateway.release(small, 1), rollout="r1")

    first = Process(home)
    url = first.ready()
    gateway.heard(DeviceEvent.COMMITTED, "stable-1")
    assert ask(url)["online"] is True
    gateway.service.cut_after, gateway.service.hang = 2, True
    record = gateway.release(big, 2)
    assert record.length > 6 * chunks.CHUNK
    gateway.order(record, rollout="r2")
    partial = Slots(home).partial(record.sha256, record.length)
    until(lambda: partial.offset == 2 * chunks.CHUNK, what="half a download")
    first.kill()

    second = Process(home)
    url = second.ready()
    status = ask(url)
    assert (status["release"], status["adapter"]) == ("stable-1", small.digest)
    traffic = Traffic(url)
    try:
        until(lambda: len(gateway.fetches) >= 3, what="the download to go on")
        limit = (3 * chunks.CHUNK, resource.RLIM_INFINITY)
        resource.prlimit(second.child.pid, resource.RLIMIT_FSIZE, limit)
        gateway.stop()
        gateway.start()  # neither cuts nor hangs any more
        reason = RejectReason.NO_SPACE
        gateway.heard(DeviceEvent.FAILED, "stable-2", reason=reason)
        assert ask(url)["release"] == "stable-1"
        free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(second.child.pid, resource.RLIMIT_FSIZE, free)
        gateway.heard(DeviceEvent.COMMITTED, "stable-2", rollout="r2")
        until(lambda: traffic.answers[-1]["release"] == "stable-2", what="the swap to be seen")
    finally:
        traffic.end()
    assert not traffic.problems
    by_adapter: dict[str, set[str]] = {}
    for answer in traffic.answers:
        by_adapter.setdefault(answer["adapter"], set()).add(json.dumps(answer["predictions"]))
    assert set(by_adapter) == {small.digest, big.digest}
    assert all(len(different) == 1 for different in by_adapter.values()), "answers never mix"
    assert [offset for _, offset in gateway.fetches if offset == 0] == [0, 0], "resumed, not anew"
    shown = run(app, ["status", "--home", str(home), "--format", "json"])
    data = json.loads(shown.output)["data"]
    assert (data["running"], data["release"]) == (True, "stable-2")
    rival = run(app, ["run", "--home", str(home)])
    assert rival.exit_code == 2
    assert "another process uses" in rival.output
    assert second.end() == 0
    assert not (home / "endpoint.json").exists()
    shown = run(app, ["status", "--home", str(home), "--format", "json"])
    data = json.loads(shown.output)["data"]
    assert (data["running"], data["release"]) == (False, "stable-2")


def ask(url: str) -> dict:
    """What a device says of itself."""
    return httpx.get(f"{url}/v1/status", timeout=120).json()


def make_big(base):
    import numpy as np

    from aggregation.adapter import Adapter
    from clients.model import adapter_spec

    spec = adapter_spec(base, LABELS, rank=32, alpha=8.0)
    rng = np.random.default_rng(5)
    return Adapter(spec, {k: rng.normal(0, 0.2, s) for k, s in spec.shapes().items()})


def test_bad_input_is_named_and_exits_with_2(gateway, home, base, tmp_path):
    def fails(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 2, done.output
        return done.output

    at = ("--home", str(home))
    missing = str(tmp_path / "nothing.json")
    assert "no such file" in fails("enrol", missing, *at)
    junk = tmp_path / "junk.json"
    junk.write_text('{"token": 3}')
    assert "enrol, fleet, authority_pem missing" in fails("enrol", str(junk), *at)
    bundle = gateway.bundle(tmp_path / "enrol.json")
    assert "there is no base model" in fails("enrol", str(bundle), *at, "--base", "gpt-99")
    assert "not an enrolled device" in fails("status", *at)
    assert "not an enrolled device" in fails("run", *at)
    assert "port" in fails("run", *at, "--port", "99999")
    done = CliRunner().invoke(app, ["enrol", str(bundle), *at, "--base", str(base.path)])
    assert done.exit_code == 0
    assert "is enrolled as" in fails("enrol", str(bundle), *at, "--base", str(base.path))
    gateway.stop()
    other = ("--home", str(tmp_path / "other"), "--base", str(base.path))
    done = CliRunner().invoke(app, ["enrol", str(bundle), *other])
    assert done.exit_code == 1
    assert "UNAVAILABLE" in done.output


def test_enrolling_again_after_a_lost_answer_gives_the_same_device(gateway, home, base, tmp_path):
    bundle = gateway.bundle(tmp_path / "enrol.json", "d-5")
    arguments = ["enrol", str(bundle), "--home", str(home), "--base", str(base.path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (home / "identity" / "identity.json").unlink()  # as if killed before it was written
    done = CliRunner().invoke(app, [*arguments, "--format", "json"])
    assert done.exit_code == 0
    assert json.loads(done.output)["data"]["device_id"] == "d-5"


def test_help_has_examples_and_needs_no_engine():
    code = (
        "import sys; from typer.testing import CliRunner; from clients.cli import device as app\n"
        "out = CliRunner().invoke(app, ['run', '--help']).output\n"
        "assert 'Example: airpeft device run' in out, out\n"
        "import clients.agent, clients.device, clients.device_enrolment\n"
        "heavy = {'torch', 'transformers', 'peft', 'opacus', 'flwr'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_a_device_dies_with_its_parent_if_asked(home, tmp_path):
    """The parent is killed; the child ends although nobody told it to."""
    code = (
        "import os, sys, subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'from clients.signals import "
        "die_with_parent; die_with_parent(); print(1, flush=True); import time; "
        "time.sleep(60)'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(120)

    def gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"
        except OSError:
            return True

    until(gone, what="the child to end")


@pytest.mark.slow
def test_a_running_process_keeps_to_windows_and_locks(gateway, home, base, tmp_path):
    """In its own time zone, with a lock of a file and one of a command; it serves throughout."""
    bundle, busy = gateway.bundle(tmp_path / "enrol.json", "d-1"), tmp_path / "busy"
    done = CliRunner().invoke(
        app, ["enrol", str(bundle), "--home", str(home), "--base", str(base.path)]
    )
    assert done.exit_code == 0, done.output
    (home / "device.toml").write_text(
        f'base = "{base.path}"\nlock_seconds = 0.1\ntime_zone = "Etc/GMT-7"\n'
        f'update_lock = ["test", "!", "-e", "{busy}"]\n'
    )
    (home / "update.lock").touch()
    busy.touch()
    now = datetime.now(UTC)

    def around(hours: int) -> str:
        """A window of two hours around this moment, on a clock so many hours ahead of UTC."""
        begin, end = (now + timedelta(hours=hours + change) for change in (-1, 1))
        return f"{begin:%H:%M}-{end:%H:%M}"

    adapter = make_adapter(base, 1)
    gateway.order(gateway.release(adapter, 1), rollout="r1", window=around(0))
    process = Process(home)
    url = process.ready()

    def serves() -> str:
        answer = httpx.post(f"{url}/v1/classify", json={"texts": list(TEXTS)}, timeout=120)
        return answer.raise_for_status().json()["adapter"]

    def waits_for(word: str) -> None:
        def look() -> bool:
            return word in ask(url)["waiting"]

        until(look, what=f"to wait for {word}")
        assert serves() == ""

    gateway.heard(DeviceEvent.STAGED, "stable-1")
    waits_for(f"the window {around(0)} opens in")
    gateway.order(gateway.repository.release("stable-1"), rollout="r2", window=around(7))
    waits_for("update.lock is there")
    (home / "update.lock").unlink()
    waits_for("test says 1")
    busy.unlink()
    gateway.heard(DeviceEvent.COMMITTED, "stable-1", rollout="r2")
    assert serves() == adapter.digest
    assert len([path for path, _ in gateway.fetches if "targets" in path]) == 1, "fetched once"
    assert process.end() == 0
