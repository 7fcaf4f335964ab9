"""Machines as they are: without bf16 units, a compiler, a home, a host name, room on the disk or a reader at the other
end of a pipe, with an old driver or a full GPU, training goes on, or one line says why not. What run.sh sets up.

    pytest tests/test_machine.py
"""
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENV, PATH, ROOT, curve, last_checkpoint, our_lines, patched, patience, run, start, train, wait_for
from packaging.requirements import Requirement

from sample import usable_device
from train_prx import PRESETS, Config, UserError, compute_dtype, prepare

pytestmark = pytest.mark.machinery
slow = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def shell(cwd: Path, *command: str, **env: str | None) -> subprocess.CompletedProcess:
    """A command in a process of its own, without what conftest has imported; None takes a variable away."""
    whole = {name: value for name, value in (os.environ | ENV | {"PATH": PATH} | env).items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=whole, capture_output=True, text=True, timeout=patience())


def mount(folder: Path, options: str) -> None:
    """Make `folder` a disk of its own; skips the test where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")


@pytest.fixture(autouse=True)
def unmounted(tmp_path):
    yield
    for folder in ("cache", "runs"):
        subprocess.run(["umount", "-l", tmp_path / folder], capture_output=True)


TRAIN = (sys.executable, str(ROOT / "train_prx.py"))


@pytest.mark.parametrize("device, capability, auto", [
    (CPU, None, torch.float32), (CUDA, (7, 5), torch.float32), (CUDA, (8, 0), torch.bfloat16),
    (CUDA, (9, 0), torch.bfloat16), (CUDA, (12, 0), torch.bfloat16)])
def test_auto_is_bf16_where_a_gpu_multiplies_it_and_fp32_elsewhere(monkeypatch, device, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = [compute_dtype(Config(precision=precision), device) for precision in ("auto", "bf16", "fp32")]
    assert found == [auto, torch.bfloat16, torch.float32]
    assert {cfg.precision for cfg in PRESETS.values()} == {"auto"}


@pytest.mark.parametrize("kind, reason", [
    ("no compiler", "/nowhere/g\\+\\+"), pytest.param("no execution", "failed to map segment", marks=slow)])
def test_where_nothing_can_be_compiled_a_run_goes_on_uncompiled_and_says_why(tmp_path, tiny, kind, reason):
    env = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if kind == "no execution":  # from /tmp, as in some containers
        del env["CXX"]
        mount(tmp_path / "cache", "noexec,size=64m")
    result = shell(tmp_path, *TRAIN, *tiny, "--compile=1", "--max_steps=2", **env)
    assert result.returncode == 0 and our_lines(result.stderr) == [], result
    assert list(curve(tmp_path / "runs/demo")) == [1, 2]
    assert re.search(f"^blocks run uncompiled, and slower.*({reason})", result.stdout, re.MULTILINE), result.stdout


@slow
def test_a_host_name_that_does_not_resolve_stops_nothing(checkout, tiny):
    if shell(checkout, "unshare", "-u", "hostname", "nowhere.invalid").returncode:
        pytest.skip("giving a process a host name of its own is not allowed here")
    result = shell(checkout, "unshare", "-u", "sh", "-c", 'hostname nowhere.invalid && exec ./run.sh "$@"', "sh", *tiny,
                   "--max_steps=2", NPROC_PER_NODE="2")
    assert result.returncode == 0 and our_lines(result.stderr) == [], result
    assert list(curve(checkout / "runs/demo")) == [1, 2]


def test_training_goes_on_when_nobody_reads_along(tmp_path, tiny):
    result = shell(tmp_path, "bash", "-c", f"{' '.join([*TRAIN, *tiny])} | head -n 2; echo ${{PIPESTATUS[0]}}")
    *read, status = result.stdout.splitlines()
    assert status == "0" and len(read) == 2 and our_lines(result.stderr) == [], result
    log = (tmp_path / "runs/demo/log.txt").read_text()
    assert all(line in log for line in read) and "finished at step 20" in log


def test_a_user_without_a_home_trains_and_one_rank_needs_no_address(tmp_path, tiny):
    result = shell(tmp_path, *TRAIN, *tiny, "--max_steps=2", HOME=None, USER=None, LOGNAME=None, RANK="0",
                   WORLD_SIZE="1", LOCAL_WORLD_SIZE="8")
    assert result.returncode == 0 and our_lines(result.stderr) == [], result
    assert sorted(os.listdir(tmp_path)) == ["runs"], "a folder was made where a home was expected"


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_last_one_stays(tmp_path, tiny):
    body = "def full(*args):\n    raise OSError(28, 'No space left on device')\n\nmodule.shutil.copyfile = full"
    folder = train(tmp_path, *tiny, "--max_steps=6")
    message = run(tmp_path, patched(tmp_path, body), *tiny, "--save_every=6").error()
    assert re.search("No space left on device.* GB are free.*step_000006$", message), message
    assert last_checkpoint(folder).name == "step_000006"
    assert "step_000006" in run(tmp_path, "train_prx.py", *tiny).stdout
    assert list(curve(folder)) == list(range(1, 21))


@slow
def test_a_disk_that_fills_up_is_one_line_and_the_same_command_continues(tmp_path, tiny):
    folder, flags = tmp_path / "runs/demo", [*tiny, "--save_every=6"]
    mount(tmp_path / "runs", "size=9m")
    process = start(tmp_path, "train_prx.py", *flags)
    wait_for(lambda: (folder / "checkpoints/step_000006").exists())
    process.kill(signal.SIGSTOP)
    with (tmp_path / "runs/ballast").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:  # until not one byte is left
            file.write(bytes(65536 if os.statvfs(folder).f_bfree > 16 else 4096))
    process.kill(signal.SIGCONT)
    assert re.search("No space left|cannot write a checkpoint .* 0.0 GB are free", process.wait().error())
    (tmp_path / "runs/ballast").unlink()
    again = run(tmp_path, "train_prx.py", *flags)
    assert again.status == 0 and "\ncontinuing from runs/demo/checkpoints/step_" in again.stdout, again
    assert list(curve(folder)) == list(range(1, 21)), "a line is missing, or cut"


OLD_DRIVER = """
from pathlib import Path
import torch
honest = Path.glob
Path.glob = lambda path, pattern: ["nvidia0"] if pattern.startswith("nvidia") else honest(path, pattern)
torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 8
"""  # as torch is beside a driver that is too old for it, on a machine of eight GPUs


@pytest.fixture
def old_driver(monkeypatch):
    """This process, on such a machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for owner, name in ((torch.cuda, "is_available"), (torch.cuda, "device_count"), (Path, "glob")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # puts it back at the end
    exec(OLD_DRIVER, {})


@pytest.mark.parametrize("flag", ["--preset=record", "--preset=solo", "--device=cuda", "--device=auto"])
def test_nothing_for_gpus_trains_on_the_cpu_because_a_driver_is_too_old(tiny, old_driver, flag):
    with pytest.raises(UserError, match="driver is too old.*--device=cpu"):
        prepare([*tiny, flag])


def test_what_goes_on_without_the_gpu_says_so(old_driver, capsys, monkeypatch):
    assert usable_device() == "cpu"
    assert capsys.readouterr().err.startswith("warning: this machine's GPU is not used: torch")
    for hidden in ("", "-1", "NoDevFiles"):  # on purpose
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert usable_device() == "cpu" and capsys.readouterr().err == ""


@pytest.mark.parametrize("preset", ["solo", pytest.param("record", marks=slow)])
def test_run_sh_beside_such_a_driver_stops_with_one_line(checkout, preset):
    (checkout / "site").mkdir()
    (checkout / "site/sitecustomize.py").write_text(OLD_DRIVER)
    result = shell(checkout, "./run.sh", f"--preset={preset}", PYTHONPATH=f"{checkout}/site", CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 2 and re.fullmatch("error: .*driver is too old.*\n", result.stderr), result


def test_the_demo_trains_beside_such_a_driver_and_says_so_and_what_bf16_costs_without_its_units(tmp_path, tiny):
    script = patched(tmp_path, OLD_DRIVER + "module.describe_cpu = lambda: ('a CPU', False)")
    result = run(tmp_path, script, *tiny, "--max_steps=1", "--precision=bf16", env={"CUDA_VISIBLE_DEVICES": "0"})
    assert result.status == 0 and re.search("no GPU is used.*driver is too old", result.stdout), result
    assert re.search("this processor has no bf16 units.*bf16 is emulated", result.stdout)


def test_no_memory_comes_with_advice(tmp_path, tiny):
    body = "def full(*args):\n    raise torch.OutOfMemoryError('2.00 GiB')\n\nmodule.train_step = full"
    result = run(tmp_path, patched(tmp_path, body), *tiny)
    assert result.status == 1 and "out of GPU memory with 1 chunks of 4 images at a time" in result.stderr, result
    assert "--chunks_at_once" in result.stderr and "--micro_batch" in result.stderr


def test_the_lock_holds_exact_versions_with_hashes_within_our_ranges():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^([a-z][^\\\n]*?) *\\\n(?:    --hash=.*\n?)+", text, re.MULTILINE)
    assert len(entries) == len(re.findall("^[a-z]", text, re.MULTILINE)) > 60, "an entry has no hash"
    pins, needs = [Requirement(entry) for entry in entries], []
    for file in ("requirements.txt", "tests/requirements.txt", "benchmarks/requirements.txt"):
        lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
        needs += [Requirement(line) for line in lines if line]
    systems = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")]
    for need, python, (system, machine) in itertools.product(needs, ("3.10", "3.11", "3.12", "3.13"), systems):
        where = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system,
                 "platform_machine": machine}
        if need.marker is None or need.marker.evaluate(where):
            pin, = [p for p in pins if p.name == need.name and (p.marker is None or p.marker.evaluate(where))]
            assert need.specifier.contains(next(iter(pin.specifier)).version, prereleases=True), (need, pin)


FAKE_PYTHON = """#!/bin/sh
# A Python that has everything, or nothing, and writes down what else it is asked for; $0 is its own path
case "$*" in
    *--dry-run*) exit "$LACKS" ;;
    "-W ignore -c"*) echo "${GPUS:-0}" ;;
    -c* | *--help) ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *) echo "${0##*/} $*" >> asked; case $0 in .venv*) exit "${STATUS:-0}" ;; esac ;;
esac
"""


def set_up(checkout: Path, *command: str, lacks: int = 0, **env: str) -> tuple[int, list[str]]:
    """Run run.sh where the active Python has what is needed, or lacks it; its status and what was called."""
    (checkout / "bin").mkdir(exist_ok=True)
    (checkout / "bin/python3").write_text(FAKE_PYTHON)
    (checkout / "bin/python3").chmod(0o755)
    (checkout / "asked").write_text("")
    env = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "LACKS": str(lacks)} | env
    result = subprocess.run(["./run.sh", *command], cwd=checkout, env=env, capture_output=True, text=True)
    return result.returncode, (checkout / "asked").read_text().splitlines()


def test_run_sh_installs_the_lock_once_and_again_when_it_changes(checkout):
    lock, plan = checkout / "requirements.lock", "python tools/plan.py"
    lock.write_text("torch==2.14.1 --hash=sha256:00\n")
    install = "python -m pip install -q --require-hashes -r requirements.lock"
    assert set_up(checkout, "plan", lacks=1, STATUS="1") == (2, [install]), "what failed is not taken for done"
    assert set_up(checkout, "plan", lacks=1) == (0, [install, plan])
    assert set_up(checkout, "plan", lacks=1) == (0, [plan])
    lock.write_text("torch==2.14.2 --hash=sha256:00\n")
    assert set_up(checkout, "plan", lacks=1) == (0, [install, plan])


def test_run_sh_takes_an_active_python_and_runs_the_tests_that_are_not_slow_or_all(checkout):
    status, (called,) = set_up(checkout, "test", "-x")
    assert status == 0 and re.fullmatch("python3 -m pytest .* -m not slow -x tests", called)
    status, (called,) = set_up(checkout, "test", "--all")
    assert status == 0 and called.startswith("python3 -m pytest ") and "not slow" not in called


@pytest.mark.parametrize("preset, gpus, processes", [
    ("solo", 0, 1), ("solo", 1, 1), ("solo", 3, 2), ("solo", 7, 4), ("record", 8, 8), ("demo", 8, 1), ("race", 2, 1)])
def test_run_sh_starts_as_many_processes_as_the_presets_chunks_allow(checkout, preset, gpus, processes):
    status, (called,) = set_up(checkout, f"--preset={preset}", GPUS=str(gpus))
    torchrun = rf"-W ignore -m torch.distributed.run --standalone .*--nproc-per-node={processes} .*"
    assert status == 0 and re.fullmatch(f"python3 {torchrun * (processes > 1)}train_prx.py --preset={preset}", called)
    cfg = PRESETS[preset]
    assert all(stage.global_batch // cfg.micro_batch % processes == 0 for stage in cfg.stages)
