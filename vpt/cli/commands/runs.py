"""``vpt runs`` and ``vpt rerun``: what runs measured and left in their folders, and one of them once more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpt.cli.arguments import Parser
from vpt.errors import ConfigError, VPTError
from vpt.run_record import CONFIG_FILE, RUN_FILE, images_read, read_record, subset_name

_RUNS = "What the runs below a folder measured, and the files that they left."
_RERUN = "Repeats a run from what it left behind, and says whether its numbers came out equal."


def run(args: list[str]) -> None:
    """Runs one of the two commands."""
    {"runs": _runs, "rerun": _rerun}[args[0]](args)


def _rerun(args: list[str]) -> None:
    """Repeats the run, and prints both numbers; one that came out otherwise is an error."""
    epilog = "Values that are another on this machine: --data.root FOLDER --model.weights FILE"
    parser = Parser(prog="vpt rerun", description=_RERUN, epilog=epilog)
    parser.add_argument("run", type=Path, help="folder with run.json and config.yaml")
    parser.add_argument("--out", type=Path, help="keep the repetition in this folder (default: it is removed)")
    options, rest = parser.parse_known_args(args[1:])
    config = options.run / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{options.run} is no run: it has no {CONFIG_FILE}.")

    from vpt.cli.commands.lightning_cli import resolve
    from vpt.experiments.trial import rerun

    found = rerun(options.run, resolve(["-c", str(config), *rest]), options.out)
    for key, (old, new) in found.numbers.items():
        print(f"{key:<22}{old:.8f}  {new:.8f}  {'equal' if old == new else f'{new - old:+.2e}'}")
    for key in found.alone:
        print(f"{key:<22}of one of them only")
    for text in found.differences:
        print(text)
    if not found.equal:
        reasons = "; ".join(found.differences) or "nothing that is recorded differs"
        raise VPTError(f"{options.run} did not come out equal ({reasons}).")
    print("equal, bit for bit")


def _runs(args: list[str]) -> None:
    """Prints a table and a list."""
    from rich.console import Console

    parser = Parser(prog="vpt runs", description=_RUNS)
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

    Of each record it takes ``data``, as :meth:`ImageDataModule.describe` gives it; a sentence for each task and
    difference.
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
