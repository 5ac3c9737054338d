"""Many arrays as few buffers: what is sent in one message, and how arrays come out of it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kfac_xp.backend import array_namespace, cast, device_of
from kfac_xp.distributed.communicator import Communicator
from kfac_xp.ops import pack_symmetric, unpack_symmetric
from kfac_xp.typing import Array, Triangles

BUCKET_BYTES = 25 * 2**20
"""Size at which a buffer is full; an array that is larger has one of its own."""


@dataclass(frozen=True)
class Form:
    """How an array lies in a buffer.

    Parameters
    ----------
    shape
        Its shape.
    dtype
        Its dtype, as a string that is the same in every process.
    triangles
        ``"symmetric"`` or ``"lower"``: only the lower triangle is sent of matrices [..., n, n]
        that are symmetric, or zero above it. None: everything is.
    """

    shape: tuple[int, ...]
    dtype: str
    triangles: Triangles | None = None

    @classmethod
    def of(cls, array: Array, triangles: Triangles | None = None) -> Form:
        """That of an array."""
        return cls(tuple(array.shape), str(array.dtype).rpartition(".")[2], triangles)

    @property
    def size(self) -> int:
        """Number of entries that are sent."""
        if self.triangles is None:
            return math.prod(self.shape)
        *batch, n, _ = self.shape
        return math.prod(batch) * (n * (n + 1) // 2)

    @property
    def is_half(self) -> bool:
        """Whether entries have 16 bits: they travel as float32, in which they are added, too."""
        return self.dtype.endswith("16")

    @property
    def sent_dtype(self) -> str:
        """Dtype of the entries that are sent."""
        return "float32" if self.is_half else self.dtype


def to_buffer(arrays: Sequence[Array], forms: Sequence[Form]) -> Array:
    """The arrays, which have one `sent_dtype`, one after another: a new array of one axis."""
    xp = array_namespace(*arrays)
    parts = []
    for array, form in zip(arrays, forms, strict=True):
        entries = array if form.triangles is None else pack_symmetric(array)
        parts.append(xp.reshape(cast(entries, getattr(xp, form.sent_dtype)), (-1,)))
    return xp.concat(parts) if len(parts) > 1 else xp.asarray(parts[0], copy=True)


def from_buffer(buffer: Array, forms: Sequence[Form]) -> list[Array]:
    """Inverse of `to_buffer`."""
    xp = array_namespace(buffer)
    arrays, start = [], 0
    for form in forms:
        entries = buffer[start : start + form.size]
        start += form.size
        if form.triangles is None:
            array = xp.reshape(entries, form.shape)
        else:
            *batch, n, _ = form.shape
            array = unpack_symmetric(xp.reshape(entries, (*batch, n * (n + 1) // 2)), n)
            if form.triangles == "lower":
                array = xp.tril(array)
        arrays.append(cast(array, getattr(xp, form.dtype)))
    return arrays


def buckets(forms: Sequence[Form], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Which arrays, by number, share a buffer: in their order, of one dtype, up to `limit` bytes.

    The same for the same forms, in every process.
    """
    filled: list[list[int]] = []
    open_now: dict[str, tuple[list[int], int]] = {}
    for i, form in enumerate(forms):
        size = form.size * (8 if form.sent_dtype == "float64" else 4)
        bucket, total = open_now.get(form.sent_dtype, ([], 0))
        if bucket and total + size > limit:
            bucket, total = [], 0
        if not bucket:
            filled.append(bucket)
        bucket.append(i)
        open_now[form.sent_dtype] = bucket, total + size
    return filled


def in_buckets(
    arrays: Sequence[Array], forms: Sequence[Form], start: Callable[[Array], Callable[[], Array]]
) -> Callable[[], list[Array]]:
    """Give every buffer of the arrays to `start`; the result waits, and returns arrays again."""
    groups = buckets(forms)
    waits = [start(to_buffer([arrays[i] for i in g], [forms[i] for i in g])) for g in groups]

    def wait() -> list[Array]:
        found: dict[int, Array] = {}
        for group, ready in zip(groups, waits, strict=True):
            found.update(zip(group, from_buffer(ready(), [forms[i] for i in group]), strict=True))
        return [found[i] for i in range(len(arrays))]

    return wait


def gather_arrays(
    communicator: Communicator,
    forms: Sequence[Sequence[Form]],
    own: Sequence[Array],
    like: Array,
) -> list[list[Array]]:
    """As `start_gather_arrays`, waiting at once."""
    return start_gather_arrays(communicator, forms, own, like)()


def start_gather_arrays(
    communicator: Communicator,
    forms: Sequence[Sequence[Form]],
    own: Sequence[Array],
    like: Array,
) -> Callable[[], list[list[Array]]]:
    """Begin to send the arrays of all ranks to all of them, in one message for each dtype.

    The result waits for them: a list for each rank.

    Parameters
    ----------
    communicator
        The ranks.
    forms
        Those of each rank's arrays, which all ranks know.
    own
        This rank's arrays.
    like
        An array whose library and device results have.
    """
    xp, waits = array_namespace(like), []
    for dtype in sorted({form.sent_dtype for row in forms for form in row}):
        chosen = [[i for i, form in enumerate(row) if form.sent_dtype == dtype] for row in forms]
        mine, its_forms = chosen[communicator.rank], forms[communicator.rank]
        if mine:
            buffer = to_buffer([own[i] for i in mine], [its_forms[i] for i in mine])
        else:
            buffer = xp.zeros((0,), dtype=getattr(xp, dtype), device=device_of(like))
        counts = [
            sum(row[i].size for i in picked) for row, picked in zip(forms, chosen, strict=True)
        ]
        waits.append((chosen, communicator.start_gather(buffer, counts)))

    def gathered() -> list[list[Array]]:
        found: list[list[Array]] = [[None] * len(row) for row in forms]
        for chosen, wait in waits:
            places = [(rank, i) for rank, picked in enumerate(chosen) for i in picked]
            arrays = from_buffer(wait(), [forms[rank][i] for rank, i in places])
            for (rank, i), array in zip(places, arrays, strict=True):
                found[rank][i] = array
        return found

    return gathered
