"""Twelve ordinary photographs with captions go through `data_prep.py build`, 400 steps of train_prx.py and `sample.py`,
and come out recognisable for their own captions.

    pytest tests/test_photos.py        about 40 s; the sheet lies under pytest's --basetemp, photos0/sheet.png
"""
import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run, train
from datasets import load_from_disk
from PIL import Image

from shards import is_held_out

pytestmark = pytest.mark.machinery

PHOTOS = {  # files that scikit-image carries, none of which `is_held_out`
    "astronaut.png": "a smiling astronaut in an orange suit before a flag",
    "camera.png": "a man in a dark coat behind a camera on a tripod",
    "chelsea.png": "the face of a ginger cat",
    "coffee.png": "a cup of espresso on a red saucer",
    "coins.png": "rows of old coins on dark cloth",
    "motorcycle_left.png": "a red motorcycle in a garage",
    "rocket.jpg": "a rocket on its launch pad at dusk",
    "moon.png": "craters on the gray surface of the moon",
    "brick.png": "a brick wall seen from close by",
    "hubble_deep_field.jpg": "hundreds of distant galaxies in black space",
    "page.png": "a printed page of a book",
    "retina.jpg": "the retina of an eye with its vessels",
}
SIZE = 64


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """(photographs as they were stored, pictures drawn for their captions), uint8 [12, 64, 64, 3] each."""
    bundled = Path(pytest.importorskip("skimage.data").__file__).parent
    cwd = tmp_path_factory.mktemp("photos")
    (cwd / "mine").mkdir()
    with open(cwd / "mine/metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for name, caption in PHOTOS.items():
            assert not is_held_out(name), f"{name} would never be trained on: give it another name"
            shutil.copy(bundled / name, cwd / "mine" / name)
            table.writerow([name, caption])
    result = run(cwd, "data_prep.py", "build", "--source=mine", "--out=data", f"--size={SIZE}")
    assert result.status == 0 and "12 of 12 images" in result.stdout, result

    # patch 16: a step takes a fifth of what it does at patch 8, and 12 pictures need no finer tokens
    train(cwd, "--preset=demo", "--name=mine", "--data=data", f"--stages={SIZE}:400:12:0", "--micro_batch=12",
          "--patch=16", "--bottleneck=128", "--depth=4", "--route_end=3", "--repa_weight=0", "--compile=0",
          "--save_every=0", "--eval_every=0", "--sample_every=0")

    (cwd / "prompts.txt").write_text("\n".join(PHOTOS.values()))
    result = run(cwd, "sample.py", "--checkpoint=runs/mine", "--prompts=prompts.txt", "--out=sheet.png")
    assert result.status == 0, result
    sheet = np.asarray(Image.open(cwd / "sheet.png"))  # 4 columns, each picture three times as large
    height, width = sheet.shape[0] // 3, sheet.shape[1] // 4
    pictures = [sheet[i // 4 * height + 5 :, i % 4 * width + 5 :][: 3 * SIZE : 3, : 3 * SIZE : 3] for i in range(12)]
    rows = load_from_disk(str(cwd / f"data/{SIZE}"))
    rows = {row["key"]: np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows}
    return np.stack([rows[name] for name in PHOTOS]), np.stack(pictures)


def distances(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Mean squared difference [pictures, photos] of pixels, each image at mean 0 and contrast 1; 2 is unrelated."""
    def normal(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1).astype(float)
        return (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)
    a, b = normal(pictures), normal(photos)
    return np.square(a[:, None] - b[None]).mean(2)


@pytest.mark.slow
def test_each_caption_draws_its_own_photograph(drawn):
    photos, pictures = drawn
    far = distances(pictures, photos)
    nearest = far.argmin(axis=1)
    assert (nearest == np.arange(12)).sum() >= 11, dict(zip(PHOTOS, [list(PHOTOS)[i] for i in nearest]))
    assert np.median(np.diag(far)) < 0.3, "and most of them closely"
    assert np.median(distances(photos, photos)[~np.eye(12, dtype=bool)]) > 1.5, "which no two photographs are"


@pytest.mark.slow
def test_the_pictures_have_the_photographs_colours(drawn):
    photos, pictures = (images.astype(float).mean(axis=(1, 2)) for images in drawn)  # [12, 3]
    assert (np.abs(photos - pictures).max(axis=1) < 25).sum() >= 11
