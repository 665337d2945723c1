"""From fetched bytes to an adapter that is safe to load, or to the reason why it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aggregation import guard, payload, sealed
from aggregation.adapter import Adapter
from clients.runtime import Runtime
from clients.slot_record import SlotRecord
from protos.messages import DeviceEvent, Quality, RejectReason


class Refusal(Exception):  # noqa: N818  (never leaves an install)
    """A release that does not come into service, with what is to be reported.

    Args:
        event: what the device says that it did.
        reason: from the closed vocabulary; None where it is the device's own trouble.
        detail: for people.
        final: never to be tried again on this device.
        quality: what was measured, where it was.
    """

    def __init__(
        self,
        event: DeviceEvent,
        reason: RejectReason | None,
        detail: str,
        *,
        final: bool = True,
        quality: Quality | None = None,
    ) -> None:
        super().__init__(detail)
        self.event, self.final = event, final
        self.fields: Mapping[str, Any] = {"reason": reason, "quality": quality}


def open_payload(
    record: SlotRecord,
    data: bytes,
    runtime: Runtime,
    limits: guard.GuardLimits,
    content_key: bytes = b"",
) -> Adapter:
    """Decode a payload, decrypting it on the way if need be, and let the guard look at it.

    Args:
        record: the signed facts that it must agree with.
        data: the payload; its hash has been checked.
        runtime: says which base and which modules there are.
        limits: of the guard.
        content_key: of an encrypted one.

    Raises:
        Refusal: payload-malformed or guard.
    """
    bounds = payload.PayloadLimits(max_bytes=record.length, max_plain=max(1, record.plain_length))
    try:
        source: bytes | sealed.Opener = data
        if record.key_check:
            source = sealed.Opener(data, content_key, limit=sealed.plain_length(len(data)))
        adapter = payload.decode(
            source,
            spec_digest=record.spec_digest,
            adapter_digest=record.adapter_digest,
            limits=bounds,
        )
        guard.check(
            adapter,
            expected_base=runtime.base_digest,
            shapes=runtime.module_shapes,
            limits=limits,
        )
    except payload.PayloadError as error:
        reason = RejectReason.PAYLOAD_MALFORMED
        raise Refusal(DeviceEvent.REJECTED, reason, str(error)) from error
    except guard.GuardError as error:
        raise Refusal(DeviceEvent.REJECTED, RejectReason.GUARD, str(error)) from error
    return adapter
