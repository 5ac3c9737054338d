"""A whole step of K-FAC for all layers of a network: statistics, inverses, natural gradient.

Beside it the same numbers by hand in PyTorch: patches by ``unfold`` and products, averages,
Cholesky inverses one by one, products with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.case import OURS, Arrays, Case, Implementation, Program
from benchmarks.gpu.device import Device
from benchmarks.gpu.networks import Conv, Dense, ResNet, Transformer
from benchmarks.gpu.statistics import BATCH, Layers, registered
from benchmarks.peers import torch_ops

TORCH = "PyTorch"
DAMPING, DECAY = 0.1, 0.95
COMPARED = 4
"""Columns of each layer's result."""


def cases(device: Device) -> Iterator[Case]:
    """With inverses of now, and with those of an earlier step; all are reported."""
    resnet, transformer, n = ResNet(), Transformer(), BATCH
    if not device.is_gpu:
        resnet = ResNet(blocks=(1,), width=2, h=16, classes=3)
        transformer, n = Transformer(depth=1, d=4, heads=2, sequence=3), 2
    rows = n * transformer.sequence
    networks: list[tuple[str, Layers, int]] = [
        (f"ResNet-50 N{n}", resnet.layers(), n),
        (f"transformer {rows} rows", transformer.layers(), rows),
    ]
    for words, layers, count in networks:
        for when, inverts in (("inverses of now", True), ("inverses of before", False)):
            yield Case(
                f"step/{when}/{words}",
                (
                    Implementation(OURS, "kfac_xp", partial(ours, device, layers, count, inverts)),
                    Implementation(TORCH, "torch", partial(torch, device, layers, count, inverts)),
                ),
                tolerance=1e-3,
                is_quick=not device.is_gpu,
            )


def gradients(device: Device, layers: Layers) -> dict[str, Any]:
    """Random gradients of all layers, as kfac_xp's matrices [D (+ 1), C_out]."""
    shapes = {
        layer.name: (layer.k**2 * layer.c_in, layer.c_out)
        if isinstance(layer, Conv)
        else (layer.d_in + 1, layer.d_out)
        for layer in layers
    }
    return {name: device.draw(*shape, seed=7) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------
# Ours


def ours(device: Device, layers: Layers, n: int, inverts: bool) -> Program:
    """The estimator's step."""
    collection, statistics = registered(device, layers, n)
    estimator = kfac_xp.FisherEstimator(collection, damping=DAMPING)
    grads = {}
    for layer in layers:
        matrix = gradients(device, [layer])[layer.name]
        if isinstance(layer, Conv):
            shape = (layer.k, layer.k, layer.c_in, layer.c_out)
            grads[layer.name] = device.xp.reshape(matrix, shape)
        else:
            grads[layer.name] = (matrix[:-1, :], matrix[-1, :])

    def call() -> dict[str, Any]:
        estimator.update_cov(statistics, ema_decay=DECAY)
        if inverts:
            estimator.update_inverses()
        return estimator.multiply_inverse(grads)

    estimator.update_cov(statistics, ema_decay=DECAY)
    estimator.update_inverses()
    return Program(call, partial(_compared, device))


def _compared(device: Device, directions: dict[str, Any]) -> Arrays:
    found = {}
    for name, direction in directions.items():
        kernel, *bias = direction if isinstance(direction, tuple) else (direction,)
        rows = device.xp.reshape(kernel, (-1, kernel.shape[-1]))[:, :COMPARED]
        found[name] = device.on_host(rows)
        if bias:
            found[f"{name}, bias"] = device.on_host(bias[0][:COMPARED])
    return found


# ---------------------------------------------------------------------------------------------
# PyTorch's


def torch(device: Device, layers: Layers, n: int, inverts: bool) -> Program:
    """The same in as few lines as it takes; nothing is checked."""
    statistics = registered(device, layers, n)[1]
    steps: dict[str, tuple[Conv | Dense, Callable[[], Any]]] = {}
    for layer in layers:
        inputs, ds = statistics[layer.name]
        rows = _rows_of_patches if isinstance(layer, Conv) else _rows_of_vectors
        rows_of_inputs, rows_of_grads, order = rows(device, layer, inputs, ds)
        gradient = device.as_torch(gradients(device, [layer])[layer.name])
        if order is not None:  # of PyTorch's patches: channels first
            gradient = gradient[np.argsort(order)]
        locations = layer.h_out**2 if isinstance(layer, Conv) else 1
        step = _layer_step(rows_of_inputs, rows_of_grads, gradient, locations, inverts)
        steps[layer.name] = layer, step

    def arrays(directions: dict[str, Any]) -> Arrays:
        found = {}
        for name, direction in directions.items():
            layer = steps[name][0]
            values = torch_ops.on_host(direction[:, :COMPARED])
            if isinstance(layer, Conv):
                taps = layer.k**2
                found[name] = values[torch_ops.taps_first(layer.c_in * taps, taps)]
            else:
                found[name], found[f"{name}, bias"] = values[:-1], values[-1]
        return found

    return Program(lambda: {name: step() for name, (_, step) in steps.items()}, arrays)


def _rows_of_patches(device: Device, layer: Conv, inputs: Any, ds: Any) -> Any:
    geometry = kfac_xp.ConvGeometry.create(
        (layer.k, layer.k), (layer.stride,) * 2, ((layer.k // 2,) * 2,) * 2
    )
    images = torch_ops.channels_first(device.as_torch(inputs))
    unfold = torch_ops.unfolding(geometry, inputs.shape[1:-1])
    grads = device.as_torch(ds).reshape(-1, layer.c_out)
    dimension = layer.k**2 * layer.c_in

    def rows() -> Any:
        return unfold(images).transpose(1, 2).reshape(-1, dimension)

    return rows, lambda: grads, torch_ops.taps_first(dimension, layer.k**2)


def _rows_of_vectors(device: Device, layer: Dense, inputs: Any, ds: Any) -> Any:
    torch = torch_ops.start()
    vectors, grads = device.as_torch(inputs), device.as_torch(ds)

    def rows() -> Any:
        return torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1)

    return rows, lambda: grads, None


def _layer_step(
    rows_of_inputs: Callable[[], Any],
    rows_of_grads: Callable[[], Any],
    gradient: Any,
    locations: int,
    inverts: bool,
) -> Callable[[], Any]:
    """A function that averages, inverts and multiplies: the damping is split by traces."""
    torch = torch_ops.start()
    kept: dict[str, Any] = {"weight": 0.0, "totals": (0.0, 0.0)}

    def average() -> None:
        kept["weight"] = DECAY * kept["weight"] + 1
        kept["totals"] = tuple(
            DECAY * total + rows.t() @ rows / rows.shape[0]
            for total, rows in zip(kept["totals"], (rows_of_inputs(), rows_of_grads()), strict=True)
        )

    def invert() -> None:
        a, g = (total / kept["weight"] for total in kept["totals"])
        root = (DAMPING / locations) ** 0.5
        pi = torch.sqrt(a.trace() / len(a) / (g.trace() / len(g)))
        kept["inverses"] = tuple(
            torch.cholesky_inverse(torch.linalg.cholesky(m + damping * torch.eye(len(m)).to(m)))
            for m, damping in ((a, root * pi), (g, root / pi))
        )

    def step() -> Any:
        average()
        if inverts:
            invert()
        a, g = kept["inverses"]
        return a @ gradient @ g / locations

    average()
    invert()
    return step
