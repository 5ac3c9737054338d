import sys

import numpy as np
import pytest

import kfac_xp
from kfac_xp.linearized_batch import LinearizedBatch
from tests.cases import assert_close, load, to_numpy
from tests.models import TanhNet
from tests.test_estimator import (
    TwoHeads,
    random_tanh_net,
    tanh_layers,
    tanh_net_arrays,
    two_head_layers,
)

Computer = kfac_xp.CurvatureMatrixVectorProductComputer


def flat(vectors):
    return np.concatenate([to_numpy(a).ravel() for pair in vectors.values() for a in pair])


@pytest.mark.parametrize("case", list(load("curvature_products")))
def test_products_of_the_reference(xp, case):
    meta, arrays = load("curvature_products")[case]
    params, x = tanh_net_arrays(xp, arrays), xp.asarray(arrays["in.x"])
    categorical = meta["loss"] == "categorical"
    targets = arrays["in.targets"].astype(np.int64) if categorical else arrays["in.targets"]
    layers = tanh_layers(params, coeff=meta["coeff"], loss=meta["loss"])
    computer = Computer(layers, TanhNet(params, x), xp.asarray(targets))
    vector, inner = tanh_net_arrays(xp, arrays, "V"), xp.asarray(arrays["in.inner"])
    for key, result in {
        "multiply_fisher": computer.multiply_fisher(vector),
        "multiply_ggn": computer.multiply_ggn(vector),
        "multiply_hessian": computer.multiply_hessian(vector),
        "multiply_fisher_factor": computer.multiply_fisher_factor(inner),
        "multiply_ggn_factor": computer.multiply_ggn_factor({"out": inner}),
    }.items():
        for i, actual in enumerate([*result["one"], *result["two"]]):
            expected = arrays.get(f"out.{key}.{i}", arrays[f"out.multiply_fisher_factor.{i}"])
            assert_close(actual, expected, 1e-7, f"{key}.{i}")
    transposed = computer.multiply_fisher_factor_transpose(vector)["out"]
    assert_close(transposed, arrays["out.multiply_fisher_factor_transpose.0"], 1e-7)
    transposed = computer.multiply_ggn_factor_transpose(vector)["out"]
    assert_close(transposed, arrays["out.multiply_fisher_factor_transpose.0"], 1e-7)


def two_head_setting(rng):
    params, x, targets = random_tanh_net(np, rng)
    targets = {"a": targets, "b": rng.normal(size=(6, 3))}
    return two_head_layers(params), params, x, targets


def total_loss(params, x, targets):
    net = TwoHeads(params, x)
    a = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs["a"], targets["a"])
    b = kfac_xp.NormalMeanNegativeLogProbLoss(net.outputs["b"], 0.5, targets["b"])
    return 3.0 * a.evaluate() + 0.5 * b.evaluate()


def finite_differences(function, params, step):
    """Columns ``d function / d parameter`` by central differences."""
    point = flat(params)
    columns = []
    for i in range(len(point)):
        moved = [point + sign * step * np.eye(len(point))[i] for sign in (1, -1)]
        plus, minus = (function(kfac_xp.flat_to_vectors(params, p)) for p in moved)
        columns.append((plus - minus) / (2 * step))
    return np.stack(columns, axis=-1)


def test_products_are_those_of_dense_matrices(rng):
    """Two losses, two towers: Jacobian by differences of outputs, Hessian by those of the loss."""
    layers, params, x, targets = two_head_setting(rng)
    towers = [TwoHeads(params, x[:2]), TwoHeads(params, x[2:])]
    split = [{k: v[part] for k, v in targets.items()} for part in (slice(2), slice(2, 6))]
    computer = Computer(layers, towers, split)
    outputs = TwoHeads(params, x).outputs
    jacobian = finite_differences(
        lambda p: np.concatenate([o.ravel() for o in TwoHeads(p, x).outputs.values()]), params, 1e-5
    )
    p = np.exp(outputs["a"]) / np.exp(outputs["a"]).sum(-1, keepdims=True)
    fisher = np.zeros((36, 36))
    for n in range(6):
        rows = slice(3 * n, 3 * n + 3)
        fisher[rows, rows] = 3.0 * (np.diag(p[n]) - np.outer(p[n], p[n]))
    fisher[18:, 18:] = 0.5 * np.eye(18) / 0.5
    dense = jacobian.T @ fisher @ jacobian
    v = kfac_xp.flat_to_vectors(params, rng.normal(size=jacobian.shape[1]))
    assert_close(flat(computer.multiply_fisher(v)), dense @ flat(v), 1e-7)
    assert_close(flat(computer.multiply_ggn(v)), dense @ flat(v), 1e-7)
    transposed = computer.multiply_fisher_factor_transpose(v)
    assert_close(flat(computer.multiply_fisher_factor(transposed)), dense @ flat(v), 1e-7)
    assert computer.fisher_factor_inner_shapes == {"a": (6, 3), "b": (6, 3)}
    assert computer.ggn_factor_inner_static_shapes == {"a": (6, 3), "b": (6, 3)}

    gradient = finite_differences(lambda p: total_loss(p, x, targets), params, 1e-5)

    def exact_gradient(params):
        net = TwoHeads(params, x)
        a = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs["a"], targets["a"])
        b = kfac_xp.NormalMeanNegativeLogProbLoss(net.outputs["b"], 0.5, targets["b"])
        return flat(net.vjp({"a": 3.0 * a.gradient(), "b": 0.5 * b.gradient()})[0])

    assert_close(exact_gradient(params), gradient, 1e-7)
    hessian = finite_differences(exact_gradient, params, 1e-5)
    assert np.max(np.abs(hessian - dense)) > 0.1 * np.max(np.abs(hessian))
    assert_close(flat(computer.multiply_hessian(v)), hessian @ flat(v), 1e-7)


@pytest.mark.parametrize("which", ["fisher", "ggn", "hessian", "fisher_factor", "ggn_factor"])
def test_scipy_views(rng, which):
    pytest.importorskip("scipy", reason="SciPy is not installed")
    layers, params, x, targets = two_head_setting(rng)
    computer = Computer(layers, TwoHeads(params, x), targets)
    shuffled = {"two": params["two"], "one": params["one"]}  # the order is that of registration
    operator = computer.to_scipy(which, like=shuffled)
    v = rng.normal(size=operator.shape[1])
    if which.endswith("factor"):
        inner = {"a": v[:18].reshape(6, 3), "b": v[18:].reshape(6, 3)}
        expected = getattr(computer, f"multiply_{which}")(inner)
        w = rng.normal(size=operator.shape[0])
        back = getattr(computer, f"multiply_{which}_transpose")(kfac_xp.flat_to_vectors(params, w))
        assert_close(operator.rmatvec(w), np.concatenate([b.ravel() for b in back.values()]), 1e-14)
    else:
        expected = getattr(computer, f"multiply_{which}")(kfac_xp.flat_to_vectors(params, v))
        assert_close(operator.rmatvec(v), operator.matvec(v), 0.0)
    assert_close(operator @ v, flat(expected), 1e-14)
    assert operator.dtype == np.float64


@pytest.mark.more
def test_scipy_views_of_every_library(xp, rng):
    pytest.importorskip("scipy", reason="SciPy is not installed")
    params, x, targets = random_tanh_net(xp, rng)
    operator = Computer(tanh_layers(params), TanhNet(params, x), targets).to_scipy(like=params)
    v = rng.normal(size=operator.shape[0])
    assert isinstance(operator @ v, np.ndarray)
    dense = operator @ np.eye(operator.shape[0])
    assert_close(dense, dense.T, 1e-12)


def test_scipy_absent(rng, monkeypatch):
    params, x, _ = random_tanh_net(np, rng)
    computer = Computer(tanh_layers(params), TanhNet(params, x))
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"needs SciPy, .*kfac-xp\[scipy\]"):
        computer.to_scipy(like=params)


def test_products_from_a_batch_make_no_loss_anew(rng):
    params, x, targets = random_tanh_net(np, rng)
    layers, net = tanh_layers(params), TanhNet(params, x)
    batch = LinearizedBatch(layers, net, targets)
    computer = Computer.from_batch(layers, batch)
    expected = Computer(layers, net, targets).multiply_fisher(params)
    assert_close(flat(computer.multiply_fisher(params)), flat(expected), 0.0)


class TestBadInput:
    def test_a_model_without_the_products(self, rng):
        params, x, targets = random_tanh_net(np, rng)

        class OnlyBackward:
            def __init__(self, net):
                self.outputs, self.layer_inputs, self.vjp = net.outputs, net.layer_inputs, net.vjp

        computer = Computer(tanh_layers(params), OnlyBackward(TanhNet(params, x)), targets)
        computer.multiply_fisher_factor(np.ones((6, 3)))
        with pytest.raises(TypeError, match=r"\(OnlyBackward\) has no `jvp\(tangent\)` method"):
            computer.multiply_fisher(params)
        with pytest.raises(TypeError, match=r"has no `second_order\(cotangents, tangent\)`"):
            computer.multiply_hessian(params)

    def test_vectors(self, rng):
        params, x, _ = random_tanh_net(np, rng)
        computer = Computer(tanh_layers(params), TanhNet(params, x))
        with pytest.raises(ValueError, match=r"`tangent` must have exactly .*missing: \['two'\]"):
            computer.multiply_fisher({"one": params["one"]})
        with pytest.raises(ValueError, match=r"inner vector of the loss 'out' must have shape"):
            computer.multiply_fisher_factor(np.ones((6, 4)))
        with pytest.raises(ValueError, match="`targets` must be given"):
            computer.multiply_hessian(params)
        with pytest.raises(ValueError, match="`which` must be one of"):
            computer.to_scipy("jacobian", like=params)
        with pytest.raises(ValueError, match=r"`flat` must have shape \(31,\)"):
            kfac_xp.flat_to_vectors(params, np.ones(3))

    def test_a_jvp_of_another_shape(self, rng):
        params, x, _ = random_tanh_net(np, rng)

        class Wrong(TanhNet):
            def jvp(self, tangent):
                return super().jvp(tangent)[:, :2]

        with pytest.raises(ValueError, match=r"`jvp` must return arrays shaped as `outputs`"):
            Computer(tanh_layers(params), Wrong(params, x)).multiply_fisher(params)

    def test_a_loss_without_a_ggn(self, rng):
        params, x, _ = random_tanh_net(np, rng)

        class NoGGN(kfac_xp.NormalMeanNegativeLogProbLoss):
            def multiply_ggn(self, vector):
                raise NotImplementedError("its Hessian depends on the targets.")

            multiply_ggn_factor_transpose = multiply_ggn

        layers = kfac_xp.LayerCollection()
        for name in params:
            layers.register_fully_connected(name, params[name])
        layers.register_loss("own", lambda mean, targets: NoGGN(mean, 0.5, targets))
        computer = Computer(layers, TanhNet(params, x))
        with pytest.raises(NotImplementedError, match=r"'own' \(NoGGN\) does not implement `multi"):
            computer.multiply_ggn(params)
        a = computer.multiply_ggn_or_fisher_factor_transpose(params)["own"]
        assert_close(a, computer.multiply_fisher_factor_transpose(params)["own"], 0.0)
