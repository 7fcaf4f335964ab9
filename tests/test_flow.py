"""Flow matching: timesteps, noise and velocity against closed forms, and the sampler, with planted models, in float64.

    OMP_NUM_THREADS=1 pytest tests/test_flow.py

Measured errors, on a CPU, stand beside each tolerance.
"""
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from train_prx import PRX, Config, add_noise, generate, sample_timesteps, shift_t, velocity

KIND = "parity"  # of the tests without a mark of their own

N_SAMPLES = 100_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Timesteps, noise and velocity


@pytest.mark.parametrize("shift, uniform_t", [(3.0, 0.1), (1.0, 0.0), (3.0, 1.0), (6.0, 0.5)])
def test_timesteps_follow_the_shifted_logit_normal_with_a_uniform_share(shift, uniform_t):
    """Kolmogorov-Smirnov: 1.63 / sqrt(n) is exceeded by chance in 1% of seeds; 5% uniform instead of 10% would give
    three times as much."""
    t = sample_timesteps(Config(shift=shift, uniform_t=uniform_t), N_SAMPLES, "cpu", generator())
    t, rank = np.sort(t.double().numpy()), np.arange(N_SAMPLES)
    inside = (t > 1e-3) & (t < 1 - 1e-6)  # the clamped ends hold the tails
    before_shift = t[inside] / (shift - (shift - 1) * t[inside])
    normal = np.array([0.5 * math.erfc(-x / 2**0.5) for x in np.log(before_shift / (1 - before_shift))])
    cdf = uniform_t * t[inside] + (1 - uniform_t) * normal
    distance = max(np.abs(cdf - (rank[inside] + end) / N_SAMPLES).max() for end in (0, 1))
    assert distance < 1.63 / N_SAMPLES**0.5  # 0.0052; measured 0.0018 to 0.0039


@pytest.mark.parametrize("shift, uniform_t", [(3.0, 0.1), (1.0, 1.0), (1e8, 0.0), (1e-4, 0.0)])
def test_timesteps_stay_from_a_thousandth_to_below_one(shift, uniform_t):
    t = sample_timesteps(Config(shift=shift, uniform_t=uniform_t), N_SAMPLES, "cpu", generator())
    assert t.shape == (N_SAMPLES,) and t.dtype == torch.float32 and t.max() < 1
    assert t.min().item() >= 1e-3 * (1 - 1e-6) and (shift >= 1 or t.median() == t.min())  # moved there, not drawn again


def test_shift_fixes_both_ends_and_its_inverse_is_the_inverse_shift():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for s in (0.5, 1.0, 3.0, 6.0):
        shifted = shift_t(t, s)
        assert shifted[0] == 0 and shifted[-1] == 1 and torch.allclose(shift_t(shifted, 1 / s), t, atol=1e-14)
        odds = t[1:-1] / (1 - t[1:-1])  # the shift multiplies the odds of noise
        assert torch.allclose(shifted[1:-1] / (1 - shifted[1:-1]), s * odds, rtol=1e-12)


def test_each_image_is_mixed_by_its_own_t_and_velocity_is_noise_minus_data_that_shrinks_below_t_005():
    x0, eps = (torch.randn(6, 3, 6, 4, generator=generator(seed)) for seed in (0, 1))
    t = torch.tensor([1.0, 0.5, 0.05, 0.04, 0.001, 0.0])
    x_t = add_noise(x0, eps, t)
    v = velocity(x_t, x0, t)
    assert torch.equal(x_t[0], eps[0]) and torch.equal(x_t[5], x0[5])
    for i in range(6):
        mixed = (1 - t[i].double()) * x0[i].double() + t[i].double() * eps[i].double()
        assert (x_t[i] - mixed).abs().max() < 1e-6  # measured 1e-7
        expected = min(t[i].item() / 0.05, 1.0) * (eps[i] - x0[i])
        assert (v[i] - expected).abs().max() < 2e-5  # rounding of x_t, divided by t; measured 3e-6


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
    settings = dict(size=(8, 12), steps=6, guidance="none", scale=1.0, drop=0.5, seeds=range(10, 10 + B), shift=3.0,
                    null_txt=torch.full((1, 4, 3), -1.0), null_mask=torch.tensor([[True, False, False, False]]))
    txt = torch.arange(1.0, B + 1)[:, None, None].expand(B, 5, 3)
    return generate(model, txt, torch.ones(B, 5, dtype=torch.bool), **{**settings, **changes})


def noise_of(seeds: list[int], size: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.stack([torch.randn(3, *size, generator=generator(seed)) for seed in seeds])


def grid(steps: int, shift: float) -> np.ndarray:
    t = np.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (6, 1.0), (28, 3.0), (20, 0.5)])
def test_the_time_grid_is_linear_from_1_to_0_and_shifted_and_a_known_x0_is_reached(steps, shift):
    x0 = 1.8 * torch.rand(2, 3, 8, 12, generator=generator(3)) - 0.9
    model = Planted(lambda x, t, txt, ids: x0)
    out = draw(model, steps=steps, shift=shift)
    t = grid(steps, shift)[:-1]
    assert np.allclose([call.t.tolist() for call in model.calls], np.repeat(t[:, None], 2, 1), atol=1e-6)
    if t[-1] >= 0.05:  # else the clamped division leaves a share of noise: below
        assert (out - x0).abs().max() < 1e-5  # measured 1e-7


@pytest.mark.parametrize("steps, shift", [(12, 2.0), (40, 1.0)])
def test_euler_with_a_model_that_looks_at_x_t_and_text_equals_float64(steps, shift):
    def rule(x, t, txt, ids):
        return 0.8 * x + 0.2 * (t * txt[:, 0, 0])[:, None, None, None] - 0.1

    out = draw(Planted(rule, noise_scale=2.0), steps=steps, shift=shift)
    x, t = 2.0 * noise_of([10, 11]).double().numpy(), grid(steps, shift)
    prompt = np.array([1.0, 2.0])[:, None, None, None]
    for now, following in zip(t, t[1:]):
        x = x + (following - now) * (x - (0.8 * x + 0.2 * now * prompt - 0.1)) / max(now, 0.05)
    assert np.abs(x).max() > 1 and np.abs(out.numpy() - x.clip(-1, 1)).max() < 1e-5  # measured 4e-7


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("guidance", ["self", "cfg"])
def test_guidance_is_the_weaker_image_plus_scale_times_the_difference(guidance, scale):
    """Routed and dense, or empty prompt and prompt; there is nothing to guide at scale 1, and one pass a step does."""
    def rule(x, t, txt, ids):
        return (0.1 * txt[:, 0, 0])[:, None, None, None] + torch.full_like(x, 0.0 if ids is None else -0.3)

    model = Planted(rule)
    out = draw(model, guidance=guidance, scale=scale)
    for picture, strong in zip(out, (0.1, 0.2)):
        weak = strong - 0.3 if guidance == "self" else -0.1
        assert (picture - (weak + scale * (strong - weak))).abs().max() < 1e-5  # measured 1e-7
    for t in grid(6, 3.0)[:-1]:
        calls = [call for call in model.calls if abs(call.t[0] - t) < 1e-5]
        x, txt, tokens = map(torch.cat, zip(*((call.x, call.txt[:, 0, 0], call.mask.sum(1)) for call in calls)))
        assert len(x) == (2 if scale == 1 else 4) and all(torch.equal(a, b) for a, b in zip(x, x[2:]))
        assert txt.tolist() == ([1, 2, 1, 2] if guidance == "self" else [1, 2, -1, -1])[: len(x)]
        assert tokens.tolist() == ([5, 5, 5, 5] if guidance == "self" else [5, 5, 1, 1])[: len(x)]


def test_no_guidance_calls_the_model_once_a_step_and_clamps_at_the_end_only():
    weight = torch.ones((), requires_grad=True)
    model = Planted(lambda x, t, txt, ids: 2.5 * weight * torch.ones_like(x))
    out = draw(model, scale=7.0, steps=4, shift=1.0)
    assert (out == 1).all() and not out.requires_grad
    assert len(model.calls) == 4 and all(call.ids_keep is None for call in model.calls)
    expected = 0.75 * 2.5 + 0.25 * noise_of([10, 11])
    assert (model.calls[-1].x - expected).abs().max() < 1e-5  # measured 2e-7


@pytest.mark.parametrize("guidance", ["self", "cfg"])
def test_guidance_acts_within_its_interval_only(guidance):
    model = Planted(lambda x, t, txt, ids: 0 * x + 0.2 - 0.1 * ((txt[:, :1, :1, None] < 0) | (ids is not None)))
    out = draw(model, guidance=guidance, scale=3.0, steps=4, shift=1.0, interval=(0.4, 0.8))
    passes = Counter(t for call in model.calls for t in call.t.tolist())  # of two images
    assert passes == {1: 2, 0.75: 4, 0.5: 4, 0.25: 2}
    x = noise_of([10, 11]).double()
    for t, x0_hat in ((1, 0.2), (0.75, 0.4), (0.5, 0.4), (0.25, 0.2)):
        x = x - 0.25 * (x - x0_hat) / t
    assert (out - x.clamp(-1, 1)).abs().max() < 1e-5  # measured 1e-8


@pytest.mark.machinery
@pytest.mark.parametrize("size, drop, kept", [((8, 12), 0.5, 3), ((16, 16), 0.75, 4), ((16, 16), 0.0, 16)])
def test_self_guidance_keeps_the_right_number_of_tokens_drawn_for_each_image_and_step(size, drop, kept):
    model = Planted(lambda x, t, txt, ids: 0 * x)
    draw(model, B=4, guidance="self", scale=2.0, size=size, drop=drop)
    ids = torch.stack([call.ids_keep for call in model.calls[1::2]])  # [steps, B, K]
    assert ids.shape == (6, 4, kept) and (ids.diff(dim=-1) > 0).all() and ids.max() < size[0] * size[1] // 16
    if drop == 0.75:
        assert len({tuple(row) for row in ids.flatten(0, 1).tolist()}) > 20  # of 24


def tiny_model() -> PRX:
    model = PRX(Config(patch=4, bottleneck=12, width=48, depth=4, heads=3, text_dim=3, text_tokens=5, route_start=1,
                       route_end=-1, repa_depth=2, repa_weight=0.0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator(p.numel())))
    return model


@pytest.mark.machinery
@pytest.mark.parametrize("guidance", ["none", "cfg", "self"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(guidance):
    model = tiny_model()
    txt = torch.randn(4, 5, 3, generator=generator(1))
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 3])[:, None]
    settings = dict(null_txt=torch.randn(1, 5, 3, generator=generator(2)), null_mask=torch.ones(1, 5) == 1,
                    size=(16, 8), steps=6, guidance=guidance, scale=2.0, drop=0.5, shift=3.0)
    together = generate(model, txt, mask, seeds=[5, 6, 7, 8], **settings)
    for i in range(4):
        alone = generate(model, txt[i : i + 1], mask[i : i + 1], seeds=[5 + i], **settings)
        assert (alone - together[i : i + 1]).abs().max() < 1e-4  # measured 7e-7
    assert torch.equal(generate(model, txt, mask, seeds=[5, 6, 7, 8], **settings), together)
    other = generate(model, txt, mask, seeds=[5, 6, 9, 8], **settings)
    assert ((other - together).abs().amax((1, 2, 3)) > 1e-2).tolist() == [False, False, True, False]


@pytest.mark.machinery
def test_sizes_are_height_by_width_and_what_does_not_fit_raises_before_any_work():
    for size in ((8, 24), (24, 8), (4, 4)):
        assert draw(tiny_model(), size=size).shape == (2, 3, *size)
    model = Planted(lambda x, t, txt, ids: 0 * x)
    for changes in (dict(size=(8, 10)), dict(size=(6, 8)), dict(seeds=[1])):
        with pytest.raises(ValueError, match="patch 4"):
            draw(model, **changes)
    assert not model.calls
