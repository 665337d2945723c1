"""``airpeft mirror``: the repository as static files, for sticks, web servers and relays.

Exit codes: 0 done; 2 bad input, or the copy cannot be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from federation.shown import HERE, AsFormat, Format, Home, plain_errors, show

if TYPE_CHECKING:
    from federation.mirror_server import Shelf

mirror = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Hand releases out from other places: a stick, a web server, a relay.",
    epilog="Example: airpeft mirror export /media/stick. Exit codes: 0 done, 2 bad input.",
)

Repository = Annotated[
    Path | None,
    typer.Option(help="A repository folder, or a mirror, instead of the one in --home."),
]


@mirror.command("export")
def mirror_export(
    folder: Annotated[Path, typer.Argument(help="The copy; made, or brought up to date.")],
    home: Home = HERE,
    repository: Repository = None,
    only_assigned: Annotated[
        bool,
        typer.Option("--only-assigned", help="Only payloads that the current round hands out."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    format: AsFormat = Format.TABLE,  # noqa: A002
) -> None:
    """Copy what is current into a folder. It needs no key and no running server.

    Devices with the folder, or a web server on top of it, among their sources install from it:
    sources = ["fleet", "https://mirror.example.org", "/media/stick"] in device.toml.

    Example: airpeft mirror export /media/stick --home fleet-server --only-assigned
    """
    from federation.mirror import export_mirror

    with plain_errors():
        done = export_mirror(
            repository or home / "repository",
            folder,
            only_assigned=only_assigned,
            dry_run=dry_run,
        )
    data = {
        "folder": str(done.folder),
        "files": done.files,
        "copied": done.copied,
        "bytes": done.bytes,
        "releases": list(done.releases),
        "usable_until": done.usable_until.isoformat(),
        "dry_run": dry_run,
    }
    verb = "would be copied" if dry_run else "copied"
    text = (
        f"{folder}: {done.copied} of {done.files} files {verb}, {done.bytes} bytes; releases: "
        f"{', '.join(done.releases) or 'none'}\n"
        f"Devices believe this copy until {done.usable_until:%Y-%m-%d %H:%M}Z: export again before."
    )
    show("mirror", data, format, lambda: typer.echo(text))


@mirror.command("serve")
def mirror_serve(
    folder: Annotated[
        Path | None, typer.Argument(help="A mirror; without it the repository in --home.")
    ] = None,
    home: Home = HERE,
    upstream: Annotated[
        str | None,
        typer.Option(help="Relay: fetch what is missing in FOLDER from this address."),
    ] = None,
    upstream_authority: Annotated[
        Path | None, typer.Option(help="Certificate (PEM) that upstream is signed by.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8443,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM): serve HTTPS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    connections: Annotated[int, typer.Option(min=1, help="Open at the same time.")] = 512,
) -> None:
    """Serve a mirror, or be a relay, over HTTPS with Range until SIGTERM or Ctrl-C.

    Example: airpeft mirror serve --home fleet-server --certificate web.pem --key web.key
    Example: airpeft mirror serve /var/cache/airpeft --upstream https://fleet.example.org:8443
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with plain_errors():
        tls = _server_tls(certificate, key)
        shelf = _shelf(folder, home, upstream, upstream_authority)
        asyncio.run(_serve(shelf, host, port, tls, connections))


def _shelf(folder: Path | None, home: Path, upstream: str | None, authority: Path | None) -> Shelf:
    from federation.mirror import FolderShelf, MirrorError
    from federation.relay import RelayShelf

    if upstream is None:
        return FolderShelf(folder or home / "repository")
    if folder is None:
        raise MirrorError("--upstream needs a FOLDER in which the relay keeps what it fetched")
    if not upstream.startswith(("https://", "http://")):
        raise MirrorError(f"--upstream {upstream!r}: give https://HOST[:PORT][/PATH]")
    try:
        tls = ssl.create_default_context()
        if authority is not None:
            tls.load_verify_locations(cafile=str(authority))
    except OSError as error:
        raise MirrorError(f"--upstream-authority {authority}: {error}") from error
    return RelayShelf(upstream, folder, tls=tls)


def _server_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    from federation.mirror import MirrorError

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise MirrorError("--certificate and --key belong together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise MirrorError(f"cannot use {certificate} with {key}: {error}") from error
    return context


async def _serve(
    shelf: Shelf, host: str, port: int, tls: ssl.SSLContext | None, connections: int
) -> None:
    from federation.mirror_server import MirrorServer
    from federation.relay import RelayShelf

    server = MirrorServer(shelf, connections=connections)
    await server.start(host, port, tls)
    stop = asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(one, stop.set)
    typer.echo(f"serving on {'https' if tls else 'http'}://{host}:{server.port}")
    with contextlib.suppress(asyncio.CancelledError):
        await stop.wait()
    await server.stop()
    if isinstance(shelf, RelayShelf):
        await shelf.close()
