"""Procedural captioned pictures and their exact scorer: the offline data set of the presets `demo`, `race` and `solo`.

    python tools/scenes.py make --out=data/demo --rows=20000 --size=32 --level=demo

A scene is 1 to 4 flat objects on a plain background. Its caption is its ground truth, so a picture is scored by fitting
templates to it, without a detector network. Some (colour, shape) pairs are held out: no training scene shows them, so
drawing them takes composition, not memory.

    demo   4 shapes, at most one in each quarter of the picture; the caption names the quarter
    race   the same, with textures
    solo   8 shapes with textures, of different colours, anywhere but apart; the caption relates each object to the next

Lengths are in cells (a cell is a quarter of the picture, size / 2 pixels wide), x to the right and y down, so a scene
is the same picture at every size. Colours are sRGB, 0 to 255.
"""
import io
import itertools
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from data_prep import ROWS_A_PART, Part, cores, write_dataset
from sample import WHOLE, checked
from train_prx import Parser, file_sha256, run_main

# ---------------------------------------------------------------------------------------------------------------------
# What a scene is made of


def wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1, slope 1 and zeros at 1/4 and 3/4: negative for half a period around 0."""
    return abs((x + 0.5) % 1 - 0.5) - 0.25


# Object colours are at least 110 apart and 110 from every background; a shade's jitter moves one by at most 25.
COLOURS = {
    "red": (215, 25, 35), "orange": (240, 130, 10), "yellow": (240, 235, 60), "green": (40, 180, 60),
    "cyan": (60, 210, 230), "blue": (40, 90, 240), "purple": (185, 60, 225), "white": (240, 240, 240),
}
BACKGROUNDS = {"black": (10, 10, 10), "gray": (75, 75, 75), "brown": (90, 50, 20), "navy": (15, 20, 75)}
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # row, column
SIZES = {"small": 0.24, "large": 0.37}  # half an object's extent, in cells: areas 1 to 2.4
FIFTH = 0.4 * math.pi  # of a turn
SHAPES = {  # x, y -> signed distance to an outline within [-1, 1]^2
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,
    "triangle": lambda x, y: np.maximum(y - 0.8, (1.8 * abs(x) - y - 1) / math.hypot(1.8, 1)),
    "cross": lambda x, y: np.minimum(np.maximum(abs(x) - 1, abs(y) - 0.36), np.maximum(abs(x) - 0.36, abs(y) - 1)),
    "diamond": lambda x, y: (abs(x) + abs(y) - 1) / 2**0.5,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.68) - 0.28,
    "star": lambda x, y: (np.hypot(x, y) * np.cos(FIFTH * (wave(np.arctan2(x, -y) / FIFTH) + 0.25) - 1.1)
                          - math.cos(1.1)),
    "heart": lambda x, y: np.minimum((abs(x) + abs(y) - 0.8) / 2**0.5, np.hypot(abs(x) - 0.4, y + 0.4) - 0.4 * 2**0.5),
}
PERIOD = 0.25  # of a texture, in cells: 8 px at 64 px
DEEP = 0.3     # how much of its colour an object has in a texture's valleys, which lie fast in the picture
TEXTURES = {  # x, y -> signed distance to the ridges' edges, in periods
    "striped": lambda x, y: wave(y) + 0 * x,
    "checkered": lambda x, y: np.maximum(np.minimum(wave(x), -wave(y)), np.minimum(-wave(x), wave(y))),
}
MAX_OBJECTS = 4
STRETCH, SHADE = 0.04, 0.06  # an extent and a colour's brightness vary by this share, up and down
DIAGONAL = 0.1  # by so much, in cells, two related centres are farther apart along one axis than along the other


@dataclass(frozen=True)
class Level:
    """A level of difficulty: its shapes and textures, and where its objects lie."""
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    shift: float = 0.1  # how far a centre is from its place's along each axis at most: 0.37 * 1.04 + 0.1 < 0.5
    room: float = 1.0   # side of the square that an object has to itself; sizes and periods scale with it

    @property
    def free(self) -> bool:
        """Whether objects lie anywhere, and captions relate them; else each has one of PLACES."""
        return self.room < 1

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """What an object may be, attribute by attribute."""
        return {"colour": tuple(COLOURS), "shape": self.shapes, "size": tuple(SIZES), "texture": self.textures}

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """The (colour, shape) pairs of a split, `train` or `held_out`, which has a shape of each colour."""
        hidden = [(colour, self.shapes[i % len(self.shapes)]) for i, colour in enumerate(COLOURS)]
        return hidden if split == "held_out" else [
            pair for pair in itertools.product(COLOURS, self.shapes) if pair not in hidden]


LEVELS = {
    "demo": Level(tuple(SHAPES)[:4], ("plain",)),
    "race": Level(tuple(SHAPES)[:4], ("plain", *TEXTURES)),
    # Objects at 128 px are as large as race's at 64 px; their room stays inside the picture (0.75 + 0.5 / 2 = 1).
    "solo": Level(tuple(SHAPES), ("plain", *TEXTURES), shift=0.75, room=0.5),
}


@dataclass(frozen=True)
class SceneObject:
    """One object: what its caption says, then what its caption leaves open."""
    shape: str
    colour: str
    size: str
    place: str            # of PLACES; "" in a free level
    texture: str = "plain"
    dx: float = 0.0       # centre minus the place's centre (the picture's in a free level), in cells
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


def make_scenes(n: int, seed: int, split: str = "train", level: str = "demo") -> list[Scene]:
    """The first `n` scenes of a split, with its pairs only. Scene i depends on (level, split, seed, i) alone."""
    if split not in ("train", "held_out") or level not in LEVELS:
        raise ValueError(f"no scenes {split!r} of level {level!r}: there are train, held_out; {', '.join(LEVELS)}")
    return [make_scene(i, seed, split, level) for i in range(n)]


def make_scene(index: int, seed: int, split: str, level: str) -> Scene:
    """Scene number `index` of make_scenes."""
    rng = random.Random(f"{level}/{split}/{seed}/{index}")  # seeded by the text's hash: the same in every process
    rules = LEVELS[level]
    background, count, pairs = rng.choice(list(BACKGROUNDS)), rng.randint(1, MAX_OBJECTS), rules.pairs(split)

    def draw(place: str) -> SceneObject:
        colour, shape = rng.choice(pairs)
        texture = rng.choice(rules.textures) if len(rules.textures) > 1 else rules.textures[0]
        size = rng.choice(list(SIZES))
        dx, dy = rng.uniform(-rules.shift, rules.shift), rng.uniform(-rules.shift, rules.shift)
        stretch, shade = 1 + rng.uniform(-STRETCH, STRETCH), 1 + rng.uniform(-SHADE, SHADE)
        return SceneObject(shape, colour, size, place, texture, dx, dy, stretch, shade)

    places = [""] * count if rules.free else rng.sample(list(PLACES), count)
    objects = [draw(place) for place in places]
    while rules.free and not is_clear(objects, rules.room):
        objects = [draw(place) for place in places]
    return Scene(background, tuple(objects), level)


def is_clear(objects: list[SceneObject], room: float) -> bool:
    """Whether free objects have room, a colour of their own, to be found by, and no relation near a diagonal."""
    apart = all(max(abs(a.dx - b.dx), abs(a.dy - b.dy)) >= room for a, b in itertools.combinations(objects, 2))
    related = all(abs(abs(a.dx - b.dx) - abs(a.dy - b.dy)) >= DIAGONAL for a, b in itertools.pairwise(objects))
    return apart and related and len({obj.colour for obj in objects}) == len(objects)


def relation(a: SceneObject, b: SceneObject) -> str:
    """Where free object `a` is, seen from `b`: along the axis on which their centres are farther apart."""
    x, y = a.dx - b.dx, a.dy - b.dy
    return ("left of" if x < 0 else "right of") if abs(x) > abs(y) else ("above" if y < 0 else "below")


def caption(scene: Scene, short: bool = False) -> str:
    """What the picture shows: everything but the jitter, or if `short` the objects' colours and shapes only.

    "a large red circle in the top left, a small blue square in the bottom right, on a gray background"; in a free level
    "a large striped red circle left of a small plain blue square, on a gray background"; short: "a red circle and a
    blue square". Text tokens do not mix in the model, and the built-in encoder gives each the words up to four away,
    function words left out: five make a phrase in a place (six with a texture), and a relation is between two of four.
    """
    rules, objects = LEVELS[scene.level], scene.objects
    if short:
        names = [f"{'an' if obj.colour[0] in 'aeiou' else 'a'} {obj.colour} {obj.shape}" for obj in objects]
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    words = ("size", "texture", "colour", "shape") if len(rules.textures) > 1 else ("size", "colour", "shape")
    phrases = ["a " + " ".join(getattr(obj, word) for word in words) for obj in objects]
    if rules.free:
        links = (f" {relation(a, b)} {phrase}" for a, b, phrase in zip(objects, objects[1:], phrases[1:]))
        named = phrases[0] + "".join(links)
    else:
        named = ", ".join(f"{phrase} in the {obj.place}" for phrase, obj in zip(phrases, objects))
    return f"{named}, on a {scene.background} background"


def pixels(first: int, width: int, origin: float, cell: float) -> np.ndarray:
    """How far pixels `first` to first + width of an axis are from `origin`, in pixels: float32 [width], in cells."""
    return (np.arange(first, first + width, dtype=np.float32) + 0.5 - origin) / cell


def inside(shape: str, extent: float, x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    """How much of each pixel is within an outline: float32 [H, W] in [0, 1], for x [W] and y [H] from its centre."""
    return np.clip(0.5 - cell * extent * SHAPES[shape](x[None] / extent, y[:, None] / extent), 0, 1)


def ridges(texture: str, period: float, x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    """How much of its colour an object has at each pixel: float32 [H, W] in [DEEP, 1], for x [W] and y [H]."""
    if texture == "plain":
        return np.ones((len(y), len(x)), np.float32)
    high = np.clip(0.5 - cell * period * TEXTURES[texture](x[None] / period, y[:, None] / period), 0, 1)
    return DEEP + (1 - DEEP) * high


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as uint8 sRGB [size, size, 3], anti-aliased; `size` is even, in pixels.

    An outline through a pixel's middle covers half of it. An object is drawn in a view of its room and a pixel more.
    """
    cell, rules = size // 2, LEVELS[scene.level]
    picture = np.full((size, size, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    width = min(int(rules.room * cell) + 2, size)
    for obj in scene.objects:
        middle_y, middle_x = ((at + 0.5) * cell for at in PLACES.get(obj.place, (0.5, 0.5)))  # in pixels
        top = int(min(max(middle_y + obj.dy * cell - width / 2, 0), size - width))
        left = int(min(max(middle_x + obj.dx * cell - width / 2, 0), size - width))
        x, y = pixels(left, width, middle_x, cell), pixels(top, width, middle_y, cell)
        alpha = inside(obj.shape, rules.room * SIZES[obj.size] * obj.stretch, x - obj.dx, y - obj.dy, cell)
        alpha = (alpha * ridges(obj.texture, rules.room * PERIOD, x, y, cell))[..., None]
        view = picture[top:top + width, left:left + width]
        view += alpha * (np.float32(COLOURS[obj.colour]) * np.float32(obj.shade) - view)
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The scorer

PRESENT_SHARE = 0.6    # of a cell's variance, explained by its best template; true renders 0.88 and more, noise 0.04
PRESENT_CONTRAST = 80  # foreground to background; black to white is 441, true renders 97 and more, the mean picture 67
COLOUR_REACH = 80      # farther from every named colour is no colour; at half contrast half of all objects are that
SHIFTS = [0.03 * i for i in range(-4, 5)]  # of templates, in cells: half a pixel apart at 32 px
READ_AT = 128   # px: larger pictures are averaged down to this, or to the next size above that divides theirs
CLOSEST = 0.45  # nearer to one that is found, in cells, no other is looked for; true ones are 0.5 apart or more


@lru_cache(maxsize=4)
def templates(level: str, cell: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every shape x size x texture x shift as (unit [T, P], norm [T], mean [T]), with P = cell^2 pixels.

    A template's coverage is mean + norm * unit, where `unit` has mean 0 and length 1.
    """
    rules, x = LEVELS[level], pixels(0, cell, cell / 2, cell)
    kinds = itertools.product(rules.shapes, SIZES, rules.textures, SHIFTS, SHIFTS)
    masks = np.stack([(inside(shape, SIZES[size], x - dx, x - dy, cell) * ridges(texture, PERIOD, x, x, cell)).ravel()
                      for shape, size, texture, dx, dy in kinds])  # [T, P]
    mean = masks.mean(1)
    unit = masks - mean[:, None]
    norm = np.linalg.norm(unit, axis=1)
    return unit / norm[:, None], norm, mean


def read_cells(images: np.ndarray, level: str) -> dict[str, np.ndarray]:
    """What each cell of uint8 images [B, H, W, 3] shows: arrays [B, 4], cells in the order of PLACES.

    `present` is bool; `shape`, `size`, `texture`, `colour` and `background` index the level's names, -1 for no known
    colour. Least squares of the pixels x on a template m and a constant, x = b + (f - b) m, has a closed form: with m
    centred and scaled to length 1 it explains (x . m)^2 of each channel's squared deviation. So one product with all
    templates ranks them, and the best one's slope and intercept are the foreground f and the background b.
    """
    batch, cell, rules = len(images), images.shape[1] // 2, LEVELS[level]
    unit, norm, cover = templates(level, cell)
    x = images.reshape(batch, 2, cell, 2, cell, 3)    # [B, H, W, 3] -> [B, row, y, column, x, 3]
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(batch * 4, 3, cell * cell).astype(np.float32)  # -> [4 B, 3, P]
    mean = x.mean(2)
    x -= mean[..., None]
    slopes = x.reshape(-1, cell * cell) @ unit.T  # [12 B, P] @ [P, T]: 20 times as fast as a product for each cell
    slopes = slopes.reshape(*x.shape[:2], -1)     # -> [4 B, 3, T]
    explained = (slopes ** 2).sum(1)              # [4 B, T]
    best = explained.argmax(1)                    # [4 B]
    contrast = np.take_along_axis(slopes, best[:, None, None], 2)[..., 0] / norm[best][:, None]  # f - b, [4 B, 3]
    background = mean - contrast * cover[best][:, None]
    present = explained.max(1) > PRESENT_SHARE * (x ** 2).sum((1, 2))
    present &= np.linalg.norm(contrast, axis=1) > PRESENT_CONTRAST
    kinds = len(rules.shapes), len(SIZES), len(rules.textures), len(SHIFTS) ** 2
    shape, extent, texture, _ = np.unravel_index(best, kinds)
    found = {"present": present, "shape": shape, "size": extent, "texture": texture,
             "colour": nearest(background + contrast, COLOURS), "background": nearest(background, BACKGROUNDS)}
    return {name: value.reshape(batch, 4) for name, value in found.items()}


def nearest(colours: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Index [N] of the palette's entry nearest to each of `colours` [N, 3], -1 if none is within COLOUR_REACH."""
    colours = colours.clip(0, 255)  # a fit overshoots where a shape is thinner than its template: whiter than white
    distance = np.linalg.norm(colours[:, None] - np.float32(list(palette.values())), axis=2)  # [N, len(palette)]
    return np.where(distance.min(1) < COLOUR_REACH, distance.argmin(1), -1)


def correlate(x: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Sums of x [..., S, S] times kernels [K, W, W], wherever these fit: [..., K, P, P], P = S - W + 1, by FFT."""
    S, fits = x.shape[-1], x.shape[-1] - kernels.shape[-1] + 1
    product = np.fft.rfft2(x)[..., None, :, :] * np.fft.rfft2(kernels, s=(S, S)).conj()
    return np.fft.irfft2(product, s=(S, S))[..., :fits, :fits]


@lru_cache(maxsize=4)
def free_templates(level: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Templates of a free level: shape x size [K, W, W], in a window as wide as an object's room, texture [X, S, S].

    The other two arrays, [X, K, P, P], are the sum of each template at each place and of its squares about its mean.
    """
    rules, cell = LEVELS[level], size / 2
    width = round(rules.room * cell)
    near, far = pixels(0, width, width / 2, cell), pixels(0, size, cell, cell)
    outlines = np.stack([inside(shape, rules.room * SIZES[name], near, near, cell)
                         for shape, name in itertools.product(rules.shapes, SIZES)])
    textures = np.stack([ridges(name, rules.room * PERIOD, far, far, cell) for name in rules.textures])
    cover = correlate(textures, outlines)
    return outlines, textures, cover, correlate(textures ** 2, outlines ** 2) - cover ** 2 / width ** 2


def find_objects(image: np.ndarray, level: str, most: int) -> list[SceneObject]:
    """The objects of a free level in uint8 image [H, W, 3], at most `most`, the clearest first; colour "" is unknown.

    The fit of `read_cells`, in a window around every pixel. Textures lie fast in the picture, so a window's product
    with a template is that of picture x texture with the outline: few correlations serve all phases.
    """
    rules, size = LEVELS[level], len(image)
    scale = next(scale for scale in range(max(1, size // READ_AT), 0, -1) if size % scale == 0)
    size //= scale
    x = image.reshape(size, scale, size, scale, 3).mean((1, 3), dtype=np.float32).transpose(2, 0, 1)  # [3, S, S]
    mean = x.mean((1, 2))
    x -= mean[:, None, None]  # float32 has then digits to spare
    outlines, textures, cover, spread = free_templates(level, size)
    width, cell = outlines.shape[1], size / 2
    box = np.ones((1, width, width), np.float32)
    sums = correlate(x, box)  # [3, 1, P, P]
    total = correlate((x ** 2).sum(0), box)[0] - (sums ** 2).sum((0, 1)) / width ** 2         # [P, P]
    slopes = correlate(textures[:, None] * x, outlines) - sums * cover[:, None] / width ** 2  # [X, 3, K, P, P]
    explained = (slopes ** 2).sum(1) / spread  # [X, K, P, P]; slopes / spread is f - b
    explained *= (explained > PRESENT_SHARE * total) & (explained > PRESENT_CONTRAST ** 2 * spread)
    clearest, reach, found = explained.max((0, 1)), math.ceil(CLOSEST * cell), []  # most variance explained first
    while len(found) < most and clearest.any():
        top, left = np.unravel_index(clearest.argmax(), clearest.shape)
        texture, kind = np.unravel_index(explained[:, :, top, left].argmax(), explained.shape[:2])
        contrast = slopes[texture, :, kind, top, left] / spread[texture, kind, top, left]  # f - b, [3]
        background = mean + (sums[:, 0, top, left] - contrast * cover[texture, kind, top, left]) / width ** 2
        colour = nearest((background + contrast)[None], COLOURS)[0]
        shape, extent = divmod(kind, len(SIZES))
        found.append(SceneObject(
            rules.shapes[shape], ("", *COLOURS)[colour + 1], list(SIZES)[extent], "", rules.textures[texture],
            dx=(left + width / 2) / cell - 1, dy=(top + width / 2) / cell - 1))
        clearest[max(0, top - reach + 1):top + reach, max(0, left - reach + 1):left + reach] = 0
    return found


def check_places(images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What of scenes in four places their images show, as three arrays.

    bool [objects, 5]: whether an object is there, and has each of its level's `words` right; int [B, 4]: the quarters'
    backgrounds, as indices of BACKGROUNDS; bool [B]: whether there is an object that the caption does not name.
    """
    words, found, places = LEVELS[scenes[0].level].words, read_cells(images, scenes[0].level), list(PLACES)
    named = [(i, obj) for i, scene in enumerate(scenes) for obj in scene.objects]
    at = np.array([i for i, _ in named]), np.array([places.index(obj.place) for _, obj in named])
    wanted = np.array([[names.index(getattr(obj, name)) for name, names in words.items()] for _, obj in named])
    shown, there = np.stack([found[name][at] for name in words], 1), found["present"][at][:, None]  # [objects, 4], 1
    unnamed = found["present"].copy()
    unnamed[at] = False
    return np.hstack([there, there & (shown == wanted)]), found["background"], unnamed.any(1)


def check_relations(images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of free scenes: an object is there if something of its colour is, as related to the one named before.

    The clearest objects count, one more than the caption names. So one too many costs no other, but a crowd does: else
    a picture with an object of every colour would hold most of any caption.
    """
    words, half, right, unnamed = LEVELS[scenes[0].level].words, images.shape[1] // 2, [], []
    for image, scene in zip(images, scenes):
        found = find_objects(image, scene.level, most=len(scene.objects) + 1)
        by_colour = {obj.colour: obj for obj in reversed(found)}  # of two of a colour the clearer one
        shown = [by_colour.get(obj.colour) for obj in scene.objects]
        unnamed.append(len(found) + shown.count(None) > len(shown))
        for k, (obj, seen) in enumerate(zip(scene.objects, shown)):
            there = seen is not None
            if there and k > 0:
                before = shown[k - 1]
                there = before is not None and relation(before, seen) == relation(scene.objects[k - 1], obj)
            right.append([there, *(seen is not None and getattr(seen, name) == getattr(obj, name) for name in words)])
    quarters = images.reshape(len(images), 2, half, 2, half, 3)  # [B, H, W, 3] -> [B, row, y, column, x, 3]
    medians = np.median(quarters, axis=(2, 4)).reshape(-1, 3)  # objects cover less than half of a quarter
    return np.array(right), nearest(medians, BACKGROUNDS).reshape(-1, 4), np.array(unnamed)


def score_scenes(images: np.ndarray | torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """How well uint8 images [B, H, W, 3] show their B scenes, all of one level: shares in [0, 1].

    Of all objects that the captions name (one that is not there has no attribute right):
        place       something is there: a template explains over 60% of its cell's variance, at a visible contrast. In a
                    free level: so it is somewhere, in this colour, and where the caption relates it to the one before
        colour, shape, size, texture    it is there (free: in its colour, anywhere), and has this attribute as captioned
        objects     right in place and colour: the headline
        exact       right in place, colour, shape, size and texture
    And `background`, of all cells: the fitted background (in a free level the cell's median) is the captioned one;
    `scenes`, of all scenes: the whole caption holds, every object and background, and there is nothing else.
    True renders give 1.0 in all of these; blank, mean, striped and noise pictures 0 objects. Held-out scenes of demo,
    race and solo, at their presets' sizes, give pictures of other captions 0.08, 0.08 and 0.12 objects (chance), 0.04,
    0.01 and 0.02 exact, and true renders with 10% noise 0.90, 0.79 and 0.99 of both: faint objects are lost, not
    mistaken. Raises ValueError for another shape or dtype.
    """
    images = np.asarray(images.cpu() if isinstance(images, torch.Tensor) else images)
    level, size = scenes[0].level, images.shape[1]
    if len(images) != len(scenes) or any(scene.level != level for scene in scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes: need one for each, and scenes of one level")
    if images.shape[1:] != (size, size, 3) or size % 2 or images.dtype != np.uint8:
        raise ValueError(f"images are uint8 [B, H, W, 3] with H = W, even, not {images.dtype} {list(images.shape)}")
    check = check_relations if LEVELS[level].free else check_places
    right, background, unnamed = check(images, scenes)
    wanted = np.array([list(BACKGROUNDS).index(scene.background) for scene in scenes])
    background, exact = background == wanted[:, None], right.all(1)
    scene_of = np.repeat(np.arange(len(scenes)), [len(scene.objects) for scene in scenes])
    whole = background.all(1) & ~unnamed
    whole[scene_of[~exact]] = False
    shares = dict(zip(("place", *LEVELS[level].words), right.mean(0).tolist()))
    return {"objects": float((right[:, 0] & right[:, 1]).mean()), "exact": float(exact.mean()), **shares,
            "background": float(background.mean()), "scenes": float(whole.mean())}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def level_of(manifest: dict) -> str:
    """The level of a data set of scenes, by its manifest; "" of any other."""
    source, _, level = manifest.get("source", "").partition(":")
    return level if source == "scenes" and level in LEVELS else ""


def make_rows(sizes: list[int], seed: int, level: str, part: Part, dropped: list) -> Iterator[dict]:
    """The training scenes of a part, whose content is their numbers, as data_prep.write_dataset takes them."""
    for i in part.content:
        scene, key = make_scene(i, seed, "train", level), f"scenes-{level}-{seed}-train-{i:06d}"
        yield {"key": key, "images": {size: png(render(scene, size)) for size in sizes}, "caption": caption(scene),
               "caption_short": caption(scene, short=True), "source": f"scenes:{level}", "digest": key}


def png(picture: np.ndarray) -> bytes:
    """A picture as PNG: at 32 px JPEG's colour error is as large as the signal."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def main(argv: list[str]) -> None:
    parser = Parser(prog="tools/scenes.py", description="Make a data set of procedural captioned pictures.")
    add = parser.add_argument
    add("command", choices=["make"], help="write training scenes to --out")
    add("--out", type=Path, help="folder to make; must not exist (default: data/LEVEL)")
    add("--rows", type=WHOLE, default=20000, help="number of pictures")
    add("--size", default="32", help="width and height, px; a comma list makes several", type=checked(
        lambda text: sorted(set(map(int, text.split(",")))), lambda sizes: min(sizes) >= 16 and not any(
            size % 2 for size in sizes), "a comma list of even numbers of pixels, each 16 or more"))
    add("--level", choices=list(LEVELS), default="demo", help="difficulty")
    add("--seed", type=int, default=0, help="another seed makes other scenes")
    args = parser.parse_args(argv)
    settings = {"source": f"scenes:{args.level}", "revision": f"seed {args.seed}", "sizes": args.size}
    source_hash = file_sha256(Path(__file__))
    prompts = [caption(scene) for scene in make_scenes(16, args.seed, "held_out", args.level)]
    numbers = [range(args.rows)[first : first + ROWS_A_PART] for first in range(0, args.rows, ROWS_A_PART)]
    parts = [Part(str(part), source_hash, part) for part in numbers]
    write_dataset(args.out or Path("data", args.level), parts, partial(make_rows, args.size, args.seed, args.level),
                  settings=settings, total=args.rows, prompts=prompts, workers=cores())


if __name__ == "__main__":
    run_main(main)
