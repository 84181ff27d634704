"""The losses of a training step: a batch of random clips, how well it is denoised, and how well prompts find frames.

The model predicts the clean chunk. The denoising loss is that of the velocity, |x0 - target|^2 / max(sigma, 0.1)^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.model.streaming.inputs import pixel_coordinates
from memflow_ops.model.streaming.sampler import shifted
from memflow_ops.model.toy.judge import colour_mask
from memflow_ops.model.toy.language import NOBODY, embed_ids
from memflow_ops.model.toy.schedule import TrainingSettings, TrainingStage
from memflow_ops.model.toy.teacher_forcing import (
    CHUNK_FRAMES,
    TeacherForcedAttention,
    TrainingMemory,
    draw_training_memory,
)
from memflow_ops.model.toy.world import random_clips
from memflow_ops.model.wan.transformer import CausalVideoModel, TextKeysValues

CHUNKS = 8
"""Chunks per training clip."""
TOP_K = 8
"""Blocks of memory that a chunk attends to in steps that select."""
PERTURBED_SHARE, SELECTION_NOISE = 0.3, 0.5
"""The share of the steps whose selection is perturbed, and by how much; see `TeacherForcedAttention`."""


@dataclass(frozen=True)
class TrainingBatch:
    """The clips of one training step. A row is a chunk of a clip; there are R = clips * CHUNKS rows."""

    target: Tensor
    """The clean frames, (R, 3, CHUNK_FRAMES, size, size) in -1..1."""
    ids: Tensor
    """What each chunk's prompt says, (R, 3) int64, as `language.embed_ids` takes it."""
    memory: TrainingMemory
    """The frames that each chunk remembers."""


@dataclass(frozen=True)
class TrainingLosses:
    """Three scalars; `total` is the one to minimise."""

    total: Tensor
    denoising: Tensor
    relevance: Tensor


def draw_batch(clips: int, size: int, generator: torch.Generator) -> TrainingBatch:
    """Random clips of `size` x `size` pixels with their prompts and their memory."""
    drawn = random_clips(clips, CHUNKS, generator, chunk_frames=CHUNK_FRAMES, size=size)
    target = drawn.frames.unflatten(2, (CHUNKS, CHUNK_FRAMES)).transpose(1, 2).flatten(0, 1)
    characters = torch.arange(NOBODY, dtype=torch.long, device="cpu")
    named = (drawn.ids[..., :2, None] == characters).any(-2)  # (clips, CHUNKS, characters)
    return TrainingBatch(target, drawn.ids.flatten(0, 1), draw_training_memory(named, generator))


def training_losses(
    model: CausalVideoModel,
    batch: TrainingBatch,
    stage: TrainingStage,
    settings: TrainingSettings,
    generator: torch.Generator,
) -> TrainingLosses:
    """The losses of one step. `generator` (on the CPU) draws timesteps, noise, and how blocks are selected."""
    device = model.patch_embedding.weight.device
    target, rows = batch.target.to(device), len(batch.target)

    def per_row(level: Tensor) -> Tensor:
        return level[:, None, None, None, None]

    def noise() -> Tensor:
        return torch.randn(target.shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")

    sigma = shifted(uniform(rows), stage.shift).to(device)
    noisy = (1 - per_row(sigma)) * target + per_row(sigma) * noise()
    context_level = settings.context_noise * uniform(rows).to(device) ** 2
    clean = target + per_row(context_level) * noise()

    dense, perturbed = uniform(2).tolist()
    attention = TeacherForcedAttention(
        batch.memory.to(device),
        CHUNKS,
        model.grid(stage.size, stage.size),
        model.config.head_dim,
        top_k=None if dense < settings.dense_share else TOP_K,
        selection_noise=SELECTION_NOISE if perturbed < PERTURBED_SHARE else 0.0,
        generator=generator,
    )
    encoded = model.encode_text(embed_ids(batch.ids).to(device).repeat(2, 1, 1))
    timesteps = torch.cat([torch.zeros_like(sigma), 1000 * sigma])[:, None].expand(-1, CHUNK_FRAMES)
    condition = pixel_coordinates(CHUNK_FRAMES, stage.size, stage.size).to(device)
    x0 = model(torch.cat([clean, noisy]), timesteps, encoded, attention, condition)[rows:]

    weight = 1 / per_row(sigma.clamp(min=0.1)) ** 2
    if stage.foreground:
        mask = colour_mask(target.transpose(1, 2))[:, None]  # (R, 1, CHUNK_FRAMES, size, size)
        weight = weight * (1 + stage.foreground * mask)
    denoising = ((x0 - target) ** 2 * weight).mean()
    own_text = [(keys[rows:], values[rows:]) for keys, values in encoded]
    relevance = relevance_loss(attention.frame_means, own_text, batch.ids.to(device))
    return TrainingLosses(denoising + settings.relevance_weight * relevance, denoising, relevance)


def relevance_loss(frame_means: Sequence[Tensor], text: TextKeysValues, ids: Tensor) -> Tensor:
    """A scalar that teaches the words of a prompt to find the frames which show whom they name.

    frame_means: per layer (R, heads, head_dim), see `TeacherForcedAttention`. text: what `encode_text` gives for the
    prompts of the R rows. ids: what those prompts say, (R, 3) int64.

    The score is that of `cache.policies.Coverage`, word by word. Every frame of the batch is a candidate for every row.
    Each frame that shows the character which a word names must beat the log-sum-exp of all frames that do not. The
    place needs no memory, so its word must prefer no frame. Gradients reach the keys of the self-attention; without
    them the words do not learn to find frames.
    """
    scores = sum(
        torch.einsum("rwhd,fhd->rwf", keys.float(), means.float()) / (means.shape[1] * means.shape[2] ** 0.5)
        for means, (keys, _) in zip(frame_means, text, strict=True)
    )
    assert isinstance(scores, Tensor)  # (R, words, R)
    indifference = scores[:, 0].var(dim=1).mean()
    who = ids[:, :2]
    shown = (who[:, :, None, None] == who[None, None]).any(-1)  # (R, 2, R): does the frame show the word's character?
    scores = scores[:, 1:]
    negatives = scores.masked_fill(shown, float("-inf")).logsumexp(-1, keepdim=True)
    asked = shown & (who != NOBODY)[..., None] & negatives.isfinite()
    loss = F.softplus(torch.where(asked, negatives - scores, 0.0)) * asked
    return loss.sum() / asked.sum().clamp(min=1) + indifference
