"""Processes connected by MPI, through mpi4py."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.distributed.communicator import Wait
from kfac_xp.state import to_numpy
from kfac_xp.typing import Array

if TYPE_CHECKING:
    from mpi4py import MPI

_CUDA_AWARE = {
    "MPICH_GPU_SUPPORT_ENABLED": "1",  # Cray MPICH
    "MPIR_CVAR_ENABLE_GPU": "1",  # MPICH
    "OMPI_MCA_opal_cuda_support": "true",  # Open MPI
    "MV2_USE_CUDA": "1",  # MVAPICH2
    "I_MPI_OFFLOAD": "1",  # Intel MPI
}
"""Environment variables by which MPI libraries are told to take device arrays."""


class MpiCommunicator:
    """Ranks of an MPI communicator: a script run under ``mpiexec -n 4 python script.py``.

    Arrays on the host are sent from where they lie. CuPy arrays are, too, if the MPI library is
    CUDA-aware; otherwise they are copied to the host and back, as are the arrays of libraries that
    MPI cannot read. `describe` says which.

    The communicator is duplicated twice, for data and for control, so that nothing that the
    caller sends can be mistaken for either.

    Parameters
    ----------
    comm
        An mpi4py communicator; ``MPI.COMM_WORLD`` if None. Making the object is collective.
    cuda_aware
        Whether the MPI library takes pointers to device memory. None goes by the environment
        variables that switch this on, and is no if there is none: a wrong yes crashes.
    abort_on_exception
        End all ranks when an exception leaves the script on one of them, after printing it. MPI
        alone lets the others wait for ever.

    Raises
    ------
    ImportError
        Without mpi4py and an MPI library: both come with the extra ``mpi``.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        *,
        cuda_aware: bool | None = None,
        abort_on_exception: bool = True,
    ) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # the latter: mpi4py without an MPI library
            raise ImportError(
                "MpiCommunicator needs mpi4py and an MPI library: install `kfac-xp[mpi]`, or "
                f"mpi4py beside the MPI of your cluster. ({' '.join(str(error).split())})"
            ) from error
        world = MPI.COMM_WORLD if comm is None else comm
        self._mpi = MPI
        self._data, self._control = world.Dup(), world.Dup()
        self.rank, self.size = self._data.Get_rank(), self._data.Get_size()
        if cuda_aware is None:
            cuda_aware = any(os.environ.get(k) == v for k, v in _CUDA_AWARE.items())
        self.cuda_aware = cuda_aware
        if abort_on_exception and self.size > 1:
            _abort_on_exception(self._control)

    def start_sum(self, buffer: Array) -> Wait:
        """Begin to add up the buffers of all ranks (``MPI_Iallreduce``)."""
        message = self._message(buffer, writable=True)
        request = self._data.Iallreduce(self._mpi.IN_PLACE, message)

        def wait() -> Array:
            request.Wait()
            return _beside(message, buffer)

        return wait

    def start_gather(self, buffer: Array, counts: Sequence[int]) -> Wait:
        """Begin to join the buffers of all ranks (``MPI_Iallgatherv``)."""
        message = self._message(buffer)
        xp = array_namespace(message)
        place = {} if isinstance(message, np.ndarray) else {"device": device_of(message)}
        whole = xp.empty((sum(counts),), dtype=message.dtype, **place)
        request = self._data.Iallgatherv(message, [whole, list(counts)])

        def wait() -> Array:
            request.Wait()
            return _beside(whole, buffer)

        return wait

    def broadcast(self, buffer: Array, root: int = 0) -> Array:
        """The buffer of one rank, on all of them (``MPI_Bcast``)."""
        message = self._message(buffer, writable=True)
        self._data.Bcast(message, root)
        return _beside(message, buffer)

    def gather_numbers(self, row: np.ndarray) -> np.ndarray:
        """The rows of all ranks (``MPI_Allgather``)."""
        rows = np.empty((self.size, row.size))
        self._control.Allgather(np.ascontiguousarray(row, dtype=np.float64), rows)
        return rows

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python object of every rank, pickled."""
        return self._control.allgather(value)

    def split(self, groups: Sequence[Sequence[int]]) -> MpiCommunicator:
        """The communicator of the group that this rank is in (``MPI_Comm_split``)."""
        color = next(i for i, group in enumerate(groups) if self.rank in group)
        part: Any = self._control.Split(color, key=list(groups[color]).index(self.rank))
        return MpiCommunicator(part, cuda_aware=self.cuda_aware, abort_on_exception=False)

    def describe(self) -> str:
        """The MPI library and the way of device arrays."""
        first_line = self._mpi.Get_library_version().strip().splitlines()[0]
        library = " ".join(first_line.strip("\0 ").split())
        way = "sent from the device" if self.cuda_aware else "copied through host memory"
        processes = "1 MPI process" if self.size == 1 else f"{self.size} MPI processes"
        return f"{processes} ({library}); device arrays are {way}"

    def _message(self, buffer: Array, writable: bool = False) -> Array:
        """The buffer, or a copy of it, in memory that MPI can read."""
        if array_api_compat.is_cupy_array(buffer):
            if self.cuda_aware:
                import cupy

                # MPI knows nothing of streams.
                cupy.cuda.get_current_stream().synchronize()
                return buffer
            return buffer.get()
        host = to_numpy(buffer)
        if writable and not (host is buffer and host.flags.writeable):
            return np.array(host)
        return np.ascontiguousarray(host)


def _beside(message: Array, buffer: Array) -> Array:
    """A result in the library and on the device of the buffer."""
    if message is buffer or array_api_compat.is_cupy_array(message):
        return message
    xp = array_namespace(buffer)
    return message if isinstance(buffer, np.ndarray) else _moved(xp, message, buffer)


def _moved(xp: Any, message: np.ndarray, buffer: Array) -> Array:
    return xp.asarray(message, dtype=buffer.dtype, device=device_of(buffer))


def _abort_on_exception(comm: MPI.Intracomm) -> None:
    """Let an exception that leaves the script end all ranks, once it is printed."""
    printed = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        try:
            sys.stderr.write(f"rank {comm.Get_rank()} of {comm.Get_size()}:\n")
            printed(kind, error, where)
            sys.stderr.flush()
        except Exception:
            traceback.print_exc()
        finally:
            comm.Abort(1)

    sys.excepthook = hook
