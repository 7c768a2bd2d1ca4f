"""The written file is the same function, without this package and without anything computed from prompts."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.models import small, tuned
from tests.models.test_prediction import calibrated
from vpt.cli import main
from vpt.errors import ExportError, OutputError
from vpt.export import export_onnx, export_torch
from vpt.export import onnx_torch as checking
from vpt.models.calibration import Calibration
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import load_classifier, save_delta
from vpt.models.delta_format import read_calibration
from vpt.tasks import FineTuning

VIT, SWIN = "vit_nano_patch8_64", "swin_nano_patch4_window8_64"
DEEP: dict[str, Any] = {"name": "prompt", "num_tokens": 3}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "linear": (VIT, []),
    "deep": (VIT, [DEEP]),
    "shallow": (VIT, [DEEP | {"deep": False}]),
    "lora": (VIT, [{"name": "lora"}]),
    "deep+lora": (VIT, [DEEP, {"name": "lora"}]),
    "swin": (SWIN, [DEEP]),
    "adaptive": (VIT, [DEEP | {"adaptive": {}, "gate": {}, "fourier": 0.5}]),
    "bypass": (SWIN, [{"name": "convpass", "rank": 3}, DEEP | {"deep": False}]),
    "temperature": (SWIN, [DEEP | {"temperature": {}}, {"name": "prefix", "num_tokens": 2}]),
    "pruned": (VIT, [DEEP | {"mask": ["x. .. xx", "xx .x x."]}, DEEP | {"deep": False, "mask": [".. x. xx"]}]),
}
WRITERS = {"model.onnx": export_onnx, "model.pt2": export_torch}
ONNX_ALONE = """
import json, sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = numpy.load(sys.argv[2])
told = session.get_modelmeta().custom_metadata_map
logits = [session.run(["logits"], {"images": part})[0] for part in (images, images[:1])]
"""
TORCH_ALONE = """
import json, sys, numpy, torch
extra = {"vpt.json": ""}
module = torch.export.load(sys.argv[1], extra_files=extra).module()
images = numpy.load(sys.argv[2])
told = json.loads(extra["vpt.json"])
logits = [module(torch.from_numpy(part)).detach().numpy() for part in (images, images[:1])]
"""
TELL = """
numpy.save(sys.argv[3], numpy.concatenate(logits))
print(json.dumps([told, sorted(name for name in ("vpt", "timm", "torch") if name in sys.modules)]))
"""
ALONE = {"model.onnx": (ONNX_ALONE, []), "model.pt2": (TORCH_ALONE, ["torch"])}


def images(number: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def needs_onnx(file: str) -> None:
    if file.endswith(".onnx"):
        for library in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(library, reason=f"the optional library {library} is not installed")


def run_alone(folder: Path, file: str, where: Path) -> tuple[torch.Tensor, dict[str, Any], list[str]]:
    """Logits of four images and of the first alone, the metadata, and which libraries were loaded."""
    import numpy as np

    np.save(where / "images.npy", images().numpy())
    code = ALONE[file][0] + TELL
    command = [sys.executable, "-c", code, str(folder / file), str(where / "images.npy"), str(where / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=where, env={"PATH": ""})
    told, loaded = json.loads(done.stdout.splitlines()[-1])
    return torch.from_numpy(np.load(where / "logits.npy")), told, loaded


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize(
    "case", ["deep", "shallow", "lora", "swin", "bypass", "adaptive", "temperature", "pruned"]
)  # the others are written by the tests below
def test_the_file_gives_the_models_logits(case: str, file: str, tmp_path: Path) -> None:
    needs_onnx(file)
    measured = WRITERS[file](small(CASES[case][0], CASES[case][1]), tmp_path / "new" / file)
    assert measured.difference <= checking.TOLERANCE
    assert sorted(measured.milliseconds) == [1, 3]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file]


@pytest.mark.parametrize("file", WRITERS)
def test_it_runs_without_this_package_and_says_what_it_is(file: str, tmp_path: Path) -> None:
    needs_onnx(file)
    model = tuned(VIT, "pretrained", [DEEP, {"name": "lora"}])
    model.class_names = ["ant", "bee", "cat", "dog", "elk"]
    model.info = {"seed": 3, "hyperparameters": {"weights": "/home/ann/weights/vit.safetensors"}}
    WRITERS[file](model, tmp_path / file)
    logits, told, loaded = run_alone(tmp_path, file, tmp_path)
    expected = torch.cat([model(images()), model(images(4)[:1])]).detach()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert loaded == ALONE[file][1]
    if file == "model.onnx":  # text by text; what is no text is JSON
        told = {key: json.loads(told[key]) for key in ("class_names", "image_size", "backbone", "provenance")}
    assert told["class_names"] == model.class_names
    assert told["image_size"] == 64
    assert told["backbone"]["weights_id"] == "vpt/vit_nano_patch8_64"
    assert told["provenance"] == {"seed": 3, "hyperparameters": {"weights": "vit.safetensors"}}
    assert b"/home/ann" not in (tmp_path / file).read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / file).read_bytes()


@pytest.mark.parametrize("file", WRITERS)
def test_a_calibrated_models_file_tells_temperature_and_thresholds(file: str, tmp_path: Path) -> None:
    needs_onnx(file)
    model = small(VIT, [])
    model.calibration = kept = read_calibration(calibrated(tmp_path / "delta.safetensors", model))
    assert isinstance(kept, Calibration)
    WRITERS[file](model, tmp_path / file)
    told = run_alone(tmp_path, file, tmp_path)[1]["calibration"]
    told = json.loads(told) if file == "model.onnx" else told
    assert told == {"temperature": 2.0, "thresholds": kept.thresholds(), "data": None}
    limits = told["thresholds"]
    assert limits["max_risk"]["0.05"] == kept.confidence_for(0.05)
    assert limits["coverage_aps"]["0.9"] == kept.set_threshold(0.9, "aps")
    assert list(limits["max_risk"]) == ["0.05", "0.1"]  # 123 right ones are too few to promise 2 %


@cache
def onnx_operations(case: str) -> Counter[str]:
    onnx = pytest.importorskip("onnx")
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        export_onnx(small(CASES[case][0], CASES[case][1]), Path(folder, "m.onnx"))
        graph = onnx.load(Path(folder, "m.onnx")).graph
    return Counter(node.op_type for node in graph.node)


def test_deep_prompts_only_append_constants_in_the_onnx_graph() -> None:
    """No product, norm or sum more than in a linear probe: nothing is projected from prompts, no prompt asks."""
    needs_onnx("model.onnx")
    assert set(onnx_operations("deep") - onnx_operations("linear")) == {"Concat", "Expand"}
    assert not onnx_operations("linear") - onnx_operations("deep")
    assert onnx_operations("deep+lora") == onnx_operations("deep")


def test_every_attention_asks_from_the_images_tokens_alone(tmp_path: Path) -> None:
    program = {}
    for case in ("linear", "deep"):
        export_torch(small(VIT, CASES[case][1]), tmp_path / "m.pt2")
        program[case] = torch.export.load(tmp_path / "m.pt2")
    attention = [
        [
            node
            for node in program[case].graph.nodes
            if node.target == torch.ops.aten.scaled_dot_product_attention.default
        ]
        for case in ("linear", "deep")
    ]
    shapes = [[[int(arg.meta["val"].shape[2]) for arg in node.args[:3]] for node in nodes] for nodes in attention]
    assert shapes[0] == [[65, 65, 65], [1, 65, 65]]
    assert shapes[1] == [[65, 68, 68], [1, 68, 68]]
    linears = [sum(node.target == torch.ops.aten.linear.default for node in p.graph.nodes) for p in program.values()]
    assert linears[0] == linears[1]


@pytest.mark.parametrize("file", WRITERS)
def test_a_fully_fine_tuned_model_is_written_from_its_delta_file(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_onnx(file)
    task = FineTuning(backbone=VIT, num_classes=5)
    task.configure_model()
    model: TunedModel = task.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    delta = save_delta(tmp_path / "delta.safetensors", model)
    assert main(["export", "--delta", str(delta), "--format", "onnx" if file == "model.onnx" else "torch"]) == 0
    out = capsys.readouterr().out
    assert "largest difference" in out
    assert "ms exported" in out
    torch.testing.assert_close(
        run_alone(tmp_path, file, tmp_path)[0][:4], load_classifier(delta)(images()).detach(), rtol=1e-4, atol=1e-5
    )


def test_the_exported_program_holds_no_pickle(tmp_path: Path) -> None:
    export_torch(small(VIT, []), tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    assert parts["archive/data/sample_inputs/model.pt"] == b""
    assert not [name for name, part in parts.items() if part[:2] in (b"PK", *(bytes([0x80, n]) for n in range(2, 6)))]


def test_a_file_of_another_function_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(VIT, [DEEP])
    monkeypatch.setattr("vpt.export.onnx_torch.fold", lambda _: small(VIT, []))
    with pytest.raises(ExportError, match=r"logits differ by .* nothing was written"):
        export_torch(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(VIT, [])
    model.head.register_forward_hook(lambda module, args, out: out if out.sum() > 0 else -out)
    with pytest.raises(ExportError, match=r"on vit_nano_patch8_64 cannot be written as pt2: \w+: .+"):
        export_torch(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    model = small(VIT, [])
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(OutputError, match=r"file/model\.pt2 cannot be written: .*file is not a folder\."):
        export_torch(model, tmp_path / "file" / "model.pt2")
    with pytest.raises(OutputError, match=r"folder\.pt2 is a folder: name a file\."):
        export_torch(model, tmp_path / "folder.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.pt2"]


def test_without_onnx_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpt.export.onnx_torch.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxruntime, onnxscript: pip install 'vpt\[onnx\]'"):
        export_onnx(small(VIT, []), tmp_path / "model.onnx")


def test_the_name_of_the_file_must_say_its_format(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ends in \.pt2, got"):
        export_torch(small(VIT, []), tmp_path / "model.onnx")
