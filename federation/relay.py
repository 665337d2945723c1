"""A shelf that fills itself: a relay near the devices asks an upstream mirror once for all of them.

What is named by its digest is checked, kept, and never asked for again; metadata is asked for
again after a while, and an old copy is handed out while upstream is away. A relay holds no key: the
worst that it, or its upstream, can do to a device is to delay it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import httpx

from federation.metadata_files import MAX_METADATA
from federation.mirror import TIMESTAMP, MirrorError, checked, digest_named
from federation.published import NotFoundError
from protos.wraps import MAX_BYTES

log = logging.getLogger("airpeft.federation.relay")

FRESH = 5.0  # seconds that timestamp.json, or the lack of a file, is believed to be current
STEADY = 600.0  # seconds for metadata whose name carries its version
PAYLOAD_MAX = 512 * 1024 * 1024  # bytes
CACHE_MAX = 4 * 1024 * 1024 * 1024  # bytes
SMALL_CACHE_MAX = 256 * 1024 * 1024  # bytes of metadata, and as many of wrapped keys
SLOWEST = 1024  # bytes a second
SMALL_MAX = max(MAX_METADATA, MAX_BYTES)  # bytes of metadata, and of wrapped keys
TRIES = 4  # of one file, going on where the last one stopped
MISSING_MAX = 4096  # names remembered as missing
PARTIAL = ".partial"


class RelayShelf:
    """Files of an upstream mirror, kept in a folder.

    Args:
        upstream: its address, under which ``metadata/`` and ``targets/`` lie.
        cache: the folder.
        tls: how its certificate is checked; None for the system's authorities.
        cache_max: bytes of payloads kept; the longest unused go first.
        clock: Unix time, seconds.
        silence: seconds without a byte after which upstream is given up; an answer must begin
            within as many, and after as many its speed is judged.
    """

    def __init__(
        self,
        upstream: str,
        cache: Path,
        *,
        tls: ssl.SSLContext | None = None,
        cache_max: int = CACHE_MAX,
        clock: Callable[[], float] = time.time,
        silence: float = 20.0,
    ) -> None:
        self._upstream, self._cache = upstream.rstrip("/"), cache
        self._cache_max, self._clock, self._silence = cache_max, clock, silence
        self._client = httpx.AsyncClient(
            verify=tls or ssl.create_default_context(),
            timeout=httpx.Timeout(silence, connect=10.0),
            headers={"Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=16),
            trust_env=False,
        )
        self._missing: OrderedDict[str, float] = OrderedDict()
        self._checked: dict[str, float] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}

    async def find(self, path: str) -> Path:
        """The file behind a path, fetched if need be; many who ask at once cause one fetch.

        Raises:
            NotFoundError: upstream has no such file.
            MirrorError: upstream is away, or hands out other bytes than the name says.
        """
        file = self._cache / checked(path)
        if self._is_current(path, file):
            return file
        if self._clock() - self._missing.get(path, float("-inf")) < FRESH:
            raise NotFoundError(f"no file {path[:200]!r}")
        task = self._coming.get(path)
        if task is None:
            task = asyncio.create_task(self._fetch(path, file))
            self._coming[path] = task
            task.add_done_callback(lambda _: self._coming.pop(path, None))
        try:
            await asyncio.shield(task)  # one who hangs up does not end it for the others
        except MirrorError:
            if digest_named(path) is None and file.is_file():
                return file
            raise
        return file

    async def close(self) -> None:
        """Stop what is being fetched."""
        for task in tuple(self._coming.values()):
            task.cancel()
        await asyncio.gather(*self._coming.values(), return_exceptions=True)
        await self._client.aclose()

    def _is_current(self, path: str, file: Path) -> bool:
        if not file.is_file():
            return False
        if digest_named(path) is not None:
            with contextlib.suppress(OSError):
                os.utime(file)  # used: not the next one to go
            return True
        age = self._clock() - self._checked.get(path, float("-inf"))
        return age < (FRESH if path == TIMESTAMP else STEADY)

    async def _fetch(self, path: str, file: Path) -> None:
        partial = file.with_name(file.name + PARTIAL)
        digest = digest_named(path)
        if digest is None:
            partial.unlink(missing_ok=True)  # another version may stand there now
        for left in reversed(range(TRIES)):
            try:
                await self._append(path, partial, PAYLOAD_MAX if digest else SMALL_MAX)
                break
            except (httpx.HTTPError, OSError, TimeoutError) as error:
                if left == 0:
                    raise MirrorError(f"{self._upstream}/{path}: {error!r}") from error
        if digest is not None:
            found = await asyncio.to_thread(_sha256, partial)
            if found != digest:
                partial.unlink(missing_ok=True)
                raise MirrorError(f"{self._upstream}/{path} is not what its name says")
        partial.replace(file)
        self._checked[path] = self._clock()
        if digest is not None:
            self._make_room("targets", file, self._cache_max)
        else:
            for folder in ("metadata", "wraps"):
                self._make_room(folder, file, min(self._cache_max, SMALL_CACHE_MAX))
            self._checked = {p: at for p, at in self._checked.items() if (self._cache / p).exists()}

    async def _append(self, path: str, partial: Path, limit: int) -> None:
        offset = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        url = f"{self._upstream}/{quote(path)}"
        async with asyncio.timeout(self._silence):
            request = self._client.build_request("GET", url, headers=headers)
            answer = await self._client.send(request, stream=True)
        async with contextlib.aclosing(answer):
            if answer.status_code == 404:
                self._missing[path] = self._clock()
                while len(self._missing) > MISSING_MAX:
                    self._missing.popitem(last=False)
                raise NotFoundError(f"no file {path[:200]!r}")
            if answer.status_code == 416:
                return  # nothing is left to fetch; the digest says whether that is right
            if answer.status_code not in (200, 206):
                raise MirrorError(f"{url}: HTTP {answer.status_code}")
            begin = f"bytes {offset}-"
            goes_on = answer.headers.get("Content-Range", "").startswith(begin)
            if answer.status_code == 206 and not goes_on:
                raise MirrorError(f"{url}: another range than the one asked for")
            # Only now: whoever asks for names that nobody has must leave nothing behind.
            partial.parent.mkdir(parents=True, exist_ok=True)
            begun, got = time.monotonic(), 0
            with partial.open("ab" if answer.status_code == 206 else "wb") as stream:
                async for part in answer.aiter_raw():
                    stream.write(part)
                    got += len(part)
                    waited = time.monotonic() - begun
                    if waited > self._silence and got < SLOWEST * waited:
                        raise MirrorError(f"{url}: {got} bytes in {waited:.0f} s: too slow")
                    if stream.tell() > limit:
                        partial.unlink(missing_ok=True)
                        raise MirrorError(f"{url}: longer than {limit} bytes")

    def _make_room(self, folder: str, newest: Path, most: int) -> None:
        kept = [
            (file.stat().st_mtime, file.stat().st_size, file)
            for file in (self._cache / folder).rglob("*")
            if file.is_file() and not file.name.endswith(PARTIAL)
        ]
        total = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if total <= most:
                return
            if file != newest:
                file.unlink(missing_ok=True)
                total -= size


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
