"""``airpeft server``. Exit codes: 0 ended by a signal; 2 it cannot start, and says why."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federation.errors import FederationError
from federation.shown import HERE, Home, plain_errors

if TYPE_CHECKING:
    import sqlalchemy as sa

ADDRESS_VARIABLE = "AIRPEFT_DATABASE"
PASSWORD_VARIABLE = "AIRPEFT_DATABASE_PASSWORD"  # noqa: S105  # the variable's name


def server(
    home: Home = HERE,
    host: Annotated[str, typer.Option(help="Address for devices.")] = "127.0.0.1",
    advertise: Annotated[
        str | None, typer.Option(help="Host that devices shall dial, if not --host.")
    ] = None,
    fleet_port: Annotated[int, typer.Option(help="0: that of the last start, or free.")] = 0,
    enrol_port: Annotated[int, typer.Option(help="0: that of the last start, or free.")] = 0,
    api_port: Annotated[int, typer.Option(help="On loopback; 0: likewise.")] = 0,
    offline_keys: Annotated[
        Path | None,
        typer.Option(help="Root and adapter keys made before (airpeft keys init)."),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(help="Passphrase of offline keys; or AIRPEFT_KEY_PASSPHRASE."),
    ] = None,
    heartbeat_seconds: Annotated[float, typer.Option(min=0.1, help="On idle streams.")] = 60.0,
    certificate_days: Annotated[
        float, typer.Option(min=0.01, max=3650, help="Life of a device certificate.")
    ] = 30.0,
    alone_share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the fleet (at least one device) that one operator reaches alone; beyond"
            " it every rollout needs --two-person.",
        ),
    ] = None,
    new_admin_token: Annotated[
        bool, typer.Option("--new-admin-token", help="Replace the operator's token.")
    ] = False,
    database: Annotated[
        str | None,
        typer.Option(
            help="PostgreSQL instead of SQLite, as postgresql+psycopg://USER@HOST:PORT/NAME; or"
            " AIRPEFT_DATABASE. A password goes into AIRPEFT_DATABASE_PASSWORD, into a file or"
            " into ~/.pgpass, never into this option."
        ),
    ] = None,
    database_password_file: Annotated[
        Path | None, typer.Option(help="File with the database's password.")
    ] = None,
    gateway: Annotated[
        str | None,
        typer.Option(help="Name of this one, where several share --home and --database."),
    ] = None,
    die_with_parent: Annotated[
        bool, typer.Option("--die-with-parent", help="End when the starting process ends.")
    ] = False,
) -> None:
    """Run the fleet's server: gRPC for devices, REST for operators, rollouts.

    The first start makes everything in the home folder: authority, keys, repository, database,
    operator's token. endpoints.json appears there when the server answers.

    Example: airpeft server --home fleet-server --host 0.0.0.0 --advertise fleet.example.org

    One of several gateways: airpeft server --home /srv/fleet --gateway west --database
    postgresql+psycopg://fleet@db.example.org/airpeft --database-password-file /etc/airpeft/db
    """
    from federation.first_start import Passphrases
    from federation.server import ServerConfig, run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for noisy in ("alembic", "uvicorn", "tuf"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with plain_errors():
        run(
            ServerConfig(
                home=home,
                host=host,
                advertise=advertise,
                fleet_port=fleet_port,
                enrol_port=enrol_port,
                api_port=api_port,
                offline_keys=offline_keys,
                passphrases=Passphrases(offline=_passphrase(passphrase_file)),
                heartbeat_seconds=heartbeat_seconds,
                certificate_days=certificate_days,
                alone_share=alone_share,
                new_admin_token=new_admin_token,
                die_with_parent=die_with_parent,
                database=_database(database, database_password_file),
                gateway=gateway,
            )
        )


def _database(option: str | None, password_file: Path | None) -> sa.URL | None:
    """The address of the database, if it is not the file in the home.

    Raises:
        FederationError: a password on the command line, a file that cannot be read, or no address.
    """
    from federation.postgres import has_password, read_address

    if option is not None and has_password(option):
        raise FederationError(
            "--database holds a password, which everybody on this machine can read in the list of"
            f" processes: leave it out, and give it by {PASSWORD_VARIABLE},"
            " --database-password-file or ~/.pgpass"
        )
    address = option or os.environ.get(ADDRESS_VARIABLE)
    if not address:
        return None
    password = os.environ.get(PASSWORD_VARIABLE) or None
    if password_file is not None:
        password = _first_line(password_file, "the database's password")
    return read_address(address, password)


def _passphrase(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("AIRPEFT_KEY_PASSPHRASE") or None
    try:
        return file.read_text().rstrip("\n") or None
    except (OSError, UnicodeDecodeError) as error:
        raise FederationError(f"cannot read the passphrase file {file}: {error}") from error


def _first_line(file: Path, what: str) -> str | None:
    try:
        return file.read_text().partition("\n")[0].rstrip("\r") or None
    except (OSError, UnicodeDecodeError) as error:
        raise FederationError(f"cannot read {what} from {file}: {error}") from error
