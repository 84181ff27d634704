"""How strongly a chunk activated each frame of its bank."""

from collections import Counter

import torch
from torch import Tensor

from memflow_ops import select_blocks
from memflow_ops.cache.attend import BlockSelection
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.views import Memory
from memflow_ops.model.parallel.ranks import Ranks


class Activation:
    """Counts, during one pass, how many blocks of each candidate frame are selected. The counts stay on the device
    until they are read, in one tensor that is updated in place, so that a CUDA graph can count too."""

    def __init__(self, cache: RingCache, selection: BlockSelection, impl: str, ranks: Ranks | None = None):
        """ranks: the processes that have some of the heads each, and count together."""
        self.cache, self.selection, self.impl, self.ranks = cache, selection, impl, ranks
        layout = cache.layout
        candidates = layout.sink_frames + layout.bank_frames
        self._counts = torch.zeros(layout.layers, layout.batch, candidates, dtype=torch.long, device=cache.device)

    def start(self) -> None:
        """To be called before the pass that is counted."""
        self._counts.zero_()

    def observe(self, layer: int, q: Tensor, memory: Memory) -> None:
        """An `Observer`: makes the layer's selection again and counts it."""
        layout = self.cache.layout
        blocks = layout.blocks_per_frame
        chosen = select_blocks(
            q,
            memory.descriptors,
            self.selection.top_k,
            query_group=self.selection.query_group,
            memory_frames=memory.frames,
            memory_slots=memory.slots,
            block_size=layout.block_size,
            frame_tokens=layout.frame_tokens,
            score=layout.score,
            impl=self.impl,
        )
        frames = chosen.flatten(1).long() // blocks
        self._counts[layer].scatter_add_(1, frames.clamp(min=0), (frames >= 0).long())

    def read(self) -> tuple[list[list[int]], list[list[float]]]:
        """Per story the candidate frames, ascending, and the share of each in all selected blocks. Waits for the
        device."""
        frames = self.cache.bank_by_layer()
        counts = (self._counts if self.ranks is None else self.ranks.sum(self._counts)).tolist()
        candidates, shares = [], []
        for story in range(self.cache.layout.batch):
            total: Counter[int] = Counter()
            for of_layer, counted in zip(frames, counts, strict=True):
                total.update({frame: 0 for frame in of_layer[story]})
                for frame, count in zip(of_layer[story], counted[story], strict=False):  # a frame may be listed twice
                    total[frame] += count
            candidates.append(sorted(total))
            shares.append([total[frame] / max(1, total.total()) for frame in candidates[-1]])
        return candidates, shares
