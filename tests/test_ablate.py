"""benchmarks/ablate.py: an arm changes what it names and nothing else, what is finished is not made again, and the table says
what the logs say.

    pytest tests/test_ablate.py
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, metrics, run

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablate  # noqa: E402
from ablate import Arm, Outcome, outcome, parse_arm, plot, spread, table  # noqa: E402
from rules import TRACKS  # noqa: E402

pytestmark = pytest.mark.machinery

FLAGS = " ".join([*TINY[1:], "--stages=64:4:8:1", "--data=data/race", "--score_n=4"])


def log_of(folder: Path) -> dict:
    """The config that a run's log holds."""
    return json.loads(next(line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("config "))[7:])


@pytest.mark.slow
def test_an_arm_changes_what_it_names_and_finished_runs_are_kept(tmp_path, monkeypatch, capsys):
    def forked(folder: Path, flags: list[str], threads: int) -> None:
        """ablate.train, from a process that has imported torch."""
        trained.append(folder.name)
        assert run(folder, folder.resolve() / "train_prx.py", *flags).status == 0

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # a clone, of which a patch must not mean the top
    assert run(tmp_path, "scenes.py", "make", "--out=data/race", "--rows=40", "--size=64", "--level=race").status == 0
    trained = []
    monkeypatch.setattr(ablate, "train", forked)
    monkeypatch.chdir(tmp_path)
    lever = ROOT / "records/levers/contrastive.patch"
    command = ["--seeds=0,1", "--out=runs/try", f"--flags={FLAGS}", "--score_every=2", "base", f"contrast={lever} --lr=5e-3"]
    ablate.main(command)
    assert trained == ["base", "contrast"] * 2, "seed by seed"
    out = tmp_path / "runs/try"
    configs = {f"{arm}-{seed}": log_of(out / f"{arm}-seed-{seed}") for arm in ("base", "contrast") for seed in (0, 1)}
    base, changed = configs["base-0"], configs["contrast-0"]
    assert {key for key in changed if changed[key] != base.get(key)} == {"contrast", "lr"} and changed["lr"] == 5e-3
    assert {key for key in base if configs["base-1"][key] != base[key]} == {"seed", "name"}
    assert "contrast" in (out / "contrast-seed-0/log.txt").read_text().split("\nconfig {")[0], "the log has the patched source"
    text = (out / "table.md").read_text()
    assert capsys.readouterr().out == text and text.splitlines()[3].startswith("| contrast | contrastive.patch --lr=5e-3 | 2 | ")
    scores = [[line["scenes_exact"] for line in metrics(out / f"base-seed-{seed}") if "scenes_exact" in line] for seed in (0, 1)]
    assert [len(each) for each in scores] == [2, 2], "scored at steps 2 and 4"
    assert f"| {spread([each[-1] for each in scores], '.1%')} | not reached |" in text
    assert (out / "plot.png").stat().st_size > 10_000

    kept = (out / "base-seed-0/log.txt").stat().st_mtime_ns
    (out / "base-seed-1/log.txt").write_text("killed")
    ablate.main(command)
    assert trained[4:] == ["base"] and (out / "base-seed-0/log.txt").stat().st_mtime_ns == kept
    assert log_of(out / "base-seed-1") == configs["base-1"] and (out / "table.md").read_text().count("not reached") == 2

    for changed in ([*command[:-1], f"contrast={lever} --lr=7e-3"], [*command, "--score_every=1"]):
        with pytest.raises(ablate.UserError, match="-seed-0 was made with other flags or sources"):
            ablate.main(changed)
    assert len(trained) == 5 and (out / "base-seed-0/log.txt").stat().st_mtime_ns == kept


def test_the_first_arm_that_fails_ends_the_ablation(tmp_path, monkeypatch):
    def fails(folder: Path, flags: list[str], threads: int) -> None:
        trained.append(folder.name)
        time.sleep(0.1)
        raise ablate.UserError(f"{folder.name}: it fails")

    trained = []
    (tmp_path / "data/race").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "train", fails)
    with pytest.raises(ablate.UserError, match="a: it fails"):
        ablate.main(["--seeds=0,1,2,3", "a", "b", "c"])
    assert len(trained) < 12, "of 12 runs, those that had begun"


def test_the_target_is_met_at_the_first_score_that_reaches_it(tmp_path):
    lines = [{"step": 10, "seconds": 3.0, "images_per_second": 100.0}, {"step": 10, "seconds": 3.0, "scenes_exact": 0.5},
             {"step": 20, "seconds": 6.5, "images_per_second": 90.0}, {"step": 20, "seconds": 6.5, "scenes_exact": 0.9},
             {"step": 30, "seconds": 9.0, "images_per_second": 80.0}, {"step": 30, "seconds": 9.0, "scenes_exact": 0.88}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert outcome(tmp_path, "scenes_exact", 0.9) is None, "there is no log"
    (tmp_path / "log.txt").write_text("step 30/30\n")
    assert outcome(tmp_path, "scenes_exact", 0.9) is None, "it has not finished"
    (tmp_path / "log.txt").write_text("2026-11-21 10:00:00  finished at step 30, 9.00 s on the clock: runs/x\n")
    assert outcome(tmp_path, "scenes_exact", 0.9) == Outcome(score=0.88, seconds=9.0, to_target=6.5, rate=90.0)
    assert outcome(tmp_path, "scenes_exact", 0.95).to_target is None


def test_the_table_has_means_and_standard_deviations_over_seeds(tmp_path):
    runs = [Outcome(0.90, 100, 80, 200), Outcome(0.94, 104, None, 210), Outcome(0.92, 108, 90, 190)]
    arms = [Arm("base", (), ()), Arm("one", (Path("x/lever.patch"),), ("--drop=0",))]
    text = table(arms, {"base": runs, "one": runs[1:2]}, 0.9).splitlines()
    assert text[2] == "| base | nothing | 3 | 92.0% +- 2.0% | 85 +- 7, 2 of 3 seeds | 104 +- 4 | 200 +- 10 |"
    assert text[3] == "| one | lever.patch --drop=0 | 1 | 94.0% | not reached | 104 | 210 |"
    assert statistics.stdev([0.90, 0.94, 0.92]) == pytest.approx(0.02)
    plot(arms, {"base": runs, "one": runs[1:2]}, 0.9, tmp_path / "plot.png")


def test_mistakes_are_answered_with_one_line(tmp_path):
    for flags, words in ((["base", "base"], ["a name of its own"]), (["x=no/such.patch"], ["there is no", "such.patch"]),
                         (["a b=--drop=0"], ["letters, digits"]), (["base"], ["no data at data/race", "./run.sh race"]),
                         (["base", "--preset=demo"], ["--preset", "race"]),
                         (["base", "--flags=--name='x"], ["--flags", "invalid"]), (["a='x"], ["a='x", "invalid"])):
        message = run(tmp_path, "benchmarks/ablate.py", *flags).error()
        assert all(word in message for word in words), message
    with pytest.raises(ablate.UserError, match="arm bad: .* does not apply"):
        (tmp_path / "bad.patch").write_text("--- a/train_prx.py\n+++ b/train_prx.py\n@@ -1 +1 @@\n-nothing like it\n+x\n")
        ablate.lay_out(parse_arm(f"bad={tmp_path}/bad.patch"), tmp_path / "sources")


@pytest.mark.parametrize("folder", [ROOT / "records/ablation", *ROOT.glob("records/*/tried")], ids=lambda path: path.parent.name)
def test_the_committed_tables_say_what_their_logs_say(folder):
    track = TRACKS["demo"]
    rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert {row.split(" | ")[0][2:] for row in rows} == {run.name.partition("-seed-")[0] for run in folder.glob("*-seed-*")}
    for row in rows:
        name, _, *values = row.split(" | ")
        runs = [outcome(run, track.metric, track.target) for run in sorted(folder.glob(f"{name[2:]}-seed-*"))]
        assert values == table([Arm(name[2:], (), ())], {name[2:]: runs}, track.target).splitlines()[2].split(" | ")[2:]
