"""The rules of records/README.md, as far as a program can check them: tracks, what logs say, and whether a record holds.

    record = load_record(Path("records/NAME"))
    for check in CHECKS: print(check(record))       each says what holds, or raises Refusal

Nothing here starts a process, runs or unpickles what it reads. race.py enters records and trains them again.
"""
import contextlib
import difflib
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from shards import UserError, file_sha256

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"


@dataclass(frozen=True)
class Track:
    """One race. What is None or empty is not set yet; then it is not asked for, and `race.py verify` says so."""

    preset: str  # of the working tree's train_prx.py, which is the entry
    baseline: str  # its folder in records/, the one that builds on no record; empty: the first record will be it
    data: dict[str, str]  # folder -> sha256 of its manifest
    level: str  # of the scenes in `data`, which race.py makes where they are missing; empty: pictures of other sources
    rows: int  # of them
    image_size: int  # pixels, of the pictures that are scored
    metric: str  # of the averaged weights after the last step, as metrics.jsonl calls it; none that training optimises
    score_n: int  # pictures that are scored
    target: float | None  # what the mean over seeds beats
    sigma: float | None  # standard deviation of the metric between seeds
    seeds: int  # at least so many: 0, 1, ...
    frozen: tuple[str, ...]  # values of --frozen
    fixed: tuple[str, ...]  # sources that no entry changes: what is drawn, what is held out, how it is scored
    cores: int  # CPU cores that a run is held to; 0: it runs on GPUs
    gpus: int  # how many; 0: any number
    ratio: bool  # the time is a ratio to the baseline's, run in turns: CPU minutes do not compare across machines
    reruns: bool  # verify trains it again, so that nothing may pause the clock; else it scores the checkpoint again
    unit: tuple[str, float]  # of time: its name, and seconds

    @property
    def scorer(self) -> str:
        """What --score and sample.py call the metric's family."""
        return self.metric.partition("_")[0]

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.scorer == "scenes" else -1


DEMO_SIGMA = 0.0227  # standard deviation of scenes_exact between the three seeds of 2026-11-22-demo-baseline

TRACKS = {
    "demo": Track(
        preset="race", baseline="2026-11-22-demo-baseline",
        data={"data/race": "9e73ad52dde32d2b58a0cbf0967b69255a2e888a67f79916bc48f42e50202e55"}, level="race", rows=20_000,
        image_size=64, metric="scenes_exact", score_n=512, target=0.90, sigma=DEMO_SIGMA, seeds=3, frozen=("none", "scene"),
        fixed=("scenes.py", "metrics.py"), cores=2, gpus=0, ratio=True, reruns=True, unit=("s", 1)),
    "solo": Track(
        preset="solo", baseline="",
        data={"data/solo": "d85efabcaf16a958e6afab445f666932d81479a0a398990c4b4de581b53b3809"}, level="solo", rows=20_000,
        image_size=256, metric="scenes_exact", score_n=512, target=0.95, sigma=None, seeds=3, frozen=("none", "scene"),
        fixed=("scenes.py", "metrics.py"), cores=0, gpus=1, ratio=False, reruns=True, unit=("min", 60)),
    # One seed, since a run costs hundreds of dollars; shards.py chooses its held-out rows
    "record": Track(
        preset="record", baseline="",
        data={"data/flux_generated": "", "data/flux_reason": "", "data/midjourney": ""}, level="", rows=0,
        image_size=1024, metric="cmmd", score_n=5_000, target=None, sigma=None, seeds=1, frozen=("pretrained", "none"),
        fixed=("scenes.py", "metrics.py", "shards.py"), cores=0, gpus=0, ratio=False, reruns=False, unit=("h", 3600)),
}
EARLIER = {  # sha256 of an earlier version of a fixed source that scores alike -> what is different in it
    "2bd466a730d2e53778193af34a6dd86c9884745f9b429ba3af4e767fc315c626": "scenes.py trained its teacher with products in bf16",
    "d3b48d3b6efb48c0397a7f0a72d05a04d4ed05319b7f0c4dbaee0ff6c4b33abc": "metrics.py gathered features by a function that torch 2.14 calls deprecated",
}

RATE_SLACK = 0.05, 0.01  # seconds and share: logs until 2026-11-25 took a window's images/s a few lines of Python after its clock
START_SLACK = 10.0  # seconds: in those, readers started on the clock, and not in images/s, at a stage's start
END_SLACK = 1.0  # seconds: in those, a GPU was still computing when its last window was written
WALL_SLACK = 1.0  # seconds: timestamps are whole
IDLE = 120.0, 0.3  # seconds and share of the clock that a run takes before and after it: set-up, and the score at its end
PRICE = 2.0  # dollars a GPU-hour, for everyone
DIGITS = {"score": 4, "seconds": 2, "baseline_seconds": 2, "ratio": 3}  # in record.json, after the point

QUIET = ("eval_every", "sample_every", "score_every", "save_every")  # of Config; 0: only the end pauses the clock
TOLD = ("track", "author", "summary", "builds_on", "checkpoint")  # in record.json, and not in the logs
TO_WRITE = "(write here what changed and why, with what each part gained)"


class Refusal(Exception):
    """Why a record does not hold, in one line."""


def need(condition: object, reason: str) -> None:
    if not condition:
        raise Refusal(reason)


# ---------------------------------------------------------------------------------------------------------------------
# Logs


class Window(NamedTuple):
    """A log window, as printed."""

    step: int
    values: dict[str, str]  # by their names in metrics.jsonl


@dataclass(frozen=True)
class Log:
    """A log.txt, of one whole run; that its sources hash to what it claims is known."""

    sources: dict[str, str]
    config: dict
    started: datetime
    finished: datetime
    versions: str  # of python, torch and others
    processes: int
    hardware: str
    threads: int
    data: dict[str, str]  # folder -> sha256 of its manifest
    teacher: str | None  # sha256 of the scene teacher, where the run had one
    warmup: float  # seconds, off the clock
    windows: list[Window]
    end: int  # its last step
    scores: dict[str, tuple[str, str]]  # after the last step: value and half of its 95% interval, as printed
    seconds: float  # on the clock at the last step


TIME, NUMBER = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", r"(\d+(?:\.\d+)?)"
BLOCK = re.compile(r"==== (\w+\.py) sha256 ([0-9a-f]{64})\n(.*?)====\n(?===== |config )", re.DOTALL)
LINES = {  # what a log has one line of -> how that reads
    "config": r"config (\{.*\})",
    "start": TIME + r"  (python \S+  torch \S+.*)",
    "hardware": r"(\d+) x (.+), (\d+) threads; source ([0-9a-f]{12}); run \S+, seed (\d+), \w+",
    "warm-up": rf"warmed up in {NUMBER} s, off the clock",
    "end": rf"{TIME}  finished at step (\d+), {NUMBER} s on the clock: .*",
}
WINDOW = re.compile(rf"step (\d+)/\d+  (?:(.+)  )?{NUMBER} images/s  {NUMBER} s  .+ left.*")
SCORES = re.compile(r"step (\d+)/\d+  (\w+ \S+ \+-\S+(?:  \w+ \S+ \+-\S+)*)")
DATA = re.compile(r"data (.+), manifest ([0-9a-f]{64})")
TEACHER = re.compile(r"teacher .+, sha256 ([0-9a-f]{64});.*")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def source_hash(sources: dict[str, str]) -> str:
    """train_prx.SOURCE_HASH of these sources."""
    return sha256("".join(sources.values()))


def read_json(text: str, what: str) -> dict:
    """A JSON object, of numbers that a float can hold; raises Refusal."""
    def refuse(text: str):
        raise ValueError(text)

    def whole(digits: str) -> int:
        return int(digits) if len(digits) < 20 else refuse(digits)

    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(values := json.loads(text, parse_constant=refuse, parse_int=whole), dict):
            return values
    raise Refusal(f"{what} holds what is no JSON object")


def parse_log(text: str) -> Log:
    """A log.txt as train_prx.py writes it; raises Refusal where it is not one whole run of the sources that it claims."""
    sources, at = {}, 0
    while block := BLOCK.match(text, at):
        name, claimed, source = block.groups()
        need(name not in sources, f"{name} is there twice")
        need(sha256(source) == claimed, f"{name} hashes to {sha256(source)[:12]}, and the log claims {claimed[:12]}")
        sources[name], at = source, block.end()
    lines, found = text[at:].splitlines(), {}
    need("train_prx.py" in sources and lines and lines[0].startswith("config "), "it does not begin with sources and a config")
    need(not any(line.startswith("continuing from step") for line in lines), "the run was continued from a checkpoint")
    for what, pattern in LINES.items():
        matches = [match for line in lines if (match := re.fullmatch(pattern, line))]
        need(len(matches) == 1, f"{len(matches)} lines say the run's {what}, and one has to")
        found[what] = matches[0].groups()
    (config,), (started, versions), (warmup,), (finished, end, seconds) = (found[what] for what in LINES if what != "hardware")
    processes, hardware, threads, source, seed = found["hardware"]
    need(source_hash(sources).startswith(source), f"the sources hash to {source_hash(sources)[:12]}, and the log claims {source}")
    config = read_json(config, "its config")
    need(config.get("seed") == int(seed), f"it says seed {seed}, and its config says {config.get('seed')}")
    teachers = [match[1] for match in map(TEACHER.fullmatch, lines) if match]
    windows = [Window(int(step), dict(re.findall(r"(\w+) (\S+)", terms or "")) | {"images_per_second": rate, "seconds": clock})
               for step, terms, rate, clock in (match.groups() for match in map(WINDOW.fullmatch, lines) if match)]
    last = [match[2] for match in map(SCORES.fullmatch, lines) if match and match[1] == end]
    scores = {name: (value, error) for part in last for name, value, error in re.findall(r"(\w+) (\S+) \+-(\S+)", part)}
    data = dict(match.groups() for match in map(DATA.fullmatch, lines) if match)
    return Log(sources, config, datetime.fromisoformat(started), datetime.fromisoformat(finished), versions, int(processes),
               hardware, int(threads), data, teachers[0] if teachers else None, float(warmup), windows, int(end), scores,
               float(seconds))


@dataclass(frozen=True)
class Run:
    """A run's log.txt and metrics.jsonl."""

    name: str  # its folder's
    log: Log
    metrics: list[dict]

    @property
    def windows(self) -> list[dict]:
        """The lines of metrics.jsonl that are log windows."""
        return [line for line in self.metrics if "images_per_second" in line]

    @property
    def machine(self) -> str:
        """Hardware and software."""
        return f"{self.log.processes} x {self.log.hardware}, {self.log.threads} threads; {self.log.versions}"

    def score(self, name: str) -> float:
        """A score after the last step, unrounded; raises Refusal."""
        found = [line[name] for line in self.metrics if line.get("step") == self.log.end and name in line]
        need(len(found) == 1 and isinstance(found[0], float), f"{self.name}/metrics.jsonl has no {name} after the last step")
        return found[0]


def load_run(folder: Path) -> Run:
    """A run by its folder; raises Refusal where there is none that is whole."""
    try:
        text, lines = (folder / "log.txt").read_text(), (folder / "metrics.jsonl").read_text().splitlines()
        return Run(folder.name, parse_log(text), [read_json(line, "metrics.jsonl") for line in lines])
    except (OSError, ValueError, Refusal) as error:
        raise Refusal(f"{folder}: {error}") from None


@dataclass(frozen=True)
class Record:
    """A record's folder, read."""

    folder: Path
    track: Track
    claim: dict  # record.json
    seeds: list[Run]
    baselines: list[Run]

    @property
    def runs(self) -> list[Run]:
        return self.seeds + self.baselines

    @property
    def is_baseline(self) -> bool:
        return self.claim.get("builds_on") is None


def load_record(folder: Path) -> Record:
    """Raises UserError where there is no record, Refusal where one is damaged."""
    if not (folder / "record.json").is_file():
        raise UserError(f"no record at {folder}: it has no record.json, which `python race.py enter {folder}` writes")
    claim = read_json((folder / "record.json").read_text(errors="replace"), "record.json")
    need(claim.get("track") in [*TRACKS], f"record.json is of track {claim.get('track')!r}; known are {', '.join(TRACKS)}")
    return Record(folder, TRACKS[claim["track"]], claim, *load_arms(folder))


def load_arms(folder: Path) -> tuple[list[Run], list[Run]]:
    """The runs seed-K of a record, and its runs baseline-K, by K; raises Refusal."""
    arms = []
    for arm in ("seed", "baseline"):
        places = [path for path in folder.glob(f"{arm}-*") if re.fullmatch(arm + r"-\d+", path.name)]
        arms.append([load_run(path) for path in sorted(places, key=lambda path: int(path.name.removeprefix(f"{arm}-")))])
    return arms[0], arms[1]


def base_of(record: Record) -> Record:
    """The earlier record that this one builds on, beside it; raises Refusal."""
    name = record.claim["builds_on"]
    need(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name), "record.json names no record as builds_on")
    try:
        other = load_record(record.folder.parent / name)
    except UserError as error:
        raise Refusal(f"record.json has builds_on {name}, and there is {error}") from None
    need(other.claim["track"] == record.claim["track"] and other.seeds, f"{name}, on which it builds, is of another track")
    need(other.seeds[0].log.started < record.seeds[0].log.started, f"{name}, on which it builds, is no earlier record")
    return other


def baseline_of(track: Track) -> Record:
    """The committed baseline; raises UserError where the track has none, Refusal where it is damaged."""
    if not track.baseline:
        raise UserError(f"the track of preset {track.preset} has no baseline yet, against which its times are ratios")
    return load_record(RECORDS / track.baseline)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of runs, each for itself


def check_fixed(record: Record) -> str:
    """What no entry changes is the repository's."""
    for run in record.runs:
        for name in record.track.fixed:
            found = sha256(run.log.sources.get(name, ""))
            need(found in (file_sha256(HERE / name), *EARLIER), f"{run.name} ran another {name} ({found[:12]}) than the "
                 "repository's; no entry changes what is drawn, held out or scored")
    return f"{', '.join(record.track.fixed)}: as in the repository, or in a listed earlier version"


def check_config(record: Record) -> str:
    """The configs keep to the rules."""
    for run in record.runs:
        check_rules(run.name, run.log.config, record.track)
    return f"config: {record.track.score_n} pictures of {record.track.image_size}px scored, all steps run, from no other weights"


def check_rules(name: str, config: dict, track: Track) -> None:
    """Raise Refusal, beginning with `name`, where a config leaves the rules."""
    stages = config.get("stages")
    need(isinstance(stages, list) and stages and all(isinstance(stage, dict) and all(
        isinstance(stage.get(key), int) and stage[key] > 0 for key in ("image_size", "steps", "global_batch")) for stage in stages),
         f"{name} has a config without stages")
    folders = [part.partition(":")[0] for part in str(config.get("data")).split(",")]
    need(sorted(folders) == sorted(track.data),
         f"{name} has --data={config.get('data')}, and the track's is {','.join(track.data)}")
    size = stages[-1]["image_size"]
    need(size == track.image_size, f"{name} ends at {size}px, and {track.image_size}px are scored")
    need(config.get("frozen") in track.frozen,
         f"{name} has --frozen={config.get('frozen')}, and may have {', '.join(track.frozen)}")
    need(re.fullmatch(r"\w[\w.-]*", str(config.get("name"))), f"{name} has no plain name in its config")
    wanted = {"init": "", "max_steps": 0, "track": "none", "score": track.scorer, "score_n": track.score_n}
    for key, value in (wanted | (dict.fromkeys(QUIET, 0) if track.reruns else {})).items():
        need(config.get(key) == value, f"{name} has --{key}={config.get(key)}, and the rules say --{key}={value}")


def check_data(record: Record) -> str:
    """The data are the track's."""
    for run in record.runs:
        need(run.log.data.keys() == record.track.data.keys(), f"{run.name} read {', '.join(run.log.data) or 'no data'}")
        for folder, found in run.log.data.items():
            wanted = record.track.data[folder]
            need(found == wanted or not wanted,
                 f"{run.name} read {folder} of manifest {found[:12]}, and the track's is {wanted[:12]}")
        need((run.log.teacher is None) == (run.log.config["frozen"] != "scene"), f"{run.name} has --frozen="
             f"{run.log.config['frozen']}, and its log names {'a' if run.log.teacher else 'no'} scene teacher")
    return "; ".join(f"{folder}, manifest {found[:12]}" + ", which the track has not fixed yet" * (not record.track.data[folder])
                     for folder, found in record.runs[0].log.data.items())


def check_machine(record: Record) -> str:
    """One machine, which fits the track."""
    track, first = record.track, record.runs[0]
    for run in record.runs:
        log, on_cpu = run.log, run.log.hardware.endswith(" CPU")
        if track.cores:
            need(on_cpu and log.processes == 1 and log.threads == track.cores, f"{run.name} ran on {run.machine}: the track is for "
                 f"one process on {track.cores} CPU cores")
        need(not track.gpus or (log.processes == track.gpus and not on_cpu), f"{run.name} ran on {run.machine}: the track is for "
             f"{track.gpus} GPU")
        need(run.machine == first.machine, f"{run.name} ran on {run.machine}, and {first.name} on {first.machine}")
    return f"all on {first.machine}"


def check_metrics(record: Record) -> str:
    """metrics.jsonl says what log.txt says, to the digits that log.txt has."""
    for run in record.runs:
        need(len(run.windows) == len(run.log.windows), f"{run.name}: metrics.jsonl has {len(run.windows)} windows, and log.txt "
             f"{len(run.log.windows)}")
        for window, line in zip(run.log.windows, run.windows, strict=True):
            wrong = [name for name, text in window.values.items() if not is_printed_as(line.get(name), text)]
            need(line.get("step") == window.step and not wrong,
                 f"{run.name}: metrics.jsonl and log.txt differ at step {window.step}: {', '.join(wrong)}")
        need(record.track.metric in run.log.scores, f"{run.name}/log.txt has no {record.track.metric} after the last step")
        score = run.score(record.track.metric)
        need(math.isfinite(score) and (record.track.scorer != "scenes" or 0 <= score <= 1),
             f"{run.name}: {record.track.metric} cannot be {score}")
        for name, (value, error) in run.log.scores.items():
            need(f"{run.score(name):.4g}" == value and f"{run.score(name + '_error'):.2g}" == error,
                 f"{run.name}: metrics.jsonl and log.txt differ in the last {name}")
    return "metrics.jsonl says what log.txt says"


def is_printed_as(value: object, text: str) -> bool:
    """Whether a number reads as `text`, with as many digits after the point."""
    return isinstance(value, int | float) and f"{value:.{len(text.partition('.')[2])}f}" == text


def check_clock(record: Record) -> str:
    """The clock only grows, each window fits its images/s, and the wall clock has room for it."""
    for run in record.runs:
        log, ends, step, clock = run.log, stage_ends(run.log.config), 0, 0.0
        wrong = f"{run.name}: the clock does not add up"
        for line in run.windows:
            need(step < line["step"] <= ends[-1] and line["seconds"] > clock, f"{wrong}: it goes from {clock:.2f} s at step {step} "
                 f"to {line['seconds']:.2f} s at step {line['step']}")
            stage = next(stage for stage, end in zip(log.config["stages"], ends) if line["step"] <= end)
            took, images = line["seconds"] - clock, (line["step"] - step) * stage["global_batch"]
            says, slack = images / max(line["images_per_second"], 1e-9), RATE_SLACK[0] + RATE_SLACK[1] * took
            need(says - slack <= took <= says + slack + START_SLACK * (step in (0, *ends)), f"{wrong}: {took:.2f} s for the "
                 f"{images} images before step {line['step']}, and images/s say {says:.2f} s")
            step, clock = line["step"], line["seconds"]
        need(step == log.end == ends[-1], f"{run.name} ends at step {step} of {ends[-1]}")
        need(clock - 0.01 <= log.seconds <= clock + END_SLACK,
             f"{wrong}: {clock:.2f} s in its last window, and {log.seconds:.2f} s at its end")
        wall = (log.finished - log.started).total_seconds()
        need(log.warmup + log.seconds <= wall + WALL_SLACK, f"{wrong}: {log.warmup:.1f} s of warm-up and {log.seconds:.1f} s are "
             f"more than the {wall:.0f} s between its timestamps")
        idle = IDLE[0] + IDLE[1] * log.seconds
        need(not record.track.reruns or wall - log.warmup - log.seconds <= idle, f"{wrong}: of the {wall:.0f} s between its "
             f"timestamps {log.warmup:.1f} s are warm-up, {log.seconds:.1f} s are on the clock, and the rest is over {idle:.0f} s")
    return f"the clock adds up, in {sum(len(run.windows) for run in record.runs)} windows"


def stage_ends(config: dict) -> list[int]:
    """The last step of each stage."""
    return [sum(stage["steps"] for stage in config["stages"][: i + 1]) for i in range(len(config["stages"]))]


# ---------------------------------------------------------------------------------------------------------------------
# Checks of a record as a whole


def check_seeds(record: Record) -> str:
    """Seeds 0, 1, ... of one source and config, enough of them; and as many of the committed baseline."""
    n, arms = len(record.seeds), {"seed": (record.seeds, record.seeds[0])}
    need(n >= record.track.seeds, f"{n} seed{'s' * (n > 1)}, and the track takes {record.track.seeds}")
    if record.track.ratio and not record.is_baseline:
        arms["baseline"] = record.baselines, baseline_of(record.track).seeds[0]
    need("baseline" in arms or not record.baselines, "there are runs of a baseline, and no ratio to it is claimed")
    for arm, (runs, like) in arms.items():
        need([run.name for run in runs] == [f"{arm}-{k}" for k in range(n)], f"{n} seeds take the runs {arm}-0 to {arm}-{n - 1}, "
             f"and there are {', '.join(run.name for run in runs) or 'none'}")
        for k, run in enumerate(runs):
            need(run.log.config["seed"] == k, f"{run.name} ran with seed {run.log.config['seed']}")
            names = differences(run.log.sources | run.log.config, like.log.sources | like.log.config)
            need(not names, f"{run.name} has another {', '.join(names)} than {like.name}"
                 + " of the committed baseline" * (arm == "baseline"))
            need(run.log.teacher == runs[0].log.teacher, f"{run.name} has another scene teacher than {runs[0].name}")
    return f"seeds 0 to {n - 1}, of one source and config" + "; the baseline's are the committed ones" * len(record.baselines[:1])


def differences(ours: dict, theirs: dict) -> list[str]:
    """The sources, or fields of a config, in which two runs differ, but for seed and name."""
    return sorted(key for key in (ours.keys() | theirs.keys()) - {"seed", "name"} if ours.get(key) != theirs.get(key))


def check_turns(record: Record) -> str:
    """One run at a time, the baseline's and the entry's in turns."""
    runs = [run for pair in zip(record.baselines, record.seeds) for run in pair] or record.seeds
    for before, after in pairwise(runs):
        need(before.log.finished <= after.log.started,
             f"{after.name} began before {before.name} ended: runs take turns, one at a time")
    return "one run at a time" + ", the baseline's and the entry's in turns" * bool(record.baselines)


def check_target(record: Record) -> str:
    """The mean over seeds beats the target by three standard errors; a baseline's meets it."""
    track, scores = record.track, [run.score(record.track.metric) for run in record.seeds]
    mean = statistics.fmean(scores)
    text = f"mean {track.metric} {mean:.4f} of {len(scores)} seeds"
    if track.target is None:
        return f"{text}; the track has no target yet"
    margin = 0 if record.is_baseline else 3 * (track.sigma or 0) / math.sqrt(len(scores))
    wanted, how = track.target + track.sign * margin, " by three standard errors" * (margin > 0)
    need(track.sign * (mean - wanted) >= 0, f"{text}: to beat {track.target:g}{how} it takes {wanted:.4f}")
    return f"{text} beats {track.target:g}{how} ({wanted:.4f})" + "; the track has no sigma yet" * (track.sigma is None)


def check_claim(record: Record) -> str:
    """record.json claims what the logs give."""
    claim, wanted = {key: value for key, value in record.claim.items() if key not in TOLD}, claim_of(record)
    wrong = sorted(key for key in claim.keys() | wanted if claim.get(key) != wanted.get(key))
    need(not wrong, f"record.json claims another {', '.join(wrong)} than the logs give")
    return f"record.json claims what the logs give: {time_text(record)}"


def claim_of(record: Record) -> dict:
    """What record.json says of the logs: times in s; a ratio is how many times as fast as the baseline's run before it."""
    first, seconds = record.seeds[0], [run.log.seconds for run in record.seeds]
    values = {"score": [run.score(record.track.metric) for run in record.seeds], "seconds": seconds}
    if record.baselines:
        values["baseline_seconds"] = [run.log.seconds for run in record.baselines]
        values["ratio"] = [slow / fast for slow, fast in zip(values["baseline_seconds"], seconds, strict=True)]
    return {"date": str(first.log.started), "machine": first.machine, "teacher": first.log.teacher, "steps": first.log.end, **{
        name: {"mean": round(statistics.fmean(each), DIGITS[name]), "each": [round(value, DIGITS[name]) for value in each]}
        for name, each in values.items()}}


def time_text(record: Record) -> str:
    """The mean time in the track's unit; what it cost where GPUs are rented by the hour; the ratio where there is one."""
    (unit, seconds), mean, log = record.track.unit, record.claim["seconds"]["mean"], record.seeds[0].log
    cost = "" if record.track.reruns else f", ${mean / 3600 * log.processes * PRICE:,.0f}"
    return f"{mean / seconds:.4g} {unit}{cost}" + (f", {ratio_text(record)}" if "ratio" in record.claim else "")


def ratio_text(record: Record) -> str:
    return f"{record.claim['ratio']['mean']:.2f}x as fast" if "ratio" in record.claim else "the baseline" * record.is_baseline


def check_patch(record: Record) -> str:
    """change.patch is the difference to the record that this one builds on; only the track's baseline builds on none."""
    file, baseline, ours = record.folder / "change.patch", record.track.baseline, record.seeds[0].log
    if record.is_baseline:
        need(not file.exists(), "record.json names no record that it builds on, and there is a change.patch")
        need(baseline in ("", record.folder.name), f"it builds on no record, and of this track only {baseline} does")
        return "a baseline, which builds on no record"
    base = base_of(record)
    theirs = base.seeds[0].log
    need(file.is_file() and file.read_text(errors="replace") == patch(theirs.sources, ours.sources),
         f"change.patch is not the difference between the sources of {base.folder.name} and these")
    names = differences(ours.config, theirs.config)
    return f"change.patch is the difference to {base.folder.name}; the configs differ in {', '.join(names) or 'nothing'}"


def patch(old: dict[str, str], new: dict[str, str]) -> str:
    """A unified diff of sources, as `git apply` reads it."""
    parts = []
    for name in dict.fromkeys([*new, *old]):
        sides = (sources.get(name, "").splitlines(keepends=True) for sources in (old, new))
        labels = (f"{side}/{name}" if name in sources else "/dev/null" for side, sources in (("a", old), ("b", new)))
        parts += difflib.unified_diff(*sides, *labels)
    return "".join(parts)


def check_described(record: Record) -> str:
    """Somebody says what changed, and shows what it draws."""
    for key in ("author", "summary"):
        text = record.claim.get(key)
        need(isinstance(text, str) and text.strip() and text.isprintable(), f"record.json has no {key} of one line: write it there")
    readme = record.folder / "README.md"
    need((record.folder / "grid.png").is_file(), "there is no grid.png, what seed 0 draws")
    need(readme.is_file() and TO_WRITE not in readme.read_text(errors="replace"), "README.md does not say yet what changed and why")
    return "README.md says what changed"


OF_RUNS = (check_fixed, check_config, check_data, check_machine, check_metrics, check_clock)
CHECKS: tuple[Callable[[Record], str], ...] = (
    *OF_RUNS, check_seeds, check_turns, check_target, check_claim, check_patch, check_described)
