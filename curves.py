"""curves.png: what the metrics.jsonl of one or several training runs hold, over training hours.

A training process may draw: pyplot, with its global figures and backend, is never imported.
"""
import json
import math
import os
import textwrap
from pathlib import Path

import numpy as np

from shards import UserError

# Title of a panel: the names whose values it shows; scores come with their errors
SCENES = {"scenes_objects": "-", "scenes_exact": "--", "scenes_scenes": ":"}  # told apart by dashes: the colour is the run's
SCORES = {"scenes drawn right": [*SCENES], "CMMD": ["cmmd"], "DINO-MMD": ["mmd"], "FDD": ["fdd"], "FID": ["fid"]}
PANELS = {"loss": ["loss"], "flow": ["flow"], "lpips": ["lpips"], "pdino": ["pdino"], "repa": ["repa"],
          "held-out loss": ["held_out"], **SCORES, "gradient norm": ["grad_norm"], "images/s": ["images_per_second"]}
# Okabe and Ito's colours, which the colour-blind tell apart, without yellow, which is faint on white
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
MARKERS = "os^Dv*PX"  # one for each round of colours
FEW = 60  # points; longer lines have no markers in the first round of colours, and a few in the others
LOG_SPAN = 5  # largest / smallest of the values' bulk from which an axis is logarithmic; the demo's loss spans 9
WIDTH, HEIGHT = 4.6, 2.7  # of a panel, inches
LETTERS = 7  # to an inch of the legend, even if each is a W


def read_run(file: Path) -> dict[str, np.ndarray]:
    """What a metrics.jsonl has to draw: name -> [3, points], hours, values and errors (half of the 95% interval).

    Lines that are no JSON object are left out: a kill or a full disk cut them. Raises UserError where nothing is left.
    """
    try:
        rows = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    lines = []
    for row in rows:
        try:
            values = json.loads(row)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            lines.append({name: x for name, x in values.items() if isinstance(x, int | float) and abs(x) < 1e30})
    lines = sorted((line for line in lines if "seconds" in line), key=lambda line: line["seconds"])
    curves = {}
    for title, names in PANELS.items():
        for name in names:
            needed = {name, f"{name}_error"} if title in SCORES else {name}
            points = [(line["seconds"] / 3600, line[name], abs(line.get(f"{name}_error", 0))) for line in lines
                      if needed <= line.keys()]
            if points:
                curves[name] = np.array(points).T
    if not curves:
        raise UserError(f"{file} has no line to draw")
    return curves


def labels_of(files: list[Path]) -> list[str]:
    """The names of the runs' folders, each with as many folders above it as tell it from the others."""
    paths = [(file.parent if file.name == "metrics.jsonl" else file).parts for file in files]
    depths = [next(n for n in range(1, len(mine) + 1) if sum(path[-n:] == mine[-n:] for path in paths) == 1) for mine in paths]
    return [str(Path(*path[-depth:])) for path, depth in zip(paths, depths, strict=True)]


def fit_axis(panel, curves: list[np.ndarray]) -> None:
    """Fit a panel's y axis to the bulk of `curves`, values and errors [2, points] each: a spike must not flatten the rest.

    The bulk of a curve is what lies within half a range of its middle 98%.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = [np.concatenate([values - errors, values + errors]) for values, errors in curves]
    middle = np.array([np.quantile(values, [0.01, 0.99]) for values in curves])  # [curves, 2]
    logarithmic = min(values.min() for values in curves) > 0 and middle.max() > LOG_SPAN * middle.min()
    if logarithmic:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if middle.max() < 100 * middle.min() else (1,)))
        panel.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        middle, curves = np.log10(middle), [np.log10(values) for values in curves]
    reach = middle + [[-0.5, 0.5]] * np.diff(middle)  # [curves, 2]
    bottom = min(max(values.min(), low) for values, (low, _) in zip(curves, reach, strict=True))
    top = max(min(values.max(), high) for values, (_, high) in zip(curves, reach, strict=True))
    if top > bottom:
        limits = np.array([bottom, top]) + 0.05 * (top - bottom) * np.array([-1, 1])
        panel.set_ylim(10 ** limits if logarithmic else limits)


def draw_panel(panel, title: str, runs: list[dict[str, np.ndarray]], styles: list[dict]) -> None:
    """Draw what PANELS names under `title` of all runs, each in its style."""
    from matplotlib.lines import Line2D

    panel.set_title(title, loc="left", fontsize=11)
    panel.set_xlabel("hours")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    drawn = [(curves[name], style | {"linestyle": SCENES.get(name, "-")})
             for curves, style in zip(runs, styles, strict=True) for name in PANELS[title] if name in curves]
    for (hours, values, errors), style in drawn:
        if len(hours) > FEW:
            style |= {"linewidth": 0.9, "alpha": 0.8}
            style |= {"marker": ""} if style["marker"] == MARKERS[0] else {"markevery": 0.2}  # of the panel's diagonal
        if title in SCORES:
            panel.errorbar(hours, values, errors, elinewidth=1, capsize=2, **style)
        else:
            panel.plot(hours, values, **style)
    if title == "images/s":
        panel.set_ylim(bottom=0)
    elif title == "scenes drawn right":
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter("{x:.0%}")
        for line, _, _ in panel.containers:
            line.set_clip_on(False)  # or half of each marker at 100% is cut
        keys = [Line2D([], [], color="0.3", linestyle=dashes, label=name.removeprefix("scenes_"))
                for name, dashes in SCENES.items() if any(name in curves for curves in runs)]
        panel.legend(handles=keys, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9,
                     borderpad=0, handlelength=1.8, handletextpad=0.4, columnspacing=1)  # beside the title
    else:
        fit_axis(panel, [points[1:] for points, _ in drawn])


def figure_of(runs: list[Path]):
    """The matplotlib Figure of draw_curves: a panel for all that some run has, one colour and marker for each run."""
    try:
        from matplotlib import lines
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves.png takes matplotlib: pip install matplotlib") from None
    files = [Path(os.path.abspath(run / "metrics.jsonl" if run.is_dir() else run)) for run in runs]  # "." has no name
    files = list(dict.fromkeys(files))  # a run given twice is one
    found = [read_run(file) for file in files]
    titles = [title for title, names in PANELS.items() if any(name in curves for curves in found for name in names)]
    styles = [{"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)], "markersize": 4,
               "linewidth": 1.3} for i in range(len(files))]
    columns = min(3, len(titles))
    width, rows = WIDTH * columns, math.ceil(len(titles) / columns)
    labels = [textwrap.fill(label, int((width - 1) * LETTERS)) for label in labels_of(files)]
    across = max(1, int(width * LETTERS) // (max(map(len, labels)) + 8))  # runs side by side in the legend
    deep = math.ceil(len(files) / across)
    text_lines = deep * max(label.count("\n") + 1 for label in labels)

    figure = Figure((width, HEIGHT * rows + 0.22 * (text_lines + 1)), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    end = max(hours[-1] for curves in found for hours, _, _ in curves.values()) or 1
    for place, title in enumerate(titles, 1):
        panel = figure.add_subplot(rows, columns, place, xlim=(-0.02 * end, 1.02 * end))  # the same time in all panels
        draw_panel(panel, title, found, styles)
    legend = figure.legend([lines.Line2D([], [], **style) for style in styles], labels, loc="outside upper center",
                           frameon=False, ncols=math.ceil(len(files) / deep))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may hold $
    return figure


def draw_curves(runs: list[Path], out: Path) -> None:
    """Draw `runs`, folders that hold metrics.jsonl or such files, over each other into `out`, as PNG.

    Raises UserError where a run has nothing to draw, `out` cannot be written, or matplotlib is not installed.
    """
    figure = figure_of(runs)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
