"""Where the configs are that come with the package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def config_folder() -> Path:
    """In an installed package within it, in a checkout beside it."""
    inside, beside = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    return inside if inside.is_dir() else beside
