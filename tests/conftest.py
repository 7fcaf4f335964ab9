"""What the end-to-end tests share: a small data set, and commands run as a user runs them, in processes of their own.

Importing torch, datasets and transformers takes longer than a tiny run. So `start` forks each command from one process
that has them imported already, and runs the script there as `python SCRIPT` would. Where torchrun or a bare `python` is
the claim, tests start that instead.
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
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # so that run.sh finds what runs these tests
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", "TORCH_CPP_LOG_LEVEL": "ERROR",
       "PYTHONUNBUFFERED": ""}  # which some have set, and most have not
PRELOADED = ["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torchvision",
             "datasets", "transformers", "safetensors.torch", "PIL.Image", "tqdm", "matplotlib.figure",
             "matplotlib.backends.backend_agg", "diffusers.pipelines.prx.pipeline_prx_pixel"]

# A model and a schedule small enough for 20 steps a second; `data` is added by the fixture `tiny`. 4 chunks a step.
TINY = ["--preset=demo", "--stages=32:20:16:1", "--micro_batch=4", "--patch=8", "--bottleneck=16", "--width=32",
        "--depth=3", "--heads=2", "--drop=0.5", "--route_start=1", "--route_end=2", "--text_dim=32", "--repa_depth=2",
        "--repa_dim=16", "--compile=0", "--log_every=1", "--sample_steps=2", "--eval_every=0", "--sample_every=0", "--save_every=0"]


# Body of a script that trains and writes down which rows each rank's chunks hold
KEYS = """
import json, os, sys
sys.path.insert(0, {root!r})
import train_prx
honest = train_prx.load_chunks

def load_chunks(*arguments):
    for raw in honest(*arguments):
        with open("keys-" + os.environ.get("RANK", "0"), "a") as file:
            file.write(json.dumps(raw["keys"]) + "\\n")
        yield raw

train_prx.load_chunks = load_chunks
train_prx.run_main(train_prx.main)
"""


def our_lines(stderr: str) -> list[str]:
    """What stderr holds of ours, and tracebacks: other lines are a library's, and change with its version."""
    ours = re.compile("error: |warning: |starting again|.*Traceback|Exception ignored|Fatal Python error|"
                      rf"{re.escape(str(ROOT))}/(?!.*site-packages).*Warning: ")  # what Python says of a line of ours
    return [line for line in stderr.splitlines() if ours.match(line)]


class Result(NamedTuple):
    """What a command left behind: its exit status (minus the signal where one ended it) and what it printed."""
    status: int
    stdout: str
    stderr: str

    def ours(self) -> list[str]:
        """`our_lines` of what it wrote to stderr."""
        return our_lines(self.stderr)

    def error(self) -> str:
        """The one line that a user's mistake is answered with; fails where we say anything else."""
        lines = self.ours()
        assert self.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), self
        assert "Traceback" not in self.stdout, self
        return lines[0]


@functools.cache
def patience(times: float = 30) -> float:
    """Seconds until a command has failed: `times` what it took to import torch and to multiply, when the tests began."""
    return times * pace()


@functools.cache
def pace() -> float:
    """Seconds of a process that imports torch and multiplies for a moment: three on a quiet machine of two cores."""
    began = time.monotonic()
    work = "import torch; a = torch.randn(512, 512); [a @ a for _ in range(100)]"
    subprocess.run([sys.executable, "-c", work], env=os.environ | ENV, check=True)
    return max(1.0, time.monotonic() - began)


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
    before = {name: os.environ.get(name) for name in ENV}
    os.environ.update(ENV)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    return context


MARKS = {
    "recipe": "the numbers of the recipe: a fork that changes it fails these, and may",
    "parity": "against diffusers, torch.optim, a closed form or float64",
    "machinery": "data, runs, ranks, commands: must hold in every fork",
    "slow": "only with ./run.sh test --all",
}


def need_diffusers() -> None:
    """Skip the test where there can be no diffusers; where it can be and is not, the test fails."""
    if sys.version_info < (3, 11):
        pytest.skip("diffusers 0.42 takes Python 3.11")


def pytest_configure(config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.option.strict_markers = True


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        assert any(item.get_closest_marker(name) for name in ("recipe", "parity", "machinery")), f"{item.nodeid} has no mark"


UNDER_WAY: list["Running"] = []


class Running:
    """A command under way on one or more ranks."""

    def __init__(self, cwd: Path, script: str | Path, flags: list[str], ranks: int, nodes: int, env: dict[str, str]):
        script = str(ROOT / script)  # ROOT is left out where `script` is an absolute path
        n = sum(1 for _ in cwd.glob(".out-*"))
        self.out, self.err = cwd / f".out-{n}", cwd / f".err-{n}"
        self.out.touch()
        self.err.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            a_node = ranks // nodes
            ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank % a_node), "WORLD_SIZE": str(ranks),
                      "LOCAL_WORLD_SIZE": str(a_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
            arguments = script, flags, str(cwd), {**ranked, **env}, str(self.out), str(self.err)
            self.processes.append(fork_context().Process(target=as_script, args=arguments))
            self.processes[-1].start()
        UNDER_WAY.append(self)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float | None = None) -> Result:
        seconds = seconds or patience()
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        self.kill(signal.SIGKILL)
        stdout, stderr = self.out.read_text(), self.err.read_text()
        assert not late, f"not done after {seconds:.0f} s; {stdout[-2000:]}\n{stderr[-2000:]}"
        return Result(next((p.exitcode for p in self.processes if p.exitcode), 0), stdout, stderr)

    def kill(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    def wait_for_step(self, folder: Path, step: int) -> None:
        """Return as soon as the run in `folder` has logged `step`."""
        deadline = time.monotonic() + patience()
        while True:
            file = folder / "metrics.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            if any(line.startswith(f'{{"step": {step},') for line in lines):
                return
            assert self.alive(), self.wait()
            assert time.monotonic() < deadline, f"no step {step} after {patience():.0f} s"
            time.sleep(0.005)


def start(cwd: Path, script: str | Path, *flags: str, ranks: int = 1, nodes: int = 1,
          env: dict[str, str] | None = None) -> Running:
    """Start a script of the project, or any by absolute path, in `cwd`; `ranks` are in all, on so many `nodes`."""
    return Running(Path(cwd), script, list(flags), ranks, nodes, env or {})


def run(cwd: Path, script: str | Path, *flags: str, ranks: int = 1, nodes: int = 1, env: dict[str, str] | None = None,
        seconds: float | None = None) -> Result:
    """Run a script to its end, which must come within so many `seconds`, or else within our patience."""
    return start(cwd, script, *flags, ranks=ranks, nodes=nodes, env=env).wait(seconds)


def train(cwd: Path, *flags: str, ranks: int = 1, nodes: int = 1) -> Path:
    """Run train_prx.py, which must succeed; returns the run's folder."""
    result = run(cwd, "train_prx.py", *flags, ranks=ranks, nodes=nodes)
    assert result.status == 0, result
    name = [flag for flag in flags if flag.startswith("--name=")]
    return cwd / "runs" / (name[-1].removeprefix("--name=") if name else "demo")


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, name: str = "loss") -> dict[int, float]:
    """Step -> value, of the training lines of metrics.jsonl; each step is there once."""
    pairs = [(line["step"], line[name]) for line in metrics(folder) if "loss" in line]
    assert len(pairs) == len(dict(pairs)), "a step is logged twice"
    return dict(pairs)


def enliven(folder: Path) -> Path:
    """A run's ema.safetensors with random numbers on all weights, in a folder `lively` beside it: every prompt, seed, layer
    and setting then matters."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(folder / "ema.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):  # the order in the file is free
        tensors[name] += 0.15 * torch.randn(tensors[name].shape, generator=generator)
    (folder.parent / "lively").mkdir()
    save_file(tensors, folder.parent / "lively/ema.safetensors", metadata=metadata)
    return folder.parent / "lively"


def last_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def checkpoint_tensors(folder: Path) -> dict:
    """Every tensor of a checkpoint, whole, by name ("model.txt_in.weight"); how long the run took is left out."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = folder.parent / f".whole-{folder.name}.pt"
    dcp_to_torch_save(folder, whole)
    tensors = torch.load(whole)
    whole.unlink()
    flat = {}

    def walk(prefix: str, value) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            flat[prefix] = value

    walk("", tensors)
    del flat["progress.seconds"]
    return flat


def different(a: dict, b: dict) -> list[str]:
    """Names of tensors that are not the same bits in both."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or a[name].shape != b[name].shape
            or a[name].numpy().tobytes() != b[name].numpy().tobytes()]


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Commands that a failed test did not wait for are ended."""
    yield
    for running in UNDER_WAY:
        running.kill(signal.SIGKILL)
    UNDER_WAY.clear()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the project in which run.sh makes runs/."""
    for name in ("run.sh", "requirements.txt", *(file.name for file in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """300 scenes at 32 and 64 px; three or so of them are held out."""
    folder = tmp_path_factory.mktemp("data")
    assert run(folder, "scenes.py", "make", "--out=scenes", "--rows=300", "--size=32,64").status == 0
    return folder / "scenes"


@pytest.fixture(scope="session")
def tiny(data) -> list[str]:
    """Flags of a run of 20 steps that takes about two seconds."""
    return [*TINY, f"--data={data}"]


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> Path:
    """Tiny networks of the real classes, with weights: t5gemma/ with a tokenizer, dinov3/, dinov2/."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Dinov2WithRegistersConfig, Dinov2WithRegistersModel, DINOv3ViTConfig, DINOv3ViTModel, PreTrainedTokenizerFast,
        T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig)

    folder = tmp_path_factory.mktemp("networks")
    words = "<pad> <eos> <bos> <unk> a in the on background top bottom left right large small red blue circle".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                            unk_token="<unk>").save_pretrained(folder / "t5gemma")
    torch.manual_seed(0)
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    gemma = dict(vocab_size=len(words), intermediate_size=48, num_key_value_heads=1, head_dim=12, **shape)
    T5GemmaForConditionalGeneration(T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**gemma), decoder=T5GemmaModuleConfig(**gemma, is_decoder=True),
        vocab_size=len(words))).save_pretrained(folder / "t5gemma")
    DINOv3ViTModel(DINOv3ViTConfig(**shape, intermediate_size=48, num_register_tokens=4, patch_size=16,
                                   image_size=64)).save_pretrained(folder / "dinov3")
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, patch_size=14,
                                                       image_size=56)).save_pretrained(folder / "dinov2")
    return folder
