"""Moments by explicit loops over cases and locations, and under ``jax.jit``."""

import itertools

import numpy as np
import pytest

from kfac_xp import ConvGeometry, moments
from kfac_xp.damping import compute_pi_adjusted_damping
from kfac_xp.operators import FullMatrix
from tests.cases import assert_close

GEOMETRY = ConvGeometry.create((2, 3), (2, 1), [(1, 0), (0, 2)], (1, 2))
SPACE, OUT = (5, 6), (3, 4)


def patch_at(padded, o, has_bias):
    """The patch of one case at one output position, tap by tap."""
    taps = itertools.product(*(range(k) for k in GEOMETRY.kernel))
    entries = [
        padded[
            tuple(
                i * s + t * d
                for i, s, t, d in zip(o, GEOMETRY.strides, tap, GEOMETRY.dilation, strict=True)
            )
        ]
        for tap in taps
    ]
    return np.append(np.concatenate(entries), [1.0] * has_bias)


def batch(rng):
    x, ds = rng.normal(size=(3, *SPACE, 2)), rng.normal(size=(3, *OUT, 4))
    padded = np.pad(x, ((0, 0), *GEOMETRY.padding, (0, 0)))
    return x, ds, padded


@pytest.mark.parametrize("has_bias", [pytest.param(False, marks=pytest.mark.more), True])
def test_convolution(xp, rng, has_bias):
    assert GEOMETRY.output_shape(SPACE) == OUT
    x, ds, padded = batch(rng)
    positions = list(itertools.product(*map(range, OUT)))
    d = 12 + has_bias
    second, diagonal, gamma = np.zeros((d, d)), np.zeros((d, 4)), np.zeros((4, 4))
    for n in range(3):
        case = np.zeros((d, 4))
        for o in positions:
            a = patch_at(padded[n], o, has_bias)
            second += np.outer(a, a)
            gamma += np.outer(ds[n][o], ds[n][o])
            case += np.outer(a, ds[n][o])
        diagonal += case**2
    locations = len(positions)
    inputs, grads = xp.asarray(x), xp.asarray(ds)
    actual = moments.ConvInputMoment(GEOMETRY, 2, has_bias)
    assert actual.shape == (d, d)
    assert_close(actual(inputs), second / (3 * locations), 1e-12)
    actual = moments.ConvDiagonalMoment(GEOMETRY, 2, 4, has_bias)
    assert actual.shape == (d, 4)
    assert_close(actual(inputs, grads), diagonal / 3, 1e-12)
    assert_close(moments.ConvOutputMoment(4)(grads), gamma / (3 * locations), 1e-12)


def test_pure_functions_trace_in_jax(rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jax.config.update("jax_enable_x64", True)
    x, ds, _ = batch(rng)
    dense, dense_ds = x[:, 0, 0, :], ds[:, 0, 0, :]
    for moment, arrays in (
        (moments.ConvInputMoment(GEOMETRY, 2, True), (x,)),
        (moments.ConvOutputMoment(4), (ds,)),
        (moments.ConvDiagonalMoment(GEOMETRY, 2, 4, True), (x, ds)),
        (moments.FullyConnectedKroneckerMoment(2, True), (dense,)),
        (moments.FullyConnectedDiagonalMoment(2, 4, True), (dense, dense_ds)),
    ):
        traced = jax.jit(moment)(*(jax.numpy.asarray(a) for a in arrays))
        assert_close(traced, moment(*arrays), 1e-12, moment)

    @jax.jit
    def split(a, g):
        return compute_pi_adjusted_damping(FullMatrix(a), FullMatrix(g), 0.1)

    a, g = np.diag([1.0, 2.0]), np.diag([3.0])
    eager = compute_pi_adjusted_damping(FullMatrix(a), FullMatrix(g), 0.1)
    assert_close(split(a, g)[0], eager[0], 1e-14)
