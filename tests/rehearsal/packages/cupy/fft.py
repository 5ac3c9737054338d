"""``cupy.fft``."""

from cupy import _routines
from cupy._signatures import names

for _name in names("cupy.fft"):
    globals()[_name] = _routines.routine("cupy.fft", _name)
