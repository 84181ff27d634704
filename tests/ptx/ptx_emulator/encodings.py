"""Instructions whose operands depend on more than their name: a function each, which emits and returns True.

assembler: gets `emit`. parts: what follows the name, split at dots (`ld.global.v4.b32`: global, v4, b32). values: the
operands. False or an exception: the form is not known.
"""

import re
from collections.abc import Callable
from typing import Any

from ptx_emulator.operations import COMPARISONS, PARAMETERS, SIZES, UNSIGNED_COMPARISONS
from ptx_emulator.program import number

ALL_LANES = ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295")
ROUNDINGS = {"rzi": 0, "rni": 1, "rmi": 2, "rpi": 3}
NO_ROUNDING = 4


def items(text: str) -> tuple[str, ...]:
    """The registers of a vector `{a, b}`, or the one register."""
    return tuple(part.strip() for part in text.strip("{} ").split(","))


def address(text: str) -> tuple[str, int]:
    """`[base + offset]`: base register or constant, offset."""
    base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
    return base, int(offset or "0", 0)


def repeated(letter: str, count: int) -> str:
    return " ".join([letter] * count)


def mov(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    target, source = values
    wide = SIZES.get(parts[0]) == 8
    if source in assembler.parameters:  # where a parameter lies in their own space, in either width
        place = str(assembler.parameters[source].offset)
        assembler.emit("mov_b64" if wide else "mov_b32", "D d" if wide else "R r", (target, place))
        return parts in (["b64"], ["b32"])
    if parts == ["pred"]:
        assembler.emit("mov_pred", "P p", values)
    elif target.startswith("{"):
        assembler.emit("unpack_b64" if wide else "unpack_b32", "R R d" if wide else "R R r", (*items(target), source))
    elif source.startswith("{"):
        assembler.emit("pack_b64" if wide else "pack_b32", "D r r" if wide else "R r r", (target, *items(source)))
    else:
        assembler.emit("mov_b64" if wide else "mov_b32", "D d" if wide else "R r", values)
    return len(parts) == 1


def setp(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """`setp.lt.and.s32 p|q, a, b, !c`: p of the comparison and c, q of its opposite and c."""
    type_, middle = parts[-1], parts[1:-1]
    ftz = "ftz" in middle
    combination = [part for part in middle if part in ("and", "or", "xor")]
    if set(middle) - {"ftz", "and", "or", "xor"}:
        return False
    comparison = UNSIGNED_COMPARISONS.get(parts[0], parts[0])
    result, _, opposite = values[0].partition("|")
    with_predicate = values[3] if combination else "_"
    size = SIZES[type_]
    name = "setp_f32" if type_ == "f32" else f"setp_{type_.replace('b', 'u')}"
    assembler.emit(
        name,
        f"P {repeated('d' if size == 8 else 'r', 2)} p P",
        (result, values[1], values[2], with_predicate.lstrip("!"), opposite or "_"),
        ("FTZ " if ftz else "") + ("NEGATED" if with_predicate.startswith("!") else ""),
        kind=COMPARISONS.index(comparison),
        width=("and", "or", "xor").index(combination[0]) + 1 if combination else 0,
    )
    return True


def cvt(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    rounding = [part for part in parts[:-2] if part != "ftz"]
    target, source = parts[-2:]
    flags = "FTZ " if "ftz" in parts else ""
    if "f64" in (target, source) or set(rounding) - {"rn", *ROUNDINGS}:
        return False
    halves = ("bf16", "f16", "bf16x2", "f16x2")
    if source in ("bf16", "f16") and target == "f32":
        assembler.emit(f"cvt_f32_{source}", "R r", values)
    elif source == "f32" and target in halves:
        if rounding != ["rn"] or flags:
            return False
        assembler.emit(f"cvt_{target}_f32", "R r r" if target.endswith("x2") else "R r", values)
    elif source == "f32" and target == "f32":
        kind = ROUNDINGS[rounding[0]] if rounding else NO_ROUNDING
        assembler.emit("cvt_f32_f32", "R r", values, flags, kind=kind)
    elif target == "f32":
        wide = SIZES[source] == 8
        flags = "SIGNED" if source[0] == "s" else ""
        if SIZES[source] == 1:
            return False
        assembler.emit(
            "cvt_f32_from_64" if wide else "cvt_f32_from_32",
            "R d" if wide else "R r",
            values,
            flags,
            size=SIZES[source],
        )
    elif target in ("bf16", "f16") and source[0] in "su":
        if rounding != ["rn"] or flags or SIZES[source] not in (2, 4):
            return False
        flags = ("BFLOAT16 " if target == "bf16" else "") + ("SIGNED" if source[0] == "s" else "")
        assembler.emit("cvt_half_from_32", "R r", values, flags, size=SIZES[source])
    elif source == "f32":
        wide = SIZES[target] == 8
        if SIZES[target] < 4:
            return False
        flags = "SIGNED" if target[0] == "s" else ""
        kind = ROUNDINGS[rounding[0]]
        assembler.emit(
            "cvt_64_from_f32" if wide else "cvt_32_from_f32", "D r" if wide else "R r", values, flags, kind=kind
        )
    else:
        return cvt_int(assembler, target, source, values)
    return True


def cvt_int(assembler: Any, target: str, source: str, values: tuple[str, ...]) -> bool:
    """Between integers: the low bytes that both have, extended as the narrower one's type says."""
    if target in ("f16", "bf16") or source in ("f16", "bf16"):
        return False
    is_wide = lambda text: assembler.registers.find(text)[0] == "d"  # noqa: E731
    wide = is_wide(values[0])
    wide_source = is_wide(values[1]) if assembler.registers.is_register(values[1]) else SIZES[source] == 8
    narrower = target if SIZES[target] < SIZES[source] else source
    flags = ["WIDE"] * wide + ["WIDE_SOURCE"] * wide_source + ["SIGNED"] * (narrower[0] == "s")
    assembler.emit(
        "cvt_int",
        f"{'D' if wide else 'R'} {'d' if wide_source else 'r'}",
        values,
        " ".join(flags),
        size=min(SIZES[target], SIZES[source]),
        width=64 if wide else 16 if values[0].startswith("%rs") else 32,
    )
    return True


def half(kind: int) -> Callable[[Any, list[str], tuple[str, ...]], bool]:
    """Arithmetic of half precisions."""

    def encode(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
        type_ = parts[-1]
        if type_ not in ("f16", "bf16", "f16x2", "bf16x2") or set(parts[:-1]) - {"rn"}:
            return False
        flags = "BFLOAT16" if type_.startswith("b") else ""
        operands = f"R {repeated('r', len(values) - 1)}"
        assembler.emit("half", operands, values, flags, kind=kind, width=2 if type_.endswith("x2") else 1)
        return True

    return encode


def lop3(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    assembler.emit("lop3_b32", "R r r r", values[:4], kind=int(values[4], 0))
    return parts == ["b32"]


def transfer(assembler: Any, loads: bool, parts: list[str], values: tuple[str, ...]) -> bool:
    """ld and st of global and shared memory, and ld of a parameter."""
    space, type_ = parts[0], parts[-1]
    size = SIZES[type_]
    where, what = values[1 if loads else 0], items(values[0 if loads else 1])
    wide = any(assembler.registers.is_register(x) and assembler.registers.find(x)[0] == "d" for x in what) or size == 8
    letter = "d" if wide else "r"
    flags = ("WIDE " if wide else "") + ("SIGNED" if type_[0] == "s" else "")
    base, offset = address(where)
    if space == "param" and loads:
        place = assembler.parameters[base].offset + offset
        assembler.emit("ld_param", letter.upper(), what, flags, size=size, width=1, immediate=place)
        return True
    hints = [part for part in parts[1:-1] if not re.fullmatch(r"v[248]|L[12]::\w+|relaxed|cta|gpu|weak", part)]
    if space not in ("global", "shared", "shared::cta") or hints:
        return False
    space = space.partition("::")[0]
    pointer = "d" if space == "global" else "r"
    fields = dict(size=size, width=len(what), immediate=offset)
    if loads:
        assembler.emit(
            f"ld_{space}", f"{repeated(letter.upper(), len(what))} {pointer}", (*what, base), flags, **fields
        )
    else:
        assembler.emit(f"st_{space}", f"{pointer} {repeated(letter, len(what))}", (base, *what), flags, **fields)
    return True


def cp(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    if "bulk" in parts:
        return tensor_copy(assembler, parts, values)
    target, target_offset = address(values[0])
    source, source_offset = address(values[1])
    size = values[3] if len(values) > 3 else "_"
    fields = dict(size=int(values[2], 0), kind=target_offset, immediate=source_offset)
    assembler.emit("cp_async", "r d r", (target, source, size), **fields)
    return parts[0] == "async" and parts[1] in ("ca", "cg") and parts[2:4] == ["shared", "global"]


def tensor_copy(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """`cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [to], [map, {x, y}], [mbarrier]`"""
    found = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*(\{.*\})\s*\]", values[1])
    if not found:
        return False
    dimensions = int(parts[3].rstrip("d"))
    tensor, places = found.groups()
    coordinates = items(places)
    (target, offset), (barrier, barrier_offset) = address(values[0]), address(values[2])
    letters = f"r d {repeated('r', dimensions)} r"
    assembler.emit("cp_async_bulk_tensor", letters, (target, tensor, *coordinates, barrier), width=dimensions)
    known = parts[:3] == ["async", "bulk", "tensor"] and parts[4] in ("shared::cta", "shared::cluster")
    known &= parts[5:] == ["global", "mbarrier::complete_tx::bytes"] and not offset and not barrier_offset
    return known and len(coordinates) == dimensions and len(values) == 3


def mbarrier(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """init, inval, arrive, arrive.expect_tx and try_wait.parity of an mbarrier of this program."""
    what = ".".join(part for part in parts if part not in ("shared::cta", "shared", "b64"))
    if what == "init":
        base, offset = address(values[0])
        assembler.emit("mbarrier_init", "r", (base,), kind=offset, size=number(values[1]))
    elif what == "inval":
        base, offset = address(values[0])
        assembler.emit("mbarrier_inval", "r", (base,), kind=offset)
    elif what == "arrive" and values[0] == "_":
        base, offset = address(values[1])
        count = number(values[2]) if len(values) > 2 else 1
        assembler.emit("mbarrier_arrive", "r", (base,), kind=offset, size=count)
    elif what == "arrive.expect_tx" and values[0] == "_":
        base, offset = address(values[1])
        assembler.emit("mbarrier_arrive_expect_tx", "r r", (base, values[2]), kind=offset)
    elif what == "try_wait.parity" and len(values) == 3:
        base, offset = address(values[1])
        assembler.emit("mbarrier_try_wait", "P r r", (values[0], base, values[2]), kind=offset)
    else:
        return False
    return "shared::cta" in parts or "shared" in parts


def setmaxnreg(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    assembler.emit("setmaxnreg", size=number(values[0]), kind=int(parts[0] == "inc"))
    return parts[0] in ("inc", "dec") and parts[1:] == ["sync", "aligned", "u32"]


def cvta(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """From the space of the parameters to a generic address."""
    assembler.emit("add_b64", "D d d", (*values, str(PARAMETERS)))
    return parts == ["param", "u64"]


def matrix(loads: bool) -> Callable[[Any, list[str], tuple[str, ...]], bool]:
    """ldmatrix and stmatrix."""

    def encode(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
        what, where = (items(values[0]), values[1]) if loads else (items(values[1]), values[0])
        base, offset = address(where)
        fields = dict(width=len(what), immediate=offset)
        flags = "TRANSPOSE" if "trans" in parts else ""
        if loads:
            assembler.emit("ldmatrix", f"{repeated('R', len(what))} r", (*what, base), flags, **fields)
        else:
            assembler.emit("stmatrix", f"r {repeated('r', len(what))}", (base, *what), flags, **fields)
        return "m8n8" in parts and parts[-1] == "b16" and f"x{len(what)}" in parts

    return encode


def shfl(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    result, _, inside = values[0].partition("|")
    kind = ("up", "down", "bfly", "idx").index(parts[1])
    assembler.emit("shfl_sync", "R P r r r", (result, inside or "_", *values[1:4]), kind=kind)
    return parts[0] == "sync" and parts[2] == "b32" and values[4] in ALL_LANES


def redux(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    kinds = {"add.s32": 0, "add.u32": 0, "min.s32": 1, "max.s32": 2, "min.u32": 3, "max.u32": 4, "and.b32": 5,
             "or.b32": 6, "xor.b32": 7}  # fmt: skip
    assembler.emit("redux_sync", "R r r", values, kind=kinds[".".join(parts[1:])])  # the mask may be a register
    return parts[0] == "sync"


def vote(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    kind = ("ballot", "any", "all").index(parts[1])
    flags = "NEGATED" if values[1].startswith("!") else ""
    assembler.emit("vote_sync", "P p" if kind else "R p", (values[0], values[1].lstrip("!")), flags, kind=kind)
    return parts[0] == "sync" and values[2] in ALL_LANES


def elect(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    leader, _, is_leader = values[0].partition("|")
    assembler.emit("elect_sync", "R P", (leader, is_leader))
    return parts == ["sync"] and values[1] in ALL_LANES


def barrier(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    if parts[0] == "warp":
        assembler.emit("bar_warp_sync")
        return parts == ["warp", "sync"] and values[0] in ALL_LANES
    which, threads = number(values[0]), number(values[1]) if len(values) > 1 else 0
    assembler.emit("bar_sync", immediate=which, size=threads)
    known = ".".join(parts) in ("sync", "cta.sync", "sync.aligned", "cta.sync.aligned")
    return known and 0 <= which < 16 and threads % 32 == 0


def fence(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    if parts[0] == "proxy":
        assembler.emit("fence_proxy_async")
        return parts[1:] in (["async"], ["async", "shared::cta"])
    assembler.emit("membar")
    return True


def membar(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    assembler.emit("membar")
    return True


def mma(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """`mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`"""
    lists = [items(value) for value in values]
    flags = "BFLOAT16" if parts[-2] == "bf16" else ""
    assembler.emit("mma", f"{repeated('R', 4)} {repeated('r', 10)}", sum(lists, ()), flags)
    return parts[:5] == ["sync", "aligned", "m16n8k16", "row", "col"] and ".".join(parts[5:]) in (
        "f32.bf16.bf16.f32",
        "f32.f16.f16.f32",
    )


def wgmma(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """`wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {d}, a, b, scale-d, 1, 1, transpose-a, transpose-b`

    With A in registers there is no transpose-a.
    """
    columns = int(re.fullmatch(r"m64n(\d+)k16", parts[3])[1])
    accumulators, in_registers = items(values[0]), values[1].startswith("{")
    flags = ["BFLOAT16"] * (parts[-1] == "bf16") + ["A_REGISTERS"] * in_registers
    scales = [int(value, 0) for value in values[4:]]
    transposed = ("TRANSPOSE_B",) if in_registers else ("TRANSPOSE", "TRANSPOSE_B")
    flags += [flag for flag, given in zip(transposed, scales[2:], strict=True) if given]
    a = items(values[1])
    letters = [repeated("R", len(accumulators)), repeated("r", 4) if in_registers else "d", "d", "p"]
    values_ = (*accumulators, *a, values[2], values[3])
    assembler.emit("wgmma", " ".join(letters), values_, " ".join(flags), size=columns)
    known = parts[:3] == ["mma_async", "sync", "aligned"] and parts[4:] in (
        ["f32", "bf16", "bf16"],
        ["f32", "f16", "f16"],
    )
    return known and scales[:2] == [1, 1] and len(accumulators) == columns // 2


def bra(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    assembler.branches.append((len(assembler.rows), values[0]))
    assembler.emit("bra")
    return parts in ([], ["uni"])


def brx(assembler: Any, parts: list[str], values: tuple[str, ...]) -> bool:
    """`brx.idx index, table`, where the table is `table: .branchtargets a, b;`"""
    targets = assembler.tables[values[1]]
    assembler.emit("brx_idx", "r", values[:1])
    assembler.append_targets(targets)
    return parts == ["idx"]


ENCODINGS: dict[str, Callable[[Any, list[str], tuple[str, ...]], bool]] = {
    "mov": mov,
    "setp": setp,
    "cvt": cvt,
    "lop3": lop3,
    "ld": lambda *args: transfer(args[0], True, *args[1:]),
    "st": lambda *args: transfer(args[0], False, *args[1:]),
    "cp": cp,
    "ldmatrix": matrix(True),
    "stmatrix": matrix(False),
    "shfl": shfl,
    "redux": redux,
    "vote": vote,
    "elect": elect,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
    "membar": membar,
    "mma": mma,
    "wgmma": wgmma,
    "bra": bra,
    "brx": brx,
    "mbarrier": mbarrier,
    "setmaxnreg": setmaxnreg,
    "cvta": cvta,
    **{name: half(kind) for kind, name in enumerate(("fma", "mul", "add", "sub", "neg", "abs"))},
}
