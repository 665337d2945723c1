"""A device's certificate is short-lived; here it is renewed, long before its end, by the key.

The request is signed by the device's own key, which the fleet knows: nothing else is needed, also
when the certificate has ended while the device was off. Devices that enrolled together do not renew
together: each has a moment of its own between 60 and 75 % of the certificate's life.

While renewing fails, the old certificate is used; a revoked device is told so, and serves on.

A device that was enrolled before there were encryption keys brings its own with the next request.
Once it is given a release that it can't read for the lack of one, it does not wait for that.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from aggregation.durable import StorageError
from clients import identity
from clients.connection import Connection, ConnectionLost, Denied, enrol
from clients.identity import Identity, IdentityError
from clients.link import Backoff
from protos.messages import EnrolReply, EnrolRequest

log = logging.getLogger("airpeft.clients.renewal")

EARLIEST, SPREAD = 0.60, 0.15  # of a certificate's life


class Keeper:
    """Keeps one device's certificate fresh, and opens connections with it.

    Args:
        home: the device's home folder.
        who: its identity, as loaded.
        now: the device's clock, with a zone.
        backoff: waits between tries that failed.
        connect: opens a connection.
        renew: asks the enrolment service.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        home: Path,
        who: Identity,
        *,
        now: Callable[[], datetime],
        backoff: Backoff,
        connect: Callable[[Identity], Connection] = Connection,
        renew: Callable[[str, bytes, EnrolRequest], EnrolReply] = enrol,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home, self._now, self._backoff, self._clock = home, now, backoff, clock
        self._open, self._renew = connect, renew
        self._next_try, self._asked = float("-inf"), False
        self.who = who
        self._moment = moment_of(who)

    def connect(self) -> Connection:
        """A connection, with a new certificate if it is time for one."""
        if self.is_due():
            self.renew()
        return self._open(self.who)

    def is_due(self) -> bool:
        """Whether it is time for a new certificate, and to try (again)."""
        due = self._asked or self._now() >= self._moment
        return due and self._clock() >= self._next_try

    def ask_for_reader(self) -> None:
        """Renew soon, if the certificate does not name this device's encryption key."""
        self._asked = bool(self.who.encryption_pem) and not self.who.is_reader

    def renew(self) -> bool:
        """Ask for the next certificate; whether it came."""
        who = self.who
        self._next_try = self._clock() + self._backoff.next(at_least=1.0)
        if not who.enrol:
            log.warning(
                "the certificate ends at %s, and it is not known where to renew it:"
                " enrol the device again",
                who.life[1],
            )
            return False
        wanted = identity.certificate_request(who.key_pem, encryption_pem=who.encryption_pem)
        request = EnrolRequest(token="", certificate_request=wanted)
        try:
            reply = self._renew(who.enrol, who.authority_pem, request)
            self.who = identity.renewed(self._home, who, reply.certificate)
        except (ConnectionLost, Denied, IdentityError, StorageError) as error:
            log.warning("the certificate, which ends at %s, is not renewed: %s", who.life[1], error)
            return False
        self._backoff.reset()
        self._next_try, self._asked = float("-inf"), False
        self._moment = moment_of(self.who)
        log.info("the certificate is renewed until %s", self.who.life[1])
        return True


def moment_of(who: Identity) -> datetime:
    """When a device renews its certificate: its own moment, the same after every start."""
    start, end = who.life
    share = int.from_bytes(hashlib.sha256(who.device_id.encode()).digest()[:4], "big") / 2**32
    return start + (end - start) * (EARLIEST + SPREAD * share)
