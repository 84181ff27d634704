"""For test_stand_in.py, in a process of its own: what the stand-in does to torch holds until its process ends.

    python stand_in_program.py

Prints JSON, one entry for each thing that was looked at.
"""

import json

import torch
import triton
from torch.nn.attention.flex_attention import flex_attention

from memflow_ops.bench.stand_in import gpu
from memflow_ops.bench.stand_in.launches import Recorder, compile_kernel

gpu.install(gpu.H100)
recorder = Recorder(gpu.H100)
recorder.start()

import memflow_ops  # noqa: E402 - after the stand-in is in place, as in a test
from memflow_ops.kernels.launch import run_all  # noqa: E402
from memflow_ops.kernels.selection.describe import plan_block_means  # noqa: E402


def devices():
    x = torch.zeros(4, 6, device="cuda", dtype=torch.bfloat16)
    host = x[1:].cpu()
    return {
        "made": str(x.device),
        "like it": str(torch.empty_like(x[:, 2:]).device),
        "copied to the host": str((host + torch.ones(3, 1)).device),
        "moved back": str(host.cuda().device),
        "address of an odd place": x[:, 1:].data_ptr() % 16,
        "read": [x.float().sum().item(), bool((x == 0).all()), host.to(torch.int32).tolist()[0][:2]],
        "masked": list(x[x > 0].shape),
        "memory of the process": torch.empty(2**40, device="cuda").numel(),
    }


def layer():
    make = lambda tokens: torch.randn(1, tokens, 2, 64, device="cuda").bfloat16().requires_grad_()  # noqa: E731
    q, k, memory = make(300), make(200), make(3 * 100)
    recorder.now = "a layer"
    out = memflow_ops.memory_attention(q, k, k, memory, memory, frame_tokens=100, dense_backend="own")
    torch.autograd.grad(out.sum(), (q, memory))
    kernels = {recorder.kernels[key].name for key in recorder.launched["a layer"]}
    return {"kernels": sorted(kernels), "shape": list(out.shape), "launches": recorder.launches}


def shapes():
    q = torch.randn(1, 2, 128, 64, device="cuda")
    means = torch.randn(1, 5, 1, 2, 64, device="cuda")
    return {
        "FlexAttention": list(flex_attention(q, q, q).shape),
        "relevance": list(memflow_ops.frame_relevance(q.transpose(1, 2), means).shape),
    }


def planned():
    return plan_block_means(torch.randn(1, 128, 2, 32, device="cuda").bfloat16(), 32, 64, torch.bfloat16)[0]


def host_tensor():
    launch = plan_block_means(torch.randn(1, 128, 2, 32).bfloat16(), 32, 64, torch.bfloat16)[0]
    try:
        launch.run()
    except ValueError as error:
        return str(error)
    return ""


def cache():
    """Whether the just-in-time compiler finds what was compiled from the recording, and what another shape does."""
    recorder.now = "means"
    launch = planned()
    run_all([launch])
    (key,) = recorder.launched["means"]
    first, second = (compile_kernel(recorder.kernels[key]) for _ in range(2))
    found = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    triton.knobs.runtime.jit_cache_hook = None
    for changed in ({}, {"num_warps": 2}):
        options = {**launch.compiler_options, **changed}
        launch.kernel.warmup(**launch.arguments, **options, grid=launch.grid)
    return {"errors": [first.error, second.error], "known": [first.known, second.known], "found": found}


seen = {"devices": devices(), "shapes": shapes(), "layer": layer(), "host tensor": host_tensor(), "cache": cache()}
print(json.dumps(seen))
