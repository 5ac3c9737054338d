"""Arguments by which ops are timed: small and large problems of the kinds that networks have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kfac_xp.geometry import ConvGeometry
from kfac_xp.patch_covariance.blocks import layout_of
from kfac_xp.patch_covariance.borders import borders_of
from kfac_xp.patch_covariance.lattice import lattice_of
from kfac_xp.typing import Array


class Draw(Protocol):
    """Makes an array of random numbers on the device, in the dtype that is timed."""

    def __call__(self, *shape: int) -> Array:
        """An array of this shape."""


@dataclass(frozen=True)
class Example:
    """Arguments of an op.

    Parameters
    ----------
    words
        The sizes, for people.
    arguments
        Makes them.
    """

    words: str
    arguments: Callable[[Draw], tuple[Any, ...]]


_FILTER = ConvGeometry.create((3, 3))
# Spatial size and channels of 3x3 convolutions: those of a ResNet-50, and two small ones.
_LAYERS = ((56, 64), (28, 128), (14, 256), (7, 512), (8, 16), (4, 3))


def _patches(n: int, h: int, c: int, k: int = 3, stride: int = 1) -> Example:
    geometry = ConvGeometry.create((k, k), (stride, stride))
    words = f"{k}x{k} N{n} H{h} C{c}" + (f" stride {stride}" if stride > 1 else "")
    return Example(words, lambda draw: (draw(n, h, h, c), geometry))


def _rows(n: int, t: int, d: int, c: int) -> Example:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        return (draw(n, t, d), draw(n, t, c)) if t > 1 else (draw(n, d), draw(n, c))

    return Example(f"N{n} T{t} D{d} C{c}", arguments)


def _conv(n: int, h: int, c: int, c_out: int) -> Example:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        return draw(n, h, h, c), draw(n, h, h, c_out), _FILTER

    return Example(f"3x3 N{n} H{h} C{c} O{c_out}", arguments)


def _average(d: int) -> Example:
    """As of a Kronecker factor, of which the symmetric part is averaged in."""
    return Example(f"{d}x{d}", lambda draw: (draw(d, d), draw(d, d), 0.95, 0.05, True))


def _triangle(d: int) -> Example:
    return Example(f"{d}x{d}", lambda draw: (draw(d * (d + 1) // 2),))


def _square(d: int) -> Example:
    return Example(f"{d}x{d}", lambda draw: (draw(d, d),))


def _blocks(c: int) -> Example:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        lattice = lattice_of(_FILTER, (8, 8))
        assert lattice is not None
        parts = [
            (1, lattice.grid.axes),
            *((b.num_blocks, b.others) for b in borders_of(lattice.grid)),
        ]
        halves, *borders = (
            draw(math.prod(len(axis.offsets) for axis in axes), blocks, c, blocks, c)
            for blocks, axes in parts
        )
        return halves, layout_of(lattice.grid), borders

    return Example(f"3x3 C{c}", arguments)


def _shifted(n: int, h: int, c: int) -> Example:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        width = h + 2
        steps = [y * width + x for y in range(3) for x in range(-2, 3) if y or x >= 0]
        rows = draw(n * width**2, c)
        rows[-max(steps) :, :] = 0  # of the last image's padding, which kernels rely on
        return rows, tuple(steps)

    return Example(f"3x3 N{n} H{h} C{c}", arguments)


# Kronecker factors of small and large layers.
_SIZES = (16, 64, 256, 1024, 4096)

EXAMPLES: Mapping[str, Sequence[Example]] = {
    "extract_patches": [
        *(_patches(32, h, c) for h, c in _LAYERS),
        _patches(32, 224, 3, 7, 2),
        _patches(32, 28, 64, 1, 2),
    ],
    "squared_outer": [
        _rows(32, 784, 128, 128),
        _rows(32, 196, 256, 256),
        _rows(32, 49, 512, 512),
        _rows(64, 16, 512, 128),
        _rows(128, 4, 1152, 128),
        _rows(64, 16, 32, 32),
        _rows(4, 4, 16, 16),
        _rows(128, 1, 2048, 1000),
        _rows(32, 1, 64, 10),
    ],
    "conv_squared_outer": [
        _conv(32, 28, 64, 64),
        _conv(32, 14, 128, 128),
        _conv(32, 7, 256, 256),
        _conv(128, 4, 128, 128),
        _conv(64, 8, 16, 16),
        _conv(4, 4, 3, 5),
    ],
    "averaged": [_average(d) for d in _SIZES],
    "correlation_blocks": [_blocks(c) for c in (3, 16, 64, 256, 512)],
    "pack_symmetric": [_square(d) for d in _SIZES],
    "shifted_products": [_shifted(32, h, c) for h, c in _LAYERS],
    "unpack_symmetric": [_triangle(d) for d in _SIZES],
}
"""``{op: examples}``. An op with a CUDA kernel has some, or the kernel is never measured."""
