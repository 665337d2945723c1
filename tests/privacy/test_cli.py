"""``airpeft privacy`` as its user runs it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import airpeft
from privacy.budget import Accountant, BudgetExceeded, LocalPrivacy, PrivacyBudget
from privacy.calibration import epsilon, noise_multiplier
from privacy.central import CentralPrivacy
from privacy.events import SgdEvent
from privacy.ledger import Ledger
from privacy.planning import rounds_left
from privacy.randomness import SEEDED
from privacy.statement import statement
from privacy.wording import at_most

DELTA = 1e-5
EVENT = SgdEvent(noise_multiplier=1.0, sample_rate=0.1, steps=5, max_grad_norm=1.0)
SHAPE = ["--sample-rate", "0.1", "--steps", "50", "--delta", "1e-5"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(airpeft.app, ["privacy", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def data_of(kind: str, *arguments: str) -> dict[str, Any]:
    code, output, errors = invoke(*arguments, "--format", "json")
    assert (code, errors) == (0, "")
    document = json.loads(output)
    assert document["schema"] == f"airpeft.v1.privacy-{kind}"
    found: dict[str, Any] = document["data"]
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger: ann in two runs, bob in one, eve without noise."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for client, run, number, sigma in (
        ("ann", "a", 1, 1.0),
        ("ann", "a", 2, 1.0),
        ("ann", "b", 1, 2.0),
        ("bob", "b", 1, 2.0),
        ("eve", "b", 1, 0.0),
    ):
        event = SgdEvent(noise_multiplier=sigma, sample_rate=0.1, steps=5, max_grad_norm=1.0)
        ledger.spend(client, run, number, event, None, delta=DELTA)
    ledger.close()
    return ledger.path


@pytest.mark.parametrize("by", list(Accountant))
def test_plan_answers_either_way(by: Accountant) -> None:
    event = SgdEvent(noise_multiplier=1.1, sample_rate=0.1, steps=50, max_grad_norm=1.0)
    forward = data_of("plan", "plan", "--noise-multiplier", "1.1", *SHAPE, "--accountant", by)
    assert forward["epsilon"] == epsilon([event], DELTA, by)
    back = data_of("plan", "plan", "--epsilon", "3", *SHAPE, "--accountant", by)
    assert back["noise_multiplier"] == noise_multiplier(3.0, DELTA, 0.1, 50, by)
    assert 2.98 < back["epsilon"] <= 3.0
    beside = forward["epsilon_by_accountant"]
    assert beside == {a.value: epsilon([event], DELTA, a) for a in Accountant}
    assert beside["pld"] < beside["rdp"] < 1.3 * beside["pld"]
    assert (back["accountant"], back["steps"], back["delta"]) == (by, 50, DELTA)


def test_plan_counts_the_steps_of_all_rounds_and_shows_each() -> None:
    data = data_of("plan", "plan", "--epsilon", "3", *SHAPE, "--rounds", "4")
    assert data["noise_multiplier"] == noise_multiplier(3.0, DELTA, 0.1, 200)
    by_round = [line["epsilon"] for line in data["epsilon_by_round"]]
    assert [line["steps"] for line in data["epsilon_by_round"]] == [50, 100, 150, 200]
    assert by_round == sorted(by_round)
    assert by_round[-1] == data["epsilon"] <= 3.0
    _, output, _ = invoke("plan", "--epsilon", "3", *SHAPE, "--rounds", "4")
    assert f"{by_round[1]:.4f}" in output
    assert "200 (4 rounds of 50)" in output
    many = data_of("plan", "plan", "--noise-multiplier", "2", *SHAPE, "--rounds", "1000")
    assert len(many["epsilon_by_round"]) == 20
    assert many["epsilon_by_round"][-1]["round"] == 1000


def test_plan_with_noise_and_epsilon_says_how_many_rounds_are_paid_for() -> None:
    arguments = ["plan", "--noise-multiplier", "1.1", "--epsilon", "8", *SHAPE]
    rounds = data_of("plan", *arguments)["rounds_within_budget"]

    def after(count: int) -> float:
        event = SgdEvent(noise_multiplier=1.1, sample_rate=0.1, steps=50 * count, max_grad_norm=1.0)
        return epsilon([event], DELTA)

    assert after(rounds) <= 8 < after(rounds + 1)
    code, output, _ = invoke(*arguments, "--rounds", "50")
    assert code == 0
    assert f"pays for {rounds} rounds" in output
    assert "this plan has 50" in output


def test_an_accountant_that_cannot_count_so_much_is_left_out() -> None:
    data = data_of("plan", "plan", "--noise-multiplier", "0.001", *SHAPE)
    assert data["epsilon_by_accountant"] == {"rdp": data["epsilon"], "pld": None}


def test_plan_without_noise_has_no_bound() -> None:
    assert data_of("plan", "plan", "--noise-multiplier", "0", *SHAPE)["epsilon"] is None
    assert "nothing is private" in invoke("plan", "--noise-multiplier", "0", *SHAPE)[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--delta", "0"], "--delta 0 must be above 0"),
        (["--delta", "nan"], "--delta nan must be above 0"),
        (["--delta", "1"], "below 1"),
        (["--delta", "1e-3", "--examples", "1000"], "1/n = 0.001 for --examples 1000"),
        (["--examples", "0"], "--examples 0 must be at least 1"),
        (["--epsilon", "0"], "--epsilon 0 must be above 0"),
        (["--epsilon", "-1"], "--epsilon -1 must be above 0"),
        (["--epsilon", "inf"], "--epsilon inf must be above 0"),
        (["--epsilon", "3", "--noise-multiplier", "0"], "leave --noise-multiplier out"),
        (["--noise-multiplier", "-1"], "--noise-multiplier -1 must be at least 0"),
        (["--sample-rate", "0"], "--sample-rate 0 must be above 0"),
        (["--sample-rate", "1.5"], "a batch cannot be larger than the data"),
        (["--steps", "0"], "--steps 0 must be"),
        (["--steps", "1000000000"], "use fewer"),
        (["--rounds", "0"], "--rounds 0 must be"),
        (["--accountant", "gdp"], "'rdp', 'pld'"),
        (["--noise-multiplier", "0.001", "--accountant", "pld"], "use --accountant rdp"),
        (["--epsilon", "500", "--accountant", "pld"], "use --accountant rdp"),
        (["--delta", "1e-300", "--accountant", "pld"], "a delta of at least 1e-11"),
        (["--steps", "2000000", "--accountant", "pld"], "up to 1,000,000 steps"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_with_the_remedy(
    more: list[str], message: str
) -> None:
    noise = [] if "--noise-multiplier" in more else ["--noise-multiplier", "1"]
    code, output, errors = invoke("plan", *SHAPE, *noise, *more)
    assert (code, output) == (2, "")
    assert message in errors


def test_a_plan_needs_noise_or_epsilon_and_one_that_can_be_met() -> None:
    code, _, errors = invoke("plan", *SHAPE)
    assert code == 2
    assert "give --noise-multiplier to learn epsilon" in errors
    code, _, errors = invoke("plan", *SHAPE, "--epsilon", "1e-9")
    assert code == 2
    assert "use fewer steps" in errors


def adapter(folder: Path, document: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "privacy.json").write_text(json.dumps(document))
    return folder


def test_explain_says_what_the_statement_says(tmp_path: Path) -> None:
    privacy = LocalPrivacy(epsilon=8.0, delta=DELTA)
    document = statement({"ann": [EVENT]}, privacy, randomness=SEEDED)
    folder = adapter(tmp_path / "run" / "adapter", document)
    code, output, _ = invoke("explain", str(folder))
    assert code == 0
    assert output.startswith(
        f"One example: epsilon {at_most(epsilon([EVENT], DELTA))} at delta 1e-05."
    )
    assert "Not covered:" in output
    data = data_of("statement", "explain", str(folder / "privacy.json"))
    assert data["statement"] == document
    assert data["sentences"] == output.splitlines()
    code, _, errors = invoke("explain", str(tmp_path / "run"))
    assert code == 2
    assert f"give {folder}" in errors


def test_explain_of_an_epsilon_that_promises_nothing_says_so(tmp_path: Path) -> None:
    weak = SgdEvent(noise_multiplier=0.01, sample_rate=0.1, steps=5, max_grad_norm=1.0)
    document = statement(
        {"ann": [weak]}, LocalPrivacy(noise_multiplier=0.01, delta=DELTA), randomness=SEEDED
    )
    code, output, _ = invoke("explain", str(adapter(tmp_path / "a", document)))
    assert code == 0
    assert "as good as no limit" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no privacy statement"),
        ("{", "not a privacy statement"),
        ("[" * 100_000, "not a privacy statement"),
        ("[]", "no JSON object"),
        ("{}", "not a privacy statement of schema 1"),
        ('{"schema": 1, "client": null, "example": {"epsilon": 1}}', "lacks a field"),
        ('{"schema": 1, "client": null, "example": 3}', "lacks a field"),
        ("\xff", "not a privacy statement"),
        (" " * 2_000_000, "above 1048576 bytes"),
    ],
)
def test_explain_refuses_what_is_no_statement(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "privacy.json").write_bytes(content.encode("latin-1"))
    code, output, errors = invoke("explain", str(tmp_path))
    assert (code, output) == (2, "")
    assert message in errors
    assert str(tmp_path / "privacy.json") in errors


def test_ledger_adds_up_what_each_client_has_spent(path: Path) -> None:
    strong = SgdEvent(noise_multiplier=2.0, sample_rate=0.1, steps=5, max_grad_norm=1.0)
    before = path.read_bytes()
    data = data_of("ledger", "ledger", str(path), "--epsilon", "8")
    assert data["verified"] is True
    assert data["events"] == 5
    ann, bob, eve = data["clients"]
    spent = epsilon([EVENT, EVENT, strong], DELTA)
    assert (ann["client"], ann["runs"], ann["rounds"], ann["events"]) == ("ann", 2, 3, 3)
    assert (ann["epsilon"], ann["budget_left"]) == (spent, 8 - spent)
    assert (bob["runs"], bob["epsilon"]) == (1, epsilon([strong], DELTA))
    assert (eve["epsilon"], eve["budget_left"], eve["rounds_left"]) == (None, 0, 0)
    left = ann["rounds_left"]
    assert epsilon([EVENT, EVENT, *[strong] * (1 + left)], DELTA) <= 8
    assert epsilon([EVENT, EVENT, *[strong] * (2 + left)], DELTA) > 8
    code, output, _ = invoke("ledger", str(path), "--epsilon", "8")
    assert code == 0
    assert "the chain of hashes holds: 5 events" in output
    assert [line.split()[0] for line in output.splitlines()[3:6]] == ["ann", "bob", "eve"]
    assert f"Rounds left: 0 to {data['clients'][1]['rounds_left']}, each with" in output
    assert f" {left}\n" in output
    assert path.read_bytes() == before


def test_ledger_of_one_client_at_another_delta_and_accountant(path: Path) -> None:
    arguments = ("--client", "bob", "--delta", "1e-7", "--accountant", "pld")
    data = data_of("ledger", "ledger", str(path), *arguments)
    strong = SgdEvent(noise_multiplier=2.0, sample_rate=0.1, steps=5, max_grad_norm=1.0)
    (bob,) = data["clients"]
    assert bob["epsilon"] == epsilon([strong], 1e-7, Accountant.PLD)
    assert (bob["budget_left"], data["events"]) == (None, 5)
    code, _, errors = invoke("ledger", str(path), "--client", "mallory")
    assert code == 2
    assert "in it: ann, bob, eve" in errors


def test_ledger_needs_not_be_told_what_stands_in_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    budget, accountant = PrivacyBudget(8.0, 1e-6), Accountant.PLD
    for number, model in ((1, "m1"), (2, "m2")):
        ledger.spend("ann", "a", number, EVENT, budget, accountant=accountant, model=model)
    ledger.close()
    path = str(ledger.path)
    data = data_of("ledger", "ledger", path)
    assert (data["delta"], data["budget"], data["accountant"]) == (1e-6, 8.0, "pld")
    (ann,) = data["clients"]
    assert ann["epsilon"] == epsilon([EVENT] * 2, 1e-6, accountant)
    assert (ann["models"], ann["budget"], ann["limit"]) == (2, 8.0, None)
    left = ann["rounds_left"]
    assert epsilon([EVENT] * (2 + left), 1e-6, accountant) <= 8.0
    assert epsilon([EVENT] * (3 + left), 1e-6, accountant) > 8.0
    _, output, _ = invoke("ledger", path)
    assert f"Rounds left: {left}, each with the noise" in output
    assert "Epsilon is at delta 1e-06 by pld, over all runs and models" in output
    # Whoever asks may give other terms; what rdp, the looser bound, leaves is no more.
    (other,) = data_of("ledger", "ledger", path, "--accountant", "rdp")["clients"]
    assert other["accountant"] == "rdp"
    assert other["rounds_left"] <= left


def test_clients_of_different_terms_are_told_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.spend("ann", "a", 1, EVENT, PrivacyBudget(8.0, 1e-6), accountant="pld")
    ledger.spend("bob", "b", 1, EVENT, None, delta=1e-5)
    ledger.close()
    data = data_of("ledger", "ledger", str(ledger.path))
    assert (data["delta"], data["accountant"], data["budget"]) == (None, None, None)
    assert [c["delta"] for c in data["clients"]] == [1e-6, 1e-5]
    _, output, _ = invoke("ledger", str(ledger.path))
    lines = output.splitlines()
    assert lines[2].split()[5:7] == ["delta", "by"]
    assert lines[3].split()[5:8] == ["1e-06", "pld", "8"]
    assert lines[4].split()[5:8] == ["1e-05", "rdp", "-"]


def test_a_ledger_of_many_clients_still_fits_on_a_screen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    names = [f"client-{i:05d}" for i in range(40)]
    for i, name in enumerate(names):
        one = SgdEvent(noise_multiplier=1.0, sample_rate=0.1, steps=1 + i, max_grad_norm=1.0)
        ledger.spend(name, "a", 1, one, PrivacyBudget(8.0, DELTA))
    ledger.close()
    assert len(data_of("ledger", "ledger", str(ledger.path))["clients"]) == 40
    _, output, _ = invoke("ledger", str(ledger.path))
    assert len(output.splitlines()) < 45
    assert [line.split()[0] for line in output.splitlines()[3:33]] == names[:9:-1]
    assert "These 30 of 40 clients have spent most" in output


def test_a_limit_is_set_shown_and_lifted(path: Path) -> None:
    code, output, _ = invoke("limit", str(path), "--epsilon", "5", "--client", "bob")
    assert (code, output) == (0, f"{path}: bob spends at most epsilon 5 at delta 1e-05\n")
    bob = data_of("ledger", "ledger", str(path), "--client", "bob", "--epsilon", "20")["clients"][0]
    strong = SgdEvent(noise_multiplier=2.0, sample_rate=0.1, steps=5, max_grad_norm=1.0)
    assert bob["limit"] == 5.0
    assert bob["rounds_left"] == rounds_left([strong], strong, 5.0, DELTA)
    assert "limit" in invoke("ledger", str(path), "--client", "bob")[1]
    ledger = Ledger(path)
    with pytest.raises(BudgetExceeded, match="limit in this ledger"):
        ledger.spend("bob", "c", 1, replace(EVENT, steps=500), PrivacyBudget(500.0, DELTA))
    ledger.close()
    assert invoke("limit", str(path), "--lift", "--client", "bob")[0] == 0
    assert data_of("ledger", "ledger", str(path), "--client", "bob")["clients"][0]["limit"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either --epsilon"),
        (["--epsilon", "1", "--lift"], "give either --epsilon"),
        (["--epsilon", "0"], "--epsilon 0 must be above 0"),
        (["--epsilon", "1", "--delta", "1"], "--delta 1 must be above 0 and below 1"),
    ],
)
def test_a_limit_that_makes_no_sense_changes_nothing(
    path: Path, more: list[str], message: str
) -> None:
    before = Ledger(path).head()
    code, output, errors = invoke("limit", str(path), *more)
    assert (code, output) == (2, "")
    assert message in errors
    assert Ledger(path).head() == before


def test_ledger_can_be_read_while_another_process_trains(path: Path) -> None:
    writer = Ledger(path)
    with writer._transaction():
        assert invoke("ledger", str(path))[0] == 0
    writer.close()


def test_an_empty_ledger_is_no_error(tmp_path: Path) -> None:
    Ledger(tmp_path / "new.sqlite").close()
    code, output, _ = invoke("ledger", str(tmp_path / "new.sqlite"))
    assert code == 0
    assert "Nobody has spent anything yet" in output


@pytest.mark.parametrize(
    "edit",
    [
        "update events set event = replace(event, '1.0', '9.0') where number = 2",
        "delete from events where number = 5",
        "delete from head",
        "update events set client = 'bob' where number = 1",
    ],
)
def test_an_edited_ledger_is_status_1(path: Path, edit: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(edit)
    connection.close()
    code, output, errors = invoke("ledger", str(path), "--format", "json")
    assert (code, output) == (1, "")
    assert f"{path}: the ledger was edited or damaged" in errors
    assert "backup" in errors


def test_a_truncated_ledger_is_status_1(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8192])
    code, _, errors = invoke("ledger", str(path))
    assert code == 1
    assert "Restore the file from a backup" in errors


def test_what_is_no_ledger_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "empty.sqlite").write_bytes(b"")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("create table pets (name)")
    other.close()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for name, message in (
        ("none.sqlite", "there is no ledger"),
        ("folder/none.sqlite", "there is no ledger"),
        ("diary.txt", "not a ledger"),
        ("empty.sqlite", "not a ledger"),
        ("other.sqlite", "no table 'events'"),
        (".", "name the ledger's file"),
    ):
        code, output, errors = invoke("ledger", str(tmp_path / name))
        assert (code, output) == (2, "")
        assert message in errors
        assert "ledger.sqlite" in errors
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "message"), [(["--delta", "0"], "--delta 0"), (["--epsilon", "-2"], "--epsilon -2")]
)
def test_ledger_refuses_numbers_that_make_no_sense(
    path: Path, more: list[str], message: str
) -> None:
    code, _, errors = invoke("ledger", str(path), *more)
    assert code == 2
    assert message in errors


def test_rounds_left_of_a_budget_that_is_spent_and_of_one_that_never_ends() -> None:
    assert rounds_left([EVENT] * 50, EVENT, 1.0, DELTA) == 0
    faint = SgdEvent(noise_multiplier=1e6, sample_rate=0.01, steps=1, max_grad_norm=1.0)
    assert rounds_left([], faint, 8.0, DELTA) == 100_000


@pytest.mark.parametrize("command", ["plan", "explain", "ledger"])
def test_help_has_examples(command: str) -> None:
    code, output, _ = invoke(command, "--help")
    assert code == 0
    assert "For example:" in output
    assert f"airpeft privacy {command}" in output


def test_a_real_process(path: Path) -> None:
    arguments = [sys.executable, "-m", "airpeft", "privacy"]
    done = subprocess.run(
        [*arguments, "plan", "--noise-multiplier", "1.1", *SHAPE, "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    event = SgdEvent(noise_multiplier=1.1, sample_rate=0.1, steps=50, max_grad_norm=1.0)
    assert json.loads(done.stdout)["data"]["epsilon"] == pytest.approx(epsilon([event], DELTA))
    refused = subprocess.run(
        [*arguments, "ledger", str(path.parent)], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1


def test_plan_and_ledger_of_whole_clients(tmp_path: Path) -> None:
    central = CentralPrivacy(
        delta=1e-5,
        noise_multiplier=1.0,
        rounds=20,
        clients=100,
        fraction=0.1,
        sampling="poisson",
    )
    shape = ["--unit", "client", "--sample-rate", "0.1", "--rounds", "20", "--delta", "1e-5"]
    found = data_of("plan", "plan", "--noise-multiplier", "1", *shape)
    assert (found["unit"], found["epsilon"]) == ("client", central.epsilon_after(20))
    code, shown, _ = invoke("plan", "--epsilon", "4", *shape)
    assert code == 0
    assert "of the clients" in shown
    assert "for one client added or removed" in shown
    code, _, errors = invoke("plan", "--epsilon", "4", *shape[2:])
    assert (code, "--steps is missing" in errors) == (2, True)
    ledger = Ledger(tmp_path / "server.sqlite")
    ledger.spend("every-client", "a", 1, central.event(), None, delta=DELTA)
    ledger.close()
    code, shown, _ = invoke("ledger", str(ledger.path))
    assert code == 0
    assert "for one client added or removed" in shown
    assert data_of("ledger", "ledger", str(ledger.path))["unit"] == "client"


def test_a_plan_of_noise_in_shares_says_who_adds_how_much() -> None:
    shape = ["--unit", "client", "--sample-rate", "1", "--rounds", "3", "--delta", "1e-3"]
    shared = [*shape, "--mechanism", "distributed"]
    found = data_of("plan", "plan", *shared, "--clients", "50", "--epsilon", "8")
    assert found["epsilon"] <= 8.0 < found["epsilon"] + 0.01
    shares, noise = found["shares"], found["noise_multiplier"]
    assert (shares["least_in_a_sum"], shares["counted_on"]) == (35, 30)
    assert shares["noise_of_one"] == pytest.approx(noise / 30**0.5)
    assert shares["noise_of_all"] == pytest.approx(noise * (50 / 30) ** 0.5)
    plain = data_of("plan", "plan", *shape, "--noise-multiplier", str(noise))
    assert found["epsilon"] == pytest.approx(plain["epsilon"], rel=1e-9)
    assert found["epsilon_by_accountant"].keys() == {"rdp"}
    told = invoke("plan", *shared, "--clients", "12", "--noise-multiplier", "0.9")[1]
    assert "each client adds  0.3674" in told
    assert "6 of 12 clients" in told
    assert "zeros in their place" in told
    for more, said in (
        ([], "go together"),
        (["--clients", "2"], "so few"),
        (["--clients", "9", "--dropouts", "0.5"], "--dropouts 0.5"),
        (["--clients", "9", "--accountant", "pld"], "--accountant rdp"),
        (["--clients", "9", "--sample-rate", "0.5"], "--sample-rate 1"),
    ):
        code, _, errors = invoke("plan", *shared, "--epsilon", "8", *more)
        assert code == 2
        assert said in errors
    assert "go together" in invoke("plan", *shape, "--epsilon", "8", "--clients", "0")[2]
