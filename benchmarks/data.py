"""How fast rows become batches: shards -> decoded images and text latents, in images/s of one reader process.

    python benchmarks/data.py [--rows=512] [--sizes=512,1024] [--rounds=5]

Three arms in one run, alternating, from the eleventh batch on:

    decode   Pillow's JPEG decoder alone, on bytes in memory, in this process: the bound
    images   train_prx.load_chunks, as training runs it, of data without latents
    latents  the same with the text latents of every caption

The pictures have the spectrum of photographs (amplitude 1/f) and are stored by data_prep.py. Latents are random bf16 of
the record's 2304 dims, 16 to 256 tokens a caption, 128 on average.
"""
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

import data_prep  # noqa: E402
from train_prx import Chunks, Config, Parser, Stage, load_chunks, read_manifest, run_main  # noqa: E402

BATCH, DIM, SKIP = 16, 2304, 10  # the first batches are not counted: readers start
GOAL = 300  # images/s of a reader at 512px with latents


def picture(seed: int, side: int) -> Image.Image:
    """A colour picture with the amplitude spectrum of photographs: 1/f, and colour weaker than luminance."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    f[0, 0] = np.inf
    y, u, v = (np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / f**1.4) for _ in range(3))
    y, u, v = (x / x.std() for x in (y, u, v))
    x = 128 + 50 * np.stack([y + 0.3 * u, y - 0.1 * u - 0.1 * v, y + 0.3 * v], -1)
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def make_source(folder: Path, rows: int) -> None:
    """`rows` rows at 1024px in the layout of flux_generated; 64 pictures, each row a shifted copy of one."""
    folder.mkdir()
    pictures, table = [np.asarray(picture(seed, 1024)) for seed in range(min(rows, 64))], []
    for i in range(rows):
        buffer, shifted = io.BytesIO(), np.roll(pictures[i % len(pictures)], 16 * (i // len(pictures)), axis=1)
        Image.fromarray(shifted).save(buffer, "JPEG", quality=90)
        table.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption_caption": f"Picture {i} of noise."})
    for first in range(0, rows, 128):
        pq.write_table(pa.Table.from_pylist(table[first : first + 128]), folder / f"train-{first:05d}.parquet")


def make_latents(data: Path, encoder: str) -> None:
    """Random latents where data_prep.py embed would put them."""
    manifest, rng, infos = read_manifest(data), np.random.default_rng(0), {}
    folder = data / f"text-{encoder}"
    folder.mkdir()
    shards = data_prep.shards_of(manifest, manifest["sizes"][0])
    rows_of = {"prompts": 1 + len(manifest["prompts"])} | {Path(name).stem: shards[name]["rows"] for name in shards}
    for stem, rows in rows_of.items():
        kinds, tensors = {"caption": "caption_ends", "caption_short": "caption_short_ends"}, {}
        for kind, ends in kinds.items() if stem != "prompts" else [("latents", "ends")]:
            tensors[ends] = torch.from_numpy(np.clip(rng.normal(128, 40, rows), 16, 256).astype(np.int64).cumsum())
            tensors[kind] = torch.randn(int(tensors[ends][-1]), DIM).bfloat16()
        file = folder / f"{stem}.safetensors"
        save_file(tensors, file)
        infos[file.name] = data_prep.describe_shard(file, rows)
    text = {"encoder": encoder, "revision": "random", "tokens": 256, "dim": DIM, "shards": infos}
    manifest["text"] = {folder.name: text}
    (data / "manifest.json").write_text(json.dumps(manifest))


def rate(batches: Iterator, count: int) -> float:
    """Images a second of `count` batches, after the first ones."""
    for _ in range(SKIP):
        next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - begun)


def main(argv: list[str]) -> None:
    parser = Parser(prog="benchmarks/data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="pictures to make")
    parser.add_argument("--sizes", default="512,1024", help="sides, px")
    parser.add_argument("--rounds", type=int, default=5, help="how often each arm is timed")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{os.cpu_count()} cores, {name}, torch {torch.__version__}, Pillow {Image.__version__}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        source, data = Path(scratch, "source"), Path(scratch, "data")
        make_source(source, args.rows)
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            data_prep.main(["build", "--source=flux_generated", f"--input={source}", f"--out={data}",
                            f"--size={args.sizes}", "--workers=1"])
        seconds = time.perf_counter() - begun
        print(f"build of 1024px JPEGs to {args.sizes}px: {args.rows / seconds:.0f} images/s with one worker")
        make_latents(data, "random")
        for side in map(int, args.sizes.split(",")):
            chunks = {}
            for arm, encoder in (("images", "builtin"), ("latents", "random")):
                cfg = Config(data=str(data), text_encoder=encoder, stages=(Stage(side, 10**6, BATCH, 0),),
                             micro_batch=BATCH, workers=1)
                chunks[arm] = Chunks(cfg, cfg.stages[0], 0)
            rows = chunks["images"].sets[0].rows
            files = [rows[i]["image"] for i in range(len(rows))]
            epoch = len(files) // BATCH

            def decode() -> Iterator:
                for first in itertools.count(0, BATCH):
                    yield [np.asarray(Image.open(io.BytesIO(files[i % len(files)])).convert("RGB"))
                           for i in range(first, first + BATCH)]

            rates = {"decode": [], "images": [], "latents": []}
            for _ in range(args.rounds):
                for arm, values in rates.items():
                    order = list(range(epoch + SKIP + 4))
                    batches = decode() if arm == "decode" else load_chunks(chunks[arm], order, device)
                    values.append(rate(batches, epoch))
                    batches.close()
            size = statistics.mean(map(len, files)) / 1e3
            print(f"{side}px, JPEG of {size:.0f} KB, batches of {BATCH}, {epoch * BATCH} images a round")
            for arm, values in rates.items():
                share = statistics.median(values) / statistics.median(rates["decode"])
                goal = f"; the goal is {GOAL}" if (side, arm) == (512, "latents") else ""
                print(f"  {arm:8} {statistics.median(values):5.0f} images/s  ({min(values):.0f} to {max(values):.0f})  "
                      f"{share:.0%} of decode{goal}")


if __name__ == "__main__":
    run_main(main)
