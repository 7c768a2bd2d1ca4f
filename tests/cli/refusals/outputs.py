"""Places that cannot be written to."""

from __future__ import annotations

from pathlib import Path

from . import Row


def files(here: Path) -> None:
    """Makes what the rows name."""
    (here / "a_file").write_text("text")
    (here / "folder.png").mkdir()


_DEMO = "-c {configs}/demo.yaml"
_LONG = "n" * 300
_COMMANDS = {
    "robustness run --delta {delta} --out": "folder",
    "robustness report {run} --out": "folder",
    "robustness soup --deltas {delta} {delta} --out": "file",
    "robustness head --backbone vit_nano_patch8_64 --data {configs}/demo.yaml --out": "file",
    "data corruptions --out": "file",
    "report {run} --out": "folder",
    "rerun {run} --out": "folder",
    f"sweep {_DEMO} --grid {{configs}}/sweep/rates.yaml --serial --out": "folder",
    "configs --copy": "folder",
}

ROWS = [
    *(Row(f"{start} a_file/x", "a folder that is a file", "a_file is not a folder") for start in _COMMANDS),
    *(Row(f"{start} {_LONG}", "a name of 300 characters", "File name too long") for start in _COMMANDS),
    *(Row(f"{start} a_file", "a file", "is a file") for start, kind in _COMMANDS.items() if kind == "folder"),
    *(Row(f"{start} folder.png", "a folder", "is a folder") for start, kind in _COMMANDS.items() if kind == "file"),
]
