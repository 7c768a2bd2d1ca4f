from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from vpt.models.delta_format import write_delta as write_delta_to
from vpt.robustness.soups.averaging import averaged, low_rank_changes, mean
from vpt.robustness.soups.model_soups import Step, count_hits, greedy, share, stock, uniform


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
    for key in ("head.weight", "head.bias"):
        expected = torch.stack([part[key].double() for part in parts]).mean(0)
        torch.testing.assert_close(tensors[key].double(), expected, rtol=1e-7, atol=1e-7)
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
    soup, best, specs = [order[0]], alone[order[0]], read_delta(runs[0])[0]["specs"]
    for run in order[1:]:  # without an early stop
        _, tensors = averaged(specs, [read_delta(runs[member])[1] for member in [*soup, run]])
        model.load_state_dict(tensors, strict=False)
        found, _ = count_hits(model, held_out, 6)
        if found >= best:
            soup, best = [*soup, run], found
    assert [step.file for step in trace] == ["/".join(runs[run].parts[-2:]) for run in order]
    assert [step.kept for step in trace] == [run in soup for run in order]
    header, tensors = read_delta(out)
    assert all(
        torch.equal(tensors[k], t) for k, t in averaged(specs, [read_delta(runs[run])[1] for run in soup])[1].items()
    )
    assert [file["kept"] for file in header["info"]["soup"]["files"]] == [run in soup for run in range(4)]


class Oracle:
    """Answers rightly where it is told to."""

    def __init__(self, right: list[bool]) -> None:
        self.right, self.backbone = right, SimpleNamespace(mean=torch.zeros(3, 1, 1))
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


LORA = ({"name": "lora", "rank": 2, "scale": 3.0, "targets": ["q", "fc1"]},)
PREFIX = ({"name": "prefix", "num_tokens": 3, "log_bias": True},)
KINDS = {"prompt": PROMPTS, "shallow": ({**PROMPTS[0], "deep": False},), "prefix": PREFIX}


def images() -> torch.Tensor:
    return torch.stack([task().split("test")[row]["image"] for row in range(6)])


@pytest.mark.parametrize("kind", KINDS)
def test_sets_are_averaged_whatever_their_order(kind: str, folder: Path, tmp_path: Path) -> None:
    one = write_delta(folder / f"{kind}.safetensors", KINDS[kind])
    header, tensors = read_delta(one)
    order = torch.tensor([2, 0, 1, 3][: 4 if kind != "prefix" else 3])
    name = "keys" if kind == "prefix" else "tokens"
    names = [key for key in tensors if key.startswith(f"delta.parts.0.{name}") or ".values" in key]
    turned = {key: value[:, order] if key in names else value for key, value in tensors.items()}
    other = write_delta_file(tmp_path / "turned.safetensors", header, turned)
    with torch.no_grad():
        expected = load_classifier(one)(images())
        torch.testing.assert_close(load_classifier(other)(images()), expected, rtol=1e-4, atol=1e-4)
        found = load_classifier(uniform([one, other], tmp_path / "soup.safetensors"))(images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    soup = read_delta(tmp_path / "soup.safetensors")[1]
    assert all(torch.equal(soup[key], tensors[key]) for key in tensors)


def write_delta_file(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    return write_delta_to(path, header, {key: value.contiguous() for key, value in tensors.items()})


def test_changes_of_low_rank_are_averaged_as_matrices(folder: Path, tmp_path: Path) -> None:
    runs = [write_delta(folder / f"lora{seed}.safetensors", LORA, seed) for seed in range(3)]
    out = uniform(runs, tmp_path / "soup.safetensors")
    header, tensors = read_delta(out)
    assert (header["specs"][0]["rank"], header["specs"][0]["scale"]) == (6, 9.0)
    for target in ("0_q", "0_fc1"):
        changes = [low_rank_changes("delta.parts.0.", read_delta(run)[1])[target] for run in runs]
        expected = torch.stack(changes).mean(dim=0)
        torch.testing.assert_close(low_rank_changes("delta.parts.0.", tensors)[target], expected, rtol=1e-5, atol=1e-5)
    assert isinstance(load_classifier(out), TunedModel)
    steps: list[Step] = []
    best = greedy(runs, tmp_path / "greedy.safetensors", task(), report=steps.append)
    assert read_delta(best)[0]["specs"][0]["rank"] == 2 * sum(step.kept for step in steps)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=5), st.integers(2, 4))
def test_a_share_is_that_of_the_paper(values: list[float], number: int) -> None:
    one = torch.tensor([1.0, *values], dtype=torch.float64)
    assert share([one] * number) == pytest.approx(1.0)
    across = torch.zeros(6, dtype=torch.float64)
    across[5] = 1.0
    padded = torch.cat([one, torch.zeros(6 - len(one), dtype=torch.float64)]) if len(one) < 6 else None
    if padded is not None:
        assert share([padded, across]) == 0.0
    half = torch.tensor([1.0, 3**0.5], dtype=torch.float64)
    assert share([torch.tensor([1.0, 0.0], dtype=torch.float64), half]) == pytest.approx(2 * 0.5 / 1.5)


@pytest.mark.parametrize("spec", ["full", "bias", "maps", "gps", "ssf", "lora", "dora", "whole"])
def test_model_stock_lies_between_the_start_and_the_mean(spec: str, folder: Path, tmp_path: Path) -> None:
    if spec == "whole":
        runs = [write_full(folder / f"stock{seed}.safetensors", seed) for seed in range(2)]
    else:
        known: dict[str, tuple[dict[str, Any], ...]] = {
            "lora": LORA,
            "dora": ({**LORA[0], "name": "dora"},),
            "maps": ({"name": "bias", "targets": ["k", "v"]},),
        }
        specs: tuple[dict[str, Any], ...] = known.get(spec, ({"name": spec},))
        runs = [write_delta(folder / f"stock-{spec}{seed}.safetensors", specs, seed) for seed in range(2)]
    probe = write_delta(folder / "anchor.safetensors", (), seed=7)
    out = stock(runs, tmp_path / "stock.safetensors", probe)
    header, tensors = read_delta(out)
    ends = [read_delta(run)[1] for run in runs]
    start = read_delta(probe)[1]["head.weight"].double()
    changes = [end["head.weight"].double() - start for end in ends]
    expected = start + share(changes) * sum(changes) / 2
    torch.testing.assert_close(tensors["head.weight"].double(), expected.to(tensors["head.weight"].double()))
    shares = header["info"]["soup"]["shares"]
    bare = load_classifier(probe).backbone.model.state_dict()
    key = {"full": "delta.parts.0.values.blocks/1/mlp/fc1/weight", "bias": "delta.parts.0.values.blocks/1/mlp/fc1/bias"}
    key |= {
        "gps": key["bias"],
        "ssf": "delta.parts.0.scale.blocks/1/mlp/fc1",
        "whole": "backbone.model.blocks.1.mlp.fc1.weight",
    }
    if spec in key:
        names = {"full": "blocks.1.mlp.fc1.weight", "bias": "blocks.1.mlp.fc1.bias", "whole": "blocks.1.mlp.fc1.weight"}
        names["gps"] = names["bias"]
        begin = bare[names[spec]].double() if spec in names else torch.ones_like(tensors[key[spec]]).double()
        changes = [end[key[spec]].double() - begin for end in ends]
        expected = begin + share(changes) * sum(changes) / 2
        torch.testing.assert_close(tensors[key[spec]].double(), expected, rtol=1e-5, atol=1e-6)
    if spec == "maps":
        name = "delta.parts.0.values.blocks/1/attn/qkv/bias"
        begin = bare["blocks.1.attn.qkv.bias"][len(tensors[name]) // 2 :].double()
        changes = [end[name].double() - begin for end in ends]
        expected = begin + share(changes) * sum(changes) / 2
        torch.testing.assert_close(tensors[name].double(), expected, rtol=1e-5, atol=1e-6)
    if spec == "gps":
        name = "delta.parts.0.values.blocks/1/mlp/fc1/weight"
        begin = bare["blocks.1.mlp.fc1.weight"][:, :1].double()
        changes = [end[name].double() - begin for end in ends]
        expected = begin + share(changes) * sum(changes) / 2
        torch.testing.assert_close(tensors[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert len(shares) > 3
    assert all(0 <= value <= 1 for value in shares.values())
    assert isinstance(load_classifier(out), TunedModel)
    if spec == "dora":
        name = "delta.parts.0.magnitude.1_q"
        begin = bare["blocks.1.attn.qkv.weight"][: len(tensors[name])].double().norm(dim=1)
        changes = [end[name].double() - begin for end in ends]
        expected = begin + share(changes) * sum(changes) / 2
        torch.testing.assert_close(tensors[name].double(), expected, rtol=1e-5, atol=1e-6)
    if spec in ("lora", "dora"):
        merged = [low_rank_changes("delta.parts.0.", end)["1_q"] for end in ends]
        found = low_rank_changes("delta.parts.0.", tensors)["1_q"]
        torch.testing.assert_close(found, share(merged) * sum(merged) / 2, rtol=1e-5, atol=1e-5)


def test_where_nothing_starts_from_the_backbone_there_is_no_model_stock(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a uniform soup"):
        stock(runs[:2], tmp_path / "stock.safetensors")
