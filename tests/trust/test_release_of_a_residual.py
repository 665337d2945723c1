"""A release is one adapter: what a recipe keeps beside it is stacked in, or the release refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aggregation import beside, payload, peft_layout
from aggregation.beside import residual_adapters
from aggregation.low_rank import LowRank
from aggregation.spec import AdapterSpec, ModuleSpec, TensorSpec
from aggregation.state import GlobalState
from federation import release
from federation.release import ReleaseError, ReleaseOptions
from tests.aggregation.adapters import products, random_adapter, relative
from tests.trust.fleet_of_one import BASE, START, Publisher

SPEC = AdapterSpec(
    BASE, (ModuleSpec("encoder.query", 300, 300, 4, 8.0),), (TensorSpec("head.weight", (2, 12)),)
)


def folder(path: Path, rank: int) -> Path:
    adapter = random_adapter(SPEC, 1)
    rng = np.random.default_rng(2)
    rest = LowRank(rng.normal(size=(300, rank)), rng.normal(size=(rank, 300)))
    extra = residual_adapters(GlobalState(adapter, {"encoder.query": rest}))
    files = beside.files(extra, "tiny")
    peft_layout.write(path, adapter, base_name="tiny", extra=files)
    return path


def make(publisher: Publisher, made: Path, out: Path) -> release.ReleaseRequest:
    options = ReleaseOptions(channel="stable", dtype="f32")
    adapters = publisher.repository.adapters()
    return release.make_request(made, out, adapters=adapters, options=options, now=START)


def test_the_residual_is_stacked_into_the_release(publisher: Publisher, tmp_path: Path) -> None:
    made = folder(tmp_path / "adapter", rank=30)
    request = make(publisher, made, tmp_path / "r1")
    said = request.record.statement
    got = payload.decode(
        (tmp_path / "r1" / "payload.airpeft").read_bytes(),
        spec_digest=said.spec_digest,
        adapter_digest=said.adapter_digest,
        limits=payload.PayloadLimits(max_plain=said.plain_length),
    )
    assert got.spec.modules[0].rank == 34
    whole = products(peft_layout.read(made))["encoder.query"]
    whole = whole + products(peft_layout.read(made / "residual"))["encoder.query"]
    assert relative(products(got)["encoder.query"], whole) < 1e-6
    assert "head.weight" in " ".join(got.tensors)


def test_a_residual_too_wide_for_one_adapter_is_refused(
    publisher: Publisher, tmp_path: Path
) -> None:
    made = folder(tmp_path / "adapter", rank=270)
    assert (made / "residual-2").is_dir()
    with pytest.raises(ReleaseError, match=r"residual: module encoder\.query.*svd-warm-start"):
        make(publisher, made, tmp_path / "r1")
    assert not (tmp_path / "r1").exists()


def test_what_personal_models_share_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    made = folder(tmp_path / "adapter", rank=2)
    (made / "version.json").write_text(json.dumps({"personal": "it is a part of many models"}))
    with pytest.raises(ReleaseError, match=r"cannot be released: it is a part of many models"):
        make(publisher, made, tmp_path / "r1")
