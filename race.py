"""Enter a record, verify one, list them all. The rules, and how to enter, are in records/README.md.

    python race.py enter  records/NAME [-- flags of train_prx.py]   train the baseline and this working tree in turns, and claim
    python race.py verify records/NAME [--rerun=3]                  check the logs, then train again: yes or no
    python race.py table [--write]                                  each track's records, made from their folders

A record is a folder:
    seed-K/ baseline-K/   log.txt, metrics.jsonl: the runs, those of the baseline where a ratio is claimed; a log holds its source
    record.json           the claim: what the logs give, who made it, what changed, and on which record it builds
    change.patch          the sources against those of that record; a baseline builds on none
    README.md grid.png    what changed and why; what seed 0 draws

Nothing out of a record is executed before all of `rules.CHECKS` have passed, and nothing is unpickled.
"""
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from command_line import Parser, run_main
from rules import (
    CHECKS, HERE, OF_RUNS, QUIET, TO_WRITE, TRACKS, WINDOW, Record, Refusal, Run, Track, baseline_of, check_claim,
    check_described, check_rules, claim_of, differences, load_arms, load_record, load_run, need, patch, ratio_text, read_json,
    source_hash, time_text)
from shards import UserError, file_sha256

WATCH_SLACK = 1.0, 0.02  # seconds and share: lines arrive late where all cores are at work
RATIO_SPREAD = 0.11  # share: standard deviation of a ratio between pairs of runs, in 2026-11-22-demo-patch16
MARKERS = "<!-- records: written by `python race.py table --write` -->\n", "<!-- end of records -->\n"

say = partial(print, flush=True)  # what runs beside prints too


# ---------------------------------------------------------------------------------------------------------------------
# Training: the working tree, or a log's sources


def train_lines(folder: Path, flags: list[str], cores: int) -> Iterator[str]:
    """Train in `folder`, in a process of its own, and yield what it prints as it comes; raises Refusal where it fails.

    `cores`: held to so many CPU cores, and no GPU; 0: as it likes.
    """
    env, cpus, line = dict(os.environ), sorted(os.sched_getaffinity(0)), ""
    if cores:
        env, cpus = env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(cores)}, cpus[:cores]
    process = subprocess.Popen([sys.executable, "train_prx.py", *flags], cwd=folder, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, preexec_fn=partial(os.sched_setaffinity, 0, cpus))
    try:
        for line in process.stdout:
            yield line.rstrip("\n")
        need(process.wait() == 0, f"training ended with status {process.returncode}: {line.strip()}")
    finally:
        process.terminate()  # where nobody waits for its end
        process.wait()


def train(folder: Path, name: str, sources: dict[str, str], flags: list[str], cores: int) -> Path:
    """Train `sources` as run `name` in `folder`, made anew, beside a stopwatch; the run's folder. Raises Refusal.

    The stopwatch goes from the line of the warm-up to that of the last window, and has to agree with the run's own clock.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, text in sources.items():
        (folder / file).write_text(text)
    (folder / "data").symlink_to(Path("data").resolve())
    begin = end = math.nan
    for line in train_lines(folder, [*flags, f"--name={name}"], cores):
        now = time.perf_counter()
        say(f"    {line}")
        if line.startswith("warmed up in "):
            need(math.isnan(begin), f"{name} says twice that its warm-up has ended")
            begin = now
        elif WINDOW.fullmatch(line):
            end = now
    run = folder / "runs" / name
    clock = load_run(run).log.seconds
    need(abs(end - begin - clock) <= WATCH_SLACK[0] + WATCH_SLACK[1] * clock,  # nor is nan
         f"{name}: its clock says {clock:.1f} s, and a stopwatch beside it {end - begin:.1f} s")
    return run


def flags_of(config: dict) -> list[str]:
    """A log's config as flags of train_prx.py, one a field."""
    def text(value) -> str:
        if isinstance(value, dict):
            return ":".join(map(text, value.values()))
        if isinstance(value, list):
            return ",".join(map(text, value))
        return str(int(value) if isinstance(value, bool) else value)

    return [f"--{key}={text(value)}" for key, value in config.items()]


def cannot_run(track: Track) -> str:
    """Why this machine cannot train a track's runs; empty if it can."""
    if track.cores > len(os.sched_getaffinity(0)):
        return f"the track is for {track.cores} CPU cores, and here are {len(os.sched_getaffinity(0))}"
    if track.gpus:
        import torch

        if torch.cuda.device_count() < track.gpus:
            return f"the track is for {track.gpus} GPU, and here is none"
    return ""


def make_data(track: Track, teacher: bool) -> None:
    """Make a track's scenes, and their teacher if it is needed, where they are missing; raises UserError on other data."""
    for folder, wanted in track.data.items():
        if not Path(folder).exists():
            if not track.level:
                raise UserError(f"no data at {folder}: README.md says under Data how it is built")
            command(HERE / "scenes.py", "make", f"--out={folder}", f"--rows={track.rows}", f"--size={track.image_size}",
                    f"--level={track.level}")
        found = file_sha256(Path(folder, "manifest.json"))
        if wanted and found != wanted:
            raise UserError(f"{folder} has a manifest of sha256 {found[:12]}, and the track's has {wanted[:12]}: move the folder "
                            "away, and the same command makes it anew")
        if teacher and not Path(folder, "teacher").exists():
            command(HERE / "scenes.py", "teacher", f"--data={folder}")


def command(script: Path, *flags: str) -> None:
    """Run a command of the repository; raises UserError where it fails."""
    if subprocess.run([sys.executable, script, *flags]).returncode:
        raise UserError(f"python {script.name} {' '.join(flags)}: it failed, and says why above")


# ---------------------------------------------------------------------------------------------------------------------
# enter


def enter(args) -> None:
    """`race.py enter`: train what the folder lacks, then write the claim. Raises UserError."""
    folder, track = Path(args.record), TRACKS[args.track]
    if (folder / "record.json").exists():
        raise UserError(f"{folder} is a finished record, which is not overwritten: name another folder")
    if not re.fullmatch(r"\w[\w.-]*", folder.name):
        raise UserError(f"{folder}: use letters, digits, '_', and then '.' and '-' in its name")
    if args.seeds and args.seeds < track.seeds:
        raise UserError(f"--seeds={args.seeds}: track {args.track} takes {track.seeds} or more")
    earlier = records_of(args.track, folder.parent, check_claim)
    if args.baseline and (earlier or track.baseline not in ("", folder.name)):
        raise UserError(f"--baseline: track {args.track} has its baseline, {track.baseline or earlier[0].folder.name}")
    if not (args.baseline or earlier):
        raise UserError(f"{folder.parent} has no record of track {args.track} yet: --baseline makes this working tree its baseline")
    base = None if args.baseline else earlier[-1]
    try:
        if track.reruns:
            train_missing(folder, track, args.seeds or track.seeds, base, args.flags)
        else:
            collect(folder, track, [Path(run) for run in args.runs.split(",") if run])
        write_claim(folder, args, base)
    except Refusal as reason:
        raise UserError(str(reason)) from None
    say(f"{folder} is filled. Now write into README.md what changed and why, a few words of it into record.json, and then:\n"
        f"./run.sh verify {folder}")


def train_missing(folder: Path, track: Track, seeds: int, base: Record | None, extra: list[str]) -> None:
    """Train the working tree's runs, those that `folder` lacks, in turns with the baseline's where the track's times are ratios.

    Raises UserError or Refusal.
    """
    import torch

    from train_prx import SOURCES, config_to_json, parse_config, resolve_precision

    if why_not := cannot_run(track):
        raise UserError(why_not)
    flags = [f"--preset={track.preset}", *extra, f"--score={track.scorer}", f"--score_n={track.score_n}",
             *(f"--{key}=0" for key in QUIET)]
    device = torch.device("cuda" if torch.cuda.is_available() and not track.cores else "cpu")
    config = config_to_json(resolve_precision(parse_config(flags)[0], device))
    check_rules("the working tree's recipe", config, track)
    if base and base.seeds[0].log.sources == SOURCES and not extra:
        raise UserError(f"the working tree's sources are those of {base.folder}: change train_prx.py first")
    arms = {"seed": (SOURCES, config)}
    if base and track.ratio:
        log = baseline_of(track).seeds[0].log
        arms = {"baseline": (log.sources, log.config), **arms}
    make_data(track, "scene" in [config["frozen"] for _, config in arms.values()])
    for k in range(seeds):
        for arm, (sources, config) in arms.items():
            name, place = f"{arm}-{k}", folder / f"{arm}-{k}"
            if place.exists():
                log = load_run(place).log
                if names := differences(log.sources | log.config, sources | config):
                    raise UserError(f"{place} was trained with another {', '.join(names)}: put that back, or delete {folder} to "
                                    "start over")
                say(f"{name} is there")
                continue
            say(f"{name}, of seeds 0 to {seeds - 1}")
            run = train(Path("runs", folder.name, name), name, sources, [*flags_of(config), f"--seed={k}"], track.cores)
            check_run(folder, track, run)  # what is wrong shows after one run, not after all
            keep(run, place)


def check_run(folder: Path, track: Track, run: Path) -> None:
    """Check a run for itself; raises Refusal."""
    for check in OF_RUNS:
        check(Record(folder, track, {}, [load_run(run)], []))


def collect(folder: Path, track: Track, runs: list[Path]) -> None:
    """Take runs that are trained already into `folder`, in the order of their seeds. Raises UserError or Refusal."""
    if not runs:
        raise UserError("this track's runs take many GPUs: train them with ./run.sh, and name them here, --runs=runs/A,runs/B")
    for k, run in enumerate(runs):
        check_run(folder, track, run)
        shutil.rmtree(folder / f"seed-{k}", ignore_errors=True)
        keep(run, folder / f"seed-{k}")


def keep(run: Path, place: Path) -> None:
    """Copy a run's log and metrics to `place`, which is there once they are whole; and seed 0's sheet beside it."""
    aside = place.with_name(f".{place.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in ("log.txt", "metrics.jsonl"):
        shutil.copy(run / file, aside / file)
    if place.name == "seed-0":
        sheets = sorted((run / "samples").glob("step_*.png"))
        need(sheets, f"{run} has no sheet of samples")
        shutil.copy(sheets[-1], place.with_name("grid.png"))
    aside.rename(place)


def write_claim(folder: Path, args, base: Record | None) -> None:
    """Write change.patch, README.md where there is none, and last record.json."""
    record = Record(folder, TRACKS[args.track], {}, *load_arms(folder))
    author = args.author or subprocess.run(["git", "config", "user.name"], capture_output=True, text=True).stdout.strip()
    claim = {"track": args.track, "author": author, "summary": args.summary, "builds_on": base and base.folder.name,
             **claim_of(record)}
    if not record.track.reruns:
        weights = Path(args.runs.split(",")[0], "ema.safetensors")
        need(weights.is_file(), f"there is no {weights}, and the record names its sha256")
        claim["checkpoint"] = file_sha256(weights)
    if base:
        (folder / "change.patch").write_text(patch(base.seeds[0].log.sources, record.seeds[0].log.sources))
    if not (folder / "README.md").exists():
        record = replace(record, claim=claim)
        rows = {"track": args.track, "builds on": claim["builds_on"] or "nothing: a baseline", "machine": claim["machine"],
                "steps": f"{claim['steps']:,}", "seeds": len(record.seeds), record.track.metric: score_text(record),
                "time": time_text(record), "scene teacher": teacher_text(record)}
        table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        (folder / "README.md").write_text(f"# {folder.name}\n\n{TO_WRITE}\n\n| | |\n| --- | --- |\n{table}\n![what seed 0 draws]"
                                          "(grid.png)\n")
    (folder / "record.json").write_text(json.dumps(claim, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# verify


def verify(folder: Path, reruns: int, checkpoint: Path | None) -> bool:
    """`race.py verify`: print what is checked, what is run again, and yes or no. Raises UserError."""
    try:
        record = load_record(folder)
        need(record.seeds, "it has no run seed-0")
        say(f"checked: the sources in {len(record.runs)} logs hash to what these claim")
        for check in CHECKS:
            say(f"checked: {check(record)}")
        if record.track.reruns:
            reruns = min(reruns, len(record.seeds))
            why_not = cannot_run(record.track) if reruns else "--rerun=0"
            again, how_much = rerun(record, reruns), f"{reruns} of {len(record.seeds)} seeds trained again"
        else:
            why_not = "" if checkpoint else "--checkpoint=ema.safetensors, the released one, is drawn and scored again"
            again, how_much = rescore(record, checkpoint), "its checkpoint drawn and scored again"
        if why_not:
            say(f"nothing was re-run: {why_not}\nyes: {folder} was checked only")
            return True
        say("the re-run executes the record's code: read change.patch first")
        for sentence in again:
            say(f"re-ran: {sentence}")
    except Refusal as reason:
        say(f"no: {reason}")
        return False
    say(f"yes: {folder} was checked, and {how_much}")
    return True


def rerun(record: Record, n: int) -> Iterator[str]:
    """Train the first `n` seeds again, each after the baseline's; yields what came out. Raises Refusal or UserError.

    The score's mean has to come within three standard errors of the logged one, and that of all seeds has to meet the target; the
    ratio's may be two standard errors below the claimed one.
    """
    track, scores, ratios = record.track, [], []
    make_data(track, any(run.log.teacher for run in record.runs))
    for k in range(n):
        seconds = []
        for run in [*record.baselines[k : k + 1], record.seeds[k]]:
            with tempfile.TemporaryDirectory() as folder:
                place = train(Path(folder, "run"), run.log.config["name"], run.log.sources, flags_of(run.log.config), track.cores)
                again = replace(load_run(place), name=f"{run.name}, run again")
            need((again.log.sources, again.log.config) == (run.log.sources, run.log.config),
                 f"{again.name}, logs another source or config")
            for check in OF_RUNS:
                check(Record(record.folder, track, {}, [again], []))
            yield compare(run, again, track)
            if again.log.teacher != run.log.teacher:
                yield f"{again.name}, had another scene teacher: {again.log.teacher[:12]}, and its log has {run.log.teacher[:12]}"
            seconds.append(again.log.seconds)
        scores.append((record.seeds[k].score(track.metric), again.score(track.metric)))
        if record.baselines:
            ratios.append(seconds[0] / seconds[1])
    was, now = map(statistics.fmean, zip(*scores))
    text = f"mean {track.metric} {now:.4f}, and {was:.4f} in the logs of these seeds"
    need(abs(now - was) <= 3 * math.sqrt(2 / n) * spread(record.seeds[0], track), f"it does not reproduce: {text}")
    need(n < len(record.seeds) or track.target is None or track.sign * (now - track.target) >= 0,
         f"it does not reproduce: {text}, and the target is {track.target}")
    yield text
    if ratios:
        ratio, claimed = statistics.fmean(ratios), record.claim["ratio"]["mean"]
        kept = claimed * (1 - 2 * RATIO_SPREAD * math.sqrt(1 / n + 1 / len(record.seeds)))
        text = f"{ratio:.2f}x as fast as the baseline, and {claimed:.2f}x is claimed"
        need(ratio >= kept, f"it does not reproduce: {text}, where {kept:.2f}x would do" + "; more of --rerun tells more exactly"
             * (n < len(record.seeds)))
        yield text


def spread(run: Run, track: Track) -> float:
    """Standard deviation of the metric between seeds; the score's own error until the track has one."""
    return track.sigma or float(run.log.scores[track.metric][1]) / 1.96


def compare(run: Run, again: Run, track: Track) -> str:
    """What two runs of a seed give; raises Refusal where they are more than three standard deviations apart."""
    was, now = run.score(track.metric), again.score(track.metric)
    text = f"{run.name} gives {track.metric} {now:.4f}, and {was:.4f} in its log"
    need(abs(now - was) <= 3 * math.sqrt(2) * spread(run, track), f"it does not reproduce: {text}")
    return f"{text}; {again.log.seconds:.1f} s, and {run.log.seconds:.1f} s in its log"


def rescore(record: Record, checkpoint: Path) -> Iterator[str]:
    """Draw and score seed 0's released checkpoint again, with the record's sources; yields what came out.

    Raises Refusal or UserError.
    """
    from safetensors import SafetensorError, safe_open

    run, track = record.seeds[0], record.track
    if not checkpoint.is_file():
        raise UserError(f"--checkpoint={checkpoint} is no file")
    need(file_sha256(checkpoint) == record.claim.get("checkpoint"), f"{checkpoint} is not the file whose sha256 record.json names")
    try:
        with safe_open(checkpoint, framework="np") as file:
            source = (file.metadata() or {}).get("source")
    except SafetensorError:
        raise Refusal(f"{checkpoint} is no safetensors file") from None
    need(source == source_hash(run.log.sources), f"{checkpoint} is of another source than seed-0")
    make_data(track, False)
    with tempfile.TemporaryDirectory() as folder:
        for file in HERE.glob("*.py"):  # what draws and scores; the record's own sources in place of theirs
            Path(folder, file.name).write_text(run.log.sources.get(file.name, file.read_text()))
        weights = Path(folder, "ema.safetensors")
        weights.symlink_to(checkpoint.resolve())
        command(Path(folder, "sample.py"), "score", f"--checkpoint={weights}", f"--metric={track.scorer}", f"--n={track.score_n}",
                f"--data={','.join(track.data)}")
        scores = read_json(Path(folder, f"score_{track.scorer}.json").read_text(), "the score")
    now, was = scores[track.metric.removeprefix(f"{track.scorer}_")], run.score(track.metric)
    error = run.log.scores[track.metric][1]
    text = f"{checkpoint} gives {track.metric} {now:.4f}, and {was:.4f} +-{error} in its log"
    need(abs(now - was) <= float(error), f"it does not reproduce: {text}")
    yield text


# ---------------------------------------------------------------------------------------------------------------------
# table


def records_of(track: str, folder: Path, *checks: Callable[[Record], str]) -> list[Record]:
    """A track's records, oldest first; raises UserError where one is damaged or fails one of `checks`."""
    found = []
    for path in folder.glob("*/record.json"):
        try:
            record = load_record(path.parent)
            if record.claim["track"] != track:
                continue
            need(record.seeds, "it has no run seed-0")
            for check in checks:
                check(record)
        except Refusal as reason:
            raise UserError(f"{path.parent}: {reason}") from None
        found.append(record)
    return sorted(found, key=lambda record: record.seeds[0].log.started)


def all_records() -> dict[str, list[Record]]:
    """The records of each track, for the tables; raises UserError as `records_of` does."""
    return {name: records_of(name, Path("records"), check_claim, check_described) for name in TRACKS}


def standard_error(values: list[float]) -> float:
    """Of their mean; 0 where there is one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def score_text(record: Record) -> str:
    score = record.claim["score"]
    if record.track.scorer == "scenes":
        return f"{score['mean']:.1%} +- {100 * standard_error(score['each']):.1f}"
    return f"{score['mean']:.4g}"


def teacher_text(record: Record) -> str:
    return "yes" if record.claim.get("teacher") else "no"


def table(tracks: dict[str, list[Record]], prefix: str) -> str:
    """Each track's records as Markdown; `prefix` is the way from the page to the records' folder."""
    parts = []
    for name, records in tracks.items():
        if not records:
            continue
        rows = [("date", "record", "by", "what changed", "seeds", records[0].track.metric, "time", "ratio", "scene teacher", "log")]
        rows.append(("---",) * len(rows[0]))
        for record in records:
            place, claim = f"{prefix}{record.folder.name}", record.claim
            rows.append((claim["date"][:10], f"[{record.folder.name}]({place})", claim["author"], claim["summary"],
                         str(len(record.seeds)), score_text(record), time_text(record).removesuffix(f", {ratio_text(record)}"),
                         ratio_text(record), teacher_text(record), f"[log]({place}/seed-0/log.txt)"))
        lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
        parts.append(f"**{name}** (+- is the standard error over seeds)\n\n" + "".join(f"| {line} |\n" for line in lines))
    return "\n".join(parts) or "There is no record yet.\n"


def draw_history(tracks: dict[str, list[Record]], out: Path) -> None:
    """Each track's records over their dates, with standard errors over seeds: how many times as fast, or how long."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import ConciseDateFormatter
    from matplotlib.figure import Figure

    figure = Figure((5 * len(tracks), 3.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, records) in enumerate(tracks.items(), 1):
        panel, track = figure.add_subplot(1, len(tracks), place), records[0].track
        unit, seconds = ("times as fast as the baseline", 1) if track.ratio else track.unit
        key = "ratio" if track.ratio else "seconds"
        values = [[value / seconds for value in record.claim[key]["each"]] if key in record.claim else [1.0] for record in records]
        dates, means = [record.seeds[0].log.started for record in records], [*map(statistics.fmean, values)]
        panel.errorbar(dates, means, [*map(standard_error, values)], color="#0072B2", marker="o", capsize=3)
        for date, mean, record in zip(dates, means, records, strict=True):
            last = record is records[-1] is not records[0]  # names stay in the panel, off lines that rise (ratios) and fall (times)
            panel.annotate(record.folder.name, (date, mean), (-4, 8) if last else (5, -11 if track.ratio else 6), fontsize=8,
                           textcoords="offset points", ha="right" if last else "left")
        panel.set_title(f"{name}: {unit}", loc="left", fontsize=11)
        panel.margins(x=0.3, y=0.2)
        panel.set_ylim(bottom=0)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_formatter(ConciseDateFormatter(panel.xaxis.get_major_locator()))
    figure.savefig(out, format="png")


def write_tables() -> None:
    """`race.py table --write`: the tables and their plot into the two pages. Raises UserError."""
    tracks = {name: records for name, records in all_records().items() if records}
    if tracks:
        draw_history(tracks, Path("records/history.png"))
    for page, prefix in ((Path("records/README.md"), ""), (Path("README.md"), "records/")):
        before, begin, rest = page.read_text().partition(MARKERS[0])
        _, end, after = rest.partition(MARKERS[1])
        if not (begin and end):
            raise UserError(f"{page} lacks the lines {MARKERS[0].strip()} and {MARKERS[1].strip()}, between which the tables go")
        plot = f"\n![the records over their dates]({prefix}history.png)\n" if tracks else ""
        page.write_text(f"{before}{begin}\n{table(tracks, prefix)}{plot}\n{end}{after}")
        say(page)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def build_parsers() -> dict[str, Parser]:
    """One parser a command."""
    enterer = Parser(prog="race.py enter", description="Train the track's baseline and this working tree in turns, and fill a "
                     "record's folder; what is there already is not trained again. Flags of train_prx.py come last, behind --.")
    enterer.add_argument("record", help="folder to fill: records/DATE-TRACK-NAME")
    enterer.add_argument("--track", choices=TRACKS, default="demo", help="the race")
    enterer.add_argument("--seeds", type=int, default=0, help="how many; 0: the least that the track takes")
    enterer.add_argument("--baseline", action="store_true", help="make the track's baseline, which builds on no record")
    enterer.add_argument("--runs", default="", help="of track record: comma list of the trained runs, one a seed")
    enterer.add_argument("--author", default="", help="who made it; empty: git's user.name")
    enterer.add_argument("--summary", default="", help="what changed, in a few words for the table; may be written later")
    verifier = Parser(prog="race.py verify", description="Check a record, then train it again. Exit status 0: yes; 1: no; 2: a "
                      "mistake.")
    verifier.add_argument("record", help="a record's folder")
    verifier.add_argument("--rerun", type=int, choices=range(10), default=1, metavar="N", help="seeds to train again; 0: none")
    verifier.add_argument("--checkpoint", type=Path, default=None, help="of track record: the released ema.safetensors, to "
                          "draw and score")
    lister = Parser(prog="race.py table", description="Print each track's records.")
    lister.add_argument("--write", action="store_true", help="write them into records/README.md and README.md, with "
                        "records/history.png")
    return {"enter": enterer, "verify": verifier, "table": lister}


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it trains ends with it
    parsers, name = build_parsers(), argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        say(f"{__doc__}\nEach command has --help.")
        return
    if name not in parsers:
        raise UserError(f"unknown command {name}; known are {', '.join(parsers)}")
    cut = argv.index("--") if "--" in argv and name == "enter" else len(argv)
    args = parsers[name].parse_args(argv[1:cut])
    if name == "enter":
        args.flags = argv[cut + 1 :]
        enter(args)
    elif name == "verify":
        sys.exit(0 if verify(Path(args.record), args.rerun, args.checkpoint) else 1)
    elif args.write:
        write_tables()
    else:
        say(table(all_records(), "records/"), end="")


if __name__ == "__main__":
    run_main(main)
