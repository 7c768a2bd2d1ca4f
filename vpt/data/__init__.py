"""Images on disk to uint8 batches. Knows no model.

The names below are imported when one is first used: who only decodes images does not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `X as X` because they are for others
    from vpt.data.datamodule import ImageDataModule as ImageDataModule
    from vpt.data.datasets.demo import DigitsDataModule as DigitsDataModule
    from vpt.data.datasets.demo import ShapeScenesDataModule as ShapeScenesDataModule
    from vpt.data.datasets.demo import ShapesDataModule as ShapesDataModule
    from vpt.data.datasets.fgvc import FGVCDataModule as FGVCDataModule
    from vpt.data.datasets.folder import FolderDataModule as FolderDataModule
    from vpt.data.datasets.imagenet import ImageNetDataModule as ImageNetDataModule
    from vpt.data.datasets.pets import PetTrimapsDataModule as PetTrimapsDataModule
    from vpt.data.datasets.published_files import default_root as default_root
    from vpt.data.datasets.shape_texture import ShapeTextureDataModule as ShapeTextureDataModule
    from vpt.data.datasets.vtab import VTABDataModule as VTABDataModule
    from vpt.data.image_dataset import ImageDataset as ImageDataset
    from vpt.data.images import ImageList as ImageList
    from vpt.data.masks import MaskDataModule as MaskDataModule
    from vpt.data.masks import MaskDataset as MaskDataset
    from vpt.data.transforms import PRESETS as PRESETS
    from vpt.data.transforms import Preset as Preset

_HOMES = {
    name: module
    for module, names in {
        "vpt.data.datamodule": (
            "ImageDataModule",
            "ImageDataset",
        ),
        "vpt.data.datasets.demo": (
            "DigitsDataModule",
            "ShapeScenesDataModule",
            "ShapesDataModule",
        ),
        "vpt.data.datasets.fgvc": ("FGVCDataModule",),
        "vpt.data.datasets.folder": ("FolderDataModule",),
        "vpt.data.datasets.imagenet": ("ImageNetDataModule",),
        "vpt.data.datasets.pets": ("PetTrimapsDataModule",),
        "vpt.data.datasets.published_files": ("default_root",),
        "vpt.data.datasets.shape_texture": ("ShapeTextureDataModule",),
        "vpt.data.datasets.vtab": ("VTABDataModule",),
        "vpt.data.images": ("ImageList",),
        "vpt.data.masks": (
            "MaskDataModule",
            "MaskDataset",
        ),
        "vpt.data.transforms": (
            "PRESETS",
            "Preset",
        ),
    }.items()
    for name in names
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Imports all public names when the first is used (PEP 562): a config names data modules by their class."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt.data' has no attribute {name!r}")
    globals().update({each: getattr(import_module(home), each) for each, home in _HOMES.items()})
    return globals()[name]
