"""Every kind of figure says what it shows, and what cannot be drawn is said in a sentence."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from tests.robustness.fakes import BACKBONE, CLASSES, SIZE, images, task
from vpt.backbones import create_backbone
from vpt.errors import ConfigError, OutputError, UnknownNameError
from vpt.models import TunedModel
from vpt.visualize import Scene, draw, write_gallery
from vpt.visualize.attention_map_figures import nearest_figure, nearest_patches, percent
from vpt.visualize.attention_maps import attention_maps, measure_attention
from vpt.visualize.figure_kinds import KINDS, sample_crowd
from vpt.visualize.figure_panels import chosen
from vpt.visualize.layer_features import features_figure, layer_features, neighbour_accuracy, plane

DEEP = {"name": "prompt", "num_tokens": 4}
SHALLOW = {"name": "prompt", "num_tokens": 4, "deep": False}
SWIN = "swin_nano_patch4_window8_64"


def scene(*specs: dict[str, object], backbone: str = BACKBONE, labels: bool = True, shown: int = 2) -> Scene:
    torch.manual_seed(0)
    model = TunedModel(create_backbone(backbone, "random", SIZE), 3, specs, CLASSES)
    crowd = torch.from_numpy(images(12, 1))
    known = torch.arange(12) % 3
    return Scene(model, crowd[:shown], known[:shown] if labels else None, crowd, known if labels else None)


def words(figure: Figure) -> str:
    parts = [figure.get_suptitle(), figure.get_supxlabel()]
    for axes in figure.axes:
        parts += [axes.get_title(), axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
    return "\n".join(part for part in parts if part)


def values_of(axes: Axes) -> NDArray[np.float64]:
    return np.asarray(axes.images[0].get_array())


def maps(figure: Figure) -> list[NDArray[np.float64]]:
    """What is drawn in colours of a scale."""
    return [values for axes in figure.axes if axes.images and (values := values_of(axes)).ndim == 2]


@pytest.mark.parametrize("backbone", [BACKBONE, SWIN])
def test_a_gallery_has_a_file_and_a_picture_of_every_kind(backbone: str, tmp_path: Path) -> None:
    paths, left_out = write_gallery(scene(DEEP, backbone=backbone, shown=1), tmp_path / "new", (), "svg")
    assert not left_out
    assert [path.name for path in paths] == [*(f"{kind}.svg" for kind in KINDS), "index.html"]
    assert all(path.stat().st_size > 5_000 for path in paths)
    text = (tmp_path / "new" / "index.html").read_text(encoding="utf-8")
    found = re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"', text)
    assert len(found) == len(KINDS)
    for data in found:
        assert np.ptp(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))) > 150
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text).lower()
    assert not re.search(r"https?:|url\(|@import|<script|<link|<table|//", rest)


@pytest.mark.parametrize(
    ("specs", "labels", "missing"),
    [
        ((), True, {"compare", "share", "mass", "prompts", "patches"}),
        (({"name": "lora", "rank": 2},), True, {"compare", "share", "mass", "prompts", "patches"}),
        (({"name": "prefix", "num_tokens": 2},), True, {"compare", "prompts"}),
        ((DEEP,), False, {"features"}),
    ],
    ids=["head", "lora", "prefix", "files"],
)
def test_kinds_that_a_model_does_not_have_are_refused_in_a_sentence(
    specs: tuple[dict[str, object], ...], labels: bool, missing: set[str]
) -> None:
    given = scene(*specs, labels=labels)
    assert {name for name, kind in KINDS.items() if kind.missing(given)} == missing
    for kind in missing:
        with pytest.raises(ConfigError, match=f"'{kind}' cannot be drawn: .*(no prompts|without --images)"):
            draw(given, kind)


def test_the_gallery_leaves_out_what_cannot_be_drawn_and_says_so(tmp_path: Path) -> None:
    paths, left_out = write_gallery(scene({"name": "lora", "rank": 2}, labels=False, shown=1), tmp_path)
    assert {path.stem for path in paths} == {"class", "rollout", "index"}
    assert "share is left out: the model has no prompts." in left_out
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(sentence in text for sentence in left_out)


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="rollout"):
        draw(scene(DEEP), "rolout")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        write_gallery(scene(DEEP), tmp_path / "file")


def test_the_class_figure_puts_the_untuned_model_above_the_tuned_one() -> None:
    given = scene(DEEP)
    figure = draw(given, "class")
    assert "the class token" in words(figure)
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["untuned", "tuned"] * 2
    drawn = maps(figure)
    last = given.untuned.layers[-1].patches[0].mean(axis=0) if given.untuned else None
    assert last is not None
    np.testing.assert_allclose(drawn[5], last / last.mean(), rtol=1e-5)
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images and values_of(axes).ndim == 2}
    assert len(limits) == 1  # one scale for what is compared


def test_without_a_delta_there_is_nothing_to_compare_with() -> None:
    given = scene()
    assert given.untuned is None
    assert "tuned" not in words(draw(given, "class"))
    assert "Difference" not in words(draw(given, "rollout"))


def test_without_a_class_token_the_title_says_so_and_grids_are_those_of_the_stages() -> None:
    figure = draw(scene(DEEP, backbone=SWIN), "class")
    assert "mean patch (no class token)" in words(figure)
    assert {values.shape for values in maps(figure)} >= {(16, 16), (8, 8)}
    assert "of the class token" not in words(draw(scene(DEEP, backbone=SWIN), "share"))


def test_the_queries_of_deep_prompts_are_called_unused_and_those_of_shallow_ones_are_not() -> None:
    assert "unused" in words(draw(scene(DEEP), "prompts"))
    assert "unused" not in words(draw(scene(SHALLOW), "prompts"))


def test_where_only_prefixes_are_strongest_the_prompts_that_ask_are_drawn() -> None:
    given = scene(
        {"name": "prompt", "num_tokens": 2, "layers": [1, 3]}, {"name": "prefix", "num_tokens": 50, "layers": [4, 6]}
    )
    assert given.tuned.strongest >= 4
    assert re.search("attends to in layer [23],", words(draw(given, "prompts")))


def test_only_prompts_alone_are_compared_as_prompts() -> None:
    assert "With prompts" in words(draw(scene(DEEP), "compare"))
    both = words(draw(scene(DEEP, {"name": "lora", "rank": 2}), "compare"))
    assert "Tuned" in both
    assert "With prompts" not in both


def test_shares_are_written_into_their_cells() -> None:
    given = scene(DEEP)
    figure = draw(given, "share")
    cells = [text.get_text() for text in figure.axes[0].texts]
    expected = 100 * np.stack([layer.share.mean(axis=0) for layer in given.tuned.layers])
    assert cells == [percent(float(value)) for value in expected.ravel()]
    assert [percent(value) for value in (0.51, 9.94, 9.96, 48.4, 100.0)] == ["0.5", "9.9", "10", "48", "100"]


def test_the_rollout_says_how_much_comes_from_prompts() -> None:
    given = scene(DEEP)
    text = words(draw(given, "rollout"))
    for place in range(2):
        assert f"prompts {given.tuned.rollout.prompts[:, place].sum():.0%}" in text
    assert text.count("prompts ") == 2  # none without them


def test_nearest_patches_are_the_largest_weights_of_different_images() -> None:
    given = scene(DEEP)
    layer = attention_maps(given.model, given.crowd).layers[2]
    found = nearest_patches(layer, 1, number=5)
    assert len({image for image, *_ in found}) == 5
    scores = [score for *_, score in found]
    assert scores == sorted(scores, reverse=True)
    for image, row, column, score in found:
        assert score == layer.to_prompts[image, 1].max() == layer.to_prompts[image, 1, row, column]
    assert scores[0] == layer.to_prompts[:, 1].max()


def test_crops_are_centred_on_the_patch() -> None:
    given = scene(DEEP)
    measured = attention_maps(given.model, given.crowd)
    figure = nearest_figure(given.crowd, measured, layer=0)
    frame = figure.axes[0].patches[0]
    (left, right), (bottom, top) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert frame.get_x() + frame.get_width() / 2 == pytest.approx((left + right) / 2)  # type: ignore[attr-defined]
    assert frame.get_y() + frame.get_height() / 2 == pytest.approx((bottom + top) / 2)  # type: ignore[attr-defined]
    assert right - left == 3 * 16  # pixels


def test_features_are_those_behind_the_blocks() -> None:
    given = scene(DEEP)
    found = layer_features(given.model, given.crowd)
    model = given.model.eval()
    with torch.no_grad():
        pooled = model.backbone.model.fc_norm(model.backbone.model.norm(torch.from_numpy(found[-1])))  # type: ignore[operator]
        torch.testing.assert_close(pooled, model.backbone(given.crowd), rtol=1e-4, atol=1e-5)
    assert len(found) == len(model.backbone.layout.blocks)


def test_features_without_a_class_token_are_the_mean_over_patches_and_not_over_prompts() -> None:
    torch.manual_seed(0)
    model = TunedModel(create_backbone(SWIN, "random", SIZE), 3, [SHALLOW]).eval()
    batch = torch.from_numpy(images(3, 0))
    with torch.no_grad():
        expected = model.backbone.tokens(batch).mean(dim=(1, 2))
        normed = model.backbone.model.norm
        seen: list[torch.Tensor] = []
        hook = normed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
        model.backbone(batch)
        hook.remove()
    assert expected.shape == (3, 192)
    torch.testing.assert_close(torch.from_numpy(layer_features(model, batch)[-1]), seen[0].mean(dim=(1, 2)))


def test_classes_that_lie_apart_are_drawn_apart() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 2, 5], 12)
    centres = 4 * np.eye(6, 20)
    features = (centres[labels] + 0.3 * generator.normal(size=(36, 20))).astype(np.float32)
    laid = plane(features)
    assert np.array_equal(laid, plane(features))
    means = np.stack([laid[labels == label].mean(axis=0) for label in (0, 2, 5)])
    nearest = np.linalg.norm(laid[:, None] - means, axis=2).argmin(axis=1)
    assert np.array_equal(np.array([0, 2, 5])[nearest], labels)
    assert neighbour_accuracy(features, labels) == 1
    figure = features_figure([features] * 6, [features] * 6, labels, list("abcdef"))
    assert [axes.get_ylabel() for axes in figure.axes] == ["untuned", "", "", "", "tuned", "", "", ""]
    assert figure.axes[0].get_title().startswith("layer 1: 100%")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c", "f"]


def test_an_image_does_not_vote_for_itself() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 3)).astype(np.float32)
    assert neighbour_accuracy(features, generator.integers(0, 4, 400)) < 0.4


def test_too_few_images_are_not_laid_out() -> None:
    with pytest.raises(ConfigError, match="at least 8 images"):
        plane(np.zeros((4, 3), dtype=np.float32))


def test_a_crowd_holds_several_images_each_of_a_few_classes() -> None:
    batch, labels = sample_crowd(task(n=12).split("test"), classes=2, per_class=3)
    assert len(batch) == 6
    assert sorted(np.bincount(labels, minlength=3).tolist()) == [0, 3, 3]


def test_columns_are_spread_and_end_with_the_last() -> None:
    assert chosen(12, 6) == [1, 3, 5, 7, 9, 11]
    assert chosen(3, 6) == [0, 1, 2]
    assert chosen(7, 4)[-1] == 6


def test_a_swin_whose_stages_differ_in_heads_is_drawn() -> None:
    swin = create_backbone("swin_tiny_patch4_window7_224", "random")
    model = TunedModel(swin, 3, [{"name": "prompt", "num_tokens": 2}]).eval()
    pictures = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    measured = measure_attention(model, pictures)
    heads = [int(block.attn.num_heads) for stage in cast("Any", swin.model).layers for block in stage.blocks]
    assert [int(np.isfinite(row).sum()) for row in measured.share] == heads
    assert draw(Scene(model, pictures, None, pictures, None), "compare")
