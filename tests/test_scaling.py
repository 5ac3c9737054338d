"""The model of a data-parallel step, against values worked out by hand."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.cases.inverses import resnet50_layers
from benchmarks.scaling import (
    ALONE,
    COMM_OPT,
    MEM_OPT,
    Layer,
    Machine,
    Strategy,
    Training,
    predict,
)
from benchmarks.scaling.__main__ import ASSUMED, RANKS, llama2_7b, main, resnet50
from benchmarks.scaling.model import fused
from kfac_xp.distributed import Form
from kfac_xp.distributed.buffers import buckets

RESULT = Path(__file__).parent.parent / "benchmarks/results/scaling-on-paper-2026-11-21.md"
HALF = Strategy(Fraction(1, 2))

# Costs of the factors: 8 and 1, 1 and 1.
LAYERS = [
    Layer("x", "kronecker", 2, 1, 2, 1),
    Layer("norm", "diagonal", 1, 3, 5, 0),
    Layer("y", "kronecker", 1, 1, 1, 3),
    Layer("head", "excluded", 2, 2, 4, 1),
]
UNIT = Machine("ones", 1, 1, 1, 1, bandwidth=1, latency=0, call_seconds=0)
LATE = replace(UNIT, latency=1)
BUSY = replace(UNIT, call_seconds=1)
EVERY = Training(batch_per_rank=2, cov_update_every=1, invert_every=1, itemsize=1, bucket_bytes=99)


def test_arithmetic():
    whole = predict(LAYERS, UNIT, 4, COMM_OPT, EVERY)
    assert whole.forward_backward == 6 * 2 * (1 * 2 * 1 + 3 * 1 * 1 + 1 * 2 * 2)
    assert whole.statistics == 2 * 2 * (1 * (4 + 1) + 3 * (1 + 1))
    assert whole.inversion == 8
    assert whole.preconditioning == 2 * 2 * 1 * 3 + 2 * 1 * 1 * 2
    assert predict(LAYERS, UNIT, 4, ALONE, EVERY).inversion == 8 + 1 + 1 + 1
    # Each on a rank: the first layer, with 8 + 1, then the second.
    parts = predict(LAYERS, UNIT, 4, MEM_OPT, EVERY)
    assert (parts.inversion, parts.preconditioning) == (9, 12)
    assert (parts.statistics, parts.forward_backward) == (whole.statistics, whole.forward_backward)
    # The first layer's factors on ranks 0 and 2.
    parts = predict(LAYERS, UNIT, 4, HALF, EVERY)
    assert (parts.inversion, parts.preconditioning) == (8, 12)


def test_calls():
    busy = predict(LAYERS, BUSY, 4, MEM_OPT, EVERY)
    assert (busy.statistics, busy.inversion, busy.preconditioning) == (44 + 4, 9 + 2, 12 + 2)
    assert predict(LAYERS, BUSY, 4, ALONE, EVERY).inversion == 11 + 4
    assert predict(LAYERS, BUSY, 4, COMM_OPT, EVERY).preconditioning == 16 + 4


def test_rates():
    machine = Machine("powers", 2, 4, 8, 16, bandwidth=32, latency=0, call_seconds=0)
    fast, slow = (predict(LAYERS, m, 4, COMM_OPT, EVERY) for m in (machine, UNIT))
    assert fast.forward_backward == slow.forward_backward / 2
    assert fast.statistics == slow.statistics / 4
    assert fast.preconditioning == slow.preconditioning / 4
    assert fast.inversion == slow.inversion / 8
    assert fast.gradients == slow.gradients / 32
    assert fast.inverses == slow.inverses / 32
    eigh = replace(EVERY, method="eigh")
    assert predict(LAYERS, machine, 4, COMM_OPT, eigh).inversion == 9 * 8 / 16


def test_sums():
    # A ring of 4: 6 times a latency and a quarter of 12 bytes; of 3 + 1, then of 1 + 5 + 1.
    for machine, latency in ((UNIT, 0), (LATE, 1)):
        for strategy in (ALONE, COMM_OPT, HALF, MEM_OPT):
            cost = predict(LAYERS, machine, 4, strategy, EVERY)
            assert cost.gradients == 6 * (latency + 3)
            assert cost.triangles == 6 * (2 * latency + 11 / 4)


def test_packing():
    slow = replace(UNIT, packing=0.5)
    for strategy in (COMM_OPT, HALF, MEM_OPT):
        free, packed = (predict(LAYERS, m, 4, strategy, EVERY) for m in (UNIT, slow))
        # Triangles of 3, 1, 5, 1 and 1 bytes; inverses of 3 + 1 + 1 + 1, half of them, or none.
        assert packed.triangles - free.triangles == 11 / 0.5
        inverses = {COMM_OPT: 6, HALF: 4, MEM_OPT: 0}[strategy]
        assert packed.inverses - free.inverses == inverses / 0.5
        assert packed.gradients == free.gradients
    assert predict(LAYERS, slow, 1, COMM_OPT, EVERY).triangles == 0


def test_further_backward_passes():
    cost = predict(LAYERS, UNIT, 4, COMM_OPT, replace(EVERY, backward_passes=2))
    assert cost.statistics == 44 + 2 * 108 / 3
    assert cost.forward_backward == 108


def test_gathering():
    # Triangles of 3, 1, 1, 1 entries, each on another of 4 ranks: the second receives 5.
    assert predict(LAYERS, UNIT, 4, COMM_OPT, EVERY).inverses == 5
    assert predict(LAYERS, LATE, 4, COMM_OPT, EVERY).inverses == 3 + 5
    # Gradients of 2 bytes and 1 from their workers: the others receive 3.
    assert predict(LAYERS, UNIT, 4, MEM_OPT, EVERY).directions == 3
    assert predict(LAYERS, LATE, 4, MEM_OPT, EVERY).directions == 3 + 3
    # In pairs: 3 bytes for 1, 2 for 1.
    half = predict(LAYERS, LATE, 4, HALF, EVERY)
    assert (half.inverses, half.directions) == (1 + 3, 1 + 2)
    for strategy, name in ((MEM_OPT, "inverses"), (COMM_OPT, "directions"), (ALONE, "inverses")):
        for exchange in ("gather", "broadcasts"):
            training = replace(EVERY, exchange=exchange)
            assert getattr(predict(LAYERS, LATE, 4, strategy, training), name) == 0


def test_broadcasts():
    training = replace(EVERY, exchange="broadcasts")
    # To 4: two levels of a tree, or 5 messages that move 3/2 of the bytes.
    assert predict(LAYERS, UNIT, 4, COMM_OPT, training).inverses == 1.5 * (3 + 1 + 1 + 1)
    assert predict(LAYERS, LATE, 4, COMM_OPT, training).inverses == 2 * (4 + 2 + 2 + 2)
    assert predict(LAYERS, UNIT, 4, MEM_OPT, training).directions == 1.5 * (2 + 1)
    assert predict(LAYERS, LATE, 4, MEM_OPT, training).directions == 2 * (3 + 2)
    half = predict(LAYERS, LATE, 4, HALF, training)
    assert (half.inverses, half.directions) == (4 + 2, 3 + 2)
    # 3 bytes as 2 and 1.
    small = replace(training, bucket_bytes=2)
    assert predict(LAYERS, LATE, 4, COMM_OPT, small).inverses == 2 * (3 + 2 + 2 + 2 + 2)


def test_buckets():
    # Gradients of 2, 5, 1, 4 bytes: 2; 5; 1 and 4. Triangles: 3 and 1; 1; 5; 1.
    cost = predict(LAYERS, LATE, 4, COMM_OPT, replace(EVERY, bucket_bytes=5))
    assert cost.gradients == 3 * 6 + 18
    assert cost.triangles == 4 * 6 + 16.5
    # 5 bytes are too large for a bucket, and go by themselves.
    cost = predict(LAYERS, LATE, 4, COMM_OPT, replace(EVERY, bucket_bytes=4))
    assert cost.gradients == 4 * 6 + 18


def test_messages_are_those_of_the_library(rng):
    for _ in range(20):
        sizes = [int(n) for n in rng.integers(1, 40, size=12)]
        forms = [Form((n,), "float32") for n in sizes]
        sent = [sum(4 * sizes[i] for i in group) for group in buckets(forms, 200)]
        assert fused([4 * n for n in sizes], 200) == sent


def test_memory():
    for strategy, served in ((ALONE, 7), (COMM_OPT, 7), (HALF, 5), (MEM_OPT, 5)):
        cost = predict(LAYERS, UNIT, 4, strategy, replace(EVERY, itemsize=2))
        assert cost.averages_bytes == 2 * 12
        assert cost.served_bytes == 2 * served
        assert cost.transient_bytes == 2 * (12 + 11)
        assert cost.bytes == 2 * (12 + served + 23)
    wide = [*LAYERS, Layer("embeddings", "excluded", 9, 9, 81, 0)]
    assert predict(wide, UNIT, 4, MEM_OPT, EVERY).transient_bytes == 12 + 81


def test_eigenvectors():
    cost = predict(LAYERS, UNIT, 4, COMM_OPT, replace(EVERY, method="eigh"))
    assert (cost.inversion, cost.preconditioning) == (72, 32)
    assert cost.inverses == 6 + 2 + 2  # whole, with the eigenvalues
    assert cost.served_bytes == 6 + 2 + 2 + 2


def test_schedules_and_sums():
    often = predict(LAYERS, LATE, 4, HALF, EVERY)
    seldom = replace(EVERY, cov_update_every=2, invert_every=4)
    cost = predict(LAYERS, LATE, 4, HALF, seldom)
    assert (cost.statistics, cost.triangles) == (often.statistics / 2, often.triangles / 2)
    assert (cost.inversion, cost.inverses) == (often.inversion / 4, often.inverses / 4)
    assert (cost.preconditioning, cost.directions) == (often.preconditioning, often.directions)
    assert often.sgd_seconds == 108 + 24
    assert often.seconds == 108 + 24 + 44 + 28.5 + 8 + 4 + 12 + 3


def test_one_rank_sends_nothing():
    cost = predict(LAYERS, LATE, 1, COMM_OPT, EVERY)
    assert cost.gradients == cost.triangles == cost.inverses == cost.directions == 0
    assert cost.transient_bytes == 12
    assert cost.inversion == 11
    without = predict(LAYERS[1::2], LATE, 2, MEM_OPT, EVERY)
    assert without.served_bytes == without.directions == without.inversion == 0
    with pytest.raises(ValueError, match="`grad_worker_fraction`"):
        predict(LAYERS, UNIT, 3, HALF, EVERY)


def test_the_networks_are_the_real_ones():
    layers = resnet50()
    assert sum(layer.parameters for layer in layers) == 25_557_032
    kronecker = [layer for layer in layers if layer.kind == "kronecker"]
    found = sorted((layer.d_in, layer.d_out) for layer in kronecker)
    assert found == sorted(resnet50_layers())
    products = sum(layer.locations * layer.parameters for layer in kronecker)
    assert products == pytest.approx(4.09e9, rel=1e-3)
    layers = llama2_7b()
    assert sum(layer.parameters for layer in layers) == 6_738_415_616
    assert sum(layer.kind == "kronecker" for layer in layers) == 7 * 32


def test_memory_is_least_with_one_worker():
    for layers in (resnet50(), llama2_7b()):
        for ranks in RANKS:
            costs = [predict(layers, ASSUMED, ranks, s) for s in (MEM_OPT, HALF, COMM_OPT)]
            held = [cost.served_bytes for cost in costs]
            assert held == sorted(held)
            assert len({cost.averages_bytes for cost in costs}) == 1


def test_the_program_writes_what_is_in_the_results(tmp_path, capsys):
    main(["--markdown", str(tmp_path / "found.md")])
    text = capsys.readouterr().out
    assert (tmp_path / "found.md").read_text().endswith(text)
    assert text in RESULT.read_text()
    main(["--method", "eigh", "--exchange", "broadcasts"])
    other = capsys.readouterr().out
    assert "eigenvectors 9 n^3" in other
    assert "one rank after the other" in other
