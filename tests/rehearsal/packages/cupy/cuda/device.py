"""``cupy.cuda.device``."""

from cupy._signatures import checked
from cupy.cuda import Device  # noqa: F401


@checked("cupy.cuda.device", "get_cublas_handle")
def get_cublas_handle():
    """Of cuBLAS, for the current device and stream."""
    return 0x4000


@checked("cupy.cuda.device", "get_device_id")
def get_device_id():
    """The current device's number."""
    return 0
