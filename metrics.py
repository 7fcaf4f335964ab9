"""How good generated pictures are: scenes drawn as captioned, and distances to held-out pictures.

    Scorer("scenes,cmmd", sets, n, device)(draw) -> {"scenes_objects": Score(value, error), ..., "cmmd": Score(...)}

    scenes  shares of what held-out captions say, drawn right: scenes.score_scenes. It needs no network and no pictures
    cmmd    squared MMD of CLIP embeddings (Jayasumana et al., arXiv 2401.09603), resized as PRX's CMMD does
    mmd     squared MMD of DINOv2's CLS token, which is PRX's DINO-MMD
    fdd     Frechet distance of DINOv2's CLS token (Stein et al., arXiv 2306.04675). Its grid of position embeddings is resized
            by transformers, and in the paper by torch.hub's code, which shifts it by up to 0.1 of a patch
    fid     Frechet distance of Inception's pooled features (Heusel et al., arXiv 1706.08500) as torchmetrics has it: resized
            with antialiasing, the original's was without. Images are passed as uint8. PRX passes uint8 with normalize=True,
            which inverts them: its FIDs compare with none

Distances are 0 for equal sets, and lower is better. They compare only at the same held-out pictures, size and number of
pictures n: all are too high by a term in 1 / n, cmmd by about 10 / n. PRX takes n = 10,000, 50 steps, guidance 3.5; papers
10,000 to 50,000, most of COCO or ImageNet.
"""
import contextlib
import difflib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import scenes
from muon import all_gather
from shards import HELD_OUT, DamagedImage, RowSet, UserError, file_sha256, folder_revision
from weights import load_pretrained

DEFAULTS = {"scenes": "", "cmmd": "openai/clip-vit-large-patch14-336", "mmd": "facebook/dinov2-with-registers-large",
            "fdd": "facebook/dinov2-large", "fid": ""}  # metric -> its network
METRICS = tuple(DEFAULTS)
CLIPS, DINOS = ("clip", "clip_vision_model"), ("dinov2", "dinov2_with_registers")  # transformers' model types
RESAMPLES = 40  # of the bootstrap: an error is then itself known to 1 / sqrt(2 * 39) = 11%
SHOWN = 16  # pictures of each round that are kept, for a grid

Draw = Callable[[list[str], list[int]], np.ndarray]  # prompts, seeds -> uint8 [B, H, W, 3]


class Score(NamedTuple):
    """A value and half of its 95% interval: 1.96 standard deviations over RESAMPLES bootstrap resamples.

    Generated pictures are resampled, the held-out ones stay. The interval is that of other prompts and seeds of the same
    model, and not that of another training run.
    """
    value: float
    error: float


def parse_metrics(text: str) -> dict[str, str]:
    """A comma list of METRICS, each with or without ":" and a hub id or folder -> metric: its network. Raises UserError."""
    networks = {}
    for part in text.split(","):
        name, colon, network = (piece.strip() for piece in part.partition(":"))
        valid = f"valid are {', '.join(METRICS)}, each once"
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            raise UserError(f"no metric {name!r}{f'; did you mean {near[0]}?' if near else ''} ({valid})")
        if name in networks:
            raise UserError(f"metric {name} is named twice in {text!r} ({valid})")
        if colon and not (network and DEFAULTS[name]):
            takes = "a hub id or a folder after the colon" if DEFAULTS[name] else "no network"
            raise UserError(f"metric {name} takes {takes}, not {network!r}")
        networks[name] = network or DEFAULTS[name]
    return networks


# ---------------------------------------------------------------------------------------------------------------------
# Distances between features x [n, D] of generated and y [m, D] of held-out pictures


def resample_weights(n: int) -> Tensor:
    """Float64 [1 + RESAMPLES, n], the same for each n: row 0 is 1 / n, the others count / n in draws of n with replacement."""
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts]) / n


def to_score(values: Tensor) -> Score:
    """The score of values [1 + RESAMPLES], computed with the rows of `resample_weights`."""
    return Score(values[0].item(), 1.96 * values[1:].std().item())


SIGMA, SCALE = 10, 1000  # CMMD's, for vectors of length 1
BLOCK = 1024  # rows of a kernel matrix at a time: 82 MB for 10,000 pictures


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 SIGMA^2)) of all pairs of rows [n, D], [m, D]: [n, m]."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(squares.clamp(min=0) / (-2 * SIGMA**2))


def mmd(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """SCALE times the squared MMD of x [n, D], for each row of weights [R, n], and y [m, D]: float64 [R].

    The biased estimator w K_xx w + mean K_yy - 2 w mean K_xy, as in CMMD (arXiv 2401.09603).
    """
    x, y = x.double(), y.double()
    xx, xy = torch.zeros_like(weights[:, 0]), torch.zeros_like(weights[:, 0])
    for w, rows in zip(weights.split(BLOCK, dim=1), x.split(BLOCK), strict=True):  # [R, b], [b, D]
        xx += (w @ kernel(rows, x) * weights).sum(1)
        xy += w @ kernel(rows, y).mean(1)
    yy = sum(kernel(rows, y).sum() for rows in y.split(BLOCK)) / len(y) ** 2
    return SCALE * (xx + yy - 2 * xy)


def frechet(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Frechet distance of x [n, D], for each row of weights [R, n], and y [m, D]: float64 [R]. n, m >= 2 may be less than D.

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) with unbiased covariances (arXiv 1706.08500). For any L with S_y = L L^T
    the last trace sums the square roots of the eigenvalues of L^T S_x L, which is symmetric; L is from a QR of y.
    """
    n, centre = len(x), y.double().mean(0)
    x, y = x.double() - centre, (y.double() - centre) / (len(y) - 1) ** 0.5  # S_y = y^T y
    root = torch.linalg.qr(y, mode="r").R.mT  # L: [D, min(m, D)]
    projected, values = x @ root, []
    for w in weights:
        mean, scale = w @ x, (w * n / (n - 1)).sqrt()[:, None]
        b = scale * (projected - mean @ root)  # [n, min(m, D)], b^T b = L^T S_x L
        gram = b @ b.mT if b.shape[0] < b.shape[1] else b.mT @ b  # either has all eigenvalues but zeros
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        values.append(mean.square().sum() + (scale * (x - mean)).square().sum() + y.square().sum() - 2 * cross)
    return torch.stack(values)


DISTANCES = {"cmmd": mmd, "mmd": mmd, "fdd": frechet, "fid": frechet}


# ---------------------------------------------------------------------------------------------------------------------
# Networks: pictures -> features

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of R, G, B in [0, 1]
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_transformer(model_id: str, clip: bool) -> tuple[torch.nn.Module, str]:
    """A CLIP or DINOv2 in fp32, and what identifies its weights; raises UserError where it cannot be had, or is neither."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    kind, kinds = load_pretrained(AutoConfig, model_id).model_type, CLIPS if clip else DINOS
    if kind not in kinds:
        raise UserError(f"{model_id} is a model of type {kind}, and this metric takes {' or '.join(kinds)}")
    model = load_pretrained(CLIPVisionModelWithProjection if clip else AutoModel, model_id, dtype=torch.float32,
                            output_loading_info=True)
    revision = folder_revision(Path(model_id)) if Path(model_id).is_dir() else model.config._commit_hash
    return model, f"{model_id} {revision}"


def load_inception() -> tuple[torch.nn.Module, str]:
    """FID's Inception, and what identifies it; raises UserError where it cannot be had."""
    try:
        import torchmetrics
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise UserError(f"metric fid needs `pip install torchmetrics torch-fidelity` ({error})") from None
    file = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    try:
        # Its weights are random before they are loaded; torch.hub announces a download on stderr, on every rank
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:  # the net's or the disk's; and a damaged pickle raises almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"metric fid cannot load its network ({reason}): download {URL_INCEPTION_V3} as {file}") from None
    return model, f"{file.name} {file_sha256(file)}, torchmetrics {torchmetrics.__version__}"  # its resizing has changed before


class Network:
    """The frozen network of a metric: uint8 images [B, H, W, 3], numpy or torch, -> features [B, dim] fp32 on its device.

    `key` identifies network and weights.
    """

    def __init__(self, metric: str, model_id: str, device: torch.device):
        self.metric, self.device = metric, device
        model, self.key = load_inception() if metric == "fid" else load_transformer(model_id, clip=metric == "cmmd")
        self.model = model.eval().requires_grad_(False).to(device)
        if metric == "fid":
            self.dim = 2048
            return
        self.dim = model.config.projection_dim if metric == "cmmd" else model.config.hidden_size
        self.size = 16 * model.config.patch_size if metric == "fdd" else model.config.image_size

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        x = torch.as_tensor(images, device=self.device).permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]
        if self.metric == "fid":
            return self.model(x)
        x = x.float()
        if self.metric == "mmd":  # as PRX's: not antialiased
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        else:  # as Pillow: antialiased, rows first, whole levels after each pass. Equal to 2 levels, nearly everywhere to none
            for size in ((x.shape[2], self.size), (self.size, self.size)):
                x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        mean, std = torch.tensor(OPENAI if self.metric == "cmmd" else IMAGENET, device=self.device)[..., None, None]
        x = (x / 255 - mean) / std
        if self.metric == "cmmd":
            return F.normalize(self.model(pixel_values=x).image_embeds, dim=1)
        cls = self.model(pixel_values=x).last_hidden_state[:, 0]
        return cls if self.metric == "fdd" else F.normalize(cls, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks share the pictures


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(n: int) -> list[int]:
    """This rank's block of n items, as many as every rank's, so that collectives stay aligned: the last item repeats."""
    rank, world = rank_and_world()
    each = -(-n // world)
    return [min(i, n - 1) for i in range(rank * each, (rank + 1) * each)]


def gather_rows(x: Tensor, n: int) -> Tensor:
    """The rows [k, ...] of all ranks' shares, in order: [n, ...] on every rank. Collective."""
    if dist.is_initialized():
        whole = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        all_gather(whole, x.contiguous())
        x = whole
    return x[:n]


def batches(items: list[int], size: int, what: str) -> tqdm:
    """The items, `size` at a time; a bar on rank 0's terminal where that takes over a second."""
    pieces = [items[i : i + size] for i in range(0, len(items), size)]
    return tqdm(pieces, desc=what, unit=" batches", delay=1, leave=False, disable=rank_and_world()[0] > 0 or None)


# ---------------------------------------------------------------------------------------------------------------------
# Features of held-out pictures, kept beside the data


def read_features(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """Stored features; None where there are none, or not whole: then they are computed and stored anew."""
    try:
        features = safetensors.torch.load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if features.shape == shape and features.dtype == torch.float32 else None


def write_features(file: Path, features: Tensor) -> None:
    """Store features; a disk that does not take them is said on stderr."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)
        aside.write_bytes(safetensors.torch.save({"features": features.cpu().contiguous()}))
        os.replace(aside, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        print(f"warning: {file} cannot be written ({error.strerror}): its features are computed every time", file=sys.stderr)


def reference_features(metric: str, network: Network, s: RowSet, rows: list[int], batch: int) -> Tensor:
    """Features [rows, D] of rows of a set, stored in its folder or computed; NaN where the image is damaged. Collective."""
    about = json.dumps([s.manifest_hash, network.key, s.image_size, len(rows)])
    file = Path(s.folder) / "features" / f"{metric}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    is_main = rank_and_world()[0] == 0
    found = [read_features(file, (len(rows), network.dim)) if is_main else None]
    if dist.is_initialized():  # rank 0 decides: another node may see the folder as it was
        dist.broadcast_object_list(found)
    if found[0] is not None:
        return found[0].to(network.device)
    parts = []
    for items in batches(my_share(len(rows)), batch, f"{metric} of {s.folder}"):
        images, damaged = torch.zeros(len(items), s.image_size, s.image_size, 3, dtype=torch.uint8), []
        for k, i in enumerate(items):
            try:
                images[k] = s.read(rows[i])["image"]
            except DamagedImage:
                damaged.append(k)
        parts.append(network(images))
        parts[-1][damaged] = torch.nan
    features = gather_rows(torch.cat(parts), len(rows))
    if is_main:
        write_features(file, features)
    return features


# ---------------------------------------------------------------------------------------------------------------------
# The scorer


def level_of(manifest: dict) -> str:
    """The level of a data set of scenes, by its manifest; demo for any other."""
    source, _, level = manifest.get("source", "").partition(":")
    return level if source == "scenes" and level in scenes.LEVELS else "demo"


class Scorer:
    """Scores pictures of prompts that training does not show. Made once, called as often as wanted; both are collective.

    `metrics` is read by `parse_metrics`. A round is `n` pictures: of held-out scenes of a `level`, or of rows held out of
    `sets`, equally many of each, and fewer where a set has fewer. `level` is that of `sets` if they are scenes, else demo,
    unless given. Raises UserError where a network cannot be had, or where fewer than two rows are held out.
    """

    def __init__(self, metrics: str, sets: list[RowSet], n: int, device: torch.device, *, level: str | None = None,
                 seed: int = 0, batch: int = 32):
        wanted = parse_metrics(metrics)
        level = level or level_of(sets[0].manifest if sets else {})
        self.device, self.seed, self.batch = torch.device(device), seed, batch
        self.shown: dict[str, tuple[np.ndarray, list[str]]] = {}  # round -> the first pictures of this rank, and their prompts
        self.scenes = scenes.make_scenes(n, seed, "held_out", level) if "scenes" in wanted else []
        wanted = {metric: model_id for metric, model_id in wanted.items() if metric != "scenes"}
        rows = [s.held_out[: (n + k) // len(sets)].tolist() for k, s in enumerate(sets)]
        self.prompts = [s.columns["caption"][row].as_py() for s, of_set in zip(sets, rows, strict=True) for row in of_set]
        if wanted and len(self.prompts) < 2:
            folders = ", ".join(s.folder for s in sets) or "no data set"
            raise UserError(f"{', '.join(wanted)}: {folders} gives {len(self.prompts)} of {n} held-out rows, and 2 are needed: "
                            f"use a data set with more of them ({HELD_OUT:.0%} of rows are held out)")
        for turn in (0, 1):  # rank 0 first: what is downloaded is downloaded once
            if (rank_and_world()[0] == 0) == (turn == 0):
                self.networks = {metric: Network(metric, model_id, self.device) for metric, model_id in wanted.items()}
            if dist.is_initialized():
                dist.barrier()
        self.references = {}  # metric -> features [m, D]
        for metric, network in self.networks.items():
            y = torch.cat([reference_features(metric, network, s, of_set, batch)
                           for s, of_set in zip(sets, rows, strict=True) if of_set])
            self.references[metric] = y[~y.isnan().any(dim=1)]

    def __call__(self, draw: Draw) -> dict[str, Score]:
        """The same scores on every rank, under "cmmd", ..., and "scenes_" + the names of scenes.score_scenes.

        `draw` is given up to `batch` prompts and as many seeds, seed + i for picture i, equally often on every rank.
        """
        return (self._scene_scores(draw) if self.scenes else {}) | (self._distances(draw) if self.networks else {})

    def _draw(self, draw: Draw, prompts: list[str], name: str) -> Iterator[tuple[list[int], np.ndarray]]:
        """This rank's share of a round, a batch at a time: the numbers of the pictures, and the pictures."""
        share, first = my_share(len(prompts)), []
        for items in batches(share, self.batch, f"drawing {name}"):
            pictures = draw([prompts[i] for i in items], [self.seed + i for i in items])
            first += list(pictures[: SHOWN - len(first)])
            yield items, pictures
        self.shown[name] = np.stack(first), [prompts[i] for i in share[:SHOWN]]

    def _scene_scores(self, draw: Draw) -> dict[str, Score]:
        found = []
        for items, pictures in self._draw(draw, [scenes.caption(scene) for scene in self.scenes], "scenes"):
            found += [scenes.score_scenes(pictures[k : k + 1], [self.scenes[i]]) for k, i in enumerate(items)]
        names = list(found[0])
        values = torch.tensor([list(scores.values()) for scores in found], dtype=torch.float64, device=self.device)
        values = gather_rows(values, len(self.scenes)).cpu()  # [n, names]
        # A share of all objects weighs scenes by their objects; one of all cells or scenes weighs all scenes alike
        sizes = torch.tensor([[1.0 if name in ("background", "scenes") else len(scene.objects) for name in names]
                              for scene in self.scenes], dtype=torch.float64)
        weights = resample_weights(len(self.scenes))
        shares = (weights @ (sizes * values)) / (weights @ sizes)  # [1 + RESAMPLES, names]
        return {f"scenes_{name}": to_score(share) for name, share in zip(names, shares.T, strict=True)}

    def _distances(self, draw: Draw) -> dict[str, Score]:
        found: dict[str, list[Tensor]] = {metric: [] for metric in self.networks}
        for _, pictures in self._draw(draw, self.prompts, "held_out"):
            for metric, network in self.networks.items():
                found[metric].append(network(pictures))
        scores, weights = {}, resample_weights(len(self.prompts)).to(self.device)
        for metric, parts in found.items():
            x = gather_rows(torch.cat(parts), len(self.prompts))
            # The ranks share the resamples too: 41 eigenvalue problems of FID's 2048 x 2048
            mine = DISTANCES[metric](x, self.references[metric], weights[my_share(len(weights))])
            scores[metric] = to_score(gather_rows(mine, len(weights)))
        return scores
