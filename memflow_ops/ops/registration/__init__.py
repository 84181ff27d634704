"""Every operator as torch sees it: schema, fake implementation and autograd formula, and nothing else.

The public functions in memflow_ops/ops/ check their arguments and then call these; an operator runs the
implementation whose name it is given.
"""

from memflow_ops.ops.registration.attention import attend_backward, attend_selected, memory_attention, merge_states
from memflow_ops.ops.registration.cache_write import write_frames, write_projections
from memflow_ops.ops.registration.copies import attend_with_copies, copy_selected
from memflow_ops.ops.registration.retrieval import frame_relevance, retrieve_frames
from memflow_ops.ops.registration.selection import describe_blocks, select_blocks

__all__ = [
    "attend_backward",
    "attend_selected",
    "attend_with_copies",
    "copy_selected",
    "describe_blocks",
    "frame_relevance",
    "memory_attention",
    "merge_states",
    "retrieve_frames",
    "select_blocks",
    "write_frames",
    "write_projections",
]
