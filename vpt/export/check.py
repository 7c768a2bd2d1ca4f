"""Whether a file is the function that it was written from, and how fast it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.errors import ExportError
from vpt.tuning.model import TunedModel

TOLERANCE = 1e-4
_BATCHES = (1, 3)  # one image is the size at which exporters specialise, three is none that they have seen
_REPEATS = 9

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """What was measured on a written file.

    Attributes:
        difference: max |Δ logit| / max |logit| over random images.
        milliseconds: By batch size, medians of the eager model and of the file.
    """

    difference: float
    milliseconds: dict[int, tuple[float, float]]

    def __str__(self) -> str:
        """One line for the terminal."""
        times = (
            f"batch {batch}: {eager:.1f} ms eager, {own:.1f} ms exported"
            for batch, (eager, own) in self.milliseconds.items()
        )
        return f"largest difference {self.difference:.1e} of the largest logit; {'; '.join(times)}"


@torch.inference_mode()
def check(model: TunedModel, run: Run) -> Check:
    """Compares a written file with the model that it was written from, on random images at two batch sizes.

    Args:
        model: In eval mode.
        run: Runs the file: uint8 images (B, 3, H, W) to logits (B, classes).

    Returns:
        What was measured.

    Raises:
        ExportError: The logits differ by more than `TOLERANCE` of the largest.
    """
    generator = torch.Generator().manual_seed(0)
    size = model.backbone.image_size
    worst, milliseconds = 0.0, {}
    for batch in _BATCHES:
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        expected = model(images)
        gap = (run(images) - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
        if not float(gap) <= TOLERANCE:  # so that NaN fails too
            raise ExportError(
                f"On {batch} random images the exported file's logits differ by {float(gap):.1e} of the largest logit, "
                f"more than {TOLERANCE:.0e}: nothing was written; please report this composition."
            )
        worst = max(worst, float(gap))
        milliseconds[batch] = _interleaved(model, run, images)
    return Check(worst, milliseconds)


def _interleaved(model: Run, run: Run, images: Tensor) -> tuple[float, float]:
    """Medians in ms, one call of each in turn, so that both see the same load of the machine."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(_REPEATS):
        for call, own in zip((model, run), spent, strict=True):
            start = time.perf_counter()
            call(images)
            own.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent[0]), statistics.median(spent[1])
