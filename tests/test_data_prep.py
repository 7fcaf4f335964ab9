"""data_prep.py: folders of pictures and the public sets become shards that hold what Pillow would give, whatever is
wrong with them and however often a command is killed; captions become latents; and only what is whole counts.

    pytest tests/test_data_prep.py
"""
import csv
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY, curve, patched, patience, run, start, train, wait_for
from datasets import Value, load_from_disk
from filelock import FileLock
from PIL import Image, ImageOps, JpegImagePlugin
from safetensors.torch import load_file

import data_prep
from train_prx import Chunks, Config, Stage, T5GemmaText, UserError, is_held_out, read_manifest

pytestmark = pytest.mark.machinery

def encoded(image: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()

def picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A smooth random colour picture, so that JPEG and resizing are kind to it."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

def jpeg(seed: int, side: int = 96) -> bytes:
    return encoded(picture(seed, side, side), quality=90)

def folder_of(tmp_path: Path, names: dict[str, Image.Image | bytes], captions: dict[str, str] | None = None) -> Path:
    """A folder `pictures` with the given files and a metadata.csv that captions them."""
    folder = tmp_path / "pictures"
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(folder / name) if isinstance(content, Image.Image) else (folder / name).write_bytes(content)
    rows = ([name, (captions or {}).get(name, f"this is {name}")] for name in names)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], *rows])
    return folder

def build(source: Path | str, out: Path, *flags: str) -> dict:
    data_prep.main(["build", f"--source={source}", f"--out={out}", *(flags or ("--size=32",))])
    return read_manifest(out)

def build_set(kind: str, source: Path, out: Path, *flags: str) -> dict:
    return build(kind, out, f"--input={source}", "--size=32,64", *flags)

def check(data: Path) -> None:
    data_prep.main(["check", f"--data={data}", "--workers=0"])

def problems(data: Path, capsys) -> list[str]:
    """The lines that `check` prints, which finds something wrong."""
    capsys.readouterr()
    with pytest.raises(UserError, match=r"\d problem\(s\), listed above"):
        check(data)
    return capsys.readouterr().out.splitlines()

def rows_of(out: Path, size: int = 32) -> list[dict]:
    return load_from_disk(str(out / str(size))).to_list()

def keys_of(out: Path, size: int = 32) -> list[str]:
    return load_from_disk(str(out / str(size)))["key"][:]

def pixels(image: bytes | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image, np.float64)

def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9))

def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}

# ---------------------------------------------------------------------------------------------------------------------
# What is read

@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_metadata_and_text_files_build_the_same_rows(tmp_path, kind):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    table = []
    for seed, name in enumerate(["a.png", "b.jpg", "more/c.jpg"]):
        picture(seed).save(folder / name)
        table.append({"file_name": name, "caption": f'Größe {seed}, "quoted", with a comma.'})
    if kind == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([list(table[0]), *(list(row.values()) for row in table)])
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(table), folder / "metadata.parquet")
    for row in table if kind == "txt" else []:
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["caption"] + "\n", "utf-8")
    manifest = build(folder, tmp_path / "out", "--size=64", "--format=png")
    rows = rows_of(tmp_path / "out", 64)
    assert [(row["key"], row["caption"], row["source"]) for row in rows] == \
        [(row["file_name"], row["caption"], "pictures") for row in table]
    for seed, row in enumerate(rows):
        stored = Image.open(folder / table[seed]["file_name"]).convert("RGB")
        expected = ImageOps.fit(stored, (64, 64), Image.Resampling.BICUBIC)
        assert np.abs(pixels(row["image"]) - pixels(expected)).max() <= 2
    assert (manifest["rows"], manifest["sizes"], manifest["dropped"]) == (3, [64], {})

def test_photographs_come_out_as_pillow_scales_them(tmp_path):
    bundled = Path(pytest.importorskip("skimage.data").__file__).parent
    names = ["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "rocket.jpg", "retina.jpg"]
    folder = folder_of(tmp_path, {name: (bundled / name).read_bytes() for name in names})
    build(folder, tmp_path / "out", "--size=64,128")
    for size in (64, 128):
        rows = rows_of(tmp_path / "out", size)
        assert [row["key"] for row in rows] == names
        for row in rows:
            original = Image.open(bundled / row["key"]).convert("RGB")
            side, (width, height) = min(original.size), original.size
            left, top = (width - side) // 2, (height - side) // 2  # ImageOps.fit would cut half pixels
            square = original.crop((left, top, left + side, top + side))
            expected = pixels(square.resize((size, size), Image.Resampling.BICUBIC))
            assert pixels(row["image"]).shape == (size, size, 3)
            assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(row["image"]))) == 0  # 4:4:4
            assert psnr(pixels(row["image"]), expected) > 30, row["key"]

@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_nothing_of_it_stored(orientation):
    upright, turn = picture(0, 640, 480), Image.Transpose
    undo = {2: [turn.FLIP_LEFT_RIGHT], 3: [turn.ROTATE_180], 4: [turn.FLIP_TOP_BOTTOM], 5: [turn.TRANSPOSE],
            6: [turn.ROTATE_90], 7: [turn.TRANSVERSE], 8: [turn.ROTATE_270]}
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, quality=98, exif=exif, comment=b"secret", icc_profile=b"secret" * 100)
    image = data_prep.decode_rgb(data, 64, 0.5)
    for file_format in ("png", "jpeg"):
        square = data_prep.crop_and_encode(image, 64, {"format": file_format, "quality": 95})
        assert psnr(pixels(square), pixels(ImageOps.fit(upright, (64, 64), Image.Resampling.BICUBIC))) > 34
        # a viewer that reads EXIF would turn it once more
        assert not Image.open(io.BytesIO(square)).getexif() and b"secret" not in square

def test_transparent_pixels_become_white():
    half = np.zeros((64, 64, 4), np.uint8)
    half[..., 0] = 255
    half[:, 32:, 3] = 255  # left half transparent, right half red
    grey = Image.fromarray(np.stack([half[..., 1], half[..., 3]], -1), "LA")  # right half black
    palette = Image.fromarray(half[..., 3] // 255, "P")  # left half 0, right half 1
    palette.putpalette([0, 0, 255, 255, 0, 0])
    for data, right in [(encoded(Image.fromarray(half), "PNG"), (255, 0, 0)), (encoded(grey, "PNG"), (0, 0, 0)),
                        (encoded(Image.fromarray(half), "WEBP", lossless=True), (255, 0, 0)),
                        (encoded(palette, "PNG", transparency=0), (255, 0, 0))]:
        got = pixels(data_prep.decode_rgb(data, 64, 0.5))
        assert (got[:, :32] == 255).all() and (got[:, 32:] == right).all()

def test_every_kind_of_pixel_becomes_eight_bit_rgb():
    rgb = picture(1, 64, 64)
    grey = np.asarray(rgb.convert("L"))
    sixteen, three = Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, -1)
    animation = encoded(rgb, "GIF", save_all=True, append_images=[picture(2, 64, 64)])
    cases = {
        "16-bit PNG": (encoded(sixteen, "PNG"), three, 130),
        "16-bit TIFF": (encoded(sixteen, "TIFF"), three, 130),
        "grey JPEG": (encoded(rgb.convert("L"), "JPEG", quality=98), three, 38),
        "palette PNG": (encoded(rgb.quantize(256), "PNG"), pixels(rgb), 25),
        "CMYK JPEG": (encoded(rgb.convert("CMYK"), "JPEG", quality=98), pixels(rgb), 34),
        "one-bit PNG": (encoded(rgb.convert("1"), "PNG"), pixels(rgb.convert("1").convert("RGB")), 130),
        "animated GIF": (animation, pixels(rgb), 20),
    }
    for name, (data, expected, bound) in cases.items():
        got = data_prep.decode_rgb(data, 64, 0.5)
        assert got.mode == "RGB" and psnr(pixels(got), expected) > bound, name

def test_bad_images_are_dropped_counted_by_reason_and_named(tmp_path, capsys):
    good = encoded(picture(0), "JPEG")
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)  # a small PNG that claims 900 million pixels
    png = encoded(picture(3), "PNG")
    huge = png[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]
    images = {
        "good.jpg": good, "copy.jpg": good, "text.jpg": b"this is no picture", "zero.jpg": b"",
        "cut.jpg": encoded(picture(1, 400, 400), "JPEG")[:3000], "cut.png": encoded(picture(2), "PNG")[:1500],
        "huge.png": huge, "tiny.png": picture(4, 200, 15), "small.png": picture(5, 200, 16), "blank.png": picture(6),
    }
    folder = folder_of(tmp_path, images, {"blank.png": " \n "})
    with open(folder / "metadata.csv", "a") as file:
        file.write("nowhere.jpg,a file that is not there\n")
    manifest = build(folder, tmp_path / "out", "--size=16,32")
    assert [row["key"] for row in rows_of(tmp_path / "out", 16)] == ["good.jpg", "small.png"]
    assert manifest["dropped"] == {"duplicate": 1, "unreadable": 4, "too large": 1, "too small": 1, "empty caption": 1,
                                   "missing file": 1}
    assert sorted((tmp_path / "out/dropped.txt").read_text().splitlines()) == [
        "blank.png: empty caption", "copy.jpg: duplicate", "cut.jpg: unreadable", "cut.png: unreadable",
        "huge.png: too large", "nowhere.jpg: missing file", "text.jpg: unreadable", "tiny.png: too small",
        "zero.jpg: unreadable"]
    said = capsys.readouterr()
    assert "2 of 11 images" in said.out  # in a folder of one's own many unusable images are a warning
    assert "warning: 7 of 11 images are unusable" in said.err and "out/dropped.txt names them" in said.err
    assert build(folder, tmp_path / "strict", "--size=16,32", "--min_scale=1")["dropped"]["too small"] == 2

def test_odd_names_and_captions_are_kept_readable(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (name, caption) in enumerate([(b"a.png", b"\xef\xbb\xbfa dog\x00 by\t the\n sea"), (b"\xff.png", b"a cat"),
                                         ("ü ,:.png".encode(), "Größe".encode())]):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            picture(i).save(file, "PNG")
        with open(os.path.join(os.fsencode(folder), name[:-4] + b".txt"), "wb") as file:
            file.write(caption)
    (folder / "nocaption.png").write_bytes(encoded(picture(3), "PNG"))
    (folder / "nocaption.txt").mkdir()
    assert build(folder, tmp_path / "out")["dropped"] == {"empty caption": 1}
    assert (tmp_path / "out/dropped.txt").read_text() == "nocaption.png: empty caption\n"
    assert {row["key"]: row["caption"] for row in rows_of(tmp_path / "out", 32)} == {
        "a.png": "a dog by the sea", "\ufffd.png": "a cat", "ü ,:.png": "Größe"}

# ---------------------------------------------------------------------------------------------------------------------
# What is written

def test_datasets_opens_the_exact_columns_in_one_order_for_all_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "ROWS_A_PART", 8)
    monkeypatch.setattr(data_prep, "ROWS_A_BATCH", 3)
    names = [f"{i * 7 % 30:02d}.jpg" for i in range(30)]
    folder = folder_of(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    manifest = build(folder, tmp_path / "out", "--size=64,16")
    for size in (16, 64):
        data = load_from_disk(str(tmp_path / "out" / str(size)))
        assert data.features == {
            "key": Value("string"), "image": Value("binary"), "height": Value("int32"), "width": Value("int32"),
            "caption": Value("string"), "caption_short": Value("string"), "source": Value("string")}
        assert data.cache_files  # memory-mapped from the shards themselves
        assert [(row["key"], row["height"], row["width"]) for row in data] == [(name, size, size) for name in names]
    assert [shard["rows"] for name, shard in manifest["shards"].items() if name.startswith("64/")] == [8, 8, 8, 6]
    check(tmp_path / "out")

def write(out: Path, rows) -> dict:
    return data_prep.write_dataset(out, [data_prep.Part("all", "", ())], lambda part, dropped: rows,
                                   settings={"source": "s", "revision": "r", "sizes": [32]})

def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    folder = folder_of(tmp_path, {"a.png": picture(0)})
    build(folder, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match="exists and is never overwritten.*--out"):
        build(folder, tmp_path / "out", "--size=64")
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]

def test_a_folder_that_another_process_writes_or_other_settings_began_is_left_alone(tmp_path):
    folder, begun = folder_of(tmp_path, {"a.png": picture(0)}), tmp_path / "out.partial"
    begun.mkdir()
    with FileLock(tmp_path / "out.lock"), pytest.raises(UserError, match="another process is writing"):
        build(folder, tmp_path / "out")
    (begun / "settings.json").write_text('{"sizes": [16]}')
    with pytest.raises(UserError, match="was begun with other settings"):
        build(folder, tmp_path / "out")
    shutil.rmtree(begun)
    assert build(folder, tmp_path / "out")["rows"] == 1

def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path, networks, monkeypatch):
    def noisy(seed: int) -> Image.Image:  # which does not compress
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))

    folder_of(tmp_path, {f"{i:02d}.png": noisy(i) if i > 8 else picture(i) for i in range(12)})
    build_flags = ["build", "--source=pictures", "--out=out", "--format=png", "--size=64", "--workers=1"]
    embed_flags = ["embed", "--data=out", f"--encoder={networks / 't5gemma'}"]
    for flags, room, what in ((build_flags, 30_000, "out"), (embed_flags, 2_000, "out/text-t5gemma")):
        body = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room})); module.ROWS_A_PART = 3"
        line = run(tmp_path, patched(tmp_path, body, "data_prep"), *flags).error()
        assert f"cannot write {what}: " in line and "the same command continues" in line
        done = list((tmp_path / "out.partial/parts").glob("*.json"))
        assert len(done) == 3 if what == "out" else "text" not in read_manifest(tmp_path / "out")
        whole = run(tmp_path, patched(tmp_path, "module.ROWS_A_PART = 3", "data_prep"), *flags)
        assert whole.status == 0, whole
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["64", "dropped.txt", "manifest.json", "text-t5gemma"] and len(rows_of(tmp_path / "out", 64)) == 12
    check(tmp_path / "out")

# ---------------------------------------------------------------------------------------------------------------------
# check

@pytest.fixture
def good(tmp_path) -> Path:
    build(folder_of(tmp_path, {f"{i}.jpg": picture(i) for i in range(6)}), tmp_path / "good", "--size=32,64")
    return tmp_path / "good"

def test_check_notices_a_changed_byte_anywhere_and_a_missing_shard(good, capsys):
    check(good)
    shard = good / "64/data-00000.arrow"
    original = shard.read_bytes()
    for position in (100, len(original) // 2, len(original) - 10):
        damaged = bytearray(original)
        damaged[position] ^= 0xFF
        shard.write_bytes(damaged)
        assert problems(good, capsys)[0] == f"{shard}: changed, its sha256 is not the manifest's"
    shard.unlink()
    found = problems(good, capsys)
    assert found[0] == f"{shard}: missing" and not any(str(good / "32") in line for line in found)

def test_check_notices_a_wrong_row_count_and_another_list_of_shards(good, capsys):
    manifest = data_prep.read_manifest(good)
    (good / "manifest.json").write_text(json.dumps(manifest | {"rows": 7}))
    assert problems(good, capsys) == [f"{good}/{size}: 6 rows, the manifest says 7" for size in (32, 64)]
    (good / "manifest.json").write_text(json.dumps(manifest))
    state = json.loads((good / "32/state.json").read_text())
    state["_data_files"] *= 2
    (good / "32/state.json").write_text(json.dumps(state))
    assert problems(good, capsys)[0] == f"{good}/32/state.json: lists other shards than the manifest"

def test_check_names_the_row_of_a_bad_image_and_caption(tmp_path, capsys):
    def row(i, image, caption="a cat"):
        return {"key": str(i), "images": {32: image}, "caption": caption, "caption_short": caption, "source": "s"}

    good, long = encoded(picture(0, 32, 32), "PNG"), encoded(picture(0, 32, 48), "PNG")
    write(tmp_path / "out", [row(0, good), row(1, b"no picture"), row(2, long), row(3, good, "")])
    found = problems(tmp_path / "out", capsys)
    assert [line.partition("data-00000.arrow ")[2].partition(",")[0] for line in found] == [
        "row 1: image is unreadable", "row 2: image is (32", "row 3: empty caption"]

def test_check_notices_sizes_that_hold_other_rows(good, tmp_path, capsys):
    other = tmp_path / "other"
    build(folder_of(tmp_path / "o", {f"{i}.jpg": picture(i) for i in (1, 0, 2, 3, 4, 5)}), other, "--size=32,64")
    manifest, name = data_prep.read_manifest(good), "64/data-00000.arrow"
    shutil.copy(other / name, good / name)
    manifest["shards"][name] = data_prep.read_manifest(other)["shards"][name]
    (good / "manifest.json").write_text(json.dumps(manifest))
    assert problems(good, capsys) == [f"{good}: the sizes do not hold the same rows in the same order"]

def test_a_folder_of_the_former_layout_is_whole_and_read(good):  # no dropped.txt, and batches of other lengths
    shard, manifest, rows = good / "32/data-00000.arrow", read_manifest(good), rows_of(good)
    (good / "dropped.txt").unlink()
    table = pa.ipc.open_stream(shard.read_bytes()).read_all()
    with pa.ipc.new_stream(str(shard), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    manifest["shards"]["32/data-00000.arrow"] = data_prep.describe_shard(shard, 6)
    (good / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    check(good)
    chunks = Chunks(Config(data=str(good), text_encoder="builtin", micro_batch=6), Stage(32, 1, 6, False), 0)
    assert rows_of(good) == rows and sorted(chunks[0]["keys"]) == sorted(row["key"] for row in rows)

def test_check_survives_a_shard_whose_offsets_leave_the_file(good, capsys):
    shard, manifest = good / "32/data-00000.arrow", data_prep.read_manifest(good)
    offsets = np.arange(0, 35, 5, dtype=np.int32)  # of the keys 0.jpg to 5.jpg
    damaged = np.where(offsets % 30, 1 << 30, offsets).astype(np.int32)
    shard.write_bytes(shard.read_bytes().replace(offsets.tobytes(), damaged.tobytes()))
    manifest["shards"]["32/data-00000.arrow"] = data_prep.describe_shard(shard, 6)
    (good / "manifest.json").write_text(json.dumps(manifest))
    result = run(good.parent, "data_prep.py", "check", f"--data={good}", "--workers=0")
    assert result.error() and f"{shard}: cannot be read" in result.stdout

# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

ANY = ["build", "--out=out", "--size=32"]
BUILD = [*ANY, "--source=pictures"]

@pytest.mark.parametrize("flags, message", [
    ([], "required"),
    ([*BUILD, "--qualty=90"], "did you mean --quality"),
    ([*BUILD, "--size=32,32"], "such as 512,1024"),
    ([*BUILD, "--quality=101"], "from 1 to 100"),
    ([*BUILD, "--caption_column=label"], "row 0 has .'file_name', 'text'., and not file_name and label"),
    ([*ANY, "--source=nowhere"], "no folder .*nowhere"),
    (["build", "--source=pictures", "--out=a,b", "--size=32"], "separate folders"),
    ([*ANY, "--source=flux_reason"], "LucasFang/FLUX-Reason-6M.*access: https.*--input=DIR"),
    ([*ANY, "--source=flux_reason", "--input=pictures"], r"no fluxdb-\*.parquet in pictures"),
    ([*BUILD, "--input=pictures"], "a folder is its own input"),
    ([*ANY, "--source=blank"], "no captions in .*blank"),
    ([*ANY, "--source=broken"], "cannot read the metadata in .*broken/metadata.jsonl"),
    ([*ANY, "--source=escaping"], "names ../pictures/a.png, which is not in the folder"),
    ([*ANY, "--source=hopeless"], "no image of hopeless is left; dropped: unreadable: 1"),
    (["embed", "--data=nowhere"], "no data at nowhere"),
    (["check", "--data=nowhere"], "no data at nowhere"),
])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, {"a.png": picture(0)})
    line = '{"file_name": "a.png", "text": "x"}\n'
    for name, metadata in [("bare", None), ("broken", line + '{"file_name": "a.png" "text"\n'), ("blank", ""),
                           ("escaping", line.replace("a.png", "../pictures/a.png")), ("hopeless", line)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"no picture")
        if metadata is not None:
            (tmp_path / name / "metadata.jsonl").write_text(metadata)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        data_prep.main(flags)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before

# ---------------------------------------------------------------------------------------------------------------------
# The public sets

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OTHERS = ("original", "entity", "imagination", "text", "style", "affection", "composition")  # FLUX-Reason's captions
FILES = {
    "flux_reason": ["Aesthetics-Part01/fluxdb-000000.parquet", "Imaginative/fluxdb-000001.parquet",
                    "Text/fluxdb-000000.parquet"],
    "flux_generated": [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)],
    "midjourney": [f"train_{i:03d}.parquet" for i in range(3)]}

def row_of(kind: str, i: int, image: bytes | None = None, text: str | None = None) -> dict:
    """Row i of a set; `image` and `text` replace its picture and its caption."""
    image = {"bytes": jpeg(i) if image is None else image, "path": None}
    text = f"A large red circle {i}. In the top left, on the background." if text is None else text
    if kind == "flux_reason":
        others = {f"caption_{name}{end}": f"{name} {i}" for name in OTHERS for end in ("", "_cn")}
        return {"id": f"fluxdb_{i:07d}", "image": image, "caption_detail": text, "score_detail": 7.5, **others}
    if kind == "flux_generated":
        return {"image": image | {"path": f"{i}.jpg"}, "caption_caption": text}
    # a good caption, a refusal and an empty one take turns: gemini, then qwen3, then llava
    gemini, status = [(text, "success"), ("I cannot say", "failed"), ("", "success")][i % 3]
    return {"id": i, "prompt": f"--ar 1:1 secret prompt {i}", "image": image, "llava": f"llava: {text}",
            "llava_status": "success", "gemini": gemini, "gemini_status": status,
            "qwen3": f"qwen3: {text}" if i % 3 == 1 else "", "qwen3_status": "success"}

def write_parquet(file: Path, rows: list[dict], **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    images = pa.array([row["image"] for row in rows], STRUCT)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", images), file, **options)

def make_set(folder: Path, kind: str, rows: int = 20, replaced: dict[int, dict] = {}) -> Path:
    """`rows` rows in each of three files; replaced = {row number: arguments of row_of}."""
    for k, name in enumerate(FILES[kind]):
        numbers = range(k * rows, (k + 1) * rows)
        write_parquet(folder / name, [row_of(kind, i, **replaced.get(i, {})) for i in numbers])
    (folder / "README.md").write_text("a card")
    return folder

@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """All three sets, downloaded (in/) and built (out/), 60 rows each."""
    folder = tmp_path_factory.mktemp("sets")
    for kind in FILES:
        make_set(folder / "in" / kind, kind)
        build_set(kind, folder / "in" / kind, folder / "out" / kind)
    return folder

@pytest.fixture(scope="module")
def embedded(sets, networks) -> Path:
    """The three sets, built and embedded."""
    shutil.copytree(sets / "out", sets / "embedded")
    for kind in FILES:
        data_prep.main(["embed", f"--data={sets / 'embedded' / kind}", f"--encoder={networks / 't5gemma'}"])
        check(sets / "embedded" / kind)
    return sets / "embedded"

@pytest.mark.parametrize("kind", FILES)
def test_rows_are_the_sets_in_file_order_with_the_caption_of_choice(sets, kind):
    rows = rows_of(sets / "out" / kind)
    assert len(rows) == 60 and {row["source"] for row in rows} == {kind}
    for i, row in enumerate(rows):
        text = f"A large red circle {i}. In the top left, on the background."
        prefix = {0: "", 1: "qwen3: ", 2: "llava: "}[i % 3] if kind == "midjourney" else ""
        assert row["caption"] == prefix + text
        assert row["caption_short"] == prefix + f"A large red circle {i}."
        assert row["key"] == {"flux_reason": f"fluxdb_{i:07d}", "midjourney": str(i),
                              "flux_generated": hashlib.sha256(jpeg(i)).hexdigest()[:32]}[kind]
    manifest = read_manifest(sets / "out" / kind)
    assert manifest["source"] == kind and manifest["rows"] == 60 and manifest["dropped"] == {}
    assert manifest["quality"] == 95 and [shard["rows"] for shard in manifest["shards"].values()] == [20] * 6
    assert keys_of(sets / "out" / kind, 64) == [row["key"] for row in rows]
    held_out = [row["caption"] for row in rows if is_held_out(row["key"])]
    assert manifest["prompts"][: len(held_out)] == held_out and len(manifest["prompts"]) == 16

def test_limit_reads_the_first_rows(sets, tmp_path):
    assert build_set("flux_reason", sets / "in/flux_reason", tmp_path / "out", "--limit=25")["rows"] == 25
    assert keys_of(tmp_path / "out") == [f"fluxdb_{i:07d}" for i in range(25)]

def test_any_number_of_workers_writes_the_same_bytes(sets, tmp_path):
    for workers in (0, 1, 3):
        build_set("midjourney", sets / "in/midjourney", tmp_path / str(workers), f"--workers={workers}")
        assert files_of(tmp_path / str(workers)) == files_of(sets / "out/midjourney")

def test_images_that_an_earlier_row_has_are_dropped_and_the_first_stays(tmp_path):
    again = {i: {"image": jpeg(i - 20)} for i in range(20, 40)} | {41: {"image": jpeg(0)}, 43: {"image": jpeg(42)}}
    manifest = build_set("flux_reason", make_set(tmp_path / "in", "flux_reason", replaced=again), tmp_path / "out")
    kept = [i for i in range(60) if i not in again]
    for size in (32, 64):
        assert keys_of(tmp_path / "out", size) == [f"fluxdb_{i:07d}" for i in kept]
    assert manifest["dropped"] == {"duplicate": 22} and manifest["rows"] == 38
    assert [shard["rows"] for shard in manifest["shards"].values()] == [20, 20, 18, 18]  # none of the second
    lines = (tmp_path / "out/dropped.txt").read_text().splitlines()
    assert lines == [f"{FILES['flux_reason'][i // 20]} row {i % 20}: duplicate" for i in again]
    check(tmp_path / "out")

def test_a_file_added_before_a_finished_one_and_a_changed_one_are_read_when_the_build_goes_on(tmp_path):
    source = make_set(tmp_path / "real", "flux_reason", replaced={25: {"image": jpeg(5)}})
    (tmp_path / "in").symlink_to(source)  # links are followed
    last = source / FILES["flux_reason"][2]
    whole = last.read_bytes()
    data = bytearray(whole)
    column = pq.ParquetFile(last).metadata.row_group(0).column(1)  # the images
    data[column.data_page_offset : column.data_page_offset + 30] = bytes(30)
    last.write_bytes(data)
    with pytest.raises(UserError, match="Text/fluxdb-000000.parquet is cut, damaged"):
        build_set("flux_reason", tmp_path / "in", tmp_path / "out", "--workers=0")
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.partial/parts").iterdir())) == 2
    last.write_bytes(whole)
    added = [row_of("flux_reason", i, image=jpeg(3) if i == 900 else None) for i in range(900, 920)]
    write_parquet(source / "Aesthetics-Part00/fluxdb-9.parquet", added)
    write_parquet(source / FILES["flux_reason"][1], [row_of("flux_reason", i) for i in range(21, 40)])
    build_set("flux_reason", tmp_path / "in", tmp_path / "out")
    assert keys_of(tmp_path / "out") == [f"fluxdb_{i:07d}" for i in [*range(900, 920), *range(60)] if i not in (3, 20)]
    check(tmp_path / "out")

FLAGS = ["--text_dim=24", "--text_tokens=256", "--stages=32:25:16:1,64:25:16:0:0.5"]

@pytest.mark.slow
def test_fifty_steps_on_the_three_sets_with_and_without_latents(tmp_path, sets, embedded, networks):
    losses = {}
    for folder in (sets / "out", embedded):
        data = f"--data={folder}/flux_reason,{folder}/flux_generated:10,{folder}/midjourney"
        flags = [*TINY, *FLAGS, data, f"--text_encoder={networks / 't5gemma'}", f"--name={folder.name}"]
        losses[folder.name] = curve(train(tmp_path, *flags))
    online, stored = losses["out"], losses["embedded"]
    assert len(stored) == 50 and all(np.isfinite(list(stored.values())))
    assert max(abs(stored[step] - online[step]) / online[step] for step in stored) < 1e-2  # bf16 latents

# ---------------------------------------------------------------------------------------------------------------------
# Latents

def test_latents_are_the_encoders_unpadded_in_row_order(embedded, networks):
    cfg = Config(text_encoder=str(networks / "t5gemma"), precision="fp32", text_dim=24)
    encode, folder = T5GemmaText(cfg, torch.device("cpu")), embedded / "midjourney/text-t5gemma"
    manifest, rows = read_manifest(embedded / "midjourney"), rows_of(embedded / "midjourney")
    text = manifest["text"]["text-t5gemma"]
    assert (text["encoder"], text["dim"], text["tokens"], text["dtype"]) == (cfg.text_encoder, 24, 256, "bfloat16")
    assert len(text["revision"]) == 64
    prompts = load_file(folder / "prompts.safetensors")
    cases = [(prompts["latents"], prompts["ends"], ["", *manifest["prompts"]])]
    for shard in range(3):
        tensors = load_file(folder / f"data-{shard:05d}.safetensors")
        for kind in ("caption", "caption_short"):
            texts = [row[kind] for row in rows[20 * shard : 20 * shard + 20]]
            cases.append((tensors[kind], tensors[f"{kind}_ends"], texts))
    for latents, ends, texts in cases:
        assert latents.dtype == torch.bfloat16 and len(ends) == len(texts) and ends[-1] == len(latents)
        for prompt, begin, end in zip(texts, [0, *ends.tolist()], ends.tolist()):
            txt, mask = encode([prompt])
            assert end - begin == mask.sum()
            assert torch.allclose(latents[begin:end].float(), txt[mask], atol=0.1)  # of order 1

def test_three_processes_share_the_work_and_write_the_bytes_of_one(sets, networks, embedded, tmp_path):
    shutil.copytree(sets / "out/flux_generated", tmp_path / "out")
    flags = ["embed", "--data=out", f"--encoder={networks / 't5gemma'}"]
    assert start(tmp_path, "data_prep.py", *flags, ranks=3).wait().status == 0
    assert files_of(tmp_path / "out") == files_of(embedded / "flux_generated")
    again = run(tmp_path, "data_prep.py", *flags)
    assert again.status == 0 and files_of(tmp_path / "out") == files_of(embedded / "flux_generated")
    other = run(tmp_path, "data_prep.py", *flags, "--text_tokens=8")
    assert "256 tokens" in other.error() and "delete it" in other.error()
    shutil.rmtree(tmp_path / "out/text-t5gemma")  # as it is told
    assert run(tmp_path, "data_prep.py", *flags, "--text_tokens=8").status == 0
    assert read_manifest(tmp_path / "out")["text"]["text-t5gemma"]["tokens"] == 8
    check(tmp_path / "out")

def test_training_refuses_latents_of_another_encoder_and_damaged_ones(tmp_path, embedded, networks):
    shutil.copytree(embedded / "midjourney", tmp_path / "data")
    (tmp_path / "other").symlink_to(networks / "dinov2")
    flags = [*TINY, *FLAGS, "--data=data", "--max_steps=1", "--name=x", f"--text_encoder={networks / 't5gemma'}"]
    for flag, words in [("--text_encoder=other", "embed --data=data --encoder=other"),
                        ("--text_encoder=google/t5gemma-2b-2b-ul2", f"has text latents by {networks / 't5gemma'}"),
                        ("--text_tokens=64", "--text_tokens=256"), ("--text_dim=32", "--text_dim=24")]:
        assert words in run(tmp_path, "train_prx.py", *flags, flag).error()
    for name in ("32/data-00001.arrow", "text-t5gemma/data-00002.safetensors"):
        whole = bytearray((tmp_path / "data" / name).read_bytes())
        (tmp_path / "data" / name).write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        line = run(tmp_path, "train_prx.py", *flags).error()
        assert f"data/{name} has changed" in line and ("embed --data=data" in line or "build the data again" in line)
        with pytest.raises(UserError, match=r"problem\(s\)"):
            check(tmp_path / "data")
        (tmp_path / "data" / name).write_bytes(whole)
    assert run(tmp_path, "train_prx.py", *flags).status == 0

# ---------------------------------------------------------------------------------------------------------------------
# Kill -9

KILLS = 20

def kill_at_random(cwd: Path, flags: list[str], begin_anew, is_done, is_as_it_should_be) -> None:
    """Start the command and kill it at a random moment until that has happened KILLS times.

    Each time that its work is done in spite of that, the result is looked at, and it all begins anew. It is done also
    where a kill came after the result was in its place: no command makes it again.
    """
    rng, died, seconds = random.Random(0), 0, 0.0
    begin_anew()
    while died < KILLS or not is_done():
        if is_done():
            is_as_it_should_be()
            begin_anew()
        running, begun = start(cwd, "data_prep.py", *flags), time.monotonic()
        if died < KILLS and seconds:
            time.sleep(rng.uniform(0.1, 1) * seconds)
            died += running.alive()
            running.kill(signal.SIGKILL)
        else:
            assert running.wait().status == 0
        seconds = seconds or time.monotonic() - begun  # of an undisturbed run
    is_as_it_should_be()

@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "embed"])
def test_kill_9_changes_nothing(tmp_path, networks, command):
    for k in range(10):
        numbers = [i if i % 7 else 0 for i in range(40 * k, 40 * k + 40)]  # many are the same picture
        rows = [row_of("flux_generated", i, image=jpeg(i, 256)) for i in numbers]
        write_parquet(tmp_path / f"in/data/train-{k:05d}-of-00010.parquet", rows)
    flags = ["build", "--source=flux_generated", "--input=in", "--size=64,32", "--format=png", "--workers=2"]
    assert run(tmp_path, "data_prep.py", *flags, "--out=whole").status == 0
    assert read_manifest(tmp_path / "whole")["dropped"]["duplicate"] > 50
    killed, done, flags = tmp_path / "killed", tmp_path / "killed", [*flags, "--out=killed"]
    if command == "embed":
        shutil.copytree(tmp_path / "whole", tmp_path / "built")
        flags, done = ["embed", f"--encoder={networks / 't5gemma'}", "--data=killed"], killed / "text-t5gemma"
        assert run(tmp_path, "data_prep.py", *flags, "--data=whole").status == 0

    def begin_anew() -> None:
        shutil.rmtree(killed, ignore_errors=True)
        if command == "embed":
            shutil.copytree(tmp_path / "built", killed)

    def compare() -> None:
        if command == "embed":  # removes what a kill has left
            assert run(tmp_path, "data_prep.py", *flags).status == 0
        assert files_of(killed) == files_of(tmp_path / "whole")
        assert not list(tmp_path.glob("killed.*"))

    kill_at_random(tmp_path, flags, begin_anew, done.exists, compare)

def test_workers_die_with_the_command(tmp_path):
    make_set(tmp_path / "in", "midjourney", rows=400)
    running = start(tmp_path, "data_prep.py", "build", "--source=midjourney", "--input=in", "--out=out", "--size=64",
                    "--workers=2")
    group = running.processes[0].pid  # each command leads a process group, and its workers are in it

    def members() -> list[str]:
        files = (path for path in Path("/proc").glob("[0-9]*/stat") if path.exists())
        stats = (path.read_text().rpartition(")")[2].split() for path in files)
        return [fields[0] for fields in stats if int(fields[2]) == group and fields[0] != "Z"]

    wait_for(lambda: len(members()) == 3 or not running.alive())
    assert running.alive()
    running.kill(signal.SIGKILL)
    wait_for(lambda: not members())

# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong with files

def test_more_than_one_percent_of_a_file_unusable_is_an_error(tmp_path):
    kind, name = "flux_generated", FILES["flux_generated"][1]
    broken = {100 + i: {"image": b"html"} for i in range(2)}
    one = make_set(tmp_path / "one", kind, 100, {100: broken[100], 7: {"text": "a" * 1_000_000}})
    two = make_set(tmp_path / "two", kind, 100, broken)
    assert build_set(kind, one, tmp_path / "out")["dropped"] == {"caption too long": 1, "unreadable": 1}
    with pytest.raises(UserError, match=rf"{name}: 2 of 100 .*first is {name} row 0: unreadable.*--max_unusable"):
        build_set(kind, two, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # the flag is a setting of the build, so it starts another
    assert build_set(kind, two, tmp_path / "more", "--max_unusable=0.02")["dropped"] == {"unreadable": 2}

@pytest.mark.parametrize("damage", ["cut in half", "empty", "no parquet", "without a column", "lists", "bare images"])
def test_a_damaged_parquet_file_is_named_and_nothing_is_written(tmp_path, damage):
    source = make_set(tmp_path / "in", "midjourney")
    file, words = source / "train_001.parquet", "download it again"
    whole, table = file.read_bytes(), pq.read_table(file)
    if damage in ("without a column", "lists", "bare images"):
        name, values = ("image", [b"x"] * 20) if damage == "bare images" else ("gemini", [["a"]] * 20)
        table = table.drop_columns([name])
        pq.write_table(table if damage == "without a column" else table.append_column(name, pa.array(values)), file)
        words = f"has no column {name} of the right kind"
    else:
        file.write_bytes({"cut in half": whole[: len(whole) // 2], "empty": b"", "no parquet": b"<html>" * 100}[damage])
    with pytest.raises(UserError, match=f"train_001.parquet.*{words}"):
        build_set("midjourney", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    file.write_bytes(whole)
    assert build_set("midjourney", source, tmp_path / "out")["rows"] == 60

def test_two_builds_into_one_folder_are_one_build_and_one_line(tmp_path):
    make_set(tmp_path / "in", "midjourney", rows=300)
    flags = ["build", "--source=midjourney", "--input=in", "--out=out", "--size=64,32", "--workers=1"]
    both = [start(tmp_path, "data_prep.py", *flags) for _ in range(2)]
    whole, late = sorted((running.wait() for running in both), key=lambda result: result.status)
    assert whole.status == 0 and re.search("another process is writing out|exists", late.error())
    check(tmp_path / "out")

# ---------------------------------------------------------------------------------------------------------------------
# The hub, played by a server of ours that answers as it does

class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for when it looks up a data set and reads its files."""

    COMMIT, REPO = "0123456789abcdef0123456789abcdef01234567", "datasets/lehduong/flux_generated"
    root, asked = Path(), []

    def answer(self, status: int, body: bytes | list | dict, **headers) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        files = {str(path.relative_to(self.root)): path for path in self.root.rglob("*.*") if path.is_file()}
        if self.path in (f"/api/{self.REPO}{end}" for end in ("", "/revision/v1", f"/revision/{self.COMMIT}")):
            return self.answer(200, {"id": "lehduong/flux_generated", "sha": self.COMMIT,
                                     "siblings": [{"rfilename": name} for name in files]})
        if self.path.startswith(f"/api/{self.REPO}/tree/{self.COMMIT}/data"):
            return self.answer(200, [{"type": "file", "path": name, "size": path.stat().st_size, "oid": "0"}
                                     for name, path in files.items() if name.startswith("data/")])
        if self.path.startswith(f"/{self.REPO}/resolve/{self.COMMIT}/"):
            data = files[self.path.partition(f"{self.COMMIT}/")[2]].read_bytes()
            begin, end = map(int, (self.headers.get("Range") or f"bytes=0-{len(data) - 1}")[6:].split("-"))
            return self.answer(206, data[begin : end + 1], Content_Range=f"bytes {begin}-{end}/{len(data)}",
                               X_Repo_Commit=self.COMMIT, ETag='"0"', Accept_Ranges="bytes")
        self.answer(404, {}, X_Error_Code="RevisionNotFound" if "revision" in self.path else "EntryNotFound")

    do_HEAD = do_GET

@pytest.mark.slow
def test_a_set_is_read_from_the_hub_at_one_commit(tmp_path, sets, monkeypatch):
    monkeypatch.setattr(Hub, "root", sets / "in/flux_generated")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def build_from_hub(*flags: str) -> subprocess.CompletedProcess:
        """In a Python of its own: huggingface_hub reads its environment when it is imported."""
        command = [sys.executable, ROOT / "data_prep.py", "build", "--source=flux_generated", "--size=32,64", *flags]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True,
                              timeout=patience())

    assert build_from_hub("--out=out", "--revision=v1").returncode == 0
    assert read_manifest(tmp_path / "out")["revision"] == Hub.COMMIT
    assert rows_of(tmp_path / "out") == rows_of(sets / "out/flux_generated")
    assert all("/revision/v1" in path or Hub.COMMIT in path for path in Hub.asked if "flux_gen" in path), Hub.asked
    assert not any("README" in path for path in Hub.asked), "only what is needed is read"
    Hub.asked.clear()
    assert build_from_hub("--out=few", "--limit=30").returncode == 0
    assert len(rows_of(tmp_path / "few")) == 30 and not any("train-00002" in path for path in Hub.asked)
    result = build_from_hub("--out=none", "--revision=v9")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot get lehduong/flux_generated from the hub" in result.stderr.strip().splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {"out", "few"}
    server.shutdown()

def test_a_fourth_set_is_one_entry(tmp_path, monkeypatch):
    entry = data_prep.HubSet("me/my_set", "train-*.parquet", 8, captions=("long", "short"), key="id")
    monkeypatch.setitem(data_prep.SETS, "my_set", entry)
    rows = [{"id": f"r{i}", "image": {"bytes": jpeg(i), "path": None}, "long": "" if i % 2 else f"A long {i}.",
             "short": f"short {i}"} for i in range(8)]
    write_parquet(tmp_path / "in/more/train-0.parquet", rows)
    build_set("my_set", tmp_path / "in", tmp_path / "out")
    assert [(row["key"], row["caption"], row["source"]) for row in rows_of(tmp_path / "out")] == [
        (f"r{i}", f"short {i}" if i % 2 else f"A long {i}.", "my_set") for i in range(8)]
