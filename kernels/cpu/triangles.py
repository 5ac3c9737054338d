"""Symmetric matrices packed to their lower triangle, and unpacked, on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled

# Side of the squares in which a triangle is mirrored: one of them fits the first cache.
_TILE = 64


def pack_symmetric(x: Any) -> Any:
    """See ``kfac_xp.ops.pack_symmetric``."""
    *batch, n, _ = x.shape
    packed = np.empty((math.prod(batch), n * (n + 1) // 2), dtype=x.dtype)
    _pack(np.ascontiguousarray(x).reshape(len(packed), n, n), packed)
    return packed.reshape(*batch, packed.shape[1])


def unpack_symmetric(packed: Any, n: int | None = None) -> Any:
    """See ``kfac_xp.ops.unpack_symmetric``."""
    *batch, size = packed.shape
    n = (math.isqrt(8 * size + 1) - 1) // 2
    x = np.empty((math.prod(batch), n, n), dtype=packed.dtype)
    _unpack(np.ascontiguousarray(packed).reshape(len(x), size), x)
    return x.reshape(*batch, n, n)


@compiled
def _pack(matrices, packed):
    """Write every element of `packed` [B, n (n + 1) / 2] from `matrices` [B, n, n]."""
    count, n, _ = matrices.shape
    for b in range(count):
        start = np.uintp(0)
        for i in range(np.uintp(n)):
            for j in range(i + np.uintp(1)):
                packed[b, start + j] = matrices[b, i, j]
            start += i + np.uintp(1)


@compiled
def _unpack(packed, matrices):
    """Write every element of `matrices` [B, n, n]: squares of the triangle, and then their images.

    A square is still in the cache when it is read along its columns.
    """
    count, n, _ = matrices.shape
    for b in range(count):
        for low in range(0, n, _TILE):
            for left in range(0, low + 1, _TILE):
                rows = np.uintp(min(_TILE, n - low))
                first = np.uintp(low)
                for i in range(first, first + rows):
                    start = i * (i + np.uintp(1)) // np.uintp(2)
                    end = min(np.uintp(left + _TILE), i + np.uintp(1))
                    for j in range(np.uintp(left), end):
                        matrices[b, i, j] = packed[b, start + j]
                for j in range(np.uintp(left), np.uintp(min(left + _TILE, n))):
                    for i in range(max(first, j), first + rows):
                        matrices[b, j, i] = matrices[b, i, j]
