"""How a task computes features and logits: what stays the same of an image is kept, the rest perhaps with others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import lightning as L
from torch import Tensor

from vpt.backbones import Backbone
from vpt.models.classifier import AdaptedModel
from vpt.models.feature_cache import FeatureCache
from vpt.models.together import Encoded, Member
from vpt.tasks.parallel import is_sharded

Batch = dict[str, Tensor]


def feature_cache(
    backbone: Backbone, data: Any, compute: Callable[[Tensor], Tensor], place: tuple[Hashable, ...]
) -> FeatureCache:
    """An empty cache of what `compute` makes of a data module's images, or that of an equal task in this process.

    `place` is all that it depends on besides: where it is cut, and in which precision and on which device it computes.
    """
    described = data.describe() if (known := getattr(data, "hashed", True)) else data.outline()
    images = (described.get("fingerprint"), described["preset"], str(described.get("channels")))
    constants = (backbone.fingerprint, str(backbone.normalization), *images, data.image_size, *place)
    return FeatureCache(compute, constants if known else None)


class FeatureTask(L.LightningModule):
    """A LightningModule that computes with an `AdaptedModel`.

    Attributes:
        model: What it computes with.
        together: With whom, where several tasks train together (`vpt.models.together`); None for none.
    """

    model: AdaptedModel
    together: Member | None = None
    _kept: tuple[Any, FeatureCache] | None = None

    def features(self, batch: Batch, split: str) -> Tensor:
        """What the head reads of a batch of ``train``, ``val`` or ``test``: (B, num_features, ...)."""
        return self._encoded(batch, split)()

    def _encoded(self, batch: Batch, split: str) -> Encoded:
        """The features, not computed yet but for what lies before the first trained parameter.

        That is computed once for each training and validation image and kept, where images are a constant of their
        index and the backbone is in no shares.
        """
        data, halves = getattr(self.trainer, "datamodule", None), self.model.constant_part()
        augmented = getattr(data, "augmented", True) or "target" in batch  # mixed with others
        if halves is None or split == "test" or data is None or augmented or is_sharded(self.trainer):
            return Encoded(self.model.encode, batch["image"])
        cut = (self.model.format, self.model.constant_blocks(), self.model.backbone.trim)
        place = (*cut, str(self.trainer.precision), str(self.device), bool(self.hparams["compile"]))
        if self._kept is None or self._kept[0] != (data, place):  # other data or precision, another cut
            self._kept = (data, place), feature_cache(self.model.backbone, data, halves[0], place)
        kept = self._kept[1](split, len(data.split(split)), batch["index"], batch["image"])
        return Encoded(halves[1], kept, place)

    def logits(self, batch: Batch, split: str) -> Tensor:
        """Logits, (B, num_classes, ...), of a batch of ``train``, ``val`` or ``test``."""
        encoded = self._encoded(batch, split)
        if self.together is None or not self.joins():
            return self.model.classify(encoded())
        return self.together.logits(self.model, encoded)

    def joins(self) -> bool:
        """Whether its logits may be computed at once with those of others (`vpt.models.together`)."""
        alone = self.trainer.world_size == 1 and not is_sharded(self.trainer)
        whole = alone and not self.hparams["micro_batch"] and not self.hparams["compile"]
        state = () if self.model.delta is None else self.model.delta.state_dict(keep_vars=True)
        # What is no tensor of its own, as where prompts stand that move, has no dimension for several models.
        return whole and not self.model.backbone.tuned and not any(name.endswith("_extra_state") for name in state)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Passes gradients on to what is trained, also where the logits were computed with those of others."""
        super().backward(loss, *args, **kwargs)
        if self.together is not None:
            self.together.backward()
