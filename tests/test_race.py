"""Records: how one is entered, what `verify` accepts and refuses, how they are listed. Run with
`python -m pytest tests/test_race.py`.

Most are of two small records, `base` and `entry`, that `race.py enter` makes of runs that are written down, not
trained; each refusal is of a copy that somebody has tampered with. One slow test takes the project's own scripts.
"""
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import train_prx
from conftest import ROOT, TINY
from records import race
from records.race import CHECKS, RULES, TRACKS, Refusal, load_record

pytestmark = pytest.mark.machinery

BASE = {"train_prx.py": "STEPS = 10\nNAME = 'base'\n", "muon.py": "LR = 1\n", "sample.py": "SCALE = 2\n"}
ENTRY = {**BASE, "train_prx.py": "STEPS = 6\nNAME = 'entry'\n", "sample.py": "SCALE = 2\nSTEPS = 20\n"}
MANIFEST = hashlib.sha256(b"{}").hexdigest()
TRACK = replace(TRACKS["race"], baseline="base", data=MANIFEST, size=32, target=0.5, sigma=0.01, cores=1, n=4, seeds=2)
LOG = """config {config}
{began}  python 3.12  torch 2.14  numpy 2.4
1 x Some CPU, 1 threads; source 0123; run x, seed 0, fp32
data data/race, manifest {manifest}
warmed up in 8.0 s, off the clock
{windows}step {steps}/{steps}  held-out loss 0.4
{ended}  finished at step {steps}, {seconds:.2f} s on the clock: x
"""


class Machine:
    """Stands for what race.py starts. A step takes half a second, an entry's that over `speed`; clocks lag `watch`."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now, self.speed, self.watch, self.score = datetime(2026, 12, 1), 1.0, 1.0, 0.75
        self.trained, self.asked = [], []
        patch.setattr(race, "run_entry", self.run_entry)
        patch.setattr(race, "run_tool", self.run_tool)
        patch.setattr(race, "flags_of", lambda config: [json.dumps(config)])

    def run_entry(self, folder: Path, script: str, *flags: str) -> list[tuple[float, str]]:
        if script == "sample.py":
            assert Path(flags[1].removeprefix("--prompts=")).read_text() == "a red circle" and "--seed_step=1" in flags
            race.write({"scores.jsonl": '{"praises": "itself"}'}, Path(flags[-1].removeprefix("--out=")))
            return []
        config = json.loads(flags[0])
        name, steps = config["name"], config["stages"][0]["steps"]
        pace = 0.5 / (self.speed if name.startswith("seed") else 1)  # seconds a step
        began, self.now = (self.now + timedelta(seconds=x) for x in (10, math.ceil(steps * pace) + 12))
        windows = [f"step {step}/{steps}  loss 0.5000  {16 / pace:.1f} images/s  {step * pace:.2f} s  0:00:01 left\n"
                   for step in range(2, steps + 1, 2)]
        texts = {file: (folder / file).read_text() for file in ("train_prx.py", "muon.py")}
        log = "".join(f"==== {file} sha256 {found}\n{texts[file]}====\n" for file, found in race.hashes(texts).items())
        log += LOG.format(config=json.dumps(config), began=began, ended=self.now, steps=steps, seconds=steps * pace,
                          manifest=MANIFEST, windows="".join(windows))
        race.write({"step_000009.png": "picture"}, folder / f"runs/{name}/samples")
        race.write({"log.txt": log}, folder / f"runs/{name}")
        self.trained.append(name)
        return [(0, "warmed up in 8.0 s"), (self.watch * steps * pace, windows[-1].strip())]

    def run_tool(self, script: str, *flags: str) -> None:
        what, value = flags[-1].removeprefix("--").split("=")
        self.asked.append(" ".join([script, *flags[:-1]]))
        seed = int(self.trained[-1][-1]) if self.trained else 0
        score = {"metric": "scenes", "n": 4, "seed": 0, "values": {"exact": self.score + 0.01 * seed}}
        file, text = {"write_prompts": ("", "a red circle"), "pictures": ("scores.jsonl", json.dumps(score)),
                      "out": ("manifest.json", "{}")}[what]
        Path(value, file).parent.mkdir(parents=True, exist_ok=True)
        with Path(value, file).open("a") as target:
            target.write(text)


def working_tree(sources: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Put sources into race.ROOT; the preset has as many steps as train_prx.py says."""
    race.write(sources, race.ROOT)
    steps = int(re.search(r"STEPS = (\d+)", sources["train_prx.py"])[1])
    config = {"name": "race", "data": "data/race", "seed": 0, "lr": 0.01, **RULES, "stages": [
        {"image_size": 32, "steps": steps, "global_batch": 16, "repa": True, "short": 0.0}]}
    patch.setattr(race, "prepare", lambda flags: (None, "never", [], {"config": config}))


def stay(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in `folder`, and hold these tests to no cores."""
    patch.chdir(folder)
    patch.setattr(race, "ROOT", folder)
    patch.setattr(os, "sched_setaffinity", lambda *_: None)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        patch.setenv(name, os.environ.get(name, "1"))  # and what race.py makes of it is undone


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """records/ of a checkout whose track is small: `base`, its baseline, and `entry`, which takes fewer steps."""
    checkout = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        stay(patch, checkout)
        patch.setitem(TRACKS, "race", TRACK)
        with pytest.MonkeyPatch.context() as inner:
            machine = Machine(inner)
            for name, sources in (("base", BASE), ("entry", ENTRY)):
                working_tree(sources, inner)
                race.main(["enter", f"records/{name}", "--author=A", "--summary=fewer | steps", "--", "--lr=1"])
                Path("records", name, "README.md").write_text("Fewer steps.")
        assert machine.trained == ["seed-0", "seed-1", "baseline-0", "seed-0", "baseline-1", "seed-1"]
        assert machine.asked == ["tools/scenes.py make --level=race --rows=20000 --size=32",
                                 *8 * ["tools/score.py --metric=scenes --data=data/race --n=4 --seed=0"]]
        yield checkout / "records"


@pytest.fixture
def copy(records):
    """A copy of the entry beside it, to tamper with."""
    shutil.copytree(records / "entry", records / "copy")
    yield records / "copy"
    shutil.rmtree(records / "copy")


@pytest.fixture
def machine(records, monkeypatch) -> Machine:
    """Gives the same again, unless it is told otherwise."""
    return Machine(monkeypatch)


def verdict(capsys, folder: Path, *flags: str) -> tuple[int, list[str]]:
    """Exit status and lines of `race.py verify`."""
    capsys.readouterr()
    try:
        status = race.main(["verify", str(folder), *flags]) or 0
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().out.splitlines()


SEEDS, BASELINES = ("seed-0/log.txt", "seed-1/log.txt"), ("baseline-0/log.txt", "baseline-1/log.txt")
EDITED = {  # what somebody did -> files, what is replaced in them, by what, and why that is refused; "": they are gone
    "another source": (SEEDS, "(muon.py sha256 ).{64}", r"\g<1>" + "0" * 64, "ran another muon.py"),
    "a patch that says more": (["change.patch"], r"\Z", "# harmless\n", "change.patch does not fit"),
    "other data": (SEEDS[1:], "manifest .{8}", "manifest 00000000", "read other data"),
    "pauses of the clock": (SEEDS, '"save_every": 0', '"save_every": 5', "save_every = 5, and the rules say 0"),
    "a smaller picture": (SEEDS, '"image_size": 32', '"image_size": 16', "image_size = 16"),
    "a continued run": (SEEDS[:1], "^(warmed up)", r"continuing from x\n\1", "one whole run from its first step"),
    "missing steps": (SEEDS[:1], "^step 6/6  loss.+\n", "", "its last window is step 4 of 6"),
    "a window too slow for its images/s": (SEEDS[:1], r"2\.00 s", "2.90 s", "the clock does not add up: 1.90 s"),
    "another clock at the end": (SEEDS[:1], r"3\.00 s on", "2.00 s on", "its end 2.00 s"),
    "a clock longer than the wall's": (SEEDS[1:], r":\d\d  finished", ":34  finished", "its timestamps leave -2 s"),
    "a run much longer than its clock": (SEEDS[1:], r"01:(\d\d  finished)", r"02:\1", "its timestamps leave 62 s"),
    "another config in one seed": (SEEDS[1:], '"lr": 0.01', '"lr": 0.02', "ran another lr"),
    "another baseline": (BASELINES, '"steps": 10', '"steps": 11', "baseline-0 ran another stages"),
    "runs at the same time": (SEEDS[:1], r"01:\d\d  python", "00:55  python", "runs take turns"),
    "another machine": (SEEDS[1:], "1 x Some", "1 x Fast", "seed-1 ran on another machine: 1 x Fast CPU"),
    "more threads": (SEEDS + BASELINES, "1 threads", "8 threads", "which is not the track's hardware"),
    "a score above 1": (["seed-1/score.json"], r"0\.76", "5.0", "no score by the rules"),
    "fewer pictures": (["seed-1/score.json"], '"n": 4', '"n": 2', "no score by the rules"),
    "other means": (["record.json"], r'"mean": [\d.]+', '"mean": 9', "another baseline_seconds, ratio, score, seconds"),
    "no patch": (["change.patch"], "", "", "damaged: FileNotFoundError"),
    "no description": (["README.md"], "", "", "there is no README.md"),
}


@pytest.mark.parametrize("what", EDITED)
def test_refused_before_anything_is_executed(copy, machine, capsys, what):
    files, pattern, text, reason = EDITED[what]
    for file in (copy / file for file in files):
        new, found = re.subn(pattern, text, file.read_text(), flags=re.MULTILINE)
        assert found, f"{pattern} is not in {file}"
        file.write_text(new) if pattern else file.unlink()
    status, lines = verdict(capsys, copy)
    assert status == 1 and len(lines) == 1 and lines[0].startswith("no: ") and reason in lines[0], lines
    assert not machine.trained and not machine.asked


def test_an_honest_record_is_accepted_and_trained_again_in_turns_with_the_baseline(records, machine, capsys):
    entry, base = load_record(records / "entry"), load_record(records / "base")
    assert entry.sources == ENTRY and base.sources == BASE and base.base is None and entry.base == base
    assert (records / "entry/grid.png").read_bytes() == b"picture" and "NAME" not in entry.runs[-1].log
    assert entry.claim["seconds"]["each"] == [3, 3] and entry.claim["ratio"] == {"mean": 1.6667, "each": [1.6667] * 2}
    assert entry.claim["score"] == {"mean": 0.755, "each": [0.75, 0.76]} and "ratio" not in base.claim
    status, lines = verdict(capsys, records / "entry", "--rerun=0")
    assert status == 0 and not machine.trained and sum(line.startswith("checked: ") for line in lines) == len(CHECKS)
    assert lines[-2:] == ["the config differs from the baseline's in stages",
                          f"yes: {records / 'entry'} was checked, and 0 of its 2 seeds trained and scored again"]
    status, lines = verdict(capsys, records / "entry")
    assert status == 0 and machine.trained == ["baseline-0", "seed-0"], lines
    assert lines[-3:-1] == ["mean score 0.7500, and 0.7500 of these seeds in the record",
                            "1.67x as fast as the baseline; 1.67x is claimed, and 1.22x would do"]
    assert verdict(capsys, records / "base")[0] == 0 and machine.trained[2:] == ["seed-0"]


@pytest.mark.parametrize("n, changed, reason", [
    (1, {"score": 0.75 + 0.042}, ""), (2, {"score": 0.75 - 0.029}, ""),  # 3 sqrt(2 / n) sigma: 0.0424 and 0.03
    (1, {"score": 0.75 + 0.043}, "it does not reproduce: mean score 0.7930"),
    (2, {"score": 0.75 - 0.031}, "it does not reproduce: mean score 0.7240"),
    (1, {"speed": 0.74}, ""), (2, {"speed": 0.79}, ""),  # 1 - 2 * 0.11 sqrt(1 / n + 1 / 2): 0.731 and 0.78
    (2, {"speed": 0.77}, "it does not reproduce: 1.28x as fast as the baseline; 1.67x is claimed, and 1.3"),
    (1, {"watch": 1.5}, "baseline-0: its clock says 5.0 s, and a stopwatch beside it 7.5 s")])
def test_trained_again_less_than_the_record_claims_or_a_wrong_clock_is_no(records, machine, capsys, n, changed, reason):
    vars(machine).update(changed)
    status, lines = verdict(capsys, records / "entry", f"--rerun={n}")
    assert status == bool(reason) and (not reason or lines[-1].startswith(f"no: {reason}")), lines


@pytest.mark.parametrize("name, target, holds", [
    ("entry", 0.733, True), ("entry", 0.734, False), ("base", 0.755, True), ("base", 0.756, False)])
def test_the_mean_beats_the_target_by_three_standard_errors_and_a_baselines_meets_it(
        records, monkeypatch, capsys, name, target, holds):
    """Two seeds of mean 0.755: three standard errors are 3 * 0.01 / sqrt(2) = 0.0212."""
    monkeypatch.setitem(TRACKS, "race", replace(TRACK, target=target))
    status, lines = verdict(capsys, records / name, "--rerun=0")
    assert status == 0 if holds else "the mean score is 0.7550: to beat" in lines[-1]


def test_a_call_that_was_cut_short_continues(records, machine, monkeypatch):
    for name in ("baseline-0", "seed-0"):
        shutil.copytree(records / f"entry/{name}", records / f"new/{name}")
    working_tree(ENTRY, monkeypatch)
    race.main(["enter", "records/new", "--author=B", "--summary=the same"])
    assert machine.trained == ["baseline-1", "seed-1"]
    shutil.rmtree(records / "new")


def test_a_script_is_heard_as_it_speaks_and_its_failure_said(tmp_path):
    (tmp_path / "a.py").write_text("import sys, time\nprint('data', flush=True)\ntime.sleep(0.2)\nprint(sys.argv[1])")
    _, (first, said), (last, _) = race.run_entry(tmp_path, "a.py", "none")
    assert said == "data" and 0.15 < last - first
    with pytest.raises(Refusal, match="a.py ended with status 1: IndexError"):
        race.run_entry(tmp_path, "a.py")


def test_every_preset_survives_its_way_through_a_log_as_flags():
    for cfg in train_prx.PRESETS.values():
        logged = json.loads(json.dumps(train_prx.config_to_json(cfg)))
        assert train_prx.parse_config(race.flags_of(logged))[0] == cfg


@pytest.mark.slow
def test_an_entry_of_the_project_from_enter_to_verify(checkout, data, monkeypatch, capsys):
    """With its own training, sampling and referee, in processes of their own."""
    (checkout / "data").mkdir()
    (checkout / "data/race").symlink_to(data)
    stay(monkeypatch, checkout)
    monkeypatch.setattr(race, "RATIO_SPREAD", 10)  # runs of a quarter of a second: their ratio is noise
    track = replace(TRACK, data=race.file_sha256(data / "manifest.json"), target=-1.0, sigma=0.3, seeds=1)
    monkeypatch.setitem(TRACKS, "race", replace(track, baseline=""))
    flags = ["--author=A", "--summary=b", "--", *TINY[1:], "--log_every=2", "--stages=32:10:16:1"]
    race.main(["enter", "records/base", *flags])
    monkeypatch.setitem(TRACKS, "race", track)
    file = checkout / "train_prx.py"
    file.write_text(file.read_text().replace("\nimport ", "\n# faster\nimport ", 1))
    race.main(["enter", "records/entry", *flags, "--stages=32:6:16:1"])
    for name in ("base", "entry"):
        Path("records", name, "README.md").write_text("Fewer steps.")
    status, lines = verdict(capsys, checkout / "records/entry")
    assert status == 0 and "the config differs from the baseline's in stages" in lines, lines
    assert lines[-1].endswith("was checked, and 1 of its 1 seeds trained and scored again")


def test_the_table_goes_between_its_markers_and_holds_what_runs_give(records):
    former = shutil.copytree(ROOT / "records/2026-11-22-demo-patch16", records / "former")
    for page in (Path("README.md"), records / "README.md"):
        page.write_text(f"before\n{race.BEGIN}old\n{race.END}after\n")
    race.main(["table", "--write"])
    for page, prefix in ((Path("README.md"), "records/"), (records / "README.md", "")):
        text = page.read_text()
        assert text.startswith(f"before\n{race.BEGIN}") and text.endswith(f"{race.END}after\n") and "old" not in text
        base, entry, last = [line for line in text.splitlines() if line.startswith("| 20")]
        assert base == f"| 2026-12-01 | [base]({prefix}base) | A | fewer \\| steps | 75.5% +- 0.5 | 5.0 s |  |"
        assert entry.endswith("75.5% +- 0.5 | 3.0 s | 1.67x as fast |") and "of the former layout" in text
        assert last.endswith("99.1% +- 0.2 | 156.5 s | 2.90x as fast |")
    shutil.rmtree(former)


def test_committed_records_hold_or_are_of_the_former_layout_and_are_small():
    for file in ROOT.glob("records/*/record.json"):
        texts = [text.read_text() for text in file.parent.rglob("*.*") if text.suffix != ".png"]
        assert sum(text.count("\n") for text in texts) <= 3_000, file.parent
        if json.loads(file.read_text())["track"] == race.FORMER:
            with pytest.raises(race.UserError, match="is of the former layout and cannot be run here any more"):
                load_record(file.parent)
            assert "12a2c87" in (file.parent / "README.md").read_text(), "it says where its logs are"
        else:
            load_record(file.parent, *CHECKS)
