"""One rank: ``mpiexec -n 2 python -m benchmarks.distributed.rank REQUEST``, JSON in and out.

A request is ``{"quick": bool, "tasks": [[name of a task, {argument: value}], ...]}``. Rank 0 prints
a list with what each task has found.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.distributed.counting import CountingCommunicator, Message
from benchmarks.distributed.problem import FULL, QUICK, Problem
from benchmarks.distributed.rates import measured_rates
from benchmarks.distributed.timing import Clock
from kfac_xp.distributed import Communicator

Found = Any
"""What `json` can write."""


def own_part(cases: int, ranks: Communicator) -> slice:
    """The cases of a batch that are this rank's."""
    return slice(cases * ranks.rank // ranks.size, cases * (ranks.rank + 1) // ranks.size)


def bytes_by_kind(ranks: Communicator, problem: Problem, *, fraction: float) -> Found:
    """Bytes and messages of a step of each kind, and the least, on the rank that has most."""
    counted = CountingCommunicator(ranks)
    params = problem.params()
    due = {0: (True, True), 1: (False, False), 2: (True, False), 3: (False, True)}
    optimizer = kfac_xp.KfacOptimizer(
        problem.collection(params),
        learning_rate=1e-3,
        damping=1.0,
        cov_update_every=lambda step: due[step][0],
        invert_every=lambda step: due[step][1],
        communicator=counted,
        grad_worker_fraction=fraction,
    )
    part = own_part(problem.cases, ranks)
    images, labels = problem.batch(problem.cases)
    steps: list[list[Message]] = []
    for _ in due:
        counted.messages.clear()
        net = problem.linearize(params, images[part])
        params, _ = optimizer.step(params, net, labels[part])
        steps.append(list(counted.messages))
    _, plain, with_statistics, with_inverses = steps
    gradients = [m.nbytes for m in plain if m.how == "sum"]
    sums = [m.nbytes for m in with_statistics if m.how == "sum"]
    for nbytes in gradients:
        sums.remove(nbytes)
    # `SharedWork` splits off the worker groups first, then the receiver groups.
    inverses = [m.nbytes for m in with_inverses if m.how == "gather" and m.group != "split 2"]
    directions = [m.nbytes for m in plain if m.how == "gather" and m.group == "split 2"]
    control = {
        f"control, {kind}": [m.nbytes for m in step if m.how == "control"]
        for kind, step in (
            ("plain step", plain),
            ("step with statistics", with_statistics),
            ("step with inverses", with_inverses),
        )
    }
    placement = optimizer.estimator.placement
    triangles = {
        layer.name: 4 * sum(n * (n + 1) // 2 for n in (layer.d_in, layer.d_out))
        for layer in problem.described()
    }
    mine = sum(triangles[name] for name in placement.preconditions(ranks.rank))
    in_full = 4 * sum(layer.parameters for layer in problem.described())
    least = {
        "gradients": in_full + 8,  # and the loss, in float64
        "statistics": sum(triangles.values()),
        "inverses": mine * placement.sends_inverses,
        "directions": in_full * placement.sends_gradients,
    }
    found = {
        "gradients": gradients,
        "statistics": sums,
        "inverses": inverses,
        "directions": directions,
        **control,
    }
    row = {kind: (sum(x), least.get(kind), len(x)) for kind, x in found.items()}
    rows = ranks.gather_objects(row)
    return {kind: max(other[kind] for other in rows) for kind in row}


def statistics_update(ranks: Communicator, problem: Problem, *, repeats: int) -> Found:
    """Seconds of each of several updates of all statistics, from arrays."""
    part = own_part(problem.cases, ranks)
    data = problem.statistics(part.stop - part.start)
    estimator = kfac_xp.FisherEstimator(
        problem.collection(problem.params()), 1.0, communicator=ranks
    )
    return Clock(ranks).times(lambda: estimator.update_cov(data), repeats, untimed=2)


def steps(
    ranks: Communicator, problem: Problem, *, fraction: float, repeats: int, invert_every: int
) -> Found:
    """Seconds of steps without inverses, and with them; statistics in every one."""
    params = problem.params()
    optimizer = kfac_xp.KfacOptimizer(
        problem.collection(params),
        learning_rate=1e-4,
        damping=1.0,
        invert_every=invert_every,
        communicator=ranks,
        grad_worker_fraction=fraction,
    )
    part = own_part(problem.cases, ranks)
    images, labels = (a[part] for a in problem.batch(problem.cases))

    def step() -> bool:
        nonlocal params
        net = problem.linearize(params, images)
        params, info = optimizer.step(params, net, labels)
        return info.updated_inverses

    clock = Clock(ranks)
    for _ in range(invert_every):
        step()
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats * invert_every):
        inverted, seconds = clock.timed(step)
        found[inverted].append(seconds)
    return {"without": found[False], "with": found[True]}


def alone(ranks: Communicator, problem: Problem, *, repeats: int) -> Found:
    """What every rank needs for its parts by itself, while the others do the same."""
    return measured_rates(Clock(ranks), problem, repeats)


def link(ranks: Communicator, problem: Problem, *, repeats: int, nbytes: int) -> Found:
    """Seconds of the smallest sum, and of one of so many bytes."""
    clock, found = Clock(ranks), []
    for size in (1, nbytes // 4):
        times = []
        for _ in range(repeats + 2):
            buffer = np.ones(size, dtype=np.float32)
            times.append(clock.timed(lambda b=buffer: ranks.start_sum(b)())[1])
        found.append(statistics.median(times[2:]))
    return found


TASKS: dict[str, Callable[..., Found]] = {
    "bytes": bytes_by_kind,
    "statistics": statistics_update,
    "steps": steps,
    "alone": alone,
    "link": link,
}


def main() -> None:
    """Do what is asked for."""
    request = json.loads(sys.argv[1])
    ranks = kfac_xp.MpiCommunicator()
    problem = QUICK if request["quick"] else FULL
    found = []
    for name, arguments in request["tasks"]:
        start = time.perf_counter()
        found.append(TASKS[name](ranks, problem, **arguments))
        if ranks.rank == 0:
            words = f"ranks: {ranks.size}; {name}: {time.perf_counter() - start:.1f} s"
            print(words, file=sys.stderr, flush=True)
    if ranks.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
