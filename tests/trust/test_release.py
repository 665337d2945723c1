"""Make, sign, publish: from an adapter's folder to a device, with keys that never meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aggregation import payload, peft_layout
from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from federation import release
from federation.provenance import ProvenanceError, evaluation, read_provenance
from federation.published import PublishError
from federation.registry import Registry, RegistryError
from federation.release import ReleaseError, ReleaseOptions
from federation.release_cli import keys as keys_app
from federation.release_cli import release as release_app
from protos.signed import Lineage
from tests.trust.fleet_of_one import BASE, START, Device, Publisher

SPEC = AdapterSpec(
    BASE,
    (ModuleSpec("encoder.query", 16, 12, 4, 8.0),),
    (TensorSpec("classifier.weight", (2, 12)),),
    task="sequence-classification",
    labels=("negative", "positive"),
)
PRIVACY = {
    "schema": 1,
    "example": {"unit": "example", "epsilon": 7.5, "delta": 1e-5},
    "client": None,
}


def adapter(seed: int = 0) -> Adapter:
    return initial_adapter(SPEC, seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as the registry keeps it."""
    registry = Registry(tmp_path / "registry")
    version = registry.put(
        adapter(),
        base_name="tiny",
        now=START,
        lineage=Lineage(parent="", run="demo", round=5, recipe="svd-warm-start"),
        evaluation=evaluation("heldout", 0.8425, 400),
        privacy=PRIVACY,
    )
    return registry.folder(version.digest)


def make(publisher: Publisher, folder: Path, out: Path, **changes: Any) -> release.ReleaseRequest:
    in_use = changes.pop("in_use", ())
    options = ReleaseOptions(**{"channel": "stable", **changes})
    return release.make_request(
        folder,
        out,
        adapters=publisher.repository.adapters(),
        above=publisher.repository.offline(),
        options=options,
        now=START,
        in_use=in_use,
    )


def test_from_the_registry_to_a_device(
    publisher: Publisher, device: Device, folder: Path, tmp_path: Path
) -> None:
    request = make(publisher, folder, tmp_path / "r1", notes="first")
    # Two people, two machines: each gets a copy of the request, and sends back one small file.
    signatures = []
    for number in (0, 2):
        there = shutil.copytree(tmp_path / "r1", tmp_path / f"machine{number}")
        out = tmp_path / f"sig{number}.json"
        signatures.append(release.sign(there, publisher.adapter_keys[number], out=out))
    with pytest.raises(PublishError, match="0/2"):
        release.publish(tmp_path / "r1", publisher.repository, now=START)
    with pytest.raises(PublishError, match="1/2"):
        release.publish(tmp_path / "r1", publisher.repository, now=START, signatures=signatures[:1])
    record = release.publish(
        tmp_path / "r1", publisher.repository, now=START, signatures=signatures
    )
    assert record == request.record
    publisher.order(record)
    got = device.installs()
    said = got.statement
    assert (said.example.epsilon_micro, said.example.delta_e12) == (7_500_000, 10_000_000)  # type: ignore[union-attr]
    assert said.client is None
    assert said.evaluation is not None
    assert said.evaluation.accuracy_micro == 842_500
    assert (said.lineage.run, said.lineage.round, said.notes) == ("demo", 5, "first")
    decoded = payload.decode(
        publisher.repository.read(got.path),
        spec_digest=got.spec_digest,
        adapter_digest=got.adapter_digest,
        limits=payload.PayloadLimits(max_plain=got.plain_length),
    )
    assert decoded.digest == got.adapter_digest


def test_counters_and_floors_go_on(publisher: Publisher, folder: Path, tmp_path: Path) -> None:
    for number, floor in ((1, None), (2, 2), (3, None)):
        request = make(publisher, folder, tmp_path / f"r{number}", floor=floor)
        for key in publisher.adapter_keys[:2]:
            release.sign(request.folder, key)
        record = release.publish(request.folder, publisher.repository, now=START)
        assert (record.name, record.statement.floor) == (f"stable-{number}", 2 if number > 1 else 0)
    with pytest.raises(ReleaseError, match="only rises"):
        make(publisher, folder, tmp_path / "r4", floor=1)
    with pytest.raises(ReleaseError, match="floor"):
        make(publisher, folder, tmp_path / "r5", floor=9)


def test_only_the_newest_releases_of_a_channel_stay_listed(
    publisher: Publisher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("federation.signable.LIVE_RELEASES", 3)
    publisher.release(1, channel="other")
    for number in range(1, 6):
        request = make(publisher, folder, tmp_path / f"r{number}")
        for key in publisher.adapter_keys[1:]:
            release.sign(request.folder, key, roots=[publisher.repository.root()])
        release.publish(request.folder, publisher.repository, now=START)
    names = [record.name for record in publisher.repository.releases()]
    assert names == ["other-1", "stable-3", "stable-4", "stable-5"]
    publisher.order(publisher.repository.release("stable-3"))
    request = make(publisher, folder, tmp_path / "r6", in_use=publisher.repository.in_use())
    for key in publisher.adapter_keys[1:]:
        release.sign(request.folder, key)
    release.publish(request.folder, publisher.repository, now=START)
    names = [record.name for record in publisher.repository.releases()]
    # What the round hands out stays, however old.
    assert names == ["other-1", "stable-3", "stable-4", "stable-5", "stable-6"]
    publisher.order(publisher.repository.release("stable-6"))
    make(publisher, folder, tmp_path / "r7", in_use=publisher.repository.in_use())
    after = json.loads((tmp_path / "r7" / "adapters.json").read_bytes())["signed"]["targets"]
    assert sorted(after)[0] == "adapters/other/1.airpeft"
    assert "adapters/stable/3.airpeft" not in after


@pytest.mark.parametrize("what", ["payload", "metadata", "previous", "old release"])
def test_a_request_that_was_tampered_with_is_not_signed(
    publisher: Publisher, folder: Path, tmp_path: Path, what: str
) -> None:
    publisher.release(1)
    request = make(publisher, folder, tmp_path / "r")
    if what == "payload":
        (request.folder / "payload.airpeft").write_bytes(b"evil")
    elif what == "old release":
        path = request.folder / "adapters.json"
        old = publisher.repository.release("stable-1").sha256.encode()
        path.write_bytes(path.read_bytes().replace(old, b"e" * 64))
    else:
        name = {"metadata": "adapters.json", "previous": "previous.json"}[what]
        (request.folder / name).write_bytes(b"{}")
    with pytest.raises(ReleaseError):
        release.sign(request.folder, publisher.adapter_keys[0])


def test_a_signature_for_another_request_is_not_taken(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    one = make(publisher, folder, tmp_path / "one")
    other = make(publisher, folder, tmp_path / "other", notes="not the same")
    signature = release.sign(other.folder, publisher.adapter_keys[0])
    with pytest.raises(ReleaseError, match="another request"):
        release.assemble(one.folder, [signature])
    signature.write_bytes(b"[]")
    with pytest.raises(ReleaseError, match="not a signature"):
        release.assemble(one.folder, [signature])
    with pytest.raises(ReleaseError, match="exists"):
        make(publisher, folder, tmp_path / "one")


def test_the_registry_keeps_what_it_was_given(tmp_path: Path, folder: Path) -> None:
    registry = Registry(tmp_path / "registry")
    digest = adapter().digest
    (version,) = registry.versions()
    assert version == registry.get(digest)
    assert (version.privacy, version.lineage.round) == (PRIVACY, 5)
    assert registry.adapter(digest).digest == digest
    again = registry.put(adapter(), base_name="tiny", now=START, card="another card")
    assert again == version
    assert peft_layout.read(folder).digest == digest
    with pytest.raises(RegistryError, match="no adapter"):
        registry.get("sha256:" + "0" * 64)
    with pytest.raises(RegistryError, match="hex"):
        registry.get("../../etc")
    peft_layout.write(
        folder,
        adapter(1),
        base_name="x",
        extra={"version.json": (folder / "version.json").read_bytes()},
    )
    with pytest.raises(RegistryError, match="changed"):
        registry.adapter(digest)
    (folder / "version.json").write_text("{}")
    with pytest.raises(RegistryError, match="damaged"):
        registry.versions()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("privacy.json", "["),
        ("privacy.json", "[]"),
        ("privacy.json", '{"example": {"epsilon": "8", "delta": 1e-5}}'),
        ("privacy.json", '{"example": {"epsilon": -1, "delta": 1e-5}}'),
        ("privacy.json", '{"example": {"epsilon": 1}}'),
        ("version.json", '{"evaluation": {"set": "x"}}'),
        ("version.json", '{"lineage": {"round": -1}}'),
    ],
)
def test_files_beside_an_adapter_that_say_nonsense(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ProvenanceError):
        read_provenance(tmp_path)


def test_the_command_line_from_keys_to_verification(
    publisher: Publisher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    secret = tmp_path / "secret"
    secret.write_text("open sesame\n")

    def run(app: Any, *words: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result.output

    out = tmp_path / "keys"
    made = run(keys_app, "init", out, "--passphrase-file", secret, "--format", "json")
    assert [key["name"] for key in json.loads(made)["data"]][:2] == ["adapters-1", "adapters-2"]
    assert "never overwritten" in run(keys_app, "init", out, "--no-passphrase", code=2)
    assert "adapters-3" in run(keys_app, "show", out)
    assert "passphrase" in run(keys_app, "init", tmp_path / "k2", code=2)

    server, request = publisher.repository.folder, tmp_path / "r1"
    text = run(release_app, "make", folder, "--repository", server, "-o", request)
    assert "stable-1" in text
    assert "7.5 (delta 1e-05, example)" in text
    key = publisher.keys.path / "adapters-1.pem"
    assert "adapters-1" in run(release_app, "sign", request, "--key", key)
    stranger = out / "adapters-2.pem"
    assert "passphrase" in run(release_app, "sign", request, "--key", stranger, code=2)
    stranger_signs = ("sign", request, "--key", stranger, "--passphrase-file", secret)
    assert "--root FILE" in run(release_app, *stranger_signs, code=2)
    root = tmp_path / "root.json"
    root.write_bytes(publisher.repository.root())
    run(release_app, *stranger_signs, "--root", root)
    shown = json.loads(run(release_app, "show", request, "--format", "json"))
    assert shown["schema"] == "airpeft.v1.release"
    assert shown["data"]["signed_by"] == ["adapters-1", "adapters-2"]
    with pytest.raises(PublishError, match="1/2"):  # a stranger's signature counts for nothing
        release.publish(request, publisher.repository, now=START)
    release.sign(request, publisher.adapter_keys[1])
    release.publish(request, publisher.repository, now=START)

    assert "stable-1" in run(release_app, "list", "--repository", server)
    assert "0.8425" in run(release_app, "show", "stable-1", "--repository", server)
    assert "stable-1" in run(release_app, "show", "stable-9", "--repository", server, code=2)
    report = run(release_app, "verify", server, "--root", root, "--format", "json", code=1)
    data = json.loads(report[: report.rindex("}") + 1])["data"]
    adapters = next(row for row in data["roles"] if row["role"] == "adapters")
    assert adapters["signed_by"] == ["adapters-1", "adapters-2"]
    assert next(row for row in data["roles"] if row["role"] == "timestamp")["expired"]
    assert "which server" in run(release_app, "list", code=2)
    assert "no server is running" in run(
        release_app, "publish", request, "--home", tmp_path, code=1
    )
