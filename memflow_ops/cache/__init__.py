"""What a streaming model keeps of its past, how it chooses from it, and how a chunk attends to it.

A cache (`FrameCache`, or `ReleasedCache` for what the authors' checkpoints were tuned with) is made of a layout, which
states every size and its cost in bytes. A policy (`Relevance`, `Coverage`, `Random`, or any class with `choose`)
chooses the bank of a chunk, and `attend_to_memory` makes the `Attend` that a model is called with.
"""

from memflow_ops.cache.attend import Attend, AttendProjections, BlockSelection, attend_to_memory
from memflow_ops.cache.chosen import ChosenBlocks
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Coverage, DeviceChoice, DevicePolicy, Policy, Random, Relevance, Retrieved
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import BankSchedule, ReleasedLayout
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.cache.views import Candidates, Memory

__all__ = [
    "Attend",
    "AttendProjections",
    "BankSchedule",
    "BlockSelection",
    "CacheLayout",
    "Candidates",
    "ChosenBlocks",
    "Coverage",
    "DeviceChoice",
    "DevicePolicy",
    "FrameCache",
    "HistoryFolder",
    "Memory",
    "Policy",
    "Random",
    "ReleasedCache",
    "ReleasedLayout",
    "Relevance",
    "Retrieved",
    "RingCache",
    "attend_to_memory",
]
