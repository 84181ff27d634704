"""How well, and how fast, may activation choose? A stream is watched, and its choices compared with dense attention.

At chunks drawn at random, in calls of attention drawn at random (a layer in a pass), a few heads and queries are held
against what they would see with the whole bank; `selection_quality` has the measure. The stream itself goes on as its
settings say. The time that each setting of `memory_attention` takes is measured on the same tensors, all in turn.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.views import Memory
from memflow_ops.model.selection_profile.figures import Sampling, SelectionProfile
from memflow_ops.model.selection_profile.quality import (
    Choice,
    ChoiceSums,
    SampledCall,
    choices_to_compare,
    measure_call,
)
from memflow_ops.model.selection_profile.timing import time_choices
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.streaming.text import TextEncoder
from memflow_ops.model.wan.transformer import CausalVideoModel

"""For which the table says what they take; the last is what a recommendation goes by."""
"""Calls of which a round of timing takes the quickest."""


# ----------------------------------------------------------------------------------------------------------- the stream


def first_full_chunk(settings: StreamSettings) -> int:
    """The first chunk that finds the sink complete and as many remembered frames as the bank takes."""
    sink_chunks = -(-settings.sink_frames // settings.chunk_frames)
    return settings.window_frames // settings.chunk_frames + sink_chunks + max(settings.bank_frames, 0) - 1


def check_profile(
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
    if chunks <= first_full_chunk(settings):
        raise ValueError(
            f"a bank of {settings.bank_frames} frames is full in chunk {first_full_chunk(settings)}, but the story "
            f"ends after chunk {chunks - 1}: take a smaller bank (--bank-frames) or a longer story"
        )
    return choices_to_compare(block_sizes, query_groups, frame_tokens)


def profile_selection(
    model: CausalVideoModel,
    spoken: Sequence[Sequence[str]],
    settings: StreamSettings,
    *,
    block_sizes: Sequence[int],
    query_groups: Sequence[int | None],
    sampling: Sampling | None = None,
    seed: int = 0,
    encode: TextEncoder,
    report: Callable[[int, int], None] | None = None,
    interrupts: Interrupts | None = None,
) -> Iterator[SelectionProfile]:
    """Streams and yields, after every measured chunk, the same profile, which has grown.

    spoken: per chunk the prompt of every story. seed: of the stream's noise. report: called with the chunks done and
    those to do. interrupts: where given, Ctrl-C ends it between two chunks' measurements, so that none counts in part.
    """
    sampling = sampling or Sampling()
    tokens = model.tokens(settings.height, settings.width)
    compared = check_profile(settings, len(spoken), tokens, block_sizes, query_groups)
    draw = random.Random(sampling.seed)
    eligible = range(first_full_chunk(settings), len(spoken))
    chosen = sorted(draw.sample(eligible, min(sampling.chunks, len(eligible))))
    watcher = _Watcher(compared, sampling, draw)
    streamer = Streamer(model, len(spoken[0]), settings, seed, encode=encode, observe=watcher.observe)
    watcher.cache = streamer.cache
    result = SelectionProfile(settings.sink_frames + settings.bank_frames, tokens, compared)
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

    cache: RingCache

    def __init__(self, compared: list[Choice], sampling: Sampling, draw: random.Random):
        self.compared, self.sampling, self.draw = compared, sampling, draw
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.start([], 0)

    def start(self, wanted: Sequence[tuple[int, int]], rounds: int) -> None:
        self.wanted, self.rounds = set(wanted), rounds
        self.found: list[dict[Choice, ChoiceSums]] = []
        self.seconds: dict[tuple[int, int | None, int], list[float]] = {}
        self.step = -1

    def observe(self, layer: int, q: Tensor, memory: Memory) -> None:
        self.step += layer == 0
        if (self.step, layer) not in self.wanted:
            return
        window = self.cache.window(layer)
        self.found.append(measure_call(self._view(q, window, memory), self.compared, self.generator))
        if self.rounds and not self.seconds:
            self.seconds = time_choices(q, window, memory, self.cache.layout.frame_tokens, self.compared, self.rounds)

    def _view(self, q: Tensor, window: tuple[Tensor, Tensor], memory: Memory) -> SampledCall:
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
        return SampledCall(queries, rows, k, v, of_bank(memory.keys), of_bank(memory.values))

    def _rows(self, queries: int) -> Tensor:
        """Whole query groups, so that what a group chooses is judged by all of its queries."""
        run = math.lcm(*(choice.query_group for choice in self.compared if choice.query_group is not None))
        if self.sampling.queries >= queries or run >= queries:
            return torch.arange(queries)
        runs = -(-queries // run)
        chosen = sorted(self.draw.sample(range(runs), max(1, min(runs, self.sampling.queries // run))))
        return torch.cat([torch.arange(i * run, min((i + 1) * run, queries)) for i in chosen])
