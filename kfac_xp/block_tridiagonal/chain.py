"""Block-tridiagonal K-FAC: a chain of dense layers whose inverse couples neighbours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, as_scalar_like, cast
from kfac_xp.batches import require_same_place
from kfac_xp.block_tridiagonal.links import (
    Coupling,
    Link,
    decompose,
    multiply_chain,
    solve_chain,
)
from kfac_xp.block_tridiagonal.statistics import ChainStatistics
from kfac_xp.changes import attributes, make
from kfac_xp.descriptions import Described, facts_of_array
from kfac_xp.options import FactorOptions
from kfac_xp.params import (
    as_arrays,
    layer_params_to_mat2d,
    map_params,
    mat2d_to_layer_params,
    require_like,
)
from kfac_xp.precision import exact_products
from kfac_xp.representations import DampingKey
from kfac_xp.state import Saved, StateError, to_numpy
from kfac_xp.typing import Array, Damping, Params, PiType, Vectors

logger = logging.getLogger("kfac_xp.block_tridiagonal")

RUNGS = ("direct", "float64")

MAX_RESIDUAL = 1e-2
"""The largest error of a whitened factor that passes, relative to the layer's gap."""


@dataclass(frozen=True)
class ChainDecomposition:
    """How the inverse of a chain was last computed.

    Parameters
    ----------
    rung
        ``"direct"``, or ``"float64"`` where the statistics' dtype did not pass the check.
    residual
        Largest entry of ``K^T A K p - p`` over layers and sides, for a probe p of size 1.
    gap
        Smallest ``1 - s_in * s_out``: how near a layer's gradient is to being a linear function
        of the next one's, 0 where it is one.
    num_updates
        How many updates of the statistics it has seen.
    """

    rung: str
    residual: float
    gap: float
    num_updates: int


class BlockTridiagonalChain(Described, ChainStatistics):
    """K-FAC for a chain of dense layers, with the correlations of neighbouring layers.

    `FullyConnectedKFACBasicFB` takes layers to be uncorrelated. Here the Fisher's blocks on the
    diagonal and beside it are those of K-FAC, ``F_ij = kron(A_ij, G_ij)`` with
    ``A_ij = E[a_i a_j^T]`` and ``G_ij = E[g_i g_j^T]``, and its other blocks are what makes its
    *inverse* block-tridiagonal: each layer is correlated with layers further on only by way of
    the next one. With ``Psi_i = kron(A_{i,i+1} A_{i+1,i+1}^-1, G_{i,i+1} G_{i+1,i+1}^-1)``,

        F^-1    = Xi^T Lambda Xi,    Xi the identity with -Psi_i right of the diagonal,
        Lambda  = blockdiag(Sigma_1^-1, ..., Sigma_l^-1),
        Sigma_i = F_ii - Psi_i F_{i+1,i+1} Psi_i^T,    Sigma_l = F_ll,

    a directed Gaussian model from the last layer to the first. Sigma_i is a difference of two
    Kronecker products, inverted by their common eigenvectors.

    Parameters
    ----------
    params
        ``{layer name: kernel [d_in, d_out] or (kernel, bias [d_out])}`` in the order in which the
        layers are applied. Shapes, dtype, library and device are taken from it; values are not.
    damping
        A number, a 0-d array, or a function without arguments that returns one, read at every
        inverse update. As in `KroneckerProductFB`, ``A_ii + pi_i sqrt(damping) I`` and
        ``G_ii + sqrt(damping) / pi_i I`` stand for A_ii and G_ii everywhere above.
    zero_debias, pi_type, dtype
        As in `FactorOptions`.
    name
        For messages.

    Raises
    ------
    ValueError
        If there is no layer, parameters are not those of dense layers, or an option is unknown.
    TypeError
        If layers belong to several libraries.

    Notes
    -----
    Beside K-FAC's factors, a chain keeps the moments of neighbours, and for products four square
    matrices and two regressions per layer. An inverse update takes a Cholesky factor and the
    eigenvectors of each factor. This class stands beside a `FisherEstimator` and is given arrays;
    `LayerCollection.register_chain` trains with the same matrix.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 4.3, appendix B (the inverse of Sigma) and
    section 6.3 (damping).
    """

    def __init__(
        self,
        params: Vectors,
        damping: Damping,
        *,
        zero_debias: bool = True,
        pi_type: PiType = "tracenorm",
        dtype: Any = None,
        name: str = "BlockTridiagonalChain",
    ) -> None:
        self.options = FactorOptions(zero_debias=zero_debias, pi_type=pi_type, dtype=dtype)
        super().__init__(params, self.options, name)
        self._damping = DampingKey(damping)
        self._powers: tuple[list[Link], list[Coupling]] | None = None
        self._decomposition: ChainDecomposition | None = None

    # ------------------------------------------------------------------ the inverse

    def update_inverses(self) -> None:
        """Recompute what products need from the moments and the damping of now.

        One small array is read for all layers. Where it does not pass the check, the same is
        computed in float64, with a read of its own.

        Raises
        ------
        RuntimeError
            Before the first update of the moments, or if a layer given its successor is singular
            at its damping and there is no earlier inverse to keep (which is kept with a warning).
        FloatingPointError
            If statistics on a device were not finite since the last call. They were left out, and
            nothing is recomputed.
        """
        moments = list(self.moments.values())
        damping = as_scalar_like(self._damping.read(), self._like)
        xp, residual, gap = array_namespace(self._like), float("nan"), float("nan")
        dtypes = [self._like.dtype]
        if self._like.dtype != xp.float64 and linalg.has_float64(self._like):
            dtypes.append(xp.float64)
        for rung, dtype in zip(RUNGS, dtypes, strict=False):
            with exact_products(self._like), linalg.quiet_failures(self._like):
                links, couplings, checks = decompose(moments, damping, self.options.pi_type, dtype)
            residual, gap, passes = self._read(checks)
            if passes:
                powers = _cast_all(links, couplings, self._like.dtype)
                how = ChainDecomposition(rung, residual, gap, self._average.num_updates)
                if rung != RUNGS[0]:
                    logger.info("the layers of %s are decomposed by %r", self.name, rung)
                make([attributes(self, _powers=powers, _decomposition=how)])
                return
        trouble = (
            f"a layer of {self.name} given its successor is singular at its damping: the residual "
            f"is {residual:.1e} and the smallest `1 - s_in * s_out` {gap:.1e}"
        )
        if self._powers is None:
            raise RuntimeError(f"{trouble}; there is no earlier inverse. Use a larger damping.")
        warnings.warn(
            f"{trouble}; the last good inverse is kept. Use a larger damping.",
            RuntimeWarning,
            stacklevel=2,
        )

    def multiply_inverse(self, vectors: Vectors) -> dict[str, Params]:
        """The inverse of the damped Fisher times ``{layer name: params}``, as last computed.

        Raises
        ------
        RuntimeError
            Before the first `update_inverses`.
        ValueError
            If layers are missing or unknown, or shapes are not those of the parameters.
        """
        (links, couplings), v = self._require_powers(), self._matrices(vectors)
        with exact_products(self._like):
            return self._vectors(vectors, solve_chain(links, couplings, v))

    def multiply(self, vectors: Vectors) -> dict[str, Params]:
        """The damped Fisher, whose inverse is `multiply_inverse`, times ``{layer name: params}``.

        As last computed: of the moments and the damping of the last `update_inverses`.

        Raises
        ------
        RuntimeError, ValueError
            As `multiply_inverse`.
        """
        (links, couplings), v = self._require_powers(), self._matrices(vectors)
        with exact_products(self._like):
            return self._vectors(vectors, multiply_chain(links, couplings, v))

    @property
    def info(self) -> dict[str, Any]:
        """How the inverse was computed, see `ChainDecomposition`; empty before it is.

        ``"staleness"`` counts the updates of the moments since.
        """
        if self._decomposition is None:
            return {}
        info = asdict(self._decomposition)
        info["staleness"] = self._average.num_updates - info.pop("num_updates")
        return info

    def _facts(self) -> dict[str, str]:
        facts = {"layers": str(len(self.shapes)), **facts_of_array(self._like)}
        facts["updates"] = str(self._average.num_updates)
        stale = self.info.get("staleness")
        return facts if stale is None else facts | {"staleness": str(stale)}

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """The moments and, unless `powers` is False, what products need (stale as it is)."""
        order = {layer: i for i, layer in enumerate(self.shapes)}
        state: dict[str, Any] = {"layers": order, "average": self._average.state_dict()}
        if powers and self._powers is not None and self._decomposition is not None:
            links, couplings = self._powers
            made = asdict(self._decomposition)
            state["powers"] = {
                "links": {n: x._asdict() for n, x in zip(self.shapes, links, strict=True)},
                "couplings": {n: x._asdict() for n, x in zip(self.shapes, couplings, strict=False)},
                "decomposition": made | {"rung": RUNGS.index(made["rung"])},
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, flattened through a file or not.

        Powers that it leaves out need an `update_inverses`.

        Raises
        ------
        StateError
            If it is the state of another chain, naming the key. Nothing is changed.
        """
        saved = Saved(state)
        saved.require(("layers", "average"), optional=("powers",))
        order = saved.part("layers")
        order.require(self.shapes)
        saved_order = sorted(order, key=order.count)
        if saved_order != list(self.shapes):
            raise StateError(
                f"the saved 'layers' are a chain in the order {saved_order}; this chain's is "
                f"{list(self.shapes)}."
            )
        powers, decomposition = None, None
        if "powers" in saved:
            part = saved.part("powers")
            # A single layer has no couplings.
            part.require(("links", "decomposition"), optional=("couplings",))
            powers = self._saved_powers(part.part("links"), part.part("couplings"))
            decomposition = _saved_decomposition(part.part("decomposition"))
        own = attributes(self, _powers=powers, _decomposition=decomposition)
        make([*self._average.changes_to(saved.part("average")), own])

    # ------------------------------------------------------------------ helpers

    def _saved_powers(self, links: Saved, couplings: Saved) -> tuple[list[Link], list[Coupling]]:
        layers = list(self.shapes)
        links.require(layers)
        couplings.require(layers[:-1])
        made: tuple[list[Link], list[Coupling]] = [], []
        for layer, ((n, _), (m, _), *following) in zip(layers, self._moment_shapes(), strict=True):
            shapes = [(n, n), (m, m), (n, n), (m, m), (n, m)]
            made[0].append(Link(*self._loaded(links.part(layer), Link._fields, shapes)))
            if following:
                part = couplings.part(layer)
                made[1].append(Coupling(*self._loaded(part, Coupling._fields, following)))
        return made

    def _loaded(
        self, saved: Saved, names: Sequence[str], shapes: Sequence[tuple[int, int]]
    ) -> list[Array]:
        saved.require(names)
        pairs = zip(names, shapes, strict=True)
        return [saved.array(name, self._like, shape) for name, shape in pairs]

    def _require_powers(self) -> tuple[list[Link], list[Coupling]]:
        if self._powers is None:
            raise RuntimeError(
                f"{self.name} has no inverse yet. Call `update_cov` and then `update_inverses()` "
                "first."
            )
        return self._powers

    def _matrices(self, vectors: Vectors) -> list[Array]:
        """The vectors in the order of the chain, as matrices of the statistics' dtype."""
        self._require_layers("vectors", vectors)
        for layer, shapes in self.shapes.items():
            name = f"vectors[{layer!r}]"
            require_like(name, vectors[layer], shapes)
            require_same_place(name, as_arrays(vectors[layer])[0], self._like, self.name)
        matrices = [layer_params_to_mat2d(vectors[layer]) for layer in self.shapes]
        return [cast(x, self._like.dtype) for x in matrices]

    def _vectors(self, templates: Vectors, matrices: Sequence[Array]) -> dict[str, Params]:
        """Inverse of `_matrices`."""
        by_layer = dict(zip(self.shapes, matrices, strict=True))
        return {
            layer: map_params(
                lambda like, a: cast(a, like.dtype),
                template,
                mat2d_to_layer_params(template, by_layer[layer]),
            )
            for layer, template in templates.items()
        }

    def _read(self, checks: Array) -> tuple[float, float, bool]:
        """Largest residual, smallest gap and whether they pass; the flag of finite statistics."""
        flag, xp = self._average.all_finite, array_namespace(checks)
        if flag is not None:
            checks = xp.concat([checks, xp.reshape(cast(flag, checks.dtype), (1,))])
        values = to_numpy(checks)
        if flag is not None:
            if values[-1] != 1:
                self._average.all_finite = None
                raise FloatingPointError(
                    f"the statistics of {self.name} were not finite: a NaN or an infinity in a "
                    "layer's inputs or gradients since the last inverse update. They have been "
                    "left out of the average."
                )
            values = values[:-1]
        residuals, gaps = values[0::2], values[1::2]
        passes = bool((gaps > 0).all() and (residuals <= MAX_RESIDUAL * gaps).all())
        return float(residuals.max()), float(gaps.min()), passes


def _saved_decomposition(saved: Saved) -> ChainDecomposition:
    saved.require(("rung", "residual", "gap", "num_updates"))
    rung = saved.count("rung")
    if rung >= len(RUNGS):
        raise StateError(f"the saved {saved.key('rung')!r} must be that of one of {RUNGS}.")
    residual, gap = saved.number("residual"), saved.number("gap")
    return ChainDecomposition(RUNGS[rung], residual, gap, saved.count("num_updates"))


def _cast_all(
    links: Sequence[Link], couplings: Sequence[Coupling], dtype: Any
) -> tuple[list[Link], list[Coupling]]:
    return (
        [Link(*(cast(a, dtype) for a in link)) for link in links],
        [Coupling(*(cast(a, dtype) for a in coupling)) for coupling in couplings],
    )
