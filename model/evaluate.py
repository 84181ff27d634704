"""Does memory work? Held-out stories in which a character leaves and returns, judged from the pixels alone.

  python -m memflow_ops.model.evaluate --stories 96

Every frame is generated. A story is: an opening that is somebody else's or nobody's (so that the sink never shows the
character), then the character, then two others, then the character again in some place: a gap of 24 frames. The return
counts as a match when the hue of its first chunk is within 30 degrees of the first chunk of the first appearance; a
character absent in either is a miss. By chance one return in six matches. Memory modes share stories and noise.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from memflow_ops.environment import ROOT, environment
from memflow_ops.model import world
from memflow_ops.model.checkpoints import TOY_WEIGHTS, load_checkpoint, write_atomically
from memflow_ops.model.stream import TOY_SETTINGS, Chunk, MemoryMode, StreamSettings, chunk_prompts, stream
from memflow_ops.model.text import CHARACTERS, EMPTY, PLACES, parse_prompt
from memflow_ops.model.transformer import CausalVideoModel

FRAMES_PER_PROMPT = 12
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)


@dataclass(frozen=True)
class Row:
    """One line of the table: how returns went under one kind of memory. Shares are in 0..1, hues in degrees."""

    memory: str
    stories: int
    match: float
    """share of returns with the same hue; an absent character is a miss"""
    median_error: float
    """median hue difference, over returns with the character present both times"""
    present: float
    """share of first chunks of a prompt for a character in which a character is seen"""
    shape: float
    """share of those that look like the character that was named"""
    precision: float | None
    """share of the retrieved frames, at the return, that show the character; None without retrieval"""
    copies: float
    """share of first appearances with the hue of the character before them (chance 1/6)"""
    drift: float
    """median hue change over a prompt, first to last chunk"""
    hues: list[int]
    """first appearances per sixth of the colour circle"""
    seconds: float


def make_stories(count: int, seed: int, fillers: int = 2) -> list[list[str]]:
    """Stories of `fillers` + 3 prompts: opening, character, fillers, character again.

    Seeds of training draw clips, never prompts, so no story was ever trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    stories = []
    for _ in range(count):
        cast = torch.randperm(len(CHARACTERS), generator=generator).tolist()
        hero, others = CHARACTERS[cast[0]], [CHARACTERS[i] for i in cast[1:]]
        empty_opening = torch.rand((), generator=generator) < 0.5
        names = [EMPTY if empty_opening else others[-1], hero]
        names += [others[i % 2] for i in range(fillers)] + [hero]
        places = torch.randint(len(PLACES), (len(names),), generator=generator).tolist()
        stories.append([f"{name} {PLACES[place]}" for name, place in zip(names, places, strict=True)])
    return stories


def evaluate(
    weights: Path | CausalVideoModel = TOY_WEIGHTS,
    *,
    stories: int = 96,
    memory: MemoryMode = "memflow",
    seed: int = 10_000,
    fillers: int = 2,
    settings: StreamSettings | None = None,
) -> Row:
    """Streams held-out stories under one kind of memory and judges them.

    weights: a checkpoint, or a model. memory: a memory mode of the stream, which replaces that of `settings`. seed:
    draws the stories, and is the first story's noise. fillers: prompts between first appearance and return; the gap is
    12 frames each, and should be 24 or more.
    """
    model = weights if isinstance(weights, CausalVideoModel) else load_checkpoint(weights)
    settings = replace(settings or TOY_SETTINGS, memory=memory)
    told = make_stories(stories, seed, fillers)
    chunk_frames = settings.chunk_frames
    # Nothing is asked of the return beyond its first chunk.
    prompts = chunk_prompts(told, FRAMES_PER_PROMPT, chunk_frames)
    prompts = prompts[: (fillers + 2) * FRAMES_PER_PROMPT // chunk_frames + 1]
    started = time.perf_counter()
    chunks = list(stream(model, prompts, settings, seed))
    seconds = time.perf_counter() - started
    return _judge(memory, told, chunks, fillers, chunk_frames, seconds)


def _judge(
    memory: str, told: list[list[str]], chunks: list[Chunk], fillers: int, chunk_frames: int, seconds: float
) -> Row:
    per_prompt = FRAMES_PER_PROMPT // chunk_frames
    hues, present, shapes = (
        torch.stack(x, dim=1) for x in zip(*(_look(chunk.frames) for chunk in chunks), strict=True)
    )  # (stories, chunks)
    who = torch.tensor([[parse_prompt(prompt)[0] for prompt in story] for story in told])  # (stories, prompts)
    starts = torch.arange(fillers + 3) * per_prompt
    seen, named = present[:, starts], who < world.EMPTY_INDEX

    first, back = per_prompt, int(starts[-1])
    error = world.hue_difference(hues[:, first], hues[:, back])
    both = present[:, first] & present[:, back]

    # First appearances that follow a character: everybody else's prompts but the return and the repeated fillers.
    copy_errors, new_hues = [], []
    for prompt in range(1, min(fillers, 2) + 2):
        here, before = starts[prompt], starts[prompt - 1]
        usable = present[:, here] & present[:, before] & named[:, prompt - 1]
        copy_errors.append(world.hue_difference(hues[:, here], hues[:, before])[usable])
        new_hues.append(hues[:, here][present[:, here]])
    ends = starts[1:-1] + per_prompt - 1
    stays = present[:, starts[1:-1]] & present[:, ends]
    drift = world.hue_difference(hues[:, starts[1:-1]], hues[:, ends])[stays]

    precision = None
    if any(chunks[back].retrieved):
        hits = [
            parse_prompt(story[frame // FRAMES_PER_PROMPT])[0] == parse_prompt(story[-1])[0]
            for story, frames in zip(told, chunks[back].retrieved, strict=True)
            for frame in frames
        ]
        precision = _mean(torch.tensor(hits))
    return Row(
        memory,
        len(told),
        _mean(both & (error < world.SAME_HUE_DEGREES)),
        _median(error[both]),
        _mean(seen[named]),
        _mean((shapes[:, starts] == who)[named & seen]),
        precision,
        _mean(torch.cat(copy_errors) < world.SAME_HUE_DEGREES),
        _median(drift),
        (torch.cat(new_hues) // 60).long().clamp(max=5).bincount(minlength=6).tolist(),
        round(seconds, 1),
    )


def _look(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk (B, 3, F, H, W) -> per story its hue over all frames, whether somebody is seen in most, and whom."""
    frames = frames.cpu().transpose(1, 2)
    verdict = world.judge(frames)
    # Hues are averaged on the circle.
    angle = torch.deg2rad(verdict.hue)
    weight = verdict.area * verdict.present
    hue = torch.rad2deg(torch.atan2((angle.sin() * weight).sum(1), (angle.cos() * weight).sum(1))) % 360
    return hue, verdict.present.float().mean(1) > 0.5, world.recognise(frames).mode(dim=1).values


def _mean(x: Tensor) -> float:
    return round(x.float().mean().item(), 4) if x.numel() else math.nan


def _median(x: Tensor) -> float:
    return round(x.float().median().item(), 2) if x.numel() else math.nan


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of fixed-width text."""

    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.0f} %"

    heads = ("memory", "same hue", "median error", "retrieved right", "present", "right shape", "copies", "drift")
    cells: list[tuple[str, ...]] = [heads]
    for row in rows:
        shares = (percent(x) for x in (row.precision, row.present, row.shape, row.copies))
        cells.append((row.memory, percent(row.match), f"{row.median_error:.1f}", *shares, f"{row.drift:.1f}"))
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def report(
    weights: Path | CausalVideoModel = TOY_WEIGHTS,
    *,
    stories: int = 96,
    seed: int = 10_000,
    fillers: int = 2,
    memory: Sequence[MemoryMode] = MODES,
    settings: StreamSettings | None = None,
    out: Path | None = None,
) -> None:
    """Judges every given memory mode as `evaluate` does, prints the table and writes it as JSON to `out`.

    out: None is bench/results/toy-cpu.json in a checkout, and no file where the package is installed elsewhere.
    """
    settings = settings or TOY_SETTINGS
    model = weights if isinstance(weights, CausalVideoModel) else load_checkpoint(weights)
    rows = [
        evaluate(model, stories=stories, memory=mode, seed=seed, fillers=fillers, settings=settings) for mode in memory
    ]
    print(table(rows))
    results = {
        "command": "memflow evaluate",
        **environment(torch.device("cpu")),
        "seed": seed,
        "gap_frames": fillers * FRAMES_PER_PROMPT,
        "settings": asdict(settings),
        "rows": [asdict(row) for row in rows],
    }
    if out is None and (ROOT / "setup.py").is_file():
        out = ROOT / "bench" / "results" / "toy-cpu.json"
    if out is not None:
        write_atomically(out, (json.dumps(results, indent=1) + "\n").encode())
        print(f"written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge held-out stories of the toy world under every kind of memory.")
    parser.add_argument("--weights", type=Path, default=TOY_WEIGHTS)
    parser.add_argument("--stories", type=int, default=96)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--fillers", type=int, default=2, help="prompts of 12 frames between leaving and returning")
    parser.add_argument("--memory", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--steps", type=int, default=StreamSettings.steps, help="the sampler's passes per chunk")
    parser.add_argument("--query-group", type=int, default=StreamSettings.query_group)
    parser.add_argument("--recache", action="store_true", help="re-cache the local window at a prompt switch")
    parser.add_argument("--out", type=Path, help="default: bench/results/toy-cpu.json in the checkout")
    arguments = parser.parse_args()
    report(
        arguments.weights,
        stories=arguments.stories,
        seed=arguments.seed,
        fillers=arguments.fillers,
        memory=arguments.memory,
        settings=replace(
            TOY_SETTINGS, steps=arguments.steps, query_group=arguments.query_group, recache=arguments.recache
        ),
        out=arguments.out,
    )


if __name__ == "__main__":
    main()
