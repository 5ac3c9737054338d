"""What `kfac_xp.calibrate` measured of each device: kept in a file, read once, looked up often.

A record belongs to a *kind* of device, `HOST` or the model of a GPU: two cards of one model share
theirs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

HOST = "cpu"

Record = Mapping[str, Any]
"""What is kept of one kind of device: ``{"measured": words, "rates": ..., "kernels": ...}``."""

Shapes = tuple[tuple[int, ...], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class KernelTiming:
    """A kernel and the reference that it may replace, in seconds, on the same arguments."""

    dtype: str
    shapes: Shapes
    reference: float
    kernel: float

    @property
    def speed(self) -> float:
        """How many times as fast as the reference the kernel is."""
        return self.reference / self.kernel


class Store:
    """The records of this process: those in the file, and what was measured since."""

    def __init__(self) -> None:
        self._records: dict[str, Record] | None = None
        self._derived: dict[tuple[str, Callable[[Record], Any]], Any] = {}

    @property
    def records(self) -> Mapping[str, Record]:
        """``{kind of device: record}``; the file is read at the first look."""
        if self._records is None:
            self._records = _read()
        return self._records

    def derived(self, kind: str, make: Callable[[Record], T]) -> T:
        """``make(record)`` of a kind of device, made once; `record` is empty if there is none."""
        key = (kind, make)
        if key not in self._derived:
            self._derived[key] = make(self.records.get(kind, {}))
        found: T = self._derived[key]
        return found

    def keep(self, kind: str, record: Record, *, write: bool) -> None:
        """Use a record from now on; in later processes too, where the file can be written."""
        self._records = {**self.records, kind: record}
        self._derived = {}
        if write:
            _write({**_read(), kind: record})


store = Store()


# ---------------------------------------------------------------------------------------------
# Kernels


def timings_as_json(timings: Mapping[str, list[KernelTiming]]) -> dict[str, list[dict[str, Any]]]:
    """``{op: timings}`` as it is kept in a record."""
    return {op: [asdict(timing) for timing in found] for op, found in timings.items()}


def kernel_timings(record: Record) -> dict[str, list[KernelTiming]]:
    """``{op: timings}`` of a record, without those that cannot be understood."""
    found: dict[str, list[KernelTiming]] = {}
    kept = record.get("kernels", {})
    for op, timings in kept.items() if isinstance(kept, Mapping) else ():
        for timing in timings if isinstance(timings, list) else ():
            try:
                shapes = tuple(tuple(int(n) for n in shape) for shape in timing["shapes"])
                seconds = float(timing["reference"]), float(timing["kernel"])
                dtype = str(timing["dtype"])
            except (ValueError, TypeError, KeyError):
                continue
            if all(0 < s < math.inf for s in seconds):
                found.setdefault(op, []).append(KernelTiming(dtype, shapes, *seconds))
    return found


def nearest_timing(kind: str, op: str, dtype: str, shapes: Shapes) -> KernelTiming | None:
    """The timing of an op at the sizes nearest to these.

    Near are sizes whose ratios are near 1: distances are between logarithms. None if the op was
    not timed on this kind of device, in this dtype and with as many axes.
    """
    ranks = [len(shape) for shape in shapes]
    comparable = [
        timing
        for timing in store.derived(kind, kernel_timings).get(op, ())
        if timing.dtype == dtype and [len(shape) for shape in timing.shapes] == ranks
    ]
    return min(comparable, key=lambda timing: _distance(timing.shapes, shapes), default=None)


def _distance(a: Shapes, b: Shapes) -> float:
    pairs = ((m, n) for s, t in zip(a, b, strict=True) for m, n in zip(s, t, strict=True))
    return sum(math.log(max(m, 1) / max(n, 1)) ** 2 for m, n in pairs)


# ---------------------------------------------------------------------------------------------
# The file


def cache_file() -> Path:
    """Where records are kept; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "kfac_xp" / "calibration.json"


def _write(records: Mapping[str, Record]) -> None:
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1))
    except (OSError, RuntimeError):  # read-only, or no home
        return


def _read() -> dict[str, Record]:
    """The records in the file; none if there is no file, or none that can be understood."""
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, RuntimeError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {kind: record for kind, record in kept.items() if isinstance(record, dict)}
