"""Settings with which the public Wan 2.1 checkpoints stream."""

from typing import Any

from memflow_ops.model.streaming.settings import StreamSettings

FRAMES_PER_SECOND = 16
FRAMES_PER_PROMPT = 40
WAN_SETTINGS = StreamSettings(
    height=60, width=104, window_frames=9, bank_frames=64, device_frames=128, top_k=24, block_size=64, query_group=128,
    steps=4, shift=5.0, stochastic=True,
)  # fmt: skip
OF_A_KIND: dict[str, dict[str, Any]] = {"released": {"bank_frames": 3}}
