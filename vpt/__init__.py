"""Visual prompt tuning of pretrained vision transformers, and how far to trust the result.

The names below are imported when they are first used, so that ``import vpt`` and ``vpt --help`` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vpt.errors import VPTError
from vpt.version import __version__

if TYPE_CHECKING:
    from vpt.backbones import Backbone, create_backbone, pretrained_head
    from vpt.data import (
        DigitsDataModule,
        FGVCDataModule,
        FolderDataModule,
        ImageDataModule,
        ImageNetDataModule,
        PetTrimapsDataModule,
        ShapeScenesDataModule,
        ShapesDataModule,
        ShapeTextureDataModule,
        VTABDataModule,
    )
    from vpt.deltas import attach
    from vpt.hub.client import load
    from vpt.models.delta_file import load_segmentation, save_delta
    from vpt.models.prompt_bank import PromptBank
    from vpt.tasks import DeltaTuning, FineTuning, LinearProbe, PromptTuning, SegmentationTask

__all__ = [
    "Backbone",
    "DeltaTuning",
    "DigitsDataModule",
    "FGVCDataModule",
    "FineTuning",
    "FolderDataModule",
    "ImageDataModule",
    "ImageNetDataModule",
    "LinearProbe",
    "PetTrimapsDataModule",
    "PromptBank",
    "PromptTuning",
    "SegmentationTask",
    "ShapeScenesDataModule",
    "ShapeTextureDataModule",
    "ShapesDataModule",
    "VPTError",
    "VTABDataModule",
    "__version__",
    "attach",
    "create_backbone",
    "load",
    "load_segmentation",
    "pretrained_head",
    "save_delta",
]

_HOMES = {
    "Backbone": "vpt.backbones",
    "DeltaTuning": "vpt.tasks",
    "DigitsDataModule": "vpt.data",
    "FGVCDataModule": "vpt.data",
    "FineTuning": "vpt.tasks",
    "FolderDataModule": "vpt.data",
    "ImageDataModule": "vpt.data",
    "ImageNetDataModule": "vpt.data",
    "LinearProbe": "vpt.tasks",
    "PetTrimapsDataModule": "vpt.data",
    "PromptBank": "vpt.models.prompt_bank",
    "PromptTuning": "vpt.tasks",
    "SegmentationTask": "vpt.tasks",
    "ShapeScenesDataModule": "vpt.data",
    "ShapeTextureDataModule": "vpt.data",
    "ShapesDataModule": "vpt.data",
    "VTABDataModule": "vpt.data",
    "attach": "vpt.deltas",
    "create_backbone": "vpt.backbones",
    "load": "vpt.hub.client",
    "load_segmentation": "vpt.models.delta_file",
    "pretrained_head": "vpt.backbones",
    "save_delta": "vpt.models.delta_file",
}


def __getattr__(name: str) -> object:
    """Imports a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return sorted(__all__)
