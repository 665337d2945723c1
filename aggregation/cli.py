"""``airpeft aggregate``: combining adapters by hand.

Exit codes: 0 done; 2 bad input, or a result that could not be written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregation.output import AsFormat, Format, show_json, table

if TYPE_CHECKING:
    from aggregation.offline import Combined, Members
    from aggregation.recipe import Recipe

_MEAN = "the exact mean"

aggregate = typer.Typer(add_completion=False, rich_markup_mode=None)


@aggregate.command(
    epilog="Examples: airpeft aggregate site-a site-b site-c --weights 3,1,7 --out merged | "
    "airpeft aggregate site-a site-b --recipe fedit --out mean --report --format json",
)
def aggregate_folders(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER...", help="PEFT adapter folders of the same base."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write, new.")] = None,
    recipe: Annotated[
        str, typer.Option(help="How they are combined; see airpeft recipes.")
    ] = "svd-warm-start",
    piece: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PIECE=CHOICE",
            help="Replace a piece of the recipe, as reduce=krum(liars=2); may be repeated.",
        ),
    ] = None,
    trusted: Annotated[
        Path | None,
        typer.Option(help="The folder that fltrust compares all others with; not in the mean."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number for each folder, as in 3,1,7; else all the same.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.json into the folder.")
    ] = False,
    base_digest: Annotated[
        str | None,
        typer.Option(help="sha256:... of the base, for folders that other software wrote."),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="Public name of the base in the result's configuration.")
    ] = None,
    output: AsFormat = Format.TABLE,
) -> None:
    """Combine PEFT adapter folders off line, by a recipe.

    The trainable adapter is written to --out. What the recipe keeps beside it is written to
    --out/residual: load both and make both active for the whole weighted mean.

    Recipes that need clients over rounds (personal models, noise on the client, learnt step sizes)
    are refused with the reason.
    """
    from aggregation import offline
    from aggregation.errors import AggregationError
    from aggregation.recipes import recipe as by_name

    try:
        if out is None:
            raise offline.OfflineError("no --out given; name the folder to write")
        offline.check_new(out)
        chosen = by_name(recipe, _pieces(piece or []))
        members, name = _members(folders or [], weights, base_digest, trusted)
        combined = offline.combine(chosen, members, trusted=name)
        said = _describe(chosen, members, combined)
        extra = {"report.json": (json.dumps(said, indent=2) + "\n").encode()} if report else {}
        offline.write(out, combined, members, base_name=base_name, extra=extra)
    except AggregationError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if output is Format.JSON:
        show_json("aggregation", {"out": str(out), **said})
    else:
        _show(out, said, combined)


def _pieces(given: Sequence[str]) -> dict[str, str]:
    from aggregation.offline import OfflineError

    pieces: dict[str, str] = {}
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key or not value:
            raise OfflineError(f"--piece {text!r} is not PIECE=CHOICE, as in reduce=krum(liars=2)")
        if key in pieces:
            raise OfflineError(f"--piece {key} is given twice; give it once")
        pieces[key] = value
    return pieces


def _members(
    folders: Sequence[Path], weights: str | None, base_digest: str | None, trusted: Path | None
) -> tuple[Members, str]:
    """The adapters, and the name of the trusted one; it may be one of the folders or a further."""
    from aggregation import offline

    shares = _weights(weights)
    if trusted is None:
        return offline.read_members(folders, shares, base_digest), ""
    known = [folder for folder in folders if folder.resolve() == trusted.resolve()]
    if known:
        return offline.read_members(folders, shares, base_digest), str(known[0])
    shares = [*(shares or [1.0] * len(folders)), 1.0]
    return offline.read_members([*folders, trusted], shares, base_digest), str(trusted)


def _weights(text: str | None) -> list[float] | None:
    from aggregation.offline import OfflineError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OfflineError(f"--weights {text!r} is not numbers with commas, as in 3,1,7") from None


def _describe(chosen: Recipe, members: Members, combined: Combined) -> dict[str, Any]:
    report = combined.report
    spec = combined.adapter.spec
    beside: dict[str, int] = {}
    for adapter in combined.residual:
        for module in adapter.spec.modules:
            beside[module.name] = beside.get(module.name, 0) + module.rank
    modules = {}
    for module in spec.modules:
        said = report.modules.get(module.name)
        modules[module.name] = {
            "rank": said.rank if said else 0,
            "energy": said.energy if said else 1.0,
            "error": said.error if said else 0.0,
            "residual_rank": beside.get(module.name, 0),
            "error_with_residual": said.dropped / said.norm if said and said.norm else 0.0,
            "bytes": 4 * module.rank * (module.d_in + module.d_out),
            "residual_bytes": 4 * beside.get(module.name, 0) * (module.d_in + module.d_out),
        }
    return {
        "recipe": chosen.name,
        "line": str(chosen),
        "folders": {m.name: m.weight for m in members.members},
        "base_name": members.base_name,
        "base_digest": spec.base_digest if members.base_known else None,
        "influence": dict(report.influence),
        "error": combined.error,
        "energy": max(0.0, 1.0 - combined.error**2),
        "against": chosen.reduce.reference if spec.modules else _MEAN,
        "bytes_in": combined.bytes_in,
        "bytes": combined.adapter.nbytes,
        "residual_bytes": sum(adapter.nbytes for adapter in combined.residual),
        "modules": modules,
        "tensors": {
            tensor.name: {
                "error": combined.tensors[tensor.name],
                "bytes": 4 * math.prod(tensor.shape),
            }
            for tensor in spec.others
        },
    }


def _show(out: Path, said: dict[str, Any], combined: Combined) -> None:
    rows = [
        [
            name,
            module["rank"],
            f"{module['energy']:.4f}",
            f"{module['error']:.2e}",
            module["residual_rank"],
            f"{module['error_with_residual']:.2e}",
            module["bytes"],
            module["residual_bytes"],
        ]
        for name, module in said["modules"].items()
    ]
    rows += [
        [name, "-", "-", f"{tensor['error']:.2e}", "-", "-", tensor["bytes"], 0]
        for name, tensor in said["tensors"].items()
    ]
    columns = [
        "module or tensor",
        "rank",
        "energy",
        "error",
        "residual rank",
        "error with residual",
    ]
    typer.echo(table([*columns, "bytes", "residual bytes"], rows))
    typer.echo(
        f"\n{said['recipe']} of {len(said['folders'])} adapters ({said['bytes_in']} bytes): "
        f"energy {said['energy']:.4f}, error {said['error']:.2e} against {said['against']}"
    )
    typer.echo(f"{out}: {said['bytes']} bytes, trainable")
    for index, adapter in enumerate(combined.residual):
        folder = out / (f"residual-{index + 1}" if index else "residual")
        typer.echo(f"{folder}: {adapter.nbytes} bytes, to be loaded beside it")
