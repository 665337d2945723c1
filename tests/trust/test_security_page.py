"""What docs/security.md says: each line that it names is there, and each test, in every section."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
HEAD = "| attack | what stops it | line | test |"
_FILE, _TEST = r"tests/[a-z_/]+\.py", r"test_\w+"
THREATS = 20  # rows of the threats by attacker, at least


def sections() -> Iterator[tuple[str, str, list[list[str]]]]:
    """Title, the text above the table, and the rows of every table of attacks."""
    for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        intro, found, table = text.partition("| attack |")
        if found:
            lines = [line for line in (found + table).splitlines() if line.startswith("|")]
            assert lines[0] == HEAD, f"{title}: {lines[0]}"
            rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
            yield title, intro, rows


TABLES = list(sections())
ROWS = [(title, row) for title, _, rows in TABLES for row in rows]
LINES = sorted(set(re.findall(r"`([a-z_]+/[a-z_/]+\.py):([A-Za-z_]+)`", PAGE)))


def named_tests() -> Iterator[tuple[str, str]]:
    """File and name of each test; without a file it is the one that was named last."""
    for _, intro, rows in TABLES:
        named = re.findall(rf"`({_FILE})`", intro)
        for row in rows:
            file = named[0] if named else ""
            for path, colons, name in re.findall(rf"`({_FILE})?(::)?({_TEST})`", row[3]):
                if path:
                    named_last = file = path
                elif colons:
                    file = named_last
                elif named:
                    file = named[0]
                yield file, name


@functools.cache
def text_of(path: str) -> str:
    return (ROOT / path).read_text()


@pytest.mark.parametrize(("path", "name"), LINES, ids=str)
def test_the_line_is_there(path: str, name: str) -> None:
    assert re.search(rf"^\s*(async def|def|class) {name}\b", text_of(path), re.MULTILINE), (
        f"{path} has no {name}"
    )


def test_every_test_is_there() -> None:
    found = sorted(set(named_tests()))
    missing = [
        f"{path}::{name}"
        for path, name in found
        if not path or not re.search(rf"^def {name}\b", text_of(path), re.MULTILINE)
    ]
    assert not missing
    assert len(found) > 90
    assert len(LINES) > 60


def test_no_row_of_any_table_lacks_a_line_or_a_test() -> None:
    assert len(ROWS) > 100
    for title, row in ROWS:
        assert len(row) == 4, f"{title}: {row}"
        attack, stops, line, tests = row
        assert attack, f"{title}: {row}"
        assert stops, f"{title}: {row}"
        assert ".py:" in line, f"{title}: {attack}: no line"
        assert "test_" in tests, f"{title}: {attack}: no test"


def test_every_attacker_has_a_row() -> None:
    words = (
        "mirror", "hides a new root", "power cut", "no clock", "rounds keys", "offline key",
        "malicious operator", "malicious trainer", "stolen device", "invented devices",
        "wrong base", "pickle", "configuration", "NaN", "missing tensors", "safetensors",
        "bomb", "oversized", "storm", "eavesdropping",
    )  # fmt: skip
    by_attacker = next(rows for title, _, rows in TABLES if title == "Threats by attacker")
    attacks = "\n".join(row[0] for row in by_attacker)
    assert [word for word in words if word not in attacks] == []
    assert len(by_attacker) >= THREATS
