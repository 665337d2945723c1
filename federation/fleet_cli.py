"""Commands of ``airpeft fleet`` about devices that are there: list, show, tag, revoke, lagging.

Exit codes: 0 done; 1 you said no; 2 bad input, or the server said no.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.devices_shown import print_devices
from federation.errors import FederationError
from federation.plain_text import plain
from federation.shown import (
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
    print_table,
    show,
    size_of,
)

if TYPE_CHECKING:
    from federation.client import OperatorClient

NAMED_MAX = 10  # devices that a question names
CODES = "Exit codes: 0 done; 1 you said no; 2 bad input, or the server said no."

fleet = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="List, tag and revoke devices; let new ones enrol.",
    epilog=f"Example: airpeft fleet list --where 'tag.site == \"north\"'. {CODES}",
)
WhereOption = Annotated[
    str,
    typer.Option("--where", help='Filter, as: tag.site == "north" and memory_bytes >= 2e9'),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say which devices, and end.")]


@fleet.command("list", epilog=CODES)
def fleet_list(
    where: WhereOption = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """All devices, or those that a filter means, with what runs on each.

    Example: airpeft fleet list --where 'tag.site == "north" and not running == "stable-3"'
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        devices = operator.devices(where)
    empty = "no device is meant by this filter" if where else ""
    show("devices", devices, format, lambda: print_devices(devices, empty))


@fleet.command("show", epilog=CODES)
def fleet_show(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """One device: what it is, how it is, and its newest reports.

    Example: airpeft fleet show d-0a1b2c3d4e --home fleet-server
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        one = operator.device(device)

    def table() -> None:
        print_devices([one])
        for name, words in _details(one).items():
            typer.echo(plain(f"{name}: {words}"))
        rows = [
            (
                r["sequence"],
                at(r["received"]),
                r["event"],
                r["release"],
                r["reason"] or "",
                r["detail"],
            )
            for r in one["reports"]
        ]
        columns = ("REPORT", "RECEIVED", "EVENT", "RELEASE", "REASON", "DETAIL")
        print_table(columns, rows, "no report yet")

    show("device", one, format, table)


@fleet.command("tag", epilog=CODES)
def fleet_tag(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DEVICE] [KEY=VALUE]...", help="No DEVICE with --where."),
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(help="KEY; repeatable.")] = None,
    where: WhereOption = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Set or remove tags of a device, or of all that a filter means; waves pick devices by them.

    Examples: airpeft fleet tag kitchen site=north ring=canary --remove spare |
    airpeft fleet tag --where 'memory_bytes >= 8e9' ring=canary --dry-run
    """
    given = list(words or [])
    with plain_errors():
        names = [given.pop(0)] if given and "=" not in given[0] else []
        changes: dict[str, str | None] = {**tags_of(given), **dict.fromkeys(remove or [])}
        if not changes:
            raise FederationError("no tag given: KEY=VALUE sets one, --remove KEY takes one away")
        with call_operator(home, url, token_file) as operator:
            said = ", ".join(f"{k}={v}" if v is not None else f"no {k}" for k, v in changes.items())
            names = _meant(operator, names, where)
            if _agreed(f"tag {said}", names, dry_run, yes or not where):
                found = [operator.tag(name, changes, why) for name in names]
            else:
                found = [operator.device(name) for name in names]
    _show_each(found, format, bool(where), lambda: print_devices(found, "no device is meant"))


@fleet.command("revoke", epilog=CODES)
def fleet_revoke(
    device: Annotated[str | None, typer.Argument(help="Name of the device.")] = None,
    serial: Annotated[
        str | None, typer.Option(help="Only this certificate (hex); the device may renew.")
    ] = None,
    where: WhereOption = "",
    dry_run: DryRun = False,
    yes: Yes = False,
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Never admit a device again, or all that a filter means; open streams are cut.

    Examples: airpeft fleet revoke kitchen --why stolen |
    airpeft fleet revoke --where 'tag.site == "closed"' --dry-run
    """
    with plain_errors():
        if where and serial is not None:
            raise FederationError("--serial is of one device: name it instead of --where")
        with call_operator(home, url, token_file) as operator:
            names = _meant(operator, [device] if device else [], where)
            done = _agreed("revoke for ever", names, dry_run, yes)
            if done:
                found = [operator.revoke(name, why, serial) for name in names]
            else:
                found = [operator.device(name) for name in names]
    what = f"certificate {serial} revoked" if serial is not None else "revoked"
    lines = [f"{name}: {what}" for name in names] if done else []
    _show_each(found, format, bool(where), lambda: print_lines(lines))


@fleet.command("lagging", epilog=CODES)
def fleet_lagging(
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    hours: Annotated[float, typer.Option(min=0, help="Silent for longer than this.")] = 24.0,
    metadata_hours: Annotated[
        float | None,
        typer.Option(
            min=0, help="Without newer metadata for longer than this; by default as --hours."
        ),
    ] = None,
    where: WhereOption = "",
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Devices that were silent for long, or have old metadata: off, cut off, or held back.

    Example: airpeft fleet lagging --hours 48 --metadata-hours 12 --where 'tag.site == "north"'
    """
    allowed = hours if metadata_hours is None else metadata_hours
    with plain_errors(), call_operator(home, url, token_file) as operator:
        late = operator.devices(where, silent_hours=hours, metadata_hours=allowed)
    show("devices", late, format, lambda: print_devices(late, f"none for {hours:g} h"))


def print_lines(lines: Sequence[str]) -> None:
    """One a line."""
    for line in lines:
        typer.echo(line)


def tags_of(given: Sequence[str] | None) -> dict[str, str]:
    """Tags as people write them.

    Raises:
        FederationError: a word without a name or an equals sign.
    """
    tags = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise FederationError(f"tag {text!r} is not of the form KEY=VALUE")
        tags[key] = value
    return tags


def _details(one: dict[str, Any]) -> dict[str, str]:
    """Inventory, health and certificate, for people."""
    kept = {name: value for name, value in one["inventory"].items() if value not in ("", None)}
    health = one["health"] or {}
    parts = []
    for name, value in health.items():
        if value is not None:
            shown = size_of(value) if name.endswith("_bytes") else f"{value:g}"
            parts.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {shown}")
    found = {
        "enrolled": f"{at(one['enrolled'])}, certificate {one['serial']}",
        "is": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in kept.items()),
        "health": ", ".join(parts) or "not told yet",
    }
    if one["revoked"]:
        found["revoked"] = at(one["revoked"])
    return found


def _meant(operator: OperatorClient, names: list[str], where: str) -> list[str]:
    """The device that was named, or the active ones of a filter.

    Raises:
        FederationError: neither is given, or both.
    """
    if bool(names) == bool(where):
        raise FederationError("give one DEVICE, or several with --where")
    if not where:
        return names
    return [one["id"] for one in operator.devices(where) if not one["revoked"]]


def _agreed(what: str, names: Sequence[str], dry_run: bool, yes: bool) -> bool:
    """Whether to go on; a person at a terminal is asked, unless they said yes before."""
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    text = f"{what}: {len(names)} devices ({', '.join(names[:NAMED_MAX])}{more})"
    if dry_run:
        typer.echo(f"would {text}", err=True)
        return False
    if not yes and names and sys.stdin.isatty():
        confirm(text)
    return True


def _show_each(
    found: list[dict[str, Any]],
    format: Format,  # noqa: A002
    several: bool,
    table: Callable[[], object],
) -> None:
    """One device as before, several as a list."""
    if several:
        show("devices", found, format, table)
    else:
        show("device", found[0], format, table)
