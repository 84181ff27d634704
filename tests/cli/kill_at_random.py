"""Kills `memflow toy generate` at random moments, lets it go on, and compares what comes out with a run that was left
alone. From the root of the repository:

    PYTHONPATH=.:tests/cli python tests/cli/kill_at_random.py --kills 50 out/kills

Every run is forked from a process that has imported everything, so that the moments fall into its work and not into its
start. A run that gets to its end before it is killed is compared, and another one begins.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from test_toy_resume import assert_same_files

from memflow_ops.cli import main

PROMPTS = ["a ball in the meadow", "the empty sea", "a star at night", "the ball in the desert", "a box at the sea"]


def run(words, seconds=None) -> bool:
    """Whether a run has come to its end before it was killed, after so many seconds; None: it is left alone."""
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        if seconds is not None:
            os.dup2(nowhere, 2)
        main([str(word) for word in words])
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a run ended with exit code {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def kill_at_random(folder: Path, kills: int, longest: float, seed: int) -> tuple[int, int]:
    """Returns the kills, and how many whole videos have been compared on the way."""
    folder.mkdir(parents=True)
    story = folder / "story.jsonl"
    story.write_text(json.dumps({"prompts": PROMPTS * 5}) + "\n")

    def words(name):
        folders = ("--out", folder / name, "--history-dir", folder / f"{name}-history")
        tiers = ("--device-frames", 5, "--host-frames", 2, "--snapshot-every", 4)
        return ("toy", "generate", story, "--steps", 1, "--device", "cpu", "--no-baseline", *folders, *tiers)

    run(words("whole"))
    choice, done, compared = random.Random(seed), 0, 0
    while done < kills or (folder / "parts").exists():
        resume = ("--resume",) if (folder / "parts-history").exists() else ()
        seconds = choice.uniform(0, longest) if done < kills else None
        ended = run((*words("parts"), *resume), seconds)
        done += not ended
        if ended:
            assert_same_files(folder / "parts", folder / "whole", timeline=True)
            compared += 1
            for name in ("parts", "parts-history"):
                shutil.rmtree(folder / name)
        print(f"{done} kills, {compared} videos compared", end="\r", flush=True)
    return done, compared


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder for all files")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of a run before it is killed, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    done, compared = kill_at_random(given.folder, given.kills, given.longest, given.seed)
    print(
        f"{done} kills; {compared} videos came out as if nothing had happened: same bytes, same run.json but for times"
    )
