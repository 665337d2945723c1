"""The content key of an encrypted release, as this device comes by it: wrapped to its own key.

It is asked for before the payload is, from the fleet or from the file beside the payload on a
mirror, and kept wrapped in the slot, so that the device can open what it serves after every start.
Whoever brings it is believed in nothing: it must open with this device's key, and be the key that
the signed statement checks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aggregation import sealed
from clients.connection import Connection, ConnectionLost, Denied
from clients.inspection import Refusal
from clients.slot_record import SlotRecord
from protos.errors import WireError
from protos.messages import DeviceEvent, RejectReason
from protos.recipients import private_key
from protos.wraps import MAX_BYTES, WrapError, Wraps, unwrap, wraps_path

if TYPE_CHECKING:
    from clients.mirrors import Mirror

    Place = tuple[str, Mirror | Connection]
else:
    Place = tuple

log = logging.getLogger("airpeft.clients.content_keys")


class ContentKeys:
    """Opens content keys with the encryption key of one device.

    Args:
        encryption_pem: private X25519 key; empty: the device has none.
        lacking: called when a release can't be read because nobody has wrapped its key to this
            device: perhaps its certificate does not name its encryption key yet.
    """

    def __init__(
        self, encryption_pem: bytes = b"", *, lacking: Callable[[], None] = lambda: None
    ) -> None:
        self._private = private_key(encryption_pem) if encryption_pem else None
        self._lacking = lacking

    def keyed(
        self, record: SlotRecord, held: SlotRecord | None, places: Sequence[Place]
    ) -> SlotRecord:
        """The record with the wrapped content key in it, if its payload is encrypted.

        Args:
            record: the signed facts of the release.
            held: what a slot has of the same payload, from an earlier try.
            places: whom to ask, in order.

        Raises:
            Refusal: content-key; it may be tried again later.
            ConnectionLost: none of them has one that opens, and one could not be asked.
        """
        if not record.key_check or record.wrapped:
            return record
        if held is not None and held.wrapped:
            known = replace(record, wrapped=held.wrapped)
            if self._opens(known, "an earlier try"):
                return known
        if self._private is None:
            raise _refusal("this device has no encryption key")
        lost, said = None, []
        for name, place in places:
            try:
                found = self._ask(place, record.sha256)
            except ConnectionLost as error:
                lost = error
                continue
            except (Denied, WireError) as error:
                said.append(f"{name}: {error}")
                continue
            known = replace(record, wrapped=found.hex())
            if self._opens(known, name):
                return known
            said.append(f"{name}: a key that does not open it")
        if lost is not None:
            raise lost
        self._lacking()
        raise _refusal("; ".join(said) or "no source has its key")

    def open(self, record: SlotRecord) -> bytes:
        """The content key of a record that :meth:`keyed` gave.

        Raises:
            Refusal: content-key: it does not open (any more).
        """
        try:
            if self._private is None:
                raise WrapError("this device has no encryption key")
            key = unwrap(bytes.fromhex(record.wrapped), self._private, record.sha256)
        except (WrapError, ValueError) as error:
            raise _refusal(str(error)) from None
        if not sealed.is_right(key, record.key_check):
            raise _refusal("the content key is not the one that was signed")
        return key

    def _opens(self, record: SlotRecord, whence: str) -> bool:
        try:
            self.open(record)
        except Refusal as refusal:
            log.warning("content key of %s from %s: %s", record.release, whence, refusal)
            return False
        return True

    def _ask(self, place: Mirror | Connection, sha256: str) -> bytes:
        if isinstance(place, Connection):
            return place.content_key(sha256)
        assert self._private is not None  # noqa: S101  # keyed() has looked
        data = place.read(wraps_path(sha256), MAX_BYTES)
        found = Wraps.from_bytes(data, sha256).find(self._private.public_key().public_bytes_raw())
        if found is None:
            raise Denied("not-found", "its file of wrapped keys has none for this device")
        return found


def _refusal(detail: str) -> Refusal:
    text = f"it is encrypted: {detail}"
    return Refusal(DeviceEvent.REJECTED, RejectReason.CONTENT_KEY, text, final=False)
