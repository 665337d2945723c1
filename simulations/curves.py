"""The curves of a run as one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from federation.personal import ACCURACY
from simulations.evaluation import CLASS_PREFIX

INK, SOFT, LINE = "#16202c", "#5b6875", "#dfe5ea"
COLOURS = ("#1f6feb", "#f2a541", "#1a9e77", "#9a5fd0", "#d64545", "#6b7785")


def draw(lines: Sequence[Mapping[str, Any]], budget: float | None = None) -> bytes:
    """Accuracy, loss, privacy spent and aggregation error over the rounds.

    Args:
        lines: the lines of ``metrics.jsonl``.
        budget: epsilon that no client may pass, drawn as a line; None for none.

    Returns:
        a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    # Fixed margins: finding them by layout takes as long as drawing.
    figure.subplots_adjust(
        left=0.055, right=0.985, top=0.94, bottom=0.085, hspace=0.42, wspace=0.14
    )
    panels = figure.subplots(2, 2)
    rounds = [line["round"] for line in lines]
    _accuracy(panels[0, 0], rounds, lines)
    panels[0, 1].plot(rounds, [line["loss"] for line in lines], color=COLOURS[0], marker="o")
    _frame(panels[0, 1], "Loss on held-out texts, nats")
    _privacy(panels[1, 0], lines, budget)
    later = [line for line in lines if line["round"]]
    _distance(panels[1, 1], later)
    buffer = io.BytesIO()
    # No software, no date: the same run gives the same file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _accuracy(panel: Any, rounds: Sequence[int], lines: Sequence[Mapping[str, Any]]) -> None:
    names = sorted({key for line in lines for key in line if key.startswith(CLASS_PREFIX)})
    for name, colour in zip(names[:5], COLOURS[1:], strict=False):
        values = [100 * line.get(name, float("nan")) for line in lines]
        label = name.removeprefix(CLASS_PREFIX)
        panel.plot(rounds, values, color=colour, linewidth=1.2, alpha=0.75, label=label)
    values = [100 * line["accuracy"] for line in lines]
    panel.plot(rounds, values, color=COLOURS[0], linewidth=2.2, marker="o", label="all")
    own = [(line["round"], 100 * line[ACCURACY]) for line in lines if ACCURACY in line]
    if own:
        panel.plot(
            *zip(*own, strict=True),
            color=INK,
            linewidth=1.8,
            marker="s",
            markersize=4,
            label="clients' own models",
        )
    panel.annotate(
        f"{values[-1]:.1f} %",
        (rounds[-1], values[-1]),
        xytext=(-6, 8),
        textcoords="offset points",
        ha="right",
        color=COLOURS[0],
        weight="bold",
    )
    panel.legend(frameon=False, fontsize=8, labelcolor=SOFT)
    _frame(panel, "Accuracy on held-out texts, %")


def _distance(panel: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    known = [line for line in lines if line["aggregation_error"] is not None]
    if lines and not known:
        panel.text(0.5, 0.5, "not measured: it would be without noise", ha="center", color=SOFT)
        _frame(panel, "Distance from the exact mean, %", ticks=False)
        return
    rounds = [line["round"] for line in known]
    errors = [100 * line["aggregation_error"] for line in known]
    panel.plot(rounds, errors, color=COLOURS[2], marker="o")
    _frame(panel, "Distance from the exact mean, %", bottom=0.0)


def _privacy(panel: Any, lines: Sequence[Mapping[str, Any]], budget: float | None) -> None:
    spent = [line for line in lines if line["epsilon"]]
    whole = [
        (line["round"], line["client_epsilon"]) for line in lines if line.get("client_epsilon")
    ]
    if whole:
        label = "the whole client" if spent else None
        panel.plot(*zip(*whole, strict=True), color=INK, marker="s", markersize=4, label=label)
    if whole and not spent:
        _frame(panel, "Privacy spent, ε of a whole client", bottom=0.0)
        return
    if not spent:
        panel.text(0.5, 0.5, "trained without differential privacy", ha="center", color=SOFT)
        _frame(panel, "Privacy spent, ε of each client", ticks=False)
        return
    rounds = [line["round"] for line in spent]
    low = [min(line["epsilon"].values()) for line in spent]
    high = [max(line["epsilon"].values()) for line in spent]
    panel.fill_between(rounds, low, high, color=COLOURS[3], alpha=0.2, linewidth=0)
    panel.plot(rounds, high, color=COLOURS[3], marker="o", label="largest client")
    panel.plot(rounds, low, color=COLOURS[3], linewidth=1.0, alpha=0.6, label="smallest client")
    if budget is not None:
        panel.axhline(budget, color=COLOURS[4], linewidth=1.0, linestyle="--", label="budget")
    panel.legend(frameon=False, fontsize=8, labelcolor=SOFT, loc="lower right")
    _frame(panel, "Privacy spent, ε of each client", bottom=0.0)


def _frame(panel: Any, title: str, *, bottom: float | None = None, ticks: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_title(title, loc="left", fontsize=10.5, color=INK, pad=10)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(LINE)
    panel.tick_params(colors=SOFT, labelsize=8.5, length=3)
    panel.grid(axis="y", color=LINE, linewidth=0.7)
    panel.set_axisbelow(True)
    if ticks:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        panel.set_xlabel("round", fontsize=8.5, color=SOFT)
    else:
        panel.set_xticks([])
        panel.set_yticks([])
    if bottom is not None:
        panel.set_ylim(bottom=bottom)
