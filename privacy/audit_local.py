"""Canaries for DP-SGD: examples whose gradients point where the audit wants them to.

They enter at :class:`privacy.local.PrivateSgd`, after the real examples of a step, and take the
same way: masked, clipped, summed, noised. What is read is what the optimiser gets. The auditor
knows everything but the coins, as the adversary of the definition does: also the real rows and
which of them a step drew, so their clipped sum is taken off before a canary is scored. Neither the
theorem nor the guarantee loses by that, because no coin of a canary depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privacy.audit_canaries import Canaries


class GradientCanaries:
    """Canaries in the form in which a private training takes them: a ``privacy.planted.Planted``.

    Args:
        canaries: for the event of the whole training.
    """

    def __init__(self, canaries: Canaries) -> None:
        self.canaries = canaries

    def gradients(self, trains: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Those that the next step draws, in blocks; see ``Planted``.

        Raises:
            AuditError: if fewer parameters train than there are canaries.
        """
        self.canaries.point(_flat(trains) != 0)
        for block in self.canaries.blocks(self.canaries.draw()):
            vectors = torch.from_numpy(self.canaries.vectors(block))
            sizes = [tensor.numel() for tensor in trains.values()]
            yield {
                name: part.reshape(len(block), *tensor.shape).to(tensor)
                for (name, tensor), part in zip(
                    trains.items(), vectors.split(sizes, dim=1), strict=True
                )
            }

    def see(self, released: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> None:
        """Score every canary by what the step has released; see ``Planted``."""
        self.canaries.see(_flat(released) - _flat(real))


def _flat(tensors: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
    flat: npt.NDArray[np.float64] = (
        torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
        .to(device="cpu", dtype=torch.float64)
        .numpy()
    )
    return flat
