"""``cupy.cuda.device``."""

from cupy._signatures import checked


@checked("cupy.cuda.device", "get_cublas_handle")
def get_cublas_handle():
    """Of cuBLAS, for the current device and stream."""
    return 0x4000


@checked("cupy.cuda.device", "get_device_id")
def get_device_id():
    """The current device's number."""
    return 0


def __getattr__(name):
    if name == "Device":  # also lives here
        from cupy.cuda import Device

        return Device
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
