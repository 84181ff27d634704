"""Scores kinds of memory on held-out stories of the toy world: python -m memflow_ops.model.score.toy_kinds

It shows that the score tells a good memory from a bad one, where what is right is known. Eight stories of twelve
prompts take some minutes for each kind on one core.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from memflow_ops.model.score.encoders import ToyJudge
from memflow_ops.model.score.score import ScoredVideo, score_video, summarise
from memflow_ops.model.score.subjects import toy_naming
from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, JUDGED_SEED, make_stories
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS, stream_kind
from memflow_ops.model.toy.settings import TOY_SETTINGS
from memflow_ops.model.wan.transformer import CausalVideoModel

KINDS = ("none", "random frames", "memflow", "full")


def score_kind(
    model: CausalVideoModel, kind: str, stories: list[list[str]], seed: int, settings: StreamSettings = TOY_SETTINGS
) -> list[ScoredVideo]:
    """Streams the stories, which have the same length, under a kind of memory and scores their videos."""
    videos: list[list[np.ndarray]] = [[] for _ in stories]
    for chunk in stream_kind(model, stories, MEMORY_KINDS[kind], settings, seed):
        for video, frames in zip(videos, chunk.frames, strict=True):
            video.append(to_pixels(frames))
    run = {"frames_per_prompt": FRAMES_PER_PROMPT, "settings": {"chunk_frames": settings.chunk_frames}}
    return [
        score_video(f"story {i}", np.concatenate(video), prompts, toy_naming, ToyJudge(), run=run)
        for i, (video, prompts) in enumerate(zip(videos, stories, strict=True))
    ]


def rows(stories: int, prompts: int, seed: int) -> Iterator[str]:
    """The table, line by line as its kinds are finished."""
    model = load_model(TOY_WEIGHTS, torch.device("cpu"))
    told = make_stories(stories, seed, (prompts,))[0]
    yield "| memory | retained (95 % interval) | similarity | chance | recognised |"
    yield "|---|---|---|---|---|"
    for kind in KINDS:
        said = summarise(score_kind(model, kind, told, seed), ToyJudge())
        between = said["retained_interval"]
        interval = f" ({between[0]:.2f} to {between[1]:.2f})" if between else ""
        seen = said["recognised"]
        recognised = f"{round(seen['value'] * seen['count'])} of {seen['count']}" if seen else "-"
        figures = f"{said['similarity']:.2f} | {said['chance']:.2f} | {recognised}"
        yield f"| {kind} | {said['retained']:.2f}{interval} | {figures} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=int, default=8, help="how many stories (8)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of each (12)")
    parser.add_argument("--seed", type=int, default=JUDGED_SEED, help=f"of stories and noise ({JUDGED_SEED})")
    given = parser.parse_args()
    for line in rows(given.stories, given.prompts, given.seed):
        print(line, flush=True)
