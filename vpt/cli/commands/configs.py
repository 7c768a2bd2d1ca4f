"""``vpt configs``: the configs that come with the package, listed or copied."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

from vpt.atomic_write import atomic_write, check_unused, check_writable
from vpt.cli.arguments import Parser, config_folder, output_folder
from vpt.errors import UnknownNameError


def run(args: list[str]) -> None:
    """Parses the command line, and lists or copies, never over another file."""
    parser = Parser(prog="vpt configs")
    parser.add_argument("names", nargs="*", help="files or folders, e.g. demo.yaml or vtab (default: all)")
    parser.add_argument("--copy", type=output_folder, metavar="FOLDER", help="copy them there, e.g. to configs")
    options = parser.parse_args(args[1:])
    found = sorted(path.relative_to(config_folder()) for path in config_folder().rglob("*.yaml"))
    chosen = [path for path in found if not options.names or _wanted(path, options.names)]
    for name in options.names:
        if not any(_wanted(path, [name]) for path in found):
            raise UnknownNameError("config", name, [str(path) for path in found])
    if options.copy is None:
        width = max(len(str(path)) for path in chosen)
        for path in chosen:
            print(f"{path!s:<{width}}  {_title(config_folder() / path)}")
        return
    for path in chosen:
        check_unused(options.copy / path)
        check_writable(options.copy / path)
    for path in chosen:
        with atomic_write(options.copy / path) as partial:
            shutil.copyfile(config_folder() / path, partial)
    print(f"{len(chosen)} files copied to {options.copy}")


def _wanted(path: Path, names: list[str]) -> bool:
    return any(str(path) == name or name.rstrip("/") in map(str, path.parents) for name in names)


def _title(path: Path) -> str:
    """The first sentence of the comment at its head."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    return re.split(r"\. (?=[A-Za-z])", " ".join(line.removeprefix("# ") for line in lines))[0].rstrip(".")
