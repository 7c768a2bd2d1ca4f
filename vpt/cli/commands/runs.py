"""``vpt runs FOLDER``: what the runs below a folder measured, and the files that they left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpt.cli.arguments import Parser
from vpt.errors import ConfigError
from vpt.run_record import RUN_FILE, images_read, read_record, subset_name


def run(args: list[str]) -> None:
    """Parses the command line and prints a table and a list."""
    from rich.console import Console

    parser = Parser(prog="vpt runs", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    folder = parser.parse_args(args[1:]).folder
    records = {path.parent: read_record(path.parent) for path in sorted(folder.rglob(RUN_FILE))}
    if not records:
        raise ConfigError(f"No run.json below {folder}: `vpt fit` writes one for each run.")
    console = Console()
    console.print(_table(folder, records))
    for warning in check_comparable(record.get("data") or {} for record in records.values()):
        console.print(warning, highlight=False, soft_wrap=True)
    for home, record in records.items():
        data = record.get("data") or {}
        protocol = (
            f" (preset {data['preset']}, {data['counts']['train']:,} training images)" if "preset" in data else ""
        )
        console.print(f"\n{home}/{protocol}", highlight=False, soft_wrap=True)
        for path in sorted(home.iterdir()):
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files) / 1024
            name = f"{path.name}/ ({len(files)} files)" if path.is_dir() else path.name
            console.print(f"  {name:<48}{size:>8,.0f} KB", highlight=False, soft_wrap=True)


def check_comparable(data: Iterable[Mapping[str, Any]]) -> list[str]:
    """Finds tasks that were measured under several presets, or after training on several shares of the images.

    Args:
        data: The ``data`` of each record, as :meth:`ImageDataModule.describe` gives it.

    Returns:
        A sentence for each such task and difference.
    """
    used: dict[tuple[str, str], Counter[str]] = {}
    for described in data:
        if "preset" in described:
            for what, value in (
                ("presets", described["preset"]),
                ("training subsets", subset_name(described.get("subset"))),
            ):
                used.setdefault((described["name"], what), Counter())[value] += 1
    return [
        f"Not comparable: the runs on {name} use different {what} "
        f"({', '.join(f'{value}: {count}' for value, count in counts.items())})."
        for (name, what), counts in used.items()
        if len(counts) > 1
    ]


def _table(folder: Path, records: dict[Path, dict[str, Any]]) -> Any:
    """One line a run; no validation accuracy where all validation images were trained on, as version 0.1.0 measured."""
    from rich.table import Table

    title = f"Top-1 (%) of the runs in {folder}"
    table = Table("run", "trained", "epochs", "seed", "val", "test", "n test", title=title)
    for home, record in records.items():
        metrics, data = record.get("metrics", {}), record.get("data") or {}
        if data.get("shared_with_train", {}).get("val", 0) >= data.get("counts", {}).get("val", 1):
            metrics = {key: value for key, value in metrics.items() if key != "val/acc"}
        table.add_row(
            str(home.relative_to(folder)),
            f"{record.get('parameters', {}).get('trainable', 0):,}",
            str(record.get("epochs", "–")),
            str(record.get("seed", "–")),
            *(f"{100 * metrics[key]:.1f}" if key in metrics else "–" for key in ("val/acc", "test/acc")),
            str(images_read(record).get("test", "–")),
        )
    return table
