"""Blocks of a tensor-normal model of each case's gradient: TNT."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from kfac_xp.damping import normalize_damping
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB
from kfac_xp.fisher_blocks.grouped import ConvGroupedKFCFB, channels_of_group
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_blocks.multi_use import ConvKFCBasicMultiIndepFB, FullyConnectedMultiIndepFB
from kfac_xp.fisher_blocks.whole_cases import (
    WholeCases,
    dense_places,
    places_and_uses_of,
    places_of,
)
from kfac_xp.fisher_factors import (
    ConvTensorNormalFactor,
    FisherFactor,
    FullyConnectedTensorNormalFactor,
    moments_of_groups,
)
from kfac_xp.fisher_factors.tensor_normal import GradientSide
from kfac_xp.geometry import Padding
from kfac_xp.grouped_moments import GroupedConvTensorNormalMoment
from kfac_xp.typing import Array, Params, Scalar


class TensorNormalFB(WholeCases):
    """A block ``kron(E[g g^T], E[g^T g]) / E[|g|**2]`` of each case's gradient g as a matrix.

    It is the covariance of a matrix-normal law with these second moments, and has the trace of the
    Fisher, exactly. Both factors are divided by ``sqrt(E[|g|**2])``; damping is split between them
    as for `KroneckerProductFB`, which then gives ``pi = sqrt(d_out / d_in)``, and is not divided by
    the number of places: the gradients are sums over all at which the weights are applied.
    """

    @property
    def renorm_coeff(self) -> float:
        """1: there is no number of places in the block."""
        return 1.0

    @property
    def num_replications(self) -> int:
        """1."""
        return 1

    @property
    def damping(self) -> Scalar:
        """``L * damping / L ** normalize_damping_power`` for L places: damping at power 1."""
        return super().damping  # type: ignore[misc]

    def input_moments(
        self, inputs: list[Any], done: Container[FisherFactor] = ()
    ) -> dict[FisherFactor, Array]:
        """Nothing: both factors need the gradients."""
        self._required_inputs(inputs)
        return {}

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moments of both factors."""
        xs, gs = self._checked_cases(inputs, grads, source)
        return {
            factor: factor.compute_new_cov(inputs=xs, outputs_grads=[gs])
            for factor in self.factors.values()
            if factor not in done
        }

    def input_key(self) -> Any:
        """None: the input factor depends on the gradients, too."""
        return None

    @property
    def _num_places(self) -> int:
        """At how many places the weights are applied to a case."""
        return 1

    def _normalized(self, damping: Scalar) -> Scalar:
        power, places = self.options.normalize_damping_power, self._num_places
        return places * normalize_damping(damping, places, power)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        """None but those of whole gradients."""

    def _make_sides(
        self, cls: type[FisherFactor], inputs: list[Any], grads: list[Any], **keywords: Any
    ) -> None:
        """Both factors, of towers that were given to `_make_case_factors`."""
        cases = self._bound_cases(inputs, grads)
        self.input_factor = self._factor("input", cls, *cases, **keywords, side="input")
        self.output_factor = self._factor("output", cls, *cases, **keywords, side="output")

    input_factor: Any
    output_factor: Any


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

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedTensorNormalFactor
        self._make_sides(cls, inputs, grads, has_bias=self.has_bias)


class FullyConnectedMultiTNTFB(TensorNormalFB, FullyConnectedMultiIndepFB):
    """TNT FisherBlock for dense layers used several times.

    Estimates ``F(W) = kron(E[g g^T], E[g^T g]) / E[|g|**2]`` with ``g = sum_u a_u ds_u^T``, the sum
    over uses: it does not take them to be independent.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    num_uses
        U; what the first batch has if None. Data are described in
        `InputOutputMultiTowerMultiUse`.
    name, **options
        As for `FisherBlock`; and `kernel_layout`, as for `FullyConnectedKFACBasicFB`.

    References
    ----------
    Ren and Goldfarb (2021), arXiv:2106.02925.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        num_uses: int | None = None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        sides = False, False  # which are full
        super().__init__(layer_collection, has_bias, num_uses, *sides, name=name, **options)

    @property
    def _num_places(self) -> int:
        return self.num_uses

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        xs, sources = self._bound_cases(inputs, grads)
        d_in, d_out = (int(side[0].shape[-1]) for side in (xs, sources[0]))
        places = dense_places(d_in, d_out, self.has_bias)
        self._make_sides(ConvTensorNormalFactor, inputs, grads, **places)


class ConvTNTFB(TensorNormalFB, Convolution, KroneckerProductFB):
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

    with_groups = "ConvGroupedTNTFB"

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
    def _num_places(self) -> int:
        return self.num_locations

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        places = places_of(self, self.patch_mask)
        self._make_sides(ConvTensorNormalFactor, inputs, grads, **places)


class ConvMultiTNTFB(TensorNormalFB, ConvKFCBasicMultiIndepFB):
    """TNT FisherBlock for convolutions used several times.

    As `ConvTNTFB` with ``g = sum_{u,t} a_ut ds_ut^T``, the sum over uses and locations.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvKFCBasicFB`.
    num_uses
        U; what the first batch has if None. Data are described in
        `InputOutputMultiTowerMultiUse`.
    num_locations
        As for `ConvTNTFB`.
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
        num_uses: int | None = None,
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
            num_uses=num_uses,
            patch_mask=patch_mask,
            num_locations=num_locations,
            name=name,
            **options,
        )

    takes_subsampling = False

    @property
    def _num_places(self) -> int:
        return self.num_locations * self.num_uses

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        places = places_and_uses_of(self, self.patch_mask)
        self._make_sides(ConvTensorNormalFactor, inputs, grads, **places)


class ConvGroupedTNTFB(TensorNormalFB, ConvGroupedKFCFB):
    """TNT FisherBlock for convolutions whose channels are split into groups.

    For each group k ``F_k = kron(E[g_k g_k^T], E[g_k^T g_k]) / E[|g_k|**2]`` with the group's
    gradient ``g_k = sum_t a_t ds_t^T``, and nothing between groups. A depthwise convolution has as
    many groups as input channels. The factors of a group are ``factors["input_k"]`` and
    ``factors["output_k"]``; their moments are made in one pass over the gradients for each side.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvGroupedKFCFB`.
    num_locations
        As for `ConvTNTFB`.
    kernel_layout, groups, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        As for `ConvGroupedKFCFB`.

    References
    ----------
    Ren and Goldfarb (2021), arXiv:2106.02925.
    """

    def source_moments(
        self,
        inputs: list[Any],
        grads: Any,
        source: int = 0,
        done: Container[FisherFactor] = (),
    ) -> dict[FisherFactor, Array]:
        """The moments of all factors."""
        xs, gs = self._checked_cases(inputs, grads, source)
        towers = [(x, g, self.patch_mask) for x, g in zip(xs, gs, strict=True)]
        layer = self.geometry, self.spec.in_channels, self.spec.out_channels, self.groups
        moments: dict[FisherFactor, Array] = {}
        sides: tuple[tuple[GradientSide, Any], ...] = (
            ("input", self.input_factors),
            ("output", self.output_factors),
        )
        for side, factors in sides:
            if factors[0] not in done:
                moment = GroupedConvTensorNormalMoment(*layer, self.has_bias, side)
                moments |= moments_of_groups(factors, moment, towers)
        return moments

    @property
    def _num_places(self) -> int:
        return self.num_locations

    def _make_case_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        xs, sources = self._bound_cases(inputs, grads)
        places = places_of(self, self.patch_mask)
        rows, columns = self.filter_shape[-2], self.filter_shape[-1] // self.groups
        places["filter_shape"] = (*self.filter_shape[:-1], columns)
        cls = ConvTensorNormalFactor
        self.input_factors, self.output_factors = [], []
        for k in range(self.groups):
            own = [channels_of_group(x, k, rows) for x in xs]
            own_grads = [[channels_of_group(g, k, columns) for g in gs] for gs in sources]
            made = [
                self._factor(f"{side}_{k}", cls, own, own_grads, **places, side=side)
                for side in ("input", "output")
            ]
            self.input_factors.append(made[0])
            self.output_factors.append(made[1])
