"""What the user is told of a chunk's memory: which frames were held, and how strongly each was activated."""

from collections import Counter

import torch
from torch import Tensor

from memflow_ops import select_blocks
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.policies import Retrieved
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.views import Memory


class Activation:
    """Counts in one pass how many blocks of each candidate frame are selected; on the device until it is read, in a
    tensor that stays where it is, so that a CUDA graph may count."""

    def __init__(self, cache: FrameCache | ReleasedCache, top_k: int, query_group: int | None, impl: str):
        self.cache, self.top_k, self.query_group, self.impl = cache, top_k, query_group, impl
        layout = cache.layout
        candidates = layout.sink_frames + layout.bank_frames
        self._counts = torch.zeros(layout.layers, layout.batch, candidates, dtype=torch.long, device=cache.device)
        self._frames: Tensor | list[list[list[int]]] = []  # layers, stories, candidates

    def start(self) -> None:
        """Before the pass over the open chunk that is to be counted."""
        self._counts.zero_()
        cache = self.cache
        if isinstance(cache, ReleasedCache):
            self._frames = cache.candidates()

    def observe(self, layer: int, q: Tensor, memory: Memory) -> None:
        blocks = self.cache.layout.blocks_per_frame
        chosen = select_blocks(
            q,
            memory.descriptors,
            self.top_k,
            query_group=self.query_group,
            memory_frames=memory.frames,
            memory_slots=memory.slots,
            blocks_per_frame=blocks,
            impl=self.impl,
        )
        frames = chosen.flatten(1).long() // blocks
        self._counts[layer].scatter_add_(1, frames.clamp(min=0), (frames >= 0).long())

    def read(self) -> tuple[list[list[int]], list[list[float]]]:
        """Per story the candidates, ascending, and the share of each in all selected blocks. Waits for the device."""
        if isinstance(self.cache, FrameCache):
            self._frames = [self.cache.bank()] * self.cache.layout.layers
        frames = self._frames.tolist() if isinstance(self._frames, Tensor) else self._frames
        counts = self._counts.tolist()
        candidates, shares = [], []
        for story in range(self.cache.layout.batch):
            total: Counter[int] = Counter()
            for of_layer, counted in zip(frames, counts, strict=True):
                total.update({frame: 0 for frame in of_layer[story]})
                for frame, count in zip(of_layer[story], counted[story], strict=False):  # a frame may be there twice
                    total[frame] += count
            candidates.append(sorted(total))
            shares.append([total[frame] / max(1, total.total()) for frame in candidates[-1]])
        return candidates, shares


def held_by_layers(bank: Tensor) -> Retrieved:
    """The frames (layers, B, places) of banks that layers fill for themselves: first those that most layers hold, with
    the share of layers that do. Waits for the device."""
    layers = bank.tolist()
    frames, shares = [], []
    for story in range(bank.shape[1]):
        held = Counter(frame for layer in layers for frame in layer[story])
        ranked = sorted(held, key=lambda frame: (-held[frame], frame))
        frames.append(ranked)
        shares.append([held[frame] / len(layers) for frame in ranked])
    return Retrieved(frames, shares)
