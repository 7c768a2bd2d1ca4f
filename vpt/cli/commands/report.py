"""``vpt report``: tables and figures of tested runs."""

from __future__ import annotations

import json
from pathlib import Path

from vpt.cli.arguments import Parser


def run(args: list[str]) -> None:
    """Parses the command line, writes the files, and prints the tables.

    Args:
        args: The command line, beginning with ``report``.

    Raises:
        VPTError: The user's input is wrong.
    """
    parser = Parser(prog="vpt report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="folders, searched for run.json of tested runs")
    parser.add_argument(
        "--mixed", action="store_true", help="average across presets, partial data and epoch rules, too"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: report)")
    options = parser.parse_args(args[1:])

    from rich.console import Console
    from rich.table import Table

    from vpt.reports.page import document
    from vpt.reports.run_figures import CAPTIONS, figures
    from vpt.reports.run_tables import TITLE, csv, latex, markdown, notes, tables
    from vpt.reports.run_values import report

    values = report(options.runs, options.mixed)
    texts = {
        "report.json": json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(values),
        "report.csv": csv(values),
        "report.tex": latex(values),
        "report.html": document(TITLE, notes(values), tables(values), figures(values), CAPTIONS),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (options.out / name).write_text(text, encoding="utf-8")
    console = Console()
    for table in tables(values)[:2]:
        shown = Table(*table.columns, title=table.title, caption=table.note)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for note in notes(values):
        console.print(note, highlight=False, soft_wrap=True)
    print(f"written to {options.out}: {', '.join(texts)}")
