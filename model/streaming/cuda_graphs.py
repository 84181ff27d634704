"""CUDA graphs of a stream's passes: a pass that comes again in the same shape is recorded once and then replayed.

A recording repeats kernels with the memory and the numbers that it was made with. So whatever changes from chunk to
chunk is read from tensors that stay where they are: noisy latents, time embedding, RoPE's angles and text keys (of the
`Streamer`), the chunk's places in the ring, slot table and lengths of the bank (of the cache). What no tensor holds is
the shape of a pass: how full the ring is, and so on, see `RingCache.pass_shape`.

Few shapes come again, so there are few graphs. Once the local window is full, a chunk has two kinds of pass (noisy, and
clean, which ends early); a prompt switch passes each chunk that stays in the window again, one graph for each. With a
window of 9 frames there are 4 graphs. Shapes that only one chunk has, as while the window fills, are not recorded, nor
is memory="full", whose history grows with every chunk.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memflow_ops.cache.ring import PassMarks, RingCache
from memflow_ops.model.streaming.settings import StreamSettings

OnePass = Callable[[], Tensor | None]
"""Runs a pass; what it reads and writes stays where it is."""


class Recorder(Protocol):
    """What records passes: CUDA's graphs, or in tests a list of operators."""

    def warm_up(self, one_pass: OnePass) -> Tensor | None:
        """Runs a pass that may be recorded later."""

    def record(self, one_pass: OnePass) -> tuple[Callable[[], None], Tensor | None]:
        """What runs it again, and the tensor that then holds the result. Recording does not run it."""


class CudaGraphs:
    """Records CUDA graphs on a stream of their own. They share one pool of memory, because they never run at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, one_pass: OnePass) -> Tensor | None:
        # On the stream that will record: kernels are compiled and workspaces allocated before that.
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
        # thread_local: what other threads do, such as encoding a video, does not spoil the recording.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = one_pass()
        return graph.replay, out


def why_not(device: torch.device, settings: StreamSettings) -> str:
    """Why the passes of such a stream cannot be recorded; "" if they can."""
    if device.type != "cuda":
        return f"they need a CUDA device, the model is on {device}"
    if settings.selection == "random":
        return "selection='random' draws its blocks on the host in every pass"
    if settings.impl == "reference":
        return "impl='reference' reads values back to the host"
    return ""


class Recording(NamedTuple):
    replay: Callable[[], None]
    out: Tensor | None
    marks: PassMarks  # of the cache, after the pass


class Passes:
    """Runs the passes of one stream, eagerly or as recordings; the results are the same to the bit."""

    def __init__(self, cache: RingCache, recorder: Recorder | None, insist: bool = False):
        """cache: what the passes write. recorder: None runs everything eagerly. insist: an error while recording is
        raised; otherwise it is a RuntimeWarning, and the stream goes on eagerly."""
        self.cache, self.recorder, self.insist = cache, recorder, insist
        self.replayed = 0
        """Passes that were replays, so far."""
        self._recorded: dict[Hashable, Recording] = {}
        self._now: set[Hashable] = set()  # shapes met in this chunk
        self._before: set[Hashable] = set()  # and in earlier ones

    @property
    def graphs(self) -> int:
        """Recordings so far."""
        return len(self._recorded)

    def new_chunk(self) -> None:
        """Only what an earlier chunk has met is recorded: it may be expected to come again."""
        self._before |= self._now
        self._now = set()

    def run(self, shape: Hashable, one_pass: OnePass) -> Tensor | None:
        """The result of a pass. shape: all that the pass depends on and that no tensor holds."""
        if self.recorder is None:
            return one_pass()
        if shape not in self._recorded:
            if shape not in self._before:
                self._now.add(shape)
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
