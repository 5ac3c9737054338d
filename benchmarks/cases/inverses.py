"""Damped inverses of all Kronecker factors of a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.peers import torch_ops
from kfac_xp import FullyConnectedKroneckerFactor
from kfac_xp.fisher_factors import refresh_factors

AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
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


def autoencoder_sizes() -> list[int]:
    """The same of the deep autoencoder of the K-FAC paper."""
    return [n + 1 for n in AUTOENCODER[:-1]] + list(AUTOENCODER[1:])


def cases() -> Iterator[Case]:
    """The targets are for the ResNet-50."""
    sizes = resnet50_sizes()
    targets = (Target((NUMPY,), at_least=3.0), Target((TORCH,), at_least=1.2))
    for name, chosen, wanted in (
        ("ResNet-50", sizes, targets),
        ("ResNet-50, up to 512", [size for size in sizes if size <= 512], ()),
        ("autoencoder", autoencoder_sizes(), ()),
        ("200 of 64", [64] * 200, ()),
    ):
        yield Case(
            f"inverses/{name}",
            (
                Implementation(OURS, "kfac_xp", partial(ours, chosen)),
                Implementation(NUMPY, "numpy", partial(numpy, chosen)),
                Implementation(TORCH, "torch", partial(torch, chosen)),
            ),
            wanted,
            tolerance=1e-3,
            is_quick=max(chosen) <= 512,
        )


def rows_of(sizes: list[int]) -> Iterator[np.ndarray]:
    """Random rows for a second moment of each size; fewer than the size from 512 on."""
    rng = np.random.default_rng(0)
    for size in sizes:
        yield rng.standard_normal((min(2 * size, 512), size), dtype=np.float32)


def damped(sizes: list[int]) -> list[np.ndarray]:
    """The matrices to be inverted."""
    matrices = []
    for rows in rows_of(sizes):
        cov = rows.T @ rows / rows.shape[0]
        cov.flat[:: cov.shape[0] + 1] += DAMPING
        matrices.append(cov)
    return matrices


def ours(sizes: list[int]) -> Program:
    """An update of the inverses of as many factors, with all that it checks."""
    factors = []
    for rows in rows_of(sizes):
        factor = FullyConnectedKroneckerFactor([[rows]])
        factor.register_inverse(DAMPING)
        factor.update_cov(ema_decay=0.0)
        factors.append(factor)

    def call() -> list[FullyConnectedKroneckerFactor]:
        refresh_factors(factors)
        return factors

    return Program(
        call, lambda factors: probed([f.get_inverse(DAMPING).to_dense() for f in factors])
    )


def numpy(sizes: list[int]) -> Program:
    """Of matrices that are damped already."""
    matrices = damped(sizes)
    return Program(lambda: [np.linalg.inv(x) for x in matrices], probed)


def torch(sizes: list[int]) -> Program:
    """The same by Cholesky factors, without a look at whether it worked."""
    return torch_ops.cholesky_inverses(damped(sizes))


def probed(inverses: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Each inverse times one vector: enough to compare, and small."""
    return {
        f"{i}: {x.shape[0]}": x @ np.cos(np.arange(x.shape[0]) ** 2).astype(x.dtype)
        for i, x in enumerate(inverses)
    }
