"""Kills at every write of a ledger, of a client's and of the server's: counted once, or not at all.

Twice over. A process is killed with SIGKILL at the first, the second, ... thing that it does with
the database, from the making of the file on, until it comes through. And what SQLite itself writes
between two of these is cut off at every place: the log at and between its frames, the copying of
the log into the file after each page. The tests count the places themselves.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sql

from privacy.budget import BudgetExceeded, PrivacyBudget
from privacy.calibration import epsilon, noise_multiplier
from privacy.central import CentralPrivacy
from privacy.cohort_account import EVERY_CLIENT, CohortAccount
from privacy.events import SgdEvent
from privacy.ledger import Head, Ledger, Terms
from privacy.randomness import seeded_key

DELTA = 1e-5
ROUNDS = 3  # that the budget pays for
NEVER = 1 << 30
WAL_HEADER, FRAME_HEADER = 32, 24  # https://www.sqlite.org/fileformat.html, section 4
Act = Callable[[Ledger, int], None]


def client(ledger: Ledger, number: int) -> None:
    """What a client does before a round's first gradient."""
    sigma = noise_multiplier(8.0, DELTA, 0.1, 5 * ROUNDS)
    event = SgdEvent(noise_multiplier=sigma, sample_rate=0.1, steps=5, max_grad_norm=1.0)
    ledger.spend("ann", "r", number, event, PrivacyBudget(8.0, DELTA), inputs="aa")


def server(ledger: Ledger, number: int) -> None:
    """What a server does before a round's noise is there to be added."""
    central = CentralPrivacy(
        rounds=ROUNDS, clients=100, fraction=0.1, sampling="poisson", delta=DELTA, epsilon=8.0
    )
    account = CohortAccount(central, run="r", ledger=ledger, key=seeded_key(1))
    account.check(number)
    account.pay(number, "aa")


def owner(ledger: Ledger, number: int) -> None:
    """What the owner of a ledger does."""
    ledger.set_limit(Terms(delta=DELTA, epsilon=float(number)), "ann")


def recovered(ledger: Ledger, act: Act, name: str, before: Head) -> int:
    """Go on as after a restart, which repeats the round; gives how many events the crash left."""
    ledger.verify(since=before)
    left = ledger.head().count - before.count
    for _ in range(2):
        act(ledger, before.count + 1)
        assert [e.round for e in ledger.table(name)] == list(range(1, before.count + 2))
    return left


def spend_the_rest(ledger: Ledger, act: Act, name: str) -> None:
    """The rounds that the budget pays for are still to be had, all of them, and not one more."""
    for number in range(ledger.head().count + 1, ROUNDS + 1):
        act(ledger, number)
    assert 7.5 < ledger.spent(name, DELTA) <= 8.0
    assert ledger.spent(name, DELTA) == epsilon([e.event for e in ledger.table(name)], DELTA)
    head = ledger.head()
    with pytest.raises(BudgetExceeded):
        act(ledger, ROUNDS + 1)
    assert ledger.head() == head


class Death:
    """Kills this process at the n-th thing that it does with a database, before or after it."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        for name in ("before_cursor_execute", "after_cursor_execute", "begin", "commit"):
            sql.event.listen(sql.Engine, name, self.here)

    def here(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(path: Path, act: Act, number: int, at: int) -> bool:
    """Whether a process that opens the ledger and acts is killed by the n-th thing it does."""
    child = os.fork()
    if child == 0:
        try:
            death = Death(at)
            act(Ledger(path), number)
            death.here()  # after the commit: the first gradient would be computed now
        finally:
            os._exit(1 if death.seen >= at else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def crashes(folder: Path, act: Act, *, done: int) -> Iterator[tuple[Ledger, Head]]:
    """The ledger as a restart finds it after each kill, and its head before the process began."""
    first = Ledger(folder / "first.sqlite")
    for number in range(1, done + 1):
        act(first, number)
    before = first.head()
    first.close()
    for at in range(1, 200):
        path = folder / f"{at}.sqlite"
        if done:
            shutil.copy(first.path, path)
        if not _killed(path, act, done + 1, at):
            return
        after = Ledger(path)
        yield after, before
        after.close()


@pytest.mark.parametrize(
    ("act", "name", "done"),
    [
        (client, "ann", 0),  # the first write of all makes the file
        (client, "ann", 1),
        (server, EVERY_CLIENT, 1),
    ],
)
def test_a_kill_at_every_write_counts_the_event_never_twice_and_never_less(
    tmp_path: Path, act: Act, name: str, done: int
) -> None:
    outcomes: list[int] = []
    for after, before in crashes(tmp_path, act, done=done):
        left = recovered(after, act, name, before)
        if left not in outcomes:
            spend_the_rest(after, act, name)
        outcomes.append(left)
    # Every place was reached; before the commit nothing is spent, after it everything is.
    assert len(outcomes) >= 15 - 2 * done
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (0, 1)


def test_a_kill_while_a_limit_is_set_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for after, before in crashes(tmp_path, owner, done=1):
        limit, more = after.limit("ann"), after.verify(since=before).count - before.count
        assert limit is not None
        assert limit.epsilon == 1.0 + more
        found.append(more)
    assert (len(found) >= 5, found[0], found[-1]) == (True, 0, 1)


@dataclass(frozen=True)
class Disk:
    """What is on the disk: the file, and the log beside it."""

    file: bytes
    log: bytes

    def write(self, path: Path) -> Path:
        path.write_bytes(self.file)
        path.with_name(path.name + "-wal").write_bytes(self.log)
        return path


def _images(folder: Path, act: Act) -> tuple[Head, list[Disk], list[Disk]]:
    """The head before round 2, and all that a disk can hold on the way through it.

    Returns:
        (head, while the log is written, while it is copied into the file)
    """
    path = folder / "whole.sqlite"
    ledger = Ledger(path)
    act(ledger, 1)
    before = ledger.head()
    ledger.close()  # the last one to close copies the log
    start = path.read_bytes()
    assert not _killed(path, act, 2, at=NEVER)  # it ends without closing: the log is as committed
    log = path.with_name(path.name + "-wal").read_bytes()
    page = int.from_bytes(start[16:18], "big")
    frames = range(WAL_HEADER, len(log), FRAME_HEADER + page)
    assert len(log) == frames[-1] + FRAME_HEADER + page
    cuts = [0, WAL_HEADER // 2]
    for frame in frames:
        cuts += [frame, frame + FRAME_HEADER + page // 2]
    writing = [Disk(start, log[:cut]) for cut in (*cuts, len(log))]
    Ledger(path).close()
    end = path.read_bytes()
    pages = [n for n in range(0, len(end), page) if end[n : n + page] != start[n : n + page]]
    copying = [Disk(end[: n + page] + start[n + page :], log) for n in pages]
    return before, writing, copying


@pytest.mark.parametrize(("act", "name"), [(client, "ann"), (server, EVERY_CLIENT)])
def test_a_log_that_ends_anywhere_is_the_ledger_before_or_after(
    tmp_path: Path, act: Act, name: str
) -> None:
    before, writing, copying = _images(tmp_path, act)
    outcomes = []
    for number, disk in enumerate([*writing, *copying]):
        ledger = Ledger(disk.write(tmp_path / f"image-{number}.sqlite"))
        outcomes.append(recovered(ledger, act, name, before))
        ledger.close()
    # Whole to the last byte, the log has the event; shorter by anything, it does not.
    assert outcomes == [0] * (len(writing) - 1) + [1] * (1 + len(copying))
    assert len(writing) > 10
    assert copying
