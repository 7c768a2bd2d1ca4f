"""Segmentation: a class for every pixel, from the patches of a frozen, a tuned or a trained backbone.

P-Tuning v2 (Liu et al., ACL 2022) calls labelling every token the hard task for prompts; this is its image counterpart.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from vpt.backbones import Backbone
from vpt.data import ImageDataModule, MaskDataModule
from vpt.data.masks import IGNORED
from vpt.errors import ConfigError
from vpt.models.segmenter import DenseModel, enlarge
from vpt.tasks.base import Batch, TuningTask
from vpt.tasks.parallel import Weighed


class SegmentationTask(TuningTask):
    """A head on the map of patches; frozen backbone, any deltas on it, or full fine-tuning.

    Metrics are logged as ``train/loss``, ``{val,test}/loss``, ``{val,test}/miou`` (intersections and unions counted
    over the whole set; its mean over the classes that occur in masks or predictions), ``{val,test}/pixel_acc``,
    ``{val,test}/n`` (images that were measured) and, in tests, ``test/iou/<class>``. A batch is a dict of ``image``
    uint8 (B, 3, H, W), ``mask`` uint8 or int64 (B, H, W) and ``index`` int64 (B,).
    """

    target = "mask"
    ignored = IGNORED
    model: DenseModel

    def __init__(
        self,
        deltas: list[dict[str, Any]] | None = None,
        full: bool = False,
        head: Literal["linear", "conv"] = "linear",
        head_width: int = 128,
        **task: Any,
    ) -> None:
        """Builds the task.

        Args:
            deltas: Deltas on the frozen backbone, as for `DeltaTuning`: one dict per delta, with its ``name`` in
                `vpt.deltas.DELTAS` and its arguments. None or empty for the head alone.
            full: Every parameter of the backbone trains, instead of deltas.
            head: ``linear``, or ``conv``: a 3×3 convolution, GELU, and then the linear layer.
            head_width: Channels between the two layers of ``conv``.
            **task: See `TuningTask`.

        Raises:
            ConfigError: Both deltas and full are given, or a delta acts on pooled features alone.
            UnsupportedBackboneError: The backbone is neither a ViT nor a Swin.
        """
        if full and deltas:
            raise ConfigError("full trains the whole backbone, on which no delta is left to tune: drop one of both.")
        self._specs = deltas or []
        self._head = {"kind": head, "width": head_width}
        super().__init__(**task)
        if full:
            self.model.backbone.unfreeze()
        self.counts = nn.ModuleDict({"val": SumMetric(), "test": SumMetric()})

    def _build(self, backbone: Backbone, num_classes: int) -> DenseModel:
        return DenseModel(backbone, num_classes, self.specs(), **cast("dict[str, Any]", self._head))

    def _metrics(self, num_classes: int) -> dict[str, Metric | MetricCollection]:
        return {
            "miou": MulticlassJaccardIndex(num_classes, ignore_index=IGNORED),
            "pixel_acc": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
        }

    def setup(self, stage: str) -> None:
        """Also checks that the data have masks, by a ConfigError; all else as the base."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule) and not isinstance(data, MaskDataModule):
            raise ConfigError(
                f"The data {data.name!r} have labels and no masks: segmentation takes a data module of masks, such as "
                "ShapeScenesDataModule or PetTrimapsDataModule."
            )
        super().setup(stage)

    def logits(self, batch: Batch, split: str) -> Tensor:
        """Logits, (B, num_classes, H, W), of a batch of ``train``, ``val`` or ``test`` at the size of its masks."""
        height, width = batch["mask"].shape[-2:]
        return enlarge(super().logits(batch, split), (height, width))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy, a scalar, of (B, num_classes, H, W) over the pixels that count; 0 where none does."""
        mask = batch["mask"].long()
        summed = nn.functional.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="sum")
        return summed / (mask != IGNORED).sum().clamp(min=1)

    def training_losses(self, batch: Batch) -> list[Weighed]:
        """`loss`, which is a mean over pixels."""
        return [(self.loss(self._in_parts(batch), batch), (batch["mask"] != IGNORED).sum())]

    def _evaluate(self, batch: Batch, split: str, metrics: MetricCollection) -> Tensor:
        count = cast("SumMetric", self.counts[split])
        count.update(len(batch["mask"]))
        self.log(f"{self._shown[split]}/n", count, on_step=False, on_epoch=True)
        return super()._evaluate(batch, split, metrics)

    def on_test_epoch_end(self) -> None:
        """Logs the IoU of each class that occurs in masks or predictions."""
        matrix = self.tally.compute()
        hits = matrix.diagonal()
        union = matrix.sum(dim=0) + matrix.sum(dim=1) - hits
        for name, hit, size in zip(self.model.class_names, hits, union, strict=True):
            if size > 0:
                self.log(f"test/iou/{name}", hit / size)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Predicts a batch, which needs no masks: ``index`` (B,) and ``mask`` uint8 (B, H, W), the classes."""
        logits = self._finite_logits(self(batch["image"]), "test")
        return {"index": batch["index"], "mask": logits.argmax(dim=1).to(torch.uint8)}
