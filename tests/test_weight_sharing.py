"""KFAC-expand and KFAC-reduce: exact where the paper says so, from Jacobians by differences."""

import numpy as np
import pytest

import kfac_xp
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.test_fisher_blocks import BlockContract, draw, mat2d

N, T = 3, 4


class DeepLinear:
    """``(x W + b) V`` at every place, or its mean over the places; x is [N, T, d]."""

    def __init__(self, params, x, is_mean):
        (w, b), v = params["first"], params["second"]
        self.params, self.is_mean = params, is_mean
        self.hidden = x @ w + b
        self.outputs = self.hidden @ v
        if is_mean:
            self.outputs = self.outputs.mean(axis=1)
        self.layer_inputs = {"first": x, "second": self.hidden}

    def vjp(self, ds, parameters=True):
        if self.is_mean:
            ds = np.repeat(ds[:, None] / T, T, axis=1)
        return None, {"first": ds @ self.params["second"].T, "second": ds}


class ConvThenMean:
    """A convolution, the mean over all locations, and a dense layer."""

    def __init__(self, params, x):
        self.params, self.x = params, x
        (k, b), self.v = params["first"], params["second"]
        s = naive.convolution(x, k, (2, 1), (1, 1), ((1, 0), (0, 1))) + b
        self.shape, self.pooled = s.shape, s.mean(axis=(1, 2))
        self.outputs = self.pooled @ self.v
        self.layer_inputs = {"first": x, "second": self.pooled}

    def vjp(self, ds, parameters=True):
        pooled = (ds @ self.v.T)[:, None, None, :] / np.prod(self.shape[1:3])
        return None, {"first": np.broadcast_to(pooled, self.shape).copy(), "second": ds}


def jacobian(make, params, name):
    """Of each case's outputs with respect to one layer, by differences: they are linear in it."""
    layer = params[name]
    arrays = [np.array(a) for a in (layer if isinstance(layer, tuple) else (layer,))]
    base, columns = make(params).outputs, []
    for i, array in enumerate(arrays):
        for index in np.ndindex(*array.shape):
            moved = [a.copy() for a in arrays]
            moved[i][index] += 1
            new = tuple(moved) if isinstance(layer, tuple) else moved[0]
            columns.append((make(params | {name: new}).outputs - base).reshape(N, -1))
    return np.stack(columns, axis=-1)


def block_matrix(block, like):
    """The undamped block by its products with unit vectors."""
    arrays = like if isinstance(like, tuple) else (like,)
    sizes = [a.size for a in arrays]
    columns = []
    for unit in np.eye(sum(sizes)):
        parts = np.split(unit, np.cumsum(sizes)[:-1])
        vector = tuple(p.reshape(a.shape) for p, a in zip(parts, arrays, strict=True))
        columns.append(mat2d(block.multiply(vector if isinstance(like, tuple) else vector[0])))
    return np.stack([c.ravel() for c in columns], axis=1)


def fisher_blocks(make, params, register):
    """``{layer: (its block, the exact Fisher's)}`` under a normal distribution of the outputs."""
    layers = kfac_xp.LayerCollection()
    register(layers)
    layers.register_normal_predictive_distribution("out", 1.0)
    estimator = kfac_xp.FisherEstimator(layers, 0.0, estimation_mode="exact")
    estimator.update_cov(make(params))
    found = {}
    for name in params:
        by_case = jacobian(make, params, name)
        exact = np.einsum("nop,noq->pq", by_case, by_case) / N
        found[name] = block_matrix(layers.fisher_blocks[name], params[name]), exact
    return found


def dense_params(rng):
    return {
        "first": (rng.normal(size=(3, 2)), rng.normal(size=2)),
        "second": rng.normal(size=(2, 3)),
    }


@pytest.mark.parametrize("is_mean", [False, True])
@pytest.mark.parametrize("approx", ["kron_expand", "kron_reduce"])
def test_dense_layers_over_sequences(rng, approx, is_mean):
    """Expand is exact for a loss at every place, reduce for one of their mean; not otherwise."""
    params, x = dense_params(rng), rng.normal(size=(N, T, 3))

    def register(layers):
        for name, layer in params.items():
            layers.register_fully_connected(name, layer, approx)

    found = fisher_blocks(lambda p: DeepLinear(p, x, is_mean), params, register)
    for block, exact in found.values():
        if is_mean == (approx == "kron_reduce"):
            assert_close(block, exact, 1e-12)
        else:
            assert np.abs(block - exact).max() > 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("approx", ["kron_expand", "kron_reduce"])
def test_convolutions_under_a_mean(rng, approx):
    params = {
        "first": (rng.normal(size=(2, 2, 2, 3)), rng.normal(size=3)),
        "second": rng.normal(size=(3, 2)),
    }
    x = rng.normal(size=(N, 4, 3, 2))

    def register(layers):
        padding = ((1, 0), (0, 1))
        layers.register_conv2d("first", params["first"], (2, 1), padding, approx=approx)
        layers.register_fully_connected("second", params["second"])

    found = fisher_blocks(lambda p: ConvThenMean(p, x), params, register)
    block, exact = found["first"]
    if approx == "kron_reduce":
        assert_close(block, exact, 1e-12)
    else:
        assert np.abs(block - exact).max() > 0.1 * np.abs(exact).max()
    assert_close(*found["second"], 1e-12)


def updated(register, inputs, grads, damping=0.1, **options):
    layers = kfac_xp.LayerCollection(**options)
    block = register(layers)
    estimator = kfac_xp.FisherEstimator(layers, damping)
    estimator.update_cov({"layer": (inputs, grads)}, ema_decay=0.9)
    estimator.update_inverses()
    return block


@pytest.mark.parametrize(
    "approx", [pytest.param("kron_expand", marks=pytest.mark.more), "kron_reduce"]
)
def test_scales_by_what_they_are_special_cases_of(xp, rng, approx):
    x, g = draw(xp, rng, N, T, 3), draw(xp, rng, N, T, 2)
    kernel, vector = xp.zeros((3, 2), dtype=xp.float64), draw(xp, rng, 3, 2)

    def inverse(block, like=vector):
        return to_numpy(block.multiply_inverse(like))

    def dense(layers, approx=approx):
        return layers.register_fully_connected("layer", kernel, approx)

    shared = inverse(updated(dense, x, g))
    # One place: the ordinary block.
    single = updated(dense, x[:, :1, :], g[:, :1, :])
    ordinary = updated(lambda layers: dense(layers, "kron"), x[:, 0, :], g[:, 0, :])
    assert_close(inverse(single), inverse(ordinary), 1e-12)
    # A convolution with one tap.
    conv = updated(
        lambda layers: layers.register_conv1d("layer", kernel[None, :, :], approx=approx), x, g
    )
    assert_close(inverse(conv, vector[None, :, :])[0], shared, 1e-12)
    if approx == "kron_expand":  # a layer that is used as often
        uses = updated(
            lambda layers: layers.register_fully_connected_multi("layer", kernel),
            xp.permute_dims(x, (1, 0, 2)),
            xp.permute_dims(g, (1, 0, 2)),
        )
        assert_close(inverse(uses), shared, 1e-12)


def test_expand_of_a_convolution_is_kfc(rng):
    x, g = rng.normal(size=(N, 4, 4, 2)), rng.normal(size=(N, 4, 4, 3))
    vector = rng.normal(size=(3, 3, 2, 3))
    products = [
        updated(
            lambda layers, approx=approx: layers.register_conv2d(
                "layer", np.zeros((3, 3, 2, 3)), approx=approx
            ),
            x,
            g,
        ).multiply_inverse(vector)
        for approx in ("kron", "kron_expand")
    ]
    assert np.array_equal(*products)


def test_reduce_of_a_transposed_convolution_and_a_mask(rng):
    """The mean of the patches by their definition."""
    x, g = rng.normal(size=(N, 3, 2, 2)), rng.normal(size=(N, 6, 4, 3))
    mask = rng.integers(0, 2, size=(3, 3, 2)).astype(float)
    block = updated(
        lambda layers: layers.register_conv_transpose(
            "layer", np.zeros((3, 3, 2, 3)), (2, 2), approx="kron_reduce", patch_mask=mask
        ),
        x,
        g,
    )
    geometry = kfac_xp.TransposedConvGeometry.create((3, 3), (2, 2))
    rows = kfac_xp.extract_transposed_patches(x, geometry).mean(axis=(1, 2)) * mask.ravel()
    assert_close(block.input_factor.cov, rows.T @ rows / N, 1e-12)
    sums = g.sum(axis=(1, 2))
    assert_close(block.output_factor.cov, sums.T @ sums / N, 1e-12)
    assert_close(block.damping, 0.1, 1e-12)


def test_projections_share_an_input_factor(rng):
    x = rng.normal(size=(N, T, 3))
    for approx in ("kron_expand", "kron_reduce"):
        layers = kfac_xp.LayerCollection()
        for name in "qkv":
            layers.register_fully_connected(
                name, np.zeros((3, 2)), approx, inputs_of=None if name == "q" else "q"
            )
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        assert len(estimator.factors) == 4
        estimator.update_cov({n: (x, rng.normal(size=(N, T, 2))) for n in "qkv"}, ema_decay=0.9)


def test_what_reduce_and_expand_refuse(rng):
    x, g = rng.normal(size=(N, T, 3)), rng.normal(size=(N, T, 2))
    kernel = np.zeros((3, 2))

    def block(approx):
        layers = kfac_xp.LayerCollection()
        made = layers.register_fully_connected("fc", kernel, approx)
        kfac_xp.FisherEstimator(layers, 0.1)
        return made

    with pytest.raises(ValueError, match=r"approx='kron_expand', .* for sequences \[N, T, d"):
        block("kron").update_cov(inputs=x, outputs_grads=g, ema_decay=0.9)
    expand = block("kron_expand")
    expand.update_cov(inputs=x, outputs_grads=g, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"gives 3 locations .* the first batch fixed 4"):
        expand.update_cov(inputs=x[:, :3], outputs_grads=g[:, :3], ema_decay=0.9)
    reduce = block("kron_reduce")
    for length in (4, 3):
        reduce.update_cov(inputs=x[:, :length], outputs_grads=g[:, :length], ema_decay=0.9)
    with pytest.raises(ValueError, match=r"must have shape \[3, 4, 2\]"):
        reduce.update_cov(inputs=x, outputs_grads=g[:, :3], ema_decay=0.9)
    bare = kfac_xp.FullyConnectedKFACReduceFB(None)
    bare.register_additional_tower(x[:, 0], g[:, 0])
    with pytest.raises(ValueError, match=r"must have shape \[N, T, d\]"):
        bare.instantiate_factors([[g[:, 0]]], 0.1)
    with pytest.raises(ValueError, match="does not subsample"):
        kfac_xp.ConvKFACReduceFB(None, np.zeros((2, 2, 2, 3)), "SAME", sub_sample_inputs=True)
    with pytest.raises(ValueError, match="shape of the filter without its outputs"):
        kfac_xp.ConvKFACReduceFB(None, np.zeros((2, 2, 2, 3)), "SAME", patch_mask=np.zeros(3))


@pytest.mark.more
class TestFullyConnectedKFACExpandFB(BlockContract):
    cls = kfac_xp.FullyConnectedKFACExpandFB
    num_locations = T

    def make_bare(self, xp, **options):
        return self.cls(None, has_bias=True, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, T, 3), draw(xp, rng, n, T, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)


@pytest.mark.more
class TestFullyConnectedKFACReduceFB(TestFullyConnectedKFACExpandFB):
    cls = kfac_xp.FullyConnectedKFACReduceFB
    num_locations = 1


@pytest.mark.more
class TestConvKFACReduceFB(BlockContract):
    def make_bare(self, xp, **options):
        params = (xp.zeros((2, 2, 2, 4)), xp.zeros((4,)))
        return kfac_xp.ConvKFACReduceFB(None, params, "SAME", (2, 1), **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3, 2, 2), draw(xp, rng, n, 2, 2, 4)

    def vector(self, xp, rng):
        return draw(xp, rng, 2, 2, 2, 4), draw(xp, rng, 4)
