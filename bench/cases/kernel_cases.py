"""Our kernels alone, and where their tables and limits are to be decided by measurement: the cases for a GPU.

What they are to reach is in the settings of each case as its aim, at first and later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memflow_ops.bench.cases import attention, backward, cache_write, host, retrieval, selection, tuning
from memflow_ops.bench.harness.case import Built, Case, build_of
from memflow_ops.bench.sizes import Size

# Crossovers are looked for at these sizes, as far as the size has room for them.
_WINDOW_KEYS = (128, 256, 512, 1024, 1560, 3120, 14040)
# The bank of what is not about the bank, frames.
_SHORT_WINDOW_BANK, _TILES_BANK = 8, 16
# Layers that write one after the other, and what frames are chosen from; tiny, and at full size.
_WRITTEN_LAYERS = {True: 2, False: 8}
_RETRIEVAL = {
    True: {"history": 20, "words": 16, "valid_words": 7, "count": 6},
    False: {"history": 240, "words": 512, "valid_words": 120, "count": 6},
}


@dataclass(frozen=True)
class KernelCases:
    """The cases of one size; each method gives those of one word."""

    size: Size
    dtype: str
    group: str
    devices: tuple[str, ...]
    rounds: int
    large_bank: int
    """Frames of the bank that is compared with the size's own."""

    def all(self) -> list[Case]:
        return [
            *self.attention(),
            *self.selection(),
            *self.cache_write(),
            self.retrieval(),
            *self.backward(),
            *self.crossovers(),
            *self.tiles(),
            self.host(),
        ]

    def case(
        self,
        name: str,
        against: str,
        make: Callable[..., Built],
        aim: str = "",
        settings: dict[str, object] | None = None,
        **options: Any,
    ) -> Case:
        """A case by the name `what` or `what/special`. options: for make."""
        what, *special = name.split("/")
        return Case(
            name="/".join(("kernel", what, self.size.name, self.dtype, *special)),
            level="kernel",
            group=self.group,
            size=self.size,
            dtype=self.dtype,
            against=against,
            build=build_of(make, self.size, self.dtype, **options),
            devices=self.devices,
            rounds=self.rounds,
            settings=(settings or {}) | ({"aim": aim} if aim else {}),
            needs_triton=True,
        )

    def attention(self) -> list[Case]:
        frames, large = self.size.bank_frames, self.large_bank
        selected = self.case(
            f"attend/bank-{frames}",
            "dense attention to as many keys: equal FLOPs",
            attention.bank_kernel,
            "at most 1.33 of the best, later 1.11",
            bank_frames=frames,
        )
        groups = [
            self.case(
                f"memory_attention/bank-{frames}/{kind}",
                "the window alone",
                attention.query_groups,
                "at most 1.20 of the window, later 1.16; 0.95 of sink and window, later 0.88; with a selection per "
                "query 2.0 of one per tile, later 1.4",
                bank_frames=frames,
                correlated=kind == "correlated",
            )
            for kind in ("correlated", "random")
        ]
        larger = self.case(
            f"memory_attention/bank-{large}",
            f"a bank of {frames} frames",
            attention.large_bank,
            "at most 1.3, later 1.1",
            {"bank_frames": large},
            bank_frames=large,
            smaller=frames,
        )
        window = self.case("window", "dense attention through a backend", attention.window_kernel)
        return [window, selected, *groups, larger]

    def selection(self) -> list[Case]:
        frames = self.size.bank_frames
        aims = {self.size.query_group: "at most 0.03, later 0.01", 1: "at most 0.25, later 0.10"}
        return [
            self.case(
                f"select/bank-{frames}/group-{query_group}",
                "all of memory_attention",
                selection.share_of_attention,
                aim,
                {"query_group": query_group},
                bank_frames=frames,
                query_group=query_group,
            )
            for query_group, aim in aims.items()
        ]

    def cache_write(self) -> list[Case]:
        layers = _WRITTEN_LAYERS[self.group == "tiny-kernels"]
        return [
            self.case(
                "write_projections_clean" if clean else "write_projections",
                "a copy of as many bytes",
                cache_write.several_layers,
                "at most 1.5, later 1.15",
                {"layers_in_turn": layers},
                clean=clean,
                layers=layers,
            )
            for clean in (False, True)
        ]

    def retrieval(self) -> Case:
        options = _RETRIEVAL[self.group == "tiny-kernels"]
        aim = "at most 1 ms, later 0.3"
        return self.case("retrieve", "plain torch", retrieval.retrieve, aim, {**options}, **options)

    def backward(self) -> list[Case]:
        aim = "at most 3.0 of its forward, later 2.5; TFLOP/s over flash attention's at least 0.6, later 0.85"
        size = self.size
        return [
            self.case(
                f"backward/{over}/group-{query_group}",
                "its forward",
                backward.backward_kernels,
                aim if query_group != 1 else "",
                {"query_group": query_group},
                bank_frames=size.bank_frames,
                over=over,
                query_group=query_group,
            )
            for over, query_group in (
                ("window", size.query_group),
                ("bank", size.query_group),
                ("both", size.query_group),
                ("both", 1),
            )
        ]

    def crossovers(self) -> list[Case]:
        few = min(_SHORT_WINDOW_BANK, self.size.bank_frames)
        return [
            self.case(
                f"short_window/keys-{keys}",
                "the window through a dense backend",
                attention.short_window,
                settings={"bank_frames": few, "window_keys": keys},
                bank_frames=few,
                keys=keys,
            )
            for keys in _WINDOW_KEYS
            if keys <= self.size.window_keys
        ]

    def tiles(self) -> list[Case]:
        frames = min(_TILES_BANK, self.size.bank_frames)
        return [
            self.case(
                f"tiles/{over}",
                "other configurations",
                tuning.tiles,
                "no other configuration is more than 2 % faster",
                {"bank_frames": frames},
                bank_frames=frames,
                over=over,
            )
            for over in ("groups", "queries", "window")
        ]

    def host(self) -> Case:
        return self.case(
            "host/memory_attention",
            "a call of torch's attention to one key",
            host.call,
            settings={"bank_frames": self.size.bank_frames},
            bank_frames=self.size.bank_frames,
        )
