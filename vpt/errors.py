"""Every error that a user can cause, as one tree.

A message is one sentence or two that say what is wrong, where, and how to mend it. The command line prints it
without a traceback and exits with a non-zero status.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


class VPTError(Exception):
    """Base of all errors raised on purpose by this package."""


class VPTWarning(UserWarning):
    """What a user should know and need not act on; the command line prints it as one line."""


class ConfigError(VPTError):
    """A configuration contradicts itself, the data, or a checkpoint."""


class RecordError(ConfigError):
    """What an earlier run or evaluation left is damaged; the message names the file."""


class DataError(VPTError):
    """A dataset is missing, incomplete or unreadable."""


class WeightsError(VPTError):
    """Backbone weights cannot be found, downloaded or loaded."""


class UnsupportedBackboneError(VPTError):
    """A delta was asked for on a backbone whose structure is not known to give the exact function."""


class DeltaFileError(VPTError):
    """A delta file is unreadable, incomplete, or belongs to another backbone."""


class ExportError(VPTError):
    """A model cannot be written in another format, or the file written is another function."""


class HubError(VPTError):
    """The hub cannot be reached, refuses, or does not have what was asked for."""


class OutputError(VPTError, OSError):
    """A file or folder cannot be written where it was asked for; an OSError too, for those who go on without it."""


class DivergedError(VPTError):
    """Training produced a loss that is not finite."""


class UnknownNameError(VPTError):
    """A name of a kind, such as ``"backbone"``, is not among those known; the message suggests the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = self.known = list(known)
        close = get_close_matches(str(name), names, n=1, cutoff=0.4)
        hints = [f"did you mean {close[0]!r}?"] if close else []
        if len(names) <= 40:
            hints.append(f"Known are {', '.join(names)}.")
        elif not close:
            hints.append(f"{len(names)} names are known.")
        super().__init__(f"Unknown {kind} {name!r}: {' '.join(hints)}")


def wanted_number(least: float, most: float = math.inf, whole: bool = False) -> str:
    """The words for a number from `least` to `most`: `a whole number of at least 1`."""
    span = f"of at least {least}" if math.isinf(most) else f"from {least} to {most}"
    return f"a {'whole ' if whole else ''}number {span}"


def check_number(name: str, value: Any, least: float, most: float = math.inf, whole: bool = False) -> None:
    """Refuses, by a ConfigError, what is no finite number from `least` to `most`, or not a `whole` one."""
    kind: Any = Integral if whole else Real
    number = math.nan if isinstance(value, bool) or not isinstance(value, kind) else value
    if not least <= number <= most or number == math.inf:
        told = most if number > most else math.inf
        raise ConfigError(f"{name} must be {wanted_number(least, told, whole)}, got {value!r:.80}.")
