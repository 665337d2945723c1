"""A second adapter that each client trains for itself and never sends.

FedDPA (2403.19211), as its authors run it: where the shared adapter adds ``dW_g x`` and the
client's own ``dW_l x``, a layer computes

    W0 x + (1 - w) dW_g x + w dW_l x.

In every round the shared adapter trains first, as if it were alone; then it is frozen and the own
one trains, with ``w`` the assignment's ``mix``. The shared training never sees the own adapter, so
what is sent depends on nothing but the shared training, and its privacy is that training's: the
own adapter needs no noise, because it stays on the device and so does everything made from it
(the accuracy that a client reports on its own rows is the exception, with any model at all).

When a text is answered, its weight is ``mix`` times its likeness to the client's own texts, the
mean cosine between its features and theirs; a text unlike all of them is answered by the shared
adapter. Where we differ: the likeness is taken to all training texts rather than to five drawn
ones (their mean unit vector is all that it takes, so it costs nothing), and between mean-pooled
hidden states of the frozen layers below the adapter rather than of the last layer with the own
adapter on; a negative likeness counts as none. The head is the shared one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aggregation.adapter import Adapter
from aggregation.init import initial_adapter
from aggregation.train import Assignment
from clients.attachments import Mix, attached, frozen, weighted
from clients.loop import LocalRound
from clients.memory import OVERLAY, Memories
from clients.training import check_finite, parts
from clients.trunk import FILL_TOKENS, Features
from privacy.randomness import derive

CENTRE = "centre"

Vector = npt.NDArray[np.float32]
Hidden = Callable[[Tensor, Tensor], Tensor]  # ids and mask (n, T) to hidden states (n, T, width)


@dataclass(frozen=True)
class Own:
    """A client's own adapter, to be mixed with the shared one.

    Attributes:
        overlay: the adapter; only its modules count.
        weights: (n), its weight for each text; the shared one has the rest.
    """

    overlay: Adapter
    weights: Tensor


def train_own(
    shared_round: LocalRound,
    shared: Adapter,
    past: Memories,
    mix: float,
    *,
    beside: Sequence[Adapter],
    hidden: Hidden,
) -> Memories:
    """Train a client's own adapter beside the shared one, which is frozen, its head included.

    Args:
        shared_round: the training of the shared adapter: same model, plan, texts and root.
        shared: the shared adapter as it was just trained.
        past: where the own adapter may be; else it starts as one that changes nothing.
        mix: weight of the own adapter.
        beside: further frozen adapters.
        hidden: the hidden states of texts whose features are not kept.

    Returns:
        what the client has to remember.

    Raises:
        PlanError: if training diverges.
    """
    key = derive(shared_round.key, "overlay")
    start = past.adapters.get(OVERLAY)
    if start is None or start.spec != shared.spec:
        start = initial_adapter(shared.spec, int.from_bytes(key[:8], "big"))
    others = {tensor.key: shared.tensors[tensor.key] for tensor in shared.spec.others}
    start = Adapter(shared.spec, {**start.tensors, **others})
    model = shared_round.peft_model
    still = [(shared, Mix(1.0 - mix)), *frozen(beside)]
    with (
        attached(model, start, Assignment(), beside=still, whole=False) as attachment,
        weighted(model, shared.spec, Mix(mix)),
    ):
        replace(shared_round, attachment=attachment, key=key).plainly()
        overlay = attachment.read()
    check_finite(overlay)
    return Memories({OVERLAY: overlay}, {CENTRE: centre(shared_round.features, hidden)})


def own(past: Memories, features: Features, hidden: Hidden, mix: float) -> Own | None:
    """The own adapter that a client has kept, with its weight for each text; None if it has none.

    Args:
        past: what the client has kept.
        features: of the texts.
        hidden: the hidden states of texts whose features are not kept.
        mix: the largest weight.
    """
    overlay = past.adapters.get(OVERLAY)
    if overlay is None:
        return None
    return Own(overlay, weights(features, hidden, past.vectors[CENTRE], mix))


def centre(features: Features, hidden: Hidden) -> Vector:
    """The mean unit vector of some texts, (width,): the cosine with it is the mean cosine."""
    mean: Vector = _units(features, hidden).double().mean(0).numpy().astype(np.float32)
    return mean


def weights(features: Features, hidden: Hidden, middle: Vector, mix: float) -> Tensor:
    """The weight of the own adapter for each text, (n,), from 0 to ``mix``."""
    likeness = _units(features, hidden) @ torch.from_numpy(np.array(middle, np.float32))
    return mix * likeness.clamp(0.0, 1.0)


def _units(features: Features, hidden: Hidden) -> Tensor:
    """Mean-pooled hidden states of every text, (n, width), of length 1."""
    tokens = features.tokens
    rows: dict[int, Any] = {}
    with torch.inference_mode():
        for part in parts(np.arange(len(tokens.lengths)), tokens.lengths, FILL_TOKENS):
            ids, mask = tokens.batch(part)
            found = features.inputs(part).get("trunk")
            found = hidden(ids, mask) if found is None else found
            kept = mask.to(found.dtype).unsqueeze(-1)
            pooled = (found * kept).sum(1) / kept.sum(1).clamp(min=1.0)
            unit = torch.nn.functional.normalize(pooled, dim=-1)
            rows |= {int(row): unit[i] for i, row in enumerate(part)}
        return torch.stack([rows[i] for i in range(len(tokens.lengths))])
