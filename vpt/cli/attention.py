"""``vpt attention``: what the CLS token attends to, without and with the prompts of a delta file."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import DATA_HELP, DATA_OVERRIDES, Parser, delta_data
from vpt.cli.quiet import hush


def run(args: list[str]) -> None:
    """Parses the command line and draws the figure.

    Args:
        args: The command line, beginning with ``attention``.

    Raises:
        VPTError: The user's input is wrong.
    """
    parser = Parser(prog="vpt attention", description=__doc__, epilog=DATA_OVERRIDES, allow_abbrev=False)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--images", type=Path, nargs="+", help="image files or folders (default: from the data)")
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--weights", help="backbone weights on this machine (default: where they were in training)")
    parser.add_argument("--out", type=Path, help="figure (default: figures/attention_test.png beside the delta)")
    options, overrides = parser.parse_with_data(args[1:])
    hush()

    from vpt.visualize.attention import attention_figure, attention_figure_from_data

    out = options.out or options.delta.parent / "figures" / "attention_test.png"
    if options.images:
        attention_figure(options.delta, options.images, out, options.weights)
    else:
        data = delta_data(options.delta, options.data, overrides)
        attention_figure_from_data(options.delta, data, out, options.weights)
    print(f"written to {out}")
