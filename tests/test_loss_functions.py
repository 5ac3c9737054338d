"""Losses: gradients and Fisher products by finite differences and sums over outcomes."""

import itertools

import numpy as np
import pytest

import kfac_xp
from kfac_xp import randomness
from tests.cases import assert_close, to_numpy


def make(name, xp, rng, n=3, k=4):
    inputs = rng.normal(size=(n, k))
    if name == "categorical":
        loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss
        return loss(xp.asarray(inputs), xp.asarray(rng.integers(0, k, size=n))), inputs
    if name == "normal":
        targets = xp.asarray(rng.normal(size=(n, k)))
        return kfac_xp.NormalMeanNegativeLogProbLoss(xp.asarray(inputs), 0.7, targets), inputs
    targets = xp.asarray(rng.random((n, k)))
    return kfac_xp.MultiBernoulliNegativeLogProbLoss(xp.asarray(inputs), targets), inputs


def probability(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


ALL = pytest.mark.parametrize("name", ["categorical", "normal", "bernoulli"])


@ALL
def test_gradient_is_the_slope_of_the_loss(rng, name):
    loss, inputs = make(name, np, rng)
    slope = np.zeros_like(inputs)
    for index in itertools.product(*map(range, inputs.shape)):
        values = []
        for sign in (1, -1):
            moved = inputs.copy()
            moved[index] += sign * 1e-6
            keywords = {"var": 0.7} if name == "normal" else {}
            values.append(type(loss)(moved, targets=loss.targets, **keywords).evaluate())
        slope[index] = (values[0] - values[1]) / 2e-6
    assert_close(loss.gradient(), slope, 1e-7)


def test_values_by_definition(rng):
    loss, x = make("categorical", np, rng)
    expected = -np.log(probability(x)[np.arange(3), loss.targets]).sum()
    assert_close(loss.evaluate(), expected, 1e-12)
    loss, x = make("normal", np, rng)
    density = np.exp(-((loss.targets - x) ** 2) / 1.4) / np.sqrt(2 * np.pi * 0.7)
    assert_close(loss.evaluate(), -np.log(density).sum(), 1e-12)
    loss, x = make("bernoulli", np, rng)
    p, t = 1 / (1 + np.exp(-x)), loss.targets
    assert_close(loss.evaluate(), -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum(), 1e-12)


def exact_fisher(name, x):
    """Fisher of one case with respect to its inputs: expectation of the outer products."""
    k = len(x)
    if name == "normal":
        return np.eye(k) / 0.7
    if name == "categorical":
        p = probability(x)
        scores = [p - np.eye(k)[t] for t in range(k)]
        return sum(p[t] * np.outer(s, s) for t, s in enumerate(scores))
    p = 1 / (1 + np.exp(-x))
    total = np.zeros((k, k))
    for bits in itertools.product((0, 1), repeat=k):
        weight = np.prod(np.where(bits, p, 1 - p))
        total += weight * np.outer(p - bits, p - bits)
    return total


@ALL
def test_products_are_those_of_the_fisher(xp, rng, name):
    loss, inputs = make(name, xp, rng)
    fishers = np.stack([exact_fisher(name, x) for x in inputs])
    v = rng.normal(size=inputs.shape)
    product = np.einsum("nij,nj->ni", fishers, v)
    vector = xp.asarray(v)
    assert_close(loss.multiply_fisher(vector), product, 1e-10)
    assert_close(loss.multiply_ggn(vector), product, 1e-10)
    by_factors = loss.multiply_fisher_factor(loss.multiply_fisher_factor_transpose(vector))
    assert_close(by_factors, product, 1e-10)
    columns = [
        to_numpy(loss.multiply_fisher_factor_replicated_one_hot((k,)))
        for k in range(inputs.shape[-1])
    ]
    factor = np.stack(columns, axis=-1)
    assert_close(np.einsum("nik,njk->nij", factor, factor), fishers, 1e-10)
    assert loss.fisher_factor_inner_shape == loss.ggn_factor_inner_static_shape == inputs.shape
    with pytest.raises(ValueError, match=r"must be a tuple \(k,\)"):
        loss.multiply_fisher_factor_replicated_one_hot((4,))


@ALL
def test_samples_have_the_distribution(rng, name):
    x = np.tile(rng.normal(size=(1, 3)), (40000, 1))
    loss = {
        "categorical": kfac_xp.CategoricalLogitsNegativeLogProbLoss,
        "normal": lambda m: kfac_xp.NormalMeanNegativeLogProbLoss(m, 0.7),
        "bernoulli": kfac_xp.MultiBernoulliNegativeLogProbLoss,
    }[name](x)
    sample = loss.sample(5)
    if name == "categorical":
        assert sample.shape == (40000,)
        frequency = np.bincount(sample, minlength=3) / 40000
        assert_close(frequency, probability(x[0]), 0.02)
    elif name == "bernoulli":
        assert set(np.unique(sample)) == {0.0, 1.0}
        assert_close(sample.mean(0), 1 / (1 + np.exp(-x[0])), 0.02)
    else:
        assert_close(sample.mean(0), x[0], 0.02)
        assert_close(sample.var(0), np.full(3, 0.7), 0.05)
    # The mean of squared gradients at samples is the diagonal of the Fisher.
    squares = (loss.with_targets(sample).gradient() ** 2).mean(0)
    assert_close(squares, np.diagonal(exact_fisher(name, x[0])), 0.05)
    assert np.isfinite(loss.evaluate_on_sample(5))


@ALL
def test_every_library_sees_the_same_draws(xp, rng, name):
    _, x = make(name, np, rng, n=50)
    for dtype in ("float64", "float32"):
        samples = []
        for library in (np, xp):
            inputs = library.asarray(x, dtype=getattr(library, dtype))
            loss = {
                "categorical": kfac_xp.CategoricalLogitsNegativeLogProbLoss,
                "normal": kfac_xp.NormalMeanNegativeLogProbLoss,
                "bernoulli": kfac_xp.MultiBernoulliNegativeLogProbLoss,
            }[name](inputs)
            samples.append(to_numpy(loss.sample(np.random.default_rng(1))))
        assert_close(samples[1], samples[0], 1e-6)


@ALL
def test_extreme_inputs(xp, name):
    """No overflow where the loss itself is finite."""
    inputs = xp.asarray([[1e4, -1e4, 0.0]], dtype=xp.float32)
    if name == "categorical":
        loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(inputs, xp.asarray([1]))
        assert float(loss.evaluate()) == 2e4
    elif name == "bernoulli":
        loss = kfac_xp.MultiBernoulliNegativeLogProbLoss(
            inputs, xp.asarray([[0.0, 0.0, 1.0]], dtype=xp.float32)
        )
        assert_close(loss.evaluate(), 1e4 + np.log(2), 1e-6)
    else:
        loss = kfac_xp.NormalMeanNegativeLogProbLoss(inputs, targets=inputs)
    for result in (loss.gradient(), loss.multiply_fisher(inputs), loss.sample(0)):
        assert np.isfinite(to_numpy(result)).all()


def test_bad_input(xp):
    logits = xp.zeros((2, 3))
    categorical = kfac_xp.CategoricalLogitsNegativeLogProbLoss
    bernoulli = kfac_xp.MultiBernoulliNegativeLogProbLoss
    normal = kfac_xp.NormalMeanNegativeLogProbLoss
    for bad, message in (
        (lambda: categorical(logits, xp.asarray([0, 3])), r"in \[0, 2\]; got values from 0 to 3"),
        (lambda: categorical(logits, xp.asarray([-1, 0])), "got values from -1 to 0"),
        (lambda: categorical(logits, xp.asarray([0])), r"`targets` must have shape \(2,\)"),
        (lambda: bernoulli(logits, logits + 1.5), r"in \[0, 1\]; got values from 1.5"),
        (lambda: bernoulli(logits, logits[:1, :]), "`targets` must have the shape of `logits`"),
        (lambda: normal(logits, targets=logits[:1, :]), "must have the shape of `mean`"),
        (lambda: normal(logits, var=0.0), "`var` must be a positive number"),
        (lambda: categorical(logits).evaluate(), "has no `targets`"),
        (lambda: categorical(logits).gradient(), "has no `targets`"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(TypeError, match="class indices of an integer dtype"):
        categorical(logits, xp.asarray([0.0, 1.0]))
    with pytest.raises(TypeError, match="`generator` must be a numpy"):
        categorical(logits).sample("seed")


def test_a_target_out_of_range_is_nan_where_it_cannot_be_read(monkeypatch):
    from kfac_xp.loss_functions import base, categorical

    for module in (base, categorical):
        monkeypatch.setattr(module, "is_readable", lambda x: False)
    loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(np.zeros((2, 3)), np.asarray([0, 5]))
    assert np.isnan(loss.evaluate())
    gradient = loss.gradient()
    assert np.isfinite(gradient[0]).all()
    assert np.isnan(gradient[1]).all()


def test_a_device_generator_is_asked_for_its_own_draws():
    class Device:
        def uniform(self, shape):
            return np.full(shape, 0.25)

        def normal(self, shape):
            return np.full(shape, -1.0)

    assert randomness.uniform(Device(), (2,), np.zeros(1))[0] == 0.25
    assert randomness.normal(Device(), (2,), np.zeros(1))[0] == -1.0


def test_losses_trace_under_jit(rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jax.config.update("jax_enable_x64", True)
    loss, x = make("categorical", np, rng)

    @jax.jit
    def gradient(logits, targets):
        return kfac_xp.CategoricalLogitsNegativeLogProbLoss(logits, targets).gradient()

    traced = gradient(jax.numpy.asarray(x), jax.numpy.asarray(loss.targets))
    assert_close(traced, loss.gradient(), 1e-12)
