"""``vpt attention``: what a model attends to, without and with the prompts of a delta file; rollout, features."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpt.cli.arguments import (
    DATA_FLAGS,
    DATA_HELP,
    DATA_OVERRIDES,
    WEIGHTS_HELP,
    Parser,
    check_different,
    check_effect,
    delta_data,
)
from vpt.errors import ConfigError, UnknownNameError

# of vpt.visualize.figure_kinds, without importing torch
_KINDS = "compare class rollout share mass prompts patches features"


def run(args: list[str]) -> None:
    """Parses the command line and draws the figures."""
    parser = Parser(prog="vpt attention", epilog=DATA_OVERRIDES)
    parser.onward = DATA_FLAGS
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--images", type=Path, nargs="+", help="image files or folders (default: from the data)")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    parser.add_argument("--kind", nargs="+", metavar="KIND", help=f"all, or some of: {_KINDS} (default: only compare)")
    place = "figure, or folder for several figures and a page index.html (default: figures/ beside the delta)"
    parser.add_argument("--out", type=Path, help=place)
    parser.add_argument("--format", choices=("png", "svg"), help="of figures in a folder (default: png)")
    options, overrides = parser.parse_known_args(args[1:])
    kinds = _kinds(options)
    if options.out is not None and options.out.suffix:
        check_effect(options, f"beside --out {options.out}", "format")
    if options.images:
        check_different("--images", options.images)
        check_effect(options, "with --images", "data")
        if overrides:
            raise ConfigError(f"{overrides[0]} has no effect with --images: leave it out.")
    options.format = options.format or "png"

    from vpt.atomic_write import check_unused, check_writable
    from vpt.reports.style import check_figure, save_figure
    from vpt.visualize import scene_from_data, scene_from_files
    from vpt.visualize.figure_kinds import KINDS, draw, write_gallery

    out = _place(options)
    if out.suffix and len(kinds) != 1:
        raise ConfigError(f"--out {out} names one figure; give a folder for several.")
    if out.suffix:
        check_figure(out)
    else:
        check_writable(out, folder=True)
    check_unused(out, options.images or ())
    if options.images:
        scene = scene_from_files(options.delta, options.images, options.weights)
    else:
        scene = scene_from_data(options.delta, delta_data(options.delta, options.data, overrides), options.weights)
    if options.kind is None and KINDS["compare"].missing(scene):  # where tokens are known or not
        raise ConfigError(
            f"{options.delta} holds no prompts, so there is nothing to compare: give a prompt run's delta file, "
            "or ask for other kinds of figures (`vpt attention --kind all`)."
        )
    if out.suffix:
        print(f"written to {save_figure(draw(scene, kinds[0]), out)}")
        return
    paths, left_out = write_gallery(scene, out, kinds, options.format)
    print(*(f"written to {path}" for path in paths), *left_out, sep="\n")


def _kinds(options: argparse.Namespace) -> list[str]:
    """Those that are named; none for all."""
    named, known = options.kind or ["compare"], _KINDS.split()
    check_different("--kind", named)
    if unknown := [kind for kind in named if kind not in (*known, "all")]:
        raise UnknownNameError("kind of figure", unknown[0], known)
    return [] if "all" in named else named


def _place(options: argparse.Namespace) -> Path:
    """A figure's file, or a folder for several; what is drawn where no kind is named is always one figure."""
    out: Path | None = options.out
    figures: Path = options.delta.parent / "figures"
    if options.kind is not None:
        return out or figures / "attention"
    if out is None:
        return figures / f"attention_test.{options.format}"
    return out if out.suffix else out / f"compare.{options.format}"
