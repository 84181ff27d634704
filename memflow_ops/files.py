"""Files that are written whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; a reader, or a crash, sees the old file or the new one, never a part.

    The temporary file lies beside the target, because only inside one file system is a rename atomic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    os.umask(mask := os.umask(0o022))
    return mask


def check_folder(folder: Path) -> None:
    """A ValueError where no files can be written to a folder, or it cannot be made; makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to the folder {folder}: {there} is a file")
    trial = there / f".{os.getpid()}.tmp"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}") from error


def check_target(path: Path, suffix: str) -> None:
    """A ValueError where no file of that name and suffix can be written; makes nothing."""
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"what is written takes the name of a {suffix} file, got {path}")
    check_folder(path.parent)


def sha256(path: Path) -> str:
    """Which file it was, in a result that depends on it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
