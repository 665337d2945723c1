"""The one command, and the only file that knows every package.

``airpeft --help`` imports nothing but Typer: each sub-command names the module that holds it, and
that module is imported when the command is used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import typer
import typer.core
from typer.core import TyperGroup

if TYPE_CHECKING:
    import click

# Nothing that we start phones home or looks for updates; a user's own setting wins.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

# name: (module, attribute, one line of help), in the order of the help page.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": (
        "simulations.demo_cli",
        "demo",
        "Run the whole loop here, with no network.",
    ),
    "simulate": ("simulations.cli", "simulate", "Train an adapter over simulated clients."),
    "aggregate": ("aggregation.cli", "aggregate", "Combine PEFT adapter folders off line."),
    "recipes": (
        "aggregation.recipes_cli",
        "recipes",
        "List the ways of combining, with their properties.",
    ),
    "server": ("federation.server_cli", "server", "Run the fleet's server: gRPC, REST, rollouts."),
    "keys": ("federation.release_cli", "keys", "Make, replace and revoke keys that sign."),
    "release": ("federation.release_cli", "release", "Make, sign, verify and revoke releases."),
    "rollout": ("federation.rollout_cli", "rollout", "Start, watch, halt and roll back a rollout."),
    "fleet": ("federation.enrolment_cli", "fleet", "List the devices; make enrolment tokens."),
    "operators": ("federation.operators_cli", "operators", "Give out and take back tokens."),
    "audit": ("federation.operators_cli", "audit", "Read the audit log; verify its chain."),
    "mirror": ("federation.mirror_cli", "mirror", "Copy releases to a stick; serve them; relay."),
    "device": ("clients.cli", "device", "Enrol and run a device."),
    "privacy": (
        "privacy.cli",
        "privacy",
        "Plan privacy, explain a statement, read a ledger, audit.",
    ),
    "doctor": ("clients.doctor", "doctor", "Check this machine and say what to do."),
}

# Verbs of a command that need packages which its own package may not import.
VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "privacy": {"audit": ("simulations.audit_cli", "audit")},
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they run, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A stand-in that carries the one line of help; see :meth:`resolve_command`."""
        if cmd_name not in COMMANDS:
            return None
        from typer.core import TyperCommand

        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][2])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The real command, imported now that it is used."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        return (name, load(name), rest) if name and stand_in else (name, stand_in, rest)


def load(name: str) -> click.Command:
    """Import one sub-command: a ``typer.Typer`` of verbs, or a single function."""
    module, attribute, _ = COMMANDS[name]
    found: Any = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command()(found)
        found = single
    there = {info.name for info in found.registered_commands}
    for verb, (place, function) in VERBS.get(name, {}).items():
        if verb not in there:
            found.command(verb)(getattr(importlib.import_module(place), function))
    command = typer.main.get_command(found)
    command.name = name
    return command


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # a traceback is for developers, and theirs is the plain one
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"airpeft {version('airpeft')}")
        raise typer.Exit


@app.callback()
def airpeft(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Federated LoRA with differential privacy, and signed over-the-air delivery.

    Start here: airpeft demo. Every command has --help with examples.
    """


def main() -> None:
    """Entry point of the ``airpeft`` command."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Typer 0.20 escapes brackets for rich even on help pages that rich does not draw.
    typer.core.HAS_RICH = False
    app(prog_name="airpeft")


if __name__ == "__main__":
    main()
