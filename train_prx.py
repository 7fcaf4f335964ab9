"""nanoPRX: train a text-to-image model on raw pixels, in one file.

This is PRX's 24-hour speedrun (Photoroom 2026, https://github.com/Photoroom/PRX): a 1.2B transformer that turns noise
into 1024px images without a VAE. The network predicts the clean image (x-prediction), the loss is taken on velocity,
half of the image tokens are routed around most blocks (TREAD), features are aligned with a frozen DINOv3 (REPA), LPIPS
and DINOv2 judge the predicted image (P-DINO), and Muon steps the matrices inside blocks.

    python train_prx.py --preset=demo                                              2 CPU cores, minutes
    python train_prx.py --preset=solo                                              one GPU
    torchrun --nproc_per_node=8 train_prx.py --preset=record                       the recipe (run.sh: many nodes)
    python train_prx.py --preset=demo --name=try1 --width=192 --max_steps=200      any field of `Config` is a flag

Everything that a run does is in this file, top to bottom, and its text is the first thing in the run's log.

Notation
    x0     clean image [B, 3, H, W] in [-1, 1]          eps    noise, same shape
    t      [B] in [0, 1]: 0 is data, 1 is noise         x_t    (1 - t) x0 + t eps
    x0_hat the network's output                         v      (x_t - x0) / t
    B batch   N image tokens   L text tokens   C width   h heads   d head dim
    ids_keep    [B, N_keep] tokens that stay in the routed blocks, ascending
    drop        fraction of image tokens routed around; route = blocks[start:end)
    repa_depth  features after this many blocks, before the routed tokens return
    chunk       `micro_batch` rows; a step is `global_batch / micro_batch` chunks, whatever the number of GPUs

Sources
    x-prediction in pixels (JiT)   Li & He, arXiv 2511.13720       TREAD routing    Krause et al., arXiv 2501.04765
    flow matching                  Lipman et al., arXiv 2210.02747 sparse guidance  arXiv 2601.01608
    shifted timesteps              Esser et al., arXiv 2403.03206  REPA             Yu et al., arXiv 2410.06940
    Muon                           Jordan 2024, arXiv 2502.16982   LPIPS            Zhang et al., arXiv 1801.03924
    "code" in a comment: the value is PRX's, from its public code, where its write-ups are silent.
"""

import abc
import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import hashlib
import html
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import ranks  # before varlen, which imports torch's compiler: shards sees to that one's cache
import scenes
from command_line import Parser, run_main
from metrics import IMAGENET, Scorer, parse_metrics
from muon import Muon, local
from run_folder import Log, RunFolder, checkpoints_of, draw_grid, load_checkpoint, named_tensors
from shards import COMPILE_CACHE, DamagedImage, Ring, RowSet, Slot, UserError, become_reader, file_sha256
from torch.nn.attention.varlen import varlen_attn
from weights import fill, load_pretrained, read_init, set_whole, weights_hash

SOURCES = {name: Path(__file__).with_name(name).read_text() for name in
           ("train_prx.py", "command_line.py", "curves.py", "metrics.py", "muon.py", "run_folder.py", "ranks.py", "scenes.py",
            "shards.py", "weights.py")}  # before any edit
SOURCE_HASH = hashlib.sha256("".join(SOURCES.values()).encode()).hexdigest()

T_MIN = 0.05  # smallest t in a division: velocity's error would otherwise grow without bound near t = 0 (code)
SKIPS_IN_A_ROW = 10  # non-finite steps after which a run stops


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one flat dataclass. A field is a flag, the comment behind it is the flag's help.


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one image size."""

    image_size: int  # pixels, square
    steps: int  # optimizer steps
    global_batch: int  # images an optimizer step, over all GPUs
    repa: bool  # align features with the teacher in this stage
    short: float = 0.0  # share of rows that come with their short caption: a mix at the end keeps brief prompts working


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; the defaults are the record recipe. `check_config` says what is valid."""

    # The run
    name: str = "record"  # the run's folder is runs/<name>
    data: str = "data/flux_generated,data/flux_reason,data/midjourney"  # comma list of path[:weight]; default weight: its rows
    frozen: str = "pretrained"  # networks behind REPA, P-DINO and LPIPS: pretrained, scene, random (timing only) or none
    seed: int = 0  # decides the initial weights, the order of rows and every random number
    init: str = ""  # weights to start from: a run, its ema.safetensors or a diffusers folder; empty: drawn from the seed
    stages: tuple[Stage, ...] = (Stage(512, 100_000, 1024, True), Stage(1024, 20_000, 512, False))  # size:steps:batch:repa[:short],...
    micro_batch: int = 16  # rows of a chunk, which is drawn and run as a whole; part of the run's identity
    max_steps: int = 0  # stop after this many steps without bending the schedule; 0: run all stages
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is a GPU, which must then be usable
    precision: str = "auto"  # of products: bf16, fp32, or auto: bf16 on a GPU that has it; weights and all sums of steps stay fp32
    compile: bool = True  # torch.compile each block: 0 or 1
    chunks_at_once: int = 1  # chunks of a rank's share that pass the network together, at most: memory against speed
    workers: int = 8  # processes that read and decode images, a GPU; 0: in the training process
    # Model (code, but for patch and bottleneck)
    patch: int = 32  # pixels a side of one image token
    bottleneck: int = 256  # pixels of a patch -> bottleneck -> width, no activation between (JiT)
    width: int = 1792  # C
    depth: int = 16  # blocks
    heads: int = 28  # attention heads; width / heads a multiple of 4, for 2-D rotary pairs
    mlp_ratio: float = 3.5  # hidden width of the gated MLP / width
    rope_theta: float = 1e4  # base of the rotary frequencies
    # Text
    text_encoder: str = "google/t5gemma-2b-2b-ul2"  # hub id or folder of a T5Gemma, or builtin: no weights, small vocabularies
    text_dim: int = 2304  # width of the text encoder's last hidden state
    text_tokens: int = 256  # L: captions are cut here and padding is masked
    caption_dropout: float = 0.1  # share of captions replaced by the empty prompt, for classifier-free guidance
    # Flow matching
    shift: float = 3.0  # t -> s t / (1 + (s - 1) t), in training and sampling: larger images need more noise (Esser et al.)
    uniform_t: float = 0.1  # share of timesteps drawn uniformly, the rest logit-normal(0, 1) (code)
    noise_scale: float = 1.0  # factor on eps; PRX's later 7B pixel model uses 2
    t_power: float = 2.0  # loss weight 1 / max(t, 0.05)^t_power on the squared error of x0_hat; 2 is the velocity loss
    # Routing
    drop: float = 0.5  # share of image tokens that skip the routed blocks in training; 0: no routing
    route_start: int = 2  # first routed block
    route_end: int = -1  # routed are blocks[route_start:route_end], Python indices: the last block sees all tokens
    # Auxiliary losses, on top of flow matching with weight 1
    repa_depth: int = 8  # blocks before the features that REPA aligns
    repa_weight: float = 0.5  # REPA: FID 18.2 -> 14.6 in PRX part 2
    repa_teacher: str = "facebook/dinov3-vitl16-pretrain-lvd1689m"  # hub id or folder of a DINOv3 or DINOv2 ViT
    repa_dim: int = 1024  # width of the teacher's features
    lpips_weight: float = 0.1  # LPIPS (VGG) on both images at half size, at all noise levels
    pdino_weight: float = 0.01  # P-DINO: 1 - cosine of DINOv2 patch tokens at 224px, at all noise levels
    pdino_model: str = "facebook/dinov2-with-registers-base"  # hub id or folder of the P-DINO network
    # Optimisation
    lr: float = 1e-4  # Muon, the matrices inside blocks
    adam_lr: float = 1e-4  # Adam, everything else
    lr_decay: str = "none"  # none: constant after warm-up; linear: to 0 at the end of the last stage
    warmup: int = 1_000  # steps of linear warm-up
    momentum: float = 0.95  # Muon, Nesterov
    ns_steps: int = 5  # Newton-Schulz iterations
    adam_betas: tuple[float, float] = (0.9, 0.95)  # decay of Adam's two moments
    adam_eps: float = 1e-8  # added to Adam's denominator
    grad_clip: float = 0.2  # largest global gradient norm (code); also keeps one bad batch from moving the weights far
    ema: float = 0.999  # smoothing of the averaged weights, which are what is sampled and evaluated
    ema_every: int = 10  # steps between two updates of the average
    # Samples and bookkeeping
    sample_steps: int = 28  # Euler steps of the sample grids
    guidance: str = "self"  # self: dense against routed; cfg: prompt against empty prompt; none
    scale: float = 3.0  # guidance scale; 1 is no guidance
    log_every: int = 50  # steps of a log window
    eval_every: int = 1_000  # steps between held-out losses; 0: only at the end
    sample_every: int = 1_000  # steps between sample grids; 0: only at the end
    score: str = ""  # comma list of scenes, cmmd, mmd, fdd, fid, each metric[:network], of drawn pictures; empty: none
    score_every: int = 0  # steps between scores; 0: only at the end
    score_n: int = 256  # pictures drawn for a score
    save_every: int = 1_000  # steps between checkpoints; 0: only at the end
    keep: int = 3  # checkpoints kept, the last ones
    keep_every: int = 20_000  # and every checkpoint at a multiple of so many steps; 0: none
    price: float = 2.0  # dollars a GPU-hour, for the running cost in the log
    track: str = "none"  # none, or wandb: metrics.jsonl's lines go there too, if it is installed

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule; `max_steps` may end a run earlier."""
        return sum(stage.steps for stage in self.stages)

    @property
    def route(self) -> range:
        """The indices of the routed blocks."""
        return range(self.depth)[self.route_start : self.route_end]


PRESETS = {
    "record": Config(chunks_at_once=2),  # on 32 GPUs 32 images of 512px: products of 4,096 rows, not 2,048
    # One GPU, minutes. Not yet run on a GPU: the learning rates are guesses, below the demo's.
    "solo": Config(
        name="solo", data="data/solo", frozen="none", stages=(Stage(256, 6_000, 256, True),), micro_batch=64,
        patch=16, bottleneck=128, width=640, depth=10, heads=10, text_encoder="builtin", text_dim=256, text_tokens=64,
        repa_depth=5, lr=4e-3, adam_lr=1e-3, lr_decay="linear", t_power=1.0, warmup=200, ema=0.9, grad_clip=1.0,
        guidance="cfg", scale=2.0, sample_steps=20,
    ),
    # Two CPU cores, under five minutes. Where it leaves the recipe, and why, is in the README.
    "demo": Config(
        name="demo", data="data/demo", device="cpu", frozen="none", stages=(Stage(32, 1_000, 32, True),), micro_batch=32, workers=0,
        patch=4, bottleneck=48, width=128, depth=6, heads=4, drop=0.25, route_start=1, route_end=5, repa_depth=3,
        text_encoder="builtin", text_dim=256, text_tokens=24,
        lr=1e-2, adam_lr=4e-3, lr_decay="linear", t_power=1.0, warmup=50, ema=0.9, grad_clip=1.0,
        guidance="cfg", scale=2.0, sample_steps=20, eval_every=400, sample_every=400, save_every=400,
    ),
}
# Track demo's record (records/README.md), on scenes with textures; what most of its settings gain is in records/ablation
PRESETS["race"] = replace(
    PRESETS["demo"], name="race", data="data/race", stages=(Stage(64, 525, 64, True),), micro_batch=64, patch=16, bottleneck=192,
    heads=8, text_tokens=32, drop=0.0, lr=2e-2, adam_lr=6e-3, momentum=0.9, t_power=0.5, warmup=25, ema=0.8, scale=2.5)

CHOICES = {
    "frozen": ("pretrained", "scene", "random", "none"), "device": ("auto", "cpu", "cuda"), "precision": ("auto", "bf16", "fp32"),
    "guidance": ("self", "cfg", "none"), "lr_decay": ("none", "linear"), "track": ("none", "wandb"),
}
NOT_IDENTITY = {"max_steps", "device", "chunks_at_once", "workers", "log_every", "eval_every", "sample_every", "save_every",
                "keep", "keep_every", "price", "score", "score_every", "score_n", "track"}


def parse_stages(text: str) -> tuple[Stage, ...]:
    """"512:100000:1024:1,1024:20000:512:0:0.5" -> two stages; raises ValueError or KeyError."""
    stages = []
    for part in text.split(","):
        image_size, steps, global_batch, repa, *short = part.split(":")
        stages.append(Stage(int(image_size), int(steps), int(global_batch), {"0": False, "1": True}[repa], *map(float, short)))
        if len(short) > 1:
            raise ValueError(part)
    return tuple(stages)


def parse_value(name: str, kind: type, text: str):
    """One flag's text as its field's type; raises argparse's error naming the flag."""
    try:
        if name == "stages":
            return parse_stages(text)
        if name == "adam_betas":
            beta1, beta2 = (float(x) for x in text.split(","))
            return beta1, beta2
        if kind is bool:
            return {"0": False, "false": False, "1": True, "true": True}[text.lower()]
        return kind(text)
    except (ValueError, KeyError, TypeError):
        form = {"stages": "image_size:steps:global_batch:repa[:short], comma separated, repa 0 or 1", "adam_betas": "two numbers"}
        wanted = form.get(name) or {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None


def parse_config(argv: list[str]) -> tuple[Config, str]:
    """The command line as a checked Config and the value of --resume; raises UserError."""
    parser = Parser(prog="train_prx.py", description="Train PRX. Defaults shown are the record preset's.")
    parser.add_argument("--preset", choices=PRESETS, default="record", help="the values that the other flags change")
    parser.add_argument("--resume", default="auto", help="auto: continue this run if it is unfinished and unchanged; "
                        "never: start over, the old folder is renamed; or the path of a run or checkpoint")
    comments = dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for f in dataclasses.fields(Config):
        shown = f.default
        if f.name == "stages":
            shown = ",".join(":".join(f"{x:g}" for x in dataclasses.astuple(stage)) for stage in f.default)
        parser.add_argument(f"--{f.name}", type=functools.partial(parse_value, f.name, f.type), choices=CHOICES.get(f.name),
                            default=argparse.SUPPRESS, metavar=f.name.upper() if f.name not in CHOICES else None,
                            help=f"{comments[f.name].replace('%', '%%')} (default: {shown})")
    flags = vars(parser.parse_args(argv))
    preset, resume = PRESETS[flags.pop("preset")], flags.pop("resume")
    if flags.get("frozen", preset.frozen) == "scene":
        flags.setdefault("repa_dim", scenes.TEACHER_DIM)
    cfg = replace(preset, **flags)
    check_config(cfg)
    return cfg, resume


def check_config(cfg: Config) -> None:
    """Raise UserError, one line, for the first value that cannot work."""
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    for name, choices in CHOICES.items():
        need(getattr(cfg, name) in choices, f"--{name}={getattr(cfg, name)} is none of {', '.join(choices)}")
    need(re.fullmatch(r"\w[\w.-]*", cfg.name) is not None, f"--name={cfg.name}: use letters, digits, '_', and then '.' and '-'")
    for name in ("micro_batch", "chunks_at_once", "patch", "bottleneck", "width", "depth", "heads", "text_dim", "text_tokens", "ema_every",
                 "log_every", "keep", "sample_steps", "ns_steps", "score_n"):
        need(getattr(cfg, name) > 0, f"--{name}={getattr(cfg, name)} must be at least 1")
    for name in ("grad_clip", "mlp_ratio", "rope_theta", "shift", "noise_scale", "adam_eps"):
        need(0 < getattr(cfg, name) < math.inf, f"--{name}={getattr(cfg, name)} must be a number above 0")
    for name in ("lr", "adam_lr", "max_steps", "warmup", "workers", "t_power", "repa_weight", "lpips_weight", "pdino_weight",
                 "price", "eval_every", "sample_every", "save_every", "keep_every", "score_every", "scale"):
        need(0 <= getattr(cfg, name) < math.inf, f"--{name}={getattr(cfg, name)} must be a number of at least 0")
    for name in ("drop", "ema", "momentum"):
        need(0 <= getattr(cfg, name) < 1, f"--{name}={getattr(cfg, name)} must be in [0, 1)")
    for name in ("uniform_t", "caption_dropout"):
        need(0 <= getattr(cfg, name) <= 1, f"--{name}={getattr(cfg, name)} must be in [0, 1]")
    need(all(0 <= beta < 1 for beta in cfg.adam_betas), f"--adam_betas={cfg.adam_betas} must be in [0, 1)")
    need(len(cfg.stages) > 0, "--stages: there is none")
    need(cfg.width % cfg.heads == 0, f"--width={cfg.width} is not divisible by --heads={cfg.heads}")
    head_dim = cfg.width // cfg.heads
    need(head_dim % 4 == 0, f"--width / --heads = {head_dim} must be a multiple of 4, for 2-D rotary pairs")
    need(len(cfg.route) > 0 or (cfg.drop == 0 and cfg.guidance != "self"), f"--route_start={cfg.route_start} and --route_end="
         f"{cfg.route_end} route no block of {cfg.depth}; without routing, --drop=0 and --guidance=cfg or none")
    need(1 <= cfg.repa_depth <= cfg.depth, f"--repa_depth={cfg.repa_depth} must be between 1 and --depth={cfg.depth}")
    for stage in cfg.stages:
        need(min(stage.image_size, stage.steps, stage.global_batch) > 0, f"--stages: {stage} has a value below 1")
        need(0 <= stage.short <= 1, f"--stages: {stage}: short is a share, from 0 to 1")
        need(stage.image_size % cfg.patch == 0, f"image size {stage.image_size} is not divisible by --patch={cfg.patch}")
        N = (stage.image_size // cfg.patch) ** 2
        need(N > round(N * cfg.drop), f"--drop={cfg.drop} leaves none of the {N} tokens of a {stage.image_size}px image")
        need(stage.global_batch % cfg.micro_batch == 0,
             f"global batch {stage.global_batch} is not divisible by --micro_batch={cfg.micro_batch}")
    need(cfg.track != "wandb" or importlib.util.find_spec("wandb") is not None,
         "--track=wandb: wandb is not installed: pip install wandb")
    if cfg.score:
        parse_metrics(cfg.score)
    if cfg.device == "cuda":
        trouble = gpu_trouble()  # before is_available, since torch says only once why it is not
        need(torch.cuda.is_available(), f"--device=cuda: {trouble or 'no GPU is visible'}; use --device=cpu or auto")


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """What products on `device` are computed in; the one place that decides it.

    `auto` is bf16 on a GPU that multiplies it in hardware, sm_80 or newer, and fp32 elsewhere. A CPU without AVX512-BF16 or
    AMX emulates bf16, and the demo's step took 16 times as long; one that has them was no faster in bf16 than in fp32.
    """
    is_bf16 = cfg.precision == "bf16"
    if cfg.precision == "auto":
        is_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if is_bf16 else torch.float32


def resolve_precision(cfg: Config, device: torch.device) -> Config:
    """The same config with `auto` replaced by what it means on `device`: what a run is known by."""
    return replace(cfg, precision="bf16" if compute_dtype(cfg, device) == torch.bfloat16 else "fp32")


@functools.cache
def gpu_trouble() -> str:
    """Why torch cannot use the GPU that this machine has, in a line; "" where it can, or where there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):  # hidden on purpose; the last by SLURM
        return ""
    with warnings.catch_warnings(record=True) as caught:  # torch says it once a process, and goes on without
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
        listed = torch.cuda.device_count()
    said = [str(w.message).split("CUDA initialization: ")[1] for w in caught if "CUDA initialization: " in str(w.message)]
    if said:
        return said[0].splitlines()[0].split(" (Triggered")[0]
    if listed or any(Path("/dev").glob("nvidia[0-9]*")):
        return f"torch {torch.__version__} finds none: its driver is too old, it is another user's, or this torch is without CUDA"
    return ""


def check_gpu(cfg: Config) -> None:
    """Raise UserError where the run would go to the CPU because the machine's GPU cannot be used."""
    if cfg.device == "auto" and gpu_trouble():
        raise UserError(f"this machine's GPU cannot be used: {gpu_trouble()}; --device=cpu trains on the CPU instead")


def usable_device() -> str:
    """"cuda" where there is a GPU, else "cpu"; a GPU that cannot be used is said on stderr, once a node."""
    if gpu_trouble() and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: this machine's GPU is not used: {gpu_trouble()}", file=sys.stderr)
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, bool]:
    """This machine's processor, and whether it multiplies bf16 in hardware; both as far as Linux says."""
    info = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.+)", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", info, re.MULTILINE)
    units = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86, and of Arm
    return f"{name[1] if name else platform.machine()} CPU", bool(flags and units & set(flags[1].split()))


def config_to_json(cfg: Config) -> dict:
    """A Config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def config_from_json(values: dict) -> Config:
    """The inverse of `config_to_json`; raises UserError where a field is unknown or of another type."""
    unknown = set(values) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"config has fields that this version does not know: {', '.join(sorted(unknown))}")
    values = dict(values, stages=tuple(Stage(**s) for s in values["stages"]), adam_betas=tuple(map(float, values["adam_betas"])))
    cfg = Config(**values)
    for part in (cfg, *cfg.stages):
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if f.type in (bool, int, float, str) and type(value) is not f.type and (f.type, type(value)) != (float, int):
                raise UserError(f"config has {f.name} {value!r}, which is no {f.type.__name__}")
    return cfg


def tag_seed(*parts) -> int:
    """A 63-bit seed that is a pure function of `parts`: every random number of a run starts from one of these."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def tag_generator(device, *parts) -> torch.Generator:
    """A generator on `device`, seeded by `tag_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(tag_seed(*parts))


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching


def shift_t(t: Tensor, shift: float) -> Tensor:
    """Move timesteps in [0, 1] towards noise, ends fixed: s t / (1 + (s - 1) t) (Esser et al., section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(cfg: Config, B: int, device, generator: torch.Generator | None = None) -> Tensor:
    """Training timesteps [B] in [1e-3, 1): logit-normal(0, 1) then shifted, a share `uniform_t` uniform instead."""
    logit_normal = shift_t(torch.randn(B, device=device, generator=generator).sigmoid(), cfg.shift)
    uniform = torch.rand(B, device=device, generator=generator)
    is_uniform = torch.rand(B, device=device, generator=generator) < cfg.uniform_t
    return torch.where(is_uniform, uniform, logit_normal).clamp(1e-3, 1 - 1e-6)


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps, for t [B] and images [B, 3, H, W]."""
    t = t[:, None, None, None]  # [B] -> [B, 1, 1, 1]
    return (1 - t) * x0 + t * eps


def velocity(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / max(t, 0.05) [B, 3, H, W]: the direction from data to noise, eps - x0 where t >= 0.05."""
    return (x_t - x0) / t.clamp(min=T_MIN)[:, None, None, None]


def draw_ids_keep(B: int, N: int, drop: float, device, generator: torch.Generator | None = None) -> Tensor:
    """The tokens that stay, [B, N - round(N drop)] ascending, drawn uniformly for each sample (TREAD)."""
    order = torch.rand(B, N, device=device, generator=generator).argsort(dim=1)  # [B, N] random permutations
    return order[:, : N - round(N * drop)].sort(dim=1).values


@torch.no_grad()
def generate(model, txt: Tensor, txt_mask: Tensor | None, *, null_txt: Tensor, null_mask: Tensor | None,
             size: tuple[int, int], steps: int, guidance: str, scale: float, drop: float, seeds: list[int], shift: float,
             interval: tuple[float, float] = (0.0, 1.0), after_step: Callable[[], object] = lambda: None) -> Tensor:
    """Sample images x0 [B, 3, H, W] in [-1, 1] by Euler steps from noise on the shifted grid.

    txt [B, L, D] and txt_mask [B, L] hold one prompt an image; null_txt [1 or B, L', D] is the empty prompt's. Guidance:
    `self`, x0 = routed + scale (dense - routed), a share `drop` of tokens routed around, same prompt (arXiv 2601.01608);
    `cfg`, x0 = empty + scale (prompt - empty) (Ho & Salimans, arXiv 2207.12598); `none`; only at t in `interval`
    (Kynkaanniemi et al., arXiv 2404.07724). One seed an image, drawn on the CPU, so that a picture depends neither on the
    batch nor on the device. Raises ValueError on sizes that do not fit.
    """
    H, W = size
    B, device, patch = len(txt), txt.device, model.cfg.patch
    if H % patch or W % patch or len(seeds) != B:
        raise ValueError(f"size {size} must be a multiple of the patch {patch}, {len(seeds)} seeds as many as {B} prompts")
    N = (H // patch) * (W // patch)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(3, H, W, generator=g) for g in generators])  # [B, 3, H, W]
    x = model.cfg.noise_scale * noise.to(device)
    grid = shift_t(torch.linspace(1, 0, steps + 1), shift).tolist()
    guided = [guidance != "none" and scale != 1 and interval[0] <= t <= interval[1] for t in grid[:-1]]
    prompt, empty = (txt, txt_mask), (null_txt.expand(B, -1, -1), None if null_mask is None else null_mask.expand(B, -1))
    texts = {is_guided: [prompt, empty] if is_guided and guidance == "cfg" else [prompt] for is_guided in set(guided)}
    copies = dict.fromkeys(texts, 1)  # of the images, for one text
    if isinstance(model, PRX):  # both prompts in one batch, and the text's keys and values once, not once a step
        copies = {is_guided: len(both) for is_guided, both in texts.items()}
        texts = {is_guided: [(model.text_keys(*join_prompts(both)), None)] for is_guided, both in texts.items()}
    for t_now, t_next, is_guided in zip(grid, grid[1:], guided):
        t, n = torch.full((B,), t_now, device=device), copies[is_guided]
        x0_hat = torch.cat([model(x.repeat(n, 1, 1, 1), t.repeat(n), *text)[0] for text in texts[is_guided]])  # [B or 2 B, 3, H, W]
        if is_guided and guidance == "self":
            ids_keep = torch.cat([draw_ids_keep(1, N, drop, "cpu", g) for g in generators]).to(device)
            routed, _ = model(x, t, *texts[is_guided][0], ids_keep)
            x0_hat = routed + scale * (x0_hat - routed)
        elif is_guided:
            x0_hat, without = x0_hat.chunk(2)
            x0_hat = without + scale * (x0_hat - without)
        x = x + (t_next - t_now) * velocity(x, x0_hat, t)
        after_step()
    return x.clamp(-1, 1)


def join_prompts(prompts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Batches of prompts, each txt [B, L, D] and txt_mask [B, L], as one batch, padded to the longest L."""
    L = max(txt.shape[1] for txt, _ in prompts)
    masks = [torch.ones(txt.shape[:2], dtype=torch.bool, device=txt.device) if mask is None else mask for txt, mask in prompts]
    return (torch.cat([F.pad(txt, (0, 0, 0, L - txt.shape[1])) for txt, _ in prompts]),
            torch.cat([F.pad(mask, (0, L - mask.shape[1])) for mask in masks]))


# ---------------------------------------------------------------------------------------------------------------------
# Model. Parameter names are those of the public PRX checkpoints, so that weights pass in both directions.


@functools.lru_cache(maxsize=16)
def rotary_table(rows: int, cols: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin of the 2-D rotary angles, [1, N, d / 2, 2] fp32: d / 4 pairs turn with the row, d / 4 with the column."""
    pairs = head_dim // 4  # pairs an axis
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)  # [d / 4]
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    position = torch.stack([row.flatten(), col.flatten()], dim=1)  # [N, 2]
    angle = (position[:, :, None] * frequency).flatten(1)  # [N, 2, d / 4] -> [N, d / 2]
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[None].float().to(device)


def apply_rotary(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [B, N, h, d] by rope [B or 1, N, d / 2, 2]; fp32 inside, the dtype of x outside."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, h, d] -> 2 x [B, N, h, d / 2]
    cos, sin = rope[:, :, None].unbind(-1)  # [B, N, d / 2, 2] -> 2 x [B, N, 1, d / 2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def any_length(x: Tensor) -> Tensor:
    """x [T, ...] with a note for the compiler that T is another in every batch: one compiled block then serves all."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


class Text:
    """B prompts as the blocks read them: the tokens of all, one after the other, without padding.

    No tuple or dataclass: FSDP replaces the tensors in those, and that T may change is noted on the tensor.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, longest: int):
        self.tokens = any_length(tokens)  # [T, C]
        self.lengths = lengths  # [B] tokens of each prompt; T together
        self.longest = longest  # L: no prompt is longer
        self.keys: list[tuple[Tensor, Tensor]] = []  # once they are known: each block's keys and values, 2 x [T, h, d]
        self.layouts: dict[int, Keys] = {}  # by the number of image tokens

    def layout(self, img: Tensor, head_dim: int) -> "Keys":
        """Where the keys of these prompts and of image tokens img [B, N, C] lie; made once for each N."""
        N = img.shape[1]
        if N not in self.layouts:
            self.layouts[N] = Keys.lay_out(self, N, padded=not has_flash_attention(img, head_dim))
        return self.layouts[N]


class Keys(NamedTuple):
    """Where the keys of a batch lie: those of an image are the tokens of its text, then its own."""

    text_at: Tensor  # [T] the row of each text token
    image_at: Tensor  # [B N] the row of each image token
    query_starts: Tensor  # [B + 1] int32, the first query of each image, and the end of the last
    key_starts: Tensor  # [B + 1] int32, likewise for keys that lie close together
    longest: int  # L + N: no image has more keys
    mask: Tensor | None  # [B, 1, 1, L + N], True where there is a key; None where keys lie close together

    @classmethod
    def lay_out(cls, text: Text, N: int, padded: bool) -> "Keys":
        """The keys of each prompt and N image tokens: every image's in L + N rows, or close together."""
        B, device, M = len(text.lengths), text.lengths.device, text.longest + N
        image = torch.arange(B, device=device)
        first = text.lengths.cumsum(0) - text.lengths  # [B] the first token of each prompt
        start = image * M if padded else first + image * N  # [B] the first row of each image
        owner = torch.repeat_interleave(image, text.lengths, output_size=len(text.tokens))  # [T]
        row = torch.arange(len(text.tokens), device=device)
        count = (text.lengths + N)[:, None]  # [B, 1]
        return cls(text_at=any_length(row + (start - first)[owner]),
                   image_at=((start + text.lengths)[:, None] + torch.arange(N, device=device)).flatten(),
                   query_starts=torch.arange(0, B * N + 1, N, device=device, dtype=torch.int32),
                   key_starts=F.pad(count.cumsum(0)[:, 0], (1, 0)).int(), longest=M,
                   mask=(torch.arange(M, device=device) < count)[:, None, None] if padded else None)

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """Text [T, h, d] and image tokens [B, N, h, d] in their rows, [B (L + N) or T + B N, h, d]; 0 in those between."""
        rows = len(txt) + len(self.image_at) if self.mask is None else self.mask.numel()
        out = img.new_zeros(rows, *img.shape[2:])
        return out.index_copy_(0, self.text_at, txt).index_copy_(0, self.image_at, img.flatten(0, 1))


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> Tensor:
    """Attention of the queries [B, N, h, d] to the rows k, v [M, h, d] of `keys` -> [B, N, h, d]."""
    if keys.mask is None:  # flash attention: a mask would rule it out
        out = varlen_attn(q.flatten(0, 1), k, v, keys.query_starts, keys.key_starts, q.shape[1], keys.longest)
        return out.view(q.shape)
    dtype = q.dtype
    k, v = k.unflatten(0, (len(q), -1)), v.unflatten(0, (len(q), -1))  # [B (L + N), h, d] -> [B, L + N, h, d]
    if q.device.type == "cpu":  # torch's CPU attention is slow in bf16: the demo's step took 2.5 times as long
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=keys.mask)
    return out.transpose(1, 2).to(dtype)  # [B, h, N, d] -> [B, N, h, d]


def has_flash_attention(img: Tensor, head_dim: int) -> bool:
    """Whether `varlen_attn` takes tokens such as these; where it does not, keys are padded and masked."""
    return (img.is_cuda and img.dtype == torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256
            and torch.cuda.get_device_capability(img.device) >= (8, 0))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LayerNorm without affine, then scale and shift [B, 1, C]."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return (y * self.scale.float()).to(x.dtype)


class QKNorm(nn.Module):
    """The norms of image queries and image keys; text keys have their own."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class Modulation(nn.Module):
    """Conditioning vector c [B, C] -> (shift, scale, gate) x (attention, MLP), each [B, 1, C]."""

    def __init__(self, width: int):
        super().__init__()
        self.lin = nn.Linear(width, 6 * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(c))[:, None].chunk(6, dim=-1)  # [B, 6 C] -> 6 x [B, 1, C]


class Block(nn.Module):
    """Image tokens attend to [text, image] and pass a gated MLP; text tokens are never updated."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, hidden = cfg.width, int(cfg.width * cfg.mlp_ratio)
        self.heads, self.head_dim = cfg.heads, C // cfg.heads
        self.img_qkv_proj = nn.Linear(C, 3 * C, bias=False)
        self.txt_kv_proj = nn.Linear(C, 2 * C, bias=False)
        self.qk_norm = QKNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)
        self.modulation = Modulation(C)

    def text_keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of text tokens [T, C], 2 x [T, h, d]: they depend on neither the image nor the time."""
        k, v = self.txt_kv_proj(tokens).unflatten(-1, (2, self.heads, self.head_dim)).unbind(1)  # [T, 2C] -> 2 x [T, h, d]
        return self.k_norm(k), v

    def forward(self, img: Tensor, text: Text, c: Tensor, rope: Tensor, keys: Keys,
                txt_kv: tuple[Tensor, ...] = ()) -> Tensor:
        """img [B, N, C], text of T tokens, c [B, C], rope [B or 1, N, d / 2, 2] -> [B, N, C].

        txt_kv: `text_keys` of the text's tokens, where they are known already.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c)
        x = modulate(img, shift, scale)
        q, k, v = self.img_qkv_proj(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)  # [B, N, 3C] -> 3 x [B, N, h, d]
        txt_k, txt_v = txt_kv or Block.text_keys(self, text.tokens)  # not self.text_keys, which FSDP wraps for calls from outside
        q = apply_rotary(self.qk_norm.query_norm(q), rope)
        k = apply_rotary(self.qk_norm.key_norm(k), rope)
        x = attention(q, keys.join(txt_k, k), keys.join(txt_v, v), keys).flatten(2)  # [B, N, h, d] -> [B, N, C]
        img = img + gate * self.attn_out(x)
        x = modulate(img, mlp_shift, mlp_scale)
        x = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)  # [B, N, hidden]
        return img + mlp_gate * self.down_proj(x)


class TimeEmbedding(nn.Module):
    """t [B] -> c [B, C]: 256 sinusoids of 1000 t, cosines first, then Linear-SiLU-Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.in_layer = nn.Linear(256, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(1e4) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = 1000 * (t.float()[:, None] * frequency)  # [B, 128]; in diffusers' order, which rounds alike
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.in_layer.weight.dtype)  # [B, 256]
        return self.out_layer(F.silu(self.in_layer(waves)))


class FinalLayer(nn.Module):
    """adaLN, then tokens [B, N, C] -> patches [B, N, 3 patch^2]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * cfg.width))
        self.linear = nn.Linear(cfg.width, 3 * cfg.patch**2)

    def forward(self, img: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # [B, 2C] -> 2 x [B, 1, C]
        return self.linear(modulate(img, shift, scale))


class Projector(nn.Sequential):
    """REPA's head, features [B, N, C] -> the teacher's width; trained with the model and left out of exports."""

    def __init__(self, width: int, dim: int):
        super().__init__(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class PRX(nn.Module):
    """The denoiser: a noised image and a prompt in, the clean image out."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        pixels = 3 * cfg.patch**2
        self.img_in = nn.Sequential(nn.Linear(pixels, cfg.bottleneck), nn.Linear(cfg.bottleneck, cfg.width))
        self.time_in = TimeEmbedding(cfg.width)
        self.txt_in = nn.Linear(cfg.text_dim, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        self.repa_projector = Projector(cfg.width, cfg.repa_dim) if cfg.repa_weight > 0 else None
        if not self.txt_in.weight.is_meta:
            self.init_weights(cfg.seed)

    def read_text(self, txt: Tensor, txt_mask: Tensor | None) -> Text:
        """Prompts for the blocks: txt and txt_mask as in `forward`, without padding from here on."""
        if txt_mask is None:
            txt_mask = torch.ones(txt.shape[:2], dtype=torch.bool, device=txt.device)
        if txt.ndim == 3:
            txt = txt[txt_mask]  # [B, L, D] -> [T, D]; a GPU's host waits here, so batches for training come as [T, D]
        return Text(self.txt_in(txt.to(self.txt_in.weight.dtype)), txt_mask.sum(1), txt_mask.shape[1])

    def text_keys(self, txt: Tensor, txt_mask: Tensor | None) -> Text:
        """Prompts with the keys and values of all blocks: what sampling computes once, not once a step."""
        text = self.read_text(txt, txt_mask)
        text.longest = min(text.longest, -(-int(text.lengths.max()) // 32) * 32)  # once a prompt, the host may wait for a number
        text.keys = [tuple(map(any_length, block.text_keys(text.tokens))) for block in self.blocks]
        return text

    def forward(self, x_t: Tensor, t: Tensor, txt: Tensor | Text, txt_mask: Tensor | None = None,
                ids_keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict the clean image.

        x_t [B, 3, H, W] with H and W multiples of the patch, t [B] in [0, 1]. Prompts are txt [B, L, D] with txt_mask
        [B, L] bool, True where a token counts; or txt [T, D], only those tokens, with the same mask; or what `text_keys`
        made of them. With ids_keep [B, N_keep], only those image tokens pass the routed blocks and the others
        come back unchanged (TREAD). Returns x0_hat [B, 3, H, W] fp32 and the features after `repa_depth` blocks,
        [B, N_keep, C] inside the route, else [B, N, C].
        """
        cfg, dtype = self.cfg, self.txt_in.weight.dtype
        B, _, H, W = x_t.shape
        rows, cols, p = H // cfg.patch, W // cfg.patch, cfg.patch
        x = x_t.to(dtype).reshape(B, 3, rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)  # [B, rows, cols, 3, p, p]
        img = self.img_in(x.reshape(B, rows * cols, 3 * p * p))  # [B, N, 3 p p] -> [B, N, C]
        text = txt if isinstance(txt, Text) else self.read_text(txt, txt_mask)
        c = self.time_in(t)  # [B, C]
        rope = rotary_table(rows, cols, cfg.width // cfg.heads, cfg.rope_theta, x_t.device)  # [1, N, d / 2, 2]

        all_img, all_rope, feat = img, rope, img
        for i, block in enumerate(self.blocks):
            if ids_keep is not None and i == cfg.route.start:
                all_img, img = img, gather_tokens(img, ids_keep)  # [B, N, C] -> [B, N_keep, C]
                rope = gather_tokens(rope.flatten(2).expand(B, -1, -1), ids_keep).unflatten(-1, (-1, 2))
            keys = text.layout(img, cfg.width // cfg.heads)
            img = block(img, text, c, rope, keys, text.keys[i] if text.keys else ())
            if i + 1 == cfg.repa_depth:
                feat = img
            if ids_keep is not None and i + 1 == cfg.route.stop:
                index = ids_keep[:, :, None].expand(-1, -1, img.shape[-1])  # [B, N_keep] -> [B, N_keep, C]
                img, rope = all_img.scatter(1, index, img), all_rope  # [B, N, C]

        x = self.final_layer(img, c).float()  # [B, N, 3 p p]
        x0_hat = x.reshape(B, rows, cols, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, H, W)
        return x0_hat, feat

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every tensor whole from (seed, name), then keep this rank's slice: any number of ranks starts equal.

        Linear layers are uniform in +-1 / sqrt(fan_in) (torch's default, so PRX's); norms are 1; adaLN and the output
        layer are 0, so that every block starts as the identity and x0_hat as 0.
        """
        for prefix, module in self.named_modules():
            for name, p in module.named_parameters(recurse=False):
                full_name = f"{prefix}.{name}"
                if isinstance(module, RMSNorm):
                    whole = torch.ones(p.shape)
                elif prefix.endswith("modulation.lin") or prefix.startswith("final_layer."):
                    whole = torch.zeros(p.shape)
                else:
                    bound = module.in_features**-0.5
                    whole = torch.empty(p.shape).uniform_(-bound, bound, generator=tag_generator("cpu", seed, full_name))
                set_whole(p, whole)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, C], ids [B, K] -> [B, K, C]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Frozen networks: the text encoder, and the three that judge (REPA's teacher, P-DINO, LPIPS)


class TextEncoder(abc.ABC):
    """Prompts -> txt [B, L, D], 0 behind each prompt, and txt_mask [B, L] bool; `latents` leaves the padding out."""

    max_length: int  # L: longer prompts are cut

    @abc.abstractmethod
    def latents(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        """Latents of the prompts' tokens one after the other, [T, D], and how many each prompt has."""

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        latents, lengths = self.latents(prompts)
        mask = mask_of(lengths, self.max_length)  # on the host, so that no position is read back from the device
        where, mask = (x.to(latents.device, non_blocking=True) for x in (mask.flatten().nonzero()[:, 0], mask))
        txt = latents.new_zeros(mask.numel(), latents.shape[1]).index_copy_(0, where, latents)
        return txt.unflatten(0, mask.shape), mask


def mask_of(lengths: list[int], L: int) -> Tensor:
    """[B, L] bool, True where a prompt of so many tokens has one."""
    return torch.arange(L) < torch.tensor(lengths)[:, None]


class T5GemmaText(TextEncoder):
    """The frozen T5Gemma encoder: last hidden state of up to L tokens.

    It computes no padding: prompts lie one after the other in one sequence, each attends to itself alone.
    """

    PACK = 4096  # tokens of one forward: enough to fill a GPU, and a mask of 4096 x 4096

    def __init__(self, cfg: Config, device: torch.device, dtype: torch.dtype | None = None):
        from transformers import AutoConfig, AutoTokenizer, T5GemmaEncoderModel
        from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

        self.device, self.max_length = device, cfg.text_tokens
        beside = Path(cfg.text_encoder).with_name("tokenizer")  # where a diffusers folder has it
        self.tokenizer = load_pretrained(AutoTokenizer, str(beside) if beside.is_dir() else cfg.text_encoder)
        # A whole T5Gemma, or its encoder alone, as PRX's checkpoints carry it
        alone = load_pretrained(AutoConfig, cfg.text_encoder).model_type == "t5_gemma_module"
        loader, how = (T5GemmaEncoder, {}) if alone else (T5GemmaEncoderModel, {"is_encoder_decoder": False})
        model = load_pretrained(  # eager attention: SDPA leaves out T5Gemma's soft cap on the scores
            loader, cfg.text_encoder, **how, attn_implementation="eager", output_loading_info=True,
            dtype=dtype or compute_dtype(cfg, device))
        self.model = model.eval().requires_grad_(False).to(device)
        self.dim = model.config.hidden_size if alone else model.config.encoder.hidden_size

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt, cut at L."""
        prompts = [html.unescape(html.unescape(p)).strip() for p in prompts]  # PRX's light cleaning
        return self.tokenizer(prompts, truncation=True, max_length=self.max_length)["input_ids"]

    def packs(self, ids: list[list[int]]) -> Iterator[list[list[int]]]:
        """Consecutive prompts that one forward takes together."""
        pack = []
        for tokens in ids:
            if sum(map(len, pack)) + len(tokens) > self.PACK:
                yield pack
                pack = []
            pack.append(tokens)
        yield pack

    @torch.no_grad()
    def encode(self, pack: list[list[int]]) -> Tensor:
        """Latents of the prompts' tokens one after the other: [T, D], T the sum of their lengths."""
        lengths = torch.tensor([len(tokens) for tokens in pack])
        prompt = torch.repeat_interleave(lengths)  # [T], the prompt of each token
        T = len(prompt)
        if T == 0:
            return torch.zeros(0, self.dim, dtype=self.model.dtype, device=self.device)
        position = torch.arange(T) - (lengths.cumsum(0) - lengths)[prompt]  # [T], within the prompt
        ids = torch.tensor([id for tokens in pack for id in tokens])
        ids, position, prompt = (x.to(self.device, non_blocking=True) for x in (ids, position, prompt))
        apart = prompt[:, None] != prompt  # [T, T]
        mask = torch.zeros(1, 1, T, T, dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(apart, torch.finfo(mask.dtype).min)
        masks = {"full_attention": mask, "sliding_attention": mask}  # its window, 4096, is wider than any prompt
        return self.model(input_ids=ids[None], attention_mask=masks, position_ids=position[None]).last_hidden_state[0]

    def latents(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        ids = self.tokenize(prompts)
        return torch.cat([self.encode(pack) for pack in self.packs(ids)]), [len(tokens) for tokens in ids]


class BuiltinText(TextEncoder):
    """A text encoder without weights, for small vocabularies: scenes and trials.

    Text tokens never mix inside PRX, so each must carry its phrase: a token is its word's fixed random vector plus those
    of (signed offset, word) for the words up to four away. Function words are dropped, so that the phrase is near.
    """

    FUNCTION_WORDS = {"a", "an", "and", "at", "in", "is", "of", "on", "the", "there", "with"}
    REACH = 4

    def __init__(self, cfg: Config, device: torch.device):
        self.device, self.max_length, self.dim = device, cfg.text_tokens, cfg.text_dim
        self.ids: dict[str, int] = {}
        self.table = torch.zeros(1, 2 * self.REACH + 1, self.dim, device=device)  # [words + 1, offsets, D]

    def word_id(self, word: str) -> int:
        """The word's row in the table of vectors, which grows as words are met; row 0 is no word."""
        if word not in self.ids:
            self.ids[word] = len(self.ids) + 1
            generator = tag_generator("cpu", "builtin text", word)
            vectors = torch.randn(1, 2 * self.REACH + 1, self.dim, generator=generator)  # one an offset
            vectors = (vectors / (2 * self.REACH + 1) ** 0.5).to(self.device, non_blocking=True)
            self.table = torch.cat([self.table, vectors])
        return self.ids[word]

    def latents(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        L, reach = self.max_length, self.REACH
        ids = torch.zeros(len(prompts), reach + L + reach, dtype=torch.int64)  # zeros on both sides: no word there
        for row, prompt in enumerate(prompts):
            words = [w for w in re.findall(r"\w+", prompt.lower()) if w not in self.FUNCTION_WORDS][:L]
            ids[row, reach : reach + len(words)] = torch.tensor([self.word_id(w) for w in words], dtype=torch.int64)
        is_word = ids[:, reach : reach + L] > 0  # [B, L]
        near = ids.unfold(1, 2 * reach + 1, 1)[is_word].to(self.device, non_blocking=True)  # [T, offsets]
        return self.table[near, torch.arange(2 * reach + 1, device=self.device)].sum(1), is_word.sum(1).tolist()


def load_text_encoder(cfg: Config, device: torch.device, dtype: torch.dtype | None = None) -> TextEncoder:
    """The encoder that `cfg.text_encoder` names, in `dtype`, or else in the run's precision (`compute_dtype`).

    Raises UserError where it cannot be had, or is not `cfg.text_dim` wide.
    """
    if cfg.text_encoder == "builtin":
        return BuiltinText(cfg, device)
    encoder = T5GemmaText(cfg, device, dtype)
    if encoder.dim != cfg.text_dim:
        raise UserError(f"{cfg.text_encoder} gives {encoder.dim}-dim latents, not {cfg.text_dim}: pass --text_dim={encoder.dim}")
    return encoder


class StoredPrompts(TextEncoder):
    """The text encoder of a run whose data holds latents: it knows the empty prompt, those of the grids, and held-out captions.

    Raises UserError where the run is to draw other prompts.
    """

    def __init__(self, cfg: Config, sets: list[RowSet], device: torch.device):
        if cfg.score and "scenes" in parse_metrics(cfg.score):
            raise UserError("--score=scenes: the data's text latents are of its own captions only; score with cmmd, mmd, fdd or fid")
        self.max_length, self.device = cfg.text_tokens, device
        self.stored = {prompt: latents for s in sets for prompt, latents in s.latents.prompts.items()}
        self.rows = {s.columns["caption"][int(row)].as_py(): (s, row) for s in sets for row in s.held_out[: cfg.score_n]}

    def read(self, prompt: str) -> Tensor:
        """The latents of one prompt, [its tokens, D]."""
        if prompt in self.stored:
            return self.stored[prompt]
        s, row = self.rows[prompt]
        return s.latents.read(row, "caption")

    def latents(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        latents = [self.read(prompt) for prompt in prompts]
        return torch.cat(latents).to(self.device), [len(x) for x in latents]


class Dino:
    """Patch tokens of a frozen DINOv2 (with registers) or DINOv3: images [B, 3, H, W] in [-1, 1] -> [B, P, D]."""

    # The true shapes, for --frozen=random without a network; any other model must be a folder with its config.
    SHAPES = {
        "facebook/dinov3-vitl16-pretrain-lvd1689m": ("dinov3_vit", dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, num_register_tokens=4)),
        "facebook/dinov2-with-registers-large": ("dinov2_with_registers", dict(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)),
        "facebook/dinov2-with-registers-base": ("dinov2_with_registers", dict(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=14)),
    }

    def __init__(self, model_id: str, weights: str, dtype: torch.dtype, device: torch.device, seed: int = 0, compile: bool = False):
        from transformers import AutoConfig, AutoModel

        if weights == "pretrained":
            model = load_pretrained(AutoModel, model_id, dtype=dtype, output_loading_info=True)
        else:
            if Path(model_id).is_dir():
                config = load_pretrained(AutoConfig, model_id)
            elif model_id in self.SHAPES:
                config = AutoConfig.for_model(self.SHAPES[model_id][0], **self.SHAPES[model_id][1])
            else:
                raise UserError(f"--frozen=random knows the shapes of {', '.join(self.SHAPES)} and of local folders, "
                                f"not of {model_id}")
            with torch.random.fork_rng(devices=[]):  # the same random network on every rank
                torch.manual_seed(tag_seed(seed, "random", model_id))
                model = AutoModel.from_config(config, dtype=dtype)
        self.model = model.eval().requires_grad_(False).to(device)
        if compile:
            compile_layers(self.model)
        self.dtype = dtype
        self.patch, self.dim, self.image_size = model.config.patch_size, model.config.hidden_size, model.config.image_size
        self.prefix = 1 + getattr(model.config, "num_register_tokens", 0)  # [CLS, registers, patches]
        self.mean, self.std = torch.tensor(IMAGENET, device=device)[..., None, None]  # what both DINOs were trained with

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Features of `images` resized to `size` pixels; [B, (H / patch) (W / patch), D] fp32."""
        x = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
        x = (((x + 1) / 2).clamp(0, 1) - self.mean) / self.std  # no gradient from pixels outside [-1, 1] (code)
        return self.model(x.to(self.dtype)).last_hidden_state[:, self.prefix :].float()


@dataclass
class Frozen:
    """The networks behind the auxiliary losses; None turns a term off."""

    teacher: Callable[[Tensor], Tensor] | None = None  # x0 [B, 3, H, W] -> features [B, N, D], one an image token
    pdino: Callable[[Tensor], Tensor] | None = None  # image [B, 3, H, W] -> features [B, P, D]
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None  # two images [B, 3, H, W] -> distance, B values


def compile_layers(network: nn.Module) -> None:
    """Compile each module of each stack of equal layers, in place: one compilation serves all of a stack."""
    for stack in network.modules():
        for layer in stack if isinstance(stack, nn.ModuleList) else []:
            layer.compile(fullgraph=True, dynamic=False)


def scene_teacher(cfg: Config) -> str:
    """The folder of the network that `scenes.py teacher` trained, in the run's first set; raises UserError where there is none."""
    data = cfg.data.split(",")[0].partition(":")[0]
    if not Path(data, "teacher", "model.safetensors").exists():
        raise UserError(f"--frozen=scene: {data} has no teacher; `python scenes.py teacher --data={data}` trains it in a minute or two")
    return f"{data}/teacher"


def load_frozen(cfg: Config, device: torch.device) -> Frozen:
    """Load what the weights and stages of `cfg` ask for; raises UserError where a network cannot be had."""
    frozen = Frozen()
    if cfg.frozen == "none":
        return frozen
    dtype = compute_dtype(cfg, device)
    is_scene = cfg.frozen == "scene"
    if is_scene:  # one network judges both, at its own size; for LPIPS' VGG there is no stand-in
        cfg = replace(cfg, frozen="pretrained", repa_teacher=scene_teacher(cfg), pdino_model=scene_teacher(cfg), lpips_weight=0.0)
    if cfg.repa_weight > 0 and any(stage.repa for stage in cfg.stages):
        dino = Dino(cfg.repa_teacher, cfg.frozen, dtype, device, cfg.seed, compiles(cfg, device))
        if dino.dim != cfg.repa_dim:
            raise UserError(f"{cfg.repa_teacher} gives {dino.dim}-dim features, not {cfg.repa_dim}: pass --repa_dim={dino.dim}")
        frozen.teacher = lambda x0: dino(x0, size=(x0.shape[2] // cfg.patch * dino.patch, x0.shape[3] // cfg.patch * dino.patch))
    if cfg.pdino_weight > 0:
        pdino = Dino(cfg.pdino_model, cfg.frozen, dtype, device, cfg.seed, compiles(cfg, device))
        side = pdino.image_size if is_scene else 224
        frozen.pdino = lambda image: pdino(image, size=(side, side))
    if cfg.lpips_weight > 0:
        frozen.lpips = load_lpips(cfg, device, dtype)
    return frozen


def load_lpips(cfg: Config, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with VGG16 (its weights, 528 MB, are downloaded by torchvision on first use)."""
    import lpips

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of old names
            torch.manual_seed(tag_seed(cfg.seed, "random", "vgg16"))
            network = lpips.LPIPS(net="vgg", pnet_rand=cfg.frozen == "random", verbose=False)
    except OSError as error:
        raise UserError(f"cannot load VGG16 for LPIPS: {error}; put vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints "
                        "(https://download.pytorch.org/models/vgg16-397923af.pth), or turn it off with --lpips_weight=0") from None
    network = network.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)  # eval: dropout in its heads
    if compiles(cfg, device):
        network.compile(fullgraph=True, dynamic=False)

    def distance(*images: Tensor) -> Tensor:
        return network(*(image.to(dtype, memory_format=torch.channels_last) for image in images)).float()

    return distance


# ---------------------------------------------------------------------------------------------------------------------
# The loss of one chunk


def training_loss(model, frozen: Frozen, batch: dict[str, Tensor], cfg: Config, stage: Stage,
                  generator: torch.Generator | list[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of one chunk, or the mean of several, and its unweighted terms, all 0-dim, on the device.

    batch: x0 [B, 3, H, W] in [-1, 1], txt [B, L, D] (or [T, D], without padding), txt_mask [B, L] bool, captions already
    dropped. Timesteps, noise and routed tokens are drawn from `generator`, one for each chunk of equally many rows, on the
    device of x0. A term is on where its weight is positive and its network is there; REPA also needs a stage with `repa`.
    """
    x0 = batch["x0"]
    B, _, H, W = x0.shape
    N, device = (H // cfg.patch) * (W // cfg.patch), x0.device
    generators = generator if isinstance(generator, list) else [generator]
    rows = B // len(generators)
    t = torch.cat([sample_timesteps(cfg, rows, device, g) for g in generators])
    eps = cfg.noise_scale * torch.cat([torch.randn(rows, 3, H, W, device=device, generator=g) for g in generators])
    ids_keep = torch.cat([draw_ids_keep(rows, N, cfg.drop, device, g) for g in generators]) if cfg.drop > 0 else None

    on = term_names(cfg, frozen, stage)
    with torch.no_grad():  # before the model, whose weights may still be on their way from other GPUs
        pdino_target = frozen.pdino(x0) if "pdino" in on else None  # [B, P, D]
        repa_target = frozen.teacher(x0) if "repa" in on else None  # [B, N, D]

    x0_hat, feat = model(add_noise(x0, eps, t), t, batch["txt"], batch["txt_mask"], ids_keep)

    # |v_hat - v|^2 = |x0_hat - x0|^2 / max(t, 0.05)^2, and other powers of t reweight noise levels
    error = (x0_hat - x0).square().mean(dim=(1, 2, 3))  # [B]
    terms = {"flow": (error / t.clamp(min=T_MIN) ** cfg.t_power).mean()}
    loss = terms["flow"]

    if "lpips" in on:
        half = [F.interpolate(image, scale_factor=0.5, mode="bilinear", align_corners=False) for image in (x0_hat, x0)]
        terms["lpips"] = frozen.lpips(*half).mean()
        loss = loss + cfg.lpips_weight * terms["lpips"]

    if "pdino" in on:
        terms["pdino"] = 1 - F.cosine_similarity(frozen.pdino(x0_hat), pdino_target, dim=-1).mean()
        loss = loss + cfg.pdino_weight * terms["pdino"]

    if "repa" in on:
        if feat.shape[1] < N:
            repa_target = gather_tokens(repa_target, ids_keep)  # [B, N, D] -> [B, N_keep, D]
        terms["repa"] = -F.cosine_similarity(model.repa_projector(feat).float(), repa_target, dim=-1).mean()
        loss = loss + cfg.repa_weight * terms["repa"]

    return loss, {name: term.detach() for name, term in terms.items()}


def term_names(cfg: Config, frozen: Frozen, stage: Stage) -> list[str]:
    """The terms that `training_loss` returns, in its order."""
    on = {"lpips": frozen.lpips is not None and cfg.lpips_weight > 0,
          "pdino": frozen.pdino is not None and cfg.pdino_weight > 0,
          "repa": frozen.teacher is not None and stage.repa and cfg.repa_weight > 0}
    return ["flow", *(name for name, is_on in on.items() if is_on)]


# ---------------------------------------------------------------------------------------------------------------------
# Data: checked shards on disk -> chunks -> batches on the device


class Chunks(torch.utils.data.Dataset):
    """The training rows as an endless sequence of chunks; item i is a pure function of (seed, i), so resume is an index.

    The stream of rows takes each set in proportion to its weight, and each set's rows in epochs, every epoch a
    permutation of its own. Chunk c of step s holds rows (s * chunks_per_step + c) * micro_batch onwards.
    """

    SLOTS = 10_000  # the mix repeats after this many rows, so weights are met to one in ten thousand
    TRIES = 3  # rows in a row that may be unreadable

    def __init__(self, cfg: Config, stage: Stage, first_row: int):
        folders = [part.partition(":") for part in cfg.data.split(",")]
        self.sets = [RowSet(folder, cfg, stage.image_size) for folder, _, _ in folders]
        try:
            weights = np.array([float(w) if w else len(s.train) for (_, _, w), s in zip(folders, self.sets)])
        except ValueError:
            raise UserError(f"--data={cfg.data}: a weight is not a number") from None
        if not ((weights > 0) & (weights < math.inf)).all():
            raise UserError(f"--data={cfg.data}: weights must be positive")
        self.cfg, self.stage, self.first_row = cfg, stage, first_row
        # Slot k of the mix goes to the set that is furthest behind its share.
        share = weights / weights.sum()
        given = np.zeros(len(weights), dtype=np.int64)
        self.slot_set, self.slot_rank = np.zeros(self.SLOTS, np.int64), np.zeros(self.SLOTS, np.int64)
        for k in range(self.SLOTS):
            s = int(np.argmax(share * (k + 1) - given))
            self.slot_set[k], self.slot_rank[k] = s, given[s]
            given[s] += 1
        self.slots_of = given
        if not given.all():
            never = self.sets[int(np.argmin(given))].folder
            raise UserError(f"--data={cfg.data}: {never} has so little weight that it would never be read: give weights, such as a:1,b:10")
        if len({s.latents.revision for s in self.sets if s.latents}) > 1:
            raise UserError(f"--data={cfg.data}: the sets' text latents are of different revisions of {cfg.text_encoder}: embed them again")
        self.permutations: dict[int, tuple[int, np.ndarray]] = {}  # set -> (epoch, order), the one in use

    def locate(self, position: int) -> tuple[RowSet, np.ndarray, int]:
        """Position in the run's stream of rows -> the set, its order of rows in this epoch, and the place in that order."""
        cycle, slot = divmod(position, self.SLOTS)
        s = int(self.slot_set[slot])
        epoch, i = divmod(cycle * int(self.slots_of[s]) + int(self.slot_rank[slot]), len(self.sets[s].train))
        if self.permutations.get(s, (None,))[0] != epoch:
            order = np.random.default_rng(tag_seed(self.cfg.seed, "order", s, epoch)).permutation(self.sets[s].train)
            self.permutations[s] = epoch, order
        return self.sets[s], self.permutations[s][1], i

    def read(self, position: int, kind: str | None) -> dict:
        """The row at a position of the stream or, where its image is damaged, the next of its epoch, said on stderr."""
        s, order, place = self.locate(position)
        for row in order.take(range(place, place + self.TRIES), mode="wrap"):
            try:
                return s.read(row, kind)
            except DamagedImage:
                print(f"warning: {s.folder}/{s.stored_size} row {row} does not decode and is passed over: "
                      f"`python data_prep.py check --data={s.folder}`", file=sys.stderr)
        raise UserError(f"{s.folder}/{s.stored_size}: {self.TRIES} rows in a row do not decode: build the data again")

    def __len__(self) -> int:
        return self.stage.steps * self.stage.global_batch // self.cfg.micro_batch

    def rows(self, i: int) -> Iterator[dict]:
        """The rows of chunk i of the stage; captions are dropped, and long or short ones chosen, here."""
        first, B = self.first_row + i * self.cfg.micro_batch, self.cfg.micro_batch
        random = np.random.default_rng(tag_seed(self.cfg.seed, "captions", first))
        dropped, short = random.random(B) < self.cfg.caption_dropout, random.random(B) < self.stage.short
        for k, kind in enumerate(np.where(dropped, None, np.where(short, "caption_short", "caption"))):
            yield self.read(first + k, kind)

    def __getitem__(self, i: int) -> dict:
        """Chunk i of the stage, in memory of its own."""
        return self.collate(self.rows(i))

    def new_slot(self, **how) -> Slot:
        """Memory for a chunk, with room for latents if all sets have them."""
        return Slot(self.cfg.micro_batch, self.stage.image_size, self.cfg.text_tokens, self.cfg.text_dim,
                    with_latents=all(s.latents for s in self.sets), **how)

    def collate(self, rows: Iterable[dict]) -> dict:
        """Up to B rows as a chunk."""
        slot = self.new_slot()
        return slot.view(slot.fill(rows))


def load_chunks(chunks: Chunks, order: list[int], device: torch.device) -> Iterator[dict]:
    """Chunks in the given order, read ahead by worker processes; on a GPU their tensors are there when they are asked for.

    A chunk's tensors are valid until the next but one is asked for.
    """
    cuda = device.type == "cuda"
    at_once = chunks.cfg.chunks_at_once
    ring = Ring(chunks, order, chunks.cfg.workers, behind=1 + at_once)
    loader = iter(torch.utils.data.DataLoader(
        ring, batch_size=None, sampler=range(len(order)), num_workers=chunks.cfg.workers, worker_init_fn=become_reader,
        prefetch_factor=ring.AHEAD if chunks.cfg.workers else None,
        multiprocessing_context="fork" if chunks.cfg.workers else None))  # the slots are shared by inheritance
    if not cuda:
        yield from (ring.view(k, raw) for k, raw in enumerate(loader))
        return
    ring.lock_pages()  # so that copies are asynchronous; after the workers were forked
    stream, under_way = torch.cuda.Stream(), []
    for k, raw in enumerate(loader):
        with torch.cuda.stream(stream):  # copies run under the kernels of the chunk before
            raw = {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in ring.view(k, raw).items()}
            under_way.append((raw, stream.record_event()))
        if len(under_way) > at_once:
            yield arrived(*under_way.pop(0))
    yield from (arrived(*last) for last in under_way)
    ring.unlock_pages()


def arrived(raw: dict, copied: torch.cuda.Event) -> dict:
    """A chunk whose copies have ended, so that its slot is free; they were begun a pass ago, and nobody waits."""
    copied.synchronize()
    for x in raw.values():
        if isinstance(x, Tensor):
            x.record_stream(torch.cuda.current_stream())  # another stream's memory, in use on this one from here on
    return raw


def make_batch(raw: dict, encode_text: TextEncoder, device: torch.device) -> dict[str, Tensor]:
    """A chunk of rows -> x0 [B, 3, H, W] in [-1, 1], txt [T, D], the tokens that txt_mask [B, L] counts, on the device."""
    txt, lengths = (raw["latents"], raw["lengths"]) if "latents" in raw else encode_text.latents(raw["captions"])
    on_device = [x.to(device, non_blocking=True) for x in (raw["images"], txt, mask_of(lengths, encode_text.max_length))]
    x0 = on_device[0].to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
    return {"x0": x0, "txt": on_device[1].clone(), "txt_mask": on_device[2]}  # what was read lies where the next will


# ---------------------------------------------------------------------------------------------------------------------
# Sharding, averaged weights, checkpoints


@functools.cache
def compiler_trouble(device: torch.device) -> str:
    """Why torch.compile does not work on `device`, in a line; "" where it does, which is found out by compiling one.

    It takes a C++ compiler (g++, or the one that CXX names) and Python's headers, and a cache folder that can be written
    and executed from; on a GPU Triton takes a C compiler as well.
    """
    if not os.path.isdir(COMPILE_CACHE):
        return f"torch.compile's cache, TORCHINDUCTOR_CACHE_DIR={COMPILE_CACHE}, cannot be made"
    try:
        unseen = time.time_ns() % 10**9  # in no cache, which would hide a compiler that is gone
        line, x = torch.fx.symbolic_trace(lambda x: (unseen * x).sin()), torch.ones(64, device=device)
        torch._inductor.compile(line, [x])(x)
    except Exception as error:  # whatever it is, blocks run uncompiled, and the log says why
        lines = [line for line in str(error).splitlines() if re.search(r"\w(Error|Compiler): | error: ", line)] or [str(error)]
        wrong = next((line for line in lines if " error: " in line), lines[0])  # a C++ compiler's own words, if they are there
        return "torch.compile fails here: " + wrong.split(" error: ")[-1].split(".  ")[0].strip()
    return ""


def compiles(cfg: Config, device: torch.device) -> bool:
    """Whether blocks are compiled: where the config asks for it and the machine can."""
    return cfg.compile and not compiler_trouble(device)


def build_model(cfg: Config, mesh: DeviceMesh, device: torch.device) -> PRX:
    """PRX with initial weights, sharded over the mesh: parameters stay gathered between forward and backward."""
    with torch.device("meta"):
        model = PRX(cfg)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(cfg, device),
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)  # t stays fp32
    # REPA's projector goes with the root: torch 2.11 fails in backward on a unit of its own whose forward never ran
    for unit in [*model.blocks, model]:
        if compiles(cfg, device) and isinstance(unit, Block):
            unit.compile(fullgraph=True, dynamic=False)  # in place: no `_orig_mod` in any name
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(unit, "text_keys")
    model.to_empty(device=device)
    model.init_weights(cfg.seed)
    return model


def begin_gather(model: nn.Module) -> None:
    """Begin to gather all weights that are not; the blocks wait for theirs, and what runs before them hides it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard(async_op=True)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights, so that the next forward gathers the shards anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class EMA:
    """The exponential moving average of the weights, sharded as they are, in fp32."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, smoothing: float) -> None:
        """average <- smoothing average + (1 - smoothing) weights."""
        torch._foreach_lerp_(local(list(self.weights.values())), local(list(self.model.parameters())), 1 - smoothing)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model computes with the averaged weights."""
        weights, average = local(list(self.model.parameters())), local(list(self.weights.values()))
        with torch.no_grad():
            backup = [w.clone() for w in weights]
            torch._foreach_copy_(weights, average)
            reshard(self.model)
            try:
                yield
            finally:
                torch._foreach_copy_(weights, backup)
                reshard(self.model)


def checkpoint_state(model: nn.Module, ema: EMA, optimizer: Muon, progress: dict[str, Tensor]) -> dict:
    """Everything that a run continues from, by parameter name; loading fills these tensors in place."""
    parameters = dict(model.named_parameters())
    return {"model": {name: p.detach() for name, p in parameters.items()}, "ema": ema.weights,
            "optimizer": {name: optimizer.state[p] for name, p in parameters.items()}, "progress": progress}


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


def build_optimizer(model: nn.Module, cfg: Config) -> Muon:
    """Muon for the matrices inside blocks, Adam for everything else; every parameter has exactly one group."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if name.startswith("blocks.") and p.ndim == 2 else others).append(p)
    assert len(matrices) + len(others) == len({id(p) for p in model.parameters()})
    ns_dtype = compute_dtype(cfg, matrices[0].device)
    return Muon([
        {"params": matrices, "use_muon": True, "lr": cfg.lr, "momentum": cfg.momentum, "nesterov": True,
         "ns_steps": cfg.ns_steps, "ns_dtype": ns_dtype, "weight_decay": 0.0},
        {"params": others, "use_muon": False, "lr": cfg.adam_lr, "betas": cfg.adam_betas, "eps": cfg.adam_eps,
         "weight_decay": 0.0},
    ], compile=cfg.compile and matrices[0].is_cuda)  # on a CPU it takes a minute and saves little


def lr_factor(cfg: Config, step: int) -> float:
    """What the learning rates are multiplied with at `step` (0-based): linear warm-up, then constant or linear to 0."""
    decay = 1 - step / cfg.total_steps if cfg.lr_decay == "linear" else 1.0
    return decay * min(1.0, (step + 1) / max(1, cfg.warmup))


@torch.no_grad()
def gradient_norm(model: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The global gradient norm, and ok: 0 on all ranks where the norm or a rank's `loss` is not finite, else 1.

    Both 0-dim, on the device. Collective.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    replicas = grads[0].device_mesh.mesh[..., 0].numel() if isinstance(grads[0], DTensor) else 1  # each holds all shards
    squared = squared_norm(grads) / replicas + 0 * loss  # 0 times a loss that is not finite is not finite either
    dist.all_reduce(squared)
    return squared.sqrt(), squared.isfinite().float()


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """The sum of squares over this rank's part of the tensors, 0-dim."""
    return torch.stack(torch._foreach_norm(local(tensors))).square().sum()


def chunks_together(cfg: Config, mine: int) -> int:
    """How many of a rank's `mine` chunks pass the network at a time: as many as `chunks_at_once` allows, equally many each."""
    return max(n for n in range(1, cfg.chunks_at_once + 1) if mine % n == 0)


def train_step(model: PRX, optimizer: Muon, ema: EMA, frozen: Frozen, batches: Iterator[dict[str, Tensor]], cfg: Config,
               stage: Stage, step: int, watched: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Step `step` (0-based) of the run on this rank's chunks, which are the next of `batches`.

    Returns, all on the device: the loss, its terms and the gradient norm [K], means over this rank's chunks; ok, 0 where the
    step was skipped; by name, squared norms of this rank's part of the `watched` parameters, their gradients and updates.
    """
    mine = stage.global_batch // cfg.micro_batch // dist.get_world_size()  # chunks of a step that this rank runs
    together = chunks_together(cfg, mine)
    values = 0.0
    for k in range(0, mine, together):
        chunks = [next(batches) for _ in range(together)]
        batch = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        last = k + together == mine
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        begin_gather(model)
        draws = [tag_generator(batch["x0"].device, cfg.seed, step, dist.get_rank() * mine + k + j) for j in range(together)]
        loss, terms = training_loss(model, frozen, batch, cfg, stage, draws if together > 1 else draws[0])
        (loss * together / mine).backward()
        values = values + torch.stack([loss.detach(), *terms.values()]) * (together / mine)
    norms = {f"grad_norm/{name}": squared_norm([p.grad for p in params]) for name, params in watched.items()}
    before = {name: [w.clone() for w in local(params)] for name, params in watched.items()}

    norm, ok = gradient_norm(model, values[0])
    for group in optimizer.param_groups:
        group["lr"] = lr_factor(cfg, step) * (cfg.lr if group["use_muon"] else cfg.adam_lr)
    optimizer.step(ok, scale=(cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0))  # clipped as torch.nn.utils.clip_grad_norm_ does
    optimizer.zero_grad()
    if step % cfg.ema_every == 0:
        ema.update(cfg.ema)

    for name, params in watched.items():
        weights = [p.detach() for p in local(params)]
        norms[f"weight_norm/{name}"] = squared_norm(weights)
        norms[f"update_norm/{name}"] = squared_norm(torch._foreach_sub(weights, before[name]))
    return torch.cat([values, norm[None]]), ok, norms


# ---------------------------------------------------------------------------------------------------------------------
# Validation, sample grids, log


@torch.no_grad()
def held_out_losses(model: PRX, chunks: Chunks, encode_text: TextEncoder, cfg: Config, device: torch.device, n: int = 64) -> Tensor:
    """The flow-matching loss of each of up to `n` held-out rows, dense, at a fixed t and noise of its own: [rows]."""
    rows = [row for s in chunks.sets for row in s.read_held_out(-(-n // len(chunks.sets)))]
    errors = [torch.zeros(0, device=device)]
    for first in range(0, len(rows), cfg.micro_batch):
        part = rows[first : first + cfg.micro_batch]
        batch = make_batch(chunks.collate(part), encode_text, device)
        t = torch.tensor([(first + i + 0.5) / len(rows) for i in range(len(part))], device=device)
        noise = [torch.randn(batch["x0"].shape[1:], generator=tag_generator("cpu", "held out", row["key"])) for row in part]
        eps = cfg.noise_scale * torch.stack(noise).to(device)
        x0_hat, _ = model(add_noise(batch["x0"], eps, t), t, batch["txt"], batch["txt_mask"])
        error = (x0_hat - batch["x0"]).square().mean(dim=(1, 2, 3))
        errors.append(error / t.clamp(min=T_MIN) ** cfg.t_power)
    return torch.cat(errors)


def to_uint8(x0: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((x0.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sampling_settings(cfg: Config) -> dict:
    """How a run draws its own samples: the settings of `generate`."""
    return {"steps": cfg.sample_steps, "guidance": cfg.guidance, "scale": cfg.scale, "drop": cfg.drop, "shift": cfg.shift}


def draw(model: PRX, encode_text: TextEncoder, prompts: list[str], seeds: list[int], size: tuple[int, int], **settings) -> Tensor:
    """Pictures of prompts, one seed each: x0 [B, 3, H, W] in [-1, 1]; settings as `generate` takes them."""
    (txt, txt_mask), (null_txt, null_mask) = encode_text(prompts), encode_text([""])
    return generate(model, txt, txt_mask, null_txt=null_txt, null_mask=null_mask, size=size, seeds=seeds, **settings)


class Window(NamedTuple):
    """The numbers of a log window."""

    means: dict[str, float]  # by name, of the steps that were not skipped; empty where all were
    norms: dict[str, float]  # of the last step, by name
    skipped: int  # steps
    in_a_row: int  # most skipped steps in a row, counted from before the window
    stop: bool  # whether any rank was asked to stop
    steps: int  # taken and skipped


class Meter:
    """Means of a log window, summed on the device; skipped steps are counted and left out of them."""

    def __init__(self, names: list[str], mesh: DeviceMesh, device: torch.device):
        self.names, self.shards, self.device = names, mesh.shape[-1], device
        self.skips_in_a_row = torch.zeros((), device=device)
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(self.names) + 3, device=self.device)  # `names`, skipped, most in a row, stop asked
        self.steps = 0

    def add(self, values: Tensor, ok: Tensor) -> None:
        """One step's values [len(names)]; ok is 0 where the step was skipped."""
        self.skips_in_a_row = (self.skips_in_a_row + 1) * (1 - ok)
        self.sums[:-3] += torch.where(ok > 0, values, 0.0)
        self.sums[-3] += 1 - ok
        self.sums[-2] = torch.maximum(self.sums[-2], self.skips_in_a_row)
        self.steps += 1

    def close(self, stop: bool, norms: dict[str, Tensor]) -> Window:
        """Average over ranks and start anew; `norms` are squares of this rank's parts. The host waits for the device here."""
        self.sums[-1] = float(stop)
        sent = torch.cat([self.sums, torch.stack([*norms.values()])]) / dist.get_world_size()
        dist.all_reduce(sent)
        host = sent.cpu()
        *sums, skipped, in_a_row, stops = host[: -len(norms)].tolist()
        steps, taken = self.steps, self.steps - round(skipped)
        means = {name: total / taken for name, total in zip(self.names, sums)} if taken else {}
        roots = (host[-len(norms) :] * self.shards).sqrt().tolist()  # a mean over ranks; each replica holds every shard
        self.reset()
        return Window(means, dict(zip(norms, roots)), round(skipped), round(in_a_row), stops > 0, steps)


def write_header(log: Log, cfg: Config, frozen: Frozen, model: PRX, data: dict, device: torch.device,
                 began: datetime.datetime, troubles: list[str]) -> None:
    """What proves a run: source, config, versions, hardware and data; the console gets the part that people read.

    troubles: why each rank's blocks are not compiled, "" where they are, or should not be.
    """
    import datasets
    import transformers

    for name, text in SOURCES.items():
        log.write(f"==== {name} sha256 {hashlib.sha256(text.encode()).hexdigest()}\n{text}====", console=False)
    log.write(f"config {json.dumps(config_to_json(cfg))}", console=False)
    cpu, has_bf16 = describe_cpu()
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    log.write(f"{began:%Y-%m-%d %H:%M:%S}  python {platform.python_version()}  torch {torch.__version__}  "
              f"transformers {transformers.__version__}  datasets {datasets.__version__}  numpy {np.__version__}")
    log.write(f"{dist.get_world_size()} x {hardware}, {torch.get_num_threads()} threads; source {SOURCE_HASH[:12]}; "
              f"run {cfg.name}, seed {cfg.seed}, {cfg.precision}")
    if device.type == "cpu":
        log.write(f"computes in {cfg.precision} on a processor with{'' if has_bf16 else 'out'} bf16 units (AVX512-BF16, AMX)")
    if device.type == "cpu" and gpu_trouble():
        log.write(f"this machine's GPU is not used: {gpu_trouble()}")
    elif device.type == "cpu" and cfg.device == "auto":
        log.write("no GPU is visible: this run is on the CPU")
    if device.type == "cpu" and cfg.precision == "bf16" and not has_bf16:
        log.write("WARNING --precision=bf16 is emulated on this processor: a step of the demo took 16 times as long as in fp32")
    for folder, found in data.items():
        if cfg.frozen == "scene" and folder == scene_teacher(cfg):
            log.write(f"teacher {folder}, sha256 {found}; it was trained on the labels of the training scenes")
        else:
            log.write(f"data {folder}, manifest {found}")
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("repa_projector."))
    log.write(f"model {count:,} parameters, width {cfg.width}, depth {cfg.depth}, patch {cfg.patch}; "
              f"blocks {cfg.route.start} to {cfg.route.stop - 1} see {1 - cfg.drop:.0%} of the tokens in training")
    weights = {"flow": 1.0, "lpips": cfg.lpips_weight, "pdino": cfg.pdino_weight, "repa": cfg.repa_weight}
    for i, stage in enumerate(cfg.stages):
        on = term_names(cfg, frozen, stage)
        off = f"; off: {', '.join(name for name in weights if name not in on)}" if len(on) < len(weights) else ""
        log.write(f"stage {i + 1}: {stage.image_size}px, {stage.steps:,} steps of {stage.global_batch} images; "
                  f"loss {' + '.join(f'{weights[name]:g} {name}' for name in on)}{off}")
    for rank, trouble in enumerate(troubles):
        if trouble:
            log.write(f"blocks run uncompiled, and slower{f', on rank {rank}' if len(troubles) > 1 else ''}: {trouble}")
    if cfg.frozen == "random":
        log.write("WARNING --frozen=random: lpips, pdino and repa come from random weights and mean nothing")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def stage_spans(cfg: Config) -> list[tuple[Stage, int, int]]:
    """Each stage with its first step and its first row in the run's stream of rows."""
    spans, step, row = [], 0, 0
    for stage in cfg.stages:
        spans.append((stage, step, row))
        step, row = step + stage.steps, row + stage.steps * stage.global_batch
    return spans


def last_step(cfg: Config) -> int:
    """The step at which the run ends."""
    return min(cfg.total_steps, cfg.max_steps or cfg.total_steps)


def check_ranks(cfg: Config) -> None:
    """Raise UserError where the chunks of a step do not divide among the ranks."""
    world = ranks.world_size()
    for stage in cfg.stages:
        chunks = stage.global_batch // cfg.micro_batch
        if chunks % world:
            fits = [n for n in range(1, chunks + 1) if all(s.global_batch // cfg.micro_batch % n == 0 for s in cfg.stages)]
            raise UserError(f"{world} ranks cannot share {chunks} chunks of {cfg.micro_batch} rows evenly; "
                            f"these numbers can: {', '.join(map(str, fits))}")


def warm_up(model: PRX, frozen: Frozen, cfg: Config, device: torch.device) -> None:
    """Run a step of every stage on noise, so that all is compiled before the clock starts. Spoils the weights."""
    optimizer, ema = build_optimizer(model, cfg), EMA(model)
    for stage in cfg.stages:
        B, L, S = cfg.micro_batch, cfg.text_tokens, stage.image_size
        random = tag_generator(device, "warm-up")
        noise = {"x0": torch.randn(B, 3, S, S, device=device, generator=random).clamp(-1, 1),
                 "txt": torch.randn(B * L, cfg.text_dim, device=device, generator=random),
                 "txt_mask": torch.ones(B, L, dtype=torch.bool, device=device)}
        train_step(model, optimizer, ema, frozen, itertools.repeat(noise), cfg, stage, 0, {})


def train(cfg: Config, resume: str, device: torch.device, mesh: DeviceMesh, watch: ranks.Watch | None) -> bool:
    """Run the stages of `cfg` from where the run stands to its last step; False where a signal stopped it before."""
    rank, world, end, began = dist.get_rank(), dist.get_world_size(), last_step(cfg), datetime.datetime.now()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # a block compiles once for each (stage, routed or not)
    for chatty in ("torch.distributed.checkpoint", "torch.utils.cpp_extension"):  # of single ranks, of absent CUDA
        logging.getLogger(chatty).setLevel(logging.ERROR)

    # Set up: data first, since what is missing there is cheapest to find
    stages = [(stage, first_step, Chunks(cfg, stage, first_row)) for stage, first_step, first_row in stage_spans(cfg)]
    sets = stages[0][2].sets
    data = {s.folder: s.manifest_hash for s in sets}
    if cfg.frozen == "scene":
        data[scene_teacher(cfg)] = file_sha256(Path(scene_teacher(cfg), "model.safetensors"))
    identity = {"config": config_to_json(cfg), "source": SOURCE_HASH, "data": data}
    init = None
    if cfg.init and (resume == "never" or not checkpoints_of(Path("runs", cfg.name))):  # before --resume=never renames it
        init, init_hash = read_init(cfg.init, cfg), weights_hash(cfg.init)
    run = RunFolder(cfg.name, resume, identity, NOT_IDENTITY, end, cfg.keep, cfg.keep_every)
    log = run.log
    if cfg.track == "wandb":
        ranks.from_rank_0(lambda: log.track(cfg.name, identity))
    for turn in (0, 1):  # rank 0 first: what is downloaded is downloaded once
        if (rank == 0) == (turn == 0):
            if all(s.latents for s in sets):
                encode_text = StoredPrompts(cfg, sets, device)
            else:
                encode_text = load_text_encoder(cfg, device)
            frozen = load_frozen(cfg, device)
        dist.barrier()

    # Build
    model = build_model(cfg, mesh, device)
    paused = time.perf_counter()
    warm_up(model, frozen, cfg, device)
    warm_up_seconds = time.perf_counter() - paused
    model.init_weights(cfg.seed)
    if init is not None and run.checkpoint is None:
        fill(model, init, cfg.init)
        log.write(f"starting from the weights of {cfg.init}, sha256 {init_hash[:12]}")
    optimizer = build_optimizer(model, cfg)
    ema = EMA(model)
    progress = {"step": torch.zeros((), dtype=torch.int64), "seconds": torch.zeros((), dtype=torch.float64),
                "skipped": torch.zeros((), dtype=torch.int64)}
    state = checkpoint_state(model, ema, optimizer, progress)
    watched = {f"blocks.{i}": list(model.blocks[i].parameters()) for i in sorted({0, cfg.depth // 2, cfg.depth - 1})}

    # Resume
    if run.checkpoint is not None:
        load_checkpoint(run.checkpoint, state)
    step = int(progress["step"])
    log.forget_after(step)
    if step >= end:
        raise UserError(f"checkpoint {run.checkpoint} is at step {step}, and the run ends at {end}: raise --max_steps or --stages")
    troubles = ranks.of_all(compiler_trouble(device) if cfg.compile else "")
    write_header(log, cfg, frozen, model, data, device, began, troubles)
    if step:
        log.write(f"continuing from step {step}")
    log.write(f"warmed up in {warm_up_seconds:.1f} s, off the clock")
    signals = []  # those that asked to stop
    for number in ranks.SIGNALS:
        signal.signal(number, lambda number, frame: signals.append(number))
    started = time.perf_counter() - float(progress["seconds"])  # moved on by evaluation, samples and checkpoints
    stop = False

    def report(step: int, stage: Stage, seconds: float, window: Window) -> None:
        """Log a window that ends at `seconds` on the clock; raises UserError where too many steps in a row were skipped."""
        rate = window.steps / (seconds - float(progress["seconds"]))  # steps a second
        progress["seconds"].fill_(seconds)
        progress["skipped"] += window.skipped
        terms = "  ".join(f"{name} {mean:.4f}" for name, mean in window.means.items())
        left = datetime.timedelta(seconds=round((end - step) / rate))
        cost = f"  {seconds / 3600:.2f} h ${seconds / 3600 * world * cfg.price:,.2f}" if device.type == "cuda" else ""
        skips = f"  skipped {int(progress['skipped'])}" if progress["skipped"] else ""
        speed = rate * stage.global_batch
        log.write(f"step {step}/{end}  {terms}  {speed:.1f} images/s  {seconds:.2f} s  {left} left{cost}{skips}")
        norms = {name: norm for name, norm in window.norms.items() if math.isfinite(norm)}  # JSON has no NaN
        log.metrics(step, **window.means, **norms, lr=cfg.lr * lr_factor(cfg, step - 1), images_per_second=speed,
                    seconds=seconds, skipped=int(progress["skipped"]))
        if window.in_a_row >= SKIPS_IN_A_ROW:
            run.wait()
            raise UserError(f"{window.in_a_row} steps in a row had a loss or gradient that is not finite, at step {step}; "
                            f"last good checkpoint: {run.last()}")

    # Train
    for stage, first_step, chunks in stages:
        stage_end = min(first_step + stage.steps, end)
        if step >= stage_end or stop:
            continue
        for s in chunks.sets:
            if s.stored_size != stage.image_size:
                log.write(f"{s.folder} has no {stage.image_size}px: {s.stored_size}px is scaled down")
            if len(s.held_out) == 0:
                log.write(f"{s.folder} is too small to have held-out rows: it has no part in the held-out loss")
        per_step = stage.global_batch // cfg.micro_batch
        mine = per_step // world
        order = [s * per_step + rank * mine + k for s in range(step - first_step, stage_end - first_step) for k in range(mine)]
        batches = (make_batch(raw, encode_text, device) for raw in load_chunks(chunks, order, device))
        paused = time.perf_counter()
        scorer = Scorer(cfg.score, chunks.sets, cfg.score_n, device, batch=cfg.micro_batch) if cfg.score else None
        started += time.perf_counter() - paused
        meter = Meter(["loss", *term_names(cfg, frozen, stage), "grad_norm"], mesh, device)
        first = True  # the stage's first step waits for its readers to start

        def sample(prompts: list[str], seeds: Iterable[int]) -> np.ndarray:
            """Pictures uint8 [B, H, W, 3] of the stage's size, as the run draws them."""
            return to_uint8(draw(model, encode_text, prompts, list(seeds), (stage.image_size,) * 2, **sampling_settings(cfg)))

        while step < stage_end and not stop:
            eval_due, sample_due, score_due, save_due = (
                every and (step + 1) % every == 0 or step + 1 == stage_end
                for every in (cfg.eval_every, cfg.sample_every, cfg.score_every, cfg.save_every))
            pause = eval_due or sample_due or score_due or save_due
            closing = pause or (step + 1) % cfg.log_every == 0
            values, ok, norms = train_step(model, optimizer, ema, frozen, batches, cfg, stage, step, watched if closing else {})
            meter.add(values, ok)
            step += 1
            if first:
                first = False
                ranks.set_timeout(ranks.TIMEOUT, mesh)
                if watch:
                    watch.stepping.set()

            if closing:
                window = meter.close(bool(signals), norms)
                seconds, stop = time.perf_counter() - started, window.stop
                report(step, stage, seconds, window)
            if pause or stop:
                progress["step"].fill_(step)
                with ema.applied(), torch.compiler.set_stance("force_eager"):
                    if eval_due:
                        losses = held_out_losses(model, chunks, encode_text, cfg, device)
                        if len(losses):
                            log.write(f"step {step}/{end}  held-out loss {losses.mean():.4f}")
                            log.metrics(step, held_out=losses.mean().item(), seconds=seconds)
                    if sample_due:
                        prompts = [prompt for s in chunks.sets for prompt in s.manifest["prompts"]][:16]
                        sheet = draw_grid(sample(prompts, range(len(prompts))), prompts)
                        run.save_picture(sheet, f"step_{step:06d}.png")
                    if score_due and scorer:
                        scores = scorer(sample)
                        found = "  ".join(f"{name} {score.value:.4g} +-{score.error:.2g}" for name, score in scores.items())
                        log.write(f"step {step}/{end}  {found}")
                        log.metrics(step, **{name: score.value for name, score in scores.items()}, seconds=seconds,
                                    **{f"{name}_error": score.error for name, score in scores.items()})
                if save_due or stop:
                    drifted = ranks.drifted_ranks(dict(named_tensors(state)), mesh)
                    if drifted:
                        run.wait()
                        who = ", ".join(f"{watch.name(rank)} ({tensor})" for rank, tensor in drifted.items())
                        raise UserError(f"at step {step} the weights of {who} are not those of its replicas: a GPU, its memory or "
                                        f"a link is broken; without it, the same command continues from {run.last()}")
                    run.save(state, step)
                started = time.perf_counter() - seconds
        ranks.set_timeout(ranks.PATIENCE, mesh)

    # Finish
    run.wait()
    if run.trouble:
        raise UserError(f"the checkpoint of step {step} could not be written: {run.trouble}; make room, and the same command "
                        f"continues from {run.last()}")
    finished = step >= end
    run.close()
    if finished:
        log.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  finished at step {step}, {float(progress['seconds']):.2f} s on the "
                  f"clock: {run.path}/ema.safetensors, samples in {run.path}/samples")
    else:
        log.write(f"stopped by a signal at step {step} of {end}; the same command continues")
    return finished


def main(argv: list[str]) -> None:
    """The command line's run: set up, train, and take the ranks down in the order that gloo survives."""
    cfg, resume = parse_config(argv)
    check_gpu(cfg)
    check_ranks(cfg)
    device, mesh = ranks.join(cfg.device != "cpu" and torch.cuda.is_available())
    cfg = resolve_precision(cfg, device)
    ranks.agree(cfg.precision, "--precision=auto means different things, for their GPUs are not alike: pass --precision=fp32")
    with ranks.together(mesh) as watch:
        try:
            finished = train(cfg, resume, device, mesh, watch)
        except torch.OutOfMemoryError:
            sizes = ", ".join(f"{stage.image_size}px" for stage in cfg.stages)
            advice = (f"out of GPU memory with {cfg.chunks_at_once} chunks of {cfg.micro_batch} images at a time, at {sizes}: pass "
                      "--chunks_at_once=1, then a lower --micro_batch, which keeps the global batch, or smaller --stages")
            saved = checkpoints_of(Path("runs", cfg.name))
            if not saved:
                raise UserError(advice) from None
            # A run that has fitted until now: another process's memory, or fragments of its own. A restart may well go on
            raise RuntimeError(f"{advice}; it fitted until {saved[-1]}, from which the same command continues") from None
    gc.collect()  # model and gradients first: gloo processes otherwise sometimes abort after success
    dist.barrier()
    dist.destroy_process_group()
    if not finished:
        sys.exit(ranks.STOPPED)


if __name__ == "__main__":
    run_main(main)
