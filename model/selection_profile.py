"""How well, and how fast, may activation choose? A stream is watched, and its choices compared with dense attention.

At chunks drawn at random, in calls of attention drawn at random (a layer in a pass), a few heads and queries are held
against what they would see with the whole bank; `selection_quality` has the measure. The stream itself goes on as its
settings say. The time that each setting of `memory_attention` takes is measured on the same tensors, all in turn.
"""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from memflow_ops import describe_blocks, memory_attention
from memflow_ops.cache import FrameCache, Memory
from memflow_ops.model.generate import Interrupts
from memflow_ops.model.selection_quality import Blocks, Choice, Measured, View, budgets, choices, measure
from memflow_ops.model.settings import StreamSettings
from memflow_ops.model.stream import Streamer, TextEncoder
from memflow_ops.model.text import embed_prompts
from memflow_ops.model.transformer import CausalVideoModel

GOALS: dict[str, Callable[["Row"], bool]] = {
    "80 % of the mass": lambda row: row.captured >= 0.8,
    "95 %": lambda row: row.captured >= 0.95,
    "error of 5 %": lambda row: row.error <= 0.05,
}
"""For which the table says what they take; the last is what a recommendation goes by."""

CALLS = 3
"""Calls of which a round of timing takes the quickest."""


@dataclass(frozen=True)
class Sampling:
    """What is drawn of a stream, and how."""

    chunks: int = 12
    """chunks measured, of those with a full bank"""
    calls: int = 12
    """calls of attention, a layer in a pass, measured in each of these chunks"""
    heads: int = 3
    """heads measured in each call, at most"""
    queries: int = 512
    """queries measured in each call, at most; in whole groups"""
    rounds: int = 9
    """how often every setting is timed; 0: not at all"""
    seed: int = 0
    """of all that is drawn"""

    def __post_init__(self) -> None:
        for name, least in (("chunks", 1), ("calls", 1), ("heads", 1), ("queries", 1), ("rounds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Row:
    """One way to choose at one budget."""

    blocks: str
    block_size: int
    query_group: int | None
    top_k: int
    """blocks chosen; 0: the window alone"""
    keys: float
    """keys that they hold, on average"""
    share: float
    """of the bank's keys"""
    captured: float
    """share of the dense attention mass on the bank that falls on the chosen blocks"""
    captured_p20: float
    """by calls and heads, each with its own share: the 20th percentile"""
    left_out: float
    """share of all dense attention mass, window included, that falls on the others"""
    error: float
    """root mean square of the difference to the dense output over that of the dense output"""
    seconds: float | None = None
    """of `memory_attention`, median; None: not timed"""
    ratio: float | None = None
    """to the window alone, median of the pairs measured in turn, with its spread"""
    ratio_p20: float | None = None
    ratio_p80: float | None = None


@dataclass
class Profile:
    """What has been measured so far."""

    frames: int
    """of the bank, sink included"""
    frame_tokens: int
    compared: list[Choice]
    calls: int = 0
    queries: int = 0
    """times heads"""
    chunks: list[int] = field(default_factory=list)
    """whose calls were measured"""
    sums: dict[Choice, Measured] = field(default_factory=dict)
    shares: dict[Choice, list[Tensor]] = field(default_factory=dict)
    """captured of every call and head, (K, H)"""
    seconds: dict[tuple[int, int | None, int], list[float]] = field(default_factory=dict)
    """by block size, query group and top-k; (0, None, 0): the window alone"""

    @property
    def bank_mass(self) -> float:
        """The share of all attention that the bank gets."""
        some = next(iter(self.sums.values()))
        return (some.bank.sum() / self.queries).item()

    def add(self, chunk: int, found: Sequence[dict[Choice, Measured]]) -> None:
        self.chunks.append(chunk)
        for call in found:
            self.calls += 1
            some = next(iter(call.values()))
            self.queries += some.queries * len(some.bank)
            for choice, new in call.items():
                self.shares.setdefault(choice, []).append(_share(new.captured, new.bank))
                self.sums[choice] = _added(self.sums.get(choice), new)

    def rows(self) -> list[Row]:
        rows = []
        window = self.seconds.get((0, None, 0), [])
        for choice, total in self.sums.items():
            shares = torch.cat(self.shares[choice], 1)
            low = shares.quantile(0.2, dim=1).tolist()
            for i, top_k in enumerate(total.budgets):
                taken = self.seconds.get((*choice[1:], top_k), []) if choice.blocks == "top" else []
                ratios = sorted(ours / alone for ours, alone in zip(taken, window, strict=True)) if taken else []
                spread = [ratios[round(q * (len(ratios) - 1))] for q in (0.5, 0.2, 0.8)] if ratios else [None] * 3
                captured, bank = total.captured[i].sum(), total.bank.sum()
                keys = (total.keys[i].sum() / self.queries).item()
                rows.append(
                    Row(
                        *choice,
                        top_k,
                        keys=keys,
                        share=keys / (self.frames * self.frame_tokens),
                        captured=_share(captured, bank).item(),
                        captured_p20=low[i],
                        left_out=((bank - captured) / self.queries).item(),
                        error=(total.error[i].sum() / total.dense.sum()).sqrt().nan_to_num(nan=0.0).item(),
                        seconds=statistics.median(taken) if taken else None,
                        ratio=spread[0],
                        ratio_p20=spread[1],
                        ratio_p80=spread[2],
                    )
                )
        return rows


def _share(captured: Tensor, bank: Tensor) -> Tensor:
    """Where there is nothing to capture, all of it is captured."""
    return (captured / bank).nan_to_num(nan=1.0)


def _added(total: Measured | None, new: Measured) -> Measured:
    if total is None:
        return replace(new)
    return replace(
        new,
        **{name: getattr(total, name) + getattr(new, name) for name in ("captured", "bank", "error", "dense", "keys")},
        queries=total.queries + new.queries,
    )


# ----------------------------------------------------------------------------------------------------------- the stream


def first_full(settings: StreamSettings) -> int:
    """The first chunk that finds the sink complete and as many remembered frames as the bank takes."""
    sink_chunks = -(-settings.sink_frames // settings.chunk_frames)
    return settings.window_frames // settings.chunk_frames + sink_chunks + max(settings.bank_frames, 0) - 1


def check(
    settings: StreamSettings,
    chunks: int,
    frame_tokens: int,
    block_sizes: Sequence[int],
    query_groups: Sequence[int | None],
) -> list[Choice]:
    """What is to be compared; a ValueError for what cannot be measured in a stream of `chunks` chunks."""
    if settings.memory != "memflow":
        raise ValueError(f"only memory='memflow' selects blocks of a bank, got {settings.memory!r}")
    if not settings.sink_frames + settings.bank_frames:
        raise ValueError("without sink and bank there is nothing to select from")
    if chunks <= first_full(settings):
        raise ValueError(
            f"a bank of {settings.bank_frames} frames is full in chunk {first_full(settings)}, but the story ends "
            f"after chunk {chunks - 1}: take a smaller bank (--bank-frames) or a longer story"
        )
    return choices(block_sizes, query_groups, frame_tokens)


def profile(
    model: CausalVideoModel,
    spoken: Sequence[Sequence[str]],
    settings: StreamSettings,
    *,
    block_sizes: Sequence[int],
    query_groups: Sequence[int | None],
    sampling: Sampling | None = None,
    seed: int = 0,
    encode: TextEncoder = embed_prompts,
    report: Callable[[int, int], None] | None = None,
    interrupts: Interrupts | None = None,
) -> Iterator[Profile]:
    """Streams and yields, after every measured chunk, the same profile, which has grown.

    spoken: per chunk the prompt of every story. seed: of the stream's noise. report: called with the chunks done and
    those to do. interrupts: where given, Ctrl-C ends it between two chunks' measurements, so that none counts in part.
    """
    sampling = sampling or Sampling()
    tokens = model.tokens(settings.height, settings.width)
    compared = check(settings, len(spoken), tokens, block_sizes, query_groups)
    draw = random.Random(sampling.seed)
    eligible = range(first_full(settings), len(spoken))
    chosen = sorted(draw.sample(eligible, min(sampling.chunks, len(eligible))))
    watcher = _Watcher(compared, sampling, draw)
    streamer = Streamer(model, len(spoken[0]), settings, seed, encode=encode, observe=watcher.observe)
    watcher.cache = cast(FrameCache, streamer.cache)
    result = Profile(settings.sink_frames + settings.bank_frames, tokens, compared)
    layers = model.config.num_layers
    # The clean pass ends before the attention of its last layer.
    calls = [(step, layer) for step in range(settings.steps + 1) for layer in range(layers)][:-1]
    for index in range(chosen[-1] + 1):
        wanted = draw.sample(calls, min(sampling.calls, len(calls))) if index in chosen else []
        watcher.start(wanted, sampling.rounds if index == chosen[0] else 0)
        with interrupts.allowed() if interrupts else nullcontext():
            streamer.next_chunk(spoken[index])
        if index == chosen[0]:
            result.seconds = watcher.seconds
        if wanted:
            result.add(index, watcher.found)
        if report is not None:
            report(index + 1, chosen[-1] + 1)
        if wanted:
            yield result


class _Watcher:
    """Measures the wanted calls of a chunk as they come by."""

    cache: FrameCache

    def __init__(self, compared: list[Choice], sampling: Sampling, draw: random.Random):
        self.compared, self.sampling, self.draw = compared, sampling, draw
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.start([], 0)

    def start(self, wanted: Sequence[tuple[int, int]], rounds: int) -> None:
        self.wanted, self.rounds = set(wanted), rounds
        self.found: list[dict[Choice, Measured]] = []
        self.seconds: dict[tuple[int, int | None, int], list[float]] = {}
        self.step = -1

    def observe(self, layer: int, q: Tensor, memory: Memory) -> None:
        self.step += layer == 0
        if (self.step, layer) not in self.wanted:
            return
        window = self.cache.window(layer)
        self.found.append(measure(self._view(q, window, memory), self.compared, self.generator))
        if self.rounds and not self.seconds:
            self.seconds = time_choices(q, window, memory, self.cache.layout.frame_tokens, self.compared, self.rounds)

    def _view(self, q: Tensor, window: tuple[Tensor, Tensor], memory: Memory) -> View:
        """Of a story, a few heads and queries, drawn; the bank's frames copied together."""
        story = self.draw.randrange(len(q))
        count = q.shape[2]
        heads = sorted(self.draw.sample(range(count), min(self.sampling.heads, count)))
        shared = count // memory.keys.shape[2]
        kv_heads = torch.tensor(heads, device=q.device) // shared
        slots = memory.slots[story, : int(memory.frames[story])].long()
        tokens = self.cache.layout.frame_tokens

        def of_bank(pool: Tensor) -> Tensor:
            return pool[story].unflatten(0, (-1, tokens))[slots][:, :, kv_heads].permute(2, 0, 1, 3).contiguous()

        k, v = (x[story][:, kv_heads].transpose(0, 1) for x in window)
        queries, rows = q[story][:, heads].transpose(0, 1), self._rows(q.shape[1]).to(q.device)
        return View(queries, rows, k, v, of_bank(memory.keys), of_bank(memory.values))

    def _rows(self, queries: int) -> Tensor:
        """Whole query groups, so that what a group chooses is judged by all of its queries."""
        run = math.lcm(*(choice.query_group for choice in self.compared if choice.query_group is not None))
        if self.sampling.queries >= queries or run >= queries:
            return torch.arange(queries)
        runs = -(-queries // run)
        chosen = sorted(self.draw.sample(range(runs), max(1, min(runs, self.sampling.queries // run))))
        return torch.cat([torch.arange(i * run, min((i + 1) * run, queries)) for i in chosen])


# ----------------------------------------------------------------------------------------------------------------- time


def time_choices(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    frame_tokens: int,
    compared: Sequence[Choice],
    rounds: int,
) -> dict[tuple[int, int | None, int], list[float]]:
    """Seconds of `memory_attention` with stored descriptors, by setting and round; (0, None, 0): the window alone.

    A round goes through all settings in an order of its own, so that other load touches all alike, and takes the
    quickest of three calls. One round more is run first and not counted.
    """
    calls: dict[tuple[int, int | None, int], Callable[[], object]] = {
        (0, None, 0): lambda: memory_attention(q, *window)
    }
    frames = memory.slots.shape[1]
    for size in sorted({choice.block_size for choice in compared}):
        descriptors = describe_blocks(memory.keys, size, frame_tokens)
        for group in {c.query_group: None for c in compared if c.block_size == size and c.blocks == "top"}:
            for top_k in budgets(frames * -(-frame_tokens // size))[1:]:
                options: dict[str, Any] = {"top_k": top_k, "block_size": size, "query_group": group}
                calls[size, group, top_k] = _call(q, window, memory, descriptors, frame_tokens, options)
    taken: dict[tuple[int, int | None, int], list[float]] = {key: [] for key in calls}
    order, draw = list(calls), random.Random(0)
    for number in range(rounds + 1):
        draw.shuffle(order)
        for key in order:
            seconds = min(_seconds(calls[key], q.device) for _ in range(CALLS))
            if number:
                taken[key].append(seconds)
    return taken


def _call(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    descriptors: Tensor,
    frame_tokens: int,
    options: dict[str, Any],
) -> Callable[[], object]:
    return lambda: memory_attention(
        q,
        *window,
        memory.keys,
        memory.values,
        memory_descriptors=descriptors,
        frame_tokens=frame_tokens,
        memory_frames=memory.frames,
        memory_slots=memory.slots,
        **options,
    )


def clock(device: torch.device) -> str:
    """What time is measured by. One thread of a CPU is measured by its own time, which other processes do not touch."""
    return "CPU time of the thread" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    now = time.perf_counter if clock(device) == "wall time" else time.thread_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


# ---------------------------------------------------------------------------------------------------------------- words


def kinds(rows: Sequence[Row]) -> list[Choice]:
    """The ways to choose that the rows are of."""
    return list(dict.fromkeys(_choice(row) for row in rows))


def _choice(row: Row) -> Choice:
    return Choice(cast(Blocks, row.blocks), row.block_size, row.query_group)


def enough(rows: Sequence[Row], choice: Choice, goal: Callable[[Row], bool]) -> Row:
    """A choice at the smallest budget that reaches a goal; all blocks reach every one."""
    return next(row for row in rows if _choice(row) == choice and goal(row))


def described(choice: Choice, frame_tokens: int) -> str:
    """A choice in words."""
    blocks, size, group = choice
    what = "frames" if size == frame_tokens else f"blocks of {size}"
    if blocks == "random":
        return f"{what}, at random"
    who = {1: "per query", None: "per chunk"}.get(group, f"per {group} queries")
    released = ", as released" if size == frame_tokens and group is None else ""
    return f"{what}, {who}{released}" + (", oracle" if blocks == "oracle" else "")


def table(rows: Sequence[Row], frame_tokens: int) -> str:
    """What every choice needs to reach each goal, and in brackets what the oracle would; fixed-width text."""
    found = kinds(rows)
    cells = [["selection", *(word for goal in GOALS for word in (f"{goal}: top_k", "of bank (oracle)", "time"))]]
    for choice in found:
        if choice.blocks == "oracle":
            continue
        line, oracle = [described(choice, frame_tokens)], choice._replace(blocks="oracle")
        for goal in GOALS.values():
            row = enough(rows, choice, goal)
            best = f" ({100 * enough(rows, oracle, goal).share:.0f})" if oracle in found else ""
            line += [
                str(row.top_k),
                f"{100 * row.share:.0f} %{best}",
                "-" if row.ratio is None else f"{row.ratio:.2f} x",
            ]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def cheapest(rows: Sequence[Row], goal: Callable[[Row], bool]) -> Row:
    """The setting that reaches a goal in the least time; where nothing was timed, with the fewest keys."""
    reached = [enough(rows, choice, goal) for choice in kinds(rows) if choice.blocks == "top"]
    return min(reached, key=lambda row: (row.ratio or 0.0, row.keys))


def results(measured: Profile, about: dict[str, Any], sampling: Sampling, *, interrupted: bool) -> str:
    """As JSON."""
    said = {
        **about,
        "sampling": asdict(sampling),
        "interrupted": interrupted,
        "bank_frames_with_sink": measured.frames,
        "frame_tokens": measured.frame_tokens,
        "chunks_measured": measured.chunks,
        "calls_measured": measured.calls,
        "queries_times_heads_measured": measured.queries,
        "bank_mass": _rounded(measured.bank_mass),
        "rows": [{name: _rounded(x) for name, x in asdict(row).items()} for row in measured.rows()],
    }
    return json.dumps(said, indent=1, allow_nan=False) + "\n"


def _rounded(x: Any) -> Any:
    """To six digits."""
    return float(f"{x:.6g}") if isinstance(x, float) else x
