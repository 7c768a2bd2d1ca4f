"""``vpt robustness run``: a delta file in and out of distribution, at every strength of its prompts."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import DATA_HELP, DATA_OVERRIDES, Parser, delta_data
from vpt.cli.quiet import hush


def run(args: list[str]) -> None:
    """Parses the command line, measures, and prints the table.

    Args:
        args: The command line, beginning with ``robustness``.

    Raises:
        VPTError: The user's input is wrong.
    """
    options, overrides = _parser().parse_with_data(args[1:])
    hush()

    from rich.console import Console

    from vpt.data.corruptions import BASIC, CORRUPTIONS
    from vpt.robustness.run import run as measure

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
        corruptions={"basic": BASIC, "all": CORRUPTIONS}.get(" ".join(options.corruptions), options.corruptions),
    )
    Console().print(result.table())
    print(f"written to {out}")


def _parser() -> Parser:
    root = Parser(prog="vpt robustness", description=__doc__, allow_abbrev=False)
    actions = root.add_subparsers(required=True, metavar="run")
    parser = actions.add_parser(
        "run",
        help="evaluate a delta file on its test set, the task's shifts and corruptions",
        epilog=DATA_OVERRIDES,
        allow_abbrev=False,
    )
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--anchor", type=Path, help="delta file of a linear probe, whose head belongs to strength 0")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="prompt strengths")
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
    parser.add_argument("--out", type=Path, help="folder to write to (default: robustness/ beside the delta)")
    return root
