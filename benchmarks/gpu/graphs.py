"""Statistics of layers of fixed shapes, queued one by one and replayed as a CUDA graph.

A graph queues all operations at once: what it saves is Python's time, and gaps between small ones.
Captured are what a step has of pure functions of device arrays: the moments of a batch, and a step
of all averages, each apart. A graph of a whole step would be wrong: its decay and weights are
numbers of the host, and would stay what they were when it was captured.

CuPy 14 refuses cuBLAS on a stream that is captured, and with it every matrix product. So moments
are captured from PyTorch's arrays, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.case import OURS, Arrays, Case, Implementation, Program
from benchmarks.cases.inverses import probed
from benchmarks.gpu.device import Device
from benchmarks.gpu.networks import Conv, Dense, ResNet, Transformer
from benchmarks.gpu.statistics import BATCH, Layers, registered
from benchmarks.peers import torch_ops

GRAPH = f"{OURS}: graph"
ON_TORCH = f"{OURS} on PyTorch's arrays"
TORCH_GRAPH = f"{ON_TORCH}: graph"
GRAPHS = (GRAPH, TORCH_GRAPH)

DIGITS = (
    Conv("conv1", 3, 1, 1, 8, 8),
    Conv("conv2", 3, 2, 8, 16, 8),
    Dense("hidden", 256, 32),
    Dense("output", 32, 10),
)
"""The convolutional network of the examples, on digits of 8 x 8 pixels."""

Quantity = Callable[[Layers, "Arguments"], Callable[[], list[Any]]]
Arguments = tuple[kfac_xp.LayerCollection, dict[str, tuple[Any, Any]]]


def cases(device: Device) -> Iterator[Case]:
    """All are reported; on the host the smallest, whose graphs are left out."""
    for words, layers, n in networks(device):
        for what, quantity in (("moments", moments), ("averages", averages)):
            ours = partial(program, device, quantity, layers, n)
            yield Case(
                f"graphs/{what}/{words}",
                (
                    Implementation(OURS, "kfac_xp", partial(ours, False, False)),
                    Implementation(GRAPH, "kfac_xp", partial(ours, False, True)),
                    Implementation(ON_TORCH, "torch", partial(ours, True, False)),
                    Implementation(TORCH_GRAPH, "torch", partial(ours, True, True)),
                ),
                is_quick=len(layers) < 20,
            )


def networks(device: Device) -> Iterator[tuple[str, Layers, int]]:
    """Words, layers and cases: from what is all launches to what is all arithmetic."""
    if not device.is_gpu:
        yield "perceptron N4", perceptron(2, 3), 4
        yield "digits N2", DIGITS, 2
        return
    yield "perceptron of 16 layers, d 64, N128", perceptron(16, 64), 128
    yield "digits N64", DIGITS, 64
    yield f"ResNet-50 N{BATCH}", ResNet().layers(), BATCH
    transformer = Transformer()
    rows = BATCH * transformer.sequence
    yield f"transformer {rows} rows", transformer.layers(), rows


def perceptron(depth: int, d: int) -> list[Dense]:
    """Dense layers of one size."""
    return [Dense(f"dense{i}", d, d) for i in range(depth)]


def program(
    device: Device, quantity: Quantity, layers: Layers, n: int, on_torch: bool, is_graph: bool
) -> Program:
    """The quantity from CuPy's arrays or from PyTorch's on the same memory, queued or replayed."""
    convert = device.as_torch if on_torch else lambda x: x
    call = quantity(layers, registered(device, layers, n, convert))
    if is_graph:
        call = torch_ops.captured(call) if on_torch else device.captured(call)
    return Program(call, partial(named, device, on_torch))


def named(device: Device, on_torch: bool, results: list[Any]) -> Arrays:
    """What is compared of matrices."""
    on_host = torch_ops.on_host if on_torch else device.on_host
    return probed([np.asarray(on_host(x)) for x in results])


def moments(layers: Layers, given: Arguments) -> Callable[[], list[Any]]:
    """The moments of all factors from the inputs and gradients of a batch."""
    collection, statistics = given
    blocks = kfac_xp.FisherEstimator(collection, damping=1e-2).blocks

    def call() -> list[Any]:
        found: dict[Any, Any] = {}
        for layer, block in zip(layers, blocks, strict=True):
            inputs, grads = statistics[layer.name]
            found |= block.input_moments([inputs], found)
            found |= block.source_moments([inputs], [grads], 0, found)
        return list(found.values())

    return call


def averages(layers: Layers, given: Arguments) -> Callable[[], list[Any]]:
    """A step of the averages of all factors, which is not taken: the next starts where it did."""
    new = moments(layers, given)()
    kept = [kfac_xp.MovingAverage(0 * x) for x in new]
    for average, x in zip(kept, new, strict=True):
        average.update(x, decay=0.95)

    def call() -> list[Any]:
        pairs = zip(kept, new, strict=True)
        return [a.step(x, decay=0.95, symmetrize=True).total for a, x in pairs]

    return call
