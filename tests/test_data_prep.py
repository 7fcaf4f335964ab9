"""data_prep.py: folders of pictures become shards that hold what Pillow would give, and only complete shards count.

    pytest tests/test_data_prep.py
"""
import csv
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import patience
from datasets import Value, load_from_disk
from filelock import FileLock
from PIL import Image, ImageOps, JpegImagePlugin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_prep  # noqa: E402
from shards import UserError, is_held_out  # noqa: E402

pytestmark = pytest.mark.machinery


def picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A smooth random colour picture, so that JPEG and resizing are kind to it."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def folder_of(tmp_path: Path, names: dict[str, Image.Image | bytes], captions: dict[str, str] | None = None) -> Path:
    """A folder `pictures` with the given files and a metadata.csv that captions them."""
    folder = tmp_path / "pictures"
    for name, content in names.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content) if isinstance(content, bytes) else content.save(file)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([name, (captions or {}).get(name, f"this is {name}")] for name in names)
    return folder


def build(source: Path, out: Path, *flags: str) -> dict:
    data_prep.main(["build", f"--source={source}", f"--out={out}", *(flags or ("--size=32",))])
    return data_prep.read_manifest(out)


def rows_of(out: Path, size: int) -> list[dict]:
    return load_from_disk(str(out / str(size))).to_list()


def pixels(image: bytes | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image, np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


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
            writer = csv.DictWriter(file, ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(table)
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(table), folder / "metadata.parquet")
    else:
        for row in table:
            (folder / row["file_name"]).with_suffix(".txt").write_text(row["caption"] + "\n", "utf-8")
    manifest = build(folder, tmp_path / "out", "--size=64", "--format=png")
    rows = rows_of(tmp_path / "out", 64)
    assert [(row["key"], row["caption"], row["source"]) for row in rows] == \
        [(row["file_name"], row["caption"], "pictures") for row in table]
    for seed, row in enumerate(rows):
        stored = Image.open(folder / table[seed]["file_name"]).convert("RGB")
        expected = ImageOps.fit(stored, (64, 64), Image.Resampling.BICUBIC)
        assert np.abs(pixels(row["image"]) - pixels(expected)).max() <= 2
    assert manifest["rows"] == 3 and manifest["sizes"] == [64] and manifest["dropped"] == {}
    assert manifest["prompts"] == [row["caption"] for row in table]


def test_photographs_come_out_as_pillow_scales_them(tmp_path):
    bundled = Path(pytest.importorskip("skimage").__file__).parent / "data"
    names = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg",
             "ihc.png", "motorcycle_left.png", "camera.png", "coins.png", "moon.png", "brick.png"]
    names = [name for name in names if (bundled / name).exists()]
    assert len(names) >= 8
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
            assert psnr(pixels(row["image"]), expected) > 34, row["key"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = picture(0, 640, 480)
    undo = {2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
            5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
            8: [Image.Transpose.ROTATE_270]}
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = data_prep.decode_rgb(encoded(stored, "JPEG", quality=98, exif=exif), 64, 0.5)
    square = data_prep.crop_and_encode(image, 64, "png", 95)
    expected = ImageOps.fit(upright, (64, 64), Image.Resampling.BICUBIC)
    assert psnr(pixels(square), pixels(expected)) > 34
    assert not Image.open(io.BytesIO(square)).getexif()  # a viewer that reads EXIF would turn it once more


def test_transparent_pixels_become_white():
    half = np.zeros((64, 64, 4), np.uint8)
    half[..., 0] = 255
    half[:, 32:, 3] = 255  # left half transparent, right half red
    rgba = Image.fromarray(half)
    grey = Image.fromarray(np.stack([half[..., 1], half[..., 3]], -1), "LA")  # right half black
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    for data, right in [(encoded(rgba, "PNG"), (255, 0, 0)), (encoded(rgba, "WEBP", lossless=True), (255, 0, 0)),
                        (encoded(grey, "PNG"), (0, 0, 0))]:
        got = pixels(data_prep.decode_rgb(data, 64, 0.5))
        assert (got[:, :32] == 255).all() and (got[:, 32:] == right).all()
    got = pixels(data_prep.decode_rgb(encoded(palette, "PNG", transparency=1), 64, 0.5))
    assert (got[0, 0] == 255).all() and (got[1:] == (255, 0, 0)).all()


def test_every_kind_of_pixel_becomes_eight_bit_rgb():
    rgb = picture(1, 64, 64)
    grey = np.asarray(rgb.convert("L"))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    cases = {
        "16-bit PNG": (encoded(sixteen, "PNG"), np.repeat(grey[..., None], 3, -1), 1e9),
        "16-bit TIFF": (encoded(sixteen, "TIFF"), np.repeat(grey[..., None], 3, -1), 1e9),
        "grey JPEG": (encoded(rgb.convert("L"), "JPEG", quality=98), np.repeat(grey[..., None], 3, -1), 38),
        "palette PNG": (encoded(rgb.quantize(256), "PNG"), pixels(rgb), 25),
        "CMYK JPEG": (encoded(rgb.convert("CMYK"), "JPEG", quality=98), pixels(rgb), 34),
        "one-bit PNG": (encoded(rgb.convert("1"), "PNG"), pixels(rgb.convert("1").convert("RGB")), 1e9),
        "animated GIF": (encoded(rgb, "GIF", save_all=True, append_images=[picture(2, 64, 64)]), pixels(rgb), 20),
    }
    for name, (data, expected, bound) in cases.items():
        got = data_prep.decode_rgb(data, 64, 0.5)
        assert got.mode == "RGB", name
        assert psnr(pixels(got), expected) > min(bound, 130), name


def test_source_metadata_is_not_stored(tmp_path):
    data = encoded(picture(0), "JPEG", comment=b"secret", icc_profile=b"secret" * 100)
    for file_format in ("jpeg", "png"):
        assert b"secret" not in data_prep.crop_and_encode(data_prep.decode_rgb(data, 32, 0.5), 32, file_format, 95)


def test_bad_images_are_dropped_and_counted_by_reason(tmp_path, capsys):
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
    assert "2 of 11 images" in capsys.readouterr().out
    assert build(folder, tmp_path / "strict", "--size=16,32", "--min_scale=1")["dropped"]["too small"] == 2


def test_short_captions_are_the_column_or_the_first_sentence(tmp_path):
    folder = folder_of(tmp_path, {"a.png": picture(0), "b.png": picture(1)})
    long = "A cat vs. a dog.  It is\nnight! Nobody is there."
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": long, "caption_short": "a cat"}) + "\n"
                                           + json.dumps({"file_name": "b.png", "text": long, "caption_short": None}) + "\n")
    build(folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out", 32)
    assert [row["caption_short"] for row in rows] == ["a cat", "A cat vs. a dog."]
    assert rows[0]["caption"] == "A cat vs. a dog. It is night! Nobody is there."


def test_a_lack_of_memory_is_not_counted_as_a_bad_image(monkeypatch):
    def no_room(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", no_room)
    with pytest.raises(MemoryError):
        data_prep.decode_rgb(encoded(picture(0), "JPEG"), 32, 0.5)
    monkeypatch.setattr(Image, "open", no_room)
    with pytest.raises(MemoryError):
        data_prep.decode_rgb(b"", 32, 0.5)


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
    assert {row["key"]: row["caption"] for row in rows_of(tmp_path / "out", 32)} == {
        "a.png": "a dog by the sea", "\ufffd.png": "a cat", "ü ,:.png": "Größe"}


def test_held_out_captions_come_first_among_the_prompts(tmp_path):
    held_out = next(f"{i}.png" for i in range(10_000) if is_held_out(f"{i}.png"))
    names = [f"x{i}.png" for i in range(20)]
    names = [name for name in names if not is_held_out(name)] + [held_out]
    manifest = build(folder_of(tmp_path, {name: picture(i) for i, name in enumerate(names)}), tmp_path / "out")
    assert manifest["prompts"] == [f"this is {name}" for name in [held_out, *names[:15]]]


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_datasets_opens_the_exact_columns_in_one_order_for_all_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "ROWS_A_PART", 8)
    monkeypatch.setattr(data_prep, "BATCH_BYTES", 5_000)
    names = [f"{i * 7 % 30:02d}.jpg" for i in range(30)]
    folder = folder_of(tmp_path, {name: picture(i) for i, name in enumerate(names)})
    manifest = build(folder, tmp_path / "out", "--size=64,16")
    for size in (16, 64):
        data = load_from_disk(str(tmp_path / "out" / str(size)))
        assert data.features == {
            "key": Value("string"), "image": Value("binary"), "height": Value("int32"), "width": Value("int32"),
            "caption": Value("string"), "caption_short": Value("string"), "source": Value("string")}
        assert data.cache_files  # memory-mapped from the shards themselves
        assert [row["key"] for row in data] == names
        assert {(row["height"], row["width"]) for row in data} == {(size, size)}
        assert data[29]["key"] == names[29]
    assert [shard["rows"] for name, shard in manifest["shards"].items() if name.startswith("64/")] == [8, 8, 8, 6]
    data_prep.main(["check", f"--data={tmp_path / 'out'}"])


def test_two_builds_are_equal_byte_for_byte(tmp_path):
    folder = folder_of(tmp_path, {f"{i}.jpg": picture(i) for i in range(5)})
    build(folder, tmp_path / "one", "--size=32,64")
    build(folder, tmp_path / "two", "--size=32,64")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def write(out: Path, rows) -> dict:
    """`rows` as a data set of one part at 32 px."""
    parts = lambda finished: iter([data_prep.Part("all", "", 0, ())])
    return data_prep.write_dataset(out, parts, lambda part, dropped: rows, settings={"source": "s", "revision": "r", "sizes": [32]})


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "BATCH_BYTES", 4 << 20)
    image, in_use = os.urandom(1 << 20), []

    def rows():
        for i in range(120):
            in_use.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
            yield {"key": str(i), "images": {32: image}, "caption": "c", "caption_short": "c", "source": "s",
                   "digest": i.to_bytes(16, "big")}

    write(tmp_path / "out", rows())
    assert max(in_use) - in_use[10] < 40 << 20


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    folder = folder_of(tmp_path, {"a.png": picture(0)})
    build(folder, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match="exists and is never overwritten.*--out"):
        build(folder, tmp_path / "out", "--size=64")
    assert files_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]


def test_two_processes_cannot_write_one_folder(tmp_path):
    folder = folder_of(tmp_path, {"a.png": picture(0)})
    with FileLock(tmp_path / "out.lock"), pytest.raises(UserError, match="another process is writing"):
        build(folder, tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path):
    def noise(seed: int) -> Image.Image:  # which does not compress
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))

    folder = folder_of(tmp_path, {f"{i:02d}.png": noise(i) if i > 8 else picture(i) for i in range(12)})
    command = [sys.executable, "-c", "import data_prep; data_prep.ROWS_A_PART = 3; data_prep.run_main(data_prep.main)", "build",
               f"--source={folder}", f"--out={tmp_path / 'out'}", "--format=png", "--size=64", "--workers=1"]
    room = 2 * len(encoded(noise(0), "PNG"))
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(),
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    last = full.stderr.strip().splitlines()[-1]
    assert full.returncode == 2 and "Traceback" not in full.stderr, full
    assert last.startswith("error: cannot write") and "the same command continues" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "pictures"]
    assert len(list((tmp_path / "out.partial/parts").glob("[0-9]*"))) == 3
    assert subprocess.run(command, cwd=ROOT, timeout=patience()).returncode == 0
    assert len(rows_of(tmp_path / "out", 64)) == 12


# ---------------------------------------------------------------------------------------------------------------------
# check


@pytest.fixture
def good(tmp_path) -> Path:
    build(folder_of(tmp_path, {f"{i}.jpg": picture(i) for i in range(6)}), tmp_path / "good", "--size=32,64")
    return tmp_path / "good"


def problems(data: Path) -> list[str]:
    return list(data_prep.find_problems(data, data_prep.read_manifest(data)))


def test_check_is_content_with_good_data(good, capsys):
    data_prep.main(["check", f"--data={good}"])
    assert "OK, 6 rows at 32, 64 px" in capsys.readouterr().out


def test_check_notices_a_flipped_byte_anywhere(good):
    shard = good / "32" / "data-00000.arrow"
    original = shard.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(original), 40):
        damaged = bytearray(original)
        damaged[position] ^= 0xFF
        shard.write_bytes(damaged)
        assert problems(good)[0] == f"{shard}: changed, its sha256 is not the manifest's"


def test_check_notices_a_missing_and_a_cut_shard(good):
    shard = good / "64" / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-4000])
    assert any("cannot be read" in line or "rows, the manifest says" in line for line in problems(good))
    shard.unlink()
    found = problems(good)
    assert found[0] == f"{shard}: missing" and not any(str(good / "32") in line for line in found)


def test_check_notices_a_wrong_row_count(good, capsys):
    manifest = data_prep.read_manifest(good)
    manifest["rows"] = 7
    (good / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"2 problem\(s\)"):
        data_prep.main(["check", f"--data={good}"])
    assert f"{good / '32'}: 6 rows, the manifest says 7" in capsys.readouterr().out


def test_check_names_the_row_of_a_bad_image_and_caption(tmp_path):
    def row(i, image, caption="a cat"):
        return {"key": str(i), "images": {32: image}, "caption": caption, "caption_short": caption, "source": "s",
                "digest": i.to_bytes(16, "big")}

    rows = [row(0, encoded(picture(0, 32, 32), "PNG")), row(1, b"no picture"),
            row(2, encoded(picture(0, 32, 48), "PNG")), row(3, encoded(picture(0, 32, 32), "PNG"), "")]
    write(tmp_path / "out", rows)
    shard = tmp_path / "out" / "32" / "data-00000.arrow"
    assert problems(tmp_path / "out") == [
        f"{shard} row 1: image does not decode",
        f"{shard} row 2: image is 32 x 48, its columns say 32 x 32, its folder 32",
        f"{shard} row 3: empty caption"]


def test_check_notices_sizes_that_hold_other_rows(good, tmp_path):
    other = tmp_path / "other"
    build(folder_of(tmp_path / "o", {f"{i}.jpg": picture(i) for i in (1, 0, 2, 3, 4, 5)}), other, "--size=32,64")
    manifest, wrong = data_prep.read_manifest(good), data_prep.read_manifest(other)
    (good / "64" / "data-00000.arrow").write_bytes((other / "64" / "data-00000.arrow").read_bytes())
    manifest["shards"]["64/data-00000.arrow"] = wrong["shards"]["64/data-00000.arrow"]
    (good / "manifest.json").write_text(json.dumps(manifest))
    assert problems(good) == [f"{good}: the sizes do not hold the same rows in the same order"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("flags, message", [
    ([], "required"),
    (["bild"], "bild"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--qualty=90"], "did you mean --quality"),
    (["build", "--source=pictures", "--out=out"], "--size"),
    (["build", "--source=pictures", "--out=out", "--size=big"], "such as 512,1024"),
    (["build", "--source=pictures", "--out=out", "--size=32,32"], "such as 512,1024"),
    (["build", "--source=pictures", "--out=out", "--size=0"], "such as 512,1024"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--quality=101"], "from 1 to 100"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--format=gif"], "png"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--caption_column=label"], "label.*it has image, text"),
    (["build", "--source=nowhere", "--out=out", "--size=32"], "no folder nowhere"),
    (["build", "--source=", "--out=out", "--size=32"], "no folder"),
    (["build", "--source=pictures", "--out=a,b", "--size=32"], "separates folders"),
    (["embed", "--data=nowhere"], "no data at nowhere"),
    (["build", "--source=flux_reason", "--out=out", "--size=32"], "LucasFang/FLUX-Reason-6M.*access: https.*--input=DIR"),
    (["build", "--source=flux_reason", "--out=out", "--size=32", "--input=nowhere"], "no folder nowhere"),
    (["build", "--source=flux_reason", "--out=out", "--size=32", "--input=pictures"], r"no fluxdb-\*.parquet in pictures"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--input=pictures"], "a folder is its own input"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--limit=-1"], "at least 0"),
    (["build", "--source=pictures", "--out=out", "--size=32", "--max_unusable=2"], "from 0 to 1"),
    (["build", "--source=blank", "--out=out", "--size=32"], "metadata.jsonl is empty"),
    (["build", "--source=bare", "--out=out", "--size=32"], "metadata.csv"),
    (["build", "--source=broken", "--out=out", "--size=32"], "cannot read the metadata"),
    (["build", "--source=escaping", "--out=out", "--size=32"], "cannot read the metadata"),
    (["build", "--source=hopeless", "--out=out", "--size=32"], "no image of hopeless is left; dropped: unreadable: 1"),
    (["check", "--data=nowhere"], "no data at nowhere"),
])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, {"a.png": picture(0)})
    for name, metadata in [("bare", None),
                           ("broken", '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png" "text"\n'),
                           ("escaping", '{"file_name": "../pictures/a.png", "text": "x"}\n'),
                           ("blank", ""), ("hopeless", '{"file_name": "a.png", "text": "x"}\n')]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"no picture")
        if metadata is not None:
            (tmp_path / name / "metadata.jsonl").write_text(metadata)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        data_prep.main(flags)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
