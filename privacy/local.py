"""DP-SGD on an adapter's parameters; the only file that knows Opacus.

The algorithm is that of Abadi et al. 2016 (number 1), with Poisson sampling. One
:class:`PrivateSgd` is one training: it hangs Opacus' hooks on the model, makes private steps,
and takes the hooks off again, so the model is exported exactly as PEFT made it::

    with PrivateSgd(model, optimizer, max_grad_norm=1.0, noise_multiplier=0.8,
                    expected_batch=64.0, noise=Stream(key)) as private:
        for batch in poisson_batches:               # an empty one is a step too
            private.step(loss_of(part) for part in parts(batch))

Each part's loss is a vector with one value per example, and each value may depend on that example
alone. A large batch comes in parts of any size: gradients are clipped and summed part by part, and
noise is added once. The divisor is the expected size of a batch, not the actual one, which is
private. Opacus clips; the gradients per example are formed by Opacus' hooks or, where only linear
layers train, by a cheaper way of ours (``privacy.per_example`` chooses, and says why). The noise is
ours, from a keystream: Opacus' own is not cryptographic.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privacy.movement import Movement
from privacy.per_example import LINEAR, LinearGradients, MechanismError, choose, linear_gradients
from privacy.planted import Planted
from privacy.randomness import Stream

__all__ = ["MechanismError", "PrivateSgd", "check_model", "poisson_batch"]


def poisson_batch(examples: int, sample_rate: float, sampling: Stream) -> npt.NDArray[np.int64]:
    """The examples of one step: each one is drawn with this probability, on its own.

    Returns:
        indices in ascending order; it may be empty, and that too is a step.
    """
    return np.flatnonzero(sampling.uniform(examples) < sample_rate)


class PrivateSgd:
    """Private steps on the trainable parameters of one model.

    Args:
        model: the module that computes the losses, its trainable parameters those of the adapter.
        optimizer: over exactly these parameters.
        max_grad_norm: Euclidean norm to which each example's gradient is clipped.
        noise_multiplier: standard deviation of the noise, over ``max_grad_norm``; 0 for none.
        expected_batch: sampling rate times the number of examples: the divisor of the sum.
        noise: where the noise comes from.
        masks: by parameter name, 1 where an entry trains and 0 where it does not, of a shape that
            broadcasts to the parameter's. A masked entry counts in no norm and gets no noise:
            clipping would else spend the bound on what never leaves. Masks must not depend on
            the data.
        planted: for an audit, further examples; they enter after the real ones and are clipped,
            summed and noised exactly as those are.
        mode: ``linear`` or ``hooks``, see ``privacy.per_example``; None for the one that is best.

    Attributes:
        mode: the one that is used, why, and how many examples may come in one part.

    Raises:
        MechanismError: if the model has a part for which no gradient per example exists, the
            optimiser holds other parameters than those that train, or a mask fits none of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch: float,
        noise: Stream,
        masks: Mapping[str, Tensor] | None = None,
        planted: Planted | None = None,
        mode: str | None = None,
    ) -> None:
        check_model(model)
        self.mode = choose(model, mode)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in self._parameters.values()}:
            raise MechanismError(
                "the optimiser must hold exactly the model's trainable parameters; build it after "
                "the adapter is attached (an optimiser built before holds tensors that never "
                "train, see opacus issue 820)"
            )
        self._masks = dict(masks or {})
        unfit = [n for n, m in self._masks.items() if not self._fits(n, m)]
        if unfit:
            raise MechanismError(
                f"the mask of {unfit[0]} fits no trainable parameter; make the masks after the "
                "adapter is attached, for parameters that train"
            )
        self._model = model
        self._was_training = model.training
        self._optimizer = optimizer
        self._std = noise_multiplier * max_grad_norm
        self._expected = expected_batch
        self._noise = noise
        self._planted = planted
        self._clipper = DPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._movement = Movement(
            self._parameters, self._masks, noisy=self._std > 0, clip=max_grad_norm
        )

    def __enter__(self) -> Self:
        # Opacus computes nothing in evaluation mode; the models that come here have no dropout.
        self._model.train()
        # The frozen layers below the adapter need no gradient, which torch reports at every step.
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self._undo = ExitStack()
        self._linear: LinearGradients | None = None
        if self.mode.name == LINEAR:
            self._linear = self._undo.enter_context(linear_gradients(self._model))
        else:
            for module in self._model.modules():
                if _sampler(module) is not None:
                    GradSampleHooks.GRAD_SAMPLERS[type(module)] = _sampler(module)
            hooks = GradSampleHooks(self._model, loss_reduction="sum", strict=True)
            self._undo.callback(hooks.cleanup)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()
        self._quiet.__exit__(kind, error, trace)
        for parameter in self._parameters.values():
            for name in ("summed_grad", "grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
            parameter.grad = None
        self._model.train(self._was_training)

    def step(self, losses: Iterable[Tensor]) -> int:
        """One step of the mechanism.

        Args:
            losses: for each part of the batch a vector (n,), the loss of each of its examples;
                no parts at all for an empty batch, which still adds noise and still counts.

        Returns:
            how many examples were in the batch; private, like everything about the batch.

        Raises:
            MechanismError: after the first steps, if a parameter did not move, or by noise alone.
        """
        self._movement.begin()
        count = 0
        for loss in losses:
            loss.sum().backward()
            if self._linear is not None:
                self._linear.collect(len(loss))
            self._accumulate()
            count += int(loss.shape[0])
        self._movement.see(count)
        if self._planted is None:
            self._release()
        else:
            count += self._release_with(self._planted)
        self._optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.summed_grad = None
        self._movement.check(count)
        return count

    def _fits(self, name: str, mask: Tensor) -> bool:
        parameter = self._parameters.get(name)
        if parameter is None:
            return False
        try:
            return bool(torch.broadcast_shapes(mask.shape, parameter.shape) == parameter.shape)
        except RuntimeError:
            return False

    def _accumulate(self) -> None:
        """Clip the gradients that are there, each by itself, and add them to the sum."""
        self._mask_samples()
        self._drop_endless()
        self._clipper.clip_and_accumulate()
        for parameter in self._parameters.values():
            parameter.grad_sample = parameter.grad = None  # the clipped sum stays

    def _release_with(self, planted: Planted) -> int:
        """Release with an audit's examples in the batch; returns how many they were."""
        params, count = self._parameters, 0
        sums = {name: p.summed_grad for name, p in params.items()}
        real = {n: torch.zeros_like(params[n]) if t is None else t.clone() for n, t in sums.items()}
        trains = {n: torch.ones_like(p) * self._masks.get(n, 1.0) for n, p in params.items()}
        for block in planted.gradients(trains):
            for name, parameter in params.items():
                parameter.grad_sample = block[name]
            count += len(block[name])
            self._accumulate()
        self._release()
        planted.see({name: p.grad * self._expected for name, p in params.items()}, real)
        return count

    def _drop_endless(self) -> None:
        """An example whose gradient has no length counts as nothing: it moves no sum.

        NaN and infinity survive every clip, and one example of that kind would be told from its
        absence by anybody. Whether one is dropped depends on itself alone.
        """
        found = [self._clipper._get_flat_grad_sample(p) for p in self._parameters.values()]
        sums = torch.stack([g.reshape(len(g), -1).sum(dim=1) for g in found], dim=1).sum(dim=1)
        endless = ~torch.isfinite(sums)
        if endless.any():
            for parameter, sample in zip(self._parameters.values(), found, strict=True):
                sample = sample.clone()
                sample[endless] = 0.0
                parameter.grad_sample = sample

    def _mask_samples(self) -> None:
        """Before clipping: what does not train must not take part in any example's norm."""
        for name, mask in self._masks.items():
            parameter = self._parameters[name]
            samples = getattr(parameter, "grad_sample", None)
            # A layer that ran more than once has a list; torch and Opacus keep either.
            for sample in samples if isinstance(samples, list) else [samples]:
                if sample is not None:
                    sample.mul_(mask)

    def _release(self) -> None:
        """Turn the clipped sums into ``grad``: add the noise, divide by the expected batch."""
        for name, parameter in self._parameters.items():
            total = parameter.summed_grad
            total = torch.zeros_like(parameter) if total is None else total
            if self._std > 0:
                normal = self._noise.normal(parameter.numel()).reshape(tuple(parameter.shape))
                # Scaled and added in double precision, then rounded once.
                noise = torch.from_numpy(normal * self._std)
                total = (total.double() + noise).to(parameter.dtype)
                if name in self._masks:
                    total = total * self._masks[name]
            parameter.grad = total / self._expected


def _sampler(module: nn.Module) -> Any:
    """A layer's own way to gradients per example, in the form of Opacus' grad samplers, if any."""
    return getattr(type(module), "per_example_gradients", None)


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be trained privately, naming the part and the remedy.

    Raises:
        MechanismError: nothing trainable; a layer that mixes examples (batch normalisation); or
            trainable parameters of a kind for which Opacus has no gradient per example.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    trainable = 0
    for name, module in model.named_modules():
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if isinstance(module, _BatchNorm) and (own or module.track_running_stats):
            raise MechanismError(
                f"{name} is a batch normalisation, which mixes the examples of a batch: freeze it "
                "in evaluation mode without running statistics, or use group normalisation"
            )
        # A bottleneck as peft makes it reads this weight past the forward of its layer.
        unseen = type(module) is nn.Linear and ".peanut_A." in f".{name}."
        known = type(module) in GradSampleHooks.GRAD_SAMPLERS or _sampler(module) is not None
        if own and (unseen or not known):
            raise MechanismError(
                f"{name}.{own[0]} is trainable, but there is no gradient per example for "
                f"{type(module).__name__}: adapt linear layers only (no embeddings, no DoRA), and "
                "attach the adapter with clients.model.attach"
            )
        trainable += len(own)
    if not trainable:
        raise MechanismError(
            "the model has no trainable parameter: attach the adapter in training mode "
            "(a PEFT model loaded for inference is frozen)"
        )
