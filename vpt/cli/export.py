"""``vpt export``: a trained model in the format of another library."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import Parser
from vpt.cli.quiet import hush


def run(args: list[str]) -> None:
    """Parses the command line and writes the files.

    Args:
        args: The command line, beginning with ``export``.

    Raises:
        VPTError: The user's input is wrong.
    """
    parser = Parser(prog="vpt export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--format", choices=["peft"], required=True, help="peft: a LoRA adapter for the timm model")
    parser.add_argument("--weights", help="backbone weights on this machine (default: where they were in training)")
    parser.add_argument("--out", type=Path, help="folder (default: named by the format, beside the delta)")
    options = parser.parse_args(args[1:])
    hush()

    from vpt.export import export_peft
    from vpt.tuning.files import load

    out = options.out or options.delta.parent / options.format
    print(f"written to {export_peft(load(options.delta, options.weights), out)}")
