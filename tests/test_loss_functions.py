"""Losses: gradients and Fisher products by finite differences and sums over outcomes."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kfac_xp
from kfac_xp import randomness
from kfac_xp.backend import is_readable
from kfac_xp.linearized_batch import LinearizedBatch
from kfac_xp.params import as_arrays
from tests.cases import assert_close, to_numpy

CLASSES = {
    "categorical": kfac_xp.CategoricalLogitsNegativeLogProbLoss,
    "onehot": kfac_xp.OnehotCategoricalLogitsNegativeLogProbLoss,
    "normal": kfac_xp.NormalMeanNegativeLogProbLoss,
    "mean_variance": kfac_xp.NormalMeanVarianceNegativeLogProbLoss,
    "bernoulli": kfac_xp.MultiBernoulliNegativeLogProbLoss,
}
ALL = pytest.mark.parametrize("name", CLASSES)
VAR = 0.7
ONE_FISHER = "multiply_fisher_factor_replicated_one_hot"


def build(name, inputs, targets=None):
    """The loss of a tuple of inputs: one array, or mean and variance."""
    keywords = {"var": VAR} if name == "normal" else {}
    return CLASSES[name](*inputs, targets=targets, **keywords)


def numbers(name, rng, shape=(3, 4)):
    """Inputs, a tuple, and targets in NumPy."""
    inputs = (rng.normal(size=shape),)
    if name == "mean_variance":
        inputs = (*inputs, np.exp(rng.normal(size=shape)))
    targets = {
        "categorical": lambda: rng.integers(0, shape[-1], size=shape[:-1]),
        "onehot": lambda: np.eye(shape[-1])[rng.integers(0, shape[-1], size=shape[:-1])],
        "bernoulli": lambda: rng.random(shape),
    }.get(name, lambda: rng.normal(size=shape))()
    return inputs, targets


def make(name, xp, rng, shape=(3, 4), dtype="float64"):
    inputs, targets = numbers(name, rng, shape)
    kind = "int64" if name == "categorical" else dtype
    moved = tuple(xp.asarray(x, dtype=getattr(xp, dtype)) for x in inputs)
    return build(name, moved, xp.asarray(targets, dtype=getattr(xp, kind))), inputs


def flat(parts):
    """Per case, all entries of an array or a tuple of arrays in one row."""
    return np.concatenate([to_numpy(x).reshape(x.shape[0], -1) for x in as_arrays(parts)], axis=1)


def like(parts, rows):
    """Inverse of `flat`."""
    sizes = np.cumsum([x[0].size for x in parts])[:-1]
    pieces = np.split(rows, sizes, axis=1)
    moved = tuple(piece.reshape(x.shape) for piece, x in zip(pieces, parts, strict=True))
    return moved if len(moved) > 1 else moved[0]


def probability(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@ALL
def test_gradient_is_the_slope_of_the_loss(rng, name):
    loss, inputs = make(name, np, rng)
    slopes = []
    for i, x in enumerate(inputs):
        slope = np.zeros_like(x)
        for index in itertools.product(*map(range, x.shape)):
            values = []
            for sign in (1, -1):
                moved = [a.copy() for a in inputs]
                moved[i][index] += sign * 1e-6
                values.append(build(name, moved, loss.targets).evaluate())
            slope[index] = (values[0] - values[1]) / 2e-6
        slopes.append(slope)
    gradient = as_arrays(loss.gradient())
    assert len(gradient) == len(inputs)
    for actual, slope in zip(gradient, slopes, strict=True):
        assert_close(actual, slope, 1e-7)


def test_values_by_definition(rng):
    loss, (x,) = make("categorical", np, rng)
    expected = -np.log(probability(x)[np.arange(3), loss.targets]).sum()
    assert_close(loss.evaluate(), expected, 1e-12)
    assert_close(loss.dist.probs, probability(x), 1e-12)
    loss, (x,) = make("onehot", np, rng)
    assert_close(loss.evaluate(), -(loss.targets * np.log(probability(x))).sum(), 1e-12)
    loss, (x,) = make("normal", np, rng)
    density = np.exp(-((loss.targets - x) ** 2) / 1.4) / np.sqrt(2 * np.pi * VAR)
    assert_close(loss.evaluate(), -np.log(density).sum(), 1e-12)
    assert loss.dist.mean is x
    assert loss.dist.variance == VAR
    loss, (m, q) = make("mean_variance", np, rng)
    density = np.exp(-((loss.targets - m) ** 2) / (2 * q)) / np.sqrt(2 * np.pi * q)
    assert_close(loss.evaluate(), -np.log(density).sum(), 1e-12)
    assert loss.dist == loss.inputs == loss.params
    loss, (x,) = make("bernoulli", np, rng)
    p, t = 1 / (1 + np.exp(-x)), loss.targets
    assert_close(loss.evaluate(), -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum(), 1e-12)
    assert_close(loss.dist.probs, p, 1e-12)


@pytest.mark.more
def test_one_hot_targets_are_class_indices(xp, rng):
    """The two categorical losses are one, whatever the dtype of the ones; smoothed labels mix."""
    indices, _ = make("categorical", xp, rng)
    ones = np.eye(4)[to_numpy(indices.targets)]
    for dtype in (xp.float64, xp.float32, xp.int32, xp.bool):
        onehot = build("onehot", (indices.inputs,), xp.asarray(ones, dtype=dtype))
        assert_close(onehot.evaluate(), to_numpy(indices.evaluate()), 1e-14)
        assert_close(onehot.gradient(), to_numpy(indices.gradient()), 1e-14)
        assert onehot.gradient().dtype == xp.float64
    assert_close(onehot.sample(3), np.eye(4)[to_numpy(indices.sample(3))], 0.0)
    mixed = build("onehot", (indices.inputs,), xp.asarray(0.9 * ones + 0.025))
    uniform = [
        build("onehot", (indices.inputs,), xp.asarray(np.tile(e, (3, 1)))) for e in np.eye(4)
    ]
    expected = 0.9 * indices.evaluate() + 0.025 * sum(u.evaluate() for u in uniform)
    assert_close(mixed.evaluate(), to_numpy(expected), 1e-12)


def case_fisher(name, *inputs):
    """Fisher of one case: the expectation of outer products of scores, over all outcomes."""
    x = inputs[0]
    if name in ("categorical", "onehot"):  # rows are independent
        size, k = x.size, x.shape[-1]
        total = np.zeros((size, size))
        for i, p in enumerate(probability(x).reshape(-1, k)):
            scores = [p - np.eye(k)[t] for t in range(k)]
            block = sum(p[t] * np.outer(s, s) for t, s in enumerate(scores))
            total[i * k : (i + 1) * k, i * k : (i + 1) * k] = block
        return total
    if name == "bernoulli":
        p = (1 / (1 + np.exp(-x))).ravel()
        total = np.zeros((p.size, p.size))
        for bits in itertools.product((0, 1), repeat=p.size):
            weight = np.prod(np.where(bits, p, 1 - p))
            total += weight * np.outer(p - bits, p - bits)
        return total
    # Normal: entries are independent; the quadrature is exact for the scores' fourth degree.
    mean, variance = (a.ravel() for a in np.broadcast_arrays(*inputs, *[VAR] * (len(inputs) < 2)))
    n = mean.size
    total = np.zeros((2 * n, 2 * n))
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    for z, w in zip(nodes, weights / weights.sum(), strict=True):
        error = np.sqrt(variance) * z
        scores = np.stack([-error / variance, 0.5 / variance - error**2 / (2 * variance**2)])
        for i in range(n):
            total[np.ix_([i, n + i], [i, n + i])] += w * np.outer(scores[:, i], scores[:, i])
    return total if len(inputs) == 2 else total[:n, :n]


@ALL
@pytest.mark.parametrize("shape", [(3, 4), pytest.param((2, 2, 3), marks=pytest.mark.more)])
def test_products_are_those_of_the_fisher(xp, rng, name, shape):
    loss, inputs = make(name, xp, rng, shape)
    fishers = np.stack([case_fisher(name, *case) for case in zip(*inputs, strict=True)])
    rows = rng.normal(size=fishers.shape[:2])
    vector = like(inputs, rows)
    vector = tuple(map(xp.asarray, vector)) if len(inputs) > 1 else xp.asarray(vector)
    product = np.einsum("nij,nj->ni", fishers, rows)
    inner = (*shape[:-1], len(inputs) * shape[-1])
    for kind in ("fisher",) if name == "mean_variance" else ("fisher", "ggn"):

        def call(method, *arguments, kind=kind):
            return getattr(loss, method.format(kind))(*arguments)

        assert_close(flat(call("multiply_{}", vector)), product, 1e-10)
        transposed = call("multiply_{}_factor_transpose", vector)
        assert tuple(transposed.shape) == inner
        assert_close(flat(call("multiply_{}_factor", transposed)), product, 1e-10)
        # All columns of B, as `exact` asks for them: B @ B.T = F, and B.T from them.
        positions = list(itertools.product(*map(range, inner[1:])))
        columns = [call("multiply_{}_factor_replicated_one_hot", index) for index in positions]
        factor = np.stack([flat(column) for column in columns], axis=-1)
        assert_close(factor @ factor.transpose(0, 2, 1), fishers, 1e-10)
        assert_close(flat(transposed), np.einsum("nik,ni->nk", factor, rows), 1e-10)
        for form in ("inner_shape", "inner_static_shape"):
            assert getattr(loss, f"{kind}_factor_{form}") == inner


@ALL
def test_one_number_per_case(xp, rng, name):
    """Outputs [N] where each number is a distribution of its own; else the last axis is said."""
    if name in ("normal", "bernoulli"):
        loss, (x,) = make(name, xp, rng, (3,))
        column = to_numpy(getattr(loss, ONE_FISHER)(()))
        fishers = [case_fisher(name, case)[0, 0] for case in x]
        assert_close(column**2, fishers, 1e-12)
    else:
        with pytest.raises(ValueError, match=r"must have shape \[N, ..., \w\]"):
            make(name, xp, rng, (3,))


@ALL
def test_samples_have_the_distribution(rng, name):
    inputs, _ = numbers(name, rng, (1, 3))
    loss = build(name, tuple(np.tile(x, (40000, 1)) for x in inputs))
    sample = loss.sample(5)
    x = inputs[0][0]
    if name == "categorical":
        assert sample.shape == (40000,)
        frequency = np.bincount(sample, minlength=3) / 40000
        assert_close(frequency, probability(x), 0.02)
    elif name == "onehot":
        assert (sample.sum(-1) == 1).all()
        assert set(np.unique(sample)) == {0.0, 1.0}
        assert_close(sample.mean(0), probability(x), 0.02)
    elif name == "bernoulli":
        assert set(np.unique(sample)) == {0.0, 1.0}
        assert_close(sample.mean(0), 1 / (1 + np.exp(-x)), 0.02)
    else:
        variance = inputs[1][0] if name == "mean_variance" else np.full(3, VAR)
        assert_close(sample.mean(0), x, 0.02)
        assert_close(sample.var(0), variance, 0.05)
    # The mean of gradients at samples is zero, and of their outer products the Fisher.
    scores = flat(loss.with_targets(sample).gradient())
    fisher = case_fisher(name, *(a[0] for a in inputs))
    assert np.abs(scores.mean(0)).max() < 0.02 * np.sqrt(fisher.max())
    assert_close(scores.T @ scores / 40000, fisher, 0.05)
    assert np.isfinite(loss.evaluate_on_sample(5))


def test_other_targets_share_what_is_made_of_the_inputs(rng):
    for cls, targets in (
        (kfac_xp.MultiBernoulliNegativeLogProbLoss, np.ones((4, 3))),
        (kfac_xp.CategoricalLogitsNegativeLogProbLoss, np.array([0, 1, 2, 0])),
    ):
        logits = rng.normal(size=(4, 3))
        loss = cls(logits)
        probabilities = loss.dist.probs
        other = loss.with_targets(targets)
        assert other.dist.probs is probabilities
        assert loss.targets is None
        assert_close(other.gradient(), cls(logits, targets).gradient(), 0.0)


@ALL
def test_every_library_and_dtype_sees_the_same_draws(xp, rng, name):
    inputs, _ = numbers(name, rng, (50, 4))
    expected = build(name, inputs).sample(np.random.default_rng(1))
    for dtype in ("float64", "float32"):
        moved = tuple(xp.asarray(x, dtype=getattr(xp, dtype)) for x in inputs)
        sample = build(name, moved).sample(np.random.default_rng(1))
        assert_close(sample, expected, 1e-12 if dtype == "float64" else 1e-6)
        assert sample.dtype == (xp.int64 if name == "categorical" else moved[0].dtype)


@pytest.mark.more
@ALL
def test_results_keep_the_dtype(xp, rng, name):
    loss, inputs = make(name, xp, rng, dtype="float32")
    inner = xp.ones(loss.fisher_factor_inner_shape, dtype=xp.float32)
    results = [loss.evaluate(), loss.gradient(), loss.evaluate_on_sample(0)]
    results += [loss.multiply_fisher(loss.inputs), loss.multiply_fisher_factor(inner)]
    results += [loss.multiply_fisher_factor_transpose(loss.inputs), getattr(loss, ONE_FISHER)((1,))]
    assert loss.dtype == xp.float32
    for result in results:
        assert all(x.dtype == xp.float32 for x in as_arrays(result))
    assert len(as_arrays(loss.inputs)) == len(inputs)


@ALL
def test_every_documented_member_is_there(rng, name):
    loss, _ = make(name, np, rng)
    members = "targets inputs params dist dtype evaluate evaluate_on_sample sample gradient "
    members += "with_targets multiply_fisher multiply_fisher_factor_transpose "
    members += "fisher_factor_inner_static_shape multiply_ggn_factor_replicated_one_hot "
    for member in members.split():
        assert hasattr(loss, member), member
    assert isinstance(loss, kfac_xp.DistributionNegativeLogProbLoss)
    natural = isinstance(loss, kfac_xp.NaturalParamsNegativeLogProbLoss)
    assert natural == (name != "mean_variance")
    assert issubclass(kfac_xp.NegativeLogProbLoss, kfac_xp.LossFunction)


def test_mean_and_variance_have_no_ggn(rng):
    loss, inputs = make("mean_variance", np, rng)
    for ask in (
        lambda: loss.multiply_ggn(inputs),
        lambda: loss.multiply_ggn_factor(inputs[0]),
        lambda: loss.multiply_ggn_factor_transpose(inputs),
        lambda: loss.multiply_ggn_factor_replicated_one_hot((0,)),
        lambda: loss.ggn_factor_inner_shape,
        lambda: loss.ggn_factor_inner_static_shape,
    ):
        with pytest.raises(NotImplementedError, match="Use the Fisher: the `multiply_fisher`"):
            ask()


def test_mean_and_variance_over_towers(rng):
    """Outputs that are a tuple go through a batch; draws do not depend on how it is split."""
    layers = kfac_xp.LayerCollection()
    cls = kfac_xp.NormalMeanVarianceNegativeLogProbLoss
    layers.register_loss("y", lambda y, t: cls(*y, targets=t), coeff=4.0)
    (mean, variance), targets = numbers("mean_variance", rng, (5, 2))

    def cotangents(*parts):
        nets = [SimpleNamespace(outputs=(mean[p], variance[p])) for p in parts]
        batch = LinearizedBatch(layers, nets, [targets[p] for p in parts])
        for towers in (next(batch.sampled_cotangents(3)), batch.data_cotangents()):
            yield np.concatenate([flat(tower["y"]) for tower in towers])

    sampled, data = cotangents(slice(None))
    for actual, expected in zip(cotangents(slice(0, 2), slice(2, 5)), (sampled, data), strict=True):
        assert_close(actual, expected, 1e-14)
    assert_close(data, 4 * flat(cls(mean, variance, targets).gradient()), 1e-14)


@pytest.mark.more
@ALL
def test_extreme_inputs(xp, name):
    """No overflow where the loss itself is finite."""

    def row(*values):
        return xp.asarray([values], dtype=xp.float32)

    inputs = (row(1e4, -1e4, 0.0),)
    if name == "categorical":
        loss = build(name, inputs, xp.asarray([1]))
        assert float(loss.evaluate()) == 2e4
    elif name == "onehot":
        loss = build(name, inputs, row(0.0, 1.0, 0.0))
        assert float(loss.evaluate()) == 2e4
    elif name == "bernoulli":
        loss = build(name, inputs, row(0.0, 0.0, 1.0))
        assert_close(loss.evaluate(), 1e4 + np.log(2), 1e-6)
    elif name == "mean_variance":
        inputs = (*inputs, row(1e-8, 1e8, 1.0))
        loss = build(name, inputs, inputs[0])
        assert_close(loss.evaluate(), 1.5 * np.log(2 * np.pi), 1e-6)
    else:
        loss = build(name, inputs, inputs[0])
    for result in (loss.gradient(), loss.multiply_fisher(loss.inputs), loss.sample(0)):
        assert all(np.isfinite(to_numpy(x)).all() for x in as_arrays(result))


@pytest.mark.more
def test_bad_input(xp):
    logits = xp.zeros((2, 3))
    categorical, onehot, normal, mean_variance, bernoulli = CLASSES.values()
    both = mean_variance(logits, logits + 1)
    by_values = (
        (lambda: categorical(logits, xp.asarray([0, 3])), r"in \[0, 2\]; got values from 0 to 3"),
        (lambda: categorical(logits, xp.asarray([-1, 0])), "got values from -1 to 0"),
        (lambda: onehot(logits, logits), "rows that sum to 1.*got sums from 0 to 0"),
        (lambda: onehot(logits, logits + 1), "got sums from 3 to 3. For several bits"),
        (lambda: onehot(logits, xp.asarray([[2, -1, 0]] * 2)), "got values from -1 to 2"),
        (lambda: bernoulli(logits, logits + 1.5), r"in \[0, 1\]; got values from 1.5"),
        (lambda: mean_variance(logits, logits), "`variance` must be positive; got values from 0"),
    )
    for bad, message in (
        *(by_values if is_readable(logits) else ()),
        (lambda: categorical(logits, xp.asarray([0])), r"`targets` must have shape \(2,\)"),
        (lambda: onehot(logits, logits[:1, :]), "`targets` must have the shape of `logits`"),
        (lambda: bernoulli(logits, logits[:1, :]), "`targets` must have the shape of `logits`"),
        (lambda: normal(logits, targets=logits[:1, :]), "must have the shape of `mean`"),
        (lambda: normal(logits, var=0.0), "`var` must be a positive number"),
        (lambda: mean_variance(logits, logits[:1, :]), "`variance` must have the shape of `mean`"),
        (lambda: mean_variance(logits, logits + 1, logits[:1, :]), "`targets` must have the shape"),
        (
            lambda: mean_variance(xp.astype(logits, xp.float64), xp.ones((2, 3), dtype=xp.float32)),
            "`variance` must have the dtype of `mean`",
        ),
        (lambda: both.multiply_fisher_factor(logits), r"must have the inner shape \(2, 6\)"),
        (lambda: both.evaluate(), "has no `targets`"),
        (lambda: categorical(logits).evaluate(), "has no `targets`"),
        (lambda: categorical(logits).gradient(), "has no `targets`"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(TypeError, match=r"class indices of an integer dtype.*For one-hot"):
        categorical(logits, xp.asarray([0.0, 1.0]))
    with pytest.raises(TypeError, match="`generator` must be a numpy"):
        categorical(logits).sample("seed")
    for bad in (both.multiply_fisher, both.multiply_fisher_factor_transpose):
        with pytest.raises(TypeError, match="`vector` must be a pair like the inputs"):
            bad(logits)  # two rows, not a pair
        with pytest.raises(TypeError, match=r"pair like the inputs.*got tuple of 3"):
            bad((logits, logits, logits))


@pytest.mark.parametrize(
    ("shape", "index", "message"),
    [
        ((2, 3), (3,), r"tuple \(k,\) of ints with 0 <= k < 3, .* inner shape \(2, 3\)"),
        ((2, 3), (-1,), r"got \(-1,\)"),
        ((2, 3), 1, "got 1"),
        ((2, 3), (1.0,), r"got \(1.0,\)"),
        ((2, 3), (0, 1), r"got \(0, 1\)"),
        ((2, 4, 3), (1,), r"\(k1, k2\) of ints with 0 <= k1 < 4, 0 <= k2 < 3, .*got \(1,\)"),
        ((2,), (0,), r"tuple \(\) of ints, .*got \(0,\)"),
    ],
)
def test_bad_index(shape, index, message):
    loss = kfac_xp.NormalMeanNegativeLogProbLoss(np.zeros(shape))
    for method in (ONE_FISHER, ONE_FISHER.replace("fisher", "ggn")):
        with pytest.raises(ValueError, match=message):
            getattr(loss, method)(index)


@pytest.mark.parametrize(("dim", "position"), [(0, 1), (1, 3), (-1, 0), (-2, 2)])
def test_insert_slice_in_zeros(xp, rng, dim, position):
    shape = [2, 3, 2]
    shape[dim] = 1
    x = rng.normal(size=shape)
    expected = np.zeros([4 if axis == dim % 3 else n for axis, n in enumerate(shape)])
    np.moveaxis(expected, dim, 0)[position] = np.moveaxis(x, dim, 0)[0]
    actual = kfac_xp.insert_slice_in_zeros(xp.asarray(x, dtype=xp.float32), dim, 4, position)
    assert actual.dtype == xp.float32
    assert_close(actual, expected.astype(np.float32), 0.0)


def test_insert_slice_in_zeros_refuses(xp):
    insert = kfac_xp.insert_slice_in_zeros
    for arguments, message in (
        ((xp.zeros((2, 2)), 1, 4, 0), r"width 1 along axis 1; got shape \(2, 2\)"),
        ((xp.zeros((2, 1)), 1, 4, 4), r"`position` must be in \[0, 4\)"),
        ((xp.zeros((2, 1)), 1, 4, -1), "got -1"),
        ((xp.zeros((2, 1)), 2, 4, 0), "`dim` must be an axis of the slice"),
    ):
        with pytest.raises(ValueError, match=message):
            insert(*arguments)


def test_bad_values_are_nan_where_they_cannot_be_read(monkeypatch):
    from kfac_xp.loss_functions import base, categorical, normal

    for module in (base, categorical, normal):
        monkeypatch.setattr(module, "is_readable", lambda x: False)
    rows = np.asarray([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, -1.0, 0.0]])
    for loss, bad in (
        (build("categorical", (np.zeros((3, 3)),), np.asarray([0, 5, -1])), slice(1, 3)),
        (build("onehot", (np.zeros((3, 3)),), rows), slice(1, 3)),
    ):
        assert np.isnan(loss.evaluate())
        gradient = loss.gradient()
        assert np.isfinite(gradient[0]).all()
        assert np.isnan(gradient[bad]).all()
    loss = build("mean_variance", (rows, rows), rows)
    assert np.isnan(loss.evaluate())
    for result in (*loss.gradient(), loss.sample(0), *loss.multiply_fisher((rows, rows))):
        assert (np.isnan(result) == (rows <= 0)).all()


def test_a_device_generator_is_asked_for_its_own_draws():
    class Device:
        def uniform(self, shape):
            return np.full(shape, 0.25)

        def normal(self, shape):
            return np.full(shape, -1.0)

    assert randomness.uniform(Device(), (2,), np.zeros(1))[0] == 0.25
    assert randomness.normal(Device(), (2,), np.zeros(1))[0] == -1.0


@pytest.mark.parametrize("name", ["categorical", "onehot", "mean_variance"])
def test_losses_trace_under_jit_of_jax(rng, name):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jax.config.update("jax_enable_x64", True)
    loss, inputs = make(name, np, rng)

    @jax.jit
    def results(inputs, targets):
        traced = build(name, inputs, targets)
        return traced.gradient(), getattr(traced, ONE_FISHER)((1,))

    moved = tuple(map(jax.numpy.asarray, inputs))
    for actual, expected in zip(
        results(moved, jax.numpy.asarray(loss.targets)),
        (loss.gradient(), getattr(loss, ONE_FISHER)((1,))),
        strict=True,
    ):
        assert_close(flat(actual), flat(expected), 1e-12)


def test_the_documentation_names_what_is_there():
    path = Path(__file__).parent.parent / "docs" / "losses.md"
    text = path.read_text()
    table = text[text.index("| class ") : text.index("- u has the shape")]
    listed = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert {getattr(kfac_xp, f"{n}NegativeLogProbLoss") for n in listed} == set(CLASSES.values())
    for name in re.findall(r"`(register_\w+)", text):
        assert hasattr(kfac_xp.LayerCollection, name), name
    for name in re.findall(r"kfac_xp\.(\w+)", text):
        assert hasattr(kfac_xp, name), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (path.parent / (target.partition("#")[0] or path.name)).exists(), target
