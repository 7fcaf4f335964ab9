"""Weights between people: a run's ema.safetensors, and the folders of diffusers, out and back.

    read_checkpoint(path)             -> (model, cfg, metadata)
    export_diffusers(path, out)       a run as a folder for diffusers.PRXPixelPipeline, with a model card
    import_weights(source, out, ...)  a diffusers folder, or PRX's own names -> a folder as a run's

Nothing is unpickled. A card names files and folders without their paths.
"""
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from shards import UserError, file_sha256, read_manifest
from train_prx import PRESETS, PRX, Config, Stage, check_config, config_from_json, config_to_json, load_text_encoder
from weights import (BUILT_IN, check_shapes, diffusers_transformer, fill, in_fp32, is_diffusers, model_flags, pipeline_fields,
                     read_json, read_safetensors, read_transformer, refuse_links, to_diffusers, weights_file)


def read_checkpoint(path: str | Path) -> tuple[PRX, Config, dict[str, str]]:
    """The averaged weights of a run in fp32 on the CPU, its config, and the file's metadata.

    Raises UserError where the file is not a nanoPRX checkpoint, is damaged, or holds tensors of other names or shapes than
    its config says.
    """
    if is_diffusers(path):
        raise UserError(f"{path} is a diffusers folder: bring it here with `python sample.py import --from={path} --out=DIR`")
    file = weights_file(path)
    state, metadata = read_safetensors(file)
    if metadata.get("format") != "nanoprx":
        raise UserError(f"{file} is not a nanoPRX checkpoint: its metadata has no config")
    if any(t.dtype != torch.float32 for t in state.values()):
        raise UserError(f"{file} is damaged: its tensors are not all fp32")
    try:
        cfg = config_from_json(json.loads(metadata["config"]))
        unrouted = {} if len(cfg.route) else {"drop": 0.0, "guidance": "cfg"}  # an import may have too few blocks to route
        check_config(replace(cfg, name="any", device="auto", frozen="none", score="", track="none", **unrouted))
        if cfg.depth > len(state):  # or building so many would take minutes
            raise UserError(f"its config says {cfg.depth} blocks, and it has {len(state)} tensors")
        with torch.device("meta"):
            model = PRX(cfg)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # a damaged config raises almost anything
        raise UserError(f"{file}: its config is damaged ({type(error).__name__})") from None
    model.repa_projector = None  # stays with the run
    check_shapes(model, state, file)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), cfg, metadata


# ---------------------------------------------------------------------------------------------------------------------
# Export

LICENCES = {  # source of a data set -> what its pictures are under
    "scenes": "procedural pictures, MIT",
    "flux_reason": "pictures by FLUX.1-dev, whose licence restricts training competing models on them",
    "flux_generated": "pictures by FLUX models, whose licences restrict training competing models on them",
    "midjourney": "pictures by Midjourney v6, under the terms of its set's card",
}


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder under another name, which gets its own when it is complete; raises UserError if there is one already."""
    if out.exists():
        raise UserError(f"{out} exists and is never overwritten: name another folder with --out")
    aside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def diffusers_config(cfg: Config) -> dict:
    """The arguments of `PRXTransformer2DModel` for the same network."""
    head_dim = cfg.width // cfg.heads
    return dict(in_channels=3, patch_size=cfg.patch, bottleneck_size=cfg.bottleneck, context_in_dim=cfg.text_dim,
                hidden_size=cfg.width, mlp_ratio=cfg.mlp_ratio, num_heads=cfg.heads, depth=cfg.depth,
                axes_dim=[head_dim // 2, head_dim // 2], theta=cfg.rope_theta, **BUILT_IN)


def export_diffusers(path: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights, with a model card, as a folder for diffusers; raises UserError if `out` exists.

    A run with a hub text encoder becomes a whole `PRXPixelPipeline`; one with the built-in encoder its transformer only,
    since diffusers has no such encoder. What was imported is written as it was, if it is still where it came from.
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
    except ImportError:
        raise UserError("export takes diffusers 0.42 or newer: pip install diffusers ftfy") from None
    out, file = Path(out), weights_file(path)
    model, cfg, metadata = read_checkpoint(path)
    state, origin = model.state_dict(), Path(metadata.get("origin", ""))
    builtin = cfg.text_encoder == "builtin"
    with new_folder(out) as aside:
        if "origin" in metadata and holds(origin, state):
            shutil.copytree(origin, aside, dirs_exist_ok=True)
            builtin = not (origin / "text_encoder").is_dir()
        else:
            transformer = PRXTransformer2DModel(**diffusers_config(cfg))
            transformer.load_state_dict(to_diffusers(state))
            if builtin:
                transformer.save_pretrained(aside / "transformer")
            else:
                encode_text = load_text_encoder(cfg, torch.device("cpu"), torch.float32)
                PRXPixelPipeline(
                    transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.shift),
                    text_encoder=encode_text.model, tokenizer=encode_text.tokenizer, prompt_max_tokens=cfg.text_tokens,
                    default_sample_size=cfg.stages[-1].image_size,
                    noise_scale=cfg.noise_scale,  # written out: diffusers' default is 2.0
                ).save_pretrained(aside)
            write_card(file, aside, out.name, cfg, metadata, sum(t.numel() for t in state.values()))
    if builtin:
        print(f"{out}/transformer: the transformer only, because diffusers has no built-in text encoder")
    else:
        print(f"{out}: diffusers.PRXPixelPipeline.from_pretrained({str(out)!r})")


def holds(pipeline: Path, state: dict[str, Tensor]) -> bool:
    """Whether a folder is a pipeline with these very weights; only then is an import exported as it was."""
    try:
        refuse_links(pipeline)
        theirs, _ = read_transformer(pipeline / "transformer")
    except UserError:
        return False
    return theirs.keys() == state.keys() and all(torch.equal(theirs[name], tensor) for name, tensor in state.items())


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: {licence}
tags: [prx, pixel-space, nanoprx]
---

# {name}

A text-to-image transformer on raw pixels, without a VAE: {parameters:,} parameters, trained by nanoPRX.
{picture}
## Use

{use}

## Recipe

| | |
| --- | --- |
{recipe}

## Data

{data}

## Licences

{licences}

## Scores

{scores}

## Provenance

Source sha256 `{source}`; log sha256 `{log}`.
"""
USE_PIPELINE = """```python
from diffusers import PRXPixelPipeline

pipeline = PRXPixelPipeline.from_pretrained("{name}")  # this folder, or its name on the hub
picture = pipeline("a prompt", height={side}, width={side}, num_inference_steps={steps}, guidance_scale={scale:g},
                   use_resolution_binning=False).images[0]
```"""
USE_TRANSFORMER = """```python
from diffusers import PRXTransformer2DModel

transformer = PRXTransformer2DModel.from_pretrained("{name}", subfolder="transformer")
```

The transformer only: its prompts went through nanoPRX's built-in text encoder, which diffusers does not have."""


def read_data(metadata: dict[str, str]) -> dict[str, str]:
    """The data of a run, folder -> sha256 of its manifest, as the metadata of its weights have it; {} where they are damaged."""
    try:
        return {str(path): str(sha256) for path, sha256 in json.loads(metadata["data"]).items()}
    except (KeyError, ValueError, AttributeError, RecursionError):
        return {}


def write_card(weights: Path, out: Path, name: str, cfg: Config, metadata: dict[str, str], parameters: int) -> None:
    """README.md, the hub's model card: recipe, data, licences, scores and provenance; the last sample grid as samples.png.

    It says what is known and names files and folders without their paths.
    """
    run = weights.parent
    grids = sorted(run.glob("samples/step_*.png")) or sorted(run.glob("score_*.png"))
    if grids:
        shutil.copyfile(grids[-1], out / "samples.png")
    side, builtin = cfg.stages[-1].image_size, cfg.text_encoder == "builtin"
    encoder = cfg.text_encoder if re.fullmatch(r"[^/]+/[^/]+", cfg.text_encoder) else Path(cfg.text_encoder).name
    recipe = {
        "network": f"PRX, width {cfg.width}, depth {cfg.depth}, {cfg.heads} heads, patch {cfg.patch} through {cfg.bottleneck}",
        "schedule": "; ".join(f"{s.steps:,} steps of {s.global_batch} images at {s.image_size}px" for s in cfg.stages)
                    + f"; these weights are of step {metadata.get('step', '0')}",
        "loss": f"x-prediction, squared error / t^{cfg.t_power:g}; frozen networks of the other terms: {cfg.frozen}",
        "routing": f"{cfg.drop:.0%} of the tokens skip blocks {cfg.route.start} to {cfg.route.stop - 1} in training",
        "optimizer": f"Muon {cfg.lr:g}, Adam {cfg.adam_lr:g}; weights averaged with {cfg.ema:g} every {cfg.ema_every} steps",
        "started from": Path(cfg.init).name if cfg.init else f"seed {cfg.seed}",
        "text encoder": f"{encoder}, {cfg.text_tokens} tokens",
        "sampling": f"time shift {cfg.shift:g}, noise scale {cfg.noise_scale:g}",
    }
    data, licences, sources = [], [], []
    for path, manifest_hash in read_data(metadata).items():
        data.append(f"{Path(path).name}, manifest sha256 `{manifest_hash}`")
        with contextlib.suppress(UserError, OSError):  # the data may be elsewhere by now, or have changed
            if file_sha256(Path(path) / "manifest.json") == manifest_hash:
                manifest = read_manifest(path)
                data[-1] += f": {manifest['rows']:,} rows of {manifest['source']}"
                sources.append(manifest["source"].partition(":")[0])
                licences.append(f"{Path(path).name}: {LICENCES.get(sources[-1], 'those of its pictures')}")
    if not builtin:
        licences.append(f"text encoder {encoder}: T5Gemma is under the Gemma terms, https://ai.google.dev/gemma/terms")
    if cfg.init:
        licences.append(f"started from {Path(cfg.init).name}, whose licence holds too")
    scenes_only = builtin and not cfg.init and data and sources == ["scenes"] * len(data)
    scores, weights_hash = [], file_sha256(weights)
    for values in map(read_json, sorted(run.glob("score_*.json"))):
        if values.get("checkpoint") == weights_hash:  # and not of an earlier step
            about = (f"{values['n']} pictures, seed {values['seed']}, guidance {values['guidance']} {values['scale']:g}, "
                     f"{values['steps']} steps{', ' * bool(values['network'])}{values['network'].rpartition('/')[2]}")
            scores += [f"| {name} | {values[name]:.4f} | {error:.4f} | {about} |" for name, error in values["error"].items()]
    use = USE_TRANSFORMER if builtin else USE_PIPELINE
    log = run / "log.txt"
    (out / "README.md").write_text(CARD.format(
        name=name, parameters=parameters, licence="mit" if scenes_only else "other",
        picture="\n![samples](samples.png)\n" if grids else "",
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        use=use.format(name=name, side=side, steps=cfg.sample_steps, scale=cfg.scale),
        data="\n".join(f"- {line}" for line in data) or "Not recorded.",
        licences="\n".join(f"- {line}" for line in licences) or "Not recorded.",
        scores="\n".join(["| score | value | half of the 95% interval | of |", "| --- | --- | --- | --- |", *scores])
               if scores else "Not scored.",
        source=metadata.get("source", "unknown"), log=file_sha256(log) if log.is_file() else "unknown"))


# ---------------------------------------------------------------------------------------------------------------------
# Import


def import_weights(source: str, out: Path, revision: str | None = None, text_encoder: str | None = None, text_tokens: int = 256,
                   size: int | None = None, patch: int = 32, bottleneck: int = 256) -> None:
    """Write a diffusers folder, a hub repository or PRX's own .safetensors as a folder like a run's, to draw with or start from.

    Weights that draw latents give all but `img_in` and `final_layer.linear`, which are drawn anew for pixels, with `patch`
    and `bottleneck`. `text_encoder`, `text_tokens` and `size` are for sources that do not say. Raises UserError.
    """
    record, folder = PRESETS["record"], download(source, revision)
    if is_diffusers(folder):
        refuse_links(folder)
        state, config = read_transformer(diffusers_transformer(folder))
    elif folder.suffix == ".safetensors":
        state, config = read_prx(folder), {}
    else:
        raise UserError(f"--from={source} is neither a diffusers folder nor a .safetensors file; pickled weights (.pt, .bin) "
                        "are never read")
    flags = {"patch": patch, "bottleneck": bottleneck, **model_flags(folder, state)}
    half_head = flags["width"] // flags["heads"] // 2
    if config.get("axes_dim", [half_head, half_head]) != [half_head, half_head]:
        raise UserError(f"{folder}: its axes_dim is {config['axes_dim']}, and ours are two equal halves of a head")

    if text_encoder is None and (folder / "text_encoder").is_dir():
        text_encoder = str(folder / "text_encoder")
    elif text_encoder is None and flags["text_dim"] == record.text_dim:
        text_encoder = record.text_encoder
    elif text_encoder is None:
        raise UserError(f"{folder} has no text encoder: name it with --text_encoder, a hub id, a folder or builtin")
    index, scheduler = (read_json(file) if file.is_file() else {} for file in (
        folder / "model_index.json", folder / "scheduler/scheduler_config.json"))
    try:
        flags |= {"text_tokens": int(index.get("prompt_max_tokens", text_tokens)),
                  "shift": float(scheduler.get("shift", record.shift)),
                  "rope_theta": float(config.get("theta", record.rope_theta)),
                  "noise_scale": float(pipeline_fields(folder).get("noise_scale", record.noise_scale))}
        side = int(size or index.get("default_sample_size") or record.stages[0].image_size)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    cfg = replace(record, name=re.sub(r"\W", "-", out.name), data="", frozen="none", guidance="cfg", text_encoder=text_encoder,
                  stages=(Stage(side, 1, record.micro_batch, False),), repa_depth=min(record.repa_depth, flags["depth"]), **flags)
    check_config(cfg if len(cfg.route) else replace(cfg, drop=0.0))
    model = PRX(replace(cfg, repa_weight=0.0))
    anew = [] if "img_in.0.weight" in state else ["img_in", "final_layer.linear"]
    if anew:
        state = {name: t for name, t in state.items() if not name.startswith(tuple(anew))}
        state |= {name: t for name, t in model.state_dict().items() if name.startswith(tuple(anew))}
    fill(model, state, folder)
    metadata = {"format": "nanoprx", "config": json.dumps(config_to_json(cfg)), "step": "0", "data": "{}",
                "source": f"imported from {Path(source).name}"}
    if not anew and (folder / "transformer").is_dir():
        metadata["origin"] = str(folder)  # to export it as it was
    with new_folder(out) as aside:
        safetensors.torch.save_file(model.state_dict(), aside / "ema.safetensors", metadata=metadata)
    print(f"{out}: width {cfg.width}, depth {cfg.depth}, patch {cfg.patch}, text encoder {cfg.text_encoder}"
          + (f"; it drew latents, so {' and '.join(anew)} start anew, for pixels" if anew else ""))
    names = [*flags, "text_encoder"]
    other = [f"--{name}={getattr(cfg, name)}" for name in names if getattr(cfg, name) != getattr(record, name)]
    print(" ".join([f"train from it with --init={out}", *other]))


def download(source: str, revision: str | None) -> Path:
    """`source` itself if it is there, else the weights, configs and card of the hub's repository of that name; raises UserError."""
    if Path(source).exists():
        return Path(source).absolute()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"--from={source} does not exist, and is no name of a repository on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[
            "*.json", "README.md", "samples.png", "transformer/*.safetensors", "text_encoder/*.safetensors", "tokenizer/*"]))
    except (OSError, ValueError) as error:  # the hub's own errors are of these
        raise UserError(f"cannot download {source}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; "
                        f"access: https://huggingface.co/{source}") from None


def read_prx(file: Path) -> dict[str, Tensor]:
    """Weights under PRX's own names, which are ours, behind a common prefix or none; averaged ones if the file has both."""
    state, metadata = read_safetensors(file)
    if metadata.get("format") == "nanoprx":
        raise UserError(f"{file} is of nanoPRX already: draw with it by --checkpoint, start from it by --init")
    prefixes = [name.removesuffix("txt_in.weight") for name in state if name.endswith("txt_in.weight")]
    if not prefixes:
        raise UserError(f"{file} holds no weights of PRX: there is no txt_in.weight")
    prefix = max(prefixes, key=lambda prefix: "ema" in prefix)
    return in_fp32({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}, file)
