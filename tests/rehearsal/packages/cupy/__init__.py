"""A stand-in for CuPy 14.2: NumPy's arrays behind CuPy's names, signatures and refusals.

It is on `sys.path` only in a rehearsal (``python -m tests.rehearsal``). Its names and signatures
are in ``_signatures.txt``, written from the real package and compared with it by
``tests/rehearsal/check.py``; what is not in there is an AttributeError, if CuPy has it or not.
"""

import numpy as _numpy

from cupy import _core, _routines, cuda  # noqa: F401
from cupy._array import ndarray  # noqa: F401
from cupy._signatures import names as _names

__version__ = "14.2.0"

# What CuPy itself takes from NumPy.
for _name in (
    *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "intp"),
    *("float16", "float32", "float64", "complex64", "complex128", "generic", "number", "integer"),
    *("floating", "inexact", "complexfloating", "signedinteger", "unsignedinteger", "dtype"),
    *("finfo", "iinfo", "issubdtype", "promote_types", "broadcast_shapes", "isdtype"),
    *("newaxis", "inf", "nan", "pi", "e"),
):
    globals()[_name] = getattr(_numpy, _name)
bool = _numpy.bool_

for _name, _kind in _names("cupy").items():
    if _kind is None:
        continue
    if isinstance(_kind, tuple):
        globals()[_name] = _routines.ufunc(_name, *_kind)
    else:
        globals()[_name] = getattr(_routines, _name, None) or _routines.routine("cupy", _name)

from cupy import fft, linalg, random  # noqa: E402, F401


def __getattr__(name):
    raise AttributeError(
        f"the stand-in of cupy has no {name!r}. If CuPy has it, add the name to _signatures.txt, "
        "and let tests/rehearsal/check.py --write find its signature."
    )
