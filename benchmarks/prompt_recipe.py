"""What each part of `configs/method/prompt.yaml` is worth: tables of docs/deltas/prompt.md.

    python -m benchmarks.prompt_recipe --root $VPT_DATA [--tasks shapes ...] [--threads 1]
    python -m benchmarks.prompt_recipe --print

Each variant is trained on train800 as in `benchmarks.real_protocol`, with one rate and seed, and measured on val200:
test images are not read. A finished trial is a line of OUT/prompt_recipe.jsonl, and an interrupted run continues.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_protocol import BATCH, Place, arguments
from benchmarks.records import RESULTS, Records, markdown
from vpt.cli.commands.lightning_cli import resolve
from vpt.data import default_root
from vpt.experiments.trial import Trial, merged, run_trial
from vpt.run_record import score

RATES = {"shapes": 3e-3, "signdigits10": 3e-3, "caltech101": 1e-3}
"""AdamW's at batch 10, by task."""
SEED, WIDTH = 42, 192
CLIP = "trainer.gradient_clip_val"
PROMPT: dict[str, Any] = {"name": "prompt", "num_tokens": 4}
BIAS, SCALE, LORA = (
    {"name": "bias"},
    {"name": "norm", "bias": False},
    {"name": "lora", "rank": 2, "targets": ["q", "v"]},
)
ALL = [PROMPT, BIAS, SCALE, LORA]


def _deltas(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"model.deltas": list(parts)}


def _prompts(**options: Any) -> dict[str, Any]:
    return _deltas(PROMPT | options, BIAS, SCALE, LORA)


ABLATION: dict[str, dict[str, Any]] = {
    "recipe": {},
    "without prompts": _deltas(BIAS, SCALE, LORA),
    "without biases and scales": _deltas(PROMPT, LORA),
    "without LoRA": _deltas(PROMPT, BIAS, SCALE),
    "without clipping": {CLIP: None},
    "prompts alone": _deltas(PROMPT),
    "biases and scales alone": _deltas(BIAS, SCALE),
    "LoRA alone": _deltas(LORA),
    "nothing clipped, prompts alone": _deltas(PROMPT) | {CLIP: None},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "`gate: {init: -5}`": _prompts(gate={"init": -5}),
    "`init_head: probe`": {"model.init_head": "probe"},
    "`init: mean` (SPT)": _prompts(init="mean"),
    "`fourier: 0.5` (VFPT)": _prompts(fourier=0.5),
    "`adaptive` (VAPT)": _prompts(adaptive={}),
    "`log_bias`": _prompts(log_bias=True),
    "`temperature` (gated prompt tuning)": _prompts(temperature={}),
    "`prefix` beside (free keys and values)": _deltas(PROMPT, {"name": "prefix", "num_tokens": 4}, BIAS, SCALE, LORA),
    "`ema_decay: 0.99`": {"model.ema_decay": 0.99},
    "`init: frequency` (PAE's start)": _prompts(init="frequency"),
    "`koopman` (PAE's penalty)": _prompts(koopman={}),
    "both and `init_head: probe` (PAE)": _prompts(init="frequency", koopman={}) | {"model.init_head": "probe"},
    "`relocate` (PRO-VPT)": _prompts(relocate={}),
    "`metric_learning` (DA-VPT)": {"model.metric_learning": {}},
}
"""Each is added to the recipe."""
PARTS = {"ablation": ABLATION, "options": OPTIONS}


def run_trials(place: Place, tasks: Sequence[str], parts: Sequence[str]) -> None:
    """Makes what is missing."""
    kept = Records(place.out / "prompt_recipe.jsonl", "task", "variant")
    for part in parts:
        for variant, changes in PARTS[part].items():
            for task in tasks:
                if kept.find(task, variant) is not None:
                    continue
                values = {"data.train": "train800", "seed_everything": SEED, "model.base_lr": RATES[task] * 256 / BATCH}
                config = merged(resolve(arguments(place, task, "prompt")), values | changes)
                folder = place.build / "prompt_recipe" / task
                record = run_trial(Trial(f"{part}-{list(PARTS[part]).index(variant)}", config), folder)
                row = {"part": part, "task": task, "variant": variant, "rate": RATES[task], "seed": SEED}
                head = (WIDTH + 1) * record["data"]["num_classes"]
                row |= {"trained": record["parameters"]["trainable"] - head, "val": score(record, "val")}
                row |= {key: record[key] for key in ("seconds", "versions")}
                kept.put(row)
                shutil.rmtree(folder)


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    found = {(row["task"], row["variant"]): row for row in Records(out / "prompt_recipe.jsonl").rows()}
    made = {}
    tasks = [task for task in RATES if any(place == task for place, _ in found)]
    for part, variants in PARTS.items():
        lines = []
        for variant in dict.fromkeys(["recipe", *variants]):
            cells = [found.get((task, variant)) for task in tasks]
            if not any(cells):
                continue
            trained = next((f"{cell['trained']:,}" for cell in cells if cell is not None), "–")
            lines.append([variant, trained, *("–" if cell is None else f"{100 * cell['val']:.1f}" for cell in cells)])
        heads = [f"{task}, rate {RATES[task]:g}" for task in tasks]
        if len(lines) > 1:
            made[f"recipe {part}"] = markdown(["val200 top-1", "trained beside the head", *heads], lines)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--tasks", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: two batches a trial, kept under BUILD/quick")
    args = parser.parse_args(argv)
    out, build = (args.build / "quick/results", args.build / "quick") if args.quick else (args.out, args.build)
    if not args.print:
        torch.set_num_threads(args.threads)
        run_trials(Place(args.root, out, build, args.quick), args.tasks, args.parts)
    print(*blocks(out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
