"""Commands of ``airpeft rollout``.

Exit codes: 0 done; 2 bad input, or the server said no; 3 a rollout that was watched did not end
well (rolled back, aborted or paused) or waits for an approval.
"""

from __future__ import annotations

import json
import threading
from typing import Annotated, Any

import typer

from federation.errors import FederationError
from federation.policy import Policy
from federation.rollout_shown import print_plan, print_rollout, wave_of
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
    help="Plan, start, watch, approve, pause, resume, abort and roll back rollouts.",
    epilog="Example: airpeft rollout start stable-3 --wave 1 --wave 100%",
)


def _plan_or_start(start: bool) -> None:
    name = "start" if start else "plan"
    does = (
        "Bring a release to the fleet: a canary first, then wave by wave."
        if start
        else "What a rollout would do to how many devices; nothing happens."
    )
    example = f"airpeft rollout {name} stable-3 --wave 1 --wave 25% --wave 100% --bake 600"
    compare = f"airpeft rollout {name} --ab stable-3 stable-4 --wave 20% --wave 100%"

    @rollout.command(name, help=f"{does}\n\nExample: {example}; to compare two: {compare}")
    def command(
        release: Annotated[
            str | None, typer.Argument(help="Name of a published release, as stable-3.")
        ] = None,
        ab: Annotated[
            tuple[str, str] | None,
            typer.Option(help="Two releases, compared on disjoint halves.", metavar="A B"),
        ] = None,
        wave: Annotated[list[str] | None, typer.Option(help=_WAVE_HELP)] = None,
        max_failures: Annotated[int, typer.Option(help="Devices that may fail.")] = (
            Policy.max_failures
        ),
        max_failure_share: Annotated[
            float, typer.Option(help="The same as a share of those reached; the larger holds.")
        ] = Policy.max_failure_share,
        max_unhealthy: Annotated[
            int, typer.Option(help="Devices that may be worse off, in memory for instance.")
        ] = Policy.max_unhealthy,
        min_disk_free: Annotated[
            int, typer.Option(help="MiB; a device that falls below it is worse off.")
        ] = 0,
        max_battery_fall: Annotated[
            float | None, typer.Option(help="Percent; a device that loses more is worse off.")
        ] = None,
        max_load_rise: Annotated[
            float | None, typer.Option(help="Load of one minute; likewise.")
        ] = None,
        max_temperature: Annotated[
            float | None, typer.Option(help="Celsius; a device that gets hotter is worse off.")
        ] = None,
        quality_tolerance: Annotated[
            float, typer.Option(help="Mean accuracy on devices may fall by this.")
        ] = Policy.quality_tolerance,
        quality_alpha: Annotated[
            float, typer.Option(help="Chance of halting a release within the tolerance, ever.")
        ] = Policy.quality_alpha,
        liar_share: Annotated[
            float, typer.Option(help="Share of devices whose reports may be lies.")
        ] = Policy.liar_share,
        quality_margin: Annotated[
            float | None, typer.Option(help="Go on only when a smaller fall than this is shown.")
        ] = Policy.quality_margin,
        min_success: Annotated[
            float, typer.Option(help="Share of a wave that must run the release, else pause.")
        ] = Policy.min_success_share,
        pause_on_success: Annotated[
            bool, typer.Option("--pause-on-success", help="Wait for resume after each wave.")
        ] = False,
        two_person: Annotated[
            bool, typer.Option("--two-person", help="Another operator approves after wave 1.")
        ] = False,
        bake: Annotated[float, typer.Option(help="Seconds between waves.")] = Policy.bake_seconds,
        deadline: Annotated[
            float, typer.Option(help="Seconds until a silent device is let be.")
        ] = Policy.deadline_seconds,
        window: Annotated[
            str, typer.Option(help="Install only then, in each device's own time: 22:00-05:00")
        ] = Policy.window,
        retries: Annotated[
            list[str] | None,
            typer.Option(help="CLASS=COUNT of device, space, carrier; repeatable."),
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan.")] = False,
        why: Why = "",
        home: Home = HERE,
        url: Url = None,
        token_file: TokenFile = None,
        format: AsFormat = Format.TABLE,  # noqa: A002
    ) -> None:
        with plain_errors():
            if (release is None) == (ab is None):
                raise FederationError("give one RELEASE, or two with --ab A B")
            policy = {
                "max_failures": max_failures,
                "max_failure_share": max_failure_share,
                "max_unhealthy": max_unhealthy,
                "min_disk_free_bytes": min_disk_free << 20,
                "max_battery_fall": max_battery_fall,
                "max_load_rise": max_load_rise,
                "max_temperature_celsius": max_temperature,
                "quality_tolerance": quality_tolerance,
                "quality_alpha": quality_alpha,
                "liar_share": liar_share,
                "quality_margin": quality_margin,
                "min_success_share": min_success,
                "on_success": "pause" if pause_on_success else "advance",
                "two_person": two_person,
                "bake_seconds": bake,
                "deadline_seconds": deadline,
                "window": window,
                "retries": _retries(retries),
            }
            first, other = ab or (str(release), None)
            waves = wave or ["1", "100%"]
            with call_operator(home, url, token_file) as operator:
                if start and not dry_run:
                    one = operator.start_rollout(first, waves, policy=policy, why=why, other=other)
                else:
                    one = operator.plan_rollout(first, waves, policy=policy, other=other)
        if start and not dry_run:
            show("rollout", one, format, lambda: print_rollout(one))
        else:
            show("rollout-plan", one, format, lambda: print_plan(one))


_WAVE_HELP = (
    "Devices (1), share (25%), growth (1x2, 1%x2), each also of a part of the fleet"
    ' (25% where tag.site == "north"); repeatable; the last is 100%.'
)
_plan_or_start(start=False)
_plan_or_start(start=True)


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
            return show("rollout", one, format, lambda: print_rollout(one))
        every = operator.rollouts()
    rows = [
        (r["id"], r["release"]["release"], r["state"], wave_of(r), at(r["updated"]), r["why"])
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
            where = f"wave {wave_of(one)}, {count} of {len(one['devices'])} devices"
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
        show("rollout", one, format, lambda: print_rollout(one))


_verb("approve", "Let it go beyond the first wave; another operator than the one who started it.")
_verb("pause", "Stay at the current wave; devices in it go on, failures still halt.")
_verb("resume", "Go on; the current wave's deadline starts anew.")
_verb("abort", "Stop; every device stays as it is.")
_verb("rollback", "Take every device back to the release before.")


def _retries(given: list[str] | None) -> dict[str, int]:
    found = {}
    for text in given or []:
        kind, _, count = text.partition("=")
        if kind not in ("device", "space", "carrier") or not count.isdecimal():
            raise FederationError(
                f"--retries {text!r} is not of the form device=2, space=2 or carrier=2"
            )
        found[kind] = int(count)
    return found
