"""Pictures with captions -> checked shards that train_prx.py reads.

    python data_prep.py build --source=DIR --out=data/X --size=512,1024
    python data_prep.py check --data=data/X

DIR is what the `imagefolder` loader of datasets takes: metadata.csv, .jsonl or .parquet with the columns `file_name`
and a caption (`text`, `caption` or `prompt`), or, without metadata, name.txt beside name.jpg. data/X/<size>/ holds the
rows for each size as Arrow shards (`datasets.load_from_disk` opens them), data/X/manifest.json what they are made of.
"""
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo, Features, Image as ImageColumn, Value, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from tqdm import tqdm

from train_prx import Parser, UserError, is_held_out, read_manifest, run_main


# ---------------------------------------------------------------------------------------------------------------------
# Shards: what train_prx.py reads

COLUMNS = Features({
    "key": Value("string"), "image": Value("binary"), "height": Value("int32"), "width": Value("int32"),
    "caption": Value("string"), "caption_short": Value("string"), "source": Value("string"),
})
SHARD_BYTES = 1 << 30  # a shard is closed once it holds this much: few enough files, each soon checked or copied
BATCH_BYTES = 16 << 20  # rows held back before they are written: all the memory a size needs, however many rows come


class ShardWriter:
    """Writes the rows of one size to Arrow files in `folder`, which `datasets.load_from_disk` opens memory-mapped."""

    def __init__(self, folder: Path):
        self.folder, self.shards, self.writer = folder, {}, None
        folder.mkdir()

    def add(self, row: dict) -> None:
        if self.writer is None:
            self.name, self.rows, self.bytes = f"data-{len(self.shards):05d}.arrow", 0, 0
            self.batch, self.batch_bytes = [], 0
            self.writer = pa.ipc.new_stream(str(self.folder / self.name), COLUMNS.arrow_schema)
        self.batch.append(row)
        self.rows += 1
        self.bytes += len(row["image"])
        self.batch_bytes += len(row["image"])
        if self.batch_bytes >= BATCH_BYTES or len(self.batch) == 1000:
            self._flush()
        if self.bytes >= SHARD_BYTES:
            self._end_shard()

    def _flush(self) -> None:
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.batch, schema=COLUMNS.arrow_schema))
        self.batch, self.batch_bytes = [], 0

    def _end_shard(self) -> None:
        if self.batch:
            self._flush()
        self.writer.close()
        self.writer = None
        self.shards[self.name] = {"sha256": file_sha256(self.folder / self.name), "rows": self.rows}

    def close(self) -> dict[str, dict]:
        """Write what is held and the two files that make this a `datasets` folder; return {shard: sha256 and rows}."""
        if self.writer is not None:
            self._end_shard()
        DatasetInfo(features=COLUMNS).write_to_directory(str(self.folder))
        # the fingerprint keys datasets' caches: made from the contents, so equal data has equal caches and equal bytes
        write_json(self.folder / "state.json", {
            "_data_files": [{"filename": name} for name in self.shards],
            "_fingerprint": hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()[:16],
            "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
            "_split": None,
        })
        return self.shards


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `out` when the block ends well, so that `out` is never there half-written.

    Raises UserError if `out` exists, if another process is writing it, or if it cannot be written (a full disk).
    """
    partial, lock = Path(f"{out}.partial"), Path(f"{out}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                if out.exists():
                    raise UserError(f"{out} exists and is never overwritten: name another folder with --out, or delete it")
                if partial.exists():
                    print(f"replacing {partial}, left by a run that did not end")
                    shutil.rmtree(partial)
                partial.mkdir()
                try:
                    yield partial
                except Exception:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                os.rename(partial, out)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is writing {out}: wait for it, or name another folder with --out") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def write_dataset(out: Path, rows: Iterable[dict], sizes: list[int], *, source: str, revision: str, prompts: list[str],
                  dropped: dict[str, int] | None = None, total: int | None = None) -> None:
    """Write `rows` to `out`: a folder of shards for each size (px), the same rows in the same order, and manifest.json.

    A row is {"key", "images": {size: JPEG or PNG bytes of size x size}, "caption", "caption_short", "source"}.
    `prompts` are the captions of the sample grids. `prompts` and `dropped` (rows left out, by reason) may be filled
    while `rows` is consumed. `total` is the expected number of rows, for the progress bar. Raises UserError
    as `written_aside` does, and if no row comes.
    """
    with written_aside(Path(out)) as folder:
        writers = {size: ShardWriter(folder / str(size)) for size in sizes}
        count = 0
        for row in tqdm(rows, desc=str(out), total=total, unit=" images"):
            for size, writer in writers.items():
                writer.add({"image": row["images"][size], "height": size, "width": size} |
                           {name: row[name] for name in ("key", "caption", "caption_short", "source")})
            count += 1
        if not count:
            raise UserError(f"no image of {source} is left; dropped: {describe(dropped)}")
        shards = {f"{size}/{name}": shard for size, writer in writers.items() for name, shard in writer.close().items()}
        write_json(folder / "manifest.json", {
            "source": source, "revision": revision, "sizes": list(sizes), "rows": count,
            "shards": shards, "dropped": dict(dropped or {}), "prompts": list(prompts),
        })


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def describe(dropped: dict[str, int] | None) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in (dropped or {}).items() if count) or "nothing"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: any image file -> squares


class Drop(Exception):
    """An image that is left out; the text is the reason under which it is counted."""


def decode_rgb(data: bytes, size: int, min_scale: float) -> Image.Image:
    """Decode an image file to upright 8-bit RGB on white, to be scaled down to `size` px or less.

    Raises Drop if it is damaged, if it has more than 89 Mpx, or if its short side is below min_scale * size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # an error by itself only at twice that
            image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Drop("too large") from None
    except Exception:  # Pillow's readers raise almost anything on damaged files
        raise Drop("unreadable") from None
    if min(image.size) < min_scale * size:
        raise Drop("too small")
    try:
        # a JPEG far too large is decoded at 1/2, 1/4 or 1/8, to no less than twice `size`: Lanczos still decides the rest
        image.draft(None, (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed white")
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255: a white picture
            image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception:
        raise Drop("unreadable") from None


def crop_and_encode(image: Image.Image, size: int, file_format: str, quality: int) -> bytes:
    """The centre square of `image`, resized with antialiasing to size x size px, as a JPEG or PNG file."""
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) / 2, (height - side) / 2
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    image.info = {}  # else the colour profile and comments of the source are written into every row
    buffer = io.BytesIO()
    if file_format == "jpeg":
        # 4:4:4: the model is trained on pixels, and half-resolution colour would teach it blurred colour edges
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Build: a folder of captioned pictures -> rows

HUB_SOURCES = ("flux_generated", "flux_reason", "midjourney")
PROMPTS = 16  # captions for the sample grids, held-out ones first


def folder_rows(folder: Path, caption_columns: list[str]) -> Iterator[tuple[Path | None, str, str]]:
    """Yield (file, caption, short caption) in the order of the metadata, or of the file names where there is none.

    The file is None where the metadata names none; captions may be empty. Raises UserError for unusable metadata.
    """
    metadata = sorted(path for path in folder.rglob("metadata.*") if path.suffix in (".csv", ".jsonl", ".parquet"))
    if not metadata:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ImageFolder.EXTENSIONS)
        if not any(path.with_suffix(".txt").exists() for path in files):
            raise UserError(f"no captioned pictures in {folder}: it needs metadata.csv or metadata.jsonl with the columns "
                            "file_name and text, or name.txt beside name.jpg")
        for path in files:
            text = path.with_suffix(".txt")
            yield path, text.read_text("utf-8", "replace") if text.exists() else "", ""
        return
    try:
        files = [escape(str(path)) for path in metadata]
        table = load_dataset("imagefolder", data_files=files, split="train", streaming=True)
        column = next((name for name in caption_columns if name in table.features), None)
        if "image" not in table.features or column is None:
            raise UserError(f"{metadata[0]} needs the columns file_name and {' or '.join(caption_columns)} "
                            f"(--caption_column names another); it has {', '.join(table.features)}")
        # not decoded by datasets: there the first bad image would end the iteration for good
        for row in table.cast_column("image", ImageColumn(decode=False)):
            yield row["image"] and Path(row["image"]["path"]), row[column] or "", row.get("caption_short") or ""
    except UserError:
        raise
    except Exception as error:  # the loader's: broken CSV or JSON, columns that differ, a path that leaves the folder
        raise UserError(f"cannot read the metadata in {folder}: {first_line(error)}") from error


def first_sentence(caption: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[^a-z])", caption, maxsplit=1)[0]  # "vs. a", "e.g. one" do not end a sentence


def build_rows(args, folder: Path, dropped: Counter, prompts: list[str]) -> Iterator[dict]:
    """Yield the rows of `folder` for `write_dataset`; count what is left out in `dropped`, fill `prompts` at the end."""
    seen, held_out, first = set(), [], []  # seen: 16 bytes an image, all that grows with the rows
    for file, caption, caption_short in folder_rows(folder, args.caption_column.split(",")):
        caption, caption_short = (" ".join(str(text).split()) for text in (caption, caption_short))
        try:
            if not caption:
                raise Drop("empty caption")
            if file is None or not file.is_file():
                raise Drop("missing file")
            data = file.read_bytes()
            digest = hashlib.sha256(data).digest()[:16]
            if digest in seen:
                raise Drop("duplicate")
            image = decode_rgb(data, max(args.size), args.min_scale)
        except Drop as drop:
            dropped[str(drop)] += 1
            continue
        seen.add(digest)
        key = os.path.relpath(file, folder)
        images = {size: crop_and_encode(image, size, args.format, args.quality) for size in args.size}
        captions = held_out if is_held_out(key) else first
        if len(captions) < PROMPTS:
            captions.append(caption)
        yield {"key": key, "images": images, "caption": caption,
               "caption_short": caption_short or first_sentence(caption), "source": folder.name}
    prompts += (held_out + first)[:PROMPTS]


def build(args) -> None:
    if args.source in HUB_SOURCES:
        raise UserError(f"--source={args.source}: the hub's sets cannot be built yet; what works now is --source=DIR, "
                        "a folder of your own pictures with captions")
    folder = Path(args.source).resolve()
    if not folder.is_dir():
        raise UserError(f"no folder {args.source}: --source takes a folder of pictures with captions")
    # counted first, so that a broken line of metadata shows now and not hours into the build
    total = sum(1 for _ in folder_rows(folder, args.caption_column.split(",")))
    dropped, prompts = Counter(), []
    write_dataset(args.out, build_rows(args, folder, dropped, prompts), args.size, source=folder.name,
                  revision=f"folder, {args.format}" + (f" quality {args.quality}" if args.format == "jpeg" else ""),
                  prompts=prompts, dropped=dropped, total=total)
    print(f"{args.out}: {total - dropped.total()} of {total} images at {', '.join(map(str, args.size))} px; "
          f"dropped: {describe(dropped)}")


# ---------------------------------------------------------------------------------------------------------------------
# Check: is the data still what its manifest says


def read_rows(file: Path) -> Iterator[dict]:
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            batch.validate(full=True)  # a damaged offset would otherwise be followed out of the file
            yield from batch.to_pylist()


def row_problems(row: dict, size: int) -> Iterator[str]:
    if not row["caption"].strip():
        yield "empty caption"
    try:
        image = Image.open(io.BytesIO(row["image"]))
        image.load()
    except Exception:  # as in decode_rgb
        yield "image does not decode"
        return
    if not image.size == (row["width"], row["height"]) == (size, size):
        yield (f"image is {image.width} x {image.height}, its columns say {row['width']} x {row['height']}, "
               f"its folder {size}")


def find_problems(data: Path, manifest: dict) -> Iterator[str]:
    """Yield one line, with file and row, for each way in which `data` is not what its manifest says."""
    orders = set()
    with tqdm(desc=f"check {data}", total=manifest["rows"] * len(manifest["sizes"]), unit=" images") as bar:
        for size in manifest["sizes"]:
            order, total = hashlib.sha256(), 0
            for name, shard in manifest["shards"].items():
                if not name.startswith(f"{size}/"):
                    continue
                file, count = data / name, 0
                if not file.exists():
                    yield f"{file}: missing"
                    continue
                if file_sha256(file) != shard["sha256"]:
                    yield f"{file}: changed, its sha256 is not the manifest's"
                try:
                    for row in read_rows(file):
                        yield from (f"{file} row {count}: {problem}" for problem in row_problems(row, size))
                        order.update(row["key"].encode() + b"\n")
                        count += 1
                        bar.update()
                except Exception as error:  # whatever a damaged file makes its readers raise
                    yield f"{file} row {count}: cannot be read ({first_line(error)})"
                if count != shard["rows"]:
                    yield f"{file}: {count} rows, the manifest says {shard['rows']}"
                total += count
            if total != manifest["rows"]:
                yield f"{data / str(size)}: {total} rows, the manifest says {manifest['rows']}"
            orders.add(order.digest())
            try:
                load_from_disk(str(data / str(size)))
            except Exception as error:
                yield f"{data / str(size)}: datasets cannot open it ({first_line(error)})"
    if len(orders) > 1:
        yield f"{data}: the sizes do not hold the same rows in the same order"


def check(args) -> None:
    manifest = read_manifest(args.data)
    problems = 0
    for problem in find_problems(args.data, manifest):
        tqdm.write(problem)
        problems += 1
    if problems:
        raise UserError(f"{args.data}: {problems} problem(s), listed above; build it again into another folder")
    print(f"{args.data}: OK, {manifest['rows']} rows at {', '.join(map(str, manifest['sizes']))} px in "
          f"{len(manifest['shards'])} shards; dropped when built: {describe(manifest['dropped'])}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def sizes(text: str) -> list[int]:
    values = [int(value) for value in text.split(",") if value.isdecimal()]
    if len(values) < text.count(",") + 1 or min(values) < 1 or len(set(values)) < len(values):
        raise ArgumentTypeError(f"{text!r} is not a list of different sides in px, such as 512,1024")
    return values


def percent(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


def main(argv: list[str]) -> None:
    parser = Parser(prog="data_prep.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="a folder of captioned pictures -> shards")
    command.set_defaults(run=build)
    command.add_argument("--source", required=True,
                         help="folder of pictures with metadata.csv, .jsonl or .parquet, or with name.txt beside name.jpg")
    command.add_argument("--out", required=True, type=Path, help="folder to write, not there yet")
    command.add_argument("--size", required=True, type=sizes,
                         help="sides of the square images, px, such as 512,1024")
    command.add_argument("--format", choices=["jpeg", "png"], default="jpeg", help="how the images are stored")
    command.add_argument("--quality", type=percent, default=95, help="of the JPEGs, 1 to 100")
    command.add_argument("--caption_column", default="text,caption,prompt",
                         help="column of the metadata; of several, the first that is there")
    command.add_argument("--min_scale", type=float, default=0.5,
                         help="an image whose short side is below this times the largest size is dropped as too small")
    command = commands.add_parser("check", help="verify checksums, row counts, images and captions")
    command.set_defaults(run=check)
    command.add_argument("--data", required=True, type=Path, help="folder that build or scenes.py wrote")
    if argv and argv[0] in commands.choices:  # straight to its own parser, which then names the nearest of its flags
        args = commands.choices[argv[0]].parse_args(argv[1:])
    else:
        args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
