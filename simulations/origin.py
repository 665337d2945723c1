"""Which data a run was trained on, as far as everybody may know it."""

from __future__ import annotations

from federation import provenance
from simulations.datasets import SHIPPED
from simulations.folder import Run
from simulations.resources import find


def fingerprints(run: Run) -> tuple[str, ...]:
    """Fingerprints of the data for ``version.json`` (:mod:`federation.provenance`).

    That of a shipped data set is told, which everybody has; whether that of a user's own rows may
    be told is for the user to say (``airpeft release make --data``).
    """
    data = run.scenario.data
    return () if data.path else (provenance.fingerprint(str(find(SHIPPED[data.dataset][0]))),)
