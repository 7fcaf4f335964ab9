"""tools/curves.py: what metrics.jsonl and scores.jsonl hold, over hours, each run in a look of its own.

    pytest tests/test_curves.py
"""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

pytest.importorskip("matplotlib")

from tools.curves import figure_of, main  # noqa: E402
from train_prx import UserError  # noqa: E402

pytestmark = pytest.mark.machinery


def train(step: int, **values) -> dict:
    """A training line, 36 s a step."""
    return {"step": step, "loss": 2 / step, "flow": 1 / step, "grad_norm": 0.1 + 1 / step, "lr": 1e-3,
            "images_per_second": 200.0, "seconds": 36.0 * step, "skipped": 0} | values


def score(step: int, metric: str = "cmmd", seconds: float | None = None, **how) -> dict:
    names = ["objects", "exact", "place", "scenes"] if metric == "scenes" else [metric]
    return {"step": step, "seconds": seconds, "metric": metric, "values": {name: 0.5 + 1 / step for name in names},
            "errors": {name: 0.01 * step for name in names}, "n": 256, "seed": 0, "guidance": "cfg", "scale": 2.0,
            "steps": 20, "network": "", "data": "", "weights": "0"} | how


def whole_run(steps: int = 40) -> list[dict]:
    lines = [train(step, lpips=0.5 + 1 / step, repa=-0.6 + 0.5 / step) for step in range(1, steps + 1)]
    return lines + [{"step": step, "held_out": 0.2 + 1 / step, "seconds": 36.0 * step} for step in range(10, steps, 10)]


def write(folder: Path, lines: list[dict], scores: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("metrics", lines), ("scores", scores)):
        if rows is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def panels(*runs: Path) -> dict:
    """Title -> axes."""
    return {axes.get_title(loc="left"): axes for axes in figure_of(list(runs)).axes}


def curves(axes) -> list:
    """The lines of a panel that carry values."""
    return [container[0] for container in axes.containers]


def look(line) -> tuple:
    return line.get_color(), line.get_marker()


def test_panels_follow_from_what_a_run_logs(tmp_path):
    one = write(tmp_path / "a", whole_run(), [score(20), score(10, "scenes")])
    assert list(panels(one)) == ["loss", "flow", "lpips", "repa", "held_out", "cmmd, 256 pictures, cfg 2.0",
                                 "scenes, 256 pictures, cfg 2.0", "grad_norm", "lr", "images_per_second"]
    other = write(tmp_path / "b", [{"step": 1, "seconds": 1.0, "pdino": 0.5, "norm/first": 1.0, "norm/last": 2.0}])
    assert list(panels(other)) == ["pdino", "norm"]
    assert list(panels(one, other))[1:6] == ["flow", "lpips", "repa", "pdino", "norm"]
    assert [text.get_text() for text in panels(other)["norm"].get_legend().get_texts()] == ["first", "last"]


def test_a_new_loss_term_of_a_fork_has_a_panel_with_its_own_name(tmp_path):
    found = panels(write(tmp_path / "run", [train(step, register_error=3.0 + step) for step in (1, 2, 3)]))
    assert list(found)[:3] == ["loss", "flow", "register_error"]
    assert list(curves(found["register_error"])[0].get_ydata()) == [4.0, 5.0, 6.0]


def test_lines_hold_the_values_of_the_file_over_hours(tmp_path):
    found = panels(write(tmp_path / "run", whole_run()))
    for name, axes in found.items():
        np.testing.assert_allclose(axes.get_xlim(), [0, 0.4], atol=0.02, err_msg=name)  # one axis for all
        (line,), logged = curves(axes), [values for values in whole_run() if name in values]
        np.testing.assert_allclose(line.get_xdata(), [values["seconds"] / 3600 for values in logged])
        assert axes.get_xlabel() == "hours" and list(line.get_ydata()) == [values[name] for values in logged]
    assert found["images_per_second"].get_ylim()[0] == 0


def test_scores_stand_at_the_time_of_their_step_with_bars_to_both_ends(tmp_path, capsys):
    scores = [score(20), score(10, seconds=180.0), score(20, values={"cmmd": 7.0}, errors={"cmmd": 0.5}), score(43)]
    folder = write(tmp_path / "run", whole_run(), scores)
    found = panels(folder)["cmmd, 256 pictures, cfg 2.0"]
    np.testing.assert_allclose(curves(found)[0].get_xdata(), [0.05, 0.2])  # its own; that of metrics.jsonl
    np.testing.assert_allclose(curves(found)[0].get_ydata(), [0.6, 7.0])  # a step that was scored again
    bars = found.containers[0][2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.5, 0.7], [6.5, 7.5]])
    assert capsys.readouterr().err == f"warning: {folder}: left out, for no file has their time: cmmd of step 43\n"


def test_scores_measured_in_different_ways_are_not_joined(tmp_path):
    scores = [score(10), score(20, n=5000), score(20, guidance="self"), score(20, network="my/clip", size=64)]
    titles = list(panels(write(tmp_path / "run", [train(10), train(20)], scores)))
    assert [title for title in titles if "cmmd" in title] == [
        "cmmd, 256 pictures, cfg 2.0", "cmmd, 5000 pictures, cfg 2.0", "cmmd, 256 pictures, self 2.0",
        "cmmd, 256 pictures of 64px, cfg 2.0 my/clip"]


@pytest.mark.parametrize("former", [False, True])
def test_scenes_share_a_panel_in_percent_told_apart_by_dashes(tmp_path, former):
    lines = [train(10), train(20)]
    if former:  # in the layout before tools/score.py
        lines += [{"step": step, "seconds": 36.0 * step, "scenes_objects": 0.5 + 1 / step, "scenes_objects_error": 0.1,
                   "scenes_exact": 0.5 + 1 / step, "scenes_exact_error": 0.1, "scenes_scenes": 0.2,
                   "scenes_scenes_error": 0.1, "scenes_place": 1.0, "scenes_place_error": 0.0} for step in (10, 20)]
    scores = [] if former else [score(10, "scenes"), score(20, "scenes")]
    axes = panels(write(tmp_path / "run", lines, scores))["scenes" if former else "scenes, 256 pictures, cfg 2.0"]
    assert axes.yaxis.get_major_formatter()(0.2) == "20%" and axes.get_ylim() == (-0.03, 1.03)
    assert [line.get_linestyle() for line in curves(axes)] == ["-", "--", ":"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["objects", "exact", "scenes"]
    assert list(curves(axes)[1].get_ydata()) == [0.6, 0.55]


def test_damaged_lines_and_values_that_are_no_numbers_are_left_out(tmp_path):
    folder = write(tmp_path / "run", [train(1), {"step": 2, "loss": 9.0}, train(3), train(4, loss=None)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\n7\n\xff\n{"step": 5, "loss": NaN, "seconds": 180}\n' + json.dumps(train(6)).encode()[:40])
    assert list(curves(panels(folder)["loss"])[0].get_ydata()) == [2.0, 2 / 3]


def test_the_axis_follows_the_bulk_and_not_a_spike(tmp_path):
    lines = [train(step, repa=-0.5 - 0.1 * math.cos(step), flow=step**-0.5) for step in range(1, 1001)]
    found = panels(write(tmp_path / "run", [lines[0] | {"repa": 9.0}, *lines[1:]]))
    (bottom, top), scale = found["repa"].get_ylim(), found["repa"].get_yscale()
    assert scale == "linear" and -0.8 < bottom < -0.6 and -0.4 < top < -0.2
    (bottom, top), scale = found["flow"].get_ylim(), found["flow"].get_yscale()
    assert scale == "log" and bottom < 1000**-0.5 and top > 1  # it spans 1.5 decades, so nothing of it is a spike


def test_ten_runs_have_ten_looks_each_the_same_in_all_panels(tmp_path):
    runs = [write(tmp_path / f"run-{i}$", whole_run(100) if i else [train(1), train(2)]) for i in range(10)]
    figure = figure_of([*runs, runs[3]])  # a run given twice is one
    (legend,) = figure.legends
    looks = [look(line) for line in legend.get_lines()]
    assert len(set(looks)) == 10 and len(legend.get_texts()) == 10
    for axes in figure.axes:
        lacks = axes.get_title(loc="left") in ("lpips", "repa", "held_out")
        assert [look(line) for line in curves(axes)] == looks[lacks:]


def test_the_command_writes_a_png_and_never_imports_pyplot(tmp_path):
    write(tmp_path / "run", whole_run())
    code = (f"import sys; sys.argv = ['curves.py', 'run']; sys.path.insert(0, {str(ROOT)!r}); import tools.curves\n"
            "tools.curves.main(sys.argv[1:]); assert 'matplotlib.pyplot' not in sys.modules, 'pyplot is imported'")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "curves.png\n"), result.stderr
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and abs(picture.size[0] - 1518) <= 1  # three columns


def test_a_mistake_is_one_line(tmp_path, monkeypatch):
    write(tmp_path / "bare", [{"step": 50, "loss": 0.3}])
    full = write(tmp_path / "full", whole_run(2))
    assert "bare has no metrics.jsonl or scores.jsonl with" in run(tmp_path, "tools/curves.py", "full", "bare").error()
    for out, why in (tmp_path, "Is a directory"), (tmp_path / "none/c.png", "No such file"), ("/dev/full", "No space"):
        with pytest.raises(UserError, match=f"^cannot write {out}: {why}"):
            main([str(full), f"--out={out}"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="^curves take matplotlib: pip install matplotlib$"):
        main([str(full)])
