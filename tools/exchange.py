"""Weights between people: a run as a folder for diffusers, and weights of diffusers or of PRX as a run's folder.

    python tools/exchange.py export --checkpoint=runs/try1 --out=exported     with a model card, for the hub
    python tools/exchange.py import --from=Photoroom/prx-512-t2i --out=imported
    python tools/exchange.py start  --from=imported --out=start [flags of train_prx.py]       a checkpoint of step 0

What is imported is drawn with by `sample.py --checkpoint=imported`; what `start` writes is trained on by
`train_prx.py --resume=start` with the same flags. Our names of weights are those of PRX's own code
(`blocks.0.img_qkv_proj.weight`). Nothing is unpickled. A card names files and folders without their paths.
"""
import contextlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from sample import WHOLE, fill, read_checkpoint, read_weights, weights_file  # noqa: E402
from train_prx import (  # noqa: E402
    EMA, PRESETS, PRX, Config, Parser, Stage, UserError, build_optimizer, check_config, config_to_json, file_sha256,
    load_text_encoder, prepare, read_manifest, run_main)

# ---------------------------------------------------------------------------------------------------------------------
# Names and folders of diffusers

DIFFUSERS_NAMES = {  # PRX's names -> those of diffusers' PRXTransformer2DModel; everything else is called alike
    "img_qkv_proj": "attention.img_qkv_proj", "txt_kv_proj": "attention.txt_kv_proj", "attn_out": "attention.to_out.0",
    "qk_norm.query_norm.scale": "attention.norm_q.weight", "qk_norm.key_norm.scale": "attention.norm_k.weight",
    "k_norm.scale": "attention.norm_added_k.weight",
}
# What our network has built in, of that class's config: shapes do not tell it
BUILT_IN = {"time_factor": 1000.0, "time_max_period": 10000, "resolution_embeds": False}


def rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """State dict with `names` replaced inside the names of block parameters."""
    pattern = re.compile(r"^(blocks\.\d+\.)(" + "|".join(map(re.escape, names)) + r")(?=\.|$)")
    return {pattern.sub(lambda m: m[1] + names[m[2]], name): tensor for name, tensor in state.items()}


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names, the REPA projector left out."""
    return rename({name: t for name, t in state.items() if not name.startswith("repa_projector.")}, DIFFUSERS_NAMES)


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    return rename(state, {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()})


def diffusers_config(cfg: Config) -> dict:
    """The arguments of `PRXTransformer2DModel` for the same network."""
    half_head = cfg.width // cfg.heads // 2
    return dict(in_channels=3, patch_size=cfg.patch, bottleneck_size=cfg.bottleneck, context_in_dim=cfg.text_dim,
                hidden_size=cfg.width, mlp_ratio=cfg.mlp_ratio, num_heads=cfg.heads, depth=cfg.depth,
                axes_dim=[half_head, half_head], theta=cfg.rope_theta, **BUILT_IN)


def read_json(file: Path) -> dict:
    """A JSON file's object, {} where there is no file; raises UserError where it holds something else."""
    try:
        values = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no object")
    return values


def refuse_links(folder: Path) -> None:
    """Raise UserError for a link that leads out of a folder; the hub's cache has its files beside it, in `blobs`."""
    homes = folder.resolve(), folder.resolve().parent.parent / "blobs"
    for path in folder.rglob("*"):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and (target.is_dir() or not any(target.is_relative_to(home) for home in homes)):
            raise UserError(f"{path} is a link that leads out of its folder, and is not followed")


def read_transformer(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """A PRXTransformer2DModel's folder -> (weights under our names in fp32, its config).

    Raises UserError where it has no safetensors, is damaged, or has what our network has not.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "PRXTransformer2DModel":
        raise UserError(f"{folder} is a {config.get('_class_name')}, not a PRXTransformer2DModel")
    for name, value in BUILT_IN.items():
        if config.get(name, value) != value:
            raise UserError(f"{folder}: its {name} is {config[name]}, and ours is always {value}")
    files, index = ["diffusion_pytorch_model.safetensors"], folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (KeyError, AttributeError):
            raise UserError(f"{index} is damaged: it has no weight_map of file names") from None
    state = {}
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not in its folder, and is not read")
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: weights are read from safetensors only, never from pickles")
        state |= read_weights(folder / name)[0]
    renamed = from_diffusers(state)
    if len(renamed) < len(state):
        raise UserError(f"{folder} is damaged: it has a tensor under two names")
    return renamed, config


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


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export_diffusers(path: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights, with a model card, as a folder for diffusers; raises UserError if `out` exists.

    A run with a hub text encoder becomes a whole `PRXPixelPipeline`; one with the built-in encoder, which diffusers has
    not, its transformer only. What was imported is written as it was, if it is still where it came from.
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
    except ImportError:
        raise UserError("export takes diffusers 0.42 or newer: pip install diffusers ftfy") from None
    out = Path(out)
    model, cfg, metadata = read_checkpoint(path)
    state, origin = model.state_dict(), Path(metadata.get("origin", ""))
    is_whole = cfg.text_encoder != "builtin"
    with new_folder(out) as aside:
        if "origin" in metadata and holds(origin, state):
            shutil.copytree(origin, aside, dirs_exist_ok=True)
            is_whole = (origin / "text_encoder").is_dir()
        else:
            transformer = PRXTransformer2DModel(**diffusers_config(cfg))
            transformer.load_state_dict(to_diffusers(state))
            if is_whole:
                encode_text = load_text_encoder(cfg, torch.device("cpu"), torch.float32)
                PRXPixelPipeline(
                    transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.shift),
                    text_encoder=encode_text.model, tokenizer=encode_text.tokenizer, prompt_max_tokens=cfg.text_tokens,
                    default_sample_size=cfg.stages[-1].image_size, noise_scale=cfg.noise_scale,  # 2 by default
                ).save_pretrained(aside)
            else:
                transformer.save_pretrained(aside / "transformer")
            write_card(weights_file(path), aside, out.name, cfg, metadata, sum(t.numel() for t in state.values()))
    alone = "" if is_whole else ": the transformer alone, because diffusers has no built-in text encoder"
    print(f"{out}: for diffusers.{'PRXPixelPipeline' if is_whole else 'PRXTransformer2DModel'}{alone}")


def holds(pipeline: Path, state: dict[str, Tensor]) -> bool:
    """Whether a folder is a pipeline with these very weights; only then is an import exported as it was."""
    try:
        refuse_links(pipeline)
        theirs, _ = read_transformer(pipeline / "transformer")
    except UserError:
        return False
    return theirs.keys() == state.keys() and all(torch.equal(theirs[name], tensor) for name, tensor in state.items())


LICENCES = {  # source of a data set -> what its pictures are under
    "scenes": "procedural pictures, MIT",
    "flux_reason": "pictures by FLUX.1-dev, whose licence restricts training competing models on them",
    "flux_generated": "pictures by FLUX models, whose licences restrict training competing models on them",
    "midjourney": "pictures by Midjourney v6, under the terms of its set's card",
}
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: {licence}
tags: [prx, pixel-space, nanoprx]
---

# {name}

A text-to-image transformer on raw pixels, without a VAE: {parameters:,} parameters, trained by nanoPRX.
"""
USE_PIPELINE = """```python
from diffusers import PRXPixelPipeline

pipeline = PRXPixelPipeline.from_pretrained("{name}")  # this folder, or its name on the hub
picture = pipeline("a prompt", height={side}, width={side}, num_inference_steps={steps}, guidance_scale={scale:g},
                   use_resolution_binning=False).images[0]
```"""
USE_TRANSFORMER = """`diffusers.PRXTransformer2DModel.from_pretrained("{name}", subfolder="transformer")`: the
transformer only. Its prompts went through nanoPRX's built-in text encoder, which diffusers does not have."""


def write_card(weights: Path, out: Path, name: str, cfg: Config, metadata: dict[str, str], parameters: int) -> None:
    """README.md, the hub's model card, and the last grid of samples; files and folders are named without paths."""
    run = weights.parent.parent if weights.parent.name == "ema" else weights.parent
    grids, log, builtin = sorted(run.glob("samples/step_*.png")), run / "log.txt", cfg.text_encoder == "builtin"
    if grids:
        shutil.copyfile(grids[-1], out / "samples.png")
    origin = Path(metadata.get("init") or json.loads(metadata["config"]).get("init") or "").name  # it began with
    encoder = cfg.text_encoder if re.fullmatch(r"[^/]+/[^/]+", cfg.text_encoder) else Path(cfg.text_encoder).name
    stages = [f"{stage.steps:,} steps of {stage.global_batch} images at {stage.image_size}px" for stage in cfg.stages]
    recipe = {
        "network": f"width {cfg.width}, depth {cfg.depth}, {cfg.heads} heads, patch {cfg.patch} by {cfg.bottleneck}",
        "text encoder": f"{encoder}, {cfg.text_tokens} tokens",
        "schedule": f"{'; '.join(stages)}; these weights are of step {metadata.get('step', '0')}",
        "loss": f"x-prediction, squared error / t^{cfg.t_power:g}; frozen networks of the other terms: {cfg.frozen}",
        "routing": f"{cfg.drop:.0%} of the tokens skip blocks {cfg.route.start} to {cfg.route.stop - 1} in training",
        "optimizer": f"Muon {cfg.lr:g}, Adam {cfg.adam_lr:g}; averaged with {cfg.ema:g} every {cfg.ema_every} steps",
        "started from": origin or f"seed {cfg.seed}",
        "source": f"sha256 `{metadata.get('source', 'unknown')}`",
        "log": f"sha256 `{file_sha256(log)}`" if log.is_file() else "unknown",
    }
    data, sources = describe_data(metadata)
    is_mit = sources == ["scenes"] * len(data) and len(data) > 0 and builtin and not origin
    if not builtin:
        data.append(f"text encoder {encoder}: T5Gemma is under the Gemma terms, https://ai.google.dev/gemma/terms")
    if origin:
        data.append(f"started from {origin}, whose licence holds too")
    sections = {
        "Use": (USE_TRANSFORMER if builtin else USE_PIPELINE).format(
            name=name, side=cfg.stages[-1].image_size, steps=cfg.sample_steps, scale=cfg.scale),
        "Recipe": "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in recipe.items())]),
        "Data and licences": "\n".join(f"- {line}" for line in data) or "Not recorded.",
        "Scores": describe_scores(run, file_sha256(weights)),
    }
    card = CARD.format(name=name, parameters=parameters, licence="mit" if is_mit else "other")
    card += "\n![samples](samples.png)\n" if grids else ""
    (out / "README.md").write_text(card + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items()))


def describe_data(metadata: dict[str, str]) -> tuple[list[str], list[str]]:
    """A line a data set of a run, with its licence where the set is still there unchanged; and those sets' sources."""
    lines, sources, manifests = [], [], {}
    with contextlib.suppress(KeyError, ValueError, AttributeError, RecursionError):  # not recorded, or damaged
        manifests = {str(path): str(sha256) for path, sha256 in json.loads(metadata["data"]).items()}
    for path, sha256 in manifests.items():
        lines.append(f"{Path(path).name}, manifest sha256 `{sha256}`")
        with contextlib.suppress(UserError, OSError):  # the data may be elsewhere by now, or have changed
            if file_sha256(Path(path) / "manifest.json") == sha256:
                manifest = read_manifest(path)
                sources.append(manifest["source"].partition(":")[0])
                licence = LICENCES.get(sources[-1], "under the licence of its pictures")
                lines[-1] += f": {manifest['rows']:,} rows of {manifest['source']}; {licence}"
    return lines, sources


def describe_scores(run: Path, weights: str) -> str:
    """A table of what scores.jsonl has of the weights with this sha256, the last of each metric; raises UserError."""
    file, latest = run / "scores.jsonl", {}
    try:
        for score in map(json.loads, file.read_text().splitlines() if file.is_file() else []):
            if score["weights"] == weights:  # and not of another step
                about = (f"{score['n']} pictures, seed {score['seed']}, guidance {score['guidance']} "
                         f"{score['scale']:g}, {score['steps']} steps {Path(score['network']).name}")
                latest[score["metric"], score["network"]] = [
                    f"| {name} | {value:.4f} | {score['errors'][name]:.4f} | {about.strip()} |"
                    for name, value in score["values"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is damaged, and the card takes the scores from it") from None
    head = ["| score | value | half of the 95% interval | of |", "| --- | --- | --- | --- |"]
    return "\n".join(sum(latest.values(), head)) if latest else "Not scored."


# ---------------------------------------------------------------------------------------------------------------------
# Import


def import_weights(source: str, out: Path, revision: str | None = None, text_encoder: str | None = None,
                   text_tokens: int = 256, size: int | None = None, patch: int = 32, bottleneck: int = 256) -> None:
    """Write a diffusers folder, a hub repository or PRX's own .safetensors as a folder like a run's.

    Weights that draw latents give all but `img_in` and `final_layer.linear`, which are drawn anew for pixels, with
    `patch` and `bottleneck`. `text_encoder`, `text_tokens`, `size` are for sources that do not say. Raises UserError.
    """
    record, folder = PRESETS["record"], download(source, revision)
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if (transformer / "config.json").is_file():
        refuse_links(folder)
        state, config = read_transformer(transformer)
    elif folder.suffix == ".safetensors":
        state, config = read_prx(folder), {}
    else:
        raise UserError(f"--from={source} is neither a diffusers folder nor a .safetensors file; pickled weights (.pt, "
                        ".bin) are never read")
    flags = {"patch": patch, "bottleneck": bottleneck, **model_flags(folder, state)}
    half_head = flags["width"] // flags["heads"] // 2
    if config.get("axes_dim", [half_head, half_head]) != [half_head, half_head]:
        raise UserError(f"{folder}: its axes_dim is {config['axes_dim']}, and ours are two equal halves of a head")

    if text_encoder is None and (folder / "text_encoder").is_dir():
        text_encoder = str(folder / "text_encoder")
    text_encoder = text_encoder or (record.text_encoder if flags["text_dim"] == record.text_dim else None)
    if text_encoder is None:
        raise UserError(f"{folder} has no text encoder: name it with --text_encoder, a hub id, a folder or builtin")
    index, scheduler = read_json(folder / "model_index.json"), read_json(folder / "scheduler/scheduler_config.json")
    draws_pixels = index.get("_class_name") == "PRXPixelPipeline"  # whose own noise_scale is 2
    try:
        flags |= {"text_tokens": int(index.get("prompt_max_tokens", text_tokens)), "text_encoder": text_encoder,
                  "shift": float(scheduler.get("shift", record.shift)),
                  "rope_theta": float(config.get("theta", record.rope_theta)),
                  "noise_scale": float(index.get("noise_scale", 2.0) if draws_pixels else record.noise_scale)}
        side = int(size or index.get("default_sample_size") or record.stages[0].image_size)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder} is damaged: {error}") from None
    if len(replace(record, depth=flags["depth"]).route) == 0:
        flags["drop"] = 0.0  # too few blocks to route around
    cfg = replace(record, name=re.sub(r"\W", "-", out.name), data="", frozen="none", guidance="cfg",
                  stages=(Stage(side, 1, record.micro_batch, False),),
                  repa_depth=min(record.repa_depth, flags["depth"]), **flags)
    check_config(cfg)
    model = PRX(replace(cfg, repa_weight=0.0))
    anew = () if "img_in.0.weight" in state else ("img_in.", "final_layer.linear.")
    if anew:
        state = {name: t for name, t in state.items() if not name.startswith(anew)}
        state |= {name: t for name, t in model.state_dict().items() if name.startswith(anew)}
    fill(model, state, folder)
    metadata = {"format": "nanoprx", "config": json.dumps(config_to_json(cfg)), "step": "0", "data": "{}",
                "source": f"imported from {Path(source).name}"}
    if not anew and (folder / "transformer").is_dir():
        metadata["origin"] = str(folder)  # to export it as it was
    with new_folder(out) as aside:
        safetensors.torch.save_file(model.state_dict(), aside / "ema.safetensors", metadata=metadata)
    print(f"{out}: width {cfg.width}, depth {cfg.depth}, patch {cfg.patch}, text encoder {cfg.text_encoder}"
          + ("; it drew latents, so img_in and final_layer.linear start anew, for pixels" if anew else ""))
    other = [f"--{name}={value}" for name, value in flags.items() if value != getattr(record, name)]
    print(" ".join(["its flags, where they are not the record's:", *other]))


def start_from(source: Path, out: Path, flags: list[str]) -> None:
    """Write the weights of a run or an import as a checkpoint of step 0, with a fresh average and optimizer, of the run
    that `flags` describe; raises UserError where its network is another.
    """
    cfg, _, _, identity = prepare(flags)
    model = PRX(cfg)
    drawn = {name: p for name, p in model.state_dict().items() if name.startswith("repa_projector.")}  # in no weights
    fill(model, drawn | read_weights(source)[0], source)
    optimizer, parameters = build_optimizer(model, cfg), dict(model.named_parameters())
    state = {"model": {name: p.detach() for name, p in parameters.items()}, "ema": EMA(model).weights,
             "optimizer": {name: optimizer.state[p] for name, p in parameters.items()},
             "progress": {name: torch.zeros((), dtype=torch.float64) for name in ("step", "seconds", "skipped")}}
    with new_folder(out) as aside:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as one process means it to be
            dcp.save(state, checkpoint_id=aside, no_dist=True)
        about = {**identity, "step": 0, "seconds": 0.0, "init": source.name}
        (aside / "run.json").write_text(json.dumps(about))
    print(f"python train_prx.py --resume={out} {' '.join(flags)}")


def model_flags(source: Path, state: dict[str, Tensor]) -> dict[str, int | float]:
    """The fields of a Config that shapes tell, without `patch` and `bottleneck` where the weights draw latents."""
    try:
        width, text_dim = state["txt_in.weight"].shape
        hidden = len(state["blocks.0.gate_proj.weight"])
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        if blocks != set(map(str, range(len(blocks)))):
            raise ValueError(f"one of {len(blocks)} blocks")
        ratios = (math.ceil(hidden / width * 10**digits) / 10**digits for digits in range(1, 9))
        ratio = next(ratio for ratio in ratios if int(width * ratio) == hidden)  # 2.7, where 345 / 128 is 2.6953125
        flags = {"width": width, "text_dim": text_dim, "depth": len(blocks), "mlp_ratio": ratio,
                 "heads": width // len(state["blocks.0.qk_norm.query_norm.scale"])}
        if "img_in.0.weight" in state:
            flags["patch"] = round((len(state["final_layer.linear.bias"]) / 3) ** 0.5)
            flags["bottleneck"] = len(state["img_in.0.bias"])
    except (KeyError, ValueError, TypeError, StopIteration, ZeroDivisionError) as error:
        raise UserError(f"{source} holds no weights of PRX: {str(error) or 'a shape'} is missing or wrong") from None
    return flags


def download(source: str, revision: str | None) -> Path:
    """`source` itself if it is there, else the weights, configs and card of the hub's repository of that name."""
    if Path(source).exists():
        return Path(source).absolute()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"--from={source} does not exist, and is no name of a repository on the hub")
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "README.md", "samples.png", "t*/*.safetensors", "tokenizer/*"]  # transformer, text_encoder
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's own errors are of these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot download {source}: {reason}; access: https://huggingface.co/{source}") from None


def read_prx(file: Path) -> dict[str, Tensor]:
    """Weights under PRX's own names, which are ours, behind any prefix; averaged ones if the file has both."""
    state, metadata = read_weights(file)
    if metadata.get("format") == "nanoprx":
        raise UserError(f"{file} is of nanoPRX already: draw with it by --checkpoint")
    prefixes = [name.removesuffix("txt_in.weight") for name in state if name.endswith("txt_in.weight")]
    if not prefixes:
        raise UserError(f"{file} holds no weights of PRX: there is no txt_in.weight")
    prefix = max(prefixes, key=lambda prefix: "ema" in prefix)
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str]) -> None:
    chooser = Parser(prog="exchange.py", description="Weights to diffusers, and from there; each command has --help.")
    chooser.add_argument("command", choices=["export", "import", "start"], help="what to do; its flags follow")
    command = chooser.parse_args(argv[:1]).command
    parser = Parser(prog=f"exchange.py {command}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    record, add = PRESETS["record"], parser.add_argument
    if command == "export":
        add("--checkpoint", dest="path", required=True, help="a run's folder or its ema.safetensors")
        return export_diffusers(**vars(parser.parse_args(argv[1:])))
    if command == "start":
        add("--from", dest="source", type=Path, required=True, help="a run's folder, an import, or its ema.safetensors")
        known, flags = parser.parse_known_args(argv[1:])
        return start_from(known.source, known.out, flags)
    add("--from", dest="source", required=True, help="folder of a diffusers pipeline or transformer, PRX's own weights "
        "as .safetensors, or a repository on the hub")
    add("--revision", help="commit, tag or branch on the hub")
    add("--text_encoder", help="hub id, folder or builtin (default: the folder's own)")
    add("--text_tokens", type=WHOLE, default=record.text_tokens, help="tokens a prompt, where the folder does not say")
    add("--size", type=WHOLE, help=f"pixels that it draws (default: the folder's, else {record.stages[0].image_size})")
    add("--patch", type=WHOLE, default=record.patch, help="of weights that drew latents: pixels a side of a token")
    add("--bottleneck", type=WHOLE, default=record.bottleneck, help="of weights that drew latents: its width")
    import_weights(**vars(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    run_main(main)
