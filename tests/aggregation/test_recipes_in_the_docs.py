"""The table in the docs is what the code says, and every recipe and every choice is described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aggregation.choices import CHOICES
from aggregation.recipes import DEFAULT, RECIPES

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = ("exact", "mixed_ranks", "dp_friendly", "secure_sum")


def row(said: dict[str, Any]) -> str:
    """One line of the table, as it has to stand in the docs."""
    mark = " (default)" * (said["name"] == DEFAULT) + ", personal" * said["personal"]
    mark += ", a control" * bool(said["warning"])
    yes = " | ".join("yes" if said[column] else "no" for column in COLUMNS)
    return f"| `{said['name']}`{mark} | {yes} | {said['trains']} | {said['up']} | {said['down']} |"


@pytest.mark.parametrize("name", RECIPES)
def test_the_docs_say_of_a_recipe_what_the_code_says(name: str) -> None:
    assert row(RECIPES[name].describe()) in (DOCS / "aggregation.md").read_text("utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_described_with_its_paper(name: str) -> None:
    recipes = (DOCS / "recipes.md").read_text("utf-8")
    default = name in (DEFAULT, "fedit")  # these two are derived in aggregation.md
    assert default or f"`{name}`" in recipes
    assert any(char.isdigit() for char in RECIPES[name].reference)


@pytest.mark.parametrize("piece", CHOICES)
def test_every_choice_is_in_the_table_of_pieces(piece: str) -> None:
    text = (DOCS / "aggregation.md").read_text("utf-8")
    line = next(part for part in text.splitlines() if part.startswith(f"| {piece} |"))
    assert {kind.kind for kind in CHOICES[piece]} == set(line.split("|")[3].strip().split(", "))
