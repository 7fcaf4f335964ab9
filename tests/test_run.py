"""Whole runs of train_prx.py: whatever interrupts one, and however many ranks share it, it ends as an undisturbed run
on one rank does; a mistake is answered with one line and changes nothing; the log says what was done.

    pytest tests/test_run.py

Runs are forked by conftest.py; what is claimed of a bare `python` is tested with that. Nodes, launchers and what clusters
do are in test_cluster.py.
"""
import datetime
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, KEYS, ROOT, checkpoint_tensors, curve, different, last_checkpoint, metrics, run, start, train
from datasets import load_from_disk
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shards import is_held_out
from train_prx import PRX, SOURCES, Chunks, Config, Stage, config_from_json, parse_config

pytestmark = pytest.mark.machinery

FINISH = 20  # the last step of the runs below
SAVING = ["--save_every=6", "--ema_every=3", "--name=try"]


def contents(folder: Path) -> dict[str, str]:
    """File -> sha256, of everything under `folder` but locks."""
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix != ".lock" and f.name != ".lock"}


def averaged(folder: Path) -> tuple[dict, dict]:
    """Tensors and metadata of ema.safetensors; its bytes are not compared, since their order in the file is free."""
    with safe_open(folder / "ema.safetensors", framework="pt") as file:
        return load_file(folder / "ema.safetensors"), file.metadata()


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs ended with the same bits in their averaged weights and in their last checkpoint."""
    (a, about_a), (b, about_b) = averaged(one), averaged(other)
    assert different(a, b) == [] and about_a.keys() == about_b.keys()
    assert all(about_a[key] == about_b[key] for key in ("format", "step", "source", "data"))
    assert last_checkpoint(one).name == last_checkpoint(other).name
    assert different(*(checkpoint_tensors(last_checkpoint(folder)) for folder in (one, other))) == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny) -> Path:
    """The folder of an undisturbed run of `*tiny, *SAVING`; tests copy what they change."""
    return train(tmp_path_factory.mktemp("unbroken"), *tiny, *SAVING)


@pytest.fixture
def finished(tmp_path, unbroken) -> Path:
    """A working directory with a copy of that run."""
    shutil.copytree(unbroken, tmp_path / "runs/try")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and continued


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_then_ten_more_equal_twenty_bit_for_bit(tmp_path, tiny, precision):
    # step 10 lies in the second stage, which is of another size and batch; of the schedule's 32 steps both runs see 20
    flags = [*tiny, f"--precision={precision}", "--stages=32:6:16:1,64:26:8:0", "--ema_every=3", "--lr_decay=linear"]
    (tmp_path / "halves").mkdir()
    (tmp_path / "whole").mkdir()
    train(tmp_path / "halves", *flags, "--max_steps=10")
    halves = train(tmp_path / "halves", *flags, "--max_steps=20")
    whole = train(tmp_path / "whole", *flags, "--max_steps=20")
    assert (halves / "log.txt").read_text().count("\ncontinuing from step 10\n") == 1
    assert_same_end(halves, whole)
    for name in ("loss", "flow", "grad_norm", "lr"):
        assert curve(halves, name) == curve(whole, name)
    assert list(curve(whole)) == list(range(1, 21))
    held_out = {line["step"]: line["held_out"] for line in metrics(whole) if "held_out" in line}
    assert held_out.items() <= {line["step"]: line.get("held_out") for line in metrics(halves)}.items()
    assert held_out.keys() == {6, 20}
    first = checkpoint_tensors(sorted((halves / "checkpoints").glob("step_*"))[0])
    assert different(first, checkpoint_tensors(last_checkpoint(whole))), "ten more steps changed nothing"


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(13, marks=pytest.mark.slow)])
def test_kill_9_then_the_same_command_ends_as_if_nothing_had_been(tmp_path, tiny, unbroken, step):
    # at 1 there is no checkpoint yet; at 7 and 13 one is just being written, or just has been
    process = start(tmp_path, "train_prx.py", *tiny, *SAVING)
    folder = tmp_path / "runs/try"
    process.wait_for_step(folder, step)
    process.kill(signal.SIGKILL)
    assert process.wait().status == -signal.SIGKILL
    saved = [int(path.name.removeprefix("step_")) for path in sorted((folder / "checkpoints").glob("step_*"))]
    assert saved == [6, 12, 18][: len(saved)] and len(saved) >= step // 6 - 1
    # what a kill in the middle of a save leaves: everything but the last rename
    shutil.copytree(last_checkpoint(unbroken), folder / "checkpoints/.step_000018.partial")
    (folder / "checkpoints/.step_000018.partial/__0_0.distcp").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:  # and what a full disk or a lost machine leaves of a line
        file.write('{"step": 17, "lo')
    train(tmp_path, *tiny, *SAVING)
    said = re.findall(r"^continuing from step (\d+)$", (folder / "log.txt").read_text(), re.MULTILINE)
    assert said == [str(step) for step in saved[-1:]]
    assert_same_end(folder, unbroken)
    assert curve(folder) == curve(unbroken)


DIE = """
import os, sys
sys.path.insert(0, {root!r})
import train_prx
step, honest = None, os.replace

def replace(source, target):
    global step
    if str(target).endswith("ema.safetensors") and os.path.exists("runs/try/checkpoints/.step_{step:06d}.partial"):
        step = {step}
    last = step == {step} and str(target).endswith({target!r})
    if last and {when!r} == "before":
        os.kill(os.getpid(), 9)
    honest(source, target)
    if last:
        os.kill(os.getpid(), 9)

os.replace = replace
train_prx.run_main(train_prx.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("target", ["ema.safetensors", f"step_{FINISH:06d}"])
def test_kill_9_around_the_last_save_loses_nothing(tmp_path, tiny, unbroken, target, when):
    (tmp_path / "die.py").write_text(DIE.format(root=str(ROOT), target=target, when=when, step=FINISH))
    assert run(tmp_path, tmp_path / "die.py", *tiny, *SAVING).status == -signal.SIGKILL
    again = run(tmp_path, "train_prx.py", *tiny, *SAVING)
    assert again.status == 0 or "finished at step 20" in again.error()
    assert_same_end(tmp_path / "runs/try", unbroken)


@pytest.mark.parametrize("number, everyone", [
    (signal.SIGTERM, False), pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow)])
def test_a_polite_signal_saves_at_once_and_the_same_command_continues(tmp_path, tiny, unbroken, number, everyone):
    # torchrun and SLURM signal the processes that read data as well: `everyone`
    flags = [*tiny, *SAVING, "--workers=2" if everyone else "--workers=0"]
    process = start(tmp_path, "train_prx.py", *flags)
    folder = tmp_path / "runs/try"
    process.wait_for_step(folder, 7)
    (os.killpg if everyone else os.kill)(process.processes[0].pid, number)
    result = process.wait()
    assert result.status == 128 + signal.SIGTERM and result.ours() == [], result
    step = int(last_checkpoint(folder).name.removeprefix("step_"))
    assert 7 <= step < 12, "not saved between the regular saves at 6 and 12"
    assert re.search(rf"stopped by a signal at step {step}\b.*the same command continues", result.stdout)
    again = run(tmp_path, "train_prx.py", *flags)
    assert again.status == 0 and f"continuing from step {step}" in again.stdout
    assert_same_end(folder, unbroken)
    assert curve(folder) == curve(unbroken)


@pytest.mark.slow
def test_evaluation_samples_and_saves_leave_the_weights_alone(tmp_path, tiny, unbroken):
    busy = train(tmp_path, *tiny, *SAVING, "--eval_every=5", "--sample_every=7", "--save_every=4", "--log_every=3",
                 "--workers=2")
    assert different(load_file(busy / "ema.safetensors"), load_file(unbroken / "ema.safetensors")) == []
    assert sorted(f.name for f in (busy / "samples").iterdir()) == [f"step_{n:06d}.png" for n in (7, 14, 20)]
    assert [line["step"] for line in metrics(busy) if "held_out" in line] == [5, 10, 15, 20]


def test_the_last_checkpoints_are_kept(tmp_path, tiny):
    folder = train(tmp_path, *tiny, "--save_every=3", "--keep=2", "--max_steps=11")
    assert sorted(os.listdir(folder / "checkpoints")) == ["step_000009", "step_000011"]


def test_resume_from_a_path_starts_a_run_of_another_name_where_that_run_stood(finished, tiny):
    before = contents(finished / "runs/try")
    other = train(finished, *tiny, "--name=fork", "--adam_lr=1e-3", "--resume=runs/try/checkpoints/step_000012")
    assert list(curve(other)) == list(range(13, 21))
    assert curve(other)[13] == curve(finished / "runs/try")[13], "the first loss depends on nothing but the checkpoint"
    assert curve(other)[15] != curve(finished / "runs/try")[15], "and then its own learning rate counts"
    assert contents(finished / "runs/try") == before


def test_going_back_inside_a_run_is_refused_because_it_would_lose_what_came_after(finished, tiny):
    before = contents(finished / "runs/try")
    result = run(finished, "train_prx.py", *tiny, "--name=try", "--lr=1e-3", "--resume=runs/try/checkpoints/step_000012")
    assert "choose another --name" in result.error() and contents(finished / "runs/try") == before


@pytest.mark.parametrize("file", ["run.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named(tmp_path, tiny, file):
    folder = train(tmp_path, *tiny, "--max_steps=3")
    damaged = folder / "checkpoints/step_000003" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    assert "step_000003 is damaged" in run(tmp_path, "train_prx.py", *tiny, "--max_steps=5").error()


@pytest.mark.slow
def test_resume_never_renames_the_old_run(finished, tiny, unbroken):
    before = contents(finished / "runs/try")
    for n in (1, 2):
        folder = train(finished, *tiny, *SAVING, "--resume=never", "--max_steps=2")
        assert contents(finished / "runs/try.old-1") == before
        assert list(curve(folder)) == [1, 2]
    assert list(curve(finished / "runs/try.old-2")) == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


FP32 = ["--precision=fp32", "--ema_every=3"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tiny) -> Path:
    """20 steps of 4 chunks in fp32 by `python train_prx.py`, without the help of conftest.py."""
    cwd = tmp_path_factory.mktemp("one_rank")
    subprocess.run([sys.executable, ROOT / "train_prx.py", *tiny, *FP32], cwd=cwd, env=os.environ | ENV, check=True,
                   capture_output=True)
    return cwd / "runs/demo"


def assert_same_curve(one: Path, other: Path) -> None:
    """The same steps, and at each the same loss within 1e-5, and the same gradient norm to 1e-4 of itself."""
    assert curve(one).keys() == curve(other).keys() == set(range(1, FINISH + 1))
    assert curve(other) == pytest.approx(curve(one), rel=0, abs=1e-5)
    assert curve(other, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path, tiny, one_rank):
    process = start(tmp_path, "train_prx.py", *tiny, *FP32, ranks=2)
    process.wait_for_step(tmp_path / "runs/demo", 5)
    os.kill(process.processes[1].pid, signal.SIGTERM)
    process.wait()
    assert [p.exitcode for p in process.processes] == [128 + signal.SIGTERM] * 2
    assert 5 <= int(last_checkpoint(tmp_path / "runs/demo").name.removeprefix("step_")) < FINISH
    assert_same_curve(one_rank, train(tmp_path, *tiny, *FP32, ranks=2))


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_initial_weights_are_the_same_bits_on_any_number_of_ranks(tmp_path, tiny, ranks):
    # at learning rate 0 the first checkpoint holds them; 3 does not divide the rows of any matrix
    folder = train(tmp_path, *tiny, *FP32, "--stages=32:1:24:1", "--lr=0", "--adam_lr=0", "--seed=5", ranks=ranks)
    saved = checkpoint_tensors(last_checkpoint(folder))
    config = json.loads((last_checkpoint(folder) / "run.json").read_text())["config"]
    expected = PRX(config_from_json(config)).state_dict()
    for group in ("model.", "ema."):
        assert different({k.removeprefix(group): v for k, v in saved.items() if k.startswith(group)}, expected) == []
    assert expected["blocks.0.img_qkv_proj.weight"].std() > 0.05


def test_ranks_that_cannot_share_the_chunks_are_refused_and_told_what_can(tmp_path, tiny):
    flags = [*tiny, "--stages=32:20:16:1,64:20:24:0"]  # 4 and 6 chunks
    message = run(tmp_path, "train_prx.py", *flags, env={"RANK": "0", "WORLD_SIZE": "3"}).error()
    assert message.endswith("these numbers can: 1, 2")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The record recipe, shrunk


@pytest.fixture(scope="module")
def record(data, networks) -> list[str]:
    """The record preset with everything small, two stages and no network of the hub."""
    return ["--preset=record", "--name=demo", f"--data={data}", "--stages=32:3:4:1,64:3:4:0", "--micro_batch=2",
            "--patch=8", "--bottleneck=8", "--width=32", "--depth=5", "--heads=2", "--repa_depth=3", "--compile=0",
            "--workers=0", f"--text_encoder={networks}/t5gemma", "--text_dim=24", "--text_tokens=48",
            f"--repa_teacher={networks}/dinov3", "--repa_dim=24", f"--pdino_model={networks}/dinov2", "--sample_steps=2",
            "--log_every=1"]


@pytest.mark.recipe
def test_the_record_recipe_walks_both_stages_with_all_terms_on(tmp_path, record):
    folder = train(tmp_path, *record, "--frozen=random")
    lines = [line for line in metrics(folder) if "loss" in line]
    weights = {"flow": 1, "lpips": 0.1, "pdino": 0.01, "repa": 0.5}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        on = [*weights][: 4 if line["step"] <= 3 else 3]
        assert weights.keys() & line.keys() == set(on), "REPA is of stage 1 only"
        assert all(math.isfinite(line[name]) and line[name] != 0 for name in on)
        assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in on), rel=1e-5)
    log = (folder / "log.txt").read_text()
    assert "\nstage 1: 32px, 3 steps of 4 images; loss 1 flow + 0.1 lpips + 0.01 pdino + 0.5 repa\n" in log
    assert "\nstage 2: 64px, 3 steps of 4 images; loss 1 flow + 0.1 lpips + 0.01 pdino; off: repa\n" in log
    assert "\nWARNING --frozen=random: lpips, pdino and repa come from random weights and mean nothing\n" in log
    assert len(list((folder / "samples").iterdir())) == 2, "a sheet at the end of each stage"


@pytest.mark.slow
def test_the_record_recipe_takes_its_weights_from_folders(tmp_path, record, networks):
    folder = train(tmp_path, *record, "--frozen=pretrained", "--lpips_weight=0", "--max_steps=1")
    first = metrics(folder)[0]
    assert "lpips" not in first and "\nWARNING --frozen=random" not in (folder / "log.txt").read_text()
    for network, term in (("dinov3", "repa"), ("dinov2", "pdino")):  # each term hears its own network's weights
        shutil.copytree(networks, tmp_path / network)
        weights = load_file(tmp_path / network / network / "model.safetensors")
        torch.manual_seed(1)
        moved = {name: w + 0.2 * torch.randn(w.shape) if w.ndim > 1 else w for name, w in weights.items()}
        save_file(moved, tmp_path / network / network / "model.safetensors", metadata={"format": "pt"})
        flag = {"dinov3": "repa_teacher", "dinov2": "pdino_model"}[network]
        other = metrics(train(tmp_path, *record, "--frozen=pretrained", "--lpips_weight=0", "--max_steps=1",
                              f"--name={network}", f"--{flag}={tmp_path / network / network}"))[0]
        assert other[term] != first[term]
        assert all(other[name] == first[name] for name in ("flow", "repa", "pdino") if name != term)


# ---------------------------------------------------------------------------------------------------------------------
# A user's mistakes


MISTAKES = {  # what is wrong -> (flags, what the one line must say)
    "unknown flag": (["--widht=64"], ["--widht", "did you mean --width?"]),
    "not a number": (["--width=wide"], ["--width", "'wide' is not a whole number"]),
    "not a number at all": (["--lr=nan"], ["--lr=nan"]),
    "an average of more than all": (["--ema=2"], ["--ema=2.0", "[0, 1)"]),
    "no token left": (["--drop=0.99"], ["--drop=0.99", "none of the"]),
    "a name that is a folder above": (["--name=.."], ["--name=.."]),
    "not a boolean": (["--compile=maybe"], ["--compile", "'maybe' is not 0 or 1"]),
    "no such choice": (["--guidance=sel"], ["--guidance", "'self'"]),
    "no such preset": (["--preset=recrd"], ["--preset", "'record'"]),
    "half a stage": (["--stages=32:20"], ["--stages", "image_size:steps:global_batch:repa"]),
    "heads": (["--width=30", "--heads=4"], ["--width=30", "--heads=4"]),
    "patch": (["--patch=5"], ["32", "--patch=5"]),
    "chunks": (["--micro_batch=5"], ["16", "--micro_batch=5"]),
    "no steps": (["--stages=32:0:16:1"], ["--stages", "below 1"]),
    "no data": (["--data=nowhere"],
                ["no data at nowhere", "`python scenes.py make --out=nowhere`", "data_prep.py build"]),
    "too small data": (["--stages=128:20:16:1"], ["[32, 64]", "128px", "--size=128"]),
    "a weight in words": (["--data=DATA:often"], ["--data", "weight is not a number"]),
    "no such text encoder": (["--text_encoder=nobody/nothing"],
                             ["nobody/nothing", "https://huggingface.co/nobody/nothing"]),
    "a gated text encoder": (["--text_encoder=google/t5gemma-2b-2b-ul2"],
                             ["google/t5gemma-2b-2b-ul2", "https://huggingface.co/google/t5gemma-2b-2b-ul2",
                              "open fallback: --text_encoder=", "Photoroom/prx-1024-t2i-beta"]),
    "a gated teacher": (["--frozen=pretrained"],
                        ["facebook/dinov3-vitl16-pretrain-lvd1689m", "https://huggingface.co/facebook/dinov3-vitl16",
                         "open fallback: --repa_teacher=facebook/dinov2-with-registers-large"]),
    "no such P-DINO": (["--frozen=pretrained", "--repa_weight=0", "--pdino_model=nobody/nothing"], ["nobody/nothing"]),
    "no scene teacher": (["--frozen=scene"], ["--frozen=scene", "has no teacher", "python scenes.py teacher --data="]),
    "no GPU": (["--device=cuda"], ["--device=cuda", "no GPU", "--device=cpu"]),
    "no checkpoint to resume": (["--resume=nothing"], ["--resume=nothing", "neither a checkpoint nor a run"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line(tmp_path, tiny, data, name):
    flags, words = MISTAKES[name]
    message = run(tmp_path, "train_prx.py", *tiny, *(flag.replace("DATA", str(data)) for flag in flags)).error()
    assert all(word in message for word in words), message
    assert contents(tmp_path / "runs") == {}, "a run was begun"


def test_damaged_data_is_named(tmp_path, tiny, data):
    flags = [*tiny, f"--data={tmp_path}/data"]
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/32")
    message = run(tmp_path, "train_prx.py", *flags).error()
    assert f"{tmp_path}/data/32" in message and "build the data again" in message
    manifest = tmp_path / "data/manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    message = run(tmp_path, "train_prx.py", *flags).error()
    assert f"{tmp_path}/data/manifest.json is damaged" in message and "build the data again" in message
    assert not (tmp_path / "runs").exists()


OPTIONS = ["--name", "--resume=never", "--resume=PATH"]
REFUSED = {  # how a run differs from the one in runs/try -> (flags, what the one line must say)
    "finished": ([], ["finished at step 20", *OPTIONS]),
    "no longer than before": (["--max_steps=9"], ["finished at step 20", *OPTIONS]),
    "another seed": (["--seed=1", "--log_every=7"], ["another seed:", *OPTIONS]),
    "another chunk": (["--micro_batch=8"], ["another micro_batch:", *OPTIONS]),
    "other stages": (["--stages=32:30:16:1"], ["another stages:", *OPTIONS]),
    "another width and text": (["--width=48", "--text_tokens=20"], ["another width, text_tokens:", *OPTIONS]),
    "a checkpoint of another shape": (["--name=new", "--width=48", "--resume=runs/try"],
                                      ["model.img_in.1.weight", "(32, 16)", "(48, 16)"]),
    "a checkpoint of fewer blocks": (["--name=new", "--depth=5", "--resume=runs/try"], ["no model.blocks.3."]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_would_lose_another_is_refused(finished, tiny, name):
    flags, words = REFUSED[name]
    before = contents(finished / "runs")
    message = run(finished, "train_prx.py", *tiny, *SAVING, *flags).error()
    assert all(word in message for word in words), message
    assert contents(finished / "runs") == before


def test_data_made_anew_does_not_continue_a_run(tmp_path, tiny, data):
    shutil.copytree(data, tmp_path / "data")
    folder = train(tmp_path, *tiny, "--data=data", "--max_steps=2")
    before = contents(folder)
    (tmp_path / "data/manifest.json").write_text((data / "manifest.json").read_text().replace("seed 0", "seed 1"))
    message = run(tmp_path, "train_prx.py", *tiny, "--data=data").error()
    assert "runs/demo was trained on other data" in message and all(option in message for option in OPTIONS)
    assert contents(folder) == before


@pytest.mark.slow
def test_another_version_of_the_source_does_not_continue_a_run(finished, tiny):
    shutil.rmtree(last_checkpoint(finished / "runs/try"))  # unfinished, so that its own source would continue it
    before = contents(finished / "runs")
    for name in SOURCES:
        fork = finished / f"fork of {name}"
        fork.mkdir()
        for source in SOURCES:
            (fork / source).write_text((ROOT / source).read_text() + ("# faster\n" if source == name else ""))
        message = run(finished, fork / "train_prx.py", *tiny, *SAVING).error()
        assert "another version of the source" in message and all(option in message for option in OPTIONS)
    assert contents(finished / "runs") == before
    assert curve(train(finished, *tiny, *SAVING))[20], "and its own source does"


def test_a_second_process_on_the_same_run_is_turned_away(tmp_path, tiny, unbroken):
    first = start(tmp_path, "train_prx.py", *tiny, *SAVING)
    first.wait_for_step(tmp_path / "runs/try", 2)
    first.kill(signal.SIGSTOP)  # so that it does not end meanwhile
    message = run(tmp_path, "train_prx.py", *tiny, *SAVING).error()
    assert "another process is training runs/try" in message
    message = run(tmp_path, "train_prx.py", *tiny, *SAVING, "--resume=never").error()
    assert "another process is training runs/try" in message
    first.kill(signal.SIGCONT)
    assert first.wait().status == 0
    assert_same_end(tmp_path / "runs/try", unbroken)


# ---------------------------------------------------------------------------------------------------------------------
# Non-finite steps


POISON = """
import sys
sys.path.insert(0, {root!r})
import train_prx
honest = train_prx.training_loss
poisoned = {{train_prx.tag_seed(0, step, chunk) for step, chunk in {chunks!r}}}

def training_loss(model, frozen, batch, cfg, stage, generator):
    loss, terms = honest(model, frozen, batch, cfg, stage, generator)
    return ({poison} if generator.initial_seed() in poisoned else loss), terms

train_prx.training_loss = training_loss
train_prx.run_main(train_prx.main)
"""


POISONS = {"a NaN loss": "loss * float('nan')", "an infinite loss whose gradient is finite": "loss + float('inf')",
           "a NaN gradient of a finite loss": "loss + (0 * loss).sqrt()"}


def poison(cwd: Path, chunks: list[tuple[int, int]], kind: str = "a NaN loss") -> Path:
    """A script that trains with one of POISONS in the given (step, chunk)."""
    (cwd / "poison.py").write_text(POISON.format(root=str(ROOT), chunks=chunks, poison=POISONS[kind]))
    return cwd / "poison.py"


def groups(tensors: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in names}


@pytest.mark.slow
@pytest.mark.parametrize("ranks, kind", [(1, "a NaN loss"), (2, "a NaN loss"), (2, "an infinite loss whose gradient is finite"),
                                         (2, "a NaN gradient of a finite loss")])
def test_a_step_with_one_bad_chunk_is_skipped_on_every_rank_and_counted(tmp_path, tiny, ranks, kind):
    script = poison(tmp_path, [(4, 3), (6, 0)], kind)
    flags = [*tiny, *FP32, "--ema_every=100", "--save_every=1", "--keep=99", "--max_steps=8"]
    assert run(tmp_path, script, *flags, ranks=ranks).status == 0
    folder = tmp_path / "runs/demo"
    saved = {n: checkpoint_tensors(folder / f"checkpoints/step_{n:06d}") for n in range(3, 9)}
    trained = {n: groups(saved[n], "model", "optimizer") for n in saved}
    unused = {name for name in trained[3] if "repa_projector" in name}
    for n in range(4, 9):
        changed = set(different(trained[n - 1], trained[n]))
        if n in (5, 7):
            assert not changed, "a skipped step leaves weights and optimizer as they were"
        else:
            assert len(changed) > 0.9 * (len(trained[n]) - len(unused))
    assert [int(saved[n]["progress.skipped"]) for n in range(4, 9)] == [0, 1, 1, 2, 2]
    lines = [line for line in metrics(folder) if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [line["step"] for line in lines if "loss" not in line] == [5, 7], "there is no mean of nothing"
    assert "NaN" not in (folder / "metrics.jsonl").read_text(), "JSON has no NaN"
    assert re.search(r"^step 8/8 .* skipped 2$", (folder / "log.txt").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_nine_bad_steps_in_a_row_pass_and_ten_stop_the_run(tmp_path, tiny):
    flags = [*tiny, "--save_every=4", "--max_steps=16"]
    (tmp_path / "nine").mkdir()
    (tmp_path / "ten").mkdir()
    script = poison(tmp_path / "nine", [(step, 0) for step in range(5, 14)])
    assert run(tmp_path / "nine", script, *flags).status == 0
    script = poison(tmp_path / "ten", [(step, 1) for step in range(5, 15)])
    result = run(tmp_path / "ten", script, *flags)
    message = result.error()
    named = re.search(r"10 steps in a row .* at step 15\b.*last good checkpoint: (\S+)", message)[1]
    assert named == "runs/demo/checkpoints/step_000012"
    weights = groups(checkpoint_tensors(tmp_path / "ten" / named), "model")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    good = groups(checkpoint_tensors(tmp_path / "nine/runs/demo/checkpoints/step_000012"), "model")
    assert different(weights, good) == []


CRASH = """
import sys
sys.path.insert(0, {root!r})
import train_prx

def training_loss(*args):
    raise RuntimeError("a bug in somebody's loss")

train_prx.training_loss = training_loss
train_prx.run_main(train_prx.main)
"""


def test_a_crash_ends_the_run_and_its_readers(tmp_path, tiny):
    (tmp_path / "crash.py").write_text(CRASH.format(root=str(ROOT)))
    result = run(tmp_path, tmp_path / "crash.py", *tiny, "--workers=2")
    assert result.status == 1 and "a bug in somebody's loss" in result.stderr, result


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_the_log_proves_the_run(unbroken, data, tiny):
    log = (unbroken / "log.txt").read_text()
    texts = []
    for name in SOURCES:
        header, text = re.search(rf"^==== {name} sha256 (\w+)\n(.*?^)====$", log, re.MULTILINE | re.DOTALL).groups()
        assert header == hashlib.sha256(text.encode()).hexdigest()
        assert text == (ROOT / name).read_text()
        texts.append(text)
    source = hashlib.sha256("".join(texts).encode()).hexdigest()
    with safe_open(unbroken / "ema.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == source and f"source {source[:12]};" in log
    cfg, _ = parse_config([*tiny, *SAVING])
    config = json.loads(re.search(r"^config (.*)$", log, re.MULTILINE)[1])
    assert config_from_json(config) == config_from_json(json.loads(metadata["config"])) == replace(cfg, precision="fp32")
    manifest = hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()
    assert f"\ndata {data}, manifest {manifest}\n" in log
    assert json.loads(metadata["data"]) == {str(data): manifest} and metadata["step"] == str(FINISH)
    for package in ("torch", "transformers", "datasets", "numpy"):
        assert f"  {package} {importlib.import_module(package).__version__}" in log
    count = sum(p.numel() for name, p in PRX(cfg).named_parameters() if not name.startswith("repa_projector."))
    assert f"\nmodel {count:,} parameters, width 32, depth 3, patch 8; blocks 1 to 1 see 50% of the tokens" in log
    assert "loss 1 flow; off: lpips, pdino, repa\n" in log


def test_the_clock_adds_up(unbroken):
    log = (unbroken / "log.txt").read_text()
    windows = re.findall(r"^step (\d+)/20 .*  ([\d.]+) images/s  ([\d.]+) s  ", log, re.MULTILINE)
    lines = [line for line in metrics(unbroken) if "loss" in line]
    assert [(int(step), float(seconds)) for step, _, seconds in windows] == [(line["step"], round(line["seconds"], 2)) for line in lines]
    clock = 0.0
    for line in lines:  # a window is a step of 16 images; evaluation and saving lie between windows, off the clock
        assert 16 / line["images_per_second"] == pytest.approx(line["seconds"] - clock, abs=1e-6)
        clock = line["seconds"]
    began, = re.findall(r"^(\S+ \S+)  python ", log, re.MULTILINE)
    ended, seconds = re.findall(r"^(\S+ \S+)  finished at step 20, ([\d.]+) s on the clock: ", log, re.MULTILINE)[0]
    assert float(seconds) == round(clock, 2)
    wall = datetime.datetime.fromisoformat(ended) - datetime.datetime.fromisoformat(began)
    assert clock <= wall.total_seconds() + 1


WARM_UP = """
import sys, time
sys.path.insert(0, {root!r})
import train_prx

def warm_up(model, frozen, cfg, device):
    honest(model, frozen, cfg, device) if {warm} else time.sleep(5)

honest, train_prx.warm_up = train_prx.warm_up, warm_up
train_prx.run_main(train_prx.main)
"""


@pytest.mark.slow
def test_warming_up_leaves_no_trace_and_is_off_the_clock(tmp_path, tiny):
    flags = [*tiny, "--stages=32:3:16:1,64:2:16:0", "--ema_every=1"]
    for warm in (True, False):
        (tmp_path / "warm_up.py").write_text(WARM_UP.format(root=str(ROOT), warm=warm))
        began = time.monotonic()
        assert run(tmp_path, tmp_path / "warm_up.py", *flags, f"--name=warm-{warm}").status == 0
    seconds = time.monotonic() - began
    cold, warmed = tmp_path / "runs/warm-False", tmp_path / "runs/warm-True"
    assert_same_end(cold, warmed)
    assert curve(cold) == curve(warmed) and len(curve(cold)) == 5
    assert "\nwarmed up in 5." in (cold / "log.txt").read_text()
    assert metrics(cold)[-1]["seconds"] < seconds - 5


def test_metrics_are_json_lines_with_loss_terms_and_learning_rate(unbroken):
    lines = [line for line in metrics(unbroken) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, FINISH + 1))
    for line in lines:
        assert line["loss"] == line["flow"] and line["grad_norm"] > 0 and line["skipped"] == 0
        # warm-up over 50 steps, and from the first step on linearly to 0 at the schedule's end
        assert line["lr"] == pytest.approx(1e-2 * line["step"] / 50 * (1 - (line["step"] - 1) / FINISH))
    assert all(a["seconds"] < b["seconds"] for a, b in zip(lines, lines[1:]))


def test_the_logged_learning_rate_is_the_one_applied(tmp_path, tiny):
    # Adam's first step is its learning rate, whatever the gradient; the output layer starts at 0
    folder = train(tmp_path, *tiny, "--precision=fp32", "--warmup=4", "--max_steps=1")
    bias = checkpoint_tensors(last_checkpoint(folder))["model.final_layer.linear.bias"]
    assert curve(folder, "lr")[1] == pytest.approx(1e-2 / 4)
    torch.testing.assert_close(bias.abs(), torch.full_like(bias, 4e-3 / 4), rtol=1e-3, atol=0)


def test_the_average_moves_every_few_steps_from_step_0(tmp_path, tiny):
    folder = train(tmp_path, *tiny, "--precision=fp32", "--warmup=1", "--ema=0.75", "--ema_every=3", "--save_every=1",
                   "--keep=9", "--max_steps=5")
    average = PRX(parse_config(tiny)[0]).state_dict()["blocks.0.up_proj.weight"]
    for step in range(1, 6):
        saved = checkpoint_tensors(folder / f"checkpoints/step_{step:06d}")
        if step in (1, 4):  # after the updates of steps 0 and 3
            average = 0.75 * average + 0.25 * saved["model.blocks.0.up_proj.weight"]
        torch.testing.assert_close(saved["ema.blocks.0.up_proj.weight"], average, rtol=0, atol=1e-7)
    assert (average - saved["model.blocks.0.up_proj.weight"]).abs().max() > 1e-4


def test_the_sample_sheet_shows_the_prompts_of_the_data(unbroken, data):
    prompts = json.loads((data / "manifest.json").read_text())["prompts"]
    sheet = np.asarray(Image.open(unbroken / "samples" / f"step_{FINISH:06d}.png"))
    lines = max(len(textwrap.wrap(prompt, 32)) for prompt in prompts)  # 6 px a letter under 192 px
    cell = 192 + 16 + 15 * min(lines, 6)
    assert len(prompts) == 16 and sheet.shape == (4 * cell, 4 * 200, 3)
    pictures = [sheet[row * cell + 4 :][:192, column * 200 + 4 :][:, :192] for row in range(4) for column in range(4)]
    assert all((picture < 250).any(axis=2).mean() > 0.9 for picture in pictures), "a picture is missing"
    assert len({picture.tobytes() for picture in pictures}) == 16, "each has its own prompt and seed"


def test_the_held_out_loss_is_of_held_out_rows_at_fixed_t_and_noise(tmp_path, tiny, data):
    # at learning rate 0 the prediction stays 0, its output layer's start, and the loss has a closed form
    folder = train(tmp_path, *tiny, "--lr=0", "--adam_lr=0", "--eval_every=1", "--max_steps=2")
    rows = load_from_disk(str(data / "32"))
    held_out = [row for row in rows if is_held_out(row["key"])]
    assert 1 <= len(held_out) <= 10
    x0 = [np.asarray(Image.open(io.BytesIO(row["image"])), np.float64) / 127.5 - 1 for row in held_out]
    t = [(i + 0.5) / len(x0) for i in range(len(x0))]
    expected = np.mean([np.square(x).mean() / max(s, 0.05) for x, s in zip(x0, t)])
    values = [line["held_out"] for line in metrics(folder) if "held_out" in line]
    assert values == pytest.approx([expected, expected], rel=1e-5) and values[0] == values[1]
    assert curve(folder)[1] != curve(folder)[2]


def test_data_without_held_out_rows_and_of_a_larger_size_is_used_and_said(tmp_path, tiny):
    assert run(tmp_path, "scenes.py", "make", "--out=few", "--rows=12", "--size=64").status == 0
    assert not any(is_held_out(key) for key in load_from_disk(str(tmp_path / "few/64"))["key"])
    folder = train(tmp_path, *tiny, "--data=few", "--max_steps=2")
    log = (folder / "log.txt").read_text()
    assert "\nfew is too small to have held-out rows" in log
    assert "\nfew has no 32px: 64px is scaled down\n" in log
    assert not any("held_out" in line for line in metrics(folder))


# ---------------------------------------------------------------------------------------------------------------------
# The order of rows


def chunks_of(data: str, micro_batch: int = 7, seed: int = 0, first_row: int = 0) -> Chunks:
    cfg = Config(data=data, micro_batch=micro_batch, seed=seed, caption_dropout=0.1)
    return Chunks(cfg, Stage(32, 100, 7 * micro_batch, False), first_row)


def test_every_row_comes_once_an_epoch_and_held_out_rows_never(data):
    train_keys = {key for key in load_from_disk(str(data / "32"))["key"] if not is_held_out(key)}
    n = len(train_keys)
    assert 0 < 300 - n <= 10
    chunks = chunks_of(str(data))
    keys = [key for i in range(-(-2 * n // 7)) for key in chunks[i]["keys"]]  # 7 does not divide n: chunks span epochs
    first, second = keys[:n], keys[n : 2 * n]
    assert n % 7 and set(first) == set(second) == train_keys
    assert first != second and first != sorted(first)


def test_a_chunk_depends_on_seed_and_index_only(data):
    walked, fresh = chunks_of(str(data)), chunks_of(str(data))
    in_order = [walked[i] for i in range(60)]  # into the second epoch
    for i in (50, 3, 45, 0):
        chunk = fresh[i]
        assert chunk["keys"] == in_order[i]["keys"] and chunk["captions"] == in_order[i]["captions"]
        assert torch.equal(chunk["images"], in_order[i]["images"])
    assert chunks_of(str(data), seed=1)[0]["keys"] != in_order[0]["keys"]
    assert chunks_of(str(data), first_row=21)[0]["keys"] == in_order[3]["keys"], "the index counts from the run's start"
    dropped = [tuple(caption == "" for caption in chunk["captions"]) for chunk in in_order]
    assert 0.05 < np.mean(dropped) < 0.16, "about a tenth of the captions are empty"
    assert len(set(dropped)) > 5, "and not the same places in every chunk"


@pytest.mark.slow
def test_a_run_reads_every_row_once_an_epoch_over_stages_ranks_and_a_resume(tmp_path, tiny, data):
    (tmp_path / "keys.py").write_text(KEYS.format(root=str(ROOT)))
    flags = [*tiny, "--stages=32:6:48:1,64:7:48:0", "--micro_batch=12"]
    assert run(tmp_path, tmp_path / "keys.py", *flags, "--max_steps=3").status == 0
    assert run(tmp_path, tmp_path / "keys.py", *flags, ranks=2).status == 0
    chunks = [json.loads(line) for rank in "01" for line in (tmp_path / f"keys-{rank}").read_text().splitlines()]
    stream = chunks_of(str(data), 12)
    assert sorted(chunks) == sorted(stream[i]["keys"] for i in range(13 * 4))
    counts = Counter(key for chunk in chunks for key in chunk)
    rows = [key for key in load_from_disk(str(data / "32"))["key"] if not is_held_out(key)]
    assert counts.keys() == set(rows) and sum(counts.values()) == 13 * 48
    assert set(counts.values()) == {2, 3}, "two epochs and a bit"


def test_sets_mix_in_proportion_to_their_weights(tmp_path, data):
    assert run(tmp_path, "scenes.py", "make", "--out=other", "--rows=80", "--size=32", "--seed=1").status == 0
    def shares(flag: str) -> list[Counter]:
        chunks = chunks_of(flag, micro_batch=40)
        return [Counter(key.split("-")[2] for key in chunks[i]["keys"]) for i in range(10)]
    assert shares(f"{data}:3,{tmp_path}/other:1") == [Counter({"0": 30, "1": 10})] * 10
    assert shares(f"{tmp_path}/other:1,{data}:3") == [Counter({"0": 30, "1": 10})] * 10
    by_rows = sum(shares(f"{data},{tmp_path}/other"), Counter())
    assert by_rows["0"] / 400 == pytest.approx(300 / 380, abs=0.01), "without weights, in proportion to the rows"
