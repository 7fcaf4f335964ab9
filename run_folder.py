"""What a run's folder, runs/<name>/, holds: log, checkpoints, averaged weights; and whether a run may continue there.

    log.txt metrics.jsonl samples/          written by rank 0; a full disk delays lines, and stops nothing
    curves.png                              drawn from metrics.jsonl at the end
    checkpoints/step_XXXXXX/                torch.distributed.checkpoint, for this run alone: its metadata are pickled
    ema.safetensors                         what people pass to each other
"""
import fcntl
import json
import os
import re
import shutil
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from curves import draw_curves
from ranks import from_rank_0, restarted
from shards import UserError

DAMAGED = "checkpoint {} is damaged: delete it, and the same command continues from the one before"
OPTIONS = "choose another --name, start over with --resume=never, or continue on purpose with --resume=PATH"
CANNOT_SAVE = (OSError, RuntimeError, safetensors.SafetensorError, dcp.api.CheckpointException)  # a full disk comes as any of these


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: nothing else has such a name."""
    found = [path for path in run.glob("checkpoints/step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def find_resume(run: Path, resume: str, identity: dict, free: set[str], end: int) -> Path | None:
    """The checkpoint folder to continue from, or None to start; raises UserError where either would lose something.

    A run continues if its identity (config but for the `free` fields, source, data) is the same and it is before step `end`.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not (path / "run.json").exists():
            if not checkpoints_of(path):
                raise UserError(f"--resume={resume}: neither a checkpoint nor a run with one")
            path = checkpoints_of(path)[-1]
        if not checkpoints_of(run) or path.resolve() == checkpoints_of(run)[-1].resolve():
            return path
        if path.resolve().is_relative_to(run.resolve()) and not restarted():
            raise UserError(f"--resume={resume}: {run} has later checkpoints, which this would lose; choose another --name")
    if resume == "never" and not restarted() or not checkpoints_of(run):
        return None
    last = checkpoints_of(run)[-1]
    try:
        saved = json.loads((last / "run.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(DAMAGED.format(last)) from None
    if saved["source"] != identity["source"]:
        raise UserError(f"{run} was trained by another version of the source: {OPTIONS}")
    now = identity["config"]
    changed = [key for key in now if key not in free and saved["config"].get(key) != now[key]]
    if changed:
        raise UserError(f"{run} has another {', '.join(changed)}: {OPTIONS}")
    if saved["data"] != identity["data"]:
        raise UserError(f"{run} was trained on other data: the manifest of {now['data']} has changed; {OPTIONS}")
    if saved["step"] >= end:
        raise UserError(f"{run} is finished at step {saved['step']}: {OPTIONS}")
    return last


def named_tensors(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts under the names that a checkpoint gives them: "optimizer.txt_in.weight.exp_avg"."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from named_tensors(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_checkpoint(path: Path, state: dict) -> None:
    """Fill `state` from a checkpoint folder, whatever the number of ranks that wrote it; raises UserError on other shapes."""
    try:
        found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception:  # its metadata are pickled, and a damaged pickle raises almost anything
        raise UserError(DAMAGED.format(path)) from None
    for name, tensor in named_tensors(state):
        if name not in found:
            raise UserError(f"checkpoint {path} has no {name}: it is of another model")
        if tuple(found[name].size) != tuple(tensor.shape):
            raise UserError(f"checkpoint {path}: {name} has shape {tuple(found[name].size)}, but this model's is {tuple(tensor.shape)}")
    try:
        dcp.load(state, checkpoint_id=path)
    except dcp.api.CheckpointException:
        raise UserError(DAMAGED.format(path)) from None


def write_ema(path: Path, checkpoint: Path, identity: dict, step: int) -> None:
    """The averaged weights of a checkpoint as one safetensors file, with config, step and source hash in its metadata.

    One process does it, beside training; REPA's projector stays behind.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP's, where one process reads alone
    reader = dcp.FileSystemReader(checkpoint)
    sizes = {name: about.size for name, about in reader.read_metadata().state_dict_metadata.items() if name.startswith("ema.")}
    tensors = {name: torch.empty(size) for name, size in sizes.items() if not name.startswith("ema.repa_projector.")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    metadata = {"format": "nanoprx", "config": json.dumps(identity["config"]), "step": str(step),
                "source": identity["source"], "data": json.dumps(identity["data"])}
    safetensors.torch.save_file({name.removeprefix("ema."): tensor for name, tensor in tensors.items()}, path, metadata=metadata)


def draw_grid(images: np.ndarray, prompts: list[str], columns: int = 4, title: str = "") -> Image.Image:
    """Images uint8 [B, H, W, 3] as a sheet, each with its prompt below; small ones are enlarged to 192px."""
    H, W = images.shape[1:3]
    zoom, columns = max(1, 192 // W), min(columns, len(images))
    font, large = ImageFont.load_default(size=12), ImageFont.load_default(size=15)
    head = wrap(title, large, columns * (W * zoom + 8) - 8)
    lines = [wrap(prompt, font, W * zoom)[:6] for prompt in prompts]
    top = 12 + 20 * len(head) if head else 0
    cell_w, cell_h = W * zoom + 8, H * zoom + 16 + 15 * max(1, *map(len, lines))
    sheet = Image.new("RGB", (columns * cell_w, top + -(-len(images) // columns) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 6), "\n".join(head), fill="black", font=large, spacing=5)
    for i, (image, text) in enumerate(zip(images, lines)):
        x, y = i % columns * cell_w + 4, top + i // columns * cell_h + 4
        sheet.paste(Image.fromarray(image).resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + H * zoom + 3), "\n".join(text), fill="black", font=font)
    return sheet


def wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of text, each at most `width` pixels wide."""
    letters = max(1, int(width / font.getlength("i")))
    while letters > 1 and any(font.getlength(line) > width for line in textwrap.wrap(text, letters)):
        letters -= 1
    return textwrap.wrap(text, letters)


class RunFolder:
    """The folder of one run, open for this process alone; checkpoints are written while training goes on.

    Raises UserError where the run must not start or continue (`find_resume`), or another process is training it.
    """

    def __init__(self, name: str, resume: str, identity: dict, free: set[str], end: int, keep: int, keep_every: int):
        self.path, self.identity, self.keep, self.keep_every = Path("runs") / name, identity, keep, keep_every
        # Rank 0 decides: another node may see the shared folder as it was a few seconds ago
        found = from_rank_0(lambda: self._open(resume, free, end))
        self.checkpoint = Path(found) if found else None
        for _ in range(60):
            if (self.path / "checkpoints").is_dir():
                break
            time.sleep(1)
        else:
            raise UserError(f"rank {dist.get_rank()} does not see {self.path.resolve()}, which rank 0 made: all nodes must share it")
        self.log = Log(self.path)
        self.group = dist.new_group(backend="gloo")  # of its own: the writing thread must not meet training's collectives
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.trouble: str | None = None  # why the last checkpoint was not written

    def _open(self, resume: str, free: set[str], end: int) -> str | None:
        try:
            self.path.parent.mkdir(exist_ok=True)
        except FileExistsError:
            raise UserError(f"{self.path.parent} is a file, and runs need a folder of that name") from None
        self.lock = self.path.with_name(f".{self.path.name}.lock").open("w")  # beside the folder, which --resume=never renames
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training {self.path}; choose another --name") from None
        checkpoint = find_resume(self.path, resume, self.identity, free, end)
        if resume == "never" and self.path.exists() and not restarted():
            n = 1
            while self.path.with_name(f"{self.path.name}.old-{n}").exists():
                n += 1
            self.path.rename(self.path.with_name(f"{self.path.name}.old-{n}"))
        (self.path / "samples").mkdir(parents=True, exist_ok=True)
        (self.path / "checkpoints").mkdir(exist_ok=True)
        for partial in self.path.glob("checkpoints/.step_*.partial"):  # of a run that was killed while it saved
            shutil.rmtree(partial)
        return str(checkpoint) if checkpoint else None

    def save(self, state: dict, step: int) -> None:
        """Copy `state` to the host's memory and begin to write it, once the checkpoint before it is done on all ranks.

        Weights, averaged weights, optimizer state and progress are in `state`; the seed and the position in the data
        follow from the config and the step, which run.json holds. Collective.
        """
        self.wait()
        aside = self.path / "checkpoints" / f".step_{step:06d}.partial"
        upload = dcp.async_save(state, checkpoint_id=aside, process_group=self.group)
        self.pending = self.writer.submit(self._complete, upload, aside, step)

    def save_picture(self, picture: Image.Image, name: str) -> None:
        """Write samples/`name`, on rank 0; a full disk is logged."""
        if dist.get_rank() == 0:
            try:
                picture.save(self.path / "samples" / name)
            except OSError as error:
                self.log.write(f"WARNING samples/{name} is not written: {error}")

    def close(self) -> None:
        """Draw curves.png, on rank 0; where that cannot be, the log says why."""
        if dist.get_rank() == 0:
            try:
                draw_curves([self.path], self.path / "curves.png")
            except UserError as error:
                self.log.write(f"no curves: {error}")
            self.log.close()

    def last(self) -> str:
        """The newest complete checkpoint, or "none"."""
        return str((checkpoints_of(self.path) or ["none"])[-1])

    def wait(self) -> None:
        """Return when the last checkpoint is complete, or cannot be: then `trouble` says why, on every rank."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _complete(self, upload: Future, aside: Path, step: int) -> None:
        """When all ranks have written: complete the folder, rename it into its place, delete what is too old."""
        ema = aside / "ema.safetensors"
        try:
            upload.result()
            if dist.get_rank() == 0:
                with (aside / "run.json").open("w") as file:
                    json.dump({**self.identity, "step": step}, file)
                    file.flush()
                    os.fsync(file.fileno())
                write_ema(ema, aside, self.identity, step)
                shutil.copymode(aside / "run.json", ema)  # safetensors leaves it to its owner alone
                os.replace(ema, self.path / "ema.safetensors")  # first: a checkpoint says that all is written
                final = aside.with_name(f"step_{step:06d}")
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside, final)
                for old in checkpoints_of(self.path)[: -self.keep]:
                    if not (self.keep_every and int(old.name.removeprefix("step_")) % self.keep_every == 0):
                        going = old.with_name(f".{old.name}.partial")  # what is half deleted is no checkpoint
                        os.replace(old, going)
                        shutil.rmtree(going, ignore_errors=True)
            self.trouble = None
        except CANNOT_SAVE as error:
            causes = [cause for cause, _ in error.failures.values()] if isinstance(error, dcp.api.CheckpointException) else [error]
            free = shutil.disk_usage(self.path).free  # torch hides a full disk behind messages of its own
            self.trouble = f"{(str(causes[0]) or type(causes[0]).__name__).splitlines()[0]} ({free / 1e9:.1f} GB are free on its disk)"
            if dist.get_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                self.log.write(f"WARNING step {step}: no checkpoint, {self.trouble}; the last complete one: {self.last()}")
        # What follows waits for all ranks here, where patience is long, and not in a collective of training's
        told = [self.trouble]
        dist.broadcast_object_list(told, group=self.group)
        self.trouble = told[0]


class Log:
    """log.txt and metrics.jsonl of a run, written by rank 0 only, from any thread."""

    def __init__(self, run: Path):
        self.is_main = dist.get_rank() == 0
        self.text, self.json = run / "log.txt", run / "metrics.jsonl"
        self.late, self.lock = {self.text: "", self.json: ""}, threading.Lock()
        self.tracker = None

    def track(self, name: str, identity: dict) -> None:
        """Send metrics to Weights & Biases as well, under the run's name; raises UserError where that cannot be."""
        import wandb

        try:
            self.tracker = wandb.init(project="nanoprx", name=name, dir=self.text.parent, config=identity, resume="auto")
        except wandb.Error as error:
            raise UserError(f"--track=wandb: {str(error).splitlines()[0]}; `wandb login` signs in") from None

    def close(self) -> None:
        """Tell the tracker that the run has ended."""
        if self.tracker is not None:
            self.tracker.finish()

    def forget_after(self, step: int) -> None:
        """Take back the metrics of later steps: what an interrupted run logged past its checkpoint happens again."""
        if self.is_main and self.json.exists():
            lines = [line for line in self.json.read_text().splitlines() if line.endswith("}")]  # the last may be cut
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            try:
                self.json.with_suffix(".partial").write_text("".join(line + "\n" for line in kept))
                os.replace(self.json.with_suffix(".partial"), self.json)
            except OSError as error:
                raise UserError(f"cannot write {self.json}: {error.strerror}") from None

    def write(self, text: str, console: bool = True) -> None:
        """A line of log.txt, and of the console."""
        if self.is_main:
            self._append(self.text, text + "\n")
            if console:
                try:
                    print(text, flush=True)
                except OSError:  # whoever read along has left, such as `| head`, or a disk is full; the log has it all
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def metrics(self, step: int, **values) -> None:
        """A line of metrics.jsonl."""
        if self.is_main:
            self._append(self.json, json.dumps({"step": step, **values}) + "\n")
            if self.tracker is not None:
                self.tracker.log(values, step=step)

    def _append(self, file: Path, text: str) -> None:
        """Append whole lines; what does not fit on the disk is kept for the next time."""
        with self.lock:
            was_late, self.late[file] = bool(self.late[file]), self.late[file] + text
            data = self.late[file].encode()
            try:
                with file.open("ab", buffering=0) as opened:
                    size = opened.tell()
                    if opened.write(data) < len(data):
                        opened.truncate(size)
                        return
                self.late[file] = ""
            except OSError as error:
                if not was_late:
                    print(f"warning: {file} cannot be written ({error.strerror}): its lines are kept", file=sys.stderr)
