"""The second moment of a convolution's patches, without the patches where that is cheaper."""

from __future__ import annotations

import numpy as np

from kfac_xp.backend import (
    array_namespace,
    as_statistics,
    cast,
    device_of,
    itemsize,
    kept_like,
    require_one_place,
    statistics_dtype,
)
from kfac_xp.geometry import ConvGeometry
from kfac_xp.kernels.cpu import scratch
from kfac_xp.linalg import bordered
from kfac_xp.ops import require_images
from kfac_xp.patch_covariance.blocks import correlation_blocks, layout_of
from kfac_xp.patch_covariance.chunked import chunked_covariance
from kfac_xp.patch_covariance.cost import METHODS, Method, Plan, Sizes, cheapest, plans_for
from kfac_xp.patch_covariance.lattice import Axis, Lattice, TapGrid, counted_positions, lattice_of
from kfac_xp.patch_covariance.offsets import offset_correlations, second_moment
from kfac_xp.patch_covariance.rates import rates_of
from kfac_xp.patch_covariance.spectral import spectral_correlations
from kfac_xp.precision import statistics_products
from kfac_xp.typing import Array

WORKSPACE = 2**24
"""Bytes for the arrays that `patch_covariance` makes on the way, unless told otherwise."""


class PatchCovariance:
    """Second moment of the patches under a convolution filter, not centred.

    Called as a function, `patch_covariance`. The same numbers by three methods:

    ``"chunked"``
        patches of some cases at a time, and their second moment: ``N T D^2`` multiply-adds with
        ``D = prod(kernel) * C``, half of that where the library sees the symmetry.
    ``"offsets"``
        one product ``[C, N T] [N T, C]`` per offset between two taps: 13 for a 3x3 filter, where
        patches have 81 / 2.
    ``"spectral"``
        all offsets at once by the correlation theorem: about one such product for any filter,
        and transforms.

    The last two sum over all locations, those included where the filter hangs over the border,
    where a block of the result depends on the offset alone, and subtract the locations outside,
    which is a smaller problem of the same kind.
    A strided convolution is one of stride 1 on its phase images. A cost model chooses; `explain`
    shows its estimates.
    """

    __name__ = "patch_covariance"

    def __call__(
        self,
        inputs: Array,
        geometry: ConvGeometry,
        *,
        has_bias: bool = False,
        patch_mask: Array | None = None,
        normalizer: float | None = None,
        method: Method | None = None,
        workspace: int = WORKSPACE,
    ) -> Array:
        """``sum_{n, o} p p^T / normalizer`` over the patches p of all cases and locations.

        Parameters
        ----------
        inputs : shape [N, *space, C]
            Images, channels last.
        geometry
            Filter, strides, dilation and padding, over any number of spatial axes.
        has_bias
            Append a 1 to each patch.
        patch_mask : shape [*kernel, C]
            Multiplies each patch, before the 1 is appended. Only ``"chunked"`` takes it.
        normalizer
            What the sum is divided by; cases times locations if not given.
        method
            Forces one: ``"chunked"``, ``"offsets"`` or ``"spectral"``.
        workspace
            Bytes for arrays on the way beside the result and the correlations of the images,
            ``prod(2 kernel - 1) * C^2``, and of their borders; with strides, half of it, beside a
            copy of the inputs. A bound as long as what must be held of one case or one frequency
            fits.

        Returns
        -------
        Array of shape [D (+ 1), D (+ 1)] with ``D = prod(kernel) * C``, symmetric, in at least
        float32.

        Raises
        ------
        ValueError
            If shapes do not agree, `method` is unknown or cannot serve the call, or `workspace`
            is not positive.
        TypeError
            If `inputs` is not a real floating array, or the arrays belong to several libraries.
        """
        plan = self._plan(inputs, geometry, patch_mask, method, workspace)[0]
        inputs = as_statistics(inputs)
        xp = array_namespace(inputs)
        rows = inputs.shape[0] * geometry.num_locations(inputs.shape[1:-1])
        normalizer = float(rows if normalizer is None else normalizer)
        mask = None
        if patch_mask is not None:
            mask = xp.reshape(as_statistics(patch_mask), (-1,))
        last = None
        if has_bias:
            sums = _patch_sums(inputs, geometry)
            sums = sums if mask is None else sums * mask
            count = xp.full((1,), float(rows), dtype=inputs.dtype, device=device_of(inputs))
            last = xp.concat([sums, count]) / normalizer
        with statistics_products(inputs):
            if plan is None:
                moment = chunked_covariance(inputs, geometry, mask, normalizer, workspace)
                return moment if last is None else bordered(moment, last)
            with scratch.frame():
                lattice = _lattice(geometry, inputs)
                if lattice.grid.num_blocks > 1:  # phase images are a copy of the inputs
                    workspace = max(1, workspace // 2)
                return _moment(plan, lattice.images(inputs), normalizer, workspace, last)

    def explain(
        self,
        inputs: Array,
        geometry: ConvGeometry,
        *,
        patch_mask: Array | None = None,
        method: Method | None = None,
        workspace: int = WORKSPACE,
        **_: object,
    ) -> str:
        """Which method would run on these arguments, and what each is estimated to cost."""
        plan, plans = self._plan(inputs, geometry, patch_mask, method, workspace)
        text = f"patch_covariance: {'chunked' if plan is None else plan.method}, "
        if patch_mask is not None:
            return text + "the only method that takes a mask"
        if not plans:
            return text + "because no patch holds a pixel"
        if method is not None:
            text += "because `method` asks for it; "
        by_cost = sorted(plans.values(), key=lambda plan: plan.seconds)
        costs = ", ".join(f"{plan.method} {1e3 * plan.seconds:.3g} ms" for plan in by_cost)
        return text + f"estimated: {costs} (rates of {rates_of(inputs).measured})"

    def _plan(
        self,
        inputs: Array,
        geometry: ConvGeometry,
        patch_mask: Array | None,
        method: Method | None,
        workspace: int,
    ) -> tuple[Plan | None, dict[Method, Plan]]:
        """Check the arguments; a plan, or None for patches of the inputs; and all there are."""
        _check(inputs, geometry, patch_mask, method, workspace)
        if patch_mask is not None:
            return None, {}
        num_cases, *space, channels = inputs.shape
        sizes = Sizes(num_cases, channels, max(4, itemsize(inputs)))
        plans = plans_for(geometry, tuple(space), sizes, rates_of(inputs))
        if method not in (None, "chunked", *plans):
            raise ValueError(
                f"`method` {method!r} needs taps that read the same pixels, all of these, and one "
                f"that reads half; {geometry} on images of spatial shape {tuple(space)} has not. "
                "Use 'chunked', or None."
            )
        if not plans:
            return None, plans
        plan = cheapest(plans) if method is None else plans[method]
        return (None if plan.method == "chunked" else plan), plans


patch_covariance = PatchCovariance()


def _moment(
    plan: Plan, images: Array, normalizer: float, workspace: int, last: Array | None
) -> Array:
    """Second moment of the patches of the plan's grid; with a last row and column, if given."""
    grid = plan.grid
    halves = _correlations(plan.method, images, grid.axes, 1 / normalizer, workspace)
    borders = []
    for border, method in plan.borders:
        scale, lines = border.sign / normalizer, border.images(images)
        outside = _correlations(method, lines, border.others, scale, workspace)
        borders.append(border.summed(outside))
    return correlation_blocks(halves, layout_of(grid), borders, last)


def _correlations(
    method: Method, images: Array, axes: tuple[Axis, ...], scale: float, workspace: int
) -> Array:
    """Correlations of images [N, *sizes, B, C] with themselves, [offsets, B, C, B, C], in halves.

    ``R[d]`` is ``halves[d] + halves[-d]^T`` as matrices of ``(block, c)``.
    """
    xp = array_namespace(images)
    *_, num_blocks, channels = images.shape
    # An axis on which all taps read the same position is as good as more cases.
    single = [i for i, axis in enumerate(axes, start=1) if len(axis.offsets) == 1]
    others = [i for i in range(1, len(axes) + 1) if i not in single]
    last = len(axes) + 1
    sizes = [axes[i - 1].size for i in others]
    images = xp.permute_dims(images, (0, *single, *others, last, last + 1))
    images = xp.reshape(images, (-1, *sizes, num_blocks * channels))
    offsets = tuple(axes[i - 1].offsets for i in others)
    if not offsets:
        halves = second_moment(images) * (scale / 2)
    elif method == "spectral":
        halves = spectral_correlations(images, offsets, scale, workspace)
    else:
        halves = offset_correlations(images, offsets, scale, workspace)
    return xp.reshape(halves, (-1, *(num_blocks, channels) * 2))


def _patch_sums(inputs: Array, geometry: ConvGeometry) -> Array:
    """Sum of all patches, [prod(kernel) * C]."""
    xp = array_namespace(inputs)
    lattice = lattice_of(geometry, tuple(inputs.shape[1:-1]))
    channels = inputs.shape[-1]
    if lattice is None:
        d = geometry.num_taps * channels
        return xp.zeros((d,), dtype=inputs.dtype, device=device_of(inputs))
    grid = lattice.grid
    sums = lattice.images(xp.sum(inputs, axis=0, keepdims=True))
    sums = xp.reshape(sums, (*grid.sizes, -1))
    rows, *tables = _tables_of_sums(inputs, grid)
    for i, counted in enumerate(tables):
        counted = cast(counted, inputs.dtype)
        sums = xp.moveaxis(xp.tensordot(counted, sums, axes=((1,), (i,))), 0, i)
    sums = xp.reshape(sums, (grid.num_taps * grid.num_blocks, channels))
    return xp.reshape(xp.take(sums, rows, axis=0), (-1,))


@kept_like
def _tables_of_sums(grid: TapGrid) -> tuple[np.ndarray, ...]:
    """Which (tap, block) every tap reads; and for each axis what `counted_positions` says."""
    rows = [tap * grid.num_blocks + block for tap, block in enumerate(grid.blocks)]
    counted = (np.array(counted_positions(axis), dtype=np.float32) for axis in grid.axes)
    return np.array(rows, dtype=np.int64), *counted


def _lattice(geometry: ConvGeometry, inputs: Array) -> Lattice:
    lattice = lattice_of(geometry, tuple(inputs.shape[1:-1]))
    assert lattice is not None, "a plan that is not chunked has one"
    return lattice


def _check(
    inputs: Array,
    geometry: ConvGeometry,
    patch_mask: Array | None,
    method: str | None,
    workspace: int,
) -> None:
    masks = {} if patch_mask is None else {"patch_mask": patch_mask}
    require_one_place(inputs=inputs, **masks)
    statistics_dtype(inputs)
    require_images("inputs", inputs, geometry)
    if method is not None and method not in METHODS:
        raise ValueError(f"`method` must be None or one of {METHODS}; got {method!r}.")
    if workspace <= 0:
        raise ValueError(f"`workspace` must be a positive number of bytes; got {workspace!r}.")
    if patch_mask is None:
        return
    if method not in (None, "chunked"):
        raise ValueError(
            f"`method` must be 'chunked' or None where there is a `patch_mask`; got {method!r}."
        )
    shape = (*geometry.kernel, inputs.shape[-1])
    if tuple(patch_mask.shape) != shape:
        raise ValueError(
            f"`patch_mask` must have the shape of a filter without its outputs, {shape}; "
            f"got {tuple(patch_mask.shape)}."
        )
