"""What a pass of the model reads beside the text: noisy latents, time embedding, RoPE angles and the condition."""

import torch
from torch import Tensor

from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig, TimeEmbedding
from memflow_ops.rotary import rope_rotation
from memflow_ops.token_order import token_order


def pixel_coordinates(frames: int, height: int, width: int) -> Tensor:
    """The condition of a model with in_dim = out_dim + 2: x and y of every pixel, (1, 2, frames, height, width)
    float32, from -1 to 1 between the edges of the frame.

    RoPE tells tokens how far apart they are, but not where in the frame they stand.
    """
    x, y = ((torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) * 2 / n - 1 for n in (width, height))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]))[None, :, None].expand(1, 2, frames, -1, -1)


def find_condition(config: ModelConfig, settings: StreamSettings, frames: int) -> Tensor | None:
    """The condition of so many frames that a stream gives a model of these sizes, None for a model that takes none; a
    ValueError for a model that takes another one."""
    if config.in_dim == config.out_dim:
        return None
    if config.in_dim == config.out_dim + 2:
        return pixel_coordinates(frames, settings.height, settings.width)
    raise ValueError(
        f"a stream can give the model pixel coordinates (2 channels) as condition, or none; this model "
        f"expects {config.in_dim - config.out_dim} channels"
    )


class PassInputs:
    """The inputs of the passes over some frames of B stories, usually a chunk. `set_frames` and `set_latents` write
    them in place, because a CUDA graph reads each from where it was when the graph was recorded.

    latents: (B, C, frames, H, W) float32, at their current noise level.
    time: the embedding of that noise level's timestep, shared by all stories and frames.
    order: of the tokens of a frame, see `token_order`.
    rotation: of `rope_rotation`, for the frames' tokens in that order.
    condition: see `find_condition`.
    """

    def __init__(self, model: CausalVideoModel, settings: StreamSettings, batch: int, frames: int | None = None):
        """frames: how many a pass has; None: those of a chunk."""
        config, device = model.config, model.patch_embedding.weight.device
        self.model, self.device, self.frames = model, device, frames or settings.chunk_frames
        self.grid = model.grid(settings.height, settings.width)
        self.order = token_order(settings.token_order, *self.grid, device)
        condition = find_condition(config, settings, self.frames)
        self.condition = None if condition is None else condition.to(device)
        shape = (batch, config.out_dim, self.frames, settings.height, settings.width)
        self.latents = torch.zeros(shape, device=device, dtype=torch.float32)
        tokens = (1, self.frames * self.grid[0] * self.grid[1], 1, config.head_dim // 2)
        cosines, sines = (torch.zeros(tokens, device=device, dtype=torch.float32) for _ in range(2))
        self.rotation = cosines, sines
        self._times: dict[float, TimeEmbedding] = {}
        self.time = TimeEmbedding(*map(torch.zeros_like, self._time(0.0)))

    def set_frames(self, first_frame: int) -> None:
        """Turns RoPE to the frames from this absolute index on."""
        frames = torch.arange(first_frame, first_frame + self.frames, device=self.device, dtype=torch.long)
        rows, columns = (torch.arange(n, device=self.device, dtype=torch.long) for n in self.grid)
        angles = rope_rotation(self.model.config.head_dim, frames, rows, columns)
        for kept, new in zip(self.rotation, angles, strict=True):
            kept.copy_(new if self.order is None else self.order.apply(new))

    def set_latents(self, x: Tensor, timestep: float) -> None:
        """Takes over x (B, C, frames, H, W) and its timestep, 0 to 1000."""
        self.latents.copy_(x)
        for kept, new in zip(self.time, self._time(timestep), strict=True):
            kept.copy_(new)

    @torch.no_grad()
    def _time(self, timestep: float) -> TimeEmbedding:
        """Computed once per timestep."""
        if timestep not in self._times:
            t = torch.full((1, 1), timestep, device=self.device, dtype=torch.float32)
            self._times[timestep] = self.model.encode_time(t)
        return self._times[timestep]
