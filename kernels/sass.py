"""Reads NVIDIA's machine code as its disassembler prints it: instructions, loops, and what is counted in them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: its address in bytes, `@P0 ` or `@!P0 ` if it is conditional, and the rest of the line."""

    address: int
    guard: str
    opcode: str
    rest: str
    """Modifiers and operands, as printed: `.E.128 R24, desc[UR32][R76.64]`."""

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.opcode}{'' if self.rest.startswith('.') else ' '}{self.rest}"

    @property
    def target(self) -> int | None:
        """The address that a branch or call goes to; None for others, and where it stands in a register."""
        found = re.search(r"0x([0-9a-f]+)", self.rest) if self.opcode in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


def instructions(assembly: str) -> list[Instruction]:
    """The instructions of one kernel, in order."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*);", assembly, re.MULTILINE)
    return [Instruction(int(address, 16), guard, opcode, rest.strip()) for address, guard, opcode, rest in found]


def spills(opcodes: Counter[str]) -> int:
    """Loads and stores of local memory: registers that did not fit."""
    return opcodes["LDL"] + opcodes["STL"]


def products(opcodes: Counter[str]) -> int:
    """Matrix products on tensor cores: HMMA on sm_80, HGMMA on sm_90, UTCHMMA on sm_100."""
    return sum(opcodes[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))


def innermost_loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop without another one in it. A loop ends with a branch back to its start."""
    loops = [(a.target, a.address) for a in code if a.opcode == "BRA" and a.target is not None and a.target < a.address]
    return [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def main_loop(code: Sequence[Instruction]) -> Counter[str]:
    """The opcodes of the main loop.

    The main loop is the innermost loop with the most matrix products; of several with as many it is the shortest,
    because the others are for rare cases. Without products it is the longest innermost loop.
    """
    loops = innermost_loops(code)
    bodies = [Counter(a.opcode for a in code if start <= a.address <= end) for start, end in loops]
    sign = -1 if any(products(body) for body in bodies) else 1
    return max(bodies, key=lambda body: (products(body), sign * body.total()), default=Counter())
