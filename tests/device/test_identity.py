from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from clients import identity
from clients.identity import IdentityError
from federation.authority import open_authority
from protos.messages import EnrolReply


def reply_for(tmp_path: Path, request: bytes, name: str = "d-7") -> EnrolReply:
    now = datetime.now(UTC)
    authority = open_authority(tmp_path / "authority", now)
    issued = authority.issue(request, name, now)
    return EnrolReply(device_id=name, certificate=issued.pem, authority=authority.pem, root=b"{}")


def test_key_stays_private_and_the_same(home: Path):
    key = identity.key_of(home)
    assert identity.key_of(home) == key
    assert stat.S_IMODE((home / "identity" / "key.pem").stat().st_mode) == 0o600


def test_enrolment_is_kept_and_signs(home: Path, tmp_path: Path):
    key = identity.key_of(home)
    reply = reply_for(tmp_path, identity.certificate_request(key))
    kept = identity.save(home, reply, key_pem=key, fleet="127.0.0.1:9")
    assert identity.load(home) == kept
    assert "PRIVATE" not in repr(kept)
    public = x509.load_pem_x509_certificate(kept.certificate_pem).public_key()
    public.verify(kept.sign(b"body"), b"body", ec.ECDSA(hashes.SHA256()))


def test_a_certificate_for_another_key_or_name_is_refused(home: Path, tmp_path: Path):
    other = identity.key_of(tmp_path / "other")
    reply = reply_for(tmp_path, identity.certificate_request(other))
    with pytest.raises(IdentityError, match="another key"):
        identity.save(home, reply, key_pem=identity.key_of(home), fleet="x:1")
    key = identity.key_of(home)
    reply = reply_for(tmp_path, identity.certificate_request(key), "d-8")
    renamed = EnrolReply(
        device_id="d-9", certificate=reply.certificate, authority=reply.authority, root=b""
    )
    with pytest.raises(IdentityError, match="d-9"):
        identity.save(home, renamed, key_pem=key, fleet="x:1")


def test_an_interrupted_enrolment_is_no_enrolment(home: Path):
    identity.key_of(home)
    with pytest.raises(IdentityError, match="airpeft device enrol"):
        identity.load(home)
    (home / "identity" / "key.pem").write_text("junk")
    with pytest.raises(IdentityError, match="not a private key"):
        identity.key_of(home)
