"""What `benchmarks.gpu` measures, section by section; each yields rows as they are found."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import sweep
from benchmarks.data import generate
from benchmarks.plain import CLASSES, Bare, Concatenated, matmul_ceiling
from benchmarks.records import Row
from vpt.backbones import Backbone, create_backbone
from vpt.data import VTABDataModule
from vpt.experiments.profile import counted_flops, interleaved, step_memory, training_step, wait
from vpt.experiments.trial import Trial, run_trial
from vpt.models import TunedModel, save_delta
from vpt.models.prompt_bank import PromptBank
from vpt.robustness import run as evaluate

PROMPTS = [{"name": "prompt", "num_tokens": 10}]
TESTS = Path(__file__).parents[1] / "tests" / "gpu"
HALF = torch.bfloat16


@dataclass(frozen=True)
class Scale:
    """How much is measured: all of it of the first backbone, whose images have `size` pixels; steps of all of them.

    `tokens` come with the most important first; `images` are of the trial, of `epochs`, and of the α sweep; `side` is
    of the matrices whose product is the ceiling.
    """

    backbones: tuple[str, ...] = (
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_large_patch16_dinov3",
        "swin_base_patch4_window7_224",
    )
    size: int = 224
    tokens: tuple[int, ...] = (50, 200, 10, 100)
    batch: int = 64
    rounds: int = 7
    side: int = 8192
    images: int = 1000
    epochs: int = 100
    tasks: tuple[int, ...] = (1, 10, 100)
    compiler: str = "inductor"


FULL = Scale()
TINY = Scale(("vit_nano_patch8_64",), 64, (2,), 2, 1, side=64, images=10, epochs=1, tasks=(1, 2), compiler="eager")


@cache
def backbone(name: str, size: int, device: str) -> Backbone:
    """Random weights, built once: to be copied."""
    return create_backbone(name, "random", image_size=size).to(device)


def ceiling(scale: Scale, device: str) -> Iterator[Row]:
    """The fastest matrix product, in TFLOP/s."""
    kinds = {"fp32": torch.float32, "bf16": HALF}
    found = {key: matmul_ceiling(kind, device, scale.rounds, scale.side) / 1e12 for key, kind in kinds.items()}
    yield {"what": "matmul", "tflops": found}


class OutOfTime(BaseException):
    """A section has had its time. No Exception, so that nothing within takes it for one of its own."""


class _Outcomes:
    """What became of each test; a plugin of pytest."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        self.collected = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Puts the slowest last."""
        items.sort(key=lambda item: "compiled" in item.name)

    def pytest_collection_finish(self, session: Any) -> None:
        """Counts the tests that are to run."""
        self.collected = len(session.items)

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Ends the tests with the time, which pytest would take for the failure of one."""
        if isinstance(call.excinfo.value, OutOfTime):
            node.session.shouldstop = "out of time"

    def pytest_runtest_logreport(self, report: Any) -> None:
        """See pytest."""
        if report.when == "call" or report.outcome != "passed":
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", "").partition("\n")[0]
            name = report.nodeid.rpartition("::")[2]
            self.found[report.outcome].append(f"{name}: {reason}" if report.failed else name)


def tests(scale: Scale, device: str) -> Iterator[Row]:
    """The tests with the mark `gpu`, in this process."""
    import pytest  # what measures nothing but time needs none

    outcomes, threads = _Outcomes(), torch.get_num_threads()
    options = ["-m", "gpu", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    try:
        with patch.dict(os.environ), redirect_stdout(sys.stderr):
            code = pytest.main([*options, str(TESTS)], plugins=[outcomes])
    finally:
        torch.set_num_threads(threads)  # the tests run on one
    failed = [each for each in outcomes.found["failed"] if OutOfTime.__name__ not in each]
    counts = {key: len(names) for key, names in outcomes.found.items()} | {"failed": len(failed)}
    left = outcomes.collected - sum(counts.values())
    yield {"what": "tests", **counts, "not_run": left, "failures": failed}
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}")


def steps(scale: Scale, device: str, mode: str = "eager") -> Iterator[Row]:
    """Milliseconds an image and peak memory of a step in bf16: concatenated, ours, ours with a log bias, bare."""
    for tokens in scale.tokens:
        for name in scale.backbones:
            yield _steps(scale, device, mode, name, tokens)


def _steps(scale: Scale, device: str, mode: str, name: str, tokens: int) -> Row:
    spec = {"name": "prompt", "num_tokens": tokens}
    own = (copy.deepcopy(backbone(name, scale.size, device)) for _ in range(4))
    models: dict[str, nn.Module] = {
        "plain": Concatenated(next(own), tokens),
        "ours": TunedModel(next(own), CLASSES, [spec]),
        "log bias": TunedModel(next(own), CLASSES, [spec | {"log_bias": True}]),
        "bare": Bare(next(own)),
    }
    models = {key: model.to(device, HALF) for key, model in models.items()}
    images = backbone(name, scale.size, device).random_images(scale.batch).to(device)
    work = {key: _flops(models[key], images) for key in ("plain", "ours")}
    if mode == "compiled":
        torch.compiler.reset()  # or a model too many is silently not compiled
        models = {key: cast("nn.Module", torch.compile(each, backend=scale.compiler)) for key, each in models.items()}
    seconds = interleaved([training_step(model, images) for model in models.values()], scale.rounds)
    spent = dict(zip(models, seconds, strict=True))
    row: Row = {"backbone": name, "tokens": tokens, "mode": mode, "batch": scale.batch}
    return row | {
        "what": f"{name}, {tokens} tokens",
        "step_ms": {key: 1000 * each / scale.batch for key, each in spent.items()},
        "memory_mib": {key: step_memory(model, images) / 2**20 for key, model in models.items()},
        "tflops": {key: work[key] / spent[key] / 1e12 for key in work},
    }


def _flops(model: nn.Module, images: Tensor) -> int:
    """Operations of a step, counted without computing it."""
    return counted_flops(training_step(copy.deepcopy(model).to("meta"), images.to("meta")))


@contextmanager
def _task(scale: Scale) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A task of generated JPEG files in a folder of its own, with a cache of its own, and what a data module takes."""
    with tempfile.TemporaryDirectory() as scratch, patch.dict(os.environ, VPT_CACHE=f"{scratch}/cache"):
        generate(Path(scratch) / "generated", scale.images)
        options = {"task": "generated", "root": scratch, "preset": "square", "batch_size": min(64, scale.images)}
        yield Path(scratch), options | {"image_size": scale.size}


def trial(scale: Scale, device: str) -> Iterator[Row]:
    """A whole trial as `vpt sweep` runs it, images in the cache, without a test."""
    with _task(scale) as (folder, options):
        VTABDataModule(**options).split("train")
        model = {"backbone": scale.backbones[0], "weights": "random", "num_tokens": 10, "base_lr": 0.1}
        precision = "bf16-mixed" if device == "cuda" else "32-true"
        config = {
            "seed_everything": 0,
            "trainer": {"max_epochs": scale.epochs, "precision": precision, "devices": 1},
            "model": {"class_path": "vpt.tasks.PromptTuning", "init_args": model},
            "data": {"class_path": "vpt.data.VTABDataModule", "init_args": options},
        }
        start = time.perf_counter()
        record = run_trial(Trial("trial", config), folder / "experiment")
        seconds = time.perf_counter() - start
        row = {"what": "trial", "backbone": scale.backbones[0], "images": scale.images, "epochs": record["epochs"]}
        yield row | {"seconds": seconds, "trials_per_hour": 3600 / seconds, "precision": precision}


def data(scale: Scale, device: str) -> Iterator[Row]:
    """An epoch whose images come from the cache, against one whose batches lie on the device."""
    name = scale.backbones[0]
    with _task(scale) as (_, options):
        loader = VTABDataModule(**options).train_dataloader()
        there = [(batch["image"].to(device), batch["label"].to(device)) for batch in loader]
        model = TunedModel(copy.deepcopy(backbone(name, scale.size, device)), CLASSES, PROMPTS).to(device)

        def step(images: Tensor, labels: Tensor) -> None:
            with torch.autocast(device, HALF):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()

        def loaded() -> None:
            for batch in loader:
                step(*(batch[key].to(device, non_blocking=True) for key in ("image", "label")))
            wait(there[0][0])

        def resident() -> None:
            for images, labels in there:
                step(images, labels)
            wait(there[0][0])

        with_data, without = interleaved([loaded, resident], scale.rounds)
    yield {
        "what": "epoch",
        "backbone": name,
        "images": scale.images,
        "epoch_s": with_data,
        "lost": 1 - without / with_data,
    }


def strengths(scale: Scale, device: str) -> Iterator[Row]:
    """`vpt robustness` at 11 strengths and at one, in bf16, on noise."""
    name = scale.backbones[0]
    module = sweep.data(scale.size, scale.images)
    with tempfile.TemporaryDirectory() as scratch:
        names, preset = sweep.CLASSES, module.preset.to_dict()
        model = TunedModel(_random(name, scale.size), len(names), PROMPTS, names, preset)
        file = save_delta(Path(scratch) / "delta.safetensors", model)
        seconds: dict[int, list[float]] = {1: [], len(sweep.GRID): []}
        for number in range(3):  # the first loads kernels
            for count in seconds:
                out, start = Path(scratch) / f"{number}-{count}", time.perf_counter()
                evaluate(file, module, sweep.GRID[-count:], out, severities=(), batch_size=64, bf16=True)
                seconds[count] += [time.perf_counter() - start] if number else []
    spent = {str(count): statistics.median(each) for count, each in seconds.items()}
    yield {"what": "strengths", "backbone": name, "images": scale.images, "seconds": spent}


def bank(scale: Scale, device: str) -> Iterator[Row]:
    """Images a second of a `PromptBank` whose batch is of several tasks."""
    name, most = scale.backbones[0], max(scale.tasks)
    with tempfile.TemporaryDirectory() as scratch:
        model = TunedModel(_random(name, scale.size), CLASSES, PROMPTS)
        files = {}
        for task in range(most):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.1)
            files[str(task)] = save_delta(Path(scratch) / f"{task}.safetensors", model)
        whole = PromptBank(files).eval().to(device)
    batch = max(scale.batch, 2 * most)
    images = whole.backbone.random_images(batch).to(device)

    def passed(tasks: int) -> None:
        with torch.inference_mode(), torch.autocast(device, HALF):
            whole(images, [str(place % tasks) for place in range(batch)])
        wait(images)

    seconds = interleaved([partial(passed, tasks) for tasks in scale.tasks], scale.rounds)
    for tasks, each in zip(scale.tasks, seconds, strict=True):
        yield {"what": f"{tasks} tasks", "backbone": name, "tasks": tasks, "batch": batch, "images_per_s": batch / each}


def _random(name: str, size: int) -> Backbone:
    """As a delta file finds it again: by its name, on the processor."""
    return create_backbone(name, "random", image_size=size)
