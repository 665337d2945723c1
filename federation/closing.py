"""The end of a round: what its replies make of the adapter, and the record that says so."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from aggregation.errors import RecipeError
from aggregation.report import AggregationReport
from aggregation.state import GlobalState
from federation.intake import Intake
from federation.rounds import Round

_log = logging.getLogger("airpeft.federation.closing")


def close(
    record: Round, taken: Intake, *, min_updates: int, bytes_down: int, beside: bool = False
) -> tuple[Round, GlobalState | None]:
    """Form the next adapter of what is in the sum, if that is enough.

    Args:
        record: of the round so far: its cohort, and the adapter that was handed out.
        taken: its replies.
        min_updates: with fewer usable ones the adapter stays as it was.
        bytes_down: bytes of all arrays that were sent.
        beside: whether clients load what the adapter leaves out beside it, so that only what is
            dropped altogether is missing.

    Returns:
        The record of the round, and the new state; None if the old one stays.
    """
    taken.close(record.cohort)
    used = taken.used
    record = replace(
        record,
        used=tuple(used),
        refused=taken.refused,
        bytes_down=bytes_down,
        bytes_up=taken.nbytes,
        weights={client: update.weight for client, update in used.items() if update.weight},
        secure=taken.secure,
        privacy_events=dict(taken.spent),
        client_metrics={client: dict(update.metrics) for client, update in used.items()},
    )
    wanted = 0 if taken.reduction.in_any_case else max(1, min_updates)
    reason = taken.reduction.lacks()
    if taken.given_up and not taken.reduction.in_any_case:
        reason = taken.given_up
    elif len(used) < wanted:
        reason = f"{len(used)} usable updates, {wanted} are needed"
    found = reason or _step(taken)
    if isinstance(found, str):
        _log.warning("round %d: %s: the adapter stays as it was", record.number, found)
        return replace(record, unchanged=found), None
    state, report = found
    if report.unchanged:
        _log.warning("round %d: %s", record.number, report.unchanged)
    record = replace(
        record,
        unchanged=report.unchanged,
        measured=report.measured,
        adapter_out=state.adapter.digest,
        aggregation_error=_dropped(report) if beside else report.error,
        kept_energy=1.0 - _dropped(report) ** 2 if beside else report.energy,
        influence=dict(report.influence),
    )
    return record, state


def _dropped(report: AggregationReport) -> float:
    """Relative Frobenius norm of what neither the adapter nor what is beside it holds."""
    norm = math.hypot(*(module.norm for module in report.modules.values()))
    return math.hypot(*(module.dropped for module in report.modules.values())) / (norm or 1.0)


def _step(taken: Intake) -> tuple[GlobalState, AggregationReport] | str:
    try:
        return taken.reduction.finish()
    except RecipeError as error:  # too few are left for the rule, now that all has come
        return str(error)
