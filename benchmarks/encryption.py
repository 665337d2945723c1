"""What it costs to encrypt a release of 3 MB: bytes, and processor seconds beside the plain one.

Run: ``python benchmarks/encryption.py``. Each step is the median of several runs in one process, in
CPU milliseconds, beside the same step of a plain release.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from aggregation import payload, sealed
from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec, ModuleSpec
from federation.sealing import SealTo, more_wraps, sealed_payload
from protos.wraps import Wraps, unwrap

BASE = "sha256:" + "b" * 64


def adapter(width: int = 600) -> Adapter:
    """Two hundred modules of rank 8: 3 MB as bf16 when compressed."""
    modules = tuple(ModuleSpec(f"layer.{n}.query", width, width, 8, 16.0) for n in range(200))
    spec = AdapterSpec(BASE, modules, task="causal-lm")
    rng = np.random.default_rng(1)
    tensors = {k: rng.normal(0, 0.02, s).astype(np.float32) for k, s in spec.shapes().items()}
    return Adapter(spec, tensors)


def cpu_ms(work: Callable[[], object], repeat: int) -> float:
    """Median CPU milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    repeat, source = options.repeat, adapter()
    plain = payload.encode(source)
    mine, desk = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public, office = mine.public_key().public_bytes_raw(), desk.public_key().public_bytes_raw()
    to, key = SealTo((office,), {"d-1": public}), sealed.new_key()
    found, seal, wraps = sealed_payload(plain, to, key)
    wrapped = wraps.find(public)
    assert wrapped is not None
    digests = {"spec_digest": source.spec.digest, "adapter_digest": plain.adapter_digest}

    def decode_plain() -> None:
        payload.decode(plain.data, **digests)

    def decode_sealed() -> None:
        opened = unwrap(wrapped, mine, found.sha256)
        assert sealed.is_right(opened, seal.check)
        limit = sealed.plain_length(found.length)
        payload.decode(sealed.Opener(found.data, opened, limit=limit), **digests)

    fleet = [
        X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(options.devices)
    ]

    def make_plain() -> None:
        payload.encode(source)

    def make_sealed() -> None:
        sealed_payload(payload.encode(source), to, sealed.new_key())

    everybody = Wraps.to(key, found.sha256, [*fleet, office])
    print(f"{'CPU ms':42} {'plain':>9} {'encrypted':>10} {'ratio':>7}")
    for name, one, two in (
        ("maker: encode, and seal to one device", make_plain, make_sealed),
        ("device: decode, and unwrap and open first", decode_plain, decode_sealed),
    ):
        a, b = cpu_ms(one, repeat), cpu_ms(two, repeat)
        print(f"{name:42} {a:9.2f} {b:10.2f} {b / a:7.3f}")
    seal_only = cpu_ms(lambda: sealed.seal(plain.data, key), repeat)
    opener = cpu_ms(lambda: sealed.Opener(found.data, key, limit=1 << 30).read(), repeat)
    print(f"seal {seal_only:.2f} ms, open {opener:.2f} ms: ", end="")
    print(f"{plain.length / seal_only / 1e3:.0f} and {plain.length / opener / 1e3:.0f} MB/s")
    some = cpu_ms(lambda: Wraps.to(key, found.sha256, fleet[:200]), 3) / 200
    one = cpu_ms(lambda: unwrap(wrapped, mine, found.sha256), repeat)
    late = cpu_ms(lambda: more_wraps(everybody, seal, desk, [*fleet, public]), 3)
    print(f"wrap {some * 1e3:.0f} us a device, unwrap {one * 1e3:.0f} us")
    print(f"one device more beside {options.devices} that have it: {late:.1f} ms")
    print(f"payload: {plain.length} bytes plain, {found.length} encrypted ", end="")
    print(f"(+{found.length - plain.length}, {found.length / plain.length - 1:.4%})")
    size = len(everybody.to_bytes())
    print(
        "wrapped keys: 80 bytes to a device that asks the fleet; the file beside the payload ",
        end="",
    )
    print(f"for {options.devices} devices has {size} bytes, {size / options.devices:.1f} each")


if __name__ == "__main__":
    main()
