"""Curvature as matrices: every operation against the dense matrix of the definitions."""

import sys

import numpy as np
import pytest

import kfac_xp
from kfac_xp.operators import LayerSpace
from tests.cases import assert_close, to_numpy
from tests.curvature import (
    SPECTRAL,
    Fixed,
    blocks,
    dense_block,
    power_of,
    require_operations,
)
from tests.models import TanhNet


def test_operations_in_every_library(xp, rng):
    """A few of those below, which would compile for long on JAX."""
    block = blocks(xp, rng)["kron"]()
    matrix, dense = block.matrix(0.1, "exact"), dense_block(block, 0.1, "exact")
    x = rng.normal(size=8)
    assert_close(matrix @ xp.asarray(x), dense @ x, 1e-10)
    assert_close(matrix.solve(xp.asarray(x)), np.linalg.solve(dense, x), 1e-9)
    assert_close(matrix.logdet(), np.linalg.slogdet(dense)[1], 1e-9)
    draw = matrix.flatten(matrix.sample(generator=Fixed(xp.asarray(x))))
    assert_close(draw, power_of(dense, -0.5) @ x, 1e-9)


@pytest.mark.more
@pytest.mark.parametrize("split", ["pi", "exact"])
@pytest.mark.parametrize("kind", SPECTRAL)
def test_operations_are_those_of_the_dense_matrix(xp, rng, kind, split):
    block = blocks(xp, rng)[kind]()
    assert_close(block.matrix().to_dense(), dense_block(block), 1e-12)
    matrix = block.matrix(0.1, split)
    require_operations(matrix, dense_block(block, 0.1, split), xp, rng)
    assert matrix.dtype == xp.float64


@pytest.mark.more
@pytest.mark.parametrize("kind", SPECTRAL)
def test_pi_is_what_the_block_multiplies_by(xp, rng, kind):
    block = blocks(xp, rng)[kind]()
    for exp in (-1, 0.5):
        if exp == -1 or "sua" not in kind:
            block.register_matpower(exp)
    block.update_inverses()
    matrix = block.matrix(0.1)
    vector = matrix.unflatten(xp.asarray(rng.normal(size=matrix.shape[0])))
    assert_close(
        matrix.flatten(block.multiply(vector)), to_numpy(matrix.flatten(matrix @ vector)), 1e-10
    )
    if kind != "depthwise":  # its inverse is the restriction of an inverse
        inverse = matrix.flatten(block.multiply_inverse(vector))
        assert_close(inverse, to_numpy(matrix.flatten(matrix.solve(vector))), 1e-9)


@pytest.mark.more
def test_a_chain_of_uses(xp, rng):
    """Its inverse is known; of option 1 the matrix, too."""
    for option in (1, 2):
        block = blocks(xp, rng)[f"series_{option}"]()
        block.register_matpower(-1)
        block.update_inverses()
        matrix = block.matrix(0.1)
        n = matrix.shape[0]
        eye = np.eye(n)
        inverse = np.stack(
            [to_numpy(block.multiply_inverse(xp.asarray(e.reshape(3, 2)))).ravel() for e in eye]
        )
        x = rng.normal(size=(n, 2))
        assert_close(matrix.solve(xp.asarray(x)), inverse @ x, 1e-10)
        assert_close(matrix.inv().to_dense(), inverse, 1e-10)
        z = xp.asarray(eye)
        root = to_numpy(
            matrix.flatten(matrix.sample(generator=Fixed(z), num_samples=n), batched=True)
        )
        assert_close(root.T @ root, inverse, 1e-10)
        if option == 2:
            with pytest.raises(NotImplementedError, match=r"no product in closed form.*`solve`"):
                matrix @ z
            with pytest.raises(NotImplementedError, match=r"no draws of power 0\.5"):
                matrix.sample(0.5, generator=0)
            continue
        dense = np.linalg.inv(inverse)
        assert_close(matrix @ z, dense, 1e-8)
        assert_close(matrix.logdet(), np.linalg.slogdet(dense)[1], 1e-9)
        assert_close(matrix.inv().logdet(), -np.linalg.slogdet(dense)[1], 1e-9)
        assert_close(matrix.trace(), np.trace(dense), 1e-8)
        assert_close(matrix.inv().diagonal(), np.diagonal(inverse), 1e-9)
        with pytest.raises(NotImplementedError, match=r"no eigenvalues.*kron_indep"):
            matrix.eigvalsh()
        with pytest.raises(NotImplementedError, match=r"cannot be damped exactly.*kron_indep"):
            block.matrix(0.1, "exact")


def two_layers(xp, rng, **options):
    layers = kfac_xp.LayerCollection(**options)
    kernel = (xp.zeros((3, 2), dtype=xp.float64), xp.zeros((2,), dtype=xp.float64))
    layers.register_fully_connected("fc", kernel)
    layers.register_conv2d(
        "conv",
        xp.zeros((2, 1, 2, 3), dtype=xp.float64),
        strides=(1, 1),
        padding="SAME",
        approx="diagonal",
    )
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    statistics = {
        "fc": (xp.asarray(rng.normal(size=(6, 3))), xp.asarray(rng.normal(size=(6, 2)))),
        "conv": (
            xp.asarray(rng.normal(size=(6, 3, 4, 2))),
            xp.asarray(rng.normal(size=(6, 3, 4, 3))),
        ),
    }
    estimator.update_cov(statistics)
    estimator.update_inverses()
    return estimator


@pytest.mark.more
def test_the_matrix_of_an_estimator(xp, rng):
    estimator = two_layers(xp, rng)
    dense = np.zeros((20, 20))
    fc, conv = estimator.blocks
    dense[:8, :8], dense[8:, 8:] = dense_block(fc, 0.1), dense_block(conv, 0.1)
    matrix = estimator.matrix(0.1)
    require_operations(matrix, dense, xp, rng)
    vectors = {
        "conv": xp.asarray(rng.normal(size=(2, 1, 2, 3))),
        "fc": (xp.ones((3, 2), dtype=xp.float64), xp.ones((2,), dtype=xp.float32)),
    }
    flat = to_numpy(matrix.flatten(vectors))
    assert_close(flat[:8], np.ones(8), 0.0)
    expected, result = estimator.multiply_inverse(vectors), matrix.solve(vectors)
    assert list(result) == ["fc", "conv"]
    assert_close(result["conv"], to_numpy(expected["conv"]), 1e-10)
    assert_close(result["fc"][0], to_numpy(expected["fc"][0]), 1e-10)
    assert_close(result["fc"][1], to_numpy(expected["fc"][1]), 1e-6)
    assert [a.dtype for a in result["fc"]] == [xp.float64, xp.float32]
    with pytest.raises(ValueError, match=r"a dict over the layers \['fc', 'conv'\]; got \['fc'\]"):
        matrix @ {"fc": vectors["fc"]}
    with pytest.raises(ValueError, match=r"`x\['conv'\]` must be an array of shape"):
        matrix @ {"fc": vectors["fc"], "conv": xp.zeros((2, 1))}


class TestForms:
    """Vectors in the shapes of parameters, flat, and batches of either."""

    @pytest.fixture
    def matrix(self, rng):
        return blocks(np, rng)["kron"]().matrix(0.1)

    def test_every_form_is_the_same_vector(self, matrix, rng):
        x = rng.normal(size=(5, 8))
        kernels, biases = x[:, :6].reshape(5, 3, 2), x[:, 6:]
        dense = matrix.to_dense()
        kernel, bias = matrix @ (kernels[0], biases[0])
        assert_close(np.append(kernel, bias), dense @ x[0], 1e-13)
        kernel, bias = (kernels[0], biases[0]) @ matrix
        assert_close(np.append(kernel, bias), dense @ x[0], 1e-13)
        kernel, bias = matrix.matmul((kernels, biases), batched=True)
        assert kernel.shape == (5, 3, 2)
        assert_close(np.concatenate([kernel.reshape(5, 6), bias], axis=1), x @ dense, 1e-13)
        kernel, bias = matrix.solve((kernels, biases), batched=True)
        assert_close(np.concatenate([kernel.reshape(5, 6), bias], axis=1) @ dense, x, 1e-11)
        assert_close(matrix.flatten((kernels, biases), batched=True), x, 0.0)
        assert_close(matrix.unflatten(x)[0], kernels, 0.0)
        draws = matrix.sample(generator=7, num_samples=4)
        assert [a.shape for a in draws] == [(4, 3, 2), (4, 2)]
        again = matrix.sample(generator=np.random.default_rng(7))
        assert_close(again[0], draws[0][0], 1e-12)

    def test_a_kernel_may_look_like_a_batch(self, rng):
        """Of one layer [n, 1] both readings are the same; others have different sizes."""
        x, ds = rng.normal(size=(6, 4)), rng.normal(size=(6, 1))
        block = kfac_xp.FullyConnectedKFACBasicFB(None)
        block.register_additional_tower(x, ds)
        block.instantiate_factors([[ds]], 0.1)
        block.update_cov(inputs=x, outputs_grads=ds, ema_decay=0.9)
        matrix = block.matrix(0.1)
        v = rng.normal(size=(4, 1))
        assert_close((matrix @ v)[:, 0], matrix @ v[:, 0], 1e-14)

    def test_dtypes_are_those_of_the_vectors(self, matrix, rng):
        x = rng.normal(size=8)
        single = matrix @ x.astype(np.float32)
        assert single.dtype == np.float32
        assert_close(single, matrix @ x, 1e-6)
        assert_close(matrix @ np.arange(8), matrix @ np.arange(8.0), 0.0)
        kernel, _ = matrix @ (np.ones((3, 2), int), np.ones(2, int))
        assert_close(kernel, (matrix @ np.ones(8))[:6].reshape(3, 2), 1e-14)
        kernel, _ = matrix @ (np.ones((3, 2), np.float32), np.ones(2, np.float32))
        assert kernel.dtype == np.float32

    def test_shapes_of_a_scale_are_the_users(self, rng):
        block = blocks(np, rng)["full"]()
        matrix = block.matrix(0.1)
        v = rng.normal(size=9)
        scale, shift = matrix @ (v[:3].reshape(1, 3), v[3:].reshape(2, 3))
        assert scale.shape == (1, 3)
        assert_close(np.append(scale, shift), matrix @ v, 1e-13)

    def test_what_is_no_vector(self, matrix):
        for bad in (
            np.ones(7),
            np.ones((2, 8)),
            (np.ones((3, 2)),),
            (np.ones((2, 3)), np.ones(2)),
            1.0,
        ):
            with pytest.raises(
                ValueError, match=r"a tuple of arrays of shapes \[3, 2\], \[2\].*\[8, k\]"
            ):
                matrix @ bad
        with pytest.raises(ValueError, match=r"or flat of shape \[8\] or \[k, 8\]"):
            np.ones((8, 2)) @ matrix
        with pytest.raises(ValueError, match=r"shapes \[k, 3, 2\], \[k, 2\]"):
            matrix.matmul((np.ones((3, 2)), np.ones(2)), batched=True)
        with pytest.raises(TypeError, match="`x` is `IndexedSlices`"):
            matrix @ kfac_xp.IndexedSlices(np.ones((1, 2)), np.zeros(1, int), (3, 2))
        with pytest.raises(ValueError, match=r"`flat` must have shape \[8\]"):
            matrix.unflatten(np.ones(7))
        for bad in (np.ones(2), "2", matrix):
            with pytest.raises(TypeError):
                bad * matrix

    def test_other_libraries_and_devices(self, matrix):
        strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
        with pytest.raises(TypeError, match="must all belong to one array library"):
            matrix @ strict.ones(8)
        with pytest.raises(TypeError, match="must all belong to one array library"):
            matrix @ (strict.ones((3, 2)), strict.ones(2))
        there = kfac_xp.CurvatureMatrix(
            kfac_xp.Diag(strict.ones(8, device=strict.Device("device1"))), matrix.space
        )
        with pytest.raises(
            ValueError, match=r"`matrix` on .*device1.*`vector\[0\]` on .*CPU_DEVICE"
        ):
            there @ strict.ones(8)

    def test_scipy(self, matrix, rng):
        pytest.importorskip("scipy", reason="SciPy is not installed")
        x = rng.normal(size=(8, 2))
        view = matrix.to_scipy()
        assert_close(view @ x, matrix @ x, 1e-14)
        assert_close(view.rmatvec(x[:, 0]), matrix @ x[:, 0], 1e-14)
        assert view.dtype == np.float64
        assert_close(np.asarray(matrix), matrix.to_dense(), 0.0)

    def test_scipy_absent(self, matrix, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
        with pytest.raises(ImportError, match=r"needs SciPy, .*kfac-xp\[scipy\]"):
            matrix.to_scipy()


class TestIndefinite:
    def test_the_smallest_eigenvalue_is_named(self, rng):
        estimator = two_layers(np, np.random.default_rng(0))
        x = np.ones((4, 3))  # of rank 1
        estimator.update_cov(
            {"fc": (x, x[:, :2]), "conv": (np.ones((4, 3, 4, 2)), np.ones((4, 3, 4, 3)))},
            ema_decay=0.0,
        )
        matrix = estimator.matrix()
        for operation in (matrix.logdet, matrix.inv, lambda: matrix.sample(generator=0)):
            with pytest.raises(
                np.linalg.LinAlgError,
                match=r"positive definite .*eigenvalue of .*'fc' is 0\. Use a pos",
            ):
                operation()
        assert_close(matrix.matpower(0.5).matpower(2).to_dense(), matrix.to_dense(), 1e-7)
        lowered = estimator.blocks[0].matrix().plus_identity(-0.25)
        with pytest.raises(np.linalg.LinAlgError, match=r"semidefinite .*of the matrix is -0\.25"):
            lowered.matpower(0.5)
        assert float(lowered.matpower(2).eigvalsh()[0]) > 0

    def test_a_matrix_of_rounding_is_singular(self, rng):
        x = rng.normal(size=(3, 8)).astype(np.float32)
        space = LayerSpace([(8,)])
        matrix = kfac_xp.CurvatureMatrix(kfac_xp.FullMatrix(x.T @ x), space)
        assert np.sum(matrix.eigvalsh() == 0) == 5
        with pytest.raises(np.linalg.LinAlgError, match="smallest eigenvalue of the matrix is 0"):
            matrix.inv()
        assert matrix.plus_identity(1e-3).solve(x[0]).dtype == np.float32

    def test_arguments(self, rng):
        block = blocks(np, rng)["kron"]()
        with pytest.raises(ValueError, match=r"`split` must be one of \('pi', 'exact'\)"):
            block.matrix(0.1, "both")
        with pytest.raises(ValueError, match="`damping` must be finite and not negative"):
            block.matrix(-0.1)
        with pytest.raises(ValueError, match="`ord` must be 'fro'"):
            block.matrix().norm(2)
        with pytest.raises(ValueError, match="`num_probes` must be a positive int"):
            block.matrix().estimate_trace(0, 1)
        with pytest.raises(RuntimeError, match="has no factors yet"):
            kfac_xp.FullyConnectedKFACBasicFB(None).matrix()


@pytest.mark.more
def test_decompositions_in_float64(xp, rng):
    """Of statistics in float32, where asked for."""
    made = blocks(xp, rng)["kron"](dtype=xp.float32, decomposition_dtype=xp.float64)
    matrix = made.matrix(0.1, "exact")
    assert matrix.dtype == xp.float64
    dense = dense_block(made, 0.1, "exact")
    assert_close(matrix.logdet(), np.linalg.slogdet(dense)[1], 1e-13)
    assert blocks(xp, rng)["kron"](dtype=xp.float32).matrix().dtype == xp.float32


def test_exact_products_share_the_interface(rng):
    params = {
        "one": (rng.normal(size=(3, 4)), rng.normal(size=4)),
        "two": (rng.normal(size=(4, 2)), rng.normal(size=2)),
    }
    layers = kfac_xp.LayerCollection()
    for name, layer in params.items():
        layers.register_fully_connected(name, layer)
    layers.register_normal_predictive_distribution("out")
    net, targets = TanhNet(params, rng.normal(size=(5, 3))), rng.normal(size=(5, 2))
    computer = kfac_xp.CurvatureMatrixVectorProductComputer(layers, net, targets)
    for which in ("fisher", "ggn", "hessian"):
        matrix = computer.matrix(which, 0.25, like=params)
        multiply = getattr(computer, f"multiply_{which}")
        eye = np.eye(26)
        columns = [multiply(kfac_xp.flat_to_vectors(params, e)) for e in eye]
        dense = np.stack([kfac_xp.vectors_to_flat(c) for c in columns]) + 0.25 * eye
        x = rng.normal(size=(26, 2))
        assert_close(matrix @ x, dense @ x, 1e-12)
        assert_close(matrix @ x[:, 0], dense @ x[:, 0], 1e-12)
        assert_close(x.T @ matrix, x.T @ dense, 1e-12)
        assert_close(matrix.flatten(matrix @ params), dense @ matrix.flatten(params), 1e-12)
        assert_close(matrix.to_dense(), dense, 1e-12)
        assert_close(matrix.to_scipy() @ x, dense @ x, 1e-12)
        assert_close((matrix / 5) @ x, dense @ x / 5, 1e-12)
    estimates = matrix.estimate_trace(2000, 0)
    assert_close(estimates, np.trace(dense), 0.1)
    for operation in (
        matrix.trace,
        matrix.diagonal,
        matrix.logdet,
        matrix.inv,
        matrix.eigvalsh,
        matrix.norm,
        lambda: matrix.sample(0.5, generator=0),
        lambda: matrix.solve(x),
    ):
        with pytest.raises(
            NotImplementedError, match=r"the exact hessian is known by its products .*`to_scipy"
        ):
            operation()
    with pytest.raises(ValueError, match="`which` must be one of"):
        computer.matrix("jacobian", like=params)
    with pytest.raises(ValueError, match=r"exactly .*missing: \['two'\]"):
        computer.matrix(like={"one": params["one"]})
