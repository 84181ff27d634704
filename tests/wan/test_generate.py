"""`memflow generate`, `convert` and `verify` on a small random pipeline, all of it through files on disk."""

import json

import av
import numpy as np
import pytest
import torch
import torch._inductor.config
from command_line import memflow
from matplotlib.image import imread

from memflow_ops.cli import main
from memflow_ops.model.checkpoints.pretrained import read_pretrained
from memflow_ops.model.pipeline import budget, generate, plan
from memflow_ops.model.pipeline.settings import WAN_SETTINGS
from memflow_ops.model.pipeline.verify import MEMORIES, SAME
from memflow_ops.model.stories.video import read_video, to_pixels
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.wan.text_encoder import UMT5TextEncoder
from memflow_ops.model.wan.vae import load_vae

STORY = ["A ball in the meadow", "the sea at night", "the ball returns"]
CHUNKS, LATENTS, FRAMES = 6, 18, 69
SMALL = ("--height", 32, "--width", 48, "--frames-per-prompt", 6, "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pipeline):
    """The transformer in the original layout, as Self-Forcing's training saves it."""
    weights = read_pretrained(pipeline).weights
    path = tmp_path_factory.mktemp("wan") / "w.pt"
    torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in weights.items()}, "step": 7}, path)
    return path


@pytest.fixture(scope="module")
def parts(checkpoint, pipeline):
    return ("--checkpoint", checkpoint, "--num-heads", 2, "--text-encoder", pipeline, "--vae", pipeline)


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.jsonl"
    path.write_text(json.dumps({"prompts": STORY}) + "\n")
    return path


def test_generate_streams_an_mp4(tmp_path, checkpoint, pipeline, parts, story, capfd):
    out = tmp_path / "out"
    options = ("--seed", 5, "--bank-frames", 2, "--top-k", 3, "--query-group", 4)
    assert memflow("generate", story, "--out", out, *parts, *SMALL, *options) == 0
    assert sorted(path.name for path in out.iterdir()) == ["run.json", "video.mp4"]
    with av.open(str(out / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (16, 48, 32)
    video = read_video(out / "video.mp4")
    assert len(video) == FRAMES

    # The same by hand, decoded all at once.
    settings = StreamSettings(
        **{**vars(WAN_SETTINGS), "height": 4, "width": 6, "bank_frames": 2, "top_k": 3, "query_group": 4}
    )
    encode, vae = UMT5TextEncoder.from_folder(pipeline), load_vae(pipeline)
    model = read_pretrained(checkpoint, num_heads=2).build()
    streamer = Streamer(model, 1, settings, 5, encode=encode)
    chunks = [streamer.next_chunk([STORY[i // 2]]) for i in range(CHUNKS)]
    latents = torch.cat([chunk.frames for chunk in chunks], 2)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        whole = to_pixels(vae.decode(latents * std + mean).sample[0])
    luma = np.array([0.2126, 0.7152, 0.0722])  # the video keeps only a quarter of the colours
    assert (whole @ luma).std() > 5 and np.abs(video @ luma - whole @ luma).mean() < 3

    record = json.loads((out / "run.json").read_text())
    work = [row["seconds"] + row["decode_seconds"] for row in record["chunks"]]
    shown = record["latency"]
    assert shown["time_to_first_frame"] == pytest.approx(work[0]) and shown["chunks"] == CHUNKS
    assert shown["chunk_p50"] == pytest.approx(sorted(work[1:])[2]) and shown["chunk_p95"] == pytest.approx(
        max(work[1:])
    )
    assert shown["real_time_factor"] == pytest.approx((FRAMES - 9) / 16 / sum(work[1:]))
    assert record["frames"] == FRAMES and record["fps"] == 16 and record["seed"] == 5 and record["prompts"] == STORY
    assert [row["retrieved"] for row in record["chunks"]] == [chunk.retrieved[0] for chunk in chunks]
    assert {"bank_frames": 2, "top_k": 3, "query_group": 4, "steps": 4, "stochastic": True}.items() <= record[
        "settings"
    ].items()
    assert record["speed"]["chunks"] == 3 and record["speed"]["frames_per_second"] > 0
    assert record["sources"]["checkpoint"] == "w.pt" and str(tmp_path) not in json.dumps(record["sources"])
    said = capfd.readouterr().out
    assert "local window, 9 frames" in said and "2 of them as the bank" in said and "in all" in said


@pytest.mark.parametrize("memory", ["sink", "memflow", "released"])
def test_stories_streamed_together_are_as_alone(tmp_path, parts, story, capfd, monkeypatch, memory):
    """The second of three has another length, and is streamed on its own."""
    stories = [STORY, STORY[1:2], STORY[::-1]]
    story.write_text("".join(json.dumps({"prompts": prompts}) + "\n" for prompts in stories))
    decode, latents = generate.StreamingDecoder.decode, {}

    def watched(decoder, x):
        latents.setdefault(str(out), {}).setdefault(decoder, []).append(x.clone())
        return decode(decoder, x)

    monkeypatch.setattr(generate.StreamingDecoder, "decode", watched)
    made, records = {}, {}
    bank = ("--bank-frames", 2) if memory in ("memflow", "released") else ()
    for name, options in (("alone", ()), ("together", ("--batch", 8))):
        out = tmp_path / name
        assert (
            memflow("generate", story, "--out", out, "--memory", memory, "--seed", 5, *parts, *SMALL, *bank, *options)
            == 0
        )
        folders = [out / f"story-{i:03d}" for i in range(3)]
        made[name] = [read_video(folder / "video.mp4").astype(int) for folder in folders]
        records[name] = [json.loads((folder / "run.json").read_text()) for folder in folders]
    said = capfd.readouterr().out
    assert "3 stories in 2 streams" in said and "A chunk of 2 stories took" in said and "2 layers x 2 stories x" in said
    assert [r["stories_together"] for r in records["together"]] == [2, 1, 2]
    for one, other in zip(*records.values(), strict=True):
        for same in ("prompts", "seed", "frames", "settings"):
            assert one[same] == other[same]
        for a, b in zip(one["chunks"], other["chunks"], strict=True):
            assert all(a[same] == b[same] for same in ("prompt", "first_frame", "retrieved", "candidates"))
            assert b["activation"] == pytest.approx(a["activation"])
    for one, other in zip(*made.values(), strict=True):
        assert one.shape == other.shape and np.abs(one - other).mean() < 0.01

    # By streams, in the order in which they are made: story 0 and 2 together, then 1.
    alone, together = ([torch.cat(list(x), 2) for x in of.values()] for of in latents.values())
    assert len(alone) == len(together) == 3
    for x, y in zip(alone, [together[0], together[2], together[1]], strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-4)
    assert torch.equal(alone[1], together[2])
    assert (alone[0] - alone[2]).abs().max() > 0.1


def test_too_many_stories_together_are_refused(tmp_path, parts, story, capfd, monkeypatch):
    line = json.dumps({"prompts": STORY}) + "\n"
    story.write_text(3 * line)
    sizes = []

    def noted(*arguments):
        sizes.append(stream_budget(*arguments).device_bytes)
        raise ValueError("that is enough")

    stream_budget, out = plan.stream_budget, tmp_path / "out"
    monkeypatch.setattr(plan, "stream_budget", noted)
    monkeypatch.setattr(budget, "free_bytes", lambda device: 10**9)
    assert memflow("generate", story, "--out", out, *parts, *SMALL, "--memory", "sink", "--batch", 3) == 2
    monkeypatch.setattr(plan, "stream_budget", stream_budget)
    capfd.readouterr()
    kept = 10**9 // plan.RESERVE
    three, two, one = (size - kept for size in sizes)
    assert three - two == two - one > 0
    monkeypatch.setattr(budget, "free_bytes", lambda device: int((two + three) / 2 / (1 - 1 / plan.RESERVE)))
    assert memflow("generate", story, "--out", out, *parts, *SMALL, "--memory", "sink", "--batch", 3) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "Lower --height and --width; or lower --batch to 2" in said and not out.exists()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("out of everything"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_end_on_the_way_keeps_what_was_made(tmp_path, parts, story, capfd, monkeypatch, error, batch):
    story.write_text(batch * (json.dumps({"prompts": STORY}) + "\n"))

    def ending(*arguments):
        for number, item in enumerate(whole(*arguments)):
            if number == 2:
                raise error
            yield item

    whole, out = generate.stream_videos, tmp_path / "out"
    monkeypatch.setattr(generate, "stream_videos", ending)
    with pytest.raises((RuntimeError, SystemExit)) as end:
        main([str(word) for word in ("generate", story, "--out", out, "--batch", batch, *parts, *SMALL)])
    for folder in [out] if batch == 1 else [out / f"story-{i:03d}" for i in range(batch)]:
        record = json.loads((folder / "run.json").read_text())
        assert record["interrupted"] and record["frames"] == 9 + 12 == len(read_video(folder / "video.mp4"))
        assert sorted(path.name for path in folder.iterdir()) == ["run.json", "video.mp4"]
        if isinstance(error, RuntimeError):
            assert "everything" in str(end.value) and "everything" in record["error"]
    if isinstance(error, KeyboardInterrupt):
        assert end.value.code == 130 and "after chunk 2 of 6" in capfd.readouterr().err


def test_what_cannot_fit_is_refused_with_the_arithmetic(tmp_path, parts, story, capfd, monkeypatch):
    monkeypatch.setattr(budget, "free_bytes", lambda device: 2_000_000)
    out = tmp_path / "out"
    assert memflow("generate", story, "--out", out, *parts, *SMALL) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "1.9 MiB are free" in said and "transformer's weights" in said
    assert "Lower --" in said and not out.exists()


def test_several_stories_without_memory(tmp_path, parts, capfd):
    story = tmp_path / "two.jsonl"
    story.write_text("".join(json.dumps({"prompts": prompts}) + "\n" for prompts in (STORY[:1], STORY[1:2])))
    out = tmp_path / "out"
    assert memflow("generate", story, "--out", out, "--memory", "none", *parts, *SMALL) == 0
    assert "bank" not in capfd.readouterr().out
    records = [json.loads((out / f"story-{i:03d}" / "run.json").read_text()) for i in range(2)]
    assert [(record["seed"], record["frames"]) for record in records] == [(0, 21), (1, 21)]


def test_a_short_history_forgets_the_oldest(tmp_path, parts, story):
    out = tmp_path / "out"
    options = ("--frames-per-prompt", 8, "--bank-frames", 1, "--history-frames", 3)
    assert memflow("generate", story, "--out", out, *parts, *SMALL, *options) == 0
    record = json.loads((out / "run.json").read_text())
    assert (record["settings"]["device_frames"], record["settings"]["host_frames"]) == (3, 0)
    # Three prototypes are kept, of which the window holds two: only the one before it is left to choose.
    assert [row["retrieved"] for row in record["chunks"][4:]] == [[3], [6], [9], [12]]


def test_convert_writes_what_generate_takes(tmp_path, checkpoint, pipeline, story, capfd):
    ours = tmp_path / "ours.safetensors"
    assert memflow("convert", checkpoint, ours, "--num-heads", 2, "--dtype", "bfloat16", "--memory", "sink") == 0
    said = capfd.readouterr().out
    assert "original layout, its generator_ema" in said and "2 heads" in said and str(ours) in said
    read = read_pretrained(ours)
    assert read.dtype == torch.bfloat16 and read.memory == "sink"
    where = ("--checkpoint", ours, "--text-encoder", pipeline, "--vae", pipeline, "--dtype", "bfloat16")
    assert memflow("generate", story, "--out", tmp_path / "out", *where, *SMALL) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["memory"] == "sink"
    assert len(read_video(tmp_path / "out" / "video.mp4")) == FRAMES


@pytest.mark.parametrize("asked", [(), ("--positions", "absolute")], ids=["as it says", "as asked"])
def test_a_checkpoint_says_its_positions(tmp_path, checkpoint, pipeline, story, capfd, asked):
    ours = tmp_path / "ours.safetensors"
    assert memflow("convert", checkpoint, ours, "--num-heads", 2, "--positions", "bounded") == 0
    assert "and memflow with --positions bounded" in capfd.readouterr().out
    where = ("--checkpoint", ours, "--text-encoder", pipeline, "--vae", pipeline)
    assert memflow("generate", story, "--out", tmp_path / "out", *where, *SMALL, *asked) == 0
    used = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["positions"]
    assert used == ("absolute" if asked else "bounded")


def test_verify_compares_kinds_of_memory(tmp_path, parts, story, capfd):
    out = tmp_path / "out"
    assert memflow("verify", story, "--out", out, *parts, *SMALL, "--bank-frames", 2) == 0
    said, report = capfd.readouterr().out, json.loads((out / "report.json").read_text())
    assert report["problems"] == [] and [kind["memory"] for kind in report["kinds"]] == list(MEMORIES)
    for kind in report["kinds"]:
        differences, memory = kind["difference_to_none"], kind["memory"]
        assert len(differences) == CHUNKS
        if memory in SAME:
            assert differences[:3] == [0, 0, 0]
            assert kind["first_chunk_that_differs"] == (None if memory == "none" else 3)
        assert (min(differences[3:]) > 0) == (memory != "none")
        assert kind["speed"]["chunks"] == 3 and kind["cache_bytes"] > 0
        assert memory in said
        assert len(read_video(out / f"{memory}.mp4")) == FRAMES
    picture = imread(out / "frames.png")[..., :3]
    assert picture.shape[1] > 1000 and picture.std() > 0.05


def test_verify_says_what_must_not_be(tmp_path, parts, story, capfd, monkeypatch):
    from memflow_ops.model.pipeline import verify as pipeline_verify

    def broken(*arguments):
        for chunk, frames, seconds in whole(*arguments):
            if arguments[1][0].settings.memory == "sink" and chunk.index == 1:
                chunk.frames[0, 0, 0, 0, 0] = torch.nan
            yield chunk, frames, seconds

    whole = pipeline_verify.stream_videos
    monkeypatch.setattr(pipeline_verify, "stream_videos", broken)
    kinds = ("--memory", "none", "--memory", "sink")
    assert memflow("verify", story, "--out", tmp_path / "out", *parts, *kinds, *SMALL) == 1
    said = capfd.readouterr().err
    assert "sink: latents of chunks [1, 2, 3, 4, 5] are not finite" in said and "nothing to remember" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")], ids=["Ctrl-C", "disk full"])
@pytest.mark.parametrize("complete", [0, 2])
def test_verify_that_is_ended_reports_what_is_complete(tmp_path, parts, story, capfd, monkeypatch, error, complete):
    from memflow_ops.model.pipeline import verify as pipeline_verify

    def ending(parts, plans, interrupts):
        if plans[0].settings.memory == MEMORIES[complete]:
            raise error
        yield from whole(parts, plans, interrupts)

    whole, out = pipeline_verify.stream_videos, tmp_path / "out"
    monkeypatch.setattr(pipeline_verify, "stream_videos", ending)
    assert memflow("verify", story, "--out", out, *parts, *SMALL) == (
        130 if isinstance(error, KeyboardInterrupt) else 1
    )
    said = capfd.readouterr()
    assert ("interrupted" if isinstance(error, KeyboardInterrupt) else "No space left") in said.err
    assert "Traceback" not in said.err
    videos = [f"{memory}.mp4" for memory in MEMORIES[:complete]]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*videos, *(["frames.png", "report.json"] if complete else [])]
    )
    if complete:
        report = json.loads((out / "report.json").read_text())
        assert [kind["memory"] for kind in report["kinds"]] == list(MEMORIES[:complete]) and "none.mp4" in said.out


BAD = {
    "no VAE": (("--vae", "/no/such/place"), "no VAE at /no/such/place"),
    "no encoder": (("--text-encoder", "/no/such/place"), "no text encoder at /no/such/place"),
    "no checkpoint": (("--checkpoint", "/no/such/place"), "no weights at /no/such/place"),
    "no lora": (("--lora", "/no/such/place"), "no weights at /no/such/place"),
    "size": (("--height", 40), "multiples of 16 pixels"),
    "memory": (("--memory", "elephant"), "elephant"),
    "dtype": (("--dtype", "int8"), "int8"),
    "toy option": (("--baseline",), "No such option: --baseline"),
    "heads": (("--num-heads", 5), "num_heads"),
}


def test_options_that_would_change_nothing_are_refused(tmp_path, checkpoint, parts, pipeline, story, capfd):
    """By the kind of memory that is asked for, or else by the one that the checkpoint was tuned for."""
    out = tmp_path / "out"

    def refused(command, *options) -> str:
        assert memflow(command, story, "--out", out, *parts, *SMALL, *options) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and not out.exists()
        return said

    assert "--history-frames would change nothing with --memory sink:" in refused(
        "generate", "--memory", "sink", "--history-frames", 9
    )
    verified = refused("verify", "--memory", "none", "--memory", "released", "--top-k", 5)
    assert "--top-k would change nothing with --memory none and released: --top-k is for memflow" in verified
    assert "lora_alpha=4 is given (--lora-alpha)" in refused("generate", "--lora-alpha", 4)

    released = tmp_path / "released.safetensors"
    assert memflow("convert", checkpoint, released, "--num-heads", 2, "--memory", "released") == 0
    capfd.readouterr()
    parts = ("--checkpoint", released, "--text-encoder", pipeline, "--vae", pipeline)
    assert "with --memory released, which this checkpoint was tuned for: --top-k is for memflow" in refused(
        "generate", "--top-k", 8
    )
    assert "says itself that num_heads is 2, got 4" in refused("generate", "--num-heads", 4)


@pytest.mark.parametrize("options, expected", BAD.values(), ids=BAD.keys())
def test_bad_options_are_refused_before_anything_is_written(tmp_path, parts, story, capfd, options, expected):
    out = tmp_path / "out"
    assert memflow("generate", story, "--out", out, *parts, *SMALL, *options) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1 and said.startswith("memflow: ")
    assert not out.exists()


def test_a_folder_in_the_place_of_a_file(tmp_path, parts, story, capfd):
    out = tmp_path / "out"
    for command, name in (("generate", "run.json"), ("verify", "sink.mp4")):
        (out / name).mkdir(parents=True)
        assert memflow(command, story, "--out", out, *parts, *SMALL) == 2
        assert f"cannot write {out / name}: a folder is in its place" in capfd.readouterr().err
        (out / name).rmdir()
        assert not list(out.iterdir())


def test_parts_that_do_not_belong_together(tmp_path, parts, pipeline, story, capfd):
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]
    ).save_pretrained(tmp_path / "vae")
    out = tmp_path / "out"
    assert memflow("generate", story, "--out", out, *parts, *SMALL, "--vae", tmp_path / "vae") == 2
    assert "latents of 4 channels, the transformer makes 16" in capfd.readouterr().err
    assert not out.exists()


def test_every_part_of_a_pipeline_is_needed(tmp_path, story, capfd):
    everything = {"--checkpoint": tmp_path, "--text-encoder": tmp_path, "--vae": tmp_path}
    for missing in everything:
        given = [word for pair in everything.items() if pair[0] != missing for word in pair]
        assert memflow("generate", story, "--out", tmp_path / "out", *given) == 2
        assert f"Missing option '{missing}'" in capfd.readouterr().err
    assert memflow("convert", tmp_path, tmp_path / "out.pt") == 2
    assert "out.pt" in capfd.readouterr().err


def test_compiled_blocks_make_the_same_video_but_for_rounding(tmp_path, parts, story, capfd, monkeypatch):
    """Every block by the same two compiled parts, through a fast backend: inductor is tested in tests/model."""
    from memflow_ops.model.wan import transformer

    compiled, original = [], torch.compile

    def quick(function, **options):
        compiled.append(options.pop("backend"))
        return original(function, backend="aot_eager", **options)

    monkeypatch.setattr(transformer.torch, "compile", quick)
    latents = {}
    for name, options in (("plain", ()), ("compiled", ("--compile",))):
        out = tmp_path / name
        assert memflow("generate", story, "--out", out, *parts, *SMALL, *options) == 0
        assert json.loads((out / "run.json").read_text())["compiled"] is (name == "compiled")
        latents[name] = read_video(out / "video.mp4").astype(float)
    assert compiled == ["inductor"] * 4
    assert np.abs(latents["plain"] - latents["compiled"]).mean() < 1


def test_graphs_and_compiling_are_refused_where_they_cannot_be(tmp_path, parts, story, capfd, monkeypatch):
    out = tmp_path / "out"
    assert memflow("generate", story, "--out", out, *parts, *SMALL, "--cuda-graphs") == 2
    assert "they need a CUDA device, the model is on cpu" in capfd.readouterr().err
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    assert memflow("verify", story, "--out", out, *parts, *SMALL, "--compile") == 2
    assert "--compile cannot be: no C++ compiler was found" in capfd.readouterr().err
    assert not out.exists()


def test_several_prompts_and_one_fill_the_released_bank_on_different_schedules(tmp_path, parts):
    story = tmp_path / "two.jsonl"
    story.write_text("".join(json.dumps({"prompts": prompts}) + "\n" for prompts in (STORY[:2], STORY[:1])))
    out = tmp_path / "out"
    assert memflow("generate", story, "--out", out, "--memory", "released", *parts, *SMALL) == 0
    records = [json.loads((out / f"story-{i:03d}" / "run.json").read_text()) for i in range(2)]
    assert [record["settings"]["bank_schedule"] for record in records] == ["interactive", "single-prompt"]
