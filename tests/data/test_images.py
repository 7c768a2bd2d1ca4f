from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt.data import images
from vpt.data.images import decode_rgb, to_rgb
from vpt.data.list_files import read_list
from vpt.errors import DataError
from vpt.version import versions


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_list_takes_the_last_field_as_label_and_allows_spaces_in_paths(tmp_path: Path) -> None:
    images = read_list(write(tmp_path / "a.txt", "a b/c d.jpg\t3\n\n  e.png   0 \nf.jpg 12"), tmp_path)
    assert images.paths == ["a b/c d.jpg", "e.png", "f.jpg"]
    assert images.labels.tolist() == [3, 0, 12]
    assert images.labels.dtype == np.int64
    assert list(images.lines) == [1, 3, 4]


@pytest.mark.parametrize("line", ["cat.jpg", "cat.jpg one", "cat.jpg 1.5"])
def test_line_without_integer_label_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"a\.txt, line 2: expected 'path<whitespace>label'"):
        read_list(write(tmp_path / "a.txt", f"x.jpg 0\n{line}\n"), tmp_path)


def test_empty_and_missing_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the list is empty"):
        read_list(write(tmp_path / "a.txt", "\n \n"), tmp_path)
    with pytest.raises(DataError, match=r"none\.txt is not a readable list of images \(No such file"):
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


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "LA", "PA", "RGBA", "I;16", "I;16B", "I"])
def test_every_mode_decodes_to_the_same_rgb(tmp_path: Path, mode: str) -> None:
    black_and_white = np.where(grey_ramp() > 127, 255, 0).astype(np.uint8)
    suffix = ".tif" if mode in {"CMYK", "I", "PA", "I;16B"} else ".png"
    if mode.startswith("I"):
        kind = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]
        image = Image.fromarray((black_and_white.astype(np.int32) * 257).astype(kind))
    else:
        image = Image.fromarray(black_and_white).convert("RGB").convert(mode.replace("PA", "P")).convert(mode)
    if mode == "PA":  # no file format keeps it
        decoded = to_rgb(image)
    else:
        image.save(tmp_path / f"x{suffix}")
        decoded = decode_rgb(tmp_path / f"x{suffix}")
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.repeat(black_and_white[..., None], 3, axis=2))


def test_jpeg_in_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    colours = Image.new("RGB", (16, 16), (200, 40, 90))
    colours.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    np.testing.assert_allclose(np.asarray(decode_rgb(tmp_path / "x.jpg")), np.asarray(colours), atol=3)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_dark_sixteen_bits_stay_dark(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.full((4, 4), 200, dtype=kind)).save(tmp_path / "x.tif")
    assert np.unique(np.asarray(decode_rgb(tmp_path / "x.tif"))).tolist() == [1]


@pytest.mark.parametrize("sample", [-1, 65536])
def test_samples_beyond_sixteen_bits_are_refused(tmp_path: Path, sample: int) -> None:
    Image.fromarray(np.full((4, 4), sample, dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif cannot be decoded \(its 32-bit samples do not fit in 16 bits"):
        decode_rgb(tmp_path / "x.tif")


def test_floating_point_samples_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif cannot be decoded \(its samples are decimal numbers"):
        decode_rgb(tmp_path / "x.tif")


def test_text_called_jpg_and_an_empty_file_are_not_images(tmp_path: Path) -> None:
    for name, content in (("a.jpg", b"not an image"), ("b.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is not an image\.$"):
            decode_rgb(tmp_path / name)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_an_image_of_one_pixel_is_an_image(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (1, 1), "white").save(tmp_path / f"x.{kind}")
    assert np.asarray(decode_rgb(tmp_path / f"x.{kind}")).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "tif"])
def test_every_truncated_kind_is_an_error_of_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        decode_rgb(path)
    assert "\n" not in str(caught.value)


def test_paths_may_be_in_any_script(tmp_path: Path) -> None:
    name = "Köpfe и хвосты/猫 🐈.png"
    (tmp_path / name).parent.mkdir()
    Image.new("RGB", (3, 2), "red").save(tmp_path / name)
    images = read_list(write(tmp_path / "列表.txt", f"\ufeff{name}\t0\n"), tmp_path)
    assert images.paths == [name]
    assert images.decode(0).size == (3, 2)
    assert images.title == f"{tmp_path.name}-列表"


def test_an_image_listed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt, line 4: x\.jpg is listed on line 1 already; remove one line\."):
        read_list(write(tmp_path / "a.txt", "x.jpg 0\n\ny.jpg 0\nx.jpg 1\n"), tmp_path)


def test_a_part_of_a_list_keeps_its_lines(tmp_path: Path) -> None:
    whole = read_list(write(tmp_path / "a.txt", "x.jpg 0\n\ny.jpg 1\nz.jpg 2\n"), tmp_path)
    part = whole.take(np.array([0, 2]))
    assert (part.paths, part.labels.tolist(), part.lines) == (["x.jpg", "z.jpg"], [0, 2], [1, 4])
    with pytest.raises(DataError, match=r"line 4: .*z\.jpg does not exist"):
        part.decode(1)


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
    shown = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
             6: np.rot90(upright, -1), 7: upright[::-1, ::-1].T, 8: np.rot90(upright)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(upright).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_rgb(tmp_path / "x.png"))[..., 0], shown)


@pytest.mark.skipif(find_spec("simplejpeg") is None, reason="vpt[jpeg] is not installed")
@pytest.mark.parametrize(
    "options", [{}, {"quality": 30}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}]
)
def test_a_plain_jpeg_has_the_same_pixels_by_simplejpeg(tmp_path: Path, options: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    for number, shape in enumerate([(40, 31, 3), (17, 64, 3), (33, 33), (1, 9, 3)]):
        path = tmp_path / f"{number}.jpg"
        coarse = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        coarse.resize((4 * shape[1] + 1, 3 * shape[0] + 2), Image.Resampling.BICUBIC).save(path, **options)
        fast = images._decoded_jpeg(path.read_bytes())
        assert fast is not None
        with Image.open(path) as image:
            np.testing.assert_array_equal(fast, np.asarray(to_rgb(image)))
        np.testing.assert_array_equal(fast, np.asarray(decode_rgb(path)))


def test_what_simplejpeg_would_read_differently_is_left_to_pillow(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(tmp_path / "turned.jpg", exif=exif)
    pixels.convert("CMYK").save(tmp_path / "cmyk.jpg")
    pixels.save(tmp_path / "xmp.jpg", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>')
    pixels.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    for name in ("turned", "cmyk", "xmp", "cut"):
        assert images._decoded_jpeg((tmp_path / f"{name}.jpg").read_bytes()) is None, name
    assert decode_rgb(tmp_path / "turned.jpg").size == decode_rgb(tmp_path / "xmp.jpg").size == (24, 16)


def test_the_version_of_simplejpeg_is_stamped_where_it_is_there() -> None:
    assert ("simplejpeg" in versions()) == (find_spec("simplejpeg") is not None)


def test_a_sampling_that_simplejpeg_does_not_know_is_left_to_pillow(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path, subsampling=0)
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 11] = 0x14  # 4:4:1, as of a turned 4:1:1
    path.write_bytes(bytes(content))
    with Image.open(path) as image:
        try:
            expected = np.asarray(to_rgb(image))
        except OSError:
            expected = None
    if expected is None:
        with pytest.raises(DataError):
            decode_rgb(path)
    else:
        np.testing.assert_array_equal(np.asarray(decode_rgb(path)), expected)
