"""What `benchmarks.robustness_tables` prints, trained and measured: four parts, whose trials are kept line by line."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import yaml
from lightning.pytorch.cli import instantiate_class
from numpy.typing import NDArray
from scipy.special import softmax

from benchmarks.records import Records, Row
from vpt.backbones import create_backbone
from vpt.data import ImageDataModule, ImageList, ShapeTextureDataModule
from vpt.data.catalog.cards import find_card
from vpt.data.catalog.classes import Groups, imagenet_names
from vpt.data.corruptions import PUBLISHED
from vpt.data.datasets.imagenet import read_test_set
from vpt.data.datasets.published_files import hold_out
from vpt.data.splits import Split, listed_split, no_split
from vpt.data.transforms import get_preset
from vpt.experiments.trial import Trial, run_trial
from vpt.metrics.logits import group_mean
from vpt.metrics.summary import summary
from vpt.robustness import Record, logit_records, run
from vpt.robustness.zero_shot_heads import own_head, write_head
from vpt.run_record import DELTA_FILE, PROBE

BACKBONE = "vit_tiny_patch16_224"
WEIGHTS = "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = (42, 44, 82)
EPOCHS = 4
BATCH = 10
BF16: Final = "bf16-mixed"
"""Training, and measuring what was trained, under autocast: half the time where the processor has bfloat16."""
GRID = tuple(step / 10 for step in range(11))
SCORES = ("top1", "ece")
PENALTIES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]

Section = dict[str, Any]
"""The data section of a config."""
Scored = Callable[[str, Record], list[tuple[str, NDArray[Any], NDArray[np.int64]]]]
"""From a set's name and record to names, logits and labels of what is scored."""
_PROMPT = {"name": "prompt", "num_tokens": 10}


@dataclass(frozen=True)
class Method:
    """A way to adapt the backbone; options are those of the task."""

    title: str
    colour: str
    task: str
    options: dict[str, Any]
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def solved(self) -> bool:
        """Whether the head is the exact minimum, which no seed of training changes."""
        return self.options.get("solver") == "lbfgs"


def _recipe() -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of task and trainer of the prompt recipe."""
    config = yaml.safe_load((CONFIGS / "method" / "prompt.yaml").read_text(encoding="utf-8"))
    return {"deltas": config["model"]["init_args"]["deltas"]}, config["trainer"]


METHODS = {
    "linear": Method("linear probe, exact", "#4b5563", "LinearProbe", {"solver": "lbfgs"}),
    "full": Method("full fine-tuning", "#1d4ed8", "FineTuning", {}),
    "lpft": Method("LP-FT", "#0e7490", "FineTuning", {}),
    "lora": Method(
        "LoRA, rank 8 on q, v",
        "#a16207",
        "DeltaTuning",
        {"deltas": [{"name": "lora", "rank": 8, "targets": ["q", "v"]}]},
    ),
    "shallow": Method("VPT-shallow, 10 tokens", "#c2410c", "PromptTuning", {"num_tokens": 10, "deep": False}),
    "deep": Method("VPT-deep, 10 tokens", "#7e22ce", "PromptTuning", {"num_tokens": 10}),
    "joint": Method(
        "joint: VPT-deep + full (not frozen)", "#be185d", "DeltaTuning", {"deltas": [_PROMPT, {"name": "full"}]}
    ),
    "recipe": Method("prompt recipe", "#15803d", "DeltaTuning", *_recipe()),
    "recipe_probe": Method("prompt recipe from the probe", "#65a30d", "DeltaTuning", *_recipe()),
    "recipe_wise": Method("prompt recipe from the probe, at α = 0.5", "#b91c1c", "DeltaTuning", *_recipe()),
    "recipe_mean": Method("mean answers of four recipes: two rates, two starts", "#111827", "DeltaTuning", *_recipe()),
}


@dataclass(frozen=True)
class Place:
    """Where things are, and whether this is only a rehearsal: two batches of training, 20 images a set, three α."""

    root: Path
    weights: Path
    out: Path
    build: Path
    quick: bool

    @property
    def alphas(self) -> tuple[float, ...]:
        """Where curves are evaluated."""
        return (0.0, 0.5, 1.0) if self.quick else GRID

    def kept(self, part: str, name: str, make: Callable[[], Row]) -> Row:
        """Reads a finished trial of a part, or makes it and keeps it."""
        kept = trials(self.out, part)
        if (found := kept.find(name)) is not None and not _corrupted_before(found):
            return found
        start = time.monotonic()
        trial = {"trial": name, **make()}
        trial |= {"seconds": round(time.monotonic() - start, 1), "threads": torch.get_num_threads()}
        kept.put(trial)
        print(f"{time.strftime('%H:%M')} {name}: {trial['seconds']} s", file=sys.stderr, flush=True)
        return trial

    def delta(self, name: str) -> Path:
        """Where the tensors of a trial are; never committed."""
        return self.build / "trials" / name / DELTA_FILE


def _corrupted_before(trial: Row) -> bool:
    """Whether a trial has corruptions of version 0.1, whose parameters were others: it is measured again."""
    rows = trial.get("rows", ())
    return any(row["severity"] is not None and row.get("corruptions") != PUBLISHED for row in rows)


def trials(out: Path, part: str) -> Records:
    """The finished trials of a part."""
    return Records(out / f"robustness_{part}.jsonl", "trial")


def fit(
    place: Place,
    name: str,
    method: str,
    data: Section,
    rate: float | list[float],
    seed: int,
    epochs: int = EPOCHS,
    head: Path | float | None = None,
    more: Mapping[str, Any] | None = None,
) -> Row:
    """Trains, leaves the delta file in the build folder, and says how it went; `rate` is AdamW's, or penalties.

    Training starts at a `head` of a file, or at a probe of that penalty; `more` are options of the task.
    """
    own = {"l2": rate} if isinstance(rate, list) else {"base_lr": rate * 256 / BATCH}
    model: Section = {"backbone": BACKBONE, "weights": str(place.weights), "optimizer": "adamw"}
    start: Section = {"init_head": None if head is None else str(head)}
    model |= {"init_head": PROBE, "probe_l2": head} if isinstance(head, float) else start
    model |= {**METHODS[method].options, **own, **(more or {})}
    trainer: Section = {"max_epochs": epochs, "precision": BF16, "num_sanity_val_steps": 0}
    trainer |= {**METHODS[method].trainer, "check_val_every_n_epoch": epochs} | (
        {"limit_train_batches": 2} if place.quick else {}
    )
    config = {
        "seed_everything": seed,
        "trainer": trainer,
        "model": {"class_path": f"vpt.tasks.{METHODS[method].task}", "init_args": model},
        "data": data,
    }
    found = run_trial(Trial(name, config), place.build / "trials")
    metrics, counts = found["metrics"], found["data"]["counts"]
    return {
        "rate": metrics.get("train/l2", rate[0]) if isinstance(rate, list) else rate,
        "seed": seed,
        "epochs": epochs,
        "batch": BATCH,
        "precision": BF16,
        "preset": found["data"]["preset"],
        "train_n": counts["train"],
        "val_n": counts["val"],
        "val": metrics["val/acc"],
        "trainable": found["parameters"]["trainable"],
    }


def measure(
    place: Place,
    name: str,
    delta: Path,
    data: ImageDataModule,
    alphas: Sequence[float] = (1.0,),
    anchor: Path | None = None,
    severities: Sequence[int] = (),
    bf16: bool = True,
    scored: Scored = lambda name, record: [(name, record.scored, record.label)],
) -> list[Row]:
    """Scores a delta file on all sets; the records stay in the build folder, where an interrupted one continues."""
    images = 20 if place.quick else None
    weights = str(place.weights)
    out = place.build / name
    result = run(delta, data, alphas, out, anchor, images, severities, batch_size=16, weights=weights, bf16=bf16)
    rows: list[Row] = []
    for row in result.rows:
        for title, logits, labels in scored(row.set, logit_records.read(out / "records" / str(row.record))):
            found = summary(logits, labels)
            numbers = {key: round(cast("float", found[key]), 6) for key in SCORES}
            where = {"set": title, "kind": row.kind, "severity": row.severity, "alpha": row.alpha, "n": len(labels)}
            rows.append({**where, **numbers} | ({} if row.severity is None else {"corruptions": PUBLISHED}))
    return rows


def select(tried: Sequence[Row]) -> float:
    """The rate with the best validation accuracy; of several the smallest."""
    return float(min(tried, key=lambda trial: (-trial["val"], trial["rate"]))["rate"])


def _vtab(place: Place, task: str, preset: str, seed: int, **shots: int) -> Section:
    """Trained on train800 throughout, so that val200 may choose rate and α."""
    args = {"task": task, "root": str(place.root), "train": "train800", "preset": preset, "batch_size": BATCH}
    return {"class_path": "vpt.data.VTABDataModule", "init_args": {**args, "image_size": 224, "seed": seed, **shots}}


def _read(section: Section) -> ImageDataModule:
    data: ImageDataModule = instantiate_class((), section)
    return data


# PACS: six methods trained on its photos, from the linear probe to each of them in steps of α.

PACS_RATES = {
    "deep": (2e-3, 4e-3),
    "full": (1e-4, 3e-4),
    "lpft": (3e-5, 1e-4),
    "lora": (1e-3, 4e-3),
    "shallow": (4e-3, 8e-3),
    "recipe": (1e-3, 3e-3),
}
PACS_PROBE = "pacs-linear"
PACS_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHIFTS = ("art_painting", "cartoon", "sketch")


def run_pacs(place: Place) -> None:
    """Makes what is missing: the probe, then every method with the first seed, then the other seeds."""
    first = SEEDS[0]
    place.kept("pacs", PACS_PROBE, partial(_pacs_probe, place))
    for seed in SEEDS:
        for method, rates in PACS_RATES.items():
            tried = [
                place.kept("pacs", f"pacs-{method}-{rate:g}-{first}", partial(_pacs_fit, place, method, rate, first))
                for rate in rates
            ]
            name = f"pacs-{method}-sweep-{seed}"
            place.kept("pacs", name, partial(_pacs_sweep, place, method, select(tried), seed))


def _pacs(place: Place, seed: int) -> Section:
    return _vtab(place, "pacs7_photo", "square", seed)


def _pacs_probe(place: Place) -> Row:
    """The exact linear probe, which is α = 0 of all others; the penalty is chosen on val200."""
    data = _pacs(place, SEEDS[0])
    trial = fit(place, PACS_PROBE, "linear", data, PENALTIES, SEEDS[0], 1)
    return trial | {"rows": measure(place, PACS_PROBE, place.delta(PACS_PROBE), _read(data))}


def _pacs_anchor(place: Place) -> Path:
    fit(place, PACS_PROBE, "linear", _pacs(place, SEEDS[0]), PENALTIES, SEEDS[0], 1)
    return place.delta(PACS_PROBE)


def _pacs_fit(place: Place, method: str, rate: float, seed: int) -> Row:
    head = _pacs_anchor(place) if method == "lpft" else None
    return fit(place, f"pacs-{method}-{rate:g}-{seed}", method, _pacs(place, seed), rate, seed, head=head)


def _pacs_sweep(place: Place, method: str, rate: float, seed: int) -> Row:
    name = f"pacs-{method}-{rate:g}-{seed}"
    _pacs_fit(place, method, rate, seed)
    alphas = place.alphas if place.quick else PACS_ALPHAS
    rows = measure(place, name, place.delta(name), _read(_pacs(place, seed)), alphas, _pacs_anchor(place))
    return {"method": method, "rate": rate, "seed": seed, "rows": rows}


# Few shots: accuracy and calibration by the number of training images of each class.

SHOTS = {"caltech101": (1, 2, 4), "signdigits10": (1, 2, 4, 8, 16, 32)}
SHOT_PRESETS = {"caltech101": "square", "signdigits10": "timm"}
SHOT_RATES = {
    "caltech101": {"linear": 1e-3, "full": 3e-4, "deep": 4e-3, "joint": 3e-4}
    | dict.fromkeys(("recipe", "recipe_probe", "recipe_wise"), 1e-3),
    "signdigits10": {"linear": 3e-2, "full": 1e-4, "deep": 4e-3, "joint": 1e-4}
    | dict.fromkeys(("recipe", "recipe_probe", "recipe_wise"), 3e-3),
}
"""What val200 chose of three to five after training on all of train800, four epochs; joint takes that of full.

A probe to start at has the penalty of the linear one."""
SHOT_MEAN = "recipe_mean"
SHOT_MEMBERS = tuple(product(("recipe", "recipe_probe"), (1e-3, 3e-3)))
"""What it averages: the grid of a user who has no images to choose on, the same for every task (FewTrans' protocol)."""
SHOT_STEPS = 100


def run_fewshot(place: Place) -> None:
    """Makes what is missing, all methods of the first seed first."""
    for seed in SEEDS:
        for task, counts in SHOTS.items():
            for shots in counts:
                for method in (*SHOT_RATES[task], SHOT_MEAN):
                    make = partial(_fewshot_mean, place, task, shots, seed)
                    if method != SHOT_MEAN:
                        make = partial(_fewshot, place, task, method, shots, seed)
                    place.kept("fewshot", f"fewshot-{task}-{method}-{shots}-{seed}", make)


def _fewshot_mean(place: Place, task: str, shots: int, seed: int) -> Row:
    answers, members = [], []
    for method, rate in SHOT_MEMBERS:
        trial = _fewshot(place, task, method, shots, seed, rate)
        row = trial["rows"][0]
        name = _shot_name(task, method, shots, seed, rate)
        record = next((place.build / name / "records").glob("*.parquet"))
        answers.append(logit_records.read(record))
        members.append({"start": method, "rate": rate, "top1": row["top1"]})
    if not all(each.same_images(answers[0]) for each in answers):
        raise ValueError("the members were tested on different images")
    mixed = np.log(np.mean([softmax(each.scored.astype(np.float64), axis=1) for each in answers], axis=0))
    found = summary(mixed.astype(np.float32), answers[0].label)
    scores = {key: round(cast("float", found[key]), 6) for key in SCORES}
    rows = [{**row, **scores}]
    kept = {key: trial[key] for key in ("seed", "epochs", "batch", "precision", "preset", "train_n", "val_n")}
    return {"method": SHOT_MEAN, "shots": shots, **kept, "members": members, "rows": rows}


def _shot_name(task: str, method: str, shots: int, seed: int, rate: float | None = None) -> str:
    return f"fewshot-{task}-{method}-{shots}-{seed}" + ("" if rate is None else f"-{rate:g}")


def _fewshot(place: Place, task: str, method: str, shots: int, seed: int, other_rate: float | None = None) -> Row:
    data = _vtab(place, task, SHOT_PRESETS[task], seed, shots=shots, subset_seed=seed)
    name, solved = _shot_name(task, method, shots, seed, other_rate), METHODS[method].solved
    rate = SHOT_RATES[task][method] if other_rate is None else other_rate
    steps = math.ceil(len(_read(data).split("train")) / BATCH)
    epochs = 1 if solved or place.quick else max(EPOCHS, math.ceil(SHOT_STEPS / steps))
    head = SHOT_RATES[task]["linear"] if method in ("recipe_probe", "recipe_wise") else None
    if not place.delta(name).is_file():
        shutil.rmtree(place.build / name, ignore_errors=True)  # records of an earlier training
    trial = fit(place, name, method, data, [rate] if solved else rate, seed, epochs, head)
    alphas, anchor = (1.0,), None
    if method == "recipe_wise":
        alphas, probe = (0.5,), _shot_name(task, "linear", shots, seed)
        fit(place, probe, "linear", data, [SHOT_RATES[task]["linear"]], seed, 1)
        anchor = place.delta(probe)
    rows = measure(place, name, place.delta(name), _read(data), alphas, anchor)
    place.delta(name).unlink()  # 22 MB each after full fine-tuning, and nothing reads it again
    return {"method": method, "shots": shots, **trial, "rows": [row for row in rows if row["kind"] == "clean"]}


# The classifier that the weights were published with: as it is, and as the start of tuned models.

PRESET = "timm"
STIMULI = {"cue-conflict": "test", "edges": "edges", "silhouettes": "silhouettes"}
"""Sets of shape_texture16, and the splits they are."""
IMAGENET = "imagenet-own-head"
SEVERITIES = (1, 3, 5)
HEAD_RATES = {"full": (3e-5, 1e-4), "deep": (1e-3, 4e-3)}
HEAD_SEVERITY = 3


class Photos(ImageDataModule):
    """flickr_in1k_1000 to test on, and in halves also to train on; edges, silhouettes, cue conflicts as shifts.

    A shift's label is the smallest ImageNet id of its class: :meth:`scored` makes 16 classes of the 1,000.
    """

    def __init__(self, root: str, halves: bool, seed: int = 0, image_size: int = 224) -> None:
        """Reads the lists; with `halves` tests on 500 of the 1,000 photos, trains on 400, validates on 100."""
        card = find_card("flickr_in1k_1000")
        images = read_test_set("flickr_in1k_1000", Path(root), True, False).images
        stimuli = ShapeTextureDataModule(Path(root))
        self.ids: Groups = stimuli.class_ids()
        self.textures = stimuli.texture_labels
        first = np.array([ids[0] for ids in self.ids])
        why = "The photos are a test set: train on half of them."
        splits = {name: no_split(f"flickr_in1k_1000/no-{name}", why) for name in ("train", "val")}
        parts = {"test": images}
        if halves:
            parts["test"], tuned = hold_out(images, 2)
            parts["train"], parts["val"] = hold_out(tuned, 5)
        splits |= {name: _split(name, part, image_size) for name, part in parts.items()}
        for name, split in STIMULI.items():
            found = stimuli.split(split)
            pixels: Callable[..., Any] = partial(_stimuli, stimuli, split)
            splits[name] = Split(f"shape_texture16/{name}", found.paths, first[found.labels], pixels)
        super().__init__("flickr_in1k_1000", imagenet_names(), splits, PRESET, image_size, BATCH, 0, seed, "none", card)

    def scored(self, name: str, record: Record) -> list[tuple[str, NDArray[Any], NDArray[np.int64]]]:
        """What counts: of shape_texture16 the mean probability of each class's ids, as in its paper."""
        if name not in STIMULI:
            return [(name, record.scored, record.label)]
        logits, place = group_mean(record.logits, self.ids), {ids[0]: each for each, ids in enumerate(self.ids)}
        shapes = np.array([place[int(label)] for label in record.label], dtype=np.int64)
        if name != "cue-conflict":
            return [(name, logits, shapes)]
        return [(f"{name}, shape", logits, shapes), (f"{name}, texture", logits, self.textures[record.index])]


def _split(name: str, images: ImageList, size: int) -> Split:
    return listed_split(f"flickr_in1k_1000/{name}", images, get_preset(PRESET), size)


def _stimuli(data: ShapeTextureDataModule, split: str) -> Any:
    return data.split(split).images


def _own_head(place: Place, data: ImageDataModule) -> Path:
    """Writes the weights' own classifier of all 1,000 classes as a delta file."""
    path = place.build / "own-head.safetensors"
    if not path.is_file():
        backbone = create_backbone(BACKBONE, str(place.weights))
        info = {"head": "pretrained", "classes": None}
        write_head(path, backbone, own_head(backbone), data.class_names, data.preset.to_dict(), info)
    return path


def run_imagenet(place: Place) -> None:
    """Evaluates every set once."""
    place.kept("imagenet", IMAGENET, partial(_imagenet, place))


def _imagenet(place: Place) -> Row:
    data = Photos(str(place.root), halves=False)
    head = _own_head(place, data)
    rows = measure(place, IMAGENET, head, data, severities=SEVERITIES, scored=data.scored, bf16=False)
    return {"preset": PRESET, "rows": rows}


def run_own_head(place: Place) -> None:
    """Chooses each method's rate with the first seed, and measures every α of every seed."""
    for seed in SEEDS:
        for method, rates in HEAD_RATES.items():
            tried = [
                place.kept(
                    "own_head", f"own-head-{method}-val-{rate:g}-{SEEDS[0]}", partial(_head_fit, place, method, rate)
                )
                for rate in rates
            ]
            name = f"own-head-{method}-sweep-{seed}"
            place.kept("own_head", name, partial(_head_sweep, place, method, select(tried), seed))


def _head_fit(place: Place, method: str, rate: float, seed: int = SEEDS[0]) -> Row:
    args = {"root": str(place.root), "halves": True, "seed": seed}
    section = {"class_path": "benchmarks.robustness_runs.Photos", "init_args": {**args, "image_size": 224}}
    head = _own_head(place, _read(section))
    return fit(place, f"own-head-{method}-{rate:g}-{seed}", method, section, rate, seed, head=head)


def _head_sweep(place: Place, method: str, rate: float, seed: int) -> Row:
    data, name = Photos(str(place.root), halves=True), f"own-head-{method}-{rate:g}-{seed}"
    _head_fit(place, method, rate, seed)
    delta, anchor = place.delta(name), _own_head(place, data)
    rows = measure(place, name, delta, data, place.alphas, anchor, (HEAD_SEVERITY,), scored=data.scored)
    return {"method": method, "rate": rate, "seed": seed, "rows": rows}
