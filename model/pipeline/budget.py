"""The memory that a stream will take on the device and on the host, counted before anything is loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.segment import record_bytes
from memflow_ops.cache.store import WRITES_AHEAD
from memflow_ops.environment import device_name
from memflow_ops.host_memory import free_host_bytes
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.wan.transformer import ModelConfig

PASS_UNITS = 8
"""Working memory of a pass, in units of chunk tokens x (dim + ffn_dim) numbers. Measured on a CPU by the resident size
(dim 1536, ffn_dim 8960, 1170 tokens, float32): 8."""
DECODER_UNITS = 13
"""Working memory of the VAE's decoder, in units of base_dim x 4 frames x height x width numbers. Measured on a CPU by
the resident size (base_dim 96, 120 x 208 pixels, float32), together with the state of one story: 18.5."""
DECODER_STATE_UNITS = 7
"""What the decoder keeps of each story from chunk to chunk, in the same units and measured in the same way: 6.2."""


@dataclass(frozen=True)
class FreeMemory:
    """Memory that is free before anything is loaded, in bytes."""

    device: torch.device
    bytes: int
    host_bytes: int | None
    """None where the device is the host."""

    @classmethod
    def now(cls, device: torch.device) -> "FreeMemory":
        return cls(device, free_bytes(device), free_host_bytes() if device.type == "cuda" else None)

    def shared_by(self, processes: int) -> "FreeMemory":
        """The part of one of so many processes on this machine, which divide its host memory; a CUDA device is of one
        process alone."""
        if self.host_bytes is None:
            return replace(self, bytes=self.bytes // processes)
        return replace(self, host_bytes=self.host_bytes // processes)

    @property
    def place(self) -> str:
        """The device in words."""
        return f"{self.device} ({device_name(self.device)})"


@dataclass(frozen=True)
class Disk:
    """A folder for the history, and how much of it is to lie above the disk."""

    folder: Path
    free_bytes: int
    device_frames: int | None = None
    """Prototypes on the device at most; None: as many as fit."""
    host_frames: int | None = None
    """Prototypes in host memory at most; None: as many as fit."""
    divided: tuple[int, int, int] | None = None
    """On the device, in host memory and on disk alone, as a run that goes on had it; None: is found."""
    processes: int = 1
    """That make each video. Several keep nothing on disk but the snapshots, which have the whole history."""

    def needed(self, layout: CacheLayout, prototypes: int) -> int:
        """Bytes of so many prototypes and of the snapshots: the old one stays until the new one is whole."""
        kept = layout.sink_frames + layout.window_frames
        if self.processes > 1:
            return 2 * self.processes * (prototypes * layout.bank_frame_bytes + kept * layout.frame_bytes)
        return prototypes * record_bytes(layout) * layout.batch + 2 * kept * layout.frame_bytes


@dataclass(frozen=True)
class Item:
    """One summand of a budget."""

    name: str
    size: int
    """Bytes."""
    how: str = ""
    """How the size was found."""


@dataclass(frozen=True)
class Budget:
    """The memory of one stream, item by item."""

    settings: StreamSettings
    """With device_frames and host_frames as they were divided."""
    layout: CacheLayout
    other_items: tuple[Item, ...]
    """What lies on the device beside the cache."""
    free: FreeMemory
    disk: Disk | None = None
    prototypes: int = 0
    """How many the stream will leave behind."""

    @property
    def cache_items(self) -> list[Item]:
        layout = self.layout
        frame, kept = layout.frame_bytes, layout.bank_frame_bytes
        window, sink = layout.window_frames, layout.sink_frames
        items = [Item(f"local window, {window} frames", window * frame), Item(f"sink, {sink} frames", sink * kept)]
        if layout.copied_frames:
            name = f"copies of the chosen blocks, {layout.copied_frames} frames"
            items.append(Item(name, layout.copied_frames * frame))
        past = layout.pool_frames + layout.int8_frames - window - sink - layout.copied_frames
        if layout.device_frames:
            name = f"history, {past} frames, {layout.bank_frames} of them as the bank"
        else:
            name = f"bank, {past} frames"
        items += [Item(name, past * kept), Item("means for retrieval", layout.means_bytes)]
        return [item for item in items if item.size]

    @property
    def device_items(self) -> list[Item]:
        return [*self.cache_items, *self.other_items]

    @property
    def device_bytes(self) -> int:
        return sum(item.size for item in self.device_items)

    @property
    def on_the_way(self) -> int:
        """Bytes of host memory for frames between device and disk."""
        layout = self.layout
        if self.disk is None or self.disk.processes > 1 or not layout.device_frames:
            return 0
        return (WRITES_AHEAD + layout.bank_frames + 1) * record_bytes(layout) * layout.batch

    @property
    def host_bytes(self) -> int:
        return self.layout.host_bytes + self.on_the_way

    def lines(self) -> list[str]:
        """The budget as a table in text, one line per item."""
        layout = self.layout
        stories = f"{layout.batch} {'story' if layout.batch == 1 else 'stories'}"
        moments = " x 2 moments" if layout.moments == 2 else ""
        vectors = f"(2 x {layout.frame_tokens} tokens + {layout.blocks_per_frame} blocks{moments})"
        numbers = f"{vectors} x {layout.kv_heads} heads x {layout.head_dim} x {layout.dtype.itemsize} bytes"
        frames = [Item("one frame", layout.frame_bytes, f"{layout.layers} layers x {stories} x {numbers}")]
        if layout.bank_dtype:
            ratio = layout.frame_bytes / layout.bank_frame_bytes
            how = f"of sink and history, as {layout.bank_dtype} with scales: {ratio:.2f} times as many per byte"
            frames.append(Item("one kept frame", layout.bank_frame_bytes, how))
        rows = [*frames, *self.device_items, Item("in all", self.device_bytes, f"of {size(self.free.bytes)} free")]
        free = "" if self.free.host_bytes is None else f", of {size(self.free.host_bytes)} free"
        if layout.host_bytes:
            where = f"in host memory: history, {layout.host_frames} frames more, and one to swap through{free}"
            rows.append(Item("further history", layout.host_bytes, where))
        if self.disk is not None and layout.device_frames:
            room = f"{WRITES_AHEAD + layout.bank_frames + 1} frames"
            if self.on_the_way:
                rows.append(Item("to and from the disk", self.on_the_way, f"in host memory: {room}{free}"))
            alone = f", {layout.disk_frames} of them there alone" if layout.disk_frames else ""
            where = f"in {self.disk.folder}: all of {self.prototypes} frames{alone}, and snapshots"
            if self.disk.processes > 1:
                where = f"in {self.disk.folder}: snapshots of {self.disk.processes} processes, with their whole history"
            needed = self.disk.needed(layout, self.prototypes)
            rows.append(Item("on disk", needed, f"{where}; {size(self.disk.free_bytes)} free"))
        width = max(len(row.name) for row in rows)
        return [
            f"Memory on {self.free.place}:",
            *(f"  {row.name:<{width}}  {size(row.size):>10}  {row.how}".rstrip() for row in rows),
        ]


def fit_history(
    settings: StreamSettings,
    layout_of: Callable[[StreamSettings], CacheLayout],
    prototypes: int,
    other_items: Sequence[Item],
    free: FreeMemory,
    history_frames: int | None = None,
    disk: Disk | None = None,
) -> Budget:
    """Divides the history between device, host and disk. As many frames as fit stay on the device, and of the others as
    many as fit in host memory; where a frame lies changes no result.

    layout_of: gives the cache that a stream with these settings allocates.
    prototypes: how many the stream will leave behind. Beyond history_frames (None: all) the oldest is forgotten.
    other_items: what the device holds beside the cache.
    disk: where all of the history is kept too; None: nowhere.

    Where the stream cannot fit, a ValueError shows the sum and says which setting to lower, and to what.
    """
    if settings.memory not in ("memflow", "full"):
        return _checked(Budget(settings, layout_of(settings), tuple(other_items), free, disk))
    history = prototypes if history_frames is None else min(history_frames, prototypes)
    bank_frames = min(settings.bank_frames, max(history, 1))
    least = max(1, bank_frames) + settings.window_frames // settings.chunk_frames - 1  # the bank, and the window's own

    def budget(device_frames: int, host_frames: int, disk_frames: int = 0) -> Budget:
        divided = replace(
            settings,
            bank_frames=bank_frames,
            device_frames=device_frames,
            host_frames=host_frames,
            disk_frames=disk_frames,
        )
        return Budget(divided, layout_of(divided), tuple(other_items), free, disk, prototypes)

    if settings.memory == "full":
        if history < prototypes:
            raise ValueError(
                f"memory 'full' attends to all {prototypes} frames that this stream leaves behind, so --history-frames "
                f"cannot be {history}; use --memory memflow"
            )
        return _checked_on_disk(_checked(budget(max(history, least), settings.host_frames)))
    history = max(history, least)
    if disk is not None and (disk.processes == 1 or disk.divided is not None):
        return _with_disk(budget, disk, history, least)
    smallest = _checked(budget(least, history - least))
    on_device = min(history, least + (free.bytes - smallest.device_bytes) // smallest.layout.bank_frame_bytes)
    return _checked_on_disk(_checked_on_host(budget(on_device, history - on_device)))


def _with_disk(budget: Callable[[int, int, int], Budget], disk: Disk, history: int, least: int) -> Budget:
    """Divides a history of so many frames, at least `least` on the device, over three tiers."""
    if disk.divided is not None:
        asked = (disk.device_frames and max(least, disk.device_frames), disk.host_frames)
        if any(most is not None and frames > most for frames, most in zip(disk.divided, asked, strict=False)):
            raise ValueError(
                f"the run in {disk.folder} keeps {disk.divided[0]} past frames on the device and {disk.divided[1]} in "
                f"host memory, and goes on only with as many: give --device-frames and --host-frames as it was begun"
            )
        return _checked_on_disk(_checked_on_host(_checked(budget(*disk.divided))))
    smallest = _checked(budget(least, 0, history - least))
    free, frame = smallest.free, smallest.layout.bank_frame_bytes
    # On a CPU device and host are one.
    left = free.bytes - smallest.device_bytes - (smallest.on_the_way if free.host_bytes is None else 0)
    on_device = min(history, least + max(0, left // frame), max(least, disk.device_frames or history))
    if free.host_bytes is not None:
        left = free.host_bytes - smallest.on_the_way
    else:
        left -= (on_device - least) * frame
    in_host = max(0, min(history - on_device, left // frame - 1))
    if disk.host_frames is not None:
        in_host = min(in_host, disk.host_frames)
    return _checked_on_disk(_checked_on_host(budget(on_device, in_host, history - on_device - in_host)))


def _checked(budget: Budget) -> Budget:
    """The budget, if it fits on the device; otherwise a ValueError that says what to lower."""
    over = budget.device_bytes - budget.free.bytes
    if over <= 0:
        return budget
    frame, settings = budget.layout.bank_frame_bytes, budget.settings
    summands = " + ".join(f"{item.name} {size(item.size)}" for item in budget.device_items)
    fewer = math.ceil(over / frame)
    if settings.memory == "full":
        lower = f"--frames-per-prompt (each {settings.chunk_frames} leave one behind), or use --memory memflow"
    elif settings.memory == "memflow" and settings.bank_frames - fewer > 0:
        lower = f"--bank-frames to {settings.bank_frames - fewer}"
    else:
        lower = "--height and --width"
    raise ValueError(
        f"this stream needs {size(budget.device_bytes)} on {budget.free.place}, where {size(budget.free.bytes)} are "
        f"free: {summands}; a frame of the past takes {size(frame)}. Lower {lower}"
    )


def _checked_on_host(budget: Budget) -> Budget:
    """The budget, if the frames that wait in host memory fit there; otherwise a ValueError that says what to lower."""
    free, settings, frame = budget.free.host_bytes, budget.settings, budget.layout.bank_frame_bytes
    if free is None:
        free = budget.free.bytes - budget.device_bytes
    if budget.host_bytes <= max(free, 0):
        return budget
    on_device, in_host = settings.device_frames, settings.host_frames
    if budget.disk is not None:
        raise ValueError(
            f"{in_host} frames of the history in host memory, and those on their way to and from the disk, need "
            f"{size(budget.host_bytes)} where {size(max(free, 0))} are free; lower --bank-frames or --host-frames"
        )
    fits = on_device + max(0, free // frame - 1)
    raise ValueError(
        f"a history of {on_device + in_host} frames does not fit: {on_device} on the device, and the {in_host} in host "
        f"memory need ({in_host} + 1) x {size(frame)} = {size(budget.host_bytes)} where {size(max(free, 0))} are free; "
        f"lower --history-frames to {fits} (the oldest frames beyond are forgotten)"
    )


def _checked_on_disk(budget: Budget) -> Budget:
    """The budget, if its history and snapshots fit on the disk; otherwise a ValueError that says so."""
    if budget.disk is None:
        return budget
    needed, free = budget.disk.needed(budget.layout, budget.prototypes), budget.disk.free_bytes
    if needed <= free:
        return budget
    raise ValueError(
        f"a history of {budget.prototypes} frames needs {size(needed)} in {budget.disk.folder}, where {size(free)} are "
        f"free: {size(record_bytes(budget.layout) * budget.layout.batch)} a frame; name a folder on another disk"
    )


def model_items(
    config: ModelConfig,
    settings: StreamSettings,
    parameters: int,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    pools: int = 1,
    ranks: int = 1,
    sharded: bool = False,
) -> list[Item]:
    """Weights, text keys and working memory of the transformer.

    parameters: how many numbers the weights hold. tokens: per frame. pools: how often working memory is held; twice
        where CUDA graphs keep a pool of their own. ranks: processes that share the tokens and heads; these are the
        items of one. sharded: they also share the weights of the blocks, and gather those of one block, and of the next
        while it runs.
    """
    text = 2 * config.num_layers * batch * config.text_len * config.dim
    per_frame = PASS_UNITS * batch * tokens * (config.dim + config.ffn_dim)
    working = per_frame * (settings.longest_pass + (pools - 1) * settings.chunk_frames)  # the longest is not recorded
    kept, how = parameters, f"{parameters:,} x {dtype.itemsize} bytes"
    if sharded:
        blocks = config.num_layers * block_parameters(config)
        kept = parameters - blocks + -(-blocks // ranks) + 2 * block_parameters(config)
        how = f"of {parameters:,} x {dtype.itemsize} bytes, blocks shared by {ranks} processes, and two whole blocks"
    return [
        Item("transformer's weights", kept * dtype.itemsize, how),
        Item("text keys and values", text * dtype.itemsize),
        Item(
            "working memory of a pass",
            -(-working // ranks) * dtype.itemsize,
            "estimated; twice, for CUDA graphs and without" if pools == 2 else "estimated",
        ),
    ]


def block_parameters(config: ModelConfig) -> int:
    """How many numbers the weights of one block hold."""
    dim, ffn = config.dim, config.ffn_dim
    attention = 4 * (dim * dim + dim) + 2 * dim  # with the norms of queries and keys
    return 2 * attention + 2 * dim + (2 * dim * ffn + dim + ffn) + 6 * dim


def vae_items(vae: dict, parameters: int, batch: int, height: int, width: int, dtype: torch.dtype) -> list[Item]:
    """Weights and working memory of the VAE, which decodes one story after another.

    vae: its config. parameters: how many numbers the decoder's weights hold. height, width: of the video, in pixels.
    """
    numbers = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    working = (DECODER_UNITS + DECODER_STATE_UNITS * batch) * numbers * 4 * height * width
    return [
        Item("VAE's weights", parameters * dtype.itemsize, f"{parameters:,} x {dtype.itemsize} bytes"),
        Item("working memory of the VAE", working * dtype.itemsize, "estimated"),
    ]


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; a CPU's is the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def size(count: int) -> str:
    """Bytes in words: 288.4 MiB."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"
