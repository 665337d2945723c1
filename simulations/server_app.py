"""The ServerApp of a simulation: the same function for every backend.

``app`` is what Flower starts (``flwr run .``), with the scenario named in the run configuration of
``pyproject.toml``. ``airpeft simulate`` calls :func:`serve` over its own grid or over Ray.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from aggregation import beside, durable, peft_layout
from aggregation.adapter import Adapter
from clients.trainer import Trainer
from federation import cohort
from federation.provenance import VERSION_FILE
from federation.rounds import Round
from federation.server_app import run_training
from federation.strategy import Reply, TrainingResult
from privacy import secure_statement
from privacy.cohort_statement import section
from privacy.statement import FILE, statement
from simulations import card, evaluation, folder, origin, preflight, records, report
from simulations.events import ClientDone, Event, Finished, RoundDone, RoundStarted
from simulations.folder import Run
from simulations.scenario import Scenario, load

GATHER_SECONDS = 120.0

_log = logging.getLogger("airpeft.simulations.server_app")

Progress = Callable[[Event], None]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        run: name of the run.
        out: the run folder.
        adapter: the adapter.
        adapter_folder: the adapter in PEFT's layout.
        beside: frozen adapters that belong to it, in ``residual/`` of that folder.
        metrics: the lines of ``metrics.jsonl``.
        privacy: the privacy statement.
        report: the report.
    """

    run: str
    out: Path
    adapter: Adapter
    adapter_folder: Path
    metrics: tuple[dict[str, Any], ...]
    privacy: dict[str, Any]
    report: Path
    beside: tuple[Adapter, ...] = ()


def serve(grid: Grid, run: Run, trainer: Trainer, randomness: str, progress: Progress) -> RunResult:
    """Train over a grid, and leave the adapter and the report in the run folder.

    Args:
        grid: carries the messages.
        run: from ``simulations.folder.prepare``.
        trainer: measures the global adapter.
        randomness: where the clients' noise comes from, for the privacy statement.
        progress: told of everything that happens.
    """
    rounds = list(folder.done_rounds(run))

    def on_round(record: Round) -> None:
        rounds.append(record)
        lines = lines_of(run, rounds)
        durable.write_bytes(run.out / folder.METRICS, records.jsonl(lines))
        progress(RoundDone(record.number, lines[-1]))

    def on_reply(reply: Reply) -> None:
        progress(ClientDone(reply.client, reply.round, reply.seconds, reply.refused))

    length = run.scenario.train.max_length
    with run.account() as account:
        result = run_training(
            grid,
            run.config,
            initial=run.initial,
            evaluate=evaluation.by_class(trainer, run.heldout, max_length=length),
            on_begin=lambda number, cohort: progress(RoundStarted(number, cohort)),
            on_reply=on_reply,
            on_round=on_round,
            checkpoint=run.checkpoints,
            account=account,
        )
    return _finish(run, result, randomness, progress)


def privacy_statement(run: Run, rounds: Sequence[Round], randomness: str) -> dict[str, Any]:
    """What the rounds so far have spent, as it stands beside the adapter.

    Args:
        run: the run.
        rounds: its records, round 0 first.
        randomness: where the clients' noise came from.
    """
    last, promised = rounds[-1].number, run.config.client_privacy
    events, silent = records.example_events(rounds, last)
    part = None
    sums = [record.secure for record in rounds]
    if promised is not None:
        spent = records.client_events(rounds, last)
        noise = secure_statement.shares(sums)
        # Of shares that clients add, the server knows no more than what simulated ones do.
        whose = folder.SIMULATED if promised.mechanism == "distributed" else run.randomness
        part = section(promised, spent, rounds=last, randomness=whose, shares=noise)
    private = run.config.chosen().private
    hidden = secure_statement.section(
        sums,
        bits=getattr(private, "bits", 0),
        identities=secure_statement.SIMULATED,
    )
    return statement(
        events,
        run.privacy,
        randomness=randomness,
        rounds=last,
        client=part,
        secure_sum=hidden,
        gradients=run.gradients,
        silent=silent,
    )


def lines_of(run: Run, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, one for each round."""
    promised = run.config.client_privacy
    return [records.line(rounds, record, run.privacy, promised) for record in rounds]


def _finish(run: Run, result: TrainingResult, randomness: str, progress: Progress) -> RunResult:
    lines = lines_of(run, result.rounds)
    told = privacy_statement(run, result.rounds, randomness)
    picture = report.draw_curves(run, lines)
    source = records.origin(
        run.config, run.scenario.run, result.rounds, data=origin.fingerprints(run)
    )
    extra = {
        FILE: json.dumps(told, indent=1, sort_keys=True).encode(),
        VERSION_FILE: json.dumps(source, indent=1, sort_keys=True).encode(),
        **beside.files(result.beside, run.base.name),
    }
    peft_layout.write(
        run.out / folder.ADAPTER,
        result.adapter,
        base_name=run.base.name,
        card=card.model_card(run, lines, told, residuals=len(result.beside)),
        extra=extra,
    )
    durable.write_bytes(run.out / folder.METRICS, records.jsonl(lines))
    durable.write_bytes(run.out / folder.CURVES, picture)
    page = report.page(run, lines, result.rounds, told, picture, residuals=len(result.beside))
    durable.write_bytes(run.out / folder.REPORT, page.encode())
    progress(Finished(result.adapter.digest, run.out / folder.ADAPTER, run.out / folder.REPORT))
    return RunResult(
        run=run.config.run,
        out=run.out,
        adapter=result.adapter,
        adapter_folder=run.out / folder.ADAPTER,
        metrics=tuple(lines),
        privacy=told,
        report=run.out / folder.REPORT,
        beside=result.beside,
    )


def _tell(event: Event) -> None:
    if isinstance(event, RoundDone):
        spent, client = event.metrics["epsilon_max"], event.metrics.get("client_epsilon")
        _log.info(
            "round %d: accuracy %.4f, loss %.4f%s%s",
            event.round,
            event.metrics["accuracy"],
            event.metrics["loss"],
            f", largest epsilon {spent:.3f}" if spent else "",
            f", epsilon of a client {client:.3f}" if client else "",
        )
    elif isinstance(event, Finished):
        _log.info("adapter %s in %s", event.adapter_digest, event.adapter)


app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the scenario that the run configuration names; see ``[tool.flwr.app.config]``.

    Raises:
        SimulationError: if the scenario or its data are not usable.
    """
    from clients.client_app import resident

    _log_to_console()
    scenario = _scenario(
        context,
        clients=len(
            cohort.gather(lambda: list(grid.get_node_ids()), wanted=1, seconds=GATHER_SECONDS)
        ),
    )
    out = Path(str(context.run_config.get("out") or f"runs/{scenario.name}-flwr-{context.run_id}"))
    ready = preflight.draft(scenario)
    with folder.locked(out) as where:
        _log.info("run folder: %s", where)
        run = folder.prepare(scenario, where, ready, clients_here=False)
        if run.gradients:
            _log.info("gradients per example by %s", run.gradients)
        trainer = resident(run.scenario.base.name, run.ledger, False, 1)
        serve(grid, run, trainer, folder.SIMULATED, _tell)


def _log_to_console() -> None:
    """Flower streams what an app prints, and sets up no logger but its own."""
    ours = logging.getLogger("airpeft")
    ours.setLevel(logging.INFO)
    if not ours.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("airpeft: %(message)s"))
        ours.addHandler(handler)


def _scenario(context: Context, clients: int) -> Scenario:
    """The scenario of a Flower run, its data dealt to as many clients as there are SuperNodes."""
    settings = context.run_config
    path = _find(Path(str(settings["scenario"])))
    overrides = [*str(settings.get("overrides", "")).split(), f"partition.clients={clients}"]
    fewest = load(path, overrides=overrides[:-1]).federation.min_updates
    if fewest > clients:
        overrides.append(f"federation.min_updates={clients}")
    return load(path, overrides=overrides)


def _find(path: Path) -> Path:
    """A path relative to where we are, or to the app: Flower runs apps from a copy."""
    beside = Path(__file__).parents[1] / path
    return path if path.is_file() or not beside.is_file() else beside
