"""What a streaming model keeps of its past, how it chooses from it, and how a chunk attends to it."""

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import ReleasedLayout

__all__ = ["CacheLayout", "FrameCache", "ReleasedCache", "ReleasedLayout"]
