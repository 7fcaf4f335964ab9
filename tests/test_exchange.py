"""Weights that travel: exports that diffusers opens and computes alike, with a card; imports of diffusers folders and of PRX's
own names, exported again identical; runs that start from either; and files that are refused, with one line.

    pytest tests/test_exchange.py
"""
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, enliven, need_diffusers, run, train
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sample import load_checkpoint
from train_prx import draw, shift_t
from weights import model_flags, read_transformer, read_weights

pytestmark = pytest.mark.parity

PROMPT = "a large red circle in the top left, on a gray background"
OTHER = "a small blue square in the bottom right"


@pytest.fixture(scope="module")
def lively(tmp_path_factory, tiny) -> Path:
    """A run's folder with the built-in text encoder, its weights made lively."""
    return enliven(train(tmp_path_factory.mktemp("builtin"), *tiny, "--warmup=1", "--max_steps=2"))


@pytest.fixture(scope="module")
def with_gemma(tmp_path_factory, tiny, networks) -> Path:
    """A run's folder with a T5Gemma as text encoder, in bf16 as the record run has it."""
    return enliven(train(tmp_path_factory.mktemp("gemma"), *tiny, f"--text_encoder={networks}/t5gemma", "--text_dim=24",
                         "--max_steps=1"))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory, with_gemma) -> Path:
    """Its export."""
    return sampled(tmp_path_factory.mktemp("exported"), "export", f"--checkpoint={with_gemma}", "--out=there") / "there"


def sampled(cwd: Path, *flags: str) -> Path:
    """Run a command of sample.py, which must succeed without a warning; returns `cwd`."""
    if flags[0] == "export":
        need_diffusers()
    result = run(cwd, "sample.py", *flags)
    assert result.status == 0 and result.ours() == [], result
    return cwd


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Export


def test_an_exported_transformer_computes_what_ours_does(tmp_path, lively):
    need_diffusers()
    from diffusers import PRXTransformer2DModel

    result = run(tmp_path, "sample.py", "export", f"--checkpoint={lively}", "--out=there")
    assert result.status == 0 and "no built-in text encoder" in result.stdout, result
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["README.md", "transformer"]
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


@pytest.mark.parametrize("size", [(32, 48), (40, 32)])
def test_an_exported_pipeline_draws_what_we_draw(with_gemma, pipeline_folder, size):
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline

    pipeline = PRXPixelPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    # The same noise on the same grid. Its scheduler ends elsewhere; so shift 1, and timesteps that are already shifted.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    grid = (1000 * shift_t(torch.linspace(1, 0, 5), 3.0))[:-1].tolist()
    noise = torch.randn(3, *size, generator=torch.Generator().manual_seed(7))[None]
    found = pipeline(PROMPT, timesteps=grid, height=size[0], width=size[1], guidance_scale=2.5, latents=noise, output_type="pt",
                     use_resolution_binning=False).images
    model, cfg, encode_text = load_checkpoint(with_gemma)
    expected = draw(model, encode_text, [PROMPT], [7], size, steps=4, guidance="cfg", scale=2.5, drop=0.5, shift=3.0)
    assert (found.float().clamp(-1, 1) - expected).abs().max() <= 1e-4 and expected.std() > 0.02  # measured 1.7e-5

    sampled(pipeline_folder.parent, f"--checkpoint={with_gemma}", f"--prompt={PROMPT}", "--seed=7", f"--size={size[0]}x{size[1]}",
            "--steps=4", "--guidance=cfg", "--scale=2.5", "--out=ours.png")
    theirs = ((found[0].float().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(pipeline_folder.parent / "ours.png")) - theirs).max() <= 1


def test_an_exported_pipeline_says_what_it_needs(pipeline_folder):
    from diffusers import PRXPixelPipeline

    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == "PRXPixelPipeline" and index["noise_scale"] == 1.0
    assert json.loads((pipeline_folder / "scheduler/scheduler_config.json").read_text())["shift"] == 3.0
    pipeline = PRXPixelPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, num_inference_steps=3, use_resolution_binning=False).images[0]
    assert picture.size == (32, 32), "without a size, that of the run's last stage"


def test_the_card_tells_recipe_data_licences_scores_and_log(tmp_path, tiny):
    need_diffusers()
    folder = train(tmp_path, *tiny, "--max_steps=2")
    sampled(tmp_path, "score", f"--checkpoint={folder}", "--n=5", "--steps=1")
    sampled(tmp_path, "export", f"--checkpoint={folder}", "--out=there")
    card = (tmp_path / "there/README.md").read_text()
    head, body = card.split("---\n", 2)[1:]
    assert "library_name: diffusers" in head and "pipeline_tag: text-to-image" in head and "license: mit" in head
    scores = json.loads((folder / "score_scenes.json").read_text())
    manifest = (Path(tiny[-1].removeprefix("--data=")) / "manifest.json").read_bytes()
    for words in ("width 32, depth 3, 2 heads, patch 8 through 16", "20 steps of 16 images at 32px; these weights are of step 2",
                  f"scenes, manifest sha256 `{hashlib.sha256(manifest).hexdigest()}`: 300 rows of scenes:demo", "MIT",
                  f"| background | {scores['background']:.4f} | {scores['error']['background']:.4f} | 5 pictures, seed 0",
                  f"log sha256 `{hashlib.sha256((folder / 'log.txt').read_bytes()).hexdigest()}`", "![samples](samples.png)"):
        assert words in body, words
    assert str(tmp_path) not in card and str(tiny[-1].removeprefix("--data=")) not in card, "paths of a machine are nobody's business"
    last = sorted((folder / "samples").glob("*.png"))[-1]
    assert (tmp_path / "there/samples.png").read_bytes() == last.read_bytes()
    train(tmp_path, *tiny, "--max_steps=3")  # goes on: the score is of older weights now
    sampled(tmp_path, "export", f"--checkpoint={folder}", "--out=later")
    assert "Not scored." in (tmp_path / "later/README.md").read_text()
    tuned = train(tmp_path, *tiny, "--max_steps=1", f"--init={folder}", "--name=tuned")
    sampled(tmp_path, "export", f"--checkpoint={tuned}", "--out=tuned")
    card = (tmp_path / "tuned/README.md").read_text()
    assert "license: other" in card and "started from demo, whose licence holds too" in card


# ---------------------------------------------------------------------------------------------------------------------
# Import


def test_an_imported_pipeline_is_exported_again_identical_and_draws_alike(tmp_path, with_gemma, pipeline_folder):
    sampled(tmp_path, "import", f"--from={pipeline_folder}", "--out=here")
    sampled(tmp_path, "export", "--checkpoint=here", "--out=again")
    assert files_of(tmp_path / "again") == files_of(pipeline_folder)
    ours, here = read_weights(with_gemma)[0], read_weights(tmp_path / "here")[0]
    assert ours.keys() == here.keys() and all(torch.equal(ours[name], here[name]) for name in ours)
    assert read_weights(pipeline_folder)[0].keys() == ours.keys()
    flags = [f"--prompt={PROMPT}", "--steps=2", "--guidance=cfg", "--scale=2", "--seed=3"]
    for name, folder in (("a", with_gemma), ("b", "here")):
        sampled(tmp_path, f"--checkpoint={folder}", f"--out={name}.png", *flags)
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"))


def test_a_bf16_pipeline_in_several_files_made_by_diffusers_is_exported_again_identical(tmp_path, pipeline_folder):
    from diffusers import PRXPixelPipeline

    pipeline = PRXPixelPipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "half")
    shutil.rmtree(tmp_path / "half/transformer")
    pipeline.transformer.save_pretrained(tmp_path / "half/transformer", max_shard_size="50KB")
    assert len(list(tmp_path.glob("half/transformer/*.safetensors"))) > 1
    sampled(tmp_path, "import", "--from=half", "--out=here")
    sampled(tmp_path, "export", "--checkpoint=here", "--out=again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "half")


@pytest.mark.parametrize("change", ["gone", "other weights"])
def test_an_import_whose_folder_is_not_what_it_was_is_written_from_its_own_weights(tmp_path, pipeline_folder, networks, change):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    sampled(tmp_path, "import", "--from=there", "--out=here", f"--text_encoder={networks}/t5gemma")
    (tmp_path / "there/secret").write_text("for nobody else")
    if change == "gone":
        shutil.rmtree(tmp_path / "there")
    else:
        file = tmp_path / "there/transformer/diffusion_pytorch_model.safetensors"
        save_file(load_file(file) | {"txt_in.bias": torch.ones(32)}, file, metadata={"format": "pt"})
    sampled(tmp_path, "export", "--checkpoint=here", "--out=again")
    assert not (tmp_path / "again/secret").exists() and "Provenance" in (tmp_path / "again/README.md").read_text()
    (old, _), (new, _) = (read_transformer(folder / "transformer") for folder in (pipeline_folder, tmp_path / "again"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_a_file_that_names_a_folder_of_the_machine_gets_nothing_of_it(tmp_path, lively):
    need_diffusers()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text("hf_SeCrEt")
    with safe_open(lively / "ema.safetensors", framework="pt") as file:
        metadata = file.metadata() | {"origin": str(tmp_path / "home")}
    save_file(load_file(lively / "ema.safetensors"), tmp_path / "ema.safetensors", metadata=metadata)
    sampled(tmp_path, "export", "--checkpoint=ema.safetensors", "--out=there")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["README.md", "transformer"]


def test_what_no_shape_tells_is_asked_for_too(tmp_path, tiny, pipeline_folder):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    for file, changes in (("transformer/config.json", {"theta": 500}), ("model_index.json", {"noise_scale": None}),
                          ("scheduler/scheduler_config.json", {"shift": 2.0})):
        values = json.loads((tmp_path / "there" / file).read_text()) | changes
        (tmp_path / "there" / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    result = run(tmp_path, "sample.py", "import", "--from=there", "--out=here")
    assert result.status == 0, result
    flags = result.stdout.splitlines()[-1].split()
    assert {"--rope_theta=500.0", "--noise_scale=2.0", "--shift=2.0", "--text_tokens=24", "--width=32"} <= set(flags), flags
    for init in ("there", "here"):
        message = run(tmp_path, "train_prx.py", *tiny, f"--init={init}", "--text_dim=24").error()
        assert "--rope_theta=500" in message and "--noise_scale=2.0" in message and "--width" not in message
    _, cfg, _ = load_checkpoint(tmp_path / "here")
    assert (cfg.rope_theta, cfg.noise_scale, cfg.shift) == (500, 2, 2)


@pytest.mark.parametrize("file, key", [("model_index.json", "prompt_max_tokens"), ("model_index.json", "default_sample_size"),
                                       ("model_index.json", "noise_scale"), ("scheduler/scheduler_config.json", "shift"),
                                       ("transformer/config.json", "theta")])
def test_a_config_with_words_for_numbers_is_one_line(tmp_path, pipeline_folder, file, key):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    values = json.loads((tmp_path / "there" / file).read_text()) | {key: ["x"]}
    (tmp_path / "there" / file).write_text(json.dumps(values))
    assert "damaged" in run(tmp_path, "sample.py", "import", "--from=there", "--out=here").error()


def test_weights_that_drew_latents_keep_all_that_is_not_of_latents(tmp_path, tiny):
    need_diffusers()
    from diffusers import PRXTransformer2DModel

    torch.manual_seed(0)
    theirs = PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.5, num_heads=2,
                                   depth=2, axes_dim=[8, 8])
    theirs.save_pretrained(tmp_path / "latent/transformer")
    result = run(tmp_path, "sample.py", "import", "--from=latent", "--out=here", "--text_encoder=builtin", "--patch=8",
                 "--bottleneck=12")
    assert result.status == 0 and "img_in and final_layer.linear start anew" in result.stdout, result
    kept, here = read_transformer(tmp_path / "latent/transformer")[0], read_weights(tmp_path / "here")[0]
    same = {name for name in here if name in kept and here[name].shape == kept[name].shape and torch.equal(here[name], kept[name])}
    assert {name for name in here if name not in same} == {
        "img_in.0.weight", "img_in.0.bias", "img_in.1.weight", "img_in.1.bias", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert here["img_in.0.weight"].shape == (12, 3 * 8 * 8) and here["img_in.0.weight"].std() > 0
    assert not here["final_layer.linear.weight"].any(), "as an untrained model, it draws gray at first"
    _, cfg, _ = load_checkpoint(tmp_path / "here")
    assert (cfg.width, cfg.depth, cfg.heads, cfg.mlp_ratio, cfg.text_dim, cfg.patch) == (32, 2, 2, 2.5, 24, 8)
    assert "draws latents" in run(tmp_path, "train_prx.py", *tiny, "--init=latent").error()


def test_prxs_own_names_are_read_behind_any_prefix(tmp_path, lively):
    state = load_file(lively / "ema.safetensors")
    raw = {f"denoiser.{name}": torch.zeros_like(t) for name, t in state.items()}
    save_file(raw | {f"ema_denoiser.model.{name}": t.bfloat16() for name, t in state.items()}, tmp_path / "prx.safetensors")
    sampled(tmp_path, "import", "--from=prx.safetensors", "--out=here", "--text_encoder=builtin", "--size=32")
    here = read_weights(tmp_path / "here")[0]
    assert here.keys() == state.keys() and all(torch.equal(here[name], state[name].bfloat16().float()) for name in here)


# ---------------------------------------------------------------------------------------------------------------------
# Starting from weights


@pytest.fixture(scope="module")
def starts(tmp_path_factory, lively) -> dict[str, Path]:
    """What a run may start from, by what it is: all with the weights of `lively`."""
    folder = tmp_path_factory.mktemp("starts")
    sampled(folder, "export", f"--checkpoint={lively}", "--out=exported")
    sampled(folder, "import", "--from=exported", "--out=imported", "--text_encoder=builtin")
    return {"a run": lively, "a file": lively / "ema.safetensors", "an export": folder / "exported", "an import": folder / "imported"}


@pytest.mark.slow
@pytest.mark.parametrize("kind, ranks", [("a run", 1), ("a file", 2), ("an export", 1), ("an export", 2), ("an import", 1)])
def test_a_run_starts_from_weights_with_a_fresh_optimizer(tmp_path, tiny, lively, starts, kind, ranks):
    init = starts[kind]
    result = run(tmp_path, "train_prx.py", *tiny, f"--init={init}", "--max_steps=1", "--lr=0", "--adam_lr=0", ranks=ranks)
    assert result.status == 0 and f"starting from the weights of {init}, sha256 " in result.stdout, result
    ours, theirs = read_weights(tmp_path / "runs/demo")[0], read_weights(lively)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_start_from_them_again(tmp_path, tiny, lively):
    flags = [*tiny, f"--init={lively}", "--warmup=1", "--precision=fp32"]
    whole = train(tmp_path, *flags, "--max_steps=4", "--name=whole")
    train(tmp_path, *flags, "--max_steps=2")
    halves = train(tmp_path, *flags, "--max_steps=4")
    a, b = (load_file(folder / "ema.safetensors") for folder in (whole, halves))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], t) for name, t in read_weights(lively)[0].items())


@pytest.mark.parametrize("ratio", [1, 2.7, 3.3, 3.5, 4])
def test_the_flags_of_weights_are_those_of_their_model(ratio):
    from train_prx import PRX, Config

    cfg = Config(patch=4, bottleneck=6, width=128, heads=4, depth=2, mlp_ratio=ratio, text_dim=5, repa_weight=0)
    flags = model_flags("here", PRX(cfg).state_dict())
    assert flags == {"patch": 4, "bottleneck": 6, "width": 128, "heads": 4, "depth": 2, "text_dim": 5, "mlp_ratio": ratio}


def test_weights_of_another_model_are_refused_with_the_flags_that_fit(tmp_path, tiny, lively):
    message = run(tmp_path, "train_prx.py", *tiny, f"--init={lively}", "--width=64", "--patch=4").error()
    assert "pass" in message and "--width=32" in message and "--patch=8" in message and "--depth" not in message


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def broken(folder: Path, kind: str) -> None:
    """Do to a pipeline's folder what the name says."""
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    config_file = folder / "transformer/config.json"
    config, tensors = json.loads(config_file.read_text()), load_file(file)
    index = file.with_name(file.name + ".index.json")
    if kind == "pickled weights":
        torch.save(tensors, file.with_name("diffusion_pytorch_model.bin"))
        file.unlink()
    elif kind == "a path that leaves its folder":
        save_file(tensors, folder / "secret.safetensors")
        index.write_text(json.dumps({"weight_map": {"txt_in.weight": "../secret.safetensors"}}))
    elif kind == "a link to a folder":
        (folder.parent / "home").mkdir()
        (folder.parent / "home/token").write_text("hf_SeCrEt")
        (folder / "images").symlink_to(folder.parent / "home")
    elif kind == "a link to a file":
        (folder.parent / "token").write_text("hf_SeCrEt")
        (folder / "notes.txt").symlink_to(folder.parent / "token")
    elif kind == "a link in a circle":
        (folder / "circle").symlink_to(".")
    elif kind == "an absolute path":
        index.write_text(json.dumps({"weight_map": {"txt_in.weight": str(file.resolve())}}))
    elif kind == "an index that is none":
        index.write_text("[1, 2")
    elif kind == "a file cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "another class":
        config_file.write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    elif kind == "resolution embeds":
        config_file.write_text(json.dumps(config | {"resolution_embeds": True}))
    else:
        name = "blocks.1.attention.to_out.0.weight"
        if kind == "a tensor of another shape":
            tensors[name] = tensors[name][:-1].contiguous()
        elif kind == "a tensor too few":
            del tensors[name]
        elif kind == "a block far away":
            tensors["blocks.999999999.up_proj.weight"] = tensors["blocks.0.up_proj.weight"].clone()
        elif kind == "numbers beyond fp32":
            tensors = {name: tensor.double() * 1e300 for name, tensor in tensors.items()}
        else:
            tensors[name][3, 4] = {"an infinite number": torch.inf, "no number": torch.nan}[kind]
        save_file(tensors, file)


REFUSED = {
    "pickled weights": "safetensors only", "a path that leaves its folder": "'../secret.safetensors' is not in its folder",
    "a link to a folder": "is a link that leads out", "a link to a file": "is a link that leads out",
    "a link in a circle": "is a link that leads out", "a block far away": "one of 4 blocks", "numbers beyond fp32": "beyond fp32",
    "an absolute path": "is not in its folder", "an index that is none": "cannot read", "a file cut short": "cannot read",
    "another class": "FluxTransformer2DModel", "resolution embeds": "resolution_embeds is True",
    "a tensor of another shape": "blocks.1.attn_out.weight", "a tensor too few": "blocks.1.attn_out.weight",
    "an infinite number": "blocks.1.attention.to_out.0.weight", "no number": "blocks.1.attention.to_out.0.weight",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_folder_is_refused_with_one_line(tmp_path, tiny, pipeline_folder, kind):
    shutil.copytree(pipeline_folder, tmp_path / "there")
    broken(tmp_path / "there", kind)
    assert REFUSED[kind] in run(tmp_path, "sample.py", "import", "--from=there", "--out=here").error()
    assert not (tmp_path / "here").exists() and not list(tmp_path.glob(".*partial*"))
    result = run(tmp_path, "train_prx.py", *tiny, "--init=there", "--text_dim=24")
    assert REFUSED[kind] in result.error()


def test_a_name_that_is_nowhere_is_answered_with_one_line(tmp_path):
    assert "cannot download me/nothing" in run(tmp_path, "sample.py", "import", "--from=me/nothing", "--out=here").error()
    assert "does not exist" in run(tmp_path, "sample.py", "import", "--from=there/is/nothing", "--out=here").error()


def test_links_of_the_hubs_cache_are_followed(tmp_path, pipeline_folder):
    snapshot, blobs = tmp_path / "models--me--it/snapshots/0123", tmp_path / "models--me--it/blobs"
    blobs.mkdir(parents=True)
    for name, content in files_of(pipeline_folder).items():
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    sampled(tmp_path, "import", f"--from={snapshot}", "--out=here")
    sampled(tmp_path, "export", "--checkpoint=here", "--out=again")
    assert files_of(tmp_path / "again") == files_of(pipeline_folder)
    assert not any(path.is_symlink() for path in (tmp_path / "again").rglob("*"))


@pytest.mark.slow
def test_the_weights_that_a_run_starts_from_may_be_those_it_replaces(tmp_path, tiny):
    train(tmp_path, *tiny, "--max_steps=1", "--name=own")
    before = read_weights(tmp_path / "runs/own")[0]
    result = run(tmp_path, "train_prx.py", *tiny, "--max_steps=1", "--name=own", "--init=runs/own", "--resume=never", "--lr=0",
                 "--adam_lr=0")
    assert result.status == 0, result
    after = read_weights(tmp_path / "runs/own")[0]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "another model" in run(tmp_path, "train_prx.py", *tiny, "--name=new", "--init=runs/own", "--depth=4").error()
    assert not (tmp_path / "runs/new").exists()


def test_the_import_of_a_run_says_what_it_takes(tmp_path, lively):
    message = run(tmp_path, "sample.py", "import", f"--from={lively}/ema.safetensors", "--out=here").error()
    assert "of nanoPRX already" in message and "--init" in message
    assert "neither a diffusers folder" in run(tmp_path, "sample.py", "import", f"--from={lively}", "--out=here").error()


def test_a_diffusers_folder_in_place_of_a_run_is_told_apart(tmp_path, pipeline_folder):
    message = run(tmp_path, "sample.py", f"--checkpoint={pipeline_folder}", "--prompt=x").error()
    assert "is a diffusers folder" in message and "sample.py import" in message


def test_pickles_are_never_loaded_as_text_encoder_or_teacher(tmp_path, tiny, networks):
    shutil.copytree(networks / "t5gemma", tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled/pytorch_model.bin")
    weights.unlink()
    message = run(tmp_path, "train_prx.py", *tiny, "--text_encoder=pickled", "--text_dim=24").error()
    assert "cannot load pickled" in message


# ---------------------------------------------------------------------------------------------------------------------
# Secrets


@pytest.mark.slow
def test_tokens_appear_in_nothing_that_is_written(tmp_path, tiny):
    need_diffusers()
    secrets = {"HF_TOKEN": "hf_SeCrEtSeCrEtSeCrEt", "HUGGING_FACE_HUB_TOKEN": "hf_OtHeRsEcReT", "WANDB_API_KEY": "0123456789abcdefSeCrEt"}
    outputs = [run(tmp_path, script, *flags, env=secrets) for script, flags in (
        ("train_prx.py", [*tiny, "--max_steps=1", "--score=scenes", "--score_n=4"]),
        ("train_prx.py", [*tiny, "--max_steps=1", "--name=gated", "--text_encoder=google/t5gemma-2b-2b-ul2"]),
        ("sample.py", ["--checkpoint=runs/demo", "--prompt=x"]), ("sample.py", ["score", "--checkpoint=runs/demo", "--n=3"]),
        ("sample.py", ["export", "--checkpoint=runs/demo", "--out=there"]),
        ("sample.py", ["import", "--from=there", "--out=here", "--text_encoder=builtin"]),
        ("sample.py", ["import", "--from=me/nothing", "--out=nowhere"]))]
    assert [result.status for result in outputs] == [0, 2, 0, 0, 0, 0, 2], outputs
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    printed = "".join(result.stdout + result.stderr for result in outputs).encode()
    assert len(written) > 100_000
    assert not [name for name, secret in secrets.items() if secret.encode() in written + printed]


# ---------------------------------------------------------------------------------------------------------------------
# Tracking

WANDB = """
import json

class Error(Exception): pass

class Run:
    def log(self, values, step):
        with open("tracked.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\\n")
    def finish(self):
        open("tracked.end", "w").close()

def init(**settings):
    if settings["name"] == "refused":
        raise Error("no API key\\nsecond line")
    with open("tracked.settings", "w") as file:
        json.dump(settings, file, default=str)
    return Run()
"""


@pytest.mark.slow
def test_a_run_is_tracked_when_asked_and_only_then(tmp_path, tiny):
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "train.py").write_text(f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
                                       "import train_prx; train_prx.run_main(train_prx.main)")
    run(tmp_path, tmp_path / "train.py", *tiny, "--max_steps=2", "--name=alone")
    assert not list(tmp_path.glob("tracked*"))
    result = run(tmp_path, tmp_path / "train.py", *tiny, "--max_steps=2", "--track=wandb", ranks=2)
    assert result.status == 0 and (tmp_path / "tracked.end").exists(), result
    assert (tmp_path / "tracked.jsonl").read_text() == (tmp_path / "runs/demo/metrics.jsonl").read_text()
    settings = json.loads((tmp_path / "tracked.settings").read_text())
    assert (settings["project"], settings["name"], settings["config"]["config"]["width"]) == ("nanoprx", "demo", 32)
    message = run(tmp_path, tmp_path / "train.py", *tiny, "--max_steps=2", "--track=wandb", "--name=refused").error()
    assert "--track=wandb: no API key" in message


def test_tracking_without_the_package_is_said_before_anything_runs(tmp_path, tiny):
    (tmp_path / "train.py").write_text(f"import importlib.util, sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                       "find = importlib.util.find_spec\n"
                                       "importlib.util.find_spec = lambda name, *rest: None if name == 'wandb' else find(name, *rest)\n"
                                       "import train_prx; train_prx.run_main(train_prx.main)")
    assert "wandb is not installed" in run(tmp_path, tmp_path / "train.py", *tiny, "--track=wandb").error()
    assert not (tmp_path / "runs").exists()
