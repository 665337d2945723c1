"""What the demo adds to a run: its log, registered versions, the fleet in the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation import durable, payload, peft_layout
from aggregation.adapter import Adapter
from aggregation.beside import residual_adapters, stacked
from federation.checkpoint import Checkpoints
from federation.provenance import evaluation
from federation.registry import Registry
from federation.rounds import Round
from privacy.statement import FILE
from protos.signed import Lineage
from simulations import folder, report, server_app
from simulations.scenario import Scenario
from simulations.server_app import RunResult

REGISTRY = "registry"


def shipped(adapter: Adapter) -> Adapter:
    """The adapter as devices will decode it: rounded to the precision of the payload."""
    sent = payload.encode(adapter)
    return payload.decode(
        sent.data, spec_digest=adapter.spec.digest, adapter_digest=sent.adapter_digest
    )


def register_latest(scenario: Scenario, out: Path) -> Path:
    """Register the adapter of the newest checkpoint; returns its folder in the registry."""
    run = folder.prepare(scenario, out)
    found = Checkpoints(run.checkpoints, run.config.run).latest()
    if found is None:
        raise folder.RunError(f"{out} has no checkpoint yet")
    rounds, state = found
    told = server_app.privacy_statement(run, rounds, folder.SIMULATED)
    rest = residual_adapters(state) if run.config.chosen().refactor.beside else ()
    whole = stacked(state.adapter, rest)
    return _register(scenario, out, shipped(whole), rounds[-1], told, None)


def finish(scenario: Scenario, run: RunResult) -> Adapter:
    """Register the trained adapter, and make the run's adapter folder the one that is shipped.

    A release is one adapter: what a recipe keeps beside it is stacked in. A payload is bfloat16.
    What the folder holds afterwards is what devices decode, so that PEFT's own loader gives the
    logits that they serve.
    """
    rounds = folder.done_rounds(folder.prepare(scenario, run.out))
    adapter = shipped(stacked(run.adapter, run.beside))
    card = (run.adapter_folder / "README.md").read_text("utf-8")
    card = card.replace(run.adapter.digest, adapter.digest)
    source = _register(scenario, run.out, adapter, rounds[-1], run.privacy, card)
    files = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    durable.write_folder(run.adapter_folder, files)
    return peft_layout.read(run.adapter_folder)


def _register(
    scenario: Scenario,
    out: Path,
    adapter: Adapter,
    record: Round,
    told: Mapping[str, Any],
    card: str | None,
) -> Path:
    registry = Registry(out / REGISTRY)
    metrics = record.metrics
    version = registry.put(
        adapter,
        base_name=scenario.base.name,
        now=datetime.now(UTC),
        lineage=Lineage(
            parent=record.adapter_in,
            run=scenario.run,
            round=record.number,
            recipe=scenario.federation.recipe,
        ),
        evaluation=evaluation("heldout", metrics["accuracy"], int(metrics["examples"])),
        privacy=told,
        card=card,
    )
    return registry.folder(version.digest)


def report_fleet(scenario: Scenario, result: RunResult, fleet: Mapping[str, Any]) -> None:
    """Write the report again, with what happened to the fleet in it."""
    run = folder.prepare(scenario, result.out)
    rounds = folder.done_rounds(run)
    picture = (result.out / folder.CURVES).read_bytes()
    lines = server_app.lines_of(run, rounds)
    told = json.loads((result.adapter_folder / FILE).read_bytes())
    page = report.page(run, lines, rounds, told, picture, fleet=fleet)
    durable.write_bytes(result.report, page.encode())


def log_to(path: Path) -> None:
    """Send this process's log to a file and nowhere else: the screen belongs to the view."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    for logger in (root, logging.getLogger("flwr")):  # Flower brings a handler of its own
        for old in list(logger.handlers):
            logger.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("airpeft").setLevel(logging.INFO)
