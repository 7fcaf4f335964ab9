"""muon.py: Newton-Schulz against its scalar polynomials, one optimizer against torch.optim and float64 textbook forms,
and sharded over 2, 3 and 4 gloo processes, in one dimension and two, against itself unsharded; benchmarks/muon.py.
Measured errors, on the CPU of torch 2.14, stand beside each tolerance.

    OMP_NUM_THREADS=1 pytest tests/test_muon.py
"""
import datetime
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import fork_context
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import muon
from benchmarks import muon as bench
from muon import Muon, Owners, assign_owners, newton_schulz, newton_schulz_cost
from train_prx import UserError

KIND = "parity"  # of the tests without a mark of their own

SHAPES = [(48, 32), (32, 48), (40, 40), (40, 40), (96, 24), (24, 96)]  # tall, wide, square, two alike
RECORD = [(5376, 1792), (3584, 1792), (1792, 1792), (6272, 1792), (6272, 1792), (1792, 6272), (10752, 1792)] * 16
# Rows that do not divide among 2, 3 or 4 ranks, fewer rows than ranks, two shapes alike; the last two are Adam's
UNEVEN = dict(a=(7, 5), b=(10, 6), c=(2, 9), d=(6, 8), e=(6, 8), f=(1, 4), g=(33, 8), bias=(5,), scale=(3, 2))
DEFAULT = list(muon.NS_COEFFICIENTS)
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),  # arXiv 2505.16932
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


@pytest.fixture(autouse=True)
def jordan(monkeypatch):
    """A fork that has other coefficients fails only what is marked `recipe`."""
    monkeypatch.setattr(muon, "NS_COEFFICIENTS", JORDAN)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(shapes) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]


def set_gradients(params, step: int, scale: float = 1.0) -> None:
    """Gradients that are a function of (place in the list, step), so that every optimizer sees the same."""
    for i, p in enumerate(params):
        whole = scale * randn(*p.shape, seed=7_000_000 + step * 1000 + i)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def muon_group(params, **changes) -> dict:
    return {"params": params, "use_muon": True, "lr": 0.02, **changes}


def uneven(mesh=None, names: str = " ".join(UNEVEN)) -> tuple[nn.Module, Muon]:
    """A module with parameters of these names, sharded over a mesh or whole, and its optimizer."""
    model = nn.Module()
    for name in names.split():
        model.register_parameter(name, nn.Parameter(randn(*UNEVEN[name], seed=list(UNEVEN).index(name))))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    adam = (p for name, p in model.named_parameters() if name in ("bias", "scale"))
    matrices = (p for name, p in model.named_parameters() if name not in ("bias", "scale"))
    return model, Muon([muon_group(matrices, ns_dtype=torch.float32, weight_decay=0.1),
                        {"params": adam, "use_muon": False, "lr": 0.01, "weight_decay": 0.1}])


def snapshot(model: nn.Module, optimizer: Muon) -> list[bytes]:
    """The bits of each parameter and its state."""
    return [b"".join(t.detach().numpy() for t in (p, *optimizer.state[p].values())) for p in model.parameters()]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def from_svd(shape, values: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 matrix [m, n] with the given singular values and random singular vectors U, V; and U V^T."""
    U, V = (torch.linalg.qr(randn(d, len(values), seed=i, dtype=torch.float64))[0] for i, d in enumerate(shape))
    return U * values @ V.T, U @ V.T


def polynomial(x: Tensor, coefficients: list) -> Tensor:
    """What Newton-Schulz does to one singular value."""
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 9), (9, 1)])
@pytest.mark.parametrize("coefficients", [JORDAN, POLAR_EXPRESS])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_each_singular_value_goes_through_the_polynomials_and_its_vectors_stay(shape, coefficients, steps, monkeypatch):
    monkeypatch.setattr(muon, "NS_COEFFICIENTS", coefficients)
    s = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    G, _ = from_svd(shape, s)
    expected, _ = from_svd(shape, polynomial(s / s.norm(), coefficients[:steps]))  # the Frobenius norm divides first
    assert relative(newton_schulz(G, steps), expected) < 1e-10  # measured at most 5e-15 (float64)
    assert relative(newton_schulz(G.float(), steps), expected) < 1e-4  # measured at most 4e-6 (fp32)


@pytest.mark.recipe
def test_the_default_is_jordans_quintic_and_what_it_promises_holds():
    """Of all x in [0, 1] none ends above 1.21, and those from 1 / 760 on end above 0.6."""
    assert DEFAULT == JORDAN and muon.MUON_DEFAULTS["ns_steps"] == 5
    x = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    assert polynomial(x[x >= 1 / 760], DEFAULT).min() > 0.6 and polynomial(x, DEFAULT).max() < 1.21  # 0.606 and 1.202


@pytest.mark.parametrize("coefficients, off, error", [(JORDAN, 0.317, 0.193), (POLAR_EXPRESS, 0.141, 0.092)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_singular_value_ends_above_13_and_polar_express_is_nearer_to_1(coefficients, off, error, dtype, monkeypatch):
    monkeypatch.setattr(muon, "NS_COEFFICIENTS", coefficients)
    for shape in ((64, 96), (96, 64), (64, 64)):
        G, polar = from_svd(shape, torch.logspace(0, -2, 64, dtype=torch.float64))
        out = newton_schulz(G.to(dtype), 5).double()
        assert (torch.linalg.svdvals(out) - 1).abs().max().item() == pytest.approx(off, abs=0.01)  # measured 0.001
        assert relative(out, polar) == pytest.approx(error, abs=0.01)  # measured 0.002
    low = from_svd((48, 64), torch.tensor([1.0, 0.5, 1e-3], dtype=torch.float64))[0]
    steep = from_svd((64, 64), torch.logspace(0, -12, 64, dtype=torch.float64))[0]
    for G in (torch.ones(96, 32), low, steep, torch.zeros(16, 24), randn(1, 64, seed=0), 1e15 * steep, 1e-15 * steep):
        out = newton_schulz(G.to(dtype), 5).double()
        assert out.isfinite().all() and torch.linalg.svdvals(out).max() <= 1.3  # measured at most 1.202


@pytest.mark.machinery
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_gives_what_its_matrices_give_alone_whatever_their_scale_sign_and_orientation(shape):
    batch = randn(2, 3, *shape, seed=5) * torch.logspace(-3, 3, 6).reshape(2, 3, 1, 1)  # each by its own norm
    before, out = batch.clone(), newton_schulz(batch, 5)
    alone = torch.stack([newton_schulz(G, 5) for G in batch.flatten(0, 1)]).unflatten(0, (2, 3))
    assert out.shape == batch.shape and torch.equal(batch, before)
    assert (out - alone).abs().max() <= 1e-6  # entries up to 0.5; measured 0
    assert relative(newton_schulz(batch.mT, 5), out.mT) < 1e-5  # measured at most 1.4e-6
    assert relative(newton_schulz(-1e3 * batch, 5), -out) < 1e-5  # measured at most 1.1e-6
    assert newton_schulz(batch.bfloat16(), 5).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_optim_muon_and_in_fp32_the_textbook_in_float64(weight_decay, nesterov):
    ours, theirs, in_fp32, start = (weights(SHAPES) for _ in range(4))
    same = dict(lr=0.2, momentum=0.95, nesterov=nesterov, ns_steps=5, weight_decay=weight_decay)
    optimizer = Muon([muon_group(ours, **same), muon_group(in_fp32, ns_dtype=torch.float32, **same)])
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **same)
    W, M = [p.detach().double() for p in start], [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for step in range(6):
        for params in (ours, theirs, in_fp32):
            set_gradients(params, step)
        optimizer.step()
        reference.step()
        for i, (a, b, p, w) in enumerate(zip(ours, theirs, in_fp32, start)):
            # Newton-Schulz in bf16 on both sides, which alone is 2e-2 from fp32: measured at most 5e-7, mostly 0
            assert relative(a - w, b - w) < 4e-2
            assert relative(optimizer.state[a]["momentum"], reference.state[b]["momentum_buffer"]) < 1e-6  # measured 0
            g = p.grad.double()
            M[i] = 0.95 * M[i] + 0.05 * g
            U, s, V = torch.linalg.svd(0.05 * g + 0.95 * M[i] if nesterov else M[i], full_matrices=False)
            O = U * polynomial(s / s.norm(), JORDAN) @ V
            W[i] = W[i] - 0.2 * weight_decay * W[i] - 0.2 * 0.2 * max(p.shape) ** 0.5 * O
            assert relative(p.double() - w, W[i] - w) < 1e-5  # measured at most 2e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas, eps", [((0.9, 0.95), 1e-8), ((0.8, 0.9), 0.3)])
def test_adam_groups_equal_torch_optim_each_with_its_settings(weight_decay, betas, eps):
    ours, theirs, start = (weights([(17,), (9, 5), (), (3, 4, 2)]) for _ in range(3))
    same = dict(betas=betas, eps=eps, weight_decay=weight_decay)
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam  # decay is decoupled
    reference = kind([{"params": theirs[:2], "lr": 0.1}, {"params": theirs[2:], "lr": 0.01}], **same)
    optimizer = Muon([{"params": ours[:2], "use_muon": False, "lr": 0.1, **same},
                      {"params": ours[2:], "use_muon": False, "lr": 0.01, **same}])
    for step in range(10):
        for params in (ours, theirs):
            set_gradients(params, step, scale=10.0 ** (step % 4 - 3))  # small ones too, where eps counts
        optimizer.step()
        reference.step()
        for a, b, w in zip(ours, theirs, start):
            assert relative(a - w, b - w) < 1e-5  # of the update; measured at most 2e-6


@pytest.mark.machinery
@pytest.mark.parametrize("group, named", [
    (dict(use_muon=True, betas=0.1), "betas"), (dict(use_muon=False, momentum=0.1), "momentum"),
    (dict(use_muon=True, learning_rate=0.1), "learning_rate"), (dict(use_muon=1), "use_muon"), ({}, "use_muon"),
    (dict(use_muon=True, params=weights([(4, 4), (2, 3, 4)])), r"matrices only, not shapes \[\(2, 3, 4\)\]"),
    (dict(use_muon=True, ns_steps=6), "ns_steps=6, but muon.NS_COEFFICIENTS has 5 steps")])
def test_a_group_that_muon_cannot_step_raises_and_says_why(group, named):
    with pytest.raises(ValueError, match=named):
        Muon([{"params": weights([(4, 4)]), **group}])
    with pytest.raises(ValueError, match="ns_steps=6, but"):
        newton_schulz(randn(4, 4, seed=0), 6)


@pytest.mark.machinery
@pytest.mark.parametrize("bad, without", [(1e15, "a"), (float("inf"), "b d bias"), (float("nan"), " ".join(UNEVEN))])
def test_a_skipped_step_or_parameter_might_as_well_not_have_been_and_grad_scale_multiplies_gradients(bad, without):
    """Bit for bit, the very first step included: Adam's bias correction counts steps taken, not asked for."""
    (a, skipping), (b, plain) = uneven(), uneven()
    for step in range(4):
        set_gradients(a.parameters(), step, bad)
        skipping.step(torch.tensor(0.0), grad_scale=torch.tensor(bad))
        assert snapshot(a, skipping) == snapshot(b, plain)
        set_gradients(a.parameters(), step, 4.0)
        set_gradients(b.parameters(), step)
        skipping.step(torch.tensor(1.0), grad_scale=torch.tensor(0.25))
        plain.step()
        assert snapshot(a, skipping) == snapshot(b, plain)
    before = snapshot(a, skipping)
    for name in without.split():
        getattr(a, name).grad = None
    skipping.step(grad_scale=torch.tensor(0.25))
    plain.step()
    for name, found, old, new in zip(UNEVEN, snapshot(a, skipping), before, snapshot(b, plain)):
        assert found == (old if name in without.split() else new)


@pytest.mark.machinery
def test_a_compiled_step_equals_an_uncompiled_one_skipped_steps_and_changing_learning_rates_included():
    counters.clear()
    ours, theirs = weights(SHAPES[:4]), weights(SHAPES[:4])
    for params, compiled in ((ours, True), (theirs, False)):
        optimizer = Muon([muon_group(params, ns_dtype=torch.float32, weight_decay=0.1)], compile=compiled)
        for step, ok in enumerate([1.0, 0.0, 1.0, 1.0]):
            set_gradients(params, step, 1.0 if ok else float("nan"))
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step(torch.tensor(ok), grad_scale=torch.tensor(0.5))
    assert all(relative(a, b) < 1e-6 for a, b in zip(ours, theirs))  # measured 3e-8
    assert counters["stats"]["unique_graphs"] == 2  # one compilation for all steps


@pytest.mark.machinery
def test_an_arm_that_computes_something_else_is_named_and_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # which the script would leave changed
    other = {"use_muon": True, **bench.SAME, "lr": 1.1e-4}
    monkeypatch.setattr(bench, "ARMS", {"ours": bench.ours, "other": lambda p: Muon([{"params": p, **other}])})
    with pytest.raises(UserError, match="the first update of other is"):
        bench.main(["--preset=demo", "--width=16", "--rounds=1", "--only=one"])
    assert "median" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Sharded. Four processes run every scenario; each rank writes what it measured.


@pytest.mark.recipe
@pytest.mark.parametrize("world, most", [(1, 1.0), (8, 1.001), (32, 1.001), (48, 1.04), (64, 1.16), (256, 4.01)])
def test_the_records_112_matrices_are_balanced_by_cost_which_is_what_torch_counts(world, most):
    owners = assign_owners([torch.Size(s) for s in RECORD], world)
    assert len(owners) == 112 and len(set(owners)) == min(112, world)  # one owner a matrix, none idle, or none with two
    load = [0] * world
    for shape, owner in zip(RECORD, owners):
        load[owner] += newton_schulz_cost(torch.Size(shape))
    assert max(load) <= most * sum(load) / world  # measured 1, 1, 1, 1.038, 1.154, 4.0
    with FlopCounterMode(display=False) as counter:
        for shape in RECORD:
            newton_schulz(torch.empty(shape, device="meta"), 5)
    assert counter.get_total_flops() == 2 * 5 * sum(load)  # the cost is what torch counts: 2 FLOP a multiply-add


def step_all(model: nn.Module, optimizer: Muon, steps: range) -> None:
    """Step 1 has no gradient of the first parameter, unless it is the only one, and step 2 is skipped."""
    for step in steps:
        params = list(model.parameters())
        set_gradients(params, step, float("nan") if step == 2 else 1.0)
        if step == 1 and len(params) > 1:
            params[0].grad = None
        optimizer.step(torch.tensor(float(step != 2)))


def difference(mesh, names: str = " ".join(UNEVEN)) -> float:
    """The largest in weights and state after four steps, sharded and whole."""
    (model, optimizer), (twin, its_optimizer) = uneven(mesh, names), uneven(None, names)
    step_all(model, optimizer, range(4))
    step_all(twin, its_optimizer, range(4))
    worst = 0.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for a, b in zip((p, *optimizer.state[p].values()), (q, *its_optimizer.state[q].values()), strict=True):
            whole = a.full_tensor() if isinstance(a, DTensor) else a
            worst = max(worst, (whole - b).abs().max().item())
    return worst


def events_of_a_step(mesh, names: str = " ".join(UNEVEN)) -> list:
    """What a rank does in order: send (the smaller buffer's numbers), wait, multiply."""
    events, honest, multiply = [], dist.all_to_all_single, muon.newton_schulz

    def send(received, buffer, *args, **kwargs):
        events.append(min(len(received), len(buffer)))
        work = honest(received, buffer, *args, **kwargs)
        return SimpleNamespace(wait=lambda: (events.append("wait"), work.wait()))

    model, optimizer = uneven(mesh, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", send)
        patch.setattr(muon, "newton_schulz", lambda *args: (events.append("multiply"), multiply(*args))[1])
        step_all(model, optimizer, range(1))
    return events


def run_scenarios(rank: int, folder: str) -> None:
    """Be this rank of worlds of 2, 3 and 4 ranks one after the other, since starting a process costs most."""
    torch.set_num_threads(1)
    for world in range(max(2, rank + 1), 5):
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{world}", world), rank=rank,
                                world_size=world, timeout=datetime.timedelta(seconds=60))
        mesh = init_device_mesh("cpu", (world,))
        found = {"all": difference(mesh), "one matrix": difference(mesh, "g bias"), "none": difference(mesh, "bias"),
                 "events": events_of_a_step(mesh), "few": events_of_a_step(mesh, "c f"),
                 "rows": [len(p.to_local()) for p in uneven(mesh)[0].parameters()]}
        with pytest.raises(ValueError, match="sharded by rows"):
            Owners([distribute_tensor(torch.zeros(4, 8), mesh, [Shard(1)])])
        for shape in [(2, 2), (4, 1), (1, 4)] if world == 4 else []:
            grid = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            found |= {f"{shape}": difference(grid), f"{shape}, one row": difference(grid, "f")}
            if shape == (2, 2):
                with pytest.raises(ValueError, match="not of 2 of 4 ranks in 1"):
                    Owners([uneven(grid["shard"], "a")[0].a])
        torch.save(found, f"{folder}/{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.mktemp("sharded")
    fork_context()  # the process that has torch imported already: 6 s instead of 20
    mp.start_processes(run_scenarios, args=(str(folder),), nprocs=4, start_method="forkserver")
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (2, 3, 4)}


@pytest.mark.machinery
@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharded_steps_equal_unsharded_ones_and_each_rank_holds_its_rows_only(results, world):
    for found in results[world]:
        errors = {name: value for name, value in found.items() if isinstance(value, float)}
        assert len(errors) == (9 if world == 4 else 3)
        assert all(error < 1e-6 for error in errors.values()), errors  # weights of order 1; measured 0
    for i, (rows, *_) in enumerate(UNEVEN.values()):
        held = [found["rows"][i] for found in results[world]]
        assert sum(held) == rows and max(held) == -(-rows // world)


@pytest.mark.machinery
@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_rank_waits_for_anothers_matrix_before_it_begins_its_own(results, world):
    # There are six shapes of matrices, two matrices alike, which have one owner or two: first all rows leave, then each
    # shape is waited for, multiplied by its owners and sent back, and only then are results waited for
    for found in results[world]:
        events = ["send" if isinstance(event, int) else event for event in found["events"] if event != "multiply"]
        assert events == 6 * ["send"] + 6 * ["wait", "send"] + 6 * ["wait"]
        assert found["events"][-6:] == 6 * ["wait"], "a matrix is multiplied after a result was waited for"
        # torch 2.14 refuses empty buffers. Of two matrices, of one row and of two, some ranks own and hold nothing
        assert min(event for event in found["few"] if isinstance(event, int)) > 0
    assert sum(found["events"].count("multiply") for found in results[world]) in (6, 7)
