"""The answer to a device that asks for the content key of an encrypted payload."""

from __future__ import annotations

import asyncio
import logging

from federation.calls import Code, Refusal, Refused
from federation.metrics import Metrics
from federation.wrap_shelf import NoKeyError, NoWrapError, WrapShelf, WrapShelfError
from protos.messages import ContentKeyReply, to_wire

log = logging.getLogger("airpeft.federation.content_keys")


class ContentKeys:
    """Hands each device what was wrapped to it, and nothing else.

    Args:
        shelf: the wrapped keys; None: there are none.
        metrics: what is counted.
    """

    def __init__(self, shelf: WrapShelf | None, metrics: Metrics) -> None:
        self._shelf, self._metrics = shelf, metrics

    async def answer(self, sha256: str, certificate: bytes) -> bytes:
        """The serialised reply.

        Args:
            sha256: of the payload, hex.
            certificate: of the device, which has been admitted.

        Raises:
            Refused: there is none for this device, or it can't be read.
        """
        result = "failed"
        try:
            if self._shelf is None:
                raise NoWrapError("there are no wrapped keys here")
            wrapped = await asyncio.to_thread(self._shelf.find_for, sha256, certificate)
            result = "handed-out"
        except NoKeyError as error:
            result = "no-encryption-key"
            found = Refusal.NO_ENCRYPTION_KEY, Code.FAILED_PRECONDITION
            raise Refused(*found, str(error)) from error
        except NoWrapError as error:
            result = "not-wrapped"
            raise Refused(Refusal.NOT_WRAPPED, Code.NOT_FOUND, str(error)) from error
        except WrapShelfError as error:
            log.error("wrapped keys of %s: %s", sha256, error)
            detail = "the server cannot read its wrapped keys: try later"
            raise Refused(Refusal.STORAGE, Code.UNAVAILABLE, detail) from error
        finally:
            self._metrics.content_keys.labels(result).inc()
        return bytes(to_wire(ContentKeyReply(wrapped)).SerializeToString())
