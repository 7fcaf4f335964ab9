"""The step on 8 to 256 GPUs, simulated: the measured step of one GPU, and counted bytes over assumed bandwidths.

    python benchmarks/step.py --arms=ours --ranks=32           measures the step of rank 0 of 32: its batch, slices and Muon
    python benchmarks/step.py --arms=ours --ranks=32 --parts   and, among its parts, the optimizer
    python benchmarks/scale.py --step_ms=MS [--optimizer_ms=MS] [--batch=32] [--stage=1] [--gpus_a_node=8]
                               [--network_gbps=50] [--price=2] [any flag of train_prx.py]

Compute. The stage's global batch stays, so the images of a GPU change, and the measured time less the optimizer's changes in
proportion; small batches are in truth a little slower an image. The optimizer's time is between what it was (all of it
element by element) and that times the largest Newton-Schulz load of a rank over that of the measured number of ranks.

Bytes. Once a step FSDP gathers the weights and scatters the gradients' sums within the node, and the replicas add their
slices up over the network. Muon sends slices to owners and results back within the node, and one all-gather takes them to
the replicas. Counted is what the rank that moves most sends, which is as much as it receives: bytes over bus bandwidth is
then the time, as NCCL's tests define that (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

Range. Worst, at 300 GB/s: one after the other. Best, at 400 GB/s: what can hide takes no longer than the forward and backward
pass that it hides under, if it takes less. What never hides is in both ends: the first gather and the last sums of gradients,
of the first block and what is outside the blocks, and Muon's exchanges. Left out: latencies, stragglers, cores that
collectives take from the matrix products, reading, evaluation, samples, checkpoints. Efficiency is images/s over as many
times the measured GPU's; hours and dollars are the whole stage's.
"""
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plan import META, bytes_of_a_weight, newton_schulz_loads, on_gpus, parameter_groups, plural, size_text  # noqa: E402
from muon import assign_owners  # noqa: E402
from shards import UserError  # noqa: E402
from train_prx import PRESETS, PRX, Config, Parser, Stage, parse_config, run_main  # noqa: E402

WORLDS = (8, 16, 32, 64, 128, 256)
NODE_GBPS = (300, 360, 400)  # GB/s a GPU, bus bandwidth of collectives over NVLink in a node of H200s: assumed


class Moved(NamedTuple):
    """Bytes that a rank sends in a step, and receives as well."""

    weights: float = 0  # all-gather, in the node
    gradients: float = 0  # reduce-scatter, in the node
    owners: float = 0  # Muon's all-to-alls, there and back, in the node
    sums: float = 0  # all-reduce of the gradients' slices, beyond the node
    replicas: float = 0  # Muon's all-gather, beyond the node

    def ms(self, node_gbps: float, network_gbps: float) -> tuple[float, float]:
        """Time in the node and beyond it, at these GB/s."""
        return (self.weights + self.gradients + self.owners) / node_gbps / 1e6, (self.sums + self.replicas) / network_gbps / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# Counted


def fsdp_bytes(cfg: Config, stage: Stage, replicas: int, shards: int, edge: bool = False) -> Moved:
    """What FSDP2 moves, alike on every rank; with `edge` only for the first block and the weights outside of blocks.

    A tensor's rows are padded to a multiple of the shards. REPA's projector has gradients where the stage has REPA.
    """
    with META:
        weights = {name: p for name, p in PRX(cfg).named_parameters()
                   if not edge or name.startswith("blocks.0.") or not name.startswith("blocks.")}
    slices = {name: -(-len(p) // shards) * (p.numel() // len(p)) for name, p in weights.items()}  # elements of one
    all_of_them, repa = sum(slices.values()), stage.repa and cfg.frozen != "none"
    graded = sum(n for name, n in slices.items() if repa or not name.startswith("repa_projector."))
    return Moved(weights=(shards - 1) * bytes_of_a_weight(cfg) * all_of_them, gradients=(shards - 1) * 4 * graded,
                 sums=2 * (replicas - 1) / replicas * 4 * graded)


def muon_bytes(cfg: Config, replicas: int, shards: int) -> list[Moved]:
    """What Muon moves on each rank, its matrices dealt out as `muon.Owners` does: neighbours go to different replicas."""
    shapes, size = [p.shape for p in parameter_groups(cfg)[0]["params"]], bytes_of_a_weight(cfg)
    owners = [(k % replicas, k // replicas) for k in assign_owners(shapes, replicas * shards)]  # (replica, shard) of each

    def part(i: int, shard: int) -> int:
        """Elements of a shard of matrix i: ceil(m / shards) rows each until none are left."""
        m, n = shapes[i]
        rows = -(-m // shards)
        return max(0, min(m - shard * rows, rows)) * n

    moved = []
    for rank in range(replicas * shards):
        replica, shard = divmod(rank, shards)
        others = [part(i, shard) for i, (r, s) in enumerate(owners) if r == replica and s != shard]
        mine = [math.prod(shapes[i]) - part(i, shard) for i, owner in enumerate(owners) if owner == (replica, shard)]
        longest = max(sum(part(i, shard) for i, (r, _) in enumerate(owners) if r == each) for each in range(replicas))
        moved.append(Moved(owners=size * (sum(others) + sum(mine)), replicas=size * (replicas - 1) * longest))
    return moved


def step_bytes(cfg: Config, stage: Stage, replicas: int, shards: int) -> tuple[Moved, Moved]:
    """What can hide, and what never does, of the rank that moves most."""
    whole, edge = fsdp_bytes(cfg, stage, replicas, shards), fsdp_bytes(cfg, stage, replicas, shards, edge=True)
    most = Moved(*map(max, zip(*muon_bytes(cfg, replicas, shards))))
    return Moved(*(a - b for a, b in zip(whole, edge))), Moved(*(a + b for a, b in zip(edge, most)))


# ---------------------------------------------------------------------------------------------------------------------
# Simulated


def step_range(images_ms: float, optimizer_ms: list[float], hideable: Moved, exposed: Moved, node_gbps: float,
               network_gbps: float) -> tuple[float, float]:
    """ms of a step at best and at worst, from the ms of its images and the least and most of its optimizer."""
    never = sum(exposed.ms(node_gbps, network_gbps))
    hidden = hideable.ms(node_gbps, network_gbps)
    return max(images_ms, *hidden) + optimizer_ms[0] + never, images_ms + sum(hidden) + optimizer_ms[1] + never


def divides(cfg: Config, stage: Stage, gpus: int, gpus_a_node: int) -> bool:
    """Whether so many GPUs are whole nodes, or less than one, that run equally many chunks of a step."""
    return stage.global_batch // cfg.micro_batch % gpus == 0 and gpus % min(gpus, gpus_a_node) == 0


def span(low: float, high: float, digits: int = 1, unit: str = "") -> str:
    return f"{low:,.{digits}f} to {high:,.{digits}f}{unit}"


# ---------------------------------------------------------------------------------------------------------------------


def parse_flags(argv: list[str]):
    """The benchmark's own flags and the run that the others describe; raises UserError."""
    parser = Parser(prog="scale.py", description="The step on 8 to 256 GPUs, simulated. All flags of train_prx.py are valid too.")
    parser.add_argument("--preset", choices=PRESETS, default="record", help="the values that the other flags change")
    parser.add_argument("--step_ms", type=float, help="measured time of a step, ms; there is no default")
    parser.add_argument("--optimizer_ms", type=float, default=0.0, help="measured part of it that is the optimizer's, which does "
                        "not change with the images; 0: counted among the images and scaled with them")
    parser.add_argument("--batch", type=int, default=32, help="images of the measured step")
    parser.add_argument("--stage", type=int, default=1, help="stage of the run, from 1")
    parser.add_argument("--gpus_a_node", type=int, default=8, help="GPUs that share one copy of the weights")
    parser.add_argument("--network_gbps", type=float, default=50.0, help="assumed GB/s a GPU between nodes; 50 is 400 Gb/s")
    own, others = parser.parse_known_args(argv)
    cfg, _ = parse_config([f"--preset={own.preset}", *others])
    if not 1 <= own.stage <= len(cfg.stages):
        raise UserError(f"--stage={own.stage}: the run has {len(cfg.stages)}")
    stage = cfg.stages[own.stage - 1]
    if own.batch < 1 or stage.global_batch % own.batch or own.batch % cfg.micro_batch:
        raise UserError(f"--batch={own.batch} is no multiple of --micro_batch={cfg.micro_batch} that divides the stage's "
                        f"{plural(stage.global_batch, 'image')} a step")
    if own.step_ms is None:
        raise UserError("--step_ms is missing, and nothing is simulated without a measured step, which this prints: python "
                        f"benchmarks/step.py --arms=ours --ranks={stage.global_batch // own.batch} --batch={own.batch} "
                        f"--stage={own.stage}")
    if not 0 <= own.optimizer_ms < own.step_ms < math.inf:
        raise UserError(f"--step_ms={own.step_ms:g} must be above --optimizer_ms={own.optimizer_ms:g}, and both at least 0")
    if own.gpus_a_node < 1 or not 0 < own.network_gbps < math.inf:
        raise UserError("--gpus_a_node must be at least 1 and --network_gbps above 0")
    return own, cfg, stage


def main(argv: list[str]) -> None:
    own, cfg, stage = parse_flags(argv)
    measured, rate = stage.global_batch // own.batch, 1e3 * own.batch / own.step_ms
    optimizer = (f"{own.optimizer_ms:g} ms of them the optimizer" if own.optimizer_ms else
                 "the optimizer scaled with the images, for want of --optimizer_ms")
    print(f"measured, as the command line says: {own.step_ms:g} ms for {own.batch} images on one GPU as one of {measured}, "
          f"{optimizer}")
    print(f"assumed: {', '.join(map(str, NODE_GBPS))} GB/s bus bandwidth in nodes of {own.gpus_a_node}, {own.network_gbps:g} "
          f"GB/s a GPU beyond; ${cfg.price:g} a GPU-hour")
    print(f"{own.preset}, stage {own.stage}: {stage.image_size}px, {plural(stage.steps, 'step')} of "
          f"{plural(stage.global_batch, 'image')} in chunks of {cfg.micro_batch}, {on_gpus(cfg).precision}")
    worlds = [n for n in WORLDS if divides(cfg, stage, n, own.gpus_a_node)]
    if len(worlds) < len(WORLDS):
        fits = [n for n in range(1, stage.global_batch // cfg.micro_batch + 1) if divides(cfg, stage, n, own.gpus_a_node)]
        print(f"left out: {', '.join(str(n) for n in WORLDS if n not in worlds)} GPUs, which cannot share "
              f"{plural(stage.global_batch // cfg.micro_batch, 'chunk')} evenly in whole nodes; these numbers can, or a lower "
              f"--micro_batch: {', '.join(map(str, fits))}")

    moved = {n: step_bytes(cfg, stage, n // min(n, own.gpus_a_node), min(n, own.gpus_a_node)) for n in worlds}
    print(f"\ncounted: what a GPU sends in a step, and receives as well\n{'':15}{'within the node':>36}{'beyond it':>24}\n"
          f"{'GPUs':>6}{'images':>9}{'weights':>12}{'gradients':>12}{'Muon':>12}{'gradients':>12}{'Muon':>12}{'never hides':>14}")
    for n, (hideable, exposed) in moved.items():
        columns = "".join(f"{size_text(a + b):>12}" for a, b in zip(hideable, exposed))
        print(f"{n:6}{stage.global_batch // n:9}{columns}{size_text(sum(exposed)):>14}")

    print("\nsimulated, but for the first row: ms a step at each bandwidth within the node; the rest over all of them\n"
          f"{'GPUs':>6}{'images':>8}{''.join(f'{x:12} GB/s' for x in NODE_GBPS)}{'images/s':>18}{'efficiency':>14}"
          f"{'stage hours':>15}{'dollars':>15}")
    print(f"{1:6}{own.batch:8}{own.step_ms:17.1f}  measured{rate:42,.1f}")
    load = {n: max(newton_schulz_loads([p.shape for p in parameter_groups(cfg)[0]["params"]], n)) for n in (*worlds, measured)}
    for n, bytes_of in moved.items():
        images_ms = (own.step_ms - own.optimizer_ms) * stage.global_batch / n / own.batch
        both = sorted((own.optimizer_ms, own.optimizer_ms * load[n] / load[measured]))
        ranges = [step_range(images_ms, both, *bytes_of, x, own.network_gbps) for x in NODE_GBPS]
        best, worst = min(low for low, _ in ranges), max(high for _, high in ranges)
        speeds = [1e3 * stage.global_batch / ms for ms in (worst, best)]
        hours = [stage.steps * ms / 3.6e6 for ms in (best, worst)]
        print(f"{n:6}{stage.global_batch // n:8}{''.join(f'{span(*ms):>17}' for ms in ranges)}{span(*speeds, digits=0):>18}"
              f"{span(*(100 * x / n / rate for x in speeds), digits=0, unit='%'):>14}{span(*hours, digits=2):>15}"
              f"{span(*(x * n * cfg.price for x in hours), digits=0):>15}")


if __name__ == "__main__":
    run_main(main)
