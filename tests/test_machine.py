"""Machines as they are: without bf16 units, a compiler, a home, a host name or a reader at the other end of a pipe, with an
old driver or a full GPU, training goes on, or one line says why not. What run.sh installs, and what it takes as it is.

    pytest tests/test_machine.py
"""
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ENV, PATH, ROOT, curve, last_checkpoint, our_lines, patience, run, train
from packaging.requirements import Requirement
from torch.distributed.device_mesh import init_device_mesh

import train_prx
from command_line import hush_libraries
from train_prx import PRESETS, Config, build_model, build_optimizer, compute_dtype, describe_cpu, load_frozen, load_text_encoder

pytestmark = pytest.mark.machinery

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = replace(PRESETS["demo"], width=32, heads=2, depth=2, route_start=1, route_end=2, repa_depth=1, compile=False)


def bare(cwd: Path, *flags: str, **env: str | None) -> subprocess.CompletedProcess:
    """`python train_prx.py flags` in a process of its own, without what conftest has imported; None takes a variable away."""
    whole = {name: value for name, value in (os.environ | ENV | env).items() if value is not None}
    return subprocess.run([sys.executable, str(ROOT / "train_prx.py"), *flags], cwd=cwd, env=whole, capture_output=True, text=True,
                          timeout=patience())


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("device, capability, auto", [
    (CPU, None, torch.float32), (CUDA, (7, 5), torch.float32), (CUDA, (8, 0), torch.bfloat16), (CUDA, (9, 0), torch.bfloat16),
    (CUDA, (12, 0), torch.bfloat16), (torch.device("meta"), None, torch.float32)])
def test_auto_is_bf16_where_a_gpu_multiplies_it_and_fp32_elsewhere(monkeypatch, device, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = [compute_dtype(Config(precision=precision), device) for precision in ("auto", "bf16", "fp32")]
    assert found == [auto, torch.bfloat16, torch.float32]


def test_auto_is_the_default_of_every_preset():
    assert {cfg.precision for cfg in PRESETS.values()} == {"auto"}


def test_every_user_of_a_dtype_takes_the_one_answer(monkeypatch, networks, tmp_path):
    monkeypatch.setattr(train_prx, "compute_dtype", lambda cfg, device: torch.bfloat16)
    cfg = replace(SMALL, frozen="pretrained", repa_teacher=f"{networks}/dinov3", repa_dim=24, pdino_model=f"{networks}/dinov2",
                  lpips_weight=0.0, text_encoder=f"{networks}/t5gemma", text_dim=24)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build_model(cfg, init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)), CPU)
        assert {p.dtype for p in model.parameters()} == {torch.float32}, "weights stay fp32"
        optimizer = build_optimizer(model, cfg)
        _, feat = model(torch.zeros(2, 3, 32, 32), torch.ones(2), torch.zeros(2, 4, 24))
    finally:
        dist.destroy_process_group()
    seen = []
    frozen = load_frozen(cfg, CPU)
    for network in (frozen.teacher, frozen.pdino):
        dino = next(cell.cell_contents for cell in network.__closure__ if isinstance(cell.cell_contents, train_prx.Dino))
        seen.append(dino.model.dtype)
    seen += [load_text_encoder(cfg, CPU).model.dtype, optimizer.param_groups[0]["ns_dtype"], feat.dtype]
    assert seen == 5 * [torch.bfloat16]


def test_what_auto_means_is_part_of_a_runs_identity(tmp_path, tiny):
    folder = train(tmp_path, *tiny, "--max_steps=2")
    assert json.loads((last_checkpoint(folder) / "run.json").read_text())["config"]["precision"] == "fp32"
    assert "computes in fp32 on a processor with" in (folder / "log.txt").read_text()
    message = run(tmp_path, "train_prx.py", *tiny, "--max_steps=3", "--precision=bf16").error()
    assert "runs/demo has another precision" in message
    train(tmp_path, *tiny, "--max_steps=3", "--precision=fp32")
    assert list(curve(folder)) == [1, 2, 3]


CPUINFO = {  # what Linux says of a processor -> what we do
    "model name\t: AMD EPYC 7763\nflags\t\t: fpu avx2 sha_ni": ("AMD EPYC 7763 CPU", False),
    "model name\t: Intel Xeon\nflags\t\t: avx512f avx512_bf16\n\nmodel name\t: Intel Xeon": ("Intel Xeon CPU", True),
    "model name\t: Intel Xeon\nflags\t\t: avx2 amx_bf16 amx_tile": ("Intel Xeon CPU", True),
    "model name\t: Intel Xeon\nflags\t\t: avx512f avx512_vnni": ("Intel Xeon CPU", False),
    "processor\t: 0\nFeatures\t: fp asimd i8mm bf16": ("CPU", True),
    "": ("CPU", False),
}


@pytest.mark.parametrize("info", CPUINFO)
def test_the_processor_is_named_with_its_units(tmp_path, info):
    (tmp_path / "cpuinfo").write_text(info)
    name, has_bf16 = describe_cpu(tmp_path / "cpuinfo")
    assert (name.endswith(CPUINFO[info][0]), has_bf16) == (True, CPUINFO[info][1])
    assert not describe_cpu(tmp_path / "nowhere")[1]


@pytest.mark.parametrize("units", ["with", "without"])
def test_bf16_on_a_cpu_says_what_it_costs_where_the_units_are_missing(tmp_path, tiny, units):
    script = tmp_path / "cpu.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_prx\n"
                      f"train_prx.describe_cpu = lambda: ('a CPU', {units == 'with'})\ntrain_prx.run_main(train_prx.main)\n")
    result = run(tmp_path, script, *tiny, "--precision=bf16", "--max_steps=1")
    assert result.status == 0 and f"computes in bf16 on a processor {units} bf16 units" in result.stdout, result
    assert ("WARNING --precision=bf16 is emulated on this processor" in result.stdout) == (units == "without")


# ---------------------------------------------------------------------------------------------------------------------
# Compilers


WITHOUT_HEADERS = """#!/bin/bash
# g++ where Python's headers are not installed
a=(); for x in "$@"; do case $x in *include/python3*) ;; *) a+=("$x");; esac; done
exec g++ "${a[@]}"
"""


@pytest.fixture
def no_exec(tmp_path):
    """A folder from which nothing can be executed, as /tmp is in some containers."""
    (tmp_path / "noexec").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,size=64m", "tmpfs", tmp_path / "noexec"], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield tmp_path / "noexec"
    subprocess.run(["umount", "-l", tmp_path / "noexec"], check=True)


def goes_on_uncompiled(tmp_path: Path, tiny: list[str], **env: str) -> str:
    """Train two steps that should compile; the reason that the log gives for why they do not."""
    result = bare(tmp_path, *tiny, "--compile=1", "--max_steps=2", **env)
    assert result.returncode == 0 and our_lines(result.stderr) == [], result
    assert list(curve(tmp_path / "runs/demo")) == [1, 2]
    return re.search(r"^blocks run uncompiled, and slower: (.+)$", (tmp_path / "runs/demo/log.txt").read_text(), re.MULTILINE)[1]


def test_a_compiler_that_is_not_there_is_said(tmp_path, tiny):
    assert "/nowhere/g++" in goes_on_uncompiled(tmp_path, tiny, CXX="/nowhere/g++")


@pytest.mark.slow
def test_a_compiler_that_is_gone_is_said_whatever_an_earlier_run_left_in_the_cache(tmp_path, tiny):
    compiler, cache = tmp_path / "compiler", str(tmp_path / "cache")
    for script in ('exec g++ "$@"', WITHOUT_HEADERS.partition("\n")[2]):
        compiler.write_text(f"#!/bin/bash\n{script}\n")
        compiler.chmod(0o755)
        result = bare(tmp_path, *tiny, "--compile=1", "--max_steps=2", "--resume=never", CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=cache)
        assert result.returncode == 0, result
        assert ("blocks run uncompiled" in result.stdout) == ("exec g++ \"${a[@]}\"" in script)


@pytest.mark.slow
def test_a_compiler_that_cannot_make_python_extensions_is_said(tmp_path, tiny):
    compiler = tmp_path / "g++-without-headers"
    compiler.write_text(WITHOUT_HEADERS)
    compiler.chmod(0o755)
    reason = goes_on_uncompiled(tmp_path, tiny, CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert reason == "torch.compile fails here: Python.h: No such file or directory"


@pytest.mark.slow
def test_a_cache_that_cannot_be_made_is_said(tmp_path, tiny):
    (tmp_path / "file").touch()  # root may write anywhere, but not make a folder in a file
    cache = tmp_path / "file/cache"
    assert f"TORCHINDUCTOR_CACHE_DIR={cache}, cannot be made" in goes_on_uncompiled(tmp_path, tiny, TORCHINDUCTOR_CACHE_DIR=str(cache))


@pytest.mark.slow
def test_a_cache_that_cannot_be_executed_is_said(tmp_path, tiny, no_exec):
    assert "failed to map segment" in goes_on_uncompiled(tmp_path, tiny, TORCHINDUCTOR_CACHE_DIR=str(no_exec / "cache"))


# ---------------------------------------------------------------------------------------------------------------------
# Names, homes, pipes, environments


@pytest.mark.parametrize("env", [{"NPROC_PER_NODE": "2"}, pytest.param({"RESTARTS": "1"}, marks=pytest.mark.slow)])
def test_a_host_name_that_does_not_resolve_stops_nothing(checkout, tiny, env):
    command = ["unshare", "-u", "sh", "-c", 'hostname nowhere.invalid && exec ./run.sh "$@"', "sh", *tiny, "--max_steps=2"]
    if subprocess.run(["unshare", "-u", "hostname", "nowhere.invalid"], capture_output=True).returncode:
        pytest.skip("giving a process a host name of its own is not allowed here")
    result = subprocess.run(command, cwd=checkout, env=os.environ | ENV | {"PATH": PATH} | env, capture_output=True, text=True,
                            timeout=patience())
    assert result.returncode == 0 and our_lines(result.stderr) == [], result
    assert list(curve(checkout / "runs/demo")) == [1, 2]


def test_training_goes_on_when_nobody_reads_along(tmp_path, tiny):
    command = f"{sys.executable} {ROOT}/train_prx.py {' '.join(tiny)} | head -n 2; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | ENV, capture_output=True, text=True,
                            timeout=patience())
    *read, status = result.stdout.splitlines()
    assert status == "0" and len(read) == 2 and our_lines(result.stderr) == [], result
    log = (tmp_path / "runs/demo/log.txt").read_text()
    assert all(line in log for line in read) and "finished at step 20" in log
    assert last_checkpoint(tmp_path / "runs/demo").name == "step_000020"


@pytest.mark.slow
def test_a_pipe_that_breaks_elsewhere_is_no_silent_end(tmp_path):
    command = ("import os, command_line\nread, write = os.pipe()\nos.close(read)\n"
               "command_line.run_main(lambda argv: os.write(write, b'x'))")
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=os.environ | ENV, capture_output=True, text=True)
    assert result.returncode == 1 and "BrokenPipeError" in result.stderr


def test_other_commands_end_quietly_when_nobody_reads_along(tmp_path, data):
    command = f"{sys.executable} {ROOT}/data_prep.py check --data={data} | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | ENV, capture_output=True, text=True,
                            timeout=patience())
    assert our_lines(result.stderr) == [] and result.stdout in ("0\n", "141\n"), result


LONELY = {  # an environment that promises other ranks -> what the one line must say
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_PORT and MASTER_ADDR are missing", "./run.sh or torchrun"]),
    "the second rank": ({"RANK": "1", "WORLD_SIZE": "2"}, ["MASTER_PORT and MASTER_ADDR are missing", "./run.sh or torchrun"]),
    "no rank": ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, ["RANK is missing"]),
    "no number": ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE=two"]),
    "no ranks": ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
    "no port": ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, ["MASTER_PORT is missing"]),
    "a rank too many": ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, ["RANK=5"]),
    "no number on this node": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": "29500"}, ["LOCAL_WORLD_SIZE= is no number"]),
}


@pytest.mark.parametrize("name", LONELY)
def test_ranks_that_could_not_find_each_other_are_one_line(tmp_path, tiny, name):
    env, words = LONELY[name]
    message = run(tmp_path, "train_prx.py", *tiny, env=env).error()
    assert all(word in message for word in words), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("env", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "3"}, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"}])
def test_an_environment_of_one_rank_needs_no_address(tmp_path, tiny, env):
    result = run(tmp_path, "train_prx.py", *tiny, "--max_steps=1", env=env)
    assert result.status == 0 and result.ours() == [], result
    assert "--nonsense" in run(tmp_path, "train_prx.py", "--nonsense=1", env=env).error()


def test_a_user_without_a_home_trains(tmp_path, tiny):
    result = bare(tmp_path, *tiny, "--max_steps=2", HOME=None, USER=None, LOGNAME=None)
    assert result.returncode == 0 and our_lines(result.stderr) == [], result
    assert sorted(os.listdir(tmp_path)) == ["runs"], "a folder was made where a home was expected"


# ---------------------------------------------------------------------------------------------------------------------
# GPUs that cannot be used, or are full


OLD_DRIVER = """
import sys, warnings
sys.path.insert(0, {root!r})
import torch, train_prx

def too_old():
    warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update it.")
    return False

torch.cuda.is_available, torch.cuda.device_count = too_old, lambda: {listed}
train_prx.run_main(train_prx.main)
"""


@pytest.fixture
def old_driver(tmp_path) -> Path:
    """train_prx.py where torch says, as it does, that the driver of this machine's eight GPUs is too old."""
    (tmp_path / "old.py").write_text(OLD_DRIVER.format(root=str(ROOT), listed=8))
    return tmp_path / "old.py"


@pytest.mark.parametrize("preset", ["record", "solo"])
def test_presets_for_gpus_never_train_on_the_cpu_because_a_driver_is_too_old(tmp_path, tiny, old_driver, preset):
    flags = [f"--preset={preset}", *[flag for flag in tiny if not flag.startswith("--preset")]]
    message = run(tmp_path, old_driver, *flags, env={"CUDA_VISIBLE_DEVICES": "0"}).error()
    assert "The NVIDIA driver on your system is too old (found version 12020)" in message and "--device=cpu" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command, status, line", [
    pytest.param("demo", 0, "this machine's GPU is not used: The NVIDIA driver", marks=pytest.mark.slow),
    ("solo", 2, "error: this machine's GPU cannot be used: The NVIDIA driver"),
    ("--preset=solo", 2, "error: this machine's GPU cannot be used: The NVIDIA driver")])
def test_run_sh_beside_such_a_driver(checkout, data, command, status, line):
    """Eight GPUs are listed, and none works: one process for the demo; solo stops before it draws its 20,000 pictures."""
    (checkout / "site").mkdir()
    patch = OLD_DRIVER.partition("import torch, train_prx")[2].rpartition("train_prx.run_main")[0].format(listed=8)
    (checkout / "site/sitecustomize.py").write_text(f"import warnings\nimport torch\n{patch}")
    (checkout / "data").mkdir()
    (checkout / "data/demo").symlink_to(data)
    env = os.environ | ENV | {"PATH": PATH, "PYTHONPATH": str(checkout / "site"), "CUDA_VISIBLE_DEVICES": "0"}
    flags = ["--max_steps=1", "--sample_steps=1", "--compile=0", "--score_n=4"] if command == "demo" else []
    result = subprocess.run(["./run.sh", command, *flags], cwd=checkout, env=env, capture_output=True, text=True, timeout=patience())
    assert result.returncode == status and line in result.stdout + result.stderr, result
    assert not (checkout / "data/solo").exists()
    assert len(re.findall("^error: ", result.stderr, re.MULTILINE)) == (status != 0)


def test_the_demo_trains_beside_such_a_driver_and_says_so(tmp_path, tiny, old_driver):
    result = run(tmp_path, old_driver, *tiny, "--max_steps=1", env={"CUDA_VISIBLE_DEVICES": "0"})
    assert result.status == 0 and "this machine's GPU is not used: The NVIDIA driver" in result.stdout, result


@pytest.mark.parametrize("script, flags", [
    ("data_prep.py", ["embed", "--data={data}", "--encoder={networks}/t5gemma"]),
    ("sample.py", ["--checkpoint={run}", "--prompt=a red circle", "--steps=2"])])
def test_commands_that_go_on_without_the_gpu_say_so(tmp_path, data, networks, tiny, script, flags):
    shutil.copytree(data, tmp_path / "data")
    folder = train(tmp_path, *tiny, "--max_steps=1") if script == "sample.py" else tmp_path
    old = OLD_DRIVER.replace("import torch, train_prx", f"import torch, train_prx, {script[:-3]} as command").replace(
        "train_prx.main", "command.main")
    (tmp_path / "old.py").write_text(old.format(root=str(ROOT), listed=8))
    flags = [flag.format(data=tmp_path / "data", networks=networks, run=folder) for flag in flags]
    result = run(tmp_path, tmp_path / "old.py", *flags, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert result.status == 0 and len(result.ours()) == 1, result
    assert result.ours()[0].startswith("warning: this machine's GPU is not used: The NVIDIA driver on your system is too old")


def test_a_torch_that_lists_gpus_and_has_none_is_refused_too(tmp_path, tiny):
    script = tmp_path / "old.py"
    script.write_text(OLD_DRIVER.format(root=str(ROOT), listed=8).replace("    warnings.warn", "    0 and warnings.warn"))
    message = run(tmp_path, script, *tiny, "--device=auto", env={"CUDA_VISIBLE_DEVICES": "0"}).error()
    assert "this machine's GPU cannot be used: torch" in message and "its driver is too old" in message


def test_a_gpu_that_is_hidden_on_purpose_is_no_trouble(tmp_path, tiny, old_driver):
    for hidden in ("", "-1", "NoDevFiles"):
        result = run(tmp_path, old_driver, *tiny, "--device=auto", "--max_steps=1", f"--name=hidden{len(hidden)}",
                     env={"CUDA_VISIBLE_DEVICES": hidden})
        assert result.status == 0 and "no GPU is visible: this run is on the CPU" in result.stdout, result


def test_asking_for_cuda_beside_such_a_driver_gives_the_reason(tmp_path, tiny, old_driver):
    message = run(tmp_path, old_driver, *tiny, "--device=cuda", env={"CUDA_VISIBLE_DEVICES": "0"}).error()
    assert message.startswith("error: --device=cuda: The NVIDIA driver on your system is too old")


FULL_GPU = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train_prx
honest = train_prx.train_step

def full(*args):
    if args[-2] == {step} and "RANKS_RESTART_COUNT" not in os.environ:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return honest(*args)

train_prx.train_step = full
train_prx.run_main(train_prx.main)
"""


def fill_gpu(cwd: Path, step: int) -> Path:
    """train_prx.py whose first attempt finds no memory at a step (0-based); the warm-up is a step 0 as well."""
    (cwd / "full.py").write_text(FULL_GPU.format(root=str(ROOT), step=step))
    return cwd / "full.py"


def test_no_memory_for_the_first_step_is_a_mistake_with_advice(tmp_path, tiny):
    message = run(tmp_path, fill_gpu(tmp_path, 0), *tiny).error()
    assert "out of GPU memory with 1 chunks of 4 images at a time, at 32px" in message
    assert "--chunks_at_once" in message and "--micro_batch" in message


@pytest.mark.slow
def test_no_memory_once_there_are_checkpoints_is_a_failure_that_restarts(tmp_path, tiny):
    script = fill_gpu(tmp_path, 12)
    flags = [*tiny, "--save_every=5"]
    alone = run(tmp_path, script, *flags, "--name=alone")
    assert alone.status == 1 and "runs/alone/checkpoints/step_000010, from which the same command continues" in alone.stderr, alone
    command = [sys.executable, str(ROOT / "ranks.py"), "--standalone", "--nproc-per-node=1", "--max-restarts=1", str(script), *flags]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | ENV, capture_output=True, text=True, timeout=patience())
    assert result.returncode == 0 and "\ncontinuing from step 10\n" in result.stdout, result
    assert list(curve(tmp_path / "runs/demo")) == list(range(1, 21))


# ---------------------------------------------------------------------------------------------------------------------
# What libraries say


SAID = [  # category, module it arises in, whether it is left out
    (FutureWarning, "torch.distributed.c10d_logger", True), (DeprecationWarning, "transformers.utils.hub", True),
    (FutureWarning, "torch", True), (FutureWarning, "muon", False), (FutureWarning, "__main__", False),
    (DeprecationWarning, "torchless", False), (UserWarning, "torch.nn.functional", False), (RuntimeWarning, "torch", False),
]


@pytest.mark.parametrize("category, module, left_out", SAID)
def test_only_what_libraries_say_of_themselves_is_left_out(category, module, left_out):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush_libraries()
        warnings.warn_explicit("`f` is deprecated", category, f"{module}.py", 1, module)
    assert (caught == []) == left_out


# ---------------------------------------------------------------------------------------------------------------------
# Set-up


def requirements(name: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def locked() -> dict[str, list[Requirement]]:
    """Package -> what the lock holds of it, one entry a version of Python."""
    entries = re.findall(r"^([a-z][^\\\n]*?) *\\\n((?:    --hash=.*\n?)+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    pins = sorted((Requirement(entry) for entry, _ in entries), key=lambda pin: pin.name)
    return {name: list(group) for name, group in itertools.groupby(pins, key=lambda pin: pin.name)}


def test_the_lock_holds_exact_versions_with_hashes_within_our_ranges():
    pins, text = locked(), (ROOT / "requirements.lock").read_text()
    lines = [line for line in text.splitlines() if re.match("[a-z]", line)]
    assert len(lines) == sum(map(len, pins.values())) > 60, "an entry has no hash"
    for name in ("requirements.txt", "tests/requirements.txt", "benchmarks/requirements.txt"):
        for need in requirements(name):
            for python in ("3.10", "3.11", "3.12", "3.13"):
                for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")):
                    where = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": system,
                             "platform_machine": machine}
                    if need.marker is None or need.marker.evaluate(where):
                        fits = [pin for pin in pins[need.name] if pin.marker is None or pin.marker.evaluate(where)]
                        assert len(fits) == 1, (need, where)
                        version = next(iter(fits[0].specifier)).version
                        assert need.specifier.contains(version, prereleases=True), (need, version)
    assert "http" not in re.sub(r"^http\S*==.*$", "", text, flags=re.MULTILINE), "an index is named"


FAKE_PYTHON = """#!/bin/sh
# A python3 that has {has}, and makes a .venv whose python writes down what it is asked for
case "$1" in
    -) exit {status} ;;
    -c) exit 0 ;;
    -W) echo "${{GPUS:-0}}" ;;
    -m) mkdir -p .venv/bin && printf '#!/bin/sh\\necho "$@" >> "$ASKED"\\nexit ${{STATUS:-0}}\\n' > .venv/bin/python && chmod +x .venv/bin/python ;;
    *) echo "active $@" >> "$ASKED" ;;
esac
"""


def set_up(checkout: Path, has: bool, status: int = 0, command: str = "plan", gpus: int = 0) -> tuple[int, list[str]]:
    """Run `./run.sh command` where the active Python has what is needed, or has not; its status and what was called."""
    (checkout / "bin").mkdir(exist_ok=True)
    python = checkout / "bin/python3"
    python.write_text(FAKE_PYTHON.format(has="everything" if has else "nothing", status=0 if has else 1))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    asked = checkout / "asked"
    asked.unlink(missing_ok=True)
    env = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "ASKED": str(asked), "STATUS": str(status), "GPUS": str(gpus)}
    result = subprocess.run(["./run.sh", command], cwd=checkout, env=env, capture_output=True, text=True)
    return result.returncode, asked.read_text().splitlines() if asked.exists() else []


def test_run_sh_installs_the_lock_once_and_again_when_it_changes(checkout):
    lock = checkout / "requirements.lock"
    lock.write_text("torch==2.14.1 --hash=sha256:00\n")
    pip, install, command = "-m pip --version", "-m pip install --quiet --require-hashes -r requirements.lock", "benchmarks/plan.py"
    assert set_up(checkout, has=False, status=1) == (2, [install]), "what failed is not taken for done"
    assert set_up(checkout, has=False) == (0, [pip, install, command])
    assert set_up(checkout, has=False) == (0, [command])
    lock.write_text("torch==2.14.2 --hash=sha256:00\n")
    assert set_up(checkout, has=False) == (0, [pip, install, command])
    (checkout / ".venv/bin/python").unlink()  # as where Python itself was replaced by a newer one
    assert set_up(checkout, has=False) == (0, [install, command])


def test_run_sh_takes_an_active_python_that_has_what_is_needed(checkout):
    assert set_up(checkout, has=True) == (0, ["active benchmarks/plan.py"])
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("command, gpus, processes", [
    ("--preset=solo", 0, 1), ("--preset=solo", 1, 1), ("--preset=solo", 3, 2), ("--preset=solo", 7, 4), ("--preset=record", 8, 8),
    ("--preset=demo", 8, 1), ("--preset=race", 2, 1)])
def test_run_sh_starts_as_many_processes_as_the_presets_chunks_allow(checkout, command, gpus, processes):
    status, (called,) = set_up(checkout, has=True, command=command, gpus=gpus)
    many = f"ranks.py --standalone --nproc-per-node={processes} --max-restarts=0 "
    assert (status, called) == (0, f"active {many if processes > 1 else ''}train_prx.py {command}")
    cfg = PRESETS[command.removeprefix("--preset=")]
    assert all(stage.global_batch // cfg.micro_batch % processes == 0 for stage in cfg.stages)
