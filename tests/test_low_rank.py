"""Low rank plus a diagonal: operator, moments and average, against dense matrices in float64."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp import low_rank_moments
from kfac_xp.operators import DiagonalPlusLowRank, LayerSpace
from kfac_xp.outer_products import LowRankAverage, OuterProducts
from tests import naive
from tests.cases import assert_close, to_numpy
from tests.curvature import require_operations
from tests.low_rank_truth import RANK, leading, second_moment
from tests.test_ekfac import conv_case_grads, dense_case_grads
from tests.test_fisher_blocks import draw

# ---------------------------------------------------------------------------------------------
# The operator


def drawn_operator(xp, rng, n=7, r=2, scale=1.5):
    entries, columns = rng.uniform(0.5, 1.5, size=n), rng.normal(size=(n, r))
    dense = np.diag(entries) + float(scale) * columns @ columns.T
    return DiagonalPlusLowRank(xp.asarray(entries), xp.asarray(columns), scale), dense


class TestOperator:
    @pytest.mark.more
    @pytest.mark.parametrize(("n", "r"), [(7, 2), (3, 3), (2, 1)])
    def test_every_operation(self, xp, rng, n, r):
        operator, dense = drawn_operator(xp, rng, n, r)
        matrix = kfac_xp.CurvatureMatrix(operator, LayerSpace([(n,)]))
        require_operations(matrix, dense, xp, rng)

    @pytest.mark.more
    @pytest.mark.parametrize("is_array", [False, True], ids=["float", "array"])
    def test_the_inverse_is_of_the_same_form(self, xp, rng, is_array):
        scale = xp.asarray(1.5, dtype=xp.float64) if is_array else 1.5
        operator, dense = drawn_operator(xp, rng, scale=scale)
        inverse, there = operator.power(-1.0), np.linalg.inv(dense)
        assert isinstance(inverse, DiagonalPlusLowRank)
        assert inverse.columns.shape == (7, 2)
        x = rng.normal(size=7)
        assert_close(inverse @ xp.asarray(x), there @ x, 1e-13)
        assert_close(inverse.power(-1.0).to_dense(), dense, 1e-12)
        assert_close(inverse.logdet(), -np.linalg.slogdet(dense)[1], 1e-12)
        moved = (there + 0.5 * np.eye(7)) * 2
        shifted = inverse.plus_identity(0.5).scaled(2.0)
        assert_close(shifted.power(-1.0).to_dense(), np.linalg.inv(moved), 1e-12)
        assert_close(shifted.frobenius_norm(), np.linalg.norm(moved), 1e-12)
        for op, full in ((inverse, there), (shifted, moved)):
            for exp in (0.5, -0.5):
                root = op.root(exp).to_dense()
                image = root @ xp.matrix_transpose(root)
                assert_close(image, np.linalg.matrix_power(full, int(2 * exp)), 1e-12)

    @pytest.mark.more
    def test_the_root_as_a_matrix(self, xp, rng):
        root = drawn_operator(xp, rng)[0].root(0.5)
        dense = to_numpy(root.to_dense())
        assert np.abs(dense - dense.T).max() > 1e-3
        x = rng.normal(size=(7, 3))
        assert_close(root.T @ xp.asarray(x), dense.T @ x, 1e-14)
        assert_close(root.matmul_right(xp.asarray(x.T.copy())), x.T @ dense, 1e-14)
        assert_close(root.diagonal(), np.diag(dense), 1e-14)
        assert_close(root.trace(), np.trace(dense), 1e-14)

    @pytest.mark.parametrize("scale", [-2.0, np.asarray(-2.0)], ids=["float", "array"])
    def test_the_sign_of_the_smallest_eigenvalue(self, rng, scale):
        """Of a difference, which need not be positive definite."""
        columns = rng.normal(size=(6, 2))
        largest = 2 * np.linalg.eigvalsh(columns.T @ columns)[-1]
        for shift, sign in ((1.01 * largest, 1), (0.99 * largest, -1), (-1.0, -1)):
            operator = DiagonalPlusLowRank(np.full(6, shift), columns, scale)
            assert np.sign(operator.smallest_eigenvalue()) == sign, shift
        matrix = kfac_xp.CurvatureMatrix(operator, LayerSpace([(6,)]))
        with pytest.raises(np.linalg.LinAlgError, match="needs a positive definite matrix"):
            matrix.solve(np.ones(6))

    def test_zeros_on_the_diagonal(self, rng):
        """The matrix is singular to those who invert it; draws of power 1/2 are of it."""
        columns = rng.normal(size=(6, 2))
        entries = np.asarray([0.0, 0.0, 0.0, 0.5, 1.0, 2.0])
        matrix = kfac_xp.CurvatureMatrix(DiagonalPlusLowRank(entries, columns), LayerSpace([(6,)]))
        dense = np.diag(entries) + columns @ columns.T
        for operation in (matrix.inv, matrix.logdet):
            with pytest.raises(np.linalg.LinAlgError, match=r"smallest eigenvalue .* is 0\."):
                operation()
        root = matrix.operator.root(0.5).to_dense()
        assert_close(root @ root.T, dense, 1e-14)
        assert_close(matrix.matpower(2).to_dense(), dense @ dense, 1e-13)

    @pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-10])
    def test_small_damping(self, rng, damping):
        """Orthonormal columns, of which everything is known in closed form."""
        n, sizes = 60, np.asarray([1e3, 30.0, 1.0, 1e-3])
        q = np.linalg.qr(rng.normal(size=(n, 4)))[0]
        matrix = DiagonalPlusLowRank(np.full(n, damping), q * sizes**0.5)
        x = rng.normal(size=n)
        inside = q @ (q.T @ x / (sizes + damping))
        outside = (x - q @ (q.T @ x)) / damping
        found = matrix.power(-1.0) @ x
        assert_close(found, inside + outside, 1e-14)
        # What the large eigenvalues leave is right up to the rounding of what they take away.
        assert np.abs(q.T @ (found - inside)).max() < 1e-14 / damping
        determinant = np.log(sizes + damping).sum() + (n - 4) * np.log(damping)
        assert_close(matrix.logdet(), determinant, 1e-14)

    def test_sizes_of_many_orders_in_float32(self, rng):
        """Those of a Gram matrix would be rounding below the seventh order."""
        sizes = np.asarray([1e6, 1e2, 1e-2])
        entries = np.exp(rng.normal(size=200)).astype(np.float32)
        columns = (rng.normal(size=(200, 3)) * sizes**0.5).astype(np.float32)
        matrix = DiagonalPlusLowRank(entries, columns)
        exact = columns.astype(float) / entries.astype(float)[:, None] ** 0.5
        w = np.linalg.svd(exact, compute_uv=False) ** 2
        assert_close(matrix.whitened().values / w, np.ones(3), 1e-3)

    def test_nothing_of_the_size_of_the_matrix(self, rng):
        """A dense matrix of this size would have 300 GB; powers that need it are refused."""
        operator = DiagonalPlusLowRank(np.full(200_000, 0.5), rng.normal(size=(200_000, 2)))
        matrix = kfac_xp.CurvatureMatrix(operator, LayerSpace([(200_000,)]))
        x = rng.normal(size=200_000)
        assert_close(matrix @ matrix.solve(x), x, 1e-10)
        assert_close(matrix.norm() ** 2, matrix.operator.power(1.0).frobenius_norm() ** 2, 1e-12)
        assert np.isfinite(matrix.logdet())
        assert np.isfinite(matrix.sample(generator=0)).all()
        for operation in (matrix.eigvalsh, lambda: matrix.matpower(0.5)):
            with pytest.raises(
                NotImplementedError, match=r"with 200000 parameters .*\(limit 4096\).* `solve`"
            ):
                operation()


# ---------------------------------------------------------------------------------------------
# Moments


def require_moment(moment, case_grads, limit):
    """The leading part that is kept, and the whole diagonal."""
    exact = second_moment(case_grads)
    columns = to_numpy(moment.columns)
    assert columns.shape[1] <= limit
    assert_close(columns @ columns.T, leading(exact, limit), 1e-10)
    assert_close(moment.diagonal, np.diag(exact), 1e-12)


@pytest.mark.more
@pytest.mark.parametrize("n", [4, 40], ids=["few cases", "many cases"])
def test_dense_moment(xp, rng, n):
    inputs, grads = draw(xp, rng, n, 7), draw(xp, rng, n, 4)
    moment = low_rank_moments.FullyConnectedLowRankMoment(7, 4, True, RANK)
    assert moment.shape == (32, RANK + 1)
    cases = [g.ravel() for g in dense_case_grads(inputs, grads)]
    require_moment(moment(inputs, grads), cases, 2 * RANK + 10)


@pytest.mark.more
@pytest.mark.parametrize(("strides", "n"), [((2, 1), 3), ((1, 1), 30)])
def test_convolution_moment(xp, rng, strides, n):
    inputs = draw(xp, rng, n, 4, 3, 2)
    geometry = kfac_xp.ConvGeometry.create((2, 2), strides, "SAME", (1, 1))
    grads = draw(xp, rng, n, *geometry.output_shape((4, 3)), 3)
    moment = low_rank_moments.ConvLowRankMoment(geometry, 2, 3, True, 1, RANK)
    pads = naive.same_pads((4, 3), (2, 2), strides, (1, 1))
    cases = [g.ravel() for g in conv_case_grads(inputs, grads, (2, 2), strides, pads)]
    require_moment(moment(inputs, grads), cases, 2 * RANK + 10)


def test_parts_of_a_batch(rng, monkeypatch):
    """Each sum keeps its leading columns; the diagonal is exact, and so is all of low rank."""
    monkeypatch.setattr(low_rank_moments, "CHUNK_CASES", 10)
    inputs, grads = rng.normal(size=(70, 7)), rng.normal(size=(70, 4))
    moment = low_rank_moments.FullyConnectedLowRankMoment(7, 4, False, RANK)
    kept, exact = 0.0, 0.0
    limit = 2 * RANK + 10
    for start in range(0, 70, limit):
        rows = [np.outer(a, g).ravel() for a, g in zip(inputs, grads, strict=True)]
        part = second_moment(rows[start : start + limit], 70)
        kept, exact = leading(kept + leading(part, limit), limit), exact + part
    found = moment(inputs, grads)
    assert_close(found.columns @ found.columns.T, kept, 1e-10)
    assert_close(found.diagonal, np.diag(exact), 1e-12)
    repeated = moment(np.tile(inputs[:5], (14, 1)), np.tile(grads[:5], (14, 1)))
    assert_close(repeated.columns @ repeated.columns.T, second_moment(rows[:5]), 1e-12)
    monkeypatch.setattr(low_rank_moments, "CHUNK_ELEMENTS", 10)
    geometry = kfac_xp.ConvGeometry.create((1,), (1,), "VALID", (1,))
    conv = low_rank_moments.ConvLowRankMoment(geometry, 7, 4, False, 1, RANK)
    same = conv(inputs[:, None, :], grads[:, None, :])
    assert_close(same.columns @ same.columns.T, kept, 1e-10)
    assert_close(same.diagonal, np.diag(exact), 1e-12)


def test_sums_and_multiples(rng):
    parts = [OuterProducts(g, np.sum(g * g, axis=1), 4) for g in rng.normal(size=(2, 9, 3))]
    total = (parts[0] + parts[1]) / 2
    exact = sum(p.columns @ p.columns.T for p in parts) / 2
    assert_close(total.columns @ total.columns.T, leading(exact, 4), 1e-12)
    assert_close(total.diagonal, np.diag(exact), 1e-14)


# ---------------------------------------------------------------------------------------------
# The average


class TestAverage:
    def batches(self, rng, count=5, n=12, cases=8):
        return rng.normal(size=(count, n, cases)) * np.geomspace(1, 0.1, n)[:, None]

    @pytest.mark.more
    @pytest.mark.parametrize("zero_debias", [True, False])
    def test_a_recursion_of_dense_matrices(self, xp, rng, zero_debias):
        start = xp.concat([xp.zeros((12, RANK)), xp.ones((12, 1))], axis=1)
        average = LowRankAverage(xp.astype(start, xp.float64), zero_debias=zero_debias)
        part, diagonal, weight = np.zeros((12, 12)), np.ones(12), 0.0
        for g, decay in zip(self.batches(rng), (0.9, 0.5, 0.0, 0.8, 0.95), strict=True):
            new = OuterProducts(xp.asarray(g), xp.asarray(np.sum(g * g, axis=1)), 8)
            average.update(new, decay=decay)
            own = 1.0 if zero_debias else 1 - decay
            part = leading(decay * part + own * g @ g.T, RANK)
            diagonal = decay * diagonal + own * np.sum(g * g, axis=1)
            weight = decay * weight + own
            unit = weight if zero_debias else 1.0
            value = to_numpy(average.value)
            assert_close(value[:, :-1] @ value[:, :-1].T, part / unit, 1e-10)
            assert_close(value[:, -1], diagonal / unit, 1e-12)

    def test_restarts_and_functions(self, rng):
        value = rng.uniform(0.5, 1.5, size=(12, 4))
        average = LowRankAverage(np.zeros((12, 4)))
        average.restart(value, 3.0, 2)
        assert_close(average.value, value, 1e-15)
        assert_close(average.total[:, -1], 3 * value[:, -1], 1e-15)
        assert_close(average.total[:, 0], 3**0.5 * value[:, 0], 1e-15)
        with pytest.raises(NotImplementedError, match="keeps roots"):
            average.transform(lambda x: 2 * x)

    def test_weights_have_roots(self, rng):
        new = OuterProducts(rng.normal(size=(12, 2)), np.ones(12), 16)
        average = LowRankAverage(np.zeros((12, 4)))
        with pytest.raises(ValueError, match="`weight` of an average of low rank must not be neg"):
            average.update(new, decay=0.9, weight=-1.0)
        assert average.num_updates == 0
