"""A soak: thousands of chunks with most of the past on disk alone, against the same stream with all of it in memory.

    python -m memflow_ops.bench.soak --chunks 2000

streams a held-out story of the toy world twice, each time in a process of its own: with few slots on the device and in
host memory and the rest on disk, and with room in memory for everything. It writes the resident size after every chunk,
whether all frames are the same to the bit, and how many frames were read ahead of use, as soak.json, and the two curves
as a picture. Each chunk has one denoising step: what is soaked is the memory, not the model.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memflow_ops.allocator import keep_freed_memory
from memflow_ops.environment import environment
from memflow_ops.files import write_atomically
from memflow_ops.model.plot_style import INK, OTHERS, PALE, SUBJECT, new_figure, own_style, plain_panel, png
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, make_stories
from memflow_ops.model.toy.language import embed_prompts
from memflow_ops.model.toy.settings import TOY_SETTINGS

DEVICE_FRAMES, HOST_FRAMES = 8, 16
WARM = 100
"""Chunks before the resident size is held against; until then buffers are allocated and code is imported."""
PICTURE = Path("docs/pictures/soak.png")


def prompts_of(chunks: int, seed: int) -> list[tuple[str]]:
    """The prompts of so many chunks: held-out stories, one after the other."""
    words: list[str] = []
    for number in range(chunks):
        if len(words) * FRAMES_PER_PROMPT // 3 >= chunks:
            break
        for stories in make_stories(1, seed + number):
            words += stories[0]
    return [(words[chunk * 3 // FRAMES_PER_PROMPT],) for chunk in range(chunks)]


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stream_once(chunks: int, seed: int, folder: Path | None) -> dict[str, Any]:
    """Streams so many chunks with the history in `folder` (None: in memory), and says what was measured."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model = load_model(TOY_WEIGHTS, torch.device("cpu"))
    beyond = chunks - DEVICE_FRAMES - HOST_FRAMES
    in_host, on_disk = (HOST_FRAMES + beyond, 0) if folder is None else (HOST_FRAMES, beyond)
    tiers = {"device_frames": DEVICE_FRAMES, "host_frames": in_host, "disk_frames": on_disk}
    settings = StreamSettings(**{**vars(TOY_SETTINGS), "steps": 1, **tiers})
    streamer = Streamer(model, 1, settings, seed, encode=embed_prompts, history_dir=folder)
    prompts, sizes, digest = prompts_of(chunks, seed), [], hashlib.sha256()
    started = time.perf_counter()
    for index in range(chunks):
        chunk = streamer.next_chunk(prompts[index], prompts[min(index + 1, chunks - 1)])
        digest.update(chunk.frames.numpy().tobytes())
        sizes.append(resident_bytes())
    hits, misses = streamer.cache.disk_reads()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    return {"resident_bytes": sizes, "sha256": digest.hexdigest(), "hits": hits, "misses": misses, "seconds": seconds}


def soak(chunks: int, seed: int, folder: Path) -> dict[str, Any]:
    """Both streams, each in a process of its own."""
    found: dict[str, Any] = {**environment(torch.device("cpu")), "chunks": chunks, "seed": seed}
    found |= {"device_frames": DEVICE_FRAMES, "host_frames": HOST_FRAMES, "warm": WARM}
    for name, more in (("disk", ["--folder", str(folder)]), ("memory", [])):
        words = [sys.executable, "-m", "memflow_ops.bench.soak", "--chunks", str(chunks), "--seed", str(seed), "--once"]
        done = subprocess.run([*words, *more], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)
    sizes = found["disk"]["resident_bytes"][min(WARM, chunks // 2) :]
    found["spread"] = (max(sizes) - min(sizes)) / min(sizes)
    found["same_frames"] = found["disk"].pop("sha256") == found["memory"].pop("sha256")
    reads = found["disk"]["hits"] + found["disk"]["misses"]
    found["read_ahead"] = found["disk"]["hits"] / reads if reads else None
    return found


@own_style()
def draw(found: dict[str, Any]) -> bytes:
    """The resident size of both streams, chunk by chunk, as the content of a PNG file."""
    figure = new_figure(7.2, 3.2)
    panel = figure.subplots()
    lines = (
        ("memory", OTHERS, "all of the past in memory"),
        ("disk", SUBJECT, "8 frames on the device, 16 in host memory"),
    )
    for name, colour, words in lines:
        sizes = [size / 2**20 for size in found[name]["resident_bytes"]]
        panel.plot(range(1, len(sizes) + 1), sizes, color=colour, linewidth=1.8)
        panel.annotate(words, (len(sizes), sizes[-1]), (-6, 5), textcoords="offset points", ha="right", color=colour)
    panel.set_xlabel("chunk", color=PALE)
    panel.set_ylabel("resident size, MiB", color=PALE)
    panel.set_ylim(bottom=0)
    panel.set_title("The same frames, with most of the past on disk alone", loc="left", color=INK, fontsize=11)
    plain_panel(panel)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m memflow_ops.bench.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, default=2000, help="how many; 2000 by default")
    parser.add_argument("--seed", type=int, default=40000, help="of the stories and the noise")
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak.json"), help="the file to write")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the picture to write")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.chunks <= DEVICE_FRAMES + HOST_FRAMES:
        parser.error(f"--chunks must be more than {DEVICE_FRAMES + HOST_FRAMES}, what the device and the host hold")
    if given.once:
        print(json.dumps(stream_once(given.chunks, given.seed, given.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = soak(given.chunks, given.seed, Path(folder))
    write_atomically(given.out, (json.dumps(found) + "\n").encode())
    write_atomically(given.picture, draw(found))
    print(
        f"{found['chunks']} chunks: resident size within {100 * found['spread']:.2f} % after chunk {WARM}; frames "
        f"{'equal to the bit' if found['same_frames'] else 'DIFFER'}; {found['disk']['hits']} of "
        f"{found['disk']['hits'] + found['disk']['misses']} frames that were on disk alone were read ahead of use"
    )


if __name__ == "__main__":
    main()
