"""The streaming loop: a video of any length, chunk by chunk, over a cache that remembers its past.

One chunk is made in this order:

1. Retrieval: the coming prompt chooses the memory bank from the whole history (memory="memflow").
2. Re-caching, at a prompt switch: clean passes over the local window's latents, oldest first, write their keys and
   values anew under the new text, so that the switch takes effect at once.
3. The sampler's passes, from noise to clean latents. Each overwrites the chunk's keys and values in the cache.
4. The clean pass (timestep 0), which leaves the keys and values that later chunks see, and then the commit.

The `memory` mode says how a chunk sees the past: "none" is the local window alone; "sink" adds the first frames and
"full" every remembered frame, both densely; "memflow" adds only the blocks of sink and bank that each query group
selects. "released" is what the authors' MemFlow checkpoints were tuned with, see `ReleasedCache`: its bank takes in a
finished chunk's first frame at step 1, by the prompt of the last chunk. Of which chunks is the `bank_schedule`; with
"interactive", step 2 is one pass over the whole window, as in the authors' program for several prompts.

If a chunk is interrupted, the next call makes it again from the start. `state_dict` and `load_state_dict` stop a stream
between two chunks and continue it elsewhere, with the same frames to the bit.
"""

import numbers
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memflow_ops.cache.attend import Attend, BlockSelection, Observer, attend_to_memory
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Policy, Retrieved
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.state import SavedByState
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.cache.views import Memory
from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.model.parallel.state import check_stores, own_state, whole_state
from memflow_ops.model.parallel.ulysses import SplitTokens
from memflow_ops.model.streaming.activation import Activation
from memflow_ops.model.streaming.chunk import Chunk
from memflow_ops.model.streaming.cuda_graphs import OnePass, Passes
from memflow_ops.model.streaming.factory import make_cache, make_chosen, make_policy, make_recorder, make_selection
from memflow_ops.model.streaming.inputs import PassInputs
from memflow_ops.model.streaming.sampler import FlowMatchSampler
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.text import StreamText, TextEncoder, check_prompts
from memflow_ops.model.wan.transformer import CausalVideoModel

STATE_FORMAT = "memflow-ops stream 1"

# What random numbers beside the noise are for; each has a generator of its own.
RANDOM_BLOCKS, RANDOM_BLOCKS_RECACHING = 1, 2


def stream(
    model: CausalVideoModel,
    prompts: Iterable[Sequence[str]],
    settings: StreamSettings,
    seed: int | Sequence[int] = 0,
    *,
    encode: TextEncoder,
    cuda_graphs: bool | None = None,
    history_dir: Path | str | HistoryFolder | None = None,
) -> Iterator[Chunk]:
    """Generates one chunk per item of `prompts` and yields each as soon as it is finished.

    prompts: per chunk the prompt of every story, as `chunk_prompts` gives them; may be a generator without end.
    seed: story b uses seed + b, or entry b of a sequence. The noise of a chunk depends only on its story's seed and the
        chunk's index, so that runs with different memory start from the same noise.
    encode: turns prompts into text embeddings.
    cuda_graphs, history_dir: as for `Streamer`.

    Bad prompts and settings that cannot work for this model raise a ValueError or TypeError before the chunk starts.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be one sequence of prompts per chunk, got a single string")
    if settings.memory == "full" and isinstance(prompts, Sequence):
        _check_full_history(settings, len(prompts))

    def chunks() -> Iterator[Chunk]:
        streamer: Streamer | None = None
        for index, item in enumerate(prompts):
            batch = len(check_prompts(item))
            streamer = streamer or Streamer(
                model, batch, settings, seed, encode=encode, cuda_graphs=cuda_graphs, history_dir=history_dir
            )
            known = isinstance(prompts, Sequence) and index + 1 < len(prompts)
            yield streamer.next_chunk(item, prompts[index + 1] if known else None)  # type: ignore[index]

    return chunks()


class Streamer(SavedByState):
    """One stream of B stories: cache, text, and the local window's latents.

    `next_chunk` makes a chunk under any prompts, known beforehand or typed a moment ago; `stream` calls it in a loop.
    A Streamer cannot be pickled or copied; `state_dict` and `load_state_dict` take a stream elsewhere, and `fork` makes
    a second one that goes on from the same past.
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
        ranks: Ranks | None = None,
        history_dir: Path | str | HistoryFolder | None = None,
    ):
        """seed, encode: as for `stream`.
        policy: chooses the bank instead of the policy that `settings` names.
        report: whether `Chunk` tells what was retrieved and activated and how long the chunk took. The host then waits
            for the device at the end of every chunk. Without it these are empty, and `seconds` is the time to queue the
            work.
        cuda_graphs: whether passes that recur are recorded and replayed, which changes no result. None: wherever that
            is possible. True: a ValueError where it is not.
        observe: is shown what every layer of every pass over a chunk chooses from; re-caching is not shown.
        ranks: the processes that make this stream together, each with the same arguments and its share of tokens and
            heads. All return the same chunks; the cache, `observe` and `policy` see the heads of their process. None:
            there is one.
        history_dir: a folder that keeps every prototype on disk too, so that a state need not hold the history and
            `disk_frames` of it need no memory. No other process may use it until the stream is closed or gone. It
            changes no result, and is not used where the kind of memory has no history. Each of
            several ranks needs a folder of its own.
        """
        self.ranks = ranks
        self.heads = None if ranks is None else ranks.heads(model.config.num_heads)
        self.report, self.observe = report, observe
        self.model, self.settings = model, settings
        if isinstance(seed, numbers.Integral):  # numpy's integers too
            self.seeds = [int(seed) + story for story in range(batch)]
        elif isinstance(seed, Iterable) and all(isinstance(one, numbers.Integral) for one in seed):
            self.seeds = [int(one) for one in seed]
        else:
            raise TypeError(f"seed must be an int or a sequence of ints, one per story, got {seed!r}")
        if len(self.seeds) != batch or min(self.seeds, default=0) < 0:
            raise ValueError(f"seed must be a number >= 0 or {batch} of them, one per story, got {seed}")
        self.device = model.patch_embedding.weight.device
        count = 1 if ranks is None else ranks.count
        self.cache = self._make_cache(settings.cache_layout(model, batch, ranks=count), history_dir)
        self.chosen = make_chosen(settings, self.cache.layout, self.device)
        recorder = make_recorder(settings, self.device, cuda_graphs, observe is not None, count)
        self.passes = Passes(self.cache, recorder, insist=bool(cuda_graphs))
        self.sampler = FlowMatchSampler(settings.steps, settings.shift, settings.stochastic, model.config.prediction)
        self.policy, self._given_policy = make_policy(settings, self.seeds, policy, ranks), policy
        self.inputs = PassInputs(model, settings, batch)
        self._split = self._split_tokens(self.inputs)
        self.text = StreamText(model, encode, batch, self.heads)
        self._next_text: StreamText | None = None  # of the chunk after the coming one, where it has other prompts
        self._cuda_graphs = cuda_graphs
        self._random_blocks = torch.Generator(device="cpu")  # of the current chunk, for selection="random"
        selection = self._selection()
        self.activation = Activation(self.cache, selection, settings.impl, ranks) if report and selection else None
        self._past: dict[int, Tensor] = {}  # chunk index -> clean latents, for the chunks in the window
        self._window_prompts: list[str | None] = [None] * batch  # that the window's keys were written under

    def _make_cache(self, layout: CacheLayout, history_dir: Path | str | HistoryFolder | None) -> RingCache:
        """The cache, and the history folder where it uses one."""
        self.history: HistoryFolder | None = None
        if history_dir is None or not layout.device_frames:
            return make_cache(layout, self.device, self.ranks)
        given = isinstance(history_dir, HistoryFolder)
        self.history = history_dir if isinstance(history_dir, HistoryFolder) else HistoryFolder(history_dir)
        try:
            return make_cache(layout, self.device, self.ranks, self.history)
        except BaseException:
            if not given:
                self.history.close()
            raise

    @torch.no_grad()
    def next_chunk(self, prompts: Sequence[str], upcoming: Sequence[str] | None = None) -> Chunk:
        """Makes the next chunk. A prompt that cannot be encoded raises before anything has changed. After an
        interruption the next call makes the same chunk, from the same noise.

        upcoming: the prompts of the chunk after it, where they are known; None: probably the same. They decide nothing
            but which frames begin to be read from the disk while this chunk is made.
        """
        started, replayed = self._clock(), self.passes.replayed
        prompts = check_prompts(prompts)
        if len(prompts) != len(self.seeds):
            raise ValueError(f"a chunk takes {len(self.seeds)} prompts, one per story, got {len(prompts)}")
        embeddings = self.text.embed(prompts)
        self.cache.abort()  # undoes what an interruption may have left
        self.passes.new_chunk()
        index = self.cache.committed
        recached = self._to_recache(prompts)
        self.cache.update_bank(self.text.keys, recached)  # of the last chunk's prompts
        self.text.set(prompts, embeddings)
        choice = self.cache.choose_bank(self.policy, self.text.keys, self.text.lengths)
        self._expect(prompts if upcoming is None else check_prompts(upcoming))
        if any(recached):
            self._recache(prompts, recached)
        self._random_blocks = self._generator(self.seeds[0], RANDOM_BLOCKS)
        first_frame = self._begin_chunk()
        x = self._sample()
        self._write_keys(x, remember=True)
        # The host waits for the device here, and may be interrupted while it does. So this comes before the commit: a
        # chunk that was not returned must be made again.
        nothing: list[list] = [[] for _ in prompts]
        candidates, shares = self.activation.read() if self.activation else (nothing, nothing)
        retrieved = choice.read() if self.report else Retrieved(nothing, nothing)
        self._past[index] = x
        self._window_prompts = list(prompts)
        self.cache.commit()
        first_needed = (index + 1) * self.settings.chunk_frames - self.cache.layout.recached_frames
        for chunk in [c for c in self._past if (c + 1) * self.settings.chunk_frames <= first_needed]:
            del self._past[chunk]
        replayed, seconds = self.passes.replayed - replayed, self._clock() - started
        return Chunk(index, first_frame, prompts, x, *retrieved, candidates, shares, seconds, replayed)

    # ----------------------------------------------------------------------------------------------- before the passes

    def _expect(self, upcoming: list[str]) -> None:
        """Lets the cache read ahead for the chunk after the coming one. Not for a policy of the caller's own, which may
        count how often it is asked."""
        if self.policy is None or self._given_policy is not None or not self.cache.reads_ahead():
            return
        text = self.text
        if upcoming != self.text.prompts and len(upcoming) == len(self.seeds):
            text = self._next_text = self._next_text or StreamText(
                self.model, self.text.encode, len(upcoming), self.heads
            )
            text.set(upcoming, text.embed(upcoming))
        self.cache.expect_bank(self.policy, text.keys, text.lengths)

    def _to_recache(self, prompts: list[str]) -> list[bool]:
        """The stories whose window was written under another prompt than the coming chunk's, and is re-cached."""
        if not (self.settings.recache and self._past):
            return [False] * len(prompts)
        return [old != new for old, new in zip(self._window_prompts, prompts, strict=True)]

    def _recache(self, prompts: list[str], switched: list[bool]) -> None:
        """Passes the window's past frames again under the new text; see `RingCache.restart_window`."""
        # If this is interrupted, the windows belong to neither prompt, and the next chunk re-caches them.
        self._window_prompts = [None] * len(prompts)
        first_frames = self.cache.restart_window(switched)
        self._window_prompts = [None if new else prompt for new, prompt in zip(switched, prompts, strict=True)]
        self._random_blocks = self._generator(self.seeds[0], RANDOM_BLOCKS_RECACHING)
        for _ in first_frames:
            self._begin_chunk()
            frames = self.cache.open_frames()
            if len(frames) == self.settings.chunk_frames:
                self._write_keys(self._past_latents(frames))
            else:
                self._write_keys_at_once(frames)
            self.cache.commit()
        self._window_prompts = list(prompts)

    def _past_latents(self, frames: range) -> Tensor:
        """The clean latents (B, C, len(frames), H, W) of finished frames that lie in `_past`."""
        size = self.settings.chunk_frames
        chunks = range(frames.start // size, -(-frames.stop // size))
        latents = torch.cat([self._past[chunk] for chunk in chunks], dim=2)
        return latents[:, :, frames.start - chunks.start * size :][:, :, : len(frames)]

    def _begin_chunk(self) -> int:
        """Opens a chunk in the cache and turns RoPE to its frames; returns the first of them."""
        first_frame = self.cache.begin_chunk()
        self.inputs.set_frames(first_frame)
        return first_frame

    def _noise(self) -> Tensor:
        """The chunk's noise, then that of each later step of a stochastic sampler: (1 or steps, B, C, F, H, W)."""
        settings = self.settings
        count = settings.steps if settings.stochastic else 1
        shape = (count, self.model.config.out_dim, settings.chunk_frames, settings.height, settings.width)
        # On the CPU, so that a seed means the same video on every device.
        shapes, pinned = (len(self.seeds), *shape), self.device.type == "cuda"
        noise = torch.empty(shapes, pin_memory=pinned, dtype=torch.float32, device="cpu")
        for story, seed in enumerate(self.seeds):
            generator = self._generator(seed)
            for step in range(count):
                noise[story, step].normal_(generator=generator)
        return noise.to(self.device, non_blocking=True).transpose(0, 1)

    def _generator(self, seed: int, *use: int) -> torch.Generator:
        """Random numbers of the coming chunk, which depend on the seed, the chunk's index and their use alone."""
        mixed = np.random.SeedSequence([seed, self.cache.committed, *use]).generate_state(1, np.uint64)
        return torch.Generator(device="cpu").manual_seed(int(mixed[0]))

    # ------------------------------------------------------------------------------------------------------ the passes

    def _sample(self) -> Tensor:
        """From noise to the chunk's clean latents (B, C, F, H, W) float32, in `steps` passes."""
        x, *fresh = self._noise()
        keeps = self.chosen is not None and self.settings.reselect == "chunk"
        for i, sigma in enumerate(self.sampler.sigmas[:-1]):
            y = self._denoise(x, 1000 * sigma, reuse=keeps and i > 0)
            x0 = self.sampler.denoised(x, y.float(), sigma)
            x = self.sampler.step(x, x0, i, fresh[i] if i < len(fresh) else None)
        return x

    def _denoise(self, x: Tensor, timestep: float, reuse: bool) -> Tensor:
        """A noisy pass over x (B, C, F, H, W): the model's output, like x. reuse: it attends to the blocks that an
        earlier one has chosen."""
        inputs, attend, order = self.inputs, self._attend(reuse=reuse), self._split or self.inputs.order
        inputs.set_latents(x, timestep)
        y = self._run(
            "noisy, with blocks chosen before" if reuse else "noisy",
            lambda: self.model(inputs.latents, inputs.time, self.text.keys_values, attend, inputs.condition, order),
        )
        assert y is not None
        return y

    def _write_keys(self, x: Tensor, remember: bool = False) -> None:
        """The clean pass over x (B, C, F, H, W), up to the last layer's keys and values. remember: x is a new chunk,
        whose first frame retrieval may choose later, and not one that is re-cached."""
        inputs = self.inputs
        inputs.set_latents(x, 0.0)
        if self.activation and remember:
            self.activation.start()
        attend, order = self._attend(keys_only=True, remember=remember), self._split or inputs.order

        def one_pass() -> None:
            self.model.forward_keys(inputs.latents, inputs.time, self.text.keys_values, attend, inputs.condition, order)

        self._run("clean", one_pass)

    def _write_keys_at_once(self, frames: range) -> None:
        """The clean pass over all frames of the window in one, at a prompt switch. It comes too rarely, and in too many
        lengths, to be recorded."""
        inputs = PassInputs(self.model, self.settings, len(self.seeds), len(frames))
        inputs.set_frames(frames.start)
        inputs.set_latents(self._past_latents(frames), 0.0)
        attend = attend_to_memory(
            self.cache, inputs.rotation, self._selection(), keys_only=True, impl=self.settings.impl
        )
        split = self._split_tokens(inputs)
        if split is not None:
            attend = split.attend(attend, unused=self.cache.layout.layers - 1)
        order = split or inputs.order
        self.model.forward_keys(inputs.latents, inputs.time, self.text.keys_values, attend, inputs.condition, order)

    def _run(self, kind: str, one_pass: OnePass) -> Tensor | None:
        return self.passes.run((kind, *self.cache.pass_shape(self._selection() is not None)), one_pass)

    def _attend(self, keys_only: bool = False, remember: bool = False, reuse: bool = False) -> Attend:
        """How the open chunk sees the past."""
        counted = self.activation.observe if self.activation and remember else None
        observe = _in_turn(counted, self.observe if remember or not keys_only else None)
        attend = attend_to_memory(
            self.cache,
            self.inputs.rotation,
            self._selection(),
            remember=remember,
            keys_only=keys_only,
            observe=observe,
            chosen=self.chosen,
            reuse=reuse,
            impl=self.settings.impl,
        )
        if self._split is None:
            return attend
        return self._split.attend(attend, unused=self.cache.layout.layers - 1 if keys_only else None)

    def _split_tokens(self, inputs: PassInputs) -> SplitTokens | None:
        """How the tokens of these passes are dealt out to the processes; None where there is one."""
        tokens = inputs.frames * inputs.grid[0] * inputs.grid[1]
        return None if self.ranks is None else SplitTokens(self.ranks, tokens, inputs.order)

    def _selection(self) -> BlockSelection | None:
        return make_selection(self.settings, self._random_blocks, self.heads)

    # ------------------------------------------------------------------------------------------------------- the state

    def fork(self) -> "Streamer":
        """A second stream that goes on from the last finished chunk, under the same seeds, and memory of its own.

        Both share the history folder, if there is one: the past is named, not copied, and each appends to a file of its
        own. What one of them does leaves the other as it is, to the bit.
        """
        other = Streamer(
            self.model,
            len(self.seeds),
            self.settings,
            self.seeds,
            encode=self.text.encode,
            policy=self._given_policy,
            report=self.report,
            cuda_graphs=self._cuda_graphs,
            observe=self.observe,
            ranks=self.ranks,
            history_dir=self.history,
        )
        other.load_state_dict(self.state_dict())
        return other

    def close(self) -> None:
        """Ends the stream's use of its history folder, so that another process may have it. Without one, nothing."""
        self.cache.close()

    def state_dict(self) -> dict[str, Any]:
        """The stream after its last finished chunk, in host memory, as `torch.save` takes it and
        `torch.load(weights_only=True)` returns it. It holds no weights. With a history folder it names the records of
        the history there instead of holding it. Of several processes each gets the whole, and all must ask for it;
        another number of processes can go on from it, but for what is named in history folders."""
        self.cache.abort()
        cache = self.cache.state_dict()
        if self.ranks is not None:
            cache = whole_state(cache, self.ranks)
        return {
            "format": STATE_FORMAT,
            "settings": asdict(self.settings),
            "model": asdict(self.model.config),
            "seeds": list(self.seeds),
            "prompts": list(self.text.prompts),
            "window_prompts": list(self._window_prompts),
            "embeddings": [embedding.cpu() for embedding in self.text.embeddings],
            "past": {chunk: x.cpu() for chunk, x in self._past.items()},
            "cache": cache,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a saved stream: the same frames, to the bit on the same machine, as if it had not stopped. The
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
        cache = state["cache"]
        if self.heads is None:
            check_stores(cache, 1)
        self.cache.load_state_dict(cache if self.heads is None else own_state(cache, self.heads))
        self._past = {chunk: x.to(self.device) for chunk, x in state["past"].items()}
        known = {
            story: embedding.to(self.device)
            for story, embedding in enumerate(state["embeddings"])
            if state["prompts"][story] is not None
        }
        self.text.set(state["prompts"], known)
        self._window_prompts = list(state["window_prompts"])

    def _clock(self) -> float:
        if self.report and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _in_turn(first: Observer | None, second: Observer | None) -> Observer | None:
    """An observer that calls both; None for neither."""
    if first is None or second is None:
        return first or second

    def observe(layer: int, q: Tensor, memory: Memory) -> None:
        first(layer, q, memory)
        second(layer, q, memory)

    return observe


def _check_full_history(settings: StreamSettings, chunks: int) -> None:
    """A ValueError before the first chunk where memory="full", which reads the history on the device, has no room."""
    prototypes = settings.prototypes(chunks)
    if prototypes > settings.device_frames:
        raise ValueError(
            f"memory='full' keeps one frame of each chunk on the device: {chunks} chunks need "
            f"device_frames >= {prototypes}, got {settings.device_frames}"
        )
