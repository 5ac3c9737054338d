"""Factors of convolution layers, over any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kfac_xp.backend import array_namespace
from kfac_xp.batches import as_sources, as_towers, bind, example_of, require_same_place
from kfac_xp.changes import Change
from kfac_xp.fisher_factors.forms import DiagonalFactor, InverseProvidingFactor
from kfac_xp.fisher_factors.fully_connected import require_as_many_towers, towers_of
from kfac_xp.geometry import ConvGeometry, Padding, require_channels_last
from kfac_xp.moments import (
    ConvDiagonalMoment,
    ConvInputMoment,
    ConvOutputMoment,
)
from kfac_xp.options import FactorOptions
from kfac_xp.randomness import Generator, as_generator, saved_draws, subset
from kfac_xp.state import Saved
from kfac_xp.typing import Array, Sources, Towers


class ConvInputKroneckerFactor(InverseProvidingFactor):
    """Kronecker factor for the input side of a convolutional layer.

    Estimates ``E[a a^T]`` where a is the patch of the layer's input under the filter, flattened
    in the order of the kernel's rows, with 1 appended if `has_bias`. Expectation is taken over
    all cases and locations: divided by both. Equivalent to Omega in KFC divided by the number of
    locations.

    Parameters
    ----------
    inputs : arrays of shape [N, *space, C_in]
        List index is tower.
    filter_shape
        ``(*kernel, C_in, C_out)``.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    strides, dilation_rate
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``.
    data_format
        None or a name that ends in "C".
    extract_patches_fn
        None, ``"extract_convolution_patches"``, ``"extract_image_patches"`` (2-D) or
        ``"extract_pointwise_conv2d_patches"`` (1x1, stride 1). They give the same numbers; the
        name is checked against the geometry.
    has_bias
        Append 1 to each patch.
    sub_sample_inputs, sub_sample_patches
        Keep a random part of the cases, or of the patches; None takes the options' value. How
        many is set by options; the average is over what was kept.
    patch_mask : shape [*kernel, C_in]
        Multiplies each patch, before the 1 is appended.
    generator
        Draws the subsamples: a seed, or a generator. With a seed the draws of an update depend on
        it and on the number of updates before, and on nothing else.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If channels are not last or do not agree with the filter, the geometry is impossible, or
        there is no `generator` to subsample with.
    NotImplementedError
        If `extract_patches_fn` is an unknown name.

    References
    ----------
    Grosse and Martens (2016), arXiv:1602.01407, equation 14.
    """

    data_names = ("inputs",)

    def __init__(
        self,
        inputs: Towers,
        filter_shape: Sequence[int],
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Array | None = None,
        *,
        generator: Generator | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        require_channels_last(data_format)
        *kernel, c_in, _ = filter_shape
        geometry = ConvGeometry.create(kernel, strides, padding, dilation_rate)
        require_extract_patches_fn(extract_patches_fn, geometry)
        data = {"inputs": [as_towers("inputs", inputs)]}
        require_images_of("inputs[0]", example_of(data["inputs"]), geometry, c_in, filter_shape)
        moment = ConvInputMoment(geometry, c_in, bool(has_bias))
        given = {
            key: value
            for key, value in (
                ("sub_sample_inputs", sub_sample_inputs),
                ("sub_sample_patches", sub_sample_patches),
            )
            if value is not None
        }
        all_options = FactorOptions().changed(**(options | given))
        if (all_options.sub_sample_inputs or all_options.sub_sample_patches) and generator is None:
            raise ValueError(
                "`generator` must be given to subsample: a seed, or a numpy.random.Generator."
            )
        super().__init__(moment, data, all_options, name)
        self.patch_mask = checked_mask(patch_mask, (*kernel, c_in), self._like)
        self.generator = generator

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """As ever, and of a NumPy generator that subsamples where its draws go on."""
        state = super().state_dict(powers=powers)
        if self._draws:
            state["generator"] = self._draws[0].bit_generator.state
        return state

    def changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which the factor continues from a saved state, which is checked."""
        changes = super().changes_to(saved)
        return [*changes, *(saved_draws(g, saved.part("generator")) for g in self._draws)]

    def holders(self) -> list[object]:
        """As ever, and a NumPy generator that subsamples."""
        return [*super().holders(), *self._draws]

    @property
    def _draws(self) -> list[np.random.Generator]:
        """The generator, if it has a state of its own: not a seed."""
        return [self.generator] if isinstance(self.generator, np.random.Generator) else []

    @property
    def _own_parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (("generator",) if self._draws else ()), ()

    def _sources(self, *, inputs: Towers) -> Iterator[list[tuple[Any, ...]]]:
        xs = towers_of("inputs", inputs)
        for t, x in enumerate(xs):
            self._require_inputs(f"inputs[{t}]", x)
        yield [self._arguments(x, t) for t, x in enumerate(xs)]

    def _arguments(self, x: Array, tower: int) -> tuple[Any, ...]:
        """The images, the mask and the rows to keep; the last two None for all."""
        options = self.options
        if not (options.sub_sample_inputs or options.sub_sample_patches):
            return (x, self.patch_mask, None)
        generator = self._generator_for(tower)
        if options.sub_sample_inputs:
            part = options.inputs_to_extract_patches_factor
            kept_cases = subset(generator, x.shape[0], math.ceil(x.shape[0] * part), x)
            x = array_namespace(x).take(x, kept_cases, axis=0)
        kept = None
        if options.sub_sample_patches:
            geometry = self.moment.geometry
            num_rows = x.shape[0] * geometry.num_locations(x.shape[1:-1])
            per_entry = options.max_num_patches_per_dimension
            entries = geometry.num_taps * self.moment.in_channels
            most = min(options.max_num_patches, math.ceil(per_entry * entries))
            if most < num_rows:
                kept = subset(generator, num_rows, most, x)
        return (x, self.patch_mask, kept)

    def _generator_for(self, tower: int) -> Generator:
        """A seed gives draws that depend on it, the update and the tower, and on nothing else."""
        generator = self.generator
        assert generator is not None
        if not isinstance(generator, int):
            return as_generator(generator)
        updates = 0 if self._average is None else self._average.num_updates
        return np.random.default_rng([generator, updates, tower])

    def _require_inputs(self, name: str, x: Array) -> None:
        moment = self.moment
        shape = images_shape(moment.geometry.num_axes, moment.in_channels)
        self._require(name, x, shape, "with the channels of the filter")
        require_locations(name, x, moment.geometry)

    moment: ConvInputMoment


class ConvOutputKroneckerFactor(InverseProvidingFactor):
    """Kronecker factor for the output side of a convolutional layer.

    Estimates ``E[ds ds^T]`` where s is the preactivations of a convolutional layer given example
    x and ``ds = (d / d s) log(p(y|x, w))``. Expectation is taken over all cases and locations:
    divided by both.

    Equivalent to Gamma in KFC; see section 3.1, Estimating the factors.

    Parameters
    ----------
    outputs_grads : arrays of shape [N, *out, C_out]
        Gradients of the loss, summed over cases, with respect to the preactivations. First list
        index is source, second is tower.
    data_format
        None or a name that ends in "C".
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If channels are not the last axis.

    References
    ----------
    Grosse and Martens (2016), arXiv:1602.01407, section 3.1.
    """

    data_names = ("outputs_grads",)

    def __init__(
        self,
        outputs_grads: Sources,
        data_format: str | None = None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        require_channels_last(data_format)
        bound = bind("outputs_grads", outputs_grads)
        example = example_of(bound)
        if example.ndim < 3:
            raise ValueError(
                "`outputs_grads[0][0]` must have shape [N, *out, C_out] with at least one spatial "
                f"axis; got shape {tuple(example.shape)}. A dense layer's gradients belong to "
                "FullyConnectedKroneckerFactor."
            )
        moment = ConvOutputMoment(int(example.shape[-1]))
        self._num_axes = example.ndim - 2
        super().__init__(moment, {"outputs_grads": bound}, FactorOptions().changed(**options), name)

    def _sources(self, *, outputs_grads: Sources) -> Iterator[list[tuple[Array, ...]]]:
        shape = images_shape(self._num_axes, self.moment.out_channels, "out")
        why = "with the channels that the factor was made for"
        for s, towers in enumerate(as_sources("outputs_grads", outputs_grads)):
            yield [
                (self._require(f"outputs_grads[{s}][{t}]", g, shape, why),)
                for t, g in enumerate(towers)
            ]

    moment: ConvOutputMoment


class ConvDiagonalFactor(DiagonalFactor):
    """FisherFactor for a diagonal approximation of a convolutional layer's Fisher.

    Estimates ``E[(sum over locations of a ds^T) ** 2]``, elementwise, over cases: the squared
    entries of each case's own gradient. Divided by the number of cases, not by that of locations.

    Parameters
    ----------
    inputs : arrays of shape [N, *space, C_in]
        List index is tower.
    outputs_grads : arrays of shape [N, *out, C_out]
        Gradients of the loss, summed over cases, with respect to the preactivations. First list
        index is source, second is tower.
    filter_shape
        ``(*kernel, C_in, C_out)``.
    strides, dilations
        One int per spatial axis, or with the batch and channel axes ``(1, *spatial, 1)``.
    padding
        ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
    data_format
        None or a name that ends in "C". (In r1.4 `has_bias` stood here; a bool is taken as that.)
    has_bias
        Append 1 to each patch; the last row of the covariance is then the bias's.
    patch_mask : shape [*kernel, C_in / groups]
        Multiplies each patch, before the 1 is appended.
    groups
        The channels are split into so many consecutive groups; the filter's shape is then
        ``(*kernel, C_in / groups, C_out)``.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If channels are not last or do not agree with the filter, or shapes do not follow from the
        geometry.
    """

    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        filter_shape: Sequence[int],
        strides: Sequence[int] | None,
        padding: Padding,
        data_format: str | bool | None = None,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
        patch_mask: Array | None = None,
        *,
        groups: int = 1,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(data_format, bool):
            has_bias, data_format = data_format, None
        require_channels_last(data_format)
        *kernel, c_in, c_out = filter_shape
        geometry = ConvGeometry.create(kernel, strides, padding, dilations)
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        channels = c_in * groups
        require_images_of("inputs[0]", example_of(data["inputs"]), geometry, channels, filter_shape)
        require_images_of(
            "outputs_grads[0][0]", example_of(data["outputs_grads"]), geometry, c_out, filter_shape
        )
        moment = ConvDiagonalMoment(geometry, channels, c_out, bool(has_bias), groups)
        super().__init__(moment, data, FactorOptions().changed(**options), name)
        self.patch_mask = checked_mask(patch_mask, (*kernel, c_in), self._like)

    def _sources(
        self, *, inputs: Towers, outputs_grads: Sources
    ) -> Iterator[list[tuple[Array, ...]]]:
        moment, xs = self.moment, towers_of("inputs", inputs)
        mask = () if self.patch_mask is None else (self.patch_mask,)
        for t, x in enumerate(xs):
            shape = images_shape(moment.geometry.num_axes, moment.in_channels)
            self._require(f"inputs[{t}]", x, shape, "with the channels of the filter")
            require_locations(f"inputs[{t}]", x, moment.geometry)
        for s, grads in enumerate(as_sources("outputs_grads", outputs_grads)):
            require_as_many_towers(f"outputs_grads[{s}]", grads, xs)
            yield [
                (
                    x,
                    self._require(
                        f"outputs_grads[{s}][{t}]",
                        g,
                        (
                            x.shape[0],
                            *moment.geometry.output_shape(x.shape[1:-1]),
                            moment.out_channels,
                        ),
                        f"as follows from `inputs[{t}]` of shape {tuple(x.shape)} and "
                        f"{moment.geometry}",
                    ),
                    *mask,
                )
                for t, (x, g) in enumerate(zip(xs, grads, strict=True))
            ]

    moment: ConvDiagonalMoment


def images_shape(num_axes: int, channels: int, axis: str = "size") -> tuple[int | str, ...]:
    """Shape pattern of a batch of images with these channels."""
    return ("N", *(f"{axis}_{i}" for i in range(num_axes)), channels)


def require_locations(name: str, images: Array, geometry: ConvGeometry) -> None:
    """Refuse images on which the filter fits nowhere."""
    if geometry.num_locations(images.shape[1:-1]) == 0:
        raise ValueError(
            f"the filter fits nowhere in `{name}` of shape {tuple(images.shape)}: its extent is "
            f"{geometry.extent} with padding {geometry.padding!r}."
        )


def require_extract_patches_fn(name: str | None, geometry: ConvGeometry) -> None:
    """Check that the documented extraction function of this name takes the geometry."""
    known = (
        None,
        "extract_convolution_patches",
        "extract_image_patches",
        "extract_pointwise_conv2d_patches",
    )
    if name not in known:
        raise NotImplementedError(f"`extract_patches_fn` must be one of {known}; got {name!r}.")
    if name == "extract_image_patches" and geometry.num_axes != 2:
        raise ValueError(
            f"{name!r} takes 2-D convolutions; this filter has {geometry.num_axes} spatial axes. "
            "Use None."
        )
    ones = (1, 1)
    if name == "extract_pointwise_conv2d_patches" and (geometry.kernel, geometry.strides) != (
        ones,
        ones,
    ):
        raise ValueError(
            f"{name!r} takes 1x1 filters with stride 1; got kernel {geometry.kernel} and strides "
            f"{geometry.strides}. Use None."
        )


def require_images_of(
    name: str, example: Any, geometry: ConvGeometry, channels: int, filter_shape: Sequence[int]
) -> None:
    """Refuse an example whose axes or channels are not those of the filter."""
    if example.ndim != geometry.num_axes + 2 or example.shape[-1] not in (channels, None):
        pattern = ", ".join(map(str, images_shape(geometry.num_axes, channels)))
        raise ValueError(
            f"`{name}` must have shape [{pattern}] (from `filter_shape`={tuple(filter_shape)}); "
            f"got shape {tuple(example.shape)}."
        )


def checked_mask(mask: Array | None, shape: tuple[int, ...], like: Array) -> Array | None:
    """The mask, after refusing one of another library or shape."""
    if mask is None:
        return None
    require_same_place("patch_mask", mask, like, "the factor")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"`patch_mask` must have the shape of the filter without its outputs, {shape}; "
            f"got {tuple(mask.shape)}."
        )
    return mask
