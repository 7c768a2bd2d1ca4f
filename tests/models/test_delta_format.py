"""Whatever a stranger wrote, reading it gives one sentence, at once and in little memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import vpt
from vpt.backbones import create_backbone
from vpt.errors import ConfigError, DeltaFileError, VPTError
from vpt.models import TunedModel, save_delta
from vpt.models.delta_format import DENSE, FORMAT, read_delta, read_header, write_delta
from vpt.models.segmenter import DenseModel

NANO = "vit_nano_patch8_64"
Header = dict[str, Any]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TunedModel(create_backbone(NANO), 3, [{"name": "prompt", "num_tokens": 4}], ["ant", "bee", "cat"])
    return save_delta(tmp_path_factory.mktemp("good") / "delta.safetensors", model)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_delta(
        tmp_path_factory.mktemp("dense") / "delta.safetensors",
        DenseModel(create_backbone(NANO), 3, kind="conv", width=8),
    )


def stored(path: Path) -> tuple[Header, Tensors]:
    """Both halves as they are in the file, unchecked."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["vpt"]), load_file(path)


def written(path: Path, text: str, tensors: Tensors) -> Path:
    save_file(tensors, path, metadata={"vpt": text})
    return path


def spec(**arguments: Any) -> Callable[[Header, Tensors], None]:
    return lambda header, tensors: header.update(specs=[{"name": "prompt", "num_tokens": 4} | arguments])


def backbone(**values: Any) -> Callable[[Header, Tensors], None]:
    return lambda header, tensors: header["backbone"].update(values)


def tensor(name: str, value: Tensor) -> Callable[[Header, Tensors], None]:
    def change(header: Header, tensors: Tensors) -> None:
        tensors[name] = value
        header["tensors"] = sorted(tensors)

    return change


TOKENS = "delta.parts.0.tokens"
CHANGES: dict[str, tuple[Callable[[Header, Tensors], None], str]] = {
    "many-tokens": (spec(num_tokens=60_000), r"holds 'delta.parts.0.tokens' of \(6, 4, 192\), expected"),
    "more-tokens-than-numbers": (spec(num_tokens=10**30), "cannot be"),
    "no-tokens": (spec(num_tokens=0), "cannot be: num_tokens must be at least 1"),
    "deep-loop": (lambda h, t: h.update(specs=[{"name": "mlp_head", "layers": 60_000}]), "has 2 to 64 layers"),
    "wide": (lambda h, t: h.update(specs=[{"name": "sidetune", "width": 10**9}]), "incomplete|cannot be"),
    "unknown-delta": (lambda h, t: h.update(specs=[{"name": "telepathy"}]), "Unknown delta 'telepathy'"),
    "no-name": (lambda h, t: h.update(specs=[{}]), "a dict with a name"),
    "unknown-argument": (spec(colour="red"), "Unknown argument of delta 'prompt' 'colour'"),
    "wrong-type": (spec(dropout="much"), "dropout of delta 'prompt' must be a number"),
    "other-number-of-tokens": (spec(num_tokens=5), "expected"),
    "half-a-pixel": (backbone(image_size=64.5), "no valid backbone image_size"),
    "true-pixels": (backbone(image_size=True), "no valid backbone image_size"),
    "no-pixels": (backbone(image_size=0), "no valid backbone image_size"),
    "too-many-pixels": (backbone(image_size=10**6), "no valid backbone image_size"),
    "unknown-backbone": (backbone(name="vit_enormous"), "Unknown backbone 'vit_enormous'"),
    "unknown-normalization": (backbone(normalization="l2"), "no valid backbone normalization"),
    "other-weights": (backbone(fingerprint="0" * 64), "was trained on"),
    "four-names": (lambda h, t: h.update(class_names=["a", "b", "c", "d"]), "4 class names, but its head"),
    "names-of-numbers": (lambda h, t: h.update(class_names=[1, 2, 3]), "no valid class_names"),
    "no-classes": (lambda h, t: h.update(class_names=[]), "no valid class_names"),
    "names-of-tensors": (lambda h, t: h.update(tensors=[[]]), "no valid tensors"),
    "dtype": (lambda h, t: h.update(dtype="float3"), "no valid dtype"),
    "tuned": (lambda h, t: h.update(backbone_tuned=True), "incomplete: backbone"),
    "tuned-a-little": (lambda h, t: h.update(backbone_tuned=1), "no valid backbone_tuned"),
    "narrow-head": (tensor("head.weight", torch.zeros(3, 7)), r"'head.weight' of \(3, 7\), expected \(3, 192\)"),
    "head-of-others": (tensor("head.extra", torch.zeros(3)), "holds 'head.extra'"),
    "tensor-of-nobody": (tensor("body.weight", torch.zeros(3)), "holds 'body.weight'"),
    "tensor-of-the-backbone": (tensor("backbone.model.norm.bias", torch.zeros(192)), "incomplete|does not tell"),
    "whole-numbers": (
        tensor(TOKENS, torch.zeros(6, 4, 192, dtype=torch.int64)),
        "int64, expected torch.float32",
    ),
    "scalar": (tensor(TOKENS, torch.zeros(())), r"of \(\), expected"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_contradicts_itself_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    header, tensors = stored(good)
    change, sentence = CHANGES[name]
    change(header, tensors)
    path = written(tmp_path / "bad.safetensors", json.dumps(header), tensors)
    with pytest.raises(DeltaFileError, match=sentence):
        vpt.load(path)
    with pytest.raises((DeltaFileError, ConfigError)):
        vpt.PromptBank({"a": path})


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


TEXTS: dict[str, Callable[[str], str]] = {
    "nan": replaced('"info": {}', '"info": {"loss": NaN}'),
    "infinity": replaced('"info": {}', '"info": {"loss": -Infinity}'),
    "overflow": replaced('"info": {}', '"info": {"loss": 1e999}'),
    "twice": replaced('"info": {}', '"info": {}, "info": {}'),
    "nested": replaced('"info": {}', '"info": {"a": ' + "[" * 200 + "]" * 200 + "}"),
    "bottomless": replaced('"info": {}', '"info": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "endless-number": replaced('"info": {}', '"info": {"a": ' + "9" * 5000 + "}"),
    "half-a-letter": replaced('"info": {}', '"info": {"a": "\\ud800"}'),
    "cut": lambda text: text[:-1],
    "empty": lambda text: "",
    "list": lambda text: f"[{text}]",
    "number": lambda text: "5",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_header_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    header, tensors = stored(good)
    path = written(tmp_path / "bad.safetensors", TEXTS[name](json.dumps(header)), tensors)
    for read in (read_header, read_delta, vpt.load):
        with pytest.raises(DeltaFileError, match="is not a delta file"):
            read(path)


@pytest.mark.parametrize(
    "head",
    [None, [], {}, {"kind": "conv"}, {"kind": "deep", "width": 8}, {"kind": "conv", "width": 10**12}]
    + [{"kind": "conv", "width": width} for width in (0, -1, 7, 8.0, "8", True)]
    + [{"kind": ["conv"], "width": 8}, {"kind": "conv", "width": 8, "depth": 2}],
)
def test_a_head_that_cannot_be_is_refused(dense: Path, tmp_path: Path, head: Any) -> None:
    header, tensors = stored(dense)
    path = written(tmp_path / "bad.safetensors", json.dumps(header | {"head": head}), tensors)
    with pytest.raises(DeltaFileError):
        vpt.load(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 10**6), value=VALUES)
def test_any_value_in_any_place_is_read_or_refused(good: Path, tmp_path: Path, where: int, value: Any) -> None:
    header, tensors = stored(good)
    places: list[tuple[Any, Any]] = [(header, key) for key in header]
    places += [(header[name], key) for name in ("backbone", "preset", "info") for key in header[name]]
    places += [(header["specs"][0], key) for key in header["specs"][0]]
    place, key = places[where % len(places)]
    place[key] = value
    path = written(tmp_path / "any.safetensors", json.dumps(header), tensors)
    with suppress(VPTError):
        vpt.load(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 3000), byte=st.integers(0, 255))
def test_any_byte_of_the_header_may_be_wrong(good: Path, tmp_path: Path, where: int, byte: int) -> None:
    content = bytearray(good.read_bytes())
    content[where % len(content)] = byte
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    with suppress(VPTError):
        vpt.load(path)


def test_a_header_is_read_without_its_tensors(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, _ = read_delta(good)
    monkeypatch.setattr("torch.Tensor.__new__", None)
    assert read_header(good) == header
    assert header["specs"][0] == {
        "name": "prompt",
        "num_tokens": 4,
        "deep": True,
        "dropout": 0.0,
        "dropout_mode": "sample",
        "layers": None,
        "shared": False,
        "project": None,
        "log_bias": False,
        "reference_pooling": False,
        "gate": None,
        "fourier": 0.0,
        "init": "uniform",
        "adaptive": None,
        "temperature": None,
        "mask": None,
        "koopman": None,
        "relocate": None,
    }
    assert (header["backbone_tuned"], header["dtype"]) == (False, "float32")


def test_files_of_before_say_less_and_are_read_as_the_same(good: Path, tmp_path: Path) -> None:
    header, tensors = stored(good)
    old = header | {"specs": [{"name": "prompt", "num_tokens": 4}]}
    del old["backbone_tuned"], old["dtype"]
    path = written(tmp_path / "old.safetensors", json.dumps(old), tensors)
    assert read_header(path) == read_header(good)


def test_what_is_read_is_written_again_byte_for_byte(good: Path, dense: Path, tmp_path: Path) -> None:
    for path in (good, dense):
        again = write_delta(tmp_path / "again.safetensors", *read_delta(path, (FORMAT, DENSE)))
        assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bank_takes_files_of_half_precision(good: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    half = save_delta(tmp_path / "half.safetensors", vpt.load(good).to(dtype))
    bank = vpt.PromptBank({"whole": good, "half": half})
    whole, other = bank(torch.rand(1, 3, 64, 64).expand(2, -1, -1, -1), ["whole", "half"])
    assert whole.dtype == other.dtype == torch.float32
    torch.testing.assert_close(whole, other, rtol=0.05, atol=0.05)
