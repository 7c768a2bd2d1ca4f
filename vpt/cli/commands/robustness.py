"""``vpt robustness``: delta files in and out of distribution at every α, heads for α = 0, comparisons, and soups."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from vpt.cli.arguments import DATA_HELP, DATA_OVERRIDES, Parser, config_data, delta_data
from vpt.errors import ConfigError


def run(args: list[str]) -> None:
    """Parses the command line, and does what it says."""
    options, overrides = _parser().parse_with_data(args[1:])
    options.action(options, overrides)


def _run(options: Namespace, overrides: list[str]) -> None:
    deltas = list(options.delta)
    if options.out is not None and len(deltas) > 1:
        raise ConfigError("--out is for one delta: each of several is written to robustness/ beside it.")
    for options.delta in deltas:
        _measure(options, overrides)


def _measure(options: Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from vpt.data.corruptions import BASIC, CORRUPTIONS
    from vpt.robustness.evaluation.evaluate import run as measure

    out = options.out or options.delta.parent / "robustness"
    result = measure(
        delta=options.delta,
        data=delta_data(options.delta, options.data, overrides),
        alphas=options.alphas,
        out=out,
        anchor=options.anchor,
        max_images=options.max_images,
        severities=options.severities,
        batch_size=options.batch_size,
        seed=options.seed,
        weights=options.weights,
        start=options.start,
        half=options.half,
        bf16=options.bf16,
        corruptions={"basic": BASIC, "all": CORRUPTIONS}.get(" ".join(options.corruptions), options.corruptions),
    )
    Console().print(result.table())
    print(f"written to {out}")


def _head(options: Namespace, overrides: list[str]) -> None:
    import json

    from vpt.atomic_write import check_unused
    from vpt.backbones import create_backbone, input_size
    from vpt.robustness.interpolation.zero_shot_heads import (
        TEMPLATES,
        clip_text,
        own_head,
        read_templates,
        text_head,
        write_head,
        zero_shot,
    )

    check_unused(options.out)
    data = config_data(options.data, input_size(options.backbone), overrides)
    backbone = create_backbone(options.backbone, options.weights, data.image_size, data.normalization)
    info: dict[str, Any] = {"head": "pretrained", "classes": None}
    if options.clip is not None:
        templates = read_templates(options.templates or TEMPLATES)
        texts = text_head(data.class_names, templates, *clip_text(*options.clip))
        head = zero_shot(backbone, texts, data.split("train"))
        info = {"head": "text", "clip": options.clip, "templates": templates}
    else:
        try:
            classes = None if options.classes is None else [int(n) for n in json.loads(options.classes.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{options.classes} is not a JSON list with a number for each class.") from error
        head, info["classes"] = own_head(backbone, classes), classes
    write_head(options.out, backbone, head, data.class_names, data.preset.to_dict(), info)
    print(f"written to {options.out}")


def _soup(options: Namespace, overrides: list[str]) -> None:
    from vpt.robustness.interpolation import model_soups

    if not options.greedy:
        model_soups.uniform(options.deltas, options.out)
    else:
        data = delta_data(options.deltas[0], options.data, overrides)
        model_soups.greedy(options.deltas, options.out, data, options.batch_size, options.weights, _say)
    print(f"written to {options.out}")


def _say(step: Any) -> None:
    found = f"out of reach after {step.images} images" if step.soup is None else f"soup {100 * step.soup:.1f}"
    print(f"{'kept' if step.kept else 'dropped':7} {step.file}: alone {100 * step.alone:.1f}, {found}")


def _compare(options: Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from vpt.robustness.interpolation.alpha_curve import curves, table

    Console().print(table(curves(options.folders)))


def _report(options: Namespace, overrides: list[str]) -> None:
    from vpt.reports.robustness_report import robustness_report
    from vpt.reports.robustness_values import report

    for path in robustness_report(report(options.folders)).write(options.out or options.folders[0]):
        print(f"written to {path}")


def _parser() -> Parser:
    root = Parser(prog="vpt robustness", description=__doc__)
    actions = root.add_subparsers(required=True, metavar="run|report|compare|head|soup")
    parser = actions.add_parser(
        "run",
        help="evaluate a delta file on its test set, the task's shifts and corruptions",
        epilog=DATA_OVERRIDES,
    )
    parser.set_defaults(action=_run)
    parser.add_argument("--delta", type=Path, nargs="+", required=True, help="delta.safetensors of one run or several")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--anchor", type=Path, help="delta file of a linear probe, whose head belongs to α = 0")
    parser.add_argument("--start", type=Path, help="delta file that α = 0 is to be, e.g. init.safetensors of the run")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="from 0 to 1")
    parser.add_argument("--severities", type=int, nargs="*", default=[1, 2, 3, 4, 5], help="of each corruption")
    parser.add_argument(
        "--corruptions",
        nargs="+",
        default=["basic"],
        help="their names, `all` nineteen, or `basic` (default): gaussian_noise, gaussian_blur, contrast, "
        "jpeg_compression, pixelate",
    )
    parser.add_argument("--max-images", type=int, help="per list, drawn by class (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a forward pass")
    parser.add_argument("--seed", type=int, default=0, help="of the draw for --max-images")
    parser.add_argument("--weights", help="backbone weights on this machine (default: where they were in training)")
    parser.add_argument("--half", action="store_true", help="keep logits in half precision; α is not interpolated then")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, logits to three digits")
    parser.add_argument("--out", type=Path, help="folder to write to (default: robustness/ beside the delta)")
    _add_report(actions)
    _add_compare(actions)
    _add_head(actions)
    _add_soup(actions)
    return root


def _add_report(actions: Any) -> None:
    parser = actions.add_parser("report", help="all scores and figures of evaluated models", allow_abbrev=False)
    parser.set_defaults(action=_report)
    parser.add_argument("folders", type=Path, nargs="+", help="what `vpt robustness run` wrote, all on the same data")
    parser.add_argument("--out", type=Path, help="folder for report.json, .md and .html (default: the first folder)")


def _add_compare(actions: Any) -> None:
    parser = actions.add_parser("compare", help="gate, output ensembling and others in one table")
    parser.set_defaults(action=_compare)
    parser.add_argument("folders", type=Path, nargs="+", help="what `vpt robustness run` wrote for one delta")


def _add_head(actions: Any) -> None:
    parser = actions.add_parser(
        "head",
        help="write a head for α = 0: of the weights' own classes, or of class names",
        epilog=DATA_OVERRIDES,
    )
    parser.set_defaults(action=_head)
    parser.add_argument("--backbone", required=True, help="timm's name")
    parser.add_argument("--weights", default="pretrained", help="`pretrained` (default) or a file")
    parser.add_argument("--data", type=Path, required=True, help="config with a data section")
    parser.add_argument("--classes", type=Path, help="JSON list: position of each class in the weights' own head")
    parser.add_argument(
        "--clip", nargs=2, metavar=("MODEL", "PRETRAINED"), help="open_clip's text tower, e.g. ViT-B-16 openai"
    )
    parser.add_argument("--templates", type=Path, help="text file, a template with {} a line (default: seven)")
    parser.add_argument("--out", type=Path, required=True, help="delta file to write, a new one")


def _add_soup(actions: Any) -> None:
    parser = actions.add_parser(
        "soup", help="average delta files of several runs", epilog=DATA_OVERRIDES, allow_abbrev=False
    )
    parser.set_defaults(action=_soup)
    parser.add_argument("--deltas", type=Path, nargs="+", required=True, help="delta files of one configuration")
    parser.add_argument("--out", type=Path, required=True, help="delta file to write, a new one")
    parser.add_argument("--greedy", action="store_true", help="keep only runs that do not harm on validation images")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a forward pass")
    parser.add_argument("--weights", help="backbone weights on this machine (default: where they were in training)")
