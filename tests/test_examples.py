"""Examples are what a newcomer copies: short, public names only, and they do what they say."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
from tests.models.test_prediction import calibrated, model
from vpt.backbones import create_backbone
from vpt.data import PRESETS
from vpt.data.images import decode_rgb
from vpt.data.targets import Targets
from vpt.export import export_onnx
from vpt.image_size import as_size
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.calibration import LabelThresholds
from vpt.models.classifier import ValueHead
from vpt.models.delta_format import model_digest, read_delta, write_delta
from vpt.models.prediction import Prediction

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"
SERVE = EXAMPLE.with_name("serve.py")


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_is_short_and_uses_public_names_alone() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"torch", "vpt"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vpt"
    }
    assert used <= set(vpt.__all__)


def test_the_example_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpt, "DigitsDataModule", partial(vpt.DigitsDataModule, test="val200"))
    assert loaded(EXAMPLE).main(epochs=1) > 0.3  # chance is 0.1


@pytest.fixture(scope="module", params=["square", "timm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TunedModel, Path]:
    """A calibrated model and what was exported of it."""
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library, reason=f"the optional library {library} is not installed")
    folder = tmp_path_factory.mktemp("served")
    tuned = model().float()
    with torch.no_grad():
        tuned.head.weight.mul_(0.07)  # so that it is unsure of some
    tuned.preset = PRESETS[request.param].to_dict()
    tuned = load_classifier(calibrated(folder / "delta.safetensors", tuned))
    export_onnx(tuned, folder / "model.onnx")
    return tuned, folder / "model.onnx"


def photos() -> dict[str, bytes]:
    """Files of several shapes and modes, by what is odd about each."""
    random = np.random.default_rng(1)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 4), dtype=np.uint8), "RGBA")
    sideways = Image.Exif()
    sideways[0x0112] = 6  # orientation
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "wide": (coarse.convert("RGB").resize((203, 90)), {"format": "JPEG"}),
        "high": (coarse.convert("RGB").resize((71, 130)), {"format": "PNG"}),
        "sideways": (coarse.convert("RGB").resize((120, 70)), {"format": "JPEG", "exif": sideways}),
        "transparent": (coarse.resize((80, 64)), {"format": "PNG"}),
        "grey": (coarse.convert("L").resize((64, 64)), {"format": "PNG"}),
        "palette": (coarse.convert("RGB").quantize(16).resize((99, 65)), {"format": "PNG", "transparency": 3}),
        "four inks": (coarse.convert("CMYK").resize((99, 65)), {"format": "JPEG"}),
    }
    found = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, **options)
        found[name] = file.getvalue()
    return found


def test_the_service_says_what_the_model_says(served: tuple[TunedModel, Path], tmp_path: Path) -> None:
    tuned, file = served
    serve = loaded(SERVE)
    session, said = serve.InferenceSession(file), []
    for kind, photo in photos().items():
        (tmp_path / kind).write_bytes(photo)
        for max_risk, coverage in ((0.1, 0.8), (0.05, 0.99)):
            expected = tuned.predict(tmp_path / kind, max_risk=max_risk, coverage=coverage)
            assert isinstance(expected, Prediction)
            found = serve.answer(session, photo, str(max_risk), str(coverage))
            assert found["class"] == expected.label, kind
            assert found["probability"] == pytest.approx(expected.probability, abs=1e-4), kind
            assert found["declined"] == (expected.declined == "unsure"), kind
            assert found["set"] == expected.classes, kind
            said.append((found["declined"], len(found["set"])))
        assert serve.answer(session, photo, "0.5", "0.5") == found | {"declined": None, "set": None}
    assert {declined for declined, _ in said} == {False, True}
    assert len({size for _, size in said}) > 1


@pytest.mark.parametrize("preset", ["square", "timm", "pad"])
@pytest.mark.parametrize("size", [64, [32, 64], [64, 24]])
def test_the_service_prepares_photos_as_the_preset_does(preset: str, size: int | list[int], tmp_path: Path) -> None:
    serve = loaded(SERVE)
    for kind, photo in photos().items():
        (tmp_path / kind).write_bytes(photo)
        expected = PRESETS[preset](decode_rgb(tmp_path / kind), as_size(size))
        found = serve.prepare(photo, PRESETS[preset].to_dict(), size)
        assert np.array_equal(found[0].transpose(1, 2, 0), expected), kind


@pytest.mark.parametrize("targets", ["multilabel", "regression"])
def test_the_service_tells_several_labels_and_numbers(targets: Targets, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names, preset = ["cat", "dog", "fish"], PRESETS["square"].to_dict()
    tuned = TunedModel(create_backbone("vit_nano_patch8_64"), 3, (), names, preset, targets)
    torch.nn.init.normal_(tuned.head.weight, std=0.3)
    if isinstance(tuned.head, ValueHead):
        tuned.head.offset.copy_(torch.tensor([2000.0, -5.0, 0.0]))
        tuned.head.scale.copy_(torch.tensor([3.0, 0.1, 1.0]))
    path = save_delta(tmp_path / "delta.safetensors", tuned)
    header, tensors = read_delta(path)
    if targets == "multilabel":
        about = {"model": model_digest(header, tensors), "data": {}}
        write_delta(path, header, tensors, LabelThresholds(about, {"thresholds": torch.tensor([-9.0, 0.0, 9.0])}))
    tuned = load_classifier(path)
    export_onnx(tuned, tmp_path / "model.onnx")
    serve = loaded(SERVE)
    session = serve.InferenceSession(tmp_path / "model.onnx")
    for kind, photo in photos().items():
        (tmp_path / kind).write_bytes(photo)
        expected = tuned.predict(tmp_path / kind, top=3)
        assert isinstance(expected, Prediction)
        found = serve.answer(session, photo)
        if targets == "regression":
            assert found == pytest.approx(dict(expected.values or {}), rel=1e-4), kind
        else:
            assert found["probabilities"] == pytest.approx(dict(expected.top), abs=1e-4), kind
            assert found["labels"] == sorted(expected.labels or ()), kind


def test_the_service_needs_neither_vpt_nor_torch(served: tuple[TunedModel, Path], tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(photos()["wide"])
    code = (
        "import json, sys; import serve; from pathlib import Path; session = serve.InferenceSession(sys.argv[1])\n"
        "found = serve.answer(session, Path(sys.argv[2]).read_bytes())\n"
        "print(json.dumps([found, sorted({'vpt', 'torch', 'timm'} & sys.modules.keys())]))"
    )
    command = [sys.executable, "-c", code, str(served[1]), str(tmp_path / "photo")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SERVE.parent)})
    found, libraries = json.loads(done.stdout)
    expected = served[0].predict(tmp_path / "photo")
    assert isinstance(expected, Prediction)
    assert libraries == []
    assert found["probability"] == pytest.approx(expected.probability, abs=1e-4)


def test_the_service_refuses_what_it_would_read_differently(served: tuple[TunedModel, Path]) -> None:
    serve = loaded(SERVE)
    deep = io.BytesIO()
    Image.fromarray(np.full((70, 70), 40_000, np.uint16)).save(deep, "PNG")
    long = io.BytesIO()
    Image.new("RGB", (1700, 100)).save(long, "PNG")
    for photo in (deep, long):
        with pytest.raises(ValueError, match="take vpt itself"):
            serve.answer(serve.InferenceSession(served[1]), photo.getvalue())


def test_a_photo_is_posted_and_its_answer_comes_back(
    served: tuple[TunedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("fastapi", "httpx"):
        pytest.importorskip(library, reason=f"the web service needs {library}, which vpt does not")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("MODEL", str(served[1]))
    module = loaded(SERVE)
    client = TestClient(module.app())
    session = module.InferenceSession(served[1])
    assert client.post("/", content=photos()["wide"]).json() == module.answer(session, photos()["wide"])
    refused = client.post("/", content=b"no photo")
    assert refused.status_code == 422
    assert "not a photo" in refused.json()["detail"]
