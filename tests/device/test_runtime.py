from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from aggregation import peft_layout
from aggregation.adapter import Adapter
from aggregation.spec import ModuleSpec, Orientation, TensorSpec
from clients.base import BaseRef
from clients.model import build, tokenizer
from clients.peft_runtime import PeftRuntime
from clients.runtime import LoadError, Request, RequestError
from tests.device.tiny import LABELS, TEXTS, make_adapter
from tests.waiting import until


def scores(runtime, version, texts=TEXTS):
    found = runtime.run([Request(text, version) for text in texts])
    return np.array([[p.scores[label] for label in version.labels] for p in found])


def test_logits_are_those_of_pefts_own_loader(base: BaseRef, runtime, tmp_path):
    import peft

    adapter = make_adapter(base, 1)
    peft_layout.write(tmp_path / "adapter", adapter, base_name="tiny")
    model = peft.PeftModel.from_pretrained(build(base, len(LABELS)), str(tmp_path / "adapter"))
    batch = tokenizer(base)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = torch.softmax(logits.double(), -1).numpy()
    assert np.abs(scores(runtime, runtime.load(adapter, name="v1")) - expected).max() < 1e-6


def test_base_version_answers_uniformly_and_publish_returns_the_previous(base, runtime):
    nothing = runtime.pin()
    assert np.allclose(scores(runtime, nothing), 0.5)
    one = runtime.load(make_adapter(base, 1), name="v1")
    assert runtime.pin() is nothing, "loading must not make it live"
    assert runtime.publish(one) is nothing
    assert runtime.pin() is one
    assert runtime.pin("another tenant") is nothing
    assert runtime.publish(None) is one
    assert runtime.pin() is nothing


def test_a_batch_may_mix_versions_with_other_classes_too(base, runtime):
    versions = [
        runtime.load(make_adapter(base, 1), name="v1"),
        runtime.load(make_adapter(base, 2, labels=("a", "b", "c")), name="v2"),
        runtime.pin(),
    ]
    alone = {id(v): scores(runtime, v) for v in versions}
    picks = [versions[i % 3] for i in range(len(TEXTS))]
    mixed = runtime.run([Request(t, v) for t, v in zip(TEXTS, picks, strict=True)])
    for row, (prediction, version) in enumerate(zip(mixed, picks, strict=True)):
        assert prediction.version is version
        assert tuple(prediction.scores) == version.labels
        found = np.array(list(prediction.scores.values()))
        assert np.abs(found - alone[id(version)][row]).max() < 1e-6


def test_swaps_under_load_never_mix_weights(base, runtime):
    """Every answer equals exactly one version: the one that was pinned."""
    versions = [runtime.load(make_adapter(base, seed), name=f"v{seed}") for seed in range(4)]
    expected = {id(v): scores(runtime, v) for v in versions}
    everything = np.stack(list(expected.values()))
    gaps = [np.abs(a - b).max() for i, a in enumerate(everything) for b in everything[:i]]
    assert min(gaps) > 1e-2, "the versions must be told apart"
    runtime.publish(versions[0])
    stop, wrong, answers, swaps = threading.Event(), [], [0], [0]

    def ask():
        while not stop.is_set():
            version = runtime.pin()
            found = scores(runtime, version)
            answers[0] += 1
            if np.abs(found - expected[id(version)]).max() > 1e-6:
                wrong.append(version.name)

    def swap():
        while not stop.is_set():
            runtime.publish(versions[swaps[0] % 4])
            swaps[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work) for work in (ask, ask, swap)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: answers[0] >= 60 and swaps[0] >= 2000, what="60 answers and 2,000 swaps")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_old_version_dies_with_its_last_request(base, runtime):
    version = runtime.load(make_adapter(base, 1), name="v1")
    runtime.publish(version)
    request = Request("the film was good", runtime.pin())
    runtime.publish(None)
    runtime.run([request])  # still answered by what it was admitted with
    gone = weakref.ref(version)
    del version, request
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: dataclasses.replace(s, base_digest="sha256:" + "9" * 64), "made for base"),
        (lambda s: dataclasses.replace(s, others=()), "head"),
        (lambda s: dataclasses.replace(s, labels=("x",)), "head"),
        (
            lambda s: dataclasses.replace(
                s, others=(*s.others, TensorSpec("encoder.embeddings.LayerNorm.weight", (32,)))
            ),
            "head",
        ),
        (
            lambda s: dataclasses.replace(
                s, modules=(ModuleSpec("encoder.nowhere", 32, 32, rank=2, alpha=2.0),)
            ),
            "not a linear layer",
        ),
        (
            lambda s: dataclasses.replace(
                s,
                modules=(dataclasses.replace(s.modules[0], orientation=Orientation.CONV1D),),
            ),
            "not linear",
        ),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_changes(base, runtime, change, words):
    spec = change(make_adapter(base, 1).spec)
    before = runtime.pin()
    with pytest.raises(LoadError, match=words):
        runtime.load(Adapter.zeros(spec), name="v1")
    assert runtime.pin() is before


def test_bad_requests_are_named(runtime):
    with pytest.raises(RequestError, match="no text"):
        runtime.run([Request("  ", runtime.pin())])
    with pytest.raises(RequestError, match="at most"):
        runtime.run([Request("x", runtime.pin())] * 5000)
    assert runtime.run([]) == []


def test_long_texts_are_cut_and_order_is_kept(base, runtime):
    version = runtime.load(make_adapter(base, 3), name="v3")
    texts = ["good " * n for n in (200, 1, 50, 3)]
    short = PeftRuntime(base, labels=LABELS, max_length=16)
    found = scores(short, short.load(make_adapter(base, 3), name="v3"), texts)
    assert np.abs(found[0] - found[2]).max() < 1e-6, "both are cut to the same 16 tokens"
    one = scores(short, short.load(make_adapter(base, 3), name="v3"), [texts[3]])
    assert np.abs(found[3] - one[0]).max() < 1e-6
    assert version.digest == make_adapter(base, 3).digest
