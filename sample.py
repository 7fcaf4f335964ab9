"""Prompts -> pictures, their scores, and a door to diffusers.

    python sample.py --checkpoint=runs/try1 --prompt="a large red circle in the top left" --n=4 --out=out.png
    python sample.py --checkpoint=runs/try1 --prompt="..." --sweep                      guidance kinds and scales, one sheet
    torchrun --nproc_per_node=8 -- sample.py --checkpoint=runs/try1 --prompts=prompts.txt --out=pictures/
    python sample.py score  --checkpoint=runs/try1 --metric=scenes
    python sample.py export --checkpoint=runs/try1 --out=export/
    python sample.py import --from=Photoroom/prx-512-t2i --out=imported/
    python sample.py curves --runs=runs/try1,runs/try2 --out=curves.png

Reads `ema.safetensors` only: averaged weights, with the run's config in their metadata. Nothing is unpickled. How pictures
are scored is in metrics.py, what curves show in curves.py, what is exported and imported in exchange.py.
"""

import contextlib
import json
import logging
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from tqdm import tqdm

import ranks
import scenes
from curves import draw_curves
from exchange import export_diffusers, import_weights, read_checkpoint
from metrics import METRICS, Scorer, gather_rows, level_of, my_share, rank_and_world, resample_weights, to_score
from run_folder import draw_grid
from shards import RowSet, file_sha256, read_manifest
from train_prx import (PRESETS, PRX, Chunks, Config, Parser, TextEncoder, UserError, compiler_trouble, compute_dtype, draw, gpu_trouble,
                       held_out_losses, load_text_encoder, run_main, sampling_settings, to_uint8, usable_device)
from weights import weights_file

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[PRX, Config, TextEncoder]:
    """The averaged weights of a run: (model in eval mode on `device`, its config, prompts -> (txt, txt_mask)).

    Model and text encoder compute in what `precision=auto` is on `device`. Raises UserError as `read_checkpoint` does.
    """
    model, cfg, _ = read_checkpoint(path)
    device = torch.device(device)
    dtype = compute_dtype(replace(cfg, precision="auto"), device)
    return model.to(device, dtype), cfg, load_text_encoder(cfg, device, dtype)


def load(args, device: torch.device) -> tuple[PRX, Config, TextEncoder]:
    """`load_checkpoint` as the flags say."""
    model, cfg, encode_text = load_checkpoint(args.checkpoint, device)
    if args.compile and compiler_trouble(device):
        raise UserError(f"--compile=1: {compiler_trouble(device)}")
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
    quiet = rank_and_world()[0] > 0 or None  # None: quiet where stderr is no terminal
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
    dist.barrier()  # before any rank writes there
    model, cfg, encode_text = load(args, device)
    weights_hash = file_sha256(weights_file(args.checkpoint))
    if args.like and (other := read_text(args.like)["checkpoint"]) != weights_hash:
        raise UserError(f"--like={args.like} was drawn with a checkpoint of sha256 {other[:12]}, and {args.checkpoint} has "
                        f"{weights_hash[:12]}")
    side = cfg.stages[-1].image_size
    size = args.size or (side, side)
    settings = settings_of(args, cfg, size)
    said = {"size": f"{size[0]}x{size[1]}", **settings, "interval": "{}:{}".format(*settings["interval"]),
            "checkpoint": weights_hash}
    is_main = dist.get_rank() == 0
    if args.sweep:
        sheet = sweep(model, cfg, encode_text, prompts[0], seeds[0], size, args.batch, args.sweep, settings)
        if is_main:
            scales = ",".join(map(str, args.sweep))
            save_picture(sheet, args.out, prompt=prompts[0], seed=seeds[0], sweep=scales, **said)
            print(f"{args.out}: scales {scales}, {settings['steps']} steps, seed {seeds[0]}")
        return
    repeated, each = [prompt for prompt in prompts for _ in seeds], seeds * len(prompts)
    if args.out.suffix:
        images = sample_images(model, encode_text, repeated, each, size, args.batch, **settings)
        if is_main and len(images) == 1:
            save_picture(Image.fromarray(images[0]), args.out, prompt=prompts[0], seed=seeds[0], **said)
        elif is_main:
            save_picture(draw_grid(images, repeated, columns=max(len(seeds), 4)), args.out, prompts=prompts, seeds=seeds, **said)
    else:
        mine = list(range(len(repeated)))[dist.get_rank() :: dist.get_world_size()]
        for items, images in draw_batches(model, encode_text, repeated, each, size, args.batch, mine, **settings):
            for i, image in zip(items, images):
                name = f"{i // len(seeds):05d}-{each[i]}.png"
                save_picture(Image.fromarray(image), args.out / name, prompt=repeated[i], seed=each[i], **said)
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
    if any("\ud800" <= letter <= "\udfff" for prompt in args.prompt for letter in prompt):  # what Python makes of other bytes
        raise UserError("--prompt is not UTF-8 text")
    return args.prompt


def settings_of(args, cfg: Config, size: tuple[int, int]) -> dict:
    """The settings of `generate`: the flags where given, else what the run drew its own samples with. Raises UserError."""
    given = {name: getattr(args, name) for name in SETTINGS}
    settings = {"interval": (0.0, 1.0), **sampling_settings(cfg), **{name: x for name, x in given.items() if x is not None}}
    if settings["guidance"] == "self" and len(cfg.route) == 0:
        raise UserError(f"--guidance=self needs routed blocks, and {args.checkpoint} has none: use cfg or none")
    if size[0] % cfg.patch or size[1] % cfg.patch:
        raise UserError(f"--size={size[0]}x{size[1]}: both must be multiples of the patch, {cfg.patch}")
    N = size[0] * size[1] // cfg.patch**2
    if N == round(N * settings["drop"]) and (settings["guidance"] == "self" or getattr(args, "sweep", None)):
        raise UserError(f"--drop={settings['drop']} leaves none of the {N} tokens of {size[0]}x{size[1]} pixels")
    return settings


def read_text(file: Path) -> dict[str, str]:
    """The text of a PNG; raises UserError where there is none of ours."""
    try:
        with PngImageFile(file) as picture:  # not Image.open, which refuses large ones: the text comes before the pixels
            text = dict(picture.text)
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: Pillow's, of a file that is no PNG
        raise UserError(f"cannot read --like={file}: {error}") from None
    if not text.keys() >= {"size", "steps", "guidance", "checkpoint"}:
        raise UserError(f"--like={file} was not drawn by sample.py: it does not say how")
    return text


def flags_of(file: Path, given: list[str]) -> list[str]:
    """The flags that draw a PNG again, from its text; those that are `given` anyway are left out."""
    text = read_text(file)
    try:
        prompts = list(map(str, json.loads(text["prompts"]))) if "prompts" in text else [text["prompt"]]
        seeds = ",".join(map(str, json.loads(text["seeds"]) if "seeds" in text else [text["seed"]]))
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"--like={file} is damaged: it does not say what it shows") from None
    names = {flag.partition("=")[0].removeprefix("--") for flag in given if flag.startswith("--")}
    flags = [] if names & {"prompt", "prompts"} else [f"--prompt={prompt}" for prompt in prompts]
    if not names & {"seed", "seeds"}:
        flags.append(f"--seed={seeds.partition(',')[0]}" if "n" in names else f"--seeds={seeds}")
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


def save_picture(picture: Image.Image, path: Path, **said) -> None:
    """Write a PNG that says of itself what is `said`, its folder too if need be; raises UserError where that cannot be."""
    text = PngInfo()
    for key, value in said.items():
        text.add_text(key, value if isinstance(value, str) else json.dumps(value))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", pnginfo=text)
    except OSError as error:
        raise UserError(f"cannot write --out={path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Scores

MEANING = {"objects": "right colour in the right place", "exact": "and right shape, size and texture", "colour": "right colour",
           "place": "something is there", "size": "right size", "shape": "right shape", "texture": "right texture",
           "background": "right background", "scenes": "every object exact, nothing else",
           "cmmd": "CLIP embeddings, MMD x 1000", "mmd": "DINOv2 embeddings, MMD x 1000", "fdd": "Frechet distance, DINOv2",
           "fid": "Frechet distance, Inception-v3", "held_out": "flow-matching loss of held-out rows"}


def score(args, device: torch.device) -> None:
    """`sample.py score`: pictures of held-out prompts beside what they should be; writes score_METRIC.json and .png."""
    wanted = [metric.strip() for metric in args.metric.split(",")]
    of_pictures = [metric for metric in wanted if metric != "held_out"]
    if unknown := [metric for metric in of_pictures if metric.partition(":")[0] not in METRICS]:
        raise UserError(f"--metric={unknown[0]}: known are {', '.join(METRICS)} and held_out")
    model, cfg, encode_text = load(args, device)
    cfg = replace(cfg, data=args.data or cfg.data)
    stage, file = cfg.stages[-1], weights_file(args.checkpoint)
    side, folders, sets = stage.image_size, [part.partition(":")[0] for part in cfg.data.split(",")], []
    settings = settings_of(args, cfg, (side, side))
    if wanted != ["scenes"]:
        sets = [RowSet(folder, replace(cfg, text_encoder="builtin"), side) for folder in folders]
    level = args.level or level_of(read_manifest(folders[0]) if (Path(folders[0]) / "manifest.json").is_file() else {})
    results, shown = {}, {}  # metric -> name -> Score; round -> pictures and prompts
    of = {}  # metric -> how many pictures, and by which network

    if of_pictures:
        scorer = Scorer(",".join(of_pictures), sets, args.n, device, level=level, seed=args.seed, batch=args.batch)
        found = scorer(lambda prompts, seeds: to_uint8(draw(model, encode_text, prompts, seeds, (side, side), **settings)))
        for name, value in found.items():
            metric, _, of_scenes = name.partition("_")
            results.setdefault(metric, {})[of_scenes or metric] = value
            network = scorer.networks[metric].key if metric in scorer.networks else ""
            of[metric] = {"n": len(scorer.scenes if metric == "scenes" else scorer.prompts), "network": network}
        shown = scorer.shown
    if "held_out" in wanted:
        losses = held_out_losses(model, Chunks(cfg, stage, 0), encode_text, cfg, device, args.n).cpu().double()
        if len(losses) == 0:
            raise UserError(f"--data={cfg.data} has no held-out rows: it is too small")
        results["held_out"] = {"held_out": to_score(resample_weights(len(losses)) @ losses)}
        of["held_out"] = {"n": len(losses), "network": ""}

    if dist.get_rank() > 0:
        return
    for metric, scores in results.items():
        print(f"{args.checkpoint}: {metric} of {of[metric]['n']}, {side}px, guidance {settings['guidance']} {settings['scale']:g}, "
              f"{settings['steps']} steps; +- is half of the 95% interval")
        for name, (value, error) in scores.items():
            percent = f"{100 * value:6.1f}% +- {100 * error:.1f}"
            print(f"  {name:10}{percent if metric == 'scenes' else f'{value:8.4f} +- {error:.4f}'}  {MEANING[name]}")
    about = {"seed": args.seed, "level": level, "image_size": side, **settings, "checkpoint": file_sha256(file),
             "data": {s.folder: s.manifest_hash for s in sets}}
    try:
        for metric, scores in results.items():
            values, errors = ({name: pair[k] for name, pair in scores.items()} for k in (0, 1))
            written = {**of[metric], **about, **values, "error": errors}
            file.with_name(f"score_{metric}.json").write_text(json.dumps(written, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the scores beside {file}: {error.strerror}") from None
    for kind, (images, prompts) in shown.items():
        metric = "scenes" if kind == "scenes" else next(name for name in results if name not in ("scenes", "held_out"))
        grid = file.with_name(f"score_{metric}.png")
        if args.out:  # a sheet of its own for either kind
            grid = args.out if len(shown) == 1 else args.out.with_stem(f"{args.out.stem}_{kind}")
        save_picture(draw_grid(images, prompts), grid, metrics=args.metric, **about)
        print(f"grid: {grid}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def export(args) -> None:
    """`sample.py export`."""
    export_diffusers(args.checkpoint, args.out)


def import_(args) -> None:
    """`sample.py import`."""
    import_weights(**vars(args))


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
    if not re.fullmatch(r"\d{1,7}", text) or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1" + " and below 10 million" * text.isdecimal())
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


def seed(text: str, limit: int = 2**62) -> int:
    """A whole number that a generator takes as its seed, with room for the seeds of a sheet."""
    if not text.isdecimal() or int(text) >= limit:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0 to below 2^{limit.bit_length() - 1}")
    return int(text)


def seed_list(text: str) -> list[int]:
    """Different seeds, comma separated."""
    seeds = [seed(part, 2**63) for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise ArgumentTypeError(f"{text!r} has a seed twice")
    return seeds


def visible_device(text: str) -> str:
    """cpu, or cuda where there is one."""
    if text == "cpu":
        return text
    trouble = gpu_trouble() or "no GPU is visible"
    if text == "cuda" and torch.cuda.is_available():
        return text
    raise ArgumentTypeError(f"{text!r} is not cpu, nor cuda here: {trouble}")


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
    parser.add_argument("--device", type=visible_device, default=None, help="cpu or cuda (default: cuda where there is a GPU)")


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
    scorer.add_argument("--level", choices=list(scenes.LEVELS), default=None, help="level of the scenes (default: the data's)")
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
            "import": (importer, import_), "curves": (plotter, curves)}


def on_ranks(command: Callable) -> Callable:
    """`command(args, device)` as a function of args, on all ranks that torchrun started, or on one."""
    def run(args) -> None:
        device, mesh = ranks.join((args.device or usable_device()) == "cuda")
        with ranks.together(mesh):
            try:
                command(args, device)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                raise UserError(f"out of memory with {args.batch} pictures at a time: pass a lower --batch, or a smaller "
                                "--size") from None
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
