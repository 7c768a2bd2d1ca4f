"""Deltas register themselves, and a spec means the same however it is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vpt
from vpt.backbones import Backbone, create_backbone
from vpt.deltas import DELTAS, DeltaPart, DeltaSpec, registry
from vpt.deltas.registry import read_specs, register_delta
from vpt.errors import ConfigError, UnknownNameError
from vpt.models import TunedModel, save_delta

NANO = "vit_nano_patch8_64"
PLUGIN = """
from vpt.deltas import DeltaPart, register_delta

@register_delta("from_elsewhere")
class Elsewhere(DeltaPart):
    def __init__(self, backbone):
        super().__init__(backbone)

    def expected_parameters(self):
        return 0
"""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten behind it."""
    kept = dict(registry._REGISTERED)
    monkeypatch.setattr(registry, "_REGISTERED", kept)


class Gain(DeltaPart):
    """A gain on the pooled features, with running statistics that no parameter is."""

    def __init__(self, backbone: Backbone, start: float = 1.0, names: Sequence[str] = ("a",)) -> None:
        super().__init__(backbone)
        self.gain = nn.Parameter(backbone.mean.new_full((backbone.num_features,), start))
        self.register_buffer("seen", backbone.mean.new_zeros(1))
        self.names = names

    def hooks(self) -> Iterator[Any]:
        yield self.backbone.readout.register_forward_hook(lambda module, args, out: out * self.gain)

    def expected_parameters(self) -> int:
        return self.gain.numel()


def test_a_delta_of_ones_own_is_attached_saved_and_loaded(tmp_path: Path) -> None:
    assert register_delta("gain")(Gain) is Gain
    model = TunedModel(create_backbone(NANO), 2, [{"name": "gain", "start": 2}]).eval()
    with torch.no_grad():
        model.owned()["delta.parts.0.seen"].fill_(7.0)
    loaded = vpt.load(save_delta(tmp_path / "delta.safetensors", model))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert loaded.owned()["delta.parts.0.seen"] == 7.0
    assert loaded.delta is not None
    assert loaded.delta.specs == [{"name": "gain", "start": 2.0, "names": ["a"]}]


def test_a_name_is_given_once() -> None:
    with pytest.raises(
        ConfigError, match=r"'prompt' is vpt\.deltas\.prompts\.prompt\.Prompt already: choose another name"
    ):
        register_delta("prompt")(Gain)


def test_what_cannot_be_built_from_a_spec_is_not_registered() -> None:
    class Greedy(Gain):
        def __init__(self, backbone: Backbone, **options: Any) -> None:
            super().__init__(backbone, **options)

    class Blind(Gain):
        def __init__(self) -> None:
            pass

    for strange in (Greedy, Blind):
        with pytest.raises(ConfigError, match="must take backbone first and then arguments that have names"):
            register_delta("strange")(strange)
    with pytest.raises(ConfigError, match=r"no class that is derived from vpt\.deltas\.DeltaPart"):
        register_delta("strange")(nn.Linear)  # type: ignore[type-var]


def test_a_type_that_no_configuration_has_is_named() -> None:
    class Typed(Gain):
        def __init__(self, backbone: Backbone, shape: torch.Size) -> None:
            super().__init__(backbone)

    register_delta("typed")(Typed)
    with pytest.raises(ConfigError, match=r"shape of delta 'typed' must be of type .*Size.* no configuration can hold"):
        DeltaSpec.read({"name": "typed", "shape": [1]})


def test_deltas_of_other_packages_are_found_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vpt_elsewhere.py").write_text(PLUGIN)
    info = tmp_path / "vpt_elsewhere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vpt-elsewhere\nVersion: 1\n")
    entries = "from_elsewhere = vpt_elsewhere:Elsewhere\nbroken = vpt_no_such_module\n"
    (info / "entry_points.txt").write_text(f"[vpt.deltas]\n{entries}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "from_elsewhere" not in registry._REGISTERED
    assert DeltaSpec.read({"name": "from_elsewhere"}).plain() == {"name": "from_elsewhere"}
    sys.modules.pop("vpt_elsewhere")
    with pytest.raises(ConfigError, match="'broken' cannot be imported from vpt_no_such_module"):
        DeltaSpec.read({"name": "broken"})


def test_the_names_can_be_read_and_not_written() -> None:
    assert DELTAS["prompt"].__name__ == "Prompt"
    with pytest.raises(TypeError):
        DELTAS["other"] = Gain  # type: ignore[index]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"name": "lora", "layers": (0, 3)}, {"name": "lora", "layers": [0, 3]}),
        ({"name": "lora"}, {"name": "lora", "rank": 8, "scale": None, "targets": ["q", "v"], "layers": None}),
        ({"name": "adapter", "factor": 1}, {"name": "adapter"}),
        ({"name": "lora", "scale": 3}, {"scale": 3.0, "name": "lora"}),
        ({"name": "prompt", "num_tokens": (1, 2)}, {"num_tokens": [1, 2], "dropout": 0, "name": "prompt"}),
    ],
)
def test_what_means_the_same_is_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert DeltaSpec.read(one) == DeltaSpec.read(other)
    plain = DeltaSpec.read(one).plain()
    assert list(plain.items()) == list(DeltaSpec.read(other).plain().items())
    assert DeltaSpec.read(plain) == DeltaSpec.read(DeltaSpec.read(one).brief()) == DeltaSpec.read(one)


def test_a_reader_is_told_what_is_special() -> None:
    assert DeltaSpec.read({"name": "lora", "rank": 8, "layers": (0, 2)}).brief() == {"name": "lora", "layers": [0, 2]}


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ({"nam": "linear"}, r"A part of a delta is a dict with a name, .* got {'nam': 'linear'}"),
        ({}, "A part of a delta is a dict with a name"),
        (3, "A delta is a list of its parts, .* got 3"),
        (None, "A delta is a list of its parts"),
        ("prompt", "Delta 'prompt' needs num_tokens"),
        ([""], "A part of a delta is a dict with a name, .* got ''"),
        ([None], "A part of a delta is a dict with a name"),
        ([{}], "A part of a delta is a dict with a name"),
        ([{"name": 3}], "A part of a delta is a dict with a name"),
        ([], "An empty delta changes nothing"),
        ([{"name": "prompt"}], "Delta 'prompt' needs num_tokens"),
        ([{"name": "prompt", "num_tokens": "4"}], "num_tokens of delta 'prompt' must be a whole number or a list"),
        ([{"name": "prompt", "num_tokens": True}], "num_tokens of delta 'prompt' must be a whole number or a list"),
        ([{"name": "adapter", "factor": float("nan")}], "factor of delta 'adapter' must be a number, got nan"),
        ([{"name": "adapter", "factor": 10**400}], "factor of delta 'adapter' must be a number, got 1000"),
        ([{"name": "lora", "targets": "q"}], "targets of delta 'lora' must be a list"),
    ],
)
def test_specs_that_are_none_are_refused_in_a_sentence(specs: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        vpt.attach(create_backbone(NANO, "random"), specs)


@pytest.mark.parametrize("specs", ["lora", ["lora"], {"name": "lora"}])
def test_a_name_or_a_part_alone_is_the_list_that_a_config_has(specs: Any) -> None:
    assert vpt.attach(create_backbone(NANO, "random"), specs).specs == [
        spec.plain() for spec in read_specs([{"name": "lora"}])
    ]


def test_an_argument_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownNameError, match="argument of delta 'lora' 'rnk': did you mean 'rank'"):
        read_specs([{"name": "lora", "rnk": 3}])
