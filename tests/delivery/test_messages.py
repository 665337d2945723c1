"""Nouns survive the wire; what is out of bounds, or not a message at all, is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import conversion
from protos.errors import WireError
from protos.generated import fleet_pb2 as pb
from protos.messages import (
    BUCKETS,
    ContentKeyReply,
    ContentKeyRequest,
    DeviceEvent,
    EnrolReply,
    EnrolRequest,
    FetchRequest,
    Health,
    Heartbeat,
    Inventory,
    MetadataBundle,
    Quality,
    RejectReason,
    Report,
    ReportAck,
    ReportBatch,
    SignedReport,
    WatchRequest,
    bucket,
    decode_report,
    encode_report,
    from_wire,
    to_wire,
)

WORD = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
BYTES = st.binary(max_size=200)
SHARE = st.floats(0, 1)
COUNT = st.integers(0, 2**31)
QUALITY = st.builds(
    Quality, examples=COUNT, accuracy_before=SHARE, accuracy_after=SHARE, latency_ms_before=SHARE
)
HEALTH = st.builds(
    Health,
    memory_available_bytes=COUNT,
    process_memory_bytes=COUNT,
    disk_free_bytes=COUNT,
    load_1min=st.floats(0, 1000),
    battery_percent=st.none() | st.integers(0, 100),
)
REPORT = st.builds(
    Report,
    device_id=WORD,
    sequence=st.integers(1, 2**60),
    time_unix_ms=st.integers(-(2**60), 2**60),
    event=st.sampled_from(DeviceEvent),
    release=WORD,
    rollout=WORD,
    round_sequence=COUNT,
    reason=st.none() | st.sampled_from(RejectReason),
    detail=WORD,
    quality=st.none() | QUALITY,
    health=st.none() | HEALTH,
    payload_bytes=COUNT,
)
SIGNED = st.builds(SignedReport, body=BYTES, signature=BYTES)
INVENTORY = st.builds(
    Inventory,
    agent_version=WORD,
    base_digest=WORD,
    runtime=WORD,
    memory_bytes=COUNT,
    cpu_count=COUNT,
    platform=WORD,
)
NOUNS = st.one_of(
    REPORT,
    SIGNED,
    INVENTORY,
    st.builds(ReportBatch, reports=st.lists(SIGNED, max_size=4).map(tuple)),
    st.builds(ReportAck, COUNT),
    st.builds(
        EnrolRequest,
        token=WORD,
        certificate_request=BYTES,
        inventory=INVENTORY,
        tags=st.dictionaries(WORD, WORD, max_size=4),
    ),
    st.builds(EnrolReply, device_id=WORD, certificate=BYTES, authority=BYTES, root=BYTES),
    st.builds(MetadataBundle, st.dictionaries(WORD, BYTES, max_size=4)),
    st.builds(Heartbeat, st.integers(-(2**60), 2**60)),
    st.builds(FetchRequest, WORD, COUNT),
    st.builds(ContentKeyRequest, st.binary(min_size=32, max_size=32).map(bytes.hex)),
    st.builds(ContentKeyReply, BYTES),
    st.builds(WatchRequest, timestamp_version=COUNT, root_version=COUNT, running_release=WORD),
)
KINDS = [
    pb.ReportBody,
    pb.SignedReport,
    pb.ReportBatch,
    pb.EnrolRequest,
    pb.EnrolReply,
    pb.WatchRequest,
    pb.WatchEvent,
    pb.FetchRequest,
    pb.ContentKeyRequest,
    pb.ContentKeyReply,
]


@given(NOUNS)
@settings(max_examples=200, deadline=None)
def test_every_noun_survives_the_wire(noun: Any) -> None:
    message = to_wire(noun)
    assert from_wire(type(message).FromString(message.SerializeToString())) == noun


@given(REPORT)
@settings(max_examples=60, deadline=None)
def test_a_report_has_one_encoding(report: Report) -> None:
    assert decode_report(encode_report(report)) == report
    assert encode_report(report) == encode_report(decode_report(encode_report(report)))


@given(st.sampled_from(KINDS), st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_noun_or_a_refusal(kind: Any, data: bytes) -> None:
    with contextlib.suppress(DecodeError, WireError):
        from_wire(kind.FromString(data))


@given(REPORT, st.integers(0, 2**16), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_body_gives_a_report_or_a_refusal(report: Report, at: int, byte: int) -> None:
    body = bytearray(encode_report(report))
    body[at % len(body)] = byte
    with contextlib.suppress(WireError):
        decode_report(bytes(body))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.ReportBody(sequence=1), "event"),
        (pb.ReportBody(event=1), "sequence"),
        (pb.ReportBody(event=99, sequence=1), "event: 99"),  # type: ignore[arg-type]
        (pb.ReportBody(event=1, sequence=1, reason=99), "reason: 99"),  # type: ignore[arg-type]
        (pb.ReportBody(event=1, sequence=1, device_id="x" * 300), "device_id: 300"),
        (pb.ReportBody(event=1, sequence=1, release="a\x00b"), "release: contains a zero"),
        (pb.ReportBody(event=1, sequence=1, detail="x" * 5000), "detail: 5000"),
        (
            pb.ReportBody(event=1, sequence=1, quality=pb.Quality(accuracy_after=1.01)),
            "quality.accuracy_after",
        ),
        (
            pb.ReportBody(event=1, sequence=1, health=pb.Health(load_1min=float("inf"))),
            "health.load_1min",
        ),
        (
            pb.ReportBody(event=1, sequence=1, health=pb.Health(battery_percent=101)),
            "health.battery_percent",
        ),
        (pb.ReportBatch(reports=[pb.SignedReport()] * 257), "reports: 257"),
        (pb.SignedReport(signature=b"x" * 600), "signature: 600"),
        (pb.EnrolRequest(token="x" * 300), "token"),
        (pb.EnrolRequest(tags={str(n): "" for n in range(40)}), "tags: 40"),
        (pb.EnrolRequest(certificate_request=b"x" * 70_000), "certificate_request"),
        (pb.FetchRequest(path="x" * 513), "path: 513"),
        (pb.ContentKeyRequest(sha256="../x"), "is not 64 hex digits"),
        (pb.ContentKeyRequest(sha256="AB" * 32), "is not 64 hex digits"),
        (pb.ContentKeyReply(wrapped=bytes(1025)), "wrapped: 1025"),
        (pb.WatchRequest(root_version=2**63), "root_version"),
        (pb.WatchEvent(), "event"),
        (
            pb.WatchEvent(bundle=pb.MetadataBundle(files={str(n): b"" for n in range(65)})),
            "bundle: 65",
        ),
    ],
)
def test_what_is_out_of_bounds_is_named(message: Any, field: str) -> None:
    with pytest.raises(WireError, match=field):
        from_wire(message)


def test_a_body_that_is_too_long_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(WireError, match=f"at most {conversion.BODY_MAX}"):
        decode_report(b"\x00" * (conversion.BODY_MAX + 1))


def test_only_nouns_and_messages_cross() -> None:
    with pytest.raises(TypeError, match="dict does not cross"):
        to_wire({})
    with pytest.raises(TypeError, match="str is no message"):
        from_wire("x")


def test_every_reason_and_event_has_its_number() -> None:
    assert {f"REJECT_REASON_{reason.name}" for reason in RejectReason} | {
        "REJECT_REASON_UNSPECIFIED"
    } == set(pb.RejectReason.keys())
    assert {f"DEVICE_EVENT_{event.name}" for event in DeviceEvent} | {
        "DEVICE_EVENT_UNSPECIFIED"
    } == set(pb.DeviceEvent.keys())


def test_buckets_are_even_and_differ_between_salts() -> None:
    names = [f"d-{number}" for number in range(4000)]
    first = [bucket("one", name) for name in names]
    assert all(0 <= place < BUCKETS for place in first)
    assert abs(sum(place < 500 for place in first) - 200) < 60  # five per cent of 4,000
    second = [bucket("two", name) for name in names]
    both = sum(a < 500 and b < 500 for a, b in zip(first, second, strict=True))
    assert both < 30


def test_the_bucket_of_a_device_is_fixed_for_ever() -> None:
    """Devices in the field compute it too: it may never change."""
    assert [bucket("salt", name) for name in ("d-1", "d-2", "kitchen")] == [3197, 1922, 8817]
