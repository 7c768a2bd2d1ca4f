"""Every shipped method on a tiny model of each family: it trains, and its file answers as it does; or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
import yaml
from numpy.typing import NDArray

import vpt.tasks
from tests.deltas.families import FAMILIES
from tests.tasks.test_tasks import trainer
from vpt.backbones import checkpoints
from vpt.data import ImageDataModule
from vpt.data.splits import Split
from vpt.errors import UnknownNameError, UnsupportedBackboneError, VPTError
from vpt.models import load_classifier, save_delta

pytestmark = pytest.mark.slow  # a minute

METHODS = {path.stem: path for path in (Path(__file__).parents[2] / "configs" / "method").glob("*.yaml")}
REFUSED: dict[tuple[str, str], tuple[type[VPTError], str]] = {
    ("swinv2", "adapter_plus"): (UnsupportedBackboneError, "give pfeiffer, houlsby or parallel"),
    ("eva02-split", "fact"): (UnknownNameError, "FacT target of .* 'fc1': did you mean 'fc1_x'"),
    ("eva02-split", "glora"): (UnknownNameError, "GLoRA target of .* 'fc1': did you mean 'fc1_x'"),
}
SIZE, IMAGES = 32, 24


@pytest.fixture(params=["dinov2", "dinov2-reg", "dinov3", "eva02-fused", "eva02-split", "siglip", "swinv2"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """While a test runs timm builds its name at the tiny size."""
    name, options = FAMILIES[request.param]
    small = options | {"embed_dim": 32 if "depths" in options else 64}  # the features have 32 equal parts
    create = timm.create_model

    def tiny(model: str, **options: Any) -> Any:
        return create(model, **options | (small if model == name else {}))

    monkeypatch.setattr(timm, "create_model", tiny)
    checkpoints._outline.cache_clear()
    yield request.param
    checkpoints._outline.cache_clear()


def pixels(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8)


def data() -> ImageDataModule:
    labels = np.arange(IMAGES, dtype=np.int64) % 3
    splits = {
        name: Split(f"fake/{name}", [f"{name}/{i}" for i in range(IMAGES)], labels, lambda seed=seed: pixels(seed))
        for seed, name in enumerate(("train", "val", "test"))
    }
    return ImageDataModule("fake", ("ant", "bee", "cat"), splits, "square", SIZE, 8, 0, 0, "none", None)


def built(method: str, family: str) -> Any:
    L.seed_everything(0)
    section = yaml.safe_load(METHODS[method].read_text())["model"]
    given = {"backbone": FAMILIES[family][0], "weights": "random", "image_size": SIZE, "num_classes": 3}
    return getattr(vpt.tasks, section["class_path"])(**section["init_args"] | given)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_trains_and_its_file_answers_alike_or_it_is_refused(family: str, method: str, tmp_path: Path) -> None:
    if (family, method) in REFUSED:
        error, message = REFUSED[family, method]
        with pytest.raises(error, match=message) as refusal:
            built(method, family)
        assert "\n" not in str(refusal.value)
        return
    task = built(method, family)
    before = {name: tensor.clone() for name, tensor in task.model.owned().items()}
    trainer(epochs=1, batches=1).fit(task, datamodule=data())
    owned = task.model.owned()
    assert owned.keys() != before.keys() or any(not torch.equal(owned[name], before[name]) for name in before)
    loaded = load_classifier(save_delta(tmp_path / "delta.safetensors", task.model)).eval()
    assert all(torch.equal(tensor, loaded.owned()[name]) for name, tensor in task.model.owned().items())
    batch = torch.from_numpy(pixels(2))
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), task.model.eval()(batch), rtol=1e-5, atol=1e-7)
