"""Shapes beyond the shipped ones that people will use, compiled once, for sm_90: they meet the same conditions.

Every head size with every block size and every query group, over the bank alone and over window and bank; heads in
groups, a causal window and the backward pass take turns, so that each meets every value of the others.
"""

from functools import partial
from itertools import product
from typing import Any

from memflow_ops.bench.aot.shipped import Plan, backward, memory_attention

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
QUERY_GROUPS = (1, 16, 64, 120, 128)


def swept() -> dict[str, Plan]:
    """The name of each shape, and a function that plans its launches for a compute capability."""
    plans: dict[str, Plan] = {}
    shapes = product(HEAD_DIMS, BLOCK_SIZES, QUERY_GROUPS, (False, True))
    for number, (head_dim, block_size, query_group, dense) in enumerate(shapes):
        heads = (12, 4) if number % 3 == 0 else (12, 12)
        causal = dense and number % 4 == 1
        name = f"shape: {head_dim} dims, blocks of {block_size}, groups of {query_group}"
        name += (", window" if dense else "") + (", causal" if causal else "") + (", 12 on 4" if heads[1] == 4 else "")
        options: dict[str, Any] = dict(head_dim=head_dim, block_size=block_size, query_group=query_group, heads=heads)
        plans[name] = partial(memory_attention, dense=dense, causal=causal, **options)
        if number % 3 == 1:
            plans[f"{name}, backward"] = partial(backward, dense=dense, causal=causal, **options)
    for query_group in QUERY_GROUPS:
        name = f"shape: groups of {query_group}, a window of one key"
        plans[name] = partial(memory_attention, dense=True, window_tokens=1, query_group=query_group)
    return plans
