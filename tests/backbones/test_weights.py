"""Weights are the same each time, come out of what a training wrapped them in, and are refused by their true fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from vpt.backbones import create_backbone, pretrained_head
from vpt.errors import ConfigError, UnsupportedBackboneError, WeightsError

NANO, TINY, SWIN = "vit_nano_patch8_64", "vit_tiny_patch16_224", "swin_nano_patch4_window8_64"


def state(name: str = NANO, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return dict(timm.create_model(name, **options).state_dict())


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def test_random_weights_are_those_of_their_seed() -> None:
    first, again, zero, one = (create_backbone(NANO, w) for w in ("random", "random", "random:0", "random:1"))
    assert first.fingerprint == again.fingerprint == zero.fingerprint != one.fingerprint
    assert (first.weights_id, one.weights_id) == ("random", "random:1")


@pytest.mark.parametrize("weights", ["random", "random:7", "pretrained", "file"])
def test_building_a_backbone_does_not_move_the_random_numbers(weights: str, tmp_path: Path) -> None:
    if weights == "file":
        weights = str(tmp_path / "nano.safetensors")
        save_file(state(), weights)
    before = torch.get_rng_state()
    create_backbone(NANO, weights)
    create_backbone(NANO, weights, image_size=96)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:1.5", f"random:{2**63}"])
def test_a_seed_is_a_whole_number(weights: str) -> None:
    with pytest.raises(WeightsError, match=r"'random:N' with a whole number N as seed, got 'random:"):
        create_backbone(NANO, weights)


@pytest.mark.parametrize("size", [0, -64, "64", True, 64.0, 10**7, [64], [64, 0], [64, 64, 64], [64, "64"]])
def test_an_image_size_is_a_whole_number_of_pixels(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"image_size (of create_backbone )?must be a whole number .*, got "):
        create_backbone(NANO, image_size=size)


@pytest.mark.parametrize(
    ("name", "size", "weights"),
    [(NANO, 4, "pretrained"), (TINY, 8, "random"), ("xcit_nano_12_p16_224", 10, "random")],
)
def test_an_impossible_image_size_is_told_as_such(name: str, size: int, weights: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} cannot take images of {size} pixels \(.+\): leave image_size out"):
        create_backbone(name, weights, image_size=size)


def test_an_impossible_image_size_is_not_blamed_on_the_pool() -> None:
    with pytest.raises(ConfigError, match=rf"{TINY} cannot take images of 8 pixels"):
        create_backbone(TINY, "random", image_size=8, pool="avg")


@pytest.mark.parametrize(
    ("name", "size", "patch", "nearest"),
    [(TINY, 100, 16, "96 or 112"), (NANO, 12, 8, "8 or 16"), (SWIN, 62, 4, "60 or 64")],
)
def test_a_size_whose_edge_no_patch_would_hold_is_refused(name: str, size: int, patch: int, nearest: str) -> None:
    unseen = rf"patches of {patch} pixels: it would not see the last {size % patch} of .* Take {nearest}\."
    with pytest.raises(ConfigError, match=unseen):
        create_backbone(name, "random", image_size=size)


def test_a_network_of_any_size_takes_no_image_size() -> None:
    with pytest.raises(UnsupportedBackboneError, match="resnet18 has no fixed image size to set"):
        create_backbone("resnet18", "random", image_size=64)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionError("refused"), r"^The hub could not be reached for the weights of vit_tiny.*\(ConnectionError\)"),
        (PermissionError("cache is read-only"), r"cannot be loaded \(PermissionError: cache is read-only\)"),
        (AssertionError("bad head"), r"cannot be loaded \(AssertionError: bad head\)"),
    ],
)
def test_only_the_network_is_blamed_on_the_network(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = timm.create_model

    def fail(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise error
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(WeightsError, match=sentence):
        create_backbone(TINY)


def test_a_hub_that_is_not_there_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(WeightsError, match=r"The hub could not be reached for the weights .*--model\.weights"):
        create_backbone(TINY)
    assert capfd.readouterr() == ("", "")
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "wrapped",
    [
        pytest.param(lambda s: prefixed("backbone.", s), id="prefix"),
        pytest.param(lambda s: {"state_dict": prefixed("model.", s)}, id="lightning"),
        pytest.param(lambda s: {"state_dict": prefixed("module._orig_mod.model.", s)}, id="compiled"),
        pytest.param(
            lambda s: {"state_dict": prefixed("backbone.model.", s) | {"head.weight": torch.ones(3)}}, id="own"
        ),
        pytest.param(
            lambda s: {
                "student": prefixed("module.backbone.", {key: 2 * t for key, t in s.items()}),
                "teacher": prefixed("backbone.", s) | {"head.mlp.0.weight": torch.ones(3, 3)},
                "optimizer": {"state": {0: {"exp_avg": torch.full((2,), torch.nan)}}, "param_groups": [{"lr": 0.1}]},
                "epoch": 3,
            },
            id="dino",
        ),
    ],
)
@pytest.mark.parametrize("name", [NANO, SWIN])
def test_what_a_training_wrapped_is_unwrapped(name: str, wrapped: Any, tmp_path: Path) -> None:
    plain = state(name)
    save_file(plain, tmp_path / "plain.safetensors")
    torch.save(wrapped(plain), tmp_path / "wrapped.pth")
    backbone = create_backbone(name, str(tmp_path / "wrapped.pth"))
    assert backbone.fingerprint == create_backbone(name, str(tmp_path / "plain.safetensors")).fingerprint
    assert "state_dict" not in {key for key, value in backbone.model.pretrained_cfg.items() if value is not None}  # type: ignore[union-attr,operator]


def test_a_convolutional_network_is_unwrapped_too(tmp_path: Path) -> None:
    torch.save({"state_dict": prefixed("encoder.", state("resnet18", num_classes=5))}, tmp_path / "resnet.pth")
    torch.save(state("resnet18", num_classes=5), tmp_path / "plain.pth")
    wrapped, plain = (create_backbone("resnet18", str(tmp_path / f"{file}.pth")) for file in ("resnet", "plain"))
    assert wrapped.fingerprint == plain.fingerprint
    heads = [pretrained_head("resnet18", str(tmp_path / f"{file}.pth")).weight for file in ("resnet", "plain")]
    assert torch.equal(*heads)


def test_two_equal_networks_in_a_file_are_not_chosen_from(tmp_path: Path) -> None:
    torch.save(prefixed("base.", state()) | prefixed("momentum.", state()), tmp_path / "moco.pth")
    with pytest.raises(WeightsError, match=r"holds several networks \(base\., momentum\.\): write one of them"):
        create_backbone(NANO, str(tmp_path / "moco.pth"))


def test_an_unwrapped_file_is_loaded_strictly(tmp_path: Path) -> None:
    hole = prefixed("backbone.", state())
    del hole["backbone.blocks.3.attn.qkv.weight"]
    torch.save(hole, tmp_path / "hole.pth")
    with pytest.raises(WeightsError, match=r"the file lacks blocks\.3\.attn\.qkv\.weight and perhaps others"):
        create_backbone(NANO, str(tmp_path / "hole.pth"))
    torch.save(prefixed("backbone.", state() | {"blocks.9.norm1.weight": torch.ones(2)}), tmp_path / "more.pth")
    with pytest.raises(WeightsError, match=r"the model has no blocks\.9\.norm1\.weight, which is in the file"):
        create_backbone(NANO, str(tmp_path / "more.pth"))
    nothing: tuple[dict[str, Any], ...] = ({}, {"state_dict": {}}, {"epoch": 3})
    for empty in nothing:
        torch.save(empty, tmp_path / "empty.pth")
        with pytest.raises(WeightsError, match=r"empty\.pth holds no tensors"):
            create_backbone(NANO, str(tmp_path / "empty.pth"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    broken = state()
    broken["blocks.2.mlp.fc1.bias"][5] = value
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match=r"broken\.safetensors hold NaN or infinity in blocks\.2\.mlp\.fc1\.bias"):
        create_backbone(NANO, str(tmp_path / "broken.safetensors"))


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"teacher": prefixed("backbone.", state()), "hook": print}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match=r"code\.pth is not a readable weights file"):
        create_backbone(NANO, str(tmp_path / "code.pth"))
