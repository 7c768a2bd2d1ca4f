"""A backbone gives the features of timm's own model, normalised inside, and never moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from vpt.backbones import create_backbone, input_size
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError, VPTWarning, WeightsError

NANO = "vit_nano_patch8_64"


def images(size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    """A whole checkpoint of a ViT-Ti with a head of five classes, as timm would write it."""
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), path)
    return path


def test_features_equal_timms_on_normalised_images(weights_file: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", str(weights_file))
    overlay = {"file": str(weights_file), "num_classes": 5}
    model: Any = timm.create_model("vit_tiny_patch16_224", True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    normalised = (images(224).float() / 255 - 0.5) / 0.5  # the statistics of timm's AugReg weights
    expected = model.forward_head(model.forward_features(normalised), pre_logits=True)
    torch.testing.assert_close(backbone(images(224)), expected, rtol=1e-5, atol=1e-5)
    assert backbone.weights_id == "file:tiny.safetensors"


def test_the_shipped_weights_load_and_are_frozen_in_eval_mode() -> None:
    backbone = create_backbone(NANO)
    assert backbone.weights_id == "vpt/vit_nano_patch8_64"
    assert backbone(images()).shape == (2, 192)
    backbone.train()
    assert not any(module.training for module in backbone.model.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_uint8_and_unit_floats_give_the_same_features() -> None:
    backbone = create_backbone(NANO, "random")
    assert torch.equal(backbone(images()), backbone(images().float() / 255))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_of_every_width_are_bytes(dtype: torch.dtype) -> None:
    backbone = create_backbone(NANO)
    small = images() // 2  # what int8 holds
    assert torch.equal(backbone(small.to(dtype)), backbone(small))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (images().float(), r"floats lie in \[0, 1\], got torch.float32 from 0 to 255: divide them by 255"),
        (images().half() / 255 - 0.5, r"floats lie in \[0, 1\], got torch.float16 from -0.5 to 0.5.*clamp"),
        (images().double() / 255 * torch.nan, "Images hold NaN"),
        (images().long() + 1, r"integers lie in \[0, 255\], got torch.int64 from 1 to 256: clamp"),
        (images().int() - 1, r"integers lie in \[0, 255\], got torch.int32 from -1 to 254: clamp"),
        (images() > 9, r"integers in \[0, 255\] or floats in \[0, 1\], got torch.bool: convert"),
    ],
)
def test_values_that_are_no_images_are_refused(given: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        create_backbone(NANO)(given)


class Normalize(torch.nn.Module):
    """The part of a backbone that looks at values, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone(NANO)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone.normalize(images)


def test_looking_at_values_stands_in_the_way_of_no_graph_and_no_transform() -> None:
    module, floats = Normalize(), images().float() / 255
    expected = module(floats)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(floats), expected)
    assert torch.equal(torch.export.export(module, (floats,)).module()(floats), expected)
    assert torch.equal(torch.jit.trace(module, (floats,))(floats), expected)  # type: ignore[no-untyped-call]
    one_by_one = torch.func.vmap(lambda image: module(image[None])[0])
    assert torch.equal(one_by_one(floats), expected)
    slope = torch.func.grad(lambda x: module(x).sum())(floats)
    torch.testing.assert_close(slope, torch.full_like(floats, 2.0))
    assert module(floats[:0]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(("normalization", "mean"), [("weights", 0.5), ("imagenet", 0.485), ("none", 0.0)])
def test_normalisation_follows_the_weights_or_the_preset(normalization: str, mean: float) -> None:
    backbone = create_backbone(NANO, "random", normalization=normalization)
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert float(backbone.normalize(white)[0, 0, 0, 0]) == pytest.approx((1 - mean) / float(backbone.std[0, 0, 0]))


def test_another_image_size_resamples_position_embeddings() -> None:
    assert input_size(NANO) == 64
    backbone = create_backbone(NANO, image_size=96)
    assert backbone(images(96)).shape == (2, 192)
    assert backbone.tokens(images(96)).shape == (2, 1 + 12 * 12, 192)


def test_fingerprint_tells_weights_apart_and_is_stable() -> None:
    shipped = create_backbone(NANO).fingerprint
    assert shipped == create_backbone(NANO).fingerprint
    assert shipped != create_backbone(NANO, "random").fingerprint


def test_activation_checkpointing_gives_the_same_features() -> None:
    backbone = create_backbone(NANO)
    expected = backbone(images())
    model: Any = backbone.model
    model.set_grad_checkpointing(True)
    assert torch.equal(backbone(images()), expected)


def test_the_trimmed_last_block_leaves_pooled_features_as_they_were() -> None:
    backbone = create_backbone(NANO)
    trimmed = backbone(images())
    backbone.trim = False
    torch.testing.assert_close(trimmed, backbone(images()), rtol=1e-5, atol=1e-5)


def test_any_other_timm_model_is_a_backbone_without_prompts() -> None:
    backbone = create_backbone("resnet18", "random")
    assert backbone(images(224)).shape == (2, 512)


@pytest.mark.parametrize("name", ["mobilenetv5_300m_enc", "qwen3_vit_88m_enc"])
def test_an_encoder_that_gives_no_vector_for_an_image_is_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedBackboneError, match=rf"{name} does not encode an image to one vector \(.+\): choose"
    ):
        create_backbone(name)


def test_a_wrong_image_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes images of shape \(B, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        create_backbone(NANO, "random")(images(32))


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'vit_nano_patch8_64'"):
        create_backbone("vit_nano_patch8_46")
    with pytest.raises(UnknownNameError, match="augreg_in21k"):
        create_backbone("vit_base_patch16_224.augreg_in21")


def test_an_unreachable_hub_names_both_ways_out() -> None:
    with pytest.raises(WeightsError, match=r"local file.*vit_nano_patch8_64"):
        create_backbone("vit_base_patch16_224")


def test_a_missing_broken_or_foreign_weights_file_is_refused(tmp_path: Path, weights_file: Path) -> None:
    with pytest.raises(WeightsError, match="No weights file"):
        create_backbone("vit_tiny_patch16_224", str(tmp_path / "none.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="not a readable weights file"):
        create_backbone("vit_tiny_patch16_224", str(broken))
    with pytest.raises(
        WeightsError, match=r"vit_small.*: cls_token has shape \(1, 1, 192\) in the file and \(1, 1, 384\) .*"
    ):
        create_backbone("vit_small_patch16_224", str(weights_file))


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    del state["blocks.3.attn.qkv.weight"]
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(WeightsError, match=r"the file lacks blocks\.3\.attn\.qkv\.weight and perhaps others\.$"):
        create_backbone("vit_tiny_patch16_224", str(tmp_path / "hole.safetensors"))


def test_a_file_with_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    state["blocks.12.attn.qkv.weight"] = state["blocks.3.attn.qkv.weight"].clone()
    save_file(state, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"the model has no blocks\.12\.attn\.qkv\.weight, which is in the file\.$"):
        create_backbone("vit_tiny_patch16_224", str(tmp_path / "more.safetensors"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "vit_base_patch16_224_in21k",
            r"gives vit_base_patch16_224\.augreg_in21k today: the papers .* used .*\.orig_in21k",
        ),
        ("swin_base_patch4_window7_224_in22k", r"gives swin_base_patch4_window7_224\.ms_in22k today: write that name"),
    ],
)
def test_an_old_name_says_which_weights_it_stands_for(name: str, sentence: str) -> None:
    with pytest.warns(VPTWarning, match=sentence), pytest.raises(WeightsError, match="could not be reached"):
        create_backbone(name)


def test_an_old_name_without_pretrained_weights_is_todays_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    backbone = create_backbone("vit_tiny_patch16_224_in21k", "random")
    assert backbone.name == "vit_tiny_patch16_224.augreg_in21k"
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
