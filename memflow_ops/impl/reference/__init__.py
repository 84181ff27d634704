"""`impl="reference"`: the specification, in short loops of plain torch. The tests compare everything with it.

It takes any floating dtype and device. Half precisions compute in float32; float64 stays float64 throughout.
"""

from memflow_ops.impl.reference.attention import attend, attend_backward
from memflow_ops.impl.reference.cache_write import write_projections
from memflow_ops.impl.reference.retrieval import retrieve_frames
from memflow_ops.impl.reference.selection import describe_blocks, select_blocks

__all__ = [
    "attend",
    "attend_backward",
    "describe_blocks",
    "retrieve_frames",
    "select_blocks",
    "write_projections",
]
