"""The memory plan beside what Python's own count of allocations says of real steps."""

import gc
import tracemalloc

import numpy as np
import pytest

import kfac_xp
from kfac_xp.kernels.cpu import scratch

DENSE = {"one": (300, 420), "two": (420, 260), "three": (260, 180)}
IMAGES = {"one": (16, 16, 48), "two": (8, 48, 64)}


def make_net(kind, dtype=np.float32):
    """Layers, parameters, statistics and the shapes of a net's inputs."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    layers, params, data, shapes = kfac_xp.LayerCollection(), {}, {}, {}
    family, approx = kind.split()
    cases = 400 if family == "dense" else 32
    for name, (d_in, d_out) in DENSE.items() if family == "dense" else ():
        params[name] = draw(d_in, d_out), draw(d_out)
        layers.register_fully_connected(name, params[name], approx=approx)
        data[name] = draw(cases, d_in), draw(cases, d_out)
    for name, (side, c_in, c_out) in IMAGES.items() if family != "dense" else ():
        kernel = draw(3, 3, c_in, c_out)
        params[name] = kernel if name == "one" else (kernel, draw(c_out))
        strides = (2, 2) if family == "strided" else (1, 1)
        layers.register_conv2d(name, params[name], strides=strides, approx=approx)
        shapes[name] = (cases, side, side, c_in)
        out = side // strides[0]
        data[name] = draw(*shapes[name]), draw(cases, out, out, c_out)
    if family != "dense":
        params["fc"] = draw(300, 200)
        layers.register_fully_connected("fc", params["fc"])
        data["fc"] = draw(cases, 300), draw(cases, 200)
    return layers, params, data, shapes, cases


def measured(kind):
    """``{stage: bytes}`` of the most that was allocated in a step, and of what is kept."""

    def make():
        layers, params, data, _, _ = make_net(kind)
        optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.1, invert_every=1)
        return optimizer, lambda: optimizer.step(params, statistics=data, grads=params)

    _, step = make()
    step()  # compiles
    scratch._stack.buffer = scratch._stack.buffer[:0].copy()
    optimizer, step = make()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(5):  # until kernels keep what they take
            step()
        gc.collect()
        found = {"kept": tracemalloc.get_traced_memory()[0]}
        stages = ("average_sources", "update_inverses", "multiply_inverse")
        for stage, method in zip(
            ("statistics", "inverses", "preconditioning"), stages, strict=True
        ):
            call = getattr(optimizer.estimator, method)

            def watched(*arguments, stage=stage, call=call, **keywords):
                tracemalloc.reset_peak()
                result = call(*arguments, **keywords)
                found[stage] = tracemalloc.get_traced_memory()[1]
                tracemalloc.reset_peak()
                return result

            setattr(optimizer.estimator, method, watched)
        step()
        found["update"] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return found


@pytest.mark.parametrize(
    "kind",
    [
        "dense kron",
        "dense diagonal",
        "dense ekfac",
        "conv kron",
        "conv diagonal",
        "conv ekfac",
        "conv kron_sua",
        "strided kron",
    ],
)
def test_every_stage_is_within_fifteen_percent(kind):
    layers, _, _, shapes, cases = make_net(kind)
    plan = kfac_xp.plan(layers, cases, input_shapes=shapes)
    found = measured(kind)
    expected = {"kept": plan.kept, **plan.peaks}
    assert found.keys() == expected.keys()
    errors = {stage: expected[stage] / found[stage] - 1 for stage in found}
    assert all(abs(error) < 0.15 for error in errors.values()), (errors, found)
    assert all(layer.is_modelled for layer in plan.layers)


def test_the_collection_is_left_as_it_is():
    layers, params, _, _, cases = make_net("dense kron")
    plan = kfac_xp.plan(layers, cases)
    assert all(block._damping is None for block in layers.get_blocks())
    layers.register_fully_connected("more", np.zeros((2, 2), np.float32))  # still open
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    assert all(len(factor.users) == 1 for factor in estimator.factors)
    bigger = kfac_xp.plan(estimator, cases)
    assert [layer.name for layer in bigger.layers] == [*params, "more"]
    assert bigger.layers[:3] == plan.layers
    more = kfac_xp.plan(kfac_xp.FisherEstimator(make_net("dense kron")[0], 0.1, exps=(-1, -0.5)), 4)
    assert more.layers[0].inverses == 2 * plan.layers[0].inverses


def test_shared_factors_count_once():
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("one", np.zeros((50, 20)))
    layers.register_fully_connected("two", np.zeros((50, 20)), inputs_of="one")
    one, two = kfac_xp.plan(layers, 8).layers
    assert one.averages == 2 * 8 * (50**2 + 20**2)
    assert two.averages == 2 * 8 * 20**2


def test_the_table():
    plan = kfac_xp.plan(make_net("dense kron")[0], 400)
    text = str(plan)
    for words in ("layer", "averages", "inverse update", "three", "'", "kept between steps: "):
        assert (words in text) == (words != "'"), words
    assert f"{plan.kept / 1e6:.3g} MB" in text
    assert "most at once, with 400 cases: statistics" in text
    layers = kfac_xp.LayerCollection()
    layers.register_generic("odd", np.zeros((3, 3)), approx="full")
    odd = kfac_xp.plan(layers, 5)
    assert not odd.layers[0].is_modelled
    assert ">= " in str(odd)
    assert odd.layers[0].averages == 2 * 8 * 81
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("groups", np.zeros((3, 3, 2, 4)), groups=2, approx="ekfac")
    odd = kfac_xp.plan(layers, 4, input_shapes={"groups": (4, 5, 5, 4)})
    assert not odd.layers[0].is_modelled
    assert odd.layers[0].inverses == 8 * 2 * (19 * 18 + 3 * 2)


def test_advice():
    layers, _, _, shapes, cases = make_net("conv kron")
    whole = kfac_xp.plan(layers, cases, input_shapes=shapes)
    assert whole.advice == ()
    assert kfac_xp.plan(layers, cases, input_shapes=shapes, memory_limit=10**12).advice == ()
    tight = kfac_xp.plan(layers, cases, input_shapes=shapes, memory_limit=whole.peak // 2)
    assert tight.peaks == whole.peaks
    text = str(tight)
    assert "a step takes" in text
    assert "layer 'two' ('kron') keeps" in text
    assert "'diagonal' would keep" in text
    assert "'kron_sua' would keep" in text
    wide = kfac_xp.LayerCollection()
    wide.register_fully_connected("fc", (np.zeros((10, 10)), np.zeros(10)))
    many = kfac_xp.plan(wide, 100_000, memory_limit=10**5)
    (advice,) = [line for line in many.advice if "cases at a time" in line]
    fits = int(advice.split()[3])
    assert kfac_xp.plan(wide, fits).peak <= 10**5 < kfac_xp.plan(wide, fits + 1).peak
    huge = kfac_xp.LayerCollection()
    huge.register_generic("w", np.zeros((100, 100), np.float32), approx="full")
    (advice,) = [a for a in kfac_xp.plan(huge, 8, memory_limit=10**6).advice if "'w'" in a]
    assert "keeps 1.2 GB; 'diagonal' would keep 80 kB" in advice


def test_shapes_that_do_not_fit():
    layers, _, _, shapes, cases = make_net("conv kron")
    for given, message in [
        ({}, "inputs of the convolution 'one'"),
        ({**shapes, "one": shapes["one"][:3]}, r"\(N, size, size, C_in\)"),
        ({**shapes, "one": (1, *shapes["one"][1:])}, "must begin with `batch_size`, 32"),
        ({**shapes, "tree": (1, 2)}, r"\['tree'\], which are not registered"),
    ]:
        with pytest.raises(ValueError, match=message):
            kfac_xp.plan(layers, cases, input_shapes=given)
