"""Adapting at test time: each rule written out for a batch; and streams are whole, repeatable and told of."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.deltas.families import images as family_images
from tests.deltas.families import make
from tests.robustness.fakes import PROMPTS, kept, task, write_delta, write_full
from vpt.deltas import attach
from vpt.errors import ConfigError, UnknownNameError
from vpt.models import TunedModel, load_classifier
from vpt.reports.robustness_report import robustness_report
from vpt.reports.robustness_values import report
from vpt.robustness import logit_records, run
from vpt.robustness.test_time import Entropy, Foa, Fozo, _Prompts, adapter, entropies

RECIPE: tuple[dict[str, Any], ...] = (*PROMPTS, {"name": "bias"}, {"name": "lora", "rank": 2})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("test-time")


@pytest.fixture(scope="session")
def delta(folder: Path) -> Path:
    return write_delta(folder / "delta.safetensors", RECIPE)


def images(rows: range = range(10)) -> torch.Tensor:
    return torch.stack([task().split("test")[row]["image"] for row in rows])


def test_entropy_minimisation_is_a_step_of_sgd_on_the_norms(delta: Path) -> None:
    model = load_classifier(delta)
    ours = adapter("entropy", model, task(), 0)
    own, other = adapter("entropy", model, task(), 0).model, adapter("entropy", model, task(), 0).model
    norms = [m for m in own.backbone.model.modules() if isinstance(m, nn.LayerNorm)]
    trained = [p for module in norms for p in module.parameters()]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    for batch in images().split(5):  # type: ignore[no-untyped-call]
        logits = own(batch)
        p = logits.softmax(dim=1)
        loss = -(p * p.log()).sum(dim=1).mean()
        found = ours.answer(batch)
        torch.testing.assert_close(found, logits.detach(), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = ours.answer(images())
    torch.testing.assert_close(changed, own(images()).detach(), rtol=1e-4, atol=1e-5)
    ours.reset()
    torch.testing.assert_close(ours.answer(images()), other(images()).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(other(images()), model(images()), rtol=1e-3, atol=1e-3)


def test_entropies_are_those_of_the_formula() -> None:
    logits = torch.tensor([[0.0, 0.0], [30.0, 0.0]])
    assert entropies(logits).tolist() == pytest.approx([np.log(2), 0.0], abs=1e-6)


def by_hand(own: Foa | Fozo, to: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    """Loss and logits of all images with the present prompts, features shifted to a mean."""
    pooled, blocks = own._features(images())
    logits = own.model.classify(pooled if to is None else pooled + to - pooled.mean(dim=0))
    std, mean = torch.std_mean(blocks, dim=1)
    apart = (mean - own._source.mean).square().sum() + (std - own._source.std).square().sum()
    return float(entropies(logits).sum() + 0.4 * 10 / 64 * apart), logits


def test_fozo_steps_along_the_difference_of_two_losses(delta: Path) -> None:
    model = load_classifier(delta)
    ours, again = Fozo(model, task(), 3), Fozo(model, task(), 3)
    start = again._tokens.clone()
    answers = ours.answer(images())
    drawn = torch.randn(start.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        both = []
        for sign in (1, -1):
            again._tokens.copy_(start + sign * 0.5 * drawn)
            both.append(by_hand(again, None))
    torch.testing.assert_close(answers, min(both, key=lambda each: each[0])[1], rtol=1e-4, atol=1e-4)
    expected = start - (0.7 * 0.08 + 0.1) * (both[0][0] - both[1][0]) / (2 * 0.5) * drawn
    torch.testing.assert_close(ours._tokens, expected, rtol=1e-3, atol=1e-3)
    assert ours._scale == pytest.approx(0.45)
    ours._pace(1e9)
    assert (ours._scale, ours._step) == (0.5, 0.1)
    ours.reset()
    assert torch.equal(ours._tokens, start)
    torch.testing.assert_close(ours.answer(images()), answers, rtol=1e-5, atol=1e-5)


def test_foa_answers_with_the_best_of_its_prompts_and_shifts_features(delta: Path) -> None:
    model = load_classifier(delta)
    ours = Foa(model, task(), 0)
    ours.reset()
    answers = ours.answer(images())
    again = Foa(model, task(), 0)
    plain = load_classifier(delta)
    with torch.no_grad():
        source = plain.encode(torch.stack([task().split("train")[row]["image"] for row in range(6)])).mean(dim=0)
    torch.testing.assert_close(again._pooled, source, rtol=1e-3, atol=1e-4)
    losses = []
    for _ in range(again._search.population_size):
        drawn = again._search.ask()
        again._tokens.copy_(torch.from_numpy(drawn).view_as(again._tokens))
        with torch.no_grad():
            losses.append(by_hand(again, again._pooled))
    torch.testing.assert_close(answers, min(losses, key=lambda each: each[0])[1], rtol=1e-4, atol=1e-4)
    assert ours.protocol["population"] == 4 + int(3 * np.log(3 * model.backbone.num_features))


@pytest.mark.parametrize("method", ["entropy", "foa", "fozo"])
@pytest.mark.parametrize("kind", ["recipe", "full"])
def test_streams_are_whole_repeatable_and_told_everywhere(
    method: Any, kind: str, delta: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = delta if kind == "recipe" else write_full(folder / "full.safetensors")
    options: dict[str, Any] = {"batch_size": 4, "adapt": method, "severities": (2,), "corruptions": ("contrast",)}
    result = run(file, task(), (0.0, 1.0), tmp_path / "a", **options)
    assert {row.alpha for row in result.rows} == {1.0}
    assert {row.set for row in result.rows} == {"clean", "art", "contrast-2"}
    assert result.protocol["adapt"]["method"] == method
    assert result.protocol["adapt"]["order"] == "shuffled"
    record = logit_records.read(kept(tmp_path / "a", "clean-alpha-1.0"))
    assert record.index.tolist() == list(range(10))
    values = report([tmp_path / "a"])
    assert all(f"adapted at test time ({method})" in row["marks"] for row in values["rows"])
    assert "adapted at test time" in values["shifts"][0]["way"]
    robustness_report(values).write(tmp_path / "report")
    kind_of: Any = {"entropy": Entropy, "foa": Foa, "fozo": Fozo}[method]
    answers, calls = kind_of.answer, [0]

    def killed(self: Any, batch: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        found: torch.Tensor = answers(self, batch)
        return found

    monkeypatch.setattr(kind_of, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        run(file, task(), (1.0,), tmp_path / "b", **options)
    calls[0] = 5
    again = run(file, task(), (1.0,), tmp_path / "b", **options)
    for one, other in zip(result.rows, again.rows, strict=True):
        assert np.array_equal(result.record(one).logits, again.record(other).logits)


@pytest.mark.parametrize("family", ["vit", "avg-pool"])
def test_statistics_are_of_the_class_token_or_of_the_patches_alone(family: str) -> None:
    backbone, _ = make(family)
    own = _Prompts.__new__(_Prompts)
    own._seen, own._prefix = [], backbone.layout.num_prefix
    own.model = Namespace(backbone=backbone)  # type: ignore[assignment]
    outputs: list[torch.Tensor] = []
    for block in backbone.layout.blocks:
        block.register_forward_hook(own._note)
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    attach(backbone, [{"name": "prompt", "num_tokens": 3, "deep": False}])
    backbone(family_images(family))
    assert outputs[0].shape[1] == 16 + 3 + own._prefix
    expected = [out[:, 0] if own._prefix else out[:, 3:].mean(dim=1) for out in outputs]
    torch.testing.assert_close(torch.stack(own._seen), torch.stack(expected))


def test_what_cannot_be_adapted_is_refused(delta: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batches of several images"):
        run(delta, task(), (1.0,), tmp_path / "one", batch_size=1, adapt="foa", severities=())
    with pytest.raises((ConfigError, UnknownNameError), match="adapt"):
        run(delta, task(), (1.0,), tmp_path / "none", adapt="sar", severities=())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed"):
        run(delta, task(), (1.0,), tmp_path / "seed", adapt="foa", severities=(), seed=2**32)
    with pytest.raises(ConfigError, match="anchor and start have no part"):
        run(delta, task(), (1.0,), tmp_path / "anchor", delta, adapt="foa", severities=())
    swin = TunedModel(make("swin")[0].float(), 3).eval()
    with pytest.raises(ConfigError, match="adapt by entropy"):
        Foa(swin, task(), 0)
    run(delta, task(), (1.0,), tmp_path / "kept", batch_size=5, severities=())
    with pytest.raises(ConfigError, match="adapt differ"):
        run(delta, task(), (1.0,), tmp_path / "kept", batch_size=5, adapt="entropy", severities=())
    model = load_classifier(delta)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    own = adapter("entropy", model, task(), 0)
    own.answer(images())
    assert isinstance(own.model, TunedModel)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
