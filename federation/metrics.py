"""What the server counts, in Prometheus base units; never a device's name as a label."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from federation.rollout import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server; each server has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self.streams = Gauge("airpeft_watch_streams", "Open Watch streams.", registry=self.registry)
        self.devices = Gauge(
            "airpeft_devices", "Enrolled devices by state.", ["state"], registry=self.registry
        )
        self.behind = Gauge(
            "airpeft_devices_behind",
            "Devices that have lacked newer metadata for a day.",
            registry=self.registry,
        )
        self.rollouts = Gauge(
            "airpeft_rollouts", "Rollouts by state.", ["state"], registry=self.registry
        )
        self.bundles = counter("airpeft_bundles_pushed_total", "Metadata bundles pushed.")
        self.fetches = counter("airpeft_fetches_total", "Downloads by how they ended.", "result")
        self.fetched = counter("airpeft_fetch_bytes_total", "Payload and metadata bytes sent.")
        self.content_keys = counter(
            "airpeft_content_keys_total", "Wrapped content keys that devices asked for.", "result"
        )
        self.refused = counter(
            "airpeft_requests_refused_total",
            "Calls of devices that were refused, by call and reason.",
            "call",
            "reason",
        )
        self.altered = counter(
            "airpeft_altered_payloads_total", "Payload files that are not what their name says."
        )
        self.reports = counter(
            "airpeft_reports_total", "Device reports taken in.", "event", "reason"
        )
        self.repeated = counter(
            "airpeft_reports_repeated_total", "Device reports that had come before: without effect."
        )
        self.enrolments = counter("airpeft_enrolments_total", "Enrolments by result.", "result")
        self.operators = counter(
            "airpeft_operator_requests_refused_total",
            "Requests of operators that were refused, by HTTP status.",
            "status",
        )
        self.round = Gauge(
            "airpeft_round_sequence", "Sequence of the round in force.", registry=self.registry
        )
        self.expiry = Gauge(
            "airpeft_metadata_expires_timestamp_seconds",
            "When each role's metadata expires, Unix time.",
            ["role"],
            registry=self.registry,
        )

    def render(self, devices: Mapping[str, int], rollouts: Mapping[str, int]) -> bytes:
        """The exposition text, after setting the gauges that are read from the database."""
        for state in ("active", "revoked"):
            self.devices.labels(state).set(devices.get(state, 0))
        for one in State:
            self.rollouts.labels(one.value).set(rollouts.get(one.value, 0))
        return generate_latest(self.registry)
