"""How many elements a moment, an inverse or a product holds at once, from shapes alone.

Numbers follow the code that runs on NumPy arrays, kernels included; what is named is what is alive
at the worst moment. Other libraries hold a little more, where they have no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import itemsize
from kfac_xp.geometry import ConvGeometry
from kfac_xp.moments import (
    ConvDiagonalMoment,
    ConvInputMoment,
    ConvInputSUAMoment,
    ConvOutputMoment,
    DiagonalKroneckerMoment,
    FullyConnectedDiagonalMoment,
    FullyConnectedKroneckerMoment,
)
from kfac_xp.patch_covariance import covariance
from kfac_xp.patch_covariance.cost import Plan, Sizes, cheapest, plans_for
from kfac_xp.patch_covariance.lattice import Axis
from kfac_xp.patch_covariance.rates import rates_of
from kfac_xp.patch_covariance.spectral import periods
from kfac_xp.typing import Array


@dataclass(frozen=True)
class Data:
    """The shapes of what a layer's moments are made of, and whose arrays they are.

    Parameters
    ----------
    inputs, grads
        ``[N, ..., C_in]`` and ``[N, ..., C_out]``.
    side
        Role of the factor, which says what it is made of.
    rotated
        Whether there is an eigenbasis to turn cases into.
    like
        An array of the library and dtype of the statistics.
    """

    inputs: tuple[int, ...]
    grads: tuple[int, ...]
    side: str
    rotated: bool
    like: Array

    @property
    def rows(self) -> tuple[int, ...]:
        """Shape of the side that a factor of one side is made of."""
        return self.inputs if self.side.startswith("input") else self.grads


def moment_elements(moment: Any, data: Data) -> int | None:
    """The most elements at once, result included; None for a kind that is not modelled."""
    for kind, count in _MOMENTS.items():
        if type(moment) is kind:
            return count(moment, data)
    return None


def _second_moment(num_rows: int, width: int, made: int) -> int:
    """Of rows of which `made` elements are copies; few rows are scaled, in a copy, and not sums."""
    return width * width + made + num_rows * width * (num_rows < width)


def _dense_side(moment: FullyConnectedKroneckerMoment, data: Data) -> int:
    n, d = math.prod(data.rows[:-1]), moment.shape[0]
    return _second_moment(n, d, n * d * moment.has_bias)


def _diagonal_side(moment: DiagonalKroneckerMoment, data: Data) -> int:
    return 2 * moment.shape[0] + (0 if moment.is_one_hot else math.prod(data.rows))


def _dense_squares(moment: FullyConnectedDiagonalMoment, data: Data) -> int:
    n, (d, c) = data.inputs[0], moment.shape
    with_bias = n * d * moment.has_bias
    if not data.rotated:
        return with_bias + max(n * (d + c) + d * c, 2 * d * c)
    return max(with_bias + n * (d + c), 2 * n * (d + c) + d * c, n * (d + c) + 2 * d * c)


def _conv_output(moment: ConvOutputMoment, data: Data) -> int:
    return _second_moment(math.prod(data.grads[:-1]), moment.out_channels, 0)


def _pixels(moment: ConvInputSUAMoment, data: Data) -> int:
    n, d = math.prod(data.inputs[:-1]), moment.in_channels + 1
    return _second_moment(n, d, n * d)


def _conv_squares(moment: ConvDiagonalMoment, data: Data) -> int:
    d, c = moment.shape
    if not data.rotated:  # in blocks, then in rows, then with the bias, then divided
        return 3 * d * c + _COPIED
    n, *space, channels = data.inputs
    t = moment.geometry.num_locations(space)
    taps = moment.geometry.num_taps * channels
    chunk = min(n, max(1, _ROTATED // max(1, taps * max(c, t))))
    rows, columns, cases = chunk * t * taps, chunk * t * c, chunk * taps * c
    if t <= c:  # patches are turned; then squares of some cases at a time, or of all of them
        squared = 2 * cases if t > d else min(2 * cases, 2 * max(taps * c, _SQUARED))
        held = columns + max(2 * rows, rows + squared)
    else:  # the cases' gradients are turned; the last patches go when the next are there
        bias = int(moment.has_bias)
        following = min(chunk, n - chunk) * t * taps
        held = columns + max(rows + following + cases, rows + (2 + bias) * cases)
    return 2 * d * c + held


def _patches(moment: ConvInputMoment, data: Data) -> int:
    """See `patch_covariance`, whose plan it is that counts."""
    geometry = moment.geometry
    plan, n, channels = _plan_of(moment, data)
    d, budget = geometry.num_taps * channels, covariance.WORKSPACE // itemsize(data.like)
    if plan is None or plan.method == "chunked":
        held = _chunked(geometry, data.inputs, budget)
        return max(held, d * d + d * (d + 1) + (d + 1) ** 2) if moment.has_bias else held
    side = d + moment.has_bias
    if plan.method == "spectral" and _is_in_scratch(plan, channels):
        return side * side
    halves, making = _correlations(plan, (n, channels), budget)
    return max(making, halves + side * side)


def scratch_elements(moment: Any, data: Data) -> int:
    """Elements that kernels for NumPy take from their own memory, which they keep."""
    if type(moment) is not ConvInputMoment:
        return 0
    plan, n, channels = _plan_of(moment, data)
    if plan is None or plan.method != "spectral" or not _is_in_scratch(plan, channels):
        return 0
    budget = covariance.WORKSPACE // itemsize(data.like)
    return _correlations(plan, (n, channels), budget)[1]


def _is_in_scratch(plan: Plan, channels: int) -> bool:
    return plan.grid.num_blocks * channels % 16 == 0


def _plan_of(moment: ConvInputMoment, data: Data) -> tuple[Plan | None, int, int]:
    """How the covariance of patches will be made, with the numbers of cases and channels."""
    n, *space, channels = data.inputs
    sizes = Sizes(n, channels, max(4, itemsize(data.like)))
    plans = plans_for(moment.geometry, tuple(space), sizes, rates_of(data.like))
    return (cheapest(plans) if plans else None), n, channels


def _chunked(geometry: ConvGeometry, shape: tuple[int, ...], budget: int) -> int:
    n, *space, channels = shape
    d, per_case = geometry.num_taps * channels, geometry.num_locations(space)
    most = max(budget // max(1, d), d)
    rows = n * per_case
    if geometry.num_taps == 1 and per_case == math.prod(space):
        return _second_moment(rows, d, 0)
    if rows <= most:
        return _second_moment(rows, d, rows * d)
    lines, *_ = geometry.output_shape(space)
    if most >= per_case:
        rows = most // per_case * per_case
    else:
        rows = max(1, most * lines // per_case) * (per_case // lines)
    return d * d + _second_moment(rows, d, rows * d)


def _correlations(plan: Plan, sizes: tuple[int, int], budget: int) -> tuple[int, int]:
    """Elements of all correlations, and the most at once until they are there."""
    n, channels = sizes
    grid = plan.grid
    width = grid.num_blocks * channels
    images = n * math.prod(grid.sizes) * width if grid.num_blocks > 1 else 0
    budget = budget // 2 if images else budget
    axes = [axis for axis in grid.axes if len(axis.offsets) > 1]
    single = math.prod(axis.size for axis in grid.axes if len(axis.offsets) == 1)
    num_offsets = math.prod(len(axis.offsets) for axis in axes)
    halves = num_offsets * width**2
    per_case = math.prod(axis.size + max(axis.offsets) for axis in axes) * width
    if plan.method == "offsets":
        held = min(n * single, max(1, budget // per_case)) * per_case
        making = max(held + 3 * halves // 2, 5 * halves // 2)
    else:  # transforms of some cases and frequencies, twice for both operands of the products
        making = halves + _transforms(axes, n * single, width, num_offsets, budget)
    borders = 0
    for border, _ in plan.borders:
        others = math.prod(len(axis.offsets) for axis in border.others)
        borders += others * (border.num_blocks * channels) ** 2
    return images + halves + borders, images + making + borders


def _transforms(axes: Sequence[Axis], n: int, channels: int, num_offsets: int, budget: int) -> int:
    """Lines of some first frequencies, and both operands of the products of fewer of them."""
    sizes = [axis.size for axis in axes]
    first, *others = periods(sizes, [axis.offsets for axis in axes])
    first, num_others = first // 2 + 1, math.prod(others)
    per_line = 2 * math.prod(sizes[1:]) * channels
    per_part = 4 * num_others * channels
    cases = max(1, min(n, budget // (per_line + per_part)))
    chunk = max(1, min(first, budget // (per_line * cases)))
    inner = max(_CACHED // (per_part * cases), _FREQUENCIES // num_others)
    inner = max(1, min(inner, chunk, budget // (per_part * cases)))
    lines = cases * chunk * per_line if len(axes) > 1 else 0
    return lines + inner * per_part * cases + first * num_others * num_offsets


_CACHED, _FREQUENCIES = 2**21, 64  # as kernels/cpu/spectral.py has them
_COPIED = 2**17  # as kernels/cpu/squared_outer.py has it
_ROTATED, _SQUARED = 2**20, 2**18  # as kfac_xp/ops/squared_outer.py has them

_MOMENTS: dict[type, Callable[..., int]] = {
    FullyConnectedKroneckerMoment: _dense_side,
    DiagonalKroneckerMoment: _diagonal_side,
    FullyConnectedDiagonalMoment: _dense_squares,
    ConvInputMoment: _patches,
    ConvInputSUAMoment: _pixels,
    ConvOutputMoment: _conv_output,
    ConvDiagonalMoment: _conv_squares,
}


def inverse_elements(kinds: Sequence[str], n: int) -> int:
    """Beside the result, of what is computed of one covariance [n, n]."""
    if not kinds:
        return 0
    if set(kinds) == {"matpower"}:  # by halves
        return n * n // 4
    # Eigenvectors, before they are packed, and the checks'; LAPACK's copy and its workspace.
    return 5 * n * n


def turn_elements(d: int, c: int) -> int:
    """Beside the result, of taking a diagonal [d, c] into a new eigenbasis."""
    return d * d + c * c + d * c


def product_elements(is_rotated: bool, d: int, c: int, has_bias: bool) -> int:
    """Beside the result, of a product with a layer's vector [d, c]."""
    return d * c * (1 + has_bias + is_rotated)
