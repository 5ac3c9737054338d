"""Make ``kfac_xp.kernels`` importable from a checkout that is not installed.

The kernels live in the top-level folder ``kernels/`` and are installed as
``kfac_xp.kernels``. When Python runs from the root of a checkout, the folder
``kfac_xp/`` found there has no ``kernels/`` inside; this module, imported first
by the package, then loads the neighbouring folder under the installed name.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

_NAME = "kfac_xp.kernels"


def load_kernels() -> None:
    """Load ``../kernels`` as ``kfac_xp.kernels`` unless it is installed under that name."""
    if _NAME in sys.modules or find_spec(_NAME) is not None:
        return
    folder = Path(__file__).resolve().parent.parent / "kernels"
    init = folder / "__init__.py"
    if not init.exists():
        return
    spec = spec_from_file_location(_NAME, init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    sys.modules["kfac_xp"].kernels = module  # type: ignore[attr-defined]


load_kernels()
