"""Street scenes drawn by a program, with exact masks: data for demos and tests that needs no download.

Every scene is a small world in metres (x to the right, y up, z away from the camera) seen by a pinhole camera: a road
with pavements between two rows of buildings, trees, parked and moving cars, people and signs, under a drawn sky. Colors
overlap between the classes on purpose, so shape and context have to be learned.

Example:
    >>> image, mask = draw_scene(seed=0, size=(192, 256))
    >>> dataset = embedded_scenes(num_images=100, seed=0)
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from ..models.image_io import IMAGE_SUFFIXES
from ..utils.atomic_files import atomic_write
from ..utils.folders import visible_files


SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, SIGN = range(8)

Color = tuple[float, float, float]  # 0..255
Point = tuple[float, float]
Values = TypeVar("Values", Color, Point)
Range = tuple[float, float]

# Drawn this many times larger and averaged down. Odd, so that every pixel has a central sample, which is its label.
_OVERSAMPLING = 3
_SMALLEST_SIDE = 32
_NEAREST_DEPTH = 0.6  # metres; what is nearer is cut off

_DAY_SKIES = [  # zenith, horizon
    ((70, 120, 200), (190, 215, 240)),
    ((110, 160, 215), (225, 230, 235)),
    ((150, 155, 165), (205, 205, 205)),
    ((200, 203, 208), (235, 233, 228)),
    ((95, 90, 140), (240, 170, 120)),
    ((120, 110, 125), (225, 195, 175)),
]
_NIGHT_SKIES = [((40, 48, 95), (105, 110, 150)), ((75, 75, 92), (160, 135, 125))]
_WALLS = [(150, 82, 62), (222, 205, 172), (142, 142, 142), (145, 182, 222), (112, 142, 96), (228, 228, 224)]
_WALLS += [(74, 80, 90), (190, 150, 92), (205, 152, 140), (120, 95, 78), (170, 190, 200), (95, 110, 85)]
_ROOFS = [(150, 70, 50), (90, 80, 80), (120, 90, 70), (70, 85, 100), (95, 105, 90), (160, 155, 150)]
_FOLIAGE = [(70, 110, 50), (95, 130, 60), (50, 82, 45), (110, 120, 70), (60, 95, 75), (85, 125, 45)]
_FOLIAGE += [(192, 115, 45), (188, 160, 62), (212, 160, 178)]
_BARK = [(95, 75, 58), (120, 105, 90), (70, 60, 55), (150, 145, 138)]
_ASPHALT = [(78, 78, 82), (100, 100, 104), (92, 87, 82), (96, 100, 112), (118, 114, 108)]
_PAVING = [(176, 168, 156), (192, 176, 150), (186, 184, 182), (172, 126, 108), (196, 160, 140)]
_SKIN = [(236, 196, 168), (205, 155, 120), (150, 105, 78), (95, 65, 50)]
_PLATES = [(200, 40, 40), (40, 80, 180), (235, 200, 50), (40, 120, 80), (235, 235, 235), (225, 120, 40)]
_METAL = [(130, 130, 135), (90, 90, 95), (200, 200, 200)]
_PAINT = _WALLS + _FOLIAGE + _ASPHALT + _PLATES  # cars, shops and bags come in any color
_CLOTHES = [*_PLATES, (52, 58, 96), (140, 66, 112), (92, 60, 48), (222, 205, 172), (70, 110, 50), (78, 78, 82)]
_WHITE = (240.0, 240.0, 236.0)
_YELLOW = (225.0, 190.0, 80.0)
_DARK = (34.0, 34.0, 38.0)
_GLASS = (78.0, 96.0, 114.0)
_LIT_WINDOW = (255.0, 222.0, 140.0)


def draw_scene(seed: int, size: tuple[int, int] = (192, 256)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one street scene.

    Args:
        seed (`int`): Names the scene: the same seed and size give the same scene.
        size (`tuple[int, int]`, defaults to `(192, 256)`): Height and width in pixels, each at least 32.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the image, uint8 of shape `(height, width, 3)`, and its mask, uint8 of shape
        `(height, width)`, which holds the 8 classes of the label set "scenes" and no ignored pixel.

    Raises:
        ValueError: If a side is shorter than 32 pixels.
    """
    if min(size) < _SMALLEST_SIDE:
        raise ValueError(f"A scene needs (height, width) of at least {_SMALLEST_SIDE} pixels each, got {tuple(size)}.")
    painter = _new_painter(np.random.default_rng(seed), size)
    street = _new_street(painter.rng)
    things = _furnish(painter, street)
    _draw_ground(painter, street)
    _draw_shadows(painter, street, things)
    _draw_backdrop(painter, street)
    for side in street.built_sides:
        _draw_houses(painter, street, side)
    for thing in sorted(things, key=lambda thing: -thing.z):
        thing.draw(painter, thing.x, thing.z)
    middle = _OVERSAMPLING // 2
    mask = np.asarray(painter.labels)[middle::_OVERSAMPLING, middle::_OVERSAMPLING].copy()
    return _photograph(painter, mask), mask


def embedded_scenes(num_images: int, size: tuple[int, int] = (192, 256), seed: int = 0) -> datasets.Dataset:
    """Draw a dataset of street scenes, held in memory as PNG files.

    Args:
        num_images (`int`): Number of scenes, at most 1,000,000.
        size (`tuple[int, int]`, defaults to `(192, 256)`): Height and width in pixels.
        seed (`int`, defaults to 0): Datasets of different seeds share no scene; a longer one begins with the scenes of
            a shorter one.

    Returns:
        `datasets.Dataset`: columns `image` (RGB), `annotation` (mode "L", values 0 to 7) and `id`.

    Raises:
        ValueError: If `num_images` or `seed` is out of range.
    """
    if not 0 < num_images <= 1_000_000 or seed < 0:
        raise ValueError(f"Expected 1 to 1,000,000 images and a seed of at least 0, got {num_images} and {seed}.")
    columns: dict[str, list[Any]] = {"image": [], "annotation": [], "id": []}
    for scene_seed in range(seed * 1_000_000, seed * 1_000_000 + num_images):
        image, mask = draw_scene(scene_seed, size)
        columns["image"].append({"bytes": _png(image), "path": None})
        columns["annotation"].append({"bytes": _png(mask), "path": None})
        columns["id"].append(f"scene_{scene_seed:08d}")
    features = {
        "image": datasets.Image(mode="RGB"),
        "annotation": datasets.Image(mode="L"),
        "id": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save_scenes(output_dir: str | Path, num_images: int, size: tuple[int, int] = (192, 256), seed: int = 0) -> None:
    """Write scenes as PNG files into `images/` and `masks/` of a folder, which `load_segmentation_datasets` reads.

    Args:
        output_dir (`str` or `Path`): The folder.
        num_images (`int`), size (`tuple[int, int]`), seed (`int`): As for `embedded_scenes`.

    Raises:
        ValueError: If the folder holds other images, which would be part of the dataset.
    """
    scenes = embedded_scenes(num_images, size, seed)
    folders = {"images": "image", "masks": "annotation"}
    names = {f"{name}.png" for name in scenes["id"]}
    for folder in folders:
        if others := {path.name for path in visible_files(Path(output_dir, folder), IMAGE_SUFFIXES)} - names:
            raise ValueError(
                f"{Path(output_dir, folder)} holds other images, such as {min(others)}: give another `output_dir`."
            )
    for row in scenes:
        for folder, column in folders.items():
            with atomic_write(Path(output_dir) / folder / f"{row['id']}.png") as temporary:
                row[column].save(temporary)


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# Colors, and the painter


def _mix(first: Values, second: Values, share: float) -> Values:
    return cast(Values, tuple(a + share * (b - a) for a, b in zip(first, second)))


def _shade(color: Values, factor: float) -> Values:
    return cast(Values, tuple(channel * factor for channel in color))


def _smooth_noise(rng: Generator, size: tuple[int, int], bumps: tuple[int, int]) -> np.ndarray:
    """Draw float32 noise of shape `size`, about 0..1, with so many bumps along its height and width."""
    grid = Image.fromarray(rng.random(bumps, dtype=np.float32))
    return np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC))


@dataclass
class _Painter:
    """Draws shapes given in metres into an image and into its label map at once."""

    rng: Generator
    focal: float  # pixels, like the vanishing point
    vanishing_point: Point
    camera_height: float
    haze_color: Color
    haze_depth: float  # metres after which 63 % of a color is haze
    night: bool
    image: Image.Image
    labels: Image.Image

    def __post_init__(self) -> None:
        self._image_draw = ImageDraw.Draw(self.image)
        self._labels_draw = ImageDraw.Draw(self.labels)

    def pick(self, palette: Sequence[Color], spread: float = 11) -> Color:
        """Draw a color near one of the palette: brighter or darker as a whole, and each channel shifted a little."""
        base = np.asarray(palette[int(self.rng.integers(len(palette)))])
        return tuple((base + self.rng.normal(0, spread) + self.rng.normal(0, spread / 3, 3)).tolist())

    def project(self, x: float, y: float, z: float) -> Point:
        scale = self.focal / max(z, _NEAREST_DEPTH)
        return self.vanishing_point[0] + x * scale, self.vanishing_point[1] + (self.camera_height - y) * scale

    def polygon(self, pixels: Sequence[Point], color: Color, z: float, label: int | None = None) -> None:
        """Fill a polygon of pixel positions; without a label the one below stays."""
        self._image_draw.polygon(pixels, fill=self._ink(color, z))
        if label is not None:
            self._labels_draw.polygon(pixels, fill=label)

    def ellipse(self, center: Point, radii: Point, color: Color, z: float, label: int) -> None:
        box = (center[0] - radii[0], center[1] - radii[1], center[0] + radii[0], center[1] + radii[1])
        self._image_draw.ellipse(box, fill=self._ink(color, z))
        self._labels_draw.ellipse(box, fill=label)

    def ground(self, x: Range, z: Range, color: Color, label: int | None = None) -> None:
        """Fill a rectangle on the ground."""
        self.polygon([self.project(u, 0, w) for u, w in _corners(x, z)], color, sum(z) / 2, label)

    def _ink(self, color: Color, z: float) -> tuple[int, ...]:
        hazy = _mix(color, self.haze_color, 1 - math.exp(-z / self.haze_depth))
        return tuple(min(max(int(channel), 0), 255) for channel in hazy)


@dataclass
class _Figure:
    """An upright flat shape that stands at (x, z); u runs to the right and v up, in metres from its foot."""

    painter: _Painter
    x: float
    z: float
    label: int

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        pixels = [self.painter.project(self.x + u, v, self.z) for u, v in points]
        self.painter.polygon(pixels, color, self.z, self.label)

    def box(self, u: Range, v: Range, color: Color) -> None:
        self.polygon(_corners(u, v), color)

    def ellipse(self, center: Point, radii: Point, color: Color) -> None:
        scale = self.painter.focal / self.z
        pixel = self.painter.project(self.x + center[0], center[1], self.z)
        self.painter.ellipse(pixel, (radii[0] * scale, radii[1] * scale), color, self.z, self.label)


def _corners(u: Range, v: Range) -> list[Point]:
    return [(u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1])]


def _new_painter(rng: Generator, size: tuple[int, int]) -> _Painter:
    """Set up the camera and the sky."""
    height, width = size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING
    night = rng.random() < 0.05
    skies = _NIGHT_SKIES if night else _DAY_SKIES
    zenith, horizon_color = np.array(skies[rng.integers(len(skies))]) + rng.normal(0, 10) + rng.normal(0, 3, (2, 3))
    horizon = rng.uniform(0.4, 0.5)
    rows = np.linspace(0, 1 / horizon, size[0], dtype=np.float32)[:, None, None].clip(0, 1)
    sky = zenith + rows * (horizon_color - zenith) + np.zeros((*size, 3))
    if rng.random() < 0.6:
        clouds = _smooth_noise(rng, size, (12, 6)) * 0.6 + _smooth_noise(rng, size, (28, 16)) * 0.4
        cover = ((clouds - rng.uniform(0.4, 0.6)) * 4).clip(0, 1)[..., None] * rng.uniform(0.3, 0.9)
        sky += cover * (horizon_color * rng.uniform(0.8, 1.2) - sky)
    image = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    return _Painter(
        rng=rng,
        focal=min(height, 0.75 * width) * rng.uniform(0.75, 0.95),
        vanishing_point=(width * rng.uniform(0.35, 0.65), height * horizon),
        camera_height=rng.uniform(1.4, 2.2),
        haze_color=tuple(horizon_color.tolist()),
        haze_depth=rng.uniform(50, 90) if rng.random() < 0.2 else rng.uniform(120, 400),
        night=night,
        image=image.resize((width, height), Image.Resampling.BILINEAR),
        labels=Image.new("L", (width, height), SKY),
    )


# The street


@dataclass
class _Street:
    """The ground plan in metres. Side -1 is the left, side 1 the right."""

    center: float
    half_road: float
    pavement: float
    end: float  # depth of the backdrop
    crossing: Range  # depths of a second road across the image; both at the end where there is none
    built_sides: tuple[int, ...]

    def kerb(self, side: int) -> float:
        return self.center + side * self.half_road

    def wall(self, side: int) -> float:
        return self.center + side * (self.half_road + self.pavement)


def _new_street(rng: Generator) -> _Street:
    half_road, end, crossing = rng.uniform(2.6, 4.2), rng.uniform(20, 55), rng.uniform(8, 14)
    return _Street(
        center=rng.uniform(-1, 1) * (half_road + 0.5),
        half_road=half_road,
        pavement=rng.uniform(2.8, 4.4),
        end=end,
        crossing=(crossing, crossing + rng.uniform(4, 7)) if rng.random() < 0.3 else (end, end),
        built_sides=(-1, 1) if rng.random() < 0.7 else (int(rng.choice([-1, 1])),),
    )


def _draw_ground(painter: _Painter, street: _Street) -> None:
    rng, wide, deep = painter.rng, (-150.0, 150.0), (_NEAREST_DEPTH, street.end + 20)
    paving, asphalt = painter.pick(_PAVING), painter.pick(_ASPHALT)
    joint = _shade(paving, rng.uniform(0.75, 0.95))
    road = street.kerb(-1), street.kerb(1)
    painter.ground(wide, deep, paving, PAVEMENT)
    for z in np.arange(1.0, 22.0, rng.uniform(0.9, 1.6)):
        painter.ground(wide, (z, 1.012 * z), joint)
    for side in (-1, 1):
        middle, kerb = street.kerb(side) + side * street.pavement * rng.uniform(0.35, 0.65), street.kerb(side)
        painter.ground((middle - 0.03, middle + 0.03), deep, joint)
        painter.ground((kerb, kerb + side * 0.25), deep, _shade(paving, rng.uniform(0.8, 1.3)))
    painter.ground(road, deep, asphalt, ROAD)
    painter.ground(wide, street.crossing, asphalt, ROAD)
    for _ in range(rng.integers(0, 4)):  # repairs
        x, z = rng.uniform(road[0], road[1] - 1.2), rng.uniform(3, 20)
        painter.ground((x, x + 1.2), (z, z + rng.uniform(0.5, 3)), _shade(asphalt, rng.uniform(0.8, 1.12)))
    _draw_lane_marks(painter, street)


def _draw_lane_marks(painter: _Painter, street: _Street) -> None:
    rng, paint = painter.rng, painter.pick([_WHITE, _WHITE, _WHITE, _YELLOW])

    def mark(x: float, width: float, z: Range) -> None:
        if z[1] <= street.crossing[0] or street.crossing[1] <= z[0] < street.end:
            painter.ground((x - width / 2, x + width / 2), z, paint)

    if rng.random() < 0.8:
        period = rng.uniform(3, 6)
        for z in np.arange(rng.uniform(0, period), street.end, period):
            mark(street.center, 0.18, (z, z + period / 2))
    if rng.random() < 0.4:
        for z in np.arange(_NEAREST_DEPTH, street.end, 2.0):
            for side in (-1, 1):
                mark(street.kerb(side) - side * 0.35, 0.12, (z, z + 2))
    if rng.random() < 0.4:  # a zebra crossing
        z = rng.uniform(4, 12) if street.crossing[0] == street.end else street.crossing[0] - 3.2
        for x in np.arange(street.kerb(-1) + 0.5, street.kerb(1) - 0.3, 0.95):
            mark(x, 0.5, (z, z + 2.6))


def _draw_shadows(painter: _Painter, street: _Street, things: "Sequence[_Thing]") -> None:
    """Darken the ground under and beside the things, and beside the walls that are towards the sun."""
    rng = painter.rng
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1.1)
    shift_x, shift_z = length * math.cos(angle), length * math.sin(angle)
    strength = int(255 * (rng.uniform(0, 0.2) if painter.night else rng.uniform(0.1, 0.55)))
    # Drawn at the final size and enlarged, which softens the edges.
    shadow = Image.new("L", (painter.image.width // _OVERSAMPLING, painter.image.height // _OVERSAMPLING))
    draw = ImageDraw.Draw(shadow)

    def fill(corners: Sequence[Point], darkness: int) -> None:
        draw.polygon([_shade(painter.project(x, 0, z), 1 / _OVERSAMPLING) for x, z in corners], fill=darkness)

    for side in street.built_sides:
        if side * shift_x < 0:
            for z in np.arange(1.0, street.end, 9.0):
                x = street.wall(side)
                fill(_corners((x, x + shift_x * rng.uniform(4, 9)), (z, z + 9)), strength)
    for thing in things:
        x, z, half = thing.x, thing.z, thing.half_width
        dx, dz = shift_x * thing.height, shift_z * thing.height
        fill([(x - half, z), (x + half, z), (x + half + dx, z + dz), (x - half + dx, z + dz)], strength)
        fill(_corners((x - half, x + half), (z - 0.25, z + 0.25)), 120)
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.8)).resize(painter.image.size, Image.Resampling.BILINEAR)
    painter.image.paste((18, 20, 30), mask=shadow)  # the ground is all that is drawn so far below the horizon


# Buildings


@dataclass
class _House:
    wall: Color
    roof: Color
    glass: Color
    shop: Color | None
    height: float
    storey: float
    bay: float  # metres from window to window
    opening: Point  # shares of a bay and of a storey that a window takes
    texture: str


def _new_house(painter: _Painter, heights: Range) -> _House:
    rng = painter.rng
    return _House(
        wall=painter.pick(_WALLS),
        roof=painter.pick(_ROOFS),
        glass=_mix(_GLASS, painter.pick([_WHITE, _DARK, (150, 190, 230)]), rng.uniform(0, 0.6)),
        shop=painter.pick(_PAINT) if rng.random() < 0.4 else None,
        height=rng.uniform(*heights),
        storey=rng.uniform(2.6, 3.6),
        bay=rng.uniform(1.8, 3.4),
        opening=(rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.65)),
        texture=str(rng.choice(["plain", "bricks", "panels"])),
    )


def _draw_houses(painter: _Painter, street: _Street, side: int) -> None:
    """Draw the houses of one side, far to near: of each the gable that faces the camera, then the street front."""
    rng, far = painter.rng, street.end
    brightness, tallest = rng.uniform(0.7, 1.1), rng.uniform(6, 15)
    while far > 2:
        near = max(far - rng.uniform(5, 13), 1.0)
        if near > street.crossing[1] + 1 or far < street.crossing[0] - 1 or street.crossing[0] == street.end:
            house, corner = _new_house(painter, (3.5, tallest)), (street.wall(side), near)
            _draw_facade(painter, house, corner, (side, 0), 10.0, 1.0)
            _draw_facade(painter, house, corner, (0, 1), far - near, brightness)
        far = near - (rng.uniform(2, 6) if rng.random() < 0.2 else 0)


def _draw_backdrop(painter: _Painter, street: _Street) -> None:
    """Close the street: a row of houses or of trees across its end."""
    rng, half = painter.rng, 0.65 * street.end * painter.image.width / painter.focal
    if rng.random() < 0.3:
        foliage = painter.pick(_FOLIAGE)
        for x in np.arange(-half, half, 3.0):
            _draw_crown(_Figure(painter, x, street.end, TREE), 2.4, rng.uniform(2.4, 3.4), foliage)
        return
    tallest, x = street.end * rng.uniform(0.1, 0.35) + 3, -half
    while x < half:
        length = rng.uniform(0.15, 0.4) * street.end
        _draw_facade(painter, _new_house(painter, (3, tallest)), (x, street.end), (1, 0), length, 0.95)
        x += length


def _draw_facade(
    painter: _Painter, house: _House, foot: Point, direction: Point, length: float, brightness: float
) -> None:
    """Draw a wall that runs from `foot` (x, z) along `direction`, with its windows, its door and its roof."""
    rng, height, wall = painter.rng, house.height, _shade(house.wall, brightness)
    depth = foot[1] + direction[1] * length / 3

    def fill(points: Sequence[Point], color: Color, label: int | None = None) -> None:
        pixels = [painter.project(foot[0] + direction[0] * t, y, foot[1] + direction[1] * t) for t, y in points]
        painter.polygon(pixels, color, depth, label)

    def quad(along: Range, up: Range, color: Color) -> None:
        fill(_corners(along, up), color)

    if house.texture != "panels":  # a pitched roof
        ridge = [(0, height), (length, height), (0.92 * length, height + 1.6), (0.08 * length, height + 1.6)]
        fill(ridge, _shade(house.roof, brightness), BUILDING)
    fill(_corners((0, length), (0, height)), wall, BUILDING)
    if house.texture == "bricks" and depth < 30:
        for y in np.arange(0.4, height, 0.45):
            quad((0, length), (y, y + 0.07), _shade(wall, 0.86))
    elif house.texture == "panels":
        for t in np.arange(0, length, house.bay):
            quad((t, t + 0.12), (0, height), _shade(wall, 0.8))
    quad((0, length), (height - 0.35, height), _shade(wall, 0.7))
    quad((0, length), (0, 0.5), _shade(wall, 0.75))

    bays, storeys = max(int(length / house.bay), 1), max(int((height - 0.6) / house.storey), 1)
    bay, storey, door = length / bays, (height - 0.5) / storeys, int(rng.integers(bays))
    frame = _shade(wall, 1.25 if sum(wall) < 400 else 0.8)
    for i in range(bays):
        for j in range(storeys):
            middle, half, bottom = (i + 0.5) * bay, house.opening[0] * bay / 2, (j + 0.28) * storey
            top = bottom + house.opening[1] * storey
            lit = rng.random() < (0.5 if painter.night else 0.04)
            glass = _LIT_WINDOW if lit else _shade(house.glass, rng.uniform(0.75, 1.2))
            if j == 0 and i == door:
                half, bottom, top, glass = 0.55, 0.0, min(2.2, top), _shade(house.roof, 0.8)
            elif j == 0 and house.shop is not None:
                half, bottom, top = bay * 0.42, 0.5, min(storey * 0.75, 2.4)
            if depth < 30:
                quad((middle - half - 0.1, middle + half + 0.1), (max(bottom - 0.12, 0), top + 0.1), frame)
            quad((middle - half, middle + half), (bottom, top), glass)
    if house.shop is not None:
        quad((0, length), (min(storey * 0.78, 2.5), min(storey * 0.98, 3.1)), house.shop)


# What stands and moves in the street


@dataclass
class _Thing:
    """Something on the ground, with the size of its shadow."""

    draw: Callable[[_Painter, float, float], None]
    x: float
    z: float
    half_width: float
    height: float


def _furnish(painter: _Painter, street: _Street) -> list[_Thing]:
    """Choose what is in the street and where: everything in the image, large enough, and mostly beside the rest."""
    rng = painter.rng
    things: list[_Thing] = []
    height, width = painter.image.height, painter.image.width

    def span(x: float, z: float, half_width: float) -> Range:
        return painter.project(x - half_width, 0, z)[0] / width, painter.project(x + half_width, 0, z)[0] / width

    def covered(candidate: _Thing) -> float:
        """Share of the candidate's width that is in front of or behind other things, or out of the image."""
        left, right = span(candidate.x, candidate.z, candidate.half_width)
        others = [span(thing.x, thing.z, thing.half_width) for thing in things]
        others += 4 * [(-9.0, 0.0), (1.0, 9.0)]  # better behind a few others than out of the image
        return sum(max(min(right, end) - max(left, start), 0) for start, end in others) / (right - left)

    def add(draw: Callable, zone: Callable[[int], float], z: float, half_width: float, height: float) -> None:
        depths = [z * factor for factor in (1.0, 1.25, 1.5, 1.8)]
        spots = [
            _Thing(draw, zone(side), depth, half_width, height)
            for depth in depths
            for side in rng.permutation((-1, 1))
        ]
        things.append(min(spots, key=lambda spot: max(covered(spot), 0.25) + 0.05 * spot.z / z))

    def depth_of(metres: float, share: Range) -> float:
        """Depth at which so many metres take a share of the image's height that is drawn from the range."""
        return painter.focal * metres / (min(height, width) * rng.uniform(*share))

    def beside(margin: float) -> Callable[[int], float]:
        return lambda side: street.kerb(side) + side * margin

    for _ in range(rng.integers(1, 3)):
        add(_draw_sign, beside(rng.uniform(0.4, 0.9)), depth_of(1.1, (0.2, 0.32)), 0.65, 2.4)
    for _ in range(rng.integers(1, 4)):
        margin = rng.uniform(0.5, street.pavement - 0.4) if rng.random() < 0.75 else -rng.uniform(0.5, 2.5)
        add(_draw_person, beside(margin), depth_of(1.7, (0.36, 0.58)), 0.4, 1.7)
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.7:  # parked, or in a lane
            inside = rng.choice([1.1, street.half_road * rng.uniform(0.4, 0.7)])
            add(_draw_car, beside(-inside), rng.uniform(4, 9), 0.9, 1.4)
        else:
            across = partial(_draw_car, across=True)
            add(across, beside(-rng.uniform(0, street.half_road)), rng.uniform(5.5, 9.5), 2.0, 1.4)
    for _ in range(rng.integers(1, 4)):
        add(_draw_tree, beside(rng.uniform(0.7, 1.5)), rng.uniform(7, 14), 2.2, 5)
    if len(street.built_sides) == 1:  # a park
        park = -street.built_sides[0]
        for z in np.arange(9, min(street.end, 30), rng.uniform(3, 6)):
            things.append(_Thing(_draw_tree, street.wall(park) + park * rng.uniform(0, 6), float(z), 2, 5))
    return things


def _draw_tree(painter: _Painter, x: float, z: float) -> None:
    rng, tree = painter.rng, _Figure(painter, x, z, TREE)
    foliage, bark = painter.pick(_FOLIAGE), painter.pick(_BARK)
    trunk, height = rng.uniform(0.18, 0.28), rng.uniform(3.2, 4.6)
    tree.polygon([(-trunk * 1.2, 0), (trunk * 1.2, 0), (trunk * 0.8, height), (-trunk * 0.8, height)], bark)
    tree.polygon([(trunk * 0.2, 0), (trunk * 1.2, 0), (trunk * 0.8, height), (0, height)], _shade(bark, 0.75))
    if rng.random() < 0.8:
        _draw_crown(tree, height, rng.uniform(1.9, 2.6), foliage)
        return
    for bottom, half in ((0.9, 1.8), (2.0, 1.5), (3.0, 1.15), (4.0, 0.8)):  # a conifer
        tree.polygon([(-half, bottom), (half, bottom), (0, bottom + 2.2)], _shade(foliage, rng.uniform(0.65, 1.0)))


def _draw_crown(tree: _Figure, height: float, radius: float, foliage: Color) -> None:
    """Draw a round crown around `height`: a few large blobs for the outline, many leaves inside them."""
    rng = tree.painter.rng
    blobs = [(0.0, height, radius)]
    for angle in (np.arange(0, 2 * math.pi, 0.9) + rng.uniform(0, 1)).tolist():
        distance, size = radius * rng.uniform(0.35, 0.55), radius * rng.uniform(0.5, 0.65)
        blobs.append((distance * math.cos(angle), height + distance * math.sin(angle), size))
    for u, v, r in blobs:
        tree.ellipse((u, v), (r, r), _shade(foliage, 0.75))
    num_leaves = int(min(2.5 * radius * tree.painter.focal / tree.z / _OVERSAMPLING, 60))
    for blob, size, turn, place, tone in rng.random((num_leaves, 5)).tolist():
        u, v, r = blobs[int(blob * len(blobs))]
        leaf = r * (0.1 + 0.18 * size)
        distance, angle = (r - leaf) * math.sqrt(place), 2 * math.pi * turn
        u, v = u + distance * math.cos(angle), v + distance * math.sin(angle)
        brightness = 0.65 + 0.4 * tone + 0.15 * (v - height) / radius
        tree.ellipse((u, v), (leaf, leaf * 0.8), _shade(foliage, brightness))


def _draw_person(painter: _Painter, x: float, z: float) -> None:
    rng, person = painter.rng, _Figure(painter, x, z, PERSON)
    skin, hair, top, trousers = (painter.pick(palette) for palette in (_SKIN, _BARK + _SKIN, _CLOTHES, _CLOTHES))
    h = rng.uniform(1.6, 1.9) if rng.random() < 0.85 else rng.uniform(1.3, 1.4)
    stride, swing, lean = rng.uniform(0.02, 0.12), rng.uniform(0.0, 0.05), rng.uniform(-0.02, 0.02)

    def part(points: Sequence[Point], color: Color) -> None:
        person.polygon([(u * h, v * h) for u, v in points], color)

    for foot, tone in ((-stride, 0.85), (stride, 1.0)):
        part([(foot - 0.08, 0), (foot + 0.09, 0), (0.13, 0.5), (-0.13, 0.5)], _shade(trousers, tone))
        part(_corners((foot - 0.08, foot + 0.1), (0, 0.045)), _DARK)
    if rng.random() < 0.3:  # a coat or a skirt
        part([(-0.2, 0.25), (0.2, 0.25), (0.13, 0.55), (-0.13, 0.55)], top)
    for side in (-1, 1):
        elbow = side * (0.22 + swing)
        part([(side * 0.12, 0.82), (side * 0.19, 0.78), (elbow, 0.45), (elbow - side * 0.08, 0.45)], _shade(top, 0.8))
    shoulders = [(lean + 0.18, 0.78), (lean + 0.1, 0.85), (lean - 0.1, 0.85), (lean - 0.18, 0.78)]
    part([(-0.14, 0.46), (0.14, 0.46), *shoulders], top)
    part([(0.03, 0.46), (0.14, 0.46), (lean + 0.18, 0.78), (lean + 0.06, 0.85)], _shade(top, 0.85))
    if rng.random() < 0.25:
        part(_corners((-0.28, -0.15), (0.4, 0.58)), painter.pick(_PAINT))  # a bag
    person.ellipse((lean * h, 0.91 * h), (0.09 * h, 0.1 * h), hair)
    if rng.random() < 0.6:  # seen from the front
        person.ellipse((lean * h, 0.89 * h), (0.075 * h, 0.08 * h), skin)


def _draw_sign(painter: _Painter, x: float, z: float) -> None:
    rng, sign = painter.rng, _Figure(painter, x, z, SIGN)
    color, inner, pole = painter.pick(_PLATES), painter.pick([_WHITE, _DARK, *_PLATES]), painter.pick(_METAL)
    r, height = rng.uniform(0.55, 0.7), rng.uniform(1.6, 2.2)
    corners = int(rng.choice([0, 3, 4, 8, 24]))  # 0: a panel on two poles
    for u in (0.0,) if corners else (-0.6, 0.6):
        sign.box((u - 0.1, u + 0.1), (0, height), pole)
        sign.box((u + 0.03, u + 0.1), (0, height), _shade(pole, 0.7))
    if not corners:
        sign.box((-1.0, 1.0), (height - 0.6, height + 0.6), inner)
        sign.box((-0.92, 0.92), (height - 0.52, height + 0.52), color)
        for v in (-0.28, 0.0, 0.28):
            sign.box((-0.75, rng.uniform(0, 0.75)), (height + v - 0.07, height + v + 0.07), inner)
        return

    def plate(radius: float, fill: Color) -> None:
        angles = (math.pi / 8 if corners == 8 else math.pi / 2) + np.arange(corners) * 2 * math.pi / corners
        sign.polygon([(radius * math.cos(a), height + radius * math.sin(a)) for a in angles.tolist()], fill)

    plate(r * (1.3 if corners == 3 else 1.05), color)
    plate(r * 0.8, inner)
    if rng.random() < 0.5:
        plate(r * 0.3, _DARK)
    else:
        sign.box((-0.3, 0.3), (height - 0.1, height + 0.1), color)


def _draw_car(painter: _Painter, x: float, z: float, across: bool = False) -> None:
    """Draw a car, along the street or across it, as two boxes, body and cabin, of the sides that face the camera."""
    rng, width = painter.rng, 1.8
    length = rng.uniform(3.7, 4.6)
    left = x - (length if across else width) / 2
    paint, glass = painter.pick(_PAINT), _mix(_GLASS, _DARK, rng.uniform(0, 0.7))
    lamps, waist = painter.pick([(190, 30, 30), (250, 240, 200)]), rng.uniform(0.85, 1.0)
    top, hood, trunk, slope = rng.uniform(1.4, 1.6), rng.uniform(0.16, 0.28), rng.uniform(0.0, 0.2), 0.1
    if rng.random() < 0.2:  # a van
        top, hood, trunk, slope = rng.uniform(1.9, 2.2), 0.08, 0.0, 0.04
    if rng.random() < 0.5:
        hood, trunk = trunk, hood

    def box(start: float, end: float, slope: float, taper: float, y: Range) -> list[tuple[str, list[Point]]]:
        """Return the sides in view, from the shares of the length at which the box starts and ends."""

        def ring(inset: float, taper: float, height: float) -> list[Point]:
            along = (start + inset) * length, (end - inset) * length
            plan = [corner if across else corner[::-1] for corner in _corners(along, (taper, width - taper))]
            return [painter.project(left + u, height, z + w) for u, w in plan]

        low, high = ring(0, 0, y[0]), ring(slope, taper, y[1])
        sides = [("flank" if i % 2 else "end", [low[i], low[i - 1], high[i - 1], high[i]]) for i in range(4)]
        sides.append(("top", [high[0], high[3], high[2], high[1]]))
        # Corners run from the bottom left counter-clockwise as seen from outside; across, everything is mirrored.
        return [(kind, quad) for kind, quad in sides if (_signed_area(quad) > 0) == across]

    def fill(quad: Sequence[Point], u: Range, v: Range, color: Color) -> None:
        """Fill the part of a side between shares of its width and height."""
        bottom_left, bottom_right, top_right, top_left = quad
        points = [_mix(_mix(bottom_left, bottom_right, s), _mix(top_left, top_right, s), t) for s, t in _corners(u, v)]
        painter.polygon(points, color, z, CAR)

    brightness = {"top": 1.15, "flank": 0.9, "end": 0.75}
    body = box(0, 1, 0, 0, (0.2, waist))
    for kind, quad in body:
        fill(quad, (0, 1), (0, 1), _shade(paint, brightness[kind]))
        if kind == "flank":
            fill(quad, (0.02, 0.98), (0.42, 0.5), _shade(paint, 0.65))
        elif kind == "end":
            fill(quad, (0, 1), (0, 0.25), _DARK)
            fill(quad, (0.36, 0.64), (0.3, 0.5), _WHITE)
            for u in (0.04, 0.74):
                fill(quad, (u, u + 0.22), (0.5, 0.8), lamps)
    for kind, quad in box(hood, 1 - trunk, slope, 0.2, (waist, top)):
        fill(quad, (0, 1), (0, 1), _shade(paint, brightness[kind]))
        if kind != "top":
            fill(quad, (0.06, 0.94), (0.12, 0.85), glass)
            fill(quad, (0.12, 0.42), (0.4, 0.85), _shade(glass, 1.25))
        if kind == "flank":
            fill(quad, (0.48, 0.53), (0, 1), _shade(paint, 0.9))
    for kind, quad in body:  # wheels
        for u in (0.18, 0.82) if kind == "flank" else ():
            radii = 0.34 / length * abs(quad[1][0] - quad[0][0]), 0.34 * painter.focal / max(z, 1.0)
            for share, color in ((1.0, _DARK), (0.5, (150.0, 150.0, 150.0))):
                painter.ellipse(_mix(quad[0], quad[1], u), _shade(radii, share), color, z, CAR)
        for u in (0.05, 0.77) if kind == "end" else ():
            fill(quad, (u, u + 0.18), (-0.25, 0.05), _DARK)


def _signed_area(quad: Sequence[Point]) -> float:
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(quad, [*quad[1:], quad[0]])) / 2


# The camera


def _photograph(painter: _Painter, mask: np.ndarray) -> np.ndarray:
    """Add what light and a camera add: texture, uneven light, color cast, exposure, blur and noise."""
    rng, size = painter.rng, mask.shape
    grain = _smooth_noise(rng, size, (size[0] // 4, size[1] // 4)) - 0.5
    grain += rng.standard_normal(size, dtype=np.float32) * 0.6
    amplitude = rng.uniform(0.01, 0.04, 8).astype(np.float32)
    amplitude[SKY] = 0
    light = 1 + rng.uniform(0.1, 0.5) * (_smooth_noise(rng, size, (3, 4)) - 0.5)
    gain = rng.uniform(0.94, 1.06, 3) * rng.uniform(0.8, 1.2)
    if painter.night:
        gain *= rng.uniform(0.45, 0.65) * np.array((0.9, 0.95, 1.15))
    pixels = np.asarray(painter.image.reduce(_OVERSAMPLING), dtype=np.float32) * gain.astype(np.float32)
    pixels *= (light * (1 + amplitude[mask] * grain))[..., None]
    pixels = 110 + (pixels - 110) * rng.uniform(0.8, 1.15) + rng.uniform(-10, 15)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    noise = rng.standard_normal((*size, 3), dtype=np.float32) * rng.uniform(1, 4)
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
