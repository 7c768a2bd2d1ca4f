"""``vpt deltas``: which there are, what they train on a backbone, and which cost nothing in an exported model."""

from __future__ import annotations

from vpt.cli.arguments import Parser

_NEEDED = {"num_tokens": 10}
"""Of arguments without a default."""


def run(args: list[str]) -> None:
    """Parses the command line and prints a table."""
    parser = Parser(prog="vpt deltas")
    about = "timm's name of the backbone that numbers are of (default: %(default)s)"
    parser.add_argument("--backbone", default="vit_base_patch16_224", help=about)
    options = parser.parse_args(args[1:])
    from inspect import Parameter, signature

    from vpt.backbones import create_backbone
    from vpt.deltas import DELTAS, DeltaSpec
    from vpt.deltas.base import MergeablePart
    from vpt.deltas.head import Linear
    from vpt.deltas.partial_tuning import Subset
    from vpt.errors import VPTError
    from vpt.screen import Table, show

    backbone = create_backbone(options.backbone, "random")
    table = Table("delta", "trained numbers", "exported", "what it is")
    refused: list[str] = []
    for name, kind in sorted(DELTAS.items()):
        needed = [
            each.name
            for each in [*signature(kind.__init__).parameters.values()][2:]
            if each.default is Parameter.empty and each.name in _NEEDED
        ]
        try:
            part = DeltaSpec.read({"name": name, **{each: _NEEDED[each] for each in needed}}).build(backbone)
        except VPTError as error:
            refused.append(f"{name}: {error}")
            continue
        merges = part.merges_wholly if isinstance(part, MergeablePart) else isinstance(part, Subset | Linear)
        about_it = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
        table.add_row(name, f"{part.expected_parameters():,}", "free" if merges else "costs", about_it)
    show(table)
    print(f"Of {options.backbone}, beside the head, with the default options (prompts and prefixes: 10 tokens).")
    print("What is free lies in the weights of an exported model. A method is any list of deltas.")
    for sentence in refused:
        print(f"not on {options.backbone}: {sentence}")
