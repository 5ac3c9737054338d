"""The second moment of convolution patches, by every method and by other libraries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

import kfac_xp
from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.peers import kfac_jax_ops, torch_ops
from benchmarks.peers.floors import symmetric_product, wake_blas
from kfac_xp import ConvGeometry, extract_patches, patch_covariance

METHODS = ("chunked", "offsets", "spectral")
SYRK = "SYRK on patches in memory"
TORCH = "PyTorch unfold + mm"
MEGABYTE = 10**6
REPORTED_BELOW = 10 * MEGABYTE
"""Flops under which a case has no target."""


@dataclass(frozen=True)
class Problem:
    """A convolution's input: N images of H x H pixels with C channels."""

    n: int
    h: int
    c: int
    k: int = 3
    stride: int = 1
    dilation: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        """SAME padding."""
        return ConvGeometry.create((self.k,) * 2, (self.stride,) * 2, "SAME", (self.dilation,) * 2)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images: [N, H, H, C]."""
        return (self.n, self.h, self.h, self.c)

    @property
    def dimension(self) -> int:
        """Of a patch."""
        return self.geometry.num_taps * self.c

    @property
    def flops(self) -> int:
        """Of the symmetric product of the patches."""
        num_rows = self.n * self.geometry.num_locations(self.shape[1:-1])
        return num_rows * self.dimension * (self.dimension + 1)

    @property
    def result_bytes(self) -> int:
        """In float32."""
        return 4 * self.dimension**2

    @property
    def num_bytes(self) -> int:
        """Of the input and the result."""
        return 4 * math.prod(self.shape) + self.result_bytes

    def images(self) -> np.ndarray:
        """Normally distributed."""
        return np.random.default_rng(0).standard_normal(self.shape, dtype=np.float32)

    def __str__(self) -> str:
        text = f"{self.k}x{self.k} N{self.n} H{self.h} C{self.c}"
        text += f" stride {self.stride}" if self.stride > 1 else ""
        return text + (f" dilation {self.dilation}" if self.dilation > 1 else "")


USUAL = [
    Problem(32, 56, 64),
    Problem(32, 32, 64),
    Problem(32, 28, 128),
    Problem(32, 16, 128),
    Problem(32, 14, 256),
    Problem(32, 8, 256),
    Problem(32, 7, 512),
    Problem(256, 8, 64),
]
LARGE_FILTERS = [
    Problem(n, h, c, k)
    for k, sizes in (
        (5, ((32, 28, 32), (32, 14, 64), (32, 7, 128))),
        (7, ((32, 28, 32), (32, 14, 64))),
    )
    for n, h, c in sizes
]
OTHERS = [
    Problem(32, 56, 64, stride=2),
    Problem(32, 28, 128, stride=2),
    Problem(32, 14, 256, stride=2),
    Problem(32, 28, 64, dilation=2),
    Problem(32, 14, 128, dilation=2),
    Problem(8, 224, 3, k=7, stride=2),
    Problem(32, 224, 3, k=7, stride=2),
    Problem(32, 32, 3),
    Problem(64, 28, 1),
    Problem(64, 28, 1, k=5),
    Problem(32, 56, 64, k=1),
    Problem(32, 14, 256, k=1),
    Problem(32, 56, 64, k=1, stride=2),
    Problem(128, 4, 64),
    Problem(128, 2, 128),
    Problem(64, 8, 16),
    Problem(32, 6, 3),
]
QUICK = {Problem(256, 8, 64), Problem(32, 14, 64, 5), Problem(32, 6, 3), Problem(128, 4, 64)}


def cases() -> Iterator[Case]:
    usual = (Target((SYRK,), at_least=2.0, median=4.0), Target((TORCH,), median=10.0))
    for group, problems, targets in (
        ("usual", USUAL, usual),
        ("large filters", LARGE_FILTERS, (Target((SYRK,), at_least=7.0),)),
        ("others", OTHERS, (Target((f"{OURS}: chunked", TORCH), at_least=0.95),)),
    ):
        for problem in problems:
            yield Case(
                f"covariance/{group}/{problem}",
                implementations(problem),
                targets if problem.flops >= REPORTED_BELOW else (),
                memory_limit=max(2 * problem.num_bytes, 32 * MEGABYTE) + problem.result_bytes,
                is_quick=problem in QUICK,
            )


def implementations(problem: Problem) -> tuple[Implementation, ...]:
    """Ours, by the cost model's choice and by each method; the floor; and the peers."""

    def of(function: object, **settings: object) -> partial[Program]:
        return partial(_built, problem, function, **settings)

    return (
        Implementation(OURS, "kfac_xp", partial(ours, problem, None)),
        *(
            Implementation(f"{OURS}: {method}", "kfac_xp", partial(ours, problem, method))
            for method in METHODS
        ),
        Implementation(SYRK, "numpy", partial(syrk, problem)),
        Implementation(TORCH, "torch", of(torch_ops.covariance)),
        Implementation("kfac-jax explicit", "kfac_jax", of(kfac_jax_ops.covariance, explicit=True)),
        Implementation(
            "kfac-jax patch-free", "kfac_jax", of(kfac_jax_ops.covariance, explicit=False)
        ),
    )


def _built(problem: Problem, function: object, **settings: object) -> Program:
    return function(problem.images(), problem.geometry, **settings)


def ours(problem: Problem, method: str | None) -> Program:
    """Our covariance, by one method or by the one that the cost model chooses."""
    images, geometry = problem.images(), problem.geometry
    few = np.ones((2, 8, 8, problem.c), dtype=np.float32)

    def warm_up() -> None:
        wake_blas()
        patch_covariance(few, geometry, method=method)

    words = kfac_xp.explain(patch_covariance, images, geometry)
    return Program(
        lambda: patch_covariance(images, geometry, method=method),
        lambda cov: {"cov": cov},
        warm_up=warm_up,
        note="" if method else words.partition(": ")[2].partition(",")[0],
    )


def syrk(problem: Problem) -> Program:
    """The product alone, of patches that somebody has made."""
    patches = extract_patches(problem.images(), problem.geometry)
    rows = patches.reshape(-1, problem.dimension)
    return Program(lambda: symmetric_product(rows), lambda c: {"cov": c})
