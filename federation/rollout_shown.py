"""How rollouts and plans are shown to people: at most 100 columns, details on demand."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from federation.rollout_nouns import ALLOWED, UNDER_WAY, Verb
from federation.shown import at, lasting, print_table, size_of

WIDTH = 100
ROWS_MAX = 50  # devices in a table


def wave_of(one: Mapping[str, Any]) -> str:
    """The current wave and how many there are."""
    return f"{one['wave'] + 1}/{len(one['waves'])}"


def progress(one: Mapping[str, Any]) -> str:
    """One line about a rollout under way."""
    done = one["progress"]
    parts = [f"{done['reached']} of {done['fleet']} devices told, {done['running']} run it"]
    pace = one["pace"]
    if pace is not None and pace["waiting"]:
        parts.append(f"{pace['waiting']} to be told at {pace['per_minute']} a minute")
    parts += [_grouped(kind, rows) for kind, rows in _kinds(one["concerns"]).items()]
    if one["trouble"]:
        parts.append(f"the fleet is not told yet: {one['trouble']}")
    if one["why"]:
        parts.append(one["why"])
    return f"{one['id']} {one['state']}, wave {wave_of(one)}: {'; '.join(parts)}"


def effect(verb: Verb, one: Mapping[str, Any], allowed: bool) -> str:
    """What a verb would do to how many devices."""
    done, name = one["progress"], one["id"]
    if verb is Verb.ROLLBACK and one["no_way_back"]:
        return f"cannot rollback {name}: {one['no_way_back']}"
    if not allowed:
        needs, never = ", ".join(sorted(ALLOWED[verb])), ", and it never began"
        state = one["state"] + (never if one["wave"] < 0 else "")
        return f"cannot {verb} {name}: it is {state}; {verb} needs: {needs}"
    before = one["back_to"] or "the base model"
    running = done["running"]
    wave = min(one["wave"] + 1, len(one["waves"]) - 1)
    further = f"wave {wave + 1} of {len(one['waves'])} ({one['waves'][wave]})"
    words = {
        Verb.ROLLBACK: f"{running} devices that run it go back to {before}, at once",
        Verb.ABORT: f"all devices stay as they are, {running} of {done['fleet']} with the release"
        if one["state"] != "rolling_back"
        else f"the {running} devices that still run it are no longer waited for; they go back to"
        f" {before} when they come",
        Verb.PAUSE: f"no further device is told; the {done['reached']} that were told go on",
        Verb.APPROVE: f"{further} begins at once, if another operator than"
        f" {one['started_by'] or '?'} says so",
        Verb.RESUME: f"{further} begins" if one["held"] else "the current wave goes on",
    }
    return f"{verb} {name}: {words.get(verb, 'it starts')}"


def print_rollouts(every: Sequence[Mapping[str, Any]], chosen: bool) -> None:
    """All rollouts, one a line."""
    rows = []
    for one in every:
        release = one["release"]["release"]
        if one["other"] is not None:
            release = f"{release} | {one['other']['release']}"
        room = max(20, WIDTH - 54 - len(release))
        why = textwrap.shorten(one["why"], room, placeholder=" ...")
        rows.append((one["id"], release, one["state"], wave_of(one), at(one["updated"]), why))
    columns = ("ROLLOUT", "RELEASE", "STATE", "WAVE", "UPDATED", "WHY")
    empty = "no rollout yet; start one with: airpeft rollout start RELEASE"
    print_table(columns, rows, "no such rollout" if chosen else empty)


def print_rollout(one: Mapping[str, Any]) -> None:
    """One rollout with its evidence, what speaks against it, and its devices."""
    before = one["previous"]["release"] or "(base)"
    names = one["release"]["release"]
    if one["other"] is not None:
        names = f"{names} | {one['other']['release']}"
    say(f"{one['id']}: {before} -> {names}, {one['state']}", one["why"])
    say(f"wave {wave_of(one)} of {', '.join(one['waves'])}", _told(one), sign=": ")
    for line in _pace(one["pace"]):
        say(line)
    for kind, rows in _kinds(one["concerns"]).items():
        say(_grouped(kind, rows) + _allowed(kind, one["progress"]))
    for found in one["evidence"]:
        if found["devices"]:
            say(
                f"accuracy with {found['release']}: falls by {found['mean']:+.4f} on"
                f" {_devices(found['devices'])} ({found['trimmed']} left out), evidence"
                f" {found['capital']:.3g} of {found['needed']:.3g} needed to halt"
            )
    if one["comparison"] is not None:
        say(_comparison(one))
    if one["no_way_back"] and one["state"] in UNDER_WAY:
        say(f"there is no way back from it: {one['no_way_back']}")
    if one["trouble"]:
        say(f"the fleet is not told yet: {one['trouble']}; it is tried again")
    if one["state"] == "paused" and not one["held"]:
        say(
            f"next: airpeft rollout resume {one['id']} gives the wave another deadline; rollback"
            " takes all back, abort leaves them as they are"
        )
    if one["needs_approval"]:
        say(f"next: airpeft rollout approve {one['id']}, by another than {one['started_by']}")
    _print_devices(one)


def print_plan(plan: Mapping[str, Any]) -> None:
    """What would happen."""
    say(
        f"{plan['previous'] or '(base)'} -> {' | '.join(plan['releases'])} on {plan['fleet']}"
        " devices; nothing has happened"
    )
    rows = [
        (
            number,
            textwrap.shorten(wave["wave"], 24, placeholder="..."),
            " + ".join(map(str, wave["added"])),
            wave["reached"],
            wave["settled"],
            wave["unfit"],
            wave["silent"],
            size_of(wave["download_bytes"]),
            wave["allowed_failures"],
            lasting(wave["telling_seconds"]) if wave["telling_seconds"] else "at once",
        )
        for number, wave in enumerate(plan["waves"], 1)
    ]
    columns = (
        *("NO", "WAVE", "ADDED", "REACHED", "HAVE IT", "UNFIT", "SILENT", "BYTES", "MAY FAIL"),
        "TOLD IN",
    )
    print_table(columns, rows, "no wave")
    if plan["rate"]:
        say(f"rate: {plan['rate']}")
    say(
        f"takes {lasting(plan['at_least_seconds'])} and what the devices need; with devices that"
        f" stay silent at most {lasting(plan['at_most_seconds'])}"
    )
    if plan["fall_reports"] is not None:
        say(f"a clear fall of accuracy halts after {plan['fall_reports']} devices report it")
    for warning in plan["warnings"]:
        say(f"look: {warning}")


def say(text: str, more: str = "", *, sign: str = "; ") -> None:
    """A line for people, folded where it is longer than a terminal."""
    text = f"{text}{sign}{more}" if more else text
    typer.echo(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


def _told(one: Mapping[str, Any]) -> str:
    done = one["progress"]
    return f"{done['reached']} of {done['fleet']} devices told, {done['running']} run the release"


def _pace(pace: Mapping[str, Any] | None) -> list[str]:
    if pace is None:
        return []
    line = f"rate: {pace['per_minute']} a minute now ({pace['rate']})"
    if pace["waiting"]:
        line = f"{line}; {pace['waiting']} of the wave still to be told, in"
        line = f"{line} {lasting(pace['seconds_left'])} or more"
    return [line]


def _kinds(concerns: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in concerns:
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def _grouped(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{kind}: " + ", ".join(f"{row['devices']} {row['reason']}" for row in rows)


def _allowed(kind: str, done: Mapping[str, Any]) -> str:
    if kind == "failed":
        return f" ({_devices(done['failed'])}, {done['allowed_failures']} allowed)"
    if kind == "worse off":
        return f" ({_devices(done['worse_off'])}, {done['allowed_unhealthy']} allowed)"
    return ""


def _comparison(one: Mapping[str, Any]) -> str:
    a, b, found = one["release"]["release"], one["other"]["release"], one["comparison"]
    if found["low"] is None:
        counted = f"{a} on {_devices(found['devices_a'])}, {b} on {found['devices_b']}"
        return f"{counted}: a comparison needs both"
    effect = "" if found["effect"] is None else f", effect size {found['effect']:+.2f}"
    winner = {"a": f"{a} is better", "b": f"{b} is better", "": "no difference shown yet"}
    return (
        f"{b} - {a}: accuracy changes by {found['difference']:+.4f}, {found['confidence']:.0%}"
        f" interval {found['low']:+.4f} to {found['high']:+.4f} (holds at every look){effect}; on"
        f" {found['devices_a']} and {found['devices_b']} devices; {winner[found['better']]}"
    )


def _print_devices(one: Mapping[str, Any]) -> None:
    # Those that say most come first: in trouble, then reached.
    order = sorted(
        one["devices"],
        key=lambda d: (not (d["reason"] or d["complaints"]), not d["in_wave"], d["device_id"]),
    )
    compared = one["other"] is not None
    rows = [
        (
            d["device_id"],
            "yes" if d["in_wave"] else "no",
            *([d["release"]] if compared else []),
            d["running"] or "(base)",
            d["outcome"] or d["phase"],
            ", ".join([d["reason"] or "", *d["complaints"]]).strip(", "),
            _change(d["quality"]),
        )
        for d in order[:ROWS_MAX]
    ]
    columns = ("DEVICE", "TOLD", *(["TAKES"] if compared else []), "RUNNING", "OUTCOME")
    print_table((*columns, "REASON", "ACCURACY"), rows, "no such device")
    if len(order) > ROWS_MAX:
        say(
            f"and {len(order) - ROWS_MAX} more devices: choose with --where or --troubled, or take"
            " them all with --format json"
        )


def _change(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    return f"{quality['accuracy_before']:.3f} -> {quality['accuracy_after']:.3f}"
