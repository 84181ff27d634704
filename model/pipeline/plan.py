"""The streams that a file of stories needs: checked, and with their memory counted, before any weights are loaded."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from memflow_ops.cache.chosen import choice_bytes
from memflow_ops.cache.released_layout import BankSchedule
from memflow_ops.environment import why_not_compile
from memflow_ops.model.checkpoints.containers import count_numbers
from memflow_ops.model.checkpoints.fingerprint import fingerprint_of_files
from memflow_ops.model.checkpoints.native import empty_model
from memflow_ops.model.checkpoints.pretrained import Pretrained
from memflow_ops.model.parallel.ranks import check_ranks
from memflow_ops.model.pipeline.budget import (
    Budget,
    Disk,
    FreeMemory,
    Item,
    fit_history,
    model_items,
    size,
    vae_items,
)
from memflow_ops.model.pipeline.settings import FRAMES_PER_PROMPT
from memflow_ops.model.pipeline.sources import Sources
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.stories.snapshots import HistoryOptions, Snapshots, run_in
from memflow_ops.model.streaming.cuda_graphs import why_not_record
from memflow_ops.model.streaming.inputs import find_condition
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.text_encoder import find_text_encoder
from memflow_ops.model.wan.vae import find_vae

VAE_NAMES = ("decoder.", "post_quant_conv.", "conv2.")
TEXT_ENCODER_NAMES = ("shared.", "encoder.", "token_embedding.", "blocks.", "norm.")
"""Beginnings of the names of the weights that are used, in diffusers and transformers and in Wan's own release."""
RESERVE = 20
"""One part in so many of the free memory is kept free, because some of the budget is estimated."""


@dataclass(frozen=True)
class StreamOptions:
    """What a command asks of all streams beside their `StreamSettings`."""

    seed: int = 0
    """Of the first story; the next ones count up."""
    frames_per_prompt: int = FRAMES_PER_PROMPT
    """Latent frames under one prompt."""
    history_frames: int | None = None
    """Prototypes that are remembered at most; None: all."""
    cuda_graphs: bool | None = None
    """As for `Streamer`."""
    compiled: bool = False
    """Whether `CausalVideoModel.compile_blocks` is called."""
    batch: int = 1
    """Stories that are streamed together at most."""
    bank_schedule: BankSchedule | None = None
    """Of memory="released". None: as the authors' programs do, "interactive" for a story of several prompts and
    "single-prompt" for a story of one."""
    ranks: int = 1
    """Processes that make each video together; see `memflow_ops.model.parallel`."""
    shard_weights: bool = False
    """Whether they share the weights too."""
    history: HistoryOptions | None = None
    """What is kept on disk; None: nothing."""

    def for_story(self, settings: StreamSettings, prompts: Sequence[str]) -> StreamSettings:
        """The settings of the stream of a story with these prompts."""
        if settings.memory != "released":
            return settings
        usual: BankSchedule = "interactive" if len(prompts) > 1 else "single-prompt"
        return replace(settings, bank_schedule=self.bank_schedule or usual)


@dataclass(frozen=True)
class WanPlan:
    """One story that is to be streamed from a real checkpoint."""

    prompts: list[str]
    folder: Path
    """For its files."""
    budget: Budget
    """Of the stream that it is part of."""
    seed: int
    options: StreamOptions
    below: Path = Path()
    """The folder of its stream below the one of all files, and of its snapshots below that of all histories."""
    snapshots: Snapshots | None = None
    """Of its stream; keep the history on disk, and what an interrupted run goes on from."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """The fingerprint of the weights of each part, where the run may be gone on with."""

    @property
    def settings(self) -> StreamSettings:
        return self.budget.settings

    @property
    def together(self) -> int:
        """How many stories its stream has."""
        return self.budget.layout.batch

    @property
    def prompts_by_chunk(self) -> list[str]:
        """The prompt of every chunk."""
        chunks = chunk_prompts([self.prompts], self.options.frames_per_prompt, self.settings.chunk_frames)
        return [prompt for (prompt,) in chunks]


def plan_streams(
    stories: Sequence[Sequence[str]],
    out: Path,
    settings: StreamSettings,
    sources: Sources,
    pretrained: Pretrained,
    free: FreeMemory,
    options: StreamOptions,
) -> list[list[WanPlan]]:
    """The plans of every stream. A stream has up to `options.batch` stories; see `group_stories`.

    One story goes to `out` itself, several to out/story-000, out/story-001, ..., each with a seed of its own, in the
    order of `stories` whichever are streamed together.

    A ValueError where a stream does not fit into memory, where CUDA graphs or compiling are required and impossible, or
    where the attention heads cannot be dealt out to the processes.
    """
    check_ranks(pretrained.config.num_heads, options.ranks)
    if options.compiled and why_not_compile(free.device):
        raise ValueError(f"--compile cannot be: {why_not_compile(free.device)}")
    reason = why_not_record(free.device, settings, options.ranks)
    if options.cuda_graphs and reason:
        raise ValueError(f"no CUDA graphs for this stream: {reason}")
    streams = []
    weights = {} if options.history is None else fingerprints(sources, pretrained)
    for numbers in group_stories(stories, options.batch):
        prompts = chunk_prompts([stories[numbers[0]]], options.frames_per_prompt, settings.chunk_frames)
        own = options.for_story(settings, stories[numbers[0]])

        folders = story_folders(stories, out)
        below = folders[numbers[0]].relative_to(out)
        disk = _disk(options.history, below, options.ranks)

        def budget_of(
            batch: int, chunks: int = len(prompts), own: StreamSettings = own, disk: Disk | None = disk
        ) -> Budget:
            return stream_budget(own, sources, pretrained, free, options, chunks, batch, disk)

        budget = _budget_or_advice(budget_of, len(numbers))
        streams.append(
            [
                WanPlan(list(stories[i]), folders[i], budget, options.seed + i, options, below, weights=weights)
                for i in numbers
            ]
        )
    return streams


def open_snapshots(plans: Sequence[WanPlan], sources: Sources, device: torch.device) -> list[WanPlan]:
    """The plans of a stream with its snapshots, opened and, where it goes on, found. A ValueError where the folder
    cannot be used, or holds another run. Where no history is kept, the plans as they are."""
    options = plans[0].options
    if options.history is None:
        return list(plans)
    snapshots = options.history.snapshots(plans[0].below)
    try:
        snapshots.begin(identity(plans, sources, device), options.history.resume)
        snapshots.check_made(plan.folder / "video.mp4" for plan in plans)
    except BaseException:
        snapshots.close()
        raise
    return [replace(plan, snapshots=snapshots) for plan in plans]


def identity(plans: Sequence[WanPlan], sources: Sources, device: torch.device) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with."""
    options = plans[0].options
    return {
        "prompts": [plan.prompts for plan in plans],
        "seed": [plan.seed for plan in plans],
        "frames_per_prompt": options.frames_per_prompt,
        "history_frames": options.history_frames,
        **{f"weights of the {part}": mark for part, mark in plans[0].weights.items()},
        "settings": asdict(plans[0].settings),
        "sources": {name: value for name, value in sources.described().items() if name != "dtype"},
        "dtype": str(sources.torch_dtype(device)),
        "device": device.type,
        "compiled": options.compiled,
    }


def fingerprints(sources: Sources, pretrained: Pretrained) -> dict[str, str]:
    """Of the weights of every part: marks by which others under the same name are known."""
    encoder, _ = find_text_encoder(sources.text_encoder)
    marks = {
        "transformer": pretrained.fingerprint(),
        "text encoder": fingerprint_of_files(encoder, ("model",), TEXT_ENCODER_NAMES),
    }
    if sources.vae is not None:
        marks["VAE"] = fingerprint_of_files(find_vae(sources.vae)[0], ("diffusion_pytorch_model",), VAE_NAMES)
    return marks


def _disk(history: HistoryOptions | None, below: Path, processes: int) -> Disk | None:
    """The folder of a stream's history, with what is free there; None where none is kept. processes: that make it."""
    if history is None:
        return None
    folder = history.folder / below
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    # What an unfinished run has there already is not free, and is part of what the whole run needs.
    own = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    found = run_in(folder) if history.resume else None
    divided = None
    if found is not None:
        tiers = [found["run"].get("settings", {}).get(f"{tier}_frames") for tier in ("device", "host", "disk")]
        divided = (tiers[0], tiers[1], tiers[2]) if all(isinstance(frames, int) for frames in tiers) else None
        if divided is not None and divided[2] and processes > 1:
            raise ValueError(
                f"the run in {folder} keeps {divided[2]} past frames on disk alone, which only one process does: go on "
                f"with one"
            )
    free = shutil.disk_usage(there).free + own
    return Disk(folder, free, history.device_frames, history.host_frames, divided, processes)


def story_folders(stories: Sequence[Sequence[str]], out: Path) -> list[Path]:
    """The folder of every story: `out` itself for a single one."""
    return [out] if len(stories) == 1 else [out / f"story-{i:03d}" for i in range(len(stories))]


def group_stories(stories: Sequence[Sequence[str]], batch: int) -> list[list[int]]:
    """The numbers of the stories of every stream: up to `batch` in each, with equally many prompts, so that none has
    to wait for another. Streams are ordered by their first stories."""
    by_length: dict[int, list[int]] = {}
    for number, prompts in enumerate(stories):
        by_length.setdefault(len(prompts), []).append(number)
    return sorted(alike[i : i + batch] for alike in by_length.values() for i in range(0, len(alike), batch))


def _budget_or_advice(budget_of: Callable[[int], Budget], batch: int) -> Budget:
    """The budget of a stream of `batch` stories. Where it does not fit, the ValueError says how many would."""
    try:
        return budget_of(batch)
    except ValueError as error:
        for fewer in range(batch - 1, 0, -1):
            try:
                budget_of(fewer)
            except ValueError:
                continue
            raise ValueError(f"{error}; or lower --batch to {fewer}") from error
        raise


def stream_budget(
    settings: StreamSettings,
    sources: Sources,
    pretrained: Pretrained,
    free: FreeMemory,
    options: StreamOptions,
    chunks: int,
    batch: int,
    disk: Disk | None = None,
) -> Budget:
    """The memory of a stream of `batch` stories and `chunks` chunks. disk: as for
    `fit_history`. A ValueError where it does not fit, or where the
    parts of the pipeline do not fit one another."""
    dtype, config = sources.torch_dtype(free.device), pretrained.config
    find_condition(
        config, settings, settings.chunk_frames
    )  # refuses what a stream cannot give the model, a picture for one
    model = empty_model(config).to(dtype)
    tokens = model.tokens(settings.height, settings.width)
    records = options.cuda_graphs is not False and not why_not_record(free.device, settings, options.ranks)
    pools = 2 if records else 1
    items = model_items(
        config, settings, pretrained.parameters, batch, tokens, dtype, pools, options.ranks, options.shard_weights
    )
    if settings.memory == "memflow" and settings.reselect == "chunk":
        layout = settings.cache_layout(model, batch, free.device, options.ranks)
        items.append(Item("choices that are kept", choice_bytes(layout, settings.top_k, settings.query_group)))
    if sources.vae is not None:
        folder, vae = find_vae(sources.vae)
        channels, scale = vae.get("z_dim", 16), vae.get("scale_factor_spatial", 8)
        if channels != config.out_dim:
            raise ValueError(f"{folder} decodes latents of {channels} channels, the transformer makes {config.out_dim}")
        decoder = count_numbers(folder, ("diffusion_pytorch_model",), VAE_NAMES)
        items += vae_items(vae, decoder, batch, settings.height * scale, settings.width * scale, dtype)
    items.append(Item("kept free", free.bytes // RESERVE, f"one part in {RESERVE}: what is estimated may be more"))
    encoder, _ = find_text_encoder(sources.text_encoder)
    text = count_numbers(encoder, ("model",), TEXT_ENCODER_NAMES) * dtype.itemsize
    if text > free.bytes:
        raise ValueError(f"the text encoder needs {size(text)} on {free.device}, where {size(free.bytes)} are free")
    prototypes = settings.prototypes(chunks)
    return fit_history(
        settings,
        lambda s: s.cache_layout(model, batch, free.device, options.ranks),
        prototypes,
        items,
        free,
        options.history_frames,
        disk,
    )
