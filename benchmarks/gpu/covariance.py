"""The second moment of 3x3 patches beside PyTorch's unfold and product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import kfac_xp
from benchmarks.case import OURS, Case, Implementation, MemoryTarget, Program, Target
from benchmarks.cases.covariance import METHODS, TORCH, Problem
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import product_floor
from benchmarks.peers import torch_ops
from kfac_xp import patch_covariance

FLOOR = "symmetric product of the patches at the product rate"
PROBLEMS = [Problem(32, 56, 64), Problem(32, 28, 128), Problem(32, 14, 256), Problem(32, 7, 512)]
TINY = [Problem(2, 6, 4)]


def cases(device: Device) -> Iterator[Case]:
    """At least six times as fast as PyTorch, in at most a quarter of its workspace."""
    for problem in PROBLEMS if device.is_gpu else TINY:
        yield Case(
            f"covariance/3x3/{problem}",
            (
                Implementation(OURS, "kfac_xp", partial(ours, device, problem, None)),
                *(
                    Implementation(f"{OURS}: {m}", "kfac_xp", partial(ours, device, problem, m))
                    for m in METHODS
                ),
                product_floor(device, FLOOR, problem.flops),
                Implementation(TORCH, "torch", partial(torch, device, problem)),
            ),
            (Target((TORCH,), at_least=6.0),),
            memory_targets=(MemoryTarget(TORCH, 0.25, problem.result_bytes),),
            is_quick=problem.c == 128 or not device.is_gpu,
        )


def ours(device: Device, problem: Problem, method: str | None) -> Program:
    """By one method, or by the one that the cost model chooses."""
    images, geometry = device.draw(*problem.shape), problem.geometry
    words = kfac_xp.explain(patch_covariance, images, geometry).partition(" (rates")[0]
    return Program(
        lambda: patch_covariance(images, geometry, method=method),
        lambda cov: {"cov": device.on_host(cov)},
        note="" if method else words.partition(": ")[2],
    )


def torch(device: Device, problem: Problem) -> Program:
    return torch_ops.covariance(device.as_torch(device.draw(*problem.shape)), problem.geometry)
