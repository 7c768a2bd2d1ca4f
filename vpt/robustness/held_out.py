"""Validation images that may choose something: those that no model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vpt.data import ImageDataModule

VAL = "val"


def why_not(infos: Sequence[Mapping[str, Any]], data: ImageDataModule) -> str | None:
    """Says why the validation split cannot choose between models.

    Args:
        infos: What each model says about its training (`TunedModel.info`).
        data: Whose validation split is meant.

    Returns:
        A reason; None if the images were not trained on.
    """
    described = data.describe()
    n = described["counts"].get(VAL, 0)
    if n == 0:
        return f"{data.name} has no validation images."
    said = [(info.get("data") or {}).get("shared_with_train", {}).get(VAL, 0) for info in infos]
    if shared := max(described["shared_with_train"].get(VAL, 0), *said):
        return f"{shared} of its {n} images were trained on; train on train800 to keep them apart."
    return None
