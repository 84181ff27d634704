"""Makes fixtures of the form that `memflow_ops.model.replay` replays, with a straight-line model of its own.

Written from the description of the released MemFlow alone, in float64, on lists of frames: nothing of ours is used, so
that whoever replays what it records has computed the same function twice.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """The sizes of a fixture."""

    dim: int = 24
    ffn_dim: int = 40
    num_heads: int = 2
    num_layers: int = 2
    text_dim: int = 7
    text_len: int = 9
    freq_dim: int = 16
    channels: int = 16
    local_attn_size: int = 12
    sink_size: int = 3
    bank_size: int = 3
    record_interval: int = 3
    frames_per_chunk: int = 3
    grid: tuple[int, int] = (6, 8)
    chunks: int = 13
    timesteps: tuple[float, ...] = (1000.0, 500.0, 0.0)
    text_tokens: int = 4
    text_tokens_after: int = 5
    switch_chunk: int = -1
    modes: tuple[str, ...] = ("dense", "sma")
    seed: int = 3
    omit: tuple[str, ...] = field(default=())
    """what the JSON leaves to its defaults"""


class Frame:
    """A latent frame as it is attended to: per layer rotated keys and values, (tokens, heads, head_dim)."""

    def __init__(self, index: int, keys: list[Tensor], values: list[Tensor]):
        self.index, self.keys, self.values = index, keys, values


class Recorder:
    def __init__(self, recording: Recording):
        self.r = recording
        self.weights = self.make_weights()
        self.head_dim = recording.dim // recording.num_heads

    def make_weights(self) -> dict[str, Tensor]:
        r, generator = self.r, torch.Generator().manual_seed(self.r.seed)
        weights: dict[str, Tensor] = {}

        def linear(name: str, inputs: int, outputs: int) -> None:
            weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
            weights[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

        def norm(name: str) -> None:
            weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(r.dim, generator=generator)

        weights["patch_embedding.weight"] = torch.randn(r.dim, r.channels, 1, 2, 2, generator=generator) / 8
        weights["patch_embedding.bias"] = 0.1 * torch.randn(r.dim, generator=generator)
        linear("text_embedding.0", r.text_dim, r.dim)
        linear("text_embedding.2", r.dim, r.dim)
        linear("time_embedding.0", r.freq_dim, r.dim)
        linear("time_embedding.2", r.dim, r.dim)
        linear("time_projection.1", r.dim, 6 * r.dim)
        for i in range(r.num_layers):
            for kind in ("self_attn", "cross_attn"):
                for part in "qkvo":
                    linear(f"blocks.{i}.{kind}.{part}", r.dim, r.dim)
                for part in "qk":
                    norm(f"blocks.{i}.{kind}.norm_{part}")
            norm(f"blocks.{i}.norm3")
            weights[f"blocks.{i}.norm3.bias"] = 0.1 * torch.randn(r.dim, generator=generator)
            linear(f"blocks.{i}.ffn.0", r.dim, r.ffn_dim)
            linear(f"blocks.{i}.ffn.2", r.ffn_dim, r.dim)
            weights[f"blocks.{i}.modulation"] = torch.randn(1, 6, r.dim, generator=generator) / r.dim**0.5
        linear("head.head", r.dim, 4 * r.channels)
        weights["head.modulation"] = torch.randn(1, 2, r.dim, generator=generator) / r.dim**0.5
        return weights

    # ------------------------------------------------------------------------------------------------------ the model

    def w(self, name: str) -> Tensor:
        return self.weights[name].double()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w(f"{name}.weight").T + self.w(f"{name}.bias")

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w(f"{name}.weight")

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.r.num_heads, self.head_dim)

    def text(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per layer keys and values of all text_len positions."""
        padded = torch.zeros(self.r.text_len, self.r.text_dim, dtype=torch.float64)
        padded[: len(context)] = context
        hidden = self.linear("text_embedding.2", F.gelu(self.linear("text_embedding.0", padded), approximate="tanh"))
        return [
            (
                self.heads(self.rms(f"blocks.{i}.cross_attn.norm_k", self.linear(f"blocks.{i}.cross_attn.k", hidden))),
                self.heads(self.linear(f"blocks.{i}.cross_attn.v", hidden)),
            )
            for i in range(self.r.num_layers)
        ]

    def turn(self, frame: int) -> Tensor:
        """RoPE of one frame's tokens as complex numbers, (tokens, 1, head_dim / 2)."""
        spatial = 2 * (self.head_dim // 6)
        sections = (self.head_dim - 2 * spatial, spatial, spatial)
        angles = []
        for row in range(self.r.grid[0]):
            for column in range(self.r.grid[1]):
                for position, channels in zip((frame, row, column), sections, strict=True):
                    angles += [position * 10000 ** (-2 * i / channels) for i in range(channels // 2)]
        angle = torch.tensor(angles, dtype=torch.float64).reshape(-1, 1, self.head_dim // 2)
        return torch.polar(torch.ones_like(angle), angle)

    def rotated(self, x: Tensor, first_frame: int) -> Tensor:
        turns = torch.cat([self.turn(first_frame + i) for i in range(self.r.frames_per_chunk)])
        pairs = torch.view_as_complex(x.reshape(*x.shape[:2], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).reshape(x.shape)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    def call(self, x: Tensor, timestep: float, text, first_frame: int, seen) -> tuple[Tensor, list[Frame]]:
        """One pass. seen(layer, q, own frames) -> attention output (tokens, heads, head_dim)."""
        r = self.r
        tokens = r.grid[0] * r.grid[1]
        pixels = x[0].double()
        hidden = F.conv3d(pixels, self.w("patch_embedding.weight"), self.w("patch_embedding.bias"), stride=(1, 2, 2))
        hidden = hidden.flatten(1).T
        half = r.freq_dim // 2
        angles = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        waves = torch.cat([angles.cos(), angles.sin()])
        embedding = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", waves)))
        time = self.linear("time_projection.1", F.silu(embedding)).reshape(6, r.dim)
        own = [Frame(first_frame + i, [], []) for i in range(r.frames_per_chunk)]
        for i in range(r.num_layers):
            block = f"blocks.{i}"
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.w(f"{block}.modulation")[0] + time
            h = F.layer_norm(hidden, (r.dim,), eps=1e-6) * (1 + scale) + shift
            q, k = (
                self.rotated(
                    self.heads(self.rms(f"{block}.self_attn.norm_{part}", self.linear(f"{block}.self_attn.{part}", h))),
                    first_frame,
                )
                for part in "qk"
            )
            v = self.heads(self.linear(f"{block}.self_attn.v", h))
            for number, frame in enumerate(own):
                frame.keys.append(k[number * tokens : (number + 1) * tokens])
                frame.values.append(v[number * tokens : (number + 1) * tokens])
            hidden = hidden + gate * self.linear(f"{block}.self_attn.o", seen(i, q, own).flatten(1))
            h = F.layer_norm(hidden, (r.dim,), self.w(f"{block}.norm3.weight"), self.w(f"{block}.norm3.bias"), 1e-6)
            q = self.heads(self.rms(f"{block}.cross_attn.norm_q", self.linear(f"{block}.cross_attn.q", h)))
            hidden = hidden + self.linear(f"{block}.cross_attn.o", self.attention(q, *text[i]).flatten(1))
            h = F.layer_norm(hidden, (r.dim,), eps=1e-6) * (1 + ffn_scale) + ffn_shift
            h = self.linear(f"{block}.ffn.2", F.gelu(self.linear(f"{block}.ffn.0", h), approximate="tanh"))
            hidden = hidden + ffn_gate * h
        shift, scale = self.w("head.modulation")[0] + embedding
        y = self.linear("head.head", F.layer_norm(hidden, (r.dim,), eps=1e-6) * (1 + scale) + shift)
        y = y.reshape(r.frames_per_chunk, *r.grid, 2, 2, r.channels).permute(5, 0, 1, 3, 2, 4)
        return y.reshape(1, r.channels, r.frames_per_chunk, 2 * r.grid[0], 2 * r.grid[1]), own

    # ----------------------------------------------------------------------------------------------------- the stream

    def run(self, mode: str, contexts: tuple[Tensor, Tensor], noises: list[Tensor], out: dict[str, Tensor]) -> list:
        r, calls = self.r, []
        kept: list[Frame] = []  # every frame of a clean pass, in order
        banks: list[list[Frame]] = [[] for _ in range(r.num_layers)]
        text = self.text(contexts[0])
        for chunk in range(r.chunks):
            topk: list = []
            first_frame = chunk * r.frames_per_chunk
            if chunk and r.bank_size:
                staged = kept[first_frame - r.frames_per_chunk]
                n = (chunk - 1) // r.record_interval + 1
                for layer, bank in enumerate(banks):
                    if n <= r.bank_size:
                        bank[n - 1 :] = [staged]
                        continue
                    keys = text[layer][0]
                    scores = torch.stack(
                        [
                            torch.einsum("thd,khd->htk", keys, frame.keys[layer]).mean() / self.head_dim**0.5
                            for frame in bank
                        ]
                    )
                    best = scores.topk(r.bank_size - 1).indices.tolist()
                    topk.append([best])
                    banks[layer] = [*(bank[i] for i in best), staged]
            if chunk == r.switch_chunk:
                text = self.text(contexts[1])
            x = noises[chunk]
            for step, timestep in enumerate(r.timesteps):
                choices: list = []

                def seen(layer, q, own, banks=banks, kept=kept, choices=choices):
                    everything = [*kept, *own]
                    sink, rest = everything[: r.sink_size], everything[r.sink_size :]
                    local = rest[-(r.local_attn_size - r.sink_size) :]
                    memory = [*sink, *banks[layer]]

                    def joined(frames: list[Frame], head: slice) -> list[Tensor]:
                        return [
                            torch.cat([getattr(f, part)[layer][:, head] for f in frames]) for part in ("keys", "values")
                        ]

                    if mode == "dense":
                        return self.attention(q, *joined([*memory, *local], slice(None)))
                    scores = torch.stack([(q.mean(0) * f.keys[layer].mean(0)).sum(-1) for f in memory], dim=1)
                    best = scores.topk(min(3, len(memory))).indices.tolist()
                    choices.append([best])
                    return torch.cat(
                        [
                            self.attention(
                                q[:, h : h + 1], *joined([*(memory[i] for i in best[h]), *local], slice(h, h + 1))
                            )
                            for h in range(r.num_heads)
                        ],
                        dim=1,
                    )

                y, own = self.call(x, timestep, text, first_frame, seen)
                name = f"{mode}.out.{chunk:02d}.{step}"
                out[name] = y[0, :, :, ::6, ::8].float().contiguous()
                topk += choices
                call = {"chunk": chunk, "step": step, "timestep": timestep, "out": name}
                call |= {"y_mean": y.mean().item(), "y_std": y.std().item(), "topk": topk}
                calls.append(call | {"topk_shapes": [list(torch.tensor(choice).shape) for choice in topk]})
                topk = []
                x = x - 0.25 * y
            kept += own
        return calls


def record(recording: Recording, folder: Path) -> tuple[Path, Path]:
    """Writes a fixture: FIXTURE.safetensors and FIXTURE.json."""
    r, recorder = recording, Recorder(recording)
    tensors = {f"weights.{name}": weight for name, weight in recorder.weights.items()}
    generator = torch.Generator().manual_seed(r.seed + 1)
    context = torch.randn(r.text_tokens, r.text_dim, generator=generator)
    after = torch.randn(r.text_tokens_after, r.text_dim, generator=torch.Generator().manual_seed(r.seed + 2))
    shape = (1, r.channels, r.frames_per_chunk, 2 * r.grid[0], 2 * r.grid[1])
    noises = [torch.randn(shape, generator=generator) for _ in range(r.chunks)]
    tensors["context"] = context
    if r.switch_chunk >= 0:
        tensors["context_after_switch"] = after
    for chunk, noise in enumerate(noises):
        tensors[f"noise_check.{chunk:02d}"] = noise[0, :2, :, ::20, ::26].contiguous()
    config = {"model_type": "t2v", "in_dim": r.channels, "out_dim": r.channels}
    for name in (
        *("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "freq_dim"),
        *("local_attn_size", "sink_size", "bank_size", "record_interval"),
    ):
        config[name] = getattr(r, name)
    description = {
        "config": {name: value for name, value in config.items() if name not in r.omit},
        "tokens_per_frame": math.prod(r.grid),
        "frames_per_chunk": r.frames_per_chunk,
        "timesteps": list(r.timesteps),
        "weight_seed": r.seed,
        "noise_seed": r.seed + 1,
        "text_tokens": r.text_tokens,
        "switch_chunk": r.switch_chunk,
    }
    description = {name: value for name, value in description.items() if name not in r.omit}
    for mode in r.modes:
        description[mode] = recorder.run(mode, (context.double(), after.double()), noises, tensors)
    paths = folder / "FIXTURE.safetensors", folder / "FIXTURE.json"
    save_file(tensors, paths[0])
    paths[1].write_text(json.dumps(description))
    return paths
