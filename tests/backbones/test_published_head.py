from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from vpt.backbones import create_backbone, pretrained_head
from vpt.errors import UnknownNameError, WeightsError

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=7).eval()
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path, model


def test_backbone_and_head_give_what_timm_gives(weights: tuple[Path, torch.nn.Module]) -> None:
    path, model = weights
    images = torch.rand(2, 3, 224, 224)
    head = pretrained_head(NAME, str(path))
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with torch.inference_mode():
        answer = head(create_backbone(NAME, str(path))(images))
        torch.testing.assert_close(answer, model((images - 0.5) / 0.5), atol=1e-4, rtol=1e-4)


def test_weights_without_a_classifier_are_refused(tmp_path: Path, weights: tuple[Path, torch.nn.Module]) -> None:
    state = {key: tensor for key, tensor in weights[1].state_dict().items() if not key.startswith("head.")}
    save_file(state, tmp_path / "bare.safetensors")
    for name, given in ((NAME, str(tmp_path / "bare.safetensors")), ("vit_nano_patch8_64", "pretrained")):
        with pytest.raises(WeightsError, match="have no linear classifier 'head'"):
            pretrained_head(name, given)


def test_other_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("weights")
    for given, message in (
        ("random", "Random weights have no pretrained classifier"),
        ("nowhere.safetensors", r"No weights file nowhere\.safetensors"),
        (str(tmp_path / "text.safetensors"), "is not a readable weights file"),
    ):
        with pytest.raises(WeightsError, match=message):
            pretrained_head(NAME, given)
    with pytest.raises(UnknownNameError, match="Unknown backbone"):
        pretrained_head("vit_tinny", "pretrained")


def test_an_answer_of_two_classifiers_is_not_one_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "deit_tiny_distilled_patch16_224"
    save_file(timm.create_model(name, num_classes=7).state_dict(), tmp_path / "deit.safetensors")
    monkeypatch.setattr("vpt.backbones.checkpoints._from_timm", None)  # nothing is fetched for it
    for given in (str(tmp_path / "deit.safetensors"), "pretrained"):
        with pytest.raises(WeightsError, match=rf"The answer of {name} is not that of one linear layer"):
            pretrained_head(name, given)


def test_a_head_that_is_not_the_whole_answer_is_refused(tmp_path: Path) -> None:
    """A VOLO gives out one classifier and adds another's answer."""
    model = timm.create_model("volo_d1_224", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "volo.pth")
    with pytest.raises(WeightsError, match="The answer of volo_d1_224 is not that of one linear layer"):
        pretrained_head("volo_d1_224", str(tmp_path / "volo.pth"))


def test_a_head_behind_a_hidden_layer_answers_as_timms_model(tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    torch.nn.init.normal_(model.classifier.weight)
    torch.save(model.state_dict(), tmp_path / "mobile.pth")
    backbone = create_backbone("mobilenetv3_small_050", str(tmp_path / "mobile.pth"))
    images = torch.rand(2, *backbone.input_shape)
    with torch.inference_mode():
        answer = pretrained_head(backbone.name, backbone.weights)(backbone(images))
        torch.testing.assert_close(answer, model(backbone.normalize(images)), atol=1e-4, rtol=1e-4)
