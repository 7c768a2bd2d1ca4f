"""``vpt robustness``: delta files in and out of distribution at every α, heads for α = 0, comparisons, and soups."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from vpt.cli.arguments import (
    DATA_HELP,
    DATA_OVERRIDES,
    WEIGHTS_HELP,
    Parser,
    at_least,
    config_data,
    delta_data,
    output_file,
    output_folder,
)
from vpt.errors import ConfigError


def run(args: list[str]) -> None:
    """Parses the command line, and does what it says."""
    options, overrides = _parser().parse_with_data(args[1:])
    vars(options).pop("action")(options, overrides)


def _run(options: Namespace, overrides: list[str]) -> None:
    from vpt.data.corruptions import BASIC, CORRUPTIONS
    from vpt.robustness import run as measure
    from vpt.screen import show

    if options.out is not None and len(options.delta) > 1:
        raise ConfigError("--out is for one delta: each of several is written to robustness/ beside it.")
    kinds = {"basic": BASIC, "all": CORRUPTIONS}.get(" ".join(options.corruptions), options.corruptions)
    for delta in options.delta:
        data, out = delta_data(delta, options.data, overrides), options.out or delta.parent / "robustness"
        result = measure(**vars(options) | {"delta": delta, "data": data, "out": out, "corruptions": kinds})
        show(result.table())
        print(f"written to {out}")


def _head(options: Namespace, overrides: list[str]) -> None:
    import json

    from vpt.atomic_write import check_unused
    from vpt.backbones import create_backbone, input_size
    from vpt.robustness import zero_shot_heads as heads

    check_unused(options.out)
    data = config_data(options.data, input_size(options.backbone), overrides)
    backbone = create_backbone(options.backbone, options.weights, data.image_size, data.normalization)
    info: dict[str, Any] = {"head": "pretrained", "classes": None}
    if options.clip is not None:
        templates = heads.read_templates(options.templates or heads.TEMPLATES)
        texts = heads.text_head(data.class_names, templates, *heads.clip_text(*options.clip))
        head = heads.zero_shot(backbone, texts, data.split("train"))
        info = {"head": "text", "clip": options.clip, "templates": templates}
    else:
        try:
            classes = None if options.classes is None else [int(n) for n in json.loads(options.classes.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{options.classes} is not a JSON list with a number for each class.") from error
        head, info["classes"] = heads.own_head(backbone, classes), classes
    heads.write_head(options.out, backbone, head, data.class_names, data.preset.to_dict(), info)
    print(f"written to {options.out}")


def _soup(options: Namespace, overrides: list[str]) -> None:
    from vpt.robustness import model_soups

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
    from vpt.robustness.alpha_curve import curves, table
    from vpt.screen import show

    show(table(curves(options.folders)))


def _report(options: Namespace, overrides: list[str]) -> None:
    from vpt.reports.robustness_report import robustness_report
    from vpt.reports.robustness_values import report

    for path in robustness_report(report(options.folders)).write(options.out or options.folders[0]):
        print(f"written to {path}")


def _parser() -> Parser:
    root = Parser(prog="vpt robustness")
    actions = root.add_subparsers(required=True, metavar="run|report|compare|head|soup")

    def add(name: str, action: Any, text: str, epilog: str | None = DATA_OVERRIDES) -> Parser:
        made: Parser = actions.add_parser(name, help=text, epilog=epilog)
        made.set_defaults(action=action)
        return made

    parser = add("run", _run, "evaluate a delta file on its test set, the task's shifts and corruptions")
    parser.add_argument("--delta", type=Path, nargs="+", required=True, help="delta.safetensors of one run or several")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--anchor", type=Path, help="delta file of a linear probe, whose head belongs to α = 0")
    parser.add_argument("--start", type=Path, help="delta file that α = 0 is to be, e.g. init.safetensors of the run")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="from 0 to 1")
    parser.add_argument("--severities", type=int, nargs="*", default=[1, 2, 3, 4, 5], help="of each corruption")
    basic = "gaussian_noise, gaussian_blur, contrast, jpeg_compression, pixelate"
    kinds = f"their names, `all` nineteen, or `basic` (default): {basic}"
    parser.add_argument("--corruptions", nargs="+", default=["basic"], help=kinds)
    parser.add_argument("--max-images", type=at_least(1), help="per list, drawn by class (default: all)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images in a forward pass")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the draw for --max-images")
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--half", action="store_true", help="keep logits in half precision; α is not interpolated then")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, logits to three digits")
    parser.add_argument("--out", type=output_folder, help="folder to write to (default: robustness/ beside the delta)")

    parser = add("report", _report, "all scores and figures of evaluated models", None)
    parser.add_argument("folders", type=Path, nargs="+", help="what `vpt robustness run` wrote, all on the same data")
    parser.add_argument(
        "--out", type=output_folder, help="folder for report.json, .md, .html (default: the first folder)"
    )

    parser = add("compare", _compare, "gate, output ensembling and others in one table", None)
    parser.add_argument("folders", type=Path, nargs="+", help="what `vpt robustness run` wrote for one delta")

    parser = add("head", _head, "write a head for α = 0: of the weights' own classes, or of class names")
    parser.add_argument("--backbone", required=True, help="timm's name")
    parser.add_argument("--weights", default="pretrained", help="`pretrained` (default) or a file")
    parser.add_argument("--data", type=Path, required=True, help="config with a data section")
    parser.add_argument("--classes", type=Path, help="JSON list: position of each class in the weights' own head")
    tower = "open_clip's text tower, e.g. ViT-B-16 openai"
    parser.add_argument("--clip", nargs=2, metavar=("MODEL", "PRETRAINED"), help=tower)
    parser.add_argument("--templates", type=Path, help="text file, a template with {} a line (default: seven)")
    parser.add_argument("--out", type=output_file, required=True, help="delta file to write, a new one")

    parser = add("soup", _soup, "average delta files of several runs")
    parser.add_argument("--deltas", type=Path, nargs="+", required=True, help="delta files of one configuration")
    parser.add_argument("--out", type=output_file, required=True, help="delta file to write, a new one")
    parser.add_argument("--greedy", action="store_true", help="keep only runs that do not harm on validation images")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images in a forward pass")
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    return root
