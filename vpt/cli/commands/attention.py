"""``vpt attention``: what a model attends to, without and with the prompts of a delta file; rollout, features."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpt.cli.arguments import DATA_HELP, DATA_OVERRIDES, Parser, delta_data
from vpt.errors import ConfigError

# of vpt.visualize.figure_kinds, without importing torch
_KINDS = "compare class rollout share mass prompts patches features"


def run(args: list[str]) -> None:
    """Parses the command line and draws the figures."""
    parser = Parser(prog="vpt attention", description=__doc__, epilog=DATA_OVERRIDES)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--images", type=Path, nargs="+", help="image files or folders (default: from the data)")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--weights", help="backbone weights on this machine (default: where they were in training)")
    parser.add_argument("--kind", nargs="+", metavar="KIND", help=f"all, or some of: {_KINDS} (default: only compare)")
    parser.add_argument(
        "--out",
        type=Path,
        help="figure, or folder for several and a page index.html (default: figures/ beside the delta)",
    )
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of figures in a folder")
    options, overrides = parser.parse_with_data(args[1:])
    if options.kind is None:
        _draw_comparison(options, overrides)
    else:
        _draw_kinds(options, overrides)


def _draw_comparison(options: argparse.Namespace, overrides: list[str]) -> None:
    from vpt.visualize.attention_figure import attention_figure, attention_figure_from_data

    out = options.out or options.delta.parent / "figures" / f"attention_test.{options.format}"
    if not out.suffix:
        out = out / f"compare.{options.format}"
    if options.images:
        attention_figure(options.delta, options.images, out, options.weights)
    else:
        data = delta_data(options.delta, options.data, overrides)
        attention_figure_from_data(options.delta, data, out, options.weights)
    print(f"written to {out}")


def _draw_kinds(options: argparse.Namespace, overrides: list[str]) -> None:
    from vpt.reports.style import save_figure
    from vpt.visualize.attention_figure import scene_from_data, scene_from_files
    from vpt.visualize.figure_kinds import draw, write_gallery

    out = options.out or options.delta.parent / "figures" / "attention"
    kinds = [] if options.kind == ["all"] else options.kind
    if out.suffix and len(kinds) != 1:
        raise ConfigError(f"--out {out} names one figure; give a folder for several.")
    if options.images:
        scene = scene_from_files(options.delta, options.images, options.weights)
    else:
        scene = scene_from_data(options.delta, delta_data(options.delta, options.data, overrides), options.weights)
    if out.suffix:
        print(f"written to {save_figure(draw(scene, kinds[0]), out)}")
        return
    paths, left_out = write_gallery(scene, out, kinds, options.format)
    print(*(f"written to {path}" for path in paths), *left_out, sep="\n")
