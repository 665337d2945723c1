"""What a simulation is asked to do: a TOML file, checked to the last key before anything starts.

    >>> scenario = parse({"name": "tiny", "partition": {"clients": 3}}, overrides=["train.rank=4"])
    >>> scenario.partition.clients, scenario.train.rank
    (3, 4)
    >>> parse({"name": "tiny"}, overrides=["train.rnak=4"])
    Traceback (most recent call last):
    simulations.scenario.ScenarioError: --set train.rnak = 4: unknown key; did you mean train.rank?

A scenario says nothing of machines: where results go, how many processes work and which backend
carries the messages are arguments of the run, and change no number in it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from aggregation.choices import CHOICES
from aggregation.recipe import Recipe
from federation.client_privacy import with_client_privacy
from federation.recipe_checks import RoundsError, check_recipe
from privacy.central import CentralPrivacy
from protos.tasks import client_name
from simulations.client_privacy import ClientPrivacy
from simulations.errors import SimulationError
from simulations.settings import (
    OF_METHODS,
    Base,
    Data,
    Federation,
    Partition,
    Privacy,
    Section,
    Train,
)
from simulations.toml_text import table, value_text

# A key on the command line takes the place of the other one in the file: both at once contradict.
_RIVALS = {"train.ranks": "train.rank", "train.rank": "train.ranks"}
PIECES = "federation.pieces"
OWN_HOLDOUT = 0.2  # of each client's rows, where nothing but the clients can be measured


class ScenarioError(SimulationError):
    """A scenario that says nonsense: names the file, the key, what was given, what is allowed."""


class Scenario(Section):
    """Everything that decides the numbers of a run, and nothing else."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    base: Base = Base()
    data: Data = Data()
    partition: Partition = Partition()
    train: Train = Train()
    privacy: Privacy | None = None
    client_privacy: ClientPrivacy | None = None
    federation: Federation = Federation()

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if self.federation.min_updates > self.partition.clients:
            raise ValueError(
                f"federation.min_updates = {self.federation.min_updates} is more than "
                f"partition.clients = {self.partition.clients}"
            )
        return self

    @model_validator(mode="after")
    def _recipe_that_fits(self) -> Self:
        federation, clients = self.federation, self.partition.clients
        number = federation.trusted
        if isinstance(number, int) and number >= clients:
            raise ValueError(
                f"federation.trusted = {number}: the clients are numbered 0 to {clients - 1}"
            )
        if isinstance(number, str) and number not in map(client_name, range(clients)):
            raise ValueError(
                f"federation.trusted = {number!r} is no client: give a number, 0 to {clients - 1}"
            )
        try:
            check_recipe(
                self.chosen(),
                clients=clients,
                fraction=federation.fraction,
                sampling=federation.sampling,
                trusted=self.trusted,
                mixed_ranks=len(set(self.train.ranks)) > 1,
                buffer=federation.buffer,
                max_staleness=federation.max_staleness,
                private=self.privacy is not None,
                min_updates=federation.min_updates,
                holdout=self.holdout,
            )
        except RoundsError as error:
            raise ValueError(str(error)) from None
        return self

    def chosen(self) -> Recipe:
        """The recipe, with the pieces that are replaced and what client privacy adds to it.

        The noise is the one that is given, or a stand-in until it is calibrated.

        Raises:
            RoundsError: if the recipe cannot keep what is promised to clients.
            ValueError: if what is promised contradicts itself.
        """
        promised = self.central()
        if promised is not None:
            stand_in = promised.noise_multiplier or 1.0
            promised = replace(promised, epsilon=None, noise_multiplier=stand_in)
        return with_client_privacy(
            self.federation.chosen(),
            promised,
            pieces=self.federation.pieces,
            min_updates=self.federation.min_updates,
        )

    def central(self) -> CentralPrivacy | None:
        """What is promised to every client; None for nothing.

        Raises:
            ValueError: if it contradicts itself.
        """
        section = self.client_privacy
        return section.central(self.federation, self.partition.clients) if section else None

    @property
    def trusted(self) -> str:
        """Name of the trusted client; empty for none."""
        given = self.federation.trusted
        return client_name(given) if isinstance(given, int) else (given or "")

    @property
    def holdout(self) -> float:
        """Share of each client's own rows that only measure."""
        if self.train.holdout is not None:
            return self.train.holdout
        return OWN_HOLDOUT if self.federation.chosen().train.personal else 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every client by name; empty if all have the global one."""
        ranks = self.train.ranks
        return {
            client_name(i): ranks[i % len(ranks)] for i in range(self.partition.clients) if ranks
        }

    @property
    def digest(self) -> str:
        """Hex SHA-256 over every value: equal digests, equal results.

        Of the paths of data and base only the last part counts, so that a run gives the same on
        another machine: the name of the run enters its randomness.
        """
        document = self.model_dump(mode="json")
        if self.client_privacy is None:
            del document["client_privacy"]
        document["data"]["path"] = Path(self.data.path).name
        document["base"]["name"] = Path(self.base.name).name
        for section, values in (("train", self.train), ("federation", self.federation)):
            for key in values.later:  # what is not used must not change the names of old runs
                if key not in values.used:
                    del document[section][key]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @property
    def run(self) -> str:
        """Name of the run: two runs of the same scenario have the same one."""
        return f"{self.name}-{self.digest[:12]}"

    def to_toml(self) -> str:
        """The scenario with every default written out; :func:`load` reads it back."""
        return "\n".join(table("", self.model_dump(mode="json"))).lstrip("\n") + "\n"


def load(path: Path, *, overrides: Sequence[str] = (), seed: int | None = None) -> Scenario:
    """Read a scenario file.

    Args:
        path: the TOML file; ``data.path`` in it is relative to its folder.
        overrides: ``section.key=value``, the value as in TOML or a bare word.
        seed: replaces the scenario's seed.

    Raises:
        ScenarioError: the file is missing or not TOML; a key is unknown; a value is not allowed.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ScenarioError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path}: not TOML: {error}") from None
    document.setdefault("name", path.stem)
    scenario = parse(document, overrides=overrides, seed=seed, source=str(path))
    if not scenario.data.path:
        return scenario
    # A path in the file is relative to the file; one on the command line, to where we are.
    folder = Path() if any(o.startswith("data.path") for o in overrides) else path.parent
    data = scenario.data.model_copy(update={"path": str((folder / scenario.data.path).resolve())})
    return scenario.model_copy(update={"data": data})


def parse(
    document: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    source: str = "scenario",
) -> Scenario:
    """Check a scenario that is already a mapping; arguments and errors as for :func:`load`."""
    merged: dict[str, Any] = json.loads(json.dumps(dict(document), default=str))
    origin = {}
    for override in overrides:
        key, value = _override(override)
        *sections, leaf = key.split(".")
        target = merged
        for depth, section in enumerate(sections):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                where = ".".join(sections[: depth + 1])
                raise ScenarioError(f"--set {override}: {where} is not a section")
        target[leaf] = value
        for rival in _rivals(key, value):
            if not any(other.partition("=")[0].strip() == rival for other in overrides):
                target.pop(rival.rpartition(".")[2], None)
        origin[key] = "--set "
    if seed is not None:
        merged["seed"] = seed
        origin["seed"] = "--seed "
    try:
        return Scenario.model_validate(merged)
    except ValidationError as error:
        raise ScenarioError(
            "\n".join(_explain(dict(item), source, origin) for item in error.errors())
        ) from None


def _rivals(key: str, value: Any) -> list[str]:
    """Keys of the file that an override makes void: both at once would contradict each other."""
    if key == "train.method":
        return [f"train.{leaf}" for leaf, methods in OF_METHODS.items() if value not in methods]
    return [_RIVALS[key]] if key in _RIVALS else []


def keys() -> list[str]:
    """Every key that a scenario may have, with its section."""
    found = []
    for name, info in Scenario.model_fields.items():
        section = next((s for s in _sections(info.annotation)), None)
        found += [f"{name}.{leaf}" for leaf in section.model_fields] if section else [name]
    at = found.index(PIECES)
    return [*found[:at], *(f"{PIECES}.{piece}" for piece in CHOICES), *found[at + 1 :]]


def _sections(annotation: Any) -> list[type[Section]]:
    kinds = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ScenarioError(f"--set {text}: not of the form section.key=value")
    if key.count(".") > 1 and not (key.startswith(PIECES + ".") and key.count(".") == 2):
        raise ScenarioError(f"--set {text}: unknown key; allowed: {', '.join(keys())}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _explain(item: dict[str, Any], source: str, origin: Mapping[str, str]) -> str:
    loc = [str(part) for part in item["loc"]]
    key = ".".join(loc[: 3 if ".".join(loc[:2]) == PIECES else 2])
    where = origin.get(key) or f"{source}: "
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, keys(), n=1, cutoff=0.6)
        leaf = key.rpartition(".")[2]
        close = close or [k for k in keys() if k.rpartition(".")[2] == leaf]
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(keys())}"
        return f"{where}{key} = {value_text(given)}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "value_error":
        named = not key or message.startswith(key + ".")  # the message names its key itself
        return f"{where}{message if named else f'{key}: {message}'}"
    if item["type"] == "missing":
        return f"{where}{key}: missing; it must be given"
    return f"{where}{key} = {value_text(given)}: {message[0].lower()}{message[1:]}"
