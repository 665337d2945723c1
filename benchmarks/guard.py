"""What the guard costs a device, beside the steps around it, on an adapter of 5 MB.

Run: ``python benchmarks/guard.py``. The adapter has the shape of SmolLM2-135M with all linear
layers adapted at rank 8: 420 tensors, 2.44 million values, 4.9 MB as bf16.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np

from aggregation import guard, payload, tensor_file
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, ModuleSpec

BASE = "sha256:" + "0" * 64
LAYERS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}


def adapter() -> Adapter:
    modules = tuple(
        ModuleSpec(f"model.layers.{layer}.{name}", d_in, d_out, 8, 16.0)
        for layer in range(30)
        for name, (d_in, d_out) in LAYERS.items()
    )
    spec = AdapterSpec(BASE, modules, task="causal-lm")
    rng = np.random.default_rng(0)
    return Adapter(
        spec,
        {k: rng.normal(0, 0.02, s).astype(np.float32) for k, s in spec.shapes().items()},
    )


def best(action: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    subject = adapter()
    spec = subject.spec
    packed = payload.encode(subject)
    file = tensor_file.save(dict(subject.tensors), "pt")
    shapes = {m.name: (m.d_out, m.d_in) for m in spec.modules}

    def decode() -> Adapter:
        return payload.decode(
            packed.data, spec_digest=spec.digest, adapter_digest=packed.adapter_digest
        )

    rows = {
        "sha256 of the payload (the least that any device does)": best(
            lambda: hashlib.sha256(packed.data).digest()
        ),
        "guard.check (finite, sizes, base, modules, strength)": best(
            lambda: guard.check(subject, expected_base=BASE, shapes=shapes)
        ),
        "guard.check_safetensors (from 9.8 MB of unread float32)": best(
            lambda: guard.check_safetensors(file, spec)
        ),
        "payload.decode (decompress, unshuffle, both digests)": best(decode),
    }
    print(
        f"{len(spec.shapes())} tensors, {packed.plain_length / 1e6:.1f} MB as bf16, "
        f"payload {packed.length / 1e6:.1f} MB"
    )
    baseline = next(iter(rows.values()))
    for name, milliseconds in rows.items():
        print(f"  {name:<58} {milliseconds:7.1f} ms  {milliseconds / baseline:6.1f} x")


if __name__ == "__main__":
    main()
