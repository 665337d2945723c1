"""The gate before an adapter serves: is it worse here than what serves now?

Accuracy is measured on the device's own held-out examples, for the candidate and for the version
that serves; the latter once, and remembered. The base model alone only guesses, so it scores as
chance does over the candidate's classes.

A candidate is refused if it falls by more than the tolerance **and** luck is a poor explanation:
the two versions answer the same examples, so what counts are those on which they differ, and an
exact one-sided sign test on them (Dixon and Mood 1946; McNemar 1947) has to reject "no worse" at
5 %. So an adapter that is no worse is refused by a device at most once in twenty times, whatever
the tolerance; and fewer than five examples can refuse nothing.
"""

from __future__ import annotations

import logging
import math

from clients.inspection import Refusal
from clients.probe import HeldOut, Measurement, measure, measure_latency
from clients.runtime import AdapterVersion, Runtime
from protos.messages import DeviceEvent, Quality, RejectReason

SIGNIFICANCE = 0.05

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
        fell = before.accuracy - after.accuracy > allowed
        if fell and not may_fall and luck(before, after) <= SIGNIFICANCE:
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


def luck(before: Measurement, after: Measurement) -> float:
    """How likely a fall like this, or a worse one, is if the candidate is no worse.

    >>> one = Measurement(6, 1.0, 0.0, (True,) * 6)
    >>> round(luck(one, Measurement(6, 1 / 6, 0.0, (True, *(False,) * 5))), 6)
    0.03125
    >>> chance = Measurement(8, 0.5, 0.0)  # the base alone was not asked
    >>> round(luck(chance, Measurement(8, 0.125, 0.0, (True, *(False,) * 7))), 6)
    0.035156
    """
    if before.right:
        pairs = list(zip(before.right, after.right, strict=True))
        lost = sum(was and not now for was, now in pairs)
        won = sum(now and not was for was, now in pairs)
        return _at_most(won, lost + won, 0.5)
    return _at_most(sum(after.right), after.examples, before.accuracy)


def _at_most(successes: int, trials: int, chance: float) -> float:
    """P(X <= successes) for X binomial, by logarithms: the coefficients outgrow a float.

    >>> round(_at_most(900, 2000, 0.5), 7), _at_most(0, 0, 0.5), _at_most(1, 2, 1.0)
    (4.2e-06, 1.0, 0.0)
    """
    if successes >= trials:
        return 1.0
    if not 0.0 < chance < 1.0:
        return 1.0 if chance <= 0.0 else 0.0
    hit, miss, ways = math.log(chance), math.log1p(-chance), math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            ways - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * hit + (trials - k) * miss
        )
        for k in range(successes + 1)
    )


def allowed_fall(tolerance: float, examples: int) -> float:
    """How far accuracy may fall on so many examples; one example alone never decides.

    >>> round(allowed_fall(0.05, 10), 6), round(allowed_fall(0.05, 1000), 6)
    (0.1, 0.05)
    """
    # A hair more, so that the rounding of two quotients decides nothing either.
    return max(tolerance, 1.0 / max(1, examples)) + 1e-9
