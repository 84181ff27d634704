"""`memflow generate --ray` on actors of this machine against a serial run; skipped where the package ray is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import memflow, write_story
from killed_in_write import POINTS, schedule

ray = pytest.importorskip("ray", reason="the package ray is an extra")

STORIES = [["A ball in the meadow", f"the {thing} at night"] for thing in ("sea", "ball", "box", "star", "desert")]
STORIES.append(["a star", "the star returns", "a box"])
TIMES = {"date", "speed", "latency", "memory"}
TIMES_OF_A_CHUNK = {"seconds", "decode_seconds"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def options(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("ray")
    story = write_story(folder / "stories.jsonl", *STORIES)
    parts = ["--checkpoint", pipeline, "--text-encoder", pipeline, "--vae", pipeline]
    sizes = ["--height", 32, "--width", 48, "--device", "cpu", "--bank-frames", 2, "--top-k", 3, "--seed", 5]
    return ["generate", story, *parts, *sizes, "--steps", 1, "--frames-per-prompt", 30, "--snapshot-every", 2]


@pytest.fixture(scope="module")
def serial(tmp_path_factory, options):
    out = tmp_path_factory.mktemp("serial")
    assert memflow(*options, "--out", out / "out", "--history-dir", out / "history") == 0
    return out / "out"


def start(options, folder, program=("-m", "memflow_ops"), **environment):
    """The command with --ray, in a process of its own."""
    folders = ["--out", folder / "out", "--history-dir", folder / "history"]
    command = [sys.executable, *program, *options, *folders, "--ray", "local"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "wan"), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray makes its actors wait for all other processes of a machine, which on a busy one would take them for ever.
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MARK": str(folder), "RAY_worker_niceness": "0"}
    environment = {**os.environ, **own, **environment}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def actors(folder):
    """The processes of the actors that make streams of this folder. Their own environment is lost under the title that
    they have given themselves, so that of the process above them is looked at."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cmdline").read_bytes().startswith(b"ray::Worker"):
                above = (place / "stat").read_text().rpartition(")")[2].split()[1]
                if f"MARK={folder}".encode() in Path("/proc", above, "environ").read_bytes():
                    found.append(int(place.name))
        except OSError:
            continue
    return found


def wait_for(what, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def without_times(path):
    record = json.loads(path.read_text())
    kept = {name: value for name, value in record.items() if name not in TIMES}
    kept["chunks"] = [{k: v for k, v in chunk.items() if k not in TIMES_OF_A_CHUNK} for chunk in record["chunks"]]
    return kept


def assert_same(out, serial):
    assert sorted(path.name for path in out.iterdir()) == [f"story-{i:03d}" for i in range(len(STORIES))]
    for number in range(len(STORIES)):
        one, other = (folder / f"story-{number:03d}" for folder in (out, serial))
        assert (one / "video.mp4").read_bytes() == (other / "video.mp4").read_bytes(), number
        assert without_times(one / "run.json") == without_times(other / "run.json")


def test_an_actor_that_dies_costs_nothing(tmp_path, options, serial):
    """Two actors, one of which is killed in the middle of its first story."""
    process = start(options, tmp_path)
    try:
        wait_for(lambda: list(tmp_path.glob("history/*/snapshot.safetensors")) and actors(tmp_path), process)
        os.kill(actors(tmp_path)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "An actor died at" in err and out.count("run.json") == len(STORIES)
    assert_same(tmp_path / "out", serial)
    count = min(len(STORIES), os.cpu_count())
    assert count == 1 or f"Up to {count} actors of this machine divide its memory; of one of them:" in out


def test_actors_that_die_in_the_middle_of_a_write_cost_nothing(tmp_path, options, serial):
    """Two actors die of every story: half of a frame, of a line or of a fragment is written, or a file is whole and has
    not its name yet, or nothing is left to do but to tidy up. Nothing of it is left in the end."""
    planned, kills = schedule(len(STORIES), seed=1), tmp_path / "kills"
    assert {point for of in planned for point, _ in of} == set(POINTS)
    kills.mkdir()
    for number, of in enumerate(planned):
        (kills / f"story-{number:03d}").write_text(json.dumps(of))
    program = ("-c", "import killed_in_write; killed_in_write.main()")
    process = start(options, tmp_path, program, KILLS=str(kills))
    try:
        _, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err.count("An actor died at") == len(list(kills.glob("* died *"))) == 2 * len(STORIES)
    assert_same(tmp_path / "out", serial)
    left = {path.name for folder in ("out", "history") for path in tmp_path.glob(f"{folder}/story-*/*")}
    assert left == {"video.mp4", "run.json"}


def test_after_ctrl_c_and_after_a_kill_the_same_command_goes_on(tmp_path, options, serial):
    """At once, when actors of the command that was killed may still be at work."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start(options, tmp_path)
        try:
            wait_for(lambda: list(tmp_path.glob("history/*/snapshot.safetensors")) and actors(tmp_path), process)
            process.send_signal(number)
            _, err = process.communicate(timeout=400)
        finally:
            process.kill()
        assert process.returncode == code, err
    process = start(options, tmp_path)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert_same(tmp_path / "out", serial)
    assert out.count("is complete already") + out.count("run.json") == len(STORIES)


def test_a_story_that_fails_fails_alone(tmp_path, options, serial):
    """The history of one story is that of another run."""
    history = tmp_path / "history" / "story-002"
    history.mkdir(parents=True)
    about = {"format": "memflow-ops run 1", "finished": False, "run": {"prompts": [["a ball"]]}}
    (history / "run.json").write_text(json.dumps(about))
    process = start(options, tmp_path)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "story-002: ValueError: " in err and "holds another run: prompts" in err and "Traceback" not in err
    for number in (0, 1, 3, 4, 5):
        made, other = (folder / f"story-{number:03d}" / "video.mp4" for folder in (tmp_path / "out", serial))
        assert made.read_bytes() == other.read_bytes()
    assert not (tmp_path / "out" / "story-002" / "video.mp4").exists()


def test_what_cannot_be_is_said_before_anything_starts(tmp_path, options, capfd):
    assert memflow(*options, "--out", tmp_path / "out", "--ray", "local") == 2
    assert "needs --history-dir" in capfd.readouterr().err
