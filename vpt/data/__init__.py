"""Images on disk to uint8 batches. Knows no model."""

from vpt.data.datamodule import ImageDataModule, ImageDataset
from vpt.data.datasets.demo import DigitsDataModule, ShapeScenesDataModule, ShapesDataModule
from vpt.data.datasets.fgvc import FGVCDataModule
from vpt.data.datasets.folder import FolderDataModule
from vpt.data.datasets.imagenet import ImageNetDataModule
from vpt.data.datasets.pets import PetTrimapsDataModule
from vpt.data.datasets.published_files import default_root
from vpt.data.datasets.shape_texture import ShapeTextureDataModule
from vpt.data.datasets.vtab import VTABDataModule
from vpt.data.images import ImageList
from vpt.data.masks import MaskDataModule, MaskDataset
from vpt.data.transforms import PRESETS, Preset

__all__ = [
    "PRESETS",
    "DigitsDataModule",
    "FGVCDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "ImageDataset",
    "ImageList",
    "ImageNetDataModule",
    "MaskDataModule",
    "MaskDataset",
    "PetTrimapsDataModule",
    "Preset",
    "ShapeScenesDataModule",
    "ShapeTextureDataModule",
    "ShapesDataModule",
    "VTABDataModule",
    "default_root",
]
