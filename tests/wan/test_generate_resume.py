"""`memflow generate --resume` on a small random pipeline."""

import json
from contextlib import contextmanager

import pytest
from command_line import memflow
from safetensors.torch import load_file, save_file

from memflow_ops.model.pipeline import budget, generate, plan
from memflow_ops.model.stories.video import read_video
from memflow_ops.model.streaming.streamer import Streamer

STORIES = [["A ball in the meadow", "the sea at night", "the ball returns"], ["a box", "a star", "the box at night"]]
CHUNKS = 9
SMALL = ("--height", 32, "--width", 48, "--frames-per-prompt", 9, "--steps", 1, "--device", "cpu")
TIMES = {"date", "speed", "latency"}
TIMES_OF_A_CHUNK = {"seconds", "decode_seconds"}


@pytest.fixture
def command(tmp_path, pipeline):
    path = tmp_path / "story.jsonl"
    path.write_text("".join(json.dumps({"prompts": prompts}) + "\n" for prompts in STORIES))
    sources = [word for option in ("--checkpoint", "--text-encoder", "--vae") for word in (option, pipeline)]
    folders = lambda name: ("--out", tmp_path / name, "--history-dir", tmp_path / f"{name}-history")  # noqa: E731
    tiers = ("--bank-frames", 2, "--top-k", 3, "--device-frames", 4, "--host-frames", 1)
    return lambda name, *more: ("generate", path, *sources, *SMALL, *tiers, *folders(name), *more)


def without_times(record):
    kept = {name: value for name, value in record.items() if name not in TIMES}
    kept["chunks"] = [{k: v for k, v in chunk.items() if k not in TIMES_OF_A_CHUNK} for chunk in record["chunks"]]
    kept["memory"] = [line for line in record["memory"] if "free" not in line and "Memory on" not in line]
    return kept


@pytest.mark.parametrize("batch", [1, 2])
def test_stopped_in_any_way_it_comes_to_the_same_files(tmp_path, command, monkeypatch, capfd, batch):
    """Ctrl-C in the passes, Ctrl-C in the VAE, and an error, each in the middle of a chunk."""
    assert memflow(*command("whole", "--batch", batch)) == 0
    assert "on disk" in capfd.readouterr().out
    next_chunk, decode = Streamer.next_chunk, generate.StreamingDecoder.decode
    interrupted, gone = KeyboardInterrupt(), OSError("gone")
    ends = (("chunk", 3, interrupted), ("decode", 2 * batch, interrupted), ("chunk", 1, gone))
    for number, (what, after, error) in enumerate(ends):
        calls = 0

        def ending(original, *arguments, after=after, error=error):
            nonlocal calls
            calls += 1
            if calls > after:
                raise error
            return original(*arguments)

        with monkeypatch.context() as patched:
            if what == "chunk":
                patched.setattr(Streamer, "next_chunk", lambda *given: ending(next_chunk, *given))
            else:
                patched.setattr(generate.StreamingDecoder, "decode", lambda *given: ending(decode, *given))
            resume = ("--resume",) if number else ()
            code = memflow(*command("parts", "--batch", batch, "--snapshot-every", 2, *resume))
        assert code == (1 if isinstance(error, OSError) else 130)
        first = tmp_path / "parts" / "story-000"
        record = json.loads((first / "run.json").read_text())
        assert record["interrupted"] and len(read_video(first / "video.mp4")) == record["frames"]
    assert memflow(*command("parts", "--batch", batch, "--resume")) == 0
    for number in range(2):
        parts, whole = (tmp_path / name / f"story-{number:03d}" for name in ("parts", "whole"))
        assert sorted(path.name for path in parts.iterdir()) == ["run.json", "video.mp4"]
        assert (parts / "video.mp4").read_bytes() == (whole / "video.mp4").read_bytes()
        records = [json.loads((folder / "run.json").read_text()) for folder in (parts, whole)]
        assert without_times(records[0]) == without_times(records[1]) and len(records[0]["chunks"]) == CHUNKS
        settings = records[0]["settings"]
        assert (settings["device_frames"], settings["host_frames"], settings["disk_frames"]) == (4, 1, CHUNKS - 6)
    capfd.readouterr()
    assert memflow(*command("parts", "--batch", batch, "--resume")) == 0
    assert capfd.readouterr().out.count("is complete already") == 3 - batch
    # With the history of a run, but for another folder, it would leave nothing there.
    assert memflow(*command("parts", "--batch", batch, "--resume", "--out", tmp_path / "elsewhere")) == 2
    assert "elsewhere/story-000/video.mp4 is not there" in capfd.readouterr().err


def test_a_run_that_goes_on_divides_its_history_as_before(tmp_path, command, monkeypatch, capfd):
    """Whatever is free by then; and where that is too little, this is said."""
    next_chunk = Streamer.next_chunk

    def ending(streamer, *prompts):
        if streamer.cache.committed == 3:
            raise KeyboardInterrupt
        return next_chunk(streamer, *prompts)

    free = 60_000_000
    monkeypatch.setattr(budget, "free_bytes", lambda device: free)
    words = [*command("parts")]
    del words[words.index("--device-frames") : words.index("--host-frames") + 2]
    with monkeypatch.context() as patched:
        patched.setattr(Streamer, "next_chunk", ending)
        assert memflow(*words) == 130
    before = json.loads((tmp_path / "parts" / "story-000" / "run.json").read_text())["settings"]
    free = 50_000_000
    assert memflow(*words, "--resume") == 0
    after = json.loads((tmp_path / "parts" / "story-000" / "run.json").read_text())["settings"]
    assert before == after


def test_a_disk_that_is_too_small_is_refused_before_anything_is_loaded(tmp_path, command, monkeypatch, capfd):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: plan.shutil._ntuple_diskusage(10**9, 0, 1000))
    assert memflow(*command("out")) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "a history of 8 frames needs" in said and "1,000 bytes are free" in said
    assert not (tmp_path / "out").exists()


@contextmanager
def changed(file, name):
    """A file of weights with another number in one of them, until the end."""
    content = file.read_bytes()
    try:
        weights = load_file(file)
        weights[name] = weights[name] + 1
        save_file(weights, file, {"format": "pt"})
        yield
    finally:
        file.write_bytes(content)


def test_other_weights_and_other_tiers_are_refused(tmp_path, command, pipeline, monkeypatch, capfd):
    """Parts of the same names and sizes would make another video from the next chunk on."""
    next_chunk, fingerprint = Streamer.next_chunk, plan.Pretrained.fingerprint

    def ending(streamer, *prompts):
        if streamer.cache.committed == 3:
            raise KeyboardInterrupt
        return next_chunk(streamer, *prompts)

    with monkeypatch.context() as patched:
        patched.setattr(Streamer, "next_chunk", ending)
        assert memflow(*command("parts")) == 130

    def other(pretrained):
        pretrained.weights["head.head.bias"] = pretrained.weights["head.head.bias"] + 1
        return fingerprint(pretrained)

    capfd.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(plan.Pretrained, "fingerprint", other)
        assert memflow(*command("parts", "--resume")) == 2
    assert "holds another run: weights of the transformer '" in capfd.readouterr().err
    with changed(pipeline / "text_encoder" / "model.safetensors", "encoder.final_layer_norm.weight"):
        assert memflow(*command("parts", "--resume")) == 2
    said = capfd.readouterr().err
    assert "holds another run: weights of the text encoder '" in said and "VAE" not in said and said.count("\n") == 1
    with changed(pipeline / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"):
        assert memflow(*command("parts", "--resume")) == 2
    assert "holds another run: weights of the VAE '" in capfd.readouterr().err
    assert memflow(*command("parts", "--resume", "--history-frames", 5)) == 2
    assert "holds another run: history_frames None, here 5" in capfd.readouterr().err
    assert memflow(*command("parts", "--resume", "--host-frames", 0)) == 2
    assert "keeps 4 past frames on the device and 1 in host memory" in capfd.readouterr().err
    assert memflow(*command("parts", "--resume")) == 0
