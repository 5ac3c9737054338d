"""Measuring a machine, so that methods and kernels are chosen by what they take on it."""

from kfac_xp.calibration.examples import EXAMPLES, Example
from kfac_xp.calibration.measuring import calibrate, measure_device
from kfac_xp.calibration.timing import Device, devices, time_kernels

__all__ = [
    "EXAMPLES",
    "Device",
    "Example",
    "calibrate",
    "devices",
    "measure_device",
    "time_kernels",
]
