"""The votes of the nearest images, against the formula and scikit-learn; and a model of them is one as any other."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import vpt
from vpt.data import PRESETS
from vpt.deltas.registry import Specs
from vpt.errors import ConfigError, DeltaFileError, DivergedError
from vpt.export import export_onnx, export_torch
from vpt.models.delta_file import load_classifier, load_model, read_head, save_delta
from vpt.models.delta_format import model_digest, read_delta, write_delta
from vpt.models.nearest_neighbours import NO_VOTE, NeighbourHead, NeighbourModel, choose_k
from vpt.robustness.soups.model_soups import uniform

VIT = "vit_nano_patch8_64"


def problem(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (rows,), generator=random)
    features = torch.randn(rows, 8, generator=random, dtype=torch.float64)
    return features + 1.5 * torch.eye(8, dtype=torch.float64)[labels], labels


def head(rows: int = 60, k: int = 5, temperature: float = 0.07, classes: int = 5) -> NeighbourHead:
    found = NeighbourHead(8, classes, 0, k, temperature, dtype=torch.float64)
    found.keep(*problem(rows), k)
    return found


def votes(row: Tensor, k: int, temperature: float, rows: int = 60, classes: int = 5) -> list[float]:
    """Of each class for one image, by loops."""
    features, labels = problem(rows)
    similar = [float(row @ other / (row.norm() * other.norm())) for other in features]
    nearest = sorted(range(rows), key=lambda each: -similar[each])[:k]
    found = [0.0] * classes
    for each in nearest:
        found[int(labels[each])] += math.exp(similar[each] / temperature)
    return found


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (500, 0.5)])
def test_logits_are_the_logarithms_of_the_votes(k: int, temperature: float) -> None:
    new = problem(30, seed=1)[0]
    logits = head(k=k, temperature=temperature)(new)
    for row, found in zip(new, logits, strict=True):
        of_classes = votes(row, k, temperature)
        total = sum(of_classes)
        expected = [math.log(each + NO_VOTE * total) for each in of_classes]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        shares = torch.tensor([each / total for each in of_classes], dtype=torch.float64)
        torch.testing.assert_close(found.softmax(dim=0), shares, rtol=0, atol=5 * NO_VOTE)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("k", [1, 5, 20])
def test_classes_are_those_of_scikit_learn(k: int) -> None:
    features, labels = problem(60)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    theirs.fit(features.numpy(), labels.numpy())
    new = problem(200, seed=1)[0]
    logits = head(k=k)(new)
    np.testing.assert_array_equal(logits.argmax(dim=1), theirs.predict(new.numpy()))
    shares = logits.softmax(dim=1)[:, :4].numpy()
    np.testing.assert_allclose(shares, theirs.predict_proba(new.numpy()), atol=5 * NO_VOTE)


def test_the_length_of_features_says_nothing_and_one_image_is_one_row() -> None:
    one, new = head(), problem(4, seed=2)[0]
    torch.testing.assert_close(one(3 * new), one(new))
    torch.testing.assert_close(one(new[0]), one(new)[0])


def test_half_precision_around_it_changes_no_neighbour() -> None:
    found, new = head().float(), problem(100, seed=3)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = found(new)
    assert torch.equal(mixed, found(new))


def test_a_head_that_keeps_nothing_yet_prefers_nothing() -> None:
    assert torch.equal(NeighbourHead(8, 3, 0, 5, 0.07)(torch.ones(2, 8)), torch.zeros(2, 3))


def test_images_that_cannot_be_kept_are_refused() -> None:
    features, labels = problem(6)
    with pytest.raises(DivergedError, match="not finite"):
        head().keep(features * float("nan"), labels, 5)
    with pytest.raises(ConfigError, match="one label a row"):
        head().keep(features, labels + 2, 5)


def test_the_best_number_of_neighbours_is_chosen_and_the_larger_of_equals() -> None:
    val = problem(300, seed=4)
    right = {k: int((head(k=k)(val[0]).argmax(dim=1) == val[1]).sum()) for k in (1, 3, 15, 59)}
    assert len(set(right.values())) > 2
    assert choose_k(head(), val, list(right)) == max(right, key=lambda k: (right[k], k))
    assert choose_k(head(), val, [60, 61, 62]) == 62  # the same 60 vote


def model(specs: Specs = (), seed: int = 0, k: int = 5) -> NeighbourModel:
    torch.manual_seed(seed)
    names, preset = ["ant", "bee", "cat"], PRESETS["square"].to_dict()
    found = NeighbourModel(vpt.create_backbone(VIT), 3, specs, names, preset, k=k).eval()
    with torch.no_grad():
        images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8)
        found.head.keep(found.encode(images), torch.arange(40) % 3, k)
    return found


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


PROMPT: list[dict[str, Any]] = [{"name": "prompt", "num_tokens": 2}]


@pytest.mark.parametrize("specs", [[], PROMPT], ids=["alone", "behind prompts"])
@torch.no_grad()
def test_a_file_is_the_same_model(tmp_path: Path, images: Tensor, specs: list[dict[str, Any]]) -> None:
    one = model(specs)
    path = save_delta(tmp_path / "knn.safetensors", one)
    again = load_classifier(path)
    assert isinstance(again, NeighbourModel)
    assert torch.equal(again(images), one(images))
    assert torch.equal(load_model(path)(images), one(images))
    assert again.predict(images) == one.predict(images)
    assert save_delta(tmp_path / "again.safetensors", again).read_bytes() == path.read_bytes()
    torch.testing.assert_close(vpt.PromptBank({"a": path, "b": path})(images[:2], ["a", "b"]), list(one(images[:2])))


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@torch.no_grad()
def test_it_is_exported(tmp_path: Path, name: str) -> None:
    if name == "model.onnx":
        for library in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(library)
    write = {"model.onnx": export_onnx, "model.pt2": export_torch}[name]
    assert write(model(), tmp_path / name).difference < 1e-5  # of the logits, on random images


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 0}, "no valid head"),
        ({"k": 2.0}, "no valid head"),
        ({"temperature": 0.0}, "no valid head"),
        ({"kind": "nn"}, "no valid head"),
        ({"more": 1}, "no valid head"),
        ({"images": 41}, r"'head.features' of \(40, 192\), expected \(41, 192\)"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    header, tensors = read_delta(save_delta(tmp_path / "knn.safetensors", model()))
    write_delta(tmp_path / "odd.safetensors", header | {"head": header["head"] | change}, tensors)
    with pytest.raises(DeltaFileError, match=says):
        load_classifier(tmp_path / "odd.safetensors")


def test_labels_of_no_class_are_refused(tmp_path: Path) -> None:
    header, tensors = read_delta(save_delta(tmp_path / "knn.safetensors", model()))
    write_delta(tmp_path / "odd.safetensors", header, tensors | {"head.labels": tensors["head.labels"] + 1})
    with pytest.raises(DeltaFileError, match=r"classes that it does not name: its head\.labels is damaged"):
        load_classifier(tmp_path / "odd.safetensors")


def test_a_calibration_is_of_one_number_of_neighbours(tmp_path: Path) -> None:
    header, tensors = read_delta(save_delta(tmp_path / "knn.safetensors", model()))
    other = copy.deepcopy(header)
    other["head"]["k"] = 6
    assert model_digest(header, tensors) != model_digest(other, tensors)


def test_there_is_no_strength_of_votes(tmp_path: Path) -> None:
    one, linear = model(), load_classifier(_linear(tmp_path))
    with pytest.raises(ConfigError, match="no weights to interpolate"):
        one.set_anchor(linear.head)
    path = save_delta(tmp_path / "knn.safetensors", one)
    with pytest.raises(ConfigError, match=r"The anchor .*knn\.safetensors is of nearest neighbours"):
        read_head(path, linear, "anchor")
    with pytest.raises(ConfigError, match=r"The model is of nearest neighbours, .* leave out the anchor"):
        read_head(_linear(tmp_path), one, "anchor")


def test_a_soup_is_of_the_same_images_and_the_same_number_of_neighbours(tmp_path: Path, images: Tensor) -> None:
    names = {"one": model(), "same": model(), "seven": model(k=7), "other": model()}
    names["other"].head.labels = names["other"].head.labels.roll(1)
    files = {name: save_delta(tmp_path / f"{name}.safetensors", each) for name, each in names.items()}
    soup = load_classifier(uniform([files["one"], files["same"]], tmp_path / "soup.safetensors"))
    assert torch.equal(soup(images), load_classifier(files["one"])(images))
    with pytest.raises(ConfigError, match="differ in their head: a soup needs one configuration"):
        uniform([files["one"], files["seven"]], tmp_path / "no.safetensors")
    with pytest.raises(ConfigError, match=r"'head\.labels' .* differs between two models"):
        uniform([files["one"], files["other"]], tmp_path / "no.safetensors")


def _linear(folder: Path) -> Path:
    from vpt.models import TunedModel

    return save_delta(folder / "linear.safetensors", TunedModel(vpt.create_backbone(VIT), 3))


@torch.no_grad()
def test_the_strength_of_a_delta_before_it_moves_the_features(images: Tensor) -> None:
    one = model(PROMPT)
    for tensor in one.delta.parameters() if one.delta is not None else ():
        tensor.normal_()
    tuned = one(images)
    one.set_strength(0.0)
    assert torch.equal(one(images), one.head(vpt.create_backbone(VIT)(images)))
    assert not torch.allclose(one(images), tuned)
