"""The clients that are at work in a run without rounds, and how that survives an interruption.

>>> simulated_seconds(7, "client-00001", 3) == simulated_seconds(7, "client-00001", 3)
True
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from aggregation.adapter import Adapter
from aggregation.assignment import Assignment
from aggregation.errors import AggregationError
from aggregation.state import GlobalState

FLIGHTS = "flights.json"
SCHEMA = 1

_log = logging.getLogger("airpeft.federation.flights")


@dataclass(frozen=True, eq=False)
class Flight:
    """One client at work.

    Attributes:
        client: its stable name.
        version: the version of the adapter that it was handed, as a round number from 1.
        finish: when it will be done on a simulation's clock.
        message: Flower's id of the request.
        asked: when it was asked, on the server's clock.
        assignment: what it was asked to do.
        start: what it was handed; None once that is too old to be of use.
    """

    client: str
    version: int
    finish: float
    message: str
    asked: float
    assignment: Assignment
    start: Adapter | None


@dataclass(frozen=True, eq=False)
class Saved:
    """What goes on after an interruption.

    Attributes:
        flights: client, version and finish of each one at work, in the order of asking.
        adapters: the global adapter of each version that one of them was handed.
        now: a simulation's clock.
    """

    flights: tuple[tuple[str, int, float], ...] = ()
    adapters: Mapping[int, Adapter] | None = None
    now: float = 0.0


def simulated_seconds(seed: int, client: str, version: int) -> float:
    """How long a simulated client takes: the same on every machine and with any number of workers.

    A client has a speed of its own (log-normal, a factor of 1.6 either way), and a task takes half
    normal time, the shape that FedBuff (2106.06639, section 5) found in a fleet of phones. The unit
    is nobody's: only the order in which clients finish matters.
    """
    speed = _normal(f"speed:{seed}:{client}")
    task = _normal(f"task:{seed}:{client}:{version}")
    return float(np.exp(0.5 * speed) * (0.1 + abs(task)))


def to_files(
    flights: Iterable[Flight], adapters: Mapping[int, Adapter], now: float
) -> dict[str, bytes]:
    """What :func:`from_files` needs, for a checkpoint's folder."""
    useful = [flight for flight in flights if flight.start is not None]
    listed = [[f.client, f.version, f.finish] for f in useful]
    needed = sorted({flight.version for flight in useful})
    digests = {str(version): adapters[version].digest for version in needed}
    document = {"schema": SCHEMA, "now": now, "flights": listed, "adapters": digests}
    files = {FLIGHTS: json.dumps(document, sort_keys=True, indent=1).encode()}
    for version in needed:
        files[_file(version)] = GlobalState(adapters[version]).to_bytes()
    return files


def from_files(files: Mapping[str, bytes]) -> Saved:
    """The inverse of :func:`to_files`; nobody is at work if it is not all there and undamaged.

    Nothing is lost then but time: the clients that were at work are asked anew.
    """
    try:
        document = json.loads(files[FLIGHTS])
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r} is not {SCHEMA}")
        adapters = {}
        for version, digest in document["adapters"].items():
            adapters[int(version)] = GlobalState.from_bytes(files[_file(int(version))]).adapter
            if adapters[int(version)].digest != digest:
                raise ValueError(f"the adapter of version {version} does not match its digest")
        flights = tuple((str(c), int(v), float(f)) for c, v, f in document["flights"])
        if not {version for _, version, _ in flights} <= set(adapters):
            raise ValueError("a version is missing")
        return Saved(flights, adapters, float(document["now"]))
    except (AggregationError, KeyError, TypeError, ValueError, AttributeError) as error:
        _log.warning("who was at work is not known (%s): clients are asked anew", error)
        return Saved()


def _file(version: int) -> str:
    return f"version-{version:05d}.safetensors"


def _normal(text: str) -> float:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    return float(np.random.Generator(np.random.PCG64(number)).standard_normal())
