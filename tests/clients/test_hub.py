"""A base by its id on a model hub: fetched once, then from the cache, and never when forbidden."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clients.base import base_digest, find_base
from tests.device.tiny import make_base

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """The few paths of a hub that fetching a snapshot needs, for one model in a folder."""

    folder: Path
    fetched: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/tiny/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                for p in self.server.folder.iterdir()
            ]
            self.send(200, json.dumps(files).encode(), body=body)
            return
        if path.startswith("/api/models/owner/tiny"):
            names = [{"rfilename": p.name} for p in self.server.folder.iterdir()]
            data = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": names}).encode()
            self.send(200, data, body=body)
            return
        file = self.server.folder / Path(path).name
        if path.startswith("/owner/tiny/resolve/") and file.is_file():
            if body:
                self.server.fetched.append(file.name)
            self.send(200, file.read_bytes(), body=body)
        else:
            self.send(404, b"", body=body)

    def send(self, status: int, data: bytes, *, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.folder, server.fetched = tmp_path / "hub", []
    make_base(server.folder)
    (server.folder / "modeling_evil.py").write_text("raise SystemExit('code from a hub')")
    (server.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def find(name: str, hub: Hub, home: Path, *, offline: bool) -> subprocess.CompletedProcess[str]:
    # Addresses and the cache's place are read when the hub's library is imported.
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    code = f"from clients.base import find_base; b = find_base({name!r}); print(b.name, b.digest)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


def test_fetched_once_then_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    refused = find("owner/tiny", hub, tmp_path / "home", offline=True)
    assert "BaseNotFound" in refused.stderr
    assert not hub.fetched
    done = find("owner/tiny", hub, tmp_path / "home", offline=False)
    assert done.stdout.split() == ["owner/tiny", base_digest(hub.folder)], done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.fetched)
    assert not {"modeling_evil.py", "pytorch_model.bin"} & set(hub.fetched)
    hub.fetched.clear()
    again = find("owner/tiny", hub, tmp_path / "home", offline=True)
    assert again.stdout == done.stdout, again.stderr
    assert not hub.fetched


def test_an_unknown_id_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    done = find("owner/nothing", hub, tmp_path / "home", offline=False)
    assert done.returncode == 1
    assert "check the id and the network, or give a folder" in done.stderr


def test_a_folder_is_named_after_itself(hub: Hub) -> None:
    assert find_base(hub.folder).name == "hub"
