"""CUDA graphs of a stream's passes: a pass that recurs in the same shape is recorded once and then replayed.

A replay repeats the recorded kernels on the recorded memory and numbers. So whatever changes from chunk to chunk is
read from tensors that are updated in place: noisy latents, time embedding, RoPE angles (`PassInputs`), text keys
(`StreamText`), and the chunk's places in the ring, how many keys are valid while it is re-cached, and the slot table
and lengths of the bank (the cache). What no tensor holds makes up the shape of a pass; see `RingCache.pass_shape`.

Few shapes recur, so there are few graphs. Once the local window is full, a chunk has two kinds of passes: noisy ones,
and the clean one, which ends early. With reselect="chunk" the first noisy pass writes the blocks that it chooses to a
tensor that the others read, so it has a graph of its own. A prompt switch adds a clean pass over each past chunk in the
window; one graph serves them all. That makes 3 graphs for a window of any length, or 4. Passes whose shape belongs to
one chunk alone are not recorded: those while the window fills, and all of memory="full", whose history grows with every
chunk.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memflow_ops.cache.ring import PassMarks, RingCache
from memflow_ops.model.streaming.settings import StreamSettings

OnePass = Callable[[], Tensor | None]
"""Runs a pass on the same tensors every time. Returns the model's output, or None for a clean pass."""


class Recorder(Protocol):
    """Records passes: as CUDA graphs, or in tests as a list of operators."""

    def warm_up(self, one_pass: OnePass) -> Tensor | None:
        """Runs a pass that may be recorded later, and returns its result."""

    def record(self, one_pass: OnePass) -> tuple[Callable[[], None], Tensor | None]:
        """Returns a function that runs the pass, and the tensor that holds the result after each such run. Recording
        does not run the pass."""


class CudaGraphs:
    """Records CUDA graphs on a CUDA stream of their own. They share a memory pool, because only one runs at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, one_pass: OnePass) -> Tensor | None:
        # This is the CUDA stream that will record. Kernels must be compiled and workspaces allocated on it before.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = one_pass()
        current.wait_stream(self._stream)
        if out is not None:
            out.record_stream(current)
        return out

    def record(self, one_pass: OnePass) -> tuple[Callable[[], None], Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: calls of other threads, which may be encoding a video, do not invalidate the recording.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = one_pass()
        return graph.replay, out


def why_not_record(device: torch.device, settings: StreamSettings, ranks: int = 1) -> str:
    """The reason why the passes of such a stream cannot be recorded; "" if they can. ranks: the processes that share
    the video."""
    if device.type != "cuda":
        return f"they need a CUDA device, the model is on {device}"
    if ranks > 1:
        return "several processes exchange tokens in every layer, which has not been recorded yet"
    if settings.selection == "random":
        return "selection='random' draws its blocks on the host in every pass"
    if settings.impl == "reference":
        return "impl='reference' reads values back to the host"
    return ""


class Recording(NamedTuple):
    """A recorded pass."""

    replay: Callable[[], None]
    out: Tensor | None
    marks: PassMarks  # of the cache, after the pass


class Passes:
    """Runs the passes of one stream, eagerly or by replaying recordings, with results that are the same to the bit."""

    def __init__(self, cache: RingCache, recorder: Recorder | None, insist: bool = False):
        """cache: the one that the passes write. recorder: None runs everything eagerly. insist: an error while
        recording is raised; otherwise it becomes a RuntimeWarning, and the stream continues eagerly."""
        self.cache, self.recorder, self.insist = cache, recorder, insist
        self.replayed = 0
        """How many passes were replays so far."""
        self._recorded: dict[Hashable, Recording] = {}
        self._in_this_chunk: set[Hashable] = set()  # shapes of passes in this chunk
        self._in_earlier_chunks: set[Hashable] = set()  # shapes of passes in earlier chunks

    @property
    def graphs(self) -> int:
        """How many recordings there are."""
        return len(self._recorded)

    def new_chunk(self) -> None:
        """To be called before a chunk. A pass is recorded when an earlier chunk had one of its shape, because such a
        shape can be expected to recur."""
        self._in_earlier_chunks |= self._in_this_chunk
        self._in_this_chunk = set()

    def run(self, shape: Hashable, one_pass: OnePass) -> Tensor | None:
        """Runs a pass and returns its result. shape: all that the pass depends on and that no tensor holds."""
        if self.recorder is None:
            return one_pass()
        if shape not in self._recorded:
            if shape not in self._in_earlier_chunks:
                self._in_this_chunk.add(shape)
                return self.recorder.warm_up(one_pass)
            if not self._record(shape, one_pass):
                return one_pass()
        replay, out, marks = self._recorded[shape]
        replay()
        self.cache.restore_pass_marks(marks)
        self.replayed += 1
        return None if out is None else out.clone()  # the next replay overwrites it

    def _record(self, shape: Hashable, one_pass: OnePass) -> bool:
        assert self.recorder is not None
        try:
            replay, out = self.recorder.record(one_pass)
        except RuntimeError as error:
            if self.insist:
                raise
            reason = f"a pass could not be recorded as a CUDA graph, so this stream goes on without: {error}"
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
            self.recorder = None
            self._recorded.clear()
            return False
        self._recorded[shape] = Recording(replay, out, self.cache.pass_marks())
        return True
