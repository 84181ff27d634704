"""A causal diffusion transformer in the Wan 2.1 architecture, whose self-attention is the caller's.

The model knows nothing of caches, windows or memory. Every self-attention layer hands its queries, keys and values to
the caller's `Attend`, which decides what the chunk sees. The names of the parameters are those of the original Wan 2.1
release, so that its checkpoints load as they are.

It differs from the original Wan in three points. The timestep is given per frame, RoPE takes absolute frame indices of
any size, and a condition, such as pixel coordinates, may be concatenated to the noisy channels, as in Wan's
image-to-video models.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memflow_ops.cache.attend import Attend, AttendProjections
from memflow_ops.ops.cache_write import QKNorm
from memflow_ops.rotary import apply_rotation, rope_rotation

TextKeysValues = list[tuple[Tensor, Tensor]]
"""Per layer the keys (after norm_k) and values of the text cross-attention, each (B, text_len, heads, head_dim)."""


class TimeEmbedding(NamedTuple):
    """The embedding of the timesteps of a pass. B or F is 1 if all stories or frames have the same timestep."""

    embedding: Tensor  # (B, F, dim), for the head
    modulation: Tensor  # (B, F, 6, dim), for the blocks


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model, and what its output means.

    `in_dim` includes the channels of the condition: x has out_dim channels, and `condition` the other in_dim - out_dim.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int
    text_len: int
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    prediction: Literal["velocity", "x0"] = "velocity"

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # JSON brings a list
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim must be num_heads times an even number, got dim={self.dim}, heads={self.num_heads}")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise ValueError(f"patch_size must be (1, height, width), got {self.patch_size}")
        if self.in_dim < self.out_dim:
            raise ValueError(f"in_dim must be at least out_dim, got in_dim={self.in_dim}, out_dim={self.out_dim}")
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction must be 'velocity' or 'x0', got {self.prediction!r}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class ModelTokens(Protocol):
    """Which tokens a pass computes, and in what order: a `TokenOrder`, or one process's part of them."""

    def apply(self, x: Tensor) -> Tensor:
        """The tokens that the pass computes, of x (B, F * T, ...) in raster order."""

    def undo(self, x: Tensor) -> Tensor:
        """All tokens (B, F * T, ...) in raster order, of what the pass has computed."""


# ------------------------------------------------------------------------------------------------------------ positions


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """The sinusoidal embedding (..., dim) float32 of timesteps t (...): cosines, then sines, computed in float64 as in
    Wan."""
    half = dim // 2
    frequencies = torch.arange(half, dtype=torch.float64, device=t.device).div(-half).mul(math.log(10_000)).exp()
    angles = t.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


# --------------------------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, computed in float32 for every dtype of the model."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm, computed in float32 for every dtype of the model."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """The projections and norms of Wan's self-attention and of its text cross-attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        return self.heads(self.norm_q(self.q(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before any norm."""
        return self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))

    @property
    def norm(self) -> QKNorm:
        return QKNorm(self.norm_q.weight, self.norm_k.weight, self.norm_q.eps)


class Block(nn.Module):
    """Self-attention, text cross-attention and feed-forward. The timestep modulates the first and the last."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def encode_text(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, text_len, heads, head_dim) of text after the text MLP (B, text_len, dim)."""
        return self.cross_attn.keys_values(context)

    def forward(self, x: Tensor, time: Tensor, text: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        """The block's output, like x. x (B, F * T, dim), time (B, F, 6, dim), text: keys and values (B, text_len,
        heads, head_dim)."""
        return self.after(x, self.attend(x, time, layer, attend), time, *text)

    def attend(self, x: Tensor, time: Tensor, layer: int, attend: Attend) -> Tensor:
        """The block up to and including its self-attention, which is the caller's `attend`."""
        if isinstance(attend, AttendProjections) and not torch.is_grad_enabled():
            return attend.projections(layer, *self.before(x, time, normalise=False), self.self_attn.norm)
        return attend(layer, *self.before(x, time))

    def write_keys(self, x: Tensor, time: Tensor, layer: int, attend: Attend) -> None:
        """The block up to its self-attention, for a pass that ends there."""
        self.attend(x, time, layer, attend)

    def before(self, x: Tensor, time: Tensor, normalise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The block up to its self-attention: the queries, keys and values for `attend`."""
        shift, scale = self.modulated(time, slice(2), x.dtype)
        h = modulate(self.norm1(x), shift, scale)
        if not normalise:
            return self.self_attn.projections(h)
        return self.self_attn.queries(h), *self.self_attn.keys_values(h)

    def after(self, x: Tensor, attended: Tensor, time: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rest of the block. attended: what `attend` returned. k, v: of the text."""
        gate, ffn_shift, ffn_scale, ffn_gate = self.modulated(time, slice(2, 6), x.dtype)
        x = add_gated(x, self.self_attn.o(attended.flatten(2)), gate)

        q = self.cross_attn.queries(self.norm3(x))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        x = x + self.cross_attn.o(out.flatten(2))

        return add_gated(x, self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)

    def modulated(self, time: Tensor, part: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """A part of the six modulations (B, F, dim): shift, scale and gate of the self-attention, then of the
        feed-forward."""
        return (self.modulation[:, part] + time[:, :, part]).to(dtype).unbind(2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, F * T, dim) * (1 + scale) + shift, with shift and scale (B, F, dim) per frame."""
    per_frame = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], per_frame, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update, with x and update (B, F * T, dim) and gate (B, F, dim) per frame."""
    per_frame = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, per_frame), update.unflatten(1, per_frame), gate[:, :, None]).flatten(1, 2)


class Head(nn.Module):
    """Norm, modulation by the time embedding before `time_projection`, and projection to the values of a patch."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The values (B, F * T, patch positions * out_dim) for x (B, F * T, dim) and embedding (B, F, dim)."""
        shift, scale = (self.modulation + embedding[:, :, None]).to(x.dtype).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


# ---------------------------------------------------------------------------------------------------------------- model


class CausalVideoModel(nn.Module):
    """The network; one call is one pass over one chunk. `ModelConfig.prediction` says what its raw output means."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block in place, except its attention to the past: the part before it and the part after it,
        each as one graph. All blocks share the compiled code, so that each shape of a chunk is compiled once. Results
        change by rounding.

        backend: of torch.compile.
        """
        for block in cast("list[Block]", self.blocks):
            for part in ("before", "after"):
                whole = torch.compile(getattr(block, part), fullgraph=True, dynamic=False, backend=backend)
                setattr(block, part, whole)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a frame; a ValueError if it does not divide into patches."""
        _, patch_height, patch_width = self.config.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(f"a {height} x {width} frame does not divide into {patch_height} x {patch_width} patches")
        return height // patch_height, width // patch_width

    def tokens(self, height: int, width: int) -> int:
        """Tokens per frame."""
        return math.prod(self.grid(height, width))

    def encode_text(self, embeddings: Tensor) -> TextKeysValues:
        """The text keys and values of every layer for embeddings (B, Lt, text_dim); needed once per prompt.

        Texts are padded with zeros to text_len before the text MLP. As in Wan, the padding is not masked: all text_len
        positions are attended to.
        """
        self.check_text(embeddings)
        padded = F.pad(embeddings, (0, 0, 0, self.config.text_len - embeddings.shape[1]))
        context = self.text_embedding(padded.to(self.patch_embedding.weight.dtype))
        return [block.encode_text(context) for block in cast("list[Block]", self.blocks)]

    def check_text(self, embeddings: Tensor) -> None:
        """A ValueError unless `encode_text` can take these embeddings."""
        config = self.config
        if embeddings.dim() != 3 or embeddings.shape[1] > config.text_len or embeddings.shape[2] != config.text_dim:
            expected = f"(batch, up to {config.text_len}, {config.text_dim})"
            raise ValueError(f"text embeddings must be {expected}, got {tuple(embeddings.shape)}")

    def rotate(self, x: Tensor, frames: Tensor, grid: tuple[int, int]) -> Tensor:
        """Applies 3-D RoPE to x (B, F * h * w, heads, head_dim). frames: absolute, (F,) or (B, F). grid: (h, w)."""
        rows, columns = (torch.arange(n, device=x.device, dtype=torch.long) for n in grid)
        return apply_rotation(x, *rope_rotation(x.shape[-1], frames.to(x.device), rows, columns))

    def encode_time(self, t: Tensor) -> TimeEmbedding:
        """Embeds timesteps t (B, F), from 0 (clean) to 1000. One embedding serves all passes with these timesteps."""
        waves = sinusoid(t, self.config.freq_dim).to(self.patch_embedding.weight.dtype)
        embedding = self.time_embedding(waves)
        return TimeEmbedding(embedding, self.time_projection(embedding).unflatten(-1, (6, -1)))

    def forward(
        self,
        x: Tensor,
        t: Tensor | TimeEmbedding,
        text: TextKeysValues,
        attend: Attend,
        condition: Tensor | None = None,
        order: ModelTokens | None = None,
    ) -> Tensor:
        """One pass over a chunk; the output is like x.

        x: noisy latents (B, out_dim, F, H, W).
        t: timesteps (B, F) from 0 (clean) to 1000, or what `encode_time` makes of them.
        text: of `encode_text`.
        condition: (B, in_dim - out_dim, F, H, W), given if and only if in_dim > out_dim.
        order: in which `attend` sees the tokens, and which of them; None: all, row by row. Rotations must be in the
            same order. Where it has not whole frames, the timesteps must be those of one frame, (B, 1).
        """
        hidden, embedding, grid = self._through(x, t, text, attend, condition, order, len(self.blocks))
        patches = self.head(hidden, embedding.embedding)
        return self._unpatched(patches if order is None else order.undo(patches), x.shape[2], grid)

    def forward_keys(
        self,
        x: Tensor,
        t: Tensor | TimeEmbedding,
        text: TextKeysValues,
        attend: Attend,
        condition: Tensor | None = None,
        order: ModelTokens | None = None,
    ) -> None:
        """A pass that only writes keys and values: as `forward`, but it ends when those of the last layer have been
        handed to `attend`, whose result for that layer is not used."""
        last = len(self.blocks) - 1
        hidden, embedding, _ = self._through(x, t, text, attend, condition, order, last)
        cast(Block, self.blocks[last]).write_keys(hidden, embedding.modulation, last, attend)

    def _through(
        self,
        x: Tensor,
        t: Tensor | TimeEmbedding,
        text: TextKeysValues,
        attend: Attend,
        condition: Tensor | None,
        order: ModelTokens | None,
        blocks: int,
    ) -> tuple[Tensor, TimeEmbedding, tuple[int, int]]:
        """Runs the first so many blocks. Returns the tokens (B, F * T, dim), their time embedding and their grid."""
        hidden, grid = self._hidden(x, condition, order)
        embedding = t if isinstance(t, TimeEmbedding) else self.encode_time(t)
        if hidden.shape[1] != x.shape[2] * math.prod(grid) and embedding.embedding.shape[1] != 1:
            raise ValueError("a pass over some tokens of a chunk takes one timestep for all frames, (B, 1)")
        for layer in range(blocks):
            hidden = self.blocks[layer](hidden, embedding.modulation, text[layer], layer, attend)
        return hidden, embedding, grid

    def _hidden(
        self, x: Tensor, condition: Tensor | None, order: ModelTokens | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The chunk's tokens (B, F * T, dim), which include the condition, and their grid."""
        if condition is not None:
            x = torch.cat([x, condition.to(x.dtype).expand(len(x), *condition.shape[1:])], dim=1)
        if x.shape[1] != self.config.in_dim:
            raise ValueError(f"the model takes {self.config.in_dim} channels, condition included, got {x.shape[1]}")
        grid = self.grid(*x.shape[3:])
        return self._patches(x, grid, order), grid

    def _patches(self, x: Tensor, grid: tuple[int, int], order: ModelTokens | None) -> Tensor:
        """Embeds the patches of x (B, in_dim, F, H, W) as tokens (B, F * T, dim). Patches do not overlap, so that the
        convolution is one matrix product."""
        _, patch_height, patch_width = self.config.patch_size
        x = x.unflatten(4, (grid[1], patch_width)).unflatten(3, (grid[0], patch_height))  # (B, C, F, h, p, w, q)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)  # (B, F * T, C * p * q)
        if order is not None:
            x = order.apply(x)
        weight = self.patch_embedding.weight
        return F.linear(x.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def _unpatched(self, x: Tensor, frames: int, grid: tuple[int, int]) -> Tensor:
        """Joins patches (B, F * T, p * q * out_dim), channels last, to latents (B, out_dim, F, H, W)."""
        _, patch_height, patch_width = self.config.patch_size
        x = x.unflatten(-1, (patch_height, patch_width, self.config.out_dim)).unflatten(1, (frames, *grid))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # from (B, F, h, w, p, q, C)
