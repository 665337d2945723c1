"""The server as a process: killed, stopped, started twice, started where it cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from federation import operators_cli
from federation.client import OperatorClient, OperatorError
from federation.enrolment_cli import fleet as fleet_app
from federation.first_start import Passphrases, ServerError, open_repository, take_home
from federation.keys import ADAPTER_NAMES, ROOT_NAMES, KeyFolder, generate
from federation.operators import Operator, Role, ensure_admin, operator_of, renew_admin
from federation.rollout_cli import rollout as rollout_app
from federation.store import Store
from protos.messages import DeviceEvent
from tests.delivery.rig import ROOT, Device, Obedient, ServerProcess, Watcher, signed_release
from tests.waiting import until


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path / "home")
    yield process.start()
    process.stop()


def wait_for(server: ServerProcess, rollout: str, state: str) -> None:
    """Until the rollout is in this state; a failure shows the whole rollout."""

    def look() -> bool:
        with server.operator() as operator:
            seen.update(operator.rollout(rollout))
        return bool(seen["state"] == state)

    seen: dict[str, Any] = {}
    try:
        until(look, what=f"{rollout} {state}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{json.dumps(seen, indent=1)}\n{server.log()}") from None


@contextlib.contextmanager
def obedient(*devices: Device) -> Iterator[list[Obedient]]:
    """Devices at work; afterwards they are revoked, so that no later rollout waits for them."""
    with contextlib.ExitStack() as stack:
        fleet = [Obedient(device) for device in devices]
        for one in fleet:
            stack.enter_context(one.watcher)
        yield fleet
        with devices[0].server.operator() as operator:
            for device in devices:
                operator.revoke(device.name, "the test is over")


def fails_to_start(home: Path, *arguments: str, **options: Any) -> str:
    """Standard error of a server that must give up at once, with exit code 2."""
    command = [sys.executable, "-m", "airpeft", "server", "--home", str(home), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, **options)
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
        wait_for(fresh, rollout, "done")
        assert [one.loaded for one in fleet] == [[name]] * 4
        with fresh.operator() as operator:
            assert all(d["outcome"] == "committed" for d in operator.rollout(rollout)["devices"])
            record = operator.releases()[0]
        folder, _, file = record["target"].rpartition("/")
        assert devices[0].fetch(f"targets/{folder}/{record['sha256']}.{file}") == payload


def test_killed_in_every_state_it_goes_on(fresh: ServerProcess, tmp_path: Path) -> None:
    """Awaiting approval, held after a success, in a filter wave, comparing, rolling back."""
    devices = [Device(fresh, f"d-{number}") for number in range(4)]
    first, second = fresh.publish(1, b"one"), fresh.publish(2, b"two")

    def killed() -> None:
        fresh.kill()
        fresh.start()

    with fresh.operator() as operator:
        made = operator.add_operator("ben", "approver")
        operator.tag("d-0", {"ring": "canary"})
        operator.tag("d-1", {"ring": "canary"})
        policy = {"two_person": True, "on_success": "pause", "deadline_seconds": 600.0}
        waves = ['1 where tag.ring == "canary"', 'where tag.ring == "canary"', "100%"]
        rollout = operator.start_rollout(first, waves, policy=policy)["id"]
    killed()
    with obedient(*devices) as fleet:
        wait_for(fresh, rollout, "awaiting_approval")
        assert sum(len(one.loaded) for one in fleet) == 1
        killed()
        wait_for(fresh, rollout, "awaiting_approval")
        with fresh.operator() as operator:
            with pytest.raises(OperatorError, match="another operator must approve"):
                operator.act(rollout, "approve")
            ben = OperatorClient(operator.url, made["token"])
            with ben:
                with pytest.raises(OperatorError, match="role approver, which may not operate"):
                    ben.start_rollout(second)
                ben.act(rollout, "approve", "looked at it")
        killed()  # approved, and perhaps not yet begun
        wait_for(fresh, rollout, "paused")
        assert [bool(one.loaded) for one in fleet] == [True, True, False, False]
        killed()
        with fresh.operator() as operator:
            assert operator.rollout(rollout)["held"]
            operator.act(rollout, "resume")
        wait_for(fresh, rollout, "done")
        assert [one.loaded for one in fleet] == [[first]] * 4
        with fresh.operator() as operator:
            third = fresh.publish(3, b"three")
            words = {"other": third, "policy": {"bake_seconds": 0.5}}
            again = operator.start_rollout(second, ["2", "100%"], **words)["id"]
        killed()
        wait_for(fresh, again, "done")
        assert sorted(one.running for one in fleet) == [second, second, third, third]
        assert all(len(one.loaded) == 2 for one in fleet), "a device changed sides"
        with fresh.operator() as operator:
            operator.act(again, "rollback", "neither")
        killed()
        wait_for(fresh, again, "rolled_back")
        until(lambda: {one.running for one in fleet} == {first}, what="all back")
        with fresh.operator() as operator:
            verdict = operator.verify_audit()
            assert verdict["sound"], verdict
            assert operator.verify_audit(verdict["head"])["sound"]
            whys = [line["why"] for line in operator.audit(500) if line["who"] == "ben"]
            assert any("approved by ben: looked at it" in why for why in whys)


def test_a_bad_release_stops_at_the_canary(server: ServerProcess) -> None:
    devices = [Device(server, f"d-{number}") for number in range(3)]
    good, bad = server.publish(1, b"good"), server.publish(2, b"bad")
    with obedient(*devices) as fleet, server.operator() as operator:
        for one in fleet:
            one.verdict = lambda name: (
                DeviceEvent.REVERTED if name == bad else DeviceEvent.COMMITTED
            )
        first = operator.start_rollout(good, ["100%"])["id"]
        wait_for(server, first, "done")
        second = operator.start_rollout(bad, ["1", "100%"], why="a mistake")["id"]
        wait_for(server, second, "rolled_back")
        assert [one.loaded for one in fleet] == [[good]] * 3
        told = operator.rollout(second)
        assert sum(d["outcome"] == "reverted" for d in told["devices"]) == 1
        assert {d["running"] for d in told["devices"]} == {good}
        many = len(operator.rollouts(["rolled_back"]))
        assert many >= 1
        assert f'airpeft_rollouts{{state="rolled_back"}} {many}.0' in operator.metrics()


def test_sigterm_ends_it_with_streams_open_and_a_lost_port_is_replaced(
    fresh: ServerProcess,
) -> None:
    device = Device(fresh)
    with Watcher(device) as watcher:
        until(lambda: watcher.bundles, what="an open stream")
        assert fresh.stop() == 0, fresh.log()
        assert not (fresh.home / "endpoints.json").exists()
        assert "Traceback" not in fresh.log()
        port = json.loads((fresh.home / "ports.json").read_text())["fleet"]
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", port))
            holder.listen()
            fresh.start()
        assert fresh.endpoints["fleet"] != f"127.0.0.1:{port}"
        assert "devices must be told" in fresh.log()
        seen = len(watcher.bundles)
        until(lambda: len(watcher.bundles) > seen, what="the stream after the restart")


def test_it_ends_with_its_parent_if_asked_to(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "airpeft", "server", "--home", str(home)]
    # The parent ends, without a word to its child, as soon as the server answers.
    parent = (
        "import os, pathlib, subprocess, sys, threading\n"
        "subprocess.Popen([*sys.argv[2:], '--die-with-parent'], stderr=subprocess.DEVNULL)\n"
        "while not pathlib.Path(sys.argv[1]).exists(): threading.Event().wait(0.05)\n"
        "os._exit(0)\n"
    )
    arguments = [sys.executable, "-c", parent, str(home / "endpoints.json"), *command]
    subprocess.run(arguments, cwd=ROOT, check=True, timeout=120)

    def free() -> bool:
        try:
            take_home(home).close()
        except ServerError:
            return False
        return True

    until(free, what="the server's end")
    assert not (home / "endpoints.json").exists()


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for option in ("--fleet-port", "--api-port"):
            text = fails_to_start(tmp_path / "home", option, str(port))
            assert f"cannot listen on 127.0.0.1:{port}" in text
            assert "choose another" in text


def test_a_second_server_in_the_same_home_is_refused(server: ServerProcess) -> None:
    assert server.process is not None
    message = rf"another server \(process {server.process.pid}\) runs in {server.home}"
    with pytest.raises(ServerError, match=message):
        take_home(server.home)
    with server.operator() as operator:
        assert operator.health()["status"] == "serving"


def test_a_folder_that_is_not_writable_is_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    # Permissions don't bind root; a kernel file system does.
    home = (Path("/sys") if os.geteuid() == 0 else closed) / "home"
    text = fails_to_start(home)
    assert f"cannot write {home}" in text
    assert "choose another" in text
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="choose another"):
        take_home(tmp_path / "file" / "home")


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
    with pytest.raises(ServerError, match=r"lacks adapters-1, .* airpeft keys init"):
        open_repository(
            tmp_path / "other",
            offline_keys=tmp_path / "nothing",
            passphrases=Passphrases(),
            now=datetime.now(UTC),
        )


def test_a_first_start_that_was_killed_is_simply_started_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    partial = home / "offline-keys.partial"
    generate(partial, ["root-1"])  # killed while making keys
    (home / "authority").mkdir(parents=True)
    server = ServerProcess(home).start()
    assert server.stop() == 0
    assert set(KeyFolder(home / "offline-keys").names()) == {*ROOT_NAMES, *ADAPTER_NAMES}


def test_the_interface_wants_its_token_and_stores_only_a_digest(server: ServerProcess) -> None:
    url = f"http://{server.endpoints['api']}"
    file = server.home / "admin.token"
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    for path in ("/v1/devices", "/v1/releases", "/v1/rollouts", "/v1/audit"):
        assert httpx.get(url + path, trust_env=False, timeout=120).status_code == 401
        wrong = {"Authorization": "Bearer nonsense"}
        assert httpx.get(url + path, headers=wrong, trust_env=False, timeout=120).status_code == 401
    for one in server.home.glob("fleet.sqlite*"):
        assert token.encode() not in one.read_bytes()
    hidden = file.rename(file.with_suffix(".away"))
    with pytest.raises(OperatorError, match=r"admin\.token"):
        server.operator()
    hidden.rename(file)


def test_what_the_interface_refuses_is_named(server: ServerProcess) -> None:
    with server.operator() as operator:
        for body, message in (
            ({"release": "x", "speed": 1}, "speed: Extra inputs"),
            ({"waves": ["1"]}, "release: Field required"),
            ({"release": "nope-1", "waves": ["100%"]}, "no release 'nope-1'"),
            ({"release": "nope-1", "waves": ["1"]}, "no release|last wave must be 100%"),
            ({"release": "n-1", "policy": {"max_failures": -1}}, "max_failures .* cannot be -1"),
        ):
            with pytest.raises(OperatorError, match=message) as refused:
                operator._call("POST", "/v1/rollouts", body)
            assert 400 <= refused.value.status < 500
        with pytest.raises(OperatorError, match="must be base64"):
            operator._call("POST", "/v1/releases", {"metadata": "!", "payload": ""})
        _, current = operator.adapters()
        good = signed_release(server.home, current, 1, b"payload", "forged")
        forged = good.replace(b'"sig":"', b'"sig":"00')
        for metadata, payload in ((forged, b"payload"), (good, b"another"), (b"{}", b"")):
            with pytest.raises(OperatorError) as refused:
                operator.publish_release(metadata, payload)
            assert refused.value.status == 409
        assert not any(one["name"].startswith("forged") for one in operator.releases())
        document = operator._call("GET", "/openapi.json")
        assert "/v1/rollouts/{rollout_id}/{verb}" in document["paths"]
    url = f"http://{server.endpoints['api']}/v1/releases"
    token = (server.home / "admin.token").read_text().strip()

    def endless() -> Iterator[bytes]:
        for _ in range(110):
            yield b"x" * 1024 * 1024

    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.post(url, content=endless(), headers=headers, trust_env=False, timeout=120)
    assert answer.status_code == 413


def test_a_new_operators_token_ends_the_old_one(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "fleet.sqlite")
    ensure_admin(store, tmp_path)
    first = (tmp_path / "admin.token").read_text().strip()
    ensure_admin(store, tmp_path)
    assert (tmp_path / "admin.token").read_text().strip() == first
    assert operator_of(store, first) == Operator("admin", Role.ADMIN)
    renew_admin(store, tmp_path)
    assert operator_of(store, first) is None
    second = (tmp_path / "admin.token").read_text().strip()
    assert operator_of(store, second) == Operator("admin", Role.ADMIN)
    store.close()


def test_the_command_line_from_token_to_roll_back(server: ServerProcess, tmp_path: Path) -> None:
    run = CliRunner()

    def call(app: Any, *words: str, code: int = 0) -> Any:
        result = run.invoke(app, [*words, "--home", str(server.home), "--format", "json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)["data"] if code == 0 else result

    out = tmp_path / "enrol.json"
    call(
        fleet_app,
        "token",
        "--out",
        str(out),
        "--device",
        "kitchen",
        "--tag",
        "site=north",
    )
    bundle = json.loads(out.read_text())
    assert set(bundle) == {"enrol", "fleet", "token", "authority_pem"}
    assert out.stat().st_mode & 0o777 == 0o600
    device = Device(server, "attic")
    name = server.publish(1, b"payload", channel="line")
    with obedient(device):
        started = call(rollout_app, "start", name, "--wave", "100%", "--why", "spring")
        assert started["state"] in ("running", "done")
        wait_for(server, started["id"], "done")
        words = ["watch", started["id"], "--home", str(server.home)]
        assert "1 of 1 devices" in run.invoke(rollout_app, words).stdout
        assert call(fleet_app, "show", "attic")["running"] == name
        meant = ("--where", 'id == "attic"')
        assert call(fleet_app, "tag", *meant, "site=roof", "--dry-run")[0]["tags"] == {}
        assert call(fleet_app, "tag", *meant, "site=cellar")[0]["tags"] == {"site": "cellar"}
        back = call(rollout_app, "rollback", started["id"], "--why", "autumn")
        assert back["state"] in ("rolling_back", "rolled_back")
        wait_for(server, started["id"], "rolled_back")
        watched = run.invoke(rollout_app, words)
        assert watched.exit_code == 3
        assert "autumn" in watched.stdout
    assert call(rollout_app, "status")[0]["state"] == "rolled_back"
    assert "attic" in run.invoke(fleet_app, ["list", "--home", str(server.home)]).stdout
    refused = call(rollout_app, "pause", started["id"], code=2)
    assert f"cannot pause rollout {started['id']}: it is rolled_back" in refused.stderr
    bad = call(rollout_app, "start", name, "--wave", "half", code=2)
    assert "neither a number" in bad.stderr
    other = server.publish(2, b"payload", channel="line")
    planned = call(rollout_app, "plan", other, "--wave", "1x2", "--window", "22:00-05:00")
    assert planned["waves"][-1]["reached"] == planned["fleet"]
    dry = ["start", other, "--dry-run", "--home", str(server.home)]
    assert "nothing has happened" in run.invoke(rollout_app, dry).stdout
    assert "give one RELEASE" in call(rollout_app, "plan", code=2).stderr
    assert "--retries" in call(rollout_app, "plan", name, "--retries", "x=1", code=2).stderr
    rated = ("plan", other, "--rate", "6", "--unhealthy-if", "heat=85")
    grown = ("--rate-factor", "2", "--rate-every", "5", "--rate-counting", "succeeded")
    planned = call(rollout_app, *rated, *grown, "--rate-max", "90")
    assert "times 2 for every 5 succeeded, at most 90" in planned["rate"]
    told = run.invoke(rollout_app, [*rated, "--home", str(server.home)]).stdout
    assert "rate: 6 devices a minute" in told
    assert max(map(len, told.splitlines())) <= 100
    assert "needs --rate-factor" in call(rollout_app, *rated, *grown[:2], code=2).stderr
    assert "NAME=LIMIT" in call(rollout_app, *rated[:2], *rated[4:5], "x=1", code=2).stderr
    said = json.loads(call(rollout_app, "pause", started["id"], "--dry-run", code=2).stdout)["data"]
    assert (said["possible"], "cannot pause" in said["effect"]) == (False, True)
    assert call(rollout_app, "status", "--state", "running") == []
    assert "name it" in call(rollout_app, "status", "--troubled", code=2).stderr
    assert "give one DEVICE" in call(fleet_app, "revoke", code=2).stderr
    tagged = call(fleet_app, "tag", "attic", "site=roof", "--remove", "nothing")
    assert tagged["tags"] == {"site": "roof"}
    found = call(fleet_app, "list", "--where", 'tag.site == "roof"')
    assert [one["id"] for one in found] == ["attic"]
    assert "unknown field" in call(fleet_app, "list", "--where", "x == 1", code=2).stderr
    token = tmp_path / "ben.token"
    added = call(operators_cli.operators, "add", "ben", "--role", "viewer", "--out", str(token))
    assert "token" not in added
    assert token.stat().st_mode & 0o777 == 0o600
    url = f"http://{server.endpoints['api']}"
    words = ["pause", started["id"], "--url", url, "--token-file", str(token)]
    denied = run.invoke(rollout_app, words)
    assert (denied.exit_code, "role viewer, which may not stop" in denied.stderr) == (2, True)
    call(operators_cli.operators, "revoke", "ben")
    listed = {one["name"]: one["revoked"] for one in call(operators_cli.operators, "list")}
    assert listed["ben"] is not None
    head = call(operators_cli.audit, "verify")["head"]
    assert call(operators_cli.audit, "list", "--limit", "1")[0]["action"] == "operator-revoke"
    call(operators_cli.audit, "verify", "--head", head)
    lost = run.invoke(
        operators_cli.audit, ["verify", "--head", "0f" * 32, "--home", str(server.home)]
    )
    assert (lost.exit_code, "BROKEN" in lost.stdout) == (4, True)
    assert "no device 'nobody'" in call(fleet_app, "show", "nobody", code=2).stderr
    spare = Device(server, "cellar")
    call(fleet_app, "revoke", spare.name, "--why", "sold")
    revoked = {d["id"]: d["revoked"] for d in call(fleet_app, "list")}
    assert revoked["cellar"] is not None
    assert call(fleet_app, "lagging") == []
    away = Device(server, "away")
    assert [d["id"] for d in call(fleet_app, "lagging", "--hours", "0")] == ["away"]
    with Watcher(away) as watcher:
        until(lambda: watcher.bundles, what="the stream")
        assert call(fleet_app, "lagging", "--hours", "0") == []
        (one,) = [d for d in call(fleet_app, "list") if d["id"] == "away"]
        assert one["metadata_hours"] == 0.0, "it was sent the newest"
    with server.operator() as operator:
        operator.revoke(away.name)


def test_a_command_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(fleet_app, ["list", "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert "airpeft server --home" in result.stderr
    (tmp_path / "endpoints.json").write_text('{"api": "127.0.0.1:9"}')
    (tmp_path / "admin.token").write_text("x")
    result = CliRunner().invoke(fleet_app, ["list", "--home", str(tmp_path)])
    assert result.exit_code == 2
    assert "no answer from http://127.0.0.1:9" in result.stderr


def test_secrets_do_not_show_in_a_repr(tmp_path: Path) -> None:
    assert "sesame" not in repr(Passphrases(offline="sesame"))
    lock = take_home(tmp_path / "home")
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    lock.close()
