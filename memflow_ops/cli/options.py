"""Options that several commands share, and which of them the user has given.

Each command states its own defaults in its signature, so that an option means one thing in each help text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memflow_ops.cache.layout import Positions
from memflow_ops.cache.released_layout import BankSchedule
from memflow_ops.geometry import BankDtype, Score
from memflow_ops.model.pipeline.settings import RELEASED_BANK_FRAMES, WAN_SETTINGS
from memflow_ops.model.stories.snapshots import HistoryOptions
from memflow_ops.model.streaming.settings import USED_BY, ReselectKind
from memflow_ops.token_order import TokenOrderName

VIDEO = "Video"
MEMORY = "Memory"
CHECKPOINT = "Checkpoint"
SPEED = "Device and speed"
STOPPING = "Stopping and going on"
MEMORY_HELP = (
    "What a chunk sees of the past. none: the local window alone. sink: the first frames too. full: every past frame. "
    "memflow: what each query group selects of the first and the retrieved frames. released: the memory of MemFlow's "
    "authors."
)

Story = Annotated[
    Path,
    typer.Argument(
        help='A file with one story a line, as JSON: {"prompts": ["a ball in the meadow", ...]}', metavar="STORY"
    ),
]
Out = Annotated[Path, typer.Option(help="The folder to write to.", metavar="DIR")]
Seed = Annotated[
    int,
    typer.Option(
        help="The seed of the noise. The same seed gives the same video.", min=0, metavar="N", rich_help_panel=VIDEO
    ),
]
FramesPerPrompt = Annotated[
    int,
    typer.Option(help="How long each prompt lasts, in latent frames.", min=1, metavar="N", rich_help_panel=VIDEO),
]
Steps = Annotated[int, typer.Option(help="Denoising steps per chunk.", min=1, metavar="N", rich_help_panel=VIDEO)]
Height = Annotated[
    int,
    typer.Option(help="The video's height in pixels, a multiple of 16.", min=16, metavar="N", rich_help_panel=VIDEO),
]
Width = Annotated[
    int,
    typer.Option(help="The video's width in pixels, a multiple of 16.", min=16, metavar="N", rich_help_panel=VIDEO),
]

BankFrames = Annotated[
    int,
    typer.Option(help="How many past frames are retrieved for each chunk.", min=0, metavar="N", rich_help_panel=MEMORY),
]
WanBankFrames = Annotated[
    int | None,
    typer.Option(
        help="How many past frames are retrieved for each chunk.",
        min=0,
        metavar="N",
        show_default=f"{WAN_SETTINGS.bank_frames}; {RELEASED_BANK_FRAMES} with --memory released",
        rich_help_panel=MEMORY,
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        help="How many memory blocks each query group attends to.", min=1, metavar="N", rich_help_panel=MEMORY
    ),
]
QueryGroup = Annotated[
    int,
    typer.Option(
        help="How many consecutive queries share one selection of blocks; 0 means all of the chunk.",
        min=0,
        metavar="N",
        rich_help_panel=MEMORY,
    ),
]
BlockScore = Annotated[
    Score,
    typer.Option(
        "--score",
        help="What memory blocks are ranked by: mean (of their keys), moments (mean and variance), or normalised "
        "(moments, for every 32 queries of a group by themselves).",
        metavar="NAME",
        rich_help_panel=MEMORY,
    ),
]
BankDtypeName = Annotated[
    BankDtype | None,
    typer.Option(
        "--bank-dtype",
        help="What the first and the past frames are kept in: int8 takes about half the memory of bfloat16; what the "
        "attention gives then differs by some tenths of a percent.",
        metavar="NAME",
        show_default="as the model",
        rich_help_panel=MEMORY,
    ),
]
Reselect = Annotated[
    ReselectKind,
    typer.Option(
        help="Which passes over a chunk choose blocks: step (all of them) or chunk (the first, and the last one, which "
        "writes the keys).",
        metavar="NAME",
        rich_help_panel=MEMORY,
    ),
]
TokenOrder = Annotated[
    TokenOrderName,
    typer.Option(
        help="How the tokens of a frame lie, and so what a block covers: raster (rows) or strips (compact patches).",
        metavar="NAME",
        rich_help_panel=MEMORY,
    ),
]
_POSITIONS_HELP = (
    "Where the first and the retrieved frames stand in time: absolute (at their own frames) or bounded (at most as far "
    "away as the first frames and the local window are long, however long the video)."
)
PositionsName = Annotated[Positions, typer.Option(help=_POSITIONS_HELP, metavar="NAME", rich_help_panel=MEMORY)]
WanPositions = Annotated[
    Positions | None,
    typer.Option(
        help=_POSITIONS_HELP,
        metavar="NAME",
        show_default="what the checkpoint states, else absolute",
        rich_help_panel=MEMORY,
    ),
]
Recache = Annotated[
    bool,
    typer.Option(
        "--recache/--no-recache",
        help="When the prompt changes, compute the local window's keys and values again under the new prompt.",
        rich_help_panel=MEMORY,
    ),
]
BankScheduleName = Annotated[
    BankSchedule | None,
    typer.Option(
        help="When a frame enters the bank of --memory released, and how its window is re-cached: interactive or "
        "single-prompt, the names of the two programs of MemFlow's authors.",
        metavar="NAME",
        show_default="interactive for a story of several prompts, single-prompt for one",
        rich_help_panel=MEMORY,
    ),
]
HistoryFrames = Annotated[
    int | None,
    typer.Option(
        help="Keep at most this many past frames, on the device or in host memory, and forget the oldest beyond.",
        min=1,
        metavar="N",
        show_default="all",
        rich_help_panel=MEMORY,
    ),
]

HistoryDir = Annotated[
    Path | None,
    typer.Option(
        help="Keep the past on disk too, in this folder, with snapshots from which --resume goes on.",
        metavar="DIR",
        rich_help_panel=STOPPING,
    ),
]
DeviceFrames = Annotated[
    int | None,
    typer.Option(
        help="With --history-dir: keep at most this many past frames on the device.",
        min=1,
        metavar="N",
        show_default="as many as fit",
        rich_help_panel=STOPPING,
    ),
]
HostFrames = Annotated[
    int | None,
    typer.Option(
        help="With --history-dir: keep at most this many more in host memory, and the rest on disk alone.",
        min=0,
        metavar="N",
        show_default="as many as fit",
        rich_help_panel=STOPPING,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run that --history-dir holds, as if it had never stopped.",
        rich_help_panel=STOPPING,
    ),
]
SnapshotEvery = Annotated[
    int | None,
    typer.Option(
        help="Chunks from one snapshot to the next.",
        min=1,
        metavar="N",
        show_default="what takes less than 1 % of the time",
        rich_help_panel=STOPPING,
    ),
]

Checkpoint = Annotated[
    Path,
    typer.Option(
        help="The transformer: a file or folder that `memflow convert` reads or writes.",
        metavar="PATH",
        rich_help_panel=CHECKPOINT,
    ),
]
TextEncoder = Annotated[
    Path,
    typer.Option(
        help="The folder of its UMT5 text encoder and tokenizer, of a diffusers pipeline, or of Wan's own release.",
        metavar="PATH",
        rich_help_panel=CHECKPOINT,
    ),
]
Vae = Annotated[
    Path,
    typer.Option(
        help="The folder of its AutoencoderKLWan, of a diffusers pipeline, or of Wan's own release.",
        metavar="PATH",
        rich_help_panel=CHECKPOINT,
    ),
]
LoraFile = Annotated[
    Path | None,
    typer.Option(
        "--lora",
        help="A LoRA as peft, diffusers or the programs around Wan write it, merged into the weights.",
        metavar="PATH",
        rich_help_panel=CHECKPOINT,
    ),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        help="The alpha of the LoRA that --lora names, or without one of the checkpoint's own, in place of what its "
        "file states.",
        metavar="X",
        show_default="what its file states, else its rank",
        rich_help_panel=CHECKPOINT,
    ),
]
NumHeads = Annotated[
    int | None,
    typer.Option(
        help="The number of attention heads, where no config.json states it.",
        min=1,
        metavar="N",
        show_default="width / 128",
        rich_help_panel=CHECKPOINT,
    ),
]
TextLen = Annotated[
    int | None,
    typer.Option(
        help="The tokens of text that the model attends to, padding included, where no config.json states them.",
        min=1,
        metavar="N",
        show_default="512",
        rich_help_panel=CHECKPOINT,
    ),
]
Ema = Annotated[
    bool | None,
    typer.Option(
        "--ema/--no-ema",
        help="Take the averaged weights of a .pt (generator_ema), or those of the last step (generator).",
        show_default="averaged where both are there, but not of LongLive and MemFlow",
        rich_help_panel=CHECKPOINT,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="The dtype to compute in: auto (bfloat16 on CUDA, float32 on a CPU), float32, bfloat16 or float16.",
        metavar="NAME",
        rich_help_panel=CHECKPOINT,
    ),
]

Device = Annotated[
    str,
    typer.Option(
        help="auto (CUDA where there is a device, else the CPU), cpu, cuda or cuda:N.",
        metavar="NAME",
        rich_help_panel=SPEED,
        autocompletion=lambda: ["auto", "cpu", "cuda"],
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="Record passes that repeat as CUDA graphs. This changes no result.",
        show_default="yes on CUDA",
        rich_help_panel=SPEED,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the transformer's blocks. This takes a while once, and moves results by rounding.",
        rich_help_panel=SPEED,
    ),
]

ToyWeights = Annotated[
    Path | None,
    typer.Option(
        help="A file that `memflow toy train` has written.",
        metavar="FILE",
        show_default="the weights that come with the package",
    ),
]


def typed(context: typer.Context) -> set[str]:
    """The names of the options that the user gave on the command line, whatever their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def as_settings(**options: Any) -> dict[str, Any]:
    """Options as fields of `StreamSettings`: without those that are None, and a query group of 0 as the whole chunk."""
    changes = {name: value for name, value in options.items() if value is not None}
    if "query_group" in changes:
        changes["query_group"] = changes["query_group"] or None
    return changes


def as_history(folder: Path | None, out: Path, **options: Any) -> HistoryOptions | None:
    """What `HistoryOptions` takes. out: where the files of the stories go. Raises a ValueError where there is no folder
    for what is asked, or where both are one, which has a run.json each."""
    if folder is not None and folder.resolve() == out.resolve():
        raise ValueError(f"--history-dir and --out are the same folder, {out}: name another one for the history")
    if folder is not None:
        return HistoryOptions(folder, **options)
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        names = ["snapshot_every" if name == "every" else name for name in given]
        raise ValueError(f"{named(names)} needs --history-dir, the folder that the past and its snapshots are kept in")
    return None


def named(options: Iterable[str]) -> str:
    """The names of options as the user types them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in options)


def check_used(options: Collection[str], memories: Collection[str], why: str = "") -> None:
    """Refuse options that none of these kinds of memory uses: who gives an option expects that it changes something.

    options: the names of those that were given. why: explains the kind of memory where the user has not named it.
    Raises a ValueError that names the options and the kinds of memory that use them.
    """
    users = {
        **USED_BY,
        "history_frames": ("memflow", "full"),
        "device_frames": ("memflow",),
        "host_frames": ("memflow",),
        "baseline": ("sink", "full", "memflow", "released"),
    }
    unused = [name for name in users if name in options and not set(memories) & set(users[name])]
    if unused:
        kinds = " and ".join(dict.fromkeys(memories))
        others = "; ".join(f"{named([name])} is for {', '.join(users[name])}" for name in unused)
        raise ValueError(f"{named(unused)} would change nothing with --memory {kinds}{why}: {others}")
