"""Flow matching in train_prx.py: timesteps, noise and velocity against closed forms, and the sampler with planted models
against float64 integration.

    OMP_NUM_THREADS=1 pytest tests/test_flow.py

Measured errors, on the CPU of torch 2.15, stand beside each tolerance.
"""
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_prx import PRX, Config, add_noise, generate, sample_timesteps, shift_t, velocity  # noqa: E402

pytestmark = pytest.mark.parity

N_SAMPLES = 100_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Timesteps


def cdf(t: np.ndarray, shift: float, uniform_t: float) -> np.ndarray:
    """P(T <= t) of the training timesteps: a share uniform, the rest a shifted logit-normal(0, 1)."""
    before_shift = t / (shift - (shift - 1) * t)
    normal = np.array([0.5 * math.erfc(-x / 2**0.5) for x in np.log(before_shift / (1 - before_shift))])
    return uniform_t * t + (1 - uniform_t) * normal


@pytest.mark.parametrize("shift, uniform_t", [(3.0, 0.1), (1.0, 0.0), (3.0, 1.0), (6.0, 0.5)])
def test_timesteps_follow_the_shifted_logit_normal_with_a_uniform_share(shift, uniform_t):
    """Kolmogorov-Smirnov: 1.63 / sqrt(n) is exceeded by chance in 1% of seeds; 5% uniform instead of 10% would give three
    times as much."""
    t = sample_timesteps(Config(shift=shift, uniform_t=uniform_t), N_SAMPLES, "cpu", generator()).double().sort().values.numpy()
    inside = (t > 1e-3) & (t < 1 - 1e-6)  # the clamped ends hold the tails
    rank = np.arange(N_SAMPLES)
    expected = cdf(t[inside], shift, uniform_t)
    distance = max(np.abs(expected - rank[inside] / N_SAMPLES).max(), np.abs(expected - (rank[inside] + 1) / N_SAMPLES).max())
    assert distance < 1.63 / N_SAMPLES**0.5  # 0.0052; measured 0.0018 to 0.0039


@pytest.mark.parametrize("shift, uniform_t", [(3.0, 0.1), (1.0, 1.0), (1e8, 0.0), (1e-4, 0.0)])
def test_timesteps_stay_from_a_thousandth_to_below_one(shift, uniform_t):
    t = sample_timesteps(Config(shift=shift, uniform_t=uniform_t), N_SAMPLES, "cpu", generator())
    assert t.shape == (N_SAMPLES,) and t.dtype == torch.float32
    assert t.min() >= 1e-3 * (1 - 1e-6) and t.max() < 1
    if uniform_t == 1.0 or shift < 1:  # the lower end is reached, and values below it are moved there, not drawn again
        assert t.min().item() == pytest.approx(1e-3, rel=1e-6)
    if shift > 1000:
        assert t.max() > 1 - 2e-6


def test_timesteps_are_a_function_of_the_generator():
    draws = [sample_timesteps(Config(), 64, "cpu", generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample_timesteps(Config(), 64, "cpu", generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_shift_fixes_both_ends_and_its_inverse_is_the_inverse_shift():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for s in (0.5, 1.0, 3.0, 6.0):
        shifted = shift_t(t, s)
        assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all()
        assert shift_t(torch.tensor(0.5, dtype=torch.float64), s) == pytest.approx(s / (1 + s))
        assert torch.allclose(shift_t(shifted, 1 / s), t, atol=1e-14)
        odds = t[1:-1] / (1 - t[1:-1])  # the shift multiplies the odds of noise
        assert torch.allclose(shifted[1:-1] / (1 - shifted[1:-1]), s * odds, rtol=1e-12)
    assert torch.equal(shift_t(t, 1.0), t)


# ---------------------------------------------------------------------------------------------------------------------
# Noise and velocity


def test_add_noise_mixes_each_image_by_its_own_t():
    x0, eps = torch.randn(4, 3, 6, 4, generator=generator(0)), torch.randn(4, 3, 6, 4, generator=generator(1))
    t = torch.tensor([0.0, 1.0, 0.3, 0.001])
    x_t = add_noise(x0, eps, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[1], eps[1])
    for i in range(4):
        expected = (1 - t[i].double()) * x0[i].double() + t[i].double() * eps[i].double()
        assert (x_t[i] - expected).abs().max() < 1e-6  # measured 1e-7


def test_velocity_is_noise_minus_data_and_shrinks_below_t_005():
    x0, eps = torch.randn(6, 3, 6, 4, generator=generator(0)), torch.randn(6, 3, 6, 4, generator=generator(1))
    t = torch.tensor([1.0, 0.5, 0.05, 0.04, 0.001, 0.0])
    v = velocity(add_noise(x0, eps, t), x0, t)
    for i in range(6):
        expected = min(t[i].item() / 0.05, 1.0) * (eps[i] - x0[i])
        assert (v[i] - expected).abs().max() < 2e-5  # rounding of x_t, divided by t; measured 3e-6
    x_t = torch.randn(6, 3, 6, 4, generator=generator(2))
    expected = (x_t.double() - x0.double()) / t.double().clamp(min=0.05)[:, None, None, None]
    assert (velocity(x_t, x0, t) - expected).abs().max() < 1e-4  # values up to 70; measured 7e-6


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


class Planted:
    """A model that computes `rule(x, t, txt, ids_keep)` and keeps what it was called with."""

    def __init__(self, rule, patch: int = 4, noise_scale: float = 1.0):
        self.cfg = SimpleNamespace(patch=patch, noise_scale=noise_scale)
        self.rule, self.calls = rule, []

    def __call__(self, x_t, t, txt, txt_mask=None, ids_keep=None):
        self.calls.append(SimpleNamespace(x=x_t.clone(), t=t.clone(), txt=txt, mask=txt_mask, ids_keep=ids_keep))
        return self.rule(x_t, t, txt, ids_keep), None


def draw(model, B: int = 2, **changes) -> Tensor:
    """`generate` with small defaults: prompts are constant vectors 1, 2, ..., the empty prompt is -1."""
    settings = dict(size=(8, 12), steps=6, guidance="none", scale=1.0, drop=0.5, seeds=list(range(10, 10 + B)), shift=3.0)
    txt = torch.arange(1.0, B + 1)[:, None, None].expand(B, 5, 3)
    null = dict(null_txt=torch.full((1, 4, 3), -1.0), null_mask=torch.tensor([[True, False, False, False]]))
    return generate(model, txt, torch.ones(B, 5, dtype=torch.bool), **{**null, **settings, **changes})


def noise_of(seeds: list[int], size: tuple[int, int]) -> Tensor:
    return torch.stack([torch.randn(3, *size, generator=generator(seed)) for seed in seeds])


def grid(steps: int, shift: float) -> np.ndarray:
    t = np.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (6, 1.0), (28, 3.0), (20, 0.5)])
def test_the_time_grid_is_linear_from_1_to_0_and_shifted(steps, shift):
    model = Planted(lambda x, t, txt, ids: 0 * x)
    draw(model, steps=steps, shift=shift)
    assert np.allclose([call.t.tolist() for call in model.calls], np.repeat(grid(steps, shift)[:-1, None], 2, 1), atol=1e-6)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (6, 1.0), (28, 3.0), (20, 1.0)])
def test_a_known_x0_is_reached_exactly_where_the_last_t_is_at_least_005(steps, shift):
    x0 = 1.8 * torch.rand(2, 3, 8, 12, generator=generator(3)) - 0.9
    out = draw(Planted(lambda x, t, txt, ids: x0), steps=steps, shift=shift)
    assert (out - x0).abs().max() < 1e-5  # measured 1e-7


@pytest.mark.parametrize("steps, shift", [(40, 1.0), (28, 0.3), (100, 3.0)])
def test_below_005_the_clamped_division_leaves_a_known_share_of_noise(steps, shift):
    """x - x0 shrinks by 1 - (t - t') / max(t, 0.05) a step."""
    x0 = 1.2 * torch.rand(2, 3, 8, 12, generator=generator(3)) - 0.6
    t = grid(steps, shift)
    left = np.prod(1 - (t[:-1] - t[1:]) / np.maximum(t[:-1], 0.05))
    assert left > 0.003
    out = draw(Planted(lambda x, t, txt, ids: x0), steps=steps, shift=shift)
    expected = (x0.double() + left * (noise_of([10, 11], (8, 12)).double() - x0.double())).clamp(-1, 1)
    assert (out - expected).abs().max() < 1e-5  # measured 7e-8


def test_euler_with_a_model_that_looks_at_x_t_and_text_equals_float64():
    model = Planted(lambda x, t, txt, ids: 0.8 * x + 0.2 * (t * txt[:, 0, 0])[:, None, None, None] - 0.1, noise_scale=2.0)
    out = draw(model, steps=12, shift=2.0)
    x, t = 2.0 * noise_of([10, 11], (8, 12)).double().numpy(), grid(12, 2.0)
    prompt = np.array([1.0, 2.0])[:, None, None, None]
    for now, following in zip(t, t[1:]):
        x0_hat = 0.8 * x + 0.2 * now * prompt - 0.1
        x = x + (following - now) * (x - x0_hat) / max(now, 0.05)
    assert np.abs(x).max() > 1 and np.abs(out.numpy() - x.clip(-1, 1)).max() < 1e-5  # measured 3e-7


def test_pictures_end_in_minus_1_to_1_without_a_graph():
    weight = torch.ones((), requires_grad=True)
    out = draw(Planted(lambda x, t, txt, ids: 3 * weight * torch.ones_like(x)))
    assert (out == 1).all() and not out.requires_grad
    assert (draw(Planted(lambda x, t, txt, ids: -3 * torch.ones_like(x))) == -1).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_self_guidance_is_routed_plus_scale_times_dense_minus_routed(scale):
    model = Planted(lambda x, t, txt, ids: torch.full_like(x, 0.2 if ids is None else 0.1))
    out = draw(model, guidance="self", scale=scale)
    assert (out - (0.1 + scale * (0.2 - 0.1))).abs().max() < 1e-5  # measured 8e-8
    if scale == 1:
        assert len(model.calls) == 6, "there is nothing to guide: one pass a step"
        return
    dense, routed = model.calls[0::2], model.calls[1::2]
    assert len(dense) == len(routed) == 6 and all(call.ids_keep is None for call in dense)
    for a, b in zip(dense, routed):  # the same picture, time and prompt
        assert torch.equal(a.x, b.x) and torch.equal(a.t, b.t) and torch.equal(a.txt, b.txt) and torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_cfg_is_empty_plus_scale_times_prompt_minus_empty(scale):
    model = Planted(lambda x, t, txt, ids: (0.1 * txt.mean((1, 2)))[:, None, None, None].expand_as(x))
    out = draw(model, guidance="cfg", scale=scale)
    for picture, prompt in zip(out, (0.1, 0.2)):
        assert (picture - (-0.1 + scale * (prompt + 0.1))).abs().max() < 1e-5  # measured 8e-8
    if scale == 1:
        assert len(model.calls) == 6, "there is nothing to guide: one pass a step"
        return
    prompts, empties = model.calls[0::2], model.calls[1::2]
    assert len(prompts) == len(empties) == 6 and all(call.ids_keep is None for call in model.calls)
    for a, b in zip(prompts, empties):
        assert torch.equal(a.x, b.x) and torch.equal(a.t, b.t)
        assert b.txt.shape == (2, 4, 3) and (b.txt == -1).all() and b.mask.tolist() == [[True, False, False, False]] * 2
        assert a.txt.shape == (2, 5, 3) and a.mask.all()


def test_guidance_may_push_x0_hat_out_of_range_and_euler_does_not_clamp_on_the_way():
    model = Planted(lambda x, t, txt, ids: torch.full_like(x, 0.9 if ids is None else 0.1))
    draw(model, guidance="self", scale=3.0, steps=4, shift=1.0)  # x0_hat = 2.5
    last = model.calls[-1].x
    expected = 0.75 * 2.5 + 0.25 * noise_of([10, 11], (8, 12))
    assert (last - expected).abs().max() < 1e-5  # measured 2e-7


@pytest.mark.parametrize("guidance", ["self", "cfg"])
def test_guidance_acts_within_its_interval_only(guidance):
    model = Planted(lambda x, t, txt, ids: torch.full_like(x, 0.1 if ids is not None or (txt == -1).all() else 0.2))
    out = draw(model, guidance=guidance, scale=3.0, steps=4, shift=1.0, interval=(0.4, 0.8))
    assert [call.t[0].item() for call in model.calls] == [1, 0.75, 0.75, 0.5, 0.5, 0.25]
    x = noise_of([10, 11], (8, 12)).double()
    for t, x0_hat in ((1, 0.2), (0.75, 0.4), (0.5, 0.4), (0.25, 0.2)):
        x = x - 0.25 * (x - x0_hat) / t
    assert (out - x.clamp(-1, 1)).abs().max() < 1e-5  # measured 6e-8


def tiny_model() -> PRX:
    cfg = Config(patch=4, bottleneck=12, width=48, depth=4, heads=3, text_dim=3, text_tokens=5, route_start=1, route_end=-1,
                 repa_depth=2, repa_weight=0.0)
    model = PRX(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator(p.numel())))
    return model


@pytest.mark.parametrize("guidance", ["self", "cfg"])
def test_scale_1_equals_no_guidance(guidance):
    model = tiny_model()
    a, b, c = draw(model, guidance=guidance, scale=1.0), draw(model, guidance="none"), draw(model, guidance=guidance, scale=3.0)
    assert (a - b).abs().max() < 1e-5  # measured 6e-8
    assert (a - c).abs().max() > 1e-2


def test_no_guidance_calls_the_model_once_a_step_whatever_scale_says():
    model = Planted(lambda x, t, txt, ids: torch.full_like(x, 0.2))
    assert (draw(model, scale=7.0) - 0.2).abs().max() < 1e-5
    assert len(model.calls) == 6 and all(call.ids_keep is None for call in model.calls)


@pytest.mark.parametrize("size, drop, kept", [((8, 12), 0.5, 3), ((16, 16), 0.5, 8), ((16, 16), 0.75, 4), ((16, 16), 0.0, 16)])
def test_self_guidance_keeps_the_right_number_of_tokens_drawn_for_each_image_and_step(size, drop, kept):
    model = Planted(lambda x, t, txt, ids: 0 * x)
    draw(model, B=4, guidance="self", scale=2.0, size=size, drop=drop)
    N = size[0] * size[1] // 16
    ids = torch.stack([call.ids_keep for call in model.calls[1::2]])  # [steps, B, K]
    assert ids.shape == (6, 4, kept) and (ids.diff(dim=-1) > 0).all() and ids.min() >= 0 and ids.max() < N
    if N == 16 and drop > 0:
        assert len({tuple(row) for row in ids.flatten(0, 1).tolist()}) > 20  # of 24


@pytest.mark.parametrize("guidance", ["none", "cfg", "self"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(guidance):
    model = tiny_model()
    txt = torch.randn(4, 5, 3, generator=generator(1))
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 3])[:, None]
    settings = dict(null_txt=torch.randn(1, 5, 3, generator=generator(2)), null_mask=torch.tensor([[True] + [False] * 4]),
                    size=(16, 8), steps=6, guidance=guidance, scale=2.0, drop=0.5, shift=3.0)
    together = generate(model, txt, mask, seeds=[5, 6, 7, 8], **settings)
    for i in range(4):
        alone = generate(model, txt[i : i + 1], mask[i : i + 1], seeds=[5 + i], **settings)
        assert (alone - together[i : i + 1]).abs().max() < 1e-4  # measured 2e-6
    again = generate(model, txt, mask, seeds=[5, 6, 7, 8], **settings)
    assert torch.equal(again, together)
    other = generate(model, txt, mask, seeds=[5, 6, 9, 8], **settings)
    changed = (other - together).abs().amax((1, 2, 3)) > 1e-2
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("guidance", ["none", "self"])
def test_noise_and_kept_tokens_are_the_same_in_every_batch(guidance):
    def calls(seeds: list[int]) -> list:
        model = Planted(lambda x, t, txt, ids: 0 * x, noise_scale=1.5)
        draw(model, B=len(seeds), guidance=guidance, scale=2.0, seeds=seeds)
        return model.calls

    together, alone = calls([3, 1, 4, 1]), calls([4])
    assert torch.equal(together[0].x, 1.5 * noise_of([3, 1, 4, 1], (8, 12)))
    for a, b in zip(together, alone):
        assert torch.equal(a.x[2:3], b.x) and torch.equal(a.x[1], a.x[3])  # equal seeds, equal noise
        assert (a.ids_keep is None) == (b.ids_keep is None) and (a.ids_keep is None or torch.equal(a.ids_keep[2:3], b.ids_keep))


@pytest.mark.parametrize("size", [(8, 24), (24, 8), (4, 4), (20, 12)], ids=str)
def test_sizes_are_height_by_width_and_need_not_be_square(size):
    out = draw(tiny_model(), size=size)
    assert out.shape == (2, 3, *size) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("changes", [dict(size=(8, 10)), dict(size=(6, 8)), dict(seeds=[1]), dict(seeds=[1, 2, 3])], ids=str)
def test_sizes_off_the_patch_and_missing_seeds_raise_before_any_work(changes):
    model = Planted(lambda x, t, txt, ids: 0 * x)
    with pytest.raises(ValueError, match="patch 4"):
        draw(model, **changes)
    assert not model.calls
