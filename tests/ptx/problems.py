"""Problems that run kernels as compiled PTX, each held against the reference in float64; ptx_cases.py has their sizes.

They go through the public operators, so that plans and tiles are those that a GPU would get. What no query attends to
is NaN, in the bank and in the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import memory_q_cases
import torch
from attention_cases import Case, assert_within_tolerance, dense_attention, visible
from cache_write_cases import assert_written
from cache_write_cases import make_case as write_case
from moment_cases import MomentCase, assert_selected
from ptx_emulator.runner import emulated
from retrieval_cases import assert_retrieves
from retrieval_cases import make_case as retrieval_case

import memflow_ops as ops
from memflow_ops.geometry import Geometry
from memflow_ops.kernels import configs
from memflow_ops.kernels.attention import plan
from memflow_ops.kernels.selection import groups

# Attention


def attention_case(
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    queries: int = 80,
    dense: int = 0,
    bank: tuple[int, int, int] = (0, 1, 1),
    group: int = 64,
    top_k: int = 3,
    slots: bool = False,
    valid: tuple[int, ...] | None = None,
    used: tuple[int, ...] | None = None,
    scale: float | None = None,
    **options,
) -> tuple[Case, torch.Tensor, torch.Tensor | None]:
    """A case, the descriptors of its bank, and what the reference selects.

    bank: frames, tokens of a frame, tokens of a block. With a bank the queries and descriptors are small integers, so
    that every implementation selects alike, ties included where a group has a power of two of queries. valid:
    memory_frames. used: seqused_k.
    """
    (q_heads, kv_heads), (frames, frame_tokens, block_size) = heads, bank
    stored = frames + 2 if slots and frames else frames
    make = lambda tokens: torch.randn(batch, tokens, kv_heads, head_dim).to(dtype)  # noqa: E731
    integers = lambda low, high, *shape: torch.randint(low, high, shape).to(dtype)  # noqa: E731
    shape = (batch, queries, q_heads, head_dim)
    counts = lambda numbers: None if numbers is None else torch.tensor(numbers, dtype=torch.int32)  # noqa: E731
    options = dict(
        top_k=top_k,
        block_size=block_size,
        frame_tokens=frame_tokens,
        query_group=group,
        memory_frames=counts(valid),
        memory_slots=torch.randint(-1, stored + 1, (batch, frames), dtype=torch.int32) if slots else None,
        seqused_k=counts(used),
        softmax_scale=scale,
        **options,
    )
    memory = [make(stored * frame_tokens) if frames else None for _ in range(2)]
    q = integers(-1, 2, *shape) if frames else torch.randn(shape).to(dtype)
    given = Case(q, make(dense), make(dense), *memory, options)
    if not frames:
        return given, None, None
    blocks = -(-frame_tokens // block_size)
    descriptors = integers(-2, 3, batch, stored * blocks, kv_heads, head_dim)
    names = ("top_k", "query_group", "memory_frames", "memory_slots")
    chosen = {name: options[name] for name in names}
    indices = ops.select_blocks(q.double(), descriptors.double(), blocks_per_frame=blocks, impl="reference", **chosen)
    return given, descriptors, indices


def unseen_is_nan(given: Case, indices: torch.Tensor | None) -> Case:
    """The case with NaN in every key and value that no query sees."""
    _, _, count = visible(given, indices)  # (B, H, Lq, Lk + Lm)
    kv_heads = given.k.shape[2]
    seen = count.amax(2).unflatten(1, (kv_heads, -1)).amax(2).mT > 0  # (B, Lk + Lm, Hkv)
    window = given.k.shape[1]
    if given.options.get("causal"):
        seen[:, :window] |= True  # a tile of the window is read whole, and its mask is of scores
    if given.options["seqused_k"] is not None:
        used = given.options["seqused_k"].clamp(0, window)
        seen[:, :window] &= (torch.arange(window) < used.unsqueeze(1)).unsqueeze(-1)
    hide = lambda x, part: None if x is None else x.masked_fill(~part.unsqueeze(-1), torch.nan)  # noqa: E731
    parts = [seen[:, :window]] * 2 + [seen[:, window:]] * 2
    tensors = [hide(x, part) for x, part in zip(list(given.tensors().values())[1:], parts, strict=True)]
    return Case(given.q, *tensors, given.options)


def with_gradients(attend, given: Case, weights: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """Out, LSE and, with weights of both, the gradients of all inputs (0 where they have none)."""
    if weights is None:
        out, lse = attend(given)
        return {"out": out, "lse": lse}
    # Leaves in the same memory: a copy would be aligned again.
    tensors = [None if x is None else x.detach().requires_grad_() for x in given.tensors().values()]
    given, leaves = Case(*tensors, given.options), [x for x in tensors if x is not None]
    out, lse = attend(given)
    loss = (out * weights[0].to(out.dtype)).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weights[1]).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = [f"gradient of {name}" for name, x in given.tensors().items() if x is not None]
    grads = [torch.zeros_like(x) if g is None else g.nan_to_num(0.0) for g, x in zip(found, leaves, strict=True)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def attention(
    dtype: torch.dtype,
    *,
    backward: bool = False,
    shifted: bool = False,
    pages: tuple[int, list[int]] | None = None,
    **options,
) -> None:
    """memory_attention, with gradients on request, within twice the error of torch's dense attention.

    shifted: every tensor begins at an address that 16 does not divide. pages: the tokens of a page, and where the pages
    of the window lie in a pool that is NaN elsewhere.
    """
    given, descriptors, indices = attention_case(dtype, **options)
    weights = (torch.randn(given.q.shape), torch.randn(given.q.shape[0], given.q.shape[2], given.q.shape[1]))
    dirty = unseen_is_nan(given, indices)
    if shifted:
        dirty = Case(*(None if x is None else moved(x) for x in dirty.tensors().values()), dirty.options)

    def attend(x: Case, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        bank = {} if descriptors is None else {"memory_descriptors": descriptors.to(x.q.dtype)}
        more = {"dense_backend": "own"} if impl == "triton" else {}
        tensors = x.tensors()
        if pages is not None:
            tensors |= {name: in_pages(tensors[name], *pages) for name in ("k", "v")}
            more |= {"frame_tokens": pages[0], "window_slots": torch.tensor([pages[1]] * len(x.q), dtype=torch.int32)}
        return ops.memory_attention(*tensors.values(), **{**x.options, **bank, **more}, return_lse=True, impl=impl)

    wanted = weights if backward else None
    ours = with_gradients(partial(attend, impl="triton"), dirty, wanted)
    exact = with_gradients(partial(attend, impl="reference"), dirty.to(torch.float64), wanted)
    dense = with_gradients(lambda x: dense_attention(x, indices), given, wanted)
    compare(ours, dense, exact)


def second_query(dtype: torch.dtype, **options) -> None:
    """memory_attention with a second query for the bank, which selects."""
    given, descriptors, indices = attention_case(dtype, **options)
    given = replace(given, q=torch.randn(given.q.shape).to(dtype), options={**given.options, "memory_q": given.q})
    dirty = unseen_is_nan(given, indices)

    def attend(x: Case, impl: str) -> dict[str, torch.Tensor]:
        more = {"memory_descriptors": descriptors.to(x.q.dtype), "dense_backend": "own" if impl == "triton" else "auto"}
        out = ops.memory_attention(*x.tensors().values(), **{**x.options, **more}, return_lse=True, impl=impl)
        return dict(zip(("out", "lse"), out, strict=True))

    yardstick = dict(zip(("out", "lse"), memory_q_cases.dense(given, indices), strict=True))
    compare(attend(dirty, "triton"), yardstick, attend(memory_q_cases.in_dtype(dirty, torch.float64), "reference"))


def in_pages(x: torch.Tensor, size: int, slots: list[int]) -> torch.Tensor:
    """A pool (B, P * size, Hkv, D) whose pages `slots` are x, and whose others are NaN."""
    tokens = (torch.tensor(slots).unsqueeze(-1) * size + torch.arange(size)).flatten()
    pool = x.new_full((x.shape[0], (max(slots) + 2) * size, *x.shape[2:]), torch.nan)
    return pool.index_copy(1, tokens, x)


def moved(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element further on in memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def compare(ours: dict[str, torch.Tensor], dense: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    for name, right in exact.items():
        assert ours[name].shape == right.shape, name
        if name == "lse":
            torch.testing.assert_close(ours[name].double(), right, atol=1e-5, rtol=1e-5)
            assert torch.equal(ours[name] == -torch.inf, right == -torch.inf)
        else:
            assert_within_tolerance(ours[name], dense[name], right, name)


def int8_attention(dtype: torch.dtype, **options) -> None:
    """memory_attention with an int8 bank; the scales of what no query sees are NaN, of keys and of values."""
    given, descriptors, indices = attention_case(dtype, **options)
    descriptors = descriptors.to(dtype)
    size, frame = given.options["block_size"], given.options["frame_tokens"]
    made = ops.quantise_memory(given.memory_k, given.memory_v, descriptors, block_size=size, frame_tokens=frame)
    token = torch.arange(given.memory_k.shape[1])
    block = token // frame * -(-frame // size) + token % frame // size
    # With float32 between, as in the kernel, the numbers are rounded alike.
    means, k_scale, v_scale = (x.float() for x in (descriptors, *made[2:]))
    plain = replace(
        given,
        memory_k=(made.memory_k * k_scale[:, block] + means[:, block]).to(dtype),
        memory_v=(made.memory_v * v_scale.unsqueeze(-1)).to(dtype),
    )
    of_values = unseen_is_nan(plain, indices).memory_v[..., 0].isnan()
    of_blocks = torch.ones(descriptors.shape[:3], dtype=torch.bool)
    for number in range(of_blocks.shape[1]):
        of_blocks[:, number] = of_values[:, block == number].all(1)
    scales = {
        "memory_k_scale": made.memory_k_scale.masked_fill(of_blocks.unsqueeze(-1), torch.nan),
        "memory_v_scale": made.memory_v_scale.masked_fill(of_values, torch.nan),
    }
    bank = {"memory_descriptors": descriptors, "return_lse": True}
    ours = ops.memory_attention(
        given.q, given.k, given.v, *made[:2], **given.options, **bank, **scales, impl="triton", dense_backend="own"
    )
    wide = plain.to(torch.float64)
    bank["memory_descriptors"] = descriptors.double()
    exact = ops.memory_attention(*wide.tensors().values(), **wide.options, **bank, impl="reference")
    dense = dense_attention(plain, indices)
    compare(*(dict(zip(("out", "lse"), x, strict=True)) for x in (ours, dense, exact)))


def resumed(dtype: torch.dtype, **options) -> None:
    """attend_selected continues another kernel's softmax."""
    given, _, indices = attention_case(dtype, **options)
    dirty = unseen_is_nan(given, indices)
    names = ("block_size", "frame_tokens", "query_group", "memory_slots", "softmax_scale")
    chosen = {name: given.options[name] for name in names}

    def attend(x: Case, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        before = ops.memory_attention(x.q, x.k, x.v, return_lse=True, impl="reference")
        return ops.attend_selected(x.q, x.memory_k, x.memory_v, indices, resume=before, impl=impl, **chosen)

    dense = dict(zip(("out", "lse"), dense_attention(given, indices), strict=True))
    ours = dict(zip(("out", "lse"), attend(dirty, "triton"), strict=True))
    compare(ours, dense, dict(zip(("out", "lse"), attend(dirty.to(torch.float64), "reference"), strict=True)))


def with_candidates(dtype: torch.dtype, **options) -> None:
    """A selection in several launches: spans of 32 blocks, and a last round over what they leave."""
    with patch.object(configs, "SPAN_BLOCKS", 32), patch.object(groups, "SPAN_BLOCKS", 32):
        attention(dtype, **options)


def in_gluon(problem: Callable[..., None], *args, **options) -> None:
    """A problem of attention where the table takes the kernel for Hopper; on other architectures as ever."""
    with patch.dict(configs.FORWARD, {90: "gluon"}):
        problem(*args, **options)


def last_wave_split(dtype: torch.dtype, **options) -> None:
    """The tiles of the last wave by several programs each, whose results another launch merges."""
    with (
        patch.object(configs, "SPLIT_ROWS", 32),
        patch.object(configs, "SPLIT_SAVES_KEYS", 1),
        patch.object(plan, "multiprocessors_of", lambda tensor: 20),
    ):
        attention(dtype, **options)


def faults_of_a_key_too_many(capability: int) -> set[str]:
    """The kinds of fault of a launch over a window with one key more than there are."""
    q, k, v = (torch.randn(1, length, 1, 64).to(torch.bfloat16) for length in (64, 33, 33))
    with emulated(capability) as emulator:
        launches, *_ = plan.plan_attend(q, k, v, None, None, None, Geometry(1, 1, 64, 0.125))
        for launch in launches:
            emulator.run(replace(launch, arguments={**launch.arguments, "keys": 34}))
    return {found.kind.name for found in emulator.faults}


# Selection


def selection(
    dtype: torch.dtype, group: int, *, frames: int, blocks: int, top_k: int, queries: int = 48, valid=None, slots=False,
    heads: tuple[int, int] = (2, 1), head_dim: int = 64,
) -> None:  # fmt: skip
    """select_blocks over `frames` of `blocks` each: equal to the reference on integers, ties included."""
    stored = frames + 2 if slots else frames
    q = torch.randint(-1, 2, (2, queries, heads[0], head_dim)).to(dtype)
    descriptors = torch.randint(-1, 2, (2, stored * blocks, heads[1], head_dim)).to(dtype)
    options = dict(
        query_group=group,
        memory_frames=None if valid is None else torch.tensor(valid, dtype=torch.int32),
        memory_slots=torch.randint(-1, stored + 1, (2, frames), dtype=torch.int32) if slots else None,
        blocks_per_frame=blocks,
    )
    got = ops.select_blocks(q, descriptors, top_k, impl="triton", **options)
    assert torch.equal(got, ops.select_blocks(q.double(), descriptors.double(), top_k, impl="reference", **options))


def ranked_by_mass(
    dtype: torch.dtype, score: str, group: int, *, queries: int = 90, frames: int = 4, top_k: int = 5, valid=None
) -> None:
    """select_blocks by an estimate of the blocks' mass, which approximations of exp and log have a part in.

    Frames have a short last block. Equal to float64 wherever the margin is clear, which it mostly is.
    """
    q, keys = 3 * torch.randn(2, queries, 2, 64), torch.randn(2, frames * 18, 1, 64)
    counts = None if valid is None else torch.tensor(valid, dtype=torch.int32)
    case = MomentCase(q.to(dtype), keys.to(dtype), top_k, 4, 18, group, None, counts, score=score)
    described = case.descriptors("torch")
    groups = 4 * -(-queries // group)
    assert 2 * assert_selected(case, described, case.select(described, "triton")) > groups


def every_kind_of_score(dtype: torch.dtype, group: int, top_k: int) -> None:
    """NaN, infinities, zeros of both signs, subnormal numbers, and ties of each."""
    inf, nan = torch.inf, torch.nan
    tiny, huge = (6e-8, 6e4) if dtype == torch.float16 else (1e-40, 3e38)
    scores = [0.0, nan, -inf, -0.0, inf, 1.0, nan, -tiny, tiny, -inf, inf, -5.0, 1.0, -0.0, huge]
    q, descriptors = torch.zeros(1, 2 * group, 1, 16), torch.zeros(1, 15, 1, 16)
    q[..., 0], descriptors[0, :, 0, 0] = 1.0, torch.tensor(scores)
    q, descriptors = q.to(dtype), descriptors.to(dtype)
    got = ops.select_blocks(q, descriptors, top_k, query_group=group, impl="triton")
    right = ops.select_blocks(q.double(), descriptors.double(), top_k, query_group=group, impl="reference")
    assert torch.equal(got, right), f"{got.tolist()} instead of {right.tolist()}"


def tie_of_equal_groups(dtype: torch.dtype, group: int, **options) -> None:
    """Groups of equal queries (1, 3): the blocks (3, 0) and (0, 1) score 3 both, and the lower one is chosen.

    A mean that is a product with the rounded reciprocal of 120 is off by a bit, and then the other one is.
    """
    q = torch.zeros(1, 2 * group + group // 2, 1, 64, dtype=dtype)
    q[..., 0], q[..., 1] = 1.0, 3.0
    descriptors = torch.zeros(1, 12, 1, 64, dtype=dtype)
    descriptors[0, 4, 0, 0], descriptors[0, 9, 0, 1] = 3.0, 1.0
    k, v = torch.randn(2, 1, 12 * 16, 1, 64).to(dtype)
    out = ops.memory_attention(
        q, k[:, :0], v[:, :0], k, v, memory_descriptors=descriptors, top_k=1, block_size=16, frame_tokens=96,
        query_group=group, impl="triton", dense_backend="own", **options,
    )  # fmt: skip
    right = ops.memory_attention(
        q.double(), k[:, :0].double(), v[:, :0].double(), k.double(), v.double(),
        memory_descriptors=descriptors.double(), top_k=1, block_size=16, frame_tokens=96, query_group=group,
        impl="reference", **options,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), right, atol=0.02, rtol=0.02)


def description(dtype: torch.dtype, tokens: int, block: int, head_dim: int, strided: bool = False) -> None:
    """describe_blocks: the means of blocks, rounded once; a NaN stays in its block."""
    k = torch.randn(2, 2 * tokens, 2, head_dim).to(dtype)
    if strided:
        k = torch.randn(2, 4, 3, 2 * tokens, head_dim).to(dtype).permute(0, 3, 2, 1, 4)[:, :, 1, ::2]
    k[1, tokens // 2, 1, 7] = torch.nan
    got = ops.describe_blocks(k, block, tokens, impl="triton")
    exact = ops.describe_blocks(k.double(), block, tokens, impl="reference")
    nan = exact.isnan()
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-20
    assert torch.equal(got.isnan(), nan) and ((got.double() - exact).abs() <= limit)[~nan].all()


# Cache write and retrieval


def writing(dtype: torch.dtype, *, mean_frames: int = 1, described: bool = True, **options) -> None:
    given = write_case(**options)
    given.mean_frames, given.described = mean_frames, described
    assert_written(given, dtype, "triton")


def retrieval(dtype: torch.dtype, score: str, redundancy: float | None = None, count: int = 4, **options) -> None:
    chosen = dict(count=count, score=score, redundancy=redundancy)
    assert_retrieves(retrieval_case(**options), chosen, dtype, "triton")
