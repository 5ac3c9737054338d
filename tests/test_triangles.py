"""Symmetric matrices packed to their lower triangle, entry by entry, in every library."""

import numpy as np
import pytest

from kfac_xp import explain, pack_symmetric, unpack_symmetric, use_backend
from tests.cases import to_numpy
from tests.conftest import namespace

# The first is enough for a library that compiles every shape.
SHAPES = [(2, 3, 5, 5), (4, 4), (1, 1), (0, 0), (0, 3, 3), (2, 0, 0)]


def packed_by_loops(x):
    n = x.shape[-1]
    entries = [x[..., i, j] for i in range(n) for j in range(i + 1)]
    return np.stack(entries, axis=-1) if entries else np.zeros((*x.shape[:-2], 0))


def symmetric(rng, shape, dtype="float64"):
    x = rng.standard_normal(shape).astype(dtype)
    return x + np.swapaxes(x, -1, -2)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.more), "float64"])
@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(s, marks=pytest.mark.more) for s in SHAPES[1:])]
)
def test_there_and_back(xp, rng, shape, dtype):
    x = symmetric(rng, shape, dtype)
    packed = pack_symmetric(xp.asarray(x))
    assert packed.dtype == getattr(xp, dtype)
    np.testing.assert_array_equal(to_numpy(packed), packed_by_loops(x))
    for back in (unpack_symmetric(packed), unpack_symmetric(packed, shape[-1])):
        assert back.dtype == packed.dtype
        np.testing.assert_array_equal(to_numpy(back), x)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 130)])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_kernels_and_views(rng, shape, backend):
    x = symmetric(rng, shape)
    view = np.swapaxes(np.stack([x, x + 1]), -1, -2)[1]  # not contiguous
    with use_backend(backend):
        packed = pack_symmetric(view)
        np.testing.assert_array_equal(packed, packed_by_loops(x + 1))
        np.testing.assert_array_equal(unpack_symmetric(packed[...]), x + 1)


def test_what_lies_above_the_diagonal_is_not_read():
    x = np.tril(np.arange(16.0).reshape(4, 4)) + np.triu(np.full((4, 4), np.nan), 1)
    for backend in ("reference", "numba"):
        with use_backend(backend):
            assert np.all(np.isfinite(pack_symmetric(x)))


def test_other_dtypes_take_the_reference(rng):
    for dtype in ("float16", "int64"):
        x = (10 * symmetric(rng, (3, 3))).astype(dtype)
        assert explain(pack_symmetric, x).startswith("pack_symmetric: reference")
        assert pack_symmetric(x).dtype == dtype
        np.testing.assert_array_equal(unpack_symmetric(pack_symmetric(x)), x)


def test_under_jit_of_jax(rng):
    jnp = namespace("jax.numpy")
    import jax

    x = symmetric(rng, (2, 4, 4))
    packed = jax.jit(pack_symmetric)(jnp.asarray(x))
    np.testing.assert_array_equal(packed, packed_by_loops(x))
    np.testing.assert_array_equal(jax.jit(unpack_symmetric)(packed), x)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"`x` must be .* \[..., n, n\]; got shape \(2, 3\)"):
        pack_symmetric(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        pack_symmetric(np.zeros(4))
    with pytest.raises(ValueError, match=r"6 for 3 rows, 10 for 4; got shape \(2, 7\)"):
        unpack_symmetric(np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"`n` must be 3, .* 6 entries; got 4"):
        unpack_symmetric(np.zeros(6), 4)
    with pytest.raises(ValueError, match="got a 0-d array"):
        unpack_symmetric(np.zeros(()))
