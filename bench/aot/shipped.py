"""The shipped configurations: what is compiled ahead of time, at the sizes of Wan 2.1 1.3B. Tensors are on "meta"."""

from collections.abc import Callable
from functools import partial

import torch

from memflow_ops.geometry import Geometry, Int8Bank, Score, WriteTarget, descriptor_width
from memflow_ops.kernels.attention.backward import plan_attend_backward
from memflow_ops.kernels.attention.plan import plan_attend
from memflow_ops.kernels.cache_write import plan_write_projections
from memflow_ops.kernels.configs import FORWARD
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.retrieval.choose import plan_retrieve_frames
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.groups import plan_select

Plan = Callable[[int], list[Launch]]
"""Plans the launches of a case for a compute capability."""

# At 480 x 832.
QUERIES, WINDOW, FRAME_TOKENS = 4680, 14040, 1560


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cached(tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Keys or values (1, tokens, heads, D) as they lie in the frame cache: the tokens of a head follow one another."""
    return meta(1, heads, tokens, head_dim, dtype=dtype).transpose(1, 2)


def memory_attention(
    capability: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (12, 12),
    head_dim: int = 128,
    frames: int = 64,
    block_size: int = 64,
    query_group: int = 128,
    top_k: int = 24,
    dense: bool = False,
    window_tokens: int = WINDOW,
    causal: bool = False,
    by_group: bool = False,
    in_order: bool = False,
    score: Score = "mean",
    second: bool = False,
    multiprocessors: int = 0,
    int8: bool = False,
) -> list[Launch]:
    """The launches of a layer's attention to the bank, which resume; with `dense` to the window too, starting afresh.

    by_group: every query group has a number of valid frames. in_order: without a slot table. second: a second query
    for the bank. multiprocessors: how many the device has, so that the last wave is split; 0: it is not. int8: keys and
    values of the bank.
    """
    q = meta(1, QUERIES, heads[0], head_dim, dtype=dtype)
    k = cached(window_tokens, heads[1], head_dim, dtype) if dense else None
    memory = cached(frames * FRAME_TOKENS, heads[1], head_dim, torch.int8 if int8 else dtype)
    blocks = frames * -(-FRAME_TOKENS // block_size)
    descriptors = meta(1, blocks, heads[1], descriptor_width(head_dim, score), dtype=dtype)
    counts = (1, -(-QUERIES // query_group)) if by_group else (1,)
    slots, valid = meta(1, frames, dtype=torch.int32), meta(*counts, dtype=torch.int32)
    sizes = (block_size, FRAME_TOKENS, query_group, head_dim**-0.5)
    scales = None
    if int8:
        k_scale, v_scale = descriptors[..., :head_dim], cached(frames * FRAME_TOKENS, heads[1], 1, dtype).squeeze(3)
        scales = Int8Bank(descriptors, k_scale.contiguous(), v_scale)
    geometry = Geometry(*sizes, None if in_order else slots, valid, causal=causal, score=score, int8=scales)
    resume = None if dense else (q, meta(1, heads[0], QUERIES, dtype=torch.float32))
    selecting, indices = plan_select(q, descriptors, top_k, geometry)
    attending, *_ = plan_attend(
        q, k, k, memory, memory, indices, geometry, resume, q if second else None,
        capability=capability, multiprocessors=multiprocessors,
    )  # fmt: skip
    return [*selecting, *attending]


def window(capability: int, *, causal: bool = False, used: bool = False, paged: bool = False) -> list[Launch]:
    """Our own dense attention to the local window; with `used` the device says how many of its keys are valid.

    paged: the window is 9 of the 76 frames of a pool.
    """
    q, k = meta(1, QUERIES, 12, 128), cached(76 * FRAME_TOKENS if paged else WINDOW, 12, 128)
    geometry = Geometry(
        64, FRAME_TOKENS, query_group=128, softmax_scale=0.1, causal=causal,
        seqused_k=meta(1, dtype=torch.int32) if used else None,
        window_slots=meta(1, 9, dtype=torch.int32) if paged else None,
    )  # fmt: skip
    launches, *_ = plan_attend(q, k, k, None, None, None, geometry, capability=capability)
    return launches


def in_gluon(plan: Plan) -> Plan:
    """The plan as it is where the table takes the kernel for Hopper."""

    def planned(capability: int) -> list[Launch]:
        before = dict(FORWARD)
        FORWARD[90] = "gluon"
        try:
            return plan(capability)
        finally:
            FORWARD.update(before)

    return planned


def cache_write(
    heads: int = 12, dtype: torch.dtype = torch.bfloat16, clean: bool = True, moments: int = 1, second: bool = False
) -> list[Launch]:
    """A layer's cache write, with descriptors (of so many moments) and frame means in the clean pass.

    second: with a second query for the bank.
    """
    q, angles = meta(1, QUERIES, heads, 128, dtype=dtype), meta(1, QUERIES, 64, dtype=torch.float32)
    pool, weight = cached(76 * FRAME_TOKENS, heads, 128, dtype), meta(heads * 128, dtype=dtype)
    descriptors = meta(1, 76 * 25, heads, moments * 128, dtype=dtype) if clean else None
    means = meta(1, 1, 1, heads, 128, dtype=dtype) if clean else None
    places = meta(1, 3, dtype=torch.int32)
    target = WriteTarget(pool, pool, places, FRAME_TOKENS, descriptors, 64, means, FRAME_TOKENS)
    beside = ((angles, angles), q) if second else ((None, None), None)
    launches, _ = plan_write_projections(q, q, q, (angles, angles), (weight, weight, 1e-6), target, *beside)
    return launches


def retrieval(score: str, parts: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """A chunk's choice for 30 layers from 240 frames with as many means each."""
    integers, redundancy = dict(dtype=torch.int32), None if score == "coverage" else 0.95
    launches, *_ = plan_retrieve_frames(
        meta(30, 1, 512, 12, 128, dtype=dtype), meta(30, 1, 256, parts, 12, 128, dtype=dtype), meta(1, 240, **integers),
        meta(1, **integers), meta(parts, dtype=torch.float32), count=6, score=score, redundancy=redundancy,
        softmax_scale=128**-0.5,
    )  # fmt: skip
    return launches


def backward(
    capability: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (12, 12),
    head_dim: int = 128,
    block_size: int = 64,
    query_group: int = 128,
    dense: bool = False,
    causal: bool = False,
    paged: bool = False,
    in_order: bool = False,
) -> list[Launch]:
    """The backward pass of a layer's attention to the bank; with `dense` to the window too.

    The gradients are those of the bank, or with `dense` of the window; `causal`: a part of this is seen and valid;
    `paged`: as in `window`; `in_order`: as in `memory_attention`.
    """
    q = meta(1, QUERIES, heads[0], head_dim, dtype=dtype)
    k = cached(76 * FRAME_TOKENS if paged else WINDOW, heads[1], head_dim, dtype) if dense else None
    memory = cached(64 * FRAME_TOKENS, heads[1], head_dim, dtype)
    indices = meta(1, heads[0], -(-QUERIES // query_group), 24, dtype=torch.int32)
    lse = meta(1, heads[0], QUERIES, dtype=torch.float32)
    geometry = Geometry(
        block_size, FRAME_TOKENS, query_group, head_dim**-0.5,
        None if in_order else meta(1, 64, dtype=torch.int32), causal=causal,
        seqused_k=meta(1, dtype=torch.int32) if causal else None,
        window_slots=meta(1, 9, dtype=torch.int32) if paged else None,
    )  # fmt: skip
    wanted = [True, dense, dense, not dense, not dense]
    steps, _ = plan_attend_backward(
        q, lse, q, k, k, memory, memory, indices, q, lse, geometry, wanted, capability=capability
    )
    return [step for step in steps if isinstance(step, Launch)]


REPRESENTATIVE = frozenset(
    {
        "window", "window, causal, used keys", "bank", "bank in order", "bank, last wave split", "bank, float32",
        "bank, blocks of 16", "bank, int8", "per query", "cache write, clean pass", "retrieval, coverage",
        "backward, window too", "backward, per query", "backward, float32",
    }
)  # fmt: skip
"""The cases that stand for all of them where not every one is compiled."""


def shipped() -> dict[str, Plan]:
    """The name of each case, and a function that plans its launches for a compute capability."""

    def case(**options) -> Plan:
        return lambda capability: memory_attention(capability, **options)

    split = dict(multiprocessors=132)  # of an H100: two programs for each of the last 48 tiles
    half, single = dict(dtype=torch.float16), dict(dtype=torch.float32)
    sizes: dict[str, dict] = {
        "bank": dict(),
        "bank, window too": dict(dense=True),
        "bank, window too, second query": dict(dense=True, second=True),
        "per query, window too, second query": dict(query_group=1, dense=True, second=True),
        "bank in order": dict(in_order=True),
        "small bank": dict(frames=4),
        "bank, 1000 frames": dict(frames=1000),
        "per query": dict(query_group=1),
        "per query, window too": dict(query_group=1, dense=True),
        "groups of 16": dict(query_group=16),
        "groups of 64": dict(query_group=64),
        "whole chunk": dict(query_group=QUERIES),
        "bank, float16": half,
        "per query, float16": dict(query_group=1, **half),
        "bank, 64 dims": dict(head_dim=64),
        "per query, 64 dims": dict(query_group=1, head_dim=64),
        "bank, 96 dims": dict(head_dim=96),
        "per query, 96 dims": dict(query_group=1, head_dim=96),
        "bank, 12 heads on 4": dict(heads=(12, 4)),
        "per query, 12 heads on 1": dict(query_group=1, heads=(12, 1)),
        "bank, blocks of 16": dict(block_size=16),
        "bank, blocks of 32": dict(block_size=32),
        "bank, blocks of 128": dict(block_size=128),
        "per query, blocks of 128": dict(query_group=1, block_size=128),
        "per query, top 100": dict(query_group=1, top_k=100),
        "bank, last wave split": split,
        "whole chunk, last wave split": dict(query_group=QUERIES, **split),
        "bank, float16, last wave split": half | split,
        "bank, 64 dims, last wave split": dict(head_dim=64, **split),
        "bank, 96 dims, last wave split": dict(head_dim=96, **split),
        "bank, 12 heads on 4, last wave split": dict(heads=(12, 4), **split),
        "bank, blocks of 16, last wave split": dict(block_size=16, top_k=96, **split),
        "bank, blocks of 128, last wave split": dict(block_size=128, **split),
        "bank, float32": single,
        "per query, float32": dict(query_group=1, **single),
        "bank, frames by group": dict(by_group=True),
        "per query, frames by group": dict(query_group=1, by_group=True),
        "bank, moments": dict(score="moments"),
        "per query, moments": dict(query_group=1, score="moments"),
        "bank, int8": dict(int8=True),
        "bank, int8, window too": dict(int8=True, dense=True),
        "bank, int8, moments": dict(int8=True, score="moments"),
        "bank, int8, float16": dict(int8=True, **half),
        "bank, int8, float32": dict(int8=True, **single),
        "bank, int8, 64 dims": dict(int8=True, head_dim=64),
        "bank, int8, 12 heads on 4": dict(int8=True, heads=(12, 4)),
        "bank, int8, blocks of 16": dict(int8=True, block_size=16),
        "bank, int8, blocks of 32": dict(int8=True, block_size=32),
        "bank, int8, last wave split": dict(int8=True, **split),
        "per query, int8": dict(int8=True, query_group=1),
        "per query, int8, float32": dict(int8=True, query_group=1, **single),
        "whole chunk, int8": dict(int8=True, query_group=QUERIES),
        "bank, normalised": dict(score="normalised"),
        "bank, normalised, frames by group": dict(score="normalised", by_group=True),
    }
    windows: dict[str, Plan] = {
        "window": window,
        "window, causal": partial(window, causal=True),
        "window, used keys": partial(window, used=True),
        "window, causal, used keys": partial(window, causal=True, used=True),
        "window, paged": partial(window, paged=True),
        "window, paged, causal, used keys": partial(window, causal=True, used=True, paged=True),
    }
    gluon: dict[str, Plan] = {
        "window, in Gluon": in_gluon(window),
        "bank, in Gluon": in_gluon(case()),
        "bank in order, in Gluon": in_gluon(case(in_order=True)),
        "bank, float16, in Gluon": in_gluon(case(**half)),
        "bank, 64 dims, in Gluon": in_gluon(case(head_dim=64)),
        "bank, 12 heads on 4, in Gluon": in_gluon(case(heads=(12, 4))),
        "bank, blocks of 128, in Gluon": in_gluon(case(block_size=128)),
    }
    launches = {name: case(**options) for name, options in sizes.items()}
    prototypes = (cached(3120, 12, 128), 64, FRAME_TOKENS, torch.bfloat16)
    descriptors = lambda _: [plan_block_means(*prototypes)[0]]  # noqa: E731
    variances = lambda _: [plan_block_means(*prototypes, "variance")[0]]  # noqa: E731
    writes = {
        "cache write, clean pass": lambda _: cache_write(),
        "cache write, clean pass, moments": lambda _: cache_write(moments=2),
        "cache write, clean pass, second query": lambda _: cache_write(second=True),
        "cache write, second query": lambda _: cache_write(clean=False, second=True),
        "cache write": lambda _: cache_write(clean=False),
        "cache write, 40 heads": lambda _: cache_write(heads=40),
        "cache write, float32": lambda _: cache_write(dtype=torch.float32),
    }
    retrievals = {
        "retrieval, linear": lambda _: retrieval("linear"),
        "retrieval, softmax": lambda _: retrieval("softmax"),
        "retrieval, softmax over 25 blocks": lambda _: retrieval("softmax", parts=25),
        "retrieval, coverage": lambda _: retrieval("coverage"),
        "retrieval, coverage, float32": lambda _: retrieval("coverage", dtype=torch.float32),
    }
    backwards: dict[str, dict] = {
        "backward": dict(),
        "backward, bank in order": dict(in_order=True),
        "backward, window too": dict(dense=True),
        "backward, per query": dict(query_group=1),
        "backward, per query, window too": dict(query_group=1, dense=True),
        "backward, groups of 16": dict(query_group=16),
        "backward, groups of 64": dict(query_group=64),
        "backward, whole chunk": dict(query_group=QUERIES),
        "backward, window too, float16": dict(dense=True, **half),
        "backward, float16": half,
        "backward, window too, 64 dims": dict(dense=True, head_dim=64),
        "backward, 64 dims": dict(head_dim=64),
        "backward, per query, 64 dims": dict(query_group=1, head_dim=64),
        "backward, window too, 96 dims": dict(dense=True, head_dim=96),
        "backward, 96 dims": dict(head_dim=96),
        "backward, per query, 96 dims": dict(query_group=1, head_dim=96),
        "backward, 12 heads on 4": dict(heads=(12, 4)),
        "backward, blocks of 16": dict(block_size=16),
        "backward, blocks of 32": dict(block_size=32),
        "backward, blocks of 128": dict(block_size=128),
        "backward, window too, float32": dict(dense=True, **single),
        "backward, float32": single,
        "backward, per query, float32": dict(query_group=1, **single),
        "backward, causal window too": dict(dense=True, causal=True),
        "backward, paged window too": dict(dense=True, paged=True),
        "backward, causal window too, 64 dims": dict(dense=True, causal=True, head_dim=64),
    }
    gradients = {name: partial(backward, **options) for name, options in backwards.items()}
    described = {"descriptors": descriptors, "descriptors, moments": variances}
    return {**described, **windows, **gluon, **launches, **writes, **retrievals, **gradients}
