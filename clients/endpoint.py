"""The device's own HTTP endpoint: predictions, status, metrics; on the loopback address only.

    POST /v1/classify  {"texts": ["...", ...]}
                       -> {"predictions": [{"label", "scores", "logits"}],
                           "adapter": digest, "release": name}
    GET  /v1/status    what serves, whether the fleet is reachable, what was reported last
    GET  /metrics      Prometheus text
    GET  /health       200 while the process serves

One request, one version: it is pinned when the request is admitted, so a swap meanwhile changes
the next request and not this one. Bodies are bounded; names in the Host header other than the
loopback's are refused, so a web page cannot reach the endpoint through a name of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from clients.errors import ClientError
from clients.runtime import Request, RequestError, Runtime
from protos.messages import Report

log = logging.getLogger("airpeft.clients.endpoint")

HOST = "127.0.0.1"
MAX_BODY = 1 << 20  # bytes
MAX_TEXTS = 256
MAX_TEXT = 20_000  # characters
START_SECONDS = 20.0


class EndpointError(ClientError):
    """The local endpoint cannot start."""


class DeviceMetrics:
    """What the device counts; no label ever carries a device's name."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "airpeft_device_requests",
            "Requests to the local endpoint.",
            ["status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "airpeft_device_request_seconds",
            "Time to answer a request to the local endpoint.",
            registry=self.registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
        )
        self._events = Counter(
            "airpeft_device_reports",
            "Things that the device reported, by event and reason.",
            ["event", "reason"],
            registry=self.registry,
        )

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"airpeft_device_{name}", text, registry=self.registry)

        self._memory = gauge("memory_bytes", "Resident memory.")
        self._disk = gauge("disk_free_bytes", "Free space on the disk of the home folder.")
        self._load = gauge("load_ratio", "Load of the last minute for each processor.")
        self._battery = gauge("battery_ratio", "Charge of the battery; NaN without one.")
        self._heat = gauge("temperature_celsius", "The hottest sensor; NaN without one.")
        self._sources = Counter(
            "airpeft_device_source_tries",
            "Tries of a source of releases, by its kind and how the try ended.",
            ["kind", "result"],
            registry=self.registry,
        )

    def source(self, name: str, result: str) -> None:
        """Count one try of a source."""
        kind = name if name == "fleet" else "folder" if name.startswith("/") else "https"
        self._sources.labels(kind, result).inc()

    def request(self, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def report(self, report: Report) -> None:
        """Count one report; its health, if it has any, becomes the gauges."""
        self._events.labels(report.event.value, report.reason.value if report.reason else "").inc()
        if report.health is not None:
            health = report.health
            self._memory.set(health.process_memory_bytes)
            self._disk.set(health.disk_free_bytes)
            self._load.set(health.load_1min / (os.cpu_count() or 1))
            battery, heat = health.battery_percent, health.temperature_celsius
            self._battery.set(math.nan if battery is None else battery / 100)
            self._heat.set(math.nan if heat is None else heat)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class Endpoint:
    """A running endpoint, in a thread of its own.

    Args:
        runtime: answers; requests for it run on a small pool of threads.
        status: what ``/v1/status`` shows beside the version.
        metrics: counted into and shown.
        port: 0 for a free one.
        workers: requests that compute at the same time.

    Raises:
        EndpointError: the port is taken.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        status: Callable[[], Mapping[str, Any]],
        metrics: DeviceMetrics,
        port: int = 0,
        workers: int = 2,
    ) -> None:
        self._runtime, self._status, self._metrics = runtime, status, metrics
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="predict")
        self._socket = _bind(port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            self._app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            limit_concurrency=64,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="endpoint", daemon=True
        )

    def start(self) -> None:
        """Serve; returns once requests are taken.

        Raises:
            EndpointError: it did not come up.
        """
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise EndpointError(f"the endpoint on port {self.port} did not start")

    def stop(self) -> None:
        """Answer what is running, take nothing more."""
        self._server.should_exit = True
        self._thread.join(10.0)
        self._pool.shutdown(wait=True)
        self._socket.close()

    def _app(self) -> Starlette:
        routes = [
            Route("/v1/classify", self._timed(self._classify), methods=["POST"]),
            Route("/v1/status", self._show_status),
            Route("/metrics", self._show_metrics),
            Route("/health", lambda request: JSONResponse({"status": "serving"})),
        ]
        hosts = [HOST, "localhost", "[::1]"]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, hosts)])

    def _timed(self, handle: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        async def timed(request: HttpRequest) -> Response:
            start = time.perf_counter()
            response: Response = await handle(request)
            self._metrics.request(response.status_code, time.perf_counter() - start)
            return response

        return timed

    async def _classify(self, request: HttpRequest) -> Response:
        try:
            texts = _texts(await _body(request))
        except RequestError as error:
            return _problem(400, str(error))
        version = self._runtime.pin()
        requests = [Request(text, version) for text in texts]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._pool, self._runtime.run, requests)
        except RequestError as error:
            return _problem(400, str(error))
        except Exception:
            log.exception("a request failed")
            return _problem(500, "the engine failed; the device's log says why")
        return JSONResponse(
            {
                "predictions": [
                    {"label": p.label, "scores": dict(p.scores), "logits": dict(p.logits)}
                    for p in found
                ],
                "adapter": version.digest,
                "release": version.name,
            }
        )

    async def _show_status(self, request: HttpRequest) -> Response:
        version = self._runtime.pin()
        return JSONResponse(
            {
                "release": version.name,
                "adapter": version.digest,
                "labels": list(version.labels),
                "base": self._runtime.base_digest,
                "runtime": self._runtime.kind,
                **self._status(),
            }
        )

    async def _show_metrics(self, request: HttpRequest) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _body(request: HttpRequest) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise RequestError(f"the body is larger than {MAX_BODY} bytes")
    return bytes(data)


def _texts(body: bytes) -> list[str]:
    """The texts of a request body.

    >>> _texts(b'{"texts": ["good"]}')
    ['good']
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError('the body is not JSON; send {"texts": ["..."]}') from None
    texts = document.get("texts") if isinstance(document, dict) else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise RequestError(f'"texts" must be a list of 1 to {MAX_TEXTS} strings')
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
            raise RequestError(f'"texts"[{index}] must be a text of 1 to {MAX_TEXT} characters')
    return texts


def _problem(status: int, detail: str) -> Response:
    return JSONResponse({"error": {"status": status, "detail": detail}}, status_code=status)


def _bind(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((HOST, port))
    except OSError as error:
        sock.close()
        raise EndpointError(
            f"port {port} on {HOST}: {error.strerror}: choose another, or 0 for a free one"
        ) from None
    return sock
