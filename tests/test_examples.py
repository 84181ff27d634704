"""The programs in examples/ run, and what they print about memory is so."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "attention_op",
        "bank_by_hand",
        "diffusers_memory",
        "diffusers_pipeline",
        "sharded_heads",
        "stream_wan",
    }


def test_attention_op():
    out = run("attention_op")
    assert out.shape == (1, 288, 128) and out.isfinite().all()


def test_bank_by_hand_retrieves_the_frames_of_its_topic(capsys):
    assert sorted(run("bank_by_hand")) == [3, 12]  # the first frames of chunks 1 and 4, which share the last topic
    assert "chunk 7, topic 1" in capsys.readouterr().out


def test_stream_wan_retrieves_once_there_is_a_past():
    chunks = run("stream_wan")
    assert [bool(chunk.retrieved[0]) for chunk in chunks] == [False] * 3 + [True] * 5
    assert all(chunk.frames.isfinite().all() for chunk in chunks)


def test_sharded_heads_in_one_process():
    """In several: tests/model/parallel."""
    got, want = run("sharded_heads")
    assert torch.equal(got, want)


def test_diffusers_memory():
    pytest.importorskip("diffusers")
    retrieved = run("diffusers_memory")
    assert [len(frames) for frames in retrieved] == [0, 0, 0, 1, 2, 2]


def test_diffusers_pipeline():
    pytest.importorskip("diffusers")
    video = run("diffusers_pipeline")
    assert video.shape == (1, 45, 32, 48, 3)
    assert 0 <= video.min() < video.max() <= 1
