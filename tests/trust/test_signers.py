"""Keys that are not files of ours: a real child process signs, a token needs its library."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from securesystemslib.signer import SSlibKey

from federation import release
from federation.keys import (
    KeyFileError,
    KeyFolder,
    adopt,
    is_encrypted,
    key_holder,
    load_signer,
    read_public,
)
from federation.signers import (
    MODULE_VARIABLE,
    CheckedSigner,
    CommandSigner,
    SignerError,
    import_token,
    is_uri,
    open_signer,
)
from tests.trust.ceremony import Ceremony
from tests.trust.fleet_of_one import START, Device, Publisher
from tests.trust.test_release import adapter, folder, make

__all__ = ["adapter", "folder"]  # fixtures

PROGRAM = """
import sys
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
key = load_pem_private_key(open(sys.argv[1], "rb").read(), None)
how = [ec.ECDSA(hashes.SHA256())] if isinstance(key, ec.EllipticCurvePrivateKey) else []
sys.stdout.buffer.write(key.sign(sys.stdin.buffer.read(), *how))
"""


def no_secret(what: str) -> str:
    raise AssertionError(f"nobody has a {what}")


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    """A folder that only the signing program reads."""
    where = tmp_path / "vault"
    where.mkdir()
    for name, key in (
        ("ed25519", ed25519.Ed25519PrivateKey.generate()),
        ("ecdsa", ec.generate_private_key(ec.SECP256R1())),
    ):
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (where / f"{name}.pem").write_bytes(pem)
        (where / f"{name}.pub.pem").write_bytes(public)
    (where / "sign.py").write_text(PROGRAM)
    return where


def uri_of(vault: Path, kind: str = "ed25519") -> str:
    words = [sys.executable, str(vault / "sign.py"), str(vault / f"{kind}.pem")]
    return f"command:{shlex.join(words)}"


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_a_program_signs(vault: Path, kind: str) -> None:
    key = read_public(vault / f"{kind}.pub.pem")
    signature = open_signer(uri_of(vault, kind), key, no_secret).sign(b"data")
    key.verify_signature(signature, b"data")


def test_a_release_whose_second_signature_comes_from_a_vault(
    publisher: Publisher, device: Device, folder: Path, vault: Path, tmp_path: Path
) -> None:
    """From ``keys import`` through a rotation to a device."""
    noted = adopt(
        tmp_path / "dora",
        "adapters-4",
        read_public(vault / "ecdsa.pub.pem"),
        uri_of(vault, "ecdsa"),
        holder="Dora",
    )
    assert noted.private("adapters-4").suffix == ".uri"
    assert noted.private("adapters-4").stat().st_mode & 0o777 == 0o600
    assert not is_encrypted(noted.private("adapters-4"))
    assert key_holder(noted.public("adapters-4")) == "Dora"
    people = Ceremony(publisher, tmp_path / "people")
    people.known["adapters-4"] = noted.signer("adapters-4")
    change = people.swap("adapters", "adapters-1", "spare")
    change = type(change)(drop=("adapters-1",), add={"adapters": (noted.public("adapters-4"),)})
    people.carry_out(change, ["root-1", "root-3", "adapters-2", "adapters-4"])
    request = make(publisher, folder, tmp_path / "r1")
    release.sign(request.folder, load_signer(noted.private("adapters-4")))
    release.sign(request.folder, publisher.adapter_keys[2], roots=[publisher.repository.root()])
    publisher.order(release.publish(request.folder, publisher.repository, now=START))
    assert device.installs().name == "stable-1"


def test_the_program_is_told_which_key_and_runs_in_no_shell(vault: Path, tmp_path: Path) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    program = tmp_path / "tell.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).write_text(os.environ['AIRPEFT_KEYID'] + ' ' + sys.argv[2])\n"
    )
    told = tmp_path / "told"
    uri = f"command:{shlex.join([sys.executable, str(program), str(told), '$(touch x); `id`'])}"
    with pytest.raises(SignerError, match="0 bytes"):
        open_signer(uri, key, no_secret).sign(b"data")
    assert told.read_text() == f"{key.keyid} $(touch x); `id`"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(3)", "status 3"),
        ("print('not a signature')", "not with"),
        ("print('x' * 100_000)", "100001 bytes"),
        ("", "0 bytes"),
    ],
)
def test_programs_that_do_not_sign(vault: Path, code: str, message: str) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    uri = f"command:{shlex.join([sys.executable, '-c', code])}"
    with pytest.raises(SignerError, match=message):
        open_signer(uri, key, no_secret).sign(b"data")


def test_a_program_that_signs_with_another_key(vault: Path) -> None:
    other = SSlibKey.from_crypto(ed25519.Ed25519PrivateKey.generate().public_key())
    with pytest.raises(SignerError, match="public half"):
        open_signer(uri_of(vault), other, no_secret).sign(b"data")


def test_a_program_that_hangs(vault: Path) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    uri = f"command:{shlex.join([sys.executable, '-c', 'import sys; sys.stdin.read(); input()'])}"
    hanging = f"command:{shlex.join(['tail', '-f', '/dev/null'])}"
    with pytest.raises(SignerError, match=r"0\.2 seconds"):
        CheckedSigner(CommandSigner(hanging, key, deadline=0.2), "tail").sign(b"data")
    with pytest.raises(SignerError, match="status 1"):
        open_signer(uri, key, no_secret).sign(b"data")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("command:", "names no program"),
        ("command:'unclosed", "not a command"),
        ("awskms:x", "not one of command, hsm, pkcs11"),
        ("pkcs11:token=a;serial=3", "serial is not understood"),
    ],
)
def test_uris_that_say_nothing(vault: Path, uri: str, message: str) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    with pytest.raises(SignerError, match=message):
        open_signer(uri, key, no_secret)


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:token=a;id=%02?pin-value=135790",
        "pkcs11:token=a;PIN-Value=135790",
        "pkcs11:id=%02?module-path=/x.so&pin-source=file:135790",
        "hsm:2?label=a&pin-value=135790",
    ],
)
def test_a_pin_in_a_uri_is_refused_and_not_repeated(vault: Path, uri: str) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    for act in (lambda: open_signer(uri, key, no_secret), lambda: import_token(uri, no_secret)):
        with pytest.raises(SignerError, match="does not go into the URI") as refused:
            act()
        assert "135790" not in str(refused.value)


def test_a_program_that_is_not_there(vault: Path) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    with pytest.raises(SignerError, match="cannot run /no/such/program"):
        open_signer("command:/no/such/program", key, no_secret).sign(b"data")


@pytest.mark.parametrize("uri", ["pkcs11:token=YubiKey%20PIV;id=%02", "hsm:2?label=x", "hsm:"])
def test_a_token_without_its_library_names_the_extra(
    vault: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where python-pkcs11 is installed, it is the token that is missing."""
    monkeypatch.delenv(MODULE_VARIABLE, raising=False)
    key = read_public(vault / "ecdsa.pub.pem")
    with pytest.raises(SignerError, match=r"airpeft\[pkcs11\]|PYKCS11LIB"):
        open_signer(uri, key, lambda _: "1234").sign(b"data")
    with pytest.raises(SignerError, match=r"airpeft\[pkcs11\]|PYKCS11LIB"):
        import_token(uri, lambda _: "1234")


def test_a_module_path_in_the_uri_is_used(vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv(MODULE_VARIABLE, "")
    with pytest.raises(SignerError):
        open_signer(
            "pkcs11:id=%02?module-path=/lib/p11.so", read_public(vault / "ecdsa.pub.pem"), str
        ).sign(b"")
    assert os.environ[MODULE_VARIABLE] == "/lib/p11.so"


def test_names_of_files_are_no_uris() -> None:
    assert not is_uri("keys/root-1.pem")
    assert not is_uri("C:/keys/root-1.pem")
    assert is_uri("pkcs11:token=x")


def test_keys_by_uri_are_checked_as_files_are(vault: Path, tmp_path: Path) -> None:
    key = read_public(vault / "ed25519.pub.pem")
    adopt(tmp_path / "k", "adapters-4", key, uri_of(vault))
    with pytest.raises(KeyFileError, match="never overwritten"):
        adopt(tmp_path / "k", "adapters-4", key, uri_of(vault))
    with pytest.raises(KeyFileError, match="key name"):
        adopt(tmp_path / "k", "../x", key, uri_of(vault))
    assert KeyFolder(tmp_path / "k").find(key.keyid) == "adapters-4"
    (tmp_path / "rsa.pem").write_text("-----BEGIN PUBLIC KEY-----\nnonsense\n")
    with pytest.raises(KeyFileError, match="not a public key"):
        read_public(tmp_path / "rsa.pem")
    big = rsa.generate_private_key(65_537, 2_048).public_key()
    (tmp_path / "big.pub").write_bytes(
        big.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with pytest.raises(KeyFileError, match="of another kind"):
        read_public(tmp_path / "big.pub")
    (tmp_path / "k" / "adapters-4.uri").write_text("hsm:2")
    with pytest.raises((KeyFileError, SignerError), match=r"pin|pkcs11|scheme"):
        load_signer(tmp_path / "k" / "adapters-4.uri").sign(b"x")
