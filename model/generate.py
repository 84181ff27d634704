"""A story file -> for every story a folder with video.mp4, frames.npz, timeline.png and run.json.

What memory costs is measured on the way: the same story is streamed a second time with memory="none" and the same
noise, chunk by chunk in turn with the first, so that both meet the same load of the machine.
"""

import io
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memflow_ops.environment import environment
from memflow_ops.model.checkpoints import load_checkpoint
from memflow_ops.model.returns import find_returns, judge_return
from memflow_ops.model.settings import StreamSettings
from memflow_ops.model.story import Interrupts, make_folders, make_stories
from memflow_ops.model.stream import Chunk, chunk_prompts, stream
from memflow_ops.model.text import TEXT_DIM, parse_prompt
from memflow_ops.model.transformer import CausalVideoModel
from memflow_ops.model.video import VideoWriter

DEMO_STORY = Path(__file__).parent / "stories" / "demo.jsonl"
"""A character that is not in the sink leaves and returns after 24 frames."""
HOW_MEASURED = (
    "The story is streamed twice from the same noise, with this memory and with memory=none, chunk by chunk in turn; "
    "who goes first alternates. ratio: median of (seconds with memory / seconds without) over the chunks that have a "
    "past beyond the local window, with its 20th and 80th percentile. seconds: wall time of a chunk: retrieval, "
    "re-caching, all passes, and the counting of what was activated."
)


def read_stories(path: Path, check: Callable[[str], object] = parse_prompt) -> list[list[str]]:
    """The prompts of every story in a JSON-lines file; a ValueError names the line that is wrong and says how.

    check: raises a ValueError for a prompt that cannot be understood.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark that some editors put first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the story {path}: {getattr(error, 'strerror', None) or error}") from error
    stories = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                stories.append(_prompts(line, check))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not stories:
        raise ValueError(f'{path} has no story; a story is a line like {{"prompts": ["a ball in the meadow", ...]}}')
    return stories


def _prompts(line: str, check: Callable[[str], object]) -> list[str]:
    try:
        story = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; a story is a line of its own") from error
    prompts = story.get("prompts") if isinstance(story, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError('expected {"prompts": [...]} with at least one prompt, each a string')
    for prompt in prompts:
        check(prompt)
    return prompts


@dataclass(frozen=True)
class Plan:
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
    def spoken(self) -> list[str]:
        """The prompt of every chunk."""
        chunks = chunk_prompts([self.prompts], self.frames_per_prompt, self.settings.chunk_frames)
        return [prompt for (prompt,) in chunks]

    def prompt_number(self, chunk: int) -> int:
        """Which prompt, from 0, a chunk is made under."""
        return min(chunk * self.settings.chunk_frames // self.frames_per_prompt, len(self.prompts) - 1)


def make_plans(
    stories: Sequence[Sequence[str]],
    out: Path,
    settings: StreamSettings,
    *,
    seed: int = 0,
    frames_per_prompt: int = 12,
    baseline: bool = True,
    weights: str = "",
) -> list[Plan]:
    """One story goes to `out` itself, several to out/story-000, out/story-001, ... with seeds seed, seed + 1, ...

    The history is given room for the whole story. Creates the folders; a ValueError where they cannot be written to.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    plans = []
    for i, prompts in enumerate(stories):
        chunks = len(chunk_prompts([prompts], frames_per_prompt, settings.chunk_frames))
        if settings.memory == "full":
            room = replace(settings, device_frames=max(settings.device_frames, chunks))
        else:
            room = replace(settings, host_frames=max(settings.host_frames, chunks - settings.device_frames))
        folder = out if len(stories) == 1 else out / f"story-{i:03d}"
        plans.append(Plan(list(prompts), folder, room, seed + i, frames_per_prompt, baseline, weights))
    make_folders([plan.folder for plan in plans], ("video.mp4", "frames.npz", "timeline.png", "run.json"))
    return plans


def load_model(weights: Path, device: torch.device) -> CausalVideoModel:
    """The model of a checkpoint; FileNotFoundError or ValueError where it cannot make these videos."""
    model = load_checkpoint(weights, device)
    config = model.config
    if config.out_dim != 3 or config.text_dim != TEXT_DIM:
        raise ValueError(
            f"{weights} is no model of the toy world: expected 3 channels (RGB) and a vocabulary of {TEXT_DIM} words, "
            f"got {config.out_dim} channels and {config.text_dim} words"
        )
    return model


@dataclass
class Run:
    """A story as far as it has been made."""

    plan: Plan
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
        for there in find_returns(self.plan.spoken[: len(self.chunks)], size):
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


def generate(model: CausalVideoModel, plan: Plan, report: Callable[[Run], None] | None = None) -> Run:
    """Streams one story into its folder; `make_stories` says how that may end. `report` is called after every
    chunk."""
    settings = plan.settings
    run = Run(plan, model.patch_embedding.weight.device)
    writer = VideoWriter(
        plan.folder / "video.mp4", settings.height, settings.width, fragment_frames=settings.chunk_frames
    )
    make_stories([run], [writer], lambda interrupts: _rounds(model, run, writer, interrupts), _files, report)
    return run


def _rounds(model: CausalVideoModel, run: Run, writer: VideoWriter, interrupts: Interrupts) -> Iterator[None]:
    """Makes chunk after chunk, each with its baseline."""
    plan = run.plan
    prompts = [(prompt,) for prompt in plan.spoken]
    ours = stream(model, prompts, plan.settings, plan.seed)
    baseline = None
    if plan.baseline and plan.settings.memory != "none":
        baseline = stream(model, prompts, replace(plan.settings, memory="none"), plan.seed)

    def make_ours() -> None:
        with interrupts.allowed():
            chunk = next(ours)
        frames = to_pixels(chunk.frames[0])
        writer.write(frames)
        run.frames.append(frames)
        run.chunks.append(replace(chunk, frames=chunk.frames.new_empty(0)))  # the pixels are kept above

    def make_baseline() -> None:
        if baseline is not None:
            with interrupts.allowed():
                chunk = next(baseline)
            run.baseline_seconds.append(chunk.seconds)
            run.baseline_frames.append(to_pixels(chunk.frames[0]))

    for i in range(len(prompts)):
        for make in (make_ours, make_baseline) if i % 2 == 0 else (make_baseline, make_ours):
            make()
        yield


def to_pixels(latents: Tensor) -> np.ndarray:
    """A chunk's frames (3, F, H, W) in -1..1 -> RGB uint8 (F, H, W, 3)."""
    return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def _files(run: Run) -> dict[str, bytes]:
    """The content of every file beside the video."""
    from memflow_ops.model.timeline import draw_timeline  # brings matplotlib

    archive = io.BytesIO()
    np.savez_compressed(archive, frames=run.video)
    return {
        "frames.npz": archive.getvalue(),
        "timeline.png": draw_timeline(run),
        "run.json": (json.dumps(run.record(), indent=1) + "\n").encode(),
    }
