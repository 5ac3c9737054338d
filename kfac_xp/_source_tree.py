"""Make ``kfac_xp.kernels`` importable from a checkout, installed or not.

The kernels live in the top-level folder ``kernels/`` and are installed as
``kfac_xp.kernels``. When Python runs from the root of a checkout, the folder
``kfac_xp/`` found there has no ``kernels/`` inside; this module, imported first
by the package, then loads the neighbouring folder under the installed name.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_NAME = "kfac_xp.kernels"


def load_kernels() -> None:
    """Load ``../kernels`` as ``kfac_xp.kernels`` if this package belongs to a checkout.

    It comes before any installed copy: the kernels must be those of this very checkout. The
    project file tells a checkout from an installation, beside which another project's
    ``kernels`` may stand.
    """
    root = Path(__file__).resolve().parent.parent
    init = root / "kernels" / "__init__.py"
    if _NAME in sys.modules or not (root / "pyproject.toml").exists() or not init.exists():
        return
    spec = spec_from_file_location(_NAME, init, submodule_search_locations=[str(init.parent)])
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    sys.modules["kfac_xp"].kernels = module  # type: ignore[attr-defined]


load_kernels()
