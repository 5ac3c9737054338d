"""The benchmark runner stays alive; nothing here depends on how long anything takes."""

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import kfac_xp
from benchmarks import report, run, timing, worker
from benchmarks.case import OURS, Case, Implementation, MemoryTarget, Program, Target
from benchmarks.cases import all_cases, matching
from benchmarks.cases.covariance import REPORTED_BELOW, Problem
from benchmarks.cases.inverses import resnet50_layers
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import graphs, kernels, networks
from benchmarks.gpu.device import CupyDevice, Device, TorchDevice, high_water
from benchmarks.gpu.worker import start_on
from benchmarks.peers import PEERS
from kfac_xp import geometry

ROOT = Path(__file__).parent.parent
TINY = "conv_diagonal/3x3 N64 T64 C64 O64"


def test_every_case_has_a_name_and_targets_against_what_it_measures():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    for case in all_cases():
        implementations = [i.name for i in case.implementations]
        assert implementations[0] == OURS
        assert len(set(implementations)) == len(implementations)
        assert {i.peer for i in case.implementations} <= set(PEERS)
        for target in case.targets:
            assert {*target.against, target.beyond or OURS} <= set(implementations)
            assert (target.at_least, target.median) != (None, None)
        if case.name.startswith(("conv_diagonal", "conv_net", "covariance/usual")):
            assert case.targets
    assert {case.name.split("/")[0] for case in all_cases() if case.is_quick} == {
        "covariance",
        "conv_diagonal",
        "inverses",
        "conv_net",
    }


def test_patterns():
    assert len(matching(None)) == len(list(all_cases()))
    assert [case.name for case in matching(TINY)] == [TINY]
    assert {case.name for case in matching("covariance/*/7x7*")} < {
        case.name for case in matching("covariance")
    }


def test_flops_count_the_symmetric_product_of_the_patches():
    problem = Problem(2, 5, 3, stride=2)  # 3 x 3 locations, patches of 27
    assert problem.flops == 2 * 9 * 27 * 28
    assert sum(p.flops < REPORTED_BELOW for p in (Problem(32, 6, 3), Problem(32, 32, 3))) == 1


def test_the_layers_are_those_of_a_resnet_50():
    parameters = sum(rows * columns for rows, columns in resnet50_layers())
    batch_norm = 2 * 26560  # scales and shifts, which have no Kronecker factors
    assert parameters + batch_norm == 25_557_032


def test_the_runner_lists_its_cases(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--list", "--case", "conv_diagonal"])
    run.main()
    names = capsys.readouterr().out.splitlines()
    assert TINY in names
    assert all(name.startswith("conv_diagonal/") for name in names)


def test_the_runner_measures_a_case_and_writes_it_down(tmp_path):
    found, table = tmp_path / "found.json", tmp_path / "table.md"
    options = ("--quick", "--threads", 2, "--peers", "numpy", "--json", found, "--markdown", table)
    command = [sys.executable, "-m", "benchmarks.run", "--case", TINY, *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table.read_text().strip()
    (case,) = json.loads(found.read_text())["cases"]
    ours = case["implementations"][OURS]
    assert len(ours["seconds"]) >= timing.QUICK.min_rounds
    assert ours["extra_memory"] > 0 or sys.platform != "linux"
    assert case["implementations"]["PyTorch unfold + einsum"]["skipped"] == report.NOT_ASKED_FOR
    assert [target["is_met"] is None for target in case["targets"]] == [False, True, True]


# ---------------------------------------------------------------------------------------------
# The parts, without processes


@pytest.fixture
def served(monkeypatch):
    """Ask a worker that serves this program, in a thread."""
    threads = []

    def start(program):
        case = Case("a/case", (Implementation(OURS, "kfac_xp", lambda: program),))
        monkeypatch.setattr("benchmarks.cases.find_case", lambda name: case)
        here, there = Pipe()
        threads.append(threading.Thread(target=worker.serve, args=(there, case.name, OURS)))
        threads[-1].start()
        return here

    yield start
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_worker_checks_times_and_stops(served):
    calls = []
    program = Program(
        lambda: calls.append(1) or len(calls), lambda n: {"n": np.asarray(n)}, note="words"
    )
    connection = served(program)
    assert connection.recv() == ("ok", "words")
    connection.send(("check",))
    state, (seconds, arrays, expected) = connection.recv()
    assert (state, arrays, expected) == ("ok", {"n": 1}, None)
    assert seconds >= 0
    connection.send(("time", 3, 2))
    state, seconds = connection.recv()
    assert (state, len(seconds), len(calls)) == ("ok", 3, 1 + 2 + 3)
    connection.send(("stop",))


def test_a_worker_says_why_it_failed(served):
    def call():
        raise MemoryError("too\nlarge")

    connection = served(Program(call))
    connection.recv()
    connection.send(("check",))
    assert connection.recv() == ("failed", "MemoryError: too large")


class FakeWorker:
    """Answers with the arrays that it was given."""

    def __init__(self, arrays, expected=None):
        self.answer, self.is_stopped = (0.1, arrays, expected), False

    def wait(self, what):
        return ""

    def ask(self, *message):
        return self.answer

    def stop(self):
        self.is_stopped = True


def test_whoever_computes_something_else_is_not_timed():
    right, wrong = {"x": np.asarray([1.0, 2.0])}, {"x": np.asarray([1.0, 2.1])}
    workers = {
        OURS: FakeWorker(right),
        "same": FakeWorker({"x": right["x"] + 1e-7}),
        "other": FakeWorker(wrong),
        "other draws": FakeWorker(wrong, expected=wrong),
        "floor": FakeWorker({}),
    }
    given = dict(workers)
    case = Case("a/case", tuple(Implementation(n, "numpy", lambda: None) for n in workers))
    results = {n: timing.Measurement(case.implementation(n)) for n in workers}
    timing._check(case, workers, results)
    assert set(workers) == {OURS, "same", "other draws", "floor"}
    assert given["other"].is_stopped
    assert results["other"].skipped == "computes something else: relative error 5.0e-02"


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"x": np.asarray([2.0, 4.0])}, 0.0),
        ({"x": np.asarray([2.0, 3.0])}, 0.25),
        ({"x": np.asarray([2.0, 4.0]), "more": np.ones(1)}, 0.0),
        ({"x": np.asarray([2.0, np.nan])}, math.inf),
        ({"x": np.ones((2, 2))}, math.inf),
        ({"y": np.asarray([2.0, 4.0])}, math.inf),
    ],
)
def test_errors_are_relative_to_the_largest_entry(arrays, error):
    assert timing.largest_error(arrays, {"x": np.asarray([2.0, 4.0])}) == error


def measured(**seconds):
    """Results of three rounds."""
    return {
        name: timing.Measurement(
            Implementation(name, "numpy", lambda: None), turns=dict(enumerate(times))
        )
        for name, times in seconds.items()
    }


def test_verdicts_compare_round_by_round_with_the_fastest():
    results = measured(kfac_xp=[1, 2, 4], slow=[9, 18, 36], fast=[4, 8, 12], part=[0.5] * 3)
    targets = (
        Target(("slow", "fast", "away"), at_least=3.5),
        Target(("slow",), at_least=10.0),
        Target(("slow",), median=9.0),
        Target(("slow",), at_least=10.0, beyond="part"),
        Target(("absent",), at_least=1.0),
    )
    case = Case("a/case", (), targets, memory_limit=10**6)
    found = report.verdicts(case, results)
    assert [v.against for v in found] == ["fast", "slow", "slow", "slow", ""]
    assert [v.is_met for v in found] == [True, False, None, True, None]
    assert found[0].ratios[1] == 4.0
    assert found[3].ratios[1] == 35 / 3
    results[OURS].memory = 2 * 10**6
    table = "\n".join(report.case_lines(case, results, found))
    assert "at least 10: MISSED (9.00)" in table
    assert "at least 3.5: met (4.00), without away" in table
    assert "at most 1 MB: MISSED" in table
    medians = "\n".join(report.median_lines([(case, found)]))
    assert "| a | slow | 9.00, 9.00 | median 9 | median met |" in medians
    assert "| a | absent | not measured |" in medians


def test_of_several_bounds_the_slowest_binds():
    results = measured(kfac_xp=[3.0] * 3, copy=[2.0] * 3, product=[0.5] * 3)
    targets = (
        Target(("copy", "product"), at_least=1 / 1.5, slowest=True),
        Target(("copy", "product"), at_least=1 / 1.5),
    )
    found = report.verdicts(Case("a/case", (), targets), results)
    assert [v.against for v in found] == ["copy", "product"]
    assert [v.is_met for v in found] == [True, False]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (30, 90, "MISSED (0.25)"),  # 20 of 80 beyond the result
        (18, 90, "met (0.10)"),
        (30, None, "not measured"),
        (30, 10, "not measured"),  # nothing beyond the result
    ],
)
def test_workspaces_are_compared_beyond_the_result(ours, theirs, words):
    results = measured(kfac_xp=[1.0], other=[1.0])
    results[OURS].memory, results["other"].memory = ours, theirs
    target = MemoryTarget("other", 0.2, result_bytes=10)
    case = Case("a/case", (), memory_targets=(target,))
    table = "\n".join(report.case_lines(case, results, []))
    assert f"at most 0.2 of its workspace: {words}" in table
    share = report.as_json(case, results, [])["workspace_targets"][0]["share"]
    assert (share is None) == (words == "not measured")


def test_rates_are_amounts_over_times():
    copy = Implementation("copy", "numpy", lambda: None, amount=6.0, unit="B/s")
    results = {"copy": timing.Measurement(copy, turns={0: 2.0, 1: 2.0})}
    assert "copy: 3 B/s" in "\n".join(report.case_lines(Case("a/case", (copy,)), results, []))


# ---------------------------------------------------------------------------------------------
# The cases of a GPU, on the host


def test_every_case_of_a_gpu_has_targets_against_what_it_measures():
    found = list(gpu_cases.all_cases(CupyDevice()))
    assert len({case.name for case in found}) == len(found)
    for case in found:
        names = [i.name for i in case.implementations]
        assert len(set(names)) == len(names)
        assert (names[0] == OURS) == (not case.name.startswith("ceilings"))
        for target in (*case.targets, *case.memory_targets):
            against = target.against if isinstance(target, Target) else (target.against,)
            assert set(against) <= set(names)
    targets = {case.name.split("/")[0] for case in found if case.targets}
    assert targets == {"covariance", "conv_diagonal", "kernels", "inverses", "statistics"}
    assert all(case.memory_targets for case in found if case.name.startswith("covariance"))
    bounds = [case.memory_limit for case in found if "T64 C64 O64" in case.name]
    assert len(bounds) == 2, "two numbers of cases"
    assert bounds[0] == bounds[1], "and one bound on memory"


def on_host(pattern):
    """Measurements of NumPy's stand-in, in this process."""
    device = Device()
    effort = timing.Effort(1, 1, 0.0, 60.0, pause=0.0, turn=0.0)
    for case in gpu_cases.matching(device, pattern):
        names = {i.name: "" for i in case.implementations if i.peer != "torch"}
        yield (
            case,
            timing.measure(case, names, effort, memory_of=tuple(names), start=start_on(device)),
        )


def test_programs_of_a_gpu_run_on_numpy():
    found = list(on_host("kernels/*")) + list(on_host("covariance/*"))
    for case, results in found:
        for name, m in results.items():
            assert not m.skipped, (case.name, name, m.skipped)
            assert m.memory >= 0
            assert m.seconds > 0
    (covariance,) = (results for case, results in found if case.name.startswith("covariance"))
    assert all(covariance[f"{OURS}: {method}"].error < 1e-5 for method in ("offsets", "spectral"))
    assert covariance[OURS].memory > 4 * 36**2, "at least the result"
    lines = list(kernels.crossover_lines(found))
    assert len(lines) == 2 + len(found) - 1
    assert any("| squared_outer | N4 T4 D16 C16 |" in line for line in lines)
    assert all("times | " in line for line in lines[2:])


def test_whoever_fails_on_a_device_is_left_out():
    def fail():
        raise MemoryError("too\nlarge")

    case = Case(
        "a/case",
        tuple(
            Implementation(name, "numpy", build)
            for name, build in ((OURS, lambda: Program(lambda: 1)), ("x", fail))
        ),
    )
    effort = timing.Effort(1, 1, 0.0, 60.0, pause=0.0, turn=0.0)
    results = timing.measure(
        case, {OURS: "", "x": ""}, effort, memory_of=(), start=start_on(Device())
    )
    assert results["x"].skipped == "MemoryError: too large"
    assert results[OURS].turns


def test_the_whole_run_of_a_gpu_on_torch(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    found, table = tmp_path / "found.json", tmp_path / "table.md"
    options = ["--gpu", "--namespace", "torch", "--quick", "--seconds", "0"]
    options += ["--json", str(found), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", ["run", *options])
    args = run.parsed()
    run.run(run.gpu_setup(args), args)  # without the limit on threads of `run.main`
    printed = capsys.readouterr().out
    assert printed.strip() == table.read_text().strip()
    assert "no GPU" in printed
    cases = {case["case"]: case for case in json.loads(found.read_text())["cases"]}
    assert set(cases) == {case.name for case in gpu_cases.all_cases(TorchDevice())}
    for case in cases.values():
        for name, m in case["implementations"].items():
            is_left_out = name in (kernels.KERNEL, *graphs.GRAPHS)
            assert bool(m["skipped"]) == is_left_out, m["skipped"]


def test_a_calibration_that_fails_is_told(monkeypatch):
    """And ends nothing: a kernel that does not compile is no reason to measure nothing."""

    def calibrate(keep):
        raise RuntimeError("no NVVM")

    monkeypatch.setattr(kfac_xp, "calibrate", calibrate)
    assert run.calibrated() == "failed: RuntimeError: no NVVM"


def test_without_a_gpu_the_run_says_so(monkeypatch):
    if not CupyDevice().why_unusable():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["run", "--gpu"])
    with pytest.raises(SystemExit, match=r"CuPy.*`--namespace numpy` checks the programs"):
        run.main()


def test_the_high_water_mark_of_a_pool():
    """Beyond what was in use before; memory of before may be freed, an allocation may fail."""
    hook = high_water(SimpleNamespace(cuda=SimpleNamespace(MemoryHook=object)))
    hook.free_postprocess(device_id=0, mem_size=512, mem_ptr=1, pmem_id=1)
    for size, pointer in ((1024, 2), (2048, 3), (2**40, 0)):
        hook.malloc_postprocess(device_id=0, size=1, mem_size=size, mem_ptr=pointer, pmem_id=1)
    hook.free_postprocess(device_id=0, mem_size=2048, mem_ptr=3, pmem_id=1)
    hook.malloc_postprocess(device_id=0, size=1, mem_size=512, mem_ptr=4, pmem_id=1)
    assert hook.peak == 1024 + 2048 - 512


@pytest.mark.gpu
def test_a_gpu_is_measured():
    device = CupyDevice()
    if why := device.why_unusable():
        pytest.skip(why)
    x = device.draw(1000, 256)
    assert device.draw(1000, 256) is x
    assert device.peak_bytes(lambda: x + 1) == 4 * 1000 * 256
    assert device.peak_bytes(lambda: (x + 1) + 1) == 2 * 4 * 1000 * 256
    assert device.seconds(lambda: x + 1, 3) > 0
    assert device.description()
    if not device.why_without_torch():
        tensor = device.as_torch(x)
        assert tensor.is_cuda
        assert tensor.data_ptr() == x.data.ptr
        assert device.peak_bytes(lambda: tensor + 1) == 4 * 1000 * 256
    device.forget()


def test_the_network_is_a_resnet_50():
    layers = networks.ResNet().layers()
    shapes = [
        (layer.k**2 * layer.c_in, layer.c_out)
        if isinstance(layer, networks.Conv)
        else (layer.d_in + 1, layer.d_out)
        for layer in layers
    ]
    assert sorted(shapes) == sorted(resnet50_layers())
    filters = [(layer.h, layer.c_in) for layer in layers[1:-1] if layer.k == 3]
    assert filters == [
        *[(56, 64)] * 3,
        *[(56, 128), *[(28, 128)] * 3],
        *[(28, 256), *[(14, 256)] * 5],
        *[(14, 512), *[(7, 512)] * 2],
    ]


def test_the_modules_have_the_layers_that_are_registered():
    """Names, parameters, and what each convolution is given and gives."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    network = networks.ResNet(blocks=(2, 1), width=4, h=35, classes=5)
    module = network.module()
    seen = {}
    convolutions = {
        name.rpartition(".")[2]: m
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.Conv2d)
    }
    for name, m in convolutions.items():
        m.register_forward_hook(
            lambda m, x, y, name=name: seen.update({name: (tuple(x[0].shape), tuple(y.shape))})
        )
    module(torch.zeros(2, 3, 35, 35))
    layers = [layer for layer in network.layers() if isinstance(layer, networks.Conv)]
    assert set(seen) == {layer.name for layer in layers}
    for layer in layers:
        assert seen[layer.name] == (
            (2, layer.c_in, layer.h, layer.h),
            (2, layer.c_out, layer.h_out, layer.h_out),
        )
        pads = ((layer.k // 2,) * 2,) * 2
        ours = geometry.ConvGeometry.create((layer.k,) * 2, (layer.stride,) * 2, pads)
        assert ours.output_shape((layer.h,) * 2) == (layer.h_out,) * 2
        assert tuple(convolutions[layer.name].weight.shape[2:]) == (layer.k,) * 2
    assert (module.fc.in_features, module.fc.out_features) == (32, 5)
    transformer = networks.Transformer(depth=2, d=8, heads=2, sequence=3)
    linear = [m for m in transformer.module().modules() if isinstance(m, torch.nn.Linear)]
    shapes = [(m.in_features, m.out_features) for m in linear]
    assert shapes == [(layer.d_in, layer.d_out) for layer in transformer.layers()]
    assert transformer.module()(torch.zeros(2, 3, 8)).shape == (2, 3, 8)


def test_errors_of_low_rank(monkeypatch):
    """The diagonal has no error on the diagonal, nor the highest rank any; more rank is nearer."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    low_rank = importlib.import_module("benchmarks.low_rank")
    params = low_rank.initial_params(np.random.default_rng(0))
    data = np.random.default_rng(1)
    images = data.normal(size=(30, 8, 8, 1)).astype(np.float32)
    labels = data.integers(0, 10, size=30)
    monkeypatch.setattr(low_rank, "RANKS", (1, 10, 60))
    num_params, results = low_rank.compare("first", params, images, labels, 3, 20, 0)
    assert num_params == 120
    errors = [results[f"low_rank, {rank}"].matrix for rank in (1, 10, 60)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
    assert results["low_rank, 60"].directions[0] < 1e-5
    assert [results[f"low_rank, {r}"].kept for r in (1, 10)] == [120 * 2 * 4, 120 * 11 * 4]
    lines = list(low_rank.table(num_params, results))
    assert len({line.count("|") for line in lines}) == 1


def test_warm_starts_in_training():
    """One epoch of one group: its runs start alike, and every fall-back is counted."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    warm_starts = importlib.import_module("benchmarks.warm_starts")
    args = argparse.Namespace(epochs=1, seed=0, invert_every=1, decay=0.95, damping=0.01)
    lines = list(warm_starts.compare("EKFAC", warm_starts.Digits.load(np), args))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in rows] == ["eigh", "refinement", "orthogonal_iteration"]
    assert all(len(row) == len(warm_starts.HEAD) for row in rows)
    cold, *warm = rows
    assert cold[3] == "1.00"
    for row in warm:
        assert float(cold[4]) < 1e-4 < float(row[4]) <= 1e-1
        assert re.fullmatch(r"\d+ of 16", row[6])  # 8 factors, 3 updates, the first one cold
        assert 0.5 < float(cold[7]) / float(row[7]) < 2


def test_eigenbases_by_size():
    """Each method from its own last basis; none falls back, and the residuals are those read."""
    eigenbases = importlib.import_module("benchmarks.eigenbases")
    args = argparse.Namespace(batch=64, seed=0, every=1, updates=2, methods=eigenbases.METHODS)
    found = eigenbases.measure(24, "float64", args)
    assert [len(seconds) for seconds, _, _ in found.values()] == [2, 2, 2]
    assert [falls for _, _, falls in found.values()] == [0, 0, 0]
    residuals = {method: residuals for method, (_, residuals, _) in found.items()}
    assert residuals["eigh"] == []
    assert 0 < max(residuals["refinement"]) < max(residuals["orthogonal_iteration"]) < 0.1


def test_the_quality_of_bases():
    """The exact basis leaves nothing; one that is turned is farther from it the more so."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    quality = importlib.import_module("benchmarks.basis_quality")
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 4, 1)) @ rng.normal(size=(30, 1, 3))
    bases = [np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3)]
    damping, n = 0.1, 30
    flat = grads.reshape(n, -1)
    exact, basis = flat.T @ flat / n, np.kron(*bases)
    s = np.diag(basis.T @ exact @ basis)
    mean = grads.mean(axis=0)
    distance, direction = quality.qualities(grads, mean, bases, damping)
    ekfac = (basis * s) @ basis.T
    assert np.isclose(distance, np.linalg.norm(exact - ekfac) / np.linalg.norm(exact))
    a, b = (np.linalg.solve(m + damping * np.eye(12), mean.ravel()) for m in (ekfac, exact))
    assert np.isclose(direction, np.linalg.norm(a - b) / np.linalg.norm(b))
    cov = exact[:4, :4]
    history = [[(cov, damping), (exact[:3, :3], damping)]] * (quality.LONGEST + 1)
    left = {k: quality.residual(cov, u[0], damping) for k, u in quality.kinds(history, rng)}
    assert left["`eigh`"] < 1e-12
    assert left["`refinement`, every 5"] < 1e-12
    assert left["`eigh`, turned by 0.03"] < left["`eigh`, turned by 1"]


def test_rare_ids():
    """Ids are unknown only where statistics are rarer than steps; controls do what they say."""
    rare_ids = importlib.import_module("benchmarks.rare_ids")
    found = {
        name: rare_ids.train("kron_in_diag", 0.01, (3, 3), 3, 0, **settings)
        for name, settings in rare_ids.WAYS.items()
    }
    assert rare_ids.train("ekfac", 0.01, (3, 1), 3, 0).unknown == 0
    assert found["as it is"].unknown > 0
    assert found["zeroed"].unknown == 0 < found["zeroed"].known
    assert found["frozen"][2:] == (0, 0)
    assert found["true frequencies"].unknown < found["as it is"].unknown
    lines = list(rare_ids.table("ekfac", (0.1,), 1, range(1), {"as it is": {}}))
    assert [line.count("|") for line in lines] == [8] * 5
