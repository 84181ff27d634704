"""`memflow toy evaluate`: what it writes when it is stopped, and what it refuses."""

import json

from command_line import memflow

from memflow_ops.model.toy.evaluation import evaluate


def test_an_evaluation_that_is_stopped_keeps_what_was_judged(tmp_path, monkeypatch, capfd):
    """Kinds are judged for real, on one short story; then Ctrl-C comes while the third is being made, or the timing."""
    monkeypatch.setattr("memflow_ops.model.toy.evaluation.held_out.STORY_PROMPTS", (6,))
    short = ("toy", "evaluate", "--stories", 1, "--steps", 1, "--out", tmp_path / "e.json")
    judge_really, calls = evaluate.summarise, []

    def summarise(*arguments, **options):
        calls.append(arguments[0])
        if arguments[0] == "full":
            raise KeyboardInterrupt
        return judge_really(*arguments, **options)

    monkeypatch.setattr(evaluate, "summarise", summarise)
    kinds = [word for kind in ("none", "sink", "none", "full") for word in ("--memory", kind)]
    assert memflow(*short, *kinds) == 130
    assert calls == ["none", "sink", "full"]
    written = json.loads((tmp_path / "e.json").read_text())
    assert [row["memory"] for row in written["rows"]] == ["none", "sink"] and written["timings"] == {}
    said = capfd.readouterr().err
    assert "what was judged is in" in said and said.endswith("memflow: interrupted\n")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "time_kinds", interrupted)
    (tmp_path / "e.json").unlink()
    assert memflow(*short, "--memory", "none", "--seed", 5) == 130
    written = json.loads((tmp_path / "e.json").read_text())
    assert [row["memory"] for row in written["rows"]] == ["none"] and not written["held_out"]
    assert "not held out" in capfd.readouterr().err


def test_an_evaluation_that_cannot_be_written_does_not_begin(tmp_path, capfd):
    (tmp_path / "p.png").mkdir()
    for out, says in ((tmp_path / "p.json", "takes the name of a .png file"), ("/proc/e.json", "cannot write to")):
        assert memflow("toy", "evaluate", "--out", out) == 2
        assert says in capfd.readouterr().err


def test_a_selection_that_no_kind_makes_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert memflow("toy", "evaluate", "--top-k", 3, "--memory", "none", "--memory", "dense bank") == 2
    said = capfd.readouterr().err
    assert "--top-k would change nothing" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
