"""The input factor of a convolution whose pixels are taken to be uncorrelated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kfac_xp.backend import array_namespace
from kfac_xp.batches import as_towers, example_of
from kfac_xp.changes import Change
from kfac_xp.fisher_factors.convolution import images_shape, require_images_of
from kfac_xp.fisher_factors.forms import InverseProvidingFactor
from kfac_xp.fisher_factors.fully_connected import towers_of
from kfac_xp.geometry import ConvGeometry
from kfac_xp.moments import ConvInputSUAMoment
from kfac_xp.options import FactorOptions
from kfac_xp.representations import SpatiallyUncorrelated
from kfac_xp.typing import Array, Scalar, Towers


class ConvInputSUAKroneckerFactor(InverseProvidingFactor):
    """Kronecker factor for the input side of a convolution, with uncorrelated pixels.

    KFC's "spatially uncorrelated activations": pixels at different positions are taken to be
    uncorrelated, so that the second moment of a patch follows from the covariance and the mean of
    the channels, estimated over all cases and input positions (padding and strides play no role):

        F = kron(I_J, cov) + h h^T,   h = kron(ones(J), mu)  (and a final 1 for a bias)

    with J taps. Rows and columns are in the order of the kernel's rows, taps first. The covariance
    is centred batch by batch; `cov` and `mu` are averaged alike. It serves powers 1 and -1, the
    inverse by the Sherman-Morrison formula, eigenvectors (`register_damped_eigen`), and no
    Cholesky factors.

    Parameters
    ----------
    inputs : arrays of shape [N, *space, C_in]
        List index is tower.
    filter_shape
        ``(*kernel, C_in, C_out)``.
    has_bias
        Append a row and column for the bias.
    **options
        Fields of `FactorOptions`, and ``name``. With `assume_zero_mean_activations`, h is left out
        (and the bias's entry is the damping alone).

    Raises
    ------
    ValueError
        If the inputs do not have the filter's axes and channels, or a power is not 1 or -1.
    NotImplementedError
        If a Cholesky factor is asked for.

    References
    ----------
    Grosse and Martens (2016), arXiv:1602.01407, section 4.2, theorem 4 and equation 35.
    """

    data_names = ("inputs",)
    representation = SpatiallyUncorrelated
    _powers: SpatiallyUncorrelated

    def __init__(
        self,
        inputs: Towers,
        filter_shape: Sequence[int],
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        *kernel, c_in, _ = filter_shape
        self.geometry = ConvGeometry.create(kernel)
        self.has_bias = bool(has_bias)
        data = {"inputs": [as_towers("inputs", inputs)]}
        require_images_of(
            "inputs[0]", example_of(data["inputs"]), self.geometry, c_in, filter_shape
        )
        moment = ConvInputSUAMoment(c_in)
        super().__init__(moment, data, FactorOptions().changed(**options), name)

    @property
    def mu(self) -> Array:
        """The mean of the channels, shape [C_in, 1]; not used if it is assumed to be zero."""
        return self._value()[:, -1:]

    def average_step(
        self, new_cov: Array, *, ema_decay: Scalar, ema_weight: Scalar | None = None
    ) -> list[Change]:
        """As of any factor, with the covariance centred unless the options say otherwise.

        `new_cov`, as `compute_new_cov` has it, is not: only so can it be averaged over towers and
        ranks first.
        """
        xp, options = array_namespace(new_cov), self.options
        second, mean = new_cov[:, :-1], new_cov[:, -1:]
        if not options.assume_zero_mean_activations or options.subtract_mean_contrib_from_cov:
            second = second - mean * xp.matrix_transpose(mean)
        new_cov = xp.concat([second, mean], axis=1)
        return super().average_step(new_cov, ema_decay=ema_decay, ema_weight=ema_weight)

    def _make_powers(self, options: FactorOptions) -> SpatiallyUncorrelated:
        channels, taps = self.moment.in_channels, self.geometry.num_taps
        return SpatiallyUncorrelated(options, channels, taps, self.has_bias)

    def _sources(self, *, inputs: Towers) -> Iterator[list[tuple[Array, ...]]]:
        xs = towers_of("inputs", inputs)
        shape = images_shape(self.geometry.num_axes, self.moment.in_channels)
        for t, x in enumerate(xs):
            self._require(f"inputs[{t}]", x, shape, "with the channels of the filter")
        yield [(x,) for x in xs]

    moment: ConvInputSUAMoment
