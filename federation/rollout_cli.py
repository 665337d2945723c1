"""Commands of ``airpeft rollout``.

Exit codes: 0 done; 2 bad input, or the server said no; 3 a rollout that was watched did not end
well (rolled back, aborted or paused).
"""

from __future__ import annotations

import json
import threading
from typing import Annotated, Any

import typer

from federation.shown import (
    HERE,
    AsFormat,
    Format,
    Home,
    TokenFile,
    Url,
    Why,
    at,
    call_operator,
    plain_errors,
    print_table,
    show,
)

ENDED_BADLY = 3

rollout = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Start, watch, pause, resume, abort and roll back rollouts.",
    epilog="Example: airpeft rollout start stable-3 --wave 1 --wave 100%",
)


@rollout.command("start")
def rollout_start(
    release: Annotated[str, typer.Argument(help="Name of a published release, as stable-3.")],
    wave: Annotated[
        list[str] | None,
        typer.Option(help="Devices (1) or share (25%); repeatable; the last is 100%."),
    ] = None,
    max_failures: Annotated[int, typer.Option(help="Devices that may fail.")] = 0,
    quality_tolerance: Annotated[
        float, typer.Option(help="Mean accuracy on devices may drop by this.")
    ] = 0.02,
    bake: Annotated[float, typer.Option(help="Seconds between waves.")] = 0.0,
    deadline: Annotated[float, typer.Option(help="Seconds until a silent device is let be.")] = (
        3600.0
    ),
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Bring a release to the fleet: a canary first, then wave by wave.

    Example: airpeft rollout start stable-3 --wave 1 --wave 25% --wave 100% --bake 600
    """
    policy = {
        "max_failures": max_failures,
        "quality_tolerance": quality_tolerance,
        "bake_seconds": bake,
        "deadline_seconds": deadline,
    }
    with plain_errors(), call_operator(home, url, token_file) as operator:
        one = operator.start_rollout(release, wave or ["1", "100%"], policy=policy, why=why)
    show("rollout", one, format, lambda: _print_rollout(one))


@rollout.command("status")
def rollout_status(
    name: Annotated[str | None, typer.Argument(help="Name of a rollout; none lists all.")] = None,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """One rollout with what each device said, or all rollouts.

    Example: airpeft rollout status r-1 --format json
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        if name is not None:
            one = operator.rollout(name)
            return show("rollout", one, format, lambda: _print_rollout(one))
        every = operator.rollouts()
    rows = [
        (r["id"], r["release"]["release"], r["state"], _wave(r), at(r["updated"]), r["why"])
        for r in every
    ]
    columns = ("ROLLOUT", "RELEASE", "STATE", "WAVE", "UPDATED", "WHY")
    empty = "no rollout yet; start one with: airpeft rollout start RELEASE"
    return show("rollouts", every, format, lambda: print_table(columns, rows, empty))


@rollout.command("watch")
def rollout_watch(
    name: Annotated[str, typer.Argument(help="Name of a rollout.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Follow a rollout until it rests; exit code 3 unless it is done.

    Example: airpeft rollout watch r-1
    """
    wait = threading.Event()

    def seen(one: dict[str, Any]) -> None:
        if format is Format.JSON:
            typer.echo(json.dumps({"schema": "airpeft.v1.rollout", "data": one}))
        else:
            count = sum(d["outcome"] == "committed" for d in one["devices"])
            where = f"wave {_wave(one)}, {count} of {len(one['devices'])} devices"
            typer.echo(f"{at(one['updated'])} {one['state']}: {where}; {one['why']}")

    with plain_errors(), call_operator(home, url, token_file) as operator:
        last = operator.watch(name, lambda: wait.wait(every), seen)
    if last["state"] != "done":
        raise typer.Exit(ENDED_BADLY)


def _verb(verb: str, text: str) -> None:
    @rollout.command(verb, help=f"{text}\n\nExample: airpeft rollout {verb} r-1 --why 'as agreed'")
    def act(
        name: Annotated[str, typer.Argument(help="Name of a rollout.")],
        why: Why = "",
        home: Home = HERE,
        url: Url = None,
        token_file: TokenFile = None,
        format: AsFormat = Format.TABLE,  # noqa: A002
    ) -> None:
        with plain_errors(), call_operator(home, url, token_file) as operator:
            one = operator.act(name, verb, why)
        show("rollout", one, format, lambda: _print_rollout(one))


_verb("pause", "Stay at the current wave; devices in it go on, failures still halt.")
_verb("resume", "Go on; the current wave's deadline starts anew.")
_verb("abort", "Stop; every device stays as it is.")
_verb("rollback", "Take every device back to the release before.")


def _wave(one: dict[str, Any]) -> str:
    return f"{one['wave'] + 1}/{len(one['waves'])}"


def _print_rollout(one: dict[str, Any]) -> None:
    before = one["previous"]["release"] or "(base)"
    typer.echo(
        f"{one['id']}: {before} -> {one['release']['release']}, {one['state']}, wave {_wave(one)}"
        f" of {', '.join(one['waves'])}; {one['why']}"
    )
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


def _change(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return ""
    return f"{quality['accuracy_before']:.3f} -> {quality['accuracy_after']:.3f}"
