"""Blocks of convolution layers, over any number of spatial axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kfac_xp.batches import Placeholder
from kfac_xp.damping import normalize_damping
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.diagonal import DiagonalFB
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_blocks.towers import InputOutputMultiTower, LayerFactorFB
from kfac_xp.fisher_factors import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvInputSUAKroneckerFactor,
    ConvOutputKroneckerFactor,
    FisherFactor,
)
from kfac_xp.fisher_factors.convolution import images_shape, require_extract_patches_fn
from kfac_xp.geometry import ConvGeometry, Padding, require_channels_last
from kfac_xp.params import param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.representations import read_damping
from kfac_xp.typing import Array, Params, Scalar


class Convolution(InputOutputMultiTower):
    """What the blocks of a convolution share: its geometry, and how often the filter is applied."""

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None,
        dilation: Sequence[int] | None,
        data_format: str | None,
        num_locations: int | None,
        **keywords: Any,
    ) -> None:
        super().__init__(layer_collection, **keywords)
        require_channels_last(data_format)
        self._shapes = param_shapes(params)
        self.filter_shape = self._shapes[0]
        self.has_bias = len(self._shapes) == 2
        if len(self.filter_shape) < 3:
            raise ValueError(
                "`params` must have a kernel of shape [*kernel, C_in, C_out] with at least one "
                f"spatial axis; got shape {self.filter_shape}."
            )
        if self.has_bias and self._shapes[1] != self.filter_shape[-1:]:
            raise ValueError(
                f"the bias in `params` must have shape {self.filter_shape[-1:]}, the kernel's "
                f"outputs; got {self._shapes[1]}."
            )
        self.geometry = ConvGeometry.create(self.filter_shape[:-2], strides, padding, dilation)
        if num_locations is not None and num_locations < 1:
            raise ValueError(f"`num_locations` must be a positive int; got {num_locations}.")
        self._given_num_locations = num_locations
        self._seen_num_locations: int | None = None

    @property
    def num_locations(self) -> int:
        """How often the filter is applied to one case.

        Raises
        ------
        RuntimeError
            Before the first batch, unless it was given.
        """
        count = self._given_num_locations or self._seen_num_locations
        if count is None:
            raise RuntimeError(
                f"{self.name} does not know its number of locations yet: the first batch fixes "
                "it. Update the covariance first, or pass `num_locations`."
            )
        return count

    def note_batch(self, inputs: list[Any]) -> None:
        """Fix the number of locations by the first batch."""
        super().note_batch(inputs)
        if self._seen_num_locations is None:
            self._seen_num_locations = self.geometry.num_locations(self._space_of(inputs[0]))

    def own_state_dict(self) -> dict[str, Any]:
        """The number of locations, once a batch was seen."""
        seen = self._seen_num_locations
        return super().own_state_dict() | ({} if seen is None else {"num_locations": seen})

    def load_own_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `own_state_dict`."""
        super().load_own_state_dict(state)
        if "num_locations" in state:
            self._seen_num_locations = int(state["num_locations"])

    def _check_towers(self, inputs: list[Any]) -> None:
        super()._check_towers(inputs)
        arrays = [x for x in inputs if not isinstance(x, Placeholder)]
        if arrays and all(x.ndim >= self.geometry.num_axes + 2 for x in arrays):
            self._require_same_locations(arrays)
            self.note_batch(arrays)

    def _checked_inputs(self, inputs: list[Any]) -> list[Array]:
        towers = super()._checked_inputs(inputs)
        self._require_same_locations(inputs)
        return towers

    def _space_of(self, tower: Any) -> tuple[int, ...]:
        """Spatial shape of the images of one tower, of its first use if there are several."""
        image = tower[0] if isinstance(tower, (list, tuple)) else tower
        return tuple(image.shape[-1 - self.geometry.num_axes : -1])

    def _require_same_locations(self, inputs: list[Any]) -> None:
        counts = [self.geometry.num_locations(self._space_of(x)) for x in inputs]
        expected = self._seen_num_locations or counts[0]
        for t, count in enumerate(counts):
            if count != expected:
                raise ValueError(
                    f"`{self.name}: inputs[{t}]` of shape {tuple(inputs[t].shape)} gives {count} "
                    f"locations of the filter, but the first batch fixed {expected}: the factors "
                    "are means over locations and the block multiplies by their number. Use "
                    "images of one size, or a block per size."
                )

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes

    def _input_pattern(self) -> tuple[int | str, ...]:
        return images_shape(self.geometry.num_axes, self.filter_shape[-2])

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        out = self.geometry.output_shape(inputs.shape[1:-1])
        return (inputs.shape[0], *out, self.filter_shape[-1])


class ConvKFCBasicFB(Convolution, KroneckerProductFB):
    """FisherBlock for convolutional layers using the basic KFC approximation.

    Consider a convolutional layer with filter matrix w. For a mini-batch that produces inputs a
    and output preactivations s, this block estimates

        F(w) = #locations * kronecker(E[flat(a) flat(a)^T], E[flat(ds) flat(ds)^T])

    where ``ds = (d / ds) log p(y | x, w)`` and #locations is the number of positions where w is
    applied. The expectation is taken over all cases and locations, and flat() concatenates an
    array's leading dimensions. The block's damping is divided by #locations before it is split
    between the factors, so that the block carries about the damping in total.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        The layer's kernel [*kernel, C_in, C_out], or a pair (kernel, bias). Only shapes are read.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    strides, dilation_rate
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``.
    data_format
        None or a name that ends in "C".
    extract_patches_fn, sub_sample_inputs, sub_sample_patches
        As for `ConvInputKroneckerFactor`.
    use_sua_approx_for_input_factor
        Take activations at different positions to be uncorrelated: `ConvInputSUAKroneckerFactor`.
    patch_mask : shape [*kernel, C_in]
        Multiplies each patch.
    num_locations
        Used in place of the true number; releases to r1.10 had ``h * w // (s1 * s2)``.
    generator
        Draws the subsamples: a seed or a generator.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the geometry is impossible, or the SUA approximation is asked for together with a mask
        or subsampling, which it does not have.

    References
    ----------
    Grosse and Martens (2016), arXiv:1602.01407, equation 23.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        use_sua_approx_for_input_factor: bool = False,
        patch_mask: Array | None = None,
        *,
        num_locations: int | None = None,
        generator: Generator | None = None,
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        if sub_sample_inputs is not None:
            keywords["sub_sample_inputs"] = bool(sub_sample_inputs)
        if sub_sample_patches is not None:
            keywords["sub_sample_patches"] = bool(sub_sample_patches)
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            num_locations,
            name=name,
            **keywords,
        )
        require_extract_patches_fn(extract_patches_fn, self.geometry)
        self.use_sua_approx_for_input_factor = bool(use_sua_approx_for_input_factor)
        self.patch_mask = patch_mask
        self.generator = generator
        if use_sua_approx_for_input_factor and (
            patch_mask is not None or sub_sample_inputs or sub_sample_patches
        ):
            raise ValueError(
                "`use_sua_approx_for_input_factor` forms no patches, so it takes no `patch_mask` "
                "and does not subsample. Leave them out, or the approximation."
            )

    @property
    def renorm_coeff(self) -> float:
        """The number of locations."""
        return float(self.num_locations)

    @property
    def damping(self) -> Scalar:
        """The block's damping divided by ``num_locations ** normalize_damping_power``."""
        return self._normalized_damping(self.num_locations)

    def input_key(self) -> tuple[Any, ...]:
        """See `FisherBlock.input_key`."""
        *kernel_and_inputs, _ = self.filter_shape
        side = (self.has_bias, self.use_sua_approx_for_input_factor)
        drawn = (id(self.patch_mask), id(self.generator))
        return (type(self), tuple(kernel_and_inputs), self.geometry, *side, *drawn, self.options)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        if self.use_sua_approx_for_input_factor:
            self.input_factor = self._factor(
                "input", ConvInputSUAKroneckerFactor, inputs, self._input_filter, self.has_bias
            )
        else:
            self.input_factor = self._input_factor(inputs)
        self.output_factor = self._output_factor(grads)

    def _input_factor(self, inputs: list[Any]) -> FisherFactor:
        cls = ConvInputKroneckerFactor
        return self._factor("input", cls, inputs, *self._geometry_arguments(), **self._extra())

    def _output_factor(self, grads: list[list[Any]]) -> FisherFactor:
        return self._factor("output", ConvOutputKroneckerFactor, grads)

    def _extra(self) -> dict[str, Any]:
        """Arguments of the input factor by name."""
        return {"patch_mask": self.patch_mask, "generator": self.generator}

    def _geometry_arguments(self) -> tuple[Any, ...]:
        """What the constructor of the input factor takes after the inputs."""
        geometry = self.geometry
        return (
            self._input_filter,
            geometry.padding,
            geometry.strides,
            geometry.dilation,
            None,
            None,
            self.has_bias,
        )

    @property
    def _input_filter(self) -> tuple[int, ...]:
        """The filter's shape for the input factor, which is the same for any number of outputs."""
        return (*self.filter_shape[:-1], 1)


class ConvDiagonalFB(LayerFactorFB, Convolution, DiagonalFB):
    """FisherBlock for convolutional layers using a diagonal approximation.

    Estimates the diagonal of the Fisher as the mean over cases of the squared entries of each
    case's gradient, ``(sum over locations of a ds^T) ** 2``.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    params
        The layer's kernel [*kernel, C_in, C_out], or a pair (kernel, bias). Only shapes are read.
    strides, dilations
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    data_format
        None or a name that ends in "C".
    patch_mask : shape [*kernel, C_in]
        Multiplies each patch.
    num_locations
        Used in place of the true number in the damping; matters only if
        `normalize_damping_power` is not 1.
    name, **options
        As for `FisherBlock`.
    """

    factor: ConvDiagonalFactor

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        strides: Sequence[int] | None,
        padding: Padding,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        patch_mask: Array | None = None,
        *,
        num_locations: int | None = None,
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilations,
            data_format,
            num_locations,
            name=name,
            **keywords,
        )
        self.patch_mask = patch_mask

    @property
    def damping(self) -> Scalar:
        """``L * damping / L ** normalize_damping_power`` for L locations: damping at power 1."""
        self._require_factors()
        damping, power = read_damping(self._damping), self.options.normalize_damping_power
        return self.num_locations * normalize_damping(damping, self.num_locations, power)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        geometry = self.geometry
        self.factor = self._factor(
            "diagonal",
            ConvDiagonalFactor,
            inputs,
            grads,
            self.filter_shape,
            geometry.strides,
            geometry.padding,
            None,
            geometry.dilation,
            self.has_bias,
            self.patch_mask,
        )
