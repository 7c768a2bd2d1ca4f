"""Models from delta files, on this machine or on the hub."""

from __future__ import annotations

from pathlib import Path

from vpt.hub.fetch import PREFIX, fetch
from vpt.tuning import files
from vpt.tuning.model import TunedModel


def load(path: str | Path, weights: str | None = None) -> TunedModel:
    """Rebuilds a model from a delta file.

    Args:
        path: A delta file, or the address of one on the hub, ``hf://user/name`` or ``hf://user/name@revision``, of
            which nothing but the delta file is downloaded.
        weights: Where the backbone's weights are on this machine; None for where they were at training time.

    Returns:
        The model in eval mode, all parameters frozen.

    Raises:
        DeltaFileError: The file is not a delta file, is incomplete, or belongs to other backbone weights.
        HubError: The hub cannot be reached, or has no such file.
        WeightsError: The backbone's weights cannot be found.
    """
    return files.load(fetch(str(path)) if str(path).startswith(PREFIX) else path, weights)
