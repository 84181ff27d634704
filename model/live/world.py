"""What is streamed live: a model and its settings, what may be typed, and how latents become pixels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from memflow_ops.environment import environment
from memflow_ops.model.stories.video import FRAMES_PER_SECOND, SCALE, to_pixels
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.language import CHARACTERS, EMPTY, PLACES, embed_prompts, parse_prompt
from memflow_ops.model.toy.settings import TOY_SETTINGS


class Decoder(Protocol):
    """From the latents of one video to its pixels, chunk by chunk."""

    def pixels(self, latents: Tensor) -> np.ndarray:
        """The video frames (frames, H, W, 3) uint8, RGB, of the next latents (1, C, F, h, w)."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class LiveWorld:
    """What a page streams, and what it must know of it. All of it is checked before the first page is served."""

    about: str
    """The model, in words."""
    settings: StreamSettings
    """Of the stream with memory. Its history has room for the longest session."""
    height: int
    width: int
    """Of the video of one stream, in pixels."""
    fps: int
    """Video frames per second."""
    hint: str
    """What may be typed, in words."""
    examples: tuple[str, ...]
    """Prompts to choose from; a session begins with the first."""
    check: Callable[[str], object]
    """Raises a ValueError for a prompt that cannot be used."""
    streamer: Callable[[StreamSettings, int], Streamer]
    """Makes a stream of one story, with these settings and this seed."""
    decoder: Callable[[], Decoder]
    record: dict[str, object]
    """What the timeline file says of the model, the machine and the versions."""


class ToyPixels:
    """The toy world's latents are pixels already; each becomes a square."""

    def pixels(self, latents: Tensor) -> np.ndarray:
        return to_pixels(latents[0]).repeat(SCALE, 1).repeat(SCALE, 2)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def toy_world(
    device: torch.device, chunks: int, weights: Path | None = None, changes: Mapping[str, Any] | None = None
) -> LiveWorld:
    """The toy world. chunks: of the longest session. weights: None for those that come with the package. changes: what
    differs from `TOY_SETTINGS`."""
    model = load_model(weights or TOY_WEIGHTS, device)
    settings = replace(TOY_SETTINGS, **(changes or {}))
    if settings.memory == "full":
        settings = replace(settings, device_frames=max(settings.device_frames, chunks))
    elif settings.memory == "memflow":
        settings = replace(settings, host_frames=max(settings.host_frames, chunks - settings.device_frames))
    settings.cache_layout(model, 1).check_room(device)
    return LiveWorld(
        about="the toy world",
        settings=settings,
        height=settings.height * SCALE,
        width=settings.width * SCALE,
        fps=FRAMES_PER_SECOND,
        hint=f"Who ({', '.join(CHARACTERS)}, two of them, or {EMPTY}) and where ({', '.join(PLACES)}).",
        examples=(
            "a ball in the meadow",
            "a star in the desert",
            "an empty sea",
            "the ball at night",
            "the star and the ball in the meadow",
        ),
        check=parse_prompt,
        streamer=lambda s, seed: Streamer(model, 1, s, seed, encode=embed_prompts),
        decoder=ToyPixels,
        record={
            **environment(device),
            "weights": weights.name if weights else f"memflow_ops/model/weights/{TOY_WEIGHTS.name}",
        },
    )
