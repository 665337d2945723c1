"""The house itself: names, floors' promises that import-linter can't see, and the command."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aggregation
import airpeft

HEAVY = ("torch", "transformers", "peft", "opacus", "flwr", "grpc", "tuf", "sqlalchemy", "numpy")


def modules_after(code: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter holds after running ``code``."""
    report = "import sys; print('\\n'.join({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "name", ["aggregation", "privacy", "protos", "clients", "federation", "simulations"]
)
def test_no_other_distribution_owns_our_packages(name: str) -> None:
    assert set(packages_distributions()[name]) == {"airpeft"}


def test_the_map_of_aggregation_names_every_room() -> None:
    there = {path.stem for path in Path(aggregation.__path__[0]).glob("*.py")} - {"__init__"}
    named = re.findall(r"``(\w+)``", aggregation.__doc__ or "")
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize(
    "words", [["--help"], ["fleet", "list", "--help"], ["privacy", "plan", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import airpeft\nfrom typer.testing import CliRunner\n"
        f"assert CliRunner().invoke(airpeft.app, {words}).exit_code == 0"
    )
    assert not modules_after(code) & set(HEAVY)


def test_a_device_that_receives_and_verifies_needs_no_torch() -> None:
    code = (
        "import clients.agent, clients.connection, clients.trust, clients.slots, clients.telemetry"
    )
    assert not modules_after(code) & {"torch", "transformers", "peft", "opacus", "flwr"}


def test_the_server_needs_no_torch() -> None:
    code = "import federation.server"
    assert not modules_after(code) & {"torch", "transformers", "peft", "opacus", "flwr"}


@pytest.mark.parametrize("name", list(airpeft.COMMANDS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(airpeft.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"airpeft {name}" in result.output


def test_an_unknown_command_is_refused_with_status_2() -> None:
    result = CliRunner().invoke(airpeft.app, ["fly"])
    assert result.exit_code == 2
    assert "fly" in result.output
