"""`memflow profile-selection` and `memflow toy profile-selection`: what a choice of blocks keeps, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from memflow_ops.cli.errors import fail, one_line_errors
from memflow_ops.cli.generate import HEIGHT, WIDTH, any_prompt, load_stories
from memflow_ops.cli.options import (
    MEMORY,
    VIDEO,
    BankFrames,
    Checkpoint,
    Device,
    Dtype,
    Ema,
    FramesPerPrompt,
    Height,
    HistoryFrames,
    LoraAlpha,
    LoraFile,
    NumHeads,
    Steps,
    TextEncoder,
    TextLen,
    TopK,
    ToyWeights,
    Width,
    as_settings,
    named,
    typed,
)
from memflow_ops.environment import environment, pick_device
from memflow_ops.files import check_target, sha256, write_atomically, write_picture
from memflow_ops.model.pipeline.plan import StreamOptions
from memflow_ops.model.pipeline.settings import FRAMES_PER_PROMPT, WAN_SETTINGS
from memflow_ops.model.pipeline.sources import Sources, latent_size
from memflow_ops.model.pipeline.verify import STORY
from memflow_ops.model.selection_profile import profile as library
from memflow_ops.model.selection_profile import timing
from memflow_ops.model.selection_profile.figures import ChoiceFigures, Sampling, SelectionProfile
from memflow_ops.model.selection_profile.profile import check_profile, first_full_chunk
from memflow_ops.model.selection_profile.rankings import compare_rankings, ranking_table
from memflow_ops.model.selection_profile.report import (
    GOALS,
    cheapest,
    describe_choice,
    profile_json,
    profile_table,
)
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.prompts import chunk_prompts, read_stories
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.text import TextEncoder as Encode
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.evaluation import held_out
from memflow_ops.model.toy.language import embed_prompts, parse_prompt
from memflow_ops.model.toy.schedule import HELD_OUT_SEED
from memflow_ops.model.toy.settings import TOY_SETTINGS
from memflow_ops.model.wan.transformer import CausalVideoModel

MEASUREMENT = "Measurement"
TOY_BLOCK_SIZES, TOY_QUERY_GROUPS = [8, 16, 32, 64], [1, 16, 0]
"""A frame of the toy world is 64 tokens. A query group of 0 is the whole chunk."""
WAN_BLOCK_SIZES, WAN_QUERY_GROUPS = [16, 32, 64, 128], [1, 128, 0]
STORY_LENGTH = 2
"""Index into the lengths of held-out stories: the toy world streams stories of 24 prompts."""
SAMPLING = Sampling()

ProfileOut = Annotated[Path, typer.Option(help="The .json file to write; a picture goes beside it.", metavar="FILE")]
BlockSizes = Annotated[
    list[int],
    typer.Option(
        "--block-size",
        help="A number of tokens per block to compare. May be repeated.",
        metavar="N",
        rich_help_panel=MEASUREMENT,
    ),
]
QueryGroups = Annotated[
    list[int],
    typer.Option(
        "--query-group",
        help="A number of queries that share a selection to compare; 0 means all of the chunk. May be repeated.",
        min=0,
        metavar="N",
        rich_help_panel=MEASUREMENT,
    ),
]
Chunks = Annotated[
    int,
    typer.Option(
        help="How many chunks are measured, drawn at random.", min=1, metavar="N", rich_help_panel=MEASUREMENT
    ),
]
Calls = Annotated[
    int,
    typer.Option(
        help="How many calls of attention (a layer in a pass) are measured in each chunk.",
        min=1,
        metavar="N",
        rich_help_panel=MEASUREMENT,
    ),
]
Heads = Annotated[
    int,
    typer.Option(help="How many heads are measured in each call.", min=1, metavar="N", rich_help_panel=MEASUREMENT),
]
Queries = Annotated[
    int,
    typer.Option(help="How many queries are measured in each call.", min=1, metavar="N", rich_help_panel=MEASUREMENT),
]
Rounds = Annotated[
    int,
    typer.Option(
        help="How often each setting is timed; 0 leaves the timing out.",
        min=0,
        metavar="N",
        rich_help_panel=MEASUREMENT,
    ),
]
ProfileSeed = Annotated[
    int,
    typer.Option(
        help="The seed of the noise and of everything that is drawn at random.",
        min=0,
        metavar="N",
        rich_help_panel=MEASUREMENT,
    ),
]


@dataclass(frozen=True)
class ProfiledStream:
    """A stream that is to be profiled, checked and loaded."""

    command: str
    """the command that profiles it, as the results name it"""
    model: CausalVideoModel
    spoken: Sequence[Sequence[str]]
    """per chunk the prompt of every story"""
    settings: StreamSettings
    encode: Encode
    block_sizes: list[int]
    query_groups: list[int | None]
    """None: the whole chunk"""
    name: str
    """of the model, in the picture's title"""
    about: dict[str, Any]
    """what the results say of the stream"""


def profile_selection(
    context: typer.Context,
    checkpoint: Checkpoint,
    text_encoder: TextEncoder,
    story: Annotated[
        Path | None,
        typer.Argument(
            help="A file of stories as for `memflow generate`; its first story is streamed.",
            metavar="STORY",
            show_default="a story that comes with the package",
        ),
    ] = None,
    out: ProfileOut = Path("out/selection.json"),
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    text_len: TextLen = None,
    ema: Ema = None,
    dtype: Dtype = "auto",
    block_size: BlockSizes = WAN_BLOCK_SIZES,
    query_group: QueryGroups = WAN_QUERY_GROUPS,
    chunks: Chunks = SAMPLING.chunks,
    calls: Calls = SAMPLING.calls,
    heads: Heads = SAMPLING.heads,
    queries: Queries = SAMPLING.queries,
    rounds: Rounds = SAMPLING.rounds,
    seed: ProfileSeed = SAMPLING.seed,
    frames_per_prompt: FramesPerPrompt = FRAMES_PER_PROMPT,
    steps: Steps = WAN_SETTINGS.steps,
    height: Height = HEIGHT,
    width: Width = WIDTH,
    bank_frames: Annotated[
        int | None,
        typer.Option(
            help="How many past frames are retrieved for each chunk.",
            min=0,
            metavar="N",
            show_default=f"{WAN_SETTINGS.bank_frames}, or what is full for a quarter of a shorter story",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    top_k: TopK = WAN_SETTINGS.top_k,
    history_frames: HistoryFrames = None,
    device: Device = "auto",
) -> None:
    """Measure which top_k, block_size and query_group suit a checkpoint: what they keep, and what they cost.

    Defaults that suit one model do not suit another. The command streams a
    story. At calls of attention drawn at random, it compares every setting
    with dense attention over the whole bank: the share of the attention that
    the selected blocks hold, the error of the output, and the time of the op
    on these tensors. Beside them stand whole frames chosen once for a chunk,
    as the released MemFlow does, blocks at random, and an oracle.

    Writes a JSON file and a picture. Ctrl-C keeps what has been measured.

    Example, with a whole diffusers pipeline in the folder wan/:

      memflow profile-selection --checkpoint wan --text-encoder wan
    """
    settings = as_settings(bank_frames=bank_frames, top_k=top_k, steps=steps, height=height, width=width)
    sampling = Sampling(chunks, calls, heads, queries, rounds, seed)
    with one_line_errors():
        _check_targets(out)
        told = read_stories(story or STORY, any_prompt)[:1]
        latent_height, latent_width = latent_size(None, height, width)
        tokens = latent_height * latent_width // 4
        total = len(chunk_prompts(told, frames_per_prompt, WAN_SETTINGS.chunk_frames))
        settings.setdefault("bank_frames", _largest_full_bank(total))
        if "block_size" not in typed(context):
            block_size = [size for size in block_size if size <= tokens] or [tokens]
        sizes = _compared_sizes(block_size, query_group)
        # Checked before the weights are read, which takes long.
        check_profile(replace(WAN_SETTINGS, bank_frames=settings["bank_frames"]), total, tokens, *sizes)
        sources = Sources(checkpoint, text_encoder, None, lora, lora_alpha, num_heads, dtype, text_len, ema)
        parts, ((plan,),) = load_stories(
            told,
            out.parent,
            sources,
            settings,
            StreamOptions(seed, frames_per_prompt, history_frames, cuda_graphs=False),
            memories=("memflow",),
            given=typed(context),
            device=device,
        )
    about = {
        "sources": sources.described(),
        "stories": [plan.prompts],
        "frames_per_prompt": frames_per_prompt,
    }
    profiled = ProfiledStream(
        "memflow profile-selection",
        parts.model,
        [(prompt,) for prompt in plan.prompts_by_chunk],
        plan.settings,
        parts.encode,
        *sizes,
        name=checkpoint.name,
        about=about,
    )
    _profile(profiled, out, sampling)


def toy_profile_selection(
    context: typer.Context,
    story: Annotated[
        Path | None,
        typer.Argument(
            help="A file of stories as for `memflow toy generate`; its first story is streamed.",
            metavar="STORY",
            show_default="held-out stories",
        ),
    ] = None,
    out: ProfileOut = Path("out/selection.json"),
    weights: ToyWeights = None,
    block_size: BlockSizes = TOY_BLOCK_SIZES,
    query_group: QueryGroups = TOY_QUERY_GROUPS,
    chunks: Chunks = SAMPLING.chunks,
    calls: Calls = SAMPLING.calls,
    heads: Heads = SAMPLING.heads,
    queries: Queries = SAMPLING.queries,
    rounds: Rounds = SAMPLING.rounds,
    seed: ProfileSeed = SAMPLING.seed,
    stories: Annotated[
        int,
        typer.Option(help="How many held-out stories are streamed.", min=1, metavar="N", rich_help_panel=VIDEO),
    ] = 2,
    story_seed: Annotated[
        int,
        typer.Option(help="The seed of the held-out stories.", min=HELD_OUT_SEED, metavar="N", rich_help_panel=VIDEO),
    ] = HELD_OUT_SEED,
    frames_per_prompt: FramesPerPrompt = held_out.FRAMES_PER_PROMPT,
    steps: Steps = TOY_SETTINGS.steps,
    bank_frames: BankFrames = TOY_SETTINGS.bank_frames,
    top_k: TopK = TOY_SETTINGS.top_k,
    device: Device = "auto",
) -> None:
    """Measure which top_k, block_size and query_group suit the toy world's model.

    This is the measurement of `memflow profile-selection`, whose help says
    more about it. It streams held-out stories, or one of your own.

    Examples:

      memflow toy profile-selection
      memflow toy profile-selection story.jsonl --bank-frames 8
    """
    sampling = Sampling(chunks, calls, heads, queries, rounds, seed)
    with one_line_errors():
        _check_targets(out)
        unused = [name for name in ("stories", "story_seed") if story and name in typed(context)]
        if unused:
            raise ValueError(f"{named(unused)} would change nothing: the story is that of the file")
        if story:
            told = read_stories(story, parse_prompt)[:1]
        else:
            told = held_out.make_stories(stories, story_seed)[STORY_LENGTH]
        spoken = chunk_prompts(told, frames_per_prompt, TOY_SETTINGS.chunk_frames)
        room = max(TOY_SETTINGS.device_frames, len(spoken), bank_frames + TOY_SETTINGS.window_frames)
        settings = replace(TOY_SETTINGS, bank_frames=bank_frames, top_k=top_k, steps=steps, device_frames=room)
        file = weights or TOY_WEIGHTS
        model = load_model(file, pick_device(device))
        sizes = _compared_sizes(block_size, query_group)
        check_profile(settings, len(spoken), model.tokens(settings.height, settings.width), *sizes)
    about = {
        "weights": {"name": file.name, "sha256": sha256(file)},
        "stories": told,
        "frames_per_prompt": frames_per_prompt,
    }
    profiled = ProfiledStream(
        "memflow toy profile-selection",
        model,
        spoken,
        settings,
        embed_prompts,
        *sizes,
        name="The toy world",
        about=about,
    )
    _profile(profiled, out, sampling)


def _largest_full_bank(chunks: int) -> int:
    """The largest bank, up to the default, that is full for the last quarter of a story of so many chunks."""
    beyond_bank = first_full_chunk(replace(WAN_SETTINGS, bank_frames=0))
    return max(0, min(WAN_SETTINGS.bank_frames, chunks - chunks // 4 - 1 - beyond_bank))


def _check_targets(out: Path) -> None:
    """Refuse a place that cannot be written to, before anything is loaded."""
    check_target(out, ".json")
    check_target(out.with_suffix(".png"), ".png")


def _compared_sizes(block_sizes: Sequence[int], query_groups: Sequence[int]) -> tuple[list[int], list[int | None]]:
    """Block sizes and query groups without repetitions; a query group of 0 becomes None, the whole chunk."""
    return list(dict.fromkeys(block_sizes)), list(dict.fromkeys(group or None for group in query_groups))


def _profile(profiled: ProfiledStream, out: Path, sampling: Sampling) -> None:
    """Profile a stream behind a progress bar, write after every measured chunk, and print the table."""
    settings, device = profiled.settings, profiled.model.patch_embedding.weight.device
    about = {"command": profiled.command, **environment(device), **profiled.about}
    about |= {"settings": asdict(settings), "clock": timing.clock(device)}
    with Interrupts() as interrupts:
        measured, interrupted = _measure(profiled, sampling, interrupts, about, out)
        rows = measured.figures()
        title = (
            f"{profiled.name}: {100 * measured.bank_mass:.0f} % of attention falls on a bank of {measured.frames} "
            f"frames of {measured.frame_tokens} tokens, sink included (solid: as the op selects, dashed: the oracle)"
        )
        lost = write_picture(out.with_suffix(".png"), lambda: _draw(measured, title, settings))
    typer.echo(profile_table(rows, measured.frame_tokens))
    typer.echo(_rankings(measured, settings))
    typer.echo(_conclusion(measured, rows))
    if measured.strips is not None:
        in_strips = measured.strips.figures()
        typer.echo("\nThe same with --token-order strips:")
        typer.echo(profile_table(in_strips, measured.frame_tokens))
        typer.echo(_conclusion(measured.strips, in_strips))
        typer.echo("")
    typer.echo(f"written to {out}" + ("" if lost else f" and {out.with_suffix('.png').name}"))
    if lost and not interrupted:
        fail(lost, code=1)
    if interrupted:
        fail(f"interrupted after {len(measured.chunks)} measured chunks; they are kept", code=130)


def _draw(measured: SelectionProfile, title: str, settings: StreamSettings) -> bytes:
    # It brings matplotlib, which takes a third of a second to import, also for `memflow --help`.
    from memflow_ops.model.selection_profile.plot import draw_profile

    return draw_profile(measured.figures(), measured.frame_tokens, title, settings)


def _measure(
    profiled: ProfiledStream, sampling: Sampling, interrupts: Interrupts, about: dict[str, Any], out: Path
) -> tuple[SelectionProfile, bool]:
    """Stream and measure, writing the results after every measured chunk. Gives them, and whether Ctrl-C came."""
    measured: SelectionProfile | None = None
    interrupted = False

    def write(measured: SelectionProfile) -> None:
        write_atomically(out, profile_json(measured, about, sampling, interrupted=interrupted).encode())

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("chunk", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        growing = library.profile_selection(
            profiled.model,
            profiled.spoken,
            profiled.settings,
            block_sizes=profiled.block_sizes,
            query_groups=profiled.query_groups,
            sampling=sampling,
            encode=profiled.encode,
            report=report,
            interrupts=interrupts,
        )
        try:
            for measured in growing:
                write(measured)
        except KeyboardInterrupt:
            interrupted = True
    if measured is None:
        fail("interrupted before the first chunk was measured; nothing was written", code=130)
    write(measured)
    return measured, interrupted


def _rankings(measured: SelectionProfile, settings: StreamSettings) -> str:
    """How blocks are best ranked, at the measured block size and query group that are next to those of the stream."""
    size, group = settings.block_size, settings.query_group
    selected = [choice for choice in measured.compared if choice.blocks == "moments"]
    nearest = min(selected, key=lambda choice: (abs(choice.block_size - size), choice.query_group != group))
    table = ranking_table(compare_rankings(measured, nearest.block_size, nearest.query_group))
    what = describe_choice(nearest._replace(blocks="top"), measured.frame_tokens)
    return f"\nShares of the bank's mass, and errors of the output, in % ({what}):\n{table}\n"


def _conclusion(measured: SelectionProfile, rows: Sequence[ChoiceFigures]) -> str:
    """What to take from a profile, in words."""
    goal, reaches = list(GOALS.items())[-1]
    best = cheapest(rows, reaches)
    time = "" if best.ratio is None else f" and {best.ratio:.2f} times the time of the window alone"
    alone = next(row.error for row in rows if not row.top_k)
    return (
        f"{100 * measured.bank_mass:.0f} % of attention falls on the bank; without it the output is off by "
        f"{100 * alone:.0f} %. The {'quickest' if best.ratio else 'fewest keys'} for an {goal}: "
        f"{describe_choice(best.choice, measured.frame_tokens)}, top_k {best.top_k}, with {100 * best.captured:.0f} % "
        f"of the bank's mass in {100 * best.share:.0f} % of its keys{time}. Measured on {measured.calls} calls of "
        f"attention in {len(measured.chunks)} chunks."
    )
