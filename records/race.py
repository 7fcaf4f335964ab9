"""Enter a record, verify one, list them all. The rules, and how to enter, are in records/README.md.

    python records/race.py enter  records/NAME [-- flags of train_prx.py]   train this working tree, score it, and claim
    python records/race.py verify records/NAME [--rerun=3]                  check it, train and score again: yes or no
    python records/race.py table  [--write]                                 the records, made from their folders

An entry is train_prx.py, muon.py and sample.py. It never scores itself: its sample.py draws what the referee asks for,
and the referee, tools/score.py of this repository, sees the pictures alone. A record is a folder:

    seed-K/        a run: log.txt, with its sources' hashes in place of their text, and score.json, the referee's
    baseline-K/    the baseline's run before it, where a ratio is claimed: log.txt
    record.json    the claim: what these give, who made it, and what changed
    change.patch   its sources against those of the track's baseline, which has them whole, in source/
    README.md      what changed and why; beside it grid.png, what seed 0 draws

Nothing out of a record is executed before all of CHECKS have passed, and nothing is unpickled.
"""
import difflib
import hashlib
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
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's root

from train_prx import Parser, UserError, file_sha256, prepare, run_main

# ---------------------------------------------------------------------------------------------------------------------
# The tracks and their rules


@dataclass(frozen=True)
class Track:
    """One race. Its preset, its data folder and its level of scenes bear its name."""
    baseline: str  # its record in records/; empty: there is none, and the next record will be it
    data: str  # sha256 of the data's manifest
    size: int  # pixels, of the pictures that are scored
    target: float  # what the mean score beats
    cores: int  # CPU cores that a run is held to, its time being a ratio to the baseline's; 0: it runs on a GPU
    sigma: float = 0.0227  # standard deviation of the score between seeds; this is that of 2026-11-22-demo-baseline
    metric: str = "scenes"  # of tools/score.py, and none that training optimises
    value: str = "exact"  # which of its values, a share
    n: int = 512  # pictures that are scored, one of each prompt
    seeds: int = 3


TRACKS = {
    "race": Track("", "3ea2b29fb615e4258de5712cd54b006a31e3af200c65e5141e35fbe107725f59", 64, target=0.9, cores=2),
    "solo": Track("", "2dda641fccc4d05e1164562b73dde9c08a5dfcb15001efa0bd9686afe2c0c8eb", 256, target=0.95, cores=0),
}
FORMER = "demo"  # the track of records that were made before the referee; their logs are in the project's history
SOURCES = "train_prx.py", "muon.py", "sample.py"
RULES = {"text_encoder": "builtin", "frozen": "none", "max_steps": 0,  # and nothing but the end pauses the clock:
         "eval_every": 0, "sample_every": 0, "save_every": 0, "snapshot_every": 0}
ROUNDING = 0.02, 0.01  # seconds and share, between a window's clock and its images/s as they are printed
IDLE = 60.0, 0.1  # seconds and share of the clock that a run takes after it, for the held-out loss and its samples
WATCH_SLACK = 1.0, 0.02  # seconds and share: lines arrive late where all cores are at work
RATIO_SPREAD = 0.11  # share: standard deviation of a ratio between pairs of runs, in 2026-11-22-demo-patch16
BEGIN, END = "<!-- records: by `python records/race.py table --write` -->\n", "<!-- end of records -->\n"


class Refusal(UserError):
    """Why a record does not hold, in one line."""


def need(condition: object, reason: str) -> None:
    if not condition:
        raise Refusal(reason)


# ---------------------------------------------------------------------------------------------------------------------
# Records, read


@dataclass(frozen=True)
class Run:
    """A whole run."""
    name: str  # its folder's
    log: str  # log.txt
    sources: dict[str, str]  # name -> sha256
    config: dict
    started: datetime  # after the warm-up
    finished: datetime
    machine: str  # hardware and software
    data: list[tuple[str, str]]  # folder and sha256 of its manifest
    warmup: float  # seconds, off the clock
    windows: list[tuple[int, float, float]]  # last step, images a second, seconds on the clock
    end: int  # its last step
    seconds: float  # on the clock then
    score: dict  # what the referee said; empty: it was not asked


@dataclass(frozen=True)
class Record:
    """A record's folder, read."""
    folder: Path
    track: str
    claim: dict  # record.json
    base: "Record | None"  # the track's baseline, unless this is it
    sources: dict[str, str]  # name -> text
    runs: list[Run]  # in turns; the last one is the last seed's


TIME, NUMBER = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", r"(\d+(?:\.\d+)?)"
LINES = (  # that a log has once
    r"config (\{.*\})",
    TIME + r"  (python \S+  torch \S+.*)",
    r"(\d+ x .+, \d+ threads); source .*",
    rf"warmed up in {NUMBER} s, off the clock",
    rf"{TIME}  finished at step (\d+), {NUMBER} s on the clock: .*",
)
WINDOW = re.compile(rf"^step (\d+)/\d+  .*?{NUMBER} images/s  {NUMBER} s  .+ left.*$", re.MULTILINE)


def parse_log(name: str, text: str, score: dict) -> Run:
    """A record's log.txt; raises Refusal where it is not one whole run."""
    found = [re.findall(f"^{pattern}$", text, re.MULTILINE) for pattern in LINES]
    need([*map(len, found)] == [1] * len(LINES) and "\ncontinuing from " not in text,
         f"{name}: log.txt is not that of one whole run from its first step")
    (config,), ((started, versions),), (hardware,), (warmup,), ((finished, end, seconds),) = found
    sources = dict(re.findall(r"^==== (\w+\.py) sha256 ([0-9a-f]{64})$", text, re.MULTILINE))
    data = re.findall(r"^data (.+), manifest ([0-9a-f]{64})$", text, re.MULTILINE)
    windows = [(int(step), float(rate), float(clock)) for step, rate, clock in WINDOW.findall(text)]
    started, finished = datetime.fromisoformat(started), datetime.fromisoformat(finished)
    return Run(name, text, sources, json.loads(config), started, finished, f"{hardware}; {versions}", data,
               float(warmup), windows, int(end), float(seconds), score)


def turns(track: str, base: Record | None, sources: dict[str, str], config: dict) -> dict[str, tuple[dict, dict]]:
    """An entry's runs in their order, name -> sources and config: the baseline's too where times are ratios to its."""
    arms = {"baseline": (base.sources, base.runs[-1].config)} if base and TRACKS[track].cores else {}
    arms["seed"] = sources, config
    return {f"{arm}-{k}": (sources, config | {"seed": k, "name": f"{arm}-{k}"})
            for k in range(TRACKS[track].seeds) for arm, (sources, config) in arms.items()}


def load_runs(folder: Path, track: str, base: Record | None) -> list[Run]:
    """The runs of a record, in turns; raises Refusal or OSError."""
    runs = []
    for name in turns(track, base, {}, {}):
        score = json.loads((folder / name / "score.json").read_text()) if name.startswith("seed") else {}
        runs.append(parse_log(name, (folder / name / "log.txt").read_text(), score))
    return runs


def load_record(folder: Path, *checks) -> Record:
    """A record that passes `checks`; raises Refusal where it does not, UserError where none is there to be run."""
    if not (folder / "record.json").is_file():
        raise UserError(f"no record at {folder}: it has no record.json, which `./run.sh enter {folder}` writes")
    try:
        claim = json.loads((folder / "record.json").read_text())
        track = claim["track"]
        if track == FORMER:
            raise UserError(f"{folder} is of the former layout and cannot be run here any more: see its README.md")
        need(track in TRACKS, f"record.json is of track {track!r}; known are {', '.join(TRACKS)}")
        base = baseline_of(track, folder)
        record = Record(folder, track, claim, base, sources_of(folder, base), load_runs(folder, track, base))
        for check in checks:
            check(record)
        return record
    except UserError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise Refusal(f"it is damaged: {type(error).__name__}: {error}") from None


def baseline_of(track: str, folder: Path) -> Record | None:
    """The committed baseline of a record's track; None where the record is that itself."""
    name = TRACKS[track].baseline
    return None if name in ("", folder.name) else load_record(ROOT / "records" / name)


def sources_of(folder: Path, base: Record | None) -> dict[str, str]:
    """A record's sources: the baseline's with change.patch applied, or those in its source/; raises Refusal."""
    if base is None:
        return {name: (folder / "source" / name).read_text() for name in SOURCES}
    patch = (folder / "change.patch").resolve(strict=True)
    with tempfile.TemporaryDirectory() as place:
        write(base.sources, Path(place))
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(place).resolve().parent)}  # in no repository around it
        subprocess.run(["git", "apply", "--whitespace=nowarn", patch], cwd=place, stderr=subprocess.DEVNULL, env=env)
        sources = {name: Path(place, name).read_text() for name in SOURCES}
    need(patch.read_text() == make_patch(base.sources, sources), "change.patch does not fit the baseline's sources")
    return sources


def make_patch(old: dict[str, str], new: dict[str, str]) -> str:
    """A unified diff of sources, as `git apply` reads it."""
    lines = ((name, *(sources[name].splitlines(keepends=True) for sources in (old, new))) for name in SOURCES)
    return "".join(line for name, a, b in lines for line in difflib.unified_diff(a, b, f"a/{name}", f"b/{name}"))


def write(sources: dict[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(text)


def hashes(sources: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()}


def differences(ours: dict, theirs: dict) -> str:
    """The keys at which two dicts differ."""
    return ", ".join(sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)))


# ---------------------------------------------------------------------------------------------------------------------
# Checks, each of which raises Refusal


def check_run(run: Run, track: str, sources: dict[str, str], config: dict) -> None:
    """A run is of these sources and this config, and keeps to the rules in data, hardware and clock."""
    wrong, ours = differences(run.sources | run.config, hashes(sources) | config), TRACKS[track]
    need(not wrong, f"{run.name} ran another {wrong} than it has to")
    found = config | {"image_size": config["stages"][-1]["image_size"]}
    for key, value in {"data": f"data/{track}", "image_size": ours.size, **RULES}.items():
        need(found[key] == value, f"{run.name} has {key} = {found[key]!r}, and the rules say {value!r}")
    need(run.data == [(f"data/{track}", ours.data)], f"{run.name} read other data than the track's: {run.data}")
    hardware = f"1 x .* CPU, {ours.cores} threads;" if ours.cores else "1 x (?!.* CPU, )"
    need(re.match(hardware, run.machine), f"{run.name} ran on {run.machine}, which is not the track's hardware")
    # The clock grows, each window fits its images/s, and the run's timestamps have room for it, and for little else
    wrong, batches, step, clock = f"{run.name}: the clock does not add up", [], 0, 0.0
    for stage in config["stages"]:
        batches += [stage["global_batch"]] * stage["steps"]  # of each step
    for last, rate, seconds in run.windows:
        took, says = seconds - clock, sum(batches[step:last]) / max(rate, 1e-9)
        need(step < last and took > 0 and abs(says - took) <= ROUNDING[0] + ROUNDING[1] * took,
             f"{wrong}: {took:.2f} s from step {step} to {last}, and images/s say {says:.2f} s")
        step, clock = last, seconds
    need(step == run.end == len(batches) and clock == run.seconds,
         f"{wrong}: its last window is step {step} of {len(batches)} after {clock:.2f} s, its end {run.seconds:.2f} s")
    rest = (run.finished - run.started).total_seconds() - clock  # of whole seconds, after the warm-up
    need(-1 <= rest <= IDLE[0] + IDLE[1] * clock, f"{wrong}: its timestamps leave {rest:.0f} s beside it")


def check_runs(record: Record) -> None:
    """All seeds ran these sources with one config by the rules, in turns with the track's baseline, on one machine."""
    planned = turns(record.track, record.base, record.sources, record.runs[-1].config)
    for run in record.runs:
        check_run(run, record.track, *planned[run.name])
        need(run.machine == record.runs[0].machine, f"{run.name} ran on another machine: {run.machine}")
    for before, after in zip(record.runs, record.runs[1:]):
        need(before.finished <= after.started - timedelta(seconds=after.warmup),
             f"{after.name} began before {before.name} ended: runs take turns")


def claim_of(runs: list[Run], track: str) -> dict:
    """What runs give: scores, times in s, and how many times as fast as the baseline's before it each is."""
    seeds, ours = [run for run in runs if run.name.startswith("seed")], TRACKS[track]
    values = {"score": [run.score["values"][ours.value] for run in seeds], "seconds": [run.seconds for run in seeds],
              "baseline_seconds": [run.seconds for run in runs if run not in seeds]}
    values["ratio"] = [slow / fast for slow, fast in zip(values["baseline_seconds"], values["seconds"])]
    for run, score in zip(seeds, values["score"]):
        asked = run.score["metric"], run.score["n"], run.score["seed"]
        need(asked == (ours.metric, ours.n, 0) and 0 <= score <= 1, f"{run.name} has no score by the rules")
    claim = {"track": track, "date": str(runs[0].started), "machine": runs[0].machine, "steps": runs[-1].end}
    return claim | {name: {"mean": round(statistics.fmean(each), 4), "each": [round(value, 4) for value in each]}
                    for name, each in values.items() if each}


def check_claim(record: Record) -> None:
    """record.json claims what the runs give; the mean score beats the target by three standard errors."""
    told = {key: record.claim[key].strip() for key in ("author", "summary")}
    wrong = differences(record.claim, told | claim_of(record.runs, record.track))
    need(all(told.values()) and not wrong, f"record.json claims another {wrong or 'author and summary'} than it should")
    need((record.folder / "README.md").is_file(), "there is no README.md, which says what changed and why")
    track, mean = TRACKS[record.track], record.claim["score"]["mean"]
    wanted = track.target + (3 * track.sigma / math.sqrt(track.seeds) if record.base else 0)
    need(mean >= wanted, f"the mean score is {mean:.4f}: to beat {track.target} it takes {wanted:.4f}")


CHECKS = check_runs, check_claim

# ---------------------------------------------------------------------------------------------------------------------
# Training, and the referee


def set_up(track: str) -> None:
    """Hold what runs from here on to the track's cores, and make its data where they are missing. Raises UserError."""
    ours, folder = TRACKS[track], Path("data", track)
    if ours.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ours.cores])
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(ours.cores)}
    if not folder.exists():
        run_tool("tools/scenes.py", *f"make --level={track} --rows=20000 --size={ours.size} --out={folder}".split())
    if file_sha256(folder / "manifest.json") != ours.data:
        raise UserError(f"{folder} is not the track's data: move it away, and the same command makes them anew")


def run_tool(script: str, *flags: str) -> None:
    """Run a tool of this repository; raises UserError where it fails."""
    if subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
        raise UserError(f"python {script} {' '.join(flags)}: it failed, and says why above")


def run_entry(folder: Path, script: str, *flags: str) -> list[tuple[float, str]]:
    """Run an entry's script in `folder`, and print on: its lines, and when each came. Raises Refusal where it fails."""
    command, lines = [sys.executable, script, *flags], [(time.perf_counter(), "nothing was said")]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            lines.append((time.perf_counter(), line.rstrip("\n")))
            print(f"    {line}", end="")
        need(process.wait() == 0, f"{script} ended with status {process.returncode}: {lines[-1][1]}")
        return lines
    finally:
        process.kill()  # where it has not ended
        process.wait()


def train(folder: Path, track: str, sources: dict[str, str], config: dict) -> Run:
    """Train `sources` in `folder`, made anew, beside a stopwatch: the run, checked, and scored if it is an entry's."""
    shutil.rmtree(folder, ignore_errors=True)
    write(sources, folder)
    (folder / "data").symlink_to(Path("data").resolve())
    name, lines = config["name"], run_entry(folder, "train_prx.py", *flags_of(config))
    log = f"==== sample.py sha256 {hashes(sources)['sample.py']}\n" + (folder / "runs" / name / "log.txt").read_text()
    for text in sources.values():
        log = log.replace(f"\n{text}====\n", "\n", 1)
    run = parse_log(name, log, {})
    check_run(run, track, sources, config)
    begin = min((at for at, line in lines if line.startswith("warmed up in ")), default=math.nan)
    watch = max((at for at, line in lines if WINDOW.fullmatch(line)), default=math.nan) - begin
    need(abs(watch - run.seconds) <= WATCH_SLACK[0] + WATCH_SLACK[1] * run.seconds,  # nor is nan
         f"{name}: its clock says {run.seconds:.1f} s, and a stopwatch beside it {watch:.1f} s")
    return replace(run, score=referee(folder, name, track)) if name.startswith("seed") else run


def flags_of(config: dict) -> list[str]:
    """A log's config as flags of train_prx.py, one a field."""
    def text(value) -> str:
        if isinstance(value, dict):
            return ":".join(map(text, value.values()))
        if isinstance(value, list):
            return ",".join(map(text, value))
        return str(int(value) if isinstance(value, bool) else value)

    return [f"--{key}={text(value)}" for key, value in config.items()]


def referee(folder: Path, name: str, track: str) -> dict:
    """What tools/score.py says of the pictures that the entry in `folder` draws after a run. Raises UserError."""
    asked = [f"--metric={TRACKS[track].metric}", f"--data=data/{track}", f"--n={TRACKS[track].n}", "--seed=0"]
    with tempfile.TemporaryDirectory() as place:
        prompts, pictures = Path(place, "prompts.txt"), Path(place, "pictures")
        run_tool("tools/score.py", *asked, f"--write_prompts={prompts}")
        drawing = [f"--checkpoint=runs/{name}", f"--prompts={prompts}", "--seed_step=1", f"--out={pictures}"]
        run_entry(folder, "sample.py", *drawing)
        (pictures / "scores.jsonl").unlink(missing_ok=True)  # an entry's own
        run_tool("tools/score.py", *asked, f"--pictures={pictures}")
        return json.loads((pictures / "scores.jsonl").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def enter(folder: Path, track: str, told: dict[str, str], flags: list[str]) -> None:
    """`race.py enter`: train and score what the folder lacks, then write the claim. Raises UserError."""
    if (folder / "record.json").exists():
        raise UserError(f"{folder} is a finished record, which is not overwritten: name another folder")
    base, sources = baseline_of(track, folder), {name: (ROOT / name).read_text() for name in SOURCES}
    set_up(track)
    *_, identity = prepare([f"--preset={track}", *flags, *flags_of(RULES), "--resume=never"])
    for name, what in turns(track, base, sources, identity["config"]).items():
        print(name)
        place, made = folder / name, Path("runs", folder.name, name)
        if (place / "log.txt").exists():
            check_run(parse_log(name, (place / "log.txt").read_text(), {}), track, *what)
            continue
        run = train(made, track, *what)
        place.mkdir(parents=True, exist_ok=True)
        if run.score:
            (place / "score.json").write_text(json.dumps(run.score, indent=2) + "\n")
        if name == "seed-0":
            shutil.copy(max(made.glob("runs/*/samples/step_*.png")), folder / "grid.png")
        (place / "log.txt").write_text(run.log)  # last: it says that all is there
    if base:
        (folder / "change.patch").write_text(make_patch(base.sources, sources))
    else:
        write(sources, folder / "source")
    claim = told | claim_of(load_runs(folder, track, base), track)
    (folder / "record.json").write_text(json.dumps(claim, indent=2) + "\n")
    print(f"{folder} is filled. Write its README.md, what changed and why, and then: ./run.sh verify {folder}")


def verify(folder: Path, n: int) -> None:
    """`race.py verify`: print what was checked, what came out again, and yes or no. Raises UserError or SystemExit."""
    try:
        record = load_record(folder, *CHECKS)
        print("\n".join(f"checked: {check.__doc__}" for check in CHECKS))
        changed = differences(record.runs[-1].config, (record.base or record).runs[-1].config)
        print(f"the config differs from the baseline's in {changed or 'nothing'}")
        if n:
            print("now its code is executed: read change.patch first")
            rerun(record, n)
    except Refusal as reason:
        print(f"no: {reason}")
        sys.exit(1)
    print(f"yes: {folder} was checked, and {n} of its {TRACKS[record.track].seeds} seeds trained and scored again")


def rerun(record: Record, n: int) -> None:
    """Train and score the first `n` seeds again, each after the baseline; raises Refusal where less comes out."""
    set_up(record.track)
    planned = turns(record.track, record.base, record.sources, record.runs[-1].config)
    track, again = TRACKS[record.track], []
    for run in record.runs[: n * len(record.runs) // track.seeds]:
        with tempfile.TemporaryDirectory() as place:
            again.append(train(Path(place), record.track, *planned[run.name]))
        print(f"{run.name} took {again[-1].seconds:.1f} s, and {run.seconds:.1f} s in the record")
    new, old = claim_of(again, record.track), claim_of(record.runs[: len(again)], record.track)
    now, was = new["score"]["mean"], old["score"]["mean"]
    text = f"mean score {now:.4f}, and {was:.4f} of these seeds in the record"
    need(abs(now - was) <= 3 * math.sqrt(2 / n) * track.sigma, f"it does not reproduce: {text}")
    need(n < track.seeds or now >= track.target, f"it does not reproduce: {text}, and the target is {track.target}")
    print(text)
    if "ratio" in new:
        ratio, claimed = new["ratio"]["mean"], record.claim["ratio"]["mean"]
        kept = claimed * (1 - 2 * RATIO_SPREAD * math.sqrt(1 / n + 1 / track.seeds))
        text = f"{ratio:.2f}x as fast as the baseline; {claimed:.2f}x is claimed, and {kept:.2f}x would do"
        need(ratio >= kept, f"it does not reproduce: {text}; more of --rerun tells more exactly")
        print(text)


def table(prefix: str) -> str:
    """Each track's records as Markdown, oldest first; `prefix` is the way from the page to them. Raises UserError."""
    titles = {name: f"**{name}**: {ours.metric} {ours.value}, +- its standard error" for name, ours in TRACKS.items()}
    titles[FORMER] = "**race, of the former layout**: scenes exact, +- its standard error; scored by itself, in bf16"
    rows = {name: [] for name in titles}
    for file in Path("records").glob("*/record.json"):
        name, claim = file.parent.name, json.loads(file.read_text())
        if claim["track"] != FORMER:
            load_record(file.parent, check_claim)
        error = 100 * statistics.stdev(claim["score"]["each"]) / math.sqrt(len(claim["score"]["each"]))
        ratio = f"{claim['ratio']['mean']:.2f}x as fast" if "ratio" in claim else ""
        cells = [claim["date"][:10], f"[{name}]({prefix}{name})", claim["author"], claim["summary"],
                 f"{claim['score']['mean']:.1%} +- {error:.1f}", f"{claim['seconds']['mean']:,.1f} s", ratio]
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        rows[claim["track"]].append((claim["date"], f"| {' | '.join(cells)} |\n"))
    head = "| date | record | by | what changed | score | time | ratio |\n" + "| --- " * 7 + "|\n"
    return "\n".join(f"{titles[track]}\n\n{head}" + "".join(line for _, line in sorted(lines))
                     for track, lines in rows.items() if lines)


def write_tables() -> None:
    """`race.py table --write`: the tables into the two pages. Raises UserError."""
    for page, prefix in ((Path("records/README.md"), ""), (Path("README.md"), "records/")):
        before, begin, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise UserError(f"{page} lacks the lines {BEGIN.strip()} and {END.strip()}, between which the tables go")
        page.write_text(f"{before}{begin}\n{table(prefix)}\n{end}{after}")
        print(page)


def main(argv: list[str]) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # what runs beside prints too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it trains ends with it
    parser = Parser(prog="race.py", description="Enter, verify and list records; records/README.md has the rules.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("enter", help="train, score and claim; flags of train_prx.py go behind --").add_argument
    add("record", type=Path, help="records/DATE-TRACK-NAME; what is there is not trained again")
    add("--track", choices=TRACKS, default="race", help="the race")
    add("--author", default="", help="who made it; may be written into record.json later")
    add("--summary", default="", help="what changed, in a few words for the table; the same")
    add = commands.add_parser("verify", help="check a record, train it again; 0 is yes, 1 no, 2 a mistake").add_argument
    add("record", type=Path, help="a record's folder")
    add("--rerun", type=int, choices=range(4), default=1, metavar="N", help="seeds to train again")
    add = commands.add_parser("table", help="list the records").add_argument
    add("--write", action="store_true", help="write them into records/README.md and README.md")
    cut = argv.index("--") if "--" in argv else len(argv)
    parser.parse_known_args(argv[:cut])  # a command of its own names the nearest of its flags
    args = commands.choices[argv[0]].parse_args(argv[1:cut])
    if argv[0] == "enter":
        enter(args.record, args.track, {"author": args.author, "summary": args.summary}, argv[cut + 1 :])
    elif argv[0] == "verify":
        verify(args.record, args.rerun)
    elif args.write:
        write_tables()
    else:
        print(table("records/"), end="")


if __name__ == "__main__":
    run_main(main)
