"""Prompts -> pictures.

    python sample.py --checkpoint=runs/try1 --prompt="a large red circle in the top left" --n=4 --out=out.png
    python sample.py --checkpoint=runs/try1 --prompt="..." --sweep            guidance kinds and scales, one sheet
    python sample.py --checkpoint=runs/try1 --like=out.png --guidance=self    as that was drawn, but for the guidance
    torchrun --nproc_per_node=8 -- sample.py --checkpoint=runs/try1 --prompts=prompts.txt --out=pictures/

Reads `ema.safetensors` only: averaged weights, with the run's config in their metadata. Nothing is unpickled. What else
there is to do with weights: tools/score.py, tools/exchange.py (diffusers), tools/curves.py.
"""
import contextlib
import functools
import json
import logging
import os
import sys
import textwrap
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from train_prx import (
    CHOICES, PRX, Config, Parser, Stage, TextEncoder, UserError, check_config, compiler_trouble, compute_dtype, draw,
    file_sha256, gpu_trouble, load_text_encoder, run_main, sampling_settings)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

FORMER_FIELDS = {"init", "score", "score_every", "score_n", "track", "price", "keep_every"}  # of configs, of no use now


def config_from_json(values: dict) -> Config:
    """The inverse of `config_to_json`; raises UserError where a field is unknown or of another type."""
    values = {name: value for name, value in values.items() if name not in FORMER_FIELDS}
    if values.get("frozen") == "scene":  # a teacher of the former layout
        values["frozen"] = "pretrained"
    unknown = set(values) - {f.name for f in fields(Config)}
    if unknown:
        raise UserError(f"config has fields that this version does not know: {', '.join(sorted(unknown))}")
    stages = tuple(Stage(**stage) for stage in values["stages"])
    cfg = Config(**values | {"stages": stages, "adam_betas": tuple(map(float, values["adam_betas"]))})
    for part in (cfg, *stages):
        for f in fields(part):
            value, valid = getattr(part, f.name), (float, int) if f.type is float else (f.type,)
            if f.type in (bool, int, float, str) and type(value) not in valid:
                raise UserError(f"config has {f.name} {value!r}, which is no {f.type.__name__}")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise UserError(f"config has {name} {getattr(cfg, name)!r}, which is none of {', '.join(choices)}")
    if not stages:
        raise UserError("config has no stage")
    return cfg


def weights_file(path: str | Path) -> Path:
    """The safetensors file that `path`, a run's folder or the file itself, stands for; raises UserError."""
    file = Path(path) / "ema.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {path}: it takes a run's folder (runs/NAME) or its ema.safetensors, "
                        "which train_prx.py writes at its first save")
    return file


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a run's folder or a safetensors file, in fp32, and the file's metadata; raises UserError."""
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file} is damaged: {name} is of {tensor.dtype}, and weights are floating-point numbers")
        state[name] = tensor.float()
        if not state[name].isfinite().all():
            raise UserError(f"{file} is damaged: {name} has values that are not finite in fp32")
    return state, metadata


def fill(model: PRX, state: dict[str, Tensor], source: str | Path) -> None:
    """Make tensors the weights of a model, on any device; raises UserError unless names and shapes are the model's."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() | state.keys()):
        ours, theirs = (tuple(tensors[name].shape) if name in tensors else "none" for tensors in (parameters, state))
        if ours != theirs:
            raise UserError(f"{source}: {name} has shape {theirs}, but the model's is {ours}")
    model.load_state_dict(state, assign=True)


def read_checkpoint(path: str | Path) -> tuple[PRX, Config, dict[str, str]]:
    """The averaged weights of a run in fp32 on the CPU, its config, and the file's metadata.

    Raises UserError where the file is no nanoPRX checkpoint, is damaged, or has not the tensors that its config says.
    """
    if any((Path(path) / name).is_file() for name in ("config.json", "transformer/config.json")):
        raise UserError(f"{path} is of diffusers: first `python tools/exchange.py import --from={path} --out=DIR`")
    file = weights_file(path)
    state, metadata = read_weights(file)
    if metadata.get("format") != "nanoprx":
        raise UserError(f"{file} is not a nanoPRX checkpoint: its metadata has no config")
    try:
        cfg = config_from_json(json.loads(metadata["config"]))
        check_config(replace(cfg, name="any"))
        if cfg.depth > len(state):  # or building so many would take minutes
            raise UserError(f"its config says {cfg.depth} blocks, and it has {len(state)} tensors")
        with torch.device("meta"):
            model = PRX(cfg)
    except Exception as error:  # a damaged config raises almost anything
        reason = error if isinstance(error, UserError) else f"its config is damaged ({type(error).__name__})"
        raise UserError(f"{file}: {reason}") from None
    model.repa_projector = None  # stays with the run
    fill(model, state, file)
    return model.eval().requires_grad_(False), cfg, metadata


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[PRX, Config, TextEncoder]:
    """The averaged weights of a run: (model in eval mode on `device`, its config, prompts -> (txt, txt_mask)).

    Model and text encoder compute in what `precision=auto` is on `device`. Raises UserError as `read_checkpoint` does.
    """
    model, cfg, _ = read_checkpoint(path)
    device = torch.device(device)
    dtype = compute_dtype(replace(cfg, precision="auto"), device)
    return model.to(device, dtype), cfg, load_text_encoder(cfg, device, dtype)


def usable_device() -> str:
    """"cuda" where there is a GPU, else "cpu"; a GPU that cannot be used is said on stderr, once a node."""
    if gpu_trouble() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: this machine's GPU is not used: {gpu_trouble()}", file=sys.stderr)
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(args: Namespace) -> tuple[PRX, Config, TextEncoder, torch.device]:
    """`load_checkpoint` as --checkpoint, --device and --compile say, and the device: the next GPU for each process."""
    if args.device == "cuda" and (gpu_trouble() or not torch.cuda.is_available()):
        raise UserError(f"--device=cuda: {gpu_trouble() or 'no GPU is visible'}")
    device = torch.device(args.device or usable_device())
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if args.compile and compiler_trouble(device):
        raise UserError(f"--compile=1: {compiler_trouble(device)}")
    model, cfg, encode_text = load_checkpoint(args.checkpoint, device)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of absent CUDA
    torch._dynamo.config.recompile_limit = 64  # a block compiles for each batch, routed or not, and 32 tokens of text
    for block in model.blocks if args.compile else []:
        block.compile(dynamic=False)
    return model, cfg, encode_text, device


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def settings_of(args: Namespace, cfg: Config, size: tuple[int, int]) -> dict:
    """The settings of `generate`: the flags where given, else those of the run's own samples. Raises UserError."""
    if size[0] % cfg.patch or size[1] % cfg.patch:
        raise UserError(f"--size={size[0]}x{size[1]}: both must be multiples of the patch, {cfg.patch}")
    flags = {name: vars(args)[name] for name in ("sample_steps", "guidance", "scale", "drop", "shift")}
    given = {name: value for name, value in flags.items() if value is not None}
    sides = tuple(replace(cfg.stages[-1], image_size=side) for side in size)
    asked = replace(cfg, name="any", stages=sides, **given)
    check_config(asked)
    return {**sampling_settings(asked), "interval": args.interval}


def to_uint8(x0: torch.Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def draw_batches(model: PRX, encode_text: TextEncoder, prompts: list[str], seeds: list[int], size: tuple[int, int],
                 batch: int, items: list[int], **settings) -> Iterator[tuple[list[int], np.ndarray]]:
    """The pictures of the given items of `prompts` and `seeds`, `batch` at a time: (their items, uint8 [B, H, W, 3]).

    A picture depends on its prompt, seed and settings (those of `generate`) alone. Raises UserError if memory is full.
    """
    with tqdm(total=-(-len(items) // batch) * settings["steps"], desc="sampling", unit=" steps", delay=1,
              disable=os.environ.get("RANK", "0") != "0" or None) as bar:  # None: quiet where stderr is no terminal
        for first in range(0, len(items), batch):
            part = items[first : first + batch]
            try:
                x0 = draw(model, encode_text, [prompts[i] for i in part], [seeds[i] for i in part], size,
                          after_step=bar.update, **settings)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; the second is the CPU's
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                what = f"{len(part)} pictures of {size[1]} x {size[0]} px at a time"
                raise UserError(f"out of memory with {what}: pass a lower --batch, or a smaller --size") from None
            yield part, to_uint8(x0)


def sample(args: Namespace) -> None:
    """Draw one picture, a sheet of several, or a folder, which the processes that torchrun started share."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    is_folder, prompts = not args.out.suffix, args.prompts or args.prompt
    seeds = args.seeds or list(range(args.seed, args.seed + args.n))
    if not prompts:
        raise UserError('nothing to draw: give --prompt="..." or --prompts=FILE with a prompt a line')
    if args.sweep and (len(prompts) * len(seeds) > 1 or is_folder):
        raise UserError("--sweep draws a sheet of one prompt and seed: one --prompt, no --n, and --out=FILE.png")
    repeated = [prompt for prompt in prompts for _ in seeds]
    each = [seed + args.seed_step * p for p in range(len(prompts)) for seed in seeds]
    names = [f"{i // len(seeds):05d}-{seed}.png" for i, seed in enumerate(each)]
    of_others = {name for i, name in enumerate(names) if i % world != rank}  # which may be there by now
    if is_folder and any(path.name not in of_others for path in args.out.glob("*")):
        raise UserError(f"--out={args.out} exists and is not empty: name another folder")
    if not is_folder and rank > 0:
        return  # the first one draws it alone

    model, cfg, encode_text, _ = load(args)
    size = args.size or (cfg.stages[-1].image_size, cfg.stages[-1].image_size)
    settings = settings_of(args, cfg, size)
    said = {"size": f"{size[0]}x{size[1]}", **settings, "interval": "{}:{}".format(*args.interval),
            "checkpoint": file_sha256(weights_file(args.checkpoint))}
    mine = [i for i in range(len(each)) if not is_folder or i % world == rank]
    draw_mine = functools.partial(draw_batches, model, encode_text, repeated, each, size, args.batch, mine)
    if args.sweep:  # a row for each kind of guidance, first without it, then at each scale
        kinds = ("self", "cfg") if len(cfg.route) else ("cfg",)
        pairs = [(kind, scale) for kind in kinds for scale in (1.0, *args.sweep)]
        images = [x for kind, scale in pairs for _, x in draw_mine(**settings | {"guidance": kind, "scale": scale})]
        labels = ["no guidance" if scale == 1 else f"{kind}, scale {scale:g}" for kind, scale in pairs]
        sheet = draw_grid(np.concatenate(images), labels, columns=1 + len(args.sweep), title=prompts[0])
        scales = ",".join(map(str, args.sweep))
        save_picture(sheet, args.out, prompt=prompts[0], seed=seeds[0], sweep=scales, **said)
    elif is_folder or len(each) == 1:
        for items, images in draw_mine(**settings):
            for i, image in zip(items, images):
                path = args.out / names[i] if is_folder else args.out
                save_picture(Image.fromarray(image), path, prompt=repeated[i], seed=each[i], **said)
    else:
        images = np.concatenate([images for _, images in draw_mine(**settings)])
        sheet = draw_grid(images, repeated, columns=max(len(seeds), 4))
        save_picture(sheet, args.out, prompts=prompts, seeds=seeds, seed_step=args.seed_step, **said)
    print(f"{args.out}: {len(mine)} of {len(each)} image(s), {size[1]} x {size[0]} px, seeds from {seeds[0]}")


def draw_grid(images: np.ndarray, prompts: list[str], columns: int = 4, title: str = "") -> Image.Image:
    """Images uint8 [B, H, W, 3] as a sheet, each with its prompt below; small ones are enlarged to 192px."""
    H, W = images.shape[1:3]
    zoom, columns = max(1, 192 // W), min(columns, len(images))
    font, large = ImageFont.load_default(size=12), ImageFont.load_default(size=15)
    head = wrap(title, large, columns * (W * zoom + 8) - 8)
    lines = [wrap(prompt, font, W * zoom)[:6] for prompt in prompts]
    top = 12 + 20 * len(head) if head else 0
    cell_w, cell_h = W * zoom + 8, H * zoom + 16 + 15 * max(1, *map(len, lines))
    sheet = Image.new("RGB", (columns * cell_w, top + -(-len(images) // columns) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 6), "\n".join(head), fill="black", font=large, spacing=5)
    for i, (image, text) in enumerate(zip(images, lines)):
        x, y = i % columns * cell_w + 4, top + i // columns * cell_h + 4
        sheet.paste(Image.fromarray(image).resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + H * zoom + 3), "\n".join(text), fill="black", font=font)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of text, each at most `width` pixels wide."""
    letters = max(1, int(width / font.getlength("i")))
    while letters > 1 and any(font.getlength(line) > width for line in textwrap.wrap(text, letters)):
        letters -= 1
    return textwrap.wrap(text, letters)


def save_picture(picture: Image.Image, path: Path, **said) -> None:
    """Write a PNG that says of itself what is `said`, its folder too if need be; raises UserError where it cannot."""
    text = PngInfo()
    for key, value in said.items():
        text.add_text(key, value if isinstance(value, str) else json.dumps(value))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", pnginfo=text)
    except OSError as error:
        raise UserError(f"cannot write --out={path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def checked(convert: Callable, is_valid: Callable, meaning: str) -> Callable:
    """The type of a flag: text -> value; where that cannot be, or is not valid, argparse's error with the `meaning`."""
    def parse(text: str):
        with contextlib.suppress(ValueError, OSError):
            value = convert(text)
            if is_valid(value):
                return value
        raise ArgumentTypeError(f"{text!r} is not {meaning}")
    return parse


WHOLE = checked(int, lambda n: 0 < n < 10**7, "a whole number of at least 1 and below 10 million")
SEED = checked(int, lambda n: 0 <= n < 2**62, "a whole number from 0 to below 2^62")  # with room for those of a sheet


def add_sampling_flags(parser: Parser) -> None:
    """The flags of every command that draws."""
    add = parser.add_argument
    add("--steps", type=WHOLE, dest="sample_steps", metavar="STEPS", help="Euler steps (default: the run's)")
    add("--guidance", choices=["self", "cfg", "none"], help="dense against routed, or prompt against empty (the run's)")
    add("--scale", type=float, help="guidance scale, 1 is none (default: the run's)")
    add("--interval", default="0:1", help="times LOW:HIGH at which to guide, from 0, data, to 1, noise", type=checked(
        lambda text: tuple(map(float, text.split(":"))), lambda x: len(x) == 2 and 0 <= x[0] <= x[1] <= 1, "LOW:HIGH"))
    add("--drop", type=float, help="share of tokens routed around in self guidance (default: the run's)")
    add("--shift", type=float, help="time shift, more is more steps near noise (default: the run's)")
    add("--seed", type=SEED, default=0, help="seed of the first picture; the next has the next seed")
    add("--batch", type=WHOLE, default=32, help="pictures at a time; changes no picture")
    add("--compile", type=int, choices=[0, 1], default=0, help="torch.compile: half a minute, then faster")
    add("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda where there is a GPU)")


def flags_of(args: Namespace, given: list[str]) -> list[str]:
    """The flags that draw the picture of --like again, from its text; those `given` follow, and count instead."""
    try:
        with PngImageFile(args.like) as picture:  # not Image.open, which refuses large ones; text comes before pixels
            text = picture.text
        drawn_by = text["checkpoint"]
        prompts = json.loads(text["prompts"]) if "prompts" in text else [text["prompt"]]
        seeds = list(map(str, json.loads(text["seeds"]))) if "seeds" in text else [text["seed"]]
        prompt_flags = [f"--prompt={prompt}" for prompt in prompts]
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--like={args.like} is damaged or not by sample.py ({type(error).__name__})") from None
    if drawn_by != file_sha256(weights_file(args.checkpoint)):
        raise UserError(f"--like={args.like} was drawn by weights of sha256 {drawn_by[:12]}, not by {args.checkpoint}")
    names = {flag.partition("=")[0] for flag in given}
    flags = [] if names & {"--prompt", "--prompts"} else prompt_flags
    if not names & {"--seed", "--seeds"}:
        flags.append(f"--seed={seeds[0]}" if "--n" in names else f"--seeds={','.join(seeds)}")
    same = ("size", "steps", "guidance", "scale", "interval", "drop", "shift", "sweep", "seed_step")
    return [*flags, *(f"--{name}={text[name]}" for name in same if name in text), *given]


def main(argv: list[str]) -> None:
    moved = {"score": "score.py", "export": "exchange.py export", "import": "exchange.py import", "curves": "curves.py"}
    if argv and argv[0] in moved:
        raise UserError(f"`sample.py {argv[0]}` is `python tools/{moved[argv[0]]}` now (--help lists its flags)")
    parser = Parser(prog="sample.py", description="Draw prompts: one picture, a sheet of several, or a folder.")
    add_sampling_flags(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's folder or its ema.safetensors")
    add("--prompt", action="append", help="what to draw; may be given several times",
        type=checked(lambda text: text.encode().decode(), lambda text: True, "UTF-8 text"))
    add("--prompts", help="file with a prompt a line", type=checked(
        lambda file: list(filter(None, map(str.strip, Path(file).read_text().splitlines()))), bool, "a prompt file"))
    add("--seed_step", type=int, choices=[0, 1], default=0, help="added to the seeds from one prompt to the next")
    add("--n", type=WHOLE, default=1, help="pictures a prompt")
    add("--seeds", help="comma list: the seeds of each prompt, in place of --seed and --n", type=checked(
        lambda text: list(map(SEED, text.split(","))), lambda n: len(set(n)) == len(n), "a list without repeats"))
    add("--size", help="pixels, 512 or 512x768 (height x width) (default: the run's last stage)", type=checked(
        lambda text: tuple(map(int, text.split("x") * (1 if "x" in text else 2))),
        lambda size: len(size) == 2 and 0 < min(size) <= max(size) < 10**6, "a size in pixels, such as 512 or 512x768"))
    add("--sweep", nargs="?", const=[1.5, 2.0, 3.0, 5.0, 7.0], type=checked(
        lambda text: list(map(float, text.split(","))), lambda x: 0 <= min(x) <= max(x) < 1000, "a list of scales"),
        help="draw one prompt with each kind of guidance at these scales, a comma list (1.5,2,3,5,7 if none is given)")
    add("--like", type=Path, help="PNG of sample.py to draw again; other flags change what it says")
    add("--out", default="out.png", help="PNG of one picture or a sheet of several; or a folder for one PNG a picture",
        type=checked(Path, lambda path: path.suffix in (".png", ""), "a PNG, ending in .png, or a folder, without"))
    args = parser.parse_args(argv)
    sample(parser.parse_args(flags_of(args, argv)) if args.like else args)


if __name__ == "__main__":
    run_main(main)
