"""Whole runs of train_prx.py on one rank: whatever interrupts one, it ends as an undisturbed run does; a mistake is
answered with one line and changes nothing; the log says what was done. Ranks are in test_ranks.py.

    pytest tests/test_run.py
"""
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    ROOT, checkpoint_tensors, curve, different, last_checkpoint, loss_weights, metrics, patched, run, start, train)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from train_prx import PRX, SOURCES, Chunks, Config, Stage, UserError, config_to_json, is_held_out, parse_config, prepare

KIND = "machinery"  # of the tests without a mark of their own
slow = pytest.mark.slow

SAVING = ["--save_every=6", "--ema_every=3", "--name=try"]  # of the 20 steps that `tiny` takes


def contents(folder: Path) -> dict[str, str]:
    """File -> sha256, of everything under `folder` but locks."""
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix != ".lock"}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def steps_of(folder: Path) -> list[int]:
    """The steps of a run's complete checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*"))


def continued(folder: Path) -> list[int]:
    """The steps of the checkpoints that a run was continued from, as its log says."""
    return [int(n) for n in re.findall(r"\ncontinuing from \S+/step_(\d+)", (folder / "log.txt").read_text())]


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs logged the same and ended with the same bits, in their last checkpoint and in their average."""
    files = [folder / "ema.safetensors" for folder in (one, other)]
    about = [metadata_of(file) | {"config": "", "seconds": ""} for file in files]  # which may differ
    assert different(*map(load_file, files)) == [] and about[0] == about[1]
    assert different(*(checkpoint_tensors(last_checkpoint(folder)) for folder in (one, other))) == []
    assert steps_of(one)[-1] == steps_of(other)[-1]
    assert all(curve(one, name) == curve(other, name) for name in ("loss", "flow", "grad_norm", "lr"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny) -> Path:
    """The folder of an undisturbed run of `*tiny, *SAVING`; tests copy what they change."""
    return train(tmp_path_factory.mktemp("unbroken"), *tiny, *SAVING)


@pytest.fixture
def finished(tmp_path, unbroken) -> Path:
    """A working directory with a copy of that run."""
    shutil.copytree(unbroken, tmp_path / "runs/try")
    return tmp_path


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=slow)])
def test_ten_steps_then_ten_more_equal_twenty_bit_for_bit(tmp_path, tiny, precision):
    # step 10 lies in the second stage, which is of another size and batch; of the schedule's 32 steps both see 20
    flags = [*tiny, f"--precision={precision}", "--stages=32:6:16:1,64:26:8:0", "--ema_every=3", "--lr_decay=linear"]
    early = checkpoint_tensors(last_checkpoint(train(tmp_path, *flags, "--max_steps=10", "--name=halves")))
    halves, whole = (train(tmp_path, *flags, "--max_steps=20", f"--name={name}") for name in ("halves", "whole"))
    assert continued(halves) == [10] and list(curve(whole)) == list(range(1, 21))
    assert_same_end(halves, whole)
    assert different(early, checkpoint_tensors(last_checkpoint(whole))), "ten more steps changed nothing"
    held_out = {line["step"]: line["held_out"] for line in metrics(whole) if "held_out" in line}
    assert held_out.keys() == {6, 20}
    assert held_out.items() <= {line["step"]: line.get("held_out") for line in metrics(halves)}.items()


@pytest.mark.parametrize("step", [pytest.param(1, marks=slow), 7, pytest.param(13, marks=slow)])
def test_kill_9_then_the_same_command_ends_as_if_nothing_had_been(tmp_path, tiny, unbroken, step):
    # at 1 there is no checkpoint yet; at 7 and 13 one is just being written, or just has been
    process, folder = start(tmp_path, "train_prx.py", *tiny, *SAVING), tmp_path / "runs/try"
    process.wait_for_step(folder, step)
    process.kill(signal.SIGKILL)
    saved = steps_of(folder)
    assert saved == [6, 12, 18][: len(saved)] and len(saved) >= step // 6 - 1
    # what a kill in the middle of a save leaves: everything but the last rename
    shutil.copytree(last_checkpoint(unbroken), folder / "checkpoints/.step_000018", dirs_exist_ok=True)
    (folder / "checkpoints/.step_000018/__0_0.distcp").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:  # and what a full disk or a lost machine leaves of a line
        file.write('{"step": 17, "lo')
    train(tmp_path, *tiny, *SAVING)
    assert continued(folder) == saved[-1:]
    assert_same_end(folder, unbroken)
    assert not list(folder.glob("checkpoints/.*"))


@pytest.mark.parametrize("number, everyone", [(signal.SIGTERM, True), pytest.param(signal.SIGUSR1, False, marks=slow)])
def test_a_polite_signal_saves_at_once_and_the_same_command_continues(tmp_path, tiny, unbroken, number, everyone):
    # torchrun and SLURM signal the processes that read data as well: `everyone`
    flags, folder = [*tiny, *SAVING, "--workers=2" if everyone else "--workers=0"], tmp_path / "runs/try"
    process = start(tmp_path, "train_prx.py", *flags)
    process.wait_for_step(folder, 7)
    (os.killpg if everyone else os.kill)(process.processes[0].pid, number)
    result = process.wait()
    assert result.status == 128 + signal.SIGTERM and result.ours() == [], result
    step = steps_of(folder)[-1]
    assert 7 <= step < 12, "not saved between the regular saves at 6 and 12"
    assert re.search(rf"stopped by a signal at step {step}\b.* continues", result.stdout)
    train(tmp_path, *flags)
    assert continued(folder) == [step]
    assert_same_end(folder, unbroken)


def test_evaluation_samples_and_saves_leave_the_weights_alone(tmp_path, tiny, unbroken):
    busy = train(tmp_path, *tiny, *SAVING, "--eval_every=5", "--sample_every=7", "--save_every=4", "--log_every=3",
                 "--workers=2")
    assert different(load_file(busy / "ema.safetensors"), load_file(unbroken / "ema.safetensors")) == []
    assert sorted(f.name for f in busy.glob("samples/*.png")) == [f"step_{n:06d}.png" for n in (7, 14, 20)]
    assert [line["step"] for line in metrics(busy) if "held_out" in line] == [5, 10, 15, 20]


def test_the_last_checkpoints_and_all_snapshots_of_the_average_are_kept(tmp_path, tiny):
    folder = train(tmp_path, *tiny, "--save_every=3", "--keep=2", "--snapshot_every=4", "--max_steps=9",
                   "--ema_every=1")
    assert steps_of(folder) == [8, 9], "kept are the last, of those at 3, 4, 6, 8 and 9"
    assert sorted(os.listdir(folder / "ema")) == ["step_000004.safetensors", "step_000008.safetensors"]
    saved, snapshot = checkpoint_tensors(folder / "checkpoints/step_000008"), folder / "ema/step_000008.safetensors"
    average = {name.removeprefix("ema."): w for name, w in saved.items()
               if name.startswith("ema.") and "repa_projector" not in name}
    assert different(load_file(snapshot), average) == []
    assert float(metadata_of(snapshot)["seconds"]) == curve(folder, "seconds")[8]


def test_resume_from_a_path_starts_a_run_of_another_name_where_that_run_stood(finished, tiny):
    before, old = contents(finished / "runs/try"), curve(finished / "runs/try")
    flags = ["--name=fork", "--adam_lr=1e-3", "--resume=runs/try/checkpoints/step_000012"]
    new = curve(train(finished, *tiny, *flags))
    assert list(new) == list(range(13, 21)) and contents(finished / "runs/try") == before
    assert new[13] == old[13], "the first loss depends on the checkpoint alone"
    assert new[15] != old[15], "and then its own learning rate counts"


@slow
def test_resume_never_renames_the_old_run(finished, tiny):
    before = contents(finished / "runs/try")
    assert list(curve(train(finished, *tiny, *SAVING, "--resume=never", "--max_steps=2"))) == [1, 2]
    assert contents(finished / "runs/try.old-1") == before


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_restart_goes_on_where_the_first_attempt_ended(finished, tiny, monkeypatch, variable):
    # and not where the command, given once by hand, said to start
    shutil.rmtree(last_checkpoint(finished / "runs/try"))
    monkeypatch.chdir(finished)
    for count, expected in (("0", "never"), ("1", "auto")):
        monkeypatch.setenv(variable, count)
        assert prepare([*tiny, *SAVING, "--resume=never"])[1] == expected


@pytest.mark.parametrize("file", ["run.json", pytest.param(".metadata", marks=slow), "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(finished, tiny, unbroken, file):
    shutil.rmtree(finished / "runs/try/checkpoints/step_000020")
    damaged = finished / "runs/try/checkpoints/step_000018"
    (damaged / file).write_bytes((damaged / file).read_bytes()[:100])
    result = run(finished, "train_prx.py", *tiny, *SAVING)  # torch logs tracebacks of its own where .metadata is cut
    assert result.status == 2 and re.search("^error: .*step_000018 is .*damaged", result.ours()[-1]), result
    if file == "run.json":
        shutil.rmtree(damaged)
        train(finished, *tiny, *SAVING)
        assert_same_end(finished / "runs/try", unbroken)


def test_another_source_continues_a_run_and_the_log_warns(finished, tiny):
    shutil.rmtree(last_checkpoint(finished / "runs/try"))
    (finished / "fork").mkdir()
    for name in SOURCES:
        (finished / "fork" / name).write_text((ROOT / name).read_text() + "# faster\n")
    result = run(finished, finished / "fork/train_prx.py", *tiny, *SAVING)
    assert result.status == 0 and continued(finished / "runs/try") == [18]
    assert re.search("^continuing from .*step_000018; WARNING .* another source", result.stdout, re.MULTILINE), result


MISTAKES = [  # flags, what the one line must say
    (["--widht=64"], ["--widht", "did you mean --width?"]), (["--lr=nan"], ["--lr=nan"]),
    (["--width=wide"], ["--width", "'wide' is not a whole number"]), (["--ema=2"], ["--ema=2.0", "[0, 1)"]),
    (["--drop=0.99"], ["--drop=0.99", "none of the"]), (["--name=.."], ["--name=.."]),
    (["--compile=maybe"], ["--compile", "'maybe' is not 0 or 1"]), (["--guidance=sel"], ["--guidance", "'self'"]),
    (["--preset=recrd"], ["--preset", "'record'"]), (["--micro_batch=5"], ["16", "--micro_batch=5"]),
    (["--stages=32:20"], ["--stages", "image_size:steps:global_batch:repa"]), (["--patch=5"], ["32", "--patch=5"]),
    (["--width=30", "--heads=4"], ["--width=30", "--heads=4"]), (["--stages=32:0:16:1"], ["--stages", "below 1"]),
    (["--data=nowhere"], ["no data at nowhere", "`python tools/scenes.py make --out=nowhere`", "data_prep.py build"]),
    (["--stages=128:20:16:1"], ["[32, 64]", "128px", "--size=128"]), (["--ns_steps=99"], ["--ns_steps=99", "muon.py"]),
    (["--data=DATA:often"], ["--data", "weight is not a number"]), (["--device=cuda"], ["GPU", "--device=cpu"]),
    (["--resume=nothing"], ["nothing", "no checkpoint"]),
]


@pytest.mark.parametrize("flags, words", MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_a_mistake_is_found_before_a_run_is_begun(tmp_path, monkeypatch, tiny, data, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as error:
        prepare([*tiny, *(flag.replace("DATA", str(data)) for flag in flags)])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flag, words", [
    ("--widht=64", ["--widht", "did you mean --width?"]),
    ("--text_encoder=nobody/nothing", ["https://huggingface.co/nobody/nothing"]),
    pytest.param("--text_encoder=google/t5gemma-2b-2b-ul2", [
        "https://huggingface.co/google/t5gemma-2b-2b-ul2", "open fallback: --text_encoder="], marks=slow),
    pytest.param("--frozen=pretrained", [
        "https://huggingface.co/facebook/dinov3-vitl16-pretrain", "open fallback: --repa_teacher="], marks=slow)])
def test_a_mistake_and_a_model_that_cannot_be_had_are_one_line(tmp_path, tiny, flag, words):
    message = run(tmp_path, "train_prx.py", *tiny, flag).error()
    assert all(word in message for word in words), message


OPTIONS = ["--name", "--resume=never", "--resume=PATH"]
REFUSED = [  # how a run differs from the one in runs/try, what the one line must say
    ([], ["finished at step 20", *OPTIONS]), (["--max_steps=9"], ["finished at step 20", *OPTIONS]),
    (["--seed=1", "--log_every=7"], ["another seed:", *OPTIONS]), (["--micro_batch=8"], ["another micro_batch:"]),
    (["--stages=32:30:16:1"], ["another stages:"]), (["--precision=bf16"], ["another precision:"]),
    (["--width=48", "--text_tokens=20"], ["another width, text_tokens:"]), (["--data=data"], ["another data:"]),
    (["--lr=1", "--resume=runs/try/checkpoints/step_000012"], ["other checkpoints", "another --name"]),
]


@pytest.mark.parametrize("flags, words", REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_a_run_that_would_lose_another_is_refused(finished, monkeypatch, tiny, data, flags, words):
    before = contents(finished / "runs")
    shutil.copytree(data, finished / "data")
    monkeypatch.chdir(finished)
    with pytest.raises(UserError) as error:
        prepare([*tiny, *SAVING, *flags])
    assert all(word in str(error.value) for word in words), error.value
    assert contents(finished / "runs") == before


def test_data_made_anew_and_a_checkpoint_of_another_model_are_refused(finished, tiny, data):
    shutil.copytree(data, finished / "data")
    train(finished, *tiny, "--data=data", "--max_steps=2")
    manifest = finished / "data/manifest.json"
    manifest.write_text(manifest.read_text().replace("seed 0", "seed 1"))
    message = run(finished, "train_prx.py", *tiny, "--data=data").error()
    assert "runs/demo was trained on other data" in message and all(option in message for option in OPTIONS)
    flags = ["--name=new", "--width=48", "--resume=runs/try/checkpoints/step_000012"]
    message = run(finished, "train_prx.py", *tiny, *flags).error()
    assert "step_000012 is damaged or of another model" in message


def test_a_second_process_on_the_same_run_is_turned_away(tmp_path, tiny, unbroken):
    first = start(tmp_path, "train_prx.py", *tiny, *SAVING)
    first.wait_for_step(tmp_path / "runs/try", 2)
    first.kill(signal.SIGSTOP)  # so that it does not end meanwhile
    for flags in ([], ["--resume=never"]):
        message = run(tmp_path, "train_prx.py", *tiny, *SAVING, *flags).error()
        assert "another process is training runs/try" in message
    first.kill(signal.SIGCONT)
    assert first.wait().status == 0
    assert_same_end(tmp_path / "runs/try", unbroken)


POISON = """
honest = module.training_loss
poisoned = {{module.tag_seed(0, step, chunk) for step, chunk in {chunks!r}}}

def training_loss(model, frozen, batch, cfg, stage, generators):
    loss, terms = honest(model, frozen, batch, cfg, stage, generators)
    return ({poison} if generators[0].initial_seed() in poisoned else loss), terms

module.training_loss = training_loss
"""
POISONS = {"a NaN loss": "loss * float('nan')", "an infinite loss whose gradient is finite": "loss + float('inf')",
           "a NaN gradient of a finite loss": "loss + (0 * loss).sqrt()"}


@pytest.mark.parametrize("ranks, kind", [
    (1, "a NaN loss"), *(pytest.param(2, kind, marks=slow) for kind in POISONS)])
def test_a_step_with_one_bad_chunk_is_skipped_on_every_rank_and_counted(tmp_path, tiny, ranks, kind):
    script = patched(tmp_path, POISON.format(chunks=[(4, 3), (6, 0)], poison=POISONS[kind]))
    flags = [*tiny, "--ema_every=100", "--save_every=1", "--keep=99", "--max_steps=8"]
    assert run(tmp_path, script, *flags, ranks=ranks).status == 0
    folder = tmp_path / "runs/demo"
    saved = {n: checkpoint_tensors(folder / f"checkpoints/step_{n:06d}") for n in range(3, 9)}
    assert [int(saved[n].pop("progress.skipped")) for n in saved] == [0, 0, 1, 1, 2, 2]
    for n in range(4, 9):
        changed = set(different(saved[n - 1], saved[n])) - {"progress.step"}
        assert not changed if n in (5, 7) else len(changed) > 60, "a skipped step leaves all as it was"
    lines = [line for line in metrics(folder) if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [line["step"] for line in lines if "loss" not in line] == [5, 7], "there is no mean of nothing"
    assert "NaN" not in (folder / "metrics.jsonl").read_text(), "JSON has no NaN"
    assert re.search(r"^step 8/8 .* skipped 2$", (folder / "log.txt").read_text(), re.MULTILINE)


def test_ten_bad_steps_in_a_row_stop_the_run_and_the_last_good_checkpoint_is_named(tmp_path, tiny):
    bad = [*range(1, 3), *range(5, 15)]  # two, and then ten
    script = patched(tmp_path, POISON.format(chunks=[(step, 0) for step in bad], poison=POISONS["a NaN loss"]))
    message = run(tmp_path, script, *tiny, "--save_every=4").error()
    assert re.search(r"10 steps in a row .* step 15\b.*good checkpoint: \S+/step_000012\b", message), message
    good = checkpoint_tensors(tmp_path / "runs/demo/checkpoints/step_000012")
    assert all(w.isfinite().all() for w in good.values() if w.is_floating_point())


def test_a_crash_ends_the_run_and_its_readers_with_its_traceback(tmp_path, tiny):
    body = "def crash(*args):\n    raise RuntimeError('a bug in a loss')\n\nmodule.training_loss = crash"
    result = run(tmp_path, patched(tmp_path, body), *tiny, "--workers=2")
    assert result.status == 1 and "RuntimeError: a bug in a loss" in result.stderr, result


def test_the_log_proves_the_run(unbroken, data, tiny):
    log, about = (unbroken / "log.txt").read_text(), metadata_of(unbroken / "ema.safetensors")
    found = re.findall(r"^==== (\S+) sha256 (\w+)\n(.*?^)====$", log, re.MULTILINE | re.DOTALL)
    texts = {name: (ROOT / name).read_text() for name in SOURCES}
    assert found == [(name, hashlib.sha256(text.encode()).hexdigest(), text) for name, text in texts.items()]
    source = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    assert about["source"] == source and f"source {source[:12]};" in log
    cfg, _ = parse_config([*tiny, *SAVING])
    config = config_to_json(replace(cfg, precision="fp32"))
    assert json.loads(re.search(r"^config (.*)$", log, re.MULTILINE)[1]) == json.loads(about["config"]) == config
    manifest = hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()
    assert f"\ndata {data}, manifest {manifest}\n" in log and json.loads(about["data"]) == {str(data): manifest}
    assert about["step"] == "20" and float(about["seconds"]) == metrics(unbroken)[-1]["seconds"]
    for package in ("torch", "transformers", "datasets", "numpy"):
        assert f"  {package} {importlib.import_module(package).__version__}" in log
    count = sum(p.numel() for name, p in PRX(cfg).named_parameters() if "repa_projector" not in name)
    assert f"\nmodel {count:,} parameters, width 32, depth 3, patch 8; blocks 1 to 1 see 50% of the tokens" in log
    assert "\nstage 1: 32px, 20 steps of 16 images; loss 1 flow" in log


def test_metrics_hold_every_step_once_and_the_clock_adds_up(unbroken):
    log, lines, clock = (unbroken / "log.txt").read_text(), [x for x in metrics(unbroken) if "loss" in x], 0.0
    assert [line["step"] for line in lines] == list(range(1, 21))
    windows = re.findall(r"^step (\d+)/20 .* images/s  ([\d.]+) s  ", log, re.MULTILINE)
    assert [(int(step), float(s)) for step, s in windows] == [(x["step"], round(x["seconds"], 2)) for x in lines]
    for line in lines:  # a window is a step of 16 images; evaluation and saving lie between windows, off the clock
        assert line["loss"] == pytest.approx(sum(w * line[name] for name, w in loss_weights(log).items()), rel=1e-5)
        assert line["grad_norm"] > 0 and line["skipped"] == 0
        # warm-up over 50 steps, and from the first step on linearly to 0 at the schedule's end
        assert line["lr"] == pytest.approx(1e-2 * line["step"] / 50 * (1 - (line["step"] - 1) / 20))
        assert 16 / line["images_per_second"] == pytest.approx(line["seconds"] - clock, abs=1e-6)
        clock = line["seconds"]
    assert f"finished at step 20, {clock:.2f} s on the clock: " in log


def test_the_held_out_loss_is_of_held_out_rows_at_fixed_t_and_noise(tmp_path, tiny, data):
    # at learning rate 0 the prediction stays 0, its output layer's start, and the loss has a closed form
    folder = train(tmp_path, *tiny, "--lr=0", "--adam_lr=0", "--eval_every=1", "--max_steps=2")
    held_out = [row for row in datasets.load_from_disk(str(data / "32")) if is_held_out(row["key"])]
    x0 = [np.asarray(Image.open(io.BytesIO(row["image"])), np.float64) / 127.5 - 1 for row in held_out]
    expected = np.mean([np.square(x).mean() / max((i + 0.5) / len(x0), 0.05) for i, x in enumerate(x0)])
    values = [line["held_out"] for line in metrics(folder) if "held_out" in line]
    assert values == pytest.approx([expected, expected], rel=1e-5) and values[0] == values[1]
    assert curve(folder)[1] != curve(folder)[2] and 1 <= len(x0) <= 10


def test_the_sample_sheet_shows_the_prompts_of_the_data(unbroken, data):
    prompts = json.loads((data / "manifest.json").read_text())["prompts"][:16]
    assert (unbroken / "samples/prompts.txt").read_text().splitlines() == prompts
    sheet, n = np.asarray(Image.open(unbroken / "samples/step_000020.png")), len(prompts)
    assert n > 4 and sheet.shape == (34 * -(-n // 4) + 2, 34 * 4 + 2, 3), "4 columns, 2 pixels between"
    cells = sheet[2:, 2:].reshape(-1, 34, 4, 34, 3).swapaxes(1, 2).reshape(-1, 34, 34, 3)
    assert len({cell.tobytes() for cell in cells[:n]}) == n, "each has its own prompt and seed"


@pytest.mark.recipe
def test_the_record_recipe_walks_both_stages_with_all_terms_on(tmp_path, data, networks):
    # its preset with everything small, and no network of the hub
    folder = train(
        tmp_path, "--preset=record", "--name=demo", f"--data={data}", "--stages=32:3:4:1,64:3:4:0", "--micro_batch=2",
        "--patch=8", "--bottleneck=8", "--width=32", "--depth=5", "--heads=2", "--repa_depth=3", "--compile=0",
        "--workers=0", f"--text_encoder={networks}/t5gemma", "--text_dim=24", "--text_tokens=48", "--frozen=random",
        f"--repa_teacher={networks}/dinov3", "--repa_dim=24", f"--pdino_model={networks}/dinov2", "--sample_steps=2",
        "--log_every=1")
    weights, log = {"flow": 1, "lpips": 0.1, "pdino": 0.01, "repa": 0.5}, (folder / "log.txt").read_text()
    for line in [line for line in metrics(folder) if "loss" in line]:
        on = [*weights][: 4 if line["step"] <= 3 else 3]
        assert weights.keys() & line.keys() == set(on), "REPA is of stage 1 only"
        assert all(math.isfinite(line[name]) and line[name] != 0 for name in on)
        assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in on), rel=1e-5)
    assert "\nstage 1: 32px, 3 steps of 4 images; loss 1 flow + 0.1 lpips + 0.01 pdino + 0.5 repa" in log
    assert "\nstage 2: 64px, 3 steps of 4 images; loss 1 flow + 0.1 lpips + 0.01 pdino, of random networks" in log
    assert len(list(folder.glob("samples/*.png"))) == 2 and max(curve(folder)) == 6


def test_every_row_comes_once_an_epoch_and_held_out_rows_never(data):
    def chunks_of(**changes) -> Chunks:
        return Chunks(Config(**{"data": str(data), "micro_batch": 7} | changes), Stage(32, 100, 49, False), 0)

    trained = {key for key in datasets.load_from_disk(str(data / "32"))["key"] if not is_held_out(key)}
    n, walked, fresh = len(trained), chunks_of(), chunks_of()
    in_order = [walked[i] for i in range(-(-2 * n // 7))]  # 7 does not divide n: chunks span epochs
    keys = [key for chunk in in_order for key in chunk["keys"]]
    assert n % 7 and 0 < 300 - n <= 10 and set(keys[:n]) == set(keys[n : 2 * n]) == trained
    assert keys[:n] != keys[n : 2 * n] and keys[:n] != sorted(keys[:n])
    for i in (50, 3, 45, 0):  # a chunk is a function of the seed and its number
        again = fresh[i]
        assert all(again[name] == in_order[i][name] for name in ("keys", "captions"))
        assert torch.equal(again["images"], in_order[i]["images"])
    assert chunks_of(seed=1)[0]["keys"] != in_order[0]["keys"]
    dropped = [tuple(caption == "" for caption in chunk["captions"]) for chunk in in_order]
    assert 0.05 < np.mean(dropped) < 0.16 and len(set(dropped)) > 5, "a tenth of the captions, at changing places"
