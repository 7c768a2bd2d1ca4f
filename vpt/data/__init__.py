"""Images on disk to uint8 batches. Knows no model."""

from vpt.data.demo import DigitsDataModule, ShapesDataModule
from vpt.data.folder import FolderDataModule
from vpt.data.images import ImageList
from vpt.data.module import ImageDataModule, ImageDataset
from vpt.data.presets import PRESETS, Preset
from vpt.data.vtab import VTABDataModule, default_root

__all__ = [
    "PRESETS",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "ImageDataset",
    "ImageList",
    "Preset",
    "ShapesDataModule",
    "VTABDataModule",
    "default_root",
]
