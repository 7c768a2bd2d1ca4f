"""A bank answers for each image as the model of its task alone would."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import vpt
from vpt.backbones import class_attention, create_backbone
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError
from vpt.models import TunedModel, save_delta
from vpt.models.delta_format import read_delta, write_delta

NANO, SWIN = "vit_nano_patch8_64", "swin_nano_patch4_window8_64"
TASKS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "digits": (10, [{"name": "prompt", "num_tokens": 4}]),
    "pets": (3, [{"name": "prompt", "num_tokens": 7, "log_bias": True}]),
    "late": (5, [{"name": "prefix", "num_tokens": 2, "layers": [3, 6]}]),
    "gated": (4, [{"name": "prompt", "num_tokens": 3, "gate": {"init": -1.0}}, {"name": "prefix", "num_tokens": 2}]),
    "both": (2, [{"name": "prompt", "num_tokens": 1}, {"name": "prefix", "num_tokens": 3, "hidden": 4}]),
}


def save(folder: Path, name: str, classes: int, specs: list[dict[str, Any]], backbone: str = NANO) -> Path:
    model = TunedModel(create_backbone(backbone), classes, specs)
    with torch.no_grad():
        for tensor in model.owned().values():
            tensor.normal_(std=0.5)
    return save_delta(folder / f"{name}.safetensors", model)


@pytest.mark.parametrize("backbone", [NANO, SWIN])
def test_a_mixed_batch_equals_the_models_one_by_one(tmp_path: Path, backbone: str) -> None:
    files = {name: save(tmp_path, name, *task, backbone) for name, task in TASKS.items()}
    bank = vpt.PromptBank(files)
    images = torch.rand(6, *bank.backbone.input_shape)
    tasks = ["digits", "both", "pets", "gated", "late", "both"]
    mixed = bank(images, tasks)
    alone = {name: vpt.load(file) for name, file in files.items()}
    for image, task, logits in zip(images, tasks, mixed, strict=True):
        assert logits.shape == (TASKS[task][0],)
        with torch.no_grad():
            torch.testing.assert_close(logits, alone[task](image[None])[0], rtol=1e-4, atol=1e-4)


def test_bad_banks_are_refused(tmp_path: Path) -> None:
    digits = save(tmp_path, "digits", *TASKS["digits"])
    with pytest.raises(ConfigError, match="at least one delta file"):
        vpt.PromptBank({})
    with pytest.raises(DeltaFileError, match="No delta file"):
        vpt.PromptBank({"a": tmp_path / "nothing.safetensors"})
    lora = save(tmp_path, "lora", 3, [{"name": "lora"}])
    with pytest.raises(ConfigError, match="mixes deep prompts and prefixes; b has a lora"):
        vpt.PromptBank({"a": digits, "b": lora})
    full = tmp_path / "full.safetensors"
    tuned = TunedModel(create_backbone(NANO, "pretrained"), 3)
    tuned.backbone.unfreeze()
    with pytest.raises(ConfigError, match="b trained more: backbone"):
        vpt.PromptBank({"a": digits, "b": save_delta(full, tuned)})
    other = save(tmp_path, "other", *TASKS["digits"], SWIN)
    with pytest.raises(ConfigError, match="one backbone: a was trained with name vit_nano"):
        vpt.PromptBank({"a": digits, "b": other})
    bank = vpt.PromptBank({"digits": digits})
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        bank(torch.rand(1, 3, 64, 64), ["digit"])
    for tasks in ("digits", [0], None, [None]):
        with pytest.raises(ConfigError, match="tasks is a list with the name"):
            bank(torch.rand(1, 3, 64, 64), tasks)
    with pytest.raises(ConfigError, match="files of PromptBank must be a mapping from text to text or a path"):
        vpt.PromptBank([digits])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 images were given with 1 tasks"):
        bank(torch.rand(2, 3, 64, 64), ["digits"])


def test_threads_get_the_answers_of_their_own_tasks_and_the_backbone_alone_is_bare(tmp_path: Path) -> None:
    bank = vpt.PromptBank({name: save(tmp_path, name, *TASKS[name]) for name in ("digits", "pets")})
    batches = [(torch.rand(2, 3, 64, 64), [first, second]) for first in bank.tasks for second in bank.tasks] * 6
    expected = [bank(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: bank(*batch), batches))
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with torch.no_grad():
        assert torch.equal(bank.backbone(batches[0][0]), create_backbone(NANO)(batches[0][0]))


def test_figures_are_of_the_tasks_that_are_assigned(tmp_path: Path) -> None:
    bank = vpt.PromptBank({name: save(tmp_path, name, *TASKS[name]) for name in ("digits", "pets")})
    images = torch.rand(2, 3, 64, 64)
    alone = {task: class_attention(vpt.load(tmp_path / f"{task}.safetensors").backbone, images) for task in bank.tasks}
    for task, layers in alone.items():
        with bank.assigned([task] * 2):
            found = class_attention(bank.backbone, images)
        bank(images, ["digits", "pets"])
        for ours, theirs in zip(found, layers, strict=True):
            torch.testing.assert_close(ours.patches, theirs.patches)
    assert class_attention(bank.backbone, images)[0].prompts.shape[-1] == 0


def test_another_number_of_images_than_tasks_is_told(tmp_path: Path) -> None:
    bank = vpt.PromptBank({"digits": save(tmp_path, "digits", *TASKS["digits"])})
    with bank.assigned(["digits"] * 3), pytest.raises(ConfigError, match="2 images were given with 3 tasks"):
        bank.backbone(torch.rand(2, 3, 64, 64))


def test_two_banks_do_not_meet_and_checkpointing_finds_the_tasks_again(tmp_path: Path) -> None:
    one, other = (vpt.PromptBank({name: save(tmp_path, name, *TASKS[name])}) for name in ("digits", "pets"))
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    bare = other.backbone(images)
    with one.assigned(["digits"] * 2):
        assert torch.equal(other.backbone(images), bare)
        expected = torch.autograd.grad(one.backbone(images).square().sum(), images)[0]
    cast("Any", one.backbone.model).set_grad_checkpointing(True)
    with one.assigned(["digits"] * 2):
        features = one.backbone(images)
    assert torch.equal(torch.autograd.grad(features.square().sum(), images)[0], expected)


def test_files_that_record_the_weights_alone_and_those_that_record_the_function_mix(tmp_path: Path) -> None:
    new = save(tmp_path, "digits", *TASKS["digits"])
    header, tensors = read_delta(new)
    header["backbone"]["fingerprint"] = create_backbone(NANO).weights_fingerprint  # as version 0.1.0 wrote it
    old = write_delta(tmp_path / "old.safetensors", header, tensors)
    bank = vpt.PromptBank({"new": new, "old": old})
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(bank(images, ["new"])[0], bank(images, ["old"])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bank_answers_in_the_precision_of_its_files(tmp_path: Path, dtype: torch.dtype) -> None:
    model = TunedModel(create_backbone(NANO), 3, TASKS["pets"][1]).to(dtype)
    path = save_delta(tmp_path / "pets.safetensors", model)
    images = torch.rand(2, 3, 64, 64)
    (logits, _) = vpt.PromptBank({"pets": path})(images, ["pets"] * 2)
    assert logits.dtype == dtype
    with torch.no_grad():
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-10
        torch.testing.assert_close(logits, vpt.load(path)(images)[0], rtol=tolerance, atol=tolerance)
