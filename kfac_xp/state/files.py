"""Nested state to and from files, which are written whole or not at all and read with suspicion.

A file is an ``.npz``: a zip of ``.npy`` files, one for each array, not compressed and without
pickle, that ``numpy.load`` reads, too. The entry `HEADER` says that it is a state, in which version
of the format, and holds a digest of all arrays with their names. Entries are named as the keys of
`flatten_state`, with what file systems dislike as ``%`` and two digits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import zipfile
from collections.abc import Mapping
from os import PathLike
from typing import IO, Any
from urllib.parse import quote, unquote

import numpy as np

from kfac_xp.state.errors import StateError
from kfac_xp.state.nested import flatten_state, unflatten_state

HEADER = "kfac_xp state"
VERSION = 1

_NPY_START = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|](?:b1|[iu][1248]|f[248]|U[0-9]{1,6}))', 'fortran_order': False, "
    rb"'shape': \(((?:[0-9]{1,15},)?|[0-9]{1,15}(?:, [0-9]{1,15})+)\), \} *\n"
)
_SAFE = " ~!#$&'()+,;=@[]^`{}"  # and letters, digits and "_.-", which are never quoted
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)


def save_state(path: str | PathLike[str] | IO[bytes], state: Mapping[str, Any]) -> None:
    """Write a nested state to a file, replacing what has that name only when all is written.

    What is written goes to a file beside it, named ``.NAME.….tmp``, which takes the name at the
    end: whoever reads sees the old file or the new one, also if the program or the machine stops
    on the way. Equal states make equal files.

    Parameters
    ----------
    path
        Where to write; the name is taken as it is. Or a binary file that can be written, which is
        not closed.
    state
        Arrays of any library, numbers, words, and dicts of them with strings for keys.

    Raises
    ------
    TypeError
        If the state holds anything else. Nothing is written.
    OSError
        As the system says. The old file stays as it was.
    """
    arrays = {key: _portable(key, array) for key, array in flatten_state(state).items()}
    if HEADER in arrays:
        raise TypeError(f"the key {HEADER!r} of a state is the file's own. Use another name.")
    if hasattr(path, "write"):
        _write(path, arrays)
        return
    target = os.path.realpath(os.fspath(path))  # of a link, what it leads to is replaced
    folder, name = os.path.split(target)
    beside = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            _write(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise
    _sync_folder(folder)


def load_state(path: str | PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """Read a nested state written by `save_state`: NumPy arrays in nested dicts.

    Every byte that counts is checked; nothing in a file is run, and no more memory is taken than
    the file is long.

    Parameters
    ----------
    path
        What to read: a file's name, or a binary file that can be read and positioned.

    Raises
    ------
    StateError
        If the file is not such a state, or damaged, or of a newer version of the format.
    OSError
        If there is no such file, or the system does not let it be opened.
    """
    if hasattr(path, "read"):
        return _read(path, str(getattr(path, "name", "the file")))
    with open(path, "rb") as file:
        return _read(file, os.fspath(path))


# ---------------------------------------------------------------------------------------------
# Writing


def _portable(key: str, array: np.ndarray) -> np.ndarray:
    """The array as it is written: of a plain dtype, little-endian, in the order of C."""
    if array.dtype.kind not in "biufU" or (array.dtype.itemsize > 8 and array.dtype.kind != "U"):
        raise TypeError(
            f"the state's key {key!r} has dtype {array.dtype}, which cannot be saved. Use floats, "
            "integers or booleans of up to 64 bits."
        )
    # Not `np.ascontiguousarray`, which makes 0-d arrays 1-d.
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _write(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    header = {"version": VERSION, "digest": _digest(arrays)}
    entries = {HEADER: np.asarray(json.dumps(header)), **arrays}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, array in entries.items():
            info = zipfile.ZipInfo(_entry_of(key), _FIRST_DAY)
            info.external_attr = 0o600 << 16
            with archive.open(info, "w", force_zip64=array.nbytes >= 2**31) as entry:
                np.lib.format.write_array(entry, array, version=(1, 0), allow_pickle=False)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        what = json.dumps([key, array.dtype.str, array.shape, array.nbytes])
        digest.update(what.encode())
        digest.update(_bytes_of(array))
    return digest.hexdigest()


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _entry_of(key: str) -> str:
    """The name of an array's entry: no part of it is empty, "." or "..", or has a backslash."""
    return "/".join(map(_quoted, key.split("/"))) + ".npy"


def _quoted(part: str) -> str:
    if part in (".", ".."):
        return part.replace(".", "%2E")
    return quote(part, safe=_SAFE) or "%"


def _key_of(entry: str) -> str:
    parts = entry.removesuffix(".npy").split("/")
    return "/".join("" if part == "%" else unquote(part, errors="strict") for part in parts)


def _sync_folder(folder: str) -> None:
    """Let the new name of a file outlast a failure of power, where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# Reading


def _read(file: Any, name: str) -> dict[str, Any]:
    try:
        return unflatten_state(_arrays_of(file))
    except MemoryError:
        raise
    except Exception as error:  # damage shows in many ways: in zipfile's parser alone in ten
        said = str(error) if isinstance(error, (_FileError, StateError)) else _words(error)
        raise StateError(
            f"{name} cannot be loaded: {said}. Nothing has been changed. Load an earlier file, or "
            "start anew."
        ) from error


class _FileError(Exception):
    """What is wrong with a file, in words that go on after a colon."""


def _words(error: Exception) -> str:
    if isinstance(error, zipfile.BadZipFile):
        return f"it is no `.npz` file, or damaged ({error})"
    return f"it is damaged ({type(error).__name__}: {error})"


def _arrays_of(file: Any) -> dict[str, np.ndarray]:
    """The arrays of a file by their keys."""
    length = file.seek(0, os.SEEK_END)
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if _entry_of(HEADER) not in names:
            raise _FileError("it is a zip, but no state written by `save_state`")
        digest = _digest_in(archive)
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise _FileError(f"its entry {twice!r} is there twice")
        if sum(info.file_size for info in infos) > length:
            raise _FileError("its entries promise more than the file holds")
        for info in infos:
            key = _key_of(info.filename)
            if _entry_of(key) != info.filename or info.orig_filename != info.filename:
                raise _FileError(f"its entry {info.filename!r} is not named as `save_state` does")
            if key != HEADER:
                arrays[key] = _array_in(archive, info)
    if digest != _digest(arrays):
        raise _FileError("its arrays are not those that were saved: the digest differs")
    return {k: a.astype(a.dtype.newbyteorder("="), copy=False) for k, a in arrays.items()}


def _digest_in(archive: zipfile.ZipFile) -> str:
    """What the header says of the arrays, once it says that they can be read here."""
    said = json.loads(str(_array_in(archive, archive.getinfo(_entry_of(HEADER)))))
    if said["version"] != VERSION:
        raise _FileError(
            f"it has version {said['version']!r} of the format, and this kfac_xp reads version "
            f"{VERSION}; use the kfac_xp that wrote it, or a newer one"
        )
    return said["digest"]


def _array_in(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _FileError(f"its entry {info.filename!r} is compressed")
    with archive.open(info) as entry:
        return _array_of(entry, info)


def _array_of(entry: Any, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, with its own memory; its header may ask for as much as the entry holds."""
    start = entry.read(len(_NPY_START) + 2)
    size = int.from_bytes(start[len(_NPY_START) :], "little")
    found = _NPY_HEADER.fullmatch(entry.read(size))
    if not start.startswith(_NPY_START) or found is None:
        raise _FileError(f"its entry {info.filename!r} has a header that `save_state` never writes")
    dtype = np.dtype(found[1].decode())
    shape = tuple(int(n) for n in found[2].replace(b",", b" ").split())
    promised = math.prod(shape) * dtype.itemsize
    held = info.file_size - len(start) - size
    if promised != held:
        raise _FileError(
            f"the header of its entry {info.filename!r} promises {promised} bytes of shape "
            f"{shape}, and the entry holds {held}"
        )
    array = np.empty(shape, dtype)
    memory = _bytes_of(array)
    filled = 0
    while filled < held and (count := entry.readinto(memory[filled:])):
        filled += count
    if filled < held or entry.read(1):  # at the end the entry's checksum is compared
        raise _FileError(f"its entry {info.filename!r} is cut off")
    return array
