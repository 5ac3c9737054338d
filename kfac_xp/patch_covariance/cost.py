"""Which method makes the covariance of patches, by an estimate of what each would cost."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kfac_xp.geometry import ConvGeometry
from kfac_xp.patch_covariance.borders import Border, borders_of
from kfac_xp.patch_covariance.lattice import Axis, TapGrid, lattice_of
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
    borders
        Those locations, in pieces, each with the method that makes its correlations.
    """

    grid: TapGrid
    method: Method
    seconds: float
    borders: tuple[tuple[Border, Method], ...] = ()


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
    grid = lattice.grid
    rows, ready = geometry.num_locations(space), geometry.num_taps == 1
    chunked = _chunked_seconds(geometry.num_taps, sizes, rates, rows, ready)
    chunked = rates.corrected("chunked", chunked)
    plans: dict[Method, Plan] = {"chunked": Plan(grid, "chunked", chunked)}
    if not grid.has_correlations:
        return plans
    shared, borders = _shared_seconds(grid, sizes, rates), []
    for border in borders_of(grid):
        outside = _outside(border, sizes)
        found = _correlation_seconds(border.num_blocks, border.others, outside, rates)
        method = min(found, key=lambda name: found[name])
        borders.append((border, method))
        shared += found[method]
    for method, seconds in _correlation_seconds(grid.num_blocks, grid.axes, sizes, rates).items():
        seconds = rates.corrected(method, seconds + shared)
        plans[method] = Plan(grid, method, seconds, tuple(borders))
    return plans


def _outside(border: Border, sizes: Sizes) -> Sizes:
    """The sizes of a border's images, where residues are cases."""
    cases = sizes.num_cases * math.prod(edge.spacing for edge in border.edges)
    return replace(sizes, num_cases=cases)


def _shared_seconds(grid: TapGrid, sizes: Sizes, rates: Rates) -> float:
    """What every method takes that makes correlations: images, and the result from its parts."""
    width = grid.num_taps * sizes.num_channels
    elements = 2.0 * width**2
    if grid.num_blocks > 1:  # images of the phases
        elements += 2 * grid.num_blocks * math.prod(grid.sizes) * _per_pixel(sizes)
    for border in borders_of(grid):
        taken = sum(block >= 0 for block in border.blocks)
        pixels = math.prod(edge.lines * edge.spacing for edge in border.edges)
        pixels *= grid.num_blocks * math.prod(axis.size for axis in border.others)
        elements += (taken * sizes.num_channels) ** 2 + 2 * pixels * _per_pixel(sizes)
    return _scaled(sizes, rates.passes(elements))


def _per_pixel(sizes: Sizes) -> int:
    return sizes.num_cases * sizes.num_channels


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


def _correlation_seconds(
    num_blocks: int, axes: tuple[Axis, ...], sizes: Sizes, rates: Rates
) -> dict[Method, float]:
    """The time for correlations of images with these axes, by each method that makes them."""
    # Axes on which all taps read the same position are as good as more cases.
    single = math.prod(axis.size for axis in axes if len(axis.offsets) == 1)
    several = [axis for axis in axes if len(axis.offsets) > 1]
    sizes = replace(sizes, num_cases=sizes.num_cases * single)
    channels = num_blocks * sizes.num_channels
    lengths = periods([axis.size for axis in several], [axis.offsets for axis in several])
    num_offsets = math.prod(len(axis.offsets) for axis in several)
    rows = sizes.num_cases * math.prod(lengths)
    offsets = rates.second_moment(rows, channels)
    offsets += num_offsets // 2 * rates.product(channels, rows, channels)
    offsets += rates.passes(2 * rows * channels)
    put_together = rates.passes(4 * num_offsets * channels**2)
    seconds: dict[Method, float] = {"offsets": _scaled(sizes, offsets + put_together)}
    if several:
        spectral = _transform_seconds(several, lengths, channels, sizes.num_cases, rates)
        seconds["spectral"] = _scaled(sizes, spectral + put_together)
    return seconds


def _transform_seconds(
    axes: list[Axis], lengths: tuple[int, ...], channels: int, cases: int, rates: Rates
) -> float:
    """The time for transforms of images, their products, and correlations from these."""
    first, *others = lengths
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
    if is_compiled(channels, rates):
        seconds = rates.blocks(sum(2 * m * k * n * count for m, k, n, count in products))
    else:
        seconds = sum(rates.product(*product) for product in products)
    return seconds + rates.passes(4 * done * cases * channels)


def is_compiled(columns: int, rates: Rates) -> bool:
    """True on a host for so many columns as fill the vectors of the kernels for NumPy."""
    return not rates.is_gpu and columns % 16 == 0


def _scaled(sizes: Sizes, seconds: float) -> float:
    return seconds * sizes.itemsize / 4
