"""Who left a story and came back, and whether in the same colour, judged from the pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memflow_ops.model import world
from memflow_ops.model.text import CHARACTERS, parse_prompt

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""Names of the sixths of the colour circle around 0, 60, ... 300 degrees."""


@dataclass(frozen=True)
class Return:
    """A character that one prompt names, then others do not, then one names again."""

    character: str
    last_seen: int
    """its last frame before it leaves"""
    back: int
    """its first frame after"""

    @property
    def gap(self) -> int:
        """Frames between that do not show it."""
        return self.back - self.last_seen - 1


@dataclass(frozen=True)
class Judgement:
    """A return as the pixels tell it; None where the character is not to be seen."""

    hue_before: float | None
    """degrees, over the last chunk before it leaves"""
    hue_after: float | None
    """degrees, over the first chunk of the return"""
    difference: float | None
    """degrees, 0..180"""
    same: bool
    """both are seen, and less than 30 degrees apart"""


def find_returns(spoken: Sequence[str], chunk_frames: int) -> list[Return]:
    """The returns of a story; spoken: the prompt of every chunk."""
    last_seen: dict[int, int] = {}
    returns = []
    for chunk, prompt in enumerate(spoken):
        who = parse_prompt(prompt)[0]
        if who < len(CHARACTERS):
            if who in last_seen and last_seen[who] < chunk - 1:
                left = (last_seen[who] + 1) * chunk_frames - 1
                returns.append(Return(CHARACTERS[who], left, chunk * chunk_frames))
            last_seen[who] = chunk
    return returns


def judge_return(frames: np.ndarray, there: Return, chunk_frames: int) -> Judgement:
    """frames: all of the story, RGB uint8 (F, H, W, 3)."""
    before = _hue(frames[there.last_seen + 1 - chunk_frames : there.last_seen + 1])
    after = _hue(frames[there.back : there.back + chunk_frames])
    if before is None or after is None:
        return Judgement(before, after, None, False)
    difference = round(world.hue_difference(torch.tensor(before), torch.tensor(after)).item(), 1)
    return Judgement(before, after, difference, difference < world.SAME_HUE_DEGREES)


def colour_name(hue: float) -> str:
    """The nearest of six names for a hue in degrees."""
    return COLOURS[round(hue / 60) % len(COLOURS)]


def _hue(frames: np.ndarray) -> float | None:
    """The hue of a chunk (F, H, W, 3) in degrees, its frames judged side by side as one picture."""
    x = torch.from_numpy(frames).permute(3, 1, 0, 2).flatten(2).float() / 127.5 - 1  # (3, H, F * W)
    verdict = world.judge(x)
    return round(verdict.hue.item(), 1) if verdict.present else None
