"""Records: what `race.py verify` accepts and refuses, how one is entered, how they are listed. Run with
`python -m pytest tests/test_race.py`.

One tiny record is made by `race.py enter`: a track of 32px, two seeds, a baseline of 10 steps and an entry of 6. Each refusal is
of a copy of it that somebody has tampered with. Training runs are forked (conftest) where `race.py` starts a Python.
"""
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

import race
import rules
import train_prx
from conftest import ROOT, TINY, run, start
from rules import CHECKS, TRACKS, Refusal, load_record, load_run, parse_log

pytestmark = pytest.mark.machinery

ENTRY = {**train_prx.SOURCES, "train_prx.py": train_prx.SOURCES["train_prx.py"].replace("nanoPRX: train", "nanoPRX, faster: train")}
FLAGS = [*TINY[1:], "--stages=32:10:16:1", "--micro_batch=16", "--log_every=2", "--data=data/tiny"]
DEMO = TRACKS["demo"]  # as it is published
TRAINED = []  # the runs that were started, by name
STARTED = race.train_lines  # which starts a Python


def forked(folder: Path, flags: list[str], cores: int):
    """race.train_lines, from a process that has imported torch."""
    TRAINED.append(next(flag for flag in reversed(flags) if flag.startswith("--name=")).removeprefix("--name="))
    running = start(folder, folder.resolve() / "train_prx.py", *flags)
    with running.out.open() as out:
        while (alive := running.alive()) or True:
            if line := out.readline():
                yield line.rstrip("\n")
            elif not alive:
                break
            time.sleep(0.002 * (not line))
    result = running.wait()
    rules.need(result.status == 0, result.stderr)


def forked_command(script: Path, *flags: str) -> None:
    assert run(Path.cwd(), script, *flags).status == 0


@pytest.fixture(scope="module")
def records(tmp_path_factory, data):
    """records/ of a checkout whose demo track is tiny: `base`, its baseline, and `entry`, which takes fewer steps."""
    checkout = tmp_path_factory.mktemp("checkout")
    for folder in ("data", "records"):
        (checkout / folder).mkdir()
    (checkout / "data/tiny").symlink_to(data)
    tiny = replace(TRACKS["demo"], preset="demo", baseline="base", data={"data/tiny": race.file_sha256(data / "manifest.json")},
                   image_size=32, score_n=4, target=-1.0, sigma=0.01, seeds=2, cores=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setitem(TRACKS, "demo", tiny)
        patch.setattr(rules, "RECORDS", checkout / "records")
        patch.setattr(race, "train_lines", forked)
        patch.setattr(race, "command", forked_command)
        race.main(["enter", "records/base", "--baseline", "--author=A", "--summary=start", "--", *FLAGS])
        patch.setattr(train_prx, "SOURCES", ENTRY)
        arguments = ["enter", "records/entry", "--author=B", "--summary=fewer | steps", "--", *FLAGS, "--stages=32:6:16:1"]
        stop_at = len(TRAINED) + 2

        def killed(folder, flags, cores):
            if len(TRAINED) == stop_at:
                raise KeyboardInterrupt
            yield from forked(folder, flags, cores)

        patch.setattr(race, "train_lines", killed)
        with pytest.raises(KeyboardInterrupt):
            race.main(arguments)
        assert not Path("records/entry/record.json").exists()
        patch.setattr(race, "train_lines", forked)
        race.main(arguments)
        assert TRAINED == ["seed-0", "seed-1", "baseline-0", "seed-0", "baseline-1", "seed-1"]
        for name in ("base", "entry"):
            readme = Path("records", name, "README.md")
            readme.write_text(readme.read_text().replace(rules.TO_WRITE, "Fewer steps."))
        yield checkout / "records"


@pytest.fixture
def copy(records):
    """A copy of the entry beside it, to tamper with."""
    shutil.copytree(records / "entry", records / "copy")
    yield records / "copy"
    shutil.rmtree(records / "copy")


@pytest.fixture
def no_training(monkeypatch):
    """Nothing may be executed."""
    def refuse(*arguments):
        raise AssertionError("something was executed")

    monkeypatch.setattr(race, "train_lines", refuse)
    monkeypatch.setattr(race, "command", refuse)


def verdict(capsys, folder: Path, *flags: str) -> tuple[int, list[str]]:
    """Exit status and lines of `race.py verify`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        race.main(["verify", str(folder), *flags])
    return ended.value.code, [line for line in capsys.readouterr().out.splitlines() if not line.startswith("    ")]


def edit(file: Path, pattern: str, text: str, count: int = 1) -> None:
    """Replace what matches, in a log only behind its sources; it must be there."""
    sources, config, lines = file.read_text().rpartition("\nconfig {")
    new, found = re.subn(pattern, text, config + lines, count=count, flags=re.MULTILINE)
    assert found, f"{pattern} is not in {file}"
    file.write_text(sources + new)


def edit_source(log: Path, old: str, new: str) -> None:
    """Change a source in a log, and no hash."""
    text = log.read_text()
    assert old in text
    log.write_text(text.replace(old, new))


def change_source(record: Path, arm: str, name: str, old: str, new: str) -> None:
    """Change a source in the logs of an arm, with every hash and the patch as if it had run."""
    for place in record.glob(f"{arm}-*"):
        log = parse_log((place / "log.txt").read_text())
        text = log.sources[name]
        assert old in text
        sources = {**log.sources, name: text.replace(old, new)}
        whole = (place / "log.txt").read_text().replace(f"==== {name} sha256 {rules.sha256(text)}\n{text}====\n",
                                                        f"==== {name} sha256 {rules.sha256(sources[name])}\n{sources[name]}====\n")
        before, after = rules.source_hash(log.sources)[:12], rules.source_hash(sources)[:12]
        (place / "log.txt").write_text(whole.replace(f"source {before};", f"source {after};"))
    if arm == "seed":
        base = load_run(record.parent / "base/seed-0").log.sources
        (record / "change.patch").write_text(rules.patch(base, sources))


def claim_again(record: Path, drop: tuple[str, ...] = ()) -> None:
    """Write record.json anew from the logs, without what is to be dropped."""
    claim = {key: value for key, value in json.loads((record / "record.json").read_text()).items() if key not in drop}
    found = load_record(record)
    (record / "record.json").write_text(json.dumps({**claim, **rules.claim_of(found)}))


# ---------------------------------------------------------------------------------------------------------------------
# verify: yes


@pytest.mark.slow
def test_an_honest_record_is_trained_again_and_accepted(records, monkeypatch, capsys):
    monkeypatch.setattr(race, "RATIO_SPREAD", 10)  # runs of a quarter of a second: their ratio is noise
    TRAINED.clear()
    status, lines = verdict(capsys, records / "entry")
    assert status == 0 and TRAINED == ["baseline-0", "seed-0"], lines
    assert sum(line.startswith("checked: ") for line in lines) == len(CHECKS) + 1
    assert "checked: change.patch is the difference to base; the configs differ in stages" in lines
    assert [line[:20] for line in lines[-5:-2]] == ["re-ran: baseline-0 g", "re-ran: seed-0 gives", "re-ran: mean scenes_"]
    assert lines[-1] == f"yes: {records / 'entry'} was checked, and 1 of 2 seeds trained again"


def test_without_a_re_run_it_says_that_nothing_was_re_run(records, no_training, capsys):
    status, lines = verdict(capsys, records / "entry", "--rerun=0")
    assert status == 0 and lines[-2:] == ["nothing was re-run: --rerun=0", f"yes: {records / 'entry'} was checked only"]
    assert verdict(capsys, records / "base", "--rerun=0")[0] == 0


@pytest.mark.parametrize("track, why", [({"cores": 0, "gpus": 1}, "1 GPU, and here is none"), ({"cores": 999}, "999 CPU cores")])
def test_a_machine_that_cannot_re_run_says_so_and_no_more(records, no_training, monkeypatch, capsys, track, why):
    monkeypatch.setattr(race, "CHECKS", ())  # this log is not of such a machine
    monkeypatch.setitem(TRACKS, "demo", replace(TRACKS["demo"], **track))
    status, lines = verdict(capsys, records / "entry")
    assert status == 0 and why in lines[-2] and lines[-1].endswith("was checked only")


def test_what_a_track_has_not_set_yet_is_said(records, no_training, monkeypatch, capsys):
    monkeypatch.setitem(TRACKS, "demo", replace(TRACKS["demo"], target=None, sigma=None, data={"data/tiny": ""}))
    text = "\n".join(verdict(capsys, records / "entry", "--rerun=0")[1])
    assert "the track has no target yet" in text and "which the track has not fixed yet" in text
    monkeypatch.setitem(TRACKS, "demo", replace(TRACKS["demo"], target=-1.0))
    assert "beats -1 (-1.0000); the track has no sigma yet" in "\n".join(verdict(capsys, records / "entry", "--rerun=0")[1])
    monkeypatch.setitem(TRACKS, "demo", replace(TRACKS["demo"], target=0.99))
    assert "to beat 0.99 it takes 0.99" in verdict(capsys, records / "entry", "--rerun=0")[1][-1]


@pytest.mark.parametrize("folder", sorted((ROOT / "records").glob("*/record.json")), ids=lambda file: file.parent.name)
def test_the_committed_records_pass_every_check(folder, monkeypatch):
    monkeypatch.setitem(TRACKS, "demo", DEMO)  # `records` makes it tiny
    monkeypatch.setattr(rules, "RECORDS", ROOT / "records")
    record = load_record(folder.parent)
    assert all(check(record) for check in CHECKS)


def test_the_published_spreads_are_those_of_committed_seeds():
    claim = json.loads((ROOT / "records/2026-11-22-demo-baseline/record.json").read_text())
    assert statistics.stdev(claim["score"]["each"]) == pytest.approx(rules.DEMO_SIGMA, abs=5e-5)
    each = json.loads((ROOT / "records/2026-11-22-demo-patch16/record.json").read_text())["ratio"]["each"]
    assert statistics.stdev(each) / statistics.fmean(each) == pytest.approx(race.RATIO_SPREAD, abs=5e-3)


# ---------------------------------------------------------------------------------------------------------------------
# verify: no, before anything is executed


def later(file: Path, by: int) -> None:
    """Move the first timestamp of a log by seconds."""
    log = parse_log(file.read_text())
    edit(file, f"^{log.started}", str(log.started.fromtimestamp(log.started.timestamp() + by)))


def move_clock(place: Path) -> None:
    """Add 7 s to the clock of a run's second window, in log.txt and metrics.jsonl alike, but not to its images/s."""
    line = load_run(place).windows[1]
    edit(place / "log.txt", rf"^(step {line['step']}/.+images/s  )[\d.]+ s", rf"\g<1>{line['seconds'] + 7:.2f} s")
    edit(place / "metrics.jsonl", str(line["seconds"]), str(line["seconds"] + 7))


def pose_as_baseline(record: Path) -> None:
    """Leave out what only an entry has to have."""
    for k in range(2):
        shutil.rmtree(record / f"baseline-{k}")
    (record / "change.patch").unlink()
    edit(record / "record.json", '"builds_on": "base"', '"builds_on": null')
    claim_again(record, drop=("ratio", "baseline_seconds"))


def move_end(file: Path, by: int) -> None:
    """Move the last timestamp of a log by seconds."""
    log = parse_log(file.read_text())
    edit(file, f"^{log.finished}", str(log.finished.fromtimestamp(log.finished.timestamp() + by)))


def score_as(place: Path, value: str) -> None:
    """Let a run have a score in log.txt and metrics.jsonl alike."""
    edit(place / "log.txt", r"scenes_exact \S+", f"scenes_exact {float(value):.4g}")
    edit(place / "metrics.jsonl", r'"scenes_exact": [^,]+', f'"scenes_exact": {value}')


TAMPERED = {
    "a source that does not hash to what the log claims":
        (lambda r: edit_source(r / "seed-0/log.txt", "nanoPRX, faster", "nanoPRX, fastest"), "train_prx.py hashes to"),
    "a whole source hash that is another":
        (lambda r: edit(r / "seed-0/log.txt", r"source [0-9a-f]{12};", "source 0123456789ab;"), "and the log claims 0123456789ab"),
    "a changed scorer":
        (lambda r: change_source(r, "seed", "scenes.py", "PRESENT_SHARE = 0.6", "PRESENT_SHARE = 0.1"), "ran another scenes.py"),
    "a changed scorer of the baseline":
        (lambda r: change_source(r, "baseline", "metrics.py", "SIGMA, SCALE = 10", "SIGMA, SCALE = 11"), "ran another metrics.py"),
    "a wrong data hash":
        (lambda r: edit(r / "seed-1/log.txt", r"manifest [0-9a-f]{8}", "manifest 00000000"), "and the track's is"),
    "other data": (lambda r: edit(r / "seed-1/log.txt", '"data": "data/tiny"', '"data": "data/mine"'), "--data=data/mine"),
    "more data":
        (lambda r: edit(r / "seed-1/log.txt", r"^(data data/)tiny(, .+)$", r"\1tiny\2\n\1mine\2"), "read data/tiny, data/mine"),
    "foreign weights": (lambda r: edit(r / "seed-1/log.txt", '"init": ""', '"init": "runs/best"'), "--init=runs/best"),
    "another number of pictures": (lambda r: edit(r / "seed-1/log.txt", '"score_n": 4', '"score_n": 2'), "--score_n=2"),
    "pauses of the clock": (lambda r: edit(r / "seed-1/log.txt", '"score_every": 0', '"score_every": 5'), "--score_every=5"),
    "frozen networks of another kind":
        (lambda r: edit(r / "seed-1/log.txt", '"frozen": "none"', '"frozen": "pretrained"'), "--frozen=pretrained"),
    "a teacher that the log does not name":
        (lambda r: edit(r / "seed-1/log.txt", '"frozen": "none"', '"frozen": "scene"'), "no scene teacher"),
    "a smaller picture": (lambda r: edit(r / "seed-1/log.txt", '"image_size": 32', '"image_size": 16'), "ends at 16px"),
    "a continued run":
        (lambda r: edit(r / "seed-0/log.txt", r"^(warmed up)", r"continuing from step 5\n\1"), "continued from a checkpoint"),
    "two runs in one log":
        (lambda r: edit(r / "seed-0/log.txt", r"^(warmed up.+)$", r"\1\n\1"), "2 lines say the run's warm-up"),
    "an unfinished run": (lambda r: edit(r / "seed-0/log.txt", r"^.+finished at step.+\n", ""), "0 lines say the run's end"),
    "a window that is too slow for its images/s": (lambda r: move_clock(r / "seed-0"), "the clock does not add up"),
    "a clock that metrics.jsonl does not have":
        (lambda r: edit(r / "seed-0/log.txt", r"[\d.]+ s(  \S+ left)", r"0.01 s\1"), "differ at step 2: seconds"),
    "a final clock that is not the last window's":
        (lambda r: edit(r / "seed-0/log.txt", r", [\d.]+ s on the clock", ", 0.01 s on the clock"), "the clock does not add up"),
    "a clock longer than the wall's":
        (lambda r: edit(r / "seed-0/log.txt", r"warmed up in [\d.]+ s", "warmed up in 500.0 s"), "the clock does not add up"),
    "a run that took much longer than its clock":
        (lambda r: move_end(r / "seed-1/log.txt", 130), "and the rest is over 120 s"),
    "a score above 1": (lambda r: score_as(r / "seed-1", "5.0"), "scenes_exact cannot be 5.0"),
    "an endless score": (lambda r: score_as(r / "seed-1", "1e999"), "scenes_exact cannot be inf"),
    "a score that is no number": (lambda r: score_as(r / "seed-1", "NaN"), "no JSON object"),
    "a number of 401 digits":
        (lambda r: edit(r / "seed-1/metrics.jsonl", r'"seconds": [\d.]+', f'"seconds": {"9" * 401}'), "no JSON object"),
    "a score that metrics.jsonl does not have":
        (lambda r: edit(r / "seed-0/log.txt", r"scenes_exact \S+", "scenes_exact 0.9876"), "differ in the last scenes_exact"),
    "too few seeds":
        (lambda r: [shutil.rmtree(r / "seed-1"), shutil.rmtree(r / "baseline-1")], "1 seed, and the track takes 2"),
    "one seed twice":
        (lambda r: [shutil.rmtree(r / "seed-1"), shutil.copytree(r / "seed-0", r / "seed-1")], "seed-1 ran with seed 0"),
    "chosen seeds": (lambda r: (r / "seed-1").rename(r / "seed-2"), "2 seeds take the runs seed-0 to seed-1"),
    "another config in one seed": (lambda r: edit(r / "seed-1/log.txt", '"lr": 0.01', '"lr": 0.02'), "seed-1 has another lr"),
    "another source in one seed":
        (lambda r: [shutil.copy(r / "baseline-1" / file, r / "seed-1") for file in ("log.txt", "metrics.jsonl")],
         "seed-1 has another stages, train_prx.py than seed-0"),
    "a baseline that is not the committed one":
        (lambda r: change_source(r, "baseline", "train_prx.py", "nanoPRX: train", "nanoPRX, slower: train"),
         "another train_prx.py than seed-0 of the committed baseline"),
    "no runs of the baseline": (lambda r: [shutil.rmtree(r / f"baseline-{k}") for k in range(2)], "and there are none"),
    "runs at the same time": (lambda r: later(r / "seed-0/log.txt", -60), "runs take turns"),
    "another machine":
        (lambda r: edit(r / "seed-1/log.txt", r"1 x .+, 1 threads", "1 x Fast CPU, 1 threads"), "seed-1 ran on 1 x Fast CPU"),
    "more threads": (lambda r: edit(r / "seed-0/log.txt", "1 threads", "8 threads"), "one process on 1 CPU cores"),
    "a claim that the logs do not give":
        (lambda r: edit(r / "record.json", r'"mean": [\d.]+', '"mean": 0.01', count=9), "record.json claims another"),
    "another patch": (lambda r: edit(r / "change.patch", "faster", "fastest"), "change.patch is not the difference"),
    "no patch": (lambda r: (r / "change.patch").unlink(), "change.patch is not the difference"),
    "a base that is elsewhere":
        (lambda r: edit(r / "record.json", '"builds_on": "base"', '"builds_on": "../../base"'), "no record as builds_on"),
    "a record that poses as the baseline": (pose_as_baseline, "of this track only base does"),
    "itself as its base":
        (lambda r: [edit(r / "record.json", '"builds_on": "base"', '"builds_on": "copy"'), (r / "change.patch").write_text("")],
         "is no earlier record"),
    "a base that is not there":
        (lambda r: edit(r / "record.json", '"builds_on": "base"', '"builds_on": "gone"'), "there is no record at"),
    "no author": (lambda r: edit(r / "record.json", '"author": "B"', '"author": ""'), "no author"),
    "an author of two lines": (lambda r: edit(r / "record.json", '"author": "B"', r'"author": "B\\nC"'), "no author of one line"),
    "a number as summary": (lambda r: edit(r / "record.json", r'"summary": "[^"]+"', '"summary": 5'), "no summary of one line"),
    "no picture": (lambda r: (r / "grid.png").unlink(), "there is no grid.png"),
    "a README nobody wrote": (lambda r: (r / "README.md").write_text(rules.TO_WRITE), "README.md does not say yet"),
    "a record.json of nothing": (lambda r: (r / "record.json").write_text("[]"), "no JSON object"),
    "an unknown track": (lambda r: edit(r / "record.json", '"track": "demo"', '"track": "dem"'), "is of track 'dem'"),
    "no log": (lambda r: (r / "seed-0/log.txt").unlink(), "No such file"),
    "a log of bytes": (lambda r: (r / "seed-0/log.txt").write_bytes(b"\xff\xfe"), "can't decode"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_refused_before_anything_is_executed(copy, no_training, capsys, what):
    tamper, reason = TAMPERED[what]
    tamper(copy)
    status, lines = verdict(capsys, copy)
    assert status == 1 and lines[-1].startswith("no: ") and reason in lines[-1], lines
    assert "\n" not in lines[-1] and not any(line.startswith("yes") for line in lines)


@pytest.mark.parametrize("name, target, sigma, holds", [
    ("entry", 0.49, 0.0047, True), ("entry", 0.49, 0.0048, False), ("entry", 0.5, 0, True), ("entry", 0.51, 0, False),
    ("base", 0.5, 0.01, True), ("base", 0.51, 0.01, False)])
def test_the_mean_beats_the_target_by_three_standard_errors_and_a_baselines_meets_it(records, name, target, sigma, holds):
    """Two seeds of mean 0.5: 0.49 + 3 sigma / sqrt(2) is 0.5 at sigma = 0.00471."""
    record = load_record(records / name)
    seeds = [replace(run, metrics=[{"step": run.log.end, "scenes_exact": score}]) for run, score in zip(record.seeds, (0.25, 0.75))]
    record = replace(record, seeds=seeds, track=replace(record.track, target=target, sigma=sigma))
    if holds:
        assert "beats" in rules.check_target(record)
    else:
        with pytest.raises(Refusal, match="it takes"):
            rules.check_target(record)


def test_a_distance_beats_a_target_from_below(records):
    record = load_record(records / "entry")
    seeds = [replace(run, metrics=[{"step": run.log.end, "cmmd": 0.5}]) for run in record.seeds]
    track = replace(record.track, metric="cmmd", target=0.52, sigma=0.005)
    assert "beats" in rules.check_target(replace(record, seeds=seeds, track=track))
    with pytest.raises(Refusal, match="it takes 0.4788"):
        rules.check_target(replace(record, seeds=seeds, track=replace(track, target=0.5, sigma=0.01)))


def test_a_track_for_a_gpu_takes_no_run_of_a_cpu(records):
    record = load_record(records / "entry")
    with pytest.raises(Refusal, match="the track is for 1 GPU"):
        rules.check_machine(replace(record, track=replace(record.track, cores=0, gpus=1)))


def test_a_listed_earlier_version_of_the_scorer_passes(copy, monkeypatch):
    change_source(copy, "seed", "scenes.py", "Procedural captioned", "Procedural, captioned")
    with pytest.raises(Refusal, match="ran another scenes.py"):
        rules.check_fixed(load_record(copy))
    monkeypatch.setitem(rules.EARLIER, rules.sha256(load_run(copy / "seed-0").log.sources["scenes.py"]), "a comma less")
    assert "a listed earlier version" in rules.check_fixed(load_record(copy))


# ---------------------------------------------------------------------------------------------------------------------
# verify: no, once it has trained again


def without_baseline(record: Path, monkeypatch) -> None:
    """Make of a record one of a track without a ratio: half the runs to train again."""
    monkeypatch.setitem(TRACKS, "demo", replace(TRACKS["demo"], ratio=False))
    for k in range(2):
        shutil.rmtree(record / f"baseline-{k}")
    claim_again(record, drop=("ratio", "baseline_seconds"))


def test_scores_that_were_edited_everywhere_do_not_reproduce(copy, monkeypatch, capsys):
    without_baseline(copy, monkeypatch)
    for k in range(2):
        place = copy / f"seed-{k}"
        for name in ("exact", "scenes"):
            edit(place / "log.txt", rf"scenes_{name} \S+ \+-\S+", f"scenes_{name} 0.95 +-0.02")
            edit(place / "metrics.jsonl", rf'"scenes_{name}": [^,]+', f'"scenes_{name}": 0.95')
            edit(place / "metrics.jsonl", rf'"scenes_{name}_error": [^,}}]+', f'"scenes_{name}_error": 0.02')
    claim_again(copy)
    status, lines = verdict(capsys, copy)
    assert status == 1 and lines[-1].startswith("no: it does not reproduce: seed-0 gives scenes_exact 0.")
    assert "0.9500 in its log" in lines[-1]
    assert lines[-2].startswith("the re-run executes the record's code")


@pytest.mark.slow
def test_a_recipe_that_bends_its_clock_is_caught_by_the_stopwatch(copy, monkeypatch, capsys):
    """Its clock runs at half speed, in every line that it logs; each of 6 steps takes 0.25 s more, so that 0.75 s are bent."""
    without_baseline(copy, monkeypatch)
    monkeypatch.setattr(race, "WATCH_SLACK", (0.2, 0.02))
    change_source(copy, "seed", "train_prx.py", "import time\n", "import time as real\nfrom types import SimpleNamespace\n\n"
                  "time = SimpleNamespace(perf_counter=lambda: real.perf_counter() / 2)\n")
    change_source(copy, "seed", "train_prx.py", "            step += 1\n", "            step += 1\n            real.sleep(0.25)\n")
    status, lines = verdict(capsys, copy)
    assert status == 1 and re.search(r"no: seed-0: its clock says \d\.\d s, and a stopwatch beside it \d\.\d s", lines[-1]), lines


def again_as_logged(monkeypatch, record: Path, ratio_spread: float = 10) -> None:
    """Training again gives what is in the logs; any ratio will do, unless its spread is given."""
    monkeypatch.setattr(race, "train", lambda folder, name, *rest: record / name)
    monkeypatch.setattr(race, "RATIO_SPREAD", ratio_spread)


def test_a_ratio_that_is_not_reached_again_is_refused(copy, monkeypatch):
    again_as_logged(monkeypatch, copy, ratio_spread=0.11)
    record = load_record(copy)
    ratios = record.claim["ratio"]["each"]
    for n, kept in ((1, 1 - 2 * 0.11 * 1.5**0.5), (2, 1 - 2 * 0.11)):  # of two seeds
        for share, holds in ((1, True), (kept + 0.01, True), (kept - 0.01, False)):
            record.claim["ratio"]["mean"] = statistics.fmean(ratios[:n]) / share
            if holds:
                assert "x as fast as the baseline" in [*race.rerun(record, n)][-1]
            else:
                with pytest.raises(Refusal, match="does not reproduce" + ".*more of --rerun" * (n == 1)):
                    [*race.rerun(record, n)]


def test_seeds_that_all_come_out_a_little_worse_are_refused(copy, monkeypatch):
    """By 4 sigma, where one seed may differ by 4.2 and the mean of two by 3; or by less, and below the target."""
    again_as_logged(monkeypatch, copy)
    record = load_record(copy)
    score = statistics.fmean(run.score("scenes_exact") for run in record.seeds)

    def better(by: float, target: float):
        seeds = [replace(run, metrics=[{**line, "scenes_exact": line["scenes_exact"] + by} if "scenes_exact" in line else line
                                       for line in run.metrics]) for run in record.seeds]
        return replace(record, seeds=seeds, track=replace(record.track, target=target))

    for by, target, n in ((0.04, -1, 1), (0.02, score, 2), (0.02, score + 0.01, 1)):
        assert [*race.rerun(better(by, target), n)]
    with pytest.raises(Refusal, match="does not reproduce: mean scenes_exact"):
        [*race.rerun(better(0.04, -1), 2)]
    with pytest.raises(Refusal, match="in the logs of these seeds, and the target is"):
        [*race.rerun(better(0.02, score + 0.01), 2)]


def test_another_teacher_than_the_records_is_said(copy, monkeypatch):
    """The re-run takes the one that is there."""
    again_as_logged(monkeypatch, copy)
    monkeypatch.setattr(race, "OF_RUNS", ())
    monkeypatch.setattr(race, "make_data", lambda track, teacher: None)
    record = load_record(copy)
    seeds = [replace(run, log=replace(run.log, teacher="a" * 64)) for run in record.seeds]
    monkeypatch.setattr(race, "load_run", lambda place: replace(load_run(place), log=replace(load_run(place).log, teacher="b" * 64))
                        if place.name.startswith("seed") else load_run(place))
    said = [*race.rerun(replace(record, seeds=seeds), 1)]
    assert "seed-0, run again, had another scene teacher: bbbbbbbbbbbb, and its log has aaaaaaaaaaaa" in said
    assert len(said) == 5, "and of the baseline, which has none, nothing"


def test_a_warm_up_that_ends_twice_is_refused(tmp_path, monkeypatch):
    """The stopwatch would begin at the later one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "train_lines", lambda *arguments: iter(["warmed up in 1.0 s, off the clock"] * 2))
    with pytest.raises(Refusal, match="seed-0 says twice that its warm-up has ended"):
        race.train(tmp_path / "run", "seed-0", {}, [], 1)


def test_a_recipe_that_logs_another_source_than_it_runs_is_refused(copy, monkeypatch):
    again_as_logged(monkeypatch, copy)
    record = load_record(copy)
    change_source(copy, "seed", "train_prx.py", "faster", "fastest")
    with pytest.raises(Refusal, match="seed-0, run again, logs another source"):
        [*race.rerun(record, 1)]


def test_a_recipe_that_does_not_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "train_lines", STARTED)
    with pytest.raises(Refusal, match="training ended with status 1: NameError: name 'missing' is not defined"):
        race.train(tmp_path / "run", "seed-0", {"train_prx.py": "missing"}, [], 1)


def test_training_is_held_to_its_cores_and_reported_as_it_goes(tmp_path):
    (tmp_path / "train_prx.py").write_text("import os, sys, time\nprint(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'], "
                                           "sys.argv, flush=True)\ntime.sleep(0.5)\nprint('later')")
    times = [(time.perf_counter(), line) for line in STARTED(tmp_path, ["--a=b c"], 1)]
    assert re.fullmatch(r"\{\d+\} 1 \['train_prx.py', '--a=b c'\]", times[0][1]) and times[1][1] == "later"
    assert times[1][0] - times[0][0] > 0.4


def test_a_released_checkpoint_is_drawn_and_scored_again(records, monkeypatch, capsys):
    """A track without a re-run, as `record` is, but of scenes: its runs are taken from where they were trained."""
    slow = replace(TRACKS["demo"], baseline="", reruns=False, ratio=False)
    monkeypatch.setitem(TRACKS, "slow", slow)
    monkeypatch.setattr(train_prx, "SOURCES", ENTRY)
    trained = [f"runs/entry/seed-{k}/runs/seed-{k}" for k in range(2)]
    race.main(["enter", "records/slow", "--track=slow", "--baseline", f"--runs={','.join(trained)}", "--author=C",
               "--summary=slowly"])
    readme, weights = records / "slow/README.md", Path(trained[0], "ema.safetensors")
    readme.write_text(readme.read_text().replace(rules.TO_WRITE, "Slowly."))
    try:
        status, lines = verdict(capsys, records / "slow")
        assert status == 0 and lines[-1].endswith("was checked only") and "--checkpoint" in lines[-2]
        status, lines = verdict(capsys, records / "slow", f"--checkpoint={weights}")
        assert status == 0 and re.search(r"re-ran: .+ gives scenes_exact \d\.\d+, and \d", lines[-2]), lines
        status, lines = verdict(capsys, records / "slow", f"--checkpoint={trained[1]}/ema.safetensors")
        assert status == 1 and "is not the file whose sha256 record.json names" in lines[-1]
    finally:
        shutil.rmtree(records / "slow")


# ---------------------------------------------------------------------------------------------------------------------
# enter


def test_runs_take_turns_and_none_is_repeated_by_a_call_that_continues(records):
    """The fixture's first call ended after baseline-0 and seed-0."""
    entry = load_record(records / "entry")
    starts = {run.name: run.log.started for run in entry.runs}
    assert sorted(starts, key=lambda name: (starts[name], name)) == ["baseline-0", "seed-0", "baseline-1", "seed-1"]
    assert [(run.log.config["name"], run.log.end) for run in entry.runs] == [
        ("seed-0", 6), ("seed-1", 6), ("baseline-0", 10), ("baseline-1", 10)]
    assert (records / "entry/grid.png").read_bytes() == Path("runs/entry/seed-0/runs/seed-0/samples/step_000006.png").read_bytes()


def test_the_claim_is_arithmetic_over_the_logs(records):
    entry = load_record(records / "entry")
    slow, fast = ([run.log.seconds for run in runs] for runs in (entry.baselines, entry.seeds))
    assert entry.claim["seconds"]["mean"] == pytest.approx(sum(fast) / 2, abs=0.01)
    assert entry.claim["ratio"]["mean"] == pytest.approx((slow[0] / fast[0] + slow[1] / fast[1]) / 2, abs=1e-3)
    assert entry.claim["builds_on"] == "base" and entry.claim["teacher"] is None
    assert load_record(records / "base").is_baseline and "ratio" not in load_record(records / "base").claim


def test_the_patch_makes_the_entry_out_of_its_base(records, tmp_path):
    for name, text in load_run(records / "base/seed-0").log.sources.items():
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "apply", records / "entry/change.patch"], cwd=tmp_path, check=True)
    assert {name: (tmp_path / name).read_text() for name in ENTRY} == ENTRY
    added = rules.patch({"a.py": "x\n"}, {"a.py": "x\n", "b.py": "y\n"})
    assert added == "--- /dev/null\n+++ b/b.py\n@@ -0,0 +1 @@\n+y\n"


def test_the_pages_command_for_the_record_track_keeps_its_rules():
    """A day on 32 GPUs is too long to learn it afterwards."""
    flags = re.search(r"`\./run\.sh\s+(--preset=record\s[^`]+)`", (ROOT / "records/README.md").read_text())[1].split()
    rules.check_rules("record", train_prx.config_to_json(train_prx.parse_config(flags)[0]), TRACKS["record"])


def test_every_preset_survives_its_way_through_a_log_as_flags():
    for cfg in train_prx.PRESETS.values():
        logged = json.loads(json.dumps(train_prx.config_to_json(cfg)))
        assert train_prx.parse_config(race.flags_of(logged))[0] == cfg


@pytest.mark.parametrize("arguments, reason", [
    (["records/entry"], "records/entry is a finished record"),
    (["records/new"], "the working tree's sources are those of records/entry: change train_prx.py first"),
    (["records/new name"], "use letters, digits"),
    (["records/new", "--track=solo"], "has no record of track solo yet: --baseline makes"),
    (["records/new", "--baseline"], "track demo has its baseline, base"),
    (["records/new", "--seeds=1"], "--seeds=1: track demo takes 2 or more"),
    (["records/new", "--seeds=-1"], "--seeds=-1: track demo takes 2 or more"),
    (["records/new", "--track=record", "--baseline"], "name them here"),
    (["records/new", "--", "--init=runs/best"], "the working tree's recipe has --init=runs/best, and the rules say --init="),
    (["records/new", "--", "--wdith=8"], "did you mean --width"),
])
def test_enter_refuses_in_one_line(records, no_training, monkeypatch, arguments, reason):
    monkeypatch.setitem(train_prx.PRESETS, "demo", replace(train_prx.PRESETS["demo"], data="data/tiny"))
    with pytest.raises(race.UserError) as error:
        race.main(["enter", *arguments])
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not (records / "new").exists()


def test_enter_stops_where_the_working_tree_has_changed_between_two_calls(copy, no_training, monkeypatch):
    monkeypatch.setattr(train_prx, "SOURCES", {**ENTRY, "muon.py": "# rewritten\n"})
    (copy / "record.json").unlink()
    flags = ["enter", "records/copy", "--", *FLAGS, "--stages=32:6:16:1"]
    with pytest.raises(race.UserError, match="seed-0 was trained with another muon.py: put that back, or delete"):
        race.main(flags)
    monkeypatch.setattr(train_prx, "SOURCES", ENTRY)
    with pytest.raises(race.UserError, match="seed-0 was trained with another lr: put that back, or delete records/copy"):
        race.main([*flags, "--lr=5e-3"])


def test_missing_data_and_teacher_are_made_and_other_data_is_refused(tmp_path, monkeypatch):
    called = []

    def command(script, *flags):
        called.append([script.name, *flags])
        Path("data/race").mkdir(parents=True, exist_ok=True)
        Path("data/race/manifest.json").write_text("{}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "command", command)
    track = replace(TRACKS["demo"], data={"data/race": hashlib.sha256(b"{}").hexdigest()}, level="race", rows=20_000, image_size=64)
    race.make_data(track, teacher=True)
    assert called == [["scenes.py", "make", "--out=data/race", "--rows=20000", "--size=64", "--level=race"],
                      ["scenes.py", "teacher", "--data=data/race"]]
    with pytest.raises(race.UserError, match="data/race has a manifest of sha256 44136fa355b3, and the track's has 000000000000"):
        race.make_data(replace(track, data={"data/race": "0" * 64}), teacher=False)
    with pytest.raises(race.UserError, match="no data at data/photos"):
        race.make_data(replace(track, data={"data/photos": ""}, level=""), teacher=False)


# ---------------------------------------------------------------------------------------------------------------------
# table and command line


def test_the_table_is_written_between_its_markers_with_a_plot(records, capsys):
    begin, end = race.MARKERS
    for page in (Path("README.md"), records / "README.md"):
        page.write_text(f"before\n{begin}old\n{end}after\n")
    race.main(["table", "--write"])
    for page, prefix in ((Path("README.md"), "records/"), (records / "README.md", "")):
        text = page.read_text()
        assert text.startswith(f"before\n{begin}") and text.endswith(f"{end}after\n") and "old" not in text
        rows = [line for line in text.splitlines() if line.startswith("| 20")]
        assert len(rows) == 2 and f"[base]({prefix}base) | A | start | 2 |" in rows[0] and "| the baseline | no |" in rows[0]
        assert r"fewer \| steps" in rows[1] and re.search(r"\| \d\.\d\dx as fast \| no \|", rows[1])
        assert f"({prefix}entry/seed-0/log.txt)" in rows[1] and f"({prefix}history.png)" in text
    assert (records / "history.png").read_bytes().startswith(b"\x89PNG")
    race.main(["table", "--write"])
    assert Path("README.md").read_text().count("**demo**") == 1
    summary = records / "entry/record.json"
    whole = summary.read_text()
    for damaged in ('{"track": "demo"}', whole.replace('"author": "B"', '"author": 5'), whole.replace('"steps": 6', '"steps": 5')):
        summary.write_text(damaged)
        with pytest.raises(race.UserError, match="records/entry: record.json"):
            race.main(["table"])
    summary.write_text(whole)
    (records / "README.md").write_text("no markers\n")
    with pytest.raises(race.UserError, match="records/README.md lacks the lines"):
        race.main(["table", "--write"])


def test_the_pages_of_this_repository_take_the_table():
    for page in (ROOT / "README.md", ROOT / "records/README.md"):
        assert all(page.read_text().count(marker) == 1 for marker in race.MARKERS)


def test_mistakes_are_one_line_and_status_2(tmp_path):
    assert run(tmp_path, "race.py", "verify", "records/gone").error() == (
        "error: no record at records/gone: it has no record.json, which `python race.py enter records/gone` writes")
    assert "did you mean --rerun" in run(tmp_path, "race.py", "verify", "x", "--rerum=1").error()
    assert "known are enter, verify, table" in run(tmp_path, "race.py", "check").error()
    assert "python race.py enter" in run(tmp_path, "race.py", "--help").stdout
