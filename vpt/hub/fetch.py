"""A delta file from the hub."""

from __future__ import annotations

import re
from pathlib import Path

from vpt.errors import HubError
from vpt.hub.errors import one_sentence
from vpt.tuning.files import DELTA_FILE

PREFIX = "hf://"
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(address: str, endpoint: str | None = None) -> Path:
    """Downloads the delta file of a model, once: it is kept in the hub's cache.

    Args:
        address: ``hf://user/name`` or ``hf://user/name@revision``.
        endpoint: URL of the hub; None for ``HF_ENDPOINT``, or the public one.

    Returns:
        The file on this machine.

    Raises:
        HubError: The address is none, the hub cannot be reached, or it has no such model, revision or file.
    """
    repo, _, revision = address.removeprefix(PREFIX).partition("@")
    if not REPO.fullmatch(repo) or address.endswith("@"):
        raise HubError(f"{address} is no address on the hub: write hf://user/name or hf://user/name@revision.")
    from huggingface_hub import hf_hub_download

    with one_sentence(repo, revision, DELTA_FILE):
        found = hf_hub_download(repo, DELTA_FILE, revision=revision or None, endpoint=endpoint)
    return Path(str(found))
