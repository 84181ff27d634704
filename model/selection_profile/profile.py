"""How well, and how fast, does activation choose? A stream is watched, and its choices compared with dense attention.

Calls of attention (a layer in a pass) are drawn at random from chunks drawn at random. In each of them a few heads and
queries are compared with what they would see with the whole bank; `quality` has the measures. The stream itself goes on
as its settings say. What blocks would keep if the tokens of a frame lay in strips is measured on the same calls, and
the time that each setting of `memory_attention` takes on the same tensors.
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
from memflow_ops.model.selection_profile.timing import TimedSetting, time_choices
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.streaming.text import TextEncoder
from memflow_ops.model.wan.transformer import CausalVideoModel
from memflow_ops.token_order import TokenOrder, token_order


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
    """The choices to compare. Raises a ValueError for what cannot be measured in a stream of `chunks` chunks."""
    if settings.memory != "memflow":
        raise ValueError(f"only memory='memflow' selects blocks of a bank, got {settings.memory!r}")
    if settings.token_order != "raster":
        raise ValueError(f"a stream in raster order is profiled, and strips beside it, got {settings.token_order!r}")
    if settings.positions != "absolute":
        raise ValueError(f"the profile takes one query for window and bank, so no positions={settings.positions!r}")
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
    prompts_by_chunk: Sequence[Sequence[str]],
    settings: StreamSettings,
    *,
    block_sizes: Sequence[int],
    query_groups: Sequence[int | None],
    encode: TextEncoder,
    sampling: Sampling | None = None,
    report: Callable[[int, int], None] | None = None,
    interrupts: Interrupts | None = None,
) -> Iterator[SelectionProfile]:
    """Streams, and yields after every measured chunk the same profile, which has grown.

    prompts_by_chunk: for every chunk the prompt of every story. report: is called with the chunks done and the chunks
    to do. interrupts: where given, Ctrl-C ends the stream between the measurements of two chunks, so that none
    counts in part.
    """
    sampling = sampling or Sampling()
    tokens = model.tokens(settings.height, settings.width)
    compared = check_profile(settings, len(prompts_by_chunk), tokens, block_sizes, query_groups)
    draw = random.Random(sampling.seed)
    eligible = range(first_full_chunk(settings), len(prompts_by_chunk))
    measured_chunks = sorted(draw.sample(eligible, min(sampling.chunks, len(eligible))))
    order = token_order("strips", *model.grid(settings.height, settings.width), model.patch_embedding.weight.device)
    assert order is not None
    watcher = _Watcher(compared, sampling, draw, order)
    streamer = Streamer(
        model, len(prompts_by_chunk[0]), settings, sampling.seed, encode=encode, observe=watcher.observe
    )
    watcher.cache = streamer.cache
    frames = settings.sink_frames + settings.bank_frames
    in_strips = SelectionProfile(frames, tokens, compared)
    profile = SelectionProfile(frames, tokens, compared, strips=in_strips)
    layers = model.config.num_layers
    # The clean pass ends before the attention of its last layer.
    calls = [(step, layer) for step in range(settings.steps + 1) for layer in range(layers)][:-1]
    for index in range(measured_chunks[-1] + 1):
        wanted = draw.sample(calls, min(sampling.calls, len(calls))) if index in measured_chunks else []
        watcher.start(wanted, sampling.rounds if index == measured_chunks[0] else 0)
        with interrupts.allowed() if interrupts else nullcontext():
            streamer.next_chunk(prompts_by_chunk[index])
        if index == measured_chunks[0]:
            profile.seconds = in_strips.seconds = watcher.seconds  # which blocks are chosen changes no time
        if wanted:
            profile.add(index, watcher.found)
            in_strips.add(index, watcher.found_in_strips)
        if report is not None:
            report(index + 1, measured_chunks[-1] + 1)
        if wanted:
            yield profile


class _Watcher:
    """Measures the wanted calls of a chunk while the stream makes them."""

    cache: RingCache
    """the stream's cache, set before the first chunk"""

    def __init__(self, compared: list[Choice], sampling: Sampling, draw: random.Random, order: TokenOrder):
        """order: strips."""
        self.compared, self.sampling, self.draw, self.order = compared, sampling, draw, order
        self.generator = torch.Generator(device="cpu").manual_seed(sampling.seed)
        # Of their own, so that what is drawn in raster order does not depend on what is measured beside it.
        self.draw_in_strips = random.Random(sampling.seed)
        self.generator_in_strips = torch.Generator(device="cpu").manual_seed(sampling.seed)
        self.start([], 0)

    def start(self, wanted: Sequence[tuple[int, int]], rounds: int) -> None:
        """Begins a chunk. wanted: its calls to measure, as pass and layer. rounds: of timing, in the first of them."""
        self.wanted, self.rounds = set(wanted), rounds
        self.found: list[dict[Choice, ChoiceSums]] = []
        self.found_in_strips: list[dict[Choice, ChoiceSums]] = []
        self.seconds: dict[TimedSetting, list[float]] = {}
        self.step = -1

    def observe(self, layer: int, q: Tensor, memory: Memory) -> None:
        """Is called by the streamer in every call of attention that has a bank; q (B, Lq, H, D)."""
        self.step += layer == 0
        if (self.step, layer) not in self.wanted:
            return
        window = self.cache.window(layer)
        call = self._sampled(q, window, memory)
        self.found.append(measure_call(call, self.compared, self.generator))
        self.found_in_strips.append(measure_call(self._in_strips(call), self.compared, self.generator_in_strips))
        if self.rounds and not self.seconds:
            self.seconds = time_choices(q, window, memory, self.cache.layout.frame_tokens, self.compared, self.rounds)

    def _sampled(self, q: Tensor, window: tuple[Tensor, Tensor], memory: Memory) -> SampledCall:
        """A story, a few heads and a few queries, all drawn; the frames of the story's bank are copied together."""
        story = self.draw.randrange(len(q))
        count = q.shape[2]
        heads = sorted(self.draw.sample(range(count), min(self.sampling.heads, count)))
        kv_heads = torch.tensor(heads, device=q.device, dtype=torch.long) // (count // memory.keys.shape[2])
        slots = memory.slots[story, : int(memory.frames[story])].long()
        tokens = self.cache.layout.frame_tokens

        def of_bank(pool: Tensor) -> Tensor:
            return pool[story].unflatten(0, (-1, tokens))[slots][:, :, kv_heads].permute(2, 0, 1, 3).contiguous()

        k, v = (x[story][:, kv_heads].transpose(0, 1) for x in window)
        own, measured = q[story][:, heads].transpose(0, 1), self._drawn_queries(q.shape[1], self.draw).to(q.device)
        return SampledCall(own, measured, k, v, of_bank(memory.keys), of_bank(memory.values))

    def _in_strips(self, call: SampledCall) -> SampledCall:
        """The call as it would be with tokens in strips, and with queries drawn for it: other ones make a group."""
        measured = self._drawn_queries(call.q.shape[1], self.draw_in_strips).to(call.q.device)
        bank = (x[:, :, self.order.places] for x in (call.bank_k, call.bank_v))
        return SampledCall(self.order.apply(call.q), measured, call.k, call.v, *bank)

    def _drawn_queries(self, queries: int, draw: random.Random) -> Tensor:
        """Indices of queries in whole groups, so that all queries of a group judge what the group chooses."""
        unit = math.lcm(*(choice.query_group for choice in self.compared if choice.query_group is not None))
        if self.sampling.queries >= queries or unit >= queries:
            return torch.arange(queries, dtype=torch.long, device="cpu")
        units = -(-queries // unit)
        drawn = sorted(draw.sample(range(units), max(1, min(units, self.sampling.queries // unit))))
        return torch.cat(
            [torch.arange(i * unit, min((i + 1) * unit, queries), dtype=torch.long, device="cpu") for i in drawn]
        )
