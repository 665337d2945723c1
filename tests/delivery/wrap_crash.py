"""Adds wrapped keys again and again, killed with SIGKILL before the 1st, 2nd, ... change to the
disk, and prints what a fresh start finds after each kill (JSON lines)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from federation.wrap_shelf import WrapShelf
from protos.wraps import Wraps
from tests.device.crashing import kill_before

KEY, SHA = bytes(32), "ab" * 32


def main(folder: Path) -> None:
    first, more = (Wraps.to(KEY, SHA, [bytes([n]) * 32 for n in some]) for some in ((9,), (10, 11)))
    for step in range(1, 100):
        place = folder / str(step)
        WrapShelf(place).add(first)
        child = os.fork()
        if child == 0:
            kill_before(step)
            WrapShelf(place).add(more)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = WrapShelf(place).get(SHA)
        whole = found in (first, first.merged(more))
        again = WrapShelf(place).add(more) + len(found.entries)
        print(json.dumps({"keys": len(found.entries), "whole": whole, "then": again}), flush=True)
        if not os.WIFSIGNALED(status):
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
