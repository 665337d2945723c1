"""What docs/security.md says of metadata is there: each line that it names, and each test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
TABLE = PAGE.partition("## Attacks on metadata")[2].partition("\n## ")[0]
HERE = "tests/trust/test_attacks.py"
LINES = sorted(set(re.findall(r"`([a-z_]+/[a-z_/]+\.py):([A-Za-z_]+)`", TABLE)))
NAMED = re.findall(r"`(?:(tests/[a-z_/]+\.py)::)?(test_\w+)`", TABLE)
TESTS = sorted({(path or HERE, name) for path, name in NAMED})


@pytest.mark.parametrize(("path", "name"), LINES, ids=lambda value: str(value))
def test_the_line_is_there(path: str, name: str) -> None:
    text = (ROOT / path).read_text()
    assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), f"{path} has no {name}"


def test_every_test_is_there() -> None:
    missing = [
        f"{path}::{name}"
        for path, name in TESTS
        if not re.search(rf"^def {name}\b", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert not missing
    assert len(TESTS) > 40
    assert len(LINES) > 20


def test_no_row_of_the_table_lacks_a_line_or_a_test() -> None:
    rows = [row for row in TABLE.splitlines() if row.startswith("|")][2:]
    assert len(rows) > 25
    for row in rows:
        _, attack, stops, line, tests, _ = (cell.strip() for cell in row.split("|"))
        assert attack, row
        assert stops, row
        assert ".py:" in line, f"{attack}: no line"
        assert "test_" in tests, f"{attack}: no test"
