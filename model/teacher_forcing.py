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

from memflow_ops.model.transformer import TextKeysValues, rope_rotation
from memflow_ops.model.world import EMPTY_INDEX, FRAME_SIZE

CHUNK_FRAMES = 3
BANK_FRAMES = 3
SINK_FRAMES = 3
MEMORY_FRAMES = SINK_FRAMES + BANK_FRAMES
BLOCKS_PER_FRAME = 4
LONGEST_GAP = 240
"""Frames by which memory is moved further into the past at most, so that the model meets every distance up to it."""


@dataclass(frozen=True)
class MemoryPlan:
    """What each row remembers: R rows, M = MEMORY_FRAMES frames each."""

    frame: Tensor
    """(R, M) index among the R * CHUNK_FRAMES clean frames"""
    distance: Tensor
    """(R, M) float, frames between the remembered frame and the first frame of the row's chunk"""
    valid: Tensor
    """(R, M) bool; what is not valid is not attended to"""


def plan_memory(who: Tensor, recached: Tensor, generator: torch.Generator) -> MemoryPlan:
    """Draws the memory of every chunk of a batch of clips.

    who (B, C) characters · recached (B, C) bool: chunks whose clean keys carry the next chunk's prompt, which a stream
    never remembers.

    Frames of other clips in the batch stand in for a longer past: as long as they do not show the row's own character
    they are what a stream's memory is full of, other characters of other hues. The sink is a whole first chunk, the
    bank holds prototypes: mostly those that show the named character (retrieval works), sometimes one or by luck.
    """
    clips, chunks = who.shape
    rows = clips * chunks

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    flat_who = who.flatten()
    clip = torch.arange(clips).repeat_interleave(chunks)
    chunk = torch.arange(chunks).repeat(clips)
    showable = ~recached.flatten()[None]  # (1, R) as a remembered chunk
    same_clip = clip[:, None] == clip[None]
    out_of_window = same_clip & (chunk[None] < chunk[:, None] - 1) & showable
    shows_named = (flat_who[:, None] == flat_who[None]) & (flat_who != EMPTY_INDEX)[:, None]
    foreign = ~same_clip & (flat_who[:, None] != flat_who[None]) & showable & (chunk > 0)[:, None]

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
    one_relevant = F.one_hot((score * relevant).argmax(1), rows).bool() & relevant
    preferred = torch.where(mode < 0.55, relevant, (mode < 0.8) & one_relevant)
    score = score + 4 * preferred + (own & ~relevant) + (relevant & (mode >= 0.8))
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
    return MemoryPlan(torch.cat([sink_frame, bank_chunk * CHUNK_FRAMES], dim=1), distance, valid)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE as one complex product, faster to train through than `transformer.apply_rotation`, and the same numbers.

    x (B, tokens, heads, head_dim) float32 · turn (B or 1, tokens, 1, head_dim / 2) complex.
    """
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class TeacherForcedAttention:
    """The `attend` of one training step; it also collects what the relevance loss needs.

    recached (R,) bool: chunks whose clean pass is that of a prompt switch. top_k: blocks that a row keeps per head,
    None: all of memory, dense. selection_noise: perturbs the choice, so that what is selected is not always best.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        chunks: int,
        grid: tuple[int, int],
        head_dim: int,
        *,
        recached: Tensor | None = None,
        top_k: int | None,
        selection_noise: float = 0.0,
        generator: torch.Generator | None = None,
        full_grid: int = FRAME_SIZE // 4,
    ):
        self.plan, self.top_k, self.selection_noise, self.generator = plan, top_k, selection_noise, generator
        self.frame_means: list[Tensor] = []
        """Per layer (R, heads, head_dim): the mean un-rotated key of each clean chunk's first frame."""
        rows, columns = (torch.arange(n) for n in grid)
        # On a coarser grid tokens stand further apart, so that distances mean the same at every resolution.
        rows, columns = rows * (full_grid / grid[0]), columns * (full_grid / grid[1])
        here = torch.arange(CHUNK_FRAMES)
        self.own_turn, self.local_turn, self.memory_turn = (
            torch.complex(*rope_rotation(head_dim, frames, rows, columns))
            for frames in (here, here - CHUNK_FRAMES, -plan.distance)
        )
        self.tokens = grid[0] * grid[1]
        has_past = torch.arange(len(plan.frame)) % chunks > 0
        # Re-caching starts with an empty window: such a chunk's clean pass does not see the chunk before it.
        clean_has_past = has_past if recached is None else has_past & ~recached
        self.local_valid = torch.cat([clean_has_past, has_past])[:, None].expand(-1, CHUNK_FRAMES * self.tokens)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (2 R, CHUNK_FRAMES * T, heads, head_dim), clean rows first -> like q."""
        rows = len(self.plan.frame)
        clean_k, clean_v = k[:rows], v[:rows]
        self.frame_means.append(clean_k[:, : self.tokens].mean(1))

        q, own_k = turned(q, self.own_turn), turned(k, self.own_turn)
        local_k = turned(clean_k.roll(1, 0), self.local_turn)
        local_v = clean_v.roll(1, 0)
        index = self.plan.frame.flatten()
        memory_k, memory_v = (
            x.reshape(rows * CHUNK_FRAMES, -1).index_select(0, index).view(rows, -1, *x.shape[2:])
            for x in (clean_k, clean_v)
        )  # (R, M * T, heads, head_dim)
        memory_k = turned(memory_k, self.memory_turn)

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
        own_valid = torch.ones(2 * rows, own_k.shape[2], dtype=torch.bool)
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
                noise = torch.randn(scores.shape, generator=self.generator)
                scores = scores + self.selection_noise * scores.std(-1, keepdim=True) * noise
            valid = self.plan.valid.repeat_interleave(BLOCKS_PER_FRAME, 1)
            chosen = scores.masked_fill(~valid[None, :, None], float("-inf")).topk(top_k, dim=-1).indices
            base = (torch.arange(rows)[:, None] * heads + torch.arange(heads)) * count
            index = (chosen + base[None, ..., None]).flatten()

        def taken(x: Tensor) -> Tensor:
            return x.reshape(rows * heads * count, -1).index_select(0, index).view(2 * rows, heads, -1, head_dim)

        return taken(memory_k), taken(memory_v)


def relevance_loss(frame_means: list[Tensor], text: TextKeysValues, who: Tensor, usable: Tensor) -> Tensor:
    """Teaches the text keys to find the frames that show whom they name; a scalar.

    frame_means: per layer (R, heads, head_dim) · text: `encode_text` of the R rows' prompts · who (R,) · usable (R,)
    bool: which frames may be candidates. Every frame of the batch is a candidate for every row. The score is
    `frame_relevance`'s linear one, summed over layers; each frame that shows the named character must beat the
    log-sum-exp of all that do not. Gradients reach the keys of the self-attention: without that it does not learn.
    """
    scores = torch.zeros(len(who), len(who))
    for means, (text_keys, _) in zip(frame_means, text, strict=True):
        queries = text_keys.mean(1)  # over the prompt's words
        heads, head_dim = queries.shape[1:]
        scores = scores + queries.flatten(1).float() @ means.flatten(1).float().T / (heads * head_dim**0.5)
    same = who[:, None] == who[None]
    negatives = scores.masked_fill(same | ~usable[None], float("-inf")).logsumexp(1, keepdim=True)
    asked = same & usable[None] & (who != EMPTY_INDEX)[:, None] & negatives.isfinite()
    loss = F.softplus(torch.where(asked, negatives - scores, 0.0)) * asked
    return loss.sum() / asked.sum().clamp(min=1)
