"""``vpt attention``: what the CLS token attends to, without and with the prompts of a delta file."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import Parser, delta_data
from vpt.cli.quiet import hush


def run(args: list[str]) -> None:
    """Parses the command line and draws the figure.

    Args:
        args: The command line, beginning with ``attention``.

    Raises:
        VPTError: The user's input is wrong.
    """
    parser = Parser(prog="vpt attention", description=__doc__, allow_abbrev=False)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--images", type=Path, nargs="+", help="image files (default: four test images of the run)")
    parser.add_argument("--out", type=Path, help="figure to write (default: figures/attention.png beside the delta)")
    options = parser.parse_args(args[1:])
    hush()

    from vpt.visualize.figures import attention_figure

    out = options.out or options.delta.parent / "figures" / "attention.png"
    print(f"written to {attention_figure(options.delta, options.images or _examples(options.delta, out.parent), out)}")


def _examples(delta: Path, folder: Path, count: int = 4) -> list[Path]:
    """Saves test images, spread over the list, as the model sees them."""
    from PIL import Image

    test = delta_data(delta).split("test")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for position in range(0, len(test), max(1, len(test) // count))[:count]:
        paths.append(folder / f"test_{position:04d}.png")
        Image.fromarray(test[position]["image"].permute(1, 2, 0).numpy()).save(paths[-1])
    return paths
