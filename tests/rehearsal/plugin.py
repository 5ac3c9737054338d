"""Puts the stand-in of CuPy where it is found, and Numba's CUDA simulator behind its kernels.

A pytest plugin, so that every worker of pytest-xdist does the same: ``-p tests.rehearsal.plugin``.
"""

import os
import sys
from pathlib import Path

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


install()
