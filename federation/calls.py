"""How a gRPC call of a device begins and how it is refused; one closed vocabulary for all calls.

A request is read here and not by gRPC: left alone, gRPC waits for ever for a client that drips its
request byte by byte or sends none at all, and such a call never reaches a handler that could end
it. So every call is registered as one with a stream of requests, of which the first is read within
a deadline (on the wire there is no difference) and more are not read.

Whatever is refused is raised as :class:`Refused`, counted once with its call and its reason, and
told to the caller by a status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from federation.errors import FederationError
from federation.metrics import Metrics
from protos.errors import WireError
from protos.messages import from_wire

REQUEST = 60.0  # seconds until a request, of 1 MiB at most, must have come: 140 kbit/s

Code = grpc.StatusCode
Context = Any  # grpc.aio.ServicerContext; its stubs ask for two type parameters nobody needs
T = TypeVar("T")
M = TypeVar("M", bound=Message)

log = logging.getLogger("airpeft.federation.calls")


class Refusal(StrEnum):
    """Why a call was refused, beside the reasons of enrolment and of reports."""

    NOT_ADMITTED = "not-admitted"  # a certificate that is unknown here, expired or revoked
    MALFORMED = "malformed"  # does not parse, or a field is out of bounds
    INCOMPLETE = "incomplete"  # no whole message: none, cut off, or beyond the size of a message
    SLOW_WRITER = "slow-writer"
    SLOW_READER = "slow-reader"
    NOT_FOUND = "not-found"
    NO_ENCRYPTION_KEY = "no-encryption-key"  # the device has enrolled none
    NOT_WRAPPED = "not-wrapped"  # the content key of a payload, to this device
    OUT_OF_RANGE = "out-of-range"
    BUSY = "busy"  # come back after the time that is said
    STORAGE = "storage"  # the server's own disk; nothing has changed


class Refused(FederationError):  # noqa: N818  (what happened, and no mistake)
    """A call that ends with a status instead of an answer.

    Args:
        reason: of :class:`Refusal`, of enrolment or of reports; a closed word, for metrics.
        code: gRPC's.
        detail: for people; it names nothing that the caller does not know.
        trailing: metadata beside the status.
    """

    def __init__(
        self,
        reason: StrEnum,
        code: grpc.StatusCode,
        detail: str,
        trailing: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.code, self.detail, self.trailing = reason, code, detail, trailing


def answering(
    call: str, metrics: Metrics, handler: Callable[[Context], Awaitable[T]]
) -> Callable[[object, Context], Awaitable[T]]:
    """A handler for gRPC that counts and tells what ``handler`` refuses.

    Args:
        call: its name, for metrics: ``watch``, ``fetch``, ``report``, ``content-key`` or ``enrol``.
        metrics: where refusals are counted.
        handler: given the context; reads its request with :func:`request_of`.
    """

    async def answer(_requests: object, context: Context) -> T:
        try:
            return await handler(context)
        except Refused as refused:
            metrics.refused.labels(call, refused.reason.value).inc()
            log.info("%s of %s refused: %s", call, context.peer(), refused)
            await context.abort(refused.code, refused.detail, refused.trailing)
            raise AssertionError("abort raises") from None

    return answer


async def request_of(context: Context, kind: type[M], seconds: float = REQUEST) -> Any:
    """The one request of a call, read within a time and checked.

    Args:
        context: of the call.
        kind: the protobuf message that it must be.
        seconds: until it must have come as a whole.

    Raises:
        Refused: too slow, incomplete, malformed.
    """
    try:
        async with asyncio.timeout(seconds):
            raw = await context.read()
    except TimeoutError:
        raise Refused(
            Refusal.SLOW_WRITER,
            Code.DEADLINE_EXCEEDED,
            f"the request was not here after {seconds:g} s",
        ) from None
    if not isinstance(raw, bytes):
        raise Refused(Refusal.INCOMPLETE, Code.INVALID_ARGUMENT, "no whole request came")
    try:
        return from_wire(kind.FromString(raw))
    except (DecodeError, WireError) as error:
        detail = f"{kind.DESCRIPTOR.name}: {error}"
        raise Refused(Refusal.MALFORMED, Code.INVALID_ARGUMENT, detail) from error


def unstored(what: str) -> Refused:
    """The server's own disk took nothing; the caller may come again.

    >>> print(unstored("reports"))
    storage: the server cannot store reports: try later
    """
    detail = f"the server cannot store {what}: try later"
    return Refused(Refusal.STORAGE, Code.UNAVAILABLE, detail)
