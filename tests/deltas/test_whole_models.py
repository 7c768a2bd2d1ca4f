"""Prompts on models that timm runs whole, against the concatenation written out, in float64, all parameters drawn."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vpt
from tests.deltas.whole_oracle import attentions, concatenate
from vpt.backbones import Backbone, create_backbone
from vpt.deltas import Delta, attach
from vpt.errors import UnsupportedBackboneError
from vpt.export import export_onnx
from vpt.models.classifier import TunedModel
from vpt.models.delta_file import save_delta

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "relpos": ("vit_relpos_small_patch16_224", 32, TINY),
    "relpos-shared": ("vit_srelpos_small_patch16_224", 32, TINY),
    "relpos-class": ("vit_relpos_base_patch16_cls_224", 32, TINY),
    "relpos-post-norm": ("vit_relpos_base_patch32_plus_rpn_256", 32, TINY),
    "sam": ("samvit_base_patch16", 40, TINY | {"img_size": 40, "window_size": 3, "global_attn_indexes": (1,)}),
    "parallel": ("vit_small_patch16_18x2_224", 32, TINY),
    "parallel-scaling": ("vit_pwee_patch16_reg1_gap_256", 32, TINY),
    "differential": ("vit_dwee_patch16_reg1_gap_256", 32, TINY),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "naflex": ("naflexvit_base_patch16_gap", 32, {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}),
    "naflex-rope": (
        "naflexvit_base_patch16_gap",
        32,
        {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "rope_type": "axial"},
    ),
    "qwen3": ("qwen3_vit_88m", 32, TINY | {"pos_embed_grid_size": 4}),
    "deepseek": ("deepseek_vit_412m", 32, TINY),
    "gemma4": ("gemma4_vit_167m", 32, TINY | {"head_dim": 16, "num_kv_heads": 1}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": (64, 64), "stages": (1, 1, 2, 1), "embed_dim": 16}),
    "hieradet": ("hieradet_small", 64, {"embed_dim": 16, "num_heads": 1}),
    "maxvit": ("maxvit_tiny_tf_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)}),
    "maxvit-pool": ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "maxvit-parallel": (
        "maxvit_tiny_pm_256",
        64,
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (64, 64, 64, 64)},
    ),
    "maxxvit": ("maxxvit_rmlp_nano_rw_256", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "coatnet": ("test_coatnet", 64, {"img_size": 64}),
    "mvit": ("mvitv2_tiny", 64, {"img_size": 64}),
    "mvit-class": ("mvitv2_small_cls", 64, {"img_size": 64}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "depth": 2}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": [1, 1, 1]}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {"depths": (1, 1, 1, 1)}),
    "pvt": ("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
    "pvt-linear": ("pvt_v2_b2_li", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 30, 32)}),
    "twins-svt": ("twins_svt_small", 64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 16, 32, 32)}),
    "twins-pcpvt": ("twins_pcpvt_small", 64, {"depths": (1, 1, 2, 1), "embed_dims": (16, 16, 30, 32)}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2)}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "crossvit": ("crossvit_tiny_240", 240, {"depth": [[1, 1, 0], [1, 1, 0]]}),
    "tnt": ("tnt_s_patch16_224", 32, {"img_size": 32, "depth": 2}),
    "swin-cr": (
        "swinv2_cr_tiny_224",
        64,
        {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2)},
    ),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 48}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "caformer": ("caformer_s18", 64, {}),
    "fastvit": ("fastvit_sa12", 64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}),
    "nextvit": ("nextvit_small", 64, {}),
    "mobilenetv4": ("mobilenetv4_hybrid_medium", 64, {}),
}


def make(family: str) -> tuple[Backbone, nn.Module]:
    """A float64 backbone and a twin of its timm model, all numbers of which are drawn."""
    name, size, options = MODELS[family]
    torch.manual_seed(0)
    model, twin = (timm.create_model(name, num_classes=0, **options).double().eval() for _ in range(2))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or key.endswith(("_min", "_max")):  # where Gemma clamps
                continue
            fan = tensor[0].numel() if tensor.ndim > 1 else 1
            scale = 0.3 if tensor.ndim < 2 else fan**-0.5
            drawn = torch.randn_like(tensor) * scale
            if tensor.ndim == 1 and key.endswith(("weight", "gamma", "gamma_1", "gamma_2")):
                drawn += 0.7
            tensor.copy_(drawn.abs() + 0.5 if key.endswith("running_var") else drawn)
    twin.load_state_dict(model.state_dict())
    return Backbone(model, name, "random", "random", size, "none").double(), twin.eval().requires_grad_(False)


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def prompted(backbone: Backbone, number: int = 2) -> tuple[Delta, list[Tensor]]:
    """Prompts, and copies of them in the order of the blocks."""
    delta = attach(backbone, [{"name": "prompt", "num_tokens": number}])
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    return delta, [tokens.detach().clone() for parameter in delta.parameters() for tokens in parameter]


def features(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return found


def close(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-10, error


@pytest.mark.parametrize("family", MODELS)
def test_deep_prompts_are_the_concatenation_with_its_gradients(family: str) -> None:
    backbone, twin = make(family)
    x = images(backbone.input_shape[1])
    bare = features(twin, x)
    assert torch.equal(backbone(x), bare)
    delta, prompts = prompted(backbone)
    assert len(prompts) == len(attentions(twin)) == len(backbone.attention_layout.attentions)
    theirs = [each.requires_grad_() for each in prompts]
    concatenate(twin, theirs)
    ours, expected = backbone(x), features(twin, x)
    close(ours, expected)
    assert not torch.allclose(ours, bare)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).double()
    gradients = torch.autograd.grad((ours * weights).sum(), list(delta.parameters()))
    own = [row for gradient in gradients for row in gradient]
    for mine, other in zip(own, torch.autograd.grad((expected * weights).sum(), theirs), strict=True):
        assert (mine - other).abs().max() <= 1e-10 * max(1.0, float(other.abs().max()))
    delta.set_strength(0.5)
    concatenate(twin, prompts, 0.5)
    close(backbone(x), features(twin, x))
    delta.set_strength(0.0)
    assert torch.equal(backbone(x), bare)
    delta.set_strength(1.0)
    delta.detach()
    assert torch.equal(backbone(x), bare)


SOME = ["coatnet", "hiera", "pvt", "relpos", "cait", "swin-cr"]
"""One of each way: maps, windows of five dimensions, smaller maps of keys, a bias, heads that talk, shifted windows."""


@pytest.mark.parametrize("family", SOME)
def test_checkpointing_copies_and_threads_change_nothing(family: str) -> None:
    backbone, _ = make(family)
    x = images(backbone.input_shape[1])
    delta, _ = prompted(backbone)
    parameters = list(delta.parameters())

    def step() -> list[Tensor]:
        first, second = backbone(x), backbone(x.flip(0))  # two graphs of other images at once
        return [first, second, *torch.autograd.grad((first * second).sum(), parameters)]

    expected = step()
    model: Any = backbone.model
    model.set_grad_checkpointing(True)
    assert all(torch.equal(own, other) for own, other in zip(step(), expected, strict=True))
    model.set_grad_checkpointing(False)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(backbone(x))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(own, expected[0]) for own in found] == [True] * 3
    assert torch.equal(copy.deepcopy(backbone)(x), expected[0])


@pytest.mark.parametrize("family", SOME[:4])
def test_one_graph_holds_the_prompts(family: str) -> None:
    backbone, _ = make(family)
    x = images(backbone.input_shape[1])
    delta, _ = prompted(backbone)
    torch.compiler.reset()
    compiled = torch.compile(backbone.pooled, fullgraph=True, backend="eager")
    for strength in (1.0, 0.0):
        delta.set_strength(strength)
        close(compiled(x), backbone(x))


@pytest.mark.parametrize("family", SOME)
def test_prefixes_gates_and_dropout_of_whole_prompts_have_their_place(family: str) -> None:
    backbone, _ = make(family)
    x = images(backbone.input_shape[1])
    bare = backbone(x)
    gated = attach(backbone, [{"name": "prompt", "num_tokens": 3, "gate": {"init": -30.0}}])
    weightless = family != "cait"  # whose map behind the softmax gives every key some weight
    if weightless:
        close(backbone(x), bare)
    gated.detach()
    dropped = attach(
        backbone, [{"name": "prompt", "num_tokens": 3, "dropout": 0.999999, "dropout_mode": "prompt"}]
    ).train()
    if weightless:
        close(backbone(x), bare)
    dropped.detach()
    prefix = attach(backbone, [{"name": "prefix", "num_tokens": 2, "std": 1.0}])
    assert not torch.allclose(backbone(x), bare)
    prefix.set_strength(0.0)
    assert torch.equal(backbone(x), bare)


def test_a_gate_of_each_head_is_of_both_its_softmaxes_in_differential_attention() -> None:
    backbone, twin = make("differential")
    x = images(backbone.input_shape[1])
    delta = attach(backbone, [{"name": "prompt", "num_tokens": 2, "gate": {"init": math.log(3)}}])
    part: Any = delta.parts[0]
    with torch.no_grad():
        part.tokens.normal_()
    concatenate(twin, [tokens.detach().repeat(3, 1) for tokens in part.tokens])
    close(backbone(x), features(twin, x))
    with torch.no_grad():
        part.gate.view(2, 2)[0, 1] = -math.inf  # the second head of the first block
    attention, tokens = backbone.attention_layout.attentions[0], torch.randn(1, 5, 24).double()
    shares = attention.weights(None, tokens)[..., 5:].sum(dim=-1)[0].amax(dim=1)
    assert (shares > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("spec", [{"deep": False}, {"adaptive": {}}, {"init": "mean"}])
def test_what_needs_the_tokens_one_by_one_is_refused(spec: dict[str, Any]) -> None:
    backbone, _ = make("coatnet")
    with pytest.raises(UnsupportedBackboneError, match="timm runs this model whole"):
        attach(backbone, [{"name": "prompt", "num_tokens": 2} | spec])
    with pytest.raises(UnsupportedBackboneError, match="Shallow prompts, these by the names of the papers"):
        attach(backbone, [{"name": "adapter"}])


def test_files_banks_and_exports_take_them(tmp_path: Path) -> None:
    tasks: dict[str, tuple[int, list[dict[str, Any]]]] = {
        "one": (3, [{"name": "prompt", "num_tokens": 2, "gate": {}}]),
        "two": (5, [{"name": "prompt", "num_tokens": 4}, {"name": "prefix", "num_tokens": 1}]),
    }
    files = {}
    for task, (classes, specs) in tasks.items():
        model = TunedModel(create_backbone("test_coatnet", "random"), classes, specs)
        with torch.no_grad():
            for tensor in model.owned().values():
                tensor.normal_(std=0.5)
        files[task] = save_delta(tmp_path / f"{task}.safetensors", model)
    bank = vpt.PromptBank(files)
    x = torch.rand(3, 3, 160, 160)
    alone = {task: vpt.load(file) for task, file in files.items()}
    order = ["two", "one", "two"]
    with torch.no_grad():
        for image, task, logits in zip(x, order, bank(x, order), strict=True):
            torch.testing.assert_close(logits, alone[task](image[None])[0], rtol=1e-4, atol=1e-4)
    pytest.importorskip("onnxscript", reason="the optional library onnxscript is not installed")
    whole = alone["two"]
    assert isinstance(whole, TunedModel)
    assert export_onnx(whole, tmp_path / "model.onnx").difference < 1e-3
