"""Procedural captioned pictures and their exact scorer: the offline data set of the `demo` preset.

    python scenes.py make --out=data/scenes --rows=20000 --size=32

A scene is 1 to 4 flat objects, at most one in each quarter of the picture, on a plain background. Its caption is its
ground truth, so a generated picture is scored by looking at the quarters that the caption names; no detector is needed.
Some (colour, shape) pairs are held out: no training scene shows them, so drawing them takes composition, not memory.

    make_scenes(n, seed, split) -> [Scene]     caption(scene) -> str     render(scene, size) -> uint8 [H, W, 3]
    score_scenes(images uint8 [B, H, W, 3], scenes) -> {"objects": share in [0, 1], ...}

Lengths are in cells (a cell is a quarter of the picture, size / 2 pixels wide), x to the right and y down, so a scene
is the same picture at every size. Colours are sRGB, 0 to 255.
"""
import hashlib
import io
import itertools
import math
import os
import random
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

# ---------------------------------------------------------------------------------------------------------------------
# What a scene is made of

# Object colours are at least 110 apart and 110 from every background; a shade's jitter moves one by at most 25.
COLOURS = {
    "red": (215, 25, 35), "orange": (240, 130, 10), "yellow": (240, 235, 60), "green": (40, 180, 60),
    "cyan": (60, 210, 230), "blue": (40, 90, 240), "purple": (185, 60, 225), "white": (240, 240, 240),
}
BACKGROUNDS = {"black": (10, 10, 10), "gray": (75, 75, 75), "brown": (90, 50, 20), "navy": (15, 20, 75)}
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # row, column
SIZES = {"small": 0.24, "large": 0.37}  # half an object's extent, in cells: areas 1 to 2.4
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # signed distance to an outline within [-1, 1]^2
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,
    "triangle": lambda x, y: np.maximum(y - 0.8, (1.8 * abs(x) - y - 1) / math.hypot(1.8, 1)),
    "cross": lambda x, y: np.minimum(np.maximum(abs(x) - 1, abs(y) - 0.36), np.maximum(abs(x) - 0.36, abs(y) - 1)),
}
PERIOD = 0.25  # of a texture, in cells: 8 px at 64 px
DEEP = 0.3     # how much of its colour an object has in a texture's valleys, which lie fast in the picture
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # signed distance to the ridges' edges, in periods
    "striped": lambda x, y: wave(y) + 0 * x,
    "checkered": lambda x, y: np.maximum(np.minimum(wave(x), -wave(y)), np.minimum(-wave(x), wave(y))),
}


def wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1, slope 1 and zeros at 1/4 and 3/4: negative for half a period around 0."""
    return abs((x + 0.5) % 1 - 0.5) - 0.25


@dataclass(frozen=True)
class Level:
    """The vocabulary of a level of difficulty and how freely its objects vary."""
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    textures: tuple[str, ...]
    backgrounds: tuple[str, ...]
    max_objects: int
    shift: float    # a centre is at most this far from its cell's along each axis, in cells
    stretch: float  # an extent varies by this share, up and down
    shade: float    # so does a colour's brightness

    def held_out(self) -> list[tuple[str, str]]:
        """The (colour, shape) pairs that training never shows: one shape of each colour, every shape equally often."""
        return [(colour, self.shapes[i % len(self.shapes)]) for i, colour in enumerate(self.colours)]

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """The (colour, shape) pairs that a split draws from: no pair is in both."""
        hidden = self.held_out()
        shown = [(colour, shape) for colour in self.colours for shape in self.shapes if (colour, shape) not in hidden]
        return {"train": shown, "held_out": hidden}[split]


LEVELS = {
    # shift: 1.6 px at 32 px. The largest object then stays inside its cell (0.37 * 1.04 + 0.1 < 0.5).
    "demo": Level(tuple(COLOURS), tuple(SHAPES), tuple(SIZES), ("plain",), tuple(BACKGROUNDS), max_objects=4,
                  shift=0.1, stretch=0.04, shade=0.06),
    "race": Level(tuple(COLOURS), tuple(SHAPES), tuple(SIZES), ("plain", *TEXTURES), tuple(BACKGROUNDS), max_objects=4,
                  shift=0.1, stretch=0.04, shade=0.06),
}


@dataclass(frozen=True)
class SceneObject:
    """One object: what its caption says, then what its caption leaves open."""
    shape: str
    colour: str
    size: str
    place: str
    texture: str = "plain"
    dx: float = 0.0       # centre minus the cell's centre, in cells
    dy: float = 0.0
    stretch: float = 1.0  # times its size's extent
    shade: float = 1.0    # times its colour


@dataclass(frozen=True)
class Scene:
    """Objects, in the order in which the caption names them, on a background."""
    background: str
    objects: tuple[SceneObject, ...]
    level: str = "demo"


# ---------------------------------------------------------------------------------------------------------------------
# Scenes, captions, pictures

SPLITS = ("train", "held_out")


def make_scenes(n: int, seed: int, split: str = "train", level: str = "demo") -> list[Scene]:
    """The first `n` scenes of a split. Scene i depends on (level, split, seed, i) alone.

    No object of a `train` scene has a held-out (colour, shape) pair; every object of a `held_out` scene has one.
    Raises ValueError if there is no such split or level.
    """
    if split not in SPLITS or level not in LEVELS:
        raise ValueError(f"no scenes {split!r} of level {level!r}: splits are {', '.join(SPLITS)}; "
                         f"levels are {', '.join(LEVELS)}")
    return [make_scene(i, seed, split, level) for i in range(n)]


def make_scene(index: int, seed: int, split: str, level: str) -> Scene:
    """Scene number `index` of make_scenes."""
    rng = random.Random(f"{level}/{split}/{seed}/{index}")  # seeded by the text's hash: the same in every process
    rules = LEVELS[level]
    background = rng.choice(rules.backgrounds)
    objects = []
    for place in rng.sample(list(PLACES), rng.randint(1, rules.max_objects)):
        colour, shape = rng.choice(rules.pairs(split))
        texture = rng.choice(rules.textures) if len(rules.textures) > 1 else rules.textures[0]
        objects.append(SceneObject(
            shape, colour, size=rng.choice(rules.sizes), place=place, texture=texture,
            dx=rng.uniform(-rules.shift, rules.shift), dy=rng.uniform(-rules.shift, rules.shift),
            stretch=1 + rng.uniform(-rules.stretch, rules.stretch), shade=1 + rng.uniform(-rules.shade, rules.shade)))
    return Scene(background, tuple(objects), level)


def caption(scene: Scene, short: bool = False) -> str:
    """What the picture shows: everything but the jitter, or if `short` the objects' colours and shapes only.

    Long: "a large red circle in the top left, a small blue square in the bottom right, on a gray background".
    Short: "a red circle and a blue square". Without its function words an object's phrase is five words, so that each
    of them has the others within four: the reach of the built-in text encoder.
    """
    if short:
        names = [f"{'an' if obj.colour[0] in 'aeiou' else 'a'} {obj.colour} {obj.shape}" for obj in scene.objects]
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    textured = len(LEVELS[scene.level].textures) > 1
    phrases = [f"a {obj.size} {f'{obj.texture} ' if textured else ''}{obj.colour} {obj.shape} in the {obj.place}"
               for obj in scene.objects]
    return ", ".join([*phrases, f"on a {scene.background} background"])


def coverage(shape: str, texture: str, extent: float, dx: float, dy: float, cell: int) -> np.ndarray:
    """How much of each pixel of a cell, `cell` pixels wide, has the object's colour: float32 [cell, cell] in [0, 1]."""
    x = (np.arange(cell, dtype=np.float32)[None] + 0.5) / cell - 0.5
    y = x.T
    inside = np.clip(0.5 - cell * extent * SHAPES[shape]((x - dx) / extent, (y - dy) / extent), 0, 1)
    if texture == "plain":
        return inside  # an outline through a pixel's middle covers half of it
    return inside * (DEEP + (1 - DEEP) * np.clip(0.5 - cell * PERIOD * TEXTURES[texture](x / PERIOD, y / PERIOD), 0, 1))


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as uint8 sRGB [size, size, 3], anti-aliased; `size` is even, in pixels."""
    cell = size // 2
    picture = np.full((size, size, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    for obj in scene.objects:
        row, column = PLACES[obj.place]
        view = picture[row * cell:(row + 1) * cell, column * cell:(column + 1) * cell]
        alpha = coverage(obj.shape, obj.texture, SIZES[obj.size] * obj.stretch, obj.dx, obj.dy, cell)[..., None]
        view += alpha * (np.float32(COLOURS[obj.colour]) * np.float32(obj.shade) - view)
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The scorer

PRESENT_SHARE = 0.6    # of a cell's variance, explained by its best template; true renders 0.88 and more, noise 0.04
PRESENT_CONTRAST = 80  # foreground to background; black to white is 441, true renders 97 and more, the mean picture 67
COLOUR_REACH = 110     # farther than this from every named colour is no colour; no two named colours are nearer
SHIFTS = [0.03 * i for i in range(-4, 5)]  # of the templates, in cells: half a pixel apart at 32 px


@lru_cache(maxsize=4)
def templates(level: str, cell: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every shape x size x texture x shift as (unit [T, P], norm [T], mean [T], names [3, T]), with P = cell^2 pixels.

    A template's coverage is mean + norm * unit, where `unit` has mean 0 and length 1; `names` index the level's shapes,
    sizes and textures.
    """
    rules = LEVELS[level]
    kinds = itertools.product(*(range(len(names)) for names in (rules.shapes, rules.sizes, rules.textures)))
    keys = [(kind, dx, dy) for kind in kinds for dx in SHIFTS for dy in SHIFTS]
    masks = np.stack([coverage(rules.shapes[i], rules.textures[k], SIZES[rules.sizes[j]], dx, dy, cell).ravel()
                      for (i, j, k), dx, dy in keys])  # [T, P]
    mean = masks.mean(1)
    unit = masks - mean[:, None]
    norm = np.linalg.norm(unit, axis=1)
    return unit / norm[:, None], norm, mean, np.array([kind for kind, _, _ in keys]).T


def read_cells(images: np.ndarray, level: str) -> dict[str, np.ndarray]:
    """What each cell of uint8 images [B, H, W, 3] shows: arrays [B, 4], cells in the order of PLACES.

    `present` is bool; `shape`, `size`, `texture`, `colour` and `background` index the level's names, -1 for no known colour.
    Least squares of the pixels x on a template m and a constant, x = b + (f - b) m, has a closed form: with m centred
    and scaled to length 1 it explains (x . m)^2 of each channel's squared deviation. So one product with all templates
    ranks them, and the best one's slope and intercept are the foreground f and the background b.
    """
    batch, size = images.shape[:2]
    if images.shape[1:] != (size, size, 3) or size % 2 or images.dtype != np.uint8:
        raise ValueError(f"images are uint8 [B, H, W, 3] with H = W, even, not {images.dtype} {list(images.shape)}")
    cell = size // 2
    unit, norm, cover, names = templates(level, cell)
    x = images.reshape(batch, 2, cell, 2, cell, 3)    # [B, H, W, 3] -> [B, row, y, column, x, 3]
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(batch * 4, 3, cell * cell).astype(np.float32)  # -> [4 B, 3, P]
    mean = x.mean(2)
    x -= mean[..., None]
    slopes = x @ unit.T                           # [4 B, 3, P] @ [P, T] -> [4 B, 3, T]
    explained = (slopes ** 2).sum(1)              # [4 B, T]
    best = explained.argmax(1)                    # [4 B]
    contrast = np.take_along_axis(slopes, best[:, None, None], 2)[..., 0] / norm[best][:, None]  # f - b, [4 B, 3]
    background = mean - contrast * cover[best][:, None]
    present = explained.max(1) > PRESENT_SHARE * (x ** 2).sum((1, 2))
    present &= np.linalg.norm(contrast, axis=1) > PRESENT_CONTRAST
    rules = LEVELS[level]
    found = {
        "present": present, **dict(zip(("shape", "size", "texture"), names[:, best])),
        "colour": nearest(background + contrast, [COLOURS[name] for name in rules.colours]),
        "background": nearest(background, [BACKGROUNDS[name] for name in rules.backgrounds]),
    }
    return {name: value.reshape(batch, 4) for name, value in found.items()}


def nearest(colours: np.ndarray, palette: list[tuple[int, int, int]]) -> np.ndarray:
    """Index [N] of the palette's entry nearest to each of `colours` [N, 3], -1 if none is within COLOUR_REACH."""
    colours = colours.clip(0, 255)  # a fit may overshoot: a shape thinner than its template makes white whiter than white
    distance = np.linalg.norm(colours[:, None] - np.float32(palette), axis=2)  # [N, len(palette)]
    return np.where(distance.min(1) < COLOUR_REACH, distance.argmin(1), -1)


def score_scenes(images, scenes: list[Scene]) -> dict[str, float]:
    """How well uint8 images [B, H, W, 3], numpy or torch, show their B scenes, all of one level: shares in [0, 1].

    Of all objects that the captions name (one that is not there has no attribute right):
        place       something is there: a template explains over 60% of its cell's variance, at a visible contrast
        colour, shape, size, texture    it is there, and the fit has this attribute as captioned
        objects     right colour at its place: the headline, and by these definitions equal to `colour`
        exact       right in place, colour, shape, size and texture
    Of all cells:
        background  the fitted background is the captioned one
    Of all scenes:
        scenes      the whole caption holds: every object exact, every background right, and nothing in the other places
    On 2,048 held-out scenes at 32 px: true renders give 1.0 in all of these; with 5% noise 1.0, with 10%
    0.89 objects and exact; captions of other pictures give 0.08 objects (chance: 2.5 of 4 places times 1 of 8 colours)
    and 0.045 exact; blank, mean, striped and noise pictures give 0 of both. Raises ValueError for another
    shape or dtype.
    """
    images = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    level = scenes[0].level
    if len(images) != len(scenes) or any(scene.level != level for scene in scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes: need one for each, and scenes of one level")
    rules, places, found = LEVELS[level], list(PLACES), read_cells(images, level)

    scene_of = np.array([i for i, scene in enumerate(scenes) for _ in scene.objects])          # [objects]
    at = scene_of, np.array([places.index(obj.place) for scene in scenes for obj in scene.objects])

    def named(attribute: str, names: tuple[str, ...]) -> np.ndarray:
        """Which objects are there with this attribute as captioned: bool [objects]."""
        wanted = np.array([names.index(getattr(obj, attribute)) for scene in scenes for obj in scene.objects])
        return found["present"][at] & (found[attribute][at] == wanted)

    place = found["present"][at]
    colour, shape = named("colour", rules.colours), named("shape", rules.shapes)
    size, texture = named("size", rules.sizes), named("texture", rules.textures)
    exact = colour & shape & size & texture
    wanted = np.array([rules.backgrounds.index(scene.background) for scene in scenes])
    background = found["background"] == wanted[:, None]  # [B, 4]
    shown = ~found["present"]                # [B, 4]: an unnamed place is right if empty
    shown[at] = exact                        # a named one if its object is exact
    return {
        "objects": float(colour.mean()), "exact": float(exact.mean()),
        "place": float(place.mean()), "colour": float(colour.mean()), "shape": float(shape.mean()),
        "size": float(size.mean()), "texture": float(texture.mean()), "background": float(background.mean()),
        "scenes": float((shown & background).all(1).mean()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The teacher: a small ViT that has learned what the training scenes hold, for REPA and P-DINO without a download

TEACHER_DIM = 96
IGNORED = -100  # a label that teaches nothing


def token_labels(scene: Scene, tokens: int) -> np.ndarray:
    """What each of tokens x tokens squares of the picture shows: int64 [5, tokens, tokens].

    Colour, shape, size and texture of the object that covers most of the square, if that is a quarter of it, as 1 + the
    index of the level's name, else 0; then the background, as its index.
    """
    rules, fine = LEVELS[scene.level], 4  # pixels a token along each side, to measure what covers it
    labels = np.zeros((5, tokens, tokens), np.int64)
    labels[4] = rules.backgrounds.index(scene.background)
    most = np.full((tokens, tokens), 0.25)
    for obj in scene.objects:
        black = Scene("black", (replace(obj, colour="white", texture="plain", shade=1.0),), scene.level)
        share = render(black, fine * tokens)[..., 0].reshape(tokens, fine, tokens, fine).mean((1, 3)) / COLOURS["white"][0]
        names = (rules.colours.index(obj.colour), rules.shapes.index(obj.shape), rules.sizes.index(obj.size),
                 rules.textures.index(obj.texture))
        labels[:4, share > most] = 1 + np.array(names)[:, None]
        most = np.maximum(most, share)
    return labels


def train_teacher(data: Path, steps: int, seed: int, batch: int = 64) -> str:
    """Train the teacher of a set of scenes and write it to data/teacher, a folder as transformers has them; says how good it is.

    A DINOv2 with registers of 3 blocks tells for each of its patches what `token_labels` says. It sees scenes of the set only:
    training scenes. Raises UserError where `data` is no set of scenes, or has a teacher.
    """
    import torch
    import torch.nn.functional as F
    from tqdm import trange
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from metrics import IMAGENET, level_of
    from muon import Muon
    from shards import UserError, file_sha256, read_manifest

    manifest, out = read_manifest(data), data / "teacher"
    if not manifest.get("source", "").startswith("scenes:"):
        raise UserError(f"{data} holds no scenes: the teacher learns from their labels")
    if out.exists():
        raise UserError(f"{out} exists; delete it to train another")
    level, scenes_seed, size = level_of(manifest), int(manifest["revision"].removeprefix("seed ")), max(manifest["sizes"])
    rules, patch = LEVELS[level], min(16, size // 8)
    counts = [1 + len(names) for names in (rules.colours, rules.shapes, rules.sizes, rules.textures)] + [len(rules.backgrounds)]
    torch.manual_seed(seed)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=TEACHER_DIM, num_hidden_layers=3, num_attention_heads=3, image_size=size, patch_size=patch))
    head = torch.nn.Linear(TEACHER_DIM, sum(counts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, head = model.to(device).train(), head.to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in IMAGENET)
    parameters = {p: p.ndim == 2 and "encoder" in name for name, p in [*model.named_parameters(), *head.named_parameters()]}
    optimizer = Muon([{"params": [p for p, muon in parameters.items() if muon], "use_muon": True, "lr": 1e-2},
                      {"params": [p for p, muon in parameters.items() if not muon], "use_muon": False, "lr": 3e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    random_of = random.Random(seed)

    def read(shown: list[Scene], recoloured: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The labels of scenes, [5, B, N], and the logits for each kind of label, [B, classes, N].

        The first `recoloured` pictures have their channels exchanged, or are negatives as well.
        """
        images = torch.from_numpy(np.stack([render(scene, size) for scene in shown])).to(device)
        for image in images[:recoloured]:  # [H, W, 3]
            image.copy_(image[..., random_of.sample(range(3), 3)] ^ random_of.choice((0, 255)))
        x = (images.permute(0, 3, 1, 2) / 255 - mean) / std  # [B, H, W, 3] -> [B, 3, H, W]
        features = model(x).last_hidden_state[:, 1 + model.config.num_register_tokens:]  # [B, N, C]
        labels = np.stack([token_labels(scene, size // patch) for scene in shown], axis=1)  # [5, B, tokens, tokens]
        return torch.from_numpy(labels).flatten(2).to(device), head(features).transpose(1, 2).split(counts, dim=1)

    for _ in trange(steps, desc=f"teacher of {data}", unit=" steps", disable=None):
        shown = [make_scene(random_of.randrange(manifest["rows"]), scenes_seed, "train", level) for _ in range(batch)]
        labels, logits = read(shown, recoloured := 3 * batch // 4)
        # A network that tells shapes by their colours denies the held-out pairs: it had 1% of their patches right, and has 34%
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
    aside = data / ".teacher.partial"
    model.save_pretrained(aside)
    os.replace(aside, out)
    said = ", ".join(f"{name} {share:.1%}" for name, share in zip(("colour", "shape", "size", "texture"), shares))
    return f"{out}: sha256 {file_sha256(out / 'model.safetensors')}; right on held-out objects' patches: {said}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def make_rows(sizes: list[int], seed: int, level: str, part, dropped) -> Iterator[dict]:
    """The training scenes of a part, whose content is their numbers, as data_prep.write_dataset takes them."""
    from data_prep import tick

    for i in part.content:
        tick()
        scene, key = make_scene(i, seed, "train", level), f"scenes-{level}-{seed}-train-{i:06d}"
        yield {"key": key, "images": {size: png(render(scene, size)) for size in sizes}, "caption": caption(scene),
               "caption_short": caption(scene, short=True), "source": f"scenes:{level}",
               "digest": hashlib.sha256(key.encode()).digest()[:16]}


def png(picture: np.ndarray) -> bytes:
    """A picture as PNG: at 32 px JPEG's colour error is as large as the signal."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def size_list(text: str) -> list[int]:
    sizes = sorted({int(size) if size.isdecimal() else 0 for size in text.split(",")})
    if any(size < 16 or size % 2 for size in sizes):
        raise ArgumentTypeError(f"{text!r} is not a comma list of even numbers of pixels, each 16 or more")
    return sizes


def main(argv: list[str]) -> None:
    # Imported here: the rest of this file needs no torch, and train_prx.py may then import it.
    from data_prep import ROWS_A_PART, Part, write_dataset
    from train_prx import Parser, UserError

    parser = Parser(prog="scenes.py", description="Make a data set of procedural captioned pictures, or its teacher.")
    parser.add_argument("command", choices=["make", "teacher"], help="make: write training scenes to --out; teacher: train the small "
                        "network of --frozen=scene on their labels, and write it to --data/teacher")
    parser.add_argument("--data", type=Path, help="teacher: the set of scenes that it learns from")
    parser.add_argument("--steps", type=int, default=500, help="teacher: training steps, of 64 scenes each")
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder to make; must not exist")
    parser.add_argument("--rows", type=int, default=20000, help="number of pictures")
    parser.add_argument("--size", type=size_list, default="32", help="width and height, px; a comma list makes several")
    parser.add_argument("--level", default="demo", help=f"difficulty: {', '.join(LEVELS)}")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other scenes")
    args = parser.parse_args(argv)
    if args.command == "teacher":
        if args.data is None or args.steps < 1:
            raise UserError("teacher needs --data=FOLDER, a set of scenes, and --steps of at least 1")
        print(train_teacher(args.data, args.steps, args.seed))
        return
    if args.rows < 1:
        raise UserError(f"--rows={args.rows}: need 1 or more")
    if args.level not in LEVELS:
        raise UserError(f"--level={args.level}: valid is {', '.join(LEVELS)}")
    settings = {"source": f"scenes:{args.level}", "revision": f"seed {args.seed}", "sizes": args.size}

    source_hash = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def parts(finished) -> Iterator[Part]:
        for first in range(0, args.rows, ROWS_A_PART):
            numbers = range(first, min(first + ROWS_A_PART, args.rows))
            yield Part(str(numbers), source_hash, len(numbers), numbers)

    write_dataset(args.out, parts, partial(make_rows, args.size, args.seed, args.level), settings=settings, total=args.rows,
                  prompts=[caption(scene) for scene in make_scenes(16, args.seed, "held_out", args.level)],
                  workers=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    from train_prx import run_main

    run_main(main)
