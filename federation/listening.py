"""Ports that a server takes again when it is started again; the operator's interface on one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from federation.first_start import ServerError
from protos.channel import AddressInUseError

LOOPBACK = "127.0.0.1"
GRACE = 2.0  # seconds for calls in progress at the end

log = logging.getLogger("airpeft.federation.server")


class _Api(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the whole process, not to this part of it."""
        yield


async def serve_api(app: FastAPI, wanted: int, last: int, stack: contextlib.AsyncExitStack) -> int:
    """Serve the operator's interface on loopback, until the stack is unwound; its port.

    Raises:
        AddressInUseError: the port is taken.
        ServerError: it did not start.
    """

    async def at(port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError as error:
            listener.close()
            raise AddressInUseError(
                f"cannot listen on {LOOPBACK}:{port} ({error.strerror}): stop the process that"
                " holds the port (ss -ltnp shows it), choose another, or give 0 for a free one"
            ) from error
        return listener

    listener = await at_last_port(at, wanted, last)
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(GRACE),
    )
    server = _Api(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def stop() -> None:
        server.should_exit = True
        await serving

    stack.push_async_callback(stop)
    while not server.started:
        if serving.done():
            raise ServerError("the operator's interface did not start; the log says why")
        await asyncio.sleep(0.01)
    return int(listener.getsockname()[1])


async def at_last_port(at: Callable[[int], Awaitable[Any]], wanted: int, last: int) -> Any:
    """On the port wanted; for 0 on the last one, or else on any."""
    if wanted == 0 and last:
        try:
            return await at(last)
        except AddressInUseError as error:
            log.warning("%s; taking another: devices must be told the new address", error)
    return await at(wanted)
