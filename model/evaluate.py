"""Does memory work? Held-out stories in which characters leave and return, judged from the pixels alone.

Every frame is generated, first appearances included. A return is compared with the story's first appearance of that
character, first chunk against first chunk: hue within 30 degrees (one in six by chance) and pattern (one in three, if
the model drew all alike often; `Row.chance_pattern` says what it is). A character that is absent in either is a miss.
All rows share stories and noise; some are controls, which would expose a memory that does nothing.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from memflow_ops.cache import Candidates
from memflow_ops.environment import ROOT, environment
from memflow_ops.model import judge
from memflow_ops.model.checkpoints import sha256, write_atomically
from memflow_ops.model.held_out import FRAMES_PER_PROMPT, JUDGED_SEED, Appearance, appearances, is_return, make_stories
from memflow_ops.model.settings import TOY_SETTINGS, USED_BY, StreamSettings
from memflow_ops.model.stream import Chunk, Streamer, chunk_prompts
from memflow_ops.model.text import parse_prompt
from memflow_ops.model.train import HELD_OUT_SEED
from memflow_ops.model.transformer import CausalVideoModel
from memflow_ops.retrieval import Retrieved

GAPS = ((24, 48), (49, 120), (121, 240))
"""Returns are also judged apart by the frames since the character was last named."""


# ----------------------------------------------------------------------------------------------------------------- rows


class Oracle:
    """A control: frames that show whom the coming prompt names, by what the prompts said when they were made.

    `coming` is set before each chunk. Who is named takes turns, each with its frames spread over the past.
    """

    def __init__(self, bank_frames: int, stories: Sequence[Sequence[str]]):
        self.bank_frames, self.stories = bank_frames, stories
        self.coming: Sequence[str] = ()

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        chosen = []
        for story, prompt, frames in zip(self.stories, self.coming, candidates.frames, strict=True):
            queues = [
                [frame for frame in frames if character in shown_at(story, frame)]
                for character in parse_prompt(prompt).who
            ]
            spread = [queue[:: max(1, len(queue) // self.bank_frames)] for queue in queues]
            turns = chain.from_iterable(zip(*(_padded(queue, self.bank_frames) for queue in spread), strict=True))
            chosen.append(list(dict.fromkeys(frame for frame in turns if frame is not None))[: self.bank_frames])
        return Retrieved(chosen, [[0.0] * len(frames) for frames in chosen])


def _padded(queue: list[int], length: int) -> list[int | None]:
    return [*queue[:length], *[None] * (length - len(queue))]


def shown_at(story: Sequence[str], frame: int) -> tuple[int, ...]:
    """Whom the story's prompt named at that frame."""
    return parse_prompt(story[frame // FRAMES_PER_PROMPT]).who


@dataclass(frozen=True)
class Kind:
    """One kind of memory to be judged."""

    about: str
    change: Callable[[StreamSettings], StreamSettings]
    oracle: bool = False


KINDS = {
    "none": Kind("the local window alone", lambda s: replace(s, memory="none")),
    "sink": Kind("and the first frames", lambda s: replace(s, memory="sink")),
    "full": Kind("and the whole history, dense", lambda s: replace(s, memory="full")),
    "memflow": Kind("retrieved frames, top-k blocks", lambda s: s),
    "random frames": Kind("frames at random, top-k blocks", lambda s: replace(s, relevance="random")),
    "random blocks": Kind("retrieved frames, blocks at random", lambda s: replace(s, selection="random")),
    "dense bank": Kind("retrieved frames, all blocks", lambda s: replace(s, top_k=10_000)),
    "oracle frames": Kind("the right frames by name, top-k blocks", lambda s: s, oracle=True),
}


@dataclass(frozen=True)
class Share:
    """A share of cases with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: int
    """of cases in all"""

    @classmethod
    def of(cls, hits: Sequence[bool]) -> "Share":
        n, z = len(hits), 1.96
        if not n:
            return cls(math.nan, math.nan, math.nan, 0)
        p = sum(hits) / n
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        return cls(round(p, 4), round(low, 4), round(high, 4), n)


@dataclass(frozen=True)
class Row:
    """How returns went under one kind of memory. Hues in degrees."""

    memory: str
    hue: Share
    """of returns: the hue of the first appearance, within 30 degrees"""
    median_error: float
    """median hue difference, over returns with the character present both times"""
    pattern: Share
    """of returns: the pattern of the first appearance"""
    chance_hue: float
    """the same with identities shuffled: of returns held against first appearances in all other stories"""
    chance_pattern: float
    others_hue: float
    """of returns held against the first appearances of the others in the same story: what a memory that brings back
    the wrong one of its frames would reach"""
    shape: Share
    """of all appearances: looks like the character that was named"""
    pairs: Share
    """of prompts that bring back two: both have their hue"""
    gaps: dict[str, Share]
    """hue, by frames of absence"""
    precision: float | None
    """share of the retrieved frames, at returns, that show somebody the prompt names; None without retrieval"""
    activated: float | None
    """share of the bank's blocks that a query group selects, at returns; None where nothing is selected"""
    copies: float
    """share of first appearances with the hue of the character before (chance 1/6)"""
    drift: float
    """median hue change over a prompt, first to last chunk"""
    hues: list[int]
    """first appearances per sixth of the colour circle"""


@dataclass(frozen=True)
class Timing:
    """What a chunk of four stories takes under one kind of memory, all kinds in turn, chunk by chunk."""

    seconds: float
    """median"""
    ratio: float | None
    """median of the ratios to the same chunk under "none"; None without such"""
    ratio_p20: float | None
    ratio_p80: float | None


# -------------------------------------------------------------------------------------------------------------- looking


Story = list[str]
Looks = dict[tuple[int, int, int | None, bool], judge.Look]
"""(story, prompt, slot, last chunk of the prompt instead of first) -> look"""


# ------------------------------------------------------------------------------------------------------------ streaming


@dataclass(frozen=True)
class Streamed:
    """Stories of one length under one kind of memory, looked at."""

    stories: list[Story]
    looks: Looks
    retrieved: dict[tuple[int, int], list[int]]
    """(story, prompt) -> frames retrieved for its first chunk"""
    candidates: dict[tuple[int, int], int]
    """(story, prompt) -> frames of the bank, sink included"""
    chunks: int


def stream_stories(
    model: CausalVideoModel, stories: list[Story], kind: Kind, settings: StreamSettings, seed: int
) -> Iterator[Chunk]:
    """Chunk after chunk of all stories, which have the same length, as `kind` remembers."""
    spoken = chunk_prompts(stories, FRAMES_PER_PROMPT, settings.chunk_frames)
    # Nothing is to be forgotten: what is judged is retrieval from the whole past.
    settings = kind.change(replace(settings, device_frames=max(settings.device_frames, len(spoken))))
    oracle = Oracle(settings.bank_frames, stories) if kind.oracle else None
    streamer = Streamer(model, len(stories), settings, seed, policy=oracle)
    for prompts in spoken:
        if oracle is not None:
            oracle.coming = prompts
        yield streamer.next_chunk(prompts)


def watch(stories: list[Story], chunks: Iterator[Chunk], chunk_frames: int) -> Streamed:
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
    return Streamed(stories, looks, retrieved, candidates, chunk_count)


# -------------------------------------------------------------------------------------------------------------- judging


def summarise(memory: str, streamed: Sequence[Streamed], settings: StreamSettings, blocks_per_frame: int) -> Row:
    """The row of one kind of memory; settings: those that were streamed with."""
    hue: list[bool] = []
    gap_hits: dict[str, list[bool]] = {f"{low} to {high}": [] for low, high in GAPS}
    pattern, shape, both, precision, copies = [], [], [], [], []
    errors, drifts, activated, hues = [], [], [], [0] * 6
    firsts: list[_Seen] = []
    returned: list[_Seen] = []

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
                firsts.append(_Seen((length, it.story), it.character, look))
            if it.first is None and look.present:
                hues[min(int(look.hue // 60), 5)] += 1
                if it.story in before and before[it.story].present:
                    copies.append(_difference(look, before[it.story]) < judge.SAME_HUE_DEGREES)
            before[it.story] = last
            if it.first is None or not is_return(it):
                continue
            first = group.looks[it.story, it.first.prompt, it.first.slot, False]
            returned.append(_Seen((length, it.story), it.character, look))
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
    return Row(
        memory=memory,
        hue=Share.of(hue),
        median_error=_median(errors),
        pattern=Share.of(pattern),
        chance_hue=chance_hue,
        chance_pattern=chance_pattern,
        others_hue=others_hue,
        shape=Share.of(shape),
        pairs=Share.of(both),
        gaps={name: Share.of(hits) for name, hits in gap_hits.items()},
        precision=round(sum(precision) / len(precision), 4) if precision else None,
        activated=round(sum(activated) / len(activated), 4) if activated else None,
        copies=round(sum(copies) / len(copies), 4) if copies else math.nan,
        drift=_median(drifts),
        hues=hues,
    )


@dataclass(frozen=True)
class _Seen:
    story: tuple[int, int]
    character: int
    look: judge.Look


def _matching(
    firsts: Sequence[_Seen], returned: Sequence[_Seen], compared: Callable[[_Seen, _Seen], bool]
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


# ------------------------------------------------------------------------------------------------------------ the whole


def check(kinds: Sequence[str], stories: int, seed: int, top_k: int | None = None) -> None:
    """A ValueError for arguments that `evaluate` cannot work with. top_k: None where it was not given."""
    unknown = [name for name in kinds if name not in KINDS]
    if unknown:
        raise ValueError(f"unknown kind of memory {', '.join(map(repr, unknown))}; there are {', '.join(KINDS)}")
    changed = [KINDS[name].change(replace(TOY_SETTINGS, top_k=top_k or TOY_SETTINGS.top_k)) for name in kinds]
    if top_k and not any(s.memory in USED_BY["top_k"] and s.top_k == top_k for s in changed):
        raise ValueError(f"--top-k would change nothing with --memory {' and '.join(kinds)}: no blocks are selected")
    make_stories(stories, seed)


def evaluate(
    model: CausalVideoModel,
    *,
    stories: int = 8,
    kinds: Sequence[str] = tuple(KINDS),
    seed: int = JUDGED_SEED,
    settings: StreamSettings | None = None,
    lengths: Sequence[int] | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Iterator[Row]:
    """Streams held-out stories under each kind of memory and yields its row.

    stories: of each length, see `held_out.make_stories`. kinds: names of KINDS. seed: of stories and noise, held out.
    lengths: of the stories, in prompts; None: all of `held_out.STORY_PROMPTS`.
    report: called with a kind's name, the chunks done and all of its chunks.
    """
    check(kinds, stories, seed)
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
        streamed: list[Streamed] = []
        for group in told:
            done = sum(other.chunks for other in streamed)
            # No two stories share their noise.
            first_seed = seed + sum(len(other.stories) for other in streamed)
            chunks = stream_stories(model, group, KINDS[name], settings, first_seed)
            streamed.append(watch(group, counted(name, chunks, done), settings.chunk_frames))
        yield summarise(name, streamed, KINDS[name].change(settings), -(-tokens // settings.block_size))


TIMED_CHUNKS = range(8, 24)
"""Chunks that are timed: all kinds have a memory by then, and the history is short."""


def time_kinds(
    model: CausalVideoModel,
    kinds: Sequence[str] | Mapping[str, Kind],
    settings: StreamSettings | None = None,
    seed: int = JUDGED_SEED,
) -> dict[str, Timing]:
    """Streams four stories under every kind at once, a chunk of each in turn, so that other load touches all alike.

    kinds: names of KINDS, or others with what they are. Under "none" is what the ratios are to."""
    stories = make_stories(4, seed)[1]
    known = kinds if isinstance(kinds, Mapping) else KINDS
    streams = {name: stream_stories(model, stories, known[name], settings or TOY_SETTINGS, seed) for name in kinds}
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
        timings[name] = Timing(_median(ours), *parts)
    return timings


def table(rows: Sequence[Row], timings: Mapping[str, Timing]) -> str:
    """The rows, with what a chunk takes, as a table of fixed-width text."""

    def percent(x: float | None) -> str:
        return "-" if x is None or math.isnan(x) else f"{100 * x:.0f} %"

    def interval(x: Share) -> str:
        return f"{100 * x.value:.0f} % ({100 * x.low:.0f}-{100 * x.high:.0f})" if x.count else "-"

    gaps = list(rows[0].gaps) if rows else []
    heads = ["memory", "returns", "same hue (95 %)", "chance", "others", "error", "pattern", "chance", "both of two"]
    heads += ["as named", "retrieved right", "activated", *(f"gap {gap}" for gap in gaps)]
    heads += ["copies", "s/chunk", "overhead"]
    cells = [heads]
    for row in rows:
        timing = timings.get(row.memory)
        ratio = timing.ratio if timing and row.memory != "none" else None
        line = [row.memory, str(row.hue.count), interval(row.hue), percent(row.chance_hue)]
        line += [percent(row.others_hue), f"{row.median_error:.1f}"]
        line += [percent(x) for x in (row.pattern.value, row.chance_pattern, row.pairs.value, row.shape.value)]
        line += [percent(row.precision), percent(row.activated)]
        line += [f"{percent(row.gaps[gap].value)} of {row.gaps[gap].count}" for gap in gaps]
        overhead = "-" if ratio is None else f"{100 * (ratio - 1):+.0f} %"
        cells.append([*line, percent(row.copies), f"{timing.seconds:.3f}" if timing else "-", overhead])
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write_results(
    rows: Sequence[Row],
    timings: Mapping[str, Timing],
    settings: StreamSettings,
    *,
    seed: int,
    stories: int,
    weights: Path,
    out: Path,
) -> None:
    """Writes the rows as JSON to `out` and as a picture beside it."""
    from memflow_ops.model.evaluation_plot import draw

    results = {
        "command": "memflow evaluate",
        **environment(torch.device("cpu")),
        "weights": {"name": weights.name, "sha256": sha256(weights)},
        "seed": seed,
        "held_out": seed >= HELD_OUT_SEED,
        "stories_of_each_length": stories,
        "frames_per_prompt": FRAMES_PER_PROMPT,
        "settings": asdict(settings),
        "written": time.strftime("%Y-%m-%d"),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(out, (json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n").encode())
    write_atomically(out.with_suffix(".png"), draw(rows))


def without_nan(x: object) -> object:
    """JSON has no NaN; None says as well that there was nothing to measure."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def default_results() -> Path | None:
    """bench/results/toy-cpu.json in a checkout; None where the package is installed elsewhere."""
    return ROOT / "bench" / "results" / "toy-cpu.json" if (ROOT / "setup.py").is_file() else None
