"""``vpt data``: which datasets there are, what is known of them, whether what is here is whole, and how to get more."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from vpt.cli.arguments import DATA_FLAGS, Parser, output_file, output_folder, typed_section
from vpt.cli.config_checks import check_overruled
from vpt.errors import ConfigError

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from argparse import Namespace

    from vpt.data.catalog.overview import Entry
    from vpt.data.catalog.verify import ListReport, Report

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 16
_WHOLE_PATHS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_HEADERS = ("name", "classes", "official", "here")


def run(args: list[str]) -> None:
    """Parses the command line and does what it says."""
    options, options.overrides = _parser().parse_known_args(args[1:])
    if options.action is not _verify and options.overrides:
        raise ConfigError(f"{options.overrides[0]} is of vpt data verify: leave it out.")
    options.action(options)


def _parser() -> Parser:
    parser = Parser(prog="vpt data", epilog="vpt data verify FILE --data.KEY VALUE: how a table of your own is read.")
    parser.onward = DATA_FLAGS
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, action: Any, text: str) -> Parser:
        made: Parser = actions.add_parser(name, help=text, description=text)
        made.onward = DATA_FLAGS
        made.set_defaults(action=action)
        return made

    listing = add("list", _list, "all datasets: official counts, what is present, licence")
    show = add("show", _show, "the card of a dataset: layout, licence, how to get it, published numbers")
    verify = add("verify", _verify, "count, decode and compare all images; fails on any fault")
    prepare = add("prepare", _prepare, "convert an original to a task, after downloading it where that is allowed")
    cache = add("cache", _cache, "size of the cache of decoded images")
    gallery = add("corruptions", _corruptions, "plot an image under every corruption")
    for each in (show, prepare):
        each.add_argument("name", help="of the dataset")
    verify.add_argument("name", help="of the dataset; or a folder or table of your own images")
    for each, place in ((listing, _folder), (verify, _folder), (prepare, output_folder)):
        each.add_argument("--root", type=place, help="folder of all datasets (default: $VPT_DATA, or datasets)")
    prepare.add_argument("--source", type=Path, help="folder of the unpacked original (default: fetch it)")
    prepare.add_argument("--allow-partial", action="store_true", help="accept an original with too few images")
    cache.add_argument("--clear", action="store_true", help="remove them")
    gallery.add_argument("--out", type=output_file, required=True, help="figure: .png, .svg or .pdf")
    gallery.add_argument("--image", type=Path, help="default: a photograph that scikit-learn ships")
    return parser


def _folder(text: str) -> Path:
    if not Path(text).expanduser().is_dir():
        raise ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


def _root(options: Namespace) -> Path:
    from vpt.data.datasets.published_files import data_root

    return data_root(options.root)


def _list(options: Namespace) -> None:
    from rich.table import Table
    from rich.text import Text

    from vpt.data.catalog.overview import overview
    from vpt.screen import console

    root, screen = _root(options), console()
    entries = overview(root)
    rows = [[f"  {e.card.name}", f"{e.classes:,}", _official(e), _here(e)] for e in entries]
    room = screen.width - sum(max(map(len, column)) + 1 for column in zip(_HEADERS, *rows, strict=True))
    table = Table(title=f"Datasets in {root}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for header in _HEADERS:
        table.add_column(header, justify="left" if header == "name" else "right", no_wrap=True)
    table.add_column("licence", no_wrap=True, overflow="ellipsis", max_width=max(8, room - 1))
    heading = ""
    for entry, row in zip(entries, rows, strict=True):
        group = f"{entry.card.suite} {entry.card.group}".strip()
        if group != heading:
            table.add_row(Text(group, style="bold"))
            heading = group
        table.add_row(*row, entry.card.licence)
    screen.print(table)
    screen.print("classes: those that are evaluated", style="dim")
    screen.print("official, here: training with validation + test images, or test images alone", style="dim")
    screen.print("–: not found", style="dim")
    for entry in entries:
        if entry.fault:
            print(f"{entry.card.name}: {entry.fault}")


def _official(entry: Entry) -> str:
    counts = _counts(entry.card.sizes)
    return f"{entry.official_sets} × {counts}" if entry.official_sets > 1 else counts


def _here(entry: Entry) -> str:
    if entry.card.suite == "demo":
        return "built in"
    if entry.found is None:
        return "see below" if entry.fault else "–"
    return f"{entry.sets} of {entry.official_sets} sets" if entry.official_sets > 1 else _counts(entry.found)


def _counts(sizes: dict[str, int]) -> str:
    together = next((sizes[name] for name in ("train800val200", "trainval") if name in sizes), None)
    if together is None and "train" in sizes:
        together = sizes["train"] + sizes.get("val", 0)
    return " + ".join(f"{size:,}" for size in (together, sizes.get("test")) if size is not None)


def _show(options: Namespace) -> None:
    from vpt.data.catalog.cards import find_card
    from vpt.data.catalog.overview import describe

    print(describe(find_card(options.name)))


def _verify(options: Namespace) -> None:
    from vpt.data.catalog.verify import verify
    from vpt.screen import console, show

    given: dict[str, Any] = {}
    if options.overrides:
        check_overruled(options.overrides, {"data.root": [options.name]})
        named = {
            arg.partition("=")[0].removeprefix("--data.") for arg in options.overrides if arg.startswith("--data.")
        }
        section = {"class_path": "FolderDataModule", "init_args": {"root": options.name}}
        found = typed_section(section, options.overrides)["init_args"]
        given = {key: value for key, value in found.items() if key in named - {"root"}}
    report = verify(options.name, _root(options), given)
    show(_report(report))
    for sign, sentence in [*(("✗", fault) for fault in report.faults), *(("!", note) for note in report.notes)]:
        print(*wrap(f"{sign} {sentence}", console().width, subsequent_indent="  ", **_WHOLE_PATHS), sep="\n")
    report.check()
    disjoint = ", no file is in two splits" if report.compared else ""
    print(f"✓ every image can be decoded{disjoint}")


def _report(report: Report) -> Any:
    from vpt.screen import Table

    table = Table("list", title=Path(report.name).name, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in ("images", "official", "classes", "per class"):
        table.add_column(header, justify="right")
    table.add_column("histogram")
    for each in report.lists:
        official = "–" if each.official is None else f"{each.official:,}"
        occurring = each.histogram[each.histogram > 0]
        spread = f"{occurring.min():,}–{occurring.max():,}" if len(occurring) else "–"
        classes = f"{len(occurring):,} of {each.classes:,}"
        table.add_row(each.name, f"{each.found:,}", official, classes, spread, _bars(each))
    return table


def _bars(report: ListReport) -> str:
    """Draws images per class, neighbouring classes together where they are many; an empty bin stays blank."""
    import numpy as np

    parts = np.array_split(report.histogram, min(_BINS, len(report.histogram)))
    means = np.array([part.mean() for part in parts])
    levels = np.ceil(means / max(means.max(), 1e-9) * len(_BARS)).astype(int)
    return "".join(_BARS[level - 1] if level else " " for level in levels)


def _prepare(options: Namespace) -> None:
    from vpt.atomic_write import check_writable
    from vpt.data.catalog.download import obtain

    root = _root(options)
    check_writable(root, folder=True)
    folder = obtain(options.name, root, options.source, options.allow_partial)
    print(f"{folder} is ready; `vpt data verify {options.name}` looks at every image")


def _cache(options: Namespace) -> None:
    from vpt.data.cache.content_hashes import cache_folder
    from vpt.data.cache.image_cache import clear, usage

    if cache_folder().is_file():
        raise ConfigError(f"VPT_CACHE is {cache_folder()}, a file: set it to a folder.")
    files, size = clear() if options.clear else usage()
    what = f"{files:,} file{'' if files == 1 else 's'}, {size / 1e6:,.1f} MB"
    print(f"{what} {'removed from' if options.clear else 'in'} {cache_folder()}")


def _corruptions(options: Namespace) -> None:
    from vpt.atomic_write import check_unused
    from vpt.reports.corruption_gallery import corruption_figure, example
    from vpt.reports.style import check_figure, save_figure

    check_figure(options.out)
    check_unused(options.out, [] if options.image is None else [options.image])
    print(f"written to {save_figure(corruption_figure(example(options.image)), options.out)}")
