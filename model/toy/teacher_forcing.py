"""Teacher forcing for the toy world: all chunks of a clip at once, each seeing what it would see in a stream.

Rows are chunks: a batch of B clips of C chunks gives R = B * C of them, twice: first the clean stream (timestep 0,
which provides keys and values as a stream's clean pass does), then the noisy one (which is trained). Both are ordinary
rows of one call of the model; only its injected attention, here, knows how rows belong together. A row attends to

- memory: prototypes (first frames of past chunks) and the sink (the three frames of a first chunk), clean, at any
  distance; on most steps only the top_k best blocks of them, chosen as `memory_attention` does for a whole chunk;
- its local window: the clean chunk before it;
- itself.

Keys are gathered per row; nothing of size sequence x sequence is made.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.model.toy.language import NOBODY
from memflow_ops.model.toy.world import FRAME_SIZE
from memflow_ops.model.wan.transformer import TextKeysValues
from memflow_ops.rotary import rope_rotation, turn_pairs

CHUNK_FRAMES = 3
BANK_FRAMES = 3
SINK_FRAMES = 3
MEMORY_FRAMES = SINK_FRAMES + BANK_FRAMES
BLOCKS_PER_FRAME = 4
LONGEST_GAP = 240
"""Frames by which memory is moved further into the past at most, so that the model meets every distance up to it."""


@dataclass(frozen=True)
class TrainingMemory:
    """What each row remembers: R rows, M = MEMORY_FRAMES frames each."""

    frame: Tensor
    """(R, M) index among the R * CHUNK_FRAMES clean frames"""
    distance: Tensor
    """(R, M) float, frames between the remembered frame and the first frame of the row's chunk"""
    valid: Tensor
    """(R, M) bool; what is not valid is not attended to"""

    def to(self, device: torch.device) -> "TrainingMemory":
        return TrainingMemory(self.frame.to(device), self.distance.to(device), self.valid.to(device))


def draw_training_memory(shows: Tensor, generator: torch.Generator) -> TrainingMemory:
    """Draws the memory of every chunk of a batch of clips.

    shows (B, C, characters) bool: whom each chunk's prompt names.

    Frames of other clips in the batch stand in for a longer past: as long as they show nobody whom the row names, they
    are what a stream's memory is full of, other characters of other looks. The sink is a whole first chunk, the bank
    holds prototypes: mostly those that show who is named (retrieval works), sometimes one of each or by luck.
    """
    clips, chunks = shows.shape[:2]
    rows = clips * chunks

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    named = shows.flatten(0, 1)
    clip = torch.arange(clips).repeat_interleave(chunks)
    chunk = torch.arange(chunks).repeat(clips)
    same_clip = clip[:, None] == clip[None]
    out_of_window = same_clip & (chunk[None] < chunk[:, None] - 1)
    shows_named = (named[:, None] & named[None]).any(-1)  # (R, R)
    foreign = ~same_clip & ~shows_named & (chunk > 0)[:, None]

    # The sink: the clip's own first chunk, or a stranger's, so that a return is often not to be found in the sink.
    first = (chunk == 0)[None]
    own_sink = out_of_window & first & (uniform(rows, 1) < 0.65)
    sink_score = uniform(rows, rows).masked_fill(~((foreign & first) | own_sink), -1) + 2 * own_sink
    sink_best, sink_chunk = sink_score.max(dim=1)
    sink_frame = sink_chunk[:, None] * CHUNK_FRAMES + torch.arange(SINK_FRAMES)

    in_sink = F.one_hot(sink_chunk, rows).bool()  # no frame twice
    own = out_of_window & ~in_sink
    relevant = own & shows_named
    score = uniform(rows, rows)
    mode = uniform(rows, 1)
    one_of_each = torch.zeros(rows, rows, dtype=torch.bool)
    for character in range(named.shape[1]):
        showing = relevant & named[:, None, character] & named[None, :, character]
        one_of_each |= F.one_hot((score * showing).argmax(1), rows).bool() & showing
    preferred = torch.where(mode < 0.55, relevant, (mode < 0.8) & one_of_each)
    score = score + 4 * preferred + 4 * (one_of_each & (mode < 0.8)) + (own & ~relevant) + (relevant & (mode >= 0.8))
    score = score.masked_fill(~(own | (foreign & ~in_sink)), -1)
    bank_best, bank_chunk = score.topk(min(BANK_FRAMES, rows), dim=1)
    if rows < BANK_FRAMES:  # tiny batches in tests
        bank_best = F.pad(bank_best, (0, BANK_FRAMES - rows), value=-1)
        bank_chunk = F.pad(bank_chunk, (0, BANK_FRAMES - rows))
    useful = torch.gather(relevant, 1, bank_chunk)
    bank_valid = (bank_best > 0) & (useful | (uniform(rows, BANK_FRAMES) < 0.85))  # the bank is not always full

    without_memory = uniform(rows, 1) < 0.1
    valid = torch.cat([(sink_best > 0)[:, None].expand(-1, SINK_FRAMES), bank_valid], dim=1) & ~without_memory
    source = torch.cat([sink_chunk[:, None].expand(-1, SINK_FRAMES), bank_chunk], dim=1)
    offset = torch.cat([torch.arange(SINK_FRAMES), torch.zeros(BANK_FRAMES, dtype=torch.long)])
    chunks_back = torch.where(clip[source] == clip[:, None], chunk[:, None] - chunk[source], 2).clamp(min=2)
    gap = torch.randint(0, LONGEST_GAP, (rows, MEMORY_FRAMES), generator=generator)
    gap[:, :SINK_FRAMES] = gap[:, :1]
    gap = gap * (uniform(rows, 1) < 0.8)
    distance = (chunks_back * CHUNK_FRAMES - offset + gap).float()
    return TrainingMemory(torch.cat([sink_frame, bank_chunk * CHUNK_FRAMES], dim=1), distance, valid)


class TeacherForcedAttention:
    """The `attend` of one training step; it also collects what the relevance loss needs.

    top_k: blocks that a row keeps per head, None: all of memory, dense. selection_noise: perturbs the choice, so that
    what is selected is not always best.
    """

    def __init__(
        self,
        plan: TrainingMemory,
        chunks: int,
        grid: tuple[int, int],
        head_dim: int,
        *,
        top_k: int | None,
        selection_noise: float = 0.0,
        generator: torch.Generator | None = None,
        full_grid: int = FRAME_SIZE // 4,
    ):
        self.plan, self.top_k, self.selection_noise, self.generator = plan, top_k, selection_noise, generator
        self.frame_means: list[Tensor] = []
        """Per layer (R, heads, head_dim): the mean un-rotated key of each clean chunk's first frame."""
        device = plan.frame.device
        rows, columns = (torch.arange(n, device=device) for n in grid)
        # On a coarser grid tokens stand further apart, so that distances mean the same at every resolution.
        rows, columns = rows * (full_grid / grid[0]), columns * (full_grid / grid[1])
        here = torch.arange(CHUNK_FRAMES, device=device)
        self.own_turn, self.local_turn, self.memory_turn = (
            torch.complex(*rope_rotation(head_dim, frames, rows, columns))
            for frames in (here, here - CHUNK_FRAMES, -plan.distance)
        )
        self.tokens = grid[0] * grid[1]
        has_past = torch.arange(len(plan.frame), device=device) % chunks > 0
        self.local_valid = torch.cat([has_past, has_past])[:, None].expand(-1, CHUNK_FRAMES * self.tokens)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (2 R, CHUNK_FRAMES * T, heads, head_dim), clean rows first -> like q."""
        rows = len(self.plan.frame)
        clean_k, clean_v = k[:rows], v[:rows]
        self.frame_means.append(clean_k[:, : self.tokens].mean(1))

        q, own_k = turn_pairs(q, self.own_turn), turn_pairs(k, self.own_turn)
        local_k = turn_pairs(clean_k.roll(1, 0), self.local_turn)
        local_v = clean_v.roll(1, 0)
        index = self.plan.frame.flatten()
        memory_k, memory_v = (
            x.reshape(rows * CHUNK_FRAMES, -1).index_select(0, index).view(rows, -1, *x.shape[2:])
            for x in (clean_k, clean_v)
        )  # (R, M * T, heads, head_dim)
        memory_k = turn_pairs(memory_k, self.memory_turn)

        q, own_k, own_v, local_k, local_v, memory_k, memory_v = (
            x.transpose(1, 2) for x in (q, own_k, v, local_k, local_v, memory_k, memory_v)
        )
        if self.top_k is None:
            memory_valid = self.plan.valid.repeat_interleave(self.tokens, 1)
            memory_k, memory_v = memory_k.repeat(2, 1, 1, 1), memory_v.repeat(2, 1, 1, 1)
        else:
            memory_k, memory_v = self._select(q, memory_k, memory_v, self.top_k)
            memory_valid = self.plan.valid.any(1, keepdim=True).expand(-1, memory_k.shape[2])
        keys = torch.cat([memory_k, local_k.repeat(2, 1, 1, 1), own_k], dim=2)
        values = torch.cat([memory_v, local_v.repeat(2, 1, 1, 1), own_v], dim=2)
        own_valid = torch.ones(2 * rows, own_k.shape[2], dtype=torch.bool, device=q.device)
        mask = torch.cat([memory_valid.repeat(2, 1), self.local_valid, own_valid], dim=1)
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        bias = bias[:, None, None].expand(-1, q.shape[1], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias).transpose(1, 2)

    def _select(self, q: Tensor, memory_k: Tensor, memory_v: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The top_k blocks of each row and head by mean rotated query . mean rotated key.

        q (2 R, heads, L, head_dim), memory (R, heads, M * T, head_dim) -> twice (2 R, heads, top_k * block, head_dim).
        """
        rows, heads, _, head_dim = memory_k.shape
        count = MEMORY_FRAMES * BLOCKS_PER_FRAME
        with torch.no_grad():
            descriptors = memory_k.unflatten(2, (count, -1)).mean(3)  # (R, heads, count, head_dim)
            queries = q.mean(2).unflatten(0, (2, rows))  # (2, R, heads, head_dim)
            scores = torch.einsum("srhd,rhnd->srhn", queries, descriptors)
            if self.selection_noise:
                noise = torch.randn(scores.shape, generator=self.generator).to(scores)
                scores = scores + self.selection_noise * scores.std(-1, keepdim=True) * noise
            valid = self.plan.valid.repeat_interleave(BLOCKS_PER_FRAME, 1)
            chosen = scores.masked_fill(~valid[None, :, None], float("-inf")).topk(top_k, dim=-1).indices
            base = (torch.arange(rows)[:, None] * heads + torch.arange(heads)).to(chosen.device) * count
            index = (chosen + base[None, ..., None]).flatten()

        def taken(x: Tensor) -> Tensor:
            return x.reshape(rows * heads * count, -1).index_select(0, index).view(2 * rows, heads, -1, head_dim)

        return taken(memory_k), taken(memory_v)


def relevance_loss(frame_means: list[Tensor], text: TextKeysValues, ids: Tensor) -> Tensor:
    """Teaches the words of a prompt to find the frames that show whom they name; a scalar.

    frame_means: per layer (R, heads, head_dim) · text: `encode_text` of the R rows' prompts · ids (R, 3): what they say
    The score is that of `memflow_ops.retrieval.Coverage`, word by word. Every frame of the batch is a candidate for
    every row: each frame that shows the character a word names must beat the log-sum-exp of all that do not, and the
    place, which needs no memory, must prefer none. Gradients reach the keys of the self-attention: without that it
    does not learn.
    """
    scores = sum(
        torch.einsum("rwhd,fhd->rwf", keys.float(), means.float()) / (means.shape[1] * means.shape[2] ** 0.5)
        for means, (keys, _) in zip(frame_means, text, strict=True)
    )
    assert isinstance(scores, Tensor)  # (R, words, R)
    indifference = scores[:, 0].var(dim=1).mean()
    who = ids[:, :2]
    shown = (who[:, :, None, None] == who[None, None]).any(-1)  # (R, 2, R): does that frame show that word's character?
    scores = scores[:, 1:]
    negatives = scores.masked_fill(shown, float("-inf")).logsumexp(-1, keepdim=True)
    asked = shown & (who != NOBODY)[..., None] & negatives.isfinite()
    loss = F.softplus(torch.where(asked, negatives - scores, 0.0)) * asked
    return loss.sum() / asked.sum().clamp(min=1) + indifference
