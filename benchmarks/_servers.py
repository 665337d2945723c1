"""The servers that ``broadcast.py`` measures, each in a process of its own."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


async def serve_fleet(folder: Path, tls: bool) -> None:
    import grpc

    from federation.authority import open_authority, server_tls
    from federation.broadcast import FLEET, Feed, FleetService
    from federation.chunks import ChunkCache
    from federation.fleet import Fleet
    from federation.keys import ADAPTER_NAMES, ONLINE_NAME, ROOT_NAMES, generate
    from federation.metrics import Metrics
    from federation.repository import Repository
    from federation.store import Store
    from protos.channel import serve, server_options
    from protos.signed import RoundDocument

    now = datetime.now(UTC)
    keys = generate(folder / "keys", (*ROOT_NAMES, *ADAPTER_NAMES, ONLINE_NAME))
    repository = Repository.create(
        folder / "repository",
        root_keys=keys.signers("root-"),
        adapter_keys=keys.signers("adapters-"),
        online=keys.signer(ONLINE_NAME),
        now=now,
    )
    store = Store.open(folder / "fleet.sqlite")
    feed, metrics = Feed(repository.bundle), Metrics()
    calls = [0]

    class Service(FleetService):
        async def _admit(self, context: Any) -> tuple[str, str]:
            calls[0] += 1
            if tls:
                return await super()._admit(context)
            return "device", "serial"  # without TLS nobody says who it is

    class Open(Fleet):
        def admits(self, device_id: str, serial: str) -> bool:
            known = super().admits(device_id, serial)
            return known if tls else True

    chunks = ChunkCache(lambda path: folder / path, lambda: None)
    service = Service(Open(store), feed, chunks, metrics, lambda: None, heartbeat=600.0)
    server: Any
    if tls:
        authority = open_authority(folder / "authority", now)
        settings = server_tls(authority, folder / "authority", now, clients=True)
        server = await serve("127.0.0.1", 0, settings, service.register, [FLEET])
        port = server.port
    else:
        server = grpc.aio.server(options=server_options())
        service.register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
    loop = asyncio.get_running_loop()
    answer(port=port)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if json.loads(line)["do"] == "round":
            before, sequence = calls[0], repository.round().sequence + 1
            start = time.monotonic()
            repository.publish_round(
                RoundDocument(sequence=sequence, rollout=f"r{sequence}", salt="s"), now=now
            )
            feed.wake()
            answer(calls=before, signing=time.monotonic() - start)
        else:
            answer(calls=calls[0])
    feed.close()
    await server.stop(0)


async def serve_files(folder: Path) -> None:
    from federation.mirror import FolderShelf
    from federation.mirror_server import MirrorServer

    server = MirrorServer(FolderShelf(folder), connections=20_000)
    await server.start("127.0.0.1", 0)
    answer(port=server.port)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await server.stop()


def answer(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def many_files() -> None:
    """As many connections as this user may have, up to 20,000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 20_000)), hard))


def main() -> None:
    many_files()
    kind, folder = sys.argv[1], Path(sys.argv[2])
    asyncio.run(serve_files(folder) if kind == "files" else serve_fleet(folder, kind == "tls"))


if __name__ == "__main__":
    main()
