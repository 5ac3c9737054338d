"""Decompositions in stacks, and those that start from the last ones: right, reported, refused."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp import averages, iterations, linalg
from kfac_xp.changes import make
from kfac_xp.options import FactorOptions
from kfac_xp.representations import DampingKey, Dense, Request, ladder, refresh, solvers
from kfac_xp.state import Saved
from tests.cases import assert_close, to_numpy

DAMPING = 0.1


def second_moment(rng, n=6, cases=40):
    x = rng.normal(size=(cases, n)) * np.linspace(0.3, 2, n)
    return x.T @ x / cases


def factor_of(xp, cov, dtype="float64", exps=(-1.0,), **options):
    """``(representation, average)`` that hold a covariance."""
    average = averages.MovingAverage(xp.zeros(cov.shape, dtype=getattr(xp, dtype)))
    rep = Dense(FactorOptions(**options))
    for exp in exps:
        rep.register(Request("matpower", exp, DampingKey(DAMPING)))
    move(xp, average, cov)
    return rep, average


def move(xp, average, cov):
    average.update(xp.asarray(cov, dtype=average.total.dtype), decay=0.0)


def refresh_all(*pairs):
    refresh([(f"factor {i}", rep, average) for i, (rep, average) in enumerate(pairs)])


def power(cov, exp=-1.0):
    """In float64, by NumPy."""
    w, v = np.linalg.eigh(cov)
    return (v * (w + DAMPING) ** exp) @ v.T


def stored(rep):
    return [to_numpy(a) for a in rep.stored()]


@pytest.fixture
def stacks(monkeypatch):
    """How many matrices each call decomposes."""
    sizes, real = [], solvers.solve
    monkeypatch.setattr(
        ladder, "solve", lambda tasks: sizes.append((len(tasks), tasks[0].way)) or real(tasks)
    )
    return sizes


class TestStacks:
    @pytest.mark.more
    @pytest.mark.parametrize("exp", [-1.0, -0.5])
    def test_equal_sizes_are_one_call_and_the_same_numbers(self, xp, rng, stacks, exp):
        covs = [second_moment(rng, n) for n in (6, 4, 6, 6, 4)]
        pairs = [factor_of(xp, cov, exps=(exp,)) for cov in covs]
        refresh_all(*pairs)
        way = "cholesky" if exp == -1.0 else "eigh"
        together = [(1, way)] * 5 if xp is np else [(3, way), (2, way)]
        assert sorted(stacks) == sorted(together)
        for cov, (rep, average) in zip(covs, pairs, strict=True):
            assert_close(stored(rep)[0], power(cov, exp), 1e-10)
            alone = factor_of(xp, cov, exps=(exp,))
            refresh_all(alone)
            assert_close(stored(rep)[0], stored(alone[0])[0], 1e-12)
            assert_close(rep.decomposition.condition, alone[0].decomposition.condition, 1e-12)
            assert rep.decomposition.rung == "direct"
            assert rep.decomposition.num_updates == average.num_updates

    @pytest.mark.more
    def test_one_that_fails_spoils_no_other(self, xp, rng, monkeypatch):
        reads, real = [], ladder.to_numpy
        monkeypatch.setattr(ladder, "to_numpy", lambda x: reads.append(x) or real(x))
        vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        indefinite = (vectors * [-0.5, 1, 1, 2, 2, 3]) @ vectors.T
        covs = [second_moment(rng), indefinite, second_moment(rng), indefinite]
        pairs = [factor_of(xp, cov) for cov in covs]
        refresh_all(*pairs)
        for i in (0, 2):
            assert pairs[i][0].decomposition.rung == "direct"
            assert_close(stored(pairs[i][0])[0], power(covs[i]), 1e-10)
        for i in (1, 3):
            assert pairs[i][0].decomposition.rung == "clipped eigenvalues"
            assert np.linalg.eigvalsh(stored(pairs[i][0])[0]).min() > 0
        assert len(reads) == 3, "one read for each rung, however many factors are on it"

    def test_what_is_not_alike_is_not_stacked(self, rng, stacks):
        strict = pytest.importorskip("array_api_strict", reason="array-api-strict is missing")
        covs = [second_moment(rng) for _ in range(5)]
        pairs = [
            factor_of(strict, covs[0]),
            factor_of(strict, covs[1], "float32"),
            factor_of(strict, covs[2], decomposition_dtype=strict.float32),
            factor_of(strict, covs[3], posdef_inv_method="matrix_inverse"),
            factor_of(strict, covs[4], posdef_inv_method="matrix_inverse"),
        ]
        refresh_all(*pairs)
        assert sorted(stacks) == [
            (1, "cholesky"),
            (1, "matrix_inverse"),
            (1, "matrix_inverse"),
            (2, "cholesky"),
        ]
        for cov, (rep, _) in zip(covs, pairs, strict=True):
            assert_close(stored(rep)[0], power(cov), 1e-4)

    def test_a_stack_has_bounded_bytes(self, rng, stacks, monkeypatch):
        strict = pytest.importorskip("array_api_strict", reason="array-api-strict is missing")
        monkeypatch.setattr(solvers, "STACK_BYTES", 2 * 6 * 6 * 8)
        covs = [second_moment(rng) for _ in range(5)]
        pairs = [factor_of(strict, cov) for cov in covs]
        refresh_all(*pairs)
        assert [count for count, _ in stacks] == [2, 2, 1]
        for cov, (rep, _) in zip(covs, pairs, strict=True):
            assert_close(stored(rep)[0], power(cov), 1e-10)

    def test_inverses_by_halves(self, rng, monkeypatch):
        """Where the library has no triangular solver."""
        strict = pytest.importorskip("array_api_strict", reason="array-api-strict is missing")
        covs = [second_moment(rng, 70, 200) + np.eye(70) for _ in range(2)]
        inverses = linalg.inverse_of_damped(strict.asarray(np.stack(covs)))
        for cov, inverse in zip(covs, to_numpy(inverses), strict=True):
            assert_close(inverse, np.linalg.inv(cov), 1e-10)


class TestNewtonSchulz:
    @pytest.mark.more
    def test_improves_a_near_inverse(self, xp, rng):
        """Also one of another scale; the bound holds and is squared by each step."""
        matrices = np.stack([second_moment(rng) + np.eye(6) for _ in range(2)])
        near = np.stack([3 * np.linalg.inv(m + 0.1 * second_moment(rng)) for m in matrices])
        inverses, bounds = iterations.newton_schulz(xp.asarray(matrices), xp.asarray(near))
        for matrix, start, inverse, bound in zip(
            matrices, near, to_numpy(inverses), to_numpy(bounds), strict=True
        ):
            assert_close(inverse, np.linalg.inv(matrix), 1e-6)
            assert np.linalg.norm(np.eye(6) - matrix @ inverse) <= 1.01 * bound + 1e-12
            assert np.array_equal(inverse, inverse.T)
            one, one_bound = iterations.newton_schulz(xp.asarray(matrix), xp.asarray(start))
            assert_close(one, inverse, 1e-13)
            assert_close(one_bound, bound, 1e-6)

    @pytest.mark.more
    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    def test_a_refresh_goes_on_from_the_last(self, xp, rng, stacks, dtype):
        first = [second_moment(rng) for _ in range(3)]
        pairs = [factor_of(xp, cov, dtype, posdef_inv_method="newton_schulz") for cov in first]
        refresh_all(*pairs)
        assert {rep.decomposition.rung for rep, _ in pairs} == {"direct"}
        second = [0.7 * cov + 0.3 * second_moment(rng) for cov in first]
        for (_, average), cov in zip(pairs, second, strict=True):
            move(xp, average, cov)
        stacks.clear()
        refresh_all(*pairs)
        assert {way for _, way in stacks} == {"newton_schulz"}
        assert len(stacks) == (3 if xp is np else 1)
        for (rep, _), cov in zip(pairs, second, strict=True):
            assert rep.decomposition.rung == "warm"
            assert rep.decomposition.residual < 1e-2
            assert_close(stored(rep)[0], power(cov), 1e-3)
            assert stored(rep)[0].dtype == dtype

    @pytest.mark.more
    def test_a_failed_check_falls_back(self, xp, rng):
        """Of one factor of two, and of a start that is not finite."""
        covs = [second_moment(rng) for _ in range(2)]
        pairs = [factor_of(xp, cov, posdef_inv_method="newton_schulz") for cov in covs]
        refresh_all(*pairs)
        vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        far = (vectors * [1e4, 1, 1, 1e-3, 0, 0]) @ vectors.T
        move(xp, pairs[1][1], far)
        refresh_all(*pairs)
        assert [rep.decomposition.rung for rep, _ in pairs] == ["warm", "direct"]
        assert_close(stored(pairs[1][0])[0], power(far), 1e-9)
        rep, _ = pairs[0]
        (request,) = rep.cache.requests
        rep.cache.stored[request] = rep.cache.stored[request] * float("nan")
        refresh_all(*pairs)
        assert [rep.decomposition.rung for rep, _ in pairs] == ["direct", "warm"]
        assert_close(stored(rep)[0], power(covs[0]), 1e-10)

    @pytest.mark.more
    def test_an_identity_that_was_never_computed_is_no_start(self, xp, rng):
        rep, average = factor_of(xp, second_moment(rng), posdef_inv_method="newton_schulz")
        rep.instantiate(average.value)
        refresh_all((rep, average))
        assert rep.decomposition.rung == "direct"


class TestOrthogonalIteration:
    @pytest.mark.more
    def test_turns_towards_the_eigenvectors(self, xp, rng):
        """Repeated, it gives those of NumPy; what is left off the diagonal is what it says."""
        covs = np.stack([second_moment(rng), second_moment(rng)])
        basis = xp.asarray(np.stack([np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in covs]))
        one = iterations.orthogonal_iteration(xp.asarray(covs[1]), basis[1, ...])
        both = iterations.orthogonal_iteration(xp.asarray(covs), basis)
        for single, stacked in zip(one, both, strict=True):
            assert_close(single, to_numpy(stacked)[1], 1e-12)
        for _ in range(40):
            w, basis, rest = iterations.orthogonal_iteration(xp.asarray(covs), basis)
        for i, cov in enumerate(covs):
            v = to_numpy(basis)[i]
            assert_close(v.T @ v, np.eye(6), 1e-12)
            assert_close(v.T @ cov @ v, np.diag(to_numpy(w)[i]) + to_numpy(rest)[i], 1e-12)
            assert_close(to_numpy(w)[i], np.linalg.eigvalsh(cov)[::-1], 1e-3)

    def test_a_refresh_goes_on_from_the_last(self, xp, rng, stacks):
        options = {"exps": (-1.0, -0.5), "eigh_method": "orthogonal_iteration"}
        first = [second_moment(rng) for _ in range(2)]
        pairs = [factor_of(xp, cov, **options) for cov in first]
        refresh_all(*pairs)
        assert {rep.decomposition.rung for rep, _ in pairs} == {"direct"}
        second = [0.98 * cov + 0.02 * second_moment(rng) for cov in first]
        for (_, average), cov in zip(pairs, second, strict=True):
            move(xp, average, cov)
        stacks.clear()
        refresh_all(*pairs)
        assert {way for _, way in stacks} == {"orthogonal_iteration"}
        for (rep, _), cov in zip(pairs, second, strict=True):
            assert rep.decomposition.rung == "warm"
            v = to_numpy(rep.basis)
            rotated = v.T @ cov @ v
            scale = np.sqrt(np.diag(rotated) + DAMPING)
            rest = (rotated - np.diag(np.diag(rotated))) / np.outer(scale, scale)
            assert_close(rep.decomposition.residual, np.sqrt(np.sum(rest**2) / 6), 1e-5)
            assert 1e-4 < rep.decomposition.residual < 1e-2
            for array, exp in zip(stored(rep), (-1.0, -0.5), strict=True):
                assert_close(array, power(cov, exp), 2e-2)

    @pytest.mark.more
    def test_a_failed_check_falls_back(self, xp, rng):
        cov, other = second_moment(rng), second_moment(rng)
        pair = factor_of(xp, cov, exps=(-0.5,), eigh_method="orthogonal_iteration")
        refresh_all(pair)
        vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        other = vectors @ other @ vectors.T
        move(xp, pair[1], other)
        refresh_all(pair)
        assert pair[0].decomposition.rung == "direct"
        assert_close(stored(pair[0])[0], power(other, -0.5), 1e-9)


WARM = {"posdef_inv_method": "newton_schulz", "eigh_method": "orthogonal_iteration"}


def make_estimator(exps):
    layers = kfac_xp.LayerCollection(**WARM)
    layers.register_conv2d("conv", np.zeros((3, 3, 2, 4)), approx="kron_sua")
    layers.register_fully_connected("fc", (np.zeros((5, 4)), np.zeros(4)))
    layers.register_fully_connected_multi("rnn", np.zeros((3, 3)), approx="kron_series_2")
    return kfac_xp.FisherEstimator(layers, 0.5, exps=exps)


def statistics(seed):
    rng = np.random.default_rng(seed)
    return {
        "conv": (rng.normal(size=(20, 4, 4, 2)), rng.normal(size=(20, 4, 4, 4))),
        "fc": (rng.normal(size=(20, 5)), rng.normal(size=(20, 4))),
        "rnn": (rng.normal(size=(2, 20, 3)), rng.normal(size=(2, 20, 3))),
    }


def test_a_whole_model_is_saved_and_continues_warm(tmp_path):
    """Every kind of dense factor; what was saved is where the next refresh starts, to the bit."""
    ends = []
    for interrupted in (False, True):
        estimator = make_estimator((-1,))
        estimator.update_cov(statistics(0))
        estimator.update_inverses()
        if interrupted:
            kfac_xp.save_state(tmp_path / "state.npz", estimator.state_dict())
            estimator = make_estimator((-1,))
            estimator.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"))
        for seed in (1, 2):
            estimator.update_cov(statistics(seed), ema_decay=0.95, ema_weight=0.02)
            estimator.update_inverses()
        assert {f.name: f.info["rung"] for f in estimator.factors} == {
            f.name: "warm" for f in estimator.factors
        }
        ends.append(estimator.get_inv_vars())
    for a, b in zip(*ends, strict=True):
        assert np.array_equal(a, b)


def test_a_warm_model_multiplies_like_a_cold_one():
    cold = kfac_xp.LayerCollection()
    cold.register_conv2d("conv", np.zeros((3, 3, 2, 4)), approx="kron_sua")
    cold.register_fully_connected("fc", (np.zeros((5, 4)), np.zeros(4)))
    cold.register_fully_connected_multi("rnn", np.zeros((3, 3)), approx="kron_series_2")
    exact, warm = kfac_xp.FisherEstimator(cold, 0.5), make_estimator((-1,))
    for estimator in (exact, warm):
        estimator.update_cov(statistics(0))
        estimator.update_inverses()
        estimator.update_cov(statistics(1), ema_decay=0.95, ema_weight=0.02)
        estimator.update_inverses()
    vectors = {"conv": np.ones((3, 3, 2, 4)), "fc": (np.ones((5, 4)), np.ones(4))}
    vectors["rnn"] = np.eye(3)
    expected, found = (e.multiply_inverse(vectors) for e in (exact, warm))
    assert_close(found["conv"], expected["conv"], 1e-6)
    for a, b in zip(found["fc"], expected["fc"], strict=True):
        assert_close(a, b, 1e-6)
    assert_close(found["rnn"], expected["rnn"], 2e-2)  # by eigenvectors


def test_rungs_of_states_saved_before_there_were_warm_ones(rng):
    rep, average = factor_of(np, second_moment(rng))
    refresh_all((rep, average))
    state = rep.state_dict()
    assert state["decomposition"]["rung"] == 0
    make(rep.changes_to(Saved(state), average.value.shape, average.value))
    assert rep.decomposition.rung == "direct"


def test_unknown_methods():
    with pytest.raises(ValueError, match=r"`eigh_method` must be one of .*; got 'qr'"):
        FactorOptions(eigh_method="qr")
    with pytest.raises(ValueError, match=r"`posdef_inv_method` must be one of .*newton_schulz"):
        FactorOptions(posdef_inv_method="lu")
