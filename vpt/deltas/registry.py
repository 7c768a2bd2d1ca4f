"""Deltas by the name that configurations use, and `DeltaSpec`: such a name with its arguments, checked and complete."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

import torch

from vpt.argument_types import MisfitError, brief_options, canonical, checked, in_words, is_plain, shown
from vpt.backbones.factory import Backbone
from vpt.deltas.base import DeltaPart
from vpt.errors import ConfigError, UnknownNameError

GROUP = "vpt.deltas"
"""The group of entry points whose modules register deltas of other packages."""

LARGEST = 65_536
"""Of whole numbers: more prompts, or a larger rank or width, are a mistake, which would take all memory."""

Part = TypeVar("Part", bound=DeltaPart)
_REGISTERED: dict[str, type[DeltaPart]] = {}
DELTAS: Mapping[str, type[DeltaPart]] = MappingProxyType(_REGISTERED)
"""Every delta that is registered, by its name."""


@checked
def register_delta(name: str) -> Callable[[type[Part]], type[Part]]:
    """Makes a delta known under the name that configurations and delta files call it, as a decorator of its class.

    The constructor takes the backbone, and then arguments with the types of plain values: ``int``, ``float``, ``bool``,
    ``str``, None, a ``Literal`` of names, `vpt.argument_types.Options`, a ``Sequence`` or a union of these.

    Raises:
        ConfigError: The name is taken, or what is decorated is no `DeltaPart` that is built from a backbone and named
            arguments.
    """

    def register(part: type[Part]) -> type[Part]:
        if name in _REGISTERED:
            raise ConfigError(f"The delta {name!r} is {_place(_REGISTERED[name])} already: choose another name.")
        if not (isinstance(part, type) and issubclass(part, DeltaPart)):
            raise ConfigError(f"The delta {name!r} is no class that is derived from vpt.deltas.DeltaPart.")
        _, *parameters = inspect.signature(part.__init__).parameters.values()
        unnamed = any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in parameters)
        if unnamed or [each.name for each in parameters[:1]] != ["backbone"]:
            raise ConfigError(
                f"The constructor of the delta {name!r}, {_place(part)}, must take backbone first and then arguments "
                "that have names."
            )
        _REGISTERED[name] = part
        return part

    return register


def find_delta(name: str) -> type[DeltaPart]:
    """Finds a delta, in other installed packages too: an entry point of group ``vpt.deltas`` is loaded by its name.

    An UnknownNameError where there is none of that name, and a ConfigError where the package that has it cannot be
    imported.
    """
    for entry in () if name in _REGISTERED else entry_points(group=GROUP, name=name):
        try:
            entry.load()
        except Exception as error:  # whatever another package raises while it is imported
            raise ConfigError(f"The delta {name!r} cannot be imported from {entry.value}: {error}") from error
    if name not in _REGISTERED:
        raise UnknownNameError("delta", name, _REGISTERED)
    return _REGISTERED[name]


@dataclass(frozen=True)
class DeltaSpec:
    """A delta by name, with every argument written out: two that mean the same are equal.

    `arguments` are in the order of the constructor, as JSON has them: sequences as lists, floats as floats.
    """

    name: str
    arguments: dict[str, Any]

    @classmethod
    def read(cls, plain: object) -> DeltaSpec:
        """Checks a part as configurations and files have it: ``name`` and arguments that differ from their defaults.

        A name alone is one without arguments.

        An UnknownNameError where the name or an argument does not exist, and a ConfigError where it is no dict, an
        argument is missing, or one has another type.
        """
        if isinstance(plain, str) and plain:
            plain = {"name": plain}
        if not isinstance(plain, Mapping) or not isinstance(plain.get("name"), str):
            raise ConfigError(
                f'A part of a delta is a dict with a name, e.g. {{"name": "linear"}}, got {shown(plain)}.'
            )
        name = plain["name"]
        known = _parameters(find_delta(name))
        given = {key: value for key, value in plain.items() if key != "name"}
        for key in given:
            if key not in known:
                raise UnknownNameError(f"argument of delta {name!r}", str(key), known)
        defaults = {key: default for key, (_, default) in known.items()}
        if absent := [key for key, value in (defaults | given).items() if value is inspect.Parameter.empty]:
            raise ConfigError(f"Delta {name!r} needs {', '.join(absent)}.")
        arguments = {}
        for key, value in (defaults | given).items():
            hint = known[key][0]
            try:
                arguments[key] = canonical(value, hint)
            except MisfitError as misfit:
                wanted = f"of type {hint!r}, which no configuration can hold"
                wanted = in_words(hint, "null") if is_plain(hint) else wanted
                raise ConfigError(f"{key} of delta {name!r} must be {wanted}, got {shown(value)}.") from misfit
            kept = arguments[key] if isinstance(arguments[key], list) else [arguments[key]]
            kept = list(arguments[key].values()) if isinstance(arguments[key], dict) else kept
            if any(isinstance(each, int) and abs(each) > LARGEST for each in kept):
                raise ConfigError(f"{key} of delta {name!r} must be at most {LARGEST:,}, got {shown(value)}.")
        return cls(name, arguments)

    def plain(self) -> dict[str, Any]:
        """The canonical dict: ``name`` and every argument."""
        return {"name": self.name, **self.arguments}

    def brief(self) -> dict[str, Any]:
        """The dict for a reader: ``name`` and the arguments that differ from their defaults."""
        known = _parameters(find_delta(self.name))
        given = {key: value for key, value in self.arguments.items() if value != _as_list(known[key][1])}
        return {"name": self.name} | {key: brief_options(value, known[key][0]) for key, value in given.items()}

    def build(self, backbone: Backbone) -> DeltaPart:
        """Builds the part, which is not attached.

        A ConfigError where an argument is out of range; an UnknownNameError where a word among the arguments does not
        exist; an UnsupportedBackboneError where the backbone cannot take it.
        """
        try:
            return find_delta(self.name)(backbone, **self.arguments)
        except RuntimeError as error:  # torch's, of what it cannot allocate
            if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(f"The delta {self.brief()} does not fit into memory: make it smaller.") from error


Specs = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""A delta as it may be written: a dict for each part, or the name alone of one that needs no arguments."""


def read_specs(specs: object) -> list[DeltaSpec]:
    """Checks a delta as configurations and files have it: a list of its parts (`DeltaSpec.read`), or a single one."""
    if isinstance(specs, Mapping) or (isinstance(specs, str) and specs):
        return [DeltaSpec.read(specs)]
    if not isinstance(specs, Sequence) or isinstance(specs, str):
        raise ConfigError(f'A delta is a list of its parts, e.g. [{{"name": "linear"}}], got {shown(specs)}.')
    return [DeltaSpec.read(spec) for spec in specs]


def _place(part: type[DeltaPart]) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def _parameters(part: type[DeltaPart]) -> dict[str, tuple[Any, Any]]:
    """The arguments of a delta: type and default."""
    hints = get_type_hints(part.__init__)
    parameters = [*inspect.signature(part.__init__).parameters.values()][2:]
    return {each.name: (hints.get(each.name), each.default) for each in parameters}


def _as_list(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value
