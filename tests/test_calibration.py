"""What `calibrate` measures, where it is kept, and what is chosen by it. No time matters here."""

import json
from dataclasses import replace

import numpy as np
import pytest

import kfac_xp
from kfac_xp import ConvGeometry, backend, explain, measurements, patch_covariance, squared_outer
from kfac_xp.backend import registry
from kfac_xp.calibration import (
    EXAMPLES,
    Device,
    Example,
    measure_device,
    measuring,
    time_kernels,
    timing,
)
from kfac_xp.measurements import HOST, KernelTiming, Store, timings_as_json
from kfac_xp.patch_covariance import cost, rates
from kfac_xp.patch_covariance.rates import DEFAULT, DEFAULT_GPU, rates_of, rates_of_kind

CARD = "NVIDIA Test"
IMAGES = np.ones((2, 6, 6, 4), dtype=np.float32)
FILTER = ConvGeometry.create((3, 3))


def start_process(monkeypatch):
    """Nothing is known but what the file holds."""
    monkeypatch.setattr(measurements, "store", Store())


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The file of a user who has none; products so small that no time is lost."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "_HOST_WORK", 2e4)
    monkeypatch.setattr(timing, "_TURN", 0.0)
    monkeypatch.setattr(measuring, "SIZES", tuple(range(2, 2 + len(rates.SIZES))))
    monkeypatch.setattr(timing, "usable_cupy", lambda: None)
    start_process(monkeypatch)
    return tmp_path / "kfac_xp" / "calibration.json"


@pytest.fixture
def card(kept, monkeypatch):
    """NumPy's arrays pass for those of a card; nothing is launched."""
    monkeypatch.setattr(registry, "_kernel_backend", lambda x: ("cuda", ""))
    for module in (registry, rates):
        monkeypatch.setattr(module, "device_kind", lambda x: CARD)
    return Device(CARD, np, lambda: None, work=2e4)


# ---------------------------------------------------------------------------------------------
# Rates


def test_rates_of_the_host_are_used_and_kept(kept, monkeypatch):
    assert rates_of(IMAGES) is DEFAULT
    measured = kfac_xp.calibrate()[HOST]
    assert rates_of(IMAGES) is measured
    assert measured.measured in explain(patch_covariance, IMAGES, FILTER)
    start_process(monkeypatch)
    assert rates_of(IMAGES) == measured
    assert rates_of(IMAGES) is rates_of(IMAGES), "read once"


def test_what_is_not_to_be_kept_is_used_all_the_same(kept, monkeypatch):
    measured = kfac_xp.calibrate(keep=False)[HOST]
    assert rates_of(IMAGES) is measured
    assert not kept.exists()


def test_records_of_other_devices_stay_in_the_file(kept):
    kept.parent.mkdir()
    kept.write_text(json.dumps({CARD: {"measured": "then"}}))
    kfac_xp.calibrate()
    assert set(json.loads(kept.read_text())) == {CARD, HOST}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"cpu": 1}', '{"cpu": {"rates": {"measured": "x", "products": [1]}}}'],
)
def test_what_cannot_be_read_is_passed_over(kept, content):
    kept.parent.mkdir()
    kept.write_text(content)
    assert rates_of(IMAGES) is DEFAULT


@pytest.mark.parametrize(
    "change",
    [
        {"products": (1.0, 2.0)},
        {"bytes_per_second": float("nan")},
        {"seconds_per_call": 0.0},
        {"corrections": (("chunked", -1.0, 0.0),)},
    ],
)
def test_incomplete_rates_are_passed_over(kept, monkeypatch, change):
    for rates_kept, expected in ((DEFAULT, DEFAULT), (replace(DEFAULT, **change), None)):
        record = json.loads(json.dumps({"rates": rates.rates_as_json(rates_kept)}))
        assert rates._kept_rates(record) == expected


def test_a_cache_that_cannot_be_written_is_passed_over(kept):
    kept.parent.parent.joinpath("kfac_xp").write_text("a file, where a folder should be")
    assert rates_of(IMAGES) is DEFAULT
    measured = kfac_xp.calibrate()[HOST]
    assert rates_of(IMAGES) is measured


def test_a_card_has_rates_of_its_own(card):
    assert rates_of(IMAGES) is DEFAULT_GPU
    assert "a data sheet" in explain(patch_covariance, IMAGES, FILTER)
    assert rates_of_kind(HOST) is DEFAULT


def test_without_a_measurement_small_problems_on_a_card_are_left_to_patches(card):
    """There every method takes what its calls take."""
    assert "patch_covariance: chunked" in explain(patch_covariance, IMAGES, FILTER)
    large = np.empty((256, 56, 56, 64), dtype=np.float32)
    assert "chunked" not in explain(patch_covariance, large, FILTER).partition(",")[0]


def test_a_stack_of_products_is_one_call_on_a_card():
    for rates_used, calls in ((DEFAULT, 10), (DEFAULT_GPU, 1)):
        work = rates_used.product(4, 4, 4, 10) - calls * rates_used.seconds_per_call
        assert 0 < work < rates_used.product(4, 4, 4, 10)
        one = rates_used.product(4, 4, 4) - rates_used.seconds_per_call
        assert work == pytest.approx(10 * one)


def test_no_estimate_for_a_card_reckons_with_kernels_for_numpy():
    assert cost.is_compiled(32, DEFAULT)
    assert not cost.is_compiled(32, DEFAULT_GPU)


# ---------------------------------------------------------------------------------------------
# Corrections


@pytest.mark.parametrize(("factor", "more"), [(3.0, 1e-3), (0.5, 0.0), (0.0, 2e-3)])
def test_the_fit_finds_what_times_were_made_of(factor, more):
    estimates = [1e-5, 2e-4, 1e-3, 5e-3]
    times = [factor * e + more for e in estimates]
    assert measuring.fitted(estimates, times) == pytest.approx((factor, more), abs=1e-9)


def test_the_fit_is_never_negative():
    for times in ([1.0, 5.0, 30.0], [3.0, 2.0, 1.0]):
        a, b = measuring.fitted([1.0, 2.0, 3.0], times)
        assert min(a, b) >= 0
        assert max(a, b) > 0


def test_corrections_decide(card):
    """A method that was seen to take long there is not chosen, whatever its estimate."""
    images = np.ones((32, 28, 28, 64), dtype=np.float32)

    def chosen(*corrections):
        used = replace(DEFAULT_GPU, seconds_per_call=1e-9, corrections=corrections)
        measurements.store.keep(CARD, {"rates": rates.rates_as_json(used)}, write=False)
        return explain(patch_covariance, images, FILTER).split()[1].rstrip(",")

    first = chosen()
    assert first != "chunked"
    second = chosen((first, 1.0, 1.0))
    assert second != first
    assert chosen((first, 1.0, 1.0), (second, 100.0, 1.0)) not in (first, second)


# ---------------------------------------------------------------------------------------------
# Kernels


def keep_timing(op, arrays, speed):
    """As if the kernel had been measured on these arrays."""
    dtype, shapes = op.sizes(*arrays)
    timings = {op.name: [KernelTiming(dtype, shapes, 1e-3 * speed, 1e-3)]}
    record = json.loads(json.dumps({"kernels": timings_as_json(timings)}))
    known = measurements.kernel_timings(measurements.store.records.get(CARD, {}))
    known.setdefault(op.name, []).extend(measurements.kernel_timings(record)[op.name])
    record["kernels"] = timings_as_json(known)
    measurements.store.keep(CARD, record, write=False)


def rows(n, t, d, c, dtype=np.float32):
    return np.ones((n, t, d), dtype=dtype), np.ones((n, t, c), dtype=dtype)


def test_a_kernel_is_taken_where_it_was_measured_to_be_faster(card):
    keep_timing(squared_outer, rows(32, 4, 64, 64), 2.1)
    keep_timing(squared_outer, rows(32, 400, 64, 64), 0.7)
    few, many = rows(30, 5, 70, 60), rows(40, 300, 64, 32)
    kernel = squared_outer.implementations[1]
    assert kernel.backend == "cuda"
    assert explain(squared_outer, *few) == (
        "squared_outer: cuda, which `calibrate` measured 2.1 times as fast as the reference at a "
        "similar size (32x4x64, 32x4x64) on NVIDIA Test"
    )
    assert squared_outer.chosen(*few) is kernel.function
    assert squared_outer.chosen(grads=few[1], rows=few[0]) is kernel.function
    assert explain(squared_outer, *many) == (
        "squared_outer: reference, because `calibrate` measured the cuda kernel 0.7 times as fast "
        "as the reference at a similar size (32x400x64, 32x400x64) on NVIDIA Test"
    )
    assert squared_outer.chosen(*many) is squared_outer.reference


def test_a_kernel_that_is_hardly_faster_is_not_taken(card):
    keep_timing(squared_outer, rows(32, 4, 64, 64), 1.05)
    assert "reference, because" in explain(squared_outer, *rows(32, 4, 64, 64))


@pytest.mark.parametrize(
    "arrays",
    [
        rows(32, 4, 64, 64, np.float64),  # another dtype
        (np.ones((32, 64), np.float32), np.ones((32, 64), np.float32)),  # fewer axes
    ],
)
def test_what_was_not_measured_stays_with_the_reference(card, arrays):
    keep_timing(squared_outer, rows(32, 4, 64, 64), 2.1)
    text = explain(squared_outer, *arrays)
    assert text.endswith("never measured on this device; run kfac_xp.calibrate()")
    assert squared_outer.chosen(*arrays) is squared_outer.reference


def test_a_geometry_counts_with_its_kernel_and_optional_arguments_do_not(card):
    arguments = (IMAGES, np.ones((2, 6, 6, 5), np.float32), FILTER)
    shapes = ((2, 6, 6, 4), (2, 6, 6, 5), (3, 3))
    mask = np.ones((3, 3, 4), np.float32)
    for options in ({}, {"has_bias": True, "patch_mask": mask}):
        assert kfac_xp.conv_squared_outer.sizes(*arguments, **options) == ("float32", shapes)


def test_timings_that_cannot_be_understood_are_passed_over():
    good = {"dtype": "float32", "shapes": [[2, 3]], "reference": 1.0, "kernel": 2.0}
    bad = [{}, 3, good | {"kernel": 0.0}, good | {"shapes": 7}, good | {"reference": "x"}]
    found = measurements.kernel_timings({"kernels": {"op": [*bad, good], "other": 1}})
    assert found == {"op": [KernelTiming("float32", ((2, 3),), 1.0, 2.0)]}
    assert measurements.kernel_timings({"kernels": []}) == {}


def test_every_op_with_a_cuda_kernel_has_examples():
    served = {
        op.name: op
        for op in backend.kernel_ops()
        if any(i.backend == "cuda" for i in op.implementations)
    }
    assert {"extract_patches", "squared_outer", "conv_squared_outer"} <= set(served)
    assert set(served) <= set(EXAMPLES)


@pytest.mark.parametrize("op", backend.kernel_ops(), ids=lambda op: op.name)
def test_examples_are_arguments_of_their_op(op):
    for example in EXAMPLES.get(op.name, ()):
        arguments = example.arguments(lambda *shape: np.empty(shape, np.float32))
        dtype, shapes = op.sizes(*arguments)
        assert dtype == "float32"
        assert shapes
        if op._check is not None:
            op._check(*arguments)


SMALL = {
    "squared_outer": [Example("small", lambda draw: (draw(2, 3, 20), draw(2, 3, 20)))],
    "extract_patches": [Example("small", lambda draw: (draw(2, 4, 4, 3), FILTER))],
    "averaged": [Example("small", lambda draw: (draw(4, 4), draw(4, 4), 0.95, 0.05))],
}


def test_kernels_are_timed_beside_their_references(kept, monkeypatch):
    monkeypatch.setattr(timing, "EXAMPLES", SMALL)
    device = Device(HOST, np, lambda: None, work=2e4)
    found = time_kernels(device, "numba")
    assert {op: [t.dtype for t in timings] for op, timings in found.items()} == {
        op: ["float32", "float64"] for op in SMALL
    }
    assert found["extract_patches"][0].shapes == ((2, 4, 4, 3), (3, 3))
    assert all(t.reference > 0 < t.kernel for timings in found.values() for t in timings)
    assert time_kernels(device, "cuda") == {}, "NumPy's arrays have no such kernels"


def test_a_card_is_measured_whole(card, monkeypatch, tmp_path):
    """Rates, then kernels, then how methods really ran; with no wait that is not asked for."""
    waits = []
    device = replace(card, wait=lambda: waits.append(1))
    timings = {"squared_outer": [KernelTiming("float32", ((2, 3, 4), (2, 3, 5)), 3e-3, 1e-3)]}
    monkeypatch.setattr(measuring, "_COVARIANCES", ((2, 6, 4, 3), (2, 4, 2, 3)))
    monkeypatch.setattr(measuring, "why_no_cuda", lambda: "")
    monkeypatch.setattr(measuring, "time_kernels", lambda device: timings)
    record = measure_device(device)
    assert waits
    measurements.store.keep(CARD, record, write=True)
    start_process(monkeypatch)
    found = rates_of(IMAGES)
    assert found.is_gpu
    assert CARD in found.measured
    assert [method for method, *_ in found.corrections] == list(cost.METHODS)
    assert "cuda, which `calibrate` measured 3.0 times" in explain(squared_outer, *rows(2, 3, 4, 5))
    waits.clear()
    squared_outer.chosen(*rows(2, 3, 4, 5))
    patch_covariance(IMAGES, FILTER)
    assert not waits


@pytest.mark.gpu
def test_calibrate_measures_the_device(kept, monkeypatch):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("there is no CUDA device")
    monkeypatch.setattr(timing, "usable_cupy", backend.usable_cupy)
    monkeypatch.setattr(timing, "EXAMPLES", SMALL)
    monkeypatch.setattr(timing, "_GPU_WORK", 2e6)
    monkeypatch.setattr(measuring, "_COVARIANCES", ((2, 6, 4, 3), (3, 5, 2, 3)))
    found = kfac_xp.calibrate()
    x = cupy.ones((2, 3, 20), dtype=cupy.float32)
    kind = backend.device_kind(x)
    assert set(found) == {HOST, kind}
    assert rates_of(x) is found[kind]
    assert f"(2x3x20, 2x3x20) on {kind}" in explain(squared_outer, x, x)
