"""``vpt prune``: the config of a run that starts again without the prompts that mattered least."""

from __future__ import annotations

from pathlib import Path

from vpt.cli.arguments import (
    DATA_FLAGS,
    DATA_HELP,
    DATA_OVERRIDES,
    WEIGHTS_HELP,
    Parser,
    at_least,
    check_different,
    delta_data,
    output_file,
    read_config,
)
from vpt.errors import ConfigError
from vpt.run_record import CONFIG_FILE


def run(args: list[str]) -> None:
    """Parses the command line, scores the prompts and writes the config."""
    parser = Parser(prog="vpt prune", epilog=DATA_OVERRIDES)
    parser.onward = DATA_FLAGS
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run with prompts")
    tokens = "per cent of each layer's prompts to prune (default: 0); several are combined with all of --segments"
    parser.add_argument("--tokens", type=at_least(0, 99), nargs="+", help=tokens)
    segments = "per cent of the 8 segments of each other prompt's channels to prune (default: 0)"
    parser.add_argument("--segments", type=at_least(0, 99), nargs="+", help=segments)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="batch size (default: 16)")
    parser.add_argument("--weights", help=WEIGHTS_HELP)
    out = "config to write, a new one (default: pruned.yaml beside the delta)"
    parser.add_argument("--out", type=output_file, help=out)
    options, overrides = parser.parse_known_args(args[1:])
    for name in ("tokens", "segments"):
        check_different(f"--{name}", getattr(options, name) or ())
    if not any([*(options.tokens or ()), *(options.segments or ())]):
        raise ConfigError("Nothing is to be pruned: give --tokens or --segments, in per cent.")

    from vpt.experiments.prune import grid_of, prune

    own = options.delta.parent / CONFIG_FILE
    data = delta_data(options.delta, options.data, overrides)
    config = read_config(own, "prompts are pruned of a run of `vpt fit`, beside its config.yaml")
    out = options.out or options.delta.parent / "pruned.yaml"
    percent = options.tokens or [0], options.segments or [0]
    ways = prune(options.delta, config, data, out, *percent, options.batch_size, options.weights)
    for way in ways:
        (prompts, of), (numbers, of_numbers) = way.prompts, way.numbers
        left = f"{prompts:,} of {of:,} prompts are left, {numbers:,} of {of_numbers:,} numbers"
        print(f"tokens {way.tokens} %, segments {way.segments} %: {left}")
    print(f"written to {out}\ntrain it:   vpt fit -c {out}")
    if len(ways) > 1:
        print(f"or search them all:   vpt sweep -c {out} --grid {grid_of(out)} --out FOLDER")
