"""LightningModules over one base."""

from vpt.tasks.base import TuningTask
from vpt.tasks.callbacks import DeltaWriter, InitWriter, RunRecord
from vpt.tasks.classification import ClassificationTask, DeltaTuning, FineTuning, PromptTuning
from vpt.tasks.probes import LinearProbe, NearestNeighbours
from vpt.tasks.segmentation import SegmentationTask

__all__ = [
    "ClassificationTask",
    "DeltaTuning",
    "DeltaWriter",
    "FineTuning",
    "InitWriter",
    "LinearProbe",
    "NearestNeighbours",
    "PromptTuning",
    "RunRecord",
    "SegmentationTask",
    "TuningTask",
]
