"""Prompt-agnostic evolution: the start from frequencies and the penalty between layers, each written out once more."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.deltas.families import FAMILIES, images, make
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.backbones import create_backbone
from vpt.deltas import attach
from vpt.deltas.base import TrainingImages
from vpt.deltas.prompts.frequencies import filtered, windows
from vpt.deltas.prompts.prompt import Prompt
from vpt.errors import ConfigError, VPTError
from vpt.models import load_classifier
from vpt.models.delta_file import save_delta
from vpt.models.delta_format import read_header
from vpt.tasks import DeltaTuning

PLAIN = {"name": "prompt", "num_tokens": 2}
HELD = PLAIN | {"koopman": {"rate": 0.5, "stability": 0.2, "width": 3}}
MATRICES = 3 * (192 + 2 * 3)  # of width 3, beside prompts of 192 channels


def prompt(backbone: Any, **options: Any) -> Prompt:
    return cast("Prompt", attach(backbone, [PLAIN | options]).parts[0])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def swapped(seen: Tensor, module: Any, args: Any, out: Tensor) -> Tensor:
    return seen


def kept(entering: list[Tensor], module: Any, args: tuple[Tensor, ...]) -> None:
    entering.append(args[0])


# -- frequencies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [((224, 224), 729), ((32, 32), 9), ((64, 48), 35), ((16, 16), 1)])
def test_windows_are_as_many_as_the_papers_formula_has(size: tuple[int, int], count: int) -> None:
    assert len(windows(size)) == count == ((size[0] - 16) // 8 + 1) * ((size[1] - 16) // 8 + 1)


def test_windows_that_cover_the_spectrum_once_add_up_to_the_image() -> None:
    pixels = numbers(2, 3, 32, 32)
    parts = [filtered(pixels, (row, column)) for row in (0, 16) for column in (0, 16)]
    torch.testing.assert_close(sum(parts[1:], start=parts[0]), pixels, atol=1e-12, rtol=0)


def test_a_window_is_a_sum_of_its_waves() -> None:
    pixels = numbers(1, 1, 24, 16)
    rows, columns = torch.arange(24.0, dtype=torch.float64), torch.arange(16.0, dtype=torch.float64)
    expected = torch.zeros(24, 16, dtype=torch.float64)
    for row in range(8, 24):  # the window (8, 0); frequency 0 is in the middle, (12, 8)
        for column in range(16):
            down, right = row - 12, column - 8
            wave = torch.exp(2j * torch.pi * (down * rows[:, None] / 24 + right * columns[None, :] / 16))
            expected += ((pixels[0, 0] * wave.conj()).sum() * wave).real / (24 * 16)
    torch.testing.assert_close(filtered(pixels, (8, 0))[0, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["vit", "dinov2-reg", "dinov3", "siglip"])
def test_prompts_start_as_the_patches_of_the_best_frequencies_and_pass_through_the_blocks(family: str) -> None:
    backbone, _ = make(family)
    pixels, labels = images(family), torch.tensor([0, 2, 1])
    head = numbers(backbone.num_features, 3, seed=1)
    part = prompt(backbone, num_tokens=[3, 1, 2], layers=None, init="frequency")
    part.strength = 0.0
    training = TrainingImages(3, lambda rows: pixels[list(rows)], labels, lambda given: backbone(given) @ head)
    part.start_from_images(training, np.random.default_rng(0))
    part.detach()

    normalized = backbone.normalize(pixels)
    spectrum = torch.fft.fft2(normalized)
    found: list[tuple[float, Tensor]] = []
    for row in (0, 8, 16):
        for column in (0, 8, 16):
            mask = torch.zeros(32, 32)
            mask[row : row + 16, column : column + 16] = 1
            seen = torch.fft.ifft2(spectrum * torch.roll(mask, (16, 16), (0, 1))).real

            entering: list[Tensor] = []
            hooks = [
                backbone.entry.register_forward_hook(partial(swapped, seen)),
                backbone.layout.blocks[0].register_forward_pre_hook(partial(kept, entering)),
            ]
            loss = cross_entropy(backbone(pixels) @ head, labels).detach()
            for hook in hooks:
                hook.remove()
            patches = entering[0][:, backbone.layout.num_prefix :].reshape(-1, entering[0].shape[-1])
            found.append((float(loss), (patches.T @ patches.square().sum(1)) / patches.square().sum()))
    tokens = torch.stack([token for _, token in sorted(found, key=lambda each: each[0])[:3]])
    for layer, number in enumerate((3, 1, 2)):
        torch.testing.assert_close(part.prompts(layer).detach(), tokens[:number], atol=1e-10, rtol=1e-10)
        tokens = backbone.layout.blocks[layer](tokens.unsqueeze(0))[0].detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_from_frequencies_or_says_why_not(family: str) -> None:
    backbone, _ = make(family)
    if family in ("beit", "swin", "swin-padded", "swinv2"):
        with pytest.raises(ConfigError, match="bias for each pair of an image's tokens"):
            prompt(backbone, init="frequency")
        return
    part, pixels = prompt(backbone, init="frequency"), images(family)
    part.strength = 0.0
    labels = torch.arange(len(pixels)) % 2
    logits = lambda given: backbone(given)[:, :2]  # noqa: E731
    training = TrainingImages(len(pixels), lambda rows: pixels[list(rows)], labels, logits)
    part.start_from_images(training, np.random.default_rng(0))
    assert all(bool(part.prompts(layer).isfinite().all()) for layer in range(len(part.blocks)))


# -- the penalty ------------------------------------------------------------------------------------------------------


def test_the_penalty_is_a_sum_over_pairs_of_layers() -> None:
    part = prompt(make("vit")[0], koopman={"rate": 0.7, "stability": 0.3, "width": 5})
    held = part.koopman
    assert held is not None
    held.requires_grad_(False)
    part.tokens.requires_grad_(False)
    with torch.no_grad():
        for seed, matrix in enumerate((held.projection, held.operator, held.energy)):
            matrix.copy_(numbers(*matrix.shape, seed=seed))
        cast("Tensor", part.tokens).copy_(numbers(3, 2, 24, seed=9))
    form = held.energy.T @ held.energy
    form = form / (torch.linalg.svdvals(form)[0] + 1e-8)
    states = [part.prompts(layer) @ held.projection for layer in range(3)]
    expected = 0.0
    for before, after in pairwise(states):
        ahead = before @ held.operator
        expected += 0.7 * sum(float((ahead[row] - after[row]).square().sum()) for row in (0, 1)) / (2 * 5)
        growth = 0.0
        for row in (0, 1):
            short = [state[row] / max(1.0, float(state[row].norm()) + 1e-8) for state in (ahead, before)]
            value, past = (float(state @ form @ state) for state in short)
            growth += math.log1p(math.exp(value - past)) / 2
        expected += 0.3 * 10 * math.tanh(growth / 10)
    assert max(float(state.norm(dim=1).max()) for state in states) > 1
    assert float(cast("Tensor", part.penalty())) == pytest.approx(expected, rel=1e-12)


def test_layers_that_follow_the_operator_miss_nothing() -> None:
    part = prompt(make("vit")[0], koopman={"width": 4, "stability": 0})
    held = part.koopman
    assert held is not None
    with torch.no_grad():
        held.operator.mul_(0.5)
        first = numbers(2, 24)
        cast("Tensor", part.tokens).copy_(torch.stack([first, first / 2, first / 4]))
    assert float(cast("Tensor", part.penalty()).detach()) == pytest.approx(0.0, abs=1e-20)


def test_training_adds_the_penalty_and_trains_its_matrices() -> None:
    task = DeltaTuning(**BASE, deltas=[HELD])
    part = cast("Prompt", task.model.parts()[0])
    assert part.koopman is not None
    assert sum(each.numel() for each in part.parameters()) == part.expected_parameters() == 6 * 2 * 192 + MATRICES
    before = [each.detach().clone() for each in part.koopman.parameters()]
    trainer(epochs=1).fit(task, datamodule=data())
    assert not any(torch.equal(now, then) for now, then in zip(part.koopman.parameters(), before, strict=True))

    seen: list[tuple[Tensor, Tensor]] = []

    class Looking(DeltaTuning):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            (plain, _) = self.training_losses(batch)[0]
            expected = plain + cast("Any", self.model.parts()[0]).penalty()
            seen.append((expected, cast("Tensor", super().training_step(batch, batch_idx))))
            return seen[-1][1]

    trainer(epochs=1).fit(Looking(**BASE, deltas=[HELD]), datamodule=data())
    for expected, loss in seen:
        torch.testing.assert_close(loss, expected)


def test_a_file_holds_nothing_of_it_and_training_starts_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpt.deltas.prompts.frequencies.IMAGES", 2)
    task = DeltaTuning(**BASE, deltas=[HELD | {"init": "frequency", "project": None}])
    trainer(epochs=1).fit(task, datamodule=data())
    save_delta(file := tmp_path / "delta.safetensors", task.model)
    (spec,) = read_header(file)["specs"]
    assert (spec["init"], spec.get("koopman")) == ("uniform", None)
    loaded = load_classifier(file)
    pixels = task.model.backbone.random_images(3)
    assert torch.equal(loaded(pixels), task.model.eval()(pixels))

    again = DeltaTuning(**BASE, deltas=[HELD], init_delta=str(file))
    trainer(epochs=0).fit(again, datamodule=data())
    old, new = (cast("Prompt", each.model.parts()[0]) for each in (task, again))
    assert all(torch.equal(old.prompts(layer), new.prompts(layer)) for layer in range(6))
    assert new.koopman is not None
    assert torch.equal(new.koopman.operator, torch.eye(3))


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.deltas.prompts.frequencies.IMAGES", 2)

    def leg(stop: int, resume: Path | None = None) -> DeltaTuning:
        L.seed_everything(0)
        task = DeltaTuning(**BASE, deltas=[HELD | {"init": "frequency"}])
        saving = ModelCheckpoint(tmp_path / str(stop), save_last=True, every_n_epochs=1)

        class Stop(L.Callback):
            def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
                trainer.should_stop = trainer.current_epoch + 1 == stop

        runs = trainer(epochs=3, callbacks=[saving, Stop()])
        runs.fit(task, datamodule=data(seed=0), ckpt_path=resume, weights_only=True)
        return task

    leg(1)
    whole, resumed = leg(3), leg(3, tmp_path / "1" / "last.ckpt")
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key


def test_frozen_weights_may_be_in_half_precision() -> None:
    backbone = create_backbone("vit_nano_patch8_64", frozen_dtype="bfloat16")
    part, pixels = prompt(backbone, init="frequency"), backbone.random_images(2)
    part.strength = 0.0
    labels = torch.tensor([0, 1])
    training = TrainingImages(2, lambda rows: pixels[list(rows)], labels, lambda given: backbone(given)[:, :2])
    part.start_from_images(training, np.random.default_rng(0))
    assert all(part.prompts(layer).dtype == torch.float32 for layer in range(6))


def test_the_penalty_of_prompts_in_half_precision_is_computed_in_single() -> None:
    part = prompt(make("vit")[0].float(), koopman={"width": 4})
    exact = float(cast("Tensor", part.penalty()).detach())
    half = cast("Tensor", part.bfloat16().penalty())
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(exact, rel=0.02)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"koopman": {"rate": 0, "stability": 0}}, "leave it out"),
        ({"koopman": {"rate": -1}}, "rate of koopman"),
        ({"koopman": {"width": 0}}, "width of koopman"),
        ({"koopman": {"speed": 1}}, "speed"),
        ({"koopman": {}, "deep": False}, "only with deep prompts"),
        ({"koopman": {}, "shared": True}, "leave shared out"),
        ({"koopman": {}, "adaptive": {}}, "leave adaptive out"),
        ({"koopman": {}, "mask": ["x x"] * 3}, "leave mask out"),
        ({"koopman": {}, "num_tokens": [1, 2, 2]}, "at least two layers as many prompts"),
        ({"koopman": {}, "layers": [0, 1]}, "at least two layers"),
        ({"init": "frequency", "num_tokens": 10}, "have 9 of them, for 10 prompts"),
        ({"init": "frequency", "deep": False}, "needs deep prompts"),
        ({"init": "frequency", "shared": True}, "leave out shared"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(VPTError, match=words):
        prompt(make("vit")[0], **options)


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="one width"):
        prompt(make("swin")[0], koopman={})
