"""`run`: a delta file, measured on the clean test set, on every shift and under corruption, at every α.

Every image is decoded once, then corrupted once per set and classified at every α.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vpt.argument_types import checked
from vpt.backbones.compilation import compile_for
from vpt.backbones.strength import checked_strength
from vpt.data import ImageDataModule, ImageDataset
from vpt.data.corruptions import BASIC, PARAMETERS, PUBLISHED, can_corrupt, title
from vpt.data.targets import check_multiclass
from vpt.deltas import DeltaSpec
from vpt.errors import ConfigError, check_number
from vpt.image_size import plain_size, size_text
from vpt.models import TunedModel
from vpt.models.delta_file import unfilled
from vpt.models.delta_format import identity, read_activations, read_header
from vpt.robustness.evaluation_result import RobustnessResult, Row, between, check_out, score, why_val_cannot_choose
from vpt.robustness.evaluation_sets import (
    VAL,
    VAL_CORRUPTED,
    VAL_SEVERITY,
    EvaluationSet,
    evaluation_sets,
    groups,
    subset,
)
from vpt.robustness.pairs import Pair, Target, evaluate, gather, make_pairs
from vpt.robustness.test_time import Adaptation, Stream, adapter
from vpt.robustness.unknown_images import UnknownRow, measure, unknown_splits
from vpt.robustness.wise_ft import Swept, Way, sweep
from vpt.run_record import file_identity
from vpt.run_record import identity as identity_of
from vpt.screen import console, plain
from vpt.sharding import Shard, claim, dissolve
from vpt.version import versions

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@checked
def run(
    delta: Path,
    data: ImageDataModule,
    alphas: Sequence[float],
    out: Path,
    anchor: Path | None = None,
    max_images: int | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    batch_size: int = 64,
    seed: int = 0,
    weights: str | None = None,
    corruptions: Sequence[str] = BASIC,
    start: Path | None = None,
    half: bool = False,
    bf16: bool = False,
    strengths: float | Sequence[float] | None = None,
    adapt: Adaptation | None = None,
    unknown: Sequence[Path] = (),
    compile: bool = False,
) -> RobustnessResult:
    """Evaluates a delta file in and out of distribution and stores all logits.

    Finished records under `out` are reused and interrupted ones continued where their protocol is the same.

    Args:
        delta: A delta file. After full fine-tuning its tensors are interpolated end to end, which needs an anchor.
            Where only the head differs, α = 0 and 1 are evaluated in one pass, and all others computed from these. A
            head without an anchor is evaluated at α = 1 only.
        data: The task it was trained on; its test split and shifts are used, and where α moves something its validation
            split, unless that was trained on.
        alphas: In [0, 1]: 0 is the frozen backbone, 1 the tuned model.
        out: Folder for ``robustness.json`` and ``records/*.parquet``.
        anchor: A linear probe's delta file, whose head belongs to α = 0; None for the tuned head at every α.
        max_images: Of each list, drawn by class; None for all.
        severities: Of each corruption; empty for no corrupted test images.
        batch_size: Images in a forward pass.
        seed: Of the draw for `max_images`.
        weights: Where the backbone's weights are; None for where they were at training time.
        corruptions: Kinds of corruption (:data:`vpt.data.corruptions.CORRUPTIONS`).
        start: A delta file of the same configuration, e.g. a run's ``init.safetensors``, that α = 0 is to be instead of
            the frozen backbone: all trained tensors are then interpolated.
        half: Keep logits as float16; such records are not interpolated.
        bf16: Forward passes under autocast to bfloat16: about twice as fast where the processor has it, logits to three
            digits. Every record and report says so.
        strengths: Of each layer at α = 1, or of the first and the last with a line between (LiNeS), or one, as
            `vpt.backbones.strength.checked_strength` reads them; α multiplies them. None for the tuned model.
        adapt: Adapt to the test images while they are answered, at α = 1 (`vpt.robustness.test_time`), in batches of
            `batch_size` and an order that follows from `seed`; an interrupted set begins anew. What it needs to know of
            training images is measured, unless the delta file keeps it and all strengths are 1. None for no adaptation.
        unknown: Folders of images of none of the classes, each scored at every α (`vpt.robustness.unknown_images`).
        compile: Forward passes under `torch.compile`, anew at each α: logits differ by rounding. Every record says so.

    Raises:
        ConfigError: An argument is out of range or not known, or delta, anchor and data do not belong together.
        DeltaFileError: A file is not a delta file, or belongs to other weights.
        DataError: An image cannot be read.
        WeightsError: The backbone's weights cannot be found.
    """
    return _prepared(**locals()).whole()


@checked
def run_shard(
    shard: Shard, delta: Path, data: ImageDataModule, alphas: Sequence[float], out: Path, **options: Any
) -> RobustnessResult | None:
    """Evaluates a share of the images of every test set, while other processes or machines evaluate the others.

    An interrupted shard is continued. The one that finds all others done puts them together to what `run` writes, byte
    for byte where the machines compute alike, and gives the result; the others give None.

    Args:
        shard: Which share. How many there are and `batch_size` are the same for all of them.
        delta: As of `run`, like all that follows.
        data: The task.
        alphas: In [0, 1].
        out: A folder that all of them see. Records of shards lie below it in ``shards`` until they are put together.
        **options: More arguments of `run`, but neither `adapt` nor `unknown`.

    Raises:
        ConfigError: `out` holds shards of another evaluation; or answers are to be adapted, which has an order, or
            unknown images are given. And what `run` raises.
    """
    given = inspect.signature(run).bind(delta, data, alphas, out, **options)
    given.apply_defaults()
    if given.arguments["adapt"] is not None:
        raise ConfigError("Adapting at test time is along a stream of images, which has no shards: leave one out.")
    if given.arguments["unknown"]:
        raise ConfigError("Unknown images have no shards: give them afterwards, to a run that finds the rest done.")
    return _prepared(**given.arguments).share(shard)


def _prepared(
    delta: Path,
    data: ImageDataModule,
    alphas: Sequence[float],
    out: Path,
    anchor: Path | None,
    max_images: int | None,
    severities: Sequence[int],
    batch_size: int,
    seed: int,
    weights: str | None,
    corruptions: Sequence[str],
    start: Path | None,
    half: bool,
    bf16: bool,
    strengths: float | Sequence[float] | None,
    adapt: Adaptation | None,
    unknown: Sequence[Path],
    compile: bool,
) -> _Evaluation:
    """Checks the arguments of `run`, and reads what they name."""
    if not alphas or len(set(alphas)) < len(alphas) or not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise ConfigError(f"alphas are distinct numbers between 0 (backbone) and 1 (tuned), got {list(alphas)}.")
    check_number("batch_size", batch_size, 1, 10**6, whole=True)
    check_number("seed", seed, 0, 2**63 - 1, whole=True)
    sets = evaluation_sets(data, severities, corruptions)
    model, tensors = unfilled(delta, weights)
    check_data(delta, model, data)
    check_multiclass(model.targets, "vpt robustness is")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if adapt is not None and (anchor is not None or start is not None):
        raise ConfigError("Adapting at test time is of α = 1, where anchor and start have no part: leave them out.")
    if adapt is not None and unknown:
        raise ConfigError("Unknown images are told by the model as it is: leave them out where it adapts.")
    strangers = unknown_splits(data, unknown)
    if adapt is not None and compile:
        raise ConfigError("Adapting at test time computes with a copy of the model that is not compiled: drop compile.")
    alphas = alphas if adapt is None else (1.0,)
    layers = 1.0 if strengths is None else checked_strength(strengths, model.backbone)
    swept = sweep(delta, model.to(device), tensors, alphas, anchor, start, layers)
    if compile:
        compile_for(swept.model, torch.device(device))
    way = swept.way
    wanted = [1.0] if way == "none" else sorted(float(alpha) for alpha in alphas)
    files = {"delta": delta, "anchor": anchor, "start": start}
    infos = [read_header(file)["info"] for file in files.values() if file is not None]
    not_chosen = why_val_cannot_choose(infos, data) if len(wanted) > 1 else "there is one α only."
    if not_chosen is None:
        chosen_on = [VAL, VAL_CORRUPTED] if can_corrupt(data) else [VAL]
        sets = [*(EvaluationSet(VAL, kind) for kind in chosen_on), *sets]
    precision = {"precision": "bf16" if bf16 else "fp32", "device": device}
    protocol = _protocol(files, model, data, way, half) | precision
    protocol |= {"compile": True} if compile else {}
    protocol |= {} if strengths is None else {"strengths": [layers] if isinstance(layers, float) else list(layers)}
    source = read_activations(delta) if adapt is not None and layers == 1.0 else None
    stream = None if adapt is None else Stream(adapter(adapt, swept.model, data, seed, source), batch_size, seed)
    protocol |= {} if stream is None else {"adapt": stream.protocol}
    drawn = {"max_images": max_images, "seed": seed if max_images else None, "corruptions": PUBLISHED}
    check_out(out, protocol | drawn)
    measured = [0.0, 1.0] if way == "head" and not half and wanted != [1.0] else wanted
    targets = _targets(data, sets, measured, protocol, out / "records", max_images, seed)
    score_unknown = partial(
        measure, swept, data, strangers, wanted, protocol, out / "records", batch_size, max_images, seed
    )
    found: Callable[[], list[UnknownRow]] = score_unknown if strangers else list
    return _Evaluation(swept, stream, data, targets, wanted, protocol | drawn, out, batch_size, not_chosen, found)


@dataclass(frozen=True)
class _Evaluation:
    """What is to be answered, the rows at the `wanted` α that come of it, and their common protocol."""

    swept: Swept
    stream: Stream | None
    data: ImageDataModule
    targets: Sequence[Target]
    wanted: Sequence[float]
    protocol: Mapping[str, Any]
    out: Path
    batch_size: int
    not_chosen: str | None
    score_unknown: Callable[[], list[UnknownRow]]

    def whole(self) -> RobustnessResult:
        """Answers all images."""
        return self._result(self._answered(self.targets))

    def share(self, shard: Shard) -> RobustnessResult | None:
        """Answers those of a shard, and puts all together where nothing is missing."""
        folder = self.out / "shards"
        names = [target.path.name for target in self.targets]
        claim(folder, shard, {"batch_size": self.batch_size, "records": names, **self.protocol})
        parts = [[target.part(each, self.batch_size, folder) for target in self.targets] for each in shard.all()]
        if not all(target.answered() for target in self.targets):
            self._answered([each for each in parts[shard.number - 1] if len(each.index)])
        if not all(gather(*each) for each in zip(self.targets, *parts, strict=True)):
            return None
        result = self.whole()
        dissolve(folder)
        return result

    def _answered(self, targets: Sequence[Target]) -> list[Pair]:
        """Fills them."""
        pairs = make_pairs(targets, self.data.num_classes, self.out / "records")
        columns = (
            TextColumn("Evaluating {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console(stderr=True)) as progress:
            total, done = sum(len(pair.index) for pair in pairs), sum(pair.done for pair in pairs)
            bar = progress.add_task(plain(str(self.data.name)), total=total, completed=done)
            for split in dict.fromkeys(pair.item.split for pair in pairs):
                group, dataset = [pair for pair in pairs if pair.item.split == split], self.data.split(split)
                with self._precision():
                    if self.stream is None:
                        evaluate(self.swept, dataset, group, self.batch_size, lambda n: progress.advance(bar, n))
                    else:
                        _adapt(self.stream, dataset, group, lambda n: progress.advance(bar, n))
        return pairs

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.protocol["device"], torch.bfloat16, enabled=self.protocol["precision"] == "bf16")

    def _result(self, pairs: Sequence[Pair]) -> RobustnessResult:
        items = dict.fromkeys(pair.item for pair in pairs)
        rows = [row for item in items for row in _rows([pair for pair in pairs if pair.item == item], self.wanted)]
        with self._precision():
            found = self.score_unknown()
        result = RobustnessResult(rows, self.protocol, self.out, self.not_chosen, found)
        result.write()
        return result


def _rows(pairs: Sequence[Pair], alphas: Sequence[float]) -> list[Row]:
    """Scores one set; what was not measured lies between the first and the last that were."""
    kept = {pair.alpha: pair for pair in pairs}
    first, last = pairs[0], pairs[-1]
    return [
        score(kept[alpha].record(), kept[alpha].path.name)
        if alpha in kept
        else score(between(first.record(), last.record(), alpha), None, (first.path.name, last.path.name))
        for alpha in alphas
    ]


def check_data(delta: Path, model: TunedModel, data: ImageDataModule) -> None:
    """Refuses data that a delta was not trained for: a ConfigError if classes, image size or preset differ."""
    if model.targets != data.targets:
        raise ConfigError(f"{delta} is of {model.targets} targets, the data are of {data.targets}: they must agree.")
    data.number_classes_as(model.class_names)
    if model.backbone.image_size != data.image_size:
        size = model.backbone.image_size
        raise ConfigError(
            f"{delta} takes images of {size_text(size)} px, the data give {size_text(data.image_size)} px: "
            f"set the data's image_size to {plain_size(size)}."
        )
    if model.preset != data.preset.to_dict():
        theirs = data.preset.to_dict()
        differ = [key for key in {**theirs, **model.preset} if model.preset.get(key) != theirs.get(key)]
        told = "; ".join(f"{key} {model.preset.get(key)!r} there, {theirs.get(key)!r} here" for key in differ)
        raise ConfigError(
            f"{delta} was trained with another preset than the data use ({told}): set the data's preset to that of the "
            "delta."
        )


def _protocol(
    files: dict[str, Path | None], model: TunedModel, data: ImageDataModule, way: Way, half: bool
) -> dict[str, Any]:
    """What all records of a run have in common. No path of this machine: the files are named by their contents."""
    described = data.describe()
    keys = ("name", "preset", "image_size", "num_classes", "fingerprint", "fingerprints", "complete", "counts")
    tested = {key: described[key] for key in (*keys, "shared_with_train")}
    hashes = {name: None if path is None else {"sha256": file_identity(path)} for name, path in files.items()}
    specs = [] if model.delta is None else [DeltaSpec.read(spec).brief() for spec in model.delta.specs]
    return {
        "backbone": {key: value for key, value in identity(model).items() if key != "weights"},
        **hashes,
        "delta": {**(hashes["delta"] or {}), "specs": specs},
        "training": model.info,
        "way": way,
        "head": "interpolated" if files["anchor"] or files["start"] else "tuned",
        "logits": "float16" if half else "float32",
        "preprocessing": model.preset,
        "data": tested | {"crop_border": described.get("crop_border")},
        "versions": versions(),
    }


def _targets(
    data: ImageDataModule,
    sets: Sequence[EvaluationSet],
    alphas: Sequence[float],
    protocol: dict[str, Any],
    folder: Path,
    max_images: int | None,
    seed: int,
) -> list[Target]:
    lists, targets = data.describe()["lists"], []
    for item in sets:
        dataset = data.split(item.split)
        index = subset(dataset.labels, max_images, seed)
        if item.split == VAL:
            index = index[~data.shared(VAL)[index]]  # what a dataset repeats: a list within the other chooses nothing
        own = {
            "set": item.name,
            "kind": item.kind,
            "severity": item.severity,
            "parameter": None if item.severity is None else PARAMETERS[item.kind][item.severity - 1],
            "list": lists[item.split],
            "groups": groups(data, item.split),
            "n": len(index),
            "seed": None if len(index) == len(dataset) else seed,
        }
        if item.kind == VAL_CORRUPTED:
            own |= {"corruptions": PUBLISHED, "corrupted": [BASIC, VAL_SEVERITY]}
        if item.severity is not None:
            own |= {"corruptions": PUBLISHED, "title": title(item.kind)}  # version 0.1 has neither
        half = protocol["logits"] == "float16"
        if half and own["groups"] is not None:
            raise ConfigError(f"{item.name} is scored among some classes, which needs full precision: no --half.")
        for alpha in map(float, alphas):
            full = protocol | own | {"alpha": alpha}
            path = folder / f"{item.name}-alpha-{alpha}-{identity_of(full)[:12]}.parquet"
            targets.append(Target(item, alpha, index, dataset.labels[index], full, path))
    return targets


def _adapt(stream: Stream, dataset: ImageDataset, pairs: Sequence[Pair], advance: Callable[[int], None]) -> None:
    """Answers each set as a stream, whole or not at all."""
    for pair in pairs:
        if pair.done < len(pair.index):
            pair.put(0, stream.answers(dataset, pair.index, pair.item, advance))
            pair.save()
