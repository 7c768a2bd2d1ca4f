from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.robustness.fakes import BACKBONE, CLASSES, SIZE, task, weights, write_full
from vpt.backbones import create_backbone
from vpt.errors import ConfigError
from vpt.models import load_classifier
from vpt.robustness import run
from vpt.robustness.zero_shot_heads import (
    clip_text,
    image_head,
    own_head,
    read_templates,
    sub_head,
    text_head,
    write_head,
    zero_shot,
)


def encode(texts: list[str]) -> Tensor:
    """A text tower that gives every text its own direction and a length that must not matter."""
    rows = []
    for text in texts:
        seed = sum(position * ord(letter) for position, letter in enumerate(text, 1))
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randn(6, generator=generator) * (1 + seed % 7))
    return torch.stack(rows)


def test_a_class_is_the_normalised_mean_of_its_normalised_templates() -> None:
    templates = ["a photo of a {}.", "the {}!", "{}"]
    head = text_head(["ant", "sea_bee"], templates, encode, scale=50.0)
    for row, name in zip(head.weight, ["ant", "sea bee"], strict=True):
        parts = [encode([template.replace("{}", name)])[0] for template in templates]
        mean = sum(part / part.norm() for part in parts) / 3
        torch.testing.assert_close(row, 50 * mean / mean.norm())
    assert head.bias.tolist() == [0, 0]
    assert not head.weight.requires_grad


def test_one_hard_prompt_is_its_own_direction() -> None:
    head = text_head(["ant"], ["a photo of a {}."], encode, scale=1.0)
    torch.testing.assert_close(head.weight, normalize(encode(["a photo of a ant."])))


def test_classes_of_one_name_are_refused_by_that_name() -> None:
    with pytest.raises(ConfigError, match=r"called 'missile', 'sun glasses'"):
        text_head(["missile", "ant", "sun_glasses", "missile", "sun glasses"], ["{}"], encode, 1.0)


def test_the_templates_of_the_package_can_be_read() -> None:
    templates = read_templates()
    assert "a photo of a {}." in templates
    assert len(set(templates)) == len(templates)


@pytest.mark.parametrize(
    ("text", "message"), [("", "has no template"), ("a photo\n", "must have {} once"), ("{} and {}\n", "{} once")]
)
def test_templates_without_a_place_for_the_name_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_templates(path)
    with pytest.raises(ConfigError, match="No templates"):
        read_templates(tmp_path / "none.txt")


def test_a_text_head_behind_the_projection_answers_as_clip_does() -> None:
    torch.manual_seed(0)
    texts = text_head(["ant", "bee", "cat"], ["{}"], encode, scale=10.0)
    projection, features = nn.Linear(8, 6, bias=False), torch.randn(50, 8)
    head = image_head(texts, projection, features)
    with torch.no_grad():
        clip = 10 * normalize(projection(features)) @ (texts.weight / 10).T
        ours = head(features)
    assert torch.equal(ours.argmax(1), clip.argmax(1))
    lengths = projection(features).norm(dim=1, keepdim=True)
    torch.testing.assert_close(ours, clip * lengths / lengths.mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="do not fit"):
        image_head(texts, nn.Linear(8, 5), features)


def test_a_projection_with_a_bias_keeps_it() -> None:
    torch.manual_seed(0)
    texts, projection, features = nn.Linear(6, 3), nn.Linear(8, 6), torch.randn(50, 8)
    with torch.no_grad():
        length = projection(features).norm(dim=1).mean()
        expected = projection(features) @ texts.weight.T / length + texts.bias
        torch.testing.assert_close(image_head(texts, projection, features)(features), expected)


def test_a_sub_head_gives_the_logits_of_its_classes() -> None:
    head, features = nn.Linear(5, 9), torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(sub_head(head, [7, 0, 3])(features), head(features)[:, [7, 0, 3]])
        bare = nn.Linear(5, 9, bias=False)
        torch.testing.assert_close(sub_head(bare, [1])(features), bare(features)[:, [1]])


def published(folder: Path, classes: int) -> str:
    """Weights with a classifier, as they are published."""
    torch.manual_seed(0)
    path = folder / "published.safetensors"
    model = timm.create_model(BACKBONE, num_classes=classes, img_size=SIZE)
    save_file({key: tensor + 0.01 for key, tensor in model.state_dict().items()}, path)
    return str(path)


def test_the_head_of_the_weights_is_the_whole_or_a_part(tmp_path: Path) -> None:
    path = published(tmp_path, 9)
    backbone = create_backbone(BACKBONE, path, SIZE)
    whole = own_head(backbone)
    assert torch.equal(whole.weight, load_file(path)["head.weight"])
    assert torch.equal(own_head(backbone, [7, 2]).weight, whole.weight[[7, 2]])


def test_texts_read_images_through_the_towers_projection(tmp_path: Path) -> None:
    backbone = create_backbone(BACKBONE, published(tmp_path, 6), SIZE)
    texts, images = text_head(CLASSES, ["{}"], encode, scale=10.0), task().split("train")
    head = zero_shot(backbone, texts, images)
    projection = own_head(backbone)
    batch = torch.stack([images[row]["image"] for row in range(len(images))])
    with torch.no_grad():
        embedded = projection(backbone(batch))
        clip = normalize(embedded) @ texts.weight.T
        assert torch.equal(head(backbone(batch)).argmax(1), clip.argmax(1))


@pytest.mark.parametrize(
    ("classes", "message"),
    [([0, 9], "Class 1 is matched to 9"), ([-1], "0 to 8"), ([3, 1, 3], "Classes 0 and 2 are both"), ([], "at least")],
)
def test_a_match_that_cannot_be_is_refused(classes: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sub_head(nn.Linear(5, 9), classes)


def test_a_written_head_is_an_anchor(tmp_path: Path) -> None:
    full = write_full(tmp_path / "full.safetensors")
    backbone = create_backbone(BACKBONE, weights(tmp_path), SIZE)
    torch.manual_seed(1)
    head = sub_head(nn.Linear(backbone.num_features, 20), [4, 1, 9])
    preset = task().preset.to_dict()
    path = write_head(tmp_path / "zero.safetensors", backbone, head, CLASSES, preset, {"head": "test"})
    assert torch.equal(load_classifier(path).head.weight, head.weight)
    result = run(full, task(), (0.0, 1.0), tmp_path / "out", anchor=path, severities=())
    assert result.protocol["way"] == "end-to-end"
    with pytest.raises(ConfigError, match=r"The head is \(3, 64\), but .* the task 2 classes"):
        write_head(tmp_path / "no.safetensors", backbone, head, CLASSES[:2], preset, {})


def test_a_text_tower_of_open_clip_embeds_texts() -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install 'vpt[clip]'")
    tower = open_clip.create_model("ViT-B-16").eval()  # without weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "create_model", lambda name, pretrained: tower)
        encoder, scale = clip_text("ViT-B-16", "openai")
    head = text_head(["ant", "bee"], read_templates(), encoder, scale)
    assert head.weight.shape == (2, 512)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.full((2,), scale))


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'vpt\[clip\]'"):
        clip_text("ViT-B-16", "openai")


def test_a_published_head_reads_the_weights_own_pool() -> None:
    with pytest.raises(ConfigError, match="reads the weights' own pool: leave pool out"):
        own_head(create_backbone(BACKBONE, "random", SIZE, pool="avg"))
