"""``vpt runs|rerun|report|profile``: what runs measured, left in their folders and cost, and one of them once more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.arguments import FIT_FLAGS, Parser, at_least, check_effect, output_folder
from vpt.errors import ConfigError, RecordError, VPTError
from vpt.image_size import plain_size
from vpt.run_record import (
    CONFIG_FILE,
    RUN_FILE,
    find_records,
    finished_record,
    images_read,
    read_record,
    score,
    score_names,
    subset_name,
)

if TYPE_CHECKING:  # imported when used: --help does not wait for torch
    from vpt.models import TunedModel


def run(args: list[str]) -> None:
    """Runs one of the four commands."""
    {"runs": _runs, "rerun": _rerun, "report": _report, "profile": _profile}[args[0]](args)


def _rerun(args: list[str]) -> None:
    """Repeats the run, and prints both numbers; one that came out otherwise is an error."""
    epilog = "Values that differ on this machine: --data.root FOLDER --model.weights FILE"
    parser = Parser(prog="vpt rerun", epilog=epilog)
    parser.onward = FIT_FLAGS
    parser.add_argument("run", type=Path, help="folder with run.json and config.yaml")
    parser.add_argument("--out", type=output_folder, help="keep the repetition in this folder (default: it is removed)")
    options, rest = parser.parse_known_args(args[1:])
    config = options.run / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{options.run} is no run: it has no {CONFIG_FILE}.")
    finished_record(options.run)

    from vpt.cli.commands.lightning_cli import resolve
    from vpt.experiments.trial import rerun

    found = rerun(options.run, resolve(["-c", str(config), *rest]), options.out)
    for key, (old, new) in found.numbers.items():
        print(f"{key:<22}{old:.8f}  {new:.8f}  {'equal' if old == new else f'{new - old:+.2e}'}")
    for key in found.alone:
        print(f"{key:<22}of one of them only")
    for text in found.differences:
        print(text)
    if not found.equal:
        reasons = "; ".join(found.differences) or "nothing that is recorded differs"
        raise VPTError(f"{options.run} did not come out equal ({reasons}).")
    print("equal, bit for bit")


def _runs(args: list[str]) -> None:
    """Prints a table and a list."""
    from vpt.screen import show

    parser = Parser(prog="vpt runs")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    folder = parser.parse_args(args[1:]).folder
    records, left_out = find_records([folder])
    if not records:
        reason = f": {left_out[0]}" if left_out else ": `vpt fit` writes one for each run."
        raise ConfigError(f"No {RUN_FILE} below {folder}{reason}")
    show(_table(folder, records))
    for sentence in check_comparable(record.get("data") or {} for record in records.values()):
        print(sentence)
    for home, record in records.items():
        data = record.get("data") or {}
        n = data.get("counts", {}).get("train", 0)
        print(f"\n{home}/" + (f" (preset {data['preset']}, {n:,} training images)" if "preset" in data else ""))
        for path in sorted(home.iterdir()):
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            size = sum(file.lstat().st_size for file in files) / 1024
            name = f"{path.name}/ ({len(files)} files)" if path.is_dir() else path.name
            print(f"  {name:<48}{size:>8,.0f} KB")
    if left_out:
        raise RecordError(f"Not in the table: {' '.join(left_out)}")


def check_comparable(data: Iterable[Mapping[str, Any]]) -> list[str]:
    """Finds tasks that were measured under several presets, or after training on several shares of the images.

    Of each record it takes ``data``, as :meth:`ImageDataModule.describe` gives it; a sentence for each task and
    difference.
    """
    used: dict[tuple[str, str], Counter[str]] = {}
    for described in data:
        if "name" in described and "preset" in described:
            values = {"presets": described["preset"], "training subsets": subset_name(described.get("subset"))}
            for what, value in values.items():
                used.setdefault((described["name"], what), Counter())[value] += 1
    return [
        f"Not comparable: the runs on {name} use different {what} "
        f"({', '.join(f'{value}: {count}' for value, count in counts.items())})."
        for (name, what), counts in used.items()
        if len(counts) > 1
    ]


def _table(folder: Path, records: dict[Path, dict[str, Any]]) -> Any:
    """One line a run; no validation accuracy where all validation images were trained on, as version 0.1.0 measured."""
    from vpt.screen import Table

    names = score_names(records.values())
    title = f"{names[0].upper()}{names[1:]} (%) of the runs in {folder}"
    table = Table("run", "trained", "epochs", "seed", "val", "test", "n test", title=title)
    for home, record in records.items():
        metrics, data = record.get("metrics", {}), record.get("data") or {}
        if data.get("shared_with_train", {}).get("val", 0) >= data.get("counts", {}).get("val", 1):
            metrics = {key: value for key, value in metrics.items() if not key.startswith("val/")}
        scores = [score({"metrics": metrics}, split) for split in ("val", "test")]
        table.add_row(
            str(home.relative_to(folder)),
            f"{record.get('parameters', {}).get('trainable', 0):,}",
            str(record.get("epochs", "–")),
            str(record.get("seed", "–")),
            *("–" if found is None else f"{100 * found:.1f}" for found in scores),
            _share(images_read(record).get("test"), data.get("counts", {}).get("test")),
        )
    return table


def _share(read: int | None, count: int | None) -> str:
    """How many images were tested, and of how many where these are not all."""
    return "–" if read is None else f"{read:,}" if count in (None, read) else f"{read:,} of {count:,}"


def _report(args: list[str]) -> None:
    """Writes the files, and prints the tables."""
    parser = Parser(prog="vpt report")
    parser.add_argument("runs", type=Path, nargs="+", help="folders, searched for run.json of tested runs")
    mixed = "average across presets, partial data and epoch rules, too"
    parser.add_argument("--mixed", action="store_true", help=mixed)
    parser.add_argument("--out", type=output_folder, default="report", help="folder to write (default: report)")
    options = parser.parse_args(args[1:])

    from vpt.reports.run_report import run_report
    from vpt.reports.run_values import report
    from vpt.screen import Table, show

    made = run_report(report(options.runs, options.mixed))
    for table in made.tables[:2]:
        shown = Table(*table.columns, title=table.title, caption=table.note)
        shown.keys = table.words
        for row in table.rows:
            shown.add_row(*row)
        show(shown)
    print(*made.notes, sep="\n")
    paths = made.write(options.out)  # last: what has been computed is shown even if a figure cannot be drawn
    print(f"written to {options.out}: {', '.join(path.name for path in paths)}")
    if made.values["damaged"]:
        raise RecordError(f"Not in the report: {' '.join(made.values['damaged'])}")


def _profile(args: list[str]) -> None:
    """Measures, and prints the ledger."""
    epilog = "All other arguments are those of vpt fit: -c CONFIG, --model.weights random, ..."
    parser = Parser(prog="vpt profile", epilog=epilog)
    parser.onward = FIT_FLAGS
    parser.add_argument("--batch", type=at_least(1), help="batch size (default: 8)")
    parser.add_argument("--rounds", type=at_least(1), help="timing repetitions (default: 5)")
    parser.add_argument("--classes", type=at_least(1), help="profile without the data, with this number of classes")
    parser.add_argument("--run", type=Path, help="a finished run: steps until 95 %% of its best validation accuracy")
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    options, rest = parser.parse_known_args(args[1:])
    if options.run is None and not rest:
        raise ConfigError("vpt profile needs a config, e.g. -c configs/demo.yaml, or --run RUN.")
    if not rest:
        check_effect(options, "without a config", "batch", "rounds", "classes")

    if options.run is not None:
        read_record(options.run)

    from vpt.experiments.profile import profile, steps_to_share

    values = asdict(profile(_model(rest, options.classes), options.batch or 8, options.rounds or 5)) if rest else {}
    if options.run is not None:
        values["steps_to_95"], values["steps"] = steps_to_share(options.run)
    print(json.dumps(values, indent=1) if options.json else _text(values))


def _model(args: list[str], classes: int | None) -> TunedModel:
    from lightning.pytorch.cli import instantiate_class

    from vpt.cli.commands.lightning_cli import resolve
    from vpt.tasks.build import build, image_size

    config = resolve(args, data=classes is None)
    section = config["model"]
    own = section["init_args"].get("frozen_dtype")  # whose error is of the weights themselves
    if own is None and section["init_args"].get("weights", "pretrained") == "pretrained":
        section["init_args"]["weights"] = "random"  # they cost the same, and need no hub
    if classes is None:
        return build(config)[0].model
    if section["init_args"].get("num_classes") not in (None, classes):
        raise ConfigError(f"--classes {classes} contradicts model.num_classes: leave one of them out.")
    if idle := [arg for arg in args if arg.startswith("--data.") and not arg.startswith("--data.image_size")]:
        raise ConfigError(f"{idle[0]} has no effect with --classes, which reads no data: leave it out.")
    section["init_args"] |= {"num_classes": classes, "image_size": plain_size(image_size(config))}
    model: TunedModel = instantiate_class((), section).model
    return model


def _text(values: dict[str, float]) -> str:
    lines = []
    if "trainable" in values:
        batch, formula = values["batch"], values["formula"]
        said = "no formula after full fine-tuning" if formula is None else f"formula {formula:,}"
        lines = [
            f"trainable parameters  {values['trainable']:,} of {values['total']:,} ({said})",
            f"delta file            {values['delta_bytes'] / 1024:,.0f} KB",
            f"forward, an image     {values['forward_flops'] / batch / 1e9:.2f} GFLOPs, "
            f"{1000 * values['forward_seconds'] / batch:.1f} ms",
            f"forward and backward  {values['step_flops'] / batch / 1e9:.2f} GFLOPs, "
            f"{1000 * values['step_seconds'] / batch:.1f} ms",
            f"activation memory     {values['memory'] / 2**20:,.0f} MiB for {batch} images on {values['device']}",
        ]
    if values.get("frozen_error") is not None:
        lines.append(f"frozen in bfloat16    logits differ by {100 * values['frozen_error']:.2f} % of the largest")
    if "steps" in values:
        lines.append(f"95 % of best val/acc  after {values['steps_to_95']:,} of {values['steps']:,} steps")
    return "\n".join(lines)
