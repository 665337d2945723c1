"""gRPC channels and servers with the settings that a fleet needs; TLS always.

Why each option is there (measured):

* ``max_pending_requests``: by default gRPC cancels new calls beyond 1,000 that wait to be taken
  up, which is what every reconnect of a fleet looks like.
* ``ping_timeout_ms`` beside keepalive: without it a dead link is noticed after 69 s, with it
  after 14 s; ``min_ping_interval_without_data_ms`` keeps the server from answering such pings
  with GOAWAY "too_many_pings".
* ``lookahead_bytes`` without ``bdp_probe``, at clients: what is in flight when a link breaks is
  lost, and left alone the window grows to megabytes; 128 KiB still fill 10 Mbit/s at 100 ms.
* ``max_connection_idle`` and ``handshake_timeout``: a device that is there keeps a stream open, so
  whoever holds a connection without a call, half a request's headers or half a handshake included,
  loses it. ``max_concurrent_streams``: of one connection; a device has a handful.
* ``tsi.max_frame_size``, at servers: every connection holds a buffer for one TLS record that it
  sends; 8 instead of 16 KiB spare 4 KiB of each idle stream for 22 bytes more in 8 KiB.
  ``channelz`` off spares one more: nobody can ask for what it gathers.
* ``so_reuseport`` off: on (the default) a forgotten old server silently takes half of the
  devices; off, the second one fails to start.

Every server certificate of the fleet carries the name :data:`SERVER_NAME`, and clients ask for
that name whatever address they dial: the fleet's authority says who the server is, an address
doesn't. Device certificates are for client authentication only, so none can pose as the server.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from protos.errors import WireError

if TYPE_CHECKING:
    from grpc_health.v1._async import HealthServicer

SERVER_NAME = "fleet.airpeft.internal"
LOOKAHEAD = 128 * 1024  # bytes
MESSAGE_MAX = 16 * 1024 * 1024  # bytes
RECORD = 8 * 1024  # bytes of a TLS record of the server
REQUEST_MAX = 1024 * 1024  # bytes
IDLE = 120.0  # seconds of a connection without a call
HANDSHAKE = 20.0  # seconds

Option = tuple[str, int | str]


class AddressInUseError(WireError):
    """A port cannot be bound."""


def server_options() -> list[Option]:
    """Options of every server; see the module's docstring for the reasons."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 30_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_connection_idle_ms", int(1000 * IDLE)),
        ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE)),
        ("grpc.max_concurrent_streams", 128),
        ("grpc.tsi.max_frame_size", RECORD),
        ("grpc.enable_channelz", 0),
        ("grpc.max_receive_message_length", REQUEST_MAX),
        ("grpc.max_send_message_length", MESSAGE_MAX),
    ]


def client_options() -> list[Option]:
    """Options of every channel; see the module's docstring for the reasons."""
    return [
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.default_authority", SERVER_NAME),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD),
        ("grpc.max_receive_message_length", MESSAGE_MAX),
        ("grpc.enable_retries", 0),  # the device's own back-off decides
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """PEM files of a server; with ``client_authority`` a client must show a certificate of it."""

    key: bytes
    certificate: bytes
    client_authority: bytes | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """As gRPC wants them."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)],
            root_certificates=self.client_authority,
            require_client_auth=self.client_authority is not None,
        )


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """PEM files of a client: the authority it trusts, and its own key and certificate if any."""

    authority: bytes
    key: bytes | None = None
    certificate: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """As gRPC wants them."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def open_channel(target: str, tls: ClientTls, options: Sequence[Option] = ()) -> grpc.Channel:
    """A blocking channel to ``host:port``; nothing is dialled before the first call."""
    return grpc.secure_channel(target, tls.credentials(), [*client_options(), *options])


def open_aio_channel(
    target: str, tls: ClientTls, options: Sequence[Option] = ()
) -> grpc.aio.Channel:
    """The same for asyncio."""
    return grpc.aio.secure_channel(target, tls.credentials(), [*client_options(), *options])


class Server:
    """A running server. Keep it: gRPC closes the port when the object is collected."""

    def __init__(self, server: grpc.aio.Server, port: int, health: HealthServicer) -> None:
        self._server = server
        self._health = health
        self.port = port

    async def stop(self, grace: float) -> None:
        """Say "not serving", let calls end for ``grace`` seconds, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def wait(self) -> None:
        """Until stopped."""
        await self._server.wait_for_termination()


async def serve(
    host: str,
    port: int,
    tls: ServerTls,
    register: Callable[[grpc.aio.Server], None],
    services: Sequence[str],
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
) -> Server:
    """Bind, add health checking and reflection, and start.

    Args:
        host: address to bind.
        port: 0 takes a free one; :attr:`Server.port` says which.
        tls: the server's certificate, and whose clients it takes.
        register: adds the servicers.
        services: their full names, such as ``airpeft.v1.Fleet``.
        interceptors: run for every call, health and reflection too.

    Raises:
        AddressInUseError: another process holds the port, or the address isn't one of this machine.
    """
    # Servers only; a device that imports this module shouldn't pay for them.
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_health.v1._async import HealthServicer
    from grpc_reflection.v1alpha import reflection

    _probe(host, port)
    server = grpc.aio.server(interceptors=list(interceptors), options=server_options())
    register(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        [*services, "grpc.health.v1.Health", reflection.SERVICE_NAME], server
    )
    try:
        bound = server.add_secure_port(_address(host, port), tls.credentials())
    except RuntimeError as error:
        raise _in_use(host, port) from error
    if bound == 0:
        raise _in_use(host, port)
    await server.start()
    for service in ("", *services):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    return Server(server, bound, health)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _probe(host: str, port: int) -> None:
    """Ask the kernel first: gRPC prints a page of its own before it raises."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise _in_use(host, port, error) from error


def _in_use(host: str, port: int, error: OSError | None = None) -> AddressInUseError:
    why = f" ({error.strerror or error})" if error else ""
    return AddressInUseError(
        f"cannot listen on {host}:{port}{why}: another process may hold the port (ss -ltnp shows"
        " it); stop it, choose another port, or give 0 for a free one"
    )
