"""What `vpt` does on one card, in eight minutes: the tests of tests/gpu, then time and memory of everything that costs.

    python -m benchmarks.gpu [--minutes 8] [--out benchmarks/results]
    python -m benchmarks.gpu --tiny --out FOLDER    # tries the program, on any machine: its numbers are no result
    python -m benchmarks.gpu --print

Weights are random and images generated: nothing is downloaded. Sections come in the order of their importance, each
with a limit; what does not fit into the minutes is left out, and says so, as does what fails. Each finding is written
at once, to OUT/gpu.jsonl, and the tables to OUT/gpu.md. A new run replaces an earlier one.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_sections as sections
from benchmarks.gpu_sections import FULL, TINY, OutOfTime, Scale
from benchmarks.records import RESULTS, Records, Row, machine, markdown
from vpt.atomic_write import write_text

Measure = Callable[[Scale, str], Iterator[Row]]
SECTIONS: dict[str, tuple[float, Measure]] = {
    "ceiling": (15, sections.ceiling),
    "tests": (120, sections.tests),
    "eager": (90, sections.steps),
    "trial": (90, sections.trial),
    "strengths": (40, sections.strengths),
    "bank": (30, sections.bank),
    "data": (30, sections.data),
    "compiled": (240, partial(sections.steps, mode="compiled")),
}
"""By name, the most seconds that each may take, and what it measures."""
LEAST = 5.0
"""Seconds below which no section is begun."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in what runs longer than so many seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(scale: Scale, device: str, minutes: float, out: Path) -> None:
    """Runs the sections, and keeps each row as it is found."""
    kept, where, end = _kept(out), machine(device), time.monotonic() + 60 * minutes
    kept.path.unlink(missing_ok=True)

    def keep(section: str, row: Row) -> None:
        kept.put({"section": section, **row, "machine": where})
        print(section, row, file=sys.stderr, flush=True)

    for name, (most, section) in SECTIONS.items():
        start = time.monotonic()
        if end - start < LEAST:
            keep(name, {"what": "note", "note": f"left out: {minutes:g} minutes were over"})
            continue
        seconds = min(most, end - start)
        try:
            with limited(seconds):
                for row in section(scale, device):
                    keep(name, row)
        except OutOfTime:
            keep(name, {"what": "note", "note": f"stopped after {seconds:.0f} s: the rest is left out"})
        except Exception as error:
            traceback.print_exc()
            text = str(error).partition("\n")[0]
            keep(name, {"what": "note", "note": f"failed: {type(error).__name__}: {text}"})
        keep(name, {"what": "time", "seconds": time.monotonic() - start})
        gc.collect()  # models refer to themselves
        if device == "cuda":
            torch.cuda.empty_cache()
        write_text(out / "gpu.md", "\n\n".join(blocks(out).values()) + "\n")


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown: nothing without a record."""
    rows = _kept(out).rows()
    if not rows:
        return {}
    lines = [["device", rows[0]["machine"]["device"]]]
    lines += [line for row in rows if row["what"] not in ("time", "note") for line in _lines(row)]
    lines += [[f"section *{row['section']}*", row["note"]] for row in rows if row["what"] == "note"]
    shown = [row for row in rows if row["section"] in ("eager", "compiled") and "step_ms" in row]
    ranks = {name: place for place, name in enumerate(dict.fromkeys(row["backbone"] for row in shown))}
    shown.sort(key=lambda row: (ranks[row["backbone"]], row["mode"] == "compiled", row["tokens"]))
    head = [
        "backbone",
        "mode",
        "tokens",
        "concatenated, ms/image",
        "ours",
        "ours, `log_bias`",
        "backbone only",
        "speed-up",
    ]
    head += ["`log_bias` / without", "TFLOP/s, ours", "peak memory (MiB), concatenated", "ours", "backbone only"]
    return {"gpu": markdown(["measured on one card", "value"], lines), "gpu steps": markdown(head, _steps(shown), 2)}


def _steps(rows: Sequence[Row]) -> list[list[Any]]:
    """The lines of the table of steps."""
    return [
        [
            row["backbone"],
            row["mode"],
            row["tokens"],
            *(f"{row['step_ms'][key]:.3f}" for key in ("plain", "ours", "log bias", "bare")),
            f"{row['step_ms']['plain'] / row['step_ms']['ours']:.2f}",
            f"{row['step_ms']['log bias'] / row['step_ms']['ours']:.2f}",
            f"{row['tflops']['ours']:.0f}",
            *(f"{row['memory_mib'][key]:.0f}" for key in ("plain", "ours", "bare")),
        ]
        for row in rows
    ]


def _lines(row: Row) -> Iterator[list[str]]:
    """What the first table says of a row."""
    section, of = row["section"], f"{row.get('backbone')}"
    if section == "ceiling":
        yield from ([f"matrix product, {key}", f"{value:.0f} TFLOP/s"] for key, value in row["tflops"].items())
    elif section == "tests":
        kinds = ("passed", "failed", "skipped", "not_run")
        yield ["tests passed, failed, skipped, not run", ", ".join(str(row[kind]) for kind in kinds)]
        yield from (["failed test", name] for name in row["failures"])
    elif section == "trial":
        what = f"a trial of VPT-deep, {of}, {row['epochs']} epochs of {row['images']} cached images, {row['precision']}"
        yield [what, f"{row['seconds']:.1f} s, {row['trials_per_hour']:.0f} an hour"]
    elif section == "strengths":
        for count, seconds in row["seconds"].items():
            yield [f"{row['images']} images at {count} strengths α, {of}, bf16", f"{seconds:.1f} s"]
    elif section == "bank":
        yield [
            f"`PromptBank`, {row['tasks']} tasks in a batch of {row['batch']}, {of}",
            f"{row['images_per_s']:.0f} images/s",
        ]
    elif section == "data":
        yield [f"of an epoch of VPT-deep, {of}, lost to reading cached images", f"{row['lost']:.1%}"]


def _kept(out: Path) -> Records:
    return Records(out / "gpu.jsonl", "section", "what")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, keeps and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few images, with or without a card")
    parser.add_argument("--out", type=Path, help="folder of the records (default: benchmarks/results)")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.print:
        if args.tiny and args.out is None:
            parser.error("--tiny needs --out: its numbers are no result")
        if not args.tiny and device == "cpu":
            parser.error("PyTorch sees no CUDA device here: --tiny --out FOLDER tries the program without one")
        measure(TINY if args.tiny else FULL, device, args.minutes, args.out or RESULTS)
    print(*blocks(args.out or RESULTS).values(), sep="\n\n")


if __name__ == "__main__":
    main()
