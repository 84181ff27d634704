"""RoPE (arXiv 2104.09864) as every implementation in plain torch computes it."""

import torch
from torch import Tensor


def turn_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Each pair (x[2i], x[2i + 1]) of the last dimension as a complex number, times `turn`: one pass over memory, six
    times faster than products of the halves.

    x (..., D) float32 or float64, any strides · turn (..., D / 2) complex of that precision, broadcast -> like x.
    """
    x = x.contiguous()
    # torch sees pairs only where they are aligned, and torch.compile cannot ask where x lies
    if torch.compiler.is_compiling() or x.storage_offset() % 2:
        x = x.clone()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
