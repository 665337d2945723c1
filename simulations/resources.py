"""Files that belong to the package but are not code.

Flower's app bundles carry code, TOML and Markdown only. When the package runs from such a bundle,
the rest is taken from the installed package, which every node has for its dependencies anyway.
"""

from __future__ import annotations

import sys
from pathlib import Path

from simulations.errors import SimulationError


class ResourceError(SimulationError):
    """A file of the package is missing: the installation is incomplete."""


def find(name: str) -> Path:
    """A file by its path below this package, such as ``data/sentiment.tsv``.

    Raises:
        ResourceError: if it is neither beside this module nor in an installed package.
    """
    here = Path(__file__).parent
    for folder in (here, *(Path(entry or ".") / here.name for entry in sys.path)):
        if (folder / name).is_file():
            return folder / name
    raise ResourceError(
        f"{here.name}/{name} is missing: install the package (pip install .) in this environment"
    )
