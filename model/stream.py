"""The streaming loop: a video chunk by chunk, for any length, remembered through a `FrameCache`.

One chunk is made in this order:

1. retrieval: the coming prompt chooses the memory bank from the whole history (memory="memflow");
2. at a prompt switch, re-caching: clean passes over the local window's latents, oldest first, write their keys and
   values anew under the new text, so that the switch takes effect at once;
3. the sampler's passes, from noise to clean latents, each overwriting the chunk's place in the ring;
4. the clean pass (timestep 0), which leaves the keys and values that later chunks see, and then the commit.

How a chunk sees the past is the `memory` mode: "none" is the local window alone; "sink" adds the first frames and
"full" every remembered frame, both densely; "memflow" adds only the blocks of sink and bank that each query group
selects.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from memflow_ops import memory_attention, select_blocks
from memflow_ops.cache import FrameCache
from memflow_ops.cache_layout import CacheLayout
from memflow_ops.model import world
from memflow_ops.model.sampler import FlowMatchSampler
from memflow_ops.model.text import embed_prompts
from memflow_ops.model.transformer import CausalVideoModel, TextKeysValues, apply_rotation, rope_rotation
from memflow_ops.retrieval import Coverage, Policy, Random, Relevance, Retrieved

MemoryMode = Literal["none", "sink", "memflow", "full"]
RelevanceKind = Literal["linear", "softmax", "coverage", "random"]
SelectionKind = Literal["top", "random"]

TextEncoder = Callable[[Sequence[str]], Tensor]
"""B prompts -> embeddings (B, Lt, text_dim), rows past a text's true length all zero, as Wan's text encoder leaves
them."""


@dataclass(frozen=True)
class StreamSettings:
    """Everything that shapes a stream but the model, the prompts and the seed."""

    memory: MemoryMode = "memflow"
    """How a chunk sees the past beyond its local window."""
    height: int = world.FRAME_SIZE
    """Rows of a latent frame."""
    width: int = world.FRAME_SIZE
    """Columns of a latent frame."""
    chunk_frames: int = 3
    """Latent frames generated together."""
    window_frames: int = 6
    """The local window, always attended to in full, current chunk included; a multiple of chunk_frames."""
    sink_frames: int = 3
    """First frames of the video, kept for good; not with memory="none"."""
    bank_frames: int = 3
    """Frames retrieved for a chunk, at most; memflow only."""
    device_frames: int = 64
    """Prototypes that the device holds; memflow and full."""
    host_frames: int = 0
    """Further prototypes that may wait in host memory; beyond them the oldest is forgotten; memflow only."""
    top_k: int = 4
    """Blocks of sink and bank that each query group attends to; memflow only."""
    block_size: int = 16
    """Tokens of a block."""
    query_group: int | None = 16
    """Consecutive queries that share a selection; None: the whole chunk, as in the paper. Two rows of the toy's tokens
    bring a character back better than the whole chunk, although its training selects for the whole chunk."""
    relevance: RelevanceKind = "linear"
    """What retrieval goes by: a score of `frame_relevance`, word by word ("coverage"), or "random", a control."""
    selection: SelectionKind = "top"
    """Which blocks activation takes: those that score best, or as many "random" ones, a control."""
    redundancy: float | None = None
    """Retrieval passes over frames whose mean key has a larger cosine with one already taken; None: it does not. The
    toy world's frames of one character are so alike that any threshold leaves one of them and fills up with others."""
    recache: bool = True
    """Re-cache the local window at a prompt switch."""
    steps: int = 8
    """Passes per chunk, the clean pass not counted."""
    shift: float = 7.0
    """The sampler's timestep shift; above 1 it spends more steps at high noise."""
    stochastic: bool = False
    """Renew the noise in every step (few-step distilled models) instead of following the velocity."""
    impl: str = "auto"
    """Implementation of the attention op: auto, reference, torch or triton."""

    def __post_init__(self) -> None:
        choices = (("memory", MemoryMode), ("relevance", RelevanceKind), ("selection", SelectionKind))
        for name, kinds in ((name, get_args(kind)) for name, kind in choices):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {getattr(self, name)!r}")
        for name in ("height", "width", "top_k", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.query_group is not None and self.query_group < 1:
            raise ValueError(f"query_group must be positive or None (the whole chunk), got {self.query_group}")
        if self.redundancy is not None and not -1 <= self.redundancy <= 1:
            raise ValueError(f"redundancy is a cosine, -1 to 1, or None, got {self.redundancy}")
        FlowMatchSampler(self.steps, self.shift)  # refuses what it cannot do
        # Sizes of the cache are refused by its layout, here rather than when the stream starts.
        CacheLayout(1, 1, 1, 1, 1, *self._cache_sizes(), block_size=self.block_size)

    def _cache_sizes(self) -> tuple[int, int, int, int, int, int]:
        """chunk, window, sink, bank, device and host frames in this mode: what a mode does not use is not kept."""
        has_sink, has_bank, has_history = (
            self.memory in modes for modes in (("sink", "memflow", "full"), ("memflow",), ("memflow", "full"))
        )
        return (
            self.chunk_frames,
            self.window_frames,
            self.sink_frames * has_sink,
            self.bank_frames * has_bank,
            self.device_frames * has_history,
            self.host_frames * has_bank,
        )

    def cache_layout(self, model: CausalVideoModel, batch: int) -> CacheLayout:
        """What a stream of `batch` stories will allocate; `CacheLayout` states it in bytes."""
        config = model.config
        return CacheLayout(
            config.num_layers,
            batch,
            model.tokens(self.height, self.width),
            config.num_heads,
            config.head_dim,
            *self._cache_sizes(),
            block_size=self.block_size,
            dtype=model.patch_embedding.weight.dtype,
        )


TOY_SETTINGS = StreamSettings(recache=False, relevance="coverage", top_k=8, steps=16, stochastic=True)
"""What the toy weights are streamed with. They cannot tell a window that was re-cached under a new character's prompt
from one that shows it: with re-caching, every new character takes the colour of the one before."""


@dataclass(frozen=True)
class Chunk:
    """A finished chunk of B stories, and how it remembered."""

    index: int
    """0, 1, 2, ..."""
    first_frame: int
    """Absolute index of its first latent frame."""
    prompts: list[str]
    """Per story."""
    frames: Tensor
    """Clean latents (B, C, chunk_frames, H, W) float32, on the model's device."""
    retrieved: list[list[int]]
    """Per story the retrieved frames, the policy's favourite first."""
    relevance: list[list[float]]
    """Per story the score of each retrieved frame."""
    candidates: list[list[int]]
    """Per story the frames of the bank that activation chose from, sink included, ascending."""
    activation: list[list[float]]
    """Per story the share of each candidate frame in all blocks selected in the clean pass (layers, heads, query
    groups); sums to 1. Empty where there is no candidate."""
    seconds: float
    """Wall time of the chunk."""


def stream(
    model: CausalVideoModel,
    prompts: Iterable[Sequence[str]],
    settings: StreamSettings | None = None,
    seed: int | Sequence[int] = 0,
    *,
    encode: TextEncoder = embed_prompts,
) -> Iterator[Chunk]:
    """Generates chunk after chunk, one per item of `prompts`, and yields each as soon as it is finished.

    prompts: per chunk the prompt of every story, as `chunk_prompts` lays them out; may be a generator without end.
    seed: story b uses seed + b, or its own of a sequence. The noise of a chunk depends on its story's seed and the
        chunk's index alone, so that runs with different memory start from the same noise.
    encode: turns prompts into text embeddings.

    Bad prompts and settings that cannot work for this model raise a ValueError or TypeError before the chunk starts.
    """
    settings = settings or StreamSettings()
    if isinstance(prompts, str):
        raise TypeError("prompts must be one sequence of prompts per chunk, got a single string")
    if settings.memory == "full" and isinstance(prompts, Sequence):
        _check_full_history(settings, len(prompts))
    return _generate(model, prompts, settings, seed, encode)


@torch.no_grad()
def _generate(
    model: CausalVideoModel,
    prompts: Iterable[Sequence[str]],
    settings: StreamSettings,
    seed: int | Sequence[int],
    encode: TextEncoder,
) -> Iterator[Chunk]:
    streamer: Streamer | None = None
    for item in prompts:
        streamer = streamer or Streamer(model, len(_checked_prompts(item)), settings, seed, encode=encode)
        yield streamer.next_chunk(item)


def chunk_prompts(
    stories: Sequence[Sequence[str]], frames_per_prompt: int, chunk_frames: int = 3
) -> list[tuple[str, ...]]:
    """Stories, each a list of prompts of `frames_per_prompt` latent frames, -> the prompts of every chunk.

    A switch inside a chunk waits for the next one. All stories must have the same number of prompts.
    """
    if frames_per_prompt < 1:
        raise ValueError(f"frames_per_prompt must be positive, got {frames_per_prompt}")
    lengths = sorted({len(story) for story in stories})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(f"stories that run together must have the same number of prompts, at least 1, got {lengths}")
    chunks = -(-lengths[0] * frames_per_prompt // chunk_frames)
    spoken = [min(chunk * chunk_frames // frames_per_prompt, lengths[0] - 1) for chunk in range(chunks)]
    return [tuple(story[i] for story in stories) for i in spoken]


class Streamer:
    """The state of one stream of B stories: cache, text, and the local window's latents.

    `next_chunk` makes a chunk under any prompts, known beforehand or typed a moment ago; `stream` calls it in a loop.
    """

    def __init__(
        self,
        model: CausalVideoModel,
        batch: int,
        settings: StreamSettings,
        seed: int | Sequence[int] = 0,
        *,
        encode: TextEncoder = embed_prompts,
        policy: Policy | None = None,
    ):
        """policy: chooses the bank instead of the one that `settings` names."""
        self.model, self.settings, self.encode = model, settings, encode
        self.seeds = [seed + story for story in range(batch)] if isinstance(seed, int) else list(seed)
        if len(self.seeds) != batch or min(self.seeds, default=0) < 0:
            raise ValueError(f"seed must be a number >= 0 or {batch} of them, one per story, got {seed}")
        config = model.config
        self.device = model.patch_embedding.weight.device
        self.cache = FrameCache(settings.cache_layout(model, batch), self.device)
        self.sampler = FlowMatchSampler(settings.steps, settings.shift, settings.stochastic, config.prediction)
        self.policy: Policy | None = None
        if self.cache.layout.bank_frames:
            if policy is not None:
                self.policy = policy
            elif settings.relevance == "coverage":
                self.policy = Coverage(settings.bank_frames)
            elif settings.relevance == "random":
                self.policy = Random(settings.bank_frames, self.seeds)
            else:
                self.policy = Relevance(settings.bank_frames, settings.relevance, settings.redundancy)

        self.grid = model.grid(settings.height, settings.width)
        self.condition: Tensor | None = None
        if config.in_dim == config.out_dim + 2:
            shape = (settings.chunk_frames, settings.height, settings.width)
            self.condition = world.coordinates(*shape).to(self.device)
        elif config.in_dim != config.out_dim:
            raise ValueError(
                f"a stream can give the model pixel coordinates (2 channels) as condition, or none; this model "
                f"expects {config.in_dim - config.out_dim} channels"
            )
        self._chance = torch.Generator().manual_seed(self.seeds[0])
        self._chunks = 0
        self._prompts: list[str] | None = None
        self._text: TextKeysValues = []
        self._text_lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        window_past = settings.window_frames // settings.chunk_frames - 1
        self._past: deque[Tensor] = deque(maxlen=window_past)  # clean latents of the window, oldest first

    @torch.no_grad()
    def next_chunk(self, prompts: Sequence[str]) -> Chunk:
        """Makes the next chunk. A prompt that cannot be encoded raises before anything has changed."""
        started = self._clock()
        prompts = _checked_prompts(prompts)
        if len(prompts) != len(self.seeds):
            raise ValueError(f"a chunk takes {len(self.seeds)} prompts, one per story, got {len(prompts)}")
        switched = self._set_text(prompts)
        retrieved = self._retrieve()
        if self.settings.recache and self._past and any(switched):
            self._recache(switched)
        first_frame = self.cache.begin_chunk()
        x, generators = self._noise()
        rotation = self._rotation(first_frame)
        for i, sigma in enumerate(self.sampler.sigmas[:-1]):
            y = self._pass(x, 1000 * sigma, rotation)
            x = self._step(x, self.sampler.denoised(x, y.float(), sigma), i, generators)
        # A dense mode activates nothing: its sink is always attended to in full.
        candidates = self.cache.bank() if self.settings.memory == "memflow" else [[] for _ in prompts]
        selected = torch.zeros(len(prompts), max(map(len, candidates)), dtype=torch.long, device=self.device)
        self._pass(x, 0.0, rotation, remember=True, selected=selected)
        self.cache.commit()
        self._past.append(x)
        self._chunks += 1
        # The one read of this chunk besides retrieval's: the report.
        shares = (selected / selected.sum(1, keepdim=True).clamp(min=1)).tolist()
        activation = [of[: len(frames)] for of, frames in zip(shares, candidates, strict=True)]
        return Chunk(
            self._chunks - 1,
            first_frame,
            prompts,
            x,
            retrieved.frames,
            retrieved.scores,
            candidates,
            activation,
            self._clock() - started,
        )

    # ----------------------------------------------------------------------------------------------- before the passes

    def _set_text(self, prompts: list[str]) -> list[bool]:
        """Encodes the prompts if any has changed; says for each story whether it has."""
        previous = self._prompts
        if previous == prompts:
            return [False] * len(prompts)
        embeddings = self.encode(prompts).to(self.device)
        self._text = self.model.encode_text(embeddings)
        positions = torch.arange(1, embeddings.shape[1] + 1, device=self.device, dtype=torch.int32)
        self._text_lengths = ((embeddings != 0).any(-1) * positions).amax(1).to(torch.int32)
        self._prompts = prompts
        return [previous is None or old != new for old, new in zip(previous or prompts, prompts, strict=True)]

    def _retrieve(self) -> Retrieved:
        """Chooses the coming chunk's bank with the coming prompts."""
        nothing: list[list[int]] = [[] for _ in self.seeds]
        if self.policy is None or not self.cache.candidate_frames()[0]:
            return Retrieved(nothing, [[] for _ in self.seeds])
        text_keys = [keys for keys, _ in self._text]
        retrieved = self.policy.choose(self.cache.candidates(), text_keys, self._text_lengths)
        self.cache.set_bank(retrieved.frames)
        return retrieved

    def _recache(self, switched: list[bool]) -> None:
        """Passes the window's past chunks again under the new text; see `FrameCache.restart_window`."""
        self.cache.restart_window(switched)
        for x in self._past:
            first_frame = self.cache.begin_chunk()
            self._pass(x, 0.0, self._rotation(first_frame))
            self.cache.commit()

    def _noise(self) -> tuple[Tensor, list[torch.Generator]]:
        """The chunk's noise (B, C, F, H, W), and the generators that drew it, which go on to the sampler's steps."""
        settings = self.settings
        shape = (self.model.config.out_dim, settings.chunk_frames, settings.height, settings.width)
        generators = []
        for seed in self.seeds:
            mixed = np.random.SeedSequence([seed, self._chunks]).generate_state(1, np.uint64)
            generators.append(torch.Generator().manual_seed(int(mixed[0])))
        # On the CPU, so that a seed means the same video on every device.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(self.device), generators

    def _rotation(self, first_frame: int) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines of a chunk, the same for every layer and pass."""
        frames = torch.arange(first_frame, first_frame + self.settings.chunk_frames, device=self.device)
        rows, columns = (torch.arange(n, device=self.device) for n in self.grid)
        return rope_rotation(self.model.config.head_dim, frames, rows, columns)

    # ------------------------------------------------------------------------------------------------------ the passes

    def _pass(
        self,
        x: Tensor,
        timestep: float,
        rotation: tuple[Tensor, Tensor],
        *,
        remember: bool = False,
        selected: Tensor | None = None,
    ) -> Tensor:
        """One pass over the open chunk, which writes its keys and values into the ring; x and result (B, C, F, H, W).

        remember: the clean pass of a new chunk, which takes the means for retrieval.
        selected: (B, bank frames) counts of selected blocks, to add to.
        """
        cache, settings = self.cache, self.settings
        has_bank = settings.memory == "memflow" and any(cache.bank())
        attention = cast(Callable[..., Tensor], memory_attention)  # without return_lse it returns out alone

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = apply_rotation(q, *rotation)
            cache.write(layer, apply_rotation(k, *rotation), v)
            if remember:
                cache.remember(layer, k)
            if not has_bank:
                # "memflow" without a candidate yet: the window alone, like "none".
                keys, values = cache.window(layer) if settings.memory == "memflow" else cache.dense(layer)
                return attention(q, keys, values, impl=settings.impl)
            keys, values = cache.window(layer)
            memory = cache.memory(layer)
            descriptors = memory.descriptors
            if settings.selection == "random":  # of descriptors without meaning every subset is as likely as any other
                descriptors = torch.randn(descriptors.shape, generator=self._chance).to(descriptors)
            if selected is not None:
                blocks = cache.layout.blocks_per_frame
                chosen = select_blocks(
                    q,
                    descriptors,
                    settings.top_k,
                    query_group=settings.query_group,
                    memory_frames=memory.frames,
                    memory_slots=memory.slots,
                    blocks_per_frame=blocks,
                    impl=settings.impl,
                )
                _count_frames(chosen, blocks, selected)
            return attention(
                q,
                keys,
                values,
                memory.keys,
                memory.values,
                memory_descriptors=descriptors,
                top_k=settings.top_k,
                block_size=settings.block_size,
                frame_tokens=cache.layout.frame_tokens,
                query_group=settings.query_group,
                memory_frames=memory.frames,
                memory_slots=memory.slots,
                impl=settings.impl,
            )

        timesteps = torch.full(x.shape[:1] + x.shape[2:3], timestep, device=self.device)
        return self.model(x, timesteps, self._text, attend, self.condition)

    def _step(self, x: Tensor, x0: Tensor, i: int, generators: list[torch.Generator]) -> Tensor:
        """The sampler's step, story by story where it draws noise, so that each has its own."""
        if not self.settings.stochastic:
            return self.sampler.step(x, x0, i)
        stories = zip(x.split(1), x0.split(1), generators, strict=True)
        return torch.cat([self.sampler.step(noisy, clean, i, generator) for noisy, clean, generator in stories])

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"a chunk takes a sequence of prompts, one per story, got {prompts!r}")
    return list(prompts)


def _count_frames(chosen: Tensor, blocks_per_frame: int, counts: Tensor) -> None:
    """Adds to counts (B, F) how many of the chosen blocks (B, H, G, K), -1 unused, lie in each bank frame."""
    frames = chosen.flatten(1).long() // blocks_per_frame
    counts.scatter_add_(1, frames.clamp(min=0), (frames >= 0).long())


def _check_full_history(settings: StreamSettings, chunks: int) -> None:
    """memory="full" attends to the history where it lies, on the device; better to say so before the first chunk."""
    prototypes = sum(chunk * settings.chunk_frames >= settings.sink_frames for chunk in range(chunks))
    if prototypes > settings.device_frames:
        raise ValueError(
            f"memory='full' keeps one frame of each chunk on the device: {chunks} chunks need "
            f"device_frames >= {prototypes}, got {settings.device_frames}"
        )
