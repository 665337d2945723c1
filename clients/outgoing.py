"""From a trained adapter to what leaves the device: choose, turn, bound, sketch, encode.

The order matters. Rank indices are chosen and factors turned while they are exact; noise comes
after everything that looks at the data, and what follows it (a sketch, a codec) only works on what
the noise has already protected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aggregation import aligning, sketches
from aggregation.adapter import Adapter
from aggregation.codecs import read_codec
from aggregation.parcel import send
from aggregation.rank_selection import Mask, importance, keep_only, random_ranks, select
from aggregation.train import Assignment
from aggregation.update import Update
from clients.memory import OWN, START, TRAINED, ClientMemory, Memories, MissingTensors
from clients.training import ClientJob
from privacy.randomness import Stream

FEEDBACK = "feedback"


@dataclass(frozen=True)
class Outgoing:
    """What a round leaves behind.

    Attributes:
        update: for the server.
        memories: for the client's next round.
    """

    update: Update
    memories: Memories


def chosen_before(job: ClientJob) -> dict[str, Mask] | None:
    """The rank indices that train, by module, if the assignment draws them; None for all."""
    if job.assignment.select != "random":
        return None
    return random_ranks(
        job.adapter.spec, job.assignment.share, job.assignment.seed, job.client, job.round
    )


def own_start(job: ClientJob, past: Memories) -> Adapter:
    """Where training starts: what was handed out, with what the client has kept put back."""
    if job.assignment.keeps != "B":
        return job.adapter
    return with_own(job.adapter, past.adapters.get(OWN))


def with_own(adapter: Adapter, own: Adapter | None) -> Adapter:
    """An adapter with the B and the tensors outside the modules of another one.

    Args:
        adapter: what was handed out.
        own: what the client has kept; None, or one of other ranks, leaves the adapter as it is.
    """
    if own is None or own.spec != adapter.spec:
        return adapter
    shared = {module.keys[0] for module in adapter.spec.modules}
    return Adapter(
        adapter.spec,
        {key: adapter.tensors[key] if key in shared else own.tensors[key] for key, _ in own},
    )


def noised(adapter: Adapter, assignment: Assignment, noise: Stream) -> Adapter:
    """Every tensor scaled down to a Frobenius norm of ``clip``, plus Gaussian noise.

    DP-FedLoRA (2509.09097) does this to the factors; we do it to the head as well, without which
    nothing would be protected. In double precision, rounded once.
    """
    if not assignment.clip:
        return adapter
    deviation = assignment.noise_multiplier * assignment.clip
    tensors: dict[str, npt.NDArray[np.float64]] = {}
    for key, value in adapter:
        exact = value.astype(np.float64)
        exact *= min(1.0, assignment.clip / max(float(np.linalg.norm(exact)), 1e-300))
        tensors[key] = exact + deviation * noise.normal(exact.size).reshape(exact.shape)
    return Adapter(adapter.spec, tensors)


def outgoing(
    job: ClientJob,
    trained: Adapter,
    *,
    chosen: Mapping[str, Mask] | None,
    past: Memories,
    noise: Stream,
    weight: float,
    event: Mapping[str, int | float | str],
    metrics: Mapping[str, float],
) -> Outgoing:
    """Make the update, and what the client has to remember of it.

    Args:
        job: what was asked.
        trained: the adapter after training.
        chosen: the rank indices that trained, if they were drawn before.
        past: what the client remembers of the round before.
        noise: for :func:`noised`.
        weight: of the update.
        event: what the training has spent.
        metrics: for the server.

    Raises:
        CodecError: if the codec cannot carry the values.
    """
    start, assignment = job.adapter, job.assignment
    adapters: dict[str, Adapter] = {START: start}
    if assignment.keeps == "B":
        adapters[OWN] = trained
    ready = trained
    if assignment.select == "importance":
        chosen = select(importance(trained, start), assignment.share)
    if chosen is not None:
        ready = keep_only(ready, start, chosen)
    if assignment.align:
        ready = aligning.align(ready, start, assignment.align_to, assignment.align)
    ready = noised(ready, assignment, noise)
    found: Mapping[str, npt.NDArray[np.float32]] = {}
    if assignment.sketch:
        adapters[TRAINED] = ready
        found = sketches.first_pass(ready, start, assignment.sketch, assignment.seed, job.round)
    update = Update(
        job.client, job.round, start.digest, ready, weight, event, metrics, sketches=found
    )
    codec = read_codec(job.codec)
    sent, feedback = send(update, start, assignment, codec, past.vectors.get(FEEDBACK))
    vectors = {} if feedback is None else {FEEDBACK: feedback}
    return Outgoing(sent, Memories(adapters, vectors))


def second_sketch(
    memory: ClientMemory, number: int, basis: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    """The second half of a round in two passes: project what was trained in the first.

    Args:
        memory: where the first half has left it.
        number: of the round.
        basis: by module, float32 of shape (d_out, width), with orthonormal columns.

    Returns:
        by module, float32 of shape (d_in, width).

    Raises:
        MissingTensors: if the first half of this round is not there.
        AggregationError: if the basis is of other modules or shapes.
    """
    found = memory.of(number).adapters
    if TRAINED not in found or START not in found:
        raise MissingTensors(f"{memory.folder}: nothing was kept of the training of round {number}")
    return sketches.second_pass(found[TRAINED], found[START], basis)
