"""The quick loader gives what the engine's own would, and forgets no check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.formats import encode_canonical
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet, _load_from_metadata

from clients.trust_loader import KEPT, LEAST, Loader
from protos.canonical import canonical, canonical_exact
from protos.messages import RejectReason
from tests.trust.fleet_of_one import Device, Publisher, file_of, payload_of, statement

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=300)
@given(doc=JSON)
def test_canonical_json_is_that_of_the_reference(doc: Any) -> None:
    try:
        expected = encode_canonical(doc).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, in both
        with pytest.raises(UnicodeEncodeError):
            canonical(doc)
        return
    assert canonical(doc) == expected


@pytest.mark.parametrize(
    "text", ['"', "\\", "\n", "\x00", "\x7f", "\u2028", "é", '\\"', "a\\nb", "😀"]
)
def test_strings_in_which_encoders_differ(text: str) -> None:
    doc = {text: [text, {text: text}]}
    assert canonical(doc) == encode_canonical(doc).encode("utf-8")


def large(publisher: Publisher) -> bytes:
    """A signed list of releases above the size that is remembered."""
    for number in range(1, 16):
        publisher.release(number, notes="x" * 500)
    data = publisher.repository.adapters()
    assert len(data) > LEAST
    return data


def test_it_reads_as_the_engine_reads(publisher: Publisher) -> None:
    data, loader = large(publisher), Loader()
    targets = Metadata[Any].from_bytes(publisher.repository.offline()["targets"]).signed
    for _ in range(2):
        signed, content, signatures = loader(Targets, data, targets, "adapters")
        expected = _load_from_metadata(Targets, data, targets, "adapters")
        assert (signed, content, signatures) == expected
    assert loader(Targets, data)[0] is signed, "remembered"


def test_what_is_remembered_is_judged_by_the_keys_of_the_moment(
    publisher: Publisher, tmp_path: Path
) -> None:
    data, loader = large(publisher), Loader()
    targets = Metadata[Any].from_bytes(publisher.repository.offline()["targets"]).signed
    loader(Targets, data, targets, "adapters")
    other = Publisher(tmp_path / "other")
    strangers = Metadata[Any].from_bytes(other.repository.offline()["targets"]).signed
    with pytest.raises(UnsignedMetadataError):
        loader(Targets, data, strangers, "adapters")
    with pytest.raises(RepositoryError, match="Expected 'root'"):
        loader(type(Metadata[Any].from_bytes(publisher.repository.root()).signed), data)


def test_only_so_many_files_are_kept(publisher: Publisher) -> None:
    loader, data = Loader(), large(publisher)
    targets = Metadata[Any].from_bytes(publisher.repository.offline()["targets"]).signed
    root = Metadata[Any].from_bytes(publisher.repository.root()).signed
    loader(Targets, data)
    assert not loader._known, "what nobody has signed would fill a device's memory for good"
    for number in range(3 * KEPT):
        loader(Targets, data + b" " * number, targets, "adapters")
    assert len(loader._known) == KEPT
    small = publisher.repository.offline()["targets"]
    loader(Targets, small, root, "targets")
    assert small not in loader._known


def test_the_engine_still_has_the_loader_that_is_replaced(publisher: Publisher) -> None:
    """``_load_data`` is private: this fails if python-tuf renames it."""
    from tuf.ngclient.config import EnvelopeType

    trusted = TrustedMetadataSet(publisher.repository.root(), EnvelopeType.METADATA)
    assert trusted._load_data is _load_from_metadata


def test_a_device_with_a_memory_refuses_what_one_without_refuses(
    publisher: Publisher, device: Device
) -> None:
    large(publisher)
    publisher.order(publisher.repository.release("stable-15"))
    device.installs()
    for number in range(3):
        publisher.later(hours=1)
        publisher.refresh()
        assert device.installs().name == "stable-15", number
    bundle = publisher.bundle()
    name = file_of(bundle, "adapters")
    doc = json.loads(bundle.files[name])
    doc["signatures"] = doc["signatures"][:1]
    forged = publisher.forged(adapters=json.dumps(doc).encode())
    assert device.reason(forged) is RejectReason.METADATA_SIGNATURE
    evil = publisher.signed_adapters(statement(16), payload_of(16), signers=[publisher.online])
    assert device.reason(publisher.forged(adapters=evil)) is RejectReason.METADATA_SIGNATURE
    publisher.later(days=200)
    publisher.refresh()
    assert device.reason() is RejectReason.METADATA_EXPIRED, "remembered, and expired"


@settings(deadline=None, max_examples=100)
@given(doc=JSON)
def test_what_is_signed_is_what_the_reference_signs_and_never_a_fraction(doc: Any) -> None:
    with pytest.raises(ValueError):  # whichever of the two refuses first
        canonical_exact({"doc": doc, "n": 0.5})
    with pytest.raises(ValueError, match="must be an integer"):
        canonical_exact({"n": 0.5})
    try:
        expected = encode_canonical(doc).encode("utf-8")
    except UnicodeEncodeError:
        return
    assert canonical_exact(doc) == expected
