"""Settings with which the toy world was trained and streams."""

from memflow_ops.model.streaming.settings import StreamSettings

TOY_SETTINGS = StreamSettings(recache=False, relevance="coverage", top_k=8, steps=16, stochastic=True)
