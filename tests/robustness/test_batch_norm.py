"""A network with batch norm between two models: its statistics are averaged, its counter of batches cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fakes import make_task
from tests.robustness.fakes import kept
from vpt.cli import main
from vpt.data import VTABDataModule
from vpt.errors import ConfigError
from vpt.models import load_classifier
from vpt.models.delta_format import read_delta
from vpt.robustness import RobustnessResult
from vpt.robustness.logit_records import read
from vpt.robustness.soups.model_soups import greedy, uniform
from vpt.robustness.wise_ft import Interpolation, check_alike

CONFIGS = Path(__file__).parents[2] / "configs"
COUNTER = "backbone.model.bn1.num_batches_tracked"
MEAN = "backbone.model.bn1.running_mean"


class Runs(NamedTuple):
    """A task, and delta files of a ResNet on it: trained whole for two and for three steps, and its linear probe."""

    task: Path
    two: Path
    three: Path
    probe: Path


def fit(root: Path, method: str, steps: int) -> Path:
    trainer = ["enable_progress_bar=false", "enable_model_summary=false", "max_epochs=1", "limit_val_batches=1"]
    given = [f"limit_train_batches={steps}", f"default_root_dir={root / f'{method}{steps}'}", *trainer]
    model = ["backbone=resnet10t", f"weights={root / 'weights.safetensors'}", "base_lr=0.01"]
    flags = [f"--trainer.{flag}" for flag in given] + [f"--model.{flag}" for flag in model]
    overlays = ["-c", str(CONFIGS / "demo.yaml"), "-c", str(CONFIGS / "method" / f"{method}.yaml")]
    task = ["--data=VTABDataModule", "--data.task=fake", f"--data.root={root}", "--data.train=train800"]
    assert main(["fit", *overlays, *flags, *task, "--data.batch_size=8"]) == 0
    (delta,) = (root / f"{method}{steps}").rglob("delta.safetensors")
    return delta


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("batch_norm")
    task = make_task(root / "fake", per_class=(8, 2, 3))
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), root / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "1")
        kinds = (("full", 2), ("full", 3), ("linear", 2))
        return Runs(task, *(fit(root, method, steps) for method, steps in kinds))


def data(runs: Runs) -> VTABDataModule:
    return VTABDataModule("fake", str(runs.task.parent), train="train800", image_size=176)  # a ResNet's only size


def images(runs: Runs, rows: Sequence[int]) -> Tensor:
    return torch.stack([data(runs).split("test")[row]["image"] for row in rows])


def test_the_command_moves_a_resnet_from_its_probe_to_the_tuned_model(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--delta", str(runs.three), "--anchor", str(runs.probe), "--out=out"]
    assert main(["robustness", "run", *given, "--severities", "--batch-size=10", "--alphas", "0", "0.3", "1"]) == 0
    result = RobustnessResult.read(Path("out"))
    assert result.protocol["way"] == "end-to-end"
    start, end = load_classifier(runs.probe), load_classifier(runs.three)
    first, last = start.state_dict(), end.state_dict()
    assert (int(first[COUNTER]), int(last[COUNTER])) == (0, 3)
    middle = load_classifier(runs.three)
    middle.load_state_dict(
        {k: (0.7 * first[k].double() + 0.3 * t.double()).float() for k, t in last.items() if t.is_floating_point()},
        strict=False,
    )
    found = {alpha: read(kept(Path("out"), f"clean-alpha-{alpha}")) for alpha in (0.0, 0.3, 1.0)}
    clean = images(runs, found[0.0].index.tolist())
    with torch.no_grad():
        assert np.array_equal(found[0.0].logits, start(clean).numpy())
        assert np.array_equal(found[1.0].logits, end(clean).numpy())
        np.testing.assert_allclose(found[0.3].logits, middle(clean).numpy(), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[0.3].logits, found[1.0].logits, atol=1e-3)


def test_the_counter_is_the_starts_at_zero_and_the_ends_elsewhere(runs: Runs) -> None:
    (_, start), (_, end) = read_delta(runs.two), read_delta(runs.three)
    target = {key: torch.zeros_like(tensor) for key, tensor in start.items()}
    line = Interpolation(target, start, end)
    for alpha, expected in ((0.0, start), (0.4, None), (1.0, end), (0.4, None), (0.0, start)):
        line.set_alpha(alpha)
        assert int(target[COUNTER]) == (2 if alpha == 0.0 else 3)
        if expected is not None:
            assert all(torch.equal(target[key], tensor) for key, tensor in expected.items())
        else:
            torch.testing.assert_close(target[MEAN], 0.6 * start[MEAN] + 0.4 * end[MEAN])
    assert not torch.equal(start[MEAN], end[MEAN])


def test_soups_of_resnets_average_statistics_and_keep_the_firsts_counter(runs: Runs, tmp_path: Path) -> None:
    _, tensors = read_delta(uniform([runs.two, runs.three], tmp_path / "uniform.safetensors"))
    (_, first), (_, second) = read_delta(runs.two), read_delta(runs.three)
    for key, tensor in tensors.items():
        expected = (first[key].double() + second[key].double()) / 2 if tensor.is_floating_point() else first[key]
        torch.testing.assert_close(tensor, expected.to(tensor.dtype))
    assert int(tensors[COUNTER]) == 2
    out = greedy([runs.two, runs.three], tmp_path / "greedy.safetensors", data(runs))
    header, _ = read_delta(out)
    assert len(header["info"]["soup"]["trace"]) == 2
    with torch.no_grad():
        assert load_classifier(out)(images(runs, range(4))).isfinite().all()


def test_other_integers_that_differ_stay_refused() -> None:
    for key in ("bn.running_index", "num_batches_tracked.index"):
        with pytest.raises(ConfigError, match=r"\(torch.int64\) differs between two models"):
            check_alike({key: torch.tensor(1)}, {key: torch.tensor(2)})
    with pytest.raises(ConfigError, match="has shape"):
        check_alike({"bn.num_batches_tracked": torch.tensor(1)}, {"bn.num_batches_tracked": torch.tensor([1])})
