"""jsonargparse's explanation of a wrong argument, a page long, as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vpt.cli.shipped import config_folder
from vpt.errors import ConfigError, UnknownNameError, VPTError

_COPY = "`vpt configs --copy configs` copies those that come with the package"
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
    if absent := re.search(r"Parser key \"config\": File does not exist: '(.+)'", message):
        return ConfigError(_no_config(Path(absent[1])))
    if missing := re.search(r"arguments are required: (.+)|Key \"(\S+)\" is required", message):
        return ConfigError(
            f"Missing {missing[1] or missing[2]}: give a config file, such as -c configs/demo.yaml ({_COPY})."
        )
    lines = [line.strip() for line in message.splitlines()]
    return ConfigError(" ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line)))


def _no_config(path: Path) -> str:
    after = path.parts[path.parts.index("configs") + 1 :] if "configs" in path.parts else ()
    shipped = after and (config_folder() / Path(*after)).is_file()
    return f"There is no config {path}: " + (f"{_COPY}." if shipped else "name a file, or see `vpt configs`.")
