"""A story of the toy world: the plan for it, and what has been made of it so far."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memflow_ops.environment import environment
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.stories.snapshots import Snapshots
from memflow_ops.model.streaming.chunk import Chunk
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.returns import find_returns, judge_return

HOW_MEASURED = (
    "The story is streamed twice from the same noise, with this memory and with memory=none, chunk by chunk in turn; "
    "who goes first alternates. ratio: median of (seconds with memory / seconds without) over the chunks that have a "
    "past beyond the local window, with its 20th and 80th percentile. seconds: wall time of a chunk: retrieval, "
    "re-caching, all passes, and the counting of what was activated."
)


@dataclass(frozen=True)
class ToyPlan:
    """Everything that the making of a story depends on, checked before anything is generated."""

    prompts: list[str]
    folder: Path
    settings: StreamSettings
    seed: int = 0
    frames_per_prompt: int = 12
    baseline: bool = True
    """whether the story is also streamed with memory=none, to compare with"""
    weights: str = ""
    """the name of the weights in run.json"""
    weights_sha256: str = ""
    device: str = ""
    """the kind of device that it is made on"""
    snapshots: Snapshots | None = None
    """keep the history on disk, and what an interrupted run goes on from"""

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it goes on with."""
        return {
            "prompts": self.prompts,
            "seed": self.seed,
            "frames_per_prompt": self.frames_per_prompt,
            "baseline": self.baseline,
            "weights_sha256": self.weights_sha256,
            "device": self.device,
            "settings": asdict(self.settings),
        }

    @property
    def prompts_by_chunk(self) -> list[str]:
        """The prompt of every chunk."""
        chunks = chunk_prompts([self.prompts], self.frames_per_prompt, self.settings.chunk_frames)
        return [prompt for (prompt,) in chunks]

    def prompt_number(self, chunk: int) -> int:
        """The number, from 0, of the prompt under which a chunk is made."""
        return min(chunk * self.settings.chunk_frames // self.frames_per_prompt, len(self.prompts) - 1)


@dataclass
class ToyRun:
    """What has been made of a story so far."""

    plan: ToyPlan
    device: torch.device
    cache_bytes: int | None = None
    """of the stream with memory, on the device and in host memory"""
    chunks: list[Chunk] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    """for every chunk, RGB uint8 (chunk_frames, H, W, 3)"""
    baseline_seconds: list[float] = field(default_factory=list)
    """for every chunk with memory=none; after an interruption one more or one fewer than `chunks`"""
    baseline_frames: list[np.ndarray] = field(default_factory=list)
    """likewise, shaped like `frames`"""
    interrupted: bool = False
    error: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def video(self) -> np.ndarray:
        """All frames, RGB uint8 (F, H, W, 3)."""
        return np.concatenate(self.frames)

    @property
    def baseline_video(self) -> np.ndarray | None:
        """As many frames with memory=none as there are with memory; None where there are fewer."""
        if len(self.baseline_frames) < len(self.frames):
            return None
        return np.concatenate(self.baseline_frames[: len(self.frames)])

    def saved(self) -> dict[str, Any]:
        """What has been made so far, for a snapshot."""
        return {
            "chunks": [chunk.saved() for chunk in self.chunks],
            "frames": [torch.from_numpy(frames) for frames in self.frames],
            "baseline_seconds": self.baseline_seconds,
            "baseline_frames": [torch.from_numpy(frames) for frames in self.baseline_frames],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on where another run was when it returned `saved`."""
        self.chunks = [Chunk.restored(chunk) for chunk in saved["chunks"]]
        self.frames = [frames.numpy() for frames in saved["frames"]]
        self.baseline_seconds = saved["baseline_seconds"]
        self.baseline_frames = [frames.numpy() for frames in saved["baseline_frames"]]

    def overhead(self) -> dict[str, object] | None:
        """What memory costs; None where there is no pair of chunks to compare."""
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
        """Every return so far, judged with memory and without."""
        size = self.plan.settings.chunk_frames
        without = self.baseline_video
        judged = []
        for there in find_returns(self.plan.prompts_by_chunk[: len(self.chunks)], size):
            judged.append(
                {
                    **asdict(there),
                    "gap": there.gap,
                    "with_memory": asdict(judge_return(self.video, there, size)),
                    "without_memory": None if without is None else asdict(judge_return(without, there, size)),
                }
            )
        return judged

    def record(self) -> dict[str, object]:
        """The content of run.json."""
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
            "cache_bytes": self.cache_bytes,
            "frames": sum(map(len, self.frames)),
            "interrupted": self.interrupted,
            "error": self.error,
            "problems": self.problems,
            "overhead": self.overhead(),
            "returns": self.returns(),
            "chunks": chunks,
        }
