"""Waiting for a condition, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(predicate: Callable[[], T], deadline: float = 20.0, *, what: str = "the condition") -> T:
    """Ask ``predicate`` until it answers with something true, and hand that out.

    Args:
        predicate: cheap and free of side effects; asked about fifty times a second.
        deadline: seconds from now after which the wait fails.
        what: the thing waited for, named in the failure.

    Raises:
        AssertionError: the deadline has passed; the message carries the last answer.
    """
    end = time.monotonic() + deadline
    pause = threading.Event()
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not there after {deadline:g} s; last seen: {answer!r}")
        pause.wait(0.02)
