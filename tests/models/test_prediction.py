"""What a model says about photos: its logits on pixels prepared as in training, and when it would rather not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
from vpt.backbones import create_backbone
from vpt.data import PRESETS
from vpt.data.images import decode_rgb
from vpt.errors import ConfigError, DataError, DeltaFileError
from vpt.metrics import conformal, ood_detection
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.calibration import Calibration
from vpt.models.delta_format import about, model_digest, read_calibration, read_delta, write_delta
from vpt.models.prediction import Prediction

NAMES = ["cat", "dog", "fish"]
RANDOM = np.random.default_rng(0)


def model() -> TunedModel:
    torch.manual_seed(0)
    tuned = TunedModel(
        create_backbone("vit_nano_patch8_64"),
        3,
        [{"name": "prompt", "num_tokens": 4}],
        NAMES,
        PRESETS["timm"].to_dict(),
    ).eval()
    torch.nn.init.normal_(tuned.head.weight)
    return tuned.double()


def calibrated(path: Path, tuned: TunedModel, images: int = 200, unknown: str = "mahalanobis") -> Path:
    """The file of a model with scores of made-up images."""
    header, tensors = read_delta(save_delta(path, tuned))
    width = tuned.backbone.num_features
    features = RANDOM.normal(size=(60, width))
    if unknown == "knn":
        fitted = {"neighbours": ood_detection.normalized(features)}
    else:
        means, whitening = ood_detection.fit_mahalanobis(features, np.arange(60) % 3)
        fitted = {"means": means, "whitening": whitening}
    confidence = np.linspace(0.35, 1, images)
    scores = {
        "confidence": confidence,
        "correct": confidence > 0.6,
        "lac": 1 - confidence,
        "aps": confidence / 2,
        "distance": np.linspace(0, 1, images),
    }
    kept = {name: torch.tensor(np.asarray(values), dtype=torch.float32) for name, values in (fitted | scores).items()}
    about = {"temperature": 2.0, "unknown": unknown, "k": 3, "model": model_digest(header, tensors)}
    return write_delta(path, header, tensors, Calibration(about, kept))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = []
    for number, (width, height) in enumerate([(90, 70), (64, 64), (70, 130), (200, 90), (64, 80)]):
        paths.append(tmp_path / "photos" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def logits_of(tuned: TunedModel, paths: list[Path]) -> np.ndarray:
    pixels = np.stack([PRESETS["timm"](decode_rgb(path), 64) for path in paths])
    with torch.inference_mode():
        return np.asarray(tuned(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double())


def several(found: Prediction | list[Prediction]) -> list[Prediction]:
    assert isinstance(found, list)
    return found


def single(found: Prediction | list[Prediction]) -> Prediction:
    assert isinstance(found, Prediction)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_probabilities_are_the_softmax_of_the_models_logits(photos: list[Path], batch_size: int) -> None:
    tuned = model()
    logits = logits_of(tuned, photos)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = several(tuned.predict(photos, top=3, batch_size=batch_size))
    assert [each.path for each in found] == [str(path) for path in photos]
    for row, each in zip(expected, found, strict=True):
        assert [name for name, _ in each.top] == [NAMES[place] for place in np.argsort(-row)]
        np.testing.assert_allclose([share for _, share in each.top], np.sort(row)[::-1], rtol=1e-10)
        assert (each.label, each.probability) == each.top[0]
        assert (each.classes, each.distance, each.declined, each.fault) == (None, None, "", "")


def test_an_image_is_the_same_in_whatever_form_it_comes(photos: list[Path]) -> None:
    tuned, image = model(), decode_rgb(photos[0])
    pixels = np.asarray(image)
    forms = [photos[0], str(photos[0]), image, pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)]
    expected = single(tuned.predict(photos[0]))
    for form in forms:
        assert replace(single(tuned.predict(form)), path="") == replace(expected, path="")
    for each in several(tuned.predict(forms)):
        assert each.label == expected.label
        assert each.probability == pytest.approx(expected.probability, rel=1e-12)
    assert len(several(tuned.predict(pixels[None]))) == 1
    assert len(several(tuned.predict(torch.zeros(2, 3, 70, 70, dtype=torch.uint8)))) == 2
    grey = np.asarray(image.convert("L"))
    assert replace(single(tuned.predict(grey)), path="") == replace(single(tuned.predict(image.convert("L"))), path="")


def test_a_folder_is_its_images_and_any_number_of_them_comes_one_by_one(photos: list[Path]) -> None:
    tuned = model()
    assert tuned.predict(photos[0].parent) == tuned.predict(photos)
    drawn: list[Path] = []

    def endless() -> object:
        while True:
            drawn.append(photos[len(drawn) % 5])
            yield drawn[-1]

    stream = tuned.predictions(endless(), batch_size=2)
    assert [next(stream).path for _ in range(7)] == [str(path) for path in (photos + photos)[:7]]
    stream.close()  # type: ignore[attr-defined]
    assert len(drawn) < 20


def test_features_are_what_the_head_reads(photos: list[Path]) -> None:
    tuned = model()
    features = tuned.embed(photos, batch_size=2)
    np.testing.assert_allclose(
        features @ tuned.head.weight.detach().numpy().T + tuned.head.bias.detach().numpy(),
        logits_of(tuned, photos),
        rtol=1e-4,
        atol=1e-5,
    )
    assert tuned.embed([]).shape == (0, tuned.backbone.num_features)


def test_a_damaged_photo_keeps_its_place(photos: list[Path]) -> None:
    tuned = model()
    whole = several(tuned.predict(photos))
    photos[2].write_bytes(photos[2].read_bytes()[:100])
    missing = photos[0].with_name("gone.png")
    found = several(tuned.predict([*photos, missing]))
    assert [each.fault != "" for each in found] == [False, False, True, False, False, True]
    assert "2.png cannot be decoded" in found[2].fault
    assert "gone.png does not exist" in found[5].fault
    assert [found[place] for place in (0, 1, 3, 4)] == [whole[place] for place in (0, 1, 3, 4)]
    for single_image in (photos[2], missing):
        with pytest.raises(DataError):
            tuned.predict(single_image)
    with pytest.raises(DataError, match="cannot be decoded"):
        tuned.embed(photos)


@pytest.mark.parametrize(
    "odd",
    [None, 3, b"bytes", {"a": 1}, np.zeros((8, 8, 3)), np.zeros((8, 8, 2), np.uint8), torch.zeros(3, 8, 8), [None]],
    ids=lambda odd: type(odd).__name__,
)
def test_what_is_no_image_is_refused(odd: object) -> None:
    with pytest.raises(ConfigError, match="uint8"):
        model().predict(odd)


def test_a_model_that_trains_or_knows_no_preprocessing_is_refused(photos: list[Path]) -> None:
    tuned = model()
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        tuned.train().predict(photos)
    tuned.eval().preset = {}
    with pytest.raises(ConfigError, match="prepared"):
        tuned.predict(photos)


@pytest.mark.parametrize("unknown", ["mahalanobis", "knn"])
def test_a_calibration_comes_back_and_its_thresholds_act(tmp_path: Path, photos: list[Path], unknown: str) -> None:
    path = calibrated(tmp_path / "delta.safetensors", model(), unknown=unknown)
    tuned = vpt.load(path)
    assert isinstance(tuned, TunedModel)
    kept = tuned.calibration
    assert isinstance(kept, Calibration)
    probabilities = np.exp(logits_of(tuned, photos) / 2)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    distances = kept.distances(tuned.embed(photos))
    found = several(tuned.predict(photos, coverage=0.9, max_risk=0.3, false_alarms=0.1))
    threshold = float(np.sort(1 - np.linspace(0.35, 1, 200))[180])  # ⌈201 · 0.9⌉ = 181st
    for row, each, distance in zip(probabilities, found, distances, strict=True):
        assert each.probability == pytest.approx(row.max(), rel=1e-10)
        assert each.distance == pytest.approx(distance, rel=1e-4)
        expected = [NAMES[place] for place in np.argsort(-row) if 1 - row[place] <= threshold]
        assert each.classes == (expected or [NAMES[row.argmax()]])
        strange = distance > float(np.linspace(0, 1, 200)[180])
        unsure = row.max() < kept.confidence_for(0.3)
        assert each.declined == ("unknown" if strange else "unsure" if unsure else "")
    sets = several(tuned.predict(photos, coverage=0.9, set_rule="aps"))
    held = conformal.sets(probabilities, "aps", kept.set_threshold(0.9, "aps"))
    assert [len(each.classes or ()) for each in sets] == held.sum(axis=1).tolist()


def test_saving_a_loaded_model_keeps_its_calibration_unless_it_was_changed(tmp_path: Path) -> None:
    path = calibrated(tmp_path / "delta.safetensors", model())
    tuned = load_classifier(path)
    again = save_delta(tmp_path / "again.safetensors", tuned)
    assert again.read_bytes() == path.read_bytes()
    with torch.no_grad():
        tuned.head.weight.add_(1)
    with pytest.raises(DeltaFileError, match="calibrate the model anew"):
        save_delta(tmp_path / "changed.safetensors", tuned)
    tuned.calibration = None
    assert read_calibration(save_delta(tmp_path / "changed.safetensors", tuned)) is None


def test_a_calibration_outlives_an_option_that_its_deltas_did_not_have_then(tmp_path: Path) -> None:
    tuned = TunedModel(create_backbone("vit_nano_patch8_64"), 3, [{"name": "prompt", "num_tokens": 2}])
    header, tensors = read_delta(save_delta(tmp_path / "new.safetensors", tuned))
    older = [{key: value for key, value in spec.items() if key != "gate"} for spec in header["specs"]]
    assert model_digest(header | {"specs": older}, tensors) == model_digest(header, tensors)
    gated = [spec | {"gate": {"init": -1.0}} for spec in header["specs"]]
    assert model_digest(header | {"specs": gated}, tensors) != model_digest(header, tensors)
    told = [spec | {"gate": {"init": -1.0, "per": "head"}} for spec in header["specs"]]
    assert model_digest(header | {"specs": told}, tensors) == model_digest(header | {"specs": gated}, tensors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"confidence": torch.full((200,), 1.5)}, "outside 0 to 1"),
        ({"confidence": torch.zeros(200)}, "outside 0 to 1"),
        ({"distance": torch.full((200,), torch.nan)}, "no finite number"),
        ({"lac": torch.zeros(3)}, "contradicts itself"),
        ({"whitening": torch.zeros(3, 4)}, "contradicts itself"),
        ({"correct": torch.zeros(200, dtype=torch.int64)}, "no finite number"),
        ({"other": torch.zeros(3)}, "cannot be read"),
    ],
    ids=["above", "zero", "nan", "length", "square", "whole", "unknown"],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, change: dict[str, torch.Tensor], says: str) -> None:
    path = calibrated(tmp_path / "delta.safetensors", model())
    header, tensors = read_delta(path)
    kept = read_calibration(path)
    assert isinstance(kept, Calibration)
    with pytest.raises(DeltaFileError, match=says):
        write_delta(path, header, tensors, Calibration(kept.about, {**kept.tensors, **change}))


@pytest.mark.parametrize(
    "odd", [{"temperature": -1.0}, {"temperature": "warm"}, {"unknown": "nose"}, {"model": "0"}, {"unknown": None}]
)
def test_a_calibration_that_says_odd_things_is_refused(tmp_path: Path, odd: dict[str, object]) -> None:
    path = calibrated(tmp_path / "delta.safetensors", model())
    header, tensors = read_delta(path)
    kept = read_calibration(path)
    assert isinstance(kept, Calibration)
    with pytest.raises(DeltaFileError, match="calibration that"):
        write_delta(path, header, tensors, Calibration({**kept.about, **odd}, kept.tensors))


def test_rates_need_a_calibration_that_suffices(tmp_path: Path, photos: list[Path]) -> None:
    for rates in ({"max_risk": 0.1}, {"coverage": 0.9}, {"false_alarms": 0.1}):
        with pytest.raises(ConfigError, match="needs a calibrated model"):
            model().predict(photos, **rates)  # type: ignore[arg-type]
    tuned = load_classifier(calibrated(tmp_path / "delta.safetensors", model(), images=9))
    with pytest.raises(ConfigError, match="9 validation images do not suffice"):
        tuned.predict(photos, coverage=0.95)
    with pytest.raises(ConfigError, match="do not suffice"):
        tuned.predict(photos, false_alarms=0.01)
    with pytest.raises(ConfigError, match="No threshold"):
        tuned.predict(photos, max_risk=0.01)
    with pytest.raises(ConfigError, match=r"of at least 0, got -0\.1"):
        tuned.predict(photos, max_risk=-0.1)
    with pytest.raises(ConfigError, match=r"from 0 to 1, got 1\.5"):
        tuned.predict(photos, coverage=1.5)
    for rates, says in (({"false_alarms": 0.0}, "got 0"), ({"coverage": 1.0}, "got 1"), ({"max_risk": 0.0}, "got 0")):
        with pytest.raises(ConfigError, match=f"{next(iter(rates))} lies between 0 and 1, {says}"):
            tuned.predict(photos, **rates)  # type: ignore[arg-type]


def test_below_full_strength_a_calibration_says_nothing(tmp_path: Path, photos: list[Path]) -> None:
    tuned = load_classifier(calibrated(tmp_path / "delta.safetensors", model()))
    assert "calibration" in about(tuned)
    tuned.set_strength(0.5)
    assert "calibration" not in about(tuned)  # nor in what is exported
    assert {each.distance for each in several(tuned.predict(photos))} == {None}
    with pytest.raises(ConfigError, match="needs a calibrated model"):
        tuned.predict(photos, coverage=0.9)
