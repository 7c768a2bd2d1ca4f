"""Folders, tables and lists of images that are not what they should be, and data options out of their range."""

from __future__ import annotations

import json
from pathlib import Path

from . import Row

_TABLE = "".join(f"train/{name}/{number}.jpg,{name}\n" for name in ("cat", "dog") for number in range(2))
_TABLES = {
    "empty.csv": b"",
    "header.csv": b"path,label\n",
    "twice.csv": b"path,label,label\na.jpg,cat,dog\n",
    "more.csv": f"path,label\n{_TABLE}a.jpg,cat,1\n".encode(),
    "fewer.csv": f"path,label\n{_TABLE}a.jpg\n".encode(),
    "nul.csv": f"path,label\n{_TABLE}a\0.jpg,cat\n".encode(),
    "latin.csv": f"path,label\n{_TABLE}ä.jpg,cat\n".encode("latin-1"),
    "utf16.csv": f"path,label\n{_TABLE}".encode("utf-16"),
    "semicolons.csv": f"file;class\n{_TABLE.replace(',', ';')}".encode(),
    "headless.csv": _TABLE.encode(),
    "stems.csv": b"path,label\ntrain/cat/0,cat\ntrain/dog/0,dog\n",
    "same.csv": b"path,label\na.jpg,cat\n./a.jpg,cat\n",
    "titles.csv": f"path,label\n{_TABLE}path,label\n".encode(),
    "open.csv": f'path,label\n{_TABLE}"a.jpg,cat\n'.encode(),
    "inside.csv": f'path,label\n{_TABLE}"a".jpg,cat\n'.encode(),
    "nopath.csv": b"file,label\na.jpg,cat\n",
    "nolabel.csv": b"path,label\na.jpg,\n",
    "nofile.csv": b"path,label\n,cat\n",
    "negative.csv": b"path,label\na.jpg,-1\nb.jpg,1\n",
    "decimal.csv": b"path,label\na.jpg,0.25\nb.jpg,0.5\n",
    "huge.csv": b"path,label\na.jpg,1\nb.jpg,1e999\n",
    "one.csv": b"path,label\na.jpg,cat\nb.jpg,cat\n",
    "again.csv": b"path,label\na.jpg,cat\n./a.jpg,dog\n",
    "split.csv": b"path,label,split\na.jpg,cat,Trian\n",
    "nosplit.csv": b"path,label,split\na.jpg,cat,\n",
    "test.csv": b"path,label,split\na.jpg,cat,test\n",
    "lines.csv": b'path,label\na.jpg,"a\nb"\nb.jpg,c\n',
    "gone.csv": f"path,label\n{_TABLE}gone.jpg,cat\n".encode(),
    "device.csv": f"path,label\n{_TABLE}/dev/zero,cat\n".encode(),
    "damaged.parquet": b"PAR1",
    "sheet.xlsx": b"PK",
}
_LISTS = {
    "number": b"a.jpg 0\nb.jpg 2000000000\n",
    "digits": b"a.jpg 0\nb.jpg 99999999999999999999\n",
    "words": b"a.jpg cat\n",
    "decimals": b"a.jpg 0\nb.jpg 1.0\n",
    "below": b"a.jpg 0\nb.jpg 1\nc.jpg -1\n",
    "alone": b"a.jpg 0\nb.jpg 0\n",
    "bare": b"a.jpg\n",
    "nothing": b"\n",
    "binary": b"a.jpg 0\nb\0.jpg 1\n",
    "latin": "ä.jpg 0\n".encode("latin-1"),
    "copies": b"a.jpg 0\na.jpg 1\n",
}
_CLASSES = {
    "unclosed": "[",
    "scalar": "3",
    "none": "[]",
    "numbers": "[0, 1, 2]",
    "doubles": '["a", "b", "a"]',
    "blank": '["a", " ", "c"]',
    "only": '["a"]',
    "gap": '{"0": "a", "2": "c"}',
    "key": '{"0": "a", "0": "b", "1": "c"}',
    "deep": "[" * 100_000,
    "few": '["a", "b"]',
    "composed": json.dumps(["caf\u00e9", "cafe\u0301", "c"]),
}


def files(here: Path) -> None:
    """Makes what the rows name."""
    photos = _folder(here / "photos", "train/cat/0", "train/cat/1", "train/dog/0", "train/dog/1", "test/cat/0")
    for name, content in _TABLES.items():
        (photos / name).write_bytes(content)
    for home, contents in (("lists", _LISTS), ("named", dict.fromkeys(_CLASSES, b"a.jpg 0\nb.jpg 1\nc.jpg 2\n"))):
        for name, content in contents.items():
            (here / home / name).mkdir(parents=True)
            for part in ("train800val200", "val200", "test"):
                (here / home / name / f"{part}.txt").write_bytes(content)
    for name, text in _CLASSES.items():
        (here / "named" / name / "classes.json").write_text(text)
    for name, spoiled in (
        ("zero", b""),
        ("cut", b"P6 2 2 255\n"),
        ("bomb", b"P6 100000 100000 255\n"),
        ("text", b"text"),
    ):
        folder = _folder(here / name, "train/cat/1", "train/dog/0", "train/dog/1")
        (folder / "train/cat" / ("a\nb.jpg" if name == "text" else "0.jpg")).write_bytes(spoiled)
    for name in ("lost", "heic"):
        (_folder(here / name, "train/cat/0") / "train/eel").mkdir()
    (here / "heic/train/eel/0.HEIC").write_bytes(b"heic")
    (here / "heic/train/eel/1.jpg").symlink_to("nowhere.jpg")
    _folder(here / "stray", "train/cat/0", "train/0")
    _folder(here / "strange", "train/cat/0", "train/dog/0", "test/eel/0")
    _folder(here / "tie", "train/cat/0", "val/cat/0", "valid/cat/0")
    _folder(here / "single", "train/cat/0", "train/cat/1")
    _folder(here / "broken", "train/a\nb/0", "train/a\nb/1", "train/c/0")
    _folder(here / "once", "train/a/0", "train/b/0")
    (photos / "train/cat/0.png").write_bytes(b"P6 2 2 255\n" + bytes([99] * 12))
    _folder(here / "pairs", "cat/0", "cat/1", "dog/0", "dog/1")
    _folder(here / "level", "0", "1")
    _folder(here / "outer", "pets/train/cat/0", "pets/train/dog/0")
    _folder(here / "tset", "train/cat/0", "train/dog/0", "tset/cat/0")
    _folder(here / "eval", "eval/0", "dog/0")
    (_folder(here / "flat", "cat/0", "dog/0") / "train").symlink_to("train")


def _folder(root: Path, *images: str) -> Path:
    """Images of four pixels, each another, whatever their suffix."""
    for number, image in enumerate(images):
        path = root / f"{image}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P6 2 2 255\n" + bytes([40 * number] * 12))
    return root


def _verify(place: str, wrong: str, says: str) -> Row:
    return Row(f"data verify {place}", wrong, says)


_FIT = "fit -c {configs}/demo.yaml --data"
_OWN = f"{_FIT} FolderDataModule --data.root"


def _option(module: str, option: str, wrong: str, says: str) -> Row:
    return Row(f"{_FIT} {module} {option}", wrong, says)


ROWS = [
    _verify("photos/empty.csv", "an empty file", "empty.csv is empty: a table needs the columns path and label"),
    _verify("photos/header.csv", "only a header", "header.csv lists no images"),
    _verify("photos/twice.csv", "a column twice", "has the column 'label' twice"),
    _verify("photos/more.csv", "a field too many", "more.csv, line 6 has 3 fields and the header 2"),
    _verify("photos/fewer.csv", "a field too few", "fewer.csv, line 6 has 1 field and the header 2"),
    _verify("photos/nul.csv", "a NUL", "line 6 has a NUL"),
    _verify("photos/latin.csv", "Latin-1", "line 6 is not UTF-8"),
    _verify("photos/utf16.csv", "UTF-16", "line 1 is not UTF-8"),
    _verify("photos/semicolons.csv", "other columns", "it has 'file', 'class', and is asked for 'path', 'label': give"),
    _verify("photos/headless.csv", "no header", "has no column 'path'; it has 'train/cat/0.jpg', 'cat', and is asked"),
    _verify("photos/same.csv", "a row twice", "line 3: ./a.jpg is listed on line 2 already; remove one line"),
    _verify("photos/titles.csv", "a header in the middle", "titles.csv, line 6 names the columns: leave it out"),
    Row(
        f"{_OWN} photos/stems.csv",
        "an ambiguous path",
        "train/cat/0 may be 0.jpg or 0.png; write the one meant",
    ),
    Row(f"{_OWN} photos/headless.csv --data.columns [path]", "no label", "columns has no 'label': name all columns of"),
    Row(f"{_OWN} photos/same.csv --data.columns [path,label]", "a header", "line 1 names the columns: leave columns"),
    Row(f"{_OWN} photos/headless.csv --data.columns [path,label,x]", "too many", "2 fields and columns names 3"),
    Row(f"{_OWN} photos/test.csv --data.split_column part", "no column", "has no column 'part'; it has 'path'"),
    Row(f"{_OWN} photos/same.csv --data.path_column ''", "no name", "has no column ''; it has 'path', 'label'"),
    Row(f"{_OWN} photos/same.csv --data.label_column x", "no column", "has no column 'x'; it has 'path', 'label'"),
    Row(f"{_OWN} photos/same.csv --data.images_root none", "not there", "images_root is none, which is no folder"),
    Row(f"{_OWN} photos --data.images_root photos", "of tables", "columns and images_root are of tables only"),
    _verify("photos/open.csv", "a quotation mark", "open.csv, line 6: a quotation mark is not closed"),
    _verify("photos/inside.csv", "text after a quotation mark", "line 6: a quotation mark is not closed, or stands"),
    _verify("photos/nopath.csv", "no path", "has no column 'path'; it has 'file', 'label'"),
    _verify("photos/nolabel.csv", "an empty label", "line 2: the label is empty"),
    _verify("photos/nofile.csv", "an empty path", "line 2: the path is empty"),
    _verify("photos/negative.csv", "a label of -1", "line 2: the label -1 is no whole number from 0 on"),
    _verify("photos/decimal.csv", "measurements", "line 2: the label 0.25 is no whole number"),
    _verify("photos/huge.csv", "an infinite label", "line 3: the label 1e999 is no whole number"),
    _verify("photos/one.csv", "one class", "has only one class, 'cat': a classifier tells two or more apart"),
    _verify("photos/again.csv", "an image of two classes", "is listed on line 2 already, as 'cat' and here as 'dog'"),
    _verify("photos/split.csv", "an unknown split", "line 2: unknown split 'Trian'; use train, training, val"),
    _verify("photos/nosplit.csv", "an empty split", "line 2: unknown split ''"),
    _verify("photos/test.csv", "no training images", "lists no training images"),
    _verify("photos/lines.csv", "a class of two lines", r"has a class 'a\nb', which cannot be printed"),
    _verify("photos/gone.csv", "an image that is gone", "line 6: photos/gone.jpg does not exist"),
    _verify("photos/device.csv", "a device that never ends", "line 6: /dev/zero cannot be decoded (it is no file)"),
    _verify("photos/damaged.parquet", "damaged", "damaged.parquet is not a readable table"),
    _verify("photos/sheet.xlsx", "a spreadsheet", "sheet.xlsx is no folder, and no table that is read"),
    _verify("photos/none.csv", "a table that is not there", "Unknown dataset, folder or table"),
    Row(f"{_OWN} photos/none.csv", "a table that is not there", "none.csv is not a readable table (No such file"),
    Row(f"{_OWN} nowhere", "a folder that is not there", "nowhere does not exist: lay the images out as"),
    Row(f"{_OWN} pairs", "two images a class", "No class has three images, so none can be tested on: give more"),
    Row(f"{_OWN} photos/train/cat", "a class", "photos/train/cat/0.jpg lies in no class folder: lay the"),
    Row(f"{_OWN} level", "images in no folder", "level/0.jpg lies in no class folder: lay the images out as"),
    Row(f"{_OWN} outer", "a folder above", "outer/pets holds splits itself (train): name that folder as root"),
    Row(f"{_OWN} tset", "a split misspelt", "tset/tset lies beside splits, holds images (1) and is none: rename it to"),
    Row(f"{_OWN} eval", "no training images", "eval/train does not exist (it has dog, eval; eval named as a"),
    Row(f"{_OWN} ~nobody.at.all/photos", "no such user", "~nobody.at.all/photos does not exist"),
    Row(f"{_OWN} /dev/null", "a device", "/dev/null does not exist"),
    _verify("zero", "an empty image", "zero/train/cat/0.jpg is not an image"),
    _verify("cut", "a truncated image", "cut/train/cat/0.jpg cannot be decoded"),
    _verify("bomb", "a decompression bomb", "bomb/train/cat/0.jpg cannot be decoded (it has more than 178,956,970"),
    _verify("text", "a name of two lines", r"'text/train/cat/a\nb.jpg' is not an image"),
    Row(f"{_OWN} lost", "an empty class", "lost/train/eel holds no image: add some"),
    Row(f"{_OWN} heic", "a class of other files", "holds no image (not read: 2 of 2 files (1 .heic, 1 dangling)): add"),
    Row(f"{_OWN} stray", "an image without a class", "stray/train/0.jpg lies in no class folder"),
    Row(f"{_OWN} strange", "a class to test only", "is of class 'eel', of which there is no training image"),
    Row(f"{_OWN} tie", "two splits of one name", "val and tie/valid are the same split"),
    Row(f"{_OWN} single", "one class", "has only one class, 'cat': a classifier tells two or more apart; add"),
    Row(f"{_OWN} broken", "a class of two lines", r"has a class 'a\nb', which cannot be printed"),
    Row(f"{_OWN} once", "an image a class", "No class has two training images"),
    Row(f"{_OWN} flat", "a link to itself", "flat/train is a link that leads nowhere: mend it"),
    Row(f"{_OWN} photos --data.val_fraction 1", "too large", "val_fraction"),
    Row(f"{_OWN} photos --data.test_fraction 0.2", "of no effect", "test_fraction has no effect: photos has test"),
    Row(f"{_OWN} once --data.test_fraction 2", "too large", "test_fraction is 2.0; it must lie in (0, 1)"),
    Row(f"{_OWN} photos --data.split_seed one", "no number", "data.split_seed: Expected a whole number, got one"),
    Row(f"{_OWN} photos --data.preset x", "unknown", "Unknown preset 'x'"),
    Row(f"{_OWN} photos --data.augment x", "unknown", "Unknown augmentation 'x'"),
    Row(f"{_OWN} photos --data.augment fgvc", "another preset's", "Augmentation 'fgvc' needs a preset that crops"),
    Row(
        f"{_OWN} photos --data.image_size 0",
        "0",
        "image_size must be a whole number of pixels from 1 to 8192, or [height, width] of such, got 0",
    ),
    Row(
        f"{_OWN} photos --data.image_size 64.5",
        "a decimal number",
        "data.image_size: Expected a whole number or a list, got 64.5",
    ),
    Row(f"{_OWN} photos --data.batch_size 0", "0", "batch_size must be a whole number of at least 1, got 0"),
    Row(f"{_OWN} photos --data.num_workers -1", "negative", "num_workers must be a whole number of at least 0, got -1"),
    Row(f"{_OWN} photos --data.seed -1", "negative", "seed must be a whole number of at least 0, got -1"),
    Row(f"{_OWN} photos --data.shots 0", "0", "shots must be a whole number of at least 1, got 0"),
    Row(f"{_OWN} photos --data.shots 9", "more than there are", "take at most"),
    Row(f"{_OWN} photos --data.shots 1 --data.fraction 0.5", "both", "Give either shots or fraction"),
    Row(f"{_OWN} photos --data.fraction 2", "too large", "fraction"),
    Row(
        f"{_OWN} photos --data.subset_seed -1 --data.shots 1",
        "negative",
        "subset_seed must be a whole number of at least 0, got -1",
    ),
    Row(f"{_OWN} photos --data.crop_border true", "another module's", "'crop_border' is not accepted"),
    Row(f"{_OWN} photos --data.torchvision MNISTT", "misspelt", "did you mean 'MNIST'?"),
    Row(f"{_OWN} photos --data.torchvision MNIST", "not there", "torchvision's MNIST cannot be read below photos"),
    Row(f"{_OWN} photos --data.torchvision_args.split=x", "of no effect", "name it by torchvision"),
    _verify("lists/number", "a label of two billion", "label 2000000000 makes 2,000,000,001 classes of"),
    _verify("lists/digits", "a label of 20 digits", "line 2: expected 'path<whitespace>label' with an integer label"),
    _verify("lists/words", "names", "line 1: expected 'path<whitespace>label' with an integer label"),
    _verify("lists/decimals", "a decimal label", "line 2: expected 'path<whitespace>label' with an integer label"),
    _verify("lists/below", "a negative label", "line 3: label -1 is outside 0..1"),
    _verify("lists/alone", "one class", "has only one class, '0'"),
    _verify("lists/bare", "no label", "line 1: expected 'path<whitespace>label'"),
    _verify("lists/nothing", "empty", "the list is empty"),
    _verify("lists/binary", "a NUL", "line 2 has a NUL"),
    _verify("lists/latin", "Latin-1", "line 1 is not UTF-8"),
    _verify("lists/copies", "an image twice", "line 2: a.jpg is listed on line 1 already"),
    *(
        _verify(f"named/{name}", f"classes.json is {name}", "classes.json is not a list of class names or a map")
        for name in ("unclosed", "scalar", "none", "numbers", "gap", "deep")
    ),
    _verify("named/key", "a key twice", "the key '0' is given twice"),
    _verify("named/doubles", "a class twice", "names the class 'a' twice"),
    _verify("named/composed", "a class in two forms", "names the class 'café' twice"),
    _verify("named/blank", "a blank class", "has a class ' ', which cannot be printed"),
    _verify("named/only", "one class", "has only one class, 'a'"),
    _verify("named/few", "fewer classes than labels", "label 2 is outside 0..1, the task has 2 classes"),
    _option("FGVCDataModule", "--data.dataset birds", "unknown", "Unknown FGVC dataset 'birds'"),
    _option("ImageNetDataModule", "--data.variant imagenet_z", "unknown", "Unknown ImageNet test set 'imagenet_z'"),
    _option("ImageNetDataModule", "--data.variant imagenet_c-smog-3", "an unknown kind", "kind of ImageNet-C 'smog'"),
    _option("ImageNetDataModule", "--data.variant imagenet_c-fog-9", "a severity", "severity of ImageNet-C '9'"),
    _option("ImageNetDataModule", "--data.shifts [imagenet_1k]", "twice", "imagenet_1k is named twice"),
    _option("ImageNetDataModule", "--data.crop_border 3", "no yes or no", "crop_border"),
    _option("PetTrimapsDataModule", "--data.border x", "unknown", "border"),
    _option("PetTrimapsDataModule", "--data.train x", "unknown", "train"),
    _option("DigitsDataModule", "--data.train x", "an unknown list", "Unknown list 'x'"),
    _option("DigitsDataModule", "--data.val x", "an unknown list", "Unknown list 'x'"),
    _option("ShapesDataModule", "--data.label x", "unknown", "Unknown label of the shapes 'x'"),
    _option("ShapeScenesDataModule", "--data.test x", "an unknown list", "Unknown list 'x'"),
    _option("VTABDataModule", "--data.tusk x", "unknown", "'tusk' is not accepted"),
    _option("NoDataModule", "--data.root x", "unknown", "NoDataModule"),
    Row("data verify ''", "no name", "an empty argument after verify"),
    Row("data verify cifra", "misspelt", "Unknown dataset, folder or table"),
    Row("data verify photos --root nowhere", "not there", "argument --root: there is no folder 'nowhere'"),
    Row("data list --root nowhere", "not there", "argument --root: there is no folder 'nowhere'"),
    Row("data list --root photos/empty.csv", "a file", "argument --root: there is no folder 'photos/empty.csv'"),
    Row("data list photos", "of no effect", "unrecognized arguments: photos"),
    Row("data show kitty", "misspelt", "did you mean 'kitti'?"),
    Row("data show ../cards/kitti", "a path", "did you mean 'kitti'?"),
    Row("data show ''", "no name", "an empty argument after show"),
    Row("data prepare digits", "made here", "there is nothing to prepare"),
    Row("data prepare kitti --source ''", "no folder", "an empty argument after --source"),
    Row("data prepare kitty", "misspelt", "did you mean 'kitti'?"),
    Row("data prepare kitti --root photos/empty.csv", "a file", "empty.csv is a file: name a folder"),
    Row("data cache --clean", "unknown", "unrecognized arguments: --clean"),
    Row("data corruptions --out a.xyz", "no kind of figure", "Figures are written as .png, .svg or .pdf"),
    Row("data corruptions --out a.png --image photos", "a folder", "photos cannot be decoded (it is no file)"),
    Row("data corruptions --out a.png --image none.jpg", "not there", "none.jpg does not exist"),
    Row("data corruptions --out a.png --image zero/train/cat/0.jpg", "an empty image", "0.jpg is not an image"),
    Row("data corruptions --out a.png --image /dev/zero", "a device that never ends", "/dev/zero cannot be decoded"),
    Row(
        "data corruptions --out a.png --image bomb/train/cat/0.jpg",
        "huge",
        "it has more than 178,956,970",
    ),
    Row("configs dmeo.yaml", "misspelt", "did you mean 'demo.yaml'?"),
    Row("configs ''", "no name", "an empty argument after vpt configs"),
    Row("configs --copy photos/empty.csv", "a file", "empty.csv is a file: name a folder"),
    *(
        Row(f"attention --delta {{delta}} --out o.png --images {name}", wrong, says)
        for name, wrong, says in (
            ("none.jpg", "not there", "none.jpg"),
            ("zero/train/cat/0.jpg", "an empty image", "0.jpg is not an image"),
            ("cut/train/cat/0.jpg", "a truncated image", "0.jpg cannot be decoded"),
            ("lost/train/eel", "an empty folder", "There is no image in the folder lost/train/eel"),
            ("heic/train/eel", "other files", "(not read: 2 of 2 files (1 .heic, 1 dangling))"),
            ("/dev/zero", "a device that never ends", "/dev/zero"),
        )
    ),
]
