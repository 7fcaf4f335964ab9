"""Pictures with captions -> checked shards that train_prx.py reads; captions -> text latents.

    python data_prep.py build --source=flux_reason --out=data/flux_reason --size=512,1024 [--input=DIR] [--limit=1000]
    python data_prep.py build --source=DIR --out=data/mine --size=512
    python data_prep.py embed --data=data/flux_reason --encoder=google/t5gemma-2b-2b-ul2
    python data_prep.py check --data=data/flux_reason

A source is a set of `SETS`, from the Hugging Face hub or from files already downloaded (--input), or a folder of pictures
with metadata.csv, .jsonl or .parquet (columns `file_name` and a caption: `text`, `caption` or `prompt`), or with name.txt
beside name.jpg. Both build and embed can be killed at any moment: the same command continues and ends with the same bytes.

    data/X/<size>/data-*.arrow              the rows at that size (`datasets.load_from_disk` opens the folder)
    data/X/text-<encoder>/data-*.safetensors  latents of both captions of the same rows, for all sizes
    data/X/manifest.json                    where they come from, how many, what was left out, a sha256 a shard
"""
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import warnings
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape, glob
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from datasets import DatasetInfo, Features, Image as ImageColumn, Value, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig

from ranks import from_launcher, world_size
from shards import UserError, end_with_parent, file_sha256, folder_revision, is_held_out, read_manifest, text_folder
from train_prx import Config, Parser, T5GemmaText, resolve_precision, run_main, usable_device
from weights import load_pretrained


# ---------------------------------------------------------------------------------------------------------------------
# The sets. A fourth is one more entry.


@dataclass(frozen=True)
class HubSet:
    """A captioned data set in parquet files, on the Hugging Face hub or downloaded from there."""

    repo: str  # its id on the hub
    files: str  # what its files are called, in any folder
    rows: int  # about so many, for the progress bar
    captions: tuple[str, ...]  # columns; the first good one is the caption. Where X_status says that X failed, X is not good
    key: str | None = None  # column that identifies a row; None: the sha256 of the image file does
    image: str = "image"  # column of {bytes, path}


SETS = {
    "flux_reason": HubSet("LucasFang/FLUX-Reason-6M", "fluxdb-*.parquet", 5_890_279, ("caption_detail",), key="id"),
    "flux_generated": HubSet("lehduong/flux_generated", "train-*.parquet", 1_700_000, ("caption_caption",)),
    # never its column `prompt`: that is what people typed, not what the picture shows
    "midjourney": HubSet("Photoroom/midjourney-v6-recap", "train_*.parquet", 986_000, ("gemini", "qwen3", "llava"), key="id"),
}
FAILED = re.compile("fail|error|refus|block|invalid|timeout|missing|empty|skip", re.IGNORECASE)  # in a status


ROWS_A_PART = 1000  # of a source that is no set of files: few enough that all workers are busy soon


class Part(NamedTuple):
    """A stretch of a source that one worker turns into one shard a size."""

    name: str  # for messages, and to know it again
    fingerprint: str  # of what it is made from: a finished part counts only while this is the same
    rows: int
    content: object  # what the source's `make_rows` takes; pickled


Finished = Callable[[int, str, str], int | None]  # a part's number, name, fingerprint -> its source's rows if done, else None


def set_parts(source: HubSet, files: dict[str, str], fetch: Callable[[str], Path], limit: int, finished: Finished) -> Iterator[Part]:
    """A part for each parquet file, until they hold `limit` rows; only what is not finished is fetched."""
    for i, (name, fingerprint) in enumerate(files.items()):
        if limit <= 0:
            return
        rows, file = finished(i, name, fingerprint), None
        if rows is None:
            file = fetch(name)
            rows = min(parquet_rows(file, source), limit)
        limit -= rows
        yield Part(name, fingerprint, rows, (file, rows))


def parquet_rows(file: Path, source: HubSet) -> int:
    """The number of rows of a parquet file; raises UserError if it is damaged or lacks a column of the set."""
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is cut or damaged ({first_line(error)}): download it again") from None
    schema = parquet.schema_arrow
    missing = {source.image, *source.captions, *([source.key] if source.key else [])} - set(schema.names)
    if missing:
        raise UserError(f"{file} has no column {' or '.join(sorted(missing))}; it has {', '.join(schema.names)}")
    for name in source.captions:
        if not (pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)):
            raise UserError(f"{file}: column {name} holds {schema.field(name).type}, not captions")
    image = schema.field(source.image).type
    if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
        raise UserError(f"{file}: column {source.image} holds {image}, not {{bytes, path}}")
    return parquet.metadata.num_rows


def read_set(source: HubSet, keep: bool, file: Path, rows: int) -> Iterator[tuple[str | None, bytes | None, str, str]]:
    """Yield (key, image file, caption, short caption) of the first `rows` rows of a file, and delete it unless `keep`.

    Only the columns that are needed are read. Raises UserError if the file is damaged.
    """
    try:
        # batches are cut out of row groups as they are read: some files have one row group of gigabytes
        with pq.ParquetFile(file, buffer_size=1 << 20) as parquet:
            names = {source.key, source.image, *source.captions, *(f"{name}_status" for name in source.captions)}
            columns = [name for name in parquet.schema_arrow.names if name in names]
            batches = parquet.iter_batches(batch_size=64, columns=columns, use_threads=False)
            for row in islice((row for batch in batches for row in batch.to_pylist()), rows):
                good = (row[name] for name in source.captions
                        if row[name] and not FAILED.search(str(row.get(f"{name}_status") or "")))
                key = row[source.key] if source.key else None
                yield None if key is None else str(key), (row[source.image] or {}).get("bytes"), next(good, ""), ""
        if not keep:
            file.unlink()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} is cut or damaged ({first_line(error)}): download it again") from None


def find_set(source: HubSet, folder: Path | None, revision: str | None, downloads: Path):
    """The set's files {name: fingerprint} in order, a function that gives the path of one, and the revision that they are of.

    Raises UserError where `folder` has none, or where the hub cannot be reached or does not give them.
    """
    if folder is not None:
        files = {name: stamp(folder / name) for name in find_files(folder, source.files)}
        if not files:
            raise UserError(f"no {source.files} in {folder}: --input takes the folder that {source.repo} was downloaded into")
        return files, lambda name: folder / name, revision or "not stated"
    import huggingface_hub

    def ask(call: Callable, **arguments):
        try:
            return call(repo_type="dataset", repo_id=source.repo, **arguments)
        except Exception as error:  # the hub's, the network's, the disk's: all mean that the file is not here
            raise UserError(f"cannot get {source.repo} from the hub: {first_line(error).rstrip('.')}; access: https://huggingface.co/"
                            f"datasets/{source.repo}; files that are already here: --input=DIR") from None

    huggingface_hub.utils.disable_progress_bars()
    info = ask(huggingface_hub.HfApi().repo_info, revision=revision)
    files = {name: info.sha for name in sorted(file.rfilename for file in info.siblings) if Path(name).match(source.files)}
    if not files:
        raise UserError(f"{source.repo} at revision {info.sha} has no files {source.files}")
    return files, lambda name: Path(ask(huggingface_hub.hf_hub_download, filename=name, revision=info.sha, local_dir=downloads)), info.sha


def find_files(folder: Path, pattern: str) -> list[str]:
    """Paths, relative to `folder` and sorted, of its files and those of folders in it; links are followed."""
    return sorted(glob(f"**/{pattern}", root_dir=folder, recursive=True))


def stamp(file: str | Path | None) -> str:
    """What tells whether a file has changed: its size and its time."""
    return f"{os.stat(file).st_size} bytes, {os.stat(file).st_mtime_ns}" if file and os.path.exists(file) else "missing"


def folder_rows(folder: Path, caption_columns: list[str]) -> Iterator[tuple[str | None, str, str]]:
    """Yield (file, caption, short caption) in the order of the metadata, or of the file names where there is none.

    The file is None where the metadata names none; captions may be empty. Raises UserError for unusable metadata.
    """
    metadata = [folder / name for name in find_files(folder, "metadata.*") if Path(name).suffix in (".csv", ".jsonl", ".parquet")]
    if not metadata:
        files = [folder / name for name in find_files(folder, "*") if Path(name).suffix.lower() in ImageFolder.EXTENSIONS]
        if not any(path.with_suffix(".txt").is_file() for path in files):
            raise UserError(f"no captioned pictures in {folder}: it needs metadata.csv or metadata.jsonl with the columns "
                            "file_name and text, or name.txt beside name.jpg")
        for path in files:
            text = path.with_suffix(".txt")
            try:
                yield str(path), text.read_text("utf-8-sig", "replace") if text.is_file() else "", ""
            except OSError as error:
                raise UserError(f"cannot read {text}: {error}") from None
        return
    for path in metadata:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: it needs the columns file_name and {' or '.join(caption_columns)}")
    try:
        files = [escape(str(path)) for path in metadata]
        table = load_dataset("imagefolder", data_files=files, split="train", streaming=True)
        column = next((name for name in caption_columns if name in table.features), None)
        if "image" not in table.features or column is None:
            raise UserError(f"{metadata[0]} needs the columns file_name and {' or '.join(caption_columns)} "
                            f"(--caption_column names another); it has {', '.join(table.features)}")
        # not decoded by datasets: there the first bad image would end the iteration for good
        for row in table.cast_column("image", ImageColumn(decode=False)):
            yield row["image"] and row["image"]["path"], str(row[column] or ""), str(row.get("caption_short") or "")
    except UserError:
        raise
    except Exception as error:  # the loader's: broken CSV or JSON, columns that differ, a path that leaves the folder
        raise UserError(f"cannot read the metadata in {folder}: {first_line(error)}") from error


def folder_parts(rows: Iterable[tuple], finished: Finished) -> Iterator[Part]:
    """The rows of a folder in parts."""
    rows, first = iter(rows), 0
    while content := list(islice(rows, ROWS_A_PART)):
        stamps = [stamp(file) for file, _, _ in content]
        yield Part(f"rows {first} to {first + len(content) - 1}", sha256_of(json.dumps([content, stamps])), len(content), (content,))
        first += len(content)


def read_folder(folder: Path, content: list[tuple]) -> Iterator[tuple[str | None, bytes | None, str, str]]:
    """Yield (key, image file, caption, short caption) of a part's rows."""
    for file, caption, caption_short in content:
        try:
            data = Path(file).read_bytes() if file else None
        except OSError:
            data = None
        key = os.fsencode(os.path.relpath(file, folder)).decode("utf-8", "replace") if file else None
        yield key, data, caption, caption_short


# ---------------------------------------------------------------------------------------------------------------------
# Pictures: any image file -> squares


class Drop(Exception):
    """A row that is left out; the text is the reason under which it is counted."""


MAX_CAPTION = 10_000  # characters; an encoder reads 256 tokens, about 1,200. What is longer is no caption
BLANK = re.compile(r"[\s\x00-\x1f\x7f\ufeff]+")  # in a caption: spaces, lines, control characters, byte-order marks
UNUSABLE = ("unreadable", "missing file", "too large", "too small")  # reasons of which a shard has 1% at the most


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
    except MemoryError:  # the machine's fault, not the file's
        raise
    except Exception:  # Pillow's readers raise almost anything on damaged files
        raise Drop("unreadable") from None
    if min(image.size) < min_scale * size:
        raise Drop("too small")
    try:
        # a JPEG far too large is decoded at 1/2, 1/4 or 1/8, to no less than twice `size`: our own filter decides the rest
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
    except MemoryError:
        raise
    except Exception:  # as above
        raise Drop("unreadable") from None


def crop_and_encode(image: Image.Image, size: int, file_format: str, quality: int) -> bytes:
    """The centre square of `image`, resized with antialiasing to size x size px, as a JPEG or PNG file."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    x = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1)[None]  # [1, 3, S, S]
    if side != size:  # torch's uint8 bicubic: Pillow's result to two grey levels, in an eighth of its time
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    image, buffer = Image.fromarray(x[0].permute(1, 2, 0).numpy()), io.BytesIO()  # without the source's profile and comments
    if file_format == "jpeg":
        # 4:4:4: the model is trained on pixels, and half-resolution colour would teach it blurred colour edges
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def first_sentence(caption: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[^a-z])", caption, maxsplit=1)[0]  # "vs. a", "e.g. one" do not end a sentence


def make_rows(read: Callable[..., Iterator[tuple]], settings: dict, source: str, part: Part, dropped: Counter) -> Iterator[dict]:
    """The rows of a part for `write_dataset`; what is left out is counted in `dropped` by reason.

    Raises UserError if more than 1% of a part of 100 rows or more is unusable: that is a damaged source, not a few bad images.
    """
    seen, first = set(), None
    for number, (key, data, caption, caption_short) in enumerate(read(*part.content)):
        tick()
        try:
            if len(caption) > MAX_CAPTION:
                raise Drop("caption too long")
            caption, caption_short = (BLANK.sub(" ", text).strip() for text in (caption, caption_short[:MAX_CAPTION]))
            if not caption:
                raise Drop("empty caption")
            if data is None:
                raise Drop("missing file")
            digest = hashlib.sha256(data).digest()[:16]
            if digest in seen:
                raise Drop("duplicate")
            image = decode_rgb(data, max(settings["sizes"]), settings["min_scale"])
            images = {size: crop_and_encode(image, size, settings["format"], settings["quality"]) for size in settings["sizes"]}
        except Drop as drop:
            dropped[str(drop)] += 1
            first = first or (f"row {number}: {drop}" if str(drop) in UNUSABLE else None)
            continue
        seen.add(digest)
        yield {"key": digest.hex() if key is None else key, "images": images, "caption": caption,
               "caption_short": caption_short or first_sentence(caption), "source": source, "digest": digest}
    unusable = sum(dropped[reason] for reason in UNUSABLE)
    if part.rows >= 100 and unusable > settings["max_unusable"] * part.rows:
        raise UserError(f"{part.name}: {unusable} of {part.rows} images are unusable ({describe(dropped)}; the first is {first}), "
                        f"more than {settings['max_unusable']:.0%}: get it again, or allow more with --max_unusable")


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


class Stopped(Exception):
    """Another worker has failed, so this one ends early."""


tick: Callable[[], None] = lambda: None  # counts a row as done; set where there is a progress bar to move


def start_worker(done, stop) -> None:
    """What a worker does first: one thread, no reaction to Ctrl-C, death with its parent, and `tick` through shared memory."""
    global tick
    end_with_parent()  # a killed command must not go on without its lock
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def tick():
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise Stopped


def cores() -> int:
    """How many cores this process may use; macOS does not say, so there it is how many the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(tasks: Iterable[tuple], workers: int, bar: tqdm) -> Iterator:
    """Yield function(*arguments) for every task (function, *arguments) as they end; 0 workers: in this process, in order.

    The first exception ends the others and is raised here. `tasks` are taken as workers become free; each row that a
    task ticks off moves `bar`.
    """
    global tick
    if not workers:
        tick = bar.update
        yield from (function(*arguments) for function, *arguments in tasks)
        return
    context = get_context("fork")
    done, stop, shown = context.Value("q", 0), context.Event(), 0
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(done, stop))
    tasks, pending = iter(tasks), set()
    try:
        while True:
            pending |= {pool.submit(*task) for task in islice(tasks, 2 * workers - len(pending))}
            if not pending:
                return
            ended, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = done.value
            bar.update(now - shown)
            shown = now
            for future in ended:
                yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for memory: try fewer --workers") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Shards: what train_prx.py reads

COLUMNS = Features({
    "key": Value("string"), "image": Value("binary"), "height": Value("int32"), "width": Value("int32"),
    "caption": Value("string"), "caption_short": Value("string"), "source": Value("string"),
})
BATCH_BYTES = 16 << 20  # rows held back before they are written: all the memory a shard needs
PROMPTS = 16  # captions for the sample grids, held-out ones first


class ShardWriter:
    """Writes rows to one Arrow file."""

    def __init__(self, file: Path):
        self.file, self.rows, self.batch, self.batch_bytes = file, 0, [], 0
        self.writer = pa.ipc.new_stream(str(file), COLUMNS.arrow_schema)

    def add(self, row: dict) -> None:
        self.batch.append(row)
        self.rows += 1
        self.batch_bytes += len(row["image"])
        if self.batch_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.batch, schema=COLUMNS.arrow_schema))
        self.batch, self.batch_bytes = [], 0

    def close(self) -> dict:
        """Write what is held; return what the manifest says of a shard."""
        if self.batch:
            self._flush()
        self.writer.close()
        return describe_shard(self.file, self.rows)


def describe_shard(file: Path, rows: int) -> dict:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size, "rows": rows}


@contextmanager
def locked(path: Path, what: Path, patience: float = 1) -> Iterator[None]:
    """Hold the lock file `path`; raises UserError if another process does, for `patience` seconds, or for an OSError inside."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path, timeout=patience):  # the workers of a command killed just now may hold it a moment longer
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process is writing {what}: wait for it, or name another folder with --out") from None
    except OSError as error:
        raise cannot_write(what, error) from error


def cannot_write(what: Path, error: Exception) -> UserError:
    kept = "; what is done is kept, and the same command continues" if what.is_dir() or Path(f"{what}.partial/parts").is_dir() else ""
    return UserError(f"cannot write {what}: {first_line(error)}{kept}")


def write_part(folder: Path, index: int, part: Part, sizes: list[int], make: Callable) -> None:
    """Write the rows of a part to folder/<index>, one shard a size; the folder is there only when it is complete."""
    aside, dropped, digests = folder / f".{index:05d}", Counter(), []
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    prompts = {True: [], False: []}  # held-out captions and others
    writers = {size: ShardWriter(aside / f"{size}.arrow") for size in sizes}
    for row in make(part, dropped):
        for size, writer in writers.items():
            writer.add({"image": row["images"][size], "height": size, "width": size} |
                       {name: row[name] for name in ("key", "caption", "caption_short", "source")})
        digests.append(row["digest"])
        some = prompts[is_held_out(row["key"])]
        some += [row["caption"]] if len(some) < PROMPTS else []
    (aside / "digests").write_bytes(b"".join(digests))
    write_json(aside / "part.json", {
        "name": part.name, "fingerprint": part.fingerprint, "source_rows": part.rows, "rows": len(digests), "dropped": dropped,
        "held_out": prompts[True], "others": prompts[False],
        "shards": {size: writer.close() for size, writer in writers.items()}})
    os.rename(aside, folder / f"{index:05d}")


def find_repeated(digests: bytes) -> np.ndarray:
    """Which of the 16-byte digests have occurred before: bool [rows]. Vectorised, since a set of 8.7 million takes a GB."""
    words = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort(words.T)  # stable: of equal ones the first in order is the first in the data
    repeated = np.zeros(len(words), bool)
    repeated[order[1:][(words[order[1:]] == words[order[:-1]]).all(1)]] = True
    return repeated


def join_parts(folder: Path, sizes: list[int], parts: int) -> dict:
    """Move the parts' shards to <size>/, without images that an earlier part has; return the manifest's counts."""
    records = [json.loads((folder / "parts" / f"{i:05d}" / "part.json").read_text()) for i in range(parts)]
    repeated = find_repeated(b"".join((folder / "parts" / f"{i:05d}" / "digests").read_bytes() for i in range(parts)))
    repeated = np.split(repeated, np.cumsum([record["rows"] for record in records])[:-1])
    dropped, shards = sum((Counter(record["dropped"]) for record in records), Counter()), {}
    dropped.update({"duplicate": int(sum(mask.sum() for mask in repeated))})
    for size in sizes:
        (folder / str(size)).mkdir(exist_ok=True)
        for i, (record, skip) in enumerate(zip(records, repeated)):
            part, shard = folder / "parts" / f"{i:05d}" / f"{size}.arrow", folder / str(size) / f"data-{i:05d}.arrow"
            if skip.all():
                continue
            if part.exists() and skip.any():  # a part that is not there was moved before this command was killed
                writer = ShardWriter(part.with_suffix(".once"))
                for row, repeats in zip(read_rows(part), skip):
                    if not repeats:
                        writer.add(row)
                writer.close()
                os.rename(writer.file, shard)
                part.unlink()
            elif part.exists():
                os.rename(part, shard)
            info = describe_shard(shard, int((~skip).sum())) if skip.any() else record["shards"][str(size)]
            shards[f"{size}/{shard.name}"] = info
        names = [name.partition("/")[2] for name in shards if name.startswith(f"{size}/")]
        DatasetInfo(features=COLUMNS).write_to_directory(str(folder / str(size)))
        # the fingerprint keys datasets' caches: made from the contents, so equal data has equal caches and equal bytes
        write_json(folder / str(size) / "state.json", {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": sha256_of(json.dumps([shards[f"{size}/{name}"] for name in names]))[:16],
            "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
            "_split": None,
        })
    captions = [caption for kind in ("held_out", "others") for record in records for caption in record[kind]]
    return {"rows": sum(record["rows"] for record in records) - int(sum(mask.sum() for mask in repeated)), "shards": shards,
            "dropped": {reason: count for reason, count in sorted(dropped.items()) if count}, "prompts": captions[:PROMPTS]}


def write_dataset(out: Path, parts: Callable[[Callable], Iterator[Part]], make: Callable[[Part, Counter], Iterator[dict]], *,
                  settings: dict, prompts: list[str] | None = None, workers: int = 0, total: int | None = None) -> dict:
    """Write a source to `out`: shards for each size, the same rows in the same order, and manifest.json, which is returned.

    `parts(finished)` yields the source's stretches; finished(number, name, fingerprint) is the number of source rows of one
    that is done already, else None. `make(part, dropped)` yields its rows, {"key", "images": {size: JPEG or PNG bytes of
    size x size}, "caption", "caption_short", "source", "digest": 16 bytes that equal images share}, and counts what it
    leaves out. `settings` go into the manifest and decide the bytes; "sizes" is in px. `prompts` are the captions of the
    sample grids; by default some of the rows', held-out ones first. `total` is for the progress bar. The parts are made in
    out.partial, which a later call continues. Raises UserError if `out` exists, is being written, or cannot be written,
    if other settings began it, or if no row is left.
    """
    out, folder = Path(out), Path(f"{out}.partial")
    if set(",:") & set(str(out)):
        raise UserError(f"--out={out}: the flag --data of train_prx.py separates folders and weights by ',' and ':', so no name "
                        "may have them")
    settings = json.loads(json.dumps(settings))  # as they are read back
    with locked(Path(f"{out}.lock"), out):
        if out.exists():
            raise UserError(f"{out} exists and is never overwritten: name another folder with --out, or delete it")
        begun, manifest = folder / "settings.json", folder / "manifest.json"
        stored = next((json.loads(file.read_text()) for file in (manifest, begun) if file.exists()), settings)
        if {name: stored.get(name) for name in settings} != settings:
            raise UserError(f"{folder} was begun with other settings, which are in its settings.json: repeat those to continue, "
                            "or delete it")
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        write_json(begun, settings)
        if not manifest.exists():
            try:
                counts = make_parts(folder, parts, make, settings["sizes"], workers, tqdm(desc=str(out), total=total, unit=" images"))
                if not counts["rows"]:
                    shutil.rmtree(folder / "parts")
                    raise UserError(f"no image of {settings['source']} is left; dropped: {describe(counts['dropped'])}")
            except Exception:  # raised again: only what nobody could continue is removed
                if not any(folder.glob("parts/[0-9]*")):
                    shutil.rmtree(folder)  # nothing to continue
                raise
            write_json(manifest, {**settings, **counts} | ({"prompts": prompts} if prompts else {}))
        # from here on a killed command has only these steps left
        for rest in ("parts", "files"):
            shutil.rmtree(folder / rest, ignore_errors=True)
        begun.unlink()
        os.rename(folder, out)
    return read_manifest(out)


def make_parts(folder: Path, parts: Callable, make: Callable, sizes: list[int], workers: int, bar: tqdm) -> dict:
    """Make those parts in folder/parts that are not there, then join all of them; returns the manifest's counts."""
    done = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("parts/[0-9]*/part.json")}
    count = 0

    def finished(index: int, name: str, fingerprint: str) -> int | None:
        record = done.get(index, {})
        return record["source_rows"] if (record.get("name"), record.get("fingerprint")) == (name, fingerprint) else None

    def missing() -> Iterator[tuple]:
        nonlocal count
        for part in parts(finished):
            if finished(count, part.name, part.fingerprint) is not None:
                bar.initial += part.rows  # the rate is that of this command alone
                bar.update(part.rows)
            else:
                shutil.rmtree(folder / "parts" / f"{count:05d}", ignore_errors=True)  # the source has changed
                yield write_part, folder / "parts", count, part, sizes, make
            count += 1

    with bar:
        for _ in in_workers(missing(), workers, bar):
            pass
    return join_parts(folder, sizes, count)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON, aside and then renamed, so that the file is never there half-written."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.rename(aside, path)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe(dropped: dict[str, int] | None) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in (dropped or {}).items() if count) or "nothing"


# ---------------------------------------------------------------------------------------------------------------------
# Build


def build(args) -> None:
    downloads = Path(f"{args.out}.partial/files")
    settings = {"source": args.source, "revision": None, "sizes": args.size, "format": args.format, "quality": args.quality,
                "min_scale": args.min_scale, "max_unusable": args.max_unusable, "limit": args.limit}
    limit = args.limit or 10**12
    if args.source in SETS:
        source = SETS[args.source]
        if args.input and not args.input.is_dir():
            raise UserError(f"no folder {args.input}: --input takes the folder that {source.repo} was downloaded into")
        files, fetch, settings["revision"] = find_set(source, args.input, args.revision, downloads)
        # counted first, so that a damaged file shows now and not hours into the build
        total = source.rows if not args.input else sum(parquet_rows(fetch(name), source) for name in files)
        parts = partial(set_parts, source, files, fetch, limit)
        read, name = partial(read_set, source, args.input is not None), args.source
    else:
        folder = Path(args.source).resolve()
        if not args.source or not folder.is_dir():
            raise UserError(f"no folder {args.source}: --source takes a folder of pictures with captions, or {', '.join(SETS)}")
        if args.input or args.revision:
            raise UserError(f"--input and --revision go with --source={'|'.join(SETS)}: a folder is its own input")
        rows = partial(folder_rows, folder, args.caption_column.split(","))
        settings["source"], settings["revision"] = folder.name, "folder"
        total = sum(1 for _ in rows())
        parts = lambda finished: folder_parts(islice(rows(), limit), finished)
        read, name = partial(read_folder, folder), folder.name
    total = min(total, limit)
    manifest = write_dataset(args.out, parts, partial(make_rows, read, settings, name), settings=settings, workers=args.workers,
                             total=total)
    print(f"{args.out}: {manifest['rows']} of {manifest['rows'] + sum(manifest['dropped'].values())} images at "
          f"{', '.join(map(str, args.size))} px; dropped: {describe(manifest['dropped'])}")


# ---------------------------------------------------------------------------------------------------------------------
# Embed: text latents


def embed_texts(encoder: T5GemmaText, texts: list[str], bar: tqdm | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of `texts` one after the other, bf16 [sum of lengths, D], and where each ends, int64 [texts]."""
    ids = encoder.tokenize(texts)
    ends = torch.tensor([len(tokens) for tokens in ids], dtype=torch.int64).cumsum(0)
    latents = torch.empty(int(ends[-1]), encoder.dim, dtype=torch.bfloat16)
    filled = 0
    for pack in encoder.packs(ids):
        encoded = encoder.encode(pack)
        latents[filled : filled + len(encoded)] = encoded
        filled += len(encoded)
        if bar:
            bar.update(len(pack))
    return latents, ends


def encoder_revision(encoder: str) -> str:
    """The commit of an encoder on the hub, or the sha256 of a local one's files."""
    if Path(encoder).is_dir():
        return folder_revision(Path(encoder))
    return load_pretrained(AutoConfig, encoder)._commit_hash


def embed(args) -> None:
    """Latents of every caption, a file a shard. Any number of processes share the work: each takes shards that no other holds."""
    read_manifest(args.data)  # before the encoder, which may be a download, and a lock where there is no data
    name, revision = text_folder(args.encoder), encoder_revision(args.encoder)
    folder, begun = args.data / name, args.data / name / "settings.json"
    device = torch.device(usable_device(), from_launcher("LOCAL_RANK", 0))
    computed = resolve_precision(Config(), device).precision  # whoever goes on where another machine began computes as it did
    settings = {"encoder": args.encoder, "revision": revision, "tokens": args.text_tokens, "dtype": "bfloat16", "computed": computed}

    def manifest_lock():
        return locked(args.data / ".lock", folder, patience=60)

    with manifest_lock():
        manifest = read_manifest(args.data)
        if not folder.exists() and manifest.get("text", {}).pop(name, None):  # deleted, as a message of ours asks for
            write_json(args.data / "manifest.json", manifest)
        done = manifest.get("text", {}).get(name)
        stored = done or (json.loads(begun.read_text()) if begun.exists() else settings)
        if any(stored[key] != settings[key] for key in ("revision", "tokens")):
            raise UserError(f"{folder} was made with {stored['encoder']}, revision {stored['revision']}, and {stored['tokens']} tokens: "
                            "delete it to make it again")
        if not done:
            folder.mkdir(exist_ok=True)
            write_json(begun, settings)
    shards = {Path(shard).stem: args.data / shard for shard in manifest["shards"] if shard.startswith(f"{manifest['sizes'][0]}/")}
    records = {stem: folder / f"{stem}.json" for stem in ["prompts", *shards]}
    if not done:
        cfg = Config(text_encoder=args.encoder, text_tokens=args.text_tokens, precision=stored.get("computed", computed))
        encoder = T5GemmaText(cfg, device)
        left = [stem for stem, record in records.items() if not record.exists()]
        captions = 2 * sum(manifest["shards"][f"{manifest['sizes'][0]}/{stem}.arrow"]["rows"] for stem in left if stem in shards)
        with tqdm(desc=str(folder), total=captions // world_size(), unit=" captions",
                  disable=os.environ.get("RANK", "0") != "0") as bar:
            for stem in left:
                if begun.exists() and not records[stem].exists():
                    embed_shard(folder, stem, shards.get(stem), manifest, encoder, bar)
    with manifest_lock():
        manifest = read_manifest(args.data)  # another process may have written it meanwhile
        if name not in manifest.get("text", {}):
            if not all(record.exists() for record in records.values()):
                return  # other processes are at work on the rest, and the last of them ends this
            files = {f"{stem}.safetensors": json.loads(record.read_text()) for stem, record in records.items()}
            manifest.setdefault("text", {})[name] = {**settings, "computed": cfg.precision, "dim": encoder.dim, "shards": files}
            write_json(args.data / "manifest.json", manifest)
        for rest in [begun, *records.values(), *folder.glob(".*")]:  # and what a killed command has left
            rest.unlink(missing_ok=True)
    print(f"{folder}: latents of {manifest['rows']} rows by {args.encoder}, revision {revision[:12]}")


def embed_shard(folder: Path, stem: str, shard: Path | None, manifest: dict, encoder: T5GemmaText, bar: tqdm) -> None:
    """Write folder/<stem>.safetensors and its record, unless that is done or another process is doing it.

    `shard` None: of the empty prompt and the sample grids' prompts, so that training needs no encoder. Otherwise the
    latents are held in memory until the shard is done: 3 GB for 5,000 captions of 128 tokens, 6 GB for the longest.
    """
    record, lock = folder / f"{stem}.json", folder / f".{stem}.lock"
    try:
        with suppress(Timeout), FileLock(lock, timeout=0):
            try:
                if record.exists():
                    return
                if shard is None:
                    latents, ends = embed_texts(encoder, ["", *manifest["prompts"]])
                    tensors, rows = {"latents": latents, "ends": ends}, len(ends)
                else:
                    with pa.memory_map(str(shard)) as source, pa.ipc.open_stream(source) as stream:
                        captions = stream.read_all().select(["caption", "caption_short"]).to_pydict()
                    tensors, rows = {}, len(captions["caption"])
                    for kind, texts in captions.items():
                        tensors[kind], tensors[f"{kind}_ends"] = embed_texts(encoder, texts, bar)
                file, aside = folder / f"{stem}.safetensors", folder / f".{stem}.{os.getpid()}"
                save_file(tensors, aside)
                shutil.copymode(shard or folder / "settings.json", aside)  # else only its owner could read it
                os.rename(aside, file)
                write_json(record, describe_shard(file, rows))
            finally:
                lock.unlink(missing_ok=True)  # while it is held: without it, it may be another's
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error


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


def file_problems(file: Path, shard: dict) -> Iterator[str]:
    if not file.exists():
        yield f"{file}: missing"
    elif file_sha256(file) != shard["sha256"]:
        yield f"{file}: changed, its sha256 is not the manifest's"


def check_shard(file: Path, shard: dict, size: int) -> tuple[str, list[str], str]:
    """The shard's name, its problems, and a hash of its keys in order."""
    problems, keys, count = list(file_problems(file, shard)), hashlib.sha256(), 0
    if not file.exists():
        return file.name, problems, ""
    try:
        for row in read_rows(file):
            tick()
            problems += (f"{file} row {count}: {problem}" for problem in row_problems(row, size))
            keys.update(row["key"].encode() + b"\n")
            count += 1
    except Stopped:
        raise
    except Exception as error:  # whatever a damaged file makes its readers raise
        problems.append(f"{file} row {count}: cannot be read ({first_line(error)})")
    if count != shard["rows"]:
        problems.append(f"{file}: {count} rows, the manifest says {shard['rows']}")
    return file.name, problems, keys.hexdigest()


def check_latents(file: Path, shard: dict, dim: int) -> tuple[str, list[str], str]:
    """The name and the problems of a file of text latents."""
    problems = list(file_problems(file, shard))
    if not problems:
        tensors = load_file(file)
        for name in ("caption", "caption_short") if "caption" in tensors else ("latents",):
            latents, ends = tensors[name], tensors["ends" if name == "latents" else f"{name}_ends"]
            if len(ends) != shard["rows"] or (ends.diff() < 0).any() or latents.shape != (ends[-1], dim):
                problems.append(f"{file}: {name} is {list(latents.shape)} for {len(ends)} rows, the manifest says {shard['rows']} of {dim}")
            elif not latents.isfinite().all():
                problems.append(f"{file}: {name} is not finite")
    return file.name, problems, ""


def find_problems(data: Path, manifest: dict, workers: int = 0) -> Iterator[str]:
    """Yield one line, with file and row, for each way in which `data` is not what its manifest says."""
    tasks = [(check_shard, data / name, shard, int(name.partition("/")[0])) for name, shard in manifest["shards"].items()]
    for folder, text in manifest.get("text", {}).items():
        tasks += [(check_latents, data / folder / name, shard, text["dim"]) for name, shard in text["shards"].items()]
        images = [shard["rows"] for name, shard in manifest["shards"].items() if name.startswith(f"{manifest['sizes'][0]}/")]
        if [shard["rows"] for name, shard in text["shards"].items() if name != "prompts.safetensors"] != images:
            yield f"{data / folder}: its rows are not those of the images"
    orders: dict[str, set[str]] = {}
    with tqdm(desc=f"check {data}", total=manifest["rows"] * len(manifest["sizes"]), unit=" images") as bar:
        for name, problems, order in in_workers(tasks, workers, bar):
            yield from problems
            orders.setdefault(name, set()).update([order] if order else [])
    for size in manifest["sizes"]:
        total = sum(shard["rows"] for name, shard in manifest["shards"].items() if name.startswith(f"{size}/"))
        if total != manifest["rows"]:
            yield f"{data / str(size)}: {total} rows, the manifest says {manifest['rows']}"
        names = [name.partition("/")[2] for name in manifest["shards"] if name.startswith(f"{size}/")]
        try:
            if [Path(file["filename"]).name for file in load_from_disk(str(data / str(size))).cache_files] != names:
                yield f"{data / str(size)}/state.json: lists other shards than the manifest"
        except Exception as error:
            yield f"{data / str(size)}: datasets cannot open it ({first_line(error)})"
    if any(len(order) > 1 for order in orders.values()):
        yield f"{data}: the sizes do not hold the same rows in the same order"


def check(args) -> None:
    manifest = read_manifest(args.data)
    problems = 0
    for problem in find_problems(args.data, manifest, args.workers):
        tqdm.write(problem)
        problems += 1
    if problems:
        raise UserError(f"{args.data}: {problems} problem(s), listed above; what is wrong with shards: build them again into another "
                        "folder; with latents: delete their folder and run embed again")
    latents = "".join(f"; latents by {text['encoder']}" for text in manifest.get("text", {}).values())
    print(f"{args.data}: OK, {manifest['rows']} rows at {', '.join(map(str, manifest['sizes']))} px in "
          f"{len(manifest['shards'])} shards{latents}; dropped when built: {describe(manifest['dropped'])}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def sizes(text: str) -> list[int]:
    values = [int(value) for value in text.split(",") if re.fullmatch("[1-9][0-9]{0,4}", value)]
    if len(values) < text.count(",") + 1 or len(set(values)) < len(values):
        raise ArgumentTypeError(f"{text[:80]!r} is not a list of different sides in px, such as 512,1024")
    return values


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A parser of whole numbers (int) or numbers (float) in [low, high]."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            wanted = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {wanted}")
        return value
    return parse


def main(argv: list[str]) -> None:
    parser = Parser(prog="data_prep.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    processes = cores()

    command = commands.add_parser("build", help="a set of captioned pictures -> shards")
    command.set_defaults(run=build)
    command.add_argument("--source", required=True, help=f"{', '.join(SETS)}; or a folder of pictures with metadata.csv, .jsonl or "
                         ".parquet, or with name.txt beside name.jpg")
    command.add_argument("--out", required=True, type=Path, help="folder to write, not there yet")
    command.add_argument("--size", required=True, type=sizes, help="sides of the square images, px, such as 512,1024")
    command.add_argument("--input", type=Path, help="folder with the set's parquet files, already downloaded; else they come from the hub")
    command.add_argument("--revision", help="commit, branch or tag of the set on the hub; with --input, what the manifest says")
    command.add_argument("--limit", type=number(int, 0), default=0, help="rows of the source to read, for a trial; 0: all")
    command.add_argument("--format", choices=["jpeg", "png"], default="jpeg", help="how the images are stored")
    command.add_argument("--quality", type=number(int, 1, 100), default=95, help="of the JPEGs, 1 to 100")
    command.add_argument("--caption_column", default="text,caption,prompt",
                         help="column of a folder's metadata; of several, the first that is there")
    command.add_argument("--min_scale", type=number(float, 0, 100), default=0.5,
                         help="an image whose short side is below this times the largest size is dropped as too small")
    command.add_argument("--max_unusable", type=number(float, 0, 1), default=0.01,
                         help=f"share of a shard's images, 0 to 1, that may be {', '.join(UNUSABLE)}; more is an error")
    command.add_argument("--workers", type=number(int, 0), default=processes, help="processes; 0: none but this one")

    command = commands.add_parser("embed", help="captions -> text latents, so that training needs no text encoder")
    command.set_defaults(run=embed)
    command.add_argument("--data", required=True, type=Path, help="folder that build wrote")
    command.add_argument("--encoder", default=Config().text_encoder, help="hub id or folder of a T5Gemma")
    command.add_argument("--text_tokens", type=number(int, 1), default=Config().text_tokens, help="captions are cut here")

    command = commands.add_parser("check", help="verify checksums, row counts, images, captions and latents")
    command.set_defaults(run=check)
    command.add_argument("--data", required=True, type=Path, help="folder that build or scenes.py wrote")
    command.add_argument("--workers", type=number(int, 0), default=processes, help="processes; 0: none but this one")
    if argv and argv[0] in commands.choices:  # straight to its own parser, which then names the nearest of its flags
        args = commands.choices[argv[0]].parse_args(argv[1:])
    else:
        args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_main(main, every_rank=True)
