"""Every op that has kernels, each implementation forced, beside what bounds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.case import OURS, Case, Implementation, Program, Target
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import COPY, LAUNCH, PRODUCT, copy_floor, launch_floor, product_floor
from benchmarks.report import Results
from kfac_xp import ConvGeometry, use_backend
from kfac_xp.backend import KernelOp, kernel_ops
from kfac_xp.calibration import EXAMPLES, Example

REFERENCE = f"{OURS}: reference"
KERNEL = f"{OURS}: kernel"
SMALL = 2000
"""Elements of the arguments of the examples that run on the host."""


def cases(device: Device) -> Iterator[Case]:
    """Targets are for patches and squared outer products; the others are reported."""
    backend = device.kernel_backend or "cuda"
    for op in kernel_ops():
        if all(i.backend != backend for i in op.implementations):
            continue
        for i, example in enumerate(EXAMPLES.get(op.name, ())):
            arguments = example.arguments(lambda *shape: np.empty(shape, np.float32))
            if device.is_gpu or sum(map(math.prod, op.sizes(*arguments)[1])) <= SMALL:
                yield case(device, op, example, arguments, is_quick=i == 0 or not device.is_gpu)


def case(
    device: Device, op: KernelOp, example: Example, arguments: tuple[Any, ...], is_quick: bool
) -> Case:
    """One op on one example; its `arguments` as empty arrays, for their sizes."""
    implementations = [
        Implementation(OURS, "kfac_xp", partial(chosen, device, op, example)),
        Implementation(REFERENCE, "kfac_xp", partial(forced, device, op, example, "reference")),
        Implementation(
            KERNEL, "kfac_xp", partial(forced, device, op, example, device.kernel_backend)
        ),
    ]
    targets: tuple[Target, ...] = ()
    if op.name in WORK:
        num_bytes, flops = WORK[op.name](*arguments)
        implementations += [copy_floor(device, COPY, num_bytes), launch_floor(device)]
        bounds = [COPY, LAUNCH]
        if flops:
            implementations.append(product_floor(device, PRODUCT, flops))
            bounds.append(PRODUCT)
        targets = (Target(tuple(bounds), at_least=1 / 1.5, slowest=True),)
    return Case(
        f"kernels/{op.name}/{example.words}", tuple(implementations), targets, is_quick=is_quick
    )


def chosen(device: Device, op: KernelOp, example: Example) -> Program:
    """What the registry picks."""
    arguments = example.arguments(device.fresh)
    words = kfac_xp.explain(op, *arguments).partition(": ")[2]
    return Program(partial(op, *arguments), partial(named, device), note=words)


def forced(device: Device, op: KernelOp, example: Example, backend: str) -> Program:
    """One implementation, whatever the size."""
    if not backend:
        raise ValueError(f"{device.name} arrays have no kernels")
    arguments = example.arguments(device.fresh)

    def call() -> Any:
        with use_backend(backend):
            return op(*arguments)

    return Program(call, partial(named, device))


def named(device: Device, result: Any) -> dict[str, np.ndarray]:
    """The arrays of a result, by number."""
    results = result if isinstance(result, tuple) else (result,)
    return {
        str(i): device.on_host(x) if hasattr(x, "shape") else np.asarray(x)
        for i, x in enumerate(results)
    }


# ---------------------------------------------------------------------------------------------
# What must be done at least: bytes that are read or written once, and flops


def patches_work(inputs: Any, geometry: ConvGeometry) -> tuple[int, int]:
    """Reading images, writing patches."""
    n, *space, c = inputs.shape
    patches = n * geometry.num_locations(space) * geometry.num_taps * c
    return 4 * (inputs.size + patches), 0


def squared_outer_work(rows: Any, grads: Any) -> tuple[int, int]:
    """Reading both, writing the result; a product of each case's matrices."""
    d, c = rows.shape[-1], grads.shape[-1]
    return 4 * (rows.size + grads.size + d * c), 2 * (rows.size // d) * d * c


WORK: dict[str, Callable[..., tuple[int, int]]] = {
    "extract_patches": patches_work,
    "squared_outer": squared_outer_work,
}


# ---------------------------------------------------------------------------------------------
# The table that conditions are set from


def crossover_lines(measured: Iterable[tuple[Case, Results]]) -> Iterator[str]:
    """For each op and size: both times, how much faster the kernel is, and what was picked."""
    yield "| op | size | reference, ms | kernel, ms | kernel is faster | picked |"
    yield "|---|---|---|---|---|---|"
    for measured_case, results in measured:
        if not measured_case.name.startswith("kernels/"):
            continue
        _, op, size = measured_case.name.split("/")
        cells, seconds = [], []
        for name in (REFERENCE, KERNEL):
            found = results[name]
            if found.skipped or not found.turns:
                cells.append("left out")
            else:
                seconds.append(found.seconds)
                cells.append(f"{1e3 * found.seconds:.3g}")
        speed = f"{seconds[0] / seconds[1]:.2f} times" if len(seconds) == 2 else ""
        picked = results[OURS].note.split(",")[0]
        yield f"| {op} | {size} | {' | '.join(cells)} | {speed} | {picked} |"
