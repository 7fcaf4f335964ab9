"""The referee: how good the pictures are that weights draw of held-out prompts, or that a folder holds.

    python tools/score.py --checkpoint=runs/try1 --metric=scenes
    python tools/score.py --checkpoint=runs/try1 --metric=cmmd,fdd,held_out --data=data/mine --n=5000
    python tools/score.py --checkpoint=runs/try1 --snapshots      all of runs/try1/ema/ that scores.jsonl does not have

Many GPUs draw into a folder, which is scored then:

    python tools/score.py --metric=scenes --level=race --n=512 --write_prompts=prompts.txt
    torchrun --nproc_per_node=8 -- sample.py --checkpoint=runs/try1 --prompts=prompts.txt --seed_step=1 --out=pictures
    python tools/score.py --metric=scenes --level=race --n=512 --pictures=pictures

Metrics are `scenes`, the shares of what captions of held-out scenes say that are drawn right (tools/scenes.py), which
needs no network and no data; `cmmd`, `mmd`, `fdd` and `fid`, the distances to pictures held out of --data
(tools/distances.py); and `held_out`, the flow-matching loss of held-out rows, as a run logs it. Scores are appended to
scores.jsonl, in the run's folder or that of the pictures.
"""
import difflib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from sample import (
    WHOLE, add_sampling_flags, draw_batches, draw_grid, load, save_picture, settings_of, usable_device, weights_file)
from tools.distances import NETWORKS, Network, Score, frechet, mmd, resample_weights, to_score
from tools.scenes import LEVELS, caption, level_of, make_scenes, score_scenes
from train_prx import (
    HELD_OUT, Chunks, Config, Parser, RowSet, UserError, file_sha256, held_out_losses, read_manifest, run_main)

METRICS = ("scenes", *NETWORKS, "held_out")
MEANING = {
    "objects": "right colour in the right place", "exact": "and right shape, size and texture", "size": "right size",
    "place": "something is there", "colour": "right colour", "shape": "right shape", "texture": "right texture",
    "background": "right background", "scenes": "every object exact, nothing else", "fdd": "Frechet distance, DINOv2",
    "cmmd": "CLIP embeddings, MMD x 1000", "mmd": "DINOv2 embeddings, MMD x 1000", "held_out": "flow-matching loss",
    "fid": "Frechet distance, Inception-v3"}
SHOWN = 16  # pictures of a grid


def parse_metrics(text: str) -> dict[str, str]:
    """A comma list of METRICS, each with or without ":" and a hub id or folder -> metric: its network."""
    networks, valid = {}, f"valid are {', '.join(METRICS)}, each once"
    for part in text.split(","):
        name, colon, network = (piece.strip() for piece in part.partition(":"))
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            raise UserError(f"no metric {name!r}{f'; did you mean {near[0]}?' if near else ''} ({valid})")
        if name in networks:
            raise UserError(f"metric {name} is named twice in {text!r} ({valid})")
        if colon and not (network and NETWORKS.get(name)):
            takes = "a hub id or a folder after the colon" if NETWORKS.get(name) else "no network"
            raise UserError(f"metric {name} takes {takes}, not {network!r}")
        networks[name] = network or NETWORKS.get(name, "")
    return networks


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of pictures. Each has `prompts`, `read(images [B, H, W, 3], first) -> rows [B, ...]`, of the pictures of
# prompts from `first` on, `scores(rows [n, ...]) -> {name: Score}`, and `about`, which goes with the scores.


class Scenes:
    """Held-out scenes of a level, and how they are scored."""

    def __init__(self, level: str, n: int, seed: int):
        self.scenes = make_scenes(n, seed, "held_out", level)
        self.prompts = [caption(scene) for scene in self.scenes]
        self.about = {"metric": "scenes", "n": n, "network": "", "data": f"scenes:{level}"}

    def read(self, images: np.ndarray, first: int) -> Tensor:
        each = [score_scenes(image[None], [self.scenes[first + k]]) for k, image in enumerate(images)]
        self.names = list(each[0])
        return torch.tensor([list(scores.values()) for scores in each], dtype=torch.float64)

    def scores(self, rows: Tensor) -> dict[str, Score]:
        # A share of all objects weighs scenes by their objects; one of all cells or scenes weighs all scenes alike
        objects = torch.tensor([len(scene.objects) for scene in self.scenes], dtype=torch.float64)
        weights, found = resample_weights(len(self.scenes)), {}
        for name, shares in zip(self.names, rows.T, strict=True):
            sizes = torch.ones_like(objects) if name in ("background", "scenes") else objects
            found[name] = to_score(weights @ (sizes * shares) / (weights @ sizes))
        return found


class Distance:
    """The distance to pictures held out of data sets, equally many of each, and fewer where a set has fewer."""

    def __init__(self, metric: str, model_id: str, sets: list[RowSet], n: int, device: torch.device, batch: int):
        rows, self.prompts = held_out_rows(sets, n)
        if len(rows) < 2:
            raise UserError(f"{metric}: {', '.join(s.folder for s in sets)} gives {len(rows)} of {n} held-out rows, "
                            f"2 are needed: use a data set with more of them ({HELD_OUT:.0%} of rows are held out)")
        self.metric, self.network, features = metric, Network(metric, model_id, device), []
        self.about = {"metric": metric, "n": len(rows), "network": self.network.key, "data": data_text(sets)}
        for first in tqdm(range(0, len(rows), batch), desc=f"{metric} of data", delay=1, leave=False, disable=None):
            images = [s.read(row)["image"] for s, row in rows[first : first + batch]]
            features.append(self.network(torch.stack(images)))
        self.reference = torch.cat(features)

    def read(self, images: np.ndarray, first: int) -> Tensor:
        return self.network(images)

    def scores(self, rows: Tensor) -> dict[str, Score]:
        distance = frechet if self.metric in ("fdd", "fid") else mmd
        return {self.metric: to_score(distance(rows, self.reference, resample_weights(len(rows)).to(rows.device)))}


def held_out_rows(sets: list[RowSet], n: int) -> tuple[list[tuple[RowSet, int]], list[str]]:
    """Up to n held-out rows, equally many of each set, and their captions in a line each."""
    rows = [(s, row) for k, s in enumerate(sets) for row in s.held_out[: (n + k) // len(sets)]]
    return rows, [" ".join(s.rows[int(row)]["caption"].split()) for s, row in rows]


def data_text(sets: list[RowSet]) -> str:
    """What data sets are, in a line of scores.jsonl."""
    return ", ".join(f"{s.folder} {s.manifest_hash}" for s in sets)


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures come from. Each has `size`, in px, `draw(prompts) -> batches of uint8 [B, size, size, 3]`, and `about`.


class Weights:
    """Pictures that weights draw: picture i has seed + i."""

    def __init__(self, args: Namespace):
        self.model, self.cfg, self.encode_text, self.device = load(args)
        self.name, self.seed, self.batch = args.checkpoint, args.seed, args.batch
        self.size, self.data = self.cfg.stages[-1].image_size, args.data or self.cfg.data
        self.settings = settings_of(args, self.cfg, (self.size, self.size))
        with safe_open(self.name, framework="pt") as opened:
            metadata = opened.metadata()
        seconds = float(metadata["seconds"]) if "seconds" in metadata else None  # of the former layout
        self.about = {"step": int(metadata.get("step", 0)), "seconds": seconds, "weights": file_sha256(self.name),
                      **self.settings}

    def draw(self, prompts: list[str]) -> Iterator[np.ndarray]:
        seeds, items = [self.seed + i for i in range(len(prompts))], list(range(len(prompts)))
        for _, images in draw_batches(self.model, self.encode_text, prompts, seeds, (self.size, self.size), self.batch,
                                      items, **self.settings):
            yield images

    def score_loss(self, n: int) -> tuple[dict, dict[str, Score]]:
        """(about, scores) of the loss of held-out rows."""
        chunks = Chunks(replace(self.cfg, data=self.data), self.cfg.stages[-1], 0)
        with torch.no_grad():
            losses = held_out_losses(self.model, chunks, self.encode_text, self.cfg, self.device, n).cpu().double()
        if len(losses) == 0:
            raise UserError(f"--data={self.data} has no held-out rows: it is too small")
        about = {"metric": "held_out", "n": len(losses), "network": "", "data": data_text(chunks.sets)}
        return about, {"held_out": to_score(resample_weights(len(losses)) @ losses)}


class Folder:
    """Pictures that sample.py wrote, in the order of their names; what they say of themselves has to fit."""

    def __init__(self, args: Namespace):
        self.name, self.data, self.batch = args.pictures, args.data, args.batch
        self.device = torch.device(args.device or usable_device())
        self.files = sorted(args.pictures.glob("*.png"))
        if not self.files:
            raise UserError(f"--pictures={args.pictures} has no *.png")
        first, said = self.open(self.files[0])
        self.size = len(first)
        try:
            scale, steps = float(said.get("scale", 1)), int(said.get("steps", 0))
        except ValueError:
            raise UserError(f"{self.files[0]} is damaged: its text was not written by sample.py") from None
        self.about = {"step": None, "seconds": None, "weights": said.get("checkpoint", ""), "scale": scale,
                      "steps": steps, "guidance": said.get("guidance", "")}

    def open(self, file: Path) -> tuple[np.ndarray, dict[str, str]]:
        """A picture, uint8 [H, W, 3], and its text."""
        try:
            with Image.open(file, formats=["PNG"]) as picture:
                return np.asarray(picture.convert("RGB")), picture.text
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read {file}: {error}") from None

    def draw(self, prompts: list[str]) -> Iterator[np.ndarray]:
        if len(self.files) != len(prompts):
            raise UserError(f"--pictures={self.name} has {len(self.files)} pictures, and {len(prompts)} are scored")
        for first in tqdm(range(0, len(prompts), self.batch), desc="reading", unit=" batches", delay=1, disable=None):
            opened = [self.open(file) for file in self.files[first : first + self.batch]]
            for file, (image, said), prompt in zip(self.files[first:], opened, prompts[first:]):
                if image.shape != (self.size, self.size, 3) or said.get("checkpoint", "") != self.about["weights"]:
                    raise UserError(f"{file} is of another size or by other weights than {self.files[0]}, or no square")
                if said.get("prompt", prompt) != prompt:
                    raise UserError(f"{file} shows {said['prompt']!r}, not {prompt!r}: draw what --write_prompts "
                                    "writes with the same --data, --level, --n and --seed")
            yield np.stack([image for image, _ in opened])


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def score_pictures(source: Weights | Folder, metrics: list[Scenes | Distance], grid: Path | None) -> Iterator[tuple]:
    """(about, scores) of each metric. Those of the same prompts share the pictures, of which a grid is written."""
    for prompts in {tuple(metric.prompts): metric.prompts for metric in metrics}.values():
        group, shown, first = [metric for metric in metrics if metric.prompts == prompts], [], 0
        found = [[] for _ in group]
        for images in source.draw(prompts):
            for rows, metric in zip(found, group):
                rows.append(metric.read(images, first))
            shown += list(images[: SHOWN - len(shown)])
            first += len(images)
        for rows, metric in zip(found, group):
            yield metric.about, metric.scores(torch.cat(rows))
        if grid:
            file = grid.with_name(grid.name.replace("METRIC", group[0].about["metric"]))
            save_picture(draw_grid(np.stack(shown), prompts[:SHOWN]), file)
            print(f"grid: {file}")


def report(source: Weights | Folder, about: dict, scores: dict[str, Score], seed: int, folder: Path) -> None:
    """Print scores as a table, and append them to scores.jsonl in `folder`."""
    about = {**source.about, **about, "seed": seed, "size": source.size}
    print("{}: {metric} of {n}, {size}px, guidance {guidance} {scale:g}, {steps} steps; +- is half of the 95% interval"
          .format(source.name, **about))
    for name, (value, error) in scores.items():
        share = f"{100 * value:6.1f}% +- {100 * error:.1f}"
        print(f"  {name:10}{share if about['metric'] == 'scenes' else f'{value:8.4f} +- {error:.4f}'}  {MEANING[name]}")
    about |= {"values": {name: score.value for name, score in scores.items()},
              "errors": {name: score.error for name, score in scores.items()}}
    line = {name: about[name] for name in ("step", "seconds", "metric", "values", "errors", "n", "seed", "guidance",
                                           "scale", "steps", "network", "data", "weights", "size")}
    try:
        with open(folder / "scores.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}/scores.jsonl: {error.strerror}") from None


def build_metrics(wanted: dict[str, str], args: Namespace, source: Weights | Folder) -> list[Scenes | Distance]:
    """The metrics of pictures among those that are wanted."""
    metrics, sets = [], []
    if set(wanted) & set(NETWORKS):
        sets = open_sets(source.data, source.size)
    for metric, network in wanted.items():
        if metric == "scenes" and source.size % 2:
            raise UserError(f"metric scenes takes pictures of an even width, not {source.size} px")
        if metric == "scenes":
            metrics.append(Scenes(find_level(args.level, source.data), args.n, args.seed))
        elif metric in NETWORKS:
            metrics.append(Distance(metric, network, sets, args.n, source.device, args.batch))
    return metrics


def find_level(level: str | None, data: str) -> str:
    """The level of scenes: the one given, else that of the data; raises UserError where there is neither."""
    level = level or data and level_of(read_manifest(data.split(",")[0].partition(":")[0]))
    if not level:
        raise UserError(f"which scenes? Give --level, one of {', '.join(LEVELS)}, or --data=FOLDER with scenes")
    return level


def open_sets(data: str, size: int) -> list[RowSet]:
    """The sets of --data at a size in px, without text latents; raises UserError where there are none."""
    if not data:
        raise UserError("distances need --data=FOLDER, with the pictures to compare to")
    return [RowSet(part.partition(":")[0], Config(text_encoder="builtin"), size) for part in data.split(",")]


def write_prompts(wanted: dict[str, str], args: Namespace) -> None:
    """Write the prompts of held-out scenes or rows, one a line."""
    if set(wanted) == {"scenes"}:
        prompts = Scenes(find_level(args.level, args.data), args.n, args.seed).prompts
    else:
        prompts = held_out_rows(open_sets(args.data, 1), args.n)[1]
    try:
        args.write_prompts.write_text("".join(f"{prompt}\n" for prompt in prompts))
    except OSError as error:
        raise UserError(f"cannot write --write_prompts={args.write_prompts}: {error.strerror}") from None
    print(f"{args.write_prompts}: {len(prompts)} prompts")


def known_scores(file: Path) -> set[tuple[str, str]]:
    """(metric, sha256 of weights) of all lines of scores.jsonl."""
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {(line["metric"], line["weights"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}): mend or delete it") from None


def main(argv: list[str]) -> None:
    parser = Parser(prog="tools/score.py", description="Score weights, or a folder of pictures.")
    add_sampling_flags(parser)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's folder, its ema.safetensors, or a file of its ema/")
    add("--snapshots", action="store_true", help="score all files of the run's ema/ whose score is not there yet")
    add("--pictures", type=Path, help="score this folder of sample.py instead of weights")
    add("--write_prompts", type=Path, help="write what is to be drawn for --pictures to this file, and score nothing")
    add("--metric", default="scenes", help=f"comma list of {', '.join(METRICS)}; metric:network takes another network, "
        "a hub id or folder")
    add("--data", default="", help="its held-out rows are drawn, for all but scenes (default: the run's)")
    add("--n", type=WHOLE, default=256, help="pictures")
    add("--level", choices=list(LEVELS), help="level of the scenes (default: the data's)")
    add("--out", type=Path, help="PNG of the first 16 pictures, METRIC in its name replaced (default: score_METRIC.png "
        "in the run's folder)")
    args = parser.parse_args(argv)
    wanted = parse_metrics(args.metric)
    if args.write_prompts:
        write_prompts(wanted, args)
        return
    if (args.checkpoint is None) == (args.pictures is None):
        raise UserError("what is to be scored? Give --checkpoint=runs/NAME, or --pictures=DIR")
    if args.pictures:
        if "held_out" in wanted:
            raise UserError("metric held_out is of weights: give --checkpoint=runs/NAME")
        source = Folder(args)
        for about, scores in score_pictures(source, build_metrics(wanted, args, source), args.out):
            report(source, about, scores, args.seed, args.pictures)
        return

    if args.snapshots:
        files = sorted(args.checkpoint.glob("ema/step_*.safetensors"))
    else:
        files = [weights_file(args.checkpoint)]
    if not files:
        raise UserError(f"{args.checkpoint}/ema has no snapshots: train_prx.py keeps some with --snapshot_every=STEPS")
    run = files[0].parents[1] if files[0].parent.name == "ema" else files[0].parent
    known, metrics = known_scores(run / "scores.jsonl") if args.snapshots else set(), []
    for file in files:
        left = [metric for metric in wanted if (metric, file_sha256(file)) not in known]
        if not left:
            print(f"{file}: {args.metric} is in {run}/scores.jsonl")
            continue
        args.checkpoint = file
        source = Weights(args)
        metrics = metrics or build_metrics(wanted, args, source)  # once, with its networks and features
        of_pictures = [metric for metric in metrics if metric.about["metric"] in left]
        name = "score_METRIC.png" if file.name == "ema.safetensors" else f"score_METRIC_{file.stem}.png"
        for about, scores in score_pictures(source, of_pictures, args.out or run / name):
            report(source, about, scores, args.seed, run)
        if "held_out" in left:
            report(source, *source.score_loss(args.n), args.seed, run)


if __name__ == "__main__":
    run_main(main)
