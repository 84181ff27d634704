"""Files that are written whole or not at all, and by one process at a time."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, and rename the file in the end, so that nobody ever sees a part of it.

    The temporary file lies beside the target, because a rename is atomic only inside one file system. An error leaves
    the old file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # Safetensors makes files that only their owner may read.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Let only one process at a time be inside for this path, where it may read the file and write it anew.

    Others wait, or with wait=False get a ValueError. The lock is a file beside `path`, which is there while it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is writing {path}: wait for it, or name another file") from None
            try:
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:
                held = False
            if not held:
                continue  # The last holder deleted this file, and a lock on a deleted file keeps nobody out.
            try:
                yield
            finally:
                lock.unlink()
            return


def _umask() -> int:
    os.umask(mask := os.umask(0o022))
    return mask


def check_folder(folder: Path) -> None:
    """Raise a ValueError if the folder cannot be made, or no files can be written to it. Makes nothing."""
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
    """Raise a ValueError if the path does not have the suffix, or no file can be written there. Makes nothing."""
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"what is written takes the name of a {suffix} file, got {path}")
    check_folder(path.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal: a result names a file that it depends on by this."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
