"""Which characters leave a story and come back, and whether with the same look, judged from the pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from memflow_ops.model.toy import judge
from memflow_ops.model.toy.language import CHARACTERS, parse_prompt
from memflow_ops.model.toy.world import PATTERNS

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
"""Names of the sixths of the colour circle around 0, 60, ... 300 degrees."""


@dataclass(frozen=True)
class Return:
    """A character that one prompt names, the following prompts do not, and a later one names again."""

    character: str
    last_seen: int
    """its last frame before it leaves"""
    back: int
    """its first frame after that"""
    side_then: int | None
    """where it stood when it left; 0 and 1: on the left and on the right of two, None: alone"""
    side_now: int | None
    """where it stands when it is back, likewise"""

    @property
    def gap(self) -> int:
        """The frames in between, which do not show it."""
        return self.back - self.last_seen - 1


@dataclass(frozen=True)
class Judgement:
    """What the pixels say about a return. A hue or pattern is None where the character is not to be seen."""

    hue_before: float | None
    """degrees, over the last chunk before it leaves"""
    hue_after: float | None
    """degrees, over the first chunk of the return"""
    difference: float | None
    """degrees, 0..180"""
    pattern_before: str | None
    pattern_after: str | None
    same: bool
    """whether both are seen, less than 30 degrees apart, and in the same pattern"""


def find_returns(prompts_by_chunk: Sequence[str], chunk_frames: int) -> list[Return]:
    """The returns of a story. prompts_by_chunk: the prompt of every chunk."""
    last_seen: dict[int, tuple[int, int | None]] = {}
    returns = []
    for chunk, prompt in enumerate(prompts_by_chunk):
        named = parse_prompt(prompt).who
        for side, who in enumerate(named):
            here = chunk, side if len(named) == 2 else None
            then, side_then = last_seen.get(who, here)
            if then < chunk - 1:
                left = (then + 1) * chunk_frames - 1
                returns.append(Return(CHARACTERS[who], left, chunk * chunk_frames, side_then, here[1]))
            last_seen[who] = here
    return returns


def judge_return(frames: np.ndarray, there: Return, chunk_frames: int) -> Judgement:
    """Judges a return. frames: all frames of the story, RGB uint8 (F, H, W, 3)."""
    before, pattern_before = _look(frames[there.last_seen + 1 - chunk_frames : there.last_seen + 1], there.side_then)
    after, pattern_after = _look(frames[there.back : there.back + chunk_frames], there.side_now)
    if before is None or after is None:
        return Judgement(before, after, None, pattern_before, pattern_after, False)
    difference = round(judge.hue_difference(before, after), 1)
    same = difference < judge.SAME_HUE_DEGREES and pattern_before == pattern_after
    return Judgement(before, after, difference, pattern_before, pattern_after, same)


def colour_name(hue: float) -> str:
    """The name, of six, that is nearest to a hue in degrees."""
    return COLOURS[round(hue / 60) % len(COLOURS)]


def _look(frames: np.ndarray, side: int | None) -> tuple[float | None, str | None]:
    """Hue in degrees and pattern of the character that a chunk, (F, H, W, 3) uint8, shows on a side."""
    seen = judge.look_at((torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1)[None], [side])[0]
    return (round(seen.hue, 1), PATTERNS[seen.pattern]) if seen.present else (None, None)
