"""GPUs connected by NCCL, through CuPy; MPI starts the processes and carries what is small."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from kfac_xp.distributed.communicator import Wait
from kfac_xp.distributed.mpi import MpiCommunicator
from kfac_xp.typing import Array

if TYPE_CHECKING:
    from mpi4py import MPI


class NcclCommunicator:
    """Ranks with one GPU each: data goes by NCCL, from device to device.

    Nothing waits for the GPU: what is started goes into a stream of its own, after what is in
    CuPy's current stream by then, and waiting for it makes the current stream wait. Counts,
    messages of errors and the id of the group go by MPI, as do arrays that are not CuPy's.

    Has been run on no GPU yet.

    Parameters
    ----------
    comm, abort_on_exception
        As for `MpiCommunicator`. Each rank must have made its GPU the current device before.

    Raises
    ------
    ImportError
        Without CuPy, its NCCL, or mpi4py.
    """

    def __init__(
        self, comm: MPI.Intracomm | None = None, *, abort_on_exception: bool = True
    ) -> None:
        try:
            import cupy

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where NCCL is missing, the error below tells
                from cupy.cuda import nccl
        except ImportError as error:
            raise ImportError(
                "NcclCommunicator needs CuPy: install `kfac-xp[cuda12]` or `kfac-xp[cuda13]`."
            ) from error
        if not getattr(nccl, "available", True):
            raise ImportError(
                "this CuPy has no NCCL. Install the wheel nvidia-nccl-cu12 (cu13), or use "
                "`MpiCommunicator`."
            )
        self._mpi = MpiCommunicator(comm, abort_on_exception=abort_on_exception)
        self._nccl = nccl
        self.rank, self.size = self._mpi.rank, self._mpi.size
        self._stream = cupy.cuda.Stream(non_blocking=True)
        group = self._mpi.gather_objects(nccl.get_unique_id() if self.rank == 0 else None)[0]
        self._comm = nccl.NcclCommunicator(self.size, group, self.rank)

    def start_sum(self, buffer: Array) -> Wait:
        """Begin to add up the buffers of all ranks (``ncclAllReduce``)."""
        if not array_api_compat.is_cupy_array(buffer):
            return self._mpi.start_sum(buffer)
        pointer, stream = buffer.data.ptr, self._after_current()
        kind, total = self._type(buffer), self._nccl.NCCL_SUM
        self._comm.allReduce(pointer, pointer, buffer.size, kind, total, stream)
        return self._awaited(buffer)

    def start_gather(self, buffer: Array, counts: Sequence[int]) -> Wait:
        """Begin to join the buffers of all ranks: a broadcast of each, as one group of calls."""
        if not array_api_compat.is_cupy_array(buffer):
            return self._mpi.start_gather(buffer, counts)
        import cupy

        whole = cupy.empty((sum(counts),), dtype=buffer.dtype)
        starts = np.cumsum([0, *counts])
        whole[starts[self.rank] : starts[self.rank + 1]] = buffer
        kind, stream = self._type(whole), self._after_current()
        self._nccl.groupStart()
        for root, count in enumerate(counts):
            if count:
                part = whole[starts[root] : starts[root + 1]]
                self._comm.bcast(part.data.ptr, count, kind, root, stream)
        self._nccl.groupEnd()
        return self._awaited(whole)

    def broadcast(self, buffer: Array, root: int = 0) -> Array:
        """The buffer of one rank, on all of them (``ncclBcast``)."""
        if not array_api_compat.is_cupy_array(buffer):
            return self._mpi.broadcast(buffer, root)
        result = buffer.copy()
        stream = self._after_current()
        self._comm.bcast(result.data.ptr, result.size, self._type(result), root, stream)
        return self._awaited(result)()

    def gather_numbers(self, row: np.ndarray) -> np.ndarray:
        """The rows of all ranks, by MPI."""
        return self._mpi.gather_numbers(row)

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python object of every rank, by MPI."""
        return self._mpi.gather_objects(value)

    def split(self, groups: Sequence[Sequence[int]]) -> NcclCommunicator:
        """The communicator of the group that this rank is in, with an id of its own."""
        return NcclCommunicator(self._mpi.split(groups)._control, abort_on_exception=False)

    def describe(self) -> str:
        """NCCL's version."""
        version = self._nccl.get_version()
        return f"{self.size} processes with NCCL {version}; device arrays stay on the devices"

    def _type(self, buffer: Array) -> int:
        is_double = buffer.dtype == np.float64
        return int(self._nccl.NCCL_FLOAT64 if is_double else self._nccl.NCCL_FLOAT32)

    def _after_current(self) -> int:
        """The stream of this object, made to wait for what is in CuPy's current one."""
        import cupy

        self._stream.wait_event(cupy.cuda.get_current_stream().record())
        return int(self._stream.ptr)

    def _awaited(self, result: Array) -> Wait:
        """The result, once CuPy's current stream is made to wait for it."""
        import cupy

        done = self._stream.record()

        def wait() -> Array:
            cupy.cuda.get_current_stream().wait_event(done)
            return result

        return wait
