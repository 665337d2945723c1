"""Rosters: whose signatures count, and whose do not."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

import airpeft
from privacy.secure_roster import Roster, RosterError, public_bytes, seeded_identity, signer

Key = ec.EllipticCurvePrivateKey


def certificate(key: Key, name: str, issuer: Key, authority: str = "authority") -> bytes:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    began = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(authority))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(began)
        .not_valid_after(began.replace(year=2046))
    )
    return made.sign(issuer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


ROOT, ANN, BOB = (seeded_identity(seed, "x") for seed in (1, 2, 3))
PEMS = [certificate(ANN, "ann", ROOT), certificate(BOB, "bob", ROOT)]


def test_a_roster_of_certificates_knows_whose_signature_it_is() -> None:
    roster = Roster.of_certificates(PEMS, certificate(ROOT, "authority", ROOT))
    assert set(roster.members) == {"ann", "bob"}
    assert roster.verify("ann", b"m", signer(ANN)(b"m"))
    assert not roster.verify("ann", b"m", signer(BOB)(b"m"))
    assert not roster.verify("ann", b"other", signer(ANN)(b"m"))
    assert not roster.verify("eve", b"m", signer(ANN)(b"m"))
    assert not roster.verify("ann", b"m", b"")


@pytest.mark.parametrize(
    ("pems", "authority", "said"),
    [
        ([*PEMS, certificate(BOB, "ann", ROOT)], b"", "no name of its own"),
        ([certificate(ANN, "ann", BOB)], certificate(ROOT, "authority", ROOT), "not issued"),
        ([b"nothing"], b"", "certificate 1 cannot be read"),
        (PEMS, b"nothing", "the authority's certificate cannot be read"),
    ],
)
def test_certificates_that_do_not_belong_are_refused(
    pems: list[bytes], authority: bytes, said: str
) -> None:
    with pytest.raises(RosterError, match=said):
        Roster.of_certificates(pems, authority)


def test_a_pinned_roster_cannot_be_swapped(tmp_path: Path) -> None:
    path, roster = tmp_path / "roster.json", Roster.of_certificates(PEMS)
    path.write_bytes(roster.to_bytes())
    assert Roster.read(path, roster.digest) == roster
    path.write_bytes(Roster({"ann": public_bytes(BOB)}).to_bytes())
    with pytest.raises(RosterError, match="pinned was"):
        Roster.read(path, roster.digest)
    with pytest.raises(RosterError, match="put the cohort's roster there"):
        Roster.read(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"schema": 2, "members": {}}', b'{"schema": 1, "members": {"a": "!"}}',
     b'{"schema": 1, "members": {"a": "AAAA"}}', b'{"schema": 1, "members": 3}'],
)  # fmt: skip
def test_what_is_no_roster_is_refused(data: bytes) -> None:
    with pytest.raises(RosterError):
        Roster.from_bytes(data)


def test_the_operator_makes_one_and_is_told_what_to_pin(tmp_path: Path) -> None:
    files = []
    for number, pem in enumerate(PEMS):
        files.append(tmp_path / f"{number}.pem")
        files[-1].write_bytes(pem)
    out = tmp_path / "cohort.json"
    command = ["fleet", "roster", str(out), *map(str, files), "--format", "json"]
    result = CliRunner().invoke(airpeft.app, command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["data"]
    assert Roster.read(out, said["digest"]).members.keys() == {"ann", "bob"}
    assert said["members"] == ["ann", "bob"]
    again = CliRunner().invoke(airpeft.app, command)
    assert again.exit_code == 2
    assert "there already" in again.output
