"""A run on many ranks and nodes: every mesh trains the same model, rows keep their order, and whatever a cluster does
to a run, it continues or says why not. Nodes are groups of processes here, in the last test network namespaces.

    pytest tests/test_ranks.py
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ENV, PATH, ROOT, checkpoint_tensors, curve, different, last_checkpoint, last_logged, patched, patience, run, start,
    train, wait_for)
from kills import kill_and_compare

from train_prx import PRX, Chunks, UserError, parse_config, prepare

pytestmark = pytest.mark.machinery
slow = pytest.mark.slow

FP32 = ["--precision=fp32", "--ema_every=3"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            "--nproc-per-node=2"]


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that still run, the oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            found += [int(stat.parent.name)] if int(parent) == pid and state != "Z" else []
    return sorted(found)


def ranks_under(pid: int) -> list[int]:
    """The processes under `pid` that train, and not what started them or what they read with."""
    below = children(pid)
    launcher = b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return below if launcher else [rank for child in below for rank in ranks_under(child)]


def end(pid: int) -> None:
    """Kill a process and all that it started."""
    for child in children(pid):
        end(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


LAUNCHED: list[subprocess.Popen] = []


def launch(cwd: Path, *command: str, **env: str) -> subprocess.Popen:
    """Start a command, its output in the files out and err."""
    with (cwd / "out").open("a") as out, (cwd / "err").open("a") as err:
        LAUNCHED.append(subprocess.Popen(command, cwd=cwd, env=os.environ | ENV | env, stdout=out, stderr=err))
    return LAUNCHED[-1]


@pytest.fixture(autouse=True)
def no_rank_left_running():
    """Launchers that a failed test did not wait for are ended, with all that they started."""
    yield
    while LAUNCHED:
        process = LAUNCHED.pop()
        end(process.pid) if process.poll() is None else None


def saved_step(folder: Path) -> int:
    return int(last_checkpoint(folder).name.removeprefix("step_")) if any(folder.glob("checkpoints/step_*")) else 0


def assert_same_curve(one: Path, other: Path) -> float:
    """The same steps, and at each the same loss to 1e-5, which is returned, and gradient norm, to 1e-4 of itself."""
    a, b = curve(one), curve(other)
    assert a.keys() == b.keys() == set(range(1, max(a) + 1))
    assert curve(other, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-4)
    apart = max(abs(a[step] - b[step]) for step in a)
    assert apart < 1e-5
    return apart


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tiny) -> Path:
    """20 steps of 4 chunks in fp32 by `python train_prx.py`, without the help of conftest.py."""
    cwd = tmp_path_factory.mktemp("one_rank")
    subprocess.run([sys.executable, ROOT / "train_prx.py", *tiny, *FP32], cwd=cwd, env=os.environ | ENV, check=True,
                   capture_output=True)
    return cwd / "runs/demo"


@pytest.mark.parametrize("ranks, nodes, at_once", [
    (1, 1, 4), (2, 1, 1), pytest.param(1, 1, 3, marks=slow), pytest.param(2, 1, 2, marks=slow),
    pytest.param(2, 2, 1, marks=slow), pytest.param(4, 2, 1, marks=slow)])
def test_any_mesh_and_chunks_at_once_train_the_same_model(tmp_path, tiny, one_rank, ranks, nodes, at_once):
    folder = train(tmp_path, *tiny, *FP32, f"--chunks_at_once={at_once}", ranks=ranks, nodes=nodes)
    apart = assert_same_curve(one_rank, folder)
    expected, found = (checkpoint_tensors(last_checkpoint(x)) for x in (one_rank, folder))
    names = [name for name in expected if expected[name].is_floating_point() and expected[name].norm() > 0]
    assert expected.keys() == found.keys() and sum(name.startswith("model.") for name in names) > 30
    worst = max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in names)
    print(f"{nodes}x{ranks // nodes}, {at_once} at once: losses {apart:.1e} apart, tensors {worst:.1e} relative")
    assert worst < 3e-5  # measured 5.1e-6, and losses 2.4e-7 apart


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
def test_initial_weights_are_the_same_bits_on_any_number_of_ranks(tmp_path, tiny, ranks):
    # at learning rate 0 the first checkpoint holds them; 3 does not divide the rows of any matrix
    flags = [*tiny, *FP32, "--stages=32:1:24:1", "--lr=0", "--adam_lr=0", "--seed=5"]
    saved = checkpoint_tensors(last_checkpoint(train(tmp_path, *flags, ranks=ranks)))
    expected = PRX(parse_config(flags)[0]).state_dict()
    for group in ("model.", "ema."):
        assert different({k.removeprefix(group): v for k, v in saved.items() if k.startswith(group)}, expected) == []
    assert expected["blocks.0.img_qkv_proj.weight"].std() > 0.05


def test_ranks_that_cannot_share_the_chunks_are_refused_and_told_what_can(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="these can: 1, 2$"):
        prepare([*tiny, "--stages=32:20:16:1,64:20:24:0"])  # 4 and 6 chunks


KEYS = """
honest = module.load_chunks

def load_chunks(*arguments):
    for chunk in honest(*arguments):
        with open("keys-" + os.environ.get("RANK", "0"), "a") as file:
            file.write(json.dumps(chunk["keys"]) + "\\n")
        yield chunk

module.load_chunks = load_chunks
"""


def read_in_order(cwd: Path, ranks: int, steps: int) -> list[list[str]]:
    """The keys of every chunk in the order of (step, rank, place), from what each rank wrote down."""
    read = [[json.loads(line) for line in (cwd / f"keys-{rank}").read_text().splitlines()] for rank in range(ranks)]
    mine = 24 // ranks
    return [chunk for s in range(steps) for chunks in read for chunk in chunks[s * mine : (s + 1) * mine]]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny) -> tuple[list[str], Path, Path]:
    """Flags of 8 steps of 24 chunks, that run on one rank, and its first half on two nodes of two ranks."""
    flags = [*tiny, *FP32, "--stages=32:8:48:1", "--micro_batch=2"]
    whole, half = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    assert run(whole, patched(whole, KEYS), *flags).status == 0
    assert run(half, patched(half, KEYS), *flags, "--max_steps=4", ranks=4, nodes=2).status == 0
    return flags, whole, half


@slow
@pytest.mark.parametrize("ranks, nodes", [(1, 1), (2, 1), (3, 3), (8, 2)])
def test_a_run_of_two_nodes_continues_on_another_mesh_and_rows_keep_their_order(tmp_path, begun, ranks, nodes):
    flags, whole, half = begun
    cfg, _ = parse_config(flags)
    stream = Chunks(cfg, cfg.stages[0], 0)
    expected = [stream[i]["keys"] for i in range(8 * 24)]
    assert read_in_order(whole, 1, 8) == expected and read_in_order(half, 4, 4) == expected[: 4 * 24]
    shutil.copytree(half / "runs", tmp_path / "runs")
    result = run(tmp_path, patched(tmp_path, KEYS), *flags, ranks=ranks, nodes=nodes)
    assert result.status == 0 and "\ncontinuing from runs/demo/checkpoints/step_000004" in result.stdout, result
    assert read_in_order(tmp_path, ranks, 4) == expected[4 * 24 :], "the data goes on where it was"
    assert_same_curve(whole / "runs/demo", tmp_path / "runs/demo")


SABOTAGE = """
honest = module.train_step

def train_step(*args):
    if args[-1] == {step} and os.environ["RANK"] == "1":
        {action}
    return honest(*args)

module.train_step = train_step
module.TIMEOUT = module.datetime.timedelta(seconds={timeout})
"""


@slow
def test_a_rank_that_fails_ends_all_and_its_own_traceback_is_shown(tmp_path, tiny):
    script = patched(tmp_path, SABOTAGE.format(step=3, action="raise RuntimeError('a bug in a loss')", timeout=60))
    launcher = launch(tmp_path, *TORCHRUN, str(script), *tiny)
    assert launcher.wait(patience()) == 1
    errors = (tmp_path / "err").read_text()
    assert "RuntimeError: a bug in a loss" in errors and "in train_step" in errors, errors
    assert "Root Cause" in errors and "rank      : 1" in errors, "torchrun names who failed first"
    assert "lost" not in errors


@slow
def test_a_rank_that_falls_silent_ends_the_others_within_the_groups_timeout(tmp_path, tiny):
    # which is 5 minutes, and 5 s here
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    script = patched(tmp_path, SABOTAGE.format(step=3, action=stop, timeout=5))
    launcher = launch(tmp_path, *TORCHRUN, str(script), *tiny)
    wait_for(lambda: last_logged(tmp_path / "runs/demo") == 3)
    began, ranks = time.monotonic(), ranks_under(launcher.pid)
    wait_for(lambda: ranks[0] not in children(launcher.pid))
    assert time.monotonic() - began < 5 + patience(5)
    os.kill(ranks[1], signal.SIGKILL)  # which torchrun does after half a minute
    assert launcher.wait(patience()) == 1
    assert "RuntimeError" in (tmp_path / "err").read_text()


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_sh_starts_again_after_a_failure_and_stops_politely(checkout, tiny, number):
    # the script gets the signal, as from a cluster or from `kill`; ranks save, and torchrun does not start them again
    flags, folder = [*tiny, "--save_every=6", "--stages=32:2000:16:1"], checkout / "runs/demo"
    script = launch(checkout, "./run.sh", *flags, RESTARTS="1", NPROC_PER_NODE="2", PATH=PATH)
    wait_for(lambda: saved_step(folder) >= 6)
    os.kill(ranks_under(script.pid)[1], signal.SIGKILL)
    wait_for(lambda: re.search(r"^continuing from \S+$", (folder / "log.txt").read_text(), re.MULTILINE))
    step = last_logged(folder)
    wait_for(lambda: last_logged(folder) > step)
    script.send_signal(number)
    assert script.wait(patience()) == 128 + signal.SIGTERM
    assert f"stopped by a signal at step {saved_step(folder)} of 2000" in (folder / "log.txt").read_text()
    assert list(curve(folder)) == list(range(1, saved_step(folder) + 1))


@slow
def test_a_users_mistake_is_one_line_for_all_ranks(checkout, tiny):
    script = launch(checkout, "./run.sh", *tiny, "--widht=64", NPROC_PER_NODE="2", PATH=PATH)
    assert script.wait(patience()) == 2
    errors = (checkout / "err").read_text().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and "--width" in errors[0], errors


def test_readers_outlive_a_clusters_signals_and_not_their_rank(tmp_path, tiny):
    process = start(tmp_path, "train_prx.py", *tiny, "--workers=2", "--stages=32:900:16:1")
    folder, trainer = tmp_path / "runs/demo", process.processes[0].pid
    process.wait_for_step(folder, 2)
    readers = children(trainer)
    assert len(readers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for reader in readers:
            os.kill(reader, number)
    process.wait_for_step(folder, 30)
    assert children(trainer) == readers
    process.kill(signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{reader}").exists() for reader in readers), 15)


@slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, tiny):
    # tests/kills.py does it a hundred times over the demo
    seen = kill_and_compare(tmp_path, 20, [*tiny, "--stages=32:100:16:1", "--save_every=4", "--ema_every=3"])
    assert seen["kills"] == 20 and seen["different"] == [], seen


@pytest.fixture
def two_nodes():
    """Two network namespaces, at 10.77.0.1 and 10.77.0.2, with one cable between them: their names."""
    names = [f"node-{k}-{os.getpid()}" for k in (0, 1)]
    script = f"ip netns add {names[0]} && ip netns add {names[1]}\n"
    script += f"ip link add eth netns {names[0]} type veth peer name eth netns {names[1]}\n"
    for k, name in enumerate(names):
        script += f"ip -n {name} addr add 10.77.0.{k + 1}/24 dev eth\n"
        script += f"ip -n {name} link set lo up; ip -n {name} link set eth up\n"
    made = subprocess.run(["bash", "-ec", script], capture_output=True, text=True)
    yield names if made.returncode == 0 else pytest.skip(f"network namespaces are not to be had: {made.stderr}")
    subprocess.run(["bash", "-c", f"ip netns del {names[0]}; ip netns del {names[1]}"], capture_output=True)


@slow
def test_two_nodes_train_stop_when_cut_apart_and_continue(checkout, tiny, one_rank, two_nodes):
    # the group's timeout of 5 minutes is 10 s here
    folder, source = checkout / "runs/demo", (checkout / "train_prx.py").read_text()
    assert source.count("timedelta(minutes=5)") == 1
    (checkout / "train_prx.py").write_text(source.replace("timedelta(minutes=5)", "timedelta(seconds=10)"))

    def command() -> list[subprocess.Popen]:
        """The README's line on each node."""
        return [launch(checkout, "ip", "netns", "exec", name, "./run.sh", *tiny, *FP32, "--save_every=3", PATH=PATH,
                       NNODES="2", NODE_RANK=str(k), MASTER_ADDR="10.77.0.1", NPROC_PER_NODE="2",
                       GLOO_SOCKET_IFNAME="eth") for k, name in enumerate(two_nodes)]

    nodes = command()
    wait_for(lambda: saved_step(folder) >= 3)
    subprocess.run(["ip", "-n", two_nodes[1], "link", "set", "eth", "down"], check=True)
    # every rank ends; the second node's torchrun waits for the first one's store, for minutes
    wait_for(lambda: all(f"[rank{k}]: RuntimeError" in (checkout / "err").read_text() for k in range(4)))
    assert nodes[0].wait(patience()) == 1
    end(nodes[1].pid)
    nodes[1].wait()
    assert last_logged(folder) < 20, "the run was over before the cut"
    subprocess.run(["ip", "-n", two_nodes[1], "link", "set", "eth", "up"], check=True)
    assert [node.wait(patience()) for node in command()] == [0, 0]
    log = (folder / "log.txt").read_text()
    assert re.search(r"^continuing from \S+$", log, re.MULTILINE) and "\n4 x " in log
    assert_same_curve(one_rank, folder)
