"""Commands of ``airpeft rollout``.

Exit codes: 0 done; 1 you said no; 2 bad input, or the server said no; 3 a rollout that was watched
did not end well (rolled back, aborted or paused) or waits for an approval; 130 Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Annotated, Any

import typer

from aggregation.output import envelope
from federation import rollout_options as options
from federation.errors import FederationError
from federation.plain_text import plain
from federation.policy import Policy
from federation.rate import Rate
from federation.rollout_nouns import State, Verb, allows
from federation.rollout_shown import (
    effect,
    print_plan,
    print_rollout,
    print_rollouts,
    progress,
    say,
)
from federation.shown import (
    BAD_INPUT,
    HERE,
    AsFormat,
    Format,
    Home,
    TokenFile,
    Url,
    Why,
    Yes,
    at,
    call_operator,
    confirm,
    plain_errors,
    show,
)

ENDED_BADLY, INTERRUPTED = 3, 130
CODES = (
    "Exit codes: 0 done; 1 you said no; 2 bad input, or the server said no; 3 what was watched did"
    " not end well, or waits for an approval; 130 Ctrl-C."
)

rollout = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Plan, start, watch, approve, pause, resume, abort and roll back rollouts.",
    epilog=f"Example: airpeft rollout start stable-3 --wave 1 --wave 100%. {CODES}",
)

Where = Annotated[
    str,
    typer.Option("--where", help='List only these devices, as: tag.site == "north"'),
]


def _plan_or_start(start: bool) -> None:
    name = "start" if start else "plan"
    does = (
        "Bring a release to the fleet: a canary first, then wave by wave."
        if start
        else "What a rollout would do to how many devices, and how long; nothing happens."
    )
    shown = [
        f"airpeft rollout {name} stable-3 --wave 1 --wave 25% --wave 100% --bake 600",
        f"airpeft rollout {name} stable-3 --rate 10 --rate-factor 2 --rate-every 50 --rate-max 400",
        f"airpeft rollout {name} --ab stable-3 stable-4 --wave 20% --wave 100%",
    ]

    @rollout.command(name, help=f"{does}\n\nExamples: {' | '.join(shown)}", epilog=CODES)
    def command(
        release: Annotated[
            str | None, typer.Argument(help="Name of a published release, as stable-3.")
        ] = None,
        ab: Annotated[
            tuple[str, str] | None,
            typer.Option(help="Two releases, compared on disjoint halves.", metavar="A B"),
        ] = None,
        wave: options.Waves = None,
        rate: options.RatePerMinute = None,
        rate_factor: options.RateFactor = Rate.factor,
        rate_every: options.RateEvery = Rate.every,
        rate_counting: options.RateCounting = options.Counted.NOTIFIED,
        rate_max: options.RateMax = Rate.max_per_minute,
        max_failures: Annotated[int, typer.Option(help="Devices that may fail.")] = (
            Policy.max_failures
        ),
        max_failure_share: Annotated[
            float, typer.Option(help="The same as a share of those reached; the larger holds.")
        ] = Policy.max_failure_share,
        max_unhealthy: Annotated[int, typer.Option(help="Devices that may be worse off.")] = (
            Policy.max_unhealthy
        ),
        max_unhealthy_share: Annotated[
            float, typer.Option(help="The same as a share of those reached; the larger holds.")
        ] = Policy.max_unhealthy_share,
        unhealthy_if: options.UnhealthyIf = None,
        quality_tolerance: Annotated[
            float, typer.Option(help="Mean accuracy on devices may fall by this.")
        ] = Policy.quality_tolerance,
        quality_alpha: Annotated[
            float, typer.Option(help="Chance of halting a release within the tolerance, ever.")
        ] = Policy.quality_alpha,
        quality_clip: Annotated[
            float, typer.Option(help="A larger change on one device counts as this.")
        ] = Policy.quality_clip,
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
        retries: options.RetriesOption = None,
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
            growth = (rate_factor, rate_every, rate_counting, rate_max)
            policy = {
                "max_failures": max_failures,
                "max_failure_share": max_failure_share,
                "max_unhealthy": max_unhealthy,
                "max_unhealthy_share": max_unhealthy_share,
                **options.health_of(unhealthy_if),
                "quality_tolerance": quality_tolerance,
                "quality_alpha": quality_alpha,
                "quality_clip": quality_clip,
                "liar_share": liar_share,
                "quality_margin": quality_margin,
                "min_success_share": min_success,
                "on_success": "pause" if pause_on_success else "advance",
                "two_person": two_person,
                "bake_seconds": bake,
                "deadline_seconds": deadline,
                "window": window,
                "retries": options.retries_of(retries),
                "rate": options.rate_of(rate, *growth),
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


_plan_or_start(start=False)
_plan_or_start(start=True)


@rollout.command("status", epilog=CODES)
def rollout_status(
    name: Annotated[str | None, typer.Argument(help="Name of a rollout; none lists all.")] = None,
    where: Where = "",
    troubled: Annotated[
        bool, typer.Option("--troubled", help="List only devices that failed or are worse off.")
    ] = False,
    state: Annotated[
        list[State] | None, typer.Option(help="List only rollouts in this state; repeatable.")
    ] = None,
    release: Annotated[str, typer.Option(help="List only rollouts of this release.")] = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """One rollout with what each device said, or all rollouts.

    Examples: airpeft rollout status r-1 --troubled | airpeft rollout status --state running
    """
    with plain_errors():
        if name is None and (where or troubled):
            raise FederationError("--where and --troubled choose devices of one rollout: name it")
        if name is not None and (state or release):
            raise FederationError("--state and --release choose rollouts: leave the name out")
        with call_operator(home, url, token_file) as operator:
            if name is not None:
                one = operator.rollout(name, where=where, troubled=troubled)
                return show("rollout", one, format, lambda: print_rollout(one))
            every = operator.rollouts([one.value for one in state or ()], release)
    chosen = bool(state or release)
    return show("rollouts", every, format, lambda: print_rollouts(every, chosen))


@rollout.command("watch", epilog=CODES)
def rollout_watch(
    name: Annotated[str, typer.Argument(help="Name of a rollout.")],
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    patience: Annotated[
        float, typer.Option(help="Seconds for which the server may be away.", min=0)
    ] = 60.0,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Follow a rollout until it rests; exit code 3 unless it is done. Ctrl-C ends only the watch.

    Example: airpeft rollout watch r-1
    """
    wait = threading.Event()
    said = ""

    def seen(one: dict[str, Any]) -> None:
        nonlocal said
        if format is Format.JSON:
            typer.echo(json.dumps(envelope("rollout", one)))
        elif (line := progress(one)) != said:
            said = line
            say(f"{at(one['updated'])} {plain(line)}")

    def away(why: str) -> None:
        typer.echo(f"waiting for the server: {why}", err=True)

    try:
        with plain_errors(), call_operator(home, url, token_file) as operator:
            last = operator.watch(
                name, lambda: wait.wait(every), seen, patience=patience, away=away
            )
    except KeyboardInterrupt:
        typer.echo(f"no longer watching; {name} goes on: airpeft rollout status {name}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if last["state"] == "awaiting_approval":
        typer.echo(f"another operator decides: airpeft rollout approve {name}", err=True)
    if last["state"] != "done":
        raise typer.Exit(ENDED_BADLY)


def _verb(verb: Verb, text: str) -> None:
    asks = verb in (Verb.ABORT, Verb.ROLLBACK)

    @rollout.command(
        verb.value,
        help=f"{text}\n\nExample: airpeft rollout {verb} r-1 --why 'as agreed'",
        epilog=CODES,
    )
    def act(
        name: Annotated[str, typer.Argument(help="Name of a rollout.")],
        why: Why = "",
        yes: Yes = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say what would follow, and end.")
        ] = False,
        home: Home = HERE,
        url: Url = None,
        token_file: TokenFile = None,
        format: AsFormat = Format.TABLE,  # noqa: A002
    ) -> None:
        with plain_errors(), call_operator(home, url, token_file) as operator:
            if dry_run or (asks and not yes and sys.stdin.isatty()):
                now = operator.rollout(name)
                stuck = verb is Verb.ROLLBACK and now["no_way_back"] != ""
                allowed = allows(verb, State(now["state"]), now["wave"]) and not stuck
                words = effect(verb, now, allowed)
                if dry_run:
                    said = {"rollout": name, "verb": verb, "possible": allowed, "effect": words}
                    show("rollout-verb", said, format, lambda: typer.echo(words))
                    raise typer.Exit(0 if allowed else BAD_INPUT)
                if allowed:
                    confirm(words)
            one = operator.act(name, verb, why)
        show("rollout", one, format, lambda: print_rollout(one))


_verb(Verb.APPROVE, "Let it go beyond the first wave; another operator than the one who started.")
_verb(Verb.PAUSE, "Tell no further device; those that were told go on, and failures still halt.")
_verb(Verb.RESUME, "Go on; the current wave's deadline starts anew.")
_verb(Verb.ABORT, "Stop; every device stays as it is. Of a roll-back, end only the wait.")
_verb(Verb.ROLLBACK, "Take every device back to the release before.")
