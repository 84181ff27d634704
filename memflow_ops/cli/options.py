"""Options that several commands share, and how commands read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Story = Annotated[Path, typer.Argument(help='JSON lines, a story each: {"prompts": ["a ball in the meadow", ...]}')]
Out = Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")]
Seed = Annotated[int, typer.Option(help="Of the noise. The same seed makes the same video.", min=0, metavar="N")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.", metavar="NAME")]
Weights = Annotated[
    Path | None,
    typer.Option(help="A checkpoint of `memflow train`. Default: the toy weights that come with the package."),
]
# What both worlds have; without a value each has its own default.
BankFrames = Annotated[
    int | None,
    typer.Option(help="Past frames retrieved for a chunk. Default: 3; with a checkpoint 64.", min=0, metavar="N"),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Memory blocks that each query group attends to. Default: 8; with a checkpoint 24.", min=1, metavar="N"
    ),
]
QueryGroup = Annotated[
    int | None,
    typer.Option(
        help="Queries that share a selection; 0: the whole chunk. Default: 16; with a checkpoint 128.",
        min=0,
        metavar="N",
    ),
]
FramesPerPrompt = Annotated[
    int | None,
    typer.Option(
        help="How long each prompt lasts, in latent frames. Default: 12; with a checkpoint 40 (10 seconds).",
        min=1,
        metavar="N",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Denoising passes per chunk. Default: 16; with a checkpoint 4.", min=1, metavar="N"),
]
RecacheOrNot = Annotated[
    bool | None,
    typer.Option(
        "--recache/--no-recache",
        help="At a prompt switch pass the local window again under the new prompt. Default: no; with a checkpoint yes.",
    ),
]

# What real checkpoints need.
TextEncoder = Annotated[
    Path | None,
    typer.Option(help="Folder of its UMT5 and tokenizer, or of a whole diffusers pipeline.", metavar="PATH"),
]
Vae = Annotated[
    Path | None,
    typer.Option(help="Folder of its AutoencoderKLWan, or of a whole diffusers pipeline.", metavar="PATH"),
]
LoraFile = Annotated[Path | None, typer.Option("--lora", help="A LoRA to merge into it, peft's form.", metavar="PATH")]
LoraAlpha = Annotated[
    float | None, typer.Option(help="The LoRA's alpha, where its file does not say. Default: its rank.", metavar="X")
]
NumHeads = Annotated[
    int | None,
    typer.Option(help="Attention heads, where no config.json says. Default: width / 128.", min=1, metavar="N"),
]
Dtype = Annotated[
    str, typer.Option(help="auto (bfloat16 on CUDA, float32 on a CPU), float32, bfloat16 or float16.", metavar="NAME")
]
Height = Annotated[
    int | None,
    typer.Option(help="Of the video, in pixels; a multiple of 16. Default: 480.", min=16, metavar="N"),
]
Width = Annotated[int | None, typer.Option(help="Likewise. Default: 832.", min=16, metavar="N")]
HistoryFrames = Annotated[
    int | None,
    typer.Option(
        help="Past frames remembered at most, on the device or in host memory; the oldest beyond are forgotten. "
        "Default: all.",
        min=1,
        metavar="N",
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        help="Stories streamed together at most, where they have equally many prompts; each as if alone, but for "
        "rounding. Default: 1.",
        min=1,
        metavar="N",
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="Record the passes that come again as CUDA graphs. Changes no result. Default: on CUDA yes.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the transformer's blocks, which takes a while once; results move by rounding.",
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value; a query group of 0 is the whole chunk."""
    values = {name: value for name, value in options.items() if value is not None}
    if "query_group" in values:
        values["query_group"] = values["query_group"] or None
    return values


def check_used(options: dict[str, Any], memories: Sequence[str], why: str = "") -> None:
    """A ValueError that names the options which none of these kinds of memory looks at: who gives one expects that it
    changes something. why: one kind was not asked for by name, in words."""
    from memflow_ops.model.streaming.settings import USED_BY

    users = {**USED_BY, "history_frames": ("memflow", "full"), "baseline": ("sink", "full", "memflow", "released")}
    unused = {name: users[name] for name in options if not set(memories) & set(users.get(name, memories))}
    if unused:
        kinds = " and ".join(dict.fromkeys(memories))
        others = "; ".join(f"{named({name: None})} is for {', '.join(users)}" for name, users in unused.items())
        raise ValueError(f"{named(unused)} would change nothing with --memory {kinds}{why}: {others}")


def named(options: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in options)


def sources_of(
    checkpoint: Path, dtype: str, real: dict[str, Any], needed: Sequence[str] = ("text_encoder", "vae")
) -> tuple[Any, dict[str, Any]]:
    """The paths of a real pipeline, and the options that are none."""
    from memflow_ops.model.pipeline.sources import Sources

    missing = set(needed) - real.keys()
    if missing:
        raise ValueError(f"a --checkpoint also needs {named(dict.fromkeys(sorted(missing)))}")
    names = Sources.__dataclass_fields__.keys() & real.keys()
    sources = Sources(checkpoint, dtype=dtype, **{"vae": None} | {name: real[name] for name in names})
    return sources, {name: value for name, value in real.items() if name not in names}
