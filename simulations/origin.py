"""Where a run's adapter came from and how good it is, for whoever releases it."""

from __future__ import annotations

import json

from federation import provenance
from federation.rounds import Round
from protos.signed import Lineage
from simulations.datasets import SHIPPED
from simulations.folder import Run
from simulations.resources import find


def version_file(run: Run, record: Round) -> bytes:
    """The ``version.json`` beside the adapter of a round (:mod:`federation.provenance`).

    The fingerprint of the data is told for a shipped data set, which everybody has; whether that
    of a user's own rows may be told is for the user to say (``airpeft release make --data``).

    Args:
        run: the run.
        record: the round that made the adapter.
    """
    data, metrics = run.scenario.data, record.metrics
    known = () if data.path else (provenance.fingerprint(str(find(SHIPPED[data.dataset][0]))),)
    lineage = Lineage(
        parent=record.adapter_in,
        run=run.config.run,
        round=record.number,
        recipe=run.scenario.federation.recipe,
        data=known,
    )
    measured = provenance.evaluation("heldout", metrics["accuracy"], int(metrics["examples"]))
    document = provenance.version_document(lineage, measured)
    return json.dumps(document, indent=1, sort_keys=True).encode()
