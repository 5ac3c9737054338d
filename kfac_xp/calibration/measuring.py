"""The rates that the cost model reckons with, how good its estimates are, and which kernels win."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from kfac_xp import measurements
from kfac_xp.backend import why_no_cuda
from kfac_xp.calibration.timing import Device, devices, time_kernels
from kfac_xp.geometry import ConvGeometry
from kfac_xp.measurements import Record, timings_as_json
from kfac_xp.patch_covariance import Rates, patch_covariance
from kfac_xp.patch_covariance.cost import METHODS, Sizes, plans_for
from kfac_xp.patch_covariance.rates import SIZES, rates_as_json, rates_of_kind

# Products whose largest array is no larger than so many elements.
_MOST_ELEMENTS = 2**25
# Cases, spatial size, channels and kernel of the covariances by which estimates are corrected.
_COVARIANCES = (
    (32, 56, 64, 3),
    (32, 28, 128, 3),
    (32, 14, 256, 3),
    (32, 7, 512, 3),
    (32, 14, 64, 5),
    (64, 8, 16, 3),
    (16, 6, 4, 3),
)


def calibrate(*, keep: bool = True) -> dict[str, Rates]:
    """Measure this machine, and choose by the results from now on.

    The host's rates of matrix products and passes over arrays, by which `patch_covariance` chooses
    its method: about a second, with as many BLAS threads as there are. Where CuPy has a device, the
    same of its current device; how long each method really takes there; and each CUDA kernel beside
    the reference that it replaces, which decides where kernels are taken. That takes longer, as
    kernels are compiled. `explain` tells what was measured.

    Parameters
    ----------
    keep
        Write the results to the user's cache folder, where later processes find them. A folder that
        cannot be written is passed over.

    Returns
    -------
    ``{kind of device: rates}``: "cpu", and the model of the GPU.
    """
    found = {}
    for device in devices():
        measurements.store.keep(device.kind, measure_device(device), write=keep)
        found[device.kind] = rates_of_kind(device.kind)
    return found


def measure_device(device: Device) -> Record:
    """The record of a device. While it is made, what is known so far is used."""
    rates = measured_rates(device)
    record: dict[str, object] = {"measured": rates.measured, "rates": rates_as_json(rates)}
    if not device.is_gpu:
        return record
    measurements.store.keep(device.kind, record, write=False)
    if not why_no_cuda():
        record = {**record, "kernels": timings_as_json(time_kernels(device))}
        measurements.store.keep(device.kind, record, write=False)
    rates = replace(rates, corrections=measured_corrections(device, rates))
    return {**record, "rates": rates_as_json(rates)}


def measured_rates(device: Device) -> Rates:
    """Rates of products, symmetric products, passes and calls."""
    xp, draw = device.xp, device.draw
    products, symmetric = [], []
    for size in SIZES:
        rest = int(min(_MOST_ELEMENTS // 1024, max(size, math.sqrt(device.work / size))))
        rest = rest if device.is_gpu else min(rest, 8192)
        # Half of them with a small result, half with a short inner axis: both occur.
        x, y = draw(rest, size), draw(rest, min(rest, 1024))
        seconds = device.seconds(xp.matmul, x.T, y)
        products.append(2 * rest * size * y.shape[1] / seconds)
        rows = min(max(size, int(device.work / size**2)), _MOST_ELEMENTS // size, 2**16)
        x = draw(rows, size)
        symmetric.append(2 * rows * size * size / device.seconds(xp.matmul, x.T, x))
    length = min(2 * _MOST_ELEMENTS, int(device.work / 100))
    x, y = xp.ones(length, dtype=xp.float32), xp.ones(length, dtype=xp.float32)
    stream = 3 * 4 * length / device.seconds(xp.add, x, y)
    small = draw(2, 2)
    call = device.seconds(xp.matmul, small, small)
    when = f"{time.strftime('%Y-%m-%d')}, on {device.kind if device.is_gpu else 'this machine'}"
    return Rates(when, tuple(products), tuple(symmetric), stream, call, device.is_gpu)


def measured_corrections(device: Device, rates: Rates) -> tuple[tuple[str, float, float], ...]:
    """For each method a factor of its estimate, and seconds: how it ran at several sizes."""
    estimates: dict[str, list[float]] = {method: [] for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for n, h, c, k in _COVARIANCES:
        geometry, images = ConvGeometry.create((k, k)), device.draw(n, h, h, c)
        plans = plans_for(geometry, (h, h), Sizes(n, c, 4), rates)
        for method, plan in plans.items():
            estimates[method].append(plan.seconds)
            call = partial(patch_covariance, images, geometry, method=method)
            times[method].append(device.seconds(call))
    return tuple((method, *fitted(estimates[method], times[method])) for method in METHODS)


def fitted(estimates: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """``a, b >= 0`` with ``a * estimate + b`` near the times, by least squares of relative errors.

    Estimates leave out most calls of small operations, which cost a GPU about the same at any
    size: that is b.
    """
    pairs = [(e / t, 1 / t) for e, t in zip(estimates, times, strict=True)]
    ee = sum(e * e for e, _ in pairs)
    eo = sum(e * o for e, o in pairs)
    oo = sum(o * o for _, o in pairs)
    e, o = sum(e for e, _ in pairs), sum(o for _, o in pairs)
    determinant = ee * oo - eo * eo
    if determinant > 1e-12 * ee * oo:
        a, b = (e * oo - o * eo) / determinant, (o * ee - e * eo) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if a < 0:
            return 0.0, o / oo
    return e / ee, 0.0
