"""The end of the demo: what happened, in tables for people and as one document for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from simulations.demo_result import DemoResult

SCHEMA = "airpeft.v1.demo"
NUMERIC = ("base alone", "release 1", "release 2", "bytes", "requests", "failed")


def document(result: DemoResult) -> dict[str, Any]:
    """Everything, as JSON objects in the envelope that all commands use."""
    run, first, last = result.run, result.run.metrics[0], result.run.metrics[-1]
    return {
        "schema": SCHEMA,
        "data": {
            "ok": not result.problems,
            "problems": result.problems,
            "run": run.run,
            "out": str(run.out),
            "adapter": str(run.adapter_folder),
            "report": str(run.report),
            "accuracy": {"before": first["accuracy"], "after": last["accuracy"]},
            "examples": last["examples"],
            "epsilon": last["epsilon_max"],
            "delta": _example(result).get("delta"),
            "unit": _example(result).get("unit"),
            "bytes_per_client_and_round": _each_way(last),
            "devices": result.devices,
            "releases": result.releases,
            "attacks": [asdict(attack) for attack in result.attacks],
            "traffic": result.traffic,
            "parity": result.parity,
        },
    }


def tables(result: DemoResult) -> list[RenderableType]:
    """What a person reads at the end, at most 100 columns wide."""
    return [
        Text(),
        _training(result),
        Text(),
        _devices(result),
        Text(),
        _attacks(result),
        Text(),
        *_ending(result),
    ]


def _training(result: DemoResult) -> Table:
    first, last = result.run.metrics[0], result.run.metrics[-1]
    clients = len(last["epsilon"]) or last["cohort"]
    table = _table("Training", "", "")
    table.add_row(
        "held-out accuracy",
        f"{first['accuracy']:.3f} before, {last['accuracy']:.3f} after {last['round']} rounds "
        f"({last['examples']} texts)",
    )
    if last["epsilon_max"] is not None:
        low, high = (f"{pick(last['epsilon'].values()):.2f}" for pick in (min, max))
        spent = high if low == high else f"{low} to {high}"
        table.add_row(
            "epsilon, for one example",
            f"{spent} for each of {clients} clients, delta {_delta(result)}, all rounds composed",
        )
    if last.get("client_epsilon") is not None:
        table.add_row(
            "epsilon, for one client", f"{last['client_epsilon']:.2f}, all rounds composed"
        )
    table.add_row("bytes per client and round", f"{_each_way(last):,} up, the same down")
    if last["aggregation_error"] is not None:
        distance = f"{last['aggregation_error']:.1e} (kept for the next round)"
        table.add_row("distance from the exact mean", distance)
    table.add_row("PEFT's logits and the devices'", f"differ by at most {result.parity:.1e}")
    return table


def _devices(result: DemoResult) -> Table:
    table = _table(
        "Devices, each on its own held-out examples",
        "device",
        "base alone",
        "release 1",
        "release 2",
        "bytes",
        "requests",
        "failed",
    )
    for name, device in result.devices.items():
        table.add_row(
            name,
            _share(device["before"]),
            _share(device["release_1"]),
            _share(device["after"]),
            f"{device['payload_bytes']:,}",
            str(device["requests"]),
            str(device["failed"]),
        )
    return table


def _attacks(result: DemoResult) -> Table:
    table = _table("What had to fail", "attack", "", "reason", "what happened")
    for attack in result.attacks:
        refused = Text("refused", "green") if attack.refused else Text("SUCCEEDED", "bold red")
        table.add_row(attack.name, refused, attack.reason, attack.detail)
    return table


def _ending(result: DemoResult) -> list[RenderableType]:
    run, traffic = result.run, result.traffic
    lines: list[RenderableType] = [
        Text(
            f"{traffic['requests']} requests, {traffic['failed']} failed, the slowest took "
            f"{traffic['slowest_ms']:.0f} ms."
        ),
        Text(f"Report:  {run.report}", no_wrap=True, overflow="ignore"),
        Text(f"Adapter: {run.adapter_folder}", no_wrap=True, overflow="ignore"),
    ]
    lines += [Text(f"NOT AS IT MUST BE: {problem}", "bold red") for problem in result.problems]
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=any(columns),
        padding=(0, 2),
    )
    for column in columns:
        numeric = column in NUMERIC
        plain = column == "what happened" or not column
        table.add_column(column, justify="right" if numeric else "left", no_wrap=not plain)
    return table


def _each_way(last: dict[str, Any]) -> int:
    return int(last["bytes_up"]) // max(int(last["used"]), 1)


def _delta(result: DemoResult) -> str:
    delta = _example(result).get("delta")
    return f"{delta:.0e}" if isinstance(delta, float) else "?"


def _example(result: DemoResult) -> Mapping[str, Any]:
    """The example-level part of the privacy statement; empty if trained without privacy."""
    part = result.run.privacy.get("example")
    return part if isinstance(part, Mapping) else {}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
