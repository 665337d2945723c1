"""What a person sees of the demo, on a terminal and in a pipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from simulations.demo_view import LineView, LiveView, rollout_line, round_line
from simulations.events import ClientDone, Finished, Prepared, RoundDone, RoundStarted
from simulations.traffic import Traffic

METRICS = {
    "accuracy": 0.7654,
    "epsilon_max": 4.87,
    "used": 19,
    "cohort": 20,
    "aggregation_error": 0.0387,
}
ROLLOUT: dict[str, Any] = {
    "state": "running",
    "wave": 0,
    "devices": [
        {"device_id": "device-1", "running": "s-2", "reason": "", "outcome": "committed"},
        {"device_id": "device-2", "running": "s-1", "reason": "guard", "outcome": "rejected"},
    ],
}


@pytest.mark.parametrize("live", [False, True])
def test_everything_that_happens_is_said_within_100_columns(live: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=live, color_system=None)
    kind = LiveView if live else LineView
    with kind(console) as view:
        view.stage("train")
        counts = {"client-00000": (10, 20), "client-00001": (5, 5)}
        view.training(Prepared("run", Path("out"), counts, ("no", "yes"), 7, 2, 0, 13058))
        view.training(RoundStarted(1, ("client-00000", "client-00001")))
        view.training(ClientDone("client-00000", 1, 0.5))
        view.training(RoundDone(1, METRICS))
        view.traffic(Traffic({"device-1": "http://127.0.0.1:9"}, ["text"]))
        view.rollout("s-2", ROLLOUT)
        view.rollout("s-2", ROLLOUT)
        view.training(Finished("sha256:0", Path("adapter"), Path("report.html")))
    said = screen.getvalue()
    assert "2 clients with 10 to 30 rows (40 in all), 7 held out" in said
    assert "round 1: accuracy 0.765, epsilon 4.87, 19 of 20 clients" in said
    assert said.count("rollout of s-2: running, wave 1, on 1 of 2 (guard)") == 1
    if live:
        assert "device-1" in said


def test_lines_of_a_round_and_a_rollout() -> None:
    assert round_line(0, {"accuracy": 0.5}) == "before training: accuracy 0.500 on held-out texts"
    assert "epsilon" not in round_line(1, {**METRICS, "epsilon_max": None})
    done = {**ROLLOUT, "state": "done", "devices": ROLLOUT["devices"][:1]}
    assert rollout_line("s-2", done) == "rollout of s-2: done, on 1 of 1"
