from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.robustness.fakes import PROMPTS, split, task, write_delta, write_full
from vpt.data import ImageDataModule, ImageDataset
from vpt.errors import ConfigError
from vpt.models import TunedModel, load_classifier
from vpt.models.delta_file import unfilled
from vpt.models.delta_format import read_delta
from vpt.robustness.model_soups import Step, count_hits, greedy, mean, uniform


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soups")


@pytest.fixture(scope="session")
def runs(folder: Path) -> list[Path]:
    return [write_delta(folder / f"run{seed}.safetensors", PROMPTS, seed) for seed in range(4)]


def test_a_uniform_soup_is_the_mean_and_a_delta_file_like_any(runs: list[Path], tmp_path: Path) -> None:
    out = uniform(runs[:3], tmp_path / "soup.safetensors")
    header, tensors = read_delta(out)
    parts = [read_delta(path)[1] for path in runs[:3]]
    for key, tensor in tensors.items():
        expected = torch.stack([part[key].double() for part in parts]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-7, atol=1e-7)
    assert [file["name"] for file in header["info"]["soup"]["files"]] == ["/".join(p.parts[-2:]) for p in runs[:3]]
    assert isinstance(load_classifier(out), TunedModel)


def test_equal_runs_make_themselves() -> None:
    one = {"w": torch.tensor([0.1, -3.0, 1e-8]), "i": torch.tensor([3])}
    again = mean([one] * 7)
    assert torch.equal(again["w"], one["w"])
    assert again["i"].dtype == torch.int64


def test_full_models_are_averaged_whole(folder: Path, tmp_path: Path) -> None:
    runs = [write_full(folder / f"full{seed}.safetensors", seed) for seed in (0, 1)]
    _, tensors = read_delta(uniform(runs, tmp_path / "soup.safetensors"))
    ends = [read_delta(path)[1] for path in runs]
    assert tensors.keys() == ends[0].keys()
    key = "backbone.model.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(tensors[key], (ends[0][key] + ends[1][key]) / 2)


def test_the_greedy_rule_keeps_what_does_no_harm(runs: list[Path], tmp_path: Path) -> None:
    trace: list[Step] = []
    out = greedy(runs, tmp_path / "soup.safetensors", task(), batch_size=2, report=trace.append)
    held_out = task().split("val")
    model, _ = unfilled(runs[0])
    alone = [count_hits(load_classifier(path), held_out, 6)[0] for path in runs]
    order = sorted(range(4), key=lambda run: -alone[run])
    soup, best = [order[0]], alone[order[0]]
    for run in order[1:]:  # without an early stop
        tensors = mean([read_delta(runs[member])[1] for member in [*soup, run]])
        model.load_state_dict(tensors, strict=False)
        found, _ = count_hits(model, held_out, 6)
        if found >= best:
            soup, best = [*soup, run], found
    assert [step.file for step in trace] == ["/".join(runs[run].parts[-2:]) for run in order]
    assert [step.kept for step in trace] == [run in soup for run in order]
    header, tensors = read_delta(out)
    assert all(torch.equal(tensors[k], t) for k, t in mean([read_delta(runs[run])[1] for run in soup]).items())
    assert [file["kept"] for file in header["info"]["soup"]["files"]] == [run in soup for run in range(4)]


class Oracle:
    """Answers rightly where it is told to."""

    def __init__(self, right: list[bool]) -> None:
        self.right, self.head = right, torch.nn.Linear(1, 2)
        self.at = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        now = self.right[self.at : self.at + len(images)]
        self.at += len(images)
        return torch.nn.functional.one_hot(torch.tensor([0 if ok else 1 for ok in now]), 2)


class Zeros:
    def __init__(self, n: int) -> None:
        self.labels = np.zeros(n, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(1)}


@settings(deadline=None)
@given(right=st.lists(st.booleans(), min_size=1, max_size=30), needed=st.integers(0, 30), batch=st.integers(1, 9))
def test_an_early_stop_never_changes_the_verdict(right: list[bool], needed: int, batch: int) -> None:
    data: ImageDataset = Zeros(len(right))  # type: ignore[assignment]
    model: TunedModel = Oracle(right)  # type: ignore[assignment]
    hits, seen = count_hits(model, data, batch, needed)
    assert hits == sum(right[:seen])
    stopped = seen < len(right)
    assert (hits >= needed and not stopped) == (sum(right) >= needed)
    if stopped:  # at the first batch that puts it out of reach
        before = max(0, seen - batch)
        assert sum(right[:before]) + len(right) - before >= needed or seen == 0


def test_runs_that_do_not_belong_together_are_refused(runs: list[Path], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "soup.safetensors"
    other = write_delta(folder / "other.safetensors", ({"name": "prompt", "num_tokens": 5, "deep": True},))
    with pytest.raises(ConfigError, match="differ in their delta"):
        uniform([runs[0], other], out)
    names = write_delta(folder / "names.safetensors", PROMPTS, class_names=("ant", "bee", "cow"))
    with pytest.raises(ConfigError, match="differ in their classes"):
        uniform([runs[0], names], out)
    header_only = write_delta(folder / "head.safetensors", ())
    with pytest.raises(ConfigError, match="cannot be averaged: Only the second of two models holds backbone"):
        uniform([header_only, write_full(folder / "whole.safetensors")], out)
    with pytest.raises(ConfigError, match="at least two"):
        uniform(runs[:1], out)
    assert not out.exists()


def test_validation_images_that_were_trained_on_choose_no_soup(runs: list[Path], tmp_path: Path) -> None:
    splits = {"train": split("val", 6, 2), "val": split("val", 6, 2), "test": split("test", 10, 3)}
    data = ImageDataModule("fake", task().class_names, splits, "square", 64, 4, 0, 0, "none", None)
    with pytest.raises(ConfigError, match="greedy soup is chosen on validation images: 6 of its 6 images were trained"):
        greedy(runs, tmp_path / "soup.safetensors", data)
