"""sample.py: a checkpoint comes back as it was written, a picture depends on its prompt, seed and settings only and says how
it was drawn, scores name every attribute, and a mistake is answered with one line.

    pytest tests/test_sample.py
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_tensors, curve, different, enliven, last_checkpoint, metrics, patience, run, train
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import scenes
from run_folder import draw_grid
from sample import load_checkpoint, sample_images
from train_prx import UserError, draw

pytestmark = pytest.mark.machinery

PROMPT = "a large red circle in the top left, on a gray background"
OTHER = "a small white cross in the bottom right, a large blue square in the top left, on a brown background"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny) -> Path:
    """The folder of a short run."""
    return train(tmp_path_factory.mktemp("trained"), *tiny, "--warmup=1", "--max_steps=4")


@pytest.fixture(scope="module")
def lively(trained) -> Path:
    """A folder with its weights made lively."""
    return enliven(trained)


def drawn(cwd: Path, folder: Path, *flags: str) -> np.ndarray:
    """Run sample.py; the picture it wrote, [H, W, 3]."""
    result = run(cwd, "sample.py", f"--checkpoint={folder}", "--out=out.png", *flags)
    assert result.status == 0 and result.ours() == [], result
    return np.asarray(Image.open(cwd / "out.png"))


def in_sheet(sheet: np.ndarray, i: int, rows: int, zoom: int = 6) -> np.ndarray:
    """Picture i of a sheet of four 32px columns, back at its own size."""
    row, column = divmod(i, 4)
    top, left = row * len(sheet) // rows + 4 + zoom // 2, column * (32 * zoom + 8) + 4 + zoom // 2
    return sheet[top : top + 32 * zoom - zoom // 2 : zoom, left : left + 32 * zoom - zoom // 2 : zoom]


def far(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two pictures, of 255."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_comes_back_as_the_averaged_weights_that_were_written(trained):
    model, cfg, encode_text = load_checkpoint(trained)
    saved = checkpoint_tensors(last_checkpoint(trained))
    averaged = {name.removeprefix("ema."): tensor for name, tensor in saved.items()
                if name.startswith("ema.") and "repa_projector" not in name}
    assert different(model.state_dict(), averaged) == []
    assert different(load_checkpoint(trained / "ema.safetensors")[0].state_dict(), averaged) == []
    weights = {name.removeprefix("model."): tensor for name, tensor in saved.items() if name.startswith("model.")}
    assert different({name: weights[name] for name in averaged}, averaged), "the last weights are not their average"
    assert (cfg.width, cfg.depth, cfg.name, cfg.text_encoder) == (32, 3, "demo", "builtin")
    txt, txt_mask = encode_text([PROMPT, ""])
    assert txt.shape == (2, cfg.text_tokens, cfg.text_dim) and txt_mask.sum(1).tolist() == [7, 0]
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("guidance", ["self", "cfg", "none"])
def test_a_picture_is_the_same_alone_and_among_others(tmp_path, lively, guidance):
    (tmp_path / "prompts.txt").write_text(f"\n{PROMPT}\n\n  {OTHER}  \n")
    flags = [f"--guidance={guidance}", "--scale=2", "--steps=3"]
    result = run(tmp_path, "sample.py", f"--checkpoint={lively}", "--prompts=prompts.txt", "--n=3", "--seed=3", "--batch=4",
                 "--out=out.png", *flags)
    assert result.status == 0, result
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    assert sheet.shape[1] == 4 * (192 + 8)
    fifth = in_sheet(sheet, 5, rows=2)
    alone = drawn(tmp_path, lively, *flags, f"--prompt={OTHER}", "--seed=5")
    assert alone.shape == (32, 32, 3) and far(alone, fifth) <= 1
    assert all(far(alone, in_sheet(sheet, i, rows=2)) > 3 for i in range(5)), "others have another prompt or seed"
    assert far(alone, drawn(tmp_path, lively, *flags, f"--prompt={PROMPT}", "--seed=5")) > 3


def test_guidance_scale_drop_steps_and_shape_change_the_picture(tmp_path, lively):
    base = [f"--prompt={PROMPT}", "--steps=3", "--guidance=self", "--scale=3"]
    pictures = {" ".join(change): drawn(tmp_path, lively, *base, *change) for change in (
        [], ["--guidance=cfg"], ["--guidance=none"], ["--scale=2"], ["--drop=0.75"], ["--steps=5"])}
    names = list(pictures)
    assert all(far(pictures[a], pictures[b]) > 1 for i, a in enumerate(names) for b in names[:i])
    plain = pictures["--guidance=none"]
    assert far(drawn(tmp_path, lively, *base, "--scale=1"), plain) <= 1, "at scale 1 guidance is none"
    assert far(drawn(tmp_path, lively, *base, "--scale=1", "--guidance=cfg"), plain) <= 1
    assert far(drawn(tmp_path, lively, *base, "--drop=0"), plain) <= 1, "routing nothing guides to nowhere"


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_picture(tmp_path, lively):
    flags = [f"--prompt={PROMPT}", "--steps=2", "--guidance=cfg", "--scale=2"]
    assert far(drawn(tmp_path, lively, *flags, "--compile=1"), drawn(tmp_path, lively, *flags)) <= 1


def test_size_is_height_by_width(tmp_path, lively):
    assert drawn(tmp_path, lively, f"--prompt={PROMPT}", "--size=32x64").shape == (32, 64, 3)
    assert drawn(tmp_path, lively, f"--prompt={PROMPT}", "--size=48").shape == (48, 48, 3)


def text_of(file: Path) -> dict[str, str]:
    """What a PNG says of itself."""
    return Image.open(file).text


def test_a_picture_says_how_it_was_drawn_and_that_draws_it_again(tmp_path, lively):
    drawn(tmp_path, lively, f"--prompt={PROMPT} é", "--seed=7", "--steps=4", "--guidance=self", "--scale=1.5", "--drop=0.25",
          "--size=32x64", "--interval=0.1:0.9", "--shift=2")
    sha256 = hashlib.sha256((lively / "ema.safetensors").read_bytes()).hexdigest()
    assert text_of(tmp_path / "out.png") == {
        "prompt": f"{PROMPT} é", "seed": "7", "size": "32x64", "steps": "4", "guidance": "self", "scale": "1.5", "drop": "0.25",
        "shift": "2.0", "interval": "0.1:0.9", "checkpoint": sha256}
    (tmp_path / "out.png").rename(tmp_path / "first.png")
    drawn(tmp_path, lively, "--like=first.png")
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    changed = drawn(tmp_path, lively, "--like=first.png", "--prompt", OTHER, "--seed=8", "--size=32")
    text = text_of(tmp_path / "out.png")
    assert changed.shape == (32, 32, 3) and (text["prompt"], text["seed"], text["steps"]) == (OTHER, "8", "4")
    drawn(tmp_path, lively, "--like=first.png", "--n=2")
    assert json.loads(text_of(tmp_path / "out.png")["seeds"]) == [7, 8]


def test_a_sheet_and_a_sweep_are_drawn_again_too(tmp_path, lively):
    drawn(tmp_path, lively, f"--prompt={PROMPT}", f"--prompt={OTHER}", "--seeds=9,2")  # what is not given is the run's own
    text = text_of(tmp_path / "out.png")
    assert json.loads(text["prompts"]) == [PROMPT, OTHER] and json.loads(text["seeds"]) == [9, 2]
    assert (text["steps"], text["guidance"], text["scale"], text["drop"], text["interval"]) == ("2", "cfg", "2.0", "0.5", "0.0:1.0")
    for flags in ([], ["--prompt=" + PROMPT, "--sweep=2,4"]):
        if flags:
            drawn(tmp_path, lively, *flags)
        (tmp_path / "out.png").rename(tmp_path / "first.png")
        drawn(tmp_path, lively, "--like=first.png")
        assert (tmp_path / "out.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_a_sheet_too_large_for_pillow_is_drawn_again_too(tmp_path, lively):
    picture, said = drawn(tmp_path, lively, f"--prompt={PROMPT}", "--seed=5"), PngInfo()
    for key, value in text_of(tmp_path / "out.png").items():
        said.add_text(key, value)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png", pnginfo=said)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")
    assert far(drawn(tmp_path, lively, "--like=large.png"), picture) == 0


def test_guidance_is_off_outside_its_interval(tmp_path, lively):
    flags = [f"--prompt={PROMPT}", "--steps=3", "--scale=4"]  # at times 1, 0.86 and 0.6
    for guidance in ("self", "cfg"):
        plain, full, late, never = (drawn(tmp_path, lively, *flags, f"--guidance={kind}", f"--interval={interval}") for kind, interval in (
            ("none", "0:1"), (guidance, "0:1"), (guidance, "0.5:0.7"), (guidance, "0:0.5")))
        assert far(never, plain) == 0 and far(late, plain) > 1 and far(late, full) > 1
        assert far(drawn(tmp_path, lively, *flags, f"--guidance={guidance}", "--interval=0.59:1"), full) == 0


def test_the_batch_changes_no_picture(lively):
    model, cfg, encode_text = load_checkpoint(lively)
    prompts, seeds = [PROMPT, OTHER, "", PROMPT, "a"], [3, 1, 4, 1, 5]
    worst = 0.0
    for guidance in ("self", "cfg"):
        settings = dict(steps=3, guidance=guidance, scale=3.0, drop=0.5, shift=3.0)
        whole = draw(model, encode_text, prompts, seeds, (32, 48), **settings)
        for batch in (1, 2):
            parts = [draw(model, encode_text, prompts[i : i + batch], seeds[i : i + batch], (32, 48), **settings)
                     for i in range(0, 5, batch)]
            worst = max(worst, (torch.cat(parts) - whole).abs().max().item())
    assert worst <= 1e-4, worst  # measured 4e-5: guidance at scale 3 through random weights


RANKED = """
import sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import ranks, sample, train_prx
from metrics import gather_rows, my_share

device, mesh = ranks.join(False)
model, cfg, encode_text = sample.load_checkpoint({folder!r})
items = my_share(5)
x0 = train_prx.draw(model, encode_text, [{prompts!r}[i] for i in items], [3 + i for i in items], (32, 48), steps=3, guidance="self",
                    scale=3.0, drop=0.5, shift=3.0)
x0 = gather_rows(x0, 5)
if dist.get_rank() == 0:
    torch.save(x0, f"x0-{{dist.get_world_size()}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun_scores_on_many_ranks(tmp_path, lively):
    shutil.copytree(lively, tmp_path / "try")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", str(ROOT / "sample.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*torchrun, "score", "--checkpoint=try", "--n=5"], cwd=tmp_path, env=env, capture_output=True, text=True,
                            timeout=patience())
    assert result.returncode == 0 and result.stdout.count("scenes of 5,") == 1, result
    assert json.loads((tmp_path / "try/score_scenes.json").read_text())["n"] == 5


def test_the_number_of_ranks_changes_no_picture(tmp_path, lively):
    prompts = [PROMPT, OTHER, "", PROMPT, "a"]
    (tmp_path / "ranked.py").write_text(RANKED.format(root=str(ROOT), folder=str(lively), prompts=prompts))
    for ranks in (1, 3):
        assert run(tmp_path, tmp_path / "ranked.py", ranks=ranks).status == 0
    one, three = (torch.load(tmp_path / f"x0-{ranks}.pt") for ranks in (1, 3))
    assert one.shape == (5, 3, 32, 48) and (one - three).abs().max() <= 1e-4  # measured 3e-5


def test_a_folder_holds_one_picture_a_prompt_and_seed_whatever_the_ranks(tmp_path, lively):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{OTHER}\n")
    flags = [f"--checkpoint={lively}", "--prompts=prompts.txt", "--seeds=5,3,8", "--steps=2", "--guidance=self"]
    for ranks in (1, 3):
        result = run(tmp_path, "sample.py", *flags, f"--out=pictures{ranks}", ranks=ranks)
        assert result.status == 0 and result.stdout.count("6 image(s)") == 1, result
        result = run(tmp_path, "sample.py", *flags, f"--out=sheet{ranks}.png", f"--batch={ranks}", ranks=ranks)
        assert result.status == 0, result
    names = sorted(file.name for file in (tmp_path / "pictures1").iterdir())
    assert names == [f"0000{prompt}-{seed}.png" for prompt in (0, 1) for seed in (3, 5, 8)]
    for name in names:
        pictures = [Image.open(tmp_path / folder / name) for folder in ("pictures1", "pictures3")]
        assert pictures[0].text == pictures[1].text and pictures[0].text["seed"] == name[6:-4]
        assert far(*map(np.asarray, pictures)) <= 1
    assert far(*(np.asarray(Image.open(tmp_path / f"sheet{ranks}.png")) for ranks in (1, 3))) <= 1
    message = run(tmp_path, "sample.py", *flags, "--out=pictures1").error()
    assert "pictures1 exists and is not empty" in message


def test_a_sweep_shows_every_kind_of_guidance_at_every_scale(tmp_path, lively):
    sheet = drawn(tmp_path, lively, f"--prompt={PROMPT}", "--seed=3", "--sweep=2,4.5,6")
    title = len(sheet) - 2 * (6 * 32 + 16 + 15)
    assert title > 0 and sheet.shape[1] == 4 * 200
    rows = sheet[title:]
    for i, flags in enumerate([["--guidance=none"], *([f"--guidance={kind}", f"--scale={scale}"] for kind in ("self", "cfg")
                                                      for scale in ("none", 2, 4.5, 6))][1:]):
        flags = ["--guidance=none"] if "--scale=none" in flags else flags
        assert far(drawn(tmp_path, lively, f"--prompt={PROMPT}", "--seed=3", *flags), in_sheet(rows, i, rows=2)) <= 1, flags


def test_long_words_above_and_below_the_pictures_are_wrapped_and_not_clipped():
    images = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    for words in ("a very long prompt " * 12, "W" * 200):
        plain, sheet = (np.asarray(draw_grid(images, ["", "W" * 40], title=title)) for title in ("", words))
        title = len(sheet) - len(plain)
        ink = (sheet < 128).any(2)
        assert np.array_equal(sheet[title:], plain) and title > 3 * 20 and ink[:title].any()
        assert not ink[:, -4:].any() and not ink[: title + 4][-6:].any(), "the last line and the last letters have room"
        below = ink[title + 200 :, 204:]
        assert below.any() and not below[-4:].any() and not ink[title + 200 :, :200].any()


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def scores(stdout: str) -> dict[str, str]:
    """The lines "name share%  meaning" of `sample.py score`."""
    return {line.split()[0]: line.split()[1] for line in stdout.splitlines() if line.startswith("  ")}


def test_scores_name_every_attribute_and_show_the_pictures(tmp_path, lively):
    shutil.copytree(lively, tmp_path / "try")
    result = run(tmp_path, "sample.py", "score", "--checkpoint=try", "--metric=scenes", "--n=18", "--seed=4", "--batch=7")
    assert result.status == 0, result
    assert json.loads((tmp_path / "try/score_scenes.json").read_text())["error"].keys() >= {"objects", "exact"}
    model, cfg, encode_text = load_checkpoint(lively)
    held_out = scenes.make_scenes(18, 4, "held_out")
    images = sample_images(model, encode_text, [scenes.caption(scene) for scene in held_out], list(range(4, 22)), (32, 32),
                           18, steps=2, guidance="cfg", scale=2.0, drop=0.5, shift=3.0)
    expected = scenes.score_scenes(images, held_out)
    assert {"colour", "place", "size", "shape", "objects", "exact"} <= expected.keys()
    assert scores(result.stdout) == {name: f"{100 * value:.1f}%" for name, value in expected.items()}
    written = json.loads((tmp_path / "try/score_scenes.json").read_text())
    assert {name: written[name] for name in expected} == pytest.approx(expected, abs=1e-12) and (written["n"], written["seed"]) == (18, 4)
    assert "grid: try/score_scenes.png" in result.stdout
    sheet = np.asarray(Image.open(tmp_path / "try/score_scenes.png"))
    assert sheet.shape[1] == 800 and far(in_sheet(sheet, 15, rows=4), images[15]) <= 1


PAINTER = """
import sys
sys.path.insert(0, {root!r})
import torch
import sample, scenes
from train_prx import run_main

def paint(model, encode_text, prompts, seeds, size, **settings):
    pictures = torch.stack([torch.from_numpy(scenes.render(known[prompt], size[0])) for prompt in prompts])
    return pictures.permute(0, 3, 1, 2) / 127.5 - 1

known = {{scenes.caption(scene): scene for scene in scenes.make_scenes(64, 4, "held_out")}}
sample.draw = paint
run_main(sample.main)
"""


def test_a_painter_of_captions_scores_all(tmp_path, trained):
    (tmp_path / "painter.py").write_text(PAINTER.format(root=str(ROOT)))
    flags = ["score", f"--checkpoint={trained}", "--n=64", "--seed=4", "--out=grid.png"]
    result = run(tmp_path, tmp_path / "painter.py", *flags)
    assert result.status == 0 and set(scores(result.stdout).values()) == {"100.0%"}, result
    assert (tmp_path / "grid.png").exists()


def test_the_held_out_loss_is_the_one_of_the_log(tmp_path, tiny):
    folder = train(tmp_path, *tiny, "--warmup=1", "--max_steps=4", "--precision=fp32")  # as sample.py computes on a CPU
    logged = [line["held_out"] for line in metrics(folder) if "held_out" in line]
    result = run(tmp_path, "sample.py", "score", f"--checkpoint={folder}", "--metric=held_out", "--n=64")
    assert result.status == 0, result
    written = json.loads((folder / "score_held_out.json").read_text())
    assert abs(written["held_out"] - logged[-1]) <= 1e-6 * logged[-1] and written["error"]["held_out"] > 0


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import metrics, train_prx
score = metrics.Scorer.__call__

def slow(scorer, draw):
    time.sleep(1.5)
    return score(scorer, draw)

metrics.Scorer.__call__ = slow
train_prx.run_main(train_prx.main)
"""


@pytest.mark.slow
def test_scoring_is_off_the_training_clock(tmp_path, tiny):
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    result = run(tmp_path, tmp_path / "slow.py", *tiny, "--max_steps=6", "--score=scenes", "--score_every=3", "--score_n=2")
    assert result.status == 0, result
    seconds = {line["step"]: line["seconds"] for line in metrics(tmp_path / "runs/demo") if "loss" in line}
    assert seconds[6] - seconds[3] < 1


@pytest.mark.slow
def test_a_run_scores_itself_as_sample_does(tmp_path, tiny):
    flags = [*tiny, "--warmup=1", "--max_steps=6", "--precision=fp32", "--score=scenes", "--score_every=3", "--score_n=9"]
    folder = train(tmp_path, *flags)
    lines = [line for line in metrics(folder) if "scenes_exact" in line]
    assert [line["step"] for line in lines] == [3, 6] and lines[-1].keys() >= {"scenes_objects", "scenes_objects_error"}
    result = run(tmp_path, "sample.py", "score", f"--checkpoint={folder}", "--n=9")
    assert result.status == 0, result
    written = json.loads((folder / "score_scenes.json").read_text())
    assert {name: lines[-1][f"scenes_{name}"] for name in ("background", "place", "exact")} == {
        name: written[name] for name in ("background", "place", "exact")}
    assert curve(folder) == curve(train(tmp_path, *flags[:-3], "--name=unscored")), "scoring changes no step"
    many = train(tmp_path, *flags, "--name=many", ranks=2)
    assert [line["scenes_background"] for line in metrics(many) if "scenes_exact" in line] == [line["scenes_background"] for line in lines]


@pytest.mark.slow
def test_distances_are_scored_in_training_on_ranks_and_at_each_stages_size(tmp_path, tiny, networks):
    flags = [*tiny, "--stages=32:2:16:1,64:2:16:0", "--precision=fp32", f"--score=mmd:{networks}/dinov2,fdd:{networks}/dinov2"]
    one, two = train(tmp_path, *flags), train(tmp_path, *flags, "--name=two", ranks=2)
    scores = [[(line["step"], line["mmd"], line["fdd"]) for line in metrics(folder) if "mmd" in line] for folder in (one, two)]
    assert [step for step, *_ in scores[0]] == [2, 4]
    assert [x for line in scores[0] for x in line] == pytest.approx([x for line in scores[1] for x in line], rel=1e-3)
    result = run(tmp_path, "sample.py", "score", f"--checkpoint={one}", f"--metric=mmd:{networks}/dinov2", "--batch=5")
    assert result.status == 0, result
    written = json.loads((one / "score_mmd.json").read_text())
    assert written["mmd"] == pytest.approx(scores[0][-1][1], rel=1e-4)
    assert written["n"] < 10 and str(networks / "dinov2") in written["network"], "as many as are held out, by what network"


def test_curves_are_drawn_at_the_end_of_a_run_and_on_demand(tmp_path, trained):
    with Image.open(trained / "curves.png") as picture:
        assert min(picture.size) > 200
    result = run(tmp_path, "sample.py", "curves", f"--runs={trained},{trained}/metrics.jsonl", "--out=both.png")
    assert result.status == 0 and (tmp_path / "both.png").exists(), result
    assert "nowhere" in run(tmp_path, "sample.py", "curves", "--runs=nowhere").error()


# ---------------------------------------------------------------------------------------------------------------------
# A user's mistakes


MISTAKES = {  # flags after --checkpoint=RUN -> what the one line must say
    "no prompt": ([], ["--prompt=", "--prompts=FILE"]),
    "an empty file of prompts": (["--prompts=empty.txt"], ["--prompts=empty.txt has no prompt"]),
    "no file of prompts": (["--prompts=nothing.txt"], ["cannot read --prompts=nothing.txt"]),
    "a size beside the patch": (["--prompt=x", "--size=32x60"], ["--size=32x60", "multiples of the patch, 8"]),
    "no size": (["--prompt=x", "--size=big"], ["'big' is not a size"]),
    "no such guidance": (["--prompt=x", "--guidance=most"], ["--guidance", "'self'"]),
    "unknown flag": (["--promt=x"], ["--promt", "did you mean --prompt"]),
    "a number of none": (["--prompt=x", "--n=0"], ["--n", "'0' is not a whole number of at least 1"]),
    "a share of all": (["--prompt=x", "--drop=1"], ["--drop", "'1' is not a number in [0, 1)"]),
    "no checkpoint": (["--prompt=x", "--checkpoint=runs/none"], ["no checkpoint at runs/none"]),
    "a folder without one": (["--prompt=x", "--checkpoint=."], ["no checkpoint at ."]),
    "no GPU": (["--prompt=x", "--device=cuda"], ["cuda"]),
    "an interval beyond time": (["--prompt=x", "--interval=0.5:2"], ["--interval", "'0.5:2' is not an interval"]),
    "a seed that is none": (["--prompt=x", "--seeds=1,x"], ["--seeds", "'x' is not a whole number"]),
    "an ending that is no PNG": (["--prompt=x", "--out=out.jpg"], ["out.jpg", ".png"]),
    "a sweep of many": (["--prompt=x", "--n=2", "--sweep"], ["--sweep", "one prompt"]),
    "a picture of another program": (["--like=foreign.png"], ["foreign.png was not drawn by sample.py"]),
    "no picture": (["--like=empty.txt"], ["cannot read --like=empty.txt"]),
    "no tokens left": (["--prompt=x", "--guidance=self", "--drop=0.97"], ["--drop=0.97 leaves none of the 16 tokens"]),
    "bytes that are no text": (["--prompt=\udcff"], ["not UTF-8"]),
    "a seed twice": (["--prompt=x", "--seeds=3,3"], ["'3,3' has a seed twice"]),
    "steps without end": (["--prompt=x", "--steps=99999999999999999999"], ["below 10 million"]),
    "a name without end": (["--prompt=x", "--checkpoint=" + "x" * 5000], ["too long"]),
    "a picture whose prompts are a number": (["--like=number.png"], ["number.png is damaged"]),
    "a picture by another checkpoint": (["--like=other.png"], ["other.png", "sha256 1234567890ab"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line(tmp_path, trained, name):
    flags, words = MISTAKES[name]
    (tmp_path / "empty.txt").write_text("\n  \n")
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    other = PngInfo()
    for key, value in {"prompt": "x", "seed": "0", "size": "32x32", "steps": "2", "guidance": "cfg", "checkpoint": "1234567890abc"}.items():
        other.add_text(key, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=other)
    other.add_text("prompts", "5")
    Image.new("RGB", (8, 8)).save(tmp_path / "number.png", pnginfo=other)
    message = run(tmp_path, "sample.py", f"--checkpoint={trained}", "--out=out.png", *flags).error()
    assert all(word in message for word in words), message
    assert not (tmp_path / "out.png").exists()


def test_an_unknown_command_is_named(tmp_path):
    assert "unknown command scor" in run(tmp_path, "sample.py", "scor").error()


def damaged(trained: Path, change) -> tuple[dict, dict]:
    """The tensors and metadata of a run's file after `change(tensors, config)`."""
    tensors = load_file(trained / "ema.safetensors")
    with safe_open(trained / "ema.safetensors", framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    change(tensors, config)
    return tensors, metadata | {"config": json.dumps(config)}


OTHERS = {  # a well-formed file that is not what its config says -> what the one line must say
    "a tensor of another shape": (lambda tensors, config: tensors.update({"txt_in.bias": torch.zeros(33)}),
                                  ["txt_in.bias", "(33,)", "(32,)"]),
    "a tensor too few": (lambda tensors, config: tensors.pop("blocks.2.k_norm.scale"), ["blocks.2.k_norm.scale", "(16,)"]),
    "a tensor too many": (lambda tensors, config: tensors.update({"blocks.4.k_norm.scale": torch.zeros(16)}),
                          ["blocks.4.k_norm.scale", "(16,)"]),
    "a config of another width": (lambda tensors, config: config.update(width=64), ["(64,"]),
    "numbers that are none": (lambda tensors, config: tensors["txt_in.bias"].fill_(torch.nan), ["txt_in.bias", "not finite"]),
    "a scale that is no number": (lambda tensors, config: config.update(scale=float("nan")), ["--scale=nan"]),
    "words for a number": (lambda tensors, config: config.update(sample_steps="9"), ["sample_steps '9'", "no int"]),
    "a stage of words": (lambda tensors, config: config["stages"][0].update(image_size="32"), ["image_size '32'"]),
    "no stage": (lambda tensors, config: config.update(stages=[]), ["there is none"]),
    "guidance of another kind": (lambda tensors, config: config.update(guidance="evil"), ["--guidance=evil"]),
    "blocks without end": (lambda tensors, config: config.update(depth=10**9), ["1000000000 blocks"]),
    "text without end": (lambda tensors, config: config.update(text_dim=10**12), ["txt_in"]),
    "a config of the future": (lambda tensors, config: config.update(experts=8), ["experts"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_model_is_refused(tmp_path, trained, name):
    change, words = OTHERS[name]
    tensors, metadata = damaged(trained, change)
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(UserError) as refusal:
        load_checkpoint(tmp_path / "other.safetensors")
    assert all(word in str(refusal.value) for word in [*words, "other.safetensors"]), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_is_refused_and_never_a_traceback(tmp_path, trained):
    data = (trained / "ema.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    file = tmp_path / "ema.safetensors"
    spared = data.index(b"builtin")  # any other word there may be the name of a text encoder
    rng = np.random.default_rng(0)
    places = rng.permutation([i for i in range(8, header) if not spared <= i < spared + 7])
    dtype = data.index(b'"F32"') + 1
    refused = 0
    for kind in ["empty", "cut in the header", "cut in the tensors", "no length", "integers", *places[:300]]:
        mangled = bytearray(data)
        if not isinstance(kind, str):  # one byte of the header becomes another
            mangled[kind] ^= rng.integers(1, 128)
        elif kind == "integers":
            mangled[dtype] = ord("I")
        elif kind == "no length":
            mangled[:8] = b"\xff" * 8
        else:
            del mangled[{"empty": 0, "cut in the header": header // 2, "cut in the tensors": len(data) - 1000}[kind]:]
        file.write_bytes(mangled)
        try:
            load_checkpoint(file)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error), (kind, error)
        else:
            assert not isinstance(kind, str), kind
    assert refused > 150
