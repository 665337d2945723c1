"""What a finished run leaves for people: curves, a report in one file, a model card.

The report needs no network and no other file: pictures are inside it, and it has no script.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aggregation.choices import CHOICES
from aggregation.showing import meaning
from federation.personal import ACCURACY
from federation.rounds import Round
from privacy.events import SgdEvent
from privacy.statement import explain
from simulations import curves
from simulations.card import kind, ranks, snippet
from simulations.evaluation import CLASS_PREFIX
from simulations.records import shared_only
from simulations.resources import find

if TYPE_CHECKING:
    from simulations.folder import Run


@dataclass(frozen=True)
class ClientRow:
    """One client's line in the report.

    ``accuracy`` is None if a class of the client was not held out, ``own`` if it has measured
    nothing itself.
    """

    name: str
    rows: int
    shares: tuple[float, ...]
    used: int
    refused: str
    noise: float
    rate: float
    epsilon: float
    accuracy: float | None
    rank: int
    own: float | None


def client_rows(run: Run, rounds: Sequence[Round], last: Mapping[str, Any]) -> list[ClientRow]:
    """One row for each client.

    Args:
        run: the run.
        rounds: the records of all rounds.
        last: the last line of ``metrics.jsonl``.
    """
    labels = run.summary["labels"]
    by_class = [last.get(CLASS_PREFIX + name) for name in labels]
    out = []
    for name, counts in run.summary["clients"].items():
        total = sum(counts)
        shares = tuple(count / total for count in counts)
        events = [r.privacy_events[name] for r in rounds if name in r.privacy_events]
        event = SgdEvent.from_mapping(events[-1]) if events else None
        parts = [(s, a) for s, a in zip(shares, by_class, strict=True) if s]
        known = all(a is not None for _, a in parts)
        reasons = [f"round {r.number}: {r.refused[name]}" for r in rounds if name in r.refused]
        out.append(
            ClientRow(
                name=name,
                rows=total,
                shares=shares,
                used=sum(name in r.used for r in rounds),
                refused=", ".join(reasons[:3]) + (", ..." if len(reasons) > 3 else ""),
                noise=event.noise_multiplier if event else 0.0,
                rate=event.sample_rate if event else 0.0,
                epsilon=last["epsilon"].get(name, 0.0),
                accuracy=sum(s * a for s, a in parts if a is not None) if known else None,
                rank=run.config.ranks.get(name, run.scenario.train.rank),
                own=next(
                    (r.personal[name]["accuracy"] for r in reversed(rounds) if name in r.personal),
                    None,
                ),
            )
        )
    return out


def page(
    run: Run,
    lines: Sequence[Mapping[str, Any]],
    rounds: Sequence[Round],
    privacy: Mapping[str, Any],
    picture: bytes,
    fleet: Mapping[str, Any] | None = None,
    residuals: int = 0,
) -> str:
    """The report as one HTML file.

    Args:
        run: the run.
        lines: the lines of ``metrics.jsonl``.
        rounds: the records of all rounds.
        privacy: the privacy statement.
        picture: the curves, a PNG.
        fleet: what happened to a fleet of devices, if there was one (``simulations.demo``).
        residuals: how many frozen adapters lie beside the trained one.
    """
    from jinja2 import Environment, StrictUndefined

    # Names of classes and clients come from data files: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    clients = client_rows(run, rounds, lines[-1])
    template = environment.from_string(find("templates/report.html").read_text("utf-8"))
    return template.render(
        run=run,
        first=lines[0],
        last=lines[-1],
        lines=lines,
        labels=run.summary["labels"],
        clients=clients,
        anybody_refused=any(client.refused for client in clients),
        personal=ACCURACY in lines[-1],
        mixed=len(set(run.config.ranks.values())) > 1,
        kind=kind(run),
        ranks=ranks(run),
        up=_each(lines[-1]["bytes_up"], lines[-1]["used"]),
        down=_each(lines[-1]["bytes_down"], lines[-1]["cohort"]),
        recipe=_recipe(run),
        residuals=residuals,
        curves=base64.b64encode(picture).decode(),
        privacy_text=explain(privacy).splitlines(),
        privacy_json=json.dumps(privacy, indent=1, sort_keys=True),
        snippet=snippet(run, residuals=residuals),
        toml=run.scenario.to_toml(),
        fleet=fleet,
        percent=lambda value: "–" if value is None else f"{100 * value:.1f} %",
        size=size,
    )


def draw_curves(run: Run, lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The curves of a run, a PNG."""
    return curves.draw(lines, run.privacy.epsilon if run.privacy else None)


def _recipe(run: Run) -> dict[str, Any]:
    """The recipe as the report shows it: its line, its pieces, and what to know of it."""
    chosen = run.config.chosen()
    return {
        "line": str(chosen),
        "reference": chosen.reference,
        "warning": chosen.warning,
        "shared_only": shared_only(run.config.recipe) if chosen.train.personal else "",
        "pieces": [
            (piece, str(getattr(chosen, piece)), meaning(getattr(chosen, piece)))
            for piece in CHOICES
        ],
    }


def _each(total: int, clients: int) -> int:
    return int(total) // max(int(clients), 1)


def size(count: int) -> str:
    """Bytes in words."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return (
        f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"
    )
