"""The training step: ours beside what others offer, in one process, on equal weights, batches and draws.

    python benchmarks/step.py                                  a GPU: the record's first stage; none: the demo's model
    python benchmarks/step.py --stage=2 --batch=16             1024px
    python benchmarks/step.py --arms=ours --ranks=32           rank 0 of 32, alone: its slices, its share of Muon
    python benchmarks/step.py --parts                          and each part of our step by itself
    (and any flag of train_prx.py)

Arms
    ours              `train_prx.train_step` itself
    diffusers         the same losses, teachers and data around diffusers' PRXTransformer2DModel, which has no routing:
                      torch.compile, autocast over fp32 weights, muon-fsdp2 (our Muon where it is not installed) and
                      diffusers' EMAModel; FSDP2 on one rank, since muon-fsdp2 0.3.0 raises NameError on plain tensors:
                      what DTensors cost the host is in `host ms`
    diffusers-routed  the same with our routing written around its blocks

Before anything is timed, an arm's loss and gradients are compared with ours from equal weights. Then the arms take
turns: `--warmup` steps each, then `--rounds` rounds of `--steps` steps each. Frozen networks are random, of the true
shapes, and what starts at zero is drawn from N(0, 0.02): the backward pass would otherwise multiply zeros, and a GPU
clocks higher on those. With `--ranks`, collectives copy within the process: nobody waits for others.
"""
import contextlib
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from benchmarks.muon import loop_back  # noqa: E402
from muon import Muon, local  # noqa: E402
from tools.exchange import diffusers_config, to_diffusers  # noqa: E402
from tools.plan import (  # noqa: E402
    clock, count_stage, hardware, newton_schulz_loads, perturb, random_frozen, size_text, synthetic_batch)
from train_prx import (  # noqa: E402
    EMA, PRESETS, Config, Frozen, Parser, Stage, UserError, build_model, build_optimizer, compute_dtype,
    gather_tokens, load_frozen, lr_factor, parse_config, run_main, tag_generator, train_step,
    training_loss)

ARMS = ("ours", "diffusers", "diffusers-routed")
TOLERANCES = {"fp32": (1e-4, 0.9999), "bf16": (1e-2, 0.999)}  # of losses, relative; cosine of gradients (fp32: of each)

Batch = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Arms: a model and a step


class Ours:
    """nanoPRX."""

    name = "ours"

    def __init__(self, cfg: Config, stage: Stage, frozen: Frozen, mesh: DeviceMesh, device: torch.device):
        self.cfg, self.stage, self.frozen = cfg, stage, frozen
        self.model = build_model(cfg, mesh, device)
        perturb(self.model)
        self.optimizer, self.ema = build_optimizer(self.model, cfg), EMA(self.model)

    def step(self, chunks: list[Batch], step: int) -> Tensor:
        """One training step; returns ok, 0 where it was skipped."""
        model, optimizer, ema = self.model, self.optimizer, self.ema
        return train_step(model, optimizer, ema, self.frozen, iter(chunks), self.cfg, self.stage, step)[1]


class Autocast(nn.Sequential):
    """Modules one after the other, those that can in bf16 where the input is."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            return super().forward(x)


class Theirs(nn.Module):
    """diffusers' transformer with our weights, and REPA's projector, behind the interface of our `PRX`."""

    def __init__(self, cfg: Config, weights: dict[str, Tensor]):
        super().__init__()
        try:
            from diffusers.models.transformers import transformer_prx
        except ImportError:
            raise UserError("the diffusers arms need it: pip install -r benchmarks/requirements.txt") from None
        self.cfg, self.prx = cfg, transformer_prx
        self.net = transformer_prx.PRXTransformer2DModel(**diffusers_config(cfg))
        self.net.load_state_dict(to_diffusers(weights))
        self.repa_projector, C, D = None, cfg.width, cfg.repa_dim
        if cfg.repa_weight > 0:
            self.repa_projector = Autocast(nn.Linear(C, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
            for name, p in self.repa_projector.named_parameters():
                p.data.copy_(weights[f"repa_projector.{name}"])

    def forward(self, x_t: Tensor, t: Tensor, txt: Tensor, txt_mask: Tensor, ids_keep: Tensor | None = None):
        """As `PRX.forward`."""
        net, cfg, (B, _, H, W) = self.net, self.cfg, x_t.shape
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            img = net.img_in(self.prx.img2seq(x_t, cfg.patch))
            txt = net.txt_in(txt if cfg.precision == "bf16" else txt.float())
            rope = net.pe_embedder(self.prx.get_image_ids(B, H, W, cfg.patch, x_t.device))  # [B, 1, N, d / 2, 2, 2]
            c = net._compute_timestep_embedding(t, img.dtype)
            for i, block in enumerate(net.blocks):
                if ids_keep is not None and i == cfg.route.start:
                    all_img, all_rope, img = img, rope, gather_tokens(img, ids_keep)  # [B, N, C] -> [B, N_keep, C]
                    rope = gather_tokens(rope.flatten(3).squeeze(1), ids_keep).view(B, 1, -1, *rope.shape[3:])
                img = block(img, txt, c, rope, txt_mask)
                if i + 1 == cfg.repa_depth:
                    feat = img
                if ids_keep is not None and i + 1 == cfg.route.stop:
                    img = all_img.scatter(1, ids_keep[:, :, None].expand(-1, -1, img.shape[-1]), img)  # [B, N, C]
                    rope = all_rope
            return self.prx.seq2img(net.final_layer(img, c), cfg.patch, (H, W)).float(), feat


class Assembled:
    """What one would put together today around diffusers' transformer, from parts that exist."""

    def __init__(self, name: str, cfg: Config, stage: Stage, frozen: Frozen, mesh: DeviceMesh, device: torch.device,
                 ours: Ours):
        from diffusers.training_utils import EMAModel

        self.name, self.frozen, self.stage = name, frozen, stage
        self.cfg = cfg if name.endswith("-routed") else replace(cfg, drop=0.0)
        weights = {key: p.detach().full_tensor() for key, p in ours.model.named_parameters()}
        self.model = Theirs(self.cfg, weights).to(device)
        if cfg.compile and device.type == "cpu":
            self.model.forward = torch.compile(self.model.forward)  # FSDP's hooks stay outside
        elif cfg.compile:
            for block in self.model.net.blocks:  # a whole model takes minutes, and gains nothing between its blocks
                block.compile()
        fully_shard(self.model, mesh=mesh)  # one unit: on one rank nothing is to be overlapped
        matrices, others = [], []
        for key, p in self.model.named_parameters():
            (matrices if "blocks." in key and p.ndim == 2 else others).append(p)
        theirs = importlib.import_module("muon_fsdp2").Muon if importlib.util.find_spec("muon_fsdp2") else Muon
        self.optimizer = theirs([dict(params=matrices, use_muon=True, momentum=cfg.momentum, ns_steps=cfg.ns_steps),
                                 dict(params=others, use_muon=False, betas=cfg.adam_betas, eps=cfg.adam_eps)])
        self.ema = EMAModel(self.model.parameters(), decay=cfg.ema, foreach=True)

    def step(self, chunks: list[Batch], step: int) -> Tensor:
        """One training step on all chunks at once; returns whether its loss is finite."""
        batch = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        draws = [tag_generator(batch["x0"].device, self.cfg.seed, step, i) for i in range(len(chunks))]
        loss, _ = training_loss(self.model, self.frozen, batch, self.cfg, self.stage, draws)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_factor(self.cfg, step) * (self.cfg.lr if group["use_muon"] else self.cfg.adam_lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if step % self.cfg.ema_every == 0:
            self.ema.step(self.model.parameters())
        return loss.detach().isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def gradients(arm, batch: Batch, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """An arm's loss of a chunk, and the gradient of every weight, whole, by the names that it has there."""
    draws = tag_generator(batch["x0"].device, "draws")
    loss, _ = training_loss(arm.model, arm.frozen, batch, cfg, arm.stage, draws)
    loss.backward()
    grads = {name.removeprefix("net."): p.grad.full_tensor() for name, p in arm.model.named_parameters()
             if p.grad is not None}
    arm.optimizer.zero_grad()
    return loss.detach(), grads


def compare(ours: Ours, theirs: Assembled, batch: Batch) -> str:
    """Losses and gradients of one chunk, ours with the arm's routing; raises UserError where they differ too much."""
    loss, grads = gradients(ours, batch, theirs.cfg)
    their_loss, their_grads = gradients(theirs, batch, theirs.cfg)
    grads = to_diffusers(grads) | {name: grad for name, grad in grads.items() if name.startswith("repa_projector.")}
    if set(grads) != set(their_grads):
        only = sorted(set(grads) ^ set(their_grads))[:4]
        raise UserError(f"{theirs.name} and ours have gradients for different weights: {only}")
    pairs = {name: (grads[name].double().flatten(), their_grads[name].double().flatten()) for name in sorted(grads)}
    cosine = F.cosine_similarity(*(torch.cat(side) for side in zip(*pairs.values())), dim=0).item()
    worst, where = min((F.cosine_similarity(a, b, dim=0).item(), name) for name, (a, b) in pairs.items())
    difference, (most, least) = abs(their_loss / loss - 1).item(), TOLERANCES[theirs.cfg.precision]
    if not (difference <= most and (worst if theirs.cfg.precision == "fp32" else cosine) >= least):
        raise UserError(f"{theirs.name} does not compute what ours does: losses {difference:.1e} apart (at most {most})"
                        f", cosine of the gradients {cosine:.6f}, of {where} {worst:.6f} (at least {least})")
    return (f"loss {loss:.6f}, {difference:.1e} apart; cosine of the gradients 1 - {max(0.0, 1 - cosine):.1e}, "
            f"of {where}, the least alike, 1 - {max(0.0, 1 - worst):.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# Time


@contextlib.contextmanager
def rank_of(ranks: int, rank: int, gpus_a_node: int, device: torch.device) -> Iterator[DeviceMesh]:
    """The mesh that rank `rank` of `ranks` has; of several the others do not exist, and collectives copy in place."""
    names, shape = ("shard",), (min(ranks, gpus_a_node),)
    if ranks > gpus_a_node:
        names, shape = ("replicate", "shard"), (ranks // gpus_a_node, gpus_a_node)
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    else:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with loop_back() if ranks > 1 else contextlib.nullcontext():
            yield init_device_mesh(device.type, shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this device on square matrices of random numbers, the median of 20."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype).unbind()
    return 2 * n**3 / statistics.median([clock(lambda: a @ b, device) for _ in range(25)][5:])


def measured_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written together, of a copy far larger than any cache."""
    a = torch.randn(2**29 if device.type == "cuda" else 2**25, device=device)  # 2 GB, 128 MB
    b = torch.empty_like(a)
    return 8 * len(a) / statistics.median([clock(lambda: b.copy_(a), device) for _ in range(15)][5:])


def time_arms(arms: list, steps_of: list[list[Batch]], warmup: int, rounds: int, steps: int,
              device: torch.device) -> dict[str, dict[str, list[float]]]:
    """For each arm and round: seconds of a step by the wall and until the host had issued it, bytes at its peak."""
    times = {arm.name: {"step": [], "host": [], "peak": []} for arm in arms}
    taken, oks = dict.fromkeys(times, 0), []

    def run(arm, n: int) -> float:
        host = 0.0
        for _ in range(n):
            begun = time.perf_counter()
            oks.append(arm.step(steps_of[taken[arm.name] % len(steps_of)], taken[arm.name]))
            host += time.perf_counter() - begun
            taken[arm.name] += 1
        return host / n

    for arm in arms:
        run(arm, warmup)
    for _ in range(rounds):
        for arm in arms:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds = clock(lambda: times[arm.name]["host"].append(run(arm, steps)), device)
            times[arm.name]["step"].append(seconds / steps)
            if device.type == "cuda":
                times[arm.name]["peak"].append(torch.cuda.max_memory_allocated() - before)
    if not all(map(bool, oks)):
        raise UserError("a step on synthetic data had a loss or gradients that are not finite")
    return times


def report(arms: list, times: dict, resident: dict[str, int], images: int, flop: dict[str, float], peak: float) -> None:
    """The table: `flop` of a step and `resident` bytes between steps by arm, `peak` FLOP/s; ratios are to ours."""
    print(f"{'arm':18}{'ms a step':>10}{'spread':>18}{'images/s':>10}{'TFLOP/s':>9}{'of peak':>9}{'ours is':>9}"
          f"{'host ms':>9}{'memory':>10}")
    base = statistics.median(times[arms[0].name]["step"])
    for arm in arms:
        step, host = (statistics.median(times[arm.name][name]) for name in ("step", "host"))
        spread = f"{1e3 * min(times[arm.name]['step']):.1f} to {1e3 * max(times[arm.name]['step']):.1f}"
        peaks = times[arm.name]["peak"]
        memory = size_text(resident[arm.name] + max(peaks)) if peaks else "-"
        rate = flop[arm.name] / step
        print(f"{arm.name:18}{1e3 * step:10.1f}{spread:>18}{images / step:10.1f}{rate / 1e12:9.2f}{rate / peak:9.1%}"
              f"{step / base:8.2f}x{1e3 * host:9.1f}{memory:>10}")


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def time_parts(ours: Ours, batch: Batch, counted: dict[str, float], newton_schulz: float, peak: float, bandwidth: float,
               device: torch.device) -> None:
    """Each part of our step alone: its time, what it computes or moves, and the share of the measured ceiling."""
    model, frozen, cfg, stage = ours.model, ours.frozen, ours.cfg, ours.stage
    x0, B = batch["x0"], len(batch["x0"])
    generator = tag_generator(device, "parts")
    weights = local(list(model.parameters()))

    def median(f: Callable[[], object]) -> float:
        return statistics.median([clock(f, device) for _ in range(13)][3:])

    def say(name: str, seconds: float, flop: float = 0.0, moved: float = 0.0) -> None:
        ceiling = f"{flop / 1e12:10.2f} TFLOP  {flop / seconds / peak:6.1%} of peak" if flop else ""
        ceiling = f"{moved / 1e9:10.2f} GB     {moved / seconds / bandwidth:6.1%} of bandwidth" if moved else ceiling
        print(f"  {name:42}{1e3 * seconds:9.2f} ms{ceiling}")

    def denoise() -> Tensor:
        return training_loss(model, Frozen(), batch, cfg, stage, generator)[0]

    def leaf() -> Tensor:
        return (x0 + 0.1 * torch.randn_like(x0)).requires_grad_()

    with torch.no_grad():
        say("denoiser, forward", median(denoise), counted["denoiser"] * B / 3)
    say("denoiser, forward and backward", median(lambda: denoise().backward()), counted["denoiser"] * B)
    if frozen.teacher is not None and stage.repa:
        with torch.no_grad():
            say("REPA's teacher, forward", median(lambda: frozen.teacher(x0)), counted["teacher"] * B)
    if frozen.lpips is not None:
        def halves() -> list[Tensor]:
            return [F.interpolate(x, scale_factor=0.5, mode="bilinear") for x in (leaf(), x0)]

        say("LPIPS, two forwards and a gradient", median(lambda: frozen.lpips(*halves()).mean().backward()),
            counted["lpips"] * B)
    if frozen.pdino is not None:
        with torch.no_grad():
            target = median(lambda: frozen.pdino(x0))
        say("P-DINO, two forwards and a gradient", target + median(
            lambda: frozen.pdino(leaf()).square().mean().backward()), counted["pdino"] * B)
    size = sum(w.numel() * w.element_size() for w in weights)
    say("optimizer", median(ours.optimizer.step), newton_schulz)
    say(f"averaged weights, one step in {cfg.ema_every}", median(lambda: ours.ema.update(cfg.ema)), moved=3 * size)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_flags(argv: list[str]):
    """The benchmark's own flags and the run that the others describe; raises UserError."""
    parser = Parser(prog="step.py", description="The training step, ours beside others'. All flags of train_prx.py are "
                    "valid too.")
    add, preset = parser.add_argument, "record" if torch.cuda.is_available() else "demo"
    add("--preset", choices=PRESETS, default=preset, help="the values that the other flags change")
    add("--stage", type=int, default=1, help="stage of the run, from 1")
    add("--batch", type=int, default=32, help="images a step on this rank; a multiple of --micro_batch")
    add("--arms", default="ours,diffusers-routed,diffusers", help=f"comma list of {', '.join(ARMS)}; ours comes first")
    add("--ranks", type=int, default=1, help="ranks of the run that this process is one of")
    add("--rank", type=int, default=0, help="which of them it is")
    add("--gpus_a_node", type=int, default=8, help="ranks that share one copy of the weights")
    add("--parts", action="store_true", help="and each part of our step by itself")
    add("--warmup", type=int, default=20, help="steps before the first round")
    add("--rounds", type=int, default=5, help="rounds in which the arms take turns")
    add("--steps", type=int, default=20, help="steps of a round")
    own, others = parser.parse_known_args(argv)
    cfg, _ = parse_config([f"--preset={own.preset}", *others])
    own.arms = own.arms.split(",")
    if own.arms[0] != "ours" or not set(own.arms) <= set(ARMS):
        raise UserError(f"--arms={','.join(own.arms)}: a comma list of {', '.join(ARMS)}, ours first")
    if own.ranks > 1 and own.arms != ["ours"]:
        raise UserError("--ranks takes --arms=ours: muon-fsdp2 knows no mesh of nodes and GPUs")
    if min(own.batch, own.rounds, own.steps, own.ranks, own.gpus_a_node) < 1 or not 0 <= own.rank < own.ranks:
        raise UserError("--batch, --rounds, --steps, --ranks and --gpus_a_node must be at least 1, and --rank below "
                        "--ranks")
    if own.batch % cfg.micro_batch:
        raise UserError(f"--batch={own.batch} is no multiple of --micro_batch={cfg.micro_batch}")
    if own.ranks > own.gpus_a_node and own.ranks % own.gpus_a_node:
        raise UserError(f"--ranks={own.ranks} is no whole number of nodes of {own.gpus_a_node}: pass --gpus_a_node")
    if not 1 <= own.stage <= len(cfg.stages):
        raise UserError(f"--stage={own.stage}: the run has {len(cfg.stages)}")
    return own, cfg


def main(argv: list[str]) -> None:
    """Compare, time, print."""
    own, cfg = parse_flags(argv)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # as train_prx.py has it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = replace(cfg.stages[own.stage - 1], global_batch=own.batch * own.ranks)
    precision = "bf16" if compute_dtype(cfg, device) == torch.bfloat16 else "fp32"
    cfg = random_frozen(replace(cfg, warmup=1, stages=(stage,), precision=precision))
    with rank_of(own.ranks, own.rank, own.gpus_a_node, device) as mesh:
        bench(own, cfg, stage, mesh, device)
        gc.collect()  # models before the group goes


def bench(own, cfg: Config, stage: Stage, mesh: DeviceMesh, device: torch.device) -> None:
    """What `main` does, within a process group."""
    dtype, per_step = compute_dtype(cfg, device), own.batch // cfg.micro_batch
    peak, bandwidth = measured_peak(device, dtype), measured_bandwidth(device)
    batches = [synthetic_batch(cfg, stage, device, seed) for seed in range(4 * per_step)]
    steps_of = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
    tokens = sum(batch["txt_mask"].sum().item() for batch in batches) / (len(batches) * cfg.micro_batch)
    print(f"{hardware(device)}, torch {torch.__version__}; measured peak {peak / 1e12:.2f} TFLOP/s on {dtype} matrices,"
          f" {bandwidth / 1e9:.0f} GB/s copied")
    print(f"{own.preset}, {stage.image_size}px, {own.batch} images a step in chunks of {cfg.micro_batch}, "
          f"{cfg.precision}, {tokens:.0f} of {cfg.text_tokens} text tokens a caption, rank {own.rank} of {own.ranks}"
          f"{': its slices and its share of Muon, nothing waits for others' if own.ranks > 1 else ''}")
    frozen = load_frozen(cfg, device)
    real = replace(cfg, text_tokens=round(tokens))  # nobody is credited for padding
    counted = count_stage(real, stage)
    dense = sum(count_stage(replace(real, drop=0.0), stage).values()) - sum(counted.values())  # more, an image

    arms, resident = [], {}
    for name in own.arms:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        arm = (Ours(cfg, stage, frozen, mesh, device) if name == "ours" else
               Assembled(name, cfg, stage, frozen, mesh, device, arms[0]))
        if arms:
            print(f"{name}: {compare(arms[0], arm, batches[0])}")
        arm.step(steps_of[0], 0)  # its state
        resident[name] = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
        arms.append(arm)
    shapes = [p.shape for p in arms[0].optimizer.param_groups[0]["params"]]
    newton_schulz = 2 * cfg.ns_steps * newton_schulz_loads(shapes, own.ranks)[own.rank]
    routed = own.batch * sum(counted.values()) + newton_schulz
    flop = {name: routed + own.batch * dense * (name == "diffusers") for name in own.arms}
    times = time_arms(arms, steps_of, own.warmup, own.rounds, own.steps, device)
    report(arms, times, resident, own.batch, flop, peak)
    if own.parts:
        whole = {name: torch.cat([chunk[name] for chunk in steps_of[0]]) for name in batches[0]}
        time_parts(arms[0], whole, counted, newton_schulz, peak, bandwidth, device)


if __name__ == "__main__":
    run_main(main)
