"""Weights that are dealt out to the ranks, for a model that does not fit on one device."""

from typing import cast

import torch
from torch import nn

from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.model.wan.transformer import Block, CausalVideoModel


def shard_weights(model: CausalVideoModel, ranks: Ranks) -> None:
    """Leaves every rank its part of each block's weights, on its device (FSDP2). A block's weights are gathered when it
    runs and freed after it. What is not in a block (embeddings and head, about 1 % of a large model) stays whole.

    The model may come from host memory: its blocks go to the device one by one. It must be the same on all ranks.
    """
    # Imported here, because it takes most of a second that no other command needs.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    for block in cast("list[Block]", model.blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for method in ("encode_text", "write_keys"):  # They are called without the block's forward.
            register_fsdp_forward_method(block, method)
    for name, part in model.named_children():
        if name != "blocks":
            part.to(ranks.device)


def weight_bytes(model: nn.Module) -> int:
    """The bytes of the weights that this rank keeps."""
    whole_or_part = (getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in model.parameters())
    with torch.no_grad():
        return sum(part.numel() * part.element_size() for part in whole_or_part)
