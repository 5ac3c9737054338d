"""One step of a moving average on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_xp.kernels.cpu.jit import compiled


def averaged(total: Any, new: Any, decay: Any, weight: Any, symmetrize: bool = False) -> Any:
    """See ``kfac_xp.averages.averaged``."""
    if symmetrize:
        new = np.ascontiguousarray((new + np.swapaxes(new, -1, -2)) / 2)
    out = np.empty_like(new)
    scalar = new.dtype.type
    finite = _fill(
        total.reshape(-1), new.reshape(-1), scalar(decay), scalar(weight), out.reshape(-1)
    )
    return out if finite else total, finite


@compiled
def _fill(total, new, decay, weight, out):
    """Write every element of `out` [n]; True if all of `new` [n] is finite."""
    # A sum of zeros, to which an infinity or a NaN adds NaN.
    zero = new.dtype.type(0)
    rest = zero
    for i in range(np.uintp(out.size)):
        out[i] = decay * total[i] + weight * new[i]
        rest += zero * new[i]
    return rest == zero
