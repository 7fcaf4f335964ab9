"""What a data folder holds: checked shards of images and captions, and text latents. `data_prep.py` writes it.

    RowSet(folder, cfg, image_size)     rows to train on and rows held out, memory-mapped
    Slot, Ring                          memory that chunks of rows are read into
"""
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
import torch.nn.functional as F

COMPILE_CACHE = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
try:
    os.makedirs(COMPILE_CACHE, exist_ok=True)
except OSError:  # much of torch could not be imported then, torchvision for one; train_prx.compiler_trouble says it
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.gettempdir()

import torchvision  # noqa: E402
from torch import Tensor  # noqa: E402

HELD_OUT = 0.01  # share of rows that are never trained on


class UserError(Exception):
    """A user's mistake: `run_main` prints it as one line and exits with status 2."""


class DamagedImage(Exception):
    """An image that does not decode, though it did when the data was built."""


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def is_held_out(key: str) -> bool:
    """Whether a row is for validation: a hash of its key, so that it stays so when the data is rebuilt."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < HELD_OUT * 2**64


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a data folder; raises UserError where there is none."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no data at {folder}: make it with `python scenes.py make --out={folder}` or "
                        f"`python data_prep.py build --source=DIR --out={folder}`, or point --data elsewhere") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/manifest.json is damaged ({error}): build the data again") from None
    try:
        whole = ({"rows", "prompts", "dropped"} <= manifest.keys() and min(manifest["sizes"]) > 0
                 and all({"sha256", "bytes", "rows"} <= shard.keys() for shard in manifest["shards"].values()))
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{folder}/manifest.json is damaged (it lacks what a build writes): build the data again")
    return manifest


def check_files(folder: Path, shards: dict[str, dict], remedy: str) -> None:
    """Raise UserError, with the remedy, for a shard that is not what the manifest says.

    By its size in bytes; what is under 1 GB in all by sha256 too, which takes a second. `data_prep.py check` reads all.
    """
    hashed = sum(shard["bytes"] for shard in shards.values()) < 1 << 30
    for name, shard in shards.items():
        file = folder / name
        if not file.exists():
            raise UserError(f"{file} is missing: {remedy}")
        same = file.stat().st_size == shard["bytes"]
        if not same or hashed and file_sha256(file) != shard["sha256"]:
            raise UserError(f"{file} has changed since it was made: {remedy} (`python data_prep.py check` lists all that is wrong)")


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_folder(encoder: str) -> str:
    """The name of the folder, inside a data folder, of the text latents that `encoder` made."""
    return f"text-{Path(encoder).name}"


def folder_revision(encoder: Path) -> str:
    """The sha256 of a local encoder's files: what the commit is for one on the hub."""
    files = sorted(encoder.glob("*.json")) + sorted(encoder.glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def decode_image(data, size: int) -> Tensor:
    """A JPEG or PNG file's bytes -> uint8 [size, size, 3], scaled down where the picture is larger; raises DamagedImage."""
    data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image = torchvision.io.decode_image(data, torchvision.io.ImageReadMode.RGB)
    except RuntimeError as error:
        raise DamagedImage(str(error)) from None
    if image.shape[1:] != (size, size):
        image = F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0]
    return image.permute(1, 2, 0)  # [3, S, S] -> [S, S, 3], as it lies in memory


@functools.lru_cache(maxsize=None)
def open_latents(file: Path) -> dict[str, tuple]:
    """For each caption kind of a file, memory-mapped: its latents, to be sliced, and where each row's begin and end."""
    opened = safetensors.safe_open(file, "pt")
    return {kind: (opened.get_slice(kind), np.concatenate([[0], opened.get_tensor(f"{kind}_ends").numpy()]))
            for kind in ("caption", "caption_short")}


class TextLatents:
    """The latents of a folder's captions as `data_prep.py embed` stored them: bf16, one after the other, no padding."""

    def __init__(self, folder: Path, text: dict, prompts: list[str]):
        self.revision = text["revision"]
        self.files = [folder / name for name in text["shards"] if name != "prompts.safetensors"]
        self.first_row = np.cumsum([0, *(text["shards"][file.name]["rows"] for file in self.files)])
        stored = safetensors.torch.load_file(folder / "prompts.safetensors")
        self.prompts = dict(zip(["", *prompts], stored["latents"].tensor_split(stored["ends"][:-1])))

    def read(self, row: int, kind: str) -> Tensor:
        """Latents of a row's `caption` or `caption_short`: [its tokens, D], consecutive on disk."""
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        latents, ends = open_latents(self.files[shard])[kind]
        i = row - self.first_row[shard]
        return latents[int(ends[i]) : int(ends[i + 1])]


class RowSet:
    """One data folder at one image size: rows to train on, rows held out, and the text latents if there are any."""

    def __init__(self, folder: str, cfg, image_size: int):
        self.folder, self.image_size = folder, image_size
        self.manifest = read_manifest(folder)
        self.manifest_hash = file_sha256(Path(folder) / "manifest.json")
        usable = [size for size in sorted(self.manifest["sizes"]) if size >= image_size]
        if not usable:
            raise UserError(f"{folder} has sizes {self.manifest['sizes']}, but a stage trains at {image_size}px: "
                            f"build it again with --size={image_size}, or change --stages")
        self.stored_size = usable[0]
        shards = {name: shard for name, shard in self.manifest["shards"].items() if name.startswith(f"{self.stored_size}/")}
        check_files(Path(folder), shards, "build the data again")
        try:
            table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(f"{folder}/{name}")).read_all() for name in shards)  # not copied
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot open {folder}/{self.stored_size} ({error}): build the data again") from None
        if len(table) != self.manifest["rows"]:
            raise UserError(f"{folder}/{self.stored_size} has {len(table)} rows, its manifest says {self.manifest['rows']}: build the data again")
        self.columns = {name: table[name] for name in ("image", "caption", "caption_short", "key")}
        keys = (key for chunk in self.columns["key"].chunks for key in chunk.to_pylist())
        held_out = np.fromiter(map(is_held_out, keys), dtype=bool)
        self.train, self.held_out = (np.flatnonzero(x).astype(np.int32) for x in (~held_out, held_out))
        if len(self.train) == 0:
            raise UserError(f"{folder} has no rows to train on")
        self.latents = self.find_latents(cfg)

    def find_latents(self, cfg) -> TextLatents | None:
        """The latents by the run's encoder; raises UserError where there are only such by another one."""
        stored, encoder, name = self.manifest.get("text", {}), cfg.text_encoder, text_folder(cfg.text_encoder)
        if encoder == "builtin" or not stored:
            return None
        again = f"make them with `python data_prep.py embed --data={self.folder} --encoder={encoder}`"
        text, local = stored.get(name), Path(encoder).is_dir()
        if text is None or text["encoder"] != encoder and not local:
            others = ", ".join(text["encoder"] for text in stored.values())
            raise UserError(f"{self.folder} has text latents by {others}, not by {encoder}: {again}, or pass that --text_encoder")
        if local and folder_revision(Path(encoder)) != text["revision"]:
            raise UserError(f"{self.folder}/{name} was made by other weights than those in {encoder}: delete it and {again}")
        for flag, value, ours in (("text_dim", text["dim"], cfg.text_dim), ("text_tokens", text["tokens"], cfg.text_tokens)):
            if value != ours:
                raise UserError(f"{self.folder}/{name} was made with {flag} {value}, not {ours}: pass --{flag}={value}")
        check_files(Path(self.folder) / name, text["shards"], f"delete {self.folder}/{name} and {again}")
        return TextLatents(Path(self.folder) / name, text, self.manifest["prompts"])

    def read(self, row: int, kind: str | None = "caption") -> dict:
        """One row: image uint8 [S, S, 3], key, the caption of the given kind (None: the empty prompt), its latents or None.

        Raises DamagedImage where the image does not decode.
        """
        row, latents = int(row), None
        if self.latents:
            latents = self.latents.read(row, kind) if kind else self.latents.prompts[""]
        return {"image": decode_image(self.columns["image"][row].as_buffer(), self.image_size), "latents": latents,
                "caption": self.columns[kind][row].as_py() if kind else "", "key": self.columns["key"][row].as_py()}

    def read_held_out(self, n: int) -> Iterator[dict]:
        """The first `n` rows that are held out, without those whose image is damaged."""
        for row in self.held_out[:n]:
            with contextlib.suppress(DamagedImage):
                yield self.read(row)


# ---------------------------------------------------------------------------------------------------------------------
# Memory for chunks


class Slot:
    """Memory for a chunk of B rows: images uint8 [B, S, S, 3] and, where there are latents, [B * L, D] bf16 for all of them."""

    def __init__(self, B: int, S: int, L: int, D: int, with_latents: bool, shared: bool = False):
        def empty(shape: tuple, dtype: torch.dtype) -> Tensor:
            if not shared:
                return torch.empty(shape, dtype=dtype)
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # not in /dev/shm, which is 64 MB in a container
            return torch.frombuffer(memory, dtype=dtype).view(shape)

        self.images = empty((B, S, S, 3), torch.uint8)
        self.latents = empty((B * L, D), torch.bfloat16) if with_latents else None

    def fill(self, rows: Iterable[dict]) -> dict:
        """Copy up to B rows into the slot; returns what is not in it: captions, keys and the lengths of the latents."""
        chunk, end = {"captions": [], "keys": [], "lengths": []}, 0
        for k, row in enumerate(rows):
            self.images[k] = row["image"]
            if self.latents is not None:
                self.latents[end : end + len(row["latents"])] = row["latents"]
                chunk["lengths"].append(len(row["latents"]))
                end += len(row["latents"])
            chunk["captions"].append(row["caption"])
            chunk["keys"].append(row["key"])
        return chunk

    def view(self, chunk: dict) -> dict:
        """What `fill` returned and the tensors: images uint8 [B, 3, S, S], latents [sum of lengths, D]."""
        tensors = {"images": self.images[: len(chunk["keys"])].permute(0, 3, 1, 2)}  # [B, S, S, 3] -> [B, 3, S, S]
        if self.latents is not None:
            tensors["latents"] = self.latents[: sum(chunk["lengths"])]
        return chunk | tensors


class Ring(torch.utils.data.Dataset):
    """Chunks in a given order, read into slots of shared memory that are used in turn.

    In fresh memory each 4 KB costs a page fault, and once more where a tensor travels from process to process: slots that
    are used again made readers 1.4 times as fast. When chunk k is handed out, those from k - `behind` on are still whole. The
    record's eight workers have 20 slots, of 31 MB at 512px and 69 MB at 1024px.
    """

    AHEAD = 2  # chunks that a worker process reads ahead

    def __init__(self, chunks, order: list[int], workers: int, behind: int = 2):
        self.chunks, self.order = chunks, order
        self.slots = [chunks.new_slot(shared=True) for _ in range(self.AHEAD * workers + behind + 1)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int) -> "dict | UserError":
        try:
            return self.slots[k % len(self.slots)].fill(self.chunks.rows(self.order[k]))
        except UserError as error:  # returned, since a worker process would bury it under its traceback
            return error

    def view(self, k: int, filled: "dict | UserError") -> dict:
        """Chunk k as its slot holds it, from what the item was; raises the UserError that the item may be."""
        if isinstance(filled, UserError):
            raise filled
        return self.slots[k % len(self.slots)].view(filled)

    def lock_pages(self) -> None:
        """Let the GPU copy from the slots by itself, without a copy of its own on the host."""
        for x in self._tensors():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0))

    def unlock_pages(self) -> None:
        for x in self._tensors():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(x.data_ptr()))

    def _tensors(self) -> list[Tensor]:
        return [x for slot in self.slots for x in (slot.images, slot.latents) if x is not None]


def end_with_parent() -> None:
    """Let this worker process be killed when the process that forked it ends, however that ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
            os._exit(1)


def become_reader(worker: int) -> None:
    """Make a process that reads chunks live exactly as long as the one that trains.

    Clusters send signals to every process, and the readers of a rank that is told to save and stop are still needed.
    """
    os.setpgid(0, 0)  # Ctrl-C is for the process group
    end_with_parent()  # a reader that outlives a killed rank keeps its locks
    polite = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, polite)

    def obey_the_trainer() -> None:
        while signal.sigwaitinfo(polite).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_the_trainer, daemon=True).start()
