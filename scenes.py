"""Procedural captioned pictures and their exact scorer: the offline data set of the presets `demo`, `race` and `solo`.

    python scenes.py make --out=data/scenes --rows=20000 --size=32
    python scenes.py make --out=data/solo --rows=20000 --size=256 --level=solo
    python scenes.py teacher --data=data/solo

A scene is 1 to 4 flat objects on a plain background. Its caption is its ground truth, so a generated picture is scored by
fitting templates to it; no detector network is needed. Some (colour, shape) pairs are held out: no training scene shows
them, so drawing them takes composition, not memory.

    demo   4 shapes, at most one in each quarter of the picture; the caption names the quarter
    race   the same, with textures
    solo   8 shapes with textures, of different colours, anywhere but apart; the caption relates each object to the next

    make_scenes(n, seed, split) -> [Scene]     caption(scene) -> str     render(scene, size) -> uint8 [H, W, 3]
    score_scenes(images uint8 [B, H, W, 3], scenes) -> {"objects": share in [0, 1], ...}

Lengths are in cells (a cell is size / 2 pixels wide: a quarter of the picture), x to the right and y down, so a scene is
the same picture at every size. Colours are sRGB, 0 to 255.
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
MIDDLE = 0.5, 0.5  # row, column of the cell that the centres of free objects are measured from
FIFTH = 0.4 * math.pi  # of a turn
SIZES = {"small": 0.24, "large": 0.37}  # half an object's extent, in cells: areas 1 to 2.4
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # signed distance to an outline within [-1, 1]^2
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,
    "triangle": lambda x, y: np.maximum(y - 0.8, (1.8 * abs(x) - y - 1) / math.hypot(1.8, 1)),
    "cross": lambda x, y: np.minimum(np.maximum(abs(x) - 1, abs(y) - 0.36), np.maximum(abs(x) - 0.36, abs(y) - 1)),
    "diamond": lambda x, y: (abs(x) + abs(y) - 1) / 2**0.5,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.68) - 0.28,
    "star": lambda x, y: np.hypot(x, y) * np.cos(FIFTH * (wave(np.arctan2(x, -y) / FIFTH) + 0.25) - 1.1) - math.cos(1.1),
    "heart": lambda x, y: np.minimum((abs(x) + abs(y) - 0.8) / 2**0.5, np.hypot(abs(x) - 0.4, y + 0.4) - 0.4 * 2**0.5),
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
    shift: float    # a centre is at most this far from its place's along each axis, in cells
    stretch: float  # an extent varies by this share, up and down
    shade: float    # so does a colour's brightness
    room: float = 1.0  # side of the square that an object has to itself, in cells; sizes and periods scale with it

    @property
    def free(self) -> bool:
        """Whether objects lie anywhere, and captions relate them; else each has one of PLACES."""
        return self.room < 1

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """What an object may be, attribute by attribute."""
        return {"colour": self.colours, "shape": self.shapes, "size": self.sizes, "texture": self.textures}

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
    "demo": Level(tuple(COLOURS), tuple(SHAPES)[:4], tuple(SIZES), ("plain",), tuple(BACKGROUNDS), max_objects=4,
                  shift=0.1, stretch=0.04, shade=0.06),
    "race": Level(tuple(COLOURS), tuple(SHAPES)[:4], tuple(SIZES), ("plain", *TEXTURES), tuple(BACKGROUNDS), max_objects=4,
                  shift=0.1, stretch=0.04, shade=0.06),
    # room: objects at 128 px are as large as race's at 64 px. shift: the room stays inside the picture (0.75 + 0.5 / 2 = 1).
    "solo": Level(tuple(COLOURS), tuple(SHAPES), tuple(SIZES), ("plain", *TEXTURES), tuple(BACKGROUNDS), max_objects=4,
                  shift=0.75, stretch=0.04, shade=0.06, room=0.5),
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

SPLITS = ("train", "held_out")
DIAGONAL = 0.1  # by so much, in cells, two related centres are farther apart along one axis than along the other


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
    pairs = rules.pairs(split)
    background, count = rng.choice(rules.backgrounds), rng.randint(1, rules.max_objects)

    def draw(place: str) -> SceneObject:
        colour, shape = rng.choice(pairs)
        texture = rng.choice(rules.textures) if len(rules.textures) > 1 else rules.textures[0]
        return SceneObject(
            shape, colour, size=rng.choice(rules.sizes), place=place, texture=texture,
            dx=rng.uniform(-rules.shift, rules.shift), dy=rng.uniform(-rules.shift, rules.shift),
            stretch=1 + rng.uniform(-rules.stretch, rules.stretch), shade=1 + rng.uniform(-rules.shade, rules.shade))

    places = [""] * count if rules.free else rng.sample(list(PLACES), count)
    objects = [draw(place) for place in places]
    while rules.free and not is_clear(objects, rules.room):
        objects = [draw(place) for place in places]
    return Scene(background, tuple(objects), level)


def is_clear(objects: list[SceneObject], room: float) -> bool:
    """Whether free objects have room, a colour of their own, by which they are found, and no relation near a diagonal."""
    apart = all(max(abs(a.dx - b.dx), abs(a.dy - b.dy)) >= room for a, b in itertools.combinations(objects, 2))
    related = all(abs(abs(a.dx - b.dx) - abs(a.dy - b.dy)) >= DIAGONAL for a, b in itertools.pairwise(objects))
    return apart and related and len({obj.colour for obj in objects}) == len(objects)


def relation(a: SceneObject, b: SceneObject) -> str:
    """Where free object `a` is, seen from `b`: along the axis on which their centres are farther apart."""
    x, y = a.dx - b.dx, a.dy - b.dy
    return ("left of" if x < 0 else "right of") if abs(x) > abs(y) else ("above" if y < 0 else "below")


def caption(scene: Scene, short: bool = False) -> str:
    """What the picture shows: everything but the jitter, or if `short` the objects' colours and shapes only.

    Long: "a large red circle in the top left, a small blue square in the bottom right, on a gray background"; in a free
    level "a large striped red circle left of a small plain blue square, on a gray background", where the first is anywhere.
    Short: "a red circle and a blue square".
    Text tokens do not mix in the model, and the built-in encoder gives each the words up to four away, function words left
    out. Long phrases in places are five words, so each has the others; with a texture six. A relation has both its objects.
    """
    if short:
        names = [f"{'an' if obj.colour[0] in 'aeiou' else 'a'} {obj.colour} {obj.shape}" for obj in scene.objects]
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    textured = len(LEVELS[scene.level].textures) > 1
    phrases = [f"a {obj.size} {f'{obj.texture} ' if textured else ''}{obj.colour} {obj.shape}" for obj in scene.objects]
    if LEVELS[scene.level].free:
        named = phrases[0] + "".join(f" {relation(a, b)} {phrase}"
                                     for (a, b), phrase in zip(itertools.pairwise(scene.objects), phrases[1:]))
    else:
        named = ", ".join(f"{phrase} in the {obj.place}" for phrase, obj in zip(phrases, scene.objects))
    return f"{named}, on a {scene.background} background"


def pixels(first: int, width: int, origin: float, cell: float) -> np.ndarray:
    """How far `width` pixels of an axis, from number `first` on, are from `origin`, in pixels: float32 [width], in cells."""
    return (np.arange(first, first + width, dtype=np.float32) + 0.5 - origin) / cell


def inside(shape: str, extent: float, x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    """How much of each pixel is within an outline: float32 [H, W] in [0, 1], for x [W] and y [H] from its centre, in cells."""
    return np.clip(0.5 - cell * extent * SHAPES[shape](x[None] / extent, y[:, None] / extent), 0, 1)


def ridges(texture: str, period: float, x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    """How much of its colour an object has at each pixel: float32 [H, W] in [DEEP, 1], for x [W] and y [H], in cells."""
    if texture == "plain":
        return np.ones((len(y), len(x)), np.float32)
    return DEEP + (1 - DEEP) * np.clip(0.5 - cell * period * TEXTURES[texture](x[None] / period, y[:, None] / period), 0, 1)


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as uint8 sRGB [size, size, 3], anti-aliased; `size` is even, in pixels.

    An outline through a pixel's middle covers half of it. An object is drawn in a view of its room and a pixel more.
    """
    cell, rules = size // 2, LEVELS[scene.level]
    picture = np.full((size, size, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    width = min(int(rules.room * cell) + 2, size)
    for obj in scene.objects:
        origin = [(place + 0.5) * cell for place in (MIDDLE if rules.free else PLACES[obj.place])]  # y, x, in pixels
        top, left = (int(min(max(at + d * cell - width / 2, 0), size - width)) for at, d in zip(origin, (obj.dy, obj.dx)))
        y, x = (pixels(first, width, at, cell) for first, at in zip((top, left), origin))
        alpha = inside(obj.shape, rules.room * SIZES[obj.size] * obj.stretch, x - obj.dx, y - obj.dy, cell)
        alpha = (alpha * ridges(obj.texture, rules.room * PERIOD, x, y, cell))[..., None]
        view = picture[top:top + width, left:left + width]
        view += alpha * (np.float32(COLOURS[obj.colour]) * np.float32(obj.shade) - view)
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The scorer

PRESENT_SHARE = 0.6    # of a cell's variance, explained by its best template; true renders 0.88 and more, noise 0.04
PRESENT_CONTRAST = 80  # foreground to background; black to white is 441, true renders 97 and more, the mean picture 67
COLOUR_REACH = 80      # farther than this from every named colour is no colour; at half contrast half of all objects are
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
    x = pixels(0, cell, cell / 2, cell)
    masks = np.stack([(inside(rules.shapes[i], SIZES[rules.sizes[j]], x - dx, x - dy, cell)
                       * ridges(rules.textures[k], PERIOD, x, x, cell)).ravel() for (i, j, k), dx, dy in keys])  # [T, P]
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
    cell = size // 2
    unit, norm, cover, names = templates(level, cell)
    x = images.reshape(batch, 2, cell, 2, cell, 3)    # [B, H, W, 3] -> [B, row, y, column, x, 3]
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(batch * 4, 3, cell * cell).astype(np.float32)  # -> [4 B, 3, P]
    mean = x.mean(2)
    x -= mean[..., None]
    slopes = x.reshape(-1, cell * cell) @ unit.T  # [12 B, P] @ [P, T] -> [12 B, T]: 20 times as fast as a product for each cell
    slopes = slopes.reshape(*x.shape[:2], -1)     # -> [4 B, 3, T]
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


READ_AT = 128   # px: larger pictures are averaged down to this, or to the next size above that divides theirs
CLOSEST = 0.45  # nearer than this to one that is found, in cells, no other is looked for; true ones are 0.5 apart or more


def correlate(x: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Sums of x [..., S, S] times each of kernels [K, W, W], wherever it fits: [..., K, P, P] with P = S - W + 1, by FFT."""
    S, fits = x.shape[-1], x.shape[-1] - kernels.shape[-1] + 1
    product = np.fft.rfft2(x)[..., None, :, :] * np.fft.rfft2(kernels, s=(S, S)).conj()
    return np.fft.irfft2(product, s=(S, S))[..., :fits, :fits]


@lru_cache(maxsize=4)
def free_templates(level: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Templates of a free level: shape x size [K, W, W], in a window as wide as an object's room, times texture [X, S, S].

    The other two arrays, [X, K, P, P], are the sum of each template at each place, and that of its squares about its mean.
    """
    rules, cell = LEVELS[level], size / 2
    width = round(rules.room * cell)
    near, far = pixels(0, width, width / 2, cell), pixels(0, size, cell, cell)
    outlines = np.stack([inside(shape, rules.room * SIZES[name], near, near, cell)
                         for shape in rules.shapes for name in rules.sizes])
    textures = np.stack([ridges(name, rules.room * PERIOD, far, far, cell) for name in rules.textures])
    cover = correlate(textures, outlines)
    return outlines, textures, cover, correlate(textures ** 2, outlines ** 2) - cover ** 2 / width ** 2


def find_objects(image: np.ndarray, level: str, most: int) -> list[SceneObject]:
    """The objects of a free level in uint8 image [H, W, 3], at most so many, the clearest first; colour "" is no known one.

    The fit of `read_cells`, in a window around every pixel. Textures lie fast in the picture, so a window's product with a
    template is that of picture x texture with the outline: few correlations serve all phases. Of all windows that show
    something the one with the most variance explained is taken, and the next one not near it.
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
    clearest, reach, found = explained.max((0, 1)), math.ceil(CLOSEST * cell), []
    while len(found) < most and clearest.any():
        top, left = np.unravel_index(clearest.argmax(), clearest.shape)
        texture, kind = np.unravel_index(explained[:, :, top, left].argmax(), explained.shape[:2])
        contrast = slopes[texture, :, kind, top, left] / spread[texture, kind, top, left]  # f - b, [3]
        background = mean + (sums[:, 0, top, left] - contrast * cover[texture, kind, top, left]) / width ** 2
        colour = nearest((background + contrast)[None], [COLOURS[name] for name in rules.colours])[0]
        shape, extent = divmod(kind, len(rules.sizes))
        found.append(SceneObject(
            rules.shapes[shape], ("", *rules.colours)[colour + 1], rules.sizes[extent], "", rules.textures[texture],
            dx=(left + width / 2) / cell - 1, dy=(top + width / 2) / cell - 1))
        clearest[max(0, top - reach + 1):top + reach, max(0, left - reach + 1):left + reach] = 0
    return found


def check_places(images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What of scenes in four places their images show, as three arrays.

    bool [objects, 5]: whether an object is there, and has each of its level's `words` right; int [B, 4]: the quarters'
    backgrounds, as indices of the level's names; bool [B]: whether there is an object that the caption does not name.
    """
    words, found = LEVELS[scenes[0].level].words, read_cells(images, scenes[0].level)
    at = tuple(np.array([(i, list(PLACES).index(obj.place)) for i, scene in enumerate(scenes) for obj in scene.objects]).T)
    wanted = np.array([[names.index(getattr(obj, name)) for name, names in words.items()]
                       for scene in scenes for obj in scene.objects])  # [objects, 4]
    shown, there = np.stack([found[name][at] for name in words], 1), found["present"][at][:, None]
    unnamed = found["present"].copy()
    unnamed[at] = False
    return np.hstack([there, there & (shown == wanted)]), found["background"], unnamed.any(1)


def check_relations(images: np.ndarray, scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of free scenes: an object is there if something of its colour is, as related to the one named before.

    The clearest objects count, one more than the caption names. So one too many costs no other, but a crowd does: else a
    picture with an object of every colour would hold most of any caption.
    """
    rules, batch, half = LEVELS[scenes[0].level], len(images), images.shape[1] // 2
    right, unnamed = [], []
    for image, scene in zip(images, scenes):
        found = find_objects(image, scene.level, most=len(scene.objects) + 1)
        by_colour = {obj.colour: obj for obj in reversed(found)}  # of two of a colour the clearer one
        shown = [by_colour.get(obj.colour) for obj in scene.objects]
        unnamed.append(len(found) + shown.count(None) > len(shown))
        for k, (obj, seen) in enumerate(zip(scene.objects, shown)):
            there = seen is not None and (k == 0 or shown[k - 1] is not None and (
                relation(shown[k - 1], seen) == relation(scene.objects[k - 1], obj)))
            right.append([there, *(seen is not None and getattr(seen, name) == getattr(obj, name) for name in rules.words)])
    quarters = images.reshape(batch, 2, half, 2, half, 3)  # [B, H, W, 3] -> [B, row, y, column, x, 3]
    medians = np.median(quarters, axis=(2, 4)).reshape(-1, 3)  # objects cover less than half of a quarter
    background = nearest(medians, [BACKGROUNDS[name] for name in rules.backgrounds]).reshape(batch, 4)
    return np.array(right), background, np.array(unnamed)


def score_scenes(images, scenes: list[Scene]) -> dict[str, float]:
    """How well uint8 images [B, H, W, 3], numpy or torch, show their B scenes, all of one level: shares in [0, 1].

    Of all objects that the captions name (one that is not there has no attribute right):
        place       something is there: a template explains over 60% of its cell's variance, at a visible contrast.
                    In a free level: so it is somewhere, in this colour, and where the caption relates it to the one before
        colour, shape, size, texture    it is there (free: in its colour, anywhere), and the fit has this attribute as captioned
        objects     right in place and colour: the headline
        exact       right in place, colour, shape, size and texture
    Of all cells:
        background  the fitted background is the captioned one; in a free level the cell's median is
    Of all scenes:
        scenes      the whole caption holds: every object exact, every background right, and nothing that it does not name
    True renders give 1.0 in all of these; blank, mean, striped and noise pictures give 0 objects. Held-out scenes of demo, race
    and solo, at the sizes of their presets, give to pictures of other captions 0.08, 0.08 and 0.12 objects (chance), 0.04, 0.01
    and 0.02 exact, and to true renders with 10% noise 0.90, 0.79 and 0.99 of both: the faintest objects are lost, not mistaken.
    Raises ValueError for another shape or dtype.
    """
    images = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    level, size = scenes[0].level, images.shape[1]
    rules = LEVELS[level]
    if len(images) != len(scenes) or any(scene.level != level for scene in scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes: need one for each, and scenes of one level")
    if images.shape[1:] != (size, size, 3) or size % 2 or images.dtype != np.uint8:
        raise ValueError(f"images are uint8 [B, H, W, 3] with H = W, even, not {images.dtype} {list(images.shape)}")
    right, background, unnamed = (check_relations if rules.free else check_places)(images, scenes)
    wanted = np.array([rules.backgrounds.index(scene.background) for scene in scenes])
    background, exact = background == wanted[:, None], right.all(1)
    scene_of = np.repeat(np.arange(len(scenes)), [len(scene.objects) for scene in scenes])
    whole = background.all(1) & ~unnamed
    whole[scene_of[~exact]] = False
    shares = dict(zip(("place", *rules.words), right.mean(0).tolist()))
    return {"objects": float((right[:, 0] & right[:, 1]).mean()), "exact": float(exact.mean()), **shares,
            "background": float(background.mean()), "scenes": float(whole.mean())}


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
        shown = [[1 + names.index(getattr(obj, name))] for name, names in rules.words.items()]
        labels[:4, share > most] = np.array(shown)
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
    from train_prx import Config, compute_dtype, usable_device

    manifest, out = read_manifest(data), data / "teacher"
    if not manifest.get("source", "").startswith("scenes:"):
        raise UserError(f"{data} holds no scenes: the teacher learns from their labels")
    if out.exists():
        raise UserError(f"{out} exists; delete it to train another")
    level, scenes_seed, size = level_of(manifest), int(manifest["revision"].removeprefix("seed ")), max(manifest["sizes"])
    rules, patch = LEVELS[level], min(16, size // 8)
    counts = [1 + len(names) for names in rules.words.values()] + [len(rules.backgrounds)]
    torch.manual_seed(seed)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=TEACHER_DIM, num_hidden_layers=3, num_attention_heads=3, image_size=size, patch_size=patch))
    head = torch.nn.Linear(TEACHER_DIM, sum(counts))
    device = torch.device(usable_device())
    model, head = model.to(device).train(), head.to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in IMAGENET)
    parameters = {p: p.ndim == 2 and "encoder" in name for name, p in [*model.named_parameters(), *head.named_parameters()]}
    optimizer = Muon([{"params": [p for p, muon in parameters.items() if muon], "use_muon": True, "lr": 1e-2,
                       "ns_dtype": compute_dtype(Config(), device)},
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
    said = ", ".join(f"{name} {share:.1%}" for name, share in zip(rules.words, shares))
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
    from data_prep import ROWS_A_PART, Part, cores, write_dataset
    from train_prx import Parser, UserError

    parser = Parser(prog="scenes.py", description="Make a data set of procedural captioned pictures, or its teacher.")
    parser.add_argument("command", choices=["make", "teacher"], help="make: write training scenes to --out; teacher: train the "
                        "small network of --frozen=scene on their labels, and write it to --data/teacher")
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
                  workers=cores())


if __name__ == "__main__":
    from train_prx import run_main

    run_main(main)
