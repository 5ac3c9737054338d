"""The quadratic model that chooses learning rate and momentum: 2x2, on 0-d arrays."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_xp.backend import array_namespace
from kfac_xp.curvature_products import CurvatureMatrixVectorProductComputer
from kfac_xp.distributed import Team
from kfac_xp.optimizer.info import as_scalar, first_array, scalar_dtype
from kfac_xp.params import inner_products
from kfac_xp.typing import Array, Scalar, Vectors


@dataclass(frozen=True)
class QuadraticModel:
    """``q(y) = y.T m y / 2 + c.T y`` of updates ``y[0] * p + y[1] * u``, all entries 0-d.

    ``m`` is the exact curvature of the mean loss in the plane of p and u, plus ``damping`` times
    their inner products, ``gram``; ``c`` is the slope of the mean loss. Without u there is only
    the first entry of each.

    Parameters
    ----------
    curvature, gram
        ``(m00, m01, m11)`` without damping, and the same entries of the inner products.
    slope
        ``(c0, c1)``.
    damping
        Damping that `minimum` adds.
    tolerance
        Squared sine of the angle, in the metric m, below which p and u count as parallel.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7, appendix C.
    """

    curvature: tuple[Array, ...]
    gram: tuple[Array, ...]
    slope: tuple[Array, ...]
    damping: Array
    tolerance: float

    @property
    def damped(self) -> tuple[Array, ...]:
        """Entries of ``m + damping * gram``."""
        return tuple(m + self.damping * b for m, b in zip(self.curvature, self.gram, strict=True))

    def minimum(self, fixed_momentum: Array | None = None) -> tuple[Array, Array, Array]:
        """``(alpha, mu, y1)``: where q is smallest, at a given mu if there is one.

        ``y1`` is the entry of u in the model: mu, or 0 where the slope along u is exactly zero, as
        before there is a velocity. Where p and u are parallel to rounding, u is left out too; a
        direction without curvature is not followed.
        """
        m00, c0 = self.damped[0], self.slope[0]
        xp = array_namespace(m00)
        zero, one = xp.zeros_like(m00), xp.ones_like(m00)
        flat = m00 == 0
        along_p = xp.where(flat, zero, -c0 / xp.where(flat, one, m00))
        if len(self.slope) == 1:
            return along_p, zero if fixed_momentum is None else fixed_momentum, zero
        (_, m01, m11), c1 = self.damped, self.slope[1]
        if fixed_momentum is not None:
            alpha = -(fixed_momentum * m01 + c0) / xp.where(flat, one, m00)
            absent = (c1 == 0) | flat
            return (
                xp.where(absent, along_p, alpha),
                fixed_momentum,
                xp.where(c1 == 0, zero, fixed_momentum),
            )
        determinant = m00 * m11 - m01 * m01
        singular = determinant <= self.tolerance * m00 * m11
        absent = (c1 == 0) | singular
        safe = xp.where(absent, one, determinant)
        alpha = xp.where(absent, along_p, (m01 * c1 - m11 * c0) / safe)
        mu = xp.where(absent, zero, (m01 * c0 - m00 * c1) / safe)
        return alpha, mu, mu

    def change(self, y: tuple[Array, ...], damping: Scalar) -> Array:
        """``q(y)`` with this damping in place of the model's own."""
        value = _quadratic(self.curvature, y) + damping * _quadratic(self.gram, y)
        return value + sum(c * x for c, x in zip(self.slope, y, strict=False))


def _quadratic(entries: tuple[Array, ...], y: tuple[Array, ...]) -> Array:
    """``y.T m y / 2`` from the entries (m00, m01, m11), or from m00 alone."""
    if len(entries) == 1:
        return 0.5 * entries[0] * y[0] * y[0]
    m00, m01, m11 = entries
    return 0.5 * (m00 * y[0] * y[0] + m11 * y[1] * y[1]) + m01 * y[0] * y[1]


def quadratic_model(
    products: CurvatureMatrixVectorProductComputer,
    grads: Vectors,
    step: Vectors,
    velocity: Vectors | None,
    *,
    mat_type: str,
    damping: Scalar,
    batch_size: float,
    team: Team,
) -> QuadraticModel:
    """The model of the mean loss in the plane of a step p and of the last update, ``u = -v``.

    The curvature is the exact Fisher on this batch, or, if `mat_type` is "GGN" or
    "Empirical_Fisher", the GGN (the Fisher of losses that have none). One ``jvp`` for each of p
    and u; scalars are float64 where that exists. The curvature is summed over ranks.
    """
    multiply = (
        products.multiply_fisher_factor_transpose
        if mat_type == "Fisher"
        else products.multiply_ggn_or_fisher_factor_transpose
    )
    like = first_array(grads)
    vectors = [step] if velocity is None else [step, velocity]
    with team.agreement():
        images = [multiply(vector) for vector in vectors]
    # The products are those of v; u = -v changes the signs of the mixed ones.
    pairs = [(0, 0), (0, 1), (1, 1)][: 2 * len(vectors) - 1]
    signs = (1, -1, 1)
    dtype = scalar_dtype(like)
    xp = array_namespace(like)
    # Rounding of the inner products, whose rows are summed in the dtype of the vectors.
    tolerance = max(64 * float(xp.finfo(xp.float64).eps), float(xp.finfo(like.dtype).eps))
    curvature = team.sums(inner_products(images, pairs, dtype))
    with_grads = [(len(vectors), i) for i in range(len(vectors))]
    entries = inner_products([*vectors, grads], [*pairs, *with_grads], dtype)
    return QuadraticModel(
        tuple(s * x / batch_size for s, x in zip(signs, curvature, strict=False)),
        tuple(s * x for s, x in zip(signs, entries[: len(pairs)], strict=False)),
        tuple(s * x for s, x in zip(signs, entries[len(pairs) :], strict=False)),
        as_scalar(damping, like),
        tolerance,
    )
