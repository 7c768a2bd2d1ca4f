"""Prints the floor of every dependency as a constraint for pip: python tests/floors.py > floors.txt."""

from __future__ import annotations

import re
from pathlib import Path


def floors(text: str) -> list[str]:
    """Finds the floors in a ``pyproject.toml``.

    Args:
        text: Its content.

    Returns:
        ``name==version`` for each requirement ``name>=version``, sorted.
    """
    found = re.findall(r'^\s*"?([A-Za-z0-9_.-]+)(?:\[\w+\])?>=([\w.]+)', text.replace('["', '[\n"'), re.MULTILINE)
    return sorted({f"{name}=={version}" for name, version in found})


if __name__ == "__main__":
    print("\n".join(floors((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))))
