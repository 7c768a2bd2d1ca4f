"""A classifier that asks its training images: the votes of the k nearest of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vpt.argument_types import checked
from vpt.backbones.factory import Backbone
from vpt.deltas.registry import Specs
from vpt.errors import ConfigError, check_number
from vpt.models.classifier import TunedModel
from vpt.models.closed_form import finite_rows

K, TEMPERATURE = 20, 0.07
"""Of Caron et al., ICCV 2021."""
NO_VOTE = 1e-6
"""What a class without a vote has of all votes: its logit is finite, and the shares of others stay what they are."""
_ROWS = 256  # images that are compared with all that are kept at a time


class NeighbourHead(nn.Module):
    """Votes of the k nearest images that it keeps, by cosine similarity s, weighted by exp(s / temperature).

    Wu et al., CVPR 2018, section 3.4; Caron et al., ICCV 2021, section 4.1. The logit of a class is the logarithm of
    its votes, so that softmax gives the shares of the votes; a class without one has `NO_VOTE` of all.

    Attributes:
        features: Of the images that it keeps, (N, dim), each of length 1.
        labels: Their classes, int64 (N,).
    """

    features: Tensor
    labels: Tensor

    def __init__(self, dim: int, num_classes: int, images: int, k: int, temperature: float, **kind: Any) -> None:
        """Keeps so many images of no class yet; of fewer than `k`, all vote. The last are as of a tensor's making."""
        super().__init__()
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.register_buffer("features", torch.zeros(images, dim, **kind))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64, device=kind.get("device")))

    def keep(self, features: Tensor, labels: Tensor, k: int) -> None:
        """Keeps other images, features (N, dim) and labels (N,); the errors are those of `finite_rows`."""
        rows, classes = finite_rows(features, labels, self.num_classes)
        self.features, self.labels = normalize(rows, dim=-1).to(self.features), classes.to(self.labels)
        self.k = k

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (..., num_classes), of features (..., dim); all 0 where no images are kept yet."""
        if not len(self.labels):
            return features.new_zeros(*features.shape[:-1], self.num_classes)
        kind = features.device.type
        # Half precision would change which are near; asked only where it is on, as exporters know no such context.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            own = normalize(features.to(self.features.dtype), dim=-1)
            near, index = (own @ self.features.T).topk(min(self.k, len(self.labels)), dim=-1)
            scaled = near.float() / self.temperature if near.dtype.itemsize < 4 else near / self.temperature
            largest = scaled[..., :1]
            weights = (scaled - largest).exp()
            classes = torch.arange(self.num_classes, device=index.device)
            votes = ((self.labels[index].unsqueeze(-1) == classes) * weights.unsqueeze(-1)).sum(dim=-2)
            logits = (votes + NO_VOTE * weights.sum(dim=-1, keepdim=True)).log() + largest
        return logits.to(features.dtype)


class NeighbourModel(TunedModel):
    """A `TunedModel` whose head is a `NeighbourHead`. Its strength moves the delta alone: it has no anchor."""

    head: Any

    @checked
    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        specs: Specs = (),
        class_names: Sequence[str] | None = None,
        preset: dict[str, Any] | None = None,
        kind: Literal["knn"] = "knn",
        images: int = 0,
        k: int = K,
        temperature: float = TEMPERATURE,
    ) -> None:
        """Makes the model as `TunedModel` does, with room for so many training images.

        `kind` is the one kind of head, as in a delta file; `k` is at least 1, and the temperature from 0.001 to 100. A
        ConfigError where they are not.
        """
        check_number("images", images, 0, whole=True)
        check_neighbours(k, temperature)
        self._options = images, k, float(temperature)  # before the head is drawn
        super().__init__(backbone, num_classes, specs, class_names, preset)

    def _draw_head(self, num_classes: int) -> Any:
        like, (images, k, temperature) = self.backbone.mean, self._options
        place = {"dtype": like.dtype, "device": like.device}
        return NeighbourHead(self.backbone.num_features, num_classes, images, k, temperature, **place)

    def file_header(self) -> dict[str, Any]:
        """What the head is: kind, number of images, k and temperature."""
        told = {"images": len(self.head.labels), "k": self.head.k, "temperature": self.head.temperature}
        return {"head": {"kind": "knn", **told}}

    def set_anchor(self, head: nn.Linear) -> None:
        """Refuses, by a ConfigError: votes are not interpolated."""
        raise ConfigError("Nearest neighbours have no weights to interpolate with an anchor's: leave out the anchor.")


def check_neighbours(k: int, temperature: float) -> None:
    """Refuses, by a ConfigError, a number of neighbours below 1 and a temperature outside of [0.001, 100]."""
    check_number("k", k, 1, whole=True)
    check_number("temperature", temperature, 0.001, 100)


def choose_k(head: NeighbourHead, val: tuple[Tensor, Tensor], candidates: Sequence[int]) -> int:
    """Picks the number of neighbours that classifies validation images best; ties go to the larger one.

    The head keeps images that are none of these, whose features (N, dim) and labels (N,) are `val`; its own `k` is the
    one that was tried last.
    """
    scores = {}
    for k in sorted(candidates, reverse=True):
        head.k = k
        parts = zip(*(torch.split(column, _ROWS) for column in val), strict=True)
        scores[k] = sum(int((head(features).argmax(dim=-1) == labels).sum()) for features, labels in parts)
    return max(scores, key=scores.__getitem__)
