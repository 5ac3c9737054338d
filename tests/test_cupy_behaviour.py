"""What the library assumes of CuPy: of a card's, and of the stand-in in a rehearsal."""

import numpy as np
import pytest

from tests.conftest import namespace
from tests.rehearsal.behaviour import ON_DEVICE, WITHOUT_DEVICE, outcome

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("expression", "expected"), [*WITHOUT_DEVICE.items(), *ON_DEVICE.items()])
def test_it_is_so(expression, expected):
    namespace("cupy")
    import cupy
    import cupyx

    x = cupy.arange(24, dtype=cupy.float32).reshape(4, 6).copy()
    names = {"two": cupy.asarray(2), "stack": cupy.empty((0, 4, 4)), "x": x}
    assert outcome(expression, {"np": np, "cupy": cupy, "cupyx": cupyx, **names}) == expected
