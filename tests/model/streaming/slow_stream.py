"""A stream with nothing clever, which `Streamer` is held against: it keeps every frame in a dictionary and attends to a
concatenation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.model.streaming.inputs import pixel_coordinates
from memflow_ops.model.streaming.sampler import FlowMatchSampler
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.language import embed_prompts
from memflow_ops.model.wan.transformer import CausalVideoModel


class SlowStream:
    """One story, chunk by chunk, with nothing clever: all frames ever made, as un-rotated keys and values.

    banks: per chunk the retrieved frames (memory="memflow" with every block activated).
    """

    def __init__(self, model: CausalVideoModel, settings: StreamSettings, banks: Sequence[Sequence[int]] = ()):
        self.model, self.settings, self.banks = model, settings, banks
        self.window: dict[int, list] = {}  # frame -> per layer (k, v), re-cached ones anew
        self.first: dict[int, list] = {}  # frame -> the same, as of its own clean pass
        self.clean: dict[int, Tensor] = {}
        self.sampler = FlowMatchSampler(settings.steps, settings.shift, prediction=model.config.prediction)

    def past(self, chunk: int) -> list[int]:
        """The frames beyond the local window that a chunk sees."""
        settings, size = self.settings, self.settings.chunk_frames
        old = range(max(0, (chunk + 1) * size - settings.window_frames))
        sink = [frame for frame in old if frame < settings.sink_frames]
        prototypes = [frame for frame in old if frame >= settings.sink_frames and frame % size == 0]
        bank = list(self.banks[chunk]) if self.banks else []
        return {"none": [], "sink": sink, "full": sink + prototypes, "memflow": sink + bank}[settings.memory]

    def run_pass(self, x: Tensor, t: float, text, first_frame: int, past: list[int], local: list[int]):
        model, grid = self.model, self.model.grid(self.settings.height, self.settings.width)
        own = []

        def attend(layer, q, k, v):
            own.append((k, v))
            known = [self.first[frame][layer] for frame in past] + [self.window[frame][layer] for frame in local]
            keys = torch.cat([k for k, _ in known] + [k], dim=1)
            values = torch.cat([v for _, v in known] + [v], dim=1)
            here = torch.arange(first_frame, first_frame + self.settings.chunk_frames)
            q = model.rotate(q, here, grid)
            keys = model.rotate(keys, torch.cat([torch.tensor(past + local, dtype=torch.long), here]), grid)
            parts = (part.transpose(1, 2) for part in (q, keys, values))
            return F.scaled_dot_product_attention(*parts).transpose(1, 2)

        frames = x.shape[2]
        y = model(
            x,
            torch.full((1, frames), t),
            text,
            attend,
            pixel_coordinates(frames, self.settings.height, self.settings.width),
        )
        tokens = own[0][0].shape[1] // frames
        kept = [
            [(k[:, i * tokens : (i + 1) * tokens], v[:, i * tokens : (i + 1) * tokens]) for k, v in own]
            for i in range(frames)
        ]
        return y, kept

    @torch.no_grad()
    def run(self, prompts: Sequence[str], noises: Sequence[Tensor]) -> list[Tensor]:
        settings, size, done, previous = self.settings, self.settings.chunk_frames, [], None
        for chunk, (prompt, x) in enumerate(zip(prompts, noises, strict=True)):
            first_frame, past = chunk * size, self.past(chunk)
            text = self.model.encode_text(embed_prompts([prompt]))
            window_start = max(0, first_frame + size - settings.window_frames)
            local = list(range(window_start, first_frame))
            if settings.recache and previous not in (None, prompt):
                for start in range(window_start, first_frame, size):
                    clean = torch.stack([self.clean[start + i] for i in range(size)], dim=2)
                    seen = list(range(window_start, start))
                    _, kept = self.run_pass(clean, 0.0, text, start, past, seen)
                    self.window.update({start + i: kept[i] for i in range(size)})
            for i, sigma in enumerate(self.sampler.sigmas[:-1]):
                y, _ = self.run_pass(x, 1000 * sigma, text, first_frame, past, local)
                x = self.sampler.step(x, self.sampler.denoised(x, y, sigma), i)
            _, kept = self.run_pass(x, 0.0, text, first_frame, past, local)
            for i in range(size):
                self.window[first_frame + i] = self.first[first_frame + i] = kept[i]
                self.clean[first_frame + i] = x[:, :, i]
            done.append(x)
            previous = prompt
        return done
