"""The secure sum of a round: five steps with the clients that have trained, over any grid.

The clients have said that they are ready and kept what they trained (``train`` with a ring); the
protocol is that of :mod:`privacy.secure_sum`, and whoever is missing in a step has dropped out of
it. A sketched mean takes two sums, of the same clients: if one of them is missing in the second,
the round is given up, since there is no part of the first sum that could be taken away.

Whatever goes wrong, the sum is given up and not put together from less: the round then leaves the
adapter as it was, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from aggregation.errors import AggregationError
from aggregation.recipe import Recipe
from aggregation.ring import Numbers
from aggregation.secret import Layout, unflat
from aggregation.secret_reduction import SecureReduction
from aggregation.secret_ring import Ring
from aggregation.state import GlobalState
from federation.intake import MALFORMED, WRONG_CLIENT, WRONG_ROUND, Intake
from federation.rounds import RoundsConfig
from federation.secure_steps import SecureSteps
from privacy.secure_session import SecureSumAborted, SecureSumError, Session
from privacy.secure_sum import SecureServer
from protos import flower

GIVEN_UP = "sum-given-up"

_log = logging.getLogger("airpeft.federation.secure_exchange")


class SecureExchange(SecureSteps):
    """One round's sums; arguments as for :class:`federation.secure_steps.SecureSteps`."""

    def run(self) -> None:
        """Form the round's sums and give them to its reduction; or give the round up."""
        taken, reduction = self.taken, self.taken.reduction
        assert isinstance(reduction, SecureReduction)  # noqa: S101 - narrows the type
        try:
            total, members = self._sum(0, sorted(taken.used), self.layout.length)
            reduction.add_sum(self.layout.read(total, len(members)))
            if reduction.question():
                self._second(reduction, members)
            self.note |= {"summed": len(members), "bound": reduction.bound}
            self.note |= {"weight": reduction.weight}
        except (SecureSumError, AggregationError, ValueError) as error:  # or a key that is none
            _log.warning("round %d: the secure sum is given up: %s", taken.expected.round, error)
            taken.given_up = f"the secure sum was given up: {error}"
            for client in list(taken.used):
                self._out(client, GIVEN_UP)
        self.note |= {"dropped": dict(sorted(self.dropped.items())), "given_up": taken.given_up}
        taken.secure = self.note

    def _second(self, reduction: SecureReduction, members: Sequence[str]) -> None:
        """Have what was trained projected, and add the projections up."""
        number = self.taken.expected.round
        task = flower.SketchTask(
            run=self.config.run,
            round=number,
            basis=reduction.question(),
            data_folder=self.config.data_folder,
            base=self.config.base,
            secure=True,
        )
        content = flower.sketch_task_record(task)
        ready = set()
        for client, reply in self._exchange(flower.SKETCH, dict.fromkeys(members, content)):
            reason = self._judge_ready(client, reply)
            if reason:
                self.dropped[client] = f"sketch: {reason}"
            else:
                ready.add(client)
        if len(ready) < len(members):
            raise SecureSumAborted(
                f"{len(members) - len(ready)} of the {len(members)} clients in the first sum did "
                "not answer it, and nothing can be taken out of a sum"
            )
        shapes = reduction.answer_shapes()
        length = sum(rows * columns for rows, columns in shapes.values())
        total, there = self._sum(1, members, length, everybody=True)
        sums = self.layout.ring.wide.sums(total, len(there))
        reduction.answer_sum(unflat(sums, shapes))

    def _judge_ready(self, client: str, reply: Message) -> str:
        if not reply.has_content():
            return flower.fault_of(reply)
        try:
            said = flower.ready_from(reply.content)
        except flower.RecordError:
            return MALFORMED
        if said.client != client:
            return WRONG_CLIENT
        return "" if said.round == self.taken.expected.round else WRONG_ROUND

    def _sum(
        self, part: int, members: Sequence[str], length: int, *, everybody: bool = False
    ) -> tuple[Numbers, tuple[str, ...]]:
        """The sum of the members' vectors, and whose vectors are in it.

        Raises:
            SecureSumError: if it cannot be formed without giving something away.
        """
        ring = self.layout.ring
        if len(members) < ring.least:
            raise SecureSumAborted(
                f"{len(members)} clients are ready, and the noise of {ring.least} is counted on"
            )
        session = Session.of(
            self.config.run,
            self.taken.expected.round,
            members,
            length=length,
            dropouts=self.dropouts,
            corrupt=self.corrupt,
            part=part,
        )
        self.note |= {"members": len(members), "threshold": session.threshold}
        if ring.noise:
            self.note |= {"least": ring.least, "honest": ring.honest, "share": ring.share}
        server = SecureServer(session)
        keys = server.keys(list(self._keys(part, session)))
        pieces = server.pieces(list(self._pieces(part, keys)))
        for masked in self._masked(part, pieces, length):
            server.add(masked)
        survivors = server.survivors()
        wanted = len(members) if everybody else max(self.config.min_updates, ring.least)
        if len(survivors) < wanted:  # before anything is unmasked
            raise SecureSumAborted(f"{len(survivors)} vectors came, {wanted} are needed")
        confirmed = server.confirmations(list(self._confirm(part, survivors)))
        reduction = self.taken.reduction
        assert isinstance(reduction, SecureReduction)  # noqa: S101 - narrows the type
        # Only simulated clients find their data in a folder that the server names.
        seeded = bool(self.config.data_folder)
        reduction.before_unmasking(server.fingerprint(seeded=seeded))
        return server.total(list(self._reveal(part, confirmed))), survivors


def layout_of(recipe: Recipe, state: GlobalState, ring: Ring) -> Layout:
    """Where in a vector of the round after a state what is."""
    spec = state.adapter.spec
    return Layout(spec, recipe.assignment(state.round + 1, spec), ring)


def sum_up(
    grid: Grid,
    taken: Intake,
    nodes: Mapping[str, int],
    config: RoundsConfig,
    layout: Layout,
    clock: Callable[[], float],
) -> int:
    """Form the round's secure sums; arguments as for :class:`SecureExchange`.

    Returns:
        Bytes of the arrays that were sent.
    """
    private = config.chosen().private
    exchange = SecureExchange(
        grid, taken, nodes, config, layout, private.dropouts, private.corrupt, clock
    )
    exchange.run()
    return exchange.bytes_down
