"""The registry: everything that is measured, by name, with the work it is and what it is compared with.

A case's contenders are ours, the one that ratios are over, and others; each says its floating-point operations and the
bytes that it must move. Levels: an op, one layer, a stream's chunk. Names are `level/what/size/dtype`, then what is
special.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from memflow_ops.bench.cases import cache_write, parts
from memflow_ops.bench.cases.attention import Inputs, dense_backends, flex, ours, released, whole_history
from memflow_ops.bench.cases.streams import Kind, layer_contenders, stream_contenders
from memflow_ops.bench.harness.case import OURS, Build, Built, Case, Contender
from memflow_ops.bench.sizes import LONG_BANKS, QUARTER, TINY, WAN, WAN_FRAME, Size
from memflow_ops.environment import why_not_compile

"""build(device, seed): the contenders over inputs of their own."""

# Dense attention over a longer history than this is not measured on a CPU.
_DENSE_FRAMES = {"cpu": 256, "cuda": 1000}
# Remembered frames that the prompt is compared with.
_HISTORY = 240


def torch_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


# ------------------------------------------------------------------------------------------------------------------ ops


def attention(size: Size, dtype: str, bank_frames: int, everything: bool) -> Build:
    """memory_attention beside all that one would otherwise pick; without `everything`, beside window and history."""

    def build(device: torch.device, seed: int) -> Built:
        given = Inputs.make(size, bank_frames, torch_dtype(dtype), device, seed)
        window, left_out = dense_backends(given, given.window)
        best = next(iter(window))  # torch's own first choice
        contenders = {OURS: ours(given), f"window, {best}": window.pop(best)}
        if everything:
            contenders |= {f"window, {name}": c for name, c in window.items()}
            sink, _ = dense_backends(given, given.sink_and_window)
            contenders |= {f"sink and window, {name}": c for name, c in sink.items()}
            contenders["ours, one selection per chunk"] = ours(given.per_chunk())
        contenders["released way"] = released(given)
        contenders["released way, window in place"] = released(given, window_in_place=True)
        if everything and size is not TINY:  # which takes seconds to compile
            if why := why_not_compile(device):
                left_out["FlexAttention"] = why
            else:
                contenders["FlexAttention"] = flex(given)
        if bank_frames <= _DENSE_FRAMES[device.type]:
            every = min(3, max(1, bank_frames // 16)) if device.type == "cpu" else 1  # at least 3 of 9 rounds
            contenders["whole history, dense"] = whole_history(given, every)
        return Built(contenders, left_out)

    return build


def part(size: Size, dtype: str, make: Callable[..., dict[str, Contender]], **options: int) -> Build:
    """One of the parts of `parts.py`."""
    return lambda device, seed: Built(make(size, torch_dtype(dtype), device, seed, **options))


# --------------------------------------------------------------------------------------------------- layers and streams

KINDS = {OURS: Kind("memflow"), "none": Kind("none"), "sink": Kind("sink")}
PER_CHUNK = {"memflow, one selection per chunk": Kind("memflow", per_chunk=True)}


def layer(size: Size, dtype: str) -> Build:
    kinds = {**KINDS, **PER_CHUNK, f"memflow, bank of {size.bank_frames}": Kind("memflow", size.bank_frames)}
    return lambda device, seed: Built(layer_contenders(size, torch_dtype(dtype), device, kinds, seed))


def stream(size: Size, dtype: str, kinds: dict[str, Kind], history: int, rounds: int) -> Build:
    return lambda device, seed: Built(stream_contenders(size, torch_dtype(dtype), device, kinds, history, rounds))


def stream_case(size: Size, dtype: str, group: str, kinds: dict[str, Kind], history: int, devices: tuple[str, ...],
                rounds: int) -> Case:  # fmt: skip
    bank = kinds[OURS].bank_frames
    name = f"stream/chunk/{size.name}/{dtype}/history-{history}" + ("" if bank == 3 else f"/bank-{bank}")
    settings = kinds[OURS].settings(size) | {
        "history": history,
        "report": False,
        "aim": "at most 7.9 % more time than none",
    }
    return Case(
        name, "stream", group, size, dtype, "the same stream without memory",
        stream(size, dtype, kinds, history, rounds), devices, rounds, settings,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- registry


def of_size(
    size: Size, dtype: str, group: str, devices: tuple[str, ...], rounds: int, without: Sequence[str] = ()
) -> list[Case]:
    """Every op and a layer, but those `without`."""
    window = "the local window alone, through torch's attention"
    plain = "rms_norm, products of even and odd channels, and copies"
    builds: dict[str, tuple[Build, str]] = {
        "memory_attention": (attention(size, dtype, size.bank_frames, True), window),
        "select": (part(size, dtype, parts.select), "mean, product and torch.topk"),
        "attend": (part(size, dtype, parts.attend), "dense attention to as many keys"),
        "describe": (part(size, dtype, parts.describe), "a copy of the keys"),
        "backward": (part(size, dtype, parts.backward), "forward and backward of the window alone"),
        "relevance": (
            part(size, dtype, parts.relevance, history=_HISTORY),
            "the scores of every word, then their mean",
        ),
        "write_projections": (part(size, dtype, cache_write.write, clean=False), plain),
        "write_projections_clean": (part(size, dtype, cache_write.write, clean=True), plain),
        "frame_write": (part(size, dtype, parts.frame_write), "a copy of the chunk's keys and values"),
    }
    ops = [
        Case(
            f"op/{name}/{size.name}/{dtype}", "op", group, size, dtype, against, build, devices, rounds,
            {"history": _HISTORY} if name == "relevance" else {},
        )
        for name, (build, against) in builds.items()
        if name not in without
    ]  # fmt: skip
    alone = "the same layer without memory"
    name = f"layer/block/{size.name}/{dtype}"
    settings = KINDS[OURS].settings(size)
    return [*ops, Case(name, "layer", group, size, dtype, alone, layer(size, dtype), devices, rounds, settings)]


def long_case(size: Size, dtype: str, frames: int, device: str) -> Case:
    name = f"op/memory_attention/{size.name}/{dtype}/bank-{frames}"
    build = attention(size, dtype, frames, False)
    alone = "the local window alone"
    return Case(name, "op", "long", size, dtype, alone, build, (device,), 9, {"bank_frames": frames})


def registry() -> list[Case]:
    """All cases, those of the stream first."""
    some = {**KINDS, **PER_CHUNK, "full": Kind("full")}
    budgets = {
        **KINDS,
        **PER_CHUNK,
        "memflow, the whole history as bank": Kind("memflow", 240),
        "memflow, 24 blocks": Kind("memflow", top_k=24),
    }
    large = {OURS: Kind("memflow", 64), "none": Kind("none")}  # 110 frames of 288 MB each: one such stream at a time
    both, cpu, cuda = ("cpu", "cuda"), ("cpu",), ("cuda",)
    cases = [
        stream_case(TINY, "float32", "tiny", some, 6, both, 5),
        *of_size(TINY, "float32", "tiny", both, 5),
        *(stream_case(QUARTER, dtype, "wan-1.3b", some, 24, cpu, 5) for dtype in ("float32", "bfloat16")),
        *(stream_case(QUARTER, dtype, "wan-1.3b", budgets, 240, cpu, 9) for dtype in ("float32", "bfloat16")),
        *(stream_case(WAN, "bfloat16", "wan-1.3b", of, 80, cuda, 5) for of in (KINDS, large)),
        *of_size(WAN_FRAME, "float32", "wan-1.3b", cpu, 7, ["backward"]),
        *of_size(WAN_FRAME, "bfloat16", "wan-1.3b", cpu, 7, ["backward"]),
        *of_size(QUARTER, "float32", "wan-1.3b", cpu, 15),
        *(case for case in of_size(QUARTER, "bfloat16", "wan-1.3b", cpu, 15) if "/backward/" in case.name),
        *of_size(WAN, "bfloat16", "wan-1.3b", cuda, 30),
        *(long_case(QUARTER, "float32", frames, "cpu") for frames in LONG_BANKS),
        *(long_case(WAN, "bfloat16", frames, "cuda") for frames in LONG_BANKS),
    ]
    assert len({(case.name, case.devices) for case in cases}) == len(cases)
    return cases


GROUPS = ("tiny", "wan-1.3b", "long")


def chosen(device: str, groups: Sequence[str], named: str = "") -> list[Case]:
    """The cases of some groups that fit the device and have `named` in their name; a ValueError where there is none."""
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"sizes are {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    fit = [case for case in registry() if device in case.devices and case.group in groups and named in case.name]
    if not fit:
        raise ValueError(f"no case of the sizes {', '.join(groups)} with {named!r} in its name runs on {device}")
    return fit
