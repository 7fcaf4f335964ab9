"""What makes a step fast and can be seen without a clock; benchmarks/step.py times only what computes as ours does.

    python -m pytest tests/test_benchmarks.py
"""
import contextlib
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import need_diffusers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import train_prx
from benchmarks import step as bench
from tools.plan import sent_bytes, synthetic_batch
from train_prx import (
    EMA, PRX, Config, Frozen, Stage, UserError, build_model, build_optimizer, compiler_trouble, generate,
    load_frozen, train_step, training_loss)

KIND = "machinery"  # of the tests without a mark of their own

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STAGE = Stage(32, 100, 8, True)
SMALL = Config(stages=(STAGE,), patch=8, bottleneck=16, width=64, depth=4, heads=2, text_dim=24, text_tokens=12,
               micro_batch=4, route_start=1, repa_depth=2, repa_dim=24, frozen="random", precision="fp32",
               compile=False, chunks_at_once=2, text_encoder="builtin")


def chunks(n: int, device: torch.device = CPU) -> list[dict[str, Tensor]]:
    return [synthetic_batch(SMALL, STAGE, device, seed) for seed in range(n)]


@pytest.fixture
def judged(networks) -> Config:
    return replace(SMALL, repa_teacher=str(networks / "dinov3"), pdino_model=str(networks / "dinov2"))


@pytest.fixture
def run_steps(judged):
    """A function that runs steps with all four terms on, the first of them without the detector of waits."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def run_them(steps: int, detector: contextlib.AbstractContextManager, device: torch.device = CPU,
                 frozen: bool = True, **changes) -> None:
        cfg = replace(judged, **changes)
        model = build_model(cfg, init_device_mesh(device.type, (1,), mesh_dim_names=("shard",)), device)
        judges = load_frozen(cfg, device) if frozen else Frozen()
        optimizer, ema = build_optimizer(model, cfg), EMA(model)
        batches, oks = iter(chunks(2 * steps, device)), []
        for step in range(steps):
            with detector if step > 0 else contextlib.nullcontext():  # the first step fills caches and compiles
                values, ok = train_step(model, optimizer, ema, judges, batches, cfg, STAGE, step)
                oks.append(ok)
        assert all(map(bool, oks))
        assert {"loss", "flow", *(["lpips", "pdino", "repa"] if frozen else []), "grad_norm"} <= values.keys()

    yield run_them
    dist.destroy_process_group()


class HostWaits(TorchDispatchMode):
    """Raises where an operation's result, or its shape, has to be known to the host: a GPU's host would wait there."""

    WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal",
             "aten::is_nonzero", "aten::_unique2", "aten::unique_dim", "aten::bincount"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.name() == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        uncounted = func.name() == "aten::repeat_interleave.Tensor" and not (kwargs or {}).get("output_size")
        if func.name().split(".")[0] in self.WAITS or by_mask or uncounted:
            raise AssertionError(f"the host waits for {func.name()}")
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# The host and the compiler


def test_no_operation_of_a_step_waits_for_the_device(run_steps):
    run_steps(2, HostWaits())


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()),
    lambda x: x.masked_select(x > 0), lambda x: torch.repeat_interleave(x.long().clamp(0))])
def test_the_detector_sees_a_wait(wait):
    with pytest.raises(AssertionError, match="the host waits"), HostWaits():
        wait(torch.tensor([0.0, 1.0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's own detector needs a GPU")
def test_no_operation_of_a_step_waits_for_a_gpu(run_steps):
    @contextlib.contextmanager
    def detector():
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")

    run_steps(2, detector(), CUDA, precision="bf16", compile=True)


def test_the_forward_for_a_gpu_stays_on_it(monkeypatch):
    """On tensors without memory whose device is a GPU: any value that the host asks for, and any tensor left behind on
    the CPU, raises. Flash attention and the frozen networks are played by their shapes."""
    cfg, calls = replace(SMALL, precision="bf16"), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(train_prx, "varlen_attn", lambda q, *others: calls.append(1) or torch.empty_like(q))
    with FakeTensorMode():
        with torch.device("meta"):
            model = PRX(cfg)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, device=CUDA, dtype=torch.bfloat16)))
        batch = {"x0": torch.empty(8, 3, 32, 32, device=CUDA), "txt": torch.empty(8, 12, 24, device=CUDA),
                 "txt_mask": torch.empty(8, 12, dtype=torch.bool, device=CUDA)}
        judges = Frozen(teacher=lambda x0: torch.empty(len(x0), 16, 24, device=CUDA),
                        pdino=lambda image: image.flatten(2), lpips=lambda a, b: (a - b).square().mean((1, 2, 3)))
        loss, terms = training_loss(model, judges, batch, cfg, STAGE, [None, None])
        assert {x.device.type for x in (loss, *terms.values())} == {"cuda"} and len(terms) >= len(calls) == 4


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break_and_compiles_twice(run_steps):
    """Two graphs, routed and dense, for four batches of as many lengths; a block that broke would raise (fullgraph)."""
    assert not compiler_trouble(CPU)  # which compiles a line once a process
    counters.clear()
    run_steps(4, contextlib.nullcontext(), frozen=False, compile=True)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2, counters


def test_frozen_networks_compile_without_a_graph_break(monkeypatch, judged):
    """DINOv3, DINOv2 and LPIPS, as graphs that run uncompiled, give the same within 1e-5 of their norm."""
    x0 = chunks(1)[0]["x0"]

    def features(frozen: Frozen) -> list[Tensor]:
        return [frozen.teacher(x0), frozen.pdino(x0), frozen.lpips(x0, x0.flip(0)).flatten()]

    plain = features(load_frozen(judged, CPU))
    counters.clear()
    real = torch.compile  # traced, and what was traced runs as it is: a compiler takes a minute for VGG16
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: real(*args, **{**kwargs, "backend": "eager"}))
    traced = features(load_frozen(replace(judged, compile=True), CPU))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 3, counters
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(traced, plain))


# ---------------------------------------------------------------------------------------------------------------------
# Work that is not done twice


@pytest.mark.parametrize("guidance, passes", [("cfg", 6), ("self", 12), ("none", 6)])
def test_sampling_reads_a_prompt_once_whatever_the_steps(guidance, passes):
    model, calls = PRX(replace(SMALL, repa_weight=0.0)), []
    for name, module in (("txt_in", model.txt_in), ("kv", model.blocks[2].txt_kv_proj), ("model", model)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    batch = chunks(1)[0]
    generate(model, batch["txt"][:2], batch["txt_mask"][:2], null_txt=torch.zeros(1, 12, 24),
             null_mask=batch["txt_mask"][:1], size=(32, 32), steps=6, guidance=guidance, scale=2.0, drop=0.5,
             seeds=[1, 2], shift=3.0)
    assert sorted(calls) == ["kv", *["model"] * passes, "txt_in"]


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/step.py, and what tools/plan.py simulates


@pytest.mark.parity
@pytest.mark.parametrize("name", ["diffusers-routed", "diffusers"])
def test_an_arm_computes_our_loss_and_gradients_with_all_four_terms(judged, name):
    """Losses differ by less than 1e-5, cosines of gradients from 1 by less than 1e-8; a matrix 10% off is noticed."""
    need_diffusers()
    with bench.rank_of(1, 0, 8, CPU) as mesh:
        frozen = load_frozen(judged, CPU)
        ours = bench.Ours(judged, STAGE, frozen, mesh, CPU)
        theirs = bench.Assembled(name, judged, STAGE, frozen, mesh, CPU, ours)
        batch, other = chunks(2)
        found = re.fullmatch(r"loss [\d.]+, (\S+) apart; cosine of the gradients 1 - (\S+), of \S+, the least alike, "
                             r"1 - (\S+)", bench.compare(ours, theirs, batch))
        assert float(found[1]) < 1e-5 and float(found[2]) < 1e-8 and float(found[3]) < 1e-8
        assert bool(theirs.step([batch, other], 0))
        with torch.no_grad():
            theirs.model.net.blocks[1].gate_proj.weight.mul_(1.1)
        with pytest.raises(UserError, match="does not compute what ours does"):
            bench.compare(ours, theirs, batch)


def test_the_bytes_that_a_plan_simulates_are_those_of_a_real_step():
    """Rank 9 of 32 in nodes of 8 takes a step of two chunks; weights and gradients move once, Muon's on average."""
    cfg = replace(SMALL, micro_batch=2, precision="bf16", chunks_at_once=1, frozen="none", repa_weight=0.0)
    stage = Stage(32, 1, 4 * 32, False)
    batches = iter([synthetic_batch(cfg, stage, CPU)] * 2)
    with bench.rank_of(32, 9, 8, CPU) as mesh, bench.loop_back() as traffic:
        model = build_model(cfg, mesh, CPU)
        train_step(model, build_optimizer(model, cfg), EMA(model), Frozen(), batches, cfg, stage, 0)
    within, beyond = sent_bytes(cfg, 32, 8)
    weights = sum(p.numel() for p in PRX(cfg).parameters())
    sums = 2 * (1 - 1 / 4) * 4 * weights / 8  # of gradients, between nodes: an all-reduce, which `traffic` leaves out
    assert traffic[tuple(range(8, 16))][0] == pytest.approx(within, rel=0.1)
    assert traffic[(1, 9, 17, 25)][0] == pytest.approx(beyond - sums, rel=0.3)
