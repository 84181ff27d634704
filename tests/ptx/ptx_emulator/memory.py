"""Which bytes of memory a launch may touch, and which of them somebody has written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Stretch:
    """Bytes from `base` on that hold one or several arguments. For each byte: whether an element of an argument is
    there (`allowed`), and whether it has been written (`defined`)."""

    base: int
    allowed: np.ndarray
    defined: np.ndarray
    names: str
    shadow: np.ndarray | None
    """Where `defined` is kept beyond the launch; None: the memory is not from torch.empty, and all of it is defined."""


@dataclass
class Written:
    """What has been written of the memory that torch.empty returned since `poisoned` began."""

    shadows: dict[int, tuple[torch.Tensor, np.ndarray]] = field(default_factory=dict)
    """By the address of the storage: the tensor, which keeps the memory, and a byte for each of its bytes."""

    def poison(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill a new tensor with NaN, or an absurd integer, and note that nothing has been written there."""
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.fill_(poison_of(tensor.dtype))
            self.shadows[tensor.data_ptr()] = (tensor, np.zeros(tensor.untyped_storage().nbytes(), np.uint8))
        return tensor

    def shadow_of(self, address: int, size: int) -> np.ndarray | None:
        """For each of these bytes whether it was written, by the host too; None if they are not from torch.empty."""
        for base, (tensor, shadow) in self.shadows.items():
            if base <= address and address + size <= base + len(shadow):
                flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                poison = torch.full((), poison_of(tensor.dtype), dtype=tensor.dtype)
                same_bits = bits_of(flat) == bits_of(poison.view(1))
                shadow |= np.repeat(~same_bits, tensor.element_size()).astype(np.uint8)[: len(shadow)]
                return shadow[address - base : address - base + size]
        return None


def poison_of(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else -77 if dtype.is_signed else 77


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a contiguous tensor as unsigned integers."""
    return tensor.view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def elements(tensor: torch.Tensor) -> np.ndarray:
    """For each byte from data_ptr on whether it is of an element of the tensor: strides may leave gaps."""
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    mask = torch.zeros(extent, dtype=torch.uint8)
    mask.as_strided(tensor.shape, tensor.stride()).fill_(1)
    return np.repeat(mask.numpy(), tensor.element_size())


def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Parts of a tensor none of which is stretched out over much more memory than it has elements."""
    extent = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if extent <= max(4 * tensor.numel(), 1 << 22):
        return [tensor]
    widest = max(range(tensor.dim()), key=lambda i: tensor.stride(i) if tensor.shape[i] > 1 else -1)
    return [piece for i in range(tensor.shape[widest]) for piece in pieces(tensor.select(widest, i))]


def stretches(tensors: list[tuple[str, torch.Tensor]], written: Written) -> list[Stretch]:
    """Disjoint stretches of memory that hold the named tensors, which may overlap."""
    parts = [(piece.data_ptr(), elements(piece), name) for name, x in tensors if x.numel() for piece in pieces(x)]
    merged: list[tuple[int, np.ndarray, list[str]]] = []
    for base, mask, name in sorted(parts, key=lambda part: part[0]):
        if merged and base < merged[-1][0] + len(merged[-1][1]):
            first, old, names = merged[-1]
            whole = np.zeros(max(len(old), base - first + len(mask)), np.uint8)
            whole[: len(old)] = old
            whole[base - first : base - first + len(mask)] |= mask
            merged[-1] = (first, whole, [*names, name])
        else:
            merged.append((base, mask, [name]))
    out = []
    for base, mask, names in merged:
        shadow = written.shadow_of(base, len(mask))
        defined = np.ones(len(mask), np.uint8) if shadow is None else np.ascontiguousarray(shadow)
        out.append(Stretch(base, np.ascontiguousarray(mask), defined, "+".join(dict.fromkeys(names)), shadow))
    return out
