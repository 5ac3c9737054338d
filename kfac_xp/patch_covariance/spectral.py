"""Correlations of images at all offsets at once, by the correlation theorem in real arithmetic.

With F the Fourier transform of images that are zero beyond their sizes, periods P long enough
that nothing wraps around, and ``S_f = sum_n conj(F_n[f]) F_n[f]^T`` (Hermitian, [C, C]),

    R[d] = sum_y a[y] a[y + d]^T = 1 / prod(P) sum_f exp(2 pi i f.d / P) S_f.

As R is real, half of the frequencies do, with weight 2 where they stand for their conjugates.
With F = A + iB one real product per frequency holds all of S_f:

    G_f = A^T (A + B) + B^T (B - A) = Re S_f + Im S_f,

whose symmetric part is the real and whose antisymmetric part is the imaginary part of S_f. Hence

    R[d] = Q[d] + Q[-d]^T,    Q[d] = sum_f w_f / (2 prod(P)) (cos - sin)(2 pi f.d / P) G_f,

one matrix product of the offsets with the frequencies. The transforms are products with dense
matrices, which at these sizes are faster than fast transforms. All work is matrix products: per
case and frequency 4 C^2 flops, however many taps the filter has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kfac_xp.backend import Condition, KernelOp, array_namespace, itemsize, kept_like
from kfac_xp.patch_covariance.lattice import ranges
from kfac_xp.typing import Array

# Elements of the transforms of some frequencies, and of their products: both are written and read,
# and should stay in the cache between.
_CACHED = 2**19


def periods(sizes: Sequence[int], offsets: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shortest period of each axis at which no offset wraps around."""
    return tuple(n + max(d) for n, d in zip(sizes, offsets, strict=True))


def spectral_correlations(
    images: Array, offsets: tuple[tuple[int, ...], ...], scale: float, workspace: int
) -> Array:
    """``Q[d]`` for all offsets d: the correlation ``R[d]`` is ``Q[d] + Q[-d]^T``.

    Parameters
    ----------
    images : shape [N, *sizes, C]
        At least one axis.
    offsets
        For each axis, ascending and symmetric around 0.
    scale
        Multiplies the result.
    workspace
        Bytes for transforms, of some cases and frequencies at a time; those of one case and one
        frequency of the first axis are held in any case.

    Returns
    -------
    Array of shape [prod(len(offsets)), C, C], offsets in row-major order.
    """
    sizes = tuple(images.shape[1:-1])
    phases, *transforms = _tables(images, sizes, offsets, _float_name(images))
    return phased_correlations(images, phases * scale, transforms, workspace)


@KernelOp
def phased_correlations(
    images: Array, phases: Array, transforms: Sequence[Array], workspace: int
) -> Array:
    """``sum_f phases[:, f] G_f`` over frequencies f, with G_f as in this module's docstring.

    Parameters
    ----------
    images : shape [N, *sizes, C]
        At least one axis.
    phases : shape [offsets, first frequencies, other frequencies]
        Those of the first axis, and of all others in row-major order.
    transforms : shapes [(f, part), y] and, after the first, [(f, part), (part, y)]
        For each axis, its transform to real and imaginary parts.
    workspace
        Bytes for transforms, as for `spectral_correlations`.

    Returns
    -------
    Array of shape [offsets, C, C].
    """
    first, *others = transforms
    num_offsets, num_first, num_others = phases.shape
    total = None
    # Elements of both operands of the products, while they are made, and of the first transform.
    per_part = 6 * num_others * images.shape[-1]
    per_line = 2 * math.prod(images.shape[2:])
    budget = workspace // itemsize(images)
    cases = max(1, budget // (per_part + per_line))
    for start, stop in ranges(images.shape[0], cases):
        part = images[start:stop, ...]
        chunk = max(1, budget // (per_line * part.shape[0]))
        # Fewer frequencies than offsets, and adding up would cost more than multiplying.
        inner = max(_CACHED // (per_part * part.shape[0]), 2 * num_offsets // num_others)
        inner = max(1, min(inner, budget // (per_part * part.shape[0])))
        for low, high in ranges(num_first, chunk):
            lines = _transformed_first(first[2 * low : 2 * high, :], part)
            for i, j in ranges(high - low, inner):
                parts = _transformed(lines[:, i:j, ...], others)
                added = _phased_products(phases[:, low + i : low + j, :], parts)
                total = added if total is None else total + added
    return total


def _phased_products(phases: Array, parts: Array) -> Array:
    """``sum_f phases[:, f] G_f`` from real and imaginary parts [F, 2, N, C]."""
    xp = array_namespace(parts)
    num_frequencies, _, num_cases, channels = parts.shape
    real, imaginary = parts[:, 0, :, :], parts[:, 1, :, :]
    shape = (num_frequencies, 2 * num_cases, channels)
    right = xp.reshape(xp.stack([real + imaginary, imaginary - real], axis=1), shape)
    left = xp.matrix_transpose(xp.reshape(parts, shape))
    products = xp.reshape(xp.matmul(left, right), (num_frequencies, -1))
    phased = xp.matmul(xp.reshape(phases, (-1, num_frequencies)), products)
    return xp.reshape(phased, (-1, channels, channels))


def _transformed_first(matrix: Array, images: Array) -> Array:
    """[N, frequencies, 2, *other sizes, C] from images [N, *sizes, C]."""
    xp = array_namespace(images)
    num_cases, size, *rest = images.shape
    lines = xp.matmul(matrix, xp.reshape(images, (num_cases, size, -1)))
    return xp.reshape(lines, (num_cases, -1, 2, *rest))


def _transformed(x: Array, matrices: Sequence[Array]) -> Array:
    """[frequencies, 2, N, C] from x [N, first frequencies, 2, *other sizes, C].

    Real and imaginary parts stand before the axis to transform next, so that a step is a product
    with one real matrix, and then behind its frequencies.
    """
    xp = array_namespace(x)
    num_cases, channels = x.shape[0], x.shape[-1]
    if not matrices:
        return xp.permute_dims(x, (1, 2, 0, 3))
    *earlier, last = matrices
    for matrix in earlier:
        frequencies, size = x.shape[1], x.shape[3]
        rest = x.shape[4:]
        x = xp.reshape(x, (num_cases, frequencies, 2 * size, math.prod(rest)))
        x = xp.reshape(xp.matmul(matrix, x), (num_cases, -1, 2, *rest))
    x = xp.reshape(x, (num_cases, x.shape[1], -1, channels))
    return xp.reshape(xp.moveaxis(xp.matmul(last, x), 0, -2), (-1, 2, num_cases, channels))


@kept_like
def _tables(
    sizes: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], dtype: str
) -> tuple[np.ndarray, ...]:
    """``w_f / 2 prod(P) (cos - sin)``, [offsets, first, other frequencies]; and the transforms.

    The first transform is real and to half of the frequencies, [(f, part), y]; the others are
    complex, [(f, part), (part, y)].
    """
    lengths = periods(sizes, offsets)
    first, *others = (np.arange(p) for p in lengths)
    first = first[: lengths[0] // 2 + 1]
    transforms: list[np.ndarray] = []
    for frequencies, size, length in zip((first, *others), sizes, lengths, strict=True):
        angle = 2 * np.pi / length * (np.outer(frequencies, np.arange(size)) % length)
        cos, sin = np.cos(angle), np.sin(angle)
        real, imaginary = np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)
        both = np.stack([real, imaginary], axis=2) if transforms else real
        transforms.append(both.reshape(2 * len(frequencies), -1))
    angle = np.zeros((1, 1))
    for d, frequencies, length in zip(offsets, (first, *others), lengths, strict=True):
        own = 2 * np.pi / length * (np.outer(d, frequencies) % length)
        angle = angle[:, None, :, None] + own[None, :, None, :]
        angle = angle.reshape(angle.shape[0] * angle.shape[1], -1)
    phases = (np.cos(angle) - np.sin(angle)).reshape(len(angle), len(first), -1)
    is_own_conjugate = (2 * first) % lengths[0] == 0
    weights = np.where(is_own_conjugate, 1.0, 2.0) / (2 * math.prod(lengths))
    phases *= weights[:, None]
    return tuple(table.astype(dtype) for table in (phases, *transforms))


def _float_name(x: Array) -> str:
    """Say "float32" or "float64", whatever the library calls it."""
    return str(x.dtype).rpartition(".")[2]


phased_correlations.register(
    "numba",
    "kfac_xp.kernels.cpu.spectral:phased_correlations",
    accepts=Condition(
        "float32 or float64 with a multiple of 16 channels",
        lambda images, *_: (
            _float_name(images) in ("float32", "float64") and images.shape[-1] % 16 == 0
        ),
    ),
)
