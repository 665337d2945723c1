"""``airpeft release make``: from an adapter's folder to a request for signatures."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federation.cli_support import Format, FormatOption, errors, fail
from federation.release_app import release
from federation.release_source import (
    Copy,
    Home,
    TokenFile,
    Url,
    current_adapters,
    offline_files,
    targets_in_use,
)
from federation.release_words import show_release
from federation.release_wrap_cli import Roster, Where, seal_to, sizes

if TYPE_CHECKING:
    from protos.signed import Evaluation


LARGE = 10_000_000  # bytes
LARGE_HINT = (
    "more than 10 MB, which is a lot for an adapter: --dtype int8 halves it, and a lower rank or "
    "fewer modules do more"
)


class Dtype(StrEnum):
    """Number format of a payload."""

    BF16 = "bf16"
    F32 = "f32"
    INT8 = "int8"


@release.command(
    epilog="Examples: airpeft release make ./run/adapter --channel stable --home ./fleet -o r1 | "
    "airpeft release make ./run/adapter --channel stable --repository ./copy -o r1 "
    "--evaluation heldout:0.8425:400 --evaluation hard.json --floor 2 --notes 'security fix' | "
    "airpeft release make ./run/adapter --home ./fleet -o r1 --model-signing model.sig "
    "--model-signing-key builder.pub --data train.jsonl --memory-mib 512 "
    "--force-worse 'forgets a leaked name' | "
    "airpeft release make ./run/adapter --home ./fleet -o r1 --encrypt sealing.pub.pem "
    "--roster cohort.json",
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
    machine: Annotated[
        list[str] | None,
        typer.Option(help="Processor that can serve it, as uname -m says; may be repeated."),
    ] = None,
    memory_mib: Annotated[int, typer.Option(help="Memory that a device must have.")] = 0,
    evaluation: Annotated[
        list[str] | None,
        typer.Option(help="SET:ACCURACY:EXAMPLES, or an evaluation.json; may be repeated."),
    ] = None,
    force_worse: Annotated[
        str, typer.Option(help="Why it is released although it is worse than its parent; signed.")
    ] = "",
    fingerprints: Annotated[
        list[str] | None,
        typer.Option("--data", help="Training data whose fingerprint is told: FILE or sha256:..."),
    ] = None,
    model_signing: Annotated[
        Path | None, typer.Option(help="OpenSSF model-signing bundle over the adapter's folder.")
    ] = None,
    model_signing_key: Annotated[
        Path | None, typer.Option(help="Public key (PEM) that must have signed that bundle.")
    ] = None,
    base_digest: Annotated[
        str | None, typer.Option(help="sha256:..., for a folder that other software wrote.")
    ] = None,
    notes: Annotated[str, typer.Option(help="For people.")] = "",
    encrypt: Annotated[
        list[Path] | None,
        typer.Option(
            help="Encrypt the payload to the enrolled devices, and to this sealing key (its "
            ".pub.pem), with which later ones can be added; may be repeated."
        ),
    ] = None,
    where: Where = "",
    roster: Roster = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Turn an adapter into a request for signatures.

    A release that is worse than its parent on a named set, or was not measured where its parent
    was, is refused unless --force-worse says why.

    With --encrypt, mirrors, sticks, relays and the server's own disk hold nothing that can be read
    without a key of an enrolled device or a sealing key.
    """
    from federation.model_signing import BundleError, bundle_digest
    from federation.provenance import fingerprint
    from federation.release import ReleaseOptions, describe, make_request
    from protos.signed import Hardware

    if not encrypt and (where or roster is not None):
        fail("--where and --roster say to whom a payload is encrypted: give --encrypt as well", 2)
    with errors():
        provenance = ""
        if model_signing is not None:
            provenance = bundle_digest(model_signing, adapter, model_signing_key)
        elif model_signing_key is not None:
            raise BundleError("--model-signing-key verifies a bundle: give --model-signing, too")
        options = ReleaseOptions(
            channel=channel,
            dtype=dtype.value,
            floor=floor,
            runtime=tuple(runtime or ("torch",)),
            notes=notes,
            base_digest=base_digest,
            evaluations=_evaluations(evaluation or ()),
            hardware=Hardware(machines=tuple(machine or ()), memory_mib=memory_mib),
            data=tuple(fingerprint(one) for one in fingerprints or ()),
            model_signing=provenance,
            force_worse=force_worse,
        )
        to, readers = None, None
        if encrypt:
            to, readers = seal_to(encrypt, where, roster, home, url, token_file)
        current = current_adapters(home, url, token_file, repository, channel)
        request = make_request(
            adapter,
            out,
            adapters=current,
            options=options,
            now=datetime.now(UTC),
            in_use=targets_in_use(home, url, token_file, repository),
            seal_to=to,
            above=offline_files(home, url, token_file, repository)[0],
        )
        data = {"request": str(out), **describe(request.record)}
        data["sizes"] = sizes(out, data)
    if readers is not None:
        data["readers"] = {"devices": len(readers.keys), "lacking": list(readers.lacking)}
    show_release(output, data)
    if output is Format.TABLE:
        if data["sizes"]["payload"] > LARGE:
            typer.echo(f"\n{LARGE_HINT}")
        typer.echo(f"\nnext: airpeft release sign {out} --key KEY.pem   (two different keys)")


def _evaluations(texts: list[str] | tuple[()]) -> tuple[Evaluation, ...]:
    from federation.provenance import ProvenanceError, evaluation, read_evaluations

    found: dict[str, Evaluation] = {}
    for text in texts:
        if Path(text).is_file():
            found |= read_evaluations(Path(text))
            continue
        try:
            name, accuracy, examples = text.rsplit(":", 2)
            found[name] = evaluation(name, float(accuracy), int(examples))
        except ValueError:
            raise ProvenanceError(
                f"--evaluation {text!r} is neither a file nor SET:ACCURACY:EXAMPLES, such as "
                "heldout:0.84:400"
            ) from None
    return tuple(found.values())
