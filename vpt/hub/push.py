"""A run onto the hub: its delta file, its protocol and a model card, without the places of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from vpt.atomic_write import write_json, write_text
from vpt.errors import ConfigError, HubError
from vpt.hub.client import REPO, one_sentence
from vpt.hub.model_card import model_card
from vpt.models.delta_format import read_delta, write_delta
from vpt.models.provenance import public_identity, without_places
from vpt.run_record import CONFIG_FILE, DELTA_FILE, RUN_FILE


def push(delta: str | Path, repo: str, private: bool = False, endpoint: str | None = None) -> str:
    """Uploads a run as one commit; the repository is made if it is not there.

    Args:
        delta: The delta file of a run; ``run.json`` and ``config.yaml`` are taken from beside ``delta.safetensors`` if
            they are there, and not from beside another file, which is not what they are about.
        repo: ``user/name``.
        private: Only the repository's owner sees it; where it is there already and public, nothing is uploaded.
        endpoint: URL of the hub; None for ``HF_ENDPOINT``, or the public one.

    Returns:
        The repository's address.

    Raises:
        ConfigError: A file beside the delta is damaged.
        DeltaFileError: The delta file cannot be read.
        HubError: The name is none, the hub cannot be reached, or it refuses.
    """
    if not REPO.fullmatch(repo):
        raise HubError(f"{repo!r} is no name of a repository: write user/name.")
    with TemporaryDirectory() as folder:
        write_public(Path(delta), repo, Path(folder))
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint, library_name="vpt")
        with one_sentence(repo):
            api.create_repo(repo, private=private, exist_ok=True)
            public = private and not api.model_info(repo).private
        if public:
            raise HubError(f"{repo} is public: nothing was uploaded. Make it private, or leave out --private.")
        with one_sentence(repo):
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Upload {Path(delta).name} by vpt push",
                delete_patterns=CONFIG_FILE,  # that of another run
            )
    return f"{api.endpoint}/{repo}"


def write_public(delta: Path, repo: str, folder: Path) -> None:
    """Writes what is uploaded.

    Args:
        delta: The delta file of a run.
        repo: ``user/name``.
        folder: Where to; exists.

    Raises:
        ConfigError: A file beside the delta is damaged.
        DeltaFileError: The delta file cannot be read.
    """
    header, tensors = read_delta(delta)
    header |= {
        "backbone": public_identity(header["backbone"]),
        "specs": without_places(header["specs"]),
        "preset": without_places(header["preset"]),
        "info": without_places(header["info"]),
    }
    write_delta(folder / DELTA_FILE, header, tensors)
    config = _beside(delta, CONFIG_FILE, yaml.safe_load)
    if config is not None:
        write_text(folder / CONFIG_FILE, yaml.safe_dump(without_places(config), sort_keys=False, allow_unicode=True))
    record = without_places(_beside(delta, RUN_FILE, json.loads) or header["info"])
    write_json(folder / RUN_FILE, record)
    size = sum(tensor.numel() for tensor in tensors.values())
    write_text(folder / "README.md", model_card(repo, header, record, size))


def _beside(delta: Path, name: str, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    path = delta.with_name(name)
    if delta.name != DELTA_FILE or not path.is_file():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # of JSON and of UTF-8 too
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings: repair it, or move it away from beside the delta.")
    return content
