"""PTX as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

DTYPES = {
    **{f"{letter}{n}": np.dtype(f"uint{n}") for letter in "ub" for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"f{n}": np.dtype(f"float{n}") for n in (16, 32, 64)},
    "pred": np.dtype(bool),
}
"""By the names of types in PTX; types of bits alone are unsigned integers."""


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Parameters
    ----------
    opcode
        With its types, as in ``ld.global.f32``.
    operands
        As they are written; a list in braces is one operand.
    guard, negated
        The predicate under which it is executed, None if always; whether it must be false.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Program:
    """A kernel.

    Parameters
    ----------
    params
        Types of its parameters, in order.
    registers
        Type of each class of registers, by the name without its number: ``{"%r": uint32}``.
    shared
        Address of each shared array.
    shared_bytes
        Of all of them.
    instructions, labels
        The code, and which instruction each label stands before.
    """

    params: list[np.dtype] = field(default_factory=list)
    registers: dict[str, np.dtype] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Program:
        """Of the text of a module with one kernel."""
        program = cls()
        text = re.sub(r"//.*", "", text)
        head, entry, rest = text.partition(".entry")
        if not entry or ".entry" in rest:
            raise ValueError("the module must have one kernel")
        names, _, body = rest.partition("{")
        program.params = [DTYPES[t] for t in re.findall(r"\.param \.(\w+) ", names)]
        for statement in re.split(r"[;\n]", head) + re.split(r"[;\n]", body):
            program._take(statement.strip())
        return program

    def _take(self, statement: str) -> None:
        if match := re.fullmatch(r"\.reg \.(\w+)\s+(%[a-z]+)<\d+>", statement):
            self.registers[match[2]] = DTYPES[match[1]]
        elif match := re.search(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", statement):
            alignment, name, size = int(match[1]), match[2], int(match[3])
            self.shared[name] = -(-self.shared_bytes // alignment) * alignment
            self.shared_bytes = self.shared[name] + size
        elif match := re.fullmatch(r"([$\w]+):", statement):
            self.labels[match[1]] = len(self.instructions)
        elif match := re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", statement):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4])
            self.instructions.append(
                Instruction(match[3], tuple(operands), match[2], match[1] == "!")
            )
