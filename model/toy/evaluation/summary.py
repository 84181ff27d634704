"""From the frames of a kind of memory to its figures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy import judge
from memflow_ops.model.toy.evaluation.figures import GAPS, KindFigures, Proportion, Story
from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
    Appearance,
    appearances,
    is_return,
)
from memflow_ops.model.toy.evaluation.kinds import shown_at
from memflow_ops.model.toy.language import parse_prompt

Looks = dict[tuple[int, int, int | None, bool], judge.Look]


# ------------------------------------------------------------------------------------------------------------ streaming


@dataclass(frozen=True)
class JudgedStream:
    """Stories of one length under one kind of memory, looked at."""

    stories: list[Story]
    looks: Looks
    retrieved: dict[tuple[int, int], list[int]]
    """(story, prompt) -> frames retrieved for its first chunk"""
    candidates: dict[tuple[int, int], int]
    """(story, prompt) -> frames of the bank, sink included"""
    chunks: int


def watch(stories: list[Story], chunks: Iterator[Chunk], chunk_frames: int) -> JudgedStream:
    """Looks at the first and the last chunk of every appearance; nothing else is kept of the frames."""
    per_prompt = FRAMES_PER_PROMPT // chunk_frames
    slots: dict[int, list[Appearance]] = {}
    for appearance in appearances(stories):
        slots.setdefault(appearance.prompt, []).append(appearance)
    looks: Looks = {}
    retrieved, candidates, chunk_count = {}, {}, 0
    for chunk in chunks:
        prompt, part = divmod(chunk.index, per_prompt)
        chunk_count += 1
        if part == 0:
            for story, found in enumerate(chunk.retrieved):
                retrieved[story, prompt] = found
                candidates[story, prompt] = len(chunk.candidates[story])
        named = slots.get(prompt, [])
        if named and part in (0, per_prompt - 1):
            frames = chunk.frames[[appearance.story for appearance in named]]
            for appearance, look in zip(named, judge.look_at(frames, [a.slot for a in named]), strict=True):
                looks[appearance.story, prompt, appearance.slot, part > 0] = look
    return JudgedStream(stories, looks, retrieved, candidates, chunk_count)


# -------------------------------------------------------------------------------------------------------------- judging


def summarise(
    memory: str, streamed: Sequence[JudgedStream], settings: StreamSettings, blocks_per_frame: int
) -> KindFigures:
    """The row of one kind of memory; settings: those that were streamed with."""
    hue: list[bool] = []
    gap_hits: dict[str, list[bool]] = {f"{low} to {high}": [] for low, high in GAPS}
    pattern, shape, both, precision, copies = [], [], [], [], []
    errors, drifts, activated, hues = [], [], [], [0] * 6
    firsts: list[_JudgedLook] = []
    returned: list[_JudgedLook] = []

    for length, group in enumerate(streamed):
        pair_hits: dict[tuple[int, int], list[bool]] = {}
        before: dict[int, judge.Look] = {}  # per story the character seen last
        for it in appearances(group.stories):
            look = group.looks[it.story, it.prompt, it.slot, False]
            shape.append(look.present and look.shape == it.character)
            last = group.looks[it.story, it.prompt, it.slot, True]
            if look.present and last.present:
                drifts.append(_difference(look, last))
            if it.first is None:
                firsts.append(_JudgedLook((length, it.story), it.character, look))
            if it.first is None and look.present:
                hues[min(int(look.hue // 60), 5)] += 1
                if it.story in before and before[it.story].present:
                    copies.append(_difference(look, before[it.story]) < judge.SAME_HUE_DEGREES)
            before[it.story] = last
            if it.first is None or not is_return(it):
                continue
            first = group.looks[it.story, it.first.prompt, it.first.slot, False]
            returned.append(_JudgedLook((length, it.story), it.character, look))
            present = first.present and look.present
            if present:
                errors.append(_difference(first, look))
            hit = present and _difference(first, look) < judge.SAME_HUE_DEGREES
            hue.append(hit)
            pattern.append(present and first.pattern == look.pattern)
            next(hits for (low, high), hits in zip(GAPS, gap_hits.values(), strict=True) if it.gap <= high).append(hit)
            if it.slot is not None:
                pair_hits.setdefault((it.story, it.prompt), []).append(hit)
            story = group.stories[it.story]
            named = parse_prompt(story[it.prompt]).who
            for frame in group.retrieved[it.story, it.prompt]:
                precision.append(bool(set(named) & set(shown_at(story, frame))))
            if frames := group.candidates[it.story, it.prompt]:
                blocks = frames * blocks_per_frame
                activated.append(min(settings.top_k, blocks) / blocks)
        both += [all(hits) for hits in pair_hits.values() if len(hits) == 2]

    chance_hue, chance_pattern = _matching(firsts, returned, lambda a, b: a.story != b.story)
    others_hue, _ = _matching(firsts, returned, lambda a, b: a.story == b.story and a.character != b.character)
    return KindFigures(
        memory=memory,
        hue=Proportion.of(hue),
        median_error=_median(errors),
        pattern=Proportion.of(pattern),
        chance_hue=chance_hue,
        chance_pattern=chance_pattern,
        others_hue=others_hue,
        shape=Proportion.of(shape),
        pairs=Proportion.of(both),
        gaps={name: Proportion.of(hits) for name, hits in gap_hits.items()},
        precision=round(sum(precision) / len(precision), 4) if precision else None,
        activated=round(sum(activated) / len(activated), 4) if activated else None,
        copies=round(sum(copies) / len(copies), 4) if copies else math.nan,
        drift=_median(drifts),
        hues=hues,
    )


@dataclass(frozen=True)
class _JudgedLook:
    story: tuple[int, int]
    character: int
    look: judge.Look


def _matching(
    firsts: Sequence[_JudgedLook], returned: Sequence[_JudgedLook], compared: Callable[[_JudgedLook, _JudgedLook], bool]
) -> tuple[float, float]:
    """Share of hues and of patterns that match where returns are held against the first looks to be `compared`.

    What a memory that brings back somebody else would reach: it knows which looks this model likes to invent.
    """
    pairs = [(first.look, it.look) for it in returned for first in firsts if compared(first, it)]
    present = [(first, look) for first, look in pairs if first.present and look.present]
    hue = sum(_difference(first, look) < judge.SAME_HUE_DEGREES for first, look in present)
    pattern = sum(first.pattern == look.pattern for first, look in present)
    return round(hue / max(len(pairs), 1), 4), round(pattern / max(len(pairs), 1), 4)


def _difference(a: judge.Look, b: judge.Look) -> float:
    return abs((a.hue - b.hue + 180) % 360 - 180)


def _median(values: Sequence[float]) -> float:
    return round(torch.tensor(values, dtype=torch.float64).median().item(), 4) if values else math.nan
