"""jsonargparse's explanation of a wrong argument, a page long, as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vpt.errors import ConfigError, UnknownNameError, VPTError

# Lines that speak about types instead of about what was written.
_NOISE = re.compile(r"Does not validate against|Subtypes:|Errors:|Given value|(- )?Expected a <class 'NoneType'>|$")


def explain(message: str, classes: Iterable[str]) -> VPTError:
    """Makes a user error of what jsonargparse says.

    Args:
        message: Its text.
        classes: Names of the models and data modules that can be asked for.

    Returns:
        The error, to be raised.
    """
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return UnknownNameError("class", unknown[1], classes)
    if missing := re.search(r"arguments are required: (.+)|Key \"(\S+)\" is required", message):
        return ConfigError(f"Missing {missing[1] or missing[2]}: give a config file, such as -c configs/demo.yaml.")
    lines = [line.strip() for line in message.splitlines()]
    return ConfigError(" ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line)))
