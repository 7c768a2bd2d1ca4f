"""Models from delta files, on this machine or on the hub; and runs onto the hub, without the places of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from vpt.argument_types import checked
from vpt.atomic_write import write_json, write_text
from vpt.backbones.checkpoints import one_try
from vpt.errors import ConfigError, HubError, RecordError
from vpt.hub.model_card import model_card
from vpt.models import delta_file
from vpt.models.classifier import TunedModel
from vpt.models.delta_format import (
    known,
    public_identity,
    read_activations,
    read_calibration,
    read_delta,
    without_places,
    write_delta,
)
from vpt.models.segmenter import DenseModel
from vpt.run_record import CONFIG_FILE, DELTA_FILE, RUN_FILE, read_record

PREFIX = "hf://"
REPO = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def one_sentence(repo: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
    """Turns errors of the hub's client within it into a `HubError` that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit.") from error
    except errors.LocalEntryNotFoundError as error:  # the client's word for a hub that does not answer
        raise _unreachable(repo, error) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{repo} on the hub has no {file}: vpt push writes it.") from error
    except errors.RepositoryNotFoundError as error:  # the hub tells strangers of a private one the same
        raise HubError(
            f"The hub has no model {repo} that you may read: check the name; for a private one, log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "log in with `hf auth login` or set HF_TOKEN" if status in (401, 403) else _first_line(error)
        raise HubError(f"The hub refused {repo} with status {status}: {advice}.") from error
    except PermissionError as error:
        raise HubError(f"{repo} cannot be kept on this machine: {error}.") from error
    except ValueError as error:  # of the name or of the card
        raise HubError(f"The hub does not take {repo}: {_first_line(error)}") from error
    except Exception as error:  # the client raises what its HTTP library does, of whatever class
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> HubError:
    return HubError(
        f"The hub could not be reached for {repo} ({type(error).__name__}): check the network, HF_ENDPOINT and "
        "HF_HUB_OFFLINE."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@checked
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

    with one_sentence(repo, revision, DELTA_FILE), one_try(endpoint):
        found = hf_hub_download(repo, DELTA_FILE, revision=revision or None, endpoint=endpoint)
    return Path(str(found))


def local(path: str | Path) -> Path:
    """A delta file on this machine: as it is, in a run's folder, or fetched from an address, also one as a `Path`.

    Raises:
        HubError: The hub cannot be reached, or has no such file.
    """
    scheme, slash, rest = Path(path).as_posix().partition(":/")
    address = f"{PREFIX}{rest.lstrip('/')}" if isinstance(path, Path) else path
    if slash and scheme == "hf":
        return fetch(str(address))
    file = Path(path)
    return file / DELTA_FILE if (file / DELTA_FILE).is_file() else file


@checked
def load(path: str | Path, weights: str | Path | None = None) -> TunedModel | DenseModel:
    """Rebuilds a model from a delta file: a classifier or a segmentation model.

    Args:
        path: A delta file, the folder of a run, which has one, or the address of one on the hub, ``hf://user/name`` or
            ``hf://user/name@revision``, of which nothing but the delta file is downloaded.
        weights: Where the backbone's weights are on this machine; None for where they were at training time. Not read
            where the file holds the whole backbone.

    Returns:
        The model as it was saved, in eval mode, all parameters frozen. The random state stays as it is.

    Raises:
        DeltaFileError: The file is not a delta file, contradicts itself, or belongs to other backbone weights.
        HubError: The hub cannot be reached, or has no such file.
        WeightsError: The backbone's weights cannot be found.
    """
    return delta_file.load_model(local(path), weights)


@checked
def load_segmentation(path: str | Path, weights: str | Path | None = None) -> DenseModel:
    """`load` for those who expect a segmentation model: a file of a classifier is a `DeltaFileError`."""
    return delta_file.load_segmentation(local(path), weights)


@checked
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
        _write_public(Path(delta), repo, Path(folder))
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint, library_name="vpt")
        with one_sentence(repo), one_try(endpoint):
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


def _write_public(delta: Path, repo: str, folder: Path) -> None:
    header, tensors = read_delta(delta)
    header |= {key: without_places(header[key]) for key in ("specs", "preset", "info")}
    header["backbone"] = public_identity(header["backbone"])
    write_delta(folder / DELTA_FILE, header, tensors, read_calibration(delta), read_activations(delta))
    if (config := _beside(delta, CONFIG_FILE)) is not None:
        settings = without_places(_settings(config))
        write_text(folder / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    of_run = _beside(delta, RUN_FILE) is not None
    record = without_places(read_record(delta.parent) if of_run else known(header["info"]))
    write_json(folder / RUN_FILE, record)
    size = sum(tensor.numel() for tensor in tensors.values())
    try:
        card = model_card(repo, header, record, size)
    except RecordError as error:
        raise RecordError(f"{delta.with_name(RUN_FILE) if of_run else delta}: {error}") from error
    write_text(folder / "README.md", card)


def _beside(delta: Path, name: str) -> Path | None:
    path = delta.with_name(name)
    return path if delta.name == DELTA_FILE and path.is_file() else None


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # of UTF-8, and of dates
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings: repair it, or move it away from beside the delta.")
    return content
