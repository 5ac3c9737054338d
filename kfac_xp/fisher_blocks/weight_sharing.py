"""Blocks of layers that apply their weights at several places: KFAC-expand and KFAC-reduce.

For a layer whose weights see T vectors a_t of each case, with gradients ds_t of the T outputs, the
two approximations of Eschenhagen et al. are, per case (expectations over cases, means over t)::

    expand   T * kron(E[mean_t a_t a_t^T], E[mean_t ds_t ds_t^T])
    reduce   kron(E[a a^T], E[ds ds^T]),   a = mean_t a_t,  ds = sum_t ds_t

Of deep linear networks with a squared error expand is the Fisher if the loss is a sum over the T
places, reduce if it sees their sum or mean. For a convolution expand is KFC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.backend import array_namespace, as_statistics, detached
from kfac_xp.batches import Placeholder
from kfac_xp.fisher_blocks.base import FactorMaker
from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.fisher_blocks.fully_connected import FullyConnectedKFACBasicFB, side_of
from kfac_xp.fisher_blocks.kronecker import KroneckerProductFB
from kfac_xp.fisher_blocks.locations import SharedOverLocations
from kfac_xp.fisher_factors import FullyConnectedKroneckerFactor
from kfac_xp.geometry import Padding
from kfac_xp.ops import mean_patches
from kfac_xp.typing import Array, Params


class FullyConnectedKFACExpandFB(SharedOverLocations, FullyConnectedKFACBasicFB):
    """KFAC-expand FisherBlock for dense layers over sequences: ``T * kron(A, G)``.

    ``A = E[a_t a_t^T]`` and ``G = E[ds_t ds_t^T]``, over cases and the T places. The damping is
    divided by T before it is split between the factors, as it is for a convolution, which a dense
    layer over a sequence is, with one tap. The first batch fixes T.

    Inputs are [N, T, d_in], gradients [N, T, d_out]. Several shared axes are to be merged into one.

    Parameters
    ----------
    layer_collection
        The collection that the block belongs to, or None.
    has_bias
        Whether the layer has a bias; vectors are then pairs (kernel, bias).
    num_locations
        Used in place of T.
    kernel_layout
        As for `FullyConnectedKFACBasicFB`.
    name, **options
        As for `FisherBlock`.

    References
    ----------
    Eschenhagen, Immer, Turner, Schneider and Hennig (2023), arXiv:2311.00636, section 3.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        num_locations: int | None = None,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            has_bias,
            num_locations=num_locations,
            kernel_layout=kernel_layout,
            name=name,
            **options,
        )

    @property
    def renorm_coeff(self) -> float:
        """T."""
        return float(self.num_locations)

    @property
    def num_replications(self) -> int:
        """T."""
        return self.num_locations

    @property
    def _num_axes_of_tower(self) -> int:
        return 3

    def _locations_of(self, tower: Any) -> int:
        return tower.shape[1]

    def _inputs_in(self, tower: Any) -> Any:
        return _sequences(self.name, tower, lambda xp, x: xp.reshape(x, (-1, x.shape[-1])))

    def _grads_in(self, tower: Any) -> Any:
        return self._inputs_in(tower)

    def _case_inputs_in(self, tower: Any) -> Any:
        return _whole_sequences(self.name, tower)

    _case_grads_in = _case_inputs_in

    def _hint(self, array: Array) -> str:
        return _hint_at_vectors(array)

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", "T", side_of(self.input_factor).dimension)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (*inputs.shape[:2], side_of(self.output_factor).dimension)


class FullyConnectedKFACReduceFB(FullyConnectedKFACBasicFB):
    """KFAC-reduce FisherBlock for dense layers over sequences: ``kron(A, G)``.

    ``A = E[a a^T]`` of the mean a of a case's inputs over the T places, with 1 appended if there is
    a bias, and ``G = E[ds ds^T]`` of the sum ds of its gradients. T may differ between batches.

    Inputs are [N, T, d_in], gradients [N, T, d_out]. Several shared axes are to be merged into one.

    Parameters
    ----------
    layer_collection, has_bias, kernel_layout, name, **options
        As for `FullyConnectedKFACExpandFB`.

    References
    ----------
    Eschenhagen, Immer, Turner, Schneider and Hennig (2023), arXiv:2311.00636, section 3.
    """

    def __init__(
        self,
        layer_collection: FactorMaker | None,
        has_bias: bool = False,
        *,
        kernel_layout: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            layer_collection, has_bias, kernel_layout=kernel_layout, name=name, **options
        )

    def _inputs_in(self, tower: Any) -> Any:
        dtype = self.options.dtype
        return _sequences(
            self.name,
            tower,
            lambda xp, x: xp.sum(as_statistics(detached(x), dtype), axis=1) / x.shape[1],
        )

    def _grads_in(self, tower: Any) -> Any:
        dtype = self.options.dtype
        return _sequences(
            self.name, tower, lambda xp, x: xp.sum(as_statistics(detached(x), dtype), axis=1)
        )

    def _case_inputs_in(self, tower: Any) -> Any:
        return _whole_sequences(self.name, tower)

    _case_grads_in = _case_inputs_in

    def _hint(self, array: Array) -> str:
        return _hint_at_vectors(array)

    def _input_pattern(self) -> tuple[int | str, ...]:
        return ("N", "T", side_of(self.input_factor).dimension)

    def _output_pattern(self, inputs: Array) -> tuple[int | str, ...]:
        return (*inputs.shape[:2], side_of(self.output_factor).dimension)


class ConvKFACReduceFB(Convolution, KroneckerProductFB):
    """KFAC-reduce FisherBlock for convolutions: ``kron(A, G)``.

    ``A = E[a a^T]`` of the mean a of a case's patches over all locations, with 1 appended if there
    is a bias, and ``G = E[ds ds^T]`` of the sum ds of its gradients. For networks that average over
    locations in the end. There is no number of locations in it, and the damping is the block's.

    Parameters
    ----------
    layer_collection, params, padding, strides, dilation_rate, data_format, patch_mask
        As for `ConvKFCBasicFB`.
    kernel_layout, kind, output_padding
        As for `kfac_xp.layer_specs.ConvolutionSpec.create`.
    name, **options
        As for `FisherBlock`.

    Raises
    ------
    ValueError
        If the geometry is impossible, there are groups, or subsampling is asked for.

    References
    ----------
    Eschenhagen, Immer, Turner, Schneider and Hennig (2023), arXiv:2311.00636, section 3.
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
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            layer_collection,
            params,
            padding,
            strides,
            dilation_rate,
            data_format,
            None,
            name=name,
            **keywords,
        )
        if self.options.sub_sample_inputs or self.options.sub_sample_patches:
            raise ValueError(
                f"{type(self).__name__} does not subsample. Leave `sub_sample_inputs` and "
                "`sub_sample_patches` out."
            )
        self.patch_mask = patch_mask
        if patch_mask is not None and tuple(patch_mask.shape) != self.filter_shape[:-1]:
            raise ValueError(
                "`patch_mask` must have the shape of the filter without its outputs, "
                f"{self.filter_shape[:-1]}; got {tuple(patch_mask.shape)}."
            )

    def input_key(self) -> tuple[Any, ...]:
        """See `FisherBlock.input_key`."""
        form = (self.geometry, self.spec.transposed, self.spec.data)
        side = (self.has_bias, id(self.patch_mask))
        return (type(self), self.filter_shape[:-1], *form, *side, self.options)

    def _make_factors(self, inputs: list[Any], grads: list[list[Any]]) -> None:
        cls = FullyConnectedKroneckerFactor
        self.input_factor = self._factor("input", cls, [inputs], self.has_bias)
        self.output_factor = self._factor("output", cls, grads)

    def _inputs_in(self, tower: Any) -> Any:
        images = super()._inputs_in(tower)
        geometry, mask = self.geometry, self.patch_mask
        if isinstance(images, Placeholder):
            d = geometry.num_taps * self.spec.in_channels
            key = ("mean patches", geometry, self.spec.transposed, id(mask))
            return images.derived(key, (None, d))
        rows = mean_patches(as_statistics(detached(images), self.options.dtype), geometry)
        if mask is None:
            return rows
        xp = array_namespace(rows, mask)
        return rows * xp.reshape(as_statistics(mask, rows.dtype), (-1,))

    def _grads_in(self, tower: Any) -> Any:
        grads = super()._grads_in(tower)
        if isinstance(grads, Placeholder):
            return grads.derived("sum over locations", (None, self.spec.out_channels))
        grads = as_statistics(detached(grads), self.options.dtype)
        return array_namespace(grads).sum(grads, axis=tuple(range(1, grads.ndim - 1)))

    def _case_inputs_in(self, tower: Any) -> Any:
        return super()._inputs_in(tower)

    def _case_grads_in(self, tower: Any) -> Any:
        return super()._grads_in(tower)


def _sequences(name: str, tower: Any, change: Any) -> Any:
    """A function applied to an array [N, T, d]; placeholders are for its result already."""
    if isinstance(tower, Placeholder):
        return tower
    if tower.ndim != 3:
        raise ValueError(
            f"inputs and gradients of {name} must have shape [N, T, d], places after cases; "
            f"got shape {tuple(tower.shape)}."
        )
    return change(array_namespace(tower), tower)


def _whole_sequences(name: str, tower: Any) -> Any:
    """An array [N, T, d] as it is, or a placeholder for one."""
    if isinstance(tower, Placeholder):
        return tower.derived("whole sequences", (None, None, tower.shape[-1]))
    return _sequences(name, tower, lambda _, x: x)


def _hint_at_vectors(array: Array) -> str:
    """Which approximations take one vector for each case, for a message about such an array."""
    if array.ndim != 2:
        return " over sequences"
    return " over sequences (approx='kron' and others for vectors [N, d])"
