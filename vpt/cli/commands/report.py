"""``vpt report``: tables and figures of tested runs."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import Parser


def run(args: list[str]) -> None:
    """Parses the command line, writes the files, and prints the tables."""
    parser = Parser(prog="vpt report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders, searched for run.json of tested runs")
    parser.add_argument(
        "--mixed", action="store_true", help="average across presets, partial data and epoch rules, too"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: report)")
    options = parser.parse_args(args[1:])

    from rich.console import Console
    from rich.table import Table

    from vpt.reports.run_report import run_report
    from vpt.reports.run_values import report

    made = run_report(report(options.runs, options.mixed))
    paths = made.write(options.out)
    console = Console()
    for table in made.tables[:2]:
        shown = Table(*table.columns, title=table.title, caption=table.note)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for note in made.notes:
        console.print(note, highlight=False, soft_wrap=True)
    print(f"written to {options.out}: {', '.join(path.name for path in paths)}")
