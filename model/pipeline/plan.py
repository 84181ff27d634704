"""What a run of stories will make and what it will take, known before anything is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from memflow_ops.environment import device_name, why_not_compile
from memflow_ops.model.checkpoints.pretrained import Pretrained, empty_model
from memflow_ops.model.pipeline.budget import (
    Budget,
    Item,
    Need,
    count_numbers,
    free_bytes,
    free_host_bytes,
    model_items,
    plan_memory,
    size,
    vae_items,
)
from memflow_ops.model.pipeline.settings import FRAMES_PER_PROMPT
from memflow_ops.model.pipeline.sources import Sources
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.streaming.cuda_graphs import why_not
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.text_encoder import find_text_encoder
from memflow_ops.model.wan.vae import find_vae

RESERVE = 20


@dataclass(frozen=True)
class Plan:
    """One story's run, checked, with its memory counted, before anything is generated."""

    prompts: list[str]
    folder: Path
    budget: Budget
    seed: int
    frames_per_prompt: int
    cuda_graphs: bool | None = None
    """as `Streamer` takes it"""
    compiled: bool = False
    """`CausalVideoModel.compile_blocks` has been called"""

    @property
    def settings(self) -> StreamSettings:
        return self.budget.settings

    @property
    def together(self) -> int:
        """How many stories its stream has."""
        return self.budget.layout.batch

    @property
    def spoken(self) -> list[str]:
        """The prompt of every chunk."""
        chunks = chunk_prompts([self.prompts], self.frames_per_prompt, self.settings.chunk_frames)
        return [prompt for (prompt,) in chunks]


@dataclass(frozen=True)
class Free:
    """Memory that was free before anything was loaded, bytes."""

    device: torch.device
    bytes: int
    host_bytes: int | None
    """None where the device is the host"""

    @classmethod
    def now(cls, device: torch.device) -> "Free":
        return cls(device, free_bytes(device), free_host_bytes() if device.type == "cuda" else None)


def make_plans(
    stories: Sequence[Sequence[str]],
    out: Path,
    settings: StreamSettings,
    sources: Sources,
    pretrained: Pretrained,
    free: Free,
    *,
    seed: int = 0,
    frames_per_prompt: int = FRAMES_PER_PROMPT,
    history_frames: int | None = None,
    cuda_graphs: bool | None = None,
    compiled: bool = False,
    batch: int = 1,
) -> list[list[Plan]]:
    """The streams, each of up to `batch` stories with equally many prompts; see `group_stories`.

    One story goes to `out` itself, several to out/story-000, ... with seeds seed, seed + 1, ..., in the order of
    `stories` whoever is streamed with whom.

    A ValueError where a story's stream cannot fit into memory, or CUDA graphs or compiling are asked for and cannot be.
    """
    if compiled and why_not_compile(free.device):
        raise ValueError(f"--compile cannot be: {why_not_compile(free.device)}")
    reason = why_not(free.device, settings)
    if cuda_graphs and reason:
        raise ValueError(f"no CUDA graphs for this stream: {reason}")
    pools = 1 if reason or cuda_graphs is False else 2
    streams = []
    for numbers in group_stories(stories, batch):
        chunks = len(chunk_prompts([stories[numbers[0]]], frames_per_prompt, settings.chunk_frames))

        def plan(count: int) -> Budget:
            return plan_stream(settings, sources, pretrained, free, chunks, history_frames, pools, count)  # noqa: B023

        planned = _planned(plan, len(numbers))
        streams.append(
            [
                Plan(
                    list(stories[i]), out if len(stories) == 1 else out / f"story-{i:03d}", planned, seed + i,
                    frames_per_prompt, cuda_graphs, compiled,
                )
                for i in numbers
            ]
        )  # fmt: skip
    return streams


def group_stories(stories: Sequence[Sequence[str]], batch: int) -> list[list[int]]:
    """The numbers of the stories of every stream: up to `batch` in each, with equally many prompts, so that none has
    to wait for another; in the order of their first ones."""
    by_length: dict[int, list[int]] = {}
    for number, prompts in enumerate(stories):
        by_length.setdefault(len(prompts), []).append(number)
    return sorted(alike[i : i + batch] for alike in by_length.values() for i in range(0, len(alike), batch))


def _planned(plan: Callable[[int], Budget], count: int) -> Budget:
    """The plan of so many stories together; where it does not fit, the error says how many would."""
    try:
        return plan(count)
    except ValueError as error:
        for fewer in range(count - 1, 0, -1):
            try:
                plan(fewer)
            except ValueError:
                continue
            raise ValueError(f"{error}; or lower --batch to {fewer}") from error
        raise


def plan_stream(
    settings: StreamSettings,
    sources: Sources,
    pretrained: Pretrained,
    free: Free,
    chunks: int,
    history_frames: int | None,
    pools: int,
    batch: int,
) -> Budget:
    """The memory of a stream of `batch` stories and `chunks` chunks; a ValueError where it does not fit, or the parts
    not one another.

    pools: of working memory; 2 where CUDA graphs keep one of their own.
    """
    dtype, config = sources.torch_dtype(free.device), pretrained.config
    model = empty_model(config).to(dtype)
    tokens = model.tokens(settings.height, settings.width)
    items = model_items(config, settings, pretrained.parameters, batch, tokens, dtype, pools)
    if sources.vae is not None:
        folder, vae = find_vae(sources.vae)
        channels, scale = vae.get("z_dim", 16), vae.get("scale_factor_spatial", 8)
        if channels != config.out_dim:
            raise ValueError(f"{folder} decodes latents of {channels} channels, the transformer makes {config.out_dim}")
        decoder = count_numbers(folder, ("decoder.", "post_quant_conv."))
        items += vae_items(vae, decoder, batch, settings.height * scale, settings.width * scale, dtype)
    items.append(Item("kept free", free.bytes // RESERVE, f"one part in {RESERVE}: what is estimated may be more"))
    encoder, _ = find_text_encoder(sources.text_encoder)
    text = count_numbers(encoder, ("shared.", "encoder.")) * dtype.itemsize
    if text > free.bytes:
        raise ValueError(f"the text encoder needs {size(text)} on {free.device}, where {size(free.bytes)} are free")
    need = Need(tuple(items), free.bytes, free.host_bytes, f"{free.device} ({device_name(free.device)})")
    prototypes = sum(chunk * settings.chunk_frames >= settings.sink_frames for chunk in range(chunks))
    return plan_memory(settings, lambda s: s.cache_layout(model, batch), prototypes, need, history_frames)
