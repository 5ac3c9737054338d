"""The benchmark of several processes: what it counts, and how rates become predictions."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest

import benchmarks.distributed.__main__ as program
from benchmarks.distributed import tables
from benchmarks.distributed.counting import CountingCommunicator, Message
from benchmarks.distributed.problem import QUICK
from benchmarks.distributed.rates import Measured, fitted_link, line, measured_rates
from benchmarks.distributed.timing import Clock
from benchmarks.scaling import COMM_OPT, Training, predict
from kfac_xp.distributed import SingleProcess


def test_two_processes_send_the_least_there_is():
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    try:
        program.mpiexec()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    found = program.measure_bytes((2,), quick=True)[2]
    assert set(found) == {"COMM-OPT", "MEM-OPT"}
    sizes = [(layer.d_in, layer.d_out) for layer in QUICK.described()]
    parameters = 4 * sum(a * g for a, g in sizes)
    triangles = 4 * sum(n * (n + 1) // 2 for pair in sizes for n in pair)
    for placement, kinds in found.items():
        has_inverses = placement == "COMM-OPT"
        assert kinds["gradients"] == [parameters + 8, parameters + 8, 2]
        assert kinds["statistics"] == [triangles, triangles, 2]
        assert kinds["inverses"] == [triangles * has_inverses] * 2 + [int(has_inverses)]
        assert kinds["directions"] == [parameters * (not has_inverses)] * 2 + [1 - has_inverses]
        assert 0 < kinds["control, plain step"][0] < kinds["control, step with inverses"][0] < 4000


def test_counting_passes_everything_on():
    counted = CountingCommunicator(SingleProcess())
    x = np.arange(3.0)
    assert counted.start_sum(x)() is x
    assert counted.split([[0]]).start_gather(x, [3])() is x
    assert counted.broadcast(x) is x
    assert counted.split([[0]]).gather_numbers(x).tolist() == [[0, 1, 2]]
    assert counted.gather_objects({"a": 1}) == [{"a": 1}]
    assert counted.messages[:4] == [
        Message("sum", "all", 24),
        Message("gather", "split 1", 24),
        Message("broadcast", "all", 24),
        Message("control", "split 2", 24),
    ]
    assert [m.how for m in counted.messages[4:]] == ["control"]
    assert counted.describe() == "counted: a single process"


def test_described_layers_are_those_of_the_network():
    params, data = QUICK.params(), QUICK.statistics(2)
    for layer in QUICK.described():
        kernel, bias = params[layer.name]
        assert layer.parameters == kernel.size + bias.size
        assert layer.d_out == bias.size
        _, (grads,) = data[layer.name]
        assert grads.size == 2 * layer.locations * layer.d_out


def test_lines_and_links():
    assert line([[2, 10.0], [4, 16.0]], 3) == 13
    assert line([[2, 10.0], [4, 16.0]], 6) == 22
    assert line([[2, 1.0], [4, 16.0]], 1) == 0
    # A ring of 4: 6 hops of 2 s, or of 2 s and a quarter of 40 bytes at 5 bytes a second.
    assert fitted_link(4, 12.0, 6 * (2.0 + 10 / 5), 40) == (5.0, 2.0)


def test_rates_are_measured_and_become_a_prediction():
    found = measured_rates(Clock(SingleProcess()), QUICK, 1)
    layers = QUICK.described()
    assert set(found["second_moments"]) == set(found["products"]) == set(QUICK.params())
    rows = {n for layer in layers for n in (layer.d_in, layer.d_out)}
    assert {int(n) for n in found["decompositions"]} == rows
    found["second_moments"] = {x.name: [[1, 1.0], [8, 8.0]] for x in layers}
    found["decompositions"] = dict.fromkeys(found["decompositions"], 3.0)
    found["products"] = dict.fromkeys(found["products"], 5.0)
    found["passes"], found["backward"], found["packing"] = (
        [[1, 2.0], [8, 16.0]],
        [[1, 1], [8, 1]],
        4,
    )
    training = Training(batch_per_rank=4, backward_passes=1, cov_update_every=1, invert_every=2)
    cost = predict(layers, Measured(found), 1, COMM_OPT, training)
    assert cost.forward_backward == 8
    assert cost.statistics == 7 * 4 + 1
    assert cost.inversion == 14 * 3 / 2
    assert cost.preconditioning == 7 * 5
    assert cost.seconds == 8 + 29 + 21 + 35
    slow = predict(layers, replace(Measured(found), slowdown=2), 1, COMM_OPT, training)
    assert slow.seconds == 2 * cost.seconds
    triangles = predict(layers, Measured(found, math.inf), 2, COMM_OPT, training).triangles
    assert triangles == sum(2 * n * (n + 1) for x in layers for n in (x.d_in, x.d_out)) / 4


def test_tables():
    steps = {"without": [1.0, 2.0, 9.0], "with": [5.0]}
    assert tables.median_step(steps, 3) == 3
    one = {"statistics": [1.0], "steps, COMM-OPT": steps}
    two = {"statistics": [0.55], "steps, COMM-OPT": {"without": [1.0], "with": [1.0]}}
    (text,) = tables.scaling_table({1: one, 2: two}, 3)
    assert "| 2 | update of statistics | 550.0 | 1.82 | at least 1.7: met |" in text
    assert "| 2 | step, COMM-OPT | 1000.0 | 3.00 |  |" in text
    two["statistics"] = [0.6]
    assert "1.67 | at least 1.7: MISSED" in next(tables.scaling_table({1: one, 2: two}, 3))
    assert tables.compared(2, "step", 1.31, 1.0)[-1].endswith("MISSED")
    assert tables.compared(2, "step", 1.29, 1.0)[-1].endswith("met")
