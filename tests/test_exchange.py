"""tools/exchange.py: exports that diffusers opens and computes alike, with a card; imports of diffusers folders and
PRX's own names, exported again identical; runs that start from others' weights; what is refused, with one line.

    pytest tests/test_exchange.py
"""
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint_tensors, curve, different, enliven, need_diffusers, run, train
from PIL import Image
from safetensors.torch import load_file, save_file

from sample import load_checkpoint, read_weights
from tools.exchange import import_weights, read_transformer
from train_prx import UserError, draw, shift_t

pytestmark = pytest.mark.parity

PROMPT = "a large red circle in the top left, on a gray background"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX, CONFIG = f"{WEIGHTS}.index.json", "transformer/config.json"
NAME = "blocks.1.attention.to_out.0.weight"


@pytest.fixture(scope="module")
def lively(tmp_path_factory, tiny) -> Path:
    """A run's folder with the built-in text encoder, its weights made lively."""
    return enliven(train(tmp_path_factory.mktemp("builtin"), *tiny, "--warmup=1", "--max_steps=2"))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory, tiny, networks) -> Path:
    """The export of a run with a T5Gemma as text encoder; beside it is `lively`, what was exported."""
    flags = [f"--text_encoder={networks}/t5gemma", "--text_dim=24", "--max_steps=1"]
    folder = enliven(train(tmp_path_factory.mktemp("gemma"), *tiny, *flags)).parent
    exchange(folder, "export", "--checkpoint=lively", "--out=there")
    return folder / "there"


def exchange(cwd: Path, *flags: str) -> str:
    """Run tools/exchange.py, which must succeed without a warning; what it printed."""
    if flags[0] == "export":
        need_diffusers()
    result = run(cwd, "tools/exchange.py", *flags)
    assert result.status == 0 and result.ours() == [], result
    return result.stdout


def drawn(cwd: Path, checkpoint: str | Path, *flags: str) -> np.ndarray:
    """The picture that sample.py draws, [H, W, 3]."""
    result = run(cwd, "sample.py", f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", "--out=drawn.png", *flags)
    assert result.status == 0, result
    return np.asarray(Image.open(cwd / "drawn.png"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def merge(file: Path, **values) -> None:
    """Change values of a JSON file; None takes one out."""
    values = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def tensors(change) -> Callable[[Path], object]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


# ---------------------------------------------------------------------------------------------------------------------
# Export


def test_an_exported_transformer_computes_and_imported_again_draws_what_ours_does(tmp_path, lively):
    need_diffusers()
    from diffusers import PRXTransformer2DModel

    assert "no built-in text encoder" in exchange(tmp_path, "export", f"--checkpoint={lively}", "--out=there")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["README.md", "transformer"]
    theirs = PRXTransformer2DModel.from_pretrained(tmp_path / "there/transformer").eval()
    ours, cfg, encode_text = load_checkpoint(lively)
    txt, txt_mask = encode_text([PROMPT, "a small blue square in the bottom right"])
    torch.manual_seed(0)
    x_t, t = torch.randn(2, 3, 32, 48), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected, _ = ours(x_t, t, txt, txt_mask)
        found = theirs(hidden_states=x_t, timestep=t, encoder_hidden_states=txt, attention_mask=txt_mask).sample
    assert (found - expected).norm() <= 1e-5 * expected.norm() and expected.std() > 0.05

    before = files_of(tmp_path / "there")
    message = run(tmp_path, "tools/exchange.py", "export", f"--checkpoint={lively}", "--out=there").error()
    assert "there exists and is never overwritten" in message and files_of(tmp_path / "there") == before

    flags = ["--text_encoder=builtin", "--text_tokens=24", "--size=32"]
    exchange(tmp_path, "import", "--from=there", "--out=here", *flags)
    flags = ["--steps=2", "--guidance=cfg", "--scale=2", "--seed=3"]
    assert np.array_equal(drawn(tmp_path, lively, *flags), drawn(tmp_path, "here", *flags))


def test_an_export_of_the_former_layout_is_imported(tmp_path, lively):
    state, _ = read_weights(lively)
    for ours, theirs in (("img_qkv_proj", "attention.img_qkv_proj"), ("txt_kv_proj", "attention.txt_kv_proj"),
                         ("attn_out", "attention.to_out.0"), ("qk_norm.query_norm.scale", "attention.norm_q.weight"),
                         ("qk_norm.key_norm.scale", "attention.norm_k.weight"),
                         (".k_norm.scale", ".attention.norm_added_k.weight")):
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    (tmp_path / "former/transformer").mkdir(parents=True)
    save_file(state, tmp_path / "former" / WEIGHTS)
    (tmp_path / "former" / CONFIG).write_text(json.dumps({  # as the former sample.py had it written
        "_class_name": "PRXTransformer2DModel", "_diffusers_version": "0.42.1", "axes_dim": [8, 8], "depth": 3,
        "bottleneck_size": 16, "context_in_dim": 32, "hidden_size": 32, "in_channels": 3, "mlp_ratio": 3.5,
        "num_heads": 2, "patch_size": 8, "resolution_embeds": False, "theta": 10000.0, "time_factor": 1000.0,
        "time_max_period": 10000}))
    flags = ["--text_encoder=builtin", "--text_tokens=24", "--size=32"]
    exchange(tmp_path, "import", "--from=former", "--out=here", *flags)
    assert not different(read_weights(lively)[0], read_weights(tmp_path / "here")[0])


@pytest.mark.parametrize("size", [(32, 48), (40, 32)])
def test_an_exported_pipeline_draws_what_we_draw(tmp_path, pipeline_folder, size):
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline

    pipeline = PRXPixelPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=3, use_resolution_binning=False).images[0]
    assert picture.size == (32, 32), "without a size, that of the run's last stage"
    assert (pipeline.config.noise_scale, pipeline.scheduler.config.shift) == (1.0, 3.0)
    # The same noise on the same grid. Its scheduler ends elsewhere; so shift 1, and timesteps that are already shifted.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    grid = (1000 * shift_t(torch.linspace(1, 0, 5), 3.0))[:-1].tolist()
    noise = torch.randn(3, *size, generator=torch.Generator().manual_seed(7))[None]
    found = pipeline(PROMPT, timesteps=grid, height=size[0], width=size[1], guidance_scale=2.5, latents=noise,
                     output_type="pt", use_resolution_binning=False).images.float().clamp(-1, 1)
    model, cfg, encode_text = load_checkpoint(pipeline_folder.with_name("lively"))
    settings = dict(steps=4, guidance="cfg", scale=2.5, drop=0.5, shift=3.0)
    expected = draw(model, encode_text, [PROMPT], [7], size, **settings)
    assert (found - expected).abs().max() <= 1e-4 and expected.std() > 0.02  # measured 1.7e-5

    flags = ["--seed=7", f"--size={size[0]}x{size[1]}", "--steps=4", "--guidance=cfg", "--scale=2.5"]
    ours = drawn(tmp_path, pipeline_folder.with_name("lively"), *flags)
    theirs = ((found[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 1


def test_the_card_tells_recipe_data_licences_scores_and_log(tmp_path, tiny):
    need_diffusers()
    folder, data = train(tmp_path, *tiny, "--max_steps=2"), Path(tiny[-1].removeprefix("--data="))
    score = {
        "metric": "scenes", "step": 2, "seconds": None, "values": {"objects": 0.5, "exact": 0.25}, "n": 5, "seed": 0,
        "errors": {"objects": 0.125, "exact": 0.0625}, "guidance": "cfg", "scale": 2.0, "steps": 1, "network": "",
        "data": "demo", "weights": hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()}
    earlier = score | {"values": {"objects": 0.375}, "errors": {"objects": 0.1}}
    others = score | {"values": {"objects": 0.875}, "errors": {"objects": 0.1}, "weights": "0" * 64}
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, (earlier, score, others))))
    exchange(tmp_path, "export", f"--checkpoint={folder}", "--out=there")
    card = (tmp_path / "there/README.md").read_text()
    head, body = card.split("---\n", 2)[1:]
    assert {"library_name: diffusers", "pipeline_tag: text-to-image", "license: mit"} <= set(head.splitlines())
    manifest = hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()
    for words in ("width 32, depth 3, 2 heads, patch 8 by 16", "MIT", "![samples](samples.png)",
                  "20 steps of 16 images at 32px; these weights are of step 2",
                  f"scenes, manifest sha256 `{manifest}`: 300 rows of scenes:demo",
                  "| objects | 0.5000 | 0.1250 | 5 pictures, seed 0, guidance cfg 2, 1 steps |", "| exact | 0.2500 |",
                  f"| log | sha256 `{hashlib.sha256((folder / 'log.txt').read_bytes()).hexdigest()}` |"):
        assert words in body, words
    assert "0.3750" not in card and "0.8750" not in card, "of two scores the later, and none of other weights"
    assert str(tmp_path) not in card and str(data) not in card, "paths of a machine are nobody's business"
    last = sorted((folder / "samples").glob("*.png"))[-1]
    assert (tmp_path / "there/samples.png").read_bytes() == last.read_bytes()

    (folder / "scores.jsonl").write_text('{"weights": 1}\n[]')
    again = run(tmp_path, "tools/exchange.py", "export", f"--checkpoint={folder}", "--out=again")
    assert "scores.jsonl is damaged" in again.error()


# ---------------------------------------------------------------------------------------------------------------------
# Import


@pytest.mark.parametrize("kind", ["as we export", "as diffusers saves, in bf16 and parts", "links of the hub's cache"])
def test_an_imported_pipeline_is_exported_again_identical(tmp_path, pipeline_folder, kind):
    folder = pipeline_folder
    if "parts" in kind:
        from diffusers import PRXPixelPipeline

        folder = tmp_path / "half"
        pipeline = PRXPixelPipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
        pipeline.save_pretrained(folder)
        shutil.rmtree(folder / "transformer")
        pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
        assert len(list(folder.glob("transformer/*.safetensors"))) > 1
    elif "cache" in kind:
        folder, blobs = tmp_path / "models--me--it/snapshots/0123", tmp_path / "models--me--it/blobs"
        shutil.copytree(pipeline_folder, blobs)
        shutil.copytree(blobs, folder, copy_function=os.symlink)
    exchange(tmp_path, "import", f"--from={folder}", "--out=here")
    exchange(tmp_path, "export", "--checkpoint=here", "--out=again")
    assert files_of(tmp_path / "again") == files_of(folder)
    assert not any(path.is_symlink() for path in (tmp_path / "again").rglob("*"))


@pytest.mark.parametrize("change", ["gone", "other weights", "a home"])
def test_an_import_whose_origin_is_not_what_it_was_is_written_from_its_own_weights(
        tmp_path, pipeline_folder, networks, change):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    exchange(tmp_path, "import", "--from=there", "--out=here", f"--text_encoder={networks}/t5gemma")
    (tmp_path / "there/secret").write_text("for nobody else")
    if change == "gone":
        shutil.rmtree(tmp_path / "there")
    elif change == "other weights":
        tensors(lambda t: t | {"txt_in.bias": torch.ones(32)})(tmp_path / "there")
    else:  # a file from somebody else names a folder of this machine
        state, metadata = read_weights(tmp_path / "here")
        save_file(state, tmp_path / "here/ema.safetensors", metadata=metadata | {"origin": str(tmp_path)})
    exchange(tmp_path, "export", "--checkpoint=here", "--out=again")
    assert not list((tmp_path / "again").rglob("secret")) and "Recipe" in (tmp_path / "again/README.md").read_text()
    old, new = (read_transformer(folder / "transformer")[0] for folder in (pipeline_folder, tmp_path / "again"))
    assert different(old, new) == []


def test_what_no_shape_tells_is_read_from_the_folder_and_said(tmp_path, pipeline_folder):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    merge(tmp_path / "there/transformer/config.json", theta=500)
    merge(tmp_path / "there/model_index.json", noise_scale=None)
    merge(tmp_path / "there/scheduler/scheduler_config.json", shift=2.0)
    flags = exchange(tmp_path, "import", "--from=there", "--out=here").splitlines()[-1].split()
    assert {"--rope_theta=500.0", "--noise_scale=2.0", "--shift=2.0", "--text_tokens=24", "--width=32"} <= set(flags)
    _, cfg, _ = load_checkpoint(tmp_path / "here")
    assert (cfg.rope_theta, cfg.noise_scale, cfg.shift) == (500, 2, 2)


def test_weights_that_drew_latents_keep_all_that_is_not_of_latents(tmp_path):
    need_diffusers()
    from diffusers import PRXTransformer2DModel

    torch.manual_seed(0)
    theirs = PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.7,
                                   num_heads=2, depth=2, axes_dim=[8, 8])
    theirs.save_pretrained(tmp_path / "latent/transformer")
    flags = ["--text_encoder=builtin", "--patch=8", "--bottleneck=12"]
    assert "final_layer.linear start anew" in exchange(tmp_path, "import", "--from=latent", "--out=here", *flags)
    kept, here = read_transformer(tmp_path / "latent/transformer")[0], read_weights(tmp_path / "here")[0]
    anew = {name for name in here if name.startswith(("img_in.", "final_layer.linear."))}
    assert len(anew) == 6 and all(torch.equal(here[name], kept[name]) for name in here.keys() - anew)
    assert here["img_in.0.weight"].shape == (12, 3 * 8 * 8) and here["img_in.0.weight"].std() > 0
    assert not here["final_layer.linear.weight"].any(), "as an untrained model, it draws gray at first"
    _, cfg, _ = load_checkpoint(tmp_path / "here")
    assert (cfg.width, cfg.depth, cfg.heads, cfg.mlp_ratio, cfg.text_dim, cfg.patch) == (32, 2, 2, 2.7, 24, 8)


def test_prxs_own_names_are_read_behind_any_prefix(tmp_path, lively):
    state = read_weights(lively)[0]
    raw = {f"denoiser.{name}": torch.zeros_like(t) for name, t in state.items()}
    averaged = {f"ema_denoiser.model.{name}": t.bfloat16() for name, t in state.items()}
    save_file(raw | averaged, tmp_path / "prx.safetensors")
    exchange(tmp_path, "import", "--from=prx.safetensors", "--out=here", "--text_encoder=builtin", "--size=32")
    expected = {name: t.bfloat16().float() for name, t in state.items()}
    assert different(read_weights(tmp_path / "here")[0], expected) == []


# ---------------------------------------------------------------------------------------------------------------------
# Start


def test_a_run_starts_from_others_weights_and_says_so(tmp_path, tiny, lively):
    flags = [*tiny, "--max_steps=2"]
    fresh = train(tmp_path, *flags, "--name=fresh")
    flags.append("--name=tuned")
    said = exchange(tmp_path, "start", f"--from={lively}", "--out=start", *flags)
    assert said.split() == ["python", "train_prx.py", "--resume=start", *flags]
    assert json.loads((tmp_path / "start/run.json").read_text())["step"] == 0
    weights, saved = read_weights(lively)[0], checkpoint_tensors(tmp_path / "start")
    for part in ("model", "ema"):
        assert different({name: saved[f"{part}.{name}"] for name in weights}, weights) == []
    tuned = train(tmp_path, "--resume=start", *flags)
    log, losses = (tuned / "log.txt").read_text(), curve(tuned)
    assert "continuing from start" in log and losses.keys() == {1, 2} and losses[1] != curve(fresh)[1]
    _, metadata = read_weights(tuned)
    assert (metadata["init"], metadata["step"]) == ("lively", "2") and not read_weights(fresh)[1].get("init")
    exchange(tmp_path, "export", f"--checkpoint={tuned}", "--out=there")
    card = (tmp_path / "there/README.md").read_text()
    assert "license: other" in card and "started from lively, whose licence holds too" in card and "Not scored." in card


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


REFUSED = {  # what is done to a pipeline's folder, and what the one line must say
    "pickled weights": (lambda f: (f / WEIGHTS).rename(f / WEIGHTS.replace("safetensors", "bin")), "safetensors only"),
    "a path that leaves its folder": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}'), "'../x.safetensors' is not in"),
    "an index that is none": (lambda f: (f / INDEX).write_text("[1, 2"), "cannot read"),
    "an index without a map": (lambda f: (f / INDEX).write_text('{"weight_map": 5}'), "has no weight_map"),
    "a link to a folder": (lambda f: (f / "link").symlink_to("/usr"), "is a link that leads out"),
    "a link to a file": (lambda f: (f / "link").symlink_to("/etc/passwd"), "is a link that leads out"),
    "a file cut short": (lambda f: os.truncate(f / WEIGHTS, 20_000), "cannot read"),
    "another class": (lambda f: merge(f / CONFIG, _class_name="FluxTransformer2DModel"), "FluxTransformer2DModel"),
    "resolution embeds": (lambda f: merge(f / CONFIG, resolution_embeds=True), "resolution_embeds is True"),
    "unequal axes": (lambda f: merge(f / CONFIG, axes_dim=[4, 12]), "axes_dim is [4, 12]"),
    "words for theta": (lambda f: merge(f / CONFIG, theta=["x"]), "damaged"),
    "another shape": (tensors(lambda t: t | {NAME: t[NAME][:-1].contiguous()}), "blocks.1.attn_out.weight"),
    "a tensor too few": (tensors(lambda t: {k: t[k] for k in t if k != NAME}), "blocks.1.attn_out.weight"),
    "a block far away": (tensors(lambda t: t | {"blocks.99999999.x": torch.ones(1)}), "one of 4 blocks"),
    "numbers beyond fp32": (tensors(lambda t: {k: t[k].double() * 1e300 for k in t}), "not finite in fp32"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_folder_is_refused_with_one_line(tmp_path, pipeline_folder, kind):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    damage, words = REFUSED[kind]
    damage(tmp_path / "there")
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        import_weights(str(tmp_path / "there"), tmp_path / "here")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "here").exists() and not list(tmp_path.glob(".*partial*"))


def test_what_cannot_be_exchanged_is_answered_with_one_line(tmp_path, lively, pipeline_folder):
    wrong = {"me/nothing": "cannot download me/nothing", "there/is/nothing": "does not exist",
             f"{lively}/ema.safetensors": "of nanoPRX already", lively: "neither a diffusers folder"}
    for source, words in wrong.items():
        assert words in run(tmp_path, "tools/exchange.py", "import", f"--from={source}", "--out=here").error()
    message = run(tmp_path, "sample.py", f"--checkpoint={pipeline_folder}", "--prompt=x").error()
    assert "is of diffusers" in message and "tools/exchange.py import" in message


def test_pickles_are_never_loaded_as_text_encoder_or_teacher(tmp_path, tiny, networks):
    shutil.copytree(networks / "t5gemma", tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled/pytorch_model.bin")
    weights.unlink()
    message = run(tmp_path, "train_prx.py", *tiny, "--text_encoder=pickled", "--text_dim=24").error()
    assert "cannot load pickled" in message
