"""Images on disk to uint8 batches. Knows no model."""

from vpt.data.demo import DigitsDataModule, ShapesDataModule
from vpt.data.fgvc import FGVCDataModule
from vpt.data.folder import FolderDataModule
from vpt.data.imagenet import ImageNetDataModule
from vpt.data.images import ImageList
from vpt.data.masks import MaskDataModule, MaskDataset
from vpt.data.module import ImageDataModule, ImageDataset
from vpt.data.pets import PetTrimapsDataModule
from vpt.data.presets import PRESETS, Preset
from vpt.data.scenes import ShapeScenesDataModule
from vpt.data.shape_texture import ShapeTextureDataModule
from vpt.data.vtab import VTABDataModule, default_root

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
