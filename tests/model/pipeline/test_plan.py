"""The plans of streams: what follows from a story and what the user has asked for."""

import json
from pathlib import Path

import pytest
import torch

from memflow_ops.model.checkpoints.pretrained import Pretrained
from memflow_ops.model.pipeline.budget import FreeMemory, model_items
from memflow_ops.model.pipeline.plan import StreamOptions, _disk, plan_streams
from memflow_ops.model.pipeline.settings import wan_settings
from memflow_ops.model.pipeline.sources import Sources
from memflow_ops.model.stories.snapshots import FORMAT, HistoryOptions
from memflow_ops.model.wan.transformer import ModelConfig


@pytest.mark.parametrize(
    ("prompts", "asked", "expected"),
    [
        (["a ball"], None, "single-prompt"),
        (["a ball", "a box"], None, "interactive"),
        (["a ball"], "interactive", "interactive"),
        (["a ball", "a box"], "single-prompt", "single-prompt"),
    ],
)
def test_the_bank_is_filled_as_the_authors_program_for_such_a_story_does(prompts, asked, expected):
    options = StreamOptions(bank_schedule=asked)
    assert options.for_story(wan_settings("released"), prompts).bank_schedule == expected


def test_other_kinds_of_memory_have_no_schedule():
    settings = wan_settings("memflow")
    assert StreamOptions().for_story(settings, ["a ball"]) is settings


def test_a_window_that_is_recached_at_once_is_counted():
    """A pass over the 12 frames of sink and window holds four times what one over a chunk of 3 does; CUDA graphs keep
    what the passes over chunks need once more."""
    config = ModelConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=6, text_len=5)

    def working(pools, **changes):
        settings = wan_settings("released", **changes)
        return model_items(config, settings, 1000, 1, 1560, torch.bfloat16, pools)[-1].size

    chunk = working(1, bank_schedule="single-prompt")
    assert working(1) == 4 * chunk and working(2) == 5 * chunk
    assert working(1, recache=False) == chunk and working(2, bank_schedule="single-prompt") == 2 * chunk


def test_a_model_that_takes_a_picture_is_refused_before_anything_is_loaded():
    """Image-to-video: its file has the names of a text-to-video model, and more channels go in."""
    sizes = {"dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 1, "in_dim": 36, "out_dim": 16}
    pretrained = Pretrained({}, ModelConfig(**sizes, text_dim=8, text_len=6), "i2v.safetensors", "our")
    nowhere = Path("nowhere")
    free = FreeMemory(torch.device("cpu"), 2**40, None)
    with pytest.raises(ValueError, match="this model expects 20 channels"):
        plan_streams(
            [["a ball"]],
            nowhere,
            wan_settings("sink", height=4, width=6),
            Sources(nowhere, nowhere, None),
            pretrained,
            free,
            StreamOptions(),
        )


def test_several_processes_do_not_go_on_with_what_one_keeps_on_disk_alone(tmp_path):
    """They keep all of the past in memory and in their snapshots."""
    folder = tmp_path / "history"
    folder.mkdir()

    def divided(disk_frames, processes):
        settings = {"device_frames": 4, "host_frames": 1, "disk_frames": disk_frames}
        about = {"format": FORMAT, "finished": False, "run": {"settings": settings}}
        (folder / "run.json").write_text(json.dumps(about))
        return _disk(HistoryOptions(folder, resume=True), Path(), processes).divided

    assert divided(7, 1) == (4, 1, 7) and divided(0, 2) == (4, 1, 0)
    with pytest.raises(ValueError, match="keeps 7 past frames on disk alone, which only one process does: go on with"):
        divided(7, 2)
