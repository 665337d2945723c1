"""Secure sums of real clients: in this process, in workers, and on enrolled devices."""

from __future__ import annotations

import datetime
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from aggregation.adapter import Adapter
from clients import identity
from clients.base import find_base
from clients.client_app import app as client_app
from clients.node import insist_on_sum
from clients.trainer import ResidentTrainer
from clients.trainer_process import listen, serve
from federation.rounds import RoundsConfig
from federation.server_app import run_training
from federation.strategy import TrainingResult
from privacy.ledger import Ledger
from privacy.secure_roster import Roster
from privacy.secure_session import SecureSumError
from privacy.statement import explain
from protos.messages import EnrolReply
from simulations import folder, records
from simulations.grid import LocalGrid
from simulations.run import RunError, simulate
from simulations.scenario import load
from tests.simulations.world import world_scenario

SECURE = (
    "federation.recipe=fedit",
    "federation.pieces.private=secure-sum(clip=8, max_weight=128)",
    "federation.rounds=2",
)


def rounds_with(config: RoundsConfig, initial: Adapter, private: str) -> TrainingResult:
    chosen = replace(config, pieces={"private": private})
    with LocalGrid(client_app, config.clients) as grid:
        return run_training(grid, chosen, initial=initial)


@pytest.mark.parametrize("recipe", ["fedit", "fedask", "fed-sb", "fed-plora"])
def test_real_clients_give_the_sum_of_their_updates(
    recipe: str, world: Path, tmp_path: Path
) -> None:
    scenario = world_scenario(world, *SECURE[1:], f"federation.recipe={recipe}")
    found = {}
    for private in ("none", "secure-sum(clip=8, max_weight=128)"):
        out = tmp_path / private[:4]
        with folder.locked(out) as where:
            run = folder.prepare(scenario, where)
            found[private[:4]] = rounds_with(run.config, run.initial, private)
    clear, secure = found["none"], found["secu"]
    record = secure.rounds[-1]
    assert record.unchanged == ""
    assert record.used == clear.rounds[-1].used
    # Nobody sees the products of the single updates; two sketches tell what they have missed.
    assert (clear.rounds[-1].measured, record.measured) == (True, recipe == "fedask")
    written = records.line(secure.rounds, record, None)
    assert (written["aggregation_error"] is not None) == (recipe == "fedask")
    assert record.privacy_events.keys() == set(record.used)  # what was spent is known, as ever
    assert all(set(said) <= {"steps"} for said in record.client_metrics.values())
    if recipe == "fedask":  # its SVD turns what rounding has moved by a little
        assert clear.adapter.spec == secure.adapter.spec
        return
    for key, value in clear.adapter:
        # The second round trains from what the first one's rounding has moved.
        assert np.abs(value - secure.adapter.tensors[key]).max() < 2e-3


def test_a_sketched_sum_takes_clients_of_several_ranks(world: Path, tmp_path: Path) -> None:
    more = ("federation.recipe=fedask", "train.ranks=[1, 2, 4]")
    result = simulate(world_scenario(world, *SECURE[1:], *more), tmp_path / "run")
    assert [line["unchanged"] for line in result.metrics] == ["", "", ""]
    assert result.metrics[-1]["secure_sum"]["summed"] == 3


def test_workers_give_the_same_bits_and_the_statement_says_what_was_done(
    world: Path, tmp_path: Path
) -> None:
    scenario = world_scenario(world, *SECURE)
    here = simulate(scenario, tmp_path / "here")
    there = simulate(scenario, tmp_path / "there", workers=2)
    assert here.adapter.digest == there.adapter.digest
    said = json.loads((there.adapter_folder / "privacy.json").read_text())
    assert said["secure_sum"]["summed"] == [3, 3]
    assert said["secure_sum"]["rounds"] == {"summed": 2, "given_up": 0}
    assert "no update" in explain(said)
    line = json.loads((tmp_path / "here" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["secure_sum"]["weight"] > 0
    assert line["influence"] == {}
    secrets = [p for p in (tmp_path / "there").rglob("*") if p.is_file() and "roster" in p.name]
    assert [p.name for p in secrets] == ["roster.json"]  # public keys are all that is on the disk


def test_the_server_noises_a_sum_that_hides_the_updates(world: Path, tmp_path: Path) -> None:
    scenario = world_scenario(
        world, *SECURE, "client_privacy.noise_multiplier=1.0", "client_privacy.delta=0.05"
    )
    assert scenario.chosen().private.kind == "secure-client-dp"
    result = simulate(scenario, tmp_path / "run")
    assert result.metrics[-1]["client_epsilon"] > 0
    assert result.metrics[-1]["secure_sum"]["summed"] == 3
    assert "sees the sum" in result.privacy["client"]["trusted"]


def test_the_clients_noise_a_sum_and_the_statement_says_against_whom(
    world: Path, tmp_path: Path
) -> None:
    noise = ("client_privacy.mechanism=distributed", "client_privacy.delta=0.05")
    scenario = world_scenario(world, *SECURE, *noise, "client_privacy.epsilon=6")
    assert scenario.chosen().private.kind == "secure-client-ddp"
    result = simulate(scenario, tmp_path / "run")
    assert 5.9 < result.metrics[-1]["client_epsilon"] <= 6
    assert result.metrics[-1]["secure_sum"]["honest"] == 1
    said = json.loads((result.adapter_folder / "privacy.json").read_text())
    client = said["client"]
    assert client["epsilon"] == result.metrics[-1]["client_epsilon"]
    assert "the server, which sees no sum without noise" in client["protects_against"]
    assert client["shares"] == {"least": [2, 2], "honest": [1, 1]}
    text = explain(said)
    assert "1 of the 2 or more clients in each sum" in text
    assert "zeros in their place" in text
    assert "sampled exactly" in client["limits"]
    spent = Ledger(tmp_path / "run" / "server-ledger.sqlite").table()
    assert [entry.event.to_mapping()["mechanism"] for entry in spent] == ["distributed"] * 2


def test_ray_is_refused_since_it_keeps_no_client_in_its_place(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="backend 'local'"):
        simulate(world_scenario(world, *SECURE), tmp_path / "run", backend="ray")


def test_the_shipped_scenario_is_one() -> None:
    scenario = load(Path(__file__).parents[2] / "scenarios" / "secure.toml")
    assert scenario.chosen().private.secure


@dataclass
class Device:
    """A lane whose one client is an enrolled device with its own trainer process."""

    config: dict[str, str]

    def node_config(self) -> Mapping[str, str]:
        return self.config

    def ensure(self) -> None:
        """Always there."""

    def abandon(self) -> None:
        """Left to itself."""


@contextmanager
def device(home: Path, name: str, base: Path, data: Path) -> Iterator[tuple[Device, bytes]]:
    """An enrolled device: identity, ledger, data and a resident trainer; and its certificate."""
    home.mkdir()
    key_pem = identity.key_of(home)
    key = serialization.load_pem_private_key(key_pem, password=None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder(
        subject, subject, key.public_key(), 7, day, day.replace(year=2046)
    )
    certificate = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
    identity.save(
        home,
        EnrolReply(device_id=name, certificate=certificate, authority=certificate, root=b"{}"),
        key_pem=key_pem,
        fleet="x:1",
    )
    trainer = ResidentTrainer(
        find_base(str(base)), Ledger(home / "ledger.sqlite"), 1, device_key=name.encode() * 8
    )
    listener = listen(home / "t.sock")

    def run() -> None:
        try:
            serve(listener, trainer)
        except OSError:
            return  # the listener was shut down

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    config = {
        "client": name,
        "data": str(data),
        "base": str(base),
        "identity": str(home),
        "trainer-socket": str(home / "t.sock"),
    }
    try:
        yield Device(config), certificate
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(120)


def test_enrolled_devices_sum_with_a_roster_that_they_have_pinned(
    world: Path, tmp_path: Path
) -> None:
    scenario = world_scenario(world, *SECURE)
    with folder.locked(tmp_path / "run") as where:
        run = folder.prepare(scenario, where)
    names = [f"device-{number}" for number in range(3)]
    rows = sorted((tmp_path / "run" / "partitions").glob("client-*.jsonl"))
    base = Path(scenario.base.name)
    with ExitStack() as stack:
        devices, certificates = [], {}
        for name, data in zip(names, rows, strict=True):
            found, certificates[name] = stack.enter_context(
                device(tmp_path / name, name, base, data)
            )
            devices.append(found)
        roster = Roster.of_certificates(certificates.values())
        path = tmp_path / "cohort.json"
        path.write_bytes(roster.to_bytes())
        for one in devices:
            one.config |= {"roster": str(path), "roster-digest": roster.digest}
        # The server names no folder and knows no seed of theirs: they are real devices to it.
        config = replace(run.config, data_folder="", rounds=1)
        result = _over(config, run.initial, devices)
        assert result.rounds[-1].used == tuple(names)
        assert result.adapter.digest != run.initial.digest

        # Asked for the same round again, they refuse: two sums of a round could be compared.
        again = _over(config, run.initial, devices)
        assert set(again.rounds[-1].refused.values()) == {"secure-sum"}
        assert again.adapter.digest == run.initial.digest

        # A server that asks for the update in the clear, or for its projection, gets neither.
        bare = replace(config, run="bare", pieces={}, recipe="fedit")
        assert set(_over(bare, run.initial, devices).rounds[-1].refused.values()) == {"secure-sum"}
        with pytest.raises(SecureSumError, match="in the clear"):
            insist_on_sum(devices[0].config, False)

        # A roster that is not the one that was pinned; no trainer process; no identity.
        other = replace(config, run="other")
        members = {**roster.members, "mallory": roster.members[names[0]]}
        path.write_bytes(Roster(members).to_bytes())
        refused = _over(other, run.initial, devices).rounds[-1].refused
        assert set(refused.values()) == {"secure-sum"}
        del devices[0].config["trainer-socket"]
        del devices[1].config["identity"]
        refused = _over(other, run.initial, devices).rounds[-1].refused
        assert refused[names[0]] == "trainer-unavailable"
        assert refused[names[1]] == "secure-sum"
    # What could not be summed was not trained either: only the round that was done is spent.
    spent = Ledger(tmp_path / names[1] / "ledger.sqlite").table()
    assert [(entry.run, entry.round) for entry in spent] == [(config.run, 1)]


def _over(config: RoundsConfig, initial: Adapter, devices: list[Device]) -> TrainingResult:
    with LocalGrid(client_app, len(devices), workers=devices) as grid:
        return run_training(grid, config, initial=initial)
