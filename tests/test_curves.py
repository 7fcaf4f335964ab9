"""curves.py: curves.png shows what metrics.jsonl holds, over hours, each run in a look of its own, with nothing cut off.

    pytest tests/test_curves.py
"""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib")

from curves import draw_curves, figure_of  # noqa: E402
from shards import UserError  # noqa: E402

pytestmark = pytest.mark.machinery

DEMO = ROOT / "records/demo"
TERMS = ["loss", "flow", "lpips", "pdino", "repa"]
SCORES = {"cmmd": "CMMD", "mmd": "DINO-MMD", "fdd": "FDD", "fid": "FID"}  # name -> title
SCENES = {"scenes_objects": "-", "scenes_exact": "--", "scenes_scenes": ":"}  # name -> dashes
ALL = [*TERMS, "held-out loss", "scenes drawn right", *SCORES.values(), "gradient norm", "images/s"]


def train(step: int, **values) -> dict:
    """A training line, 36 s a step."""
    return {"step": step, "loss": 2 / step, "flow": 1 / step, "grad_norm": 0.1 + 1 / step, "grad_norm/blocks.0": 0.1,
            "weight_norm/blocks.0": 28.0, "update_norm/blocks.0": 0.9, "lr": 1e-3, "images_per_second": 200.0,
            "seconds": 36.0 * step, "skipped": 0} | values


def scores(step: int) -> dict:
    values = {name: 3 + i + 40 / step for i, name in enumerate(SCORES)} | {"scenes_objects": 0.9, "scenes_exact": 0.7,
                                                                           "scenes_scenes": 0.5, "scenes_place": 1.0}
    return {"step": step, "seconds": 36.0 * step, **values, **{f"{name}_error": x / 50 for name, x in values.items()}}


def whole_run(steps: int = 40) -> list[dict]:
    """All that a run can hold: every term, held-out losses, scores."""
    lines = []
    for step in range(1, steps + 1):
        lines.append(train(step, lpips=0.5 + 1 / step, pdino=0.4 + 1 / step, repa=-0.6 + 0.5 / step))
        if step % 10 == 0:
            lines += [{"step": step, "held_out": 0.2 + 1 / step, "seconds": 36.0 * step + 1}, scores(step)]
    return lines


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def panels(runs: list[Path]) -> dict:
    """Title -> axes."""
    return {axes.get_title(loc="left"): axes for axes in figure_of(runs).axes}


def curves(axes) -> list:
    """The lines of a panel that carry values, not the caps of their error bars."""
    return [bar[0] for bar in axes.containers] or list(axes.lines)


def bars(container) -> np.ndarray:
    """Lower and upper ends of error bars [points, 2]."""
    return np.array([segment[:, 1] for segment in container[2][0].get_segments()])


def look(line) -> tuple:
    return line.get_color(), line.get_marker()


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def test_a_panel_is_there_for_what_a_run_holds_and_only_then(tmp_path):
    assert list(panels([DEMO])) == ["loss", "flow", "held-out loss", "scenes drawn right", "gradient norm", "images/s"]
    assert list(panels([write(tmp_path / "all", whole_run())])) == ALL
    assert list(panels([write(tmp_path / "scored", [scores(1)])])) == ["scenes drawn right", *SCORES.values()]
    one = write(tmp_path / "term", [{"step": 1, "seconds": 1.0, "repa": -0.5}])
    assert list(panels([one])) == ["repa"]
    assert list(panels([DEMO, one])) == ["loss", "flow", "repa", "held-out loss", "scenes drawn right", "gradient norm",
                                         "images/s"]


def test_lines_hold_the_values_of_the_file_over_hours(tmp_path):
    found = panels([write(tmp_path / "run", whole_run())])
    for title, axes in found.items():
        assert axes.get_xlabel() == "hours"
        np.testing.assert_allclose(axes.get_xlim(), [0, 0.4], atol=0.02, err_msg=title)  # one axis for all
    for name in TERMS:
        (line,) = curves(found[name])
        expected = [values for values in whole_run() if name in values]
        np.testing.assert_allclose(line.get_xdata(), [0.01 * values["step"] for values in expected])
        assert list(line.get_ydata()) == [values[name] for values in expected]
    (line,) = curves(found["held-out loss"])
    np.testing.assert_allclose(line.get_xdata(), [0.1 + 1 / 3600, 0.2 + 1 / 3600, 0.3 + 1 / 3600, 0.4 + 1 / 3600])
    np.testing.assert_allclose(line.get_ydata(), [0.3, 0.25, 0.2 + 1 / 30, 0.225])
    assert list(curves(found["images/s"])[0].get_ydata()) == [200.0] * 40 and found["images/s"].get_ylim()[0] == 0
    assert curves(found["gradient norm"])[0].get_ydata()[1] == 0.6


def test_error_bars_reach_the_error_to_both_sides(tmp_path):
    found = panels([write(tmp_path / "run", [scores(10), scores(20)])])
    for name, title in SCORES.items():
        (container,) = found[title].containers
        values = [scores(step)[name] for step in (10, 20)]
        np.testing.assert_allclose(bars(container), [[x - x / 50, x + x / 50] for x in values])


def test_scenes_share_a_panel_in_percent_told_apart_by_dashes(tmp_path):
    run = write(tmp_path / "run", [scores(10), scores(20)])
    axes = panels([run])["scenes drawn right"]
    assert axes.get_ylim() == (0, 1)
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert [line.get_linestyle() for line in curves(axes)] == list(SCENES.values())
    assert not any(line.get_clip_on() for line in curves(axes)), "a marker at 100% is whole"
    for container, name in zip(axes.containers, SCENES, strict=True):
        x = scores(10)[name]
        np.testing.assert_allclose(container[0].get_ydata(), [x, x])
        np.testing.assert_allclose(bars(container), [[0.98 * x, 1.02 * x]] * 2)
    key = axes.get_legend()
    assert [text.get_text() for text in key.get_texts()] == ["objects", "exact", "scenes"]
    assert [line.get_linestyle() for line in key.get_lines()] == list(SCENES.values())


def test_a_score_without_its_error_is_not_shown(tmp_path):
    run = write(tmp_path / "run", [train(1), {"step": 1, "seconds": 1.0, "cmmd": 2.0, "fid": 9.0, "fid_error": 1.0}])
    assert set(panels([run])) & {"CMMD", "FID"} == {"FID"}


def test_a_cut_line_and_a_line_without_time_are_ignored(tmp_path):
    run = write(tmp_path / "run", [train(1), {"step": 2, "loss": 9.0}, train(3), {"step": 4, "loss": None, "seconds": 144.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n7\n{"step": 5, "loss": NaN, "seconds": 180}\n' + json.dumps(train(6))[:40])
    (line,) = curves(panels([run])["loss"])
    assert list(line.get_ydata()) == [2.0, 2 / 3]


def test_scores_measured_later_stand_at_their_own_time(tmp_path):
    (line,) = curves(panels([write(tmp_path / "run", [scores(20), scores(10), train(20)])])["FID"])
    np.testing.assert_allclose(line.get_xdata(), [0.1, 0.2])


def test_the_axis_follows_the_bulk_and_not_a_spike(tmp_path):
    lines = [train(step, lpips=0.5 + 0.1 * math.cos(step), repa=-0.5 - 0.1 * math.cos(step), flow=step ** -0.5)
             for step in range(1, 1001)]
    found = panels([write(tmp_path / "run", [lines[0] | {"lpips": 50.0, "repa": 9.0}, *lines[1:]])])
    bottom, top = found["lpips"].get_ylim()
    assert found["lpips"].get_yscale() == "linear" and 0.3 < bottom < 0.4 and 0.6 < top < 0.8
    bottom, top = found["repa"].get_ylim()
    assert found["repa"].get_yscale() == "linear" and -0.8 < bottom < -0.6 and -0.4 < top < -0.2
    bottom, top = found["flow"].get_ylim()  # spans 1.5 decades, so nothing of it is a spike
    assert found["flow"].get_yscale() == "log" and bottom < 1000 ** -0.5 and top > 1


def test_without_a_spike_all_points_and_error_bars_lie_inside(tmp_path):
    for title, axes in (panels([DEMO]) | panels([write(tmp_path / "run", whole_run())])).items():
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert all(left < line.get_xdata().min() and line.get_xdata().max() < right for line in curves(axes)), title
        ends = [bars(container) for container in axes.containers] or [line.get_ydata() for line in axes.lines]
        assert all(bottom <= values.min() and values.max() <= max(top, 1) for values in ends), title


# ---------------------------------------------------------------------------------------------------------------------
# Telling runs apart


def test_a_run_has_one_look_in_all_panels_and_ten_runs_have_ten(tmp_path):
    runs = [write(tmp_path / f"run-{i}", whole_run()) for i in range(10)]
    figure = figure_of(runs)
    (legend,) = figure.legends
    looks = [look(line) for line in legend.get_lines()]
    assert [text.get_text() for text in legend.get_texts()] == [run.name for run in runs]
    assert len(set(looks)) == 10
    for axes in figure.axes:
        repeated = [one for one in looks for _ in range(3 if axes.get_title(loc="left") == "scenes drawn right" else 1)]
        assert [look(line) for line in curves(axes)] == repeated
        for container in axes.containers:
            assert np.allclose(container[2][0].get_color()[0][:3], rgb(container[0].get_color()))


def rgb(colour: str) -> list[float]:
    return [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]


def test_a_long_line_has_no_markers_until_the_colours_run_out(tmp_path):
    axes = panels([write(tmp_path / f"run-{i}", whole_run(100)) for i in range(10)])["loss"]
    first = axes.lines[0].get_color()
    again = [line.get_color() for line in axes.lines].index(first, 1)
    assert [line.get_marker() for line in axes.lines[:again]] == [""] * again
    assert all(line.get_marker() and line.get_markevery() for line in axes.lines[again:])
    assert len({look(line) for line in axes.lines}) == 10


def test_a_run_lacking_a_panel_does_not_shift_the_colours(tmp_path):
    bare, full = write(tmp_path / "bare", [train(1), train(2)]), write(tmp_path / "full", whole_run())
    found = panels([bare, full])
    assert look(curves(found["repa"])[0]) == look(curves(found["loss"])[1]) != look(curves(found["loss"])[0])


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    runs = [write(tmp_path / name, [train(1)]) for name in ("a/x/run", "b/x/run", "b/run", "other")]
    monkeypatch.chdir(tmp_path / "other")

    def labels(*given: Path) -> list[str]:
        return [text.get_text() for text in figure_of(list(given)).legends[0].get_texts()]

    assert labels(*runs) == ["a/x/run", "b/x/run", "b/run", "other"]
    assert labels(*runs[1:]) == ["x/run", "b/run", "other"]
    assert labels(Path("."), Path("metrics.jsonl"), runs[0]) == ["other", "run"], "a run given twice is one"
    os.rename(runs[0] / "metrics.jsonl", tmp_path / "older.jsonl")
    assert labels(tmp_path / "older.jsonl", runs[1] / "metrics.jsonl") == ["older.jsonl", "run"]


# ---------------------------------------------------------------------------------------------------------------------
# The picture


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [
    ["demo"], ["scenes"], ["a", "b", "c"], [f"some-name-{i}" for i in range(10)], ["W" * 200, "m" * 90, "n"],
    [f"_{i}_$^$" for i in range(30)]], ids=["demo", "scenes", "three", "ten", "long", "thirty"])
def test_no_text_is_cut_off_or_overlaps_another(tmp_path, names):
    with_errors = [*SCENES, *(f"{name}_error" for name in SCENES)]
    if names == ["demo"]:
        figure = figure_of([DEMO])
    elif names == ["scenes"]:  # the narrowest figure, with the fullest title line
        figure = figure_of([write(tmp_path / "scenes", [{name: scores(9)[name] for name in ("seconds", *with_errors)}])])
    else:
        figure = figure_of([write(tmp_path / name, whole_run(20)) for name in names])
    figure.canvas.draw()
    boxes = []
    for axes in figure.axes:
        area = axes.get_window_extent().padded(1)  # matplotlib keeps labels of ticks outside of it, which it does not draw
        ticks = [label for label in axes.get_xticklabels() if area.containsx(label.get_window_extent().intervalx.mean())]
        ticks += [label for label in axes.get_yticklabels() if area.containsy(label.get_window_extent().intervaly.mean())]
        key = axes.get_legend()
        boxes += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *ticks, *(key.get_texts() if key else [])]
    boxes += figure.legends[0].get_texts()
    boxes = {f"{i} {text.get_text()}": text.get_window_extent() for i, text in enumerate(boxes) if text.get_text()}
    assert {name.split(" ", 1)[1].replace("\n", "") for name in boxes} >= set(names)
    for name, box in boxes.items():
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{name} is cut off"
    for (one, a), (two, b) in itertools.combinations(boxes.items(), 2):
        assert not (min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0)), f"{one} overlaps {two}"
    panel = figure.axes[0].get_window_extent()
    assert panel.width > 300 and panel.height > 205, "what the legend takes is added to the figure"


def test_the_picture_is_a_white_png_of_three_columns(tmp_path):
    draw_curves([DEMO], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and abs(picture.size[0] - 1518) <= 1  # pixels; matplotlib 3.10 rounds the other way
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.slow
def test_drawing_leaves_pyplot_and_the_backend_alone(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import curves; from pathlib import Path\n"
            "assert 'matplotlib' not in sys.modules, 'imported with curves'\n"
            f"curves.draw_curves([Path({str(DEMO)!r})], Path('curves.png'))\n"
            "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules, 'pyplot is imported'\n"
            "import matplotlib; assert not matplotlib.get_backend(auto_select=False), 'a backend is chosen'")
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "curves.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def message(runs: list[Path], out: Path) -> str:
    with pytest.raises(UserError) as error:
        draw_curves(runs, out)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_without_lines_is_one_line_of_error(tmp_path):
    out, bare = tmp_path / "curves.png", tmp_path / "bare"
    bare.mkdir()
    assert message([DEMO, bare], out) == f"cannot read {bare}/metrics.jsonl: No such file or directory"
    assert message([tmp_path / "none"], out) == f"cannot read {tmp_path}/none: No such file or directory"
    for text in ("", '{"step": 50, "loss": 0.3', '{"step": 50, "loss": 0.3}\n', '{"lr": 1, "seconds": 3}\n', "[1]\n\xff\n"):
        (bare / "metrics.jsonl").write_bytes(text.encode("latin-1"))
        assert message([DEMO, bare], out) == f"{bare}/metrics.jsonl has no line to draw"
    assert not out.exists()


def test_an_unwritable_out_is_one_line_of_error(tmp_path):
    assert message([DEMO], tmp_path) == f"cannot write {tmp_path}: Is a directory"
    lost = tmp_path / "none/curves.png"
    assert message([DEMO], lost) == f"cannot write {lost}: No such file or directory"
    assert message([DEMO], Path("/dev/full")) == "cannot write /dev/full: No space left on device"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert message([DEMO], tmp_path / "curves.png") == "curves.png takes matplotlib: pip install matplotlib"
