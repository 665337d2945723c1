"""The private pieces with which the server sees sums only, and which recipes they go with.

What a client gives to a sum is in :mod:`aggregation.secret`; the protocol that hides it is
``privacy.secure_sum``, which this floor does not know.

    >>> str(SecureSum(clip=0.5, bits=24))
    'secure-sum(clip=0.5, bits=24)'
    >>> from aggregation.recipes import recipe
    >>> ring_of(recipe("fedit", {"private": "secure-sum"}), clients=20).max_weight
    4096.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aggregation.client_dp import CentralPiece, ClientDp
from aggregation.clipped_sum import Noise
from aggregation.errors import RecipeError
from aggregation.index_mean import IndexMean
from aggregation.parcel_keys import sent_keys
from aggregation.piece import Piece
from aggregation.reducing import FactorMean
from aggregation.ring import FixedPoint
from aggregation.secret_ring import Ring
from aggregation.shared_noise import SharedSum
from aggregation.sketching import Sketch
from aggregation.sparse_codecs import Segments
from aggregation.state import GlobalState
from aggregation.train import Assignment

if TYPE_CHECKING:
    from aggregation.recipe import Recipe

_EDGE = 1.0 + 2.0**-20  # a vector of norm C may have all of it in one value


@dataclass(frozen=True)
class SecureSum(Piece):
    """Private: the server learns the sum of the updates, and no update (Bell et al. 2020, SecAgg+).

    Clients send whole numbers modulo 2^bits under masks that cancel in the sum. It protects what a
    client sends from the server, and adds no noise: what the sum itself tells of a client, it still
    tells. The range of a value is public and has to be chosen: what is beyond it is refused on the
    client, so that nothing ever overflows.

    Attributes:
        clip: no value may change by more than this in a round, nor, for a sketched mean, any row of
            a module's product by a larger norm; the step of rounding is
            ``clip max_weight clients / 2^(bits-1)``, in weight times value.
        max_weight: the largest weight (number of examples) of a client; one with more cannot take
            part. Not used with equal weights.
        bits: 32, 24 or 16 of each number; 4, 3 or 2 bytes.
        dropouts: share of the members that may drop out of a sum, below a third.
        corrupt: share of the members that may be in league with the server, below a third.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "secure-sum"
    secure = True
    central = False
    warning = ""
    clip: float = 1.0
    max_weight: float = 4096.0
    bits: int = 32
    dropouts: float = 0.3
    corrupt: float = 0.1

    def __post_init__(self) -> None:
        FixedPoint(self.clip, 3, self.max_weight, self.bits)
        _check_shares(self.kind, self.dropouts, self.corrupt)


@dataclass(frozen=True)
class _Masked(CentralPiece):
    """What pieces of client-level privacy under a secure sum have in common."""

    secure = True
    bits: int = 32
    dropouts: float = 0.3
    corrupt: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        FixedPoint(self.clip, 3, 1.0, self.bits)
        _check_shares(self.kind, self.dropouts, self.corrupt)


@dataclass(frozen=True)
class SecureClientDp(_Masked):
    """Private: client-dp whose server sees the sum only: masks first, noise after unmasking.

    Each client clips what it sends by itself, since nobody else sees it, and rounds it towards
    zero, so that it is no longer afterwards; all weigh the same. The server takes the masks off the
    sum and noises it as client-dp does. So the noise protects against whoever gets the adapter, and
    the masks protect against the server, which sees the sum before the noise. A client that does
    not clip is not found out: against those client-dp without a secure sum is better.

    Attributes:
        clip: C, the Euclidean norm to which each client scales its vector down.
        noise_multiplier: standard deviation of the noise on the sum, over ``clip``.
        cohort: expected number of clients in a round, by which the sum is divided whoever came.
        bits: 32, 24 or 16 of each number.
        dropouts: share of the members that may drop out of a sum, below a third.
        corrupt: share of the members that may be in league with the server, below a third.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "secure-client-dp"


@dataclass(frozen=True)
class SecureClientDdp(_Masked):
    """Private: client-dp whose noise the clients add, in shares, so that no sum is ever clean.

    The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke 2021, 2102.06387), without
    its rotation: 32 bits have room for unrotated vectors. Each client clips what it sends, rounds
    it towards zero to whole numbers, and adds a discrete Gaussian of its own to each of them before
    it masks them. The server sees the sum of vectors and shares, and adds nothing.

    What is counted is the noise of as few clients as there may be: those that are left if
    ``dropouts`` of the cohort drop out, without the ``corrupt`` that tell the server theirs. With
    fewer in it, a sum is given up. If more come, there is more noise than was counted on: by a
    factor of up to ``sqrt(1 / (1 - dropouts - corrupt))``.

    Attributes:
        clip: C, the Euclidean norm to which each client scales its vector down.
        noise_multiplier: standard deviation over ``clip`` of the shares that are counted on.
        cohort: number of clients in a round, by which the sum is divided whoever came.
        bits: 32, 24 or 16 of each number.
        dropouts: share of the cohort that may drop out of a round, below a third.
        corrupt: share of the cohort that may be in league with the server, below a third.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "secure-client-ddp"

    def open(self, state: GlobalState, assignment: Assignment, noise: Noise | None) -> SharedSum:
        """A sum for one round, which comes with its noise; arguments as for the base class."""
        spec = state.adapter.spec
        return SharedSum(
            spec, sent_keys(spec, assignment), self.cohort, state.round + 1, self.counted(noise)
        )


def counted_on(clients: int, dropouts: float, corrupt: float) -> tuple[int, int]:
    """How many of a cohort a noised sum needs, and whose noise is counted on.

    Args:
        clients: how many are asked.
        dropouts: share of them that may drop out, from the training to the last step.
        corrupt: share of them that may be in league with the server.

    Returns:
        (least, honest): the fewest in a sum, and the fewest of those that keep their noise to
        themselves; may be 0 or less for the smallest cohorts.
    """
    least = clients - math.ceil(dropouts * clients - 1e-9)
    return least, least - math.ceil(corrupt * clients - 1e-9)


def with_secure_sum(private: CentralPiece, secure: Piece) -> CentralPiece:
    """Client-level privacy with the masks of a secure sum, if there is one.

    Args:
        private: what noises the sum.
        secure: the recipe's own piece; anything but a :class:`SecureSum` changes nothing.

    Raises:
        RecipeError: if the noise is of a kind that needs more of the clients than their sum.
    """
    if not isinstance(secure, SecureSum):
        if isinstance(private, SecureClientDdp):
            raise RecipeError(
                f"private={secure} lets the server see updates one by one, each with its own "
                "client's noise only; with mechanism = 'distributed' choose private = 'secure-sum'"
            )
        return private
    wire: dict[str, Any] = {name: getattr(secure, name) for name in ("bits", "dropouts", "corrupt")}
    if isinstance(private, SecureClientDdp):
        return replace(private, **wire)
    if not isinstance(private, ClientDp) or private.quantile is not None:
        raise RecipeError(
            f"private={private} needs more of each round than the sum of the clients' vectors; "
            "with a secure sum choose mechanism = 'gaussian' with a fixed clip (no quantile)"
        )
    return SecureClientDp(private.clip, private.noise_multiplier, private.cohort, **wire)


def ring_of(recipe: Recipe, clients: int) -> Ring:
    """How the numbers of a recipe's clients enter a secure sum.

    Args:
        recipe: one whose ``private`` is secure.
        clients: the most clients of a round.

    Raises:
        RecipeError: if that many clients leave no room for a number.
    """
    private, equal = recipe.private, recipe.weigh.equal
    if isinstance(private, SecureClientDp):
        return Ring(private.clip * _EDGE, clients, 1.0, private.bits, True, norm=private.clip)
    if isinstance(private, SecureClientDdp):
        least, honest = counted_on(clients, private.dropouts, private.corrupt)
        return Ring(
            private.clip * _EDGE,
            clients,
            1.0,
            private.bits,
            True,
            norm=private.clip,
            noise=private.noise_multiplier,
            least=least,
            honest=honest,
        )
    weight = 1.0 if equal else float(private.max_weight)
    return Ring(
        float(private.clip),
        clients,
        weight,
        private.bits,
        equal,
        by_index=isinstance(recipe.reduce, IndexMean),
    )


def _check_shares(kind: str, dropouts: float, corrupt: float) -> None:
    for name, value in (("dropouts", dropouts), ("corrupt", corrupt)):
        if not (math.isfinite(value) and 0 <= value < 1 / 3):
            raise RecipeError(
                f"{kind}: {name}={value:g} must lie in 0..1/3 (excluded): beyond that a sum cannot "
                "be both safe and finished"
            )


def _of_another_mean(recipe: Recipe) -> str:
    if not getattr(recipe.private, "secure", False):
        return ""
    known = isinstance(recipe.reduce, IndexMean | Sketch) or type(recipe.reduce) is FactorMean
    if not known:
        return (
            f"private={recipe.private} adds up weighted changes and weights, and reduce="
            f"{recipe.reduce} needs other sums; choose reduce=factor-mean, index-mean or sketch"
        )
    if isinstance(recipe.reduce, IndexMean) and recipe.distribute.mixed_ranks:
        return (
            f"private={recipe.private} adds up vectors of one length, and distribute="
            f"{recipe.distribute} makes those of lower ranks shorter; choose distribute=same"
        )
    return ""


def _of_a_part(recipe: Recipe) -> str:
    if not (getattr(recipe.private, "secure", False) and isinstance(recipe.codec, Segments)):
        return ""
    return (
        f"private={recipe.private} masks every coordinate, so that all of them travel, and codec="
        f"{recipe.codec} saves nothing; choose codec=float32, and bits=24 or 16 to send less"
    )


def _without_rounds(recipe: Recipe) -> str:
    if getattr(recipe.private, "secure", False) and recipe.weigh.max_staleness is not None:
        return (
            f"private={recipe.private} adds up the clients of one round, and weigh={recipe.weigh} "
            "has no rounds; choose weigh=examples or weigh=uniform"
        )
    return ""


RULES = (_of_another_mean, _of_a_part, _without_rounds)
