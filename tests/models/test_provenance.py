"""Places of this machine do not leave it; everything else does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.export.models import tuned
from vpt.models.delta_format import about, public_identity, without_places


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/ann/vit.safetensors", "vit.safetensors"),
        ("/home/ann lee/runs/", "runs"),
        ("~/data", "data"),
        ("../shared/data", "data"),
        ("./runs", "runs"),
        ("C:\\Users\\ann\\vit.npz", "vit.npz"),
        ("file:///home/ann/vit.npz", "vit.npz"),
        ("read from /home/ann/vit.npz, resized", "read from vit.npz, resized"),
        ("--data.root=/home/ann/data", "--data.root=data"),
        ("https://example.org/data/cards", "https://example.org/data/cards"),
        ("timm/vit_base_patch16_224.orig_in21k", "timm/vit_base_patch16_224.orig_in21k"),
        ("shapes/train800", "shapes/train800"),
        ("dog and/or cat, 3 / 4", "dog and/or cat, 3 / 4"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_of_a_path_its_last_part_is_kept(value: Any, kept: Any) -> None:
    assert without_places(value) == kept
    assert without_places({"a": [{"b": (value,)}]}) == {"a": [{"b": [kept]}]}


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_weights_that_anybody_can_get_keep_their_word(weights: str) -> None:
    assert public_identity({"weights": weights, "name": "x"}) == {"weights": weights, "name": "x"}
    assert public_identity({"weights": "shared/vit.npz"}) == {"weights": "vit.npz"}


def test_classes_are_named_as_they_are() -> None:
    model = tuned("vit_nano_patch8_64", "random", [])
    model.class_names = ["/m/01g317", "b", "c", "d", "e"]
    assert about(model)["class_names"] == model.class_names
    assert about(model)["backbone"]["weights_id"] == "random"
