"""What a model is told beside the text and the noise."""

import torch
from torch import Tensor


def coordinates(frames: int, height: int, width: int) -> Tensor:
    """The toy model's condition: x and y of every pixel, -1..1 from edge to edge, (1, 2, frames, height, width).

    RoPE tells tokens how far apart they are, never where in the frame they stand; a horizon needs to know.
    """
    x, y = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in (width, height))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]))[None, :, None].expand(1, 2, frames, -1, -1)
