"""Commands of ``airpeft fleet`` by which devices come into it: roster, token, authorise.

The verbs for devices that are there stand in :mod:`federation.fleet_cli`.

Exit codes: 0 done; 2 bad input, or the server said no.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from federation.errors import FederationError
from federation.fleet_cli import fleet, tags_of
from federation.shown import (
    HERE,
    AsFormat,
    Format,
    Home,
    TokenFile,
    Url,
    at,
    call_operator,
    plain_errors,
    print_table,
    show,
)
from privacy.errors import PrivacyError

__all__ = ["fleet"]


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
        made = operator.make_token(device_id=device, tags=tags_of(tag), seconds=hours * 3600)
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
        made = operator.authorise_key(
            text, device_id=device, tags=tags_of(tag), seconds=days * 86400
        )
        document = {key: made[key] for key in ("enrol", "fleet", "authority_pem")}
        durable.write_bytes(out, json.dumps(document, indent=2).encode())
    data = {"file": str(out), "expires": made["expires"]}
    line = (
        f"{out}: this key's device, until {at(made['expires'])}; then: airpeft device enrol {out}"
    )
    show("authorised-key", data, format, lambda: typer.echo(line))
