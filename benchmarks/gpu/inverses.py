"""Damped inverses of all Kronecker factors of a ResNet-50, beside PyTorch's one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.cases.inverses import DAMPING, TORCH, probed, resnet50_sizes
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import product_floor
from benchmarks.peers import torch_ops
from kfac_xp import FullyConnectedKroneckerFactor
from kfac_xp.fisher_factors import refresh_factors
from kfac_xp.linalg import add_to_diagonal

FLOOR = "inverse of the largest at the product rate"


def cases(device: Device) -> Iterator[Case]:
    """Three times as fast as PyTorch, or bound by the largest: one of the targets is enough."""
    sets = {"ResNet-50": resnet50_sizes(), "200 of 64": [64] * 200}
    for name, sizes in sets.items() if device.is_gpu else {"tiny": [3, 8, 3]}.items():
        targets = (Target((TORCH,), at_least=3.0), Target((FLOOR,), at_least=1 / 1.5))
        yield Case(
            f"inverses/{name}",
            (
                Implementation(OURS, "kfac_xp", partial(ours, device, sizes)),
                product_floor(device, FLOOR, max(sizes) ** 3),
                Implementation(TORCH, "torch", partial(torch, device, sizes)),
            ),
            targets if name == "ResNet-50" else (),
            tolerance=1e-3,
            is_quick=not device.is_gpu,
        )


def rows_of(device: Device, sizes: list[int]) -> list[Any]:
    """Random rows for a second moment of each size; fewer than the size from 512 on."""
    return [device.draw(min(2 * size, 512), size) for size in sizes]


def ours(device: Device, sizes: list[int]) -> Program:
    """An update of the inverses of as many factors, with all that it checks."""
    factors = []
    for rows in rows_of(device, sizes):
        factor = FullyConnectedKroneckerFactor([[rows]])
        factor.register_inverse(DAMPING)
        factor.update_cov(ema_decay=0.0)
        factors.append(factor)

    def call() -> list[FullyConnectedKroneckerFactor]:
        refresh_factors(factors)
        return factors

    def arrays(factors: list[FullyConnectedKroneckerFactor]) -> Any:
        inverses = (f.get_inverse(DAMPING).to_dense() for f in factors)
        return probed([device.on_host(x) for x in inverses])

    return Program(call, arrays)


def torch(device: Device, sizes: list[int]) -> Program:
    """The same by Cholesky factors, of matrices that are damped already, unchecked."""
    matrices = []
    for rows in rows_of(device, sizes):
        matrix = add_to_diagonal(rows.T @ rows / rows.shape[0], DAMPING)
        matrices.append(device.as_torch(matrix))
    return torch_ops.cholesky_inverses(matrices)
