"""What the hub's client raises, as one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vpt.errors import HubError


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
