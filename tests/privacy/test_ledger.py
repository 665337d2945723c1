"""The ledger under concurrency, tampering, and kills at every one of its writes."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sql

from privacy.budget import BudgetError, BudgetExceeded, PrivacyBudget
from privacy.calibration import epsilon, noise_multiplier
from privacy.events import SgdEvent
from privacy.ledger import Head, Ledger, LedgerError

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
}


@pytest.mark.parametrize("statement", TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_found_when_the_ledger_is_opened(path: Path, statement: str) -> None:
    _fill(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute(statement).rowcount > 0
    with pytest.raises(LedgerError, match="edited or damaged"):
        Ledger(path)


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
    with pytest.raises(LedgerError, match="6 events were there before"):
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


class _Death:
    """Kills this process at the n-th thing that an engine does, before or after it."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def here(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, engine: sql.Engine) -> None:
        for name in ("before_cursor_execute", "after_cursor_execute", "begin", "commit"):
            sql.event.listen(engine, name, self.here)


def _spend_and_die(path: Path, at: int) -> None:
    ledger = Ledger(path)
    death = _Death(at)
    death.watch(ledger.engine)
    ledger.spend("ann", "r", 2, event(2.0), BUDGET)
    death.here()  # after the commit: the first gradient would be computed now
    os._exit(0 if death.seen < at else 1)


def test_a_kill_at_every_write_counts_the_event_never_twice_and_never_less(tmp_path: Path) -> None:
    outcomes = []
    for at in range(1, 100):
        path = tmp_path / f"{at}.sqlite"
        ledger = Ledger(path)
        ledger.spend("ann", "r", 1, event(2.0), BUDGET)
        before = ledger.head()
        ledger.close()
        child = _fork(lambda p=path, n=at: _spend_and_die(p, n))  # type: ignore[misc]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        after = Ledger(path)
        after.verify(since=before)
        outcomes.append(after.head().count - before.count)
        assert outcomes[-1] in (0, 1)
        # The next start repeats the round: the event stands exactly once in the end.
        spent = after.spend("ann", "r", 2, event(2.0), BUDGET)
        assert spent.repeated == bool(outcomes[-1])
        assert [e.round for e in after.table("ann")] == [1, 2]
        assert spent.epsilon == epsilon([event(2.0)] * 2, DELTA)
        after.close()
    # Every point was reached; before the commit nothing is spent, after it everything is.
    assert len(outcomes) >= 10
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == 0
    assert outcomes[-1] == 1
