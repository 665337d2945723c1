"""All that the operator's interface speaks to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from federation.enrolment import Enrolment
from federation.fleet import Fleet
from federation.keys import Signer
from federation.metadata_age import Dates
from federation.metrics import Metrics
from federation.repository import Repository
from federation.store import Store
from federation.ticker import Ticker
from federation.wrap_shelf import WrapShelf


@dataclass(frozen=True, kw_only=True)
class Desk:
    """The objects of one server.

    Attributes:
        endpoints: where devices enrol and connect, ``{"enrol": "host:port", "fleet": ...}``.
        wake: called (from any thread) when streams should look again.
        online_key: finds an online key by its identifier, for a change of keys.
        wraps: the wrapped content keys of encrypted releases.
        status: which gateway this is, whether it decides, and what is wrong with its place.
    """

    store: Store
    fleet: Fleet
    enrolment: Enrolment
    ticker: Ticker
    repository: Repository
    metrics: Metrics
    dates: Dates
    endpoints: Callable[[], dict[str, str]]
    wake: Callable[[], None]
    online_key: Callable[[str], Signer]
    wraps: WrapShelf
    status: Callable[[], dict[str, Any]] = dict
