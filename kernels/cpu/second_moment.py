"""The second moment of rows on the CPU, where calls of BLAS would disturb other threads.

BLAS's own threads wait for more to do by spinning, for tens of milliseconds: beside them, Python's
threads get half of a core.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu import scratch
from kfac_xp.kernels.cpu.blocks import ROWS, lanes, set_block
from kfac_xp.kernels.cpu.jit import compiled
from kfac_xp.kernels.cpu.threads import run_in_parts


def second_moment(rows: Any) -> Any:
    """``rows.T @ rows`` of shape [d, d], d a multiple of 16. In memory from `scratch`."""
    count, d = rows.shape
    width = lanes(rows.dtype)
    out = scratch.empty((d, d), rows.dtype)
    with scratch.frame():
        panels = scratch.empty((d // width, count, width), rows.dtype)
        panels[...] = rows.reshape(count, -1, width).transpose(1, 0, 2)
        # From both ends: the first rows have the most blocks right of the diagonal.
        run_in_parts(
            lambda first, last: _fill_pairs(panels, out, first, last),
            count=d // (2 * ROWS),
            work=count * d * d // 2,
        )
    _mirror(out, width, 0, d // width)
    return out


@compiled
def _fill_pairs(panels, out, first, last):
    """Fill the blocks of rows `first` to `last`, and their opposites, from the diagonal on."""
    num_panels, count, width = panels.shape
    d = out.shape[1]
    for pair in range(first, last):
        for block in (pair, d // ROWS - 1 - pair):
            row = block * ROWS
            left = (row // width) * count * width + row % width
            for panel in range(row // width, num_panels):
                set_block(
                    *(panels, left, width, panels, panel * count * width, width, count),
                    *(out, row * d + panel * width, d),
                )


@compiled
def _mirror(out, width, first, last):
    """Write what lies left of the diagonal, in the squares `first` to `last` from the top."""
    side = np.uintp(width)
    for p in range(first, last):
        row = np.uintp(p) * side
        for q in range(p + 1):
            column = np.uintp(q) * side
            for r in range(side):
                for c in range(side):
                    out[row + r, column + c] = out[column + c, row + r]
