"""What bounds everything on a device: copies, products, the launch of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.case import Case, Implementation, Program
from benchmarks.gpu.device import Device

COPY = "copy bandwidth"
PRODUCT = "float32 matrix product"
LAUNCH = "one small operation"


def cases(device: Device) -> Iterator[Case]:
    """The ceilings themselves."""
    yield Case(
        "ceilings/all",
        (
            copy_floor(device, COPY, copied_bytes(device)),
            product_floor(device, PRODUCT, product_flops(device)),
            launch_floor(device),
        ),
        is_quick=True,
    )


def copied_bytes(device: Device) -> int:
    """Bytes that the measured copy reads and writes."""
    return 2**29 if device.is_gpu else 2**20


def product_size(device: Device) -> int:
    """Of the square matrices that are multiplied."""
    return 4096 if device.is_gpu else 64


def product_flops(device: Device) -> int:
    """Of the measured product."""
    return 2 * product_size(device) ** 3


def copy_floor(device: Device, name: str, num_bytes: float) -> Implementation:
    """The time in which the device reads and writes so many bytes."""

    def build() -> Program:
        x = device.draw(copied_bytes(device) // 8)
        return Program(lambda: device.xp.asarray(x, copy=True))

    factor = num_bytes / copied_bytes(device)
    note = f"{num_bytes:.3g} bytes"
    return Implementation(name, device.name, build, factor, note, num_bytes, "B/s")


def product_floor(device: Device, name: str, flops: float) -> Implementation:
    """The time that so many flops take at the rate of a large float32 product."""

    def build() -> Program:
        n = product_size(device)
        x, y = device.draw(n, n), device.draw(n, n, seed=1)
        return Program(partial(device.xp.matmul, x, y))

    factor = flops / product_flops(device)
    return Implementation(name, device.name, build, factor, f"{flops:.3g} flops", flops, "flop/s")


def launch_floor(device: Device) -> Implementation:
    """What an operation on an array of one element takes, Python included."""

    def build() -> Program:
        x = device.draw(1)
        return Program(lambda: x + 1.0)

    return Implementation(LAUNCH, device.name, build)
