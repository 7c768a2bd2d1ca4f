"""What holds for every delta: it trains, it counts, α = 1 and 0 are exact, and the backbone comes back bit for bit."""

from __future__ import annotations

from itertools import permutations
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.deltas.families import FAMILIES, SWINS, images, make, relative
from vpt.backbones.factory import Backbone, create_backbone
from vpt.deltas import DELTAS, Delta, attach
from vpt.deltas.adapters.adapter import Adapter
from vpt.deltas.base import MergeablePart
from vpt.deltas.low_rank.lora import Lora
from vpt.deltas.prompts.add_pad import PromptAdd, PromptPad
from vpt.errors import ConfigError, UnknownNameError, UnsupportedBackboneError
from vpt.models.classifier import TunedModel

SPECS: dict[str, dict[str, Any]] = {
    "prompt": {"name": "prompt", "num_tokens": 5},
    "prompt-shallow": {"name": "prompt", "num_tokens": 5, "deep": False},
    "prompt-projected": {"name": "prompt", "num_tokens": 5, "project": 7, "layers": [0, 2]},
    "prompt-gated": {"name": "prompt", "num_tokens": 5, "gate": {"init": -1.0}, "fourier": 0.4},
    "prompt-adaptive": {
        "name": "prompt",
        "num_tokens": 4,
        "adaptive": {"hidden": 3, "dropout": 0.0},
        "gate": {"init": -1.0},
    },
    "prompt-temperature": {"name": "prompt", "num_tokens": 5, "temperature": {"per": "head"}},
    "prompt-pruned": {"name": "prompt", "num_tokens": 3, "layers": [0, 2], "mask": ["x. .. xx", ".x .. .."]},
    "prompt-add": {"name": "prompt_add"},
    "prompt-add-deep": {"name": "prompt_add", "deep": True},
    "prompt-pad": {"name": "prompt_pad", "width": 3},
    "prefix": {"name": "prefix", "num_tokens": 5},
    "prefix-mlp": {"name": "prefix", "num_tokens": 5, "hidden": 7},
    "prefix-shared": {"name": "prefix", "num_tokens": 5, "shared": True, "gate": {"per": "block", "init": -1.0}},
    "lora": {"name": "lora", "rank": 3, "targets": ["q", "k", "v", "proj", "fc2"]},
    "dora": {"name": "dora", "rank": 3, "targets": ["q", "k", "v", "proj", "fc2"]},
    "vera": {"name": "vera", "rank": 30, "targets": ["q", "k", "v", "proj", "fc2"]},
    "mlae": {"name": "mlae", "rank": 3, "dropout": 0.0, "targets": ["q", "k", "v", "proj", "fc2"]},
    "pvera": {"name": "pvera", "rank": 30, "targets": ["q", "k", "v", "proj", "fc2"]},
    "glora": {"name": "glora", "rank": 3, "targets": ["q", "v", "proj", "fc2"]},
    "glora-vectors": {
        "name": "glora",
        "a": "scalar",
        "b": "vector",
        "c": "vector",
        "d": "none",
        "e": "none",
        "targets": ["v"],
    },
    "fact-tt": {"name": "fact", "rank": 3, "format": "tt", "targets": ["q", "k", "v", "proj", "fc2"]},
    "fact-tk": {"name": "fact", "rank": 3, "format": "tk", "targets": ["q", "k", "v", "proj", "fc2"]},
    "adapter": {"name": "adapter", "rank": 3},
    "houlsby": {"name": "adapter", "rank": 3, "placement": "houlsby"},
    "adaptformer": {"name": "adapter", "rank": 3, "placement": "parallel", "factor": 0.5},
    "adaptformer-released": {"name": "adapter", "rank": 3, "placement": "parallel", "reads": "residual", "factor": 0.5},
    "adapter-plus": {"name": "adapter", "rank": 3, "placement": "post", "channel_scale": True, "std": 0.01},
    "convpass": {"name": "convpass", "rank": 3},
    "rep-adapter": {"name": "rep_adapter", "rank": 4},
    "sidetune": {"name": "sidetune", "width": 3},
    "ssf": {"name": "ssf"},
    "scales": {"name": "ssf", "targets": ["proj", "norm2"], "shift": False},
    "mlp-head": {"name": "mlp_head"},
    "attention-pool": {"name": "attention_pool", "queries": 4},
    "attention-pool-plain": {"name": "attention_pool", "queries": 6, "values": False},
    "bias": {"name": "bias"},
    "norm": {"name": "norm"},
    "partial": {"name": "partial", "blocks": 2},
    "full": {"name": "full"},
    "gps": {"name": "gps", "connections": 2},
    "gps-weights": {"name": "gps", "bias": False},
    "spt": {"name": "spt_lora", "rank": 2, "budget": 0.02},
}


def state(backbone: Backbone) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in backbone.state_dict().items()}


def same(backbone: Backbone, before: dict[str, Tensor]) -> bool:
    after = backbone.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def train(backbone: Backbone, delta: Delta, steps: int, family: str = "vit") -> dict[str, float]:
    """Trains a fixed regression; returns the largest gradient of each trained tensor over all steps."""
    optimizer = torch.optim.Adam(delta.parameters(), lr=1e-2)
    target = torch.randn(3, backbone.num_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    largest: dict[str, float] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        (backbone(images(family)) - target).square().mean().backward()
        for name, parameter in delta.named_parameters():
            assert parameter.grad is not None, name
            largest[name] = max(largest.get(name, 0.0), float(parameter.grad.abs().max()))
        optimizer.step()
    return largest


# Softmax cancels what is added to all keys alike.
DEAD = "attn/k_norm/bias"


def test_every_delta_is_covered() -> None:
    assert {str(spec["name"]) for spec in SPECS.values()} | {"linear"} == set(DELTAS)


def test_a_linear_probe_trains_nothing_but_the_head_of_any_backbone() -> None:
    backbone = create_backbone("resnet18", "random")
    model = TunedModel(backbone, 4, [{"name": "linear"}])
    assert set(model.owned()) == {"head.weight", "head.bias"}
    halves = model.constant_part()
    assert halves is not None
    x = torch.rand(2, 3, 224, 224)
    assert torch.equal(halves[1](halves[0](x)), backbone(x))


def test_an_mlp_head_is_behind_what_is_constant() -> None:
    model = TunedModel(make("swin")[0], 4, [{"name": "mlp_head"}])
    halves = model.constant_part()
    assert halves is not None
    before = model.backbone.pooled(images("swin"))
    assert torch.equal(halves[0](images("swin")), before)
    assert relative(halves[1](before), before) > 1e-3
    assert torch.equal(halves[1](before), model.backbone(images("swin")))


def test_a_frame_changes_only_the_frame_and_an_added_prompt_only_its_patch() -> None:
    backbone, _ = make("vit")
    frame = PromptPad(backbone, width=8)  # of 32 pixels: the inner 2 × 2 of 4 × 4 patches stay
    nn.init.ones_(frame.rows)
    nn.init.ones_(frame.columns)
    assert frame.frame().sum() == 3 * (32**2 - 16**2)
    assert frame.frame()[:, 8:24, 8:24].abs().sum() == 0
    added = PromptAdd(backbone)
    assert isinstance(added.tokens, nn.Parameter)
    added.tokens.data[0, 5] = 1.0
    seen: list[Tensor] = []
    first = backbone.layout.blocks[0]
    first.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    backbone(images())
    added.attach()
    backbone(images())
    assert (seen[1] - seen[0]).abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == [1 + 5]


def test_prompts_behind_a_projection_are_stored_as_plain_prompts() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 3, "project": 5}])
    tuned = backbone(images())
    specs, tensors = delta.folded()
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {"parts.0.tokens": (3, 3, 24)}
    delta.detach()
    attach(backbone, specs).load_state_dict(tensors)
    assert torch.equal(backbone(images()), tuned)


def test_a_second_delta_trains_on_a_frozen_first() -> None:
    backbone, _ = make("vit")
    before = state(backbone)
    first = attach(backbone, [SPECS["prompt"]])
    train(backbone, first, steps=3)
    first.requires_grad_(False)
    kept = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    tuned = backbone(images())
    second = attach(backbone, [SPECS["lora"]])
    assert torch.equal(backbone(images()), tuned)
    train(backbone, second, steps=5)
    assert relative(backbone(images()), tuned) > 1e-3
    assert all(torch.equal(tensor, kept[key]) for key, tensor in first.state_dict().items())
    second.set_strength(0.0)
    assert torch.equal(backbone(images()), tuned)
    first.detach()
    second.detach()
    assert same(backbone, before)


DRAWS = ("pvera",)
"""What is another function each time while it trains."""

SEQUENCES_ONLY = ("prompt-adaptive", "adapter-plus")
PLACED = [(family, name) for family in FAMILIES for name in SPECS if family not in SWINS or name not in SEQUENCES_ONLY]


@pytest.mark.parametrize(("family", "name"), PLACED)
def test_every_trained_tensor_gets_a_gradient_and_nothing_frozen_moves(family: str, name: str) -> None:
    backbone, _ = make(family)
    before = state(backbone)
    delta = attach(backbone, [SPECS[name]]).train()
    largest = train(backbone, delta, steps=2, family=family)
    top = max(largest.values())
    for key, gradient in largest.items():
        if key.endswith(DEAD):
            assert gradient <= 1e-12 * top, key
        else:
            assert gradient > 1e-8 * top, key
    delta.detach()
    assert same(backbone, before)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", SPECS)
def test_strength_moves_from_the_backbone_to_the_tuned_model_exactly(name: str) -> None:
    backbone, _ = make("qk-norm")
    bare = backbone(images())
    delta = attach(backbone, [SPECS[name]]).train(name not in DRAWS)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = backbone(images())
    assert relative(tuned, bare) > 1e-3
    delta.set_strength(0.0)
    assert torch.equal(backbone(images()), bare)
    delta.set_strength(0.5)
    half = backbone(images())
    assert relative(half, bare) > 1e-4
    assert relative(half, tuned) > 1e-4
    delta.set_strength(1.0)
    assert torch.equal(backbone(images()), tuned)


@pytest.mark.parametrize("name", SPECS)
def test_the_number_of_parameters_is_that_of_the_formula(name: str) -> None:
    backbone, _ = make("vit")
    (part,) = attach(backbone, [SPECS[name]]).parts
    assert sum(p.numel() for p in part.parameters()) == part.expected_parameters()  # type: ignore[operator]


def test_biases_of_keys_are_dead_and_those_of_queries_and_values_are_not() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [SPECS["bias"]])
    backbone(images()).square().sum().backward()
    gradients = [p.grad for name, p in delta.named_parameters() if name.endswith("qkv/bias")]
    for gradient in gradients:
        assert gradient is not None
        queries, keys, values = (float(third.abs().max()) for third in gradient.chunk(3))
        assert keys <= 1e-12 * values
        assert queries > 1e-8 * values


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("family", ["vit", "eva02-split", "beit", "swin"])
def test_biases_of_some_maps_are_the_only_ones_that_train(family: str, strength: float) -> None:
    backbone, twin = make(family)
    before = state(backbone)
    delta = attach(backbone, [{"name": "bias", "targets": ["proj", "v"]}])
    blocks = [block for stage in getattr(twin, "layers", [twin]) for block in stage.blocks]
    own = dict(twin.named_parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tuned in delta.parts[0].values.items():  # type: ignore[union-attr, operator]
            change, bias = 0.1 * torch.randn_like(tuned), own[name.replace("/", ".")]
            tuned.add_(change)
            bias[-len(change) :].add_(strength * change)  # of a fused layer the last third
    delta.set_strength(strength)
    assert len(list(delta.parameters())) == 2 * len(blocks)
    assert relative(backbone(images(family)), twin(images(family))) < (1e-12 if strength else 1e-15)
    delta.detach()
    assert same(backbone, before)


def test_maps_without_biases_are_refused() -> None:
    backbone, _ = make("beit")
    for targets, error, said in (
        (["k", "v"], ConfigError, "has no biases of k"),
        (["queries"], UnknownNameError, "Unknown linear map of"),
        ([], ConfigError, "one or more different maps"),
        (["v", "v"], ConfigError, "one or more different maps"),
    ):
        with pytest.raises(error, match=said):
            attach(backbone, [{"name": "bias", "targets": targets}])


def test_golden_numbers_of_parameters() -> None:
    backbone = create_backbone("vit_base_patch16_224", "random")
    counts = {}
    for name in ("prompt", "lora", "bias", "full"):
        spec = {"prompt": {"num_tokens": 50}, "lora": {"rank": 8}}.get(name, {})
        delta = attach(backbone, [{"name": name, **spec}])
        counts[name] = sum(p.numel() for p in delta.parameters())
        delta.detach()
    delta = attach(backbone, DIFFFIT)
    # Of every bias, 25 norms' scales, and two scales a block.
    assert sum(p.numel() for p in delta.parameters()) == counts["bias"] + 25 * 768 + 12 * 2 * 768 == 140_544
    delta.detach()
    # DA-VPT+: 20 prompts a block, 12 · 20 · 768, and the biases of keys and values, 12 · 2 · 768, by which its table
    # has 0.22 M parameters where VPT-deep has 0.20 M.
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 20}, {"name": "bias", "targets": ["k", "v"]}])
    prompts, biases = (sum(p.numel() for p in part.parameters()) for part in delta.parts)
    assert (prompts, biases) == (184_320, 18_432)
    assert round(biases / 1e6, 2) == round(0.22 - 0.20, 2)
    # 12·50·768; 12 blocks · 2 maps · 8·(768+768); ViT-B/16 without head: 85,798,656 (timm's own count).
    assert counts["prompt"] == 460_800
    assert counts["lora"] == 294_912
    assert counts["full"] == 85_798_656
    # 12 · (2·768 norms + 2304 qkv + 768 proj + 3072 + 768 mlp) + patch embedding 768 + last norm 768.
    assert counts["bias"] == 12 * (2 * 768 + 2304 + 768 + 3072 + 768) + 2 * 768


def test_deltas_compose_and_come_off_in_any_order() -> None:
    specs = [SPECS["prompt"], SPECS["lora"], SPECS["bias"]]
    outputs: list[Tensor] = []
    for order in permutations(range(3)):
        backbone, _ = make("vit")
        before = state(backbone)
        deltas = [attach(backbone, [specs[i]]) for i in order]
        for i, delta in sorted(zip(order, deltas, strict=True), key=lambda pair: pair[0]):
            torch.manual_seed(i)
            for parameter in delta.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        if not outputs:
            first = dict(zip(order, deltas, strict=True))
        else:  # the prompts are drawn at random in each
            own = dict(zip(order, deltas, strict=True))
            for i in range(3):
                own[i].load_state_dict(first[i].state_dict())
        outputs.append(backbone(images()))
        for delta in (deltas[1], deltas[0], deltas[2]):
            delta.detach()
        assert same(backbone, before)
    assert all(relative(output, outputs[0]) <= 1e-12 for output in outputs[1:])


@pytest.mark.parametrize(
    "name", ["lora", "dora", "vera", "fact-tt", "fact-tk", "glora", "rep-adapter", "ssf", "scales"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_reparameterisations_merge_to_the_same_function_and_unmerge_bit_for_bit(family: str, name: str) -> None:
    backbone, _ = make(family)
    before = state(backbone)
    delta = attach(backbone, [SPECS[name]])
    train(backbone, delta, steps=3, family=family)
    apart = backbone(images(family))
    (part,) = delta.parts
    assert isinstance(part, MergeablePart)
    part.merge()
    assert same(backbone, before)  # the change is in what is computed with, not in the parameters
    assert relative(backbone(images(family)), apart) <= 1e-12
    delta.set_strength(0.5)
    merged = backbone(images(family))
    part.unmerge()
    assert relative(merged, backbone(images(family))) <= 1e-12
    delta.detach()
    assert same(backbone, before)


@pytest.mark.parametrize(
    ("placement", "reads"),
    [(place, "normalised") for place in ("pfeiffer", "houlsby", "parallel", "post")] + [("parallel", "residual")],
)
def test_adapters_are_where_their_papers_or_released_codes_put_them(placement: str, reads: str) -> None:
    backbone, twin = make("layer-scale")
    spec = {"name": "adapter", "rank": 4, "placement": placement, "factor": 0.5, "activation": "relu", "reads": reads}
    spec |= {"channel_scale": placement in ("post", "houlsby")}
    delta = attach(backbone, [spec])
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(std=0.3)
    (part,) = delta.parts

    def bottleneck(key: str, x: Tensor) -> Tensor:
        assert isinstance(part, Adapter)
        up, down = cast("nn.Linear", part.up[key]), cast("nn.Linear", part.down[key])
        change = cast("Tensor", 0.5 * up(down(x).clamp(min=0)))
        return change * part.scale[key] if key in part.scale else change

    model = cast("Any", twin)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images()))))
    for index, block in enumerate(model.blocks):
        a = block.attn(block.norm1(x))
        x = x + block.ls1(a + bottleneck(f"{index}_attn", a) if placement == "houlsby" else a)
        z = block.norm2(x)
        m = block.mlp(z)
        fed = {"normalised": z, "residual": x}[reads] if placement == "parallel" else m
        x = x + block.ls2(m if placement == "post" else m + bottleneck(f"{index}_mlp", fed))
        x = x + bottleneck(f"{index}_block", x) if placement == "post" else x
    assert relative(backbone(images()), model.norm(x)[:, 0]) <= 1e-12


def test_adapter_plus_has_as_many_parameters_as_in_its_paper() -> None:
    backbone = create_backbone("vit_base_patch16_224", "random")
    heads = 769 * 940 / 19  # the 19 tasks of VTAB have 940 classes
    for rank, millions in {1: "0.07", 2: "0.09", 4: "0.13", 8: "0.20", 16: "0.35"}.items():  # its table of VTAB
        part = Adapter(backbone, rank=rank, placement="post", channel_scale=True)
        own = sum(parameter.numel() for parameter in part.parameters())
        assert own == 12 * (2 * 768 * rank + rank + 2 * 768)
        assert f"{(own + heads) / 1e6:.2f}" == millions


def test_an_adapter_behind_the_blocks_of_a_swin_is_refused() -> None:
    with pytest.raises(UnsupportedBackboneError, match="give pfeiffer, houlsby or parallel"):
        attach(make("swin")[0], [SPECS["adapter-plus"]])


def test_the_layers_of_an_adapter_are_drawn_within_two_deviations() -> None:
    part = Adapter(create_backbone("vit_nano_patch8_64"), placement="post", std=0.01)
    for layer in [*part.down.values(), *part.up.values()]:
        assert isinstance(layer, nn.Linear)
        assert 0.006 < layer.weight.std() < 0.011
        assert layer.weight.abs().max() <= 0.02
        assert not layer.bias.any()


DIFFFIT: list[dict[str, Any]] = [
    {"name": "bias"},
    {"name": "norm", "bias": False},
    {"name": "ssf", "std": 0.0, "targets": ["attn.proj", "mlp.fc2"], "shift": False},
]


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("family", ["layer-scale", "beit", "eva02-fused"])
def test_difffit_is_biases_norms_and_a_scale_of_every_branch(family: str, alpha: float) -> None:
    backbone, twin = make(family)
    delta = attach(backbone, DIFFFIT)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        delta.set_strength(alpha)
        features = backbone(images(family))
        own = dict(twin.named_parameters())
        trained = [cast("Any", part).values for part in delta.parts[:2]]
        for key, value in [pair for values in trained for pair in values.items()]:
            own[key.replace("/", ".")].lerp_(value, alpha)
        for key, scale in cast("Any", delta.parts[2]).scale.items():
            branch = cast("Any", twin).blocks[int(key.split("/")[1])].get_submodule(key.split("/")[2])
            branch.register_forward_hook(lambda _, args, out, scale=scale: out * (1 + alpha * (scale - 1)))
        model = cast("Any", twin)
        pixels = backbone.normalize(images(family))
        assert relative(features, model.forward_head(model.forward_features(pixels), pre_logits=True)) <= 1e-12
    assert sum(parameter.numel() for parameter in delta.parameters()) == sum(
        cast("Any", part).expected_parameters() for part in delta.parts
    )


def test_lora_on_one_map_of_the_fused_layer_is_the_layer_with_that_matrix_changed() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [{"name": "lora", "rank": 2, "scale": 6.0, "targets": ["k"]}])
    train(backbone, delta, steps=2)
    ours = backbone(images())
    other, _ = make("vit")
    (lora,) = delta.parts
    assert isinstance(lora, Lora)
    with torch.no_grad():
        for index, attention in enumerate(other.layout.attentions):
            change = 3.0 * lora.up[f"{index}_k"] @ lora.down[f"{index}_k"]
            attention.qkv.weight[24:48] += change
    assert relative(other(images()), ours) <= 1e-12


def test_a_trained_model_moves_to_another_precision_and_back_off() -> None:
    backbone, _ = make("vit")
    delta = attach(backbone, [SPECS["norm"]])
    model = nn.ModuleList([backbone, delta]).float()
    delta.detach()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert backbone(images()).dtype == torch.float32


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        (
            [{"name": "lora", "targets": ["qq"]}],
            UnknownNameError,
            r"did you mean 'q'\? Known are q, k, v, proj, fc1, fc2",
        ),
        ([{"name": "lora", "targets": []}], ConfigError, "at least one target of q, k, v"),
        ([{"name": "lora", "rank": 0}], ConfigError, "rank of LoRA must be at least 1"),
        ([{"name": "adapter", "rank": 0}], ConfigError, "rank of an adapter must be at least 1"),
        ([{"name": "adapter", "activation": "rely"}], UnknownNameError, "did you mean 'relu'"),
        ([{"name": "adapter", "placement": "parralel"}], UnknownNameError, "did you mean 'parallel'"),
        (
            [{"name": "adapter", "placement": "parallel", "reads": "residuum"}],
            UnknownNameError,
            "did you mean 'residual'",
        ),
        ([{"name": "adapter", "reads": "residual"}], ConfigError, "is for placement parallel, got pfeiffer"),
        ([{"name": "partial", "blocks": 4}], ConfigError, "has 3 blocks: partial takes 1 to 3, got 4"),
        ([{"name": "bias"}, {"name": "norm"}], ConfigError, "Two deltas train .*norm1.bias: keep one"),
        ([{"name": "mlp_head", "layers": 1}], ConfigError, "2 to 64 layers, got 1"),
        ([{"name": "attention_pool", "queries": 5}], ConfigError, "24 features have no 5 equal parts"),
        ([{"name": "attention_pool", "queries": 0}], ConfigError, "24 features have no 0 equal parts"),
        ([{"name": "attention_pool", "queries": 2}] * 2, ConfigError, "would each be the pool: keep one"),
        ([{"name": "sidetune", "width": 0}], ConfigError, "must be at least 1, got 0"),
        ([{"name": "prompt_pad", "width": 16}], ConfigError, "does not fit 32 pixels: give 1 to 15"),
        ([{"name": "prompt_add", "layers": [0, 1]}], ConfigError, "layers needs deep prompts"),
        ([{"name": "prompt", "num_tokens": 1, "project": 0}], ConfigError, "positive width"),
        ([{"name": "ssf", "targets": []}], ConfigError, "one or more layers by name, such as attn.proj"),
        ([{"name": "ssf", "targets": ["attn.prj"]}], UnknownNameError, r"layer of .* did you mean"),
        ([{"name": "lorra"}], UnknownNameError, "did you mean 'lora'"),
    ],
)
def test_bad_deltas_are_refused_and_leave_the_backbone_alone(
    specs: list[dict[str, Any]], error: type[Exception], message: str
) -> None:
    backbone, _ = make("vit")
    before = state(backbone)
    with pytest.raises(error, match=message):
        attach(backbone, specs)
    assert same(backbone, before)
