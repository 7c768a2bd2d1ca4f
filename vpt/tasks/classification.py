"""The three ways to adapt a backbone to a classification task that everything else is compared with."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vpt.tasks.base import Batch, ClassificationTask
from vpt.tuning.features import FeatureCache


class PromptTuning(ClassificationTask):
    """Visual prompt tuning (Jia et al., ECCV 2022): prompts and a linear head on a frozen backbone."""

    def __init__(
        self,
        num_tokens: int = 10,
        deep: bool = True,
        dropout: float = 0.0,
        dropout_mode: Literal["sample", "shared", "key_value", "prompt"] = "sample",
        **task: Any,
    ) -> None:
        """Builds the task.

        Args:
            num_tokens: Prompts per layer.
            deep: Prompts before every block (VPT-deep) or only before the first (VPT-shallow).
            dropout: Of the prompts, in [0, 1).
            dropout_mode: What is dropped: see `vpt.tuning.prompts.Prompt`.
            **task: See `ClassificationTask`.
        """
        self._prompt = {
            "name": "prompt",
            "num_tokens": num_tokens,
            "deep": deep,
            "dropout": dropout,
            "dropout_mode": dropout_mode,
        }
        super().__init__(**task)

    def specs(self) -> list[dict[str, Any]]:
        """One prompt delta."""
        return [self._prompt]


class LinearProbe(ClassificationTask):
    """A linear head on the pooled features of a frozen backbone.

    Without augmentation each image passes the backbone once; later epochs read its features from memory.
    """

    def __init__(self, **task: Any) -> None:
        """Builds the task.

        Args:
            **task: See `ClassificationTask`.
        """
        super().__init__(**task)
        self._features = FeatureCache(self.model.backbone)

    def logits(self, batch: Batch, split: str) -> Tensor:
        """Logits from kept features where the data is a constant of its index.

        Args:
            batch: A batch.
            split: ``train``, ``val`` or ``test``.

        Returns:
            (B, num_classes).
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or getattr(data, "augmented", True):
            return super().logits(batch, split)
        return self.model.classify(self._features(split, batch["index"], batch["image"]))


class FineTuning(ClassificationTask):
    """Full fine-tuning: every parameter of the backbone trains, dropout and drop path as timm sets them."""

    def __init__(self, **task: Any) -> None:
        """Builds the task.

        Args:
            **task: See `ClassificationTask`.
        """
        super().__init__(**task)
        self.model.backbone.unfreeze()
