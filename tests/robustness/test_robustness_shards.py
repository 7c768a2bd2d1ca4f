"""Shards of an evaluation, put together to what one process writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.robustness.fakes import PROMPTS, task, write_delta
from vpt.data import ImageDataset
from vpt.errors import ConfigError
from vpt.robustness import RobustnessResult, run, run_shard
from vpt.sharding import Shard

OPTIONS: dict[str, Any] = {"severities": (2,), "corruptions": ("gaussian_noise",), "batch_size": 4}


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_delta(tmp_path_factory.mktemp("delta") / "prompts.safetensors", PROMPTS)


@pytest.fixture(scope="module")
def whole(delta: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    run(delta, task(), (0.0, 1.0), out, **OPTIONS)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def share(number: int, count: int, delta: Path, out: Path, **changes: Any) -> RobustnessResult | None:
    return run_shard(Shard(number, count), delta, task(), (0.0, 1.0), out, **OPTIONS | changes)


@pytest.mark.parametrize("order", [(1,), (2, 1), (3, 1, 2), (5, 2, 4, 1, 3)])
def test_the_last_shard_leaves_the_files_of_one_process(
    delta: Path, whole: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]
) -> None:
    """10 test images, 6 of validation and 5 of a shift in batches of 4: no set has work for five shards."""
    for number in order[:-1]:
        assert share(number, len(order), delta, tmp_path) is None
        assert not (tmp_path / "robustness.json").exists()
    result = share(order[-1], len(order), delta, tmp_path)
    assert result is not None
    assert result.rows == RobustnessResult.read(tmp_path).rows
    assert files(tmp_path) == whole


def test_an_interrupted_shard_goes_on_and_a_finished_one_answers_nothing(
    delta: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = ImageDataset.__getitem__, list[int]()

    def stopping(self: ImageDataset, item: int) -> Any:
        seen.append(item)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return original(self, item)

    monkeypatch.setattr(ImageDataset, "__getitem__", stopping)
    with pytest.raises(KeyboardInterrupt):
        share(2, 2, delta, tmp_path)
    assert share(2, 2, delta, tmp_path) is None
    assert seen == [4, 5, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 9, 4]
    seen.clear()
    assert share(2, 2, delta, tmp_path) is None
    assert seen == []
    monkeypatch.undo()
    assert share(1, 2, delta, tmp_path) is not None
    assert files(tmp_path) == whole


def test_shards_of_other_work_are_refused(delta: Path, tmp_path: Path) -> None:
    other = write_delta(tmp_path / "other.safetensors", PROMPTS, seed=3)
    out = tmp_path / "out"
    assert share(1, 2, delta, out) is None
    before = files(out)
    for number, count, file, changes, told in (
        (1, 3, delta, {}, "shards 2 then, 3 now"),
        (2, 2, delta, {"batch_size": 5}, "batch_size 4 then, 5 now"),
        (2, 2, delta, {"severities": (2, 3)}, "records differs"),
        (2, 2, delta, {"max_images": 4}, "max_images None then, 4 now"),
        (2, 2, other, {}, "delta differs"),
    ):
        with pytest.raises(ConfigError, match=told):
            share(number, count, file, out, **changes)
    with pytest.raises(ConfigError, match="data differs"):
        run_shard(Shard(2, 2), delta, task(11), (0.0, 1.0), out, **OPTIONS)
    with pytest.raises(ConfigError, match="records differs"):
        run_shard(Shard(2, 2), delta, task(), (0.0, 0.5, 1.0), out, **OPTIONS)
    with pytest.raises(ConfigError, match="a stream of images"):
        share(2, 2, delta, out, adapt="entropy")
    assert files(out) == before
