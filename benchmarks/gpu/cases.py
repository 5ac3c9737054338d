"""All benchmarks of a device, one file per quantity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch

from benchmarks.case import Case
from benchmarks.gpu import (
    conv_diagonal,
    covariance,
    floors,
    graphs,
    inverses,
    kernels,
    statistics,
    steps,
)
from benchmarks.gpu.device import Device

GROUPS = (floors, covariance, conv_diagonal, kernels, inverses, statistics, steps, graphs)


def all_cases(device: Device) -> Iterator[Case]:
    """Every case, in the order of the table; nothing is made on the device yet.

    On the host without targets: they are for GPUs.
    """
    for module in GROUPS:
        for case in module.cases(device):
            if device.is_gpu:
                yield case
            else:
                yield replace(case, targets=(), memory_targets=(), memory_limit=None)


def matching(device: Device, pattern: str | None) -> list[Case]:
    """The cases whose names contain `pattern`, or match it with its wildcards."""
    return [
        case
        for case in all_cases(device)
        if pattern is None or pattern in case.name or fnmatch(case.name, pattern)
    ]
