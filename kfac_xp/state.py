"""Nested state to and from flat arrays, and to and from disk."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import array_api_compat
import numpy as np

from kfac_xp.typing import Array


def to_numpy(x: Array) -> np.ndarray:
    """Copy of an array's values on the host; a NumPy array is returned as it is."""
    if array_api_compat.is_numpy_array(x):
        return x
    if array_api_compat.is_cupy_array(x):
        return x.get()
    if array_api_compat.is_torch_array(x):
        return x.detach().cpu().numpy()
    if array_api_compat.is_jax_array(x):
        return np.asarray(x)
    host = array_api_compat.array_namespace(x).__array_namespace_info__().default_device()
    return np.asarray(array_api_compat.to_device(x, host))


def flatten_state(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A nested state as one dict of NumPy arrays: ``{"blocks/conv1/total": array}``.

    Keys are joined by "/", escaped as in JSON Pointer where a name contains one ("/" as "~1",
    "~" as "~0"). Arrays are copied to the host, numbers become 0-d arrays. An empty dict leaves
    no trace.

    Raises
    ------
    TypeError
        If a key is not a string or a value is neither an array, a number nor a nested dict.
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
        elif isinstance(value, (bool, int, float)):
            flat[name] = np.asarray(value)
        else:
            raise TypeError(
                f"a state holds arrays, numbers and dicts of them; `{key}` is a "
                f"{type(value).__name__}."
            )
    return flat


def unflatten_state(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten_state`, with NumPy arrays in place of arrays and numbers."""
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = (p.replace("~1", "/").replace("~0", "~") for p in path.split("/"))
        node = state
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return state


def save_state(path: str | PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a nested state to an ``.npz`` file."""
    arrays: dict[str, Any] = dict(flatten_state(state))
    np.savez(path, **arrays)


def load_state(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a nested state written by `save_state`."""
    with np.load(path) as stored:
        return unflatten_state({key: stored[key] for key in stored.files})
