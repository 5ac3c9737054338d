"""Fixtures: every array library that is installed, and a seeded generator."""

import importlib
import os

import numpy as np
import pytest

try:
    import kfac_xp  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise pytest.UsageError(
        "kfac_xp cannot be imported. Run from the root of the checkout, or install it first with "
        "`pip install -e .`"
    ) from error

LIBRARIES = ["numpy", "array_api_strict", "torch", "jax.numpy"]


def namespace(library):
    """The library's Array API namespace; skips the test with a reason if it cannot be used."""
    if library == "jax.numpy":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_platforms", "cpu")
        # Compiling dominates these small tests, and is faster when it optimises less.
        jax.config.update("jax_disable_most_optimizations", True)
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "cupy" and not module.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if library in ("torch", "cupy"):
        return importlib.import_module(f"array_api_compat.{library}")
    return module


@pytest.fixture(params=[*LIBRARIES, pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """Namespace of each array library in turn."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("this process runs Numba's CUDA simulator")
    return namespace(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20260131)


def pytest_collection_modifyitems(config, items):
    """Run the cases marked `more` everywhere but on JAX, which compiles every new shape."""
    slow = [
        item
        for item in items
        if item.get_closest_marker("more")
        and getattr(item, "callspec", None) is not None
        and item.callspec.params.get("xp") == "jax.numpy"
    ]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
