"""A steady load of classification requests, which remembers what every answer was made of.

The generator speaks plain HTTP to each device's local endpoint, one thread per device, and counts
what a user would notice: requests that failed, and the adapter that each answer came from.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx


@dataclass
class Served:
    """What one device has answered so far.

    Attributes:
        requests: answers and failures together.
        failed: requests without a well-formed answer.
        by_release: answers by the release that made them; the empty name is the base alone.
        switches: times that the release changed from one answer to the next.
        slowest_ms: the slowest answer.
        errors: what went wrong, by kind.
    """

    requests: int = 0
    failed: int = 0
    by_release: Counter[str] = field(default_factory=Counter)
    switches: int = 0
    slowest_ms: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    last: str | None = None


class Traffic:
    """Sends each device one request after another until stopped.

    Args:
        endpoints: base URL by device name.
        texts: what is sent, in turn.
        pause: seconds between two requests to one device.
    """

    def __init__(
        self, endpoints: Mapping[str, str], texts: Sequence[str], pause: float = 0.4
    ) -> None:
        self.served = {name: Served() for name in endpoints}
        self._texts = texts
        self._pause = pause
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(name, url), name=f"traffic-{name}", daemon=True
            )
            for name, url in endpoints.items()
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, after the requests under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)

    @property
    def requests(self) -> int:
        """Requests to all devices."""
        return sum(s.requests for s in self.served.values())

    @property
    def failed(self) -> int:
        """Failed requests to all devices."""
        return sum(s.failed for s in self.served.values())

    def _run(self, name: str, url: str) -> None:
        seen, turn = self.served[name], 0
        with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as client:
            while not self._stop.is_set():
                text = self._texts[turn % len(self._texts)]
                turn += 1
                began = time.perf_counter()
                try:
                    reply = client.post("/v1/classify", json={"texts": [text]})
                    reply.raise_for_status()
                    document = reply.json()
                    release = str(document["release"] or "")
                    if len(document["predictions"]) != 1:
                        raise ValueError("one text, but not one prediction")
                except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                    seen.failed += 1
                    seen.errors[type(error).__name__] += 1
                else:
                    seen.by_release[release] += 1
                    if seen.last is not None and seen.last != release:
                        seen.switches += 1
                    seen.last = release
                seen.slowest_ms = max(seen.slowest_ms, 1000 * (time.perf_counter() - began))
                seen.requests += 1
                self._stop.wait(self._pause)
