"""The registry: everything that is measured, by name, with the work it is and what it is compared with.

A case's contenders are ours, the one that ratios are over, and others. Names are `level/what/size/dtype`, then what is
special. Levels are a stream's chunk, one layer, an op, and our kernels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from memflow_ops.bench.cases import attention, backward, cache_write, retrieval, selection, streams
from memflow_ops.bench.cases.checked_cache import MemoryVariant
from memflow_ops.bench.cases.kernel_cases import KernelCases
from memflow_ops.bench.harness.case import OURS, Build, Case, build_of
from memflow_ops.bench.sizes import LONG_BANKS, QUARTER, TINY, TINY_KERNELS, WAN, WAN_FRAME, WAN_KERNELS, Size
from memflow_ops.environment import implementations

GROUPS = ("tiny", "tiny-kernels", "wan-1.3b", "long", "kernels")
"""Parts of the registry that are asked for by name."""

# Remembered frames that the prompt is compared with.
_HISTORY = 240

BOTH, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)

VARIANTS = {OURS: MemoryVariant("memflow"), "none": MemoryVariant("none"), "sink": MemoryVariant("sink")}
PER_CHUNK = {"memflow, one selection per chunk": MemoryVariant("memflow", per_chunk=True)}
BY_MOMENTS = {"memflow, by moments": MemoryVariant("memflow", score="moments")}
KEPT = {
    "memflow, chosen once": MemoryVariant("memflow", reselect="chunk"),
    "memflow, one selection per chunk, chosen once": MemoryVariant("memflow", per_chunk=True, reselect="chunk"),
}


# -------------------------------------------------------------------------------------------- ops, layers and streams


def of_size(
    size: Size, dtype: str, group: str, devices: tuple[str, ...], rounds: int, without: Sequence[str] = ()
) -> list[Case]:
    """Every op and a layer, but those `without`."""
    build = partial(build_of, size=size, dtype=dtype)
    window = "the local window alone, through torch's attention"
    plain = "rms_norm, products of even and odd channels, and copies"
    whole_op = build(attention.whole_op, bank_frames=size.bank_frames, everything=True)
    builds: dict[str, tuple[Build, str]] = {
        "memory_attention": (whole_op, window),
        "select": (build(selection.select), "mean, product and torch.topk"),
        "attend": (build(attention.attend), "dense attention to as many keys"),
        "describe": (build(selection.describe), "a copy of the keys"),
        "backward": (build(backward.forward_and_backward), "forward and backward of the window alone"),
        "relevance": (build(retrieval.relevance, history=_HISTORY), "the scores of every word, then their mean"),
        "write_projections": (build(cache_write.projections, clean=False), plain),
        "write_projections_clean": (build(cache_write.projections, clean=True), plain),
        "frame_write": (build(cache_write.chunk_write), "a copy of the chunk's keys and values"),
    }
    ops = []
    for name, (made, against) in builds.items():
        if name not in without:
            settings: dict[str, object] = {"history": _HISTORY} if name == "relevance" else {}
            case = f"op/{name}/{size.name}/{dtype}"
            ops.append(Case(case, "op", group, size, dtype, against, made, devices, rounds, settings))
    return [*ops, layer_case(size, dtype, group, devices, rounds)]


def layer_case(size: Size, dtype: str, group: str, devices: tuple[str, ...], rounds: int) -> Case:
    """One layer under every kind of memory."""
    large = {f"memflow, bank of {size.bank_frames}": MemoryVariant("memflow", size.bank_frames)}
    build = build_of(streams.layer, size, dtype, variants={**VARIANTS, **PER_CHUNK, **BY_MOMENTS, **large})
    name, settings = f"layer/block/{size.name}/{dtype}", VARIANTS[OURS].settings(size)
    return Case(name, "layer", group, size, dtype, "the same layer without memory", build, devices, rounds, settings)


def stream_case(
    size: Size,
    dtype: str,
    group: str,
    devices: tuple[str, ...],
    rounds: int,
    variants: dict[str, MemoryVariant],
    history: int,
) -> Case:
    """A stream's chunk under these kinds of memory, over a history of so many frames."""
    bank = variants[OURS].bank_frames
    name = f"stream/chunk/{size.name}/{dtype}/history-{history}" + ("" if bank == 3 else f"/bank-{bank}")
    settings = variants[OURS].settings(size) | {
        "history": history,
        "report": False,
        "aim": "at most 7.9 % more time than none",
    }
    build = build_of(streams.chunk, size, dtype, variants=variants, history=history, rounds=rounds)
    against = "the same stream without memory"
    return Case(name, "stream", group, size, dtype, against, build, devices, rounds, settings)


def long_case(size: Size, dtype: str, frames: int, device: str) -> Case:
    """memory_attention with a bank of so many frames."""
    name = f"op/memory_attention/{size.name}/{dtype}/bank-{frames}"
    build = build_of(attention.whole_op, size, dtype, bank_frames=frames, everything=False)
    alone = "the local window alone"
    return Case(name, "op", "long", size, dtype, alone, build, (device,), 9, {"bank_frames": frames})


# ------------------------------------------------------------------------------------------------------------- registry


def registry() -> list[Case]:
    """All cases, those of the stream first and our kernels alone last."""
    some = {**VARIANTS, **PER_CHUNK, **KEPT, "full": MemoryVariant("full")}
    budgets = {
        **VARIANTS,
        **PER_CHUNK,
        **KEPT,
        "memflow, the whole history as bank": MemoryVariant("memflow", 240),
        "memflow, 24 blocks": MemoryVariant("memflow", top_k=24),
    }
    # A large bank keeps 110 frames of 288 MB each: one such stream at a time.
    large = {OURS: MemoryVariant("memflow", 64), "none": MemoryVariant("none")}
    dtypes = ("float32", "bfloat16")
    cases = [
        stream_case(TINY, "float32", "tiny", BOTH, 5, some, 6),
        *of_size(TINY, "float32", "tiny", BOTH, 5),
        *(stream_case(QUARTER, dtype, "wan-1.3b", CPU, 5, some, 24) for dtype in dtypes),
        *(stream_case(QUARTER, dtype, "wan-1.3b", CPU, 9, budgets, 240) for dtype in dtypes),
        *(stream_case(WAN, "bfloat16", "wan-1.3b", CUDA, 5, of, 80) for of in (VARIANTS, large)),
        *of_size(WAN_FRAME, "float32", "wan-1.3b", CPU, 7, ["backward"]),
        *of_size(WAN_FRAME, "bfloat16", "wan-1.3b", CPU, 7, ["backward"]),
        *of_size(QUARTER, "float32", "wan-1.3b", CPU, 15),
        *(case for case in of_size(QUARTER, "bfloat16", "wan-1.3b", CPU, 15) if "/backward/" in case.name),
        *of_size(WAN, "bfloat16", "wan-1.3b", CUDA, 30),
        *(long_case(QUARTER, "float32", frames, "cpu") for frames in LONG_BANKS),
        *(long_case(WAN, "bfloat16", frames, "cuda") for frames in LONG_BANKS),
        *KernelCases(TINY_KERNELS, "bfloat16", "tiny-kernels", BOTH, rounds=2, large_bank=5).all(),
        *KernelCases(WAN_KERNELS, "bfloat16", "kernels", CUDA, rounds=30, large_bank=1000).all(),
    ]
    assert len({(case.name, case.devices) for case in cases}) == len(cases)
    return cases


def chosen(device: str, groups: Sequence[str], named: str = "") -> list[Case]:
    """The cases of some groups that run on a device and have `named` in their name.

    Our kernels alone need Triton: on a CPU its interpreter (TRITON_INTERPRET=1). Raises ValueError where there is none.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"sizes are {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    no_triton = implementations()["triton"]
    fit = [
        case
        for case in registry()
        if device in case.devices and case.group in groups and named in case.name
        if not (case.needs_triton and no_triton)
    ]
    if not fit:
        why = f" ({no_triton})" if no_triton and "tiny-kernels" in groups else ""
        raise ValueError(f"no case of the sizes {', '.join(groups)} with {named!r} in its name runs on {device}{why}")
    return fit
