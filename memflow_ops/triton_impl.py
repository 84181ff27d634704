"""`impl="triton"`: our kernels, imported when first used."""

from memflow_ops.kernels.attend import attend, select_and_attend
from memflow_ops.kernels.backward import attend_backward
from memflow_ops.kernels.describe import describe_blocks
from memflow_ops.kernels.retrieve import retrieve_frames
from memflow_ops.kernels.select import select_blocks
from memflow_ops.kernels.write import write_projections

__all__ = [
    "attend",
    "attend_backward",
    "describe_blocks",
    "retrieve_frames",
    "select_and_attend",
    "select_blocks",
    "write_projections",
]
