"""Scenes of the toy world with their ground truth, for tests."""

import itertools
from types import SimpleNamespace

import torch

from memflow_ops.model.toy import world
from memflow_ops.model.toy.language import CHARACTERS, NOBODY, PLACES


def all_scenes(hues: int = 12, seed: int = 0) -> SimpleNamespace:
    """Every character in every pattern and place in so many hues, in the middle at some height: arguments of render."""
    sizes = (len(CHARACTERS), len(world.PATTERNS), len(PLACES), hues)
    who, pattern, place, step = torch.tensor(list(itertools.product(*map(range, sizes)))).unbind(1)
    heights = torch.tensor(world.HEIGHTS)
    y = heights[torch.randint(len(heights), (len(who),), generator=torch.Generator().manual_seed(seed))]
    centre = torch.stack([torch.full_like(y, world.MIDDLE), y], dim=-1)
    hue = step / hues + 0.01
    return SimpleNamespace(
        who=who[:, None], place=place, hue=hue[:, None], pattern=pattern[:, None], centre=centre[:, None]
    )


def empty_scenes() -> torch.Tensor:
    """The four places with nobody in them (4, 3, H, W)."""
    place = torch.arange(len(PLACES))
    nobody = torch.full((len(PLACES), 1), NOBODY)
    return world.render(nobody, place, torch.zeros(4, 1), torch.zeros(4, 1).long(), torch.full((4, 1, 2), 0.5))
