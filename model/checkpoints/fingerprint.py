"""Short marks by which other weights of the same names are told from those that a run was begun with."""

import zlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from memflow_ops.model.checkpoints.containers import mapped_weights

SAMPLED = 256
"""Numbers of a weight in memory, and up to twice as many, that a fingerprint goes by."""
SAMPLED_IN_FILES = 16
"""As `SAMPLED`, of a weight in a file, where each number may be a page that is read from the disk."""


def fingerprint(weights: Iterable[tuple[str, Tensor]], sampled: int = SAMPLED) -> str:
    """Eight hexadecimal digits of weights by name: a CRC-32 of some numbers of every weight, from all over it, because
    all of them would take seconds. The order of the weights does not matter."""
    marks = []
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        some = flat[:: flat.numel() // sampled or 1].double().contiguous()
        mark = zlib.crc32(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        marks.append((name, zlib.crc32(some.numpy().data, mark)))
    total = 0
    for _, mark in sorted(marks):
        total = zlib.crc32(mark.to_bytes(4, "little"), total)
    return f"{total:08x}"


def fingerprint_of_files(path: Path, names: tuple[str, ...], beginnings: tuple[str, ...]) -> str:
    """The fingerprint of the weights in a file or folder whose names have these beginnings; see `count_numbers`. Reads
    little more than what it goes by."""
    mapped = mapped_weights(path, names)
    return fingerprint(((name, x) for name, x in mapped if name.startswith(beginnings)), SAMPLED_IN_FILES)
