"""``airpeft recipes``: what there is to choose from, and what each choice means.

Exit codes: 0 done; 2 there is no such recipe.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aggregation.output import AsFormat, Format, show_json

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

recipes = typer.Typer(add_completion=False, rich_markup_mode=None)


@recipes.command(
    epilog="Examples: airpeft recipes | airpeft recipes fedsvd | airpeft recipes --format json",
)
def list_recipes(
    name: Annotated[str | None, typer.Argument(help="Show one, with what its pieces do.")] = None,
    output: AsFormat = Format.TABLE,
) -> None:
    """List the recipes by name, with what each promises and costs; or show one of them."""
    from aggregation.errors import AggregationError
    from aggregation.recipes import RECIPES
    from aggregation.recipes import recipe as by_name

    if name is None:
        if output is Format.JSON:
            show_json("recipes", [chosen.describe() for chosen in RECIPES.values()])
        else:
            _show_recipes()
        return
    try:
        chosen = by_name(name)
    except AggregationError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if output is Format.JSON:
        show_json("recipe", _in_full(chosen))
    else:
        _show_recipe(chosen)


_YES = ("exact", "mixed_ranks", "dp_friendly", "secure_sum")
_LEGEND = (
    "",
    "exact     what is handed out next, with what is kept of it, is the exact weighted mean",
    "mix       clients may have several ranks",
    "DP        noise on what clients train enters the model once, and not squared",
    "sum       a secure sum can stand in for the server",
    "up, down  numbers per module and client, D = d_out + d_in, of rank r; K clients; sketch of l",
    "*  the default   ~  personal: each client has its own model, none is global   !  a warning",
    "airpeft recipes NAME shows what the pieces do, their settings, and the reference in full.",
)


def _show_recipes() -> None:
    from aggregation.recipes import DEFAULT, RECIPES
    from aggregation.showing import table

    rows = []
    for name, chosen in RECIPES.items():
        said = chosen.describe()
        marks = "".join(
            mark
            for mark, there in (
                ("*", name == DEFAULT),
                ("~", said["personal"]),
                ("!", said["warning"]),
            )
            if there
        )
        paper = re.search(r"[0-9]{4}\.[0-9]{5}", said["reference"])
        up = re.sub(r"\(.*\)", "", said["up"])  # settings of a codec: with one recipe by name
        yes = ["yes" if said[key] else "no" for key in _YES]
        rows.append(
            [name + marks, *yes, said["trains"], up, said["down"], paper[0] if paper else ""]
        )
    columns = ["recipe", "exact", "mix", "DP", "sum", "trains", "up", "down", "arXiv"]
    for line in (*table(columns, rows), *_LEGEND):
        typer.echo(line)


def _in_full(chosen: Recipe) -> dict[str, Any]:
    from aggregation.choices import CHOICES
    from aggregation.offline_clients import refusal
    from aggregation.showing import meaning, settings

    said = chosen.describe()
    said["offline"] = refusal(chosen)
    said["details"] = {
        piece: {
            "choice": str(getattr(chosen, piece)),
            "means": meaning(getattr(chosen, piece)),
            "settings": {
                name: {"value": value, "means": text}
                for name, value, text in settings(getattr(chosen, piece))
            },
            "allowed": [kind.kind for kind in kinds],
        }
        for piece, kinds in CHOICES.items()
    }
    return said


def _show_recipe(chosen: Recipe) -> None:
    from aggregation.showing import table

    said = _in_full(chosen)
    flags = [key.replace("_", " ") for key in (*_YES, "personal") if said[key]]
    rows = [
        ["recipe", said["name"]],
        ["reference", said["reference"]],
        ["properties", ", ".join(flags) or "none of exact, mixed ranks, DP-friendly, secure sum"],
        ["up, down", f"{said['up']}; {said['down']} (numbers per module and client)"],
        ["off line", said["offline"] or "airpeft aggregate FOLDER... --recipe " + said["name"]],
    ]
    if said["warning"]:
        rows.append(["WARNING", said["warning"]])
    for line in table(["", ""], rows)[1:]:
        typer.echo(line)
    rows = []
    for piece, detail in said["details"].items():
        rows.append([piece, detail["choice"], detail["means"]])
        rows += [
            ["", f"  {name} = {setting['value']}", setting["means"]]
            for name, setting in detail["settings"].items()
        ]
        rows.append(["", "", "choices: " + ", ".join(detail["allowed"])])
    typer.echo("")
    for line in table(["piece", "choice", "what it does"], rows):
        typer.echo(line)
    typer.echo(
        f'\nIn a scenario: federation.recipe = "{said["name"]}", and another choice of a piece '
        'as\n[federation.pieces] codec = "int8"; off line: --piece codec=int8'
    )
