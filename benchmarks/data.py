"""How fast rows become batches: shards -> decoded images and text latents on the device; and pictures -> shards.

    python benchmarks/data.py [--rows=768] [--sizes=512,1024] [--rounds=5]

Four arms in one run, alternating, each with one reader process, in images/s from the eleventh batch on:

    decode   torchvision's JPEG decoder alone, on bytes in memory, in this process: the bound
    plain    what one would write first: `datasets` rows, Pillow, a map-style DataLoader with its default collate; no latents
    images   train_prx.load_chunks, as training runs it, of data without latents
    ours     the same with the text latents of every caption

The pictures have the spectrum of photographs (amplitude 1/f) and are stored by data_prep.py. Latents are random bf16 of the
record's 2304 dims, 16 to 256 tokens a caption, 128 on average. On a machine without a GPU "on the device" is in memory
that the trainer sees. Then the same with two readers, latents alone, a reader's memory over three epochs, and the build.
"""
import argparse
import contextlib
import gc
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_prep  # noqa: E402
import shards  # noqa: E402
from shards import read_manifest, text_folder  # noqa: E402
from train_prx import Chunks, Config, Stage, load_chunks  # noqa: E402

BATCH, DIM = 16, 2304


def picture(seed: int, side: int) -> Image.Image:
    """A colour picture with the amplitude spectrum of photographs: 1/f, and colour weaker than luminance."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    f[0, 0] = np.inf
    y, u, v = (np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / f**1.4) for _ in range(3))
    y, u, v = (x / x.std() for x in (y, u, v))
    return Image.fromarray((128 + 50 * np.stack([y + 0.3 * u, y - 0.1 * u - 0.1 * v, y + 0.3 * v], -1)).clip(0, 255).astype(np.uint8))


def make_source(folder: Path, rows: int) -> None:
    """`rows` rows at 1024px in the layout of flux_generated; 64 pictures, each row a shifted copy of one."""
    pictures, table = [picture(seed, 1024) for seed in range(min(rows, 64))], []
    for i in range(rows):
        buffer = io.BytesIO()
        shifted = np.roll(np.asarray(pictures[i % len(pictures)]), 16 * (i // len(pictures)), axis=1)
        Image.fromarray(shifted).save(buffer, "JPEG", quality=90)
        table.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption_caption": f"Picture {i}. It shows noise."})
    for first in range(0, rows, 192):
        pq.write_table(pa.Table.from_pylist(table[first : first + 192]), folder / f"train-{first:05d}.parquet")


def make_latents(data: Path, encoder: str) -> None:
    """Random latents where data_prep.py embed would put them."""
    manifest, rng = read_manifest(data), np.random.default_rng(0)
    folder, files = data / text_folder(encoder), {}
    folder.mkdir()

    def write(name: str, tensors: dict, rows: int) -> None:
        save_file(tensors, folder / name)
        files[name] = data_prep.describe_shard(folder / name, rows)

    def latents(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        ends = torch.from_numpy(np.clip(rng.normal(128, 40, rows), 16, 256).astype(np.int64).cumsum())
        return torch.randn(int(ends[-1]), DIM).bfloat16(), ends

    write("prompts.safetensors", dict(zip(("latents", "ends"), latents(1 + len(manifest["prompts"])))), 1 + len(manifest["prompts"]))
    for name, shard in manifest["shards"].items():
        if name.startswith(f"{manifest['sizes'][0]}/"):
            tensors = {}
            for kind in ("caption", "caption_short"):
                tensors[kind], tensors[f"{kind}_ends"] = latents(shard["rows"])
            write(Path(name).with_suffix(".safetensors").name, tensors, shard["rows"])
    manifest["text"] = {folder.name: {"encoder": encoder, "revision": "random", "tokens": 256, "dim": DIM, "shards": files}}
    (data / "manifest.json").write_text(json.dumps(manifest))


class PlainRows(torch.utils.data.Dataset):
    """The first thing one writes."""

    def __init__(self, folder: Path):
        self.rows = load_from_disk(str(folder))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        image = np.array(Image.open(io.BytesIO(row["image"])).convert("RGB"))
        return {"image": torch.from_numpy(image).permute(2, 0, 1), "caption": row["caption"]}


def private_bytes(pid: int) -> int:
    """Memory of a process that is its own: without files that it maps and what it shares."""
    return sum(int(line.split()[1]) * 1024 for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Private_Dirty"))


def drop_from_cache(file: Path) -> None:
    """Ask the system to forget a file's pages, so that it is read from the disk."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SKIP = 10  # batches that are not counted: readers start, and touch their memory for the first time


def rate(batches: Iterator, count: int) -> float:
    """Images a second of `count` batches, after the first ones."""
    for _ in range(SKIP):
        next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count * BATCH / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=768, help="rows of the data set")
    parser.add_argument("--sizes", default="512,1024", help="px, comma separated")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over the arms; medians are shown")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = next(line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name"))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{os.cpu_count()} x {cpu.strip()}, {machine}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision's, of the decoder's move to torchcodec

    with tempfile.TemporaryDirectory() as scratch:
        source, data, encoder = Path(scratch) / "source", Path(scratch) / "data", Config().text_encoder
        source.mkdir()
        make_source(source, args.rows)
        for size, out in (("512", "first"), ("512", "second"), (args.sizes, "data")):  # the first one reads from the disk
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                data_prep.main(["build", "--source=flux_generated", f"--input={source}", f"--out={scratch}/{out}",
                                f"--size={size}", "--workers=1"])
            if out == "second":
                print(f"build from 1024px JPEG to 512px: {args.rows / (time.perf_counter() - begun):.0f} images/s with one worker")
        make_latents(data, encoder)

        for side in map(int, args.sizes.split(",")):
            cfg = Config(data=str(data), stages=(Stage(side, 10**6, BATCH, True),), micro_batch=BATCH, workers=1)
            chunks = Chunks(cfg, cfg.stages[0], 0)
            train = chunks.sets[0].train
            files = [torch.frombuffer(bytearray(chunks.sets[0].columns["image"][int(row)].as_buffer()), dtype=torch.uint8) for row in train]
            epoch = len(train) // BATCH

            def decode(workers: int = 1) -> Iterator:
                for first in itertools.count(0, BATCH):
                    yield [torchvision.io.decode_jpeg(files[i % len(files)], mode=torchvision.io.ImageReadMode.RGB)
                           for i in range(first, first + BATCH)] and None

            def plain(workers: int = 1) -> Iterator:
                rows = torch.utils.data.Subset(PlainRows(data / str(side)), train.tolist() * (3 + SKIP * BATCH // len(train)))
                for batch in torch.utils.data.DataLoader(rows, BATCH, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda"):
                    batch["image"].to(device, non_blocking=True)
                    yield

            def ours(workers: int = 1) -> Iterator:
                chunks.cfg = replace(cfg, workers=workers)
                yield from load_chunks(chunks, list(range(4 * epoch + 2 * SKIP)), device)

            def images(workers: int = 1) -> Iterator:
                yield from load_chunks(without, list(range(4 * epoch + 2 * SKIP)), device)

            without = Chunks(replace(cfg, text_encoder="builtin"), cfg.stages[0], 0)
            arms, rates = {"decode": decode, "plain": plain, "images": images, "ours": ours}, {}
            for _ in range(args.rounds):
                for name, arm in arms.items():
                    rates.setdefault(name, []).append(rate(arm(), epoch))
            print(f"{side}px, JPEG of {statistics.mean(map(len, files)) / 1e3:.0f} KB, batches of {BATCH}, {epoch * BATCH} images a round")
            for name, values in rates.items():
                print(f"  {name:7} {statistics.median(values):6.0f} images/s  ({min(values):.0f} to {max(values):.0f})"
                      f"  {statistics.median(values) / statistics.median(rates['decode']):.0%} of decode")
            print(f"  ours with two readers: {rate(ours(2), 2 * epoch):.0f} images/s")

            batches, memory = ours(), []
            for _ in range(3):
                for _ in range(epoch):
                    next(batches)
                memory.append([private_bytes(child.pid) >> 20 for child in multiprocessing.active_children()])
            print(f"  a reader's own memory after epochs 1, 2, 3: {', '.join(str(sum(each)) for each in memory)} MB")
            batches.close()

        latents = chunks.sets[0].latents
        for name in ("disk", "page cache"):
            if name == "disk":
                shards.open_latents.cache_clear()  # mapped pages would stay
                gc.collect()
                for file in latents.files:
                    drop_from_cache(file)
            order, slot, total = np.random.default_rng(0).permutation(args.rows), torch.empty(256, DIM, dtype=torch.bfloat16), 0
            begun = time.perf_counter()
            for row in order:
                x = latents.read(int(row), "caption")
                slot[: len(x)] = x
                total += x.nbytes
            print(f"latents in random order from the {name}: {total / (time.perf_counter() - begun) / 1e9:.1f} GB/s in one process")


if __name__ == "__main__":
    main()
