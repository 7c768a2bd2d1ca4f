"""Scikit-learn's handwritten digits, a task that needs no download.

Its splits are part of the task and do not depend on the seed of the run, which only orders the training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.data.catalog.cards import load_card
from vpt.data.datamodule import ImageDataModule
from vpt.data.splits import Split, chosen_splits, generated_split
from vpt.data.transforms import Preset, get_preset

_SPLIT_SEED = 0


class DigitsDataModule(ImageDataModule):
    """The 1,797 handwritten digits of scikit-learn as a VTAB-style task: 800 / 200 / 797, stratified.

    The originals have 8×8 pixels and 17 grey levels; the preset enlarges them (``"square"``: PIL's bicubic).
    """

    def __init__(
        self,
        train: str = "train800val200",
        val: str = "val200",
        test: str = "test",
        preset: str = "square",
        image_size: int = 64,
        **options: Any,
    ) -> None:
        """Loads and splits the digits.

        Args:
            train: ``"train800"`` or ``"train800val200"``.
            val: List to validate on.
            test: List to test on.
            preset: Name of the preprocessing.
            image_size: Side of the square images in pixels.
            **options: See :class:`ImageDataModule`. The splits do not depend on its seed.

        Raises:
            UnknownNameError: A list, preset or augmentation is unknown.
            ConfigError: A number is out of range.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels = digits.target.astype(np.int64)
        chosen = get_preset(preset)

        def split(stem: str, positions: NDArray[np.intp]) -> Split:
            pixels = partial(_enlarge, grey[positions], chosen, image_size)
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
    image_size: int,
    positions: NDArray[np.int64] | None = None,
    cropped: bool = True,
) -> NDArray[np.uint8]:
    """Takes uint8 (N, H, W) to uint8 (M, 3, image_size, image_size) by a preset, or to what its crop is cut from."""
    resize = preset if cropped else preset.scale
    chosen = grey if positions is None else grey[positions]
    images = [resize(Image.fromarray(image).convert("RGB"), image_size) for image in chosen]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
