"""The client behind the official suite's command line, driven as that suite drives it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, TargetFile, Targets

from clients import conformance
from clients.conformance import Client
from clients.errors import ClientError
from clients.trust_source import MAX_TIMESTAMP_BYTES, Refused
from protos.messages import RejectReason
from tests.delivery.mirrors import BODY, HEADERS, Dripping
from tests.trust.tuf_simulator import Server, Simulator, role

R = RejectReason


@dataclass
class Runner:
    """One client's folders, and the commands as the suite gives them."""

    folder: Path
    repo: Simulator
    url: str

    @property
    def trusted(self) -> Path:
        return self.folder / "metadata"

    @property
    def downloads(self) -> Path:
        return self.folder / "targets"

    def words(self, *command: str, name: str | None = None) -> list[str]:
        words = ["--metadata-url", f"{self.url}/metadata/", "--metadata-dir", str(self.trusted)]
        if name is not None:
            words += ["--target-name", name, "--target-dir", str(self.downloads)]
            words += ["--target-base-url", f"{self.url}/targets/"]
        return [*words, *command]

    def init(self, root: bytes | None = None) -> int:
        path = self.folder / "initial_root.json"
        path.write_bytes(root or self.repo.published["root"][0])
        return conformance.main(["--metadata-dir", str(self.trusted), "init", str(path)])

    def refresh(self) -> int:
        self.repo.asked.clear()
        return conformance.main(self.words("refresh"))

    def download(self, name: str) -> int:
        self.repo.asked.clear()
        self.repo.fetched.clear()
        return conformance.main(self.words("download", name=name))

    def at(self, now: datetime) -> Client:
        return Client(self.trusted, f"{self.url}/metadata/", now)

    def refused(self, now: datetime | None = None) -> RejectReason:
        with pytest.raises(Refused) as caught:
            self.at(now or self.repo.now).refresh()
        return caught.value.reason

    def version(self, role: str) -> int | None:
        path = self.trusted / f"{role}.json"
        return Metadata[Any].from_file(str(path)).signed.version if path.is_file() else None

    def versions(self) -> dict[str, int | None]:
        return {p.stem: self.version(p.stem) for p in sorted(self.trusted.glob("*.json"))}

    def downloaded(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.downloads.rglob("*")) if path.is_file()]


@pytest.fixture
def repo() -> Simulator:
    return Simulator()


@pytest.fixture
def client(tmp_path: Path, repo: Simulator) -> Iterator[Runner]:
    with Server(repo) as server:
        runner = Runner(tmp_path, repo, server.url)
        runner.trusted.mkdir()
        runner.downloads.mkdir()
        yield runner


@pytest.fixture
def ready(client: Runner) -> Runner:
    """A client that has refreshed once."""
    assert client.init() == 0
    assert client.refresh() == 0
    return client


# Init and refresh


def test_as_a_process_of_its_own(client: Runner) -> None:
    """The command itself, once; the rest calls the same function."""
    root = client.folder / "root.json"
    root.write_bytes(client.repo.latest("root"))
    client.repo.add("targets", b"hello", "greeting.txt")
    client.repo.update("targets")

    def run(*words: str) -> int:
        command = [sys.executable, "-m", "clients.conformance", *words]
        return subprocess.run(command, capture_output=True, timeout=120).returncode

    assert run("--metadata-dir", str(client.trusted), "init", str(root)) == 0
    assert run(*client.words("refresh")) == 0
    assert run(*client.words("download", name="greeting.txt")) == 0
    assert run(*client.words("download", name="nothing")) == 1
    assert client.downloaded() == [b"hello"]


def test_the_first_refresh_asks_for_each_file_once(client: Runner) -> None:
    assert client.init() == 0
    assert client.repo.asked == []
    assert client.refresh() == 0
    assert client.repo.asked == [("root", 2), ("timestamp", None), ("snapshot", 1), ("targets", 1)]
    for name in ("root", "timestamp", "snapshot", "targets"):
        assert (client.trusted / f"{name}.json").read_bytes() == client.repo.latest(name)


def test_a_refresh_without_news_asks_for_the_timestamp_alone(ready: Runner) -> None:
    assert ready.refresh() == 0
    assert ready.repo.asked == [("root", 2), ("timestamp", None)]


def test_download_refreshes_by_itself(client: Runner) -> None:
    client.init()
    assert client.download("nonexistent artifact") == 1
    assert client.versions() == {"root": 1, "snapshot": 1, "targets": 1, "timestamp": 1}


def test_an_initial_root_that_is_none(client: Runner) -> None:
    doc = json.loads(client.repo.latest("root"))
    doc["signatures"][0]["sig"] = "00" * 64
    assert client.init(json.dumps(doc).encode()) == 1
    assert client.refresh() == 1
    assert client.repo.asked == []


def test_fields_that_nobody_knows_are_signed_too(ready: Runner) -> None:
    ready.repo.root.unrecognized_fields["custom"] = "value"
    ready.repo.root.roles["root"].unrecognized_fields["other"] = {"a": 1}
    ready.repo.publish("root")
    assert ready.refresh() == 0
    assert ready.version("root") == 2


def test_no_answer_at_all(ready: Runner) -> None:
    with pytest.raises(ClientError, match="refused"):
        Client(ready.trusted, "http://127.0.0.1:9/", ready.repo.now).refresh()


# Roots


@pytest.mark.parametrize(
    ("versions", "good"),
    [
        ([([1], 1, [1]), ([2], 1, [2, 1]), ([2], 1, [2])], True),
        ([([1], 1, [3, 1, 4]), ([2], 1, [3, 2, 1, 4]), ([2], 1, [3, 2, 4])], True),
        ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 1])], True),
        (
            [
                ([0, 1, 2, 3, 4], 3, [0, 2, 4]),
                ([5, 6, 7, 8, 9], 3, [0, 2, 4, 5, 6, 7]),
                ([5, 6, 7, 8, 9], 3, [5, 6, 7]),
            ],
            True,
        ),
        ([([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [1, 2])], True),
        ([([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1, 2]), ([1, 2, 3], 1, [1])], True),
        ([([1], 1, [1]), ([2], 1, [2, 3, 4])], False),
        ([([1], 1, [1]), ([2], 1, [1, 3, 4])], False),
        ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 2, 4])], False),
        ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 5])], False),
        ([([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [2])], False),
        ([([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1])], False),
    ],
)
def test_root_rotation(
    client: Runner, versions: list[tuple[list[int], int, list[int]]], good: bool
) -> None:
    signers = [CryptoSigner.generate_ed25519() for _ in range(10)]
    repo = client.repo
    repo.published["root"].clear()
    repo.root.version = 0
    for keys, threshold, signing in versions:
        for keyid in list(repo.root.roles["root"].keyids):
            repo.root.revoke_key(keyid, "root")
        for number in keys:
            repo.root.add_key(signers[number].public_key, "root")
        repo.root.roles["root"].threshold = threshold
        repo.signers["root"] = [signers[number] for number in signing]
        repo.publish("root")
    assert client.init(repo.published["root"][0]) == 0
    assert client.refresh() == (0 if good else 1)
    last = repo.published["root"][-1 if good else -2]
    assert (client.trusted / "root.json").read_bytes() == last


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize(
    ("keys", "threshold", "signing", "good"),
    [
        ([2], 1, [2], True),
        ([1], 1, [3, 1, 4], True),
        ([0, 1, 2, 3, 4], 3, [2, 3, 4], True),
        ([2], 1, [1, 3, 4], False),
        ([0, 1, 3, 4, 5], 3, [0, 2, 4], False),
        ([0, 1, 3, 4, 5], 3, [0, 4], False),
    ],
)
def test_keys_of_the_other_roles(
    client: Runner, name: str, keys: list[int], threshold: int, signing: list[int], good: bool
) -> None:
    signers = [CryptoSigner.generate_ed25519() for _ in range(6)]
    repo = client.repo
    for keyid in list(repo.root.roles[name].keyids):
        repo.root.revoke_key(keyid, name)
    for number in keys:
        repo.root.add_key(signers[number].public_key, name)
    repo.root.roles[name].threshold = threshold
    repo.signers[name] = [signers[number] for number in signing]
    client.init()
    repo.publish("root")
    repo.update("targets")
    assert client.refresh() == (0 if good else 1)
    if not good:
        assert client.refused() is R.METADATA_SIGNATURE


def test_one_key_under_many_names_counts_once(ready: Runner) -> None:
    repo = ready.repo
    signer = repo.signers["snapshot"][0]
    doc = signer.public_key.to_dict()
    repo.publish("root")
    forged = json.loads(repo.latest("root"))
    for number in range(5):
        keyid = f"{number:064d}"
        forged["signed"]["keys"][keyid] = json.loads(json.dumps(doc))
        forged["signed"]["roles"]["snapshot"]["keyids"].append(keyid)
    forged["signed"]["roles"]["snapshot"]["threshold"] = 3
    metadata = Metadata[Any].from_dict(forged)
    metadata.signatures.clear()
    metadata.sign(repo.signers["root"][0])
    repo.published["root"][-1] = metadata.to_bytes()
    repo.update()
    assert ready.refused() is R.METADATA_SIGNATURE
    assert ready.version("snapshot") == 1


# Rollback, fast-forward, mix and match


def test_timestamp_rollback(ready: Runner) -> None:
    ready.repo.publish("timestamp")
    assert ready.refresh() == 0
    ready.repo.publish("timestamp", version=1)
    assert ready.refused() is R.METADATA_ROLLBACK
    assert ready.version("timestamp") == 2


def test_a_timestamp_of_the_same_version_is_not_looked_at(ready: Runner) -> None:
    ready.repo.timestamp.snapshot_meta.version = 100
    ready.repo.publish("timestamp", version=1)
    assert ready.refresh() == 0
    assert (ready.trusted / "timestamp.json").read_bytes() == ready.repo.published["timestamp"][0]


@pytest.mark.parametrize("hashes", [False, True])
def test_snapshot_rollback(ready: Runner, hashes: bool) -> None:
    ready.repo.hashes = hashes
    ready.repo.update()
    assert ready.refresh() == 0
    ready.repo.publish("snapshot", version=1)
    ready.repo.publish("timestamp")
    assert ready.refused() is R.METADATA_ROLLBACK
    assert (ready.version("timestamp"), ready.version("snapshot")) == (2, 2)


@pytest.mark.parametrize("hashes", [False, True])
def test_targets_rollback(ready: Runner, hashes: bool) -> None:
    ready.repo.hashes = hashes
    ready.repo.update("targets")
    assert ready.refresh() == 0
    ready.repo.publish("targets", version=1)
    ready.repo.update()
    assert ready.refused() is R.METADATA_ROLLBACK
    assert ready.version("targets") == 2


def test_a_role_that_vanishes_from_the_snapshot(ready: Runner) -> None:
    ready.repo.delegate("targets", role("A"))
    ready.repo.update("targets", "A")
    assert ready.refresh() == 0
    del ready.repo.snapshot.meta["A.json"]
    ready.repo.update()
    assert ready.refresh() == 1
    assert ready.version("snapshot") == 2


@pytest.mark.parametrize("name", ["timestamp", "snapshot", "targets"])
def test_fast_forward_is_cured_by_new_keys(ready: Runner, name: str) -> None:
    """As the specification says (5.3.11): new keys for snapshot cure targets, too."""
    repo = ready.repo
    repo.publish(name, version=99_999)
    if name != "timestamp":
        repo.publish(*(["snapshot"] if name == "targets" else []), "timestamp")
    assert ready.refresh() == 0
    assert ready.version(name) == 99_999
    for rotated in {"timestamp": ["timestamp"], "snapshot": ["snapshot", "timestamp"]}.get(
        name, ["snapshot"]
    ):
        repo.rotate(rotated)
    repo.publish("root")
    repo.publish(name, version=1)
    if name != "timestamp":
        repo.publish(*(["snapshot"] if name == "targets" else []), "timestamp")
    assert ready.refresh() == 0
    assert ready.version(name) == 1


def test_a_snapshot_that_is_not_the_one_named(client: Runner) -> None:
    client.init()
    repo = client.repo
    repo.override["metadata/2.snapshot.json"] = repo.latest("snapshot")
    repo.update()
    assert client.refresh() == 1
    assert client.versions() == {"root": 1, "timestamp": 2}


@pytest.mark.parametrize("name", ["snapshot", "targets"])
def test_other_bytes_than_the_hash_says(ready: Runner, name: str) -> None:
    repo = ready.repo
    repo.hashes = True
    repo.update("targets")
    version = repo.metadata[name].signed.version
    repo.metadata[name].signed.unrecognized_fields["other"] = 1
    repo.publish(name, version=version)  # signed, but not what the one above it names
    assert ready.refused() is R.METADATA_MALFORMED
    assert ready.version(name) == 1


def test_mix_and_match(ready: Runner) -> None:
    """Targets of one state under the snapshot of another."""
    repo = ready.repo
    repo.add("targets", b"one", "a")
    repo.update("targets")
    old = repo.latest("targets")
    repo.add("targets", b"two", "b")
    repo.update("targets")
    repo.override["metadata/3.targets.json"] = old
    assert ready.refused() is R.METADATA_ROLLBACK
    repo.override.clear()
    assert ready.refresh() == 0


# Time


@pytest.mark.parametrize("name", ["root", "timestamp", "snapshot", "targets"])
def test_expired(ready: Runner, name: str) -> None:
    repo = ready.repo
    repo.metadata[name].signed.expires = repo.now - timedelta(days=1)
    repo.publish(name)
    if name != "root":
        repo.publish(
            *(["snapshot"] if name == "targets" else []), *["timestamp"][: name != "timestamp"]
        )
    assert ready.refused() is R.METADATA_EXPIRED
    # The root is kept (5.3.10 comes after it was trusted), the others are not.
    assert ready.version(name) == (2 if name == "root" else 1)


def test_what_is_kept_may_expire_if_something_newer_is_there(ready: Runner) -> None:
    repo = ready.repo
    repo.later = repo.now + timedelta(days=60)
    for name in ("root", "targets", "snapshot", "timestamp"):
        repo.metadata[name].signed.expires = repo.later
    repo.publish("root")
    repo.update("targets")
    ready.at(repo.now + timedelta(days=45)).refresh()
    assert ready.versions() == {"root": 2, "snapshot": 2, "targets": 2, "timestamp": 2}
    assert ready.refused(repo.now + timedelta(days=61)) is R.METADATA_EXPIRED


def test_a_delegated_role_that_has_expired(ready: Runner) -> None:
    repo = ready.repo
    repo.delegate("targets", role("A"), Targets(expires=repo.now - timedelta(days=1)))
    repo.add("A", b"x", "file")
    repo.update("targets", "A")
    assert ready.refresh() == 0
    assert ready.download("file") == 1
    assert ready.downloaded() == []
    assert "A" not in ready.versions()


def test_a_delegated_role_that_has_expired_since(ready: Runner, tmp_path: Path) -> None:
    """What was believed of a delegated role ends with it, unless there is a newer one."""
    repo = ready.repo
    repo.delegate("targets", role("A"), Targets(expires=repo.now + timedelta(days=7)))
    repo.add("A", b"first", "first")
    repo.add("A", b"second", "second")
    repo.update("targets", "A")
    assert ready.download("first") == 0

    def later() -> Client:
        client = ready.at(repo.now + timedelta(days=18))
        client.refresh()
        return client

    with pytest.raises(Refused) as caught:
        later().download("second", f"{ready.url}/targets/", ready.downloads)
    assert caught.value.reason is R.METADATA_EXPIRED
    assert ready.downloaded() == [b"first"]
    repo.metadata["A"].signed.expires = repo.now + timedelta(days=21)
    repo.update("A")
    later().download("second", f"{ready.url}/targets", ready.downloads)
    assert ready.downloaded() == [b"first", b"second"]


@pytest.mark.parametrize("scheme", ["rsassa-pss-sha256", "rsa-pkcs1v15-sha256", "ecdsa"])
def test_other_kinds_of_keys(ready: Runner, scheme: str) -> None:
    rsa = scheme.startswith("rsa")
    signer = (
        CryptoSigner.generate_rsa(scheme=scheme, size=2048)
        if rsa
        else CryptoSigner.generate_ecdsa()
    )
    repo = ready.repo
    repo.root.revoke_key(repo.root.roles["timestamp"].keyids[0], "timestamp")
    repo.root.add_key(signer.public_key, "timestamp")
    repo.signers["timestamp"] = [signer]
    repo.publish("root", "timestamp")
    assert ready.refresh() == 0
    assert ready.version("root") == 2


def test_odd_but_right_metadata(ready: Runner) -> None:
    """An old form of the specification's number, and an artefact named by another hash."""
    repo = ready.repo
    repo.root.spec_version = "1.0"
    target = TargetFile.from_data("a/b c/ü%20?#.bin", b"odd", ["sha512"])
    repo.targets.targets["a/b c/ü%20?#.bin"] = target
    repo.publish("root")
    repo.update("targets")
    assert ready.refresh() == 0
    prefix = target.hashes["sha512"]
    repo.override[f"targets/a/b%20c/{prefix}.%C3%BC%20%3F%23.bin"] = b"odd"
    assert ready.download("a/b c/ü%20?#.bin") == 0
    assert ready.downloaded() == [b"odd"]


# Delegations


GRAPHS = {
    "one": ([("targets", "A")], ["A"]),
    "two": ([("targets", "A"), ("targets", "B")], ["A", "B"]),
    "two levels": ([("targets", "A"), ("targets", "B"), ("B", "C")], ["A", "B", "C"]),
    "depth first": (
        [("targets", "A"), ("targets", "B"), ("A", "C"), ("A", "D")],
        ["A", "C", "D", "B"],
    ),
    "terminating": ([("targets", "A"), ("targets", "B"), ("A", "C!"), ("A", "D")], ["A", "C"]),
    "below a terminating one": (
        [("targets", "A"), ("targets", "B"), ("A", "C!"), ("C", "D")],
        ["A", "C", "D"],
    ),
    "other paths": ([("targets", "A.py"), ("targets", "B"), ("A", "C")], ["B"]),
    "a cycle": (
        [("targets", "A"), ("targets", "B"), ("B", "C"), ("C", "D"), ("D", "B")],
        ["A", "B", "C", "D"],
    ),
    "a third of two": (
        [("targets", "A"), ("targets", "B"), ("B", "C"), ("A", "C")],
        ["A", "C", "B"],
    ),
    "a third of two, by one path": (
        [("targets", "A"), ("targets", "B"), ("B", "C"), ("A", "C.py")],
        ["A", "B", "C"],
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_delegations_are_searched_in_order(client: Runner, name: str) -> None:
    edges, visited = GRAPHS[name]
    changed = {"targets": None}
    for delegator, text in edges:
        child = text.rstrip("!").removesuffix(".py")
        paths = ["*.py"] if text.endswith(".py") else ["*"]
        client.repo.delegate(delegator, role(child, paths=paths, terminating=text.endswith("!")))
        changed[child] = None
    client.repo.update(*changed)
    client.init()
    assert client.download("missing") == 1
    assert client.repo.asked[4:] == [(r, client.repo.metadata[r].signed.version) for r in visited]


@pytest.mark.parametrize(
    ("path", "found", "visited"),
    [
        ("targetfile", True, []),
        ("README.md", True, ["A"]),
        ("releases/x/x_v1", True, ["B", "C"]),
        ("releases/y/y_v1.zip", True, ["B", "D"]),
        ("releases/z/z_v1.zip", False, ["B"]),
    ],
)
def test_a_target_is_found_where_paths_lead(
    client: Runner, path: str, found: bool, visited: list[str]
) -> None:
    repo = client.repo
    repo.delegate("targets", role("A", paths=["*.doc", "*.md"]))
    repo.delegate("targets", role("B", paths=["releases/*/*"]))
    repo.delegate("B", role("C", paths=["releases/x/*"]))
    repo.delegate("B", role("D", paths=["releases/y/*.zip"]))
    owners = {"targetfile": "targets", "README.md": "A", "releases/x/x_v1": "C"}
    repo.add(owners.get(path, "D"), path.encode(), path)
    repo.update("targets", "A", "B", "C", "D")
    client.init()
    assert client.download(path) == (0 if found else 1)
    assert [name for name, _ in repo.asked[4:]] == visited
    assert client.downloaded() == ([path.encode()] if found else [])


@pytest.mark.parametrize("name", ["?", "#", "/delegatedrole", "../delegatedrole", "a%2Fb"])
def test_names_of_roles_stay_inside_the_folder(client: Runner, name: str) -> None:
    client.repo.delegate("targets", role(name))
    client.repo.update("targets", name)
    client.init()
    before = sorted(client.folder.iterdir())
    assert client.download("missing") == 1
    assert len(client.versions()) == 5
    assert client.repo.asked[-1][0] not in ("", name)
    assert sorted(client.folder.iterdir()) == before


def test_hash_bins(client: Runner) -> None:
    repo = client.repo
    bins = repo.succinct(3, "bin")
    repo.add(bins.get_role_for_target("file"), b"content", "file")
    repo.update("targets", *bins.get_roles())
    client.init()
    assert client.download("file") == 0
    assert [name for name, _ in repo.asked[4:]] == [bins.get_role_for_target("file")]


def test_a_delegated_role_signed_by_somebody_else(client: Runner) -> None:
    repo = client.repo
    repo.delegate("targets", role("A"))
    repo.add("A", b"evil", "file")
    repo.signers["A"] = [CryptoSigner.generate_ed25519()]
    repo.update("targets", "A")
    client.init()
    assert client.download("file") == 1
    assert client.downloaded() == []


# Downloads


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("path", ["file.txt", "path/to/a/file.txt"])
def test_a_download_and_none_the_second_time(client: Runner, path: str, consistent: bool) -> None:
    client.repo.root.consistent_snapshot = consistent
    client.repo.publish("root")
    client.repo.add("targets", b"content", path)
    client.repo.update("targets")
    client.init()
    assert client.download(path) == 0
    assert client.downloaded() == [b"content"]
    assert client.download(path) == 0
    assert client.repo.fetched == []
    client.repo.add("targets", b"other content", path)
    client.repo.update("targets")
    assert client.download(path) == 0
    assert client.downloaded() == [b"other content"]


@pytest.mark.parametrize("evil", [b"Content", b"content and more", b"conten", b""])
def test_other_bytes_than_signed(client: Runner, evil: bytes) -> None:
    client.repo.add("targets", b"content", "file")
    client.repo.update("targets")
    client.repo.artefacts["file"] = evil
    client.init()
    assert client.download("file") == 1
    assert client.downloaded() == []


def test_several_targets_in_one_run(client: Runner) -> None:
    for name in ("a", "b"):
        client.repo.add("targets", name.encode(), name)
    client.repo.update("targets")
    client.init()
    words = client.words("download", name="a")
    assert conformance.main([*words[:-1], "--target-name", "b", "download"]) == 0
    assert client.downloaded() == [b"a", b"b"]


# Endless and slow


def test_more_bytes_than_a_timestamp_may_have(ready: Runner) -> None:
    ready.repo.override["metadata/timestamp.json"] = b" " * (MAX_TIMESTAMP_BYTES + 1)
    assert ready.refused() is R.METADATA_MALFORMED
    assert ready.version("timestamp") == 1


def test_more_bytes_than_the_snapshot_says(ready: Runner) -> None:
    ready.repo.hashes = True
    ready.repo.update("targets")
    path = f"metadata/{ready.repo.targets.version}.targets.json"
    ready.repo.override[path] = ready.repo.latest("targets") + b" "
    assert ready.refused() is R.METADATA_MALFORMED


@pytest.mark.parametrize(
    "at_once", [HEADERS, BODY, b"HTTP/1.0 200 OK\r\n\r\n"], ids=["headers", "body", "old"]
)
def test_a_server_that_drips(
    ready: Runner, monkeypatch: pytest.MonkeyPatch, at_once: bytes
) -> None:
    """A byte now and then, for ever: no silence is long enough to be noticed."""
    monkeypatch.setattr(conformance, "DEADLINE", 0.3)
    with (
        Dripping(None, at_once) as rogue,
        pytest.raises(conformance.DownloadError, match=r"not here after 0\.3"),
    ):
        conformance.get(f"{rogue.url}/metadata/timestamp.json", MAX_TIMESTAMP_BYTES)
    assert ready.refresh() == 0


def test_arguments_that_are_missing(client: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    client.init()
    assert conformance.main(["--metadata-dir", str(client.trusted), "refresh"]) == 1
    assert "--metadata-url" in capsys.readouterr().err
    assert conformance.main(client.words("download")) == 1
    assert "--target-name" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["refresh"], ["--metadata-dir", "D", "fly"], ["--help"]])
def test_the_status_is_0_or_1_and_nothing_else(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert conformance.main(words) == (0 if words == ["--help"] else 1)
    assert "airpeft-tuf-conformance" in "".join(capsys.readouterr())


def test_options_in_any_order_and_addresses_without_a_slash(client: Runner) -> None:
    client.init()
    client.repo.add("targets", b"x", "file")
    client.repo.update("targets")
    where = ["--metadata-dir", str(client.trusted), "--metadata-url", f"{client.url}/metadata"]
    what = ["--target-dir", str(client.downloads), "--target-base-url", f"{client.url}/targets"]
    assert conformance.main([*what, "--target-name", "file", *where, "download"]) == 0
    assert client.downloaded() == [b"x"]
