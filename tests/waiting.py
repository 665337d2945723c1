"""Waiting for a condition, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(
    predicate: Callable[[], T],
    deadline: float = 240.0,
    *,
    what: str = "the condition",
    every: float = 0.02,
) -> T:
    """Ask ``predicate`` until it answers with something true, and hand that out.

    Args:
        predicate: cheap; asked again and again.
        deadline: seconds from now after which the wait fails. It only ends a test that hangs: a
            machine may be slow, and what is to be quick is not shown by a clock.
        what: the thing waited for, named in the failure.
        every: seconds between two questions.

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
        pause.wait(every)
