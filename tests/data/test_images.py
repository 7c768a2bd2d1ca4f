from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpt.data.images import decode_rgb, read_list
from vpt.errors import DataError


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_list_takes_the_last_field_as_label_and_allows_spaces_in_paths(tmp_path: Path) -> None:
    images = read_list(write(tmp_path / "a.txt", "a b/c d.jpg\t3\n\n  e.png   0 \nf.jpg 12"), tmp_path)
    assert images.paths == ["a b/c d.jpg", "e.png", "f.jpg"]
    assert images.labels.tolist() == [3, 0, 12]
    assert images.labels.dtype == np.int64
    assert list(images.lines) == [1, 3, 4]


def test_fingerprint_follows_the_text(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / name, f"x.jpg {label}") for name, label in (("a", 0), ("b", 0), ("c", 1)))
    prints = [read_list(file, tmp_path).fingerprint for file in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("line", ["cat.jpg", "cat.jpg one", "cat.jpg 1.5"])
def test_line_without_integer_label_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"a\.txt, line 2: expected 'path<whitespace>label'"):
        read_list(write(tmp_path / "a.txt", f"x.jpg 0\n{line}\n"), tmp_path)


def test_empty_and_missing_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the list is empty"):
        read_list(write(tmp_path / "a.txt", "\n \n"), tmp_path)
    with pytest.raises(DataError, match=r"none\.txt: not a readable list"):
        read_list(tmp_path / "none.txt", tmp_path)


@pytest.mark.parametrize("label", [3, -1])
def test_label_outside_the_classes_names_the_line(tmp_path: Path, label: int) -> None:
    images = read_list(write(tmp_path / "a.txt", f"x.jpg 2\n\ny.jpg {label}\n"), tmp_path)
    with pytest.raises(DataError, match=rf"a\.txt, line 3: label {label} is outside 0\.\.2"):
        images.check_labels(3)
    images.check_labels(4) if label == 3 else None


def spoil_missing(path: Path) -> None:
    path.unlink()


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def spoil_text(path: Path) -> None:
    path.write_text("not an image")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [(spoil_missing, "does not exist"), (spoil_truncated, "cannot be decoded"), (spoil_text, "is not an image")],
)
def test_bad_image_is_reported_in_one_sentence_with_list_line_and_path(task: Path, spoil: object, fault: str) -> None:
    assert callable(spoil)
    images = read_list(task / "test.txt", task)
    spoil(task / images.paths[4])
    with pytest.raises(DataError) as caught:
        images.decode(4)
    message = str(caught.value)
    assert message.startswith(f"{task / 'test.txt'}, line 5: {task / images.paths[4]} {fault}")
    assert "\n" not in message
    with pytest.raises(DataError, match=fault):
        decode_rgb(task / images.paths[4])


def grey_ramp() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "LA", "RGBA", "I;16"])
def test_every_mode_decodes_to_the_same_rgb(tmp_path: Path, mode: str) -> None:
    black_and_white = np.where(grey_ramp() > 127, 255, 0).astype(np.uint8)
    suffix = ".tif" if mode == "CMYK" else ".png"
    if mode == "I;16":
        image = Image.fromarray(black_and_white.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(black_and_white).convert("RGB").convert(mode)
    image.save(tmp_path / f"x{suffix}")
    decoded = decode_rgb(tmp_path / f"x{suffix}")
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.repeat(black_and_white[..., None], 3, axis=2))


def test_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    Image.fromarray(grey_ramp().astype(np.uint16) * 257).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(decode_rgb(tmp_path / "x.png"))[..., 0], grey_ramp())


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(decode_rgb(tmp_path / "alpha.png"))[:, 0, 0].tolist() == [0, 0, 255, 255]
    assert np.unique(np.asarray(decode_rgb(tmp_path / "palette.png"))).tolist() == [255]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to show
    image.save(tmp_path / "x.jpg", exif=exif)
    assert decode_rgb(tmp_path / "x.jpg").size == (4, 6)
