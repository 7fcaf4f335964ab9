"""The curves of training runs, over hours and laid over each other: what their metrics.jsonl and scores.jsonl hold.

    python tools/curves.py runs/a runs/b [--out=curves.png]

Panels follow from the files: every number that training logs has one, under its name there, and so has every score of
tools/score.py, with error bars to both ends of its 95% interval. A new loss term appears without an edit.
"""
import contextlib
import itertools
import json
import math
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from train_prx import Parser, UserError, run_main  # noqa: E402

ORDER = ("loss", "a term", "held_out", "a score", "grad_norm", "lr", "images_per_second")  # of panels
SHOWN = ("objects", "exact", "scenes")  # of the scores of scenes
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]  # Okabe and Ito's, but yellow
MARKERS = "os^Dv*PX"  # one for each round of colours
LOG_SPAN = 5  # largest / smallest of the values' bulk from which an axis is logarithmic; the demo's loss spans 9
WIDTH, HEIGHT = 4.6, 2.7  # of a panel, inches

Curves = dict[tuple[str, str], np.ndarray]  # (panel, line of it) -> [3, points]: hours, values, errors


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_lines(file: Path) -> list[dict]:
    """The JSON objects of a file, one a line. What is none is left out: a kill or a full disk cut it."""
    lines = []
    for row in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(row))
    return [line for line in lines if isinstance(line, dict)]


def is_number(x: object) -> bool:
    """Whether a value can be drawn: a number, neither NaN nor infinite."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e30


def read_training(lines: list[dict]) -> Curves:
    """What training logged, by name; "a/b" is line b of panel a. Former runs logged scores there, with "_error"."""
    points = defaultdict(list)
    for line in lines:
        unseen = {"step", "seconds", "skipped"} | {f"{name}_error" for name in line}
        for name, x in line.items():
            if is_number(x) and name not in unseen:
                panel, _, part = name.partition("_" if f"{name}_error" in line else "/")
                points[panel, part].append((line["seconds"] / 3600, x, line.get(f"{name}_error", 0.0)))
    return {key: np.array(rows).T for key, rows in points.items()}


def read_scores(lines: list[dict], clock: dict[int, float], run: Path) -> Curves:
    """The scores of a run, a panel for each way of measuring; the last of a step counts. `clock`: step -> seconds."""
    points, untimed = defaultdict(dict), {}
    for line in lines:
        step, metric, values, errors = (line.get(name) for name in ("step", "metric", "values", "errors"))
        seconds = clock.get(step) if line.get("seconds") is None else line["seconds"]
        if not isinstance(values, dict) or not is_number(seconds):
            untimed[step] = f"{metric} of step {step}"
            continue
        how = line.get("guidance"), line.get("scale"), line.get("network")
        size = f" of {line['size']}px" if line.get("size") else ""
        panel = f"{metric}, {line.get('n')} pictures{size}, {' '.join(str(x) for x in how if x)}".rstrip(", ")
        for name, x in values.items():
            if is_number(x):
                points[panel, name if len(values) > 1 else ""][step] = seconds / 3600, x, (errors or {}).get(name, 0.0)
    if untimed:
        print(f"warning: {run}: left out, for no file has their time: {', '.join(untimed.values())}", file=sys.stderr)
    return {key: np.array(sorted(rows.values())).T for key, rows in points.items()}


def read_run(run: Path) -> Curves:
    """What training logged in a run's folder, and its scores; raises UserError where there is nothing to draw."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if is_number(line.get("seconds"))]
    lines.sort(key=lambda line: line["seconds"])
    clock = {line.get("step"): line["seconds"] for line in reversed(lines)}
    curves = read_training(lines) | read_scores(read_lines(run / "scores.jsonl"), clock, run)
    if not curves:
        raise UserError(f"{run} has no metrics.jsonl or scores.jsonl with a line to draw")
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def fit_axis(axes, curves: list[np.ndarray]) -> None:
    """Fit an axis to what lies within half a range of each curve's middle 98%: a spike must not flatten the rest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ends = [np.concatenate([values - errors, values + errors]) for _, values, errors in curves]
    positive, bulk = min(x.min() for x in ends) > 0, []
    for x in ends:
        x = np.log(x) if positive else x
        low, high = np.quantile(x, [0.01, 0.99])
        bulk.extend(x.clip(low - (high - low) / 2, high + (high - low) / 2))
    span = max(bulk) - min(bulk)
    if positive and span > math.log(LOG_SPAN):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if span > 0:
        limits = min(bulk) - 0.05 * span, max(bulk) + 0.05 * span
        axes.set_ylim(np.exp(limits) if positive else limits)


def draw_panel(axes, panel: str, runs: list[Curves], styles: list[dict]) -> None:
    """Draw one panel of all runs, each in its style; dashes tell several lines of a run apart."""
    axes.set_title(panel, loc="left", fontsize=11)
    axes.set_xlabel("hours")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    scenes = panel.split(",")[0] == "scenes"
    parts = dict.fromkeys(part for curves in runs for name, part in curves if name == panel)
    dashes = dict(zip([part for part in parts if part in SHOWN or not scenes], itertools.cycle(("-", "--", ":", "-."))))
    drawn = []
    for curves, style in zip(runs, styles, strict=True):
        for part in (part for part in dashes if (panel, part) in curves):
            hours, values, errors = curves[panel, part]
            axes.errorbar(hours, values, errors if errors.any() else None, elinewidth=1, capsize=2,
                          linestyle=dashes[part], markevery=1 + len(hours) // 20, **style)
            drawn.append(curves[panel, part])
    if scenes:
        axes.set_ylim(-0.03, 1.03)  # half of a marker beyond either end
        axes.yaxis.set_major_formatter("{x:.0%}")
    elif panel in ("lr", "images_per_second"):
        axes.set_ylim(bottom=0)
    else:
        fit_axis(axes, drawn)
    if len(dashes) > 1:
        for part in dashes:
            axes.plot([], [], color="0.3", linestyle=dashes[part], label=part or panel)
        axes.legend(fontsize=8, framealpha=0.6)


def figure_of(runs: list[Path]):
    """The runs in these folders as a matplotlib Figure; raises UserError where one is empty or matplotlib missing."""
    try:  # never pyplot: a figure of its own takes no display, no backend and no global state
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves take matplotlib: pip install matplotlib") from None
    runs = list({run.resolve(): run for run in runs}.values())  # a run given twice is one
    found = [read_run(run) for run in runs]
    panels = dict.fromkeys(panel for curves in found for panel, _ in curves)  # as they first appear
    kinds = {panel: panel if panel in ORDER else "a score" if ", " in panel else "a term" for panel in panels}
    panels = sorted(panels, key=lambda panel: ORDER.index(kinds[panel]))
    styles = [{"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)],
               "markersize": 3, "linewidth": 1.1} for i in range(len(runs))]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = [textwrap.fill(str(run).replace("$", r"\$"), 30) for run in runs]  # 30 fit a panel, even if each is a W
    legend = 0.2 * math.ceil(len(runs) / columns) * max(len(label.splitlines()) for label in labels)  # inches

    figure = Figure((WIDTH * columns, HEIGHT * rows + legend + 0.2), dpi=110, layout="constrained")
    end = max(curve[0].max() for curves in found for curve in curves.values()) or 1
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place, xlim=(-0.02 * end, 1.02 * end))
        draw_panel(axes, panel, found, styles)
    handles = [figure.axes[0].plot([], [], **style)[0] for style in styles]
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=columns, fontsize=9)
    return figure


def main(argv: list[str]) -> None:
    parser = Parser(prog="curves.py", description="Draw the curves of runs, over each other.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, with its metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG to write")
    args = parser.parse_args(argv)
    figure = figure_of(args.runs)
    try:
        figure.savefig(args.out, format="png")
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(args.out)


if __name__ == "__main__":
    run_main(main)
