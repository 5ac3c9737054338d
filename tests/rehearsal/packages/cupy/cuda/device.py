"""``cupy.cuda.device``."""

from cupy._signatures import checked, checked_class


@checked_class("cupy.cuda.Device")
class Device:
    """A context, in which this is the current device. As in CuPy it has no hash."""

    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)
        if self.id != 0:
            raise ValueError(f"cudaErrorInvalidDevice: there is no device {self.id}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None

    def __int__(self):
        return self.id

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    compute_capability = "90"

    def synchronize(self):
        """Wait for all streams."""

    def use(self):
        """Make this the current device."""


@checked("cupy.cuda.device", "get_cublas_handle")
def get_cublas_handle():
    """Of cuBLAS, for the current device and stream."""
    return 0x4000


@checked("cupy.cuda.device", "get_device_id")
def get_device_id():
    """The current device's number."""
    return 0
