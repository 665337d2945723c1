"""The server's account of client-level privacy: noise is only to be had for what it costs.

    account = CohortAccount(central, run="demo", ledger=ledger, key=device_key(path))
    account.check(number)                              # before anybody is asked: may we?
    reduction = recipe.begin(state, noise=account)
    ...
    reduction.finish()                                 # pays, then noises, then releases

The ledger is the same kind of file that clients have; here it says what was spent on every client
of the federation. :meth:`CohortAccount.pay` returns after the round's event is on the disk, so a
round that was released was counted. A round that is repeated after a crash with the same updates
gets the same noise, bit for bit, and costs nothing more; with other updates (somebody did not
answer this time, a checkpoint was put back) it gets fresh noise and is counted again, since the
first result may have been seen: of a sampled cohort at the price of all of its releases together,
since the same coins have drawn it. A tree whose round comes out otherwise than it did ends, and a
new one begins. Where the clients add the noise, every unmasking is counted, before it is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aggregation.clipped_sum import Normals
from privacy import calibration, tree_noise
from privacy.budget import BudgetError, BudgetExceeded
from privacy.central import CentralPrivacy
from privacy.events import CohortEvent
from privacy.ledger import Entry, Ledger
from privacy.randomness import Floats, Stream, derive

EVERY_CLIENT = "every-client"
SERVER = "ChaCha20 keyed by a secret of the server, from the operating system's entropy"


class CohortAccount:
    """What a run spends on every client; a :class:`aggregation.clipped_sum.Noise`.

    Args:
        central: the run's client-level privacy, its noise known.
        run: name of the run.
        ledger: the server's, open for writing.
        key: all the randomness there is, 32 bytes: a secret of the server
            (:func:`privacy.randomness.device_key`), or a simulation's seeded key.
        randomness: where the key comes from, for the statement.
    """

    def __init__(
        self,
        central: CentralPrivacy,
        *,
        run: str,
        ledger: Ledger,
        key: bytes,
        randomness: str = SERVER,
    ) -> None:
        self.central = central.calibrated()
        self.randomness = randomness
        self._run = run
        self._ledger = ledger
        self._key = derive(key, "client-level", run)

    @property
    def sampling_seed(self) -> int:
        """The seed of the cohorts' draws. Who can tell it can tell who takes part when."""
        return int.from_bytes(derive(self._key, "cohorts"), "big")

    def check(self, number: int) -> None:
        """Refuse a round that would overspend, before anybody is asked.

        Args:
            number: of the round.

        Raises:
            BudgetExceeded: nothing is recorded, and nobody may be asked.
        """
        budget, rows = self.central.budget(), self._rows()
        if budget is None or any(row.round == number for row in rows):
            return
        steps = 1 if self._tree(rows, number, "") is None else 0
        every = [entry.event for entry in self._ledger.table(EVERY_CLIENT)]
        accountant = self.central.accountant
        total = calibration.epsilon([*every, self.central.event(steps)], budget.delta, accountant)
        if total > budget.epsilon:
            spent = calibration.epsilon(every, budget.delta, accountant)
            raise BudgetExceeded(
                f"round {number} of run {self._run} would bring epsilon from {spent:.3f} to "
                f"{total:.3f} for every client, above the budget of {budget.epsilon} at delta="
                f"{budget.delta}; nobody was asked. Stop here, raise the budget, or use more noise"
            )

    def pay(self, number: int, inputs: str) -> Normals:
        """Record what a round costs, durably, and give its noise.

        Args:
            number: of the round, from 1.
            inputs: hex fingerprint of all that the noise is added to.

        Raises:
            BudgetExceeded: if the budget would be passed; nothing is recorded, and there is no
                noise to be had.
            LedgerError: if the ledger is damaged or stays locked.
        """
        rows = self._rows()
        tree = self._tree(rows, number, inputs)
        begun = self.central.mechanism == "tree" and tree is not None
        self._ledger.spend(
            EVERY_CLIENT,
            self._run,
            number,
            self._event(rows, number, inputs, 0 if begun and tree != (number, inputs) else 1),
            self.central.budget(),
            accountant=self.central.accountant,
            delta=self.central.delta,
            inputs=inputs,
        )
        if self.central.mechanism == "distributed":
            return _added_by_the_clients
        if self.central.mechanism == "gaussian":
            return _Streams(derive(self._key, "round", number, inputs))
        first, named = tree or (number, inputs)
        return _Tree(_Streams(derive(self._key, "tree", first, named)), number - first + 1)

    def _event(self, rows: Sequence[Entry], number: int, inputs: str, steps: int) -> CohortEvent:
        """What is recorded: of the k-th release of one drawn cohort that of all k together.

        The same coins have drawn it each time, so they hide a client once and not k times. A client
        that is in it moves all k releases, by sqrt(k) clips together, which is one sampled Gaussian
        of so much less noise. Those before are counted on top of that, which is more than enough.
        """
        event = self.central.event(steps)
        tried = [row.inputs for row in rows if row.round == number]
        before = tried.index(inputs) if inputs in tried else len(tried)
        if event.sample_rate == 1 or not before:
            return event
        noise = event.noise_multiplier / math.sqrt(before + 1)
        return replace(event, noise_multiplier=noise)

    def tree_start(self, number: int) -> int:
        """The first round of the tree that a round is going to be in."""
        tree = self._tree(self._rows(), number, "")
        return number if tree is None else tree[0]

    def events(self, number: int | None = None) -> list[CohortEvent]:
        """What this run has spent so far, or in one round; mostly one event for each round."""
        rows = self._rows()
        return [_event(row) for row in rows if number is None or row.round == number]

    def _rows(self) -> list[Entry]:
        return [entry for entry in self._ledger.table(EVERY_CLIENT) if entry.run == self._run]

    def _tree(self, rows: Sequence[Entry], number: int, inputs: str) -> tuple[int, str] | None:
        """The first round of the tree that a round belongs to, and its inputs; None for a new one.

        Only a round that comes next in a tree that has room, or that is there already with the
        same inputs, belongs to one.
        """
        tree: tuple[int, str] | None = None
        for row in rows:
            if row.event.steps:
                tree = (row.round, row.inputs)
            if (row.round, row.inputs) == (number, inputs):
                return tree
        if self.central.mechanism != "tree" or tree is None or rows[-1].round != number - 1:
            return None
        return tree if number - tree[0] < self.central.tree_rounds else None


@dataclass(frozen=True)
class _Streams:
    """Noise by name, each from a keystream of its own."""

    key: bytes

    def __call__(self, name: str, count: int) -> Floats:
        return Stream(derive(self.key, name)).normal(count)


@dataclass(frozen=True)
class _Tree:
    """What a round of a tree releases, whatever its name."""

    nodes: _Streams
    number: int

    def __call__(self, name: str, count: int) -> Floats:
        return tree_noise.increment(self.number, self.nodes, count)


def _added_by_the_clients(name: str, count: int) -> Floats:
    """No noise is to be had here: it is in the sum already."""
    raise BudgetError("the clients have added the noise of this sum; the server adds none")


def _event(row: Entry) -> CohortEvent:
    assert isinstance(row.event, CohortEvent)  # noqa: S101 - nothing else is spent on this name
    return row.event
