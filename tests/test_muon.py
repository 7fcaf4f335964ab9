"""muon.py: Newton-Schulz against its scalar polynomial, one optimizer against torch.optim and float64 textbook forms, and
sharded over 2, 3 and 4 gloo processes, or a 2 x 2 mesh, against itself unsharded.

    OMP_NUM_THREADS=1 pytest tests/test_muon.py

"Relative" means norm(a - b) / norm(b). Measured errors, on the CPU of torch 2.15, stand beside each tolerance.
"""
import copy
import datetime
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from conftest import fork_context
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import muon  # noqa: E402
from muon import Muon, assign_owners, newton_schulz, newton_schulz_cost  # noqa: E402

pytestmark = pytest.mark.parity

SHAPES = [(48, 32), (32, 48), (40, 40), (40, 40), (96, 24), (24, 96)]  # tall, wide, square, two alike
ADAM_SHAPES = [(17,), (9, 5), (), (3, 4, 2)]
RECORD = [(5376, 1792), (3584, 1792), (1792, 1792), (6272, 1792), (6272, 1792), (1792, 6272), (10752, 1792)] * 16


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(shapes, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=seed * 1000 + i)) for i, shape in enumerate(shapes)]


def set_gradients(params, step: int, scale: float = 1.0) -> None:
    """Gradients that are a function of (place in the list, step), so that every optimizer sees the same."""
    for i, p in enumerate(params):
        p.grad = scale * randn(*p.shape, seed=7_000_000 + step * 1000 + i)


def relative(a, b) -> float:
    a, b = (torch.cat([t.detach().double().flatten() for t in (x if isinstance(x, list) else [x])]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def with_singular_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix [m, n] with the given singular values and random singular vectors."""
    U = torch.linalg.qr(randn(m, len(values), seed=seed, dtype=torch.float64))[0]
    V = torch.linalg.qr(randn(n, len(values), seed=seed + 1, dtype=torch.float64))[0]
    return U * values @ V.T


def quintic(x: Tensor, steps: int = 5) -> Tensor:
    """What Newton-Schulz does to one singular value (Jordan 2024)."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 9), (9, 1)])
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_each_singular_value_goes_through_the_quintic_and_its_vectors_stay(shape, steps):
    s = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    U, V = (torch.linalg.qr(randn(d, len(s), seed=i, dtype=torch.float64))[0] for i, d in enumerate(shape))
    expected = U * quintic(s / s.norm(), steps) @ V.T  # the Frobenius norm divides first
    assert relative(newton_schulz(U * s @ V.T, steps), expected) < 1e-10  # measured at most 5e-15 (float64)
    assert relative(newton_schulz((U * s @ V.T).float(), steps), expected) < 1e-4  # measured at most 1e-6 (fp32)


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (256, 256), (64, 160), (160, 64), (128, 512)])
@pytest.mark.parametrize("condition", [1, 10, 100])
def test_singular_values_end_between_06_and_13_up_to_condition_100(shape, condition):
    s = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), min(shape), dtype=torch.float64)
    batch = torch.stack([with_singular_values(*shape, s, seed) for seed in (0, 2)]).float()
    out = torch.linalg.svdvals(newton_schulz(batch, 5).double())
    assert 0.6 <= out.min() and out.max() <= 1.3  # measured 0.682 to 1.203


def test_the_bounds_hold_from_one_in_760_of_the_frobenius_norm():
    """Where the claim ends: five quintics lift x >= 1 / 760 into [0.6, 1.3], and none of [0, 1] above 1.203.

    So condition 100 is safe while the Frobenius norm is at most 7.6 times the spectral norm, whatever the size.
    """
    x = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    assert quintic(x[x >= 1 / 760]).min() >= 0.6 and quintic(x).max() < 1.203
    s = torch.tensor([1.0] * 57 + [0.01], dtype=torch.float64)  # flat but for one: 0.01 / norm = 1 / 755
    out = torch.linalg.svdvals(newton_schulz(with_singular_values(58, 80, s).float(), 5))
    assert 0.6 <= out.min() and out.max() <= 1.3
    s = torch.tensor([1.0] * 255 + [0.01], dtype=torch.float64)  # and past it the smallest stays small, by the quintic
    out = torch.linalg.svdvals(newton_schulz(with_singular_values(256, 256, s).float(), 5))
    assert out.min().item() == pytest.approx(quintic(torch.tensor(0.01 / 255**0.5)).item(), rel=1e-3) and out.min() < 0.31


@pytest.mark.parametrize("name", ["rank 1", "rank 3", "condition 1e12", "ones", "huge", "tiny", "zero", "one row", "graded"])
def test_no_singular_value_ends_above_13(name):
    G = {
        "rank 1": with_singular_values(64, 48, torch.ones(1, dtype=torch.float64)),
        "rank 3": with_singular_values(48, 64, torch.tensor([1.0, 0.5, 1e-3], dtype=torch.float64)),
        "condition 1e12": with_singular_values(64, 64, torch.logspace(0, -12, 64, dtype=torch.float64)),
        "ones": torch.ones(96, 32),
        "huge": randn(40, 40, seed=0) * 1e15,
        "tiny": randn(40, 40, seed=0) * 1e-15,
        "zero": torch.zeros(16, 24),
        "one row": randn(1, 64, seed=0),
        "graded": randn(64, 64, seed=0) * torch.logspace(0, -8, 64),
    }[name].float()
    for dtype in (torch.float32, torch.bfloat16):
        out = newton_schulz(G.to(dtype), 5)
        assert out.isfinite().all()
        assert torch.linalg.svdvals(out.double()).max() <= 1.3  # measured at most 1.202 in fp32, 1.22 in bf16


@pytest.mark.parametrize("n", [32, 64, 128, 256])
def test_at_least_95_percent_of_a_square_gaussians_singular_values_end_inside(n):
    G = torch.stack([randn(n, n, seed=i) for i in range(8)])
    out = torch.linalg.svdvals(newton_schulz(G, 5).double())
    assert ((out >= 0.6) & (out <= 1.3)).double().mean() >= 0.95  # measured 98.6 to 98.9%


def test_a_batch_gives_what_its_matrices_give_alone():
    for shape in SHAPES:
        batch = randn(2, 3, *shape, seed=5) * torch.logspace(-3, 3, 6).reshape(2, 3, 1, 1)  # each by its own norm
        out = newton_schulz(batch, 5)
        assert out.shape == batch.shape
        alone = torch.stack([newton_schulz(G, 5) for G in batch.flatten(0, 1)]).unflatten(0, (2, 3))
        assert (out - alone).abs().max() <= 1e-6  # entries up to 0.5; measured 0


@pytest.mark.parametrize("shape", [(40, 40), (24, 56), (56, 24)])
def test_the_transpose_gives_the_transpose_and_a_factor_gives_the_same(shape):
    G = randn(*shape, seed=3)
    assert relative(newton_schulz(G.mT, 5), newton_schulz(G, 5).mT) < 1e-5  # measured 1e-6
    for factor in (1e3, 1e-6):
        assert relative(newton_schulz(factor * G, 5), newton_schulz(G, 5)) < 1e-5  # measured 1e-6
    assert relative(newton_schulz(-G, 5), -newton_schulz(G, 5)) < 1e-6


def test_newton_schulz_keeps_its_input_and_its_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        G = randn(24, 16, seed=1, dtype=dtype)
        before = G.clone()
        assert newton_schulz(G, 5).dtype == dtype and torch.equal(G, before)


# ---------------------------------------------------------------------------------------------------------------------
# Muon groups


def muon_group(params, **changes) -> dict:
    return {"params": params, "use_muon": True, "lr": 0.02, "momentum": 0.95, "nesterov": True, "ns_steps": 5, **changes}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("steps", [1, 6])
def test_muon_equals_torch_optim_muon(weight_decay, nesterov, steps):
    ours, theirs, start = weights(SHAPES), weights(SHAPES), weights(SHAPES)
    optimizer = Muon([muon_group(ours, weight_decay=weight_decay, nesterov=nesterov)])
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, nesterov=nesterov, ns_steps=5, weight_decay=weight_decay,
                                 adjust_lr_fn="match_rms_adamw")
    for step in range(steps):
        for params in (ours, theirs):
            set_gradients(params, step)
        optimizer.step()
        reference.step()
    for a, b, w in zip(ours, theirs, start):
        # Newton-Schulz in bf16 on both sides, which alone is 2e-2 from fp32: measured at most 4e-3, mostly 0
        assert relative(a - w, b - w) < 4e-2
        assert relative(optimizer.state[a]["momentum"], reference.state[b]["momentum_buffer"]) < 1e-6  # measured 8e-8


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_fp32_equals_the_textbook_in_float64(weight_decay, nesterov):
    params, start = weights(SHAPES), weights(SHAPES)
    optimizer = Muon([muon_group(params, lr=0.2, weight_decay=weight_decay, nesterov=nesterov, ns_dtype=torch.float32)])
    W, M = [p.detach().double() for p in start], [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
        for i, p in enumerate(params):
            g = p.grad.double()
            M[i] = 0.95 * M[i] + 0.05 * g
            u = 0.05 * g + 0.95 * M[i] if nesterov else M[i]
            U, s, V = torch.linalg.svd(u, full_matrices=False)
            O = U * quintic(s / s.norm()) @ V
            W[i] = W[i] - 0.2 * weight_decay * W[i] - 0.2 * 0.2 * max(p.shape) ** 0.5 * O
        for p, w, first in zip(params, W, start):
            assert relative(p.double() - first, w - first) < 1e-5  # measured at most 2e-6, after each of 4 steps
            assert relative(p, w) < 1e-6


def test_muons_update_has_adams_rms_whatever_the_shape():
    """Its purpose: RMS 0.2 lr. The singular values' mean square is about 0.75, hence the range."""
    for shape in [(256, 64), (64, 256), (128, 128)]:
        p = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([muon_group([p], lr=1.0)])
        set_gradients([p], 0)
        optimizer.step()
        assert 0.15 < p.square().mean().sqrt() < 0.24  # measured 0.170 to 0.178


def test_equal_shapes_in_one_batch_get_their_own_updates():
    params, alone = weights([(20, 12)] * 5), weights([(20, 12)] * 5)
    together = Muon([muon_group(params, ns_dtype=torch.float32)])
    set_gradients(params, 0)
    set_gradients(alone, 0)
    together.step()
    for p in alone:
        Muon([muon_group([p], ns_dtype=torch.float32)]).step()
    for a, b in zip(params, alone):
        assert (a - b).abs().max() < 1e-6  # weights of order 1; measured 0


# ---------------------------------------------------------------------------------------------------------------------
# Adam groups


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_groups_equal_torch_optim_over_ten_steps(weight_decay):
    ours, theirs, start = weights(ADAM_SHAPES), weights(ADAM_SHAPES), weights(ADAM_SHAPES)
    optimizer = Muon([{"params": ours, "use_muon": False, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8,
                       "weight_decay": weight_decay}])
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam  # decay is decoupled
    reference = kind(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    for step in range(10):
        for params in (ours, theirs):
            set_gradients(params, step, scale=10.0 ** (step % 4 - 3))  # small ones too, where eps counts
        optimizer.step()
        reference.step()
        for a, b, w in zip(ours, theirs, start):
            assert relative(a - w, b - w) < 1e-5  # of the update; measured 2e-6 (rounding of weights of order 1)
            assert (a - b).abs().max() < 1e-6  # measured 1e-7


def test_adam_with_a_large_eps_equals_torch_optim():
    ours, theirs = weights(ADAM_SHAPES), weights(ADAM_SHAPES)
    optimizer = Muon([{"params": ours, "use_muon": False, "lr": 0.1, "betas": (0.8, 0.9), "eps": 0.3}])
    reference = torch.optim.Adam(theirs, lr=0.1, betas=(0.8, 0.9), eps=0.3)
    for step in range(5):
        for params in (ours, theirs):
            set_gradients(params, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 1e-6  # measured 2e-7


def test_groups_keep_their_own_settings():
    params = weights([(6,), (6,)])
    fast, slow = ({"params": [p], "use_muon": False, "lr": lr} for p, lr in zip(params, (0.1, 0.001)))
    optimizer = Muon([fast, slow])
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    optimizer.step()
    for p, first, lr in zip(params, before, (0.1, 0.001)):  # Adam's first step is lr * sign(gradient)
        assert torch.allclose(first - p, lr * p.grad.sign(), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What a group may hold


@pytest.mark.parametrize("use_muon, key", [(True, "betas"), (True, "learning_rate"), (False, "momentum"),
                                           (False, "weigth_decay")])
def test_an_unknown_group_key_raises_and_is_named(use_muon, key):
    with pytest.raises(ValueError, match=key):
        Muon([{"params": weights([(4, 4)]), "use_muon": use_muon, key: 0.1}])


@pytest.mark.parametrize("group", [{}, {"use_muon": 1}, {"use_muon": None}, {"use_muon": "yes"}])
def test_a_group_without_use_muon_raises(group):
    with pytest.raises(ValueError, match="use_muon"):
        Muon([{"params": weights([(4, 4)]), **group}])


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_a_muon_group_takes_matrices_only(shape):
    with pytest.raises(ValueError, match="matrices"):
        Muon([{"params": weights([(4, 4), shape]), "use_muon": True}])


def test_params_may_be_a_generator():
    layer = nn.Linear(4, 4)
    optimizer = Muon([{"params": layer.parameters(), "use_muon": False}])
    assert len(optimizer.param_groups[0]["params"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Skipped steps, missing gradients, state


def mixed(**muon_changes) -> tuple[list[nn.Parameter], Muon]:
    params = weights([*SHAPES[:3], *ADAM_SHAPES])
    return params, Muon([muon_group(params[:3], **muon_changes), {"params": params[3:], "use_muon": False, "lr": 0.01}])


def snapshot(params, optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in params] + [t.clone() for p in params for t in optimizer.state[p].values()]


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("scale", [1.0, 1e15])
def test_ok_0_leaves_weights_and_state_bit_identical(steps_before, scale):
    params, optimizer = mixed(weight_decay=0.1)
    optimizer.param_groups[1]["weight_decay"] = 0.1
    for step in range(steps_before):
        set_gradients(params, step, scale)  # 1e15: its square is just inside fp32
        optimizer.step()
    before = snapshot(params, optimizer)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)  # `step` asks for zero gradients where ok is 0
        optimizer.step(torch.tensor(0.0))
        assert identical(snapshot(params, optimizer), before)


def test_ok_1_equals_no_ok():
    (a, with_ok), (b, without) = mixed(weight_decay=0.1), mixed(weight_decay=0.1)
    for step in range(3):
        set_gradients(a, step)
        set_gradients(b, step)
        with_ok.step(torch.tensor(1.0))
        without.step()
    assert identical(snapshot(a, with_ok), snapshot(b, without))


def test_a_skipped_step_might_as_well_not_have_been():
    """Adam's bias correction counts steps taken, not asked for."""
    (a, skipping), (b, plain) = mixed(), mixed()
    for step in range(4):
        set_gradients(a, step)
        set_gradients(b, step)
        skipping.step(torch.tensor(1.0))
        plain.step()
        for p in a:
            p.grad = torch.zeros_like(p)
        skipping.step(torch.tensor(0.0))
    assert identical(snapshot(a, skipping), snapshot(b, plain))


def test_a_learning_rate_of_zero_leaves_weights_as_they_are():
    params, optimizer = mixed()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    optimizer.step()
    assert identical([p.detach() for p in params], before)


@pytest.mark.parametrize("without", [{0}, {1, 4}, {0, 1, 2}, {3, 4, 5, 6}, set(range(7))])
def test_parameters_without_gradient_are_skipped_and_the_others_step_alike(without):
    (a, some), (b, every) = mixed(ns_dtype=torch.float32), mixed(ns_dtype=torch.float32)
    set_gradients(a, 0)
    set_gradients(b, 0)
    for i in without:
        a[i].grad = None
    before = [snapshot([p], some) for p in a]
    some.step()
    every.step()
    for i, (p, q) in enumerate(zip(a, b)):
        if i in without:
            assert identical(snapshot([p], some), before[i])
        else:
            assert (p - q).abs().max() < 1e-6 and not torch.equal(p, before[i][0])


def test_a_loaded_state_dict_continues_identically():
    params, optimizer = mixed(weight_decay=0.05)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, restored = mixed()  # without weight decay: the state dict brings it
    with torch.no_grad():
        for p, w in zip(others, saved["weights"]):
            p.copy_(w)
    restored.load_state_dict(saved["optimizer"])
    assert restored.param_groups[0]["weight_decay"] == 0.05
    for step in range(3, 6):
        for held, opt in ((params, optimizer), (others, restored)):
            set_gradients(held, step)
            opt.step()
    assert identical(snapshot(params, optimizer), snapshot(others, restored))


def test_state_exists_before_the_first_step_and_does_not_share_memory():
    params, optimizer = mixed()
    assert [sorted(optimizer.state[p]) for p in params] == [["momentum"]] * 3 + [["exp_avg", "exp_avg_sq", "step"]] * 4
    twin = copy.deepcopy(optimizer.state_dict())
    set_gradients(params, 0)
    optimizer.step()
    assert all(value.count_nonzero() == 0 for state in twin["state"].values() for value in state.values())
    assert all(value.count_nonzero() > 0 for p in params for value in optimizer.state[p].values())


# ---------------------------------------------------------------------------------------------------------------------
# Who owns what


@pytest.mark.parametrize("shape", [(1792, 1792), (6272, 1792), (1792, 6272)])
def test_the_cost_of_a_matrix_is_what_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.empty(shape, device="meta"), 5)
    assert counter.get_total_flops() == 2 * 5 * newton_schulz_cost(torch.Size(shape))  # 2 FLOP a multiply-add


@pytest.mark.recipe
@pytest.mark.parametrize("world, most", [(1, 1.0), (8, 1.001), (32, 1.001), (48, 1.16), (64, 1.16)])
def test_the_records_112_matrices_are_balanced_by_cost(world, most):
    owners = assign_owners([torch.Size(s) for s in RECORD], world)
    assert len(owners) == 112 and set(owners) == set(range(world))  # one owner a matrix, none idle
    load = [sum(newton_schulz_cost(torch.Size(s)) for s, o in zip(RECORD, owners) if o == rank) for rank in range(world)]
    assert max(load) <= most * sum(load) / world  # measured: exactly equal on 8 and 32, 1.154 on 48 and 64


def test_more_ranks_than_matrices_leaves_ranks_idle_and_no_rank_with_two():
    owners = assign_owners([torch.Size(s) for s in RECORD[:7]], 16)
    assert len(set(owners)) == 7


# ---------------------------------------------------------------------------------------------------------------------
# Sharded. Four processes run every scenario; each rank writes what it measured.


class Uneven(nn.Module):
    """Matrices whose rows do not divide among 2, 3 or 4 ranks, one with fewer rows than ranks, and some for Adam."""

    SHAPES = {"a": (7, 5), "b": (10, 6), "c": (2, 9), "d": (6, 8), "e": (6, 8), "f": (1, 4), "g": (33, 8),
              "bias": (5,), "scale": (3, 2)}

    def __init__(self, names: str):
        super().__init__()
        for i, (name, shape) in enumerate(self.SHAPES.items()):
            if name in names.split():
                self.register_parameter(name, nn.Parameter(randn(*shape, seed=i)))

    def optimizer(self) -> Muon:
        groups = [[], []]
        for name, p in self.named_parameters():
            groups[name in ("bias", "scale")].append(p)
        return Muon([muon_group(groups[0], ns_dtype=torch.float32, weight_decay=0.1),
                     {"params": groups[1], "use_muon": False, "lr": 0.01, "weight_decay": 0.1}])


def gradient_of(name: str, step: int) -> Tensor:
    return randn(*Uneven.SHAPES[name], seed=500 + 50 * step + list(Uneven.SHAPES).index(name))


def compare_with_unsharded(mesh, names: str) -> dict:
    """Four steps, the second without gradients of `b` and the third skipped; every rank holds the plain twin."""
    plain, sharded = Uneven(names), Uneven(names)
    fully_shard(sharded, mesh=mesh)
    ours, theirs = sharded.optimizer(), plain.optimizer()
    worst = {"weights": 0.0, "state": 0.0}
    for step in range(4):
        ok = torch.tensor(float(step != 2))
        before = [p.to_local().clone() for p in sharded.parameters()]
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters()):
            q.grad = None if (step, name) == (1, "b") else ok * gradient_of(name, step)
            p.grad = None if q.grad is None else distribute_tensor(q.grad, p.device_mesh, p.placements)
        ours.step(ok)
        theirs.step(ok)
        if step == 2:
            assert all(torch.equal(p.to_local(), w) for p, w in zip(sharded.parameters(), before))
        for p, q in zip(sharded.parameters(), plain.parameters()):
            worst["weights"] = max(worst["weights"], (p.full_tensor() - q).abs().max().item())
            for key, value in ours.state[p].items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                worst["state"] = max(worst["state"], (whole - theirs.state[q][key]).abs().max().item())
    for p in sharded.parameters():
        for key, value in ours.state[p].items():
            if key != "step":
                assert isinstance(value, DTensor) and value.placements == p.placements
                assert value.to_local().shape == p.to_local().shape
    rows = [p.to_local().shape[0] for p in sharded.parameters()]
    return {**worst, "rows": rows, "moved": min((p.full_tensor() - q).abs().max().item() for p, q in
                                                zip(sharded.parameters(), Uneven(names).parameters()))}


def step_all(model: Uneven, optimizer: Muon, steps: range) -> None:
    """Steps with the gradients of `gradient_of`, sharded or not."""
    for step in steps:
        for name, p in model.named_parameters():
            p.grad = gradient_of(name, step)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
        optimizer.step()


def sharded_model(mesh) -> tuple[Uneven, Muon]:
    model = Uneven(" ".join(Uneven.SHAPES))
    fully_shard(model, mesh=mesh)
    return model, model.optimizer()


def compare_after_a_resume(mesh, folder: str) -> float:
    """Two steps by another number of ranks, whose checkpoint is in `folder`, then two by this one, against four unsharded."""
    model, optimizer = sharded_model(mesh)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    step_all(model, optimizer, range(2, 4))
    plain = Uneven(" ".join(Uneven.SHAPES))
    step_all(plain, plain.optimizer(), range(4))
    return max((p.full_tensor() - q).abs().max().item() for p, q in zip(model.parameters(), plain.parameters()))


def save_after_two_steps(mesh, folder: str) -> None:
    model, optimizer = sharded_model(mesh)
    step_all(model, optimizer, range(2))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)


class Noting:
    """A collective that writes down when it is waited for."""

    def __init__(self, work, events: list[str]):
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def events_of_a_step(mesh) -> list[str]:
    """What a rank does in `Muon.step`, in order: send, wait, and multiply where it owns matrices."""
    events, send, multiply = [], dist.all_to_all_single, muon.newton_schulz
    model, optimizer = sharded_model(mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda *a, **k: (events.append("send"), Noting(send(*a, **k), events))[1])
        patch.setattr(muon, "newton_schulz", lambda *a: (events.append("multiply"), multiply(*a))[1])
        step_all(model, optimizer, range(1))
    return events


def buffers_of_a_step(mesh, names: str) -> list[int]:
    """The sizes of all that a rank sends and receives in all-to-alls of `Muon.step`, whatever it owns and holds."""
    sizes, send = [], dist.all_to_all_single
    model = Uneven(names)
    fully_shard(model, mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single",
                      lambda out, buffer, *a, **k: (sizes.extend([len(out), len(buffer)]), send(out, buffer, *a, **k))[1])
        step_all(model, model.optimizer(), range(1))
    return sizes


def raises_value_error(action) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def run_scenarios(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{world}", world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))
    everything = " ".join(Uneven.SHAPES)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    found = {"flat": compare_with_unsharded(mesh, everything), "one matrix": compare_with_unsharded(mesh, "g bias"),
             "no matrix": compare_with_unsharded(mesh, "bias"), "events": events_of_a_step(mesh),
            "buffers": buffers_of_a_step(mesh, "c f")}
    if world > 2:
        found["resumed"] = compare_after_a_resume(mesh, f"{folder}/checkpoint{world - 1}")
    save_after_two_steps(mesh, f"{folder}/checkpoint{world}")
    if world == 4:
        for shape in ((2, 2), (4, 1), (1, 4)):
            grid = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            found[f"{shape[0]} x {shape[1]}"] = compare_with_unsharded(grid, everything)
            found[f"resumed {shape[0]} x {shape[1]}"] = compare_after_a_resume(grid, f"{folder}/checkpoint{world - 1}")
            if shape == (2, 2):
                half = Uneven("a d e")
                fully_shard(half, mesh=grid["shard"])  # two ranks of four
                for p in half.parameters():
                    p.grad = torch.zeros_like(p)
                found["half"] = raises_value_error(half.optimizer().step)
    by_columns = nn.Parameter(distribute_tensor(torch.zeros(4, 8), mesh, [Shard(1)]))
    by_columns.grad = torch.zeros_like(by_columns)
    found["by columns"] = raises_value_error(Muon([muon_group([by_columns])]).step)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded_worker(rank: int, folder: str) -> None:
    """Process `rank` of four: the worlds of 2, 3 and 4 ranks one after the other, since starting a process costs most."""
    torch.set_num_threads(1)
    for world in (2, 3, 4):
        if rank < world:
            run_scenarios(rank, world, folder)


@pytest.fixture(scope="module")
def folder_of_results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    fork_context()  # the process that has torch imported already: 6 s instead of 20
    mp.start_processes(sharded_worker, args=(str(folder),), nprocs=4, start_method="forkserver")
    return folder


@pytest.fixture(params=[2, 3, 4], ids=lambda world: f"{world} ranks")
def measured(request, folder_of_results) -> list[dict]:
    return [torch.load(folder_of_results / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def test_sharded_steps_equal_unsharded_ones(measured):
    meshes = ["flat", "one matrix", "no matrix", *(["2 x 2", "4 x 1", "1 x 4"] if len(measured) == 4 else [])]
    for found in measured:
        for mesh in meshes:
            assert found[mesh]["moved"] > 1e-3  # every parameter was stepped
            assert found[mesh]["weights"] < 1e-6  # weights of order 1; measured 0
            assert found[mesh]["state"] < 1e-6  # measured 0


def test_a_checkpoint_of_another_number_of_ranks_continues_as_if_unsharded(measured):
    found = {name: value for name, value in measured[0].items() if name.startswith("resumed")}
    assert len(found) == {2: 0, 3: 1, 4: 4}[len(measured)]
    assert all(error < 1e-6 for error in found.values()), found  # measured 0


def test_no_rank_waits_for_anothers_matrix_before_it_begins_its_own(measured):
    # SHAPES has six shapes of matrices, two of them alike: first all rows leave, then each shape is waited for, multiplied
    # by its owners and sent back, and only then are results waited for
    for found in measured:
        events = [event for event in found["events"] if event != "multiply"]
        assert events == 6 * ["send"] + 6 * ["wait", "send"] + 6 * ["wait"]
        assert found["events"][-6:] == 6 * ["wait"], "a matrix is multiplied after a result was waited for"
    assert sum(found["events"].count("multiply") for found in measured) in (6, 7), "the two alike have one owner, or two"


def test_no_rank_exchanges_an_empty_buffer_whatever_it_owns_and_holds(measured):
    # torch 2.14's check refuses those. Two matrices, of one row and of two: on 3 and 4 ranks some own and hold nothing
    assert all(len(found["buffers"]) == 8 and min(found["buffers"]) > 0 for found in measured)


def test_each_rank_holds_its_rows_only(measured):
    """And the scenario is as uneven as it says: some rank holds no row of a matrix, and the split is not even."""
    world = len(measured)
    first_dims = [shape[0] for shape in Uneven.SHAPES.values()]
    for i, rows in enumerate(first_dims):
        held = [found["flat"]["rows"][i] for found in measured]
        assert sum(held) == rows and max(held) == -(-rows // world)
    assert any(0 in found["flat"]["rows"] for found in measured)
    if world == 4:
        for i, rows in enumerate(first_dims):
            assert sorted(found["2 x 2"]["rows"][i] for found in measured) == sorted(2 * [rows // 2] + 2 * [rows - rows // 2])


def test_what_muon_cannot_shard_raises(measured):
    for found in measured:
        assert "rows" in found["by columns"]
        if len(measured) == 4:
            assert "2 of 4 ranks" in found["half"]


def test_a_compiled_step_equals_an_uncompiled_one_skipped_steps_and_changing_learning_rates_included():
    """Within 1e-6 of the weights' norm (measured 3e-8), and one compilation for all steps."""
    def after(compile: bool) -> Tensor:
        params = weights(SHAPES[:4])
        optimizer = Muon([muon_group(params, ns_dtype=torch.float32, weight_decay=0.1)], compile=compile)
        for step, ok in enumerate([1.0, 0.0, 1.0, 1.0]):
            set_gradients(params, step, 1.0 if ok else float("nan"))
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step(torch.tensor(ok), scale=torch.tensor(0.5))
        return torch.cat([p.detach().flatten() for p in params])

    counters.clear()
    compiled, plain = after(True), after(False)
    assert counters["stats"]["unique_graphs"] == 2 and relative(compiled, plain) < 1e-6
