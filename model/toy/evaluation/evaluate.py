"""Does memory work? Held-out stories in which characters leave and return, judged from the pixels alone.

Every frame is generated, first appearances included. A return is compared with the story's first appearance of that
character, first chunk with first chunk, by hue (equal within 30 degrees: one in six by chance) and by pattern (one in
three, if the model drew all equally often; `KindFigures.chance_pattern` says what it is). A character that is absent in
either chunk is a miss. All kinds of memory stream the same stories from the same noise. Some of them are controls,
which would expose a memory that does nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from memflow_ops.model.streaming.settings import USED_BY, StreamSettings
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming, median
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, JUDGED_SEED, make_stories
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS, MemoryKind, stream_kind
from memflow_ops.model.toy.evaluation.summary import JudgedStream, judge_stream, summarise
from memflow_ops.model.toy.settings import TOY_SETTINGS
from memflow_ops.model.wan.transformer import CausalVideoModel

TIMED_CHUNKS = range(8, 24)
"""The chunks that are timed: all kinds have a memory by then, and the history is short."""


def check_evaluation(kinds: Sequence[str], stories: int, seed: int, top_k: int | None = None) -> None:
    """Raises a ValueError for arguments that `evaluate_kinds` cannot work with. top_k: None where it was not given."""
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
    """Streams held-out stories under each kind of memory, and yields its figures.

    stories: how many of each length, see `held_out.make_stories`. kinds: names of MEMORY_KINDS. seed: the seed of
    stories and noise. settings: None for TOY_SETTINGS. lengths: of the stories, in prompts; None for
    `held_out.STORY_PROMPTS`. report: is called with a kind's name, how many of its chunks are done, and how many there
    are.
    """
    check_evaluation(kinds, stories, seed)
    settings = settings or TOY_SETTINGS
    groups = make_stories(stories, seed, lengths)
    tokens = model.tokens(settings.height, settings.width)
    total = sum(len(group[0]) for group in groups) * FRAMES_PER_PROMPT // settings.chunk_frames

    def counted(name: str, chunks: Iterator[Chunk], done: int) -> Iterator[Chunk]:
        for chunk in chunks:
            yield chunk
            if report is not None:
                report(name, done + chunk.index + 1, total)

    for name in kinds:
        streams: list[JudgedStream] = []
        for group in groups:
            done = sum(stream.chunks for stream in streams)
            # No two stories share their noise.
            first_seed = seed + sum(len(stream.stories) for stream in streams)
            chunks = stream_kind(model, group, MEMORY_KINDS[name], settings, first_seed)
            streams.append(judge_stream(group, counted(name, chunks, done), settings.chunk_frames))
        yield summarise(name, streams, MEMORY_KINDS[name].change(settings), -(-tokens // settings.block_size))


def time_kinds(
    model: CausalVideoModel,
    kinds: Sequence[str] | Mapping[str, MemoryKind],
    settings: StreamSettings | None = None,
    seed: int = JUDGED_SEED,
) -> dict[str, KindTiming]:
    """Streams four stories under every kind at once, a chunk of each in turn, so that other load touches all alike.

    kinds: names of MEMORY_KINDS, or other kinds by name. The ratios are to the kind named "none".
    """
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
        spread = [round(ratios[round(q * (len(ratios) - 1))], 4) if ratios else None for q in (0.5, 0.2, 0.8)]
        timings[name] = KindTiming(median(ours), *spread)
    return timings
