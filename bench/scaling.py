"""What video with memory is predicted to cost on machines that are not at hand: `python -m memflow_ops.bench.scaling`.

Floating-point operations and bytes are counted from the sizes of the model; what a device does per second is assumed,
and stated. Nothing here is measured. docs/scaling.md has the tables as this program prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memflow_ops.bench.sizes import WAN, Size
from memflow_ops.model.parallel.ranks import possible_ranks

WAN_14B = replace(WAN, name="wan-14b", dim=5120, heads=40, ffn_dim=13824, layers=40)
TEXT_TOKENS = 512
ITEMSIZE = 2
"""Bytes of a number in bfloat16."""
WORKING_BYTES = 10e9
"""Kept free on a GPU for passes and the VAE."""
CHUNK_SECONDS = 0.75
"""Of video: 12 frames at 16 a second."""
VAE_FLOPS = 40.7e12
"""Of decoding a chunk at 480 x 832, counted by torch's FlopCounterMode in diffusers' AutoencoderKLWan."""
CHUNKS_PER_HOUR = round(3600 / CHUNK_SECONDS)


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and of what it is connected to; rates in one direction, sustained."""

    flops: float = 400e12
    """Per second, in bfloat16, over a whole pass. An H100 with 989e12 at its peak is reported to make 12 frames of 1.3B
    in 0.34 s, which is 370e12 for what is counted here."""
    vae_flops: float = 200e12
    """Per second in the VAE, whose convolutions are small."""
    memory: float = 80e9
    """Bytes of the GPU."""
    nvlink: float = 360e9
    """Bytes per second to all other GPUs together: 0.8 of the 450e9 of NVLink 4."""
    pcie: float = 50e9
    """To another GPU, or to host memory: 0.8 of PCIe 5.0 x16."""
    network: float = 40e9
    """Per GPU to other machines: 0.8 of 400 Gbit/s."""
    host: float = 1e12
    """Bytes of host memory that a machine gives to the history."""
    disk: float = 15e12
    disk_rate: float = 5e9
    """Bytes per second of one NVMe disk."""


MACHINE = Machine()
VAE_SECONDS = VAE_FLOPS / MACHINE.vae_flops


@dataclass(frozen=True)
class Cost:
    """What a model takes per chunk and per frame of its past."""

    size: Size

    @property
    def parameters(self) -> int:
        """Of the blocks; embeddings and head are 1 to 4 % more."""
        size = self.size
        return size.layers * (8 * size.dim**2 + 2 * size.dim * size.ffn_dim)

    @property
    def passes(self) -> int:
        """Per chunk: the steps and the clean pass."""
        return self.size.steps + 1

    def chunk_flops(self, keys: int | None = None) -> int:
        """Of all passes over a chunk. keys: per query; None: those of the window and of the selected blocks."""
        size = self.size
        keys = size.window_keys + size.top_k * size.block_size if keys is None else keys
        products = 2 * size.queries * (6 * size.dim**2 + 2 * size.dim * size.ffn_dim)  # text keys are made once
        return self.passes * size.layers * (products + size.attention_flops(keys) + size.attention_flops(TEXT_TOKENS))

    @property
    def frame_bytes(self) -> int:
        """Keys and values of one latent frame, all layers."""
        return self.size.layers * 2 * self.size.frame_tokens * self.size.dim * ITEMSIZE

    @property
    def means_bytes(self) -> int:
        """What retrieval keeps on the device of every frame."""
        return self.size.layers * self.size.dim * ITEMSIZE

    def sent_bytes(self, ranks: int) -> int:
        """What a rank sends to the others per chunk: its tokens of the heads of the others (queries, keys, values) and
        the results of its heads for the tokens of the others, in every layer of every pass. The clean pass sends no
        results in its last layer."""
        size = self.size
        part = size.queries * size.dim * ITEMSIZE * (ranks - 1) // ranks**2
        return part * (4 * self.passes * size.layers - 1)

    def chunk_seconds(self, ranks: int = 1, rate: float = MACHINE.nvlink) -> float:
        """Of the transformer: computing, then sending; nothing of it overlaps."""
        sending = self.sent_bytes(ranks) / rate if ranks > 1 else 0.0
        return self.chunk_flops() / ranks / MACHINE.flops + sending

    def gathered_bytes(self, ranks: int) -> int:
        """What a rank receives per chunk of the weights of the blocks, where they are sharded."""
        return self.parameters * ITEMSIZE * (ranks - 1) // ranks * self.passes

    def gpu_hours(self, ranks: int = 1, rate: float = MACHINE.nvlink) -> float:
        """Per hour of video, with the VAE, for which the other ranks wait."""
        return ranks * (self.chunk_seconds(ranks, rate) + VAE_SECONDS) / CHUNK_SECONDS

    def device_frames(self, ranks: int) -> int:
        """The prototypes that fit beside weights, window, sink, text keys and what passes and the VAE work in."""
        size = self.size
        text = size.layers * 2 * TEXT_TOKENS * size.dim * ITEMSIZE
        fixed = self.parameters * ITEMSIZE + text + WORKING_BYTES
        frames = (MACHINE.memory - fixed) / (self.frame_bytes / ranks)
        return max(0, int(frames) - size.window_frames - size.sink_frames)


COSTS = (("1.3B", Cost(WAN)), ("14B", Cost(WAN_14B)))


def table(*header: str) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def chunk_rows() -> Iterator[str]:
    """What a chunk and an hour take on one GPU."""
    yield from table("predicted", *(name for name, _ in COSTS))
    for name, value in (
        ("transformer, operations per chunk", lambda cost: f"{cost.chunk_flops() / 1e12:,.0f} x 10^12"),
        (
            "of which attention to selected blocks",
            lambda cost: f"{1 - cost.chunk_flops(cost.size.window_keys) / cost.chunk_flops():.1%}",
        ),
        ("transformer, seconds per chunk", lambda cost: f"{cost.chunk_seconds():.2f}"),
        ("VAE, seconds per chunk", lambda cost: f"{VAE_SECONDS:.2f}"),
        ("GPU hours per hour of video", lambda cost: f"{cost.gpu_hours():.2f}"),
        ("weights of the blocks", lambda cost: f"{cost.parameters * ITEMSIZE / 1e9:,.1f} GB"),
        ("one prototype", lambda cost: f"{cost.frame_bytes / 1e6:,.0f} MB"),
        ("prototypes of an hour", lambda cost: f"{cost.frame_bytes * CHUNKS_PER_HOUR / 1e12:.2f} TB"),
        ("their means, on the GPU", lambda cost: f"{cost.means_bytes * CHUNKS_PER_HOUR / 1e9:.2f} GB"),
    ):
        yield row(name, *(value(cost) for _, cost in COSTS))


def rank_rows() -> Iterator[str]:
    """One video on several GPUs."""
    yield from table(
        *("model", "GPUs", "sent by each per chunk", "transformer per chunk, NVLink", "of it sending"),
        *("of it sending, PCIe", "gathered weights, if sharded", "GPU hours per hour of video"),
    )
    for name, cost in COSTS:
        for ranks in rank_counts(cost):
            shares = []
            for rate in (MACHINE.nvlink, MACHINE.pcie):
                sending = cost.sent_bytes(ranks) / rate if ranks > 1 else 0.0
                shares.append(f"{sending / cost.chunk_seconds(ranks, rate):.1%}")
            sent = cost.sent_bytes(ranks) if ranks > 1 else 0
            gathered = cost.gathered_bytes(ranks)
            yield row(
                *(name, str(ranks), f"{sent / 1e9:.1f} GB", f"{cost.chunk_seconds(ranks):.2f} s", *shares),
                f"{gathered / 1e9:.0f} GB, {gathered / MACHINE.nvlink:.2f} s",
                f"{cost.gpu_hours(ranks):.2f}",
            )


def history_rows() -> Iterator[str]:
    """How much of the past each tier holds."""
    yield from table("model", "GPUs", "prototypes on the GPUs", "with 1 TB of host memory", "with 15 TB of disk")
    for name, cost in COSTS:
        for ranks in rank_counts(cost):
            frames = cost.device_frames(ranks)
            in_host, on_disk = (frames + size / cost.frame_bytes for size in (MACHINE.host, MACHINE.disk))
            yield row(
                *(name, str(ranks), f"{frames:,}, {frames * CHUNK_SECONDS / 60:.1f} min"),
                *(f"{in_host * CHUNK_SECONDS / 60:,.0f} min", f"{on_disk * CHUNK_SECONDS / 3600:,.1f} h"),
            )


def transfer_rows() -> Iterator[str]:
    """What it takes to bring a bank of three frames back."""
    yield from table("per chunk, one GPU", *(name for name, _ in COSTS))
    for name, rate in (
        ("3 frames from host memory", MACHINE.pcie),
        ("3 frames from disk", MACHINE.disk_rate),
        ("3 frames over the network", MACHINE.network),
    ):
        times = [(cost, 3 * cost.frame_bytes / rate) for _, cost in COSTS]
        yield row(name, *(f"{1000 * time:,.0f} ms, {time / cost.chunk_seconds():.0%}" for cost, time in times))
    written = [cost.frame_bytes / (cost.chunk_seconds() + VAE_SECONDS) for _, cost in COSTS]
    yield row("a prototype to disk, on the average", *(f"{rate / 1e9:.2f} GB/s" for rate in written))


def rank_counts(cost: Cost) -> list[int]:
    return [1, *(count for count in possible_ranks(cost.size.heads) if count <= 8)]


TABLES = (chunk_rows, rank_rows, history_rows, transfer_rows)


def main() -> None:
    print("\n\n".join("\n".join(rows()) for rows in TABLES))


if __name__ == "__main__":
    main()
