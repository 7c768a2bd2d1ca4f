"""``vpt predict``, ``vpt embed`` and ``vpt calibrate``: a trained model in use, on images that have no labels."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.arguments import (
    DATA_FLAGS,
    DATA_HELP,
    DATA_OVERRIDES,
    FIT_FLAGS,
    SHARD_HELP,
    WEIGHTS_HELP,
    Parser,
    at_least,
    check_different,
    check_effect,
    delta_data,
    number,
    output_file,
    output_folder,
    shard,
)
from vpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vpt.models import TunedModel
    from vpt.models.prediction import Prediction
    from vpt.sharding import Shard

_DELTA = "delta.safetensors of a run, or hf://user/name"
_IMAGES = "image files, folders, or tables (.csv, .tsv, .parquet) with a column path"
_OUT = "the table to write: .csv, .parquet or .jsonl"
_UNKNOWN = "score of unknown images (default: mahalanobis)"
_TABLES = (".csv", ".tsv", ".parquet")
_TEST_IMAGES = "The test images of a run: vpt predict -c RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt"
_UNCALIBRATED: dict[str, str] = {
    "multiclass": "not calibrated: `vpt calibrate` makes probabilities honest, and lets the model decline",
    "multilabel": "labels from a probability of 0.5: `vpt calibrate` finds a threshold for each class",
    "regression": "not calibrated: `vpt calibrate` lets --coverage tell how far the numbers may be off",
}
_share = number(0, 1)


def run(args: list[str]) -> None:
    """Runs one of the commands; ``vpt predict`` with the flags of ``vpt fit`` is of a run's test images."""
    own = {"--delta", "--images"} & {arg.partition("=")[0] for arg in args}
    if args[0] == "predict" and not own and any(FIT_FLAGS.match(arg) for arg in args):
        from vpt.cli.commands import lightning_cli

        lightning_cli.run(args)
    else:
        {"predict": _predict, "embed": _embed, "calibrate": _calibrate}[args[0]](args)


def _parser(command: str, epilog: str | None = None) -> Parser:
    parser = Parser(prog=f"vpt {command}", epilog=epilog)
    parser.add_argument("--delta", required=True, help=_DELTA)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help=_IMAGES)
    parser.add_argument("--out", type=output_file, required=True, help=_OUT)
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--batch-size", type=at_least(1, 10**6), default=64, help="images in a forward pass (64)")
    compiled = "run under torch.compile: it takes a while before the first images"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--shard", type=shard, help=SHARD_HELP)
    parser.set_defaults(command=command)
    return parser


def _predict(args: list[str]) -> None:
    """Parses the command line and classifies images."""
    parser = _parser("predict", _TEST_IMAGES)
    parser.add_argument("--top", type=at_least(1, 1000), help="how many classes are told (default: 1)")
    parser.add_argument("--max-risk", type=_share, help="decline as unsure, so that at most this share is wrong")
    parser.add_argument("--coverage", type=_share, help="tell the classes that hold the right one this often")
    parser.add_argument("--set-rule", choices=("lac", "aps"), help="how these are chosen (default: lac)")
    parser.add_argument("--false-alarms", type=_share, help="decline as unknown, and so many known images at most")
    parser.add_argument("--page", type=output_folder, help="folder for a page of the surest and least sure images")
    options = parser.parse_args(args[1:])
    if options.coverage is None:
        check_effect(options, "without --coverage", "set_rule")
    if options.page is not None:
        check_effect(options, "with --page, which is of all images", "shard")
        from vpt.atomic_write import check_unused

        check_unused(options.page / "index.html")

    model, images = _model_and_images(options)
    if model.targets != "multiclass":
        check_effect(options, f"with a model of {model.targets} targets", "top", "set_rule")
    declines = options.max_risk is not None or options.false_alarms is not None
    if model.targets == "regression" and options.page is not None:
        raise ConfigError("--page shows images by class, of which a model of numbers has none: leave it out.")
    sheet = None
    if options.page is not None:
        from vpt.data.transforms import Preset
        from vpt.reports.contact_sheet import ContactSheet

        sheet = ContactSheet(model.class_names, Preset.from_dict(model.preset).channels)

    def told(each: Prediction) -> dict[str, Any]:
        if sheet is not None:
            sheet.add(each)
        return _row(each, options, model, declines)

    def rows(some: Sequence[Path]) -> Iterator[dict[str, Any]]:
        top = len(model.class_names) if model.targets == "multilabel" else options.top or 1
        rates = {name: getattr(options, name) for name in ("max_risk", "coverage", "false_alarms", "batch_size")}
        return map(told, model.predictions(some, top, set_rule=options.set_rule or "lac", **rates))

    counts = _write(options, images, rows, "Predicting")
    if counts is None:
        return
    if sheet is not None:
        print(f"written to {sheet.write(options.page)}")
    if declines:
        print(f"{counts['answered']:,} answered, {counts['declined']:,} declined")
    elif model.calibration is None:
        print(_UNCALIBRATED[model.targets])
    _end(counts, options.out)


def _write(
    options: argparse.Namespace, images: Sequence[Path], rows: Callable[[Sequence[Path]], Iterator[Any]], what: str
) -> Counter[str] | None:
    """Writes the table, and counts its rows; None of a shard, where others are missing."""
    from vpt.row_files import row_writer
    from vpt.sharding import dissolve, fill, together

    def shown(some: Sequence[Path]) -> Iterator[Any]:
        return _with_progress(rows(some), len(some), what)

    if (own := options.shard) is None:
        found: Iterator[Any] | None = shown(images)
    else:
        folder = options.out.with_name(f"{options.out.name}.shards")
        rows(())  # refuses options before there is a folder
        _claim(folder, own, options, images)
        fill(folder, own, images, options.batch_size, shown)
        found = together(folder, own, images, options.batch_size)
    if found is None:
        print(f"shard {own} is done: the last one to be done writes {options.out}")
        return None
    counts: Counter[str] = Counter()
    with row_writer(options.out) as write:
        for row in found:
            counts["faults" if row["error"] else "declined" if row.get("declined") else "answered"] += 1
            write(row)
    if own is not None:
        dissolve(folder)
    print(f"written to {options.out}")
    return counts


def _claim(folder: Path, own: Shard, options: argparse.Namespace, images: Sequence[Path]) -> None:
    """Refuses shards of other images, by names and sizes, of another model or other options."""
    import torch

    from vpt.hub.client import local
    from vpt.run_record import file_identity, identity
    from vpt.sharding import claim
    from vpt.version import versions

    apart = ("delta", "images", "weights", "out", "shard", "page")
    plan = {key: value for key, value in vars(options).items() if key not in apart}
    plan["images"] = identity([[str(path), path.stat().st_size if path.is_file() else None] for path in images])
    plan |= {"delta": file_identity(local(options.delta)), "versions": versions(), "cuda": torch.cuda.is_available()}
    claim(folder, own, plan)


def _row(each: Prediction, options: argparse.Namespace, model: TunedModel, declines: bool) -> dict[str, Any]:
    """What is written of an image."""
    if model.targets == "regression":
        values: dict[str, Any] = {"path": each.path}
        for name in model.class_names:
            values[f"value_{name}"] = None if each.values is None else each.values[name]
            if options.coverage is not None:
                values[f"margin_{name}"] = None if each.margins is None else each.margins[name]
        return values | {"error": each.fault}
    if model.targets == "multilabel":
        shares = dict(each.top)
        chances = {
            f"probability_{name}": round(shares[name], 6) if name in shares else None for name in model.class_names
        }
        return {"path": each.path, "labels": list(each.labels or ()), **chances, "error": each.fault}
    told: dict[str, Any] = {"path": each.path, "class": each.label, "probability": _rounded(each)}
    for place in range(1, options.top or 1):
        name, share = each.top[place] if place < len(each.top) else ("", None)
        told |= {f"class_{place + 1}": name, f"probability_{place + 1}": None if share is None else round(share, 6)}
    if options.coverage is not None:
        told["set"] = list(each.classes or ())
    if model.calibration is not None:
        told["distance"] = each.distance
    return told | ({"declined": each.declined} if declines else {}) | {"error": each.fault}


def _rounded(each: Prediction) -> float | None:
    return None if each.fault else round(each.probability, 6)


def _embed(args: list[str]) -> None:
    """Parses the command line and writes features."""
    options = _parser("embed").parse_args(args[1:])

    from vpt.models.prediction import answers

    model, images = _model_and_images(options)
    width = model.backbone.num_features
    columns = [f"feature_{place}" for place in range(width)]

    def rows(some: Sequence[Path]) -> Iterator[dict[str, Any]]:
        for group, _, features in answers(model, some, options.batch_size):
            found = iter(features.tolist())
            for photo in group:
                values = [None] * width if photo.fault else next(found)
                yield {"path": photo.name, **dict(zip(columns, values, strict=True)), "error": photo.fault}

    if (counts := _write(options, images, rows, "Reading")) is not None:
        _end(counts, options.out)


def _model_and_images(options: argparse.Namespace) -> tuple[TunedModel, list[Path]]:
    """The model, and all paths."""
    check_different("--images", options.images)
    from vpt.atomic_write import check_unused
    from vpt.data.inference import each_image
    from vpt.data.list_files import read_table
    from vpt.hub.client import local
    from vpt.models.delta_file import load_classifier
    from vpt.row_files import check_suffix

    check_suffix(options.out)
    check_unused(options.out)
    for place in options.images:
        if not place.exists():
            raise DataError(f"{place!s:.200} does not exist: name image files, folders or tables.")
    model = load_classifier(local(options.delta), options.weights)
    paths: list[Path] = []
    for place in options.images:
        if place.suffix.lower() in _TABLES and place.is_file():
            paths += [place.parent / path for path in read_table(place, ["path"])[0]["path"]]
        elif place.is_dir():
            paths += each_image(place, model.backbone.raw)
        else:
            paths.append(place)
    import torch

    from vpt.backbones.compilation import compile_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.compile:
        compile_for(model, device)
    return model.to(device), paths


def _with_progress(items: Iterator[Any], count: int, what: str) -> Iterator[Any]:
    from rich.progress import track

    from vpt.screen import console

    return iter(track(items, what, total=count, console=console(stderr=True)))


def _end(counts: Counter[str], out: Path) -> None:
    if counts["faults"]:
        raise DataError(
            f"{counts['faults']:,} of {counts.total():,} images could not be read: the column error of {out} says why."
        )


def _calibrate(args: list[str]) -> None:
    """Parses the command line and writes the calibrated file."""
    parser = Parser(prog="vpt calibrate", epilog=DATA_OVERRIDES)
    parser.onward = DATA_FLAGS
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--unknown", choices=("mahalanobis", "knn"), help=_UNKNOWN)
    parser.add_argument("--test", action="store_true", help="measure on the test images what is promised")
    parser.add_argument("--batch-size", type=at_least(1, 10**6), default=64, help="images in a forward pass (64)")
    parser.add_argument("--out", type=Path, help="file to write (default: calibrated.safetensors beside the delta)")
    options, overrides = parser.parse_known_args(args[1:])

    from vpt.atomic_write import check_unused
    from vpt.robustness.calibrate import calibrate

    out = options.out or options.delta.parent / "calibrated.safetensors"
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out} is no name of a delta file: let it end in .safetensors.")
    check_unused(out)
    check_unused(out.with_suffix(".json"))
    data = delta_data(options.delta, options.data, overrides)
    told = calibrate(options.delta, data, out, options.unknown, options.batch_size, options.weights, options.test)
    _tell(told)
    print(f"written to {out}")
    rates = "" if "label_thresholds" in told else " --coverage 0.9" if "margins" in told else " --false-alarms 0.05"
    print(f"use it:    vpt predict --delta {out}{rates} --images FOLDER --out predictions.csv")


def _tell(told: dict[str, Any]) -> None:
    images = f"{told['data']['images']:,} validation images"
    if "label_thresholds" in told:
        print(f"a threshold for each of {len(told['label_thresholds'])} classes by {images}: mean F1 there ", end="")
        print(f"{100 * told['f1']['before']:.1f} % before, {100 * told['f1']['after']:.1f} % after")
        return
    if "margins" in told:
        print(f"margins by {images}")
        return
    before, after = (100 * told["calibration_error"][when] for when in ("before", "after"))
    scale = (
        "none (every image is right, or the answers say nothing)"
        if told["temperature"] is None
        else f"{told['temperature']:.3f}"
    )
    print(f"temperature {scale} by {told['data']['images']:,} validation images, calibration error there ", end="")
    print(f"{before:.1f} % before, {after:.1f} % after")
    if "test" not in told:
        return
    from vpt.screen import Table, show

    table = Table("asked for", "measured on test images (95 % interval)", title="What is promised, and what holds")

    def interval(found: list[float], scale: float = 100, unit: str = " %") -> str:
        value, low, high = (scale * each for each in found)
        return f"{value:.1f}{unit} ({low:.1f} to {high:.1f})"

    for kind, rates in told["test"].items():
        name, _, rule = kind.partition("_") if kind.startswith("coverage") else (kind.replace("_", " "), "", "")
        for rate, found in rates.items():
            asked = f"{name} {100 * float(rate):g} %" + (f" ({rule.upper()})" if rule else "")
            if found is None:
                said = "too few validation images, or too many errors"
            elif kind == "max_risk":
                wrong = interval(found["wrong"]) if found["wrong"] else "none"
                said = f"{interval(found['answered'])} answered, wrong {wrong}"
            elif kind == "false_alarms":
                said = f"{interval(found['unknown'])} count as unknown"
            else:
                said = f"{interval(found['covered'])} hold the truth, {interval(found['size'], 1, ' classes')}"
            table.add_row(asked, said)
    show(table)
