"""LightningModules over one base."""

from vpt.tasks.base import ClassificationTask
from vpt.tasks.callbacks import DeltaWriter, InitWriter, RunRecord
from vpt.tasks.classification import DeltaTuning, FineTuning, LinearProbe, PromptTuning

__all__ = [
    "ClassificationTask",
    "DeltaTuning",
    "DeltaWriter",
    "FineTuning",
    "InitWriter",
    "LinearProbe",
    "PromptTuning",
    "RunRecord",
]
