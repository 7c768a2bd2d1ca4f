"""Every test runs offline, on one thread, with caches of its own."""

from __future__ import annotations

import os

# Before anything imports Hugging Face, albumentations or torch, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings

from tests.fakes import make_task

mpl.use("agg")
settings.register_profile("house", deadline=None)  # a machine may be busy
settings.load_profile("house")
torch.set_num_threads(1)
_REAL_DATA = os.environ.get("VPT_DATA")


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("VPT_DATA", raising=False)
        yield


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test has the seed of a run before it, nor the threads: they wait for each other on a busy machine."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and images."""
    if not _REAL_DATA:
        pytest.skip("needs real weights and images: set VPT_DATA to the folder that holds weights/ and the tasks")
    folder = Path(_REAL_DATA).resolve()
    if not (folder / "weights").is_dir():
        pytest.skip(f"needs real weights: VPT_DATA={_REAL_DATA} holds no weights/")
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The folder of a fresh fake task with three classes and one shift."""
    return make_task(tmp_path / "fake", shifts=["sepia"])
