"""Factors on which decompositions fail: every one has a finite result, and says how it was made."""

import itertools
import re

import numpy as np
import pytest

import kfac_xp
from benchmarks import ladder as stress
from kfac_xp.averages import MovingAverage
from kfac_xp.options import FactorOptions
from kfac_xp.representations import DampingKey, Dense, Request, attempts, refresh
from tests.cases import assert_close, to_numpy

FUNCTIONS = {
    "inverse": ("matpower", -1.0),
    "root": ("matpower", -0.5),
    "cholesky": ("cholesky", 0.5),
    "cholesky inverse": ("cholesky_inverse", -0.5),
    "eigenbasis": ("eigenbasis", 0.0),
}


def computed(xp, cov, damping, dtype, function):
    """``(array, report)`` through one refresh, and what the statistics' dtype makes of `cov`."""
    average = MovingAverage(xp.zeros(cov.shape, dtype=getattr(xp, dtype)))
    average.update(xp.asarray(cov.astype(dtype)), decay=0.0)
    rep = Dense(FactorOptions())
    request = Request(*FUNCTIONS[function], DampingKey(damping))
    rep.register(request)
    refresh([("factor", rep, average)])
    return to_numpy(rep.cache.stored[request]), rep.decomposition


def truth(cov, damping, function):
    """The matrix function in float64, from an eigendecomposition of the damped matrix."""
    damped = cov + damping * np.eye(len(cov))
    if function == "cholesky":
        return np.linalg.cholesky(damped)
    if function == "cholesky inverse":
        return np.linalg.inv(np.linalg.cholesky(damped))
    w, v = np.linalg.eigh(damped)
    return (v * w ** FUNCTIONS[function][1]) @ v.T


def hard_covariances(n=8):
    rng = np.random.default_rng(5)
    vectors = np.linalg.qr(rng.normal(size=(n, n)))[0]
    x = rng.normal(size=n)
    good = (vectors * np.linspace(0.5, 2, n)) @ vectors.T
    return {
        "rank one": np.outer(x, x),
        "zero": np.zeros((n, n)),
        "condition 1e12": (vectors * np.logspace(-12, 0, n)) @ vectors.T,
        "repeated eigenvalues": (vectors * np.repeat([1e-6, 1.0], n // 2)) @ vectors.T,
        "identity": np.eye(n),
        "1e20": 1e20 * good,
        "1e-20": 1e-20 * good,
        "denormal": 1e-41 * good,
    }


CASES = hard_covariances()


def unless_flushed(xp, name):
    """Skip what XLA does not see: it takes denormal numbers for zero."""
    if name == "denormal" and "jax" in xp.__name__:
        pytest.skip("XLA takes denormal numbers for zero")


@pytest.mark.more
@pytest.mark.parametrize("name", CASES)
def test_damped(xp, name):
    """With a damping that the dtype can see beside the covariance, what NumPy finds in float64."""
    unless_flushed(xp, name)
    damping = max(1e-3, 1e-3 * CASES[name].max())
    for function, dtype in itertools.product(FUNCTIONS, ("float32", "float64")):
        array, report = computed(xp, CASES[name], damping, dtype, function)
        assert report.rung == "direct"
        assert np.isfinite(array).all()
        cov = CASES[name].astype(dtype).astype(float)
        if function == "eigenbasis":
            vectors, values = array[:-1].astype(float), array[-1].astype(float)
            tolerance = 20 * np.finfo(dtype).eps
            assert_close(vectors.T @ vectors, np.eye(8), tolerance, dtype)
            if name == "denormal" and dtype == "float32":
                tolerance = 1e-3  # such numbers have few digits
            assert_close((vectors * values) @ vectors.T, cov, tolerance, dtype)
            continue
        tolerance = 1e-3 if dtype == "float32" else 1e-10
        assert_close(array, truth(cov, damping, function), tolerance, f"{function}, {dtype}")


@pytest.mark.more
@pytest.mark.parametrize("name", CASES)
def test_undamped(xp, name):
    """Finite and of the right size on some rung, or an error that names the factor."""
    unless_flushed(xp, name)
    for function, dtype in itertools.product(FUNCTIONS, ("float32", "float64")):
        too_large = (name, function, dtype) == ("denormal", "inverse", "float32")
        if too_large or (name == "zero" and function != "eigenbasis"):
            with pytest.raises(RuntimeError, match=r"covariance of factor cannot be inverted"):
                computed(xp, CASES[name], 0.0, dtype, function)
            continue
        array, report = computed(xp, CASES[name], 0.0, dtype, function)
        assert np.isfinite(array).all()
        assert report.residual <= attempts.MAX_RESIDUAL
        assert report.rung in ("direct", "jitter", "float64", "clipped eigenvalues")
        if function == "inverse":
            # On the range of the covariance an inverse is one, whatever is done to the rest. The
            # last bits of its entries weigh as much as they are larger: a device has others.
            tolerance = 0.5 if "cupy" in xp.__name__ else 0.05
            cov = CASES[name].astype(dtype).astype(float)
            top = np.linalg.eigh(cov)[1][:, -1]
            assert_close(cov @ (array.astype(float) @ top), top, tolerance, dtype)


def test_results_that_overflow_the_dtype_are_refused():
    """In float64 they are finite; a refresh must not store infinities."""
    cov = np.diag([1.0, 1e-30])
    for function in ("inverse", "root"):
        array, _ = computed(np, cov, 0.0, "float32", function)
        assert np.isfinite(array).all()
    with pytest.raises(RuntimeError, match="Use a larger damping"):
        computed(np, 1e-41 * np.eye(2), 0.0, "float32", "inverse")


def test_reports_are_not_rounded_to_float32():
    """Of float64 a jitter may be tiny, and a condition number huge, without being 0 or infinite."""
    cov = 1e-60 * np.diag([4.0, 1.0, 0.0])
    _, report = computed(np, cov, 0.0, "float64", "inverse")
    assert_close(report.jitter, 3 * np.finfo(float).eps * 4e-60, 1e-12)
    _, report = computed(np, np.diag([1.0, 1e-45]), 0.0, "float64", "inverse")
    assert_close(report.condition, 1e45, 1e-6)


def test_ten_thousand_updates_stay_symmetric_and_true():
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(50, 4, 3)).astype(np.float32)
    factor = kfac_xp.FullyConnectedKroneckerFactor(batches[0])
    factor.register_inverse(1e-3)
    expected, weights = np.zeros((3, 3)), 0.0
    for step in range(10_000):
        x = batches[step % 50]
        factor.update_cov(tensors=x, ema_decay=0.95)
        if step % 20 == 0:
            factor.update_inverses()
        if step >= 9_500:
            x = x.astype(float)
            expected, weights = 0.95 * expected + x.T @ x / 4, 0.95 * weights + 1
    assert_close(factor.cov, expected / weights, 1e-5)
    assert np.array_equal(factor.cov, factor.cov.T)
    inverse = factor.get_inverse(1e-3).to_dense()
    assert np.array_equal(inverse, inverse.T)


@pytest.mark.parametrize("method", ["orthogonal_iteration", "refinement"])
def test_five_hundred_bases_keep_their_digits(method):
    """Each starts from the last, and the corrected eigenvalues of EKFAC are turned into each."""
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(20, 40, 5)).astype(np.float32)
    block = kfac_xp.FullyConnectedEKFACFB(None, eigh_method=method)
    block.register_additional_tower(batches[0, :, :3], batches[0, :, 3:])
    block.instantiate_factors([[batches[0, :, 3:]]], 1.0)
    norms, weights, rungs = 0.0, 0.0, []
    for step in range(500):
        a, g = np.split(batches[step % 20], [3], axis=1)
        block.update_cov(inputs=a, outputs_grads=g, ema_decay=0.97)
        block.update_inverses()
        rungs.append(block.info["input"]["rung"])
        a, g = a.astype(float), g.astype(float)
        norms = 0.97 * norms + np.mean(np.sum(a * a, axis=1) * np.sum(g * g, axis=1))
        weights = 0.97 * weights + 1
    assert rungs.count("warm") > 400
    for u in block.rotated_factor.basis:
        assert_close(u.T @ u, np.eye(len(u)), 1e-5)
    # The sum of S is the mean squared norm of a case's gradient, in every basis.
    assert_close(np.sum(block.rotated_factor.cov), norms / weights, 1e-5)


def test_the_stress_benchmark():
    """As `python -m benchmarks.ladder` runs it, on fewer factors."""
    tallies = stress.run(14 * len(FUNCTIONS), 0)
    lines = list(stress.table(tallies))
    assert len(lines) == 2 + len(tallies) == 16
    assert sum(t.rungs.total() for t in tallies.values()) == 14 * len(FUNCTIONS)
    for tally in tallies.values():
        assert tally.residual <= attempts.MAX_RESIDUAL
        assert tally.asymmetry == 0
        assert tally.negative < 1e-6


# ---------------------------------------------------------------------------------------------
# Reports


@pytest.fixture
def shared():
    """Three layers, two of which share an input factor."""
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("query", np.zeros((3, 2)))
    layers.register_fully_connected("key", np.zeros((3, 2)), inputs_of="query")
    layers.register_fully_connected("out", np.zeros((2, 2)), approx="ekfac")
    estimator = kfac_xp.FisherEstimator(layers, 0.1, exps=(-1,))
    rng = np.random.default_rng(0)
    x, a, g = (rng.normal(size=(6, n)) for n in (3, 2, 2))
    return estimator, {"query": (x, g), "key": (x, g), "out": (a, g)}


def test_info_by_layer_and_factor(shared):
    estimator, statistics = shared
    estimator.update_cov(statistics)
    assert estimator.info["query"] == {"input": {}, "output": {}}
    estimator.update_inverses()
    for _ in range(2):
        estimator.update_cov(statistics)
    info = estimator.info
    assert {name: list(roles) for name, roles in info.items()} == {
        "query": ["input", "output"],
        "key": ["input", "output"],
        "out": ["input", "output", "rotated"],
    }
    for name, roles in info.items():
        block = estimator.layers.fisher_blocks[name]
        assert roles == block.info
        for role in ("input", "output"):
            assert roles[role] == block.factors[role].info
            assert roles[role]["rung"] == "direct"
            assert roles[role]["jitter"] == 0.0
            assert roles[role]["staleness"] == 2
    block = estimator.layers.fisher_blocks["out"]
    A = block.input_factor.cov + float(block.factor_dampings()[0]) * np.eye(2)
    assert_close(info["out"]["input"]["condition"], np.linalg.cond(A), 1e-6)
    assert info["out"]["rotated"] == {"staleness": 2}


def test_messages_name_the_layers(shared, monkeypatch):
    estimator, statistics = shared
    bad = statistics["query"][0] * np.nan
    with pytest.raises(FloatingPointError, match=r"query\.input \(layers 'query', 'key'\)"):
        estimator.update_cov(statistics | {"query": (bad, statistics["query"][1])})
    estimator.update_cov(statistics)
    with monkeypatch.context() as patched:
        patched.setattr(attempts, "MAX_RESIDUAL", -1.0)
        with pytest.raises(RuntimeError, match=r"\(layers 'query', 'key'\) cannot be inverted"):
            estimator.update_inverses()
    estimator.update_inverses()
    monkeypatch.setattr(attempts, "MAX_RESIDUAL", -1.0)
    with pytest.warns(RuntimeWarning, match="its last good inverse is kept") as caught:
        estimator.update_inverses()
    layers = ["layers 'query', 'key'", "layer 'query'", "layer 'key'", "layer 'out'", "layer 'out'"]
    found = [re.search(r"\((layers? .*)\)", str(warning.message))[1] for warning in caught]
    assert sorted(found) == sorted(layers)
    assert estimator.info["key"]["output"]["rung"] == "last good"


def test_eigenvalues_that_overflow_are_refused():
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("fc", np.zeros((2, 2), dtype=np.float32), "ekfac")
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    x = np.full((3, 2), 1e15, dtype=np.float32)
    estimator.update_cov({"fc": (x, x)})
    with (
        np.errstate(over="ignore"),
        pytest.raises(FloatingPointError, match=r"fc\.rotated \(layer 'fc'\) overflow"),
    ):
        estimator.update_inverses()
