"""Mirrors on loopback: an honest HTTPS server, and ones that lie, cut, stall or drip."""

from __future__ import annotations

import asyncio
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from federation.mirror_server import MirrorServer, Shelf

HOST = "127.0.0.1"


def server_context(folder: Path) -> ssl.SSLContext:
    """With the certificate that a fleet's authority made for its server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


@contextmanager
def serving(
    shelf: Shelf, tls: ssl.SSLContext | None = None, **limits: Any
) -> Iterator[MirrorServer]:
    """A :class:`MirrorServer` on a thread of its own."""
    server = MirrorServer(shelf, **limits)
    loop = asyncio.new_event_loop()
    ready, thread = threading.Event(), threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(HOST, 0, tls), loop).result(120)
        ready.set()
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(120)
        close = getattr(shelf, "close", None)
        if close is not None:
            asyncio.run_coroutine_threadsafe(close(), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


class Rogue:
    """Serves a folder over HTTPS, payloads in a way of its own.

    Args:
        folder: a mirror.
        tls: its certificate.
        way: lie, cut, stall, drip, short, long, error, redirect, whole, elsewhere.
        after: payload bytes before it misbehaves.
    """

    def __init__(self, folder: Path, tls: ssl.SSLContext, way: str, after: int = 1000) -> None:
        self.asked: list[tuple[str, str]] = []
        self.over = threading.Event()
        rogue = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                rogue.answer(self, folder, way, after)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Rogue:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join(120)
        self._server.server_close()

    def answer(self, handler: Any, folder: Path, way: str, after: int) -> None:
        path, wanted = handler.path.lstrip("/"), handler.headers.get("Range", "")
        self.asked.append((path, wanted))
        file = folder / path
        if not file.is_file():
            handler.send_error(404)
            return
        data, start = file.read_bytes(), 0
        if path.startswith("targets/adapters"):
            if way == "error":
                handler.send_response(503)
                handler.send_header("Retry-After", "0")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            if way == "redirect":
                handler.send_response(302)
                handler.send_header("Location", f"/elsewhere/{path}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            data = {"lie": bytes(len(data)), "short": data[:after], "long": data + b"x"}.get(
                way, data
            )
        if wanted and way != "whole":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        body = data[start:]
        handler.send_response(206 if start else 200)
        if start:
            first = start + (1 if way == "elsewhere" else 0)
            handler.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if path.startswith("targets/adapters") and way in ("cut", "stall", "drip"):
            handler.wfile.write(body[:after])
            handler.wfile.flush()
            if way == "stall":
                self.over.wait(120)
            for one in body[after:] if way == "drip" else b"":
                if self.over.wait(0.01):
                    break
                handler.wfile.write(bytes([one]))
            handler.close_connection = True
            return
        handler.wfile.write(body)


HEADERS = b"HTTP/1.1 200 OK\r\nX-Long: "
BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"


class Dripping:
    """Answers every request with some bytes at once, and then one now and then, without an end."""

    def __init__(self, tls: ssl.SSLContext | None, at_once: bytes) -> None:
        self._tls, self._at_once = tls, at_once
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self.ended = threading.Event()

    def __enter__(self) -> Dripping:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._drip, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _drip(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            try:
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                connection.recv(4096)
                connection.sendall(self._at_once)
                while not self._over.wait(0.02):
                    connection.sendall(b"x")
            except OSError:
                self.ended.set()
