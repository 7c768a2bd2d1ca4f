"""``vpt robustness``: delta files in and out of distribution at every α, heads for α = 0, comparisons, and soups."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpt.cli.arguments import (
    DATA_FLAGS,
    DATA_HELP,
    DATA_OVERRIDES,
    SHARD_HELP,
    WEIGHTS_HELP,
    Parser,
    at_least,
    check_different,
    check_effect,
    config_data,
    delta_data,
    number,
    output_file,
    output_folder,
    shard,
)
from vpt.errors import ConfigError

_BATCH = 64


def run(args: list[str]) -> None:
    """Parses the command line, and does what it says."""
    options, overrides = _parser().parse_known_args(args[1:])
    vars(options).pop("action")(options, overrides)


def _run(options: Namespace, overrides: list[str]) -> None:
    from vpt.atomic_write import check_writable
    from vpt.data.corruptions import BASIC, CORRUPTIONS
    from vpt.robustness import ALPHAS, run_shard
    from vpt.robustness import run as measure
    from vpt.robustness.layer_strengths import strengths_of
    from vpt.screen import show

    if options.out is not None and len(options.delta) > 1:
        raise ConfigError("--out is for one delta: each of several is written to robustness/ beside it.")
    outs = {delta: options.out or delta.parent / "robustness" for delta in options.delta}
    for out in outs.values():
        check_writable(out, folder=True)
    if options.adapt is not None:
        check_effect(options, "with --adapt", "alphas", "anchor", "start", "compile", "shard")
    own_shard = vars(options).pop("shard")
    options.alphas = options.alphas or ALPHAS
    for name in ("delta", "alphas", "severities", "corruptions", "unknown"):
        check_different(f"--{name}", getattr(options, name) or ())
    if options.max_images is None and options.adapt is None:
        check_effect(options, "without --max-images", "seed")
    if not options.severities:
        check_effect(options, "without --severities", "corruptions")
    if options.strengths is not None and len(options.delta) > 1:
        raise ConfigError("--strengths are of one delta: evaluate several one by one.")
    lists = {"basic": BASIC, "all": tuple(CORRUPTIONS)}
    named = [kind for word in options.corruptions or ["basic"] for kind in lists.get(word, (word,))]
    options.corruptions, options.seed = tuple(dict.fromkeys(named)), options.seed or 0
    for delta, out in outs.items():
        data = delta_data(delta, options.data, overrides)
        own = {"delta": delta, "data": data, "out": out}
        if options.strengths is not None:
            own |= {"strengths": strengths_of(options.strengths, delta, options.anchor)}
        arguments = vars(options) | own
        result = measure(**arguments) if own_shard is None else run_shard(own_shard, **arguments)
        if result is None:
            print(f"shard {own_shard} is done: the last one to be done writes {out}")
            continue
        show(result.table())
        print(f"written to {out}")


def _strengths(options: Namespace, overrides: list[str]) -> None:
    from vpt.robustness.layer_strengths import learn

    options.out = options.out or options.delta.parent / "strengths.json"
    data = delta_data(options.delta, options.data, overrides)
    found = learn(**vars(options) | {"data": data, "seed": options.seed or 0})
    unit = 100.0 if options.objective == "accuracy" else 1.0
    name = "accuracy (%)" if options.objective == "accuracy" else "log-likelihood"
    print(f"{name} {unit * found.score:.4g}; at the best single α, {found.alpha:g}, {unit * found.alpha_score:.4g}")
    print("strengths " + " ".join(f"{each:.2f}" for each in found.strengths))
    print(f"written to {options.out}")


def _statistics(options: Namespace, overrides: list[str]) -> None:
    from vpt.robustness.activation_statistics import keep_statistics

    data = delta_data(options.delta, options.data, overrides)
    keep_statistics(options.delta, data, options.out, options.seed, options.weights)
    print(f"written to {options.out}")


def _head(options: Namespace, overrides: list[str]) -> None:
    import json

    from vpt.atomic_write import check_unused
    from vpt.backbones import create_backbone, input_size
    from vpt.robustness import zero_shot_heads as heads

    if options.clip is None:
        check_effect(options, "without --clip", "templates")
    else:
        check_effect(options, "with --clip", "classes")
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
    from vpt.models.delta_format import read_header
    from vpt.robustness.soups import model_soups

    if options.greedy and options.stock:
        raise ConfigError("--greedy and --stock are two rules: give one of them.")
    if not options.stock:
        check_effect(options, "without --stock", "anchor")
    if not options.greedy:
        check_effect(options, "without --greedy", "by_layer")
        rule = "with --stock" if options.stock else "without --greedy"
        check_effect(options, rule, "data", "batch_size", *(() if options.stock else ("weights",)))
        if overrides:
            raise ConfigError(f"{overrides[0]} has no effect {rule}: leave it out.")
        if options.stock:
            model_soups.stock(options.deltas, options.out, options.anchor, options.weights)
        else:
            model_soups.uniform(options.deltas, options.out)
    else:
        data = delta_data(options.deltas[0], options.data, overrides)
        size, by_layer = options.batch_size or _BATCH, options.by_layer
        model_soups.greedy(options.deltas, options.out, data, size, options.weights, _say, by_layer)
        told = read_header(options.out)["info"]["soup"]
        print(f"{told['evaluations']} evaluations of up to {told['images']} validation images")
    print(f"written to {options.out}")


def _say(step: Any) -> None:
    found = f"soup worse after {step.images} images" if step.soup is None else f"soup {100 * step.soup:.1f}"
    where = "" if step.layer is None else f" to layer {step.layer}" if step.kept else f" at layer {step.layer}"
    print(f"{('added' if step.kept else 'dropped') + where:7} {step.file}: alone {100 * step.alone:.1f}, {found}")


def _compare(options: Namespace, overrides: list[str]) -> None:
    from vpt.robustness.alpha_curve import curves, table
    from vpt.screen import show

    check_different("compare", options.folders)
    show(table(curves(options.folders)))


def _report(options: Namespace, overrides: list[str]) -> None:
    from vpt.atomic_write import check_writable
    from vpt.reports.robustness_report import robustness_report
    from vpt.reports.robustness_values import report

    check_different("report", options.folders)
    out = options.out or options.folders[0]
    check_writable(out, folder=True)
    for path in robustness_report(report(options.folders)).write(out):
        print(f"written to {path}")


def _parser() -> Parser:
    root = Parser(prog="vpt robustness")
    root.onward = DATA_FLAGS
    actions = root.add_subparsers(required=True, metavar="run|strengths|statistics|report|compare|head|soup")

    def add(name: str, action: Any, text: str, epilog: str | None = DATA_OVERRIDES) -> Parser:
        made: Parser = actions.add_parser(name, help=text, epilog=epilog)
        made.set_defaults(action=action)
        made.onward = DATA_FLAGS if epilog else None
        return made

    for part in (_add_run, _add_strengths, _add_statistics, _add_report, _add_head, _add_soup):
        part(add)
    return root


Add = Callable[..., Parser]


def _add_run(add: Add) -> None:
    parser = add("run", _run, "evaluate a delta file on its test set, the task's shifts and corruptions")
    parser.add_argument("--delta", type=Path, nargs="+", required=True, help="delta.safetensors of one run or several")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--anchor", type=Path, help="delta file of a linear probe, whose head is used at α = 0")
    parser.add_argument("--start", type=Path, help="delta file used as α = 0, e.g. init.safetensors of the run")
    alphas = "from 0 to 1 (default: 0 0.25 0.5 0.75 1)"
    parser.add_argument("--alphas", type=number(0, 1), nargs="+", help=alphas)
    severities = "of each corruption, from 1 to 5; none for no corruptions"
    parser.add_argument("--severities", type=at_least(1, 5), nargs="*", default=[1, 2, 3, 4, 5], help=severities)
    basic = "gaussian_noise, gaussian_blur, contrast, jpeg_compression, pixelate"
    kinds = f"their names, `all` nineteen, or `basic` (default): {basic}"
    parser.add_argument("--corruptions", nargs="+", help=kinds)
    parser.add_argument("--max-images", type=at_least(1), help="per test set, a stratified sample (default: all)")
    parser.add_argument("--batch-size", type=at_least(1), default=_BATCH, help="batch size")
    parser.add_argument("--seed", type=at_least(0), help="of the sample for --max-images (default: 0)")
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--half", action="store_true", help="store logits in half precision; no exact α curves then")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, logits to three digits")
    compiled = "run under torch.compile: it takes a while before the first images, at each α"
    parser.add_argument("--compile", action="store_true", help=compiled)
    layers = "of the layers at α = 1: all, the first and the last (LiNeS), or a file of `vpt robustness strengths`"
    parser.add_argument("--strengths", nargs="+", help=layers)
    adapt = (
        "adapt to the unlabelled test images in batches, at α = 1: entropy minimisation, or prompts by forward passes"
    )
    parser.add_argument("--adapt", choices=["entropy", "foa", "fozo"], help=adapt)
    strange = "folders of images of none of the classes: how well each score tells them from the test images"
    parser.add_argument("--unknown", type=Path, nargs="+", default=[], help=strange)
    parser.add_argument("--shard", type=shard, help=SHARD_HELP)
    parser.add_argument("--out", type=output_folder, help="folder to write to (default: robustness/ beside the delta)")


def _add_strengths(add: Add) -> None:
    parser = add("strengths", _strengths, "learn a strength for each layer, by forward passes on validation images")
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--anchor", type=Path, help="delta file of a linear probe, whose head belongs to strength 0")
    parser.add_argument("--objective", choices=["accuracy", "nll"], default="accuracy", help="default: accuracy")
    parser.add_argument("--corrupted", action="store_true", help="of validation images under five corruptions")
    parser.add_argument("--evaluations", type=at_least(12), default=200, help="strengths to try (default: 200)")
    parser.add_argument("--max-images", type=at_least(1), help="a stratified sample (default: all)")
    parser.add_argument("--batch-size", type=at_least(1), default=_BATCH, help="batch size")
    parser.add_argument("--seed", type=at_least(0), help="of search and sample (default: 0)")
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, logits to three digits")
    parser.add_argument("--out", type=output_file, help="JSON file (default: strengths.json beside the delta)")


def _add_statistics(add: Add) -> None:
    text = "write a delta file that keeps what --adapt foa and fozo need to know of training images"
    parser = add("statistics", _statistics, text)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--out", type=output_file, required=True, help="delta file to write, a new one")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the draw of 200 training images (default: 0)")
    parser.add_argument("--weights", help=WEIGHTS_HELP)


def _add_report(add: Add) -> None:
    parser = add("report", _report, "all scores and figures of evaluated models", None)
    parser.add_argument("folders", type=Path, nargs="+", help="what `vpt robustness run` wrote, all on the same data")
    parser.add_argument(
        "--out", type=output_folder, help="folder for report.json, .md, .html (default: the first folder)"
    )

    parser = add("compare", _compare, "interpolation, output ensemble and other methods in one table", None)
    parser.add_argument("folders", type=Path, nargs="+", help="what `vpt robustness run` wrote for one delta")


def _add_head(add: Add) -> None:
    parser = add("head", _head, "write a head for α = 0: the pretrained classifier, or zero-shot from class names")
    parser.add_argument("--backbone", required=True, help="timm's name")
    parser.add_argument("--weights", default="pretrained", help="`pretrained` (default) or a file")
    parser.add_argument("--data", type=Path, required=True, help="config with a data section")
    parser.add_argument("--classes", type=Path, help="JSON list: index of each class in the pretrained head")
    tower = "open_clip's text tower, e.g. ViT-B-16 openai"
    parser.add_argument("--clip", nargs=2, metavar=("MODEL", "PRETRAINED"), help=tower)
    parser.add_argument("--templates", type=Path, help="text file, a template with {} a line (default: seven)")
    parser.add_argument("--out", type=output_file, required=True, help="delta file to write, a new one")


def _add_soup(add: Add) -> None:
    parser = add("soup", _soup, "model soup: average the weights of several runs")
    parser.add_argument("--deltas", type=Path, nargs="+", required=True, help="delta files of one backbone and method")
    parser.add_argument("--out", type=output_file, required=True, help="delta file to write, a new one")
    parser.add_argument("--greedy", action="store_true", help="add a run only if validation accuracy does not drop")
    layer = "with --greedy: choose the runs of each layer by themselves, N + (N - 1) * layers evaluations at most"
    parser.add_argument("--by-layer", action="store_true", help=layer)
    stock = "pull the mean to the pretrained weights by how little the runs agree (Model Stock)"
    parser.add_argument("--stock", action="store_true", help=stock)
    parser.add_argument("--anchor", type=Path, help="with --stock: a linear probe's delta file, the start of the head")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--batch-size", type=at_least(1), help=f"batch size (default: {_BATCH})")
    parser.add_argument("--weights", help=WEIGHTS_HELP)
