"""Match rate against overhead: which settings, that nothing measured is lost or mixed, and the words."""

import json
from dataclasses import replace

import matplotlib
import pytest

from memflow_ops.bench import where_memory_pays as pays
from memflow_ops.bench.where_memory_pays import Setting, compared, draw, main, settings_of, sign_test
from memflow_ops.files import locked
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming, Proportion
from memflow_ops.model.toy.settings import TOY_SETTINGS

SMALL = ("--stories", "1", "--lengths", "6", "--banks", "1", "--top-k", "2", "99")
NAMES = [
    "bank 1, top 2 of 16", "bank 1, moments 2 of 16", "bank 1, random 2 of 16", "bank 1, top 16 of 16", "none", "full"
]  # fmt: skip


def test_settings_come_once():
    found = settings_of([1, 2], [4, 16, 99], 4, 16)
    assert [setting.name for setting in found] == [
        "bank 1, top 4 of 16", "bank 1, moments 4 of 16", "bank 1, random 4 of 16", "bank 1, top 16 of 16",
        "none", "full",
        "bank 2, top 4 of 20", "bank 2, moments 4 of 20", "bank 2, random 4 of 20",
        "bank 2, top 16 of 20", "bank 2, moments 16 of 20", "bank 2, random 16 of 20", "bank 2, top 20 of 20",
    ]  # fmt: skip


def test_normalised_scores_are_measured_where_they_may_change_a_choice():
    def kinds(query_group: int | None) -> list[str]:
        return [setting.blocks for setting in settings_of([1], [4], 4, query_group)[:-3]]

    assert kinds(32) == ["top", "moments", "random"]
    assert kinds(33) == kinds(None) == ["top", "moments", "normalised", "random"]


def test_a_setting_is_what_it_says():
    drawn = Setting("memflow", 6, 4, 36, "random")
    settings = drawn.change(TOY_SETTINGS)
    assert (settings.memory, settings.bank_frames, settings.top_k, settings.selection) == ("memflow", 6, 4, "random")
    assert drawn.cost == "bank 6, top 4 of 36"
    by_moments = replace(drawn, blocks="moments")
    settings = by_moments.change(TOY_SETTINGS)
    assert (settings.top_k, settings.selection, settings.score) == (4, "top", "moments")
    assert by_moments.cost == by_moments.name == "bank 6, moments 4 of 36"
    assert replace(drawn, blocks="normalised").change(TOY_SETTINGS).score == "normalised"
    assert Setting("none").change(TOY_SETTINGS) == replace(TOY_SETTINGS, memory="none")


def judged(value: float) -> KindFigures:
    right = round(40 * value)
    share, each = Proportion.of([True] * right + [False] * (40 - right)), "1" * right + "0" * (40 - right)
    return KindFigures(
        "memflow",
        share,
        1.0,
        share,
        0.2,
        0.5,
        0.2,
        share,
        share,
        {},
        None,
        None,
        float("nan"),
        0.5,
        [0] * 6,
        each,
        each,
    )


class Judge:
    """Stands in for the evaluation: the more blocks, the better, and the best are better than others."""

    def __init__(self):
        self.asked: list = []
        self.stop_before = 100

    def evaluate(self, model, *, settings, report, **count):
        if len(self.asked) == self.stop_before:
            raise KeyboardInterrupt
        self.asked.append((settings.memory, settings.bank_frames, settings.top_k, settings.selection, settings.score))
        self.query_group = settings.query_group
        assert count == {"kinds": ["memflow"], "stories": 1, "lengths": [6], "seed": 20_000}
        report("memflow", 1, 2)
        random = settings.selection == "random"
        yield judged(0.2 if settings.memory == "none" else 0.4 if random else 0.9)


@pytest.fixture
def judge(monkeypatch) -> Judge:
    judge = Judge()
    monkeypatch.setattr(pays, "evaluate_kinds", judge.evaluate)
    monkeypatch.setattr(
        pays, "time_kinds", lambda model, kinds, settings: {name: KindTiming(0.1, 1.5, 1.4, 1.6) for name in kinds}
    )
    return judge


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, judge, capsys):
    out = tmp_path / "deep" / "pays.json"
    judge.stop_before = 3
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(out)])
    assert end.value.code == 130 and "the same command continues" in capsys.readouterr().err
    said = json.loads(out.read_text())
    assert list(said["rows"]) == NAMES[:3] and said["timings"] == {} and out.with_suffix(".png").is_file()

    judge.stop_before = 100
    main([*SMALL, "--out", str(out)])
    assert len(judge.asked) == len(set(judge.asked)) == 6
    said = json.loads(out.read_text())
    assert list(said["rows"]) == NAMES and said["rows"][NAMES[0]]["hue"]["value"] == 0.9
    assert said["rows"]["none"]["copies"] is None, "JSON has no NaN"
    assert sorted(said["timings"]) == sorted(name for name in NAMES if "random" not in name)
    printed = capsys.readouterr().out
    assert "bank of 1,  2 of 16 blocks: 90 % (77-96) of 40 returns" in printed
    assert (
        "by moments 90 % (77-96), the intervals overlap, 0 gained and 0 lost (p 1); "
        "at random 40 % (26-55), apart, 0 gained and 20 lost (p 1.9e-06)" in printed
    )
    assert "of 40 returns have their pattern; by moments 90 %" in printed

    main([*SMALL, "--out", str(out)])
    assert len(judge.asked) == 6, "nothing is measured twice"


def test_a_choice_shared_by_a_chunk_is_streamed_and_told_from_others(tmp_path, judge, capsys):
    out = tmp_path / "pays.json"
    main([*SMALL, "--query-group", "0", "--out", str(out)])
    assert judge.query_group is None and json.loads(out.read_text())["settings"]["query_group"] is None
    assert [asked[-1] for asked in judge.asked] == ["mean", "moments", "normalised", "mean", "mean", "mean", "mean"]
    assert "by normalised scores 90 %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*SMALL, "--out", str(out)])
    assert "other settings: say --restart" in capsys.readouterr().err


def test_results_of_other_stories_are_not_mixed(tmp_path, judge, capsys):
    out = tmp_path / "pays.json"
    main([*SMALL, "--out", str(out)])
    before = out.read_text()
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(out), "--seed", "20001"])
    assert end.value.code == 2 and "other seed: say --restart" in capsys.readouterr().err
    assert out.read_text() == before


def test_an_interrupt_before_the_first_row_names_no_file(tmp_path, judge, capsys):
    judge.stop_before = 0
    out = tmp_path / "pays.json"
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(out)])
    assert end.value.code == 130 and not out.exists()
    said = capsys.readouterr().err
    assert "nothing has been measured yet" in said and out.name not in said


def test_rows_say_where_and_when_they_were_measured(tmp_path, judge, monkeypatch):
    out = tmp_path / "pays.json"
    now = {"device": "here", "date": "2026-11-23", "commit": "new"}
    monkeypatch.setattr(pays, "environment", lambda device: now)
    main([*SMALL, "--out", str(out)])
    told = json.loads(out.read_text())
    for row in told["rows"].values():  # as files were written before
        for name in now:
            del row[name]
    del told["rows"]["full"]
    told["timings"] = {}
    out.write_text(json.dumps({**told, "commit": "old", "date": "2026-11-20"}))
    main([*SMALL, "--out", str(out)])
    told = json.loads(out.read_text())
    assert {name: (row["commit"], row["date"], row["device"]) for name, row in told["rows"].items()} == {
        **dict.fromkeys(NAMES[:5], ("old", "2026-11-20", "here")), "full": ("new", "2026-11-23", "here")
    }  # fmt: skip
    assert {timing["commit"] for timing in told["timings"].values()} == {"new"} and told["commit"] == "new"


def test_a_second_run_into_the_same_file_is_refused(tmp_path, judge, capsys):
    out = tmp_path / "pays.json"
    with locked(out), pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(out)])
    assert end.value.code == 2 and f"another process is writing {out}" in capsys.readouterr().err
    assert not judge.asked and not list(tmp_path.iterdir())


def test_another_device_goes_on_and_all_times_are_of_one(tmp_path, judge, monkeypatch):
    out = tmp_path / "pays.json"
    main([*SMALL, "--out", str(out)])
    told = json.loads(out.read_text())
    before = told["device"]
    del told["rows"]["full"], told["timings"]["full"]
    out.write_text(json.dumps(told))
    monkeypatch.setattr(pays, "environment", lambda device: {"device": "there", "date": "", "commit": ""})
    main([*SMALL, "--out", str(out)])
    told = json.loads(out.read_text())
    devices = {name: row["device"] for name, row in told["rows"].items()}
    assert devices == {**dict.fromkeys(NAMES[:5], before), "full": "there"} and len(judge.asked) == 7
    assert {timing["device"] for timing in told["timings"].values()} == {"there"}


def test_stories_without_returns_are_refused_in_a_line(tmp_path, judge, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--stories", "1", "--lengths", "2", "--banks", "1", "--top-k", "1", "--out", str(tmp_path / "pays.json")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "nobody comes back in these stories" in said
    assert not judge.asked and not list(tmp_path.iterdir())


def test_what_nobody_could_judge_is_drawn_as_missing():
    nothing = {"value": None, "low": None, "high": None, "count": 0}
    settings = settings_of([1], [2, 4], 4, 16)
    rows = {setting.name: {**vars(setting), "hue": nothing} for setting in settings}
    timings = {setting.cost: {"ratio": 1.5} for setting in settings}
    assert compared(rows) == []
    for name in (None, settings[0].name):
        if name:
            rows[name] = {**rows[name], "hue": vars(judged(0.9).hue)}
        for times in ({}, timings):
            assert draw(rows, times).startswith(b"\x89PNG")


def test_the_picture_does_not_follow_the_users_style():
    settings = settings_of([1], [2, 4], 4, 16)
    rows = {setting.name: {**vars(setting), "hue": vars(judged(0.9).hue)} for setting in settings}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        plain = draw(rows, {})
        matplotlib.rcParams |= {"text.usetex": True, "axes.facecolor": "black", "font.size": 40}
        assert draw(rows, {}) == plain


@pytest.mark.parametrize(
    "options",
    [("--stories", "0"), ("--banks", "0"), ("--top-k", "2", "0"), ("--seed", "9999"), ("--query-group", "-1")],
)
def test_bad_options_are_refused(tmp_path, judge, options):
    with pytest.raises(SystemExit) as end:
        main([*options, "--out", str(tmp_path / "pays.json")])
    assert end.value.code == 2 and not judge.asked and not list(tmp_path.iterdir())


DAMAGED = ("no JSON", "[]", '{"rows": {}, "timings": {}}', '{"rows": {"none": {}}}', '{"rows": [1], "timings": {}}')


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_results_are_named_before_anything_is_loaded(tmp_path, judge, capsys, monkeypatch, content):
    monkeypatch.setattr(pays, "load_checkpoint", None)
    out = tmp_path / "pays.json"
    out.write_text(content)
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(out)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert f"{out} is damaged: delete it, or restore it from git" in said
    assert out.read_text() == content


@pytest.mark.parametrize(
    "out, expected",
    [
        ("", "takes the name of a .json file"),
        ("pays.txt", "takes the name of a .json file"),
        ("/proc/deep/pays.json", "cannot write to the folder /proc/deep"),
        ("file/deep/pays.json", "file is a file"),
    ],
)
def test_places_that_cannot_be_written_to_are_named_before_anything_is_loaded(
    tmp_path, judge, capsys, monkeypatch, out, expected
):
    monkeypatch.setattr(pays, "load_checkpoint", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        main([*SMALL, "--out", str(tmp_path / out), "--restart"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and expected in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_overlapping_intervals_are_said():
    top, drawn = Setting("memflow", 3, 2, 24, "top"), Setting("memflow", 3, 2, 24, "random")

    def rows(best: float, other: float) -> dict:
        return {
            setting.name: {**vars(setting), "hue": vars(judged(value).hue), "pattern": vars(judged(value).pattern)}
            for setting, value in ((top, best), (drawn, other))
        }

    assert compared(rows(0.9, 0.4))[0].endswith("apart"), "rows that were stored without each return have no pairs"
    assert compared(rows(0.9, 0.8))[0].endswith("the intervals overlap")
    only_one = {top.name: rows(0.9, 0.8)[top.name]}
    assert compared(only_one) == []
    assert draw(only_one, {}).startswith(b"\x89PNG")


def test_differing_returns_are_judged_by_a_sign_test():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(1, 5) == 2 * (1 + 6) / 64


def test_the_toy_world_is_streamed_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(pays, "TOY_SETTINGS", replace(TOY_SETTINGS, steps=1))
    monkeypatch.setattr("memflow_ops.model.toy.evaluation.evaluate.TIMED_CHUNKS", range(2, 4))
    out = tmp_path / "pays.json"
    main([*SMALL, "--out", str(out)])
    said = json.loads(out.read_text())
    assert list(said["rows"]) == NAMES
    shares = {name: row["activated"] for name, row in said["rows"].items()}
    assert shares == dict(zip(NAMES, (0.125, 0.125, 0.125, 1.0, None, None), strict=True))
    assert all(row["hue"]["count"] >= 1 for row in said["rows"].values())
    assert said["timings"]["none"]["ratio"] == 1 and all(timing["ratio"] for timing in said["timings"].values())
