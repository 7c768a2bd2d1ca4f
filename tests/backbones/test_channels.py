"""Images of any number of channels, in their own unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpt.backbones import Backbone, create_backbone
from vpt.backbones.bundled import weights_file
from vpt.errors import ConfigError, UnknownNameError, WeightsError

NANO = "vit_nano_patch8_64"


def statistics(channels: int) -> dict[str, list[float]]:
    return {
        "mean": [1000.0 + 7 * channel for channel in range(channels)],
        "std": [50.0 + channel for channel in range(channels)],
    }


def first_layer(backbone: Backbone) -> Tensor:
    return backbone.model.get_parameter("patch_embed.proj.weight")


@pytest.mark.parametrize(
    "name", [NANO, "swin_nano_patch4_window8_64", "resnet18", "convnext_atto", "hiera_tiny_224", "coatnet_nano_rw_224"]
)
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_a_model_of_channels_is_timms(name: str, channels: int) -> None:
    weights = "pretrained" if name in (NANO, "swin_nano_patch4_window8_64") else "random"
    given = statistics(channels)
    backbone = create_backbone(name, weights, normalization=given).double()
    own = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0, in_chans=channels).double().eval()
    own.load_state_dict(backbone.model.state_dict())
    assert backbone.input_shape == (channels, *own.pretrained_cfg["input_size"][1:])
    images = backbone.random_images(2).double()
    mean, std = (torch.tensor(given[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), own((images - mean) / std), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_the_first_layer_is_converted_by_timms_rule(channels: int) -> None:
    """One channel: the sum over RGB; more: RGB repeated and scaled, so that equal ones give what a grey image gives."""
    plain = first_layer(create_backbone(NANO))
    found = first_layer(create_backbone(NANO, normalization=statistics(channels)))
    repeated = plain.repeat(1, 4, 1, 1)[:, :channels] * 3 / channels
    expected = plain.sum(dim=1, keepdim=True) if channels == 1 else repeated
    torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-6)  # timm keeps the fp16 of the file that ships


def test_a_file_of_as_many_channels_is_taken_as_it_is(tmp_path: Path) -> None:
    state = load_file(weights_file(NANO))
    key = "patch_embed.proj.weight"
    state[key] = torch.randn(state[key].shape[0], 12, *state[key].shape[2:])
    save_file(state, tmp_path / "twelve.safetensors")
    file = str(tmp_path / "twelve.safetensors")
    found = first_layer(create_backbone(NANO, file, normalization=statistics(12)))
    torch.testing.assert_close(found, state[key], rtol=0, atol=0)
    with pytest.raises(
        WeightsError,
        match=r"twelve\.safetensors do not fit vit_nano_patch8_64: .*before adapting to 5",
    ):
        create_backbone(NANO, file, normalization=statistics(5))
    with pytest.raises(WeightsError, match=r"is inconsistent with input_size"):
        create_backbone(NANO, file)
    three = create_backbone(NANO, str(weights_file(NANO)), normalization=statistics(12))
    assert three.fingerprint == create_backbone(NANO, normalization=statistics(12)).fingerprint


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float32])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_the_unit(dtype: torch.dtype, precision: torch.dtype) -> None:
    given = {"mean": [201.3] * 4, "std": [0.7] * 4}
    images = torch.arange(190, 214).repeat(4 * 64 * 64)[: 2 * 4 * 64 * 64].view(2, 4, 64, 64).to(dtype)
    whole = create_backbone(NANO, normalization=given)
    expected = (images.double() - 201.3) / 0.7
    torch.testing.assert_close(whole.double().normalize(images), expected, rtol=1e-6, atol=1e-6)
    half = create_backbone(NANO, normalization=given).to(precision)
    torch.testing.assert_close(half.normalize(images), expected.to(precision), rtol=1e-2, atol=1e-3)


def test_numbers_are_taken_as_they_are_if_finite() -> None:
    backbone = create_backbone(NANO, normalization=statistics(4))
    images = backbone.random_images(1)
    with torch.no_grad():
        assert backbone(1e6 * images).isfinite().all()
    images[0, 2, 3, 4] = float("nan")
    with pytest.raises(ConfigError, match="hold NaN or infinity"):
        backbone(images)
    with pytest.raises(ConfigError, match=r"takes images of shape \(B, 4, 64, 64\)"):
        backbone(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match=r"got torch\.bool"):
        backbone(torch.zeros(1, 4, 64, 64, dtype=torch.bool))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mean": [0.0]},
        {"mean": [0.0], "std": [1.0, 1.0]},
        {"mean": [0.0], "std": [0.0]},
        {"mean": [], "std": []},
        {"mean": [0.0], "std": [1.0], "other": [1.0]},
    ],
)
def test_statistics_are_numbers_of_each_channel(given: Any) -> None:
    with pytest.raises(ConfigError, match="normalization is a name, or"):
        create_backbone(NANO, normalization=given)
    with pytest.raises(UnknownNameError, match="normalization"):
        create_backbone(NANO, normalization="imagenets")
