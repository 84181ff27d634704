"""What the extra [wan] brings, imported on first use, and what its loaders leave unsaid."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def needs(package: str) -> Iterator[None]:
    """Around an import from the extra [wan]: says how to install what is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{package} is not installed; real checkpoints need it: pip install 'memflow-ops[wan]'", name=package
        ) from error


def check_loaded(info: Mapping[str, Any], source: str, may_remain: tuple[str, ...] = ()) -> None:
    """A ValueError that names the weights which transformers or diffusers would have made up or left out.

    info: their loading info. may_remain: beginnings of names that a file may have beyond the model.
    """
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"]) if not name.startswith(may_remain)]
    problems += [f"of another shape {' '.join(map(str, wrong))}" for wrong in info["mismatched_keys"]]
    if problems:
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(problems)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers' loader."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
