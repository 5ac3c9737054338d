"""Runs one implementation in this process: one process holds the device."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import worker
from benchmarks.case import Case, Implementation, Program
from benchmarks.gpu.device import Device
from benchmarks.timing import GivenUpError, Start


class LocalWorker:
    """Answers what `benchmarks.worker.serve` answers, without a process of its own.

    A call that takes longer than the limit is not interrupted; what follows it is left out.
    """

    def __init__(
        self, device: Device, case: Case, implementation: Implementation, limit: float
    ) -> None:
        self._device, self._limit = device, limit
        self._build = implementation.build
        self._program: Program | None = None

    def wait(self, what: str) -> Any:
        """Build the program; its note."""
        return self._guarded(self._built).note

    def _built(self) -> Program:
        self._program = self._build()
        return self._program

    def ask(self, *message: Any) -> Any:
        """The answer to a command."""
        command, *arguments = message
        commands = {"check": self._check, "time": self._time, "memory": self._memory}
        return self._guarded(commands[command], *arguments)

    def stop(self) -> None:
        """Forget the program and its arrays."""
        self._program = None

    def _guarded(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except GivenUpError:
            raise
        except Exception as error:  # whatever a library raises, the others go on
            raise GivenUpError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from None

    def _check(self) -> Any:
        program = self._current()

        def call() -> Any:
            result = program.call()
            self._device.wait()
            return result

        found = worker.check(Program(call, program.arrays, program.expected))
        if found[0] > self._limit:
            raise GivenUpError(f"a call took {found[0]:.0f} s")
        return found

    def _time(self, calls: int, untimed: int) -> list[float]:
        program = self._current()
        for _ in range(untimed):
            program.call()
        return [self._device.seconds(program.call, calls)]

    def _memory(self) -> int | None:
        program = self._current()
        program.call()  # whatever a library keeps, it has now
        return self._device.peak_bytes(program.call)

    def _current(self) -> Program:
        if self._program is None:
            raise GivenUpError("it was not built")
        return self._program


def start_on(device: Device) -> Start:
    """Starts workers on this device, for `benchmarks.timing.measure`."""
    return partial(LocalWorker, device)
