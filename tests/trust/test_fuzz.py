"""Whatever bytes a device is handed: it follows the honest order, or refuses with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.trust import Install, Rejected, Stay
from protos.messages import MetadataBundle
from protos.signed import (
    Evaluation,
    Lineage,
    PrivacyClaim,
    ReleaseStatement,
    RoundDocument,
    StatementError,
    check_channel,
    split_target,
    target_name,
)
from tests.trust.fleet_of_one import Device, Publisher, statement, with_files

QUIET = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Staged:
    """A fleet whose device has seen nothing yet, so that every example starts the same."""

    def __init__(self, folder: Path) -> None:
        self.publisher = Publisher(folder / "publisher")
        self.publisher.order(self.publisher.release(1))
        self.publisher.order(self.publisher.release(2), self.publisher.repository.releases()[0])
        self.bundle = self.publisher.bundle()
        self.names = sorted(self.bundle.files)
        self.fresh = Device(folder / "device", self.publisher)
        self.honest = self.fresh.installs(self.bundle)
        self.folder = folder

    def device(self) -> Device:
        (self.folder / "device" / "trust.json").unlink(missing_ok=True)
        self.fresh.restart()
        return self.fresh


@pytest.fixture(scope="module")
def staged() -> Iterator[Staged]:
    with TemporaryDirectory() as folder:
        yield Staged(Path(folder))


@QUIET
@given(data=st.data())
def test_a_flipped_bit_is_never_accepted_as_something_else(
    staged: Staged, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(staged.names))
    original = staged.bundle.files[name]
    at = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = original[:at] + bytes([original[at] ^ flip]) + original[at + 1 :]
    device = staged.device()
    try:
        verdict = device.accept(with_files(staged.bundle, {name: changed}))
    except Rejected:
        return
    # Only where the change means nothing: a root that the device has already, the bytes of one
    # of three signatures, a blank.
    assert verdict == Install(staged.honest)


@QUIET
@given(data=st.data())
def test_a_truncated_or_grown_file_is_never_accepted_as_something_else(
    staged: Staged, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(staged.names))
    original = staged.bundle.files[name]
    cut = data.draw(st.integers(0, len(original)))
    tail = data.draw(st.binary(max_size=30))
    device = staged.device()
    try:
        verdict = device.accept(with_files(staged.bundle, {name: original[:cut] + tail}))
    except Rejected:
        return
    assert verdict == Install(staged.honest)


@QUIET
@given(
    files=st.dictionaries(
        st.sampled_from(
            ["timestamp.json", "2.root.json", "1.snapshot.json", "x", "1.targets.json"]
        ),
        st.binary(max_size=300)
        | st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["signed", "signatures", "version", "_type", "keys"]), inner
                )
            ),
            max_leaves=10,
        ).map(lambda doc: json.dumps(doc).encode()),
    )
)
def test_arbitrary_bundles_are_refused(staged: Staged, files: dict[str, bytes]) -> None:
    with pytest.raises(Rejected):
        staged.device().accept(MetadataBundle(files))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FULL = statement(
    3,
    floor=2,
    runtime=("torch", "onnx"),
    example=PrivacyClaim(epsilon_micro=8_000_000, delta_e12=10_000_000, unit="example"),
    lineage=Lineage(parent="sha256:x", run="r", round=5, recipe="svd-warm-start"),
    evaluation=Evaluation(set="heldout", accuracy_micro=840_000, examples=400),
    notes="n",
    made_unix=5,
)


def test_a_statement_survives_the_wire() -> None:
    assert ReleaseStatement.from_custom(json.loads(json.dumps(FULL.to_custom()))) == FULL


def _paths(doc: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(doc, dict):
        for key, value in doc.items():
            yield from _paths(value, (*at, key))


@QUIET
@given(path=st.sampled_from([*_paths(FULL.to_custom()), ("critical",)]), value=JSON)
def test_a_statement_with_any_field_replaced_is_read_or_refused(
    path: tuple[Any, ...], value: Any
) -> None:
    doc: Any = json.loads(json.dumps({"top": FULL.to_custom()}))
    at, keys = doc, ("top", *path)
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    try:
        read = ReleaseStatement.from_custom(doc["top"])
    except StatementError:
        return
    assert ReleaseStatement.from_custom(read.to_custom()) == read


@QUIET
@given(custom=st.dictionaries(st.sampled_from(["schema", "salt", "assignments"]), JSON) | JSON)
def test_arbitrary_rounds_are_refused(custom: Any) -> None:
    with pytest.raises(StatementError):
        RoundDocument.from_custom(custom)


@given(channel=st.text(max_size=40), counter=st.integers())
def test_target_names_go_back_and_forth(channel: str, counter: int) -> None:
    try:
        name = target_name(channel, counter)
    except StatementError:
        return
    assert split_target(name) == (check_channel(channel), counter)
    assert ".." not in name
    assert name.count("/") == 2


@given(target=st.text(max_size=60) | st.from_regex(r"adapters/[^/]*/[0-9]*\.airpeft"))
def test_only_canonical_target_names_are_read(target: str) -> None:
    try:
        channel, counter = split_target(target)
    except StatementError:
        return
    assert target_name(channel, counter) == target


def test_a_device_that_stays_has_learnt_all_the_same(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "p")
    device = Device(tmp_path / "d", publisher)
    assert isinstance(device.accept(), Stay)
    assert device.trust.state.version("timestamp") == 1
