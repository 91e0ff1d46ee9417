"""`shapes`: a synthetic captioning data set, generated from a seed.

A scene has one to three objects, each with a shape, a colour and a size, in a row or in a column on a noisy background.
Equal objects are next to each other and form a group; a caption names every group, its count, and the groups' order:

    two small red circles are to the left of a large blue square

Only the image shows which objects there are, so a model that ignores it fails. The scene is known exactly, so a caption
can be checked against it (`is_true`), and attention against the objects' boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from attncap.data.tokenizer import tokenize

CANVAS = 128  # pixels, width and height of an image
SIZES = {"small": (9, 11), "large": (15, 18)}  # range of the radius, in pixels
COLORS = {
    "red": (205, 40, 40),
    "green": (45, 155, 60),
    "blue": (45, 85, 210),
    "yellow": (240, 215, 50),
    "purple": (140, 60, 170),
    "orange": (240, 135, 35),
}
SHAPES = ("circle", "square", "triangle", "cross")
SPLITS = {"train": 10_000, "val": 250, "test": 500}  # scenes
COUNTS = {1: "a", 2: "two", 3: "three"}
NEAR, FAR, MARGIN = 2, 6, 3  # pixels: between objects of a group; at least between groups; at least to the edge


@dataclass(frozen=True)
class Object:
    """An object in an image. `center` and `radius` are in pixels; every shape fills its `box`."""

    size: str
    color: str
    shape: str
    center: tuple[float, float]
    radius: float

    @property
    def kind(self) -> tuple[str, str, str]:
        return self.size, self.color, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels."""
        (x, y), r = self.center, self.radius
        return x - r, y - r, x + r, y + r


@dataclass(frozen=True)
class Scene:
    """An image, as the objects that it shows, and its five captions: a `CaptionedImage`."""

    name: str
    objects: tuple[Object, ...]
    captions: tuple[str, ...]
    noise_seed: tuple[int, ...]

    @property
    def scene(self) -> Scene:
        return self

    def identity(self) -> str:
        return repr(self)

    def image(self) -> Image.Image:
        """The drawn scene: RGB, CANVAS x CANVAS, the same at every call."""
        rng = np.random.default_rng(self.noise_seed)
        # Drawn at twice the size, for smooth edges.
        picture = _background(rng).resize((2 * CANVAS, 2 * CANVAS), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(picture)
        for thing in self.objects:
            tint = np.clip(COLORS[thing.color] + rng.normal(0, 8, 3), 0, 255).astype(int)
            _draw(draw, thing.shape, [2 * side for side in thing.box], tuple(tint.tolist()))
        pixels = np.asarray(picture.reduce(2), dtype=np.float32)
        pixels = pixels + rng.uniform(2, 8) * rng.standard_normal(pixels.shape, dtype=np.float32)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    @cached_property
    def true_captions(self) -> frozenset[tuple[str, ...]]:
        """The tokens of every caption in the data set's grammar that describes this scene exactly."""
        groups = {}
        for thing in self.objects:
            groups.setdefault(thing.kind, []).append(thing)
        return frozenset(
            tuple(tokenize(caption))
            for order in permutations(groups.values())
            for axis in (0, 1)
            if all(_precedes(before, after, axis) for before, after in zip(order, order[1:], strict=False))
            for caption in _wordings([_phrase(group[0].kind, len(group)) for group in order], axis)
        )


def is_true(caption: str, scene: Scene) -> bool:
    """Whether a caption names every object of the scene by size, colour and shape, with the right counts and a relation
    that agrees with their boxes. A sentence outside the data set's grammar counts as false."""
    return tuple(tokenize(caption)) in scene.true_captions


def open_shapes(seed: int, splits: dict[str, int] = SPLITS) -> dict[str, list[Scene]]:
    """The data set: a list of scenes for each split. Every scene has its own random stream, made from the seed, the
    split and its index: splits share no scene, and a scene does not depend on the number of scenes."""
    return {
        split: [_scene(f"shapes/{split}/{index:05d}", (seed, number, index)) for index in range(size)]
        for number, (split, size) in enumerate(splits.items())
    }


def _scene(name: str, stream: tuple[int, ...]) -> Scene:
    rng = np.random.default_rng(stream)
    axis = int(rng.integers(2))  # 0: a row, left to right; 1: a column, top to bottom
    counts = [(1,), (2,), (3,), (1, 1), (1, 2), (2, 1), (1, 1, 1)][
        rng.choice(7, p=[0.08, 0.14, 0.14, 0.18, 0.14, 0.14, 0.18])
    ]
    kinds = [(size, color, shape) for size in SIZES for color in COLORS for shape in SHAPES]
    groups = [(kinds[i], count) for i, count in zip(rng.permutation(len(kinds)), counts, strict=False)]
    objects = _place(rng, groups, axis)
    wordings = _wordings([_phrase(kind, count) for kind, count in groups], axis)
    captions = tuple(wordings[i] for i in rng.permutation(len(wordings))[:5])
    return Scene(name, tuple(objects), captions, (*stream, 1))


def _place(rng: np.random.Generator, groups: list[tuple[tuple[str, str, str], int]], axis: int) -> list[Object]:
    """Place the groups one after the other along the axis, the objects of a group close together. Across the axis they
    deviate so little that their boxes overlap: the only relation is the one along the axis."""
    radii = np.array([rng.uniform(*SIZES[size]) for (size, _, _), _ in groups])
    counts = np.array([count for _, count in groups])
    lengths = 2 * radii * counts + NEAR * (counts - 1)
    free = CANVAS - 2 * MARGIN - lengths.sum() - FAR * (len(groups) - 1)
    starts = MARGIN + np.sort(rng.uniform(0, free, len(groups))) + np.cumsum(lengths + FAR) - lengths - FAR
    deviation = 0.9 * radii.min()
    reach = MARGIN + radii.max() + deviation
    across = rng.uniform(reach, CANVAS - reach) + rng.uniform(-deviation, deviation, len(groups))
    objects = []
    for (kind, count), radius, start, c in zip(groups, radii.tolist(), starts.tolist(), across.tolist(), strict=True):
        for i in range(count):
            a = start + radius + i * (2 * radius + NEAR)
            objects.append(Object(*kind, center=(a, c) if axis == 0 else (c, a), radius=radius))
    return objects


def _precedes(before: list[Object], after: list[Object], axis: int) -> bool:
    """Whether, along the axis, every box of `before` ends before any box of `after` begins."""
    return max(thing.box[axis + 2] for thing in before) <= min(thing.box[axis] for thing in after)


def _phrase(kind: tuple[str, str, str], count: int) -> str:
    plural = "" if count == 1 else "es" if kind[2] == "cross" else "s"
    return f"{COUNTS[count]} {' '.join(kind)}{plural}"


def _wordings(groups: list[str], axis: int) -> list[str]:
    """Six captions for groups in this order along the axis (0: left to right, 1: top to bottom)."""
    left, right = ("left", "right") if axis == 0 else ("top", "bottom")
    before, after = ("to the left of", "to the right of") if axis == 0 else ("above", "below")
    on = "on" if axis == 0 else "at"

    def be(phrase: str) -> str:
        return "is" if phrase.startswith("a ") else "are"

    if len(groups) == 1:
        (a,) = groups
        return [
            a,
            f"there {be(a)} {a}",
            f"{a} and nothing else",
            f"the picture shows {a}",
            f"this is a picture of {a}",
            f"{a} {be(a)} all there is",
        ]
    if len(groups) == 2:
        a, b = groups
        return [
            f"{a} {be(a)} {before} {b}",
            f"{b} {be(b)} {after} {a}",
            f"there {be(a)} {a} {before} {b}",
            f"{a} {on} the {left} and {b} {on} the {right}",
            f"the picture shows {b} {after} {a}",
            f"{on} the {left} {be(a)} {a}, {on} the {right} {be(b)} {b}",
        ]
    a, b, c = groups
    return [
        f"{a}, {b} and {c} from {left} to {right}",
        f"{c}, {b} and {a} from {right} to {left}",
        f"from {left} to {right} there are {a}, {b} and {c}",
        f"{left} to {right}: {a}, then {b}, then {c}",
        f"three objects from {left} to {right}, {a}, {b} and {c}",
        f"{a} {on} the {left}, {b} in the middle and {c} {on} the {right}",
    ]


def _background(rng: np.random.Generator) -> Image.Image:
    """A dull two-tone background: plain, gradient, striped, chequered or cloudy."""
    grey = rng.uniform(70, 200)
    tones = np.clip(grey + rng.uniform(-18, 18, (2, 3)) + [[12], [-12]], 0, 255)
    ramp = np.linspace(0, 1, CANVAS)
    x, y = np.meshgrid(ramp, ramp)
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.06, 0.3)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    match rng.integers(5):
        case 0:
            blend = np.zeros_like(u)
        case 1:
            blend = (u - u.min()) / (u.max() - u.min())
        case 2:
            blend = (np.floor(u / period) % 2).astype(float)
        case 3:
            blend = ((np.floor(u / period) + np.floor(v / period)) % 2).astype(float)
        case _:
            blend = 0.5 + 0.25 * (np.sin(2 * np.pi * u / period) + np.sin(2 * np.pi * v / (1.7 * period)))
    pixels = tones[0] + blend[..., None] * (tones[1] - tones[0])
    return Image.fromarray(pixels.astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, shape: str, box: list[float], color: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    middle, third = (left + right) / 2, (right - left) / 3
    match shape:
        case "circle":
            draw.ellipse(box, fill=color)
        case "square":
            draw.rectangle(box, fill=color)
        case "triangle":
            draw.polygon([(middle, top), (right, bottom), (left, bottom)], fill=color)
        case "cross":
            draw.rectangle([left + third, top, right - third, bottom], fill=color)
            draw.rectangle([left, top + third, right, bottom - third], fill=color)
