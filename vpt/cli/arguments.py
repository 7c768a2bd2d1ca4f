"""What the commands beside Lightning's share: a parser that reports in one line, and a run's data from its config."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vpt.atomic_write import check_writable
from vpt.cli import COMMANDS
from vpt.errors import ConfigError, UnknownNameError, VPTError
from vpt.run_record import CONFIG_FILE

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.data import ImageDataModule


_COPY = "`vpt configs --copy configs` copies those that come with the package"
# Lines that speak about types instead of about what was written.
_NOISE = re.compile(r"Does not validate against|Subtypes:|Errors:|Given value|(- )?Expected a <class 'NoneType'>|$")


def explain(message: str, classes: Iterable[str]) -> VPTError:
    """Makes a user error, to be raised, of what jsonargparse says; `classes` can be asked for."""
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return UnknownNameError("class", unknown[1], classes)
    if absent := re.search(r"Parser key \"config\": File does not exist: '(.+)'", message):
        parts = Path(absent[1]).parts
        after = parts[parts.index("configs") + 1 :] if "configs" in parts else ()
        shipped = after and config_folder().joinpath(*after).is_file()
        mend = f"{_COPY}." if shipped else "name a file, or see `vpt configs`."
        return ConfigError(f"There is no config {Path(absent[1])}: {mend}")
    if missing := re.search(r"arguments are required: (.+)|Key \"(\S+)\" is required", message):
        return ConfigError(
            f"Missing {missing[1] or missing[2]}: give a config file, such as -c configs/demo.yaml ({_COPY})."
        )
    lines = [line.strip() for line in message.splitlines()]
    return ConfigError(" ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line)))


def output_file(text: str) -> Path:
    """Type of an option that names a file to write: an OutputError before work begins where it cannot be."""
    check_writable(Path(text))
    return Path(text)


def output_folder(text: str) -> Path:
    """Type of an option that names a folder to write to, as `output_file`."""
    check_writable(Path(text), folder=True)
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option that takes a whole number, not below the `least`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small, the least is {least}")
        return value

    whole_number.__name__ = "whole number"
    return whole_number


DATA_HELP = "config with a data section (default: config.yaml beside the delta)"
WEIGHTS_HELP = "backbone weights on this machine (default: where they were in training)"
DATA_OVERRIDES = "Flags --data.KEY VALUE override single values of the data, for instance --data.root FOLDER."


def config_folder() -> Path:
    """In an installed package within it, in a checkout beside it."""
    inside, beside = (Path(__file__).parents[up] / "configs" for up in (1, 2))
    return inside if inside.is_dir() else beside


class Parser(argparse.ArgumentParser):
    """argparse whose errors are the user's, in one sentence, and whose flags are written out.

    A command is described as `vpt --help` says.
    """

    def __init__(self, **options: Any) -> None:
        """Builds the parser, with the options of `argparse.ArgumentParser`."""
        about = COMMANDS.get(options["prog"].removeprefix("vpt "), ("", None))[1]
        super().__init__(**{"allow_abbrev": False, "description": about} | options)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise ConfigError(f"{message} (see {self.prog} --help).")

    def parse_with_data(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses a command line; what begins with ``--data.`` comes back as it is, for `delta_data`."""
        options, rest = self.parse_known_args(args)
        if rest and not rest[0].startswith("--data."):
            self.error(f"unrecognized arguments: {rest[0]}")
        return options, rest


def delta_data(delta: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> ImageDataModule:
    """Builds the data module that belongs to a delta file, with its image size unless something names one.

    Its config is by default the ``config.yaml`` of the run that wrote the delta; overrides are flags such as
    ``--data.root FOLDER``. Raises a ConfigError if the config or its data section is missing or a flag is wrong, a
    DeltaFileError or DataError if delta or data cannot be read.
    """
    from vpt.models.delta_format import read_header

    size = read_header(delta)["backbone"]["image_size"]
    return config_data(config or delta.parent / CONFIG_FILE, size, overrides)


def config_data(config: Path, size: int, overrides: Sequence[str] = ()) -> ImageDataModule:
    """Builds the data module of a config file; `size` in pixels counts unless the config or a flag names one.

    Otherwise as `delta_data`.
    """
    import jsonargparse
    from lightning.pytorch.cli import instantiate_class

    import vpt.data

    section = data_section(config)
    if (section.get("init_args") or {}).get("image_size") is None:
        overrides = ["--data.image_size", str(size), *overrides]
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(vpt.data.ImageDataModule, "data", required=True)
    try:
        parsed = parser.parse_args(["--data", json.dumps(section), *overrides])
    except argparse.ArgumentError as error:
        raise explain(str(error), vpt.data.__all__) from None
    data: ImageDataModule = instantiate_class((), parsed.data.as_dict())
    return data


def read_yaml(source: Path | str) -> Any:
    """Reads YAML, a file or a text, as the command line does: ``1e-3`` is a number.

    Raises a ConfigError if it is not YAML, or has a key twice.
    """
    import yaml
    from jsonargparse import get_loader

    refuse_doubled_keys()
    try:
        return get_loader("yaml")(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{source} is not YAML ({' '.join(str(error).split())}).") from error


@functools.cache
def refuse_doubled_keys() -> None:
    """Makes a key that is given twice an error wherever jsonargparse reads YAML, which takes the last one."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def strict(text: str) -> Any:
        waiting = [yaml.compose(text, Loader=yaml.SafeLoader)] if ":" in text else []
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.MappingNode):
                lines: dict[str, int] = {}
                for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                    if (line := key.start_mark.line + 1) and key.value in lines:
                        both = f"in lines {lines[key.value]} and {line}"
                        raise ConfigError(f"The key {key.value!r} is given twice, {both}: remove one.")
                    lines[key.value] = line
                waiting += [each for _, each in node.value]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value
        return load(text)

    set_loader("yaml", strict, exceptions=(yaml.YAMLError,))


def data_section(file: Path) -> dict[str, Any]:
    """Reads the ``data`` section of a config file as it is written; a ConfigError if either is missing or no YAML."""
    if not file.is_file():
        raise ConfigError(f"No config {file}: name one with a data section, for instance --data configs/demo.yaml.")
    content = read_yaml(file)
    section = content.get("data") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{file} has no data section.")
    return section
