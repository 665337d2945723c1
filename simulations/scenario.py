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
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aggregation.errors import RecipeError
from aggregation.recipes import RECIPES
from simulations.errors import SimulationError

Text = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]


class ScenarioError(SimulationError):
    """A scenario that says nonsense: names the file, the key, what was given, what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Base(_Section):
    """The frozen model.

    Attributes:
        name: a known base such as ``minilm``, a folder, or a model in the local cache.
    """

    name: Text = "minilm"


class Data(_Section):
    """The rows.

    Attributes:
        dataset: name of a shipped data set; not used if there is a path.
        path: the user's own file; relative to the scenario's folder.
        text: column with the text.
        label: column with the class.
        labels: names of the classes, in order; empty to take them from the file.
        rows: use only so many rows; 0 for all.
        heldout: share of the rows kept out for measuring.
    """

    dataset: Text = "sentiment"
    path: str = ""
    text: Text = "text"
    label: Text = "label"
    labels: Names = ()
    rows: Annotated[int, Field(ge=0)] = 0
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Partition(_Section):
    """Who has which rows; see :mod:`simulations.partition`."""

    scheme: Literal["iid", "dirichlet", "pathological", "natural", "size-skewed"] = "dirichlet"
    clients: Annotated[int, Field(ge=1, le=100_000)] = 20
    min_examples: Annotated[int, Field(ge=1)] = 20
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    classes: Annotated[int, Field(ge=1, le=1000)] = 1
    exponent: Annotated[float, Field(ge=0, le=10)] = 1.0
    column: str = ""

    @model_validator(mode="after")
    def _natural_needs_a_column(self) -> Self:
        if (self.scheme == "natural") != bool(self.column):
            raise ValueError("column is needed by scheme 'natural', and by no other")
        return self


class Train(_Section):
    """The adapter, and how each client trains it in one round.

    Attributes:
        rank: LoRA rank.
        alpha: LoRA alpha.
        layers: how many of the uppermost layers are adapted.
        targets: which projections.
        rslora: scale by sqrt(rank).
        epochs: passes over the client's rows in one round; may be a fraction.
        steps: steps in one round, instead of ``epochs``.
        batch_size: rows in a step; with privacy, the expected number (Poisson). 32 if neither
            this nor ``sample_rate`` is given.
        sample_rate: share of the client's rows in a step, instead of ``batch_size``: the same
            budget then means the same noise for every client.
        learning_rate: of the low-rank factors; the optimiser starts anew in every round.
        head_learning_rate: of the classifier's head; ``learning_rate`` if it is not given.
        optimizer: ``adamw`` or ``sgd``.
        max_length: tokens of a text that are read.
    """

    rank: Annotated[int, Field(ge=1, le=256)] = 8
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    targets: Annotated[Names, Field(min_length=1)] = ("query", "value")
    rslora: bool = False
    epochs: Annotated[float, Field(gt=0, le=100)] = 1.0
    steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    head_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    max_length: Annotated[int, Field(ge=4, le=512)] = 32

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        if self.batch_size is not None and self.sample_rate is not None:
            raise ValueError("give batch_size or sample_rate, not both")
        return self


class Privacy(_Section):
    """Differential privacy of single examples, spent on the client (DP-SGD).

    Attributes:
        epsilon: budget of each client over the whole run; the noise is calibrated to it.
        noise_multiplier: the noise itself, if no budget is given.
        delta: of the guarantee; should be below one over the largest client's rows.
        max_grad_norm: clipping norm of one example's gradient.
        accountant: how epsilon is computed: ``rdp`` (a safe bound) or ``pld`` (tight and slow).
    """

    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    noise_multiplier: Annotated[float, Field(gt=0, le=1000)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    accountant: Literal["rdp", "pld"] = "rdp"

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon or noise_multiplier")
        return self


class Federation(_Section):
    """How rounds are run.

    Attributes:
        rounds: how many.
        recipe: how updates become the next adapter.
        sampling: ``fixed`` draws the same number of clients each round, ``poisson`` flips a coin
            for each client.
        fraction: share of the clients that is drawn.
        min_updates: a round with fewer usable updates changes nothing.
        deadline_seconds: clients that are later are left out of the round.
    """

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 5
    recipe: Text = "svd-warm-start"
    sampling: Literal["fixed", "poisson"] = "fixed"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_updates: Annotated[int, Field(ge=1)] = 1
    deadline_seconds: Annotated[float, Field(gt=0, le=7 * 86400)] = 600.0

    @model_validator(mode="after")
    def _known_recipe(self) -> Self:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe {self.recipe!r} is not one of {', '.join(RECIPES)}")
        try:
            RECIPES[self.recipe].check_rounds()
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return self


class Scenario(_Section):
    """Everything that decides the numbers of a run, and nothing else."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    base: Base = Base()
    data: Data = Data()
    partition: Partition = Partition()
    train: Train = Train()
    privacy: Privacy | None = None
    federation: Federation = Federation()

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        if self.federation.min_updates > self.partition.clients:
            raise ValueError(
                f"federation.min_updates = {self.federation.min_updates} is more than "
                f"partition.clients = {self.partition.clients}"
            )
        return self

    @property
    def digest(self) -> str:
        """Hex SHA-256 over every value: equal digests, equal results.

        Of the paths of data and base only the last part counts, so that a run gives the same on
        another machine: the name of the run enters its randomness.
        """
        document = self.model_dump(mode="json")
        document["data"]["path"] = Path(self.data.path).name
        document["base"]["name"] = Path(self.base.name).name
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @property
    def run(self) -> str:
        """Name of the run: two runs of the same scenario have the same one."""
        return f"{self.name}-{self.digest[:12]}"

    def to_toml(self) -> str:
        """The scenario with every default written out; :func:`load` reads it back."""
        top, sections = [], []
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                lines = [f"{k} = {_toml(v)}" for k, v in value.items() if v is not None]
                sections.append("\n".join([f"\n[{key}]", *lines]))
            elif value is not None:
                top.append(f"{key} = {_toml(value)}")
        return "\n".join([*top, *sections]) + "\n"


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
        section, _, leaf = key.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        if not isinstance(target, dict):
            raise ScenarioError(f"--set {override}: {section} is not a section")
        target[leaf] = value
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


def keys() -> list[str]:
    """Every key that a scenario may have, with its section."""
    found = []
    for name, info in Scenario.model_fields.items():
        section = next((s for s in _sections(info.annotation)), None)
        found += [f"{name}.{leaf}" for leaf in section.model_fields] if section else [name]
    return found


def _sections(annotation: Any) -> list[type[_Section]]:
    kinds = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, _Section)]


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise ScenarioError(f"--set {text}: not of the form section.key=value")
    if key.count(".") > 1:
        raise ScenarioError(f"--set {text}: unknown key; allowed: {', '.join(keys())}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _explain(item: dict[str, Any], source: str, origin: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    where = origin.get(key) or f"{source}: "
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, keys(), n=1, cutoff=0.6)
        leaf = key.rpartition(".")[2]
        close = close or [k for k in keys() if k.rpartition(".")[2] == leaf]
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(keys())}"
        return f"{where}{key} = {_toml(given)}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if item["type"] == "value_error":
        return f"{where}{key + ': ' if key else ''}{message}"
    if item["type"] == "missing":
        return f"{where}{key}: missing; it must be given"
    return f"{where}{key} = {_toml(given)}: {message[0].lower()}{message[1:]}"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str | bool | int):
        return json.dumps(value)
    return repr(value)
