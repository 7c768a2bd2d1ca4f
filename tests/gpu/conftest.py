"""Each test of this folder runs on the processor, in every suite, and under the mark `gpu` on a card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where to compute, in whole single precision: convolutions on a card would round to ten bits."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a card: PyTorch sees no CUDA device")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device(request.param)
