"""What of ``cupyx`` the library uses."""

import contextlib
import threading

from cupy._signatures import checked

_config = threading.local()


@checked("cupyx", "geterr")
def geterr():
    """What is looked at, in this thread: by default nothing."""
    nothing = dict.fromkeys(("divide", "over", "under", "invalid"))
    return nothing | {"linalg": getattr(_config, "linalg", "ignore")}


@checked("cupyx", "errstate")
@contextlib.contextmanager
def errstate(*, divide=None, over=None, under=None, invalid=None, linalg=None):
    """Another setting within the context."""
    if linalg not in (None, "ignore", "raise"):
        raise NotImplementedError(linalg)
    if any(value is not None for value in (divide, over, under, invalid)):
        raise NotImplementedError
    before = geterr()["linalg"]
    _config.linalg = linalg or before
    try:
        yield
    finally:
        _config.linalg = before
