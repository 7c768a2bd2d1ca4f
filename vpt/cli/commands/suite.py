"""``vpt sweep --tasks ... --methods ...``: every method on every task, what that takes, and the table of all."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.arguments import Parser, check_different, data_section, read_config
from vpt.errors import ConfigError, VPTError

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.experiments.executors import Engine
    from vpt.experiments.forecast import Forecaster, Part
    from vpt.experiments.sweep import Outcome, Plan
    from vpt.experiments.trial import Failure
    from vpt.screen import Table

Config = dict[str, Any]
_OF_TASK = {"task", "dataset", "variant", "root", "name", "num_workers"}
"""Options of data that may differ among tasks which are averaged."""


@dataclass(frozen=True)
class Cell:
    """A method on a task: their names, empty for those of the command line alone, its grid, and what `vpt fit` gets."""

    method: str
    task: str
    grid: Path | None
    args: list[str]

    @property
    def name(self) -> str:
        """Its folder."""
        return "/".join(part for part in (self.method, self.task) if part)


def add_options(parser: Parser) -> None:
    """Adds the options that make a sweep one of many cells."""
    tasks = "a config for each task, of which the data section counts: each is swept, in a folder of its own"
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="CONFIG", help=tasks)
    methods = "a config for each method, over those of -c: each is swept on each task, in METHOD/TASK"
    parser.add_argument("--methods", type=Path, nargs="+", default=[], metavar="CONFIG", help=methods)
    grids = "grids of single methods, by the names of their configs (default: --grid)"
    parser.add_argument("--grid-of", nargs="+", default=[], metavar="METHOD=FILE", help=grids)


def over(args: Sequence[str], *own: str) -> list[str]:
    """Puts configs, or their sections, over those of a command line, and under its flags."""
    configs = [at for at, arg in enumerate(args) if arg.partition("=")[0] in ("-c", "--config")]
    end = configs[-1] + 2 - ("=" in args[configs[-1]]) if configs else 0
    return [*args[:end], *own, *args[end:]]


def cells(options: Namespace, rest: Sequence[str]) -> dict[str, Cell]:
    """The cells of a sweep by their names; a ConfigError where two would share one, or a method has no grid."""
    grids = _grids(options)
    for path in options.methods:
        read_config(path, "name configs of methods, such as configs/method/lora.yaml")
    found = []
    for method in options.methods or [None]:
        for task in options.tasks or [None]:
            own = [] if method is None else ["-c", str(method)]
            own += [] if task is None else ["--data", json.dumps(data_section(task))]
            name, on = ("" if path is None else path.stem for path in (method, task))
            grid = grids.get(name, options.grid)
            if grid is None:
                known = "--grid FILE" + (f", or --grid-of {name}=FILE" if name else "")
                raise ConfigError(f"vpt sweep needs {known}, e.g. configs/sweep/vpt.yaml.")
            found.append(Cell(name, on, grid, over(rest, *own)))
    return {cell.name: cell for cell in found}


def _grids(options: Namespace) -> dict[str, Path]:
    for option, paths in (("--tasks", options.tasks), ("--methods", options.methods)):
        names = [path.stem for path in paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"Two of the {option} are called {twice}, and so would be their folders: rename one.")
    pairs = [pair.partition("=")[::2] for pair in options.grid_of]
    check_different("--grid-of", [name for name, _ in pairs])
    methods = [path.stem for path in options.methods]
    for name, file in pairs:
        if name not in methods or not file:
            known = f"give any of {', '.join(f'{each}=FILE' for each in methods)}" if methods else "give --methods"
            raise ConfigError(f"--grid-of {name}={file} is of none of the --methods: {known}.")
    return {name: Path(file) for name, file in pairs}


@contextmanager
def told(name: str) -> Iterator[None]:
    """Refuses what is refused within in the `name` of a cell, of which no line is told for its seed."""
    seeds = logging.getLogger("lightning.fabric.utilities.seed")
    silent, seeds.disabled = seeds.disabled, seeds.disabled or bool(name)
    try:
        yield
    except VPTError as error:
        if not name:
            raise
        raise ConfigError(f"{name}: {error}") from error
    finally:
        seeds.disabled = silent


def show_forecast(
    configs: Mapping[str, Config], plans: Mapping[str, Plan], engine: Engine, remarks: Sequence[str] = ()
) -> None:
    """Prints what a sweep of several configs, by their folders, takes: a row for each method, or for each of them.

    `remarks` are printed, too. Every model is built once, with random weights, so that what it refuses is refused here.
    """
    from vpt.experiments.executors import RayEngine
    from vpt.experiments.forecast import Forecaster, Part
    from vpt.screen import Table, progress, show

    ray = engine if isinstance(engine, RayEngine) else None
    forecaster = Forecaster(None if ray is None else ray.shares()[0])

    def parts() -> Iterator[tuple[str, Part, Part]]:
        for name, config in configs.items():
            with told(name):
                found = forecaster(name, config, plans[name])
            yield name, *found

    rows: dict[str, tuple[Part, Part]] = {}
    for name, search, final in progress(parts(), "Measuring steps", len(configs), few=1):
        before = rows.get(name.partition("/")[0], (Part(), Part()))
        rows[name.partition("/")[0]] = before[0] + search, before[1] + final
    table = Table(
        *(
            "variant",
            "search: trials",
            "epochs",
            "images",
            "tested: trials",
            "epochs",
            "images",
            "forward only",
            "hours",
        ),
        title="images are passed forward and backward, those of validation and test forward only",
    )
    total = sum((search for search, _ in rows.values()), Part()), sum((final for _, final in rows.values()), Part())
    for name, (search, final) in rows.items() if len(rows) == 1 else [*rows.items(), ("all", total)]:
        counts = [f"{value:,}" for part in (search, final) for value in (part.trials, part.epochs, part.images)]
        both = search + final
        table.add_row(name or "–", *counts, f"{both.validated + both.tested:,}", f"{both.seconds / 3600:.3g}")
    show(table)
    at_once = 1 if ray is None else ray.at_once()
    for sentence in (
        *_hours(total, forecaster, at_once),
        *_remarks(configs, plans),
        *remarks,
        *_missing(configs, forecaster),
    ):
        print(sentence)
    print("nothing was trained")


def _hours(total: tuple[Part, Part], forecaster: Forecaster, at_once: int | None) -> Iterator[str]:
    both = total[0] + total[1]
    hours = both.seconds / 3600
    at_once = None if at_once is None else min(at_once, both.trials)
    if at_once is None:
        yield f"{hours:.3g} hours of trials, shared by as many as the cluster runs at once"
    else:
        yield f"{hours:.3g} hours of trials, {at_once} at once: {hours / at_once:.3g} hours"
    for place in dict.fromkeys(step.place for step in forecaster.steps.values()):
        own = [step for step in forecaster.steps.values() if step.place == place]
        speeds = [1000 * (step.train + step.first) for step in own]
        images = "–".join(map(str, sorted({min(step.images for step in own), max(step.images for step in own)})))
        spread = "–".join(dict.fromkeys(f"{each:.3g}" for each in (min(speeds), max(speeds))))
        yield (
            f"measured on {place}, {images} images at once: {spread} ms an image forward and backward, without "
            "optimiser and reading of images"
        )


def _remarks(configs: Mapping[str, Config], plans: Mapping[str, Plan]) -> Iterator[str]:
    if widen := max(plan.widen for plan in plans.values()):
        yield f"not counted: what --widen {widen} adds, at most {widen} whole trainings a search for each searched key"
    if any(config["trainer"].get("callbacks") or config["trainer"].get("max_time") for config in configs.values()):
        yield "not counted: what callbacks such as early stopping or trainer.max_time leave out"
    names = ("keep_answers", "pace", "metric_learning")
    seconds = [key for key in names if any(c["model"]["init_args"].get(key) is not None for c in configs.values())]
    deltas = [spec for c in configs.values() for spec in c["model"]["init_args"].get("deltas") or ()]
    seconds += ["relocate"] if any(spec.get("relocate") is not None for spec in deltas) else []
    if seconds:
        yield f"not in the hours: the passes of {' and '.join(seconds)}"


def _missing(configs: Mapping[str, Config], forecaster: Forecaster) -> Iterator[str]:
    from vpt.backbones.checkpoints import at_hand

    for sentence in forecaster.missing:
        yield f"missing data, counted by the card: {sentence}"
    models = [config["model"]["init_args"] for config in configs.values()]
    for name, weights in dict.fromkeys((args["backbone"], args.get("weights") or "pretrained") for args in models):
        if not at_hand(name, weights):
            where = "to be fetched from the hub, or --model.weights FILE" if weights == "pretrained" else weights
            yield f"missing weights of {name}: {where}"
    for key in ("init_delta", "init_head"):
        for path in dict.fromkeys(args.get(key) for args in models):
            if path not in (None, "probe") and not Path(path).is_file():
                yield f"missing {key}: {path}"


def unlike(configs: Mapping[str, Config]) -> dict[str, list[str]]:
    """By option of the data, the values that it has among configs of several tasks, where these are more than one."""
    found: dict[str, list[str]] = {}
    sections = [config["data"].get("init_args") or {} for config in configs.values()]
    for key in dict.fromkeys(key for section in sections for key in section if key not in _OF_TASK):
        values = list(dict.fromkeys(str(section.get(key)) for section in sections))
        if len(values) > 1:
            found[key] = values
    return found


def differences(configs: Mapping[str, Config]) -> list[str]:
    """Says that tasks are not of one protocol, and how they become that, where that is so."""
    if not (found := unlike(configs)):
        return []
    told = ", ".join(f"data.{key} ({', '.join(values)})" for key, values in found.items())
    return [f"no means over tasks, which differ in {told}: flags such as --data.{next(iter(found))} make them alike"]


def table(
    found: Mapping[str, Outcome | Failure], configs: Mapping[str, Config], all_cells: Mapping[str, Cell]
) -> Table | None:
    """Tasks by methods, then means and mean ranks; None where there are not several tasks, and methods."""
    from vpt.experiments.trial import Failure
    from vpt.reports.run_report import rank_interval
    from vpt.reports.run_values import means_of, ranks_of
    from vpt.screen import Table

    tasks, methods = (
        list(dict.fromkeys(getattr(cell, part) for cell in all_cells.values())) for part in ("task", "method")
    )
    if len(tasks) < 2 or not methods[0]:
        return None
    names = {(cell.method, cell.task): name for name, cell in all_cells.items()}
    results = {key: each for key, name in names.items() if not isinstance(each := found[name], Failure)}
    shares = {
        method: {task: results[method, task].mean for task in tasks if (method, task) in results} for method in methods
    }
    shown = Table("task", *methods, title="test score (%), mean ± std over seeds, last epoch")
    for task in tasks:
        cells_of = [results.get((method, task)) for method in methods]
        shown.add_row(task, *("failed" if each is None else percent(each) for each in cells_of))
    if not unlike(configs):
        means = {method: means_of(own) for method, own in shares.items()}
        for row in dict.fromkeys(row for own in means.values() for row in own):
            shown.add_row(row, *(f"{100 * own[row]:.1f}" if row in own else "–" for own in means.values()))
    ranks = {row["method"]: row for row in ranks_of(shares)}
    if ranks:
        cells_ = [f"{ranks[method]['mean']:.2f} {rank_interval(ranks[method])}".strip() for method in methods]
        shown.add_row(f"mean rank on {len(next(iter(ranks.values()))['ranks'])} tasks", *cells_)
    return shown


def percent(found: Outcome) -> str:
    """Test score and its deviation over seeds, in percent."""
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.std:.1f}" if len(found.tests) > 1 else "")
