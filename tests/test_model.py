"""The model of train_prx.py: size and names of the record, agreement with diffusers' PRXTransformer2DModel, token routing,
initial weights alone and sharded, bf16, and what masked text may do.

    OMP_NUM_THREADS=1 pytest tests/test_model.py

"Relative" means max|a - b| / max|b|. Measured errors, on the CPU of torch 2.15, stand beside each tolerance.
"""
import datetime
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import fork_context, need_diffusers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_prx  # noqa: E402
from exchange import diffusers_config  # noqa: E402
from train_prx import (PRX, Config, Keys, RMSNorm, Text, apply_rotary, build_model, build_optimizer,  # noqa: E402
                       draw_ids_keep, gather_tokens, rotary_table)
from weights import from_diffusers, to_diffusers  # noqa: E402

pytestmark = pytest.mark.parity

TINY = Config(patch=4, bottleneck=12, width=48, depth=6, heads=3, text_dim=20, text_tokens=7, route_start=1, route_end=-1,
              repa_depth=3, repa_dim=10, precision="fp32", compile=False)
SIZES = [(16, 16), (8, 24), (20, 12)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every weight, so that no part starts as zero, one or the identity."""
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def inputs(size: tuple[int, int] = (16, 16), B: int = 3, L: int = 7, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, txt, txt_mask: a full prompt, a short one, an empty one and so on."""
    g = generator(seed)
    mask = torch.arange(L) < torch.tensor([L, L // 2, 0, 1])[:B, None]
    return torch.randn(B, 3, *size, generator=g), torch.rand(B, generator=g), torch.randn(B, L, 20, generator=g), mask


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


class Recorder(nn.Module):
    """A block that remembers what it was called with and what it returned."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, img, text, c, rope, keys, txt_kv):
        self.seen, self.rope = img.detach(), rope
        out = self.block(img, text, c, rope, keys, txt_kv)
        self.made = out.detach()
        return out


def record(model: PRX) -> list[Recorder]:
    model.blocks = nn.ModuleList(Recorder(block) for block in model.blocks)
    return list(model.blocks)


def dropped(ids_keep: Tensor, N: int) -> Tensor:
    """[B, N] bool: the tokens that are routed away."""
    return torch.ones(len(ids_keep), N, dtype=torch.bool).scatter(1, ids_keep, False)


# ---------------------------------------------------------------------------------------------------------------------
# Size and names


@pytest.fixture(scope="module")
def record_model() -> PRX:
    with torch.device("meta"):
        return PRX(Config())


@pytest.mark.recipe
def test_the_record_has_1_177_215_744_parameters_besides_the_projector(record_model):
    sizes = {name: p.numel() for name, p in record_model.named_parameters()}
    assert sum(n for name, n in sizes.items() if not name.startswith("repa_projector.")) == 1_177_215_744
    # REPA's head: three linear layers, 1792 -> 1024 -> 1024 -> 1024
    assert sum(n for name, n in sizes.items() if name.startswith("repa_projector.")) == 1792 * 1024 + 2 * 1024**2 + 3 * 1024


@pytest.mark.recipe
def test_112_matrices_with_1_156_055_040_elements_belong_to_muon_and_everything_else_to_adam(record_model):
    muon, adam = build_optimizer(record_model, Config()).param_groups
    assert muon["use_muon"] and not adam["use_muon"]
    assert len(muon["params"]) == 112 and sum(p.numel() for p in muon["params"]) == 1_156_055_040
    in_blocks = {id(p) for p in record_model.blocks.parameters() if p.ndim == 2}
    assert {id(p) for p in muon["params"]} == in_blocks
    assert sorted(id(p) for g in (muon, adam) for p in g["params"]) == sorted(id(p) for p in record_model.parameters())
    assert (muon["lr"], muon["momentum"], muon["nesterov"], muon["ns_steps"], muon["weight_decay"]) == (1e-4, 0.95, True, 5, 0)
    assert (adam["lr"], adam["betas"], adam["eps"], adam["weight_decay"]) == (1e-4, (0.9, 0.95), 1e-8, 0)


@pytest.mark.recipe
def test_parameter_names_are_those_of_the_public_checkpoints(record_model):
    outside = ["img_in.0", "img_in.1", "time_in.in_layer", "time_in.out_layer", "txt_in", "final_layer.linear",
               "final_layer.adaLN_modulation.1"]  # linear layers with bias
    inside = ["img_qkv_proj.weight", "txt_kv_proj.weight", "attn_out.weight", "qk_norm.query_norm.scale",
              "qk_norm.key_norm.scale", "k_norm.scale", "gate_proj.weight", "up_proj.weight", "down_proj.weight",
              "modulation.lin.weight", "modulation.lin.bias"]
    expected = {f"{name}.{kind}" for name in outside for kind in ("weight", "bias")}
    expected |= {f"blocks.{i}.{name}" for i in range(16) for name in inside}
    expected |= {f"repa_projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert {name for name, _ in record_model.named_parameters()} == expected == set(record_model.state_dict())


def test_a_model_without_repa_has_no_projector():
    with torch.device("meta"):
        assert not any(name.startswith("repa") for name, _ in PRX(replace(TINY, repa_weight=0.0)).named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with diffusers

PLAIN = replace(TINY, repa_weight=0.0)  # no projector


def diffusers_model(**arguments) -> nn.Module:
    need_diffusers()
    from diffusers import PRXTransformer2DModel  # here, because it takes 4 s, which the sharded ranks below need not spend

    return PRXTransformer2DModel(**arguments)


def pair(direction: str, cfg: Config = PLAIN) -> tuple[PRX, nn.Module]:
    """The same random weights in both models, drawn in one and passed to the other."""
    ours, theirs = PRX(cfg), diffusers_model(**diffusers_config(cfg))
    if direction == "ours to diffusers":
        theirs.load_state_dict(to_diffusers(perturb(ours).state_dict()))
    else:
        ours.load_state_dict(from_diffusers(perturb(theirs).state_dict()))
    return ours, theirs


def run_pair(ours: PRX, theirs: nn.Module, size: tuple[int, int]) -> tuple[dict, dict]:
    """Output, and the gradients of all weights and inputs, of both, under diffusers' names."""
    results = []
    for model in (ours, theirs):
        x_t, t, txt, mask = inputs(size)
        x_t, t, txt = (x.requires_grad_() for x in (x_t, t, txt))
        model.zero_grad()
        out = model(x_t, t, txt, mask)[0] if model is ours else model(x_t, t, txt, mask, return_dict=False)[0]
        (out * torch.randn(out.shape, generator=generator(9))).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        grads = to_diffusers(grads) if model is ours else grads
        results.append({"output": out.detach(), "x_t": x_t.grad, "t": t.grad, "txt": txt.grad, **grads})
    return results[0], results[1]


@pytest.mark.parametrize("direction", ["ours to diffusers", "diffusers to ours"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_every_gradient_agree_with_diffusers(direction, size):
    a, b = run_pair(*pair(direction), size)
    assert a.keys() == b.keys() and len(a) == 4 + 2 * 7 + 11 * 6
    assert relative(a["output"], b["output"]) < 1e-5  # measured 0
    for name in b:
        assert b[name].abs().max() > 1e-3, name  # there is something to compare
        assert relative(a[name], b[name]) < 5e-5, name  # measured at most 3e-7


@pytest.mark.parametrize("change", [dict(heads=6), dict(rope_theta=100.0), dict(mlp_ratio=2.0), dict(patch=2, bottleneck=5),
                                    dict(depth=2)], ids=str)
def test_other_configurations_agree_with_diffusers_too(change):
    a, b = run_pair(*pair("ours to diffusers", replace(PLAIN, **change)), (8, 12))
    assert all(relative(a[name], b[name]) < 5e-5 for name in b)


def test_without_a_mask_all_text_counts():
    ours, theirs = pair("ours to diffusers")
    x_t, t, txt, mask = inputs()
    out = ours(x_t, t, txt)[0]
    assert relative(out, theirs(x_t, t, txt, return_dict=False)[0]) < 1e-5
    assert relative(out, ours(x_t, t, txt, torch.ones_like(mask))[0]) < 1e-5
    assert relative(out, ours(x_t, t, txt, mask)[0]) > 1e-3


def test_a_round_trip_through_diffusers_is_the_identity():
    model = PRX(TINY)
    state = {name: p for name, p in model.state_dict().items() if not name.startswith("repa_projector.")}
    back = from_diffusers(to_diffusers(model.state_dict()))
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    theirs = diffusers_model(**diffusers_config(TINY)).state_dict()
    again = to_diffusers(from_diffusers(theirs))
    assert list(again) == list(theirs) and all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_the_key_map_is_the_one_of_the_design():
    renamed = {"img_qkv_proj.weight": "attention.img_qkv_proj.weight", "txt_kv_proj.weight": "attention.txt_kv_proj.weight",
               "attn_out.weight": "attention.to_out.0.weight", "qk_norm.query_norm.scale": "attention.norm_q.weight",
               "qk_norm.key_norm.scale": "attention.norm_k.weight", "k_norm.scale": "attention.norm_added_k.weight",
               "gate_proj.weight": "gate_proj.weight", "modulation.lin.bias": "modulation.lin.bias"}
    same = {"txt_in.weight": torch.tensor(99)}
    state = {f"blocks.11.{ours}": torch.tensor(i) for i, ours in enumerate(renamed)} | same
    expected = {f"blocks.11.{theirs}": torch.tensor(i) for i, theirs in enumerate(renamed.values())} | same
    assert to_diffusers(state) == expected and from_diffusers(expected) == state
    assert to_diffusers({"repa_projector.0.weight": torch.tensor(0)}) == {}


def test_the_record_has_the_shapes_of_diffusers_model(record_model):
    with torch.device("meta"):
        theirs = diffusers_model(in_channels=3, patch_size=32, bottleneck_size=256, context_in_dim=2304, hidden_size=1792,
                                 mlp_ratio=3.5, num_heads=28, depth=16, axes_dim=[32, 32], theta=10000)
    ours = {name: tuple(p.shape) for name, p in to_diffusers(record_model.state_dict()).items()}
    assert ours == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Routing


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keeping_all_tokens_equals_no_routing_exactly(size):
    model = perturb(PRX(TINY))
    x_t, t, txt, mask = inputs(size)
    N = size[0] * size[1] // 16
    everything = torch.arange(N).expand(3, -1)
    for a, b in zip(model(x_t, t, txt, mask, everything), model(x_t, t, txt, mask)):
        assert torch.equal(a, b)
    assert torch.equal(draw_ids_keep(3, N, 0.0, "cpu", generator(0)), everything)


@pytest.mark.parametrize("start, end", [(1, -1), (2, 4), (0, 6), (1, -2), (-3, -1), (0, 1)])
def test_routed_tokens_come_back_unchanged_and_kept_ones_where_they_were(start, end):
    model = perturb(PRX(replace(TINY, route_start=start, route_end=end)))
    expected = range(6)[start:end]
    assert model.cfg.route == expected
    blocks = record(model)
    x_t, t, txt, mask = inputs()
    enters = []
    model.img_in.register_forward_hook(lambda module, args, out: enters.append(out.detach()))
    leaves = []
    model.final_layer.register_forward_pre_hook(lambda module, args: leaves.append(args[0].detach()))
    ids_keep = draw_ids_keep(3, 16, 0.5, "cpu", generator(0))
    model(x_t, t, txt, mask, ids_keep)

    before = blocks[expected.start - 1].made if expected.start > 0 else enters[0]
    after = blocks[expected.stop].seen if expected.stop < 6 else leaves[0]
    away = dropped(ids_keep, 16)
    assert away.sum() == 3 * 8 and torch.equal(after[away], before[away])
    assert torch.equal(blocks[expected.start].seen, before[~away].reshape(3, 8, -1))  # in the order of the image
    assert torch.equal(after[~away].reshape(3, 8, -1), blocks[expected.stop - 1].made)
    assert ((after[~away] - before[~away]).abs().amax(-1) > 1e-2).all()
    assert [block.seen.shape[1] for block in blocks] == [8 if i in expected else 16 for i in range(6)]


def test_a_routed_block_computes_what_the_dense_block_does_with_the_others_masked():
    """So a kept token keeps its position and its modulation."""
    model = perturb(PRX(replace(TINY, depth=1, route_start=0, route_end=1, repa_depth=1)))
    x_t, t, txt, mask = inputs((8, 24))
    ids_keep = draw_ids_keep(3, 12, 0.5, "cpu", generator(0))
    block, (recorder,) = model.blocks[0], record(model)
    model(x_t, t, txt, mask, ids_keep)
    got = recorder.made
    model(x_t, t, txt, mask)
    text = model.read_text(txt, mask)
    keys = Keys.lay_out(text, 12, padded=True)
    away = dropped(ids_keep, 12).flatten()
    masked = keys.mask.flatten().index_fill(0, keys.image_at[away], False).view(keys.mask.shape)
    dense = block(recorder.seen, text, model.time_in(t), rotary_table(2, 6, 16, 1e4, x_t.device), keys._replace(mask=masked))
    assert relative(got, dense.gather(1, ids_keep[:, :, None].expand(-1, -1, 48))) < 1e-5  # measured 2e-7


def test_pixels_of_routed_tokens_reach_no_other_token_and_get_no_gradient_from_one():
    """Here all blocks are routed, so that nothing mixes before or after."""
    model = perturb(PRX(replace(TINY, route_start=0, route_end=6)))
    x_t, t, txt, mask = inputs()
    ids_keep = draw_ids_keep(3, 16, 0.5, "cpu", generator(0))
    away = dropped(ids_keep, 16)
    pixels = away.reshape(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(3, 3, 16, 16)
    x_t.requires_grad_()
    x0_hat, feat = model(x_t, t, txt, mask, ids_keep)
    for loss in (x0_hat[~pixels].square().sum(), feat.square().sum()):
        (grad,) = torch.autograd.grad(loss, x_t, retain_graph=True)
        assert (grad[pixels] == 0).all() and (grad[~pixels] != 0).all()
    (grad,) = torch.autograd.grad(x0_hat[pixels].square().sum(), x_t, retain_graph=True)
    assert (grad[pixels] != 0).all() and (grad[~pixels] == 0).all()
    block_grads = torch.autograd.grad(x0_hat[pixels].square().sum(), list(model.blocks.parameters()), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in block_grads)  # blocks learn from kept tokens only


@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("routed", [True, False])
def test_feat_is_what_leaves_block_repa_depth(depth, routed):
    """Inside the route, its last block included, feat has the kept tokens; outside it has all."""
    model = perturb(PRX(replace(TINY, repa_depth=depth, route_start=2, route_end=5)))
    blocks = record(model)
    x_t, t, txt, mask = inputs()
    _, feat = model(x_t, t, txt, mask, draw_ids_keep(3, 16, 0.75, "cpu", generator(0)) if routed else None)
    assert feat.shape == (3, 4 if routed and depth in (3, 4, 5) else 16, 48)
    assert torch.equal(feat, blocks[depth - 1].made)


@pytest.mark.parametrize("N, drop, kept", [(256, 0.5, 128), (1024, 0.5, 512), (64, 0.75, 16), (10, 0.33, 7), (16, 0.0, 16),
                                           (3, 0.9, 0)])
def test_the_number_of_kept_tokens_is_exact_and_they_are_distinct_and_ascending(N, drop, kept):
    ids = draw_ids_keep(50, N, drop, "cpu", generator(0))
    assert ids.shape == (50, kept) and ids.dtype == torch.int64
    assert (ids.diff(dim=1) > 0).all() and (ids >= 0).all() and (ids < N).all()


def test_kept_tokens_are_uniform_over_the_image_and_drawn_for_each_sample():
    B, N, K = 40_000, 12, 4
    kept = (~dropped(draw_ids_keep(B, N, 1 - K / N, "cpu", generator(0)), N)).double()
    p = K / N
    assert (kept.mean(0) - p).abs().max() < 4.5 * (p * (1 - p) / B) ** 0.5  # 4.5 standard errors; measured 3.0
    together = kept.T @ kept / B  # share of samples in which tokens i and j are both kept
    q = K * (K - 1) / (N * (N - 1))
    off_diagonal = together[~torch.eye(N, dtype=torch.bool)]
    assert (off_diagonal - q).abs().max() < 4.5 * (q * (1 - q) / B) ** 0.5  # measured 3.0
    neighbours = (kept[1:] * kept[:-1]).sum(1).mean()  # samples are independent: K^2 / N in common
    assert abs(neighbours - K * K / N) < 0.02


def test_kept_tokens_are_a_function_of_the_generator():
    a, b, c = (draw_ids_keep(4, 64, 0.5, "cpu", generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights


def test_each_tensor_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    a = dict(PRX(TINY).named_parameters())
    torch.manual_seed(2)
    b = dict(PRX(TINY).named_parameters())
    assert all(torch.equal(a[name], b[name]) for name in a)
    small = dict(PRX(replace(TINY, depth=2, repa_depth=1, repa_weight=0.0)).named_parameters())  # fewer tensors are drawn
    assert all(torch.equal(a[name], p) for name, p in small.items())
    other = dict(PRX(replace(TINY, seed=1)).named_parameters())
    drawn = [name for name, p in a.items() if p.unique().numel() > 1]
    assert len(drawn) == 2 * 5 + 6 * 6 + 6 and not any(torch.equal(a[name], other[name]) for name in drawn)
    same_shape = {name: p for name, p in a.items() if name.endswith("gate_proj.weight") or name.endswith("up_proj.weight")}
    assert len({tuple(p.flatten()[:4].tolist()) for p in same_shape.values()}) == 12


def test_building_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = PRX(TINY)
    with torch.device("meta"):
        on_meta = PRX(TINY)
    on_meta.to_empty(device="cpu").init_weights(0)
    torch.manual_seed(0)
    on_meta.init_weights(0)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), on_meta.parameters()))


def test_linear_layers_start_uniform_within_one_over_the_root_of_fan_in():
    model = PRX(replace(TINY, width=96))
    checked = 0
    for name, p in model.named_parameters():
        if re.search(r"modulation|final_layer|norm", name):
            continue
        fan_in = p.shape[1] if p.ndim == 2 else dict(model.named_parameters())[name.replace("bias", "weight")].shape[1]
        bound = fan_in**-0.5
        assert p.abs().max() <= bound
        if p.numel() >= 1000:  # mean 0, standard deviation bound / sqrt(3), and the ends are reached
            assert abs(p.mean()) < 5 * bound / 3**0.5 / p.numel() ** 0.5
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert p.max() > 0.98 * bound and p.min() < -0.98 * bound
            checked += 1
    assert checked > 30


def test_adaln_and_output_start_at_zero_and_norms_at_one():
    for name, p in PRX(TINY).named_parameters():
        if re.search(r"modulation|final_layer", name):
            assert p.count_nonzero() == 0, name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.count_nonzero() == p.numel(), name


def test_an_untrained_model_predicts_exactly_zero_through_identity_blocks():
    model = PRX(TINY)
    blocks = record(model)
    x_t, t, txt, mask = inputs()
    x0_hat, feat = model(x_t, t, txt, mask)
    assert x0_hat.shape == x_t.shape and x0_hat.count_nonzero() == 0
    assert all(torch.equal(block.made, blocks[0].seen) for block in blocks) and torch.equal(feat, blocks[0].seen)
    assert feat.abs().max() > 0.1


def init_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3,
                            timeout=datetime.timedelta(seconds=60))
    model = build_model(TINY, init_device_mesh("cpu", (3,), mesh_dim_names=("shard",)), torch.device("cpu"))
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    rows = {name: p.to_local().shape[0] for name, p in model.named_parameters()}
    torch.save((whole, rows), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_three_ranks_start_with_the_weights_of_one(tmp_path):
    fork_context()  # the process that has torch imported already
    mp.start_processes(init_worker, args=(str(tmp_path),), nprocs=3, start_method="forkserver")
    expected = dict(PRX(TINY).named_parameters())
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for whole, _ in found:
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], p) for name, p in expected.items())
    for name, p in expected.items():  # and hold a third each
        assert [rows[name] for _, rows in found] == [len(part) for part in p.chunk(3)] + [0] * (3 - len(p.chunk(3)))


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def test_a_sharded_model_starts_with_the_weights_of_a_plain_one(mesh):
    model, expected = build_model(TINY, mesh, torch.device("cpu")), dict(PRX(TINY).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert isinstance(p, DTensor) and p.dtype == torch.float32 and torch.equal(p.full_tensor(), expected[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# bf16 and rotary


def test_rotary_turns_pairs_by_row_and_column():
    """Against complex numbers in float64: pair j of the first half turns by row * theta^(-j / (d / 4)), of the second by
    column."""
    rows, cols, d, theta = 40, 64, 16, 1e4
    x = torch.randn(2, rows * cols, 3, d, generator=generator(0), dtype=torch.float64)
    frequency = theta ** (-torch.arange(d // 4, dtype=torch.float64) / (d // 4))
    row, col = torch.arange(rows * cols, dtype=torch.float64).div(cols, rounding_mode="floor"), torch.arange(rows * cols) % cols
    angle = torch.cat([row[:, None] * frequency, col[:, None] * frequency], dim=1)  # [N, d / 2]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.view_as_real(turned).flatten(-2)
    rope = rotary_table(rows, cols, d, theta, torch.device("cpu"))
    assert rope.shape == (1, rows * cols, d // 2, 2) and rope.dtype == torch.float32
    assert (apply_rotary(x.float(), rope) - expected).abs().max() < 2e-6  # measured 4e-7


def test_rotary_is_fp32_inside_and_the_inputs_dtype_outside():
    rope = rotary_table(16, 16, 16, 1e4, torch.device("cpu"))
    x = torch.randn(2, 256, 3, 16, generator=generator(0)).bfloat16()
    out = apply_rotary(x, rope)
    assert out.dtype == torch.bfloat16 and torch.equal(out, apply_rotary(x.float(), rope).bfloat16())  # rounded once


def test_rmsnorm_is_fp32_inside_and_the_inputs_dtype_outside():
    norm = perturb(RMSNorm(16))
    x = torch.randn(50, 16, generator=generator(0)).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale.double()
    assert (norm(x.float()) - expected).abs().max() < 1e-6  # measured 3e-7
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), norm(x.float()).bfloat16())  # rounded once


@pytest.mark.parametrize("routed", [True, False])
def test_bf16_forward_is_near_fp32_and_its_rotary_stays_fp32(routed):
    half = perturb(PRX(TINY)).bfloat16()
    full = PRX(TINY)
    full.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    x_t, t, txt, mask = inputs()
    x_t, txt = x_t.bfloat16().float(), txt.bfloat16().float()
    ids_keep = draw_ids_keep(3, 16, 0.5, "cpu", generator(0)) if routed else None
    expected, _ = full(x_t, t, txt, mask, ids_keep)
    blocks = record(half)
    out, feat = half(x_t, t, txt, mask, ids_keep)
    assert out.dtype == torch.float32 and feat.dtype == torch.bfloat16
    assert all(block.rope.dtype == torch.float32 for block in blocks)
    assert relative(out, expected) < 3e-2  # bf16 has 3 digits; measured 1e-2


def test_bf16_keeps_time_in_fp32_until_its_waves():
    """1000 t in bf16 would be off by up to 2 of the fastest wave's radians."""
    model = PRX(TINY).bfloat16()
    t = torch.tensor([0.7001, 0.7012, 0.7023])
    angle = 1000 * t.double()[:, None] * torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(torch.bfloat16)
    seen = []
    model.time_in.in_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.time_in(t)
    assert (seen[0].double() - waves.double()).abs().max() < 5e-3  # one rounding to bf16; measured 2e-3


def test_sharded_bf16_computes_what_a_bf16_model_does(mesh):
    """FSDP casts the weights and nothing else: t, rotary and x0_hat stay fp32, and so do the stored weights."""
    sharded, plain = build_model(replace(TINY, precision="bf16"), mesh, torch.device("cpu")), PRX(TINY)
    perturb(plain)
    with torch.no_grad():
        for p, q in zip(sharded.parameters(), plain.parameters()):
            p.to_local().copy_(q)
    x_t, t, txt, mask = inputs()
    ids_keep = draw_ids_keep(3, 16, 0.5, "cpu", generator(0))
    out, feat = sharded(x_t, t, txt, mask, ids_keep)
    expected, expected_feat = plain.bfloat16()(x_t, t, txt, mask, ids_keep)
    assert torch.equal(out, expected) and torch.equal(feat, expected_feat) and feat.dtype == torch.bfloat16
    out.square().mean().backward()
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in sharded.parameters())
    unused = [name for name, p in sharded.named_parameters() if p.grad is None]
    assert all(name.startswith("repa_projector.") for name in unused)  # it has no part in x0_hat


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_masked_text_tokens_have_no_influence():
    model = perturb(PRX(TINY))
    x_t, t, txt, mask = inputs()
    other = torch.where(mask[:, :, None], txt, 1000 * torch.randn(txt.shape, generator=generator(5)))
    for ids_keep in (None, draw_ids_keep(3, 16, 0.5, "cpu", generator(0))):
        for a, b in zip(model(x_t, t, txt, mask, ids_keep), model(x_t, t, other, mask, ids_keep)):
            assert torch.equal(a, b)
    txt.requires_grad_()
    model(x_t, t, txt, mask)[0].square().sum().backward()
    assert (txt.grad[~mask] == 0).all() and (txt.grad[mask] != 0).all()  # and each real token has one


def test_longer_padding_changes_nothing():
    model = perturb(PRX(TINY))
    x_t, t, txt, mask = inputs()
    padded = torch.cat([txt, torch.randn(3, 5, 20, generator=generator(5))], dim=1)
    longer = torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], dim=1)
    assert relative(model(x_t, t, padded, longer)[0], model(x_t, t, txt, mask)[0]) < 1e-5  # measured 3e-7


def test_the_order_of_text_tokens_does_not_matter():
    """Text has no positions in PRX: order lives in the encoder's vectors."""
    model = perturb(PRX(TINY))
    x_t, t, txt, mask = inputs()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert relative(model(x_t, t, txt[:, order], mask[:, order])[0], model(x_t, t, txt, mask)[0]) < 1e-5  # measured 3e-7


def test_keys_lie_text_first_close_together_or_in_equal_rows():
    text = Text(torch.zeros(3, 8), torch.tensor([2, 0, 1]), longest=4)  # 3 prompts of 2, 0 and 1 tokens
    close, padded = (Keys.lay_out(text, 2, padded) for padded in (False, True))  # 2 image tokens each
    assert close.text_at.tolist() == [0, 1, 6] and close.image_at.tolist() == [2, 3, 4, 5, 7, 8]
    assert close.key_starts.tolist() == [0, 4, 6, 9] and close.query_starts.tolist() == [0, 2, 4, 6] and close.mask is None
    assert padded.text_at.tolist() == [0, 1, 12] and padded.image_at.tolist() == [2, 3, 6, 7, 13, 14]
    rows = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(padded.mask[:, 0, 0], rows) and padded.longest == close.longest == 6


def each_alone(q, k, v, query_starts, key_starts, most_queries, most_keys):
    """What `varlen_attn` computes: every sequence by itself; it also checks what is promised to it."""
    out = []
    assert query_starts.dtype == key_starts.dtype == torch.int32 and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    assert len(q) == query_starts[-1] and len(k) == len(v) == key_starts[-1]
    for a, b, c, d in zip(query_starts, query_starts[1:], key_starts, key_starts[1:]):
        assert b - a <= most_queries and d - c <= most_keys
        one = F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d])))
        out.append(one.transpose(1, 2)[0])
    return torch.cat(out)


@pytest.mark.parametrize("routed", [False, True])
def test_attention_without_padding_equals_masked_attention(monkeypatch, routed):
    """The layout and gradients of the GPU's path, its kernel played by a loop; prompts of 7, 4, 0 tokens."""
    def run() -> list[Tensor]:
        model = perturb(PRX(TINY))
        x_t, t, txt, _ = inputs()
        mask = torch.tensor([[True] * 7, [True, False, True, True, False, True, False], [False] * 7])
        x0_hat, feat = model(x_t, t, txt, mask, draw_ids_keep(3, 16, 0.5, "cpu", generator(0)) if routed else None)
        (x0_hat.square().mean() + feat.square().mean()).backward()
        return [x0_hat, feat, *(p.grad for name, p in model.named_parameters() if "repa" not in name)]

    masked = run()
    monkeypatch.setattr(train_prx, "varlen_attn", each_alone)
    monkeypatch.setattr(train_prx, "has_flash_attention", lambda img, head_dim: True)
    assert max(relative(a, b) for a, b in zip(run(), masked)) < 1e-5  # measured 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.parametrize("routed", [False, True])
def test_flash_attention_without_padding_equals_masked_attention_on_a_gpu(monkeypatch, routed):
    def run() -> list[Tensor]:
        model = perturb(PRX(replace(TINY, width=128, heads=2))).cuda().bfloat16()
        x_t, t, txt, mask = (x.cuda() for x in inputs())
        ids_keep = draw_ids_keep(3, 16, 0.5, "cpu", generator(0)).cuda() if routed else None
        x0_hat, feat = model(x_t, t, txt, mask, ids_keep)
        (x0_hat.square().mean() + feat.float().square().mean()).backward()
        return [x0_hat, feat, *(p.grad for name, p in model.named_parameters() if "repa" not in name)]

    flash = run()
    monkeypatch.setattr(train_prx, "has_flash_attention", lambda img, head_dim: False)
    assert max(relative(a.float(), b.float()) for a, b in zip(flash, run())) < 3e-2  # bf16


def test_prompts_without_padding_give_what_padded_ones_do():
    model = perturb(PRX(TINY))
    x_t, t, txt, mask = inputs()
    padded, packed = model(x_t, t, txt, mask)[0], model(x_t, t, txt[mask], mask)[0]
    assert torch.equal(padded, packed)
    with torch.no_grad():
        known = model.text_keys(txt, mask)
        assert relative(model(x_t, t, known)[0], padded) < 1e-6 and len(known.keys) == TINY.depth


def test_gather_tokens_takes_each_samples_own():
    x = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    assert gather_tokens(x, torch.tensor([[0, 3], [2, 1]])).tolist() == [[x[0, 0].tolist(), x[0, 3].tolist()],
                                                                         [x[1, 2].tolist(), x[1, 1].tolist()]]


def test_a_samples_output_does_not_depend_on_its_batch():
    model = perturb(PRX(TINY))
    x_t, t, txt, mask = inputs()
    ids_keep = draw_ids_keep(3, 16, 0.5, "cpu", generator(0))
    whole = model(x_t, t, txt, mask, ids_keep)[0]
    for i in range(3):
        alone = model(*(x[i : i + 1] for x in (x_t, t, txt, mask, ids_keep)))[0]
        assert relative(alone, whole[i : i + 1]) < 1e-5  # measured 6e-7
