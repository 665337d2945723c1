"""The exact mean of products from two sums of small sketches: FedASK's double sketching.

Randomised SVD (Halko, Martinsson and Tropp 2011, 0909.4061, algorithm 4.1), dealt to clients as in
FedASK (2507.09990, algorithm 1). With ``X_k = s_k (B_k A_k - B_k0 A_k0)`` a client's change and
Omega a Gaussian matrix of d_in x l that all know from a public seed,

    pass 1   each client sends Y_k = X_k Omega                the server forms Q = qr(sum w_k Y_k)
    pass 2   each client gets Q and sends Z_k = X_k^T Q       X = Q (sum w_k Z_k)^T / sum w_k

Both are sums, and neither needs to know whose term is whose: that is all a secure sum can do, and
with it the mean is still exact, as soon as l is at least the rank of the mean change: l = r if all
share a frozen A, the sum of the ranks if nothing is shared (the paper's theorem is the first case).
Below that the mean square of what is missed is at most ``1 + k / (l - k - 1)`` times that of the
best approximation of rank k, for every k up to l - 2 (Halko et al., theorem 10.5).

Where we differ from the paper: the change from the client's own start is sketched and not the
product, so a round in which nobody learns changes nothing and ranks, scales and gauges may differ;
and a few columns of Omega, the *probes*, do not enter Q but tell how much it has missed:
``||Y_p - X Omega_p||_F^2 / p`` is an unbiased estimate of ``||mean - X||_F^2`` (Halko et al.,
section 4.3, in mean square).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.errors import RecipeError
from aggregation.low_rank import Array, LowRank
from aggregation.piece import Reduce
from aggregation.reducing import ProductSum, Reduced
from aggregation.sketches import Sketches, columns_of, omega
from aggregation.spec import AdapterSpec, ModuleSpec

OVERSAMPLE = 4
MAX_COLUMNS = 4096
EVERYBODY = "*"  # the name of a secure sum, of which nobody knows the parts


@dataclass(frozen=True)
class Sketch(Reduce):
    """Reduce: the mean of the products, through two linear sums (FedASK, 2507.09990).

    By default the width is twice the rank and four more. To first order in the clients' steps the
    mean change ``(sum p_k dB_k) A + B (sum p_k dA_k)`` has no more than twice the rank, so what is
    missed is of second order; the report says how much it was.

    If a client answers the first pass and not the second, the mean is that of those who answered
    both. Its Y is then in Q but not in Z, and projecting on Q would not do: with a shared A,
    Q spans ``sum w_k dB_k`` over *all*, in which the sum over the survivors does not lie. But the
    survivors' own Y_S is known, its columns span their mean (if the width suffices), and
    ``Q^T X_S = Z_S^T`` says where in that span it lies: with U a basis of Y_S,
    ``X_S = U (Q^T U)^+ Z_S^T``, which is exact under the same condition on the width, and with all
    present is ``Q Z^T``. For this each Y_k is kept until the end of the round.

    Attributes:
        width: l, columns of the sketch; 0 for twice the largest rank of a module, and four more.
        probes: columns that only measure; 0 leaves the sketch's own loss out of the report.
        seed: public seed of Omega, which also depends on round and module.

    Raises:
        RecipeError: if a number is out of its bounds.
    """

    kind = "sketch"
    linear = True
    weighted = True
    delta = True
    mixed_ranks = True
    up = "l D"
    down = "l d_out"
    width: int = 0
    probes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"width": MAX_COLUMNS, "probes": 64, "seed": (1 << 63) - 1}
        for name, most in bounds.items():
            if not 0 <= getattr(self, name) <= most:
                raise RecipeError(f"sketch: {name}={getattr(self, name)} must lie in 0..{most}")

    def columns(self, spec: AdapterSpec) -> int:
        """Columns of Omega in all: what ``Assignment.sketch`` says to the clients.

        Args:
            spec: of the global adapter.
        """
        rank = max((module.rank for module in spec.modules), default=0)
        return (self.width or 2 * rank + OVERSAMPLE) + self.probes

    def accumulator(self, spec: AdapterSpec, *, measure: bool) -> SketchSum:
        """A new sum; always measured."""
        return SketchSum(spec, self)


@dataclass(frozen=True, eq=False)
class _Answer:
    """What one client has sent in the first pass."""

    weight: float
    sketches: Mapping[str, npt.NDArray[np.floating]]
    others: Mapping[str, Array]


@dataclass(eq=False)
class SketchSum:
    """The two sums in progress.

    Clients that send whole adapters, as off line, answer both passes at once: the server does for
    them what they would have done.

    Args:
        spec: of the global adapter.
        rule: how it is sketched.
    """

    spec: AdapterSpec
    rule: Sketch
    _first: dict[str, _Answer] = field(default_factory=dict)
    _second: dict[str, dict[str, npt.NDArray[np.floating]]] = field(default_factory=dict)
    _round: int = 1
    _basis: dict[str, Array] | None = None

    def __post_init__(self) -> None:
        self._whole = ProductSum().accumulator(self.spec, measure=True)
        self._whole_weight = 0.0

    def add(self, adapter: Adapter, start: Adapter, weight: float) -> None:
        """Fold a whole adapter in, relative to where its training started."""
        self._whole.add(adapter, start, weight)
        self._whole_weight += weight

    def add_first(
        self,
        client: str,
        number: int,
        sketches: Sketches,
        adapter: Adapter,
        start: Adapter,
        weight: float,
    ) -> None:
        """Note what a client sends in the first pass.

        Args:
            client: its name, for the second pass.
            number: of the round, which Omega depends on.
            sketches: Y_k by module, without any weight.
            adapter: its tensors outside the modules.
            start: where its training started.
            weight: of the client.
        """
        keys = [tensor.key for tensor in self.spec.others]
        others = {
            k: np.subtract(adapter.tensors[k], start.tensors[k], dtype=np.float64) for k in keys
        }
        self._round = number
        self._first[client] = _Answer(weight, dict(sketches), others)

    def add_first_sum(
        self, number: int, sketches: Mapping[str, Array], others: Mapping[str, Array]
    ) -> None:
        """Note the weighted sum of what all clients send in the first pass; no client is known.

        Args:
            number: of the round.
            sketches: the sum of ``w_k Y_k`` by module, float64.
            others: the sum of the weighted changes of the tensors outside the modules.
        """
        self._round = number
        self._first[EVERYBODY] = _Answer(1.0, dict(sketches), others)

    def basis(self) -> dict[str, npt.NDArray[np.float32]]:
        """Q of every module, float32 of shape (d_out, l), for the second pass.

        Empty if nobody waits for one. Columns are orthonormal to the precision of float32.
        """
        if not self._first:
            return {}
        ready = {}
        for module in self.spec.modules:
            width = self._width(module)
            total = np.zeros((module.d_out, width))
            for answer in self._first.values():
                total += answer.weight * answer.sketches[module.name][:, :width]
            ready[module.name] = np.linalg.qr(total)[0].astype(np.float32)
        self._basis = {name: q.astype(np.float64) for name, q in ready.items()}
        return ready

    def add_second(self, client: str, sketches: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Note Z_k by module, of a client whose first pass is in."""
        self._second[client] = dict(sketches)

    def unanswered(self) -> dict[str, float]:
        """Weights of the clients whose second pass is missing, by name."""
        return {c: a.weight for c, a in self._first.items() if c not in self._second}

    def drop_unanswered(self) -> dict[str, float]:
        """Leave those out for good, and say their weights."""
        missing = self.unanswered()
        for client in missing:
            del self._first[client]
        return missing

    def finish(self, total: float) -> Reduced:
        """The mean over those who answered both passes, and over whole adapters.

        Args:
            total: the sum of *their* weights.
        """
        whole = self._whole.finish(1.0) if self._whole_weight else None
        there = {c: a for c, a in self._first.items() if c in self._second}
        products, lost = {}, {}
        for module in self.spec.modules:
            matrix = (
                whole.products[module.name] if whole else LowRank.zero(module.d_out, module.d_in)
            )
            found, missed = self._module(module, matrix, there)
            products[module.name] = found * (1.0 / total)
            lost[module.name] = missed / total
        others = {}
        for tensor in self.spec.others:
            change = whole.others[tensor.key] if whole else np.zeros(tensor.shape)
            for answer in there.values():
                change = change + answer.weight * answer.others[tensor.key]
            others[tensor.key] = change / total
        return Reduced(products, None, others, lost=lost)

    def _module(
        self, module: ModuleSpec, whole: LowRank, there: Mapping[str, _Answer]
    ) -> tuple[LowRank, float]:
        """The weighted sum as far as the sketches have it, and the norm of what they have not."""
        columns, width = columns_of(module, self.rule.columns(self.spec)), self._width(module)
        draw = omega(module, columns, self.rule.seed, self._round)
        first = whole.B @ (whole.A @ draw)
        for answer in there.values():
            first += answer.weight * answer.sketches[module.name].astype(np.float64)
        left, values, _ = np.linalg.svd(first[:, :width], full_matrices=False)
        # Directions below the rounding of what came are nobody's; sketches come as float32.
        rounding = np.finfo(np.float32 if there else np.float64).eps
        left = left[:, values > 4 * rounding * values[0]]
        basis = left if self._basis is None else self._basis[module.name]
        second = whole.A.T @ (whole.B.T @ basis)
        for client, answer in there.items():
            second += answer.weight * self._second[client][module.name].astype(np.float64)
        if not left.shape[1]:
            return LowRank.zero(module.d_out, module.d_in), 0.0
        found = LowRank(left, np.linalg.lstsq(basis.T @ left, second.T, rcond=None)[0])
        if not there:
            return found, (whole - found).norm()
        if width == columns:
            return found, 0.0
        rest = first[:, width:] - left @ (found.A @ draw[:, width:])
        return found, float(np.linalg.norm(rest) / np.sqrt(columns - width))

    def _width(self, module: ModuleSpec) -> int:
        """Columns that form Q: all but the probes; all, if the matrix has no more."""
        columns, least = self.rule.columns(self.spec), min(module.d_out, module.d_in)
        return columns - self.rule.probes if columns < least else least
