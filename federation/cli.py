"""Commands of the server's side: ``airpeft server``, ``airpeft fleet``, ``airpeft rollout``.

Exit codes: 0 done; 2 bad input, or the server said no.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from federation.devices_shown import print_devices
from federation.errors import FederationError
from federation.rollout_cli import rollout
from federation.server_cli import server
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
from privacy.errors import PrivacyError

__all__ = ["fleet", "rollout", "server"]

fleet = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="List the devices; make enrolment tokens; revoke certificates.",
    epilog="Example: airpeft fleet list",
)


WhereOption = Annotated[
    str,
    typer.Option("--where", help='Filter, as: tag.site == "north" and memory_bytes >= 2e9'),
]


@fleet.command("list")
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


@fleet.command("tag")
def fleet_tag(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    tag: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE; any number.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="KEY; repeatable.")] = None,
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Set or remove tags; waves and filters pick devices by them.

    Example: airpeft fleet tag kitchen site=north ring=canary --remove spare
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        changes: dict[str, str | None] = {**_tags(tag), **dict.fromkeys(remove or [])}
        one = operator.tag(device, changes, why)
    show("device", one, format, lambda: print_devices([one]))


@fleet.command("show")
def fleet_show(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """One device and its newest reports.

    Example: airpeft fleet show d-0a1b2c3d4e --home fleet-server
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        one = operator.device(device)

    def table() -> None:
        print_devices([one])
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


@fleet.command("roster")
def fleet_roster(
    out: Annotated[Path, typer.Argument(help="The roster, a new file.")],
    certificates: Annotated[
        list[Path], typer.Argument(help="identity/certificate.pem of each device of the cohort.")
    ],
    authority: Annotated[
        Path | None, typer.Option(help="identity/authority.pem: it must have issued them all.")
    ] = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Whose signatures count in a secure sum: a roster of devices, and its digest to be pinned.

    Made from certificates that somebody has collected whom the devices trust, away from the server;
    every device gets the file, and the digest by another way.

    Example: airpeft fleet roster cohort.json certificates/*.pem --authority authority.pem
    """
    from aggregation.durable import write_bytes
    from privacy.secure_roster import Roster

    with plain_errors():
        try:
            issuer = authority.read_bytes() if authority else b""
            roster = Roster.of_certificates([path.read_bytes() for path in certificates], issuer)
            if out.exists():
                raise FederationError(f"{out} is there already: choose another name")
            write_bytes(out, roster.to_bytes())
        except (OSError, PrivacyError) as error:
            raise FederationError(str(error)) from None
    said = {"roster": str(out), "digest": roster.digest, "members": sorted(roster.members)}
    rows = [(said["roster"], roster.digest, str(len(roster.members)))]
    show("roster", said, format, lambda: print_table(("ROSTER", "DIGEST", "MEMBERS"), rows, ""))


@fleet.command("token")
def fleet_token(
    out: Annotated[Path, typer.Option(help="File for the device (mode 0600).")],
    device: Annotated[str | None, typer.Option(help="Name it shall have; else random.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeatable.")] = None,
    hours: Annotated[float, typer.Option(help="How long the token can be used.")] = 24.0,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Make a one-time enrolment file for one device.

    Example: airpeft fleet token --out enrol.json --device kitchen --tag site=north
    """
    from aggregation import durable

    with plain_errors(), call_operator(home, url, token_file) as operator:
        made = operator.make_token(device_id=device, tags=_tags(tag), seconds=hours * 3600)
        document = {key: made[key] for key in ("enrol", "fleet", "token", "authority_pem")}
        durable.write_bytes(out, json.dumps(document, indent=2).encode(), mode=0o600)
    data = {"file": str(out), "expires": made["expires"]}
    text = f"{out}: one device, until {at(made['expires'])}; then: airpeft device enrol {out}"
    show("enrolment-token", data, format, lambda: typer.echo(text))


@fleet.command("authorise")
def fleet_authorise(
    key: Annotated[Path, typer.Argument(help="Public key (PEM), from: airpeft device key")],
    out: Annotated[Path, typer.Option(help="File for the device; it holds no secret.")],
    device: Annotated[str | None, typer.Option(help="Name it shall have; else random.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeatable.")] = None,
    days: Annotated[float, typer.Option(help="How long it can be used.")] = 90.0,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Let the device with this key enrol without a token.

    Example: airpeft fleet authorise kitchen.pem --out enrol.json --device kitchen
    """
    from aggregation import durable

    with plain_errors(), call_operator(home, url, token_file) as operator:
        try:
            text = key.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FederationError(f"cannot read the public key {key}: {error}") from error
        made = operator.authorise_key(text, device_id=device, tags=_tags(tag), seconds=days * 86400)
        document = {key: made[key] for key in ("enrol", "fleet", "authority_pem")}
        durable.write_bytes(out, json.dumps(document, indent=2).encode())
    data = {"file": str(out), "expires": made["expires"]}
    line = (
        f"{out}: this key's device, until {at(made['expires'])}; then: airpeft device enrol {out}"
    )
    show("authorised-key", data, format, lambda: typer.echo(line))


@fleet.command("revoke")
def fleet_revoke(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    serial: Annotated[
        str | None, typer.Option(help="Only this certificate (hex); the device may renew.")
    ] = None,
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Never admit a device again; its open stream is cut.

    Example: airpeft fleet revoke kitchen --why stolen
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        one = operator.revoke(device, why, serial)
    show("device", one, format, lambda: typer.echo(f"{device}: revoked"))


@fleet.command("lagging")
def fleet_lagging(
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    hours: Annotated[float, typer.Option(help="Silent for longer than this.")] = 24.0,
    metadata_hours: Annotated[
        float | None,
        typer.Option(help="Without newer metadata for longer than this; by default as --hours."),
    ] = None,
    where: WhereOption = "",
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Devices that were silent for long, or have old metadata: off, cut off, or held back.

    Example: airpeft fleet lagging --hours 48 --metadata-hours 12
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        devices = operator.devices(where)
    oldest = time.time() - hours * 3600
    allowed = hours if metadata_hours is None else metadata_hours
    late = [
        d
        for d in devices
        if not d["revoked"]
        and (
            (not d["connected"] and (d["last_seen"] or 0) < oldest)
            or (d["metadata_hours"] or 0.0) > max(0.0, allowed)
        )
    ]
    show("devices", late, format, lambda: print_devices(late, f"none for {hours:g} h"))


def _tags(given: list[str] | None) -> dict[str, str]:
    tags = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise FederationError(f"--tag {text!r} is not of the form KEY=VALUE")
        tags[key] = value
    return tags
