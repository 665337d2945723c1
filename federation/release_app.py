"""The command group ``airpeft release``; its verbs are in modules of their own."""

from __future__ import annotations

import typer

release = typer.Typer(
    name="release",
    help="Make, sign, publish, verify and revoke releases.",
    epilog="Example: airpeft release make ./run/adapter --channel stable --home ./fleet -o r1 && "
    "airpeft release sign r1 --key root/adapters-1.pem --key root/adapters-2.pem && "
    "airpeft release publish r1 --home ./fleet",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
