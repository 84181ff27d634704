"""The streaming loop: a video chunk by chunk, for any length, remembered through a `FrameCache`.

One chunk is made in this order:

1. retrieval: the coming prompt chooses the memory bank from the whole history (memory="memflow");
2. at a prompt switch, re-caching: clean passes over the local window's latents, oldest first, write their keys and
   values anew under the new text, so that the switch takes effect at once;
3. the sampler's passes, from noise to clean latents, each overwriting the chunk's place in the ring;
4. the clean pass (timestep 0), which leaves the keys and values that later chunks see, and then the commit.

How a chunk sees the past is the `memory` mode: "none" is the local window alone; "sink" adds the first frames and
"full" every remembered frame, both densely; "memflow" adds only the blocks of sink and bank that each query group
selects. "released" is what the authors' MemFlow checkpoints were tuned with, `ReleasedCache`: its bank takes in the
last chunk's first frame at step 1, by the prompt of that chunk. (The recorded outputs of their model show no
re-caching at a switch: to follow them there, set `recache=False`.)

A chunk that is interrupted has not been: the next call makes it from the start. `state_dict` and `load_state_dict`
stop a stream between two chunks and go on with it elsewhere, to the same frames bit for bit.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memflow_ops.cache.attend import Attend, BlockSelection, Observer, attend_to_memory
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.policies import Coverage, Policy, Random, Relevance, Retrieved
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import ReleasedLayout
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.views import Memory
from memflow_ops.model.streaming.activation import Activation
from memflow_ops.model.streaming.conditions import pixel_coordinates
from memflow_ops.model.streaming.cuda_graphs import CudaGraphs, OnePass, Passes, why_not
from memflow_ops.model.streaming.sampler import FlowMatchSampler
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.transformer import CausalVideoModel, TextKeysValues, TimeEmbedding
from memflow_ops.rotary import rope_rotation

STATE_FORMAT = "memflow-ops stream 1"

TextEncoder = Callable[[Sequence[str]], Tensor]
"""B prompts -> embeddings (B, Lt, text_dim), rows past a text's true length all zero, as Wan's text encoder leaves
them."""


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
    """Per story the retrieved frames, the policy's favourite first. Released: those of any layer's bank, first what
    most layers hold."""
    relevance: list[list[float]]
    """Per story the score of each retrieved frame. Released: the share of layers that hold it."""
    candidates: list[list[int]]
    """Per story the frames of the bank that activation chose from, sink included, ascending."""
    activation: list[list[float]]
    """Per story the share of each candidate frame in all blocks selected in the clean pass (layers, heads, query
    groups); sums to 1. Empty where there is no candidate."""
    seconds: float
    """Wall time of the chunk."""
    replayed: int = 0
    """How many of its passes, re-caching included, were replays of a CUDA graph."""


def stream(
    model: CausalVideoModel,
    prompts: Iterable[Sequence[str]],
    settings: StreamSettings,
    seed: int | Sequence[int] = 0,
    *,
    encode: TextEncoder,
    cuda_graphs: bool | None = None,
) -> Iterator[Chunk]:
    """Generates chunk after chunk, one per item of `prompts`, and yields each as soon as it is finished.

    prompts: per chunk the prompt of every story, as `chunk_prompts` lays them out; may be a generator without end.
    seed: story b uses seed + b, or its own of a sequence. The noise of a chunk depends on its story's seed and the
        chunk's index alone, so that runs with different memory start from the same noise.
    encode: turns prompts into text embeddings.
    cuda_graphs: as for `Streamer`.

    Bad prompts and settings that cannot work for this model raise a ValueError or TypeError before the chunk starts.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be one sequence of prompts per chunk, got a single string")
    if settings.memory == "full" and isinstance(prompts, Sequence):
        _check_full_history(settings, len(prompts))
    return _generate(model, prompts, settings, seed, encode, cuda_graphs)


@torch.no_grad()
def _generate(
    model: CausalVideoModel,
    prompts: Iterable[Sequence[str]],
    settings: StreamSettings,
    seed: int | Sequence[int],
    encode: TextEncoder,
    cuda_graphs: bool | None,
) -> Iterator[Chunk]:
    streamer: Streamer | None = None
    for item in prompts:
        batch = len(_checked_prompts(item))
        streamer = streamer or Streamer(model, batch, settings, seed, encode=encode, cuda_graphs=cuda_graphs)
        yield streamer.next_chunk(item)


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
        encode: TextEncoder,
        policy: Policy | None = None,
        report: bool = True,
        cuda_graphs: bool | None = None,
        observe: Observer | None = None,
    ):
        """policy: chooses the bank instead of the one that `settings` names.
        report: whether `Chunk` tells what was retrieved and activated and how long the chunk took, for which the host
            waits for the device at its end; without, these are empty and `seconds` is the time to queue the work.
        cuda_graphs: whether passes that come again are recorded and replayed (None: where that can be). Changes no
            result. A ValueError where it is asked for and cannot be.
        observe: is shown what every layer of every pass over a chunk, re-caching aside, chooses from.
        """
        self.report, self.observe = report, observe
        self.model, self.settings, self.encode = model, settings, encode
        self.seeds = [seed + story for story in range(batch)] if isinstance(seed, int) else list(seed)
        if len(self.seeds) != batch or min(self.seeds, default=0) < 0:
            raise ValueError(f"seed must be a number >= 0 or {batch} of them, one per story, got {seed}")
        config = model.config
        self.device = model.patch_embedding.weight.device
        layout = settings.cache_layout(model, batch)
        self.cache: RingCache = (
            ReleasedCache(layout, self.device)
            if isinstance(layout, ReleasedLayout)
            else FrameCache(layout, self.device)
        )
        reason = "they are off" if cuda_graphs is False else why_not(self.device, settings)
        if observe is not None:
            reason = reason or "every pass is observed"
        if cuda_graphs and reason:
            raise ValueError(f"no CUDA graphs for this stream: {reason}")
        recorder = None if reason else CudaGraphs(self.device)
        self.passes = Passes(self.cache, recorder, insist=bool(cuda_graphs))
        self.sampler = FlowMatchSampler(settings.steps, settings.shift, settings.stochastic, config.prediction)
        self.policy: Policy | None = None
        if settings.memory == "memflow" and layout.bank_frames:
            if policy is not None:
                self.policy = policy
            elif settings.relevance == "coverage":
                self.policy = Coverage(settings.bank_frames, settings.impl)
            elif settings.relevance == "random":
                self.policy = Random(settings.bank_frames, self.seeds)
            else:
                self.policy = Relevance(settings.bank_frames, settings.relevance, settings.redundancy, settings.impl)

        self.grid = model.grid(settings.height, settings.width)
        self.condition: Tensor | None = None
        if config.in_dim == config.out_dim + 2:
            shape = (settings.chunk_frames, settings.height, settings.width)
            self.condition = pixel_coordinates(*shape).to(self.device)
        elif config.in_dim != config.out_dim:
            raise ValueError(
                f"a stream can give the model pixel coordinates (2 channels) as condition, or none; this model "
                f"expects {config.in_dim - config.out_dim} channels"
            )
        # None where a story's text is not, or no longer, what the prompt says.
        self._prompts: list[str | None] = [None] * batch
        self._window_prompts: list[str | None] = [None] * batch
        """Under which the local window's keys were written."""
        self._embeddings: list[Tensor] = [torch.empty(0)] * batch
        text_shape = (batch, config.text_len, config.num_heads, config.head_dim)
        self._text: TextKeysValues = [
            tuple(torch.zeros(text_shape, dtype=layout.dtype, device=self.device) for _ in range(2))  # type: ignore[misc]
            for _ in range(config.num_layers)
        ]
        self._text_lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._chance = torch.Generator()  # of the current chunk, where blocks are drawn at random
        self._times: dict[float, TimeEmbedding] = {}
        self._activation = self._counted()
        # What else a pass reads, always from the same place, see model/graphs.py.
        latents = (batch, config.out_dim, settings.chunk_frames, settings.height, settings.width)
        tokens = (1, settings.chunk_frames * layout.frame_tokens, 1, config.head_dim // 2)
        self._x = torch.zeros(latents, device=self.device)
        self._rotation = torch.zeros(tokens, device=self.device), torch.zeros(tokens, device=self.device)
        self._now = TimeEmbedding(*map(torch.zeros_like, self._time(0.0)))
        self._past: dict[int, Tensor] = {}  # by chunk, the clean latents of those in the window

    @torch.no_grad()
    def next_chunk(self, prompts: Sequence[str]) -> Chunk:
        """Makes the next chunk. A prompt that cannot be encoded raises before anything has changed. After an
        interruption the next call makes the same chunk, from the same noise."""
        started, replayed = self._clock(), self.passes.replayed
        prompts = _checked_prompts(prompts)
        if len(prompts) != len(self.seeds):
            raise ValueError(f"a chunk takes {len(self.seeds)} prompts, one per story, got {len(prompts)}")
        embeddings = self._embedded(prompts)
        self.cache.abort()  # what an interruption may have left
        self.passes.new_chunk()
        index = self.cache.committed
        self.cache.update_bank([keys for keys, _ in self._text])
        self._set_text(prompts, embeddings)
        choice = self.cache.choose_bank(self.policy, [keys for keys, _ in self._text], self._text_lengths)
        if self.settings.recache and self._past and self._window_prompts != prompts:
            self._recache(prompts)
        self._chance = self._generator(self.seeds[0], 1)
        first_frame = self._begin_chunk()
        x, *noises = self._noise()
        for i, sigma in enumerate(self.sampler.sigmas[:-1]):
            y = self._denoise(x, 1000 * sigma)
            fresh = noises[i] if i < len(noises) else None
            x = self.sampler.step(x, self.sampler.denoised(x, y.float(), sigma), i, fresh)
        self._write_keys(x, remember=True)
        # All reads of this chunk, unless retrieval had to know which frames to move. It is here that the host waits,
        # and may be interrupted, so it comes before the commit: a chunk that is not returned has not been.
        nothing: tuple[list[list[int]], list[list[float]]] = [[] for _ in prompts], [[] for _ in prompts]
        candidates, shares = self._activation.read() if self._activation else nothing
        retrieved = choice.read() if self.report else Retrieved(*nothing)
        self._past[index] = x
        self._window_prompts = list(prompts)
        self.cache.commit()
        for chunk in [c for c in self._past if c <= index + 1 - self.cache.layout.window_chunks]:
            del self._past[chunk]
        replayed, seconds = self.passes.replayed - replayed, self._clock() - started
        return Chunk(index, first_frame, prompts, x, *retrieved, candidates, shares, seconds, replayed)

    # ----------------------------------------------------------------------------------------------- before the passes

    def _embedded(self, prompts: list[str]) -> dict[int, Tensor]:
        """Embeddings (Lt, text_dim) of the stories whose prompt has changed."""
        changed = [story for story, prompt in enumerate(prompts) if self._prompts[story] != prompt]
        if not changed:
            return {}
        embeddings = self.encode([prompts[story] for story in changed])
        self.model.check_text(embeddings)
        if len(embeddings) != len(changed):
            raise ValueError(f"encode must give one embedding per prompt, got {len(embeddings)} for {len(changed)}")
        return dict(zip(changed, embeddings.to(self.device), strict=True))

    def _set_text(self, prompts: list[str], embeddings: Mapping[int, Tensor]) -> None:
        """Text keys and values, once per prompt. Story by story, so that each is as if alone; in place."""
        for story, embedding in embeddings.items():
            self._prompts[story] = None
            for kept, new in zip(self._text, self.model.encode_text(embedding[None]), strict=True):
                for target, source in zip(kept, new, strict=True):
                    target[story] = source[0]
            positions = torch.arange(1, len(embedding) + 1, device=self.device, dtype=torch.int32)
            self._text_lengths[story] = ((embedding != 0).any(-1) * positions).amax()
            self._embeddings[story] = embedding
            self._prompts[story] = prompts[story]

    def _recache(self, prompts: list[str]) -> None:
        """Passes the window's past chunks again under the new text; see `FrameCache.restart_window`."""
        switched = [old != new for old, new in zip(self._window_prompts, prompts, strict=True)]
        # Until it is done, an interruption leaves windows that are of neither prompt.
        self._window_prompts = [None] * len(prompts)
        first_frames = self.cache.restart_window(switched)
        self._window_prompts = [None if new else prompt for new, prompt in zip(switched, prompts, strict=True)]
        self._chance = self._generator(self.seeds[0], 2)
        for first_frame in first_frames:
            self._begin_chunk()
            self._write_keys(self._past[first_frame // self.settings.chunk_frames])
            self.cache.commit()
        self._window_prompts = list(prompts)

    def _noise(self) -> Tensor:
        """The chunk's noise and that of the stochastic steps after the first: (1 or steps, B, C, F, H, W)."""
        settings = self.settings
        count = settings.steps if settings.stochastic else 1
        shape = (count, self.model.config.out_dim, settings.chunk_frames, settings.height, settings.width)
        # On the CPU, so that a seed means the same video on every device.
        noise = torch.empty(len(self.seeds), *shape, pin_memory=self.device.type == "cuda")
        for story, seed in enumerate(self.seeds):
            generator = self._generator(seed)
            for step in range(count):
                torch.randn(shape[1:], generator=generator, out=noise[story, step])
        return noise.to(self.device, non_blocking=True).transpose(0, 1)

    def _generator(self, seed: int, *use: int) -> torch.Generator:
        """Random numbers of the coming chunk, which depend on nothing before it."""
        mixed = np.random.SeedSequence([seed, self.cache.committed, *use]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(mixed[0]))

    # ------------------------------------------------------------------------------------------------------ the passes

    def _begin_chunk(self) -> int:
        """Opens a chunk in the cache and turns RoPE to its frames; returns the first of them."""
        first_frame = self.cache.begin_chunk()
        frames = torch.arange(first_frame, first_frame + self.settings.chunk_frames, device=self.device)
        rows, columns = (torch.arange(n, device=self.device) for n in self.grid)
        angles = rope_rotation(self.model.config.head_dim, frames, rows, columns)
        for kept, new in zip(self._rotation, angles, strict=True):
            kept.copy_(new)
        return first_frame

    def _denoise(self, x: Tensor, timestep: float) -> Tensor:
        """A noisy pass over x (B, C, F, H, W) -> the model's output, like x."""
        self._set_inputs(x, timestep)
        attend = self._attend()
        y = self._run("noisy", lambda: self.model(self._x, self._now, self._text, attend, self.condition))
        assert y is not None
        return y

    def _write_keys(self, x: Tensor, remember: bool = False) -> None:
        """The clean pass over x (B, C, F, H, W), as far as there are keys to write; remember: that of a new chunk."""
        self._set_inputs(x, 0.0)
        if self._activation and remember:
            self._activation.start()
        attend = self._attend(keys_only=True, remember=remember)

        def one_pass() -> None:
            self.model.forward_keys(self._x, self._now, self._text, attend, self.condition)

        self._run("clean", one_pass)

    def _run(self, kind: str, one_pass: OnePass) -> Tensor | None:
        return self.passes.run((kind, *self.cache.pass_shape(self._selection() is not None)), one_pass)

    def _set_inputs(self, x: Tensor, timestep: float) -> None:
        self._x.copy_(x)
        for kept, new in zip(self._now, self._time(timestep), strict=True):
            kept.copy_(new)

    def _attend(self, keys_only: bool = False, remember: bool = False) -> Attend:
        """How the open chunk sees the past."""
        counted = self._activation.observe if self._activation and remember else None
        observe = _in_turn(counted, self.observe if remember or not keys_only else None)
        return attend_to_memory(
            self.cache,
            self._rotation,
            self._selection(),
            remember=remember,
            keys_only=keys_only,
            observe=observe,
            impl=self.settings.impl,
        )

    def _selection(self) -> BlockSelection | None:
        """The blocks that a pass attends to beside the window; None where it attends to all that is kept."""
        settings = self.settings
        if settings.memory == "memflow":
            chance = self._chance if settings.selection == "random" else None
            return BlockSelection(settings.top_k, settings.query_group, chance)
        if settings.memory == "released" and settings.top_frames:
            return BlockSelection(settings.top_frames, query_group=None)
        return None

    def _counted(self) -> Activation | None:
        """Counts what is selected, where something is selected and the user asks for a report."""
        selection = self._selection()
        return Activation(self.cache, selection, self.settings.impl) if self.report and selection else None

    @torch.no_grad()
    def _time(self, timestep: float) -> TimeEmbedding:
        """Once per timestep, for all stories, frames and chunks."""
        if timestep not in self._times:
            self._times[timestep] = self.model.encode_time(torch.full((1, 1), timestep, device=self.device))
        return self._times[timestep]

    # ------------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after its last finished chunk, in host memory, as `torch.save` takes it and
        `torch.load(weights_only=True)` gives it back. It holds no weights."""
        self.cache.abort()
        return {
            "format": STATE_FORMAT,
            "settings": asdict(self.settings),
            "model": asdict(self.model.config),
            "seeds": list(self.seeds),
            "prompts": list(self._prompts),
            "window_prompts": list(self._window_prompts),
            "embeddings": [embedding.cpu() for embedding in self._embeddings],
            "past": {chunk: x.cpu() for chunk, x in self._past.items()},
            "cache": self.cache.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with a saved stream: the same frames, bit for bit on the same machine, as if it had not stopped. The
        model must have the same weights. A ValueError, before anything is changed, when the state is of another stream.
        """
        if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
            found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"this is no state of a stream: expected the format {STATE_FORMAT!r}, got {found!r}")
        own = {"settings": asdict(self.settings), "model": asdict(self.model.config)}
        for kind, values in own.items():
            other = [f"{k}={state[kind].get(k)!r}, here {v!r}" for k, v in values.items() if state[kind].get(k) != v]
            if other:
                raise ValueError(f"the state is that of a stream with other {kind}: {'; '.join(other)}")
        if state["seeds"] != self.seeds:
            raise ValueError(f"the state is that of stories with the seeds {state['seeds']}, here {self.seeds}")
        self.cache.load_state_dict(state["cache"])
        self._past = {chunk: x.to(self.device) for chunk, x in state["past"].items()}
        known = {
            story: e.to(self.device)
            for story, e in enumerate(state["embeddings"])
            if state["prompts"][story] is not None
        }
        self._set_text(state["prompts"], known)
        self._window_prompts = list(state["window_prompts"])

    def _clock(self) -> float:
        if self.report and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _in_turn(first: Observer | None, second: Observer | None) -> Observer | None:
    if first is None or second is None:
        return first or second

    def observe(layer: int, q: Tensor, memory: Memory) -> None:
        first(layer, q, memory)
        second(layer, q, memory)

    return observe


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"a chunk takes a sequence of prompts, one per story, got {prompts!r}")
    return list(prompts)


def _check_full_history(settings: StreamSettings, chunks: int) -> None:
    """memory="full" attends to the history where it lies, on the device; better to say so before the first chunk."""
    prototypes = sum(chunk * settings.chunk_frames >= settings.sink_frames for chunk in range(chunks))
    if prototypes > settings.device_frames:
        raise ValueError(
            f"memory='full' keeps one frame of each chunk on the device: {chunks} chunks need "
            f"device_frames >= {prototypes}, got {settings.device_frames}"
        )
