"""The parts of a stream that its settings choose: cache, retrieval policy, block selection, recorder of passes."""

from collections.abc import Sequence

import torch

from memflow_ops.cache.attend import BlockSelection, HeadShare
from memflow_ops.cache.chosen import ChosenBlocks
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Coverage, Policy, Random, Relevance
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import ReleasedLayout
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.model.parallel.retrieval import split_policy
from memflow_ops.model.streaming.cuda_graphs import CudaGraphs, Recorder, why_not_record
from memflow_ops.model.streaming.settings import StreamSettings


def make_cache(
    layout: CacheLayout,
    device: torch.device,
    ranks: Ranks | None = None,
    history: HistoryFolder | None = None,
) -> RingCache:
    """ranks: the processes that share the video; None: there is one. history: as for `FrameCache`."""
    if isinstance(layout, ReleasedLayout):
        return ReleasedCache(layout, device, None if ranks is None else ranks.mean)
    return FrameCache(layout, device, history)


def make_policy(
    settings: StreamSettings, seeds: Sequence[int], given: Policy | None = None, ranks: Ranks | None = None
) -> Policy | None:
    """The policy that `settings.relevance` names; None where a stream retrieves nothing.

    seeds: one per story, for "random". given: takes the place of the policy that the settings name. ranks: the
    processes that choose together.
    """
    if settings.memory != "memflow" or not settings.bank_frames:
        return None
    policy = _one_policy(settings, seeds, given)
    return policy if ranks is None else split_policy(policy, ranks)


def _one_policy(settings: StreamSettings, seeds: Sequence[int], given: Policy | None) -> Policy:
    if given is not None:
        return given
    if settings.relevance == "coverage":
        return Coverage(settings.bank_frames, settings.impl)
    if settings.relevance == "random":
        return Random(settings.bank_frames, seeds)
    return Relevance(settings.bank_frames, settings.relevance, settings.redundancy, settings.impl)


def make_selection(
    settings: StreamSettings, random: torch.Generator, heads: HeadShare | None = None
) -> BlockSelection | None:
    """The blocks that a pass attends to beside the window; None where it attends to all that the cache keeps.

    random: draws the blocks where the settings ask for random ones. heads: of this process.
    """
    if settings.memory == "memflow":
        drawn = random if settings.selection == "random" else None
        return BlockSelection(settings.top_k, settings.query_group, drawn, heads)
    if settings.memory == "released" and settings.top_frames:
        return BlockSelection(settings.top_frames, query_group=None)
    return None


def make_chosen(settings: StreamSettings, layout: CacheLayout, device: torch.device) -> ChosenBlocks | None:
    """What keeps the blocks that passes choose; None where nothing reads them after the choice."""
    if settings.memory != "memflow" or not (settings.reselect == "chunk" or layout.copied_frames):
        return None
    return ChosenBlocks(layout, settings.top_k, settings.query_group, device)


def make_recorder(
    settings: StreamSettings, device: torch.device, cuda_graphs: bool | None, observed: bool, ranks: int = 1
) -> Recorder | None:
    """What records the passes of a stream; None where they run eagerly.

    cuda_graphs: None records wherever that is possible, False never; True raises a ValueError where it is not possible.
    observed: every pass is shown to an observer, which a replay could not do. ranks: see `why_not_record`.
    """
    reason = "they are off" if cuda_graphs is False else why_not_record(device, settings, ranks)
    if observed:
        reason = reason or "every pass is observed"
    if cuda_graphs and reason:
        raise ValueError(f"no CUDA graphs for this stream: {reason}")
    return None if reason else CudaGraphs(device)
