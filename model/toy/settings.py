"""Settings with which the toy world was trained and streams."""

from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.world import FRAME_SIZE

TOY_SETTINGS = StreamSettings(
    height=FRAME_SIZE,
    width=FRAME_SIZE,
    top_k=8,
    block_size=16,
    # Two rows of tokens bring a character back better than the whole chunk, although training selects for the chunk.
    query_group=16,
    relevance="coverage",
    # Frames of one character are so alike that any threshold would keep one of them and fill the bank with others.
    redundancy=None,
    # The weights cannot tell a window that was re-cached under a new character's prompt from one that shows it: with
    # re-caching, every new character takes the colour of the one before.
    recache=False,
    steps=16,
    shift=7.0,
    stochastic=True,
)
