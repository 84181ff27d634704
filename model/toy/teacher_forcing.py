"""Teacher forcing for the toy world: all chunks of a clip at once, each seeing what it would see in a stream.

Rows are chunks. A batch of B clips of C chunks gives R = B * C of them, and they go through the model twice in one
call: first as the clean stream (timestep 0), which provides keys and values as a stream's clean pass does, then as the
noisy one, which is trained. Only the injected attention, defined here, knows how rows belong together. A row attends to

- memory: prototypes (first frames of past chunks) and the sink (the three frames of a first chunk), clean, at any
  distance; on most steps only to its top_k best blocks, chosen as `memory_attention` does for a whole chunk;
- its local window: the clean chunk before it;
- itself.

Keys are gathered per row, so that nothing of size sequence x sequence is made.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.model.toy.world import FRAME_SIZE
from memflow_ops.rotary import rope_rotation, turn_pairs

CHUNK_FRAMES = 3
BANK_FRAMES = 3
SINK_FRAMES = 3
MEMORY_FRAMES = SINK_FRAMES + BANK_FRAMES
BLOCKS_PER_FRAME = 4
LONGEST_GAP = 240
"""Memory is moved further into the past by up to this many frames, so that the model meets every distance up to it."""


# --------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class TrainingMemory:
    """What each of R rows remembers: M = MEMORY_FRAMES frames, the sink first."""

    frame: Tensor
    """(R, M) int64, index among the R * CHUNK_FRAMES clean frames"""
    distance: Tensor
    """(R, M) float32, frames between the remembered frame and the first frame of the row's chunk"""
    valid: Tensor
    """(R, M) bool; a frame that is not valid is not attended to"""

    def to(self, device: torch.device) -> "TrainingMemory":
        return TrainingMemory(self.frame.to(device), self.distance.to(device), self.valid.to(device))


def draw_training_memory(shows: Tensor, generator: torch.Generator) -> TrainingMemory:
    """Draws the memory of every chunk of a batch of clips.

    shows (B, C, characters) bool: whom each chunk's prompt names.

    Frames of other clips in the batch stand in for a longer past. As long as they show nobody whom the row names, they
    are what a stream's memory is full of: other characters with other looks. The sink is a whole first chunk. The bank
    holds prototypes: mostly those that show who is named (as when retrieval works), sometimes one of each character or
    any others.
    """
    clips, chunks = shows.shape[:2]
    rows = clips * chunks
    named = shows.flatten(0, 1)
    clip = torch.arange(clips, dtype=torch.long, device="cpu").repeat_interleave(chunks)
    chunk = torch.arange(chunks, dtype=torch.long, device="cpu").repeat(clips)
    same_clip = clip[:, None] == clip[None]
    past = same_clip & (chunk[None] < chunk[:, None] - 1)  # (R, R): beyond the local window
    foreign = ~same_clip & ~_share_a_character(named) & (chunk > 0)[:, None]

    sink_chunk, sink_valid = _draw_sink(past, foreign, chunk == 0, generator)
    not_in_sink = ~F.one_hot(sink_chunk, rows).bool()  # no frame is remembered twice
    bank_chunk, bank_valid = _draw_bank(past & not_in_sink, foreign & not_in_sink, named, generator)

    without_memory = _uniform(generator, rows, 1) < 0.1
    valid = torch.cat([sink_valid[:, None].expand(-1, SINK_FRAMES), bank_valid], dim=1) & ~without_memory
    source = torch.cat([sink_chunk[:, None].expand(-1, SINK_FRAMES), bank_chunk], dim=1)  # (R, M) chunks
    offset = F.pad(torch.arange(SINK_FRAMES, dtype=torch.long, device="cpu"), (0, BANK_FRAMES))
    chunks_back = torch.where(clip[source] == clip[:, None], chunk[:, None] - chunk[source], 2).clamp(min=2)
    gap = torch.randint(0, LONGEST_GAP, (rows, MEMORY_FRAMES), generator=generator, dtype=torch.long, device="cpu")
    gap[:, :SINK_FRAMES] = gap[:, :1]  # the sink moves as a whole
    gap = gap * (_uniform(generator, rows, 1) < 0.8)
    distance = (chunks_back * CHUNK_FRAMES - offset + gap).float()
    return TrainingMemory(source * CHUNK_FRAMES + offset, distance, valid)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _share_a_character(named: Tensor) -> Tensor:
    """Whether two rows name a character in common: (R, characters) bool -> (R, R) bool."""
    return (named[:, None] & named[None]).any(-1)


def _draw_sink(past: Tensor, foreign: Tensor, first: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first chunk that is each row's sink (R,), and whether there is one (R,).

    past, foreign (R, R): the chunks of the row's own clip, and of others, that it may remember. first (R,): which
    chunks are the first of their clips. Often the sink is a stranger's, so that a return is not to be found in it.
    """
    rows = len(first)
    own = past & first & (_uniform(generator, rows, 1) < 0.65)
    score = _uniform(generator, rows, rows).masked_fill(~((foreign & first) | own), -1) + 2 * own
    best, chunk = score.max(dim=1)
    return chunk, best > 0


def _draw_bank(past: Tensor, foreign: Tensor, named: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The chunks whose prototypes are in each row's bank (R, BANK_FRAMES), and which of them count.

    past, foreign (R, R): the chunks of the row's own clip, and of others, that it may remember. named (R, characters).
    A row draws one of three modes: prefer all frames that show who is named (55 %), prefer one of each character
    (25 %), or prefer none of them (20 %).
    """
    rows = len(named)
    relevant = past & _share_a_character(named)
    score = _uniform(generator, rows, rows)
    mode = _uniform(generator, rows, 1)
    one_of_each = torch.zeros(rows, rows, dtype=torch.bool, device="cpu")
    for character in range(named.shape[1]):
        showing = relevant & named[:, None, character] & named[None, :, character]
        one_of_each |= F.one_hot((score * showing).argmax(1), rows).bool() & showing
    preferred = torch.where(mode < 0.55, relevant, (mode < 0.8) & one_of_each)
    score = score + 4 * preferred + 4 * (one_of_each & (mode < 0.8)) + (past & ~relevant) + (relevant & (mode >= 0.8))
    score = score.masked_fill(~(past | foreign), -1)
    best, chunk = score.topk(min(BANK_FRAMES, rows), dim=1)
    if rows < BANK_FRAMES:  # tiny batches in tests
        best = F.pad(best, (0, BANK_FRAMES - rows), value=-1)
        chunk = F.pad(chunk, (0, BANK_FRAMES - rows))
    useful = torch.gather(relevant, 1, chunk)
    not_full = _uniform(generator, rows, BANK_FRAMES) < 0.85  # the bank is not always full
    return chunk, (best > 0) & (useful | not_full)


# ------------------------------------------------------------------------------------------------------------ attention


class TeacherForcedAttention:
    """The `attend` of one training step. It also collects what the relevance loss needs.

    memory: what each row remembers. chunks: chunks per clip. grid: tokens of a frame, as rows and columns. top_k: the
    blocks that a row keeps per head; None means all of memory, dense. selection_noise: perturbs the scores of the
    selection by so many of their standard deviations, so that the best blocks are not always selected; it is drawn
    from `generator`. full_grid: rows of tokens of a frame at full resolution.
    """

    def __init__(
        self,
        memory: TrainingMemory,
        chunks: int,
        grid: tuple[int, int],
        head_dim: int,
        *,
        top_k: int | None,
        selection_noise: float = 0.0,
        generator: torch.Generator | None = None,
        full_grid: int = FRAME_SIZE // 4,
    ):
        self.memory, self.top_k = memory, top_k
        self.selection_noise, self.generator = selection_noise, generator
        self.frame_means: list[Tensor] = []
        """Per layer (R, heads, head_dim): the mean un-rotated key of each clean chunk's first frame."""
        device = memory.frame.device
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
        # On a coarser grid tokens stand further apart, so that distances mean the same at every resolution.
        rows, columns = rows * (full_grid / grid[0]), columns * (full_grid / grid[1])
        here = torch.arange(CHUNK_FRAMES, device=device, dtype=torch.long)
        self.own_turn, self.local_turn, self.memory_turn = (
            torch.complex(*rope_rotation(head_dim, frames, rows, columns))
            for frames in (here, here - CHUNK_FRAMES, -memory.distance)
        )
        self.tokens = grid[0] * grid[1]
        has_past = torch.arange(len(memory.frame), device=device, dtype=torch.long) % chunks > 0
        self.local_valid = torch.cat([has_past, has_past])[:, None].expand(-1, CHUNK_FRAMES * self.tokens)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (2 R, CHUNK_FRAMES * T, heads, head_dim), the clean rows first -> the output, shaped like q."""
        rows = len(self.memory.frame)
        clean_k, clean_v = k[:rows], v[:rows]
        self.frame_means.append(clean_k[:, : self.tokens].mean(1))

        q, own_k = turn_pairs(q, self.own_turn), turn_pairs(k, self.own_turn)
        local_k = turn_pairs(clean_k.roll(1, 0), self.local_turn)
        local_v = clean_v.roll(1, 0)
        index = self.memory.frame.flatten()
        memory_k, memory_v = (
            x.reshape(rows * CHUNK_FRAMES, -1).index_select(0, index).view(rows, -1, *x.shape[2:])
            for x in (clean_k, clean_v)
        )  # (R, M * T, heads, head_dim)
        memory_k = turn_pairs(memory_k, self.memory_turn)

        q, own_k, own_v, local_k, local_v, memory_k, memory_v = (
            x.transpose(1, 2) for x in (q, own_k, v, local_k, local_v, memory_k, memory_v)
        )
        if self.top_k is None:
            memory_valid = self.memory.valid.repeat_interleave(self.tokens, 1)
            memory_k, memory_v = memory_k.repeat(2, 1, 1, 1), memory_v.repeat(2, 1, 1, 1)
        else:
            memory_k, memory_v = self._select(q, memory_k, memory_v, self.top_k)
            memory_valid = self.memory.valid.any(1, keepdim=True).expand(-1, memory_k.shape[2])
        keys = torch.cat([memory_k, local_k.repeat(2, 1, 1, 1), own_k], dim=2)
        values = torch.cat([memory_v, local_v.repeat(2, 1, 1, 1), own_v], dim=2)
        own_valid = torch.ones(2 * rows, own_k.shape[2], dtype=torch.bool, device=q.device)
        mask = torch.cat([memory_valid.repeat(2, 1), self.local_valid, own_valid], dim=1)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
        bias = bias[:, None, None].expand(-1, q.shape[1], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias).transpose(1, 2)

    def _select(self, q: Tensor, memory_k: Tensor, memory_v: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The top_k blocks of each row and head, by the dot product of mean rotated query and mean rotated key.

        q (2 R, heads, L, head_dim), memory (R, heads, M * T, head_dim) -> keys and values of the blocks, each
        (2 R, heads, top_k * block, head_dim).
        """
        rows, heads, _, head_dim = memory_k.shape
        count = MEMORY_FRAMES * BLOCKS_PER_FRAME
        with torch.no_grad():
            descriptors = memory_k.unflatten(2, (count, -1)).mean(3)  # (R, heads, count, head_dim)
            queries = q.mean(2).unflatten(0, (2, rows))  # (2, R, heads, head_dim)
            scores = torch.einsum("srhd,rhnd->srhn", queries, descriptors)
            if self.selection_noise:
                noise = torch.randn(scores.shape, generator=self.generator, dtype=torch.float32, device="cpu")
                scores = scores + self.selection_noise * scores.std(-1, keepdim=True) * noise.to(scores)
            valid = self.memory.valid.repeat_interleave(BLOCKS_PER_FRAME, 1)
            chosen = scores.masked_fill(~valid[None, :, None], float("-inf")).topk(top_k, dim=-1).indices
            first = torch.arange(rows * heads, dtype=torch.long, device=chosen.device) * count
            base = first.view(rows, heads)
            index = (chosen + base[None, ..., None]).flatten()

        def taken(x: Tensor) -> Tensor:
            return x.reshape(rows * heads * count, -1).index_select(0, index).view(2 * rows, heads, -1, head_dim)

        return taken(memory_k), taken(memory_v)
