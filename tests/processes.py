"""Programs that tests start as a person does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_HEAR = (
    "import os, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


def hearing(command: Sequence[str]) -> list[str]:
    """The same command, which Ctrl-C reaches.

    Where the tests run in the background, Ctrl-C is ignored, and a child inherits that. (Not
    ``preexec_fn``: it forks a process that has threads.)
    """
    return [sys.executable, "-S", "-E", "-c", _HEAR, *command]
