"""Prompts -> pictures, their scores, and a door to diffusers.

    python sample.py --checkpoint=runs/try1 --prompt="a large red circle in the top left" --n=4 --out=out.png
    python sample.py score  --checkpoint=runs/try1 --metric=scenes
    python sample.py export --checkpoint=runs/try1 --out=export/

Reads `ema.safetensors` only: averaged weights, with the run's config in their metadata. Nothing is unpickled.
"""

import hashlib
import json
import logging
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

import scenes
from train_prx import (PRX, Config, Parser, TextEncoder, UserError, compiles, config_from_json, draw_grid, generate,
                       load_text_encoder, run_main, to_uint8)

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def weights_file(path: str | Path) -> Path:
    """The safetensors file that `path`, a run's folder or the file itself, stands for; raises UserError."""
    file = Path(path) / "ema.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {path}: it takes a run's folder (runs/NAME) or its ema.safetensors, "
                        "which train_prx.py writes at its first save")
    return file


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> tuple[PRX, Config, TextEncoder]:
    """The averaged weights of a run: (model in eval mode on `device`, its config, prompts -> (txt, txt_mask)).

    Weights are bf16 on a GPU and fp32 on the CPU. Raises UserError where the file is not a nanoPRX checkpoint, is
    damaged, or holds tensors of other names or shapes than its config says.
    """
    file, device = weights_file(path), torch.device(device)
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if metadata.get("format") != "nanoprx":
        raise UserError(f"{file} is not a nanoPRX checkpoint: its metadata has no config")
    try:
        cfg = config_from_json(json.loads(metadata["config"]))
        with torch.device("meta"):
            model = PRX(cfg)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # a damaged config raises almost anything
        raise UserError(f"{file}: its config is damaged ({type(error).__name__})") from None
    model.repa_projector = None  # stays with the run
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f"{file}: {name} has shape {found.get(name, 'none')}, but its config says {expected.get(name, 'none')}")
    if any(t.dtype != torch.float32 for t in state.values()):
        raise UserError(f"{file} is damaged: its tensors are not all fp32")
    model.load_state_dict(state, assign=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(device, dtype).eval().requires_grad_(False), cfg, load_text_encoder(cfg, device)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_images(model: PRX, encode_text: TextEncoder, prompts: list[str], seeds: list[int], size: tuple[int, int],
                  batch: int, **settings) -> np.ndarray:
    """Pictures uint8 [len(prompts), H, W, 3], `batch` at a time; a picture depends on its prompt, seed and settings only.

    settings: steps, guidance, scale, drop and shift of `train_prx.generate`.
    """
    device = next(model.parameters()).device
    null_txt, null_mask = encode_text([""])
    images = []
    for first in tqdm(range(0, len(prompts), batch), desc="sampling", unit=" batches", disable=len(prompts) <= batch):
        txt, txt_mask = encode_text(prompts[first : first + batch])
        x0 = generate(model, txt.to(device), txt_mask.to(device), null_txt=null_txt, null_mask=null_mask, size=size,
                      seeds=seeds[first : first + batch], **settings)
        images.append(to_uint8(x0))
    return np.concatenate(images)


def load(args) -> tuple[PRX, Config, TextEncoder]:
    """`load_checkpoint` as the flags say."""
    model, cfg, encode_text = load_checkpoint(args.checkpoint, args.device)
    if args.compile and not compiles(replace(cfg, compile=True), torch.device(args.device)):
        raise UserError("--compile=1 takes a C++ compiler: g++, or the one that CXX names")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of absent CUDA
    torch._dynamo.config.recompile_limit = 64  # a block compiles for each batch size, routed or not, and 32 tokens of text
    for block in model.blocks if args.compile else []:
        block.compile(dynamic=False)
    return model, cfg, encode_text


def sample(args) -> None:
    """`sample.py`: draw prompts and write one picture, or a sheet of several."""
    if args.prompts is not None:
        try:
            prompts = [line.strip() for line in Path(args.prompts).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts={args.prompts}: {error}") from None
        if not prompts:
            raise UserError(f"--prompts={args.prompts} has no prompt: write one a line")
    elif args.prompt is not None:
        prompts = [args.prompt]
    else:
        raise UserError('nothing to draw: give --prompt="..." or --prompts=FILE with a prompt a line')
    model, cfg, encode_text = load(args)
    settings = sampling_settings(args, cfg)
    side = cfg.stages[-1].image_size
    size = args.size or (side, side)
    for length in size:
        if length % cfg.patch:
            raise UserError(f"--size={size[0]}x{size[1]}: both must be multiples of the patch, {cfg.patch}")
    repeated = [prompt for prompt in prompts for _ in range(args.n)]
    seeds = [args.seed + i for _ in prompts for i in range(args.n)]
    images = sample_images(model, encode_text, repeated, seeds, size, args.batch, **settings)
    picture = Image.fromarray(images[0]) if len(images) == 1 else draw_grid(images, repeated, columns=max(args.n, 4))
    text = PngInfo()
    weights_hash = hashlib.sha256(weights_file(args.checkpoint).read_bytes()).hexdigest()
    for key, value in {"prompts": prompts, "n": args.n, "seed": args.seed, "size": size, **settings, "checkpoint": weights_hash}.items():
        text.add_text(key, json.dumps(value))
    save_picture(picture, args.out, text)
    print(f"{args.out}: {len(images)} image(s) of {size[1]} x {size[0]} px, guidance {settings['guidance']} "
          f"{settings['scale']:g}, {settings['steps']} steps, seeds from {args.seed}")


def save_picture(picture: Image.Image, path: Path, text: PngInfo | None = None) -> None:
    """Write a PNG, its folder too if need be; raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", pnginfo=text)
    except OSError as error:
        raise UserError(f"cannot write --out={path}: {error}") from None


def sampling_settings(args, cfg: Config) -> dict:
    """The flags where given, else what the run drew its own samples with."""
    guidance = args.guidance or cfg.guidance
    if guidance == "self" and len(cfg.route) == 0:
        raise UserError(f"--guidance=self needs routed blocks, and {args.checkpoint} has none: use cfg or none")
    return {"steps": args.steps or cfg.sample_steps, "guidance": guidance,
            "scale": cfg.scale if args.scale is None else args.scale,
            "drop": cfg.drop if args.drop is None else args.drop, "shift": cfg.shift}


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(args) -> None:
    """`sample.py score`: how many objects of held-out scenes are drawn as their captions say."""
    model, cfg, encode_text = load(args)
    settings = sampling_settings(args, cfg)
    side = cfg.stages[-1].image_size
    held_out = scenes.make_scenes(args.n, args.seed, "held_out", args.level)
    prompts = [scenes.caption(scene) for scene in held_out]
    seeds = list(range(args.seed, args.seed + args.n))
    images = sample_images(model, encode_text, prompts, seeds, (side, side), args.batch, **settings)
    result = scenes.score_scenes(images, held_out)
    objects = sum(len(scene.objects) for scene in held_out)
    print(f"{args.checkpoint}: {args.n} scenes with held-out colour-shape pairs, {objects} objects, {side}px, "
          f"guidance {settings['guidance']} {settings['scale']:g}, {settings['steps']} steps")
    meaning = {"objects": "right colour in the right place", "exact": "and right shape and size", "colour": "right colour",
               "place": "something is there", "size": "right size", "shape": "right shape", "background": "right background",
               "scenes": "every object exact, nothing else"}
    for name, share in result.items():
        print(f"  {name:8}{100 * share:6.1f}%  {meaning[name]}")
    out = weights_file(args.checkpoint).parent / "score_scenes.json"
    out.write_text(json.dumps({"n": args.n, "seed": args.seed, "level": args.level, **settings, **result}, indent=2) + "\n")
    grid = args.out or out.with_name("score_scenes.png")
    save_picture(draw_grid(images[:16], prompts[:16]), grid)
    print(f"grid: {grid}")


# ---------------------------------------------------------------------------------------------------------------------
# diffusers

KEYS = {  # PRX's public checkpoints -> diffusers' PRXTransformer2DModel; everything else has the same name
    "img_qkv_proj": "attention.img_qkv_proj", "txt_kv_proj": "attention.txt_kv_proj", "attn_out": "attention.to_out.0",
    "qk_norm.query_norm.scale": "attention.norm_q.weight", "qk_norm.key_norm.scale": "attention.norm_k.weight",
    "k_norm.scale": "attention.norm_added_k.weight",
}


def rename(state: dict[str, Tensor], keys: dict[str, str]) -> dict[str, Tensor]:
    """State dict with `keys` replaced inside the names of block parameters."""
    pattern = re.compile(r"^(blocks\.\d+\.)(" + "|".join(map(re.escape, keys)) + r")(?=\.|$)")
    return {pattern.sub(lambda m: m[1] + keys[m[2]], name): tensor for name, tensor in state.items()}


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names, the REPA projector left out."""
    return rename({name: t for name, t in state.items() if not name.startswith("repa_projector.")}, KEYS)


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`."""
    return rename(state, {theirs: ours for ours, theirs in KEYS.items()})


def diffusers_config(cfg: Config) -> dict:
    """The arguments of `PRXTransformer2DModel` for the same network."""
    head_dim = cfg.width // cfg.heads
    return dict(in_channels=3, patch_size=cfg.patch, bottleneck_size=cfg.bottleneck, context_in_dim=cfg.text_dim,
                hidden_size=cfg.width, mlp_ratio=cfg.mlp_ratio, num_heads=cfg.heads, depth=cfg.depth,
                axes_dim=[head_dim // 2, head_dim // 2], theta=cfg.rope_theta, resolution_embeds=False)


def export_diffusers(path: str | Path, out: str | Path) -> None:
    """Write a run's averaged weights as a folder for diffusers; raises UserError if `out` exists.

    A run with a hub text encoder becomes a whole `PRXPixelPipeline`; one with the built-in encoder its transformer only,
    since diffusers has no such encoder.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel

    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists and is never overwritten: name another folder with --out")
    model, cfg, encode_text = load_checkpoint(path)
    transformer = PRXTransformer2DModel(**diffusers_config(cfg))
    transformer.load_state_dict(to_diffusers(model.state_dict()))
    if cfg.text_encoder == "builtin":
        transformer.save_pretrained(out / "transformer")
        print(f"{out}/transformer: the transformer only, because diffusers has no built-in text encoder")
        return
    pipeline = PRXPixelPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=cfg.shift), text_encoder=encode_text.model.float(),
        tokenizer=encode_text.tokenizer, default_sample_size=cfg.stages[-1].image_size, prompt_max_tokens=cfg.text_tokens,
        noise_scale=cfg.noise_scale)  # written out: diffusers' default is 2.0
    pipeline.save_pretrained(out)
    print(f"{out}: diffusers.PRXPixelPipeline.from_pretrained({str(out)!r})")


def export(args) -> None:
    """`sample.py export`."""
    export_diffusers(args.checkpoint, args.out)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


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


def share(text: str) -> float:
    """A number in [0, 1)."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number in [0, 1)")


def seed(text: str) -> int:
    """A whole number that a generator takes as its seed, with room for the seeds of a sheet."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^62")
    return int(text)


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
    parser.add_argument("--scale", type=float, default=None, help="guidance scale, 1 is none (default: the run's)")
    parser.add_argument("--drop", type=share, default=None, help="share of tokens routed around in self guidance (default: the run's)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the first picture; the next has the next seed")
    parser.add_argument("--batch", type=positive, default=32, help="pictures at a time; changes no picture")
    parser.add_argument("--compile", type=int, choices=[0, 1], default=0, help="torch.compile the blocks: half a minute, then "
                        "faster; for hundreds of pictures")
    parser.add_argument("--device", type=visible_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def build_parsers() -> dict[str, tuple[Parser, Callable]]:
    """One parser a command; "" is plain sampling."""
    draw = Parser(prog="sample.py", description="Draw prompts. Other commands: `sample.py score --help`, `sample.py export --help`.")
    add_sampling_flags(draw)
    draw.add_argument("--prompt", default=None, help="what to draw")
    draw.add_argument("--prompts", default=None, help="file with a prompt a line")
    draw.add_argument("--n", type=positive, default=1, help="pictures a prompt")
    draw.add_argument("--size", type=image_size, default=None, help="pixels, 512 or 512x768 (height x width) (default: the run's last stage)")
    draw.add_argument("--out", type=Path, default=Path("out.png"), help="PNG to write: one picture, or a sheet of several")

    scorer = Parser(prog="sample.py score", description="Score pictures of held-out prompts.")
    add_sampling_flags(scorer)
    scorer.add_argument("--metric", choices=["scenes"], default="scenes", help="scenes: objects drawn as captioned, by attribute")
    scorer.add_argument("--n", type=positive, default=256, help="scenes")
    scorer.add_argument("--level", choices=list(scenes.LEVELS), default="demo", help="level of the scenes")
    scorer.add_argument("--out", type=Path, default=None, help="PNG of the first 16 (default: score_scenes.png beside the checkpoint)")

    exporter = Parser(prog="sample.py export", description="Write a folder that diffusers opens.")
    exporter.add_argument("--checkpoint", required=True, help="a run's folder or its ema.safetensors")
    exporter.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    return {"": (draw, sample), "score": (scorer, score), "export": (exporter, export)}


def main(argv: list[str]) -> None:
    parsers = build_parsers()
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    if command not in parsers:
        raise UserError(f"unknown command {command}; known are score and export, and sampling takes no command")
    parser, run = parsers[command]
    run(parser.parse_args(argv[1:] if command else argv))


if __name__ == "__main__":
    run_main(main)
