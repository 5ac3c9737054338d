"""`estimator.estimate`: the statistics of a data set, and EKFAC's matrix of it in one call.

The truth is dense algebra in float64 on the gradient of each case.
"""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.models import TanhNet
from tests.rank_threads import on_ranks


def corrected(cases, rows, grads):
    """EKFAC's matrix: the diagonal of the exact block in the eigenbasis of the Kronecker one.

    `cases` holds each case's gradient (and source's) as a matrix, to be averaged over `len(rows)`;
    `rows` and `grads` are what the two factors are second moments of.
    """
    flat = np.stack([c.ravel() for c in cases])
    exact = flat.T @ flat / len(rows)
    (_, u), (_, v) = np.linalg.eigh(rows.T @ rows), np.linalg.eigh(grads.T @ grads)
    basis = np.kron(u, v)
    return (basis * np.diag(basis.T @ exact @ basis)) @ basis.T


def of_dense(x, *sources):
    """The same of a dense layer with a bias."""
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    cases = [np.outer(a, g) for ds in sources for a, g in zip(rows, ds, strict=True)]
    return corrected(cases, rows, np.concatenate(sources))


def dense_estimator(xp, approx="ekfac", damping=0.0, communicator=None, **options):
    layers = kfac_xp.LayerCollection(**options)
    params = xp.zeros((3, 2), dtype=xp.float64), xp.zeros((2,), dtype=xp.float64)
    layers.register_fully_connected("fc", params, approx)
    return kfac_xp.FisherEstimator(layers, damping, communicator=communicator)


def batches_of(x, ds, cut, xp=np):
    """Two batches of different sizes."""
    return [
        {"fc": (xp.asarray(a), xp.asarray(g))}
        for a, g in ((x[:cut], ds[:cut]), (x[cut:], ds[cut:]))
    ]


@pytest.mark.more
def test_one_call_is_the_matrix_of_the_data(xp, rng):
    x, ds = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    estimator = dense_estimator(xp)
    assert estimator.estimate(batches_of(x, ds, 4, xp)) == 9
    assert_close(estimator.matrix().to_dense(), of_dense(x, ds), 1e-9)


@pytest.mark.parametrize("zero_debias", [True, False])
def test_nothing_stays_of_what_was_before(rng, zero_debias):
    x, ds = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    estimator = dense_estimator(np, zero_debias=zero_debias)
    for _ in range(2):
        other = {"fc": (rng.normal(size=(5, 3)), rng.normal(size=(5, 2)))}
        estimator.update_cov(other, ema_decay=0.9)
        estimator.update_inverses()
    before = estimator.num_cov_updates
    estimator.estimate(batches_of(x, ds, 7))
    assert_close(estimator.matrix().to_dense(), of_dense(x, ds), 1e-9)
    assert estimator.num_cov_updates == before + 2
    # Training goes on from here as from one update with all these cases.
    extra = {"fc": (rng.normal(size=(5, 3)), rng.normal(size=(5, 2)))}
    estimator.update_cov(extra, ema_decay=0.5, ema_weight=0.5)
    A = estimator.blocks[0].input_factor.cov
    rows = [np.append(a, 1) for a in x], [np.append(a, 1) for a in extra["fc"][0]]
    assert_close(
        A, sum(np.mean([np.outer(r, r) for r in part], axis=0) for part in rows) / 2, 1e-12
    )


def test_of_a_convolution_and_of_class_ids(rng):
    """The gradient of a case is the sum over locations; an id's factor is diagonal."""
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("conv", np.zeros((2, 1, 2, 3)), padding="VALID", approx="ekfac")
    layers.register_fully_connected("ids", np.zeros((4, 2)), "ekfac", dense_inputs=False)
    layers.register_fully_connected("kron", np.zeros((3, 2)))  # singular: no inverse is asked for
    estimator = kfac_xp.FisherEstimator(layers, 0.0)
    images, of_images = rng.normal(size=(6, 3, 2, 2)), rng.normal(size=(6, 2, 2, 3))
    ids, of_ids = rng.integers(4, size=6), rng.normal(size=(6, 2))
    x = np.tile(rng.normal(size=3), (6, 1))
    estimator.estimate([{"conv": (images, of_images), "ids": (ids, of_ids), "kron": (x, of_ids)}])
    rows = np.concatenate([images[:, :-1], images[:, 1:]], axis=-1)  # the two taps of each place
    cases = [a.reshape(-1, 4).T @ g.reshape(-1, 3) for a, g in zip(rows, of_images, strict=True)]
    flat = np.stack([c.ravel() for c in cases])
    a, g = rows.reshape(-1, 4), of_images.reshape(-1, 3)
    basis = np.kron(np.linalg.eigh(a.T @ a)[1], np.linalg.eigh(g.T @ g)[1])
    best = np.diag(basis.T @ (flat.T @ flat / 6) @ basis)
    assert_close(estimator.blocks[0].matrix().to_dense(), (basis * best) @ basis.T, 1e-9)
    hot = np.eye(4)[ids]
    basis = np.kron(np.eye(4), np.linalg.eigh(of_ids.T @ of_ids)[1])
    flat = np.stack([np.outer(h, g).ravel() for h, g in zip(hot, of_ids, strict=True)])
    best = np.diag(basis.T @ (flat.T @ flat / 6) @ basis)
    assert_close(estimator.blocks[1].matrix().to_dense(), (basis * best) @ basis.T, 1e-9)
    with pytest.raises(RuntimeError, match="update_inverses"):
        estimator.multiply_inverse({"kron": np.ones((3, 2))})


@pytest.mark.parametrize(("mode", "num_samples"), [("gradients", 2), ("exact", 1)])
def test_of_a_model(rng, mode, num_samples):
    """Draws are the same in both passes, and those that `update_cov` would have made."""
    params = {
        "one": (0.5 * rng.normal(size=(3, 4)), np.zeros(4)),
        "two": (0.5 * rng.normal(size=(4, 2)), np.zeros(2)),
    }
    x = rng.normal(size=(8, 3))
    nets = [TanhNet(params, x[:3]), TanhNet(params, x[3:])]
    layers = kfac_xp.LayerCollection()
    for name, pair in params.items():
        layers.register_fully_connected(name, pair, "ekfac")
    layers.register_normal_predictive_distribution("output")
    made = {"estimation_mode": mode, "num_samples": num_samples}
    estimator = kfac_xp.FisherEstimator(layers, 0.1, compute_params_stats=True, **made)
    assert estimator.estimate(nets) == 8
    gradients = {"one": [], "two": []}  # [source][case]
    for number, net in enumerate(nets):
        draws = np.random.default_rng([0, number])
        if mode == "exact":  # a normal law of variance 1/2
            sources = [np.tile(2**0.5 * unit, (len(net.x), 1)) for unit in np.eye(2)]
        else:
            loss = kfac_xp.NormalMeanNegativeLogProbLoss(net.outputs)
            drawn = [loss.with_targets(loss.sample(draws)).gradient() for _ in range(num_samples)]
            sources = [num_samples**-0.5 * ds for ds in drawn]
        for name in gradients:
            gradients[name].append([net.vjp(ds)[1][name] for ds in sources])
    inputs = {"one": x, "two": np.concatenate([net.a1 for net in nets])}
    for name, block in layers.fisher_blocks.items():
        sources = [np.concatenate(parts) for parts in zip(*gradients[name], strict=True)]
        assert_close(block.matrix().to_dense(), of_dense(inputs[name], *sources), 1e-9)


def test_ranks_make_the_matrix_of_one_process(rng):
    x, ds = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))

    def matrix(c):
        estimator = dense_estimator(np, communicator=c)
        part = slice(0, 2) if c.rank == 0 else slice(2, 9)
        cases = estimator.estimate(batches_of(x[part], ds[part], 1 + c.rank))
        return cases, estimator.matrix().to_dense()

    for cases, found in on_ranks(2, matrix):
        assert cases == 9
        assert_close(found, of_dense(x, ds), 1e-9)


def test_without_it_the_error_names_it(rng):
    estimator = dense_estimator(np)
    batch = {"fc": (rng.normal(size=(9, 3)), rng.normal(size=(9, 2)))}
    estimator.update_cov(batch)
    with pytest.raises(RuntimeError, match=r"no eigenbasis yet.*call `estimator.estimate\(batches"):
        estimator.matrix()


def test_what_is_refused_changes_nothing(rng):
    estimator = dense_estimator(np)
    batch = {"fc": (rng.normal(size=(9, 3)), rng.normal(size=(9, 2)))}
    estimator.estimate([batch])
    before = to_numpy(estimator.matrix().to_dense())
    other = {"fc": (2 * batch["fc"][0], batch["fc"][1])}
    broken = {"fc": (batch["fc"][0], np.full((9, 2), np.nan))}

    class Fewer:
        """Fewer batches each time."""

        left = 2

        def __iter__(self):
            self.left -= 1
            return iter([other] * (self.left + 1))

    for bad, error, match in (
        (other, TypeError, r"must be a list of batches.*got dict.*`\[batch\]`"),
        ((other, None), TypeError, "got tuple"),
        (iter([other]), TypeError, "gone through twice.*got the iterator list_iterator"),
        ([], ValueError, "at least one batch"),
        ([other, broken], FloatingPointError, "not finite"),
        (Fewer(), ValueError, "got 18 cases and then 9"),
    ):
        with pytest.raises(error, match=match):
            estimator.estimate(bad)
        assert np.array_equal(to_numpy(estimator.matrix().to_dense()), before)
        assert estimator.num_cov_updates == 1
    kron = dense_estimator(np, "kron")
    assert kron.estimate(iter([other])) == 9  # one pass is enough
