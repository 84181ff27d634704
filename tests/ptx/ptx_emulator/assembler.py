"""PTX to the arrays that the core executes. An instruction that is not known is an error with its line, never skipped.

Most instructions are an operation of core/opcodes.def under another name (RENAMED), with the operands that are listed
there. encodings.py has those whose operands depend on more than the name.
"""

import re
from functools import cache

import numpy as np

from ptx_emulator import encodings
from ptx_emulator.operations import FLAGS, OPCODES, OPERANDS
from ptx_emulator.program import INSTRUCTION, SIZES, SPECIAL, Parameter, Program, Registers, number

IGNORED = (".loc", ".pragma", ".file", ".section", ".maxntid", ".minnctapersm", ".maxnreg")

RENAMED = [
    (r"(add|sub)\.[su](\d+)", r"\1_b\2"),
    (r"(mul|mad)\.lo\.[su](\d+)", r"\1_b\2"),
    (r"(mul)\.(hi|wide)\.([su]\d+)", r"\1_\2_\3"),
    (r"(mad)\.wide\.([su]32)", r"\1_wide_\2"),
    (r"(div|rem|min|max)\.([su]\d+)", r"\1_\2"),
    (r"(min|max)\.relu\.s32", r"\1_relu_s32"),
    (r"neg\.s(\d+)", r"neg_b\1"),
    (r"abs\.s32", "abs_s32"),
    (r"(and|or|xor)\.(?:b16|b32)", r"\1_b32"),
    (r"(and|or|xor)\.(b64|pred)", r"\1_\2"),
    (r"not\.(b16|b32|b64|pred)", r"not_\1"),
    (r"shl\.(b\d+)", r"shl_\1"),
    (r"shr\.([su]\d+)", r"shr_\1"),
    (r"(popc|clz|brev)\.b32", r"\1_b32"),
    (r"bfe\.(u32|s32|u64)", r"bfe_\1"),
    (r"prmt\.b32", "prmt_b32"),
    (r"shf\.([lr])\.(?:wrap|clamp)\.b32", r"shf_\1_b32"),
    (r"(add|sub|mul|fma|div|max|min|neg|abs|ex2|lg2|rcp|sqrt|rsqrt)\.(?:(?:rn|ftz|approx|full|NaN)\.)*f32", r"\1_f32"),
    (r"selp\.(?:b16|b32|u32|s32|f32|u16|s16)", "selp_b32"),
    (r"selp\.(?:b64|u64|s64)", "selp_b64"),
    (r"cp\.async\.(commit_group|wait_group|wait_all)", r"cp_async_\1"),
    (r"activemask\.b32", "activemask"),
    (r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned", r"wgmma_\1"),
    (r"ret|exit", "ret"),
]
MODIFIERS = {"ftz": "FTZ", "approx": "APPROX", "full": "APPROX", "NaN": "KEEP_NAN", "clamp": "CLAMP"}


class Assembler:
    """Reads one kernel line by line."""

    def __init__(self) -> None:
        self.registers = Registers()
        self.parameters: dict[str, Parameter] = {}
        self.rows: list[dict[str, int]] = []
        self.operands: list[tuple[int, str]] = []
        self.text: list[str] = []
        self.branches: list[tuple[int, str]] = []
        self.jumps: list[tuple[int, str]] = []
        """Places of `operands` that are the targets of a table."""
        self.tables: dict[str, list[str]] = {}
        self.scopes: list[tuple[dict[str, int], int, int]] = []
        """Of each block that is open: its labels, and how many branches and jumps there were before it."""
        self.guard = (-1, 0)
        self.source = self.now = ""

    def emit(self, name: str, operands: str = "", values: tuple[str, ...] = (), flags: str = "", **fields: int) -> None:
        """Append an operation. operands: classes as in opcodes.def, one for each of the values; "_" is left out.

        flags: names of FLAGS. fields: of INSTRUCTION.
        """
        classes = operands.split()
        if len(classes) != len(values):
            raise ValueError(f"{len(values)} operands where {len(classes)} are expected")
        first, written, read = len(self.operands), [], []
        for kind, value in zip(classes, values, strict=True):
            if kind == "i":
                fields["immediate"] = number(value)
                continue
            lower = kind.lower()
            place = -1 if value == "_" else self.registers.operand(value, lower)
            self.operands.append((place, lower))
            if lower == "r" and place >= 0:
                (written if kind == "R" else read).append((place, "r"))
        used = len(self.operands)
        self.operands += [*written, *read]
        self.rows.append(
            dict(
                opcode=OPCODES[name], guard=self.guard[0], guard_negated=self.guard[1], first=first, count=used - first,
                flags=sum(FLAGS[flag] for flag in flags.split()), used=used, used_count=len(written) + len(read),
                written_count=len(written), **fields,
            )
        )  # fmt: skip
        self.text.append(f"{self.now}  [{self.source}]")

    def append_targets(self, labels: list[str]) -> None:
        """Append targets to the operands of the last operation."""
        row = self.rows[-1]
        self.jumps += [(row["first"] + row["count"] + i, label) for i, label in enumerate(labels)]
        at = row["first"] + row["count"]
        self.operands[at:at] = [(0, "r")] * len(labels)
        row["count"] += len(labels)
        row["used"] += len(labels)

    def open_block(self) -> None:
        self.scopes.append(({}, len(self.branches), len(self.jumps)))

    def close_block(self) -> None:
        """Resolve the branches to labels of the block; the others are to labels around it."""
        labels, branches, jumps = self.scopes.pop()
        for row, label in self.branches[branches:]:
            if label in labels:
                self.rows[row]["immediate"] = labels[label]
        for place, label in self.jumps[jumps:]:
            if label in labels:
                self.operands[place] = (labels[label], "r")
        left = [branch for branch in self.branches[branches:] if branch[1] not in labels]
        self.branches[branches:] = left
        self.jumps[jumps:] = [jump for jump in self.jumps[jumps:] if jump[1] not in labels]
        if not self.scopes and (self.branches or self.jumps):
            raise ValueError(f"no label {(self.branches + self.jumps)[0][1]}")

    def instruction(self, head: str, values: tuple[str, ...]) -> None:
        """One instruction without its guard: its name with modifiers, and its operands."""
        name, flags = renamed(head)
        if name:
            self.emit(name, OPERANDS[name], values, flags)
            return
        kind, *parts = head.split(".")
        encode = encodings.ENCODINGS.get(kind)
        if encode is None or not encode(self, parts, values):
            raise ValueError("not an instruction that the emulator knows")

    def line(self, text: str, number_: int) -> None:
        """One statement, after labels, braces and comments."""
        if text.startswith(".reg"):
            self.registers.declare(text)
            return
        self.now = " ".join(text.split())
        guard = re.match(r"@(!?)(%?\w+)\s+(.*)", text, re.S)
        self.guard = (self.registers.find(guard[2])[1], int(guard[1] == "!")) if guard else (-1, 0)
        head, _, rest = (guard[3] if guard else text).replace("\t", " ").partition(" ")
        try:
            self.instruction(head.strip(), split_operands(rest))
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"line {number_} of the PTX, `{self.now}`: {error}") from error


@cache
def renamed(head: str) -> tuple[str, str]:
    """The operation that an instruction is by RENAMED, and its flags; empty if there is none."""
    for pattern, replacement in RENAMED:
        if re.fullmatch(pattern, head):
            name = re.sub(pattern, replacement, head)
            flags = dict.fromkeys(MODIFIERS[part] for part in head.split(".") if part in MODIFIERS)
            return (name, " ".join(flags)) if name in OPERANDS else ("", "")
    return "", ""


def split_operands(text: str) -> tuple[str, ...]:
    """The operands of an instruction, separated by commas outside of brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text) if part.strip())


def assemble(ptx: str) -> Program:
    """Assemble the one kernel of a PTX module."""
    assembler = Assembler()
    name = re.search(r"\.entry (\w+)", ptx)[1]
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    registers_stated = re.search(r"\.maxnreg (\d+)", ptx)
    offset = 0
    header = re.search(r"\.entry \w+\((.*?)\)", ptx, re.S)[1]
    for declaration in filter(None, map(str.strip, header.split(","))):
        type_, parameter, count = re.fullmatch(
            r"\.param (?:\.align \d+ )?\.([a-z]+\d+)\b.*?\s(\w+)(?:\[(\d+)\])?", declaration
        ).groups()
        align = re.match(r"\.param \.align (\d+) ", declaration)
        size = SIZES[type_] * int(count or 1)
        align = int(align[1]) if align else size
        offset = -(-offset // align) * align
        assembler.parameters[parameter] = Parameter(type_, offset, size)
        offset += size
    body = ptx.index("{", ptx.index(".reqntid"))
    first_line = ptx.count("\n", 0, body) + 1
    unfinished = last_label = ""
    for line_number, line in enumerate(ptx[body:].split("\n"), first_line):
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            assembler.source = comment.strip()
        if not code or code.startswith(IGNORED):
            continue
        if code.startswith(".branchtargets"):  # its label is on the line before
            code = f"{last_label}: {code}"
        if unfinished or re.match(r"[$\w]+: \.branchtargets", code):
            unfinished += code
            if not code.endswith(";"):
                continue
            table, targets = re.fullmatch(r"([$\w]+): \.branchtargets(.*);", unfinished).groups()
            assembler.tables[table] = [target.strip() for target in targets.split(",")]
            unfinished = ""
            continue
        label = re.match(r"([$\w]+):(?!:)", code)
        if label:
            last_label = label[1]
            assembler.scopes[-1][0][last_label] = len(assembler.rows)
            code = code[label.end() :].strip()
        # Braces of blocks stand alone or before a statement; those of operands after a name.
        for statement in code.split(";"):
            statement = statement.strip()
            while statement[:1] in ("{", "}"):
                if statement[0] == "{":
                    assembler.open_block()
                else:
                    if len(assembler.scopes) == 1:
                        assembler.source, assembler.guard, assembler.now = "", (-1, 0), "end"
                        assembler.emit("ret")
                    assembler.close_block()
                statement = statement[1:].strip()
            if statement:
                assembler.line(statement, line_number)
        if not assembler.scopes:
            break
    registers = assembler.registers
    code = np.zeros(len(assembler.rows), INSTRUCTION)
    for column in INSTRUCTION.names:
        code[column] = [row.get(column, 0) for row in assembler.rows]
    constants = {
        kind: np.array(list(registers.constants[kind]), np.uint64).astype(type_)
        for kind, type_ in (("r", np.uint32), ("d", np.uint64), ("p", np.int32))
    }
    return Program(
        name=name,
        code=code,
        operands=np.array([registers.place(*operand) for operand in assembler.operands], np.int32),
        registers=registers.counts,
        constants=constants,
        special=[registers.special.get(special, -1) for special in SPECIAL],
        parameters=list(assembler.parameters.values()),
        parameter_bytes=offset,
        threads=threads,
        max_registers=int(registers_stated[1]) if registers_stated else 0,
        text=assembler.text,
    )
