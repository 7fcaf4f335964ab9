"""Prompts -> pictures, their scores, and a door to diffusers.

    python sample.py --checkpoint=runs/try1 --prompt="a large red circle in the top left" --n=4 --out=out.png
    python sample.py --checkpoint=runs/try1 --prompt="..." --sweep                      guidance kinds and scales, one sheet
    torchrun --nproc_per_node=8 sample.py --checkpoint=runs/try1 --prompts=prompts.txt --out=pictures/
    python sample.py score  --checkpoint=runs/try1 --metric=scenes
    python sample.py export --checkpoint=runs/try1 --out=export/
    python sample.py import --from=Photoroom/prx-512-t2i --out=imported/
    python sample.py curves --runs=runs/try1,runs/try2 --out=curves.png

Reads `ema.safetensors` only: averaged weights, with the run's config in their metadata. Nothing is unpickled. How pictures
are scored is in metrics.py, what curves are drawn in curves.py.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import ranks
import scenes
from curves import draw_curves
from metrics import METRICS, Scorer, gather_rows, my_share, resample_weights, to_score
from run_folder import draw_grid
from shards import RowSet, file_sha256, read_manifest
from train_prx import (PRESETS, PRX, Chunks, Config, Parser, Stage, TextEncoder, UserError, check_config, compiles,
                       config_from_json, config_to_json, draw, held_out_losses, load_text_encoder, run_main, sampling_settings,
                       to_uint8)
from weights import (BUILT_IN, is_diffusers, model_flags, read_json, read_safetensors, read_transformer, to_diffusers,
                     weights_file)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


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
        with torch.device("meta"):
            model = PRX(cfg)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # a damaged config raises almost anything
        raise UserError(f"{file}: its config is damaged ({type(error).__name__})") from None
    model.repa_projector = None  # stays with the run
    model.to_empty(device="cpu").load_weights(state, file)
    return model.eval().requires_grad_(False), cfg, metadata


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[PRX, Config, TextEncoder]:
    """The averaged weights of a run: (model in eval mode on `device`, its config, prompts -> (txt, txt_mask)).

    Model and text encoder are bf16 on a GPU and fp32 on the CPU. Raises UserError as `read_checkpoint` does.
    """
    model, cfg, _ = read_checkpoint(path)
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device, dtype), cfg, load_text_encoder(cfg, device, dtype)


def load(args, device: torch.device) -> tuple[PRX, Config, TextEncoder]:
    """`load_checkpoint` as the flags say."""
    model, cfg, encode_text = load_checkpoint(args.checkpoint, device)
    if args.compile and not compiles(replace(cfg, compile=True), device):
        raise UserError("--compile=1 takes a C++ compiler: g++, or the one that CXX names")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of absent CUDA
    torch._dynamo.config.recompile_limit = 64  # a block compiles for each batch size, routed or not, and 32 tokens of text
    for block in model.blocks if args.compile else []:
        block.compile(dynamic=False)
    return model, cfg, encode_text


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


SETTINGS = ("steps", "guidance", "scale", "interval", "drop", "shift")  # of generate, and flags


def draw_batches(model: PRX, encode_text: TextEncoder, prompts: list[str], seeds: list[int], size: tuple[int, int], batch: int,
                 items: list[int], **settings) -> Iterator[tuple[list[int], np.ndarray]]:
    """The pictures of the given items, `batch` at a time: (their items, uint8 [B, H, W, 3]); settings as `generate` takes them."""
    quiet = True if dist.is_initialized() and dist.get_rank() else None  # None: quiet where stderr is no terminal
    with tqdm(total=-(-len(items) // batch) * settings["steps"], desc="sampling", unit=" steps", disable=quiet, delay=1) as bar:
        for first in range(0, len(items), batch):
            part = items[first : first + batch]
            x0 = draw(model, encode_text, [prompts[i] for i in part], [seeds[i] for i in part], size,
                      after_step=bar.update, **settings)
            yield part, to_uint8(x0)


def sample_images(model: PRX, encode_text: TextEncoder, prompts: list[str], seeds: list[int], size: tuple[int, int],
                  batch: int, **settings) -> np.ndarray:
    """Pictures uint8 [len(prompts), H, W, 3], each rank drawing a share; one depends on its prompt, seed and settings only.

    settings: those of `train_prx.generate`.
    """
    parts = draw_batches(model, encode_text, prompts, seeds, size, batch, my_share(len(prompts)), **settings)
    images = np.concatenate([images for _, images in parts])
    return gather_rows(torch.from_numpy(images), len(prompts)).numpy()


def sample(args, device: torch.device) -> None:
    """`sample.py`: draw prompts and write one picture, a sheet of several, or a folder with one file a picture."""
    prompts = read_prompts(args)
    seeds = args.seeds or list(range(args.seed, args.seed + args.n))
    if args.out.suffix not in (".png", ""):
        raise UserError(f"--out={args.out}: a picture or sheet ends in .png, a folder of pictures has no ending")
    if args.sweep and (len(prompts) > 1 or len(seeds) > 1 or not args.out.suffix):
        raise UserError("--sweep draws a sheet of one prompt with one seed: give one --prompt, no --n, and an --out that ends "
                        "in .png")
    if not args.out.suffix and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out={args.out} exists and is not empty: name another folder")
    model, cfg, encode_text = load(args, device)
    weights_hash = file_sha256(weights_file(args.checkpoint))
    if args.like and (text := read_text(args.like)).get("checkpoint") != weights_hash:
        raise UserError(f"--like={args.like} was drawn with a checkpoint of sha256 {text.get('checkpoint', 'unknown')[:12]}, "
                        f"and {args.checkpoint} has {weights_hash[:12]}")
    settings = settings_of(args, cfg)
    side = cfg.stages[-1].image_size
    size = args.size or (side, side)
    for length in size:
        if length % cfg.patch:
            raise UserError(f"--size={size[0]}x{size[1]}: both must be multiples of the patch, {cfg.patch}")

    def text(**what) -> PngInfo:
        """What a PNG says of itself: the flags that draw it again, and the weights' sha256."""
        flags = {**what, "size": f"{size[0]}x{size[1]}", **settings, "interval": "{}:{}".format(*settings["interval"])}
        info = PngInfo()
        for key, value in {**flags, "checkpoint": weights_hash}.items():
            info.add_text(key, value if isinstance(value, str) else json.dumps(value))
        return info

    is_main = dist.get_rank() == 0
    if args.sweep:
        sheet = sweep(model, cfg, encode_text, prompts[0], seeds[0], size, args.batch, args.sweep, settings)
        info = text(prompt=prompts[0], seed=seeds[0], sweep=",".join(f"{scale:g}" for scale in args.sweep))
        done = f"{args.out}: scales {', '.join(f'{scale:g}' for scale in args.sweep)}, {settings['steps']} steps, seed {seeds[0]}"
        if is_main:
            save_picture(sheet, args.out, info)
            print(done)
        return
    repeated, each = [prompt for prompt in prompts for _ in seeds], seeds * len(prompts)
    if args.out.suffix:
        images = sample_images(model, encode_text, repeated, each, size, args.batch, **settings)
        if is_main and len(images) == 1:
            save_picture(Image.fromarray(images[0]), args.out, text(prompt=prompts[0], seed=seeds[0]))
        elif is_main:
            save_picture(draw_grid(images, repeated, columns=max(len(seeds), 4)), args.out, text(prompts=prompts, seeds=seeds))
    else:
        mine = list(range(len(repeated)))[dist.get_rank() :: dist.get_world_size()]
        for items, images in draw_batches(model, encode_text, repeated, each, size, args.batch, mine, **settings):
            for i, image in zip(items, images):
                name = f"{i // len(seeds):05d}-{each[i]}.png"
                save_picture(Image.fromarray(image), args.out / name, text(prompt=repeated[i], seed=each[i]))
        dist.barrier()
    if is_main:
        print(f"{args.out}: {len(repeated)} image(s) of {size[1]} x {size[0]} px, guidance {settings['guidance']} "
              f"{settings['scale']:g}, {settings['steps']} steps, seeds from {seeds[0]}")


def read_prompts(args) -> list[str]:
    """The prompts that the flags name."""
    if args.prompts is not None:
        try:
            prompts = [line.strip() for line in Path(args.prompts).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts={args.prompts}: {error}") from None
        if not prompts:
            raise UserError(f"--prompts={args.prompts} has no prompt: write one a line")
        return prompts
    if args.prompt is None:
        raise UserError('nothing to draw: give --prompt="..." or --prompts=FILE with a prompt a line')
    return args.prompt


def settings_of(args, cfg: Config) -> dict:
    """The settings of `generate`: the flags where given, else what the run drew its own samples with."""
    given = {name: getattr(args, name) for name in SETTINGS}
    settings = {"interval": (0.0, 1.0), **sampling_settings(cfg), **{name: x for name, x in given.items() if x is not None}}
    if settings["guidance"] == "self" and len(cfg.route) == 0:
        raise UserError(f"--guidance=self needs routed blocks, and {args.checkpoint} has none: use cfg or none")
    return settings


def read_text(file: Path) -> dict[str, str]:
    """The text of a PNG; raises UserError where there is none of ours."""
    try:
        with Image.open(file) as picture:
            text = dict(picture.text)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read --like={file}: {error}") from None
    if not text.keys() >= {"size", "steps", "guidance", "checkpoint"}:
        raise UserError(f"--like={file} was not drawn by sample.py: it does not say how")
    return text


def flags_of(file: Path, given: list[str]) -> list[str]:
    """The flags that draw a PNG again, from its text; those that are `given` anyway are left out."""
    text = read_text(file)
    try:
        prompts = json.loads(text["prompts"]) if "prompts" in text else [text["prompt"]]
        seeds = ",".join(map(str, json.loads(text["seeds"]) if "seeds" in text else [text["seed"]]))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"--like={file} is damaged: it does not say what it shows") from None
    names = {flag.partition("=")[0].removeprefix("--") for flag in given}
    flags = [] if names & {"prompt", "prompts"} else [f"--prompt={prompt}" for prompt in prompts]
    flags += [] if names & {"seed", "seeds", "n"} else [f"--seeds={seeds}"]
    return flags + [f"--{name}={text[name]}" for name in ("size", *SETTINGS, "sweep") if name in text and name not in names]


def sweep(model: PRX, cfg: Config, encode_text: TextEncoder, prompt: str, seed: int, size: tuple[int, int], batch: int,
          scales: list[float], settings: dict) -> Image.Image:
    """One prompt and seed as a labelled sheet: a row for each kind of guidance, first without it, then at each scale."""
    kinds = ["self", "cfg"] if len(cfg.route) else ["cfg"]
    plain = sample_images(model, encode_text, [prompt], [seed], size, batch, **{**settings, "guidance": "none"})
    images, labels = [], []
    for kind in kinds:
        images += [plain, *(sample_images(model, encode_text, [prompt], [seed], size, batch,
                                          **{**settings, "guidance": kind, "scale": scale}) for scale in scales)]
        labels += ["no guidance", *(f"{kind}, scale {scale:g}" for scale in scales)]
    return draw_grid(np.concatenate(images), labels, columns=1 + len(scales), title=prompt)


def save_picture(picture: Image.Image, path: Path, text: PngInfo | None = None) -> None:
    """Write a PNG, its folder too if need be; raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", pnginfo=text)
    except OSError as error:
        raise UserError(f"cannot write --out={path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Scores

MEANING = {"objects": "right colour in the right place", "exact": "and right shape and size", "colour": "right colour",
           "place": "something is there", "size": "right size", "shape": "right shape", "background": "right background",
           "scenes": "every object exact, nothing else",
           "cmmd": "CLIP embeddings, MMD x 1000", "mmd": "DINOv2 embeddings, MMD x 1000", "fdd": "Frechet distance, DINOv2",
           "fid": "Frechet distance, Inception-v3", "held_out": "flow-matching loss of held-out rows"}


def score(args, device: torch.device) -> None:
    """`sample.py score`: pictures of held-out prompts beside what they should be; writes score_METRIC.json and .png."""
    wanted = args.metric.split(",")
    of_pictures = [metric for metric in wanted if metric != "held_out"]
    model, cfg, encode_text = load(args, device)
    settings = settings_of(args, cfg)
    cfg = replace(cfg, data=args.data or cfg.data)
    stage, folder, is_main = cfg.stages[-1], weights_file(args.checkpoint).parent, dist.get_rank() == 0
    side, sets = stage.image_size, []
    if wanted != ["scenes"]:
        sets = [RowSet(part.partition(":")[0], replace(cfg, text_encoder="builtin"), side) for part in cfg.data.split(",")]
    results = {}  # metric -> name -> Score

    if of_pictures:
        scorer = Scorer(",".join(of_pictures), sets, args.n, device, level=args.level, seed=args.seed, batch=args.batch)
        found = scorer(lambda prompts, seeds: to_uint8(draw(model, encode_text, prompts, seeds, (side, side), **settings)))
        for name, value in found.items():
            metric, _, of_scenes = name.partition("_")
            results.setdefault(metric, {})[of_scenes or metric] = value
    if "held_out" in wanted:
        losses = held_out_losses(model, Chunks(cfg, stage, 0), encode_text, cfg, device, args.n).cpu().double()
        if len(losses) == 0:
            raise UserError(f"--data={cfg.data} has no held-out rows: it is too small")
        results["held_out"] = {"held_out": to_score(resample_weights(len(losses)) @ losses)}

    if not is_main:
        return
    print(f"{args.checkpoint}: up to {args.n} pictures, {side}px, guidance {settings['guidance']} {settings['scale']:g}, "
          f"{settings['steps']} steps; +- is half of the 95% interval")
    about = {"n": args.n, "seed": args.seed, "level": args.level, "image_size": side, **settings,
             "checkpoint": file_sha256(weights_file(args.checkpoint)), "data": {s.folder: s.manifest_hash for s in sets}}
    for metric, scores in results.items():
        for name, (value, error) in scores.items():
            shown = f"{100 * value:6.1f}% +- {100 * error:.1f}" if metric == "scenes" else f"{value:8.4f} +- {error:.4f}"
            print(f"  {name:10}{shown}  {MEANING[name]}")
        values, errors = ({name: score[k] for name, score in scores.items()} for k in (0, 1))
        (folder / f"score_{metric}.json").write_text(json.dumps({**about, **values, "error": errors}, indent=2) + "\n")
    for kind, (images, prompts) in scorer.shown.items() if of_pictures else ():
        first = "scenes" if kind == "scenes" else next(metric for metric in results if metric not in ("scenes", "held_out"))
        grid = args.out or folder / f"score_{first}.png"
        save_picture(draw_grid(images, prompts), grid)
        print(f"grid: {grid}")


# ---------------------------------------------------------------------------------------------------------------------
# diffusers: export

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
    since diffusers has no such encoder. What was imported is written as it was.
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
        from diffusers.utils import logging as diffusers_logging
    except ImportError:
        raise UserError("export takes diffusers 0.42 or newer: pip install diffusers ftfy") from None
    diffusers_logging.set_verbosity_error()  # of casts to the dtype that it had
    out, file = Path(out), weights_file(path)
    model, cfg, metadata = read_checkpoint(path)
    transformer = PRXTransformer2DModel(**diffusers_config(cfg))
    transformer.load_state_dict(to_diffusers(model.state_dict()))
    with new_folder(out) as aside:
        if "origin" in metadata:
            transformer.to(getattr(torch, metadata["dtype"])).save_pretrained(aside / "transformer")
            copy_all_but_weights(Path(metadata["origin"]), aside)
        elif cfg.text_encoder == "builtin":
            transformer.save_pretrained(aside / "transformer")
        else:
            encode_text = load_text_encoder(cfg, torch.device("cpu"), torch.float32)
            PRXPixelPipeline(
                transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.shift), text_encoder=encode_text.model,
                tokenizer=encode_text.tokenizer, default_sample_size=cfg.stages[-1].image_size, prompt_max_tokens=cfg.text_tokens,
                noise_scale=cfg.noise_scale,  # written out: diffusers' default is 2.0
            ).save_pretrained(aside)
        if "origin" not in metadata:
            write_card(file, aside, out.name, cfg, metadata, sum(p.numel() for p in model.parameters()))
    if cfg.text_encoder == "builtin":
        print(f"{out}/transformer: the transformer only, because diffusers has no built-in text encoder")
    else:
        print(f"{out}: diffusers.PRXPixelPipeline.from_pretrained({str(out)!r})")


def copy_all_but_weights(pipeline: Path, out: Path) -> None:
    """A pipeline's folder without the files of its transformer's weights, copied over another; raises UserError."""
    if not pipeline.is_dir():
        raise UserError(f"{pipeline}, from where this was imported, is gone, and with it its text encoder and tokenizer")
    shutil.copytree(pipeline, out, dirs_exist_ok=True, ignore=lambda folder, names: [
        name for name in names if Path(folder) == pipeline / "transformer" and name != "config.json"])


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
    data, licences, sources = [], [], set()
    for path, manifest_hash in json.loads(metadata.get("data", "{}")).items():
        data.append(f"{Path(path).name}, manifest sha256 `{manifest_hash}`")
        with contextlib.suppress(UserError, OSError):  # the data may be elsewhere by now, or have changed
            if file_sha256(Path(path) / "manifest.json") == manifest_hash:
                manifest = read_manifest(path)
                data[-1] += f": {manifest['rows']:,} rows of {manifest['source']}"
                sources.add(manifest["source"].partition(":")[0])
                licences.append(f"{Path(path).name}: {LICENCES.get(manifest['source'].partition(':')[0], 'those of its pictures')}")
    if not builtin:
        licences.append(f"text encoder {encoder}: T5Gemma is under the Gemma terms, https://ai.google.dev/gemma/terms")
    scores, weights_hash = [], file_sha256(weights)
    for values in map(read_json, sorted(run.glob("score_*.json"))):
        if values.get("checkpoint") == weights_hash:  # and not of an earlier step
            about = (f"{values['n']} pictures, seed {values['seed']}, guidance {values['guidance']} {values['scale']:g}, "
                     f"{values['steps']} steps")
            scores += [f"| {name} | {values[name]:.4f} | {error:.4f} | {about} |" for name, error in values["error"].items()]
    use = USE_TRANSFORMER if builtin else USE_PIPELINE
    log = run / "log.txt"
    (out / "README.md").write_text(CARD.format(
        name=name, parameters=parameters, licence="mit" if sources == {"scenes"} and builtin else "other",
        picture="\n![samples](samples.png)\n" if grids else "",
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        use=use.format(name=name, side=side, steps=cfg.sample_steps, scale=cfg.scale),
        data="\n".join(f"- {line}" for line in data) or "Not recorded.",
        licences="\n".join(f"- {line}" for line in licences) or "Not recorded.",
        scores="\n".join(["| score | value | half of the 95% interval | of |", "| --- | --- | --- | --- |", *scores])
               if scores else "Not scored.",
        source=metadata.get("source", "unknown"), log=file_sha256(log) if log.is_file() else "unknown"))


def export(args) -> None:
    """`sample.py export`."""
    export_diffusers(args.checkpoint, args.out)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers: import


def import_weights(args) -> None:
    """`sample.py import`: a diffusers folder, or PRX's own names in a safetensors file -> a folder as a run's, to start from.

    Weights that draw latents give all but `img_in` and `final_layer.linear`, which are drawn anew for pixels.
    """
    source = download(args.source, args.revision)
    pipeline = source if (source / "transformer").is_dir() else None
    if is_diffusers(source):
        state, config, dtype = read_transformer(pipeline / "transformer" if pipeline else source)
    elif source.suffix == ".safetensors":
        state, config, dtype = read_prx(source), {}, torch.float32
    else:
        raise UserError(f"--from={args.source} is neither a diffusers folder nor a .safetensors file; pickled weights (.pt, "
                        ".bin) are never read")
    flags = {"patch": args.patch, "bottleneck": args.bottleneck, **model_flags(source, state)}
    half_head = flags["width"] // flags["heads"] // 2
    if config.get("axes_dim", [half_head, half_head]) != [half_head, half_head]:
        raise UserError(f"{source}: its axes_dim is {config['axes_dim']}, and ours are two equal halves of a head")

    record = PRESETS["record"]
    files = {name: source / name for name in ("model_index.json", "scheduler/scheduler_config.json")}
    index, scheduler = (read_json(file) if pipeline and file.is_file() else {} for file in files.values())
    encoder = args.text_encoder
    if encoder is None and (source / "text_encoder").is_dir():
        encoder = str(source / "text_encoder")
    elif encoder is None and flags["text_dim"] == record.text_dim:
        encoder = record.text_encoder
    elif encoder is None:
        raise UserError(f"{source} has no text encoder: name it with --text_encoder, a hub id, a folder or builtin")
    side = args.size or index.get("default_sample_size") or record.stages[0].image_size
    cfg = replace(record, name=re.sub(r"\W", "-", args.out.name), data="", frozen="none", guidance="cfg", text_encoder=encoder,
                  text_tokens=index.get("prompt_max_tokens", args.text_tokens), noise_scale=index.get("noise_scale", 1.0),
                  shift=scheduler.get("shift", record.shift), rope_theta=float(config.get("theta", record.rope_theta)),
                  stages=(Stage(side, 1, record.micro_batch, False),), repa_depth=min(record.repa_depth, flags["depth"]), **flags)
    check_config(cfg if len(cfg.route) else replace(cfg, drop=0.0))
    model = PRX(replace(cfg, repa_weight=0.0))
    anew = [] if "img_in.0.weight" in state else ["img_in", "final_layer.linear"]
    if anew:
        state = {name: t for name, t in state.items() if not name.startswith(tuple(anew))}
        state |= {name: t for name, t in model.state_dict().items() if name.startswith(tuple(anew))}
    model.load_weights(state, source)
    metadata = {"format": "nanoprx", "config": json.dumps(config_to_json(cfg)), "step": "0", "data": "{}",
                "source": f"imported from {Path(args.source).name}"}
    if pipeline and not anew:  # what it takes to export it again as it was
        metadata |= {"origin": str(pipeline.resolve()), "dtype": str(dtype).removeprefix("torch.")}
    with new_folder(args.out) as aside:
        safetensors.torch.save_file(model.state_dict(), aside / "ema.safetensors", metadata=metadata)
    print(f"{args.out}: width {cfg.width}, depth {cfg.depth}, patch {cfg.patch}, text encoder {cfg.text_encoder}"
          + (f"; it drew latents, so {' and '.join(anew)} start anew, for pixels" if anew else ""))
    other = [f"--{name}={value:g}" for name, value in flags.items() if value != getattr(record, name)]
    other += [f"--text_encoder={encoder}"] if encoder != record.text_encoder else []
    print(" ".join([f"train from it with --init={args.out}", *other]))


def download(source: str, revision: str | None) -> Path:
    """`source` itself if it is there, else the weights, configs and card of the hub's repository of that name; raises UserError."""
    if Path(source).exists():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"--from={source} does not exist, and is no name of a repository on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[
            "*.json", "README.md", "samples.png", "transformer/*.safetensors", "text_encoder/*.safetensors", "tokenizer/*"]))
    except (OSError, ValueError) as error:  # the hub's own errors are of these
        raise UserError(f"cannot download {source}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; "
                        f"access: https://huggingface.co/{source}") from None


def read_prx(file: Path) -> dict:
    """Weights under PRX's own names, which are ours, behind a common prefix or none; averaged ones if the file has both."""
    state, _ = read_safetensors(file)
    prefixes = [name.removesuffix("txt_in.weight") for name in state if name.endswith("txt_in.weight")]
    if not prefixes:
        raise UserError(f"{file} holds no weights of PRX: there is no txt_in.weight")
    prefix = max(prefixes, key=lambda prefix: "ema" in prefix)
    return {name.removeprefix(prefix): t.float() for name, t in state.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def curves(args) -> None:
    """`sample.py curves`: the runs' metrics.jsonl as pictures."""
    runs = [Path(run) for run in args.runs.split(",")]
    out = args.out or (runs[0] if runs[0].is_dir() else runs[0].parent) / "curves.png"
    draw_curves(runs, out)
    print(out)


def image_size(text: str) -> tuple[int, int]:
    """"512" or "512x768" (height x width) -> (H, W)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise ArgumentTypeError(f"{text!r} is not a size in pixels, such as 512 or 512x768 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def number(low: float, high: float, text: str) -> float:
    """A number in [low, high)."""
    with contextlib.suppress(ValueError):
        if low <= float(text) < high:
            return float(text)
    raise ArgumentTypeError(f"{text!r} is not a number in [{low:g}, {high:g})")


share, scale = partial(number, 0, 1), partial(number, 0, 1000)


def scale_list(text: str) -> list[float]:
    """Numbers, comma separated."""
    return [scale(part) for part in text.split(",")]


def interval(text: str) -> tuple[float, float]:
    """"0.2:0.8" -> (0.2, 0.8), in [0, 1]."""
    with contextlib.suppress(ValueError):
        low, high = map(float, text.split(":"))
        if 0 <= low <= high <= 1:
            return low, high
    raise ArgumentTypeError(f"{text!r} is not an interval LOW:HIGH of times from 0, data, to 1, noise")


def seed(text: str) -> int:
    """A whole number that a generator takes as its seed, with room for the seeds of a sheet."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^62")
    return int(text)


def seed_list(text: str) -> list[int]:
    """Seeds, comma separated."""
    return [seed(part) for part in text.split(",")]


def visible_device(text: str) -> str:
    """cpu, or cuda where there is one."""
    if text == "cpu" or (text == "cuda" and torch.cuda.is_available()):
        return text
    raise ArgumentTypeError(f"{text!r} is not cpu, nor cuda with a visible GPU")


def add_sampling_flags(parser: Parser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's folder or its ema.safetensors")
    parser.add_argument("--steps", type=positive, default=None, help="Euler steps (default: the run's)")
    parser.add_argument("--guidance", choices=["self", "cfg", "none"], default=None, help="dense against routed, prompt "
                        "against empty prompt, or none (default: the run's)")
    parser.add_argument("--scale", type=scale, default=None, help="guidance scale, 1 is none (default: the run's)")
    parser.add_argument("--interval", type=interval, default=None, help="times LOW:HIGH at which to guide, 1 is noise (default: "
                        "all)")
    parser.add_argument("--drop", type=share, default=None, help="share of tokens routed around in self guidance (default: the "
                        "run's)")
    parser.add_argument("--shift", type=partial(number, 1e-3, 1000), default=None, help="time shift, more is more steps near "
                        "noise (default: the run's)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first picture; the next has the next seed")
    parser.add_argument("--batch", type=positive, default=32, help="pictures at a time; changes no picture")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=0, help="torch.compile the blocks: half a minute, then "
                        "faster; for hundreds of pictures")
    parser.add_argument("--device", type=visible_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def build_parsers() -> dict[str, tuple[Parser, Callable]]:
    """One parser a command; "" is plain sampling."""
    drawer = Parser(prog="sample.py", description="Draw prompts. Other commands, each with --help: score, export, import, curves.")
    add_sampling_flags(drawer)
    drawer.add_argument("--prompt", action="append", default=None, help="what to draw; may be given several times")
    drawer.add_argument("--prompts", default=None, help="file with a prompt a line")
    drawer.add_argument("--n", type=positive, default=1, help="pictures a prompt")
    drawer.add_argument("--seeds", type=seed_list, default=None, help="comma list: the seeds of each prompt, in place of --seed "
                        "and --n")
    drawer.add_argument("--size", type=image_size, default=None, help="pixels, 512 or 512x768 (height x width) (default: the "
                        "run's last stage)")
    drawer.add_argument("--sweep", type=scale_list, nargs="?", const=[1.5, 2.0, 3.0, 5.0, 7.0], default=None, help="draw one "
                        "prompt with each kind of guidance at these scales, a comma list (1.5,2,3,5,7 if none is given)")
    drawer.add_argument("--like", type=Path, default=None, help="PNG of sample.py to draw again; other flags change what it says")
    drawer.add_argument("--out", type=Path, default=Path("out.png"), help="PNG to write, one picture or a sheet of several; or "
                        "a folder for one PNG a picture")

    scorer = Parser(prog="sample.py score", description="Score pictures of held-out prompts.")
    add_sampling_flags(scorer)
    scorer.add_argument("--metric", default="scenes", help=f"comma list of {', '.join(METRICS)} and held_out (the loss); "
                        "metric:network takes another network, a hub id or folder")
    scorer.add_argument("--data", default=None, help="data whose held-out rows are drawn, for all but scenes (default: the run's)")
    scorer.add_argument("--n", type=positive, default=256, help="pictures")
    scorer.add_argument("--level", choices=list(scenes.LEVELS), default="demo", help="level of the scenes")
    scorer.add_argument("--out", type=Path, default=None, help="PNG of the first 16 (default: score_METRIC.png beside the "
                        "checkpoint)")

    exporter = Parser(prog="sample.py export", description="Write a folder that diffusers opens, with a model card.")
    exporter.add_argument("--checkpoint", required=True, help="a run's folder or its ema.safetensors")
    exporter.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")

    record = PRESETS["record"]
    importer = Parser(prog="sample.py import", description="Bring weights of diffusers or of PRX here, to draw with or to start "
                      "from (--init).")
    importer.add_argument("--from", dest="source", required=True, help="folder of a diffusers pipeline or transformer, PRX's own "
                          "weights as .safetensors, or a repository on the hub")
    importer.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    importer.add_argument("--revision", default=None, help="commit, tag or branch on the hub")
    importer.add_argument("--text_encoder", default=None, help="hub id, folder or builtin (default: the folder's own)")
    importer.add_argument("--text_tokens", type=positive, default=record.text_tokens, help="tokens of a prompt, where the folder "
                          "does not say")
    importer.add_argument("--size", type=positive, default=None, help="pixels that it draws unless told (default: the folder's, "
                          f"else {record.stages[0].image_size})")
    importer.add_argument("--patch", type=positive, default=record.patch, help="of weights that drew latents: pixels a side of a "
                          "token")
    importer.add_argument("--bottleneck", type=positive, default=record.bottleneck, help="of weights that drew latents: "
                          "bottleneck of the pixels")

    plotter = Parser(prog="sample.py curves", description="Draw the curves of runs, over each other.")
    plotter.add_argument("--runs", required=True, help="comma list of runs' folders")
    plotter.add_argument("--out", type=Path, default=None, help="PNG to write (default: curves.png of the first run)")
    return {"": (drawer, on_ranks(sample)), "score": (scorer, on_ranks(score)), "export": (exporter, export),
            "import": (importer, import_weights), "curves": (plotter, curves)}


def on_ranks(command: Callable) -> Callable:
    """`command(args, device)` as a function of args, on all ranks that torchrun started, or on one."""
    def run(args) -> None:
        device, mesh = ranks.join(args.device == "cuda")
        with ranks.together(mesh):
            command(args, device)
        dist.barrier()
        dist.destroy_process_group()
    return run


def main(argv: list[str]) -> None:
    parsers = build_parsers()
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    if command not in parsers:
        raise UserError(f"unknown command {command}; known are {', '.join(filter(None, parsers))}, and sampling takes no command")
    parser, run = parsers[command]
    flags = argv[1:] if command else argv
    args = parser.parse_args(flags)
    if getattr(args, "like", None):
        args = parser.parse_args(flags_of(args.like, flags) + flags)
    run(args)


if __name__ == "__main__":
    run_main(main)
