"""`memflow serve` with a real checkpoint's parts, small and random: what is typed becomes video over a socket."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import memflow
from seen import video
from served import hear, serving, until

from memflow_ops.model.checkpoints.pretrained import read_pretrained
from memflow_ops.model.live.checkpoint import plan_wan, wan_world
from memflow_ops.model.live.session import Limits, LiveSession
from memflow_ops.model.pipeline.budget import FreeMemory
from memflow_ops.model.pipeline.plan import StreamOptions
from memflow_ops.model.pipeline.sources import Sources
from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.wan.text_encoder import UMT5TextEncoder
from memflow_ops.model.wan.vae import StreamingDecoder, load_vae

CPU = torch.device("cpu")
PROMPTS = ["A ball in the meadow"] * 2 + ["the sea at night"] * 2 + ["the ball returns"]


@pytest.fixture(scope="module")
def world(pipeline):
    sources, options = Sources(pipeline, pipeline, pipeline), StreamOptions()
    pretrained = sources.read()
    changes = {"bank_frames": 2, "top_k": 3, "query_group": 4, "steps": 2}
    free = FreeMemory.now(CPU)
    asked = dict(memory=None, height=32, width=48, chunks=20, baseline=True, text_device=CPU, options=options)
    budget = plan_wan(sources, pretrained, free, changes, sessions=3, **asked)
    names = [item.name for item in budget.other_items]
    assert {"text encoder", "streams without memory", "VAE's weights"} <= set(names) and budget.layout.batch == 3
    tight = FreeMemory(CPU, budget.device_bytes - free.bytes // 20, None)
    with pytest.raises(ValueError, match=r"needs"):
        plan_wan(sources, pretrained, tight, changes, sessions=40, **asked)
    bounded = plan_wan(sources, replace(pretrained, positions="bounded"), free, changes, sessions=1, **asked)
    assert (budget.settings.positions, bounded.settings.positions) == ("absolute", "bounded")
    return wan_world(sources, pretrained, budget.settings, CPU, CPU, options)


def test_its_video_is_that_of_the_stream(world, pipeline):
    live = LiveSession(world, Limits(), PROMPTS[0], 5, baseline=True)
    for prompt in PROMPTS:
        live.set_prompt(prompt)
        live.make_chunk()
    assert [row["video_seconds"] for row in live.rows] == [9 / 16, *[12 / 16] * 4]
    assert [row["video_start"] for row in live.rows] == [0, 9 / 16, 21 / 16, 33 / 16, 45 / 16]
    shown = video(b"".join(live.video()))
    model = read_pretrained(pipeline).build()
    streamer = Streamer(model, 1, world.settings, 5, encode=UMT5TextEncoder.from_folder(pipeline))
    decoder = StreamingDecoder(load_vae(pipeline))
    chunks = [streamer.next_chunk([prompt]) for prompt in PROMPTS]
    whole = np.concatenate([to_pixels(decoder.decode(chunk.frames)[0]) for chunk in chunks])
    luma = np.array([0.2126, 0.7152, 0.0722])
    assert shown.shape == (57, 32, 96, 3) and (whole @ luma).std() > 5
    assert np.abs(shown[:, :, :48] @ luma - whole @ luma).mean() < 3
    assert [row["retrieved"] for row in live.rows] == [chunk.retrieved[0] for chunk in chunks]
    assert all(live.picture(frame) for row in live.rows for frame in row["candidates"])
    child = live.fork("the sea at night")  # takes the decoder's past with it
    child.make_chunk()
    live.set_prompt("the sea at night")
    live.make_chunk()
    assert b"".join(child.video()) == b"".join(live.video())
    child.close()
    live.close()


def test_any_text_may_be_typed(world):
    with serving(world, sessions=1) as served, served.page() as ws:
        hear(ws, "chunk")
        ws.send('{"type": "prompt", "prompt": "Ein Drache \\u2014 \\ud83d\\udc09 über dem Meer"}')
        live = next(iter(served.engine._sessions.values()))
        until(lambda: live.rows[-1]["prompt"].startswith("Ein Drache"))
        assert served.engine.failed == 0


def test_options_that_belong_to_the_other_world_are_refused(pipeline, capfd):
    for words, said in (
        (("--dtype", "float32"), "--dtype would change nothing without --checkpoint"),
        (("--checkpoint", pipeline), "--checkpoint needs --text-encoder and --vae"),
        (("--checkpoint", pipeline, "--weights", "toy"), "--weights would change nothing with --checkpoint"),
        (("--memory", "none", "--top-k", 3), "--top-k would change nothing with --memory none"),
    ):
        assert memflow("serve", *words) == 2
        assert said in capfd.readouterr().err


def test_the_command_counts_memory_loads_and_serves(pipeline, monkeypatch, capfd):
    class Nobody:
        def run(self, sockets):
            assert sockets[0].getsockname()[0] == "127.0.0.1"
            raise KeyboardInterrupt

    served = []
    monkeypatch.setattr("memflow_ops.model.live.server.serve", lambda engine, *_: served.append(engine) or Nobody())
    parts = ("--checkpoint", pipeline, "--text-encoder", pipeline, "--vae", pipeline, "--device", "cpu")
    options = ("--height", 32, "--width", 48, "--chunks", 10, "--sessions", 2, "--history-frames", 5, "--port", 0)
    assert memflow("serve", *parts, *options) == 0
    said = capfd.readouterr().out
    for words in ("text encoder", "2 sessions", "streams at http://127.0.0.1:", "stopped"):
        assert words in said, words
    (engine,) = served
    assert (engine.world.height, engine.world.width, engine.limits.chunks) == (32, 48, 10)
