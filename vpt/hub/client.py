"""Models from delta files, on this machine or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vpt.errors import HubError
from vpt.models import delta_file
from vpt.models.classifier import TunedModel
from vpt.models.segmenter import DenseModel
from vpt.run_record import DELTA_FILE


@contextmanager
def one_sentence(repo: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
    """Turns errors of the hub's client within it into one that says what to do.

    Args:
        repo: ``user/name``.
        revision: What was asked for.
        file: What was asked for.

    Raises:
        HubError: In place of them.
    """
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


def local(path: str | Path) -> Path:
    """Finds a delta file, on the hub too.

    Args:
        path: A file, or an address as for `fetch`; as a `Path`, too, which leaves one slash of two.

    Returns:
        The file on this machine.

    Raises:
        HubError: The hub cannot be reached, or has no such file.
    """
    scheme, slash, rest = Path(path).as_posix().partition(":/")
    address = f"{PREFIX}{rest.lstrip('/')}" if isinstance(path, Path) else path
    return fetch(address) if slash and scheme == "hf" else Path(path)


def load(path: str | Path, weights: str | None = None) -> TunedModel | DenseModel:
    """Rebuilds a model from a delta file: a classifier or a segmentation model.

    Args:
        path: A delta file, or the address of one on the hub, ``hf://user/name`` or ``hf://user/name@revision``, of
            which nothing but the delta file is downloaded.
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


def load_segmentation(path: str | Path, weights: str | None = None) -> DenseModel:
    """Rebuilds a segmentation model from a delta file: `load`, for those who expect nothing else.

    Args:
        path: As for `load`.
        weights: As for `load`.

    Returns:
        The model as it was saved, in eval mode, all parameters frozen.

    Raises:
        DeltaFileError: The file is not one of a segmentation model, contradicts itself, or belongs to other backbone
            weights.
        HubError: The hub cannot be reached, or has no such file.
        WeightsError: The backbone's weights cannot be found.
    """
    return delta_file.load_segmentation(local(path), weights)
