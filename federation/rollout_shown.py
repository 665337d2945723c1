"""How rollouts and plans are shown to people."""

from __future__ import annotations

from typing import Any

import typer

from federation.shown import print_table


def wave_of(one: dict[str, Any]) -> str:
    """The current wave and how many there are."""
    return f"{one['wave'] + 1}/{len(one['waves'])}"


def print_rollout(one: dict[str, Any]) -> None:
    """One rollout with each device, its evidence and its comparison."""
    before = one["previous"]["release"] or "(base)"
    names = one["release"]["release"]
    if one["other"] is not None:
        names = f"{names} | {one['other']['release']}"
    typer.echo(
        f"{one['id']}: {before} -> {names}, {one['state']}, wave {wave_of(one)}"
        f" of {', '.join(one['waves'])}; {one['why']}"
    )
    for found in one["evidence"]:
        if found["devices"]:
            typer.echo(
                f"accuracy with {found['release']}: falls by {found['mean']:+.4f} on"
                f" {found['devices']} devices ({found['trimmed']} left out), evidence"
                f" {found['capital']:.3g} of {found['needed']:.3g} needed to halt"
            )
    if one["comparison"] is not None:
        _print_comparison(one)
    rows = [
        (
            d["device_id"],
            "yes" if d["in_wave"] else "no",
            d["running"] or "(base)",
            d["outcome"] or "",
            d["reason"] or "",
            _change(d["quality"]),
        )
        for d in one["devices"]
    ]
    columns = ("DEVICE", "IN WAVE", "RUNNING", "OUTCOME", "REASON", "ACCURACY")
    print_table(columns, rows, "no device yet")


def _print_comparison(one: dict[str, Any]) -> None:
    a, b, found = one["release"]["release"], one["other"]["release"], one["comparison"]
    if found["low"] is None:
        typer.echo(f"{a} on {found['devices_a']} devices, {b} on {found['devices_b']}: too few yet")
        return
    effect = "" if found["effect"] is None else f", effect size {found['effect']:+.2f}"
    winner = {"a": f"{a} is better", "b": f"{b} is better", "": "no difference shown"}
    typer.echo(
        f"{b} - {a}: accuracy changes by {found['difference']:+.4f}, {found['confidence']:.0%}"
        f" interval {found['low']:+.4f} to {found['high']:+.4f}{effect}; on"
        f" {found['devices_a']} and {found['devices_b']} devices; {winner[found['better']]}"
    )


def print_plan(plan: dict[str, Any]) -> None:
    """What would happen."""
    typer.echo(
        f"{plan['previous'] or '(base)'} -> {' | '.join(plan['releases'])} on {plan['fleet']}"
        " devices; nothing has happened"
    )
    rows = [
        (
            number,
            wave["wave"],
            " + ".join(map(str, wave["added"])),
            wave["reached"],
            wave["settled"],
            wave["unfit"],
            wave["silent"],
            wave["download_bytes"],
            wave["allowed_failures"],
        )
        for number, wave in enumerate(plan["waves"], 1)
    ]
    columns = (
        *("NO", "WAVE", "ADDED", "REACHED", "HAVE IT", "UNFIT", "SILENT", "BYTES", "MAY FAIL"),
    )
    print_table(columns, rows, "no wave")
    if plan["fall_reports"] is not None:
        typer.echo(f"a clear fall of accuracy halts after {plan['fall_reports']} devices report it")
    for warning in plan["warnings"]:
        typer.echo(f"look: {warning}")


def _change(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return ""
    return f"{quality['accuracy_before']:.3f} -> {quality['accuracy_after']:.3f}"
