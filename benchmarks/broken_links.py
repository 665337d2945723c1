"""Bytes fetched twice when links are cut and the server is killed in the middle of a rollout.

Run: ``python benchmarks/broken_links.py [--devices 20]``. See :mod:`simulations.link_drill`; the
goal is that every device ends on the released version with less than 5 % of the bytes refetched.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from simulations.link_drill import drill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = drill(Path(folder), devices=options.devices, clock=time.monotonic, say=print)
    print(
        f"{found.on_version} of {found.devices} on the released version, {found.seconds:.0f} s;"
        f" server killed {found.kills} times, {found.cuts} links cut in mid-download"
    )
    print(
        f"bytes refetched: at most {100 * found.refetched:.2f} % of {found.payload / 1e6:.1f} MB a"
        f" device (goal: below 5 %), handshakes and framing counted in; metadata beside it"
        f" {found.metadata / found.devices / 1000:.0f} kB a device"
    )


if __name__ == "__main__":
    main()
