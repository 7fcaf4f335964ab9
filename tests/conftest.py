"""What the end-to-end tests share: a small data set, and commands run as a user runs them, in processes of their own.

Importing torch takes longer than a tiny run. So `start` forks each command from one process that has it imported, and
runs the script there as `python SCRIPT` would, in torchrun's environment if there are several ranks.
"""
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # so that run.sh finds what runs these tests
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200",
       "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": ""}  # the last some have set, and most have not
PRELOADED = ["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint",
             "torchvision", "datasets", "transformers", "safetensors.torch", "PIL.Image", "tqdm", "matplotlib.figure",
             "matplotlib.backends.backend_agg", "diffusers.pipelines.prx.pipeline_prx_pixel"]
KINDS = {"recipe": "the numbers and architecture of the recipe: a fork that changes them fails these, and may",
         "parity": "against diffusers, torch.optim, another library, a closed form or float64",
         "machinery": "data, runs, ranks, commands: must hold in every fork"}  # of a test; each is of one
# A model and a schedule small enough for 20 steps a second; `data` is added by the fixture `tiny`. 4 chunks a step.
TINY = ["--preset=demo", "--stages=32:20:16:1", "--micro_batch=4", "--patch=8", "--bottleneck=16", "--width=32",
        "--depth=3", "--heads=2", "--drop=0.5", "--route_start=1", "--route_end=2", "--text_dim=32", "--repa_depth=2",
        "--repa_dim=16", "--compile=0", "--log_every=1", "--sample_steps=2", "--eval_every=0", "--sample_every=0",
        "--save_every=0"]


def pytest_configure(config) -> None:
    config.option.strict_markers = True
    for name, meaning in {**KINDS, "slow": "only with ./run.sh test --all"}.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses among them
def pytest_collection_modifyitems(items) -> None:
    """A test without a kind gets its module's KIND. A `pytestmark`, for modules of one kind, adds: two kinds fail."""
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            item.add_marker(item.module.KIND)
        kinds = [mark.name for mark in item.iter_markers() if mark.name in KINDS]
        assert len(kinds) == 1, f"{item.nodeid} must be of one kind, not of {kinds}"


def need_diffusers() -> None:
    """Skip the test where there can be no diffusers; where it can be and is not, the test fails."""
    if sys.version_info < (3, 11):
        pytest.skip("diffusers 0.42 takes Python 3.11")


@functools.cache
def pace() -> float:
    """Seconds of a process that imports torch and multiplies for a moment: three on a quiet machine of two cores."""
    began, work = time.monotonic(), "import torch; a = torch.randn(512, 512); [a @ a for _ in range(100)]"
    subprocess.run([sys.executable, "-c", work], env=os.environ | ENV, check=True)
    return max(1.0, time.monotonic() - began)


def patience(times: float = 30) -> float:
    """Seconds until a command has failed: `times` the pace of this machine when the tests began."""
    return times * pace()


def wait_for(condition, seconds: float | None = None):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + (seconds or patience())
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)
    return found


def patched(cwd: Path, body: str, name: str = "train_prx") -> Path:
    """A script in `cwd` that runs a script of the project after `body`, which knows its module as `module`."""
    script = cwd / "patched.py"
    script.write_text(f"import json, os, signal, sys, time, warnings\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"import torch, {name} as module\n{body}\nmodule.run_main(module.main)\n")
    return script


def our_lines(stderr: str) -> list[str]:
    """What stderr holds of ours, and tracebacks: other lines are a library's, and change with its version."""
    ours = re.compile("error: |warning: |.*Traceback|Exception ignored|Fatal Python error|"
                      rf"{re.escape(str(ROOT))}/(?!.*site-packages).*Warning: ")  # what Python says of a line of ours
    return [line for line in stderr.splitlines() if ours.match(line)]


class Result(NamedTuple):
    """What a command left behind: its exit status (minus the signal where one ended it) and what it printed."""

    status: int
    stdout: str
    stderr: str

    def ours(self) -> list[str]:
        return our_lines(self.stderr)

    def error(self) -> str:
        """The one line that a user's mistake is answered with; fails where we say anything else."""
        lines = self.ours()
        assert self.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), self
        assert "Traceback" not in self.stdout, self
        return lines[0]


def as_script(script: str, flags: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Body of a forked process: become `python script flags` in `cwd`, in a process group of its own."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method(None, force=True)  # the platform's own, for the processes that read data
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


@functools.cache
def fork_context():
    """Start the process that commands are forked from; it sees no GPU and no hub, and computes with one thread."""
    with unittest.mock.patch.dict(os.environ, ENV):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    return context


class Running:
    """A script of the project, or any by absolute path, under way in `cwd`; `ranks` are in all, on so many `nodes`."""

    under_way: list["Running"] = []

    def __init__(self, cwd: Path, script: str | Path, *flags: str, ranks: int = 1, nodes: int = 1,
                 env: dict[str, str] | None = None):
        n = sum(1 for _ in cwd.glob(".out-*"))
        self.out, self.err, self.processes = cwd / f".out-{n}", cwd / f".err-{n}", []
        self.out.touch()
        self.err.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks // nodes, "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": probe.getsockname()[1]}
        for rank in range(ranks):
            place = {**shared, "RANK": rank, "LOCAL_RANK": rank % (ranks // nodes)} if ranks > 1 else {}
            whole = {name: str(value) for name, value in place.items()} | (env or {})
            arguments = str(ROOT / script), list(flags), str(cwd), whole, str(self.out), str(self.err)
            self.processes.append(fork_context().Process(target=as_script, args=arguments))
            self.processes[-1].start()
        self.under_way.append(self)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float | None = None) -> Result:
        deadline = time.monotonic() + (seconds or patience())
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        is_late = self.alive()
        self.kill(signal.SIGKILL)
        stdout, stderr = self.out.read_text(), self.err.read_text()
        assert not is_late, f"not done in time; {stdout[-2000:]}\n{stderr[-2000:]}"
        return Result(next((p.exitcode for p in self.processes if p.exitcode), 0), stdout, stderr)

    def kill(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)
            if number == signal.SIGKILL:
                process.join()

    def wait_for_step(self, folder: Path, step: int) -> None:
        """Return as soon as the run in `folder` has logged `step`."""
        wait_for(lambda: last_logged(folder) >= step or not self.alive())
        assert last_logged(folder) >= step, self.wait()


start = Running


def run(cwd: Path, script: str | Path, *flags: str, seconds: float | None = None, **how) -> Result:
    """`start` a script and wait until it ends, which must be within so many `seconds`, or else within our patience."""
    return start(cwd, script, *flags, **how).wait(seconds)


def train(cwd: Path, *flags: str, **how) -> Path:
    """Run train_prx.py, which must succeed; returns the run's folder."""
    result = run(cwd, "train_prx.py", *flags, **how)
    assert result.status == 0, result
    names = ["demo", *(flag.removeprefix("--name=") for flag in flags if flag.startswith("--name="))]
    return cwd / "runs" / names[-1]


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Commands that a failed test did not wait for are ended."""
    yield
    while Running.under_way:
        Running.under_way.pop().kill(signal.SIGKILL)


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, the last of which may be cut."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def loss_weights(log: str) -> dict[str, float]:
    """Term -> weight, as a log's first stage says ("loss 1 flow + 0.5 repa"); a fork may have further ones."""
    terms = re.search(r"^stage 1: .*; loss (.+?)(?:,|$)", log, re.MULTILINE)[1].split(" + ")
    return {name: float(weight) for weight, name in map(str.split, terms)}


def last_logged(folder: Path) -> int:
    return max((line["step"] for line in metrics(folder)), default=0)


def curve(folder: Path, name: str = "loss") -> dict[int, float]:
    """Step -> value, of the training lines of metrics.jsonl; each step is there once."""
    pairs = [(line["step"], line[name]) for line in metrics(folder) if "loss" in line]
    assert len(pairs) == len(dict(pairs)), "a step is logged twice"
    return dict(pairs)


def enliven(folder: Path) -> Path:
    """A run's ema.safetensors in a folder `lively` beside it, with random numbers on all: every layer then matters."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    with safe_open(folder / "ema.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata()
    for tensor in tensors.values():
        tensor += 0.15 * torch.randn(tensor.shape, generator=generator)
    (folder.parent / "lively").mkdir()
    save_file(tensors, folder.parent / "lively/ema.safetensors", metadata=metadata)
    return folder.parent / "lively"


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def checkpoint_tensors(folder: Path) -> dict:
    """Every tensor of a checkpoint, whole, by name ("model.txt_in.weight"); how long the run took is left out."""
    import torch
    import torch.distributed.checkpoint as dcp

    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in found.items()}
    del tensors["progress.seconds"]
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def different(a: dict, b: dict) -> list[str]:
    """Names of tensors that are not the same bits in both."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or a[name].shape != b[name].shape
            or a[name].numpy().tobytes() != b[name].numpy().tobytes()]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the project in which run.sh makes runs/."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "benchmarks", "data", "records", "runs", "tests", "*.lock")
    shutil.copytree(ROOT, tmp_path, ignore=left_out, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """300 scenes at 32 and 64 px; three or so of them are held out."""
    folder = tmp_path_factory.mktemp("data")
    assert run(folder, "tools/scenes.py", "make", "--out=scenes", "--rows=300", "--size=32,64").status == 0
    return folder / "scenes"


@pytest.fixture(scope="session")
def tiny(data) -> list[str]:
    """Flags of a run of 20 steps that takes about two seconds."""
    return [*TINY, f"--data={data}"]


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> Path:
    """Tiny networks of the real classes, with weights: t5gemma/ with a tokenizer, dinov3/, dinov2/."""
    import tokenizers
    import torch
    import transformers as hf

    folder = tmp_path_factory.mktemp("networks")
    words = "<pad> <eos> <bos> <unk> a in the on background top bottom left right large small red blue circle".split()
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                               unk_token="<unk>").save_pretrained(folder / "t5gemma")
    torch.manual_seed(0)
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    gemma = dict(vocab_size=len(words), intermediate_size=48, num_key_value_heads=1, head_dim=12, **shape)
    stacks = dict(encoder=hf.T5GemmaModuleConfig(**gemma), decoder=hf.T5GemmaModuleConfig(**gemma, is_decoder=True))
    v3 = dict(intermediate_size=48, num_register_tokens=4, patch_size=16, image_size=64)
    t5gemma = hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(**stacks, vocab_size=len(words)))
    v2 = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**shape, patch_size=14, image_size=56))
    for name, network in (("t5gemma", t5gemma), ("dinov2", v2),
                          ("dinov3", hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**shape, **v3)))):
        network.save_pretrained(folder / name)
    return folder
