"""Blocks of convolution layers, over any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from kfac_xp.batches import Placeholder
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_blocks.locations import SharedOverLocations
from kfac_xp.fisher_factors import (
    ConvInputKroneckerFactor,
    ConvInputSUAKroneckerFactor,
    ConvOutputKroneckerFactor,
    FisherFactor,
)
from kfac_xp.fisher_factors.convolution import require_extract_patches_fn
from kfac_xp.geometry import Padding
from kfac_xp.layer_specs import ConvolutionKind, ConvolutionSpec
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params


class Convolution(SharedOverLocations):
    """What the blocks of a convolution share: what is known of it, and the form of its data.

    `spec` says what the layer is. The rest of the block sees an ordinary convolution of the
    `geometry`, channels last, of `groups` groups and with kernels of `filter_shape`.
    """

    spec: ConvolutionSpec
    takes_groups: ClassVar[bool] = False
    """Whether there may be several groups of channels."""

    with_groups: ClassVar[str] = "ConvGroupedKFCFB"
    """The block of the same kind that takes groups, if this does not."""

    takes_subsampling: ClassVar[bool] = False
    """Whether the input factor may be made of a part of the batch."""

    dilation_argument: ClassVar[str] = "dilation_rate"
    """What the constructor calls the dilation."""

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None,
        dilation: Sequence[int] | None,
        data_format: str | None,
        num_locations: int | None,
        *,
        kernel_layout: str | None = None,
        groups: int = 1,
        kind: ConvolutionKind = "convolution",
        output_padding: Sequence[int] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(layer_collection, num_locations=num_locations, **keywords)
        self.spec = ConvolutionSpec.create(
            params,
            padding,
            strides,
            dilation,
            data_format=data_format,
            kernel_layout=kernel_layout,
            groups=groups,
            kind=kind,
            output_padding=output_padding,
        )
        if groups > 1 and not self.takes_groups:
            raise ValueError(
                f"{type(self).__name__} has no groups; got `groups`={groups}. Use "
                f"{self.with_groups} or ConvDiagonalFB."
            )
        self.groups = self.spec.groups
        self.filter_shape = self.spec.filter_shape
        self.has_bias = self.spec.has_bias
        self.geometry = self.spec.geometry

    @property
    def _num_axes_of_tower(self) -> int:
        return self.geometry.num_axes + 2

    def _locations_of(self, tower: Any) -> int:
        image = tower[0] if isinstance(tower, (list, tuple)) else tower  # of the first use
        return math.prod(self.spec.output_space(image.shape))

    def _inputs_in(self, tower: Any) -> Any:
        if isinstance(tower, Placeholder):
            return tower
        if tower.ndim == self._num_axes_of_tower:  # the factors refuse others
            self._require_locations(tower)
        return self.spec.inputs_in(tower)

    def _grads_in(self, tower: Any) -> Any:
        return tower if isinstance(tower, Placeholder) else self.spec.grads_in(tower)

    def _require_locations(self, images: Array) -> None:
        """Refuse images of which a transposed convolution cuts off everything."""
        if self.spec.transposed is not None and 0 in self.spec.output_space(images.shape):
            raise ValueError(
                f"`{self.name}: inputs` of shape {tuple(images.shape)} leave no outputs of the "
                f"transposed convolution: its padding, {self.spec.transposed.adjoint.padding}, "
                "cuts off all of them. Use less padding, or larger images."
            )

    def _hint(self, array: Array) -> str:
        return f" ({self.spec.data_words})" if self.spec.data_words else ""

    @property
    def _param_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.spec.shapes

    def _input_pattern(self) -> tuple[int | str, ...]:
        return self.spec.input_pattern()

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return self.spec.output_pattern(inputs.shape)


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
        None, which is channels last, or the order of the data's axes, such as ``"NCHW"``.
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
    kernel_layout, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`: the order of the kernel's axes, and
        what a transposed convolution is made by.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the geometry is impossible, there are groups, or the SUA approximation is asked for
        together with a mask, subsampling or a transposed convolution, which it does not have.

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
        if use_sua_approx_for_input_factor and self.spec.transposed is not None:
            raise ValueError(
                "`use_sua_approx_for_input_factor` takes every pixel to be like the others, and "
                "of those that a transposed convolution reads most are zeros between pixels. "
                "Leave the approximation out."
            )
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

    takes_subsampling = True

    @property
    def renorm_coeff(self) -> float:
        """The number of locations."""
        return float(self.num_locations)

    @property
    def num_replications(self) -> int:
        """The number of locations."""
        return self.num_locations

    def input_key(self) -> tuple[Any, ...]:
        """See `FisherBlock.input_key`."""
        *kernel_and_inputs, _ = self.filter_shape
        side = (self.has_bias, self.use_sua_approx_for_input_factor)
        drawn = (id(self.patch_mask), id(self.generator))
        form = (self.geometry, self.spec.transposed, self.spec.data)
        return (type(self), tuple(kernel_and_inputs), *form, *side, *drawn, self.options)

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
