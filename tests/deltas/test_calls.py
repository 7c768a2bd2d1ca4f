"""Nothing of one call is kept on a module: threads, activation checkpointing and several forwards do not meet."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.deltas.families import images, make, relative
from vpt.backbones.factory import Backbone, create_backbone
from vpt.deltas import Delta, DeltaPart, attach
from vpt.deltas.base import Handle
from vpt.errors import ConfigError, UnsupportedBackboneError
from vpt.models import TunedModel
from vpt.models.segmenter import DenseModel

SHALLOW: dict[str, Any] = {"name": "prompt", "num_tokens": 3, "deep": False}
SPECS: dict[str, list[dict[str, Any]]] = {
    "deep": [{"name": "prompt", "num_tokens": 3}],
    "shallow": [SHALLOW],
    "two-shallow": [SHALLOW, SHALLOW],
    "shallow-adapter": [SHALLOW, {"name": "adapter", "rank": 3, "placement": "houlsby"}],
    "shallow-convpass": [SHALLOW, {"name": "convpass", "rank": 3}],
    "residual-adapter": [{"name": "adapter", "rank": 3, "placement": "parallel", "reads": "residual"}],
    "lora": [{"name": "lora", "rank": 3, "targets": ["q", "v", "fc1"]}],
    "low-rank": [{"name": name, "rank": 2} for name in ("dora", "vera", "fact", "glora", "rep_adapter")],
    "full": [{"name": "full"}],
}
FAMILIES = ["vit", "distilled", "eva02-fused", "rope-mixed", "beit-shared", "post-norm-token", "swin", "swinv2"]


def tuned(family: str, specs: list[dict[str, Any]]) -> tuple[Backbone, Delta]:
    backbone, _ = make(family)
    delta = attach(backbone, specs)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone, delta


def checkpointing(backbone: Backbone, on: bool) -> None:
    cast("Any", backbone.model).set_grad_checkpointing(on)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_forwards_before_one_backward_with_checkpointing_have_the_gradients_of_each(family: str, kind: str) -> None:
    backbone, delta = tuned(family, SPECS[kind])
    parameters = list(delta.parameters())
    one, other = images(family), images(family).flip(0)[:2]

    def loss() -> Tensor:
        outputs = backbone(one), backbone.tokens(one), 3 * backbone(other)
        return torch.stack([output.square().sum() for output in outputs]).sum()

    expected = torch.autograd.grad(loss(), parameters)
    checkpointing(backbone, True)
    found = torch.autograd.grad(loss(), parameters)
    assert all(relative(a, b) <= 1e-12 for a, b in zip(found, expected, strict=True) if b.norm() > 1e-12)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_threads_get_the_answers_of_their_own_images(family: str, kind: str) -> None:
    backbone, _ = tuned(family, SPECS[kind])
    batches = [images(family)[:1] * scale for scale in (0.2, 0.5, 0.9)] * 8
    with torch.no_grad():
        expected = [backbone(batch) for batch in batches]

    def answer(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return cast("Tensor", backbone(batch))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_graph_does_not_outlive_its_output(family: str, kind: str) -> None:
    backbone, delta = tuned(family, SPECS[kind])
    entered: list[weakref.ref[Tensor]] = []
    last = backbone.layout.blocks[-1]

    def note(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        entered.extend((weakref.ref(args[0]), weakref.ref(out)))

    with last.register_forward_hook(note):
        backbone(images(family)).sum().backward()
    gc.collect()
    assert len(entered) == 2
    assert [ref() for ref in entered] == [None, None]
    assert all(parameter.grad is not None for parameter in delta.parameters())


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_an_error_in_one_call_leaves_nothing_for_the_next(family: str) -> None:
    backbone, _ = tuned(family, SPECS["shallow-adapter"])
    expected = backbone(images(family))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with backbone.layout.blocks[1].register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
        backbone(images(family))
    assert torch.equal(backbone(images(family)), expected)


def test_what_an_adapter_holds_goes_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, delta = tuned("vit", SPECS["residual-adapter"])

    def fail(*_: object) -> None:
        raise MemoryError

    with cast("Any", backbone.layout.blocks[1]).mlp.register_forward_pre_hook(fail), pytest.raises(MemoryError):
        backbone(images("vit"))
    ref = weakref.ref(delta)
    del backbone, delta
    gc.collect()
    assert ref() is None


def test_what_another_package_raises_takes_everything_off_again() -> None:
    backbone, _ = make("vit")
    expected = backbone(images("vit"))

    class Faulty(DeltaPart):
        def hooks(self) -> Iterator[Handle]:
            yield self.backbone.readout.register_forward_hook(lambda module, args, out: 2 * out)
            raise ZeroDivisionError

        def expected_parameters(self) -> int:
            return 0

    with pytest.raises(ZeroDivisionError):
        Faulty(backbone).attach()
    assert torch.equal(backbone(images("vit")), expected)


@pytest.mark.parametrize(
    ("kind", "specs", "options"),
    [
        (TunedModel, [{"name": "prompt", "num_tokens": 2}], {"class_names": ["a"]}),
        (DenseModel, [{"name": "norm"}, {"name": "mlp_head"}], {}),
        (DenseModel, [{"name": "norm"}, {"name": "bias"}], {}),
    ],
)
def test_a_model_that_is_refused_leaves_its_backbone_as_it_was(kind: Any, specs: Any, options: Any) -> None:
    backbone, _ = make("avg-pool")
    expected = backbone(images("avg-pool"))
    with pytest.raises(ConfigError):
        kind(backbone, 3, specs, **options)
    assert torch.equal(backbone(images("avg-pool")), expected)
    assert (backbone.attached, backbone.reads_map) == ([], False)


def test_travelling_prompts_refuse_to_be_left_out_by_a_call_of_the_timm_model() -> None:
    backbone, _ = tuned("swin", [SHALLOW])
    with pytest.raises(ConfigError, match="where the Backbone is called"):
        backbone.model(images("swin"))


def test_an_unknown_model_keeps_none_of_its_callers_frames_alive() -> None:
    class Mine:
        pass

    def build() -> tuple[Backbone, weakref.ref[Mine]]:
        mine = Mine()
        return create_backbone("resnet18", "random"), weakref.ref(mine)

    backbone, ref = build()
    gc.collect()
    assert ref() is None
    for _ in range(2):
        with pytest.raises(UnsupportedBackboneError, match="Where ResNet attends is not known"):
            attach(backbone, [{"name": "prefix", "num_tokens": 1}])
