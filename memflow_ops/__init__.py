"""Long memory for streaming video generation: top-k block-sparse memory attention, frame cache and retrieval.

Importing this package needs torch alone: kernels are imported on first use.
"""

from memflow_ops.ops.attention import attend_selected, memory_attention, merge_states
from memflow_ops.ops.cache_write import Int8Memory, QKNorm, quantise_memory, write_projections
from memflow_ops.ops.retrieval import frame_relevance, retrieve_frames
from memflow_ops.ops.selection import describe_blocks, select_blocks
from memflow_ops.version import __version__

__all__ = [
    "Int8Memory",
    "QKNorm",
    "__version__",
    "attend_selected",
    "describe_blocks",
    "frame_relevance",
    "memory_attention",
    "merge_states",
    "quantise_memory",
    "retrieve_frames",
    "select_blocks",
    "write_projections",
]
