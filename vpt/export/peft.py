"""A LoRA in the format of peft."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.atomic_write import atomic_write, write_json, write_text
from vpt.backbones.frozen_weights import plain_convolution
from vpt.deltas.lora import Lora
from vpt.errors import ConfigError
from vpt.image_size import sides
from vpt.models.classifier import TunedModel

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
README = """# LoRA for {name}

Written by vpt. It belongs on the weights {weights}; images are {size} pixels, normalised with mean {mean} and
standard deviation {std}{unit}.

```python
import peft, timm

# or with the weights it was trained on
model = timm.create_model("{name}", pretrained=True, num_classes={classes}{sized})
model = peft.PeftModel.from_pretrained(model, "this folder")
```
"""


@checked
def export_peft(model: TunedModel, folder: str | Path) -> Path:
    """Writes a LoRA delta and its head as an adapter that `peft.PeftModel.from_pretrained` loads onto the timm model.

    Changes of parts of a fused layer become one change of that layer whose rank is their sum, so that the function is
    the same. The folder is made; it gets the `PEFT_FILES`.

    Raises:
        ConfigError: The model has another delta, another strength than 1, or a backbone with several classifiers.
        OutputError: The folder cannot be written.
    """
    if model.targets == "regression":
        raise ConfigError("peft export knows no head that gives numbers in their own units: export to onnx or torch.")
    lora = _only_lora(model)
    classifier = cast("Any", model.backbone.model).pretrained_cfg.get("classifier")
    if not isinstance(classifier, str):
        raise ConfigError(f"{model.backbone.name} has classifiers {classifier}: peft export knows one.")
    tensors, ranks, factors = _layers(model, lora)
    tensors |= {f"base_model.model.{classifier}.{key}": part for key, part in model.head.named_parameters()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.backbone.weights_id,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(factors.values())),
        "rank_pattern": ranks,
        "alpha_pattern": factors,
        "target_modules": sorted(ranks),
        "modules_to_save": [classifier],
    }
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    folder = Path(folder)
    with atomic_write(folder / PEFT_FILES[0]) as partial:
        save_file(kept, partial, metadata={"format": "pt"})
    write_json(folder / PEFT_FILES[1], config)
    write_text(folder / PEFT_FILES[2], _readme(model))
    return folder


def _readme(model: TunedModel) -> str:
    backbone = model.backbone
    mean, std = ([round(float(value), 6) for value in buffer.flatten()] for buffer in (backbone.mean, backbone.std))
    return README.format(
        name=backbone.name,
        weights=backbone.weights_id,
        size=" × ".join(map(str, sides(backbone.image_size))),
        sized=(f", img_size={backbone.image_size}" if backbone.has_layout else "")
        + (f", in_chans={len(backbone.mean)}" if backbone.raw else ""),
        unit=" of each channel, in the unit of the files" if backbone.raw else "",
        mean=mean,
        std=std,
        classes=len(model.class_names),
    )


def _only_lora(model: TunedModel) -> Lora:
    parts = [] if model.delta is None else list(model.delta.parts)
    if len(parts) != 1 or not isinstance(parts[0], Lora):
        names = ", ".join(type(part).__name__ for part in parts) or "no delta"
        raise ConfigError(f"peft export takes a model with one LoRA, this one has {names}.")
    if model.strength != 1.0 or parts[0].strength != 1.0:
        raise ConfigError("peft export takes a model at strength 1, whose head and LoRA are those that were trained.")
    return parts[0]


def _known_to_peft(layer: nn.Conv2d) -> bool:
    """Whether peft's convolution beside it, of the same kernel, stride and padding, is the same change."""
    usual = layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    return plain_convolution(layer) and usual


def _layers(model: TunedModel, lora: Lora) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """Tensors in peft's names, and the rank and alpha of each layer: peft scales by alpha / rank."""
    names = {id(module): name for name, module in model.backbone.model.named_modules()}
    attentions = model.backbone.attention_layout.attentions if model.backbone.has_attention else []
    past = {id(a.qkv) for a in attentions if hasattr(a, "qkv_bias_separate")}
    if any(id(target.module) in past for target in lora.targets.values()):
        raise ConfigError(
            f"timm's {model.backbone.name} reads the weight of its query-key-value layer past the layer, where peft's "
            "change would be lost: peft export takes LoRA on proj, fc1 and fc2 there."
        )
    if odd := [key for key, layer in lora.convolutions.items() if not _known_to_peft(layer)]:
        raise ConfigError(
            "peft export takes no LoRA on convolutions that are grouped, dilated, padded otherwise than with zeros, or "
            f"standardise their weight, such as {odd[0].replace('/', '.')}."
        )
    changes = defaultdict(list)
    for key, target in lora.targets.items():
        changes[names[id(target.module)]].append((target, lora.down[key], lora.up[key]))
    tensors, ranks, factors = {}, {}, {}
    for name, own in changes.items():
        down = torch.cat([down for _, down, _ in own])
        up = down.new_zeros(own[0][0].module.out_features, len(down))
        rank = len(down) // len(own)
        for number, (target, _, part) in enumerate(own):
            up[target.start : target.stop, number * rank : (number + 1) * rank] = part.detach()
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        ranks[name], factors[name] = len(down), lora.factor * len(down)
    for key, layer in lora.convolutions.items():
        name, rank = names[id(layer)], len(lora.down[key])
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora.down[key]
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora.up[key].view(-1, rank, 1, 1)
        ranks[name], factors[name] = rank, lora.factor * rank
    return tensors, ranks, factors
