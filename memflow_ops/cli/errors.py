"""How a command ends when something goes wrong: one line on stderr and an exit code.

Exit codes: 2 where the user can mend it (a wrong option, a missing file), 1 where the work itself failed, 130 after
Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
import typer.core


def fail(message: str, code: int) -> NoReturn:
    """Print the message as one line on stderr and end the command with the exit code."""
    typer.echo(f"memflow: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line_errors(code: int = 2) -> Iterator[None]:
    """End the command with one line instead of a traceback where the code inside refuses its arguments or a file."""
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        fail(str(error), code)


class InterruptibleGroup(typer.core.TyperGroup):
    """A group of commands that says so when Ctrl-C ends one of them. Typer alone only sets the exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", code=130)
