"""Whether the plain values of a configuration are of the kind that a delta's constructor takes."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a name"),
    NoneType: ((NoneType,), "null"),
}


def fits(value: Any, hint: Any) -> bool:
    """Says whether a value is of a type.

    Args:
        value: Anything.
        hint: A plain type, a sequence of one, a union, or a literal, whose names are not checked here.
    """
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(fits(entry, get_args(hint)[0]) for entry in value)
    return isinstance(value, _PLAIN[hint][0]) and (hint is bool or not isinstance(value, bool))


def words(hint: Any) -> str:
    """A type in words.

    Args:
        hint: As for `fits`.
    """
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is Sequence:
        return f"a list (each {words(get_args(hint)[0])})"
    return _PLAIN[hint][1]
