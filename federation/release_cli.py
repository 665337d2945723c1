"""``airpeft release``: sign, publish, list and show releases; the other verbs are beside it.

Making asks the server (or a copy of its metadata) what is current; signing needs neither network
nor server; publishing sends the signed release to the server, which counts the signatures itself.

Exit codes: 0 done; 1 refused or failed (too few signatures, no answer, does not verify); 2 bad
input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from federation import release_make_cli, release_verify_cli, release_wrap_cli
from federation.cli_support import (
    Format,
    FormatOption,
    PassphraseFile,
    errors,
    fail,
    show_fields,
    show_json,
    show_table,
)
from federation.key_change_cli import keys
from federation.plain_text import plain
from federation.release_app import release
from federation.release_source import Copy, Home, TokenFile, Url, known_releases, server
from federation.release_words import accuracy, day, epsilon, show_release
from federation.signing_cli import Keys, Out, Publics, Root, signers

__all__ = ["keys", "release", "release_make_cli", "release_verify_cli", "release_wrap_cli"]

Request = Annotated[Path, typer.Argument(help="Folder of the request.")]


@release.command(
    epilog="Examples: airpeft release sign r1 --key adapters-1.pem --key adapters-2.pem | "
    "airpeft release sign r1 --key adapters-3.pem --root root.json --out signature.json | "
    "airpeft release sign r1 --key 'command:sign-with-vault adapters-2' "
    "--public adapters-2.pub.json",
)
def sign(
    request: Request,
    key: Keys,
    public: Publics = None,
    out: Out = None,
    root: Root = None,
    passphrase_file: PassphraseFile = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Add signatures to a request for a release or a revocation. Needs no network.

    A key that has not signed the current list of releases itself needs a root that you trust.
    """
    from federation import release as releases
    from federation.keys import key_name

    if out is not None and len(key) > 1:
        fail("--out takes one signature: give one --key", 2)
    rows = []
    with errors():
        waiting = releases.read_any(request)
        trusted = [path.read_bytes() for path in root or ()]
        for signer in signers(key, public, passphrase_file):
            file = releases.sign_request(waiting, signer, out=out, roots=trusted)
            rows.append({"key": key_name(signer.public_key), "signature": str(file)})
    if output is Format.JSON:
        show_json("signatures", {"release": waiting.name, "signatures": rows})
        return
    if isinstance(waiting, releases.ReleaseRequest):
        record = waiting.record
        typer.echo(f"{record.name}: {record.length} bytes, sha256 {record.sha256}")
        if record.statement.forced:
            reason = plain(record.statement.forced)
            typer.echo(f"worse than its parent, and released because: {reason}")
    else:
        show_revocation(Format.TABLE, releases.describe_revocation(waiting))
    show_table(["key", "signature"], [[row["key"], row["signature"]] for row in rows])


@release.command(
    epilog="Examples: airpeft release publish r1 --home ./fleet | "
    "airpeft release publish r1 --url http://127.0.0.1:8443 --token-file token "
    "--signature from-carol.json",
)
def publish(
    request: Request,
    signature: Annotated[
        list[Path] | None, typer.Option(help="A signature file; may be repeated.")
    ] = None,
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Send a signed release or revocation to the server. Doing it again changes nothing."""
    from federation import release as releases

    with errors():
        waiting = releases.read_any(request)
        with server(home, url, token_file) as operator:
            if isinstance(waiting, releases.ReleaseRequest):
                signed = releases.assemble(request, signature or ())
                operator.publish_release(*signed, wraps=releases.read_wraps(waiting))
            else:
                revocation = releases.assemble_revocation(request, signature or ())
                operator.publish_revocation(revocation)
    if isinstance(waiting, releases.ReleaseRequest):
        show_release(output, releases.describe(waiting.record))
        return
    show_revocation(output, releases.describe_revocation(waiting))


@release.command(name="list", epilog="Example: airpeft release list --home ./fleet --format json")
def list_releases(
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """List the releases that the adapter keys vouch for."""
    with errors():
        rows = known_releases(home, url, token_file, repository)
    if output is Format.JSON:
        show_json("releases", rows)
        return
    show_table(
        ["release", "bytes", "read by", "epsilon", "accuracy", "floor", "made", "base", "revoked"],
        [
            [
                row["release"],
                row["length"],
                "key holders" if row.get("seal") else "all",
                epsilon(row["privacy"]),
                accuracy(row["evaluation"]),
                max(row["floor"], row["channel_floor"]) or "-",
                day(row["made_unix"]),
                row["base_digest"][7:19],
                row["revoked"] or "-",
            ]
            for row in rows
        ],
    )


@release.command(
    epilog="Examples: airpeft release show stable-3 --home ./fleet | airpeft release show ./r1"
)
def show(
    name: Annotated[str, typer.Argument(help="A release, such as stable-3, or a request.")],
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Show one release, or a request with the signatures it has so far."""
    from federation import release as releases
    from federation.published import NotFoundError

    with errors():
        if Path(name).exists():
            waiting, by = releases.read_any(Path(name)), releases.signed_so_far(Path(name))
            if not isinstance(waiting, releases.ReleaseRequest):
                show_revocation(output, {**releases.describe_revocation(waiting), "signed_by": by})
                return
            data = {**releases.describe(waiting.record), "signed_by": by}
        else:
            rows = known_releases(home, url, token_file, repository)
            found = [row for row in rows if row["release"] == name]
            if not found:
                known = ", ".join(row["release"] for row in rows[-5:]) or "none yet"
                raise NotFoundError(f"no release {name!r}; the latest are: {known}")
            data = found[0]
    show_release(output, data)


def show_revocation(output: Format, data: dict[str, Any]) -> None:
    """A revocation, for people or for programs."""
    if output is Format.JSON:
        show_json("revocation", data)
        return
    fields = {one["release"]: f"revoked: {one['why']}" for one in data["revoked"]}
    fields |= {f"floor of {c}": str(n) for c, n in data["floors"].items()}
    if "signed_by" in data:
        fields["signed by"] = ", ".join(data["signed_by"]) or "nobody yet"
    show_fields(fields)
