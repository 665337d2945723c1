"""A bundle that ``model_signing`` 1.1.1 really wrote, over an adapter that this product wrote.

``tests/trust/model_signing``: ``model_signing sign key adapter --private_key ... --signature
adapter.sig``; the private key is gone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from federation.model_signing import BundleError, bundle_digest, resources, verify

MADE = Path(__file__).parent / "model_signing"
BUNDLE, KEY = MADE / "adapter.sig", MADE / "builder.pub"


def public(key: Any) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(encoding, form))


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The bundle after a change of what it states; its signature stays."""
    document = json.loads(BUNDLE.read_bytes())
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    change(statement)
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    document["dsseEnvelope"]["payload"] = payload
    return json.dumps(document).encode()


def test_a_real_bundle_is_read_verified_and_its_digest_is_that_of_the_file() -> None:
    digest = bundle_digest(BUNDLE, MADE / "adapter", KEY)
    assert digest == "sha256:" + hashlib.sha256(BUNDLE.read_bytes()).hexdigest()
    assert bundle_digest(BUNDLE, MADE / "adapter") == digest
    files = {path.name for path in (MADE / "adapter").iterdir()}
    assert set(resources(BUNDLE.read_bytes())) == files


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_another_file_than_the_one_signed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    shutil.copytree(MADE / "adapter", tmp_path / "adapter")
    with (tmp_path / "adapter" / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(BundleError, match=f"another {name}"):
        bundle_digest(BUNDLE, tmp_path / "adapter", KEY)
    (tmp_path / "adapter" / name).unlink()
    with pytest.raises(BundleError, match="here is none"):
        bundle_digest(BUNDLE, tmp_path / "adapter", KEY)


def test_only_the_key_that_signed_it_verifies_it(tmp_path: Path) -> None:
    verify(BUNDLE.read_bytes(), KEY.read_bytes())
    for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()):
        with pytest.raises(BundleError, match="not signed by the key"):
            verify(BUNDLE.read_bytes(), public(ec.generate_private_key(curve)))
    for wrong in (b"", b"no key", public(ed25519.Ed25519PrivateKey.generate())):
        with pytest.raises(BundleError, match="public key"):
            verify(BUNDLE.read_bytes(), wrong)
    with pytest.raises(BundleError, match="cannot read"):
        bundle_digest(BUNDLE, MADE / "adapter", tmp_path / "nothing")


def test_what_was_changed_after_signing_is_refused() -> None:
    def renamed(statement: dict[str, Any]) -> None:
        statement["subject"][0]["name"] = "another"

    def swapped(statement: dict[str, Any]) -> None:
        statement["predicate"]["resources"][1]["digest"] = "0" * 64

    def outside(statement: dict[str, Any]) -> None:
        statement["predicate"]["resources"][0]["name"] = "../builder.pub"

    assert resources(changed(renamed)) == resources(BUNDLE.read_bytes())
    with pytest.raises(BundleError, match="not signed"):
        verify(changed(renamed), KEY.read_bytes())
    with pytest.raises(BundleError, match="subject's digest"):
        resources(changed(swapped))
    data = changed(outside)
    with pytest.raises(BundleError, match="not signed"):
        verify(data, KEY.read_bytes())


def test_a_bundle_reaches_no_file_outside_the_folder(tmp_path: Path) -> None:
    def outside(statement: dict[str, Any]) -> None:
        statement["predicate"]["resources"][0]["name"] = "../builder.pub"

    path = tmp_path / "odd.sig"
    path.write_bytes(changed(outside))
    with pytest.raises(BundleError, match="here is none"):
        bundle_digest(path, MADE / "adapter")
