"""Several ranks: the same numbers as one process, and errors in place of waiting.

Ranks are threads here where that suffices, and processes under ``mpiexec`` at the end.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import array_api_compat.numpy
import numpy as np
import pytest

import kfac_xp
from kfac_xp.distributed import Form, Team, worker_fractions
from kfac_xp.distributed.buffers import buckets, from_buffer, to_buffer
from kfac_xp.randomness import for_cases, normal, uniform
from tests import training_on_ranks as training
from tests.cases import assert_close, to_numpy
from tests.dense_blocks import BLOCKS as DENSE_BLOCKS
from tests.dense_blocks import DAMPING, Gradients
from tests.layer_forms import FORMS, Net, as_params, batch_of
from tests.places import Place, objects_in
from tests.public_layers import BLOCKS, FACTORS
from tests.rank_threads import on_ranks
from tests.support_table import REFUSED, approximations_of, expected_word

ROOT = Path(__file__).parent.parent


def results_of(size, function):
    results = on_ranks(size, function)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# ---------------------------------------------------------------------------------------------
# Training


def test_scenarios_cover_all_pairs():
    found = training.scenarios()
    values = [training.MODES, training.MOMENTA, training.WAYS, training.APPROXIMATIONS]
    names = ["mode", "momentum_type", "way", "approx"]
    for (first, some), (second, others) in itertools.combinations(
        zip(names, values, strict=True), 2
    ):
        pairs = {(getattr(s, first), getattr(s, second)) for s in found}
        assert pairs >= set(itertools.product(some, others)), (first, second)
    for size in (3, 4):
        for name, some in zip(names, values, strict=True):
            assert {getattr(s, name) for s in training.scenarios_of(size)} >= set(some)


@pytest.mark.parametrize("scenario", training.scenarios()[::5], ids=str)
def test_ranks_train_as_one_process(scenario):
    alone = training.trained_alone(scenario, steps=8)
    found = results_of(2, lambda c: training.difference(scenario, c, alone, steps=8))
    assert max(found) <= 1e-10


LAYERS = [
    pytest.param(form, approx, id=f"{form.title}-{approx}".replace(" ", "_"))
    for form in FORMS
    for approx in approximations_of(form)
    if expected_word(form, approx) != REFUSED
]


@pytest.mark.parametrize(("form", "approx"), LAYERS)
def test_every_layer_and_approximation(form, approx):
    """On three and five cases of a batch: the dense block of all eight."""
    whole = batch_of(form)

    def product(communicator):
        batch = whole.part((slice(3), slice(3, None))[communicator.rank], form.uses)
        layers = kfac_xp.LayerCollection()
        form.register(layers, as_params(np, form, whole.params), approx)
        layers.register_categorical_predictive_distribution("logits")
        estimator = kfac_xp.FisherEstimator(
            layers, DAMPING, estimation_mode="empirical", communicator=communicator
        )
        for decay in (0.9, 0.0):  # EKFAC measures from the second update on
            estimator.update_cov(Net(np, form, batch), batch.targets, ema_decay=decay)
            estimator.update_inverses()
        found = estimator.multiply_inverse({"layer": as_params(np, form, whole.vector)})["layer"]
        return np.concatenate([a.ravel() for a in (found if isinstance(found, tuple) else [found])])

    _, inverse = DENSE_BLOCKS[form.kind][approx](Gradients(form, whole, "empirical"))
    for found in results_of(2, product):
        assert_close(found, inverse @ whole.vector, 1e-9)


@pytest.mark.more
def test_every_library(xp):
    scenario = training.Scenario("gradients", "regular", "mem", "kron")
    alone = training.trained_alone(scenario, steps=4)
    found = results_of(2, lambda c: training.difference(scenario, c, alone, xp, steps=4))
    assert max(found) <= 1e-10


def test_float32_stays_float32(xp):
    params = {"fc": (xp.ones((3, 2), dtype=xp.float32), xp.zeros((2,), dtype=xp.float32))}

    def train(communicator):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("fc", params["fc"])
        optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.1, communicator=communicator)
        rng = np.random.default_rng(communicator.rank)
        x, ds = (xp.asarray(rng.normal(size=(5, n)), dtype=xp.float32) for n in (3, 2))
        grads = {"fc": (xp.matrix_transpose(x) @ ds / 5, xp.sum(ds, axis=0) / 5)}
        new, info = optimizer.step(params, statistics={"fc": (x, ds)}, grads=grads, loss=1.5)
        return new, info, optimizer.factors[0].cov

    (new, info, cov), (other, _, _) = results_of(2, train)
    assert new["fc"][0].dtype == cov.dtype == xp.float32
    assert float(info.loss) == 1.5
    assert_close(new["fc"][0], to_numpy(other["fc"][0]), 0)


def test_gradients_that_are_means_already():
    """`average_grads=False`: what is given is used as it is; otherwise it is weighed by cases."""
    params = {"fc": np.zeros((2, 1))}

    def train(communicator, average):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("fc", params["fc"])
        optimizer = kfac_xp.KfacOptimizer(
            layers, 1.0, 0.1, communicator=communicator, average_grads=average, invert_every=100
        )
        cases = 1 + 2 * communicator.rank
        x, ds = np.ones((cases, 2)), np.ones((cases, 1))
        grads = {"fc": np.full((2, 1), 4.0 * communicator.rank)}
        return optimizer.step(params, statistics={"fc": (x, ds)}, grads=grads)[1].gradient_norm

    means = results_of(2, lambda c: train(c, True))
    assert_close(means[0], 3 * np.sqrt(2), 1e-12)  # (1 * 0 + 3 * 4) / 4
    given = results_of(2, lambda c: train(c, False))
    assert_close(given[1], 4 * np.sqrt(2), 1e-12)


def test_layers_that_share_a_factor_are_on_the_same_ranks():
    def make(communicator):
        layers = kfac_xp.LayerCollection()
        for name, of in (("q", None), ("k", "q"), ("v", None)):
            layers.register_fully_connected(name, np.zeros((3, 2)), inputs_of=of)
        estimator = kfac_xp.FisherEstimator(
            layers, 0.1, communicator=communicator, grad_worker_fraction=1 / 2
        )
        rng = np.random.default_rng(3)
        x, ds, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2)), rng.normal(size=(6, 3))
        part = slice(0, 2) if communicator.rank == 0 else slice(2, 6)
        data = {"q": (x[part], ds[part]), "k": (x[part], 2 * ds[part]), "v": (y[part], ds[part])}
        estimator.update_cov(data)
        estimator.update_inverses()
        vectors = {name: rng.normal(size=(3, 2)) for name in data}
        whole = kfac_xp.LayerCollection()
        for name, of in (("q", None), ("k", "q"), ("v", None)):
            whole.register_fully_connected(name, np.zeros((3, 2)), inputs_of=of)
        alone = kfac_xp.FisherEstimator(whole, 0.1)
        alone.update_cov({"q": (x, ds), "k": (x, 2 * ds), "v": (y, ds)})
        alone.update_inverses()
        for name, product in estimator.multiply_inverse(vectors).items():
            assert_close(product, alone.multiply_inverse(vectors)[name], 1e-12, name)
        held = [f.name for f in estimator.factors if f.powers.stored()]
        return held, estimator.placement.layers, estimator.info

    (first, layers, info), (second, _, other_info) = results_of(2, make)
    assert layers == ("q", "v")
    assert sorted(first + second) == ["k.output", "q.input", "q.output", "v.input", "v.output"]
    assert {len(first), len(second)} == {3, 2}
    assert info == other_info
    assert info["k"]["output"]["rung"] == "direct"


@pytest.mark.parametrize("workers", [1, 3])
def test_cholesky_products_and_powers_of_several_dtypes(workers):
    def make(communicator, data):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("a", np.zeros((3, 2)))
        layers.register_fully_connected("b", np.zeros((4, 2), dtype=np.float32))
        layers.register_scale_and_shift("c", (np.ones(3), np.ones(3)), (None, 3), approx="diagonal")
        estimator = kfac_xp.FisherEstimator(
            layers,
            0.1,
            exps=(-1, -0.5),
            compute_cholesky=True,
            compute_cholesky_inverse=True,
            communicator=communicator,
            grad_worker_fraction=1.0 if communicator is None else workers / 3,
        )
        estimator.update_cov(data)
        estimator.update_inverses()
        return estimator

    rng = np.random.default_rng(5)
    data = {
        "a": (rng.normal(size=(6, 3)), rng.normal(size=(6, 2))),
        "b": [rng.normal(size=(6, n)).astype(np.float32) for n in (4, 2)],
        "c": (rng.normal(size=(6, 3)), rng.normal(size=(6, 3))),
    }
    vectors = {
        "c": (rng.normal(size=3), rng.normal(size=3)),
        "b": rng.normal(size=(4, 2)).astype(np.float32),
        "a": rng.normal(size=(3, 2)),
    }
    alone = make(None, data)

    def compare(communicator):
        cut = [0, 1, 3, 6]
        part = slice(cut[communicator.rank], cut[communicator.rank + 1])
        mine = {name: (x[part], ds[part]) for name, (x, ds) in data.items()}
        estimator = make(communicator, mine)
        for product in (
            lambda e: e.multiply(vectors),
            lambda e: e.multiply_inverse(vectors),
            lambda e: e.multiply_matpower(-0.5, vectors),
            lambda e: e.multiply_cholesky(vectors),
            lambda e: e.multiply_cholesky_inverse(vectors, transpose=True),
        ):
            here, there = product(estimator), product(alone)
            assert list(here) == list(vectors)
            for name in vectors:
                rtol = 1e-5 if name == "b" else 1e-12
                pairs = zip(np.atleast_1d(here[name]), np.atleast_1d(there[name]), strict=True)
                for x, y in pairs:
                    assert x.dtype == y.dtype
                    assert_close(x, y, rtol, name)

    results_of(3, compare)


# ---------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_a_state_goes_on_with_any_number_of_ranks(before, after, tmp_path):
    scenario = training.Scenario("gradients", "regular", "mem", "ekfac")
    path = tmp_path / "state.npz"

    def part_of(c):
        counts = training.sizes_of_ranks(c.size)
        return slice(sum(counts[: c.rank]), sum(counts[: c.rank + 1]))

    def begin(c):
        params, _, _, optimizer = training.trained(scenario, c, steps=8)
        state = optimizer.state_dict()
        if c.rank == 0:
            kfac_xp.save_state(path, state)
        return params

    def go_on(c, params):
        optimizer = training.optimizer_of(scenario, params, c)
        state = kfac_xp.load_state(path)
        part = part_of(c)
        size = len(training.batch(0, part)[1])
        optimizer.load_state_dict(state, params, loss_fn=loss_of(7, part), batch_size=size)
        layer = optimizer.layers.fisher_blocks["two"].factors
        assert all(layer[role].powers.stored() for role in ("input", "output"))  # as EKFAC needs
        for step in range(8, 13):
            params, _ = training.one_step(optimizer, params, step, part_of(c))
        return training.flat(params)

    def loss_of(step, part):
        x, targets = training.batch(step, part)

        def loss_fn(params):
            logits = training.TanhNet(params, x).outputs
            loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(logits, targets)
            return loss.evaluate() / x.shape[0]

        return loss_fn

    params = results_of(before, begin)[0]
    whole, *_ = training.trained(scenario, steps=13)
    for found in results_of(after, lambda c: go_on(c, params)):
        assert_close(found, training.flat(whole), 1e-10)


def test_ranks_keep_what_they_apply_also_after_loading():
    scenario = training.Scenario("empirical", "regular", "mem", "kron")

    def held(c):
        params, _, _, optimizer = training.trained(scenario, c, steps=4)
        before = [bool(f.powers.stored()) for f in optimizer.factors]
        state = optimizer.state_dict()
        fresh = training.optimizer_of(scenario, params, c)
        fresh.load_state_dict(state, params, loss_fn=lambda params: 0.0)
        return before, [bool(f.powers.stored()) for f in fresh.factors], state

    (first, loaded, state), (second, _, other) = results_of(2, held)
    assert first == loaded
    assert [a != b for a, b in zip(first, second, strict=True)] == [True] * 4
    here, there = (kfac_xp.state.flatten_state(s) for s in (state, other))
    assert here.keys() == there.keys()
    for key in here:
        assert np.array_equal(here[key], there[key]), key


def test_warm_starts_on_the_rank_that_computes():
    def rungs(c):
        layers = kfac_xp.LayerCollection(
            posdef_inv_method="newton_schulz", eigh_method="orthogonal_iteration"
        )
        layers.register_fully_connected("a", np.zeros((3, 2)))
        layers.register_fully_connected("b", np.zeros((3, 2)), approx="ekfac")
        estimator = kfac_xp.FisherEstimator(layers, 0.1, communicator=c)
        rng = np.random.default_rng(c.rank)
        x, ds = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
        for _ in range(2):
            estimator.update_cov({"a": (x, ds), "b": (x, ds)})
            estimator.update_inverses()
        return [estimator.info[n][role]["rung"] for n in "ab" for role in ("input", "output")]

    assert results_of(2, rungs) == [["warm"] * 4] * 2


# ---------------------------------------------------------------------------------------------
# Faults


def optimizer_at(communicator, **settings):
    params = training.start()
    layers = training.layers_of(training.Scenario("empirical", "regular", "comm", "kron"), params)
    settings = {"learning_rate": 0.1, "damping": 0.1, "estimation_mode": "empirical"} | settings
    return kfac_xp.KfacOptimizer(layers, communicator=communicator, **settings), params


class Broken(training.TanhNet):
    """A net whose `vjp` raises."""

    def vjp(self, ds, parameters=True):
        raise OSError("the disk is full")


def spoiled(how, c):
    """One step in which rank 1 does something else; then one that all do alike."""
    optimizer, params = optimizer_at(c)
    x, targets = training.batch(0)
    net = training.TanhNet(params, x)
    if c.rank == 1:
        if how == "vjp":
            net = Broken(params, x)
        elif how == "targets":
            targets = None
        elif how == "not finite":
            net = training.TanhNet(params, x * np.nan)
    before = optimizer.state_dict()
    message = None
    try:
        optimizer.step(params, net, targets)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    after = optimizer.state_dict()
    assert kfac_xp.state.flatten_state(before) == kfac_xp.state.flatten_state(after)
    new, _ = optimizer.step(params, training.TanhNet(params, x), training.batch(0)[1])
    return message, training.flat(new)


@pytest.mark.parametrize(
    ("how", "on_one", "on_others"),
    [
        ("vjp", "OSError: the disk is full", "RankError: rank 1 raised OSError: the disk is full"),
        ("targets", "ValueError: `targets` must be given", "rank 1 raised ValueError: `targets`"),
        ("not finite", "FloatingPointError", "FloatingPointError"),
    ],
)
def test_what_one_rank_raises_stops_all_and_changes_nothing(how, on_one, on_others):
    results = results_of(3, lambda c: spoiled(how, c))
    messages = [message for message, _ in results]
    assert on_one in messages[1]
    assert on_others in messages[0]
    assert messages[2].replace("rank 2 of", "rank 0 of") == messages[0]
    for _, params in results[1:]:  # and they go on
        assert_close(params, results[0][1], 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda params: {"one": params["two"], "two": params["one"]}, "layer 'one'.*(3, 4)"),
        (
            lambda params: {n: (k.astype("f4"), b.astype("f4")) for n, (k, b) in params.items()},
            "float32 on rank 1",
        ),
    ],
    ids=["shapes", "dtypes"],
)
def test_ranks_that_differ_say_in_what(spoil, message):
    def make(c):
        params = training.start()
        if c.rank == 1:
            params = spoil(params)
        scenario = training.Scenario("empirical", "regular", "comm", "kron")
        layers = training.layers_of(scenario, params)
        optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.1, communicator=c)
        return optimizer.step(
            params,
            training.TanhNet(params, np.ones((2, params["one"][0].shape[0]))),
            np.zeros(2, int),
        )

    for error in on_ranks(2, make):
        assert isinstance(error, ValueError)
        assert "must be the same on all ranks" in str(error)
        assert re.search(message, str(error)), error


def test_ranks_with_other_settings_or_steps():
    def other_seed(c):
        optimizer, params = optimizer_at(c, seed=c.rank)
        return training.one_step(optimizer, params, 0)

    for error in on_ranks(2, other_seed):
        assert "`seed`: 0 on rank 0, 1 on rank 1" in str(error)

    def other_step(c):
        optimizer, params = optimizer_at(c)
        training.one_step(optimizer, params, 0)
        if c.rank == 1:
            fresh, _ = optimizer_at(None)
            optimizer._state = fresh._state
        return training.one_step(optimizer, params, 1)

    for error in on_ranks(2, other_step):
        assert "all ranks must be at the same step; by rank they are at [1, 0]" in str(error)


def test_a_rank_without_another_source():
    def make(c):
        params = {"w": np.zeros(3)}
        layers = kfac_xp.LayerCollection()
        layers.register_generic("w", params["w"], approx="diagonal")
        estimator = kfac_xp.FisherEstimator(layers, 0.1, communicator=c)
        sources = [np.ones(3)] * (1 + c.rank)
        estimator.update_cov({"w": (4, iter(sources))})

    for error in on_ranks(2, make):
        assert isinstance(error, ValueError)
        assert "only ranks [1] have another one" in str(error)


# ---------------------------------------------------------------------------------------------
# Pieces


def test_buffers_hold_triangles_and_halves(xp, rng):
    m = rng.normal(size=(4, 4))
    arrays = [
        xp.asarray(m + m.T),
        xp.asarray(np.tril(m)),
        xp.asarray(rng.normal(size=(2, 3))),
        xp.asarray(1.5, dtype=xp.float64),
    ]
    forms = [Form.of(a, t) for a, t in zip(arrays, ("symmetric", "lower", None, None), strict=True)]
    buffer = to_buffer(arrays, forms)
    assert tuple(buffer.shape) == (10 + 10 + 6 + 1,)
    for array, back in zip(arrays, from_buffer(buffer, forms), strict=True):
        assert_close(back, to_numpy(array), 0)
        assert tuple(back.shape) == tuple(array.shape)


@pytest.mark.parametrize("name", [*FACTORS, *BLOCKS])
def test_what_factors_average_and_store_comes_back_from_buffers(name):
    place = Place(array_api_compat.numpy, "cpu")
    made = objects_in({**FACTORS, **BLOCKS}[name](place))
    for factor in (f for f in made if isinstance(f, kfac_xp.FisherFactor)):
        kept = [(average, factor.triangles) for average in factor.get_cov_vars()]
        if hasattr(factor.powers, "cache"):
            stored = factor.powers.cache.stored.items()
            kept += [(a, factor.powers.stored_triangles(request)) for request, a in stored]
        for array, triangles in kept:
            form = Form.of(array, triangles)
            (back,) = from_buffer(to_buffer([array], [form]), [form])
            assert_close(back, array, 0)


def test_buckets_are_full_and_of_one_dtype():
    sizes = [("float64", 3), ("float32", 3), ("float64", 2), ("float64", 3), ("float16", 2)]
    forms = [Form((n,), dtype) for dtype, n in sizes]
    assert buckets(forms, limit=40) == [[0, 2], [1, 4], [3]]
    assert buckets(forms, limit=1) == [[0], [1], [2], [3], [4]]


def test_draws_are_those_of_the_whole_batch():
    like = np.zeros(())
    for draw in (uniform, normal):
        whole = draw(np.random.default_rng(1), (7, 2), like)
        part = draw(for_cases(np.random.default_rng(1), 3, 7), (2, 2), like)
        assert_close(part, whole[3:5], 0)


def test_a_fraction_that_does_not_divide_the_ranks():
    def make(c):
        return optimizer_at(c, grad_worker_fraction=0.5)

    for error in on_ranks(3, make):
        assert isinstance(error, ValueError)
        assert "1/3 (1), 1 (3) of 3 ranks" in str(error)
    assert [str(f) for f in worker_fractions(3)] == ["1/3", "1"]


def test_an_error_within_an_agreement_within_another_is_told_once():
    def work(c):
        team = Team(c)
        told = []
        for _ in range(2):
            try:
                with team.agreement():
                    with team.agreement():
                        if c.rank == 0:
                            raise OSError("inner")
                    raise AssertionError("passed an agreement that failed")
            except (OSError, kfac_xp.RankError) as error:
                told.append(str(error))
            try:
                with team.agreement():
                    with team.agreement():
                        pass
                    if c.rank == 1:
                        raise OSError("outer")
                    with team.agreement():
                        pass
            except (OSError, kfac_xp.RankError) as error:
                told.append(str(error))
        return told

    first, second = results_of(2, work)
    assert first[0] == "inner"
    assert second[0].startswith("rank 0 raised OSError: inner")
    assert first[1].startswith("rank 1 raised OSError: outer")
    assert second[1] == "outer"
    assert len(first) == len(second) == 4


# ---------------------------------------------------------------------------------------------
# Processes


def mpi_run(size, *arguments, seconds=100, **popen):
    """Start ranks of a program; skips where there is no MPI."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    began = time.monotonic()
    done = subprocess.run(
        [mpiexec, "-n", str(size), sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        **popen,
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_train_as_one(size):
    done, _ = mpi_run(size, "-m", "tests.training_on_ranks")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Scenario") == len(training.scenarios_of(size))


FAULT = """
import os, signal, sys
import numpy as np
import kfac_xp
from tests import training_on_ranks as training

communicator = kfac_xp.MpiCommunicator()
scenario = training.Scenario("empirical", "regular", "mem", "kron")
params = training.start()
{first}
optimizer = training.optimizer_of(scenario, params, communicator)
for step in range(6):
    if step == 4 and communicator.rank == 1:
        {what}
    params, _ = training.one_step(optimizer, params, step)
print("went on to the end")
"""


@pytest.mark.parametrize(
    ("size", "what", "message"),
    [
        (3, "raise OSError('no more data')", "OSError: no more data"),
        (2, "training.TanhNet.vjp = None", "TypeError: 'NoneType' object is not callable"),
        (2, "os.kill(os.getpid(), signal.SIGKILL)", ""),
        (2, None, "must be the same on all ranks"),
    ],
    ids=["raises outside", "raises in a step", "killed", "other shapes"],
)
def test_processes_end_with_one_that_fails(size, what, message):
    wider = "{'one': (np.ones((3, 5)), np.ones(5)), 'two': (np.ones((5, 3)), np.ones(3))}"
    first = "" if what else f"if communicator.rank: params = {wider}"
    program = FAULT.format(what=what or "pass", first=first)
    done, seconds = mpi_run(size, "-c", program, seconds=60)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "went on" not in done.stdout
    assert seconds < 30


def test_mpi_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"kfac-xp\[mpi\]"):
        kfac_xp.MpiCommunicator()


def test_nccl_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match="CuPy"):
        kfac_xp.NcclCommunicator()
