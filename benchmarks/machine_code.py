"""The loops of a kernel's machine code, and what their instructions do.

Each of the four schedulers of a multiprocessor issues one instruction a clock, whatever it does. So
the share of multiply-adds among the instructions of a loop bounds the fraction of the peak rate,
and the instructions for each byte bound the bandwidth. ``python -m benchmarks.ptx --loops sm_90``
prints them; that needs ``nvdisasm`` (of the CUDA toolkit, or ``pip install nvidia-cuda-nvdisasm``)
and no GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MULTIPLY_ADDS = {"FFMA", "DFMA"}
OTHER_FLOATS = {"FADD", "FMUL", "DADD", "DMUL"}
MEMORY = {
    "LDS": "shared load",
    "STS": "shared store",
    "LDG": "global load",
    "STG": "global store",
    "LD": "generic load",
    "ST": "generic store",
    "LDL": "local load",
    "STL": "local store",
}
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}

_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_TARGET = re.compile(r"\((\.L_\w+)\)")


class Loop(NamedTuple):
    """A loop, without what is in loops inside it.

    Parameters
    ----------
    depth
        How many loops it is in.
    mix
        How many instructions of each kind it has; predicated ones count.
    """

    depth: int
    mix: Counter[str]

    @property
    def size(self) -> int:
        """How many instructions it has."""
        return self.mix.total()

    @property
    def share(self) -> float:
        """The multiply-adds' share of the instructions."""
        return self.mix["multiply-add"] / self.size if self.size else 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.mix.most_common())
        indent = "  " * self.depth
        return f"{indent}{self.size} instructions, {self.share:.0%} multiply-adds: {kinds}"


def loops(text: str) -> list[Loop]:
    """The loops of what ``nvdisasm -c`` prints of one kernel, in the order in which they begin.

    A loop is what lies between a branch backwards and its target.
    """
    kinds: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(kinds)
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        target = _TARGET.search(instruction[2])
        if instruction[1].startswith("BRA") and target is not None and target[1] in labels:
            spans.append((labels[target[1]], len(kinds) + 1))
        kinds.append(kind(instruction[1]))
    # The last instructions of a kernel are one that branches to itself, and padding.
    spans = sorted({s for s in spans if s[1] - s[0] > 1}, key=lambda s: (s[0], -s[1]))
    return list(_without_inner(kinds, spans))


def _without_inner(kinds: list[str], spans: list[tuple[int, int]]) -> Iterator[Loop]:
    for first, end in spans:
        inside = [s for s in spans if s != (first, end) and first <= s[0] and s[1] <= end]
        around = [s for s in spans if s != (first, end) and s[0] <= first and end <= s[1]]
        own = (kinds[i] for i in range(first, end) if not any(a <= i < b for a, b in inside))
        yield Loop(len(around), Counter(own))


def kind(operation: str) -> str:
    """What an instruction does, by its name with its suffixes."""
    name, *suffixes = operation.split(".")
    if name in MULTIPLY_ADDS:
        return "multiply-add"
    if name in OTHER_FLOATS:
        return "other arithmetic"
    if name in MEMORY:
        width = next((WIDTHS[s] for s in suffixes if s in WIDTHS), 32)
        return f"{MEMORY[name]} of {width} bits"
    if name == "BAR":
        return "barrier"
    return "index, move or branch"


def disassembled(disassembler: str, cubin: Path) -> str:
    """What ``nvdisasm`` prints of a kernel that ``ptxas`` assembled."""
    command = [disassembler, "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
