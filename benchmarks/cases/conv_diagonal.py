"""The diagonal of a convolution's Fisher: squared sums over locations of outer products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.peers import backpack_ops, torch_ops
from benchmarks.peers.floors import sgemm_peak, wake_blas
from kfac_xp import ConvGeometry, conv_squared_outer

FLOOR = "weight gradient at the sgemm peak"
TORCH = "PyTorch unfold + einsum"
BACKPACK = "BackPACK SumGradSquared"
FEW_CASES = 8
MEGABYTE = 10**6


@dataclass(frozen=True)
class Problem:
    """A convolution's inputs and the gradients of its preactivations."""

    n: int
    h: int
    c: int
    c_out: int
    k: int = 3
    padding: str = "SAME"

    @property
    def geometry(self) -> ConvGeometry:
        """Stride 1."""
        return ConvGeometry.create((self.k,) * 2, None, self.padding)

    @property
    def locations(self) -> int:
        """Where the filter is applied."""
        return self.geometry.num_locations((self.h, self.h))

    @property
    def flops(self) -> int:
        """Of the layer's weight gradient."""
        return 2 * self.n * self.locations * self.k**2 * self.c * self.c_out

    @property
    def memory_limit(self) -> int:
        """A few cases' patches and gradients, or 32 MB, and the result; whatever N is."""
        d = self.k**2 * self.c
        a_few = 4 * FEW_CASES * d * (self.locations + self.c_out)
        return max(a_few, 32 * MEGABYTE) + 4 * d * self.c_out

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [N, H, H, C] and gradients of the preactivations, normally distributed."""
        rng = np.random.default_rng(0)
        out = self.geometry.output_shape((self.h, self.h))
        return (
            rng.standard_normal((self.n, self.h, self.h, self.c), dtype=np.float32),
            rng.standard_normal((self.n, *out, self.c_out), dtype=np.float32),
        )

    def __str__(self) -> str:
        filters = f"{self.k}x{self.k} N{self.n} T{self.locations} C{self.c} O{self.c_out}"
        return filters + (" VALID" if self.padding == "VALID" else "")


PROBLEMS = [
    Problem(128, 3, 256, 256, padding="VALID"),  # the filter covers the image: one location
    Problem(128, 2, 128, 128),
    Problem(64, 4, 128, 128),
    Problem(32, 7, 256, 256),
    Problem(64, 8, 64, 64),
    Problem(512, 8, 64, 64),  # the same with more cases: no more memory
    Problem(32, 14, 128, 128),
    Problem(32, 14, 256, 64, k=1),
    Problem(32, 28, 64, 64),
    Problem(16, 56, 64, 64),
]
QUICK = {PROBLEMS[0], PROBLEMS[4]}


def cases() -> Iterator[Case]:
    for problem in PROBLEMS:
        t = problem.locations
        slowdown = 1.2 if t == 1 else 2.0 if t >= 49 else 5.0
        peers = 3.0 if t <= 64 else 1.5
        yield Case(
            f"conv_diagonal/{problem}",
            (
                Implementation(OURS, "kfac_xp", partial(ours, problem)),
                sgemm_peak(FLOOR, problem.flops),
                Implementation(TORCH, "torch", partial(torch, problem)),
                Implementation(
                    BACKPACK, "backpack", partial(backpack, problem), note="no forward or backward"
                ),
            ),
            (
                Target((FLOOR,), at_least=1 / slowdown),
                Target((TORCH,), at_least=peers),
                Target((BACKPACK,), at_least=peers),
            ),
            memory_limit=problem.memory_limit,
            is_quick=problem in QUICK,
        )


def ours(problem: Problem) -> Program:
    """From the layer's input: patches are made within."""
    images, grads = problem.arrays()

    def warm_up() -> None:
        wake_blas()
        conv_squared_outer(images[:2], grads[:2], problem.geometry)

    return Program(
        lambda: conv_squared_outer(images, grads, problem.geometry),
        lambda out: {"diagonal": out},
        warm_up=warm_up,
    )


def torch(problem: Problem) -> Program:
    return torch_ops.conv_squared_outer(*problem.arrays(), problem.geometry)


def backpack(problem: Problem) -> Program:
    return backpack_ops.conv_squared_outer(*problem.arrays(), problem.geometry)
