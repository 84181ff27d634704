"""The command `memflow`: all of its commands, and its entry point."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from memflow_ops import __version__
from memflow_ops.allocator import keep_freed_memory
from memflow_ops.cli import toy
from memflow_ops.cli.bench import bench
from memflow_ops.cli.checkpoints import convert, verify
from memflow_ops.cli.errors import InterruptibleGroup
from memflow_ops.cli.generate import generate
from memflow_ops.cli.info import info
from memflow_ops.cli.output import patient_output
from memflow_ops.cli.profile import profile_selection, toy_profile_selection
from memflow_ops.cli.score import score
from memflow_ops.cli.serve import serve

TOY, REAL, LIVE, MACHINE = "Toy world", "Real checkpoints", "Live", "This machine"

app = typer.Typer(
    cls=InterruptibleGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
toy_app = typer.Typer(no_args_is_help=False, invoke_without_command=True, rich_markup_mode="rich")


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Long memory for streaming video: generate a video from a story, chunk by chunk, and see what it remembered.

    A good first command, which needs nothing but this package and less
    than a minute on a CPU:

      memflow toy demo
    """
    if version:
        typer.echo(f"memflow-ops {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    keep_freed_memory()


@toy_app.callback()
def start_toy(context: typer.Context) -> None:
    """Try memory out in a small world of coloured shapes that a CPU streams in minutes.

    Its model comes with the package. Its prompts say who is where, such as
    "a ball and a star in the meadow", and whether a character that returns
    looks as it did is judged from the pixels.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


toy_app.command()(toy.demo)
toy_app.command()(toy.generate)
toy_app.command()(toy.evaluate)
toy_app.command()(toy.train)
toy_app.command("profile-selection")(toy_profile_selection)

app.add_typer(toy_app, name="toy", rich_help_panel=TOY)
app.command(rich_help_panel=REAL)(generate)
app.command(rich_help_panel=REAL)(convert)
app.command(rich_help_panel=REAL)(verify)
app.command("profile-selection", rich_help_panel=REAL)(profile_selection)
app.command(rich_help_panel=REAL)(score)
app.command(rich_help_panel=LIVE)(serve)
app.command(rich_help_panel=MACHINE)(bench)
app.command(rich_help_panel=MACHINE)(info)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name (None: those of the process). Always ends in SystemExit."""
    with patient_output() as output:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        for stream in output:
            stream.flush()
            if stream.error is not None and not isinstance(stream.error, BrokenPipeError):
                words = f"memflow: not all could be printed ({stream.error}); everything else was done"
                typer.echo(words, err=True)
                code = code or 1
    sys.exit(code)


def _run(words: list[str]) -> int:
    """Run a command. Gives its exit code."""
    try:
        code = app(args=words, prog_name="memflow", standalone_mode=False)
    except typer.TyperException as error:  # an option that does not exist, a number out of range, ...
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "memflow"
        typer.echo(f"memflow: {' '.join(error.format_message().split()).rstrip('.')} (see {command} --help)", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("memflow: interrupted", err=True)
        code = 130
    return code if isinstance(code, int) else 0
