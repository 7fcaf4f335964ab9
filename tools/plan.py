"""What a run will take, before it starts: hours, dollars, memory, disk, and what is missing on this machine.

    python tools/plan.py --preset=record [--gpus=32] [--gpus_a_node=8] [--price=2.0] [any flag of train_prx.py]

Every number says where it comes from. `counted`: exact, from the model that the flags describe, run without memory on
the meta device. `measured`: real training steps on this machine, in one process, on synthetic batches of true shapes.
`predicted`, `simulated`: from what stands beside it. It downloads nothing and writes nothing but torch's compile cache.
"""
import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from data_prep import SETS  # noqa: E402
from muon import assign_owners, local, newton_schulz_cost  # noqa: E402
from tools.scenes import LEVELS  # noqa: E402
from train_prx import (  # noqa: E402
    EMA, OPEN_FALLBACKS, PRESETS, PRX, Config, Frozen, Parser, RowSet, Stage, UserError, build_model, build_optimizer,
    compute_dtype, describe_cpu, join, load_frozen, parse_config, run_main, train_step, training_loss)

META = torch.device("meta")
PEAK = 790e12  # FLOP/s of an H200 on dense bf16 matrices of random numbers, measured
GOAL, PUBLISHED = 0.60, 0.08  # shares of it: what nanoPRX aims at, and what PRX's 24 hours on 32 of them come to
NODE, NETWORK = 300e9, 50e9  # bytes/s a GPU, bus bandwidth within a node of H200s and between nodes: assumed
CAPTION_TOKENS = 128  # of a long caption, on average
IMAGE_BYTES = {512: 143e3, 1024: 449e3}  # of a stored picture with the spectrum of photographs: benchmarks/data.txt
AFFORDABLE = 2e11  # FLOP of a chunk, at most, that a machine without a GPU is asked for
ROUNDS = 3  # timed steps of one chunk, and of two, alternating


# ---------------------------------------------------------------------------------------------------------------------
# Counted


def count_loss(model: PRX, frozen: Frozen, cfg: Config, stage: Stage) -> int:
    """FLOP of a chunk's forward and backward pass."""
    B, S, L = cfg.micro_batch, stage.image_size, cfg.text_tokens
    batch = {"x0": torch.empty(B, 3, S, S, device=META), "txt": torch.empty(B, L, cfg.text_dim, device=META),
             "txt_mask": torch.ones(B, L, dtype=torch.bool, device=META)}
    with FlopCounterMode(display=False) as counter:
        training_loss(model, frozen, batch, cfg, stage, None)[0].backward()
    return counter.get_total_flops()


def count_stage(cfg: Config, stage: Stage) -> dict[str, float]:
    """FLOP an image by part, all its passes through a step; a term's is what the loss takes with it, less without."""
    cfg = on_gpus(cfg)
    with META:
        model = PRX(cfg).to(compute_dtype(cfg, META))
        frozen = load_frozen(replace(random_frozen(cfg), compile=False), META)
    on = Frozen()
    before = count_loss(model, on, cfg, stage)
    parts = {"denoiser": before / cfg.micro_batch}
    for name in ("lpips", "pdino", "teacher"):
        if getattr(frozen, name) is not None and (name != "teacher" or stage.repa):
            on = replace(on, **{name: getattr(frozen, name)})
            after = count_loss(model, on, cfg, stage)
            parts[name], before = (after - before) / cfg.micro_batch, after
    if "teacher" in parts:
        with FlopCounterMode(display=False) as counter:
            frozen.teacher(torch.empty(1, 3, stage.image_size, stage.image_size, device=META))
        parts["projector"] = parts["teacher"] - counter.get_total_flops()
        parts["teacher"] = counter.get_total_flops()
    return parts


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


def held_weights(cfg: Config, shards: int) -> tuple[int, int]:
    """Weights that Muon and that Adam steps, on the rank that holds most of `shards` that cut each tensor by rows."""
    groups = [group["params"] for group in parameter_groups(cfg)]
    muon, adam = (sum(-(-len(p) // shards) * (p.numel() // len(p)) for p in params) for params in groups)
    return muon, adam


def state_bytes(cfg: Config, shards: int) -> dict[str, int]:
    """Bytes that weights and optimizer take on the rank that holds most."""
    (muon, adam), whole = held_weights(cfg, shards), sum(held_weights(cfg, 1))
    return {"weights, gradients, averages": 3 * 4 * (muon + adam), "momentum, Adam's moments": 4 * muon + 8 * adam,
            "gathered weights": compute_dtype(on_gpus(cfg), META).itemsize * whole,
            "whole gradients, between passes": 4 * whole}


def sent_bytes(cfg: Config, gpus: int, shards: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step, on average, within its node of `shards` GPUs and beyond it.

    FSDP gathers weights and scatters the gradients' fp32 sums within the node, and adds the sums' slices up beyond it.
    Muon sends slices to their owners and back within the node, and what a node owns to all others.
    """
    (muon, adam), replicas = held_weights(cfg, shards), gpus // shards
    size = compute_dtype(on_gpus(cfg), META).itemsize
    within = (shards - 1) * ((size + 4) * (muon + adam) + 2 * size * muon / gpus)
    return within, (1 - 1 / replicas) * (2 * 4 * (muon + adam) + size * muon)


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
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - begun


def hardware(device: torch.device) -> str:
    """What this machine computes with, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name, has_bf16 = describe_cpu()
    return f"{name}, {plural(torch.get_num_threads(), 'thread')}, with{'' if has_bf16 else 'out'} bf16 units"


def synthetic_batch(cfg: Config, stage: Stage, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """A padded chunk: pictures with the spectrum of photographs (amplitude 1/f), captions of many lengths."""
    B, S, L = cfg.micro_batch, stage.image_size, cfg.text_tokens
    generator = torch.Generator().manual_seed(seed)
    f = torch.hypot(torch.fft.fftfreq(S)[:, None], torch.fft.rfftfreq(S))  # [S, S / 2 + 1]
    f[0, 0] = math.inf
    x0 = torch.fft.irfft2(torch.fft.rfft2(torch.randn(B, 3, S, S, generator=generator)) / f, s=(S, S))
    lengths = (L / 2 + 3 * L / 16 * torch.randn(B, 1, generator=generator)).clamp(1, L)  # of 256: 80 to 176 for most
    mask = torch.arange(L) < lengths  # [B, L]
    txt = torch.randn(B, L, cfg.text_dim, generator=generator) * mask[:, :, None]
    txt = txt if cfg.text_encoder == "builtin" else txt.bfloat16()  # as latents are stored
    return {"x0": (0.4 * x0 / x0.std()).clamp(-1, 1).to(device), "txt": txt.to(device), "txt_mask": mask.to(device)}


def perturb(model: nn.Module) -> None:
    """Draw what starts at 0 from N(0, 0.02): backward would multiply zeros, and a GPU clocks higher on those."""
    for p in local(list(model.parameters())):
        if not p.any():
            p.detach().normal_(0, 0.02)


def measure_steps(cfg: Config, stages: list[Stage], device: torch.device) -> list[tuple[float, float, float]]:
    """For each stage: seconds of the first step, of a chunk, and of what a step takes beyond its chunks, on one rank.

    The steps are `train_step`'s with the real model, of one chunk and of two in turn: their difference is a chunk.
    """
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # both as train_prx.py has it
    device, mesh = join(device.type == "cuda")
    model = build_model(cfg, mesh, device)
    perturb(model)
    optimizer, ema, frozen = build_optimizer(model, cfg), EMA(model), load_frozen(random_frozen(cfg), device)
    results, oks = [], []
    for stage in stages:
        batch = synthetic_batch(cfg, stage, device)

        def run(chunks: int) -> None:
            short = replace(stage, global_batch=chunks * cfg.micro_batch)
            oks.append(train_step(model, optimizer, ema, frozen, iter([batch] * chunks), cfg, short, len(oks))[1])

        first = clock(lambda: run(1), device)
        run(2)
        pairs = [(clock(lambda: run(1), device), clock(lambda: run(2), device)) for _ in range(ROUNDS)]
        one, two = map(min, zip(*pairs))
        chunk = min(two - one, one) if two > one else one  # where others use the machine too, a difference is anything
        results.append((first, chunk, one - chunk))
    dist.destroy_process_group()
    if not all(map(bool, oks)):
        raise UserError("a step on synthetic data had gradients that are not finite")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Missing


def size_text(n: float) -> str:
    """Bytes as people read them."""
    unit = max(0, min(4, int(math.log10(max(n, 1)) // 3)))
    return f"{n / 1000**unit:.{1 if unit else 0}f} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def is_here(model_id: str) -> bool:
    """Whether a network lies in a folder or in the local Hugging Face cache."""
    folder = Path(model_id)
    with contextlib.suppress(ValueError):  # a path is no id of the hub
        cached = try_to_load_from_cache(model_id, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def how_to_make(folder: str, cfg: Config) -> str:
    """The command that makes a data folder, and what is known about the folder beforehand."""
    sizes, name = sorted({stage.image_size for stage in cfg.stages}), Path(folder).name
    form = f"--out={folder} --size={','.join(map(str, sizes))}"
    if name in LEVELS:
        return f"python tools/scenes.py make {form} --level={name}"
    build = f"python data_prep.py build --source={name if name in SETS else 'DIR'} {form}"
    if cfg.text_encoder == "builtin":
        return build
    encoder = f" --encoder={cfg.text_encoder}" if cfg.text_encoder != Config().text_encoder else ""
    commands = f"{build}; python data_prep.py embed --data={folder}{encoder}"
    if name not in SETS:
        return commands
    size = SETS[name].rows * (sum(IMAGE_BYTES.get(size, 0) for size in sizes) + 2 * CAPTION_TOKENS * cfg.text_dim)
    return f"{SETS[name].rows:,} rows, about {size_text(size)} (predicted); {commands}"


def needs_of(cfg: Config) -> Iterator[tuple[bool, str, str]]:
    """What the run reads: whether it is here, its name, and what it is or how it is made."""
    sizes, encodes = sorted({stage.image_size for stage in cfg.stages}), False
    for folder in (part.partition(":")[0] for part in cfg.data.split(",")):
        try:
            sets = [RowSet(folder, cfg, size) for size in sizes]  # which checks the files, as a run does
        except UserError as error:
            made, encodes = (Path(folder) / "manifest.json").exists(), True
            yield False, folder, str(error) if made else how_to_make(folder, cfg)
            continue
        stored = [f"{s.image_size}px" + f" from {s.stored_size}px" * (s.image_size != s.stored_size) for s in sets]
        encodes = encodes or sets[0].latents is None
        yield True, folder, f"{sets[0].manifest['rows']:,} rows, {', '.join(stored)}"
    pretrained, repa = cfg.frozen == "pretrained", any(stage.repa for stage in cfg.stages)
    for what, model_id, used in (("text encoder", cfg.text_encoder, encodes and cfg.text_encoder != "builtin"),
                                 ("REPA's teacher", cfg.repa_teacher, pretrained and repa and cfg.repa_weight > 0),
                                 ("P-DINO", cfg.pdino_model, pretrained and cfg.pdino_weight > 0)):
        if used:
            gate = f"; access: https://huggingface.co/{model_id}" * (model_id in OPEN_FALLBACKS)
            how = f"hf download {model_id}{gate}{OPEN_FALLBACKS.get(model_id, '')}"
            yield is_here(model_id), f"{what}, {model_id}", how
    if pretrained and cfg.lpips_weight > 0:
        file = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
        yield file.exists(), "VGG16 for LPIPS", f"{file}, 528 MB, https://download.pytorch.org/models/{file.name}"


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def parse_flags(argv: list[str]) -> tuple[Config, int, int, float]:
    """The planned run, its GPUs, how many of them share a copy of the weights, dollars a GPU-hour; raises UserError."""
    parser = Parser(prog="plan.py", description="What a run will take, and what is missing. All flags of train_prx.py "
                    "are valid too (python train_prx.py --help) and mean what they mean there.")
    parser.add_argument("--preset", choices=PRESETS, default="record", help="the values that the other flags change")
    parser.add_argument("--gpus", type=int, help="of the planned run (default: this machine's, or 32 for record, or 1)")
    parser.add_argument("--gpus_a_node", type=int, default=8, help="GPUs that share one copy of all weights")
    parser.add_argument("--price", type=float, default=2.0, help="dollars a GPU-hour")
    own, others = parser.parse_known_args(argv)
    cfg, _ = parse_config([f"--preset={own.preset}", *others])
    gpus = own.gpus if own.gpus is not None else torch.cuda.device_count() or (32 if own.preset == "record" else 1)
    if min(gpus, own.gpus_a_node) < 1 or not 0 <= own.price < math.inf:
        raise UserError("--gpus and --gpus_a_node must be at least 1, and --price at least 0")
    common = math.gcd(*(stage.global_batch // cfg.micro_batch for stage in cfg.stages))
    if common % gpus:
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UserError(f"--gpus={gpus} cannot share chunks of {cfg.micro_batch} rows evenly; these can: {fits}")
    if gpus > own.gpus_a_node and gpus % own.gpus_a_node:
        raise UserError(f"--gpus={gpus} is no whole number of nodes of {own.gpus_a_node}: pass --gpus_a_node")
    return cfg, gpus, min(gpus, own.gpus_a_node), own.price


def say(name: str, value: str, kind: str = "", note: str = "") -> None:
    """One number, where it comes from, and what it is of."""
    print(f"  {name:40}{value:>17}  {kind:10}{note}".rstrip())


def say_time(cfg: Config, gpus: int, shards: int, price: float, spans: list, counts: list, flop: float, share: float,
             device: torch.device) -> None:
    """Hours and dollars, from steps measured here or else from the FLOP; `share`: of Newton-Schulz, one rank's."""
    def total(seconds: list[float], note: str) -> None:
        hours, dollars = (" to ".join(dict.fromkeys(f"{x / 3600 * each:,.{digits}f}" for x in seconds))
                          for each, digits in ((1, 2 if seconds[0] >= 3600 else 4), (gpus * price, 2)))
        say("hours", hours, "predicted", note)
        say("dollars", dollars, "predicted", f"{plural(gpus, 'rank')} at ${price:g} an hour")

    times, why = [], f"this would take minutes without a GPU (here: {hardware(device)})"
    if device.type == "cuda" or all(cfg.micro_batch * sum(parts.values()) < AFFORDABLE for parts in counts):
        try:
            times = measure_steps(cfg, [stage for stage, _, _ in spans], device)
        except torch.OutOfMemoryError:
            why = f"one rank alone holds the whole model, for which {hardware(device)} has too little memory"
    if not times:
        say("a step", "not measured", "", why)
        for part, whose in ((GOAL, "this project's goal"), (PUBLISHED, "what PRX's own run reached")):
            total([flop / (gpus * PEAK * part)], f"FLOP at {part:.0%} of an H200's {PEAK / 1e12:.0f} TFLOP/s: {whose}")
        return
    within, beyond = sent_bytes(cfg, gpus, shards)
    wait, seconds = within / NODE + beyond / NETWORK, 0.0
    for (stage, steps, mine), parts, (first, chunk, rest) in zip(spans, counts, times):
        rate, part = cfg.micro_batch * sum(parts.values()) / chunk / 1e12, max(share, 1 / shards)
        seconds += first + steps * (mine * chunk + part * rest)
        say(f"first step at {stage.image_size}px", f"{first:.2f} s", "measured", "with its compilation")
        say("a chunk, forward and backward", f"{1e3 * chunk:,.1f} ms", "measured", f"{rate:,.3g} TFLOP/s, x {mine}")
        say("the rest of a step on one rank", f"{1e3 * rest:,.1f} ms", "measured", f"{part:.3f} of it on {gpus}")
    if device.type == "cuda":
        say("memory of a rank that holds all", size_text(torch.cuda.max_memory_allocated()), "measured", "at its peak")
    if gpus > 1:
        say("sent by a rank in a step", size_text(within + beyond), "counted", f"{size_text(beyond)} beyond its node")
        say("waiting for it", f"0 to {1e3 * wait:,.1f} ms", "simulated", "none if it hides under other work; at "
            f"{NODE / 1e9:.0f} GB/s within a node and {NETWORK / 1e9:.0f} beyond")
    total([seconds, seconds + wait * sum(steps for _, steps, _ in spans)],
          f"these times x steps, on {hardware(device)}; without reading, evaluation, samples, checkpoints")


def main(argv: list[str]) -> None:
    cfg, gpus, shards, price = parse_flags(argv)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    planned = replace(cfg, precision="fp32") if cfg.device == "cpu" and cfg.precision == "auto" else on_gpus(cfg)
    spans, left = [], cfg.last_step  # each stage, its steps, and a rank's chunks of each of them
    for stage in cfg.stages:
        if left > 0:
            spans.append((stage, min(stage.steps, left), stage.global_batch // cfg.micro_batch // gpus))
        left -= stage.steps
    images = sum(steps * stage.global_batch for stage, steps, _ in spans)
    nodes = f" in {gpus // shards} nodes of {shards}" if gpus > shards else ""
    print(f"Plan of run {cfg.name}: {plural(cfg.last_step, 'step')}, {images:,} images, {plural(gpus, 'rank')}{nodes}; "
          "a rank is a GPU, or a process where there is none")

    print("\nModel")
    with META:
        exported = sum(p.numel() for name, p in PRX(cfg).named_parameters() if not name.startswith("repa_projector."))
    shapes = [p.shape for p in parameter_groups(cfg)[0]["params"]]
    (muon, adam), load = held_weights(cfg, 1), newton_schulz_loads(shapes, gpus)
    newton_schulz = 2 * cfg.ns_steps * sum(load)  # 2 FLOP a multiply-add
    say("parameters", f"{exported:,}", "counted", "without REPA's projector")
    say("matrices that Muon steps", f"{len(shapes):,}", "counted", f"{muon:,} of the parameters")
    say("Newton-Schulz a step", f"{newton_schulz / 1e12:.3g} TFLOP", "counted",
        f"the most loaded of {plural(gpus, 'rank')} has {gpus * max(load) / sum(load):.3f} times the mean")

    flop, counts = 0.0, [count_stage(planned, stage) for stage, _, _ in spans]
    for i, ((stage, steps, mine), parts) in enumerate(zip(spans, counts), 1):
        print(f"\nStage {i}: {stage.image_size}px, {plural(steps, 'step')} of {plural(stage.global_batch, 'image')}, "
              f"{plural(mine, 'chunk')} of {cfg.micro_batch} a rank")
        for name, each in parts.items():
            say(name, f"{each / 1e9:,.4g} GFLOP", "counted", "an image, all passes of a step")
        say("a rank's chunks of a step", f"{sum(parts.values()) * cfg.micro_batch * mine / 1e12:,.3g} TFLOP", "counted")
        flop += steps * (stage.global_batch * sum(parts.values()) + newton_schulz)
    say("the whole run", f"{flop:.3g} FLOP", "counted", "with Newton-Schulz, without the text encoder")

    print(f"\nMemory of a rank in {planned.precision}, without frozen networks and activations (--chunks_at_once)")
    for name, n in state_bytes(planned, shards).items():
        say(name, size_text(n), "counted")

    print("\nTime and cost")
    say_time(cfg, gpus, shards, price, spans, counts, flop, max(load) / sum(load), device)

    print("\nDisk")
    checkpoint = 4 * (3 * muon + 4 * adam + exported)
    snapshots = cfg.last_step // cfg.snapshot_every if cfg.snapshot_every else 0
    needed, free = (cfg.keep + 1) * checkpoint + (2 + snapshots) * 4 * exported, shutil.disk_usage(".").free
    say("a checkpoint", size_text(checkpoint), "counted", "weights, average, optimizer and ema.safetensors, all fp32")
    say("ema.safetensors", size_text(4 * exported), "counted", "what is sampled, scored and exported")
    say("runs/ at its fullest", size_text(needed), "counted", f"{cfg.keep} + 1 checkpoints, {2 + snapshots} averages")

    print("\nWhat the run needs")
    disk = free >= needed, "disk for runs/", f"{size_text(needed)}, {size_text(free)} are free"
    missing = 0
    for here, name, note in (*needs_of(cfg), disk):
        print(f"  {'here' if here else 'MISSING':9}{name}: {note}")
        missing += not here
    print(f"\n{plural(missing, 'thing')} {'is' if missing == 1 else 'are'} missing" if missing else "\nready")


if __name__ == "__main__":
    run_main(main)
