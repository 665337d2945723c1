"""``airpeft device``: enrol a device, run it, ask how it is.

Exit codes: 0 done; 1 the server cannot be reached or refuses; 2 bad input (not enrolled, no such
base, unreadable file, port taken, folder not writable).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from aggregation.output import AsFormat, Format, envelope

device = typer.Typer(
    name="device",
    help="Run a device: it serves predictions and keeps its adapter up to date.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    epilog="Example: airpeft device enrol enrol.json --home ./device-1, then airpeft device run "
    "--home ./device-1. Exit codes: 0 done, 1 server unreachable or refusing, 2 bad input.",
)

Home = Annotated[Path, typer.Option("--home", help="The device's home folder.")]


@device.command(
    epilog="Example: airpeft device enrol enrol.json --home ./device-1 --base minilm",
)
def enrol(
    bundle: Annotated[
        Path, typer.Argument(help="Enrolment file, of 'airpeft fleet token' or 'fleet authorise'.")
    ],
    home: Home,
    base: Annotated[str, typer.Option(help="Base model: a known name or a folder.")] = "minilm",
    output: AsFormat = Format.TABLE,
) -> None:
    """Get this device's certificate, for a one-time token or for an authorised key."""
    from clients.device_enrolment import enrol_device

    with _errors():
        who = enrol_device(home, bundle, base=base)
    data = {"device_id": who.device_id, "fleet": who.fleet, "home": str(home)}
    _show("enrolment", data, output)


@device.command(epilog="Example: airpeft device key --home ./device-1 > kitchen.pem")
def key(home: Home) -> None:
    """Print this device's public key, made if it has none, for 'airpeft fleet authorise'."""
    from clients import identity

    with _errors():
        typer.echo(identity.public_key_of(identity.key_of(home)).decode(), nl=False)


@device.command(
    epilog="Example: airpeft device run --home ./device-1 --heldout mine.jsonl --port 8080",
)
def run(
    home: Home,
    base: Annotated[str | None, typer.Option(help="Base model: a known name or a folder.")] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Own labelled examples (.jsonl, .csv, .tsv); they never leave."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Local endpoint; 0 takes a free one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text looked at.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="How much accuracy may fall with a new release, 0 to 1.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="fleet, https://... or a folder; repeatable, asked in this order."),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = None,
    die_with_parent: Annotated[
        bool, typer.Option("--die-with-parent", help="End when the starting process ends (Linux).")
    ] = False,
) -> None:
    """Serve predictions on the loopback address until SIGTERM or Ctrl-C.

    Settings may also stand in HOME/device.toml or in AIRPEFT_DEVICE_... variables.
    """
    from clients import signals
    from clients.device import run_device
    from clients.device_settings import DeviceSettings

    stop = threading.Event()
    signals.stop_on_signals(stop)
    with _errors():
        if die_with_parent:
            signals.die_with_parent()
        flags = {
            "base": base,
            "heldout": heldout,
            "port": port,
            "threads": threads,
            "max_length": max_length,
            "quality_tolerance": tolerance,
            "sources": tuple(source) if source else None,
            "log_level": log_level,
        }
        settings = DeviceSettings.read(home, flags)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("airpeft").setLevel(settings.log_level)
        run_device(home, settings, stop=stop, ready=_say_ready)


@device.command(epilog="Example: airpeft device status --home ./device-1 --format json")
def status(home: Home, output: AsFormat = Format.TABLE) -> None:
    """Show what serves, and whether the fleet is reached."""
    from clients.device import read_status

    with _errors():
        data = read_status(home)
    _show("device-status", data, output)


def _say_ready(url: str) -> None:
    typer.echo(f"serving on {url}")
    sys.stdout.flush()


def _show(schema: str, data: dict[str, Any], output: Format) -> None:
    if output is Format.JSON:
        typer.echo(json.dumps(envelope(schema, data), sort_keys=True))
        return
    width = max(len(key) for key in data)
    for key, value in data.items():
        typer.echo(f"{key.replace('_', ' '):<{width}}  {value}")


@contextmanager
def _errors() -> Iterator[None]:
    from aggregation.errors import AggregationError
    from clients.connection import ConnectionLost, Denied
    from clients.errors import ClientError

    try:
        yield
    except (ConnectionLost, Denied) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except (ClientError, AggregationError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
