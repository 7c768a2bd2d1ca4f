"""What an experiment takes, before it is run: trials, epochs and images by counting, hours by a measured step."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from lightning.pytorch.cli import instantiate_class

from vpt.data import ImageDataModule
from vpt.data.catalog.cards import load_card
from vpt.errors import ConfigError, DataError
from vpt.experiments.profile import Run, interleaved, wait
from vpt.experiments.sweep import Plan, kept, search_trials, stops_of, tested_trial
from vpt.experiments.trial import Config, Trial
from vpt.image_size import plain_size
from vpt.models import TunedModel
from vpt.run_record import identity
from vpt.tasks.build import build_data, image_size

ROUNDS = 3
SECONDS = 1.0
"""What is measured is of fewer images than a batch has where all of it, once, takes longer."""
_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_NO_COST = {"base_lr", "weight_decay", "momentum", "warmup", "l2", "dropout", "num_classes", "weights"}
"""Options of a task that change nothing of what a step takes."""


@dataclass(frozen=True)
class Lists:
    """What is known of the images of a config without reading one.

    Attributes:
        counts: Images by split.
        model: What they say of a model: ``num_classes`` and others of `vpt.tasks.build.FROM_DATA`.
        missing: Why the images are not there; `counts` are then those of the dataset's card. None if they are.
    """

    counts: dict[str, int]
    model: dict[str, Any]
    missing: str | None = None


@dataclass(frozen=True)
class Part:
    """What some trials take: epochs, images passed forward and backward, and images passed forward alone.

    `seconds` are those of the trials one after another.
    """

    trials: int = 0
    epochs: int = 0
    images: int = 0
    validated: int = 0
    tested: int = 0
    seconds: float = 0.0

    def __add__(self, other: Part) -> Part:
        """Both together."""
        return Part(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Step:
    """Measured seconds of an image.

    Attributes:
        train: Forward and backward, without what is `first`.
        forward: Forward alone, with it.
        first: What lies before everything that trains, which a run computes once for an image; 0 if it does not.
        images: That were measured at once, of a batch.
        batch: Images of a batch.
        place: Device and precision.
    """

    train: float
    forward: float
    first: float
    images: int
    batch: int
    place: str


@dataclass
class Forecaster:
    """Counts and measures, nothing twice.

    Attributes:
        threads: Of torch while a step is measured; None for those that it has.
        steps: All that was measured.
        missing: A sentence for each of the data that are not there.
    """

    threads: int | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _lists: dict[str, Lists] = field(default_factory=dict)

    def __call__(self, prefix: str, config: Config, plan: Plan) -> tuple[Part, Part]:
        """What the search and the tested runs of a config will take (`vpt.experiments.sweep.sweeps`).

        Counts are exact if no trial fails or stops early, `Plan.widen` adds nothing, and the points of a halved grid
        have equally many images; of unequal ones those with more are taken to survive. The tested runs cost what the
        grid does in the mean, since the chosen point is not known.

        Raises:
            ConfigError: The model refuses its options.
            DataError: Neither the data nor a card says how many images there are.
        """
        points = search_trials(prefix, config, plan, plan.points())
        kinds = [_kind(point.values) for point in points]
        parts: dict[tuple[str, int | None, bool], Part] = {}

        def part(at: int, stop: int | None = None, tested: bool = False) -> Part:
            key = kinds[at], stop, tested
            if key not in parts:
                last = tested_trial(prefix, config, plan, points[at].values, plan.seeds[0])
                parts[key] = self.part(last if tested else points[at], stop)
            return parts[key]

        search = Part()
        if len(points) > 1:
            ends = _ends(points, plan)
            longest = sorted(range(len(points)), key=lambda at: -part(at).images) if any(ends) else range(len(points))
            for at, stop in zip(longest, ends, strict=True):
                search += part(at, stop)
        seconds = sum(part(at, tested=True).seconds for at in range(len(points))) / len(points)
        final = sum((replace(part(0, tested=True), seconds=seconds) for _ in plan.seeds), Part())
        return search, final

    def part(self, trial: Trial, stop: int | None = None) -> Part:
        """What a trial takes until the end of an epoch, or its own end."""
        lists, trainer = self.lists(trial.config), trial.config["trainer"]
        batch = _option(trial.config, "batch_size", 64) * _processes(trainer)
        steps = _limited(math.ceil(lists.counts["train"] / batch), trainer.get("limit_train_batches"))
        images = min(lists.counts["train"], steps * batch)
        most = trainer.get("max_steps")
        ends = [math.inf if most in (None, -1) else most, *(n * steps for n in (trainer.get("max_epochs"), stop) if n)]
        total = int(min(ends))
        epochs, rest = -(-total // steps), total % steps
        trained = total // steps * images + rest * batch
        every = trainer.get("check_val_every_n_epoch") or 1
        val = _read(lists, "val", batch, trainer)
        validated = (epochs // every + bool(epochs % every)) * val
        tested = _read(lists, "test", batch, trainer) if trial.test else 0
        step = self.step(trial.config, lists)
        first = step.first * (images + val)
        seconds = trained * step.train + first + validated * (step.forward - step.first) + tested * step.forward
        return Part(1, epochs, trained, validated, tested, seconds)

    def lists(self, config: Config) -> Lists:
        """The images of a config, of its data or else of their card."""
        own = config["data"].get("init_args") or {}
        idle = {"batch_size", "seed", "subset_seed", "num_workers", "augment"}  # which change no number
        key = identity([config["data"]["class_path"], {name: own[name] for name in own if name not in idle}])
        if key not in self._lists:
            self._lists[key] = _lists(config)
        found = self._lists[key]
        if found.missing is not None:
            self.missing[found.missing] = found.missing
        return found

    def step(self, config: Config, lists: Lists) -> Step:
        """What an image of a config takes, measured with random weights, which cost the same."""
        args = config["model"]["init_args"]
        kind = {name: value for name, value in args.items() if name not in _NO_COST}
        batch = args.get("micro_batch") or _option(config, "batch_size", 64)
        place = [config["trainer"].get(name) for name in ("precision", "accelerator")]
        augmented = _option(config, "augment", "none") != "none"
        size = json.dumps(plain_size(image_size(config)))
        key = identity([config["model"]["class_path"], kind, batch, size, place, augmented])
        if key not in self.steps:
            threads = torch.get_num_threads()
            torch.set_num_threads(self.threads or threads)
            try:
                self.steps[key] = _measured(config, lists, batch, augmented)
            finally:
                torch.set_num_threads(threads)
        return self.steps[key]


def _kind(values: Mapping[str, Any]) -> str:
    """What points have in common that cost the same."""
    return identity({key: value for key, value in values.items() if key.removeprefix("model.") not in _NO_COST})


def _ends(points: Sequence[Trial], plan: Plan) -> list[int | None]:
    """The epochs after which the trials of a search stop, None for their own end, those that go on longest first."""
    found: list[int | None] = []
    left = len(points)
    for stop in stops_of(points, plan):
        following = kept(left, cast("int", plan.halving))
        found = [*[stop] * (left - following), *found]
        left = following
    return [*[None] * left, *found]


def _lists(config: Config) -> Lists:
    try:
        data = build_data(config)
    except DataError as error:
        own = config["data"].get("init_args") or {}
        names = [own[key] for key in ("task", "dataset", "variant") if isinstance(own.get(key), str)]
        card = next((found for name in names if (found := load_card(name)) is not None), None)
        sizes = {} if card is None or own.get("shots") or own.get("fraction") else card.sizes
        counts = {split: sizes[own[split]] for split in ("train", "val", "test") if own.get(split) in sizes}
        if card is None or "train" not in counts or "test" not in counts:
            raise
        return Lists(counts, {"num_classes": card.num_classes}, str(error).splitlines()[0].partition(";")[0])
    return Lists(data.outline()["counts"], _of_model(data))


def _of_model(data: ImageDataModule) -> dict[str, Any]:
    found = {key: getattr(data, key) for key in ("num_classes", "normalization", "targets")}
    return {key: value for key, value in found.items() if value != "multiclass"}


def _option(config: Config, name: str, default: Any) -> Any:
    return (config["data"].get("init_args") or {}).get(name, default)


def _processes(trainer: Mapping[str, Any]) -> int:
    devices: Any = trainer.get("devices")
    named = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return named * int(trainer.get("num_nodes") or 1)


def _limited(batches: int, limit: float | None) -> int:
    """As Lightning counts ``limit_*_batches``: a number, or a share."""
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def _read(lists: Lists, split: str, batch: int, trainer: Mapping[str, Any]) -> int:
    images = lists.counts.get(split, 0)
    return min(images, batch * _limited(math.ceil(images / batch), trainer.get(f"limit_{split}_batches")))


def _measured(config: Config, lists: Lists, batch: int, augmented: bool) -> Step:
    model, trainer = _model(config, lists), config["trainer"]
    device = "cuda" if torch.cuda.is_available() and trainer.get("accelerator") != "cpu" else "cpu"
    precision = str(trainer.get("precision") or "32-true")
    half = _HALF.get(precision)
    model = model.to(device).eval()
    halves = None if augmented else model.constant_part()
    number = 1
    with torch.random.fork_rng():
        while number < batch:
            try:
                if sum(interleaved(_runs(model, number, half, halves), 1)) > SECONDS / 2:
                    break
            except torch.OutOfMemoryError:  # a trial halves its batch then
                number = max(1, number // 2)
                break
            number = min(2 * number, batch)
        train, forward, first = interleaved(_runs(model, number, half, halves), ROUNDS)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, threads {torch.get_num_threads()}"
    place = f"{name}, {precision if half is not None else '32-true'}"
    twice = forward if config["model"]["init_args"].get("micro_batch") else 0.0  # computed again for its gradient
    return Step((train + twice) / number, forward / number, first / number if halves else 0.0, number, batch, place)


def _model(config: Config, lists: Lists) -> TunedModel:
    section: dict[str, Any] = copy.deepcopy(config["model"])
    args = section["init_args"]
    args |= lists.model | {"weights": "random", "image_size": plain_size(image_size(config))}
    args |= {key: None for key in ("init_delta", "init_head") if key in args}  # which say of no random weights
    model = instantiate_class((), section).model
    if not isinstance(model, TunedModel):
        raise ConfigError("Experiments are of classifiers only: run others with `vpt fit`.")
    return model


def _runs(model: TunedModel, number: int, half: torch.dtype | None, halves: Any) -> list[Run]:
    """A step on what is kept of some images, if something is; a forward pass of the whole; what is kept."""
    images = model.backbone.random_images(number).to(model.backbone.mean.device)

    def autocast(run: Callable[[], Any]) -> Any:
        with torch.autocast(images.device.type, half or torch.bfloat16, enabled=half is not None):
            return run()

    with torch.no_grad():
        constant = None if halves is None else autocast(lambda: halves[0](images))

    def train() -> None:
        outputs = autocast(lambda: model(images) if halves is None else model.classify(halves[1](constant)))
        if outputs.requires_grad:  # nearest neighbours train nothing
            outputs.float().square().mean().backward()
            model.zero_grad()
        wait(images)

    @torch.no_grad()
    def forward() -> None:
        autocast(lambda: model(images))
        wait(images)

    @torch.no_grad()
    def first() -> None:
        if halves is not None:
            autocast(lambda: halves[0](images))
        wait(images)

    return [train, forward, first]
