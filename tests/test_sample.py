"""sample.py: a checkpoint comes back as it was written, a picture depends on its prompt, seed and settings only, scores
name every attribute, diffusers opens the exports and computes the same, and a mistake is answered with one line.

    pytest tests/test_sample.py
"""
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_tensors, different, last_checkpoint, run, train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import scenes
from sample import load_checkpoint, sample_images
from train_prx import UserError, generate, shift_t

PROMPT = "a large red circle in the top left, on a gray background"
OTHER = "a small white cross in the bottom right, a large blue square in the top left, on a brown background"


def enliven(folder: Path) -> Path:
    """A run's ema.safetensors with random numbers on all weights: prompt, seed, every layer and setting then matter."""
    with safe_open(folder / "ema.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):  # the order in the file is free
        tensors[name] += 0.15 * torch.randn(tensors[name].shape, generator=generator)
    (folder.parent / "lively").mkdir()
    save_file(tensors, folder.parent / "lively/ema.safetensors", metadata=metadata)
    return folder.parent / "lively"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny) -> Path:
    """The folder of a short run."""
    return train(tmp_path_factory.mktemp("trained"), *tiny, "--warmup=1", "--max_steps=4")


@pytest.fixture(scope="module")
def lively(trained) -> Path:
    """A folder with its weights made lively."""
    return enliven(trained)


def draw(cwd: Path, folder: Path, *flags: str) -> np.ndarray:
    """Run sample.py; the picture it wrote, [H, W, 3]."""
    result = run(cwd, "sample.py", f"--checkpoint={folder}", "--out=out.png", *flags)
    assert result.status == 0 and result.stderr == "", result
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
    alone = draw(tmp_path, lively, *flags, f"--prompt={OTHER}", "--seed=5")
    assert alone.shape == (32, 32, 3) and far(alone, fifth) <= 1
    assert all(far(alone, in_sheet(sheet, i, rows=2)) > 3 for i in range(5)), "others have another prompt or seed"
    assert far(alone, draw(tmp_path, lively, *flags, f"--prompt={PROMPT}", "--seed=5")) > 3


def test_guidance_scale_drop_steps_and_shape_change_the_picture(tmp_path, lively):
    base = [f"--prompt={PROMPT}", "--steps=3", "--guidance=self", "--scale=3"]
    pictures = {" ".join(change): draw(tmp_path, lively, *base, *change) for change in (
        [], ["--guidance=cfg"], ["--guidance=none"], ["--scale=2"], ["--drop=0.75"], ["--steps=5"])}
    names = list(pictures)
    assert all(far(pictures[a], pictures[b]) > 1 for i, a in enumerate(names) for b in names[:i])
    plain = pictures["--guidance=none"]
    assert far(draw(tmp_path, lively, *base, "--scale=1"), plain) <= 1, "at scale 1 guidance is none"
    assert far(draw(tmp_path, lively, *base, "--scale=1", "--guidance=cfg"), plain) <= 1
    assert far(draw(tmp_path, lively, *base, "--drop=0"), plain) <= 1, "routing nothing guides to nowhere"


def test_compiled_blocks_draw_the_same_picture(tmp_path, lively):
    flags = [f"--prompt={PROMPT}", "--steps=2", "--guidance=cfg", "--scale=2"]
    assert far(draw(tmp_path, lively, *flags, "--compile=1"), draw(tmp_path, lively, *flags)) <= 1


def test_size_is_height_by_width(tmp_path, lively):
    assert draw(tmp_path, lively, f"--prompt={PROMPT}", "--size=32x64").shape == (32, 64, 3)
    assert draw(tmp_path, lively, f"--prompt={PROMPT}", "--size=48").shape == (48, 48, 3)


def test_a_picture_carries_its_settings(tmp_path, lively):
    draw(tmp_path, lively, f"--prompt={PROMPT}", "--seed=7", "--steps=4", "--guidance=self", "--scale=1.5", "--drop=0.25",
         "--size=32x64")
    text = {name: json.loads(value) for name, value in Image.open(tmp_path / "out.png").text.items()}
    assert text == {"prompts": [PROMPT], "n": 1, "seed": 7, "size": [32, 64], "steps": 4, "guidance": "self", "scale": 1.5,
                    "drop": 0.25, "shift": 3.0,
                    "checkpoint": hashlib.sha256((lively / "ema.safetensors").read_bytes()).hexdigest()}
    draw(tmp_path, lively, f"--prompt={PROMPT}", "--n=2")  # what is not given is the run's own
    text = {name: json.loads(value) for name, value in Image.open(tmp_path / "out.png").text.items()}
    assert (text["steps"], text["guidance"], text["scale"], text["drop"], text["n"]) == (2, "cfg", 2.0, 0.5, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def scores(stdout: str) -> dict[str, str]:
    """The lines "name share%  meaning" of `sample.py score`."""
    return {line.split()[0]: line.split()[1] for line in stdout.splitlines() if line.startswith("  ")}


def test_scores_name_every_attribute_and_show_the_pictures(tmp_path, lively):
    shutil.copytree(lively, tmp_path / "try")
    result = run(tmp_path, "sample.py", "score", "--checkpoint=try", "--metric=scenes", "--n=18", "--seed=4", "--batch=7")
    assert result.status == 0, result
    model, cfg, encode_text = load_checkpoint(lively)
    held_out = scenes.make_scenes(18, 4, "held_out")
    images = sample_images(model, encode_text, [scenes.caption(scene) for scene in held_out], list(range(4, 22)), (32, 32),
                           18, steps=2, guidance="cfg", scale=2.0, drop=0.5, shift=3.0)
    expected = scenes.score_scenes(images, held_out)
    assert {"colour", "place", "size", "shape", "objects", "exact"} <= expected.keys()
    assert scores(result.stdout) == {name: f"{100 * value:.1f}%" for name, value in expected.items()}
    written = json.loads((tmp_path / "try/score_scenes.json").read_text())
    assert {name: written[name] for name in expected} == expected and (written["n"], written["seed"]) == (18, 4)
    assert "grid: try/score_scenes.png" in result.stdout
    sheet = np.asarray(Image.open(tmp_path / "try/score_scenes.png"))
    assert sheet.shape[1] == 800 and far(in_sheet(sheet, 15, rows=4), images[15]) <= 1


PAINTER = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
import sample, scenes
from train_prx import run_main

def paint(model, encode_text, prompts, seeds, size, batch, **settings):
    return np.stack([scenes.render(known[prompt], size[0]) for prompt in prompts])

known = {{scenes.caption(scene): scene for scene in scenes.make_scenes(64, 4, "held_out")}}
sample.sample_images = paint
run_main(sample.main)
"""


def test_a_painter_of_captions_scores_all(tmp_path, trained):
    (tmp_path / "painter.py").write_text(PAINTER.format(root=str(ROOT)))
    flags = ["score", f"--checkpoint={trained}", "--n=64", "--seed=4", "--out=grid.png"]
    result = run(tmp_path, tmp_path / "painter.py", *flags)
    assert result.status == 0 and set(scores(result.stdout).values()) == {"100.0%"}, result
    assert (tmp_path / "grid.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


def test_an_exported_transformer_computes_what_ours_does(tmp_path, lively):
    from diffusers import PRXTransformer2DModel

    result = run(tmp_path, "sample.py", "export", f"--checkpoint={lively}", "--out=there")
    assert result.status == 0 and "no built-in text encoder" in result.stdout, result
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["transformer"]
    theirs = PRXTransformer2DModel.from_pretrained(tmp_path / "there/transformer").eval()
    ours, cfg, encode_text = load_checkpoint(lively)
    txt, txt_mask = encode_text([PROMPT, OTHER])
    torch.manual_seed(0)
    x_t, t = torch.randn(2, 3, 32, 48), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected, _ = ours(x_t, t, txt, txt_mask)
        found = theirs(hidden_states=x_t, timestep=t, encoder_hidden_states=txt, attention_mask=txt_mask).sample
    assert (found - expected).norm() <= 1e-5 * expected.norm() and expected.std() > 0.05

    before = {path: path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()}
    message = run(tmp_path, "sample.py", "export", f"--checkpoint={lively}", "--out=there").error()
    assert "there exists and is never overwritten" in message
    assert {path: path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def with_gemma(tmp_path_factory, tiny, networks) -> Path:
    """A run's folder with a T5Gemma as text encoder, in bf16 as the record run has it."""
    return enliven(train(tmp_path_factory.mktemp("gemma"), *tiny, f"--text_encoder={networks}/t5gemma", "--text_dim=24",
                         "--max_steps=1"))


def test_an_exported_pipeline_draws_what_we_draw(tmp_path, with_gemma):
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline

    result = run(tmp_path, "sample.py", "export", f"--checkpoint={with_gemma}", "--out=there")
    assert result.status == 0 and "PRXPixelPipeline.from_pretrained('there')" in result.stdout, result
    index = json.loads((tmp_path / "there/model_index.json").read_text())
    assert index["_class_name"] == "PRXPixelPipeline" and index["noise_scale"] == 1.0
    assert json.loads((tmp_path / "there/scheduler/scheduler_config.json").read_text())["shift"] == 3.0
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "there")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=3, use_resolution_binning=False).images[0]
    assert picture.size == (32, 32), "without a size, that of the run's last stage"

    # The same noise on the same grid. Its scheduler ends elsewhere; so shift 1, and timesteps that are already shifted.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    grid = (1000 * shift_t(torch.linspace(1, 0, 5), 3.0))[:-1].tolist()
    noise = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(7))[None]
    found = pipeline(PROMPT, timesteps=grid, height=32, width=48, guidance_scale=2.5, latents=noise, output_type="pt",
                     use_resolution_binning=False).images
    model, cfg, encode_text = load_checkpoint(with_gemma)
    encode_text.model = pipeline.text_encoder  # the same weights, in the pipeline's precision
    (txt, txt_mask), (null_txt, null_mask) = encode_text([PROMPT]), encode_text([""])
    expected = generate(model, txt, txt_mask, null_txt=null_txt, null_mask=null_mask, size=(32, 48), steps=4,
                        guidance="cfg", scale=2.5, drop=0.5, seeds=[7], shift=3.0)
    assert (found.float().clamp(-1, 1) - expected).abs().max() <= 1e-4 and expected.std() > 0.02


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
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line(tmp_path, trained, name):
    flags, words = MISTAKES[name]
    (tmp_path / "empty.txt").write_text("\n  \n")
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
