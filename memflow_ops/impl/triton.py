"""`impl="triton"`: our kernels. Triton is imported with this module and nowhere before it."""

from memflow_ops.kernels.attention.backward import attend_backward
from memflow_ops.kernels.attention.plan import attend
from memflow_ops.kernels.cache_write import write_projections
from memflow_ops.kernels.retrieval.choose import retrieve_frames
from memflow_ops.kernels.selection.describe import describe_blocks
from memflow_ops.kernels.selection.groups import select_blocks

__all__ = [
    "attend",
    "attend_backward",
    "describe_blocks",
    "retrieve_frames",
    "select_blocks",
    "write_projections",
]
