"""A run on many ranks and nodes: every mesh trains the same model; whatever a cluster does to a run, it continues or says
why not; replicas that drift apart are found.

    pytest tests/test_cluster.py

Nodes are groups of processes on this machine, but for the last test, whose two are network namespaces.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, KEYS, PATH, ROOT, checkpoint_tensors, curve, last_checkpoint, metrics, our_lines, patience, run, start, train
from kills import kill_and_compare
from test_run import FINISH, FP32, SAVING, assert_same_curve, assert_same_end, unbroken  # noqa: F401

pytestmark = pytest.mark.machinery

MESHES = {"1x1": (1, 1), "1x2": (2, 1), "2x1": (2, 2), "2x2": (4, 2)}  # nodes x processes a node -> (ranks, nodes)


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


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
    ending = [process.pid for process in LAUNCHED if process.poll() is None]
    while ending:
        pid = ending.pop()
        ending += children(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    LAUNCHED.clear()


def wait_for(condition, seconds: float | None = None):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + (seconds or patience())
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


def find_child(pid: int, script: str) -> int:
    """The youngest process under `pid` that runs the given script: of ranks, the last."""
    return max(child for child in children(pid) if script.encode() in Path(f"/proc/{child}/cmdline").read_bytes())


def shorten_silence(checkout: Path, seconds: int) -> None:
    """Let a rank count as lost after less than a minute."""
    source = (checkout / "ranks.py").read_text()
    assert source.count("\nSILENCE = 60.0") == 1
    (checkout / "ranks.py").write_text(source.replace("\nSILENCE = 60.0", f"\nSILENCE = {seconds}.0"))


# ---------------------------------------------------------------------------------------------------------------------
# Every mesh is the same run


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory, data) -> dict[str, Path]:
    """30 steps in fp32 of the demo's model at half its depth, in four chunks a step, on each mesh."""
    runs = {}
    for mesh, (ranks, nodes) in MESHES.items():
        flags = ["--preset=demo", f"--data={data}", "--stages=32:1200:8:1", "--micro_batch=2", "--max_steps=30", "--compile=0", "--depth=3", "--route_end=2",
                 "--log_every=1", "--sample_steps=2", *FP32]
        runs[mesh] = train(tmp_path_factory.mktemp(mesh), *flags, ranks=ranks, nodes=nodes)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "1x1"])
def test_thirty_steps_of_the_demo_agree_on_every_mesh(demo_runs, mesh):
    one, other = curve(demo_runs["1x1"]), curve(demo_runs[mesh])
    assert one.keys() == other.keys() == set(range(1, 31))
    apart = max(abs(one[step] - other[step]) for step in one)
    print(f"{mesh}: losses {apart:.1e} apart", end="")
    assert apart < 1e-5
    expected, found = (checkpoint_tensors(last_checkpoint(demo_runs[m])) for m in ("1x1", mesh))
    assert expected.keys() == found.keys()
    floats = [name for name in expected if expected[name].is_floating_point() and expected[name].norm() > 0]
    assert sum(name.startswith("model.") for name in floats) > 40
    worst = max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in floats)
    print(f", tensors {worst:.1e} relative")
    assert worst < 3e-5  # measured 7e-6 on one processor, 1.04e-5 on another


def chunks_in_order(cwd: Path, ranks: int, steps: range, per_step: int) -> list[list[str]]:
    """The keys of every chunk of the given steps, in the order of (step, chunk), from what each rank wrote down."""
    read = [[json.loads(line) for line in (cwd / f"keys-{rank}").read_text().splitlines()] for rank in range(ranks)]
    mine = per_step // ranks
    return [read[chunk // mine][(step - steps.start) * mine + chunk % mine] for step in steps for chunk in range(per_step)]


@pytest.fixture(scope="module")
def twelve(tiny) -> list[str]:
    """A run of 12 chunks a step, saved at step 10 of 20."""
    return [*tiny, *FP32, "--stages=32:20:24:1", "--micro_batch=2"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, twelve) -> Path:
    """That run on one rank, with what it read."""
    cwd = tmp_path_factory.mktemp("one_rank")
    (cwd / "keys.py").write_text(KEYS.format(root=str(ROOT)))
    assert run(cwd, cwd / "keys.py", *twelve).status == 0
    return cwd


@pytest.fixture(scope="module")
def saved_by_two_nodes(tmp_path_factory, twelve) -> Path:
    """Its first ten steps on two nodes of two ranks."""
    cwd = tmp_path_factory.mktemp("two_nodes")
    (cwd / "keys.py").write_text(KEYS.format(root=str(ROOT)))
    assert run(cwd, cwd / "keys.py", *twelve, "--max_steps=10", ranks=4, nodes=2).status == 0
    return cwd


@pytest.mark.slow
@pytest.mark.parametrize("ranks, nodes", [(1, 1), (4, 4), (3, 1)])
def test_a_checkpoint_of_two_nodes_continues_on_another_mesh(tmp_path, twelve, one_rank, saved_by_two_nodes, ranks, nodes):
    whole = chunks_in_order(one_rank, 1, range(20), 12)
    assert chunks_in_order(saved_by_two_nodes, 4, range(10), 12) == whole[:120]
    shutil.copytree(saved_by_two_nodes / "runs", tmp_path / "runs")
    (tmp_path / "keys.py").write_text(KEYS.format(root=str(ROOT)))
    result = run(tmp_path, tmp_path / "keys.py", *twelve, ranks=ranks, nodes=nodes)
    assert result.status == 0 and "\ncontinuing from step 10\n" in result.stdout
    assert_same_curve(one_rank / "runs/demo", tmp_path / "runs/demo")
    assert chunks_in_order(tmp_path, ranks, range(10, 20), 12) == whole[120:], "the data goes on where it was"


@pytest.mark.slow
def test_norms_of_a_few_layers_are_those_of_the_checkpoints(tmp_path, tiny):
    flags = [*tiny, *FP32, "--save_every=1", "--keep=9", "--max_steps=3", "--grad_clip=1e6"]
    (tmp_path / "one").mkdir()
    (tmp_path / "four").mkdir()
    folder, four = train(tmp_path / "one", *flags), train(tmp_path / "four", *flags, ranks=4, nodes=2)
    before, after = (checkpoint_tensors(folder / f"checkpoints/step_{step:06d}") for step in (2, 3))
    line = metrics(folder)[2]
    for block in (0, 1, 2):
        names = [name for name in after if name.startswith(f"model.blocks.{block}.")]
        assert len(names) == 11
        norm = sum(after[name].double().square().sum() for name in names).sqrt().item()
        update = sum((after[name].double() - before[name]).square().sum() for name in names).sqrt().item()
        assert line[f"weight_norm/blocks.{block}"] == pytest.approx(norm, rel=1e-5)
        assert line[f"update_norm/blocks.{block}"] == pytest.approx(update, rel=1e-5)
    blocks = sum(line[f"grad_norm/blocks.{block}"] ** 2 for block in (0, 1, 2)) ** 0.5
    assert 0 < blocks < line["grad_norm"], "there are gradients outside the blocks as well"
    for one, other in zip(metrics(folder), metrics(four)):
        assert {k: v for k, v in other.items() if "norm" in k} == pytest.approx({k: v for k, v in one.items() if "norm" in k}, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that fail or drift


SABOTAGE = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train_prx
honest = train_prx.{function}

def sabotaged(*args):
    if {condition} and int(os.environ["RANK"]) in {ranks}:
        {action}
    return honest(*args)

train_prx.{function} = sabotaged
train_prx.run_main(train_prx.main)
"""
FLIP = "train_prx.local([args[0].blocks[1].down_proj.weight])[0].data[0, 0].mul_(1 + 2**-23)"  # the last bit of one number


def sabotage(cwd: Path, step: int, ranks: list[int], action: str, function: str = "train_step", condition: str = "") -> Path:
    """A script that trains, and does `action` on some ranks before a step, or whenever `function` is called."""
    condition = condition or f"args[-2] == {step}"
    (cwd / "sabotage.py").write_text(SABOTAGE.format(root=str(ROOT), condition=condition, ranks=ranks, action=action, function=function))
    return cwd / "sabotage.py"


@pytest.mark.slow
@pytest.mark.parametrize("action, status, message", [
    ("raise RuntimeError('a bug in a loss')", 1, "RuntimeError: a bug in a loss"),
    ("raise train_prx.UserError('three rows do not decode')", 2, "three rows do not decode"),
])
def test_one_ranks_failure_ends_all_and_its_message_comes_last(tmp_path, tiny, action, status, message):
    script = sabotage(tmp_path, 3, [2], action)
    began = time.monotonic()
    process = start(tmp_path, script, *tiny, ranks=4, nodes=2)
    result = process.wait()
    assert time.monotonic() - began < patience(20)
    assert [p.exitcode for p in process.processes] == [status] * 4
    lines = result.ours()
    assert lines[-1] == f"error: {message}", result.stderr
    on_the_other_node = f"error: rank 2 on {socket.gethostname()} failed: {message}"
    assert lines.count(on_the_other_node) == 1
    assert ("Traceback" in result.stderr) == (status == 1)
    assert len([line for line in lines if line.startswith("Traceback")]) <= 1, "one rank's, and not those that waited for it"


@pytest.mark.slow
@pytest.mark.parametrize("flag, action, status, message", [
    ("--seed=1", "pass", 2, "runs/demo has another seed: choose another --name"),
    ("--seed=0", "raise RuntimeError('a bug in the set-up')", 1, "RuntimeError: a bug in the set-up"),
])
def test_a_launcher_leaves_the_message_of_a_failed_set_up_last(tmp_path, tiny, flag, action, status, message):
    # a launcher ends all ranks as soon as one has ended, and before training a signal ends them at once
    train(tmp_path, *tiny, "--max_steps=2")
    script = sabotage(tmp_path, 0, [1], action, "build_model", "True")
    launcher = launch(tmp_path, sys.executable, str(ROOT / "ranks.py"), "--standalone", "--nproc-per-node=2", str(script), *tiny, flag)
    assert launcher.wait(patience()) == status
    errors = our_lines((tmp_path / "err").read_text())
    assert errors[-1].startswith(f"error: {message}"), errors
    assert sum(line.startswith("error: ") for line in errors) == 1


@pytest.mark.slow
def test_collectives_have_long_patience_in_the_set_up_and_short_in_training(tmp_path, tiny):
    show = "print('timeout', torch.distributed.group.WORLD._get_backend(torch.device('cpu')).options._timeout)"
    for step, expected in ((0, "0:30:00"), (1, "0:01:30")):
        script = sabotage(tmp_path, step, [0], show)
        result = run(tmp_path, script, *tiny, "--max_steps=2", f"--name=step-{step}", ranks=2)
        assert result.status == 0 and f"timeout {expected}\n" in result.stdout, result


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_falls_silent_is_named_and_the_others_end(checkout, tiny, silent):
    shorten_silence(checkout, 4)
    command = [sys.executable, "ranks.py", "--standalone", "--nproc-per-node=2", "train_prx.py"]
    launcher = launch(checkout, *command, *tiny, *FP32, "--stages=32:2000:16:1")
    wait_for(lambda: last_logged(checkout / "runs/demo") > 2)
    stopped = sorted(child for child in children(launcher.pid) if b"train_prx" in Path(f"/proc/{child}/cmdline").read_bytes())[silent]
    os.kill(stopped, signal.SIGSTOP)
    message = f"error: lost contact with rank {silent} on {socket.gethostname()}: silent for 4 s"
    wait_for(lambda: message in (checkout / "err").read_text())
    os.kill(stopped, signal.SIGKILL)  # which the launcher would do after 30 s
    assert launcher.wait(patience()) in (1, 137)  # the one that ended, or the one that was killed
    assert "Traceback" not in (checkout / "err").read_text()


@pytest.mark.slow
def test_a_mistake_on_all_ranks_is_said_once_a_node(tmp_path, tiny, data):
    shutil.copytree(data, tmp_path / "data")
    flags = [*tiny, f"--data={tmp_path}/data"]
    train(tmp_path, *flags, "--max_steps=2", ranks=2)
    message = run(tmp_path, "train_prx.py", *flags, "--seed=1", ranks=2).error()
    assert "runs/demo has another seed" in message


@pytest.mark.slow
def test_a_rank_that_drifts_by_one_bit_is_named(tmp_path, tiny):
    # four replicas of one rank each; three agree
    script = sabotage(tmp_path, 7, [2], FLIP)
    flags = [*tiny, *FP32, "--save_every=3"]
    process = start(tmp_path, script, *flags, ranks=4, nodes=4)
    result = process.wait()
    assert [p.exitcode for p in process.processes] == [2] * 4
    last = result.ours()[-1]
    assert re.match(r"error: (rank \d on \S+ failed: )?at step 9 the weights of rank 2 on \S+ \(model\.\S+\) are not those of its replicas", last)
    assert last.endswith("the same command continues from runs/demo/checkpoints/step_000006")
    saved = sorted(os.listdir(tmp_path / "runs/demo/checkpoints"))
    assert saved == ["step_000003", "step_000006"], "what no longer agrees is not saved"
    folder = train(tmp_path, *flags, ranks=4, nodes=4)
    assert list(curve(folder)) == list(range(1, FINISH + 1)), "and without the sabotage the run goes on"


@pytest.mark.slow
def test_of_two_replicas_that_disagree_both_are_named(tmp_path, tiny):
    script = sabotage(tmp_path, 4, [3], FLIP)
    result = run(tmp_path, script, *tiny, *FP32, "--save_every=5", ranks=4, nodes=2)
    last = result.ours()[-1]
    assert result.status == 2 and set(re.findall(r"rank (\d) on \S+ \(", last)) == {"1", "3"}, last


# ---------------------------------------------------------------------------------------------------------------------
# Signals, restarts, disks


@pytest.mark.slow
def test_readers_outlive_a_clusters_signals_and_not_their_rank(tmp_path, tiny):
    flags = [*tiny, "--workers=2", "--stages=32:200:16:1"]
    process = start(tmp_path, "train_prx.py", *flags)
    folder = tmp_path / "runs/demo"
    process.wait_for_step(folder, 2)
    trainer = process.processes[0].pid
    readers = children(trainer)
    assert len(readers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for reader in readers:
            os.kill(reader, number)
    process.wait_for_step(folder, 30)
    assert children(trainer) == readers
    process.kill(signal.SIGKILL)
    deadline = time.monotonic() + patience(1)
    while any(Path(f"/proc/{reader}").exists() for reader in readers):
        assert time.monotonic() < deadline, "readers of a killed rank go on, and hold its lock"
        time.sleep(0.01)


def last_logged(folder: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.fixture(scope="module")
def one_rank_of_tiny(tmp_path_factory, tiny) -> Path:
    return train(tmp_path_factory.mktemp("one_rank_of_tiny"), *tiny, *FP32)


@pytest.mark.slow
def test_torchruns_own_restarts_continue_a_run(tmp_path, tiny, one_rank_of_tiny):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    launcher = launch(tmp_path, *torchrun, str(ROOT / "train_prx.py"), *tiny, *FP32, "--save_every=3", "--resume=never")
    folder = tmp_path / "runs/demo"
    wait_for(lambda: (folder / "checkpoints/step_000003").exists())
    os.kill(find_child(launcher.pid, "train_prx.py"), signal.SIGKILL)
    assert launcher.wait(patience()) == 0
    assert len(re.findall(r"^continuing from step \d+$", (folder / "log.txt").read_text(), re.MULTILINE)) == 1
    assert_same_curve(one_rank_of_tiny, folder)
    assert not (tmp_path / "runs/demo.old-1").exists(), "--resume=never started the run over"


@pytest.mark.slow
def test_run_sh_restarts_after_a_failure_and_stops_politely(checkout, tiny):
    # the launcher gets the signal, as from a cluster or from `kill`; its ranks save, and it does not start them again
    tmp_path = checkout
    flags = [*tiny, *SAVING, "--stages=32:2000:16:1"]
    script = launch(tmp_path, "./run.sh", *flags, RESTARTS="2", NPROC_PER_NODE="2", PATH=PATH)
    folder = tmp_path / "runs/try"
    wait_for(lambda: (folder / "checkpoints/step_000006").exists())
    os.kill(find_child(find_child(script.pid, "ranks.py"), "train_prx.py"), signal.SIGKILL)
    wait_for(lambda: re.search(r"^continuing from step \d+$", (folder / "log.txt").read_text(), re.MULTILINE))
    errors = our_lines((tmp_path / "err").read_text())
    assert errors[-2:] == ["error: rank 1 was ended by SIGKILL", "starting again; 1 restarts left"], errors
    assert "Traceback" not in " ".join(errors)
    step = last_logged(folder)
    wait_for(lambda: last_logged(folder) > step)
    script.send_signal(signal.SIGTERM)
    assert script.wait(patience()) == 128 + signal.SIGTERM
    assert our_lines((tmp_path / "err").read_text()) == errors, "a polite stop is no error"
    last = last_checkpoint(folder)
    assert f"stopped by a signal at step {int(last.name.removeprefix('step_'))} of 2000" in (folder / "log.txt").read_text()


def test_the_batch_script_of_the_readme_requeues_what_is_not_finished(tmp_path):
    block = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert re.search(r"--signal=TERM@\d+", block) and "--requeue" in block
    (tmp_path / "job.sh").write_text(block)
    for name, body in (("srun", "exit $STATUS"), ("scontrol", 'echo "$@" >> asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for status, asked in ((0, False), (2, False), (1, True), (137, True), (143, True)):
        (tmp_path / "asked").unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status), "SLURM_JOB_ID": "7"}
        subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env)
        assert (tmp_path / "asked").exists() == asked, status
        assert not asked or (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, tiny):
    # tests/kills.py does it a hundred times over the demo
    seen = kill_and_compare(tmp_path, 4, [*tiny, "--stages=32:40:16:1", "--save_every=4", "--ema_every=3"])
    assert seen["kills"] == 4 and seen["different"] == [], seen


@pytest.mark.slow
def test_every_nth_checkpoint_is_kept_for_good(tmp_path, tiny):
    folder = train(tmp_path, *tiny, "--save_every=2", "--keep=2", "--keep_every=6", "--max_steps=17")
    assert sorted(os.listdir(folder / "checkpoints")) == ["step_000006", "step_000012", "step_000016", "step_000017"]


AVERAGE = """
import os, sys, time
sys.path.insert(0, {root!r})
import safetensors, ranks, run_folder, train_prx
honest = run_folder.write_ema
ranks.SILENCE, ranks.TIMEOUT = 3.0, ranks.datetime.timedelta(seconds=4)

def write_ema(path, checkpoint, identity, step):
    if step in {steps}:
        {action}
    honest(path, checkpoint, identity, step)

run_folder.write_ema = write_ema
train_prx.run_main(train_prx.main)
"""


@pytest.mark.slow
def test_what_only_rank_0_cannot_write_is_known_to_all(tmp_path, tiny):
    full = "raise safetensors.SafetensorError('I/O error: No space left on device')"
    (tmp_path / "average.py").write_text(AVERAGE.format(root=str(ROOT), steps=[6, 20], action=full))
    process = start(tmp_path, tmp_path / "average.py", *tiny, *SAVING, ranks=2)
    result = process.wait()
    assert [p.exitcode for p in process.processes] == [2, 2]
    assert result.error().startswith("error: the checkpoint of step 20 could not be written: I/O error: No space")
    assert "WARNING step 6: no checkpoint, I/O error: No space left on device" in result.stdout
    assert sorted(os.listdir(tmp_path / "runs/try/checkpoints")) == ["step_000012", "step_000018"], "and nothing is left lying about"
    assert sorted(os.listdir(tmp_path / "runs/try")) == ["checkpoints", "ema.safetensors", "log.txt", "metrics.jsonl", "samples"]
    train(tmp_path, *tiny, *SAVING, ranks=2)


@pytest.mark.slow
def test_ranks_wait_for_the_one_that_writes_for_longer_than_they_wait_for_each_other(tmp_path, tiny):
    (tmp_path / "average.py").write_text(AVERAGE.format(root=str(ROOT), steps=[18, 20], action="time.sleep(6)"))
    result = run(tmp_path, tmp_path / "average.py", *tiny, *SAVING, ranks=2)
    assert result.status == 0 and result.ours() == [], result
    assert last_checkpoint(tmp_path / "runs/try").name == "step_000020"


@pytest.mark.slow
@pytest.mark.parametrize("variable, resume", [("SLURM_RESTART_COUNT", "never"), ("TORCHELASTIC_RESTART_COUNT", "never"),
                                              ("RANKS_RESTART_COUNT", "runs/demo/checkpoints/step_000002")])
def test_a_restart_goes_on_where_the_first_attempt_ended(tmp_path, tiny, variable, resume):
    # not where the command, given once by hand, said to start
    flags = [*tiny, "--save_every=2", "--keep=9"]
    train(tmp_path, *flags, "--max_steps=6")
    result = run(tmp_path, "train_prx.py", *flags, "--max_steps=8", f"--resume={resume}", env={variable: "1"})
    assert result.status == 0 and "\ncontinuing from step 6\n" in result.stdout, result
    assert sorted(os.listdir(tmp_path / "runs")) == [".demo.lock", "demo"], "the first attempt was put aside"


@pytest.fixture
def small_disk(tmp_path):
    """An empty disk of 9 MB, mounted at runs/."""
    (tmp_path / "runs").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", tmp_path / "runs"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.decode().strip()}")
    yield tmp_path / "runs"
    subprocess.run(["umount", "-l", tmp_path / "runs"], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, tiny, unbroken, small_disk):
    folder = small_disk / "try"
    process = start(tmp_path, "train_prx.py", *tiny, *SAVING)
    wait_for(lambda: (folder / "checkpoints/step_000006").exists())
    process.kill(signal.SIGSTOP)
    with (small_disk / "ballast").open("wb", buffering=0) as file:  # not one byte is left
        with pytest.raises(OSError):
            while True:
                file.write(bytes(65536 if os.statvfs(small_disk).f_bfree > 16 else 4096))
    kept = sorted(os.listdir(folder / "checkpoints"))
    process.kill(signal.SIGCONT)
    wait_for(lambda: "WARNING step 18: no checkpoint" in (tmp_path / ".out-0").read_text())
    assert sorted(os.listdir(folder / "checkpoints")) == kept
    result = process.wait()
    assert result.status == 2 and "Traceback" not in result.stderr, result
    last = result.ours()[-1]
    assert last.startswith("error: the checkpoint of step 20 could not be written: ") and "(0.0 GB are free on its disk)" in last
    assert last.endswith(f"make room, and the same command continues from runs/try/checkpoints/{kept[-1]}")
    (small_disk / "ballast").unlink()
    train(tmp_path, *tiny, *SAVING)
    assert_same_end(folder, unbroken)


@pytest.mark.slow
def test_a_disk_that_was_full_gets_the_lines_it_missed(tmp_path, tiny, unbroken, small_disk):
    folder = small_disk / "try"
    process = start(tmp_path, "train_prx.py", *tiny, *SAVING, "--stages=32:80:16:1", "--save_every=10")
    process.wait_for_step(folder, 12)
    process.kill(signal.SIGSTOP)
    with (small_disk / "ballast").open("wb", buffering=0) as file:
        with pytest.raises(OSError):
            while True:
                file.write(bytes(65536 if os.statvfs(small_disk).f_bfree > 16 else 4096))
    process.kill(signal.SIGCONT)
    wait_for(lambda: "WARNING step" in (tmp_path / ".out-0").read_text())
    (small_disk / "ballast").unlink()
    assert process.wait().status == 0
    assert list(curve(folder)) == list(range(1, 81)), "a line is missing, or cut"
    log = (folder / "log.txt").read_text()
    assert re.search(r"^WARNING step \d+: no checkpoint, .* \(0.0 GB are free on its disk\); the last complete one: runs/try/checkpoints/step_", log, re.MULTILINE)
    assert last_checkpoint(folder).name == "step_000080"


# ---------------------------------------------------------------------------------------------------------------------
# Two nodes


@pytest.fixture
def two_nodes():
    """Two network namespaces, node-0 at 10.77.0.1 and node-1 at 10.77.0.2, with one cable between them."""
    def ip(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    names = [f"node-{k}-{os.getpid()}" for k in (0, 1)]
    try:
        made = [ip("netns", "add", name) for name in names]
        made.append(ip("link", "add", "eth", "netns", names[0], "type", "veth", "peer", "name", "eth", "netns", names[1]))
    except FileNotFoundError:
        pytest.skip("there is no `ip` (Debian: iproute2) to make network namespaces with")
    if any(result.returncode for result in made):
        for name in names:
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not allowed here: {' '.join(result.stderr.strip() for result in made)}")
    for k, name in enumerate(names):
        ip("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", "eth")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth", "up")
    yield names, ip
    for name in names:
        ip("netns", "del", name)


@pytest.mark.slow
def test_two_nodes_train_stop_when_cut_apart_and_continue(checkout, tiny, one_rank_of_tiny, two_nodes):
    # the minute of silence is 8 s here, to save time; with the project's own the nodes stopped 64 s after the cut
    names, ip = two_nodes
    folder = checkout / "runs/demo"
    shorten_silence(checkout, 8)

    def command() -> list[subprocess.Popen]:
        """The README's line on each node."""
        return [launch(checkout, "ip", "netns", "exec", name, "./run.sh", *tiny, *FP32, "--save_every=3", PATH=PATH, NNODES="2",
                       NODE_RANK=str(k), MASTER_ADDR="10.77.0.1", NPROC_PER_NODE="2", GLOO_SOCKET_IFNAME="eth")
                for k, name in enumerate(names)]

    nodes = command()
    wait_for(lambda: (folder / "checkpoints/step_000003").exists())
    ip("-n", names[1], "link", "set", "eth", "down")
    cut = time.monotonic()
    assert [node.wait(patience()) for node in nodes] == [1, 1]
    assert time.monotonic() - cut < 8 + patience(10)
    errors = (checkout / "err").read_text()
    host = socket.gethostname()
    assert f"error: lost contact with rank 2 on {host}, rank 3 on {host}: silent for 8 s" in errors
    assert "error: lost contact with the first node, 10.77.0.1:29500, silent for 8 s" in errors
    assert "Traceback" not in errors and "the same command continues from the last checkpoint" in errors
    stopped_at = last_logged(folder)
    assert stopped_at < FINISH, "the run was over before the cut"

    ip("-n", names[1], "link", "set", "eth", "up")
    assert [node.wait(patience()) for node in command()] == [0, 0]
    log = (folder / "log.txt").read_text()
    assert re.search(r"^continuing from step \d+$", log, re.MULTILINE) and "\n4 x " in log
    assert_same_curve(one_rank_of_tiny, folder)
