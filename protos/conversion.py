"""Nouns to protobuf and back; the one file that knows the generated classes of ``fleet.proto``.

Whatever comes in is checked while it is converted: lengths, counts, ranges, finiteness. Nothing is
clipped or repaired on the way in; what is out of bounds is refused with the field's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from protos.errors import WireError
from protos.generated import fleet_pb2 as pb
from protos.messages import (
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
)

NAME_MAX = 200  # characters of an identifier or a file name
PATH_MAX = 512  # characters of a repository path
DETAIL_MAX = 2_000  # characters of free text in a report
BODY_MAX = 16 * 1024  # bytes of one report body
BATCH_MAX = 256  # reports in one batch
PEM_MAX = 64 * 1024  # bytes of a certificate or a certificate request
BUNDLE_FILES_MAX = 64
BUNDLE_FILE_MAX = 8 * 1024 * 1024  # bytes
TAGS_MAX = 32
WRAPPED_MAX = 1024  # bytes of a wrapped key


def encode_report(report: Report) -> bytes:
    """See :func:`protos.messages.encode_report`."""
    return bytes(_report_body(report).SerializeToString(deterministic=True))


def decode_report(body: bytes) -> Report:
    """See :func:`protos.messages.decode_report`."""
    if len(body) > BODY_MAX:
        raise WireError(f"report body: {len(body)} bytes, at most {BODY_MAX}")
    try:
        return _report(pb.ReportBody.FromString(body))
    except DecodeError as error:
        raise WireError(f"report body: not a ReportBody message: {error}") from error


def to_wire(noun: Any) -> Any:
    """See :func:`protos.messages.to_wire`."""
    try:
        convert = _TO[type(noun)]
    except KeyError:
        raise TypeError(f"{type(noun).__name__} does not cross the wire") from None
    return convert(noun)


def from_wire(message: Any) -> Any:
    """See :func:`protos.messages.from_wire`."""
    try:
        convert = _FROM[type(message)]
    except KeyError:
        raise TypeError(f"{type(message).__name__} is no message of fleet.proto") from None
    return convert(message)


# --- checks ---------------------------------------------------------------------------------------


def _text(field: str, value: str, limit: int = NAME_MAX) -> str:
    if len(value) > limit:
        raise WireError(f"{field}: {len(value)} characters, at most {limit}")
    if "\x00" in value:
        raise WireError(f"{field}: contains a zero byte")
    return value


def _blob(field: str, value: bytes, limit: int) -> bytes:
    if len(value) > limit:
        raise WireError(f"{field}: {len(value)} bytes, at most {limit}")
    return value


def _digest(field: str, value: str) -> str:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise WireError(f"{field}: {value[:80]!r} is not 64 hex digits")
    return value


def _number(field: str, value: float, low: float, high: float) -> float:
    if not (math.isfinite(value) and low <= value <= high):
        raise WireError(f"{field}: {value!r} is not a number between {low:g} and {high:g}")
    return value


def _known(field: str, names: Any, value: int) -> str:
    if value not in names.values():
        raise WireError(f"{field}: {value} is not one of {', '.join(names.keys())}")
    return str(names.Name(value))


# --- reports --------------------------------------------------------------------------------------

_EVENT, _REASON = "DEVICE_EVENT_", "REJECT_REASON_"


def _report_body(report: Report) -> pb.ReportBody:
    body = pb.ReportBody(
        device_id=report.device_id,
        sequence=report.sequence,
        time_unix_ms=report.time_unix_ms,
        release=report.release,
        rollout=report.rollout,
        round_sequence=report.round_sequence,
        event=_EVENT + report.event.name,
        detail=report.detail[:DETAIL_MAX],
        payload_bytes=report.payload_bytes,
    )
    if report.reason is not None:
        body.reason = getattr(pb, _REASON + report.reason.name)
    if report.quality is not None:
        body.quality.CopyFrom(pb.Quality(**vars(report.quality)))
    if report.health is not None:
        fields = dict(vars(report.health))
        fields["battery_percent"] = (
            -1 if report.health.battery_percent is None else (report.health.battery_percent)
        )
        known = {name: value for name, value in fields.items() if value is not None}
        body.health.CopyFrom(pb.Health(**known))
    return body


def _report(body: pb.ReportBody) -> Report:
    event = _known("event", pb.DeviceEvent, body.event).removeprefix(_EVENT)
    reason = _known("reason", pb.RejectReason, body.reason).removeprefix(_REASON)
    if event == "UNSPECIFIED":
        raise WireError("event: missing")
    if body.sequence == 0:
        raise WireError("sequence: 0, starts at 1")
    return Report(
        device_id=_text("device_id", body.device_id),
        sequence=int(_number("sequence", body.sequence, 1, 2**62)),
        time_unix_ms=body.time_unix_ms,
        event=DeviceEvent[event],
        release=_text("release", body.release),
        rollout=_text("rollout", body.rollout),
        round_sequence=int(_number("round_sequence", body.round_sequence, 0, 2**62)),
        reason=None if reason == "UNSPECIFIED" else RejectReason[reason],
        detail=_text("detail", body.detail, DETAIL_MAX),
        quality=_quality(body.quality) if body.HasField("quality") else None,
        health=_health(body.health) if body.HasField("health") else None,
        payload_bytes=int(_number("payload_bytes", body.payload_bytes, 0, 2**50)),
    )


def _quality(message: pb.Quality) -> Quality:
    return Quality(
        examples=message.examples,
        accuracy_before=_number("quality.accuracy_before", message.accuracy_before, 0, 1),
        accuracy_after=_number("quality.accuracy_after", message.accuracy_after, 0, 1),
        latency_ms_before=_number("quality.latency_ms_before", message.latency_ms_before, 0, 1e9),
        latency_ms_after=_number("quality.latency_ms_after", message.latency_ms_after, 0, 1e9),
    )


def _health(message: pb.Health) -> Health:
    battery = int(_number("health.battery_percent", message.battery_percent, -1, 100))
    heat = _number("health.temperature_celsius", message.temperature_celsius, -273.15, 1000)
    return Health(
        memory_available_bytes=message.memory_available_bytes,
        process_memory_bytes=message.process_memory_bytes,
        disk_free_bytes=message.disk_free_bytes,
        load_1min=_number("health.load_1min", message.load_1min, 0, 1e6),
        battery_percent=None if battery < 0 else battery,
        temperature_celsius=heat if message.HasField("temperature_celsius") else None,
    )


def _batch(message: pb.ReportBatch) -> ReportBatch:
    if len(message.reports) > BATCH_MAX:
        raise WireError(f"reports: {len(message.reports)} in one batch, at most {BATCH_MAX}")
    return ReportBatch(reports=tuple(_signed(report) for report in message.reports))


def _signed(message: pb.SignedReport) -> SignedReport:
    return SignedReport(
        body=_blob("body", message.body, BODY_MAX),
        signature=_blob("signature", message.signature, 512),
    )


# --- enrolment, metadata, files -------------------------------------------------------------------


def _inventory(message: pb.Inventory) -> Inventory:
    return Inventory(
        agent_version=_text("inventory.agent_version", message.agent_version),
        base_digest=_text("inventory.base_digest", message.base_digest),
        runtime=_text("inventory.runtime", message.runtime),
        memory_bytes=int(_number("inventory.memory_bytes", message.memory_bytes, 0, 2**60)),
        cpu_count=message.cpu_count,
        platform=_text("inventory.platform", message.platform),
    )


def _enrol_request(message: pb.EnrolRequest) -> EnrolRequest:
    if len(message.tags) > TAGS_MAX:
        raise WireError(f"tags: {len(message.tags)}, at most {TAGS_MAX}")
    return EnrolRequest(
        token=_text("token", message.token),
        certificate_request=_blob("certificate_request", message.certificate_request, PEM_MAX),
        inventory=_inventory(message.inventory),
        tags={_text("tags", key): _text("tags", value) for key, value in message.tags.items()},
    )


def _enrol_reply(message: pb.EnrolReply) -> EnrolReply:
    return EnrolReply(
        device_id=_text("device_id", message.device_id),
        certificate=_blob("certificate", message.certificate, PEM_MAX),
        authority=_blob("authority", message.authority, PEM_MAX),
        root=_blob("root", message.root, BUNDLE_FILE_MAX),
    )


def _watch_event(message: pb.WatchEvent) -> MetadataBundle | Heartbeat:
    kind = message.WhichOneof("event")
    if kind == "heartbeat":
        return Heartbeat(server_time_unix_ms=message.heartbeat.server_time_unix_ms)
    if kind is None:
        raise WireError("event: neither a bundle nor a heartbeat")
    files = message.bundle.files
    if len(files) > BUNDLE_FILES_MAX:
        raise WireError(f"bundle: {len(files)} files, at most {BUNDLE_FILES_MAX}")
    for name, data in files.items():
        _text("bundle file name", name)
        _blob(f"bundle file {name}", data, BUNDLE_FILE_MAX)
    return MetadataBundle(files=dict(files))


def _watch_request(message: pb.WatchRequest) -> WatchRequest:
    return WatchRequest(
        timestamp_version=int(_number("timestamp_version", message.timestamp_version, 0, 2**62)),
        root_version=int(_number("root_version", message.root_version, 0, 2**62)),
        running_release=_text("running_release", message.running_release),
    )


_TO: dict[type, Callable[[Any], Any]] = {
    Report: _report_body,
    SignedReport: lambda n: pb.SignedReport(body=n.body, signature=n.signature),
    ReportBatch: lambda n: pb.ReportBatch(reports=[to_wire(report) for report in n.reports]),
    ReportAck: lambda n: pb.ReportAck(accepted_through=n.accepted_through),
    Inventory: lambda n: pb.Inventory(**vars(n)),
    EnrolRequest: lambda n: pb.EnrolRequest(
        token=n.token,
        certificate_request=n.certificate_request,
        inventory=to_wire(n.inventory),
        tags=dict(n.tags),
    ),
    EnrolReply: lambda n: pb.EnrolReply(**vars(n)),
    MetadataBundle: lambda n: pb.WatchEvent(bundle=pb.MetadataBundle(files=dict(n.files))),
    Heartbeat: lambda n: pb.WatchEvent(
        heartbeat=pb.Heartbeat(server_time_unix_ms=n.server_time_unix_ms)
    ),
    WatchRequest: lambda n: pb.WatchRequest(**vars(n)),
    FetchRequest: lambda n: pb.FetchRequest(path=n.path, offset=n.offset),
    ContentKeyRequest: lambda n: pb.ContentKeyRequest(sha256=n.sha256),
    ContentKeyReply: lambda n: pb.ContentKeyReply(wrapped=n.wrapped),
}

_FROM: dict[type, Callable[[Any], Any]] = {
    pb.ReportBody: _report,
    pb.SignedReport: _signed,
    pb.ReportBatch: _batch,
    pb.ReportAck: lambda m: ReportAck(accepted_through=m.accepted_through),
    pb.Inventory: _inventory,
    pb.EnrolRequest: _enrol_request,
    pb.EnrolReply: _enrol_reply,
    pb.WatchEvent: _watch_event,
    pb.WatchRequest: _watch_request,
    pb.FetchRequest: lambda m: FetchRequest(_text("path", m.path, PATH_MAX), m.offset),
    pb.ContentKeyRequest: lambda m: ContentKeyRequest(_digest("sha256", m.sha256)),
    pb.ContentKeyReply: lambda m: ContentKeyReply(_blob("wrapped", m.wrapped, WRAPPED_MAX)),
}
