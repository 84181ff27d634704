"""The evaluation as a table, as JSON and as a picture."""

import hashlib
import json

from drawn_streams import STORIES, judged

from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.evaluation.figures import KindTiming
from memflow_ops.model.toy.evaluation.report import evaluation_table, write_evaluation
from memflow_ops.model.toy.settings import TOY_SETTINGS


def test_table_picture_and_json_show_every_row(tmp_path):
    rows = [judged(), judged(turn_returns=180)]
    timings = {"memflow": KindTiming(0.5, 1.25, 1.2, 1.3)}
    lines = evaluation_table(rows, timings).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("memflow") and "100 % (" in lines[1] and " 0 % (" in lines[2]
    out = tmp_path / "deep" / "toy.json"
    assert lines[1].rstrip().endswith("+25 %")
    write_evaluation(rows, timings, TOY_SETTINGS, seed=10_000, stories=STORIES, weights=TOY_WEIGHTS, out=out)
    written = json.loads(out.read_text())
    assert [row["hue"]["value"] for row in written["rows"]] == [1.0, 0.0]
    assert written["held_out"]
    assert written["weights"]["sha256"] == hashlib.sha256(TOY_WEIGHTS.read_bytes()).hexdigest()
    assert written["settings"]["top_k"] == TOY_SETTINGS.top_k and written["seed"] == 10_000
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
