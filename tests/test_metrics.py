"""metrics.py: distances equal direct float64 computations, scipy, torchmetrics and closed forms; networks see what
transformers' own preprocessing gives them; intervals are those of the binomial; scores are the same on any number of
ranks, and stored features are used where they are right and only there.

    OMP_NUM_THREADS=1 pytest tests/test_metrics.py

Measured errors, on the CPU of torch 2.15, stand beside each tolerance.
"""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import metrics
import scenes
from metrics import METRICS, RESAMPLES, Network, Scorer, frechet, mmd, parse_metrics, resample_weights, to_score
from shards import DamagedImage, RowSet, UserError

pytestmark = pytest.mark.parity

CPU = torch.device("cpu")
BUILTIN = SimpleNamespace(text_encoder="builtin")  # what a RowSet reads of a run's config


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n: int) -> Tensor:
    return torch.full((1, n), 1 / n, dtype=torch.float64)


def noise(seeds: list[int], size: int = 32) -> np.ndarray:
    """Pictures of patches of 4 px in random colours, one for each seed: uint8 [B, size, size, 3]."""
    patches = [np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8) for seed in seeds]
    return np.stack([patch.repeat(4, 0).repeat(4, 1) for patch in patches])


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    """Tiny networks with random weights of size 0.2: clip/, registers/, dinov2/, and other/, another dinov2."""
    from transformers import (
        CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel)

    folder = tmp_path_factory.mktemp("nets")
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    for name, model in (
            ("clip", CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, intermediate_size=48, projection_dim=16,
                                                                    image_size=28, patch_size=7))),
            ("registers", Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, patch_size=4, image_size=48))),
            ("dinov2", Dinov2Model(Dinov2Config(**shape, patch_size=2, image_size=48))),
            ("other", Dinov2Model(Dinov2Config(**shape, patch_size=2, image_size=48)))):
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.2)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """2,000 scenes at 32 px, of which about 20 are held out."""
    folder = tmp_path_factory.mktemp("many")
    assert run(folder, "scenes.py", "make", "--out=scenes", "--rows=2000", "--size=32").status == 0
    return folder / "scenes"


@pytest.fixture
def held_out(many, tmp_path) -> RowSet:
    """A copy of it, without stored features."""
    shutil.copytree(many, tmp_path / "scenes")
    return RowSet(str(tmp_path / "scenes"), BUILTIN, 32)


@pytest.fixture
def features_of(nets) -> str:
    """The metrics that have tiny networks, as a user asks for them."""
    return f"cmmd:{nets / 'clip'},mmd:{nets / 'registers'},fdd:{nets / 'dinov2'}"


def draw_noise(prompts: list[str], seeds: list[int]) -> np.ndarray:
    return noise(seeds)


# ---------------------------------------------------------------------------------------------------------------------
# MMD


def direct_mmd(x: Tensor, y: Tensor) -> float:
    """1000 times the squared MMD by one kernel at a time, in float64."""
    x, y = x.double().numpy(), y.double().numpy()

    def mean_kernel(a, b) -> float:
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@pytest.mark.parametrize("block", [7, 1024])
def test_mmd_is_the_direct_sum_over_all_pairs_also_of_resampled_sets(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, y = 3 * randn(31, 6, seed=0), 3 * randn(23, 6, seed=1) + 1
    weights = resample_weights(31)
    found = mmd(x, y, weights)
    assert found.dtype == torch.float64 and found.shape == (1 + RESAMPLES,)
    for row in (0, 1, 17, RESAMPLES):
        rows = (weights[row] * 31).round().long()
        assert rows.sum() == 31
        assert found[row].item() == pytest.approx(direct_mmd(x.repeat_interleave(rows, 0), y), abs=1e-6)  # measured 6e-13
    assert found[0].item() == pytest.approx(direct_mmd(x, y), abs=1e-6)


def test_mmd_of_equal_sets_is_zero_and_of_two_points_has_a_closed_form():
    x = torch.nn.functional.normalize(randn(3000, 64, seed=0), dim=1)
    assert abs(mmd(x, x, uniform(3000))[0].item()) < 1e-9  # measured 0
    for d in (0.5, 10, 1e4):  # two one-point sets at distance d: 1 + 1 - 2 k(d)
        a, b = torch.zeros(1, 3), torch.tensor([[0, d, 0]])
        assert mmd(a, b, uniform(1))[0].item() == pytest.approx(1000 * (2 - 2 * np.exp(-(d**2) / 200)), abs=1e-9)
    assert mmd(torch.zeros(1, 3), torch.full((1, 3), 1e4), uniform(1))[0].item() == pytest.approx(2000)


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance


def direct_frechet(x: Tensor, y: Tensor) -> float:
    """By numpy's covariances and scipy's matrix square root."""
    linalg = pytest.importorskip("scipy.linalg")
    x, y = x.double().numpy(), y.double().numpy()
    root = linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return apart + np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)


def with_moments(n: int, mean: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """n samples whose own mean and unbiased covariance are exactly `mean` and diag(deviations^2)."""
    x = randn(n, len(mean), seed=seed)
    x = torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5  # whitened
    return mean + x * deviations


def test_frechet_of_samples_equals_scipys_square_root_also_of_resampled_sets():
    x, y = randn(60, 8, seed=0) @ randn(8, 8, seed=1), randn(50, 8, seed=2) @ randn(8, 8, seed=3) + 0.5
    weights = resample_weights(60)
    found = frechet(x, y, weights)
    assert found.dtype == torch.float64 and found.shape == (1 + RESAMPLES,)
    for row in (0, 1, 23, RESAMPLES):
        resampled = x.repeat_interleave((weights[row] * 60).round().long(), 0)
        assert found[row].item() == pytest.approx(direct_frechet(resampled, y), rel=1e-9)  # measured 4e-15


def test_frechet_of_known_gaussians_is_the_closed_form():
    mean, other = randn(5, seed=0), randn(5, seed=1)
    a, b = randn(5, seed=2).exp(), randn(5, seed=3).exp()  # standard deviations on the same axes: the matrices commute
    x, y = with_moments(40, mean, a, seed=4), with_moments(33, other, b, seed=5)
    expected = (mean - other).square().sum() + (a - b).square().sum()
    assert frechet(x, y, uniform(40))[0].item() == pytest.approx(expected.item(), abs=1e-8)  # measured 1e-14


@pytest.mark.parametrize("n, D", [(40, 8), (9, 8), (20, 64)])  # the last has fewer samples than dimensions
def test_a_shifted_set_is_the_shift_away_and_equal_sets_are_at_zero(n, D):
    x, shift = randn(n, D, seed=0), randn(D, seed=1)
    assert frechet(x, x, uniform(n))[0].item() == pytest.approx(0, abs=1e-6)  # measured 3e-14
    assert frechet(x + shift, x, uniform(n))[0].item() == pytest.approx(shift.square().sum().item(), abs=1e-8)  # 3e-14


@pytest.mark.parametrize("n, m, D", [(12, 15, 40), (12, 90, 40), (90, 12, 40), (2, 2, 3)])
def test_fewer_samples_than_dimensions_are_finite_and_as_scipy_has_them(n, m, D):
    x, y = randn(n, D, seed=0), 2 * randn(m, D, seed=1) + 0.1
    found = frechet(x, y, resample_weights(n))
    assert found.isfinite().all()
    assert found[0].item() == pytest.approx(direct_frechet(x, y), rel=1e-4)  # measured 1e-8: scipy roots a singular matrix


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_the_weights_are_one_uniform_row_and_resamples_that_repeat():
    weights = resample_weights(50)
    assert weights.shape == (1 + RESAMPLES, 50) and weights.dtype == torch.float64
    assert torch.equal(weights[0], uniform(50)[0])
    counts = weights[1:] * 50
    assert (counts - counts.round()).abs().max() < 1e-12 and (counts.sum(1) - 50).abs().max() < 1e-9
    assert len({tuple(row.tolist()) for row in weights}) == 1 + RESAMPLES
    torch.manual_seed(1)
    assert torch.equal(weights, resample_weights(50))


@pytest.mark.parametrize("n, p", [(400, 0.3), (1000, 0.5), (2000, 0.05)])
def test_the_error_of_a_share_is_the_binomials(n, p):
    hits = (torch.arange(n) < p * n).double()
    score = to_score(resample_weights(n) @ hits)
    assert score.value == pytest.approx(p)
    assert score.error == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, rel=0.3)  # measured at most 0.22


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def seen_by(network: Network, images: np.ndarray) -> Tensor:
    """What a network's transformer is given for uint8 images [B, H, W, 3]."""
    seen = []

    def forward(pixel_values: Tensor) -> SimpleNamespace:
        seen.append(pixel_values)
        return SimpleNamespace(image_embeds=torch.ones(len(images), 1), last_hidden_state=torch.ones(len(images), 1, 1))

    with mock.patch.object(network, "model", forward):
        network(images)
    return seen[0]


def by_pil(images: np.ndarray, size: int) -> Tensor:
    """Images resized by Pillow: [B, 3, size, size] in [0, 1]."""
    resized = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("size", [20, 28, 32, 64, 200])
def test_clip_sees_what_its_image_processor_gives_it(nets, size):
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    network, images = Network("cmmd", str(nets / "clip"), CPU), noise(range(6), size)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    levels = (seen_by(network, images) - expected).abs() * 255 * torch.tensor(metrics.OPENAI[1])[:, None, None]
    # torchvision's and Pillow's own weights have 8 bits or so
    assert levels.max() < (2.1 if size != 28 else 1e-3) and levels.mean() < 0.1  # of 255; measured 2 and 0.07
    model = CLIPVisionModelWithProjection.from_pretrained(nets / "clip").eval()
    with torch.no_grad():
        embeds = model(pixel_values=expected).image_embeds
    found = network(images)
    assert found.shape == (6, network.dim) and found.dtype == torch.float32
    assert (found.norm(dim=1) - 1).abs().max() < 1e-6
    apart = (found - embeds / embeds.norm(dim=1, keepdim=True)).abs().max()
    assert apart < (5e-3 if size != 28 else 1e-5)  # measured 1.3e-3, at equal size 1e-7
    assert torch.equal(network(torch.from_numpy(images)), found)  # numpy or torch


@pytest.mark.parametrize("size", [20, 48, 96])
def test_dino_mmd_sees_pixels_without_antialiasing_and_gives_a_cls_token_of_length_one(nets, size):
    from transformers import AutoModel

    network, images = Network("mmd", str(nets / "registers"), CPU), noise(range(5), size)
    x = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 255
    x = nn.functional.interpolate(x, size=(48, 48), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    model = AutoModel.from_pretrained(nets / "registers").eval().double()
    with torch.no_grad():
        cls = model(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
    assert (network(images) - cls / cls.norm(dim=1, keepdim=True)).abs().max() < 1e-5  # measured 4e-7


@pytest.mark.parametrize("size", [20, 32, 96])
def test_fdd_sees_16_patches_a_side_as_pillow_resizes_and_gives_the_cls_token_as_it_is(nets, size):
    from transformers import AutoModel

    network, images = Network("fdd", str(nets / "dinov2"), CPU), noise(range(5), size)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = seen_by(network, images)
    assert seen.shape == (5, 3, 32, 32)  # 16 patches of 2 px; the network's own size is 48
    levels = (seen * std + mean - by_pil(images, 32)).abs() * 255
    assert levels.max() < (2.1 if size != 32 else 1e-3) and levels.mean() < 0.1  # measured 1 and 0.003
    with torch.no_grad():
        cls = AutoModel.from_pretrained(nets / "dinov2").eval()(pixel_values=seen).last_hidden_state[:, 0]
    found = network(images)
    assert (found - cls).abs().max() < 1e-5 and found.norm(dim=1).min() > 2  # sqrt(24) after the last layer norm


def test_networks_are_frozen_fp32_and_named_by_their_weights(nets):
    one, other = (Network("fdd", str(nets / name), CPU) for name in ("dinov2", "other"))
    assert all(w.dtype == torch.float32 and not w.requires_grad for w in one.model.parameters()) and not one.model.training
    assert one.key != other.key and one.key == Network("mmd", str(nets / "dinov2"), CPU).key
    assert not one(noise([0])).requires_grad


@pytest.mark.parametrize("metric, network, words", [
    ("cmmd", "dinov2", "takes clip"), ("mmd", "clip", "takes dinov2"), ("fdd", "absent", "absent")])
def test_a_network_of_another_kind_or_an_absent_one_is_one_line(nets, many, metric, network, words):
    with pytest.raises(UserError, match=words) as caught:
        Scorer(f"scenes,{metric}:{nets / network}", [RowSet(str(many), BUILTIN, 32)], 4, CPU)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# FID


@pytest.fixture
def inception(tmp_path, monkeypatch) -> Path:
    """TORCH_HOME with an Inception of random weights as torch-fidelity's download leaves it; returns the file."""
    tf = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    with mock.patch.object(tf, "load_state_dict_from_url"):
        with mock.patch.object(tf.FeatureExtractorInceptionV3, "load_state_dict"):
            model = tf.FeatureExtractorInceptionV3("random", ["2048"])
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # torch's own would let the picture fade away within 20 layers
    file = tmp_path / "torch/hub/checkpoints" / Path(tf.URL_INCEPTION_V3).name
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    return file


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_an_inception_with_code_in_it_is_refused(inception, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.load(inception) | {"bomb": Bomb()}, inception)
    with pytest.raises(UserError, match="metric fid cannot load its network"):
        Network("fid", "", CPU)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_fid_is_torchmetrics_fid_of_the_same_uint8_images(inception, held_out):
    from torchmetrics.image.fid import FrechetInceptionDistance

    scorer = Scorer("fid", [held_out], 5, CPU, seed=3, batch=3)
    found = scorer(draw_noise)["fid"]
    reference = FrechetInceptionDistance(feature=2048, normalize=False)
    references = np.stack([held_out.read(row)["image"] for row in held_out.held_out[:5]])
    for images, real in ((noise(range(3, 8)), False), (references, True)):
        reference.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=real)
    assert found.value == pytest.approx(reference.compute().item(), rel=1e-4)  # measured 1e-6, of covariances of rank 4
    assert found.error > 0


def test_frechet_is_torchmetrics_fid_where_there_are_more_images_than_dimensions():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Patches(nn.Module):  # 12 features of an image
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1) / 8

    a, b = (torch.from_numpy(noise(range(start, start + 40))).permute(0, 3, 1, 2) for start in (0, 100))
    reference = fid.FrechetInceptionDistance(feature=Patches(), normalize=False)
    reference.update(a, real=False)
    reference.update(b, real=True)
    assert frechet(Patches()(a), Patches()(b), uniform(40))[0].item() == pytest.approx(reference.compute().item(), rel=1e-9)


def test_fid_without_its_weights_or_packages_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with mock.patch.dict("sys.modules", {"torch_fidelity.feature_extractor_inceptionv3": None}):
        with pytest.raises(UserError, match="pip install torchmetrics torch-fidelity"):
            Network("fid", "", CPU)
    tf = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    pytest.importorskip("torchmetrics")
    with mock.patch.object(tf, "load_state_dict_from_url", side_effect=OSError("no route")):
        with pytest.raises(UserError, match="no route.*download https://.* as .*hub/checkpoints/weights-inception") as caught:
            Network("fid", "", CPU)
    assert "\n" not in str(caught.value)
    file = tmp_path / "hub/checkpoints" / Path(tf.URL_INCEPTION_V3).name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    with pytest.raises(UserError, match="download https://") as caught:
        Network("fid", "", CPU)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Asking for metrics


def test_metrics_are_parsed_with_their_networks():
    assert parse_metrics("scenes,cmmd:runs/x") == {"scenes": "", "cmmd": "runs/x"}
    assert parse_metrics(" fid , mmd:org/name") == {"fid": "", "mmd": "org/name"}
    assert list(parse_metrics(",".join(METRICS))) == list(METRICS) == ["scenes", "cmmd", "mmd", "fdd", "fid"]
    assert parse_metrics("cmmd,fdd") == {"cmmd": "openai/clip-vit-large-patch14-336", "fdd": "facebook/dinov2-large"}


@pytest.mark.parametrize("text, words", [
    ("", "valid are scenes"), ("cmd", "did you mean cmmd"), ("scene", "did you mean scenes"), ("cmmd,fid,cmmd", "twice"),
    ("scenes,,fid", "valid are"), ("a\nb", "valid are"), ("fid:net", "no network"), ("scenes:", "no network"),
    ("mmd:", "folder")])
def test_a_mistake_in_the_list_is_one_line(text, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_metrics(text)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The scorer


def test_scene_scores_are_those_of_all_pictures_at_once():
    """Objects weigh alike, whatever the number of others in their picture."""
    truth = scenes.make_scenes(60, 5, "held_out")
    by_caption = {scenes.caption(scene): scenes.render(scene, 32) for scene in truth}
    drawn = {}

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        assert len(prompts) == len(seeds) <= 7
        pictures = np.stack([by_caption[prompt] for prompt in prompts])
        for k, seed in enumerate(seeds):  # a third is right, a third has a quarter of another picture, a third is noise
            if seed % 3 == 1:
                pictures[k, :16, :16] = 10
            if seed % 3 == 2:
                pictures[k] = noise([seed])[0]
            drawn[seed] = pictures[k]
        return pictures

    scorer = Scorer("scenes", [], 60, CPU, seed=5, batch=7)
    found = scorer(draw)
    expected = scenes.score_scenes(np.stack([drawn[5 + i] for i in range(60)]), truth)
    assert found.keys() == {f"scenes_{name}" for name in expected}
    for name, value in expected.items():
        assert found[f"scenes_{name}"].value == pytest.approx(value, abs=1e-12)  # measured 2e-16
        assert 0 < value < 1 and 0.02 < found[f"scenes_{name}"].error < 0.2
    pictures, prompts = scorer.shown["scenes"]
    assert prompts == [scenes.caption(scene) for scene in truth[:16]]
    assert np.array_equal(pictures, np.stack([drawn[5 + i] for i in range(16)]))
    right = scorer(lambda prompts, seeds: np.stack([by_caption[prompt] for prompt in prompts]))
    assert all(score == (1.0, 0.0) for score in right.values())


def test_the_error_of_the_share_of_whole_scenes_is_the_binomials():
    truth = scenes.make_scenes(300, 0, "held_out")
    by_caption = {scenes.caption(scene): scenes.render(scene, 32) for scene in truth}

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return np.stack([by_caption[prompt] * (seed % 3 > 0) for prompt, seed in zip(prompts, seeds)])

    first = Scorer("scenes", [], 300, CPU)(draw)
    assert first["scenes_scenes"].value == pytest.approx(2 / 3)
    assert first["scenes_scenes"].error == pytest.approx(1.96 * (2 / 9 / 300) ** 0.5, rel=0.3)  # measured 0.01
    assert Scorer("scenes", [], 300, CPU)(draw) == first


def test_held_out_pictures_themselves_are_at_distance_zero(held_out, features_of):
    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        rows = held_out.held_out[np.array(seeds) - 9]
        assert prompts == [held_out.read(row)["caption"] for row in rows]
        return np.stack([held_out.read(row)["image"] for row in rows])

    scorer = Scorer(features_of, [held_out], 13, CPU, seed=9, batch=5)
    found = scorer(draw)
    assert list(found) == ["cmmd", "mmd", "fdd"]
    assert abs(found["cmmd"].value) < 1e-9 and abs(found["mmd"].value) < 1e-9 and abs(found["fdd"].value) < 1e-6  # all 1e-13
    assert all(score.error > 1e-3 for score in found.values())
    assert len(scorer.shown["held_out"][0]) == len(scorer.shown["held_out"][1]) == 13
    far = scorer(draw_noise)
    assert all(far[name].value > 10 * score.error for name, score in found.items())


def test_several_sets_give_equally_many_rows_and_fewer_where_there_are_fewer(held_out, data, tmp_path, features_of):
    shutil.copytree(data, tmp_path / "few")
    few = RowSet(str(tmp_path / "few"), BUILTIN, 32)
    both = Scorer(features_of, [held_out, few], 30, CPU)
    taken = [(held_out, min(15, len(held_out.held_out))), (few, len(few.held_out))]
    assert len(few.held_out) < 15
    assert both.prompts == [s.read(row)["caption"] for s, n in taken for row in s.held_out[:n]]
    rows = torch.stack([s.read(row)["image"] for s, n in taken for row in s.held_out[:n]])
    assert (both.networks["mmd"](rows) - both.references["mmd"]).abs().max() < 1e-5
    for folder in (held_out.folder, few.folder):
        assert len(list(Path(folder, "features").iterdir())) == 3
    assert len(Scorer(features_of, [held_out, few], 5, CPU).prompts) == 5


@pytest.mark.parametrize("n, sets", [(1, 1), (8, 0)])
def test_too_few_held_out_rows_are_one_line(held_out, features_of, n, sets):
    with pytest.raises(UserError, match="use a data set with more .*1% of rows are held out") as caught:
        Scorer(features_of, [held_out][:sets], n, CPU)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_left_out_of_the_references(held_out, features_of, monkeypatch):
    whole = Scorer(features_of, [held_out], 8, CPU).references
    shutil.rmtree(Path(held_out.folder, "features"))
    bad, read = held_out.held_out[3], held_out.read

    def read_or_raise(row: int) -> dict:
        if row == bad:
            raise DamagedImage("a bad block")
        return read(row)

    monkeypatch.setattr(held_out, "read", read_or_raise)
    for _ in range(2):  # computed, then stored
        scorer = Scorer(features_of, [held_out], 8, CPU)
        kept = [0, 1, 2, 4, 5, 6, 7]
        assert all(torch.equal(scorer.references[name], whole[name][kept]) for name in whole)
        assert all(np.isfinite(score).all() for score in scorer(draw_noise).values())


# ---------------------------------------------------------------------------------------------------------------------
# Stored features


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The metric of each pass through a network."""
    made, call = [], Network.__call__

    def counted(self, images):
        made.append(self.metric)
        return call(self, images)

    monkeypatch.setattr(Network, "__call__", counted)
    return made


def stored(s: RowSet) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(s.folder, "features").iterdir()}


def test_stored_features_are_used_until_data_size_number_or_network_change(held_out, nets, passes):
    first = Scorer(f"fdd:{nets / 'dinov2'}", [held_out], 12, CPU, batch=4)
    assert passes == ["fdd"] * 3 and len(stored(held_out)) == 1
    scores, before = first(draw_noise), stored(held_out)
    passes.clear()
    again = Scorer(f"fdd:{nets / 'dinov2'}", [held_out], 12, CPU, batch=4)
    assert passes == [] and stored(held_out) == before and again(draw_noise) == scores
    passes.clear()
    Scorer(f"fdd:{nets / 'other'}", [held_out], 12, CPU, batch=4)
    Scorer(f"fdd:{nets / 'dinov2'}", [held_out], 8, CPU, batch=4)
    Scorer(f"mmd:{nets / 'dinov2'}", [held_out], 8, CPU, batch=4)
    Scorer(f"fdd:{nets / 'dinov2'}", [RowSet(held_out.folder, BUILTIN, 16)], 8, CPU, batch=4)
    with Path(held_out.folder, "manifest.json").open("a") as file:
        file.write("\n")
    Scorer(f"fdd:{nets / 'dinov2'}", [RowSet(held_out.folder, BUILTIN, held_out.image_size)], 12, CPU, batch=4)
    assert len(passes) == 3 + 2 + 2 + 2 + 3 and len(stored(held_out)) == 6
    assert stored(held_out).items() >= before.items()


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "shape", "dtype", "name"])
def test_damaged_features_are_computed_anew(held_out, nets, passes, damage):
    wanted = f"mmd:{nets / 'registers'}"
    whole = Scorer(wanted, [held_out], 6, CPU).references["mmd"]
    before, (file,) = stored(held_out), Path(held_out.folder, "features").iterdir()
    right = load_file(file)["features"]
    if damage in ("cut", "noise", "empty"):
        file.write_bytes({"cut": file.read_bytes()[:-9], "noise": bytes(range(256)), "empty": b""}[damage])
    else:
        save_file({"shape": {"features": right[:5].contiguous()}, "dtype": {"features": right.double()},
                   "name": {"others": right}}[damage], file)
    passes.clear()
    assert torch.equal(Scorer(wanted, [held_out], 6, CPU).references["mmd"], whole)
    assert passes == ["mmd"] and stored(held_out) == before
    assert os.stat(file).st_mode & 0o777 == os.stat(Path(held_out.folder, "manifest.json")).st_mode & 0o777


def test_a_folder_that_takes_no_file_gives_a_warning_and_the_same_scores(held_out, nets, capsys):
    wanted = f"mmd:{nets / 'registers'}"
    expected = Scorer(wanted, [held_out], 6, CPU)(draw_noise)
    shutil.rmtree(Path(held_out.folder, "features"))
    Path(held_out.folder, "features").write_text("a file in its place")
    capsys.readouterr()
    assert Scorer(wanted, [held_out], 6, CPU)(draw_noise) == expected
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: ") and err.count("\n") == 1 and "features" in err


def test_data_prep_check_passes_with_features_in_the_folder(held_out, features_of, tmp_path):
    Scorer(features_of, [held_out], 6, CPU)
    assert len(stored(held_out)) == 3
    result = run(tmp_path, "data_prep.py", "check", f"--data={held_out.folder}")
    assert result.status == 0 and "OK, 2000 rows" in result.stdout, result


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

RANKED = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from types import SimpleNamespace
import numpy as np
import torch
import torch.distributed as dist
import ranks
from metrics import Scorer, gather_rows, my_share
from scenes import caption, make_scenes, render
from shards import RowSet
from test_metrics import noise

scenes = {{caption(scene): render(scene, 32) for scene in make_scenes(12, 0, "held_out")}}
calls = []

def draw(prompts, seeds):
    calls.append(len(prompts))
    dist.all_reduce(torch.ones(1))  # drawing is collective: it hangs where ranks do not draw equally often
    return np.stack([scenes[p] if p in scenes and seed % 3 else noise([seed])[0] for p, seed in zip(prompts, seeds)])

device, mesh = ranks.join(False)
metrics, data, n = sys.argv[1:]
for k in range(1, 9):
    items = torch.tensor(my_share(k))
    assert gather_rows(items, k).tolist() == list(range(k)), items
    assert gather_rows(items[:, None].expand(-1, 2), k).tolist() == [[i, i] for i in range(k)]
scorer = Scorer(metrics, [RowSet(data, SimpleNamespace(text_encoder="builtin"), 32)], int(n), device, batch=4)
scores = scorer(draw)
assert Scorer(metrics, [RowSet(data, SimpleNamespace(text_encoder="builtin"), 32)], int(n), device, batch=4)(draw) == scores
with open(f"scores-{{dist.get_world_size()}}-{{dist.get_rank()}}.json", "w") as file:
    json.dump({{"scores": scores, "calls": calls, "shown": [len(x) for _, x in scorer.shown.values()]}}, file)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("n, tolerance", [(12, 1e-9), (11, 1e-4)])
def test_three_ranks_agree_with_one(many, features_of, tmp_path, n, tolerance):
    """To 1e-9 where batches hold the same pictures; else networks round differently in batches of other sizes."""
    (tmp_path / "ranked.py").write_text(RANKED.format(root=str(ROOT), tests=str(ROOT / "tests")))
    for world in (1, 3):
        shutil.copytree(many, tmp_path / f"{world}")
        result = run(tmp_path, tmp_path / "ranked.py", f"scenes,{features_of}", f"{world}", f"{n}", ranks=world)
        assert result.status == 0 and result.ours() == [], result
    one, *three = [json.loads((tmp_path / f"scores-{name}.json").read_text()) for name in ("1-0", "3-0", "3-1", "3-2")]
    assert three[0]["scores"] == three[1]["scores"] == three[2]["scores"]
    assert three[0]["calls"] == three[1]["calls"] == three[2]["calls"]
    assert one["shown"] == [n, n] and three[0]["shown"] == [4, 4]
    assert one["scores"].keys() == three[0]["scores"].keys() and len(one["scores"]) == 9 + 3
    apart = {name: np.abs(np.subtract(score, three[0]["scores"][name])).max() for name, score in one["scores"].items()}
    print({name: f"{value:.0e} of {one['scores'][name][0]:.2g}" for name, value in apart.items()})
    assert all(value == 0 for name, value in apart.items() if name.startswith("scenes_"))
    assert 0 < one["scores"]["scenes_exact"][0] < 1
    assert all(value <= tolerance for value in apart.values())  # measured 4e-15 and 9e-8, of 6


def test_without_a_process_group_a_share_is_everything():
    assert metrics.my_share(5) == [0, 1, 2, 3, 4] and metrics.my_share(0) == []
    x = torch.arange(12).view(6, 2)
    assert torch.equal(metrics.gather_rows(x, 4), x[:4])
