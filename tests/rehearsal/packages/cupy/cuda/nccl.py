"""``cupy.cuda.nccl`` of one process, which has everything already."""

from cupy._signatures import checked, checked_class

available = True
NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8


@checked_class("cupy.cuda.nccl.NcclCommunicator")
class NcclCommunicator:
    """A group of one."""

    def __init__(self, ndev, commId, rank, config=None):
        if (ndev, rank) != (1, 0) or not isinstance(commId, bytes):
            raise NotImplementedError("the stand-in of NCCL is for one process")

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):  # noqa: N802
        """Into the same buffer."""
        _require(datatype, sendbuf, recvbuf, count, op, stream)
        assert sendbuf == recvbuf, "in place"

    def bcast(self, buff, count, datatype, root, stream):
        """From oneself."""
        _require(datatype, buff, count, root, stream)
        assert root == 0


def _require(datatype, *numbers):
    assert datatype in (NCCL_FLOAT32, NCCL_FLOAT64)
    assert all(type(n) is int for n in numbers), numbers


@checked("cupy.cuda.nccl", "get_unique_id")
def get_unique_id():
    """The id of a group."""
    return b"\0" * 128


@checked("cupy.cuda.nccl", "get_version")
def get_version():
    """2.27.7."""
    return 22707


@checked("cupy.cuda.nccl", "groupStart")
def groupStart():  # noqa: N802
    """Calls from here on are one."""


@checked("cupy.cuda.nccl", "groupEnd")
def groupEnd():  # noqa: N802
    """They end here."""
