"""Reads the numbers that the original TensorFlow library produced (``tests/data``)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from kfac_xp.backend import is_readable

DATA = Path(__file__).parent / "data"

# What the reference keeps in global constants is an option here.
_OPTIONS = {
    "ZERO_DEBIAS": "zero_debias",
    "EIGENVALUE_DECOMPOSITION_THRESHOLD": "eigenvalue_decomposition_threshold",
    "EIGENVALUE_CLIPPING_THRESHOLD": "eigenvalue_clipping_threshold",
    "NORMALIZE_DAMPING_POWER": "normalize_damping_power",
    "PI_TYPE": "pi_type",
    "POSDEF_INV_METHOD": "posdef_inv_method",
    "TOWER_STRATEGY": "tower_strategy",
    "POSDEF_EIG_METHOD": "posdef_eig_method",
    "ASSUME_ZERO_MEAN_ACTIVATIONS": "assume_zero_mean_activations",
    "SUBTRACT_MEAN_CONTRIB_FROM_COV": "subtract_mean_contrib_from_cov",
    "_INPUTS_TO_EXTRACT_PATCHES_FACTOR": "inputs_to_extract_patches_factor",
}


@functools.cache
def load(name):
    """``{case: (meta, {key: array})}`` of one file."""
    with np.load(DATA / f"{name}.npz") as stored:
        index, buffer = json.loads(str(stored["index"])), stored["buf"]
    cases = {}
    for case, entry in index.items():
        arrays = {}
        for key, (offset, shape, dtype) in entry["arrays"].items():
            size = int(np.prod(shape, dtype=np.int64))
            arrays[key] = buffer[offset : offset + size].reshape(shape).astype(dtype)
        cases[case] = (entry["meta"], arrays)
    return cases


def every(*names, where=lambda meta: True):
    """Parameters (file, case, dtype): each case in float64, if it was made so, and in float32.

    All but one of each class, one with the fewest arrays, carry the mark `more`: see
    ``conftest.py``.
    """
    cases = [(name, case) for name in names for case, (m, _) in load(name).items() if where(m)]
    fewest = {}
    for name, case in sorted(cases, key=lambda found: len(load(found[0])[found[1]][1])):
        fewest.setdefault(load(name)[case][0]["cls"], (name, case))
    params, seen = [], set()
    for name in names:
        for case, (meta, _) in load(name).items():
            for dtype in ("float64", "float32") if where(meta) else ():
                if dtype == "float32" or meta.get("dtype", "float64") == "float64":
                    is_first = (name, case) == fewest[meta["cls"]] and meta["cls"] not in seen
                    marks = [] if is_first else [pytest.mark.more]
                    seen.update([meta["cls"]] * is_first)
                    identity = f"{name}-{case}-{dtype}"
                    params.append(pytest.param(name, case, dtype, id=identity, marks=marks))
    return params


def options(meta):
    """Keyword arguments that stand for the case's global constants."""
    given = dict(meta["globals"])
    found = {_OPTIONS[k]: given.pop(k) for k in list(given) if k in _OPTIONS}
    start = given.pop("covariance_initializer", "zeros")
    if start == "identity" or given.pop("INIT_COVARIANCES_AT_ZERO", True) is False:
        found["initial"] = "identity"
    assert not given, f"constants without an option: {given}"
    return found


def assert_close(actual, expected, rtol, what=""):
    """Compare to a relative error of the largest entry of the expected array."""
    actual, expected = to_numpy(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} not {expected.shape}"
    scale = np.max(np.abs(expected), initial=0.0) or 1.0
    error = np.max(np.abs(actual - expected), initial=0.0) / scale
    assert error <= rtol, f"{what}: relative error {error:.2e} above {rtol:.0e}"


def require_refusal(update, owner, x, match):
    """Statistics that are not finite, like `x`: refused at once where looking is free.

    On a device they are left out, and refused by the next inverse update of a factor or block. The
    message is returned.
    """
    if not is_readable(x):
        update()
        update = owner.update_inverses
    with pytest.raises(FloatingPointError, match=match) as caught:
        update()
    return str(caught.value)


def to_numpy(x):
    """Values of an array of any library."""
    if hasattr(x, "get"):
        return x.get()
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)
