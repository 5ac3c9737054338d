"""Damped inverses of the Kronecker factors of a ResNet-50."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.peers import torch_ops
from kfac_xp.linalg import psd_inv

DAMPING = 0.1
NUMPY = "numpy.linalg.inv, one by one"
TORCH = "PyTorch Cholesky inverse"


def resnet50_layers() -> list[tuple[int, int]]:
    """``(rows of the kernel, columns)`` of each convolution, and of the dense layer at the end."""
    layers, channels = [(7 * 7 * 3, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                layers.append((channels, 4 * width))  # the shortcut
            layers += [(channels, width), (9 * width, width), (width, 4 * width)]
            channels = 4 * width
    return [*layers, (channels + 1, 1000)]


def resnet50_sizes() -> list[int]:
    """Sizes of all input and output factors."""
    return [size for layer in resnet50_layers() for size in layer]


def cases() -> Iterator[Case]:
    sizes = resnet50_sizes()
    targets = (Target((NUMPY,), at_least=3.0), Target((TORCH,), at_least=1.2))
    yield Case("inverses/ResNet-50, all factors", implementations(sizes), targets, tolerance=1e-3)
    few = [size for size in sizes if size <= 512]
    yield Case(
        "inverses/ResNet-50, up to 512",
        implementations(few),
        targets,
        tolerance=1e-3,
        is_quick=True,
    )


def implementations(sizes: list[int]) -> tuple[Implementation, ...]:
    return (
        Implementation(OURS, "kfac_xp", partial(ours, sizes)),
        Implementation(NUMPY, "numpy", partial(numpy, sizes)),
        Implementation(TORCH, "torch", partial(torch, sizes)),
    )


def factors(sizes: list[int]) -> list[np.ndarray]:
    """Second moments of random vectors, fewer than their size from 512 on; no two alike."""
    rng = np.random.default_rng(0)
    made = {}
    for size in sorted(set(sizes)):
        rows = rng.standard_normal((min(2 * size, 512), size), dtype=np.float32)
        made[size] = rows.T @ rows / rows.shape[0]
    seen: Counter[int] = Counter()
    matrices = []
    for size in sizes:
        seen[size] += 1
        matrices.append(made[size] * np.float32(1 + seen[size] / 100))
    return matrices


def probed(inverses: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Each inverse times one vector: enough to compare, and small."""
    return {
        f"{i}: {x.shape[0]}": x @ np.cos(np.arange(x.shape[0]) ** 2).astype(x.dtype)
        for i, x in enumerate(inverses)
    }


def ours(sizes: list[int]) -> Program:
    matrices = factors(sizes)
    return Program(lambda: [psd_inv(x, DAMPING) for x in matrices], probed)


def numpy(sizes: list[int]) -> Program:
    matrices = factors(sizes)

    def call() -> list[np.ndarray]:
        inverses = []
        for x in matrices:
            damped = x.copy()
            damped.flat[:: x.shape[0] + 1] += DAMPING
            inverses.append(np.linalg.inv(damped))
        return inverses

    return Program(call, probed)


def torch(sizes: list[int]) -> Program:
    return torch_ops.cholesky_inverses(factors(sizes), DAMPING)
