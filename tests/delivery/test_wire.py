"""Devices and a real server process over loopback gRPC with mutual TLS."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from federation.authority import open_authority
from federation.chunks import CHUNK
from federation.client import OperatorClient, OperatorError
from protos.channel import ClientTls, open_channel
from protos.generated import fleet_pb2 as pb
from protos.messages import (
    DeviceEvent,
    Health,
    Quality,
    RejectReason,
    ReportBatch,
    SignedReport,
    WatchRequest,
    to_wire,
)
from tests.delivery.rig import (
    Device,
    ServerProcess,
    Watcher,
    enrol,
    key_pem,
    new_key,
    request_for,
    round_of,
)
from tests.waiting import until

Code = grpc.StatusCode
PAYLOAD = os.urandom(3 * CHUNK + 1234)


@pytest.fixture(scope="module")
def release(server: ServerProcess) -> dict[str, Any]:
    """A published release of several chunks."""
    name = server.publish(1, PAYLOAD)
    with server.operator() as operator:
        return next(one for one in operator.releases() if one["name"] == name)


def path_of(release: dict[str, Any]) -> str:
    folder, _, name = release["target"].rpartition("/")
    return f"targets/{folder}/{release['sha256']}.{name}"


def status_of(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    return error.value.code(), error.value.details()


def refusals(operator: OperatorClient, reason: str) -> Counter[str]:
    """How often the server has counted a reason, by call; of other tests, too."""
    counted = re.compile(
        rf'^airpeft_requests_refused_total{{call="(\w+)",reason="{reason}"}} ([0-9.]+)$', re.M
    )
    found = counted.findall(operator.metrics())
    return Counter({call: int(float(count)) for call, count in found})


# --- enrolment ------------------------------------------------------------------------------------


def test_a_token_enrols_one_device_and_no_second(server: ServerProcess) -> None:
    device = Device(server, "kitchen")
    assert device.name == "kitchen"
    assert b'"root"' in device.reply.root
    token = device.enrolment["token"]
    with pytest.raises(grpc.RpcError) as refused:
        enrol(device.enrolment, token, request_for(new_key()))
    assert status_of(refused)[0] is Code.PERMISSION_DENIED
    assert "used-token" in status_of(refused)[1]
    # the same device, which never got its answer, asks again and gets the same certificate
    again = enrol(device.enrolment, token, request_for(device.key))
    assert again.certificate == device.reply.certificate


def test_an_expired_or_invented_token_is_refused(server: ServerProcess) -> None:
    with server.operator() as operator:
        made = operator.make_token(seconds=0.05)
    until(lambda: time.time() > made["expires"], what="the token's end")
    for token, word in ((made["token"], "expired-token"), ("invented", "unknown-token")):
        with pytest.raises(grpc.RpcError) as refused:
            enrol(made, token, request_for(new_key()))
        assert status_of(refused)[0] is Code.PERMISSION_DENIED
        assert word in status_of(refused)[1]


def test_a_bad_request_leaves_the_token_unused(server: ServerProcess) -> None:
    with server.operator() as operator:
        made = operator.make_token()
    broken = request_for(new_key()).replace(b"M", b"N", 1)
    for request in (b"", b"nonsense", broken, request_for(ec.generate_private_key(ec.SECP384R1()))):
        with pytest.raises(grpc.RpcError) as refused:
            enrol(made, made["token"], request)
        assert "bad-request" in status_of(refused)[1]
    assert enrol(made, made["token"], request_for(new_key())).device_id.startswith("d-")


def test_a_taken_or_malformed_name_is_refused(server: ServerProcess) -> None:
    Device(server, "taken")
    with server.operator() as operator:
        for name, message in (("taken", "there is a device"), ("../x", "lower-case letters")):
            with pytest.raises(OperatorError, match=message):
                operator.make_token(device_id=name)


# --- who is admitted ------------------------------------------------------------------------------


def watch_once(device: Device, tls: ClientTls) -> None:
    with device.connect(tls) as stub:
        next(iter(stub.Watch(to_wire(WatchRequest()), timeout=120)))


def test_no_certificate_or_a_foreign_one_is_refused(device: Device, tmp_path: Path) -> None:
    watch_once(device, device.tls)
    foreign = open_authority(tmp_path, datetime.now(UTC))
    stranger = new_key()
    forged = foreign.issue(request_for(stranger), device.name, datetime.now(UTC))
    for tls in (
        ClientTls(authority=device.reply.authority),
        replace(device.tls, key=key_pem(stranger), certificate=forged.pem),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            watch_once(device, tls)
        assert status_of(refused)[0] is Code.UNAVAILABLE  # the handshake fails


def test_a_certificate_that_was_never_enrolled_is_refused(
    server: ServerProcess, device: Device
) -> None:
    """Even one that the fleet's own authority has signed: another serial, or another name."""
    authority = open_authority(server.home / "authority", datetime.now(UTC))
    for name in (device.name, "d-unknown"):
        other = new_key()
        issued = authority.issue(request_for(other), name, datetime.now(UTC))
        with pytest.raises(grpc.RpcError) as refused:
            watch_once(device, replace(device.tls, key=key_pem(other), certificate=issued.pem))
        assert status_of(refused)[0] is Code.PERMISSION_DENIED


def test_a_device_cannot_pose_as_the_server(server: ServerProcess, device: Device) -> None:
    """A device certificate has no server name and is for client authentication only."""
    certificate = x509.load_pem_x509_certificate(device.reply.certificate)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not basic.ca


def test_revocation_cuts_the_open_stream_and_every_later_call(
    server: ServerProcess, device: Device
) -> None:
    with Watcher(device) as watcher:
        until(lambda: watcher.bundles, what="the first bundle")
        with server.operator() as operator:
            operator.revoke(device.name, "stolen")
            assert any(line["why"] == "stolen" for line in operator.audit())
        until(
            lambda: watcher.ended and watcher.ended.code() is Code.PERMISSION_DENIED,  # type: ignore[attr-defined]
            what="the cut stream",
        )
    with pytest.raises(grpc.RpcError) as refused:
        device.report(DeviceEvent.STARTED)
    assert status_of(refused)[0] is Code.PERMISSION_DENIED
    with pytest.raises(grpc.RpcError):
        enrol(device.enrolment, device.enrolment["token"], request_for(device.key))


# --- metadata and files ---------------------------------------------------------------------------


def test_the_bundle_comes_at_once_then_every_change_and_heartbeats(
    server: ServerProcess, device: Device
) -> None:
    with Watcher(device) as watcher:
        until(lambda: watcher.bundles, what="the first bundle")
        files = watcher.bundles[0].files
        assert "timestamp.json" in files
        assert {name.split(".", 1)[1] for name in files} >= {
            "root.json",
            "snapshot.json",
            "targets.json",
            "adapters.json",
            "rounds.json",
        }
        until(lambda: watcher.heartbeats, what="a heartbeat")
        server.publish(7, b"another", channel="pushed")
        until(lambda: len(watcher.bundles) > 1, what="the change")
        assert watcher.bundles[-1].files["timestamp.json"] != files["timestamp.json"]
        with server.operator() as operator:
            known = operator.device(device.name)
            assert known["timestamp_version"] == 3  # what the watcher said
            assert known["connected"]
    with server.operator() as operator:
        until(lambda: not operator.device(device.name)["connected"], what="the stream's end")
        assert operator.device(device.name)["last_seen"] >= known["last_seen"]


@pytest.mark.parametrize(
    "offset", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77, len(PAYLOAD) - 1, len(PAYLOAD)]
)
def test_fetch_resumes_from_any_offset(
    device: Device, release: dict[str, Any], offset: int
) -> None:
    assert device.fetch(path_of(release), offset) == PAYLOAD[offset:]


def test_fetch_beyond_the_end_or_outside_the_repository_is_refused(
    device: Device, release: dict[str, Any]
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        device.fetch(path_of(release), len(PAYLOAD) + 1)
    assert status_of(refused)[0] is Code.OUT_OF_RANGE
    for path in (
        "../admin.token",
        "metadata/../../admin.token",
        "/etc/passwd",
        "targets/..%2F..%2Fadmin.token",
        "targets",
        "metadata/",
        "",
    ):
        with pytest.raises(grpc.RpcError) as refused:
            device.fetch(path)
        assert status_of(refused)[0] is Code.NOT_FOUND, path


def test_metadata_files_can_be_fetched_too(device: Device) -> None:
    assert b'"signatures"' in device.fetch("metadata/1.root.json")


def test_a_tampered_payload_is_served_as_it_is_and_counted(
    server: ServerProcess, device: Device
) -> None:
    """The device refuses it; a server that hid or repaired it would hide the attack."""
    payload = b"honest" * 1000
    server.publish(1, payload, channel="tampered")
    with server.operator() as operator:
        made = next(r for r in operator.releases() if r["name"] == "tampered-1")
        assert device.fetch(path_of(made)) == payload
        file = server.home / "repository" / path_of(made)
        evil = b"hostil" * 1000
        file.write_bytes(evil)
        os.utime(file, ns=(1, 1))
        assert device.fetch(path_of(made)) == evil
        assert hashlib.sha256(evil).hexdigest() != made["sha256"]
        assert "airpeft_altered_payloads_total 1.0" in operator.metrics()
    assert "not what its name says" in server.log()


def test_malformed_bytes_get_a_status_and_nothing_else_happens(
    server: ServerProcess, device: Device
) -> None:
    with server.operator() as operator:
        before = refusals(operator, "malformed")
    with open_channel(server.endpoints["fleet"], device.tls) as channel:
        for method in ("Watch", "Fetch"):
            call = channel.unary_stream(f"/airpeft.v1.Fleet/{method}")
            with pytest.raises(grpc.RpcError) as refused:
                list(call(b"\xff\xff\xff", timeout=120))
            assert status_of(refused)[0] is Code.INVALID_ARGUMENT
        report = channel.unary_unary("/airpeft.v1.Fleet/Report")
        huge = pb.ReportBatch(reports=[pb.SignedReport(body=b"x" * 20_000)]).SerializeToString()
        for raw in (b"\x0a\xff", huge):
            with pytest.raises(grpc.RpcError) as refused:
                report(raw, timeout=120)
            assert status_of(refused)[0] is Code.INVALID_ARGUMENT
        long = pb.FetchRequest(path="x" * 100_000).SerializeToString()
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.unary_stream("/airpeft.v1.Fleet/Fetch")(long, timeout=120))
        assert "path: 100000 characters" in status_of(refused)[1]
    watch_once(device, device.tls)
    with server.operator() as operator:
        counted = refusals(operator, "malformed") - before
        assert counted == {"watch": 1, "fetch": 2, "report": 2}


# --- reports --------------------------------------------------------------------------------------


def test_reports_are_kept_once_and_acknowledged_again(
    server: ServerProcess, device: Device
) -> None:
    quality = Quality(examples=40, accuracy_before=0.5, accuracy_after=0.75)
    health = Health(
        memory_available_bytes=1, process_memory_bytes=2, disk_free_bytes=3, load_1min=0.5
    )
    batch = [
        device.signed(DeviceEvent.STARTED),
        device.signed(DeviceEvent.HEALTH, health=health),
        device.signed(
            DeviceEvent.COMMITTED, release="stable-1", rollout="r-9", quality=quality, detail="ok"
        ),
    ]
    assert device.send(batch) == 3
    assert device.send(batch) == 3
    assert device.send(batch[:1]) == 3
    with server.operator() as operator:
        known = operator.device(device.name)
    assert [r["sequence"] for r in known["reports"]] == [3, 2, 1]
    assert known["running"] == "stable-1"
    assert known["health"]["battery_percent"] is None
    assert known["reports"][0]["detail"] == "ok"


def test_a_forged_or_borrowed_report_is_refused(server: ServerProcess, device: Device) -> None:
    other = Device(server)
    with server.operator() as operator:
        before = refusals(operator, "signature")
    good = device.signed(DeviceEvent.STARTED)
    flipped = SignedReport(body=good.body[:-1] + b"\x7f", signature=good.signature)
    elses = other.signed(DeviceEvent.COMMITTED, release="stable-1")
    named = device.signed(DeviceEvent.STARTED, device_id=other.name)
    for forged, word in ((flipped, "signature"), (elses, "signature"), (named, "wrong-device")):
        with pytest.raises(grpc.RpcError) as refused:
            device.send([forged])
        assert status_of(refused)[0] is Code.PERMISSION_DENIED
        assert word in status_of(refused)[1]
    with server.operator() as operator:
        assert operator.device(device.name)["reports"] == []
        assert refusals(operator, "signature") - before == {"report": 2}


def test_reports_before_a_refused_one_are_durable(server: ServerProcess, device: Device) -> None:
    good = device.signed(DeviceEvent.STARTED)
    bad = replace(device.signed(DeviceEvent.HEALTH), signature=b"")
    with pytest.raises(grpc.RpcError):
        device.send([good, bad])
    with server.operator() as operator:
        assert [r["sequence"] for r in operator.device(device.name)["reports"]] == [1]


def test_a_signed_report_out_of_bounds_is_refused(device: Device) -> None:
    body = pb.ReportBody(
        device_id=device.name,
        sequence=1,
        event="DEVICE_EVENT_COMMITTED",
        quality=pb.Quality(examples=1, accuracy_before=float("nan"), accuracy_after=7.0),
    ).SerializeToString()
    signed = device.signed(DeviceEvent.STARTED)
    signed = SignedReport(body=body, signature=device.key.sign(body, ec.ECDSA(hashes.SHA256())))
    with pytest.raises(grpc.RpcError) as refused:
        device.send([signed])
    assert status_of(refused)[0] is Code.INVALID_ARGUMENT
    assert "quality.accuracy_before" in status_of(refused)[1]


def test_a_device_that_reverts_what_it_committed_is_back_on_the_one_before(
    server: ServerProcess, device: Device
) -> None:
    for release in ("stable-1", "stable-2"):
        device.report(DeviceEvent.COMMITTED, release=release, rollout="r-8")
    device.report(
        DeviceEvent.REVERTED,
        release="stable-2",
        rollout="r-8",
        reason=RejectReason.SELF_TEST,
    )
    with server.operator() as operator:
        assert operator.device(device.name)["running"] == "stable-1"


# --- health and reflection ------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["fleet", "enrol"])
def test_health_and_reflection_answer(server: ServerProcess, device: Device, port: str) -> None:
    tls = device.tls if port == "fleet" else ClientTls(authority=device.reply.authority)
    service = {"fleet": "airpeft.v1.Fleet", "enrol": "airpeft.v1.Enrolment"}[port]
    with open_channel(server.endpoints[port], tls) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", service):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=120)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        mirror = reflection_pb2_grpc.ServerReflectionStub(channel)
        wish = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = mirror.ServerReflectionInfo(iter([wish]), timeout=120)
        names = {one.name for one in listed.list_services_response.service}
        assert {service, "grpc.health.v1.Health"} <= names
        wish = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
        (found,) = mirror.ServerReflectionInfo(iter([wish]), timeout=120)
        assert found.file_descriptor_response.file_descriptor_proto


def test_requests_that_are_too_large_are_refused(server: ServerProcess, device: Device) -> None:
    with server.operator() as operator:
        before = refusals(operator, "incomplete")
    with device.connect() as stub, pytest.raises(grpc.RpcError) as refused:
        stub.Report(
            to_wire(
                ReportBatch(
                    reports=tuple(
                        SignedReport(body=b"x" * 10_000, signature=b"") for _ in range(200)
                    )
                )
            ),
            timeout=120,
        )
    assert status_of(refused)[0] is Code.RESOURCE_EXHAUSTED
    with server.operator() as operator:
        until(lambda: refusals(operator, "incomplete") - before == {"report": 1}, what="the count")


def test_round_zero_assigns_nothing(device: Device) -> None:
    with Watcher(device) as watcher:
        until(lambda: watcher.bundles, what="a bundle")
        document = round_of(watcher.bundles[0])
    assert document.sequence == 0
    assert document.assignments == ()


def test_the_private_key_never_left(server: ServerProcess, device: Device) -> None:
    secret = device.key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for file in server.home.rglob("*"):
        if file.is_file():
            assert secret not in file.read_bytes()
