"""A training run's settings, and the record of one round.

    >>> config = RoundsConfig(run="demo", rounds=3, base="minilm", plan={"epochs": 1.0})
    >>> config.recipe, config.min_updates
    ('svd-warm-start', 1)
    >>> record = Round(number=1, adapter_in="sha256:a", adapter_out="sha256:b",
    ...                cohort=("client-00000",), used=("client-00000",))
    >>> Round.from_document(record.to_document()) == record
    True

Both are plain values: nothing here knows Flower, files or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from federation.errors import FederationError

LATE = "late"


class RoundsError(FederationError):
    """Settings of a training run that contradict themselves."""


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """How a training run goes.

    Attributes:
        run: name of the run; (run, client, round) names a privacy event once and for all.
        rounds: number of rounds.
        base: name of the base model, told to the clients.
        plan: the clients' training plan, passed on unread.
        privacy: the clients' local privacy, passed on unread; None for none.
        recipe: name of the aggregation recipe.
        sampling: ``fixed`` or ``poisson``, see :mod:`federation.cohort`.
        fraction: share of the clients that is drawn each round, above 0 and at most 1.
        clients: how many clients to wait for before the first round.
        gather_seconds: how long to wait for them; a run goes on with those that came, unless
            there are none.
        min_updates: a round with fewer usable updates changes nothing.
        deadline_seconds: replies that come later are left out of their round.
        seed: root of every draw of the run.
        data_folder: where simulated clients find their examples; empty for real ones.

    Raises:
        RoundsError: if a number is out of its bounds.
    """

    run: str
    rounds: int
    base: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] | None = None
    recipe: str = "svd-warm-start"
    sampling: str = "fixed"
    fraction: float = 1.0
    clients: int = 1
    gather_seconds: float = 120.0
    min_updates: int = 1
    deadline_seconds: float = 600.0
    seed: int = 0
    data_folder: str = ""

    def __post_init__(self) -> None:
        bounds = {
            "rounds": self.rounds >= 1,
            "fraction": 0 < self.fraction <= 1,
            "clients": self.clients >= 1,
            "min_updates": self.min_updates >= 1,
            "deadline_seconds": self.deadline_seconds > 0,
            "sampling": self.sampling in ("fixed", "poisson"),
        }
        for name, sound in bounds.items():
            if not sound:
                raise RoundsError(f"{name}={getattr(self, name)!r} is out of its bounds")


@dataclass(frozen=True, kw_only=True)
class Round:
    """What happened in one round; round 0 is the measurement before the first.

    Attributes:
        number: 1, 2, ... and 0 for the start.
        adapter_in: digest of the adapter that was handed out.
        adapter_out: digest of the adapter that came out; the same if too few updates came.
        cohort: clients that were asked, in order.
        used: clients whose update is in the result.
        refused: why each other one is not, by client: a reason, ``late``, or a client's fault.
        weights: weight of each used update, by client.
        privacy_events: what each used client says it spent, by client.
        aggregation_error: relative distance from the exact mean to what is handed out.
        kept_energy: share of the mean's squared norm that the rank can hold.
        bytes_down: bytes of the adapters sent out.
        bytes_up: bytes of the adapters that came back.
        metrics: of the new adapter on held-out examples.
        client_metrics: of each used client's training, by client.
        seconds: how long the round took; not reproducible, unlike everything else.
    """

    number: int
    adapter_in: str
    adapter_out: str
    cohort: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    privacy_events: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aggregation_error: float = 0.0
    kept_energy: float = 1.0
    bytes_down: int = 0
    bytes_up: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_document(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Round:
        """The inverse of :meth:`to_document`.

        Raises:
            RoundsError: on a missing or unknown field.
        """
        names = {f.name for f in fields(cls)}
        if set(document) != names:
            raise RoundsError(
                f"a round has exactly the fields {', '.join(sorted(names))}; "
                f"got {', '.join(sorted(document))}"
            )
        lists = {name: tuple(document[name]) for name in ("cohort", "used")}
        return cls(**{**document, **lists})
