"""The model: the record's size, agreement with diffusers, routing, text and attention without padding, initial weights;
precision, sharding, a whole step; and what `check_config` refuses.

    OMP_NUM_THREADS=1 pytest tests/test_model.py

"Relative" means max|a - b| / max|b|. Measured errors, on a CPU, stand beside each tolerance.
"""
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import need_diffusers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_prx
from tools.exchange import diffusers_config, from_diffusers, to_diffusers
from train_prx import (
    EMA, PRESETS, PRX, BuiltinText, Config, Frozen, RMSNorm, Stage, T5GemmaText, UserError, apply_rotary, attention,
    build_model, build_optimizer, check_config, compute_dtype, draw_ids_keep, gather_tokens, lr_factor, make_batch,
    pad_latents, parse_config, rotary_table, set_whole, tag_generator, train_step, training_loss)

KIND = "parity"  # of the tests without a mark of their own

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Config(patch=4, bottleneck=12, width=48, depth=6, heads=3, text_dim=20, text_tokens=7, route_start=1,
              route_end=-1, repa_depth=3, repa_dim=10, precision="fp32", compile=False, drop=0.5, lr_decay="none",
              repa_weight=0.5)
SIZES = [(16, 16), (8, 24), (20, 12)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturb(model: nn.Module) -> nn.Module:
    """Move every weight, so that no part starts as zero, one or the identity."""
    g = generator(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def inputs(size: tuple[int, int] = (16, 16), seed: int = 1) -> tuple[Tensor, ...]:
    """x_t, t, txt, txt_mask of three images: a full prompt, a short and an empty one."""
    g = generator(seed)
    mask = torch.arange(7) < torch.tensor([7, 3, 0])[:, None]
    return torch.randn(3, 3, *size, generator=g), torch.rand(3, generator=g), torch.randn(3, 7, 20, generator=g), mask


def keep_half(N: int = 16) -> Tensor:
    return draw_ids_keep(3, N, 0.5, "cpu", generator(0))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def record(model: PRX) -> list[SimpleNamespace]:
    """A note for each block, which its next forward fills: the tokens that it sees and makes, and rotary's dtype."""
    notes = [SimpleNamespace() for _ in model.blocks]
    for block, note in zip(model.blocks, notes):
        block.register_forward_hook(lambda block, args, out, note=note: note.__dict__.update(
            seen=args[0].detach(), made=out.detach(), rope_dtype=args[4].dtype))
    return notes


def dropped(ids_keep: Tensor, N: int) -> Tensor:
    """[B, N] bool: the tokens that are routed away."""
    return torch.ones(len(ids_keep), N, dtype=torch.bool).scatter(1, ids_keep, False)


# ---------------------------------------------------------------------------------------------------------------------
# Size, names, and agreement with diffusers


@pytest.mark.recipe
def test_the_record_has_1_177_215_744_parameters_of_which_muon_has_112_matrices_and_adam_the_rest():
    with torch.device("meta"):
        record_model = PRX(Config())
    sizes = {name: p.numel() for name, p in record_model.named_parameters()}
    projector = sum(n for name, n in sizes.items() if name.startswith("repa_projector."))
    assert sum(sizes.values()) - projector == 1_177_215_744
    assert projector == 1792 * 1024 + 2 * 1024**2 + 3 * 1024  # three linear layers, 1792 -> 1024 -> 1024 -> 1024
    muon, adam = build_optimizer(record_model, Config()).param_groups
    assert len(muon["params"]) == 112 and sum(p.numel() for p in muon["params"]) == 1_156_055_040
    assert {id(p) for p in muon["params"]} == {id(p) for p in record_model.blocks.parameters() if p.ndim == 2}
    every = sorted(id(p) for group in (muon, adam) for p in group["params"])
    assert every == sorted(id(p) for p in record_model.parameters())
    assert muon.items() >= dict(lr=1e-4, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0).items()
    assert adam.items() >= dict(use_muon=False, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0).items()


def run_both(direction: str, cfg: Config, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Output and all gradients, under diffusers' names, of both models with weights that one passes to the other."""
    need_diffusers()
    from diffusers import PRXTransformer2DModel  # here: it takes 4 s

    ours, theirs, results = PRX(cfg), PRXTransformer2DModel(**diffusers_config(cfg)), []
    if direction == "ours to diffusers":
        theirs.load_state_dict(to_diffusers(perturb(ours).state_dict()))
    else:
        ours.load_state_dict(from_diffusers(perturb(theirs).state_dict()))
    for model in (ours, theirs):
        x_t, t, txt, mask = inputs(size)
        x_t, t, txt = (x.requires_grad_() for x in (x_t, t, txt))
        out = model(x_t, t, txt, mask)[0] if model is ours else model(x_t, t, txt, mask, return_dict=False)[0]
        (out * torch.randn(out.shape, generator=generator(9))).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        grads = to_diffusers(grads) if model is ours else grads
        results.append({"output": out.detach(), "x_t": x_t.grad, "t": t.grad, "txt": txt.grad, **grads})
    return results


@pytest.mark.parametrize("direction", ["ours to diffusers", "diffusers to ours"])
@pytest.mark.parametrize("size, change", [
    *((size, {}) for size in SIZES), ((8, 12), dict(heads=6)), ((8, 512), dict(rope_theta=100.0)),
    ((8, 12), dict(mlp_ratio=2.0)), ((8, 12), dict(patch=2, bottleneck=5)), ((8, 12), dict(depth=2, repa_depth=1))],
    ids=str)
def test_forward_and_every_gradient_agree_with_diffusers(direction, size, change):
    a, b = run_both(direction, replace(TINY, repa_weight=0.0, **change), size)  # no projector
    assert a.keys() == b.keys() and len(a) == 4 + 2 * 7 + 11 * change.get("depth", 6)
    assert relative(a["output"], b["output"]) < 1e-5  # measured 6e-7
    for name in b:
        assert b[name].abs().max() > 1e-3, name  # there is something to compare
        assert relative(a[name], b[name]) < 5e-5, name  # measured at most 4e-6


# ---------------------------------------------------------------------------------------------------------------------
# Routing


@pytest.mark.recipe
@pytest.mark.parametrize("start, end, depth", [(1, -1, 1), (2, 4, 3), (2, 4, 4), (0, 6, 6), (-3, -1, 2), (0, 1, 5)])
def test_routed_tokens_come_back_unchanged_kept_ones_where_they_were_and_feat_is_where_asked(start, end, depth):
    model = perturb(PRX(replace(TINY, route_start=start, route_end=end, repa_depth=depth)))
    expected = range(6)[start:end]
    blocks, enters, leaves = record(model), [], []
    model.img_in.register_forward_hook(lambda module, args, out: enters.append(out.detach()))
    model.final_layer.register_forward_pre_hook(lambda module, args: leaves.append(args[0].detach()))
    ids_keep = keep_half()
    _, feat = model(*inputs(), ids_keep)

    before = blocks[expected.start - 1].made if expected.start > 0 else enters[0]
    after = blocks[expected.stop].seen if expected.stop < 6 else leaves[0]
    away = dropped(ids_keep, 16)
    assert away.sum() == 3 * 8 and torch.equal(after[away], before[away])
    assert torch.equal(blocks[expected.start].seen, before[~away].reshape(3, 8, -1))  # in the order of the image
    assert torch.equal(after[~away].reshape(3, 8, -1), blocks[expected.stop - 1].made)
    assert ((after[~away] - before[~away]).abs().amax(-1) > 1e-2).all()
    assert [block.seen.shape[1] for block in blocks] == [8 if i in expected else 16 for i in range(6)]
    assert torch.equal(feat, blocks[depth - 1].made)  # inside the route of the kept tokens, outside of all
    _, feat = model(*inputs())
    assert torch.equal(feat, blocks[depth - 1].made) and {block.seen.shape[1] for block in blocks} == {16}


@pytest.mark.recipe
def test_a_routed_block_computes_what_the_dense_block_does_with_the_others_masked(monkeypatch):
    """So a kept token keeps its position and its modulation."""
    model = perturb(PRX(replace(TINY, depth=1, route_start=0, route_end=1, repa_depth=1)))
    ids_keep = keep_half(12)
    (block,) = record(model)
    model(*inputs((8, 24)), ids_keep)
    routed = block.made

    def without_the_others(q, k, v, txt_mask, is_flash):
        mask = torch.cat([~dropped(ids_keep, 12), txt_mask], dim=1)[:, None, None]  # [B, N + L] -> [B, 1, 1, N + L]
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)

    monkeypatch.setattr(train_prx, "attention", without_the_others)
    model(*inputs((8, 24)))
    assert relative(routed, gather_tokens(block.made, ids_keep)) < 1e-5  # measured 2e-7


@pytest.mark.parametrize("N, drop, kept", [(256, 0.5, 128), (10, 0.33, 7), (16, 0.0, 16), (3, 0.9, 0), (12, 2 / 3, 4)])
def test_kept_tokens_are_as_many_as_said_ascending_and_uniform_over_the_image(N, drop, kept):
    B, p = 10_000, kept / N
    ids = draw_ids_keep(B, N, drop, "cpu", generator(0))
    assert ids.shape == (B, kept) and (ids.diff(dim=1) > 0).all() and (ids >= 0).all() and (ids < N).all()
    there = (~dropped(ids, N)).double()
    assert (there.mean(0) - p).abs().max() <= 4.5 * (p * (1 - p) / B) ** 0.5  # 4.5 standard errors
    assert abs((there[1:] * there[:-1]).sum(1).mean() - kept * p) <= 0.02 * kept  # each sample its own


# ---------------------------------------------------------------------------------------------------------------------
# Text, and attention without padding


@pytest.mark.machinery
def test_masked_text_tokens_have_no_influence():
    model, (x_t, t, txt, mask) = perturb(PRX(TINY)), inputs()
    other = torch.where(mask[:, :, None], txt, 1000 * torch.randn(txt.shape, generator=generator(5)))
    for ids_keep in (None, keep_half()):
        expected, feat = model(x_t, t, txt, mask, ids_keep)
        assert all(map(torch.equal, model(x_t, t, other, mask, ids_keep), (expected, feat)))
        known = model.embed_text(txt)  # keys and values, computed once
        assert len(known) == 6 and torch.equal(model(x_t, t, txt, mask, ids_keep, text_kv=known)[0], expected)
    assert torch.equal(model(x_t, t, txt)[0], model(x_t, t, txt, torch.ones_like(mask))[0])  # without a mask all count
    expected = model(x_t, t, txt.requires_grad_(), mask)[0]
    expected.square().sum().backward()
    assert (txt.grad[~mask] == 0).all() and (txt.grad[mask] != 0).all()  # and each real token has one
    longer = F.pad(txt, (0, 0, 0, 5), value=7.0), F.pad(mask, (0, 5))
    assert relative(model(x_t, t, *longer)[0], expected) < 1e-5  # measured 3e-7


@pytest.mark.recipe
def test_the_order_of_text_has_no_influence():
    """Text has no positions in PRX: order lives in the encoder's vectors."""
    model, (x_t, t, txt, mask), order = perturb(PRX(TINY)), inputs(), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert relative(model(x_t, t, txt[:, order], mask[:, order])[0], model(x_t, t, txt, mask)[0]) < 1e-5  # 3e-7


def each_alone(q, k, v, query_starts, key_starts, most_queries, most_keys):
    """What `varlen_attn` computes: every sequence by itself; it also checks what is promised to it."""
    assert query_starts.dtype == key_starts.dtype == torch.int32 and query_starts[0] == key_starts[0] == 0
    assert len(q) == query_starts[-1] and len(k) == len(v) == key_starts[-1]
    out = []
    for a, b, c, d in zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False):
        assert 0 <= b - a <= most_queries and 0 <= d - c <= most_keys
        if b > a:
            one = F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d])))
            out.append(one.transpose(1, 2)[0])
    return torch.cat(out)


@pytest.mark.parametrize("routed", [False, True])
def test_attention_without_a_mask_equals_masked_attention(monkeypatch, routed):
    """The layout and gradients of the GPU's path, its kernel played by a loop; prompts of 7, 3 and 0 tokens."""
    def outputs_and_gradients() -> list[Tensor]:
        model = perturb(PRX(TINY))
        x0_hat, feat = model(*inputs(), keep_half() if routed else None)
        (x0_hat.square().mean() + feat.square().mean()).backward()
        return [x0_hat, feat, *(p.grad for name, p in model.named_parameters() if "repa" not in name)]

    masked = outputs_and_gradients()
    monkeypatch.setattr(train_prx, "varlen_attn", each_alone)
    monkeypatch.setattr(train_prx, "attention", lambda *tensors_and_flag: attention(*tensors_and_flag[:4], True))
    assert max(relative(a, b) for a, b in zip(outputs_and_gradients(), masked)) < 1e-5  # measured 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_attention_equals_masked_attention_on_a_gpu():
    q, k, v = (torch.randn(3, n, 2, 64, generator=generator(n)) for n in (16, 23, 23))
    results = []
    for is_flash in (True, False):
        leaves = [x.cuda().bfloat16().requires_grad_() for x in (q, k, k + v)]
        out = attention(*leaves, inputs()[3].cuda(), is_flash)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert max(relative(a.float(), b.float()) for a, b in zip(*results)) < 3e-2  # bf16
    assert (results[0][2][1, 16 + 3 :] == 0).all()  # padding gets no gradient


@pytest.mark.machinery
def test_captions_of_any_length_reach_attention_in_equal_shapes(networks):
    """So that blocks compile once, and no shape is met for the first time in the middle of a run."""
    cfg = replace(TINY, text_encoder=f"{networks}/t5gemma", text_dim=24, text_tokens=9)
    model, seen, lengths = perturb(PRX(cfg)), set(), set()
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    torch._dynamo.utils.counters.clear()
    for captions in (["red", "", "a large circle in the top left"], ["a " * 50, "red", "red"], ["", "", ""]):
        latents = [torch.randn(len(caption.split()[:9]), 24) for caption in captions]  # as they are stored with data
        stored = {"latents": torch.cat(latents), "txt_mask": pad_latents(latents, 9)[1]}
        for encode_text, extra in ((BuiltinText(cfg, CPU), {}), (T5GemmaText(cfg, CPU), {}), (None, stored)):
            chunk = {"images": torch.zeros(3, 3, 16, 16, dtype=torch.uint8), "captions": captions, **extra}
            batch = make_batch(chunk, encode_text, CPU)
            model(batch["x0"], torch.rand(3), batch["txt"], batch["txt_mask"], keep_half())
            seen.add(tuple((x.shape, x.stride(), x.dtype) for x in (batch["txt"], batch["txt_mask"])))
            lengths.add(tuple(batch["txt_mask"].sum(1).tolist()))
    assert len(lengths) >= 4 and len(seen) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # routed and not


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights


@pytest.mark.machinery
def test_each_tensor_depends_on_seed_and_name_alone_and_the_global_state_is_left_alone():
    a, before = PRX(TINY), torch.get_rng_state()
    a.init_weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    a, other = dict(a.named_parameters()), dict(PRX(replace(TINY, seed=1)).named_parameters())
    small = PRX(replace(TINY, depth=2, repa_depth=1, repa_weight=0.0))  # fewer tensors are drawn
    assert all(torch.equal(a[name], p) for name, p in small.named_parameters())
    drawn = [name for name, p in a.items() if p.unique().numel() > 1]
    assert len(drawn) > 6 and not any(torch.equal(a[name], other[name]) for name in drawn)
    assert len({tuple(a[name].flatten()[:4].tolist()) for name in drawn}) == len(drawn)  # no two are alike


@pytest.mark.recipe
def test_linear_layers_start_uniform_and_an_untrained_model_predicts_zero_through_identity_blocks():
    model = PRX(replace(TINY, width=96))
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if re.search(r"modulation|final_layer|norm", name):
            assert (p == ("norm" in name)).all(), name  # 1 or 0
            continue
        bound = parameters[name.replace("bias", "weight")].shape[1] ** -0.5  # one over the root of fan-in
        assert p.abs().max() <= bound
        if p.numel() >= 1000:  # mean 0, standard deviation bound / sqrt(3), and the ends are reached
            assert abs(p.mean()) < 5 * bound / 3**0.5 / p.numel() ** 0.5 and p.aminmax()[0] < -0.98 * bound
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05) and p.max() > 0.98 * bound
    blocks = record(model)
    x0_hat, feat = model(*inputs())
    assert x0_hat.shape == (3, 3, 16, 16) and x0_hat.count_nonzero() == 0
    assert all(torch.equal(block.made, blocks[0].seen) for block in blocks) and torch.equal(feat, blocks[0].seen)


@pytest.mark.machinery
def test_init_weights_names_a_parameter_without_a_rule():
    with torch.device("meta"):
        model = PRX(TINY)
        model.blocks[4].gain = nn.Parameter(torch.empty(48))
        model.registers = nn.Parameter(torch.empty(4, 48))
    model.to_empty(device="cpu")
    with pytest.raises(UserError, match=r"init_weights has no rule for blocks\.4\.gain \[48\]"):
        model.init_weights(0)
    del model.blocks[4].gain
    model.init_weights(0)
    assert abs(model.registers.std() / 0.02 - 1) < 0.2  # 192 values: 4 standard errors


@pytest.mark.machinery
def test_the_second_of_three_ranks_starts_with_its_third_of_the_weights_of_one():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)  # whose collectives send nothing
    model = build_model(TINY, init_device_mesh("cpu", (3,), mesh_dim_names=("shard",)), CPU)
    held = {name: p.to_local() for name, p in model.named_parameters()}
    dist.destroy_process_group()
    expected = dict(PRX(TINY).named_parameters())
    assert held.keys() == expected.keys()
    for name, p in expected.items():
        rows = -(-len(p) // 3)  # of the first ranks; the last may hold fewer, or none
        assert torch.equal(held[name], p[rows : 2 * rows]), name


# ---------------------------------------------------------------------------------------------------------------------
# Precision, sharding, the step


def test_rotary_and_rmsnorm_compute_in_fp32_and_round_once():
    """What they compute, diffusers tells."""
    x, rope = torch.randn(2, 40 * 64, 3, 16, generator=generator(0)).bfloat16(), rotary_table(40, 64, 16, 1e4, CPU)
    assert rope.dtype == torch.float32
    for function in (perturb(RMSNorm(16)), lambda x: apply_rotary(x, rope)):
        assert function(x).dtype == torch.bfloat16 and torch.equal(function(x), function(x.float()).bfloat16())


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


@pytest.mark.machinery
@pytest.mark.parametrize("routed", [True, False])
def test_sharded_bf16_computes_what_a_bf16_model_does_near_fp32(mesh, routed):
    """FSDP casts the weights and nothing else: t, rotary and x0_hat stay fp32, and so do the stored weights."""
    sharded, plain = build_model(replace(TINY, precision="bf16"), mesh, CPU), perturb(PRX(TINY))
    found, batch = dict(sharded.named_parameters()), (*inputs(), keep_half() if routed else None)
    for name, p in plain.named_parameters():
        set_whole(found[name], p)
    near = plain(*batch)[0]
    blocks = record(plain.bfloat16())
    (out, feat), expected = sharded(*batch), plain(*batch)
    assert torch.equal(out, expected[0]) and torch.equal(feat, expected[1])
    assert out.dtype == torch.float32 and feat.dtype == torch.bfloat16
    assert all(block.rope_dtype == torch.float32 for block in blocks)
    assert relative(out, near) < 3e-2  # bf16 has 3 digits; measured 1e-2
    out.square().mean().backward()
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in found.values())


@pytest.mark.machinery
@pytest.mark.parametrize("device, capability, auto", [
    (CPU, None, torch.float32), (torch.device("meta"), None, torch.float32), (CUDA, (7, 5), torch.float32),
    (CUDA, (8, 0), torch.bfloat16), (CUDA, (12, 0), torch.bfloat16)])
def test_auto_is_bf16_where_a_gpu_multiplies_it_and_fp32_elsewhere(monkeypatch, device, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = [compute_dtype(Config(precision=precision), device) for precision in ("auto", "bf16", "fp32")]
    assert found == [auto, torch.bfloat16, torch.float32]
    assert {cfg.precision for cfg in PRESETS.values()} == {"auto"}


@pytest.mark.recipe
@pytest.mark.parametrize("decay, warmup, expected", [
    ("none", 4, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 19: 1.0}), ("none", 0, {0: 1.0, 19: 1.0}),
    ("linear", 4, {0: 0.25, 2: 0.75 * 0.9, 10: 0.5, 19: 0.05})])
def test_the_learning_rate_warms_up_and_is_constant_or_falls_linearly(decay, warmup, expected):
    cfg = replace(TINY, lr_decay=decay, warmup=warmup, stages=2 * (Stage(16, 10, 12, True),))  # 20 steps
    assert {step: lr_factor(cfg, step) for step in expected} == pytest.approx(expected)


def copies(tensors) -> dict[str, Tensor]:
    return {name: getattr(x, "full_tensor", lambda: x)().detach().clone() for name, x in tensors}


@pytest.mark.machinery
def test_steps_equal_those_of_a_plain_model_and_a_non_finite_one_is_skipped(mesh):
    """Four chunks a step, two at a time; some of the gradients are clipped. In step 3 a caption holds a NaN."""
    stage, cfg = Stage(16, 10, 12, False), replace(
        TINY, micro_batch=3, chunks_at_once=2, warmup=3, lr=0.02, adam_lr=0.01, ema=0.9, ema_every=2, grad_clip=0.4)
    model, plain = build_model(cfg, mesh, CPU), PRX(cfg)
    optimizer, plain_optimizer = build_optimizer(model, cfg), build_optimizer(plain, cfg)
    ema, average, is_clipped = EMA(model), copies(plain.named_parameters()), set()

    def state() -> list[dict[str, Tensor]]:
        return [copies(model.named_parameters()), *(copies(optimizer.state[p].items()) for p in model.parameters())]

    for step in range(5):
        chunks = [dict(zip(("x0", "t", "txt", "txt_mask"), inputs(seed=10 * step + i))) for i in range(4)]
        chunks[2]["txt"][0, 0, 0] = torch.nan if step == 3 else 0.0
        before = state()
        values, ok = train_step(model, optimizer, ema, Frozen(), iter(chunks), cfg, stage, step)
        weights, *moments = state()
        if step == 3:
            assert ok == 0 and not values["grad_norm"].isfinite()
            assert all(torch.equal(a[name], b[name]) for a, b in zip(before, (weights, *moments)) for name in a)
            continue
        losses, terms = zip(*(
            training_loss(plain, Frozen(), chunk, cfg, stage, tag_generator("cpu", cfg.seed, step, i))
            for i, chunk in enumerate(chunks)))
        plain.zero_grad()
        torch.stack(losses).mean().backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), cfg.grad_clip)
        for group in plain_optimizer.param_groups:
            group["lr"] = min(1, (step + 1) / 3) * (0.02 if group["use_muon"] else 0.01)
        plain_optimizer.step()
        is_clipped.add((norm > 0.4).item())
        expected = {"loss": sum(losses).item() / 4, "grad_norm": norm.item(),
                    **{name: sum(of_chunk[name] for of_chunk in terms).item() / 4 for name in terms[0]}}
        assert ok == 1 and {name: x.item() for name, x in values.items()} == pytest.approx(expected, rel=1e-4)
        if step % 2 == 0:
            average = {name: 0.9 * x + 0.1 * weights[name] for name, x in average.items()}
        for name, p in plain.named_parameters():  # weights move by 0.01 a step
            assert (weights[name] - p).abs().max() < 5e-5, name  # measured 5e-6
            assert (ema.weights[name].full_tensor() - average[name]).abs().max() < 1e-6, name
    assert True in is_clipped
    plain.load_state_dict(average)
    with ema.applied():  # a forward sees the average, and afterwards the weights are what they were
        assert torch.allclose(model(*inputs())[0], plain(*inputs())[0], atol=1e-5)
    assert all(torch.equal(x, weights[name]) for name, x in state()[0].items())


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.machinery
@pytest.mark.parametrize("changes, words", [
    (dict(width=100), "--width=100 .*--heads=28"), (dict(lr=math.nan), "--lr=nan"), (dict(shift=0.0), "--shift=0.0"),
    (dict(drop=1.0), "--drop=1.0"), (dict(uniform_t=1.1), "--uniform_t=1.1"), (dict(micro_batch=0), "--micro_batch=0"),
    (dict(micro_batch=7), "--micro_batch=7"), (dict(name="../x"), "--name=../x"), (dict(ns_steps=99), "--ns_steps=99"),
    (dict(adam_betas=(0.9, 1.0)), "--adam_betas"), (dict(repa_depth=17), "--repa_depth=17"),
    (dict(route_start=5, route_end=5), "--route_start=5 .*--drop=0 and --guidance="),
    (dict(route_start=5, route_end=5, drop=0.0), "--guidance="),  # which is `self`
    (dict(stages=(Stage(500, 1, 16, True),)), "--patch=32"), (dict(stages=(Stage(512, 0, 16, True),)), "--stages"),
    (dict(stages=(Stage(512, 1, 16, True, 1.5),)), "--stages.*short"),
    (dict(stages=(Stage(32, 1, 16, True),), drop=0.9), "--drop=0.9")], ids=str)
def test_what_cannot_work_is_one_line_that_names_the_flag(changes, words):
    base = Config(width=1792, heads=28, depth=16, patch=32, micro_batch=16, drop=0.5, guidance="self")
    with pytest.raises(UserError, match=words) as error:
        check_config(replace(base, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.machinery
def test_flags_are_the_fields_of_a_preset_changed():
    assert parse_config([]) == (PRESETS["record"], "auto")
    for name, preset in PRESETS.items():
        assert parse_config([f"--preset={name}", "--resume=never"]) == (preset, "never") and preset.name == name
    stages = Stage(32, 10, 32, True), Stage(64, 5, 64, False, 0.5)
    cfg, _ = parse_config(["--preset=demo", "--stages=32:10:32:1,64:5:64:0:0.5", "--adam_betas=0.8,0.9", "--compile=0"])
    assert cfg == replace(PRESETS["demo"], stages=stages, adam_betas=(0.8, 0.9), compile=False)
    check_config(replace(Config(), route_start=5, route_end=5, drop=0.0, guidance="cfg"))  # nothing is routed
    for flag, words in {"--widht=3": "did you mean --width", "--width=x": "--width.*'x' is not a whole number",
                        "--compile=yes": "0 or 1", "--guidance=x": "'x'", "--stages=32:10": "global_batch"}.items():
        with pytest.raises(UserError, match=words):
            parse_config([flag])
