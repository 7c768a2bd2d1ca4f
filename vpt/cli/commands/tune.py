"""``vpt tune``: from a folder of labelled photos to a model, within a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.arguments import DATA_FLAGS, DATA_OVERRIDES, Parser, at_least, number, output_folder, typed_section
from vpt.cli.config_checks import check_overruled
from vpt.errors import ConfigError, VPTError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vpt.experiments.tune import Tuned
    from vpt.robustness import RobustnessResult

_FOLDER = "folders of classes, or a table (docs/data.md)"


def run(args: list[str]) -> None:
    """Parses the command line, tunes, and writes model and page."""
    parser = Parser(prog="vpt tune", epilog=DATA_OVERRIDES)
    parser.onward = DATA_FLAGS
    parser.add_argument("folder", type=Path, help=_FOLDER)
    parser.add_argument("--minutes", type=number(0.1, 100_000), default=30, help="for everything (default: 30)")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="timm's name (vit_tiny_patch16_224)")
    parser.add_argument("--weights", default="pretrained", help="a file of them (default: the timm hub's)")
    parser.add_argument("--seed", type=at_least(0, 2**32 - 1), default=0, help="of everything (default: 0)")
    calibrate = "leave validation images out of the final training, to calibrate the model"
    parser.add_argument("--calibrate", action="store_true", help=calibrate)
    parser.add_argument("--out", type=output_folder, required=True, help="folder of model, page and runs")
    parser.add_argument("--resume", action="store_true", help="go on in --out with what was interrupted")
    options, overrides = parser.parse_known_args(args[1:])
    if not options.resume and options.out.is_dir() and any(options.out.iterdir()):
        raise ConfigError(f"{options.out} is not empty: --resume goes on in it, or name another --out.")
    if options.out.resolve().is_relative_to(options.folder.resolve()):
        raise ConfigError(f"--out {options.out} lies among the images, which it would be taken for: name another.")

    from vpt.cli.warning_filters import hush
    from vpt.experiments.tune import MODEL_FILE, base_config, tune

    hush()  # again: Lightning adds filters of its own when it is imported
    config = base_config(
        _data(options.folder, options.seed, overrides), options.backbone, options.weights, options.seed
    )
    try:
        tuned = tune(config, options.minutes, options.out, options.calibrate, lambda line: print(line, flush=True))
    except (KeyboardInterrupt, SystemExit):
        print("To go on: the same command with --resume", file=sys.stderr)
        raise
    model = options.out / MODEL_FILE
    repeat = f"vpt rerun {tuned.final}"
    if options.calibrate:
        _calibrate(tuned, model, options.weights)
    print(f"written to {model}")
    from vpt.reports.tune_report import tune_report

    late = tuned.seconds["all"] > tuned.seconds["given"]
    robustness = None if late else _corrupted(tuned, model, options.out, options.weights)
    figures = {} if late else _attention(tuned, model, options.weights)
    for line in tune_report(tuned, options.weights, options.out, repeat, robustness, figures):
        print(line)
    print(f"written to {options.out / 'report.html'}")
    print(f"repeat it: {repeat}")
    print(f"use it:    vpt predict --delta {model} --images FOLDER --out predictions.csv")


def _data(folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """What is said of the images; what the command decides is refused."""
    from vpt.experiments.tune import BATCH

    decided: dict[str, list[Any]] = {"root": [folder], "batch_size": [BATCH], "train_on_val": ["what --calibrate says"]}
    check_overruled(overrides, {f"data.{key}": values for key, values in decided.items()})
    section = {"class_path": "FolderDataModule", "init_args": {"root": str(folder), "split_seed": seed}}
    given = {arg.partition("=")[0].removeprefix("--data.") for arg in overrides if arg.startswith("--data.")}
    found = typed_section(section, overrides)["init_args"]
    return {key: value for key, value in found.items() if key in {*section["init_args"], *given}}


def _calibrate(tuned: Tuned, model: Path, weights: str) -> None:
    from vpt.robustness.calibrate import calibrate

    calibrate(model, tuned.data, model, weights=weights, test=tuned.tests > 0)


def _corrupted(tuned: Tuned, model: Path, out: Path, weights: str) -> RobustnessResult | None:
    from vpt.robustness import run as evaluate

    if not tuned.tests:
        return None
    place, half = out / "robustness", tuned.precision != "32-true"
    return evaluate(model, tuned.data, [1.0], place, max_images=200, severities=(3,), weights=weights, bf16=half)


def _attention(tuned: Tuned, model: Path, weights: str) -> dict[str, Figure]:
    from vpt.visualize import scene_from_data
    from vpt.visualize.figure_kinds import KINDS, draw

    try:
        scene: Any = scene_from_data(model, tuned.data, weights)
        kind = next((kind for kind in ("compare", "class", "share") if not KINDS[kind].lacks(scene)), None)
        return {} if kind is None else {"attention": draw(scene, kind)}
    except VPTError:  # a backbone whose attention cannot be shown
        return {}
