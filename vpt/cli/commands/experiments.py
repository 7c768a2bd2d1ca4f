"""``vpt sweep|fewshot|combine|scale|pretrain|transfer``: many runs as one experiment."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vpt.cli.arguments import (
    FIT_FLAGS,
    Parser,
    at_least,
    check_different,
    check_effect,
    data_section,
    number,
    output_folder,
    read_config,
    read_yaml,
)
from vpt.cli.commands import suite
from vpt.cli.config_checks import check_end, check_overruled
from vpt.errors import ConfigError, DataError, VPTError
from vpt.run_record import CONFIG_FILE

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.experiments.executors import Engine
    from vpt.experiments.sweep import Outcome, Plan
    from vpt.experiments.trial import Failure
    from vpt.screen import Table

HALVING = 2
"""Of a search that does not say it (`benchmarks.halving`)."""
_FIT = "All other arguments are those of vpt fit: -c CONFIG, --data.root FOLDER, --model.base_lr 0.1, ..."


def run(args: list[str]) -> None:
    """Parses the command line, runs the experiment, and prints its table."""
    commands = {"sweep": _sweep, "fewshot": _fewshot, "combine": _combine, "scale": _scale}
    commands |= {"pretrain": _pretrain, "transfer": _transfer}
    commands[args[0]](Parser(prog=f"vpt {args[0]}", epilog=_FIT), args[1:])


def _parsed(parser: Parser, args: list[str], plan: bool = True, dry: bool = False) -> tuple[Namespace, list[str]]:
    """The options of a command, to which those of all are added, and what is for `vpt fit`."""
    if plan:
        grid = "YAML: what to search, e.g. configs/sweep/vpt.yaml (default: nothing)"
        parser.add_argument("--grid", type=Path, help=grid)
        seeds = "of the final runs (default: the grid's; 42 44 82 100 800)"
        parser.add_argument("--seeds", type=at_least(0, 2**32 - 1), nargs="+", help=seeds)
        halving = "keep the best 1/N of the grid at each rung; 1 trains all of it (default: 2)"
        parser.add_argument("--halving", type=at_least(1), metavar="N", help=halving)
        first = "share of the training before which no rung lies (default: 0.125)"
        parser.add_argument("--first-rung", type=number(0, 0.999), metavar="SHARE", help=first)
        widen = "go on beyond an end of the grid that is the best, for up to N rounds (default: none)"
        parser.add_argument("--widen", type=at_least(1), metavar="N", help=widen)
    if dry:
        told = "train nothing: check all, and print trials, epochs, images, and hours by a measured step"
        parser.add_argument("--dry-run", action="store_true", help=told)
    parser.add_argument("--out", type=output_folder, required=True, help="folder of the experiment")
    parser.add_argument("--resume", action="store_true", help="resume in --out; finished trials are not repeated")
    parser.add_argument("--serial", action="store_true", help="one trial after another in this process, without Ray")
    parser.add_argument("--workers", type=at_least(1), help="trials at once (default: what machine or cluster holds)")
    parser.add_argument(
        "--cpus-per-trial", type=at_least(1), help="and threads (default: the machine's, shared evenly)"
    )
    parser.add_argument("--gpus-per-trial", type=number(0), help="0.25 runs four on one (default: 1 if there are any)")
    together = "so many trials of one model train as one, on the same backbone; auto: what memory holds (default: 1)"
    parser.add_argument("--together", type=_number_or_auto, metavar="K", help=together)
    parser.add_argument("--address", help="of a running Ray cluster, `auto` or HOST:PORT (default: this machine)")
    if plan:
        parser.onward = FIT_FLAGS
    options, rest = parser.parse_known_args(args)
    if plan:
        check_different("--seeds", options.seeds or ())
    if options.serial:
        check_effect(options, "with --serial", "workers", "cpus_per_trial", "gpus_per_trial", "address")
    nothing = dry and options.dry_run
    if nothing:
        check_effect(options, "with --dry-run, whose hours are of one trial a core or device", "together")
    if not nothing and not options.resume and options.out.is_dir() and any(options.out.iterdir()):
        raise ConfigError(f"{options.out} is not empty: --resume goes on in it, or name another --out.")
    return options, rest


def _engine(options: Namespace) -> Engine:
    from vpt.experiments.executors import RayEngine, serially

    together = options.together or 1
    if options.serial:
        return partial(serially, together=together)
    return RayEngine(options.address, options.cpus_per_trial, options.gpus_per_trial, options.workers, together)


def _number_or_auto(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(at_least(1)(text))


_number_or_auto.__name__ = "whole number or auto"


def _plan(options: Namespace, rest: list[str]) -> Plan:
    from vpt.experiments.sweep import SEEDS, Plan

    if options.grid is not None:
        plan = read_plan(options.grid, rest, options.seeds)
        first = plan.first_rung if options.first_rung is None else options.first_rung
        plan = replace(plan, halving=_halving(options, plan), first_rung=first, widen=options.widen or 0)
    elif any(each is not None for each in (options.halving, options.first_rung, options.widen)):
        raise ConfigError("--halving, --first-rung and --widen are of a grid: give --grid FILE, too.")
    else:
        plan = Plan({}, seeds=tuple(options.seeds or SEEDS))
    both = {key: [plan.choose[key], plan.retrain[key]] for key in plan.choose.keys() & plan.retrain.keys()}
    check_overruled(rest, plan.grid | both | {"seed_everything": plan.seeds})
    return plan


def _halving(options: Namespace, plan: Plan) -> int | None:
    """What is asked for, or the default, which is none where the grid is to be averaged or searches the epochs."""
    given: int | None = options.halving
    whole = getattr(options, "ensemble", False) or any(key.startswith("trainer.max_") for key in plan.grid)
    return (None if whole else HALVING) if given is None else None if given == 1 else given


def read_plan(path: Path, args: list[str], seeds: Sequence[int] | None = None) -> Plan:
    """Reads a grid file: YAML with ``grid`` by dotted keys, and perhaps ``choose``, ``retrain`` and ``seeds``.

    `args` are those of `vpt fit`, which say what keys and values there are; `seeds` count instead of the file's. Raises
    a ConfigError if it is none, or has a key or a value that `vpt fit` would refuse.
    """
    from vpt.cli.commands.lightning_cli import typed
    from vpt.experiments.sweep import SEEDS, Plan

    content = read_config(path, "give a grid file, such as configs/sweep/rates.yaml")
    known = {"grid", "choose", "retrain", "seeds"}
    if "grid" not in content or content.keys() - known:
        raise ConfigError(f"{path} is no grid file: it has grid, and may have choose, retrain and seeds.")
    parts = [content.get(key) or {} for key in ("grid", "choose", "retrain")]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{path} is no grid file: grid, choose and retrain have a line for each key.")
    grid, choose, retrain = parts
    for key, values in grid.items():
        if not isinstance(values, list):
            raise ConfigError(f"{path}: {key} needs a list of values to try, got {values!r}.")
    wanted: Any = seeds or content.get("seeds", SEEDS)
    value_of = typed(args)
    try:
        return Plan(
            {key: [value_of(key, value) for value in values] for key, values in grid.items()},
            {key: value_of(key, value) for key, value in choose.items()},
            {key: value_of(key, value) for key, value in retrain.items()},
            tuple(dict.fromkeys(wanted)) if isinstance(wanted, list | tuple) else (wanted,),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _config(rest: list[str], missing: bool = False) -> dict[str, Any]:
    """What a trial is, of data that may be `missing`; refuses what experiments decide for themselves."""
    from vpt.cli.commands.lightning_cli import resolve
    from vpt.tasks.build import settle

    if any(arg.partition("=")[0] == "--ckpt_path" for arg in rest):
        raise ConfigError("--ckpt_path is of `vpt fit`: --resume goes on in --out.")
    config = resolve(rest, data=not missing)
    if missing:
        with suppress(DataError):
            settle(config)
    check_end(config["trainer"])
    for key, unused in (("logger", True), ("fast_dev_run", False), ("barebones", False)):
        if config["trainer"].get(key, unused) != unused:
            raise ConfigError(f"trainer.{key} is of `vpt fit`: trials log to TensorBoard in their own folders.")
    return config


def _sweep(parser: Parser, args: list[str]) -> None:
    from vpt.experiments.sweep import sweep
    from vpt.experiments.variants import sweep_variants
    from vpt.screen import progress

    suite.add_options(parser)
    options, rest = _parsed(parser, args, dry=True)
    if options.grid is None and not options.grid_of:
        raise ConfigError("vpt sweep needs --grid FILE, e.g. configs/sweep/vpt.yaml.")
    cells = suite.cells(options, rest)
    configs, plans = {}, {}
    for name, config, plan in progress(_read(cells, options), "Reading the configs", len(cells), few=1):
        configs[name], plans[name] = config, plan
    remarks = suite.differences(configs) if options.tasks and options.methods else []
    if options.dry_run:
        suite.show_forecast(configs, plans, _engine(options), remarks)
    elif not options.tasks and not options.methods:
        _show({"": sweep(configs[""], plans[""], options.out, _engine(options))}, options.out)
    else:
        found = sweep_variants(configs, plans, options.out, _engine(options))
        _show(found, options.out, suite.table(found, configs, cells), remarks)


def _read(cells: Mapping[str, suite.Cell], options: Namespace) -> Iterator[tuple[str, dict[str, Any], Plan]]:
    """Config and plan of each cell, by its name."""
    plans: dict[Any, Plan] = {}
    for name, cell in cells.items():
        with suite.told(name):
            config = _config(cell.args, options.dry_run)
            # The classes of model and data say in which types values are; to read a grid takes longer than a config.
            kind = cell.grid, cell.method, config["model"]["class_path"], config["data"]["class_path"]
            if kind not in plans:
                plans[kind] = _plan(Namespace(**vars(options) | {"grid": cell.grid}), cell.args)
        yield name, config, plans[kind]


def _fewshot(parser: Parser, args: list[str]) -> None:
    from vpt.experiments.variants import by_shots, few_shot_plan

    parser.add_argument("--shots", type=at_least(1), nargs="+", required=True, help="training images of each class")
    together = "choose nothing: train the whole grid and average its answers (no validation images are needed)"
    parser.add_argument("--ensemble", action="store_true", help=together)
    options, rest = _parsed(parser, args, dry=True)
    check_different("--shots", options.shots)
    if options.ensemble:
        check_effect(options, "with --ensemble, which trains the whole grid with every seed", "dry_run")
    plan = few_shot_plan(_plan(options, rest))
    check_overruled(rest, {"data.shots": options.shots, "data.subset_seed": plan.seeds})
    _vary(by_shots(_config(rest, options.dry_run), options.shots), plan, options, options.ensemble)


def _combine(parser: Parser, args: list[str]) -> None:
    from vpt.deltas.registry import read_specs
    from vpt.experiments.variants import combinations

    deltas = "names or YAML such as '{name: lora, rank: 4}' (default: the config's)"
    parser.add_argument("--deltas", nargs="+", help=deltas)
    options, rest = _parsed(parser, args, dry=True)
    config = _config(rest, options.dry_run)
    if options.deltas:
        check_overruled(rest, {"model.deltas": options.deltas})
    given = options.deltas or config["model"]["init_args"].get("deltas")
    if not given:
        mend = "--deltas, or a config with deltas, e.g. -c configs/method/prompt_lora.yaml"
        raise ConfigError(f"vpt combine needs {mend}.")
    found = [read_yaml(each) if isinstance(each, str) else dict(each) for each in given]
    named = [{"name": each} if isinstance(each, str) else each for each in found]
    read_specs(named)
    _vary(combinations(config, named), _plan(options, rest), options)


def _scale(parser: Parser, args: list[str]) -> None:
    from vpt.backbones import input_size
    from vpt.experiments.variants import by_backbone

    parser.add_argument("--backbones", nargs="+", required=True, help="timm's names")
    parser.add_argument("--weights-of", nargs="*", default=[], metavar="NAME=FILE", help="weights of single backbones")
    options, rest = _parsed(parser, args, dry=True)
    check_different("--backbones", options.backbones)
    check_overruled(rest, {"model.backbone": options.backbones})
    pairs = [pair.partition("=")[::2] for pair in options.weights_of]
    check_different("--weights-of", [name for name, _ in pairs])
    for name, file in pairs:
        if name not in options.backbones or not file:
            known = ", ".join(f"{each}=FILE" for each in options.backbones)
            raise ConfigError(f"--weights-of {name}={file} is of none of the --backbones: give any of {known}.")
        if file != "pretrained" and not file.startswith("random") and not Path(file).is_file():
            raise ConfigError(f"--weights-of {name}: there is no file {file:.200}.")
    files = dict(pairs)
    for name in options.backbones:
        input_size(name)
    _vary(by_backbone(_config(rest, options.dry_run), options.backbones, files), _plan(options, rest), options)


def _vary(variants: Mapping[str, dict[str, Any]], plan: Plan, options: Namespace, together: bool = False) -> None:
    from vpt.experiments.hyperparameter_ensemble import ensemble_variants
    from vpt.experiments.variants import sweep_variants

    if options.dry_run:
        suite.show_forecast(variants, dict.fromkeys(variants, plan), _engine(options))
        return
    run = ensemble_variants if together else sweep_variants
    _show(run(variants, plan, options.out, _engine(options)), options.out)


def _pretrain(parser: Parser, args: list[str]) -> None:
    from vpt.experiments.pretrain import compare

    tasks = "a config for each task, of which the data section counts"
    parser.add_argument("--tasks", type=Path, nargs="+", required=True, help=tasks)
    options, rest = _parsed(parser, args)
    configs = {path.stem: _config(_on_task(rest, path)) for path in options.tasks}
    if len(configs) < len(options.tasks):
        raise ConfigError("Two of the --tasks have one file name, which is what their runs are called: rename one.")
    plan = _plan(options, _on_task(rest, options.tasks[0]))
    _show(compare(configs, plan, options.out, _engine(options)), options.out)


def _on_task(rest: list[str], task: Path) -> list[str]:
    """Puts the data section of a task's config over the other configs, and under the flags."""
    return suite.over(rest, "--data", json.dumps(data_section(task)))


def _transfer(parser: Parser, args: list[str]) -> None:
    from vpt.experiments.transfer import tested_record, transfer
    from vpt.screen import Table, show

    parser.add_argument("runs", type=Path, nargs="+", help="a finished run for each task")
    modes = "init: train from the other task's delta; frozen: fit a head on it (default: init)"
    parser.add_argument("--mode", nargs="+", choices=["init", "frozen"], default=["init"], help=modes)
    options, _ = _parsed(parser, args, plan=False)
    check_different("transfer", options.runs)
    check_different("--mode", options.mode)
    if "init" not in options.mode:
        unused = ("serial", "together", "workers", "cpus_per_trial", "gpus_per_trial", "address")
        check_effect(options, "with --mode frozen", *unused)
    for folder in options.runs:
        tested_record(folder)  # before data are read
    configs = {folder: _config(["-c", str(folder / CONFIG_FILE)]) for folder in options.runs}
    for mode in options.mode:
        matrix = transfer(configs, options.out, _engine(options), mode)
        table = Table("from \\ to", *matrix, title=f"test top-1 (%), {mode}; diagonal: stored, and reproduced")
        for source, row in matrix.items():
            table.add_row(source, *(f"{100 * value:.1f}" for value in row.values()))
        show(table)
    print(f"written to {options.out}")


def _show(
    found: Mapping[str, Outcome | Failure], out: Path, table: Table | None = None, remarks: Sequence[str] = ()
) -> None:
    """Prints the table of all, or another one, and what there is to say; a VPTError where a variant has no result."""
    from vpt.experiments.trial import Failure
    from vpt.screen import show

    outcomes = {name: each for name, each in found.items() if not isinstance(each, Failure)}
    failed = {name: each.reason for name, each in found.items() if isinstance(each, Failure)}
    if outcomes:
        show(table or _table(outcomes, out))
        print(*remarks, sep="\n", end="\n" if remarks else "")
        _remark(outcomes, out)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    print(f"written to {out}")
    if failed:
        name, reason = next(iter(failed.items()))
        raise VPTError(f"{len(failed)} of {len(found)} variants gave no result, {name} since: {reason}")


def _table(outcomes: Mapping[str, Outcome], out: Path) -> Table:
    from vpt.screen import Table

    scores = " or ".join(dict.fromkeys(found.score for found in outcomes.values()))
    title = f"{scores} (%), mean ± std over seeds, last epoch"
    table = Table("variant", "chosen", "val", "test", "seeds", title=title)
    for name, found in outcomes.items():
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in found.chosen.items())
        val = "–" if found.val is None else f"{100 * found.val:.1f}"
        averaged = "–".join(map(str, sorted({*found.members.values()})))
        chosen = chosen or (f"mean of {averaged} of {len(found.tried)} points" if found.members else "–")
        table.add_row(name or out.name, chosen, val, suite.percent(found), str(len(found.tests)))
    return table


def _remark(outcomes: Mapping[str, Outcome], out: Path) -> None:
    from vpt.experiments.sweep import beyond

    trained, whole = (sum(found.epochs[which] for found in outcomes.values()) for which in (0, 1))
    seconds, images = (sum(getattr(found, key) for found in outcomes.values()) for key in ("seconds", "images"))
    if trained < whole:
        print(f"halving trained {trained} of the grid's {whole} epochs: {whole - trained} saved")
    if seconds:
        print(f"{images:,} images in {seconds:,.0f} s of trials: {images / seconds:.1f} images/s per trial")
    if ends := [name or out.name for name, found in outcomes.items() if beyond(found.chosen, found.tried)]:
        print(
            f"the best of the values tried lies at their end ({', '.join(ends)}): a larger --widen N goes on beyond it"
        )
    for name, found in outcomes.items():
        for row in found.tried:
            if "failed" in row:
                print(f"failed: {name} {row}")
        for seed, reason in found.failed.items():
            print(f"failed: {name} seed {seed}: {reason}")
