"""GPS: the contrastive loss and the selection written out, and a selection that stays what it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.deltas.families import images, make, relative
from tests.deltas.test_any_backbone import on
from tests.fakes_targets import colour_table
from tests.tasks.test_losses import _Stop
from tests.tasks.test_objectives import TAGS
from tests.tasks.test_segmentation import data as masks
from tests.tasks.test_tasks import BASE, data, trainer
from vpt.backbones import create_backbone
from vpt.data import FolderDataModule
from vpt.deltas import attach
from vpt.deltas.base import TrainingImages
from vpt.deltas.gps import contrastive_loss
from vpt.errors import ConfigError, DeltaFileError, UnknownNameError, VPTError
from vpt.export import fold
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_file import start_from
from vpt.models.delta_format import read_delta, write_delta
from vpt.robustness.soups.averaging import averaged
from vpt.tasks import DeltaTuning, SegmentationTask
from vpt.tasks.callbacks import DeltaWriter

NANO = "vit_nano_patch8_64"
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def by_hand(features: Tensor, labels: Tensor) -> Tensor:
    """Equation 2 of Khosla et al., image by image."""
    z = [row / row.square().sum().sqrt() for row in features]
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        whole = torch.stack([torch.exp((z[i] * z[a]).sum() / 0.07) for a in others]).sum()
        alike = [torch.exp((z[i] * z[p]).sum() / 0.07) for p in others if labels[p] == labels[i]]
        terms.append(-torch.stack([torch.log(each / whole) for each in alike]).sum() / len(alike))
    return torch.stack(terms).mean()


def selected(backbone: Any, spec: dict[str, Any], pixels: Tensor, labels: Tensor = LABELS) -> Any:
    delta = attach(backbone, [{"name": "gps"} | spec])
    part: Any = delta.parts[0]
    delta.set_strength(0.0)
    training = TrainingImages(len(labels), lambda rows: pixels[list(rows)], labels)
    part.start_from_images(training, np.random.default_rng(0))
    delta.set_strength(1.0)
    return part


def places(part: Any) -> dict[str, Tensor]:
    return {key.removeprefix("places_"): each for key, each in part.named_buffers()}


def test_the_loss_is_that_of_the_equation() -> None:
    features = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrastive_loss(features, LABELS.repeat(2)), by_hand(features, LABELS.repeat(2)))


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("family", ["vit", "beit", "eva02-split", "post-norm", "swinv2"])
def test_of_each_neuron_those_with_the_largest_gradient_are_selected(family: str, connections: int) -> None:
    backbone, _ = make(family)
    pixels = images(family).repeat(2, 1, 1, 1) * torch.linspace(0.3, 1.0, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    part = selected(backbone, {"connections": connections}, pixels)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    other, _ = make(family)
    other.unfreeze()
    other.eval()
    loss: Any = by_hand(other(torch.cat([pixels, pixels.flip(-1)])), LABELS.repeat(2))
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in other.model.named_parameters()}
    kinds = {name: module for name, module in other.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert {f"{name}.weight".replace(".", "/") for name in kinds if "cpb_mlp" not in name} == places(part).keys()
    for key, found in places(part).items():
        gradient = gradients[key.replace("/", ".")]
        assert gradient is not None
        for row, chosen in zip(gradient.abs().flatten(1).tolist(), found.tolist(), strict=True):
            assert chosen == sorted(set(chosen))
            left = [value for place, value in enumerate(row) if place not in chosen]
            assert min(row[place] for place in chosen) >= max(left) - 1e-12 * max(row)


def test_all_images_count_and_their_order_follows_from_the_generator() -> None:
    backbone, _ = make("vit")
    pixels = torch.rand(20, *images().shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    part = selected(backbone, {}, pixels, labels := torch.arange(20) % 3)
    order = np.random.default_rng(0).permutation(20)
    other, _ = make("vit")
    other.unfreeze()
    other.eval()
    for rows in (order[:16], order[16:]):  # gradients add up
        loss: Any = by_hand(other(torch.cat([pixels[rows], pixels[rows].flip(-1)])), labels[rows].repeat(2))
        loss.backward()
    for name, layer in other.model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.grad is not None:
            largest = layer.weight.grad.abs().flatten(1).argmax(dim=1)
            assert torch.equal(places(part)[f"{name}.weight".replace(".", "/")].squeeze(1).long(), largest), name


def test_what_is_not_selected_stays_bit_for_bit_and_the_rest_is_what_is_trained() -> None:
    backbone, _ = make("vit")
    part = selected(backbone, {"connections": 2}, images().repeat(2, 1, 1, 1))
    bare = {key: parameter.clone() for key, parameter in backbone.model.named_parameters()}
    norms = [key for key in bare if "norm" in key]
    assert part.expected_parameters() == sum(parameter.numel() for parameter in part.parameters())
    modules = dict(backbone.model.named_modules())
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter))
        for strength in (1.0, 0.25):
            part.strength = strength
            for key, original in bare.items():
                path, _, last = key.rpartition(".")
                used = getattr(modules[path], last)
                expected, flat = original.clone(), key.replace(".", "/")
                if flat in places(part):
                    for row, chosen in enumerate(places(part)[flat].tolist()):
                        for value, place in zip(part.values[flat][row], chosen, strict=True):
                            start = original.flatten(1)[row, place]
                            expected.view(len(original), -1)[row, place] = start + strength * (value - start)
                elif last.endswith("bias") and key not in norms:
                    expected = original + strength * (part.values[flat] - original)
                kept = expected == original
                assert torch.equal(used[kept], original[kept]), key
                torch.testing.assert_close(used, expected, rtol=1e-12, atol=0, msg=key)


def test_numbers_of_parameters_are_those_of_the_released_code() -> None:
    backbone = create_backbone("vit_base_patch16_224", "random")
    delta = attach(backbone, ["gps"])
    assert sum(parameter.numel() for parameter in delta.parameters()) == 2 * (12 * 9 + 1) * 768 == 167_424
    # Its masks on the tasks of VTAB-1k, with the heads; the paper has 0.25 %, rounded.
    classes = [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]
    heads = [769 * each for each in classes]
    trained = [167_424 + (83_712 if each == 2 else 0) + head for each, head in zip(classes, heads, strict=True)]
    shares = [own / (85_798_656 + head) for own, head in zip(trained, heads, strict=True)]
    assert math.isclose(100 * sum(shares) / 19, 0.25, abs_tol=0.006)


def test_a_convolution_with_fewer_weights_trains_all_of_them() -> None:
    backbone, delta = on("convnext_atto", {"name": "gps", "connections": 60})
    shapes = {key: tuple(each.shape) for key, each in places(delta.parts[0]).items()}
    assert shapes["stages/0/blocks/0/conv_dw/weight"] == (40, 49)
    assert shapes["stages/0/blocks/0/mlp/fc1/weight"] == (160, 40)
    assert shapes["stages/1/blocks/0/mlp/fc1/weight"] == (320, 60)
    assert backbone.num_features == 320


@pytest.mark.parametrize("spec", [{"name": "gps"}, {"name": "spt_lora", "budget": 0.01}], ids=lambda spec: spec["name"])
def test_a_run_selects_once_and_resumes_and_another_starts_from_its_file(spec: dict[str, Any], tmp_path: Path) -> None:
    def leg(folder: Path, stop: int, checkpoint: Path | None = None, **options: Any) -> DeltaTuning:
        L.seed_everything(0, verbose=False)
        task = DeltaTuning(**BASE, deltas=[spec], **options)
        keep = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_last=True)
        run = trainer(folder, epochs=2, callbacks=[keep, _Stop(stop), DeltaWriter()])
        run.fit(task, datamodule=data(shots=2), ckpt_path=checkpoint, weights_only=True)
        return task

    whole, first = leg(tmp_path / "whole", 2), leg(tmp_path / "first", 1)
    resumed = leg(tmp_path / "resumed", 2, tmp_path / "first" / "last.ckpt")
    for key, tensor in whole.model.owned().items():
        assert torch.equal(resumed.model.owned()[key], tensor), key
    bare = TunedModel(create_backbone(NANO), 3, [spec]).parts()[0]
    for (name, found), (_, before) in zip(whole.model.parts()[0].named_buffers(), bare.named_buffers(), strict=True):
        assert not torch.equal(found, before), name
    file = tmp_path / "first" / "run" / "0" / "delta.safetensors"
    other = DeltaTuning(**BASE, deltas=[spec], init_delta=str(file))
    trainer(epochs=0).fit(other, datamodule=data(shots=2))
    loaded = load_classifier(file)
    for key, tensor in first.model.owned().items():
        assert torch.equal(loaded.owned()[key], tensor), key
        assert key.startswith("head.") or torch.equal(other.model.owned()[key], tensor), key


def test_files_of_one_selection_have_a_mean_and_others_none(tmp_path: Path) -> None:
    models = [TunedModel(create_backbone(NANO), 3, ["gps"]) for _ in range(2)]
    for index, model in enumerate(models):
        with torch.no_grad():
            for parameter in model.parts()[0].parameters():
                parameter.add_(1.0 + index)
    paths = [save_delta(tmp_path / f"{index}.safetensors", model) for index, model in enumerate(models)]
    headers, tensors = zip(*map(read_delta, paths), strict=True)
    specs, mean = averaged(headers[0]["specs"], tensors)
    key = "delta.parts.0.values.blocks/0/mlp/fc1/weight"
    torch.testing.assert_close(mean[key], (tensors[0][key] + tensors[1][key]) / 2)
    assert load_classifier(write_delta(tmp_path / "mean.safetensors", headers[0] | {"specs": specs}, mean))
    tensors[1]["delta.parts.0.places_blocks/0/mlp/fc1/weight"][3] = 7
    with pytest.raises(ConfigError, match="have selected other weights to train"):
        averaged(headers[0]["specs"], tensors)


@pytest.mark.parametrize("places", [[-1, 2], [3, 192], [4, 4], [5, 2]])
def test_a_file_of_places_that_are_none_is_damaged(places: list[int], tmp_path: Path) -> None:
    model = TunedModel(create_backbone(NANO), 3, [{"name": "gps", "connections": 2}])
    path = save_delta(tmp_path / "delta.safetensors", model)
    header, tensors = read_delta(path)
    tensors["delta.parts.0.places_blocks/0/mlp/fc1/weight"][9] = torch.tensor(places, dtype=torch.int32)
    write_delta(path, header, tensors)
    with pytest.raises(DeltaFileError, match=r"is damaged: it trains weights of blocks\.0\.mlp\.fc1\.weight that are"):
        load_classifier(path)
    with pytest.raises(DeltaFileError, match="is damaged"):
        start_from(path, model)


def test_what_is_folded_is_the_same_function_without_a_delta() -> None:
    model = TunedModel(create_backbone(NANO).double(), 3, ["gps", {"name": "lora", "rank": 2}]).eval()
    with torch.no_grad():
        for part in model.parts():
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        folded = fold(model)
        assert folded.delta is None
        assert relative(folded(pixels), model(pixels)) <= 1e-12


def test_where_it_cannot_be_it_is_refused(tmp_path: Path) -> None:
    backbone, _ = make("vit")
    for spec, error, message in (
        ([{"name": "gps", "connections": 0}], ConfigError, "at least 1 of the connections of each neuron, got 0"),
        ([{"name": "gps", "conections": 2}], UnknownNameError, "did you mean 'connections'"),
        (["gps", "bias"], ConfigError, r"Two deltas train .*bias: keep one of them"),
        (["gps", "full"], ConfigError, "Two deltas train .*: keep one of them"),
    ):
        with pytest.raises(error, match=message):
            attach(backbone, spec)
    attach(backbone, [{"name": "gps", "bias": False}, "bias"]).detach()
    with pytest.raises(ConfigError, match=r"frozen_dtype is of what stays frozen, and .*weight is to be trained"):
        TunedModel(create_backbone(NANO, frozen_dtype="bfloat16"), 3, ["gps"])
    table = FolderDataModule(colour_table(tmp_path), image_size=64, batch_size=8, **TAGS)
    options: dict[str, Any] = {"backbone": NANO, "base_lr": 0.01, "deltas": [{"name": "gps"}]}
    task = DeltaTuning(**options, num_classes=table.num_classes, targets=table.targets)
    none: list[tuple[Any, Any]] = [(task, table), (SegmentationTask(**options, num_classes=5), masks())]
    for each, module in none:
        with pytest.raises(VPTError, match="Gps starts from training images with one class each, which these data"):
            trainer().fit(each, datamodule=module)
    with pytest.raises(ConfigError, match="needs a data module that has them"):
        trainer().fit(DeltaTuning(**options, num_classes=10), data().train_dataloader())


def test_a_file_has_nothing_but_what_is_trained_and_where(tmp_path: Path) -> None:
    path = save_delta(tmp_path / "delta.safetensors", TunedModel(create_backbone(NANO), 3, ["gps"]))
    tensors = load_file(path)
    rooms = {key.removeprefix("delta.parts.0.").partition("/")[0] for key in tensors if key.startswith("delta.")}
    assert rooms == {"values.patch_embed", "values.blocks", "places_patch_embed", "places_blocks"}
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
