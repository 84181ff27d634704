"""`memflow bench`: mistakes and Ctrl-C are one line, and what was finished is kept."""

import pytest
import torch

from memflow_ops.bench import run
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.cli import main

CPU = torch.device("cpu")
CEILINGS = {"tflops_float32": 1.0, "gbs": 1.0}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--size", "huge"], "sizes are tiny, tiny-kernels, wan-1.3b, long, kernels, got huge"),
        (["--case", "nothing"], "no case of the sizes wan-1.3b, long, kernels with 'nothing' in its name runs on cpu"),
        (["--case", "stream/", "--rounds", "99"], "has room for 10 rounds, got 99"),
        (
            ["--case", "stream/", "--contender", "sink", "--contender", "ful", "--rounds", "99"],
            "has room for 10 rounds",
        ),
        (["--stored", "--out", "nowhere"], "run `memflow bench`"),
        (["--out", "/proc/nowhere"], "cannot write to the folder /proc/nowhere"),
        (["--out", __file__], "test_command.py is a file"),
    ],
)
def test_mistakes_are_one_line(words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--device", "cpu", *words])
    assert end.value.code == 2
    words = capfd.readouterr().err.strip().splitlines()
    assert len(words) == 1 and said in words[0]


def test_an_interruption_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    made = []

    def contest(session, case):
        if made:
            raise KeyboardInterrupt
        session.ceilings = CEILINGS
        made.append(Contest(case, CPU))
        return made[0]

    monkeypatch.setattr(run.Session, "contest", contest)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--size", "tiny", "--case", "op/", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    assert end.value.code == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "memflow: interrupted"
    assert {row["case"] for row in run.stored(tmp_path, "cpu")["rows"]} == {made[0].case.name}
    assert (tmp_path / "report.html").is_file()
