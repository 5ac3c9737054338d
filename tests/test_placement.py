"""Who inverts what: bounds that can be proved, and the reference's order."""

import itertools
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from kfac_xp.distributed.placement import place, worker_fractions
from tests.generated import given, settings, strategies

ROOT = Path(__file__).parent.parent

SMALL = {"conv": {"A": 2, "G": 5}, "norm": {}, "mid": {"A": 4, "G": 1}, "fc": {"A": (2, 3)}}
"""Costs 8, 125; none; 64, 1; 54."""

SIZES = strategies.integers(1, 9) | strategies.tuples(
    strategies.integers(1, 3), strategies.integers(1, 9)
)
LAYERS = strategies.dictionaries(
    strategies.text("abcxyz", min_size=1, max_size=4),
    strategies.dictionaries(strategies.sampled_from("AGS"), SIZES, max_size=3),
    max_size=9,
)
WORLDS = strategies.integers(1, 12).flatmap(
    lambda ranks: strategies.tuples(
        strategies.just(ranks),
        strategies.sampled_from([w for w in range(1, ranks + 1) if ranks % w == 0]),
    )
)
"""(ranks, gradient workers)."""
STRATEGIES = strategies.sampled_from(["greedy", "round_robin"])


def costs_of(sizes):
    """{(layer, factor): batch * n**3}, by itself."""
    found = {}
    for layer, factors in sizes.items():
        for factor, size in factors.items():
            batch, n = size if isinstance(size, tuple) else (1, size)
            found[layer, factor] = batch * n * n * n
    return found


@settings(deadline=None, max_examples=60)
@given(LAYERS, WORLDS, STRATEGIES)
def test_every_factor_is_placed_once_and_every_rank_is_served(sizes, world, strategy):
    ranks, workers = world
    placement = place(sizes, ranks, workers / ranks, strategy)
    costs = costs_of(sizes)
    everyone = range(ranks)
    inverted = [job for rank in everyone for job in placement.inversions(rank)]
    assert sorted(inverted) == sorted(costs)
    for layer, factor in costs:
        rank = placement.inverse_rank(layer, factor)
        assert (layer, factor) in placement.inversions(rank)
        assert rank in placement.gradient_workers(layer)
    for rank in everyone:
        assert placement.load(rank) == sum(costs[job] for job in placement.inversions(rank))
    assert placement.layers == tuple(sizes)
    for layer, factors in sizes.items():
        assert placement.factors(layer) == tuple(factors)
        group = placement.gradient_workers(layer)
        assert len(group) == (workers if factors else ranks)
        assert group == tuple(sorted(group))
        # What is sent reaches every rank that is no worker exactly once, and no other.
        sent = [other for rank in everyone for other in placement.receivers(layer, rank)]
        assert sorted(sent) == sorted(set(everyone) - set(group))
        for rank in everyone:
            source = placement.source(layer, rank)
            assert source in group
            assert (source == rank) == placement.is_gradient_worker(layer, rank) == (rank in group)
            assert source == rank or rank in placement.receivers(layer, source)
            assert (layer in placement.preconditions(rank)) == (rank in group)
            if factors and source == rank:
                assert placement.worker_group(rank) == group
    for groups, size in ((placement.worker_groups, workers), (placement.receiver_groups, None)):
        assert sorted(itertools.chain(*groups)) == list(everyone)
        assert {len(group) for group in groups} == {size or ranks // workers}
    for rank in everyone:
        shared = set(placement.worker_group(rank)) & set(placement.receiver_group(rank))
        assert shared == {rank}
    assert placement.sends_inverses == (workers > 1)
    assert placement.sends_gradients == (workers < ranks)
    assert all(name in str(placement) for name in sizes)


@settings(deadline=None, max_examples=60)
@given(LAYERS, WORLDS)
def test_greedy_loads_are_bounded(sizes, world):
    # The last job on the fullest of m bins went where least lay, which was at most the mean of
    # the others: mean + (1 - 1/m) * job. Once for layers on groups, once for factors on ranks.
    ranks, workers = world
    groups = ranks // workers
    placement = place(sizes, ranks, workers / ranks)
    costs = costs_of(sizes)
    largest_layer = max((sum(costs[x, f] for f in sizes[x]) for x in sizes), default=0)
    largest = max(costs.values(), default=0)
    group = Fraction(sum(costs.values()), groups) + (1 - Fraction(1, groups)) * largest_layer
    bound = group / workers + (1 - Fraction(1, workers)) * largest
    assert max(placement.loads) <= bound


def best_load(costs, ranks):
    """The smallest largest load, by trying everything."""
    best = sum(costs)
    for assignment in itertools.product(range(ranks), repeat=len(costs)):
        loads = [0] * ranks
        for rank, cost in zip(assignment, costs, strict=True):
            loads[rank] += cost
        best = min(best, max(loads))
    return best


@settings(deadline=None, max_examples=40)
@given(strategies.lists(strategies.integers(1, 20), min_size=1, max_size=6))
def test_longest_first_is_close_to_the_best(costs):
    for ranks in (2, 3):
        limit = (Fraction(4, 3) - Fraction(1, 3 * ranks)) * best_load(costs, ranks)
        factors = {f"{i}": {"A": cost} for i, cost in enumerate(costs)}
        for fraction in (1, Fraction(1, ranks)):
            loads = place(factors, ranks, fraction, cost=lambda batch, n: n).loads
            assert max(loads) <= limit


@settings(deadline=None, max_examples=40)
@given(LAYERS, WORLDS, STRATEGIES)
def test_memory_is_divided_by_the_number_of_groups(sizes, world, strategy):
    ranks, workers = world
    total = 0
    for factors in sizes.values():
        for size in factors.values():
            batch, n = size if isinstance(size, tuple) else (1, size)
            total += batch * n * n
    held = [place(sizes, ranks, workers / ranks, strategy).served_entries(r) for r in range(ranks)]
    assert sum(held) == workers * total
    assert max(held) <= total
    everything = place(sizes, ranks, 1, strategy)
    assert {everything.served_entries(rank) for rank in range(ranks)} == {total}


@settings(deadline=None, max_examples=40)
@given(LAYERS, WORLDS)
def test_round_robin_is_the_references(sizes, world):
    ranks, workers = world
    groups = ranks // workers
    # Factor i on rank i % R, where all ranks get all inverses.
    jobs = [(layer, factor) for layer, factors in sizes.items() for factor in factors]
    placement = place(sizes, ranks, 1, "round_robin")
    for job, rank in zip(jobs, itertools.cycle(range(ranks)), strict=False):
        assert placement.inverse_rank(*job) == rank
    # Block j transformed on rank j % R, and on group j % groups where there are several workers.
    placement = place(sizes, ranks, workers / ranks, "round_robin")
    divided = [layer for layer in sizes if sizes[layer]]
    for layer, column in zip(divided, itertools.cycle(range(groups)), strict=False):
        assert column in placement.gradient_workers(layer)


@settings(deadline=None, max_examples=25)
@given(LAYERS, WORLDS, STRATEGIES)
def test_calls_do_not_depend_on_each_other(sizes, world, strategy):
    ranks, workers = world
    first = place(sizes, ranks, workers / ranks, strategy)
    place({"other": {"A": 7}}, 3)
    assert place(sizes, ranks, Fraction(workers, ranks), strategy) == first


def test_processes_agree_whatever_their_hashes():
    code = (
        "from kfac_xp.distributed.placement import place;"
        "sizes = {f'layer{i}': {'A': 3 + i % 4, 'G': 3} for i in range(9)};"
        "print(place(sizes, 6, 0.5, cost=lambda batch, n: 0.1 * n))"
    )
    said = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        said.add(subprocess.check_output(command, cwd=ROOT, env=environment, text=True))
    assert len(said) == 1


def test_a_small_case_by_hand():
    # Layers 133, 65, 54 to groups (0, 2), (1, 3): 133 to the first, 65 to the second, and 54,
    # since 65 < 133, to the second too. Within: 125, 8 to ranks 0, 2; 64, 54, 1 to 1, 3, 3.
    placement = place(SMALL, 4, 0.5)
    assert placement.gradient_workers("conv") == (0, 2)
    assert placement.gradient_workers("mid") == placement.gradient_workers("fc") == (1, 3)
    assert placement.loads == (125, 64, 8, 55)
    assert placement.load(3) == 55
    assert placement.inversions(3) == (("mid", "G"), ("fc", "A"))
    assert [placement.source("conv", rank) for rank in range(4)] == [0, 0, 2, 2]
    assert [placement.source("mid", rank) for rank in range(4)] == [1, 1, 3, 3]
    assert [placement.source("norm", rank) for rank in range(4)] == [0, 1, 2, 3]
    assert placement.preconditions(1) == ("norm", "mid", "fc")
    assert placement.receivers("mid", 3) == (2,)
    assert placement.receivers("mid", 2) == placement.receivers("norm", 3) == ()
    assert placement.served_entries(0) == 4 + 25
    assert placement.served_entries(3) == 16 + 1 + 2 * 9
    assert str(placement) == "\n".join(
        [
            "HYBRID, greedy; ranks: 4, workers a layer: 2",
            "",
            "layer  factor (size): rank  gradient workers",
            "conv   A (2): 2, G (5): 0   0 2",
            "norm   none                 all",
            "mid    A (4): 1, G (1): 3   1 3",
            "fc     A (2 of 3): 3        1 3",
            "",
            "rank  load  of the largest  inverses  layers  served entries",
            "0     125   100%            1         2       29",
            "1     64    51%             1         3       35",
            "2     8     6%              1         2       29",
            "3     55    44%             2         3       35",
        ]
    )


def test_costs_are_exact():
    # Ten tenths on one rank and one on the other: in floats their sums would depend on the order.
    sizes = {f"{i}": {"A": 1} for i in range(10)}
    placement = place(sizes, 1, cost=lambda batch, n: 0.1)
    assert placement.load(0) == 10 * Fraction(0.1)
    assert place(sizes, 2, cost=lambda batch, n: 0.5).loads == (Fraction(5, 2), Fraction(5, 2))


def test_fractions():
    assert worker_fractions(6) == (Fraction(1, 6), Fraction(1, 3), Fraction(1, 2), Fraction(1))
    for ranks in (1, 3, 6, 49, 1000):
        for fraction in worker_fractions(ranks):
            placement = place(SMALL, ranks, float(fraction))
            assert placement.num_workers == ranks * fraction
    assert place(SMALL, 6, 0).num_workers == place(SMALL, 6, 0.1).num_workers == 1
    assert "MEM-OPT" in str(place(SMALL, 6, 0))
    assert "COMM-OPT" in str(place(SMALL, 6))
    assert "one rank" in str(place(SMALL, 1))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"1/3 \(2\), 1/2 \(3\), 1 \(6\) of 6 ranks.*got 0.4, wh"):
        place(SMALL, 6, 0.4)
    for fraction in (1.5, -0.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="`grad_worker_fraction` must make worker groups"):
            place(SMALL, 6, fraction)
    for ranks in (0, 2.0, True):
        with pytest.raises(ValueError, match="`ranks` must be a positive int; got"):
            place(SMALL, ranks)
    with pytest.raises(ValueError, match="`strategy` must be one of"):
        place(SMALL, 2, strategy="fair")
    for size in (0, 2.5, (0, 3)):
        with pytest.raises(ValueError, match=r"`sizes\['fc'\]\['A'\]` must be a positive int"):
            place({"fc": {"A": size}}, 2)
    with pytest.raises(ValueError, match=r"must be an int n or a pair \(batch, n\)"):
        place({"fc": {"A": (1, 2, 3)}}, 2)
    for cost in (-1, float("inf"), None):
        with pytest.raises(ValueError, match=r"`cost` must return .* \(1, 2\) it returned"):
            place({"fc": {"A": 2}}, 2, cost=lambda batch, n, cost=cost: cost)
    placement = place(SMALL, 2)
    with pytest.raises(KeyError, match="no layer 'cnv' was placed; there are 'conv', 'norm'"):
        placement.gradient_workers("cnv")
    with pytest.raises(KeyError, match="'conv' has no factor 'B'; it has 'A', 'G'"):
        placement.inverse_rank("conv", "B")
    for rank in (-1, 2):
        with pytest.raises(ValueError, match="`rank` must be from 0 to 1; got"):
            placement.load(rank)
