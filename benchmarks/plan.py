"""What a run will take, before it starts: hours, dollars, memory, disk, and what is missing on this machine.

    python benchmarks/plan.py --preset=record [--gpus=32] [--gpus_a_node=8] [--price=2.0] [any flag of train_prx.py]

Every number says where it comes from. `counted`: exact, from the model that the flags describe, run without memory on the
meta device. `measured`: real training steps on this machine, in one process, on synthetic batches of the true shapes.
`predicted`: from what stands beside it. It writes nothing and downloads nothing.
"""
import gc
import json
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep import SETS  # noqa: E402
from muon import Muon, assign_owners, local, newton_schulz_cost  # noqa: E402
from shards import RowSet, UserError, read_manifest, text_folder  # noqa: E402
from train_prx import (  # noqa: E402
    EMA, PRESETS, PRX, Config, Frozen, Parser, Stage, build_model, build_optimizer, chunks_together, compiles, compute_dtype, describe_cpu,
    last_step, load_frozen, parse_config, resolve_precision, run_main, stage_spans, train_step, training_loss)
from weights import FALLBACKS  # noqa: E402

META = torch.device("meta")
PEAK = 790e12  # FLOP/s of an H200 on dense bf16 matrices of random numbers, measured
GOAL, PUBLISHED = 0.60, 0.08  # shares of it: what nanoPRX aims at, and what PRX's 24 hours on 32 of them come to
T5GEMMA = {"google/t5gemma-2b-2b-ul2": 522e9}  # FLOP of its encoder for a caption of CAPTION_TOKENS
CAPTION_TOKENS = 128  # of a long caption, on average
IMAGE_BYTES = {512: 143e3, 1024: 449e3}  # of a stored picture with the spectrum of photographs: benchmarks/data.txt
AFFORDABLE = 60  # seconds of steps that a machine without a GPU is asked for
ROUNDS = 3  # timed steps of one chunk, and of two, alternating
NAMES = {"denoiser": "denoiser, forward and backward", "lpips": "LPIPS, two forwards and a gradient",
         "pdino": "P-DINO, two forwards and a gradient", "teacher": "REPA's teacher, forward",
         "projector": "REPA's projector, forward and backward"}


# ---------------------------------------------------------------------------------------------------------------------
# Counted


class Watch(TorchFunctionMode):
    """Notes, while a loss is computed, what autograd keeps for the backward pass and which frozen weights are used.

    Attention counts as the fused kernels that training uses: they keep queries, keys, values and result, not the scores.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.kept: dict[int, Tensor] = {}  # by storage: views of one tensor are kept once
        self.frozen: dict[int, Tensor] = {}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(self, x: Tensor) -> Tensor:
        self.kept[x.untyped_storage()._cdata] = x
        return x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in (*args, *kwargs.values()):
            if isinstance(x, nn.Parameter) and not x.requires_grad:
                self.frozen[x.untyped_storage()._cdata] = x
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # instead of `keep`
            out = func(*args, **kwargs)
        if out.requires_grad:
            for x in (*args[:3], out):
                self.keep(x)
        return out

    def activation_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for key, x in self.kept.items() if key not in self.weights | self.frozen.keys())

    def frozen_bytes(self) -> int:
        return sum(x.nbytes for x in self.frozen.values())


def count_loss(model: PRX, frozen: Frozen, cfg: Config, stage: Stage) -> tuple[int, Watch]:
    """FLOP of a chunk's forward and backward pass, and what was kept between them."""
    B, S, L = cfg.micro_batch, stage.image_size, cfg.text_tokens
    batch = {"x0": torch.empty(B, 3, S, S, device=META), "txt": torch.empty(B * L, cfg.text_dim, device=META),
             "txt_mask": torch.ones(B, L, dtype=torch.bool, device=META)}
    watch = Watch(model)
    with FlopCounterMode(display=False) as counter, watch:
        with torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda x: x):
            loss, _ = training_loss(model, frozen, batch, cfg, stage, None)
        loss.backward()
    return counter.get_total_flops(), watch


def count_stage(cfg: Config, stage: Stage) -> tuple[dict[str, float], int, int]:
    """FLOP an image by part (a term's is what the loss takes with it, less without it), bytes of activations that a
    chunk keeps for its backward pass, bytes of frozen weights."""
    cfg = on_gpus(cfg)
    with META:
        model = PRX(cfg).to(compute_dtype(cfg, META))
        frozen = load_frozen(replace(random_frozen(cfg), compile=False), META)
    on = Frozen()
    before, watch = count_loss(model, on, cfg, stage)
    parts = {"denoiser": before / cfg.micro_batch}
    for name in ("lpips", "pdino", "teacher"):
        if getattr(frozen, name) is not None and (name != "teacher" or stage.repa):
            on = replace(on, **{name: getattr(frozen, name)})
            after, watch = count_loss(model, on, cfg, stage)
            parts[name], before = (after - before) / cfg.micro_batch, after
    if "teacher" in parts:
        with FlopCounterMode(display=False) as counter:
            frozen.teacher(torch.empty(1, 3, stage.image_size, stage.image_size, device=META))
        parts["projector"] = parts["teacher"] - counter.get_total_flops()
        parts["teacher"] = counter.get_total_flops()
    return parts, watch.activation_bytes(), watch.frozen_bytes()


def on_gpus(cfg: Config) -> Config:
    """The same run with precision `auto` as on the GPUs that are planned for."""
    return replace(cfg, precision="bf16") if cfg.precision == "auto" else cfg


def random_frozen(cfg: Config) -> Config:
    """The same run with random frozen networks of the true shapes."""
    return cfg if cfg.frozen == "none" else replace(cfg, frozen="random")


def parameter_groups(cfg: Config) -> tuple[dict, dict]:
    """The optimizer's groups, Muon's and Adam's, of a model without memory."""
    with META:
        muon, adam = build_optimizer(PRX(cfg), cfg).param_groups
    return muon, adam


def state_bytes(cfg: Config, shards: int) -> dict[str, int]:
    """Bytes that weights and optimizer take on the rank that holds most, the weights cut by rows into `shards` slices."""
    muon, adam = (sum(-(-len(p) // shards) * (p.numel() // len(p)) for p in group["params"]) for group in parameter_groups(cfg))
    whole = sum(p.numel() for group in parameter_groups(cfg) for p in group["params"])
    return {"weights": 4 * (muon + adam), "gradients": 4 * (muon + adam), "momentum, Adam's moments": 4 * muon + 8 * adam,
            "averaged weights": 4 * (muon + adam), "gathered weights": bytes_of_a_weight(cfg) * whole}


def bytes_of_a_weight(cfg: Config) -> int:
    """Bytes of a gathered weight."""
    return compute_dtype(on_gpus(cfg), META).itemsize


def checkpoint_bytes(cfg: Config) -> int:
    """Bytes of a checkpoint: weights, their average, momentum and Adam's moments, all fp32."""
    return sum(4 * p.numel() * (3 if group["use_muon"] else 4) for group in parameter_groups(cfg) for p in group["params"])


def checkpoints_on_disk(cfg: Config) -> int:
    """How many checkpoints the run's folder holds at its fullest, the one that is being written among them."""
    end = last_step(cfg)
    saves = {min(first + stage.steps, end) for stage, first, _ in stage_spans(cfg)}
    saves |= set(range(cfg.save_every, end, cfg.save_every)) if cfg.save_every else set()
    there, most = [], 0
    for step in sorted(saves):
        there.append(step)
        most = max(most, len(there))
        there = [old for old in there if old in there[-cfg.keep :] or cfg.keep_every and old % cfg.keep_every == 0]
    return most


def newton_schulz_loads(shapes: list[torch.Size], ranks: int) -> list[int]:
    """Multiply-adds of one Newton-Schulz iteration over what each rank owns."""
    load = [0] * ranks
    for shape, owner in zip(shapes, assign_owners(shapes, ranks)):
        load[owner] += newton_schulz_cost(shape)
    return load


# ---------------------------------------------------------------------------------------------------------------------
# Measured


def clock(f: Callable[[], object], device: torch.device) -> float:
    """Seconds that f() takes, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def hardware(device: torch.device) -> str:
    """What this machine computes with, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    name, has_bf16 = describe_cpu()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, with{'' if has_bf16 else 'out'} bf16 units"


def matmul_rate(cfg: Config) -> float:
    """FLOP/s of this machine's CPU on matrices of 1024 x 1024."""
    a = torch.randn(1024, 1024, dtype=compute_dtype(cfg, torch.device("cpu")))
    return 2 * 1024**3 / min(clock(lambda: a @ a, a.device) for _ in range(3))


def synthetic_batch(cfg: Config, stage: Stage, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """A chunk as training sees it: pictures with the spectrum of photographs (amplitude 1/f), captions of many lengths."""
    B, S, L = cfg.micro_batch, stage.image_size, cfg.text_tokens
    generator = torch.Generator().manual_seed(seed)
    f = torch.hypot(torch.fft.fftfreq(S)[:, None], torch.fft.rfftfreq(S))  # [S, S / 2 + 1]
    f[0, 0] = math.inf
    x0 = torch.fft.irfft2(torch.fft.rfft2(torch.randn(B, 3, S, S, generator=generator)) / f, s=(S, S))
    lengths = (L / 2 + 3 * L / 16 * torch.randn(B, 1, generator=generator)).clamp(1, L)  # of 256: 128 on average, 80 to 176 for most
    mask = torch.arange(L) < lengths  # [B, L]
    txt = torch.randn(B, L, cfg.text_dim, generator=generator) * mask[:, :, None]
    txt = txt if cfg.text_encoder == "builtin" else txt.bfloat16()  # as latents are stored
    return {"x0": (0.4 * x0 / x0.std()).clamp(-1, 1).to(device), "txt": txt.to(device), "txt_mask": mask.to(device)}


def measure_steps(cfg: Config, stages: list[Stage], device: torch.device) -> list[tuple[float, float, float]]:
    """For each stage: seconds of the first step, of a chunk, and of what a step takes beyond its chunks, on one rank alone.

    The steps are `train_step`'s with the real model, of one chunk and of two in turn: their difference is a chunk.
    """
    mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    model = build_model(cfg, mesh, device)
    for p in local(list(model.parameters())):
        if not p.any():  # what starts at 0 would have the backward pass multiply zeros, and a GPU clocks higher on those
            p.detach().normal_(0, 0.02)
    optimizer, ema, frozen = build_optimizer(model, cfg), EMA(model), load_frozen(random_frozen(cfg), device)
    results, step = [], 0
    for stage in stages:
        batch, oks = synthetic_batch(cfg, stage, device), []

        def run(chunks: int) -> None:
            nonlocal step
            short = replace(stage, global_batch=chunks * cfg.micro_batch)
            oks.append(train_step(model, optimizer, ema, frozen, iter([batch] * chunks), cfg, short, step, {})[1])
            step += 1

        first = clock(lambda: run(1), device)
        run(2)
        pairs = [(clock(lambda: run(1), device), clock(lambda: run(2), device)) for _ in range(ROUNDS)]
        one, two = (statistics.median(times) for times in zip(*pairs))
        chunk = min(two - one, one)  # where others use the machine too, a difference can come out too large
        results.append((first, chunk, one - chunk))
        if not all(map(bool, oks)):
            raise UserError(f"a step on synthetic data at {stage.image_size}px had gradients that are not finite")
    return results


def measure_optimizer(cfg: Config, gpus: int, shards: int, device: torch.device) -> float:
    """Seconds of an optimizer step of the most loaded of `gpus` ranks: its matrices through Newton-Schulz, its slices of
    everything through momentum and Adam. Gradients are random, and nothing is sent."""
    muon, adam = parameter_groups(resolve_precision(cfg, device))
    shapes = [p.shape for p in muon["params"]]
    load = newton_schulz_loads(shapes, gpus)

    def filled(shape: tuple[int, ...]) -> nn.Parameter:
        p = nn.Parameter(torch.randn(shape, device=device))
        p.grad = torch.randn_like(p)
        return p

    def slices(params: list[nn.Parameter]) -> list[nn.Parameter]:
        return [filled((-(-len(p) // shards), *p.shape[1:])) for p in params]

    owned = [filled(shape) for shape, owner in zip(shapes, assign_owners(shapes, gpus)) if owner == load.index(max(load))]
    optimizer = Muon([{**muon, "params": owned}, {**muon, "params": slices(muon["params"]), "ns_steps": 0},
                      {**adam, "params": slices(adam["params"])}])
    return statistics.median([clock(optimizer.step, device) for _ in range(ROUNDS + 1)][1:])


def measure(cfg: Config, stages: list[Stage], gpus: int, shards: int, device: torch.device) -> tuple[list, float | None]:
    """What `measure_steps` returns and, for more than one GPU, what `measure_optimizer` does; leaves nothing behind."""
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # as train_prx.py has it
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of absent CUDA
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # of compiled blocks
        tempfile.tempdir = cache  # where torch has headers for CPU blocks, whatever the first of these variables says
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton", TMPDIR=cache)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            times = measure_steps(cfg, stages, device)
            gc.collect()  # the model, before what follows needs its memory and the group goes
            return times, measure_optimizer(cfg, gpus, shards, device) if gpus > 1 else None
        finally:
            dist.destroy_process_group()
            tempfile.tempdir = None


# ---------------------------------------------------------------------------------------------------------------------
# Missing


def size_text(n: float) -> str:
    """Bytes as people read them."""
    unit = max(0, min(4, int(math.log10(max(n, 1)) // 3)))
    return f"{n / 1000**unit:.{1 if unit else 0}f} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or would be."""
    return shutil.disk_usage(next(f for f in (folder.resolve(), *folder.resolve().parents) if f.is_dir())).free


def is_here(model_id: str) -> bool:
    """Whether a network's config and all its weights lie in a folder or in the local Hugging Face cache."""
    def find(name: str) -> Path | None:
        found = Path(model_id) / name if Path(model_id).is_dir() else try_to_load_from_cache(model_id, name)
        return Path(found) if isinstance(found, (str, Path)) and Path(found).exists() else None

    index = find("model.safetensors.index.json")
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index else {"model.safetensors"}
    return all(map(find, {"config.json", *weights}))


class Checklist:
    """Prints what a run needs, one line each, and counts what is not there."""

    def __init__(self):
        self.missing = 0

    def line(self, here: bool, name: str, note: str) -> None:
        self.missing += not here
        print(f"  {'here' if here else 'MISSING':9}{name}: {note}")


def how_to_make(folder: str, cfg: Config) -> tuple[str, float]:
    """The command that makes a data folder, and the bytes that it is expected to take; 0 where that is not known."""
    sizes, name = sorted({stage.image_size for stage in cfg.stages}), Path(folder).name
    form = f"--out={folder} --size={','.join(map(str, sizes))}"
    if cfg.text_encoder == "builtin":
        return f"python scenes.py make {form} --rows=20000", 0.0
    source = name if name in SETS else "DIR"
    command = f"python data_prep.py build --source={source} {form}; python data_prep.py embed --data={folder}"
    if cfg.text_encoder != Config().text_encoder:
        command += f" --encoder={cfg.text_encoder}"
    if name not in SETS or not set(sizes) <= IMAGE_BYTES.keys():
        return command, 0.0
    return command, SETS[name].rows * (sum(IMAGE_BYTES[size] for size in sizes) + 2 * CAPTION_TOKENS * cfg.text_dim)


def check_data(cfg: Config, needs: Checklist) -> tuple[bool, float]:
    """Print a line a data folder and size. Returns whether all hold text latents, and the bytes expected of missing ones."""
    latents, expected = True, 0.0
    for folder in (part.partition(":")[0] for part in cfg.data.split(",")):
        command, size = how_to_make(folder, cfg)
        if not (Path(folder) / "manifest.json").exists():
            about = f"{SETS[Path(folder).name].rows:,} rows, about {size_text(size)} (predicted); " if size else ""
            needs.line(False, folder, f"{about}{command}")
            latents, expected = False, expected + size
            continue
        try:
            manifest = read_manifest(folder)
            for side in sorted({stage.image_size for stage in cfg.stages}):
                rows = RowSet(folder, cfg, side)  # which checks the files, as a run does
                stored = sum(s["bytes"] for name, s in manifest["shards"].items() if name.startswith(f"{rows.stored_size}/"))
                scaled = "" if rows.stored_size == side else f", scaled down from {rows.stored_size}px"
                needs.line(True, folder, f"{side}px{scaled}, {manifest['rows']:,} rows, {size_text(stored)}")
            if rows.latents:
                text = manifest["text"][text_folder(cfg.text_encoder)]["shards"].values()
                needs.line(True, folder, f"text latents, {size_text(sum(s['bytes'] for s in text))}")
            elif cfg.text_encoder != "builtin":
                print(f"           no text latents, so the run would encode as it goes; {command.split('; ')[-1]}")
            latents = latents and rows.latents is not None
        except UserError as error:
            needs.line(False, folder, str(error))
            latents = False
    return latents, expected


def check_networks(cfg: Config, text: bool, needs: Checklist) -> None:
    """Print a line for each network that the run loads; `text` says whether it needs its text encoder."""
    networks = {"text encoder": cfg.text_encoder} if text else {}
    if cfg.frozen == "pretrained":
        if cfg.repa_weight > 0 and any(stage.repa for stage in cfg.stages):
            networks["REPA's teacher"] = cfg.repa_teacher
        if cfg.pdino_weight > 0:
            networks["P-DINO"] = cfg.pdino_model
    for what, model_id in networks.items():
        flag, fallback = FALLBACKS.get(model_id, ("", ""))
        gate = f"; ask for access at https://huggingface.co/{model_id}, or {flag}={fallback}" if flag else ""
        needs.line(is_here(model_id), f"{what}, {model_id}", "weights" if is_here(model_id) else f"hf download {model_id}{gate}")
    if cfg.frozen == "pretrained" and cfg.lpips_weight > 0:
        file = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
        needs.line(file.exists(), "VGG16 for LPIPS", f"{file}, 528 MB, from https://download.pytorch.org/models/{file.name}")


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def parse_flags(argv: list[str]) -> tuple[Config, int, int]:
    """The planned run, its GPUs, and how many of them share a copy of the weights; raises UserError."""
    parser = Parser(prog="plan.py", description="What a run will take, and what is missing. All flags of train_prx.py are valid "
                    "too (python train_prx.py --help) and mean what they mean there; among them --price, dollars a GPU-hour.")
    parser.add_argument("--preset", choices=PRESETS, default="record", help="the values that the other flags change")
    parser.add_argument("--gpus", type=int, help="GPUs of the planned run (default: this machine's; without any, 32 for record, else 1)")
    parser.add_argument("--gpus_a_node", type=int, default=8, help="GPUs of one machine; they share one copy of the weights")
    own, others = parser.parse_known_args(argv)
    cfg, _ = parse_config([f"--preset={own.preset}", *others])
    gpus = own.gpus if own.gpus is not None else torch.cuda.device_count() or (32 if own.preset == "record" else 1)
    if min(gpus, own.gpus_a_node) < 1:
        raise UserError("--gpus and --gpus_a_node must be at least 1")
    chunks = [stage.global_batch // cfg.micro_batch for stage in cfg.stages]
    if any(n % gpus for n in chunks):
        fits = [n for n in range(1, min(chunks) + 1) if not any(each % n for each in chunks)]
        raise UserError(f"--gpus={gpus} cannot share {' and '.join(map(str, dict.fromkeys(chunks)))} chunks of {cfg.micro_batch} rows "
                        f"evenly; these numbers can: {', '.join(map(str, fits))}")
    if gpus > own.gpus_a_node and gpus % own.gpus_a_node:
        raise UserError(f"--gpus={gpus} is no whole number of nodes of {own.gpus_a_node}: pass --gpus_a_node")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a plan is made by one process: start it without torchrun, and pass --gpus")
    return cfg, gpus, min(gpus, own.gpus_a_node)


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def say(name: str, value: str, kind: str = "", note: str = "") -> None:
    """One number, where it comes from, and what it is of."""
    print(f"  {name:40}{value:>17}  {kind:10}{note}".rstrip())


def report_time(cfg: Config, gpus: int, shards: int, device: torch.device, spans: list, counts: list, flop: float) -> None:
    """Hours and dollars from steps measured here, where that is affordable, or else from the counted FLOP."""
    def total(hours: float, note: str) -> None:
        say("hours", f"{hours:,.{2 if hours >= 1 else 4}f}", "predicted", note)
        say("dollars", f"{hours * gpus * cfg.price:,.2f}", "predicted", f"{plural(gpus, 'rank')} at ${cfg.price:g} an hour")

    machine, why = hardware(device), ""
    if device.type == "cpu":
        one_each = sum(cfg.micro_batch * sum(parts.values()) for parts, _, _ in counts)
        seconds = (3 + 3 * ROUNDS) * one_each / (matmul_rate(cfg) / 4)  # whole steps reach about a quarter of large matrices
        if seconds > AFFORDABLE:
            why = f"without a GPU (here: {machine}) a few steps would take about {seconds:,.0f} s"
    if not why:
        try:
            times, optimizer = measure(cfg, [stage for stage, _ in spans], gpus, shards, device)
        except torch.OutOfMemoryError:
            why = f"one rank alone holds the whole model, for which {machine} has too little memory"
    if why:
        say("a step", "not measured", "", why)
        for share, whose in ((GOAL, "this project's goal"), (PUBLISHED, "what PRX's own run reached")):
            total(flop / (gpus * PEAK * share) / 3600, f"counted FLOP at {share:.0%} of an H200's {PEAK / 1e12:.0f} TFLOP/s: {whose}")
        return
    seconds = 0.0
    for (stage, steps), (parts, _, _), (first, chunk, rest) in zip(spans, counts, times):
        mine = stage.global_batch // cfg.micro_batch // gpus
        seconds += first + steps * (mine * chunk + (rest if optimizer is None else optimizer))
        rate = cfg.micro_batch * sum(parts.values()) / chunk / 1e12
        say(f"first step at {stage.image_size}px", f"{first:.2f} s", "measured", "compiles" if compiles(cfg, device) else "uncompiled")
        say("a chunk, forward and backward", f"{1e3 * chunk:,.1f} ms", "measured", f"{rate:,.3g} TFLOP/s; {plural(mine, 'chunk')} a step")
        say("the rest of a step on one rank", f"{1e3 * rest:,.1f} ms", "measured", "optimizer for the whole model, clipping, average")
    if optimizer is not None:
        say("optimizer instead, of many ranks", f"{1e3 * optimizer:,.1f} ms", "measured", f"work of the most loaded of {gpus}; nothing is sent")
    if device.type == "cuda":
        say("memory of one rank that holds all", size_text(torch.cuda.max_memory_allocated()), "measured", "at its peak")
    total(seconds / 3600, f"these times x steps, on {machine}, one process; not included: reading, evaluation, samples, checkpoints"
          + f", communication between {gpus} ranks" * (gpus > 1))


def main(argv: list[str]) -> None:
    cfg, gpus, shards = parse_flags(argv)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    planned = resolve_precision(cfg, device) if cfg.device == "cpu" else on_gpus(cfg)
    end = last_step(cfg)
    spans = [(stage, min(stage.steps, end - first)) for stage, first, _ in stage_spans(cfg) if first < end]
    images = sum(steps * stage.global_batch for stage, steps in spans)
    print(f"Plan of run {cfg.name}: {plural(end, 'step')}, {images:,} images, on {plural(gpus, 'rank')}"
          f"{f' in {gpus // shards} nodes of {shards}' if gpus > shards else ''} (a rank is a GPU, or a process where there is none)")
    print(f"counted: exact; measured: here, on {hardware(device)}; predicted: from what stands beside it")

    print("\nModel")
    muon, adam = parameter_groups(cfg)
    shapes, stepped = [p.shape for p in muon["params"]], sum(p.numel() for p in muon["params"])
    whole = stepped + sum(p.numel() for p in adam["params"])
    with META:
        exported = whole - sum(p.numel() for name, p in PRX(cfg).named_parameters() if name.startswith("repa_projector."))
    load = newton_schulz_loads(shapes, gpus)
    newton_schulz = 2 * cfg.ns_steps * sum(load)  # 2 FLOP a multiply-add
    say("parameters", f"{exported:,}", "counted", "without REPA's projector")
    say("matrices that Muon steps", f"{len(shapes):,}", "counted", f"{stepped:,} of the parameters")
    say("Newton-Schulz a step", f"{newton_schulz / 1e12:.3g} TFLOP", "counted")
    if gpus > 1:
        say("largest load of a rank / mean", f"{max(load) * gpus / sum(load):.3f}", "counted",
            f"{sum(x > 0 for x in load)} of {gpus} ranks own matrices; the largest load is {2e-12 * cfg.ns_steps * max(load):.3g} TFLOP")

    counts, flop = [], 0.0
    for i, (stage, steps) in enumerate(spans):
        mine = stage.global_batch // cfg.micro_batch // gpus
        print(f"\nStage {i + 1}: {stage.image_size}px, {plural(steps, 'step')} of {plural(stage.global_batch, 'image')}, "
              f"{plural(mine, 'chunk')} of {cfg.micro_batch} a rank")
        counts.append(count_stage(planned, stage))
        parts = counts[-1][0]
        for name, each in parts.items():
            say(NAMES[name], f"{each / 1e9:,.4g} GFLOP", "counted", "an image")
        say("a rank's chunks of a step", f"{sum(parts.values()) * cfg.micro_batch * mine / 1e12:,.3g} TFLOP", "counted")
        flop += steps * (stage.global_batch * sum(parts.values()) + newton_schulz)
    print()
    say("the whole run", f"{flop:.3g} FLOP", "counted", "training alone, with Newton-Schulz")
    if cfg.text_encoder in T5GEMMA:
        more = T5GEMMA[cfg.text_encoder]
        say("text encoder, without text latents", f"{images * more:.3g} FLOP", "predicted",
            f"on top: {more / 1e9:.0f} GFLOP a caption of {CAPTION_TOKENS} tokens")

    print(f"\nMemory of a rank, at most, computing in {planned.precision}")
    state = state_bytes(planned, shards)
    mine = [stage.global_batch // cfg.micro_batch // gpus for stage, _ in spans]
    together = [chunks_together(cfg, n) for n in mine]
    if together != mine:
        state["whole gradients, between passes"] = 4 * whole
    state["frozen networks"] = max(frozen for _, _, frozen in counts)
    for name, n in state.items():
        sliced = f"fp32, 1 of {shards} slices" if shards > 1 and name in list(state)[:4] else ""
        say(name, size_text(n), "counted", sliced)
    activations = max(n * kept for n, (_, kept, _) in zip(together, counts))
    say("activations", size_text(activations), "counted", f"of {max(together)} chunks at once; upper bound: uncompiled, attention fused; compiled blocks keep less")
    say("together", size_text(sum(state.values()) + activations), "predicted", "their sum, without what the allocator wastes")

    print("\nTime and cost")
    report_time(cfg, gpus, shards, device, spans, counts, flop)

    print("\nDisk")
    kept, free = checkpoints_on_disk(cfg), free_bytes(Path("runs"))
    needed = kept * checkpoint_bytes(cfg) + 2 * 4 * exported
    say("a checkpoint", size_text(checkpoint_bytes(cfg)), "counted", "weights, average, momentum, Adam's moments")
    say("ema.safetensors", size_text(4 * exported), "counted", "what is sampled, scored and exported")
    say("runs/ at its fullest", size_text(needed), "counted", f"{plural(kept, 'checkpoint')}, the one in writing among them, and ema.safetensors twice")

    print("\nWhat the run needs")
    needs = Checklist()
    latents, expected = check_data(cfg, needs)
    check_networks(cfg, cfg.text_encoder != "builtin" and not latents, needs)
    needs.line(free >= needed, "disk for runs/", f"{size_text(needed)}, {size_text(free)} are free")
    if expected:
        data_free = free_bytes(Path(cfg.data.split(",")[0].partition(":")[0]))
        needs.line(data_free >= expected, "disk for the missing data", f"about {size_text(expected)}, {size_text(data_free)} are free; "
                   f"predicted from rows, {' and '.join(f'{n / 1e3:.0f} KB at {size}px' for size, n in IMAGE_BYTES.items())}, and text latents")
    print(f"\n{plural(needs.missing, 'thing')} {'is' if needs.missing == 1 else 'are'} missing" if needs.missing else "\nready")


if __name__ == "__main__":
    run_main(main)
