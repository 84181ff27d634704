"""The command `memflow`."""

from memflow_ops.cli.main import main

__all__ = ["main"]
