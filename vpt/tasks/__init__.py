"""LightningModules over one base."""

from vpt.tasks.base import ClassificationTask
from vpt.tasks.callbacks import DeltaWriter, RunRecord
from vpt.tasks.classification import FineTuning, LinearProbe, PromptTuning

__all__ = ["ClassificationTask", "DeltaWriter", "FineTuning", "LinearProbe", "PromptTuning", "RunRecord"]
