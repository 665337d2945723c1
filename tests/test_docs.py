"""What the documentation says can be done: links resolve, commands and options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import airpeft

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """Every ``airpeft ...`` line of the page's shell blocks, split as a shell splits."""
    found = []
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("airpeft "):
                found.append(shlex.split(line, comments=True)[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    for words in commands(page):
        if words[0].startswith("-"):
            continue
        command: click.Command = airpeft.load(words[0])
        path = [words[0]]
        for word in words[1:]:
            if not isinstance(command, click.Group):
                break
            context = click.Context(command)
            inner = command.get_command(context, word)
            if inner is None:
                break
            command, path = inner, [*path, word]
        options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {
            "--help"
        }
        for word in words[len(path) :]:
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{' '.join(path)} has no {word}"


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text()):
        assert name in targets
