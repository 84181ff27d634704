"""`make gpu-bench`: the kernels on a GPU, at the sizes of Wan 2.1 1.3B, against the best dense attention of torch.

    python -m memflow_ops.bench.gpu [--out bench/results] [--rounds 30]

What is compared runs in turn, as captured CUDA graphs, so that the time of the host is not counted; rows are medians.
Writes `<device>-<date>.json` and prints tables. `--tiny` runs every case once at small sizes, on a CPU in Triton's
interpreter too (TRITON_INTERPRET=1): its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memflow_ops import attend_selected, describe_blocks, memory_attention, select_blocks
from memflow_ops.bench import gpu_cache, inputs
from memflow_ops.bench.gpu_backward import backward_rows
from memflow_ops.bench.harness.results import record
from memflow_ops.impl.dense import NAMES, attend, why_not

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """A layer with memory: Wan 2.1 1.3B at 480 x 832, a chunk of 3 frames."""

    queries: int = 4680
    heads: int = 12
    head_dim: int = 128
    frame_tokens: int = 1560
    window_frames: int = 9
    bank_frames: int = 64
    many_frames: int = 1000
    block_size: int = 64
    top_k: int = 24
    query_group: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def blocks_per_frame(self) -> int:
        return -(-self.frame_tokens // self.block_size)

    def flops(self, keys: int) -> int:
        """Two products of every query with `keys` keys."""
        return 4 * self.queries * keys * self.heads * self.head_dim


TINY = Sizes(queries=70, heads=2, head_dim=16, frame_tokens=70, window_frames=2, bank_frames=3, many_frames=5,
             block_size=64, top_k=3, query_group=64)  # fmt: skip


@dataclass(frozen=True)
class Bank:
    k: Tensor
    v: Tensor
    descriptors: Tensor


class Bench:
    """Inputs on the device, and how calls are timed there."""

    def __init__(self, sizes: Sizes, device: torch.device, rounds: int):
        self.sizes, self.device, self.rounds = sizes, device, rounds
        s = sizes
        self.q = self.tokens(s.queries, 1)
        window = s.window_frames * s.frame_tokens
        sink = 3 * s.frame_tokens
        # the paper's baseline attends to the sink's frames and the window, one behind the other
        self.sink_and_window = [self.cached(sink + window).copy_(self.tokens(sink + window, seed)) for seed in (2, 3)]
        self.k, self.v = (x[:, sink:] for x in self.sink_and_window)
        self.random_q = self.tokens(s.queries, 1, inputs.random_tokens)
        self.backends = [name for name in NAMES[2:] if not why_not(name, self.q, self.k, self.v)]

    def cached(self, tokens: int) -> Tensor:
        """Room for keys or values that lie as in the frame cache: a head's tokens behind one another."""
        s = self.sizes
        room = torch.empty(1, s.heads, tokens, s.head_dim, dtype=s.dtype, device=self.device)
        return room.transpose(1, 2)

    def tokens(self, count: int, seed: int, make: Callable[..., Tensor] = inputs.correlated_tokens) -> Tensor:
        s = self.sizes
        return make(1, count, s.heads, s.head_dim, s.dtype, seed, str(self.device))

    def bank(self, frames: int, make: Callable[..., Tensor] = inputs.correlated_tokens, seed: int = 4) -> Bank:
        """Made some frames at a time: a thousand are 10 GB."""
        s, step = self.sizes, 40
        k, v = (self.cached(frames * s.frame_tokens) for _ in range(2))
        for first in range(0, frames, step):
            rows = slice(first * s.frame_tokens, min(first + step, frames) * s.frame_tokens)
            for offset, x in enumerate((k, v)):
                x[:, rows] = self.tokens(rows.stop - rows.start, seed + 2 * first + offset, make)
        return Bank(k, v, describe_blocks(k, s.block_size, s.frame_tokens, impl="triton"))

    def attention(self, bank: Bank | None, q: Tensor | None = None, **options: Any) -> Call:
        """memory_attention over the window and a bank."""
        s, q = self.sizes, self.q if q is None else q
        if bank is None:
            return lambda: memory_attention(q, self.k, self.v, impl="triton", **options)
        options = {"query_group": s.query_group, "top_k": s.top_k, **options}
        return lambda: memory_attention(
            q, self.k, self.v, bank.k, bank.v, memory_descriptors=bank.descriptors, block_size=s.block_size,
            frame_tokens=s.frame_tokens, impl="triton", **options,
        )  # fmt: skip

    def selection(self, bank: Bank, group: int, q: Tensor | None = None) -> Call:
        s, q = self.sizes, self.q if q is None else q
        return lambda: select_blocks(
            q, bank.descriptors, s.top_k, query_group=group, blocks_per_frame=s.blocks_per_frame, impl="triton"
        )

    def dense(self, backend: str, k: Tensor, v: Tensor) -> Call:
        return lambda: attend(backend, self.q, k, v, self.sizes.head_dim**-0.5)

    def times(self, **calls: Call) -> dict[str, float]:
        """Median seconds of each call, run in turn."""
        runs = {name: self.captured(call) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            if self.device.type != "cuda":
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    samples[name].append(time.perf_counter() - start)
                continue
            events = {}
            for name, run in runs.items():
                events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[name][0].record()
                run()
                events[name][1].record()
            torch.cuda.synchronize(self.device)
            for name, (start_event, end_event) in events.items():
                samples[name].append(start_event.elapsed_time(end_event) / 1e3)
        return {name: statistics.median(values) for name, values in samples.items()}

    def captured(self, call: Call) -> Call:
        """The call as a CUDA graph, warm; itself on a CPU."""
        call()
        if self.device.type != "cuda":
            return call
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return graph.replay


def union_size(bench: Bench, indices: Tensor) -> float:
    """Blocks that the queries of a tile walk over, on average."""
    from memflow_ops.kernels.attention.blocks import plan_union

    s = bench.sizes
    blocks = s.bank_frames * s.blocks_per_frame
    launch, _, sizes = plan_union(indices, s.queries, 1, blocks, 128)
    launch.run()
    return float(sizes.float().mean())


def dense_rows(bench: Bench) -> list[dict[str, object]]:
    """Every dense backend over the window and over as many keys as are selected; the best is what we are held to."""
    s = bench.sizes
    calls: dict[str, Call] = {}
    for name in bench.backends:
        calls[f"{name} window"] = bench.dense(name, bench.k, bench.v)
        keys = slice(0, s.top_k * s.block_size)
        calls[f"{name} selected"] = bench.dense(name, bench.k[:, keys], bench.v[:, keys])
    calls["own window"] = bench.attention(None, dense_backend="own")
    times = bench.times(**calls)
    keys_of = {"window": bench.k.shape[1], "selected": min(s.top_k * s.block_size, bench.k.shape[1])}
    return [
        {"what": name, "seconds": t, "tflops": s.flops(keys_of[name.split()[1]]) / t / 1e12}
        for name, t in times.items()
    ]


def best_of(rows: list[dict[str, Any]], kind: str) -> str:
    """The fastest backend of torch or flash-attn over these keys."""
    fit = [row for row in rows if row["what"].endswith(kind) and not row["what"].startswith("own")]
    return min(fit, key=lambda row: row["seconds"])["what"].split()[0]


def figures(bench: Bench, best_window: str, best_selected: str) -> list[dict[str, object]]:
    """The table of figures to reach: what, measured, reach, then, notes."""
    s = bench.sizes
    bank, random_bank = bench.bank(s.bank_frames), bench.bank(s.bank_frames, inputs.random_tokens)
    group = s.query_group
    indices = bench.selection(bank, group)()
    chosen = slice(0, s.top_k * s.block_size)
    times = bench.times(
        kernel=lambda: attend_selected(
            bench.q, bank.k, bank.v, indices, block_size=s.block_size, frame_tokens=s.frame_tokens, query_group=group,
            impl="triton",
        ),
        equal=bench.dense(best_selected, bench.k[:, chosen], bench.v[:, chosen]),
        window=bench.dense(best_window, bench.k, bench.v),
        sink=bench.dense(best_window, *bench.sink_and_window),
        memory=bench.attention(bank),
        selection=bench.selection(bank, group),
        per_query=bench.attention(bank, query_group=1),
        per_query_selection=bench.selection(bank, 1),
        random=bench.attention(random_bank, bench.random_q),
        random_per_query=bench.attention(random_bank, bench.random_q, query_group=1),
    )  # fmt: skip
    union = union_size(bench, bench.selection(bank, 1)())
    random_union = union_size(bench, bench.selection(random_bank, 1, bench.random_q)())
    many = bench.bank(s.many_frames)
    times |= bench.times(many=bench.attention(many), window_again=bench.dense(best_window, bench.k, bench.v))
    selected_keys = s.flops(s.top_k * s.block_size)
    rows = [
        ("bank kernel over dense attention at equal FLOPs", times["equal"] / times["kernel"], ">= 0.75", ">= 0.90",
         f"{selected_keys / times['kernel'] / 1e12:.0f} TFLOP/s; {best_selected} "
         f"{selected_keys / times['equal'] / 1e12:.0f}"),
        ("memory_attention over the window alone", times["memory"] / times["window"], "<= 1.20", "<= 1.16",
         f"{best_window}; by FLOPs {1 + s.top_k * s.block_size / bench.k.shape[1]:.3f}"),
        ("memory_attention over sink and window dense", times["memory"] / times["sink"], "<= 0.95", "<= 0.88",
         best_window),
        (f"selection of the total, groups of {group}", times["selection"] / times["memory"], "<= 0.03", "<= 0.01", ""),
        ("selection of the total, per query", times["per_query_selection"] / times["per_query"], "<= 0.25", "<= 0.10",
         ""),
        (f"query_group 1 over {group}, correlated", times["per_query"] / times["memory"], "<= 2.0", "<= 1.4",
         f"union of a tile {union:.0f} of {s.bank_frames * s.blocks_per_frame} blocks"),
        (f"query_group 1 over {group}, random", times["random_per_query"] / times["random"], "", "",
         f"union of a tile {random_union:.0f}"),
        (f"bank of {s.many_frames} frames over {s.bank_frames}", times["many"] / times["memory"], "<= 1.3", "<= 1.1",
         f"window alone took {times['window_again'] / times['window']:.2f} of before"),
    ]  # fmt: skip
    names = ("what", "measured", "reach", "then", "notes")
    return [{**dict(zip(names, row, strict=True))} for row in rows] + [{"what": "seconds", "times": times}]


def crossovers(bench: Bench, best_window: str) -> list[dict[str, object]]:
    """One launch or two by the bank's size, and the window in our launch or a backend's by its length."""
    from memflow_ops.kernels.attention.forward import plan_select_and_attend

    s, rows = bench.sizes, []

    def bank_part(bank: Bank, launches: int) -> Call:
        def run() -> None:
            planned, *_ = plan_select_and_attend(
                bench.q, None, None, bank.k, bank.v, bank.descriptors, top_k=s.top_k, block_size=s.block_size,
                frame_tokens=s.frame_tokens, query_group=s.query_group, softmax_scale=s.head_dim**-0.5,
                launches=launches,
            )  # fmt: skip
            for launch in planned:
                launch.run()

        return run

    for frames in (f for f in (1, 2, 4, 8, 16, 32, 64) if f <= s.bank_frames):
        bank = bench.bank(frames)
        times = bench.times(one=bank_part(bank, 1), two=bank_part(bank, 2))
        rows.append({"what": f"bank of {frames} frames", "one_launch": times["one"], "two_launches": times["two"]})
    bank = bench.bank(min(8, s.bank_frames))
    for keys in (n for n in (128, 256, 512, 1024, 1560, 3120, 14040) if n <= bench.k.shape[1]):
        short = replace_window(bench, keys)
        times = bench.times(
            own=short.attention(bank, dense_backend="own"), backend=short.attention(bank, dense_backend=best_window)
        )
        rows.append({"what": f"window of {keys} keys", "own": times["own"], best_window: times["backend"]})
    return rows


def replace_window(bench: Bench, keys: int) -> Bench:
    short = object.__new__(Bench)
    short.__dict__.update(bench.__dict__, k=bench.k[:, :keys], v=bench.v[:, :keys])
    return short


def tuning(bench: Bench) -> list[dict[str, Any]]:
    """The bank kernel under other tiles than configs.py has, and with the last wave not split."""
    from memflow_ops.kernels import configs

    s = bench.sizes
    rows: list[dict[str, Any]] = []
    bank = bench.bank(min(16, s.bank_frames))
    group, single = (bench.selection(bank, size)() for size in (s.query_group, 1))
    options: dict[str, Any] = dict(block_size=s.block_size, frame_tokens=s.frame_tokens, impl="triton")
    tiles, splits = dict(configs.ATTEND_TILES), configs.MAX_SPLITS
    # BLOCK_M, BLOCK_N, num_warps, num_stages; the last tile has room for two programs on sm_90
    tries: list[tuple[int, int, int, int] | None] = [
        None, (128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 4, 3)
    ]  # fmt: skip
    try:
        for tile, most_splits in [*((tile, splits) for tile in tries), (None, 1)]:
            configs.ATTEND_TILES.update(tiles if tile is None else {row: {256: tile} for row in tiles})
            configs.MAX_SPLITS = most_splits
            name = "the table's" if tile is None else "{} x {}, {} warps, {} stages".format(*tile)
            name += "" if most_splits > 1 else ", last wave not split"
            row: dict[str, Any] = {"what": name}
            calls: dict[str, Call] = {
                "group": lambda: attend_selected(
                    bench.q, bank.k, bank.v, group, query_group=s.query_group, **options
                ),
                "per_query": lambda: attend_selected(bench.q, bank.k, bank.v, single, query_group=1, **options),
                "window": bench.attention(None, dense_backend="own"),
            }  # fmt: skip
            try:
                row |= bench.times(**calls)
            except Exception as error:  # a tile that the device has no room for is an answer too
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    finally:
        configs.ATTEND_TILES.update(tiles)
        configs.MAX_SPLITS = splits
    default = rows[0]
    for what in ("group", "per_query", "window"):
        timed = [row for row in rows if what in row and what in default]
        if timed:
            best = min(timed, key=lambda row: row[what])
            gain = default[what] / best[what] - 1
            rows.append(
                {
                    "what": f"best for {what}: {best['what']}",
                    what: best[what],
                    "advice": f"{gain:.1%} faster: make it the default in configs.py" if gain > 0.02 else "keep",
                }
            )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "times"))
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("what", "notes") else "right")
    for row in rows:
        if "times" not in row:
            cells = (row.get(name, "") for name in columns)
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=150).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--tiny", action="store_true", help="every case once at small sizes: does it run?")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        print("gpu-bench: no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if arguments.tiny else Sizes()
    started = time.perf_counter()
    with torch.no_grad():
        bench = Bench(sizes, device, 1 if arguments.tiny else arguments.rounds)
        sections: dict[str, list[dict[str, Any]]] = {"dense backends": dense_rows(bench)}
        best_window, best_selected = (best_of(sections["dense backends"], kind) for kind in ("window", "selected"))
        steps: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "figures": lambda: figures(bench, best_window, best_selected),
            "cache write": lambda: gpu_cache.cache_write(bench),
            "retrieval": lambda: gpu_cache.retrieval(bench),
            "backward": lambda: backward_rows(bench),
            "crossovers": lambda: crossovers(bench, best_window),
            "tuning": lambda: tuning(bench),
        }
        show("dense backends", sections["dense backends"])
        for name, step in steps.items():
            sections[name] = step()
            show(name, sections[name])
            # after each step: what was measured is kept even if a later one fails
            target = record(arguments.out, device, "gpu_bench", {"rounds": bench.rounds, **sections})
    print(f"written to {target} after {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
