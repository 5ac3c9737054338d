"""Eigenvectors refined from the last ones: near those of NumPy, orthonormal, truly reported."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp import averages, refinement
from kfac_xp.backend import explain, use_backend
from kfac_xp.options import FactorOptions
from kfac_xp.representations import DampingKey, Dense, Request, ladder, refresh, solvers
from tests.cases import assert_close, to_numpy

DAMPING = 0.1
REFINE = {"eigh_method": "refinement"}


def drifting(rng, n=6, size=0.02, cases=60):
    """A covariance of a falling spectrum, and the same after some more cases."""
    scales = np.linspace(2, 0.3, n)
    x = rng.normal(size=(cases, n)) * scales
    y = rng.normal(size=(cases, n)) * scales
    first = x.T @ x / cases
    return first, (1 - size) * first + size * y.T @ y / cases


def vectors_of(cov):
    return np.linalg.eigh(cov)[1]


def off_diagonal(cov, values, vectors, damping=DAMPING):
    """What is left relative to damped eigenvalues, root mean square over rows, in float64."""
    cov, values, vectors = (np.asarray(to_numpy(x), np.float64) for x in (cov, values, vectors))
    scale = (values + damping) ** -0.5
    rest = (vectors.T @ cov @ vectors - np.diag(values)) * np.outer(scale, scale)
    return np.sqrt(np.sum(rest**2) / len(cov))


def assert_orthonormal(vectors, tolerance=1e-12):
    v = np.asarray(to_numpy(vectors), np.float64)
    assert_close(v.T @ v, np.eye(len(v)), tolerance)


class TestRefinedEigenvectors:
    @pytest.mark.more
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_each_step_squares_what_is_left(self, xp, rng, dtype):
        """To the eigenvectors of NumPy, and of each member of a stack alike."""
        pairs = [drifting(rng) for _ in range(2)]
        covs = xp.asarray(np.stack([new for _, new in pairs]), dtype=getattr(xp, dtype))
        basis = xp.asarray(np.stack([vectors_of(old) for old, _ in pairs]), dtype=covs.dtype)
        damping = xp.asarray([DAMPING, DAMPING], dtype=covs.dtype)
        one = refinement.refined_eigenvectors(covs[1, ...], basis[1, ...], DAMPING)
        left = [off_diagonal(new, np.diag(v.T @ new @ v), v) for v, new in before(pairs)]
        exact, floor = dtype == "float64", 1e-6 if dtype == "float64" else 3e-6
        for step in range(3):
            values, basis = refinement.refined_eigenvectors(covs, basis, damping)
            assert values.dtype == basis.dtype == covs.dtype
            if step == 0:
                for single, stacked in zip(one, (values, basis), strict=True):
                    assert_close(single, to_numpy(stacked)[1], 1e-12 if exact else 1e-5)
            arrays = (to_numpy(x) for x in (covs, values, basis))
            now = [off_diagonal(*x) for x in zip(*arrays, strict=True)]
            assert all(a < max(30 * b**2, floor) for a, b in zip(now, left, strict=True))
            left = now
        for (_, new), w, v in zip(pairs, to_numpy(values), to_numpy(basis), strict=True):
            assert_orthonormal(v, 1e-12 if exact else 1e-5)
            assert_close(np.sort(w), np.linalg.eigvalsh(new), 1e-9 if exact else 1e-5)

    @pytest.mark.parametrize("backend", ["reference", "numba"])
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("kind", ["clusters", "rank", "zero", "one row", "identity"])
    def test_degenerate_spectra(self, rng, kind, dtype, backend):
        """Whatever is repeated: orthonormal, and nothing left within a few updates."""
        n = {"one row": 1}.get(kind, 40)
        spectrum = {
            "clusters": np.repeat([5.0, 1.0, 0.1, 1e-3], 10),
            "rank": np.where(np.arange(n) < 5, 2.0 ** -np.arange(n), 0),
            "zero": np.zeros(n),
            "one row": np.full(n, 3.0),
            "identity": np.ones(n),
        }[kind]
        turn = np.linalg.qr(np.eye(n) + 0.05 * rng.normal(size=(n, n)) / n**0.5)[0]
        basis = vectors_of(rng.normal(size=(n, n)) + 0 * turn) if kind == "identity" else np.eye(n)
        basis = np.linalg.qr(basis)[0].astype(dtype)
        cov = ((turn * spectrum) @ turn.T).astype(dtype)
        tolerance = 1e-12 if dtype == "float64" else 2e-5
        for damping in (0.01, 0.0):
            v = basis
            with use_backend(backend):
                for _ in range(8):
                    w, v = refinement.refined_eigenvectors(cov, v, damping)
                    assert_orthonormal(v, tolerance)
            assert off_diagonal(cov, w, v, 0.01) < (1e-7 if dtype == "float64" else 1e-3)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_a_crowd_of_eigenvalues_does_not_fly_apart(self, rng, dtype):
        """Where all gaps are below what the batch adds to each, one step makes it no worse."""
        n = 60
        x = rng.normal(size=(20, n))
        cov = (np.diag(1 + 1e-6 * rng.normal(size=n)) + 0.05 * x.T @ x / 20).astype(dtype)
        start = np.eye(n, dtype=dtype)
        w, v = refinement.refined_eigenvectors(cov, start, DAMPING)
        assert_orthonormal(v, 1e-12 if dtype == "float64" else 1e-5)
        assert off_diagonal(cov, w, v) < off_diagonal(cov, np.diag(cov), start)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("n", [1, 2, 33, 130, 300])
    def test_kernel_matches_reference(self, rng, n, dtype):
        old, new = (x.astype(dtype) for x in drifting(rng, n, cases=400))
        basis, results = vectors_of(old), []
        assert explain(refinement.refined_eigenvectors, new, basis, 0.1).count("numba")
        for backend in ("reference", "numba"):
            kept = new.copy(), basis.copy()
            with use_backend(backend):
                results.append(refinement.refined_eigenvectors(new, basis, np.asarray(0.1, dtype)))
            assert np.array_equal(kept[0], new)
            assert np.array_equal(kept[1], basis)
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype == dtype
            assert_close(a, b, 1e-11 if dtype == "float64" else 1e-4)

    @pytest.mark.parametrize("backend", ["reference", "numba"])
    def test_what_is_not_finite_stays_so(self, backend):
        cov = np.eye(5)
        cov[2, 3] = cov[3, 2] = np.nan
        with use_backend(backend):
            w, v = refinement.refined_eigenvectors(cov, np.eye(5), 0.1)
        assert np.isnan(refinement.relative_residual(cov, w, v, 0.1))

    @pytest.mark.more
    def test_traces(self, rng):
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        jax.config.update("jax_enable_x64", True)
        old, new = drifting(rng)
        found = jax.jit(refinement.refined_eigenvectors)(new, vectors_of(old), 0.1)
        for a, b in zip(
            found, refinement.refined_eigenvectors(new, vectors_of(old), 0.1), strict=True
        ):
            assert_close(a, b, 1e-10)


def before(pairs):
    return [(vectors_of(old), new) for old, new in pairs]


class TestRelativeResidual:
    @pytest.mark.more
    def test_few_rows_exactly(self, xp, rng):
        old, new = drifting(rng)
        v = vectors_of(old)
        w = np.diag(v.T @ new @ v).copy()
        found = refinement.relative_residual(*(xp.asarray(x) for x in (new, w, v)), DAMPING)
        assert_close(found, off_diagonal(new, w, v), 1e-10)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("n", [9, 50, 300])
    def test_many_rows_nearly(self, rng, n, dtype):
        for size in (0.3, 0.01):
            old, new = (x.astype(dtype) for x in drifting(rng, n, size, 400))
            v = vectors_of(old)
            w = np.diag(v.T @ new @ v)
            found = refinement.relative_residual(new, w, v, DAMPING)
            assert found.dtype == dtype
            assert 0.75 < found / off_diagonal(new, w, v) < 1.33

    def test_knows_of_wrong_values_and_lost_orthonormality(self, rng):
        cov = drifting(rng, 30)[0]
        w, v = np.linalg.eigh(cov)
        assert refinement.relative_residual(cov, w, v, DAMPING) < 1e-13
        wrong = w * 1.1
        expected = off_diagonal(cov, wrong, v)
        assert 0.7 < refinement.relative_residual(cov, wrong, v, DAMPING) / expected < 1.4
        assert refinement.relative_residual(cov, w, 1.01 * v, DAMPING) > 0.02

    def test_without_damping(self):
        assert refinement.relative_residual(np.zeros((4, 4)), np.zeros(4), np.eye(4), 0.0) == 0
        cov = np.diag([1.0, 0.0, -1e-17])
        assert refinement.relative_residual(cov, np.diag(cov), np.eye(3), 0.0) < 1e-12


# ---------------------------------------------------------------------------------------------
# In an inverse update


def holder(xp, cov, kind="eigenbasis", exps=(0.0,), dampings=(DAMPING,), **options):
    """``(name, representation, average)`` that hold a covariance."""
    average = averages.MovingAverage(xp.zeros(cov.shape, dtype=xp.float64))
    rep = Dense(FactorOptions(**(REFINE | options)))
    for exp in exps:
        for damping in dampings:
            rep.register(Request(kind, exp, DampingKey(damping)))
    move(xp, average, cov)
    return "factor", rep, average


def move(xp, average, cov):
    average.update(xp.asarray(cov, dtype=average.total.dtype), decay=0.0)


def served(rep):
    """Values and vectors of the one basis."""
    (packed,) = (to_numpy(x) for x in rep.stored())
    return packed[-1], packed[:-1]


class TestRefresh:
    @pytest.mark.more
    def test_goes_on_from_the_last(self, xp, rng, monkeypatch):
        """In stacks, with dampings of their own that are arrays; the residual is the true one."""
        sizes, real = [], solvers.solve
        monkeypatch.setattr(
            ladder, "solve", lambda tasks: sizes.append((len(tasks), tasks[0].way)) or real(tasks)
        )
        pairs = [drifting(rng) for _ in range(3)]
        dampings = [0.1, xp.asarray(0.2, dtype=xp.float64), 0.3]
        items = [
            holder(xp, old, dampings=(d,)) for (old, _), d in zip(pairs, dampings, strict=True)
        ]
        refresh(items)
        assert {rep.decomposition.rung for _, rep, _ in items} == {"direct"}
        starts = [to_numpy(rep.basis) for _, rep, _ in items]
        for (_, _, average), (_, new) in zip(items, pairs, strict=True):
            move(xp, average, new)
        sizes.clear()
        refresh(items)
        assert sizes == ([(1, "refinement")] * 3 if xp is np else [(3, "refinement")])
        for (_, rep, _), (_, new), d, start in zip(items, pairs, dampings, starts, strict=True):
            assert rep.decomposition.rung == "warm"
            w, v = served(rep)
            alone = refinement.refined_eigenvectors(new, start, float(d))
            assert_close(w, alone[0], 1e-12)
            assert_close(v, alone[1], 1e-10)
            assert_orthonormal(v)
            assert_close(rep.decomposition.residual, off_diagonal(new, w, v, float(d)), 1e-6)
            assert rep.decomposition.residual < 1e-3
            assert_close((v * w) @ v.T, new, 1e-2)

    @pytest.mark.more
    def test_the_smallest_damping_counts(self, xp, rng):
        old, new = drifting(rng)
        arrays = [xp.asarray(d, dtype=xp.float64) for d in (0.3, 0.2)]
        for dampings in ((0.3, 0.05), (0.3, arrays[1]), (arrays[0], 0.4), tuple(arrays)):
            item = holder(xp, old, "matpower", (-1.0, -0.5), dampings)
            refresh([item])
            start = to_numpy(item[1].basis)
            move(xp, item[2], new)
            refresh([item])
            least = min(float(d) for d in dampings)
            alone = refinement.refined_eigenvectors(new, start, least)
            assert_close(item[1].basis, alone[1], 1e-10)

    def test_powers(self, xp, rng):
        old, new = drifting(rng)
        item = holder(xp, old, "matpower", (-1.0, -0.5), (0.1, 0.3))
        refresh([item])
        move(xp, item[2], new)
        refresh([item])
        assert item[1].decomposition.rung == "warm"
        w, v = np.linalg.eigh(new)
        expected = [(v * (w + d) ** e) @ v.T for e in (-1.0, -0.5) for d in (0.1, 0.3)]
        for found, power in zip(item[1].stored(), expected, strict=True):
            assert_close(found, power, 1e-3)

    def test_falls_back_from_a_useless_start(self, rng):
        old, other = drifting(rng)[0], drifting(rng)[0]
        turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        far = turn @ other @ turn.T
        for start in ("far", "not finite"):
            item = holder(np, old)
            refresh([item])
            if start == "far":
                move(np, item[2], far)
            else:
                item[1].basis = item[1].basis * np.nan
            refresh([item])
            assert item[1].decomposition.rung == "direct"
            w, v = served(item[1])
            assert_close((v * w) @ v.T, far if start == "far" else old, 1e-10)

    def test_a_basis_alone_may_be_less_exact(self, rng):
        """EKFAC measures what the basis misses; an inverse would have it in its numbers."""
        old, new = drifting(rng, size=0.6)
        rungs, residuals = [], []
        for kind, exp in (("eigenbasis", 0.0), ("matpower", -0.5), ("eigen", 0.0)):
            item = holder(np, old, kind, (exp,))
            refresh([item])
            move(np, item[2], new)
            refresh([item])
            rungs.append(item[1].decomposition.rung)
            residuals.append(item[1].decomposition.residual)
        assert rungs == ["warm", "direct", "direct"]
        assert 1e-2 < residuals[0] < 1e-1

    @pytest.mark.parametrize("cov", [np.zeros((3, 3)), np.diag([2.0, 0.0, 0.0]), np.ones((1, 1))])
    def test_degenerate_covariances_stay_warm(self, cov):
        for damping in (DAMPING, 0.0):
            item = holder(np, cov, dampings=(damping,))
            refresh([item])
            refresh([item])
            assert item[1].decomposition.rung == "warm"
            assert item[1].decomposition.residual < 1e-12

    def test_is_saved_to_the_bit(self, rng, tmp_path):
        """EKFAC goes on from the saved bases; without them it would from others."""
        scales = np.linspace(2, 0.3, 20)
        batches = [(rng.normal(size=(60, 20)) * scales, rng.normal(size=(60, 12))) for _ in "abc"]

        def make():
            layers = kfac_xp.LayerCollection(**REFINE)
            layers.register_fully_connected("fc", np.zeros((20, 12)), approx="ekfac")
            return kfac_xp.FisherEstimator(layers, 0.1)

        def update(estimator, batch, weight):
            estimator.update_cov({"fc": batch}, ema_decay=1 - weight, ema_weight=weight)
            estimator.update_inverses()

        ends = []
        for interrupted in (False, True):
            estimator = make()
            update(estimator, batches[0], 1.0)
            update(estimator, batches[1], 0.02)
            if interrupted:
                kfac_xp.save_state(tmp_path / "state.npz", estimator.state_dict())
                estimator = make()
                estimator.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"))
            update(estimator, batches[2], 0.02)
            assert {estimator.info["fc"][role]["rung"] for role in ("input", "output")} == {"warm"}
            ends.append(estimator.get_inv_vars())
        assert len(ends[0]) == 2
        for a, b in zip(*ends, strict=True):
            assert np.array_equal(a, b)
