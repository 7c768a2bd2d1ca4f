"""``vpt backbones``: which of timm's models take prompts, and which weights there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpt.cli.arguments import Parser
from vpt.image_size import size_text

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.backbones.support import Support


def run(args: list[str]) -> None:
    """Parses the command line and prints a table, or all of one model."""
    parser = Parser(prog="vpt backbones")
    parser.add_argument("pattern", nargs="?", default="*", help="of timm's names, e.g. 'vit_*' (default: all)")
    parser.add_argument("--prompts", action="store_true", help="only those that take deep prompts and prefixes")
    options = parser.parse_args(args[1:])
    from rich.progress import track

    from vpt.backbones.support import count, model_names, support
    from vpt.screen import Table, console, show

    names = model_names(options.pattern)
    bar = track(names, "Models", console=console(stderr=True), transient=True) if len(names) > 8 else names
    found = [each for each in map(support, bar) if each.builds and (each.prompts or not options.prompts)]
    if len(names) == 1 and found:
        _one(found[0])
        return
    table = Table("name", "prompts", "million parameters", "px", "weights", "licence")
    for each in found:
        size = f"{each.parameters / 1e6:,.1f}"
        prompts = "yes" if each.tokens else "deep" if each.prompts else "no"
        table.add_row(
            each.name, prompts, size, size_text(each.image_size), str(len(each.checkpoints)), each.licence or "–"
        )
    show(table)
    total = count(found)
    print(f"{total.names:,} names with {total.checkpoints:,} weights take a linear probe, LoRA on layers by name,")
    print(f"SSF, biases, norms and full fine-tuning; {total.prompted_names:,} of them with")
    print(f"{total.prompted_checkpoints:,} weights deep prompts and prefixes; {total.known_names:,} of these with")
    print(f"{total.known_checkpoints:,} weights shallow prompts, adapters and attention figures, too.")
    print("px and licence are those of the first weights.")


def _one(found: Support) -> None:
    print(f"{found.name}, of timm's {found.family}: {found.parameters:,} parameters without a classifier")
    deep = "takes deep prompts and prefixes; no shallow ones, adapters and attention figures"
    refused = f"no prompts, prefixes, adapters and attention figures. {found.refused}"
    print("takes every delta, and attention figures" if found.tokens else deep if found.prompts else refused)
    for tag in found.checkpoints:
        print(f"  {found.name}.{tag}")
    told = f", {found.licence}" if found.licence else ""
    print(f"{len(found.checkpoints)} weights; those of the first are for {size_text(found.image_size)} pixels{told}")
