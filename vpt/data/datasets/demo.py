"""Tasks that need no download: white shapes and handwritten digits to classify, scenes of coloured shapes to segment.

Splits do not depend on the seed of the run; `ShapesDataModule` redraws the grid of dSprites (Matthey et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vpt.argument_types import checked
from vpt.data.cache.content_hashes import Hashes, as_hashes, content_hash
from vpt.data.catalog.cards import load_card
from vpt.data.datamodule import ImageDataModule
from vpt.data.masks import MaskDataModule, MaskSplit
from vpt.data.splits import Split, chosen_splits, generated_split
from vpt.data.transforms import Preset, get_preset
from vpt.errors import UnknownNameError
from vpt.image_size import ImageSize, as_size, sides

SHAPES = ("square", "ellipse", "heart")
SCENE_CLASSES = ("background", "circle", "square", "triangle", "star")
_GRID = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
_PERIODS = np.array([10, 20, 40])  # orientations after which a square, an ellipse, a heart looks the same
_LISTS = {
    "train800": np.arange(800),
    "val200": np.arange(800, 1000),
    "train800val200": np.arange(1000),
    "test": np.arange(1000, 2000),
}
_OVERSAMPLING = 4
_SEED = 0
_SPLIT_SEED = 0
_SCENES_VERSION = 1  # raised when the same numbers would give other images
Latents = Mapping[str, NDArray[np.int64]]
Pixels = NDArray[np.uint8]


class ShapesDataModule(ImageDataModule):
    """Generated white shapes on black in the manner of dSprites: 800 / 200 / 1,000, no image twice.

    Labels as in VTAB: 16 bins of the x position or of the orientation, or the three shapes. A square turned by 90° and
    an ellipse turned by 180° are the same image, so that no method can exceed (¼ + ½ + 1)/3 = 58 % on orientation.
    """

    @checked
    def __init__(
        self,
        label: str = "x_position",
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "square",
        image_size: int | list[int] = 64,
        **options: Any,
    ) -> None:
        """Chooses the shapes; they are drawn, at the size that is asked for, when a split is.

        Args:
            label: ``"x_position"``, ``"orientation"`` or ``"shape"``.
            train: ``"train800"`` or ``"train800val200"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing; images are drawn at the final size, only its normalization counts.
            image_size: Pixels of the images, or [height, width].
            **options: See :class:`ImageDataModule`. Any augmentation changes position and orientation.
        """
        table = latents(2000, seed=_SEED)
        kinds = {
            "x_position": (table["x"] // 2, [f"x bin {bin_}" for bin_ in range(16)]),
            "orientation": ((table["orientation"] / 2.5).astype(np.int64), [f"angle bin {bin_}" for bin_ in range(16)]),
            "shape": (table["shape"], list(SHAPES)),
        }
        if label not in kinds:
            raise UnknownNameError("label of the shapes", label, kinds)
        labels, names = kinds[label]
        rows = np.stack(list(table.values()), axis=1)

        def split(stem: str, positions: NDArray[np.intp]) -> Split:
            pixels = partial(_draw, rows[positions], as_size(image_size))
            return generated_split("shapes", stem, positions, labels[positions], rows[positions], pixels)

        splits = chosen_splits(_LISTS, {"train": train, "val": val, "test": test}, split)
        name = f"shapes_{label}"
        super().__init__(name, names, splits, preset, image_size, card=load_card("shapes"), **options)


def _draw(
    rows: NDArray[np.int64], image_size: ImageSize, positions: NDArray[np.int64] | None = None, cropped: bool = True
) -> Pixels:
    """Draws shapes at the final size, where no preset's crop cuts anything off."""
    chosen = rows if positions is None else rows[positions]
    return draw(dict(zip(_GRID, chosen.T, strict=True)), image_size)


def latents(count: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Draws points of the grid, at most 50,000, whose images all differ, as int64 (count,) each.

    ``shape`` in 0..2 (:data:`SHAPES`), ``scale`` 0..5, ``orientation`` 0..39 (steps of 9°), ``x`` and ``y`` 0..31.
    """
    sides = tuple(_GRID.values())
    points = np.stack(np.unravel_index(np.random.default_rng(seed).permutation(math.prod(sides))[: 2 * count], sides))
    images = points.copy()
    images[2] %= _PERIODS[images[0]]
    first = np.sort(np.unique(images, axis=1, return_index=True)[1])[:count]
    return {name: values[first].astype(np.int64) for name, values in zip(_GRID, points, strict=True)}


def draw(points: Latents, image_size: ImageSize) -> NDArray[np.uint8]:
    """Draws N points as from :func:`latents`: uint8 (N, 3, height, width), the three channels equal."""
    names = list(_GRID)
    table = zip(*(points[name].tolist() for name in names), strict=True)
    grey = np.stack([_draw_one(**dict(zip(names, row, strict=True)), image_size=image_size) for row in table])
    return np.repeat(grey[:, None], 3, axis=1)


def _draw_one(shape: int, scale: int, orientation: int, x: int, y: int, image_size: ImageSize) -> NDArray[np.uint8]:
    """Draws one shape four times too large and averages, uint8 (height, width)."""
    height, width = (side * _OVERSAMPLING for side in sides(image_size))
    radius = min(height, width) * 0.16 * (0.5 + 0.1 * scale)
    angle = 2 * math.pi * orientation / _GRID["orientation"]
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    # The centre runs over the middle 60 % of the image: the largest shape still fits in any orientation.
    centre = np.array([width, height]) * (0.2 + 0.6 * np.array([x, y]) / (_GRID["x"] - 1))
    outline = radius * _outline(SHAPES[shape]) @ turn + centre
    return _filled(outline, image_size)


def _outline(shape: str) -> NDArray[np.float64]:
    """Returns the outline (V, 2) of a shape within the unit circle, y pointing down."""
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * math.sqrt(0.5)
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    if shape == "ellipse":
        return np.stack([np.cos(t), 0.5 * np.sin(t)], axis=1)
    heart_x = 16 * np.sin(t) ** 3
    heart_y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([heart_x, heart_y], axis=1) / 17.1


def _filled(outline: NDArray[np.float64], image_size: ImageSize) -> Pixels:
    """How much of each pixel a polygon covers, 0 to 255; corners (V, 2) in quarters of a pixel."""
    height, width = sides(image_size)
    canvas = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in outline], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING))


class ShapeScenesDataModule(MaskDataModule):
    """Two to four coloured shapes over a textured background: 800 / 200 / 1,000 images of five classes.

    Colours say nothing of the class, shapes may hide each other; a pixel's shape covers at least half of it.
    """

    @checked
    def __init__(
        self,
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "square",
        image_size: int | list[int] = 64,
        **options: Any,
    ) -> None:
        """Chooses the images; they are drawn, at the size that is asked for, when a split is.

        Args:
            train: ``"train800"`` or ``"train800val200"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing; images are drawn at the final size, only its normalization counts.
            image_size: Pixels of the images, or [height, width].
            **options: See :class:`MaskDataModule`.
        """
        make = partial(_scene_split, image_size=as_size(image_size))
        splits = chosen_splits(_LISTS, {"train": train, "val": val, "test": test}, make)
        card = load_card("shape_scenes")
        super().__init__("shape_scenes", SCENE_CLASSES, splits, preset, image_size, card=card, **options)


@lru_cache(maxsize=4)
def _drawn(first: int, end: int, image_size: ImageSize) -> tuple[Pixels, Pixels]:
    """Images (N, 3, H, W) and masks (N, H, W); read-only, as several data modules share them."""
    images, masks = (
        np.stack(part) for part in zip(*(draw_scene(n, image_size) for n in range(first, end)), strict=True)
    )
    images.flags.writeable = masks.flags.writeable = False
    return images, masks


def _scenes(
    which: int, run: tuple[int, int, ImageSize], positions: NDArray[np.int64] | None = None, cropped: bool = True
) -> Pixels:
    return _drawn(*run)[which][slice(None) if positions is None else positions]


def _scene_hashes(numbers: list[int]) -> Hashes:
    return as_hashes(content_hash(f"shape_scenes {_SCENES_VERSION} {_SEED} {number}".encode()) for number in numbers)


def _scene_split(stem: str, positions: NDArray[np.intp], image_size: ImageSize) -> MaskSplit:
    numbers: list[int] = positions.tolist()
    run = (numbers[0], numbers[-1] + 1, image_size)
    paths, labels = [f"shape_scenes/{number:04d}" for number in numbers], np.zeros(len(numbers), dtype=np.int64)
    images, masks, contents = partial(_scenes, 0, run), partial(_scenes, 1, run), partial(_scene_hashes, numbers)
    return MaskSplit(f"shape_scenes/{stem}", paths, labels, images, contents, masks=masks, mask_contents=contents)


def draw_scene(number: int, image_size: ImageSize) -> tuple[Pixels, Pixels]:
    """Draws the image, uint8 (3, height, width), and the mask that a number ≥ 0 alone decides."""
    random = np.random.default_rng([_SEED, number])
    image = _background(random, image_size)
    height, width = sides(image_size)
    mask = np.zeros((height, width), dtype=np.uint8)
    for _ in range(random.integers(2, 5)):
        kind = int(random.integers(1, len(SCENE_CLASSES)))
        outline = _scene_outline(SCENE_CLASSES[kind], random.uniform(0, 2 * math.pi))
        across = np.array([width, height])
        outline = outline * random.uniform(0.14, 0.24) * (min(height, width) / across)
        outline = (outline + random.uniform(0.16, 0.84, size=2)) * across
        colour, cover = random.uniform(0, 255, size=3), _filled(outline * _OVERSAMPLING, image_size) / 255
        image += cover[..., None] * (colour - image)
        mask[cover >= 0.5] = kind
    image += random.normal(0, 6, size=image.shape)
    return np.rint(image.clip(0, 255)).astype(np.uint8).transpose(2, 0, 1), mask


def _background(random: np.random.Generator, image_size: ImageSize) -> NDArray[np.float64]:
    """Two colours mixed by three gratings of random direction and width, (height, width, 3)."""
    height, width = sides(image_size)
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    share = np.zeros_like(rows)
    for _ in range(3):
        angle, phase = random.uniform(0, 2 * math.pi, size=2)
        waves = random.uniform(2, 9)
        share += np.sin(2 * math.pi * waves * (math.cos(angle) * columns + math.sin(angle) * rows) + phase) / 6
    one, other = random.uniform(30, 225, size=(2, 3))
    mixed: NDArray[np.float64] = one + (share + 0.5)[..., None] * (other - one)
    return mixed


def _scene_outline(name: str, turn: float) -> NDArray[np.float64]:
    """Corners (V, 2) of a shape within the unit circle."""
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angle = turn + 2 * math.pi * np.arange(corners) / corners
    radius = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == "star" else np.ones(corners)
    points: NDArray[np.float64] = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points


class DigitsDataModule(ImageDataModule):
    """The 1,797 handwritten digits of scikit-learn as a VTAB-style task: 800 / 200 / 797, stratified.

    The originals have 8×8 pixels and 17 grey levels; the preset enlarges them (``"square"``: PIL's bicubic).
    """

    @checked
    def __init__(
        self,
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "square",
        image_size: int | list[int] = 64,
        **options: Any,
    ) -> None:
        """Loads and splits the digits.

        Args:
            train: ``"train800"`` or ``"train800val200"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing.
            image_size: Pixels of the images, or [height, width].
            **options: See :class:`ImageDataModule`.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels = digits.target.astype(np.int64)
        chosen = get_preset(preset)

        def split(stem: str, positions: NDArray[np.intp]) -> Split:
            pixels = partial(_enlarge, grey[positions], chosen, as_size(image_size))
            return generated_split("digits", stem, positions, labels[positions], grey[positions], pixels)

        splits = chosen_splits(_stratified(labels), {"train": train, "val": val, "test": test}, split)
        names = [str(digit) for digit in range(10)]
        super().__init__("digits", names, splits, preset, image_size, card=load_card("digits"), **options)


def _stratified(labels: NDArray[np.int64]) -> Mapping[str, NDArray[np.intp]]:
    """Splits 1,797 digits into 800 / 200 / 797 with equal shares of each class."""
    from sklearn.model_selection import train_test_split

    everything = np.arange(len(labels), dtype=np.intp)
    fitted, test = train_test_split(everything, train_size=1000, stratify=labels, random_state=_SPLIT_SEED)
    train, val = train_test_split(fitted, train_size=800, stratify=labels[fitted], random_state=_SPLIT_SEED)
    return {"train800": train, "val200": val, "train800val200": np.concatenate([train, val]), "test": test}


def _enlarge(
    grey: NDArray[np.uint8],
    preset: Preset,
    image_size: ImageSize,
    positions: NDArray[np.int64] | None = None,
    cropped: bool = True,
) -> NDArray[np.uint8]:
    """Takes uint8 (N, H, W) to uint8 (M, 3, height, width) by a preset, or to what its crop is cut from."""
    resize = preset if cropped else preset.scale
    chosen = grey if positions is None else grey[positions]
    images = [resize(Image.fromarray(image).convert("RGB"), image_size) for image in chosen]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
