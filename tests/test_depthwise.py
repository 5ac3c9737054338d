"""Depthwise convolutions against the gradients of their own definition."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import draw

pytestmark = pytest.mark.more


def test_kernels_there_and_back(xp, rng):
    kernel = rng.normal(size=(2, 3, 4, 2))
    dense = kfac_xp.depthwise_conv2d_filter_to_conv2d_filter(xp.asarray(kernel))
    expected = np.zeros((2, 3, 4, 8))
    for i in range(4):
        for j in range(2):
            expected[:, :, i, i * 2 + j] = kernel[:, :, i, j]
    assert_close(dense, expected, 0.0)
    assert_close(kfac_xp.conv2d_filter_to_depthwise_conv2d_filter(dense), kernel, 0.0)
    with pytest.raises(ValueError, match="no multiple of 4"):
        kfac_xp.conv2d_filter_to_depthwise_conv2d_filter(xp.zeros((2, 2, 4, 6)))


def depthwise_gradients(x, g, taps, multiplier):
    """Each case's gradient of the kernel, from loops over the definition of the layer (VALID)."""
    n, _, _, channels = x.shape
    grads = np.zeros((n, *taps, channels, multiplier))
    for case, i, j in np.ndindex(*g.shape[:3]):
        for a, b in np.ndindex(*taps):
            for c, m in np.ndindex(channels, multiplier):
                grads[case, a, b, c, m] += (
                    x[case, i + a, j + b, c] * g[case, i, j, c * multiplier + m]
                )
    return grads


@pytest.mark.parametrize("strategy", ["separate", "concat"])
def test_the_diagonal_is_that_of_the_layer(xp, rng, strategy):
    x, g = rng.normal(size=(4, 4, 5, 3)), rng.normal(size=(4, 3, 3, 6))
    diagonal = (depthwise_gradients(x, g, (2, 3), 2) ** 2).mean(axis=0)
    layers = kfac_xp.LayerCollection(tower_strategy=strategy)
    kernel = xp.zeros((2, 3, 3, 2), dtype=xp.float64)
    block = layers.register_depthwise_conv2d("depthwise", kernel, padding="VALID")
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    halves = [[xp.asarray(a[t]) for t in (slice(0, 2), slice(2, 4))] for a in (x, g)]
    estimator.update_cov({"depthwise": (halves[0], [halves[1]])}, ema_decay=0.9)
    vector = draw(xp, rng, 2, 3, 3, 2)
    assert_close(block.multiply(vector), (diagonal + 0.1) * to_numpy(vector), 1e-12)
    assert_close(block.multiply_inverse(vector), to_numpy(vector) / (diagonal + 0.1), 1e-12)
    assert tuple(block.full_fisher_block().shape) == (18 * 6, 18 * 6)


def test_kfc_is_the_ordinary_block_restricted(xp, rng):
    x, g = draw(xp, rng, 4, 4, 5, 3), draw(xp, rng, 4, 4, 5, 6)
    kernel = xp.zeros((3, 3, 3, 2), dtype=xp.float64)
    depthwise = kfac_xp.DepthwiseConvKFCBasicFB(None, kernel, (1, 1), "SAME")
    wide = xp.zeros((3, 3, 3, 6), dtype=xp.float64)
    ordinary = kfac_xp.ConvKFCBasicFB(None, wide, "SAME")
    for block in (depthwise, ordinary):
        block.register_additional_tower(x, g)
        block.instantiate_factors([[g]], 0.1)
        block.register_inverse()
        block.update_cov(inputs=x, outputs_grads=g, ema_decay=0.9)
        block.update_inverses()
    vector = draw(xp, rng, 3, 3, 3, 2)
    spread = to_numpy(
        ordinary.multiply_inverse(kfac_xp.depthwise_conv2d_filter_to_conv2d_filter(vector))
    )
    expected = np.stack([spread[:, :, i, 2 * i : 2 * i + 2] for i in range(3)], axis=2)
    assert_close(depthwise.multiply_inverse(vector), expected, 1e-12)


def test_separable_is_two_layers(xp, rng):
    layers = kfac_xp.LayerCollection()
    depthwise = xp.zeros((3, 3, 2, 2), dtype=xp.float64)
    pointwise = (xp.zeros((1, 1, 4, 5), dtype=xp.float64), xp.zeros((5,), dtype=xp.float64))
    blocks = layers.register_separable_conv2d(("deep", "point"), depthwise, pointwise, (2, 2))
    assert [type(b).__name__ for b in blocks] == ["DepthwiseConvDiagonalFB", "ConvKFCBasicFB"]
    assert layers.registered_variables == ["deep", "point"]
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    statistics = {
        "deep": (draw(xp, rng, 3, 5, 5, 2), draw(xp, rng, 3, 3, 3, 4)),
        "point": (draw(xp, rng, 3, 3, 3, 4), draw(xp, rng, 3, 3, 3, 5)),
    }
    estimator.update_cov(statistics, ema_decay=0.9)
    estimator.update_inverses()
    vectors = {
        "deep": draw(xp, rng, 3, 3, 2, 2),
        "point": (draw(xp, rng, 1, 1, 4, 5), draw(xp, rng, 5)),
    }
    back = estimator.multiply_inverse(estimator.multiply(vectors))
    assert_close(back["deep"], to_numpy(vectors["deep"]), 1e-10)
    assert_close(back["point"][0], to_numpy(vectors["point"][0]), 1e-10)


def test_no_bias(xp):
    params = (xp.zeros((3, 3, 2, 2)), xp.zeros((4,)))
    for cls in (kfac_xp.DepthwiseConvDiagonalFB, kfac_xp.DepthwiseConvKFCBasicFB):
        with pytest.raises(NotImplementedError, match="without a bias"):
            cls(None, params, (1, 1), "SAME")
    layers = kfac_xp.LayerCollection()
    with pytest.raises(NotImplementedError, match="without a bias"):
        layers.register_depthwise_conv2d("d", params)
    assert layers.registered_variables == []
