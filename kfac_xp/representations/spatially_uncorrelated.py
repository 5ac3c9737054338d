"""Covariances of patches whose pixels are uncorrelated: KFC's SUA."""

from __future__ import annotations

from collections.abc import Callable

from kfac_xp import linalg
from kfac_xp.backend import array_namespace, as_scalar_like, device_of
from kfac_xp.operators import (
    LinearOperator,
    RankOneUpdate,
    RepeatedBlock,
    Spectrum,
    UncorrelatedTaps,
    spectrum_of_taps,
)
from kfac_xp.options import FactorOptions
from kfac_xp.representations.attempts import Eigen, Prepared, without_residual
from kfac_xp.representations.dense import Dense
from kfac_xp.representations.requests import Request
from kfac_xp.typing import Array, Scalar, Triangles


class SpatiallyUncorrelated(Dense):
    """The covariance of patches, given that of single pixels.

    What is averaged is ``[cov, mu]``, of shape [C, C + 1]: the centred covariance of the channels
    and their mean. With J taps and damping the matrix is, in the order of a kernel's rows (taps,
    then channels),

        F = kron(I_J, cov + damping * I) + h h^T,   h = kron(ones(J), mu),

    with ``damping`` and 1 appended to the two parts if there is a bias, and without h if
    activations are assumed to have mean zero. Its inverse is exact, by Sherman and Morrison.
    """

    def __init__(
        self, options: FactorOptions, num_channels: int, num_taps: int, has_bias: bool
    ) -> None:
        super().__init__(options)
        self.num_channels = num_channels
        self.num_taps = num_taps
        self.has_bias = has_bias

    def initial_value(self, shape: tuple[int, ...], like: Array) -> Array:
        """Zeros, or the identity and mean zero."""
        xp = array_namespace(like)
        cov = super().initial_value((shape[0], shape[0]), like)
        mean = xp.zeros((shape[0], 1), dtype=like.dtype, device=device_of(like))
        return xp.concat([cov, mean], axis=1)

    def statistics_triangles(self, shape: tuple[int, ...]) -> Triangles | None:
        """What is averaged has the mean as a column beside the channels' matrix."""
        return None

    def stored_triangles(self, request: Request) -> Triangles | None:
        """What is stored has the mean's row and its corner beside the channels' matrix."""
        return None

    def cov_of(self, value: Array) -> Array:
        """The covariance of the channels, centred."""
        return value[:, :-1]

    def register(self, request: Request) -> None:
        """Keep the inverse from the next refresh on; other functions have no such form."""
        if request.kind not in ("matpower", "eigen"):
            what = "eigenbasis" if request.kind == "eigenbasis" else "Cholesky factor"
            raise NotImplementedError(
                f"a factor with spatially uncorrelated activations has no {what} of its own "
                "form. Use ConvInputKroneckerFactor (approx='kron')."
            )
        if request.kind == "matpower" and request.exp not in (1.0, -1.0):
            raise ValueError(
                "`exp` must be 1 or -1 for a factor with spatially uncorrelated activations; got "
                f"{request.exp:g}. Use damping_split='exact', or ConvInputKroneckerFactor "
                "(approx='kron'), for other powers."
            )
        super().register(request)

    def operator(self, value: Array) -> UncorrelatedTaps:
        """The matrix of the whole patches, undamped."""
        return self._damped(value, 0.0)

    def damped_eigen(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> tuple[Spectrum, Scalar]:
        """Spectrum of the matrix of the whole patches, and the damping, as last computed."""
        stored = self.cache.fetch(request, owner)
        c, xp = self.num_channels, array_namespace(stored)
        size, parts, start = c + self.has_bias, [], 0
        for rows in (c, size):
            values, start = stored[start : start + rows], start + rows
            vectors, start = stored[start : start + rows * rows], start + rows * rows
            parts.append((values, xp.reshape(vectors, (rows, rows))))
        spectrum = spectrum_of_taps(parts[0], parts[1], self.num_taps, self.has_bias)
        return spectrum, stored[-1]

    def serve(
        self, request: Request, read_value: Callable[[], Array], owner: str
    ) -> LinearOperator:
        """The damped matrix of now, or its inverse as last computed."""
        if (request.kind, request.exp) == ("matpower", 1.0):
            value = read_value()
            return self._damped(value, as_scalar_like(request.damping.read(), value))
        stored = self.cache.fetch(request, owner)
        c, inverse = self.num_channels, self._inverse_in(stored)
        scaled_mean, corner, coefficient = stored[c * c : -2], stored[-2], stored[-1]
        base = RepeatedBlock(inverse, self.num_taps, corner if self.has_bias else None)
        if self.options.assume_zero_mean_activations:
            return base
        return RankOneUpdate(base, self._tiled(scaled_mean, corner), -coefficient)

    def _stored_shape(self, request: Request, n: int) -> tuple[int, ...]:
        border = n + self.has_bias
        if request.kind == "eigen":
            return (n + n * n + border + border * border + 1,)
        return (n * n + n + 2,)

    def _stored_identity(self, request: Request, identity: Array) -> Array:
        if request.kind == "eigen":
            xp, size = array_namespace(identity), self.num_channels + self.has_bias
            border = xp.eye(size, dtype=identity.dtype, device=device_of(identity))
            channels, of_the_mean = ((xp.linalg.diagonal(m), m) for m in (identity, border))
            return _packed_spectra(channels, of_the_mean, 0 * identity[0, 0])
        zero = 0 * identity[0, 0]
        return _packed(identity, 0 * identity[0, :], 1 + zero, zero)

    def _last_inverse(self, request: Request) -> Array | None:
        stored = self.cache.stored.get(request)
        return None if stored is None else self._inverse_in(stored)

    def _inverse_in(self, stored: Array) -> Array:
        """The inverse of the damped covariance of the channels, within what is stored."""
        c = self.num_channels
        return array_namespace(stored).reshape(stored[: c * c], (c, c))

    def _compute(
        self,
        prepared: Prepared,
        value: Array,
        inverses: dict[Request, tuple[Array, ...]],
        eigen: Eigen | None,
    ) -> tuple[dict[Request, Array], list[Array]]:
        computed, checks = super()._compute(prepared, value, inverses, eigen)
        xp, mean = array_namespace(value), value[:, -1]
        arrays = {}
        for request, inverse in computed.items():
            damping = prepared.dampings[request]
            if request.kind == "eigen":
                assert eigen is not None
                of_the_mean = self._damped(value, 0.0).of_the_mean()
                pairs = (eigen.values, eigen.vectors), linalg.psd_eigh(of_the_mean)
                arrays[request] = _packed_spectra(*pairs, 0 * mean[0] + damping)
                checks.append(without_residual(arrays[request]))
                continue
            scaled_mean = xp.matmul(inverse, mean)
            corner = xp.ones_like(mean[0]) / damping
            size = 1 + self.num_taps * xp.sum(mean * scaled_mean)
            coefficient = 1 / (size + corner if self.has_bias else size)
            if not self.has_bias:
                corner = 0 * corner
            arrays[request] = _packed(inverse, scaled_mean, corner, coefficient)
            checks.append(without_residual(arrays[request]))
        return arrays, checks

    def _damped(self, value: Array, damping: Scalar) -> UncorrelatedTaps:
        cov, mean = self.cov_of(value), value[:, -1]
        corner = array_namespace(value).ones_like(mean[0]) * damping if self.has_bias else None
        mean = None if self.options.assume_zero_mean_activations else mean
        return UncorrelatedTaps(linalg.add_to_diagonal(cov, damping), mean, self.num_taps, corner)

    def _tiled(self, channels: Array, last: Array) -> Array:
        """``kron(ones(J), channels)``, with `last` appended for a bias."""
        xp = array_namespace(channels)
        vector = xp.tile(channels, (self.num_taps,))
        return xp.concat([vector, xp.reshape(last, (1,))]) if self.has_bias else vector


def _packed(inverse: Array, scaled_mean: Array, corner: Array, coefficient: Array) -> Array:
    """One vector of what an inverse is made of: ``K``, ``K mu``, the bias's entry, the scale."""
    xp = array_namespace(inverse)
    scalars = xp.stack([corner, coefficient])
    return xp.concat([xp.reshape(inverse, (-1,)), scaled_mean, scalars])


def _packed_spectra(
    channels: tuple[Array, Array], of_the_mean: tuple[Array, Array], damping: Array
) -> Array:
    """One vector of eigenvalues and eigenvectors of both blocks of the taps, and the damping."""
    xp = array_namespace(damping)
    pieces = [xp.reshape(a, (-1,)) for pair in (channels, of_the_mean) for a in pair]
    return xp.concat([*pieces, xp.reshape(damping, (1,))])
