"""What plots draw, against NumPy, and what stands beside their axes."""

import sys

import numpy as np
import pytest

import kfac_xp
from kfac_xp import plots
from tests.models import TanhNet
from tests.test_estimator import random_tanh_net, tanh_layers

mpl = pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def model(rng):
    """``(optimizer, params, net, infos)`` after some steps with adapted damping."""
    params, x, targets = random_tanh_net(np, rng, n=40)
    optimizer = kfac_xp.KfacOptimizer(
        tanh_layers(params),
        0.1,
        0.2,
        estimation_mode="exact",
        adapt_damping=True,
        damping_adaptation_interval=2,
        num_burnin_steps=1,
    )

    def loss_fn(params):
        outputs = TanhNet(params, x).outputs
        return kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets).evaluate() / 40

    infos = []
    for _ in range(6):
        params, info = optimizer.step(params, TanhNet(params, x), targets, loss_fn=loss_fn)
        infos.append(info)
    return optimizer, params, TanhNet(params, x), infos


def drawn(ax):
    """``(x, y)`` of the first line."""
    return ax.lines[0].get_xdata(), ax.lines[0].get_ydata()


def levels(ax):
    """Heights of the horizontal lines."""
    return [line.get_ydata()[0] for line in ax.lines[1:]]


class TestSpectra:
    def test_of_a_factor(self, model):
        factor = model[0].factors[0]
        ax = plots.plot_spectrum(factor)
        expected = np.linalg.eigvalsh(np.asarray(factor.cov))[::-1]
        number, values = drawn(ax)
        assert np.array_equal(number, np.arange(1, 5))
        assert np.allclose(values, expected, rtol=1e-9)
        # pi times the root of the damping, from the two traces.
        A, G = (np.asarray(f.cov) for f in model[0].factors[:2])
        pi = np.sqrt(np.trace(A) / len(A) / (np.trace(G) / len(G)))
        assert np.allclose(levels(ax), pi * np.sqrt(float(model[0].damping)))
        assert ax.get_xlabel() == "number of the eigenvalue, largest first"
        assert ax.get_ylabel() == "eigenvalue (squared data, mean over cases)"
        assert ax.get_yscale() == "log"
        assert ax.get_title() == "FullyConnectedKroneckerFactor one.input"
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["4 eigenvalues", f"damping {levels(ax)[0]:.3g}"]

    def test_of_a_block(self, model):
        block = model[0].estimator.blocks[0]
        ax = plots.plot_spectrum(block)
        A, G = (np.asarray(f.cov) for f in block.factors.values())
        expected = np.linalg.eigvalsh(np.kron(A, G))[::-1]
        assert np.allclose(drawn(ax)[1], expected, rtol=1e-6)
        assert np.allclose(levels(ax), float(model[0].damping))
        assert ax.get_ylabel() == "eigenvalue (squared gradient, mean over cases)"

    def test_of_a_relative_damping(self, rng):
        block = kfac_xp.FullyConnectedKFACBasicFB(None, relative_damping=True)
        inputs, grads = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
        block.register_additional_tower(inputs, grads)
        block.instantiate_factors([[grads]], 0.1)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        matrix = np.kron(inputs.T @ inputs / 9, grads.T @ grads / 9)
        assert np.allclose(levels(plots.plot_spectrum(block)), 0.1 * np.trace(matrix) / 6)

    def test_what_is_not_positive_is_counted(self, rng):
        """On axes that are given, of an array, with a damping that is given."""
        x = rng.normal(size=(5, 2))
        singular = np.zeros((5, 5))
        singular[:2, :2] = x.T @ x
        _, given = plt.subplots()
        ax = plots.plot_spectrum(singular, damping=lambda: 0.25, ax=given)
        assert ax is given
        assert np.allclose(drawn(ax)[1], np.linalg.eigvalsh(x.T @ x)[::-1])
        assert levels(ax) == [0.25]
        assert ax.get_legend().get_texts()[0].get_text() == "5 eigenvalues, 3 not above 0"
        assert ax.get_ylabel() == "eigenvalue (in the units of the matrix)"

    def test_of_matrices_and_diagonal_factors(self, model, rng):
        matrix = model[0].estimator.matrix(0.5)
        ax = plots.plot_spectrum(matrix)
        expected = np.linalg.eigvalsh(np.asarray(matrix))[::-1]
        assert np.allclose(drawn(ax)[1], expected, rtol=1e-6)
        assert levels(ax) == []
        factor = kfac_xp.NaiveDiagonalFactor(np.ones((3, 2)), 4)
        factor.update_cov(params_grads=rng.normal(size=(3, 2)), batch_size=4, ema_decay=0.9)
        values = drawn(plots.plot_spectrum(factor))[1]
        assert np.allclose(values, np.sort(np.asarray(factor.cov).ravel())[::-1])

    def test_without_statistics(self):
        factor = kfac_xp.FullyConnectedKroneckerFactor(np.ones((4, 3)))
        with pytest.raises(RuntimeError, match="no covariance yet"):
            plots.plot_spectrum(factor)


class TestApproximations:
    def test_beside_the_exact_fisher(self, model):
        optimizer, params, net, _ = model
        products = kfac_xp.CurvatureMatrixVectorProductComputer(optimizer.layers, net)
        exact = products.matrix("fisher", like=params) / 40
        left, right = plots.plot_approximation(optimizer.estimator, exact)
        fisher = exact_fisher(net)
        one, two = (
            np.kron(*(np.asarray(f.cov) for f in block.factors.values()))
            for block in optimizer.estimator.blocks
        )
        blocks = np.zeros_like(fisher)
        blocks[:16, :16], blocks[16:, 16:] = one, two
        error = np.linalg.norm(blocks - fisher) / np.linalg.norm(fisher)
        assert left.get_title() == f"|approximation|, relative error {error:.3g}"
        assert right.get_title() == "|exact|"
        assert np.allclose(left.images[0].get_array(), np.abs(blocks))
        assert np.allclose(right.images[0].get_array(), np.abs(fisher))
        norms = [ax.images[0].norm for ax in (left, right)]
        largest = max(np.abs(blocks).max(), np.abs(fisher).max())
        assert [norm.vmax for norm in norms] == pytest.approx([largest] * 2)
        assert [norm.vmin for norm in norms] == pytest.approx([largest * 1e-6] * 2)
        assert left.get_ylabel() == left.get_xlabel() == "parameter (its number)"
        assert left.lines[0].get_ydata()[0] == 15.5  # between the layers
        bar = left.figure.axes[-1]
        assert bar.get_ylabel() == "size of the entry\n(squared gradient, mean over cases)"

    def test_on_given_axes(self, rng):
        _, given = plt.subplots(1, 2)
        matrix = rng.normal(size=(3, 3))
        left, _ = plots.plot_approximation(matrix, matrix, axes=given)
        assert left is given[0]
        assert left.get_title() == "|approximation|, relative error 0"
        assert len(left.lines) == 0

    def test_other_shapes(self):
        with pytest.raises(ValueError, match=r"got shapes \(2, 2\) and \(3, 3\)"):
            plots.plot_approximation(np.eye(2), np.eye(3))


def exact_fisher(net):
    """By loops over cases and classes, of gradients by hand."""
    p = np.exp(net.outputs)
    p = p / p.sum(axis=1, keepdims=True)
    total = 0.0
    for case, probabilities in enumerate(p):
        for k, probability in enumerate(probabilities):
            ds2 = probabilities - np.eye(len(probabilities))[k]
            ds1 = net.params["two"][0] @ ds2 * (1 - net.a1[case] ** 2)
            kernels = np.outer(net.x[case], ds1).ravel(), np.outer(net.a1[case], ds2).ravel()
            gradient = np.concatenate([kernels[0], ds1, kernels[1], ds2])
            total = total + probability * np.outer(gradient, gradient)
    return total / len(p)


class TestTraces:
    def test_of_what_was_reported(self, model):
        infos = model[3]
        assert infos[0].is_burnin
        axes = plots.plot_traces(infos)
        names = ("loss", "damping", "learning_rate", "rho")
        for ax, name in zip(axes, names, strict=True):
            steps = [i for i in infos[1:] if getattr(i, name) is not None]
            assert list(drawn(ax)[0]) == [i.step for i in steps]
            assert np.allclose(drawn(ax)[1], [float(getattr(i, name)) for i in steps])
            assert ax.get_ylabel() == plots.TRACES[name]
        assert len(drawn(axes[-1])[0]) == 4  # none before the first adaptation
        assert [ax.get_yscale() for ax in axes] == ["linear", "log", "linear", "linear"]
        assert axes[-1].get_xlabel() == "step (its number)"

    def test_of_what_is_asked_for(self, model):
        _, given = plt.subplots(2)
        axes = plots.plot_traces(model[3], ("update_norm", "clip"), axes=given)
        assert axes is given
        assert list(drawn(axes[1])[1]) == [1.0] * 5
        with pytest.raises(ValueError, match=r"`names` must be among .*; got 'speed'"):
            plots.plot_traces(model[3], ("speed",))
        with pytest.raises(ValueError, match=r"`axes` must be 1, for \['loss'\]; got 2"):
            plots.plot_traces(model[3], ("loss",), axes=given)

    def test_of_nothing(self, model):
        with pytest.raises(ValueError, match="steps that report something"):
            plots.plot_traces(model[3][:1])
        with pytest.raises(ValueError, match=r"steps that report \['rho'\]"):
            plots.plot_traces(model[3][:2], ("rho",))

    def test_every_trace_is_a_field(self):
        assert set(plots.TRACES) <= set(kfac_xp.StepInfo.__dataclass_fields__)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install \"kfac-xp\[plots\]\""):
        plots.plot_spectrum(np.eye(2))
