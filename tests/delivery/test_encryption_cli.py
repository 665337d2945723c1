"""Encrypted releases as operators make them: by commands, against a server's process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aggregation import payload, peft_layout, sealed
from clients import identity
from clients.connection import Connection, Denied, enrol
from federation.client import OperatorClient
from federation.enrolment_cli import fleet as fleet_app
from federation.mirror_cli import mirror
from federation.release_cli import keys, release
from protos.messages import EnrolRequest
from protos.recipients import private_key
from protos.wraps import Wraps, unwrap, wraps_path
from simulations.light_device import light_adapter
from tests.delivery.rig import ServerProcess
from tests.delivery.secret_fleet import public_of, running, serves

ADAPTER = light_adapter(1, rank=16)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AIRPEFT_KEY_PASSPHRASE", raising=False)


@pytest.fixture
def operator(server: ServerProcess) -> Iterator[OperatorClient]:
    with server.operator() as client:
        yield client


def run(app: Any, *words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def data(app: Any, *words: object) -> Any:
    return json.loads(run(app, *words, "--format", "json"))["data"]


def enrolled(operator: OperatorClient, folder: Path, name: str, **tags: str) -> Path:
    """A device's home; with an encryption key unless its name says that its agent is old."""
    home = folder / name
    home.mkdir()
    key = identity.key_of(home)
    secret = b"" if name.startswith("old") else identity.encryption_key_of(home)
    token = operator.make_token(device_id=name, tags=tags)
    wanted = identity.certificate_request(key, encryption_pem=secret)
    request = EnrolRequest(token=token["token"], certificate_request=wanted)
    reply = enrol(token["enrol"], token["authority_pem"].encode(), request)
    identity.save(home, reply, key_pem=key, fleet=token["fleet"], enrol=token["enrol"])
    return home


def asks(home: Path, sha256: str) -> bytes:
    connection = Connection(identity.load(home))
    try:
        return connection.content_key(sha256)
    finally:
        connection.close()


def test_the_life_of_an_encrypted_release(
    server: ServerProcess, operator: OperatorClient, tmp_path: Path
) -> None:
    here, secret = ("--home", server.home), tmp_path / "secret"
    secret.write_text("correct horse\n")
    peft_layout.write(tmp_path / "adapter", ADAPTER, base_name="light")
    north = enrolled(operator, tmp_path, "north", site="north")
    south = enrolled(operator, tmp_path, "south", site="south")
    old = enrolled(operator, tmp_path, "old")

    # A sealing key, and two requests: to the north alone, and to all.
    key = tmp_path / "sealing.pem"
    made = data(keys, "sealing", key, "--passphrase-file", secret)
    assert made == {"private": str(key), "public": str(tmp_path / "sealing.pub.pem")}
    assert key.stat().st_mode & 0o077 == 0
    assert b"ENCRYPTED" in key.read_bytes()
    assert "never overwritten" in run(keys, "sealing", key, "--no-passphrase", code=2)
    make = ("make", tmp_path / "adapter", "--runtime", "numpy", *here)
    to = ("--encrypt", made["public"])
    some = data(
        release, *make, *to, "-o", tmp_path / "some", "--where", 'tag.site == "north"'
    )  # fmt: skip
    assert some["readers"] == {"devices": 1, "lacking": []}
    request = tmp_path / "r1"
    text = run(release, *make, *to, "-o", request)
    assert "MB to fetch" in text
    assert "encryption adds" in text
    assert "2 enrolled devices; without an encryption key yet: old" in text
    found = json.loads((request / "request.json").read_text())
    sha256, plain = found["sha256"], payload.encode(ADAPTER)
    assert found["length"] == sealed.sealed_length(plain.length)
    assert {file.name for file in request.iterdir()} >= {"keys.wraps", "payload.airpeft"}
    assert plain.data[100:160] not in b"".join(
        file.read_bytes() for file in request.rglob("*") if file.is_file()
    )
    assert "give --encrypt" in run(release, *make, "-o", tmp_path / "x", "--where", "a", code=2)
    assert "not a public key in PEM" in run(
        release, *make, "-o", tmp_path / "x", "--encrypt", key, code=2
    )

    # Signed by people who cannot read it, published, handed out.
    offline = server.home / "offline-keys"
    signers = ("--key", offline / "adapters-1.pem", "--key", offline / "adapters-2.pem")
    run(release, "sign", request, *signers)
    run(release, "publish", request, *here)
    run(release, "publish", request, *here)  # again, and nothing changes
    assert "key holders" in run(release, "list", *here)
    opened = unwrap(asks(north, sha256), private_key(identity.load(north).encryption_pem), sha256)
    assert sealed.is_right(opened, found["seal"]["check"])
    with pytest.raises(Denied, match="failed-precondition"):
        asks(old, sha256)
    with pytest.raises(Denied, match="not wrapped to this device"):
        asks(north, "ab" * 32)

    # A device that comes later.
    late = enrolled(operator, tmp_path, "late")
    plan = operator.plan_rollout("stable-1", ["100%"])
    assert plan["waves"][0]["unreadable"] == 2, "the late one, and the old one"
    assert "2 devices lack the key of an encrypted release" in " ".join(plan["warnings"])
    with pytest.raises(Denied, match="airpeft release wrap"):
        asks(late, sha256)
    wrap = ("wrap", "--key", key, *here, "--passphrase-file", secret)
    assert data(release, *wrap, "--dry-run")["releases"][0]["new"] == 1
    with pytest.raises(Denied):
        asks(late, sha256)
    assert data(release, *wrap, "stable-1") == {
        "releases": [{"release": "stable-1", "devices": 3, "new": 1}],
        "lacking": ["old"],
        "dry_run": False,
    }
    assert "1 without an encryption key yet (old)" in run(release, *wrap)
    assert data(release, *wrap)["releases"][0]["new"] == 0
    operator.start_rollout("stable-1", ["100%"])
    with running(late) as engine:
        assert serves(engine, "stable-1")

    # A stranger's sealing key, a name that there is not, a roster that knows better.
    run(keys, "sealing", tmp_path / "other.pem", "--no-passphrase")
    assert "not among those" in run(release, "wrap", "--key", tmp_path / "other.pem", *here, code=2)
    assert "no release 'stable-9'" in run(release, *wrap, "stable-9", code=2)
    pem = tmp_path / "south.pem"
    pem.write_bytes(identity.load(south).certificate_pem)
    run(fleet_app, "roster", tmp_path / "roster.json", pem)
    only = data(release, *wrap, "--roster", tmp_path / "roster.json")
    assert only["releases"][0]["devices"] == 1
    assert "no roster" in run(release, *wrap, "--roster", tmp_path / "none", code=2)

    # One is stolen: it gets no key, and no copy holds one for it.
    run(fleet_app, "revoke", "south", "--why", "stolen", *here)
    with pytest.raises(Denied, match="permission-denied"):
        asks(south, sha256)
    run(mirror, "export", tmp_path / "stick", *here)
    file = tmp_path / "stick" / wraps_path(sha256)
    left = Wraps.from_bytes(file.read_bytes(), sha256)
    assert left.find(public_of(south)) is None
    assert left.find(public_of(north))
    assert left.find(public_of(late))
    assert data(release, *wrap)["releases"][0] == {"release": "stable-1", "devices": 2, "new": 0}
    assert [line["action"] for line in operator.audit()].count("wrap") == 1


def test_a_release_that_is_not_encrypted_has_no_keys_to_wrap(
    server: ServerProcess, operator: OperatorClient, tmp_path: Path
) -> None:
    name = server.publish(7, b"plain bytes", channel="open")
    with pytest.raises(Exception, match="is not encrypted"):
        operator.add_wraps(name, Wraps("ab" * 32, {}).to_bytes())
    key = tmp_path / "k.pem"
    run(keys, "sealing", key, "--no-passphrase")
    assert "there is no key to wrap" in run(
        release, "wrap", name, "--key", key, "--home", server.home, code=2
    )
