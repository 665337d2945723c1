"""Commands of ``airpeft operators`` and ``airpeft audit``.

Exit codes: 0 done; 2 bad input, or the server said no; 4 the audit log is not what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from federation.operators import Role
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

BROKEN = 4

operators = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Give out and take back operators' tokens: viewer, operator, approver, admin.",
    epilog="Example: airpeft operators add ben --role approver --out ben.token",
)
audit = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Who did what, when and why; and whether the log is whole.",
    epilog="Example: airpeft audit verify --head DIGEST. Exit code 4: it is not what was written.",
)


@operators.command("add")
def add(
    name: Annotated[str, typer.Argument(help="One for each person or program.")],
    role: Annotated[Role, typer.Option(help="What the token is for.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the token (mode 0600); else it is printed.")
    ] = None,
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Make a token. It is shown once: the server keeps a digest only.

    Example: airpeft operators add ben --role approver --out ben.token
    """
    from aggregation import durable

    with plain_errors(), call_operator(home, url, token_file) as operator:
        made = operator.add_operator(name, role.value, why)
        if out is not None:
            durable.write_bytes(out, made.pop("token").encode() + b"\n", mode=0o600)
            made["file"] = str(out)
    text = f"{name} ({role}): {made.get('file') or made.get('token')}"
    show("operator", made, format, lambda: typer.echo(text))


@operators.command("list")
def list_all(
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """All operators, the revoked ones too.

    Example: airpeft operators list --format json
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        found = operator.operators()
    rows = [
        (o["name"], o["role"], at(o["created"]), at(o["revoked"]) if o["revoked"] else "")
        for o in found
    ]
    columns = ("OPERATOR", "ROLE", "CREATED", "REVOKED")
    show("operators", found, format, lambda: print_table(columns, rows, "none"))


@operators.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="Whose token is taken back.")],
    why: Why = "",
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Take a token back; it is worth nothing from now on.

    Example: airpeft operators revoke ben --why 'left the team'
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        gone = operator.revoke_operator(name, why)
    show("operator", gone, format, lambda: typer.echo(f"{name}: revoked"))


@audit.command("list")
def audit_list(
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1, max=10_000)] = 50,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """The newest lines, newest first.

    Example: airpeft audit list --limit 20
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        lines = operator.audit(limit)
    rows = [
        (line["number"], at(line["at"]), line["who"], line["action"], line["subject"], line["why"])
        for line in lines
    ]
    columns = ("LINE", "WHEN", "WHO", "ACTION", "WHAT", "WHY")
    show("audit", lines, format, lambda: print_table(columns, rows, "nothing has been done yet"))


@audit.command("verify")
def audit_verify(
    head: Annotated[
        str | None, typer.Option(help="A digest noted before; it must still be in the log.")
    ] = None,
    home: Home = HERE,
    url: Url = None,
    token_file: TokenFile = None,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Follow the chain of digests from the first line; note the head for the next time.

    Example: airpeft audit verify --head 3f5c...
    """
    with plain_errors(), call_operator(home, url, token_file) as operator:
        found = operator.verify_audit(head)

    def table() -> None:
        if found["sound"]:
            typer.echo(f"{found['lines']} lines, whole; head {found['head']}")
        elif found["broken_at"] is not None:
            typer.echo(f"BROKEN at line {found['broken_at']}: changed, removed or put in")
        else:
            typer.echo("BROKEN: the head that was noted is not in the log: its end was cut off")

    show("audit-verify", found, format, table)
    if not found["sound"]:
        raise typer.Exit(BROKEN)
