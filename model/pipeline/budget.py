"""What a stream will take of the device's memory and of the host's, counted before it starts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from memflow_ops.cache.layout import CacheLayout
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.transformer import ModelConfig

PASS_UNITS = 8
"""Working memory of a pass in units of chunk tokens x (dim + ffn_dim) numbers. Measured on a CPU (dim 1536, ffn 8960,
1170 tokens, float32) by the resident size: 8."""
DECODER_UNITS = 13
"""Working memory of the VAE's decoder in units of base_dim x 4 frames x height x width numbers. Measured on a CPU
(base_dim 96, 120 x 208 pixels, float32) by the resident size, state included: 18.5."""
DECODER_STATE_UNITS = 7
"""What it keeps of each story from chunk to chunk, likewise: 6.2."""


@dataclass(frozen=True)
class Item:
    """A line of the arithmetic."""

    name: str
    size: int
    """bytes"""
    how: str = ""


@dataclass(frozen=True)
class Need:
    """Bytes that are there beside the cache."""

    items: tuple[Item, ...]
    free: int
    """of the device, before any of it is allocated"""
    host_free: int | None
    """of the host; None where the device is the host"""
    device: str
    """in words"""


@dataclass(frozen=True)
class Budget:
    """The arithmetic of one stream."""

    settings: StreamSettings
    """with device_frames and host_frames as planned"""
    layout: CacheLayout
    need: Need

    @property
    def cache_items(self) -> list[Item]:
        layout = self.layout
        frame, window, sink = layout.frame_bytes, layout.window_frames, layout.sink_frames
        items = [Item(f"local window, {window} frames", window * frame), Item(f"sink, {sink} frames", sink * frame)]
        past = layout.pool_frames - window - sink
        if layout.device_frames:
            name = f"history, {past} frames, {layout.bank_frames} of them as the bank"
        else:
            name = f"bank, {past} frames"
        items += [Item(name, past * frame), Item("means for retrieval", layout.means_bytes)]
        return [item for item in items if item.size]

    @property
    def device_items(self) -> list[Item]:
        return [*self.cache_items, *self.need.items]

    @property
    def device_bytes(self) -> int:
        return sum(item.size for item in self.device_items)

    @property
    def host_bytes(self) -> int:
        return self.layout.host_bytes

    def lines(self) -> list[str]:
        """The arithmetic, a line each."""
        layout = self.layout
        stories = f"{layout.batch} {'story' if layout.batch == 1 else 'stories'}"
        vectors = f"(2 x {layout.frame_tokens} tokens + {layout.blocks_per_frame} blocks)"
        numbers = f"{vectors} x {layout.kv_heads} heads x {layout.head_dim} x {layout.dtype.itemsize} bytes"
        frame = Item("one frame", layout.frame_bytes, f"{layout.layers} layers x {stories} x {numbers}")
        rows = [frame, *self.device_items, Item("in all", self.device_bytes, f"of {size(self.need.free)} free")]
        if self.host_bytes:
            free = "" if self.need.host_free is None else f", of {size(self.need.host_free)} free"
            where = f"in host memory: history, {layout.host_frames} frames more, and one to swap through{free}"
            rows.append(Item("further history", self.host_bytes, where))
        width = max(len(row.name) for row in rows)
        return [
            f"Memory on {self.need.device}:",
            *(f"  {row.name:<{width}}  {size(row.size):>10}  {row.how}".rstrip() for row in rows),
        ]


def plan_memory(
    settings: StreamSettings,
    layout_of: Callable[[StreamSettings], CacheLayout],
    prototypes: int,
    need: Need,
    history_frames: int | None = None,
) -> Budget:
    """Divides the history between device and host, or refuses.

    layout_of: the cache that settings would allocate.
    prototypes: what the stream will leave behind; beyond history_frames (None: all) the oldest is forgotten.

    As many frames as fit stay on the device; where they lie changes no result. A ValueError with the arithmetic and the
    setting to lower, and to what, where it cannot fit.
    """
    history = prototypes if history_frames is None else min(history_frames, prototypes)
    if settings.memory in ("memflow", "full"):
        settings = replace(settings, bank_frames=min(settings.bank_frames, max(history, 1)))
    if settings.memory == "full":
        if history < prototypes:
            raise ValueError(
                f"memory 'full' attends to all {prototypes} frames that this stream leaves behind, so --history-frames "
                f"cannot be {history}; use --memory memflow"
            )
        return _checked(_budget(replace(settings, device_frames=max(history, _least(settings))), layout_of, need))
    if settings.memory != "memflow":
        return _checked(_budget(settings, layout_of, need))

    least = _least(settings)
    history = max(history, least)
    smallest = replace(settings, device_frames=least, host_frames=history - least)
    fitting = _checked(_budget(smallest, layout_of, need))
    on_device = min(history, least + (need.free - fitting.device_bytes) // fitting.layout.frame_bytes)
    planned = replace(settings, device_frames=on_device, host_frames=history - on_device)
    budget = _budget(planned, layout_of, need)
    if budget.host_bytes:
        free = need.free - budget.device_bytes if need.host_free is None else need.host_free
        if budget.host_bytes > free:
            fits = on_device + max(0, free // budget.layout.frame_bytes - 1)
            raise ValueError(
                f"a history of {history} frames does not fit: {on_device} on the device, and the {planned.host_frames} "
                f"in host memory need ({planned.host_frames} + 1) x {size(budget.layout.frame_bytes)} = "
                f"{size(budget.host_bytes)} where {size(max(free, 0))} are free; lower --history-frames to {fits} (the "
                f"oldest frames beyond are forgotten)"
            )
    return budget


def _least(settings: StreamSettings) -> int:
    """Prototypes that the device must hold: the bank, and those whose chunks are still in the window."""
    return max(1, settings.bank_frames) + settings.window_frames // settings.chunk_frames - 1


def _budget(settings: StreamSettings, layout_of: Callable[[StreamSettings], CacheLayout], need: Need) -> Budget:
    return Budget(settings, layout_of(settings), need)


def _checked(budget: Budget) -> Budget:
    """The budget, or a ValueError that says what to lower."""
    over = budget.device_bytes - budget.need.free
    if over <= 0:
        return budget
    frame, settings = budget.layout.frame_bytes, budget.settings
    sums = " + ".join(f"{item.name} {size(item.size)}" for item in budget.device_items)
    fewer = math.ceil(over / frame)
    if settings.memory == "full":
        lower = f"--frames-per-prompt (each {settings.chunk_frames} leave one behind), or use --memory memflow"
    elif settings.memory == "memflow" and settings.bank_frames - fewer > 0:
        lower = f"--bank-frames to {settings.bank_frames - fewer}"
    else:
        lower = "--height and --width"
    raise ValueError(
        f"this stream needs {size(budget.device_bytes)} on {budget.need.device}, where {size(budget.need.free)} are "
        f"free: {sums}; a frame of the past takes {size(frame)}. Lower {lower}"
    )


def model_items(
    config: ModelConfig,
    settings: StreamSettings,
    parameters: int,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    pools: int = 1,
) -> list[Item]:
    """Weights, text and working memory of the transformer. tokens: per frame. pools: of working memory, 2 where CUDA
    graphs keep one of their own."""
    text = 2 * config.num_layers * batch * config.text_len * config.dim
    working = PASS_UNITS * batch * settings.chunk_frames * tokens * (config.dim + config.ffn_dim)
    return [
        Item("transformer's weights", parameters * dtype.itemsize, f"{parameters:,} x {dtype.itemsize} bytes"),
        Item("text keys and values", text * dtype.itemsize),
        Item(
            "working memory of a pass",
            pools * working * dtype.itemsize,
            "estimated; twice, for CUDA graphs and without" if pools == 2 else "estimated",
        ),
    ]


def vae_items(vae: dict, parameters: int, batch: int, height: int, width: int, dtype: torch.dtype) -> list[Item]:
    """Weights and working memory of the VAE, which decodes one story after another; height and width in pixels."""
    numbers = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    working = (DECODER_UNITS + DECODER_STATE_UNITS * batch) * numbers * 4 * height * width
    return [
        Item("VAE's weights", parameters * dtype.itemsize, f"{parameters:,} x {dtype.itemsize} bytes"),
        Item("working memory of the VAE", working * dtype.itemsize, "estimated"),
    ]


def count_numbers(folder: Path, beginning: tuple[str, ...] = ("",)) -> int:
    """How many numbers the safetensors files of a folder hold, under names that begin so; reads their heads only."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(beginning):
                    total += math.prod(file.get_slice(name).get_shape())
    return total


def free_bytes(device: torch.device) -> int:
    """Of the device, now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def free_host_bytes() -> int:
    """What the host can still give this process, its control group's limit included (Linux)."""
    about = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(about["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
            free = min(free, int(limit) - used)
    except (OSError, KeyError, ValueError):
        pass  # no control group, or another version of them
    return max(free, 0)


def size(count: int) -> str:
    """Bytes in words: 288.4 MiB."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"
