"""The attention kernel under other configurations than those in kernels/configs.py: one contender for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from memflow_ops.bench.cases.attention import selected_alone
from memflow_ops.bench.cases.attention_inputs import AttentionInputs, ours_without_memory
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.sizes import Size

Tile = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, num_warps, num_stages."""

# The last has room for two programs on a multiprocessor of sm_90.
TILES: tuple[Tile, ...] = ((128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 4, 3))


@contextmanager
def configured(tile: Tile | None = None, most_splits: int | None = None, forward: str | None = None) -> Iterator[None]:
    """Plan launches of the attention kernel with this tile, at most so many splits of the last wave, and this kernel.

    forward: "gluon" or "triton", on sm_90. None: as configs.py has it.
    """
    from memflow_ops.kernels import configs  # Triton need not be installed where no kernel is measured.

    tiles, splits, kernels = dict(configs.ATTEND_TILES), configs.MAX_SPLITS, dict(configs.FORWARD)
    try:
        if tile is not None:
            configs.ATTEND_TILES.update({capability: {256: tile} for capability in tiles})
        if most_splits is not None:
            configs.MAX_SPLITS = most_splits
        if forward is not None:
            configs.FORWARD[90] = forward
        yield
    finally:
        configs.FORWARD.update(kernels)
        configs.ATTEND_TILES.update(tiles)
        configs.MAX_SPLITS = splits


def tiles(size: Size, dtype: torch.dtype, device: torch.device, seed: int, *, bank_frames: int, over: str) -> Built:
    """Attention to the window alone, or to a selection alone, with the shipped configuration and with others.

    over: `window`, `groups` (a selection for each of the size's query groups) or `queries` (one for each query). A
    configuration that the device has no room for is left out.
    """
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton")
    if over == "window":
        shipped = ours_without_memory(given, given.window, dense_backend="own")
    else:
        shipped = selected_alone(given if over == "groups" else given.with_query_group(1))
    tries = {"{} x {}, {} warps, {} stages".format(*tile): under(shipped, tile) for tile in TILES}
    tries["the last wave not split"] = under(shipped, most_splits=1)
    if over != "queries" and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        tries["the kernel in Gluon"] = under(shipped, forward="gluon")
    contenders, left_out = {OURS: shipped}, {}
    for name, contender in tries.items():
        try:
            contender.call()
            contenders[name] = contender
        except Exception as error:  # Triton has several types of errors for what does not fit.
            left_out[name] = f"{type(error).__name__}: {error}"[:200]
    return Built(contenders, left_out)


def under(contender: Contender, *configuration: Any, **more: Any) -> Contender:
    """The same contender, called and checked under another configuration, see `configured`."""

    def call() -> object:
        with configured(*configuration, **more):
            return contender.call()

    def check() -> None:
        with configured(*configuration, **more):
            contender.check()

    return replace(contender, call=call, check=check)
