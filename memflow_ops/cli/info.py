"""`memflow info`: versions, the device, and what can run here."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch
import typer

from memflow_ops import __version__, environment
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS


def info() -> None:
    """Print the versions, the device, and what can run on this machine.

    Please include what it prints when you report a problem.
    """
    typer.echo("versions")
    _line("memflow-ops", __version__)
    _line("python", platform.python_version())
    _line("torch", torch.__version__)
    _line("triton", environment.version("triton") or "not installed")
    _line("flash-attn", environment.version("flash-attn") or "not installed (pip install 'memflow-ops[flash]')")
    for name in ("diffusers", "transformers"):
        missing = "not installed (pip install 'memflow-ops[wan]', for real checkpoints)"
        _line(name, environment.version(name) or missing)
    device = environment.pick_device("auto")
    typer.echo("device")
    _line(device.type, environment.device_name(device))
    typer.echo("implementations of the ops")
    _available(environment.implementations())
    typer.echo("dense backends for the local window")
    _available(environment.dense_backends())
    typer.echo("toy weights")
    try:
        model = load_checkpoint(TOY_WEIGHTS)
    except (OSError, ValueError) as error:
        _line("none", error)
    else:
        _line(f"{sum(x.numel() for x in model.parameters()):,} parameters", TOY_WEIGHTS)


def _line(name: str, value: object) -> None:
    typer.echo(f"  {name:<34}{value}")


def _available(why_not: Mapping[str, str]) -> None:
    """Print a line for each entry. why_not: name -> why it cannot run here, or an empty string where it can."""
    for name, reason in why_not.items():
        _line(name, f"no: {reason}" if reason else "yes")
