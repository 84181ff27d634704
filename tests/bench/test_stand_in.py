"""The stand-in for a GPU: torch code for CUDA runs on it, and launches are recorded and compiled as for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from memflow_ops.bench.stand_in.launches import read

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment(folder, **more):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "triton"), **more}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What stand_in_program.py prints."""
    folder = tmp_path_factory.mktemp("stand-in")
    command = [sys.executable, str(HERE / "stand_in_program.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_tensors_are_where_code_for_cuda_expects_them(said):
    devices = said["devices"]
    assert [devices[name] for name in ("made", "like it", "moved back")] == ["cuda:0"] * 3
    assert devices["copied to the host"] == "cpu"


def test_addresses_are_aligned_as_those_of_cuda_are(said):
    assert said["devices"]["address of an odd place"] == 2


def test_values_that_the_host_reads_are_made_up_and_masks_pick_everything(said):
    assert said["devices"]["read"] == [0.0, True, [0, 1]] and said["devices"]["masked"] == [24]


def test_operators_that_take_functions_and_those_in_plain_torch_have_shapes(said):
    assert said["shapes"] == {"FlexAttention": [1, 2, 128, 64], "relevance": [1, 5]}


def test_forward_and_backward_of_a_layer_are_recorded(said):
    layer = said["layer"]
    assert {"attend_kernel", "backward_queries_kernel", "backward_keys_kernel"} <= set(layer["kernels"])
    assert layer["shape"] == [1, 300, 2, 64] and layer["launches"] >= len(layer["kernels"])


def test_a_launch_with_a_tensor_of_the_host_is_refused(said):
    assert "block_means_kernel is launched with" in said["host tensor"]


def test_the_just_in_time_compiler_finds_what_was_compiled_from_a_recording(said):
    cache = said["cache"]
    assert cache["errors"] == ["", ""] and cache["known"] == [False, True]
    assert cache["found"] == [True, False], "the same launch is found, one with other options is not"


def test_tests_for_a_gpu_run_on_the_stand_in(tmp_path):
    target = tmp_path / "recorded"
    command = [sys.executable, "-m", "pytest", "-p", "memflow_ops.bench.stand_in.plugin", "--recorded", str(target)]
    options = [
        "--assert=plain",
        "-o",
        "addopts=",
        "-q",
        "--strict-markers",
        "--import-mode=importlib",
        "-p",
        "no:xdist",
    ]
    chosen = ["tests/gpu/test_backward.py", "-k", "a_wan_layer_agrees_with_torch and group128 or checkpointed"]
    optimised = environment(tmp_path, PYTHONOPTIMIZE="1")
    done = subprocess.run([*command, *options, *chosen], cwd=ROOT, env=optimised, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    recorded = read(target)
    assert "2 passed" in done.stdout and len(recorded.launched) == 2
    assert "backward_keys_kernel" in {kernel.name for kernel in recorded.kernels.values()}
