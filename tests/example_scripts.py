"""Runs the examples as scripts, in this process or another, and imports them as modules."""

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def imported(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def run_here(folder, *arguments, script):
    """What an example prints, as a script in this process: libraries are imported already."""
    from threadpoolctl import threadpool_limits

    before, printed = set(sys.modules), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),  # it finds its neighbours
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),  # bars
        threadpool_limits(limits=1),  # as examples ask for, and here not for ever
    ):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == EXAMPLES:
            del sys.modules[name]
    return printed.getvalue()


def run_example(folder, *arguments, script="digits_convnet.py", launcher=()):
    """What an example prints, as a script in a process of its own."""
    return subprocess.run(
        [*launcher, sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        # Compiling takes JAX longer than these small models.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    ).stdout


def moved(params, tangent, step):
    return {
        name: tuple(a + step * t for a, t in zip(params[name], tangent[name], strict=True))
        for name in params
    }
