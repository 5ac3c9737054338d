"""A CUDA device made of NumPy: it runs the PTX that Numba compiles, and watches the memory.

What a simulator of Python code cannot see is decided by then: the types that integers and floats
have, the order of bytes in shared memory, what the compiler did with loops and barriers. Every
access to memory is checked (`memory`), so that a launch is also what compute-sanitizer's memcheck,
initcheck and racecheck are on a card; and counted (`counters`), as a profiler does.
"""

from benchmarks.emulator.counters import Counters
from benchmarks.emulator.launching import Emulator
from benchmarks.emulator.memory import AccessError

__all__ = ["Counters", "Emulator", "AccessError"]
