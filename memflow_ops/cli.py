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

from memflow_ops.cli_common import fail, mistakes

app = typer.Typer(
    help="Long memory for streaming video: make a video from a story, chunk by chunk, and see what it remembered.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        import memflow_ops

        typer.echo(f"memflow-ops {memflow_ops.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


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
    and refuses one that cannot fit.
    """
    options = _given(
        seed=seed, bank_frames=bank_frames, top_k=top_k, query_group=query_group, frames_per_prompt=frames_per_prompt,
        steps=steps, recache=recache, device=device,
    )  # fmt: skip
    real = _given(
        text_encoder=text_encoder, vae=vae, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, height=height,
        width=width, history_frames=history_frames, cuda_graphs=cuda_graphs, compile=compile or None,
    )  # fmt: skip
    if checkpoint is not None:
        from memflow_ops import cli_wan

        with mistakes():
            toy = _given(weights=weights, baseline=baseline)
            if toy:
                raise ValueError(f"{_named(toy)} belong to the toy world, not to a --checkpoint; see `memflow verify`")
            memories = None if memory is None else [memory]
            sources, rest = _sources(checkpoint, dtype, real)
            parts, real_plans = cli_wan.prepare(story, out, sources, memories=memories, **rest, **options)
        for real_run in cli_wan.stream_stories(parts, real_plans, sources):
            typer.echo(cli_wan.made(real_run))
            typer.echo(cli_wan.speed(real_run))
        return
    from memflow_ops import cli_toy

    with mistakes():
        if real:
            raise ValueError(f"{_named(real)} need a --checkpoint; without one this is the toy world")
        options |= _given(memory=memory, weights=weights, baseline=baseline)
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
    from memflow_ops import cli_toy

    with mistakes():
        from memflow_ops.model.generate import DEMO_STORY

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
        from memflow_ops import cli_wan
        from memflow_ops.model import convert as converting

        if out.suffix != ".safetensors":
            raise ValueError(f"the converted file is a .safetensors, got {out}")
        if dtype is not None and dtype not in converting.DTYPES:
            raise ValueError(f"dtype must be {', '.join(converting.DTYPES)}, got {dtype!r}")
        pretrained = converting.read_pretrained(
            checkpoint, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, memory=memory
        )
        typer.echo(cli_wan.described(pretrained))
        converting.convert(pretrained, out, None if dtype is None else converting.DTYPES[dtype])
    typer.echo(f"Written: {out}, {out.stat().st_size / 1e9:.2f} GB")


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
    from memflow_ops import cli_wan
    from memflow_ops.model import verify as verifying

    with mistakes():
        options = _given(
            seed=seed, bank_frames=bank_frames, top_k=top_k, query_group=query_group, steps=steps, recache=recache,
            frames_per_prompt=frames_per_prompt, device=device,
        )  # fmt: skip
        real = _given(
            text_encoder=text_encoder, vae=vae, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, height=height,
            width=width, history_frames=history_frames, cuda_graphs=cuda_graphs, compile=compile or None,
        )  # fmt: skip
        sources, rest = _sources(checkpoint, dtype, real)
        parts, plans = cli_wan.prepare(
            story or verifying.STORY, out, sources, most=1, memories=memory or verifying.MEMORIES, **rest, **options
        )
    outcomes = cli_wan.verify(parts, plans)
    said = verifying.write_report(outcomes, sources, parts.device, out)
    typer.echo(cli_wan.compared(outcomes, said, out))
    problems: list[str] = said["problems"]  # type: ignore[assignment]
    if problems:
        fail("; ".join(problems), code=1)


@app.command()
def info() -> None:
    """Print versions, the device, and what can run here."""
    import platform

    import torch

    import memflow_ops
    from memflow_ops import environment
    from memflow_ops.model.checkpoints import TOY_WEIGHTS, load_checkpoint

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
    from memflow_ops.model import train as training
    from memflow_ops.model.checkpoints import TOY_WEIGHTS, check_target

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
    from memflow_ops import cli_toy

    cli_toy.evaluate(weights, stories, seed, memory, top_k, steps, out)


@app.command()
def bench(
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="tiny (seconds; its times mean nothing), wan-1.3b or long (banks of 4 to 1000 frames); may be "
            "repeated. Default: the last two.",
            metavar="NAME",
        ),
    ] = None,
    case: Annotated[str, typer.Option(help="Part of a case's name, such as stream/ or float32.", metavar="NAME")] = "",
    rounds: Annotated[
        int | None, typer.Option(help="Of timing. Default: each case has its own.", min=1, metavar="N")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results. Default: bench/results in a checkout, else out/bench.", metavar="DIR"
        ),
    ] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Measure nothing, show what is stored.")] = False,
) -> None:
    """Measure what memory costs against no memory and every alternative; print a table and write report.html.

    Ctrl-C keeps the cases that are finished.
    """
    from memflow_ops import cli_bench

    cli_bench.bench(size or [], case, rounds, device, out, stored)


@app.command("profile-selection")
def profile_selection(
    story: Annotated[
        Path | None,
        typer.Argument(help="JSON lines, of which the first story is streamed. Default: held-out or shipped ones."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The .json file to write; a picture beside it.")] = Path(
        "out/selection.json"
    ),
    block_size: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a block; may be repeated. Default: 8, 16, 32, 64; with a checkpoint 16, 32, 64, 128.",
            metavar="N",
        ),
    ] = None,
    query_group: Annotated[
        list[int] | None,
        typer.Option(
            help="Queries that share a selection, 0: the whole chunk; may be repeated. Default: 1, 16, 0; with a "
            "checkpoint 1, 128, 0.",
            min=0,
            metavar="N",
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(help="Chunks measured, drawn.", min=1, metavar="N")] = 12,
    calls: Annotated[
        int, typer.Option(help="Calls of attention (a layer in a pass) measured in each, drawn.", min=1, metavar="N")
    ] = 12,
    heads: Annotated[int, typer.Option(help="Heads measured in each call, drawn.", min=1, metavar="N")] = 3,
    queries: Annotated[int, typer.Option(help="Queries measured in each call, drawn.", min=1, metavar="N")] = 512,
    rounds: Annotated[int, typer.Option(help="How often each setting is timed; 0: not.", min=0, metavar="N")] = 9,
    seed: Annotated[int, typer.Option(help="Of the noise and of all that is drawn.", min=0, metavar="N")] = 0,
    stories: Annotated[
        int | None, typer.Option(help="Held-out stories of the toy world. Default: 2.", min=1, metavar="N")
    ] = None,
    bank_frames: BankFrames = None,
    top_k: TopK = None,
    frames_per_prompt: FramesPerPrompt = None,
    steps: Steps = None,
    device: Device = "auto",
    weights: Weights = None,
    checkpoint: Annotated[Path | None, typer.Option(help="As for generate.", metavar="PATH")] = None,
    text_encoder: TextEncoder = None,
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    dtype: Dtype = "auto",
    height: Height = None,
    width: Width = None,
    history_frames: HistoryFrames = None,
) -> None:
    """Measure what top_k, block_size and query_group keep of a model's attention, and what they cost: how to choose
    them.

    Streams a story and compares, at calls drawn at random, every setting with dense attention over the whole bank: the
    share of its mass that the chosen blocks hold, the error of the output, and the time of the op on these tensors;
    beside them frames chosen once for a chunk, as the released MemFlow does, blocks at random, and an oracle. Defaults
    that suit one model do not suit another. Ctrl-C keeps what has been measured.
    """
    from memflow_ops import cli_profile

    options = _given(bank_frames=bank_frames, top_k=top_k, steps=steps, frames_per_prompt=frames_per_prompt)
    real = _given(
        text_encoder=text_encoder, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, height=height, width=width,
        history_frames=history_frames,
    )  # fmt: skip
    with mistakes():
        watched: Any
        if checkpoint is None:
            if real:
                raise ValueError(f"{_named(real)} need a --checkpoint; without one this is the toy world")
            watched = cli_profile.toy(story, out, stories or 2, weights, device, block_size, query_group, options)
        else:
            toy = _given(weights=weights, stories=stories)
            if toy:
                raise ValueError(f"{_named(toy)} belong to the toy world, not to a --checkpoint")
            sources, rest = _sources(checkpoint, dtype, real, ["text_encoder"])
            options |= {**rest, "device": device, "seed": seed}
            watched = cli_profile.real(story, out, sources, block_size, query_group, options)
    drawn = {"chunks": chunks, "calls": calls, "heads": heads, "queries": queries, "rounds": rounds, "seed": seed}
    cli_profile.profile(watched, out, drawn)


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value; a query group of 0 is the whole chunk."""
    given = {name: value for name, value in options.items() if value is not None}
    if "query_group" in given:
        given["query_group"] = given["query_group"] or None
    return given


def _named(given: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _sources(
    checkpoint: Path, dtype: str, real: dict[str, Any], needed: Sequence[str] = ("text_encoder", "vae")
) -> tuple[Any, dict[str, Any]]:
    """The paths of a real pipeline, and the options that are none."""
    from memflow_ops.model.wan import Sources

    missing = set(needed) - real.keys()
    if missing:
        raise ValueError(f"a --checkpoint also needs {_named(dict.fromkeys(sorted(missing)))}")
    names = Sources.__dataclass_fields__.keys() & real.keys()
    sources = Sources(checkpoint, dtype=dtype, **{"vae": None} | {name: real[name] for name in names})
    return sources, {name: value for name, value in real.items() if name not in names}


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
