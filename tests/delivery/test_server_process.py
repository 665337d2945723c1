"""The server as a process: killed, stopped, started twice, started where it cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from federation import cli
from federation.client import OperatorClient, OperatorError
from federation.first_start import Passphrases, take_home
from federation.keys import ADAPTER_NAMES, ROOT_NAMES, KeyFolder, generate
from protos.messages import DeviceEvent
from tests.delivery.rig import ROOT, Device, Obedient, ServerProcess, Watcher
from tests.waiting import until


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path / "home")
    yield process.start()
    process.stop()


def state_of(server: ServerProcess, rollout: str) -> str:
    with server.operator() as operator:
        return str(operator.rollout(rollout)["state"])


@contextlib.contextmanager
def obedient(*devices: Device) -> Iterator[list[Obedient]]:
    with contextlib.ExitStack() as stack:
        fleet = [Obedient(device) for device in devices]
        for one in fleet:
            stack.enter_context(one.watcher)
        yield fleet


def fails_to_start(home: Path, *arguments: str, **options: Any) -> str:
    """Standard error of a server that must give up at once, with exit code 2."""
    command = [sys.executable, "-m", "airpeft", "server", "--home", str(home), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, **options)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert "Traceback" not in text
    return text


def test_killed_three_times_in_the_middle_of_a_rollout_it_goes_on(fresh: ServerProcess) -> None:
    devices = [Device(fresh, f"d-{number}") for number in range(4)]
    payload = os.urandom(200_000)
    name = fresh.publish(1, payload)
    ports = {key: fresh.endpoints[key] for key in ("fleet", "enrol", "api")}
    with fresh.operator() as operator:
        policy = {"bake_seconds": 0.5, "deadline_seconds": 600.0}
        rollout = operator.start_rollout(name, ["1", "2", "100%"], policy=policy)["id"]
    fresh.kill()  # the round is decided; nobody has heard of it
    fresh.start()
    assert {key: fresh.endpoints[key] for key in ports} == ports, "devices could not find it again"
    with obedient(*devices) as fleet:
        until(lambda: any(one.loaded for one in fleet), what="the canary's commit")
        fresh.kill()
        fresh.start()
        until(lambda: sum(len(one.loaded) for one in fleet) >= 2, what="the second wave")
        fresh.kill()
        fresh.start()
        until(lambda: state_of(fresh, rollout) == "done", what="the end of the rollout")
        assert [one.loaded for one in fleet] == [[name]] * 4
    with fresh.operator() as operator:
        record = next(r for r in operator.releases() if r["name"] == name)
        folder, _, file = record["target"].rpartition("/")
        path = f"targets/{folder}/{record['sha256']}.{file}"
        assert all(d["outcome"] == "committed" for d in operator.rollout(rollout)["devices"])
    assert devices[0].fetch(path) == payload


def test_a_bad_release_stops_at_the_canary(fresh: ServerProcess) -> None:
    devices = [Device(fresh, f"d-{number}") for number in range(3)]
    good, bad = fresh.publish(1, b"good"), fresh.publish(2, b"bad")
    with obedient(*devices) as fleet, fresh.operator() as operator:
        for one in fleet:
            one.verdict = lambda name: (
                DeviceEvent.REVERTED if name == bad else DeviceEvent.COMMITTED
            )
        first = operator.start_rollout(good, ["100%"])["id"]
        until(lambda: state_of(fresh, first) == "done", what="the good release")
        second = operator.start_rollout(bad, ["1", "100%"], why="a mistake")["id"]
        until(lambda: state_of(fresh, second) == "rolled_back", what="the roll-back")
        assert [one.loaded for one in fleet] == [[good]] * 3
        told = operator.rollout(second)
        assert sum(d["outcome"] == "reverted" for d in told["devices"]) == 1
        assert {d["running"] for d in told["devices"]} == {good}
        assert 'airpeft_rollouts{state="rolled_back"} 1.0' in operator.metrics()


def test_sigterm_ends_it_within_seconds_though_streams_are_open(fresh: ServerProcess) -> None:
    device = Device(fresh)
    with Watcher(device) as watcher:
        until(lambda: watcher.bundles, what="an open stream")
        began = time.monotonic()
        assert fresh.stop() == 0, fresh.log()
        assert time.monotonic() - began < 8
        assert not (fresh.home / "endpoints.json").exists()
        assert "Traceback" not in fresh.log()
        seen = len(watcher.bundles)
        fresh.start()
        until(lambda: len(watcher.bundles) > seen, what="the stream after the restart")


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for option in ("--fleet-port", "--enrol-port", "--api-port"):
            text = fails_to_start(tmp_path / "home", option, str(port))
            assert f"cannot listen on 127.0.0.1:{port}" in text
            assert "choose another" in text


def test_a_second_server_in_the_same_home_is_refused(fresh: ServerProcess) -> None:
    assert fresh.process is not None
    text = fails_to_start(fresh.home)
    assert f"another server (process {fresh.process.pid}) runs in {fresh.home}" in text
    with fresh.operator() as operator:
        assert operator.health()["status"] == "serving"


def test_a_folder_that_is_not_writable_is_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    nobody: dict[str, Any] = {"user": 65534} if os.geteuid() == 0 else {}
    text = fails_to_start(closed / "home", **nobody)
    assert f"cannot write {closed / 'home'}" in text
    assert "not writable" in text
    (tmp_path / "file").write_text("")
    assert "choose another" in fails_to_start(tmp_path / "file" / "home")


def test_a_last_port_that_is_taken_by_now_is_replaced(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "home").start()
    server.stop()
    port = json.loads((server.home / "ports.json").read_text())["fleet"]
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        server.start()
        try:
            assert server.endpoints["fleet"] != f"127.0.0.1:{port}"
            assert "devices must be told" in server.log()
        finally:
            server.stop()


def test_given_offline_keys_are_used_and_may_be_encrypted(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    generate(keys, [*ROOT_NAMES, *ADAPTER_NAMES], passphrase="open sesame")
    secret = tmp_path / "passphrase"
    secret.write_text("open sesame\n")
    arguments = ("--offline-keys", str(keys), "--passphrase-file", str(secret))
    server = ServerProcess(tmp_path / "home", arguments).start()
    server.stop()
    assert not (server.home / "offline-keys").exists()
    root = json.loads((server.home / "repository/metadata/1.root.json").read_text())
    assert KeyFolder(keys).public("root-1").keyid in root["signed"]["keys"]
    missing = fails_to_start(tmp_path / "other", "--offline-keys", str(tmp_path / "nothing"))
    assert "lacks adapters-1" in missing
    assert "airpeft keys init" in missing


def test_a_first_start_that_was_killed_is_simply_started_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    partial = home / "offline-keys.partial"
    generate(partial, ["root-1"])  # killed while making keys
    (home / "authority").mkdir(parents=True)
    server = ServerProcess(home).start()
    assert server.stop() == 0
    assert set(KeyFolder(home / "offline-keys").names()) == {*ROOT_NAMES, *ADAPTER_NAMES}


def test_the_interface_wants_its_token_and_stores_only_a_digest(fresh: ServerProcess) -> None:
    url = f"http://{fresh.endpoints['api']}"
    token = (fresh.home / "admin.token").read_text().strip()
    assert (fresh.home / "admin.token").stat().st_mode & 0o777 == 0o600
    for path in ("/v1/devices", "/v1/releases", "/v1/rollouts", "/v1/audit"):
        assert httpx.get(url + path, trust_env=False).status_code == 401
        wrong = {"Authorization": "Bearer nonsense"}
        assert httpx.get(url + path, headers=wrong, trust_env=False).status_code == 401
    for file in fresh.home.glob("fleet.sqlite*"):
        assert token.encode() not in file.read_bytes()
    (fresh.home / "admin.token").unlink()
    with pytest.raises(OperatorError, match=r"admin\.token"):
        fresh.operator()
    fresh.stop()
    fresh.arguments = ("--new-admin-token",)
    fresh.start()
    with fresh.operator() as operator:
        assert operator.devices() == []
    with OperatorClient(f"http://{fresh.endpoints['api']}", token) as old:
        with pytest.raises(OperatorError, match="valid operator token"):
            old.devices()


def test_the_command_line_from_token_to_roll_back(fresh: ServerProcess, tmp_path: Path) -> None:
    run = CliRunner()

    def call(app: Any, *words: str, code: int = 0) -> Any:
        result = run.invoke(app, [*words, "--home", str(fresh.home), "--format", "json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)["data"] if code == 0 else result

    out = tmp_path / "enrol.json"
    call(cli.fleet, "token", "--out", str(out), "--device", "kitchen", "--tag", "site=north")
    bundle = json.loads(out.read_text())
    assert set(bundle) == {"enrol", "fleet", "token", "authority_pem"}
    assert out.stat().st_mode & 0o777 == 0o600
    device = Device(fresh, "attic")
    name = fresh.publish(1, b"payload")
    with obedient(device):
        started = call(cli.rollout, "start", name, "--wave", "100%", "--why", "spring")
        assert started["state"] == "running"
        until(lambda: state_of(fresh, started["id"]) == "done", what="the rollout")
        words = ["watch", started["id"], "--home", str(fresh.home)]
        assert "1 of 1 devices" in run.invoke(cli.rollout, words).stdout
        assert call(cli.fleet, "list")[0]["running"] == name
        back = call(cli.rollout, "rollback", started["id"], "--why", "autumn")
        assert back["state"] in ("rolling_back", "rolled_back")
        until(lambda: state_of(fresh, started["id"]) == "rolled_back", what="the roll-back")
        watched = run.invoke(cli.rollout, words)
        assert watched.exit_code == 3
        assert "autumn" in watched.stdout
    assert [r["state"] for r in call(cli.rollout, "status")] == ["rolled_back"]
    assert "attic" in run.invoke(cli.fleet, ["list", "--home", str(fresh.home)]).stdout
    refused = call(cli.rollout, "pause", started["id"], code=2)
    assert "cannot pause rollout r-1: it is rolled_back" in refused.stderr
    bad = call(cli.rollout, "start", name, "--wave", "half", code=2)
    assert "neither a number" in bad.stderr
    assert "NAME" not in call(cli.fleet, "show", "nobody", code=2).stderr
    call(cli.fleet, "revoke", "attic", "--why", "sold")
    assert call(cli.fleet, "list")[0]["revoked"] is not None
    assert call(cli.fleet, "lagging") == []


def test_a_command_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.fleet, ["list", "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert "airpeft server --home" in result.stderr
    (tmp_path / "endpoints.json").write_text('{"api": "127.0.0.1:9"}')
    (tmp_path / "admin.token").write_text("x")
    result = CliRunner().invoke(cli.fleet, ["list", "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert "no answer from http://127.0.0.1:9" in result.stderr


def test_the_server_loads_no_training_framework() -> None:
    code = (
        "import sys, federation.server, federation.cli;"
        "print([m for m in ('torch', 'flwr', 'peft', 'opacus', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout.strip() == b"[]", done.stderr


def test_secrets_do_not_show_in_a_repr(tmp_path: Path) -> None:
    assert "sesame" not in repr(Passphrases(offline="sesame"))
    lock = take_home(tmp_path / "home")
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    lock.close()
