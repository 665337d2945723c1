"""What counts against a release on a device, and how it is grouped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from federation.concerns import Complaint, Kind, complaints, concerns
from federation.orders import Observation
from federation.policy import Policy, Retries
from federation.waves import RolloutError
from protos.messages import DeviceEvent, Health, Quality, RejectReason

GIB = float(1 << 30)
WELL = Health(
    memory_available_bytes=2 << 30,
    process_memory_bytes=1 << 30,
    disk_free_bytes=2 << 30,
    load_1min=0.5,
    battery_percent=80,
    temperature_celsius=60.0,
)
BOUNDS = Policy(
    max_load_factor=2.0,
    max_celsius=85.0,
    min_battery_percent=20.0,
    min_disk_bytes=GIB,
    min_memory_bytes=GIB,
)


def device(after: Health, before: Health | None = WELL) -> Observation:
    return Observation(
        device_id="d-1", outcome=DeviceEvent.COMMITTED, health_before=before, health_after=after
    )


@pytest.mark.parametrize(
    ("field", "ill", "complaint"),
    [
        ("process_memory_bytes", 4 << 30, Complaint.MEMORY),
        ("load_1min", 3.5, Complaint.LOAD),
        ("temperature_celsius", 91.0, Complaint.HEAT),
        ("battery_percent", 11, Complaint.BATTERY),
        ("disk_free_bytes", 1000, Complaint.DISK),
        ("memory_available_bytes", 1000, Complaint.FREE_MEMORY),
    ],
)
def test_each_measure_counts_beyond_its_bound_and_only_if_it_got_there_with_the_release(
    field: str, ill: float, complaint: Complaint
) -> None:
    after = replace(WELL, **{field: ill})
    assert complaints(BOUNDS, device(after)) == (complaint,)
    assert complaints(BOUNDS, device(after, before=after)) == ()
    default = (complaint,) if complaint is Complaint.MEMORY else ()
    assert complaints(Policy(), device(after)) == default
    assert complaints(BOUNDS, replace(device(after), outcome=None)) == ()


def test_a_device_without_a_battery_or_a_sensor_has_no_trouble_with_them() -> None:
    bare = replace(WELL, battery_percent=None, temperature_celsius=None)
    assert complaints(BOUNDS, device(bare, before=bare)) == ()


def test_concerns_are_grouped_by_reason_and_name_devices() -> None:
    def one(name: str, **fields: object) -> Observation:
        return Observation(device_id=name, **fields)  # type: ignore[arg-type]

    slow = Quality(
        examples=1,
        accuracy_before=0.5,
        accuracy_after=0.5,
        latency_ms_before=1.0,
        latency_ms_after=999.0,
    )
    reached = [
        one("d-1", outcome=DeviceEvent.COMMITTED, quality=slow),
        one("d-2", outcome=DeviceEvent.REJECTED, reason=RejectReason.GUARD),
        one("d-3", outcome=DeviceEvent.REVERTED, reason=RejectReason.HEALTH_REGRESSED),
        one("d-4", outcome=DeviceEvent.REJECTED, reason=RejectReason.GUARD),
        one("d-5", outcome=DeviceEvent.FAILED, reason=RejectReason.NO_SPACE),
        one("d-6"),
        one("d-7", outcome=DeviceEvent.REJECTED, reason=RejectReason.CLOCK),
        one("d-8", outcome=DeviceEvent.COMMITTED),
    ]
    found = concerns(Policy(retries=Retries(space=1)), reached)
    assert [(row.kind, row.reason, row.named) for row in found] == [
        (Kind.FAILED, "guard", ("d-2", "d-4")),
        (Kind.FAILED, "health-regressed", ("d-3",)),
        (Kind.WORSE_OFF, "latency", ("d-1",)),
        (Kind.RETRYING, "no-space", ("d-5",)),
        (Kind.WAITING, "clock", ("d-7",)),
        (Kind.WAITING, "silent", ("d-6",)),
    ]
    kinds = {row.kind for row in concerns(Policy(), reached, waiting=False)}
    assert Kind.WAITING not in kinds


@pytest.mark.parametrize(
    "field", ["max_load_factor", "max_celsius", "min_battery_percent", "min_disk_bytes"]
)
def test_an_impossible_bound_is_refused_by_its_name(field: str) -> None:
    with pytest.raises(RolloutError, match=field):
        Policy(**{field: 0.0})  # type: ignore[arg-type]
