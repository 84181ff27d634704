"""Videos from real checkpoints: transformer, UMT5 and VAE from disk, a stream of chunks, an mp4 at 16 frames/s."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memflow_ops.environment import device_name, environment, why_not_compile
from memflow_ops.model import budget, graphs
from memflow_ops.model.convert import DTYPES, Pretrained, empty_model, read_pretrained
from memflow_ops.model.generate import to_pixels
from memflow_ops.model.settings import StreamSettings
from memflow_ops.model.story import Interrupts, make_stories
from memflow_ops.model.stream import Chunk, Streamer, chunk_prompts
from memflow_ops.model.text_encoder import EncodedPrompts, UMT5TextEncoder, find_text_encoder
from memflow_ops.model.transformer import CausalVideoModel
from memflow_ops.model.vae import StreamingDecoder, find_vae, load_vae
from memflow_ops.model.video import VideoWriter

FRAMES_PER_SECOND = 16
FRAMES_PER_PROMPT = 40
"""Latent frames, 10 seconds, as MemFlow and LongLive train."""
HOW_MEASURED = (
    "Video frames, of all stories that are streamed together, over a chunk's wall time: retrieval, re-caching and all "
    "passes of the transformer; decoded: and of the VAE. Medians over chunks that have a past beyond the local window."
)
WAN_SETTINGS = StreamSettings(
    height=60, width=104, window_frames=9, bank_frames=64, device_frames=128, top_k=24, block_size=64, query_group=128,
    steps=4, shift=5.0, stochastic=True,
)  # fmt: skip
"""What few-step checkpoints of the Wan 2.1 family are streamed with; height and width of the latents of 480 x 832."""
RESERVE = 20
"""The part of the free memory that is not planned with, 1 / RESERVE."""
OF_A_KIND: dict[str, dict[str, Any]] = {"released": {"bank_frames": 3}}
"""What is otherwise with a kind of memory."""


@dataclass(frozen=True)
class Sources:
    """Where a pipeline's parts lie on disk, and what their files do not say."""

    checkpoint: Path
    text_encoder: Path
    vae: Path | None
    """None where nothing is to be decoded"""
    lora: Path | None = None
    lora_alpha: float | None = None
    num_heads: int | None = None
    dtype: str = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU"""

    def check(self) -> None:
        """Everything that can be seen without reading weights; FileNotFoundError or ValueError."""
        find_text_encoder(self.text_encoder)
        if self.vae is not None:
            find_vae(self.vae)
        for path in (self.checkpoint, self.lora):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"no weights at {path}")
        self.torch_dtype(torch.device("cpu"))

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {self.dtype!r}")
        return DTYPES[self.dtype]

    def read(self) -> Pretrained:
        """The transformer's weights, in host memory."""
        options = {"lora": self.lora, "lora_alpha": self.lora_alpha, "num_heads": self.num_heads}
        return read_pretrained(self.checkpoint, **options)  # type: ignore[arg-type]

    def described(self) -> dict[str, object]:
        """As result files name them: without the folders above, which are the user's own business."""
        return {name: value.name if isinstance(value, Path) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Plan:
    """One story's run, checked, with its memory counted, before anything is generated."""

    prompts: list[str]
    folder: Path
    budget: budget.Budget
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
        return cls(device, budget.free_bytes(device), budget.free_host_bytes() if device.type == "cuda" else None)


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
    reason = graphs.why_not(free.device, settings)
    if cuda_graphs and reason:
        raise ValueError(f"no CUDA graphs for this stream: {reason}")
    pools = 1 if reason or cuda_graphs is False else 2
    streams = []
    for numbers in group_stories(stories, batch):
        chunks = len(chunk_prompts([stories[numbers[0]]], frames_per_prompt, settings.chunk_frames))

        def plan(count: int) -> budget.Budget:
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


def _planned(plan: Callable[[int], budget.Budget], count: int) -> budget.Budget:
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


def latent_size(vae: Path | None, height: int, width: int) -> tuple[int, int]:
    """Pixels -> rows and columns of latents; a ValueError where they do not divide into the patches of Wan."""
    scale = find_vae(vae)[1].get("scale_factor_spatial", 8) if vae is not None else 8
    if height % (2 * scale) or width % (2 * scale):
        raise ValueError(f"height and width must be multiples of {2 * scale} pixels, got {height} x {width}")
    return height // scale, width // scale


def plan_stream(
    settings: StreamSettings,
    sources: Sources,
    pretrained: Pretrained,
    free: Free,
    chunks: int,
    history_frames: int | None,
    pools: int,
    batch: int,
) -> budget.Budget:
    """The memory of a stream of `batch` stories and `chunks` chunks; a ValueError where it does not fit, or the parts
    not one another.

    pools: of working memory; 2 where CUDA graphs keep one of their own.
    """
    dtype, config = sources.torch_dtype(free.device), pretrained.config
    model = empty_model(config).to(dtype)
    tokens = model.tokens(settings.height, settings.width)
    items = budget.model_items(config, settings, pretrained.parameters, batch, tokens, dtype, pools)
    if sources.vae is not None:
        folder, vae = find_vae(sources.vae)
        channels, scale = vae.get("z_dim", 16), vae.get("scale_factor_spatial", 8)
        if channels != config.out_dim:
            raise ValueError(f"{folder} decodes latents of {channels} channels, the transformer makes {config.out_dim}")
        decoder = budget.count_numbers(folder, ("decoder.", "post_quant_conv."))
        items += budget.vae_items(vae, decoder, batch, settings.height * scale, settings.width * scale, dtype)
    items.append(
        budget.Item("kept free", free.bytes // RESERVE, f"one part in {RESERVE}: what is estimated may be more")
    )
    encoder, _ = find_text_encoder(sources.text_encoder)
    text = budget.count_numbers(encoder, ("shared.", "encoder.")) * dtype.itemsize
    if text > free.bytes:
        raise ValueError(
            f"the text encoder needs {budget.size(text)} on {free.device}, where {budget.size(free.bytes)} are free"
        )
    need = budget.Need(tuple(items), free.bytes, free.host_bytes, f"{free.device} ({device_name(free.device)})")
    prototypes = sum(chunk * settings.chunk_frames >= settings.sink_frames for chunk in range(chunks))
    return budget.plan_memory(settings, lambda s: s.cache_layout(model, batch), prototypes, need, history_frames)


@dataclass(frozen=True)
class Parts:
    """What a stream needs, on its device."""

    model: CausalVideoModel
    vae: Any
    """None where the sources name none"""
    encode: EncodedPrompts

    @property
    def device(self) -> torch.device:
        return self.model.patch_embedding.weight.device


def load_parts(
    sources: Sources, pretrained: Pretrained, prompts: Sequence[str], device: torch.device, compiled: bool = False
) -> Parts:
    """Encodes every prompt, lets the text encoder go, and puts transformer and decoder on the device.

    compiled: the transformer's blocks are, when they first run.
    """
    dtype = sources.torch_dtype(device)
    config = pretrained.config
    encoder = UMT5TextEncoder.from_folder(sources.text_encoder, text_len=config.text_len, dtype=dtype, device=device)
    width = encoder.model.config.d_model
    if width != config.text_dim:
        raise ValueError(
            f"{sources.text_encoder} makes embeddings {width} wide, the transformer takes {config.text_dim}"
        )
    encode = EncodedPrompts(encoder, prompts)
    del encoder
    model = pretrained.build(dtype, device)
    if compiled:
        model.compile_blocks()
    vae = load_vae(sources.vae, dtype, device) if sources.vae is not None else None
    return Parts(model, vae, encode)


@dataclass
class Run:
    """A story as far as it has been made."""

    plan: Plan
    sources: Sources
    device: torch.device
    chunks: list[Chunk] = field(default_factory=list)
    """its part of them, without frames; their seconds are those of all stories together"""
    decode_seconds: list[float] = field(default_factory=list)
    """per chunk, of all stories together"""
    frames: int = 0
    """of the video"""
    interrupted: bool = False
    error: str | None = None

    def speed(self) -> dict[str, object] | None:
        return speed(self.chunks, self.decode_seconds, self.plan.settings, self.plan.together)

    def record(self) -> dict[str, object]:
        """What run.json says."""
        plan = self.plan
        return {
            **environment(self.device),
            "prompts": plan.prompts,
            "seed": plan.seed,
            "frames_per_prompt": plan.frames_per_prompt,
            "sources": self.sources.described(),
            "settings": asdict(plan.settings),
            "memory": plan.budget.lines(),
            "compiled": plan.compiled,
            "stories_together": plan.together,
            "frames": self.frames,
            "fps": FRAMES_PER_SECOND,
            "interrupted": self.interrupted,
            "error": self.error,
            "speed": self.speed(),
            "chunks": [
                {
                    "chunk": chunk.index,
                    "first_frame": chunk.first_frame,
                    "prompt": chunk.prompts[0],
                    "seconds": chunk.seconds,
                    "decode_seconds": decoding,
                    "replayed": chunk.replayed,
                    "retrieved": chunk.retrieved[0],
                    "relevance": chunk.relevance[0],
                    "candidates": chunk.candidates[0],
                    "activation": chunk.activation[0],
                }
                for chunk, decoding in zip(self.chunks, self.decode_seconds, strict=True)
            ],
        }


def speed(
    chunks: Sequence[Chunk], decode_seconds: Sequence[float], settings: StreamSettings, together: int = 1
) -> dict[str, object] | None:
    """Medians over the chunks that have a past beyond the local window; None before there is one."""
    steady = [i for i, chunk in enumerate(chunks) if chunk.first_frame + settings.chunk_frames > settings.window_frames]
    if not steady:
        return None
    seconds = statistics.median(chunks[i].seconds for i in steady)
    decoding = statistics.median(decode_seconds[i] for i in steady)
    frames = 4 * settings.chunk_frames * together
    return {
        "seconds_per_chunk": seconds,
        "decode_seconds_per_chunk": decoding,
        "frames_per_second": frames / seconds,
        "frames_per_second_decoded": frames / (seconds + decoding),
        "chunks": len(steady),
        "how": HOW_MEASURED,
    }


def generate(
    parts: Parts, plans: Sequence[Plan], sources: Sources, report: Callable[[Run], None] | None = None
) -> list[Run]:
    """Streams stories together, each into video.mp4 and run.json in its folder; `make_stories` says how that may end.
    `report` is told the first of the runs after every chunk."""
    runs = [Run(plan, sources, parts.device) for plan in plans]
    writers = [video_writer(plan.folder / "video.mp4", plan.settings, parts.vae) for plan in plans]

    def rounds(interrupts: Interrupts) -> Iterator[None]:
        for chunk, videos, seconds in streamed(parts, plans, interrupts):
            for number, (run, writer, frames) in enumerate(zip(runs, writers, videos, strict=True)):
                writer.write(frames)
                run.chunks.append(of_story(chunk, number))
                run.decode_seconds.append(seconds)
                run.frames += len(frames)
            yield

    def files(run: Run) -> dict[str, bytes]:
        return {"run.json": (json.dumps(run.record(), indent=1) + "\n").encode()}

    make_stories(runs, writers, rounds, files, report)
    return runs


def of_story(chunk: Chunk, number: int) -> Chunk:
    """One story's part of a chunk, without its frames: the pixels are in the video."""

    def own(of_each: list[Any]) -> list[Any]:
        return [of_each[number]]

    return replace(
        chunk,
        prompts=own(chunk.prompts),
        frames=chunk.frames.new_empty(0),
        retrieved=own(chunk.retrieved),
        relevance=own(chunk.relevance),
        candidates=own(chunk.candidates),
        activation=own(chunk.activation),
    )


def video_writer(path: Path, settings: StreamSettings, vae: Any) -> VideoWriter:
    """An mp4 of the VAE's pixels, a fragment per chunk."""
    scale = vae.spatial_compression_ratio
    return VideoWriter(
        path,
        settings.height * scale,
        settings.width * scale,
        fragment_frames=settings.chunk_frames * vae.config.scale_factor_temporal,
        fps=FRAMES_PER_SECOND,
        scale=1,
    )


def streamed(
    parts: Parts, plans: Sequence[Plan], interrupts: Interrupts
) -> Iterator[tuple[Chunk, list[np.ndarray], float]]:
    """Chunk after chunk of stories that are streamed together, the video frames of each (F, H, W, 3) uint8, and the
    seconds that decoding took."""
    first = plans[0]
    streamer = Streamer(
        parts.model, len(plans), first.settings, [plan.seed for plan in plans], encode=parts.encode,
        cuda_graphs=first.cuda_graphs,
    )  # fmt: skip
    decoders = [StreamingDecoder(parts.vae) for _ in plans]
    for prompts in zip(*(plan.spoken for plan in plans), strict=True):
        with interrupts.allowed():
            chunk = streamer.next_chunk(prompts)
            started = time.perf_counter()
            latents = chunk.frames.split(1)
            videos = [to_pixels(decoder.decode(x)[0]) for decoder, x in zip(decoders, latents, strict=True)]
            seconds = time.perf_counter() - started
        yield chunk, videos, seconds
