"""What the commands beside Lightning's share: a parser that reports in one line, and a run's data from its config."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vpt.atomic_write import check_writable
from vpt.cli import COMMANDS
from vpt.errors import ConfigError, UnknownNameError, VPTError, wanted_number
from vpt.image_size import ImageSize, as_size, plain_size
from vpt.run_record import CONFIG_FILE

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.data import ImageDataModule
    from vpt.sharding import Shard


_COPY = "`vpt configs --copy configs` copies those that come with the package"
# Lines that speak about types instead of about what was written.
_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|(- )?Expected a <class 'NoneType'>|"
    r"Subclass types expect|- a (class path|dict) |$"
)


_SHORTER = {
    r"Problem with given class_path '[^']+': ": "",
    r"Parser key \"([^\"]+)\": ": r"\1: ",
    r"^(data|model): (\w+): ": r"\1.\2: ",
    r"(?<=:) Expected dict": " Expected a mapping",
    r"(?<=\S) Expected dict": " or a mapping",
    r"\.? Got value: (.*?)\.?$": r", got \1.",
    r"(?<=\w) Expected ": " or ",
}
# What a type is called there, and by people.
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}


def explain(message: str, classes: Iterable[str], options: Iterable[str] = ()) -> VPTError:
    """Makes a user error, to be raised, of what jsonargparse says; `classes` and `options` can be asked for."""
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return UnknownNameError("class", unknown[1], classes)
    if absent := re.search(r"Parser key \"config\": File does not exist: '(.+)'", message):
        parts = Path(absent[1]).parts
        after = parts[parts.index("configs") + 1 :] if "configs" in parts else ()
        shipped = after and config_folder().joinpath(*after).is_file()
        mend = f"{_COPY}." if shipped else "name a file, or see `vpt configs`."
        return ConfigError(f"There is no config {Path(absent[1])}: {mend}")
    if missing := re.search(r"arguments are required: (.+)|Key \"(\S+)\" is required", message):
        name = missing[1] or missing[2]
        if not re.search(r"\b(data|model|config|backbone)\b", name):
            return ConfigError(f"Missing {name}: give it a value.")
        return ConfigError(f"Missing {name}: give a config file, such as -c configs/demo.yaml ({_COPY}).")
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line))
    text = re.sub(r"Expected a <class '(\w+)'>", lambda found: f"Expected {_TYPES.get(found[1], found[1])}", text)
    text = re.sub(r"Expected a typing\.Literal\[(.+?)\]", r"Expected one of \1", text)
    for said, instead in _SHORTER.items():
        text = re.sub(said, instead, text)
    given = re.search(r"^\s*Given value: (.*)$", message, re.MULTILINE)  # of a type of several kinds
    if given and "Expected a" in text and " got " not in text:
        text = f"{text.rstrip('.')}, got {given[1]:.100}."
    if unknown := re.search(r"(?:unrecognized arguments: -*|accept option '|Option ')([^\s=']+)", text):
        short = unknown[0].startswith("Option")
        text += nearest(unknown[1], {each.rpartition(".")[2] for each in options} if short else options)
    return ConfigError(text)


def output_file(text: str) -> Path:
    """Type of an option that names a file to write: an OutputError before work begins where it cannot be."""
    check_writable(Path(text))
    return Path(text)


def output_folder(text: str) -> Path:
    """Type of an option that names a folder to write to, as `output_file`."""
    check_writable(Path(text), folder=True)
    return Path(text)


def shard(text: str) -> Shard:
    """Type of an option that names a share of the images, ``I/N``."""
    from vpt.sharding import Shard

    return Shard.read(text)


def number(least: float, most: float = math.inf, whole: bool = False) -> Callable[[str], float]:
    """Type of an option that takes a finite number from `least` to `most`, perhaps a `whole` one."""

    def read(text: str) -> float:
        value = int(text) if whole else float(text)
        if not least <= value <= most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text:.80} is not {wanted_number(least, most, whole)}")
        return value

    read.__name__ = "whole number" if whole else "number"
    return read


def at_least(least: int, most: float = math.inf) -> Callable[[str], float]:
    """Type of an option that takes a whole number from `least` to `most`."""
    return number(least, most, whole=True)


DATA_HELP = "config with a data section (default: config.yaml beside the delta)"
WEIGHTS_HELP = "backbone weights on this machine (default: where they were in training)"
SHARD_HELP = "I/N: answer the I-th of N shares of the images, in any process or machine; the last one joins them"
DATA_OVERRIDES = "Flags --data.KEY VALUE override single values of the data, for instance --data.root FOLDER."


def config_folder() -> Path:
    """In an installed package within it, in a checkout beside it."""
    inside, beside = (Path(__file__).parents[up] / "configs" for up in (1, 2))
    return inside if inside.is_dir() else beside


DATA_FLAGS = re.compile(r"--data\.")
"""Flags that `delta_data` and `config_data` take."""
FIT_FLAGS = re.compile(r"-c|--(config|seed_everything|ckpt_path|print_config|trainer|model|data)(?![\w-])")
"""Flags of `vpt fit`."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are the user's, in one sentence, and whose flags are written out.

    A command is described as `vpt --help` says. Flags that begin as `onward` are left to another parser.
    """

    onward: re.Pattern[str] | None = None

    def __init__(self, **options: Any) -> None:
        """Builds the parser, with the options of `argparse.ArgumentParser`."""
        about = COMMANDS.get(options["prog"].removeprefix("vpt "), ("", None))[1]
        super().__init__(**{"allow_abbrev": False, "description": about} | options)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise ConfigError(f"{message:.300} (see {self.prog} --help).")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses a command line; what belongs `onward` comes back as it is."""
        for place, arg in enumerate(args or ()):
            if not arg.strip():
                self.error(f"an empty argument after {args[place - 1] if place else self.prog}")
        options, rest = super().parse_known_args(args, namespace)
        for place, arg in enumerate(rest):
            flag = re.match(r"--?[a-zA-Z]", arg)
            if (flag or place == 0) and not (self.onward and self.onward.match(arg)):
                near = nearest(arg.partition("=")[0], self._option_string_actions) if flag else ""
                self.error(f"unrecognized arguments: {arg}{near}")
        return options, rest


def nearest(name: str, known: Iterable[str]) -> str:
    """Asks whether the nearest known name was meant; nothing where none is near."""
    close = difflib.get_close_matches(name, {*known} - {name}, n=1)
    return f", did you mean {close[0]}?" if close else ""


def check_effect(options: argparse.Namespace, needs: str, *unused: str) -> None:
    """Refuses, by a ConfigError, options that say nothing to a command; `needs` is what they would need.

    They are named as in the namespace, where an option that is not given is None or False.
    """
    for name in unused:
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {needs}: leave it out.")


def check_different(option: str, values: Sequence[Any]) -> None:
    """Refuses, by a ConfigError, an option that names one thing twice."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ConfigError(f"{option} has {value} twice: name each once.")


def delta_data(delta: Path, config: Path | None = None, overrides: Sequence[str] = ()) -> ImageDataModule:
    """Builds the data module that belongs to a delta file, with its image size unless something names one.

    Its config is by default the ``config.yaml`` of the run that wrote the delta; overrides are flags such as
    ``--data.root FOLDER``. Raises a ConfigError if the config or its data section is missing or a flag is wrong, a
    DeltaFileError or DataError if delta or data cannot be read.
    """
    from vpt.models.delta_format import read_header

    size = as_size(read_header(delta)["backbone"]["image_size"])
    return config_data(config or delta.parent / CONFIG_FILE, size, overrides)


def config_data(config: Path, size: ImageSize, overrides: Sequence[str] = ()) -> ImageDataModule:
    """Builds the data module of a config file; `size` in pixels counts unless the config or a flag names one.

    Otherwise as `delta_data`.
    """
    from lightning.pytorch.cli import instantiate_class

    section = data_section(config)
    if (section.get("init_args") or {}).get("image_size") is None:
        overrides = ["--data.image_size", json.dumps(plain_size(size)), *overrides]
    data: ImageDataModule = instantiate_class((), typed_section(section, overrides))
    return data


def typed_section(section: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A data section with flags ``--data.KEY VALUE`` over it, and every argument in its type; else a ConfigError."""
    import jsonargparse

    import vpt.data

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(vpt.data.ImageDataModule, "data", required=True)
    try:
        parsed = parser.parse_args(["--data", json.dumps(section), *overrides])
    except argparse.ArgumentError as error:
        raise explain(str(error), vpt.data.__all__) from None
    found: dict[str, Any] = parsed.data.as_dict()
    return found


def read_yaml(source: Path | str) -> Any:
    """Reads YAML, a file or a text, as the command line does: ``1e-3`` is a number.

    Raises a ConfigError, which names the file, if it is not YAML in UTF-8, has a key twice, or contains itself.
    """
    import yaml
    from jsonargparse import get_loader

    refuse_odd_yaml()
    name = str(source) if isinstance(source, Path) else f"{source!r:.80}"
    try:
        return get_loader("yaml")(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not YAML: it is not text in UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        found = " ".join(part for part in (error.context, error.problem) if part)
        line = f" in line {mark.line + 1}" if (mark := error.problem_mark) else ""
        raise ConfigError(f"{name} is not YAML ({found}{line}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML ({' '.join(str(error).split())}).") from error


_LARGEST = 100_000  # values of a config, those that are repeated by an anchor counted as often


@functools.cache
def refuse_odd_yaml() -> None:
    """Makes an error of what jsonargparse takes in silence, or for ever, wherever it reads YAML.

    These are a key that is given twice, of which it takes the last one, and a value that contains itself or itself
    over and over.
    """
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def strict(text: str) -> Any:
        try:
            if ":" in text or "&" in text:
                _check_node(yaml.compose(text, Loader=yaml.SafeLoader), {})
            return load(text)
        except RecursionError:
            raise ConfigError("It is nested too deep.") from None
        except ValueError as error:  # of a number that Python does not read
            raise ConfigError(f"It has a value that cannot be read ({error}).") from None

    set_loader("yaml", strict, exceptions=(yaml.YAMLError,))


def _check_node(node: Any, sizes: dict[int, int | None]) -> int:
    """The number of values in a node of YAML; None among the `sizes` is of one that is not yet at its end."""
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) in sizes:
        if (size := sizes[id(node)]) is None:
            raise ConfigError(f"The value in line {node.start_mark.line + 1} contains itself.")
        return size
    sizes[id(node)] = None
    lines: dict[str, int] = {}
    size = 1
    for child in node.value:
        key, value = child if isinstance(child, tuple) else (None, child)
        if key is not None and isinstance(key.value, str):
            line = key.start_mark.line + 1
            if key.value in lines:
                both = f"in lines {lines[key.value]} and {line}"
                raise ConfigError(f"The key {key.value!r} is given twice, {both}: remove one.")
            lines[key.value] = line
        size += _check_node(value, sizes)
    if size > _LARGEST:
        raise ConfigError(f"The value in line {node.start_mark.line + 1} repeats others more than {_LARGEST:,} times.")
    sizes[id(node)] = size
    return size


def data_section(file: Path) -> dict[str, Any]:
    """Reads the ``data`` section of a config file as it is written; a ConfigError if either is missing or no YAML."""
    section = read_config(file, "name one with a data section, for instance --data configs/demo.yaml").get("data")
    if not isinstance(section, dict):
        raise ConfigError(f"{file} has no data section.")
    return section


def read_config(file: Path, mend: str) -> dict[str, Any]:
    """Reads a file of YAML with names and their values; a ConfigError where it is none, and how to `mend` it."""
    if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises on a name that is too long
        raise ConfigError(f"No config {file!s:.200}: {mend}.")
    content = read_yaml(file)
    if not isinstance(content, dict) or not content:
        held = {dict: "no value", list: "a list", type(None): "nothing"}.get(type(content), "a single value")
        raise ConfigError(f"{file} is no config: it holds {held}, where names and their values are wanted.")
    if names := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(f"{file} is no config: {names[0]!r:.80} is no name.")
    return content
