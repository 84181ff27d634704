"""How alike frames are: VBench's consistency, similarity between appearances, and whether a video moves at all.

Source of the consistency: VBench (arXiv 2311.17982), subject and background consistency, which are one formula over the
features of two encoders.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

STILL = 0.5
"""Two frames whose values, 0 to 255, differ by less on average show the same; encoding alone changes them so much."""
FROZEN_SHARE = 0.8
"""A video is frozen where more than this share of its frames shows the same as the one before."""


def unit(features: Tensor) -> Tensor:
    """Features (..., D) scaled to length 1, in float64; those that are zero stay zero."""
    features = features.double()
    return features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def consistency(features: Tensor) -> float:
    """VBench's consistency of a video, 0 to 1. features (F, D): of its frames, F at least 2.

    The mean over all frames but the first of (similarity to the first + similarity to the one before) / 2, where a
    similarity is a cosine, and 0 where that is negative.
    """
    if len(features) < 2:
        raise ValueError(f"consistency is of two frames or more, got {len(features)}")
    x = unit(features)
    to_first = (x[1:] @ x[0]).clamp(min=0)
    to_previous = (x[1:] * x[:-1]).sum(-1).clamp(min=0)
    return float(((to_first + to_previous) / 2).mean())


def similarity(a: Tensor, b: Tensor) -> float:
    """The mean cosine of every frame's features of one appearance, (Fa, D), with every one's of the other, (Fb, D)."""
    return float(unit(a).mean(0) @ unit(b).mean(0))


def still_share(frames: np.ndarray) -> float:
    """The share of frames (F, H, W, 3) uint8 that show the same as the one before; 1 for a single frame."""
    if len(frames) < 2:
        return 1.0
    still = [
        np.abs(after.astype(np.int16) - before.astype(np.int16)).mean() < STILL for before, after in pairwise(frames)
    ]
    return float(np.mean(still))


def interval(
    cases: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0, resamples: int = 2000
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of a statistic of means (Efron 1979); None of fewer than two cases.

    cases: (N, D). statistic: means (resamples, D) -> (resamples,).
    """
    if len(cases) < 2:
        return None
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = (resamples, len(cases))
    picks = torch.randint(len(cases), size, generator=generator, dtype=torch.int64, device="cpu")
    ordered = statistic(cases[picks].mean(1)).sort().values
    return float(ordered[int(0.025 * resamples)]), float(ordered[int(0.975 * resamples) - 1])
