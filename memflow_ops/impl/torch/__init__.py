"""`impl="torch"`: vectorised, reads only what is selected; the default on a CPU and for float64."""

from memflow_ops.impl.torch.attention import attend
from memflow_ops.impl.torch.backward import attend_backward
from memflow_ops.impl.torch.cache_write import write_projections
from memflow_ops.impl.torch.retrieval import retrieve_frames
from memflow_ops.impl.torch.selection import describe_blocks, select_blocks

__all__ = [
    "attend",
    "attend_backward",
    "describe_blocks",
    "retrieve_frames",
    "select_blocks",
    "write_projections",
]
