"""What a stream gives for every chunk: its frames, and what it remembered."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A finished chunk of B stories, and what it remembered."""

    index: int
    """0, 1, 2, ..."""
    first_frame: int
    """Absolute index of its first latent frame."""
    prompts: list[str]
    """Per story."""
    frames: Tensor
    """Clean latents (B, C, chunk_frames, H, W) float32, on the model's device."""
    retrieved: list[list[int]]
    """Per story the retrieved frames, best first. Released: the frames of any layer's bank, most widely held first."""
    relevance: list[list[float]]
    """Per story the score of each retrieved frame. Released: the share of layers that hold it."""
    candidates: list[list[int]]
    """Per story the frames that activation chose from, sink included, ascending."""
    activation: list[list[float]]
    """Per story the share of each candidate frame in all blocks selected in the clean pass (layers, heads, query
    groups). Sums to 1; empty where there is no candidate."""
    seconds: float
    """Wall time of the chunk."""
    replayed: int = 0
    """How many of its passes, re-caching included, were replays of a CUDA graph."""

    def of_story(self, number: int) -> "Chunk":
        """One story's part, without its frames, which need not stay in memory once they are decoded."""
        per_story = ("prompts", "retrieved", "relevance", "candidates", "activation")
        part: dict[str, Any] = {name: [getattr(self, name)[number]] for name in per_story}
        return replace(self, **part, frames=self.frames.new_empty(0))

    def saved(self) -> dict[str, Any]:
        """All of it but its frames, as JSON takes it."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "frames"}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "Chunk":
        """What `saved` has returned, without frames."""
        return cls(**saved, frames=torch.empty(0, dtype=torch.float32, device="cpu"))
