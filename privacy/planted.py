"""What an audit puts into a training besides the real examples, as the training sees it.

The training (``privacy.local``) knows no more of an audit than this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Planted(Protocol):
    """Further examples whose gradients are prescribed: the canaries of an audit."""

    def gradients(self, trains: Mapping[str, Tensor]) -> Iterable[Mapping[str, Tensor]]:
        """Those that the next step draws.

        Args:
            trains: for each parameter a tensor of its shape, 0 where an entry does not train.

        Returns:
            blocks of some n of them, by parameter of shape (n, *shape); perhaps none.
        """
        ...

    def see(self, released: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> None:
        """What the step has come to.

        Args:
            released: the sum with its noise, before it is divided by the expected batch.
            real: what of it came from the real examples, clipped.
        """
        ...
