"""How fast rows become batches: shards -> decoded images and text latents on the device, and pictures -> shards.

    python benchmarks/data.py [--rows=384] [--sizes=512,1024] [--rounds=5]

Three arms in one run, alternating, each with one reader process, in images/s:

    decode   torchvision's JPEG decoder alone, on bytes in memory: the bound
    plain    what one would write first: `datasets` rows, Pillow, a map-style DataLoader with its default collate; no latents
    ours     train_prx.load_chunks and make_batch, as training runs them, latents of the record's encoder included

The pictures have the spectrum of photographs (amplitude 1/f) and are stored by data_prep.py itself. Latents are random bf16
of 2304 dims, 16 to 256 tokens a caption, 128 on average. Then the rate of latents alone, from the page cache and from the
disk, the memory of the reader over three epochs, and the rate of the build. Nothing is kept.
"""
import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
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


def make_latents(data: Path, encoder: str) -> int:
    """Random latents where data_prep.py embed would put them; returns their bytes."""
    manifest, rng = read_manifest(data), np.random.default_rng(0)
    folder, files, total = data / text_folder(encoder), {}, 0
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
            total += tensors["caption"].nbytes
            write(Path(name).with_suffix(".safetensors").name, tensors, shard["rows"])
    manifest["text"] = {folder.name: {"encoder": encoder, "revision": "random", "tokens": 256, "dim": DIM, "shards": files}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    return total


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


def resident(pid: int | str = "self") -> int:
    """Bytes of a process that no other shares."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Dirty", "Private_Clean")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=384, help="rows of the data set")
    parser.add_argument("--sizes", default="512,1024", help="px, comma separated")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over the arms; medians are shown")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = next(line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name"))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{os.cpu_count()} x {cpu.strip()}, {machine}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as scratch:
        source, data = Path(scratch) / "source", Path(scratch) / "data"
        source.mkdir()
        make_source(source, args.rows)
        for size, out in (("512", "warm"), ("512", "half"), (args.sizes, "data")):
            begun = time.perf_counter()
            data_prep.main(["build", "--source=flux_generated", f"--input={source}", f"--out={scratch}/{out}", f"--size={size}",
                            "--workers=1"])
            if out == "half":
                built = args.rows / (time.perf_counter() - begun)
        encoder = Config().text_encoder
        size_of_latents = make_latents(data, encoder)

        for side in map(int, args.sizes.split(",")):
            cfg = Config(data=str(data), stages=(Stage(side, 100, BATCH, True),), micro_batch=BATCH, workers=1)
            chunks = Chunks(cfg, cfg.stages[0], 0)
            n = len(chunks.sets[0].train) // BATCH * BATCH
            files = [torch.frombuffer(bytearray(image.as_buffer()), dtype=torch.uint8) for image in chunks.sets[0].columns["image"]][:n]
            kilobytes = statistics.mean(len(file) for file in files) / 1e3

            def decode() -> None:
                for file in files:
                    torchvision.io.decode_jpeg(file, mode=torchvision.io.ImageReadMode.RGB)

            def plain() -> None:
                loader = torch.utils.data.DataLoader(torch.utils.data.Subset(PlainRows(data / str(side)), range(n)), BATCH, shuffle=True,
                                                     num_workers=1, pin_memory=device.type == "cuda")
                for batch in loader:
                    batch["image"].to(device, non_blocking=True)

            def ours() -> None:
                for raw in load_chunks(chunks, list(range(n // BATCH)), device):
                    pass

            arms, seconds = {"decode": decode, "plain": plain, "ours": ours}, {}
            for round in range(args.rounds + 1):  # the first one warms up
                for name, arm in arms.items():
                    begun = time.perf_counter()
                    arm()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if round:
                        seconds.setdefault(name, []).append(time.perf_counter() - begun)
            print(f"{side}px, JPEG of {kilobytes:.0f} KB, {n} images a round")
            for name, times in seconds.items():
                print(f"  {name:7} {n / statistics.median(times):6.0f} images/s  ({n / max(times):.0f} to {n / min(times):.0f})"
                      f"  {statistics.median(seconds['decode']) / statistics.median(times):.0%} of decode")
        print(f"build from 1024px JPEG to 512px: {built:.0f} images/s with one worker, start-up included")


if __name__ == "__main__":
    main()
