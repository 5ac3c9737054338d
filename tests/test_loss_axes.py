"""Axes between cases and classes: the Fisher and the loss of a case are sums over its places.

The truth is dense: the gradient of each case's outputs and the Fisher of each place, by hand.
"""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close

N, D, COEFF, VAR = 5, 3, 0.25, 0.7


def fisher_of_place(kind, z):
    """Of one place: outputs [K], or a pair of such, raveled."""
    if kind in ("categorical", "onehot"):
        p = np.exp(z) / np.exp(z).sum()
        return np.diag(p) - np.outer(p, p)
    if kind == "bernoulli":
        p = 1 / (1 + np.exp(-z))
        return np.diag(p * (1 - p))
    if kind == "normal":
        return np.eye(len(z)) / VAR
    q = z[len(z) // 2 :]
    return np.diag(np.concatenate([1 / q, 1 / (2 * q * q)]))


class Net:
    """``x W`` with its columns as places and outputs; with two outputs the second is squared."""

    def __init__(self, kernel, x, shape, is_pair):
        self.layer_inputs, self.x, self.is_pair = {"fc": x}, x, is_pair
        self.z = (x @ kernel).reshape(len(x), *shape)  # of a pair [N, ..., 2 n]
        n = shape[-1] // 2
        self.outputs = (self.z[..., :n], 1 + self.z[..., n:] ** 2) if is_pair else self.z

    def vjp(self, ds, parameters=True):
        if self.is_pair:
            n = self.z.shape[-1] // 2
            ds = np.concatenate([ds[0], 2 * self.z[..., n:] * ds[1]], axis=-1)
        ds = ds.reshape(N, -1)
        return {"fc": self.x.T @ ds}, {"fc": ds}


KINDS = {
    "categorical": kfac_xp.CategoricalLogitsNegativeLogProbLoss,
    "onehot": kfac_xp.OnehotCategoricalLogitsNegativeLogProbLoss,
    "bernoulli": kfac_xp.MultiBernoulliNegativeLogProbLoss,
    "normal": lambda y, t: kfac_xp.NormalMeanNegativeLogProbLoss(y, VAR, t),
    "mean_variance": lambda y, t: kfac_xp.NormalMeanVarianceNegativeLogProbLoss(*y, targets=t),
}


def registered(kind, params):
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("fc", params, "diagonal")
    if kind == "categorical":
        layers.register_categorical_predictive_distribution("out", COEFF)
    elif kind == "bernoulli":
        layers.register_multi_bernoulli_predictive_distribution("out", COEFF)
    elif kind == "normal":
        layers.register_normal_predictive_distribution("out", VAR, COEFF)
    else:
        layers.register_loss("out", KINDS[kind], COEFF)
    return layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 2, 4)], ids=str)
def test_places_are_summed_and_cases_averaged(rng, kind, shape):
    kernel, x = 0.5 * rng.normal(size=(D, np.prod(shape))), rng.normal(size=(N, D))
    net = Net(kernel, x, shape, kind == "mean_variance")
    estimator = kfac_xp.FisherEstimator(registered(kind, kernel), 0.1, estimation_mode="exact")
    estimator.update_cov(net)
    # The diagonal of the mean over cases of J^T F J, F with a block for each place.
    expected = np.zeros((D, *shape))
    for a, z in zip(x, net.z, strict=True):
        for place in np.ndindex(shape[:-1]):
            slope, at = np.ones(shape[-1]), z[place].copy()
            if net.is_pair:
                n = shape[-1] // 2
                slope[n:], at[n:] = 2 * at[n:], 1 + at[n:] ** 2
            F = slope[:, None] * fisher_of_place(kind, at) * slope
            expected[(slice(None), *place)] += COEFF * np.outer(a * a, np.diag(F)) / N
    expected = expected.reshape(kernel.shape)
    assert_close(estimator.blocks[0].matrix().diagonal(), expected.ravel(), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_step_is_a_mean_over_cases_alone(rng, kind):
    """And so is the gradient; targets have the axes of the outputs, class indices all but one."""
    shape = (3, 2, 4)
    kernel, x = 0.5 * rng.normal(size=(D, 24)), rng.normal(size=(N, D))
    net = Net(kernel, x, shape, kind == "mean_variance")
    made = KINDS[kind](net.outputs, None)
    targets = made.sample(0)
    assert targets.shape == ((N, 3, 2) if kind == "categorical" else as_first(net.outputs).shape)
    places = 0.0
    for n in range(N):
        for place in np.ndindex(3, 2):
            one = tuple(y[n, *place][None] for y in net.outputs) if net.is_pair else None
            outputs = net.outputs[n, *place][None] if one is None else one
            places += KINDS[kind](outputs, targets[n, *place][None]).evaluate()
    layers = registered(kind, kernel)
    optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 1.0)
    moved, info = optimizer.step({"fc": kernel}, net, targets)
    assert_close(info.loss, COEFF * places / N, 1e-12)
    gradient = COEFF * net.vjp(made.with_targets(targets).gradient())[0]["fc"] / N
    assert_close(info.gradient_norm, np.linalg.norm(gradient), 1e-12)
    assert not np.array_equal(moved["fc"], kernel)


def as_first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def test_one_number_for_each_case(rng):
    """[N] is as [N, 1] for a mean and for bits; classes and pairs need their axis."""
    y, t = rng.normal(size=N), rng.integers(2, size=N).astype(float)
    for cls in (
        kfac_xp.NormalMeanNegativeLogProbLoss,
        kfac_xp.MultiBernoulliNegativeLogProbLoss,
    ):
        flat, column = cls(y, targets=t), cls(y[:, None], targets=t[:, None])
        assert_close(flat.evaluate(), column.evaluate(), 1e-14)
        one = flat.multiply_fisher_factor_replicated_one_hot(())
        assert_close(one, column.multiply_fisher_factor_replicated_one_hot((0,))[:, 0], 1e-14)
    for call in (
        lambda: kfac_xp.CategoricalLogitsNegativeLogProbLoss(y),
        lambda: kfac_xp.NormalMeanVarianceNegativeLogProbLoss(y, np.exp(y)),
    ):
        with pytest.raises(ValueError, match=r"must have shape \[N, ..., "):
            call()
