"""``vpt profile``: the cost ledger of any composition on any backbone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.arguments import Parser
from vpt.errors import ConfigError

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.models import TunedModel


def run(args: list[str]) -> None:
    """Parses the command line, measures, and prints the ledger."""
    epilog = "All other arguments are those of vpt fit: -c CONFIG, --model.weights random, ..."
    parser = Parser(prog="vpt profile", description=__doc__, epilog=epilog)
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="how often time is taken (default: 5)")
    parser.add_argument("--classes", type=int, help="measure without the data, with so many classes")
    parser.add_argument("--run", type=Path, help="a finished run: how many steps it took to 95 %% of its own best")
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    options, rest = parser.parse_known_args(args[1:])
    if options.run is None and not rest:
        raise ConfigError("vpt profile needs a config, e.g. -c configs/demo.yaml, or --run RUN.")

    from vpt.experiments.profile import profile, steps_to_share

    values = asdict(profile(_model(rest, options.classes), options.batch, options.rounds)) if rest else {}
    if options.run is not None:
        values["steps_to_95"], values["steps"] = steps_to_share(options.run)
    print(json.dumps(values, indent=1) if options.json else _text(values))


def _model(args: list[str], classes: int | None) -> TunedModel:
    from lightning.pytorch.cli import instantiate_class

    from vpt.cli.commands.lightning_cli import resolve
    from vpt.tasks.build import build, image_size

    if classes is None:
        return build(resolve(args))[0].model
    config = resolve(args, data=False)
    section = config["model"]
    section["init_args"] |= {"num_classes": classes, "image_size": image_size(config)}
    model: TunedModel = instantiate_class((), section).model
    return model


def _text(values: dict[str, float]) -> str:
    lines = []
    if "trainable" in values:
        batch, formula = values["batch"], values["formula"]
        said = "no formula after full fine-tuning" if formula is None else f"formula {formula:,}"
        lines = [
            f"trained parameters    {values['trainable']:,} of {values['total']:,} ({said})",
            f"delta file            {values['delta_bytes'] / 1024:,.0f} KB",
            f"forward, an image     {values['forward_flops'] / batch / 1e9:.2f} GFLOP, "
            f"{1000 * values['forward_seconds'] / batch:.1f} ms",
            f"forward and backward  {values['step_flops'] / batch / 1e9:.2f} GFLOP, "
            f"{1000 * values['step_seconds'] / batch:.1f} ms",
            f"memory of a step      {values['memory'] / 2**20:,.0f} MiB for {batch} images on {values['device']}",
        ]
    if "steps" in values:
        lines.append(f"95 % of its best val  after {values['steps_to_95']:,} of {values['steps']:,} steps")
    return "\n".join(lines)
