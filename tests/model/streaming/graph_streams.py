"""Streams for the tests of recorded passes, on a CPU and on a GPU: two stories that switch alone and together."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

SIZE, TEXT_DIM, CHUNKS = 4, 4, 22


def encode(prompts) -> Tensor:
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(F.pad(torch.randn(2, TEXT_DIM, generator=generator), (0, 0, 0, 1)))
    return torch.stack(rows)


def prompts_of(index: int) -> list[str]:
    """Of a chunk."""
    return ["abcd"[index // 5 % 4], "xyz"[index // 5 % 3] if index < 12 else "xyz"[index // 2 % 3]]


def model_of(prediction: str = "velocity", dim: int = 16) -> CausalVideoModel:
    torch.manual_seed(3)
    sizes = {"dim": dim, "ffn_dim": 16, "num_heads": 2, "num_layers": 2, "in_dim": 2, "out_dim": 2}
    config = ModelConfig(**sizes, text_dim=TEXT_DIM, text_len=3, freq_dim=8, prediction=prediction)
    model = CausalVideoModel(config).eval()
    for name, parameter in model.named_parameters():
        if ".q." in name or ".k." in name:  # sharper attention: what is attended to matters
            parameter.data.mul_(4)
    return model


def settings_of(**changes) -> StreamSettings:
    defaults = {"height": SIZE, "width": SIZE, "steps": 2, "block_size": 2, "query_group": 5, "top_k": 2, "shift": 7.0}
    return StreamSettings(**{**defaults, "window_frames": 9, "bank_frames": 2, "device_frames": 30, **changes})


def assert_same(got: list[Chunk], want: list[Chunk]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.frames, b.frames), f"chunk {a.index}"
        unlike = {"frames": b.frames, "seconds": b.seconds, "replayed": b.replayed}
        assert replace(a, **unlike) == b
