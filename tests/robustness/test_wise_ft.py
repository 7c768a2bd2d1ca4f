from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.robustness.fakes import CLASSES, PROMPTS, kept, task, write_delta, write_full
from vpt.backbones import Backbone, create_backbone
from vpt.data import ImageDataset
from vpt.errors import ConfigError, DeltaFileError
from vpt.models import TunedModel, load_classifier, save_delta
from vpt.models.delta_format import read_delta
from vpt.models.delta_format import write_delta as write_header
from vpt.robustness import RobustnessResult, run
from vpt.robustness.logit_records import read
from vpt.robustness.wise_ft import Interpolation, check_alike

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wise")


@pytest.fixture(scope="session")
def full(folder: Path) -> Path:
    return write_full(folder / "full.safetensors")


@pytest.fixture(scope="session")
def probe(folder: Path) -> Path:
    return write_delta(folder / "probe.safetensors", (), seed=1)


@pytest.fixture(scope="session")
def linear(folder: Path) -> Path:
    return write_delta(folder / "linear.safetensors", (), seed=2)


def measure(delta: Path, out: Path, alphas: tuple[float, ...] = ALPHAS, **changes: Any) -> RobustnessResult:
    arguments: dict[str, Any] = {"data": task(), "severities": (), "batch_size": 4} | changes
    return run(delta, alphas=alphas, out=out, **arguments)


@pytest.fixture(scope="session")
def whole(full: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep end to end that tests read and leave as it is."""
    out = tmp_path_factory.mktemp("whole")
    measure(full, out, anchor=probe)
    return out


def logits(out: Path, alpha: float, name: str = "clean") -> np.ndarray[Any, Any]:
    return read(kept(out, f"{name}-alpha-{alpha}")).logits


def clean() -> Tensor:
    return torch.stack([task().split("test")[i]["image"] for i in range(10)])


numbers = st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=4, max_size=4)


@given(first=numbers, last=numbers)
def test_the_ends_come_back_bit_for_bit(first: list[float], last: list[float]) -> None:
    start, end = {"w": torch.tensor(first)}, {"w": torch.tensor(last)}
    target = {"w": torch.zeros(4)}
    line = Interpolation(target, start, end)
    for alpha, expected in ((0.0, start), (0.3, None), (1.0, end), (0.0, start)):
        line.set_alpha(alpha)
        if expected is not None:
            assert torch.equal(target["w"].view(torch.int32), expected["w"].view(torch.int32))


def test_between_the_ends_is_equation_1_and_nothing_drifts() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = ({"w": torch.randn(50, dtype=torch.float64, generator=generator)} for _ in range(2))
    target = {"w": torch.empty(50, dtype=torch.float64)}
    line = Interpolation(target, start, end)
    for alpha in (0.1, 0.9, 0.5, 0.1):
        line.set_alpha(alpha)
        torch.testing.assert_close(target["w"], (1 - alpha) * start["w"] + alpha * end["w"], rtol=1e-14, atol=1e-14)


def test_only_what_differs_moves_and_its_storage_stays() -> None:
    start = {"same": torch.ones(3), "moved": torch.zeros(2)}
    end = {"same": torch.ones(3), "moved": torch.ones(2)}
    target = {key: torch.full_like(tensor, 7.0) for key, tensor in start.items()}
    pointers = {key: tensor.data_ptr() for key, tensor in target.items()}
    line = Interpolation(target, start, end)
    assert target["same"].tolist() == [1, 1, 1]
    target["same"].zero_()
    line.set_alpha(0.5)
    assert target["same"].tolist() == [0, 0, 0]  # not written again
    assert target["moved"].tolist() == [0.5, 0.5]
    assert {key: tensor.data_ptr() for key, tensor in target.items()} == pointers


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"a": torch.zeros(2)}, "Only the first of two models holds b"),
        ({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, "Only the second of two models holds c"),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"'a' has shape \(2,\) in one model and \(3,\) in another"),
        ({"a": torch.zeros(2).half(), "b": torch.zeros(1)}, "'a' is torch.float32 in one model and torch.float16"),
    ],
)
def test_models_of_two_kinds_are_refused_by_the_tensor_that_differs(theirs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_alike({"a": torch.zeros(2), "b": torch.zeros(1)}, theirs)


def swin() -> dict[str, Tensor]:
    """A Swin as older versions of timm stored it, with its window index among the tensors."""
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8}
    model = timm.models.SwinTransformer(**shape, depths=(2, 2), num_heads=(2, 2), num_classes=0)
    for module in model.modules():
        module._non_persistent_buffers_set.discard("relative_position_index")
    return dict(model.state_dict())


def test_integers_stay_what_they_are_and_must_be_equal() -> None:
    start = swin()
    integers = {key: tensor.clone() for key, tensor in start.items() if not tensor.is_floating_point()}
    assert any(key.endswith("relative_position_index") for key in integers)
    end = {k: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t.clone() for k, t in start.items()}
    target = {key: tensor.clone() for key, tensor in end.items()}
    line = Interpolation(target, start, end)
    for alpha in (0.05, 0.1, 0.35, 0.9):  # a lerp of floats is cut to other integers here
        line.set_alpha(alpha)
        assert all(torch.equal(target[key], tensor) for key, tensor in integers.items())
    name = next(iter(integers))
    end[name][0, 0] += 1
    with pytest.raises(ConfigError, match=r"relative_position_index' \(torch.int64\) differs between two models"):
        Interpolation(target, start, end)


def test_the_ends_of_a_sweep_are_the_pretrained_and_the_tuned_model(full: Path, probe: Path, tmp_path: Path) -> None:
    result = measure(full, tmp_path, anchor=probe, batch_size=10)
    assert {row.alpha for row in result.rows} == set(ALPHAS)
    assert (result.protocol["way"], result.protocol["head"]) == ("end-to-end", "interpolated")
    with torch.no_grad():
        assert np.array_equal(logits(tmp_path, 0.0), load_classifier(probe)(clean()).numpy())
        assert np.array_equal(logits(tmp_path, 1.0), load_classifier(full)(clean()).numpy())


@pytest.mark.parametrize("name", ["vit_nano_patch8_64", "swin_nano_patch4_window8_64"])
def test_the_models_that_ship_are_swept_end_to_end(name: str, tmp_path: Path) -> None:
    files: list[Path] = []
    for kind in ("full", "probe"):
        torch.manual_seed(len(files))
        model = TunedModel(create_backbone(name), len(CLASSES), (), CLASSES, task().preset.to_dict())
        if kind == "full":
            model.backbone.unfreeze()
            with torch.no_grad():
                for tensor in model.owned().values():
                    tensor.add_(torch.randn_like(tensor), alpha=0.02)
        files.append(save_delta(tmp_path / f"{kind}.safetensors", model))
    measure(files[0], tmp_path, anchor=files[1], alphas=(0.0, 0.5, 1.0), data=task(n=4, shift=None))
    with torch.no_grad():
        for alpha, file in ((1.0, files[0]), (0.0, files[1])):
            assert np.array_equal(logits(tmp_path, alpha), load_classifier(file)(clean()[:4]).numpy())
    assert not np.allclose(logits(tmp_path, 0.5), logits(tmp_path, 1.0), atol=1e-4)


def test_a_sweep_equals_a_model_built_anew_for_each_alpha(full: Path, probe: Path, whole: Path) -> None:
    end, start = load_classifier(full), load_classifier(probe)
    first, last = start.state_dict(), end.state_dict()
    for alpha in (0.25, 0.5, 0.75):
        merged = {key: torch.lerp(first[key], last[key], alpha) for key in last}
        model = load_classifier(full)
        model.load_state_dict(merged)
        with torch.no_grad():
            expected = model(clean()).numpy()
        np.testing.assert_allclose(logits(whole, alpha), expected, rtol=1e-4, atol=1e-5)


def test_a_sweep_decodes_each_image_once(
    full: Path, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = ImageDataset.__getitem__

    def counted(self: ImageDataset, item: int) -> Any:
        seen.append(item)
        return original(self, item)

    monkeypatch.setattr(ImageDataset, "__getitem__", counted)
    measure(full, tmp_path, anchor=probe)
    assert seen == [*range(6), *range(10), *range(5)]


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batch_size_does_not_change_a_sweep(size: int, full: Path, probe: Path, whole: Path, tmp_path: Path) -> None:
    measure(full, tmp_path, alphas=(0.0, 0.5, 1.0), anchor=probe, batch_size=size)
    for alpha in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(logits(tmp_path, alpha), logits(whole, alpha), rtol=1e-4, atol=1e-4)


def test_workers_seed_and_company_do_not_change_a_sweep(full: Path, probe: Path, whole: Path, tmp_path: Path) -> None:
    other = task()
    other.num_workers, other.batch_size, other.seed = 2, 3, 9  # of the loaders
    measure(full, tmp_path / "loaders", anchor=probe, data=other)
    measure(full, tmp_path / "few", anchor=probe, max_images=5)
    for path in sorted((whole / "records").iterdir()):
        every, again = read(path), read(tmp_path / "loaders" / "records" / path.name)
        assert np.array_equal(every.logits, again.logits)
        assert every.protocol == again.protocol
        few = read(kept(tmp_path / "few", path.stem.rpartition("-")[0]))
        np.testing.assert_allclose(few.logits, every.logits[few.index], rtol=1e-4, atol=1e-4)


def dying(after: int) -> Callable[[TunedModel, Tensor], Tensor]:
    calls = 0
    original = TunedModel.forward

    def forward(self: TunedModel, images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return original(self, images)

    return forward


@pytest.mark.parametrize("after", [3, 14, 25])
def test_a_killed_sweep_continues_to_equal_records(
    after: int, full: Path, probe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TunedModel, "forward", dying(after))
        with pytest.raises(KeyboardInterrupt):
            measure(full, tmp_path / "cut", anchor=probe)
    measure(full, tmp_path / "cut", anchor=probe)
    for path in sorted((whole / "records").iterdir()):
        assert np.array_equal(read(path).logits, read(tmp_path / "cut" / "records" / path.name).logits)


def test_a_random_head_is_no_end(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="drawn at random: give --anchor"):
        measure(full, tmp_path)
    alone = measure(full, tmp_path, alphas=(1.0,))
    assert ({row.alpha for row in alone.rows}, alone.protocol["way"]) == ({1.0}, "none")


def test_ends_on_different_backbones_are_refused(full: Path, probe: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = write_delta(tmp_path / "other" / "probe.safetensors", ())
    header, _ = read_delta(stranger)
    path = Path(header["backbone"]["weights"])
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
    model = TunedModel(create_backbone("test_vit", str(path), 64), 3, (), CLASSES, task().preset.to_dict())
    save_delta(stranger, model)
    with pytest.raises(ConfigError, match="other backbone weights than the delta"):
        measure(full, tmp_path, anchor=stranger)
    with pytest.raises(DeltaFileError, match="give the weights it was trained on"):
        measure(full, tmp_path, anchor=probe, weights=str(path))


def test_a_tensor_that_is_missing_from_a_file_is_named(full: Path, probe: Path, tmp_path: Path) -> None:
    header, tensors = read_delta(full)
    del tensors["backbone.model.norm.weight"]
    broken = write_header(tmp_path / "broken.safetensors", header, tensors)
    with pytest.raises(DeltaFileError, match=r"is incomplete: backbone\.model\.norm\.weight missing"):
        measure(broken, tmp_path, anchor=probe)


def test_where_only_the_head_differs_each_image_passes_once(
    linear: Path, probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = 0
    original = Backbone.pooled

    def counted(self: Backbone, images: Tensor) -> Tensor:
        nonlocal passed
        passed += len(images)
        return original(self, images)

    monkeypatch.setattr(Backbone, "pooled", counted)
    result = measure(linear, tmp_path, anchor=probe)
    assert passed == 6 + 6 + 10 + 5
    assert result.protocol["way"] == "head"
    assert {row.alpha for row in result.rows} == set(ALPHAS)
    ends = {kept(tmp_path, f"clean-alpha-{alpha}") for alpha in (0.0, 1.0)}
    assert set((tmp_path / "records").glob("clean*")) == ends


def test_a_head_between_two_heads_equals_brute_force(linear: Path, probe: Path, tmp_path: Path) -> None:
    result = measure(linear, tmp_path, anchor=probe)
    model, other = load_classifier(linear), load_classifier(probe)
    labels = task().split("test").labels
    for row in (row for row in result.rows if row.set == "clean"):
        with torch.no_grad():
            head = [
                torch.lerp(a, b, row.alpha) for a, b in zip(*(m.head.parameters() for m in (other, model)), strict=True)
            ]
            answers = torch.nn.functional.linear(model.backbone(clean()), *head).argmax(1).numpy()
        assert row.top1 == pytest.approx((answers == labels).mean())


def test_equal_backbones_leave_only_the_head_to_move(probe: Path, folder: Path, tmp_path: Path) -> None:
    still = write_full(folder / "still.safetensors", scale=0.0)
    assert measure(still, tmp_path / "line", anchor=probe).protocol["way"] == "head"
    assert measure(still, tmp_path / "end", (1.0,)).protocol["way"] == "none"


def test_last_blocks_run_alone_for_each_alpha(
    probe: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = write_delta(folder / "partial.safetensors", ({"name": "partial", "blocks": 1},))
    model, passed = load_classifier(partial), 0
    original = Backbone.before_block

    def counted(self: Backbone, images: Tensor, block: int) -> Tensor:
        nonlocal passed
        passed += len(images)
        return original(self, images, block)

    monkeypatch.setattr(Backbone, "before_block", counted)
    measure(partial, tmp_path, anchor=probe, batch_size=10, alphas=(0.0, 0.5, 1.0))
    assert passed == 6 + 6 + 10 + 5
    with torch.no_grad():
        np.testing.assert_allclose(logits(tmp_path, 1.0), model(clean()).numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits(tmp_path, 0.0), load_classifier(probe)(clean()).numpy(), rtol=1e-5, atol=1e-5)


def test_a_start_of_the_same_kind_takes_the_place_of_the_backbone(probe: Path, folder: Path, tmp_path: Path) -> None:
    end = write_delta(folder / "end.safetensors", PROMPTS, seed=3)
    begin = write_delta(folder / "begin.safetensors", PROMPTS, seed=4)
    result = measure(end, tmp_path, start=begin, batch_size=10)
    assert result.protocol["way"] == "end-to-end"
    with torch.no_grad():
        assert np.array_equal(logits(tmp_path, 0.0), load_classifier(begin)(clean()).numpy())
        assert np.array_equal(logits(tmp_path, 1.0), load_classifier(end)(clean()).numpy())
        middle = load_classifier(end)
        state = {k: torch.lerp(t, middle.state_dict()[k], 0.5) for k, t in load_classifier(begin).state_dict().items()}
        middle.load_state_dict(state)
        np.testing.assert_allclose(logits(tmp_path, 0.5), middle(clean()).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="has another delta"):
        measure(end, tmp_path, start=probe)
