"""The gate before an adapter serves: is it worse here than what serves now?

Accuracy is measured on the device's own held-out examples, for the candidate and for the version
that serves; the latter once, and remembered. The base model alone only guesses, so it scores as
chance does over the candidate's classes.
"""

from __future__ import annotations

import logging

from clients.inspection import Refusal
from clients.probe import HeldOut, Measurement, measure, measure_latency
from clients.runtime import AdapterVersion, Runtime
from protos.messages import DeviceEvent, Quality, RejectReason

log = logging.getLogger("airpeft.clients.quality")


class QualityGate:
    """Compares candidates with what serves.

    Args:
        runtime: the engine that serves.
        held_out: the device's own examples; None: there is nothing to compare.
        tolerance: accuracy may fall by this much (0 to 1), and by one example in any case.
    """

    def __init__(self, runtime: Runtime, held_out: HeldOut | None, tolerance: float) -> None:
        self._runtime, self._held_out, self._tolerance = runtime, held_out, tolerance
        self._measured: dict[str, Measurement | None] = {}

    def check(self, version: AdapterVersion, *, may_fall: bool) -> Quality | None:
        """Measure a candidate.

        Args:
            version: loaded, not live.
            may_fall: an operator's roll-back: measured and told, not refused.

        Returns:
            What was measured; None without examples of the candidate's classes.

        Raises:
            Refusal: quality-regressed.
            SelfTestError: a score is not finite.
        """
        if self._held_out is None:
            return None
        before = self._before(version, self._held_out)
        after = measure(self._runtime, version, self._held_out)
        if before is None or after is None:
            log.warning("%s: the held-out examples are of other classes", version.name)
            return None
        quality = Quality(
            examples=after.examples,
            accuracy_before=before.accuracy,
            accuracy_after=after.accuracy,
            latency_ms_before=before.latency_ms,
            latency_ms_after=after.latency_ms,
        )
        allowed = allowed_fall(self._tolerance, after.examples)
        if before.accuracy - after.accuracy > allowed and not may_fall:
            raise Refusal(
                DeviceEvent.REVERTED,
                RejectReason.QUALITY_REGRESSED,
                f"accuracy {after.accuracy:.4f} after {before.accuracy:.4f} on {after.examples} "
                f"held-out examples; a fall of {allowed:.4f} is allowed",
                quality=quality,
            )
        self._measured[version.digest] = after
        return quality

    def _before(self, candidate: AdapterVersion, held_out: HeldOut) -> Measurement | None:
        serving = self._runtime.pin()
        if not serving.digest:
            latency = measure_latency(self._runtime, serving, held_out)
            chance = 1.0 / max(1, len(candidate.labels))
            return Measurement(len(held_out.texts), chance, latency)
        if serving.digest not in self._measured:
            self._measured = {serving.digest: measure(self._runtime, serving, held_out)}
        return self._measured[serving.digest]


def allowed_fall(tolerance: float, examples: int) -> float:
    """How far accuracy may fall on so many examples; one example alone never decides.

    >>> round(allowed_fall(0.05, 10), 6), round(allowed_fall(0.05, 1000), 6)
    (0.1, 0.05)
    """
    # A hair more, so that the rounding of two quotients decides nothing either.
    return max(tolerance, 1.0 / max(1, examples)) + 1e-9
