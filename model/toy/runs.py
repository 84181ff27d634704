"""A run of toy stories: its files, its video, its timeline."""

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from memflow_ops.environment import environment
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy.returns import find_returns, judge_return

HOW_MEASURED = (
    "The story is streamed twice from the same noise, with this memory and with memory=none, chunk by chunk in turn; "
    "who goes first alternates. ratio: median of (seconds with memory / seconds without) over the chunks that have a "
    "past beyond the local window, with its 20th and 80th percentile. seconds: wall time of a chunk: retrieval, "
    "re-caching, all passes, and the counting of what was activated."
)


@dataclass(frozen=True)
class ToyPlan:
    """Everything that a story's run depends on, checked before anything is generated."""

    prompts: list[str]
    folder: Path
    settings: StreamSettings
    seed: int = 0
    frames_per_prompt: int = 12
    baseline: bool = True
    """measure against memory=none"""
    weights: str = ""
    """what run.json calls them"""

    @property
    def prompts_by_chunk(self) -> list[str]:
        """The prompt of every chunk."""
        chunks = chunk_prompts([self.prompts], self.frames_per_prompt, self.settings.chunk_frames)
        return [prompt for (prompt,) in chunks]

    def prompt_number(self, chunk: int) -> int:
        """Which prompt, from 0, a chunk is made under."""
        return min(chunk * self.settings.chunk_frames // self.frames_per_prompt, len(self.prompts) - 1)


@dataclass
class ToyRun:
    """A story as far as it has been made."""

    plan: ToyPlan
    device: torch.device
    chunks: list[Chunk] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    """Per chunk uint8 (chunk_frames, H, W, 3)."""
    baseline_seconds: list[float] = field(default_factory=list)
    """Per chunk; may be one longer or shorter than `chunks` after an interruption."""
    baseline_frames: list[np.ndarray] = field(default_factory=list)
    interrupted: bool = False
    error: str | None = None

    @property
    def video(self) -> np.ndarray:
        return np.concatenate(self.frames)

    @property
    def baseline_video(self) -> np.ndarray | None:
        """The frames of memory=none, as many as those with memory; None where there are fewer."""
        if len(self.baseline_frames) < len(self.frames):
            return None
        return np.concatenate(self.baseline_frames[: len(self.frames)])

    def overhead(self) -> dict[str, object] | None:
        """What memory costs; None without a pair of chunks to compare."""
        settings = self.plan.settings
        pairs = [
            (chunk.seconds, without)
            for chunk, without in zip(self.chunks, self.baseline_seconds, strict=False)
            if chunk.first_frame + settings.chunk_frames > settings.window_frames
        ]
        if not pairs or settings.memory == "none":
            return None
        ratios = sorted(ours / without for ours, without in pairs)
        return {
            "against": "memory=none",
            "ratio": statistics.median(ratios),
            "ratio_p20": ratios[round(0.2 * (len(ratios) - 1))],
            "ratio_p80": ratios[round(0.8 * (len(ratios) - 1))],
            "seconds_per_chunk": statistics.median(ours for ours, _ in pairs),
            "baseline_seconds_per_chunk": statistics.median(without for _, without in pairs),
            "chunks_compared": len(pairs),
            "how": HOW_MEASURED,
        }

    def returns(self) -> list[dict[str, object]]:
        """Every return that was made, judged with memory and without."""
        size = self.plan.settings.chunk_frames
        without = self.baseline_video
        judged = []
        for there in find_returns(self.plan.prompts_by_chunk[: len(self.chunks)], size):
            row = {**asdict(there), "gap": there.gap, "with_memory": asdict(judge_return(self.video, there, size))}
            row["without_memory"] = None if without is None else asdict(judge_return(without, there, size))
            judged.append(row)
        return judged

    def record(self) -> dict[str, object]:
        """What run.json says."""
        plan = self.plan
        chunks = []
        for i, chunk in enumerate(self.chunks):
            without = self.baseline_seconds[i] if i < len(self.baseline_seconds) else None
            chunks.append(
                {
                    "chunk": chunk.index,
                    "first_frame": chunk.first_frame,
                    "prompt": chunk.prompts[0],
                    "seconds": chunk.seconds,
                    "baseline_seconds": without,
                    "retrieved": chunk.retrieved[0],
                    "relevance": chunk.relevance[0],
                    "candidates": chunk.candidates[0],
                    "activation": chunk.activation[0],
                }
            )
        return {
            **environment(self.device),
            "prompts": plan.prompts,
            "seed": plan.seed,
            "frames_per_prompt": plan.frames_per_prompt,
            "weights": plan.weights,
            "settings": asdict(plan.settings),
            "frames": sum(map(len, self.frames)),
            "interrupted": self.interrupted,
            "error": self.error,
            "overhead": self.overhead(),
            "returns": self.returns(),
            "chunks": chunks,
        }
