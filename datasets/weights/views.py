"""Augmented views of the allowed images, and what the teacher says of each.

The images are train800val200 of caltech101 and signdigits10 (2,000 in all) and generated pictures; nothing else is
read. Round 0 shows every photograph plain, later rounds crop, recolour and mix. One in twenty sources is held out:
its views, mixed only among themselves, draw the curve and never train.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pictures import SIZE, generate
from PIL import Image
from rich.progress import track
from sources import TASKS, normalize, read_list, squash, teacher
from timm.models import VisionTransformer
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

GENERATED = 300  # pictures a round
CHUNKS = 10  # files a round
STUDENT = 64  # pixels
GRID = 8  # the student's patches a side

_augment = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE, scale=(0.35, 1.0), ratio=(0.6, 1.67), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.6),
        v2.RandomGrayscale(0.1),
        v2.RandomApply([v2.GaussianBlur(9, (0.5, 3.0))], p=0.15),
    ]
)


@dataclass(frozen=True)
class Views:
    """A set of views in memory: uint8 ``images`` (N, 64, 64, 3) and the teacher's normed tokens in fp16.

    ``cls`` is (N, 192), ``patches`` (N, 64, 192): the 14 × 14 grid averaged to 8 × 8. ``held_out`` is bool (N,).
    """

    images: Tensor
    cls: Tensor
    patches: Tensor
    held_out: Tensor

    def __getitem__(self, rows: Tensor) -> Views:
        """Selects rows by index or mask."""
        return Views(self.images[rows], self.cls[rows], self.patches[rows], self.held_out[rows])


@lru_cache(maxsize=1)
def photographs() -> list[Path]:
    """The 2,000 allowed photographs, in list order."""
    return [path for task in TASKS for path in read_list(task, "train800val200")[0]]


def is_held_out(slot: int) -> bool:
    """Whether a source (photograph, or generated picture numbered from the last photograph on) is held out."""
    return slot % 20 == 7


def make_view(round_: int, slot: int) -> Image.Image:
    """Draws the view of source ``slot`` in round ``round_``, 224 × 224 pixels, the same at every call."""
    rng = np.random.default_rng((round_, slot))
    if round_ == 0 and slot < len(photographs()):
        return squash(photographs()[slot], SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        view = _single(rng, slot)
        kind = rng.random()
        return view if kind > 0.4 else _mix(rng, view, _single(rng, _partner(rng, slot)), blend=kind < 0.2)


def _partner(rng: np.random.Generator, slot: int) -> int:
    """Another photograph from the same side of the hold-out."""
    while is_held_out(other := int(rng.integers(len(photographs())))) != is_held_out(slot):
        pass
    return other


def _single(rng: np.random.Generator, slot: int) -> Image.Image:
    if slot < len(photographs()):
        source = Image.open(photographs()[slot]).convert("RGB")
    else:
        source = generate(rng, squash(photographs()[_partner(rng, slot)], SIZE))
    view: Image.Image = _augment(source)
    return view


def _mix(rng: np.random.Generator, view: Image.Image, other: Image.Image, blend: bool) -> Image.Image:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899); the teacher labels the mixture itself."""
    if blend:
        return Image.blend(view, other, rng.uniform(0.25, 0.5))
    width, height = (int(v) for v in rng.integers(SIZE // 4, 3 * SIZE // 4, 2))
    left, top = int(rng.integers(SIZE - width)), int(rng.integers(SIZE - height))
    box = (left, top, left + width, top + height)
    view.paste(other.crop(box), box)
    return view


@torch.inference_mode()
def _describe(model: VisionTransformer, slots: list[int], round_: int) -> dict[str, Tensor]:
    """Makes the views of ``slots`` and the teacher's tokens of them, as the tensors of one file."""
    views = [make_view(round_, slot) for slot in slots]
    small = [np.asarray(view.resize((STUDENT, STUDENT), Image.Resampling.BICUBIC)) for view in views]
    cls, patches = [], []
    for part in torch.split(torch.from_numpy(np.stack([np.asarray(view) for view in views])), 46):
        tokens = model.forward_features(normalize(part))
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (SIZE // 16, SIZE // 16))
        cls.append(tokens[:, 0].half())
        patches.append(F.adaptive_avg_pool2d(grid, GRID).flatten(2).transpose(1, 2).half())
    held_out = torch.tensor([is_held_out(slot) for slot in slots])
    images = torch.from_numpy(np.stack(small))
    return {"images": images, "cls": torch.cat(cls), "patches": torch.cat(patches), "held_out": held_out}


def make_views(work: Path, rounds: int) -> None:
    """Writes ``rounds`` rounds of views to ``work``; files that exist are kept, so that it can be interrupted.

    Args:
        work: Folder for ``views_RR_C.pt``, about 10 MB each.
        rounds: Rounds of 2,000 photographs and 300 pictures.
    """
    model = teacher()
    slots = list(range(len(photographs()) + GENERATED))
    todo = [(round_, chunk) for round_ in range(rounds) for chunk in range(CHUNKS)]
    for round_, chunk in track(todo, "views"):
        target = work / f"views_{round_:02d}_{chunk}.pt"
        if not target.exists():
            torch.save(_describe(model, slots[chunk::CHUNKS], round_), target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)


def load_views(work: Path, rounds: int) -> Views:
    """Reads the first ``rounds`` rounds back into memory."""
    files = [work / f"views_{round_:02d}_{chunk}.pt" for round_ in range(rounds) for chunk in range(CHUNKS)]
    parts = [torch.load(file, weights_only=True) for file in files]
    return Views(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]})
