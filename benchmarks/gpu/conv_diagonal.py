"""The diagonal of a convolution's Fisher beside PyTorch's einsum over unfolded patches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import kfac_xp
from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.cases.conv_diagonal import FLOOR, TORCH, Problem
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import product_floor
from benchmarks.peers import torch_ops
from kfac_xp import conv_squared_outer

PROBLEMS = [
    Problem(128, 3, 256, 256, padding="VALID"),
    Problem(64, 4, 128, 128),
    Problem(32, 7, 256, 256),
    Problem(64, 8, 64, 64),
    Problem(512, 8, 64, 64),  # the same with more cases: no more memory
    Problem(32, 14, 128, 128),
    Problem(32, 28, 64, 64),
    Problem(32, 56, 64, 64),
]
TINY = [Problem(2, 4, 3, 5), Problem(8, 4, 3, 5)]


def cases(device: Device) -> Iterator[Case]:
    """Twice as fast as PyTorch up to 64 locations, 1.3 times above."""
    for problem in PROBLEMS if device.is_gpu else TINY:
        wanted = 2.0 if problem.locations <= 64 else 1.3
        yield Case(
            f"conv_diagonal/{problem}",
            (
                Implementation(OURS, "kfac_xp", partial(ours, device, problem)),
                product_floor(device, FLOOR, problem.flops),
                Implementation(TORCH, "torch", partial(torch, device, problem)),
            ),
            (Target((TORCH,), at_least=wanted),),
            memory_limit=problem.memory_limit,
            is_quick=problem.h == 7 or not device.is_gpu,
        )


def arrays(device: Device, problem: Problem) -> tuple[object, object]:
    """Inputs [N, H, H, C] and gradients of the preactivations."""
    out = problem.geometry.output_shape((problem.h, problem.h))
    return (
        device.draw(problem.n, problem.h, problem.h, problem.c),
        device.draw(problem.n, *out, problem.c_out, seed=1),
    )


def ours(device: Device, problem: Problem) -> Program:
    images, grads = arrays(device, problem)
    words = kfac_xp.explain(conv_squared_outer, images, grads, problem.geometry)
    return Program(
        lambda: conv_squared_outer(images, grads, problem.geometry),
        lambda out: {"diagonal": device.on_host(out)},
        note=words.partition(": ")[2],
    )


def torch(device: Device, problem: Problem) -> Program:
    images, grads = (device.as_torch(x) for x in arrays(device, problem))
    return torch_ops.conv_squared_outer(images, grads, problem.geometry)
