"""A compiled model is the eager one: the same numbers at every strength, files, copies and figures."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deltas.families import images, make, relative
from vpt.backbones import class_attention, extra_shares, recording
from vpt.backbones.compilation import compile_for
from vpt.errors import ConfigError
from vpt.models import TunedModel
from vpt.models.segmenter import DenseModel
from vpt.visualize.layer_features import layer_features

BOTH = [{"name": "prompt", "num_tokens": 3}, {"name": "lora", "rank": 2}]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that runs graphs as they are, and counts how many there are and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def model(specs: list[dict[str, Any]] = BOTH, family: str = "vit") -> TunedModel:
    backbone, _ = make(family)
    torch.manual_seed(1)
    built = TunedModel(backbone, 4, specs).double().eval()
    for parameter in () if built.delta is None else built.delta.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


def step(of: TunedModel, x: Tensor) -> list[Tensor]:
    """Logits, and the gradient of each trained tensor."""
    logits = of(x)
    return [logits, *torch.autograd.grad(logits.square().sum(), [p for p in of.parameters() if p.requires_grad])]


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_every_strength_after_compiling_is_the_eager_one(family: str) -> None:
    eager, x, backend = model(family=family), images(family), Counting()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    strengths: list[Any] = [1.0, 0.0, 0.5, [0.0, 1.0], 1.0]
    seen = []
    for strength in strengths if family == "vit" else strengths[1:3]:
        eager.set_strength(strength)
        compiled.set_strength(strength)
        before = backend.runs
        found, expected = (each(x).detach() for each in (compiled, eager))
        assert backend.runs > before
        assert relative(found, expected) <= 1e-12
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1])


def test_gradients_are_those_of_the_eager_model() -> None:
    eager, x = model(), images()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager")
    for one, other in zip(step(compiled, x), step(eager, x), strict=True):
        assert relative(one, other) <= 1e-12


def test_what_is_attached_or_detached_after_compiling_counts() -> None:
    eager, x, backend = model(), images(), Counting()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    tuned = compiled(x)
    for each in (eager, compiled):
        assert each.delta is not None
        each.delta.detach()
    bare = compiled(x)
    assert relative(bare, eager(x)) <= 1e-12
    assert relative(bare, tuned) > 1e-3
    assert compiled.delta is not None
    compiled.delta.attach()
    assert relative(compiled(x), tuned) <= 1e-12
    assert backend.graphs >= 2


def test_the_halves_of_kept_features_and_the_map_of_patches_run_compiled() -> None:
    x, backend = images(), Counting()
    part = model([{"name": "lora", "rank": 2, "layers": [1, 3]}])
    halves = part.constant_part()
    assert halves is not None
    expected = halves[1](halves[0](x))
    part.compile(backend=backend)
    kept = halves[0](x)
    assert backend.runs == 1
    assert relative(halves[1](kept), expected) <= 1e-12
    assert backend.runs == 2
    dense = DenseModel(make("vit")[0], 3, [{"name": "lora", "rank": 2}]).double().eval()
    plain = dense(x)
    dense.compile(backend=backend)
    assert relative(dense(x), plain) <= 1e-12
    assert backend.runs == 3


def test_names_stay_and_copies_are_not_compiled() -> None:
    own, x, backend = model(), images(), Counting()
    names = list(own.state_dict())
    own.compile(backend=backend)
    expected, runs = own(x), backend.runs
    assert list(own.state_dict()) == names
    assert [name for name, _ in own.named_modules() if "_orig_mod" in name] == []
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):  # noqa: S301  # our own
        assert relative(twin(x), expected) <= 1e-12
        assert twin.delta is not None
        nn.init.zeros_(next(iter(twin.delta.parameters())))
        assert relative(own(x), expected) <= 1e-12
    assert backend.runs == runs + 2  # of `own` alone


def test_figures_look_into_an_eager_pass() -> None:
    eager, x = model(), images()
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="eager")
    compiled(x)
    for ours, theirs in zip(class_attention(compiled.backbone, x), class_attention(eager.backbone, x), strict=True):
        assert ours.prompts.shape[-1] == 3
        assert torch.equal(ours.prompts, theirs.prompts)
    for share, other in zip(extra_shares(compiled.backbone, x), extra_shares(eager.backbone, x), strict=True):
        assert torch.equal(share.share, other.share)
    for features, plain in zip(layer_features(compiled, x), layer_features(eager, x), strict=True):
        assert (features == plain).all()
    with recording(compiled.backbone) as calls:
        compiled(x)
    assert len(calls) == 3


def test_images_are_still_looked_at() -> None:
    compiled, x = model(), images()
    compiled.compile(backend="eager")
    compiled(x)
    with pytest.raises(ConfigError, match="Images hold NaN"):
        compiled(x * torch.nan)
    with pytest.raises(ConfigError, match=r"Images of floats lie in \[0, 1\]"):
        compiled(2 * x)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor_draws_the_same_dropout_and_rounds_alone() -> None:
    eager = model([{"name": "prompt", "num_tokens": 3, "dropout": 0.5}]).float().train()
    x, compiled = images().float(), copy.deepcopy(eager)
    compiled.compile()
    found = []
    for each in (compiled, eager):
        torch.manual_seed(3)
        found.append(step(each, x))
    for one, other in zip(*found, strict=True):
        assert relative(one, other) <= 1e-4


def test_a_missing_compiler_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            raise RuntimeError("\n  InvalidCxxCompiler: no working compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    own = model()
    with pytest.raises(ConfigError) as refused:
        compile_for(own, torch.device("cpu"))
    assert str(refused.value) == (
        "Nothing can be compiled for cpu here (InvalidCxxCompiler: no working compiler): install a compiler (g++ for a "
        "CPU), or leave compile out."
    )
    assert own.backbone._compiled is None
