"""``airpeft keys``: rotate, revoke, renew, delegate; signing and publishing are beside it.

Each of them writes a request, from what the server (or a copy of its metadata) says now. Signing
needs that folder and a private key, and no network. Publishing sends the signed files to the
server, which counts the signatures as devices will.

Exit codes: 0 done; 1 refused or failed; 2 bad input.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation import key_sign_cli
from federation.cli_support import (
    DryRun,
    Format,
    FormatOption,
    PassphraseFile,
    errors,
    fail,
    optional_passphrase,
    show_json,
)
from federation.keys_cli import keys
from federation.release_source import Copy, Home, TokenFile, Url, offline_files

if TYPE_CHECKING:
    from federation.key_change import KeyChange

__all__ = ["key_sign_cli", "keys"]

OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the request, new.")]
Threshold = Annotated[
    list[str] | None, typer.Option(help="CIRCLE=N: signatures needed from now on.")
]
Online = Annotated[
    bool, typer.Option("--online", help="Replace the server's online key; makes one in --home.")
]


@keys.command(
    epilog="Examples: airpeft keys rotate --replace root-2=bob/root-4.pub.json "
    "--home ./fleet -o change | "
    "airpeft keys rotate --online --home ./fleet --why 'every year' -o change | "
    "airpeft keys rotate --add adapters=dora/adapters-4.pub.json --threshold adapters=3 "
    "--repository ./copy -o change",
)
def rotate(
    out: OutFolder,
    replace: Annotated[
        list[str] | None, typer.Option(help="OLD=NEW.pub.json: a key for another.")
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option(help="CIRCLE=NEW.pub.json: a key more (root, adapters).")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Name of a key to take out.")] = None,
    online: Online = False,
    threshold: Threshold = None,
    why: Annotated[str, typer.Option(help="For the signers and the audit log.")] = "",
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    passphrase_file: PassphraseFile = None,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a request to replace keys, add some, take some out, or change a threshold.

    A new root is signed by a threshold of the old root keys and of the new ones.
    """
    with errors():
        files, _ = offline_files(home, url, token_file, repository)
        parts = _Parts(files)
        for text in replace or ():
            parts.swap(*_pair(text, "--replace OLD=NEW.pub.json"))
        for text in add or ():
            parts.join(*_pair(text, "--add CIRCLE=NEW.pub.json"))
        parts.drop += drop or []
        if online:
            parts.replace_online(home, passphrase_file, dry_run)
        _make(out, files, parts.change(_numbers(threshold)), why, dry_run, output)


@keys.command(
    epilog="Examples: airpeft keys revoke adapters-1 --by dora/adapters-4.pub.json "
    "--why 'laptop stolen' --home ./fleet -o change | "
    "airpeft keys revoke online --online --why 'server broken into' --home ./fleet -o change",
)
def revoke(
    names: Annotated[list[str], typer.Argument(help="Keys that count no more, by name.")],
    out: OutFolder,
    why: Annotated[str, typer.Option(help="What happened; for the signers and the audit log.")],
    by: Annotated[
        list[Path] | None, typer.Option(help="Key that takes its place; in the order of the names.")
    ] = None,
    online: Online = False,
    threshold: Threshold = None,
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    passphrase_file: PassphraseFile = None,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a request to revoke keys: what they have signed counts no more, on every device.

    The root lists a revoked key for good, so that an old file which still names it can't bring it
    back. After a theft of the online key, publish with --hold.
    """
    with errors():
        files, _ = offline_files(home, url, token_file, repository)
        parts = _Parts(files)
        named = [n for n in names if not (online and parts.is_online(n))]
        if len(by or ()) > len(named):
            fail(f"--by is given {len(by or ())} times for {len(named)} names", 2)
        for number, name in enumerate(named):
            if by and number < len(by):
                parts.swap(name, by[number])
            else:
                parts.drop.append(name)
        if online:
            parts.replace_online(home, passphrase_file, dry_run)
        _make(out, files, parts.change(_numbers(threshold)), why, dry_run, output)


@keys.command(epilog="Example: airpeft keys renew --home ./fleet -o renewal")
def renew(
    out: OutFolder,
    why: Annotated[str, typer.Option(help="For the signers and the audit log.")] = "renewal",
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a request to date every offline file anew, before it expires; no key changes."""
    from federation.key_change import KeyChange

    with errors():
        files, _ = offline_files(home, url, token_file, repository)
        _make(out, files, KeyChange(renew=True), why, dry_run, output)


@keys.command(
    epilog="Example: airpeft keys delegate adapters-acme --channel 'acme-*' --key a/a-1.pub.json "
    "--key b/a-2.pub.json --key c/a-3.pub.json --home ./fleet -o change",
)
def delegate(
    role: Annotated[str, typer.Argument(help="Name of the new role: adapters-NAME.")],
    channel: Annotated[
        list[str], typer.Option(help="Channel it signs for, or 'prefix-*'; may be repeated.")
    ],
    key: Annotated[list[Path], typer.Option(help="Public half of one of its keys.")],
    out: OutFolder,
    threshold: Annotated[int, typer.Option(min=1, help="How many of its keys must sign.")] = 2,
    why: Annotated[str, typer.Option(help="For the signers and the audit log.")] = "",
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    dry_run: DryRun = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a request for a role with keys of its own, for one tenant or one base model.

    From then on nobody else signs releases of its channels. A role can never be taken away.
    """
    from federation.key_change import KeyChange
    from federation.keys import read_public

    with errors():
        files, _ = offline_files(home, url, token_file, repository)
        change = KeyChange(
            delegate={role: tuple(channel)},
            add={role: tuple(read_public(path) for path in key)},
            thresholds={role: threshold},
        )
        _make(out, files, change, why, dry_run, output)


class _Parts:
    """A change while its options are read."""

    def __init__(self, files: dict[str, bytes]) -> None:
        from federation.key_change import Offline

        self.circles = Offline.parse(files).circles()
        self.drop: list[str] = []
        self.add: dict[str, list[Any]] = {}

    def swap(self, old: str, new: Path) -> None:
        from federation.circles import find_key

        circle, _ = find_key(old, self.circles)
        self.drop.append(old)
        self.join(circle, new)

    def join(self, circle: str, new: Path) -> None:
        from federation.keys import read_public

        self.add.setdefault(circle, []).append(read_public(new))

    def is_online(self, name: str) -> bool:
        return name in ("online", *self.circles["online"].names)

    def replace_online(self, home: Path | None, secret: Path | None, dry_run: bool) -> None:
        from federation.online_keys import new_online_key, newest_file

        if home is None:
            fail(
                "--online makes the new key on the server's own disk: run it there, with --home", 2
            )
            raise AssertionError
        if dry_run:
            fail("--online makes a key, which a --dry-run must not: leave one of them out", 2)
        (old,) = self.circles["online"].keys
        self.swap(old, new_online_key(home, optional_passphrase(secret, newest_file(home))))

    def change(self, thresholds: dict[str, int]) -> KeyChange:
        from federation.key_change import KeyChange

        added = {circle: tuple(found) for circle, found in self.add.items()}
        return KeyChange(drop=tuple(self.drop), add=added, thresholds=thresholds)


def _make(
    out: Path, files: dict[str, bytes], change: KeyChange, why: str, dry_run: bool, output: Format
) -> None:
    from federation.circles import differences
    from federation.key_change import Offline, plan
    from federation.key_request import make_change
    from federation.key_words import show_progress

    now = datetime.now(UTC)
    if dry_run:
        before = Offline.parse(files)
        after = plan(before, change, now).over(before)
        lines = list(differences(before.circles(), after.circles()))
        if output is Format.JSON:
            show_json("key-change", {"changes": lines})
        else:
            typer.echo("\n".join(lines) or "new dates, the same keys")
        return
    make_change(out, published=files, change=change, why=why, now=now)
    show_progress(output, out)
    if output is Format.TABLE:
        typer.echo(
            f"\nnext: airpeft keys sign {out} --key KEY.pem, then airpeft keys publish {out}"
        )


def _pair(text: str, form: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        fail(f"{text!r} is not of the form {form}", 2)
    return name, Path(path)


def _numbers(texts: list[str] | None) -> dict[str, int]:
    found = {}
    for text in texts or ():
        circle, _, number = text.partition("=")
        if not number.isascii() or not number.isdigit():
            fail(f"--threshold {text!r} is not CIRCLE=N", 2)
        found[circle] = int(number)
    return found
