"""The process that runs one implementation of one case, when it is told to."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.case import Program


def serve(connection: Connection, case_name: str, implementation_name: str) -> None:
    """Build the implementation, then answer ``(command, arguments)`` until ``"stop"``.

    Each answer is ``("ok", value)`` or ``("failed", words)``.
    """
    try:
        from benchmarks.cases import find_case

        program = find_case(case_name).implementation(implementation_name).build()
        commands = {"check": check, "time": time_calls, "memory": memory}
        connection.send(("ok", program.note))
        while (message := connection.recv())[0] != "stop":
            command, *arguments = message
            connection.send(("ok", commands[command](program, *arguments)))
    except Exception as error:  # whatever a library raises, the others go on
        words = " ".join(f"{type(error).__name__}: {error}".split())
        connection.send(("failed", words[:300]))


def check(program: Program) -> tuple[float, dict[str, Any], dict[str, Any] | None]:
    """Seconds of the first call, its arrays, and what kfac_xp gives for the same draws."""
    start = time.perf_counter()
    result = program.call()
    seconds = time.perf_counter() - start
    arrays = dict(program.arrays(result)) if program.arrays else {}
    return seconds, arrays, dict(program.expected()) if program.expected else None


def time_calls(program: Program, calls: int, untimed: int) -> list[float]:
    """Seconds of each of `calls` calls, after some that wake threads and fill caches."""
    for _ in range(untimed):
        program.call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        program.call()
        seconds.append(time.perf_counter() - start)
    return seconds


def memory(program: Program) -> int | None:
    """Bytes by which the process grows, at its peak, in one call; None where Linux does not say."""
    (program.warm_up or program.call)()
    gc.collect()
    _give_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        if program.warm_up is None:  # then the peak so far is that of the same call
            return None
    before = _status_bytes("VmRSS")
    result = program.call()
    peak = _status_bytes("VmHWM")
    del result
    return None if before is None or peak is None else max(0, peak - before)


def _give_memory_back() -> None:
    """Return freed memory to the system, so that its use again shows as growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
