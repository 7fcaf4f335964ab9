"""What makes a step fast and can be seen without a clock: no graph break, no wait of the host, text without padding.

    python -m pytest tests/test_speed.py
"""
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_prx  # noqa: E402
from train_prx import (EMA, PRX, Config, Frozen, Meter, Stage, build_model, build_optimizer, generate, load_frozen,  # noqa: E402
                       term_names, train_step, training_loss)

pytestmark = pytest.mark.machinery

STAGE = Stage(32, 100, 8, True)
SMALL = Config(stages=(STAGE,), patch=8, bottleneck=16, width=64, depth=4, heads=2, text_dim=24, text_tokens=12, micro_batch=4,
               route_start=1, repa_depth=2, repa_dim=24, frozen="random", precision="fp32", compile=False, chunks_at_once=2)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def batch(lengths: list[int], seed: int = 0, device: torch.device = CPU) -> dict[str, Tensor]:
    """A chunk with captions of so many tokens, as `make_batch` returns it."""
    generator = torch.Generator().manual_seed(seed)
    return {"x0": torch.rand(len(lengths), 3, 32, 32, generator=generator).to(device) * 2 - 1,
            "txt": torch.randn(sum(lengths), 24, generator=generator).to(device),
            "txt_mask": (torch.arange(12) < torch.tensor(lengths)[:, None]).to(device)}


@pytest.fixture
def run_steps(networks):
    """A function that runs steps with all four terms on and returns whether all were taken."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def run(cfg: Config, steps: list[list[dict[str, Tensor]]], device: torch.device = CPU, frozen: bool = True) -> bool:
        cfg = replace(cfg, repa_teacher=str(networks / "dinov3"), pdino_model=str(networks / "dinov2"))
        mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
        model = build_model(cfg, mesh, device)
        optimizer, ema, judges = build_optimizer(model, cfg), EMA(model), load_frozen(cfg, device) if frozen else Frozen()
        meter = Meter(["loss", *term_names(cfg, judges, STAGE), "grad_norm"], mesh, device)
        watched = {"blocks.0": list(model.blocks[0].parameters())}
        oks = []
        for step, chunks in enumerate(steps):
            detector = no_wait_of_the_gpu() if device == CUDA else contextlib.nullcontext() if cfg.compile else HostWaits()
            with detector if step > 0 else contextlib.nullcontext():  # the first step fills caches and compiles
                values, ok, norms = train_step(model, optimizer, ema, judges, iter(chunks), cfg, STAGE, step, watched)
                meter.add(values, ok)
                oks.append(ok)
        assert term_names(cfg, judges, STAGE) == (["flow", "lpips", "pdino", "repa"] if frozen else ["flow"])
        return all(map(bool, oks))

    yield run
    dist.destroy_process_group()


class HostWaits(TorchDispatchMode):
    """Raises where an operation's result, or its shape, has to be known to the host: on a GPU the host would wait there."""

    WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
             "aten::_unique2", "aten::unique_dim", "aten::bincount"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.name() == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        uncounted = func.name() == "aten::repeat_interleave.Tensor" and not (kwargs or {}).get("output_size")
        if func.name().split(".")[0] in self.WAITS or by_mask or uncounted:
            raise AssertionError(f"the host waits for {func.name()}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_wait_of_the_gpu():
    """torch's own detector raises where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHUNKS = [[batch([5, 12, 1, 7]), batch([3, 4, 9, 2], 1)], [batch([2, 2, 8, 6], 2), batch([12, 11, 10, 9], 3)]]


# ---------------------------------------------------------------------------------------------------------------------
# The host


def test_no_operation_of_a_step_waits_for_the_device(run_steps):
    assert run_steps(SMALL, CHUNKS)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()),
                                  lambda x: x.masked_select(x > 0), lambda x: torch.repeat_interleave(x.long().clamp(0))])
def test_the_detector_sees_a_wait(wait):
    with pytest.raises(AssertionError, match="the host waits"), HostWaits():
        wait(torch.tensor([0.0, 1.0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own detector needs a GPU")
def test_no_operation_of_a_step_waits_for_a_gpu(run_steps):
    chunks = [[batch([5, 12, 1, 7], i, CUDA), batch([3, 4, 9, 2], i, CUDA)] for i in range(4)]
    assert run_steps(replace(SMALL, precision="bf16", compile=True), chunks, CUDA)


def test_the_forward_for_a_gpu_stays_on_it(monkeypatch):
    """On tensors without memory whose device is a GPU: any value that the host asks for, and any tensor left behind on the
    CPU, raises. Flash attention and the frozen networks are played by their shapes."""
    cfg = replace(SMALL, precision="bf16")
    monkeypatch.setattr(train_prx, "has_flash_attention", lambda img, head_dim: True)
    monkeypatch.setattr(train_prx, "varlen_attn", lambda q, k, v, *where: torch.empty_like(q))
    with FakeTensorMode():
        with torch.device("meta"):
            model = PRX(cfg)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device=CUDA, dtype=torch.bfloat16)))
        packed = {"x0": torch.empty(8, 3, 32, 32, device=CUDA), "txt": torch.empty(40, 24, device=CUDA),
                  "txt_mask": torch.empty(8, 12, dtype=torch.bool, device=CUDA)}
        judges = Frozen(teacher=lambda x0: torch.empty(len(x0), 16, 24, device=CUDA), pdino=lambda image: image.flatten(2),
                        lpips=lambda a, b: (a - b).square().mean((1, 2, 3)))
        loss, terms = training_loss(model, judges, packed, cfg, STAGE, [None, None])
        assert {x.device.type for x in (loss, *terms.values())} == {"cuda"} and len(terms) == 4
        with pytest.raises(DataDependentOutputException):
            loss.item()


# ---------------------------------------------------------------------------------------------------------------------
# The compiler


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break_and_one_compilation_for_every_length_of_text(run_steps):
    """Two graphs, routed and dense, for four batches of as many lengths; a block that broke would raise (fullgraph)."""
    counters.clear()
    assert run_steps(replace(SMALL, compile=True), [*CHUNKS, [batch([1, 1, 1, 1]), batch([1, 1, 1, 2])]], frozen=False)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2, counters


def test_frozen_networks_compile_without_a_graph_break(monkeypatch, networks):
    """DINOv3, DINOv2 and LPIPS, as graphs that run uncompiled; compiled ones give the same within 1e-5 of their norm."""
    cfg = replace(SMALL, repa_teacher=str(networks / "dinov3"), pdino_model=str(networks / "dinov2"))
    x0 = batch([1, 1])["x0"]

    def features(frozen: Frozen) -> list[Tensor]:
        return [frozen.teacher(x0), frozen.pdino(x0), frozen.lpips(x0, x0.flip(0)).flatten()]

    plain = features(load_frozen(cfg, CPU))
    counters.clear()
    with monkeypatch.context() as patch:  # traced, and what was traced runs as it is: a compiler takes a minute for VGG16
        real = torch.compile
        patch.setattr(torch, "compile", lambda *args, **kwargs: real(*args, **{**kwargs, "backend": "eager"}))
        traced = features(load_frozen(replace(cfg, compile=True), CPU))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 3, counters
    for a, b in zip(traced, plain):
        assert (a - b).norm() <= 1e-5 * b.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Work that is not done twice


def test_sampling_reads_a_prompt_once_whatever_the_steps():
    cfg = replace(SMALL, repa_weight=0.0)
    model = PRX(cfg)
    calls = {"txt_in": 0, "txt_kv": 0, "model": 0}

    def count(name: str):
        def hook(module, args, output):
            calls[name] += 1
        return hook

    model.txt_in.register_forward_hook(count("txt_in"))
    model.blocks[2].txt_kv_proj.register_forward_hook(count("txt_kv"))
    model.register_forward_hook(count("model"))
    txt, mask = torch.randn(2, 12, 24), torch.arange(12) < torch.tensor([[5], [9]])
    for guidance, passes in (("cfg", 6), ("self", 12), ("none", 6)):
        calls.update(dict.fromkeys(calls, 0))
        generate(model, txt, mask, null_txt=torch.zeros(1, 12, 24), null_mask=mask[:1], size=(32, 32), steps=6, guidance=guidance,
                 scale=2.0, drop=0.5, seeds=[1, 2], shift=3.0)
        assert calls == {"txt_in": 1, "txt_kv": 1, "model": passes}, (guidance, calls)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_chunks_that_pass_together_give_the_step_of_chunks_that_pass_one_by_one(run_steps, at_once):
    """Equal draws for each chunk; the sums differ in their order only. 4 chunks of 4 rows, three terms."""
    stage = replace(STAGE, global_batch=16)
    cfg = replace(SMALL, stages=(stage,), lpips_weight=0.0, frozen="none")

    def weights(at_once: int) -> tuple[Tensor, Tensor]:
        model = build_model(cfg, init_device_mesh("cpu", (1,)), CPU)
        optimizer, ema = build_optimizer(model, cfg), EMA(model)
        for step in range(2):
            chunks = iter([batch([5, 12, 1, 7], i) for i in range(4)])
            values, ok, _ = train_step(model, optimizer, ema, Frozen(), chunks, replace(cfg, chunks_at_once=at_once), stage, step, {})
        return torch.cat([p.detach().to_local().flatten() for p in model.parameters()]), values

    (one, loss), (together, other) = weights(1), weights(at_once)
    assert (one - together).norm() < 1e-5 * one.norm() and (loss - other).abs().max() < 1e-5
