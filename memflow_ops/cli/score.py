"""`memflow score`: does what comes back in a video look as it did when it came first?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from memflow_ops.cli.errors import fail, one_line_errors
from memflow_ops.cli.generate import any_prompt
from memflow_ops.cli.options import SPEED, Story
from memflow_ops.environment import pick_device
from memflow_ops.files import check_target, write_atomically
from memflow_ops.model.score.encoders import TOY, load_encoder
from memflow_ops.model.score.score import read_run, score_video, summarise
from memflow_ops.model.score.subjects import find_returns, toy_naming, word_naming
from memflow_ops.model.stories.prompts import read_stories
from memflow_ops.model.stories.video import read_video
from memflow_ops.model.toy.language import parse_prompt


def score(
    video: Annotated[
        Path,
        typer.Argument(
            help="A video, or the folder that `memflow generate` or `memflow toy generate` has written.",
            metavar="VIDEO",
        ),
    ],
    story: Story,
    encoder: Annotated[
        str,
        typer.Option(
            help="What looks at the frames: the folder of a timm, open_clip or transformers model, or toy for the toy "
            "world's judge.",
            metavar="PATH",
        ),
    ],
    background_encoder: Annotated[
        str | None,
        typer.Option(
            help="Another one for the consistency of the background; VBench takes DINO for subjects and CLIP for this.",
            metavar="PATH",
        ),
    ] = None,
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help="Whom the story is about, as its prompts say it, such as 'red fox'. May be repeated.",
            metavar="WORDS",
            show_default="the toy world's characters with --encoder toy, and no others",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .json file for all figures, return by return.", metavar="FILE")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", metavar="NAME", rich_help_panel=SPEED)
    ] = "auto",
) -> None:
    """Score whether those who leave a video and return look as they did.

    For every return: how alike it is to the first appearance, to the prompts
    that do not name it (chance), and to the others. Retained is 0 by chance
    and 1 for the same picture. A video that hardly moves is named and not
    scored. Works for any video whose prompts are known, whatever made it.

    Examples:

      memflow score out/demo/video.mp4 story.jsonl --encoder toy
      memflow score fox.mp4 fox.jsonl --encoder dino --subject 'red fox'
    """
    with one_line_errors():
        if encoder == TOY and subject:
            raise ValueError("--encoder toy looks for the toy world's characters: leave --subject out")
        named = toy_naming if encoder == TOY else word_naming(subject or [])
        stories = read_stories(story, parse_prompt if encoder == TOY else any_prompt)
        if not any(find_returns(prompts, named) for prompts in stories):
            raise ValueError(f"nobody leaves and returns in {story}: a prompt must name a subject that others did not")
        videos = _videos(video, len(stories))
        if out is not None:
            check_target(out, ".json")
        where = pick_device(device)
        looking = load_encoder(encoder, where)
        background = None if background_encoder is None else load_encoder(background_encoder, where)
        scored = []
        for path, prompts in zip(videos, stories, strict=True):
            words = path.name if len(videos) == 1 else f"{path.parent.name}/{path.name}"
            run = read_run(path, prompts)
            scored.append(score_video(words, _read(path), prompts, named, looking, background, run))
    result = summarise(scored, looking, background)
    typer.echo(_table(result))
    if out is not None:
        with one_line_errors(code=1):
            write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())
        typer.echo(f"written to {out}")
    if result["frozen"]:
        fail(f"not scored, because hardly a frame differs from the one before: {', '.join(result['frozen'])}", code=1)


def _videos(path: Path, stories: int) -> list[Path]:
    """The video of every story. A ValueError where one is missing."""
    if path.is_dir():
        videos = (
            [path / "video.mp4"] if stories == 1 else [path / f"story-{i:03d}" / "video.mp4" for i in range(stories)]
        )
    elif stories > 1:
        raise ValueError(
            f"there are {stories} stories, so that VIDEO must be the folder that holds story-000 and so on"
        )
    else:
        videos = [path]
    missing = [one for one in videos if not one.is_file()]
    if missing:
        raise ValueError(f"there is no video at {missing[0]}")
    return videos


def _read(path: Path) -> Any:
    try:
        return read_video(path)
    except Exception as error:  # FFmpeg's errors are of many types.
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def _table(result: dict[str, Any]) -> str:
    """The figures in words."""
    lines = [f"{result['encoder']}; {result['returns']} returns"]

    def line(words: str, value: float | None, more: str = "") -> None:
        if value is not None:
            lines.append(f"  {words:<44}{value:8.3f}{more}")

    between = result["retained_interval"]
    line(
        "retained (0 chance, 1 the same)",
        result["retained"],
        f"  ({between[0]:.3f} to {between[1]:.3f})" if between else "",
    )
    line("retained per GB of the stream's cache", result["retained_per_gb"])
    line("similarity to the first appearance", result["similarity"])
    line("  to prompts that do not name it", result["chance"])
    line("  to the other who is most like it", result["others"])
    seen = result["recognised"]
    if seen:
        line("more like itself than like any other", seen["value"], f"  ({seen['low']:.3f} to {seen['high']:.3f})")
    line("subject consistency (VBench's formula)", result["subject_consistency"])
    line("background consistency (VBench's formula)", result["background_consistency"])
    return "\n".join(lines)
