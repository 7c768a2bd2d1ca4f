"""What makes a backbone's function is in its fingerprint: weights, architecture, statistics of the name, pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from tests.deltas.families import TINY
from vpt.backbones import Backbone, create_backbone
from vpt.errors import (
    ConfigError,
    DeltaFileError,
    UnknownNameError,
    UnsupportedBackboneError,
    VPTWarning,
    WeightsError,
)
from vpt.models import load_classifier, save_delta
from vpt.models.classifier import TunedModel
from vpt.models.delta_format import about, identity
from vpt.models.segmenter import DenseModel

NANO, DINO = "vit_nano_patch8_64", "vit_small_patch16_dinov3"
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny(name: str) -> Backbone:
    torch.manual_seed(0)
    return Backbone(timm.create_model(name, num_classes=0, **TINY), name, "w", "w", 32, "weights")


def test_equal_weights_of_another_function_are_another_backbone() -> None:
    gelu, quick = (tiny(f"vit_base_patch32_clip_{kind}224") for kind in ("", "quickgelu_"))
    assert gelu.weights_fingerprint == quick.weights_fingerprint
    assert not torch.allclose(gelu(IMAGES), quick(IMAGES))
    assert gelu.fingerprint != quick.fingerprint
    assert not quick.is_recorded_as({"name": gelu.name, "fingerprint": gelu.fingerprint})


def test_names_that_normalise_equal_weights_differently_are_other_backbones() -> None:
    augreg, mae = (tiny(f"vit_base_patch16_224.{tag}") for tag in ("augreg_in1k", "mae"))
    assert augreg.weights_fingerprint == mae.weights_fingerprint
    assert not torch.allclose(augreg(IMAGES), mae(IMAGES))
    assert augreg.fingerprint != mae.fingerprint


def test_an_old_name_and_todays_are_one_backbone() -> None:
    old, today = tiny("vit_tiny_patch16_224_in21k"), tiny("vit_tiny_patch16_224.augreg_in21k")
    assert old.fingerprint == today.fingerprint


def test_what_version_010_recorded_is_recognised_on_the_same_architecture_alone() -> None:
    gelu, quick = (tiny(f"vit_base_patch32_clip_{kind}224") for kind in ("", "quickgelu_"))
    recorded = {"name": "vit_base_patch32_clip_224", "fingerprint": gelu.weights_fingerprint}
    assert gelu.is_recorded_as(recorded)
    assert gelu.is_recorded_as(recorded | {"name": "vit_base_patch32_clip_224.openai"})
    assert not quick.is_recorded_as(recorded)
    assert not gelu.is_recorded_as(recorded | {"pool": "avg"})
    assert not gelu.is_recorded_as(recorded | {"fingerprint": "0" * 64})


def test_dinov3_reads_the_class_token_when_asked() -> None:
    backbone, own = (create_backbone(DINO, "random", 32, pool=pool) for pool in ("token", None))
    twin: Any = timm.create_model(DINO, img_size=32, num_classes=0).eval()
    twin.load_state_dict(own.model.state_dict())
    with torch.no_grad():
        tokens = twin.forward_features(own.normalize(IMAGES))
    torch.testing.assert_close(backbone(IMAGES), tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own(IMAGES), tokens[:, 5:].mean(1), rtol=1e-4, atol=1e-4)
    assert (backbone.pool, backbone.layout.pooled, own.pool, own.layout.pooled) == ("token", 1, None, None)
    assert backbone.weights_fingerprint == own.weights_fingerprint
    assert backbone.fingerprint != own.fingerprint


def test_a_pool_travels_with_the_delta_file(tmp_path: Path) -> None:
    model = TunedModel(
        create_backbone(NANO, image_size=32, pool="avg"), 3, [{"name": "prompt", "num_tokens": 2}]
    ).eval()
    assert identity(model)["pool"] == about(model)["backbone"]["pool"] == "avg"
    loaded = load_classifier(save_delta(tmp_path / "delta.safetensors", model))
    assert loaded.backbone.pool == "avg"
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_the_weights_own_pool_is_not_another() -> None:
    named, own = create_backbone(NANO, pool="token"), create_backbone(NANO)
    assert named.pool is None
    assert named.fingerprint == own.fingerprint
    assert "pool" not in identity(TunedModel(own, 3))
    assert create_backbone("resnet18", "random", pool="avg").pool is None


def test_a_checkpoint_of_another_pool_is_refused() -> None:
    from vpt.models.delta_file import check_fingerprint

    own, mean = (TunedModel(create_backbone(NANO, pool=pool), 3) for pool in (None, "avg"))
    check_fingerprint("It", identity(own), own.backbone)
    with pytest.raises(DeltaFileError, match="It was trained on"):
        check_fingerprint("It", identity(mean), own.backbone)


@pytest.mark.parametrize(
    ("name", "pool"),
    [(NANO, "map"), (NANO, "nope"), ("resnet18", "token"), ("deit_tiny_distilled_patch16_224", "avg")],
)
def test_a_pool_that_a_model_has_not_is_refused(name: str, pool: str) -> None:
    with pytest.raises(UnsupportedBackboneError, match=rf"{name} cannot pool by '{pool}' \(.+\): leave pool out"):
        create_backbone(name, "random", pool=pool)


@pytest.mark.parametrize("pool", ["", 3, ["avg"]])
def test_a_pool_is_a_name(pool: Any) -> None:
    with pytest.raises(ConfigError, match=r"pool (of create_backbone must be text or None|is timm's name of a pool)"):
        create_backbone(NANO, pool=pool)


def test_the_width_is_that_of_the_pooled_features() -> None:
    backbone = create_backbone("mobilenetv3_small_050", "random")
    images = torch.zeros(2, *backbone.input_shape, dtype=torch.uint8)
    assert backbone(images).shape == (2, backbone.num_features) == (2, 1024)
    assert DenseModel(create_backbone(NANO), 3).encode(torch.zeros(1, 3, 64, 64)).shape == (1, 192, 8, 8)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "backbone").glob("*.yaml")), ids=str)
def test_shipped_configs_take_the_function_that_their_weights_were_trained_with(path: Path) -> None:
    name = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["backbone"]
    notes = [note for note in timm.get_pretrained_cfg(name).notes or () if "natively QuickGELU" in note]
    assert bool(notes) == ("quickgelu" in name)


def test_weights_of_another_activation_are_told(tmp_path: Path) -> None:
    name = "vit_base_patch32_clip_224"
    state = create_backbone(name, "random", 32).model.state_dict()
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.warns(VPTWarning, match=r"take vit_base_patch32_clip_quickgelu_224\.openai"):
        create_backbone(f"{name}.openai", str(tmp_path / "clip.safetensors"), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"norm.weight": torch.ones(192, dtype=torch.int8)}, "norm.weight as torch.int8"),
        (lambda state: state | {"norm.bias": torch.ones(192, dtype=torch.complex64)}, "norm.bias as torch.complex64"),
        (lambda state: state | {"patch_embed.proj.weight": torch.ones(192, 3, 16, 16)}, "patches of 16 × 16 pixels"),
        (lambda state: state | {"head.weight": torch.tensor(1.0)}, "do not fit"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    save_file(change(create_backbone(NANO).model.state_dict()), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=message):
        create_backbone(NANO, str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(("name", "error"), [(3, ConfigError), (None, ConfigError), (f"{NANO}.", UnknownNameError)])
def test_names_that_are_none_are_refused(name: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        create_backbone(name)
