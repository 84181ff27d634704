"""How the few-step checkpoints of the Wan 2.1 family are streamed unless a command says otherwise."""

from dataclasses import replace
from typing import Any

from memflow_ops.model.streaming.settings import StreamSettings

FRAMES_PER_SECOND = 16
"""Of the video."""
FRAMES_PER_PROMPT = 40
"""Latent frames under one prompt: 10 seconds, as MemFlow and LongLive train."""
WAN_SETTINGS = StreamSettings(
    height=60,  # with width: the latents of 480 x 832 pixels
    width=104,
    window_frames=9,
    bank_frames=64,
    device_frames=128,
    top_k=24,
    block_size=64,
    query_group=128,
    steps=4,
    shift=5.0,
    stochastic=True,
)
RELEASED_BANK_FRAMES = 3
"""Frames in the bank of memory="released", which the authors' checkpoints were tuned with."""


def wan_settings(memory: str, **changes: Any) -> StreamSettings:
    """`WAN_SETTINGS` for a kind of memory, with these changes, and with room on the device for the bank and a window;
    `fit_history` sets how much of the history the device really holds."""
    bank_frames = RELEASED_BANK_FRAMES if memory == "released" else WAN_SETTINGS.bank_frames
    changes = {"bank_frames": bank_frames, **changes, "memory": memory}
    room = max(WAN_SETTINGS.device_frames, changes["bank_frames"] + WAN_SETTINGS.window_frames)
    return replace(WAN_SETTINGS, **changes, device_frames=room)
