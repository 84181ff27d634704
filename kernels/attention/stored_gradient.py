"""The gradient of a pool of frames from that of a window whose frames lie in it, by a slot table.

A frame may be in the window more than once, so no program of backward_keys.py can write the gradient of its keys to
their place in the pool: another one might write there too. Instead a program here belongs to a part of a stored frame
and adds up what the window has for it, in order: runs are equal bit for bit, and frames that are not in the window get
zeros.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.attention.blocks import Frames
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import cast


# Bytes: the gradient of the window once, that of the pool once; bound by memory.
@triton.jit
def stored_gradient_kernel(
    of_window,  # (B, W * frame_tokens, Hkv, D), contiguous
    of_stored,  # (B, stored frames * frame_tokens, Hkv, D), contiguous
    frames,  # Frames
    elements,  # of a frame
    BLOCK: tl.constexpr,
):
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    batch = tl.program_id(2).to(tl.int64)
    slots = frames.slots + batch * frames.slot_stride
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(frames.count):
        slot = tl.minimum(tl.maximum(tl.load(slots + number), 0), frames.stored - 1)
        if slot == tl.program_id(0):
            source = of_window + (batch * frames.count + number) * elements
            total += tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    target = of_stored + (batch * frames.stored + tl.program_id(0)) * elements
    tl.store(target + place, cast(total, of_stored.dtype.element_ty), mask=inside)


def plan_stored_gradient(of_window: torch.Tensor, frames: Frames) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the gradient of the stored frames (B, stored frames * frame_tokens, Hkv, D), and that.

    of_window (B, W * frame_tokens, Hkv, D), contiguous: the gradient of the window. It is rounded to its dtype before
    it is summed here, which only shows where a frame is in the window twice.
    """
    batch, _, heads, head_dim = of_window.shape
    shape = (batch, frames.stored * frames.tokens, heads, head_dim)
    of_stored = torch.empty(shape, dtype=of_window.dtype, device=of_window.device)
    elements = frames.tokens * heads * head_dim
    block = min(4096, triton.next_power_of_2(elements))
    arguments = dict(of_window=of_window, of_stored=of_stored, frames=frames, elements=elements, BLOCK=block)
    grid = (frames.stored, triton.cdiv(elements, block), batch)
    return Launch(stored_gradient_kernel, grid, arguments, dict(num_warps=4, num_stages=2)), of_stored
