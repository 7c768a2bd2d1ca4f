"""Visual prompt tuning of pretrained vision transformers, and how far to trust the result.

The names below are imported when they are first used, so that ``import vpt`` and ``vpt --help`` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vpt.errors import VPTError as VPTError
from vpt.version import __version__ as __version__

if TYPE_CHECKING:  # so that type checkers and editors know them, `X as X` because they are for others
    from vpt.backbones import Backbone as Backbone
    from vpt.backbones import create_backbone as create_backbone
    from vpt.backbones import pretrained_head as pretrained_head
    from vpt.data import DigitsDataModule as DigitsDataModule
    from vpt.data import FGVCDataModule as FGVCDataModule
    from vpt.data import FolderDataModule as FolderDataModule
    from vpt.data import ImageDataModule as ImageDataModule
    from vpt.data import ImageNetDataModule as ImageNetDataModule
    from vpt.data import PetTrimapsDataModule as PetTrimapsDataModule
    from vpt.data import ShapeScenesDataModule as ShapeScenesDataModule
    from vpt.data import ShapesDataModule as ShapesDataModule
    from vpt.data import ShapeTextureDataModule as ShapeTextureDataModule
    from vpt.data import VTABDataModule as VTABDataModule
    from vpt.deltas import attach as attach
    from vpt.hub.client import load as load
    from vpt.hub.client import load_segmentation as load_segmentation
    from vpt.models.delta_file import save_delta as save_delta
    from vpt.models.prompt_bank import PromptBank as PromptBank
    from vpt.tasks import DeltaTuning as DeltaTuning
    from vpt.tasks import FineTuning as FineTuning
    from vpt.tasks import LinearProbe as LinearProbe
    from vpt.tasks import NearestNeighbours as NearestNeighbours
    from vpt.tasks import PromptTuning as PromptTuning
    from vpt.tasks import SegmentationTask as SegmentationTask

_HOMES = {
    name: module
    for module, names in {
        "vpt.backbones": ("Backbone", "create_backbone", "pretrained_head"),
        "vpt.data": (
            "DigitsDataModule",
            "FGVCDataModule",
            "FolderDataModule",
            "ImageDataModule",
            "ImageNetDataModule",
            "PetTrimapsDataModule",
            "ShapeScenesDataModule",
            "ShapeTextureDataModule",
            "ShapesDataModule",
            "VTABDataModule",
        ),
        "vpt.deltas": ("attach",),
        "vpt.hub.client": ("load", "load_segmentation"),
        "vpt.models.delta_file": ("save_delta",),
        "vpt.models.prompt_bank": ("PromptBank",),
        "vpt.tasks": (
            "DeltaTuning",
            "FineTuning",
            "LinearProbe",
            "NearestNeighbours",
            "PromptTuning",
            "SegmentationTask",
        ),
    }.items()
    for name in names
}
__all__ = sorted([*_HOMES, "VPTError", "__version__"])


def __getattr__(name: str) -> object:
    """Imports a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return __all__
