"""Nested state to and from flat arrays of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import array_api_compat
import numpy as np

from kfac_xp.state.errors import StateError
from kfac_xp.typing import Array


def to_numpy(x: Array) -> np.ndarray:
    """Copy of an array's values on the host; a NumPy array is returned as it is.

    NumPy has no bfloat16: such arrays come as float32, which holds the same values.
    """
    if array_api_compat.is_numpy_array(x):
        return x
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
        return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    if array_api_compat.is_jax_array(x):
        return np.asarray(x.astype("float32") if str(x.dtype) == "bfloat16" else x)
    host = array_api_compat.array_namespace(x).__array_namespace_info__().default_device()
    return np.asarray(array_api_compat.to_device(x, host))


def flatten_state(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A nested state as one dict of NumPy arrays: ``{"blocks/conv1/total": array}``.

    Keys are joined by "/", escaped as in JSON Pointer where a name contains one ("/" as "~1",
    "~" as "~0"). Arrays are copied to the host; numbers and words become 0-d arrays, and so do the
    digits of an int that is too large for one. An empty dict leaves no trace.

    Raises
    ------
    TypeError
        If a key is not a string, or a value is neither an array, a number, a word nor a dict of
        them.
    """
    flat: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"keys of a state must be strings; got {key!r}.")
        name = key.replace("~", "~0").replace("/", "~1")
        if isinstance(value, Mapping):
            flat |= {f"{name}/{rest}": a for rest, a in flatten_state(value).items()}
        elif array_api_compat.is_array_api_obj(value):
            flat[name] = np.array(to_numpy(value))
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            flat[name] = np.asarray(str(value))
        elif isinstance(value, (bool, int, float, str)):
            flat[name] = np.asarray(value)
        else:
            raise TypeError(
                f"a state holds arrays, numbers, words and dicts of them; `{key}` is a "
                f"{type(value).__name__}."
            )
    return flat


def unflatten_state(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten_state`, with NumPy arrays in place of arrays, numbers and words.

    Raises
    ------
    StateError
        If one key is both an array and a dict.
    """
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = (p.replace("~1", "/").replace("~0", "~") for p in path.split("/"))
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise StateError(f"the state's key {path!r} goes through an array.")
        if last in node:
            raise StateError(f"the state's key {path!r} is there twice, or has others below it.")
        node[last] = value
    return state
