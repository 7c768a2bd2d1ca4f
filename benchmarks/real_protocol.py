"""The published procedure on five small tasks with twelve ways to adapt ViT-Ti/16: tables of docs/protocol.md.

    python -m benchmarks.real_protocol --root $VPT_DATA [--tasks caltech101 ...] [--methods lora ...] [--threads 1]
    python -m benchmarks.real_protocol --root $VPT_DATA --longer 20 --tasks shapes signdigits10
    python -m benchmarks.real_protocol --print
    python -m benchmarks.real_protocol --unpack build/runs    # the runs as folders, for `vpt report build/runs`

A cell of the table is what `vpt sweep --halving 3 --widen 3` does with the method's config over the task's: three rates
on train800, of which only the best on val200 goes on after two of four epochs (all go on of methods `IN_FULL`); up to
three more beyond an end that is the best; then three seeds on train800val200, test read once each. A finished cell is a
line of OUT/real_protocol.jsonl, each of its tested runs one of real_protocol_runs.jsonl, and the logits of the first
seed, where there are few, lie in real_protocol_logits.parquet: an interrupted run continues. All else stays under
--build.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.records import RESULTS, Records, Row, markdown
from vpt.atomic_write import atomic_write, write_json
from vpt.cli.commands.lightning_cli import resolve
from vpt.data import default_root
from vpt.experiments.executors import serially
from vpt.experiments.sweep import RATE, SWEEP_FILE, Plan, beyond, sweep
from vpt.experiments.transfer import Mode, transfer
from vpt.experiments.trial import ANSWERS_FILE, Failure, Trial, merged, run_trial
from vpt.experiments.variants import SERIES_FILE
from vpt.models.delta_format import without_places
from vpt.robustness import logit_records
from vpt.run_record import CONFIG_FILE, RUN_FILE, score

BACKBONE = "vit_tiny_patch16_224"
WEIGHTS = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = (42, 44, 82)
BATCH, EPOCHS, HALVING, WIDEN = 10, 4, 3, 3
LINEAR_EPOCHS = 12  # its features are kept, so an epoch costs next to nothing

TASKS = {
    "caltech101": "vtab/caltech101",
    "signdigits10": "local/signdigits10",
    "pacs7_photo": "local/pacs_photo",
    "digits": "demo",
    "shapes": "local/shapes",
}
METHODS = {
    "linear": (3e-3, 1e-2, 3e-2),
    "bias": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 2e-3, 4e-3),
    "adapter": (1e-3, 2e-3, 4e-3),
    "ssf": (1e-3, 3e-3, 1e-2),
    "prefix": (2e-3, 6e-3, 2e-2),
    "vpt_shallow": (2e-3, 4e-3, 8e-3),
    "vpt_deep": (2e-3, 4e-3, 8e-3),
    "prompt_bias": (1e-3, 2e-3, 4e-3),
    "prompt_lora": (1e-3, 2e-3, 4e-3),
    "prompt": (1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4),
}
"""By config of configs/method: AdamW's rates at batch 10."""
OTHERS = {
    "dora": (1e-3, 2e-3, 4e-3),
    "vera": (4e-3, 1e-2, 3e-2),
    "fact": (1e-3, 2e-3, 4e-3),
    "adapter_plus": (1e-3, 2e-3, 4e-3),
    "convpass": (1e-3, 2e-3, 4e-3),
    "rep_adapter": (1e-3, 2e-3, 4e-3),
    "difffit": (1e-3, 3e-3, 1e-2),
    "mlae": (1e-3, 2e-3, 4e-3),
    "glora": (1e-3, 2e-3, 4e-3),
    "pvera": (4e-3, 1e-2, 3e-2),
    "gps": (4e-4, 1e-3, 3e-3),
    "spt_lora": (1e-3, 2e-3, 4e-3),
}
"""Of a table of their own, as far as it has been measured."""
RATES = METHODS | OTHERS
IN_FULL = ("prompt",)
"""Methods whose rates are all trained to the end: at half of its epochs the recipe's best rate is often not ahead."""
TRANSFERRED = "vpt_deep"
LONGER = ("vpt_deep", "lora", "ssf", "prompt", "full")
"""Methods of the second budget of epochs."""


@dataclass(frozen=True)
class Place:
    """Where things are; `quick` rehearses with two batches an epoch and two seeds."""

    root: Path
    out: Path
    build: Path
    quick: bool

    @property
    def cells(self) -> Records:
        """What each finished cell found."""
        return Records(self.out / "real_protocol.jsonl", "task", "method")

    @property
    def runs(self) -> Records:
        """The record of each tested run."""
        return Records(self.out / "real_protocol_runs.jsonl", "task", "method", "seed")

    @property
    def longer(self) -> Records:
        """Runs of the first seed at the chosen rate with more epochs."""
        return Records(self.out / "real_protocol_longer.jsonl", "task", "method", "epochs")

    @property
    def logits(self) -> Path:
        """The answers of the first seed, a row for each test image."""
        return self.out / "real_protocol_logits.parquet"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the tested runs."""
        return SEEDS[:2] if self.quick else SEEDS


def arguments(place: Place, task: str, method: str) -> list[str]:
    """Those of `vpt sweep`, but for its own."""
    epochs = LINEAR_EPOCHS if method == "linear" else EPOCHS
    demo = ["--data.image_size=224"] if task in ("digits", "shapes") else [f"--data.root={place.root}"]
    quick = ["train", "val", "test"] if place.quick else []
    return [
        "-c",
        str(CONFIGS / f"{TASKS[task]}.yaml"),
        "-c",
        str(CONFIGS / "method" / f"{method}.yaml"),
        f"--model.backbone={BACKBONE}",
        f"--model.weights={place.root / WEIGHTS}",
        f"--data.batch_size={BATCH}",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.check_val_every_n_epoch={-(-epochs // HALVING)}",
        "--trainer.precision=bf16-mixed",
        "--trainer.num_sanity_val_steps=0",
        *demo,
        *(f"--trainer.limit_{split}_batches=2" for split in quick),
    ]


def plan(place: Place, method: str) -> Plan:
    """Three rates by val200, then the seeds."""
    rates = [rate * 256 / BATCH for rate in RATES[method]]
    choose, retrain = {"data.train": "train800"}, {"data.train": "train800val200"}
    halving = None if method in IN_FULL else HALVING
    return Plan({RATE: rates}, choose, retrain, place.seeds, halving, widen=WIDEN)


def run_cell(place: Place, task: str, method: str) -> None:
    """Runs what is missing of a cell and keeps its records."""
    kept = place.cells.find(task, method)
    folder = place.build / task / method
    if kept is None:
        runs = sweep(resolve(arguments(place, task, method)), plan(place, method), folder, serially).runs
        found = json.loads((folder / SWEEP_FILE).read_text())
    elif unfinished(kept):
        runs, found = _widened(place, task, method, kept, folder)
    else:
        return
    for seed in place.seeds if runs else ():
        record = folder / runs[seed] / RUN_FILE
        run = without_places(json.loads(record.read_text()))
        place.runs.put({"task": task, "method": method, "seed": seed, "run": run})
        if seed == place.seeds[0] and (logits := record.with_name(ANSWERS_FILE)).stat().st_size < 100_000:
            _keep_logits(place, task, method, logit_records.read(logits))
    names = ("chosen", "val", "tests", "tried", "seconds", "images")
    place.cells.put({"task": task, "method": method, "widen": WIDEN, **{name: found[name] for name in names}})


def _widened(place: Place, task: str, method: str, cell: Row, folder: Path) -> tuple[dict[int, str], Row]:
    """Goes on from the kept rates of a cell beyond their end; runs of its seeds only where another rate won."""
    config, asked = resolve(arguments(place, task, method)), plan(place, method)
    found = {**cell, "tried": list(cell["tried"])}
    for _ in range(WIDEN):
        more = beyond(found["chosen"], found["tried"])
        if not more:
            break
        values = asked.choose | asked.seeded(place.seeds[0]) | more[0]
        trial = Trial(f"beyond/{more[0][RATE]:g}", merged(config, values))
        record = serially([trial], folder)[trial.name]
        if isinstance(record, Failure):
            found["tried"].append(more[0] | {"failed": record.reason})
            break
        row = more[0] | {"val": score(record, "val"), "epochs": record["epochs"]}
        found["tried"] = sorted([*found["tried"], row], key=lambda each: float(each[RATE]))
        found |= {name: found[name] + record[name] for name in ("seconds", "images")}
        if row["val"] is None or row["val"] <= found["val"]:
            break
        found |= {"chosen": more[0], "val": row["val"]}
    if found["chosen"] == cell["chosen"]:
        return {}, found
    finals = sweep(config, replace(asked, grid={RATE: [found["chosen"][RATE]]}), folder, serially)
    tested = {"tests": {str(seed): value for seed, value in finals.tests.items()}}
    spent = {name: found[name] + getattr(finals, name) for name in ("seconds", "images")}
    return finals.runs, found | tested | spent


def run_longer(place: Place, task: str, method: str, epochs: int) -> None:
    """Trains a finished cell's first seed again at its rate, for more epochs."""
    cell = place.cells.find(task, method)
    if cell is None or place.longer.find(task, method, epochs) is not None:
        return
    values = plan(place, method).seeded(place.seeds[0]) | {"data.train": "train800val200"} | cell["chosen"]
    config = merged(resolve(arguments(place, task, method)), values | {"trainer.max_epochs": epochs})
    config = merged(config, {"trainer.check_val_every_n_epoch": epochs})
    record = run_trial(Trial(f"longer/{epochs}", config, test=True), place.build / task / method)
    row: Row = {"task": task, "method": method, "epochs": epochs, "seed": place.seeds[0], "chosen": cell["chosen"]}
    place.longer.put(row | {"test": score(record, "test"), "seconds": record["seconds"]})


def unfinished(cell: Row) -> bool:
    """Whether a cell of an earlier version stopped where its best rate was at an end of those tried."""
    return cell.get("widen", 0) < WIDEN and bool(beyond(cell["chosen"], cell["tried"]))


def _keep_logits(place: Place, task: str, method: str, record: logit_records.Record) -> None:
    answers = pa.table(
        {
            "task": [task] * len(record.index),
            "method": [method] * len(record.index),
            "index": record.index,
            "label": record.label,
            "logits": pa.array(list(record.logits), pa.list_(pa.float32())),
        }
    )
    if place.logits.is_file():
        before = pq.read_table(place.logits)
        answers = pa.concat_tables([before.filter(pc.invert(_of(before, task, method))), answers])
    with atomic_write(place.logits) as partial:
        pq.write_table(answers, partial, compression="zstd", compression_level=19)


def _of(answers: Any, task: str, method: str) -> Any:
    return pc.and_(pc.equal(answers["task"], task), pc.equal(answers["method"], method))


def unpack(place: Place, folder: Path, methods: Sequence[str] = tuple(METHODS)) -> None:
    """Writes the runs of some methods as `vpt report` reads them."""
    answers = pq.read_table(place.logits) if place.logits.is_file() else None
    for row in place.runs.rows():
        task, method, seed = row["task"], row["method"], row["seed"]
        if method not in methods:
            continue
        run = folder / task / method / f"seed-{seed}"
        write_json(run / RUN_FILE, row["run"])
        if answers is None or seed != SEEDS[0] or not len(own := answers.filter(_of(answers, task, method))):
            continue
        index, label = own["index"].to_numpy(), own["label"].to_numpy()
        logits = own["logits"].combine_chunks().flatten().to_numpy().reshape(len(own), -1)
        logit_records.write(run / ANSWERS_FILE, logit_records.Record(index, label, logits, {"set": "test"}, True))


def run_transfer(place: Place, mode: Mode) -> None:
    """The matrix of one method and the first seed."""
    kept = Records(place.out / "transfer.jsonl", "mode")
    if kept.find(mode) is not None:
        return
    folders = [_first_run(place, task) for task in TASKS]
    runs = {folder: resolve(["-c", str(folder / CONFIG_FILE)]) for folder in folders}
    matrix = transfer(runs, place.build / "transfer", serially, mode)
    kept.put({"mode": mode, "method": TRANSFERRED, "seed": SEEDS[0], "accuracy": matrix})


def _first_run(place: Place, task: str) -> Path:
    """The run of the first seed, trained again where only its record is left."""
    run_cell(place, task, TRANSFERRED)
    found = place.cells.find(task, TRANSFERRED) or {}
    again = replace(plan(place, TRANSFERRED), grid={RATE: [found["chosen"][RATE]]}, seeds=SEEDS[:1])
    folder = place.build / task / TRANSFERRED
    return folder / sweep(resolve(arguments(place, task, TRANSFERRED)), again, folder, serially).runs[SEEDS[0]]


def accuracy(
    out: Path = RESULTS, methods: Sequence[str] = tuple(METHODS), of: Sequence[str] = tuple(METHODS | OTHERS)
) -> str:
    """The table of test accuracies of those methods that are measured, on the tasks that any method `of` has."""
    cells = {(row["task"], row["method"]): row for row in Records(out / "real_protocol.jsonl").rows()}
    shown = {key: _accuracy(cell) for key, cell in cells.items() if key[1] in methods}
    tasks = [task for task in TASKS if any((task, method) in shown for method in of)]
    measured = [method for method in methods if any(method == name for _, name in shown)]
    rows = [[f"`{method}`", *(shown.get((task, method), "–") for task in tasks)] for method in measured]
    return markdown(["method", *tasks], rows)


def blocks(out: Path = RESULTS) -> dict[str, str]:
    """What is there, as Markdown."""
    found = Records(out / "real_protocol.jsonl").rows()
    cells = {(row["task"], row["method"]): row for row in found}
    rows = []
    for method in METHODS:
        rows.append([f"`{method}`", *(_chosen(cells.get((task, method))) for task in TASKS)])
    made = {"protocol": accuracy(out), "rates": markdown(["method", *TASKS], rows)}
    if others := [method for method in OTHERS if any(name == method for _, name in cells)]:
        made["other deltas"] = accuracy(out, others)
    if sizes := {row["task"]: row["run"]["read"]["test"] for row in Records(out / "real_protocol_runs.jsonl").rows()}:
        made["test images"] = f"Test images: {', '.join(f'{task} {n:,}' for task, n in sizes.items())}."
    if found:
        own = [cell for cell in found if cell["method"] in METHODS]
        edges = sum(bool(beyond(cell["chosen"], cell["tried"])) for cell in own)
        made["edges"] = f"{edges} of the {len(own)} chosen rates lie at an end of those tried."
    if longer := Records(out / "real_protocol_longer.jsonl").rows():
        made["longer"] = _longer(longer, cells)
    for row in Records(out / "transfer.jsonl").rows():
        matrix = row["accuracy"]
        lines = [[source, *(f"{100 * value:.1f}" for value in to.values())] for source, to in matrix.items()]
        made[f"transfer {row['mode']}"] = markdown([f"{row['mode']}: from ↓ to →", *matrix], lines)
    if (out / "pretrain.jsonl").is_file():
        made["shared"] = _shared(Records(out / "pretrain.jsonl").rows())
    return made


def _accuracy(cell: Row) -> str:
    values = list(cell["tests"].values())
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"


def _longer(rows: Sequence[Row], cells: dict[tuple[str, str], Row]) -> str:
    """The first seed at the rate chosen with `EPOCHS`, by epochs."""
    found = {(row["task"], row["method"], row["epochs"]): row["test"] for row in rows}
    first = str(SEEDS[0])
    found |= {(task, method, EPOCHS): cell["tests"][first] for (task, method), cell in cells.items()}
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    columns = [(task, epochs) for task in tasks for epochs in sorted({EPOCHS} | {row["epochs"] for row in rows})]
    lines = []
    for method in LONGER:
        tests = [found.get((task, method, epochs)) for task, epochs in columns]
        lines.append([f"`{method}`", *("–" if each is None else f"{100 * each:.1f}" for each in tests)])
    return markdown(["method", *(f"{task}, {epochs} epochs" for task, epochs in columns)], lines)


def _chosen(cell: Row | None) -> str:
    return "–" if cell is None else f"{cell['chosen'][RATE] * BATCH / 256:.2g} ({100 * cell['val']:.1f})"


def _shared(rows: Sequence[Row]) -> str:
    """`vpt pretrain`: each task alone, and from the shared delta."""
    found = {row["variant"]: row for row in rows}
    lines = []
    for task in (name.removesuffix("/alone") for name in found if name.endswith("/alone")):
        cells: list[str] = []
        for row in (found[f"{task}/alone"], found[f"{task}/shared"]):
            cells.append(f"{row['chosen'][RATE]:g}, {100 * row['val']:.1f}")
            cells.append(f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}")
        lines.append([task, *cells])
    head = ["task", "alone: base_lr, val200", "alone: test", "from the shared delta: base_lr, val200", "test"]
    return markdown(head, lines)


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Flags of all commands on these records."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(default_root()))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--build", type=Path, default=Path("build/real_protocol"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(RATES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--print", action="store_true", help="run nothing, print what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--transfer", nargs="*", choices=["frozen", "init"], help="then the transfer matrix")
    parser.add_argument("--longer", type=int, metavar="EPOCHS", help="only the methods that are trained so long, too")
    parser.add_argument("--quick", action="store_true", help="a rehearsal under BUILD/quick: two batches, two seeds")
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="write the tested runs there, run nothing")
    parser.add_argument("--shared", type=Path, metavar="FOLDER", help="keep what `vpt pretrain --out FOLDER` found")
    args = parser.parse_args(argv)
    if not args.print:
        torch.set_num_threads(args.threads)
    out, build = (args.build / "quick/results", args.build / "quick") if args.quick else (args.out, args.build)
    place = Place(args.root, out, build, args.quick)
    if args.unpack is not None:
        unpack(place, args.unpack, args.methods)
        return
    if args.shared is not None:
        Records(out / "pretrain.jsonl", "variant").put(*json.loads((args.shared / SERIES_FILE).read_text()))
    elif not args.print:
        for method in args.methods:
            for task in args.tasks:
                if args.longer is None:
                    run_cell(place, task, method)
                elif method in LONGER:
                    run_longer(place, task, method, args.longer)
        for mode in args.transfer or ():
            run_transfer(place, mode)
    print(*blocks(out).values(), sep="\n\n")


if __name__ == "__main__":
    main()
