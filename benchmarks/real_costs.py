"""The cost ledger of twelve ways to adapt ViT-Ti/16: table of docs/protocol.md.

    python -m benchmarks.real_costs --root $VPT_DATA [--methods lora ...]
    python -m benchmarks.real_costs --print

A row is what `vpt profile` measures (fp32, a batch of 10, the 102 classes of caltech101) and what `vpt profile --run`
counts: the steps until a run on signdigits10 reached 95 % of its own best on val200, which it sees four times an epoch.
That run has the rate that benchmarks.real_protocol chose. Run it on a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.real_protocol import BATCH, METHODS, SEEDS, Place, arguments, command_line
from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.cli.commands.lightning_cli import resolve
from vpt.experiments.profile import profile, steps_to_share
from vpt.experiments.sweep import RATE
from vpt.experiments.trial import Trial, merged, run_trial
from vpt.tasks.build import build

SIZED, TIMED = "caltech101", "signdigits10"


def measure(place: Place, method: str) -> None:
    """Measures the ledger of one method, if it is not there."""
    if kept(place.out).find(method) is None:
        model = build(resolve(arguments(place, SIZED, method)))[0].model
        found = asdict(profile(model, BATCH, rounds=9))
        found["steps_to_95"], found["steps"] = steps_to_share(_curve(place, method))
        kept(place.out).put({"method": method, **found})


def kept(out: Path) -> Records:
    """The ledgers."""
    return Records(out / "real_costs.jsonl", "method")


def _curve(place: Place, method: str) -> Path:
    """A run that validates often."""
    cell = place.cells.find(TIMED, method)
    if cell is None:
        raise SystemExit(f"python -m benchmarks.real_protocol --tasks {TIMED} --methods {method} comes first.")
    often = {"trainer.val_check_interval": 0.25, "trainer.check_val_every_n_epoch": 1}
    values = {"data.train": "train800", RATE: cell["chosen"][RATE], "seed_everything": SEEDS[0]}
    config = merged(resolve(arguments(place, TIMED, method)), often | values)
    run_trial(Trial(method, config), place.build / "curves")
    return place.build / "curves" / method


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    size = ["trainable parameters", "delta file (KB)"]
    work = ["GFLOPs forward", "GFLOPs forward + backward", "activation memory (MiB)", "ms forward", "ms step"]
    found = {row["method"]: row for row in kept(out).rows()}
    rows = [_row(found[method]) for method in METHODS if method in found]
    return {"costs": markdown(["method", *size, *work, "steps to 95 %"], rows)}


def _row(found: Row) -> list[str]:
    images = found["batch"]
    return [
        f"`{found['method']}`",
        f"{found['trainable']:,}",
        f"{found['delta_bytes'] / 1e3:,.0f}",
        f"{found['forward_flops'] / images / 1e9:.2f}",
        f"{found['step_flops'] / images / 1e9:.2f}",
        f"{found['memory'] / images / 2**20:.1f}",
        f"{1e3 * found['forward_seconds'] / images:.1f}",
        f"{1e3 * found['step_seconds'] / images:.1f}",
        f"{found['steps_to_95']} of {found['steps']}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is missing and prints the table."""
    args = command_line(__doc__).parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
    place = Place(args.root, args.out, args.build, quick=False)
    if not args.print:
        for method in args.methods:
            measure(place, method)
    print(*blocks(args.out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
