"""A window that the kernels read from a pool, on a real GPU: the bits of one in one piece, no copy, in CUDA graphs."""

import pytest
import torch

import memflow_ops as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PAGE, SLOTS = 150, [[6, 0, 3], [2, 5, 1]]


def made(dtype, queries: int = 300):
    """Queries, a pool of 7 frames, and which tokens of it the window has."""
    q = torch.randn(2, queries, 4, 64, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, 7 * PAGE, 2, 64, device="cuda", dtype=dtype).unbind()
    slots = torch.tensor(SLOTS, device="cuda", dtype=torch.int32)
    tokens = (slots.long().unsqueeze(-1) * PAGE + torch.arange(PAGE, device="cuda")).flatten(1)
    return q, k, v, slots, lambda pool: pool[torch.arange(2, device="cuda")[:, None], tokens]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_lse_and_gradients_have_the_bits_of_a_window_in_one_piece(dtype, causal):
    q, k, v, slots, window_of = made(dtype)
    options = dict(causal=causal, seqused_k=torch.tensor([430, 301], device="cuda", dtype=torch.int32))
    results = []
    for table, keys, values in ((slots, k, v), (None, window_of(k), window_of(v))):
        leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
        out, lse = ops.memory_attention(
            *leaves,
            window_slots=table,
            frame_tokens=PAGE,
            return_lse=True,
            impl="triton",
            dense_backend="own",
            **options,
        )
        loss = out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    paged, whole = results
    assert all(map(torch.equal, paged[:3], whole[:3]))
    assert all(torch.equal(window_of(ours), right) for ours, right in zip(paged[3:], whole[3:], strict=True))


def test_a_graph_follows_the_table_and_nothing_waits_or_is_copied():
    q, k, v, slots, window_of = made(torch.bfloat16, 16)  # so that the window is larger than the result

    def run():
        return ops.memory_attention(q, k, v, window_slots=slots, frame_tokens=PAGE, impl="triton")

    with torch.no_grad():
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before < window_of(k).nbytes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        slots.copy_(slots.flip(0))
        graph.replay()
        torch.testing.assert_close(out, run(), rtol=0, atol=0)
