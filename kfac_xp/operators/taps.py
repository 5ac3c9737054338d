"""Second moments of patches whose pixels are uncorrelated, and their eigenvectors."""

from __future__ import annotations

from typing import Any

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, cast, device_of
from kfac_xp.operators.base import LinearOperator, Spectrum, without_rounding
from kfac_xp.operators.diagonalized import Diagonalized
from kfac_xp.operators.structured import RankOneUpdate, RepeatedBlock
from kfac_xp.typing import Array, Scalar


class UncorrelatedTaps(LinearOperator):
    """``kron(I_J, cov) + h h.T`` with ``h = kron(ones(J), mean)``, over J taps of a filter.

    With a bias there is one more row and column: `corner` on the diagonal and 1 appended to h.

    The taps enter h alike. In a basis of them whose first vector is ``ones(J) / sqrt(J)`` the
    matrix is block diagonal: `cov` for every other vector, and for the first, with the bias,
    ``[[cov + J mean mean.T, sqrt(J) mean], [sqrt(J) mean.T, corner + 1]]``. So its eigenvalues and
    all its powers follow from these two small matrices.

    Parameters
    ----------
    cov : shape [C, C]
    mean : shape [C]
        None if there is no h.
    num_taps
        J.
    corner : 0-d
        None if there is no bias.
    """

    def __init__(
        self, cov: Array, mean: Array | None, num_taps: int, corner: Array | None = None
    ) -> None:
        self.cov, self.mean, self.num_taps, self.corner = cov, mean, num_taps, corner
        self._spectrum: Spectrum | None = None
        self._sum: LinearOperator = RepeatedBlock(cov, num_taps, corner)
        if mean is not None:
            xp = array_namespace(mean)
            h = xp.tile(mean, (num_taps,))
            if corner is not None:
                h = xp.concat([h, xp.ones_like(h[:1])])
            self._sum = RankOneUpdate(self._sum, h, 1.0)

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return self._sum.domain_dimension

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.cov

    @property
    def T(self) -> UncorrelatedTaps:  # noqa: N802
        """The operator itself."""
        return self

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        return self._sum.to_dense()

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return self._sum.trace()

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        return self._sum.diagonal()

    def spectrum(self) -> Spectrum:
        """By two decompositions, of C and of C (+ 1) rows."""
        if self._spectrum is None:
            self._spectrum = spectrum_of_taps(
                linalg.psd_eigh(self.cov, clip=None),
                linalg.psd_eigh(self.of_the_mean(), clip=None),
                self.num_taps,
                self.corner is not None,
            )
        return self._spectrum

    def of_the_mean(self) -> Array:
        """The block of the first basis vector of the taps, shape [C (+ 1), C (+ 1)]."""
        xp = array_namespace(self.cov)
        mean = 0 * self.cov[:, 0] if self.mean is None else self.num_taps**0.5 * self.mean
        block = self.cov + mean[:, None] * mean[None, :]
        if self.corner is None:
            return block
        corner = self.corner if self.mean is None else self.corner + 1
        return linalg.bordered(block, xp.concat([mean, xp.reshape(corner, (1,))]))

    def power(self, exp: float) -> Diagonalized:
        """In the basis of the eigenvectors."""
        return self._diagonalized().power(exp)

    def plus_identity(self, shift: Scalar) -> UncorrelatedTaps:
        """Of the same form."""
        corner = None if self.corner is None else self.corner + shift
        cov = linalg.add_to_diagonal(self.cov, shift)
        result = UncorrelatedTaps(cov, self.mean, self.num_taps, corner)
        if self._spectrum is not None:
            result._spectrum = Spectrum(self._spectrum.vectors, self._spectrum.values + shift)
        return result

    def scaled(self, factor: Scalar) -> Diagonalized:
        """In the basis of the eigenvectors."""
        return self._diagonalized().scaled(factor)

    def frobenius_norm(self) -> Array:
        """Root of the sum of all squared entries, 0-d."""
        return self._sum.frobenius_norm()

    def largest_eigenvalue(self) -> Array:
        """The largest eigenvalue, 0-d: that of the block of the first basis vector."""
        if self._spectrum is not None:
            return super().largest_eigenvalue()
        block = self.of_the_mean()
        xp = array_namespace(block)
        return xp.max(xp.linalg.eigvalsh(block))

    def astype(self, dtype: Any) -> UncorrelatedTaps:
        """The matrix in another dtype."""
        mean, corner = (None if x is None else cast(x, dtype) for x in (self.mean, self.corner))
        return UncorrelatedTaps(cast(self.cov, dtype), mean, self.num_taps, corner)

    def _diagonalized(self) -> Diagonalized:
        spectrum = self.spectrum()
        return Diagonalized(spectrum.vectors, spectrum.values)

    def _left(self, x: Array) -> Array:
        return self._sum._left(x)

    def _right(self, x: Array) -> Array:
        return self._sum._right(x)


class TapBasis(LinearOperator):
    """``kron(mix, I_C) @ diag(first, rest, ..., rest)``, over J taps: eigenvectors of the above.

    Parameters
    ----------
    mix : shape [J, J]
    first : shape [C, C], or with a bias [C + 1, C + 1]
        Its last row and column belong to the last entry, which `mix` leaves alone.
    rest : shape [C, C]
        For each of the other J - 1.
    is_adjoint
        Whether it is the transpose of all that.
    """

    def __init__(self, mix: Array, first: Array, rest: Array, is_adjoint: bool = False) -> None:
        self.mix, self.first, self.rest, self.is_adjoint = mix, first, rest, is_adjoint

    @property
    def domain_dimension(self) -> int:
        """Number of rows and columns."""
        return (self.mix.shape[0] - 1) * self.rest.shape[0] + self.first.shape[0]

    @property
    def like(self) -> Array:
        """An array of the library, device and dtype of the operator."""
        return self.rest

    @property
    def T(self) -> TapBasis:  # noqa: N802
        """The transpose."""
        return TapBasis(self.mix, self.first, self.rest, not self.is_adjoint)

    def to_dense(self) -> Array:
        """The matrix, shape [n, n]."""
        xp, n = array_namespace(self.mix), self.domain_dimension
        return self.matmul(xp.eye(n, dtype=self.dtype, device=device_of(self.mix)))

    def trace(self) -> Array:
        """Sum of the diagonal, 0-d."""
        return array_namespace(self.mix).sum(self.diagonal())

    def diagonal(self) -> Array:
        """The diagonal, shape [n]."""
        xp, c = array_namespace(self.mix), self.rest.shape[0]
        mix, first = xp.linalg.diagonal(self.mix), xp.linalg.diagonal(self.first)
        rest = mix[1:, None] * xp.linalg.diagonal(self.rest)[None, :]
        return xp.concat([mix[:1] * first[:c], xp.reshape(rest, (-1,)), first[c:]])

    def squared_entries(self) -> TapBasis:
        """Of the same form, because entries are products of one entry of each part."""
        mix, first, rest = (part * part for part in (self.mix, self.first, self.rest))
        return TapBasis(mix, first, rest, self.is_adjoint)

    def _left(self, x: Array) -> Array:
        xp = array_namespace(self.mix, x)
        taps, c, k = self.mix.shape[0], self.rest.shape[0], x.shape[1]
        blocks, bias = xp.reshape(x[: taps * c, :], (taps, c * k)), x[taps * c :, :]
        if self.is_adjoint:
            blocks = xp.matmul(xp.matrix_transpose(self.mix), blocks)
        blocks = xp.reshape(blocks, (taps, c, k))
        first, rest = (
            xp.matrix_transpose(m) if self.is_adjoint else m for m in (self.first, self.rest)
        )
        turned = xp.matmul(first, xp.concat([blocks[0, ...], bias]))
        others = xp.matmul(rest, blocks[1:, ...])
        blocks = xp.reshape(xp.concat([turned[None, :c, :], others]), (taps, c * k))
        if not self.is_adjoint:
            blocks = xp.matmul(self.mix, blocks)
        return xp.concat([xp.reshape(blocks, (taps * c, k)), turned[c:, :]])

    def _right(self, x: Array) -> Array:
        xp = array_namespace(x)
        return xp.matrix_transpose(self.T._left(xp.matrix_transpose(x)))


def spectrum_of_taps(
    rest: tuple[Array, Array], first: tuple[Array, Array], num_taps: int, has_bias: bool
) -> Spectrum:
    """Spectrum of an `UncorrelatedTaps` from the eigenvalues and eigenvectors of its two blocks."""
    (values, vectors), (first_values, first_vectors) = rest, first
    xp, c = array_namespace(values), vectors.shape[0]
    others = xp.reshape(xp.broadcast_to(values[None, :], (num_taps - 1, c)), (-1,))
    merged = xp.concat([first_values[:c], others, first_values[c:]])
    mix = tap_reflection(num_taps, like=vectors)
    return Spectrum(TapBasis(mix, first_vectors, vectors), without_rounding(merged))


def tap_reflection(num_taps: int, like: Array) -> Array:
    """The symmetric orthogonal matrix [J, J] with first column ``ones(J) / sqrt(J)``."""
    xp = array_namespace(like)
    place = {"dtype": like.dtype, "device": device_of(like)}
    eye = xp.eye(num_taps, **place)
    if num_taps == 1:
        return eye
    # Householder's: it exchanges the first unit vector and the constant one.
    normal = eye[:, 0] - num_taps**-0.5
    return eye - normal[:, None] * normal[None, :] / (1 - num_taps**-0.5)
