"""Many simulations for a table: on all processors, each once, going on where it stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Self

from aggregation import durable

Document = dict[str, Any]
Result = dict[str, float]


class Trials:
    """Runs scenarios, each only once.

    Args:
        run: makes numbers of a scenario's document; a function of a module, for it is sent to
            other processes.
        kept: file that keeps what was found.
        processes: how many at once.
    """

    def __init__(
        self, run: Callable[[Document], Result], kept: Path | None, processes: int
    ) -> None:
        self._run, self._kept = run, kept
        self._found: dict[str, Result] = {}
        if kept and kept.is_file():
            self._found = json.loads(kept.read_text())
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are made now
        spawn = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(processes)]
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def all(self, wanted: Iterable[Document]) -> list[Result]:
        """What each run ended with, in the order asked for.

        Runs of one seed go to one process, as far as that goes: it computes what the frozen layers
        make of each text once.
        """
        documents = list(wanted)
        new = {_name(made): made for made in documents if _name(made) not in self._found}
        ordered = sorted(new, key=lambda name: int(new[name]["seed"]))
        share = -(-len(ordered) // len(self._pools))
        futures = {
            self._pools[place // share].submit(self._run, new[name]): name
            for place, name in enumerate(ordered)
        }
        for count, future in enumerate(as_completed(futures), 1):
            self._found[futures[future]] = future.result()
            if self._kept:
                text = json.dumps(self._found, indent=1)
                durable.write_bytes(self._kept, text.encode() + b"\n")
            spent = time.monotonic() - self._began
            print(f"\r{spent:5.0f} s  {count} of {len(futures)} runs", end="", file=sys.stderr)
        if futures:
            print(file=sys.stderr)
        return [self._found[_name(made)] for made in documents]


def _name(made: Document) -> str:
    return json.dumps(made, sort_keys=True)
