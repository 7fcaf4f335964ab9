"""What one change does to a run: the same seeds, one flag or patch changed at a time, time to the target and final score.

    python benchmarks/ablate.py --preset=race --seeds=0,1 base dense=--drop=0 "sprint=records/levers/sprint.patch --drop=0.75"

An arm is a name, "=", and what it changes: flags of train_prx.py and patches of the source, separated by spaces; `base`
changes nothing. Runs are made seed by seed, so that a slow spell of the machine meets all arms, and --jobs at a time, each
with its share of the cores. Started again, the same command makes only what is missing. A folder --out holds for each run
log.txt, metrics.jsonl and made_by.json, its flags and the hash of its sources; and table.md and plot.png for all of them.
"""
import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import Parser, run_main  # noqa: E402
from rules import TRACKS, sha256  # noqa: E402
from shards import UserError  # noqa: E402


class Arm(NamedTuple):
    """A change: its name, the patches and the flags that make it."""
    name: str
    patches: tuple[Path, ...]
    flags: tuple[str, ...]


class Outcome(NamedTuple):
    """What a finished run gives."""
    score: float           # at the end, a share
    seconds: float         # on its clock
    to_target: float | None  # seconds at its first score that is the target or more; None where there is none
    rate: float            # images/s, the median of its windows


def parse_arm(text: str) -> Arm:
    """"name=flags and patches" -> Arm; raises argparse's error."""
    name, _, change = text.partition("=")
    words = shlex.split(change)
    patches = tuple(Path(word).resolve() for word in words if not word.startswith("--"))
    missing = [str(patch) for patch in patches if not patch.is_file()]
    if not name.replace("-", "").replace("_", "").isalnum() or missing:
        why = f"there is no {missing[0]}" if missing else "a name is of letters, digits, - and _"
        raise argparse.ArgumentTypeError(f"{text!r}: {why}")
    return Arm(name, patches, tuple(word for word in words if word.startswith("--")))


def parse_seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def lay_out(arm: Arm, folder: Path) -> str:
    """Put the sources with the arm's patches into `folder`, beside the data; their hash. Raises UserError where a patch fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source in ROOT.glob("*.py"):
        shutil.copy(source, folder)
    (folder / "data").symlink_to(Path("data").resolve())
    for patch in arm.patches:
        done = subprocess.run(["git", "apply", str(patch)], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())})
        if done.returncode:
            raise UserError(f"arm {arm.name}: {patch} does not apply: {done.stderr.strip().splitlines()[0]}")
    return sha256("".join(source.read_text() for source in sorted(folder.glob("*.py"))))


def train(folder: Path, flags: list[str], threads: int) -> None:
    """Train the sources in `folder`; raises UserError, with the last thing they say, where they fail."""
    done = subprocess.run([sys.executable, "train_prx.py", *flags], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise UserError(f"{folder.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def outcome(folder: Path, score: str, target: float) -> Outcome | None:
    """What the run in `folder` gave; None where it has not finished."""
    log = folder / "log.txt"
    if not log.exists() or "  finished at step " not in log.read_text()[-2000:]:
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [(line["seconds"], line[score]) for line in lines if score in line]
    seconds, last = scores[-1]
    return Outcome(last, seconds, next((when for when, value in scores if value >= target), None),
                   statistics.median(line["images_per_second"] for line in lines if "images_per_second" in line))


def spread(values: list[float], form: str) -> str:
    """Mean and, of several values, standard deviation."""
    deviation = f" +- {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return f"{format(statistics.mean(values), form)}{deviation}"


def describe(arm: Arm) -> str:
    return " ".join([*(patch.name for patch in arm.patches), *arm.flags]) or "nothing"


def table(arms: list[Arm], found: dict[str, list[Outcome]], target: float) -> str:
    """The arms in the order given, as Markdown; +- is one standard deviation over seeds."""
    rows = [("arm", "changed", "seeds", "score at the end", f"seconds to {target:.0%}", "seconds in all", "images/s"), ("---",) * 7]
    for arm in arms:
        runs = found[arm.name]
        reached = [run.to_target for run in runs if run.to_target is not None]
        some = f", {len(reached)} of {len(runs)} seeds" if len(reached) < len(runs) else ""
        rows.append((arm.name, describe(arm), str(len(runs)), spread([run.score for run in runs], ".1%"),
                     spread(reached, ".0f") + some if reached else "not reached",
                     spread([run.seconds for run in runs], ".0f"), spread([run.rate for run in runs], ".0f")))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot(arms: list[Arm], found: dict[str, list[Outcome]], target: float, out: Path) -> None:
    """A row an arm: score at the end and seconds on the clock, a point a run and a bar at their mean; dots mark the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(arms)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, title in zip(panels, ("score at the end, %", "seconds on the clock")):
        for row, arm in enumerate(arms):
            values = [run.seconds if panel is panels[1] else 100 * run.score for run in found[arm.name]]
            panel.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.6)
            panel.plot(statistics.mean(values), row, "|", color="black", markersize=14)
        panel.set_xlabel(title)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].axvline(100 * target, color="0.5", linestyle=":")
    panels[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    panels[0].invert_yaxis()
    figure.savefig(out, dpi=110)


def main(argv: list[str]) -> None:
    parser = Parser(prog="ablate.py", description="Change one flag or patch at a time, over the same seeds.")
    parser.add_argument("arms", nargs="+", type=parse_arm, help="name=flags and patches; a name alone changes nothing")
    parser.add_argument("--preset", default="race", choices=[track.preset for track in TRACKS.values() if track.preset != "record"],
                        help="what the arms change")
    parser.add_argument("--seeds", type=parse_seeds, default="0,1", help="comma list")
    parser.add_argument("--flags", type=shlex.split, default=[], help="flags of every arm, such as --stages=64:600:32:1")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs, the table and the plot")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a CPU: each is slower than alone, all alike")
    parser.add_argument("--score_every", type=int, default=100, help="steps between scores: how exactly a time to the target is known")
    args = parser.parse_args(argv)
    track = next(track for track in TRACKS.values() if track.preset == args.preset)
    score = track.metric
    names = [arm.name for arm in args.arms]
    if len(set(names)) < len(names) or args.jobs < 1:
        raise UserError("every arm needs a name of its own, and --jobs is 1 or more")
    for data in track.data:
        if not Path(data).exists():
            raise UserError(f"no data at {data}: `./run.sh {track.preset} --max_steps=1` makes it")
    common = [f"--preset={args.preset}", "--resume=never", "--score=scenes", f"--score_n={track.score_n}",
              f"--score_every={args.score_every}", "--eval_every=0", "--sample_every=0", "--save_every=0", *args.flags]
    sources = {arm: lay_out(arm, args.out / "sources" / arm.name) for arm in args.arms}
    todo = []
    for seed in args.seeds:
        for arm in args.arms:
            folder = args.out / f"{arm.name}-seed-{seed}"
            made_by = json.dumps({"flags": [*common, *arm.flags], "sources": sources[arm]}, indent=2) + "\n"
            if outcome(folder, score, track.target) is None:
                todo.append((arm, seed, folder, made_by))
            elif not (folder / "made_by.json").exists() or (folder / "made_by.json").read_text() != made_by:
                raise UserError(f"{folder} was made with other flags or sources: put those back, delete it, or name another --out")

    def run(arm: Arm, seed: int, folder: Path, made_by: str) -> None:
        laid_out, name = args.out / "sources" / arm.name, f"seed-{seed}"
        flags = [*common, *arm.flags, f"--seed={seed}", f"--name={name}"]
        train(laid_out, flags, max(1, len(os.sched_getaffinity(0)) // args.jobs))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made_by.json").write_text(made_by)
        for file in ("metrics.jsonl", "log.txt"):
            shutil.copy(laid_out / "runs" / name / file, folder)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for done in tqdm(as_completed([pool.submit(run, *each) for each in todo]), "ablation", len(todo), unit=" runs"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has begun ends; nothing else begins
            raise
    found = {arm.name: [outcome(args.out / f"{arm.name}-seed-{seed}", score, track.target) for seed in args.seeds]
             for arm in args.arms}
    text = table(args.arms, found, track.target)
    (args.out / "table.md").write_text(text)
    plot(args.arms, found, track.target, args.out / "plot.png")
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
