"""Delta files on the Hugging Face Hub, and models from there or from this machine."""

from __future__ import annotations

from pathlib import Path

from vpt.hub.fetch import PREFIX, fetch
from vpt.hub.push import push
from vpt.tuning.files import load as load_file
from vpt.tuning.model import TunedModel

__all__ = ["fetch", "load", "push"]


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
    return load_file(fetch(str(path)) if str(path).startswith(PREFIX) else path, weights)
