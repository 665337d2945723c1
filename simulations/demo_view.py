"""How a person sees the demo: a live page on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from simulations.events import ClientDone, Event, Finished, Prepared, RoundDone, RoundStarted
from simulations.traffic import Traffic


class LineView:
    """One line for each thing that happens; for logs, pipes and dumb terminals."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()
        self._said: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""

    def stage(self, title: str) -> None:
        """A new part begins."""
        self._say(f"== {title}")

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        self._say(text)

    def training(self, event: Event) -> None:
        """Training went on."""
        match event:
            case Prepared():
                self._say(prepared_line(event))
            case RoundDone():
                self._say(round_line(event.round, event.metrics))
            case _:
                pass

    def rollout(self, release: str, rollout: Mapping[str, Any]) -> None:
        """A rollout went on; said only when it changed."""
        line = rollout_line(release, rollout)
        if self._said.get(release) != line:
            self._said[release] = line
            self._say(line)

    def traffic(self, traffic: Traffic) -> None:
        """The devices answer from now on."""
        self._say(f"{len(traffic.served)} devices answer requests")

    def _say(self, text: str) -> None:
        self.console.print(
            f"{time.monotonic() - self._began:6.1f} s  {text}", highlight=False, soft_wrap=True
        )


class LiveView(LineView):
    """The same, and below it a panel that is redrawn: rounds, devices, requests."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._spinner = Spinner("dots")
        self._rounds = self._round = self._cohort = self._answered = 0
        self._traffic: Traffic | None = None
        self._training = False
        self._rollout: tuple[str, Mapping[str, Any]] | None = None
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._panel)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state of the panel on the screen."""
        self._live.stop()

    def training(self, event: Event) -> None:
        """Training went on."""
        super().training(event)
        match event:
            case Prepared():
                self._rounds, self._training = event.rounds, True
            case RoundStarted():
                self._round, self._cohort, self._answered = event.round, len(event.cohort), 0
            case ClientDone():
                self._answered += 1
            case Finished():
                self._training = False
            case _:
                pass

    def rollout(self, release: str, rollout: Mapping[str, Any]) -> None:
        """A rollout went on."""
        super().rollout(release, rollout)
        self._rollout = (release, rollout)

    def traffic(self, traffic: Traffic) -> None:
        """The devices answer from now on."""
        super().traffic(traffic)
        self._traffic = traffic

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._training:
            row = Table.grid(padding=(0, 1))
            if self._round:
                row.add_row(
                    self._spinner,
                    Text(f"round {self._round} of {self._rounds}"),
                    ProgressBar(total=max(self._cohort, 1), completed=self._answered, width=40),
                    Text(f"{self._answered} of {self._cohort} clients"),
                )
            else:
                row.add_row(self._spinner, Text("measuring the adapter before training"))
            parts.append(row)
        if self._traffic is not None:
            parts.append(self._devices(self._traffic))
        return Group(*parts)

    def _devices(self, traffic: Traffic) -> Table:
        rows: dict[str, Mapping[str, Any]] = {}
        if self._rollout is not None:
            rows = {row["device_id"]: row for row in self._rollout[1]["devices"]}
        table = Table(box=None, padding=(0, 2), pad_edge=False)
        for title in ("device", "serves", "last word", "requests", "failed"):
            table.add_column(title, justify="right" if title in ("requests", "failed") else "left")
        for name, served in traffic.served.items():
            row = rows.get(name, {})
            word = row.get("reason") or row.get("outcome") or ""
            table.add_row(
                name,
                served.last or "base alone",
                str(word),
                str(served.requests),
                Text(str(served.failed), style="bold red" if served.failed else ""),
            )
        return table


def prepared_line(event: Prepared) -> str:
    """What is about to be trained, on what."""
    sizes = [sum(rows) for rows in event.clients.values()]
    return (
        f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} rows ({sum(sizes):,} in all), "
        f"{event.heldout:,} held out; {event.parameters:,} values"
    )


def round_line(number: int, metrics: Mapping[str, Any]) -> str:
    """One round, as a line."""
    if number == 0:
        return f"before training: accuracy {metrics.get('accuracy', 0):.3f} on held-out texts"
    parts = [f"round {number}: accuracy {metrics.get('accuracy', 0):.3f}"]
    if metrics.get("epsilon_max") is not None:
        parts.append(f"epsilon {metrics['epsilon_max']:.2f}")
    if metrics.get("client_epsilon") is not None:
        parts.append(f"of a client {metrics['client_epsilon']:.2f}")
    parts.append(f"{metrics['used']} of {metrics['cohort']} clients")
    if metrics["aggregation_error"] is not None:
        parts.append(f"aggregation error {metrics['aggregation_error']:.1e}")
    return ", ".join(parts)


def rollout_line(release: str, rollout: Mapping[str, Any]) -> str:
    """A rollout, as a line."""
    devices = rollout["devices"]
    running = sum(d["running"] == release for d in devices)
    words = sorted({str(d["reason"]) for d in devices if d["reason"]})
    why = f" ({', '.join(words)})" if words else ""
    wave = f", wave {rollout['wave'] + 1}" if rollout["state"] == "running" else ""
    return f"rollout of {release}: {rollout['state']}{wave}, on {running} of {len(devices)}{why}"
