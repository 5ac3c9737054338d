"""The arithmetic of a chain: moments of neighbours, and each layer given its successor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, as_scalar_like, cast, device_of
from kfac_xp.damping import compute_pi_adjusted_damping
from kfac_xp.operators import FullMatrix
from kfac_xp.typing import Array, PiType, Scalar


class ChainMoments(NamedTuple):
    """Second moments of one layer, and with the layer that follows it (None for the last).

    Parameters
    ----------
    input, output : shapes [n, n] and [m, m]
        ``E[a_i a_i^T]`` and ``E[g_i g_i^T]``; n is d_in, plus 1 for a bias, and m is d_out.
    next_input, next_output : shapes [n, n'] and [m, m']
        ``E[a_i a_{i+1}^T]`` and ``E[g_i g_{i+1}^T]``.
    """

    input: Array
    output: Array
    next_input: Array | None
    next_output: Array | None


class Link(NamedTuple):
    """What products with one layer's matrix given its successor need.

    That is ``Sigma = kron(A, G) - kron(C, D)``. Columns of `root_in` are K with ``K^T A K = I`` and
    ``K^T C K = diag(s_in)``, those of `dual_in` are ``K^-T``; likewise `root_out` with G and D.

    Parameters
    ----------
    root_in, dual_in : shape [n, n]
    root_out, dual_out : shape [m, m]
    gaps : shape [n, m]
        ``1 - outer(s_in, s_out)``: the eigenvalues between the roots. Ones for the last layer.
    """

    root_in: Array
    root_out: Array
    dual_in: Array
    dual_out: Array
    gaps: Array

    def solve(self, v: Array) -> Array:
        """``Sigma^-1`` times a matrix [n, m]."""
        inner = _between(self.root_in.T, v, self.root_out) / self.gaps
        return _between(self.root_in, inner, self.root_out.T)

    def matmul(self, v: Array) -> Array:
        """``Sigma`` times a matrix [n, m]."""
        inner = _between(self.dual_in.T, v, self.dual_out) * self.gaps
        return _between(self.dual_in, inner, self.dual_out.T)


class Coupling(NamedTuple):
    """``Psi = kron(psi_in, psi_out)``: a layer's gradient regressed on that of its successor.

    Parameters
    ----------
    psi_in : shape [n, n']
        ``A_{i,i+1} A_{i+1,i+1}^-1``.
    psi_out : shape [m, m']
        ``G_{i,i+1} G_{i+1,i+1}^-1``.
    """

    psi_in: Array
    psi_out: Array

    def matmul(self, following: Array) -> Array:
        """``Psi`` times a matrix [n', m'] of the successor."""
        return _between(self.psi_in, following, self.psi_out.T)

    def transpose_matmul(self, v: Array) -> Array:
        """``Psi^T`` times a matrix [n, m]: one of the successor."""
        return _between(self.psi_in.T, v, self.psi_out)


def solve_chain(
    links: Sequence[Link], couplings: Sequence[Coupling], v: Sequence[Array]
) -> list[Array]:
    """``Xi^T Lambda Xi``, the inverse, times the matrices of all layers."""
    v = list(v)
    for i, coupling in enumerate(couplings):
        v[i] = v[i] - coupling.matmul(v[i + 1])
    v = [link.solve(x) for link, x in zip(links, v, strict=True)]
    for i, coupling in reversed(list(enumerate(couplings))):
        v[i + 1] = v[i + 1] - coupling.transpose_matmul(v[i])
    return v


def multiply_chain(
    links: Sequence[Link], couplings: Sequence[Coupling], v: Sequence[Array]
) -> list[Array]:
    """``Xi^-1 Lambda^-1 Xi^-T`` times the matrices of all layers.

    ``Xi^-T`` goes from the first layer on, ``Xi^-1`` from the last layer back.
    """
    v = list(v)
    for i, coupling in enumerate(couplings):
        v[i + 1] = v[i + 1] + coupling.transpose_matmul(v[i])
    v = [link.matmul(x) for link, x in zip(links, v, strict=True)]
    for i, coupling in reversed(list(enumerate(couplings))):
        v[i] = v[i] + coupling.matmul(v[i + 1])
    return v


def _between(left: Array, v: Array, right: Array) -> Array:
    return (left @ v) @ right


def batch_moments(data: Sequence[tuple[Array, list[Array]]]) -> Iterator[Array]:
    """The `ChainMoments` of each layer on one batch, in order and without None.

    Parameters
    ----------
    data
        For each layer its inputs [N, n] and its gradients [N, m] of each source. Moments are
        means over cases, those of the gradients summed over sources.
    """
    for i, (x, grads) in enumerate(data):
        yield linalg.compute_cov(x)
        yield _summed([linalg.compute_cov(g) for g in grads])
        for next_x, next_grads in data[i + 1 : i + 2]:
            yield linalg.compute_cov(x, next_x)
            pairs = zip(grads, next_grads, strict=True)
            yield _summed([linalg.compute_cov(g, h) for g, h in pairs])


def _summed(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], start=terms[0])


class Whitened(NamedTuple):
    """A damped moment ``M = L L^T``, by its lower Cholesky factor and the inverse of that."""

    damped: Array
    lower: Array
    inverse_lower: Array


def whitened(moment: Array, damping: Scalar) -> Whitened:
    """Of ``moment + damping * I``; not finite if that is not positive definite."""
    lower = linalg.cholesky(moment, damping)
    damped = linalg.add_to_diagonal(moment, damping)
    return Whitened(damped, lower, linalg.inverse_lower(lower))


def decompose(
    moments: Sequence[ChainMoments], damping: Scalar, pi_type: PiType, dtype: Any
) -> tuple[list[Link], list[Coupling], Array]:
    """Links of all layers, couplings of all but the last, and checks [2 * layers]: in `dtype`.

    The checks are, layer by layer, the residual of the roots and the smallest gap. Not finite, or
    the residual not small beside the gap, where a factor is not positive definite.
    """
    sides: list[tuple[Whitened, Whitened]] = []
    for layer in moments:
        a, g = cast(layer.input, dtype), cast(layer.output, dtype)
        root = as_scalar_like(damping, a) ** 0.5
        dampings = compute_pi_adjusted_damping(FullMatrix(a), FullMatrix(g), root, pi_type)
        sides.append((whitened(a, dampings[0]), whitened(g, dampings[1])))
    links, couplings, checks = [], [], []
    for i, (layer, (a, g)) in enumerate(zip(moments, sides, strict=True)):
        if layer.next_input is None or layer.next_output is None:
            (root_in, dual_in, s_in), (root_out, dual_out, s_out) = map(_marginal, (a, g))
        else:
            next_a, next_g = sides[i + 1]
            root_in, dual_in, s_in, psi_in = _conditional(a, layer.next_input, next_a)
            root_out, dual_out, s_out, psi_out = _conditional(g, layer.next_output, next_g)
            couplings.append(Coupling(psi_in, psi_out))
        gaps = 1 - s_in[:, None] * s_out[None, :]
        links.append(Link(root_in, root_out, dual_in, dual_out, gaps))
        xp = array_namespace(gaps)
        residuals = xp.stack([_residual(root_in, a.damped), _residual(root_out, g.damped)])
        checks += [xp.max(residuals), xp.min(gaps)]
    return links, couplings, array_namespace(*checks).stack(checks)


def _marginal(side: Whitened) -> tuple[Array, Array, Array]:
    """Root, dual and s of one side of the last layer, which follows none."""
    zeros = array_namespace(side.lower).zeros_like(side.lower[0, :])
    return side.inverse_lower.T, side.lower, zeros


def _conditional(
    side: Whitened, cross: Array, following: Whitened
) -> tuple[Array, Array, Array, Array]:
    """Root, dual, s and psi of one side of a layer: see `Link` and `Coupling`.

    The whitened cross moment ``X = L^-1 M_{i,i+1} L'^-T`` has the canonical correlations as its
    singular values, and ``L^-1 C L^-T = X X^T = E diag(s) E^T`` with ``K = L^-T E``.
    """
    half = cast(cross, side.lower.dtype) @ following.inverse_lower.T
    x = side.inverse_lower @ half
    s, e = linalg.psd_eigh(linalg.symmetrized(x @ x.T))
    return side.inverse_lower.T @ e, side.lower @ e, s, half @ following.inverse_lower


def _residual(root: Array, damped: Array) -> Array:
    """Largest entry of ``K^T M K p - p`` for a probe p of size 1: in O(n^2)."""
    xp = array_namespace(root)
    index = xp.arange(root.shape[0], dtype=root.dtype, device=device_of(root))
    probe = xp.cos(index * index)
    return xp.max(xp.abs(root.T @ (damped @ (root @ probe)) - probe))
