"""From the frames that a kind of memory gives to its figures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy.evaluation.figures import KindFigures, Proportion, mean, median
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, Appearance, appearances, is_return, named_at
from memflow_ops.model.toy.judge import SAME_HUE_DEGREES, Look, hue_difference, look_at
from memflow_ops.model.toy.language import parse_prompt

GAPS = ((24, 48), (49, 120), (121, 240))
"""Returns are also judged apart by the frames since a prompt last named the character."""


# -------------------------------------------------------------------------------------------------------------- looking


@dataclass(frozen=True)
class JudgedStream:
    """What stories of one length show under one kind of memory."""

    stories: list[list[str]]
    looks: dict[tuple[int, int, int | None, bool], Look]
    """(story, prompt, side, whether it is the prompt's last chunk instead of its first) -> what the pixels say"""
    retrieved: dict[tuple[int, int], list[int]]
    """(story, prompt) -> frames retrieved for its first chunk"""
    candidates: dict[tuple[int, int], int]
    """(story, prompt) -> number of frames in its first chunk's bank, sink included"""
    chunks: int


def judge_stream(stories: list[list[str]], chunks: Iterator[Chunk], chunk_frames: int) -> JudgedStream:
    """Looks at the first and the last chunk of every appearance; the frames themselves are not kept."""
    chunks_per_prompt = FRAMES_PER_PROMPT // chunk_frames
    by_prompt: dict[int, list[Appearance]] = {}
    for appearance in appearances(stories):
        by_prompt.setdefault(appearance.prompt, []).append(appearance)
    looks: dict[tuple[int, int, int | None, bool], Look] = {}
    retrieved, candidates, chunk_count = {}, {}, 0
    for chunk in chunks:
        prompt, part = divmod(chunk.index, chunks_per_prompt)
        chunk_count += 1
        if part == 0:
            for story, found in enumerate(chunk.retrieved):
                retrieved[story, prompt] = found
                candidates[story, prompt] = len(chunk.candidates[story])
        here = by_prompt.get(prompt, [])
        if here and part in (0, chunks_per_prompt - 1):
            frames = chunk.frames[[appearance.story for appearance in here]]
            seen = look_at(frames, [appearance.side for appearance in here])
            for appearance, look in zip(here, seen, strict=True):
                looks[appearance.story, prompt, appearance.side, part > 0] = look
    return JudgedStream(stories, looks, retrieved, candidates, chunk_count)


# -------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class _JudgedAppearance:
    """An appearance with what the pixels say about it."""

    stream: JudgedStream
    story: tuple[int, int]
    """the number of the stream, and of the story in it"""
    appearance: Appearance
    look: Look
    """in the first chunk of the prompt"""
    last_look: Look
    """in its last chunk"""
    first_look: Look | None
    """in the first chunk of the character's first appearance in the story; None where this is it"""
    look_before: Look | None
    """in the last chunk of the appearance before, whoever it was; None where there is none"""

    @property
    def hue_error(self) -> float | None:
        """The degrees between this hue and that of the first appearance; None where the character is absent in one."""
        return _degrees(self.first_look, self.look)

    @property
    def same_hue(self) -> bool:
        return self.hue_error is not None and self.hue_error < SAME_HUE_DEGREES

    @property
    def same_pattern(self) -> bool:
        first = self.first_look
        return first is not None and first.present and self.look.present and first.pattern == self.look.pattern

    @property
    def key(self) -> tuple[int, int]:
        """The story in its stream and the prompt."""
        return self.appearance.story, self.appearance.prompt


def _judged(number: int, stream: JudgedStream) -> list[_JudgedAppearance]:
    """All appearances of one stream, story by story."""
    judged = []
    before: dict[int, Look] = {}
    for it in appearances(stream.stories):
        last_look = stream.looks[it.story, it.prompt, it.side, True]
        judged.append(
            _JudgedAppearance(
                stream,
                (number, it.story),
                it,
                look=stream.looks[it.story, it.prompt, it.side, False],
                last_look=last_look,
                first_look=stream.looks[it.story, it.first.prompt, it.first.side, False] if it.first else None,
                look_before=before.get(it.story),
            )
        )
        before[it.story] = last_look
    return judged


def summarise(
    memory: str, streams: Sequence[JudgedStream], settings: StreamSettings, blocks_per_frame: int
) -> KindFigures:
    """The figures of one kind of memory. `settings` are those that its stories were streamed with."""
    everyone = [judged for number, stream in enumerate(streams) for judged in _judged(number, stream)]
    firsts = [it for it in everyone if it.first_look is None]
    returns = [it for it in everyone if is_return(it.appearance)]
    sixths = [min(int(it.look.hue // 60), 5) for it in firsts if it.look.present]
    chance_hue, chance_pattern = _matching(firsts, returns, lambda a, b: a.story != b.story)
    others_hue, _ = _matching(
        firsts, returns, lambda a, b: a.story == b.story and a.appearance.character != b.appearance.character
    )
    changes = [change for it in firsts if (change := _degrees(it.look_before, it.look)) is not None]
    copies = mean([change < SAME_HUE_DEGREES for change in changes])
    return KindFigures(
        memory=memory,
        hue=Proportion.of([it.same_hue for it in returns]),
        median_error=median([error for it in returns if (error := it.hue_error) is not None]),
        pattern=Proportion.of([it.same_pattern for it in returns]),
        chance_hue=chance_hue,
        chance_pattern=chance_pattern,
        others_hue=others_hue,
        shape=Proportion.of([it.look.present and it.look.shape == it.appearance.character for it in everyone]),
        pairs=_pairs(returns),
        gaps={
            f"{low} to {high}": Proportion.of([it.same_hue for it in returns if low <= it.appearance.gap <= high])
            for low, high in GAPS
        },
        precision=_precision(returns),
        activated=_activated(returns, settings.top_k, blocks_per_frame),
        copies=math.nan if copies is None else copies,
        drift=median([drift for it in everyone if (drift := _degrees(it.look, it.last_look)) is not None]),
        hues=[sixths.count(sixth) for sixth in range(6)],
        each_hue="".join(str(int(it.same_hue)) for it in returns),
        each_pattern="".join(str(int(it.same_pattern)) for it in returns),
    )


def _pairs(returns: Sequence[_JudgedAppearance]) -> Proportion:
    """The share of the prompts that bring back two characters after which both have their hue."""
    hits: dict[tuple[int, int, int], list[bool]] = {}
    for it in returns:
        hits.setdefault((*it.story, it.appearance.prompt), []).append(it.same_hue)
    return Proportion.of([all(both) for both in hits.values() if len(both) == 2])


def _precision(returns: Sequence[_JudgedAppearance]) -> float | None:
    """The share of the retrieved frames that show somebody whom the prompt names; None without retrieved frames."""
    right = []
    for it in returns:
        story = it.stream.stories[it.appearance.story]
        named = parse_prompt(story[it.appearance.prompt]).who
        right += [bool(set(named) & set(named_at(story, frame))) for frame in it.stream.retrieved[it.key]]
    return mean(right)


def _activated(returns: Sequence[_JudgedAppearance], top_k: int, blocks_per_frame: int) -> float | None:
    """The mean share of the bank's blocks that top_k blocks are; None without a bank."""
    blocks = [frames * blocks_per_frame for it in returns if (frames := it.stream.candidates[it.key])]
    return mean([min(top_k, count) / count for count in blocks])


def _matching(
    firsts: Sequence[_JudgedAppearance],
    returns: Sequence[_JudgedAppearance],
    compared: Callable[[_JudgedAppearance, _JudgedAppearance], bool],
) -> tuple[float, float]:
    """The shares of equal hues and of equal patterns between returns and those first appearances that are `compared`.

    This is what a memory that brings back somebody else would reach: it knows which looks this model likes to invent.
    """
    pairs = [(first.look, it.look) for it in returns for first in firsts if compared(first, it)]
    present = [(first, look) for first, look in pairs if first.present and look.present]
    hue = sum(hue_difference(first.hue, look.hue) < SAME_HUE_DEGREES for first, look in present)
    pattern = sum(first.pattern == look.pattern for first, look in present)
    return round(hue / max(len(pairs), 1), 4), round(pattern / max(len(pairs), 1), 4)


def _degrees(a: Look | None, b: Look | None) -> float | None:
    """The degrees between the hues of two looks; None where there is no such look, or nobody is present."""
    if a is None or b is None or not (a.present and b.present):
        return None
    return hue_difference(a.hue, b.hue)
