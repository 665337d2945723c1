"""The privacy statement of an adapter: what was promised, how it was counted, what it leaves out.

    >>> from privacy.budget import LocalPrivacy
    >>> event = SgdEvent(noise_multiplier=1.1, sample_rate=0.1, steps=20, max_grad_norm=1.0)
    >>> doc = statement({"ann": [event]}, LocalPrivacy(epsilon=8.0, delta=1e-5), randomness="test")
    >>> doc["example"]["unit"], doc["client"]
    ('example', None)
    >>> explain(doc).splitlines()[0]
    'One example: epsilon 3.51 at delta 1e-05.'

``statement`` makes the document that travels with an adapter as privacy.json; ``explain`` says it
in sentences. Epsilon is recomputed here from the events themselves, never copied from a report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from privacy import calibration, cohort_statement, secure_statement
from privacy.budget import LocalPrivacy
from privacy.errors import PrivacyError
from privacy.events import SgdEvent
from privacy.wording import at_most, odds, span

SCHEMA = 1
FILE = "privacy.json"
MOST_BYTES = 1 << 20

NOT_COVERED = (
    "how many examples each client has (it is the client's weight and sets its sampling rate)",
    "which clients took part, when, how long they took, and why one of them had no update",
    "other trainings on the same examples: what they spend adds to this; a client's own ledger "
    "keeps the sum of all",
    "accuracy and loss that clients or the server measured in the clear",
    "the choice of settings, if it was tried out on the same data",
    "a person with several examples: k examples of one person have k times this epsilon",
    "the same example held by two clients",
)
# Of clients that were asked and from which nothing came that could be counted.
SILENT = "{} clients that were asked and never answered: if they sent anything, it is not counted"


class StatementError(PrivacyError):
    """A document that is not a privacy statement of ours."""


def statement(
    events: Mapping[str, Iterable[SgdEvent]],
    privacy: LocalPrivacy | None,
    *,
    randomness: str,
    rounds: int | None = None,
    client: Mapping[str, Any] | None = None,
    secure_sum: Mapping[str, Any] | None = None,
    gradients: str = "",
    silent: int = 0,
) -> dict[str, Any]:
    """The statement of one adapter.

    Args:
        events: for each client that took part, everything that it spent on this adapter's line of
            training, also where its update came too late or was refused.
        privacy: the run's settings; None if it trained without privacy.
        randomness: where noise and sampling came from, in words (``ResidentTrainer.randomness``).
        rounds: how many rounds were trained, for the record.
        client: the part about whole clients, see :mod:`privacy.cohort_statement`; None if nothing
            is promised to them.
        secure_sum: the part about the secure sum, see :mod:`privacy.secure_statement`; None if
            updates were added up in the clear.
        gradients: how gradients per example were formed, and why (``privacy.per_example.Mode``);
            empty if that is not known.
        silent: how many clients were asked and never said what they spent.

    Returns:
        plain values that JSON can hold; ``example`` and ``client`` are None where nothing is
        promised at that level. Numbers of single clients are not in it.
    """
    part = None if client is None else dict(client)
    if part is not None and secure_sum is not None and "shares" not in part:
        part = secure_statement.of_clients(part)
    doc: dict[str, Any] = {"schema": SCHEMA, "example": None, "client": part}
    if secure_sum is not None:
        doc["secure_sum"] = dict(secure_sum)
    if privacy is None:
        return doc
    spent = {client: list(own) for client, own in events.items()}
    every = [event for own in spent.values() for event in own]
    epsilons = sorted(
        calibration.epsilon(own, privacy.delta, privacy.accountant) for own in spent.values()
    )
    worst = epsilons[-1] if epsilons else 0.0
    doc["example"] = {
        "unit": "example",
        "neighbours": "one example of one client added or removed",
        # JSON has no infinity; without noise there is no number to state.
        "epsilon": worst if math.isfinite(worst) else None,
        "epsilon_median": (epsilons or [0.0])[len(epsilons) // 2] if math.isfinite(worst) else None,
        "delta": privacy.delta,
        "budget": privacy.epsilon,
        "clients": len(spent),
        "composition": "clients hold different examples, so the largest epsilon holds for each",
        "protects_against": "the server, the other clients, and everyone who gets the adapter",
        "mechanism": {
            "name": "DP-SGD on the adapter's parameters, on the client, before anything is sent",
            "clip": "gradient of each example, Euclidean norm",
            "max_grad_norm": privacy.max_grad_norm,
            "noise_multiplier": _range(e.noise_multiplier for e in every),
            "sample_rate": _range(e.sample_rate for e in every),
            "steps": _range(sum(e.steps for e in own) for own in spent.values()),
            "rounds": rounds,
            **({"gradients": gradients} if gradients else {}),
            "sampling": "Poisson: every example drawn on its own at every step, empty batches too",
            "randomness": randomness,
        },
        "accountant": {
            "name": privacy.accountant.value,
            "library": f"dp-accounting {version('dp-accounting')}",
        },
        "not_covered": [*NOT_COVERED, *([SILENT.format(silent)] if silent else [])],
        "limits": "noise is added in floating point, as sums of four, rounded once",
    }
    return doc


def read(path: Path) -> dict[str, Any]:
    """The statement beside an adapter.

    Args:
        path: the adapter's folder, or its privacy.json.

    Raises:
        StatementError: if there is none, or it is not readable.
    """
    file = path / FILE if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        inner = path / "adapter" / FILE
        hint = (
            f"give {inner.parent}"
            if inner.exists()
            else "give the folder of an adapter that AirPEFT trained, such as runs/NAME/adapter"
        )
        raise StatementError(f"{file}: there is no privacy statement; {hint}") from None
    except OSError as error:
        raise StatementError(f"{file}: cannot be read: {error.strerror}; mend that") from error
    restore = "restore the adapter's folder from where it came"
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"above {MOST_BYTES} bytes")
        doc = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StatementError(f"{file}: not a privacy statement: {error}; {restore}") from None
    if not isinstance(doc, dict):
        raise StatementError(f"{file}: not a privacy statement: no JSON object; {restore}")
    try:
        explain(doc)
    except StatementError as error:
        raise StatementError(f"{file}: {error}; {restore}") from None
    return doc


def explain(doc: Mapping[str, Any]) -> str:
    """A statement in plain sentences, for somebody who decides about data and not about code.

    Raises:
        StatementError: if the document is not a statement, or of another version.
    """
    if doc.get("schema") != SCHEMA or "example" not in doc or "client" not in doc:
        raise StatementError(f"not a privacy statement of schema {SCHEMA}")
    example, client = doc["example"], doc["client"]
    secure, lines = doc.get("secure_sum"), list[str]()
    if example is None and client is None:
        how = "unprotected" if secure is None else "under masks that come off in the sum only"
        lines = [
            "This adapter was trained without differential privacy.",
            "It may reveal examples that it was trained on. The examples themselves never left "
            f"the devices that hold them, but what was computed from them did, {how}.",
        ]
    try:
        lines += [] if example is None else _sentences(example)
        lines += [] if client is None else cohort_statement.sentences(client)
        lines += [] if secure is None else secure_statement.sentences(secure)
        return "\n".join(lines)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StatementError(f"the privacy statement lacks a field: {error!r}") from None


def _sentences(example: Mapping[str, Any]) -> list[str]:
    mechanism, accountant = example["mechanism"], example["accountant"]
    delta = f"{example['delta']:g}"
    if example["epsilon"] is None:
        return [
            "No privacy is promised: some training steps added no noise, so epsilon has no bound.",
            f"Randomness: {mechanism['randomness']}.",
        ]
    epsilon = float(example["epsilon"])
    return [
        f"One example: epsilon {at_most(epsilon)} at delta {delta}.",
        f"What it means: whoever sees the adapter, and everything the clients sent for it, can "
        f"change their odds on whether one given example was used by a factor of at most "
        f"{odds(epsilon)}, "
        f"except with a probability of about {delta}.",
        f"It protects against {example['protects_against']}; nobody has to be trusted for it but "
        "the device that holds the example.",
        f"It holds for each of the {example['clients']} clients: {at_most(epsilon)} is the "
        f"largest of them, {at_most(example['epsilon_median'])} the median.",
        f"How: {mechanism['name']}. Each example's gradient is limited to length "
        f"{mechanism['max_grad_norm']:g}, and noise of {span(mechanism['noise_multiplier'])} "
        f"times that is added at each of {span(mechanism['steps'])} steps; each step looks at "
        f"{span(mechanism['sample_rate'], percent=True)} of a client's examples, drawn at "
        "random.",
        f"Neighbouring data: {example['neighbours']}. Counted by {accountant['name'].upper()} "
        f"({accountant['library']}).",
        f"Randomness: {mechanism['randomness']}.",
        "Not covered: " + "; ".join(example["not_covered"]) + ".",
    ]


def _range(values: Iterable[float]) -> list[float]:
    found = sorted(values)
    return [found[0], found[-1]] if found else [0, 0]
