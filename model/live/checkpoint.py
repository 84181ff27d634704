"""A real checkpoint, streamed live: the text encoder stays loaded too, because nobody knows the next prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memflow_ops.environment import environment
from memflow_ops.model.checkpoints.containers import count_numbers
from memflow_ops.model.checkpoints.native import empty_model
from memflow_ops.model.checkpoints.pretrained import Pretrained
from memflow_ops.model.live.world import LiveWorld
from memflow_ops.model.pipeline.budget import Budget, FreeMemory, Item, size
from memflow_ops.model.pipeline.plan import TEXT_ENCODER_NAMES, StreamOptions, stream_budget
from memflow_ops.model.pipeline.settings import FRAMES_PER_SECOND, wan_settings
from memflow_ops.model.pipeline.sources import Sources, latent_size
from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.streaming.settings import USED_BY, StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.wan.text_encoder import UMT5TextEncoder, find_text_encoder
from memflow_ops.model.wan.vae import StreamingDecoder, load_vae

EXAMPLES = (
    "A red fox walks through a snowy forest in the morning, in realistic style.",
    "A harbour with wooden boats at noon, in realistic style.",
    "The red fox sits on the harbour wall at sunset, in realistic style.",
)
PROMPTS_KEPT = 32
"""Embeddings that are kept, so that the streams of a session encode a prompt once."""


class WanPixels:
    """Wan's VAE, chunk by chunk."""

    def __init__(self, vae: Any):
        self._decoder = StreamingDecoder(vae)

    def pixels(self, latents: Tensor) -> np.ndarray:
        return to_pixels(self._decoder.decode(latents)[0])

    def state_dict(self) -> dict[str, Any]:
        return self._decoder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._decoder.load_state_dict(state)


def plan_wan(
    sources: Sources,
    pretrained: Pretrained,
    free: FreeMemory,
    changes: Mapping[str, Any],
    *,
    memory: str | None,
    height: int,
    width: int,
    chunks: int,
    sessions: int,
    baseline: bool,
    text_device: torch.device,
    options: StreamOptions,
) -> Budget:
    """The memory of a server of so many sessions, each of so many chunks, before anything is loaded.

    changes: fields of `StreamSettings`. memory: None for what the checkpoint was tuned for. height, width: of the
    video, in pixels. text_device: where the text encoder stays. A ValueError where it does not fit.
    """
    latent_height, latent_width = latent_size(sources.vae, height, width)
    kind = memory or pretrained.memory
    tuned = {"positions": pretrained.positions} if kind in USED_BY["positions"] else {}
    settings = wan_settings(kind, **{**tuned, **changes}, height=latent_height, width=latent_width)
    settings = options.for_story(settings, ("one prompt", "and another"))
    items = []
    if text_device == free.device:
        encoder, _ = find_text_encoder(sources.text_encoder)
        numbers = count_numbers(encoder, ("model",), TEXT_ENCODER_NAMES)
        items.append(Item("text encoder", numbers * sources.torch_dtype(free.device).itemsize, "it stays loaded"))
    if baseline and settings.memory != "none":
        model = empty_model(pretrained.config).to(sources.torch_dtype(free.device))
        layout = replace(settings, memory="none").cache_layout(model, sessions, free.device)
        items.append(Item("streams without memory", layout.device_bytes, f"{sessions} sessions"))
    taken = sum(item.size for item in items)
    if taken > free.bytes:
        words = " + ".join(f"{item.name} {size(item.size)}" for item in items)
        raise ValueError(f"{words} do not fit on {free.place}, where {size(free.bytes)} are free")
    rest = replace(free, bytes=free.bytes - taken)
    # As if all sessions were streamed together: their passes never run at once, so this is a little too much.
    budget = stream_budget(settings, sources, pretrained, rest, options, chunks, sessions)
    return replace(budget, other_items=(*items, *budget.other_items), free=free)


def wan_world(
    sources: Sources,
    pretrained: Pretrained,
    settings: StreamSettings,
    device: torch.device,
    text_device: torch.device,
    options: StreamOptions,
) -> LiveWorld:
    """Loads all parts. settings: of `plan_wan`'s budget."""
    dtype, config = sources.torch_dtype(device), pretrained.config
    encoder = UMT5TextEncoder.from_folder(
        sources.text_encoder, text_len=config.text_len, dtype=dtype, device=text_device
    )
    model = pretrained.build(dtype, device)
    if options.compiled:
        model.compile_blocks()
    assert sources.vae is not None
    vae = load_vae(sources.vae, dtype, device)
    one = lru_cache(maxsize=PROMPTS_KEPT)(lambda prompt: encoder([prompt])[0])

    def encode(prompts: Sequence[str]) -> Tensor:
        return pad_sequence([one(prompt) for prompt in prompts], batch_first=True)

    scale = vae.spatial_compression_ratio
    return LiveWorld(
        about=sources.checkpoint.name,
        settings=settings,
        height=settings.height * scale,
        width=settings.width * scale,
        fps=FRAMES_PER_SECOND,
        hint="Any text, such as who is where, what happens, and in which style.",
        examples=EXAMPLES,
        check=lambda prompt: None,
        streamer=lambda s, seed: Streamer(model, 1, s, seed, encode=encode, cuda_graphs=options.cuda_graphs),
        decoder=lambda: WanPixels(vae),
        record={**environment(device), "sources": sources.described(), "compiled": options.compiled},
    )
