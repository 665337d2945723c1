from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation.keys import (
    KeyFileError,
    KeyFolder,
    adopt,
    generate,
    is_encrypted,
    load_signer,
    read_public,
)
from tests.trust.fleet_of_one import Device, Publisher


@pytest.mark.parametrize("scheme", ["ed25519", "ecdsa-p256"])
def test_a_key_signs_and_is_readable_by_its_owner_alone(tmp_path: Path, scheme: str) -> None:
    folder = generate(tmp_path / "keys", ["root-1"], scheme=scheme, passphrase="correct horse")
    private = tmp_path / "keys" / "root-1.pem"
    assert private.stat().st_mode & 0o777 == 0o600
    assert is_encrypted(private)
    signer = folder.signer("root-1", "correct horse")
    folder.public("root-1").verify_signature(signer.sign(b"data"), b"data")


def test_ecdsa_keys_work_from_end_to_end(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "publisher", scheme="ecdsa-p256")
    publisher.order(publisher.release(1))
    assert Device(tmp_path / "device", publisher).installs().name == "stable-1"


@pytest.mark.parametrize("passphrase", [None, "", "wrong"])
def test_a_wrong_passphrase(tmp_path: Path, passphrase: str | None) -> None:
    folder = generate(tmp_path, ["root-1"], passphrase="right")
    with pytest.raises(KeyFileError, match="passphrase"):
        folder.signer("root-1", passphrase)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    generate(tmp_path, ["root-1"])
    before = (tmp_path / "root-1.pem").read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        generate(tmp_path, ["adapters-1", "root-1"])
    assert (tmp_path / "root-1.pem").read_bytes() == before
    assert not (tmp_path / "adapters-1.pem").exists()
    # Nor is a public half of somebody else's, which may be the only copy here.
    public = tmp_path / "root-1.pub.json"
    kept, theirs = public.read_bytes(), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "root-1.pub.json").write_bytes(kept)
    with pytest.raises(KeyFileError, match="never overwritten"):
        generate(theirs, ["root-1"])
    with pytest.raises(KeyFileError, match="never overwritten"):
        adopt(theirs, "root-1", generate(tmp_path / "x", ["x"]).public("x"), "command:cat")
    assert (theirs / "root-1.pub.json").read_bytes() == kept
    adopt(theirs, "root-1", read_public(public), "command:cat")  # the same key


@pytest.mark.parametrize("name", ["", "../x", "Root", "a" * 65, "a/b"])
def test_malformed_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="key name"):
        generate(tmp_path, [name])


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    folder = generate(tmp_path, ["root-1", "root-2"])
    with pytest.raises(KeyFileError, match="cannot read"):
        folder.signer("root-9")
    with pytest.raises(KeyFileError, match="keys init"):
        KeyFolder(tmp_path / "empty").signers("root-")
    (tmp_path / "root-1.pem").write_bytes((tmp_path / "root-2.pem").read_bytes())
    with pytest.raises(KeyFileError, match="does not belong"):
        folder.signer("root-1")
    (tmp_path / "root-1.pem").write_text("junk")
    with pytest.raises(KeyFileError, match="PKCS#8"):
        load_signer(tmp_path / "root-1.pem")
    for junk in (b"[]", b"{}", b"\xff", json.dumps({"keyid": 3}).encode()):
        (tmp_path / "root-2.pub.json").write_bytes(junk)
        with pytest.raises(KeyFileError, match="not a public key"):
            folder.public("root-2")
