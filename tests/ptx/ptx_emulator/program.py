"""The parts of a PTX program: registers, constants, parameters, and the arrays that the core executes."""

import re
from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.operations import SIZES

INSTRUCTION = np.dtype(
    [
        *(
            (name, np.int32)
            for name in ("opcode", "guard", "guard_negated", "first", "count", "flags", "size", "width")
        ),
        *((name, np.int32) for name in ("kind", "used", "used_count", "written_count")),
        ("immediate", np.int64),
    ],
    align=True,
)
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid",
           "%ntid.x")  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    type: str
    offset: int
    size: int
    """Bytes: 128 for a tensor map."""


@dataclass(frozen=True)
class Program:
    """An assembled kernel."""

    name: str
    code: np.ndarray
    """INSTRUCTION[n]"""
    operands: np.ndarray
    registers: dict[str, int]
    """How many of each class: r (32 bits), d (64 bits), p (predicates)."""
    constants: dict[str, np.ndarray]
    """The numbers that stand for registers behind those of their class."""
    special: list[int]
    """The registers of SPECIAL, -1 where one does not occur."""
    parameters: list[Parameter]
    parameter_bytes: int
    threads: int
    max_registers: int
    """Of a thread, as stated for setmaxnreg; 0: not at all."""
    text: list[str] = field(repr=False)
    """Each instruction as PTX, and the line of the kernel's source that it comes from."""


class Registers:
    """Names of registers and constants of one program, as places in the register files of their class."""

    def __init__(self) -> None:
        self.counts = {"r": 0, "d": 0, "p": 0}
        self.constants: dict[str, dict[int, int]] = {"r": {}, "d": {}, "p": {}}
        self.special: dict[str, int] = {}
        self._names: dict[str, tuple[str, int]] = {}
        self._families: dict[str, tuple[str, int]] = {}

    def declare(self, declaration: str) -> None:
        """`.reg .b32 %r<298>` or `.reg .b32 a, b`. Registers of 16 bits take the place of one of 32."""
        type_, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", declaration).groups()
        kind = "p" if type_ == "pred" else "d" if SIZES[type_] == 8 else "r"
        for name in names.split(","):
            family = re.fullmatch(r"\s*(%\w+)<(\d+)>\s*", name)
            if family:
                self._families[family[1]] = (kind, self._new(kind, int(family[2])))
            else:
                self._names[name.strip()] = (kind, self._new(kind))

    def _new(self, kind: str, count: int = 1) -> int:
        self.counts[kind] += count
        return self.counts[kind] - count

    def is_register(self, text: str) -> bool:
        return text.startswith("%") or text in self._names

    def find(self, name: str) -> tuple[str, int]:
        """Class and place of a register."""
        if name in SPECIAL:
            if name not in self.special:
                self.special[name] = self._new("r")
            return "r", self.special[name]
        if name in self._names:
            return self._names[name]
        family = re.fullmatch(r"(%[a-z]+)(\d+)", name)
        if not family or family[1] not in self._families:
            raise ValueError(f"no register {name}")
        kind, first = self._families[family[1]]
        return kind, first + int(family[2])

    def operand(self, text: str, kind: str) -> int:
        """The place of an operand of a class. A constant gets -2 and less: see `place`."""
        if self.is_register(text):
            found, place = self.find(text)
            if found != kind:
                raise ValueError(f"{text} is a register of another size")
            return place
        value = number(text) & (0xFFFFFFFFFFFFFFFF if kind == "d" else 0xFFFFFFFF)
        if kind == "p":
            value = int(value != 0)
        known = self.constants[kind]
        return -2 - known.setdefault(value, len(known))

    def place(self, operand: int, kind: str) -> int:
        """The final place of an operand, when all registers are known."""
        return operand if operand >= -1 else self.counts[kind] - 2 - operand


def number(text: str) -> int:
    """A constant of PTX; floats are their bits. Shared memory begins at address 0."""
    if text == "global_smem":
        return 0
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)
