"""A small ViT that has learned what the training scenes of a data set hold: REPA and P-DINO without a download.

    python tools/teacher.py --data=data/race              writes data/race/teacher, in transformers' own format
    python train_prx.py --preset=race --frozen=pretrained --repa_teacher=data/race/teacher --repa_dim=96 \\
        --pdino_model=data/race/teacher --lpips_weight=0

It has seen labels of the kind that the scorer grades: a run that uses it says so by these flags.
"""
import itertools
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from muon import Muon
from sample import SEED, WHOLE, usable_device
from tools.scenes import BACKGROUNDS, COLOURS, LEVELS, Scene, level_of, make_scene, make_scenes, render
from train_prx import IMAGENET, Config, Parser, UserError, compute_dtype, file_sha256, read_manifest, run_main

TEACHER_DIM = 96
IGNORED = -100  # a label that teaches nothing


def token_labels(scene: Scene, tokens: int) -> np.ndarray:
    """What each of tokens x tokens squares of the picture shows: int64 [5, tokens, tokens].

    Colour, shape, size and texture of the object that covers most of the square, if that is a quarter of it, as 1 + the
    index of the level's name, else 0; then the background, as its index.
    """
    words, fine = LEVELS[scene.level].words, 4  # pixels a token along each side, to measure what covers it
    labels = np.zeros((5, tokens, tokens), np.int64)
    labels[4] = list(BACKGROUNDS).index(scene.background)
    most = np.full((tokens, tokens), 0.25)
    for obj in scene.objects:
        alone = Scene("black", (replace(obj, colour="white", texture="plain", shade=1.0),), scene.level)
        white = render(alone, fine * tokens)[..., 0].reshape(tokens, fine, tokens, fine)
        share = white.mean((1, 3)) / COLOURS["white"][0]
        labels[:4, share > most] = [[1 + names.index(getattr(obj, name))] for name, names in words.items()]
        most = np.maximum(most, share)
    return labels


def train_teacher(data: Path, out: Path, steps: int, seed: int, batch: int = 64) -> str:
    """Train the teacher of a set of scenes, write it to `out`, and say how good it is.

    A DINOv2 with registers of 3 blocks tells for each of its patches what `token_labels` says. It sees scenes of the
    set only: training scenes. Raises UserError where `data` is no set of scenes, or `out` exists.
    """
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    manifest = read_manifest(data)
    level = level_of(manifest)
    if not level:
        raise UserError(f"{data} holds no scenes: the teacher learns from their labels")
    if out.exists():
        raise UserError(f"{out} exists; delete it to train another")
    scenes_seed, size = int(manifest["revision"].removeprefix("seed ")), max(manifest["sizes"])
    words, patch = LEVELS[level].words, min(16, size // 8)
    counts = [1 + len(names) for names in words.values()] + [len(BACKGROUNDS)]
    torch.manual_seed(seed)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=TEACHER_DIM, num_hidden_layers=3, num_attention_heads=3, image_size=size, patch_size=patch))
    head = torch.nn.Linear(TEACHER_DIM, sum(counts))
    device = torch.device(usable_device())
    model, head = model.to(device).train(), head.to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in IMAGENET)
    matrices, others = [], []
    for name, p in itertools.chain(model.named_parameters(), head.named_parameters()):
        (matrices if p.ndim == 2 and "encoder" in name else others).append(p)
    # Muon had 54% of the held-out pairs' shapes right on `demo`, Adam alone 19%
    optimizer = Muon([{"params": matrices, "use_muon": True, "lr": 1e-2, "ns_dtype": compute_dtype(Config(), device)},
                      {"params": others, "use_muon": False, "lr": 3e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    rng = random.Random(seed)

    def read(shown: Iterable[Scene], recoloured: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The labels of scenes, [5, B, N], and the logits for each kind of label, [B, classes, N].

        The first `recoloured` pictures have their channels exchanged, or are negatives as well.
        """
        images = torch.from_numpy(np.stack([render(scene, size) for scene in shown])).to(device)
        for image in images[:recoloured]:  # [H, W, 3]
            image.copy_(image[..., rng.sample(range(3), 3)] ^ rng.choice((0, 255)))
        x = (images.permute(0, 3, 1, 2) / 255 - mean) / std  # [B, H, W, 3] -> [B, 3, H, W]
        features = model(x).last_hidden_state[:, 1 + model.config.num_register_tokens:]  # [B, N, C]
        labels = np.stack([token_labels(scene, size // patch) for scene in shown], axis=1)  # [5, B, tokens, tokens]
        return torch.from_numpy(labels).flatten(2).to(device), head(features).transpose(1, 2).split(counts, dim=1)

    recoloured = 3 * batch // 4
    for _ in trange(steps, desc=f"teacher of {data}", unit=" steps", disable=None):
        shown = [make_scene(rng.randrange(manifest["rows"]), scenes_seed, "train", level) for _ in range(batch)]
        labels, logits = read(shown, recoloured)
        # A network that tells shapes by colours denies the held-out pairs: it had 1% of their patches right, now 34%
        labels[[0, 4], :recoloured] = IGNORED
        labels[1, recoloured:] = IGNORED
        loss = sum(F.cross_entropy(logit, label, ignore_index=IGNORED) for logit, label in zip(logits, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        labels, logits = read(make_scenes(128, seed, "held_out", level))
    on_object = labels[0] > 0
    shares = [(logit.argmax(1) == label)[on_object].float().mean().item() for logit, label in zip(logits[:4], labels)]
    aside = out.with_name(f".{out.name}.partial")
    model.save_pretrained(aside)
    os.replace(aside, out)
    said = ", ".join(f"{name} {share:.1%}" for name, share in zip(words, shares))
    return f"{out}: sha256 {file_sha256(out / 'model.safetensors')}; right on held-out objects' patches: {said}"


def main(argv: list[str]) -> None:
    parser = Parser(prog="tools/teacher.py", description="Train the teacher of a set of scenes: a minute or two.")
    parser.add_argument("--data", type=Path, required=True, help="the set of scenes that it learns from")
    parser.add_argument("--out", type=Path, help="folder to write; must not exist (default: DATA/teacher)")
    parser.add_argument("--steps", type=WHOLE, default=500, help="training steps, of 64 scenes each")
    parser.add_argument("--seed", type=SEED, default=0, help="of its weights and of what it sees")
    args = parser.parse_args(argv)
    print(train_teacher(args.data, args.out or args.data / "teacher", args.steps, args.seed))


if __name__ == "__main__":
    run_main(main)
