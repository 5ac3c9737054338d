"""Allocations as CuPy's pool counts them, and hooks that are told of them.

Read in cupy/cuda/memory.pyx: sizes are rounded up to 512 bytes, and every hook of the thread is
called with keyword arguments before and after.
"""

import itertools
import threading

from cupy._signatures import checked_class

_local = threading.local()
_ids = itertools.count(1)
_UNIT = 512


def _hooks():
    return list(getattr(_local, "hooks", {}).values())


class Memory:
    """What an array and its views lie in, until none of them is left."""

    def __init__(self, nbytes, pointer):
        self._size = -(-nbytes // _UNIT) * _UNIT
        self._pointer, self._id = pointer, next(_ids)
        if not nbytes:  # nothing is allocated
            return
        for hook in _hooks():
            hook.malloc_preprocess(device_id=0, size=nbytes, mem_size=self._size)
        for hook in _hooks():
            hook.malloc_postprocess(
                device_id=0,
                size=nbytes,
                mem_size=self._size,
                mem_ptr=pointer,
                pmem_id=self._id,
            )

    def __del__(self):
        given = {
            "device_id": 0,
            "mem_size": self._size,
            "mem_ptr": self._pointer,
            "pmem_id": self._id,
        }
        for hook in _hooks() if self._size else ():
            hook.free_preprocess(**given)
            hook.free_postprocess(**given)


class MemoryPointer:
    """``array.data``."""

    def __init__(self, pointer, device):
        self.ptr, self.device, self.device_id = pointer, device, device.id


@checked_class("cupy.cuda.MemoryHook")
class MemoryHook:
    """A context, within which the thread's allocations call its methods."""

    name = "MemoryHook"

    def __enter__(self):
        hooks = _local.__dict__.setdefault("hooks", {})
        if self.name in hooks:
            raise KeyError(f"memory hook {self.name} already exists")
        hooks[self.name] = self
        return self

    def __exit__(self, *_):
        del _local.hooks[self.name]

    def alloc_preprocess(self, **kwargs):
        """Before memory is asked of the device."""

    def alloc_postprocess(self, **kwargs):
        """After memory was asked of the device."""

    def malloc_preprocess(self, **kwargs):
        """Before memory is asked of the pool."""

    def malloc_postprocess(self, **kwargs):
        """After memory was asked of the pool."""

    def free_preprocess(self, **kwargs):
        """Before memory goes back to the pool."""

    def free_postprocess(self, **kwargs):
        """After memory went back to the pool."""


@checked_class("cupy.cuda.MemoryPool")
class MemoryPool:
    """A pool, in which here nothing is kept."""

    def __init__(self, allocator=None):
        pass

    def malloc(self, size):
        """Memory for an array."""
        raise NotImplementedError("the stand-in's arrays are NumPy's")

    def free_all_blocks(self, stream=None):
        """Return what is kept to the device."""


default = MemoryPool()
