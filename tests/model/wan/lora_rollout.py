"""A LoRA on a small model of Wan's layout, and a rollout of several chunks with memory that gradients flow through."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memflow_ops import memory_attention
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=3, out_dim=3, text_dim=7, text_len=4, freq_dim=16
)
CHUNK_FRAMES, GRID = 3, (2, 2)
FRAME_TOKENS = 4


class LowRank(nn.Module):
    """W + B A: B starts at zero, as peft's does, but for `warm`, so that A has a gradient too."""

    def __init__(self, weight: Tensor, rank: int = 2, warm: float = 0.1):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], dtype=weight.dtype) / rank)
        self.b = nn.Parameter(warm * torch.randn(weight.shape[0], rank, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def model_with_lora(dtype: torch.dtype) -> tuple[CausalVideoModel, dict[str, nn.Parameter]]:
    """A frozen model, and the LoRA's parameters, on every projection of the self-attention."""
    torch.manual_seed(0)
    model = CausalVideoModel(CONFIG).requires_grad_(False)
    for parameter in model.parameters():  # norms' weights of 1 and biases of 0 would hide mistakes
        parameter.add_(0.1 * torch.randn_like(parameter))
    for block in model.blocks:
        for name in ("q", "k", "v", "o"):
            layer = getattr(block.self_attn, name)
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    model.to(dtype)
    return model, {name: x for name, x in model.named_parameters() if x.requires_grad}


class Rollout:
    """Attention of chunk after chunk: the local window is the chunk before and the chunk itself, the bank the first
    frames of all that are older, of which each group of 4 queries selects 2 blocks of 2 tokens."""

    def __init__(self, model: CausalVideoModel, impl: str):
        self.model, self.impl, self.chunk = model, impl, 0
        self.past: list[list[tuple[Tensor, Tensor]]] = []  # per clean chunk and layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames = torch.arange(CHUNK_FRAMES) + self.chunk * CHUNK_FRAMES
        q, k = self.model.rotate(q, frames, GRID), self.model.rotate(k, frames, GRID)
        self.written[layer] = (k, v)
        window = [chunk[layer] for chunk in self.past[-1:]] + [(k, v)]
        keys, values = (torch.cat(x, 1) for x in zip(*window, strict=True))
        bank = [tuple(x[:, :FRAME_TOKENS] for x in chunk[layer]) for chunk in self.past[:-1]]
        memory = [torch.cat(x, 1) for x in zip(*bank, strict=True)] or [None, None]
        sizes = dict(top_k=2, block_size=2, query_group=4)
        return memory_attention(q, keys, values, *memory, frame_tokens=FRAME_TOKENS, impl=self.impl, **sizes)

    def denoise(self, noise: Tensor, text) -> Tensor:
        """The next chunk (1, 3, F, H, W): one pass from noise, and the clean pass that later chunks attend to."""
        self.written = {}
        full = torch.full((1, CHUNK_FRAMES), 1000.0, dtype=noise.dtype)
        x0 = noise - self.model(noise, full, text, self.attend)
        self.model.forward_keys(x0, torch.zeros_like(full), text, self.attend)
        self.past.append([self.written[layer] for layer in range(CONFIG.num_layers)])
        self.chunk += 1
        return x0


def loss_of(model: CausalVideoModel, impl: str, chunks: int = 4) -> Tensor:
    """Distance of a rollout from a fixed video; every chunk is made from what the model made before."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.head.head.weight.dtype
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    text, rollout, losses = model.encode_text(normal(1, 3, 7)), Rollout(model, impl), []
    for _ in range(chunks):
        noise, target = normal(1, 3, CHUNK_FRAMES, 4, 4), normal(1, 3, CHUNK_FRAMES, 4, 4)
        losses.append(F.mse_loss(rollout.denoise(noise, text), 0.3 * target))
    return torch.stack(losses).mean()
