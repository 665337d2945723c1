"""The ledger: what adds up, who is refused, under concurrency and tampering."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from privacy.budget import Accountant, BudgetError, BudgetExceeded, PrivacyBudget
from privacy.calibration import epsilon, noise_multiplier
from privacy.events import SgdEvent
from privacy.ledger import Head, Ledger, LedgerEdited, LedgerError, Terms
from privacy.ledger_rows import GENESIS

DELTA = 1e-5
BUDGET = PrivacyBudget(8.0, DELTA)


def event(sigma: float = 1.0, steps: int = 5) -> SgdEvent:
    return SgdEvent(noise_multiplier=sigma, sample_rate=0.1, steps=steps, max_grad_norm=1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_spends_compose_over_rounds_runs_and_restarts(path: Path) -> None:
    events = [event(1.0), event(1.3), event(2.0, steps=9)]
    for number, (run, e) in enumerate(zip("aab", events, strict=True), start=1):
        ledger = Ledger(path)
        spent = ledger.spend("ann", run, number, e, BUDGET)
        assert spent.epsilon == epsilon(events[:number], DELTA)
        assert not spent.repeated
        ledger.close()
    ledger = Ledger(path, now=lambda: 12.5)
    assert ledger.spent("ann", DELTA) == epsilon(events, DELTA)
    assert ledger.spent("bob", DELTA) == 0.0
    assert [(e.run, e.round, e.event) for e in ledger.table("ann")] == [
        ("a", 1, events[0]),
        ("a", 2, events[1]),
        ("b", 3, events[2]),
    ]
    ledger.spend("bob", "b", 3, events[0], BUDGET)
    assert ledger.clients() == ("ann", "bob")
    assert ledger.table()[-1].unix_micro == 12_500_000


def test_a_repeated_round_costs_nothing_and_another_one_does(path: Path) -> None:
    ledger = Ledger(path)
    first = ledger.spend("ann", "r", 1, event(), BUDGET, inputs="x")
    again = ledger.spend("ann", "r", 1, event(), BUDGET, inputs="x")
    assert again.repeated
    assert again.epsilon == first.epsilon
    assert ledger.head().count == 1
    # Other inputs release other noise, so they cost again.
    other = ledger.spend("ann", "r", 1, event(), BUDGET, inputs="y")
    assert not other.repeated
    assert other.epsilon > first.epsilon
    with pytest.raises(LedgerError, match="another event"):
        ledger.spend("ann", "r", 1, event(sigma=3.0), BUDGET, inputs="x")


def test_the_budget_refuses_before_the_step_and_leaves_no_trace(path: Path) -> None:
    sigma = noise_multiplier(8.0, DELTA, 0.1, 15)
    ledger = Ledger(path)
    for number in (1, 2, 3):
        ledger.spend("ann", "r", number, event(sigma), BUDGET)
    head = ledger.head()
    with pytest.raises(BudgetExceeded, match=r"above the budget of 8\.0"):
        ledger.spend("ann", "r", 4, event(sigma), BUDGET)
    with pytest.raises(BudgetExceeded):
        ledger.spend("ann", "another-run", 1, event(sigma), BUDGET)
    assert ledger.head() == head
    # A round that was already paid for is still answered.
    assert ledger.spend("ann", "r", 3, event(sigma), BUDGET).repeated
    ledger.spend("bob", "r", 4, event(sigma), BUDGET)


def test_noise_of_zero_passes_no_budget_but_can_be_recorded(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(BudgetExceeded):
        ledger.spend("ann", "r", 1, event(sigma=0.0), BUDGET)
    with pytest.raises(BudgetError, match="delta"):
        ledger.spend("ann", "r", 1, event(sigma=0.0), None)
    ledger.spend("ann", "r", 1, event(sigma=0.0), None, delta=DELTA)
    assert ledger.spent("ann", DELTA) == float("inf")


def _fill(path: Path) -> Head:
    ledger = Ledger(path)
    for number in range(1, 6):
        ledger.spend(f"client-{number % 2}", "r", number, event(2.0), BUDGET)
    ledger.set_limit(Terms(delta=DELTA, epsilon=7.5), "client-0")
    head = ledger.head()
    ledger.close()
    return head


TAMPERING = {
    "an event made cheaper": """UPDATE events SET event = replace(event, '2.0', '9.0')
                                WHERE number = 2""",
    "an event given to another": "UPDATE events SET client = 'mallory' WHERE number = 3",
    "another time": "UPDATE events SET unix_micro = unix_micro + 1 WHERE number = 1",
    "a hash rewritten": "UPDATE events SET hash = previous WHERE number = 4",
    "an event removed": "DELETE FROM events WHERE number = 3",
    "the last event removed": "DELETE FROM events WHERE number = 5",
    "all events removed": "DELETE FROM events",
    "two events exchanged": """UPDATE events SET number = CASE number
                               WHEN 2 THEN 103 ELSE 102 END WHERE number IN (2, 3)""",
    "the head removed": "DELETE FROM head",
    "the head set back": "UPDATE head SET count = 4",
    "the fingerprint changed": "UPDATE events SET inputs = 'z' WHERE number = 5",
    "the budget raised": """UPDATE events SET event = replace(event, '8.0', '80.0')
                            WHERE number = 4""",
    "the limit raised": "UPDATE events SET event = replace(event, '7.5', '75.0') WHERE number = 6",
    "the limit removed": "DELETE FROM events WHERE number = 6",
    "the schema set back": "UPDATE head SET schema = 0",
}


@pytest.mark.parametrize("statement", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_found_when_the_ledger_is_opened(path: Path, statement: str) -> None:
    _fill(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute(statement).rowcount > 0
    with pytest.raises(LedgerError, match=r"edited or damaged|another version"):
        Ledger(path)


def test_an_index_that_hides_events_is_found(path: Path) -> None:
    _fill(path)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (client TEXT)")
    connection.execute("CREATE INDEX empty ON other (client)")
    pages = dict(connection.execute("SELECT name, rootpage FROM sqlite_master").fetchall())
    connection.execute("PRAGMA writable_schema = ON")
    for name, page in (("ix_events_client", "empty"), ("empty", "ix_events_client")):
        query = "UPDATE sqlite_master SET rootpage = ? WHERE name = ?"
        connection.execute(query, (pages[page], name))
    connection.commit()
    connection.close()
    with pytest.raises(LedgerEdited, match="index"):
        Ledger(path, read_only=True)


def test_tampering_is_found_by_a_ledger_that_is_already_open(path: Path) -> None:
    _fill(path)
    ledger = Ledger(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE events SET event = replace(event, '2.0', '9.0')")
    with pytest.raises(LedgerError, match="edited"):
        ledger.spend("client-1", "r", 9, event(2.0), BUDGET)


def test_an_older_copy_of_the_file_is_found_by_who_kept_the_head(path: Path) -> None:
    ledger = Ledger(path)
    ledger.spend("ann", "r", 1, event(2.0), BUDGET)
    ledger.close()
    old = path.read_bytes()
    head = _fill(path)
    assert Ledger(path).verify(since=head) == head
    for left in path.parent.glob("ledger.sqlite*"):
        left.unlink()
    path.write_bytes(old)
    reopened = Ledger(path)
    with pytest.raises(LedgerError, match="7 events were there before"):
        reopened.verify(since=head)
    for number in range(2, 8):
        reopened.spend("eve", "r", number, event(2.0), BUDGET)
    with pytest.raises(LedgerError, match="not the one that was there before"):
        reopened.verify(since=head)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "another file"])
def test_a_file_that_is_not_a_whole_ledger_is_refused(path: Path, damage: str) -> None:
    _fill(path)
    for left in path.parent.glob("ledger.sqlite-*"):
        left.unlink()
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 3],
            "overwritten": data[:4096] + os.urandom(len(data) - 4096),
            "another file": b"dear diary, " * 1000,
        }[damage]
    )
    with pytest.raises(LedgerError, match="backup"):
        Ledger(path).verify()


def test_only_a_file_can_be_a_ledger(tmp_path: Path) -> None:
    for url in ("postgresql://host/x", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(LedgerError, match="a file that outlives"):
            Ledger(url)
    Ledger(f"sqlite:///{tmp_path}/by-url.sqlite").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_processes_share_a_ledger_and_the_budget_holds_among_them(path: Path) -> None:
    sigma = noise_multiplier(8.0, DELTA, 0.1, 15)  # enough for three events of five steps
    Ledger(path).close()

    def work(worker: int) -> None:
        ledger = Ledger(path)
        for number in range(3):
            try:
                ledger.spend("shared", f"run-{worker}", number, event(sigma), BUDGET)
            except BudgetExceeded:
                continue
        for number in range(5):
            ledger.spend(f"own-{worker}", "r", number, event(4.0), BUDGET)

    children = [_fork(lambda w=worker: work(w)) for worker in range(4)]  # type: ignore[misc]
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
    ledger = Ledger(path)
    assert len(ledger.table("shared")) == 3
    assert ledger.spent("shared", DELTA) <= 8.0
    assert ledger.head().count == 3 + 4 * 5


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_the_terms_stand_with_every_event(path: Path) -> None:
    ledger = Ledger(path)
    ledger.spend("ann", "r", 1, event(), BUDGET, accountant="pld", model="m1")
    ledger.spend("ann", "s", 1, event(), None, delta=1e-6, model="m2")
    # The same round under other terms is the same round: its noise is out already.
    again = PrivacyBudget(20.0, 1e-6)
    assert ledger.spend("ann", "r", 1, event(), again, accountant="rdp").repeated
    assert [entry.terms for entry in ledger.table("ann")] == [
        Terms(delta=DELTA, epsilon=8.0, accountant=Accountant.PLD, model="m1"),
        Terms(delta=1e-6, epsilon=None, accountant=Accountant.RDP, model="m2"),
    ]
    # Two models trained on the same examples are one sum.
    assert ledger.spent("ann", DELTA) == epsilon([event()] * 2, DELTA)


def test_a_limit_refuses_whatever_budget_the_server_comes_with(path: Path) -> None:
    ledger = Ledger(path)
    ledger.set_limit(Terms(delta=DELTA, epsilon=4.0))
    ledger.set_limit(Terms(delta=DELTA, epsilon=9.0), "bob")
    generous = PrivacyBudget(1000.0, DELTA)
    strong = event(sigma=2.0)
    with pytest.raises(BudgetExceeded, match=r"above the limit in this ledger of 4\.0 at delta"):
        ledger.spend("ann", "r", 1, event(sigma=0.7), generous)
    ledger.spend("ann", "r", 1, strong, generous)
    with pytest.raises(BudgetExceeded, match="limit"):
        ledger.spend("ann", "another-run", 1, event(sigma=0.7), None, delta=DELTA)
    assert epsilon([event(sigma=0.7)], DELTA) > 4.0
    ledger.spend("bob", "r", 1, event(sigma=0.7), generous)  # has a limit of its own
    with pytest.raises(BudgetExceeded, match=r"limit in this ledger of 9\.0"):
        ledger.spend("bob", "r", 2, event(sigma=0.7, steps=50), generous)
    ledger.close()
    ledger = Ledger(path)  # a restart
    assert ledger.limit("ann") == Terms(delta=DELTA, epsilon=4.0)
    ledger.set_limit(None)
    assert ledger.limit("ann") is None
    ledger.spend("ann", "r", 2, event(sigma=0.7), generous)
    assert [(e.client, e.round) for e in ledger.table()] == [("ann", 1), ("bob", 1), ("ann", 2)]
    with pytest.raises(BudgetError, match="needs an epsilon"):
        ledger.set_limit(Terms(delta=DELTA))


def _write_schema_1(path: Path, events: list[SgdEvent]) -> None:
    """A ledger as AirPEFT wrote it before there were terms in it."""
    with sqlite3.connect(path) as connection:
        connection.execute(
            """CREATE TABLE events (number INTEGER NOT NULL PRIMARY KEY, client VARCHAR NOT NULL,
            run VARCHAR NOT NULL, round INTEGER NOT NULL, inputs VARCHAR NOT NULL,
            event TEXT NOT NULL, unix_micro INTEGER NOT NULL, previous VARCHAR NOT NULL,
            hash VARCHAR NOT NULL, UNIQUE (run, client, round, inputs))"""
        )
        connection.execute(
            """CREATE TABLE head (id INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
            schema INTEGER NOT NULL, count INTEGER NOT NULL, hash VARCHAR NOT NULL)"""
        )
        previous = GENESIS
        for number, one in enumerate(events, start=1):
            text = json.dumps(one.to_mapping(), sort_keys=True)
            row = [number, "ann", "old", number, "f", text, 1_000_000 * number, previous]
            previous = hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).hexdigest()
            connection.execute("INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?)", [*row, previous])
        connection.execute("INSERT INTO head VALUES (1, 1, ?, ?)", [len(events), previous])


def test_a_ledger_of_schema_1_is_read_verified_and_gone_on_with(path: Path) -> None:
    old = [event(2.0), event(3.0)]
    _write_schema_1(path, old)
    before = path.read_bytes()
    reading = Ledger(path, read_only=True)
    assert reading.spent("ann", DELTA) == epsilon(old, DELTA)
    assert [entry.terms for entry in reading.table()] == [None, None]
    reading.close()
    assert path.read_bytes() == before
    ledger = Ledger(path)
    head = ledger.head()
    assert ledger.spend("ann", "old", 2, event(3.0), BUDGET, inputs="f").repeated
    assert _schema(path) == 1  # nothing was written
    ledger.spend("ann", "new", 1, event(2.0), BUDGET)
    assert ledger.spent("ann", DELTA) == epsilon([*old, event(2.0)], DELTA)
    ledger.verify(since=head)
    assert _schema(path) == 2  # whoever knows schema 1 only now refuses it
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE events SET event = replace(event, '2.0', '9.0')")
    with pytest.raises(LedgerEdited, match="event 1 "):
        Ledger(path)


def _schema(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        (found,) = connection.execute("SELECT schema FROM head").fetchone()
    return int(found)
