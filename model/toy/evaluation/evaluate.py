"""Does memory work? Held-out stories in which characters leave and return, judged from the pixels alone.

Every frame is generated, first appearances included. A return is compared with the story's first appearance of that
character, first chunk against first chunk: hue within 30 degrees (one in six by chance) and pattern (one in three, if
the model drew all alike often; `KindFigures.chance_pattern` says what it is). A character that is absent in
either is a miss.
All rows share stories and noise; some are controls, which would expose a memory that does nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from memflow_ops.model.streaming.settings import USED_BY, StreamSettings
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming
from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
    JUDGED_SEED,
    make_stories,
)
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS, MemoryKind, stream_kind
from memflow_ops.model.toy.evaluation.summary import JudgedStream, _median, summarise, watch
from memflow_ops.model.toy.settings import TOY_SETTINGS
from memflow_ops.model.wan.transformer import CausalVideoModel

"""Returns are also judged apart by the frames since the character was last named."""
"""(story, prompt, slot, last chunk of the prompt instead of first) -> look"""


# ------------------------------------------------------------------------------------------------------------ the whole


def check_evaluation(kinds: Sequence[str], stories: int, seed: int, top_k: int | None = None) -> None:
    """A ValueError for arguments that `evaluate_kinds` cannot work with. top_k: None where it was not given."""
    unknown = [name for name in kinds if name not in MEMORY_KINDS]
    if unknown:
        raise ValueError(f"unknown kind of memory {', '.join(map(repr, unknown))}; there are {', '.join(MEMORY_KINDS)}")
    changed = [MEMORY_KINDS[name].change(replace(TOY_SETTINGS, top_k=top_k or TOY_SETTINGS.top_k)) for name in kinds]
    if top_k and not any(s.memory in USED_BY["top_k"] and s.top_k == top_k for s in changed):
        raise ValueError(f"--top-k would change nothing with --memory {' and '.join(kinds)}: no blocks are selected")
    make_stories(stories, seed)


def evaluate_kinds(
    model: CausalVideoModel,
    *,
    stories: int = 8,
    kinds: Sequence[str] = tuple(MEMORY_KINDS),
    seed: int = JUDGED_SEED,
    settings: StreamSettings | None = None,
    lengths: Sequence[int] | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Iterator[KindFigures]:
    """Streams held-out stories under each kind of memory and yields its row.

    stories: of each length, see `held_out.make_stories`. kinds: names of MEMORY_KINDS. seed: of stories and noise,
    held out. lengths: of the stories, in prompts; None: all of `held_out.STORY_PROMPTS`.
    report: called with a kind's name, the chunks done and all of its chunks.
    """
    check_evaluation(kinds, stories, seed)
    settings = settings or TOY_SETTINGS
    told = make_stories(stories, seed, lengths)
    tokens = model.tokens(settings.height, settings.width)
    total = sum(len(group[0]) for group in told) * FRAMES_PER_PROMPT // settings.chunk_frames

    def counted(name: str, chunks: Iterator[Chunk], done: int) -> Iterator[Chunk]:
        for chunk in chunks:
            yield chunk
            if report is not None:
                report(name, done + chunk.index + 1, total)

    for name in kinds:
        streamed: list[JudgedStream] = []
        for group in told:
            done = sum(other.chunks for other in streamed)
            # No two stories share their noise.
            first_seed = seed + sum(len(other.stories) for other in streamed)
            chunks = stream_kind(model, group, MEMORY_KINDS[name], settings, first_seed)
            streamed.append(watch(group, counted(name, chunks, done), settings.chunk_frames))
        yield summarise(name, streamed, MEMORY_KINDS[name].change(settings), -(-tokens // settings.block_size))


TIMED_CHUNKS = range(8, 24)
"""Chunks that are timed: all kinds have a memory by then, and the history is short."""


def time_kinds(
    model: CausalVideoModel,
    kinds: Sequence[str] | Mapping[str, MemoryKind],
    settings: StreamSettings | None = None,
    seed: int = JUDGED_SEED,
) -> dict[str, KindTiming]:
    """Streams four stories under every kind at once, a chunk of each in turn, so that other load touches all alike.

    kinds: names of MEMORY_KINDS, or others with what they are. Under "none" is what the ratios are to."""
    stories = make_stories(4, seed)[1]
    known = kinds if isinstance(kinds, Mapping) else MEMORY_KINDS
    streams = {name: stream_kind(model, stories, known[name], settings or TOY_SETTINGS, seed) for name in kinds}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for index in range(TIMED_CHUNKS.stop):
        for name in kinds if index % 2 else reversed(list(kinds)):
            chunk = next(streams[name])
            if index in TIMED_CHUNKS:
                seconds[name].append(chunk.seconds)
    timings = {}
    for name, ours in seconds.items():
        ratios = sorted(a / b for a, b in zip(ours, seconds.get("none", []), strict=False))
        parts = [round(ratios[round(q * (len(ratios) - 1))], 4) if ratios else None for q in (0.5, 0.2, 0.8)]
        timings[name] = KindTiming(_median(ours), *parts)
    return timings
