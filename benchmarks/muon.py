"""The optimizer's step on the matrices that Muon steps, 112 in the record: ours, torch.optim's and muon-fsdp2's.

    python benchmarks/muon.py [--preset=record] [--width=1792] [--ranks=4] [--rounds=5] [--only=one,ranks,fake]

    one    one device: plain tensors; for muon-fsdp2, which raises NameError on those, DTensors on a mesh of one rank
    ranks  processes that exchange, matrices sharded by rows: NCCL if there is a GPU for each, else gloo on the CPU
    fake   ours as rank 0 of 8, 32 and 256 in nodes of 8, on torch's `fake` process group: nothing is sent, `loop_back`
           copies within memory. muon-fsdp2 refuses a mesh of two dimensions, and torch.optim.Muon's matrix products
           exchange all the time, so that its time without exchanges would say nothing

All arms have the same weights, Gaussian gradients, learning rate, momentum and scale, and 5 Newton-Schulz steps in bf16
with Jordan's coefficients, as the other two always have. Before anything is timed, one step of each, in which
muon-fsdp2 compiles its loop, is compared with torch.optim.Muon's of the whole matrices. Then the arms take turns, a
step each a round; a step is as long as on the slowest rank. On a CPU the width is 256 unless --width says otherwise:
the record's would take minutes a step.
"""
import contextlib
import importlib.util
import json
import logging
import math
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

import muon  # noqa: E402
from muon import Muon, local, newton_schulz_cost  # noqa: E402
from tools.plan import clock, hardware, parameter_groups, plural  # noqa: E402
from train_prx import PRESETS, Parser, UserError, compiles, run_main  # noqa: E402

SETTINGS = ("one", "ranks", "fake")
NODE, WORLDS = 8, (8, 32, 256)  # ranks of a node, and of the fake groups
CPU_WIDTH = 256
SAME = dict(lr=1e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.0)  # all three know them by these names
# From float64, Newton-Schulz in bf16 is 1.2e-2 away in ours and torch's and, with two more roundings a step, 2.8e-2 in
# muon-fsdp2's at width 256; 1.6e-2 and 3.4e-2 at width 64 (measured on a CPU). Two of them differ by at most the sum.
TOLERANCE = 5e-2

Found = dict[str, tuple[float, list[float]]]  # arm -> its largest difference, the seconds of its steps


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def ours(params: list[Tensor], dtype: torch.dtype = torch.bfloat16) -> Muon:
    return Muon([{"params": params, "use_muon": True, "ns_dtype": dtype, **SAME}], compile=params[0].is_cuda)


def torchs(params: list[Tensor]) -> torch.optim.Muon:
    return torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", **SAME)


def muon_fsdp2s(params: list[Tensor]) -> torch.optim.Optimizer:
    import muon_fsdp2

    return muon_fsdp2.Muon([{"params": params, "use_muon": True, "rms_scale": True, **SAME}])


ARMS = {"ours": ours, "ours in fp32": lambda params: ours(params, torch.float32), "torch.optim.Muon": torchs,
        "muon-fsdp2": muon_fsdp2s}


def missing(name: str, device: torch.device) -> str:
    """What an arm lacks here; empty if nothing."""
    if name == "muon-fsdp2" and importlib.util.find_spec("muon_fsdp2") is None:
        return "pip install muon-fsdp2==0.3.0"
    return "a C++ compiler" if name == "muon-fsdp2" and not compiles(PRESETS["record"], device) else ""


def shapes_of(preset: str, width: int) -> list[torch.Size]:
    """The matrices that training gives to Muon; heads have no part in them."""
    return [p.shape for p in parameter_groups(replace(PRESETS[preset], width=width, heads=1))[0]["params"]]


def gaussian(kind: str, i: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Matrix i of the "weights" (std 0.02) or "gradients" (std 1): the same in every arm and on every rank."""
    generator = torch.Generator(device).manual_seed(2 * i + (kind == "gradients"))
    return torch.randn(shape, generator=generator, device=device) * (1.0 if kind == "gradients" else 0.02)


def my_rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """A copy of this rank's rows of a matrix, [m, n] -> [m / shards, n], over the mesh's last dimension as in FSDP2."""
    return whole.chunk(mesh.shape[-1])[mesh.get_local_rank(mesh.ndim - 1)].clone()


class Arm:
    """An optimizer and the weights that it steps: plain tensors, or DTensors as FSDP2 leaves them."""

    def __init__(self, make: Callable, shapes: list[torch.Size], mesh: DeviceMesh, plain: bool):
        self.mesh, self.plain, self.device = mesh, plain, torch.device(mesh.device_type)
        self.params = [nn.Parameter(self.place(my_rows(gaussian("weights", i, shape, self.device), mesh)))
                       for i, shape in enumerate(shapes)]
        self.optimizer = make(self.params)

    def place(self, rows: Tensor) -> Tensor:
        placements = (Replicate(),) * (self.mesh.ndim - 1) + (Shard(0),)
        return rows if self.plain else DTensor.from_local(rows, self.mesh, placements, run_check=False)

    def step(self, grads: list[Tensor]) -> float:
        """Seconds of one step with this rank's rows of the gradients, until it has ended on all ranks."""
        for p, rows in zip(self.params, grads):
            p.grad = self.place(rows.clone())  # muon-fsdp2 overwrites it
        dist.barrier()
        seconds = torch.tensor(clock(self.optimizer.step, self.device), device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.optimizer.zero_grad()
        return seconds.item()


# ---------------------------------------------------------------------------------------------------------------------
# One device, and ranks that exchange


def measure(names: list[str], shapes: list[torch.Size], device: torch.device, rounds: int) -> Found:
    """These arms, compared and then timed: not at all if one computes something else. One rank has plain tensors."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    arms = {name: Arm(ARMS[name], shapes, mesh, plain=mesh.size() == 1 and name != "muon-fsdp2") for name in names}
    grads = [my_rows(gaussian("gradients", i, shape, device), mesh) for i, shape in enumerate(shapes)]
    for arm in arms.values():
        arm.step(grads)
    weights, sums = [local(arm.params) for arm in arms.values()], []
    for i, shape in enumerate(shapes):
        start = gaussian("weights", i, shape, device)
        whole = nn.Parameter(start.clone())
        whole.grad = gaussian("gradients", i, shape, device)
        torchs([whole]).step()
        update, start = my_rows(whole.detach() - start, mesh), my_rows(start, mesh)
        updates = [of_arm[i].detach() - start for of_arm in weights]
        sums.append(torch.stack([x.square().sum() for x in (update, *(each - update for each in updates))]))
    total = torch.stack(sums)  # [matrices, 1 + arms], squared
    dist.all_reduce(total)
    differences = dict(zip(arms, (total[:, 1:] / total[:, :1]).sqrt().amax(0).tolist()))
    seconds = {name: [] for name in arms}
    for _ in range(rounds if all(x <= TOLERANCE for x in differences.values()) else 0):
        for name, arm in arms.items():
            seconds[name].append(arm.step(grads))
    return {name: (differences[name], seconds[name]) for name in arms}


def threads_of(ranks: int) -> int:
    """Threads of each rank's process."""
    return max(1, os.cpu_count() // ranks)


def worker(rank: int, ranks: int, folder: str, names: list[str], shapes: list[torch.Size], device: torch.device,
           rounds: int) -> None:
    """Be one rank of those that meet in the folder; the first one leaves there what it measured."""
    logging.getLogger("torch").setLevel(logging.ERROR)  # muon-fsdp2's compiler warns of a machine without CUDA
    torch.set_num_threads(threads_of(ranks))
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=ranks,
                            store=dist.FileStore(f"{folder}/store", ranks))
    found = measure(names, shapes, device, rounds)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def spread(seconds: list[float]) -> str:
    """Two columns: median and range in ms."""
    return f"{1e3 * statistics.median(seconds):10.1f}{f'{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}':>21}"


def compare(ranks: int, shapes: list[torch.Size], device: torch.device, rounds: int) -> None:
    """The table of one setting; raises UserError if an arm computes something else."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ranks, folder, [name for name in ARMS if not missing(name, device)], shapes, device, rounds
        if ranks == 1:
            worker(0, *arguments)
        else:
            torch.multiprocessing.start_processes(worker, arguments, nprocs=ranks, start_method="forkserver")
        found: Found = json.loads(Path(folder, "found.json").read_text())
    for name, (difference, seconds) in found.items():
        if not difference <= TOLERANCE:
            raise UserError(f"the first update of {name} is {difference:.2g} of its norm from torch.optim.Muon's of "
                            f"whole matrices; bf16 explains {TOLERANCE:g}")
    print(f"  {'arm':18}{'median ms':>10}{'min to max':>21}{'/ ours':>9}{'difference':>12}")
    for name in ARMS:
        if missing(name, device):
            print(f"  {name:18}not measured: {missing(name, device)}")
        else:
            difference, seconds = found[name]
            ratio = statistics.median(seconds) / statistics.median(found["ours"][1])
            print(f"  {name:18}{spread(seconds)}{ratio:8.2f}x{difference:12.1e}")


# ---------------------------------------------------------------------------------------------------------------------
# One rank of many


class Done:
    """A collective that has ended."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def loop_back() -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Within this context collectives copy this rank's input to its output, as often as it fits; nothing becomes zeros.

    For the `fake` process group, which in torch 2.11 leaves an all-to-all's output as it was allocated. Yields the
    bytes [sent, received] that this rank would exchange with others, by the ranks of the group.
    """
    traffic = defaultdict(lambda: [0, 0])

    def loop(output: Tensor, source: Tensor, sent: int, received: int, group, async_op: bool) -> Done | None:
        total = traffic[tuple(dist.get_process_group_ranks(group))]
        total[0] += sent
        total[1] += received
        source = source.reshape(-1) if source.numel() else torch.zeros_like(output).view(-1)
        for piece in output.view(-1).split(max(1, len(source))):
            piece.copy_(source[: len(piece)])
        return Done() if async_op else None

    def mine(x: Tensor, sizes: list[int] | None, group) -> Tensor:
        return x.split(sizes or len(x) // dist.get_world_size(group))[dist.get_rank(group)]

    def all_to_all(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        return loop(output, input, input.nbytes - mine(input, input_split_sizes, group).nbytes,
                    output.nbytes - mine(output, output_split_sizes, group).nbytes, group, async_op)

    def all_gather(output_tensor, input_tensor, group=None, async_op=False):
        others = output_tensor.nbytes - input_tensor.nbytes
        return loop(output_tensor, input_tensor, others, others, group, async_op)

    def reduce_scatter(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
        others = input.nbytes - output.nbytes
        return loop(output, mine(input, None, group), others, others, group, async_op)

    loops = {"all_to_all_single": all_to_all, "all_gather_into_tensor": all_gather, "all_gather_single": all_gather,
             "reduce_scatter_tensor": reduce_scatter, "reduce_scatter_single": reduce_scatter}  # two from torch 2.14 on
    with mock.patch.multiple(dist, **{name: loop for name, loop in loops.items() if hasattr(dist, name)}):
        yield traffic


def measure_fake(world: int, shapes: list[torch.Size], device: torch.device, rounds: int) -> str:
    """The table's row of rank 0 of `world`. A process can do this once a world: torch caches meshes of equal shape."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh(device.type, (world // NODE, NODE), mesh_dim_names=("replicate", "shard"))
    arm, owned, honest = Arm(ours, shapes, mesh, plain=False), [], muon.newton_schulz
    grads = [my_rows(gaussian("gradients", i, shape, device), mesh) for i, shape in enumerate(shapes)]

    def noting(G: Tensor, steps: int) -> Tensor:
        owned.extend([G.shape[-2:]] * math.prod(G.shape[:-2]))
        return honest(G, steps)

    with mock.patch.object(muon, "newton_schulz", noting), loop_back() as traffic:
        arm.step(grads)
    moved = [traffic[tuple(dist.get_process_group_ranks(mesh.get_group(name)))] for name in ("shard", "replicate")]
    peak = "not measured"
    with loop_back():
        seconds = [arm.step(grads) for _ in range(rounds)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            arm.step(grads)
            peak = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f}"
    dist.destroy_process_group()
    columns = "".join(f"{sent / 1e6:10,.1f} /{received / 1e6:8,.1f}" for sent, received in moved)
    return (f"  {f'0 of {world}':11}{spread(seconds)}{len(owned):10}{tflop(owned):10.4f}"
            f"{tflop(owned) * world / tflop(shapes):8.2f}{columns}{peak:>14}")


def tflop(shapes: list[torch.Size]) -> float:
    """TFLOP of Newton-Schulz on matrices of these shapes."""
    return 2e-12 * SAME["ns_steps"] * sum(map(newton_schulz_cost, shapes))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    parser = Parser(prog="benchmarks/muon.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="record", help="whose matrices")
    parser.add_argument("--width", type=int, help=f"of the model, instead of the preset's, or of {CPU_WIDTH} on a CPU")
    parser.add_argument("--ranks", type=int, default=4, help="processes that exchange")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each arm")
    parser.add_argument("--only", default=",".join(SETTINGS), help="what to measure, comma separated")
    args = parser.parse_args(argv)
    settings = args.only.split(",")
    if not set(settings) <= set(SETTINGS):
        parser.error(f"--only={args.only} is not of {','.join(SETTINGS)}")
    if args.rounds < 1 or args.ranks < 2 or (args.width or 1) < 1:
        parser.error("--width and --rounds start at 1, --ranks at 2")
    gpus = torch.cuda.device_count()
    one, many = (torch.device("cuda" if gpus >= wanted else "cpu") for wanted in (1, args.ranks))
    print(f"{hardware(one)}, {plural(os.cpu_count(), 'core')}, torch {torch.__version__}; preset {args.preset}, "
          f"{plural(args.rounds, 'round')}. Times are measured; matrices, TFLOP and MB are counted.")

    def begin(title: str, device: torch.device, threads: int) -> list[torch.Size]:
        width = args.width or (PRESETS[args.preset].width if device.type == "cuda" else CPU_WIDTH)
        shapes, divisor = shapes_of(args.preset, width), math.lcm(NODE, args.ranks)
        if any(rows % divisor for rows, _ in shapes):  # muon-fsdp2's scatter takes equal shards only
            parser.error(f"at --width={width} not all matrices have a multiple of {divisor} rows")
        print(f"\n{title}: {len(shapes)} matrices at width {width}, Newton-Schulz of {tflop(shapes):.3g} TFLOP, "
              f"{plural(threads, 'thread') if device.type == 'cpu' else 'a GPU'} a rank", flush=True)
        return shapes

    if "one" in settings:
        compare(1, begin("one device", one, threads_of(1)), one, args.rounds)
    if "ranks" in settings:
        title = f"{args.ranks} ranks, {'NCCL' if many.type == 'cuda' else 'gloo'}"
        compare(args.ranks, begin(title, many, threads_of(args.ranks)), many, args.rounds)
    if "fake" in settings:
        shapes = begin("one rank alone, ours, nothing is sent", one, threads_of(1))
        torch.set_num_threads(threads_of(1))
        print(f"  {'rank':11}{'median ms':>10}{'min to max':>21}{'matrices':>10}{'TFLOP':>10}{'/ mean':>8}"
              f"{'node, MB out / in':>20}{'beyond, MB out / in':>20}{'MB peak':>14}")
        for world in WORLDS:
            print(measure_fake(world, shapes, one, args.rounds))


if __name__ == "__main__":
    run_main(main)
