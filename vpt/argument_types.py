"""Values in the types that they are annotated with: those of a configuration, and the arguments of a call in Python."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from vpt.errors import ConfigError, UnknownNameError

P = ParamSpec("P")
R = TypeVar("R")
Group = TypeVar("Group", bound="Options")

_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "text"),
    NoneType: ((NoneType,), "None"),
}

_OTHERS = {"ndarray": "a NumPy array", "Any": "anything", "object": "anything", "Callable": "a function"}
_OTHERS |= {"Path": "a path that can exist", "Backbone": "a Backbone, which vpt.create_backbone makes"}


class MisfitError(Exception):
    """A value has not the type that is meant."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Makes an argument of a wrong type a ConfigError that says what is wanted, before anything is computed.

    A decorator of a function or constructor, by its annotations; numbers of NumPy become Python's.
    """

    @cache
    def known() -> tuple[inspect.Signature, dict[str, Any]]:
        return inspect.signature(function), _hints(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        signature, hints = known()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # an argument that is missing or unknown, of which Python says more
            return function(*args, **kwargs)
        of = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                bound.arguments[name] = argument(of, name, value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return call


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of the arguments alone: what is returned may have a name that only type checkers know."""
    told = inspect.unwrap(function)
    named = {name: hint for name, hint in getattr(told, "__annotations__", {}).items() if name != "return"}
    return get_type_hints(SimpleNamespace(__annotations__=named), getattr(told, "__globals__", {}))


def check_arguments(made: type, given: Mapping[str, Any]) -> None:
    """Checks what a class is made with, by all its constructors, as `checked` does where it can stand."""
    for each in made.__mro__:
        hints = _hints(vars(each)["__init__"]) if "__init__" in vars(each) else {}
        for name in hints.keys() & given.keys():
            argument(made.__name__, name, given[name], hints[name])


def argument(of: str, name: str, value: object, hint: Any) -> Any:
    """The value of an argument of what is called as `canonical` has it; a ConfigError that names both if it misfits."""
    try:
        return canonical(value, hint)
    except MisfitError as misfit:
        raise ConfigError(f"{name} of {of} must be {in_words(hint)}, got {shown(value)}.") from misfit


@dataclass(frozen=True)
class Options:
    """Arguments that belong together, which a configuration writes as a mapping: fields of a subclass."""

    @classmethod
    def of(cls: type[Group], given: Group | Mapping[str, Any]) -> Group:
        """Takes them, or makes them from a mapping; a ConfigError or an UnknownNameError where it does not fit."""
        if isinstance(given, cls):
            return given
        return cls(**argument(_written(cls), "options", given, cls))


def _written(hint: type[Options]) -> str:
    """The name of the argument that takes such options."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", hint.__name__).lower()


def _options(value: Any, hint: type[Options]) -> dict[str, Any]:
    """A mapping with every field of some options written out."""
    known, hints = {each.name: each.default for each in fields(hint)}, get_type_hints(hint)
    given = {name: getattr(value, name) for name in known} if isinstance(value, hint) else value
    if not isinstance(given, Mapping):
        raise MisfitError
    for name in given:
        if name not in known:
            raise UnknownNameError(f"option of {_written(hint)}", str(name), known)
    return {
        name: argument(_written(hint), name, given.get(name, default), hints[name]) for name, default in known.items()
    }


def brief_options(value: Any, hint: Any) -> Any:
    """A value of a type in its canonical form; of `Options` only the fields that differ from their defaults."""
    kinds = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and issubclass(each, Options)]
    if not kinds or not isinstance(value, Mapping):
        return value
    return {each.name: value[each.name] for each in fields(kinds[0]) if value[each.name] != each.default}


def canonical(value: Any, hint: Any) -> Any:
    """A value in the form of a type: plain ones as Python's own, their sequences as lists, all others as they are.

    `Options` become a mapping with every field. A literal's names are checked where they are used. A `MisfitError`
    where the value has not that type; numbers are finite, and text is no sequence.
    """
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Options):
        return _options(value, hint)
    if (hint is Path or Path in args) and isinstance(value, str | Path) and not _can_exist(str(value)):
        raise MisfitError
    if origin in (Union, UnionType):
        for option in args:
            try:
                return canonical(value, option)
            except MisfitError:
                continue
        raise MisfitError
    if _within(origin, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise MisfitError
        return [canonical(entry, args[0]) for entry in value]
    if _within(origin, Mapping):
        if not isinstance(value, Mapping):
            raise MisfitError
        for key, entry in value.items():
            canonical(key, args[0])
            canonical(entry, args[1])
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    kinds = _PLAIN[hint][0] if hint in _PLAIN else str if origin is Literal else origin or hint
    if hint is Any or not isinstance(kinds, type | tuple) or getattr(kinds, "_is_protocol", False):
        return value
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint in (int, float)):
        raise MisfitError
    # NaN, infinite, or a whole number that no float reaches
    if hint is float and not abs(cast("float", value)) <= sys.float_info.max:
        raise MisfitError
    return hint(value) if hint in (int, float) else value


def _can_exist(path: str) -> bool:
    """Whether the name of a file or folder is not empty, has no NUL, and is not longer than any system allows."""
    try:
        longest = max(len(os.fsencode(part)) for part in path.split("/"))
    except UnicodeEncodeError:
        return False
    return bool(path) and "\0" not in path and longest <= 255 and len(path) < 4096


def is_plain(hint: Any) -> bool:
    """Whether a configuration can hold values of a type: plain ones, their lists, unions of these, and literals."""
    if get_origin(hint) is Literal:
        return True
    if isinstance(hint, type) and issubclass(hint, Options):
        return True
    return all(is_plain(option) for option in get_args(hint)) if get_args(hint) else hint in _PLAIN


def in_words(hint: Any, none: str = "None") -> str:
    """A type as a sentence calls it, and its None as it is called where the value was written."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(in_words(option, none) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if hint in _PLAIN:
        return none if hint is NoneType else _PLAIN[hint][1]
    if _within(origin, Sequence):
        return f"a list (each {in_words(args[0], none)})"
    if isinstance(hint, type) and issubclass(hint, Options):
        return f"a mapping of {', '.join(each.name for each in fields(hint))}"
    if _within(origin, Mapping):
        return f"a mapping from {in_words(args[0], none)} to {in_words(args[1], none)}"
    name = getattr(origin or hint, "__name__", str(hint))
    return _OTHERS.get(name, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def _within(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and origin is not tuple and issubclass(origin, kind)


def shown(value: object) -> str:
    """What a value is, on a line."""
    if isinstance(value, type) or callable(getattr(value, "forward", None)) or hasattr(value, "shape"):
        shape = getattr(value, "shape", None)
        kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        return kind if shape is None or isinstance(value, type) else f"{kind} of shape {tuple(cast('Any', shape))}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"
