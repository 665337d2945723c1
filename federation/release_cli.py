"""``airpeft release``: make, sign, publish, list, show and verify releases.

Making asks the server (or a copy of its metadata) what is current; signing needs neither network
nor server; publishing sends the signed release to the server, which counts the signatures itself.

Exit codes: 0 done; 1 refused or failed (too few signatures, no answer, does not verify); 2 bad
input.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from federation.cli_support import (
    Format,
    FormatOption,
    PassphraseFile,
    errors,
    fail,
    passphrase,
    show_json,
    show_table,
)
from federation.keys_cli import keys
from federation.release_source import (
    Copy,
    Home,
    TokenFile,
    Url,
    current_adapters,
    known_releases,
    server,
)
from federation.release_words import accuracy, day, epsilon, show_release

if TYPE_CHECKING:
    from federation.keys import Signer
    from federation.verification import RoleSeal
    from protos.signed import Evaluation

__all__ = ["keys", "release"]

release = typer.Typer(
    name="release",
    help="Make, sign, publish and verify releases.",
    epilog="Example: airpeft release make ./run/adapter --channel stable --home ./fleet -o r1 && "
    "airpeft release sign r1 --key root/adapters-1.pem --key root/adapters-2.pem && "
    "airpeft release publish r1 --home ./fleet",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


class Dtype(StrEnum):
    """Number format of a payload."""

    BF16 = "bf16"
    F32 = "f32"
    INT8 = "int8"


Request = Annotated[Path, typer.Argument(help="Folder of the request.")]


@release.command(
    epilog="Examples: airpeft release make ./run/adapter --channel stable --home ./fleet -o r1 | "
    "airpeft release make ./run/adapter --channel stable --repository ./copy -o r1 "
    "--evaluation heldout:0.8425:400 --floor 2 --notes 'security fix'",
)
def make(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, in PEFT's layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the request, new.")],
    channel: Annotated[str, typer.Option(help="Line of releases that it continues.")] = "stable",
    home: Home = None,
    url: Url = None,
    token_file: TokenFile = None,
    repository: Copy = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the payload.")] = Dtype.BF16,
    floor: Annotated[
        int | None, typer.Option(help="No device installs a lower counter from now on.")
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Engine that can serve it; may be repeated.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="SET:ACCURACY:EXAMPLES, instead of the folder's own.")
    ] = None,
    base_digest: Annotated[
        str | None, typer.Option(help="sha256:..., for a folder that other software wrote.")
    ] = None,
    notes: Annotated[str, typer.Option(help="For people.")] = "",
    output: FormatOption = Format.TABLE,
) -> None:
    """Turn an adapter into a request for signatures."""
    from federation.release import ReleaseOptions, describe, make_request

    with errors():
        options = ReleaseOptions(
            channel=channel,
            dtype=dtype.value,
            floor=floor,
            runtime=tuple(runtime or ("torch",)),
            notes=notes,
            base_digest=base_digest,
            evaluation=_evaluation(evaluation),
        )
        current = current_adapters(home, url, token_file, repository)
        request = make_request(
            adapter, out, adapters=current, options=options, now=datetime.now(UTC)
        )
    show_release(output, {"request": str(out), **describe(request.record)})
    if output is Format.TABLE:
        typer.echo(f"\nnext: airpeft release sign {out} --key KEY.pem   (two different keys)")


@release.command(
    epilog="Examples: airpeft release sign r1 --key adapters-1.pem --key adapters-2.pem | "
    "airpeft release sign r1 --key adapters-3.pem --out signature.json",
)
def sign(
    request: Request,
    key: Annotated[list[Path], typer.Option("--key", help="A private key; may be repeated.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Signature file; else inside the request.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Add signatures to a request. Needs no network, and nothing but the request and the key."""
    from federation import release as releases
    from federation.keys import key_name

    if out is not None and len(key) > 1:
        fail("--out takes one signature: give one --key", 2)
    rows = []
    with errors():
        record = releases.read_request(request).record
        for path in key:
            signer = _signer(path, passphrase_file)
            file = releases.sign(request, signer, out=out)
            rows.append({"key": key_name(signer.public_key), "signature": str(file)})
    if output is Format.JSON:
        show_json("signatures", {"release": record.name, "signatures": rows})
        return
    typer.echo(f"{record.name}: {record.length} bytes, sha256 {record.sha256}")
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
    """Send a signed release to the server. Doing it again changes nothing."""
    from federation.release import assemble, describe, read_request

    with errors():
        metadata, payload = assemble(request, signature or ())
        record = read_request(request).record
        with server(home, url, token_file) as operator:
            operator.publish_release(metadata, payload)
    show_release(output, describe(record))


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
        ["release", "bytes", "epsilon", "accuracy", "floor", "made", "base"],
        [
            [
                row["release"],
                row["length"],
                epsilon(row["privacy"]),
                accuracy(row["evaluation"]),
                row["floor"] or "-",
                day(row["made_unix"]),
                row["base_digest"][7:19],
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
    from federation.published import NotFoundError
    from federation.release import describe, read_request, signed_so_far

    with errors():
        if Path(name).exists():
            request = read_request(Path(name))
            data = {**describe(request.record), "signed_by": signed_so_far(Path(name))}
        else:
            rows = known_releases(home, url, token_file, repository)
            found = [row for row in rows if row["release"] == name]
            if not found:
                known = ", ".join(row["release"] for row in rows[-5:]) or "none yet"
                raise NotFoundError(f"no release {name!r}; the latest are: {known}")
            data = found[0]
    show_release(output, data)


@release.command(
    epilog="Example: airpeft release verify ./copy-of-the-repository --root root.json",
)
def verify(
    folder: Annotated[Path, typer.Argument(help="The repository, or a copy of it.")],
    root: Annotated[Path, typer.Option("--root", help="The root metadata that you trust.")],
    output: FormatOption = Format.TABLE,
) -> None:
    """Judge a repository by its root alone: who signed what, and when."""
    from federation.release import describe
    from federation.verification import verify_repository

    with errors():
        report = verify_repository(folder, root.read_bytes(), now=datetime.now(UTC))
        seals = [_seal(seal) for seal in report.roles]
        releases = [{**describe(r.record), "payload": r.payload} for r in report.releases]
    if output is Format.JSON:
        data = {"sound": report.sound, "roles": seals, "releases": releases}
        show_json("verification", {**data, "round": report.round.to_custom()})
    else:
        show_table(
            ["role", "version", "signed by", "needed", "made", "expires"],
            [
                [
                    s["role"],
                    s["version"],
                    ", ".join(s["signed_by"]),
                    s["threshold"],
                    s["made"] or "-",
                    f"{s['expires']}{'  EXPIRED' if s['expired'] else ''}",
                ]
                for s in seals
            ],
        )
        typer.echo("")
        show_table(
            ["release", "payload", "sha256"],
            [[r["release"], r["payload"], r["sha256"]] for r in releases],
        )
    if not report.sound:
        fail("something has expired, or a payload is not the signed one: see above", 1)


def _seal(seal: RoleSeal) -> dict[str, Any]:
    return {
        "role": seal.role,
        "version": seal.version,
        "signed_by": list(seal.signed_by),
        "threshold": seal.threshold,
        "made": seal.made.isoformat() if seal.made else None,
        "expires": seal.expires.isoformat(),
        "expired": seal.expired,
    }


def _signer(path: Path, passphrase_file: Path | None) -> Signer:
    from federation.keys import is_encrypted, load_signer

    secret = passphrase(passphrase_file, what=str(path)) if is_encrypted(path) else None
    return load_signer(path, secret)


def _evaluation(text: str | None) -> Evaluation | None:
    from federation.provenance import ProvenanceError, evaluation

    if text is None:
        return None
    name, _, rest = text.partition(":")
    accuracy, _, examples = rest.partition(":")
    try:
        return evaluation(name, float(accuracy), int(examples))
    except ValueError:
        raise ProvenanceError(
            f"--evaluation {text!r} is not SET:ACCURACY:EXAMPLES, such as heldout:0.84:400"
        ) from None
