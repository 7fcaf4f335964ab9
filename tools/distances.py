"""Distances between sets of pictures, through the features of frozen networks.

    cmmd  squared MMD of CLIP embeddings (Jayasumana et al., arXiv 2401.09603), resized as PRX's CMMD does
    mmd   squared MMD of DINOv2's CLS token, which is PRX's DINO-MMD
    fdd   Frechet distance of DINOv2's CLS token (Stein et al., arXiv 2306.04675). Its grid of position embeddings is
          resized by transformers, and in the paper by torch.hub's code, which shifts it by up to 0.1 of a patch
    fid   Frechet distance of Inception's pooled features (Heusel et al., arXiv 1706.08500) as torchmetrics has it:
          resized with antialiasing, the original's was without. Images are passed as uint8. PRX passes uint8 with
          normalize=True, which inverts them: its FIDs compare with none

Distances are 0 for equal sets, and compare only at the same held-out pictures, size and number of pictures n: all are
too high by a term in 1 / n, cmmd by about 10 / n. PRX takes n = 10,000, 50 steps, guidance 3.5; papers 10,000 to
50,000, most of COCO or ImageNet.
"""
import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from train_prx import IMAGENET, UserError, file_sha256, load_pretrained

NETWORKS = {"cmmd": "openai/clip-vit-large-patch14-336", "mmd": "facebook/dinov2-with-registers-large",
            "fdd": "facebook/dinov2-large", "fid": ""}  # metric -> its network, unless another is asked for
CLIPS, DINOS = ("clip", "clip_vision_model"), ("dinov2", "dinov2_with_registers")  # transformers' model types
RESAMPLES = 40  # of the bootstrap: an error is then itself known to 1 / sqrt(2 * 39) = 11%


class Score(NamedTuple):
    """A value and half of its 95% interval: 1.96 standard deviations over RESAMPLES bootstrap resamples.

    Generated pictures are resampled, held-out ones stay: the interval is that of other prompts and seeds of the same
    weights, not of another training run.
    """
    value: float
    error: float


def resample_weights(n: int) -> Tensor:
    """Float64 [1 + RESAMPLES, n], the same for each n: row 0 is 1 / n, others count / n in n draws with replacement."""
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones_like(counts[:1]), counts]) / n


def to_score(values: Tensor) -> Score:
    """The score of values [1 + RESAMPLES], computed with the rows of `resample_weights`."""
    return Score(values[0].item(), 1.96 * values[1:].std().item())


# ---------------------------------------------------------------------------------------------------------------------
# Distances between features x [n, D] of generated and y [m, D] of held-out pictures


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
    """Frechet distance of x [n, D], for each row of weights [R, n], and y [m, D]: float64 [R]. n, m >= 2, may be < D.

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) with unbiased covariances (arXiv 1706.08500). For the L
    of a QR of y, S_y = L L^T, the last trace sums the square roots of the eigenvalues of L^T S_x L, which is symmetric.
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


# ---------------------------------------------------------------------------------------------------------------------
# Networks: pictures -> features

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # as IMAGENET: mean, std of RGB


def load_transformer(model_id: str, clip: bool) -> tuple[torch.nn.Module, str]:
    """A CLIP or DINOv2 in fp32, and what identifies its weights; raises UserError if it cannot be had, or is none."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    kind, kinds = load_pretrained(AutoConfig, model_id).model_type, CLIPS if clip else DINOS
    if kind not in kinds:
        raise UserError(f"{model_id} is a model of type {kind}, and this metric takes {' or '.join(kinds)}")
    model = load_pretrained(CLIPVisionModelWithProjection if clip else AutoModel, model_id, dtype=torch.float32,
                            output_loading_info=True)
    file = Path(model_id, "model.safetensors")  # of a folder
    return model, f"{model_id} {file_sha256(file) if file.is_file() else model.config._commit_hash}"


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
        # Its weights are random before they are loaded; torch.hub announces a download on stderr
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except Exception as error:  # the net's or the disk's; and a damaged pickle raises almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"metric fid cannot load its network ({reason}): download {URL_INCEPTION_V3} as "
                        f"{file}") from None
    return model, f"{file.name} {file_sha256(file)}, torchmetrics {torchmetrics.__version__}"  # whose resizing changed


class Network:
    """The frozen network of a metric: uint8 images [B, H, W, 3], numpy or torch, -> features [B, D] fp32 on its device.

    `key` identifies network and weights.
    """

    def __init__(self, metric: str, model_id: str, device: torch.device):
        self.metric, self.device = metric, device
        model, self.key = load_inception() if metric == "fid" else load_transformer(model_id, clip=metric == "cmmd")
        self.model = model.eval().requires_grad_(False).to(device)
        if metric != "fid":
            self.size = 16 * model.config.patch_size if metric == "fdd" else model.config.image_size

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        x = torch.as_tensor(images, device=self.device).permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]
        if self.metric == "fid":
            return self.model(x)
        x = x.float()
        if self.metric == "mmd":  # as PRX's: not antialiased
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        else:  # as Pillow: antialiased, rows first, whole levels after each pass; equal to 2 levels, nearly always to 0
            for size in ((x.shape[2], self.size), (self.size, self.size)):
                x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        mean, std = torch.tensor(OPENAI if self.metric == "cmmd" else IMAGENET, device=self.device)[..., None, None]
        x = (x / 255 - mean) / std
        if self.metric == "cmmd":
            return F.normalize(self.model(pixel_values=x).image_embeds, dim=1)
        cls = self.model(pixel_values=x).last_hidden_state[:, 0]
        return cls if self.metric == "fdd" else F.normalize(cls, dim=1)
