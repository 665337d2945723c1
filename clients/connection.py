"""The wire as a device sees it: enrol, watch, fetch from an offset, report.

Everything that can go wrong on a link is one error, :class:`ConnectionLost`: wait as
:class:`clients.link.Backoff` says, and try again. What waiting cannot cure is :class:`Denied`.
Nothing here waits or retries by itself, and nothing is believed that comes over it: metadata and
payloads verify themselves.

A link that is dead without saying so is noticed twice: by HTTP/2 pings within about 15 seconds
(``protos.channel``), and by a watchdog that cancels a call which has been silent for too long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from clients.errors import ClientError
from clients.identity import Identity
from clients.link import Watchdog
from clients.telemetry import BatchRefused
from protos.channel import ClientTls, Option, open_channel
from protos.errors import WireError
from protos.generated import fleet_pb2_grpc as services
from protos.messages import (
    ContentKeyReply,
    ContentKeyRequest,
    EnrolReply,
    EnrolRequest,
    FetchRequest,
    Heartbeat,
    MetadataBundle,
    ReportBatch,
    SignedReport,
    WatchRequest,
    from_wire,
    to_wire,
)

T = TypeVar("T")

SILENCE = 150.0  # seconds; the server sends a heartbeat each minute
CHUNK_SILENCE = 30.0  # seconds between two chunks of one file
UNARY_DEADLINE = 30.0  # seconds

# What waiting cannot cure. All else is tried again, CANCELLED too: it is how gRPC's core turns
# calls away when a whole fleet reconnects at once.
_FINAL = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
}


class ConnectionLost(ClientError):  # noqa: N818  (an event, not a mistake)
    """The link, the server or its patience ended; ``retry_after`` seconds is what it asked for."""

    def __init__(self, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class Denied(ClientError):  # noqa: N818
    """The server refuses this device or this request; ``code`` is gRPC's name for why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


def enrol(
    target: str, authority_pem: bytes, request: EnrolRequest, options: Sequence[Option] = ()
) -> EnrolReply:
    """Exchange a one-time token for a certificate.

    Args:
        target: ``host:port`` of the enrolment service.
        authority_pem: the fleet's authority; the server must show a certificate of it.
        request: token, certificate request, inventory.
        options: further gRPC options.

    Raises:
        ConnectionLost: the server cannot be reached, or is not of this authority.
        Denied: the token is unknown, used or expired.
    """
    with open_channel(target, ClientTls(authority=authority_pem), options) as channel:
        try:
            stub: Any = services.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
            reply = stub.Enrol(to_wire(request), timeout=UNARY_DEADLINE, wait_for_ready=False)
            answer: EnrolReply = from_wire(reply)
        except grpc.RpcError as error:
            raise _translate(error, f"enrolment at {target}") from error
        except WireError as error:
            raise ConnectionLost(f"enrolment at {target}: malformed reply: {error}") from error
    return answer


class Connection:
    """A device's connection to its fleet. Opens nothing before the first call; close it at the end.

    Args:
        identity: certificate, key, authority and address.
        silence: seconds without event or heartbeat after which a watch is given up.
        chunk_silence: seconds without a chunk after which a fetch is given up.
        options: further gRPC options.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        silence: float = SILENCE,
        chunk_silence: float = CHUNK_SILENCE,
        options: Sequence[Option] = (),
    ) -> None:
        tls = ClientTls(
            authority=identity.authority_pem,
            key=identity.key_pem,
            certificate=identity.certificate_pem,
        )
        self._target, self._silence, self._chunk_silence = identity.fleet, silence, chunk_silence
        self._channel = open_channel(identity.fleet, tls, options)
        self._stub: Any = services.FleetStub(self._channel)  # type: ignore[no-untyped-call]

    def watch(self, request: WatchRequest) -> Iterator[MetadataBundle | Heartbeat]:
        """Whatever the server says, for as long as the link lives.

        Time that the receiver spends on an event does not count as silence.

        Raises:
            ConnectionLost: the stream ended, for whatever reason.
            Denied: this device is not welcome (any more).
        """
        what = f"watch at {self._target}"
        wire = to_wire(request)
        yield from _stream(lambda: self._stub.Watch(wire), from_wire, self._silence, what)
        raise ConnectionLost(f"{what}: the server ended the stream")

    def fetch(self, path: str, offset: int = 0) -> Iterator[bytes]:
        """The bytes of one file of the repository, from an offset to its end.

        Raises:
            ConnectionLost: cut; go on from where it stopped.
            Denied: there is no such file, or no such offset in it.
        """
        wire = to_wire(FetchRequest(path, offset))
        return _stream(
            lambda: self._stub.Fetch(wire),
            lambda m: m.data,
            self._chunk_silence,
            f"fetch of {path}",
        )

    def content_key(self, sha256: str) -> bytes:
        """The content key of an encrypted payload, wrapped to this device.

        Raises:
            ConnectionLost: try again later.
            Denied: it is not wrapped to this device, or the device is not welcome (any more).
        """
        what = f"content key of {sha256[:12]}…"
        try:
            reply = self._stub.ContentKey(
                to_wire(ContentKeyRequest(sha256)), timeout=UNARY_DEADLINE
            )
            answer: ContentKeyReply = from_wire(reply)
        except grpc.RpcError as error:
            raise _translate(error, what) from error
        except WireError as error:
            raise ConnectionLost(f"{what}: malformed: {error}") from error
        except ValueError as error:
            raise ConnectionLost(f"{what}: closed") from error
        return answer.wrapped

    def report(self, reports: Sequence[SignedReport]) -> int:
        """Send one batch; the number up to which all reports are durable at the server.

        Raises:
            ConnectionLost: try again later.
            BatchRefused: one of them is malformed, or not signed by this device.
            Denied: this device is not welcome (any more).
        """
        try:
            batch = to_wire(ReportBatch(reports=tuple(reports)))
            ack = self._stub.Report(batch, timeout=UNARY_DEADLINE)
            return int(ack.accepted_through)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise BatchRefused(error.details() or "refused") from error
            raise _translate(error, f"report to {self._target}") from error
        except ValueError as error:
            raise ConnectionLost(f"report to {self._target}: closed") from error

    def close(self) -> None:
        """End every call of this connection, whichever thread it is in."""
        self._channel.close()


def _stream(
    start: Callable[[], Any], convert: Callable[[Any], T], silence: float, what: str
) -> Iterator[T]:
    call: Any = None
    bitten = threading.Event()

    def bite() -> None:
        bitten.set()
        call.cancel()

    try:
        call = start()
        with Watchdog(silence, bite) as watchdog:
            for message in call:
                watchdog.rest()
                yield convert(message)
                watchdog.feed()
    except grpc.RpcError as error:
        if bitten.is_set():
            raise ConnectionLost(f"{what}: silent for {silence:g} seconds") from error
        raise _translate(error, what) from error
    except WireError as error:
        raise ConnectionLost(f"{what}: malformed: {error}") from error
    except ValueError as error:  # gRPC's word for a channel that was closed meanwhile
        raise ConnectionLost(f"{what}: closed") from error
    finally:
        if call is not None:
            call.cancel()


def _translate(error: grpc.RpcError, what: str) -> ClientError:
    code, details = error.code(), error.details() or ""
    if code in _FINAL:
        return Denied(code.name.lower().replace("_", "-"), f"{what}: {details}")
    return ConnectionLost(f"{what}: {code.name}: {details[:200]}", _retry_after(error))


def _retry_after(error: grpc.RpcError) -> float:
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == "retry-after-ms" and str(value).isdecimal():
            return min(600.0, int(value) / 1000.0)
        if key == "retry-after" and str(value).isdecimal():
            return min(600.0, float(value))
    return 0.0
