"""Blocks of a tensor-normal model of each case's gradient: TNT."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from kfac_xp.damping import normalize_damping
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_factors import (
    ConvTensorNormalFactor,
    FisherFactor,
    FullyConnectedTensorNormalFactor,
)
from kfac_xp.geometry import Padding
from kfac_xp.typing import Array, Params, Scalar


class TensorNormalFB(KroneckerProductFB):
    """A block ``kron(E[g g^T], E[g^T g]) / E[|g|**2]`` of each case's gradient g as a matrix.

    It is the covariance of a matrix-normal law with these second moments, and has the trace of the
    Fisher, exactly. Both factors are divided by ``sqrt(E[|g|**2])``; damping is split between them
    as for `KroneckerProductFB`, which then gives ``pi = sqrt(d_out / d_in)``, and is not divided by
    the number of locations: the gradients are sums over them.
    """

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """Nothing: both factors need the gradients."""
        self._checked_inputs(inputs)
        return {}

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moments of both factors."""
        xs, gs = self._checked_inputs(inputs), self._checked_grads(inputs, grads, source)
        return {
            factor: factor.compute_new_cov(inputs=xs, outputs_grads=[gs])
            for factor in self.factors.values()
            if factor not in done
        }

    def input_key(self) -> Any:
        """None: the input factor depends on the gradients, too."""
        return None


class FullyConnectedTNTFB(TensorNormalFB, FullyConnectedKFACBasicFB):
    """TNT FisherBlock for dense layers.

    Estimates ``F(W) = kron(E[|ds|**2 a a^T], E[|a|**2 ds ds^T]) / E[|a|**2 |ds|**2]``: a case
    counts by how large its gradient is. Equal to K-FAC where inputs and gradients are independent.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    name, **options
        As for `FisherBlock`.

    References
    ----------
    Ren and Goldfarb (2021), arXiv:2106.02925.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layer_collection, has_bias, name=name, **options)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls, arguments = FullyConnectedTensorNormalFactor, (inputs, grads, self.has_bias)
        self.input_factor = self._factor("input", cls, *arguments, side="input")
        self.output_factor = self._factor("output", cls, *arguments, side="output")


class ConvTNTFB(TensorNormalFB, Convolution):
    """TNT FisherBlock for convolutions over any number of axes.

    Estimates ``F(w) = kron(E[g g^T], E[g^T g]) / E[|g|**2]`` with ``g = sum_t a_t ds_t^T``, the
    sum over locations, of shape [prod(kernel) * C_in (+ 1), C_out]. The paper divides the rows
    into taps and channels, with a factor for each; here they are one side, as in K-FAC, to which
    the bias belongs.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvKFCBasicFB`.
    num_locations
        Used in place of the true number in the damping; matters only if `normalize_damping_power`
        is not 1.
    name, **options
        As for `FisherBlock`.

    References
    ----------
    Ren and Goldfarb (2021), arXiv:2106.02925.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        patch_mask: Array | None = None,
        *,
        num_locations: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            num_locations,
            name=name,
            **options,
        )
        self.patch_mask = patch_mask

    @property
    def damping(self) -> Scalar:
        """``L * damping / L ** normalize_damping_power`` for L locations: damping at power 1."""
        return super().damping

    def _normalized(self, damping: Scalar) -> Scalar:
        power = self.options.normalize_damping_power
        return self.num_locations * normalize_damping(damping, self.num_locations, power)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls, geometry = ConvTensorNormalFactor, self.geometry
        arguments = (
            inputs,
            grads,
            self.filter_shape,
            geometry.strides,
            geometry.padding,
            geometry.dilation,
            self.has_bias,
            self.patch_mask,
        )
        self.input_factor = self._factor("input", cls, *arguments, side="input")
        self.output_factor = self._factor("output", cls, *arguments, side="output")
