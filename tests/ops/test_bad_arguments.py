"""A bad argument that the host can see is refused before anything runs; the message says what is given and expected."""

import cache_write_cases
import numpy as np
import pytest
import retrieval_cases
import torch

from memflow_ops import (
    attend_selected,
    describe_blocks,
    frame_relevance,
    memory_attention,
    merge_states,
    retrieve_frames,
    select_blocks,
    write_projections,
)


def valid(**changes):
    """Arguments of memory_attention that work; `changes` breaks them."""
    make = lambda tokens, heads=2: torch.randn(2, tokens, heads, 8)  # noqa: E731
    good = dict(q=make(6, 4), k=make(5), v=make(5), memory_k=make(12), memory_v=make(12), frame_tokens=6, block_size=4)
    return {**good, **changes}


X = torch.randn
INT = lambda *shape: torch.zeros(shape, dtype=torch.int32)  # noqa: E731

BAD = {
    "q-not-a-tensor": (dict(q=[1.0]), TypeError, "q must be a tensor.*got list"),
    "q-three-dims": (dict(q=X(6, 4, 8)), ValueError, r"q must have 4 dimensions.*\(6, 4, 8\)"),
    "q-empty": (dict(q=X(2, 0, 4, 8)), ValueError, "q must not be empty"),
    "q-sparse": (dict(q=X(2, 6, 4, 8).to_sparse()), TypeError, "q must be a dense tensor, got .* torch.sparse"),
    "k-nested": (
        dict(k=torch.nested.nested_tensor([torch.zeros(5, 2, 8), torch.zeros(4, 2, 8)], layout=torch.jagged)),
        TypeError,
        "k must be a dense tensor, got a nested tensor",
    ),
    "q-integers": (dict(q=torch.ones(2, 6, 4, 8, dtype=torch.int32)), TypeError, "q must be float16.*int32"),
    "k-dtype": (dict(k=X(2, 5, 2, 8).half()), TypeError, "k must have the dtype of q, torch.float32, got .*16"),
    "k-batch": (dict(k=X(3, 5, 2, 8), v=X(3, 5, 2, 8)), ValueError, "k must have the batch size of q, 2, got 3"),
    "k-head-size": (dict(k=X(2, 5, 2, 4), v=X(2, 5, 2, 4)), ValueError, "k must have the head size of q, 8, got 4"),
    "k-heads": (dict(k=X(2, 5, 3, 8), v=X(2, 5, 3, 8)), ValueError, "4 heads of q must be a multiple.*got 3"),
    "k-strides": (dict(k=X(2, 5, 8, 2).mT), ValueError, "k must be contiguous in its last dimension"),
    "k-device": (dict(k=X(2, 5, 2, 8, device="meta")), ValueError, "k must be on the device of q, cpu, got meta"),
    "v-shape": (dict(v=X(2, 4, 2, 8)), ValueError, r"v must have shape \(2, 5, 2, 8\), got \(2, 4, 2, 8\)"),
    "no-memory-v": (dict(memory_v=None), ValueError, "memory_k and memory_v must be given together"),
    "memory-heads": (dict(memory_k=X(2, 12, 4, 8), memory_v=X(2, 12, 4, 8)), ValueError, "heads of k, 2, got 4"),
    "memory-dtype": (dict(memory_v=X(2, 12, 2, 8).double()), TypeError, "memory_v must have the dtype of q"),
    "frames-not-whole": (dict(frame_tokens=5), ValueError, "memory_k must hold whole frames of 5 .*got 12 tokens"),
    "frame-tokens-zero": (dict(frame_tokens=0), ValueError, "frame_tokens must be at least 1, got 0"),
    "block-size-zero": (dict(block_size=0), ValueError, "block_size must be at least 1, got 0"),
    "block-size-float": (dict(block_size=4.0), TypeError, "block_size must be an int, got float"),
    "top-k-negative": (dict(top_k=-1), ValueError, "top_k must be at least 1, got -1"),
    "top-k-bool": (dict(top_k=True), TypeError, "top_k must be an int, got bool"),
    "group-zero": (dict(query_group=0), ValueError, "query_group must be at least 1, got 0"),
    "scale-text": (dict(softmax_scale="1"), TypeError, "softmax_scale must be a number, got str"),
    "impl": (dict(impl="cuda"), ValueError, "impl must be one of auto, reference, torch, triton, got 'cuda'"),
    "descriptors-count": (dict(memory_descriptors=X(2, 3, 2, 8)), ValueError, r"_descriptors must have shape \(2, 4"),
    "descriptors-dtype": (dict(memory_descriptors=X(2, 4, 2, 8).half()), TypeError, "_descriptors must have the dtype"),
    "frames-dtype": (dict(memory_frames=torch.zeros(2)), TypeError, "memory_frames must be int32, got torch.float32"),
    "frames-shape": (dict(memory_frames=INT(3)), ValueError, r"memory_frames must have shape \(2\), got \(3,\)"),
    "frames-list": (dict(memory_frames=[1, 2]), TypeError, "memory_frames must be an int32 tensor"),
    "slots-shape": (dict(memory_slots=INT(2)), ValueError, r"memory_slots must have shape \(2, any\)"),
    "slots-dtype": (dict(memory_slots=INT(2, 2).long()), TypeError, "memory_slots must be int32"),
    "second-query-shape": (dict(memory_q=X(2, 6, 2, 8)), ValueError, r"memory_q must have shape \(2, 6, 4, 8\), got"),
    "second-query-dtype": (dict(memory_q=X(2, 6, 4, 8).half()), TypeError, "memory_q must have the dtype of q"),
    "second-query-without-bank": (
        dict(memory_k=None, memory_v=None, memory_q=X(2, 6, 4, 8)), ValueError, "memory_q is given without",
    ),
    "slots-without-bank": (
        dict(memory_k=None, memory_v=None, memory_slots=INT(2, 1)), ValueError, "without memory_k and memory_v",
    ),
    "scale-nan": (dict(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
    "frames-without-bank": (
        dict(memory_k=None, memory_v=None, memory_frames=INT(2)), ValueError, "memory_frames is given without",
    ),
    "dropout": (dict(dropout_p=0.1), ValueError, "dropout_p must be 0.0, got 0.1: memory_attention has no dropout"),
    "window-left": (dict(window_size=(128, 0)), ValueError, r"window_size must be \(-1, -1\), got \(128, 0\)"),
    "window-number": (dict(window_size=128), ValueError, r"window_size must be \(-1, -1\), got 128"),
    "softcap": (dict(softcap=30.0), ValueError, "softcap must be 0.0, got 30.0"),
    "alibi": (dict(alibi_slopes=X(4)), ValueError, "alibi_slopes must be None, got a tensor"),
    "probabilities": (dict(return_attn_probs=True), ValueError, "return_attn_probs must be False.*return_lse=True"),
    "slots-of-nothing": (
        dict(memory_k=X(2, 0, 2, 8), memory_v=X(2, 0, 2, 8), memory_slots=INT(2, 1)), ValueError, "holds none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_memory_attention_refuses(name, monkeypatch):
    changes, error, message = BAD[name]
    monkeypatch.setattr("memflow_ops.ops.registration.memory_attention", lambda *_: pytest.fail("the op ran"))
    with pytest.raises(error, match=message):
        memory_attention(**valid(**changes))


def test_memory_attention_accepts_what_is_valid():
    assert memory_attention(**valid()).shape == (2, 6, 4, 8)
    assert memory_attention(**valid(memory_k=X(2, 0, 2, 8), memory_v=X(2, 0, 2, 8))).shape == (2, 6, 4, 8)


def test_a_call_of_flash_attn_with_its_defaults_said_aloud_is_accepted():
    given = valid(top_k=2)
    expected = memory_attention(**given)
    neutral = dict(dropout_p=0.0, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_attn_probs=False)
    for changes in ({}, {"window_size": [None, None], "dropout_p": 0, "deterministic": True}, {"deterministic": False}):
        assert torch.equal(memory_attention(**given, **{**neutral, **changes}), expected)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_numbers(integer):
    sizes = dict(top_k=2, block_size=4, frame_tokens=6, query_group=3)
    given = {name: integer(n) for name, n in sizes.items()}
    scale = np.float32(0.5)
    tensors = valid()
    expected = memory_attention(**{**tensors, **sizes}, softmax_scale=0.5)
    assert torch.equal(memory_attention(**{**tensors, **given}, softmax_scale=scale), expected)
    described = describe_blocks(K, integer(4), integer(6))
    assert torch.equal(described, describe_blocks(K, 4, 6))
    chosen = select_blocks(Q, described, integer(2), query_group=integer(3), blocks_per_frame=integer(2))
    assert torch.equal(chosen, select_blocks(Q, described, 2, query_group=3, blocks_per_frame=2))
    given = {name: integer(n) for name, n in sizes.items() if name != "top_k"}
    assert attend_selected(Q, K, K, chosen, **given, softmax_scale=scale)[0].shape == Q.shape
    retrieved = retrieve_frames(
        Q[None], K[None, :, :, None], integer(2), block_lengths=[integer(3)], redundancy=np.float32(0.5)
    )
    assert retrieved[0].shape == (2, 2)
    with pytest.raises(TypeError, match="top_k must be an int, got bool"):
        memory_attention(**valid(top_k=np.bool_(True)))
    with pytest.raises(TypeError, match="top_k must be an int, got float64"):
        memory_attention(**valid(top_k=np.float64(2)))


Q, K = X(2, 6, 4, 8), X(2, 12, 2, 8)
OUT, LSE = X(2, 6, 4, 8), X(2, 4, 6)


def resumed(state):
    return attend_selected(Q, K, K, INT(2, 4, 2, 2), block_size=4, query_group=3, resume=state)


OTHERS = {
    "describe-block-size": (lambda: describe_blocks(K, -4), ValueError, "block_size must be at least 1, got -4"),
    "describe-frames": (lambda: describe_blocks(K, 4, 5), ValueError, "whole frames of 5 tokens"),
    "select-blocks-per-frame": (
        lambda: select_blocks(Q, K, 2, blocks_per_frame=5), ValueError, "whole frames of 5 blocks, got 12",
    ),
    "select-top-k": (lambda: select_blocks(Q, K, 0), ValueError, "top_k must be at least 1"),
    "select-heads": (lambda: select_blocks(Q, X(2, 12, 3, 8), 2), ValueError, "multiple"),
    "attend-indices-shape": (
        lambda: attend_selected(Q, K, K, INT(2, 4, 3, 2), block_size=4, query_group=3), ValueError,
        r"indices must have shape \(2, 4, 2, any\), got \(2, 4, 3, 2\)",
    ),
    "attend-indices-dtype": (
        lambda: attend_selected(Q, K, K, INT(2, 4, 2, 2).long(), block_size=4, query_group=3), TypeError, "int32",
    ),
    "attend-resume-shape": (
        lambda: resumed((OUT[:, 1:], LSE[..., 1:])),
        ValueError, "resume's out must have shape",
    ),
    "attend-resume-half": (lambda: resumed((OUT, None)), TypeError, "LSE of resume must be"),
    "attend-resume-alone": (lambda: resumed(OUT), TypeError, "resume must be a pair"),
    "attend-resume-lse-dtype": (
        lambda: resumed((OUT, LSE.half())),
        TypeError, "LSE of resume must be a torch.float32 tensor, got torch.float16",
    ),
    "merge-lse-shape": (
        lambda: merge_states(OUT, LSE.transpose(1, 2), OUT, LSE), ValueError, r"LSE of a must have .* \(2, 4, 6\)",
    ),
    "merge-shapes": (lambda: merge_states(OUT, LSE, OUT[:1], LSE[:1]), ValueError, "out_b must have shape"),
    "relevance-score": (
        lambda: frame_relevance(Q, K.unsqueeze(1), score="cosine"), ValueError, "one of linear, softmax",
    ),
    "relevance-dims": (lambda: frame_relevance(Q, K), ValueError, "frame_keys must have 5 dimensions"),
    "relevance-lengths": (
        lambda: frame_relevance(Q, K.unsqueeze(1), block_lengths=[3]), ValueError, "the 12 blocks of a frame",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_ops_refuse(name):
    call, error, message = OTHERS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": "cosine"}, ValueError, "score must be one of linear, softmax, coverage, got 'cosine'"),
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"redundancy": 2.0}, ValueError, "redundancy is a cosine, -1 to 1, or None, got 2.0"),
        ({"redundancy": 0.5, "score": "coverage"}, ValueError, "coverage has no redundancy limit"),
        ({"means": torch.zeros(3, 2, 9, 1, 2, 8)}, ValueError, "means must have the 2 layers of text_keys, got 3"),
        ({"means": torch.zeros(2, 2, 0, 1, 2, 8)}, ValueError, "nothing must be empty"),
        ({"means": torch.zeros(2, 2, 9, 1, 3, 8)}, ValueError, "2 heads of q must be a multiple of the heads of means"),
        ({"candidates": torch.zeros(2, 3)}, TypeError, "candidates must be int32, got torch.float32"),
        ({"candidates": torch.zeros(2, 0, dtype=torch.int32)}, ValueError, "candidates must name a frame at least"),
        ({"block_lengths": [1, 2]}, ValueError, "block_lengths must name the 1 blocks of a frame, got 2"),
        ({"text_lengths": torch.ones(3, dtype=torch.int32)}, ValueError, r"text_lengths must have shape \(2\)"),
    ],
)
def test_retrieve_frames_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        retrieve_frames(**{**retrieval_cases.make_case(), "count": 2, **changes})


def write_with(**changes) -> None:
    case = cache_write_cases.make_case(batch=2, moved=5, options={"block_size": 5}).to(torch.float32)
    case.mean_frames = 1
    arguments = dict(
        q=case.q, k=case.k, v=case.v, rotation=case.rotation, places=case.places, frame_tokens=case.frame_tokens,
        norm=case.norm, memory_rotation=case.memory_rotation, **case.outputs(), **case.options,
    )  # fmt: skip
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    before = {name: arguments[name].clone() for name in ("memory_k", "memory_v") if name not in changes}
    try:
        write_projections(**arguments)
    finally:
        assert all(torch.equal(arguments[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda q: q[:, 1:], ValueError, r"whole frames of 12 tokens and an even head size, got \(2, 23, 2, 16\)"),
        ("k", lambda k: k[:, :12], ValueError, r"k must have shape \(2, 24, 2, 16\), got \(2, 12, 2, 16\)"),
        ("v", lambda v: v.double(), TypeError, "v must have the dtype of q, torch.float32, got torch.float64"),
        ("memory_v", lambda x: x[:, :12], ValueError, r"memory_v must have shape \(2, 60, 2, 16\)"),
        ("memory_k", lambda x: x[:, :50], ValueError, "memory_k must hold whole frames of 12 tokens"),
        ("places", lambda x: x.long(), TypeError, "places must be int32, got torch.int64"),
        ("places", lambda x: x[:, :1], ValueError, r"places must have shape \(2, 2\), got \(2, 1\)"),
        ("rotation", lambda r: (r[0].double(), r[1]), TypeError, "cosines of rotation must be a float32 tensor"),
        ("rotation", lambda r: (r[0], r[1][:, 1:]), ValueError, r"sines of rotation must have shape \(1 or 2, 24, 1"),
        ("memory_rotation", lambda _: None, ValueError, "memory_rotation and memory_q must be given together"),
        ("memory_rotation", lambda r: (r[0][:, 1:], r[1]), ValueError, "cosines of memory_rotation must have shape"),
        ("memory_q", lambda x: x[:, :12], ValueError, r"memory_q must have shape \(2, 24, 2, 16\)"),
        (
            "norm",
            lambda n: n._replace(weight_k=n.weight_k[1:]),
            ValueError,
            r"weight_k of norm must have shape \(32,\)",
        ),
        ("descriptors", lambda x: x[:, 1:], ValueError, r"descriptors must have shape \(2, 15, 2, 16\)"),
        ("means", lambda x: x.repeat(1, 3, 1, 1, 1), ValueError, "means must be of 1 to 2 frames"),
        ("block_size", lambda n: 0, ValueError, "block_size must be at least 1, got 0"),
    ],
)
def test_write_projections_refuses_before_anything_is_written(name, change, error, message):
    with pytest.raises(error, match=message):
        write_with(**{name: change})


def test_write_projections_refuses_gradients():
    with pytest.raises(NotImplementedError, match="no backward"):
        write_with(q=lambda q: q.requires_grad_())
