"""``cupy.cuda.runtime``."""

from cupy._signatures import checked


@checked("cupy.cuda.runtime", "getDeviceCount")
def getDeviceCount():  # noqa: N802
    """One."""
    return 1


@checked("cupy.cuda.runtime", "getDevice")
def getDevice():  # noqa: N802
    """The current device's number."""
    return 0


@checked("cupy.cuda.runtime", "getDeviceProperties")
def getDeviceProperties(device):  # noqa: N802
    """A dict, whose texts are bytes."""
    return {"name": b"Stand-in of a card", "totalGlobalMem": 2**33, "major": 9, "minor": 0}


@checked("cupy.cuda.runtime", "driverGetVersion")
def driverGetVersion():  # noqa: N802
    """CUDA 13.0."""
    return 13000


@checked("cupy.cuda.runtime", "runtimeGetVersion")
def runtimeGetVersion():  # noqa: N802
    """CUDA 13.0."""
    return 13000


def _absent(name):
    @checked("cupy.cuda.runtime", name)
    def call(*args):
        raise NotImplementedError(f"{name} of the stand-in")

    return call


for _name in (
    *("memcpy", "memcpy2D", "memcpy2DFromArray", "memcpy3D"),
    *("deviceSynchronize", "streamSynchronize", "eventSynchronize"),
):
    globals()[_name] = _absent(_name)
