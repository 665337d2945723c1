"""The server's side of ``fleet.proto``: pushes metadata, hands out files, takes reports.

Every device keeps one Watch stream open. A change is serialised once and the same bytes go to all;
a device that reads slowly skips what it missed and gets the newest. Downloads have an admission
limit: beyond it the answer is RESOURCE_EXHAUSTED with ``retry-after-ms``, and a reader that stalls
loses its place. So does a writer: requests have a deadline (:mod:`federation.calls`).

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

import grpc
from cryptography import x509

from aggregation.durable import StorageError
from federation.calls import (
    REQUEST,
    Code,
    Context,
    Refusal,
    Refused,
    answering,
    request_of,
    unstored,
)
from federation.chunks import ChunkCache
from federation.content_keys import ContentKeys
from federation.enrolment_call import ENROLMENT, EnrolmentService
from federation.feed import Feed
from federation.fleet import Fleet, UnknownDeviceError
from federation.metrics import Metrics
from federation.published import NotFoundError
from federation.reports import ReportError, ReportReason
from federation.wrap_shelf import WrapShelf
from protos.generated import fleet_pb2 as pb
from protos.messages import Heartbeat, ReportAck, to_wire

__all__ = ["ENROLMENT", "FLEET", "EnrolmentService", "Feed", "FleetService"]

FLEET = "airpeft.v1.Fleet"
HEARTBEAT = 60.0  # seconds
STALL = 60.0  # seconds that one message may wait for its reader
DOWNLOADS = 256  # at once
WAITING = 8  # times as many may wait for a place, for
PATIENCE = 15.0  # seconds: half of the silence that a device bears with

log = logging.getLogger("airpeft.federation.broadcast")


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
        stall: seconds that one message may wait for its reader.
        request: seconds until a request must have come as a whole.
        sent: told which version of the timestamp a device has.
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
        request: float = REQUEST,
        sent: Callable[[str, int], None] = lambda device, version: None,
    ) -> None:
        self._fleet, self._feed, self._chunks, self._metrics = fleet, feed, chunks, metrics
        self._reported, self._heartbeat = reported, heartbeat
        self._keys = ContentKeys(wraps, metrics)
        self._places, self._waiting = asyncio.Semaphore(downloads), 0
        self._room, self._patience, self._stall = WAITING * downloads, patience, stall
        self._request, self._sent = request, sent
        self._turned_away, self._turned_until = 0, 0.0

    def register(self, server: grpc.aio.Server) -> None:
        """Add the calls to a server. Requests come raw: what doesn't parse gets a status."""
        watch, fetch, report, key = (
            answering(name, self._metrics, handler)
            for name, handler in (
                ("watch", self.watch),
                ("fetch", self.fetch),
                ("report", self.report),
                ("content-key", self.content_key),
            )
        )
        handlers = {
            "Watch": grpc.stream_stream_rpc_method_handler(watch),
            "Fetch": grpc.stream_stream_rpc_method_handler(fetch),
            "Report": grpc.stream_unary_rpc_method_handler(report),
            "ContentKey": grpc.stream_unary_rpc_method_handler(key),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(FLEET, handlers),))

    async def watch(self, context: Context) -> None:
        """Metadata now, at every change, and heartbeats in between."""
        device, serial = await self._admit(context)
        request = await request_of(context, pb.WatchRequest, self._request)
        root, version, sent = request.root_version, request.timestamp_version, b""
        del request  # a stream idles for hours
        self._sent(device, version)
        with self._metrics.streams.track_inprogress(), self._fleet.connected(device, version):
            while True:
                turn = self._feed.turn
                newest = self._feed.current(root)
                if newest != sent:
                    await self._write(context, newest)
                    self._metrics.bundles.inc()
                    self._sent(device, self._feed.version)
                    sent = newest
                else:
                    await self._write(context, _heartbeat())
                await self._feed.wait(turn, self._heartbeat)
                if self._feed.closed:
                    await context.abort(Code.UNAVAILABLE, "the server is stopping: come back")
                if not self._fleet.admits(device, serial):
                    raise _denied(device)

    async def _write(self, context: Context, message: bytes) -> None:
        """One message, within the time that its reader has."""
        try:
            async with asyncio.timeout(self._stall):
                await context.write(message)
        except TimeoutError:
            raise self._unread() from None

    def _unread(self) -> Refused:
        detail = f"nothing was read for {self._stall:g} s"
        return Refused(Refusal.SLOW_READER, Code.DEADLINE_EXCEEDED, detail)

    async def fetch(self, context: Context) -> None:
        """One file from an offset to its end."""
        await self._admit(context)
        request = await request_of(context, pb.FetchRequest, self._request)
        result = "cut"
        try:
            if not await self._place():
                raise self._busy()
            try:
                result = await self._send(request.path, request.offset, context)
            finally:
                self._places.release()
        except Refused as refused:
            result = refused.reason.value
            raise
        finally:
            self._metrics.fetches.labels(result).inc()

    def _busy(self) -> Refused:
        return Refused(
            Refusal.BUSY,
            Code.RESOURCE_EXHAUSTED,
            "too many downloads: try again shortly",
            (("retry-after-ms", str(self._return_ms())),),
        )

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
            raise Refused(Refusal.NOT_FOUND, Code.NOT_FOUND, str(error)) from error
        except OSError as error:
            log.error("cannot read %s: %s", path, error)
            detail = "the server cannot read this file: try later"
            raise Refused(Refusal.STORAGE, Code.UNAVAILABLE, detail) from error
        if offset > file.length:
            detail = f"offset {offset} is beyond {file.length}"
            raise Refused(Refusal.OUT_OF_RANGE, Code.OUT_OF_RANGE, detail)
        now, sent = asyncio.get_running_loop().time, 0
        renewed = now()
        try:
            async with asyncio.timeout(self._stall) as patience:
                for message in file.after(offset):
                    await context.write(message)
                    sent += len(message)
                    if (moment := now()) > renewed + self._stall / 8:  # a timer a chunk is dear
                        renewed = moment
                        patience.reschedule(moment + self._stall)
        except TimeoutError:
            raise self._unread() from None
        finally:
            self._metrics.fetched.inc(sent)
        return "complete"

    async def report(self, context: Context) -> bytes:
        """Take in signed reports; the answer says what is durable."""
        device, _ = await self._admit(context)
        batch = await request_of(context, pb.ReportBatch, self._request)
        try:
            through, new = await asyncio.to_thread(self._fleet.observe, device, batch.reports)
        except ReportError as error:
            log.warning("report of %s refused: %s", device, error)
            self._reported()  # those before the refused one count
            malformed = error.reason is ReportReason.MALFORMED
            code = Code.INVALID_ARGUMENT if malformed else Code.PERMISSION_DENIED
            raise Refused(error.reason, code, str(error)) from error
        except UnknownDeviceError as error:
            raise Refused(Refusal.NOT_ADMITTED, Code.PERMISSION_DENIED, str(error)) from error
        except StorageError as error:
            log.error("reports of %s are not stored: %s", device, error)
            raise unstored("reports") from error
        for one in new:
            reason = one.reason.value if one.reason else ""
            self._metrics.reports.labels(one.event.value, reason).inc()
        self._metrics.repeated.inc(len(batch.reports) - len(new))
        if new:
            self._reported()
        return bytes(to_wire(ReportAck(through)).SerializeToString())

    async def content_key(self, context: Context) -> bytes:
        """The content key of a payload as it is wrapped to the calling device."""
        await self._admit(context)
        request = await request_of(context, pb.ContentKeyRequest, self._request)
        shown = context.auth_context()["x509_pem_cert"][0]
        return await self._keys.answer(request.sha256, shown)

    async def _admit(self, context: Context) -> tuple[str, str]:
        """Name and serial of the calling device, or the end of the call."""
        shown = context.auth_context().get("x509_pem_cert", [b""])[0]
        device, serial = _who(shown)
        if not self._fleet.admits(device, serial):
            if serial and self._fleet.may_be_new(serial):
                try:
                    await asyncio.to_thread(self._fleet.refresh, device)
                except StorageError as error:
                    log.error("%s cannot be looked up: %s", device, error)
                    detail = "it is not known who you are: try later"
                    raise Refused(Refusal.STORAGE, Code.UNAVAILABLE, detail) from error
            if not self._fleet.admits(device, serial):
                raise _denied(device)
        return device, serial


def _denied(device: str) -> Refused:
    log.warning("%s is not admitted: unknown or revoked certificate", device or "a caller")
    detail = "this device's certificate is unknown here or was revoked"
    return Refused(Refusal.NOT_ADMITTED, Code.PERMISSION_DENIED, detail)


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
