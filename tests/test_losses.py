"""The loss of a chunk: each term against float64 or planted networks, REPA's positions, what is off
costs nothing; the frozen networks and text encoders against their libraries' own classes.

    OMP_NUM_THREADS=1 pytest tests/test_losses.py

Measured errors, on a CPU, stand beside each tolerance.
"""
import re
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, loss_weights, metrics, run
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Dinov2WithRegistersConfig, T5GemmaEncoderModel

from tools.curves import figure_of
from train_prx import (
    BuiltinText, Config, Dino, Frozen, Stage, T5GemmaText, UserError, gather_tokens, load_frozen, load_lpips,
    load_text_encoder, training_loss, velocity)

KIND = "parity"  # of the tests without a mark of their own

CPU = torch.device("cpu")
TINY = Config(patch=4, bottleneck=16, width=48, depth=4, heads=3, text_dim=20, text_tokens=7, route_start=1,
              route_end=-1, repa_depth=2, repa_dim=48, precision="fp32", compile=False, text_encoder="builtin",
              drop=0.5, t_power=2.0, repa_weight=0.5, lpips_weight=0.1, pdino_weight=0.01)
STAGE, NO_REPA = Stage(16, 10, 16, True), Stage(16, 10, 16, False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_chunk(B: int = 4, size: tuple[int, int] = (16, 16), seed: int = 1) -> dict[str, Tensor]:
    g = generator(seed)
    return {"x0": 2 * torch.rand(B, 3, *size, generator=g) - 1, "txt": torch.randn(B, 7, 20, generator=g),
            "txt_mask": torch.arange(7) < torch.randint(1, 8, (B, 1), generator=g)}


class Planted:
    """A model whose image and features are given; `features(ids_keep)` -> feat."""

    def __init__(self, x0_hat: Tensor, features=lambda ids_keep: None):
        self.x0_hat, self.features, self.repa_projector = x0_hat, features, nn.Identity()

    def __call__(self, x_t, t, txt, txt_mask=None, ids_keep=None):
        self.x_t, self.t, self.txt, self.txt_mask, self.ids_keep = x_t, t, txt, txt_mask, ids_keep
        return self.x0_hat, self.features(ids_keep)


NAMES = torch.randn(4, 16, 48, generator=generator(3))  # of each token of each image a vector of its own


def planted_features(ids_keep: Tensor | None) -> Tensor:
    """Features inside the route, [4, N_keep, 48]."""
    return NAMES if ids_keep is None else gather_tokens(NAMES, ids_keep)


def planted_image(B: int = 4, size: tuple[int, int] = (16, 16)) -> Tensor:
    return 0.8 * torch.randn(B, 3, *size, generator=generator(2))


def patches(x0: Tensor) -> Tensor:
    """A teacher: the pixels of each image token, [B, N, 48]."""
    return F.unfold(x0, 4, stride=4).mT


def never(*args, **kwargs):
    raise AssertionError("a term that is off was computed")


# ---------------------------------------------------------------------------------------------------------------------
# The terms, what is drawn for them, and how they add up


@pytest.mark.parametrize("t_power", [0.0, 1.0, 2.0, 2.5])
def test_the_flow_term_equals_float64_and_at_power_2_the_squared_error_of_velocity(t_power):
    cfg = replace(TINY, t_power=t_power, uniform_t=1.0)
    chunk, model = make_chunk(64, (8, 12)), Planted(planted_image(64, (8, 12)))
    flow = training_loss(model, Frozen(), chunk, cfg, STAGE, generator())[1]["flow"].item()
    t = model.t.double()
    assert (t < 0.05).sum() >= 2  # the clamp is met
    error = (model.x0_hat.double() - chunk["x0"].double()).square().mean((1, 2, 3))
    expected = (error / t.clamp(min=0.05) ** t_power).mean().item()
    assert flow == pytest.approx(expected, rel=1e-5)  # measured 9e-8
    if t_power == 2:
        v_hat, v = (velocity(model.x_t, x, model.t) for x in (model.x0_hat, chunk["x0"]))
        assert flow == pytest.approx((v_hat - v).square().mean().item(), rel=1e-4)  # measured 0


@pytest.mark.machinery
def test_a_chunk_is_a_function_of_its_generator_and_chunks_may_pass_together():
    def draws(chunk: dict, *seeds: int, frozen: Frozen = Frozen()) -> Planted:
        model = Planted(planted_image(len(chunk["x0"])))
        training_loss(model, frozen, chunk, replace(TINY, noise_scale=2.0), STAGE, [generator(s) for s in seeds])
        return model

    before, chunk = torch.get_rng_state(), make_chunk(128)
    first, again, second = (draws(chunk, seed) for seed in (0, 0, 1))
    both = draws({name: torch.cat([x, x]) for name, x in chunk.items()}, 0, 1)
    with_terms = draws(chunk, 0, frozen=replace(planted_networks(), teacher=None))
    assert torch.equal(torch.get_rng_state(), before)  # nothing comes from the global generator
    for name in ("t", "x_t", "ids_keep"):
        one, same, two, pair, judged = (getattr(m, name) for m in (first, again, second, both, with_terms))
        assert torch.equal(one, same) and torch.equal(pair, torch.cat([one, two])) and not torch.equal(one, two)
        assert torch.equal(one, judged)  # so that runs with and without a term compare
    assert first.ids_keep.shape == (128, 8) and first.txt is chunk["txt"] and first.txt_mask is chunk["txt_mask"]
    t = first.t[:, None, None, None]
    eps = ((first.x_t - (1 - t) * chunk["x0"]) / t / 2)[first.t > 0.1].flatten(1)  # 768 values an image
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02  # of 90,000
    assert (torch.corrcoef(eps[:50]) - torch.eye(50)).abs().max() < 0.2  # each image its own


def planted_networks() -> Frozen:
    return Frozen(teacher=patches, pdino=lambda image: F.unfold(image, 8, stride=8).mT,  # [B, P, 192]
                  lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    cfg = replace(TINY, lpips_weight=0.3, pdino_weight=0.7, repa_weight=0.9)
    model, chunk = Planted(planted_image().requires_grad_(), planted_features), make_chunk()
    loss, terms = training_loss(model, planted_networks(), chunk, cfg, STAGE, generator())
    expected = terms["flow"] + 0.3 * terms["lpips"] + 0.7 * terms["pdino"] + 0.9 * terms["repa"]
    others = terms.keys() - {"flow", "lpips", "pdino", "repa"}  # of a fork
    expected += sum(getattr(cfg, f"{name}_weight") * terms[name] for name in others)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.requires_grad and all(term.ndim == 0 and not term.requires_grad for term in terms.values())

    x0, x0_hat = chunk["x0"].double(), model.x0_hat.detach().double()
    half = F.avg_pool2d(x0_hat - x0, 2)  # halving is the mean of 2 x 2 pixels
    assert terms["lpips"].item() == pytest.approx(half.abs().mean().item(), rel=1e-5)  # measured 1e-7
    cosine = F.cosine_similarity(*(F.unfold(x, 8, stride=8).mT for x in (x0_hat, x0)), dim=-1)
    assert terms["pdino"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-5)  # measured 1e-7


@pytest.mark.machinery
@pytest.mark.parametrize("off, by", [("lpips", "weight"), ("lpips", "network"), ("pdino", "weight"),
                                     ("pdino", "network"), ("repa", "weight"), ("repa", "network"), ("repa", "stage")])
def test_a_term_without_weight_network_or_stage_is_absent_and_never_computed(off, by):
    frozen, model = planted_networks(), Planted(planted_image(), planted_features)
    setattr(frozen, "teacher" if off == "repa" else off, None if by == "network" else never)
    cfg = replace(TINY, **{f"{off}_weight": 0.0}) if by == "weight" else TINY
    model.repa_projector = never if off == "repa" else nn.Identity()
    _, terms = training_loss(model, frozen, make_chunk(), cfg, NO_REPA if by == "stage" else STAGE, generator())
    assert {"flow", "lpips", "pdino", "repa"} - terms.keys() == {off}


@pytest.mark.machinery
def test_a_new_loss_term_is_three_lines(tmp_path, tiny):
    """A field, the line that computes the term, the line that adds it: log, header, metrics and curves follow."""
    source = (ROOT / "train_prx.py").read_text()
    edits = {  # a line that is there -> what comes behind it
        r"    pdino_weight: float = .+\n": "    mine_weight: float = 0.25  # grey pictures have less of it\n",
        r'    loss = terms\["flow"\]\n': '    terms["mine"] = x0_hat.abs().mean()\n'
                                         '    loss = loss + cfg.mine_weight * terms["mine"]\n'}
    for line, added in edits.items():
        before, found, after = re.split(f"({line})", source)
        source = before + found + added + after
    (tmp_path / "train_prx.py").write_text(source)
    shutil.copy(ROOT / "muon.py", tmp_path)
    result = run(tmp_path, tmp_path / "train_prx.py", *tiny, "--max_steps=3")
    assert result.status == 0, result
    log = (tmp_path / "runs/demo/log.txt").read_text()
    lines = [line for line in metrics(tmp_path / "runs/demo") if "loss" in line]
    weights = loss_weights(log)
    assert weights["flow"] == 1 and weights["mine"] == 0.25
    for step, line in enumerate(lines, 1):
        assert line["loss"] == pytest.approx(sum(w * line[name] for name, w in weights.items()), rel=1e-5)
        assert re.search(rf"^step {step}/3 .+ mine {line['mine']:.4f} ", log, re.MULTILINE)
    panels = [axes.get_title(loc="left") for axes in figure_of([tmp_path / "runs/demo"]).axes]
    assert len(lines) == 3 and panels.count("mine") == 1


@pytest.mark.parametrize("drop", [0.5, 0.25, 0.0])
@pytest.mark.parametrize("inside", [True, False])
def test_repa_compares_the_same_tokens_of_the_same_image(drop, inside):
    """Teacher and model name each token: any other pairing lowers the cosine."""
    def repa(features) -> float:
        model, cfg = Planted(planted_image(), features), replace(TINY, drop=drop)
        _, terms = training_loss(model, Frozen(teacher=lambda x0: NAMES), make_chunk(), cfg, STAGE, generator())
        return terms["repa"].item()

    def feat(ids: Tensor | None) -> Tensor:
        return planted_features(ids if inside else None)

    assert repa(feat) == pytest.approx(-1, abs=1e-6) == repa(lambda ids: 5 * feat(ids))  # length does not count
    assert repa(lambda ids: -feat(ids)) == pytest.approx(1, abs=1e-6)
    assert repa(lambda ids: feat(ids).roll(1, dims=1)) > -0.2 and repa(lambda ids: feat(ids).roll(1, dims=0)) > -0.2


# ---------------------------------------------------------------------------------------------------------------------
# DINO and LPIPS, from their real classes

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]


def pretrained(networks: Path, **changes) -> Config:
    given = dict(frozen="pretrained", repa_teacher=f"{networks}/dinov3", repa_dim=24, pdino_model=f"{networks}/dinov2",
                 lpips_weight=0.0, stages=(STAGE, NO_REPA), text_encoder=f"{networks}/t5gemma", text_dim=24,
                 text_tokens=6)
    return replace(TINY, **{**given, **changes})


@pytest.mark.parametrize("kind, patch", [("dinov2", 14), ("dinov3", 16)])
def test_dino_gives_the_librarys_patch_tokens_without_cls_and_registers(networks, kind, patch):
    reference = AutoModel.from_pretrained(networks / kind).eval()
    dino = Dino(f"{networks}/{kind}", pretrained(networks), CPU)
    size = (2 * patch, 6 * patch)
    images = 2 * torch.rand(2, 3, *size, generator=generator()) - 1
    with torch.no_grad():
        everything = reference(((images + 1) / 2 - IMAGENET[0]) / IMAGENET[1]).last_hidden_state
        assert everything.shape == (2, 5 + 12, 24)  # CLS, four registers, patches
        out = dino(images, size)
        assert out.dtype == torch.float32 and (out - everything[:, 5:]).abs().max() < 1e-5  # order 1; measured 0
        beyond = torch.where(images > 0.5, 3 * images, images)  # predictions leave the range; DINO sees them clipped
        assert torch.equal(dino(beyond, size), dino(beyond.clamp(-1, 1), size))
    assert Dino(f"{networks}/{kind}", pretrained(networks, precision="bf16"), CPU).model.dtype == torch.bfloat16
    assert not dino.model.training and not any(p.requires_grad for p in dino.model.parameters())


@pytest.mark.machinery
def test_the_teacher_gives_one_feature_an_image_token_and_a_small_network_is_asked_at_its_own_size(tmp_path):
    """Patches lie as the tokens do: a change inside one image token changes that token's feature most. P-DINO looks at
    224px, or at a smaller network's own size, such as that of tools/teacher.py, which may be the teacher too."""
    for side, size, N in ((32, (32, 32), 64), (280, (8, 24), 12)):
        folder, x0 = f"{tmp_path}/{side}", make_chunk(1, size)["x0"]
        AutoModel.from_config(Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=side // 8, image_size=side)
        ).save_pretrained(folder)
        frozen = load_frozen(pretrained(tmp_path, repa_teacher=folder, pdino_model=folder), CPU)
        changed = x0.clone()
        changed[:, :, 4:8, 16:20] *= -1  # the token in row 1, column 4
        before, after = frozen.teacher(x0), frozen.teacher(changed)
        assert before.shape == (1, N, 24)
        assert (after - before).square().sum(-1)[0].argmax() == size[1] // 4 + 4
        assert frozen.pdino(x0).shape == (1, (min(side, 224) // (side // 8)) ** 2, 24)


@pytest.mark.machinery
def test_only_what_weights_and_stages_ask_for_is_loaded(networks):
    missing = pretrained(networks, repa_teacher=f"{networks}/none")
    with pytest.raises(UserError, match="there is no such folder"):
        load_frozen(missing, CPU)
    for changes in (dict(repa_weight=0.0), dict(stages=(NO_REPA,))):
        frozen = load_frozen(replace(missing, **changes), CPU)
        assert frozen.teacher is frozen.lpips is None and frozen.pdino is not None
    assert load_frozen(replace(missing, frozen="none"), CPU) == Frozen()
    assert load_frozen(pretrained(networks, pdino_weight=0.0, pdino_model="none"), CPU).pdino is None
    with pytest.raises(UserError, match="--repa_dim=24"):
        load_frozen(pretrained(networks, repa_dim=1024), CPU)


@pytest.mark.recipe
@pytest.mark.slow
def test_lpips_and_pdino_gradients_pass_through_the_predicted_image_only(networks):
    """The gradient at x0_hat is the weighted sum of each term's, computed here from the libraries' own models, and
    nothing else gets one. A grey image, which an untrained model predicts, has one too."""
    cfg = pretrained(networks, lpips_weight=0.6, pdino_weight=0.4, repa_weight=0.0)
    frozen, before = load_frozen(replace(cfg, lpips_weight=0.0), CPU), torch.get_rng_state()
    frozen.lpips = load_lpips(replace(cfg, frozen="random"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    (vgg,) = (cell.cell_contents for cell in frozen.lpips.__closure__ if isinstance(cell.cell_contents, nn.Module))
    assert not any(module.training for module in vgg.modules())  # its heads hold dropout
    chunk, model = make_chunk(2, (32, 32)), Planted(planted_image(2, (32, 32)).requires_grad_())
    loss, terms = training_loss(model, frozen, chunk, cfg, STAGE, generator())
    loss.backward()

    x0, x0_hat, features = chunk["x0"], model.x0_hat.detach().requires_grad_(), []
    for image in (x0_hat, x0):
        image = F.interpolate(image, size=(56, 56), mode="bilinear", align_corners=False)  # this DINO's own size
        image = ((image + 1) / 2).clamp(0, 1).sub(IMAGENET[0]).div(IMAGENET[1])
        features.append(AutoModel.from_pretrained(cfg.pdino_model).eval()(image).last_hidden_state[:, 5:])
    expected = {"flow": ((x0_hat - x0).square().mean((1, 2, 3)) / model.t.clamp(min=0.05) ** 2).mean(),
                "lpips": vgg(F.avg_pool2d(x0_hat, 2), F.avg_pool2d(x0, 2)).mean(),
                "pdino": 1 - F.cosine_similarity(features[0], features[1].detach(), dim=-1).mean()}
    (expected["flow"] + 0.6 * expected["lpips"] + 0.4 * expected["pdino"]).backward()
    assert {name: x.item() for name, x in terms.items()} == pytest.approx(
        {name: x.item() for name, x in expected.items()}, rel=1e-4)  # measured 1e-6
    assert ((model.x0_hat.grad - x0_hat.grad).norm() / x0_hat.grad.norm()).item() < 1e-5  # measured 4e-8
    assert all(p.grad is None for p in vgg.parameters())
    grey = torch.zeros(2, 3, 32, 32, requires_grad=True)
    frozen.lpips(grey, x0).sum().backward()
    assert grey.grad.isfinite().all() and grey.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Text encoders

BUILTIN = replace(TINY, text_dim=64, text_tokens=16)
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


@pytest.mark.recipe
def test_builtin_text_drops_function_words_case_and_punctuation_and_masks_its_padding():
    txt, mask = BuiltinText(BUILTIN, CPU)([
        "A large red circle, in the top left, and a BLUE square on white.",
        "large red circle top left blue square white", "there is a an the of at with on in and", ""])
    assert txt.shape == (4, 16, 64) and mask.dtype == torch.bool and mask.sum(1).tolist() == [8, 8, 0, 0]
    assert torch.equal(txt[0], txt[1]) and mask[0, :8].all()
    assert (txt[~mask] == 0).all() and (txt[mask].abs().amax(-1) > 0.1).all()


@pytest.mark.recipe
def test_a_token_carries_the_words_up_to_four_away_by_signed_offset_whatever_the_batch():
    encode, whole = BuiltinText(BUILTIN, CPU), " ".join(WORDS)

    def token(prompt: str, i: int) -> Tensor:
        return encode([prompt])[0][0, i]

    base = encode([whole])[0][0, :12]
    for i in range(12):
        changed = encode([" ".join(WORDS[:i] + ["other"] + WORDS[i + 1 :])])[0][0, :12]
        assert ((changed - base).abs().amax(-1) > 1e-3).tolist() == [abs(i - j) <= 4 for j in range(12)]
    added = token("red circle", 1) - token("blue circle", 1)  # red instead of blue, one before
    assert torch.allclose(added, token("x y red z", 3) - token("x y blue z", 3), atol=1e-6)
    for other in (token("circle red", 0) - token("circle blue", 0),  # one after
                  token("red x circle", 2) - token("blue x circle", 2)):  # two before
        assert (added - other).norm() > 0.5 * added.norm()
    again, _ = BuiltinText(BUILTIN, CPU)(["new words", whole])  # of another instance, met in another order
    assert torch.equal(again[1, :12], base)


def test_latents_are_the_encoders_last_hidden_state_of_each_prompt_alone(networks):
    """With attention scores so large that the soft cap on them counts (by 1e-2): SDPA would leave it out."""
    prompts = ["red circle", "", "a large blue circle in the top left", "  Large &amp;amp; red\n"]
    cleaned = [*prompts[:3], "Large & red"]  # unescaped twice, stripped, not lower-cased
    folder, encode = networks / "t5gemma", load_text_encoder(pretrained(networks), CPU)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5GemmaEncoderModel.from_pretrained(folder, is_encoder_decoder=False, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *encode.model.named_parameters()):
            p.mul_(40 if "q_proj" in name or "k_proj" in name else 1)

    def alone(i: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokenizer(cleaned[i])["input_ids"][:6]])).last_hidden_state[0]

    txt, mask = encode(prompts)
    assert txt.shape == (4, 6, 24) and txt.dtype == torch.float32 and mask.sum(1).tolist() == [2, 0, 6, 3]
    assert (txt[~mask] == 0).all() and not txt.requires_grad and not encode.model.training
    for i in (0, 2, 3):
        assert (txt[i][mask[i]] - alone(i)).abs().max() < 1e-4  # order 1; measured 7e-7


@pytest.mark.machinery
def test_the_encoder_alone_gives_the_same_latents_and_missing_weights_are_named(networks, tmp_path):
    """As PRX's checkpoints carry it (Photoroom/prx-1024-t2i-beta, folder `text_encoder`): the open fallback."""
    cfg, whole = pretrained(networks, text_encoder=str(tmp_path)), T5GemmaText(pretrained(networks), CPU)
    AutoTokenizer.from_pretrained(networks / "t5gemma").save_pretrained(tmp_path)
    whole.model.encoder.save_pretrained(tmp_path)
    assert all(map(torch.equal, T5GemmaText(cfg, CPU)(["red circle", ""]), whole(["red circle", ""])))
    state = whole.model.encoder.state_dict()
    del state["layers.1.mlp.up_proj.weight"]
    whole.model.encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight"):  # an error, and never random weights
        T5GemmaText(cfg, CPU)


@pytest.mark.machinery
@pytest.mark.parametrize("load, words", [
    (lambda: T5GemmaText(Config(text_encoder="google/t5gemma-2b-2b-ul2"), CPU), [
        "huggingface.co/google/t5gemma-2b-2b-ul2", "--text_encoder="]),
    (lambda: Dino(Config.repa_teacher, Config(), CPU), [f"huggingface.co/{Config.repa_teacher}", "--repa_teacher="]),
    (lambda: load_lpips(Config(), CPU), ["download.pytorch.org/models/vgg16-397923af.pth", "--lpips_weight=0"])])
def test_a_missing_model_is_one_line_that_says_where_it_is_and_what_else_works(monkeypatch, tmp_path, load, words):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))  # and nothing is in it
    with pytest.raises(UserError, match="^cannot load ") as error:
        load()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
