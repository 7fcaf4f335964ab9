"""nanoPRX: train a text-to-image model on raw pixels, in one file.

This is PRX's 24-hour speedrun (Photoroom 2026, https://github.com/Photoroom/PRX): a 1.2B transformer that turns noise
into 1024px images without a VAE. The network predicts the clean image (x-prediction), the loss is taken on velocity,
half of the image tokens are routed around most blocks (TREAD), features are aligned with a frozen DINOv3 (REPA), LPIPS
and DINOv2 judge the predicted image (P-DINO), and Muon steps the matrices inside blocks.

    python train_prx.py --preset=demo                                              2 CPU cores, minutes
    python train_prx.py --preset=solo                                              one GPU
    torchrun --nproc_per_node=8 train_prx.py --preset=record                       the recipe (run.sh: many nodes)
    python train_prx.py --preset=demo --name=try1 --width=192 --max_steps=200      any field of `Config` is a flag

Notation
    x0     clean image [B, 3, H, W] in [-1, 1]          eps    noise, same shape
    t      [B] in [0, 1]: 0 is data, 1 is noise         x_t    (1 - t) x0 + t eps
    x0_hat the network's output                         v      (x_t - x0) / max(t, 0.05)
    B batch   N image tokens   L text tokens   C width   h heads   d head dim
    ids_keep    [B, N_keep] tokens that stay in the routed blocks, ascending
    drop        fraction of image tokens routed around; route = blocks[start:end)
    repa_depth  features after this many blocks, before the routed tokens return
    chunk       `micro_batch` rows; a step is `global_batch / micro_batch` chunks, whatever the number of GPUs

Sources (arXiv)
    x-prediction in pixels (JiT)  2511.13720        shifted timesteps  2403.03206        REPA   2410.06940
    flow matching                 2210.02747        TREAD routing      2501.04765        LPIPS  1801.03924
    sparse guidance               2601.01608        Muon               2502.16982
    "code" in a comment: the value is PRX's, from its public code, where its write-ups are silent.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import html
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record as report_failure
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from muon import NS_COEFFICIENTS, Muon, local

try:
    os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()), exist_ok=True)
except OSError:  # torch's compiler, which the next two import, could not even be imported
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.gettempdir()
from torch.nn.attention.varlen import varlen_attn  # noqa: E402
from torchvision.utils import save_image  # noqa: E402

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # also where lpips and torchvision load theirs: nothing is unpickled
SOURCES = {name: Path(__file__).with_name(name).read_text() for name in ("train_prx.py", "muon.py")}  # before any edit
SOURCE_HASH = hashlib.sha256("".join(SOURCES.values()).encode()).hexdigest()
T_MIN = 0.05  # smallest t in a division: velocity's error would otherwise grow without bound near t = 0 (code)
HELD_OUT = 0.01  # share of rows that are never trained on
TIMEOUT = datetime.timedelta(minutes=5)  # of a collective: a rank that is gone or silent ends the others then
SKIPS_IN_A_ROW = 10  # non-finite steps after which a run stops
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of R, G, B in [0, 1]

class UserError(Exception):
    """A user's mistake: `run_main` prints it as one line and exits with status 2."""

# --- Configuration: one flat dataclass. A field is a flag, the comment behind it is the flag's help. -----------------

@dataclass(frozen=True)
class Stage:
    """A stretch of training at one image size."""
    image_size: int  # pixels, square
    steps: int  # optimizer steps
    global_batch: int  # images an optimizer step, over all GPUs
    repa: bool  # align features with the teacher in this stage
    short: float = 0.0  # share of rows with their short caption: a mix at the end keeps brief prompts working

@dataclass(frozen=True)
class Config:
    """Everything that decides a run; the defaults are the record recipe. `check_config` says what is valid."""
    # The run
    name: str = "record"  # the run's folder is runs/<name>
    data: str = "data/flux_generated,data/flux_reason,data/midjourney"  # comma list of path[:weight], else its rows
    frozen: str = "pretrained"  # networks behind REPA, P-DINO and LPIPS: pretrained, random (timing only) or none
    seed: int = 0  # decides the initial weights, the order of rows and every random number
    stages: tuple[Stage, ...] = (  # size:steps:batch:repa[:short],...
        Stage(512, 100_000, 1024, True), Stage(1024, 20_000, 512, False))
    micro_batch: int = 16  # rows of a chunk, which is drawn and run as a whole; part of the run's identity
    max_steps: int = 0  # stop after this many steps without bending the schedule; 0: run all stages
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is a GPU, which must then be usable
    precision: str = "auto"  # of products: bf16, fp32, or auto: bf16 on a GPU that has it; sums of steps stay fp32
    compile: bool = True  # torch.compile each block: 0 or 1
    chunks_at_once: int = 1  # chunks of a rank that pass the network together, at most: memory against speed
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
    text_encoder: str = "google/t5gemma-2b-2b-ul2"  # hub id or folder of a T5Gemma, or builtin: for small vocabularies
    text_dim: int = 2304  # width of the text encoder's last hidden state
    text_tokens: int = 256  # L: captions are cut here and padding is masked
    caption_dropout: float = 0.1  # share of captions replaced by the empty prompt, for classifier-free guidance
    # Flow matching
    shift: float = 3.0  # t -> s t / (1 + (s - 1) t), in training and sampling: larger images need more noise
    uniform_t: float = 0.1  # share of timesteps drawn uniformly, the rest logit-normal(0, 1) (code)
    noise_scale: float = 1.0  # factor on eps; PRX's later 7B pixel model uses 2
    t_power: float = 2.0  # loss weight 1 / max(t, 0.05)^t_power on the squared error of x0_hat; 2 is the velocity loss
    # Routing
    drop: float = 0.5  # share of image tokens that skip the routed blocks in training; 0: no routing
    route_start: int = 2  # first routed block
    route_end: int = -1  # routed are blocks[route_start:route_end], Python indices: the last block sees all tokens
    # Auxiliary losses, on top of flow matching with weight 1; x_weight weighs the term x of `training_loss`
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
    save_every: int = 1_000  # steps between checkpoints; 0: only at the end
    snapshot_every: int = 0  # steps between averaged weights that are kept, for tools/score.py; 0: none
    keep: int = 3  # checkpoints that are kept

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def last_step(self) -> int:
        return min(self.total_steps, self.max_steps or self.total_steps)

    @property
    def route(self) -> range:
        return range(self.depth)[self.route_start : self.route_end]

PRESETS = {
    "record": Config(chunks_at_once=2),  # on 32 GPUs 32 images of 512px: products of 4,096 rows, not 2,048
    # One GPU, minutes. Not yet run on a GPU: the learning rates are guesses, below the demo's.
    "solo": Config(
        name="solo", data="data/solo", frozen="none", stages=(Stage(256, 6_000, 256, True),), micro_batch=64,
        patch=16, bottleneck=128, width=640, depth=10, heads=10, text_encoder="builtin", text_dim=256, text_tokens=64,
        repa_depth=5, lr=4e-3, adam_lr=1e-3, lr_decay="linear", t_power=1.0, warmup=200, ema=0.9, grad_clip=1.0,
        guidance="cfg", scale=2.0, sample_steps=20),
    # Two CPU cores, under five minutes. Where it leaves the recipe, and why, is in the README.
    "demo": Config(
        name="demo", data="data/demo", device="cpu", frozen="none", stages=(Stage(32, 1_000, 32, True),),
        micro_batch=32, workers=0, patch=4, bottleneck=48, width=128, depth=6, heads=4, drop=0.25, route_start=1,
        route_end=5, repa_depth=3, text_encoder="builtin", text_dim=256, text_tokens=24,
        lr=1e-2, adam_lr=4e-3, lr_decay="linear", t_power=1.0, warmup=50, ema=0.9, grad_clip=1.0,
        guidance="cfg", scale=2.0, sample_steps=20, eval_every=400, sample_every=400, save_every=400),
}
# The track of that name (records/README.md), on scenes with textures; what its settings gain is in records/
PRESETS["race"] = replace(
    PRESETS["demo"], name="race", data="data/race", stages=(Stage(64, 525, 64, True),), micro_batch=64, patch=16,
    bottleneck=192, heads=8, text_tokens=32, drop=0.0, lr=2e-2, adam_lr=6e-3, momentum=0.9, t_power=0.5, warmup=25,
    ema=0.8, scale=2.5)

CHOICES = {
    "frozen": ("pretrained", "random", "none"), "device": ("auto", "cpu", "cuda"), "lr_decay": ("none", "linear"),
    "precision": ("auto", "bf16", "fp32"), "guidance": ("self", "cfg", "none"),
}
NOT_IDENTITY = {"max_steps", "device", "chunks_at_once", "workers", "log_every", "eval_every", "sample_every",
                "save_every", "snapshot_every", "keep"}  # what may differ where a run is continued

def parse_value(name: str, kind: type, text: str):
    """One flag's text as its field's type; raises argparse's error naming the flag."""
    wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}.get(kind, "two numbers")
    try:
        if name == "stages":  # "512:100000:1024:1,1024:20000:512:0:0.5"
            wanted = "image_size:steps:global_batch:repa[:short], comma separated, repa 0 or 1"
            parts = [part.split(":") for part in text.split(",")]
            return tuple(Stage(*map(int, part[:3]), {"0": False, "1": True}[part[3]], *map(float, part[4:]))
                         for part in parts)
        if name == "adam_betas":
            beta1, beta2 = map(float, text.split(","))
            return beta1, beta2
        return {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (ValueError, KeyError, TypeError, IndexError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None

class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, end with status 2 and name the nearest valid flag."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists what is valid)")

    def format_help(self) -> str:
        return super().format_help().replace(" (default: None)", "")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.0)
            raise UserError(f"unknown argument {flag}; did you mean {near[0]}? (--help lists all)")
        return parsed

def parse_config(argv: list[str]) -> tuple[Config, str]:
    """The command line as a checked Config and the value of --resume; raises UserError."""
    parser = Parser(prog="train_prx.py", description="Train PRX. Defaults shown are the record preset's.")
    parser.add_argument("--preset", choices=PRESETS, default="record", help="the values that the other flags change")
    parser.add_argument("--resume", default="auto", help="auto: continue an unfinished run of the same config; never: "
                        "start over, the old folder is renamed; or the path of a run or checkpoint to continue from")
    comments = dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for f in dataclasses.fields(Config):
        text = f"{comments.get(f.name, '').replace('%', '%%')} (default: {f.default})"
        parser.add_argument(f"--{f.name}", type=functools.partial(parse_value, f.name, f.type), help=text,
                            choices=CHOICES.get(f.name), default=argparse.SUPPRESS)
    flags = vars(parser.parse_args(argv))
    preset, resume = PRESETS[flags.pop("preset")], flags.pop("resume")
    cfg = replace(preset, **flags)
    check_config(cfg)
    return cfg, resume

def check_config(cfg: Config) -> None:
    """Raise UserError, one line, for the first value that cannot work."""
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)
    ranges = {
        "at least 1": (1, math.inf, "micro_batch chunks_at_once patch bottleneck width depth heads text_dim "
                       "text_tokens ema_every log_every keep sample_steps ns_steps"),
        "a number above 0": (1e-300, 1e300, "grad_clip mlp_ratio rope_theta shift noise_scale adam_eps"),
        "a number of at least 0": (0, 1e300, "lr adam_lr max_steps warmup workers t_power scale " + " ".join(
            f.name for f in dataclasses.fields(cfg) if f.name.endswith(("_weight", "_every")))),
        "in [0, 1)": (0, 1 - 1e-9, "drop ema momentum"), "in [0, 1]": (0, 1, "uniform_t caption_dropout"),
    }
    for wanted, (low, high, names) in ranges.items():
        for name in names.split():
            need(low <= getattr(cfg, name) <= high, f"--{name}={getattr(cfg, name)} must be {wanted}")
    need(bool(re.fullmatch(r"\w[\w.-]{0,99}", cfg.name)), f"--name={cfg.name[:99]}: use up to 100 of a-z, 0-9, _ . -")
    need(all(0 <= beta < 1 for beta in cfg.adam_betas), f"--adam_betas={cfg.adam_betas} must be in [0, 1)")
    need(cfg.ns_steps <= len(NS_COEFFICIENTS), f"--ns_steps={cfg.ns_steps}: muon.py knows {len(NS_COEFFICIENTS)}")
    need(cfg.width % (4 * cfg.heads) == 0, f"--width={cfg.width} must be a multiple of 4 times --heads={cfg.heads}")
    need(cfg.drop > 0 and len(cfg.route) > 0 or cfg.drop == 0 and cfg.guidance != "self",
         f"--drop={cfg.drop} --route_start={cfg.route_start} --route_end={cfg.route_end} of {cfg.depth} blocks: "
         "without routing, pass --drop=0 and --guidance=cfg or none")
    need(1 <= cfg.repa_depth <= cfg.depth, f"--repa_depth={cfg.repa_depth} must be between 1 and --depth={cfg.depth}")
    for stage in cfg.stages:
        N = (stage.image_size // cfg.patch) ** 2
        need(min(stage.image_size, stage.steps, stage.global_batch) > 0, f"--stages: {stage} has a value below 1")
        need(0 <= stage.short <= 1, f"--stages: {stage}: short is a share, from 0 to 1")
        need(stage.image_size % cfg.patch == 0, f"--stages: {stage.image_size}px is no multiple of --patch={cfg.patch}")
        need(N > round(N * cfg.drop), f"--drop={cfg.drop} leaves none of the {N} tokens of {stage.image_size}px images")
        need(stage.global_batch % cfg.micro_batch == 0, f"{stage} is no multiple of --micro_batch={cfg.micro_batch}")

def config_to_json(cfg: Config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(cfg)))

# --- Random numbers and flow matching --------------------------------------------------------------------------------

def tag_seed(*parts) -> int:
    """A 63-bit seed that is a pure function of `parts`: every random number of a run starts from one of these."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1

def tag_generator(device, *parts) -> torch.Generator:
    """A generator on `device`, seeded by `tag_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(tag_seed(*parts))

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
             size: tuple[int, int], steps: int, guidance: str, scale: float, drop: float, seeds: list[int],
             shift: float, interval: tuple[float, float] = (0.0, 1.0), after_step: Callable = lambda: None) -> Tensor:
    """Sample images x0 [B, 3, H, W] in [-1, 1] by Euler steps from noise on the shifted grid.

    txt [B, L, D] and txt_mask [B, L] are one prompt an image, null_txt [1 or B, L', D] the empty one. Guidance: `self`,
    x0 = routed + scale (dense - routed), a share `drop` of tokens routed around (arXiv 2601.01608); `cfg`, x0 = empty +
    scale (prompt - empty) (arXiv 2207.12598); `none`; only at t in `interval` (arXiv 2404.07724). One seed an image,
    drawn on the CPU: a picture depends neither on batch nor on device. Raises ValueError on sizes that do not fit.
    """
    H, W = size
    B, device, patch = len(txt), txt.device, model.cfg.patch
    if H % patch or W % patch or len(seeds) != B:
        raise ValueError(f"size {size} must be a multiple of the patch {patch}, and {B} prompts take {B} seeds, "
                         f"not {len(seeds)}")
    N = (H // patch) * (W // patch)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(3, H, W, generator=g) for g in generators])  # [B, 3, H, W]
    x = model.cfg.noise_scale * noise.to(device)
    grid = shift_t(torch.linspace(1, 0, steps + 1), shift).tolist()
    is_guided = [guidance != "none" and scale != 1 and interval[0] <= t <= interval[1] for t in grid[:-1]]
    prompts = [(txt, txt_mask), (null_txt, null_mask)][: 2 if guidance == "cfg" else 1]  # in one batch
    masks = [torch.ones(x.shape[:2], dtype=torch.bool, device=device) if mask is None else mask for x, mask in prompts]
    longest = max(1, *(int(mask.sum(1).max()) for mask in masks))  # tokens of a prompt, and in steps of 32:
    L = min(-(-longest // 32) * 32, max(x.shape[1] for x, _ in prompts))
    txt = torch.cat([F.pad(x, (0, 0, 0, L - x.shape[1])).expand(B, -1, -1) for x, _ in prompts])  # [B or 2 B, L, D]
    txt_mask = torch.cat([F.pad(mask, (0, L - mask.shape[1])).expand(B, -1) for mask in masks])  # [B or 2 B, L]
    text_kv = model.embed_text(txt) if isinstance(model, PRX) else []  # once, not once a step

    def predict(n: int, ids_keep: Tensor | None = None) -> Tensor:  # x0_hat [n B, 3, H, W] with the first n prompts
        known = {"text_kv": [(k[: n * B], v[: n * B]) for k, v in text_kv]} if text_kv else {}
        return model(x.repeat(n, 1, 1, 1), t.repeat(n), txt[: n * B], txt_mask[: n * B], ids_keep, **known)[0]

    for t_now, t_next, guided in zip(grid, grid[1:], is_guided):
        t = torch.full((B,), t_now, device=device)
        if guided and guidance == "cfg":
            with_prompt, without = predict(2).chunk(2)
            x0_hat = without + scale * (with_prompt - without)
        else:
            x0_hat = predict(1)
        if guided and guidance == "self":
            ids_keep = torch.cat([draw_ids_keep(1, N, drop, "cpu", g) for g in generators]).to(device)
            routed = predict(1, ids_keep)
            x0_hat = routed + scale * (x0_hat - routed)
        x = x + (t_next - t_now) * velocity(x, x0_hat, t)
        after_step()
    return x.clamp(-1, 1)

# --- Model. Parameter names are those of the public PRX checkpoints, so that weights pass in both directions. --------

@functools.lru_cache(maxsize=16)
def rotary_table(rows: int, cols: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin of 2-D rotary angles, [1, N, d / 2, 2] fp32: d / 4 pairs turn with the row, d / 4 with the column."""
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

def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, C], ids [B, K] -> [B, K, C]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))

def attention(q: Tensor, k: Tensor, v: Tensor, txt_mask: Tensor, is_flash: bool) -> Tensor:
    """Queries [B, N, h, d], keys, values [B, N + L, h, d] of image, then text, the first ones count -> [B, N, h, d]."""
    B, N, M = len(q), q.shape[1], k.shape[1]
    if is_flash:  # two sequences an image: its queries with the keys that count, then no query with the padding
        keys = torch.stack([N + txt_mask.sum(1), torch.full((B,), M, device=q.device)], dim=1)  # [B, 2] where they end
        keys = (keys + M * torch.arange(B, device=q.device)[:, None]).flatten()  # [B, 2] -> [2 B], in [B M] rows
        queries = N * torch.arange(1, B + 1, device=q.device).repeat_interleave(2)  # [2 B]
        starts = [F.pad(ends, (1, 0)).int() for ends in (queries, keys)]  # 2 x [2 B + 1]
        return varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *starts, N, M).view(q.shape)
    dtype = q.dtype
    if q.device.type == "cpu":  # torch's CPU attention is slow in bf16: the demo's step took 2.5 times as long
        q, k, v = q.float(), k.float(), v.float()
    mask = F.pad(txt_mask, (N, 0), value=True)[:, None, None]  # [B, L] -> [B, 1, 1, N + L]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).to(dtype)  # [B, h, N, d] -> [B, N, h, d]

def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LayerNorm without affine, then scale and shift [B, 1, C]."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift

class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale.float(), 1e-6).to(x.dtype)

class Block(nn.Module):
    """Image tokens attend to [image, text] and pass a gated MLP; text tokens are never updated."""
    def __init__(self, cfg: Config):
        super().__init__()
        C, hidden = cfg.width, int(cfg.width * cfg.mlp_ratio)
        self.heads, self.head_dim = cfg.heads, C // cfg.heads
        self.img_qkv_proj = nn.Linear(C, 3 * C, bias=False)
        self.txt_kv_proj = nn.Linear(C, 2 * C, bias=False)
        self.qk_norm = nn.ModuleDict({name: RMSNorm(self.head_dim) for name in ("query_norm", "key_norm")})
        self.k_norm = RMSNorm(self.head_dim)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)
        self.modulation = nn.ModuleDict({"lin": nn.Linear(C, 6 * C)})

    def text_kv(self, txt: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text tokens [B, L, C], 2 x [B, L, h, d]: they depend on neither the image nor the time."""
        k, v = self.txt_kv_proj(txt).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        return self.k_norm(k), v

    def forward(self, img: Tensor, txt: Tensor, txt_mask: Tensor, c: Tensor, rope: Tensor, is_flash: bool,
                text_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """img [B, N, C], txt [B, L, C] or its text_kv, txt_mask [B, L], c [B, C], rope [B or 1, N, d / 2, 2] -> img."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (  # [B, 6 C] -> 6 x [B, 1, C]
            self.modulation["lin"](F.silu(c))[:, None].chunk(6, dim=-1))
        x = modulate(img, shift, scale)
        q, k, v = self.img_qkv_proj(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)  # 3 x [B, N, h, d]
        txt_k, txt_v = text_kv or Block.text_kv(self, txt)  # not self.text_kv: FSDP wraps that, for sampling
        q = apply_rotary(self.qk_norm["query_norm"](q), rope)
        k = torch.cat([apply_rotary(self.qk_norm["key_norm"](k), rope), txt_k], dim=1)  # [B, N + L, h, d]
        v = torch.cat([v, txt_v], dim=1)
        img = img + gate * self.attn_out(attention(q, k, v, txt_mask, is_flash).flatten(2))  # [B, N, h, d] -> [B, N, C]
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
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)  # [B, 2 C] -> 2 x [B, 1, C]
        return self.linear(modulate(img, shift, scale))

class PRX(nn.Module):
    """The denoiser: a noised image and a prompt in, the clean image out."""
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.img_in = nn.Sequential(nn.Linear(3 * cfg.patch**2, cfg.bottleneck), nn.Linear(cfg.bottleneck, cfg.width))
        self.time_in = TimeEmbedding(cfg.width)
        self.txt_in = nn.Linear(cfg.text_dim, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        self.repa_projector = nn.Sequential(  # REPA's head: trained with the model and left out of exports
            nn.Linear(cfg.width, cfg.repa_dim), nn.SiLU(), nn.Linear(cfg.repa_dim, cfg.repa_dim), nn.SiLU(),
            nn.Linear(cfg.repa_dim, cfg.repa_dim)) if cfg.repa_weight > 0 else None
        if not self.txt_in.weight.is_meta:
            self.init_weights(cfg.seed)

    def embed_text(self, txt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of prompts [B, L, D] in all blocks: what sampling computes once, not once a step."""
        txt = self.txt_in(txt.to(self.txt_in.weight.dtype))
        return [block.text_kv(txt) for block in self.blocks]

    def forward(self, x_t: Tensor, t: Tensor, txt: Tensor, txt_mask: Tensor | None = None,
                ids_keep: Tensor | None = None, text_kv: list | None = None) -> tuple[Tensor, Tensor]:
        """Predict the clean image.

        x_t [B, 3, H, W] with H and W multiples of the patch, t [B] in [0, 1], txt [B, L, D] with txt_mask [B, L] bool,
        True for the tokens that count, which come first. With ids_keep [B, N_keep], only those image tokens pass the
        routed blocks and the others come back unchanged (TREAD). text_kv: `embed_text` of txt, where it is known.
        Returns x0_hat [B, 3, H, W] fp32 and the features after `repa_depth` blocks, [B, N_keep or N, C].
        """
        cfg, dtype = self.cfg, self.txt_in.weight.dtype
        B, _, H, W = x_t.shape
        rows, cols, p = H // cfg.patch, W // cfg.patch, cfg.patch
        x = x_t.to(dtype).reshape(B, 3, rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)  # [B, rows, cols, 3, p, p]
        img = self.img_in(x.reshape(B, rows * cols, 3 * p * p))  # [B, N, 3 p p] -> [B, N, C]
        if txt_mask is None:
            txt_mask = torch.ones(txt.shape[:2], dtype=torch.bool, device=txt.device)
        if text_kv is None:
            txt = self.txt_in(txt.to(dtype))  # [B, L, D] -> [B, L, C]
        c = self.time_in(t)  # [B, C]
        rope = rotary_table(rows, cols, cfg.width // cfg.heads, cfg.rope_theta, x_t.device)  # [1, N, d / 2, 2]

        is_flash = (img.is_cuda and dtype == torch.bfloat16 and cfg.width // cfg.heads in range(8, 257, 8)
                    and torch.cuda.get_device_capability(img.device) >= (8, 0))  # what `varlen_attn` takes
        all_img, all_rope, feat = img, rope, img
        for i, block in enumerate(self.blocks):
            if ids_keep is not None and i == cfg.route.start:
                all_img, img = img, gather_tokens(img, ids_keep)  # [B, N, C] -> [B, N_keep, C]
                rope = gather_tokens(rope.flatten(2).expand(B, -1, -1), ids_keep).unflatten(-1, (-1, 2))
            img = block(img, txt, txt_mask, c, rope, is_flash, text_kv[i] if text_kv else None)
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
        """Draw every tensor whole from (seed, name), then keep this rank's slice: any number of ranks starts equal."""
        if list(self.buffers()):
            raise UserError("init_weights has no rule for buffers, and to_empty leaves noise in them: add one")
        for prefix, module in self.named_modules():
            for name, p in module.named_parameters(recurse=False):
                full_name = f"{prefix}.{name}"
                whole, generator = torch.empty(p.shape), tag_generator("cpu", seed, full_name)
                if isinstance(module, RMSNorm):
                    whole.fill_(1)
                elif prefix.endswith("modulation.lin") or prefix.startswith("final_layer."):
                    whole.fill_(0)  # every block starts as the identity, and x0_hat as 0
                elif isinstance(module, nn.Linear):  # torch's default, so PRX's
                    whole.uniform_(-(module.in_features**-0.5), module.in_features**-0.5, generator=generator)
                elif p.ndim > 1:  # such as embeddings
                    whole.normal_(0, 0.02, generator=generator)
                else:
                    raise UserError(f"init_weights has no rule for {full_name.lstrip('.')} {list(p.shape)}: add one")
                set_whole(p, whole)

@torch.no_grad()
def set_whole(p: Tensor, whole: Tensor) -> None:
    """Set a parameter, of which this rank may hold a shard, to a tensor that it holds whole."""
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()
    local([p])[0].copy_(whole)

# --- Frozen networks: the text encoder, and the three that judge (REPA's teacher, P-DINO, LPIPS) ---------------------

OPEN_FALLBACKS = {  # of gated models
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "; open fallback: --repa_teacher=facebook/dinov2-with-registers-large",
    "google/t5gemma-2b-2b-ul2": "; open fallback: --text_encoder=FOLDER, `text_encoder` of Photoroom/prx-1024-t2i-beta",
}

def load_pretrained(loader, model_id: str, **kwargs):
    """`loader.from_pretrained`, its failures as one UserError; models from safetensors only, with all their weights."""
    from transformers import logging as transformers_logging
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its five attempts, before the one line below
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a report of the decoder's unused weights; missing ones raise below
    is_model = kwargs.get("output_loading_info", False)
    try:
        loaded = loader.from_pretrained(model_id, **kwargs, **({"use_safetensors": True} if is_model else {}))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if not Path(model_id).exists():
            where = f"; access and download: https://huggingface.co/{model_id}{OPEN_FALLBACKS.get(model_id, '')}"
            reason = reason + where if model_id.count("/") == 1 else "there is no such folder"
        raise UserError(f"cannot load {model_id}: {reason}") from None
    if is_model and loaded[1]["missing_keys"]:
        raise UserError(f"{model_id} lacks weights of {loader.__name__}, such as {min(loaded[1]['missing_keys'])}")
    return loaded[0] if is_model else loaded

TextEncoder = Callable[[list[str]], tuple[Tensor, Tensor]]  # prompts -> txt [B, L, D], 0 behind each, txt_mask [B, L]

def pad_latents(latents: list[Tensor], L: int) -> tuple[Tensor, Tensor]:
    """Latents of B prompts, each [its tokens, D] -> txt [B, L, D], 0 behind each prompt, and txt_mask [B, L] bool."""
    txt = latents[0].new_zeros(len(latents), L, latents[0].shape[1])
    for row, x in zip(txt, latents):
        row[: len(x)] = x
    lengths = torch.tensor([len(x) for x in latents], device=txt.device)
    return txt, torch.arange(L, device=txt.device) < lengths[:, None]

class T5GemmaText:
    """The frozen T5Gemma encoder: last hidden state of up to L tokens, each prompt's own."""
    def __init__(self, cfg: Config, device: torch.device, dtype: torch.dtype | None = None):
        from transformers import AutoConfig, AutoTokenizer, T5GemmaEncoderModel
        from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder
        self.max_length, beside = cfg.text_tokens, Path(cfg.text_encoder).with_name("tokenizer")  # as diffusers has it
        self.tokenizer = load_pretrained(AutoTokenizer, str(beside) if beside.is_dir() else cfg.text_encoder)
        alone = load_pretrained(AutoConfig, cfg.text_encoder).model_type == "t5_gemma_module"  # as PRX's checkpoints
        loader, how = (T5GemmaEncoder, {}) if alone else (T5GemmaEncoderModel, {"is_encoder_decoder": False})
        model = load_pretrained(  # eager attention: SDPA leaves out T5Gemma's soft cap on the scores
            loader, cfg.text_encoder, **how, attn_implementation="eager", output_loading_info=True,
            dtype=dtype or compute_dtype(cfg, device))
        self.model = model.eval().requires_grad_(False).to(device)
        self.dim = model.config.hidden_size if alone else model.config.encoder.hidden_size
        if self.dim != cfg.text_dim:
            raise UserError(f"{cfg.text_encoder} gives {self.dim}-dim latents: pass --text_dim={self.dim}")

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        prompts = [html.unescape(html.unescape(prompt)).strip() for prompt in prompts]  # PRX's light cleaning
        ids = self.tokenizer(prompts, truncation=True, max_length=self.max_length)["input_ids"]
        longest = max(1, *map(len, ids))
        tokens, mask = pad_latents([torch.tensor(row, dtype=torch.int64)[:, None] for row in ids], longest)  # [B, l, 1]
        tokens, mask = (x.to(self.model.device, non_blocking=True) for x in (tokens[:, :, 0], mask))  # 2 x [B, l]
        txt = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[:, :, None]  # [B, l, D]
        return F.pad(txt, (0, 0, 0, self.max_length - longest)), F.pad(mask, (0, self.max_length - longest))

class BuiltinText:
    """A text encoder without weights, for small vocabularies: scenes and trials.

    Text tokens never mix inside PRX, so each carries its phrase: its word's fixed random vector plus those of (signed
    offset, word) for the words up to four away. Function words are dropped: phrases are then near.
    """
    FUNCTION_WORDS = {"a", "an", "and", "at", "in", "is", "of", "on", "the", "there", "with"}

    def __init__(self, cfg: Config, device: torch.device):
        self.device, self.max_length, self.dim, self.reach = device, cfg.text_tokens, cfg.text_dim, 4
        self.ids: dict[str, int] = {}  # word -> its row in the table, which grows as words are met; row 0 is no word
        self.table = torch.zeros(64, 2 * self.reach + 1, self.dim, device=device)  # [words, offsets, D]

    def word_id(self, word: str) -> int:
        if word not in self.ids:
            self.ids[word] = row = len(self.ids) + 1
            if row == len(self.table):
                self.table = torch.cat([self.table, torch.zeros_like(self.table)])
            vectors = torch.randn(self.table.shape[1:], generator=tag_generator("cpu", "builtin text", word))
            self.table[row] = (vectors / len(vectors) ** 0.5).to(self.device, non_blocking=True)
        return self.ids[word]

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        L, reach = self.max_length, self.reach
        ids = torch.zeros(len(prompts), reach + L + reach, dtype=torch.int64)  # zeros on both sides: no word there
        for row, prompt in zip(ids, prompts):
            words = [w for w in re.findall(r"\w+", prompt.lower()) if w not in self.FUNCTION_WORDS][:L]
            row[reach : reach + len(words)] = torch.tensor([self.word_id(w) for w in words], dtype=torch.int64)
        ids = ids.to(self.device, non_blocking=True)
        near, mask = ids.unfold(1, 2 * reach + 1, 1), ids[:, reach : reach + L] > 0  # [B, L, offsets], [B, L]
        txt = self.table[near, torch.arange(2 * reach + 1, device=self.device)].sum(2)  # [B, L, D]
        return txt * mask[:, :, None], mask

def load_text_encoder(cfg: Config, device: torch.device, dtype: torch.dtype | None = None) -> TextEncoder:
    """The encoder that `cfg.text_encoder` names, in `dtype`, or else in the run's precision; raises UserError."""
    return BuiltinText(cfg, device) if cfg.text_encoder == "builtin" else T5GemmaText(cfg, device, dtype)

class Dino:
    """Patch tokens of a frozen DINOv2 (with registers) or DINOv3: images [B, 3, H, W] in [-1, 1] -> [B, P, D]."""
    SHAPES = {  # for --frozen=random, where they are not their class's default; any other model must be a folder
        "facebook/dinov3-vitl16-pretrain-lvd1689m": ("dinov3_vit", dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            num_register_tokens=4)),
        "facebook/dinov2-with-registers-base": ("dinov2_with_registers", dict(image_size=518, patch_size=14)),
    }
    def __init__(self, model_id: str, cfg: Config, device: torch.device):
        from transformers import AutoConfig, AutoModel
        self.dtype, shape = compute_dtype(cfg, device), self.SHAPES.get(model_id)
        if cfg.frozen == "pretrained":
            model = load_pretrained(AutoModel, model_id, dtype=self.dtype, output_loading_info=True)
        else:
            config = AutoConfig.for_model(shape[0], **shape[1]) if shape else load_pretrained(AutoConfig, model_id)
            with torch.random.fork_rng(devices=[]):  # the same random network on every rank
                torch.manual_seed(tag_seed(cfg.seed, "random", model_id))
                model = AutoModel.from_config(config, dtype=self.dtype)
        self.model = model.eval().requires_grad_(False).to(device)
        for stack in self.model.modules() if compiles(cfg, device) else []:
            for layer in stack if isinstance(stack, nn.ModuleList) else []:  # one compilation serves all of a stack
                layer.compile(fullgraph=True, dynamic=False)
        self.patch, self.dim = model.config.patch_size, model.config.hidden_size
        self.prefix = 1 + getattr(model.config, "num_register_tokens", 0)  # [CLS, registers, patches]
        self.mean, self.std = torch.tensor(IMAGENET, device=device)[..., None, None]  # both DINOs were trained with it

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Features of `images` resized to `size` pixels; [B, (H / patch) (W / patch), D] fp32."""
        x = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
        x = (((x + 1) / 2).clamp(0, 1) - self.mean) / self.std  # no gradient from pixels outside [-1, 1] (code)
        return self.model(x.to(self.dtype)).last_hidden_state[:, self.prefix :].float()

def load_lpips(cfg: Config, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with VGG16 (its weights, 528 MB, are downloaded by torchvision on first use)."""
    import lpips
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of old names
            torch.manual_seed(tag_seed(cfg.seed, "random", "vgg16"))
            network = lpips.LPIPS(net="vgg", pnet_rand=cfg.frozen == "random", verbose=False)
    except OSError as error:
        vgg = f"https://download.pytorch.org/models/vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints"
        raise UserError(f"cannot load LPIPS ({error}): put {vgg}, or pass --lpips_weight=0") from None
    how = dict(dtype=compute_dtype(cfg, device), memory_format=torch.channels_last)
    network = network.eval().requires_grad_(False).to(device, **how)  # eval: there is dropout in its heads
    if compiles(cfg, device):
        network.compile(fullgraph=True, dynamic=False)
    return lambda *images: network(*(image.to(**how) for image in images)).float()

@dataclass
class Frozen:
    """The networks behind the auxiliary losses; None turns a term off."""
    teacher: Callable[[Tensor], Tensor] | None = None  # x0 [B, 3, H, W] -> features [B, N, D], one an image token
    pdino: Callable[[Tensor], Tensor] | None = None  # image [B, 3, H, W] -> features [B, P, D]
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None  # two images [B, 3, H, W] -> distance, B values

def load_frozen(cfg: Config, device: torch.device) -> Frozen:
    """Load what the weights and stages of `cfg` ask for; raises UserError where a network cannot be had."""
    frozen = Frozen()
    if cfg.frozen != "none" and cfg.repa_weight > 0 and any(stage.repa for stage in cfg.stages):
        dino = Dino(cfg.repa_teacher, cfg, device)
        zoom = dino.patch / cfg.patch  # one patch of the teacher an image token
        frozen.teacher = lambda x0: dino(x0, size=(round(x0.shape[2] * zoom), round(x0.shape[3] * zoom)))
        if dino.dim != cfg.repa_dim:
            raise UserError(f"{cfg.repa_teacher} gives {dino.dim}-dim features: pass --repa_dim={dino.dim}")
    if cfg.frozen != "none" and cfg.pdino_weight > 0:
        pdino = Dino(cfg.pdino_model, cfg, device)
        side = min(224, pdino.model.config.image_size)  # a smaller network's own
        frozen.pdino = lambda image: pdino(image, size=(side, side))
    if cfg.frozen != "none" and cfg.lpips_weight > 0:
        frozen.lpips = load_lpips(cfg, device)
    return frozen

# --- The loss of one chunk -------------------------------------------------------------------------------------------

def training_loss(model, frozen: Frozen, batch: dict[str, Tensor], cfg: Config, stage: Stage,
                  generator: torch.Generator | list[torch.Generator]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss of one chunk, or the mean of several, and its unweighted terms, all 0-dim, on the device.

    batch: x0 [B, 3, H, W] in [-1, 1], txt [B, L, D], txt_mask [B, L] bool, some captions dropped already. Timesteps,
    noise and routed tokens are drawn from `generator`, one for each chunk of equally many rows, on the device of x0. A
    term is on where its weight is positive and its network is there; REPA also needs a stage with `repa`. What is in
    the dict is logged and drawn by its name.
    """
    x0 = batch["x0"]
    B, _, H, W = x0.shape
    N, device = (H // cfg.patch) * (W // cfg.patch), x0.device
    generators = generator if isinstance(generator, list) else [generator]
    rows = B // len(generators)
    t = torch.cat([sample_timesteps(cfg, rows, device, g) for g in generators])
    eps = cfg.noise_scale * torch.cat([torch.randn(rows, 3, H, W, device=device, generator=g) for g in generators])
    ids_keep = None
    if cfg.drop > 0:
        ids_keep = torch.cat([draw_ids_keep(rows, N, cfg.drop, device, g) for g in generators])

    has_lpips = frozen.lpips is not None and cfg.lpips_weight > 0
    has_pdino = frozen.pdino is not None and cfg.pdino_weight > 0
    has_repa = frozen.teacher is not None and cfg.repa_weight > 0 and stage.repa
    with torch.no_grad():  # before the model, whose weights may still be on their way from other GPUs
        pdino_target = frozen.pdino(x0) if has_pdino else None  # [B, P, D]
        repa_target = frozen.teacher(x0) if has_repa else None  # [B, N, D]

    x0_hat, feat = model(add_noise(x0, eps, t), t, batch["txt"], batch["txt_mask"], ids_keep)

    # |v_hat - v|^2 = |x0_hat - x0|^2 / max(t, 0.05)^2, and other powers of t reweight noise levels
    error = (x0_hat - x0).square().mean(dim=(1, 2, 3))  # [B]
    terms = {"flow": (error / t.clamp(min=T_MIN) ** cfg.t_power).mean()}
    loss = terms["flow"]
    if has_lpips:
        half = [F.interpolate(image, scale_factor=0.5, mode="bilinear", align_corners=False) for image in (x0_hat, x0)]
        terms["lpips"] = frozen.lpips(*half).mean()
        loss = loss + cfg.lpips_weight * terms["lpips"]
    if has_pdino:
        terms["pdino"] = 1 - F.cosine_similarity(frozen.pdino(x0_hat), pdino_target, dim=-1).mean()
        loss = loss + cfg.pdino_weight * terms["pdino"]
    if has_repa:
        if feat.shape[1] < N:
            repa_target = gather_tokens(repa_target, ids_keep)  # [B, N, D] -> [B, N_keep, D]
        terms["repa"] = -F.cosine_similarity(model.repa_projector(feat).float(), repa_target, dim=-1).mean()
        loss = loss + cfg.repa_weight * terms["repa"]
    return loss, {name: term.detach() for name, term in terms.items()}

# --- Data: checked shards on disk (data_prep.py writes them) -> chunks -> batches on the device ----------------------

def is_held_out(key: str) -> bool:
    """Whether a row is for validation: a hash of its key, so that it stays so when the data is rebuilt."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < HELD_OUT * 2**64

def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

def read_manifest(folder: str | Path) -> dict:
    """The manifest of a data folder; raises UserError where there is none."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        operator.itemgetter("rows", "prompts", "dropped", "sizes")(manifest)  # a KeyError for what is not there
        for shard in manifest["shards"].values():
            operator.itemgetter("sha256", "bytes", "rows")(shard)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no data at {folder}: make it with `python tools/scenes.py make --out={folder}` or "
                        f"`python data_prep.py build --source=DIR --out={folder}`, or point --data elsewhere") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/manifest.json is damaged ({error!r}): build the data again") from None
    return manifest

def check_files(folder: Path, shards: dict[str, dict], remedy: str) -> None:
    """Raise UserError for a shard whose size, or sha256 where all have less than 1 GB, is not the manifest's."""
    is_small = sum(shard["bytes"] for shard in shards.values()) < 1 << 30
    for file, shard in ((folder / name, shard) for name, shard in shards.items()):
        same = file.exists() and file.stat().st_size == shard["bytes"]
        if not same or is_small and file_sha256(file) != shard["sha256"]:
            wrong = "has changed since it was made" if file.exists() else "is missing"
            raise UserError(f"{file} {wrong}: {remedy} (`python data_prep.py check` lists all that is wrong)")

class TextLatents:
    """The latents of a folder's captions as `data_prep.py embed` stored them: bf16, one after the other, no padding."""
    def __init__(self, folder: Path, text: dict, prompts: list[str]):
        stored = safetensors.torch.load_file(folder / "prompts.safetensors")
        self.prompts = dict(zip(["", *prompts], stored["latents"].tensor_split(stored["ends"][:-1])))
        shards = {name: shard["rows"] for name, shard in text["shards"].items() if name != "prompts.safetensors"}
        self.files = [safetensors.safe_open(folder / name, "pt") for name in shards]  # memory-mapped
        self.first_row = np.cumsum([0, *shards.values()])
        self.ends = [{kind: np.append(0, file.get_tensor(f"{kind}_ends")) for kind in ("caption", "caption_short")}
                     for file in self.files]

    def read(self, row: int, kind: str | None) -> Tensor:
        """Latents of a row's `caption` or `caption_short`, or of the empty prompt (None): [its tokens, D]."""
        if kind is None:
            return self.prompts[""]
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        ends, i = self.ends[shard][kind], row - self.first_row[shard]
        return self.files[shard].get_slice(kind)[int(ends[i]) : int(ends[i + 1])]

class RowSet:
    """One data folder at one image size: rows to train on, rows held out, and the text latents if there are any."""
    def __init__(self, folder: str, cfg: Config, image_size: int):
        self.folder, self.image_size, self.manifest = folder, image_size, read_manifest(folder)
        self.manifest_hash = file_sha256(Path(folder) / "manifest.json")
        self.stored_size = min((size for size in self.manifest["sizes"] if size >= image_size), default=0)
        if not self.stored_size:
            raise UserError(f"{folder} has sizes {self.manifest['sizes']}, but a stage trains at {image_size}px: "
                            f"build it again with --size={image_size}, or change --stages")
        at_size = f"{self.stored_size}/"
        shards = {name: shard for name, shard in self.manifest["shards"].items() if name.startswith(at_size)}
        check_files(Path(folder), shards, "build the data again")
        try:
            self.rows = datasets.load_from_disk(f"{folder}/{self.stored_size}")  # memory-mapped
            keys = (key for chunk in self.rows.data.column("key").chunks for key in chunk.to_pylist())
            held_out = np.fromiter(map(is_held_out, keys), dtype=bool)
        except Exception as error:  # whatever a damaged file makes its readers raise
            raise UserError(f"cannot open {folder}/{self.stored_size} ({error}): build the data again") from None
        self.train, self.held_out = (np.flatnonzero(x).astype(np.int32) for x in (~held_out, held_out))
        if len(self.rows) != self.manifest["rows"] or len(self.train) == 0:
            raise UserError(f"{folder} has {len(self.rows)} rows, {len(self.train)} to train on: build the data again")
        self.latents = self.find_latents(cfg)

    def find_latents(self, cfg: Config) -> TextLatents | None:
        """The latents by the run's encoder; raises UserError where there are only such by another one."""
        stored, encoder = self.manifest.get("text", {}), cfg.text_encoder
        if encoder == "builtin" or not stored:
            return None
        folder = Path(self.folder, f"text-{Path(encoder).name}")
        again = f"make them with `python data_prep.py embed --data={self.folder} --encoder={encoder}`"
        text = stored.get(folder.name)
        if text is None or text["encoder"] != encoder and not Path(encoder).is_dir():
            others = ", ".join(text["encoder"] for text in stored.values())
            raise UserError(f"{self.folder} has text latents by {others}: pass that --text_encoder, or {again}")
        if (text["dim"], text["tokens"]) != (cfg.text_dim, cfg.text_tokens):
            raise UserError(f"{folder} asks for --text_dim={text['dim']} --text_tokens={text['tokens']}")
        check_files(folder, text["shards"], f"delete {folder} and {again}")
        return TextLatents(folder, text, self.manifest["prompts"])

    def read(self, row: int, kind: str | None = "caption") -> dict:
        """One row: image uint8 [S, S, 3], key, the caption of the given kind (None: the empty prompt), its latents."""
        stored, S = self.rows[int(row)], self.image_size
        image = Image.open(io.BytesIO(stored["image"])).convert("RGB")
        if image.size != (S, S):
            image = image.resize((S, S), Image.Resampling.BICUBIC)
        return {"image": torch.from_numpy(np.array(image)), "key": stored["key"],
                "caption": stored[kind] if kind else "", "latents": self.latents and self.latents.read(row, kind)}

class Chunks(torch.utils.data.Dataset):
    """The training rows as a sequence of chunks; item i is a pure function of (seed, i), so resume is an index.

    The stream of rows takes each set in proportion to its weight, and each set's rows in epochs, every epoch a
    permutation of its own. Chunk i of the stage holds its rows from i * micro_batch on.
    """
    SLOTS = 10_000  # the mix repeats after this many rows, so weights are met to one in ten thousand
    def __init__(self, cfg: Config, stage: Stage, first_row: int):
        self.cfg, self.stage, self.first_row = cfg, stage, first_row
        folders, weights = zip(*(part.partition(":")[::2] for part in cfg.data.split(",")))
        self.sets = [RowSet(folder, cfg, stage.image_size) for folder in folders]
        try:
            share = np.array([float(w) if w else len(s.train) for w, s in zip(weights, self.sets)])
        except ValueError:
            raise UserError(f"--data={cfg.data}: a weight is not a number") from None
        # Slot k of the mix goes to the set that is furthest behind its share
        share, self.slots_of = share / share.sum(), np.zeros(len(share), np.int64)
        self.slots = []  # (set, how many slots it had before)
        for k in range(self.SLOTS):
            s = int(np.argmax(share * (k + 1) - self.slots_of))
            self.slots.append((s, int(self.slots_of[s])))
            self.slots_of[s] += 1
        if not (0 < share).all() or not self.slots_of.all():  # also where one is not finite
            raise UserError(f"--data={cfg.data}: a set would never be read: give positive weights, such as a:1,b:10")
        self.permutations: dict[int, tuple[int, np.ndarray]] = {}  # set -> (epoch, order), the one in use

    def read(self, position: int, kind: str | None, tries: int = 3) -> dict:
        """The row at a position of the run's stream or, where its image is damaged, the next one, said on stderr."""
        cycle, slot = divmod(position, self.SLOTS)
        s, before = self.slots[slot]
        rows = self.sets[s]
        epoch, i = divmod(cycle * int(self.slots_of[s]) + before, len(rows.train))
        if self.permutations.get(s, (None,))[0] != epoch:
            order = np.random.default_rng(tag_seed(self.cfg.seed, "order", s, epoch)).permutation(rows.train)
            self.permutations[s] = epoch, order
        row = self.permutations[s][1][i]
        try:
            return rows.read(row, kind)
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            what = f"{rows.folder}/{rows.stored_size} row {row} cannot be read ({error})"
            if tries == 1:
                raise UserError(f"{what}, nor those before: see `python data_prep.py check`") from None
            print(f"warning: {what} and is passed over", file=sys.stderr)
            return self.read(position + 1, kind, tries - 1)

    def __getitem__(self, i: int) -> dict:
        """Chunk i of the stage; captions are dropped, and long or short ones chosen, here."""
        first, B = self.first_row + i * self.cfg.micro_batch, self.cfg.micro_batch
        random = np.random.default_rng(tag_seed(self.cfg.seed, "captions", first))
        dropped, short = random.random(B) < self.cfg.caption_dropout, random.random(B) < self.stage.short
        kinds = np.where(dropped, None, np.where(short, "caption_short", "caption"))
        return collate([self.read(first + k, kind) for k, kind in enumerate(kinds)], self.cfg.text_tokens)

def collate(rows: list[dict], L: int) -> dict:
    """Rows -> images uint8 [B, 3, S, S], captions, keys and, of stored text, latents [T, D] and txt_mask [B, L]."""
    chunk = {"images": torch.stack([row["image"] for row in rows]).permute(0, 3, 1, 2),  # [B, S, S, 3] -> [B, 3, S, S]
             "captions": [row["caption"] for row in rows], "keys": [row["key"] for row in rows]}
    if all(row["latents"] is not None for row in rows):  # without padding, which would double what readers hand over
        chunk["latents"] = torch.cat([row["latents"] for row in rows])
        chunk["txt_mask"] = torch.arange(L) < torch.tensor([len(row["latents"]) for row in rows])[:, None]
    return chunk

def load_chunks(chunks: Chunks, order: list[int], device: torch.device) -> Iterator[dict]:
    """Chunks in the given order, read ahead by worker processes; to be closed, which ends these."""
    loader = iter(torch.utils.data.DataLoader(
        chunks, batch_size=None, sampler=order, num_workers=chunks.cfg.workers, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals, multiprocessing_context="fork" if chunks.cfg.workers else None))
    try:
        yield from loader
    finally:  # also where a reader has failed, whose traceback keeps the others alive: Python would wait for them
        getattr(loader, "_shutdown_workers", lambda: None)()

def ignore_signals(worker: int) -> None:
    """Let a reader end with the process that trains and not before it: clusters, and Ctrl-C, signal every process."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

def make_batch(chunk: dict, encode_text: TextEncoder, device: torch.device) -> dict[str, Tensor]:
    """A chunk -> x0 [B, 3, H, W] in [-1, 1], txt [B, L, D] and txt_mask [B, L] on the device."""
    images = chunk["images"].to(device, non_blocking=True)
    x0 = images.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
    if "latents" not in chunk:
        txt, txt_mask = encode_text(chunk["captions"])
        return {"x0": x0, "txt": txt, "txt_mask": txt_mask}
    latents, mask = (chunk[name].to(device, non_blocking=True) for name in ("latents", "txt_mask"))
    txt = latents.new_zeros(*mask.shape, latents.shape[1]).masked_scatter_(mask[:, :, None], latents)
    return {"x0": x0, "txt": txt, "txt_mask": mask}

# --- The machine, sharding, averaged weights -------------------------------------------------------------------------

def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """What products on `device` are computed in; the one place that decides it. A CPU is no faster in bf16."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    is_bf16 = has_bf16 if cfg.precision == "auto" else cfg.precision == "bf16"
    return torch.bfloat16 if is_bf16 else torch.float32

def gpu_trouble() -> str:
    """Why torch cannot use the GPU that this machine has, in a line; "" where it can, or where there is none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")  # the last by SLURM
    if hidden or torch.cuda.is_available() or not any(Path("/dev").glob("nvidia[0-9]*")):
        return ""
    return f"torch {torch.__version__} finds none: its driver is too old, or this torch is without CUDA"

@functools.cache
def compiler_trouble(device: torch.device) -> str:
    """Why torch.compile does not work on `device`, in a line, such as for want of a C++ compiler; "" where it does."""
    try:
        unseen = time.time_ns() % 10**9  # in no cache, which would hide a compiler that is gone
        torch.compile(lambda x: (unseen * x).sin(), fullgraph=True)(torch.ones(64, device=device))
    except Exception as error:  # whatever it is, blocks run uncompiled, and the log says why
        wrong = re.search(r" error: (.+)|\w(?:Error|Compiler): (.+)", str(error))  # a C++ compiler's own words, if any
        return (wrong[1] or wrong[2]) if wrong else str(error).splitlines()[0]
    return ""

def compiles(cfg: Config, device: torch.device) -> bool:
    """Whether blocks are compiled: where the config asks for it and the machine can."""
    return cfg.compile and not compiler_trouble(device)

def describe_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, bool]:
    """This machine's processor, and whether it multiplies bf16 in hardware (x86, Arm); both as far as Linux says."""
    info = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.+)", info, re.MULTILINE) or [0, platform.machine()]
    return f"{name[1]} CPU", re.search(r"^(flags|Features)\s*:.* (avx512_bf16|amx_bf16|bf16)\b", info, re.M) is not None

def join(use_cuda: bool) -> tuple[torch.device, DeviceMesh]:
    """This rank's device and the mesh of all, (nodes, GPUs a node) or (GPUs,): torchrun's ranks, or one alone."""
    world, per_node = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    alone = dict(store=dist.HashStore(), rank=0, world_size=1) if world == 1 else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=TIMEOUT, **alone)
    shape = (world // per_node, per_node) if world > per_node else (world,)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name until 2.14
    for group in mesh.get_all_groups():  # which have longer ones of their own
        set_timeout(TIMEOUT, group)
    return device, mesh

def build_model(cfg: Config, mesh: DeviceMesh, device: torch.device) -> PRX:
    """PRX with initial weights, sharded over the mesh: parameters stay gathered between forward and backward."""
    with torch.device("meta"):
        model = PRX(cfg)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(cfg, device), reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)  # t stays fp32
    # REPA's projector goes with the root: torch 2.11 fails in backward on a unit of its own whose forward never ran
    for unit in [*model.blocks, model]:
        if compiles(cfg, device) and isinstance(unit, Block):
            unit.compile(fullgraph=True, dynamic=False)  # in place: no `_orig_mod` in any name
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(unit, "embed_text" if unit is model else "text_kv")
    model.to_empty(device=device)
    model.init_weights(cfg.seed)
    return model

class EMA:
    """The exponential moving average of the weights, sharded as they are, in fp32."""
    def __init__(self, model: nn.Module):
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, smoothing: float) -> None:
        torch._foreach_lerp_(local(list(self.weights.values())), local(list(self.model.parameters())), 1 - smoothing)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model computes with the averaged weights."""
        def copy(values: list[Tensor]) -> None:
            with torch.no_grad():
                torch._foreach_copy_(weights, values)
            for unit in [*self.model.blocks, self.model]:
                unit.reshard()  # so that the next forward gathers the shards anew

        weights = local(list(self.model.parameters()))
        backup = [w.detach().clone() for w in weights]
        copy(local(list(self.weights.values())))
        yield
        copy(backup)

# --- Optimisation ----------------------------------------------------------------------------------------------------

def build_optimizer(model: nn.Module, cfg: Config) -> Muon:
    """Muon for the matrices inside blocks, Adam for everything else; every parameter has exactly one group."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if name.startswith("blocks.") and p.ndim == 2 else others).append(p)
    assert len(matrices) + len(others) == len({id(p) for p in model.parameters()})
    return Muon([
        {"params": matrices, "use_muon": True, "lr": cfg.lr, "momentum": cfg.momentum, "nesterov": True,
         "ns_steps": cfg.ns_steps, "ns_dtype": compute_dtype(cfg, matrices[0].device), "weight_decay": 0.0},
        {"params": others, "use_muon": False, "lr": cfg.adam_lr, "betas": cfg.adam_betas, "eps": cfg.adam_eps,
         "weight_decay": 0.0},
    ], compile=matrices[0].is_cuda and compiles(cfg, matrices[0].device))  # on a CPU it takes a minute, saves little

def lr_factor(cfg: Config, step: int) -> float:
    """What the learning rates are multiplied with at `step` (0-based): linear warm-up, then constant or linear to 0."""
    decay = 1 - step / cfg.total_steps if cfg.lr_decay == "linear" else 1.0
    return decay * min(1.0, (step + 1) / max(1, cfg.warmup))

def train_step(model: PRX, optimizer: Muon, ema: EMA, frozen: Frozen, batches: Iterator[dict[str, Tensor]],
               cfg: Config, stage: Stage, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """Step `step` (0-based) of the run on this rank's chunks, which are the next of `batches`.

    Returns by name the loss, its terms and the gradient norm, means over this rank's chunks; and ok, 0 where all ranks
    skipped the step because something was not finite. All 0-dim, on the device.
    """
    mine = stage.global_batch // cfg.micro_batch // dist.get_world_size()  # chunks of a step that this rank runs
    together = max(n for n in range(1, cfg.chunks_at_once + 1) if mine % n == 0)  # that pass the network at a time
    values: dict[str, Tensor] = {}
    for first in range(dist.get_rank() * mine, (dist.get_rank() + 1) * mine, together):
        chunks = list(itertools.islice(batches, together))
        batch = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        is_last = (first + together) % mine == 0
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)
        for unit in [model, *model.blocks]:  # blocks wait for their weights, and what runs before them hides it
            unit.unshard(async_op=True)
        generators = [tag_generator(batch["x0"].device, cfg.seed, step, first + k) for k in range(together)]
        loss, terms = training_loss(model, frozen, batch, cfg, stage, generators)
        (loss * together / mine).backward()
        for name, value in {"loss": loss.detach(), **terms}.items():
            values[name] = values.get(name, 0.0) + value * (together / mine)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    squared = torch.stack(torch._foreach_norm(local(grads))).square().sum() + 0 * values["loss"]  # not finite if it is
    dist.all_reduce(squared)
    norm = (squared * grads[0].device_mesh.shape[-1] / dist.get_world_size()).sqrt()  # each replica holds all shards
    ok = norm.isfinite().float()
    for group in optimizer.param_groups:
        group["lr"] = lr_factor(cfg, step) * (cfg.lr if group["use_muon"] else cfg.adam_lr)
    optimizer.step(ok, grad_scale=(cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_ does
    optimizer.zero_grad()
    if step % cfg.ema_every == 0:
        ema.update(cfg.ema)
    return {**values, "grad_norm": norm}, ok

# --- Held-out loss and samples ---------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_losses(model: PRX, chunks: Chunks, encode_text: TextEncoder, cfg: Config, device: torch.device,
                    n: int = 64) -> Tensor:
    """The flow-matching loss of each of about `n` held-out rows, dense, at a fixed t and noise of its own: [rows]."""
    rows = []
    for s, row in ((s, row) for s in chunks.sets for row in s.held_out[: -(-n // len(chunks.sets))]):
        with contextlib.suppress(Exception):  # Pillow's readers raise almost anything on damaged files
            rows.append(s.read(row))
    batch = make_batch(collate(rows, cfg.text_tokens), encode_text, device)
    x0, t = batch["x0"], (torch.arange(len(rows), device=device) + 0.5) / len(rows)
    noise = [torch.randn(x0.shape[1:], generator=tag_generator("cpu", "held out", row["key"])) for row in rows]
    eps = cfg.noise_scale * torch.stack(noise).to(device)
    x0_hat, _ = model(add_noise(x0, eps, t), t, batch["txt"], batch["txt_mask"])
    return (x0_hat - x0).square().mean(dim=(1, 2, 3)) / t.clamp(min=T_MIN) ** cfg.t_power

def sampling_settings(cfg: Config) -> dict:
    """How a run draws its own samples: the settings of `generate`."""
    return dict(steps=cfg.sample_steps, guidance=cfg.guidance, scale=cfg.scale, drop=cfg.drop, shift=cfg.shift)

def draw(model: PRX, encode_text: TextEncoder, prompts: list[str], seeds: list[int], size: tuple[int, int],
         **settings) -> Tensor:
    """Pictures of prompts, one seed each: x0 [B, 3, H, W] in [-1, 1]; settings as `generate` takes them."""
    (txt, txt_mask), (null_txt, null_mask) = encode_text(prompts), encode_text([""])
    return generate(model, txt, txt_mask, null_txt=null_txt, null_mask=null_mask, size=size, seeds=seeds, **settings)

# --- A run's folder: log, checkpoints, averaged weights --------------------------------------------------------------

def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: nothing else has such a name."""
    found = [path for path in run.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

def find_resume(cfg: Config, resume: str, identity: dict) -> tuple[Path, dict] | tuple[None, None]:
    """The checkpoint to continue from and its run.json, or None to start; UserError where that loses something."""
    run = Path("runs", cfg.name)
    saved = checkpoints_of(run)
    if resume == "never" or resume == "auto" and not saved:
        return None, None
    path = saved[-1] if resume == "auto" else [Path(resume), *checkpoints_of(Path(resume))][-1]
    try:
        was = json.loads((path / "run.json").read_text())
        step, data, config = int(was["step"]), dict(was["data"]), dict(was["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged or no checkpoint: without it, --resume=auto takes the one before") from None
    trouble, now = "", identity["config"]
    if resume == "auto":
        wrong = [key for key in now if key not in NOT_IDENTITY and config.get(key) != now[key]]
        trouble = "was trained on other data" if data != identity["data"] else ""
        trouble = f"has another {', '.join(wrong)}" if wrong else trouble
    elif saved and path.resolve() != saved[-1].resolve():
        raise UserError(f"{run} has other checkpoints than --resume={resume}, which would be lost: take another --name")
    if trouble or step >= cfg.last_step:
        run = run if resume == "auto" else path
        raise UserError(f"{run} {trouble or f'is finished at step {step}'}: choose another --name, start over with "
                        "--resume=never, or continue on purpose with --resume=PATH")
    return path, was

class RunFolder:
    """The folder of one run, open for this process alone; checkpoints are written while training goes on."""
    def __init__(self, cfg: Config, resume: str, identity: dict):
        self.path, self.cfg, self.identity, self.pending = Path("runs", cfg.name), cfg, identity, None
        self.is_main = dist.get_rank() == 0
        found = [self.open(resume) if self.is_main else None]  # rank 0 decides: another node may see it as it was
        dist.broadcast_object_list(found)
        self.checkpoint, self.was = found[0]
        self.group = dist.new_group(backend="gloo")  # of its own: a checkpoint's collectives run beside training's
        self.writer = ThreadPoolExecutor(1)

    def open(self, resume: str) -> tuple:
        """Lock the folder, decide what to continue from, put aside what is not of this run."""
        self.path.parent.mkdir(exist_ok=True)
        self.lock = self.path.with_name(f".{self.path.name}.lock").open("w")  # beside what --resume=never renames
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its readers do not inherit it
        except OSError:
            raise UserError(f"another process is training {self.path}: choose another --name") from None
        (checkpoint, was), metrics = find_resume(self.cfg, resume, self.identity), self.path / "metrics.jsonl"
        if resume == "never" and self.path.exists():
            n = next(n for n in itertools.count(1) if not Path(f"{self.path}.old-{n}").exists())
            self.path.rename(f"{self.path}.old-{n}")
        for folder in ("samples", "checkpoints", "ema"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for partial in self.path.glob("checkpoints/.step_*"):  # of a run that was killed while it saved
            shutil.rmtree(partial)
        if metrics.exists():  # what was logged past the checkpoint happens again
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]  # the last may be cut
            step = was["step"] if was and self.path in checkpoint.parents else -1
            metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        return checkpoint, was

    def log(self, text: str, console: bool = True, **metrics: float) -> None:
        """A line of log.txt and of the console; numbers by name are a line of metrics.jsonl as well."""
        if not self.is_main:
            return
        with (self.path / "log.txt").open("a") as log, (self.path / "metrics.jsonl").open("a") as numbers:
            log.write(f"{text}\n")
            numbers.write(f"{json.dumps(metrics)}\n" if metrics else "")
        try:
            print(f"{text}\n" * console, end="", flush=True)
        except BrokenPipeError:  # whoever read along has left, such as `| head`; the log has it all
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def save(self, state: dict, step: int) -> None:
        """Copy `state` to the host's memory and begin to write it. Collective; raises UserError as `wait` does."""
        self.wait()
        weights = {}
        for name, average in state["ema"].items():
            whole = average.full_tensor()  # by all ranks; REPA's projector is of use to training alone
            if self.is_main and not name.startswith("repa_projector."):
                weights[name] = whole.to("cpu", copy=True)  # steps go on while it is written
        about = {**self.identity, "step": step, "seconds": float(state["progress"]["seconds"]),
                 "init": (self.was or {}).get("init", "")}  # what tools/exchange.py started it from, if anything
        aside = self.path / "checkpoints" / f".step_{step:06d}"
        upload = dcp.async_save(state, checkpoint_id=aside, process_group=self.group)
        self.pending = self.writer.submit(self.complete, upload, aside, weights, about) if self.is_main else upload

    def complete(self, upload: Future, aside: Path, weights: dict[str, Tensor], about: dict) -> None:
        """When all ranks have written: add averaged weights and run.json, then give the folder its name."""
        upload.result()
        final, keep_every = aside.with_name(aside.name[1:]), self.cfg.snapshot_every
        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        safetensors.torch.save_file(weights, aside / "ema.safetensors", metadata={"format": "nanoprx", **metadata})
        (aside / "run.json").write_text(json.dumps(about))
        is_snapshot = keep_every and about["step"] % keep_every == 0
        for copy in ["ema.safetensors", *([f"ema/{final.name}.safetensors"] if is_snapshot else [])]:
            shutil.copyfile(aside / "ema.safetensors", self.path / ".ema.safetensors")
            os.replace(self.path / ".ema.safetensors", self.path / copy)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in checkpoints_of(self.path)[: -self.cfg.keep]:
            os.replace(old, old.with_name(f".{old.name}"))  # what is half deleted is no checkpoint
            shutil.rmtree(old.with_name(f".{old.name}"))

    def wait(self) -> None:
        """Return when the last checkpoint is complete; raises UserError where it cannot be, such as on a full disk."""
        try:
            if self.pending is not None:
                self.pending.result()
        except (OSError, RuntimeError, dcp.api.CheckpointException, safetensors.SafetensorError) as error:
            free, last = shutil.disk_usage(self.path).free / 1e9, [None, *checkpoints_of(self.path)][-1]
            raise UserError(f"cannot write a checkpoint ({str(error).splitlines()[0]}; {free:.1f} GB are free): make "
                            f"room, and the same command continues from the last complete one, {last}") from None
        self.pending = None

# --- The run ---------------------------------------------------------------------------------------------------------

def prepare(argv: list[str]) -> tuple[Config, str, list[tuple[Stage, int, Chunks]], dict]:
    """Config, --resume, (stage, first step, chunks) and identity of a run: what can be wrong before ranks join."""
    cfg, resume = parse_config(argv)
    is_cuda = cfg.device != "cpu" and torch.cuda.is_available()
    if cfg.device != "cpu" and not is_cuda and (cfg.device == "cuda" or gpu_trouble()):
        raise UserError(f"no GPU can be used ({gpu_trouble() or 'none is visible'}): --device=cpu trains without")
    is_bf16 = compute_dtype(cfg, torch.device("cuda" if is_cuda else "cpu")) == torch.bfloat16
    cfg = replace(cfg, precision="bf16" if is_bf16 else "fp32")  # what a run is known by
    world, common = int(os.environ.get("WORLD_SIZE", 1)), math.gcd(*(
        stage.global_batch // cfg.micro_batch for stage in cfg.stages))  # chunks
    if common % world:
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(f"{world} ranks cannot share chunks of {cfg.micro_batch} rows evenly; these can: {fits}")
    restarted = any(int(os.environ.get(f"{launcher}_RESTART_COUNT", 0)) for launcher in ("TORCHELASTIC", "SLURM"))
    if restarted and checkpoints_of(Path("runs", cfg.name)):
        resume = "auto"  # and not a second time from --resume=PATH, or never
    stages, step, row = [], 0, 0
    for stage in cfg.stages:
        stages.append((stage, step, Chunks(cfg, stage, row)))
        step, row = step + stage.steps, row + stage.steps * stage.global_batch
    identity = {"config": config_to_json(cfg), "source": SOURCE_HASH,
                "data": {s.folder: s.manifest_hash for s in stages[0][2].sets}}
    find_resume(cfg, resume, identity)
    return cfg, resume, stages, identity

def warm_up(model: PRX, frozen: Frozen, cfg: Config, device: torch.device) -> list[list[str]]:
    """Run a step of every stage on noise, so that all is compiled; the names of each stage's terms. Spoils weights."""
    optimizer, ema, terms = build_optimizer(model, cfg), EMA(model), []
    for stage in cfg.stages:
        B, L, S, random = cfg.micro_batch, cfg.text_tokens, stage.image_size, tag_generator(device, "warm-up")
        noise = {"x0": torch.randn(B, 3, S, S, device=device, generator=random).clamp(-1, 1),
                 "txt": torch.randn(B, L, cfg.text_dim, device=device, generator=random),
                 "txt_mask": torch.ones(B, L, dtype=torch.bool, device=device)}
        values, _ = train_step(model, optimizer, ema, frozen, itertools.repeat(noise), cfg, stage, 0)
        terms.append([name for name in values if name not in ("loss", "grad_norm")])
        for name in terms[-1]:
            if values[name].ndim or name != "flow" and not hasattr(cfg, f"{name}_weight"):
                raise UserError(f"training_loss's term {name} must be 0-dim, and Config needs a field {name}_weight")
    return terms

def write_header(run: RunFolder, cfg: Config, model: PRX, terms: list[list[str]], device: torch.device) -> None:
    """What proves a run: source, config, versions, hardware and data; the console gets the part that people read."""
    import transformers
    for name, text in SOURCES.items():
        run.log(f"==== {name} sha256 {hashlib.sha256(text.encode()).hexdigest()}\n{text}====", console=False)
    run.log(f"config {json.dumps(run.identity['config'])}", console=False)
    versions = "  ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, datasets, np))
    run.log(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  python {platform.python_version()}  {versions}")
    (cpu, has_bf16), is_cpu = describe_cpu(), device.type == "cpu"
    run.log(f"{dist.get_world_size()} x {cpu if is_cpu else torch.cuda.get_device_name()}, {torch.get_num_threads()} "
            f"threads; source {SOURCE_HASH[:12]}; run {cfg.name}, seed {cfg.seed}, {cfg.precision}")
    if is_cpu:
        slow = "; bf16 is emulated, many times slower than fp32" * (cfg.precision == "bf16" and not has_bf16)
        units = f"this processor has {'' if has_bf16 else 'no '}bf16 units{slow}"
        run.log("; ".join(filter(None, ["no GPU is used", gpu_trouble(), units])))
    for folder, manifest_hash in run.identity["data"].items():
        run.log(f"data {folder}, manifest {manifest_hash}")
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("repa_projector."))
    run.log(f"model {count:,} parameters, width {cfg.width}, depth {cfg.depth}, patch {cfg.patch}; "
            f"blocks {cfg.route.start} to {cfg.route.stop - 1} see {1 - cfg.drop:.0%} of the tokens in training")
    for i, (stage, names) in enumerate(zip(cfg.stages, terms)):
        loss = " + ".join(f"{getattr(cfg, f'{name}_weight', 1):g} {name}" for name in names)
        run.log(f"stage {i + 1}: {stage.image_size}px, {stage.steps:,} steps of {stage.global_batch} images; "
                f"loss {loss}{', of random networks, which mean nothing' * (cfg.frozen == 'random')}")
    if cfg.compile and compiler_trouble(device):
        run.log(f"blocks run uncompiled, and slower, for torch.compile fails here: {compiler_trouble(device)}")

def read_window(steps: list[dict[str, Tensor]], stop: bool) -> tuple[list[dict[str, float]], bool]:
    """The values of a window's steps, each a mean over ranks, and whether any rank is to stop. Waits for the device."""
    table = torch.stack([torch.stack([*values.values()]) for values in steps])  # [steps, names]
    table = F.pad(table, (0, 1), value=float(stop)) / dist.get_world_size()
    dist.all_reduce(table)
    rows = table.tolist()
    return [dict(zip(values, row)) for values, row in zip(steps, rows)], rows[-1][-1] > 0

def train(cfg: Config, resume: str, stages: list[tuple[Stage, int, Chunks]], identity: dict, device: torch.device,
          mesh: DeviceMesh) -> bool:
    """Run the stages of `cfg` from where the run stands to its last step; False where a signal stopped it before."""
    rank, world, end = dist.get_rank(), dist.get_world_size(), cfg.last_step
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # a block compiles once for each (stage, routed or not)
    run, sets = RunFolder(cfg, resume, identity), stages[0][2].sets
    stored = {prompt: x.to(device) for s in sets if s.latents for prompt, x in s.latents.prompts.items()}
    encode_text = load_text_encoder(cfg, device) if not all(s.latents for s in sets) else (
        lambda prompts: pad_latents([stored[prompt] for prompt in prompts], cfg.text_tokens))  # the grids' are there
    frozen = load_frozen(cfg, device)
    model = build_model(cfg, mesh, device)
    began = time.perf_counter()
    terms = warm_up(model, frozen, cfg, device)
    warmed_up = f"warmed up in {time.perf_counter() - began:.1f} s, off the clock"
    model.init_weights(cfg.seed)
    optimizer, ema, parameters = build_optimizer(model, cfg), EMA(model), dict(model.named_parameters())
    progress = {name: torch.zeros((), dtype=torch.float64) for name in ("step", "seconds", "skipped")}
    state = {"model": {name: p.detach() for name, p in parameters.items()}, "ema": ema.weights, "progress": progress,
             "optimizer": {name: optimizer.state[p] for name, p in parameters.items()}}
    write_header(run, cfg, model, terms, device)
    if run.checkpoint is not None:
        try:
            dcp.load(state, checkpoint_id=run.checkpoint)
        except (Exception, dcp.api.CheckpointException) as error:  # a damaged pickle raises almost anything
            reason = repr([*getattr(error, "failures", {}).values(), [error]][0][0])[:200]
            raise UserError(f"{run.checkpoint} is damaged or of another model ({reason}): take another --name, or "
                            "delete it, and --resume=auto continues from the one before") from None
        other = run.was.get("source") != SOURCE_HASH
        run.log(f"continuing from {run.checkpoint}{'; WARNING it is of another source' * other}")
    run.log(warmed_up)
    step, steps, stop, in_a_row, signals = int(progress["step"]), [], False, 0, []
    prompts = [prompt for s in sets for prompt in s.manifest["prompts"]][:16]
    for number in (signal.SIGTERM, signal.SIGUSR1):  # what clusters send before they take a machine away
        signal.signal(number, lambda number, frame: signals.append(number))
    started = time.perf_counter() - float(progress["seconds"])  # moved on by evaluation, samples and checkpoints
    for stage, first_step, chunks in stages:
        stage_end, per_step = min(first_step + stage.steps, end), stage.global_batch // cfg.micro_batch
        mine = range(rank * per_step // world, (rank + 1) * per_step // world)  # chunks of a step
        order = [s * per_step + k for s in range(step - first_step, stage_end - first_step) for k in mine]
        with contextlib.closing(load_chunks(chunks, order, device)) as loaded:
            batches = (make_batch(chunk, encode_text, device) for chunk in loaded)
            while step < stage_end and not stop:
                values, ok = train_step(model, optimizer, ema, frozen, batches, cfg, stage, step)
                steps.append({**values, "ok": ok})
                step += 1
                log_due, eval_due, sample_due, save_due, snapshot_due = (
                    step == stage_end or every > 0 and step % every == 0 for every in (
                        cfg.log_every, cfg.eval_every, cfg.sample_every, cfg.save_every, cfg.snapshot_every))
                if not (log_due or eval_due or sample_due or save_due or snapshot_due):
                    continue
                rows, stop = read_window(steps, bool(signals))  # the host waits for the device here, and nowhere else
                steps, seconds = [], time.perf_counter() - started
                for row in rows:
                    in_a_row = 0 if row["ok"] else in_a_row + 1
                    progress["skipped"] += not row["ok"]
                    if in_a_row == SKIPS_IN_A_ROW:
                        run.wait()
                        raise UserError(f"{in_a_row} steps in a row had a loss or gradient that is not finite, before "
                                        f"step {step}; last good checkpoint: {[None, *checkpoints_of(run.path)][-1]}")
                taken = [row for row in rows if row.pop("ok")]
                means = {name: sum(row[name] for row in taken) / len(taken) for row in taken[:1] for name in row}
                rate = len(rows) * stage.global_batch / (seconds - float(progress["seconds"]))  # images/s
                left = datetime.timedelta(seconds=round((end - step) * stage.global_batch / rate))
                progress["seconds"].fill_(seconds)
                progress["step"].fill_(step)
                skipped = int(progress["skipped"])
                said = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                run.log(f"step {step}/{end}  {said}  {rate:.1f} images/s  {seconds:.2f} s  {left} left"
                        + (f"  skipped {skipped}" if skipped else ""), step=step, **means, seconds=seconds,
                        lr=cfg.lr * lr_factor(cfg, step - 1), images_per_second=rate, skipped=skipped)
                if save_due or snapshot_due or stop:
                    run.save(state, step)
                drawing = ema.applied() if eval_due or sample_due else contextlib.nullcontext()
                with drawing, torch.compiler.set_stance("force_eager"):
                    if eval_due and any(len(s.held_out) for s in chunks.sets):
                        held_out = held_out_losses(model, chunks, encode_text, cfg, device).mean().item()
                        run.log(f"step {step}/{end}  held-out loss {held_out:.4f}", step=step, held_out=held_out,
                                seconds=seconds)
                    if sample_due:
                        x0 = draw(model, encode_text, prompts, list(range(len(prompts))), (stage.image_size,) * 2,
                                  **sampling_settings(cfg))
                        if rank == 0:
                            save_image((x0 + 1) / 2, run.path / f"samples/step_{step:06d}.png", nrow=4)
                            (run.path / "samples/prompts.txt").write_text("\n".join(prompts))
                started = time.perf_counter() - seconds
    run.wait()
    run.log(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  " + (
        f"finished at step {step}, {float(progress['seconds']):.2f} s on the clock: {run.path}/ema.safetensors"
        if step >= end else f"stopped by a signal at step {step} of {end}; --resume=auto continues"))
    return step >= end

def main(argv: list[str]) -> None:
    """The command line's run: set up, train, and take the ranks down in the order that gloo survives."""
    cfg, resume, stages, identity = prepare(argv)
    device, mesh = join(cfg.device != "cpu" and torch.cuda.is_available())
    try:
        finished = train(cfg, resume, stages, identity, device, mesh)
    except torch.OutOfMemoryError as error:  # a failure of the machine: RESTARTS may go on
        raise RuntimeError(f"out of GPU memory with {cfg.chunks_at_once} chunks of {cfg.micro_batch} images at a time: "
                           "pass --chunks_at_once=1, then a lower --micro_batch, or smaller --stages") from error
    gc.collect()  # model and gradients first: gloo processes otherwise sometimes abort after success
    dist.barrier()
    dist.destroy_process_group()
    if not finished:
        sys.exit(128 + signal.SIGTERM)

def run_main(main: Callable[[list[str]], None]) -> None:
    """Run `main(argv)` as a command: a user's mistake is one line and exit status 2; else torchrun reports it."""
    libraries = "datasets|diffusers|huggingface_hub|lpips|matplotlib|torch|torchvision|transformers"
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):  # of functions that they will drop
        warnings.filterwarnings("ignore", category=category, module=rf"({libraries})(\.|$)")
    for chatty in ("torch.distributed.checkpoint", "torch.utils.cpp_extension", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        report_failure(main)(sys.argv[1:])
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.filename is None and error.errno != errno.ENOSPC:
            raise
        time.sleep(2 * (os.environ.get("LOCAL_RANK", "0") != "0"))  # where ranks say the same, torchrun ends these
        print("error:", str(error).rpartition("UserError: ")[2].replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

if __name__ == "__main__":
    run_main(main)
