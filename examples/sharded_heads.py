"""The attention op in a model whose heads are dealt out to several processes, with torch's DTensor.

Run it with `torchrun --nproc-per-node 2 examples/sharded_heads.py`, or with python alone for one process. A head
chooses its blocks by itself, so a process that has some heads needs nothing of the others. A model that shards its
heads without DTensor, as most inference engines do, calls the op on its own heads and needs none of this.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

from memflow_ops import describe_blocks, memory_attention

FRAME_TOKENS, BLOCK_SIZE = 96, 32
HEADS = [Shard(2)]  # tensors are (batch, tokens, heads, head_dim)


def attend(mesh: DeviceMesh, *tensors: Tensor) -> DTensor:
    """q, k, v, the bank's keys and values, and their descriptors, as DTensors whose heads are dealt out."""
    options = {"top_k": 8, "block_size": BLOCK_SIZE, "frame_tokens": FRAME_TOKENS, "query_group": FRAME_TOKENS}

    def of_own_heads(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, descriptors: Tensor) -> Tensor:
        return memory_attention(q, k, v, keys, values, memory_descriptors=descriptors, **options)

    split = local_map(of_own_heads, out_placements=HEADS, in_placements=(HEADS,) * 6, device_mesh=mesh)
    return split(*tensors)


def main() -> tuple[Tensor, Tensor]:
    own_group = not dist.is_initialized()
    if own_group and "RANK" in os.environ:  # torchrun has started this process
        dist.init_process_group("gloo")
    elif own_group:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    torch.manual_seed(0)  # all processes make the same tensors; a model would have made each head where it belongs
    q, k, v = torch.randn(3, 1, 3 * FRAME_TOKENS, 4, 64)
    keys, values = torch.randn(2, 1, 20 * FRAME_TOKENS, 4, 64)
    whole = q, k, v, keys, values, describe_blocks(keys, BLOCK_SIZE, FRAME_TOKENS)
    out = attend(mesh, *(distribute_tensor(x, mesh, HEADS) for x in whole))

    print(f"process {dist.get_rank()} attended with {out.to_local().shape[2]} of {out.shape[2]} heads")
    gathered = out.full_tensor()
    want = memory_attention(
        *whole[:5],
        memory_descriptors=whole[5],
        top_k=8,
        block_size=BLOCK_SIZE,
        frame_tokens=FRAME_TOKENS,
        query_group=FRAME_TOKENS,
    )
    if own_group:
        dist.destroy_process_group()
    return gathered, want


if __name__ == "__main__":
    got, expected = main()
    print(f"largest difference from the op over all heads in one process: {(got - expected).abs().max():.1e}")
