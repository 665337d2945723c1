"""What tells a device process to end: the signals that people send, and the end of its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

from clients.device_settings import DeviceError

_PDEATHSIG = 1  # prctl(2)


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set the event; to be called in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM when the parent dies, however it dies.

    Raises:
        DeviceError: not on Linux, or the parent is gone already.
    """
    parent = os.getppid()
    try:
        result = ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, signal.SIGTERM)
    except (AttributeError, OSError):
        result = -1
    if result != 0:
        raise DeviceError(
            "--die-with-parent needs Linux: leave it out and stop the device yourself"
        )
    if os.getppid() != parent:  # it died before the request was in place
        raise DeviceError("the parent process has ended")
