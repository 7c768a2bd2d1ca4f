"""Which of timm's models take prompts, family by family: the table of docs/backbones.md.

    python -m benchmarks.backbones [--print]

Every model is built on the meta device (minutes on a core). A line of results/backbones.jsonl is a family, with the
version of timm that was counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import timm
from rich.progress import track

from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.backbones.support import Support, count, model_names, support

OURS = "bundled"
"""The module of the models that come with this package."""


def kept(out: Path = RESULTS) -> Records:
    """The families."""
    return Records(out / "backbones.jsonl", "family")


def row(family: str, found: list[Support]) -> Row:
    """The line of a family."""
    total = count(found)
    return {
        "family": family,
        "timm": timm.__version__,
        "names": total.names,
        "checkpoints": total.checkpoints,
        "prompted_names": total.prompted_names,
        "prompted_checkpoints": total.prompted_checkpoints,
        "known_names": total.known_names,
        "known_checkpoints": total.known_checkpoints,
        "refused": sorted(each.name for each in found if each.builds and not each.prompts),
        "unbuilt": sorted(each.name for each in found if not each.builds),
    }


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    rows = kept(out).rows()
    if not rows:
        return {}
    head = ["timm's module", "names", "checkpoints", "deep prompts: names", "checkpoints", "all deltas: names"]
    whole = ("names", "checkpoints", "prompted_names", "prompted_checkpoints", "known_names", "known_checkpoints")
    ranked = sorted(rows, key=lambda row: (-row["prompted_names"], row["family"]))
    lines = [[f"`{row['family']}`", *(f"{row[key]:,}" for key in whole[:-1])] for row in ranked]
    total = {key: sum(row[key] for row in rows) for key in whole}
    unbuilt = [name for row in rows for name in row["unbuilt"]]
    left = f" timm does not build {len(unbuilt)} names on the meta device: {', '.join(unbuilt)}." if unbuilt else ""
    partly = [row for row in ranked if 0 < row["prompted_names"] < row["names"]]
    refused = [[f"`{row['family']}`", ", ".join(f"`{name}`" for name in row["refused"])] for row in partly]
    return {
        "backbones": markdown(head, lines),
        "backbone count": (
            f"timm {rows[0]['timm']} has {total['names']:,} names with {total['checkpoints']:,} checkpoints. Of these "
            f"{total['prompted_names']:,} names with {total['prompted_checkpoints']:,} checkpoints take deep prompts "
            f"and prefixes, {total['known_names']:,} names with {total['known_checkpoints']:,} all deltas.{left}"
        ),
        "backbones refused": markdown(["timm's module", "names that take no prompts"], refused),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="count nothing, print what is there")
    if not parser.parse_args(argv).print:
        every = map(support, track(model_names(), "Models"))
        found = sorted((each for each in every if each.family != OURS), key=lambda each: (each.family, each.name))
        kept().put(*(row(family, list(own)) for family, own in groupby(found, key=lambda each: each.family)))
    print(*blocks().values(), sep="\n\n")


if __name__ == "__main__":
    main()
