"""LightningModules over one base."""

from vpt.tasks.base import ClassificationTask
from vpt.tasks.callbacks import DeltaWriter, RunRecord
from vpt.tasks.classification import DeltaTuning, FineTuning, LinearProbe, PromptTuning

__all__ = ["ClassificationTask", "DeltaTuning", "DeltaWriter", "FineTuning", "LinearProbe", "PromptTuning", "RunRecord"]
