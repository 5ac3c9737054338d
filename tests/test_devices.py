"""State lives where the data lives, and nothing but the one read of a refresh goes to the host.

array-api-strict stands in for a device: its second device cannot be mixed with the first, and
every way from it to the host raises. With CuPy (``-m gpu``) the same calls run on a card.
"""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.descriptions import Described
from kfac_xp.estimator import ESTIMATION_MODES
from tests import places, public_names
from tests.places import Place, require_place
from tests.public_layers import BLOCKS
from tests.public_names import ABSTRACT, CALLS, LOSSES, WITHOUT_ARRAYS
from tests.rank_threads import on_ranks

MOMENTUM = {
    "regular": {"learning_rate": 0.1, "norm_constraint": 1e-2},
    "adam": {"learning_rate": 0.1, "norm_constraint": 1e-2},
    "qmodel": {"learning_rate": None},
    "qmodel_fixedmu": {"learning_rate": None, "momentum": 0.5},
}


@pytest.fixture(params=["array_api_strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def far(request, monkeypatch):
    """``(place, watch)``: a device, and what sees values leave it for the host."""
    if request.param == "cupy":
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("there is no CUDA device")
        xp = pytest.importorskip("array_api_compat.cupy")
        yield Place(xp, cupy.cuda.Device()), places.watch_cupy(monkeypatch, cupy)
        return
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    watch = places.watch_strict(monkeypatch, strict)
    yield Place(strict, strict.Device("device1")), watch
    places.unwatch_strict(strict, watch)


def host_of(place):
    return Place(place.xp, place.xp.Device("CPU_DEVICE"))


def test_every_public_name_is_called_or_has_a_reason():
    listed = [set(CALLS), set(WITHOUT_ARRAYS), ABSTRACT]
    assert set.union(*listed) == set(kfac_xp.__all__)
    assert sum(map(len, listed)) == len(kfac_xp.__all__)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_where_the_data_is(far, name, dtype):
    """Of the data's library, device and dtype; read is what a refresh reads, and no more."""
    place, watch = far
    place.dtype = dtype
    result = CALLS[name](place)
    require_place(result, place, same_dtype=name not in public_names.MIXED_DTYPES)
    assert len(watch.reads) == public_names.READS.get(name, 1)
    assert all(len(shape) == 1 for shape in watch.reads)


def test_nothing_is_read_to_be_seen(far):
    """Every object that a public name is or makes: its line, its table, its report."""
    place, watch = far
    kinds = set()
    for name in [*BLOCKS, *LOSSES, "SUA", "BlockTridiagonalChain", "CurvatureMatrix", *SEEN_MODELS]:
        calls = {"SUA": CALLS["ConvInputSUAKroneckerFactor"], "CurvatureMatrix": matrices}
        result = calls.get(name, CALLS.get(name))(place)
        reads = len(watch.reads)
        for seen in places.objects_in(result):
            if isinstance(seen, Described):
                kinds.add(type(seen).__name__)
                assert "\n" not in repr(seen)
                assert repr(seen).startswith(f"<{type(seen).__name__}")
                assert seen._repr_html_().startswith("<table>")
            if hasattr(seen, "report"):
                report = seen.report()
                assert report.rows()
                assert str(report)
        assert len(watch.reads) == reads, name
    with pytest.raises(RuntimeError, match=r"power -0.5 at damping \(0-d float64, .*; it serves"):
        kfac_xp.FullyConnectedKroneckerFactor(place.normal(4, 3)).get_matpower(
            -0.5, place.positive(1)[0]
        )
    assert {"Dense", "MovingAverage", "StepInfo", "FullMatrix", "FisherEstimator"} < kinds
    assert len(kinds) > 50


def matrices(place):
    layers, params = public_names.tanh_layers(place)
    made = kfac_xp.FisherEstimator(layers, place.positive(1)[0])
    made.update_cov(*public_names.tanh_batch(place, params))
    return [made.matrix(0.1, split) for split in ("pi", "exact")], made


SEEN_MODELS = ("Chain", "FisherEstimator", "KfacOptimizer", "LayerCollection", "IndexedSlices")


class TestTrainingSteps:
    def test_messages_and_times_read_nothing(self, far, caplog):
        """Where values are not free to be read, they are not in the messages."""
        place, watch = far
        caplog.set_level("DEBUG", "kfac_xp")
        step = public_names.optimizer(
            kfac_xp.KfacOptimizer,
            batches=3,
            of_loss_fn=True,
            learning_rate=0.1,
            adapt_damping=True,
            damping_adaptation_interval=1,
            invert_every=2,
            timings=True,
        )
        optimizer, _, _ = step(place)
        assert len(watch.reads) == 2
        changes = [r.getMessage() for r in caplog.records if r.name == "kfac_xp.optimizer"]
        assert [text.partition(":")[0] for text in changes] == ["step 1", "step 2"]
        assert all("(0-d float64, " in text for text in changes)
        assert optimizer.timings.of_launching
        assert "times of launching" in str(optimizer.report())
        assert "(0-d float64, " in repr(optimizer)

    @pytest.mark.parametrize("mode", ESTIMATION_MODES)
    def test_estimation_modes(self, far, mode):
        place, watch = far
        layers, params = public_names.conv_layers(place)
        optimizer = kfac_xp.KfacOptimizer(
            layers, 0.1, 0.1, estimation_mode=mode, invert_every=2, norm_constraint=1e-2
        )
        for _ in range(4):
            params, info = optimizer.step(params, *public_names.conv_batch(place, params))
        assert len(watch.reads) == 2, "one read for each of the two inverse updates, and no other"
        require_place(optimizer.factors, place)
        require_place(params, place)
        assert info.loss.device == place.device

    @pytest.mark.parametrize("of_loss_fn", [False, True], ids=["constant", "adapted"])
    @pytest.mark.parametrize("kind", MOMENTUM)
    def test_momentum_and_damping(self, far, kind, of_loss_fn):
        """In float32, whose parameters stay so beside scalars of float64."""
        place, watch = far
        place.dtype = "float32"
        settings = {"momentum_type": kind, "invert_every": 2, **MOMENTUM[kind]}
        if of_loss_fn:
            settings |= {"adapt_damping": True, "damping_adaptation_interval": 1}
        step = public_names.optimizer(
            kfac_xp.KfacOptimizer, batches=4, of_loss_fn=of_loss_fn, **settings
        )
        optimizer, params, infos = step(place)
        assert len(watch.reads) == 2
        require_place([params, optimizer.estimator], place)
        require_place(infos, place, same_dtype=False)
        assert (infos[-1].rho is not None) == of_loss_fn

    @pytest.mark.parametrize("workers", [1, 2])
    def test_two_ranks(self, far, workers):
        """As two threads, whose messages stay on the device."""
        place, watch = far

        def train(communicator):
            layers, params = public_names.conv_layers(place)
            optimizer = kfac_xp.KfacOptimizer(
                layers,
                0.1,
                0.1,
                invert_every=2,
                communicator=communicator,
                grad_worker_fraction=workers / 2,
            )
            for _ in range(4):
                params, _ = optimizer.step(params, *public_names.conv_batch(place, params))
            return optimizer.factors, params

        results = on_ranks(2, train)
        assert len(watch.reads) == 2 * 2, "one read of each rank for each inverse update"
        require_place(results, place)

    def test_measured_a_step_later(self, far):
        place, watch = far
        public_names.optimizer(
            kfac_xp.KfacOptimizer,
            batches=3,
            of_loss_fn=True,
            learning_rate=0.1,
            adapt_damping=True,
            damping_adaptation_interval=1,
            update_damping_immediately=False,
            use_weight_decay=True,
            num_burnin_steps=1,
        )(place)
        assert len(watch.reads) == 1

    @pytest.mark.parametrize("method", ["orthogonal_iteration", "refinement"])
    def test_inverses_that_start_from_the_last(self, far, method):
        place, watch = far
        layers, params = public_names.tanh_layers(
            place, posdef_inv_method="newton_schulz", eigh_method=method
        )
        estimator = kfac_xp.FisherEstimator(layers, 0.5, exps=(-1, -0.5), estimation_mode="exact")
        batch = public_names.tanh_batch(place, params)
        for _ in range(3):
            estimator.update_cov(*batch)
            estimator.update_inverses()
        assert {f.info["rung"] for f in estimator.factors} == {"warm"}
        assert len(watch.reads) == 3
        require_place(estimator, place)

    def test_exact_and_relative_damping(self, far):
        place, watch = far
        layers, params = public_names.tanh_layers(
            place, damping_split="exact", relative_damping=True
        )
        estimator = kfac_xp.FisherEstimator(layers, 0.5, estimation_mode="exact")
        for _ in range(2):
            estimator.update_cov(*public_names.tanh_batch(place, params))
            estimator.update_inverses()
            products = estimator.multiply_inverse(params), estimator.multiply(params)
            require_place(products, place)
        assert len(watch.reads) == 2


def test_a_watch_sees_every_way_to_the_host(far):
    place, _ = far
    if place.xp.__name__.endswith("cupy"):
        ways = [bool, int, float, lambda x: x.get(), lambda x: x.item(), np.asarray]
    else:
        host = place.xp.Device("CPU_DEVICE")
        ways = [bool, int, float, lambda x: x.to_device(host), np.asarray, lambda x: x[x > 0]]
    for way in ways:
        with pytest.raises((AssertionError, RuntimeError)):
            way(place.positive(1)[0] if way in (bool, int, float) else place.positive(3))


def test_a_device_gives_the_numbers_of_the_host():
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    ends = []
    for device in ("CPU_DEVICE", "device1"):
        place = Place(strict, strict.Device(device))
        step = public_names.optimizer(kfac_xp.KfacOptimizer, batches=3, learning_rate=0.1)
        ends.append(step(place)[1])
    for name in ends[0]:
        for a, b in zip(ends[0][name], ends[1][name], strict=True):
            there = b.to_device(strict.Device("CPU_DEVICE"))
            assert np.allclose(np.asarray(a), np.asarray(there), rtol=1e-12, atol=0)


def test_what_is_not_finite_is_named_at_the_next_inverse_update(far):
    place, watch = far
    layers, params = public_names.conv_layers(place)
    optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.1, invert_every=1)
    net, targets = public_names.conv_batch(place, params)
    optimizer.step(params, net, targets)
    before = {f.name: f.cov for f in optimizer.factors}
    broken = type(net)(params, net.x * float("nan"), net.strides)
    with pytest.raises(
        FloatingPointError, match=r"conv\.input.*dense\.diagonal \(layer .dense.\) were not finite"
    ):
        optimizer.step(params, broken, targets)
    assert optimizer.counter == 1
    assert len(watch.reads) == 2
    for factor in optimizer.factors:
        with watch.letting():
            assert bool(place.xp.all(factor.cov == before[factor.name]))


def test_a_chain_says_at_the_next_inverse_update_what_is_not_finite(far):
    place, watch = far
    made = kfac_xp.BlockTridiagonalChain({"a": place.normal(3, 2), "b": place.normal(2, 2)}, 0.1)
    batch = {"a": (place.normal(4, 3), place.normal(4, 2))}
    batch["b"] = place.normal(4, 2), place.normal(4, 2)
    made.update_cov(batch, ema_decay=0.9)
    before = made.moments["b"].input
    made.update_cov(batch | {"a": (batch["a"][0] * float("nan"), batch["a"][1])}, ema_decay=0.9)
    with pytest.raises(FloatingPointError, match=r"BlockTridiagonalChain were not finite"):
        made.update_inverses()
    made.update_inverses()
    assert len(watch.reads) == 2
    with watch.letting():
        assert bool(place.xp.all(made.moments["b"].input == before))


def test_mixed_devices_are_an_error_that_names_both(far):
    place, _ = far
    if place.xp.__name__.endswith("cupy"):
        pytest.skip("one card only")
    here, there = (p.normal(4, 3) for p in (host_of(place), place))
    both = r"CPU_DEVICE.*device1|device1.*CPU_DEVICE"
    factor = kfac_xp.FullyConnectedKroneckerFactor(here)
    with pytest.raises(ValueError, match=both):
        factor.update_cov(tensors=there, ema_decay=0.9)
    layers = kfac_xp.LayerCollection()
    with pytest.raises(ValueError, match=both):
        layers.register_fully_connected("fc", (here, place.normal(3)))
    block = kfac_xp.FullyConnectedKFACBasicFB(None)
    block.register_additional_tower(here, here)
    block.instantiate_factors([[here]], 0.1)
    block.update_cov(inputs=here, outputs_grads=here, ema_decay=0.9)
    with pytest.raises(ValueError, match=both):
        block.update_cov(inputs=here, outputs_grads=there, ema_decay=0.9)
    with pytest.raises(ValueError, match=both):
        block.multiply(place.normal(3, 3))
    with pytest.raises(ValueError, match=both):
        kfac_xp.NormalMeanNegativeLogProbLoss(here, 0.5, there)
    images, grads = (public_names.images(p) for p in (host_of(place), place))
    for op, *arguments in [
        (kfac_xp.squared_outer, here, there),
        (kfac_xp.compute_cov, here, there),
        (kfac_xp.kronecker_product, here, there),
        (kfac_xp.conv_squared_outer, images, grads, public_names.GEOMETRY),
        (kfac_xp.FullMatrix(here[:3, :]).matmul, there.T),
    ]:
        with pytest.raises(ValueError, match=both):
            op(*arguments)


def test_a_device_without_float64_skips_that_rung(rng):
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    device = strict.Device("no_float64")
    x = strict.asarray(rng.normal(size=(2, 8)), dtype=strict.float32, device=device)
    factor = kfac_xp.FullyConnectedKroneckerFactor(x)
    factor.register_inverse(0.0)  # rank 2 of 8
    factor.update_cov(tensors=x, ema_decay=0.9)
    try:
        factor.update_inverses()
    except TypeError:
        pytest.fail("float64 was asked of a device that has none")
    assert factor.info["rung"] in ("jitter", "clipped eigenvalues")
