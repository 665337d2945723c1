"""From a run's folder to an answer on a device, for adapters that are not LoRA."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregation import peft_layout
from clients.base import BaseRef
from clients.model import build, tokenizer
from clients.runtime import Request
from federation import release
from federation.release import ReleaseOptions
from protos.messages import DeviceEvent
from tests.device.tiny import LABELS, TEXTS
from tests.device.typed import METHODS, random, spec_of
from tests.device.world import Gateway, Running, enrolled

pytestmark = pytest.mark.filterwarnings("ignore")


def released(gateway: Gateway, folder: Path, out: Path, dtype: str):
    """What an operator does with a folder: make the request, sign it with two keys, publish."""
    now = datetime.now(UTC)
    release.make_request(
        folder,
        out,
        adapters=gateway.repository.adapters(),
        options=ReleaseOptions(channel="stable", dtype=dtype),
        now=now,
    )
    for key in gateway.publisher.adapter_keys[:2]:
        release.sign(out, key)
    return release.publish(out, gateway.repository, now=now)


def test_every_type_is_released_installed_and_answers_as_peft_does(
    base: BaseRef, runtime, home: Path, tmp_path: Path
):
    import peft

    gateway = Gateway(tmp_path / "server")
    gateway.start()
    batch = tokenizer(base)(list(TEXTS), padding=True, return_tensors="pt")
    try:
        enrolled(gateway, home)
        with Running(home, runtime) as running:
            for number, method in enumerate(METHODS, start=1):
                folder, dtype = tmp_path / method, "int8" if method == "ia3" else "bf16"
                peft_layout.write(folder, random(spec_of(base, method)), base_name="tiny")
                record = released(gateway, folder, tmp_path / f"request-{method}", dtype)
                gateway.order(record, rollout=f"r{number}")
                gateway.heard(DeviceEvent.COMMITTED, record.name)
                running.serves(record.name)
                found = runtime.run([Request(text, runtime.pin()) for text in TEXTS])
                model = peft.PeftModel.from_pretrained(build(base, len(LABELS)), folder).eval()
                with torch.no_grad():
                    expected = model(batch["input_ids"], attention_mask=batch["attention_mask"])
                ours = np.array([list(p.logits.values()) for p in found])
                # Values were rounded to bfloat16 or int8 on the way.
                scale = float(expected.abs().max())
                assert np.abs(ours - expected.numpy()).max() < 0.03 * scale, method
        events = [r.event for r in gateway.reports()]
        assert events.count(DeviceEvent.COMMITTED) == len(METHODS)
        assert DeviceEvent.REJECTED not in events
    finally:
        gateway.close()
