"""The server's side of ``fleet.proto``: pushes metadata, hands out files, takes reports.

Every device keeps one Watch stream open. A change is serialised once and the same bytes go to all;
a device that reads slowly skips what it missed and gets the newest. Downloads have an admission
limit: beyond it the answer is RESOURCE_EXHAUSTED with ``retry-after-ms``, and a reader that stalls
loses its place.

Whoever calls is who the certificate says, if that certificate (by serial) is enrolled and not
revoked; this is asked again at every wake of a stream, so that a revocation cuts open streams.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc
from cryptography import x509
from google.protobuf.message import DecodeError, Message

from aggregation.durable import StorageError
from federation.chunks import ChunkCache
from federation.content_keys import ContentKeys
from federation.enrolment import Enrolment, EnrolmentError
from federation.fleet import Fleet, UnknownDeviceError
from federation.metrics import Metrics
from federation.published import NotFoundError
from federation.reports import ReportError, ReportReason
from federation.wrap_shelf import WrapShelf
from protos.errors import WireError
from protos.generated import fleet_pb2 as pb
from protos.messages import Heartbeat, MetadataBundle, ReportAck, from_wire, to_wire

FLEET = "airpeft.v1.Fleet"
ENROLMENT = "airpeft.v1.Enrolment"
HEARTBEAT = 60.0  # seconds
STALL = 60.0  # seconds that one chunk may wait for its reader
DOWNLOADS = 256  # at once
WAITING = 8  # times as many may wait for a place, for
PATIENCE = 15.0  # seconds: half of the silence that a device bears with

Code = grpc.StatusCode
Context = Any  # grpc.aio.ServicerContext; its stubs ask for two type parameters nobody needs
M = TypeVar("M", bound=Message)

log = logging.getLogger("airpeft.federation.broadcast")


class Feed:
    """The newest metadata, and a way to wait for newer. For one event loop.

    Args:
        bundle: reads the newest, given the highest root that a device trusts.
    """

    def __init__(self, bundle: Callable[[int], MetadataBundle]) -> None:
        self._bundle = bundle
        self._ready: dict[int, bytes] = {}
        self.change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False

    def current(self, root_version: int) -> bytes:
        """The serialised event; equal versions share one object."""
        files = self._ready.get(root_version)
        if files is None:
            if len(self._ready) >= 64:  # a device may claim any number
                self._ready.clear()
            files = to_wire(self._bundle(root_version)).SerializeToString()
            self._ready[root_version] = files
        return files

    def wake(self) -> None:
        """Something may have changed: let every waiting stream look."""
        self._ready.clear()
        waiting, self.change = self.change, asyncio.get_running_loop().create_future()
        waiting.set_result(None)

    def close(self) -> None:
        """The server is about to stop: let every stream end."""
        self.closed = True
        self.wake()

    async def wait(self, change: asyncio.Future[None], timeout: float) -> None:
        """Until the :meth:`wake` after ``change`` was current, or for ``timeout`` seconds.

        Whoever takes :attr:`change` before reading what is current misses nothing, however long
        the writing of it takes.
        """
        await asyncio.wait([change], timeout=timeout)


class FleetService:
    """The calls of an enrolled device.

    Args:
        fleet: who is admitted, and where reports go.
        feed: what Watch pushes.
        chunks: what Fetch sends.
        metrics: what is counted.
        reported: called (in the event loop) when there are new reports.
        wraps: wrapped content keys; None: there are none.
        heartbeat: seconds between two of them.
        downloads: Fetch calls at once; eight times as many wait for a place.
        patience: seconds that one of them waits.
        stall: seconds that one chunk may wait for its reader.
    """

    def __init__(
        self,
        fleet: Fleet,
        feed: Feed,
        chunks: ChunkCache,
        metrics: Metrics,
        reported: Callable[[], None],
        *,
        wraps: WrapShelf | None = None,
        heartbeat: float = HEARTBEAT,
        downloads: int = DOWNLOADS,
        patience: float = PATIENCE,
        stall: float = STALL,
    ) -> None:
        self._fleet, self._feed, self._chunks, self._metrics = fleet, feed, chunks, metrics
        self._reported, self._heartbeat = reported, heartbeat
        self._keys = ContentKeys(wraps, metrics)
        self._places, self._waiting = asyncio.Semaphore(downloads), 0
        self._room, self._patience, self._stall = WAITING * downloads, patience, stall
        self._turned_away, self._turned_until = 0, 0.0

    def register(self, server: grpc.aio.Server) -> None:
        """Add the calls to a server. Requests come raw: what doesn't parse gets a status."""
        handlers = {
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch),
            "Report": grpc.unary_unary_rpc_method_handler(self.report),
            "ContentKey": grpc.unary_unary_rpc_method_handler(self.content_key),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FLEET, handlers),))

    async def watch(self, raw: bytes, context: Context) -> None:
        """Metadata now, at every change, and heartbeats in between."""
        device, serial = await self._admit(context)
        request = await _parse(pb.WatchRequest, raw, context, self._metrics)
        sent = b""
        with (
            self._metrics.streams.track_inprogress(),
            self._fleet.connected(device, request.timestamp_version),
        ):
            while True:
                change = self._feed.change
                newest = self._feed.current(request.root_version)
                if newest != sent:
                    await context.write(newest)
                    self._metrics.bundles.inc()
                    sent = newest
                else:
                    await context.write(_heartbeat())
                await self._feed.wait(change, self._heartbeat)
                if self._feed.closed:
                    await context.abort(Code.UNAVAILABLE, "the server is stopping: come back")
                if not self._fleet.admits(device, serial):
                    await self._deny(context, device)

    async def fetch(self, raw: bytes, context: Context) -> None:
        """One file from an offset to its end."""
        await self._admit(context)
        request = await _parse(pb.FetchRequest, raw, context, self._metrics)
        if not await self._place():
            self._metrics.fetches.labels("turned-away").inc()
            context.set_trailing_metadata((("retry-after-ms", str(self._return_ms())),))
            await context.abort(Code.RESOURCE_EXHAUSTED, "too many downloads: try again shortly")
        result = "cut"
        try:
            result = await self._send(request.path, request.offset, context)
        finally:
            self._places.release()
            self._metrics.fetches.labels(result).inc()

    async def _place(self) -> bool:
        """A place among the downloads, at once or after a while; False if there is none.

        To wait costs a server less than to be turned away and to come back.
        """
        if self._places.locked() and self._waiting >= self._room:
            return False
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._places.acquire()
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
        return True

    def _return_ms(self) -> int:
        """When to come back: the more were turned away lately, the later, and spread out."""
        now = time.monotonic()
        if now > self._turned_until:
            self._turned_away, self._turned_until = 0, now + self._patience
        self._turned_away += 1
        crowd = min(20_000, 1000 * self._turned_away // max(1, self._room))
        return 500 + random.randrange(1500 + crowd)  # noqa: S311  (jitter)

    async def _send(self, path: str, offset: int, context: Context) -> str:
        try:
            file = await self._chunks.get(path)
        except NotFoundError as error:
            await context.abort(Code.NOT_FOUND, str(error))
        except OSError as error:
            log.error("cannot read %s: %s", path, error)
            await context.abort(Code.UNAVAILABLE, "the server cannot read this file: try later")
        if offset > file.length:
            await context.abort(Code.OUT_OF_RANGE, f"offset {offset} is beyond {file.length}")
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(self._stall) as patience:
                for message in file.after(offset):
                    await context.write(message)
                    patience.reschedule(now() + self._stall)
                    self._metrics.fetched.inc(len(message))
        except TimeoutError:
            self._metrics.stalled.inc()
            await context.abort(Code.DEADLINE_EXCEEDED, f"nothing was read for {self._stall:g} s")
        return "complete"

    async def report(self, raw: bytes, context: Context) -> bytes:
        """Take in signed reports; the answer says what is durable."""
        device, _ = await self._admit(context)
        batch = await _parse(pb.ReportBatch, raw, context, self._metrics)
        try:
            through, new = await asyncio.to_thread(self._fleet.observe, device, batch.reports)
        except ReportError as error:
            self._metrics.refused.labels(error.reason.value).inc()
            log.warning("report of %s refused: %s", device, error)
            self._reported()  # those before the refused one count
            malformed = error.reason is ReportReason.MALFORMED
            await context.abort(
                Code.INVALID_ARGUMENT if malformed else Code.PERMISSION_DENIED, str(error)
            )
        except UnknownDeviceError as error:
            await context.abort(Code.PERMISSION_DENIED, str(error))
        except StorageError as error:
            log.error("reports of %s are not stored: %s", device, error)
            await context.abort(Code.UNAVAILABLE, "the server cannot store reports: try later")
        for one in new:
            reason = one.reason.value if one.reason else ""
            self._metrics.reports.labels(one.event.value, reason).inc()
        if new:
            self._reported()
        return bytes(to_wire(ReportAck(through)).SerializeToString())

    async def content_key(self, raw: bytes, context: Context) -> bytes:
        """The content key of a payload as it is wrapped to the calling device."""
        await self._admit(context)
        request = await _parse(pb.ContentKeyRequest, raw, context, self._metrics)
        shown = context.auth_context()["x509_pem_cert"][0]
        return await self._keys.answer(request.sha256, shown, context)

    async def _admit(self, context: Context) -> tuple[str, str]:
        """Name and serial of the calling device, or the end of the call."""
        shown = context.auth_context().get("x509_pem_cert", [b""])[0]
        device, serial = _who(shown)
        if not self._fleet.admits(device, serial):
            await self._deny(context, device)
        return device, serial

    async def _deny(self, context: Context, device: str) -> NoReturn:
        self._metrics.denied.inc()
        log.warning("%s is not admitted: unknown or revoked certificate", device or "a caller")
        await context.abort(
            Code.PERMISSION_DENIED, "this device's certificate is unknown here or was revoked"
        )
        raise AssertionError("abort raises")


class EnrolmentService:
    """The one call of a device that has a token and no certificate yet."""

    def __init__(
        self, enrolment: Enrolment, metrics: Metrics, enrolled: Callable[[str], None]
    ) -> None:
        self._enrolment, self._metrics, self._enrolled = enrolment, metrics, enrolled

    def register(self, server: grpc.aio.Server) -> None:
        """Add the call to a server."""
        handlers = {"Enrol": grpc.unary_unary_rpc_method_handler(self.enrol)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(ENROLMENT, handlers),)
        )

    async def enrol(self, raw: bytes, context: Context) -> bytes:
        """Exchange a token and a certificate request for a certificate."""
        request = await _parse(pb.EnrolRequest, raw, context, self._metrics)
        try:
            reply = await asyncio.to_thread(self._enrolment.enrol, request)
        except EnrolmentError as error:
            self._metrics.enrolments.labels(error.reason.value).inc()
            log.warning("enrolment refused from %s: %s", context.peer(), error)
            await context.abort(Code.PERMISSION_DENIED, str(error))
        except StorageError as error:
            log.error("enrolment not stored: %s", error)
            await context.abort(Code.UNAVAILABLE, "the server cannot store this: try later")
        self._metrics.enrolments.labels("enrolled").inc()
        log.info("enrolled %s", reply.device_id)
        self._enrolled(reply.device_id)
        return bytes(to_wire(reply).SerializeToString())


async def _parse(kind: type[M], raw: bytes, context: Context, metrics: Metrics) -> Any:
    try:
        return from_wire(kind.FromString(raw))
    except (DecodeError, WireError) as error:
        metrics.malformed.inc()
        await context.abort(Code.INVALID_ARGUMENT, f"{kind.DESCRIPTOR.name}: {error}")


@functools.lru_cache(maxsize=8192)
def _who(certificate: bytes) -> tuple[str, str]:
    """Common name and serial (hex) of a certificate that TLS has verified."""
    if not certificate:
        return "", ""
    parsed = x509.load_pem_x509_certificate(certificate)
    names = parsed.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return (str(names[0].value) if len(names) == 1 else ""), f"{parsed.serial_number:x}"


def _heartbeat() -> bytes:
    return bytes(to_wire(Heartbeat(int(time.time() * 1000))).SerializeToString())
