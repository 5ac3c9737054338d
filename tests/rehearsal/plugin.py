"""Puts the stand-in of CuPy where it is found, and Numba's CUDA simulator behind its kernels.

A pytest plugin, so that every worker of pytest-xdist does the same: ``-p tests.rehearsal.plugin``.
"""

import os
import sys
from pathlib import Path

import pytest

PACKAGES = str(Path(__file__).parent / "packages")


def install():
    """In this process, and in those that it starts."""
    if PACKAGES not in sys.path:
        sys.path.insert(0, PACKAGES)
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (PACKAGES, others) if p)
    import cupy

    if not cupy.__file__.startswith(PACKAGES):
        raise RuntimeError("a rehearsal needs an environment without CuPy")
    from tests.rehearsal import kernels

    kernels.install()


install()


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(Summary())


def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells the process that started it what it found."""
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["rehearsal"] = found()


def found():
    """Launches, and the names that were used."""
    from cupy._signatures import used

    from tests.rehearsal import kernels

    return dict(kernels.launches), [f"{owner}.{name}" for owner, name in used]


class Summary:
    """Adds up what the workers found."""

    def __init__(self):
        self.found = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        self.found += [node.workeroutput["rehearsal"]] if hasattr(node, "workeroutput") else []

    def pytest_terminal_summary(self, terminalreporter):
        all_found = [*self.found, found()]
        simulated, left_out = (
            sum(launches[key] for launches, _ in all_found) for key in ("simulated", "left out")
        )
        names = set().union(*(names for _, names in all_found))
        terminalreporter.write_line(
            f"rehearsal: {simulated} launches were simulated, {left_out} left to the references; "
            f"{len(names)} names of CuPy were used"
        )
        if path := os.environ.get("KFAC_XP_REHEARSAL_NAMES"):
            Path(path).write_text("\n".join(sorted(names)) + "\n")
