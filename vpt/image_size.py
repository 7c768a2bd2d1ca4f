"""Height and width of images in pixels: one number where they are equal, else (height, width)."""

from __future__ import annotations

from collections.abc import Sequence

from vpt.errors import ConfigError

LARGEST = 8192
ImageSize = int | tuple[int, int]
"""As it is kept; square ones are always one number, so that equal sizes compare equal."""
GivenSize = int | Sequence[int]
"""As it is given: one number, or height and width."""


def as_size(given: GivenSize) -> ImageSize:
    """Brings a size to the form in which it is kept; a ConfigError where it is none of 1 to `LARGEST` pixels."""
    both = given if isinstance(given, list | tuple) else (given, given)
    whole = len(both) == 2 and all(isinstance(side, int) and not isinstance(side, bool) for side in both)
    if not whole or not all(1 <= side <= LARGEST for side in both):
        raise ConfigError(
            f"image_size must be a whole number of pixels from 1 to {LARGEST}, or [height, width] of such, got "
            f"{given!r}."
        )
    return both[0] if both[0] == both[1] else (both[0], both[1])


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def plain_size(size: ImageSize) -> int | list[int]:
    """For JSON: one number, or [height, width]."""
    return size if isinstance(size, int) else list(size)


def size_text(size: GivenSize) -> str:
    """For people and file names: ``224``, or ``512x256`` for height 512 and width 256."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def is_size(value: object) -> bool:
    """Whether a value of a file is a size."""
    try:
        as_size(value)  # type: ignore[arg-type]  # anything may stand in a file
    except ConfigError:
        return False
    return True
