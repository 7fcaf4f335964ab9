"""`training_loss` and the networks behind it: each term against float64 or planted networks, REPA's positions, what is off
costs nothing, and the text encoders, DINO and LPIPS against their libraries' own classes at tiny sizes.

    OMP_NUM_THREADS=1 pytest tests/test_losses.py

Measured errors, on the CPU of torch 2.15 and transformers 5.23, stand beside each tolerance.
"""
import sys
import urllib.error
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
import torchvision
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (AutoTokenizer, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel,
                          DINOv3ViTConfig, DINOv3ViTModel, PreTrainedTokenizerFast, T5GemmaConfig,
                          T5GemmaForConditionalGeneration, T5GemmaModuleConfig)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_prx import (PRX, BuiltinText, Config, Dino, Frozen, Stage, T5GemmaText, UserError, gather_tokens,  # noqa: E402
                       load_frozen, load_lpips, load_text_encoder, term_names, training_loss, velocity)

pytestmark = pytest.mark.parity

CPU = torch.device("cpu")
TINY = Config(patch=4, bottleneck=16, width=48, depth=4, heads=3, text_dim=20, text_tokens=7, route_start=1, route_end=-1,
              repa_depth=2, repa_dim=48, precision="fp32", compile=False, text_encoder="builtin")
STAGE, NO_REPA = Stage(16, 10, 4, True), Stage(16, 10, 4, False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(B: int = 4, size: tuple[int, int] = (16, 16), seed: int = 1) -> dict[str, Tensor]:
    g = generator(seed)
    return {"x0": 2 * torch.rand(B, 3, *size, generator=g) - 1, "txt": torch.randn(B, 7, 20, generator=g),
            "txt_mask": torch.arange(7) < torch.randint(1, 8, (B, 1), generator=g)}


class Planted:
    """A model whose image and features are given; `features(ids_keep)` -> feat."""

    def __init__(self, x0_hat: Tensor, features=None):
        self.x0_hat, self.features, self.repa_projector = x0_hat, features, nn.Identity()

    def __call__(self, x_t, t, txt, txt_mask=None, ids_keep=None):
        self.x_t, self.t, self.txt, self.txt_mask, self.ids_keep = x_t, t, txt, txt_mask, ids_keep
        return self.x0_hat, None if self.features is None else self.features(ids_keep)


def planted_features(ids_keep: Tensor) -> Tensor:
    """Features inside the route, [4, N_keep, 48]."""
    return gather_tokens(torch.randn(4, 16, 48, generator=generator(3)), ids_keep)


def planted_image(B: int = 4, size: tuple[int, int] = (16, 16)) -> Tensor:
    return 0.8 * torch.randn(B, 3, *size, generator=generator(2))


def tiny_model(**changes) -> PRX:
    model = PRX(replace(TINY, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(p.numel())))
    return model


def never(*args, **kwargs):
    raise AssertionError("a term that is off was computed")


# ---------------------------------------------------------------------------------------------------------------------
# Flow matching


@pytest.mark.parametrize("t_power", [0.0, 1.0, 2.0, 2.5])
def test_the_flow_term_equals_float64(t_power):
    cfg = replace(TINY, t_power=t_power, uniform_t=1.0)
    batch, model = make_batch(64, (8, 12)), Planted(planted_image(64, (8, 12)))
    loss, terms = training_loss(model, Frozen(), batch, cfg, STAGE, generator())
    t = model.t.double()
    assert (t < 0.05).sum() >= 2  # the clamp is met
    error = (model.x0_hat.double() - batch["x0"].double()).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx((error / t.clamp(min=0.05) ** t_power).mean().item(), rel=1e-5)  # measured 3e-7
    assert list(terms) == ["flow"] and terms["flow"] == loss


def test_t_power_2_is_the_mean_squared_error_of_velocity():
    batch, model = make_batch(64), Planted(planted_image(64))
    loss, _ = training_loss(model, Frozen(), batch, replace(TINY, uniform_t=1.0), STAGE, generator())
    v_hat, v = velocity(model.x_t, model.x0_hat, model.t), velocity(model.x_t, batch["x0"], model.t)
    assert loss.item() == pytest.approx((v_hat - v).square().mean().item(), rel=1e-4)  # measured 2e-6


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_the_model_sees_data_mixed_with_standard_noise_and_the_batchs_text(noise_scale):
    batch, model = make_batch(256), Planted(planted_image(256))
    training_loss(model, Frozen(), batch, replace(TINY, noise_scale=noise_scale), STAGE, generator())
    t = model.t[:, None, None, None]
    eps = ((model.x_t - (1 - t) * batch["x0"]) / t)[model.t > 0.1]  # 750 values an image
    assert abs(eps.mean()) < 0.01 * noise_scale and abs(eps.std() / noise_scale - 1) < 0.01  # of 196,000 values
    assert (eps.abs() > 3 * noise_scale).double().mean() == pytest.approx(0.0027, abs=0.0006)  # a Gaussian's tails
    assert abs((eps * batch["x0"][model.t > 0.1]).mean()) < 0.01 * noise_scale  # not made from the data
    correlation = torch.corrcoef(eps.flatten(1)[:50])
    assert (correlation - torch.eye(50)).abs().max() < 0.2  # nor shared between images
    assert model.txt is batch["txt"] and model.txt_mask is batch["txt_mask"]


@pytest.mark.parametrize("drop, kept", [(0.5, 8), (0.75, 4), (0.0, None)])
def test_training_routes_a_share_drop_and_0_turns_routing_off(drop, kept):
    model = Planted(planted_image())
    training_loss(model, Frozen(), make_batch(), replace(TINY, drop=drop), STAGE, generator())
    assert model.ids_keep is None if kept is None else model.ids_keep.shape == (4, kept)
    if kept:
        assert len({tuple(row) for row in model.ids_keep.tolist()}) > 1  # each sample its own


def test_a_chunk_is_a_function_of_its_generator():
    model, batch = tiny_model(), make_batch()
    frozen = Frozen(teacher=lambda x0: F.unfold(x0, 4, stride=4).mT)  # [B, N, 48]
    losses = [training_loss(model, frozen, batch, TINY, STAGE, generator(seed))[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    training_loss(model, frozen, batch, TINY, STAGE, generator())
    assert torch.equal(torch.get_rng_state(), before)  # nothing comes from the global generator
    planted = [Planted(planted_image()) for _ in range(2)]
    for p, seed in zip(planted, (0, 1)):
        training_loss(p, Frozen(), batch, TINY, STAGE, generator(seed))
    for name in ("t", "x_t", "ids_keep"):
        assert not torch.equal(getattr(planted[0], name), getattr(planted[1], name))


# ---------------------------------------------------------------------------------------------------------------------
# What is on, and how it adds up


def planted_networks() -> Frozen:
    return Frozen(teacher=lambda x0: F.unfold(x0, 4, stride=4).mT,  # [B, N, 48]
                  pdino=lambda image: F.unfold(image, 8, stride=8).mT,  # [B, P, 192]
                  lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    cfg = replace(TINY, lpips_weight=0.3, pdino_weight=0.7, repa_weight=0.9)
    model = Planted(planted_image().requires_grad_(), planted_features)
    frozen, batch = planted_networks(), make_batch()
    loss, terms = training_loss(model, frozen, batch, cfg, STAGE, generator())
    assert list(terms) == ["flow", "lpips", "pdino", "repa"] == term_names(cfg, frozen, STAGE)
    expected = terms["flow"] + 0.3 * terms["lpips"] + 0.7 * terms["pdino"] + 0.9 * terms["repa"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.requires_grad and all(term.ndim == 0 and not term.requires_grad for term in terms.values())

    x0, x0_hat = batch["x0"].double(), model.x0_hat.detach().double()
    half = F.avg_pool2d(x0_hat - x0, 2)  # halving is the mean of 2 x 2 pixels
    assert terms["lpips"].item() == pytest.approx(half.abs().mean().item(), rel=1e-5)  # measured 1e-7
    cosine = F.cosine_similarity(*(F.unfold(x, 8, stride=8).mT for x in (x0_hat, x0)), dim=-1)
    assert terms["pdino"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)  # measured 1e-7


@pytest.mark.parametrize("off", ["lpips", "pdino", "repa"])
@pytest.mark.parametrize("by", ["weight", "network"])
def test_a_term_without_weight_or_network_is_absent_and_never_computed(off, by):
    frozen = planted_networks()
    network = "teacher" if off == "repa" else off
    setattr(frozen, network, never if by == "weight" else None)
    cfg = replace(TINY, **{f"{off}_weight": 0.0}) if by == "weight" else TINY
    model = Planted(planted_image(), planted_features)
    if off == "repa":
        model.repa_projector = never
    loss, terms = training_loss(model, frozen, make_batch(), cfg, STAGE, generator())
    assert list(terms) == [name for name in ("flow", "lpips", "pdino", "repa") if name != off] == term_names(cfg, frozen, STAGE)
    weights = {"flow": 1.0, "lpips": cfg.lpips_weight, "pdino": cfg.pdino_weight, "repa": cfg.repa_weight}
    assert loss.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()), rel=1e-6)


def test_a_stage_without_repa_never_asks_the_teacher():
    frozen = replace(planted_networks(), teacher=never)
    model = Planted(planted_image(), lambda ids: None)
    model.repa_projector = never
    _, terms = training_loss(model, frozen, make_batch(), TINY, NO_REPA, generator())
    assert list(terms) == ["flow", "lpips", "pdino"] == term_names(TINY, frozen, NO_REPA)


def test_terms_do_not_change_the_draws_of_each_other():
    """Turning a term off leaves t, noise and kept tokens as they were, so that runs compare."""
    batch, runs = make_batch(), []
    for frozen in (planted_networks(), Frozen()):
        model = Planted(planted_image(), planted_features)
        training_loss(model, frozen, batch, TINY, STAGE, generator())
        runs.append(model)
    assert all(torch.equal(getattr(runs[0], name), getattr(runs[1], name)) for name in ("t", "x_t", "ids_keep"))


# ---------------------------------------------------------------------------------------------------------------------
# REPA


@pytest.mark.parametrize("drop", [0.5, 0.25, 0.0])
@pytest.mark.parametrize("inside", [True, False])
def test_repa_compares_the_same_tokens_of_the_same_image(drop, inside):
    """Teacher and model name each token by a vector of its own: any other pairing lowers the cosine."""
    names = torch.randn(4, 16, 48, generator=generator(3))

    def repa(features) -> float:
        model = Planted(planted_image(), features)
        return training_loss(model, Frozen(teacher=lambda x0: names), make_batch(), replace(TINY, drop=drop), STAGE,
                             generator())[1]["repa"].item()

    def feat(ids: Tensor | None) -> Tensor:
        return gather_tokens(names, ids) if inside and ids is not None else names

    assert repa(feat) == pytest.approx(-1, abs=1e-6)
    assert repa(lambda ids: 5 * feat(ids)) == pytest.approx(-1, abs=1e-6)  # length does not count
    assert repa(lambda ids: -feat(ids)) == pytest.approx(1, abs=1e-6)
    for wrong in (lambda ids: feat(ids).roll(1, dims=1), lambda ids: feat(ids).roll(1, dims=0), lambda ids: feat(ids).flip(1)):
        assert repa(wrong) > -0.2


@pytest.mark.parametrize("repa_depth, inside", [(1, False), (2, True), (3, True), (4, False)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_the_real_models_features_meet_the_teachers_of_the_same_patches(repa_depth, inside, size):
    """At its start PRX's blocks are identities, so its features are img_in of its patches. Without noise and bias those
    point where the same layers point on the clean patches, which the teacher takes from the image by `unfold`."""
    cfg = replace(TINY, noise_scale=0.0, repa_depth=repa_depth)
    model = PRX(cfg)
    with torch.no_grad():
        model.img_in[0].bias.zero_()
        model.img_in[1].bias.zero_()
    model.repa_projector = nn.Identity()
    shapes = []
    model.repa_projector.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1]))
    frozen = Frozen(teacher=lambda x0: model.img_in(F.unfold(x0, 4, stride=4).mT))  # [B, 48, N] -> [B, N, 48]
    batch = make_batch(size=size)
    N = size[0] * size[1] // 16
    assert training_loss(model, frozen, batch, cfg, STAGE, generator())[1]["repa"].item() == pytest.approx(-1, abs=1e-5)
    assert shapes == [N // 2 if inside else N]
    rolled = Frozen(teacher=lambda x0: frozen.teacher(x0).roll(1, dims=1))
    assert training_loss(model, rolled, batch, cfg, STAGE, generator())[1]["repa"].item() > -0.5


def test_repa_trains_projector_and_early_blocks_and_no_later_one():
    model, batch = tiny_model(), make_batch()
    frozen = Frozen(teacher=lambda x0: F.unfold(x0, 4, stride=4).mT)
    loss, terms = training_loss(model, frozen, batch, TINY, STAGE, generator())
    without, _ = training_loss(model, frozen, batch, replace(TINY, repa_weight=0.0), STAGE, generator())
    grads = torch.autograd.grad(loss - without, list(model.parameters()), allow_unused=True, materialize_grads=True)
    reached = {name for (name, _), g in zip(model.named_parameters(), grads) if g.abs().max() > 1e-6}
    assert {name.split(".")[0] for name in reached} == {"img_in", "time_in", "txt_in", "blocks", "repa_projector"}
    assert {name.split(".")[1] for name in reached if name.startswith("blocks")} == {"0", "1"}
    assert {name for name in dict(model.named_parameters()) if name.startswith("repa_projector")} <= reached


# ---------------------------------------------------------------------------------------------------------------------
# DINO and LPIPS, from their real classes

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def save_dino(kind: str, folder: Path) -> nn.Module:
    """A tiny random DINO saved as people download it, and the model itself."""
    torch.manual_seed(0)
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**SMALL, image_size=56, patch_size=14))
    elif kind == "dinov2 with registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=56, patch_size=14))
    else:
        registers = int(kind.split()[1])
        model = DINOv3ViTModel(DINOv3ViTConfig(**SMALL, intermediate_size=64, patch_size=16, num_register_tokens=registers))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind, patch, prefix", [("dinov2", 14, 1), ("dinov2 with registers", 14, 5), ("dinov3 4", 16, 5),
                                                 ("dinov3 0", 16, 1)])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)], ids=str)
def test_dino_gives_the_librarys_patch_tokens_without_cls_and_registers(tmp_path, kind, patch, prefix, grid):
    reference = save_dino(kind, tmp_path)
    dino = Dino(str(tmp_path), "pretrained", torch.float32, CPU)
    size = (grid[0] * patch, grid[1] * patch)
    images = 2 * torch.rand(2, 3, *size, generator=generator()) - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        everything = reference(((images + 1) / 2 - mean) / std).last_hidden_state
        assert everything.shape == (2, prefix + grid[0] * grid[1], 32)
        out = dino(images, size)
        assert out.dtype == torch.float32 and (out - everything[:, prefix:]).abs().max() < 1e-5  # order 1; measured 0
        larger = F.interpolate(images, scale_factor=2, mode="nearest")  # halving undoes this exactly
        assert (dino(larger, size) - everything[:, prefix:]).abs().max() < 1e-5
        beyond = torch.where(images > 0.5, 3 * images, images)  # predictions leave the range; DINO sees them clipped
        assert torch.equal(dino(beyond, size), dino(beyond.clamp(-1, 1), size))
    assert not dino.model.training and not any(p.requires_grad for p in dino.model.parameters())


def test_random_dinos_are_the_same_on_every_rank_and_leave_the_global_state_alone(tmp_path):
    save_dino("dinov3 4", tmp_path)
    images = torch.rand(1, 3, 32, 32, generator=generator())
    torch.manual_seed(1)
    expected = torch.rand(2)
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outs.append(Dino(str(tmp_path), "random", torch.float32, CPU)(images, (32, 32)))
        if seed == 1:
            assert torch.equal(torch.rand(2), expected)
    assert torch.equal(outs[0], outs[1])
    pretrained = Dino(str(tmp_path), "pretrained", torch.float32, CPU)(images, (32, 32))
    assert (outs[0] - pretrained).abs().max() > 0.1


def test_random_true_shapes_are_those_of_the_hubs_models():
    """Against the published sizes: ViT-L of 303 M and ViT-B of 86 M parameters, patch 16 and 14, four registers."""
    for model_id, dim, layers, patch in (("facebook/dinov3-vitl16-pretrain-lvd1689m", 1024, 24, 16),
                                         ("facebook/dinov2-with-registers-base", 768, 12, 14),
                                         ("facebook/dinov2-with-registers-large", 1024, 24, 14)):
        kind, shape = Dino.SHAPES[model_id]
        config = {"dinov3_vit": DINOv3ViTConfig, "dinov2_with_registers": Dinov2WithRegistersConfig}[kind](**shape)
        with torch.device("meta"):
            model = {"dinov3_vit": DINOv3ViTModel, "dinov2_with_registers": Dinov2WithRegistersModel}[kind](config)
        assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (dim, layers, patch)
        assert config.num_register_tokens == 4
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert 12 * layers * dim**2 / 1e6 < millions < 12 * layers * dim**2 / 1e6 + 3


def frozen_config(tmp_path: Path, **changes) -> Config:
    save_dino("dinov3 4", tmp_path / "teacher")
    save_dino("dinov2 with registers", tmp_path / "pdino")
    return replace(TINY, frozen="pretrained", repa_teacher=str(tmp_path / "teacher"), pdino_model=str(tmp_path / "pdino"),
                   repa_dim=32, lpips_weight=0.0, stages=(STAGE, NO_REPA), **changes)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_the_teacher_gives_one_feature_an_image_token_and_pdino_looks_at_224px(tmp_path, size):
    """The patches lie as the tokens do: a change inside one image token changes that token's feature most."""
    frozen = load_frozen(frozen_config(tmp_path), CPU)
    x0 = make_batch(1, size)["x0"]
    rows, cols = size[0] // 4, size[1] // 4
    features = frozen.teacher(x0)
    assert features.shape == (1, rows * cols, 32) and frozen.pdino(x0).shape == (1, 16 * 16, 32)
    changed = x0.clone()
    changed[:, :, 4:8, -8:-4] *= -1  # the token in row 1, in the last column but one
    difference = (frozen.teacher(changed) - features).square().sum(-1)[0]
    assert difference.argmax() == 2 * cols - 2
    assert frozen.lpips is None


def test_only_what_weights_and_stages_ask_for_is_loaded(tmp_path):
    cfg = frozen_config(tmp_path)
    missing = replace(cfg, repa_teacher=str(tmp_path / "none"))
    with pytest.raises(UserError):
        load_frozen(missing, CPU)
    for off in (replace(missing, repa_weight=0.0), replace(missing, stages=(NO_REPA,))):
        frozen = load_frozen(off, CPU)
        assert frozen.teacher is None and frozen.pdino is not None
    assert load_frozen(replace(cfg, frozen="none"), CPU) == Frozen()
    assert load_frozen(replace(cfg, pdino_weight=0.0, pdino_model="none"), CPU).pdino is None


def test_a_teacher_of_another_width_is_an_error_that_names_the_flag(tmp_path):
    with pytest.raises(UserError, match="--repa_dim=32"):
        load_frozen(replace(frozen_config(tmp_path), repa_dim=1024), CPU)


@pytest.fixture(scope="module")
def lpips():
    """The real LPIPS with a random VGG16, and the network inside."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    distance = load_lpips(replace(TINY, frozen="random"), CPU, torch.float32)
    assert torch.equal(torch.rand(2), expected)  # loading leaves the global state alone
    network = next(cell.cell_contents for cell in distance.__closure__ if isinstance(cell.cell_contents, nn.Module))
    return distance, network


def test_lpips_is_frozen_deterministic_and_zero_on_equal_images(lpips):
    distance, network = lpips
    a, b = make_batch(2)["x0"], make_batch(2, seed=5)["x0"]
    assert not any(module.training for module in network.modules())  # its heads hold dropout
    assert not any(p.requires_grad for p in network.parameters())
    assert distance(a, b).numel() == 2 and torch.equal(distance(a, b), distance(a, b))
    assert distance(a, a).abs().max() == 0 and (distance(a, b) > 1e-3).all()
    assert distance(a, b)[0].item() == pytest.approx(distance(a[:1], b[:1]).item(), rel=1e-4)


def test_lpips_gradient_is_finite_on_the_untrained_models_grey_image(lpips):
    x0_hat = torch.zeros(2, 3, 32, 32, requires_grad=True)
    lpips[0](x0_hat, make_batch(2, (32, 32))["x0"]).sum().backward()
    assert x0_hat.grad.isfinite().all() and x0_hat.grad.abs().max() > 0


def test_lpips_and_pdino_gradients_pass_through_the_predicted_image_only(tmp_path, lpips):
    """With the real networks: the gradient at x0_hat is the weighted sum of each term's, computed here from the libraries'
    own models, and nothing else gets one."""
    cfg = replace(frozen_config(tmp_path), lpips_weight=0.6, pdino_weight=0.4, repa_weight=0.0)
    frozen = load_frozen(replace(cfg, lpips_weight=0.0), CPU)
    frozen.lpips = lpips[0]
    dino = Dinov2WithRegistersModel.from_pretrained(tmp_path / "pdino").eval()
    batch, model = make_batch(2, (32, 32)), Planted(planted_image(2, (32, 32)).requires_grad_())
    loss, terms = training_loss(model, frozen, batch, cfg, STAGE, generator())
    loss.backward()
    assert list(terms) == ["flow", "lpips", "pdino"]

    x0, x0_hat = batch["x0"], model.x0_hat.detach().requires_grad_()
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    features = []
    for image in (x0_hat, x0):
        image = F.interpolate(image, size=(224, 224), mode="bilinear", align_corners=False)
        features.append(dino(((image + 1) / 2).clamp(0, 1).sub(mean).div(std)).last_hidden_state[:, 5:])
    pdino = 1 - F.cosine_similarity(features[0], features[1].detach(), dim=-1).mean()
    distance = lpips[1](F.avg_pool2d(x0_hat, 2), F.avg_pool2d(x0, 2)).mean()
    flow = ((x0_hat - x0).square().mean((1, 2, 3)) / model.t.clamp(min=0.05) ** 2).mean()
    (flow + 0.6 * distance + 0.4 * pdino).backward()
    assert terms["pdino"].item() == pytest.approx(pdino.item(), rel=1e-4)  # measured 1e-6
    assert terms["lpips"].item() == pytest.approx(distance.item(), rel=1e-4)  # measured 1e-6
    got, expected = model.x0_hat.grad, x0_hat.grad
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5  # measured 4e-8
    flow_grad = 2 * (x0_hat - x0) / x0.numel() / model.t.clamp(min=0.05)[:, None, None, None] ** 2
    assert ((expected - flow_grad).norm() / expected.norm()).item() > 1e-3  # the two terms are a visible part of it
    assert all(p.grad is None for p in lpips[1].parameters())
    pdino_model = next(c.cell_contents for c in frozen.pdino.__closure__ if isinstance(c.cell_contents, Dino)).model
    assert all(p.grad is None for p in pdino_model.parameters())


def test_the_targets_of_pdino_and_repa_are_computed_without_a_graph():
    seen = []

    def network(image: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), image.requires_grad))
        return F.unfold(image, 4, stride=4).mT

    x0_hat = planted_image().requires_grad_()
    model = Planted(x0_hat, planted_features)
    training_loss(model, Frozen(teacher=network, pdino=network), make_batch(), TINY, STAGE, generator())
    assert sorted(seen) == [(False, False), (False, False), (True, True)]  # P-DINO's target, REPA's, and x0_hat


# ---------------------------------------------------------------------------------------------------------------------
# The built-in text encoder

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
TEXT = replace(TINY, text_dim=64, text_tokens=16)


def builtin(**changes) -> BuiltinText:
    return BuiltinText(replace(TEXT, **changes), CPU)


def test_padding_is_masked_and_zero_and_the_empty_prompt_has_no_token():
    txt, mask = builtin()(["red circle", "", "one two three"])
    assert txt.shape == (3, 16, 64) and mask.shape == (3, 16) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [2, 0, 3] and mask[2, :3].all()
    assert (txt[~mask] == 0).all() and (txt[mask].abs().amax(-1) > 0.1).all()


def test_function_words_case_and_punctuation_are_dropped():
    txt, mask = builtin()(["A large red circle, in the top left, and a BLUE square on white.",
                           "large red circle top left blue square white"])
    assert torch.equal(txt[0], txt[1]) and mask.sum(1).tolist() == [8, 8]
    assert builtin()(["there is a an the of at with on in and"])[1].sum() == 0


def test_a_token_carries_the_words_up_to_four_away_and_no_further():
    encode = builtin()
    base = encode([" ".join(WORDS)])[0][0, :12]
    for i in range(12):
        changed = encode([" ".join(WORDS[:i] + ["other"] + WORDS[i + 1 :])])[0][0, :12]
        differs = (changed - base).abs().amax(-1) > 1e-3
        assert differs.tolist() == [abs(i - j) <= 4 for j in range(12)]


def test_a_neighbour_adds_a_vector_of_its_signed_offset_and_word_alone():
    encode = builtin()

    def token(prompt: str, i: int) -> Tensor:
        return encode([prompt])[0][0, i]

    added = token("red circle", 1) - token("blue circle", 1)  # red instead of blue, one before
    assert torch.allclose(added, token("red square big", 1) - token("blue square big", 1), atol=1e-6)
    assert torch.allclose(added, token("x y red z", 3) - token("x y blue z", 3), atol=1e-6)
    for other in (token("circle red", 0) - token("circle blue", 0),  # one after
                  token("red x circle", 2) - token("blue x circle", 2),  # two before
                  token("green circle", 1) - token("blue circle", 1),
                  token("red", 0) - token("blue", 0)):  # the word itself
        assert (added - other).norm() > 0.5 * added.norm()
    assert not torch.equal(encode(["large red small blue"])[0], encode(["small red large blue"])[0])


def test_vectors_are_fixed_whatever_the_instance_the_order_and_the_batch():
    torch.manual_seed(1)
    first = builtin()
    prompts = ["red circle big", "blue square", " ".join(WORDS)]
    a = first(prompts)[0]
    torch.manual_seed(2)
    second = builtin()
    assert torch.equal(torch.cat([second([prompt])[0] for prompt in reversed(prompts)]).flip(0), a)
    assert torch.equal(first(prompts)[0], a)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    builtin()(["words never met before"])
    assert torch.equal(torch.rand(2), expected)


def test_a_token_with_all_its_neighbours_has_unit_variance():
    txt, mask = builtin(text_dim=4096)([" ".join(WORDS)])
    assert txt[0, 4:8].var(dim=-1).sub(1).abs().max() < 0.12  # 4096 values: 5 standard errors


def test_long_prompts_are_cut_at_text_tokens():
    txt, mask = builtin(text_tokens=6)([" ".join(WORDS)])
    assert txt.shape == (1, 6, 64) and mask.all()
    assert torch.equal(txt, builtin(text_tokens=6)([" ".join(WORDS[:6])])[0])


# ---------------------------------------------------------------------------------------------------------------------
# T5Gemma, from its real class

VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "red", "circle", "blue", "square", "big", "&"]


@pytest.fixture(scope="module", params=["right", "left"])
def t5gemma(request, tmp_path_factory) -> tuple[Path, T5GemmaForConditionalGeneration]:
    """A tiny T5Gemma with large attention scores, so that its soft cap counts, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("t5gemma")
    size = dict(vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    torch.manual_seed(0)
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**size), decoder=T5GemmaModuleConfig(**size), vocab_size=len(VOCABULARY)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(100)  # scores of about 60: the cap at 50 bends them
    model.eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                            unk_token="<unk>", padding_side=request.param).save_pretrained(folder)
    return folder, model


def t5gemma_config(folder: Path, **changes) -> Config:
    return replace(TINY, **{"text_encoder": str(folder), "text_dim": 32, "text_tokens": 6, **changes})


def test_latents_are_the_encoders_last_hidden_state_and_padding_is_masked(t5gemma):
    folder, model = t5gemma
    prompts = ["red circle", "", "big blue square circle red red red"]
    txt, mask = T5GemmaText(t5gemma_config(folder), CPU)(prompts)
    assert txt.shape == (3, 6, 32) and txt.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [3, 1, 6]  # <bos> and the words, cut at text_tokens
    assert (txt[~mask] == 0).all() and not txt.requires_grad
    encoder = T5GemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval().get_encoder()
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([[2] + [VOCABULARY.index(word) for word in prompt.split()]])[:, :6]
        with torch.no_grad():
            alone = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]  # no padding at all
        assert (txt[i][mask[i]] - alone).abs().max() < 1e-4  # order 1; measured 7e-6, since scores are large


def test_the_encoder_alone_gives_the_same_latents(t5gemma, tmp_path):
    """As PRX's checkpoints carry it (Photoroom/prx-1024-t2i-beta, folder `text_encoder`): the open fallback."""
    folder, model = t5gemma
    model.get_encoder().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (alone, mask), (whole, _) = (T5GemmaText(t5gemma_config(path), CPU)(["red circle", ""]) for path in (tmp_path, folder))
    assert torch.equal(alone, whole) and mask.sum(1).tolist() == [3, 1]
    with pytest.raises(UserError, match="--text_dim=32"):
        load_text_encoder(t5gemma_config(tmp_path, text_dim=2304), CPU)


def test_weights_that_are_not_in_the_folder_are_an_error_and_never_random(t5gemma, tmp_path):
    folder, model = t5gemma
    state = model.state_dict()
    state.pop("model.encoder.layers.1.mlp.up_proj.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder.layers.1.mlp.up_proj.weight"):
        T5GemmaText(t5gemma_config(tmp_path), CPU)


def test_the_soft_cap_on_scores_is_kept(t5gemma):
    """With SDPA, which leaves it out, the latents would be others."""
    folder, _ = t5gemma
    encode = T5GemmaText(t5gemma_config(folder), CPU)
    assert encode.model.config._attn_implementation == "eager"
    capped, mask = encode(["big blue square circle red"])
    for module in encode.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert (encode(["big blue square circle red"])[0] - capped).abs().max() > 1e-2


def test_prompts_are_unescaped_and_stripped_and_not_lower_cased(t5gemma):
    encode = T5GemmaText(t5gemma_config(t5gemma[0]), CPU)
    a, b, c = (encode([prompt])[0] for prompt in ("  red &amp;amp; blue\n", "red & blue", "Red & blue"))
    assert torch.equal(a, b) and not torch.equal(b, c)


def test_bf16_runs_encode_in_bf16_near_fp32(t5gemma):
    half, mask = T5GemmaText(t5gemma_config(t5gemma[0], precision="bf16"), CPU)(["red circle"])
    full, _ = T5GemmaText(t5gemma_config(t5gemma[0]), CPU)(["red circle"])
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.15  # scores of 60 in bf16; measured 5e-2


def test_the_encoder_is_frozen_and_has_no_decoder(t5gemma):
    encode = T5GemmaText(t5gemma_config(t5gemma[0]), CPU)
    assert not encode.model.training and not any(p.requires_grad for p in encode.model.parameters())
    assert not any("decoder" in name for name, _ in encode.model.named_parameters())
    assert isinstance(load_text_encoder(t5gemma_config(t5gemma[0]), CPU), T5GemmaText)
    assert isinstance(load_text_encoder(TINY, CPU), BuiltinText)


def test_a_wrong_text_dim_is_an_error_that_names_the_flag(t5gemma):
    with pytest.raises(UserError, match="--text_dim=32"):
        load_text_encoder(t5gemma_config(t5gemma[0], text_dim=2304), CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Missing models


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and nothing in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("load, model_id, flag", [
    (lambda: T5GemmaText(Config(), CPU), "google/t5gemma-2b-2b-ul2", "--text_encoder="),
    (lambda: Dino(Config().repa_teacher, "pretrained", torch.float32, CPU), "facebook/dinov3-vitl16-pretrain-lvd1689m",
     "--repa_teacher=facebook/dinov2-with-registers-large"),
    (lambda: Dino(Config().pdino_model, "pretrained", torch.float32, CPU), "facebook/dinov2-with-registers-base", None),
], ids=["T5Gemma", "DINOv3", "DINOv2"])
def test_a_missing_model_is_one_line_with_its_id_where_to_ask_and_the_open_fallback(offline, load, model_id, flag):
    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message and f"cannot load {model_id}:" in message and f"https://huggingface.co/{model_id}" in message
    assert flag is None or flag in message


def test_missing_vgg_weights_are_one_line_with_their_address_and_the_flag(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(UserError, match="--lpips_weight=0") as error:
        load_lpips(replace(TINY, frozen="pretrained"), CPU, torch.float32)
    assert "\n" not in str(error.value) and "https://download.pytorch.org/models/vgg16-397923af.pth" in str(error.value)


def test_random_weights_of_an_unknown_model_are_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="facebook/dinov2-with-registers-base"):
        Dino("someone/else", "random", torch.float32, CPU)
