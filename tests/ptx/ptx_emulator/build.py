"""The core as a library: compiled by g++ at first use, into a folder under the hash of its sources."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ptx_emulator.operations import CORE
from ptx_emulator.program import INSTRUCTION
from ptx_emulator.structures import Finding, Job, Region, TensorMap

BUILD = Path(__file__).parents[3] / "build" / "ptx"
# Every operation rounds for itself: the compiler must not fuse a product with a sum.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fPIC")


def why_not() -> str:
    """Why the core cannot be built here; "" if it can."""
    return "" if shutil.which("g++") else "g++ is missing: the emulator of PTX is compiled at first use"


@cache
def core() -> ctypes.CDLL:
    """The library, built if these sources have not been built yet. An error shows what the compiler said."""
    sources = sorted(CORE.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = BUILD / f"core-{digest}"
    library = folder / "core.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=folder))  # several processes may build at once; the last one to end wins
        objects = [own / f"{path.stem}.o" for path in sources if path.suffix == ".cpp"]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda o: compile_with("-c", str(CORE / f"{o.stem}.cpp"), "-o", str(o)), objects))
        compile_with("-shared", *map(str, objects), "-o", str(own / "core.so"))
        (own / "core.so").replace(library)
        shutil.rmtree(own)
    loaded = ctypes.CDLL(str(library))
    sizes = [loaded.size_of(number) for number in range(5)]
    expected = [INSTRUCTION.itemsize, *(ctypes.sizeof(structure) for structure in (Region, Finding, Job, TensorMap))]
    assert sizes == expected, f"interface.h and structures.py disagree: {sizes} and {expected} bytes"
    return loaded


def compile_with(*arguments: str) -> None:
    finished = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"g++ {' '.join(arguments)} failed:\n{finished.stderr[-3000:]}")
