from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tests.robustness.fakes import CLASSES, PROMPTS, images, task, write_delta
from vpt.errors import ConfigError, DataError, VPTError
from vpt.models import load_classifier
from vpt.reports.style import save_figure
from vpt.visualize import draw, scene_from_data, scene_from_files
from vpt.visualize.attention_map_figures import draw_attention
from vpt.visualize.figure_kinds import sample_images


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_delta(tmp_path_factory.mktemp("delta") / "delta.safetensors", PROMPTS)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures" / "ant"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.fromarray(images(1, number)[0].transpose(1, 2, 0)).resize((90, 50)).save(folder / f"{number}.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def compare(delta: Path, paths: list[Path], out: Path) -> Path:
    return save_figure(draw(scene_from_files(delta, paths), "compare"), out)


def titles(figure: Figure) -> list[str]:
    return [text for axes in figure.axes if (text := axes.get_title() or axes.get_title(loc="left"))]


def test_a_row_per_image_and_the_shares_below(delta: Path) -> None:
    batch, labels = torch.from_numpy(images(3, 0)), torch.tensor([0, 1, 2])
    figure = draw_attention(load_classifier(delta), batch, labels)
    shares = "Share of its attention on prompts"
    assert titles(figure) == ["Input", "Without prompts", "With prompts", "Difference", shares]
    maps = [axes for axes in figure.axes if axes.images]
    assert len(maps) == 3 * 4
    assert [maps[row * 4].get_xlabel() for row in range(3)] == list(CLASSES)
    difference = [np.asarray(axes.images[0].get_array()) for axes in maps[:4]]
    np.testing.assert_allclose(difference[3], difference[2] - difference[1], rtol=1e-5)
    assert maps[1].images[0].get_clim() == maps[2].images[0].get_clim()  # one scale for what is compared
    low, high = maps[3].images[0].get_clim()
    assert low == -high


def test_predictions_are_marked_right_or_wrong_only_where_the_class_is_known(delta: Path) -> None:
    model, batch = load_classifier(delta), torch.from_numpy(images(1, 0))
    guess = int(model(batch).argmax())
    known = draw_attention(model, batch, torch.tensor([guess]))
    wrong = draw_attention(model, batch, torch.tensor([(guess + 1) % 3]))
    unknown = draw_attention(model, batch, None)
    captions = [figure.axes[2].get_xlabel() for figure in (known, wrong, unknown)]
    assert [caption[:2] for caption in captions[:2]] == ["✓ ", "✗ "]
    assert captions[2].startswith(f"{CLASSES[guess]} (")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files_and_folders_become_a_figure(suffix: str, delta: Path, pictures: Path, tmp_path: Path) -> None:
    out = compare(delta, [pictures / "7.jpg"], tmp_path / "new" / f"one.{suffix}")
    assert out.stat().st_size > 10_000
    if suffix == "png":
        many = compare(delta, [pictures.parent], tmp_path / "six.png")
        with Image.open(out) as one, Image.open(many) as six:
            assert six.width == one.width == 1184
            assert six.height - one.height == 5 * 1.75 * 160  # a folder stands for six images in or below it


def test_a_figure_of_the_task_knows_the_classes(delta: Path, tmp_path: Path) -> None:
    scene = scene_from_data(delta, task(), number=2)
    assert set(scene.names) < {"ant", "bee", "cat"}
    assert save_figure(draw(scene, "compare"), tmp_path / "a.png").is_file()
    with pytest.raises(ConfigError, match="'cow' of fake"):
        scene_from_data(delta, task(classes=("ant", "bee", "cow")))


def test_samples_are_of_different_classes_and_depend_on_the_seed() -> None:
    split = task(n=9).split("test")
    batch, labels = sample_images(split, 3)
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 1, 2]
    for image, label in zip(batch, labels, strict=True):
        assert any(torch.equal(image, split[int(i)]["image"]) for i in np.flatnonzero(split.labels == int(label)))
    draws = [sample_images(split, 3, seed)[0] for seed in range(4)]
    assert not all(torch.equal(draws[0], draw) for draw in draws)


def test_what_cannot_be_drawn_is_refused_in_one_sentence(delta: Path, pictures: Path, tmp_path: Path) -> None:
    linear = write_delta(delta.parent / "linear.safetensors", ())
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "x.png"
    cases: list[tuple[Path, list[Path], Path, type[VPTError], str]] = [
        (linear, [pictures], out, ConfigError, "the model has no prompts"),
        (delta, [tmp_path / "absent.png"], out, DataError, r"No image .*absent\.png"),
        (delta, [pictures / "notes.txt"], out, DataError, r"notes\.txt is not an image"),
        (delta, [empty], out, DataError, "no image in the folder"),
        (delta, [], out, DataError, "give image files or a folder"),
        (delta, [pictures / "0.jpg"] * 33, out, ConfigError, "takes 32 at most, got 33"),
        (delta, [pictures / "0.jpg"], tmp_path / "x.bmp", ConfigError, r"\.png, \.svg or \.pdf"),
    ]
    for file, paths, target, error, message in cases:
        with pytest.raises(error, match=message):
            compare(file, paths, target)
    assert not out.exists()
