"""What a finished run leaves for people: curves, a report in one file, a model card.

The report needs no network and no other file: pictures are inside it, and it has no script.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from federation.rounds import Round
from privacy.events import SgdEvent
from privacy.statement import explain
from simulations import curves
from simulations.evaluation import CLASS_PREFIX
from simulations.resources import find

if TYPE_CHECKING:
    from simulations.folder import Run


@dataclass(frozen=True)
class ClientRow:
    """One client's line in the report; ``accuracy`` is None if a class of it was not held out."""

    name: str
    rows: int
    shares: tuple[float, ...]
    used: int
    refused: str
    noise: float
    rate: float
    epsilon: float
    accuracy: float | None


def client_rows(run: Run, rounds: Sequence[Round], last: Mapping[str, Any]) -> list[ClientRow]:
    """One row for each client.

    Args:
        run: the run.
        rounds: the records of all rounds.
        last: the last line of ``metrics.jsonl``.
    """
    labels = run.summary["labels"]
    by_class = [last.get(CLASS_PREFIX + name) for name in labels]
    out = []
    for name, counts in run.summary["clients"].items():
        total = sum(counts)
        shares = tuple(count / total for count in counts)
        events = [r.privacy_events[name] for r in rounds if name in r.privacy_events]
        event = SgdEvent.from_mapping(events[-1]) if events else None
        parts = [(s, a) for s, a in zip(shares, by_class, strict=True) if s]
        known = all(a is not None for _, a in parts)
        reasons = [f"round {r.number}: {r.refused[name]}" for r in rounds if name in r.refused]
        out.append(
            ClientRow(
                name=name,
                rows=total,
                shares=shares,
                used=sum(name in r.used for r in rounds),
                refused=", ".join(reasons[:3]) + (", ..." if len(reasons) > 3 else ""),
                noise=event.noise_multiplier if event else 0.0,
                rate=event.sample_rate if event else 0.0,
                epsilon=last["epsilon"].get(name, 0.0),
                accuracy=sum(s * a for s, a in parts if a is not None) if known else None,
            )
        )
    return out


def snippet(run: Run, folder: str = "adapter") -> str:
    """Python that loads the adapter with PEFT's own loader and classifies a text."""
    labels = ", ".join(json.dumps(name) for name in run.initial.spec.labels)
    return (
        "import torch\n"
        "from peft import PeftModel\n"
        "from clients.model import build, find_base, tokenizer\n"
        "\n"
        f"labels = [{labels}]\n"
        f"base = find_base({json.dumps(run.base.name)})\n"
        "model = build(base, len(labels))\n"
        f"model = PeftModel.from_pretrained(model, {json.dumps(folder)}).eval()\n"
        'batch = tokenizer(base)(["What a lovely film."], return_tensors="pt", truncation=True,\n'
        f"                        max_length={run.scenario.train.max_length})\n"
        "with torch.inference_mode():\n"
        '    logits = model(batch["input_ids"], batch["attention_mask"])\n'
        "print(labels[int(logits.argmax())])\n"
    )


def model_card(run: Run, lines: Sequence[Mapping[str, Any]], privacy: Mapping[str, Any]) -> str:
    """The adapter's README: what it is, how it was trained, what it promises, how to load it.

    Args:
        run: the run.
        lines: the lines of ``metrics.jsonl``.
        privacy: the privacy statement.
    """
    first, last, scenario = lines[0], lines[-1], run.scenario
    rows = [
        ("base model", f"{run.base.name}, `{run.base.digest}`"),
        ("adapter", f"LoRA, rank {scenario.train.rank}, alpha {scenario.train.alpha:g}, "
                    f"{run.initial.spec.size:,} values, `{last['adapter']}`"),
        ("data", f"{run.summary['source']}, classes {', '.join(run.summary['labels'])}"),
        ("clients", f"{run.clients}, split: {scenario.partition.scheme}"),
        ("training", f"{last['round']} rounds, recipe {run.config.recipe}, "
                     f"seed {scenario.seed}, run `{run.config.run}`"),
        ("accuracy", f"{100 * last['accuracy']:.1f} % on {last['examples']} held-out texts "
                     f"({100 * first['accuracy']:.1f} % before training)"),
    ]  # fmt: skip
    classes = [
        f"| {key.removeprefix(CLASS_PREFIX)} | {100 * value:.1f} % |"
        for key, value in last.items()
        if key.startswith(CLASS_PREFIX)
    ]
    return "\n".join(
        [
            "---",
            "library_name: peft",
            f"base_model: {run.base.name}",
            "pipeline_tag: text-classification",
            "tags: [lora, federated-learning, differential-privacy]",
            "---",
            "",
            f"# {scenario.name}",
            "",
            "A LoRA adapter and classification head, trained by federated learning with AirPEFT.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "| class | held-out accuracy |",
            "|---|---|",
            *classes,
            "",
            "## Load it",
            "",
            "```python",
            snippet(run, folder="path/to/this/folder").rstrip(),
            "```",
            "",
            "## Privacy",
            "",
            explain(privacy).replace("\n", "\n\n"),
            "",
            "`privacy.json` says the same for machines.",
            "",
            "## Limits",
            "",
            "Trained in a simulation: the clients are shares of one public data set. The adapter "
            f"reads the first {scenario.train.max_length} tokens of an English text, and works on "
            "the very base whose digest is above and on no other.",
            "",
        ]
    )


def page(
    run: Run,
    lines: Sequence[Mapping[str, Any]],
    rounds: Sequence[Round],
    privacy: Mapping[str, Any],
    picture: bytes,
    fleet: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML file.

    Args:
        run: the run.
        lines: the lines of ``metrics.jsonl``.
        rounds: the records of all rounds.
        privacy: the privacy statement.
        picture: the curves, a PNG.
        fleet: what happened to a fleet of devices, if there was one (``simulations.demo``).
    """
    from jinja2 import Environment, StrictUndefined

    # Names of classes and clients come from data files: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    clients = client_rows(run, rounds, lines[-1])
    template = environment.from_string(find("templates/report.html").read_text("utf-8"))
    return template.render(
        run=run,
        first=lines[0],
        last=lines[-1],
        lines=lines,
        labels=run.summary["labels"],
        clients=clients,
        anybody_refused=any(client.refused for client in clients),
        adapter_bytes=run.initial.nbytes,
        curves=base64.b64encode(picture).decode(),
        privacy_text=explain(privacy).splitlines(),
        privacy_json=json.dumps(privacy, indent=1, sort_keys=True),
        snippet=snippet(run),
        toml=run.scenario.to_toml(),
        fleet=fleet,
        percent=lambda value: "–" if value is None else f"{100 * value:.1f} %",
        size=_size,
    )


def draw_curves(run: Run, lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The curves of a run, a PNG."""
    return curves.draw(lines, run.privacy.epsilon if run.privacy else None)


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return (
        f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"
    )
