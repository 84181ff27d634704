"""A score of leaving and returning: does what comes back look as it did when it came first?

For every return of a subject: how similar its frames are to those of its first appearance, to those of prompts that do
not name it (chance), and to the first appearances of the others. `retained` puts the mean of the first on a scale from
that of chance, 0, to the same picture, 1. A video that does not move is flagged and not scored: it is as similar to
itself as can be.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from memflow_ops.model.score.consistency import FROZEN_SHARE, consistency, interval, similarity, still_share
from memflow_ops.model.score.subjects import Naming, ReturnOf, find_returns, prompt_frames
from memflow_ops.model.toy.evaluation.figures import Proportion

Features = Callable[[int, str | None], Tensor]
"""The number of a prompt, and a subject or None for the whole frames -> features (F, D) of its frames."""
LOOKS = 16
"""Frames of an appearance that are looked at, evenly spaced."""


class Encoder(Protocol):
    """What turns frames into features that are alike where the frames look alike."""

    name: str
    """For the report, without the path to it."""

    def whole(self, frames: np.ndarray) -> Tensor:
        """The features (F, D) of whole frames (F, H, W, 3) uint8, RGB."""

    def subject(self, frames: np.ndarray, named: Sequence[str], subject: str) -> Tensor:
        """The features (F, D) of a subject in frames whose prompt names `named`; zero where it is not to be seen."""


@dataclass(frozen=True)
class ScoredReturn:
    """What the features say of a return; similarities are cosines."""

    subject: str
    first: int
    back: int
    away: int
    similarity: float
    """To the first appearance."""
    chance: float
    """To the prompts that do not name it, on average; those where nothing is to be seen do not count."""
    others: float | None
    """To the first appearance of the other subject that is most like it; None where there is no other. One that came
    together with this subject does not count."""

    @property
    def recognised(self) -> bool | None:
        """Whether it is more like its own first appearance than any other's."""
        return None if self.others is None else self.similarity > self.others


@dataclass(frozen=True)
class ScoredVideo:
    """One video."""

    video: str
    frames: int
    still: float
    """The share of its frames that show the same as the one before."""
    subject_consistency: float | None
    """VBench's formula, over the encoder; None of a frozen video."""
    background_consistency: float | None
    """Over the encoder for the background; None where there is none."""
    returns: list[ScoredReturn]
    """Empty for a frozen video."""
    cache_bytes: float | None
    """Of the stream, as its run.json says; this story's part where several were streamed together."""

    @property
    def frozen(self) -> bool:
        return self.still > FROZEN_SHARE


def score_video(
    video: str,
    frames: np.ndarray,
    prompts: Sequence[str],
    named: Naming,
    encoder: Encoder,
    background: Encoder | None = None,
    run: Mapping[str, Any] | None = None,
) -> ScoredVideo:
    """Scores one video. frames (F, H, W, 3) uint8, RGB. run: the content of its run.json, if there is one."""
    if run is not None and run.get("frames", len(frames)) != len(frames):
        raise ValueError(
            f"{video} has {len(frames)} frames, and the run.json beside it is of a video of {run['frames']}: move it "
            f"away to do without"
        )
    places = prompt_frames(len(frames), len(prompts), run)
    still = still_share(frames)
    cache = run.get("cache_bytes") if run else None
    if cache:
        cache /= run.get("stories_together", 1) if run else 1
    if still > FROZEN_SHARE:
        return ScoredVideo(video, len(frames), still, None, None, [], cache)
    known: dict[tuple[int, str | None], Tensor] = {}

    def features(number: int, subject: str | None) -> Tensor:
        if (number, subject) not in known:
            here = places[number]
            seen = frames[[here[i * len(here) // LOOKS] for i in range(LOOKS)] if len(here) > LOOKS else list(here)]
            if subject is None:
                known[number, subject] = encoder.whole(seen)
            else:
                known[number, subject] = encoder.subject(seen, named(prompts[number]), subject)
        return known[number, subject]

    returns = [score_return(there, prompts, named, features) for there in find_returns(prompts, named)]
    return ScoredVideo(
        video,
        len(frames),
        still,
        consistency(encoder.whole(frames)),
        None if background is None else consistency(background.whole(frames)),
        returns,
        cache,
    )


def score_return(there: ReturnOf, prompts: Sequence[str], named: Naming, features: Features) -> ScoredReturn:
    """Scores one return."""
    own = features(there.back, there.subject)
    elsewhere, others, met = [], {}, set()
    for number, prompt in enumerate(prompts):
        subjects = named(prompt)
        for subject in subjects:
            if subject not in met and there.subject not in subjects:
                others[subject] = similarity(own, features(number, subject))
            met.add(subject)
        if there.subject not in subjects:
            shown: Sequence[str | None] = subjects or (None,)
            seen = [features(number, subject) for subject in shown]
            elsewhere += [similarity(own, x) for x in seen if x.abs().sum() > 0]
    return ScoredReturn(
        **asdict(there),
        similarity=similarity(own, features(there.first, there.subject)),
        chance=float(np.mean(elsewhere)) if elsewhere else 0.0,
        others=max(others.values()) if others else None,
    )


def retained(returns: Sequence[ScoredReturn]) -> tuple[float, tuple[float, float] | None] | None:
    """(mean similarity - mean chance) / (1 - mean chance), 0 where chance leaves no room, and its 95 % percentile
    bootstrap interval over returns; None of no return. A mean of single ratios would hang on the few returns whose
    chance happens to be near 1."""
    if not returns:
        return None

    def ratio(means: Tensor) -> Tensor:
        """Means (..., 2) of similarity and chance -> (...)."""
        similar, chance = means.unbind(-1)
        room = 1 - chance
        return torch.where(room > 1e-6, (similar - chance) / room.clamp(min=1e-6), torch.zeros_like(room))

    pairs = torch.tensor([[x.similarity, x.chance] for x in returns], dtype=torch.float64, device="cpu")
    return float(ratio(pairs.mean(0))), interval(pairs, ratio)


def summarise(scored: Sequence[ScoredVideo], encoder: Encoder, background: Encoder | None = None) -> dict[str, Any]:
    """All videos together, as JSON. Frozen ones are named and not counted."""
    moving = [one for one in scored if not one.frozen]
    returns = [there for one in moving for there in one.returns]
    recognised = [seen for there in returns if (seen := there.recognised) is not None]
    known = [one.cache_bytes for one in moving if one.cache_bytes]
    mean, between = retained(returns) or (None, None)
    return {
        "encoder": encoder.name,
        "background_encoder": None if background is None else background.name,
        "frozen": [one.video for one in scored if one.frozen],
        "returns": len(returns),
        "retained": mean,
        "retained_interval": between,
        "retained_per_gb": mean / (float(np.mean(known)) / 1e9) if mean is not None and known else None,
        "similarity": _mean([there.similarity for there in returns]),
        "chance": _mean([there.chance for there in returns]),
        "others": _mean([there.others for there in returns if there.others is not None]),
        "recognised": asdict(Proportion.of(recognised)) if recognised else None,
        "subject_consistency": _mean([one.subject_consistency for one in moving]),
        "background_consistency": _mean([x for one in moving if (x := one.background_consistency) is not None]),
        "videos": [
            {
                **{name: value for name, value in asdict(one).items() if name != "returns"},
                "frozen": one.frozen,
                "returns": [asdict(there) for there in one.returns],
            }
            for one in scored
        ],
    }


def read_run(video: Path, prompts: Sequence[str]) -> dict[str, Any] | None:
    """What run.json beside a video says; None where there is none. A ValueError where it is not one of ours, or of a
    story with other prompts than these."""
    path = video.with_name("run.json")
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if int(run["settings"]["chunk_frames"]) < 1 or int(run["frames_per_prompt"]) < 1:
            raise ValueError("no frames")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say how long the prompts were ({error}); move it away to do without"
        ) from error
    if run.get("prompts", list(prompts)) != list(prompts):
        raise ValueError(f"{path} is of a video of other prompts: name its own story, or move it away to do without")
    return run


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def to_float(frames: np.ndarray) -> Tensor:
    """Frames (F, H, W, 3) uint8 -> (F, 3, H, W) float32 from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
