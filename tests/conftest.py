"""Fixtures: every array library that is installed, and a seeded generator."""

import gc
import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

# Workers of xdist share the cores: threads of BLAS, which wait in a loop, would take them from each
# other. Set before any library reads it, and for the processes that tests start, too.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(_variable, str(max(1, _threads)))

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
    """Leave out what cannot tell anything here.

    Cases marked `more` do not run on JAX, which compiles every new shape, unless ``-m more`` asks
    for them; those of the support table do if it is to be written. CuPy's do not run where it is
    not installed, unless ``-m gpu`` asks for them: then they are skipped with the reason. Those on
    an emulated device take a minute, and run with ``-m emulated``.
    """
    asked_for_more = "more" in config.getoption("-m")
    writes_table = config.getoption("--support-table", None) is not None
    no_cupy = importlib.util.find_spec("cupy") is None and "gpu" not in config.getoption("-m")

    def tells_nothing(item):
        if no_cupy and item.get_closest_marker("gpu"):
            return True
        if item.get_closest_marker("emulated") and "emulated" not in config.getoption("-m"):
            return True
        if writes_table and item.path.name == "test_support.py":
            return False
        library = getattr(item, "callspec", None) and item.callspec.params.get("xp")
        is_more = library == "jax.numpy" and item.get_closest_marker("more") is not None
        return is_more and not asked_for_more

    left_out = [item for item in items if tells_nothing(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not tells_nothing(item)]
    items.sort(key=turn)


def turn(item):
    """JAX's tests first, then PyTorch's: by themselves, they are on one worker of xdist.

    Workers begin with equal parts of the list, in its order, and take from the end of another's. So
    one alone compiles for JAX, of which half would be compiled twice, and imports PyTorch.
    """
    return next((i for i, name in enumerate(("jax", "torch")) if name in item.nodeid), 2)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing of what is collected is garbage, then or later: collections need not look for any."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_set_aside():
    """What a file's tests leave (programs that were compiled) is not looked through in others."""
    yield
    gc.collect()
    gc.freeze()


def compile_faster_in_xla():
    """Take XLA's older emitters, which compile small programs in half the time.

    XLA reads the variable once, with the first array, and ends the process where it does not know
    a flag: the releases that are named here know this one.
    """
    flag = "--xla_cpu_use_fusion_emitters=false"
    try:
        release = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if (0, 6) <= release <= (0, 10) and "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


# ---------------------------------------------------------------------------------------------
# The support table


def pytest_addoption(parser):
    parser.addoption(
        "--support-table",
        metavar="FILE",
        help="write the support table of docs/support.md, from the tests that pass",
    )
    parser.addoption(
        "--damaged-files",
        metavar="NUMBER",
        type=int,
        default=1000,
        help="how many damaged files of states are loaded; in continuous integration 10000",
    )


def pytest_configure(config):
    compile_faster_in_xla()
    # With xdist, workers send their reports to the process that writes.
    path = config.getoption("--support-table", None)
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SupportTable(Path(path)))


class SupportTable:
    """Collects what passed in a run, and writes it at the end."""

    def __init__(self, path):
        self.path, self.results = path, {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "support":
                    *cell, word = value
                    self.results[tuple(cell)] = word

    def pytest_sessionfinish(self):
        if self.results:
            from tests.support_table import render

            self.path.write_text(render(self.results))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(f"{self.path}: {len(self.results)} combinations passed")
