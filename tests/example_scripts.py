"""Runs the examples as scripts, and imports them as modules."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def imported(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def run_example(folder, *arguments, script="digits_convnet.py", launcher=()):
    # A child process: the example is a script, and finds its neighbour as one.
    return subprocess.run(
        [*launcher, sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        # Compiling takes JAX longer than these small models.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    )


def moved(params, tangent, step):
    return {
        name: tuple(a + step * t for a, t in zip(params[name], tangent[name], strict=True))
        for name in params
    }
