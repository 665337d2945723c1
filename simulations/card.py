"""The model card that lies beside an adapter, and the code in it that loads the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aggregation.beside import folder_name
from federation.personal import ACCURACY, EXAMPLES
from privacy.statement import explain
from simulations.evaluation import CLASS_PREFIX
from simulations.records import shared_only

if TYPE_CHECKING:
    from simulations.folder import Run


def snippet(run: Run, folder: str = "adapter", *, residuals: int = 0) -> str:
    """Python that loads the adapter with PEFT's own loader and classifies a text.

    Args:
        run: the run.
        folder: where the reader has the adapter.
        residuals: how many frozen adapters lie beside it; all of them are made active.
    """
    names = [folder_name(index) for index in range(residuals)]
    beside = "".join(
        f"model.load_adapter({json.dumps(f'{folder}/{name}')}, adapter_name={json.dumps(name)})\n"
        for name in names
    )
    if names:
        beside += f"model.base_model.set_adapter({json.dumps(['default', *names])})\n"
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
        f"{beside}"
        'batch = tokenizer(base)(["What a lovely film."], return_tensors="pt", truncation=True,\n'
        f"                        max_length={run.scenario.train.max_length})\n"
        "with torch.inference_mode():\n"
        '    logits = model(batch["input_ids"], batch["attention_mask"])\n'
        "print(labels[int(logits.argmax())])\n"
    )


def model_card(
    run: Run,
    lines: Sequence[Mapping[str, Any]],
    privacy: Mapping[str, Any],
    *,
    residuals: int = 0,
) -> str:
    """The adapter's README: what it is, how it was trained, what it promises, how to load it.

    Args:
        run: the run.
        lines: the lines of ``metrics.jsonl``.
        privacy: the privacy statement.
        residuals: how many frozen adapters lie beside it.
    """
    first, last, scenario = lines[0], lines[-1], run.scenario
    chosen = run.config.chosen()
    rows = [
        ("base model", f"{run.base.name}, `{run.base.digest}`"),
        ("adapter", f"{kind(run)}, {ranks(run)}, "
                    f"{run.initial.spec.size:,} values, `{last['adapter']}`"),
        ("data", f"{run.summary['source']}, classes {', '.join(run.summary['labels'])}"),
        ("clients", f"{run.clients}, split: {scenario.partition.scheme}"),
        ("training", f"{last['round']} rounds, recipe {run.config.recipe}, "
                     f"seed {scenario.seed}, run `{run.config.run}`"),
        ("recipe", f"`{chosen}`"),
        *_traffic(run, lines),
        ("accuracy", f"{100 * last['accuracy']:.1f} % on {last['examples']} held-out texts "
                     f"({100 * first['accuracy']:.1f} % before training)"),
    ]  # fmt: skip
    if ACCURACY in last:
        rows.append(("own accuracy", f"{100 * last[ACCURACY]:.1f} % on {last[EXAMPLES]:.0f} rows "
                     "that clients kept out, each measured with its own model"))  # fmt: skip
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
            f"tags: [{kind(run).lower()}, federated-learning, differential-privacy]",
            "---",
            "",
            f"# {scenario.name}",
            "",
            f"An adapter ({kind(run)}) and classification head, trained by federated learning with "
            "AirPEFT.",
            "",
            *([_no_model(run), ""] if chosen.train.personal else []),
            *([f"**Warning.** {_sentence(chosen.warning)}", ""] if chosen.warning else []),
            *([_beside(residuals), ""] if residuals else []),
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
            snippet(run, folder="path/to/this/folder", residuals=residuals).rstrip(),
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


def kind(run: Run) -> str:
    """What the adapter is, in the word that people use for it."""
    words = {"lora": "LoRA", "ia3": "IA3", "prompt": "Prompt", "prefix": "Prefix"}
    return words.get(run.scenario.train.method, "PEANuT")


def ranks(run: Run) -> str:
    """How large the adapter is, in words: its ranks, or what another method has instead."""
    train = run.scenario.train
    others = {
        "ia3": f"{len(run.initial.spec.own)} vectors",
        "prompt": f"{train.virtual_tokens} virtual tokens",
        "prefix": f"{train.virtual_tokens} virtual tokens in {train.layers} layers",
        "bottleneck": f"{train.bottleneck} units in the middle",
    }
    if train.method in others:
        return others[train.method]
    several = sorted(set(run.config.ranks.values()))
    clients = f" (clients: {', '.join(map(str, several))})" if len(several) > 1 else ""
    return f"rank {train.rank}{clients}, alpha {train.alpha:g}"


def _traffic(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What was sent; nothing where it would tell how many clients took part."""
    if run.config.client_privacy is not None:
        return []
    up, down = (sum(line[f"bytes_{way}"] for line in lines) for way in ("up", "down"))
    return [("sent", f"{up:,} bytes up, {down:,} bytes down, by all clients together")]


def _no_model(run: Run) -> str:
    return f"**There is no global model.** {_sentence(shared_only(run.config.recipe))}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _beside(residuals: int) -> str:
    names = ", ".join(f"`{folder_name(index)}/`" for index in range(residuals))
    return (
        f"**The adapter is not all.** The recipe keeps a part of what was learnt beside it, in "
        f"{names}: load and activate both, as below. `airpeft release make` stacks them into one."
    )
