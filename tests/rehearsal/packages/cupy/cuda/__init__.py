"""``cupy.cuda``: one device, streams that are done at once, no waiting."""

import contextlib
import itertools
import threading

from cupy import _capture
from cupy._capture import Graph  # noqa: F401
from cupy._memory import MemoryHook, MemoryPool  # noqa: F401
from cupy._signatures import checked, checked_class
from cupy.cuda import cublas, device, nccl, runtime  # noqa: F401
from cupy.cuda.device import Device  # noqa: F401

_local = threading.local()
_pointers = itertools.count(0x5000, 16)
_allocator = []


@checked("cupy.cuda", "is_available")
def is_available():
    """Whether there is a device: this one."""
    return True


@checked_class("cupy.cuda.Event")
class Event:
    """A mark in a stream."""

    done = True

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = next(_pointers)

    def record(self, stream=None):
        """Put it into a stream."""

    def synchronize(self):
        """Wait for it."""


@checked_class("cupy.cuda.Stream")
class Stream:
    """A context, in which this is the thread's current stream."""

    done = True

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = 0 if null else next(_pointers)

    def __enter__(self):
        _stack().append(self)
        return self

    def __exit__(self, *_):
        _stack().pop()

    def record(self, event=None):
        """The event, now in this stream."""
        return event or Event()

    def wait_event(self, event):
        """Let what follows wait for the event."""
        if not isinstance(event, Event):
            raise TypeError(f"an Event, not {type(event)}")

    def synchronize(self):
        """Wait for what is in it."""

    def begin_capture(self, mode=None):
        """Write down what is called in it."""
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        _capture.begin()

    def end_capture(self):
        """A graph of what was called."""
        return _capture.end()


Stream.null = Stream(null=True)


def _stack():
    return _local.__dict__.setdefault("streams", [Stream.null])


@checked("cupy.cuda", "get_current_stream")
def get_current_stream(device_id=-1):
    """The stream of the innermost context."""
    return _stack()[-1]


@checked("cupy.cuda", "using_allocator")
@contextlib.contextmanager
def using_allocator(allocator=None):
    """Another one in the context; here it makes no difference."""
    yield


@checked("cupy.cuda", "set_allocator")
def set_allocator(allocator=None):
    """Where memory comes from; here it makes no difference."""
    _allocator[:] = [allocator]
