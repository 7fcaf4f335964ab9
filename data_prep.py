"""Pictures with captions -> checked shards that train_prx.py reads; captions -> text latents.

    python data_prep.py build --source=flux_reason --out=data/flux_reason --size=512,1024 [--input=DIR] [--limit=1000]
    python data_prep.py build --source=DIR --out=data/mine --size=512
    python data_prep.py embed --data=data/flux_reason --encoder=google/t5gemma-2b-2b-ul2
    python data_prep.py check --data=data/flux_reason

A source is a set of `SETS`, read from the Hugging Face hub or from files already downloaded (--input), or a folder of
pictures with metadata.csv, .jsonl or .parquet (columns `file_name` and a caption: `text`, `caption` or `prompt`), or
with name.txt beside name.jpg. A build or embed that was killed continues with the same command, to the same bytes.

    data/X/<size>/data-*.arrow                the rows at that size (`datasets.load_from_disk` opens the folder)
    data/X/text-<encoder>/data-*.safetensors  latents of both captions of the same rows, for all sizes
    data/X/manifest.json, dropped.txt         what the rows are, a sha256 a shard; each row that was left out, and why
"""
import csv
import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetInfo, Features, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig

from train_prx import (
    Config, Parser, T5GemmaText, UserError, compute_dtype, file_sha256, is_held_out, load_pretrained, read_manifest,
    run_main)

# ---------------------------------------------------------------------------------------------------------------------
# Sources: the sets, of which a fourth is one more entry, and folders of one's own

@dataclass(frozen=True)
class HubSet:
    """A captioned data set in parquet files, on the Hugging Face hub or downloaded from there."""
    repo: str  # its id on the hub
    files: str  # what its files are called, in any folder
    rows: int  # about so many, for the progress bar
    captions: tuple[str, ...]  # columns: the first good one. Where X_status says that X failed, X is not good
    key: str | None = None  # column that identifies a row; None: the sha256 of the image file does
    image: str = "image"  # column of {bytes, path}

SETS = {
    "flux_reason": HubSet("LucasFang/FLUX-Reason-6M", "fluxdb-*.parquet", 5_890_279, ("caption_detail",), "id"),
    "flux_generated": HubSet("lehduong/flux_generated", "train-*.parquet", 1_700_000, ("caption_caption",)),
    # never its column `prompt`: that is what people typed, not what the picture shows
    "midjourney": HubSet("Photoroom/midjourney-v6-recap", "train_*.parquet", 986_000,
                         ("gemini", "qwen3", "llava"), "id"),
}
FAILED = re.compile("fail|error|refus|block|invalid|timeout|missing|empty|skip", re.IGNORECASE)  # in a status
ROWS_A_PART = 1000  # of a source that is no set of files: few enough that all workers are busy soon

class Part(NamedTuple):
    """A stretch of a source, of which one worker makes a shard of each size."""
    name: str  # for messages
    fingerprint: str  # of what it is made from: a finished part counts only while this is the same
    content: object  # what its rows are made from; pickled

def find_files(folder: Path, pattern: str) -> list[str]:
    """Paths, relative to `folder` and sorted, of its files and those of folders in it; links are followed."""
    return sorted(glob(f"**/{pattern}", root_dir=folder, recursive=True))

def stamp(file: str) -> str:
    """What tells whether a file has changed, its size and its time; "" where there is none."""
    return f"{os.stat(file).st_size} bytes, {os.stat(file).st_mtime_ns}" if os.path.exists(file) else ""

def find_set(source: HubSet, folder: Path | None, revision: str | None) -> tuple[str, list[str], str]:
    """Where a set's files are, their names there, and the revision that they are of."""
    if folder:
        return str(folder), find_files(folder, source.files), revision or "not stated"
    try:
        info = HfApi().dataset_info(source.repo, revision=revision)
    except Exception as error:  # the hub's, the network's: all mean that the files are out of reach
        raise UserError(f"cannot get {source.repo} from the hub: {first_line(error).rstrip('.')}; access: "
                        f"https://huggingface.co/datasets/{source.repo}; files already here: --input=DIR") from None
    names = sorted(file.rfilename for file in info.siblings if Path(file.rfilename).match(source.files))
    return f"hf://datasets/{source.repo}@{info.sha}", names, info.sha

@contextmanager
def open_parquet(source: HubSet, file: str) -> Iterator[pq.ParquetFile]:
    """A file of a set; raises UserError where it is damaged, out of reach, or lacks a column."""
    try:
        with fsspec.open(file) as opened, pq.ParquetFile(opened, buffer_size=1 << 20) as parquet:
            types = {field.name: str(field.type) for field in parquet.schema_arrow}
            wanted = {source.image: "struct<.*", source.key: ".*"} | dict.fromkeys(source.captions, "(large_)?string")
            lacks = [name for name, kind in wanted.items() if name and not re.fullmatch(kind, types.get(name, "-"))]
            if lacks:
                raise UserError(f"{file} has no column {' or '.join(lacks)} of the right kind; it has {types}")
            yield parquet
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is cut, damaged or out of reach ({first_line(error)}): download it again") from None

def set_rows(source: HubSet, file: str) -> Iterator[dict]:
    """The rows of a set's file. Only the columns that are needed are read."""
    needed = {source.key, source.image, *source.captions, *(f"{column}_status" for column in source.captions)}
    with open_parquet(source, file) as parquet:
        columns = [column for column in parquet.schema_arrow.names if column in needed]
        # batches are cut out of row groups as they are read: some files have one row group of gigabytes
        for batch in parquet.iter_batches(batch_size=64, columns=columns, use_threads=False):
            yield from batch.to_pylist()

def read_table(file: Path, column: str) -> Iterator[dict]:
    """The rows of a folder's metadata; for folder/*.txt its pictures, with name.txt as the caption of name.jpg."""
    if file.suffix == ".txt":
        known = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        for name in find_files(file.parent, "*"):
            text = (file.parent / name).with_suffix(".txt")
            if Path(name).suffix.lower() in known:
                yield {"file_name": name, column: text.read_text("utf-8-sig", "replace") if text.is_file() else ""}
    elif file.suffix == ".parquet":
        yield from pq.read_table(file).to_pylist()
    else:
        csv.field_size_limit(1 << 30)  # what is too long for a caption is dropped later
        with open(file, newline="", encoding="utf-8-sig") as lines:
            yield from csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines)

def folder_rows(folder: Path, captions: list[str]) -> Iterator[dict]:
    """The rows of a folder's metadata or else of its pictures, `file_name` relative to the folder; raises UserError."""
    metadata = [name for name in find_files(folder, "metadata.*") if name.endswith((".csv", ".jsonl", ".parquet"))]
    for file in map(folder.joinpath, metadata or ["*.txt"]):
        try:
            for i, row in enumerate(read_table(file, captions[0])):
                is_complete = i > 0 or "file_name" in row and row.keys() & set(captions)
                if not is_complete or None in row:  # where the csv module puts what is beyond the header
                    raise ValueError(f"row {i} has {list(row)}, and not file_name and {' or '.join(captions)}")
                name = os.path.relpath(file.parent / (row["file_name"] or "no name"), folder)
                if name.startswith("../"):
                    raise ValueError(f"row {i} names {name}, which is not in the folder")
                yield {"file_name": name} | {column: row.get(column) for column in (*captions, "caption_short")}
        except (OSError, ValueError, TypeError, AttributeError, csv.Error, pa.ArrowException) as error:
            raise UserError(f"cannot read the metadata in {file}: {first_line(error)}") from None

# ---------------------------------------------------------------------------------------------------------------------
# Pictures: any image file -> squares

class Drop(Exception):
    """A row that is left out; the text is the reason under which it is counted."""

MAX_CAPTION = 10_000  # characters; an encoder reads 256 tokens, about 1,200. What is longer is no caption
BLANK = re.compile(r"[\s\x00-\x1f\x7f\ufeff]+")  # in a caption: spaces, lines, control characters, byte-order marks
UNUSABLE = ("unreadable", "missing file", "too large", "too small")  # reasons of which a source has 1% at the most

def decode_rgb(data: bytes, size: int, min_scale: float) -> Image.Image:
    """Decode an image file to upright 8-bit RGB on white, to be scaled down to `size` px or less.

    Raises Drop if it is damaged, if it has more than 89 Mpx, or if its short side is below min_scale * size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # an error by itself only at twice that
            image = Image.open(io.BytesIO(data))
        if min(image.size) < min_scale * size:
            raise Drop("too small")
        # a JPEG far too large is decoded at 1/2, 1/4 or 1/8, to no less than twice `size`: our own filter does the rest
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
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Drop("too large") from None
    except (Drop, MemoryError):  # a lack of memory is the machine's fault, not the file's
        raise
    except Exception:  # Pillow's readers raise almost anything on damaged files
        raise Drop("unreadable") from None

def crop_and_encode(image: Image.Image, size: int, settings: dict) -> bytes:
    """The centre square of `image`, resized with antialiasing to size x size px, as a JPEG or PNG file."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    x = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1)  # [3, side, side]
    if side != size:  # torch's uint8 bicubic: Pillow's result to two grey levels, in an eighth of its time
        x = F.interpolate(x[None], (size, size), mode="bicubic", antialias=True)[0]
    image, buffer = Image.fromarray(x.permute(1, 2, 0).numpy()), io.BytesIO()  # without the source's profile, comments
    # 4:4:4: the model is trained on pixels, and half-resolution colour would teach it blurred colour edges
    options = {"quality": settings["quality"], "subsampling": 0} if settings["format"] == "jpeg" else {}
    image.save(buffer, settings["format"], **options)
    return buffer.getvalue()

def make_rows(source: HubSet, root: str, settings: dict, part: Part, dropped: list) -> Iterator[dict]:
    """The rows of a part for `write_dataset`.

    Raises UserError if more than 1% of 100 rows or more of a set's file is unusable: it is damaged, not a few pictures.
    """
    (count, rows), i = part.content, -1
    for i, row in enumerate(islice(rows or set_rows(source, f"{root}/{part.name}"), count)):
        name, key, image = f"{part.name} row {i}", row.get(source.key), row.get(source.image) or {}
        if rows:  # of a folder, where a row is known by its path, which may be no text
            name = key = os.fsencode(key).decode("utf-8", "replace")
            if os.path.isfile(f"{root}/{row['file_name']}"):
                image = {"bytes": Path(root, row["file_name"]).read_bytes()}
        try:
            good = (str(row[column]) for column in source.captions
                    if row[column] and not FAILED.search(str(row.get(f"{column}_status") or "")))
            caption, short = next(good, ""), str(row.get("caption_short") or "")[:MAX_CAPTION]
            if len(caption) > MAX_CAPTION:
                raise Drop("caption too long")
            caption, short = (BLANK.sub(" ", text).strip() for text in (caption, short))
            if not caption:
                raise Drop("empty caption")
            if image.get("bytes") is None:
                raise Drop("missing file")
            picture = decode_rgb(image["bytes"], max(settings["sizes"]), settings["min_scale"])
        except Drop as drop:
            dropped.append((name, str(drop)))
            continue
        short = short or re.split(r"(?<=[.!?])\s+(?=[^a-z])", caption, maxsplit=1)[0]  # "vs. a", "e.g. one" end nothing
        digest = hashlib.sha256(image["bytes"]).hexdigest()[:32]
        images = {size: crop_and_encode(picture, size, settings) for size in settings["sizes"]}
        yield {"name": name, "digest": digest, "key": digest if key is None else str(key), "images": images,
               "caption": caption, "caption_short": short, "source": settings["source"]}
    bad = [f"{name}: {reason}" for name, reason in dropped if reason in UNUSABLE]
    if not rows and i >= 99 and len(bad) > settings["max_unusable"] * (i + 1):
        raise UserError(f"{part.name}: {len(bad)} of {i + 1} images are unusable (the first is {bad[0]}), more than "
                        f"{settings['max_unusable']:.0%}: get it again, or allow more with --max_unusable")

# ---------------------------------------------------------------------------------------------------------------------
# Shards: what train_prx.py reads

COLUMNS = Features({
    "key": Value("string"), "image": Value("binary"), "height": Value("int32"), "width": Value("int32"),
    "caption": Value("string"), "caption_short": Value("string"), "source": Value("string")})
ROWS_A_BATCH = 64  # held back before they are written: all the memory that a shard needs
PROMPTS = 16  # captions for the sample grids

def cores() -> int:
    """How many cores this process may use; macOS does not say, so there it is how many the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

def start_worker() -> None:
    """What a worker does first: one thread, a silent end at Ctrl-C and, on Linux, with the command that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a killed command must not go on without its lock
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
            os._exit(1)

def in_workers(function: Callable, tasks: list[tuple], workers: int) -> Iterator:
    """Yield function(*task) for every task, in order; 0 workers: in this process. An exception ends all workers."""
    if not workers:
        yield from (function(*task) for task in tasks)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker)
    try:
        yield from pool.map(function, *zip(*tasks))
    except BrokenExecutor:
        raise UserError("a worker process was killed, most likely for memory: try fewer --workers") from None
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        pool.shutdown(cancel_futures=True)

@contextmanager
def locked(file: Path, what: Path, patience: float = 1) -> Iterator[None]:
    """Hold a lock file; raises UserError if others do for so many seconds, or if something cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file, timeout=patience):  # the workers of a command killed just now may hold it a moment longer
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is writing {what}: wait for it, or name another folder") from None
    except (OSError, SafetensorError) as error:
        kept = "; what is done is kept, and the same command continues" if Path(f"{what}.partial").is_dir() else ""
        raise UserError(f"cannot write {what}: {first_line(error)}{kept}") from error

def open_shard(file: Path) -> ArrowWriter:
    return ArrowWriter(path=str(file), features=COLUMNS, writer_batch_size=ROWS_A_BATCH)

def describe_shard(file: Path, rows: int) -> dict:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size, "rows": rows}

def shards_of(manifest: dict, size: int) -> dict[str, dict]:
    """A manifest's shards of one size, by their names in its folder."""
    return {Path(name).name: shard for name, shard in manifest["shards"].items() if name.startswith(f"{size}/")}

def write_part(make: Callable, part: Part, files: dict[int, Path], file: Path, fingerprint: str) -> dict:
    """Write a part's rows to the file of each size, unless its record is in `file`; returns the record."""
    if read_json(file).get("fingerprint") == fingerprint:
        return read_json(file)
    rows, dropped = [], []
    with ExitStack() as stack:
        writers = {size: stack.enter_context(open_shard(shard)) for size, shard in files.items()}
        for row in make(part, dropped):
            texts = {name: row[name] for name in ("key", "caption", "caption_short", "source")}
            for size, writer in writers.items():
                writer.write({"image": row["images"][size], "height": size, "width": size, **texts})
            rows.append((row.get("digest", row["key"]), row.get("name", row["key"])))
        for writer in writers.values():
            writer.finalize()
    shards = {f"{size}/{shard.name}": describe_shard(shard, len(rows)) for size, shard in files.items()}
    return {"rows": rows, "dropped": dropped, "shards": shards}

def keep_rows(file: Path, keep: list[bool]) -> dict:
    """Write a shard again, with some of its rows."""
    aside = file.with_name(f".{file.name}")
    with open_shard(aside) as writer:
        for row in Dataset.from_file(str(file)).select(np.flatnonzero(keep)):
            writer.write(row)
        writer.finalize()
    os.rename(aside, file)
    return describe_shard(file, sum(keep))

def write_parts(folder: Path, parts: Iterable[Part], make: Callable, sizes: list[int], workers: int, bar: tqdm) -> dict:
    """Write the shards of all parts, without images that an earlier row has, and dropped.txt; returns what there is.

    A part is done when its record is there. Its rows depend on those before it, and so does its record's fingerprint.
    """
    tasks, seen, shards, dropped, fingerprint = [], set(), {}, [], ""
    for i, part in enumerate(parts):
        fingerprint = sha256_of(fingerprint + part.name + part.fingerprint)
        files = {size: folder / f"{size}/data-{i:05d}.arrow" for size in sizes}
        tasks.append((make, part, files, folder / f"parts/{i:05d}.json", fingerprint))
    with closing(in_workers(write_part, tasks, workers)) as records:
        for (*_, file, fingerprint), record in zip(tasks, records):
            new = []
            for digest, name in record["rows"]:
                new.append(digest not in seen)
                record["dropped"] += [] if new[-1] else [(name, "duplicate")]
                seen.add(digest)
            if not all(new):
                record["rows"] = [row for row, is_new in zip(record["rows"], new) if is_new]
                record["shards"] = {name: keep_rows(folder / name, new) for name in record["shards"] if any(new)}
            if "fingerprint" not in record:
                write_json(file, {"fingerprint": fingerprint, **record})
            bar.update(len(record["rows"]) + len(record["dropped"]))
            shards |= record["shards"]
            dropped += record["dropped"]
    lines = (f"{BLANK.sub(' ', name)}: {reason}\n" for name, reason in dropped)
    (folder / "dropped.txt").write_text("".join(lines), "utf-8")
    counts = Counter(reason for _, reason in dropped)
    return {"rows": len(seen), "shards": shards, "dropped": dict(sorted(counts.items()))}

def write_dataset(out: Path, parts: Iterable[Part], make: Callable[[Part, list], Iterator[dict]], *, settings: dict,
                  prompts: list[str] | None = None, workers: int = 0, total: int | None = None) -> dict:
    """Write a source to `out`: shards of each size, the same rows in the same order, and the manifest; returns that.

    `make(part, dropped)` yields a part's rows, {"key", "images": {size: JPEG or PNG bytes of size x size}, "caption",
    "caption_short", "source"}, with a "digest" where pictures may be equal, and appends (name, reason) of what it
    leaves out. `settings` decide the bytes; "sizes" is in px. `prompts` are for the sample grids, by default some
    captions; `total` rows for the progress bar. All is made in out.partial, which a later call continues. Raises
    UserError if `out` exists or cannot be written, if other settings began it, or if no row is left.
    """
    out, folder, sizes = Path(out), Path(f"{out}.partial"), settings["sizes"]
    begun, manifest = folder / "settings.json", folder / "manifest.json"
    if set(",:") & set(str(out)):
        raise UserError(f"--out={out}: ',' and ':' separate folders and weights in --data, so no name may have them")
    with locked(Path(f"{out}.lock"), out):
        if out.exists():
            raise UserError(f"{out} exists and is never overwritten: name another folder with --out, or delete it")
        stored = read_json(manifest) or read_json(begun) or settings
        if {name: stored.get(name) for name in settings} != settings:
            raise UserError(f"{folder} was begun with other settings, see its settings.json: use those, or delete it")
        if not manifest.exists():
            for name in ("parts", *map(str, sizes)):
                (folder / name).mkdir(parents=True, exist_ok=True)
            write_json(begun, settings)
            try:
                with tqdm(desc=str(out), total=total, unit=" images") as bar:
                    made = write_parts(folder, parts, make, sizes, workers, bar)
                if not made["rows"]:
                    shutil.rmtree(folder / "parts")
                    raise UserError(f"no image of {settings['source']} is left; dropped: {describe(made['dropped'])}")
            except Exception:  # raised again: only what nobody could continue is removed
                if not any(folder.glob("parts/*.json")):
                    shutil.rmtree(folder)
                raise
            for size in sizes:
                write_state(folder / str(size), shards_of(made, size))
            if not prompts:
                rows = load_from_disk(str(folder / str(sizes[0]))).select_columns(["key", "caption"])
                rows = sorted(islice(rows, 10_000), key=lambda row: not is_held_out(row["key"]))  # held-out ones first
                prompts = [row["caption"] for row in rows[:PROMPTS]]
            write_json(manifest, {**settings, **made, "prompts": prompts})
        shutil.rmtree(folder / "parts", ignore_errors=True)  # from here on a killed command has only these steps left
        begun.unlink(missing_ok=True)
        os.rename(folder, out)
    return read_manifest(out)

def write_state(folder: Path, shards: dict[str, dict]) -> None:
    """Write what `datasets.load_from_disk` reads, and remove files of which no row is left."""
    for file in folder.glob("*.arrow"):
        if file.name not in shards:
            file.unlink()
    DatasetInfo(features=COLUMNS).write_to_directory(str(folder))
    # the fingerprint keys datasets' caches: made from the contents, so equal data has equal caches and equal bytes
    write_json(folder / "state.json", {
        "_data_files": [{"filename": name} for name in shards], "_fingerprint": sha256_of(json.dumps(shards))[:16],
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
        "_split": None})

def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON, aside and then renamed, so that the file is never there half-written."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.rename(aside, path)

def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}

def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

def describe(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "nothing"

# ---------------------------------------------------------------------------------------------------------------------
# The commands

def build(args) -> None:
    source, sizes, parts, total, limit = SETS.get(args.source), args.size.split(","), [], 0, args.limit or 10**12
    if not all(re.fullmatch("[1-9][0-9]{0,4}", size) for size in sizes) or len(set(sizes)) < len(sizes):
        raise UserError(f"--size={args.size[:80]} is not a list of different sides in px, such as 512,1024")
    folder = args.input if source else Path(args.source or "nowhere").resolve()
    if folder and not folder.is_dir():
        raise UserError(f"no folder {folder}: --source takes a folder of pictures, or {', '.join(SETS)}")
    if not source and (args.input or args.revision):
        raise UserError(f"--input and --revision go with --source={'|'.join(SETS)}: a folder is its own input")
    if source:
        root, names, revision = find_set(source, folder, args.revision)
        if not names:
            raise UserError(f"no {source.files} in {folder or root}: it has to be {source.repo}, as the hub has it")
        for name in names:
            if total >= limit:
                break
            parts.append(Part(name, stamp(f"{root}/{name}") or root, (limit - total, None)))
            if folder or args.limit:  # counted now, so that a damaged file shows before hours of building
                with open_parquet(source, f"{root}/{name}") as parquet:
                    total += parquet.metadata.num_rows
    else:
        source = HubSet("", "", 0, tuple(args.caption_column.split(",")), "file_name")
        root, revision, rows = str(folder), "folder", list(islice(folder_rows(folder, source.captions), limit))
        total = len(rows)
        if not any(row[column] for row in rows for column in source.captions):
            raise UserError(f"no captions in {folder}: it needs metadata.csv (file_name,text), or a.txt beside a.jpg")
        for first in range(0, total, ROWS_A_PART):
            some = rows[first : first + ROWS_A_PART]
            made_from = json.dumps([some, [stamp(f"{root}/{row['file_name']}") for row in some]])
            parts.append(Part(f"{folder.name} from row {first}", sha256_of(made_from), (None, some)))
    settings = {name: getattr(args, name) for name in ("format", "quality", "min_scale", "max_unusable", "limit")}
    settings |= {"source": args.source if source.repo else folder.name, "revision": revision,
                 "sizes": list(map(int, sizes))}
    manifest = write_dataset(args.out, parts, partial(make_rows, source, root, settings), settings=settings,
                             workers=args.workers, total=min(total or source.rows, limit))
    dropped, count = manifest["dropped"], manifest["rows"] + sum(manifest["dropped"].values())
    print(f"{args.out}: {manifest['rows']} of {count} images at {', '.join(sizes)} px; dropped: {describe(dropped)}")
    unusable = sum(dropped.get(reason, 0) for reason in UNUSABLE)
    if unusable > args.max_unusable * count:
        print(f"warning: {unusable} of {count} images are unusable; {args.out}/dropped.txt names them", file=sys.stderr)

def embed(args) -> None:
    """Latents of every caption, a file a shard. Of n processes that torchrun starts, each takes every n-th shard.

    The latents of a shard are in memory until it is done: 6 GB for 5,000 captions of 128 tokens, 12 GB for the longest.
    """
    manifest, folder = read_manifest(args.data), args.data / f"text-{Path(args.encoder).name}"
    rank, world, local = (int(os.environ.get(x, n)) for x, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    config = load_pretrained(AutoConfig, args.encoder)
    files = [file for end in ("json", "safetensors") for file in sorted(Path(args.encoder).glob(f"*.{end}"))]
    cfg = Config(text_encoder=args.encoder, text_tokens=args.text_tokens,
                 text_dim=getattr(config, "encoder", config).hidden_size)
    revision = getattr(config, "_commit_hash", None) or sha256_of("".join(map(file_sha256, files)))
    text = {"encoder": args.encoder, "revision": revision, "tokens": args.text_tokens, "dim": cfg.text_dim,
            "dtype": "bfloat16", "computed": "bf16" if compute_dtype(cfg, device) == torch.bfloat16 else "fp32"}
    stored = manifest.get("text", {}).get(folder.name, dict.fromkeys(text))
    if folder.exists() and any(stored[name] != text[name] for name in ("revision", "tokens")):
        raise UserError(f"{folder} was made with {stored['encoder']}, revision {stored['revision']}, and "
                        f"{stored['tokens']} tokens: delete it to make it again")
    work, made_by, size = Path(f"{folder}.partial"), sha256_of(json.dumps(text))[:16], manifest["sizes"][0]
    shards = {f"{Path(name).stem}.safetensors": args.data / f"{size}/{name}" for name in shards_of(manifest, size)}
    records = {name: work / f"{made_by}-{name}.json" for name in ["prompts.safetensors", *shards]}
    if not folder.exists():
        encode = T5GemmaText(cfg, device)
        with locked(work / f"{rank}.lock", folder):
            (work / made_by).mkdir(parents=True, exist_ok=True)
            left = [name for name in list(records)[rank::world] if not records[name].exists()]
            for name in tqdm(left, desc=str(folder), unit=" shards", disable=rank > 0):
                file, texts, tensors = work / made_by / name, {"latents": ["", *manifest["prompts"]]}, {}
                if name in shards:
                    rows = Dataset.from_file(str(shards[name]))
                    texts = {kind: list(rows[kind]) for kind in ("caption", "caption_short")}
                for kind, captions in texts.items():
                    ends = "ends" if kind == "latents" else f"{kind}_ends"
                    tensors[kind], tensors[ends] = embed_texts(encode, captions)
                save_file(tensors, file)
                shutil.copymode(args.data / "manifest.json", file)  # else only its owner could read it
                write_json(records[name], describe_shard(file, len(captions)))
        with locked(args.data / ".lock", folder, patience=60):
            if not folder.exists() and all(record.exists() for record in records.values()):  # the last one ends this
                manifest = read_manifest(args.data)  # as another encoder's may have left it
                text["shards"] = {name: read_json(record) for name, record in records.items()}
                manifest.setdefault("text", {})[folder.name] = text
                write_json(args.data / "manifest.json", manifest)
                os.rename(work / made_by, folder)
    if folder.exists():
        shutil.rmtree(work, ignore_errors=True)
        print(f"{folder}: latents of {manifest['rows']} rows by {args.encoder}, revision {revision[:12]}")

def embed_texts(encode: T5GemmaText, texts: list[str], batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of `texts` one after the other, bf16 [sum of lengths, D], and where each ends, int64 [texts]."""
    latents, order = {}, sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that batches have little padding
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        txt, mask = encode([texts[i] for i in some])
        latents |= zip(some, txt[mask].bfloat16().cpu().split(mask.sum(1).tolist()))
    latents = [latents[i] for i in range(len(texts))]
    return torch.cat(latents), torch.tensor([len(x) for x in latents]).cumsum(0)

def check_file(file: Path, shard: dict) -> list[str]:
    """What is wrong with a shard of images or a file of latents, a line each."""
    if not file.exists() or file_sha256(file) != shard["sha256"]:
        return [f"{file}: changed, its sha256 is not the manifest's" if file.exists() else f"{file}: missing"]
    problems = []
    try:
        rows = Dataset.from_file(str(file)) if file.suffix == ".arrow" else Dataset.from_dict({})
        rows.data.validate(full=True)  # a damaged offset would otherwise be followed out of the file
        for i, row in enumerate(rows):
            try:
                size = decode_rgb(row["image"], row["width"], 0).size
            except Drop:
                size = "unreadable"
            if not size == (row["width"], row["height"]) == 2 * (int(file.parent.name),):
                problems.append(f"{file} row {i}: image is {size}, and not as its columns and its folder say")
            if not row["caption"].strip():
                problems.append(f"{file} row {i}: empty caption")
    except Exception as error:  # whatever a damaged file makes its readers raise
        problems.append(f"{file}: cannot be read ({first_line(error)})")
    return problems

def check(args) -> None:
    """Print a line, with file and row, for each way in which a data folder is not what its manifest says."""
    manifest, data, keys = read_manifest(args.data), args.data, []
    files = {data / name: shard for name, shard in manifest["shards"].items()}
    for folder, text in manifest.get("text", {}).items():
        files |= {data / folder / name: shard for name, shard in text["shards"].items()}
    checked = in_workers(check_file, list(files.items()), args.workers)
    problems = [line for lines in tqdm(checked, f"check {data}", len(files), unit=" files") for line in lines]
    for size in manifest["sizes"]:
        try:
            rows = load_from_disk(f"{data}/{size}")
            if [Path(file["filename"]).name for file in rows.cache_files] != list(shards_of(manifest, size)):
                problems.append(f"{data}/{size}/state.json: lists other shards than the manifest")
            if len(rows) != manifest["rows"]:
                problems.append(f"{data}/{size}: {len(rows)} rows, the manifest says {manifest['rows']}")
            keys.append(rows.data.column("key"))
        except Exception as error:
            problems.append(f"{data}/{size}: datasets cannot open it ({first_line(error)})")
    if any(not column.equals(keys[0]) for column in keys):
        problems.append(f"{data}: the sizes do not hold the same rows in the same order")
    if problems:
        print(*problems, sep="\n")
        raise UserError(f"{data}: {len(problems)} problem(s), listed above: build wrong shards again elsewhere; "
                        "delete a folder of wrong latents and embed again")
    latents = "".join(f"; latents by {text['encoder']}" for text in manifest.get("text", {}).values())
    print(f"{data}: OK, {manifest['rows']} rows at {', '.join(map(str, manifest['sizes']))} px in "
          f"{len(manifest['shards'])} shards{latents}; dropped when built: {describe(manifest['dropped'])}")

def main(argv: list[str]) -> None:
    parser = Parser(prog="data_prep.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="a set of captioned pictures -> shards").add_argument
    add("--source", required=True, help=f"{', '.join(SETS)}; or a folder of pictures with metadata.csv, .jsonl or "
        ".parquet, or with name.txt beside name.jpg")
    add("--out", required=True, type=Path, help="folder to write, not there yet")
    add("--size", required=True, help="sides of the square images, px, such as 512,1024")
    add("--input", type=Path, help="folder with the set's parquet files, already downloaded; else the hub is read")
    add("--revision", help="commit, branch or tag of the set on the hub; with --input, what the manifest says")
    add("--limit", type=int, default=0, help="rows of the source to read, for a trial; 0: all")
    add("--format", choices=["jpeg", "png"], default="jpeg", help="how the images are stored")
    add("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    add("--caption_column", default="text,caption,prompt", help="of a folder's metadata; of several, the first filled")
    add("--min_scale", type=float, default=0.5, help="an image is too small if its short side is below this times the "
        "largest size")
    add("--max_unusable", type=float, default=0.01, help=f"share of images, 0 to 1, that may be {', '.join(UNUSABLE)}; "
        "more is an error in a file of a set, and a warning in a folder")
    add = commands.add_parser("embed", help="captions -> text latents: training needs no text encoder").add_argument
    add("--data", required=True, type=Path, help="folder that build wrote")
    add("--encoder", default=Config().text_encoder, help="hub id or folder of a T5Gemma")
    add("--text_tokens", type=int, default=Config().text_tokens, help="captions are cut here")
    add = commands.add_parser("check", help="verify checksums, row counts, images and captions").add_argument
    add("--data", required=True, type=Path, help="folder that build or tools/scenes.py wrote")
    for command in (commands.choices["build"], commands.choices["check"]):
        command.add_argument("--workers", type=int, default=cores(), help="processes; 0: none but this one")
    if not argv or argv[0] not in commands.choices:
        parser.parse_args(argv)
    args = commands.choices[argv[0]].parse_args(argv[1:])  # by its own parser, which names the nearest of its flags
    for name, low, high in (("limit", 0, 10**9), ("quality", 1, 100), ("min_scale", 0, 100), ("max_unusable", 0, 1),
                            ("workers", 0, 999), ("text_tokens", 1, 10**5)):
        if not low <= getattr(args, name, low) <= high:
            raise UserError(f"--{name}={getattr(args, name)}: it is from {low} to {high}")
    {"build": build, "embed": embed, "check": check}[argv[0]](args)

if __name__ == "__main__":
    run_main(main)
