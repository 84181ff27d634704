"""What the core can do: operations and findings, as its own files list them, and the flags of an instruction."""

import re
from dataclasses import dataclass
from pathlib import Path

CORE = Path(__file__).parent / "core"

OPERANDS: dict[str, str] = dict(re.findall(r'OP\((\w+), "(.*?)"\)', (CORE / "opcodes.def").read_text(encoding="utf-8")))
"""The operands of each operation, see opcodes.def; "*": the assembler has code of its own for them."""

OPCODES = {name: number for number, name in enumerate(OPERANDS)}

FLAGS: dict[str, int] = {
    name: int(value)
    for name, value in re.findall(
        r"(\w+) = (\d+),", re.search(r"enum Flags.*?\};", (CORE / "interface.h").read_text(encoding="utf-8"), re.S)[0]
    )
}

PARAMETERS = int(re.search(r"PARAMETERS = (0x\w+)", (CORE / "interface.h").read_text(encoding="utf-8"))[1], 16)
"""Where parameters lie for a kernel that takes the address of one."""

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}

SIZES = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}
"""Bytes of the types of PTX."""


@dataclass(frozen=True)
class FindingKind:
    name: str
    fault: bool
    """Whether it is wrong; else it is counted, and may be harmless."""
    meaning: str


FINDING_KINDS = [
    FindingKind(name, fault == "1", meaning)
    for name, fault, meaning in re.findall(
        r'^FINDING\((\w+), (\d), "(.*)"\)$', (CORE / "findings.def").read_text(encoding="utf-8"), re.MULTILINE
    )
]
