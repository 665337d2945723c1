"""The one call of a device that has no certificate yet, on a port of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from aggregation.durable import StorageError
from federation.calls import REQUEST, Code, Context, Refused, answering, request_of, unstored
from federation.enrolment import Enrolment, EnrolmentError
from federation.metrics import Metrics
from protos.generated import fleet_pb2 as pb
from protos.messages import to_wire

ENROLMENT = "airpeft.v1.Enrolment"

log = logging.getLogger("airpeft.federation.broadcast")


class EnrolmentService:
    """The one call of a device that has a token and no certificate yet."""

    def __init__(
        self,
        enrolment: Enrolment,
        metrics: Metrics,
        enrolled: Callable[[str], None],
        *,
        request: float = REQUEST,
    ) -> None:
        self._enrolment, self._metrics, self._enrolled = enrolment, metrics, enrolled
        self._request = request

    def register(self, server: grpc.aio.Server) -> None:
        """Add the call to a server."""
        enrol = answering("enrol", self._metrics, self.enrol)
        handlers = {"Enrol": grpc.stream_unary_rpc_method_handler(enrol)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(ENROLMENT, handlers),)
        )

    async def enrol(self, context: Context) -> bytes:
        """Exchange a token and a certificate request for a certificate."""
        request = await request_of(context, pb.EnrolRequest, self._request)
        try:
            reply = await asyncio.to_thread(self._enrolment.enrol, request)
            await asyncio.to_thread(self._enrolled, reply.device_id)
        except EnrolmentError as error:
            self._metrics.enrolments.labels(error.reason.value).inc()
            log.warning("enrolment refused from %s: %s", context.peer(), error)
            raise Refused(error.reason, Code.PERMISSION_DENIED, str(error)) from error
        except StorageError as error:
            log.error("enrolment not stored: %s", error)
            raise unstored("this") from error
        self._metrics.enrolments.labels("enrolled").inc()
        log.info("enrolled %s", reply.device_id)
        return bytes(to_wire(reply).SerializeToString())
