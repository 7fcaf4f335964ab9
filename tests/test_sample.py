"""sample.py: a checkpoint comes back as it was written, also one of the former layout; a picture depends on its prompt,
seed and settings only and says how it was drawn; and a mistake is answered with one line.

    pytest tests/test_sample.py
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint_tensors, different, enliven, last_checkpoint, run, train
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sample import draw_grid, load_checkpoint, read_weights, to_uint8
from train_prx import UserError, config_to_json, draw

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


def drawn(cwd: Path, folder: Path, *flags: str, out: str = "out.png") -> np.ndarray:
    """Run sample.py; the picture it wrote, [H, W, 3]."""
    result = run(cwd, "sample.py", f"--checkpoint={folder}", f"--out={out}", *flags)
    assert result.status == 0 and result.ours() == [], result
    return np.asarray(Image.open(cwd / out))


def save_text(file: Path, text: dict[str, str], size: tuple[int, int] = (8, 8)) -> None:
    """A blank PNG that says `text` of itself."""
    said = PngInfo()
    for key, value in text.items():
        said.add_text(key, value)
    Image.new("1", size).save(file, pnginfo=said)


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


def test_weights_of_the_former_layout_are_drawn_with(tmp_path, lively):
    weights, metadata = read_weights(lively)
    config = json.loads(metadata["config"])
    del config["snapshot_every"]
    config |= {"score": "scenes", "score_every": 0, "score_n": 256, "keep_every": 20_000, "price": 2.0, "track": "none",
               "frozen": "scene", "init": ""}
    save_file(weights, tmp_path / "ema.safetensors", metadata=metadata | {"config": json.dumps(config)})
    model, cfg, encode_text = load_checkpoint(tmp_path)
    assert different(model.state_dict(), weights) == []
    assert config_to_json(cfg) == json.loads(metadata["config"]) | {"frozen": "pretrained", "snapshot_every": 0}
    settings = dict(steps=2, guidance="cfg", scale=2.0, drop=0.5, shift=3.0)
    expected = to_uint8(draw(model, encode_text, [PROMPT], [3], (32, 32), **settings))[0]
    found = drawn(tmp_path, tmp_path, f"--prompt={PROMPT}", "--seed=3")
    assert far(found, expected) <= 1 and found.std() > 5


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("guidance", ["self", "cfg", "none"])
def test_a_picture_is_the_same_alone_and_among_others(tmp_path, lively, guidance):
    (tmp_path / "prompts.txt").write_text(f"\n{PROMPT}\n\n  {OTHER}  \n")
    flags = [f"--guidance={guidance}", "--scale=2", "--steps=3"]
    sheet = drawn(tmp_path, lively, "--prompts=prompts.txt", "--n=3", "--seed=3", "--batch=4", *flags)
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
    refused = run(tmp_path, "sample.py", f"--checkpoint={lively}", *base, "--drop=0").error()
    assert "without routing, pass --drop=0 and --guidance=cfg or none" in refused


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_picture(tmp_path, lively):
    flags = [f"--prompt={PROMPT}", "--steps=2", "--guidance=cfg", "--scale=2"]
    assert far(drawn(tmp_path, lively, *flags, "--compile=1"), drawn(tmp_path, lively, *flags)) <= 1


def test_a_picture_says_how_it_was_drawn_and_that_draws_it_again(tmp_path, lively):
    drawn(tmp_path, lively, f"--prompt={PROMPT} é", "--seed=7", "--steps=4", "--guidance=self", "--scale=1.5",
          "--drop=0.25", "--size=32x64", "--interval=0.1:0.9", "--shift=2", out="first.png")
    sha256 = hashlib.sha256((lively / "ema.safetensors").read_bytes()).hexdigest()
    assert Image.open(tmp_path / "first.png").text == {
        "prompt": f"{PROMPT} é", "seed": "7", "size": "32x64", "steps": "4", "guidance": "self", "scale": "1.5",
        "drop": "0.25", "shift": "2.0", "interval": "0.1:0.9", "checkpoint": sha256}
    drawn(tmp_path, lively, "--like=first.png")
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    changed = drawn(tmp_path, lively, "--like=first.png", "--prompt", OTHER, "--seed=8", "--size=48")
    text = Image.open(tmp_path / "out.png").text
    assert changed.shape == (48, 48, 3) and (text["prompt"], text["seed"], text["steps"]) == (OTHER, "8", "4")
    drawn(tmp_path, lively, "--like=first.png", "--n=2")
    assert json.loads(Image.open(tmp_path / "out.png").text["seeds"]) == [7, 8]


def test_sheets_sweeps_and_large_pictures_are_drawn_again_too(tmp_path, lively):
    drawn(tmp_path, lively, f"--prompt={PROMPT}", f"--prompt={OTHER}", "--seeds=9,2", "--seed_step=1", out="sheet.png")
    text = Image.open(tmp_path / "sheet.png").text
    assert json.loads(text["prompts"]) == [PROMPT, OTHER] and json.loads(text["seeds"]) == [9, 2]
    run_own = {"steps": "2", "guidance": "cfg", "scale": "2.0", "drop": "0.5", "interval": "0.0:1.0"}
    assert text.items() >= run_own.items(), "what is not given is the run's own"
    drawn(tmp_path, lively, f"--prompt={PROMPT}", "--sweep=2,4", out="sweep.png")
    for kind in ("sheet", "sweep"):
        drawn(tmp_path, lively, f"--like={kind}.png")
        assert (tmp_path / "out.png").read_bytes() == (tmp_path / f"{kind}.png").read_bytes()
    picture = drawn(tmp_path, lively, f"--prompt={PROMPT}", "--seed=5")
    save_text(tmp_path / "large.png", Image.open(tmp_path / "out.png").text, (20_000, 10_000))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")
    assert far(drawn(tmp_path, lively, "--like=large.png"), picture) == 0


def test_guidance_is_off_outside_its_interval(tmp_path, lively):
    flags = [f"--prompt={PROMPT}", "--steps=3", "--scale=4"]  # at times 1, 0.86 and 0.6
    for guidance in ("self", "cfg"):
        arms = ("none", "0:1"), (guidance, "0:1"), (guidance, "0.5:0.7"), (guidance, "0:0.5")
        plain, full, late, never = (
            drawn(tmp_path, lively, *flags, f"--guidance={kind}", f"--interval={ends}") for kind, ends in arms)
        assert far(never, plain) == 0 and far(late, plain) > 1 and far(late, full) > 1
        assert far(drawn(tmp_path, lively, *flags, f"--guidance={guidance}", "--interval=0.59:1"), full) == 0


def test_a_folder_holds_one_picture_a_prompt_and_seed_whatever_the_processes(tmp_path, lively):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{OTHER}\n")
    flags = [f"--checkpoint={lively}", "--prompts=prompts.txt", "--seeds=5,3,8", "--steps=2", "--guidance=self"]
    for processes in (1, 3):
        result = run(tmp_path, "sample.py", *flags, f"--out=pictures{processes}", ranks=processes)
        assert result.status == 0 and result.stdout.count("of 6 image(s)") == processes, result
        result = run(tmp_path, "sample.py", *flags, f"--out=sheet{processes}.png", "--batch=2", ranks=processes)
        assert result.status == 0 and result.stdout.count("6 of 6 image(s)") == 1, result
    names = sorted(file.name for file in (tmp_path / "pictures1").iterdir())
    assert names == [f"0000{prompt}-{seed}.png" for prompt in (0, 1) for seed in (3, 5, 8)]
    assert names == sorted(file.name for file in (tmp_path / "pictures3").iterdir())
    for name in names:
        pictures = [Image.open(tmp_path / folder / name) for folder in ("pictures1", "pictures3")]
        assert pictures[0].text == pictures[1].text and pictures[0].text["seed"] == name[6:-4]
        assert far(*map(np.asarray, pictures)) <= 1
    assert far(*(np.asarray(Image.open(tmp_path / f"sheet{processes}.png")) for processes in (1, 3))) == 0
    assert "pictures1 exists and is not empty" in run(tmp_path, "sample.py", *flags, "--out=pictures1").error()
    (tmp_path / "pictures4").mkdir()
    (tmp_path / "pictures4/00000-5.png").touch()  # of the first process, which has begun
    assert run(tmp_path, "sample.py", *flags, "--out=pictures4", env={"RANK": "1", "WORLD_SIZE": "2"}).status == 0
    assert "is not empty" in run(tmp_path, "sample.py", *flags, "--out=pictures4").error()


def test_a_sweep_shows_every_kind_of_guidance_at_every_scale(tmp_path, lively):
    sheet = drawn(tmp_path, lively, f"--prompt={PROMPT}", "--seed=3", "--sweep=2,4.5,6")
    title = len(sheet) - 2 * (6 * 32 + 16 + 15)
    assert title > 0 and sheet.shape[1] == 4 * 200
    for i, (kind, scale) in enumerate((kind, scale) for kind in ("self", "cfg") for scale in (None, 2, 4.5, 6)):
        flags = [f"--guidance={kind}", f"--scale={scale}"] if scale else ["--guidance=none"]
        alone = drawn(tmp_path, lively, f"--prompt={PROMPT}", "--seed=3", *flags)
        assert far(alone, in_sheet(sheet[title:], i, rows=2)) <= 1, flags


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
# A user's mistakes


MISTAKES = {  # flags after --checkpoint=RUN -> what the one line must say
    "no prompt": ([], ["--prompt=", "--prompts=FILE"]),
    "an empty file of prompts": (["--prompts=empty.txt"], ["--prompts", "'empty.txt' is not a prompt file"]),
    "a size beside the patch": (["--prompt=x", "--size=32x60"], ["--size=32x60", "multiples of the patch, 8"]),
    "unknown flag": (["--promt=x"], ["--promt", "did you mean --prompt"]),
    "a share of all": (["--prompt=x", "--drop=1"], ["--drop=1.0 must be in [0, 1)"]),
    "no checkpoint": (["--prompt=x", "--checkpoint=runs/none"], ["no checkpoint at runs/none"]),
    "no GPU": (["--prompt=x", "--device=cuda"], ["cuda"]),
    "an interval beyond time": (["--prompt=x", "--interval=0.5:2"], ["--interval", "'0.5:2' is not LOW:HIGH"]),
    "an ending that is no PNG": (["--prompt=x", "--out=out.jpg"], ["out.jpg", ".png"]),
    "a sweep of many": (["--prompt=x", "--n=2", "--sweep"], ["--sweep", "one prompt"]),
    "a picture of another program": (["--like=foreign.png"], ["--like=foreign.png", "not by sample.py"]),
    "no tokens left": (["--prompt=x", "--guidance=self", "--drop=0.97"], ["--drop=0.97 leaves none of the 16 tokens"]),
    "bytes that are no text": (["--prompt=\udcff"], ["not UTF-8"]),
    "a seed twice": (["--prompt=x", "--seeds=3,3"], ["'3,3' is not a list without repeats"]),
    "steps without end": (["--prompt=x", "--steps=99999999999999999999"], ["below 10 million"]),
    "a name without end": (["--prompt=x", "--checkpoint=" + "x" * 5000], ["too long"]),
    "a picture whose prompts are a number": (["--like=number.png"], ["number.png is damaged"]),
    "a picture by another checkpoint": (["--like=other.png"], ["other.png", "sha256 1234567890ab"]),
    "a folder that is a file": (["--prompt=x", "--out=file"], ["cannot write --out=file"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line(tmp_path, trained, name):
    flags, words = MISTAKES[name]
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "file").touch()
    text = {"prompt": "x", "seed": "0", "size": "32x32", "steps": "2", "guidance": "cfg", "checkpoint": "1234567890abc"}
    for file, said in {"foreign": {}, "other": text, "number": text | {"prompts": "5"}}.items():
        save_text(tmp_path / f"{file}.png", said)
    message = run(tmp_path, "sample.py", f"--checkpoint={trained}", "--out=out.png", *flags).error()
    assert all(word in message for word in words), message
    assert not (tmp_path / "out.png").exists()


OTHERS = {  # a well-formed file that is not what its config says -> what the one line must say
    "a tensor of another shape": (lambda t, c: t.update({"txt_in.bias": torch.zeros(33)}), ["txt_in.bias", "(33,)"]),
    "a tensor too few": (lambda t, c: t.pop("blocks.2.k_norm.scale"), ["blocks.2.k_norm.scale", "(16,)"]),
    "a tensor too many": (lambda t, c: t.update({"blocks.4.k_norm.scale": torch.zeros(16)}), ["blocks.4.k_norm.scale"]),
    "a config of another width": (lambda t, c: c.update(width=64), ["(64,"]),
    "numbers that are none": (lambda t, c: t["txt_in.bias"].fill_(torch.nan), ["txt_in.bias", "not finite"]),
    "a scale that is no number": (lambda t, c: c.update(scale=float("nan")), ["--scale=nan"]),
    "words for a number": (lambda t, c: c.update(sample_steps="9"), ["sample_steps '9'", "no int"]),
    "a stage of words": (lambda t, c: c["stages"][0].update(image_size="32"), ["image_size '32'"]),
    "no stage": (lambda t, c: c.update(stages=[]), ["no stage"]),
    "guidance of another kind": (lambda t, c: c.update(guidance="evil"), ["guidance 'evil'"]),
    "blocks without end": (lambda t, c: c.update(depth=10**9), ["1000000000 blocks"]),
    "text without end": (lambda t, c: c.update(text_dim=10**12), ["txt_in"]),
    "a config of the future": (lambda t, c: c.update(experts=8), ["experts"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_model_is_refused(tmp_path, trained, name):
    change, words = OTHERS[name]
    tensors, metadata = read_weights(trained)
    config = json.loads(metadata["config"])
    change(tensors, config)
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata | {"config": json.dumps(config)})
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
