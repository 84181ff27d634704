"""The optional packages of the extra [wan]: errors that say how to install them, and checks of what they load."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from memflow_ops.model.checkpoints.containers import some


@contextmanager
def needs(package: str) -> Iterator[None]:
    """A context for an import from the extra [wan]. If the package is missing, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{package} is not installed; real checkpoints need it: pip install 'memflow-ops[wan]'", name=package
        ) from error


def check_loaded(info: Mapping[str, Any], source: str, may_remain: tuple[str, ...] = ()) -> None:
    """A ValueError that names every weight that is missing, unexpected or of the wrong shape. transformers and
    diffusers would fill it with random numbers, or ignore it.

    info: the loading info that they return. may_remain: beginnings of names of weights that a file may have although
        the model does not.
    """
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"]) if not name.startswith(may_remain)]
    problems += [f"of another shape {' '.join(map(str, wrong))}" for wrong in info["mismatched_keys"]]
    if problems:
        raise ValueError(f"{source} does not fit its config.json: {some(problems)}")


def own_memory(model: Any) -> Any:
    """The model, with weights in memory of their own. diffusers and transformers leave those on the CPU as views of the
    mapped file: whoever overwrites the file changes them, and whoever truncates it ends the process."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off the progress bars of transformers in this context."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
