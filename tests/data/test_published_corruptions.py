"""The corruptions beside those of `imagecorruptions`, image by image with the same noise: PSNR, and top-1 of ViT-Ti.

Frost is left out: the package has photographs of ice, which are not here. `pytest -s` prints a line for each severity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.robustness_runs import BACKBONE, WEIGHTS, Photos
from vpt.backbones import create_backbone
from vpt.data.corruptions import CORRUPTIONS, SEVERITIES, _seed, corrupt
from vpt.robustness.evaluation_sets import subset
from vpt.robustness.zero_shot_heads import own_head

pytestmark = pytest.mark.slow
N = 100
WHY = "needs its reference: pip install scikit-image, then pip install --no-deps imagecorruptions"

Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def published() -> Callable[[Image, str, int, str], Image]:
    """The package's own `corrupt`, drawing from the generator that ours draws from."""
    filters = pytest.importorskip("skimage.filters", reason=WHY)
    gaussian = filters.gaussian
    with pytest.MonkeyPatch.context() as patch:  # release 1.1.2 is older than numpy 2 and today's scikit-image
        patch.setattr(np, "float_", np.float64, raising=False)
        patch.setattr(filters, "gaussian", lambda *a, multichannel=False, **k: gaussian(*a, **_axis(multichannel), **k))
        patch.setitem(sys.modules, "pkg_resources", cast("ModuleType", SimpleNamespace(resource_filename=None)))
        package = pytest.importorskip("imagecorruptions", reason=WHY)
    return lambda image, kind, severity, name: _drawn(package, image, kind, severity, name)


def _axis(multichannel: bool) -> dict[str, int]:
    return {"channel_axis": -1} if multichannel else {}


def _drawn(package: Any, image: Image, kind: str, severity: int, name: str) -> Image:
    ours = np.random.default_rng(_seed(kind, severity, name))
    drawing = {name: getattr(ours, name) for name in ("normal", "uniform", "poisson")}
    shared = SimpleNamespace(**drawing, randint=ours.integers, default_rng=lambda *_: ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "random", shared)
        patch.setattr(np, "float_", np.float64, raising=False)
        return np.asarray(package.corrupt(image, severity=severity, corruption_name=kind))


@pytest.fixture(scope="module")
def photos(real_data: Path) -> tuple[list[Image], NDArray[np.int64]]:
    split = Photos(str(real_data), halves=False).split("test")
    index = subset(split.labels, N, 0)
    return [np.ascontiguousarray(split.images[row].transpose(1, 2, 0)) for row in index], split.labels[index]


@pytest.fixture(scope="module")
def classify(real_data: Path) -> Callable[[Sequence[Image]], NDArray[np.int64]]:
    backbone = create_backbone(BACKBONE, str(real_data / WEIGHTS))
    head = own_head(backbone)

    @torch.inference_mode()
    def answers(images: Sequence[Image]) -> NDArray[np.int64]:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return np.concatenate([head(backbone(part)).argmax(1).numpy() for part in torch.tensor_split(pixels, 8)])

    return answers


def psnr(image: Image, other: Image) -> float:
    """In decibels; an image that is not changed, as grey by `saturate`, counts as 60."""
    return float(10 * np.log10(255**2 / max(0.065, float(np.mean((image.astype(float) - other) ** 2)))))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", [kind for kind in CORRUPTIONS if kind != "frost"])
def test_psnr_and_accuracy_are_those_of_the_published_corruptions(
    kind: str,
    severity: int,
    published: Callable[[Image, str, int, str], Image],
    photos: tuple[list[Image], NDArray[np.int64]],
    classify: Callable[[Sequence[Image]], NDArray[np.int64]],
) -> None:
    images, labels = photos
    made = [
        [make(image, kind, severity, f"{row}") for row, image in enumerate(images)] for make in (corrupt, published)
    ]
    decibels = [np.mean([psnr(*pair) for pair in zip(images, part, strict=True)]) for part in made]
    top1 = [100 * np.mean(classify(part) == labels) for part in made]
    print(f"\n| {kind} | {severity} | {decibels[0]:.2f} | {decibels[1]:.2f} | {top1[0]:.1f} | {top1[1]:.1f} |")
    assert abs(decibels[0] - decibels[1]) < 0.3
    assert abs(top1[0] - top1[1]) <= 3
