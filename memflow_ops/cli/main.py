"""The command `memflow`: stream stories, toy or real, look at what they remembered, convert and verify checkpoints,
measure.

Errors that the user can mend are one line on stderr and exit code 2; Ctrl-C is exit code 130. What a command needs is
imported when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from memflow_ops.allocator import keep_freed_memory
from memflow_ops.cli.measure import bench, profile_selection
from memflow_ops.cli.options import (
    BankFrames,
    Batch,
    Compile,
    CudaGraphs,
    Device,
    Dtype,
    FramesPerPrompt,
    Height,
    HistoryFrames,
    LoraAlpha,
    LoraFile,
    NumHeads,
    Out,
    QueryGroup,
    RecacheOrNot,
    Seed,
    Steps,
    Story,
    TextEncoder,
    TopK,
    Vae,
    Weights,
    Width,
    given,
    named,
    sources_of,
)
from memflow_ops.cli.progress import fail, mistakes


class Commands(typer.core.TyperGroup):
    """Says so when a command is interrupted, where typer only ends with the exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", code=130)


app = typer.Typer(
    cls=Commands,
    help="Long memory for streaming video: make a video from a story, chunk by chunk, and see what it remembered.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        import memflow_ops

        typer.echo(f"memflow-ops {memflow_ops.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    keep_freed_memory()


@app.command()
def generate(
    story: Story,
    out: Out,
    memory: Annotated[
        str | None,
        typer.Option(
            help="How a chunk sees the past: none (only the frames just before it), sink (the first frames too), full "
            "(every remembered frame), memflow (what each query picks of the first frames and the retrieved ones). "
            "Default: memflow, or what the checkpoint was tuned for.",
            metavar="KIND",
        ),
    ] = None,
    seed: Seed = 0,
    bank_frames: BankFrames = None,
    top_k: TopK = None,
    query_group: QueryGroup = None,
    frames_per_prompt: FramesPerPrompt = None,
    steps: Steps = None,
    recache: RecacheOrNot = None,
    device: Device = "auto",
    weights: Weights = None,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Toy world: stream the story without memory too, in turn, to measure what memory costs. Doubles the "
            "time. Default: yes.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A real transformer: a file or folder that `memflow convert` takes or makes. Without it: the toy "
            "world.",
            metavar="PATH",
        ),
    ] = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    dtype: Dtype = "auto",
    height: Height = None,
    width: Width = None,
    history_frames: HistoryFrames = None,
    batch: Batch = None,
    cuda_graphs: CudaGraphs = None,
    compile: Compile = False,
) -> None:
    """Make a video of every story in a file: in the toy world, or with a real checkpoint of the Wan 2.1 family.

    Writes video.mp4 and run.json (settings, times, what was retrieved); in the toy world also frames.npz and
    timeline.png (what each chunk remembered). One story goes straight into DIR, several into DIR/story-000,
    DIR/story-001, ... with seeds SEED, SEED + 1, ... Files of an earlier run are replaced when the new ones are
    complete; until then the video grows as video.part.mp4. Ctrl-C keeps what has been made.

    The toy world's prompts say who is where: ball, box, star, ring or empty; meadow, desert, sea or night.

    A real checkpoint comes with --text-encoder and --vae. Before it starts, it says what memory the stream will take,
    and refuses one that cannot fit. --batch streams several stories together.
    """
    options = given(
        seed=seed, bank_frames=bank_frames, top_k=top_k, query_group=query_group, frames_per_prompt=frames_per_prompt,
        steps=steps, recache=recache, device=device,
    )  # fmt: skip
    real = given(
        text_encoder=text_encoder, vae=vae, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, height=height,
        width=width, history_frames=history_frames, batch=batch, cuda_graphs=cuda_graphs, compile=compile or None,
    )  # fmt: skip
    if checkpoint is not None:
        from memflow_ops.cli import generate as cli_generate

        with mistakes():
            toy = given(weights=weights, baseline=baseline)
            if toy:
                raise ValueError(f"{named(toy)} belong to the toy world, not to a --checkpoint; see `memflow verify`")
            memories = None if memory is None else [memory]
            sources, rest = sources_of(checkpoint, dtype, real)
            parts, streams = cli_generate.prepare(story, out, sources, memories=memories, **rest, **options)
        for real_runs in cli_generate.stream_stories(parts, streams, sources):
            for real_run in real_runs:
                typer.echo(cli_generate.made(real_run))
            typer.echo(cli_generate.speed(real_runs[0]))
        return
    from memflow_ops.cli import toy as cli_toy

    with mistakes():
        if real:
            raise ValueError(f"{named(real)} need a --checkpoint; without one this is the toy world")
        options |= given(memory=memory, weights=weights, baseline=baseline)
        model, plans = cli_toy.prepare(story, out, **options)
    for run in cli_toy.stream_stories(model, plans):
        typer.echo(cli_toy.made(run))
        cost = cli_toy.cost(run)
        if cost:
            typer.echo(cost)


@app.command()
def demo(
    out: Out = Path("out/demo"),
    seed: Seed = 0,
    device: Device = "auto",
    steps: Annotated[int, typer.Option(help="Denoising passes per chunk.", min=1, metavar="N")] = 16,
    weights: Weights = None,
) -> None:
    """Stream the shipped story, in which a character leaves and returns, and say in plain words what came of it."""
    from memflow_ops.cli import toy as cli_toy

    with mistakes():
        from memflow_ops.model.toy.generate import DEMO_STORY

        model, plans = cli_toy.prepare(DEMO_STORY, out, seed=seed, device=device, weights=weights, steps=steps)
    for run in cli_toy.stream_stories(model, plans):
        typer.echo(f"The story: {', then '.join(run.plan.prompts)}.\n")
        for there in run.returns():
            typer.echo(cli_toy.returned(there) + "\n")
        typer.echo(cli_toy.cost(run) + "\n")
        typer.echo(cli_toy.made(run))


@app.command()
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Wan 2.1's own file or folder, a .pt of Self-Forcing, LongLive or MemFlow, or a diffusers folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: as it is.", metavar="NAME")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What it was tuned for, and `memflow generate` will use by default: released (MemFlow's own bank) or "
            "memflow. Default: released where the name of the file or its folder says MemFlow.",
            metavar="KIND",
        ),
    ] = None,
) -> None:
    """Turn a checkpoint of the Wan 2.1 family into one of ours: one safetensors file with its config inside.

    Nothing in the file is run. What is missing, unexpected or of the wrong shape is named. Other commands take the
    original as well; converting merges a LoRA once and for all and makes loading quicker.
    """
    with mistakes():
        from memflow_ops.cli import generate as cli_generate
        from memflow_ops.files import check_target
        from memflow_ops.model.checkpoints import pretrained as converting
        from memflow_ops.model.pipeline.budget import size

        check_target(out, ".safetensors")  # rather now than after the reading
        if dtype is not None and dtype not in converting.DTYPES:
            raise ValueError(f"dtype must be {', '.join(converting.DTYPES)}, got {dtype!r}")
        pretrained = converting.read_pretrained(
            checkpoint, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, memory=memory
        )
        typer.echo(cli_generate.described(pretrained))
        converting.convert(pretrained, out, None if dtype is None else converting.DTYPES[dtype])
    typer.echo(f"Written: {out}, {size(out.stat().st_size)}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Option(help="As for generate.", metavar="PATH")],
    text_encoder: TextEncoder,
    vae: Vae,
    out: Out = Path("out/verify"),
    story: Annotated[
        Path | None, typer.Argument(help="JSON lines, of which the first story is streamed. Default: a shipped one.")
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated; the first is what the others are compared with. Default: all but full."),
    ] = None,
    seed: Seed = 0,
    bank_frames: BankFrames = None,
    top_k: TopK = None,
    query_group: QueryGroup = None,
    frames_per_prompt: FramesPerPrompt = None,
    steps: Steps = None,
    recache: RecacheOrNot = None,
    device: Device = "auto",
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    dtype: Dtype = "auto",
    height: Height = None,
    width: Width = None,
    history_frames: HistoryFrames = None,
    cuda_graphs: CudaGraphs = None,
    compile: Compile = False,
) -> None:
    """Stream the same prompts and noise with every kind of memory; compare speed, memory, latents and frames.

    For a real checkpoint. Exit code 1 where latents are not finite, or kinds differ that must not yet.
    """
    from memflow_ops.cli import generate as cli_generate
    from memflow_ops.model.pipeline import verify as verifying

    with mistakes():
        options = given(
            seed=seed, bank_frames=bank_frames, top_k=top_k, query_group=query_group, steps=steps, recache=recache,
            frames_per_prompt=frames_per_prompt, device=device,
        )  # fmt: skip
        real = given(
            text_encoder=text_encoder, vae=vae, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, height=height,
            width=width, history_frames=history_frames, cuda_graphs=cuda_graphs, compile=compile or None,
        )  # fmt: skip
        sources, rest = sources_of(checkpoint, dtype, real)
        kinds = list(dict.fromkeys(memory or verifying.MEMORIES))
        names = ("frames.png", "report.json", *(f"{kind}.mp4" for kind in kinds))
        parts, streams = cli_generate.prepare(
            story or verifying.STORY, out, sources, most=1, memories=kinds, names=names, **rest, **options
        )
    outcomes: list[verifying.Outcome] = []
    ended: BaseException | None = None
    try:
        for outcome in cli_generate.verify(parts, [plan for (plan,) in streams]):
            outcomes.append(outcome)
    except (KeyboardInterrupt, OSError) as error:
        ended = error
    problems: list[str] = []
    if outcomes:  # also of those that were complete before the end
        with mistakes(code=1):
            said = verifying.write_report(outcomes, sources, parts.device, out)
        typer.echo(cli_generate.compared(outcomes, said, out))
        problems = said["problems"]  # type: ignore[assignment]
    if isinstance(ended, KeyboardInterrupt):
        fail(f"interrupted after {len(outcomes)} of {len(kinds)} kinds of memory; they are kept", code=130)
    if ended or problems:
        fail("; ".join([*([str(ended)] if ended else []), *problems]), code=1)


@app.command()
def info() -> None:
    """Print versions, the device, and what can run here."""
    import platform

    import torch

    import memflow_ops
    from memflow_ops import environment
    from memflow_ops.model.checkpoints.native import load_checkpoint
    from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS

    def line(name: str, words: object) -> None:
        typer.echo(f"  {name:<34}{words}")

    def available(what: dict[str, str]) -> None:
        for name, why_not in what.items():
            line(name, f"no: {why_not}" if why_not else "yes")

    typer.echo("versions")
    line("memflow-ops", memflow_ops.__version__)
    line("python", platform.python_version())
    line("torch", torch.__version__)
    line("triton", environment.version("triton") or "not installed")
    line("flash-attn", environment.version("flash-attn") or "not installed (pip install 'memflow-ops[flash]')")
    for name in ("diffusers", "transformers"):
        line(name, environment.version(name) or "not installed (pip install 'memflow-ops[wan]', for real checkpoints)")
    device = environment.pick_device("auto")
    typer.echo("device")
    line(device.type, environment.device_name(device))
    typer.echo("implementations of the ops")
    available(environment.implementations())
    typer.echo("dense backends for the local window")
    available(environment.dense_backends())
    typer.echo("toy weights")
    try:
        model = load_checkpoint(TOY_WEIGHTS)
    except (OSError, ValueError) as error:
        line("none", error)
    else:
        line(f"{sum(x.numel() for x in model.parameters()):,} parameters", TOY_WEIGHTS)


@app.command()
def train(
    out: Annotated[
        Path | None,
        typer.Option(help="Default: the package's own weights, replaced; with --seed or --steps out/toy.safetensors."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random, below 10000.", min=0, metavar="N")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Default: the full schedule; fewer shorten it.", min=1, metavar="N")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1, metavar="N")] = 2,
    device: Device = "cpu",
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, although an unfinished run lies there.")
    ] = False,
) -> None:
    """Train the toy world's model from scratch. After Ctrl-C or a kill the same command continues where it was."""
    from memflow_ops.environment import pick_device
    from memflow_ops.files import check_target
    from memflow_ops.model.toy import train as training
    from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS

    # The package's weights are only replaced by the whole of their training.
    target = out or (Path("out") / TOY_WEIGHTS.name if seed or steps else TOY_WEIGHTS)
    with mistakes():
        check_target(target, ".safetensors")  # rather now than after the training
        training.train(
            target,
            seed=seed,
            steps=steps or training.TOTAL_STEPS,
            threads=threads,
            device=str(pick_device(device)),
            restart=restart,
        )


@app.command()
def evaluate(
    weights: Weights = None,
    stories: Annotated[int, typer.Option(help="Held-out stories of each length.", min=1, metavar="N")] = 8,
    seed: Annotated[
        int, typer.Option(help="Of the stories and their noise; from 10000 on they are held out.", min=0, metavar="N")
    ] = 30_000,
    memory: Annotated[
        list[str] | None,
        typer.Option(help="A kind of memory, such as none, memflow or 'random frames'; may be repeated. Default: all."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Blocks that a query group selects.", min=1, metavar="N")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising passes per chunk.", min=1, metavar="N")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file. Default: bench/results/toy-cpu.json, or out/evaluate.json with other options."),
    ] = None,
) -> None:
    """Stream held-out stories under every kind of memory and judge from the pixels who came back the same.

    Writes a JSON file and a picture beside it. Ctrl-C ends early and keeps the kinds that are finished.
    """
    from memflow_ops.cli import toy as cli_toy

    cli_toy.evaluate(weights, stories, seed, memory, top_k, steps, out)


app.command()(bench)
app.command("profile-selection")(profile_selection)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; always ends in SystemExit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words, prog_name="memflow", standalone_mode=False)
    except typer.TyperException as error:  # an option that does not exist, a number out of range, ...
        typer.echo(f"memflow: {' '.join(error.format_message().split())} (see --help)", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("memflow: interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
