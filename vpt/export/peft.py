"""A LoRA, DoRA, VeRA or MLAE in the format of peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vpt.argument_types import checked
from vpt.atomic_write import atomic_write, write_json, write_text
from vpt.backbones.frozen_weights import plain_convolution
from vpt.backbones.target_modules import LinearTarget
from vpt.deltas.low_rank.change import LowRankChange
from vpt.deltas.low_rank.dora import Dora
from vpt.deltas.low_rank.lora import Lora
from vpt.deltas.low_rank.pvera import Pvera
from vpt.deltas.low_rank.vera import Vera
from vpt.errors import ConfigError
from vpt.image_size import sides
from vpt.models.classifier import TunedModel

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
README = """# {method} for {name}

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
    """Writes a LoRA, DoRA, VeRA or MLAE and its head as an adapter that peft loads onto the timm model.

    It is `peft.PeftModel.from_pretrained` that does. Changes of parts of a fused layer become one change of that layer
    whose rank is their sum, so that the function is the same. The folder is made; it gets the `PEFT_FILES`.

    Raises:
        ConfigError: The model has another delta, another strength than 1, or a backbone with several classifiers.
        OutputError: The folder cannot be written.
    """
    if model.targets == "regression":
        raise ConfigError("peft export knows no head that gives numbers in their own units: export to onnx or torch.")
    part = _only_part(model)
    classifier = cast("Any", model.backbone.model).pretrained_cfg.get("classifier")
    if not isinstance(classifier, str):
        raise ConfigError(f"{model.backbone.name} has classifiers {classifier}: peft export knows one.")
    tensors, own = _vera(model, part) if isinstance(part, Vera) else _lora(model, part)
    tensors |= {f"base_model.model.{classifier}.{key}": each for key, each in model.head.named_parameters()}
    config = {
        "task_type": None,
        "base_model_name_or_path": model.backbone.weights_id,
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": [classifier],
        **own,
    }
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    folder = Path(folder)
    with atomic_write(folder / PEFT_FILES[0]) as partial:
        save_file(kept, partial, metadata={"format": "pt"})
    write_json(folder / PEFT_FILES[1], config)
    write_text(folder / PEFT_FILES[2], _readme(model, part.method))
    return folder


def _readme(model: TunedModel, method: str) -> str:
    backbone = model.backbone
    mean, std = ([round(float(value), 6) for value in buffer.flatten()] for buffer in (backbone.mean, backbone.std))
    return README.format(
        method=method,
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


def _only_part(model: TunedModel) -> Lora | Vera:
    parts = [] if model.delta is None else list(model.delta.parts)
    if len(parts) != 1 or not isinstance(parts[0], Lora | Vera) or isinstance(parts[0], Pvera):
        names = ", ".join(type(part).__name__ for part in parts) or "no delta"
        raise ConfigError(f"peft export takes a model with one LoRA, DoRA, VeRA or MLAE, this one has {names}.")
    if model.strength != 1.0 or parts[0].strength != 1.0:
        raise ConfigError(
            f"peft export takes a model at strength 1, whose head and {parts[0].method} are those that were trained."
        )
    return parts[0]


def _known_to_peft(layer: nn.Conv2d) -> bool:
    """Whether peft's convolution beside it, of the same kernel, stride and padding, is the same change."""
    usual = layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    return plain_convolution(layer) and usual


def _names(model: TunedModel, part: LowRankChange) -> dict[int, str]:
    """The name of each module, by its id; a ConfigError where peft's change of one would be lost."""
    attentions = model.backbone.attention_layout.attentions if model.backbone.has_attention else []
    past = {id(a.qkv) for a in attentions if hasattr(a, "qkv_bias_separate")}
    if any(id(target.module) in past for target in part.targets.values()):
        raise ConfigError(
            f"timm's {model.backbone.name} reads the weight of its query-key-value layer past the layer, where peft's "
            f"change would be lost: peft export takes {part.method} on proj, fc1 and fc2 there."
        )
    return {id(module): name for name, module in model.backbone.model.named_modules()}


def _lora(model: TunedModel, lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in peft's names, and its options; the rank and alpha of each layer are its own."""
    names = _names(model, lora)
    if odd := [key for key, layer in lora.convolutions.items() if not _known_to_peft(layer)]:
        raise ConfigError(
            f"peft export takes no {lora.method} on convolutions that are grouped, dilated, padded otherwise than with "
            f"zeros, or standardise their weight, such as {odd[0].replace('/', '.')}."
        )
    tensors: dict[str, Tensor] = {}
    ranks, factors = {}, {}
    for module, keys in lora.by_module.items():
        name, own = names[id(module)], [(lora.targets[key], *lora.factors(key)) for key in keys]
        down = torch.cat([down for _, down, _ in own])
        up = down.new_zeros(module.out_features, len(down))
        rank = len(down) // len(own)
        for number, (target, _, part) in enumerate(own):
            up[target.start : target.stop, number * rank : (number + 1) * rank] = part.detach()
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        ranks[name], factors[name] = len(down), lora.factor * len(down)
        if isinstance(lora, Dora):
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = lora.lengths(module, keys)
    for key, layer in lora.convolutions.items():
        name, (down, up) = names[id(layer)], lora.factors(key)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.view(*up.shape, 1, 1)
        ranks[name], factors[name] = len(down), lora.factor * len(down)
        if isinstance(lora, Dora):
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = lora.magnitude[key].view(1, -1, 1, 1)
    return tensors, {
        "peft_type": "LORA",
        "lora_dropout": 0.0,
        "use_dora": isinstance(lora, Dora),
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(factors.values())),
        "rank_pattern": ranks,
        "alpha_pattern": factors,
        "target_modules": sorted(ranks),
    }


def _vera(model: TunedModel, vera: Vera) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in peft's names, and its options.

    peft has one d for a layer, and gives all layers the same B. So each place within a layer, such as that of the
    queries, gets ranks of its own, in which B is 0 outside of it and d is 0 in layers that have no map there.
    """
    if vera.convolutions:
        first = next(iter(vera.convolutions)).replace("/", ".")
        raise ConfigError(f"peft knows no VeRA on convolutions such as {first}: export to onnx or torch.")
    names = _names(model, vera)
    rooms = {place: number for number, place in enumerate(dict.fromkeys(map(_place, vera.targets.values())))}
    rank, inputs = len(vera.shared_down), max(module.in_features for module in vera.by_module)
    up = vera.shared_up.new_zeros(max(module.out_features for module in vera.by_module), rank * len(rooms))
    for (start, stop), room in rooms.items():
        up[start:stop, room * rank : (room + 1) * rank] = vera.shared_up[: stop - start]
    tensors = {"base_model.vera_A": vera.shared_down[:, :inputs].repeat(len(rooms), 1), "base_model.vera_B": up}
    for module, keys in vera.by_module.items():
        d, b = up.new_zeros(up.shape[1]), up.new_zeros(module.out_features)
        for key in keys:
            (start, stop), room = _place(vera.targets[key]), rooms[_place(vera.targets[key])]
            d[room * rank : (room + 1) * rank] = vera.d[key].detach()
            b[start:stop] = vera.b[key].detach()
        tensors[f"base_model.model.{names[id(module)]}.vera_lambda_d"] = d
        tensors[f"base_model.model.{names[id(module)]}.vera_lambda_b"] = b
    return tensors, {
        "peft_type": "VERA",
        "vera_dropout": 0.0,
        "r": up.shape[1],
        "projection_prng_key": vera.seed,
        "save_projection": True,
        "target_modules": sorted(names[id(module)] for module in vera.by_module),
    }


def _place(target: LinearTarget) -> tuple[int, int]:
    return target.start, target.stop
