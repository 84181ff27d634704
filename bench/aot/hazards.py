"""Reads the machine code of sm_90 for what a product in flight may meet: registers in use, buffers overwritten.

A product of a warpgroup (HGMMA) runs while the instructions after it do. Groups of products end with `gsb0`, and
`WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are in flight. Two things are faults on every path through
the code, loops included:

- an instruction reads or writes an accumulator of a product in flight, or overwrites its left operand in registers;
- a copy into shared memory (LDGSTS, UTMALDG) in another iteration than a product, or after its loop, without a wait for
  that product and then a barrier of the whole program. Only after both have all warps done with the product, and a loop
  that copies ahead fills the buffer that the products of the iteration before have read.

Not seen: which buffer a product reads (its address is in a descriptor), so that a copy to a buffer that the same
iteration reads goes unnoticed; stores to shared memory (STS); whether copied data has arrived.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from memflow_ops.kernels.sass import Instruction, innermost_loops

UNCOMMITTED = 0
RETIRED = 99
COPIES = ("LDGSTS", "UTMALDG")
# These read every general register that they name. So do the comparisons (ISETP, FSETP).
WITHOUT_RESULT = {"PLOP3", "FCHK", "R2P", "RET", "BRX", "WARPSYNC", "CALL", "BAR"}


class Flight(NamedTuple):
    """One run of a product, or all of its runs in earlier iterations of its loop and in a loop that was left."""

    product: int
    """The address of the product."""
    earlier: bool


Flights = dict[Flight, int]
"""How many groups of products ended since each was issued, its own included (of several runs: the latest); UNCOMMITTED:
its own has not ended; RETIRED: this warp has waited for it."""


class Product(NamedTuple):
    """The registers of one HGMMA."""

    accumulators: range
    left: range
    """Empty where the left operand is in shared memory."""


def product_of(instruction: Instruction) -> Product:
    """The registers of an HGMMA. A ValueError says that it is not printed as expected."""
    found = re.match(r"\.64x(\d+)x\d+\.(F32|F16)\S*\s+R(\d+), (?:R(\d+), )?gdesc", instruction.rest)
    if not found:
        raise ValueError(f"not an HGMMA as sm_90 has it: {instruction}")
    width, first = int(found[1]) // (2 if found[2] == "F32" else 4), int(found[3])
    left = range(int(found[4]), int(found[4]) + 4) if found[4] else range(0)
    return Product(range(first, first + width), left)


def result_width(instruction: Instruction) -> int:
    """How many registers an instruction writes."""
    modifiers = instruction.rest.split(" ")[0]
    matrices = modifiers[-2:] if instruction.opcode == "LDSM" else ""
    if instruction.opcode == "HMMA" or ".128" in modifiers or matrices == ".4":
        return 4
    wide = ".64" in modifiers or ".WIDE" in modifiers or matrices == ".2"
    return 2 if wide or instruction.opcode in ("CS2R", "DADD", "DMUL", "DFMA") else 1


def source_width(instruction: Instruction, last: bool) -> int:
    """How many registers an instruction reads where it names one that is no address; last: the operand is the last."""
    if instruction.opcode == "IMAD":
        return result_width(instruction) if last else 1
    stores_or_multiplies = instruction.opcode.startswith("ST") or instruction.opcode in ("HMMA", "DADD", "DMUL", "DFMA")
    return result_width(instruction) if stores_or_multiplies else 1


def registers(instruction: Instruction) -> tuple[set[int], set[int]]:
    """The general registers that an instruction writes, and those that it reads."""
    modifiers, _, after = instruction.rest.partition(" ")
    operands = [x.strip() for x in (after if modifiers.startswith(".") else instruction.rest).split(", ")]
    written: set[int] = set()
    read: set[int] = set()
    # The result comes first, or after predicates; RZ in its place is none.
    has_result = not (instruction.opcode.endswith("SETP") or instruction.opcode in WITHOUT_RESULT)
    for place, operand in enumerate(operands):
        result = re.fullmatch(r"R(\d+)", operand) if has_result else None
        has_result = has_result and bool(re.fullmatch(r"!?U?P(\d|T)", operand))
        if result:
            written.update(range(int(result[1]), int(result[1]) + result_width(instruction)))
            continue
        width = 1 if "[" in operand else source_width(instruction, place == len(operands) - 1)
        for name, pair in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", operand):
            read.update(range(int(name), int(name) + (2 if pair else width)))
    return written, read


def successors(code: Sequence[Instruction]) -> list[list[int]]:
    """For each instruction the places in `code` of those that may follow it. A return goes to after any call."""
    place = {a.address: i for i, a in enumerate(code)}
    after_calls = [i + 1 for i, a in enumerate(code) if a.opcode == "CALL"]
    result = []
    for i, a in enumerate(code):
        conditional = bool(a.guard) or re.search(r"(^|\s)!?U?P\w+,", a.rest) is not None
        jumps = a.opcode in ("BRA", "CALL") and a.target in place
        following = [place[a.target]] if jumps and a.target is not None else []
        if a.opcode == "RET":
            following = list(after_calls)
        if a.opcode not in ("BRA", "CALL", "RET", "EXIT") or conditional:
            following.append(i + 1)
        result.append([j for j in following if j < len(code)])
    return result


def after(a: Instruction, flights: Flights) -> Flights:
    """The products in flight after an instruction, given those before it."""
    if a.guard.startswith("@!PT"):  # never runs
        return flights
    if a.opcode == "HGMMA":
        flights = {**flights, Flight(a.address, False): UNCOMMITTED}
        if "gsb0" in a.rest:
            flights = {flight: groups + (groups < RETIRED - 1) for flight, groups in flights.items()}
    elif a.opcode == "WARPGROUP" and ".DEPBAR" in a.rest and not a.guard:
        allowed = int(a.rest.rpartition("0x")[2], 16)
        flights = {flight: RETIRED if groups > allowed else groups for flight, groups in flights.items()}
    elif a.opcode == "BAR" and not a.guard and a.rest.startswith(".SYNC") and a.rest.endswith(" 0x0"):
        flights = {flight: groups for flight, groups in flights.items() if groups != RETIRED}
    return flights


def merged(pairs: Iterable[tuple[Flight, int]]) -> Flights:
    """What may be in flight where paths meet: of each product the run that has come least far."""
    result: Flights = {}
    for flight, groups in pairs:
        result[flight] = min(groups, result.get(flight, groups))
    return result


def flights_before(code: Sequence[Instruction]) -> list[Flights]:
    """What may be in flight before each instruction, over all paths that lead there."""
    loops, follow = innermost_loops(code), successors(code)
    loop_of = {a.address: next((x for x in loops if x[0] <= a.address <= x[1]), None) for a in code}
    before: list[Flights | None] = [None] * len(code)
    before[0] = {}
    waiting = [0]
    while waiting:
        i = waiting.pop()
        flights = after(code[i], before[i] or {})
        for j in follow[i]:
            there = []
            for flight, groups in flights.items():
                loop = loop_of[flight.product]
                left = j <= i or (loop is not None and not loop[0] <= code[j].address <= loop[1])
                there.append((Flight(flight.product, flight.earlier or left), groups))
            known = before[j]
            joined = merged([*there, *(known or {}).items()])
            if joined != known:
                before[j] = joined
                waiting.append(j)
    return [flights or {} for flights in before]


def faults_of(a: Instruction, flights: Flights, products: dict[int, Product]) -> Iterator[str]:
    """What is wrong with an instruction while these products are in flight."""
    if a.opcode in COPIES and any(flight.earlier for flight in flights):
        yield "copies into a buffer that a product of an earlier iteration may still read"
    running = {flight.product: products[flight.product] for flight, groups in flights.items() if groups < RETIRED}
    if a.opcode == "HGMMA":
        own = products[a.address]
        for address, other in running.items():
            if own.accumulators != other.accumulators and set(own.accumulators) & set(other.accumulators):
                yield f"accumulates over accumulators of the product at {address:#06x}, which is in flight"
            if set(own.left) & set(other.accumulators):
                yield f"multiplies accumulators of the product at {address:#06x}, which is in flight"
            if set(own.accumulators) & set(other.left):
                yield f"accumulates over an operand of the product at {address:#06x}, which is in flight"
    elif running:
        written, read = registers(a)
        for address, other in running.items():
            if (written | read) & set(other.accumulators):
                yield f"touches an accumulator of the product at {address:#06x}, which is in flight"
            if written & set(other.left):
                yield f"overwrites an operand of the product at {address:#06x}, which is in flight"


def hazards(code: Sequence[Instruction]) -> list[str]:
    """The faults of one kernel for sm_90, a line each, by address; empty for kernels without products of warpgroups."""
    products = {a.address: product_of(a) for a in code if a.opcode == "HGMMA"}
    if not products:
        return []
    found = []
    for a, flights in zip(code, flights_before(code), strict=True):
        if flights and not a.guard.startswith("@!PT"):
            found += [f"{a}: {fault}" for fault in faults_of(a, flights, products)]
    return found
