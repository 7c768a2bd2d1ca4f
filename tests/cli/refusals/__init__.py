"""Inputs that are refused: a module for each kind, with the rows of its table and the files that they name.

A command is written as a user would type it, in an empty folder. ``{configs}`` are the shipped configs, ``{run}`` is
the folder of a finished run, ``{delta}`` its delta file, ``{checkpoint}`` its last checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """What is typed after ``vpt``, what is wrong with it, and what the one sentence of the answer must say."""

    command: str
    wrong: str
    says: str
