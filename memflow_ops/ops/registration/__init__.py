"""Every operator as torch sees it: schema, fake implementation and autograd formula, and nothing else.

The public functions in memflow_ops/ops/ check their arguments and then call these; an operator runs the
implementation whose name it is given.
"""

from memflow_ops.ops.registration import attention, retrieval, selection
from memflow_ops.ops.registration.attention import attend_backward, merge_states
from memflow_ops.ops.registration.cache_write import write_frames, write_projections
from memflow_ops.ops.registration.copies import attend_with_copies, copy_selected
from memflow_ops.ops.registration.dispatch import directly
from memflow_ops.ops.registration.retrieval import frame_relevance

attend_selected = directly(attention.attend_selected)
memory_attention = directly(attention.memory_attention)
describe_blocks = directly(selection.describe_blocks)
select_blocks = directly(selection.select_blocks)
retrieve_frames = directly(retrieval.retrieve_frames)

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
