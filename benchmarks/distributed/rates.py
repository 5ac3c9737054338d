"""How long a rank's parts of a step take here: measured layer by layer, as `predict` takes them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.distributed.problem import CLASSES, Problem
from benchmarks.distributed.timing import Clock
from benchmarks.scaling import Layer, Training
from kfac_xp.distributed import Form
from kfac_xp.distributed.buffers import from_buffer, to_buffer
from kfac_xp.fisher_factors import refresh_factors


def measured_rates(clock: Clock, problem: Problem, repeats: int) -> dict[str, Any]:
    """Seconds of everything that one rank does by itself; lines as [[cases, seconds], ...].

    All ranks call it together, and do the same at the same time, each on its own.
    """
    numbers = (max(1, problem.cases // 8), problem.cases)

    def median(function: Callable[[], Any]) -> float:
        return statistics.median(clock.times(function, repeats))

    params = problem.params()
    found: dict[str, Any] = {"second_moments": {}, "products": {}, "decompositions": {}}
    data = {cases: problem.statistics(cases) for cases in numbers}
    for layer in problem.described():
        estimator = kfac_xp.FisherEstimator(problem.collection(params, layer.name), 1.0)

        def update(cases: int, name: str = layer.name, by: Any = estimator) -> None:
            by.update_cov({name: data[cases][name]})

        found["second_moments"][layer.name] = [[n, median(lambda n=n: update(n))] for n in numbers]
        for factor in estimator.factors:
            rows = str(factor.moment.shape[-1])
            if rows not in found["decompositions"]:
                found["decompositions"][rows] = median(lambda f=factor: refresh_factors([f]))
        estimator.update_inverses()
        vector = {layer.name: params[layer.name]}
        found["products"][layer.name] = median(
            lambda by=estimator, v=vector: by.multiply_inverse(v)
        )

    found["passes"], found["backward"] = [], []
    for cases in numbers:
        images, _ = problem.batch(cases)
        cotangents = np.ones((cases, CLASSES), dtype=np.float32)
        net = problem.linearize(params, images)

        def both(x: Any = images, c: Any = cotangents) -> None:
            problem.linearize(params, x).vjp(c)

        found["passes"].append([cases, median(both)])
        found["backward"].append([cases, median(lambda n=net, c=cotangents: n.vjp(c, False))])

    sizes = [n for layer in problem.described() for n in (layer.d_in, layer.d_out)]
    matrices = [np.eye(n, dtype=np.float32) for n in sizes]
    forms = [Form.of(m, "symmetric") for m in matrices]
    seconds = median(lambda: from_buffer(to_buffer(matrices, forms), forms))
    found["packing"] = sum(4 * form.size for form in forms) / seconds
    return found


def line(points: Sequence[Sequence[float]], cases: float) -> float:
    """The value at `cases` of the line through two points, at least nothing."""
    (n0, y0), (n1, y1) = points
    return max(0.0, y0 + (cases - n0) * (y1 - y0) / (n1 - n0))


@dataclass(frozen=True)
class Measured:
    """What `measured_rates` has found, as `predict` asks for it.

    Parameters
    ----------
    found
        That.
    bandwidth, latency
        Of the link: see `fitted_link`.
    slowdown
        How many processes share a core.
    """

    found: Mapping[str, Any]
    bandwidth: float = math.inf
    latency: float = 0.0
    slowdown: float = 1.0

    @property
    def packing(self) -> float:
        """Bytes per second."""
        return self.found["packing"] / self.slowdown

    def passes(self, layers: Iterable[Layer], t: Training) -> float:
        """Forward and backward, of the whole network."""
        return self.slowdown * line(self.found["passes"], t.batch_per_rank)

    def backward(self, layers: Iterable[Layer], t: Training) -> float:
        """Backward, of the whole network."""
        return self.slowdown * line(self.found["backward"], t.batch_per_rank)

    def second_moments(self, layers: Sequence[Layer], t: Training) -> float:
        """One update of the averages of some layers."""
        lines = self.found["second_moments"]
        return self.slowdown * sum(line(lines[x.name], t.batch_per_rank) for x in layers)

    def decomposition(self, n: int, t: Training) -> float:
        """The inverse of one factor."""
        return self.slowdown * self.found["decompositions"][str(n)]

    def products(self, layers: Sequence[Layer], t: Training) -> float:
        """Preconditioning some layers."""
        return self.slowdown * sum(self.found["products"][layer.name] for layer in layers)


def fitted_link(ranks: int, small: float, large: float, nbytes: int) -> tuple[float, float]:
    """Bandwidth and latency with which a ring takes so long for nothing, and for so many bytes."""
    hops = 2 * (ranks - 1)
    bandwidth = hops * nbytes / ranks / max(large - small, 1e-9)
    return bandwidth, small / hops
