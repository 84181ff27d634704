"""The condition that a model may take beside the text and the noise."""

import torch
from torch import Tensor


def pixel_coordinates(frames: int, height: int, width: int) -> Tensor:
    """The condition of a model with in_dim = out_dim + 2: x and y of every pixel, (1, 2, frames, height, width)
    float32, from -1 to 1 between the edges of the frame.

    RoPE tells tokens how far apart they are, but not where in the frame they stand.
    """
    x, y = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in (width, height))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]))[None, :, None].expand(1, 2, frames, -1, -1)
