"""The processes of one run: they join, hear of each other's end within seconds, compare their weights, and stop together.

    python ranks.py --standalone --nproc-per-node=8 train_prx.py --preset=record

is torchrun, with its flags, for ranks that save before they stop. SIGTERM and SIGUSR1 are passed on and waited for, where
torchrun kills after 30 seconds; `--max-restarts` starts again after a failure, but not after a stop or a user's mistake;
the exit status is that of the rank that failed first, and its message comes last.
"""
import contextlib
import datetime
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.tensor import DTensor

from shards import UserError

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)  # of a collective while weights are downloaded, blocks compile and readers start
TIMEOUT = datetime.timedelta(seconds=90)  # of a collective once steps are taken
SILENCE = 60.0  # seconds without a sign of life until a rank counts as lost; less than TIMEOUT, whose messages say less
PULSE = 0.5  # seconds between signs of life

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what clusters send before they take a machine away
STOPPED = 128 + signal.SIGTERM  # exit status of a run that has saved because of one of them
MISTAKE = 2  # exit status of a UserError
CONTINUES = "the same command continues from the last checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# Joining


def join(use_cuda: bool) -> tuple[torch.device, DeviceMesh]:
    """This rank's device and the mesh of all ranks, (nodes, GPUs a node) or (GPUs,): torchrun's environment, or one rank alone.

    Raises UserError where nodes have started different numbers of ranks.
    """
    rank, world = rank_from_launcher()
    per_node = from_launcher("LOCAL_WORLD_SIZE", world) if world > 1 else 1
    if world % max(1, per_node):
        raise UserError(f"{world} ranks in all, but {per_node} on this node: every node must start equally many")
    device = torch.device("cuda", from_launcher("LOCAL_RANK", 0) if world > 1 else 0) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    store = open_store("join", serve=rank == 0) if world > 1 else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    if world > per_node:
        return device, init_device_mesh(device.type, (world // per_node, per_node), mesh_dim_names=("replicate", "shard"))
    return device, init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def from_launcher(name: str, default: int) -> int:
    """A number that a launcher puts into the environment; raises UserError where it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text} is no number; without a launcher, `unset {name}`")
    return int(text)


def world_size() -> int:
    """How many ranks the environment promises; 1 without a launcher. Raises UserError where that is no number of ranks."""
    if world := from_launcher("WORLD_SIZE", 1):
        return world
    raise UserError("WORLD_SIZE=0 is no number of ranks; without a launcher, `unset WORLD_SIZE`")


def rank_from_launcher() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a launcher.

    Raises UserError where the environment names ranks that could not find each other.
    """
    world = world_size()
    if world == 1:
        return 0, 1
    bad = [name for name in ("RANK", "MASTER_PORT") if not os.environ.get(name, "").isdecimal()]
    bad += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if bad:
        raise UserError(f"WORLD_SIZE={world} promises other ranks, but {' and '.join(bad)} {'is' if len(bad) == 1 else 'are'} missing or no number: "
                        "start all of them with ./run.sh or torchrun, or train alone after `unset RANK WORLD_SIZE`")
    rank = int(os.environ["RANK"])
    if rank >= world:
        raise UserError(f"RANK={rank} of WORLD_SIZE={world}: ranks are 0 to {world - 1}")
    return rank, world


def open_store(purpose: str, serve: bool = False) -> dist.Store:
    """A connection to the store at torchrun's MASTER_ADDR; without torchrun, one rank has to `serve` it.

    torchrun keeps one store over its restarts, and ranks that found the addresses of their predecessors in it hung.
    """
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve and not agent_serves,
                          wait_for_workers=False, timeout=PATIENCE)
    return dist.PrefixStore(f"{purpose} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def set_timeout(timeout: datetime.timedelta, mesh: DeviceMesh) -> None:
    """How long a collective may take, from here on, in the mesh's groups and the default one."""
    set_group_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # its name until torch 2.14
    for group in (None, *mesh.get_all_groups()):
        set_group_timeout(timeout, group)


def restarted() -> bool:
    """Whether this process runs because an earlier one of the same command failed or was moved."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "RANKS_RESTART_COUNT")
    return any(int(os.environ.get(count, 0)) > 0 for count in counts)


def from_rank_0(make: Callable[[], T]) -> T:
    """What `make()` returns on rank 0, on every rank; a UserError or OSError there is a UserError everywhere."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
        except OSError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def of_all(value: T) -> list[T]:
    """Every rank's value, on every rank. Collective."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(value: object, message: str) -> None:
    """Raise UserError, on every rank, where the ranks' values differ. Collective."""
    values = of_all(value)
    if any(other != values[0] for other in values):
        found = ", ".join(f"{other} on rank {rank}" for rank, other in enumerate(values))
        raise UserError(f"ranks differ ({found}): {message}")


def drifted_ranks(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[int, str]:
    """Ranks whose part of an fp32 tensor has other bits than most of its replicas have -> the first such tensor's name.

    Replicas hold the same bits, since they apply the same reduced gradients; one that does not has a broken GPU or link.
    Where two disagree and no third is there to tell, both are returned. Collective; {} on a mesh without replicas.
    """
    if mesh.ndim == 1:
        return {}
    tensors = {name: t for name, t in tensors.items() if t.dtype == torch.float32}
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    mine = torch.stack([part.view(torch.int32).sum(dtype=torch.int64) for part in parts])  # [K]
    of_rank = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_rank, mine)
    sums = torch.stack(of_rank).cpu()[mesh.mesh]  # [replicas, shards, K]
    alike = (sums[:, None] == sums[None]).sum(dim=1)  # [replicas, shards, K], how many replicas have this one's sum
    names = list(tensors)
    return {int(mesh.mesh[r, s]): names[int(k)] for r, s, k in reversed((2 * alike <= len(sums)).nonzero().tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# Failing as one


def leave(status: int, message: str = "") -> NoReturn:
    """End this process at once. An orderly exit would wait for collectives that the other ranks never join."""
    sys.stdout.flush()
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)


class Watch:
    """Ends this process, with the reason, within seconds after another rank has failed, or a minute after it fell silent.

    Collectives cannot: a rank that waits in one hears nothing until it times out, and NCCL then buries the reason. Two
    threads do it: one talks to the store that torchrun's environment names, over a connection of its own, and may hang
    there when a network is cut; the other only looks at the clock.
    """

    def __init__(self, per_node: int):
        self.rank, self.world, self.per_node = dist.get_rank(), dist.get_world_size(), per_node
        self.first_node = f"the first node, {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']},"
        self.store = open_store("watch")
        self.store.set(f"name {self.rank}", f"rank {self.rank} on {socket.gethostname()}")
        self.over = threading.Event()
        self.stepping = threading.Event()  # before that, a rank may be busy for minutes
        self.heard: dict[str, tuple[bytes, float]] = {}  # a rank's last sign of life, and since when
        self.last_contact = time.monotonic()
        for loop in (self._talk, self._look_at_the_clock):
            threading.Thread(target=loop, daemon=True).start()

    def fail(self, status: int, message: str) -> None:
        """Let every rank end with `message`; only the first call of all ranks counts."""
        failure = json.dumps({"rank": self.rank, "status": status, "message": message})
        try:
            self.store.compare_set("failure", "", failure)
            self.follow()
        except dist.DistError:  # the store has gone with its rank
            leave(status, message)

    def follow(self) -> None:
        """End as the failure in the store says: the rank that failed, and one of each other node, print it."""
        failure = json.loads(self.store.get("failure"))
        self.over.set()
        here = self.rank // self.per_node == failure["rank"] // self.per_node
        if not here and self.rank % self.per_node == 0:
            print(f"error: {self.name(failure['rank'])} failed: {failure['message']}", file=sys.stderr)
        time.sleep(4 * PULSE)  # the store may end with this process: until then every rank has read it
        if failure["rank"] == self.rank:
            leave(failure["status"], failure["message"])
        time.sleep(2 * PULSE)  # a launcher ends all ranks once one has: first goes the one with the message, which is the last
        leave(failure["status"])

    def name(self, rank: int) -> str:
        """"rank 3 on node-b"."""
        return self.store.get(f"name {rank}").decode()

    def _talk(self) -> None:
        beat = 0
        while not self.over.wait(PULSE):
            try:
                self.store.set(f"beat {self.rank}", str(beat := beat + 1))
                if self.store.check(["failure"]):
                    self.follow()
                self._listen()
            except dist.DistError:
                if not self.over.wait(6 * PULSE):  # a rank that ends for a reason of its own comes first
                    leave(1, f"lost contact with {self.first_node} which has ended; {CONTINUES}")
            self.last_contact = time.monotonic()

    def _listen(self) -> None:
        now, others = time.monotonic(), range(1, self.world) if self.rank == 0 else [0]
        beats = [f"beat {rank}" for rank in others]
        if not self.store.check(beats):  # some have only just joined, and to get what is not there would wait
            return
        names = self.store.multi_get([f"name {rank}" for rank in others])
        for name, beat in zip(names, self.store.multi_get(beats)):
            if self.heard.get(name, (b"",))[0] != beat:
                self.heard[name] = beat, now
        patience = self.patience()
        if any(now - since > patience for _, since in self.heard.values()):
            silent = [name.decode() for name, (_, since) in self.heard.items() if now - since > patience / 2]  # others of its node
            self.fail(1, f"lost contact with {', '.join(silent)}: silent for {patience:.0f} s, so the process, the machine or the "
                         f"network is gone; {CONTINUES}")

    def patience(self) -> float:
        return SILENCE if self.stepping.is_set() else 10 * SILENCE

    def _look_at_the_clock(self) -> None:
        while not self.over.wait(PULSE):
            if time.monotonic() - self.last_contact > self.patience():
                leave(1, f"lost contact with {self.first_node} silent for {self.patience():.0f} s; {CONTINUES}")


def lost_contact(error: BaseException) -> bool:
    """Whether an exception only says that another rank has gone."""
    of_gloo = isinstance(error, RuntimeError) and re.search("gloo|Application timeout", str(error))
    return isinstance(error, dist.DistError) or bool(of_gloo)


@contextlib.contextmanager
def together(mesh: DeviceMesh) -> Iterator[Watch | None]:
    """Within this context one rank's exception ends all ranks within seconds, and its message is the last that is printed."""
    watch = Watch(mesh.shape[-1]) if mesh.size() > 1 else None
    try:
        yield watch
    except Exception as error:
        if watch is None:
            raise
        reason = str(error) or type(error).__name__
        if lost_contact(error):
            time.sleep(6 * PULSE)  # for the one that has gone, if it can still say why
            reason = re.sub(r"^\[\S+\] ", "", reason.splitlines()[0]).split(". ")[0]  # gloo's file and line, and its advice
            reason = f"lost contact with another rank ({reason}); {CONTINUES}"
        elif not isinstance(error, UserError):
            traceback.print_exc()
            get_error_handler().record_exception(error)  # for torchrun's own report
            reason = f"{type(error).__name__}: {reason.splitlines()[0]}"
        watch.fail(MISTAKE if isinstance(error, UserError) else 1, reason)
    finally:
        if watch is not None:
            watch.over.set()


# ---------------------------------------------------------------------------------------------------------------------
# Launching


STOPPING: list[int] = []  # signals that the launcher has got


def pass_on(number: int, frame) -> None:
    """Send a signal that this process got to those that it started."""
    STOPPING.append(number)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pid, parent = int(file.parent.name), int(file.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                os.kill(pid, number)


def launch(argv: list[str]) -> NoReturn:
    """torchrun with the given arguments, once more after each failure up to its --max-restarts."""
    from torch.distributed import run as torchrun

    logging.disable(logging.ERROR)  # torchrun's reports of every rank, after the message that counts
    warnings.filterwarnings("ignore", "CUDA initialization: ", UserWarning)  # of a driver that is too old: the ranks say it
    for number in SIGNALS:
        signal.signal(number, pass_on)
    args = torchrun.parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *argv])
    if args.standalone:
        args.local_addr = args.local_addr or "127.0.0.1"  # this machine's own name may not resolve, as in many containers
    restarts, args.max_restarts = args.max_restarts, 0
    while True:
        try:
            torchrun.run(args)
            sys.exit(0)
        except SignalException as error:
            sys.exit(128 + error.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if STOPPING and status != MISTAKE:
            sys.exit(STOPPED)  # also where a signal came before a rank was ready for it
        if failure.exitcode < 0:
            print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        if restarts == 0 or status in (MISTAKE, STOPPED):
            sys.exit(status)
        restarts -= 1
        print(f"starting again; {restarts} restarts left", file=sys.stderr)
        os.environ["RANKS_RESTART_COUNT"] = "1"
        args.master_port += 1  # on several nodes: not the store of the attempt before, which another may still be leaving


if __name__ == "__main__":
    launch(sys.argv[1:])
