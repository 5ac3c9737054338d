"""Which method makes the covariance of patches, by an estimate of what each would cost."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from kfac_xp.geometry import ConvGeometry
from kfac_xp.patch_covariance.lattice import Slab, TapGrid, lattice_of
from kfac_xp.patch_covariance.rates import Rates
from kfac_xp.patch_covariance.spectral import periods

Method = Literal["chunked", "offsets", "spectral"]
METHODS: tuple[Method, ...] = get_args(Method)

# What is chosen in place of patches must be estimated to take at most this part of their time:
# estimates err, and patches are never a bad choice.
_PROMISE = 0.9


@dataclass(frozen=True)
class Plan:
    """How the covariance of the patches of one `TapGrid` is made.

    Parameters
    ----------
    grid
        The taps.
    method
        ``"chunked"`` makes the patches; the others make correlations over all locations, and
        subtract the locations outside the window.
    seconds
        Estimate.
    slabs
        Those locations, in pieces, each with its own plan. None for ``"chunked"``.
    """

    grid: TapGrid
    method: Method
    seconds: float
    slabs: tuple[tuple[Slab, Plan], ...] = ()


@dataclass(frozen=True)
class Sizes:
    """What besides the geometry an estimate depends on."""

    num_cases: int
    num_channels: int
    itemsize: int


@functools.lru_cache(maxsize=1024)
def plans_for(
    geometry: ConvGeometry, space: tuple[int, ...], sizes: Sizes, rates: Rates
) -> dict[Method, Plan]:
    """A plan by each method that there is for this geometry."""
    lattice = lattice_of(geometry, space)
    if lattice is None:
        return {}
    plans = grid_plans(lattice.grid, sizes, rates)
    patches = _chunked_seconds(
        geometry.num_taps, sizes, rates, geometry.num_locations(space), geometry.num_taps == 1
    )
    cut = 0.0 if lattice.grid.num_blocks == 1 else rates.passes(_elements(lattice.grid, sizes))
    return {
        method: Plan(
            plan.grid, method, patches if method == "chunked" else plan.seconds + cut, plan.slabs
        )
        for method, plan in plans.items()
    }


def grid_plans(grid: TapGrid, sizes: Sizes, rates: Rates) -> dict[Method, Plan]:
    """A plan by each method for the taps of a grid."""
    chunked = _chunked_seconds(grid.num_taps, sizes, rates, grid.num_rows)
    plans: dict[Method, Plan] = {"chunked": Plan(grid, "chunked", chunked)}
    if not grid.has_correlations:
        return plans
    slabs = tuple((slab, _slab_plan(slab.grid, sizes, rates)) for slab in grid.slabs())
    width = grid.num_taps * sizes.num_channels
    shared = rates.passes(2 * width**2) + sum(
        plan.seconds + rates.passes(3 * (plan.grid.num_taps * sizes.num_channels) ** 2)
        for _, plan in slabs
    )
    offsets = _offsets_seconds(grid, sizes, rates)
    spectral = _spectral_seconds(grid, sizes, rates)
    plans["offsets"] = Plan(grid, "offsets", offsets + shared, slabs)
    plans["spectral"] = Plan(grid, "spectral", spectral + shared, slabs)
    return plans


def _slab_plan(grid: TapGrid, sizes: Sizes, rates: Rates) -> Plan:
    """The cheaper of patches and the spectral method, which are compiled for NumPy."""
    plans = grid_plans(grid, sizes, rates)
    plans.pop("offsets", None)
    width, rows = grid.num_taps * sizes.num_channels, grid.num_rows * sizes.num_cases
    if is_compiled(width):
        seconds = rates.passes(2 * rows * width) + rates.blocks(rows * width**2)
        plans["chunked"] = Plan(grid, "chunked", _scaled(sizes, seconds))
    return cheapest(plans)


def cheapest(plans: dict[Method, Plan]) -> Plan:
    """The plan with the lowest estimate; another than patches if that is a tenth lower."""
    return min(
        plans.values(),
        key=lambda plan: plan.seconds * (1.0 if plan.method == "chunked" else 1 / _PROMISE),
    )


def _chunked_seconds(
    num_taps: int, sizes: Sizes, rates: Rates, rows: int, in_place: bool = False
) -> float:
    rows *= sizes.num_cases
    width = num_taps * sizes.num_channels
    copies = 0.0 if in_place else rates.passes(2 * rows * width)
    return _scaled(sizes, copies + rates.second_moment(rows, width))


def _offsets_seconds(grid: TapGrid, sizes: Sizes, rates: Rates) -> float:
    channels = grid.num_blocks * sizes.num_channels
    rows = sizes.num_cases * math.prod(periods(grid.sizes, [a.offsets for a in grid.axes]))
    num_offsets = math.prod(len(axis.offsets) for axis in grid.axes)
    seconds = rates.second_moment(rows, channels)
    seconds += num_offsets // 2 * rates.product(channels, rows, channels)
    seconds += rates.passes(2 * rows * channels) + rates.passes(4 * num_offsets * channels**2)
    return _scaled(sizes, seconds)


def _spectral_seconds(grid: TapGrid, sizes: Sizes, rates: Rates) -> float:
    axes = [axis for axis in grid.axes if len(axis.offsets) > 1]
    single = math.prod(axis.size for axis in grid.axes if len(axis.offsets) == 1)
    cases, channels = sizes.num_cases * single, grid.num_blocks * sizes.num_channels
    first, *others = periods([a.size for a in axes], [a.offsets for a in axes])
    num_offsets = math.prod(len(axis.offsets) for axis in axes)
    # (rows, inner axis, columns, how many) of every product.
    done = first // 2 + 1
    rest = math.prod(axis.size for axis in axes[1:]) * channels
    products = [(2 * done, axes[0].size, rest, cases)]
    for axis, length in zip(axes[1:], others, strict=True):
        rest //= axis.size
        products.append((2 * length, 2 * axis.size, rest, cases * done))
        done *= length
    products.append((channels, 2 * cases, channels, done))
    products.append((num_offsets, done, channels**2, 1))
    if is_compiled(channels):
        seconds = rates.blocks(sum(2 * m * k * n * count for m, k, n, count in products))
    else:
        seconds = sum(rates.product(*product) for product in products)
    seconds += rates.passes(4 * done * cases * channels)
    seconds += rates.passes(4 * num_offsets * channels**2)
    return _scaled(sizes, seconds)


def is_compiled(columns: int) -> bool:
    """True for so many columns as fill the vectors of the kernels for NumPy."""
    return columns % 16 == 0


def _elements(grid: TapGrid, sizes: Sizes) -> int:
    images = sizes.num_cases * math.prod(grid.sizes) * sizes.num_channels
    return 2 * grid.num_blocks * images


def _scaled(sizes: Sizes, seconds: float) -> float:
    return seconds * sizes.itemsize / 4
