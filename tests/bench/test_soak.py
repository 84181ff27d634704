"""The soak of thousands of chunks, here of thirty."""

from itertools import pairwise

import pytest

from memflow_ops.bench import soak


def test_both_ways_make_the_same_frames_and_a_picture(tmp_path):
    disk, memory = soak.stream_once(30, 40000, tmp_path), soak.stream_once(30, 40000, None)
    assert disk["sha256"] == memory["sha256"] and len(disk["resident_bytes"]) == 30
    assert (memory["hits"], memory["misses"]) == (0, 0)
    found = {"disk": disk, "memory": memory, "device_frames": soak.DEVICE_FRAMES, "host_frames": soak.HOST_FRAMES}
    assert soak.draw(found).startswith(b"\x89PNG")


def test_prompts_are_those_of_stories_one_after_the_other():
    prompts = soak.prompts_of(500, 40000)
    assert len(prompts) == 500 and prompts[:60] == soak.prompts_of(60, 40000)
    assert 60 < sum(a != b for a, b in pairwise(prompts)) < 130


def test_too_few_chunks_are_refused(capsys):
    with pytest.raises(SystemExit):
        soak.main(["--chunks", "24"])
    assert "--chunks must be more than 24" in capsys.readouterr().err
