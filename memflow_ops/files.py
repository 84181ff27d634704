"""Files that are written whole or not at all, and by one process at a time."""

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NAME_BYTES = 255
"""The bytes that a file's name may have on the file systems of Linux."""


class InUse(ValueError):
    """Another process is writing what this one wants to write."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, and rename the file in the end, so that nobody ever sees a part of it.

    The temporary file lies beside the target, because a rename is atomic only inside one file system. An error leaves
    the old file as it was. A symbolic link stays one, and the file that it leads to is written. A file that is replaced
    keeps its permissions.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, f".{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # Without this, safetensors makes files that only their owner may read.
        temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Let only one process at a time be inside for this path, where it may read the file and write it anew.

    Others wait, or with wait=False get an `InUse`. The lock is a file beside `path`, which is there while it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(_beside(path, ".lock"), wait, f"another process is writing {path}: wait for it, or name another file"):
        yield


@contextmanager
def locked_folders(folders: Iterable[Path]) -> Iterator[None]:
    """Let only one process at a time write to these folders, which are there. Others get an `InUse`.

    The lock is a file in each folder, which is there while it is held. Temporary files of `replacing` whose process was
    killed are deleted.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folders):
            refusal = f"another process is writing to the folder {folder}: wait for it, or name another folder"
            held.enter_context(_held(folder / ".folder.lock", wait=False, refusal=refusal))
            delete_abandoned(folder)
        yield


def delete_abandoned(folder: Path) -> None:
    """Delete the temporary files of `replacing` in a folder whose process was killed. Nobody on another machine may be
    writing there: only the processes of this one are known."""
    for path in folder.glob(".*.tmp"):
        number = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if number and not _is_running(int(number[1])):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _held(lock: Path, wait: bool, refusal: str) -> Iterator[None]:
    """Hold the lock, which is a file. refusal: what the `InUse` says where another holds it and wait is False."""
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(refusal) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise  # Otherwise this file system has no locks, as some of clusters: better none than no file.
            try:
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:
                held = False
            if not held:
                continue  # The last holder deleted this file, and a lock on a deleted file keeps nobody out.
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _beside(path: Path, ending: str) -> Path:
    """A hidden name beside a file. A name that would be too long for the file system has its end cut off, and is told
    from others by a digest."""
    if len(os.fsencode(path.name)) + len(ending) < NAME_BYTES:
        return path.with_name(f".{path.name}{ending}")
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    kept = os.fsencode(path.name)[: NAME_BYTES - len(ending) - len(digest) - 2]
    return path.with_name(f".{kept.decode(errors='ignore')}.{digest}{ending}")


def _umask() -> int:
    os.umask(mask := os.umask(0o022))
    return mask


def check_folder(folder: Path) -> None:
    """Raise a ValueError if the folder cannot be made, or no files can be written to it. Makes nothing."""
    _check_names(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write to the folder {folder}: {there} is a file")
    trial = there / f".{os.getpid()}.tmp"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {folder}: {error.strerror}") from error


def _check_names(path: Path) -> None:
    """Raise a ValueError if a part of the path is longer than file systems take."""
    for name in path.parts:
        if len(os.fsencode(name)) > NAME_BYTES:
            raise ValueError(
                f"the name {name[:40]}... has {len(os.fsencode(name))} bytes, and a file system takes {NAME_BYTES}: "
                f"choose a shorter one"
            )


def check_target(path: Path, suffix: str) -> None:
    """Raise a ValueError if the path does not have the suffix, or no file can be written there. Makes nothing."""
    if path.suffix != suffix:
        raise ValueError(f"what is written takes the name of a {suffix} file, got {path}")
    target = Path(os.path.realpath(path))
    _check_names(target)
    if target.is_symlink():
        raise ValueError(f"{path} is a symbolic link that leads to itself; expected a file or a name that is free")
    if target.exists() and not target.is_file():
        raise ValueError(f"what is written takes the name of a {suffix} file, got {path}, which is no file")
    check_folder(target.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal: a result names a file that it depends on by this."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_picture(path: Path, draw: Callable[[], bytes]) -> str:
    """Write a picture, which never costs the rest of the work. Where that fails, say why; otherwise "".

    There is no picture then, because an earlier one would be taken for this one.
    """
    try:
        write_atomically(path, draw())
    except Exception as error:  # The libraries that draw raise errors of many types.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return f"{path.name} could not be drawn, and everything else was done: {type(error).__name__}: {error}"
    return ""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
