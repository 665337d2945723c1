"""A copy of the repository behind an ordinary HTTPS server, or a relay: GET, with Range.

TLS keeps others from seeing what a device fetches; it is not what makes it believe. Redirects and
content encodings are not followed: a static file needs neither.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from clients.connection import CHUNK_SILENCE, ConnectionLost, Denied
from clients.download import GRACE
from clients.link import Watchdog
from clients.mirrors import checked, whole

CONNECT_SECONDS = 10.0
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z", re.ASCII)
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class HttpsMirror:
    """One server.

    Args:
        url: under which ``metadata/`` and ``targets/`` lie.
        authorities: certificates (PEM) that it may be signed by, beside the system's.
        silence: seconds between two parts of a file after which it is given up.
        patience: seconds within which the body of an answer must begin.
        grace: seconds before the speed of a whole file is judged.
    """

    def __init__(
        self,
        url: str,
        *,
        authorities: Sequence[bytes] = (),
        silence: float = CHUNK_SILENCE,
        patience: float = CHUNK_SILENCE,
        grace: float = GRACE,
    ) -> None:
        self._url = url.rstrip("/")
        self.name = url
        self._patience, self._grace = patience, grace
        self._link: socket.socket | None = None
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for pem in authorities:
            context.load_verify_locations(cadata=pem.decode("ascii"))
        self._client = httpx.Client(
            verify=context,
            timeout=httpx.Timeout(silence, connect=min(silence, CONNECT_SECONDS)),
            headers={"Accept-Encoding": "identity"},
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,  # nothing but the settings says where a device connects to
        )

    def read(self, path: str, limit: int) -> bytes:
        """A whole file.

        Raises:
            Denied: it is not there.
            ConnectionLost: it cannot be had, or is longer than ``limit``.
        """
        return whole(self.fetch(path, 0), limit, f"{self._url}/{path}", grace=self._grace)

    def fetch(self, path: str, offset: int) -> Iterator[bytes]:
        """A file's bytes from an offset to its end.

        Raises:
            Denied: there is no such file, or no such offset in it.
            ConnectionLost: cut, silent, busy, or an answer to another question.
        """
        url = f"{self._url}/{quote(checked(path))}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            with contextlib.closing(self._answer(url, headers)) as answer:
                skip = _skipped(answer, url, offset)
                for part in answer.iter_raw():
                    if skip >= len(part):
                        skip -= len(part)
                        continue
                    yield part[skip:] if skip else part
                    skip = 0
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
            raise ConnectionLost(f"{url}: {error or type(error).__name__}") from error

    def _answer(self, url: str, headers: dict[str, str]) -> httpx.Response:
        """The answer up to its body. A byte now and then is not enough to keep a device waiting."""
        extensions = {"trace": self._connected}
        request = self._client.build_request("GET", url, headers=headers, extensions=extensions)
        try:
            with Watchdog(self._patience, self._cut):
                return self._client.send(request, stream=True)
        finally:
            link, self._link = self._link, None
            if link is not None:
                link.close()

    def _connected(self, event: str, info: Mapping[str, Any]) -> None:
        """A handle of our own on a new connection, by which it can be cut from outside."""
        if event == "connection.connect_tcp.complete":
            found = info["return_value"].get_extra_info("socket")
            self._link = socket.socket(fileno=os.dup(found.fileno()))

    def _cut(self) -> None:
        link = self._link
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def _skipped(answer: httpx.Response, url: str, offset: int) -> int:
    """How many bytes of the body come before the offset: a server may ignore Range."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise ConnectionLost(f"{url}: encoded, which was not asked for")
    if answer.status_code == 200:
        return offset
    if answer.status_code == 206 and offset:
        found = _RANGE.match(answer.headers.get("Content-Range", ""))
        if found and int(found[1]) == offset:
            return 0
        raise ConnectionLost(f"{url}: another range than the one asked for")
    text = f"{url}: HTTP {answer.status_code}"
    if answer.status_code in _PASSING:
        after = answer.headers.get("Retry-After", "")
        raise ConnectionLost(text, min(600.0, float(after)) if after.isdecimal() else 0.0)
    raise Denied("not-found" if answer.status_code in (404, 410, 416) else "refused", text)
