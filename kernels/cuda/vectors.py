"""Several neighbouring elements of shared memory, read in one instruction.

An array of them is one of records with one field "v": ``array[i]["v"][j]`` is an element to read or
to write. Reads of all elements of a record become one, since the array is aligned by the size of a
record: by Numba's own target always, by numba-cuda if told so.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, from_dtype

VECTOR = 16
"""Bytes that a thread can read at a time."""

_config: Any = cuda.config
ALIGNS = getattr(cuda, "implementation", "") == "NVIDIA" and not _config.ENABLE_CUDASIM
"""True if ``cuda.shared.array`` wants to be told the alignment, which is `VECTOR`."""


def vectors(dtype: str, each: int) -> tuple[Any, int]:
    """The Numba type of as many elements as fit into `VECTOR` and divide `each`, and how many."""
    count = math.gcd(each, VECTOR // np.dtype(dtype).itemsize)
    return from_dtype(np.dtype([("v", dtype, (count,))], align=True)), count
