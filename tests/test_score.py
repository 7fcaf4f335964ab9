"""tools/score.py and tools/distances.py: distances equal direct float64 computations, scipy, torchmetrics and closed
forms; networks see what transformers' own preprocessing gives them; intervals are those of the binomial; weights and
folders of pictures are scored alike, each score is a line of scores.jsonl, and a mistake is answered with one line.

    OMP_NUM_THREADS=1 pytest tests/test_score.py

Measured errors, on a CPU, stand beside each tolerance.
"""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import enliven, metrics, run, train
from PIL import Image
from torch import Tensor, nn

from sample import load_checkpoint, to_uint8
from tools import distances, scenes
from tools.distances import RESAMPLES, Network, frechet, mmd, resample_weights, to_score
from tools.score import METRICS, Distance, parse_metrics
from train_prx import IMAGENET, Config, RowSet, UserError, draw, file_sha256, sampling_settings

KIND = "parity"  # of the tests without a mark of their own
machinery = pytest.mark.machinery
CPU = torch.device("cpu")
BUILTIN = Config(text_encoder="builtin")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n: int) -> Tensor:
    return torch.full((1, n), 1 / n, dtype=torch.float64)


def noise(seeds, size: int = 32) -> np.ndarray:
    """Pictures of patches of 4 px in random colours, one for each seed: uint8 [B, size, size, 3]."""
    patches = [np.random.default_rng(s).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8) for s in seeds]
    return np.stack([patch.repeat(4, 0).repeat(4, 1) for patch in patches])


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    """Tiny networks with random weights of size 0.2: clip/, registers/ and dinov2/."""
    import transformers as hf

    folder, shape = tmp_path_factory.mktemp("nets"), dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    clip = hf.CLIPVisionConfig(**shape, intermediate_size=48, projection_dim=16, image_size=28, patch_size=7)
    dinov2 = hf.Dinov2Config(**shape, patch_size=2, image_size=48)
    registers = hf.Dinov2WithRegistersConfig(**shape, patch_size=4, image_size=48)
    torch.manual_seed(0)
    for name, model in [("clip", hf.CLIPVisionModelWithProjection(clip)), ("dinov2", hf.Dinov2Model(dinov2)),
                        ("registers", hf.Dinov2WithRegistersModel(registers))]:
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.2)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> RowSet:
    """2,000 scenes at 32 px, of which about 20 are held out."""
    folder = tmp_path_factory.mktemp("many")
    assert run(folder, "tools/scenes.py", "make", "--out=scenes", "--rows=2000").status == 0
    return RowSet(str(folder / "scenes"), BUILTIN, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Distances


def direct_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """1000 times the squared MMD by one kernel at a time, in float64."""
    xx, yy, xy = (np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in b] for p in a])
                  for a, b in ((x, x), (y, y), (x, y)))
    return 1000 * (xx + yy - 2 * xy)


def test_mmd_is_the_direct_sum_over_all_pairs_also_of_resampled_sets(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 7)
    x, y, weights = 3 * randn(31, 6, seed=0), 3 * randn(23, 6, seed=1) + 1, resample_weights(31)
    found = mmd(x, y, weights)
    assert found.dtype == torch.float64 and found.shape == (1 + RESAMPLES,)
    for row in (0, 1, RESAMPLES):
        resampled = x.repeat_interleave((weights[row] * 31).round().long(), 0)
        assert found[row].item() == pytest.approx(direct_mmd(resampled.numpy(), y.numpy()), abs=1e-6)  # 6e-13
    assert abs(mmd(x, x, uniform(31))[0].item()) < 1e-9


def direct_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """By numpy's covariances and scipy's matrix square root."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = pytest.importorskip("scipy.linalg").sqrtm(a @ b).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


# Where there are fewer samples than dimensions scipy roots a singular matrix: measured 1e-8, else 4e-15
@pytest.mark.parametrize("n, m, D, tolerance", [
    (60, 50, 8, 1e-9), (12, 15, 40, 1e-4), (12, 90, 40, 1e-4), (90, 12, 40, 1e-4), (2, 2, 3, 1e-4)])
def test_frechet_equals_scipys_square_root_also_of_resampled_sets_and_few_samples(n, m, D, tolerance):
    x, y = randn(n, D, seed=0) @ randn(D, D, seed=1), 2 * randn(m, D, seed=2) @ randn(D, D, seed=3) + 0.5
    weights = resample_weights(n)
    found = frechet(x, y, weights)
    assert found.dtype == torch.float64 and found.shape == (1 + RESAMPLES,) and found.isfinite().all()
    for row in (0, 1, RESAMPLES) if n > D else (0,):
        resampled = x.repeat_interleave((weights[row] * n).round().long(), 0)
        assert found[row].item() == pytest.approx(direct_frechet(resampled.numpy(), y.numpy()), rel=tolerance)


@pytest.mark.parametrize("n, p", [(400, 0.3), (1000, 0.5), (2000, 0.05)])
def test_the_error_of_a_share_is_the_binomials(n, p):
    weights = resample_weights(n)
    counts = weights * n
    assert torch.equal(weights[0], uniform(n)[0]) and len({tuple(row.tolist()) for row in weights}) == 1 + RESAMPLES
    assert (counts - counts.round()).abs().max() < 1e-9 and (counts.sum(1) - n).abs().max() < 1e-9
    score = to_score(weights @ (torch.arange(n) < p * n).double())
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


@pytest.mark.parametrize("size", [20, 28, 32, 48, 200])
@pytest.mark.parametrize("metric, name, side", [("cmmd", "clip", 28), ("mmd", "registers", 48), ("fdd", "dinov2", 32)])
def test_networks_see_and_give_what_is_published(nets, metric, name, side, size):
    """mmd's pictures are resized without antialiasing; fdd's are 16 patches a side, whatever the network's own size."""
    from transformers import AutoModel, CLIPImageProcessor, CLIPVisionModelWithProjection

    network, images = Network(metric, str(nets / name), CPU), noise(range(6), size)
    statistics = {} if metric == "cmmd" else {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **statistics)
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    if metric == "mmd":
        x = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 255
        expected = (nn.functional.interpolate(x, (side, side), mode="bicubic", align_corners=False) - mean) / std
    else:
        expected = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    seen, is_exact = seen_by(network, images), size == side or metric == "mmd"
    levels = (seen - expected).abs() * 255 * std  # torchvision's and Pillow's own weights have 8 bits or so
    assert levels.max() < (1e-2 if is_exact else 2.1) and levels.mean() < 0.1  # of 255; measured 3e-3, 2 and 0.07
    kind = CLIPVisionModelWithProjection if metric == "cmmd" else AutoModel
    with torch.no_grad():
        given = kind.from_pretrained(nets / name).eval()(pixel_values=seen)
    features = given.image_embeds if metric == "cmmd" else given.last_hidden_state[:, 0]
    assert features.norm(dim=1).min() > 1.5  # so that it matters whose are scaled to length one
    features = features if metric == "fdd" else nn.functional.normalize(features)
    found = network(torch.from_numpy(images))
    assert found.dtype == torch.float32 and torch.equal(found, network(images))
    assert (found - features).abs().max() < 1e-5  # measured 1e-7


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


@pytest.mark.slow
def test_fid_is_torchmetrics_fid_of_the_same_uint8_images(inception, many):
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric, images = Distance("fid", "", [many], 5, CPU, 3), noise(range(3, 8))
    found = metric.scores(metric.read(images, 0))["fid"]
    reference = FrechetInceptionDistance(feature=2048, normalize=False)
    real = np.stack([many.read(row)["image"] for row in many.held_out[:5]])
    for pictures, is_real in ((images, False), (real, True)):
        reference.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real=is_real)
    assert found.value == pytest.approx(reference.compute().item(), rel=1e-4)  # 1e-6, of covariances of rank 4
    assert found.error > 0


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_fid_without_its_packages_or_with_weights_that_are_absent_or_code_is_refused(inception, tmp_path, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as tf

    monkeypatch.chdir(tmp_path)
    with mock.patch.dict("sys.modules", {"torch_fidelity.feature_extractor_inceptionv3": None}):
        with pytest.raises(UserError, match="pip install torchmetrics torch-fidelity"):
            Network("fid", "", CPU)
    with mock.patch.object(tf, "load_state_dict_from_url", side_effect=OSError("no route")):
        with pytest.raises(UserError, match="no route.*download https://.* as .*hub/checkpoints/weights-inception"):
            Network("fid", "", CPU)
    torch.save(torch.load(inception) | {"bomb": Bomb()}, inception)
    with pytest.raises(UserError, match="metric fid cannot load its network"):
        Network("fid", "", CPU)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@machinery
def test_metrics_are_read_by_their_published_networks():
    assert parse_metrics(",".join(METRICS)) == {
        "scenes": "", "cmmd": "openai/clip-vit-large-patch14-336", "mmd": "facebook/dinov2-with-registers-large",
        "fdd": "facebook/dinov2-large", "fid": "", "held_out": ""}


@machinery
def test_held_out_pictures_themselves_are_at_distance_zero_and_others_are_far(many, data, nets):
    few = RowSet(str(data), BUILTIN, 32)
    rows = [(s, row) for s, n in ((many, 7), (few, 8)) for row in s.held_out[:n]]  # equally many; fewer where there are
    assert len(few.held_out) < 8
    pictures = np.stack([s.read(row)["image"] for s, row in rows])
    for name, net in ("cmmd", "clip"), ("mmd", "registers"), ("fdd", "dinov2"):
        metric = Distance(name, str(nets / net), [many, few], 15, CPU, 5)
        assert metric.prompts == [s.read(row)["caption"] for s, row in rows] and metric.about["n"] == len(rows)
        near, far = (metric.scores(metric.read(x, 0))[name] for x in (pictures, noise(range(len(rows)))))
        assert abs(near.value) < 1e-6 and near.error > 1e-3 and far.value > 10 * near.error  # measured 1e-13


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny) -> Path:
    """The folder of a run of 4 steps with snapshots of steps 2 and 4, in fp32, as pictures are drawn on a CPU."""
    flags = *tiny, "--warmup=1", "--max_steps=4", "--snapshot_every=2", "--precision=fp32"
    return train(tmp_path_factory.mktemp("trained"), *flags)


def score(cwd: Path, *flags: str) -> str:
    """What the referee says of n = 18 from seed 4."""
    result = run(cwd, "tools/score.py", *flags, "--n=18", "--seed=4", "--batch=7")
    assert result.status == 0 and not result.ours(), result
    return result.stdout


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


@machinery
def test_weights_and_the_folder_that_they_drew_are_scored_alike(tmp_path, trained):
    shutil.copytree(enliven(trained), tmp_path / "try")
    said = score(tmp_path, "--checkpoint=try")
    model, cfg, encode_text = load_checkpoint(tmp_path / "try")
    held_out, settings = scenes.make_scenes(18, 4, "held_out"), sampling_settings(cfg)
    prompts = [scenes.caption(scene) for scene in held_out]
    images = to_uint8(draw(model, encode_text, prompts, list(range(4, 22)), (32, 32), **settings))
    expected = scenes.score_scenes(images, held_out)
    table = {line.split()[0]: line.split()[1] for line in said.splitlines() if line.startswith("  ")}
    assert table == {name: f"{100 * value:.1f}%" for name, value in expected.items()}
    (line,) = lines(tmp_path / "try")
    assert line["values"] == pytest.approx(expected, abs=1e-12) and line["errors"].keys() == expected.keys()
    about = {"step": 4, "metric": "scenes", "n": 18, "seed": 4, "guidance": "cfg", "scale": 2.0, "steps": 2, "size": 32,
             "network": "", "data": "scenes:demo", "weights": file_sha256(tmp_path / "try/ema.safetensors")}
    assert line | about == line and line["seconds"] > 0
    assert "grid: try/score_scenes.png" in said and Image.open(tmp_path / "try/score_scenes.png").width == 800
    score(tmp_path, "--level=demo", "--write_prompts=prompts.txt")
    drawing = "--checkpoint=try", "--prompts=prompts.txt", "--seed=4", "--seed_step=1", "--out=pictures"
    assert run(tmp_path, "sample.py", *drawing).status == 0
    score(tmp_path, "--pictures=pictures", "--level=demo", "--out=grid.png")
    assert lines(tmp_path / "pictures") == [line | {"step": None, "seconds": None}] and (tmp_path / "grid.png").exists()
    for flags, words in [(("--n=17",), "has 18 pictures, and 17 are scored"), (("--n=18", "--seed=3"), "shows 'a "),
                         (("--level=race", "--n=18"), "shows 'a "), (("--metric=held_out",), "is of weights")]:
        assert words in run(tmp_path, "tools/score.py", "--pictures=pictures", "--level=demo", *flags).error()


@machinery
def test_true_pictures_score_all_and_those_of_other_captions_chance_whatever_the_batch(tmp_path):
    pictured = scenes.make_scenes(256, 4, "held_out", "race")
    for name, shift, objects, exact in ("truth", 0, 1, 1), ("others", 1, 0.08, 0.01):
        (tmp_path / name).mkdir()
        pictures = np.stack([scenes.render(pictured[i - shift], 64) for i in range(256)])
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / f"{name}/{i:05d}-0.png")
        flags = f"--pictures={name}", "--level=race", "--n=256", "--seed=4", "--batch=7"
        assert run(tmp_path, "tools/score.py", *flags).status == 0
        found, errors = lines(tmp_path / name)[0]["values"], lines(tmp_path / name)[0]["errors"]
        assert found["objects"] == pytest.approx(objects, abs=0.04) and found["exact"] == pytest.approx(exact, abs=0.02)
        assert found == pytest.approx(scenes.score_scenes(pictures, pictured), abs=1e-12)  # each object weighs alike
        assert errors["objects"] == 0 if name == "truth" else 0.01 < errors["objects"] < 0.05


@machinery
def test_snapshots_are_scored_once_by_each_metric_and_the_loss_is_the_runs(tmp_path, trained, networks):
    shutil.copytree(trained, tmp_path / "try")
    every = "--checkpoint=try", "--snapshots", f"--metric=scenes,held_out,mmd:{networks}/dinov2"
    score(tmp_path, *every[:2])
    score(tmp_path, *every)
    written = lines(tmp_path / "try")
    assert sorted((x["step"], x["metric"]) for x in written) == [
        (step, metric) for step in (2, 4) for metric in ("held_out", "mmd", "scenes")]
    assert 0 < written[0]["seconds"] < written[1]["seconds"] and str(networks / "dinov2") in written[2]["network"]
    last = score(tmp_path, *every)
    assert "is in try/scores.jsonl" in last and lines(tmp_path / "try") == written
    loss = next(x for x in written if (x["step"], x["metric"]) == (4, "held_out"))
    logged = [x["held_out"] for x in metrics(trained) if "held_out" in x][-1]
    assert loss["values"]["held_out"] == pytest.approx(logged, rel=1e-6) and loss["errors"]["held_out"] > 0


@machinery
@pytest.mark.parametrize("flags, words", [
    ("", "what is to be scored"), ("--checkpoint=try --pictures=x", "what is to be"), ("--pictures=x", "no *.png"),
    ("--checkpoint=nowhere", "no checkpoint at nowhere"), ("--checkpoint=try --metric=exact", "no metric 'exact'"),
    ("--checkpoint=try --metric=fdd --data=absent", "no data at absent"), ("--checkpoint=x --snapshots", "no snapsh"),
    ("--checkpoint=try --data=scenes --metric=mmd:{net} --n=1", "2 are needed"), ("--write_prompts=p", "which scenes?"),
    ("--checkpoint=try --metric=cmmd:{net}", "takes clip"), ("--checkpoint=try --metric=fdd:x/y/z", "no such folder"),
    ("--metric=mmd --write_prompts=p", "--data=FOLDER"), ("--checkpoint=try --levl=demo", "did you mean --level")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, trained, data, networks, flags, words):
    for name, target in (("try", trained), ("scenes", data)):
        (tmp_path / name).symlink_to(target)
    assert words in run(tmp_path, "tools/score.py", *flags.format(net=networks / "dinov2").split()).error()
